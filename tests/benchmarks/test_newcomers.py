import numpy as np
import pytest

from benchmarks.newcomers import ndcg, ridge_scores


def test_ndcg_is_one_where_what_is_wanted_comes_first_and_cut_at_what_is_wanted():
    wanted = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert ndcg(np.array([[9, 1, 8, 2], [0, 1, 2, 3], [3, 2, 1, 0]]), wanted, 100) == pytest.approx(1)
    first = (1 / np.log2(3) + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert ndcg(np.array([[3, 4, 2, 1]]), wanted[:1], 100) == pytest.approx(first)
    assert ndcg(np.array([[3, 4, 2, 1]]), wanted[:1], 1) == 0


def test_the_ridge_of_the_reference_reads_words_it_knows():
    texts = [f"{'red' if row % 2 else 'blue'} thing of {row}" for row in range(12)]
    outputs = np.eye(2)[[row % 2 for row in range(12)]]
    judged = []
    scores = ridge_scores(texts, outputs, ["red", "blue unheard-of"], lambda left_out: judged.append(left_out) or 0.0)
    assert scores.argmax(1).tolist() == [1, 0]
    assert all(left_out.shape == (12, 2) for left_out in judged)
