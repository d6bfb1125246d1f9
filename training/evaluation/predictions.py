"""Every user's best items with raw ids, streamed into one Parquet file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.evaluation.ranking import BlockReader
from training.files import unwritable


@contextmanager
def predictions_file(path: Path, user_ids: list[Any], item_ids: list[Any], top_k: int) -> Iterator[BlockReader]:
    """Open a Parquet file with a row per user: `user`, `items` and `scores`, best first, and give what writes its blocks.

    Scores are probabilities over the whole catalogue. The file takes its name when the block ends without an error.

    Raises:
        InputError: if the disk is full or may not be written.
    """
    users, items = pa.array(user_ids), pa.array(item_ids)
    schema = pa.schema(
        [("user", users.type), ("items", pa.list_(items.type)), ("scores", pa.list_(pa.float32()))],
        metadata={"num_items": str(len(item_ids))},
    )
    temporary = path.with_name(f".{path.name}.part")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:

            def write(block: np.ndarray, logits: np.ndarray, top: np.ndarray) -> None:
                ranked = top[:, :top_k]
                there = ranked >= 0
                offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(1))]), pa.int32())
                highest = logits.max(axis=1, keepdims=True)
                total = np.exp(logits - highest).sum(axis=1, keepdims=True)
                scores = np.exp(np.take_along_axis(logits, np.maximum(ranked, 0), axis=1) - highest) / total
                columns = [
                    users.take(pa.array(block)),
                    pa.ListArray.from_arrays(offsets, items.take(pa.array(ranked[there]))),
                    pa.ListArray.from_arrays(offsets, pa.array(scores[there], pa.float32())),
                ]
                writer.write_table(pa.table(columns, schema=schema))

            yield write
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
