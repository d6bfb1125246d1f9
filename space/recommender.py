"""A trained recommender as any visitor opens it, its catalogue with a search, and the map of its items."""

import json
import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

logger = logging.getLogger("space")

EXAMPLES = 6
# So many items say why they are there, for a history that is not longer than so many.
EXPLAINED, EXPLAINED_HISTORY = 10, 50
SIZES = (5, 10, 20, 50)


class Unavailable(Exception):
    """No recommender can be shown; the message is a sentence for the visitor."""


class Catalogue:
    """Things with an id, a title, a description and a popularity, found by any part of the first three.

    Args:
        records: Dictionaries with `id` and, where known, `title`, `text` and `popularity`, in the model's order.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.ids: list[Any] = []
        self.titles: list[str] = []
        self.texts: list[str] = []
        popularity: list[float] = []
        for record in records:
            self.ids.append(record["id"])
            self.titles.append(str(record.get("title") or record["id"]))
            self.texts.append(str(record.get("text") or ""))
            popularity.append(record.get("popularity") or 0)
        self.popularity = np.array(popularity, dtype=np.float64)
        # An entry without an id is of somebody who was forgotten, and keeps the place alone.
        there = [index for index, raw in enumerate(self.ids) if raw is not None]
        order: list[int] = np.argsort(-self.popularity, kind="stable").tolist()
        self.by_popularity = [index for index in order if self.ids[index] is not None]
        self.of_id = {str(self.ids[index]): index for index in there}
        self._names, self._exact = [], dict[str, list[int]]()
        for index, (raw, title) in enumerate(zip(self.ids, self.titles, strict=True)):
            names = list(dict.fromkeys((words(title), words(str(raw)))))
            self._names.append(f" {' '.join(names)} ")
            for name in names if raw is not None else ():
                self._exact.setdefault(name, []).append(index)
        self._texts = [f" {words(text)} " if text else "" for text in self.texts]

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, index: int) -> str:
        """The title, and the id where it is another."""
        raw = str(self.ids[index])
        return self.titles[index] if raw == self.titles[index] else f"{self.titles[index]} ({raw})"

    def search(self, query: str, limit: int = 8) -> list[int]:
        """The entries that fit a query best; the most popular ones where it is empty.

        A title or id that is the query comes first, then those that begin with it, that have a word which does, that have
        its words in any order, and that have them in the description; the more popular first among equals.
        """
        wanted = words(query)
        if not wanted:
            return [] if query.strip() else self.by_popularity[:limit]
        parts = wanted.split()
        rarest = max(parts, key=len)  # looked for first: most entries are done with after it
        exact = sorted(self._exact.get(wanted, ()), key=lambda index: -self.popularity[index])
        begins, word_begins, all_begin, anywhere = list[int](), list[int](), list[int](), list[int]()
        for index in (index for index in self.by_popularity if rarest in self._names[index]):
            name = self._names[index]
            if name.startswith(f" {wanted}"):
                begins.append(index)
                if len(begins) >= limit:
                    break
            elif f" {wanted}" in name:
                word_begins.append(index)
            elif all(f" {part}" in name for part in parts):
                all_begin.append(index)
            elif all(part in name for part in parts):
                anywhere.append(index)
        found = list(dict.fromkeys((*exact, *begins, *word_begins, *all_begin, *anywhere)))
        if len(found) < limit:
            named = set(found)
            for index in (index for index in self.by_popularity if f" {rarest}" in self._texts[index]):
                if index not in named and all(f" {part}" in self._texts[index] for part in parts):
                    found.append(index)
                    if len(found) >= limit:
                        break
        return found[:limit]


def words(text: str) -> str:
    """Words without case, accents and punctuation, a space between them."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c))))


@dataclass(frozen=True)
class Visit:
    """What a visitor chose: item indices, the oldest first, a user known from training, and how many items to show; and said."""

    history: tuple[int, ...] = ()
    user: int | None = None
    size: int = SIZES[1]
    text: str = ""


@dataclass(frozen=True)
class Ranked:
    """A recommended item, its probability over the whole catalogue, and its rank, from 1; items and words that carried it most."""

    item: int
    score: float
    rank: int
    items: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


