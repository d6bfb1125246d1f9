"""How well the recommender ranks, against all that its users would otherwise use: same split, same information, whole catalogue.

python benchmarks/quality.py                                  every set at hand, the default recipe, three seeds, and all baselines
python benchmarks/quality.py --methods paper --alone           the published method, without baselines
python benchmarks/quality.py --data shop.yaml                 a set of your own: its file for --config, or a table (data.user_column=NAME …)
python benchmarks/quality.py --ablation --set sample          each departure from the paper taken away alone, one seed
python benchmarks/quality.py --gains --set sample             each departure alone, added to the published method, one seed
python benchmarks/quality.py --curves --set sample            mutual regularisation, learning rates, held-out share, one seed

Baselines are tuned on validation over the grids of `training/evaluation/baselines.py`: popularity, item-kNN, EASE, iALS. So are those
that know the texts: what users with like texts chose (TF-IDF, kernel ridge, one's own row left out), EASE that sees the items' texts,
topics of histories and of people's own texts against those of the items, and iALS blended with all of these, the teacher of the
default recipe. The likeness of the items' texts to the history's (cosines of TF-IDF, or of
sentence vectors where the recipe names a text encoder: text_encoder.name=NAME) has nothing to choose; SASRec (--sasrec) has one setting, and stops on validation. A run is kept in --folder and not done again for the same recipe and data. Printed is test
NDCG@100, mean over seeds with its standard deviation, and the paired differences to all baselines with their standard errors over users; --write puts it all into benchmarks/results/quality.json and draws the picture.
"""

import argparse
import hashlib
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.claims import RESULTS
from benchmarks.sasrec import ranked_by_sasrec
from benchmarks.sets import PATHS, SAMPLE, parse_arguments, set_at_hand, where_the_set_is
from benchmarks.text_vectors import sentence_vectors
from configuration.load import load_recipe
from configuration.recipe import Recipe
from training.data.corpora import IDS_AS_WORDS, Corpora, corpus_fingerprint, open_corpora
from training.data.readers import read_tables
from training.evaluation.bias import Bias
from training.evaluation.predictions import Parts
from training.evaluation.ranking import PerUser, as_json, evaluate_scores, mean_over_users, measure_users
from training.evaluation.scoring import split_matrix
from training.files import write_text
from training.finetune import finetune
from training.predict import predict
from training.pretrain import pretrain
from training.run import Run, stage_fingerprint
from training.stages.teacher import Blend, Teacher, fit_teacher, similarities
from training.stages.terms import term_counts

SETS = (SAMPLE, "digital-music", "ml-100k", "amazon-beauty")
SEEDS = (42, 43, 44)
# Of the default recipe, each departure from the paper, and what takes it away.
ABLATION = {
    "ID embeddings start at random": "method.initialisation=random",
    "no distillation": "method.distillation=0",
    "the teacher is iALS alone": "method.teacher=ials",
    "read at the last token": "method.readout=last",
    "targets: the whole history": "method.targets=all",
    "a fixed fifth held out": "method.held_out_share=[0.2, 0.2]",
    "user token in every prompt": "method.user_token_dropout=0",
    "frozen backbone": "backbone.train=none",
    "no mutual regularisation": "method.lambda_v=0",
    "no language-model stage": "pretrain.epochs=0",
    "no text map": "method.text_map=false",
    "no offsets of users": "method.user_offsets=false",
}
# Of the published method, each departure of the default recipe's method alone, and how it is trained; not for how long.
GAINS = {
    "ID embeddings start from factors": ["method.initialisation=ials", "method.initialisation_std=0.05"],
    "distillation, the teacher is iALS": ["method.distillation=0.8", "method.teacher=ials"],
    "distillation, texts in the teacher": ["method.distillation=0.8", "method.teacher=blend"],
    "offsets of users, by their own texts": ["method.user_offsets=true"],  # without distillation there is no teacher
    "the mean readout": ["method.readout=mean"],
    "held-out shares that differ": ["method.held_out_share=[0.2, 0.6]"],
    "half of the prompts without a user token": ["method.user_token_dropout=0.5"],
    "a backbone that learns": ["backbone.train=full", "pretrain.backbone_lr=2e-3"],
    "mutual regularisation of a tenth": ["method.lambda_v=0.1"],
    "warm-up, a falling learning rate, clipping": [
        "pretrain.warmup_epochs=1", "pretrain.schedule=cosine", "pretrain.max_grad_norm=1.0",
        "finetune.warmup_epochs=2", "finetune.schedule=cosine", "finetune.max_grad_norm=1.0",
    ],
}  # fmt: skip
# Fields to set by a curve, and their values, the default recipe's own among them.
CURVES: dict[str, tuple[Any, ...]] = {
    "method.lambda_v": (0.0, 0.01, 0.1, 1.0, 10.0),
    "pretrain.lr": (1e-4, 3e-4, 1e-3, 3e-3),
    "finetune.lr": (1e-4, 3e-4, 1e-3, 3e-3),
    "method.held_out_share": ([0.1, 0.1], [0.2, 0.6], [0.3, 0.3], [0.6, 0.6], [0.8, 0.8]),
}
LONGEST_NAME, DEPTH = 120, 100
Row = dict[str, Any]


