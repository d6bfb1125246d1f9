"""What training needs for memory: a formula, against what processes of their own measured; one, two of DDP, two of FSDP2.

python benchmarks/memory.py                                # four sizes
python benchmarks/memory.py --table --items 10000000       # README's table, for this size

The training loop itself runs (`training.stages.loop.train`, an epoch of pretraining), on users, items and words that are made up,
over a backbone so small that the ID tables are what counts. Libraries take 24 MB when they are first used: a training of a few rows
goes before the one that is measured. FSDP2 runs on the CPU as in `tests/slow/test_fully_shard.py`.
"""

import argparse
import contextlib
import gc
import logging
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from benchmarks.claims import MB, Claim, environment, paired, resident_memory, write_claims
from configuration.load import PROJECT
from configuration.recipe import Method, Recipe, Stage
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.data.batches import Layout
from training.data.corpora import Texts
from training.data.ragged import Ragged
from training.run import make_accelerator
from training.stages import loop
from training.stages.collaborative import collaborative_objective
from training.stages.content import content_objective
from training.stages.towers import Towers

FLOAT = 4  # bytes
ACTIVATIONS = 68  # bytes per token, layer and unit of width: 17 tensors are kept for the backward pass
WORDS, PROMPT, TOKENS, DOCUMENTS, STEPS = 512, 3, 6, 4, 2
FEW = 100  # rows
WITHIN = 0.15
# Users, items, width, layers of the backbone: frozen where there are two, which is next to nothing.
SIZES = [(100_000, 50_000, 64, 2), (50_000, 150_000, 64, 2), (60_000, 60_000, 128, 2), (10_000, 10_000, 256, 24)]
MILLION, ROWS_AT_MOST = 1_000_000, 1.3
# glibc keeps freed blocks under its threshold, which grows up to 32 MB: a peak would be what it kept.
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A size, and how it is trained.

    Attributes:
        users: U.
        items: I.
        width: d.
        processes: N.
        sharded: Whether the N processes share the weights (FSDP2), or each holds them all (DDP).
        content_tower: Whether there are two towers of tables or one.
        layers: Of the backbone.
        backbone_learns: Whether it does, or is frozen.
    """

    users: int
    items: int
    width: int
    processes: int = 1
    sharded: bool = False
    content_tower: bool = True
    layers: int = 2
    backbone_learns: bool = False

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each ID table."""
        towers = ("", "content_") if self.content_tower else ("",)
        return {
            f"{tower}{kind}_embeddings": rows
            for tower in towers
            for kind, rows in (("user", self.users), ("item", self.items))
        }

    @property
    def label(self) -> str:
        """The case in a few words."""
        how = "1 process" if self.processes == 1 else f"{'FSDP2' if self.sharded else 'DDP'}, 1 of {self.processes}"
        learns = f", {self.layers} layers that learn" if self.backbone_learns else ""
        return f"{self.users:,} users, {self.items:,} items, {self.width} wide{learns}; {how}"


@dataclass(frozen=True)
class Measured:
    """What a process found.

    Attributes:
        peak: Most resident memory above what it held before the model was made, in bytes.
        backbone: Weights of the backbone, in bytes.
        touched: Rows that were touched of each table whose gradients are sparse; the other tables' are dense.
        fused: Whether the optimiser goes through a dense table in one kernel, without temporaries of its size.
    """

    peak: int
    backbone: int = 0
    touched: dict[str, int] = field(default_factory=dict)
    fused: bool = False


def training_bytes(case: Case, of: Measured, labels: int = 0, tokens: int = 0) -> dict[str, float]:
    """The parts of what a process holds at its peak, in bytes.

    A table of R rows takes `4·d·R`; its two moments twice as much, or, where it is only looked up and its gradients are sparse, `8·d`
    per row that was touched and 4 per row to find it. Gradients are of the tower that learns; sparse ones are activations in size. Under
    DDP one more dense one is in the making (an embedding's backward writes a whole table before it is added), or AdamW's temporaries
    are, which are more unless it is fused. DDP keeps a copy of all dense gradients to send; FSDP2
    divides weights, gradients and moments by N, but gathers all tables for a step, and in doing so has them twice.

    Args:
        case: The size.
        of: The backbone's bytes, and which gradients are sparse.
        labels: Softmax rows of a step over all items, all processes together.
        tokens: Of a step, alike.
    """
    rows = case.rows
    tables = {name: FLOAT * case.width * count for name, count in rows.items()}
    dense = {name: size for name, size in tables.items() if name not in of.touched}
    share = case.processes if case.sharded else 1
    # One that learns has a gradient and two moments more, and under DDP a gradient to send.
    learned = 1 if not case.backbone_learns else 4 if case.sharded or case.processes == 1 else 5
    parts = {
        "weights": sum(tables.values()) / share,
        "moments": 2 * sum(dense.values()) / share
        + sum(2 * FLOAT * case.width * count + 4 * rows[name] for name, count in of.touched.items()),
        "backbone": of.backbone * learned / share,
        "activations": ACTIVATIONS * case.width * case.layers * tokens / case.processes,
    }
    if case.sharded:
        layer = of.backbone / case.layers
        # A layer is gathered while the one before it is there.
        return parts | {"gathered": 2 * sum(tables.values()) + 2 * 2 * layer}
    towers = [
        [size for name, size in dense.items() if name.startswith("content_") is content] for content in (False, True)
    ]
    largest = max(dense.values(), default=0)
    in_the_making = (largest if case.processes > 1 else 0) + 2 * FLOAT * case.items * labels / case.processes
    if not of.fused:
        in_the_making = max([in_the_making, *(sum(tower) + max(tower, default=0) for tower in towers)])
    return parts | {
        "gradients": max(map(sum, towers)),
        "in the making": in_the_making,
        "to send": sum(dense.values()) if case.processes > 1 else 0,
    }


