"""Tables of any supported kind as columns that know the place of each of their cells.

Whatever is wrong with a file or a cell becomes an `InputError` that names file, row and column.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import hashlib
import io
import json
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from configuration.errors import InputError

# What can come out of a damaged file while it is read.
_DAMAGE = (pa.ArrowException, EOFError, OSError, zlib.error, zipfile.BadZipFile, UnicodeDecodeError)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_MILLISECONDS_ABOVE = 1e11
_LATEST_MILLISECOND = 1e14


@dataclass(frozen=True)
class Table:
    """Columns as they stand in a file.

    Attributes:
        frame: The columns that were asked for, unchecked.
        name: What errors call the table: its path as given.
        place: Gives the place of a row, `row 7`, from its position in the frame.
        untyped: Whether all cells are text (CSV, TSV), so that ids of digits are taken for integers.
    """

    frame: pd.DataFrame
    name: str
    place: Callable[[int], str]
    untyped: bool = False

    def __len__(self) -> int:
        return len(self.frame)

    def error(self, position: int, column: str, complaint: str) -> InputError:
        """Say what is wrong with a cell, and where it stands."""
        return InputError(f"{self.name}, {self.place(position)}, column {column!r}: {complaint}")

    def cells(self, column: str) -> pd.Series:
        """Take the cells of a column: bytes as text, without lone surrogates, and without categories.

        Raises:
            InputError: Bytes are not UTF-8.
        """
        series = _plain(self.frame[column])
        if series.dtype != object and not (isinstance(series.dtype, pd.ArrowDtype) and series.dtype.kind == "O"):
            return series
        cells = []
        for position, cell in enumerate(series):
            try:
                cells.append(_as_text(cell))
            except UnicodeDecodeError:
                complaint = f"{reprlib.repr(cell)} is not UTF-8; write the column as text, or remove the row"
                raise self.error(position, column, complaint) from None
        return pd.Series(cells, dtype=object)

    def ids(self, column: str) -> pd.Series:
        """Read raw ids: int64 where every id of the column is an integer, else text.

        Raises:
            InputError: An id is missing, a list, or bytes that are not UTF-8.
        """
        series = self.cells(column)
        try:
            codes, uniques = pd.factorize(series)
        except TypeError:
            position = next(i for i, value in enumerate(series) if isinstance(value, (list, dict, np.ndarray)))
            raise self.error(position, column, f"{reprlib.repr(series.iloc[position])} cannot be an id") from None
        missing = codes < 0
        blank = [code for code, value in enumerate(uniques) if isinstance(value, str) and not value.strip()]
        if blank:
            missing |= np.isin(codes, blank)
        if missing.any():
            raise self.error(_first(missing), column, "the id is missing; fill it in or remove the row")
        return pd.Series(_uniform_ids(uniques, self.untyped).take(codes))

    def numbers(self, column: str) -> np.ndarray:
        """Read numbers, float64 `(rows,)`.

        Raises:
            InputError: A cell is empty, no number or not finite.
        """
        series = self.cells(column)
        numbers = _to_float(series)
        wrong = ~np.isfinite(numbers)
        if wrong.any():
            position = _first(wrong)
            raise self.error(position, column, f"{_cell(series, position)} is not a number; correct or remove the row")
        return numbers

    def unix_seconds(self, column: str) -> np.ndarray:
        """Read unix seconds, unix milliseconds (values above 1e11) or ISO dates as int64 seconds `(rows,)`.

        Raises:
            InputError: A cell is empty or none of these.
        """
        series = self.cells(column)
        if series.dtype.kind == "M":
            seconds = _dates_to_seconds(series)
        else:
            numbers = _to_float(series)
            seconds = np.where(np.abs(numbers) > _MILLISECONDS_ABOVE, numbers / 1000, numbers)
            seconds[np.abs(numbers) > _LATEST_MILLISECOND] = np.nan
            dates = (np.isnan(numbers) & series.notna().to_numpy()).nonzero()[0]
            text = series.iloc[dates].astype(str)
            # pandas takes "now" for a date, too, and pandas 2.2 gives a time without a zone that of the one before it.
            zoned = text.str.contains(r"[T ].*[Z+-]").to_numpy(bool)
            for group in (zoned, ~zoned):
                part = text[group]
                seconds[dates[group]] = _dates_to_seconds(part.where(part.str.match(r"\d{4}")))
        wrong = np.isnan(seconds)
        if wrong.any():
            position = _first(wrong)
            complaint = f"{_cell(series, position)} is neither a unix time nor an ISO date; correct or remove the row"
            raise self.error(position, column, complaint)
        return np.floor(seconds).astype(np.int64)

    def texts(self, column: str) -> list[str | None]:
        """Read texts without space around them; lists are joined with commas, empty cells are None.

        Raises:
            InputError: Bytes are not UTF-8.
        """
        return [flat_text(value) or None for value in self.cells(column)]


@dataclass(frozen=True)
class File:
    """A file that can be opened more than once: one on disk, compressed or not, or a member of an archive."""

    name: str
    open: Callable[[], BinaryIO]

    @classmethod
    def on_disk(cls, path: Path, name: str) -> File:
        """Name a file on disk; it is unpacked while it is read where it ends in `.gz`."""
        if path.suffix.lower() == ".gz":
            return cls(name, lambda: cast(BinaryIO, gzip.open(path)))
        return cls(name, lambda: path.open("rb"))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Read the number, from 1, and the text of each line that is not blank.

        Raises:
            InputError: The file cannot be read, or is not UTF-8.
        """
        offset = 0
        try:
            with self.open() as handle:
                for number, line in enumerate(handle, 1):
                    try:
                        text = line.decode("utf-8")
                    except UnicodeDecodeError as error:
                        raise InputError(
                            f"{self.name}, row {number}: byte {offset + error.start} of the file, "
                            f"0x{line[error.start]:02x}, is not UTF-8; save the file as UTF-8"
                        ) from None
                    offset += len(line)
                    if not text.isspace():
                        yield number, text.removeprefix("\ufeff") if number == 1 else text
        except _DAMAGE as error:
            raise_damaged(self.name, error)


