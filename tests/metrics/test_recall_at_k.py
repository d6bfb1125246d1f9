"""Recall@k against an independent library, a reference of three lines and values worked out by hand."""

import math
from pathlib import Path

import evaluate
import ir_measures
import numpy as np
import pytest

from metrics.recall_at_k.recall_at_k import recall_at_k
from training.data.ragged import Ragged

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def metric(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    return evaluate.load("metrics/recall_at_k", cache_dir=str(tmp_path))


def random_lists(users=40, items=60, ranked=30, most_held_out=50, seed=0):
    rng = np.random.default_rng(seed)
    predictions = np.stack([rng.permutation(items)[:ranked] for _ in range(users)])
    references = [rng.permutation(items)[: rng.integers(0, most_held_out + 1)].tolist() for _ in range(users)]
    return predictions, references


def reference_recall(ranked, held_out, k):
    return len(set(ranked[:k]) & set(held_out)) / min(k, len(held_out)) if held_out else math.nan


def test_values_worked_out_by_hand():
    predictions = np.array([[3, 1, 2], [2, 0, 1], [5, 6, 7]])
    np.testing.assert_allclose(recall_at_k(predictions, [[3, 9], [0, 1, 2], [4]], k=3), [1 / 2, 1, 0])


def test_items_after_place_k_do_not_count():
    np.testing.assert_array_equal(recall_at_k(np.array([[1, 2, 3]]), [[3]], k=2), [0])


def test_denominator_is_k_where_more_is_held_out():
    np.testing.assert_allclose(recall_at_k(np.array([[4, 2, 8, 0]]), [[0, 2, 4, 7, 9]], k=3), [2 / 3])


def test_user_without_held_out_items_is_nan():
    np.testing.assert_array_equal(recall_at_k(np.array([[0, 1], [0, 1]]), [[], [0]], k=2), [np.nan, 1])


@pytest.mark.parametrize("k", [1, 5, 30, 100])
def test_equals_the_reference_also_with_more_held_out_items_than_k(k):
    predictions, references = random_lists()
    expected = [reference_recall(row, held_out, k) for row, held_out in zip(predictions, references, strict=True)]
    np.testing.assert_allclose(recall_at_k(predictions, references, k), expected)


@pytest.mark.parametrize("k", [5, 30])
def test_equals_an_independent_library_where_no_more_than_k_is_held_out(k):
    predictions, references = random_lists(most_held_out=5)
    run = [
        ir_measures.ScoredDoc(str(user), str(item), -place)
        for user, row in enumerate(predictions)
        for place, item in enumerate(row)
    ]
    qrels = [ir_measures.Qrel(str(user), str(item), 1) for user, row in enumerate(references) for item in row]
    measured = ir_measures.pytrec_eval.iter_calc([ir_measures.R @ k], qrels, run)
    theirs = {int(one.query_id): one.value for one in measured}
    ours = recall_at_k(predictions, references, k)
    assert len(theirs) == np.count_nonzero(~np.isnan(ours)) > 20
    np.testing.assert_allclose([ours[user] for user in theirs], list(theirs.values()))


def test_flat_rows_give_the_same_as_lists():
    predictions, references = random_lists()
    flat = Ragged.from_lists(references)
    np.testing.assert_array_equal(recall_at_k(predictions, flat, 10), recall_at_k(predictions, references, 10))


def test_short_lists_and_negative_places_hold_no_item():
    as_lists = recall_at_k([[3, 1], [2]], [[1], [2, 0]], k=3)
    as_array = recall_at_k(np.array([[3, 1, -1], [2, -1, -1]], dtype=np.int32), [[1], [2, 0]], k=3)
    np.testing.assert_allclose(as_lists, [1, 1 / 2])
    np.testing.assert_array_equal(as_array, as_lists)


def test_negative_place_does_not_hit_the_last_item_of_the_user_before():
    np.testing.assert_array_equal(recall_at_k(np.array([[0, 1], [-1, 1]]), [[2], [0]], k=2), [0, 0])


def test_item_recommended_twice_is_refused():
    with pytest.raises(ValueError, match="row 1 name an item twice"):
        recall_at_k(np.array([[0, 1], [2, 2]]), [[0], [2]], k=2)


def test_different_numbers_of_users_are_refused():
    with pytest.raises(ValueError, match="predictions are of 1 users, references of 2"):
        recall_at_k(np.array([[0, 1]]), [[0], [2]], k=2)


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        recall_at_k(np.array([[0, 1]]), [[0]], k=0)


def test_module_averages_over_users_with_held_out_items(metric):
    result = metric.compute(predictions=[[3, 1, 2], [2, 0, 1], [0, 1, 2]], references=[[3, 0], [0], []], k=2)
    assert result["recall_at_k"] == pytest.approx(0.75)
    assert result["standard_error"] == pytest.approx(0.25)
    assert result["num_users"] == 2


def test_module_takes_batches_and_arrays_and_defaults_to_k_100(metric):
    predictions, references = random_lists(items=300, ranked=150)
    for start in range(0, len(references), 16):
        metric.add_batch(predictions=predictions[start : start + 16], references=references[start : start + 16])
    assert metric.compute()["recall_at_k"] == pytest.approx(np.nanmean(recall_at_k(predictions, references, 100)))


def test_module_without_any_held_out_item_is_nan_over_no_users(metric):
    result = metric.compute(predictions=[[3, 1, 2]], references=[[]], k=3)
    assert math.isnan(result["recall_at_k"])
    assert math.isnan(result["standard_error"])
    assert result["num_users"] == 0


def test_example_in_the_docstring_holds(metric):
    result = metric.compute(predictions=[[3, 1, 2], [2, 0, 1]], references=[[3, 0], [0]], k=2)
    assert f"\n    {result['recall_at_k']}\n" in metric.inputs_description
