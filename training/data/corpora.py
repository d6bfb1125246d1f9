"""Tokenised corpora on disk: what each training stage and the evaluation read, memory-mapped.

`Interactions` → `content`, `collaborative`, `recommendation`, `validation`, `test` (folders that `datasets` opens), the tokenizer,
`items.jsonl`, `users.jsonl`, `info.json`, and two files that no training reads: `interactions.parquet`, which a published dataset is
made of, and `dropped_users.parquet`, the raw ids that nothing published may hold either. ID sequences are built by arithmetic, text is tokenised once, in batch.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from configuration.errors import InputError
from configuration.load import fingerprint
from configuration.recipe import Data, Recipe
from modeling_cllm4rec.text_cllm4rec import item_text
from modeling_cllm4rec.tokenization_cllm4rec import TokenizerWithUserItemIDTokens
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.ragged import Ragged
from training.data.readers import SPLITS
from training.data.vocabulary import train_vocabulary
from training.files import file_written_whole, written_whole

logger = logging.getLogger(__name__)

CORPORA_VERSION = 1
REVIEW, ITEM_TEXT, USER_TEXT = 0, 1, 2
# Fields of the data that say something about them and change nothing in the corpora; of `publish_users` see corpus_fingerprint.
SAID_ONLY = ("license", "source", "publish_users", "examples")
KINDS = ("review", "item text", "user text")
INTERACTIONS = "interactions.parquet"
DROPPED_USERS = "dropped_users.parquet"
# Key of info.json: raw user ids that are words of the vocabulary, or would be if users were published.
IDS_AS_WORDS = "user_ids_as_words"
HISTORY_PROMPT = ("{user} has interacted with", ",", " will interact with")
TEXTS_PER_BATCH = 4096


@dataclass(frozen=True)
class Corpora:
    """An opened folder of corpora, its datasets memory-mapped."""

    folder: Path
    info: dict[str, Any]

    @cached_property
    def tokenizer(self) -> TokenizerWithUserItemIDTokens:
        """The tokenizer with the ID words; read at its first use, since training needs none."""
        return TokenizerWithUserItemIDTokens.from_pretrained(self.folder / "tokenizer")

    def dataset(self, name: str) -> Dataset:
        """One of `collaborative`, `recommendation`, `validation`, `test` (user, items), `content`, `held_out_reviews` (texts).

        A corpus without a document has no folder, and no dataset.
        """
        return load_from_disk(str(self.folder / name))

    def histories(self, name: str) -> tuple[np.ndarray, Ragged]:
        """User index of each row, and the item indices of the rows; no rows where nobody has items in the split."""
        if not (self.folder / name).is_dir():
            return np.empty(0, np.int32), Ragged.from_lists([], np.int32)
        table = self.dataset(name).data.table
        return table["user"].combine_chunks().to_numpy(), Ragged.from_arrow(table["items"])

    def texts(self, name: str = "content") -> "Texts":
        """The tokenised documents about users and items."""
        if not (self.folder / name).is_dir():
            return Texts(Ragged.from_lists([]), *(np.empty(0, np.int64) for _ in range(4)))
        table = self.dataset(name).data.table
        columns = {key: table[key].combine_chunks().to_numpy() for key in ("kind", "user", "item", "prompt_length")}
        return Texts(documents=Ragged.from_arrow(table["input_ids"]), **columns)

    def items(self) -> list[dict[str, Any]]:
        """Raw id, title, text and popularity of each item, in id order."""
        return read_json_lines(self.folder / "items.jsonl")

    def users(self) -> list[dict[str, Any]]:
        """Raw id, text and training history (item indices) of each user, in id order."""
        return read_json_lines(self.folder / "users.jsonl")

    def dropped_users(self) -> list[str] | list[int]:
        """Raw id of each user that the filters left nothing of; none where an earlier version built these corpora."""
        path = self.folder / DROPPED_USERS
        return pq.read_table(path)["id"].to_pylist() if path.is_file() else []

    def interactions(self) -> pa.Table:
        """A row per pair, by user, then by time: user and item (index), split; timestamp and review where the data have them.

        Raises:
            InputError: if an earlier version built these corpora, which did not keep them.
        """
        path = self.folder / INTERACTIONS
        if not path.is_file():
            raise InputError(
                f"{self.folder} has no {INTERACTIONS}: it was built by an earlier version; remove that folder and run "
                "training/show_corpus.py with the run's recipe, which builds it again and leaves the training as it is"
            )
        return pq.read_table(path)

    def fingerprint_with(self, recipe: Recipe) -> str:
        """What the fingerprint of these corpora would be, had they been built with this recipe."""
        return corpus_fingerprint(recipe, self.info["source"], self.info.get(IDS_AS_WORDS, 0))

    @property
    def num_words(self) -> int:
        """Words before the users, N."""
        return self.info["counts"]["words"]

    @property
    def num_users(self) -> int:
        """Users with a token."""
        return self.info["counts"]["users"]

    @property
    def num_items(self) -> int:
        """Items with a token."""
        return self.info["counts"]["items"]


@dataclass(frozen=True)
class Texts:
    """Documents of words with one user and/or one item token in their prompt; index -1 where there is none."""

    documents: Ragged
    kind: np.ndarray
    user: np.ndarray
    item: np.ndarray
    prompt_length: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)


def corpus_fingerprint(recipe: Recipe, source: dict[str, str], ids_as_words: int = 0) -> str:
    """What a folder of corpora depends on: data and text fields of the recipe, the seed, and the content of the files.

    Args:
        recipe: The recipe.
        source: SHA-256 of each file that was read.
        ids_as_words: How many raw user ids are words of the vocabulary, or would be: with any, it depends on
            `data.publish_users`, too.
    """
    fields = (
        *(f"data.{field.name}" for field in dataclasses.fields(Data) if field.name not in SAID_ONLY),
        "seed",
        "method.content_tower",
        "method.max_text_tokens",
        "backbone.name",
        "backbone.gguf_file",
        "backbone.num_words",
        *(["data.publish_users"] if ids_as_words else []),
        *(["refit"] if recipe.refit else []),
    )
    parts = {"version": CORPORA_VERSION, "recipe": fingerprint(recipe, fields), "source": source}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def expected_fingerprint(folder: Path, recipe: Recipe, source: dict[str, str]) -> str:
    """The fingerprint that corpora in `folder` have where they are up to date."""
    path = folder / "info.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return corpus_fingerprint(recipe, source, known.get(IDS_AS_WORDS, 0))


def open_corpora(folder: Path) -> Corpora:
    """Open a folder that [`build_corpora`] wrote.

    Raises:
        InputError: if there is none, or a newer version wrote it.
    """
    path = folder / "info.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no corpora (no info.json); run training/pretrain.py first, which builds them")
    info = json.loads(path.read_text(encoding="utf-8"))
    if info["version"] > CORPORA_VERSION:
        raise InputError(
            f"{path}: corpora of version {info['version']}, this code reads up to {CORPORA_VERSION}; update the code"
        )
    return Corpora(folder, info)


def build_corpora(interactions: Interactions, recipe: Recipe, folder: Path, *, progress: bool = True) -> Corpora:
    """Write the corpora of a recipe into `folder`, whole or not at all, and open them.

    Held-out pairs stay out of everything that training reads: their reviews are kept in `held_out_reviews` only, and their
    items are in `validation` and `test` only.

    Raises:
        InputError: if the backbone has no tokenizer that IDs can be added to, or the disk is full.
    """
    if recipe.backbone.name is None and "vocab_size" in recipe.backbone.config:
        raise InputError(
            "backbone.config: vocab_size is given, but user and item ids follow the words of the vocabulary that is trained; "
            "leave it out and set backbone.num_words"
        )
    if (folder / INTERACTIONS).is_file() and (folder / "info.json").is_file():
        known = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if known.get("fingerprint") == expected_fingerprint(folder, recipe, interactions.source):
            logger.info("corpora: %s is up to date", folder)
            if not (folder / DROPPED_USERS).is_file():  # an earlier version built them
                with file_written_whole(folder / DROPPED_USERS) as temporary:
                    write_dropped_users(temporary, interactions.dropped_users)
            return open_corpora(folder)
    with written_whole(folder) as target:
        base, ids_as_words = base_tokenizer(interactions, recipe)
        num_words = num_backbone_words(recipe, base)
        try:
            tokenizer = TokenizerWithUserItemIDTokens.from_backbone(
                base, num_users=interactions.num_users, num_items=interactions.num_items, num_words=num_words
            )
        except ValueError as error:
            raise InputError(f"backbone.name {recipe.backbone.name!r}: {error}; choose another backbone") from error
        tokenizer.save_pretrained(target / "tokenizer")
        nothing: Iterator[Source] = iter(())
        with_text = recipe.method.content_tower
        texts = content_table(training_texts(interactions) if with_text else nothing, recipe, base, tokenizer, progress)
        held_out = reviews(interactions, interactions.splits == TEST) if with_text else nothing
        histories = history_table(interactions, TRAIN)
        for name, table in {
            "content": texts,
            "held_out_reviews": content_table(held_out, recipe, base, tokenizer, progress=False),
            "collaborative": histories,
            "recommendation": histories,
            "validation": history_table(interactions, VALIDATION),
            "test": history_table(interactions, TEST),
        }.items():
            if len(table):  # `datasets` cannot open an empty folder
                save_dataset(table, target / name)
        pq.write_table(interactions_table(interactions), target / INTERACTIONS, compression="zstd")
        write_dropped_users(target / DROPPED_USERS, interactions.dropped_users)
        popularity = np.bincount(interactions.items[interactions.splits == TRAIN], minlength=interactions.num_items)
        write_json_lines(
            target / "items.jsonl",
            (
                {"id": raw, "title": title, "text": text, "popularity": int(count)}
                for raw, title, text, count in zip(
                    interactions.item_ids, interactions.item_titles, interactions.item_texts, popularity, strict=True
                )
            ),
        )
        train_histories = interactions.histories(TRAIN)
        write_json_lines(
            target / "users.jsonl",
            (
                {"id": raw, "text": interactions.user_texts[index], "history": train_histories[index].tolist()}
                for index, raw in enumerate(interactions.user_ids)
            ),
        )
        info = {
            "version": CORPORA_VERSION,
            "fingerprint": corpus_fingerprint(recipe, interactions.source, ids_as_words),
            "seed": recipe.seed,
            "source": interactions.source,
            "counts": corpus_counts(interactions, texts, tokenizer),
            "filtered": interactions.log,
            "recipe": {"data": asdict(recipe.data), "max_text_tokens": recipe.method.max_text_tokens},
            "prompt_ids": prompt_ids(tokenizer),
            IDS_AS_WORDS: ids_as_words,
        }
        (target / "info.json").write_text(json.dumps(info, indent=2, ensure_ascii=False), encoding="utf-8")
    return open_corpora(folder)


def save_dataset(table: pa.Table, folder: Path) -> None:
    """Write a table as `datasets` keeps it, in one record batch, so that opened columns are views of the mapped file."""
    Dataset(table).save_to_disk(str(folder), num_shards=1)
    (path,) = folder.glob("data-*.arrow")
    with pa.OSFile(str(path)) as file:
        metadata = pa.ipc.open_stream(file).schema.metadata
    whole = table.combine_chunks().replace_schema_metadata(metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, whole.schema) as writer:
        writer.write_table(whole)


def corpus_counts(
    interactions: Interactions, texts: pa.Table, tokenizer: TokenizerWithUserItemIDTokens
) -> dict[str, int]:
    """The counts that `info.json`, the log and the model card quote."""
    kinds = np.bincount(texts["kind"].combine_chunks().to_numpy(), minlength=len(KINDS))
    splits = np.bincount(interactions.splits, minlength=3)
    tokens = pc.sum(pc.list_value_length(texts["input_ids"])).as_py() or 0
    return {
        "users": interactions.num_users,
        "items": interactions.num_items,
        "words": tokenizer.num_words,
        "interactions": len(interactions.users),
        "train": int(splits[TRAIN]),
        "validation": int(splits[VALIDATION]),
        "test": int(splits[TEST]),
        "reviews": int(kinds[REVIEW]),
        "item_texts": int(kinds[ITEM_TEXT]),
        "user_texts": int(kinds[USER_TEXT]),
        "content_tokens": int(tokens),
    }


def history_table(interactions: Interactions, split: int) -> pa.Table:
    """A row per user that has items in the split: its index and theirs, in order of time."""
    histories = interactions.histories(split)
    users = np.flatnonzero(histories.lengths)
    rows = histories.take(users)
    items = pa.ListArray.from_arrays(pa.array(rows.offsets, pa.int32()), pa.array(rows.values, pa.int32()))
    return pa.table({"user": pa.array(users, pa.int32()), "items": items})


def interactions_table(interactions: Interactions) -> pa.Table:
    """A row per pair as [`Corpora.interactions`] gives it back."""
    columns = {
        "user": pa.array(interactions.users, pa.int32()),
        "item": pa.array(interactions.items, pa.int32()),
        "split": pa.DictionaryArray.from_arrays(interactions.splits, SPLITS).cast(pa.string()),
    }
    if interactions.timestamps is not None:
        columns["timestamp"] = pa.array(interactions.timestamps, pa.int64())
    if interactions.reviews is not None:
        columns["review"] = pa.array(interactions.reviews, pa.string())
    return pa.table(columns)


def write_dropped_users(path: Path, ids: Sequence[str | int]) -> None:
    """A row per raw id, int64 or text."""
    integers = all(isinstance(raw, int) for raw in ids)
    table = pa.table({"id": pa.array(ids, pa.int64() if integers else pa.string())})
    pq.write_table(table, path, compression="zstd")


class Source(NamedTuple):
    """A text before it is tokenised; index -1 where it is not about a user or an item."""

    kind: int
    user: int
    item: int
    text: str


def reviews(interactions: Interactions, pairs: np.ndarray) -> Iterator[Source]:
    """Reviews of the chosen pairs, `(interactions,)` boolean."""
    if interactions.reviews is not None:
        for row in np.flatnonzero(pairs).tolist():
            if interactions.reviews[row]:
                yield Source(
                    REVIEW, int(interactions.users[row]), int(interactions.items[row]), interactions.reviews[row] or ""
                )


def side_texts(interactions: Interactions) -> Iterator[Source]:
    """Titles and texts of items, texts of users."""
    for j, (raw, title, text) in enumerate(
        zip(interactions.item_ids, interactions.item_titles, interactions.item_texts, strict=True)
    ):
        whole = item_text(raw, title, text)
        if whole:
            yield Source(ITEM_TEXT, -1, j, whole)
    for i, text in enumerate(interactions.user_texts):
        if text:
            yield Source(USER_TEXT, i, -1, text)


def training_texts(interactions: Interactions) -> Iterator[Source]:
    """Every text that training may read: reviews of training pairs, texts of items and users."""
    yield from reviews(interactions, interactions.splits == TRAIN)
    yield from side_texts(interactions)


def content_table(
    sources: Iterator[Source],
    recipe: Recipe,
    base: PreTrainedTokenizerFast,
    tokenizer: TokenizerWithUserItemIDTokens,
    progress: bool,
) -> pa.Table:
    """Documents prompt + main text.

    Args:
        sources: The texts.
        recipe: The recipe, for prompts and length.
        base: The backbone's own tokenizer: in it no main text can turn into an ID.
        tokenizer: The extended one, for prompts.
        progress: Whether to show a bar.
    """
    data, limit = recipe.data, recipe.method.max_text_tokens
    prompts = [
        prompt_template(tokenizer, prompt) for prompt in (data.review_prompt, data.item_prompt, data.user_prompt)
    ]
    end = [] if base.eos_token_id is None else [base.eos_token_id]
    kinds, users, items, lengths = [], [], [], [0]
    parts: list[np.ndarray] = [np.empty(0, np.int32)]
    # Ids alone: where each word stands in its text is not asked for, and takes time.
    reader = base.backend_tokenizer
    reader.no_truncation()
    reader.no_padding()
    with tqdm(desc="tokenising texts", unit="text", disable=not progress, leave=False) as bar:
        while chunk := list(itertools.islice(sources, TEXTS_PER_BATCH)):
            encoded = reader.encode_batch_fast([" " + source.text for source in chunk], add_special_tokens=False)
            for source, words in zip(chunk, encoded, strict=True):
                prompt, user_places, item_places = prompts[source.kind]
                document = np.concatenate([prompt, np.asarray((words.ids + end)[:limit], np.int32)])
                document[user_places] = tokenizer.num_words + source.user
                document[item_places] = tokenizer.num_words + tokenizer.num_users + source.item
                parts.append(document)
                lengths.append(len(document))
            kinds += [source.kind for source in chunk]
            users += [source.user for source in chunk]
            items += [source.item for source in chunk]
            bar.update(len(chunk))
    offsets = pa.array(np.cumsum(lengths), pa.int64())
    return pa.table(
        {
            "kind": pa.array(kinds, pa.int8()),
            "user": pa.array(users, pa.int32()),
            "item": pa.array(items, pa.int32()),
            "prompt_length": pa.array([len(prompts[kind][0]) for kind in kinds], pa.int32()),
            "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(parts), pa.int32())),
        }
    )


def prompt_template(tokenizer: TokenizerWithUserItemIDTokens, prompt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of a prompt with `{user}` and `{item}`, and the places of their tokens."""
    ids = np.asarray(tokenizer.encode(prompt.format(user="user_0", item="item_0"), add_special_tokens=False), np.int32)
    return ids, np.flatnonzero(ids == tokenizer.user_id(0)), np.flatnonzero(ids == tokenizer.item_id(0))


