"""Ranking the catalogue against a plain sort, and the figures against the metrics user by user."""

import json
import math
import weakref

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from metrics.recall_at_k.recall_at_k import recall_at_k
from training.evaluation.ranking import (
    Figures,
    Mean,
    PerUser,
    best_items,
    evaluate_scores,
    top_columns,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NOTHING_SEEN = csr_matrix((5, 4), dtype=np.float32)


def random_matrices(users=50, items=150, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.random((users, items))
    seen, held_out = drawn < 0.1, drawn > 0.95
    held_out[::7] = False
    scores = rng.normal(size=(users, items)).astype(np.float32)
    return scores, csr_matrix(seen.astype(np.float32)), csr_matrix(held_out.astype(np.float32))


def rank(scores, seen, users, k):
    return best_items(scores, seen[users], users, k).items


def test_best_items_come_first():
    scores = np.array([[0.1, 0.4, 0.2, 0.3]])
    np.testing.assert_array_equal(rank(scores, NOTHING_SEEN, np.array([0]), k=3), [[1, 3, 2]])


def test_items_that_the_named_user_has_seen_are_left_out():
    seen = csr_matrix(([1.0, 1.0], ([0, 3], [3, 1])), shape=(5, 4))
    scores = np.array([[0.1, 0.4, 0.2, 0.3], [0.1, 0.4, 0.2, 0.3]])
    np.testing.assert_array_equal(rank(scores, seen, np.array([3, 0]), k=3), [[3, 2, 0], [1, 2, 0]])


def test_scores_of_the_caller_are_left_as_they_are():
    scores, seen, _ = random_matrices()
    before = scores.copy()
    rank(scores, seen, np.arange(len(scores)), k=10)
    np.testing.assert_array_equal(scores, before)


def test_of_equal_scores_the_lower_index_goes_first():
    scores = np.array([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(rank(scores, NOTHING_SEEN, np.array([0, 1]), k=3), [[1, 3, 0], [0, 1, 2]])


def test_fewer_unseen_items_than_k_end_in_minus_one():
    seen = csr_matrix(([1.0, 1.0], ([0, 0], [0, 2])), shape=(5, 4))
    np.testing.assert_array_equal(rank(np.array([[4.0, 1.0, 3.0, 2.0]]), seen, np.array([0]), k=10), [[3, 1, -1, -1]])


@pytest.mark.parametrize("levels", [3, 1000])
def test_equals_a_stable_sort_with_many_and_few_equal_scores(levels):
    scores, seen, _ = random_matrices()
    scores = np.round(scores * levels).astype(np.float32)
    users = np.random.default_rng(1).permutation(len(scores))
    masked = np.where(seen.toarray()[users] > 0, -np.inf, scores)
    expected = np.argsort(-masked, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(rank(scores, seen, users, k=20), expected)


def test_nan_scores_are_refused_with_their_user():
    with pytest.raises(ValueError, match="scores of user 4 hold nan"):
        rank(np.array([[0.0, 1, 2, 3], [0, 1, np.nan, 3]]), NOTHING_SEEN, np.array([2, 4]), k=2)


# Item block by item block


def in_blocks(scores, width):
    return [torch.tensor(scores[:, start : start + width]) for start in range(0, scores.shape[1], width)]


def dense_ranking(scores, seen, k):
    """What a ranking is: a stable sort of what was not seen."""
    masked = np.where(seen.toarray() > 0, -np.inf, scores)
    order = np.argsort(-masked, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(masked, order, axis=1)
    return np.where(best == -np.inf, -1, order), best


@pytest.mark.parametrize("levels", [1, 20, 10_000])
@pytest.mark.parametrize("k", [1, 20, 100, 1000])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200, 700, 800])
def test_blocks_of_any_width_give_the_dense_ranking(width, k, levels):
    scores, seen, _ = random_matrices(users=9, items=700)
    scores = np.round(scores * levels).astype(np.float32)
    items, best = dense_ranking(scores, seen, k)
    found = best_items(in_blocks(scores, width), seen, np.arange(9), k)
    np.testing.assert_array_equal(found.items, items)
    np.testing.assert_array_equal(found.scores, best)
    assert (found.items.dtype, found.scores.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_of_equal_scores_in_several_blocks_the_lower_index_goes_first(width):
    scores = np.array([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -1.0, -1.0]])
    found = best_items(in_blocks(scores, width), NOTHING_SEEN[:3], np.arange(3), k=3)
    np.testing.assert_array_equal(found.items, [[1, 3, 0], [0, 1, 2], [0, 2, 3]])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_who_has_seen_everything_is_recommended_nothing(width):
    seen = csr_matrix(np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.float32))
    scores = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    found = best_items(in_blocks(scores, width), seen, np.arange(2), k=3)
    np.testing.assert_array_equal(found.items, [[-1, -1, -1], [3, -1, -1]])
    np.testing.assert_array_equal(found.probabilities[0], [0, 0, 0])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_items_of_score_minus_infinity_are_never_ranked(width):
    scores = np.array([[-np.inf, 1.0, -np.inf, 2.0], [0.0, -np.inf, -np.inf, -np.inf]])
    found = best_items(in_blocks(scores, width), NOTHING_SEEN[:2], np.arange(2), k=3)
    np.testing.assert_array_equal(found.items, [[3, 1, -1], [0, -1, -1]])


@pytest.mark.parametrize("width", [1, 64, 700])
def test_probabilities_are_over_the_whole_catalogue(width):
    scores, seen, _ = random_matrices(users=9, items=700)
    scores[0] *= 1000
    found = best_items(in_blocks(scores, width), seen, np.arange(9), k=50)
    softmax = np.exp(scores - scores.max(1, keepdims=True), dtype=np.float64)
    softmax /= softmax.sum(1, keepdims=True)
    np.testing.assert_allclose(
        found.probabilities, np.take_along_axis(softmax, found.items, axis=1), rtol=1e-5, atol=1e-12
    )


@pytest.mark.parametrize("place", [0, 5, 6])
def test_nan_in_any_block_is_refused_with_its_user(place):
    scores = np.zeros((3, 7))
    scores[1, place] = np.nan
    seen = csr_matrix(([1.0], ([1], [place])), shape=(3, 7))
    for blocks in (scores, in_blocks(scores, 3)):
        with pytest.raises(ValueError, match="scores of user 8 hold nan"):
            best_items(blocks, seen, np.array([7, 8, 9]), k=2)


def test_earlier_blocks_are_not_kept():
    alive = []

    def blocks():
        for number in range(10):
            block = torch.full((2, 100), float(number))
            alive.append(weakref.ref(block))
            yield block
            del block
            assert all(reference() is None for reference in alive[:-1])

    found = best_items(blocks(), csr_matrix((2, 1000)), np.arange(2), k=3)
    np.testing.assert_array_equal(found.items, [[900, 901, 902]] * 2)


def test_what_is_left_of_a_ranking_is_the_ranking_without_those_items():
    scores, seen, held_out = random_matrices(items=300)
    users = np.arange(len(scores))
    most = int(np.diff(held_out.indptr).max())
    whole = best_items(scores, seen, users, k=20 + most)
    left = whole.without(held_out, k=20)
    items, best = dense_ranking(scores, seen + held_out, k=20)
    np.testing.assert_array_equal(left.items, items)
    np.testing.assert_array_equal(left.scores, best)
    np.testing.assert_array_equal(left.log_total, whole.log_total)


def test_where_too_little_is_left_of_a_ranking_it_ends_in_minus_one():
    whole = best_items(np.array([[4.0, 1.0, 3.0, 2.0]] * 2), NOTHING_SEEN[:2], np.arange(2), k=4)
    left = whole.without(csr_matrix(np.array([[1, 0, 1, 0], [0, 0, 0, 0]])), k=3)
    np.testing.assert_array_equal(left.items, [[3, 1, -1], [0, 2, 3]])
    assert left.probabilities[0, 2] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", [1, 5, 1000])
@pytest.mark.parametrize("k", [1, 7, 50, 60])
def test_top_columns_are_those_of_a_stable_sort(k, levels, device):
    scores = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).mul(levels).round()
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    torch.testing.assert_close(top_columns(scores.to(device), k).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_on_any_device_give_the_dense_ranking(device):
    scores, seen, _ = random_matrices(items=700)
    blocks = [block.to(device) for block in in_blocks(scores, 150)]
    found = best_items(blocks, seen, np.arange(len(scores)), k=40)
    np.testing.assert_array_equal(found.items, dense_ranking(scores, seen, k=40)[0])


def test_each_user_is_measured_as_the_metrics_do():
    scores, seen, held_out = random_matrices()
    users = np.arange(len(scores))[::-1]
    per_user = evaluate_scores(lambda block: scores[block], users, seen, held_out)
    masked = np.where(seen.toarray() > 0, -np.inf, scores)
    ranked = np.argsort(-masked, axis=1)[::-1]
    references = [row.nonzero()[0] for row in held_out.toarray()[::-1]]
    np.testing.assert_allclose(per_user.ndcg_at_100, ndcg_at_k(ranked, references, 100))
    np.testing.assert_allclose(per_user.recall_at_20, recall_at_k(ranked, references, 20))
    np.testing.assert_allclose(per_user.recall_at_40, recall_at_k(ranked, references, 40))
    assert np.isnan(per_user.ndcg_at_100).sum() == (held_out.getnnz(axis=1) == 0).sum() == 8


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_size_of_the_blocks_changes_nothing(batch_size):
    scores, seen, held_out = random_matrices()
    users = np.array([3, 1, 4, 15, 9, 26, 5, 35, 8, 49, 0])
    sizes = []

    def score(block):
        sizes.append(len(block))
        return scores[block]

    a_few = evaluate_scores(score, users, seen, held_out, batch_size=batch_size)
    at_once = evaluate_scores(lambda block: scores[block], users, seen, held_out)
    assert max(sizes) == min(batch_size, len(users))
    np.testing.assert_allclose(a_few.ndcg_at_100, at_once.ndcg_at_100, rtol=1e-12)
    np.testing.assert_array_equal(a_few.recall_at_20, at_once.recall_at_20)


def test_seen_items_do_not_take_places_of_held_out_ones():
    seen = csr_matrix(([1.0, 1.0], ([0, 0], [0, 1])), shape=(1, 4))
    held_out = csr_matrix(([1.0], ([0], [2])), shape=(1, 4))
    per_user = evaluate_scores(lambda block: np.array([[9.0, 8.0, 7.0, 6.0]]), np.array([0]), seen, held_out)
    np.testing.assert_array_equal(per_user.ndcg_at_100, [1])


def test_item_blocks_are_measured_as_whole_rows_are():
    scores, seen, held_out = random_matrices()
    users = np.arange(50)[::-1]
    dense = evaluate_scores(lambda block: scores[block], users, seen, held_out, batch_size=20)
    blocks = evaluate_scores(lambda block: in_blocks(scores[block], 40), users, seen, held_out, batch_size=20)
    for name, values in vars(dense).items():
        np.testing.assert_array_equal(getattr(blocks, name), values)


def test_reader_is_given_users_and_best_items_of_every_block():
    scores, seen, held_out = random_matrices()
    users, read = np.arange(50), []
    evaluate_scores(
        lambda block: scores[block],
        users,
        seen,
        held_out,
        batch_size=20,
        k=120,
        read_block=lambda *block: read.append(block),
    )
    np.testing.assert_array_equal(np.concatenate([block[0] for block in read]), users)
    np.testing.assert_array_equal(np.concatenate([block[1] for block in read]), rank(scores, seen, users, k=120))


def test_figures_are_means_and_standard_errors_over_users_with_held_out_items():
    values = np.array([0.5, np.nan, 1.0, 0.0])
    figures = PerUser(values, values / 2, values / 4).figures()
    assert figures.num_users == 3
    assert figures.ndcg_at_100 == Mean(0.5, pytest.approx(0.5 / math.sqrt(3)))
    assert figures.recall_at_20.value == 0.25
    assert figures.recall_at_40.standard_error == pytest.approx(0.125 / math.sqrt(3))


def test_figures_of_no_users_are_none_in_json():
    nobody = np.array([np.nan, np.nan])
    written = json.dumps(PerUser(nobody, nobody, nobody).figures().to_dict(), allow_nan=False)
    nothing = {"value": None, "standard_error": None}
    assert json.loads(written) == {
        "ndcg_at_100": nothing, "recall_at_20": nothing, "recall_at_40": nothing, "num_users": 0
    }  # fmt: skip


def test_dictionary_of_figures_has_the_published_names():
    figures = Figures(Mean(0.3, 0.01), Mean(0.2, 0.02), Mean(0.4, 0.03), 7)
    assert figures.to_dict() == {
        "ndcg_at_100": {"value": 0.3, "standard_error": 0.01},
        "recall_at_20": {"value": 0.2, "standard_error": 0.02},
        "recall_at_40": {"value": 0.4, "standard_error": 0.03},
        "num_users": 7,
    }
