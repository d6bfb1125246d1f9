"""People and items never seen in training, on the embedded sample: how well they are served, and what an explanation is worth.

python benchmarks/newcomers.py                 three draws, two trainings for each figure's model; about ten minutes on two cores
python benchmarks/newcomers.py --draws 1 finetune.epochs=3    a first look
python benchmarks/newcomers.py --draws 0       explanations alone
python benchmarks/newcomers.py text_encoder.name=NAME         a pretrained text encoder reads the texts, too

A fifth of the projects is held out whole, and a model is trained without them, as one that is published: validation makes the choices, and a
refit learns from all pairs. They are served from their description alone (NDCG@100
of all their libraries), from a random half of their libraries (NDCG@100 of the other half), and from both. Then a fifth of the libraries
is held out and added afterwards by their descriptions (NDCG@20 of ranking them among themselves, for the projects that need one).
References have the same information. Printed are means over the draws with their standard deviation and, where the default recipe's
figures of the same draws are in benchmarks/results/newcomers.json, the difference to them within a draw. --write puts the figures there.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from benchmarks.claims import RESULTS
from configuration.load import load_recipe
from configuration.recipe import Recipe
from modeling_cllm4rec import CLLM4RecForRecommendation
from modeling_cllm4rec.text_cllm4rec import words_of
from modeling_cllm4rec.text_encoder_cllm4rec import text_encoder_of
from training.data.corpora import open_corpora
from training.data.readers import read_tables
from training.evaluation.baselines import Settings, fit_ials
from training.evaluation.scoring import split_matrix
from training.files import write_text
from training.finetune import finetune
from training.predict import predict
from training.pretrain import pretrain
from training.run import Run
from training.stages.teacher import fitted_ials
from training.stages.terms import tf_idf
from training.stages.text_map import RIDGES, STATE_WEIGHTS, Ridge

SHARE, EASE_PENALTY, EXPLAINED = 0.2, 100.0, 500
FIFTHS, FOLD_IN_WEIGHTS = 5, (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of a ridge from texts beside iALS
UNSHOWN = ("evaluation.baselines=[]", "data.examples=[]")  # examples may name items that are held out
Figures = dict[str, float]


def ndcg(scores: np.ndarray, wanted: np.ndarray, k: int) -> float:
    """Mean NDCG@k over the rows that want something; the ideal is cut at what is wanted."""
    some = wanted.any(1)
    scores, wanted = scores[some], wanted[some]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    discount = 1 / np.log2(np.arange(best.shape[1]) + 2)
    gain = (np.take_along_axis(wanted, best, 1) * discount).sum(1)
    ideal = np.cumsum(discount)[np.minimum(wanted.sum(1), best.shape[1]).astype(int) - 1]
    return float((gain / ideal).mean())


def held_out(values: pd.Series, rng: np.random.Generator) -> list[str]:
    """A fifth of the distinct values, ascending."""
    distinct = np.array(sorted(values.unique()))
    return sorted(rng.permutation(distinct)[: int(len(distinct) * SHARE)])


def trained(recipe: Recipe, frame: pd.DataFrame) -> tuple[CLLM4RecForRecommendation, Run]:
    """The recipe trained on what is not held out, with the sample's validation pairs for its choices, then refitted on all of that."""
    trains = frame["split"] != "validation"
    alone = ~frame["user"].isin(frame["user"][trains])
    frame = frame.assign(split=np.where(trains | alone, "train", "validation"))
    names = {"user": recipe.data.user_column, "item": recipe.data.item_column}
    for way in (recipe, replace(recipe, refit=True)):
        pretrain(way, frame=frame.rename(columns=names), overwrite=True)
        run = finetune(way, overwrite=True)
        if not way.refit:
            predict(way, overwrite=True)  # a refit follows a finished run
    return CLLM4RecForRecommendation.from_pretrained(run.model).eval(), run