class _PeakReached(Exception):
    """Ends training before it writes a checkpoint, which is host memory of another kind."""


def measure(case: Case) -> Measured:
    """Train an epoch in processes of their own; what the one with the most memory found."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    answers = context.SimpleQueue()
    with environment(RETURN_FREED_BLOCKS):
        workers = [context.Process(target=_train, args=(case, rank, port, answers)) for rank in range(case.processes)]
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            for other in workers:
                other.kill()
            raise RuntimeError(f"{case.label}: a process ended with exit code {worker.exitcode}")
    return max((answers.get() for _ in workers), key=lambda found: found.peak)


def _train(case: Case, rank: int, port: str, answers: "SimpleQueue[Measured]") -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if case.processes > 1:
        of_this = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes)}
        os.environ.update(of_this, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(epochs=1, batch_size=DOCUMENTS, warmup_epochs=0)
        recipe = Recipe(device="cpu", tracker="none")
        make = fully_sharded(make_accelerator) if case.sharded else make_accelerator
        accelerator = make(recipe, stage, Path(folder))
        accelerator.reduce(torch.zeros(1))

        def validate() -> dict[str, float]:
            raise _PeakReached

        for size in (replace(case, users=FEW, items=FEW, layers=2), case):
            accelerator.free_memory()
            gc.collect()
            loaded = resident_memory("VmRSS")
            towers = Towers(make_model(size), lambda_v=Method().lambda_v)
            backbone = sum(p.numel() * p.element_size() for p in towers.base.backbone.parameters())
            with contextlib.suppress(_PeakReached):
                loop.train(
                    towers,
                    objectives(size),
                    stage,
                    accelerator,
                    seed=0,
                    folder=Path(folder),
                    fingerprint="",
                    validate=validate,
                )
            peak = resident_memory("VmHWM") - loaded
        answers.put(Measured(peak, backbone, touched_rows(case, towers), is_fused(accelerator)))
        accelerator.end_training()


def make_model(case: Case) -> CLLM4RecForRecommendation:
    """The recommender around a backbone of two layers."""
    backbone = {
        "model_type": "gpt2",
        "vocab_size": WORDS,
        "n_embd": case.width,
        "n_head": 2,
        "n_layer": case.layers,
        "n_positions": 64,
    }
    backbone |= dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    config = CLLM4RecConfig(
        backbone_config=backbone,
        num_users=case.users,
        num_items=case.items,
        content_tower=case.content_tower,
        item_bias=False,
        freeze_backbone=not case.backbone_learns,
    )
    return CLLM4RecForRecommendation(config)


def objectives(case: Case) -> list[loop.Objective]:
    """Both language models' over random histories and texts, no user twice."""
    layout = Layout(WORDS, case.users, case.items, {"history": [1, 2], "separator": [3], "recommend": [4]})
    draw, count = np.random.default_rng(0), DOCUMENTS * STEPS
    users, offsets = draw.choice(case.users, count, replace=False), np.arange(count + 1) * TOKENS
    histories = Ragged(draw.integers(0, case.items, count * TOKENS), offsets)
    about = draw.choice(case.users, count, replace=False), draw.choice(case.items, count, replace=False)
    words = draw.integers(5, WORDS, (count, TOKENS))
    words[:, 0], words[:, 1] = WORDS + about[0], WORDS + case.users + about[1]
    texts = Texts(Ragged(words.ravel(), offsets), np.zeros(count, int), *about, np.full(count, 2))
    corpora: Any = SimpleNamespace(texts=lambda name: texts, histories=lambda name: (users, histories))
    method = Method(max_history=TOKENS)
    collaborative = collaborative_objective(corpora, method, layout, 0, regularise=case.content_tower)
    return [content_objective(corpora, method), collaborative] if case.content_tower else [collaborative]


def touched_rows(case: Case, towers: Towers) -> dict[str, int]:
    """Rows that an epoch touched of each table whose gradients are sparse."""
    count = DOCUMENTS * STEPS
    most = {"user": count, "item": count * TOKENS}
    modules = dict(towers.base.named_children())
    return {name: most[name.split("_")[-2]] for name in case.rows if getattr(modules[name], "sparse", False)}


def is_fused(accelerator: Accelerator) -> bool:
    """Whether the optimiser's dense part is fused."""
    return all(group.get("fused") for optimizer in accelerator._optimizers for group in optimizer.param_groups)