def read_table(path: Path, name: str, columns: Mapping[str, str], decode: Callable[[str], Any] = json.loads) -> Table:
    """Read columns of a CSV, TSV, Parquet or JSON lines file; the ending of its name says which, `.gz` may follow.

    Args:
        path: The file.
        name: What errors call it.
        columns: The columns to read, each with the field of the recipe that names it.
        decode: What makes an object of a line of JSON lines.

    Raises:
        InputError: The file is damaged, empty, of an unknown kind, or lacks a column.
    """
    endings = [suffix.lower() for suffix in path.suffixes]
    ending = endings[-2] if len(endings) > 1 and endings[-1] == ".gz" else "".join(endings[-1:])
    file = File.on_disk(path, name)
    if path.is_dir():
        raise InputError(f"{name} is a folder, not a table; name a file in it, or set data.format to dataset")
    if ending in _DELIMITERS:
        return read_delimited(file, _DELIMITERS[ending], columns)
    if ending in _JSON_LINES:
        return read_json_lines(file, {column: (column,) for column in columns}, columns, decode=decode)
    if endings[-1:] == [".parquet"]:
        return _read_parquet(path, name, columns)
    raise InputError(
        f"{name}: the ending {path.suffix!r} is of no known table; name the file .csv, .tsv, .jsonl or .parquet "
        "(all but the last also with .gz)"
    )


