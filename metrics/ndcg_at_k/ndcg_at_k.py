"""NDCG@k of ranked item lists, as an `evaluate` module and as a plain function.

Every held-out item has gain one; the ideal list is cut at `min(k, held-out items)`.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Normalised discounted cumulative gain of the first k items recommended to each user, averaged over users: a held-out
item at rank r (from 1) gains 1 / log2(r + 1), and the sum is divided by that of the best possible list.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of int): for each user the recommended items, best first, each at most once.
    references (list of list of int): for each user the held-out items, in any order.
    k (int): how many of the recommended items count. Defaults to 100.

Returns:
    ndcg_at_k (float): mean over the users with at least one held-out item, between 0 and 1.
    standard_error (float): standard error of that mean over users.
    num_users (int): number of those users.

Examples:
    >>> ndcg = evaluate.load("metrics/ndcg_at_k")
    >>> ndcg.compute(predictions=[[3, 1, 2], [2, 0, 1]], references=[[3], [0]], k=3)["ndcg_at_k"]
    0.8154648767857288
"""

_CITATION = """\
@article{jarvelin2002cumulated,
  title   = {Cumulated gain-based evaluation of {IR} techniques},
  author  = {J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
  journal = {ACM Transactions on Information Systems},
  volume  = {20}, number = {4}, pages = {422--446}, year = {2002},
}
"""


@runtime_checkable
class FlatRows(Protocol):
    """Rows of different lengths in two flat arrays: row `i` is `values[offsets[i] : offsets[i + 1]]`."""

    @property
    def values(self) -> np.ndarray: ...  # noqa: D102

    @property
    def offsets(self) -> np.ndarray: ...  # noqa: D102


Rows = Sequence[Sequence[int] | np.ndarray] | np.ndarray | FlatRows


class NdcgAtK(evaluate.Metric):
    """The `evaluate` module: `compute(predictions=…, references=…, k=100)`, or `add_batch`, then `compute(k=100)`."""

    def _info(self) -> evaluate.MetricInfo:
        lists = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": lists, "references": lists}),
        )

    def _compute(self, predictions: Rows, references: Rows, k: int = 100) -> dict[str, Any]:
        per_user = ndcg_at_k(predictions, references, k)
        per_user = per_user[~np.isnan(per_user)]
        count = len(per_user)
        return {
            "ndcg_at_k": float(per_user.mean()) if count else float("nan"),
            "standard_error": float(per_user.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan"),
            "num_users": count,
        }


def ndcg_at_k(predictions: Rows, references: Rows, k: int = 100) -> np.ndarray:
    """NDCG@k of each user.

    Args:
        predictions: For each user the recommended items, best first, each at most once; an array `(users, n)` of int
            where a negative number stands for "no item", or rows of different lengths. Only the first `k` count.
        references: For each user the held-out items, int, in any order; rows of different lengths.
        k: How many of the recommended items count.

    Returns:
        float64 `(users,)`; nan for users without held-out items.

    Raises:
        ValueError: `k` is below 1, the two hold different numbers of users, or a user is recommended an item twice.
    """
    hits, held_out = _hits(predictions, references, k)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate(([0.0], np.cumsum(discounts)))[np.minimum(held_out, k)]
    gain = hits @ discounts[: hits.shape[1]]
    return np.divide(gain, ideal, out=np.full(len(ideal), np.nan), where=held_out > 0)


def _hits(predictions: Rows, references: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the first k predictions are held out, bool `(users, ≤ k)`, and how many items each user holds out."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    ranked = _rectangle(predictions)[:, :k]
    items, lengths = _flat(references)
    if len(ranked) != len(lengths):
        raise ValueError(f"predictions are of {len(ranked)} users, references of {len(lengths)}")
    if items.min(initial=0) < 0:
        raise ValueError(f"references hold the negative item {items.min()}")
    in_order = np.sort(ranked, axis=1)
    twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(f"the predictions of row {twice.argmax()} name an item twice")

    # One number per pair of user and item turns the search in every user's list into a single one.
    span = 1 + max(items.max(initial=0), ranked.max(initial=0))
    wanted = np.unique(np.repeat(np.arange(len(lengths)), lengths) * span + items)
    hits = np.isin(np.arange(len(ranked))[:, None] * span + ranked, wanted) & (ranked >= 0)
    return hits, np.bincount(wanted // span, minlength=len(lengths))


def _rectangle(rows: Rows) -> np.ndarray:
    """Rows as int64 `(rows, longest)`, shorter ones filled up with -1."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return rows.astype(np.int64)
    values, lengths = _flat(rows)
    rectangle = np.full((len(lengths), lengths.max(initial=0)), -1, dtype=np.int64)
    rectangle[np.arange(rectangle.shape[1]) < lengths[:, None]] = values
    return rectangle


def _flat(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """All values of the rows one after the other, int64, and the rows' lengths."""
    if isinstance(rows, FlatRows):
        return np.asarray(rows.values, dtype=np.int64), np.diff(rows.offsets)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum())), lengths
