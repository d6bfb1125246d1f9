"""Who interacted with what: raw tables become index arrays that are filtered, mapped, split and sorted.

All that follows (corpora, training, evaluation, baselines) works on `Interactions` and on no raw table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import sparse

from configuration.errors import InputError
from configuration.recipe import Data
from training.data.ragged import Ragged
from training.data.readers import SPLITS, RawTables

TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True, eq=False)
class Interactions:
    """Distinct pairs of a user and an item, sorted by user, then by time (else by their order in the table).

    Attributes:
        users: Index of each pair's user, int32 `(pairs,)`.
        items: Index of each pair's item, int32 `(pairs,)`.
        splits: TRAIN, VALIDATION or TEST, int8 `(pairs,)`.
        timestamps: Unix seconds, int64 `(pairs,)`; None where the source has none.
        reviews: Review of each pair or None; None where the source has none.
        user_ids: Raw id of each user, sorted; its position is the index.
        item_ids: Raw id of each item, sorted; its position is the index.
        item_titles: Name of each item for people, its raw id where there is none.
        item_texts: Text about each item; empty where there is none.
        user_texts: Text about each user; empty where there is none.
        source: SHA-256 of each file that was read, by name.
        log: Counts: rows read, what each filter dropped, pairs kept, items that the item table lacks.
        dropped_users: Raw ids of the users that no pair is left of, sorted; those that only the table of users has, too.
    """

    users: np.ndarray
    items: np.ndarray
    splits: np.ndarray
    timestamps: np.ndarray | None
    reviews: list[str | None] | None
    user_ids: list[str | int]
    item_ids: list[str | int]
    item_titles: list[str]
    item_texts: list[str]
    user_texts: list[str]
    source: dict[str, str]
    log: dict[str, int]
    dropped_users: list[str] | list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.item_ids)

    def matrix(self, splits: int | Sequence[int]) -> sparse.csr_matrix:
        """Pairs of one or more splits as a float32 matrix `(users, items)` of ones, column indices sorted."""
        histories = self.histories(splits)
        matrix = sparse.csr_matrix(
            (np.ones(len(histories.values), np.float32), histories.values.copy(), histories.offsets),
            shape=(self.num_users, self.num_items),
        )
        matrix.sort_indices()
        return matrix

    def histories(self, splits: int | Sequence[int]) -> Ragged:
        """Item indices of each user's pairs of one or more splits, int32, in order of time; `num_users` rows."""
        chosen = np.isin(self.splits, splits)
        offsets = np.zeros(self.num_users + 1, np.int64)
        np.cumsum(np.bincount(self.users[chosen], minlength=self.num_users), out=offsets[1:])
        return Ragged(self.items[chosen], offsets)


def build_interactions(tables: RawTables, data: Data, seed: int, *, refit: bool = False) -> Interactions:
    """Filter the rows (rating, repeated pairs, given split, k-core in this order), map the ids, split and sort.

    Args:
        tables: What was read.
        data: Thresholds and kind of split.
        seed: Seed of the random split, which depends on the set of pairs only, not on the order of the rows.
        refit: Whether nothing is held out: all the pairs that the split has are for training.

    Raises:
        InputError: Nothing is left, a filter lacks its column, a user has no training pair in a given split, or the
            table of users lacks a user.
    """
    rows = _Rows.from_frame(tables.interactions)
    log = {"rows": len(rows)}
    rows = _drop_low_ratings(rows, tables.interactions, data, log)
    rows = _drop_repeated(rows, log)
    rows = _drop_unlisted(rows, tables.interactions, data, log)
    rows = _keep_core(rows, data, log)
    log["interactions"] = len(rows)

    user_ids, users = _map_ids(tables.interactions["user"], rows)
    item_ids, items = _map_ids(tables.interactions["item"], rows)
    order = np.lexsort((rows.position, rows.time, users))
    rows, users, items = rows.take(order), users[order], items[order]
    item_titles, item_texts = _item_texts(tables.items, item_ids, log)
    interactions = Interactions(
        users=users,
        items=items,
        splits=np.full(len(rows), TRAIN, np.int8),
        timestamps=rows.time if "timestamp" in tables.interactions else None,
        reviews=_reviews(tables.interactions, rows),
        user_ids=user_ids,
        item_ids=item_ids,
        item_titles=item_titles,
        item_texts=item_texts,
        user_texts=_user_texts(tables, user_ids, data),
        source=dict(tables.source),
        log=log,
        dropped_users=_dropped_users(tables, user_ids),
    )
    if refit:
        return interactions
    return replace(interactions, splits=_split(interactions, tables.interactions, rows, data, seed))


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of the raw table that are still in: provisional codes of user and item, time, position in the table."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    position: np.ndarray

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> _Rows:
        time = frame["timestamp"].to_numpy(np.int64) if "timestamp" in frame else np.zeros(len(frame), np.int64)
        user, item = (pd.factorize(frame[column])[0].astype(np.int64) for column in ("user", "item"))
        return cls(user, item, time, np.arange(len(frame)))

    def __len__(self) -> int:
        return len(self.user)

    def take(self, chosen: np.ndarray) -> _Rows:
        """Rows by mask or by index."""
        return _Rows(self.user[chosen], self.item[chosen], self.time[chosen], self.position[chosen])