class Recommender:
    """A model as `pipeline("recommendation", …)` opens it, its catalogue, its users if it publishes them, and its map.

    Args:
        name: Hub repo or folder.
        revision: Branch, tag or commit of a repo.

    Raises:
        Unavailable: if it cannot be opened.
    """

    def __init__(self, name: str | None, revision: str | None = None) -> None:
        if not name:
            raise Unavailable(
                "No model is chosen: set the variable CLLM4REC_MODEL to a Hub repo such as me/my-recommender, "
                "in a Space under Settings, Variables, and start again."
            )
        self.name, self.revision = name, revision
        self.is_folder = Path(name).is_dir()
        self.title = "/".join(part for part in Path(name).parts[-3:] if part != "/") if self.is_folder else name
        if not self.is_folder and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
            raise Unavailable(
                f"There is no folder {name}: train a model first (make quickstart), or set CLLM4REC_MODEL to a folder that "
                "holds one, or to a Hub repo such as me/my-recommender."
            )
        try:
            self.pipe = pipeline("recommendation", model=name, revision=revision, trust_remote_code=True)
            self.items = Catalogue(read_lines(self.pipe.items_file))
            users = Catalogue(read_lines(self.pipe.users_file)) if self.pipe.users_file else None
            self.users = users if users is not None and users.by_popularity else None
            self.trained = [tuple(history) for history in self.pipe.users[1]] if self.users else []
            self.reads_texts = getattr(self.pipe.model.base, "text_map", None) is not None
            embeddings = self.pipe.model.base.item_embeddings.weight.detach().float().cpu()
        except Exception as error:
            logger.exception("%s cannot be opened", name)
            if self.is_folder:
                raise Unavailable(
                    f"The folder {name} holds no recommender that can be opened: name the model folder of a finished run, "
                    "such as runs/sample/model, in CLLM4REC_MODEL, and start again. The log says what is wrong with it."
                ) from error
            at = f" at {revision}" if revision else ""
            raise Unavailable(
                f"The Hub repo {name}{at} could not be opened as a recommender: check its name in CLLM4REC_MODEL, and, if it "
                "is private, the secret HF_TOKEN, and start again. The log says what went wrong."
            ) from error
        self.map = lay_out(embeddings)
        self.examples = unlike_each_other(embeddings, self.items.by_popularity[: 4 * EXAMPLES], EXAMPLES)

    def rank(self, visit: Visit) -> list[Ranked]:
        """The best items that are not in the history.

        A user's items of training that the visitor took out may be recommended again, so the history is left out here and
        not by the pipeline, which would leave out both.
        """
        person: dict[str, Any] = {"history": [self.items.ids[item] for item in visit.history]}
        if visit.user is not None and self.users is not None:
            person["user"] = self.users.ids[visit.user]
        if visit.text and self.reads_texts:
            person["text"] = visit.text
        seen = set(visit.history)
        ranked = self.pipe(person, top_k=visit.size + len(seen), exclude_seen=False)
        best = [(self.items.of_id[str(found["item"])], found["score"]) for found in ranked]
        best = [(item, score) for item, score in best if item not in seen][: visit.size]
        reasons: list[dict[str, Any]] = [{}] * len(best)
        if len(seen) <= EXPLAINED_HISTORY and (seen or "text" in person):
            asked = [self.items.ids[item] for item, _ in best[:EXPLAINED]]
            reasons[: len(asked)] = self.pipe.explain(person, asked, top_k=2)
        return [
            Ranked(
                item,
                score,
                rank,
                tuple(self.items.of_id[str(one["item"])] for one in reason.get("history", ())),
                tuple(one["word"] for one in reason.get("words", ())),
            )
            for rank, ((item, score), reason) in enumerate(zip(best, reasons, strict=True), 1)
        ]


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@dataclass(frozen=True)
class CatalogueMap:
    """Each item's place, from 0 to 1 to the right and down, and the share of the differences that the two directions hold."""

    places: np.ndarray  # (items, 2)
    explained: float

    def nearest(self, x: float, y: float) -> int:
        """The item whose place is nearest to a point of a picture that is four wide and three high."""
        return int((((self.places - (x, y)) * (4, 3)) ** 2).sum(-1).argmin())


def lay_out(embeddings: torch.Tensor) -> CatalogueMap:
    """The map of a catalogue, with a margin: its embeddings `(items, width)` on two principal components."""
    points, explained = principal_components(embeddings)
    low, span = points.min(0), np.ptp(points, axis=0)
    inside = np.where(span > 1e-12, (points - low) / np.maximum(span, 1e-12), 0.5)
    return CatalogueMap(0.03 + 0.94 * inside, explained)


def principal_components(embeddings: torch.Tensor, chunk: int = 65536) -> tuple[np.ndarray, float]:
    """The embeddings' directions on their first two principal components, and the share of variance these explain.

    Args:
        embeddings: `(items, width)`, float32.
        chunk: Items at a time, so that a large table is never copied as a whole.

    Returns:
        `(items, 2)` float64 and a number from 0 to 1.
    """
    count, width = embeddings.shape
    total, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for part in embeddings.split(chunk):
        directions = torch.nn.functional.normalize(part, dim=-1)
        total += directions.sum(0).double()
        products += (directions.T @ directions).double()
    mean = total / count
    variances, axes = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    axes = axes[:, -2:].flip(-1) if width > 1 else torch.cat([axes, torch.zeros_like(axes)], 1)
    # An axis has no sign of its own: this one makes two runs draw the same map.
    axes *= torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    points = [(torch.nn.functional.normalize(part, dim=-1).double() - mean) @ axes for part in embeddings.split(chunk)]
    variances = variances.clamp(min=0)
    return torch.cat(points).numpy(), float(variances[-2:].sum() / variances.sum().clamp(min=1e-12))


def unlike_each_other(embeddings: torch.Tensor, candidates: Sequence[int], count: int) -> list[int]:
    """Of popular items, the first and then each time the one least like those chosen, so that examples differ."""
    directions = torch.nn.functional.normalize(embeddings[list(candidates)], dim=-1)
    likeness = directions @ directions.T
    chosen = [0]
    while len(chosen) < min(count, len(candidates)):
        nearest = likeness[chosen].amax(0)
        nearest[chosen] = math.inf
        chosen.append(int(nearest.argmin()))
    return [candidates[position] for position in sorted(chosen)]
