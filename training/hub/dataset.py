"""A run's data as a dataset repo: Parquet files and a card, enough to train again from them.

Raw user ids, texts about users and times go with `data.publish_users` alone; else a user is a number, which keeps the order of
the raw ids, so that a model trained from the repo has the same users and items at the same places.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from configuration import plain_yaml
from configuration.load import PROJECT
from configuration.recipe import Data, Recipe, SideTable
from training.data.corpora import KINDS, REVIEW, USER_TEXT, Corpora
from training.data.hub_files import HUB
from training.data.readers import SPLITS
from training.files import written_whole
from training.hub.folder import public_source
from training.hub.privacy import UserIds

TEMPLATE = PROJECT / "dataset_card.md"
# Of each configuration that load_dataset opens, the file of each split; the first is the one it opens by default.
CONFIGURATIONS = {
    "interactions": {split: f"interactions/{split}.parquet" for split in SPLITS},
    "items": {"train": "items.parquet"},
    "users": {"train": "users.parquet"},
    "content": {"train": "content/train.parquet", "test": "content/test.parquet"},
    "collaborative": {"train": "histories/train.parquet"},
    "recommendation": {split: f"histories/{split}.parquet" for split in SPLITS},
}
POSITION = "position"
# What stands in a review in the place of a raw user id that is not published.
SOMEBODY = "[user]"
REVIEWS_PER_BLOCK = 10_000
ROWS_PER_GROUP = 100_000
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")


def write_dataset_folder(corpora: Corpora, recipe: Recipe, folder: Path, *, repo_id: str) -> None:
    """Write a complete dataset repo into a folder, whole or not at all: Parquet files and `README.md`.

    Args:
        corpora: The run's.
        recipe: The run's, or as it is published.
        folder: The folder to write; what is there is replaced.
        repo_id: Name of the repo, for the card, with `@branch` behind it where that is not main.

    Raises:
        InputError: if an earlier version built the corpora, or the disk is full.
    """
    published = published_data(corpora, recipe.data)
    with written_whole(folder) as target:
        for path, table in published.tables.items():
            (target / path).parent.mkdir(exist_ok=True)
            pq.write_table(table, target / path, compression="zstd", row_group_size=ROWS_PER_GROUP)
        info = corpora.info | {"source": public_source(corpora.info["source"])}
        card = dataset_card(info, recipe, published, repo_id)
        (target / "README.md").write_text(card, encoding="utf-8")


def recipe_for_dataset(recipe: Recipe, repo_id: str) -> Recipe:
    """A recipe whose data are read from the repo that [`write_dataset_folder`] makes of them.

    Args:
        recipe: The recipe that the data were read with.
        repo_id: Name of the repo, with `@revision` behind it if need be, or the absolute path of its folder.
    """
    name, at, revision = repo_id.partition("@")
    base = repo_id if Path(repo_id).is_absolute() else f"{HUB}datasets/{name}{at}{quote(revision, safe='')}"
    users = SideTable(f"{base}/users.parquet", id_column="id", text_columns=["text"])
    data = Data(
        format="dataset",
        path=repo_id,
        dataset_split="all",
        user_column="user",
        item_column="item",
        timestamp_column=POSITION,
        review_column="review" if has_reviews(recipe.data) else None,
        items=SideTable(f"{base}/items.parquet", id_column="id", title_column="title", text_columns=["text"]),
        users=users if publishes_user_texts(recipe.data) else SideTable(),
        split="given",
        split_column="split",
    )
    kept = ("review_prompt", "item_prompt", "user_prompt", "examples", "license", "source", "publish_users")
    return replace(recipe, data=replace(data, **{name: getattr(recipe.data, name) for name in kept}))


def has_reviews(data: Data) -> bool:
    """Whether the published interactions have a column of reviews."""
    return data.review_column is not None or data.format == "amazon-reviews"


def publishes_user_texts(data: Data) -> bool:
    """Whether there is a published table of users."""
    return data.publish_users and (data.users.path is not None or data.format == "ml-100k")


class Published(NamedTuple):
    """What a repo holds of a run's data.

    Attributes:
        tables: The table of each Parquet file by its path; none is empty.
        timed: Whether the order of a history is that of time.
        reviews_changed: In how many reviews a raw user id was replaced.
    """

    tables: dict[str, pa.Table]
    timed: bool
    reviews_changed: int


def published_data(corpora: Corpora, data: Data) -> Published:
    """Put together what is published of the corpora."""
    pairs, items = corpora.interactions(), corpora.items()
    users = corpora.users() if data.publish_users else []
    user, item = (pairs[name].combine_chunks() for name in ("user", "item"))
    reviews, changed = published_reviews(corpora, pairs, data)
    columns = {
        "user": pa.array([row["id"] for row in users]).take(user) if users else user,
        "item": pa.array([row["id"] for row in items]).take(item),
        "split": pairs["split"],
        POSITION: pa.array(place_in_history(user.to_numpy()), pa.int32()),
    }
    # Read from a repo like this one, what the recipe calls a time is the place in the history.
    timed = "timestamp" in pairs.column_names and (data.format, data.timestamp_column) != ("dataset", POSITION)
    if data.publish_users and timed:
        columns["timestamp"] = pairs["timestamp"]
    if has_reviews(data):
        columns["review"] = reviews
    interactions = pa.table(columns)
    tables = {f"interactions/{split}.parquet": interactions.filter(pc.equal(pairs["split"], split)) for split in SPLITS}
    tables["items.parquet"] = pa.Table.from_pylist(items).select(["id", "title", "text", "popularity"])
    if publishes_user_texts(data):
        tables["users.parquet"] = pa.table({name: pa.array([row[name] for row in users]) for name in ("id", "text")})
    codes = user.to_numpy().astype(np.int64) * corpora.num_items + item.to_numpy()
    for split, name in (("train", "content"), ("test", "held_out_reviews")):
        tables[f"content/{split}.parquet"] = published_texts(corpora, name, data, codes[changed])
    for split, name in zip(SPLITS, ("recommendation", "validation", "test"), strict=True):
        if (corpora.folder / name).is_dir():
            histories = corpora.dataset(name).data.table.select(["user", "items"])
            tables[f"histories/{split}.parquet"] = histories.rename_columns(["user_index", "item_indices"])
    # `datasets` cannot open a file without rows.
    filled = {path: table.replace_schema_metadata(None) for path, table in tables.items() if len(table)}
    return Published(filled, timed, int(changed.sum()))


def place_in_history(users: np.ndarray) -> np.ndarray:
    """Of sorted users, each row's place among its user's."""
    counts = np.bincount(users)
    return np.arange(len(users)) - (np.cumsum(counts) - counts)[users]


def published_reviews(corpora: Corpora, pairs: pa.Table, data: Data) -> tuple[pa.Array, np.ndarray]:
    """The reviews without the raw user ids that are not published, and which of them were changed for it."""
    changed = np.zeros(len(pairs), bool)
    if "review" not in pairs.column_names:
        return pa.nulls(len(pairs), pa.string()), changed
    reviews = pairs["review"].combine_chunks()
    if data.publish_users:
        return reviews, changed
    sought = UserIds([*(row["id"] for row in corpora.users()), *corpora.dropped_users()])
    if not sought:
        return reviews, changed
    blocks = []
    for start in range(0, len(reviews), REVIEWS_PER_BLOCK):
        block = reviews.slice(start, REVIEWS_PER_BLOCK).to_pylist()
        if sought.found_in("\n".join(review for review in block if review)):
            there = block
            block = [review and sought.replaced(review, SOMEBODY) for review in there]
            changed[start : start + len(block)] = [old != new for old, new in zip(there, block, strict=True)]
        blocks.append(pa.array(block, pa.string()))
    return pa.concat_arrays(blocks), changed


def published_texts(corpora: Corpora, name: str, data: Data, changed_pairs: np.ndarray) -> pa.Table:
    """A corpus of documents without those about users and those whose review was changed, where users are not published."""
    texts = corpora.texts(name)
    kept = np.ones(len(texts), bool)
    if not data.publish_users:
        pairs = texts.user.astype(np.int64) * corpora.num_items + texts.item
        kept = (texts.kind != USER_TEXT) & ~((texts.kind == REVIEW) & np.isin(pairs, changed_pairs))
    documents = texts.documents.take(np.flatnonzero(kept))
    return pa.table(
        {
            "kind": pa.DictionaryArray.from_arrays(pa.array(texts.kind[kept], pa.int8()), KINDS).cast(pa.string()),
            "user_index": pa.array(texts.user[kept], pa.int32(), mask=texts.user[kept] < 0),
            "item_index": pa.array(texts.item[kept], pa.int32(), mask=texts.item[kept] < 0),
            "prompt_length": pa.array(texts.prompt_length[kept], pa.int32()),
            "input_ids": pa.LargeListArray.from_arrays(
                pa.array(documents.offsets, pa.int64()), pa.array(documents.values, pa.int32())
            ),
        }
    )


class Part(NamedTuple):
    """A split of a configuration, as the card lists it."""

    configuration: str
    split: str
    rows: int
    columns: list[str]


def dataset_card(info: dict[str, Any], recipe: Recipe, published: Published, repo_id: str) -> str:
    """The card: metadata that `load_dataset` reads, what the data are, how they were made, what they hold about people.

    Args:
        info: What `info.json` of the corpora holds.
        recipe: The recipe that the data were read with.
        published: What the repo holds.
        repo_id: Name of the repo, alike.
    """
    tables = published.tables
    there = {
        name: {split: path for split, path in files.items() if path in tables}
        for name, files in CONFIGURATIONS.items()
        if any(path in tables for path in files.values())
    }
    parts = [
        Part(name, split, len(tables[path]), tables[path].column_names)
        for name, files in there.items()
        for split, path in files.items()
    ]
    rows = info["counts"]["interactions"]
    metadata = DatasetCardData(
        pretty_name=title_of(repo_id),
        license=recipe.data.license,
        language=recipe.language or None,
        size_categories=[SIZES[min(max(len(str(rows)) - 3, 0), len(SIZES) - 1)]],
        tags=["recommendation", "collaborative-filtering", "cllm4rec"],
        configs=[
            {
                "config_name": name,
                **({"default": True} if name == "interactions" else {}),
                "data_files": [{"split": split, "path": path} for split, path in files.items()],
            }
            for name, files in there.items()
        ],
    )
    card = DatasetCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        title=title_of(repo_id),
        info=info,
        data=recipe.data,
        parts=parts,
        configurations=list(there),
        columns={column for part in parts for column in part.columns},
        splits=", ".join(there["interactions"]),
        content_splits=list(there.get("content", ())),
        timed=published.timed,
        making=made(info, recipe.data),
        people=people(published, recipe.data),
        recipe=plain_yaml.dump(
            {"data": changed_fields(asdict(recipe_for_dataset(recipe, repo_id).data), asdict(Data()))}
        ),
    )
    return str(card)


def made(info: Mapping[str, Any], data: Data) -> list[str]:
    """How the interactions came out of the source, a step a sentence."""
    filtered = info["filtered"]
    steps = {
        "rows": "{:,} rows were read",
        "below_min_rating": f"{{:,}} with a rating below {data.min_rating or 0:g} were left out",
        "repeated": "{:,} repeated pairs of a user and an item were left out, the last of each stayed",
        "not_in_split": "{:,} pairs that the given split does not list were left out",
        "below_min_interactions": "{:,} were left out so that every user has at least "
        f"{data.min_user_interactions} and every item at least {data.min_item_interactions}",
    }
    split = {
        "random": f"Of each user a tenth is test and a tenth validation, at random with seed {info['seed']}",
        "leave_last_out": "Each user's last item is test, the one before validation",
        "given": "The split came with the source",
    }[data.split]
    counts, moved = info["counts"], filtered.get("held_out_pairs_trained_on_before")
    split += f", but {moved:,} pairs that an earlier model was trained on stay in train" if moved else ""
    return [
        *(words.format(filtered[name]) for name, words in steps.items() if filtered.get(name)),
        f"{split}: {counts['train']:,} train, {counts['validation']:,} validation, {counts['test']:,} test",
    ]


def people(published: Published, data: Data) -> list[str]:
    """What the repo holds about people, a sentence each."""
    tables, changed = published.tables, published.reviews_changed
    written = sum(
        len(table) - table["review"].null_count for table in tables.values() if "review" in table.column_names
    )
    if data.publish_users:
        said = [
            "Users have the raw ids of the source, with all of their histories, as `publish_users` in the recipe allows."
        ]
        if "users.parquet" in tables:
            said.append("Texts about users are in `users`, and in `content`.")
    else:
        said = [
            "Users are numbers. The raw ids of the source, times and texts about users are not in this repo. Who has the source "
            "can still tell people by their histories."
        ]
    if written:
        said.append(
            f"{written:,} reviews are texts by people, in their own words: they may tell who wrote them, and hold whatever "
            "people write about others."
        )
    if changed:
        said.append(
            f"In {changed:,} of the reviews a raw user id of the source was replaced by {SOMEBODY}; `content` is without them."
        )
    return said


def title_of(repo_id: str) -> str:
    """The repo's name without its namespace."""
    return Path(repo_id if Path(repo_id).is_absolute() else repo_id.partition("@")[0]).name


def changed_fields(fields: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not as usual, sections in the same way."""
    return {
        name: changed_fields(value, usual[name]) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if value != usual[name]
    }
