"""Exact top 100 of a million items for a slice of a million users: users a second, memory, and what all of them would take.

python benchmarks/prediction.py          # some minutes
python benchmarks/prediction.py --short

The model is made up and random: GPT-2 of two layers and width 64, a million users with histories of ten items, no content
tower. Each repeat is what training/predict.py does for a ranking: prompts, states, logits in blocks of items, seen items left
out, and a Parquet part. All on one thread. The reference ranks from the logits of all items at once. Memory is what a
repeat takes at its peak beside model, histories and raw ids. training/predict.py ranks twice: with and without the user token.
"""

import argparse
import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from scipy.sparse import csr_matrix

from benchmarks.claims import MB, Claim, Worker, alternate, paired, resident_memory, together
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.data.batches import Layout
from training.data.ragged import Ragged
from training.evaluation.predictions import Parts, RankedUsers, RawIds
from training.evaluation.ranking import PerUser, best_items, top_columns
from training.evaluation.scoring import ModelScores

USERS, ITEMS, FEWER_ITEMS = 1_000_000, 1_000_000, 250_000
HISTORY, TOP, BATCH, WORDS = 10, 100, 256, 300
WIDTHS = (12_101, 1_682)  # as many items as amazon-beauty and ml-100k have
COMMAND = "python benchmarks/prediction.py"


