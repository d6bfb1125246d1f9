"""Baselines on the split of a run: popularity, item-kNN, EASE and iALS, each tuned on validation NDCG@100.

Every model is fitted on the training interactions alone; whoever scores the test split leaves out validation items too.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender
from scipy.linalg.lapack import spotrf, spotri
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from configuration.errors import InputError
from training.evaluation.ranking import ScoreFunction, evaluate_scores

logger = logging.getLogger(__name__)

Settings = dict[str, Any]
Factors = tuple[np.ndarray, np.ndarray]
Model = tuple[ScoreFunction, Factors | None]

# Above so many items a fit takes tens of seconds, and the grids of EASE and iALS shrink as stated below.
MANY_ITEMS = 5_000
# EASE inverts a dense matrix over items: above this it would take more than ten minutes and 5 GB.
EASE_MAX_ITEMS = 20_000
# Settings are compared on at most so many users, drawn from the seed.
SEARCH_USERS = 5_000

ITEM_KNN_GRID: list[Settings] = [
    {"weighting": weighting, "neighbours": neighbours}
    for weighting, neighbours in product(("cosine", "tfidf", "idf"), (50, 100, 200, 1000))
]
EASE_GRID: list[Settings] = [{"regularization": regularization} for regularization in (30, 60, 120, 240, 480)]
EASE_GRID_MANY_ITEMS: list[Settings] = [{"regularization": regularization} for regularization in (60, 120, 240)]
IALS_GRID: list[Settings] = [
    {"factors": 128, "regularization": regularization, "alpha": alpha, "iterations": 10}
    for regularization, alpha in product((30, 100, 300), (4, 16, 64, 128))
]
# The best of the grid is fitted again, longer and larger, and the better of the two is kept.
IALS_LARGER = {"factors": 256, "iterations": 20}
IALS_LARGER_MANY_ITEMS = {"factors": 512, "iterations": 20}


@dataclass(frozen=True, eq=False)
class FittedBaseline:
    """A baseline with the settings that were best on validation, fitted on train.

    Attributes:
        name: One of `BASELINES`.
        settings: The chosen settings, in the words of its grid.
        validation_ndcg_at_100: Mean over the users with validation items; training items are not ranked.
        score: Gives the scores of all items, float32 `(n, num_items)`, for `n` user indices.
        factors: Of iALS, user and item factors, float32 `(num_users, factors)` and `(num_items, factors)`.
    """

    name: str
    settings: Settings
    validation_ndcg_at_100: float
    score: ScoreFunction
    factors: Factors | None = None


def fit_baselines(
    train: csr_matrix,
    validation: csr_matrix,
    names: Sequence[str] = ("popularity", "item_knn", "ease", "ials"),
    seed: int = 42,
    progress: bool = False,
) -> dict[str, FittedBaseline]:
    """Fit each named baseline over its grid on `train` and keep the settings with the best NDCG@100 on `validation`.

    The same input and seed give the same models on the same machine. Without validation items the first settings of a
    grid are taken. EASE is left out, with a sentence in the log, above `EASE_MAX_ITEMS` items.

    Args:
        train: `(num_users, num_items)` of ones.
        validation: Of the same shape; what the grids are searched on.
        names: Which of `BASELINES` to fit.
        seed: Draws the users whom settings are compared on and the start of iALS.
        progress: Whether to show a progress bar over the settings.

    Returns:
        The fitted baselines by name, in the order of `names`.

    Raises:
        InputError: A name is not one of `BASELINES`.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"evaluation.baselines: '{unknown[0]}' is not a baseline; choose from {', '.join(BASELINES)}")
    train, validation = csr_matrix(train, dtype=np.float32), csr_matrix(validation, dtype=np.float32)
    users = np.flatnonzero(np.diff(validation.indptr))
    compared = np.sort(np.random.default_rng(seed).permutation(users)[:SEARCH_USERS])
    many_items = train.shape[1] > MANY_ITEMS

    def fit(name: str, settings: Settings) -> FittedBaseline:
        score, factors = BASELINES[name](train, seed, **settings)
        return FittedBaseline(name, settings, ndcg_at_100(score, compared), score, factors)

    def ndcg_at_100(score: ScoreFunction, users: np.ndarray) -> float:
        return evaluate_scores(score, users, train, validation).figures().ndcg_at_100.value

    fitted = {}
    # On small matrices threads of BLAS gain nothing, and lose much on a busy machine.
    with threadpool_limits(limits=None if many_items else 1, user_api="blas"):
        for name in names:
            if name == "ease" and train.shape[1] > EASE_MAX_ITEMS:
                logger.warning("ease is left out: %d items are more than %d", train.shape[1], EASE_MAX_ITEMS)
                continue
            bar = tqdm(_grid(name, many_items), desc=name, unit="fit", disable=not progress)
            best = reduce(_better, (fit(name, settings) for settings in bar))
            if name == "ials":
                larger = IALS_LARGER_MANY_ITEMS if many_items else IALS_LARGER
                best = _better(best, fit(name, {**best.settings, **larger}))
            if len(compared) < len(users):
                best = replace(best, validation_ndcg_at_100=ndcg_at_100(best.score, users))
            logger.info("%s: validation NDCG@100 %.4f with %s", name, best.validation_ndcg_at_100, best.settings)
            fitted[name] = best
    return fitted


