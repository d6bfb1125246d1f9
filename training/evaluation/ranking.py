"""Ranking of the whole catalogue, streamed over users, and the figures that a run reports.

The trained model and every baseline go through the same functions: all they give is a function from users to scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, sqrt
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from tqdm.auto import tqdm

from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from metrics.recall_at_k.recall_at_k import recall_at_k
from training.data.ragged import Ragged

# User indices, int (n,) -> scores of all items, float (n, num_items), higher is better.
ScoreFunction = Callable[[np.ndarray], np.ndarray]
# User indices (n,), their scores (n, num_items) and best items (n, k): whoever wants to read a block on the way.
BlockReader = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Mean:
    """A mean over users and its standard error, both nan where there are too few of them."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Figures:
    """What a run reports on a split: means over the users who have held-out items there, `num_users` of them."""

    ndcg_at_100: Mean
    recall_at_20: Mean
    recall_at_40: Mean
    num_users: int

    def to_dict(self) -> dict[str, Any]:
        """Give `{"ndcg_at_100": {"value", "standard_error"}, "recall_at_20": …, "recall_at_40": …, "num_users"}`.

        JSON has no nan: it becomes None.
        """
        means = {"ndcg_at_100": self.ndcg_at_100, "recall_at_20": self.recall_at_20, "recall_at_40": self.recall_at_40}
        return {**{name: as_json(mean) for name, mean in means.items()}, "num_users": self.num_users}


@dataclass(frozen=True, eq=False)
class PerUser:
    """The same figures of each user in the order asked for, float64 `(users,)`; nan where nothing is held out."""

    ndcg_at_100: np.ndarray
    recall_at_20: np.ndarray
    recall_at_40: np.ndarray

    def figures(self) -> Figures:
        """Means over the users who have held-out items."""
        return Figures(
            ndcg_at_100=mean_over_users(self.ndcg_at_100),
            recall_at_20=mean_over_users(self.recall_at_20),
            recall_at_40=mean_over_users(self.recall_at_40),
            num_users=int(np.count_nonzero(~np.isnan(self.ndcg_at_100))),
        )


def evaluate_scores(
    score: ScoreFunction,
    users: np.ndarray,
    seen: csr_matrix,
    held_out: csr_matrix,
    batch_size: int = 1024,
    progress: bool = False,
    k: int = 100,
    read_block: BlockReader | None = None,
) -> PerUser:
    """Rank the whole catalogue for each user and compare with what was held out; memory follows `batch_size`.

    Args:
        score: Gives the scores of all items, float `(n, num_items)`, for `n` user indices.
        users: User indices to evaluate, int `(users,)`.
        seen: `(num_users, num_items)`; a user's entries are left out of the ranking. Training items where validation is
            scored; training and validation items where test is.
        held_out: `(num_users, num_items)`; a user's entries are what the ranking should find.
        batch_size: Users scored at a time.
        progress: Whether to show a progress bar.
        k: Items ranked for each user, at least 100.
        read_block: Is given the users of each block, their scores and their `k` best items.

    Returns:
        NDCG@100, Recall@20 and Recall@40 of each user.
    """
    users = np.asarray(users)
    blocks = [users[start : start + batch_size] for start in range(0, len(users), batch_size)]
    per_user = np.empty((3, len(users)))
    for number, block in enumerate(tqdm(blocks, desc="ranking", unit="block", disable=not progress, leave=False)):
        scores = score(block)
        top = rank(scores, seen, block, k=max(k, 100))
        if read_block is not None:
            read_block(block, scores, top)
        rows = held_out[block]
        references = Ragged(rows.indices, rows.indptr.astype(np.int64))
        columns = slice(number * batch_size, number * batch_size + len(block))
        per_user[0, columns] = ndcg_at_k(top, references, k=100)
        per_user[1, columns] = recall_at_k(top, references, k=20)
        per_user[2, columns] = recall_at_k(top, references, k=40)
    return PerUser(*per_user)


def rank(scores: np.ndarray, seen: csr_matrix, users: np.ndarray, k: int) -> np.ndarray:
    """Give the k best unseen items of each user, best first; of equal scores the lower item index goes first.

    Args:
        scores: Float `(n, num_items)`, row `i` of user `users[i]`; -inf: never rank this item.
        seen: `(num_users, num_items)`; a user's entries are left out of the ranking.
        users: User indices, int `(n,)`.
        k: How many items to give.

    Returns:
        int64 `(n, min(k, num_items))`; -1 after the last item where a user has fewer than `k` to choose from.

    Raises:
        ValueError: A score is nan.
    """
    if np.isnan(scores).any():
        raise ValueError(f"the scores of user {users[np.isnan(scores).any(axis=1).argmax()]} hold nan")
    num_items = scores.shape[1]
    k = min(k, num_items)
    scores = scores.copy()
    rows = seen[users]
    scores[np.repeat(np.arange(len(users)), np.diff(rows.indptr)), rows.indices] = -np.inf

    # All items above the k-th score, and of those level with it the first ones: k a row, in order of their index.
    kth = np.partition(scores, num_items - k, axis=1)[:, num_items - k, None]
    above, level = scores > kth, scores == kth
    room = k - np.count_nonzero(above, axis=1, keepdims=True)
    chosen = above | (level & (np.cumsum(level, axis=1, dtype=np.int32) <= room))
    items = np.nonzero(chosen)[1].reshape(len(users), k)

    best = np.take_along_axis(scores, items, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    items, best = np.take_along_axis(items, order, axis=1), np.take_along_axis(best, order, axis=1)
    return np.where(np.isneginf(best), -1, items)


def as_json(mean: Mean) -> dict[str, float | None]:
    """`{"value", "standard_error"}`; JSON has no nan: it becomes None."""
    return {key: None if isnan(number) else number for key, number in vars(mean).items()}


def mean_over_users(per_user: np.ndarray) -> Mean:
    """Mean and standard error of what is not nan, float `(users,)`."""
    values = per_user[~np.isnan(per_user)]
    count = len(values)
    return Mean(
        value=float(values.mean()) if count else float("nan"),
        standard_error=float(values.std(ddof=1)) / sqrt(count) if count > 1 else float("nan"),
    )
