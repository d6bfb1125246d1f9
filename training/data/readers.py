"""Raw tables of interactions, items and users from every supported source.

Ids, ratings, times and texts come out clean and typed; filters, splits and the mapping of ids follow in `interactions`.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pandas as pd

import configuration
from configuration.errors import InputError
from configuration.recipe import Data, SideTable
from training.data.hub_files import HUB, HTTPError, fetch, is_on_hub
from training.data.tables import (
    File,
    Table,
    check_columns,
    check_rows,
    first_line,
    raise_damaged,
    read_delimited,
    read_json_lines,
    read_table,
    sha256_of_file,
    sha256_of_frame,
    table_of_arrow,
    table_of_frame,
)

SPLITS = ("train", "validation", "test")

ML_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ML_100K_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"

_PROJECT = Path(configuration.__file__).parent.parent


@dataclass
class RawTables:
    """What was read, before anything is filtered.

    Attributes:
        interactions: Columns user and item (int64, or text), and where the source has them rating (float64), timestamp
            (int64 unix seconds), review (text or None) and split (train, validation, test; missing: not in the split).
        items: Columns item, title and text (empty: none), an item a row; None where there is no such table.
        users: Columns user, title and text, a user a row; None where there is no such table.
        source: SHA-256 of each file that was read, or of a DataFrame's content, by name.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame | None = None
    users: pd.DataFrame | None = None
    source: dict[str, str] = field(default_factory=dict)


def read_tables(data: Data, frame: pd.DataFrame | None = None) -> RawTables:
    """Read the interactions and the tables beside them.

    Args:
        data: Where they are and what their columns are called.
        frame: A DataFrame with the columns named in `data`, read instead of `data.path`.

    Raises:
        InputError: Something is missing, damaged or not what `data` says; names file, row and column.
    """
    if frame is not None:
        table = table_of_frame(frame, _columns(data))
        tables = _from_columns(table, data, {"DataFrame": sha256_of_frame(table.frame)})
    else:
        tables = _READERS[data.format](data)
    if data.items.path is not None:
        tables.items = _side_table(data, "items", tables)
    if data.users.path is not None:
        tables.users = _side_table(data, "users", tables)
    if data.split == "given" and data.split_path is not None:
        tables.interactions["split"] = _given_split(data, tables)
    elif data.split == "given" and "split" not in tables.interactions:
        raise InputError(
            f"data.split is given, but the format {data.format} has no column with a split; "
            "name a table that has one in data.split_path"
        )
    return tables


def free_name(name: str, taken: Collection[str]) -> str:
    """A file's name, with a number behind it where it is taken: that of its folder may be private."""
    names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _read_table_file(data: Data) -> RawTables:
    path, name = _locate(data.path, "data.path")
    return _from_columns(read_table(path, name, _columns(data)), data, _hashes(path))


