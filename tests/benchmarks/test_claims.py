"""Workers that take turns, ratios of pairs, and the file that claims go to."""

import json
import os
import time
from types import SimpleNamespace

import pytest

from benchmarks.claims import Claim, Worker, alternate, environment, paired, together, write_claims


def counting(first, seconds):
    """What a worker repeats: give the next number, and take so long."""
    numbers = iter(range(first, 100))

    def repeat():
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        return next(numbers)

    return repeat


def failing():
    raise ValueError("no such thing")


def threads():
    return lambda: int(os.environ["OMP_NUM_THREADS"])


def test_the_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_the_medians(capsys):
    claim = paired("ours", "sample", [[1.0, 1.0], [6.0, 2.0], [20.0, 10.0]], unit="s", at_most=1.5)
    assert (claim.ours, claim.reference, claim.ratio) == (6.0, 2.0, 2.0)
    assert "ratio 2 (1 to 3, 3 repeats)  asked ≤ 1.5  MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bounds", "met"),
    [
        ({}, True),
        ({"at_least": 2.0}, True),
        ({"at_least": 2.1}, False),
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
    ],
)
def test_a_claim_keeps_its_bounds_or_not(bounds, met):
    claim = Claim("ours", "sample", 2.0, 1.0, "s", 2.0, **bounds)
    assert claim.is_met is met
    assert ("MISSED" in claim.line()) is not met


def test_workers_take_turns_after_one_repeat_that_does_not_count():
    with Worker(counting, 0, 0.0) as ours, Worker(counting, 10, 0.0) as reference:
        claim = alternate("count", "none", ours, reference, unit="documents/s", repeats=2)
        assert ours.repeat()[0] == 3
        assert reference.repeat()[0] == 13
    assert len(claim.runs) == 2
    assert min(claim.peak_memory_bytes) > 1e6


def test_a_worker_has_its_threads_and_this_process_keeps_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with Worker(threads, threads=2) as worker:
        assert worker.repeat()[0] == 2
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_variables_are_what_they_were_after_the_block(monkeypatch):
    monkeypatch.setenv("OLD", "1")
    monkeypatch.delenv("NEW", raising=False)
    with environment({"OLD": "2", "NEW": "3"}):
        assert (os.environ["OLD"], os.environ["NEW"]) == ("2", "3")
    assert os.environ["OLD"] == "1"
    assert "NEW" not in os.environ


def test_what_fails_in_a_worker_is_told():
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        Worker(failing).ready()


def meeting(folder, name, other):
    """Set up only once another process does so, too."""
    (folder / name).touch()
    until = time.perf_counter() + 60
    while not (folder / other).exists():
        if time.perf_counter() > until:
            raise TimeoutError(f"{other} does not set up")
        time.sleep(0.01)
    return counting(0, 0.0)


def test_workers_set_up_at_the_same_time_and_end_with_the_block(tmp_path):
    with together(Worker(meeting, tmp_path, "one", "two"), Worker(meeting, tmp_path, "two", "one")) as workers:
        assert [worker.repeat()[0] for worker in workers] == [1, 1]
    assert not any(worker.process.is_alive() for worker in workers)


def test_nothing_is_timed_before_both_workers_are_ready():
    calls = []

    def fake(name):
        return SimpleNamespace(
            ready=lambda: calls.append(f"{name} ready"),
            repeat=lambda: calls.append(f"{name} repeats") or (1.0, 1.0),
            peak_memory=1,
        )

    alternate("count", "none", fake("ours"), fake("theirs"), unit="documents/s", repeats=1)
    assert calls == ["ours ready", "theirs ready", "ours repeats", "theirs repeats"]


def test_claims_replace_those_of_their_name_and_set_and_leave_the_rest(tmp_path):
    path = tmp_path / "results" / "speed.json"
    first, second = (Claim("ours", name, 1.0, 1.0, "s", 1.0) for name in ("sample", "ml-100k"))
    write_claims([first, second], path)
    write_claims([Claim("ours", "sample", 3.0, 1.0, "s", 3.0, at_most=4.0)], path)
    rows = json.loads(path.read_text())
    assert [(row["set"], row["ratio"]) for row in rows] == [("ml-100k", 1.0), ("sample", 3.0)]
    assert rows[1]["at_most"] == 4.0
    assert "at_least" not in rows[1]