def fully_sharded(make: Callable[..., Accelerator]) -> Callable[..., Accelerator]:
    """`make_accelerator`, its result of the type FSDP with the fields of the launch file: what Accelerate does on GPUs alone."""

    def sharded(*args: Any, **kwargs: Any) -> Accelerator:
        words = ["--config_file", str(PROJECT / "configuration" / "accelerate" / "fsdp2.yaml"), "script.py"]
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        fields = prepare_multi_gpu_env(arguments).items()
        os.environ.update({name: value for name, value in fields if name.startswith("FSDP_")})
        accelerator = make(*args, **kwargs)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    return sharded


def claims(short: bool) -> Iterator[Claim]:
    """Measured ÷ formula for one process, for DDP and for FSDP2 (the short form takes the first size alone); ÷ a table of rows."""
    for users, items, width, layers in SIZES[:1] if short else SIZES:
        for processes, sharded in ((1, False), (2, False), (2, True)):
            case = Case(users, items, width, processes, sharded, layers=layers, backbone_learns=layers > 2)
            found = measure(case)
            expected = sum(training_bytes(case, found, DOCUMENTS * TOKENS, DOCUMENTS * (TOKENS + PROMPT)).values())
            yield paired(
                "training memory, measured ÷ formula",
                case.label,
                [[found.peak / MB, expected / MB]],
                unit="MB",
                at_least=1 - WITHIN,
                at_most=1 + WITHIN,
                command="python benchmarks/memory.py",
            )
    case = Case(MILLION, FEW, 64, content_tower=False)
    yield paired(
        "memory per million ID rows ÷ the rows' own",
        case.label,
        [[measure(case).peak / MB, FLOAT * case.width * MILLION / MB]],
        unit="MB",
        at_most=ROWS_AT_MOST,
        command="python benchmarks/memory.py",
    )


@dataclass(frozen=True)
class Launch:
    """A row of README's table.

    Attributes:
        files: Launch files.
        use: When to take them.
        formula: What the ID tables take on each device, in the bytes t, i and s of the table's legend, and N devices.
        processes: N of the example; 0: as many as the table is asked for.
        sharded: Whether by FSDP2.
        rows_alone: Whether tables that are only looked up have sparse gradients.
    """

    files: str
    use: str
    formula: str
    processes: int = 1
    sharded: bool = False
    rows_alone: bool = False

    def example(self, users: int, items: int, width: int, devices: int) -> tuple[Case, Measured]:
        """A size launched so, every row touched."""
        case = Case(users, items, width, self.processes or devices, self.sharded)
        looked_up = {name: rows for name, rows in case.rows.items() if self.rows_alone and name != "item_embeddings"}
        return case, Measured(0, touched=looked_up, fused=True)


LAUNCHES = (
    Launch("`cpu.yaml`, `one_gpu.yaml`", "one process, on the CPU or on one GPU", "2·t + 3·i + 2·s", rows_alone=True),
    Launch(
        "`multi_gpu.yaml`",
        "several GPUs of one machine; try it out with `two_cpu_processes.yaml`",
        "2·t + 5·i + 2·s",
        0,
        rows_alone=True,
    ),
    Launch("`multi_node.yaml`", "several machines with several GPUs each", "2·t + 5·i + 2·s", 0, rows_alone=True),
    Launch("`fsdp2.yaml`", "a backbone whose training one GPU cannot hold", "(4 + 6/N)·t", 0, sharded=True),
)


def table(users: int = 1_000_000, items: int = 1_000_000, width: int = 256, devices: int = 8) -> str:
    """README's table: which launch file for what, and the memory per device of ID tables, as a formula and for this size."""
    lines = [
        f"| `configuration/accelerate/` | for | ID tables, per device | {users:,} users, {items:,} items, {width} wide, N = {devices} |",
        "| --- | --- | --- | --- |",
    ]
    for row in LAUNCHES:
        size = sum(training_bytes(*row.example(users, items, width, devices)).values())
        lines.append(f"| {row.files} | {row.use} | {row.formula} | {size / 1e9:.1f} GB |")
    legend = (
        "t = 4·d·(U + I) bytes, the tables of one tower (there are two), i = 4·d·I. Without FSDP2 the tables but the "
        "one of the item head are only looked up: their gradients are of rows alone, their moments of the rows touched so far, s bytes "
        "of weights (2·t - i in the end, as counted here). A backbone of P weights adds 4·P where it is "
        "frozen; where it learns, 16·P, under DDP 20·P; under FSDP2 a share of N and four layers. Float32; activations come on top."
    )
    return "\n".join([*lines, "", legend])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one size instead of four")
    parser.add_argument("--write", action="store_true", help="write the claims to benchmarks/results/speed.json")
    parser.add_argument("--table", action="store_true", help="print README's table instead, for the size that follows")
    for name, default in (("users", 1_000_000), ("items", 1_000_000), ("width", 256), ("devices", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.users, arguments.items, arguments.width, arguments.devices))
        return
    made = list(claims(arguments.short))
    if arguments.write:
        write_claims(made)


if __name__ == "__main__":
    main()
