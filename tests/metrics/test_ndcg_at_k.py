"""NDCG@k against an independent library, a reference of five lines and values worked out by hand."""

import math
from pathlib import Path

import evaluate
import ir_measures
import numpy as np
import pytest

from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from training.data.ragged import Ragged

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def metric(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    return evaluate.load("metrics/ndcg_at_k", cache_dir=str(tmp_path))


def random_lists(users=40, items=60, ranked=30, most_held_out=50, seed=0):
    rng = np.random.default_rng(seed)
    predictions = np.stack([rng.permutation(items)[:ranked] for _ in range(users)])
    references = [rng.permutation(items)[: rng.integers(0, most_held_out + 1)].tolist() for _ in range(users)]
    return predictions, references


def reference_ndcg(ranked, held_out, k):
    if not held_out:
        return math.nan
    gain = sum(1 / math.log2(place + 2) for place, item in enumerate(ranked[:k]) if item in held_out)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(k, len(held_out))))


def test_values_worked_out_by_hand():
    predictions = np.array([[3, 1, 2], [2, 0, 1], [1, 2, 3], [5, 6, 7]])
    references = [[3], [0], [9, 3, 2], [4]]
    expected = [1, 1 / math.log2(3), (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3) + 1 / 2), 0]
    np.testing.assert_allclose(ndcg_at_k(predictions, references, k=3), expected)


def test_items_after_place_k_do_not_count():
    np.testing.assert_array_equal(ndcg_at_k(np.array([[1, 2, 3]]), [[3]], k=2), [0])


def test_ideal_is_cut_at_k_so_that_a_perfect_list_scores_one():
    np.testing.assert_allclose(ndcg_at_k(np.array([[4, 2, 0, 1]]), [[0, 1, 2, 4, 7, 9]], k=3), [1])


def test_ideal_is_not_cut_at_the_length_of_a_short_list():
    np.testing.assert_allclose(ndcg_at_k(np.array([[4]]), [[4, 2]], k=10), [1 / (1 + 1 / math.log2(3))])


def test_user_without_held_out_items_is_nan():
    np.testing.assert_array_equal(ndcg_at_k(np.array([[0, 1], [0, 1]]), [[], [0]], k=2), [np.nan, 1])


@pytest.mark.parametrize("k", [1, 5, 30, 100])
def test_equals_the_reference_also_with_more_held_out_items_than_k(k):
    predictions, references = random_lists()
    expected = [
        reference_ndcg(row.tolist(), held_out, k) for row, held_out in zip(predictions, references, strict=True)
    ]
    np.testing.assert_allclose(ndcg_at_k(predictions, references, k), expected)


@pytest.mark.parametrize("k", [5, 30])
def test_equals_an_independent_library(k):
    predictions, references = random_lists(most_held_out=5)
    run = [
        ir_measures.ScoredDoc(str(user), str(item), -place)
        for user, row in enumerate(predictions)
        for place, item in enumerate(row)
    ]
    qrels = [ir_measures.Qrel(str(user), str(item), 1) for user, row in enumerate(references) for item in row]
    measured = ir_measures.pytrec_eval.iter_calc([ir_measures.nDCG @ k], qrels, run)
    theirs = {int(one.query_id): one.value for one in measured}
    ours = ndcg_at_k(predictions, references, k)
    assert len(theirs) == np.count_nonzero(~np.isnan(ours)) > 20
    np.testing.assert_allclose([ours[user] for user in theirs], list(theirs.values()))


def test_flat_rows_give_the_same_as_lists():
    predictions, references = random_lists()
    flat = Ragged.from_lists(references)
    np.testing.assert_array_equal(ndcg_at_k(predictions, flat, 10), ndcg_at_k(predictions, references, 10))


def test_short_lists_and_negative_places_hold_no_item():
    as_lists = ndcg_at_k([[3, 1], [2]], [[1], [2, 0]], k=3)
    as_array = ndcg_at_k(np.array([[3, 1, -1], [2, -1, -1]], dtype=np.int32), [[1], [2, 0]], k=3)
    np.testing.assert_allclose(as_lists, [1 / math.log2(3), 1 / (1 + 1 / math.log2(3))])
    np.testing.assert_array_equal(as_array, as_lists)


def test_negative_place_does_not_hit_the_last_item_of_the_user_before():
    np.testing.assert_array_equal(ndcg_at_k(np.array([[0, 1], [-1, 1]]), [[2], [0]], k=2), [0, 0])


def test_held_out_item_named_twice_counts_once():
    np.testing.assert_allclose(ndcg_at_k(np.array([[4, 2]]), [[4, 4]], k=2), [1])


def test_no_users_give_an_empty_array():
    assert ndcg_at_k(np.empty((0, 5), dtype=np.int64), [], k=5).shape == (0,)


def test_item_recommended_twice_is_refused():
    with pytest.raises(ValueError, match="row 1 name an item twice"):
        ndcg_at_k(np.array([[0, 1], [2, 2]]), [[0], [2]], k=2)


def test_different_numbers_of_users_are_refused():
    with pytest.raises(ValueError, match="predictions are of 1 users, references of 2"):
        ndcg_at_k(np.array([[0, 1]]), [[0], [2]], k=2)


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        ndcg_at_k(np.array([[0, 1]]), [[0]], k=0)


def test_negative_held_out_item_is_refused():
    with pytest.raises(ValueError, match="negative item -1"):
        ndcg_at_k(np.array([[0, 1]]), [[-1]], k=2)


def test_module_averages_over_users_with_held_out_items(metric):
    result = metric.compute(predictions=[[3, 1, 2], [2, 0, 1], [0, 1, 2]], references=[[3], [0], []], k=3)
    per_user = np.array([1, 1 / math.log2(3)])
    assert result["ndcg_at_k"] == pytest.approx(per_user.mean())
    assert result["standard_error"] == pytest.approx(per_user.std(ddof=1) / math.sqrt(2))
    assert result["num_users"] == 2


def test_module_takes_batches_and_arrays_and_defaults_to_k_100(metric):
    predictions, references = random_lists(items=300, ranked=150)
    for start in range(0, len(references), 16):
        metric.add_batch(predictions=predictions[start : start + 16], references=references[start : start + 16])
    assert metric.compute()["ndcg_at_k"] == pytest.approx(np.nanmean(ndcg_at_k(predictions, references, 100)))


def test_module_without_any_held_out_item_is_nan_over_no_users(metric):
    result = metric.compute(predictions=[[3, 1, 2]], references=[[]], k=3)
    assert math.isnan(result["ndcg_at_k"])
    assert math.isnan(result["standard_error"])
    assert result["num_users"] == 0


def test_example_in_the_docstring_holds(metric):
    result = metric.compute(predictions=[[3, 1, 2], [2, 0, 1]], references=[[3], [0]], k=3)
    assert f"\n    {result['ndcg_at_k']}\n" in metric.inputs_description
