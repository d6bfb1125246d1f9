import re
import sys

import pytest
import torch

from benchmarks import gpu

TINY = ["--set", "sample", "--layers", "1", "--width", "32", "--batch", "8", "--batches", "2", "--repeats", "2"]


def test_without_a_gpu_the_same_code_runs_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--items", "20000", *TINY])
    monkeypatch.setattr(gpu, "SIDE_OF_A_PRODUCT", {"cpu": 64})
    gpu.main()
    printed = capsys.readouterr().out
    found = re.findall(
        r"^(\w+): ([\d,]+) tokens/s, MFU ([\d.]+)% of [\d.]+ TFLOP/s in \w+, peak ([\d,]+) MB$", printed, re.M
    )
    assert [stage for stage, *_ in found] == list(gpu.STAGES)
    for _, *values in found:
        assert all(float(value.replace(",", "")) > 0 for value in values)
    for stage in gpu.STAGES:
        assert re.search(rf"^{stage} on cpu, ours ÷ published +sample .* documents/s +ratio", printed, re.M)
    assert re.search(r"^recommendation on cpu, step .* 20,000 items .* asked ≤ 1.2", printed, re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_gpu_it_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no GPU that torch can use here; --device cpu tries the same code" in capsys.readouterr().err


def test_operations_are_counted_over_the_very_steps_that_were_timed(monkeypatch):
    taken = []

    class Steps:
        def __call__(self, number):
            taken.append(number)
            torch.mm(torch.ones(2, 3), torch.ones(3, 5))
            return 4

        def batch(self, number):
            return {"input_ids": torch.zeros(1, 7)}

    seconds = iter(range(100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(seconds))
    found = gpu.ours(Steps(), "cpu", batches=2, repeats=3, rate=10.0)
    assert taken == [*range(gpu.WARM_UP), *range(6), *range(6)]
    # Each repeat takes a second: two steps of seven tokens and four documents, and 2·2·3·5 operations a step.
    assert (found.tokens, found.documents) == (14, [8, 8, 8])
    assert found.utilisation == 6 * 60 / 3 / 10
