"""Exported vectors in an index of approximate nearest neighbours (faiss): recall against the exact top 100, speed, memory.

python benchmarks/vectors.py                      # trains the sample, then measures with a million items
python benchmarks/vectors.py runs/sample --short  # a run that is there; 100,000 items

Nobody's million items are at hand, so they are drawn from the run's own (a smoothed bootstrap): a random item's vector plus
noise of the run's covariance, so that mean and covariance stay the run's; `--noise` is the noise's share of the variance.
At 0 all items are copies, at 1 they are one cloud without clusters, the hardest case for an index. The queries are the
run's users. Every search is for one person at a time, on one thread.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.claims import MB, Claim, Worker, alternate, paired, resident_memory, together
from benchmarks.trained_sample import train_sample
from training.export import export

TOP, QUERIES, PROBES, NOISE = 100, 200, 64, 0.5
SHORT, LONG = 100_000, 1_000_000
# Vectors that each cell's centre is learned from; more cost time and bring nothing.
TRAINING_ROWS_PER_CELL = 64


@dataclass(frozen=True)
class Built:
    """An index on disk, and what it took to build.

    Attributes:
        seconds: To train and fill it.
        peak_memory: Of the process that built it, the vectors and the libraries included, in bytes.
        top: Best items that were looked for.
        recall: Mean share of the exact top among the index's.
        size: Bytes of the index.
        vectors_size: Bytes of the items' vectors.
    """

    seconds: float
    peak_memory: int
    top: int
    recall: float
    size: int
    vectors_size: int


def resampled(vectors: np.ndarray, count: int, noise: float, seed: int = 0) -> np.ndarray:
    """Draw vectors from the distribution of some, smoothed.

    Args:
        vectors: `(rows, width)`.
        count: How many to draw.
        noise: Share of the variance that is noise, from 0 to 1.
        seed: Of the draw.

    Returns:
        float32 `(count, width)`, of the same mean and covariance.
    """
    random = np.random.default_rng(seed)
    mean = vectors.mean(0)
    centred = vectors - mean
    _, scales, axes = np.linalg.svd(centred, full_matrices=False)
    root = (scales[:, None] * axes / math.sqrt(len(vectors))).astype(np.float32)  # root.T @ root is the covariance
    drawn = np.empty((count, vectors.shape[1]), np.float32)
    for start in range(0, count, 1 << 16):
        rows = drawn[start : start + (1 << 16)]
        rows[:] = mean + math.sqrt(1 - noise) * centred[random.integers(len(vectors), size=len(rows))]
        rows += math.sqrt(noise) * (random.standard_normal((len(rows), len(root)), np.float32) @ root)
    return drawn


def of_one_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors with one more number, so that all are of one length: the nearest to a query has the largest inner product.

    An index by distance then finds inner products, and its cells are filled evenly, which those of an index by inner product
    are not where vectors differ in length (popular items are long).
    """
    squares = (vectors**2).sum(1)
    return np.c_[vectors, np.sqrt(squares.max() - squares)]


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of each row of `exact` that is in the same row of `found`; both int `(queries, k)`, without repeats."""
    return float(np.mean([np.isin(right, left).mean() for left, right in zip(found, exact, strict=True)]))


def build(items: np.ndarray, queries: np.ndarray, folder: Path, probes: int) -> Built:
    """Build the index and an exact one in `folder`, in this process, on one thread.

    Args:
        items: float32 `(items, width)`.
        queries: float32 `(users, width)`.
        folder: Where `approximate.index`, `exact.index` and their queries are written.
        probes: Cells that a search looks into, at most half of all.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    # Some 4 √n cells are faiss' advice; it wants 39 vectors or more to learn the centre of each.
    cells = max(1, min(int(4 * math.sqrt(len(items))), len(items) // 39))
    started = time.perf_counter()
    space = of_one_length(items)
    index = faiss.index_factory(space.shape[1], f"IVF{cells},Flat")
    index.cp.max_points_per_centroid = TRAINING_ROWS_PER_CELL
    index.train(space)
    index.add(space)
    index.nprobe = min(probes, max(1, cells // 2))
    seconds, peak = time.perf_counter() - started, resident_memory()
    faiss.write_index(index, str(folder / "approximate.index"))
    exact = faiss.IndexFlatIP(items.shape[1])
    exact.add(items)
    faiss.write_index(exact, str(folder / "exact.index"))
    padded = np.pad(queries, ((0, 0), (0, 1)))
    np.save(folder / "approximate.npy", padded)
    np.save(folder / "exact.npy", queries)
    top = min(TOP, max(1, len(items) // 20))  # of a small catalogue the best 100 would be a good part
    found, best = index.search(padded, top)[1], exact.search(queries, top)[1]
    size = (folder / "approximate.index").stat().st_size
    return Built(seconds, peak, top, recall(found, best), size, items.nbytes)


def build_from(vectors: Path, folder: Path, count: int | None, noise: float, probes: int) -> Built:
    """[`build`] with a run's exported vectors, or with `count` drawn from them."""
    items, users = (load_file(vectors / f"{name}.safetensors")["vectors"] for name in ("items", "users"))
    chosen = np.random.default_rng(1).permutation(len(users))[:QUERIES]
    return build(items if count is None else resampled(items, count, noise), users[chosen], folder, probes)


def searches(folder: Path, name: str, queries: int) -> Callable[[], float]:
    """What a worker repeats: so many searches for the top 100 in an index, one person at a time."""
    import faiss

    faiss.omp_set_num_threads(1)
    index, rows = faiss.read_index(str(folder / f"{name}.index")), np.load(folder / f"{name}.npy")[:queries]

    def repeat() -> float:
        for row in rows:
            index.search(row[None], TOP)
        return len(rows)

    return repeat


def measure(vectors: Path, name: str, count: int | None, noise: float, probes: int) -> Iterator[Claim]:
    """Recall of an index on a run's items; of one on `count` drawn from them also speed, time and memory."""
    items = f"{count:,} items" if count else name
    command = "python benchmarks/vectors.py"
    with tempfile.TemporaryDirectory(prefix="vectors-") as temporary:
        folder = Path(temporary)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            built = process.submit(build_from, vectors, folder, count, noise, probes).result()
        yield paired(
            "recall of the index ÷ exact search",
            items,
            [[built.recall, 1.0]],
            unit=f"recall@{built.top}",
            command=command,
        )
        if count is None:
            return
        of_both = (Worker(searches, folder, *one) for one in (("approximate", QUERIES), ("exact", QUERIES // 10)))
        with together(*of_both) as (ours, reference):
            speed = alternate(
                "search by index ÷ exact search", items, ours, reference, unit="queries/s", repeats=5, command=command
            )
        yield speed
        yield paired(
            "building the index ÷ one exact search", items, [[built.seconds, 1 / speed.reference]], unit="s",
            memory=[built.peak_memory, (speed.peak_memory_bytes or [0, 0])[1]], command=command,
        )  # fmt: skip
        yield paired(
            "memory of the index ÷ the items' vectors", items, [[built.size / MB, built.vectors_size / MB]], unit="MB",
            command=command,
        )  # fmt: skip


def claims(short: bool, run: Path | None = None, noise: float = NOISE, probes: int = PROBES) -> Iterator[Claim]:
    """The claims about exported vectors.

    Args:
        short: With 100,000 items, not a million.
        run: A trained run's folder; without it the sample is trained first.
        noise: Share of the variance of the drawn items that is noise.
        probes: Cells that a search looks into.
    """
    with tempfile.TemporaryDirectory(prefix="vectors-run-") as temporary:
        run = train_sample(Path(temporary)) if run is None else run
        vectors = export(run, Path(temporary) / "vectors", progress=False)
        for count in (None, SHORT if short else LONG):
            yield from measure(vectors, run.name, count, noise, probes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a trained run's folder (default: the sample is trained)")
    parser.add_argument("--short", action="store_true", help=f"with {SHORT:,} items, not {LONG:,}")
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="share of the variance of drawn items (default: %(default)s)"
    )
    parser.add_argument(
        "--probes", type=int, default=PROBES, help="cells that a search looks into (default: %(default)s)"
    )
    arguments = parser.parse_args()
    for _ in claims(arguments.short, arguments.run, arguments.noise, arguments.probes):
        pass


if __name__ == "__main__":
    main()
