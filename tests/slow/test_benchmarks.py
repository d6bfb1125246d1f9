"""The benchmarks that need a trained run, on the quickstart's, with a catalogue that is hardly larger."""

import pytest

from benchmarks.push_and_load import enlarge
from benchmarks.serving import opening_claims, request_claims
from benchmarks.vectors import NOISE, PROBES, measure
from training.export import export

pytestmark = pytest.mark.slow


def test_serving_is_measured_on_the_default_recipes_model(quickstart, tmp_path):
    run, _ = quickstart
    enlarge(run, tmp_path, 600)
    claims = [
        *opening_claims(tmp_path / "model", run / "model", "600 items", repeats=1),
        *request_claims(tmp_path / "model", "600 items", repeats=1, count=3),
    ]
    assert [claim.claim.split(" ÷ ")[0] for claim in claims] == [
        "from_pretrained",
        "first recommendation",
        "opening the pipeline",
        "one request by recommend(), p50",
        "one request by recommend(), p99",
        "one request by pipeline, p50",
        "one request by pipeline, p99",
    ]
    assert all(claim.ours > 0 and claim.reference > 0 for claim in claims)


def test_an_index_is_measured_on_the_default_recipes_vectors(quickstart, tmp_path):
    pytest.importorskip("faiss")  # an extra of the benchmarks
    vectors = export(quickstart[0], tmp_path / "vectors", progress=False)
    (recall,) = measure(vectors, "sample", None, NOISE, PROBES)
    assert 0.8 < recall.ratio <= 1
    speed, *others = list(measure(vectors, "sample", 2000, NOISE, PROBES))[1:]
    assert (speed.unit, len(speed.runs), len(others)) == ("queries/s", 5, 2)