def prompt_ids(tokenizer: TokenizerWithUserItemIDTokens) -> dict[str, list[int]]:
    """Word ids of the recommendation prompt's hard parts, as the model's configuration keeps them."""
    names = ("history", "separator", "recommend")
    return {
        name: tokenizer.encode(part.replace("{user}", ""), add_special_tokens=False)
        for name, part in zip(names, HISTORY_PROMPT, strict=True)
    }


def base_tokenizer(interactions: Interactions, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, int]:
    """The backbone's own tokenizer, or a byte-level BPE trained on the prompts and on the texts that training may read.

    Returns:
        The tokenizer, and how many raw user ids its words hold or would hold; 0 where the backbone brought its own words.
    """
    backbone = recipe.backbone
    if backbone.name is not None:
        return load_from_backbone(AutoTokenizer, recipe), 0
    data = recipe.data
    prompts = [data.review_prompt, data.item_prompt, data.user_prompt, *HISTORY_PROMPT]

    def texts() -> Iterator[str]:
        yield from prompts
        if recipe.method.content_tower:
            yield from (" " + source.text for source in training_texts(interactions))

    user_ids = [*interactions.user_ids, *interactions.dropped_users]
    return train_vocabulary(texts, backbone.num_words, user_ids, publish_users=data.publish_users)