def fit_ials(
    train: csr_matrix, factors: int, regularization: float, alpha: float, iterations: int, seed: int
) -> Factors:
    """Fit implicit alternating least squares (Hu, Koren and Volinsky, 2008), which minimises over `x` and `y`.

        Σ_ui c_ui (p_ui - x_u·y_i)² + regularization (Σ_u |x_u|² + Σ_i |y_i|²)

    where `p` is 1 for the pairs of `train` and 0 elsewhere, `c` is `alpha` for the pairs of `train` and 1 elsewhere.

    Args:
        train: `(num_users, num_items)` of ones.
        factors: Width of the factors.
        regularization: The same for every user and item, whatever the number of their pairs.
        alpha: Confidence in a pair.
        iterations: Passes over users and items.
        seed: Of the random start. The result does not depend on the number of threads.

    Returns:
        User factors, float32 `(num_users, factors)`, and item factors, float32 `(num_items, factors)`.
    """
    # Threads of BLAS inside the library's own are many times slower, and their number would change the last digits.
    with threadpool_limits(limits=1, user_api="blas"):
        model = AlternatingLeastSquares(
            factors=factors, regularization=regularization, alpha=float(alpha), iterations=iterations, random_state=seed
        )
        model.fit(csr_matrix(train, dtype=np.float32), show_progress=False)
    return model.user_factors, model.item_factors


def _popularity(train: csr_matrix, seed: int) -> Model:
    """Score an item by the number of its training users."""
    counts = np.asarray(train.sum(axis=0), dtype=np.float32).reshape(1, -1)
    return lambda users: np.repeat(counts, len(users), axis=0), None


def _item_knn(train: csr_matrix, seed: int, weighting: str, neighbours: int) -> Model:
    """Score an item by the sum of its similarities to the history, over those that are among its nearest neighbours.

    Similarity is the cosine of two items' vectors over users (cosine), the same with users weighted by idf (tfidf), or
    their product without dividing by the lengths (idf: BM25 without its normalisation), which favours frequent items.
    """
    neighbours = min(neighbours, train.shape[1])
    if weighting == "cosine":
        model = CosineRecommender(K=neighbours)
    elif weighting == "tfidf":
        model = TFIDFRecommender(K=neighbours)
    else:
        model = BM25Recommender(K=neighbours, B=0)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # about a conversion that it makes itself
        model.fit(train, show_progress=False)
    from_history = csr_matrix(model.similarity.T, dtype=np.float32)
    # 0 / 0 where all users of an item have idf 0.
    from_history.data[np.isnan(from_history.data)] = 0
    return lambda users: (train[users] @ from_history).toarray(), None


def _ease(train: csr_matrix, seed: int, regularization: float) -> Model:
    weights = ease_weights((train.T @ train).toarray(order="F"), regularization)
    return lambda users: train[users] @ weights, None


def ease_weights(gram: np.ndarray, regularization: float) -> np.ndarray:
    """The `B` of scores `X B`, in closed form `B = I - P diag(P)^-1` with `P = (gram + regularization I)^-1` (Steck, 2019).

    Args:
        gram: `(items, items)` float32, in Fortran's order; overwritten.
        regularization: The penalty.
    """
    gram[np.diag_indices_from(gram)] += regularization
    cholesky, _ = spotrf(gram, overwrite_a=True)
    precision, _ = spotri(cholesky, overwrite_c=True)  # the upper triangle
    precision = np.triu(precision)
    precision += np.triu(precision, 1).T
    weights = precision / -np.diag(precision)
    np.fill_diagonal(weights, 0)
    return weights


def _ials(train: csr_matrix, seed: int, **settings: Any) -> Model:
    user_factors, item_factors = fit_ials(train, seed=seed, **settings)
    return lambda users: user_factors[users] @ item_factors.T, (user_factors, item_factors)


BASELINES: dict[str, Callable[..., Model]] = {
    "popularity": _popularity,
    "item_knn": _item_knn,
    "ease": _ease,
    "ials": _ials,
}


def _grid(name: str, many_items: bool) -> list[Settings]:
    grids: dict[str, list[Settings]] = {
        "popularity": [{}],
        "item_knn": ITEM_KNN_GRID,
        "ease": EASE_GRID_MANY_ITEMS if many_items else EASE_GRID,
        "ials": IALS_GRID,
    }
    return grids[name]


def _better(first: FittedBaseline, second: FittedBaseline) -> FittedBaseline:
    return second if second.validation_ndcg_at_100 > first.validation_ndcg_at_100 else first
