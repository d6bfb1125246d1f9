"""Recall@k of ranked item lists, as an `evaluate` module and as a plain function.

The denominator is `min(k, held-out items)`, so that a perfect list reaches 1 for every user.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Share of the held-out items found among the first k items recommended to each user, averaged over users. A user with
more than k held-out items is divided by k, so that the best possible list always scores 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of int): for each user the recommended items, best first, each at most once.
    references (list of list of int): for each user the held-out items, in any order.
    k (int): how many of the recommended items count. Defaults to 100.

Returns:
    recall_at_k (float): mean over the users with at least one held-out item, between 0 and 1.
    standard_error (float): standard error of that mean over users.
    num_users (int): number of those users.

Examples:
    >>> recall = evaluate.load("metrics/recall_at_k")
    >>> recall.compute(predictions=[[3, 1, 2], [2, 0, 1]], references=[[3, 0], [0]], k=2)["recall_at_k"]
    0.75
"""

_CITATION = """\
@inproceedings{liang2018variational,
  title     = {Variational autoencoders for collaborative filtering},
  author    = {Liang, Dawen and Krishnan, Rahul G. and Hoffman, Matthew D. and Jebara, Tony},
  booktitle = {Proceedings of the 2018 World Wide Web Conference},
  pages     = {689--698}, year = {2018},
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


class RecallAtK(evaluate.Metric):
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
        per_user = recall_at_k(predictions, references, k)
        per_user = per_user[~np.isnan(per_user)]
        count = len(per_user)
        return {
            "recall_at_k": float(per_user.mean()) if count else float("nan"),
            "standard_error": float(per_user.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan"),
            "num_users": count,
        }


def recall_at_k(predictions: Rows, references: Rows, k: int = 100) -> np.ndarray:
    """Recall@k of each user.

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
    best = np.minimum(held_out, k)
    return np.divide(hits.sum(axis=1), best, out=np.full(len(best), np.nan), where=held_out > 0)


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
