"""Training and prediction against the published recipe and against the limit of the backbone.

python benchmarks/speed.py                                   every stage on ml-100k, amazon-beauty and digital-music
python benchmarks/speed.py --set ml-100k --stages predict    one of them
python benchmarks/speed.py --until-best --set ml-100k        time until the published recipe's best validation NDCG@100
python benchmarks/speed.py --same-epochs --set ml-100k       validation NDCG@100 and time of the published method after the same epochs

One thread, the same corpora, the same frozen GPT-2 (4 layers, 256 wide), both sides the same documents, 20 a step. Ours computes in
bfloat16 where the processor has instructions for it, as the default recipe does, and so does the limit; the published recipe in float32. For prediction,
ours ranks batches of users of all lengths of history, the published recipe as many users as the repeat has time for. The limit is what `benchmarks/steps.py` says: the bare backbone on the same tokens and one softmax head.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.claims import MB, Claim, Worker, alternate, paired, together, write_claims
from benchmarks.published_recipe import BATCH, STAGES, published, strings_and_tokens, train_published
from benchmarks.sets import SAMPLE, make_backbone, make_corpora, parse_arguments, set_at_hand, set_recipe
from benchmarks.steps import Steps, limit, ours, published_order
from training.command_line import leave_libraries_to_themselves
from training.data.corpora import open_corpora
from training.finetune import finetune
from training.pretrain import pretrain

COMMAND = "python benchmarks/speed.py --set {} --stages {}"
# The published schedule: epochs of each language model and of the recommendation head.
SCHEDULE = {"content": 10, "collaborative": 10, "recommendation": 50}
MOST_OVER_LIMIT, MOST_MEMORY, MOST_TIME = 1.15, 1 / 3, 0.1


class Asked(NamedTuple):
    """A set, a stage of it, and how many times as fast as published it should be."""

    set: str
    stage: str
    at_least: float


ASKED = (
    Asked("ml-100k", "content", 3),
    Asked("ml-100k", "collaborative", 5),
    Asked("ml-100k", "recommendation", 4),
    Asked("ml-100k", "predict", 6),
    Asked("digital-music", "content", 2),
    Asked("amazon-beauty", "collaborative", 4),
    Asked("amazon-beauty", "recommendation", 3),
    Asked("amazon-beauty", "predict", 5),
)
SETS = tuple(dict.fromkeys(asked.set for asked in ASKED))


def claims(
    short: bool, folder: Path | None = None, sets: tuple[str, ...] = (), stages: tuple[str, ...] = STAGES
) -> Iterator[Claim]:
    """The claims about speed and memory of each stage.

    Args:
        short: Fewer documents and repeats, of the first set alone.
        folder: Where backbone and corpora are kept; without it a temporary one.
        sets: Those that are measured; all without it.
        stages: Those that are measured.
    """
    with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
        where = Path(temporary) if folder is None else folder
        done = set()
        with Worker(idle) as libraries:
            without = libraries.peak_memory
        asked_of = [*ASKED, *(Asked(SAMPLE, asked.stage, asked.at_least) for asked in ASKED[: len(STAGES)])]
        wanted = [asked for asked in asked_of if asked.stage in stages and asked.set in (sets or SETS)]
        if short:
            wanted = [asked for asked in wanted if asked.set == wanted[0].set]
        for asked in wanted:
            name = set_at_hand(asked.set)
            if (name, asked.stage) not in done:
                done.add((name, asked.stage))
                yield from stage_claims(name, asked.stage, asked.at_least, where, short, without)
        if "corpora" in stages or set(stages) == set(STAGES):
            for name in dict.fromkeys(set_at_hand(name) for name in (sets or SETS)[: 1 if short else None]):
                yield from corpora_claims(name, where, 1 if short else 3)


def stage_claims(name: str, stage: str, at_least: float, folder: Path, short: bool, without: int) -> Iterator[Claim]:
    """Ours ÷ published in documents (users) a second and in memory, and our step ÷ the limit.

    Args:
        name: The set.
        stage: Of it.
        at_least: How many times as fast as published it should be.
        folder: Where backbone and corpora are kept.
        short: Fewer documents and repeats.
        without: Bytes that the libraries alone take.
    """
    backbone, corpora = make_backbone(folder), make_corpora(name, folder)
    precision = ("pretrain.mixed_precision=auto", "finetune.mixed_precision=auto")
    recipe = set_recipe(name, folder, f"pretrain.batch_size={BATCH}", f"finetune.batch_size={BATCH}", *precision)
    batches, repeats = (2, 3) if short else (12, 5)
    if short and stage == "predict":
        batches, repeats = 1, 2  # the published recipe takes ten seconds and more for the least number of users
    command = COMMAND.format(name, stage)
    unit = "users/s" if stage == "predict" else "documents/s"
    plan = None if stage == "predict" else published_order(stage, corpora, backbone)
    against = [Worker(published, stage, corpora, backbone, batches)]
    if stage != "predict":
        against.append(Worker(limit, stage, recipe, corpora, batches, plan))
    with together(Worker(ours, stage, recipe, corpora, batches, plan), *against) as (mine, theirs, *bare):
        speed = alternate(
            f"{stage}, ours ÷ published", name, mine, theirs,
            unit=unit, repeats=repeats, at_least=at_least, command=command,
        )  # fmt: skip
        yield speed
        peaks = speed.peak_memory_bytes or [0, 0]
        yield paired(
            f"{stage}, peak memory above the libraries', ours ÷ published", name,
            [[(peak - without) / MB for peak in peaks]], unit="MB", at_most=MOST_MEMORY, command=command,
        )  # fmt: skip
        yield paired(
            f"{stage}, peak memory of the whole process, ours ÷ published", name,
            [[peak / MB for peak in peaks]], unit="MB", command=command,
        )  # fmt: skip
        for worker in bare:
            yield alternate(
                f"{stage}, training step ÷ limit", name, mine, worker, unit="ms per document",
                repeats=repeats if short else 2 * repeats - 1, at_most=MOST_OVER_LIMIT, command=command,
            )  # fmt: skip


def idle() -> Callable[[], float]:
    """Nothing but the libraries that both sides import."""
    return lambda: 0.0


def corpora_claims(name: str, folder: Path, repeats: int) -> Iterator[Claim]:
    """Documents of the whole schedule: ours from the raw table to the last batch ÷ the published strings and tokens.

    One epoch of each stage is timed and counted as often as the schedule has it. What happens once counts once: of ours reading the
    raw table and building the corpora, of theirs reading the documents of these corpora.
    """
    leave_libraries_to_themselves()  # as the scripts do
    backbone, corpora = make_backbone(folder), make_corpora(name, folder)
    opened, recipe = open_corpora(corpora), set_recipe(name, folder)
    stages = [stage for stage in SCHEDULE if stage != "content" or len(opened.texts("content"))]
    prepared = {stage: Steps(stage, recipe, opened) for stage in stages}
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="corpora-") as fresh:
            (Path(fresh) / backbone.name).symlink_to(backbone)
            mine = seconds(lambda where=Path(fresh): make_corpora(name, where))
        started = time.perf_counter()
        strings = {stage: strings_and_tokens(corpora, backbone, (stage,)) for stage in stages}
        theirs = (time.perf_counter() - started) / len(stages)
        for stage, steps in prepared.items():
            one = seconds(lambda steps=steps: [steps.batch(step) for step in range(len(steps.plan))])
            mine += one * SCHEDULE[stage]
            theirs += seconds(strings[stage]) * SCHEDULE[stage]
        runs.append([mine, theirs])
    yield paired(
        "corpora and batches of the whole schedule", name, runs, unit="s", at_most=MOST_TIME,
        command=COMMAND.format(name, "corpora"),
    )  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def until_best(name: str, folder: Path, most: float, *overrides: str, language_epochs: int = 10) -> Iterator[Claim]:
    """Time until the published recipe's best validation NDCG@100, of our default recipe ÷ of the published one.

    Ours counts everything: reading the table, corpora, iALS and both stages, with the validation after each epoch; of the
    published recipe the training alone.

    Args:
        name: The set.
        folder: Where backbone, corpora and the run are kept.
        most: The published recipe begins no epoch after so many seconds of training.
        overrides: Words `field=value` laid over our recipe.
        language_epochs: Of each of the published recipe's language models; its own schedule has 10.

    Raises:
        ValueError: if no epoch of its recommendation head is begun in that time.
    """
    best = None
    corpora, backbone = make_corpora(name, folder), make_backbone(folder)
    validate = ("recommendation",)
    for epoch in train_published(corpora, backbone, language_epochs, seconds=most, validate=validate):
        print(
            f"published: epoch {epoch.number} ({epoch.stage}) {epoch.seconds:.0f} s  {epoch.ndcg_at_100:.4f}",
            flush=True,
        )
        if epoch.stage in validate and (best is None or epoch.ndcg_at_100 > best.ndcg_at_100):
            best = epoch
    if best is None:
        raise ValueError(f"the language models alone take more than {most:.0f} s; give more with --seconds")
    recipe = set_recipe(
        name, folder, f"name={name}-default", "backbone.name=none", "backbone.train=full", *overrides, method="default"
    )
    started = datetime.now()
    run = pretrain(recipe, overwrite=True)
    finetune(recipe, overwrite=True)
    whole = (datetime.now() - started).total_seconds()
    ours_seconds, reached = time_to_reach(run.folder, best.ndcg_at_100, started)
    print(f"ours: {reached:.4f} after {ours_seconds:.1f} s; the whole run {whole:.1f} s", flush=True)
    yield paired(
        f"time until what published best reaches, {language_epochs} language epochs each", name,
        [[ours_seconds, best.seconds]], unit="s", at_most=MOST_TIME,
        command=" ".join([
            f"python benchmarks/speed.py --until-best --set {name} --seconds {most:g} --language-epochs {language_epochs}", *overrides
        ]),
    )  # fmt: skip


def time_to_reach(run: Path, wanted: float, started: datetime) -> tuple[float, float]:
    """Seconds from the start of a run to the end of the first epoch that reaches a validation NDCG@100, and what it reached.

    By the times of the run's log: corpora, iALS and loading come before an epoch, least squares and writing after the last.

    Raises:
        ValueError: if no epoch does.
    """
    records = epochs_of(run, "pretrain", "finetune")
    ends = re.findall(r"^(\S+ \S+) epoch \d+/\d+ .*validation", (run / "log").read_text(encoding="utf-8"), re.MULTILINE)
    # An earlier run of the recipe may have logged before.
    for record, end in zip(records, ends[-len(records) :], strict=True):
        if record["ndcg_at_100"] >= wanted:
            return (datetime.strptime(end, "%Y-%m-%d %H:%M:%S,%f") - started).total_seconds(), record["ndcg_at_100"]
    raise ValueError(f"no epoch of {run} reaches a validation NDCG@100 of {wanted:.4f}")


def same_epochs(name: str, folder: Path, language_epochs: int, epochs: int) -> Iterator[Claim]:
    """The published method, repaired, in our engine against the published recipe: the same backbone, corpora, epochs, batches and rates.

    Ours is `--method paper` with the whole history as targets, as the published code has it. The best epoch of the recommendation head
    counts on either side; ours counts validation as time, too.

    Args:
        name: The set.
        folder: Where backbone, corpora and the run are kept.
        language_epochs: Of each language model.
        epochs: Of the recommendation head.
    """
    corpora, backbone = make_corpora(name, folder), make_backbone(folder)
    theirs = list(train_published(corpora, backbone, language_epochs, epochs, validate=("recommendation",)))
    best = max(theirs, key=lambda epoch: epoch.ndcg_at_100)
    stages = (("pretrain", language_epochs), ("finetune", epochs))
    words = [f"{stage}.{field}" for stage, count in stages for field in (f"epochs={count}", f"batch_size={BATCH}")]
    words += [f"{stage}.mixed_precision=auto" for stage, _ in stages]
    recipe = set_recipe(name, folder, f"name={name}-published", "method.targets=all", "finetune.patience=0", *words)
    run = pretrain(recipe, overwrite=True)
    finetune(recipe, overwrite=True)
    ours_seconds = sum(record["seconds"] for record in epochs_of(run.folder, "pretrain", "finetune"))
    reached = max(record["ndcg_at_100"] for record in epochs_of(run.folder, "finetune"))
    after = f"after {language_epochs} + {epochs} epochs, ours ÷ published"
    command = (
        f"python benchmarks/speed.py --same-epochs --set {name} --language-epochs {language_epochs} --epochs {epochs}"
    )
    print(f"published: {best.ndcg_at_100:.4f} ± {best.standard_error:.4f}; ours: {reached:.4f}", flush=True)
    yield paired(
        f"validation NDCG@100 {after}", name, [[reached, best.ndcg_at_100]], unit="NDCG@100",
        at_least=1 - best.standard_error / best.ndcg_at_100, command=command,
    )  # fmt: skip
    yield paired(f"time {after}", name, [[ours_seconds, theirs[-1].seconds]], unit="s", command=command)


def epochs_of(run: Path, *stages: str) -> list[dict[str, Any]]:
    """The records of a run's epochs, in the order in which they were trained."""
    files = [run / "checkpoints" / stage / "progress.json" for stage in stages]
    return [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))["epochs"]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", nargs="+", choices=[*SETS, SAMPLE], default=SETS, help="default: all but the sample")
    add("--stages", nargs="+", choices=[*STAGES, "corpora"], default=STAGES, help="default: all")
    add("--short", action="store_true", help="fewer documents and repeats, of the first set alone")
    add("--until-best", action="store_true", help="time until the published recipe's best validation NDCG@100, alone")
    add("--same-epochs", action="store_true", help="NDCG@100 and time after the same epochs as published, alone")
    add("--seconds", type=float, default=3600, help="with --until-best: of the published recipe (default: %(default)s)")
    add("--language-epochs", type=int, help="with --until-best: of the published ones (default: 10); --same-epochs: 2")
    add("--epochs", type=int, default=10, help="with --same-epochs: of the recommendation head (default: %(default)s)")
    add("--folder", type=Path, help="where backbone, corpora and runs are kept (default: a temporary one)")
    add("--write", action="store_true", help="put the claims into benchmarks/results/speed.json")
    add("overrides", nargs="*", metavar="field=value", help="with --until-best: laid over our recipe")
    chosen = parse_arguments(parser)
    with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
        folder, at_hand = chosen.folder or Path(temporary), chosen.set
        if chosen.until_best or chosen.same_epochs:
            at_hand = dict.fromkeys(map(set_at_hand, chosen.set))
        if chosen.until_best:
            epochs = 10 if chosen.language_epochs is None else chosen.language_epochs
            found = [
                claim
                for name in at_hand
                for claim in until_best(name, folder, chosen.seconds, *chosen.overrides, language_epochs=epochs)
            ]
        elif chosen.same_epochs:
            epochs = 2 if chosen.language_epochs is None else chosen.language_epochs
            found = [claim for name in at_hand for claim in same_epochs(name, folder, epochs, chosen.epochs)]
        else:
            found = list(claims(chosen.short, folder, tuple(chosen.set), tuple(chosen.stages)))
    if chosen.write:
        write_claims(found)


if __name__ == "__main__":
    main()
