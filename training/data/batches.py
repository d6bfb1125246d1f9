"""Batches from corpora: every random choice keyed by (seed, epoch, document), sequences joined by array arithmetic.

A batch is one packed row without padding: documents one behind the other, and how long each is. It is the same whoever makes
it: a resumed run and a run on another number of processes see the same data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configuration.recipe import Method
from training.data.corpora import Corpora, Texts
from training.data.ragged import Ragged

ORDER, SHARE, USER_TOKEN, PLAN, NEGATIVES = range(5)  # one stream of random numbers for each kind of choice


@dataclass(frozen=True)
class Layout:
    """Where words, users and items stand among the ids, and the prompt's word ids."""

    num_words: int
    num_users: int
    num_items: int
    prompt_ids: dict[str, list[int]]

    @property
    def first_item(self) -> int:
        """Id of item 0."""
        return self.num_words + self.num_users


# Tensors by name, and under `document_lengths` the tokens of each document, a tuple of integers.
Batch = dict[str, Any]


def layout_of(corpora: Corpora) -> Layout:
    """Where words, users and items stand among the ids."""
    return Layout(
        corpora.num_words,
        corpora.num_users,
        corpora.num_items,
        {k: list(v) for k, v in corpora.info["prompt_ids"].items()},
    )


def uniform(seed: int, epoch: int, stream: int, keys: np.ndarray) -> np.ndarray:
    """A uniform number in [0, 1) for each key, float64 `(n,)`: splitmix64 of (seed, epoch, stream, key)."""
    with np.errstate(over="ignore"):
        state = np.asarray(seed, np.uint64)
        for part in (np.uint64(epoch), np.uint64(stream), keys.astype(np.uint64)):
            state = mix(state * np.uint64(0x9E3779B97F4A7C15) + part + np.uint64(1))
    return np.asarray((state >> np.uint64(11)) * 2.0**-53, np.float64)


def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The documents of each step of an epoch: a random permutation cut into steps, every document once.

    Within a step they are sorted by length, so that the processes, which take them in turn, have about as much to do.

    Args:
        lengths: `(documents,)` tokens of each document.
        batch_size: Documents per step, over all processes.
        seed: Of the run.
        epoch: Number of the epoch.
    """
    order = np.argsort(uniform(seed, epoch, PLAN, np.arange(len(lengths))), kind="stable")
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [step[np.argsort(lengths[step], kind="stable")] for step in steps]


def content_batch(texts: Texts, documents: np.ndarray) -> Batch:
    """Prompt + main text; labels on the main text only.

    Returns:
        `input_ids`, `labels`, each int64 `(1, tokens)`, and `document_lengths`.
    """
    return language_batch(texts.documents.take(documents), texts.prompt_length[documents])


def language_batch(rows: Ragged, prompt_length: np.ndarray) -> Batch:
    """Documents of a language model, packed; labels where the prompt has ended, but for a first token, which none precedes."""
    place = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
    main = place >= np.repeat(np.maximum(prompt_length, 1), rows.lengths)
    return packed(rows) | tensors(labels=np.where(main, rows.values, -100)[None])


def collaborative_batch(
    users: np.ndarray, histories: Ragged, documents: np.ndarray, layout: Layout, method: Method, seed: int, epoch: int
) -> Batch:
    """`user_i has interacted with` + the items in this epoch's order; labels on the items only.

    Returns:
        `input_ids`, `labels`, each int64 `(1, tokens)`, labels being ids as in `input_ids`; and `document_lengths`.
    """
    order = ordered(histories.take(documents), documents, histories, method, seed, epoch)
    return next_items(users[documents], last(order, method.max_history), layout)


def next_item_batch(
    users: np.ndarray, histories: Ragged, documents: np.ndarray, layout: Layout, method: Method, seed: int, epoch: int
) -> Batch:
    """As [`collaborative_batch`], but that a share of the documents (`method.user_token_dropout`) names nobody."""
    order = ordered(histories.take(documents), documents, histories, method, seed, epoch)
    who = named_users(users, documents, method, seed, epoch)
    return next_items(who, last(order, method.max_history), layout)


def next_items(users: np.ndarray, items: Ragged, layout: Layout) -> Batch:
    """A language model's documents about what users (-1: nobody is named) had, one item after the other."""
    history = layout.prompt_ids["history"]
    rows = join([tokens_of(users, layout), constant(history, len(users)), shifted(items, layout.first_item)])
    return language_batch(rows, (users >= 0) + len(history))


def recommendation_batch(
    users: np.ndarray, histories: Ragged, documents: np.ndarray, layout: Layout, method: Method, seed: int, epoch: int
) -> Batch:
    """Prompts over a random part of each history; the targets are the rest or the whole (`method.targets` but next).

    Returns:
        `input_ids` int64 `(1, tokens)` and `document_lengths`; `labels` int64 `(documents, targets)`, item indices padded with
        -100; `target_weights` alike, float32.
    """
    rows = histories.take(documents)
    counts = rows.lengths
    low, high = method.held_out_share
    share = low + (high - low) * uniform(seed, epoch, SHARE, documents)
    held = np.clip(np.rint(share * counts), 1, np.maximum(counts - 1, 1)).astype(np.int64)
    order = ordered(rows, documents, histories, method, seed, epoch)
    place = np.arange(len(order.values)) - np.repeat(order.offsets[:-1], counts)
    in_prompt = place < np.repeat(counts - held, counts)
    prompt, target = select(order, in_prompt), select(order, ~in_prompt)
    prompt = last(prompt, method.max_history)
    prompts = packed(prompt_rows(prompt, named_users(users, documents, method, seed, epoch), layout))
    labels, valid = pad(order if method.targets == "all" else target, fill=-100)
    return prompts | tensors(labels=labels, target_weights=valid.astype(np.float32))


