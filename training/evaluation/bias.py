"""Whom and what a ranking serves: NDCG@100 by popularity of the items and activity of the users, and who gets the places.

All of it is counted on the way through the test ranking, a block of users at a time.
"""

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from training.data.ragged import Ragged
from training.evaluation.ranking import as_json, mean_over_users

ITEM_GROUPS = ("tail", "middle", "head")
USER_GROUPS = ("least active", "moderately active", "most active")
DEPTHS = (10, 100)


def terciles(counts: np.ndarray) -> np.ndarray:
    """The third that each count is in, 0 the lowest, int64 `(n,)`.

    Equal counts stay together, so that a group is no matter of chance: each of the lower two ends with the last count equal
    to the one at its third, and a group may be empty where many counts are equal.
    """
    if not len(counts):
        return np.zeros(0, np.int64)
    in_order = np.sort(counts)
    first, second = (in_order[-(-len(counts) * third // 3) - 1] for third in (1, 2))
    return (counts > first).astype(np.int64) + (counts > second)


class Bias:
    """Reads the blocks of a ranking of the test split; afterwards [`~Bias.to_dict`] says whom it serves.

    Items are grouped by training interactions over the catalogue, users by theirs over those who have held-out items.

    Args:
        train: `(num_users, num_items)`, what popularity and activity are counted on.
        held_out: Of the same shape, what the ranking should find.
    """

    def __init__(self, train: csr_matrix, held_out: csr_matrix) -> None:
        num_users, num_items = train.shape
        self.popularity = np.bincount(train.indices, minlength=num_items)
        self.item_group = terciles(self.popularity)
        self.activity = np.diff(train.indptr)
        self.held_out = [_of_items(held_out, self.item_group == group) for group in range(len(ITEM_GROUPS))]
        self.held_out.append(held_out)
        # NDCG@100 of each user, over the held-out items of each group and over all of them.
        self.ndcg = np.full((len(self.held_out), num_users), np.nan)
        self.ranked = np.zeros(num_users, bool)
        self.places = np.zeros((len(DEPTHS), num_items), np.int64)

    def __call__(self, users: np.ndarray, top: np.ndarray) -> None:
        """Count a block.

        Args:
            users: User indices, int `(n,)`.
            top: Best items, int `(n, k)`, -1 after the last.
        """
        self.ranked[users] = True
        for ndcg, held_out in zip(self.ndcg, self.held_out, strict=True):
            rows = held_out[users]
            ndcg[users] = ndcg_at_k(top, Ragged(rows.indices, rows.indptr.astype(np.int64)), k=100)
        for places, depth in zip(self.places, DEPTHS, strict=True):
            shown = top[:, :depth]
            places += np.bincount(shown[shown >= 0], minlength=len(places))

    @property
    def ndcg_at_100(self) -> np.ndarray:
        """Of each user by index, over all held-out items, float64 `(num_users,)`; nan where nothing is held out."""
        return self.ndcg[-1]

    def to_dict(self, model: "Bias | None" = None) -> dict[str, Any]:
        """What `results.json` keeps.

        Args:
            model: Of the model that a baseline is compared with, user by user.

        Returns:
            `by_item_popularity`, a dictionary for each group of [`ITEM_GROUPS`]: how many `items`, the `least` and `most` of
            their `training_interactions`, `held_out` pairs and their `held_out_share`; `ndcg_at_100` with its standard error
            over the `num_users` who have a held-out item of the group, where the ranking is the same (the whole catalogue)
            and only those items are relevant; `share_at_10`, `share_at_100`: the group's share of all recommended places, and
            `coverage_at_10`, `coverage_at_100`: the share of its items that are in anyone's top k.

            `by_user_activity`, a dictionary for each group of [`USER_GROUPS`]: `least` and `most` training interactions,
            `ndcg_at_100` and `num_users`.

            Where a model is given both have `behind_model`, too: mean and standard error of how much higher its NDCG@100 is.

            `coverage_at_10`, `coverage_at_100`: the share of the catalogue that is in anyone's top k; `novelty_at_10`, `novelty_at_100`:
            bits that a recommended item tells, the mean over all places of -log2 of the share of training's users who took it
            (self-information; an item that nobody took counts as if one had); `users_ranked`.

            None stands for what nobody or nothing is there to measure on.
        """
        with_test = np.flatnonzero(~np.isnan(self.ndcg_at_100))
        activity = terciles(self.activity[with_test])
        by_item, by_user = [], []
        for group, name in enumerate(ITEM_GROUPS):
            mine, held_out = self.item_group == group, self.held_out[group].nnz
            by_item.append(
                {"group": name, "items": int(mine.sum())}
                | _range(self.popularity[mine])
                | {"held_out": held_out, "held_out_share": _share(held_out, self.held_out[-1].nnz)}
                | _ndcg(self.ndcg[group], None if model is None else model.ndcg[group])
                | self._places(mine, whose="share")
                | self._places(mine, whose="coverage")
            )
        for group, name in enumerate(USER_GROUPS):
            chosen = with_test[activity == group]
            theirs = None if model is None else model.ndcg_at_100[chosen]
            by_user.append({"group": name} | _range(self.activity[chosen]) | _ndcg(self.ndcg_at_100[chosen], theirs))
        everything = np.ones(len(self.popularity), bool)
        return {
            "by_item_popularity": by_item,
            "by_user_activity": by_user,
            **self._places(everything, whose="coverage"),
            **self._novelty(),
            "users_ranked": int(self.ranked.sum()),
        }

    def _places(self, chosen: np.ndarray, whose: str) -> dict[str, float | None]:
        """By depth, the share of all places that the chosen items get, or the share of the chosen items that get one."""
        if whose == "share":
            shares = [_share(places[chosen].sum(), places.sum()) for places in self.places]
        else:
            shares = [_share(np.count_nonzero(places[chosen]), chosen.sum()) for places in self.places]
        return {f"{whose}_at_{depth}": share for depth, share in zip(DEPTHS, shares, strict=True)}

    def _novelty(self) -> dict[str, float | None]:
        """By depth, the mean self-information of the items at all places, in bits."""
        bits = -np.log2(np.maximum(self.popularity, 1) / max(np.count_nonzero(self.activity), 1))
        told = [_share(float(places @ bits), float(places.sum())) for places in self.places]
        return {f"novelty_at_{depth}": mean for depth, mean in zip(DEPTHS, told, strict=True)}


def _of_items(held_out: csr_matrix, chosen: np.ndarray) -> csr_matrix:
    """The pairs of the chosen items, in a matrix of the same shape."""
    kept = chosen[held_out.indices]
    ends = np.concatenate([[0], np.cumsum(kept)])
    return csr_matrix((held_out.data[kept], held_out.indices[kept], ends[held_out.indptr]), shape=held_out.shape)


def _ndcg(per_user: np.ndarray, model: np.ndarray | None) -> dict[str, Any]:
    behind = {} if model is None else {"behind_model": as_json(mean_over_users(model - per_user))}
    return {
        "ndcg_at_100": as_json(mean_over_users(per_user)),
        "num_users": int(np.count_nonzero(~np.isnan(per_user))),
        **behind,
    }


def _range(counts: np.ndarray) -> dict[str, int | None]:
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (None, None)
    return {"least": low, "most": high}


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None
