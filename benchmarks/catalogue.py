"""A training step that does not feel the catalogue: 10 million items against 10 thousand, the same batch in both.

python benchmarks/catalogue.py            a step of each item head, 64 wide, no content tower, sampled softmax
python benchmarks/catalogue.py --short    1 million items

The histories are made up; what a step costs depends on their lengths, which are the same. How much ranking quality the sampled
softmax keeps is measured on data: `accelerate launch training/pretrain.py --config amazon-beauty method.softmax=sampled` and so on.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.claims import Claim, Worker, alternate, together, write_claims
from benchmarks.steps import Steps
from configuration.load import load_recipe
from configuration.recipe import Recipe
from training.data.ragged import Ragged

FEW, SHORT, LONG = 10_000, 1_000_000, 10_000_000
USERS, LONGEST, WORDS, WIDTH = 10_000, 60, 300, 64
MOST_OF_A_SMALL_CATALOGUE = 1.2
COMMAND = "python benchmarks/catalogue.py"
PROMPT = {"history": [1, 2, 3], "separator": [4], "recommend": [5, 6, 7]}


@dataclass(frozen=True)
class MadeUp:
    """Corpora of users whose histories are spread over a catalogue of any size, popular items first.

    Attributes:
        num_items: Items of the catalogue, a multiple of 10,000.
        num_users: Users; the history of each has up to 60 items, whatever the catalogue.
        num_words: Words of the backbone.
    """

    num_items: int
    num_users: int = USERS
    num_words: int = WORDS

    @property
    def info(self) -> dict[str, Any]:
        """What else is read of corpora: the prompt."""
        return {"prompt_ids": PROMPT}

    @property
    def tokenizer(self) -> Any:
        """Its end of text."""
        return SimpleNamespace(eos_token_id=0)

    def texts(self, _: str) -> Any:
        """No texts."""
        return _NoTexts()

    def histories(self, _: str) -> tuple[np.ndarray, Ragged]:
        """All users, and their distinct items."""
        generator = np.random.default_rng(0)
        lengths = generator.integers(5, LONGEST, self.num_users)
        # Half of the draws from the first hundredth of the catalogue.
        places = generator.random((self.num_users, LONGEST)) ** np.where(generator.random((1, LONGEST)) < 0.5, 1, 6)
        # Drawn in the small catalogue, then spread, so that the histories are as long in every other.
        items, spread = (places * FEW).astype(np.int64), self.num_items // FEW
        return np.arange(self.num_users), Ragged.from_lists(
            [np.unique(row[:length]) * spread for row, length in zip(items, lengths, strict=True)], np.int32
        )


class _NoTexts:
    documents = Ragged.from_lists([])

    def __len__(self) -> int:
        return 0


def catalogue_recipe(*overrides: str) -> Recipe:
    """The default recipe without content tower, teacher and start from iALS, with a sampled softmax."""
    words = ["method.content_tower=false", "method.softmax=sampled", "method.initialisation=random", "tracker=none"]
    # The default recipe would take a width that follows the catalogue.
    return load_recipe("sample", "default", [*words, f"backbone.config.n_embd={WIDTH}", *overrides])


def trains(
    stage: str, num_items: int, batches: int, softmax: str = "sampled", device: str = "cpu"
) -> Callable[[], float]:
    """A stage on a made-up catalogue; each call of what is returned trains on further batches and gives their number."""
    recipe = catalogue_recipe(f"method.softmax={softmax}", f"device={device}")
    torch.manual_seed(0)
    corpora: Any = MadeUp(num_items)
    steps, done = Steps(stage, recipe, corpora), 0

    def train() -> float:
        nonlocal done
        for number in range(done, done + batches):
            steps(number)
        done += batches
        return batches

    return train


def claims(short: bool) -> Iterator[Claim]:
    """A step with millions of items ÷ with ten thousand.

    Args:
        short: One million, and fewer repeats.
    """
    items, batches, repeats = (SHORT, 4, 3) if short else (LONG, 10, 9)
    for stage in ("collaborative", "recommendation"):
        with together(*(Worker(trains, stage, count, batches) for count in (items, FEW))) as (large, small):
            claim = alternate(
                f"{stage}, step of a sampled softmax ÷ with {FEW:,} items", f"{items:,} items", large, small,
                unit="ms per step", repeats=repeats, at_most=MOST_OF_A_SMALL_CATALOGUE, command=COMMAND,
            )  # fmt: skip
        yield claim
    of_both = (Worker(trains, "recommendation", FEW, batches, softmax) for softmax in ("sampled", "exact"))
    with together(*of_both) as (sampled, exact):
        claim = alternate(
            "recommendation, step of a sampled ÷ of an exact softmax", f"{FEW:,} items", sampled, exact,
            unit="ms per step", repeats=repeats, command=COMMAND,
        )  # fmt: skip
    yield claim


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"with {SHORT:,} items")
    parser.add_argument("--write", action="store_true", help="put the claims into benchmarks/results/speed.json")
    chosen = parser.parse_args()
    found = list(claims(chosen.short))
    if chosen.write:
        write_claims(found)


if __name__ == "__main__":
    main()
