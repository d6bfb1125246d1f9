"""Print a few documents of each corpus as the model sees them, ids decoded.

python training/show_corpus.py --config sample
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from configuration.errors import InputError
from configuration.recipe import Recipe
from training.command_line import make_parser, run_script
from training.data.batches import (
    Batch,
    collaborative_batch,
    content_batch,
    layout_of,
    next_item_batch,
    recommendation_batch,
)
from training.data.corpora import KINDS, Corpora, build_corpora, open_corpora
from training.data.interactions import build_interactions
from training.data.readers import read_tables
from training.run import Run
from training.stages.warm_start import train_on_what_is_known


def show_corpus(recipe: Recipe, count: int = 3, epoch: int = 0) -> str:
    """The first documents of each corpus in an epoch, built first where they are not there yet.

    Args:
        recipe: The recipe.
        count: Documents of each kind.
        epoch: Whose order and held-out share is shown.

    Returns:
        The text that the script prints: counts, then prompt and main text apart, raw ids beside the tokens.

    Raises:
        InputError: for wrong data, a number below 0, or corpora that were made with another recipe.
    """
    for name, number in (("--count", count), ("--epoch", epoch)):
        if number < 0:
            raise InputError(f"{name} is {number}, it must be at least 0")
    run = Run.of(recipe)
    if (run.corpora / "info.json").is_file():
        corpora = open_corpora(run.corpora)
        if corpora.info["fingerprint"] != corpora.fingerprint_with(recipe):
            raise InputError(
                f"{run.corpora}: these corpora were made with another recipe; give the one they were made with, or another name=…"
            )
    else:
        tables = read_tables(recipe.data)
        interactions = build_interactions(tables, recipe.data, recipe.seed, refit=recipe.refit)
        if run.started_from is not None:
            interactions = train_on_what_is_known(interactions, Path(run.started_from))
        corpora = build_corpora(interactions, recipe, run.corpora)
    lines = [
        f"{run.corpora}: "
        + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in corpora.info["counts"].items())
    ]
    texts = corpora.texts("content")
    for kind, name in enumerate(KINDS):
        chosen = np.flatnonzero(texts.kind == kind)[:count]
        if len(chosen):
            lines += ["", f"content: {name}", *documents(corpora, content_batch(texts, chosen))]
    users, histories = corpora.histories("recommendation")
    chosen, layout = np.arange(min(count, len(users))), layout_of(corpora)
    arguments = (users, histories, chosen, layout, recipe.method, recipe.seed, epoch)
    lines += ["", f"collaborative, epoch {epoch}", *documents(corpora, collaborative_batch(*arguments))]
    make = next_item_batch if recipe.method.targets == "next" else recommendation_batch
    lines += ["", f"recommendation, epoch {epoch}", *documents(corpora, make(*arguments))]
    raw_users, raw_items = corpora.users(), corpora.items()
    lines += ["", "raw ids of these users and of the first items"]
    lines += [f"  user_{users[row]} = {raw_users[users[row]]['id']}" for row in chosen]
    lines += [f"  item_{j} = {raw_items[j]['id']}" for j in range(min(2 * count, len(raw_items)))]
    return "\n".join(lines)


def documents(corpora: Corpora, batch: Batch) -> list[str]:
    """One line a document: prompt, an arrow, main text or targets."""
    lines, lengths = [], batch["document_lengths"]
    rows, packed_labels = batch["input_ids"][0].split(lengths), batch["labels"]
    labels = packed_labels if "target_weights" in batch else packed_labels[0].split(lengths)
    for prompt, targets in zip((row.tolist() for row in rows), (row.tolist() for row in labels), strict=True):
        main = [label for label in targets if label != -100]
        if "target_weights" in batch:
            main = corpora.tokenizer.item_id(main)
        else:
            prompt = prompt[: len(prompt) - len(main)]
        lines.append(f"  {corpora.tokenizer.decode(prompt)}  →  {corpora.tokenizer.decode(main).strip()}")
    return lines


def main() -> None:
    """The command line."""
    parser = make_parser(__doc__ or "", stage=False)
    parser.add_argument("--count", type=int, default=3, help="documents of each kind (default: 3)")
    parser.add_argument("--epoch", type=int, default=0, help="whose order and held-out share is shown (default: 0)")

    def show(recipe: Recipe, arguments: argparse.Namespace) -> None:
        sys.stdout.write(show_corpus(recipe, arguments.count, arguments.epoch) + "\n")

    run_script(parser, show)


if __name__ == "__main__":
    main()
