"""`pipeline("recommendation", model=…, trust_remote_code=True)`: raw ids in, ranked items with their titles out.

It reads `items.jsonl` beside the model and, where a folder publishes its users, `users.jsonl`; both hold a line per id, in id order.
"""

import difflib
import itertools
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Pipeline, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

INPUT_KEYS = ("user", "history")
PARAMETERS = ("top_k", "candidates", "exclude_seen", "batch_size", "num_workers")
NEW_PERSON = 'give {"history": [raw item ids]} for somebody without an entry'
MAX_NAMED = 10
LINES_AT_ONCE = 1000


class RecommendationPipeline(Pipeline):
    """Recommends items to a known user, to a history, or to a known user with a newer history.

    An input is `{"user": raw id}`, `{"history": [raw item ids]}` or both; a call takes one, a list or a generator of them.
    A user's training history is the prompt where no history is given; both are left out of the ranking. An id that is a
    number may be given as text, and the other way round.

    Args:
        model: A recommendation head, as `AutoModelForSequenceClassification` opens it.
        items: Path of an `items.jsonl` (`id` and `title` a line); by default it, and `users.jsonl`, are looked for beside
            the model.
        users: Path of a `users.jsonl` (`id` and `history`, item indices, a line).
        top_k (`int`, defaults to 10): How many items; fewer are given where fewer may be shown.
        candidates (list of raw item ids, *optional*): The only items that may be recommended.
        exclude_seen (`bool`, defaults to `True`): Whether the person's items are left out of the ranking.
        batch_size (`int`, defaults to 1): Inputs in one forward pass; the answers do not depend on it.

    `top_k`, `candidates`, `exclude_seen` and `batch_size` may be given here and at each call.

    Returns:
        Per input a list of `{"item": raw id, "title": str, "score": float, "rank": int}`, best first, rank 1; scores are
        probabilities over the whole catalogue, whatever is left out of the ranking.

    Raises:
        ValueError: naming an unknown user, candidate, or key of an input, or a history of which no item is known.
        TypeError: naming an unknown parameter, or a model that cannot recommend.

    Example:
        >>> rec = pipeline("recommendation", model="me/my-recommender", trust_remote_code=True)
        >>> rec({"history": ["python3-numpy", "python3-matplotlib"]}, top_k=1)
        [{'item': 'python3-scipy', 'title': 'scientific library', 'score': 0.13, 'rank': 1}]
    """

    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        items: str | Path | None = None,
        users: str | Path | None = None,
        local_files_only: bool = False,  # the factory leaves it here; the model has kept its own
        **kwargs: Any,
    ) -> None:
        if not hasattr(model, "recommend"):
            raise TypeError(f"{type(model).__name__} cannot recommend; open it with AutoModelForSequenceClassification")
        items_file = Path(items) if items else file_beside(model, "items.jsonl")
        if items_file is None:
            raise ValueError(f"no items.jsonl beside the model {model.name_or_path!r}; give items=path")
        self.items_file, self.publishes_users = items_file, users is None
        self.users_file = Path(users) if users else None if items else file_beside(model, "users.jsonl")
        self.item_ids: list[Any] = []
        self.titles: list[str] = []
        for record in read_records(self.items_file):
            self.item_ids.append(record["id"])
            self.titles.append(record.get("title") or "")
        self.item_index = index_of(self.item_ids, self.items_file, model.config.num_items, "items")
        super().__init__(model, *args, **kwargs)

    @cached_property
    def users(self) -> tuple[dict[Any, int], list[array]]:
        """Raw id to index, and the training history of each user; read when the first user is asked for."""
        assert self.users_file is not None
        records = [(record["id"], array("i", record.get("history") or ())) for record in read_records(self.users_file)]
        index = index_of([raw for raw, _ in records], self.users_file, self.model.config.num_users, "users")
        return index, [history for _, history in records]

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Recommend to one input (a list of items), to a list of them (a list of lists), or to a generator (lazily)."""
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []  # transformers would look at the first
        if isinstance(inputs, Iterator):
            inputs = Stream(inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in parameters:
            if name in ("items", "users"):
                raise TypeError(f'{name} is given once, in pipeline("recommendation", model=…, {name}=path)')
            if name not in PARAMETERS:
                raise TypeError(unknown("parameter", name, PARAMETERS))
        top_k, exclude_seen = parameters.get("top_k", 1), parameters.get("exclude_seen", True)
        if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it is a number of items, at least 1")
        if not isinstance(exclude_seen, bool):
            raise ValueError(f"exclude_seen is {exclude_seen!r}; it is True or False")
        if parameters.get("candidates") is not None:
            indices, strangers = self._find_items(parameters["candidates"], "candidates")
            if strangers:
                raise ValueError(f"candidates that are not in the catalogue: {listed(strangers)}")
            if not indices:
                raise ValueError("candidates is empty, so nothing could be recommended; leave it out for all items")
            parameters["candidates"] = indices
        return {}, parameters, {}

    def preprocess(self, person: Any) -> dict[str, tuple[int | None, tuple[int, ...], tuple[int, ...]]]:
        """User index or None, history and everything seen, of one input.

        They stay one tuple, which transformers' batching puts in a list as it is: the model makes the prompts of a batch,
        so that padding is the same whatever tokenizer is loaded.
        """
        if not isinstance(person, Mapping):
            raise ValueError(f'an input is {{"user": raw id}} or {{"history": [raw item ids]}} or both, not {person!r}')
        for key in person:
            if key not in INPUT_KEYS:
                raise ValueError(unknown("key of an input", key, INPUT_KEYS))
        raw_user, raw_history = (person.get(key) for key in INPUT_KEYS)
        if raw_user is None and raw_history is None:
            raise ValueError('an input needs "user" or "history"; {"history": []} asks for nobody in particular')
        user, trained = (None, ()) if raw_user is None else self._find_user(raw_user)
        history = trained if raw_history is None else self._known_history(raw_history)
        if not self.model.config.user_embeddings:
            user = None  # known by the training history alone
        if user is None and not history:
            logger.warning("The history is empty: this is what the model recommends to nobody in particular.")
        return {"person": (user, history, history + trained)}

    def _forward(self, inputs: dict[str, Any], top_k: int = 10, **options: Any) -> dict[str, Any]:
        people = inputs["person"] if isinstance(inputs["person"], list) else [inputs["person"]]
        users, histories, seen = zip(*people, strict=True)
        ranked = self.model.recommend(histories, users, seen=seen, k=top_k, **options)
        return {"items": ranked.items, "scores": ranked.scores}

    def postprocess(self, ranked: dict[str, Any]) -> list[dict[str, Any]]:
        """Raw ids, titles, scores and ranks of `items` and `scores`, `(1, k)`."""
        best = zip(ranked["items"][0].tolist(), ranked["scores"][0].tolist(), strict=True)
        return [
            {"item": self.item_ids[item], "title": self.titles[item], "score": score, "rank": rank}
            for rank, (item, score) in enumerate(best, 1)
            if item >= 0
        ]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save all that [`pipeline`] opens: model, tokenizer, code and items, and the users where the folder had them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        custom_object_save(self, folder)
        copies = {"items.jsonl": self.items_file, "users.jsonl": self.users_file if self.publishes_users else None}
        for name, file in copies.items():
            if file is not None and file.resolve() != (folder / name).resolve():
                shutil.copyfile(file, folder / name)
        super().save_pretrained(save_directory, **kwargs)

    def _find_user(self, raw: Any) -> tuple[int, tuple[int, ...]]:
        if self.users_file is None:
            raise ValueError(
                f"user {raw!r} cannot be looked up: this model comes without users.jsonl; open it with "
                f'pipeline("recommendation", model=…, users=path) if you have that file, or {NEW_PERSON}'
            )
        users, histories = self.users
        index = find(users, raw)
        if index is None:
            raise ValueError(f"unknown user {raw!r}: it is not in {self.users_file.name}; {NEW_PERSON}")
        return index, tuple(histories[index])

    def _known_history(self, raw_ids: Any) -> tuple[int, ...]:
        history, strangers = self._find_items(raw_ids, "history")
        if strangers and not history:
            raise ValueError(f"no item of the history is in the catalogue: {listed(strangers)}")
        if strangers:
            logger.warning(f"Left out of the history, not in the catalogue: {listed(strangers)}.")
        return tuple(history)

    def _find_items(self, raw_ids: Any, name: str) -> tuple[list[int], list[Any]]:
        """Indices of the known items and raw ids of the others."""
        if isinstance(raw_ids, (str, bytes, Mapping)) or not isinstance(raw_ids, Iterable):
            raise ValueError(f"{name} is {raw_ids!r}; it is a list of raw item ids")
        found = [(raw, find(self.item_index, raw)) for raw in raw_ids]
        return [index for _, index in found if index is not None], [raw for raw, index in found if index is None]


class Stream(IterableDataset):
    """An iterator as what every version of transformers streams; before 5.14 it reads a generator to its end first."""

    def __init__(self, inputs: Iterator[Any]) -> None:
        self.inputs = inputs

    def __iter__(self) -> Iterator[Any]:
        """The inputs, once."""
        return self.inputs


def file_beside(model: PreTrainedModel, name: str) -> Path | None:
    """The file of that name in the folder or repo, at the commit, that the model was loaded from."""
    if not model.name_or_path:
        return None
    file = cached_file(model.name_or_path, name, _raise_exceptions_for_missing_entries=False, **model.download_options)
    return None if file is None else Path(file)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, each an object with an `id`; many are parsed at once, which is faster than one by one.

    Raises:
        ValueError: naming the file and the line that is something else.
    """
    with path.open(encoding="utf-8") as lines:
        for first in itertools.count(1, LINES_AT_ONCE):
            block = list(itertools.islice(lines, LINES_AT_ONCE))
            if not block:
                return
            try:
                records = json.loads(f"[{','.join(block)}]")
            except ValueError:
                records = []
            if len(records) != len(block) or not all(isinstance(record, dict) and "id" in record for record in records):
                records = [read_record(line, path, number) for number, line in enumerate(block, first)]
            yield from records


