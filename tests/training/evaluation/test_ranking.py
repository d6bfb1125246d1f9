"""Ranking the catalogue against a plain sort, and the figures against the metrics user by user."""

import json
import math

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from metrics.recall_at_k.recall_at_k import recall_at_k
from training.evaluation.ranking import Figures, Mean, PerUser, evaluate_scores, rank

NOTHING_SEEN = csr_matrix((5, 4), dtype=np.float32)


def random_matrices(users=50, items=150, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.random((users, items))
    seen, held_out = drawn < 0.1, drawn > 0.95
    held_out[::7] = False
    scores = rng.normal(size=(users, items)).astype(np.float32)
    return scores, csr_matrix(seen.astype(np.float32)), csr_matrix(held_out.astype(np.float32))


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

    in_blocks = evaluate_scores(score, users, seen, held_out, batch_size=batch_size)
    at_once = evaluate_scores(lambda block: scores[block], users, seen, held_out)
    assert max(sizes) == min(batch_size, len(users))
    np.testing.assert_array_equal(in_blocks.ndcg_at_100, at_once.ndcg_at_100)
    np.testing.assert_array_equal(in_blocks.recall_at_20, at_once.recall_at_20)


def test_seen_items_do_not_take_places_of_held_out_ones():
    seen = csr_matrix(([1.0, 1.0], ([0, 0], [0, 1])), shape=(1, 4))
    held_out = csr_matrix(([1.0], ([0], [2])), shape=(1, 4))
    per_user = evaluate_scores(lambda block: np.array([[9.0, 8.0, 7.0, 6.0]]), np.array([0]), seen, held_out)
    np.testing.assert_array_equal(per_user.ndcg_at_100, [1])


def test_reader_is_given_users_scores_and_best_items_of_every_block():
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
    np.testing.assert_array_equal(np.concatenate([block[1] for block in read]), scores)
    np.testing.assert_array_equal(np.concatenate([block[2] for block in read]), rank(scores, seen, users, k=120))


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
