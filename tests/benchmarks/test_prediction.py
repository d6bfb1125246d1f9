"""The prediction benchmark: what it ranks is right, what it counts is what was done."""

import numpy as np
import pytest

from benchmarks import prediction
from benchmarks.claims import paired
from benchmarks.prediction import Catalogue, selection
from training.evaluation import scoring


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scoring, "ITEMS_PER_BLOCK", 100)
    return Catalogue(num_users=30, num_items=350)


def test_the_ranking_in_blocks_is_the_sort_of_all_logits_without_the_history(small):
    users = np.arange(10, 20)
    small.check(users)
    ranked = prediction.best_items(small.scores.blocks(users), small.seen[users], users, 100).items
    assert not any(set(ranked[row]) & set(small.seen[user].indices) for row, user in enumerate(users))
    assert len({tuple(row) for row in ranked.tolist()}) == 10


def test_a_wrong_ranking_is_found_out(small, monkeypatch):
    monkeypatch.setattr(prediction, "TOP", 349)  # more than is left after a history
    right = prediction.best_items
    monkeypatch.setattr(prediction, "best_items", lambda scores, seen, users, k: right(scores, seen * 0, users, k))
    with pytest.raises(RuntimeError, match="differs from the sort"):
        small.check(np.arange(4))


def test_both_ways_give_the_memory_that_they_take(monkeypatch):
    monkeypatch.setattr(prediction, "BATCH", 4)
    repeat = prediction.prediction(30, 350, 6)
    little = min(repeat(), repeat())
    rank = prediction.best_items

    def holds_a_lot(*arguments):
        return np.ones(25_000_000, np.float32) is None or rank(*arguments)

    monkeypatch.setattr(prediction, "best_items", holds_a_lot)
    assert 90 < repeat() - little < 110
    all_logits = prediction.prediction_from_all_logits(30, 100_000, 30)
    assert 20 < min(all_logits(), all_logits()) < 50  # logits and probabilities of 30 x 100,000


def test_selection_counts_its_rows():
    assert selection(200, True)() == selection(200, False)() == 20 * 256


class InProcess:
    """A worker that says what it would have measured."""

    def __init__(self, setup, *arguments):
        self.answer = {"prediction_from_all_logits": (500.0, 2.0)}.get(setup.__name__, (50.0, 4.0))
        self.peak_memory = 10**9

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ready(self):
        pass

    def repeat(self):
        return self.answer


def test_claims_are_made_of_memory_and_seconds(monkeypatch):
    monkeypatch.setattr(prediction, "Worker", InProcess)
    monkeypatch.setattr(prediction, "alternate", lambda *_, **__: paired("rows", "", [[2.0, 1.0]], unit="rows/s"))
    speed, hours, memory, constant, linear, rows = prediction.claims(short=True)
    assert (speed.ours, speed.reference, speed.unit) == (256 / 4, 64 / 2, "users/s")
    assert (hours.ours, hours.unit) == (pytest.approx(1e6 / 64 / 3600), "h")
    assert (memory.ours, memory.reference, constant.ratio, constant.at_most) == (50, 500, 1, 1.5)
    assert (linear.ours, linear.reference) == pytest.approx((4e9 / 256e6, 4e9 / 64e6))
    assert rows.ratio == 2
