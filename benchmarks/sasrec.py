"""SASRec by RecTools, which pins an older NumPy and so lives in an environment of its own: what it ranks for each user.

python -m venv sasrec && sasrec/bin/pip install "rectools[torch]"
python benchmarks/next_item.py --sasrec sasrec/bin/python
python benchmarks/quality.py --sasrec sasrec/bin/python

One setting, RecTools' own but for what a processor can bear: 128 wide in place of 256, the last 50 items of a history in place of 100, a
softmax over all items; where there are more than 5,000 items the last 20, and a sampled softmax of 128 negatives, as SASRec is published
at its best. Two layers. It is trained two epochs at a time until NDCG@10 on validation has not grown four times, and the best is kept.
"""

import argparse
import csv
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

EPOCHS_AT_A_TIME, MOST_EPOCHS, PATIENCE, VALIDATION_USERS, DEPTH = 2, 100, 4, 5_000, 10
MANY_ITEMS, LENGTH, LENGTH_OF_MANY, NEGATIVES_OF_MANY = 5_000, 50, 20, 128


def ranked_by_sasrec(
    python: str, train: tuple[np.ndarray, Any], validation: tuple[np.ndarray, Any], seen: csr_matrix, users: np.ndarray,
    depth: int, *, sees_validation: bool,
) -> np.ndarray:  # fmt: skip
    """The best items of each user, int64 `(users, depth)`, -1 where there are fewer; the most popular ones for whom SASRec does not know.

    Args:
        python: The interpreter of the environment that has RecTools.
        train: Users, and what each had, in order of time.
        validation: Users, and their validation items.
        seen: `(users, items)`, what is not to be shown.
        users: Who is ranked for.
        depth: How many.
        sees_validation: Whether histories go on to the validation items when the ranking is made.
    """
    with tempfile.TemporaryDirectory() as temporary:
        pairs, ranked = Path(temporary) / "pairs.csv", Path(temporary) / "ranked.csv"
        with pairs.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["user_id", "item_id", "split"])
            for split, (of, histories) in (("train", train), ("validation", validation)):
                for user, history in zip(of.tolist(), histories, strict=True):
                    rows.writerows((user, item, split) for item in history.tolist())
        most = depth + int(np.diff(seen.indptr).max())
        command = [python, "-W", "ignore", __file__, str(pairs), str(ranked), "--depth", str(most)]
        subprocess.run(command + (["--sees-validation"] if sees_validation else []), check=True)
        found = np.loadtxt(ranked, np.int64, delimiter=",", skiprows=1, ndmin=2)
    found = found[np.argsort(found[:, 0], kind="stable")]
    whose, starts = np.unique(found[:, 0], return_index=True)
    by_user = dict(zip(whose.tolist(), np.split(found[:, 1], starts[1:]), strict=True))
    popular = np.argsort(-np.bincount(train[1].values, minlength=seen.shape[1]), kind="stable")
    best = np.full((len(users), depth), -1)
    for row, user in enumerate(users.tolist()):
        own = by_user.get(user, popular)
        own = own[~np.isin(own, seen[user].indices)][:depth]
        best[row, : len(own)] = own
    return best


def main() -> None:
    """Train, rank, write: run by the other environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pairs", type=Path, help="CSV with user_id, item_id and split (train, validation), in order of time"
    )
    parser.add_argument("ranked", type=Path, help="CSV that is written: user_id, item_id, best first")
    parser.add_argument("--depth", type=int, default=100, help="items of each user (default: %(default)s)")
    parser.add_argument("--sees-validation", action="store_true", help="rank by histories that go on to validation")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    chosen = parser.parse_args()
    import pandas as pd
    from pytorch_lightning import Trainer, seed_everything
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(chosen.seed)
    pairs = pd.read_csv(chosen.pairs)
    pairs["weight"] = 1.0
    # The order of the rows is the order of time.
    pairs["datetime"] = pd.Timestamp("2000-01-01") + pd.to_timedelta(range(len(pairs)), unit="s")
    train = Dataset.construct(pairs[pairs["split"] == "train"].drop(columns="split"))
    last = Dataset.construct(pairs.drop(columns="split")) if chosen.sees_validation else train
    held_out = pairs[pairs["split"] == "validation"].groupby("user_id")["item_id"].agg(set)
    known = set(train.user_id_map.external_ids)
    judged = [user for user in held_out.index if user in known]
    judged = list(np.random.default_rng(chosen.seed).permutation(judged)[:VALIDATION_USERS])
    many = pairs["item_id"].nunique() > MANY_ITEMS
    model = SASRecModel(
        n_blocks=2, n_heads=4, n_factors=128, dropout_rate=0.2, session_max_len=LENGTH_OF_MANY if many else LENGTH,
        loss="sampled_softmax" if many else "softmax", n_negatives=NEGATIVES_OF_MANY, lr=1e-3, batch_size=128, epochs=EPOCHS_AT_A_TIME, recommend_torch_device="cpu",
        get_trainer_func=lambda: Trainer(
            max_epochs=EPOCHS_AT_A_TIME, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ),
    )  # fmt: skip
    best, waited, discounts = -1.0, 0, 1 / np.log2(np.arange(DEPTH) + 2)
    for epoch in range(EPOCHS_AT_A_TIME, MOST_EPOCHS + 1, EPOCHS_AT_A_TIME):
        model.fit_partial(train, min_epochs=EPOCHS_AT_A_TIME, max_epochs=EPOCHS_AT_A_TIME)
        shown = model.recommend(
            users=judged, dataset=train, k=DEPTH, filter_viewed=True, on_unsupported_targets="ignore"
        )
        gains = []
        for user, items in shown.groupby("user_id", sort=False)["item_id"]:
            wanted = held_out[user]
            gain = sum(discounts[place] for place, item in enumerate(items) if item in wanted)
            gains.append(gain / discounts[: len(wanted)].sum())
        reached = sum(gains) / max(len(judged), 1)
        print(f"SASRec, {epoch} epochs: validation NDCG@10 {reached:.4f}", file=sys.stderr, flush=True)
        waited = 0 if reached > best else waited + 1
        if reached > best:
            best = reached
            whom = list(last.user_id_map.external_ids)
            ranked = model.recommend(
                users=whom, dataset=last, k=chosen.depth, filter_viewed=True, on_unsupported_targets="ignore"
            )
            ranked[["user_id", "item_id"]].to_csv(chosen.ranked, index=False)
        if waited == PATIENCE:
            break


if __name__ == "__main__":
    main()
