"""Baselines against their equations, the search over settings, and the reference figures on real sets."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from configuration.errors import InputError
from training.evaluation import baselines
from training.evaluation.baselines import fit_baselines, fit_ials
from training.evaluation.ranking import evaluate_scores

SAMPLE = Path(__file__).resolve().parents[3] / "training" / "data" / "sample" / "interactions.parquet"
EVERY = ("popularity", "item_knn", "ease", "ials")


def two_tastes(users=60, items=30, seed=0):
    """Train, validation and test of users who take items of one half, with a few of the other."""
    rng = np.random.default_rng(seed)
    likes = np.arange(users)[:, None] % 2 == np.arange(items)[None] // (items // 2)
    draws = rng.random((users, items))
    taken = np.where(likes, draws < 0.6, draws < 0.05)
    split = rng.choice(3, size=(users, items), p=[0.7, 0.15, 0.15])
    return [csr_matrix((taken & (split == part)).astype(np.float32)) for part in range(3)]


@pytest.fixture
def small_grids(monkeypatch):
    monkeypatch.setattr(baselines, "ITEM_KNN_GRID", [{"weighting": "cosine", "neighbours": 10}])
    monkeypatch.setattr(baselines, "EASE_GRID", [{"regularization": 10}])
    setting = {"factors": 4, "regularization": 3, "alpha": 4, "iterations": 5}
    monkeypatch.setattr(baselines, "IALS_GRID", [setting])
    monkeypatch.setattr(baselines, "IALS_LARGER", {"factors": 8, "iterations": 10})


def ndcg_at_100(score, seen, held_out):
    users = np.arange(seen.shape[0])
    return evaluate_scores(score, users, seen, held_out).figures().ndcg_at_100.value


def test_popularity_counts_training_users():
    train, validation, _ = two_tastes()
    score = fit_baselines(train, validation, ["popularity"])["popularity"].score
    np.testing.assert_array_equal(score(np.array([5, 2])), np.tile(train.toarray().sum(axis=0), (2, 1)))


@pytest.mark.parametrize("weighting", ["cosine", "tfidf", "idf"])
def test_item_knn_sums_similarities_to_the_history(monkeypatch, weighting):
    train = two_tastes()[0]
    monkeypatch.setattr(baselines, "ITEM_KNN_GRID", [{"weighting": weighting, "neighbours": 1000}])
    score = fit_baselines(train, train, ["item_knn"])["item_knn"].score
    dense = train.toarray().astype(np.float64)
    idf = np.log(30) - np.log1p(dense.sum(axis=1, keepdims=True))
    weighted = dense if weighting == "cosine" else idf * dense
    if weighting != "idf":
        weighted = weighted / np.linalg.norm(weighted, axis=0)
    np.testing.assert_allclose(score(np.arange(60)), dense @ (weighted.T @ weighted), rtol=1e-4, atol=1e-5)


def test_item_knn_keeps_the_neighbours_of_the_item_that_is_scored(monkeypatch):
    monkeypatch.setattr(baselines, "ITEM_KNN_GRID", [{"weighting": "cosine", "neighbours": 2}])
    train = csr_matrix(np.array([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0]]))
    score = fit_baselines(train, train, ["item_knn"])["item_knn"].score
    # Item 0 is nearest to item 2, though item 2 is not among the two nearest of item 0 (itself and item 1).
    np.testing.assert_allclose(score(np.array([3])), [[1, 2 / np.sqrt(8), 1 / 2]], rtol=1e-6)


def test_item_whose_users_have_taken_nearly_everything_gets_no_nan(small_grids, monkeypatch):
    monkeypatch.setattr(baselines, "ITEM_KNN_GRID", [{"weighting": "tfidf", "neighbours": 10}])
    taken = np.zeros((4, 4))
    taken[0, :3] = taken[1:, 0] = taken[1, 1] = 1  # item 2 has one user, whose idf is log(4) - log(1 + 3) = 0
    train = csr_matrix(taken)
    assert np.isfinite(fit_baselines(train, train, ["item_knn"])["item_knn"].score(np.arange(4))).all()


def test_ease_is_the_closed_form(small_grids):
    train, validation, _ = two_tastes()
    score = fit_baselines(train, validation, ["ease"])["ease"].score
    dense = train.toarray().astype(np.float64)
    precision = np.linalg.inv(dense.T @ dense + 10 * np.eye(30))
    weights = np.eye(30) - precision / np.diag(precision)
    np.testing.assert_allclose(score(np.arange(60)), dense @ weights, atol=1e-5)


def test_item_factors_of_ials_solve_their_normal_equations():
    train = two_tastes()[0]
    users, items = fit_ials(train, factors=6, regularization=2.0, alpha=5.0, iterations=50, seed=0)
    assert users.shape == (60, 6)
    assert items.shape == (30, 6)
    assert users.dtype == items.dtype == np.float32
    for item in range(30):
        confidence = np.where(train.toarray()[:, item] > 0, 5.0, 1.0)
        preferred = train.toarray()[:, item]
        left = users.T @ (confidence[:, None] * users) + 2.0 * np.eye(6)
        np.testing.assert_allclose(items[item], np.linalg.solve(left, users.T @ (confidence * preferred)), atol=2e-3)


def test_same_seed_gives_the_same_factors_and_another_seed_others():
    train = two_tastes()[0]
    settings = {"factors": 6, "regularization": 2.0, "alpha": 5.0, "iterations": 3}
    first, again, other = (fit_ials(train, **settings, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert np.abs(first[1] - other[1]).max() > 1e-3


def test_only_ials_carries_factors_and_they_give_its_scores(small_grids):
    train, validation, _ = two_tastes()
    fitted = fit_baselines(train, validation, EVERY)
    assert [name for name, baseline in fitted.items() if baseline.factors is not None] == ["ials"]
    users, items = fitted["ials"].factors
    np.testing.assert_allclose(fitted["ials"].score(np.array([7, 3])), users[[7, 3]] @ items.T, rtol=1e-5)


def test_seed_of_the_run_reaches_ials(small_grids):
    train, validation, _ = two_tastes()
    chosen = fit_baselines(train, validation, ["ials"], seed=9)["ials"]
    np.testing.assert_array_equal(chosen.factors[1], fit_ials(train, **chosen.settings, seed=9)[1])


def test_whole_fit_is_repeatable():
    train, validation, _ = two_tastes()
    first, again = (fit_baselines(train, validation, EVERY, seed=7) for _ in range(2))
    for name in EVERY:
        assert first[name].settings == again[name].settings
        np.testing.assert_array_equal(first[name].score(np.arange(60)), again[name].score(np.arange(60)))


def test_models_beat_popularity_where_users_have_tastes():
    train, validation, test = two_tastes()
    fitted = fit_baselines(train, validation, EVERY)
    figures = {name: ndcg_at_100(baseline.score, train + validation, test) for name, baseline in fitted.items()}
    assert min(figures[name] for name in EVERY[1:]) > figures["popularity"] + 0.1


def test_settings_with_the_best_validation_ndcg_are_kept(monkeypatch):
    train, validation, _ = two_tastes(seed=1)
    grid = [{"regularization": value} for value in (10_000, 20, 0.01)]
    alone = []
    for settings in grid:
        monkeypatch.setattr(baselines, "EASE_GRID", [settings])
        alone.append(ndcg_at_100(fit_baselines(train, validation, ["ease"])["ease"].score, train, validation))
    monkeypatch.setattr(baselines, "EASE_GRID", grid)
    chosen = fit_baselines(train, validation, ["ease"])["ease"]
    assert len(set(alone)) == 3
    assert chosen.settings == grid[int(np.argmax(alone))]
    assert chosen.validation_ndcg_at_100 == pytest.approx(max(alone))


def test_larger_ials_is_kept_only_where_it_is_better(small_grids, monkeypatch):
    train, validation, _ = two_tastes()
    monkeypatch.setattr(baselines, "IALS_LARGER", {"factors": 8, "iterations": 0})
    assert fit_baselines(train, validation, ["ials"])["ials"].settings["iterations"] == 5
    monkeypatch.setattr(baselines, "IALS_GRID", [{"factors": 4, "regularization": 3, "alpha": 4, "iterations": 0}])
    monkeypatch.setattr(baselines, "IALS_LARGER", {"factors": 8, "iterations": 10})
    chosen = fit_baselines(train, validation, ["ials"])["ials"]
    assert chosen.settings == {"factors": 8, "regularization": 3, "alpha": 4, "iterations": 10}
    assert chosen.factors[0].shape == (60, 8)


def test_many_items_use_the_smaller_grids(small_grids, monkeypatch):
    train, validation, _ = two_tastes()
    monkeypatch.setattr(baselines, "MANY_ITEMS", 29)
    monkeypatch.setattr(baselines, "EASE_GRID_MANY_ITEMS", [{"regularization": 33}])
    monkeypatch.setattr(baselines, "IALS_LARGER_MANY_ITEMS", {"factors": 9, "iterations": 10})
    monkeypatch.setattr(baselines, "IALS_GRID", [{"factors": 4, "regularization": 3, "alpha": 4, "iterations": 0}])
    fitted = fit_baselines(train, validation, ["ease", "ials"])
    assert fitted["ease"].settings == {"regularization": 33}
    assert fitted["ials"].settings["factors"] == 9


def test_reported_validation_figure_is_of_all_users_also_where_few_are_compared(small_grids, monkeypatch):
    train, validation, _ = two_tastes()
    monkeypatch.setattr(baselines, "SEARCH_USERS", 5)
    chosen = fit_baselines(train, validation, ["ease"])["ease"]
    assert chosen.validation_ndcg_at_100 == pytest.approx(ndcg_at_100(chosen.score, train, validation))


def test_ease_is_left_out_with_a_sentence_where_items_are_too_many(small_grids, monkeypatch, caplog):
    train, validation, _ = two_tastes()
    monkeypatch.setattr(baselines, "EASE_MAX_ITEMS", 29)
    with caplog.at_level(logging.WARNING, logger=baselines.__name__):
        fitted = fit_baselines(train, validation, ["popularity", "ease"])
    assert list(fitted) == ["popularity"]
    assert "ease is left out: 30 items are more than 29" in caplog.text


def test_unknown_name_is_refused_with_the_known_ones():
    train, validation, _ = two_tastes()
    with pytest.raises(InputError, match="'knn' is not a baseline; choose from popularity, item_knn, ease, ials"):
        fit_baselines(train, validation, ["popularity", "knn"])


def test_without_validation_items_the_first_settings_are_taken(monkeypatch):
    train, _, _ = two_tastes()
    monkeypatch.setattr(baselines, "EASE_GRID", [{"regularization": 20}, {"regularization": 50}])
    chosen = fit_baselines(train, csr_matrix(train.shape), ["ease"])["ease"]
    assert chosen.settings == {"regularization": 20}
    assert np.isnan(chosen.validation_ndcg_at_100)


def test_nothing_is_printed_and_nothing_warned_unless_asked(small_grids, capfd, recwarn):
    train, validation, _ = two_tastes()
    fit_baselines(train, validation, EVERY)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def split_matrices(frame):
    """Train, validation and test of a table with columns user, item and split; indices in order of the raw ids."""
    users, user_ids = pd.factorize(frame["user"], sort=True)
    items, item_ids = pd.factorize(frame["item"], sort=True)
    parts = [(frame["split"] == name).to_numpy() for name in ("train", "validation", "test")]
    shape = (len(user_ids), len(item_ids))
    return [csr_matrix((np.ones(part.sum()), (users[part], items[part])), shape=shape) for part in parts]


def assert_reference_figures(frame, expected):
    train, validation, test = split_matrices(frame)
    fitted = fit_baselines(train, validation, EVERY)
    figures = {name: ndcg_at_100(baseline.score, train + validation, test) for name, baseline in fitted.items()}
    assert figures == {name: pytest.approx(value, abs=0.01) for name, value in zip(EVERY, expected, strict=True)}


def test_sample_reaches_its_reference_figures():
    frame = pd.read_parquet(SAMPLE).rename(columns={"project": "user", "library": "item"})
    assert_reference_figures(frame, [0.224, 0.344, 0.364, 0.385])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ml-100k", [0.217, 0.361, 0.377, 0.387]),
        ("digital-music", [0.167, 0.283, 0.269, 0.291]),
    ],
)
def test_public_sets_reach_their_reference_figures(real_data, name, expected):
    frame = pd.read_csv(real_data / name / "split.tsv.gz", sep="\t", dtype=str)
    assert_reference_figures(frame, expected)
