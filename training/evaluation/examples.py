"""Histories and what the model recommends for them: what a person reads in the log and strangers on the model's page.

A history of the recipe is its owner's to show; where it gives none, histories are made up and are nobody's.
"""

from typing import Any

import numpy as np
from scipy.sparse import csc_matrix

from configuration.errors import InputError
from configuration.recipe import Recipe
from training.data.corpora import Corpora
from training.evaluation.results import show_recommendations
from training.evaluation.scoring import split_matrix

SHOWN_EXAMPLES, SHOWN_ITEMS = 3, 5
# A made-up history starts at one of so many most popular items and goes on with its nearest neighbours.
POPULAR_ITEMS, NEIGHBOURS = 50, 20


def example_histories(corpora: Corpora, recipe: Recipe) -> list[list[int]]:
    """Item indices of the recipe's example histories; none where it has none.

    Raises:
        InputError: if an example names an item that is not in the catalogue.
    """
    if not recipe.data.examples:
        return []
    index = {item["id"]: j for j, item in enumerate(corpora.items())}
    unknown = [raw for history in recipe.data.examples for raw in history if raw not in index]
    if unknown:
        raise InputError(f"data.examples: no item {unknown[0]!r} is in the catalogue; give raw item ids of the data")
    return [[index[raw] for raw in history] for history in recipe.data.examples]


def made_up_histories(corpora: Corpora, embeddings: np.ndarray) -> list[list[int]]:
    """Item indices of histories of three that nobody has: a popular item and two of its neighbours among the items' directions.

    Args:
        corpora: For popularity, and for the histories that people have.
        embeddings: Of the items, `(items, width)`.
    """
    parts = [split_matrix(corpora, name) for name in ("recommendation", "validation", "test")]
    real = [parts[0].tocsc(), sum(parts[1:], parts[0]).tocsc()]
    popularity = np.diff(real[0].indptr)
    directions = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    starts = np.argsort(-popularity, kind="stable")[:POPULAR_ITEMS]
    known = popularity >= np.median(popularity)
    histories: list[list[int]] = []
    nearest_start = np.full(len(starts), -1.0)
    while len(histories) < SHOWN_EXAMPLES and len(starts):
        # The first start is the most popular item; each next one is the least like those before.
        place = int(nearest_start.argmin())
        start = int(starts[place])
        likeness = np.where(known, directions @ directions[start], -np.inf)
        likeness[start] = -np.inf
        near = np.argsort(-likeness, kind="stable")[: min(NEIGHBOURS, np.count_nonzero(np.isfinite(likeness)))].tolist()
        trios = ([start, first, second] for second in near[1:] for first in near[: near.index(second)])
        history = next((trio for trio in trios if not any(is_somebodys(trio, matrix) for matrix in real)), None)
        if history is not None:
            histories.append(history)
        nearest_start = np.maximum(nearest_start, directions[starts] @ directions[start])
        starts, nearest_start = np.delete(starts, place), np.delete(nearest_start, place)
    return histories


def is_somebodys(history: list[int], matrix: csc_matrix) -> bool:
    """Whether a user of `(num_users, num_items)` has exactly these items."""
    having = np.asarray(matrix[:, history].sum(axis=1)).ravel() == len(history)
    return bool((np.asarray(matrix.sum(axis=1)).ravel()[having] == len(history)).any())


def example_recommendations(model: Any, corpora: Corpora, histories: list[list[int]]) -> list[dict[str, Any]]:
    """What the model recommends to nobody known with these histories, as the pipeline gives it.

    Returns:
        For each `history` (raw item ids), with `indices` and `titles` of its items, the best `items`: `item` (raw id),
        `title`, `score` and `rank`.
    """
    items = corpora.items()
    best = model.recommend(histories, k=SHOWN_ITEMS) if histories else None
    return [
        {
            "history": [items[j]["id"] for j in history],
            "titles": [items[j]["title"] for j in history],
            "indices": history,
            "items": [
                {"item": items[j]["id"], "title": items[j]["title"], "score": score, "rank": rank}
                for rank, (j, score) in enumerate(zip(row, scores, strict=True), 1)
                if j >= 0
            ],
        }
        for history, row, scores in zip(
            histories, *((best.items.tolist(), best.scores.tolist()) if best else ([], [])), strict=True
        )
    ]


def show_examples(examples: list[dict[str, Any]], corpora: Corpora) -> str:
    """Examples as a person reads them in the log."""
    items = {item["id"]: item for item in corpora.items()}
    return "\n\n".join(
        show_recommendations(
            [items[raw] for raw in example["history"]],
            [(items[best["item"]], best["score"]) for best in example["items"]],
        )
        for example in examples
    )