def read_delimited(
    file: File,
    delimiter: str,
    columns: Mapping[str, str],
    header: Sequence[str] | None = None,
    encoding: str = "utf-8",
    quoting: bool = True,
) -> Table:
    """Read columns of delimited text, every cell as text, empty ones as missing.

    Args:
        file: The file.
        delimiter: What stands between two cells.
        columns: The columns to read, each with the field of the recipe that names it.
        header: Names of the file's columns; by default its first line has them.
        encoding: The file's encoding.
        quoting: Whether cells may stand in double quotes.

    Raises:
        InputError: The file is damaged, empty, not in that encoding, lacks a column, or has rows of unequal length.
    """
    layout = _Layout(delimiter, header is not None, encoding, quoting)
    try:
        names = list(header) if header else next((cells for _, cells in layout.records(file)), [])
        if not names:
            raise InputError(f"{file.name} is empty; a table with a header and rows is needed")
        check_columns(file.name, names, columns)
        with file.open() as handle:
            table = _parse(handle, layout, names, columns)
    except (*_DAMAGE, csv.Error) as error:
        layout.explain(file, error)
    check_rows(file.name, table)
    if "\n" in (table[names[-1]][-1].as_py() or "") and layout.has_open_quote(file):
        place = layout.place(file, len(table) - 1)
        raise InputError(f"{file.name}, {place}: a double quote is opened and never closed; close or remove it")
    frame = table.select(list(columns)).to_pandas()
    return Table(frame, file.name, lambda position: layout.place(file, position), untyped=True)


def read_json_lines(
    file: File,
    columns: Mapping[str, Sequence[str]],
    fields: Mapping[str, str],
    optional: Sequence[str] = (),
    decode: Callable[[str], Any] = json.loads,
) -> Table:
    """Read columns of JSON lines.

    Args:
        file: The file.
        columns: For each column the keys it may go by; the first that a row has counts.
        fields: For each column the field of the recipe that names it, or what else to call it.
        optional: Columns that are left out where no row has them.
        decode: What makes an object of a line.

    Raises:
        InputError: The file is damaged or empty, a line is not a JSON object, or no row has a column.
    """
    cells: dict[str, list[Any]] = {column: [] for column in columns}
    rows: list[int] = []
    keys: dict[str, None] = {}
    for number, line in file.lines():
        try:
            row = decode(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or first_line(error)
            raise InputError(f"{file.name}, row {number}: the line is not valid JSON ({reason})") from None
        if not isinstance(row, dict):
            raise InputError(f"{file.name}, row {number}: a JSON object is needed, not {reprlib.repr(row)}")
        keys.update(dict.fromkeys(row))
        rows.append(number)
        for column, aliases in columns.items():
            cells[column].append(next((row[key] for key in aliases if row.get(key) is not None), None))
    check_rows(file.name, rows)
    for column, aliases in columns.items():
        if keys.keys().isdisjoint(aliases):
            if column not in optional:
                check_columns(file.name, list(keys), {aliases[0]: fields[column]})
            del cells[column]
    frame = pd.DataFrame({column: pd.Series(values, dtype=object) for column, values in cells.items()})
    return Table(frame, file.name, lambda position: f"row {rows[position]}")


def table_of_frame(frame: pd.DataFrame, columns: Mapping[str, str]) -> Table:
    """Take columns of a notebook's DataFrame; errors name the label of a row in its index.

    Raises:
        InputError: The frame is empty or lacks a column.
    """
    check_columns("the DataFrame", list(frame.columns), columns)
    check_rows("the DataFrame", frame)
    index = frame.index
    return Table(
        frame[list(columns)].reset_index(drop=True), "the DataFrame", lambda position: f"index {index[position]}"
    )


def table_of_arrow(table: pa.Table, name: str, columns: Mapping[str, str]) -> Table:
    """Take columns of an Arrow table; errors count its rows from 1.

    Raises:
        InputError: The table is empty or lacks a column, or a text is not UTF-8.
    """
    check_columns(name, table.column_names, columns)
    check_rows(name, table)
    table = table.select(list(columns))
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{name}: the columns {', '.join(columns)} are damaged ({first_line(error)})") from None
    return Table(table.to_pandas(integer_object_nulls=True), name, lambda position: f"row {position + 1}")


def check_columns(name: str, there: Sequence[Any], wanted: Mapping[str, str]) -> None:
    """See that a table has each wanted column once.

    Raises:
        InputError: It has not; the sentence names the columns that are there and the nearest.
    """
    for column, field in wanted.items():
        if column not in there:
            near = difflib.get_close_matches(column, [str(other) for other in there], 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            listed = ", ".join(str(other) for other in there)
            raise InputError(f"{name}: there is no column {column!r} ({field}); {hint}the columns are {listed}")
        if list(there).count(column) > 1:
            raise InputError(f"{name}: the column {column!r} ({field}) is there more than once; rename one")


def check_rows(name: str, rows: Any) -> None:
    """See that a table has rows.

    Raises:
        InputError: It has none.
    """
    if not len(rows):
        raise InputError(f"{name} has no rows; a table with at least one is needed")


def raise_damaged(name: str, error: Exception) -> NoReturn:
    """Turn what the system says about a file that cannot be read into an `InputError`."""
    if isinstance(error, FileNotFoundError):
        raise InputError(f"{name}: there is no such file") from error
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)):
        raise InputError(f"{name} is truncated or no archive ({first_line(error)}); fetch it again") from error
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    raise InputError(f"{name} cannot be read ({reason}); check the file or fetch it again") from error


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_of_frame(frame: pd.DataFrame) -> str:
    """Hex SHA-256 of a frame's column names and cells, in their order; the index does not count."""
    digest = hashlib.sha256()
    for column in frame:
        values = _plain(frame[column])
        if isinstance(values.dtype, pd.ArrowDtype) and pa.types.is_nested(values.dtype.pyarrow_dtype):
            values = values.astype(object)
        if values.dtype == object:
            values = values.map(lambda cell: _as_text(str(cell)))
        digest.update(f"{column}\0".encode())
        digest.update(pd.util.hash_pandas_object(values, index=False).to_numpy("<u8").tobytes())
    return digest.hexdigest()


