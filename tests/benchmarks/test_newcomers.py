import json
import sys

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from benchmarks import newcomers
from benchmarks.newcomers import fold_in, folded_out, halves, ndcg, other_half, ridge_scores
from training.evaluation.baselines import fit_ials


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
    scores, left_out = ridge_scores(
        texts, outputs, ["red", "blue unheard-of"], lambda left_out: judged.append(left_out) or 0.0
    )
    assert scores.argmax(1).tolist() == [1, 0]
    assert left_out.argmax(1).tolist() == [row % 2 for row in range(12)]
    assert all(left_out.shape == (12, 2) for left_out in judged)


def test_the_reference_bears_an_encoder_one_of_whose_numbers_never_changes():
    texts = [f"{'red' if row % 2 else 'blue'} thing of {row}" for row in range(12)]

    def read(texts):
        return np.array([[0.5, float("red" in text), float("blue" in text)] for text in texts])

    scores, left_out = ridge_scores(texts, np.eye(2)[[row % 2 for row in range(12)]], ["red", "blue"], np.ptp, read)
    assert scores.argmax(1).tolist() == [1, 0]
    assert left_out.shape == (12, 2)


def test_folded_in_from_all_of_a_history_somebody_known_has_the_scores_that_ials_gave():
    rng = np.random.default_rng(0)
    given = (rng.random((40, 12)) < 0.3).astype(np.float32)
    settings = {"factors": 4, "regularization": 2.0, "alpha": 8.0, "iterations": 200}
    users, items = fit_ials(csr_matrix(given), seed=0, **settings)
    np.testing.assert_allclose(fold_in(items, settings, given), users @ items.T, atol=5e-3)
    assert not fold_in(items, settings, np.zeros((1, 12))).any()


def test_what_somebody_new_is_to_be_found_out_by_is_not_read():
    rng = np.random.default_rng(0)
    whole = (rng.random((40, 12)) < 0.5).astype(np.float32)
    given = halves(rng, whole)
    settings = {"factors": 4, "regularization": 2.0, "alpha": 8.0, "iterations": 5}
    scores = folded_out(settings, whole, given, seed=0)
    other = whole.copy()
    other[3] = given[3]
    changed = folded_out(settings, other, given, seed=0)
    np.testing.assert_array_equal(scores[3], changed[3])
    assert (scores != changed).any(1).sum() == 32  # those who are not in the same fifth


def test_half_of_what_somebody_chose_is_given_and_the_rest_is_wanted():
    whole = (np.random.default_rng(0).random((50, 9)) < 0.5).astype(float)
    given = halves(np.random.default_rng(1), whole)
    assert (given <= whole).all()
    assert given.sum(1).tolist() == (whole.sum(1) // 2).tolist()
    assert other_half(whole - given, given, whole) == pytest.approx(1)
    assert other_half(given - whole, given, whole) < 1
    assert other_half(2 * given + whole - given, given, whole) == pytest.approx(1)  # what is given is not ranked


def test_figures_of_the_same_draws_are_told_apart_within_a_draw(monkeypatch, tmp_path, capsys):
    def run(*words, values):
        monkeypatch.setattr(newcomers, "measure", lambda *given: iter([{"both": value} for value in values]))
        monkeypatch.setattr(newcomers, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", ["newcomers.py", *words])
        newcomers.main()
        return capsys.readouterr().out.strip()

    assert run("--write", values=[0.5, 0.7]) == f"{'both':<64} 0.600 ± 0.141"
    other = run("--write", "finetune.epochs=1", values=[0.51, 0.72])
    assert other == f"{'both':<64} 0.615 ± 0.148   default 0.600, within a draw +0.015 ± 0.007"
    assert "within" not in run("finetune.epochs=1", values=[0.51])
    kept = json.loads((tmp_path / "newcomers.json").read_text())
    assert {name: row["figures"]["both"]["draws"] for name, row in kept.items()} == {
        "default": [0.5, 0.7],
        "default finetune.epochs=1": [0.51, 0.72],
    }
