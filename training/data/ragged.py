"""Rows of different lengths in two flat arrays.

Histories, held-out items and token ids are kept this way, without a Python object per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, eq=False)
class Ragged:
    """An array of rows; row `i` is `values[offsets[i] : offsets[i + 1]]`.

    Attributes:
        values: All rows one after the other, `(total,)`, of any dtype.
        offsets: Where each row starts and the last one ends, int64 `(rows + 1,)`, from 0 to `total`.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if self.offsets.dtype != np.int64 or self.offsets.ndim != 1 or not len(self.offsets):
            raise ValueError(f"offsets must be int64 (rows + 1,), got {self.offsets.dtype} {self.offsets.shape}")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets must go from 0 to the {len(self.values)} values, got {self.offsets[0]} to {self.offsets[-1]}"
            )

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[Any] | np.ndarray], dtype: Any = np.int64) -> Ragged:
        """Copy a sequence of sequences into flat arrays."""
        offsets = _offsets(np.fromiter((len(row) for row in rows), np.int64, len(rows)))
        values = np.fromiter((value for row in rows for value in row), dtype, int(offsets[-1]))
        return cls(values, offsets)

    @classmethod
    def from_arrow(cls, column: pa.Array | pa.ChunkedArray) -> Ragged:
        """Take over a list column of numbers; the values are a view on Arrow's memory where the column is one chunk.

        Raises:
            ValueError: A list or a value of the column is null.
            TypeError: The column does not hold lists of numbers.
        """
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise TypeError(f"a list column is needed, got {column.type}")
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        parts = [_from_chunk(chunk) for chunk in chunks if len(chunk)]
        if not parts:
            return cls(np.empty(0, column.type.value_type.to_pandas_dtype()), np.zeros(1, np.int64))
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), _offsets(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index` as a view on `values`."""
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)} rows")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of each row, int64 `(rows,)`."""
        return self.offsets[1:] - self.offsets[:-1]

    def take(self, indices: np.ndarray | Sequence[int]) -> Ragged:
        """Return the rows `indices`, int `(n,)`, in that order and as often as they are named; no loop over rows.

        Raises:
            IndexError: An index is outside `[0, rows)`.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} rows")
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = _offsets(lengths)
        # Where a value lands, plus how far its row has moved, is where it comes from.
        sources = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[sources], offsets)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _from_chunk(chunk: pa.Array) -> Ragged:
    if chunk.null_count:
        raise ValueError(f"{chunk.null_count} of {len(chunk)} lists are null")
    # A slice of a longer array keeps the offsets into the whole.
    offsets = chunk.offsets.to_numpy().astype(np.int64)
    values = chunk.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise ValueError(f"{values.null_count} of {len(values)} values are null")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise TypeError(f"lists of numbers are needed, got lists of {values.type}")
    return Ragged(values.to_numpy(), offsets - offsets[0])