def num_backbone_words(recipe: Recipe, base: PreTrainedTokenizerFast) -> int:
    """N: the backbone's vocabulary, which may be padded beyond its tokenizer's.

    Raises:
        InputError: if the tokenizer has words that the backbone has no embedding of.
    """
    if recipe.backbone.name is None:
        return len(base)
    num_words = int(load_from_backbone(AutoConfig, recipe).get_text_config().vocab_size)
    if len(base) > num_words:
        raise InputError(
            f"backbone.name: the tokenizer of {recipe.backbone.name} has {len(base)} words, its model embeddings of {num_words}; "
            "take the added ones out of the tokenizer, or resize the model"
        )
    return num_words


def load_from_backbone(auto_class: Any, recipe: Recipe) -> Any:
    """Tokenizer or configuration of the recipe's pretrained backbone.

    Raises:
        InputError: if it has none that can be loaded.
    """
    backbone = recipe.backbone
    extra = {"gguf_file": backbone.gguf_file} if backbone.gguf_file else {}
    try:
        return auto_class.from_pretrained(backbone.name, **extra)
    except (OSError, ValueError) as error:
        what = auto_class.__name__.removeprefix("Auto").lower()
        raise InputError(
            f"backbone.name: no {what} can be loaded from {backbone.name!r} ({str(error).splitlines()[0]}); give the name of a "
            "Hub repo or a folder with a causal language model and its byte-level BPE tokenizer"
        ) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """A dict per line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_json_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """A dict per line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
