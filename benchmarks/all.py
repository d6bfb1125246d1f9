"""Every claim about speed and scale in its short form, into results/speed.json, and a picture of each group of claims.

python benchmarks/all.py                 all of them, also as `make bench`
python benchmarks/all.py --only speed    one group
python benchmarks/all.py --pictures      the pictures alone, of what speed.json holds
"""

import argparse
import json
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import catalogue, memory, parts, prediction, serving, speed, vectors
from benchmarks.claims import RESULTS, Claim, environment, threads_of, write_claims
from benchmarks.trained_sample import train_sample

LINE_OF_A_NAME = 68


def groups(run: Callable[[], Path], folder: Path, short: bool) -> dict[str, Callable[[], Iterator[Claim]]]:
    """The claims of each group, to be measured when asked for.

    Args:
        run: Trains the sample at the first call.
        folder: Where backbone and corpora are kept.
        short: Fewer repeats and smaller catalogues.
    """
    return {
        "speed": lambda: speed.claims(short, folder),
        "parts": lambda: parts.claims(short, folder),
        "catalogue": lambda: catalogue.claims(short),
        "memory": lambda: memory.claims(short),
        "prediction": lambda: prediction.claims(short),
        "serving": lambda: serving.claims(short, run()),
        "vectors": lambda: vectors.claims(short, run()),
    }


def group_of(row: dict[str, Any]) -> str:
    """The group of a line of speed.json: the benchmark that its command names."""
    return Path(row["command"].split()[1]).stem


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios of claims as points with their spread, and what was asked, on a logarithmic axis.

    Args:
        rows: Lines of speed.json.
        path: The PNG file.
    """
    figure = Figure(figsize=(9, 0.6 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        ratios = [ours / reference for ours, reference in row["runs"] if reference] or [row["ratio"]]
        asked = [(row[name], mark) for name, mark in (("at_least", ">"), ("at_most", "<")) if name in row]
        met = all(row["ratio"] >= bound if mark == ">" else row["ratio"] <= bound for bound, mark in asked)
        axis.plot([min(ratios), max(ratios)], [place, place], color="#8a8a8a", linewidth=2)
        axis.plot(row["ratio"], place, "o", color="#2b6cb0" if met else "#c05621")
        for bound, mark in asked:
            axis.plot(bound, place, marker=mark, color="black", markersize=6, fillstyle="none")
    names = [textwrap.fill(f"{row['claim']}, {row['set']}", LINE_OF_A_NAME) for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.set_xscale("log")
    axis.axvline(1, color="#d0d0d0", linewidth=0.8, zorder=0)
    axis.set_xlabel("ratio (line: all repeats; triangle: asked; orange: missed)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    """README's table of claims: the ratio with its spread, and what was asked; seconds differ from machine to machine."""
    lines = [
        "| claim | set | ratio (of all repeats) | asked |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        ratios = [ours / reference for ours, reference in row["runs"] if reference] or [row["ratio"]]
        asked = ", ".join(
            f"{sign} {row[name]:.3g}" for name, sign in (("at_least", "≥"), ("at_most", "≤")) if name in row
        )
        spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if len(ratios) > 1 else ""
        lines.append("| " + " | ".join([row["claim"], row["set"], f"{row['ratio']:.3g}{spread}", asked]) + " |")
    return "\n".join(lines)


def draw_all(folder: Path = RESULTS) -> None:
    """A picture `speed-GROUP.png` of each group that speed.json has claims of."""
    rows = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_group.setdefault(group_of(row), []).append(row)
    for name, claims in by_group.items():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            draw(claims, Path(temporary) / "picture.png")
            (Path(temporary) / "picture.png").replace(folder / f"speed-{name}.png")


def main() -> None:
    """Measure all and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(groups(Path, Path(), True))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="groups of claims (default: all)")
    parser.add_argument("--long", action="store_true", help="the long forms")
    parser.add_argument(
        "--table", action="store_true", help="print speed.json's claims as README has them, and no more"
    )
    parser.add_argument("--pictures", action="store_true", help="draw speed.json's claims and measure nothing")
    parser.add_argument("--folder", type=Path, help="where backbone and corpora are kept (default: a temporary one)")
    chosen = parser.parse_args()
    if chosen.table:
        rows = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
        print("\n\n".join(table([row for row in rows if group_of(row) == name]) for name in chosen.only))
        return
    if not chosen.pictures:
        started, trained = time.perf_counter(), []
        with tempfile.TemporaryDirectory(prefix="bench-") as temporary, environment(threads_of(1)):

            def run() -> Path:
                if not trained:
                    trained.append(train_sample(Path(temporary)))
                return trained[0]

            for name, claims in groups(run, chosen.folder or Path(temporary), not chosen.long).items():
                if name in chosen.only:
                    # Written one by one, so that a run that is broken off has not been for nothing.
                    for claim in claims():
                        write_claims([claim])
        print(f"{time.perf_counter() - started:.0f} s in all; benchmarks/results/speed.json")
    draw_all()


if __name__ == "__main__":
    main()
