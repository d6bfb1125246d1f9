"""What each optimisation gives, alone: with it ÷ without it, everything else as it is.

python benchmarks/parts.py                           all of them
python benchmarks/parts.py --short                   fewer documents and repeats
python benchmarks/parts.py --only packing batches    some of them

On ml-100k, one of them on amazon-beauty with its larger catalogue, where they are at hand (else on the sample), the frozen GPT-2 of 4 layers, 256 wide, one thread.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import NewGELUActivation

from benchmarks.claims import MB, Claim, Worker, alternate, environment, paired, together, write_claims
from benchmarks.sets import make_corpora, set_at_hand, set_recipe
from benchmarks.steps import Steps
from configuration.recipe import Recipe
from modeling_cllm4rec import modeling_cllm4rec as modeling
from training.data.corpora import open_corpora
from training.device import KERNELS_KEPT, computes_in_bf16
from training.stages import loop
from training.stages.model import set_attention_dropout
from training.stages.optimiser import RowwiseAdamW

COMMAND = "python benchmarks/parts.py"
ROWS, WIDTH, TOUCHED, KEPT_OTHERWISE, KERNEL_STEPS = 1_000_000, 64, 3_000, 1024, 60


def steps_of(stage: str, recipe: Recipe, corpora: Path) -> Steps:
    """A stage ready for steps."""
    return Steps(stage, recipe, open_corpora(corpora))


def trains(stage: str, recipe: Recipe, corpora: Path, batches: int, without: str) -> Callable[[], float]:
    """A stage set up without one optimisation; each call of what is returned trains on further steps.

    Args:
        stage: `content`, `collaborative` or `recommendation`.
        recipe: Of the run.
        corpora: Its corpora.
        batches: Steps at a call.
        without: `packing`, `gelu`, `attention`, `chunks`, `positions`, `rows`, `frozen`,
            `half`, or `` for none; `compile`: with torch.compile, which is not used otherwise.

    Returns:
        A function that gives the number of documents.
    """
    if without == "half":
        stages = {name: replace(getattr(recipe, name), mixed_precision="no") for name in ("pretrain", "finetune")}
        recipe = replace(recipe, **stages)
    steps = steps_of(stage, recipe, corpora)
    if without == "gelu":
        for module in steps.towers.base.backbone.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.GELU):
                    setattr(module, name, NewGELUActivation())
    elif without == "attention":
        set_attention_dropout(steps.towers.recommender, 0.1)
    elif without == "chunks":
        mock.patch.object(modeling, "next_token_loss", loss_at_once).start()
    elif without == "positions":
        mock.patch.object(modeling, "next_token_loss", loss_everywhere).start()
    elif without == "frozen":
        steps.towers.base.backbone.requires_grad_(True)
    elif without == "compile":
        steps.towers.base.backbone.compile(dynamic=True)
    elif without == "rows":
        mock.patch.object(loop, "looked_up_rows", return_value=nullcontext(lambda: None)).start()
    elif without == "packing":
        mock.patch.object(modeling.CLLM4RecModel, "forward_packed", forward_padded).start()
    done = itertools.count()
    return lambda: sum(steps(next(done)) for _ in range(batches))


def makes_batches(stage: str, recipe: Recipe, corpora: Path, batches: int) -> Callable[[], float]:
    """A stage whose batches are made and not trained on; documents of a call."""
    steps, done = steps_of(stage, recipe, corpora), itertools.count()
    return lambda: sum(len(steps.batch(next(done))["document_lengths"]) for _ in range(batches))


def forward_padded(
    self: modeling.CLLM4RecModel, embeds: torch.Tensor, lengths: tuple[int, ...], **kwargs: object
) -> object:
    """The documents in a rectangle, padded to the longest, under transformers' attention mask."""
    rows = pad_sequence(list(embeds[0].split(lengths)), batch_first=True)
    real = torch.arange(rows.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    outputs = self(inputs_embeds=rows, attention_mask=real.long(), use_cache=False)
    outputs.last_hidden_state = outputs.last_hidden_state[real].unsqueeze(0)
    return outputs


def loss_everywhere(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, divisor: int
) -> torch.Tensor:
    """The loss from logits of every position."""
    logits = nn.functional.linear(hidden[0, :-1], weight, bias)
    return nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / divisor


def loss_at_once(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, divisor: int
) -> torch.Tensor:
    """The loss from the logits of all labels at once, which the backward pass finds."""
    paid = labels[0, 1:] != -100
    logits = nn.functional.linear(hidden[0, :-1][paid], weight, bias).float()
    return nn.functional.cross_entropy(logits, labels[0, 1:][paid], reduction="sum") / divisor


def row_steps(sparse: bool) -> Callable[[], float]:
    """Backward, clipping and step of a table of a million rows of which 3,000 were looked up."""
    table = nn.Embedding(ROWS, WIDTH, sparse=sparse)
    optimizer = RowwiseAdamW(table.parameters(), lr=1e-3, weight_decay=0.0)
    rows = torch.randint(ROWS, (TOUCHED,), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        for _ in range(10):
            table(rows).square().sum().backward()
            if not sparse:
                nn.utils.clip_grad_norm_(table.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return 10

    return step


class Part(NamedTuple):
    """An optimisation: what is claimed, the stage that shows it, its name in [`trains`], whether it is one of bfloat16, and the set."""

    claim: str
    stage: str
    name: str
    half: bool = False
    set: str = "ml-100k"

    def kind(self) -> tuple[str, str, bool, bool]:
        """What one worker of ours stands for, and whether it needs a compiler, where more can fail."""
        return self.stage, self.set, self.half, self.name == "compile"


PARTS = (
    Part("packing, ÷ padded to the longest", "collaborative", "packing"),
    Part("one kernel for GELU, ÷ eight operations", "collaborative", "gelu"),
    Part("attention without dropout in one kernel, ÷ with it", "collaborative", "attention"),
    Part("no gradients of frozen weights, ÷ with them", "collaborative", "frozen"),
    Part("as it is, ÷ with a backbone from torch.compile", "collaborative", "compile"),
    Part("softmax over the words by one kernel in chunks, ÷ logits at once", "content", "chunks"),
    Part("logits where a label is, ÷ everywhere", "content", "positions"),
    Part("looked-up rows added to the head's gradient, ÷ by autograd", "recommendation", "rows", set="amazon-beauty"),
    Part("bfloat16, ÷ float32", "collaborative", "half", half=True),
    Part("bfloat16: softmax over the words in chunks, ÷ logits at once", "content", "chunks", half=True),
)


NAMES = (*dict.fromkeys(part.name for part in PARTS), "batches", "kernels", "adamw")


def claims(short: bool, folder: Path | None = None, only: Sequence[str] = ()) -> Iterator[Claim]:
    """A claim for each optimisation, in documents (steps) a second.

    Args:
        short: Fewer documents and repeats.
        folder: Where backbone and corpora are kept; without it a temporary one.
        only: Names out of [`NAMES`]; all without it.
    """
    only = only or NAMES
    repeats, batches = amounts(short)
    with tempfile.TemporaryDirectory(prefix="parts-") as temporary:
        where = folder or Path(temporary)
        for (*kind, _), parts in itertools.groupby((part for part in PARTS if part.name in only), Part.kind):
            yield from parts_of(*kind, list(parts), where, short)
        name = set_at_hand("ml-100k")
        if "batches" in only:
            recipe, corpora = set_recipe(name, where, "pretrain.mixed_precision=auto"), make_corpora(name, where)
            with together(
                Worker(makes_batches, "collaborative", recipe, corpora, 10 * batches),
                Worker(trains, "collaborative", recipe, corpora, batches, ""),
            ) as (making, training):
                # What batches that are made while a step computes could save at most.
                found = alternate(
                    "making a batch, ÷ the step that it is for", name, making, training, unit="ms per document",
                    repeats=repeats, command=COMMAND,
                )  # fmt: skip
            yield found
        if "kernels" in only and short:
            print("kernels kept: not measured, memory that grows over many steps is no part of the short form")
        elif "kernels" in only and computes_in_bf16("cpu"):
            yield kernels_kept(name, where, make_corpora(name, where), KERNEL_STEPS)
    if "adamw" in only:
        with together(Worker(row_steps, True), Worker(row_steps, False)) as (mine, other):
            found = alternate(
                "row-wise AdamW, ÷ dense", f"{TOUCHED:,} of {ROWS:,} rows", mine, other, unit="steps/s",
                repeats=repeats, command=COMMAND,
            )  # fmt: skip
        yield found


def amounts(short: bool) -> tuple[int, int]:
    """Repeats, and steps of each."""
    return (3, 2) if short else (5, 6)


def parts_of(stage: str, data: str, half: bool, parts: list["Part"], folder: Path, short: bool) -> Iterator[Claim]:
    """Claims of parts that one worker of ours stands against, one after the other.

    Args:
        stage: Of all of them.
        data: The set.
        half: Whether they are of bfloat16.
        parts: Which.
        folder: Where backbone and corpora are kept.
        short: Fewer documents and repeats.
    """
    name, (repeats, batches) = set_at_hand(data), amounts(short)
    if half and not computes_in_bf16("cpu"):
        print("; ".join(part.claim for part in parts) + ": not measured, no instructions for bfloat16 here")
        return
    corpora = make_corpora(name, folder)
    recipe = set_recipe(name, folder, *(["pretrain.mixed_precision=bf16"] if half else []))
    measured = []
    for part in parts:
        if part.name == "compile" and (short or not shutil.which("g++")):
            print(f"{part.claim}: not measured, it is no part of the short form and needs g++")
        else:
            measured.append(part)
    if not measured:
        return
    names = ("", *(part.name for part in measured))
    with together(*(Worker(trains, stage, recipe, corpora, batches, without) for without in names)) as (mine, *others):
        for part, other in zip(measured, others, strict=True):
            yield alternate(part.claim, name, mine, other, unit="documents/s", repeats=repeats, command=COMMAND)


def kernels_kept(name: str, folder: Path, corpora: Path, batches: int) -> Claim:
    """Peak memory of the collaborative stage in bfloat16, with as many kernels kept as training does ÷ as oneDNN and torch do of their own."""
    recipe, peaks = set_recipe(name, folder, "pretrain.mixed_precision=bf16"), []
    for kept in (KERNELS_KEPT, dict.fromkeys(KERNELS_KEPT, KEPT_OTHERWISE)):
        with (
            environment({cache: str(count) for cache, count in kept.items()}),
            Worker(trains, "collaborative", recipe, corpora, batches, "") as worker,
        ):
            peaks.append(worker.peak_memory / MB)
    claim = f"bfloat16: few kernels kept, ÷ twice {KEPT_OTHERWISE}: memory of {batches} steps"
    return paired(claim, name, [peaks], unit="MB", at_most=1.0, command=COMMAND)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer documents and repeats")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--folder", type=Path, help="where backbone and corpora are kept (default: a temporary one)")
    parser.add_argument("--write", action="store_true", help="put the claims into benchmarks/results/speed.json")
    chosen = parser.parse_args()
    found = list(claims(chosen.short, chosen.folder, chosen.only))
    if chosen.write:
        write_claims(found)


if __name__ == "__main__":
    main()
