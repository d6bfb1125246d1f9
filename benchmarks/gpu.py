"""Training on a GPU: tokens a second, share of its rate of matrix products (MFU), memory, ours ÷ the published recipe.

python benchmarks/gpu.py                        a backbone of GPT-2's size (12 layers, 768 wide), full batches, ml-100k; a step at 10 M items
python benchmarks/gpu.py --attention flash_attention_2       packed batches by its varlen kernel, where flash-attn is installed
python benchmarks/gpu.py --device cpu --set sample --layers 1 --width 32 --batch 8 --items 20000     the same code without a GPU

The backbone is frozen, as published. Ours computes in bfloat16 where the device has it, the published recipe in float32, 20 documents
a step. Floating-point operations are those that torch counts in a step of ours, forward and backward; the card's rate is that of one large product in the
same precision. Times are of a single process, after steps that warm it up.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.catalogue import FEW, MOST_OF_A_SMALL_CATALOGUE, trains
from benchmarks.claims import MB, Claim, paired, resident_memory
from benchmarks.published_recipe import published
from benchmarks.sets import PATHS, SAMPLE, make_backbone, make_corpora, set_at_hand, set_recipe
from benchmarks.steps import Steps
from training.data.corpora import open_corpora

STAGES = ("content", "collaborative", "recommendation")
WARM_UP, SIDE_OF_A_PRODUCT, PRODUCTS = 3, {"cuda": 8192, "cpu": 512}, 20


class Speed(NamedTuple):
    """What a stage reached.

    Attributes:
        tokens: Real ones, a second.
        documents: A second, of each repeat.
        utilisation: Floating-point operations of the steps ÷ what the device would have done in the time.
        memory: Peak in bytes; on a GPU what torch allocated there, else that of the process.
    """

    tokens: float
    documents: list[float]
    utilisation: float
    memory: int


def timed(device: str, work: Callable[[], float]) -> tuple[float, float]:
    """What a call gives and the seconds that it takes, the device's work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    done = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return done, time.perf_counter() - started


def peak_memory(device: str) -> int:
    """Peak so far, in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident_memory("VmHWM")


def rate_of_products(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products."""
    side = SIDE_OF_A_PRODUCT["cuda" if device.startswith("cuda") else "cpu"]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> float:
        for _ in range(PRODUCTS):
            torch.mm(left, right)
        return 2.0 * PRODUCTS * side**3

    multiply()
    done, seconds = timed(device, multiply)
    return done / seconds


def ours(steps: Steps, device: str, batches: int, repeats: int, rate: float) -> Speed:
    """Steps of a stage, timed; the same ones are then taken once more to count their operations."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(WARM_UP):
        steps(number)
    spent, documents = [], []
    for repeat in range(repeats):
        chosen = range(repeat * batches, (repeat + 1) * batches)
        done, seconds = timed(device, lambda: float(sum(map(steps, chosen))))  # noqa: B023 (called at once)
        spent.append(seconds)
        documents.append(done / seconds)
    memory, everything = peak_memory(device), range(repeats * batches)
    tokens = sum(steps.batch(number)["input_ids"].numel() for number in everything)
    with FlopCounterMode(display=False) as counter:
        for number in everything:
            steps(number)
    return Speed(tokens / sum(spent), documents, counter.get_total_flops() / sum(spent) / rate, memory)


def stage_claim(
    stage: str, name: str, folder: Path, backbone: Path, chosen: argparse.Namespace, batches: int, repeats: int
) -> Claim:
    """Documents a second of a stage, ours ÷ published; what else is measured of ours is printed."""
    words = [
        f"{part}.{field}"
        for part in ("pretrain", "finetune")
        for field in (f"batch_size={chosen.batch}", "mixed_precision=auto")
    ]
    words += [
        f"backbone.name={backbone}",
        f"backbone.attn_implementation={chosen.attention}",
        f"device={chosen.device}",
    ]
    corpora = make_corpora(name, folder)
    steps = Steps(stage, set_recipe(name, folder, *words), open_corpora(corpora))
    half = steps.accelerator.mixed_precision == "bf16"
    rate = rate_of_products(chosen.device, torch.bfloat16 if half else torch.float32)
    mine = ours(steps, chosen.device, batches, repeats, rate)
    print(
        f"{stage}: {mine.tokens:,.0f} tokens/s, MFU {mine.utilisation:.1%} of {rate / 1e12:.2f} TFLOP/s in "
        f"{'bfloat16' if half else 'float32'}, peak {mine.memory / MB:,.0f} MB",
        flush=True,
    )
    del steps
    theirs = published(stage, corpora, backbone, batches, chosen.device)
    theirs()
    runs = []
    for documents in mine.documents:
        done, seconds = timed(chosen.device, theirs)
        runs.append([documents, done / seconds])
    return paired(
        f"{stage} on {chosen.device}, ours ÷ published", name, runs, unit="documents/s", command="python benchmarks/gpu.py"
    )  # fmt: skip


def catalogue_claim(chosen: argparse.Namespace, batches: int, repeats: int) -> Claim:
    """A step of a sampled softmax over a large catalogue ÷ over a small one."""
    sides = [trains("recommendation", items, batches, device=chosen.device) for items in (chosen.items, FEW)]
    for side in sides:
        side()
    runs = []
    for _ in range(repeats):
        pair = [timed(chosen.device, side) for side in sides]
        runs.append([1000 * seconds / done for done, seconds in pair])
    return paired(
        f"recommendation on {chosen.device}, step of a sampled softmax ÷ with {FEW:,} items", f"{chosen.items:,} items", runs,
        unit="ms per step", at_most=MOST_OF_A_SMALL_CATALOGUE, command="python benchmarks/gpu.py",
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, cpu (default: %(default)s)")
    add("--set", default="ml-100k", choices=[*PATHS, SAMPLE], help="(default: %(default)s)")
    add("--stages", nargs="+", choices=STAGES, help="default: those that the set has texts for")
    add("--layers", type=int, default=12, help="of the backbone (default: %(default)s)")
    add("--width", type=int, default=768, help="of the backbone (default: %(default)s)")
    add("--batch", type=int, default=256, help="documents in a step of ours (default: %(default)s)")
    add("--attention", default="sdpa", help="sdpa, flash_attention_2, eager (default: %(default)s)")
    add(
        "--items",
        type=int,
        default=10_000_000,
        help="of the large catalogue, a multiple of 10,000 (default: %(default)s)",
    )
    add("--batches", type=int, default=10, help="steps of a repeat (default: %(default)s)")
    add("--repeats", type=int, default=5, help="(default: %(default)s)")
    chosen = parser.parse_args()
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here; --device cpu tries the same code (see --help)")
    name = set_at_hand(chosen.set)
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = Path(temporary)
        heads = math.gcd(chosen.width, max(chosen.width // 64, 1))
        backbone = make_backbone(folder, layers=chosen.layers, width=chosen.width, heads=heads)
        texts = len(open_corpora(make_corpora(name, folder)).texts("content"))
        for stage in chosen.stages or [stage for stage in STAGES if stage != "content" or texts]:
            stage_claim(stage, name, folder, backbone, chosen, chosen.batches, chosen.repeats)
    catalogue_claim(chosen, chosen.batches, chosen.repeats)


if __name__ == "__main__":
    main()
