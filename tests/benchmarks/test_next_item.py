"""The next item in order of time: what is measured, and of what."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import next_item
from benchmarks.next_item import baselines, figures, measure, with_validation
from training.data.ragged import Ragged


def test_a_hit_counts_once_and_by_its_rank():
    found = figures(np.array([[5, 2, 7], [1, 2, 3], [9, 8, 4]]), np.array([5, 6, 4]))
    assert found["hr_at_10"] == pytest.approx(2 / 3)
    assert found["ndcg_at_10"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert found["hr_at_10_standard_error"] == pytest.approx(np.std([1, 0, 1], ddof=1) / np.sqrt(3))


@pytest.fixture
def corpora():
    """Three users in order of time: three items, then one for validation, then one for the test; the last user has no held-out ones."""
    splits = {
        "recommendation": ([0, 1, 2], [[0, 1, 2], [1, 2, 3], [4]]),
        "validation": ([0, 1], [[3], [4]]),
        "test": ([0, 1], [[4], [5]]),
    }

    def histories(name):
        users, rows = splits[name]
        return np.array(users, np.int32), Ragged.from_lists(rows, np.int32)

    return SimpleNamespace(histories=histories, num_users=3, num_items=7)


def test_prompts_end_with_the_item_before_the_test(corpora):
    users, rows = with_validation(corpora)
    assert users.tolist() == [0, 1, 2]
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [1, 2, 3, 4], [4]]


def test_what_was_had_is_not_ranked(corpora):
    def score(users):
        return np.tile(np.array([9, 8, 7, 6, 5, 4, 3], np.float32), (len(users), 1))

    # Without what they had, both have the wanted item first and second: user 0 is left with 4, 5, 6, user 1 with 0, 5, 6.
    found = measure(corpora, score)
    assert found["hr_at_10"] == 1.0
    assert found["ndcg_at_10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)


def test_baselines_know_validation_items_too(corpora, monkeypatch):
    given = []
    monkeypatch.setattr(next_item, "NAMES", ("popularity",))
    kept = next_item.BASELINES["popularity"]
    monkeypatch.setitem(
        next_item.BASELINES, "popularity", lambda pairs, seed: given.append(pairs.nnz) or kept(pairs, seed)
    )
    assert baselines(corpora, 1)["popularity"]["hr_at_10"] == 1.0
    assert given == [7, 9]


def test_sasrec_ranks_by_histories_that_end_before_the_test(corpora, monkeypatch):
    def ranked(python, train, validation, seen, users, depth, *, sees_validation):
        assert (python, depth, sees_validation) == ("python", 10, True)
        assert [row.tolist() for row in validation[1]] == [[3], [4]]
        assert seen.toarray()[0].tolist() == [1, 1, 1, 1, 0, 0, 0]
        return np.array([[4, -1], [4, 5]])

    monkeypatch.setattr(next_item, "ranked_by_sasrec", ranked)
    assert next_item.sasrec(corpora, "python")["SASRec"]["ndcg_at_10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)


def test_ours_is_measured_on_the_sample_where_no_set_is_at_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLLM4REC_DATA", str(tmp_path / "none"))
    words = ["pretrain.epochs=0", "finetune.epochs=0", "backbone.config.n_embd=8", "method.initialisation=random"]
    words += ["method.text_map=false"]
    monkeypatch.setattr(sys, "argv", ["next_item.py", "--folder", str(tmp_path), *words])
    monkeypatch.setattr(next_item, "NAMES", ("popularity",))
    next_item.main()
    shown = capsys.readouterr().out
    assert "| sample | HR@10 | NDCG@10 |" in shown
    for label in ("CLLM4Rec, sequential", "CLLM4Rec, sequential, by history alone", "popularity"):
        assert f"| {label} | 0." in shown
