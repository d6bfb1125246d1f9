"""The recommender as vectors: the inner product of a user's and an item's is the logit that the model gives.

A recommendation is then a maximum inner product search, which an index of approximate nearest neighbours does without
looking at the whole catalogue.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from training.evaluation.scoring import ModelScores

# Users whose vectors are held at a time; within them, prompts of like length share a batch.
USERS_AT_ONCE = 8192
ROWS_AT_ONCE = 65_536


def item_vectors(model: Any) -> Iterator[np.ndarray]:
    """Each item's embedding and, behind it, its bias (0 where the model has none), in blocks.

    Yields:
        float32 `(rows, width + 1)`, in the order of the items.
    """
    weight = model.get_output_embeddings().weight.detach()
    bias = model.model.item_bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    for rows, biases in zip(weight.split(ROWS_AT_ONCE), bias.split(ROWS_AT_ONCE), strict=True):
        yield torch.cat([rows, biases.unsqueeze(-1)], dim=-1).float().cpu().numpy()


def user_vectors(scores: ModelScores, batch_size: int, *, progress: bool = True) -> Iterator[np.ndarray]:
    """The state that the head reads at the end of each user's prompt and, behind it, 1 for the item's bias, in blocks.

    Args:
        scores: The recommendation head with everyone's histories; no items is a history, too.
        batch_size: Prompts in a forward pass.
        progress: Whether to show a progress bar.

    Yields:
        float32 `(rows, width + 1)`, in the order of the users.
    """
    num_users, width = len(scores.histories), scores.model.get_output_embeddings().weight.shape[1]
    starts = range(0, num_users, USERS_AT_ONCE)
    for start in tqdm(starts, desc="users", unit="block", disable=not progress, leave=False):
        block = scores.by_length(np.arange(start, min(start + USERS_AT_ONCE, num_users)))
        vectors = np.ones((len(block), width + 1), np.float32)
        for users in np.split(block, range(batch_size, len(block), batch_size)):
            vectors[users - start, :-1] = scores.states(users).float().cpu().numpy()
        yield vectors


def write_vectors(stem: Path, ids: pa.Array, blocks: Iterator[np.ndarray], width: int) -> None:
    """Write `stem.safetensors` (tensor `vectors`) and `stem.parquet` (`id`, `vector`), block by block.

    Args:
        stem: Path of both files, without their ending.
        ids: Raw id of each row.
        blocks: The rows, float32 `(rows, width)` each, `len(ids)` in all.
        width: Of the vectors.
    """
    schema = pa.schema([("id", ids.type), ("vector", pa.list_(pa.float32(), width))])
    header = {"dtype": "F32", "shape": [len(ids), width], "data_offsets": [0, 4 * len(ids) * width]}
    start = 0
    with (
        stem.with_suffix(".safetensors").open("wb") as file,
        pq.ParquetWriter(stem.with_suffix(".parquet"), schema, compression="zstd", use_dictionary=False) as writer,
    ):
        # The length of the header, the header, the bytes: safetensors' own writer wants the whole tensor in memory.
        text = json.dumps({"vectors": header}).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f4").data)
            rows = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), width)
            writer.write_table(pa.table([ids.slice(start, len(block)), rows], schema=schema))
            start += len(block)
