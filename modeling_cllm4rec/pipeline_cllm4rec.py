"""`pipeline("recommendation", model=…, trust_remote_code=True)`: raw ids in, ranked items with their titles out.

It reads `items.jsonl` beside the model and, where a folder publishes its users, `users.jsonl`; both hold a line per id, in id order.
"""

import difflib
import itertools
import json
import math
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Pipeline, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file, logging

from .text_cllm4rec import item_text
from .tokenization_cllm4rec import resize_id_words

logger = logging.get_logger(__name__)

INPUT_KEYS = ("user", "history", "text")
PARAMETERS = ("top_k", "candidates", "exclude", "exclude_seen", "batch_size", "num_workers")
NEW_PERSON = 'give {"history": [raw item ids]} or {"text": "…"} for somebody without an entry'
MAX_NAMED = 10
LINES_AT_ONCE = 1000


class RecommendationPipeline(Pipeline):
    """Recommends items to a known user, to a history, to a sentence, or to what of them is given.

    An input is `{"user": raw id}`, `{"history": [raw item ids]}`, `{"text": "who I am or what I want"}`, or several of them; a call
    takes one, a list or a generator of them. A user's training history is the prompt where no history is given; both are left
    out of the ranking. An id that is a number may be given as text, and the other way round.

    Args:
        model: A recommendation head, as `AutoModelForSequenceClassification` opens it.
        items: Path of an `items.jsonl` (`id` and `title` a line); by default it, and `users.jsonl`, are looked for beside
            the model.
        users: Path of a `users.jsonl` (`id` and `history`, item indices, a line).
        top_k (`int`, defaults to 10): How many items; fewer are given where fewer may be shown.
        candidates (list of raw item ids, *optional*): The only items that may be recommended.
        exclude (list of raw item ids, *optional*): Items that may not; those that are not in the catalogue are passed over.
        exclude_seen (`bool`, defaults to `True`): Whether the person's items are left out of the ranking.
        batch_size (`int`, defaults to 1): Inputs in one forward pass; the answers do not depend on it.

    `top_k`, `candidates`, `exclude`, `exclude_seen` and `batch_size` may be given here and at each call.

    `explain` says what carried an item; `add_items`, `add_users`, `remove_items` and `remove_users` change the catalogue without
    training, and `save_pretrained` or `push_to_hub` keeps the change; the records of users who came by a path are written to
    a path, by `save_pretrained(folder, users=path)`.

    Returns:
        Per input a list of `{"item": raw id, "title": str, "score": float, "rank": int}`, best first, rank 1; scores are
        probabilities over the whole catalogue, whatever is left out of the ranking.

    Raises:
        ValueError: naming an unknown user, candidate, or key of an input, or a history of which no item is known; or that the
            model knows no texts.
        TypeError: naming an unknown parameter, or a model that cannot recommend.

    Example:
        >>> rec = pipeline("recommendation", model="me/my-recommender", trust_remote_code=True)
        >>> rec({"history": ["python3-numpy", "python3-matplotlib"]}, top_k=1)
        [{'item': 'python3-scipy', 'title': 'scientific library', 'score': 0.13, 'rank': 1}]
    """

    tokenizer: Any
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
        self.is_changed = self.users_changed = False
        self.item_ids: list[Any] = []
        self.titles: list[str] = []
        for record in read_records(self.items_file):
            self.item_ids.append(record["id"])
            self.titles.append(record.get("title") or "")
        self.item_index = index_of(self.item_ids, self.items_file, model.config.num_items, "items")
        super().__init__(model, *args, **kwargs)
        if getattr(model, "tokenizer", None) is None:
            model.tokenizer = self.tokenizer  # opened already

    @cached_property
    def users(self) -> tuple[dict[Any, int], list[array]]:
        """Raw id to index, and the training history of each user; read when the first user is asked for.

        Raises:
            ValueError: if the file is not the model's, or of another state of its catalogue.
        """
        assert self.users_file is not None
        ids: list[Any] = []
        histories = []
        self.untrained: set[int] = set()
        config = self.model.config
        for place, record in enumerate(read_records(self.users_file)):
            if place == 0 and record.get("catalogue") != config.catalogue:
                raise ValueError(
                    f"{self.users_file} is of another state of the catalogue than the model: items or users have come or gone "
                    "between them; take the file that save_pretrained(folder, users=path) wrote with this model"
                )
            ids.append(record["id"])
            history = array("i", record.get("history") or ())
            if history and not 0 <= min(history) <= max(history) < config.num_items:
                raise ValueError(
                    f"{self.users_file}, line {place + 1}: the history has an item outside [0, {config.num_items}); take the "
                    "file of this model"
                )
            histories.append(history)
            if record.get("untrained"):
                self.untrained.add(place)
        return index_of(ids, self.users_file, config.num_users, "users"), histories

    @cached_property
    def item_records(self) -> list[dict[str, Any]]:
        """All that `items.jsonl` says of each item; read when the catalogue is changed or an item explained."""
        return list(read_records(self.items_file))

    @cached_property
    def user_records(self) -> list[dict[str, Any]]:
        """All that `users.jsonl` says of each user; read when users come or go."""
        if self.users_file is None:
            raise ValueError(
                "this model comes without users.jsonl, so that nobody can tell its users apart; open it with "
                'pipeline("recommendation", model=…, users=path) if you have that file'
            )
        _ = self.users  # refuses a file that is not the model's
        return list(read_records(self.users_file))

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
        if parameters.get("exclude") is not None:
            parameters["exclude"], _ = self._find_items(parameters["exclude"], "exclude")
        return {}, parameters, {}

    def preprocess(self, person: Any) -> dict[str, tuple[int | None, tuple[int, ...], tuple[int, ...], Any]]:
        """User index or None, history, everything seen, and the text or None, of one input.

        They stay one tuple, which transformers' batching puts in a list as it is: the model makes the prompts of a batch,
        so that padding is the same whatever tokenizer is loaded.
        """
        if not isinstance(person, Mapping):
            raise ValueError(
                f'an input is {{"user": raw id}}, {{"history": [raw item ids]}} or {{"text": "…"}}, or several of them, not {person!r}'
            )
        for key in person:
            if key not in INPUT_KEYS:
                raise ValueError(unknown("key of an input", key, INPUT_KEYS))
        raw_user, raw_history, text = (person.get(key) for key in INPUT_KEYS)
        if raw_user is None and raw_history is None and text is None:
            raise ValueError(
                'an input needs "user", "history" or "text"; {"history": []} asks for nobody in particular'
            )
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text is {text!r}; it is a sentence")
        user, trained = (None, ()) if raw_user is None else self._find_user(raw_user)
        history = trained if raw_history is None else self._known_history(raw_history)
        if not self.model.config.tells_users_apart or (user is not None and user in self.untrained):
            user = None  # known by the history alone
        if user is None and not history and text is None:
            logger.warning("The history is empty: this is what the model recommends to nobody in particular.")
        return {"person": (user, history, history + trained, text)}

    def _forward(self, inputs: dict[str, Any], top_k: int = 10, **options: Any) -> dict[str, Any]:
        people = inputs["person"] if isinstance(inputs["person"], list) else [inputs["person"]]
        users, histories, seen, texts = zip(*people, strict=True)
        ranked = self.model.recommend(histories, users, texts, seen=seen, k=top_k, **options)
        return {"items": ranked.items, "scores": ranked.scores}

    def postprocess(self, ranked: dict[str, Any]) -> list[dict[str, Any]]:
        """Raw ids, titles, scores and ranks of `items` and `scores`, `(1, k)`."""
        best = zip(ranked["items"][0].tolist(), ranked["scores"][0].tolist(), strict=True)
        return [
            {"item": self.item_ids[item], "title": self.titles[item], "score": score, "rank": rank}
            for rank, (item, score) in enumerate(best, 1)
            if item >= 0
        ]

    def save_pretrained(self, save_directory: str | Path, *, users: str | Path | None = None, **kwargs: Any) -> None:
        """Save all that [`pipeline`] opens: model, tokenizer, code and items, and the users where the folder had them.

        Args:
            save_directory: The folder.
            users: Path that the records of users are written to, for `pipeline(…, users=path)`; it may be the one they came
                from. It is needed where they came by a path and items were removed, or users have come or gone.
            kwargs: Passed to transformers.

        Raises:
            ValueError: if `users` is needed and not given, or given to a pipeline that knows no users; before anything is written.
        """
        if users is None:
            self._check_users_are_kept()
        else:
            users_file, records = Path(users), self._marked_users()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        custom_object_save(self, folder)
        # First, since it is the largest: where it cannot be written, what stands beside it still fits what was there.
        super().save_pretrained(save_directory, **kwargs)
        copies = {"items.jsonl": self.items_file, "users.jsonl": self.users_file if self.publishes_users else None}
        for name, file in copies.items():
            if file is not None and self.is_changed:
                write_records(folder / name, self.item_records if name == "items.jsonl" else self._marked_users())
            elif file is not None and file.resolve() != (folder / name).resolve():
                shutil.copyfile(file, folder / name)
        if users is not None:
            users_file.parent.mkdir(parents=True, exist_ok=True)
            write_records(users_file, records)
            self.users_changed = False

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; records of users who came by a path are not pushed.

        Raises:
            ValueError: if they have changed and were not saved, before a repo is made.
        """
        self._check_users_are_kept()
        return super().push_to_hub(*args, **kwargs)

    def explain(self, person: Any, item: Any, *, top_k: int = 3) -> dict[str, Any] | list[dict[str, Any]]:
        """Say what carried an item for a person: by leaving each item of the history out, and by the words of the item's text.

        Args:
            person: An input as for a recommendation.
            item: The raw id of the item, or a list of such: many cost hardly more than one.
            top_k: How many items and words are named, those with the largest effect first.

        Returns:
            `item`, `title`, `score` (its probability), `history`: items `{"item", "title", "effect"}`, the effect being what the
            log-probability loses when that one is left out of the history, in nats; `words`: words of the item's text
            `{"word", "effect"}` that speak for it to this person, by the text map, with what they add to its logit. Only what speaks
            for the item is named. A list of such for a list.

        Raises:
            ValueError: as for a recommendation, and where an item is not in the catalogue.
        """
        if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it is a number of items, at least 1")
        user, history, _, text = self.preprocess(person)["person"]
        indices = []
        for one in item if isinstance(item, list) else [item]:
            index = find(self.item_index, one)
            if index is None:
                raise ValueError(f"item {one!r} is not in the catalogue")
            indices.append(index)
        effects = self.model.history_effects(history, indices, user, text).tolist()
        state = self.model.query_states([history], [user], [text])
        scores = self.model.item_logits(state).float().softmax(-1)[0, indices].tolist()
        found = []
        for index, score, of_history in zip(indices, scores, effects, strict=True):
            carried = sorted(zip(history, of_history, strict=True), key=lambda pair: -pair[1])[:top_k]
            found.append(
                {
                    "item": self.item_ids[index],
                    "title": self.titles[index],
                    "score": score,
                    "history": [
                        {"item": self.item_ids[one], "title": self.titles[one], "effect": effect}
                        for one, effect in carried
                        if effect > 0
                    ],
                    "words": self._words_for(self._item_text(self.item_records[index]), state[0])[:top_k],
                }
            )
        return found if isinstance(item, list) else found[0]

    def add_items(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Take items into the catalogue that have nothing but a text: they are recommended from now on, without training.

        Args:
            items: `{"id", "title" (optional), "text"}` each; of a data frame, `frame.to_dict("records")`. Title and text are
                read together, as in training.

        Raises:
            ValueError: naming what is missing or there already, before anything is changed.
        """
        records = [{"title": None} | dict(item) for item in items]
        for record in records:
            if record.get("id") is None or not isinstance(record.get("text"), str):
                raise ValueError(f'an item is {{"id": raw id, "title": "…", "text": "…"}}, not {record!r}')
            record["id"] = plain_id(record["id"])
            title = record["title"]
            record["title"] = None if title is None or title != title else str(title)  # NaN: of a data frame
        self._check_new([record["id"] for record in records], self.item_index, "item")
        known = self.item_records
        indices = self.model.add_items([self._item_text(record) for record in records])
        for index, record in zip(indices, records, strict=True):
            known.append({"id": record["id"], "title": record["title"], "text": record["text"], "popularity": 0})
            self.item_ids.append(record["id"])
            self.titles.append(record["title"] or "")
            self.item_index[record["id"]] = index
        self._note_change()

    def add_users(self, users: Iterable[Mapping[str, Any]]) -> None:
        """Take users in by their histories: they are known by their id from now on, without training.

        They are served by their history alone, without their token, whose embedding says nothing yet. The token ids of all items move up by the number of new users; indices and raw ids stay.

        Args:
            users: `{"id", "history": [raw item ids]}` each.

        Raises:
            ValueError: naming what is missing or there already, before anything is changed; or that the model has no users.jsonl.
        """
        records = [dict(user) for user in users]
        for record in records:
            if record.get("id") is None:
                raise ValueError(f'a user is {{"id": raw id, "history": [raw item ids]}}, not {record!r}')
            record["id"] = plain_id(record["id"])
        known = self.user_records
        index, all_histories = self.users
        self._check_new([record["id"] for record in records], index, "user")
        given = [record.get("history") for record in records]
        histories = [() if history is None else self._known_history(history) for history in given]
        indices = self.model.add_users(len(records))
        for place, record, history in zip(indices, records, histories, strict=True):
            known.append({"id": record["id"], "history": list(history), "untrained": True})
            self.untrained.add(place)
            index[record["id"]] = place
            all_histories.append(array("i", history))
        self._note_change("users added", indices)

    def remove_items(self, items: Iterable[Any]) -> None:
        """Take items out of the catalogue and out of all histories; nothing of them stays.

        Args:
            items: Raw ids.

        Raises:
            ValueError: naming what is not in the catalogue, before anything is changed.
        """
        gone, strangers = self._find_items(items, "items")
        if strangers:
            raise ValueError(f"items that are not in the catalogue: {listed(strangers)}")
        records = self.item_records
        users = self.user_records if self.users_file is not None else []
        histories = self.users[1] if users else []
        moved = self.model.remove_items(gone).tolist()
        self.item_records = [record for record, place in zip(records, moved, strict=True) if place >= 0]
        self.item_ids = [record["id"] for record in self.item_records]
        self.titles = [record.get("title") or "" for record in self.item_records]
        self.item_index = {raw: place for place, raw in enumerate(self.item_ids)}
        for place, record in enumerate(users):
            kept = [moved[item] for item in record.get("history") or () if moved[item] >= 0]
            record["history"], histories[place] = kept, array("i", kept)
        self._note_change("items removed", gone)

    def remove_users(self, users: Iterable[Any]) -> None:
        """Forget people: their rows in every table, their ids, texts and histories; the others stay where they are.

        What the other tables have learnt from them stays: only training without them takes that away.

        Args:
            users: Raw ids.

        Raises:
            ValueError: naming who is unknown, before anything is changed; or that the model has no users.jsonl.
        """
        records, (index, histories) = self.user_records, self.users
        found = [(raw, find(index, raw)) for raw in users]
        strangers = [raw for raw, place in found if place is None]
        if strangers:
            raise ValueError(f"unknown users: {listed(strangers)}")
        places = [place for _, place in found if place is not None]
        self.model.remove_users(places)
        for place in places:
            index.pop(records[place]["id"], None)
            records[place] = {"id": None, "history": []}
            histories[place] = array("i")
        self._note_change("users removed", places)

    def _check_new(self, ids: Sequence[Any], known: Mapping[Any, int], kind: str) -> None:
        unusable = [
            raw
            for raw in ids
            if not isinstance(raw, (str, int, float))
            or isinstance(raw, bool)
            or (isinstance(raw, float) and not math.isfinite(raw))
        ]
        if unusable:
            raise ValueError(f"ids of {kind}s are strings or numbers, not {listed(unusable)}")
        twice, seen = [], set()
        for raw in ids:
            if raw in seen or find(known, raw) is not None:
                twice.append(raw)
            seen.add(raw)
        if twice:
            raise ValueError(f"{kind}s that are there already: {listed(twice)}")

    def _note_change(self, change: str = "", places: Iterable[int] = ()) -> None:
        """Let the tokenizer follow, remember to write the records anew, and mark the catalogue where the users' records follow.

        The same changes of the same model give the same mark, so that they can be made where the users' file is, and where it is not.

        Args:
            change: What was done to the records of users, if anything.
            places: Indices of the items or users.
        """
        self.is_changed = True
        config, changed = self.model.config, sorted(set(places))
        if changed:
            state = json.dumps([config.catalogue, change, changed, self.item_ids])
            config.catalogue = sha256(state.encode()).hexdigest()[:16]
            self.users_changed = self.users_file is not None
        if self.tokenizer is not None:
            self.tokenizer = resize_id_words(self.tokenizer, num_users=config.num_users, num_items=config.num_items)

    def _marked_users(self) -> list[dict[str, Any]]:
        """The users' records, the first of them with the mark of the catalogue, where it has one."""
        first, *others = self.user_records
        mark = self.model.config.catalogue
        return [first if mark is None else first | {"catalogue": mark}, *others]

    def _check_users_are_kept(self) -> None:
        if self.users_changed and not self.publishes_users:
            raise ValueError(
                f"the users of {self.users_file} have changed, and their records would be lost; give the path to write them to, "
                "save_pretrained(folder, users=PATH)"
            )

    def _item_text(self, record: Mapping[str, Any]) -> str:
        return item_text(record["id"], record.get("title"), record.get("text"))

    def _words_for(self, text: str, state: Any) -> list[dict[str, Any]]:
        """The words of an item's text that add to its logit in this state, the strongest first."""
        text_map = self.model.base.text_map
        effects = {} if text_map is None else text_map.word_effects(text, state)
        ranked = sorted(effects.items(), key=lambda pair: -pair[1])
        return [{"word": word, "effect": effect} for word, effect in ranked if effect > 0]

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


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a line per record under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    index = {raw: position for position, raw in enumerate(ids) if raw is not None}
    forgotten = sum(raw is None for raw in ids)  # who asked to be
    if not len(ids) == len(index) + forgotten == count:
        raise ValueError(
            f"{path} has {len(ids)} lines with {len(index)} different ids, but the model has {count} {kind}; take the file of this model"
        )
    return index


def plain_id(raw: Any) -> Any:
    """A raw id as JSON carries it: whole numbers of any kind as int, others as float where that keeps their value."""
    if isinstance(raw, bool) or not isinstance(raw, Real):
        return raw
    if isinstance(raw, Integral):
        return int(raw)
    return float(raw) if float(raw) == raw else raw


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