def evaluation_batch(users: np.ndarray, histories: Ragged, layout: Layout, max_history: int) -> Batch:
    """Prompts over whole histories, the last `max_history` items each; a user of -1 has no token.

    Returns:
        `input_ids` int64 `(1, tokens)` and `document_lengths`.
    """
    return packed(prompt_rows(last(histories, max_history), users, layout))


def prompt_rows(items: Ragged, users: np.ndarray, layout: Layout) -> Ragged:
    """`user_i has interacted with item_a …, user_i will interact with`: the tail, where there is one, is never cut."""
    count, someone, parts = len(users), tokens_of(users, layout), layout.prompt_ids
    rows = [someone, constant(parts["history"], count), shifted(items, layout.first_item)]
    if parts["recommend"]:
        rows += [constant(parts["separator"], count), someone, constant(parts["recommend"], count)]
    return join(rows)


def tokens_of(users: np.ndarray, layout: Layout) -> Ragged:
    """The token of each user, none of -1."""
    known = users >= 0
    return Ragged(
        (layout.num_words + users[known]).astype(np.int64), np.concatenate([[0], np.cumsum(known)]).astype(np.int64)
    )


def named_users(users: np.ndarray, documents: np.ndarray, method: Method, seed: int, epoch: int) -> np.ndarray:
    """The users of documents, -1 for the share whose prompt names nobody in this epoch."""
    return np.where(uniform(seed, epoch, USER_TOKEN, documents) >= method.user_token_dropout, users[documents], -1)


def ordered(rows: Ragged, documents: np.ndarray, histories: Ragged, method: Method, seed: int, epoch: int) -> Ragged:
    """The rows in this epoch's random order, or in order of time."""
    if method.history_order == "chronological":
        return rows
    # An item's key is its place in the whole corpus, so that its number does not depend on the batch it is in.
    within = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
    keys = np.repeat(histories.offsets[documents], rows.lengths) + within
    row = np.repeat(np.arange(len(rows), dtype=np.min_scalar_type(len(rows))), rows.lengths)
    # By number, then by row: of small integers a stable sort counts, and a lexsort does not.
    by_number = np.argsort(uniform(seed, epoch, ORDER, keys))
    return Ragged(rows.values[by_number[np.argsort(row[by_number], kind="stable")]], rows.offsets)


def last(rows: Ragged, count: int) -> Ragged:
    """The last `count` values of each row."""
    left = np.repeat(rows.offsets[1:], rows.lengths) - np.arange(len(rows.values))
    return select(rows, left <= count)


def select(rows: Ragged, chosen: np.ndarray) -> Ragged:
    """The chosen values of each row, `(total,)` boolean."""
    counts = np.concatenate([[0], np.cumsum(chosen)])
    return Ragged(rows.values[chosen], counts[rows.offsets])


def constant(ids: Sequence[int], count: int, add: np.ndarray | None = None) -> Ragged:
    """The same ids in each of `count` rows, plus a number per row."""
    values = np.tile(np.asarray(ids, np.int64), count)
    if add is not None:
        values = values + np.repeat(add.astype(np.int64), len(ids))
    return Ragged(values, np.arange(count + 1, dtype=np.int64) * len(ids))


def shifted(rows: Ragged, by: int) -> Ragged:
    """Each value plus a number."""
    return Ragged(rows.values.astype(np.int64) + by, rows.offsets)


def join(parts: Sequence[Ragged]) -> Ragged:
    """Rows put one behind the other: row i of the result is row i of each part in turn."""
    lengths = np.stack([part.lengths for part in parts])  # (parts, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(0))]).astype(np.int64)
    starts = offsets[:-1] + np.cumsum(lengths, 0) - lengths
    values = np.empty(offsets[-1], dtype=np.result_type(*(part.values.dtype for part in parts)))
    for part, start in zip(parts, starts, strict=True):
        values[np.arange(len(part.values)) + np.repeat(start - part.offsets[:-1], part.lengths)] = part.values
    return Ragged(values, offsets)


def packed(rows: Ragged) -> Batch:
    """Rows as `input_ids` int64 `(1, tokens)` and `document_lengths`."""
    return {"document_lengths": tuple(rows.lengths.tolist()), **tensors(input_ids=rows.values[None])}


def pad(rows: Ragged, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a rectangle `(rows, longest)`, and where it is real."""
    lengths = rows.lengths
    real = np.arange(max(int(lengths.max(initial=0)), 1)) < lengths[:, None]
    padded = np.full(real.shape, fill, dtype=rows.values.dtype if fill == 0 else np.int64)
    padded[real] = rows.values
    return padded, real


def tensors(**arrays: np.ndarray) -> Batch:
    """Arrays as tensors: integers as int64, weights as float32."""
    return {
        name: torch.from_numpy(array if array.dtype == np.float32 else array.astype(np.int64))
        for name, array in arrays.items()
    }


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
