"""Exact ranking of the whole catalogue, streamed over users and items, and the figures that a run reports.

The trained model and every baseline go through the same functions: all they give is a function from users to scores.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isnan, sqrt
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional as F
from tqdm.auto import tqdm

from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from metrics.recall_at_k.recall_at_k import recall_at_k
from training.data.ragged import Ragged

# Scores of all items are gone through in blocks of so many, which stay in the processor's cache for a batch of users.
ITEMS_PER_BLOCK = 4096
# Of a later block only the groups of so many items are looked at whose best one beats the user's k-th so far.
ITEMS_PER_GROUP = 64

# User indices, int (n,) -> scores of all items, float (n, num_items), higher is better.
ScoreFunction = Callable[[np.ndarray], np.ndarray]
# User indices, int (n,) -> the same in blocks of items, float (n, items of the block), from the first item to the last; the
# ranking writes into them.
BlockFunction = Callable[[np.ndarray], Iterable[torch.Tensor]]
# User indices (n,) and their best items (n, k): whoever wants to read them on the way.
BlockReader = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True, eq=False)
class BestItems:
    """The best items of some users, best first.

    Attributes:
        items: int64 `(n, k)`; -1 after the last item where a user has fewer than `k` to choose from.
        scores: Float `(n, k)`; -inf where the item is -1.
        log_total: Float `(n,)`, logarithm of the sum of the exponentials of all scores, those of seen items included.
    """

    items: np.ndarray
    scores: np.ndarray
    log_total: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """Under the softmax of the scores over the whole catalogue, float `(n, k)`; 0 where the item is -1."""
        return np.exp(self.scores - self.log_total[:, None])

    def without(self, rows: csr_matrix, k: int) -> "BestItems":
        """The first `k` of what is left without each user's entries in `rows`, `(n, num_items)`."""
        users, num_items = rows.shape
        gone = np.repeat(np.arange(users), np.diff(rows.indptr)) * num_items + rows.indices
        left_out = (self.items < 0) | np.isin(np.arange(users)[:, None] * num_items + self.items, gone)
        order = np.argsort(left_out, axis=1, kind="stable")[:, :k]
        is_gone = np.take_along_axis(left_out, order, axis=1)
        items, scores = (np.take_along_axis(values, order, axis=1) for values in (self.items, self.scores))
        return BestItems(np.where(is_gone, -1, items), np.where(is_gone, -np.inf, scores), self.log_total)


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

    @classmethod
    def unknown(cls, count: int) -> "PerUser":
        """Of `count` users, all nan."""
        return cls(*np.full((3, count), np.nan))

    def put(self, places: np.ndarray, figures: "PerUser") -> None:
        """Set those of some users by their places, int `(n,)`."""
        for mine, theirs in zip(vars(self).values(), vars(figures).values(), strict=True):
            mine[places] = theirs

    def figures(self) -> Figures:
        """Means over the users who have held-out items."""
        return Figures(
            ndcg_at_100=mean_over_users(self.ndcg_at_100),
            recall_at_20=mean_over_users(self.recall_at_20),
            recall_at_40=mean_over_users(self.recall_at_40),
            num_users=int(np.count_nonzero(~np.isnan(self.ndcg_at_100))),
        )


