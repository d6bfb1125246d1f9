"""How much of a pretrained model a text encoder needs: ridge regression from its states, by how many of the lowest layers are kept.

python benchmarks/text_layers.py text_encoder.name=data/smollm2 text_encoder.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf

On the embedded sample, with the draws of `newcomers.py` and nothing trained: a fifth of the projects is ranked the libraries from their
description (NDCG@100), then a fifth of the libraries is ranked among themselves from theirs (NDCG@20), by ridge regression on TF-IDF with
the states beside it; mean over the draws, and the difference to TF-IDF alone within a draw. Ten minutes on two cores.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from benchmarks.newcomers import held_out, ndcg, ridge_scores, shown, summary
from configuration.load import load_recipe
from training.data.readers import read_tables
from training.stages.text_states import open_text_encoder

LAYERS = (2, 4, 6, 8, 10, 15, 20)
Reader = Callable[[list[str]], np.ndarray] | None


def new_people(frame: pd.DataFrame, texts: dict[str, str], read: Reader, draw: int) -> float:
    """NDCG@100 of all items of users who are held out whole, by their texts."""
    out = held_out(frame["user"], np.random.default_rng(draw))
    given = frame["user"].isin(out)
    known = pd.crosstab(frame["user"][~given], frame["item"][~given])
    wanted = pd.crosstab(frame["user"][given], frame["item"][given]).reindex(columns=known.columns, fill_value=0)
    dense = known.to_numpy(float)
    scores, _ = ridge_scores(
        [texts[user] for user in known.index], dense, [texts[user] for user in wanted.index],
        lambda left_out: ndcg(left_out, dense, 100), read,
    )  # fmt: skip
    return ndcg(scores, wanted.to_numpy(float), 100)


def new_items(frame: pd.DataFrame, texts: dict[str, str], read: Reader, draw: int) -> float:
    """NDCG@20 of items that are held out, among themselves, by their texts."""
    out = held_out(frame["item"], np.random.default_rng(100 + draw))
    given = frame["item"].isin(out)
    known = pd.crosstab(frame["user"][~given], frame["item"][~given])
    wanted = pd.crosstab(frame["user"][given], frame["item"][given]).reindex(known.index, fill_value=0)
    dense = known.to_numpy(float)
    scores, _ = ridge_scores(
        [texts[item] for item in known.columns], dense.T, [texts[item] for item in wanted.columns],
        lambda left_out: ndcg(left_out.T, dense, 100), read,
    )  # fmt: skip
    return ndcg(scores.T, wanted.to_numpy(float), 20)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3, help="default: %(default)s")
    parser.add_argument("overrides", nargs="+", metavar="field=value", help="text_encoder.name at least")
    chosen = parser.parse_args()
    recipe = load_recipe("sample", "default", chosen.overrides)
    whole = open_text_encoder(recipe.text_encoder)
    if whole is None:
        parser.error("no text encoder is named: give text_encoder.name=…")
    tables = read_tables(recipe.data)
    assert tables.users is not None
    assert tables.items is not None
    frame = tables.interactions
    people, items = (
        dict(zip(table[kind], table["text"], strict=True))
        for table, kind in ((tables.users, "user"), (tables.items, "item"))
    )
    places = {text: place for place, text in enumerate(dict.fromkeys([*people.values(), *items.values()]))}

    def measured(read: Reader) -> list[list[float]]:
        draws = range(chosen.draws)
        return [
            [new_people(frame, people, read, draw) for draw in draws],
            [new_items(frame, items, read, draw) for draw in draws],
        ]

    without = measured(None)
    print("| layers | new people, NDCG@100 | new items, NDCG@20 |\n| --- | --- | --- |")
    print(f"| TF-IDF alone | {' | '.join(shown(summary(values)) for values in without)} |", flush=True)
    there = whole.model.config.num_hidden_layers
    for layers in [*(number for number in LAYERS if number < there), there]:
        encoder = open_text_encoder(replace(recipe.text_encoder, layers=layers))
        assert encoder is not None
        states = encoder(list(places)).numpy()
        found = measured(lambda texts, states=states: states[[places[text] for text in texts]])  # type: ignore[misc]
        cells = [
            f"{shown(summary(values))}, {shown(summary([a - b for a, b in zip(values, others, strict=True)]), '+')}"
            for values, others in zip(found, without, strict=True)
        ]
        print(f"| {layers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