def _drop_low_ratings(rows: _Rows, frame: pd.DataFrame, data: Data, log: dict[str, int]) -> _Rows:
    if data.min_rating is None:
        return rows
    if "rating" not in frame:
        raise InputError(
            f"data.min_rating is {data.min_rating:g}, but the interactions have no rating; name its column in "
            "data.rating_column, or leave data.min_rating out"
        )
    kept = rows.take(frame["rating"].to_numpy(np.float64) >= data.min_rating)
    log["below_min_rating"] = len(rows) - len(kept)
    if not len(kept):
        highest = frame["rating"].max()
        raise InputError(
            f"no interaction is left: data.min_rating is {data.min_rating:g}, the highest rating {highest:g}; lower it"
        )
    return kept


def _drop_repeated(rows: _Rows, log: dict[str, int]) -> _Rows:
    """Keep the last of each pair."""
    by_time = rows.take(np.lexsort((rows.position, rows.time)))
    pairs = by_time.user * (by_time.item.max() + 1) + by_time.item
    kept = by_time.take(~pd.Series(pairs).duplicated(keep="last").to_numpy())
    log["repeated"] = len(rows) - len(kept)
    return kept


def _drop_unlisted(rows: _Rows, frame: pd.DataFrame, data: Data, log: dict[str, int]) -> _Rows:
    """Drop the pairs that a split in a table of its own does not list."""
    if data.split != "given" or data.split_path is None:
        return rows
    kept = rows.take(frame["split"].notna().to_numpy()[rows.position])
    log["not_in_split"] = len(rows) - len(kept)
    if not len(kept):
        raise InputError(f"no interaction is left: none that passes data.min_rating is listed in {data.split_path}")
    return kept


def _keep_core(rows: _Rows, data: Data, log: dict[str, int]) -> _Rows:
    """Drop users and items with too few interactions until none is left that has."""
    kept = rows
    while len(kept):
        enough = np.bincount(kept.user)[kept.user] >= data.min_user_interactions
        enough &= np.bincount(kept.item)[kept.item] >= data.min_item_interactions
        if enough.all():
            break
        kept = kept.take(enough)
    log["below_min_interactions"] = len(rows) - len(kept)
    if not len(kept):
        raise InputError(
            f"no interaction is left of {len(rows)}: no group of users and items has data.min_user_interactions "
            f"{data.min_user_interactions} and data.min_item_interactions {data.min_item_interactions}; lower them"
        )
    return kept


def _map_ids(raw: pd.Series, rows: _Rows) -> tuple[list[str | int], np.ndarray]:
    """Sorted raw ids, integers by value and all else as text, and each row's index among them."""
    codes, uniques = pd.factorize(raw.iloc[rows.position])
    ids: list[str | int] = [int(value) if raw.dtype.kind in "iu" else str(value) for value in uniques]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    index = np.empty(len(ids), np.int32)
    index[order] = np.arange(len(ids))
    return [ids[i] for i in order], index[codes]


def _dropped_users(tables: RawTables, user_ids: list[str | int]) -> list[str] | list[int]:
    """The raw ids of users that are not among those that are left; ids are the same where their text is."""
    columns = [tables.interactions["user"], *([] if tables.users is None else [tables.users["user"]])]
    there = {str(raw) for column in columns for raw in column.unique().tolist()}
    dropped = there.difference(map(str, user_ids))
    return sorted(map(int, dropped)) if all(column.dtype.kind in "iu" for column in columns) else sorted(dropped)