class Catalogue:
    """A made-up recommender and its users' histories.

    Args:
        num_users: Users.
        num_items: Items.
    """

    def __init__(self, num_users: int, num_items: int) -> None:
        torch.manual_seed(0)
        prompt_ids = {"history": [1, 2, 3], "separator": [4], "recommend": [5, 6, 7]}
        backbone = {
            "model_type": "gpt2", "vocab_size": WORDS, "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64,
            "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip
        config = CLLM4RecConfig(
            backbone_config=backbone, num_users=num_users, num_items=num_items, content_tower=False, item_bias=False,
            prompt_ids=prompt_ids, initializer_range=0.5,
        )  # fmt: skip
        items = np.random.default_rng(0).integers(num_items, size=num_users * HISTORY, dtype=np.int32)
        offsets = np.arange(num_users + 1, dtype=np.int64) * HISTORY
        self.seen = csr_matrix(
            (np.ones(len(items), np.float32), items, offsets),
            shape=(num_users, num_items),
        )
        self.scores = ModelScores(
            CLLM4RecForRecommendation(config),
            np.arange(num_users),
            Ragged(items, offsets),
            Layout(WORDS, num_users, num_items, prompt_ids),
            max_history=HISTORY,
        )
        self.ids = RawIds.of(list(range(num_users)), list(range(num_items)))

    def check(self, users: np.ndarray) -> None:
        """Compare the ranking of some users with a stable sort of all their logits.

        Raises:
            RuntimeError: if they differ anywhere.
        """
        logits = self.scores(users)
        logits[self.seen[users].nonzero()] = -np.inf
        ranked = best_items(self.scores.blocks(users), self.seen[users], users, TOP).items
        if not np.array_equal(ranked, np.argsort(-logits, axis=1, kind="stable")[:, :TOP]):
            raise RuntimeError("the ranking in blocks differs from the sort of all logits")


def prediction(num_users: int, num_items: int, count: int) -> Callable[[], float]:
    """What a worker repeats: rank the catalogue for the next `count` users and write them; gives the MB that it took."""
    catalogue = Catalogue(num_users, num_items)
    catalogue.check(np.arange(4))
    turn = 0

    def repeat() -> float:
        nonlocal turn
        slice_of_users = (turn * count + np.arange(count)) % num_users
        turn += 1
        with tempfile.TemporaryDirectory() as folder, working_memory() as megabytes:
            parts = Parts(Path(folder) / "predictions", Path(folder) / "indices", 1, "")
            with parts.write(0, catalogue.ids, TOP) as write:
                for start in range(0, count, BATCH):
                    users = slice_of_users[start : start + BATCH]
                    best = best_items(catalogue.scores.blocks(users), catalogue.seen[users], users, TOP)
                    nobody = PerUser.unknown(len(users))
                    write(RankedUsers(users, best.items, nobody, nobody), best.probabilities)
        return megabytes[0]

    return repeat


def prediction_from_all_logits(num_users: int, num_items: int, count: int) -> Callable[[], float]:
    """The same for one batch of `count` users, from a row of logits over all items for each of them; nothing is written."""
    catalogue = Catalogue(num_users, num_items)
    users = np.arange(count)

    @torch.no_grad()
    def repeat() -> float:
        with working_memory() as megabytes:
            probabilities = catalogue.scores.model.item_logits(catalogue.scores.states(users)).softmax(-1)
            probabilities[catalogue.seen[users].nonzero()] = -1
            probabilities.topk(TOP, dim=1)
        return megabytes[0]

    return repeat


@contextmanager
def working_memory() -> Iterator[list[float]]:
    """MB that the block takes at its peak beside what there was before, in a list that is filled at its end; Linux with glibc."""
    megabytes: list[float] = []
    # What was freed goes back to the system, and the peak starts anew.
    pa.default_memory_pool().release_unused()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident_memory("VmRSS")
    yield megabytes
    megabytes.append((resident_memory("VmHWM") - before) / MB)


def selection(width: int, ours: bool) -> Callable[[], float]:
    """What a worker repeats: find the best 100 of each of 256 rows, with `top_columns` or with `topk`."""
    rows = torch.randn(256, width, generator=torch.Generator().manual_seed(0))

    def repeat() -> float:
        for _ in range(20):
            if ours:
                top_columns(rows, TOP)
            else:
                rows.topk(TOP, dim=1)
        return 20 * len(rows)

    return repeat


def claims(short: bool, num_users: int = USERS, num_items: int = ITEMS) -> Iterator[Claim]:
    """The claims about prediction.

    Args:
        short: Fewer users and repeats.
        num_users: Users of the large catalogue.
        num_items: Its items.
    """
    fewer, large = min(FEWER_ITEMS, num_items), f"{num_items:,} items"
    count, few, repeats = (BATCH, BATCH // 4, 3) if short else (4 * BATCH, BATCH // 4, 5)
    with together(
        Worker(prediction, num_users, num_items, count),
        Worker(prediction_from_all_logits, num_users, num_items, few),
        Worker(prediction, num_users, fewer, count),
    ) as workers:
        runs = [[worker.repeat() for worker in workers] for _ in range(repeats)]
        peaks = [worker.peak_memory for worker in workers]
    rates = [[count / mine[1], few / theirs[1]] for mine, theirs, _ in runs]
    yield paired(
        "top 100 of all items in blocks ÷ from all logits",
        large,
        rates,
        unit="users/s",
        memory=peaks[:2],
        command=COMMAND,
    )
    hours = [[num_users / rate / 3600 for rate in pair] for pair in rates]
    yield paired(f"the same for {num_users:,} users, extrapolated", large, hours, unit="h", command=COMMAND)
    yield paired(
        f"memory of ranking {BATCH} users in blocks ÷ {few} from all logits", large,
        [[mine[0], theirs[0]] for mine, theirs, _ in runs], unit="MB", command=COMMAND,
    )  # fmt: skip
    yield paired(
        f"memory of a ranking ÷ with {fewer:,} items", large, [[mine[0], theirs[0]] for mine, _, theirs in runs],
        unit="MB", at_most=1.5, command=COMMAND,
    )  # fmt: skip
    yield paired(
        f"time of a user and item ÷ with {fewer:,} items", large,
        [[mine[1] / num_items * 1e9 / count, theirs[1] / fewer * 1e9 / count] for mine, _, theirs in runs],
        unit="ns", at_most=1.2, command=COMMAND,
    )  # fmt: skip
    for width in WIDTHS[:1] if short else WIDTHS:
        with together(Worker(selection, width, True), Worker(selection, width, False)) as (ours, reference):
            best = alternate(
                "best 100 of a row ÷ topk", f"{width:,} items", ours, reference, unit="rows/s", repeats=repeats,
                command=COMMAND,
            )  # fmt: skip
        yield best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer users and repeats")
    parser.add_argument(
        "--users",
        type=int,
        default=USERS,
        help="users of the catalogue (default: %(default)s)",
    )
    parser.add_argument("--items", type=int, default=ITEMS, help="its items (default: %(default)s)")
    arguments = parser.parse_args()
    for _ in claims(arguments.short, arguments.users, arguments.items):
        pass


if __name__ == "__main__":
    main()