def read_record(line: str, path: Path, number: int) -> dict[str, Any]:
    """One line; raises as [`read_records`]."""
    try:
        record = json.loads(line)
        record["id"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{path}, line {number}: not a JSON object with an "id"; get the file anew') from error
    return record


def index_of(ids: Sequence[Any], path: Path, count: int, kind: str) -> dict[Any, int]:
    """Raw id to index.

    Raises:
        ValueError: if the file is not the model's.
    """
    index = {raw: position for position, raw in enumerate(ids)}
    if not len(ids) == len(index) == count:
        raise ValueError(
            f"{path} has {len(ids)} lines with {len(index)} different ids, but the model has {count} {kind}; take the file of this model"
        )
    return index


def find(index: Mapping[Any, int], raw: Any) -> int | None:
    """The index of a raw id, or of the same number spelt as text or as a number where only that is an id."""
    try:
        found = index.get(raw)
        if found is None and isinstance(raw, str) and str(int(raw)) == raw:
            found = index.get(int(raw))
    except (TypeError, ValueError):  # what cannot be a key, or no number
        return None
    if isinstance(raw, bool):  # equals 0 or 1, yet nobody's id
        return None
    return index.get(str(raw)) if found is None and isinstance(raw, Integral) else found


def unknown(kind: str, name: Any, known: Sequence[str]) -> str:
    """A sentence that names the nearest right one, and all."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return (
        f"unknown {kind} {name!r}{f', did you mean {nearest[0]!r}?' if nearest else '.'} There are {', '.join(known)}"
    )


def listed(ids: Sequence[Any]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
    return ", ".join(map(repr, ids[:MAX_NAMED])) + more