def evaluate_scores(
    score: ScoreFunction | BlockFunction,
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
        score: Gives the scores of all items for `n` user indices: float `(n, num_items)`, or item block by item block.
        users: User indices to evaluate, int `(users,)`.
        seen: `(num_users, num_items)`; a user's entries are left out of the ranking. Training items where validation is
            scored; training and validation items where test is.
        held_out: `(num_users, num_items)`; a user's entries are what the ranking should find.
        batch_size: Users scored at a time.
        progress: Whether to show a progress bar.
        k: Items ranked for each user, at least 100.
        read_block: Is given the users of each block and their `k` best items.

    Returns:
        NDCG@100, Recall@20 and Recall@40 of each user.
    """
    users = np.asarray(users)
    blocks = [users[start : start + batch_size] for start in range(0, len(users), batch_size)]
    measured = PerUser.unknown(len(users))
    for number, block in enumerate(tqdm(blocks, desc="ranking", unit="block", disable=not progress, leave=False)):
        top = best_items(score(block), seen[block], block, k=max(k, 100)).items
        if read_block is not None:
            read_block(block, top)
        places = np.arange(number * batch_size, number * batch_size + len(block))
        measured.put(places, measure_users(top, held_out[block]))
    return measured


def measure_users(items: np.ndarray, held_out: csr_matrix) -> PerUser:
    """The figures of a ranking, int `(n, ≥ 100)`, that should find each user's entries in `held_out`, `(n, num_items)`."""
    references = Ragged(held_out.indices, held_out.indptr.astype(np.int64))
    return PerUser(
        ndcg_at_k(items, references, k=100),
        recall_at_k(items, references, k=20),
        recall_at_k(items, references, k=40),
    )


def best_items(scores: np.ndarray | Iterable[torch.Tensor], seen: csr_matrix, users: np.ndarray, k: int) -> BestItems:
    """The k best unseen items of each user; exact, though no more than one block of scores is held beside the best so far.

    Args:
        scores: Float `(n, num_items)`, which are left as they are, or their item blocks, which are written into; -inf: never
            rank this item.
        seen: `(n, num_items)`; a user's entries are left out of the ranking.
        users: User indices, int `(n,)`, for the error.
        k: How many items to give.

    Returns:
        `min(k, num_items)` items a user; of equal scores the lower item index goes first.

    Raises:
        ValueError: A score is nan.
    """
    num_users, num_items = seen.shape
    k = min(k, num_items)
    # The seen pairs in order of the item, so that those of a block are a slice.
    order = np.argsort(seen.indices, kind="stable")
    seen_row = np.repeat(np.arange(num_users), np.diff(seen.indptr))[order]
    seen_item = seen.indices[order].astype(np.int64)
    # The best so far stand in order of the item and are sorted at the end.
    start, best, items, log_total = 0, torch.empty(0), torch.empty(0), torch.full((num_users,), -torch.inf)
    for block in _column_blocks(scores) if isinstance(scores, np.ndarray) else scores:
        # Of the seen ones, too: probabilities are over the whole catalogue. And a sum tells of each nan in it.
        log_total = torch.logaddexp(log_total.to(block), block.logsumexp(dim=1))
        if log_total.isnan().any():
            raise ValueError(f"the scores of user {users[int(log_total.isnan().int().argmax())]} hold nan")
        here = slice(*np.searchsorted(seen_item, (start, start + block.shape[1])))
        row, column = (torch.from_numpy(place).to(block.device) for place in (seen_row[here], seen_item[here] - start))
        block[row, column] = -torch.inf
        if start == 0:
            items = top_columns(block, k)
            best, missing = block.gather(1, items), k - items.shape[1]
            best, items = F.pad(best, (0, missing), value=-torch.inf), F.pad(items, (0, missing), value=-1)
        else:
            found, columns = _above(best.amin(dim=1, keepdim=True), block)
            best, items = torch.cat([best, found], dim=1), torch.cat([items, columns + start], dim=1)
            chosen = top_columns(best, k)
            best, items = best.gather(1, chosen), items.gather(1, chosen)
        start += block.shape[1]
    best, in_order = best.sort(dim=1, descending=True, stable=True)
    items = items.gather(1, in_order).masked_fill(best == -torch.inf, -1)
    return BestItems(items.cpu().numpy(), best.cpu().numpy(), log_total.cpu().numpy())


def top_columns(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The columns of the k best of each row, in ascending order; of equal scores the first ones.

    `topk` promises nothing about equal scores. On a processor NumPy's partition finds the k-th best faster, too: 1.3 times the rows
    a second for the best 100 of 12,101 (`python benchmarks/prediction.py --short`).

    Args:
        scores: Float `(n, m)` without nan.
        k: How many.

    Returns:
        int64 `(n, min(k, m))`.
    """
    rows, count = scores.shape
    k = min(k, count)
    if scores.device.type == "cpu":
        kth = torch.from_numpy(np.partition(scores.numpy(), count - k, axis=1)[:, count - k, None])
    else:
        kth = scores.topk(k, dim=1).values[:, -1:]
    chosen = scores >= kth
    row, column = chosen.nonzero(as_tuple=True)
    if len(row) > rows * k:
        # Of those level with the k-th the last ones are too many.
        surplus = torch.bincount(row, minlength=rows)[:, None] - k
        tied = surplus[:, 0] > 0
        level = scores[tied] == kth[tied]
        so_far = level.cumsum(dim=1, dtype=torch.int32)
        chosen[tied] &= ~level | (so_far <= so_far[:, -1:] - surplus[tied])
        row, column = chosen.nonzero(as_tuple=True)
    return column.view(rows, k)


def _above(bar: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is above each row's `bar`, `(n, 1)`, and where.

    Returns:
        Scores `(n, most in a row)` in order of the column, filled up with -inf, and their columns, int64.
    """
    rest = -block.shape[1] % ITEMS_PER_GROUP
    padded = F.pad(block, (0, rest), value=-torch.inf) if rest else block
    groups = padded.view(len(block), -1, ITEMS_PER_GROUP)
    row, group = (groups.amax(dim=2) > bar).nonzero(as_tuple=True)
    inside = groups[row, group]
    which, place = (inside > bar[row]).nonzero(as_tuple=True)
    row, column = row[which], group[which] * ITEMS_PER_GROUP + place
    counts = torch.bincount(row, minlength=len(block))
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    found = block.new_full((len(block), int(counts.max())), -torch.inf)
    columns = torch.zeros_like(found, dtype=torch.int64)
    found[row, slot], columns[row, slot] = inside[which, place], column
    return found, columns


def _column_blocks(scores: np.ndarray) -> Iterator[torch.Tensor]:
    """Copies of the columns, block by block."""
    for start in range(0, scores.shape[1], ITEMS_PER_BLOCK):
        yield torch.tensor(scores[:, start : start + ITEMS_PER_BLOCK])


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