def _split(interactions: Interactions, frame: pd.DataFrame, rows: _Rows, data: Data, seed: int) -> np.ndarray:
    if data.split == "given":
        return _given_split(interactions, frame, rows)
    if data.split == "leave_last_out":
        return _leave_last_out(interactions.users)
    return _random_split(interactions.users, interactions.items, seed)


def _random_split(users: np.ndarray, items: np.ndarray, seed: int) -> np.ndarray:
    """Hold out a tenth of each user, halves rounded up, at least one, twice; users with fewer than 3 keep all."""
    # Each pair's key depends on the sorted pairs only, so neither time nor the order of the rows matters.
    keys = np.empty(len(users))
    keys[np.lexsort((items, users))] = np.random.default_rng(seed).random(len(users))
    order = np.lexsort((keys, users))
    position, count = _position_in_user(users)
    held_out = np.where(count >= 3, np.maximum(1, (count + 5) // 10), 0)
    splits = np.empty(len(users), np.int8)
    splits[order] = np.select([position < held_out, position < 2 * held_out], [TEST, VALIDATION], TRAIN)
    return splits


def _leave_last_out(users: np.ndarray) -> np.ndarray:
    """Each user's last pair for test and the one before for validation; users with fewer than 3 keep all."""
    position, count = _position_in_user(users)
    from_end = np.where(count >= 3, count - 1 - position, count)
    return np.select([from_end == 0, from_end == 1], [TEST, VALIDATION], TRAIN).astype(np.int8)


def _position_in_user(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sorted users, each row's position within its user's rows and their number."""
    counts = np.bincount(users)
    starts = np.cumsum(counts) - counts
    return np.arange(len(users)) - starts[users], counts[users]


def _given_split(interactions: Interactions, frame: pd.DataFrame, rows: _Rows) -> np.ndarray:
    names = frame["split"].iloc[rows.position]
    splits = pd.Index(SPLITS).get_indexer(pd.Index(names)).astype(np.int8)
    in_train = np.bincount(interactions.users[splits == TRAIN], minlength=interactions.num_users)
    lacking = [interactions.user_ids[user] for user in np.flatnonzero(in_train == 0)]
    if lacking:
        raise InputError(
            f"{len(lacking)} of {interactions.num_users} users have no training interaction in the given split "
            f"({_some(lacking)}); move one of theirs to train, or leave the users out"
        )
    return splits


def _reviews(frame: pd.DataFrame, rows: _Rows) -> list[str | None] | None:
    if "review" not in frame:
        return None
    return [review if isinstance(review, str) else None for review in frame["review"].iloc[rows.position]]


def _item_texts(
    table: pd.DataFrame | None, item_ids: list[str | int], log: dict[str, int]
) -> tuple[list[str], list[str]]:
    """Titles and texts by index; an item that the table lacks is called by its raw id and has no text."""
    names = [str(raw) for raw in item_ids]
    if table is None:
        return names, [""] * len(names)
    found = pd.Index(table["item"].astype(str)).get_indexer(pd.Index(names))
    log["items_without_row"] = int((found < 0).sum())
    titles, texts = table["title"].tolist(), table["text"].tolist()
    return (
        [titles[row] or name if row >= 0 else name for row, name in zip(found, names, strict=True)],
        [texts[row] if row >= 0 else "" for row in found],
    )


def _user_texts(tables: RawTables, user_ids: list[str | int], data: Data) -> list[str]:
    if tables.users is None:
        return [""] * len(user_ids)
    found = pd.Index(tables.users["user"].astype(str)).get_indexer(pd.Index([str(raw) for raw in user_ids]))
    lacking = [user_ids[user] for user in np.flatnonzero(found < 0)]
    if lacking:
        raise InputError(
            f"{data.users.path or data.path}: the table of users lacks {len(lacking)} of {len(user_ids)} users "
            f"({_some(lacking)}); add a row for each, or leave the table out"
        )
    texts = tables.users["text"].tolist()
    return [texts[row] for row in found]


def _some(ids: list[str | int]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", …" if len(ids) > 3 else "")