def flat_text(value: Any) -> str:
    """Text of a cell: of a list its texts joined with commas, of nothing the empty string."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        value = [f"{key}: {flat_text(inner)}" for key, inner in value.items()]
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(filter(None, map(flat_text, value)))
    return "" if pd.isna(value) else str(value)


def first_line(error: BaseException) -> str:
    """Cut an error down to its first line, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _Layout:
    """How delimited text is laid out; finds the line of a record again, which only an error needs."""

    delimiter: str
    headless: bool
    encoding: str
    quoting: bool

    def records(self, file: File, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
        """First line, from 1, and cells of each record, the header included."""
        encoding = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        with io.TextIOWrapper(file.open(), encoding=encoding, newline="") as text:
            reader = csv.reader(
                text,
                delimiter=self.delimiter,
                quoting=csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
                strict=strict,
            )
            line = 1
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1

    def place(self, file: File, position: int) -> str:
        """Line of the record at `position`, as an editor shows it."""
        record = position + (0 if self.headless else 1)
        try:
            return f"row {next(line for i, (line, _) in enumerate(self.records(file)) if i == record)}"
        except (csv.Error, StopIteration):
            return f"record {position + 1}"

    def has_open_quote(self, file: File) -> bool:
        """Whether the file ends within quotes."""
        try:
            for _ in self.records(file, strict=True):
                pass
        except csv.Error as error:
            return "unexpected end" in str(error)
        return False

    def explain(self, file: File, error: Exception) -> NoReturn:
        """Say why a file could not be parsed."""
        if self.encoding == "utf-8":
            for _ in file.lines():
                pass
        width = None
        try:
            for line, cells in self.records(file):
                width = width or len(cells)
                if len(cells) != width:
                    raise InputError(
                        f"{file.name}, row {line}: {len(cells)} cells where the first row has {width}; "
                        f"cells with {self.delimiter!r} in them need double quotes"
                    )
        except csv.Error as found:
            error = found
        raise_damaged(file.name, error)


def _parse(handle: BinaryIO, layout: _Layout, names: Sequence[str], columns: Mapping[str, str]) -> pa.Table:
    """Parse a few columns as text.

    Unlike pandas, Arrow refuses rows that are too long or too short also where only some columns are kept.
    """
    # The last column, too: an open quote swallows everything up to the end of the file.
    kept = list(dict.fromkeys([*columns, names[-1]]))
    return pa.csv.read_csv(
        handle,
        pa.csv.ReadOptions(
            block_size=1 << 24, encoding=layout.encoding, column_names=list(names) if layout.headless else None
        ),
        pa.csv.ParseOptions(
            delimiter=layout.delimiter,
            quote_char='"' if layout.quoting else False,
            newlines_in_values=layout.quoting,
        ),
        pa.csv.ConvertOptions(
            column_types=dict.fromkeys(kept, pa.string()),
            include_columns=kept,
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _read_parquet(path: Path, name: str, columns: Mapping[str, str]) -> Table:
    try:
        check_columns(name, pa.parquet.read_schema(path).names, columns)
        return table_of_arrow(pa.parquet.read_table(path, columns=list(columns), partitioning=None), name, columns)
    except _DAMAGE as error:
        reason = first_line(error)
        raise InputError(f"{name} is truncated or not Parquet ({reason}); write or fetch it again") from error


def _uniform_ids(uniques: Any, untyped: bool) -> np.ndarray:
    """Distinct ids as int64 where all are integers, else as text."""
    values = list(uniques)
    if all(isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in values):
        numbers = pd.to_numeric(pd.Series(values, dtype=object)).to_numpy()
        # Integers become floats where pandas met a missing cell: 7.0 is the id 7. Beyond 2**53 floats skip integers.
        if numbers.dtype.kind == "i" or (
            numbers.dtype.kind == "f" and bool(((numbers == np.trunc(numbers)) & (np.abs(numbers) < 2**53)).all())
        ):
            return numbers.astype(np.int64)
    text = pd.Series([str(value) for value in values], dtype=object)
    # "007" and "7" are two ids, and 18 digits always fit.
    if untyped and bool(text.str.fullmatch(r"0|-?[1-9][0-9]{0,17}").all()):
        return text.astype(np.int64).to_numpy()
    return text.to_numpy(dtype=object)


def _as_text(cell: Any) -> Any:
    """Text for bytes, which Spark and Impala write, and `?` for lone surrogates, which JSON can hold and UTF-8 cannot; else the cell."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8")
    if isinstance(cell, str):
        return cell if cell.isascii() else cell.encode("utf-8", "replace").decode("utf-8")
    if isinstance(cell, (list, np.ndarray)):
        return [_as_text(inner) for inner in cell]
    if isinstance(cell, dict):
        return {_as_text(key): _as_text(inner) for key, inner in cell.items()}
    return cell


def _plain(series: pd.Series) -> pd.Series:
    """Take the values of a categorical column without its categories."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        return series.astype(series.cat.categories.dtype)
    return series


def _to_float(series: pd.Series) -> np.ndarray:
    """Numbers as float64, everything else as NaN."""
    if isinstance(series.dtype, pd.StringDtype):
        # Where every cell is a plain number Arrow reads them at once; it refuses the rest.
        with contextlib.suppress(pa.ArrowInvalid):
            return np.array(pa.Array.from_pandas(series).cast(pa.float64()), dtype=np.float64)
    return np.array(pd.to_numeric(series, errors="coerce").astype("float64"), dtype=np.float64)


def _dates_to_seconds(dates: pd.Series) -> np.ndarray:
    parsed = pd.DatetimeIndex(pd.to_datetime(dates, format="ISO8601", utc=True, errors="coerce")).tz_convert(None)
    seconds = parsed.to_numpy().astype("datetime64[s]").astype(np.int64).astype(np.float64)
    return np.where(parsed.isna(), np.nan, seconds)


def _cell(series: pd.Series, position: int) -> str:
    value = series.iloc[position]
    return "an empty cell" if flat_text(value) == "" else reprlib.repr(value)


def _first(mask: np.ndarray) -> int:
    return int(np.argmax(mask))