def run_once(
    name: str, method: str, seed: int, folder: Path, *overrides: str, baselines: bool = False, like: Run | None = None
) -> Row:
    """The results of a run, trained where `folder` does not hold one of the same recipe.

    Args:
        name: The set, or the file of one's own.
        method: The method's file.
        seed: Of the run.
        folder: Where runs are kept.
        overrides: Words `field=value` laid over the recipe.
        baselines: Whether the classical baselines are fitted beside it.
        like: A finished run whose pretraining is taken over where the recipes differ in fine-tuning alone.
    """
    recipe = recipe_of(name, method, seed, folder, *overrides, *([] if baselines else ["evaluation.baselines=[]"]))
    run = Run.of(recipe)
    kept = run.folder / "results.json"
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        there, wanted = (with_baselines(recipe_, []) for recipe_ in (found["recipe"], as_found(recipe)))
        if there == wanted and is_of_these_data(run, found):
            if not baselines or found["recipe"] == as_found(recipe):
                return found
            return predict(recipe, overwrite=True)
        kept.unlink()  # a run that breaks off leaves no figures of other data
    if like is None or not takes_over(run, like):
        pretrain(recipe, overwrite=True)
    finetune(recipe, overwrite=True)
    return predict(recipe, overwrite=True)


def as_found(recipe: Recipe) -> Row:
    """The recipe as a file of results has it."""
    return dict(json.loads(json.dumps(asdict(recipe))))


def with_baselines(recipe: Row, baselines: list[str]) -> Row:
    """A recipe as a file of results has it, with other baselines to be fitted."""
    return recipe | {"evaluation": recipe["evaluation"] | {"baselines": baselines}}


def is_of_these_data(run: Run, found: Row) -> bool:
    """Whether the files that the recipe names are still those that the results were made of, and the run's corpora are there."""
    corpora = found["data"]
    source = read_tables(run.recipe.data).source
    return (
        corpora["fingerprint"] == corpus_fingerprint(run.recipe, source, corpora.get(IDS_AS_WORDS, 0))
        and (run.corpora / "info.json").is_file()
    )


def takes_over(run: Run, other: Run) -> bool:
    """Take over corpora and pretraining of another run, where this one's would be the same; whether they were."""
    shutil.rmtree(run.folder, ignore_errors=True)
    corpora, marks = open_corpora(other.corpora), []
    for recipe in (run.recipe, other.recipe):
        marks.append(stage_fingerprint(recipe, corpora.fingerprint_with(recipe), "pretrain"))
    if marks[0] != marks[1]:
        return False
    shutil.copytree(other.corpora, run.corpora)
    shutil.copytree(other.checkpoints("pretrain"), run.checkpoints("pretrain"))
    return True


