"""The next item in order of time: each user's last item is the test, the one before it validation; HR@10 and NDCG@10.

python benchmarks/next_item.py                            ml-100k and amazon-beauty; under an hour on two cores
python benchmarks/next_item.py --set ml-100k --methods default method.history_order=chronological
python benchmarks/next_item.py --sasrec sasrec/bin/python     and SASRec beside it: see benchmarks/sasrec.py

All ratings count. Ours is the recipe for what comes next (`sequential`); its prompts hold the validation item too, as is the custom, and
SASRec's histories do. The other baselines' settings are chosen on validation, and they are then fitted again with the validation items, so that all know
the same. The whole catalogue is ranked but for what the user has had.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from transformers import AutoModelForSequenceClassification

from benchmarks.claims import RESULTS
from benchmarks.quality import SEEDS, recipe_of
from benchmarks.sasrec import ranked_by_sasrec
from benchmarks.sets import PATHS, SAMPLE, parse_arguments, set_at_hand
from configuration.recipe import Recipe
from training.data.batches import layout_of
from training.data.corpora import Corpora, open_corpora
from training.data.ragged import Ragged
from training.evaluation.baselines import BASELINES, fit_baselines
from training.evaluation.ranking import BlockFunction, ScoreFunction, best_items
from training.evaluation.scoring import ModelScores, split_matrix
from training.files import write_text
from training.finetune import finetune
from training.pretrain import pretrain
from training.run import Run

SETS = ("ml-100k", "amazon-beauty")
DEPTH, USERS_AT_A_TIME = 10, 256
BY_TIME = ("data.split=leave_last_out", "data.split_path=none", "data.min_rating=none")
NAMES = ("popularity", "item_knn", "ease", "ials")
Figures = dict[str, float]


def figures(ranked: np.ndarray, wanted: np.ndarray) -> Figures:
    """HR@10 and NDCG@10 with their standard errors.

    Args:
        ranked: The best items of each user, int `(users, 10)`.
        wanted: The item that came next, int `(users,)`.
    """
    hit = ranked == wanted[:, None]
    gain = (hit / np.log2(np.arange(ranked.shape[1]) + 2)).sum(1)
    found = {}
    for name, values in (("hr_at_10", hit.any(1).astype(float)), ("ndcg_at_10", gain)):
        found[name] = float(values.mean())
        found[f"{name}_standard_error"] = float(values.std(ddof=1) / np.sqrt(len(values)))
    return found


def with_validation(corpora: Corpora) -> tuple[np.ndarray, Ragged]:
    """Users, and what they had until the test, in order of time."""
    users, train = corpora.histories("recommendation")
    held_out = dict(zip(*(part.tolist() for part in validation_items(corpora)), strict=True))
    rows = [
        [*row.tolist(), *([held_out[user]] if user in held_out else [])] for user, row in zip(users, train, strict=True)
    ]
    return users, Ragged.from_lists(rows, np.int32)


def validation_items(corpora: Corpora) -> tuple[np.ndarray, np.ndarray]:
    """Users with a validation item, and the item."""
    users, items = corpora.histories("validation")
    return users, items.values


def seen_before_test(corpora: Corpora) -> csr_matrix:
    """What users had before the test, `(users, items)`."""
    return csr_matrix(split_matrix(corpora, "recommendation") + split_matrix(corpora, "validation"))


def measure(corpora: Corpora, score: ScoreFunction | BlockFunction) -> Figures:
    """The figures of scores, for everybody with a test item."""
    seen, (users, wanted) = seen_before_test(corpora), corpora.histories("test")
    blocks = np.array_split(users, max(-(-len(users) // USERS_AT_A_TIME), 1))
    ranked = [best_items(score(block), seen[block], block, DEPTH).items for block in blocks]
    return figures(np.concatenate(ranked), wanted.values)


def ours(run: Run, corpora: Corpora, method: str) -> dict[str, Figures]:
    """The trained model, with the user's token and by history alone."""
    model = AutoModelForSequenceClassification.from_pretrained(run.model, trust_remote_code=True)
    prompts = (*with_validation(corpora), layout_of(corpora), model.config.max_history)
    return {
        label: measure(corpora, ModelScores(model, *prompts, user_tokens=named).blocks)
        for label, named in ((f"CLLM4Rec, {method}", True), (f"CLLM4Rec, {method}, by history alone", False))
    }


def sasrec(corpora: Corpora, python: str) -> dict[str, Figures]:
    """SASRec, in an environment of its own."""
    (users, wanted), seen = corpora.histories("test"), seen_before_test(corpora)
    train, validation = corpora.histories("recommendation"), corpora.histories("validation")
    ranked = ranked_by_sasrec(python, train, validation, seen, users, DEPTH, sees_validation=True)
    return {"SASRec": figures(ranked, wanted.values)}


def baselines(corpora: Corpora, seed: int) -> dict[str, Figures]:
    """The baselines, fitted again on training and validation pairs."""
    train, validation = (split_matrix(corpora, name) for name in ("recommendation", "validation"))
    chosen = fit_baselines(train, validation, NAMES, seed)
    everything = csr_matrix(train + validation)
    return {
        name: measure(corpora, BASELINES[name](everything, seed, **fitted.settings)[0])
        for name, fitted in chosen.items()
    }


def trained(recipe: Recipe) -> Run:
    """The run of a recipe, trained where it is not there."""
    run = Run.of(recipe)
    if not run.choices.is_file():
        pretrain(recipe, overwrite=True)
        finetune(recipe, overwrite=True)
    return run


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", nargs="+", choices=[SAMPLE, *PATHS], default=SETS, help="default: ml-100k amazon-beauty")
    add("--folder", type=Path, default=Path("runs/next-item"), help="where runs are kept (default: %(default)s)")
    add("--methods", nargs="+", default=["sequential"], help="recipes of the method (default: sequential)")
    add("--sasrec", metavar="PYTHON", help="interpreter of an environment with RecTools, for SASRec")
    add("--write", action="store_true", help="put the rows into benchmarks/results/next_item.json")
    add("overrides", nargs="*", metavar="field=value", help="laid over the recipes")
    chosen = parse_arguments(parser)
    path = RESULTS / "next_item.json"
    for name in dict.fromkeys(map(set_at_hand, chosen.set)):
        rows: dict[str, Figures] = {}
        for method in chosen.methods:
            words = (*BY_TIME, "evaluation.baselines=[]", *chosen.overrides)
            run = trained(recipe_of(name, method, SEEDS[0], chosen.folder, *words))
            corpora = open_corpora(run.corpora)
            rows |= ours(run, corpora, method)
        rows |= baselines(corpora, SEEDS[0])
        if chosen.sasrec is not None:
            rows |= sasrec(corpora, chosen.sasrec)
        print(f"\n| {name} | HR@10 | NDCG@10 |\n| --- | --- | --- |")
        for label, row in rows.items():
            cells = (f"{row[key]:.3f} ± {row[f'{key}_standard_error']:.3f}" for key in ("hr_at_10", "ndcg_at_10"))
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
        if chosen.write:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_text(
                path, json.dumps(found | {name: found.get(name, {}) | rows}, indent=1, ensure_ascii=False) + "\n"
            )


if __name__ == "__main__":
    main()
