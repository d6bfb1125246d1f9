"""Interactions that came since: fine-tuning on top of an earlier model, against training anew, on a split by time.

python benchmarks/newer_data.py                                 ml-100k; about eight minutes on two cores
python benchmarks/newer_data.py --epochs 1 finetune.epochs=2    a first look

The latest tenth of all interactions (films rated 4 or 5) is the test, the tenth before it validation. A first model is trained
on the earliest seven tenths, with the eighth for validation. Two more are trained on eight tenths: one anew, one with `--init-from`
the first and a few epochs. Printed are test NDCG@100 and seconds of training of both (corpora, teacher and what is fitted at the end
included), and their ratios. Texts are left out: the interactions alone are the question here.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.claims import RESULTS
from benchmarks.sets import set_at_hand, where_the_set_is
from configuration.load import load_recipe
from configuration.recipe import Recipe
from training.data.readers import read_tables
from training.files import write_text
from training.finetune import finetune
from training.predict import predict
from training.pretrain import pretrain

SET, LEAST_RATING = "ml-100k", 4
FIRST, NEWER = (0.7, 0.8), (0.8, 0.9)
COLUMNS = {"user_column": "user", "item_column": "item", "timestamp_column": "timestamp", "split_column": "split"}


def split_by_time(frame: pd.DataFrame, train: float, validation: float) -> pd.DataFrame:
    """Interactions with their split: in order of time the first are trained on, those up to `validation` validate, the rest test.

    Args:
        frame: With the columns user, item and timestamp.
        train: Share of all interactions.
        validation: Share up to which they validate.

    Returns:
        Without the users and items of whom nothing is trained on.
    """
    order = frame["timestamp"].rank(method="first", pct=True)
    marked = frame.assign(split=np.select([order <= train, order <= validation], ["train", "validation"], "test"))
    known = marked[marked["split"] == "train"]
    return marked[marked["user"].isin(known["user"]) & marked["item"].isin(known["item"])]


def recipe_of(name: str, folder: Path, overrides: list[str]) -> Recipe:
    """The default recipe for a table with these columns."""
    words = ["data.format=table", "data.split=given", *(f"data.{field}={column}" for field, column in COLUMNS.items())]
    return load_recipe(None, "default", [*words, f"name={name}", f"output_dir={folder}", "tracker=none", *overrides])


def figures(recipe: Recipe) -> dict[str, float]:
    """Test NDCG@100, its standard error over users, and seconds of training."""
    results = predict(recipe, overwrite=True)
    found = results["test"]["ndcg_at_100"]
    seconds = sum(cost["seconds"] for cost in results["stages"].values())
    return {"ndcg_at_100": found["value"], "standard_error": found["standard_error"], "seconds": seconds}


def measure(frame: pd.DataFrame, epochs: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Both ways to a model of the newer data.

    Args:
        frame: With the columns user, item and timestamp.
        epochs: Of fine-tuning on top of the first model.
        overrides: Laid over the default recipe.
        folder: Where runs are kept.
    """
    overrides = ["evaluation.baselines=[]", *overrides]
    first, anew = (recipe_of(name, folder, overrides) for name in ("first", "anew"))
    pretrain(first, frame=split_by_time(frame, *FIRST))
    run = finetune(first)
    newer = split_by_time(frame, *NEWER)
    pretrain(anew, frame=newer)
    finetune(anew)
    on_top = recipe_of("on-top", folder, [*overrides, f"finetune.epochs={epochs}"])
    finetune(on_top, frame=newer, init_from=run.folder)
    found = {"anew": figures(anew), "on top": figures(on_top)}
    ratios = {name: found["on top"][name] / found["anew"][name] for name in ("ndcg_at_100", "seconds")}
    return {**found, "on top ÷ anew": ratios}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning on top (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/newer_data.json")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="laid over the default recipe")
    chosen = parser.parse_args()
    if set_at_hand(SET) != SET:
        raise SystemExit("the sample has no times, so there is no split by time")
    rated = read_tables(load_recipe(SET, "default", where_the_set_is(SET)).data).interactions
    frame = rated[rated["rating"] >= LEAST_RATING][["user", "item", "timestamp"]]
    with tempfile.TemporaryDirectory(prefix="newer-data-") as temporary:
        found = measure(frame, chosen.epochs, chosen.overrides, Path(temporary))
    for name in ("anew", "on top"):
        row = found[name]
        print(f"{name:<8} NDCG@100 {row['ndcg_at_100']:.4f} ± {row['standard_error']:.4f}, {row['seconds']:.0f} s")
    ratios = found["on top ÷ anew"]
    print(f"on top ÷ anew: quality {ratios['ndcg_at_100']:.3f}, time {ratios['seconds']:.3f}")
    if chosen.write:
        written = {"set": SET, "epochs": chosen.epochs, "overrides": chosen.overrides} | found
        write_text(RESULTS / "newer_data.json", json.dumps(written, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