def recipe_of(name: str, method: str, seed: int, folder: Path, *overrides: str) -> Recipe:
    """The recipe of a run, whose name says what is special about it."""
    said = [word for word in overrides if not word.startswith("evaluation.")]
    label = "-".join([of_folder(name), method, str(seed), *(word.replace("/", "_") for word in said)])
    if len(label) > LONGEST_NAME:  # a folder's name has its limits
        label = f"{label[:LONGEST_NAME]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    words = [f"seed={seed}", f"output_dir={folder}", "tracker=none", f"name={json.dumps(label)}", *overrides]
    if name in SETS:
        return load_recipe(name, method, [*where_the_set_is(name), *words])
    if is_yaml(name):
        return load_recipe(Path(name), method, words)
    return load_recipe(None, method, [f"data.path={json.dumps(name)}", *words])


def is_yaml(name: str) -> bool:
    """Whether a set of one's own is a file for `--config`, and not a table."""
    return Path(name).suffix in {".yaml", ".yml"}


def of_folder(name: str) -> str:
    """A set's name in that of a folder; of one's own the file's, and what tells it from others that are called alike."""
    if name in SETS:
        return name
    word = re.sub(r"\W+", "_", Path(name).name.partition(".")[0])
    return f"{word}-{hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:8]}"


class Against:
    """What a baseline's ranking of the test split is compared with: that of a run, user by user.

    Args:
        run: A run that has been measured.
        corpora: Its corpora.
    """

    def __init__(self, run: Run, corpora: Corpora) -> None:
        train, validation, test = (split_matrix(corpora, name) for name in ("recommendation", "validation", "test"))
        self.train, self.seen, self.test = train, (train + validation).tocsr(), test
        self.ours = Bias(train, test)
        count = len(list((run.folder / "predictions").glob("part-*")))
        for ranked in Parts(run.folder / "predictions", run.checkpoints("predict"), count, "").read():
            self.ours(ranked.users, ranked.items)

    def row(self, per_user: PerUser, bias: Bias, **more: Any) -> Row:
        """The row of a model by its figures and by what [`Bias`] has read of its ranking."""
        figures = per_user.figures().to_dict()
        behind = as_json(mean_over_users(self.ours.ndcg_at_100 - bias.ndcg_at_100))
        measured = {"test": figures, "bias": bias.to_dict()}
        error = figures["ndcg_at_100"]["standard_error"]
        return summary([figures["ndcg_at_100"]["value"]], standard_error=error, behind_model=behind, **more) | others(
            measured
        )

    def of(self, model: Teacher, **more: Any) -> Row:
        """The row of a teacher or a part of one."""
        bias = Bias(self.train, self.test)
        everyone = np.arange(self.train.shape[0])
        return self.row(evaluate_scores(model.scores, everyone, self.seen, self.test, read_block=bias), bias, **more)


