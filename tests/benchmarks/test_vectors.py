"""The arithmetic of the index benchmark: what is drawn, what is searched, what is counted."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import vectors
from benchmarks.claims import Claim
from benchmarks.vectors import build, of_one_length, recall, resampled, searches

ITEMS = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32) * np.float32([3, 1, 1, 1, 0.1]) + 1
USERS = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)


def test_recall_is_the_share_of_the_exact_items_that_were_found_in_any_order():
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall(exact[:, ::-1], exact) == 1
    assert recall(np.array([[4, 9, 1, -1], [0, 0, 0, 5]]), exact) == pytest.approx((2 / 4 + 1 / 4) / 2)


def test_the_nearest_vector_of_one_length_has_the_largest_inner_product():
    space, queries = of_one_length(ITEMS), np.pad(USERS, ((0, 0), (0, 1)))
    np.testing.assert_allclose(np.linalg.norm(space, axis=1), np.linalg.norm(ITEMS, axis=1).max(), rtol=1e-5)
    distances = ((queries[:, None] - space) ** 2).sum(-1)
    np.testing.assert_array_equal(distances.argsort(1), (-(USERS @ ITEMS.T)).argsort(1))
    assert space.dtype == np.float32


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_drawn_vectors_have_the_mean_and_the_covariance_of_the_given_ones(noise):
    drawn = resampled(ITEMS, 200_000, noise)
    assert drawn.shape == (200_000, 5)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.mean(0), ITEMS.mean(0), atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(ITEMS.T, bias=True), atol=0.1)


def test_without_noise_the_given_vectors_come_back_and_with_it_new_ones():
    def distance(noise):
        drawn = resampled(ITEMS, 100, noise)
        return np.sqrt(((drawn[:, None] - ITEMS) ** 2).sum(-1)).min(1)

    assert distance(0.0).max() < 1e-5
    assert distance(0.5).min() > 1e-3
    np.testing.assert_array_equal(resampled(ITEMS, 7, 0.5), resampled(ITEMS, 7, 0.5))


def test_an_index_that_looks_everywhere_finds_all(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(vectors, "TOP", 2)
    items = resampled(ITEMS, 39, 0.5)  # one cell
    built = build(items, USERS, tmp_path, probes=5)
    assert (built.top, built.recall) == (1, 1)
    assert built.vectors_size == 39 * 5 * 4
    assert built.size > built.vectors_size
    assert searches(tmp_path, "exact", 3)() == 3
    assert searches(tmp_path, "approximate", 8)() == 8


def test_a_run_gives_its_recall_and_drawn_items_speed_time_and_memory_too(monkeypatch):
    built = vectors.Built(seconds=3.0, peak_memory=7, top=100, recall=0.9, size=3_000_000, vectors_size=2_000_000)
    made = SimpleNamespace(result=lambda: built)
    pool = SimpleNamespace(submit=lambda *_: made)

    class Around:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return pool

        def __exit__(self, *_):
            pass

    searched = Claim("search", "5 items", 200.0, 10.0, "queries/s", 20.0, peak_memory_bytes=[1, 2])
    monkeypatch.setattr(vectors, "ProcessPoolExecutor", Around)
    monkeypatch.setattr(vectors, "Worker", lambda *given: given)
    monkeypatch.setattr(vectors, "together", lambda *workers: nullcontext(workers))
    monkeypatch.setattr(vectors, "alternate", lambda *_, **__: searched)
    (of_run,) = vectors.measure("vectors", "sample", None, 0.5, 64)
    assert (of_run.set, of_run.unit, of_run.ratio) == ("sample", "recall@100", 0.9)
    ratios = [claim.ratio for claim in vectors.measure("vectors", "sample", 5, 0.5, 64)]
    assert ratios == pytest.approx([0.9, 20.0, 3.0 / (1 / 10), 1.5])