def ridge_scores(
    known: list[str],
    outputs: np.ndarray,
    new: list[str],
    judge: Callable[[np.ndarray], float],
    read: Callable[[list[str]], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for new texts, and those of the known ones by the others, by the ridge that `judge` likes best among leave-one-out predictions of the known ones.

    Args:
        known: Texts.
        outputs: What is known of them, `(known, outputs)`.
        new: Texts.
        judge: Of predictions for the known ones.
        read: Texts to the states of a language model, `(texts, width)`, which are inputs beside the words.
    """
    vocabulary = {word: place for place, word in enumerate(sorted({word for text in known for word in words_of(text)}))}

    def counts(texts: list[str]) -> csr_matrix:
        found = [[vocabulary[word] for word in words_of(text) if word in vocabulary] for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(row) for row in found])
        ones = np.ones(len(rows), np.float32)
        return csr_matrix(
            (ones, (rows, [place for row in found for place in row])), shape=(len(texts), len(vocabulary))
        )

    inputs, rarity = tf_idf(counts(known))
    others = tf_idf(counts(new), rarity)[0]
    if read is None:
        best = max((Ridge.fit(inputs, outputs, ridge) for ridge in RIDGES), key=lambda fitted: judge(fitted.left_out))
        return others @ best.coefficients + best.mean, best.left_out
    states, new_states = read(known), read(new)
    # Of some encoders a number is the same for all texts.
    mean, spread = states.mean(0), np.maximum(states.std(0), 1e-6)
    states, new_states = ((found - mean) / spread for found in (states, new_states))
    states, new_states = (found / np.linalg.norm(found, axis=1, keepdims=True) for found in (states, new_states))
    tried = (
        Ridge.fit(inputs, outputs, ridge, states, weight) for ridge, weight in itertools.product(RIDGES, STATE_WEIGHTS)
    )
    best = max(tried, key=lambda fitted: judge(fitted.left_out))
    of_words, of_states = np.split(best.coefficients, [inputs.shape[1]])
    return others @ of_words + new_states @ of_states + best.mean, best.left_out


def fold_in(items: np.ndarray, settings: Settings, given: np.ndarray) -> np.ndarray:
    """The scores `(people, items)` that iALS gives people whom it does not know, from what they chose (Hu, Koren and Volinsky, eq. 4).

    Args:
        items: `(items, factors)`, fitted without them.
        settings: What iALS was fitted with.
        given: `(people, items)`, 1 where they chose.
    """
    items, alpha = items.astype(np.float64), float(settings["alpha"])
    gram = items.T @ items + float(settings["regularization"]) * np.eye(items.shape[1])
    people = []
    for row in given:
        chosen = items[row > 0]
        people.append(np.linalg.solve(gram + (alpha - 1) * chosen.T @ chosen, alpha * chosen.sum(0)))
    return np.array(people) @ items.T


def folded_out(settings: Settings, whole: np.ndarray, given: np.ndarray, seed: int) -> np.ndarray:
    """Scores of people as if each were new: iALS is fitted without a fifth of them at a time, who are then folded in.

    Args:
        settings: Of iALS.
        whole: `(people, items)`, 1 where they chose.
        given: What each is folded in from, alike.
        seed: Of iALS and of the fifths.
    """
    scores = np.empty(whole.shape)
    for fifth in np.array_split(np.random.default_rng(seed).permutation(len(whole)), FIFTHS):
        others = np.setdiff1d(np.arange(len(whole)), fifth)
        items = fit_ials(csr_matrix(whole[others]), seed=seed, **settings)[1]
        scores[fifth] = fold_in(items, settings, given[fifth])
    return scores


def halves(rng: np.random.Generator, whole: np.ndarray) -> np.ndarray:
    """A random half `(people, items)` of what each chose."""
    given = np.zeros_like(whole)
    for row, chosen in enumerate(whole):
        items = rng.permutation(np.flatnonzero(chosen))
        given[row, items[: len(items) // 2]] = 1
    return given


def other_half(scores: np.ndarray, given: np.ndarray, whole: np.ndarray) -> float:
    """NDCG@100 of what was not given."""
    return ndcg(np.where(given > 0, -np.inf, scores), whole - given, 100)


def readers(model: CLLM4RecForRecommendation) -> dict[str, Callable[[list[str]], np.ndarray] | None]:
    """What ridge regression reads of a text: its words, and what the model's text encoder makes of it where there is one."""
    if not model.config.text_state_width:
        return {"TF-IDF": None}
    encoder = text_encoder_of(model)
    return {"TF-IDF": None, "TF-IDF and the text encoder": lambda texts: encoder(texts).numpy()}


def new_people(recipe: Recipe, frame: pd.DataFrame, descriptions: dict[str, str], draw: int) -> Figures:
    """A fifth of the users, held out whole; all pairs of the others are training pairs."""
    rng = np.random.default_rng(draw)
    out = held_out(frame["user"], rng)
    rest = frame[~frame["user"].isin(out)]
    model, run = trained(recipe, rest)
    corpora, ials = open_corpora(run.corpora), fitted_ials(run.checkpoints("teacher"))
    place = {item["id"]: number for number, item in enumerate(corpora.items())}
    libraries = (
        frame[frame["item"].isin(place)].groupby("user")["item"].apply(lambda items: [place[item] for item in items])
    )
    people = [user for user in out if user in libraries.index]
    whole = np.zeros((len(people), corpora.num_items))
    given = np.zeros_like(whole)
    histories = []
    for row, user in enumerate(people):
        items = rng.permutation(libraries[user])
        whole[row, items] = 1
        histories.append(items[: len(items) // 2].tolist())
        given[row, histories[-1]] = 1
    texts = [descriptions[user] for user in people]
    train = split_matrix(corpora, "recommendation")
    known = [user["text"] for user in corpora.users()]
    dense = train.toarray()
    popularity = np.tile(dense.sum(0), (len(people), 1))
    by_ridge = {
        name: ridge_scores(known, dense, texts, lambda left_out: ndcg(left_out, dense, 100), read)
        for name, read in readers(model).items()
    }
    by_ials: Figures = {}
    if ials is not None:
        assert ials.factors is not None
        folded = fold_in(ials.factors[1], ials.settings, given)
        by_ials["people, half of the history: iALS fold-in"] = other_half(folded, given, whole)
        # What the texts weigh is chosen on the others, from half of their history, each as if it were new to iALS and to the ridge.
        halved = halves(np.random.default_rng(draw), dense)
        known_folded = folded_out(ials.settings, dense, halved, recipe.seed)
        for name, (new, left_out) in by_ridge.items():
            weight = max(FOLD_IN_WEIGHTS, key=lambda each: other_half(known_folded + each * left_out, halved, dense))
            label = f"people, half and description: iALS fold-in and ridge from {name}"
            by_ials[label] = other_half(folded + weight * new, given, whole)
    inverse = np.linalg.inv(dense.T @ dense + EASE_PENALTY * np.eye(corpora.num_items))
    ease = -inverse / np.diag(inverse)
    np.fill_diagonal(ease, 0)

    def ours(histories: list[list[int]] | None, texts: list[str] | None) -> np.ndarray:
        return model.item_logits(model.query_states(histories, None, texts)).detach().numpy()

    return {
        "people, description alone: ours": ndcg(ours(None, texts), whole, 100),
        **{
            f"people, description alone: ridge from {name}": ndcg(new, whole, 100)
            for name, (new, _) in by_ridge.items()
        },
        "people, description alone: popularity": ndcg(popularity, whole, 100),
        "people, half of the history: ours": other_half(ours(histories, None), given, whole),
        "people, half of the history: EASE": other_half(given @ ease, given, whole),
        "people, half of the history: popularity": other_half(popularity, given, whole),
        **by_ials,
        "people, half and description: ours": other_half(ours(histories, texts), given, whole),
    }


def new_items(recipe: Recipe, frame: pd.DataFrame, descriptions: dict[str, str], draw: int) -> Figures:
    """A fifth of the items, held out and added by their descriptions."""
    rng = np.random.default_rng(100 + draw)
    out = held_out(frame["item"], rng)
    rest = frame[~frame["item"].isin(out)]
    model, run = trained(recipe, rest)
    corpora = open_corpora(run.corpora)
    people = {user["id"]: number for number, user in enumerate(corpora.users())}
    wanted = np.zeros((corpora.num_users, len(out)))
    held = frame[frame["item"].isin(out) & frame["user"].isin(people)]
    wanted[[people[user] for user in held["user"]], [out.index(item) for item in held["item"]]] = 1
    users, histories = corpora.histories("recommendation")
    texts = [descriptions[item] for item in out]
    known = [item["text"] for item in corpora.items()]
    dense = split_matrix(corpora, "recommendation").toarray()
    by_ridge = {
        name: ridge_scores(known, dense.T, texts, lambda left_out: ndcg(left_out.T, dense, 100), read)[0].T
        for name, read in readers(model).items()
    }
    new = model.add_items(texts)
    states = model.query_states([row.tolist() for row in histories], users.tolist())
    scores = model.item_logits(states)[:, new.start :].detach().numpy()
    return {
        "items never seen: ours": ndcg(scores, wanted[users], 20),
        **{
            f"items never seen: ridge from {name}": ndcg(found[users], wanted[users], 20)
            for name, found in by_ridge.items()
        },
        "items never seen: random": ndcg(rng.random(scores.shape), wanted[users], 20),
    }


def explanations(model: CLLM4RecForRecommendation, run: Run) -> Figures:
    """What the item named first counts for the best one, against a random other of the history; and an explanation's time.

    It is named since the best item loses most without it, so it fails to count more only where nothing is lost. Whether it also leads to
    the best item alone, more than the other alone, is another question.
    """
    users, histories = open_corpora(run.corpora).histories("recommendation")
    rng = np.random.default_rng(0)
    lost, led, times = [], [], []
    for row in rng.permutation(np.flatnonzero(histories.lengths > 1))[:EXPLAINED]:
        history, user = histories[row].tolist(), int(users[row])
        started = time.perf_counter()
        best = int(model.recommend([history], [user], k=1).items[0, 0])
        one = time.perf_counter() - started
        effects = model.history_effects(history, [best], user)[0]
        times.append((time.perf_counter() - started - one) / one)
        named = int(effects.argmax())
        other = int(rng.choice([place for place in range(len(history)) if place != named]))
        lost.append(float(effects[named] > max(float(effects[other]), 0.0)))
        alone = model.item_logits(model.query_states([[history[named]], [history[other]]])).log_softmax(-1)[:, best]
        led.append(float(alone[0] > alone[1]))
    return {
        "explanations: the named item counts more than a random one, share": statistics.mean(lost),
        "explanations: the named item alone leads to it more than a random one alone, share": statistics.mean(led),
        "explanations: time ÷ a recommendation's, median": statistics.median(times),
    }


def measure(method: str, draws: int, overrides: list[str], folder: Path) -> Iterator[Figures]:
    """The figures of each draw; those of explanations are of the whole sample, in the first."""
    recipe = load_recipe(
        "sample",
        method,
        [f"output_dir={folder}", "tracker=none", "name=newcomers", *UNSHOWN, *overrides],
    )
    tables = read_tables(recipe.data)
    assert tables.users is not None
    assert tables.items is not None
    people, items = (
        dict(zip(table[kind], table["text"], strict=True))
        for table, kind in ((tables.users, "user"), (tables.items, "item"))
    )
    for draw in range(max(draws, 1)):
        figures = {} if draw else explanations(*trained(recipe, tables.interactions))
        if not draws:
            yield figures
            return
        figures |= new_people(recipe, tables.interactions, people, draw)
        yield figures | new_items(recipe, tables.interactions, items, draw)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="default", help="recipe of the method (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=3, help="0: explanations alone (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/newcomers.json")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="laid over the recipe")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomers-") as temporary:
        found = list(measure(chosen.method, chosen.draws, chosen.overrides, Path(temporary)))
    rows = {}
    for name in dict.fromkeys(name for figures in found for name in figures):
        rows[name] = summary([figures.get(name) for figures in found])
    path, label = RESULTS / "newcomers.json", " ".join([chosen.method, *chosen.overrides])
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if chosen.write:
        kept = before.get(label, {"figures": {}})["figures"] | rows
        write_text(path, json.dumps(before | {label: {"figures": kept}}, indent=1, ensure_ascii=False) + "\n")
    usual = before.get("default", {"figures": {}})["figures"] if label != "default" else {}
    for name, row in rows.items():
        line = f"{name:<64} {shown(row)}"
        if name in usual and len(usual[name]["draws"]) in (1, len(row["draws"])):  # 1: of explanations alone
            pairs = itertools.zip_longest(row["draws"], usual[name]["draws"])
            differences = summary([None if a is None or b is None else a - b for a, b in pairs])
            line += f"   default {usual[name]['mean']:.3f}, within a draw {shown(differences, '+')}"
        print(line)


def summary(draws: list[float | None]) -> dict[str, Any]:
    """What the file keeps of a figure's values in the draws, None in those that have none."""
    values = [value for value in draws if value is not None]
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": std, "draws": draws}


def shown(row: dict[str, Any], sign: str = "") -> str:
    """A mean and its standard deviation."""
    return f"{row['mean']:{sign}.3f}" + ("" if row["std"] is None else f" ± {row['std']:.3f}")


if __name__ == "__main__":
    main()