def _read_dataset(data: Data) -> RawTables:
    """Read a dataset of the Hub, or a folder that `save_to_disk` wrote or `load_dataset` understands."""
    import datasets  # slow to import, and no other format needs it

    if data.path is None:
        raise InputError("data.path is not set; name a dataset of the Hub or a folder")
    given = data.path.removeprefix(f"{HUB}datasets/")
    local = _find(given)
    name, revision = str(local or given), None
    if local is None and "@" in given:
        name, _, revision = given.partition("@")
    saved = local is not None and any((local / mark).exists() for mark in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                splits = list(found) if data.dataset_split == "all" else data.dataset_split.split("+")
                for split in splits:
                    if split not in found:
                        raise ValueError(f"it has no split {split!r} but {', '.join(found)}")
                found = datasets.concatenate_datasets([found[split] for split in splits])
        else:
            found = datasets.load_dataset(name, split=data.dataset_split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HTTPError) as error:
        # What went wrong with a file of the folder is the cause of a general sentence.
        reason = first_line(error.__cause__ or error)
        remedy = "check data.path and data.dataset_split"
        if local is None:
            remedy += ", and run `hf auth login` where the repo is private"
        raise InputError(f"{data.path}: the dataset cannot be opened ({reason}); {remedy}") from error
    columns = _columns(data)
    check_columns(data.path, found.column_names, columns)
    content = found.select_columns(list(columns)).with_format("arrow")[:]
    table = table_of_arrow(content, data.path, columns)
    return _from_columns(table, data, {Path(data.path).name: sha256_of_frame(table.frame)})


def _read_ml_100k(data: Data) -> RawTables:
    """Read MovieLens 100K from its folder or zip; where there is neither, fetch the zip from GroupLens."""
    if data.path is None:
        raise InputError("data.path is not set; name the folder or zip of ml-100k, or where its zip shall be put")
    path = fetch(data.path, "data.path") if is_on_hub(data.path) else _find(data.path)
    if path is None:
        path = Path(data.path).expanduser()
        _download(ML_100K_URL, ML_100K_SHA256, path)
    members = ("u.data", "u.item", "u.user", "u.genre")
    files = {member: _ml_100k_file(path, data.path, member) for member in members}
    ratings = read_delimited(
        files["u.data"], "\t", dict.fromkeys(["user", "item", "rating", "timestamp"], "ml-100k"),
        header=["user", "item", "rating", "timestamp"], quoting=False,
    )  # fmt: skip
    interactions = _interactions(ratings, "user", "item", rating="rating", timestamp="timestamp")
    genres = [line.split("|")[0].strip() for _, line in files["u.genre"].lines()]
    source = _hashes(path) if path.is_file() else {m: sha256_of_file(path / m) for m in members}
    return RawTables(interactions, _films(files["u.item"], genres), _viewers(files["u.user"]), source)


def _films(file: File, genres: list[str]) -> pd.DataFrame:
    """Title and genres of each film of u.item."""
    header = ["item", "title", "released", "video", "url", *genres]
    table = read_delimited(
        file, "|", dict.fromkeys(["item", "title", *genres], "ml-100k"), header, encoding="latin-1", quoting=False
    )
    names = np.array(genres, dtype=object)
    flags = (table.frame[genres].to_numpy(dtype=object) == "1") & (names != "unknown")
    titles = [title or "" for title in table.texts("title")]
    texts = [_sentences([title, ", ".join(names[row])]) for title, row in zip(titles, flags, strict=True)]
    return pd.DataFrame({"item": _unique_ids(table, "item"), "title": titles, "text": texts})


def _viewers(file: File) -> pd.DataFrame:
    """Age, gender and occupation of each user of u.user."""
    header = ["user", "age", "gender", "occupation", "zip"]
    table = read_delimited(file, "|", dict.fromkeys(header[:4], "ml-100k"), header, quoting=False)
    gender = table.frame["gender"].replace({"M": "male", "F": "female"})
    texts = table.frame["age"] + " years old, " + gender + ", occupation " + table.frame["occupation"]
    ids = _unique_ids(table, "user")
    return pd.DataFrame({"user": ids, "title": ids.astype(str), "text": texts.fillna("")})


def _ml_100k_file(path: Path, name: str, member: str) -> File:
    if path.is_dir():
        if not (path / member).is_file():
            raise InputError(f"{name}: the folder has no file {member}; data.path must be the unpacked ml-100k.zip")
        return File.on_disk(path / member, f"{name}/{member}")
    try:
        with zipfile.ZipFile(path) as archive:
            inner = next((entry for entry in archive.namelist() if Path(entry).name == member), None)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{name} is truncated or not a zip ({error}); remove it to fetch it again") from error
    if inner is None:
        raise InputError(f"{name}: the zip has no file {member}; data.path must be ml-100k.zip")
    return File(f"{name}/{member}", lambda: cast(BinaryIO, zipfile.ZipFile(path).open(inner)))


def _download(url: str, sha256: str, path: Path) -> None:
    """Fetch a file under a temporary name; it takes its own once its SHA-256 is right."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as target:
            shutil.copyfileobj(response, target)
        found = sha256_of_file(partial)
        if found != sha256:
            raise InputError(f"{url} has SHA-256 {found}, not {sha256}; put the original file at {path}")
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path} does not exist and {url} cannot be fetched ({error}); fetch it elsewhere and put it at {path}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _read_amazon_reviews(data: Data) -> RawTables:
    """Read reviews of the 2014, 2018 or 2023 release; where a review has no text, its summary stands for it."""
    path, name = _locate(data.path, "data.path")
    columns = {
        "user": ("reviewerID", "user_id"),
        "item": ("parent_asin", "asin"),  # 2023: variants of an item share their parent, which its metadata describe
        "rating": ("overall", "rating"),
        "timestamp": ("unixReviewTime", "timestamp"),
        "text": ("reviewText", "text"),
        "summary": ("summary", "title"),
    }
    fields = dict.fromkeys(columns, "format amazon-reviews")
    table = read_json_lines(
        File.on_disk(path, name), columns, fields, optional=["rating", "timestamp", "text", "summary"]
    )
    there = table.frame.columns
    interactions = _interactions(
        table, "user", "item",
        rating="rating" if "rating" in there else None,
        timestamp="timestamp" if "timestamp" in there else None,
    )  # fmt: skip
    texts, summaries = (
        table.texts(column) if column in there else [None] * len(table) for column in ("text", "summary")
    )
    if "text" in there or "summary" in there:
        reviews = [text or summary for text, summary in zip(texts, summaries, strict=True)]
        interactions["review"] = pd.Series(reviews, dtype=object)
    return RawTables(interactions, source=_hashes(path))


def _read_sequences(data: Data) -> RawTables:
    """Read a line a user: the user, then items in order of time."""
    path, name = _locate(data.path, "data.path")
    users: list[str] = []
    items: list[list[str]] = []
    lines: list[int] = []
    for number, line in File.on_disk(path, name).lines():
        user, *history = line.split()
        if not history:
            raise InputError(f"{name}, row {number}: the user {user!r} has no items; add them or remove the row")
        users.append(user)
        items.append(history)
        lines.append(number)
    check_rows(name, users)
    lengths = [len(history) for history in items]
    rows = np.repeat(lines, lengths)
    frame = pd.DataFrame({"user": np.repeat(users, lengths), "item": np.concatenate(items)})
    table = Table(frame, name, lambda position: f"row {rows[position]}", untyped=True)
    return RawTables(_interactions(table, "user", "item"), source=_hashes(path))


_READERS: dict[str, Callable[[Data], RawTables]] = {
    "table": _read_table_file,
    "ml-100k": _read_ml_100k,
    "amazon-reviews": _read_amazon_reviews,
    "sequences": _read_sequences,
    "dataset": _read_dataset,
}


def _columns(data: Data) -> dict[str, str]:
    """Name the columns of interactions that are read, each with its field of the recipe."""
    fields = ["user_column", "item_column", "rating_column", "timestamp_column", "review_column"]
    if data.split == "given" and data.split_path is None:
        fields.append("split_column")
    return {getattr(data, name): f"data.{name}" for name in fields if getattr(data, name) is not None}


def _from_columns(table: Table, data: Data, source: dict[str, str]) -> RawTables:
    interactions = _interactions(
        table, data.user_column, data.item_column, data.rating_column, data.timestamp_column, data.review_column
    )
    if data.split == "given" and data.split_path is None:
        interactions["split"] = _split_names(table, data.split_column)
    return RawTables(interactions, source=source)


def _interactions(
    table: Table,
    user: str,
    item: str,
    rating: str | None = None,
    timestamp: str | None = None,
    review: str | None = None,
) -> pd.DataFrame:
    columns: dict[str, Any] = {"user": table.ids(user), "item": table.ids(item)}
    if rating is not None:
        columns["rating"] = table.numbers(rating)
    if timestamp is not None:
        columns["timestamp"] = table.unix_seconds(timestamp)
    if review is not None:
        columns["review"] = pd.Series(table.texts(review), dtype=object)
    return pd.DataFrame(columns)


def _split_names(table: Table, column: str) -> pd.Series:
    names = table.cells(column).astype(object)
    wrong = ~names.isin(SPLITS).to_numpy()
    if wrong.any():
        position = int(np.argmax(wrong))
        raise table.error(position, column, f"{names.iloc[position]!r} is no split; it must be {', '.join(SPLITS)}")
    return names


def _given_split(data: Data, tables: RawTables) -> np.ndarray:
    """Look up the split of each interaction in the table of its own; missing where it is not listed."""
    path, name = _locate(data.split_path, "data.split_path")
    fields = {data.user_column: "data.user_column", data.item_column: "data.item_column"}
    table = read_table(path, name, fields | {data.split_column: "data.split_column"})
    names = _split_names(table, data.split_column)
    listed = pd.DataFrame({"user": table.ids(data.user_column), "item": table.ids(data.item_column)})
    pairs = _pair_codes(tables.interactions, listed)
    known, wanted = pairs[: -len(listed)], pairs[-len(listed) :]
    for wrong, complaint in (
        (pd.Series(wanted).duplicated().to_numpy(), "are listed before; remove one row of each"),
        (~np.isin(wanted, known), "are not among the interactions; the split must be of these data"),
    ):
        if wrong.any():
            position = int(np.argmax(wrong))
            user, item = listed.iloc[position]
            raise table.error(
                position,
                data.item_column,
                f"{int(wrong.sum())} of the {len(listed)} listed pairs {complaint} "
                f"(the first: user {user}, item {item})",
            )
    tables.source.update(_hashes(path, tables.source))
    found = pd.Index(wanted).get_indexer(pd.Index(known))
    splits = names.to_numpy(dtype=object)[found]
    splits[found < 0] = None
    return splits


def _pair_codes(*frames: pd.DataFrame) -> np.ndarray:
    """One number a pair (user, item) over all frames, int64; ids are the same where their text is."""
    codes = {}
    for column in ("user", "item"):
        parts = [frame[column] for frame in frames]
        if not all(part.dtype == np.int64 for part in parts):
            parts = [part.astype(str) for part in parts]
        codes[column] = pd.factorize(pd.concat(parts, ignore_index=True))[0].astype(np.int64)
    return codes["user"] * (codes["item"].max() + 1) + codes["item"]


def _side_table(data: Data, role: str, tables: RawTables) -> pd.DataFrame:
    """Read a table of items or users: id, title and text."""
    side: SideTable = getattr(data, role)
    path, name = _locate(side.path, f"data.{role}.path")
    columns = dict.fromkeys(side.text_columns, f"data.{role}.text_columns")
    if side.title_column is not None:
        columns[side.title_column] = f"data.{role}.title_column"
    columns[side.id_column] = f"data.{role}.id_column"
    if data.format == "amazon-reviews" and role == "items":
        # The releases describe some items twice.
        table = _first_of_each(read_table(path, name, columns, decode=_json_or_literal), side.id_column)
    else:
        table = read_table(path, name, columns)
    ids = _unique_ids(table, side.id_column)
    titles = table.texts(side.title_column) if side.title_column is not None else [None] * len(table)
    pieces = [table.texts(column) for column in side.text_columns]
    tables.source.update(_hashes(path, tables.source))
    return pd.DataFrame(
        {
            role.removesuffix("s"): ids,
            "title": [title or str(raw) for title, raw in zip(titles, ids, strict=True)],
            "text": [_sentences(row) for row in zip(*pieces, strict=True)] if pieces else "",
        }
    )


def _unique_ids(table: Table, column: str) -> pd.Series:
    ids = table.ids(column)
    repeated = ids.duplicated().to_numpy()
    if repeated.any():
        position = int(np.argmax(repeated))
        first = int(np.argmax((ids == ids.iloc[position]).to_numpy()))
        raise table.error(position, column, f"{ids.iloc[position]!r} is already in {table.place(first)}; remove one")
    return ids


def _first_of_each(table: Table, column: str) -> Table:
    kept = np.flatnonzero(~table.ids(column).duplicated().to_numpy())
    frame = table.frame.iloc[kept].reset_index(drop=True)
    return Table(frame, table.name, lambda position: table.place(int(kept[position])), table.untyped)


def _json_or_literal(line: str) -> Any:
    """Decode a line of metadata; those of 2014 are Python literals."""
    try:
        return json.loads(line)
    except ValueError:
        return ast.literal_eval(line)


def _sentences(pieces: Sequence[str | None]) -> str:
    """Join texts so that each but the last ends like a sentence."""
    *heads, last = [piece for piece in pieces if piece] or [""]
    return " ".join([*(head if head[-1] in ".!?" else f"{head}." for head in heads), last])


def _find(path: str) -> Path | None:
    """Find a path from the current folder, else from the project's."""
    given = Path(path).expanduser()
    return next((place for place in (given, _PROJECT / given) if place.exists()), None)


def _locate(path: str | None, name: str) -> tuple[Path, str]:
    """Find a path that must exist, and what errors call it."""
    if path is None:
        raise InputError(f"{name} is not set; name a file, or hand over a DataFrame")
    if is_on_hub(path):
        return fetch(path, name), path
    found = _find(path)
    if found is None:
        raise InputError(f"{path}: there is no such file, from {Path.cwd()} or from {_PROJECT}; correct {name}")
    return found, path


def _hashes(path: Path, taken: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of a file by its name."""
    try:
        return {free_name(path.name, taken or {}): sha256_of_file(path)}
    except OSError as error:
        raise_damaged(str(path), error)