def blends(recipe: Recipe) -> dict[str, Row]:
    """Rows of the teacher, a baseline of its own, and of its parts, their settings chosen on validation.

    Args:
        recipe: Of a run that has been measured.
    """
    run = Run.of(recipe)
    corpora = open_corpora(run.corpora)
    train, validation = (split_matrix(corpora, name) for name in ("recommendation", "validation"))
    blend = fit_teacher(train, validation, corpora, "blend", recipe.seed, run.checkpoints("teacher"))
    no_factors = replace(blend, user_factors=0 * blend.user_factors, item_factors=0 * blend.item_factors, topics=None)
    has_texts = len(corpora.texts("content")) > 0
    models: dict[str, Teacher] = {}
    if blend.blend.user_text_weight or blend.blend.ease_weight or blend.topics is not None:
        models["iALS, EASE and texts" if has_texts else "iALS and EASE"] = blend
    if blend.from_items is not None:
        label = "EASE with texts" if blend.blend.ease_text_weight else "EASE of the blend"
        models[label] = replace(no_factors, blend=Blend({}, 0.0, 0.0, ease_weight=1.0))
    if blend.topics is not None:
        models["topics of texts"] = replace(no_factors, topics=blend.topics, blend=Blend({}, 0.0, 0.0))
    if blend.from_user_text is not None:
        models["texts of users"] = replace(no_factors, blend=Blend({}, 0.0, 0.0, user_text_weight=1.0))
    counts = term_counts(corpora)
    if counts.item.nnz:
        alike = similarities(counts.item)
        models["texts of items"] = replace(no_factors, from_items=alike, blend=Blend({}, 0.0, 0.0, ease_weight=1.0))
        states = run.text_states(corpora, torch.device("cpu"))
        if states is not None and not np.isnan(states.items).all():
            vectors = sentence_vectors(states.items)
            alike = vectors @ vectors.T
            models["sentence vectors of items"] = replace(models["texts of items"], from_items=alike)
    against = Against(run, corpora)
    return {label: against.of(model) for label, model in models.items()}


def sasrec(recipe: Recipe, python: str) -> Row:
    """The row of SASRec, which knows training items in the order of the data, as ours does."""
    run = Run.of(recipe)
    corpora = open_corpora(run.corpora)
    against = Against(run, corpora)
    users, bias = np.flatnonzero(np.diff(against.test.indptr)), Bias(against.train, against.test)
    histories = corpora.histories("recommendation"), corpora.histories("validation")
    ranked = ranked_by_sasrec(python, *histories, against.seen, users, DEPTH, sees_validation=False)
    bias(users, ranked)
    return against.row(measure_users(ranked, against.test[users]), bias)


