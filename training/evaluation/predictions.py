"""Every user's best items in Parquet parts, so that several processes share the work and a broken run goes on.

A part is two files of one name: in `predictions/` a row per user with raw ids, for people; in `checkpoints/predict/` the same
users and items as indices, deep enough for every figure, so that a run that goes on does not rank them again.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.evaluation.ranking import PerUser
from training.files import file_written_whole

# Processes wait for each other after each part, and whoever breaks off loses less than one.
USERS_PER_PART = 10_000
USERS_READ_AT_A_TIME = 4096

NAME = re.compile(r"part-\d{5}-of-(\d{5})\.parquet")
FIGURES = tuple(PerUser.__dataclass_fields__)
OTHER_RANKINGS = ("validation", "by_history")
INDICES = pa.schema(
    [
        ("user", pa.int32()),
        ("items", pa.list_(pa.int32())),
        *((f"{ranking}_{figure}", pa.float64()) for ranking in OTHER_RANKINGS for figure in FIGURES),
    ]
)


class RankedUsers(NamedTuple):
    """Some users and how the catalogue was ranked for them.

    Attributes:
        users: User indices, int `(n,)`.
        items: Their best items where the test split is held out, int `(n, k)`, best first; -1 after the last.
        validation: The figures where the validation split is held out; nan for users without items there.
        by_history: The figures on test where the prompt names nobody; nan for users without items there.
    """

    users: np.ndarray
    items: np.ndarray
    validation: PerUser
    by_history: PerUser


# Ranked users and the probabilities of their items, (n, k).
PartWriter = Callable[[RankedUsers, np.ndarray], None]


@dataclass(frozen=True, eq=False)
class RawIds:
    """Raw ids of users and items in the order of their indices, text or whole numbers."""

    users: pa.Array
    items: pa.Array

    @classmethod
    def of(cls, users: list[Any], items: list[Any]) -> "RawIds":
        """From lists."""
        return cls(pa.array(users), pa.array(items))


@dataclass(frozen=True)
class Parts:
    """The parts of one ranking, numbered from 0.

    Attributes:
        predictions: Folder of the files for people.
        indices: Folder of the files for figures.
        count: How many parts there are.
        fingerprint: Of what was ranked; a file with another one is no part of it.
    """

    predictions: Path
    indices: Path
    count: int
    fingerprint: str

    @classmethod
    def plan(
        cls, predictions: Path, indices: Path, fingerprint: str, num_users: int, processes: int, *, resume: bool
    ) -> "Parts":
        """The same number for each process, of `USERS_PER_PART` users or fewer; to resume, as many as were begun with."""
        each = -(-num_users // (processes * USERS_PER_PART))
        count = min(each * processes, num_users)
        for path in sorted(predictions.glob("part-*")) if resume else ():
            name = NAME.fullmatch(path.name)
            if name and fingerprint_in(path) == fingerprint:
                count = int(name[1])
        return cls(predictions, indices, count, fingerprint)

    def files(self, number: int) -> tuple[Path, Path]:
        """The file for people and the one for figures."""
        name = f"part-{number:05}-of-{self.count:05}.parquet"
        return self.predictions / name, self.indices / name

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there, whole and of this ranking."""
        return [
            number
            for number in range(self.count)
            if any(fingerprint_in(path) != self.fingerprint for path in self.files(number))
        ]

    def remove_others(self) -> None:
        """Remove parts of another number of parts and what an interrupted process left."""
        names = {self.files(number)[0].name for number in range(self.count)}
        for folder in (self.predictions, self.indices):
            for path in (*folder.glob("part-*.parquet"), *folder.glob(".part-*")):
                if path.name not in names:
                    path.unlink()

    @contextmanager
    def write(self, number: int, ids: RawIds, top_k: int) -> Iterator[PartWriter]:
        """Open a part and give what writes its users, block by block; its files take their names when all went well.

        The file for people has `user`, `items` and `scores`: the `top_k` best, best first, with probabilities over the whole
        catalogue.

        Raises:
            InputError: if the disk is full or may not be written.
        """
        metadata = {"fingerprint": self.fingerprint, "num_items": str(len(ids.items))}
        schema = pa.schema(
            [("user", ids.users.type), ("items", pa.list_(ids.items.type)), ("scores", pa.list_(pa.float32()))],
            metadata,
        )
        for_people, for_figures = self.files(number)
        with (
            file_written_whole(for_figures) as indices,
            file_written_whole(for_people) as predictions,
            pq.ParquetWriter(indices, INDICES.with_metadata(metadata), compression="zstd") as indices_writer,
            pq.ParquetWriter(predictions, schema, compression="zstd") as predictions_writer,
        ):

            def write(ranked: RankedUsers, probabilities: np.ndarray) -> None:
                indices_writer.write_table(_indices_table(ranked, indices_writer.schema))
                best, scores = ranked.items[:, :top_k], probabilities[:, :top_k]
                there = best >= 0
                offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(axis=1))]), pa.int32())
                columns = [
                    ids.users.take(pa.array(ranked.users)),
                    pa.ListArray.from_arrays(offsets, ids.items.take(pa.array(best[there]))),
                    pa.ListArray.from_arrays(offsets, pa.array(scores[there], pa.float32())),
                ]
                predictions_writer.write_table(pa.table(columns, schema=schema))

            yield write

    def read(self) -> Iterator[RankedUsers]:
        """All users, some at a time."""
        for number in range(self.count):
            with pq.ParquetFile(self.files(number)[1]) as file:
                for rows in file.iter_batches(USERS_READ_AT_A_TIME):
                    rankings = (
                        PerUser(*(rows.column(f"{ranking}_{figure}").to_numpy() for figure in FIGURES))
                        for ranking in OTHER_RANKINGS
                    )
                    items = rows.column("items").flatten().to_numpy().reshape(len(rows), -1)
                    yield RankedUsers(rows.column("user").to_numpy(), items, *rankings)


def _indices_table(ranked: RankedUsers, schema: pa.Schema) -> pa.Table:
    count, k = ranked.items.shape
    rankings = (vars(getattr(ranked, name)).values() for name in OTHER_RANKINGS)
    columns = [
        pa.array(ranked.users, pa.int32()),
        pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1) * k, pa.int32()), pa.array(ranked.items.ravel(), pa.int32())
        ),
        *(pa.array(values) for figures in rankings for values in figures),
    ]
    return pa.table(columns, schema=schema)


def fingerprint_in(path: Path) -> str | None:
    """The fingerprint that a file was written with; None if it is not there or damaged."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    return metadata.get(b"fingerprint", b"").decode()


def ranking_fingerprint(model: Path, corpora_fingerprint: str, top_k: int, batch_size: int) -> str:
    """What the parts depend on: weights and configuration in the model's folder, the corpora, and how many items are kept.

    And how many prompts are ranked at a time, since users go to parts by the batch.
    """
    digest = hashlib.sha256(f"{corpora_fingerprint} {top_k} {batch_size}".encode())
    for path in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
