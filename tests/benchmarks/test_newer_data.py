import numpy as np
import pandas as pd
import pytest

from benchmarks.newer_data import measure, split_by_time

SMALL = ["backbone.config.n_embd=8", "backbone.num_words=300", "pretrain.epochs=1", "finetune.epochs=2"]


@pytest.fixture
def frame():
    generator = np.random.default_rng(0)
    pairs = pd.DataFrame({"user": generator.integers(0, 30, 600), "item": generator.integers(0, 20, 600)})
    pairs = pairs.drop_duplicates().astype(str)
    return pairs.assign(timestamp=generator.permutation(len(pairs)))


def test_what_came_first_is_trained_on_and_strangers_are_left_out(frame):
    marked = split_by_time(frame, 0.8, 0.9)
    latest = marked.groupby("split")["timestamp"].agg(["min", "max"])
    assert latest.loc["train", "max"] < latest.loc["validation", "min"]
    assert latest.loc["validation", "max"] < latest.loc["test", "min"]
    stranger = pd.DataFrame({"user": ["new"], "item": ["0"], "timestamp": [10**6]})
    assert "new" not in set(split_by_time(pd.concat([frame, stranger]), 0.8, 0.9)["user"])


def test_both_ways_are_measured_and_compared(frame, tmp_path):
    found = measure(frame, 1, SMALL, tmp_path)
    assert found["on top ÷ anew"]["seconds"] == pytest.approx(found["on top"]["seconds"] / found["anew"]["seconds"])
    assert 0 < found["on top"]["ndcg_at_100"] < 1
    log = (tmp_path / "on-top" / "log").read_text()
    assert f"items are known from {tmp_path / 'first'}" in log
    assert "teacher: with another run's settings" in log
    assert "pretraining: 0 epochs" in log
