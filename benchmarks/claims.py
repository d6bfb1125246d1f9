"""How a claim is measured: workers of their own in alternating repeats, the median of the paired ratios, peak memory.

Seconds differ from machine to machine and from minute to minute; a ratio of repeats that take turns does so far less.
"""

import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from training.files import write_text

RESULTS = Path(__file__).resolve().parent / "results"
MB = 1e6


@dataclass(frozen=True)
class Claim:
    """One line of `results/speed.json`.

    Attributes:
        claim: What is compared, in a few words.
        set: Data set, or size of what was made up.
        ours: Our median, in `unit`.
        reference: The median of what it is compared with, in `unit`.
        unit: Of both.
        ratio: Median of ours ÷ reference, repeat by repeat.
        at_least: What the ratio should reach; None: there is no such bound.
        at_most: What the ratio should not exceed; None: there is no such bound.
        runs: Ours and reference of each repeat.
        peak_memory_bytes: Of our worker and of the reference's, where they were processes of their own.
        command: What measures this claim alone, in its long form.
    """

    claim: str
    set: str
    ours: float
    reference: float
    unit: str
    ratio: float
    at_least: float | None = None
    at_most: float | None = None
    runs: list[list[float]] = field(default_factory=list)
    peak_memory_bytes: list[int] | None = None
    command: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the ratio keeps its bounds; a claim without one is a report."""
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )

    def line(self) -> str:
        """The claim as a benchmark prints it."""
        ratios = [ours / reference for ours, reference in self.runs if reference] or [self.ratio]
        bound = "" if self.at_least is None else f"  asked ≥ {self.at_least:g}"
        bound += "" if self.at_most is None else f"  asked ≤ {self.at_most:g}"
        memory = ""
        if self.peak_memory_bytes is not None:
            memory = "  peak " + " / ".join(f"{peak / MB:.0f}" for peak in self.peak_memory_bytes) + " MB"
        return (
            f"{self.claim:<44} {self.set:<16} {self.ours:>11.4g} / {self.reference:<11.4g} {self.unit:<12} ratio "
            f"{self.ratio:.3g} ({min(ratios):.3g} to {max(ratios):.3g}, {len(ratios)} repeats){bound}"
            f"{'' if self.is_met else '  MISSED'}{memory}"
        )


class Worker(AbstractContextManager["Worker"]):
    """A process that repeats one thing on demand; it gets ready by itself, so that several do so at once.

    Args:
        setup: A module-level function; called in the process, it gives a function that does one repeat and returns the
            amount of work that it did (documents, users, tokens).
        args: Of `setup`.
        threads: Threads of the process.
    """

    def __init__(self, setup: Callable[..., Callable[[], float]], *args: Any, threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        with environment(threads_of(threads)):
            self.process = context.Process(target=_work, args=(theirs, setup, args), daemon=True)
            self.process.start()
        theirs.close()
        self.is_ready = False

    def ready(self) -> None:
        """Wait until the process has set up and done a first repeat, with which caches fill and memory is allocated.

        Raises:
            RuntimeError: if it failed.
        """
        if not self.is_ready:
            self._answer()
            self.is_ready = True

    def repeat(self) -> tuple[float, float]:
        """Do one repeat; the amount of work and the seconds it took."""
        self.ready()
        self.connection.send("repeat")
        work, seconds = self._answer()
        return work, seconds

    @property
    def peak_memory(self) -> int:
        """Most resident memory of the process so far, in bytes, the libraries included."""
        self.ready()
        self.connection.send("memory")
        return int(self._answer())

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join(10)
        self.process.kill()

    def _answer(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"a worker of the benchmark ended with exit code {self.process.exitcode}") from None
        if kind == "failed":
            raise RuntimeError(f"a worker of the benchmark failed:\n{value}")
        return value


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that processes started in the block find; afterwards they are what they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def threads_of(count: int) -> dict[str, str]:
    """Variables by which numerical libraries take so many threads; they read them when they are imported."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(names, str(count)) | {"OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def together(*workers: Worker) -> Iterator[tuple[Worker, ...]]:
    """Workers that are all ready, having set up at the same time; they end with the block."""
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker)
        for worker in workers:
            worker.ready()
        yield workers


def _work(connection: Connection, setup: Callable[..., Callable[[], float]], args: tuple[Any, ...]) -> None:
    try:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        repeat = setup(*args)
        repeat()
        connection.send(("ready", None))
        while True:
            wanted = connection.recv()
            if wanted == "memory":
                connection.send(("memory", resident_memory("VmHWM")))
            else:
                started = time.perf_counter()
                work = repeat()
                connection.send(("done", (work, time.perf_counter() - started)))
    except EOFError:
        return
    except BaseException:
        connection.send(("failed", traceback.format_exc()))


def resident_memory(name: str = "VmHWM") -> int:
    """Resident memory of this process in bytes, now (`VmRSS`) or at its peak (`VmHWM`); Linux."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


def alternate(
    claim: str,
    of_set: str,
    ours: Worker,
    reference: Worker,
    *,
    unit: str,
    repeats: int,
    at_least: float | None = None,
    at_most: float | None = None,
    command: str = "",
) -> Claim:
    """Let two workers take turns.

    Args:
        claim: What is compared.
        of_set: Data set.
        ours: Our worker.
        reference: What it is compared with.
        unit: `documents/s` and the like: work by time. `s`: seconds of a repeat, `ms per step` and the like: time by work.
        repeats: Of each.
        at_least: What the ratio should reach.
        at_most: What the ratio should not exceed.
        command: What measures this claim alone.
    """
    for worker in (ours, reference):
        worker.ready()
    runs = []
    for _ in range(repeats):
        pair = [worker.repeat() for worker in (ours, reference)]
        if unit.endswith("/s"):
            runs.append([work / seconds for work, seconds in pair])
        elif unit.startswith("ms per"):
            runs.append([1000 * seconds / work for work, seconds in pair])
        else:
            runs.append([seconds for _, seconds in pair])
    memory = [ours.peak_memory, reference.peak_memory]
    return paired(
        claim, of_set, runs, unit=unit, at_least=at_least, at_most=at_most, memory=memory, command=command
    )  # fmt: skip


def paired(
    claim: str,
    of_set: str,
    runs: list[list[float]],
    *,
    unit: str,
    at_least: float | None = None,
    at_most: float | None = None,
    memory: list[int] | None = None,
    command: str = "",
) -> Claim:
    """A claim from pairs of ours and reference, printed."""
    made = Claim(
        claim,
        of_set,
        statistics.median(ours for ours, _ in runs),
        statistics.median(reference for _, reference in runs),
        unit,
        statistics.median(ours / reference for ours, reference in runs),
        at_least,
        at_most,
        runs,
        memory,
        command,
    )
    print(made.line(), flush=True)
    return made


def write_claims(claims: list[Claim], path: Path = RESULTS / "speed.json") -> None:
    """Write the claims; those that the file holds of other claims or sets stay."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    fresh = {(claim.claim, claim.set) for claim in claims}
    rows = [row for row in known if (row["claim"], row["set"]) not in fresh]
    rows += [{key: value for key, value in asdict(claim).items() if value is not None} for claim in claims]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
