"""The records beside a model, `items.jsonl` and `users.jsonl`: read, looked up by raw id, changed with the model, written.

Both files hold a JSON object per line, in id order: `id`, `title` and `text` of an item; `id` and `history`, item indices, of a user.
"""

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
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .text_cllm4rec import item_text

if TYPE_CHECKING:
    from .modeling_cllm4rec import CLLM4RecForRecommendation

logger = logging.get_logger(__name__)

NEW_PERSON = 'give {"history": [raw item ids]} or {"text": "…"} for somebody without an entry'
MAX_NAMED = 10
LINES_AT_ONCE = 1000


class CatalogueRecords:
    """The items and users of a model by their raw ids.

    Args:
        model: Whose they are; a change of the catalogue changes it in place. An attribute, for who puts another one in its place.
        items_file: Path of `items.jsonl`.
        users_file: Path of `users.jsonl`, if there is one.
        publishes_users: Whether the users are written beside the items, or belong to whoever gave their path.

    Attributes:
        item_ids: Raw id of each item.
        titles: Of each item, empty where it has none.
        is_changed: Whether items or users have come or gone since the files were read.
        untrained: Indices of users who came after training; known once the users have been read.

    Raises:
        ValueError: if `items_file` is not the model's.
    """

    def __init__(
        self, model: "CLLM4RecForRecommendation", items_file: Path, users_file: Path | None, *, publishes_users: bool
    ) -> None:
        self.model, self.items_file, self.users_file = model, items_file, users_file
        self.publishes_users = publishes_users
        self.is_changed = self.users_changed = False
        self.untrained: set[int] = set()
        self.item_ids: list[Any] = []
        self.titles: list[str] = []
        for record in read_records(items_file):
            self.item_ids.append(record["id"])
            self.titles.append(record.get("title") or "")
        self.item_index = index_of(self.item_ids, items_file, model.config.num_items, "items")

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """All that `items.jsonl` says of each item; read when the catalogue is changed or an item explained."""
        return list(read_records(self.items_file))

    @cached_property
    def histories(self) -> tuple[dict[Any, int], list[array]]:
        """Raw id to index, and the training history, of each user; read when the first user is asked for.

        Raises:
            ValueError: if the file is not the model's, or of another state of its catalogue.
        """
        assert self.users_file is not None
        ids: list[Any] = []
        histories, untrained = [], set()
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
                untrained.add(place)
        index = index_of(ids, self.users_file, config.num_users, "users")
        self.untrained = untrained
        return index, histories

    @cached_property
    def users(self) -> list[dict[str, Any]]:
        """All that `users.jsonl` says of each user; read when users come or go.

        Raises:
            ValueError: if there is none, or as `histories`.
        """
        if self.users_file is None:
            raise ValueError(
                "this model comes without users.jsonl, so that nobody can tell its users apart; open it with "
                'pipeline("recommendation", model=…, users=path) if you have that file'
            )
        _ = self.histories  # refuses a file that is not the model's
        return list(read_records(self.users_file))

    def text_of(self, item: int) -> str:
        """What training read of an item."""
        return text_of_record(self.items[item])

    def find_user(self, raw: Any) -> tuple[int, tuple[int, ...]]:
        """Index and training history of a user.

        Raises:
            ValueError: naming an unknown user, or a model without users.
        """
        if self.users_file is None:
            raise ValueError(
                f"user {raw!r} cannot be looked up: this model comes without users.jsonl; open it with "
                f'pipeline("recommendation", model=…, users=path) if you have that file, or {NEW_PERSON}'
            )
        index, histories = self.histories
        place = find(index, raw)
        if place is None:
            raise ValueError(f"unknown user {raw!r}: it is not in {self.users_file.name}; {NEW_PERSON}")
        return place, tuple(histories[place])

    def find_items(self, raw_ids: Any, name: str) -> tuple[list[int], list[Any]]:
        """Indices of the known items and raw ids of the others; `name` is what an error calls them."""
        if isinstance(raw_ids, (str, bytes, Mapping)) or not isinstance(raw_ids, Iterable):
            raise ValueError(f"{name} is {raw_ids!r}; it is a list of raw item ids")
        found = [(raw, find(self.item_index, raw)) for raw in raw_ids]
        return [index for _, index in found if index is not None], [raw for raw, index in found if index is None]

    def known_history(self, raw_ids: Any) -> tuple[int, ...]:
        """Indices of a history's items; those that are not in the catalogue are named in a warning.

        Raises:
            ValueError: if none is.
        """
        history, strangers = self.find_items(raw_ids, "history")
        if strangers and not history:
            raise ValueError(f"no item of the history is in the catalogue: {listed(strangers)}")
        if strangers:
            logger.warning(f"Left out of the history, not in the catalogue: {listed(strangers)}.")
        return tuple(history)

    def add_items(self, items: Iterable[Mapping[str, Any]]) -> None:
        """As the pipeline's."""
        records = [{"title": None} | dict(item) for item in items]
        for record in records:
            if record.get("id") is None or not isinstance(record.get("text"), str):
                raise ValueError(f'an item is {{"id": raw id, "title": "…", "text": "…"}}, not {record!r}')
            record["id"] = plain_id(record["id"])
            title = record["title"]
            record["title"] = None if title is None or title != title else str(title)  # NaN: of a data frame
        check_new([record["id"] for record in records], self.item_index, "item")
        known = self.items
        indices = self.model.add_items([text_of_record(record) for record in records])
        for index, record in zip(indices, records, strict=True):
            known.append({"id": record["id"], "title": record["title"], "text": record["text"], "popularity": 0})
            self.item_ids.append(record["id"])
            self.titles.append(record["title"] or "")
            self.item_index[record["id"]] = index
        self.is_changed = True

    def add_users(self, users: Iterable[Mapping[str, Any]]) -> None:
        """As the pipeline's."""
        records = [dict(user) for user in users]
        for record in records:
            if record.get("id") is None:
                raise ValueError(f'a user is {{"id": raw id, "history": [raw item ids]}}, not {record!r}')
            record["id"] = plain_id(record["id"])
        known = self.users
        index, all_histories = self.histories
        check_new([record["id"] for record in records], index, "user")
        given = [record.get("history") for record in records]
        histories = [() if history is None else self.known_history(history) for history in given]
        places = self.model.add_users(len(records))
        for place, record, history in zip(places, records, histories, strict=True):
            known.append({"id": record["id"], "history": list(history), "untrained": True})
            self.untrained.add(place)
            index[record["id"]] = place
            all_histories.append(array("i", history))
        self._mark("users added", places)

    def remove_items(self, items: Iterable[Any]) -> None:
        """As the pipeline's."""
        gone, strangers = self.find_items(items, "items")
        if strangers:
            raise ValueError(f"items that are not in the catalogue: {listed(strangers)}")
        records = self.items
        users = self.users if self.users_file is not None else []
        histories = self.histories[1] if users else []
        moved = self.model.remove_items(gone).tolist()
        self.items = [record for record, place in zip(records, moved, strict=True) if place >= 0]
        self.item_ids = [record["id"] for record in self.items]
        self.titles = [record.get("title") or "" for record in self.items]
        self.item_index = {raw: place for place, raw in enumerate(self.item_ids)}
        for place, record in enumerate(users):
            kept = [moved[item] for item in record.get("history") or () if moved[item] >= 0]
            record["history"], histories[place] = kept, array("i", kept)
        self._mark("items removed", gone)

    def remove_users(self, users: Iterable[Any]) -> None:
        """As the pipeline's."""
        records, (index, histories) = self.users, self.histories
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
        self._mark("users removed", places)

    def _mark(self, change: str, places: Iterable[int]) -> None:
        """Mark the state of the catalogue, where the users' records follow a change.

        The same changes of the same model give the same mark, so that they can be made where the users' file is, and where it is not.

        Args:
            change: What was done to the records of users.
            places: Indices of the items or users.
        """
        self.is_changed = True
        config, changed = self.model.config, sorted(set(places))
        if changed:
            state = json.dumps([config.catalogue, change, changed, self.item_ids])
            config.catalogue = sha256(state.encode()).hexdigest()[:16]
            self.users_changed = self.users_file is not None

    def check_users_are_kept(self) -> None:
        """Refuse to save what would lose users who came by a path.

        Raises:
            ValueError: if they have changed and were not written.
        """
        if self.users_changed and not self.publishes_users:
            raise ValueError(
                f"the users of {self.users_file} have changed, and their records would be lost; give the path to write them to, "
                "save_pretrained(folder, users=PATH)"
            )

    def marked_users(self) -> list[dict[str, Any]]:
        """The users' records, the first of them with the mark of the catalogue, where it has one."""
        first, *others = self.users
        mark = self.model.config.catalogue
        return [first if mark is None else first | {"catalogue": mark}, *others]

    def write(self, folder: Path) -> None:
        """Write `items.jsonl`, and `users.jsonl` where users are published; files that did not change are copied."""
        for name, file in {"items.jsonl": self.items_file, "users.jsonl": self.users_file}.items():
            if file is None or (name == "users.jsonl" and not self.publishes_users):
                continue
            if self.is_changed:
                write_records(folder / name, self.items if name == "items.jsonl" else self.marked_users())
            elif file.resolve() != (folder / name).resolve():
                shutil.copyfile(file, folder / name)

    def write_users(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the marked records of users to a path; they are kept then."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, records)
        self.users_changed = False


def text_of_record(record: Mapping[str, Any]) -> str:
    """What training reads of an item's record."""
    return item_text(record["id"], record.get("title"), record.get("text"))


def check_new(ids: Sequence[Any], known: Mapping[Any, int], kind: str) -> None:
    """Refuse what cannot be a raw id, and what is one already.

    Raises:
        ValueError: naming them.
    """
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


def listed(ids: Sequence[Any]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
    return ", ".join(map(repr, ids[:MAX_NAMED])) + more