def summary(values: list[float], **more: Any) -> Row:
    """Mean and standard deviation over seeds, of NDCG@100."""
    return {
        "ndcg_at_100": {
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
    } | more


def others(results: Row) -> Row:
    """What else a row tells beside NDCG@100: recall, coverage, novelty, share of the head, by activity and popularity."""
    bias = results["bias"]
    return {
        "recall_at_20": results["test"]["recall_at_20"]["value"],
        "coverage_at_10": bias["coverage_at_10"],
        "novelty_at_10": bias.get("novelty_at_10"),
        "head_share_at_10": next(
            (group["share_at_10"] for group in bias["by_item_popularity"] if group["group"] == "head"), None
        ),
        "by_item_popularity": {group["group"]: group["ndcg_at_100"]["value"] for group in bias["by_item_popularity"]},
        "by_user_activity": {group["group"]: group["ndcg_at_100"]["value"] for group in bias["by_user_activity"]},
    }


def compare(
    name: str,
    methods: list[str],
    seeds: int,
    folder: Path,
    overrides: list[str],
    python: str | None = None,
    *,
    alone: bool = False,
) -> dict[str, Row]:
    """A row for each model of a set; of SASRec where there is an interpreter for it, of sentence vectors where there is a text encoder.

    Args:
        name: The set, or the file of one's own.
        methods: Recipes of the method; the first brings the baselines.
        seeds: How many.
        folder: Where runs are kept.
        overrides: Words `field=value` laid over every recipe.
        python: SASRec's interpreter.
        alone: Without baselines.
    """
    rows: dict[str, Row] = {}
    for method in methods:
        first = method == methods[0] and not alone
        runs = [
            run_once(name, method, seed, folder, *overrides, baselines=first and seed == SEEDS[0])
            for seed in SEEDS[:seeds]
        ]
        values = [run["test"]["ndcg_at_100"]["value"] for run in runs]
        rows[f"CLLM4Rec, {method}"] = summary(
            values,
            standard_error=runs[0]["test"]["ndcg_at_100"]["standard_error"],
            **others(runs[0]),
            seconds={stage: cost["seconds"] for stage, cost in runs[0]["stages"].items()},
        )
        by_history = [run["test_by_history"]["ndcg_at_100"]["value"] for run in runs]
        rows[f"CLLM4Rec, {method}, by history alone"] = summary(by_history)
        if not first:
            continue
        for key, found in runs[0]["baselines"].items():
            rows[key] = summary(
                [found["ndcg_at_100"]["value"]],
                standard_error=found["ndcg_at_100"]["standard_error"],
                behind_model=found["behind_model"],
                settings=found["settings"],
                **others({"test": found, "bias": found["bias"]}),
            )
        recipe = recipe_of(name, method, SEEDS[0], folder, *overrides)
        rows |= blends(recipe) | ({} if python is None else {"SASRec": sasrec(recipe, python)})
    return rows


def one_by_one(
    name: str, method: str, changes: dict[str, list[str]], folder: Path, overrides: list[str]
) -> dict[str, Row]:
    """A method's recipe, and with each change alone, one seed each.

    Args:
        name: The set.
        method: The method's file.
        changes: Words `field=value` by what they do.
        folder: Where runs are kept.
        overrides: Laid over all.
    """
    rows, like = {}, None
    for label, words in {f"the {method} recipe": [], **changes}.items():
        results = run_once(name, method, SEEDS[0], folder, *words, *overrides, baselines=not words, like=like)
        like = like or Run.of(recipe_of(name, method, SEEDS[0], folder, *overrides))
        rows[label] = summary(
            [results["test"]["ndcg_at_100"]["value"]],
            validation=results["validation"]["ndcg_at_100"]["value"],
            by_history=results["test_by_history"]["ndcg_at_100"]["value"],
            departure=" ".join(words) or None,
        )
    return rows


def curves(name: str, folder: Path, overrides: list[str]) -> dict[str, Row]:
    """The default recipe with each value of each field of [`CURVES`], one seed each; rows by `field=value`."""
    rows = {}
    for field, values in CURVES.items():
        for value in values:
            word = f"{field}={value}"
            results = run_once(name, "default", SEEDS[0], folder, word, *overrides)
            rows[word] = summary(
                [results["test"]["ndcg_at_100"]["value"]],
                validation=results["validation"]["ndcg_at_100"]["value"],
                by_history=results["test_by_history"]["ndcg_at_100"]["value"],
            )
    return rows


def draw_curves(found: dict[str, dict[str, Row]], path: Path) -> None:
    """A panel for each field: validation NDCG@100 of each set, of known users and by history alone on the test."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axis, (field, values) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for name, rows in found.items():
            shown = [rows[f"{field}={value}"] for value in values]
            axis.plot([row["validation"] for row in shown], "o-", label=f"{name}, validation", markersize=3)
            axis.plot([row["by_history"] for row in shown], "o--", label=f"{name}, by history", markersize=3)
        axis.set_xticks(range(len(values)), [f"{value}" for value in values], fontsize=6)
        axis.set_title(field, fontsize=8, loc="left")
        axis.tick_params(axis="y", labelsize=7)
    figure.axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=110)


def lines(name: str, rows: dict[str, Row]) -> Iterator[str]:
    """The rows of a set as a table of Markdown."""
    yield f"| {name} | NDCG@100 | |"
    yield "| --- | --- | --- |"
    for label, row in rows.items():
        mean, spread = row["ndcg_at_100"]["mean"], row["ndcg_at_100"]["std"]
        behind = row.get("behind_model")
        notes = [f"± {row['standard_error']:.3f} over users"] if "standard_error" in row else []
        notes += [f"behind ours by {behind['value']:.3f} ± {behind['standard_error']:.3f}"] if behind else []
        notes += [f"validation {row['validation']:.3f}"] if "validation" in row else []
        notes += [f"by history alone {row['by_history']:.3f}"] if "by_history" in row else []
        yield f"| {label} | {mean:.3f}{'' if spread is None else f' ± {spread:.3f}'} | {'; '.join(notes)} |"


def draw(found: dict[str, dict[str, Row]], path: Path) -> None:
    """A panel for each set: NDCG@100 of each model as a bar, ours in another colour."""
    figure = Figure(figsize=(9, 1 + 2.4 * len(found)), layout="constrained")
    for axis, (name, rows) in zip(np.atleast_1d(figure.subplots(len(found), 1)), found.items(), strict=True):
        ranked = sorted(rows.items(), key=lambda pair: pair[1]["ndcg_at_100"]["mean"])
        values = [row["ndcg_at_100"]["mean"] for _, row in ranked]
        colours = ["#2b6cb0" if label.startswith("CLLM4Rec") else "#a0aec0" for label, _ in ranked]
        axis.barh([label for label, _ in ranked], values, color=colours)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.3f}", va="center", fontsize=7)
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", nargs="+", choices=[SAMPLE, *PATHS], default=SETS, help="default: all")
    add(
        "--data",
        nargs="+",
        metavar="FILE",
        help="sets of your own, instead: a set's YAML, or a table (a `datasets` repo with data.format=dataset)",
    )
    add("--methods", nargs="+", default=["default"], help="recipes of the method; the first brings the baselines")
    add("--seeds", type=int, default=3, choices=range(1, len(SEEDS) + 1), help="default: %(default)s")
    add("--alone", action="store_true", help="without baselines, whose rows stay as --write finds them")
    add("--ablation", action="store_true", help="the default recipe without each departure from the paper, instead")
    add("--gains", action="store_true", help="the published method with each departure from it alone, instead")
    add("--curves", action="store_true", help="the default recipe with several values of some fields, instead")
    add("--sasrec", metavar="PYTHON", help="interpreter of an environment with RecTools: see benchmarks/sasrec.py")
    add("--folder", type=Path, default=Path("runs/quality"), help="where runs are kept (default: %(default)s)")
    add(
        "--write",
        action="store_true",
        help="put the rows into benchmarks/results/quality.json, or the file that is named like --ablation, --gains, --curves; those of --data "
        "into such a file in --folder",
    )
    add("overrides", nargs="*", metavar="field=value", help="laid over every recipe")
    chosen = parse_arguments(parser)
    for name in chosen.data or []:
        if not Path(name).exists() and (is_yaml(name) or "data.format=dataset" not in chosen.overrides):
            parser.error(f"--data: there is no file {name}")
    own = [f"./{name}" if name in SETS else name for name in chosen.data or []]
    instead = next((other for other in ("ablation", "gains", "curves") if getattr(chosen, other)), None)
    if chosen.alone and (instead or chosen.sasrec):
        parser.error(f"--alone: with --{instead or 'sasrec'} there is nothing to leave out")
    results = chosen.folder if own else RESULTS
    path = results / f"{instead or 'quality'}.json"
    for name in dict.fromkeys(own or map(set_at_hand, chosen.set)):
        if chosen.ablation:
            taken_away = {label: [word] for label, word in ABLATION.items()}
            rows = one_by_one(name, "default", taken_away, chosen.folder, chosen.overrides)
        elif chosen.gains:
            rows = one_by_one(name, "paper", GAINS, chosen.folder, chosen.overrides)
        elif chosen.curves:
            rows = curves(name, chosen.folder, chosen.overrides)
        else:
            rows = compare(
                name, chosen.methods, chosen.seeds, chosen.folder, chosen.overrides, chosen.sasrec, alone=chosen.alone
            )
        print("\n".join(["", *lines(name, rows)]), flush=True)
        if chosen.write:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if instead is None:  # models that were not run this time keep their rows
                rows = found.get(name, {}) | rows
            found[name] = rows
            write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            if chosen.curves:
                draw_curves(found, results / "curves.png")
            elif instead is None:
                draw(found, results / "quality.png")


if __name__ == "__main__":
    main()
