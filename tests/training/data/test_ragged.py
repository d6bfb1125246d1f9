import numpy as np
import pyarrow as pa
import pytest

from training.data.ragged import Ragged

ROWS = [[3, 1], [], [4], [1, 5, 9], []]


def as_lists(ragged):
    return [row.tolist() for row in ragged]


def test_from_lists_keeps_rows_lengths_and_dtype():
    ragged = Ragged.from_lists(ROWS, dtype=np.int32)
    assert as_lists(ragged) == ROWS
    assert len(ragged) == 5
    assert ragged.lengths.tolist() == [2, 0, 1, 3, 0]
    assert (ragged.values.dtype, ragged.offsets.dtype) == (np.int32, np.int64)


def test_from_lists_of_no_rows_is_empty():
    ragged = Ragged.from_lists([])
    assert len(ragged) == 0
    assert ragged.offsets.tolist() == [0]


def test_rows_are_views_on_the_values():
    ragged = Ragged.from_lists(ROWS)
    assert np.shares_memory(ragged[3], ragged.values)
    assert ragged[-2].tolist() == [1, 5, 9]
    with pytest.raises(IndexError, match="row 5 of 5 rows"):
        ragged[5]
    with pytest.raises(IndexError):
        ragged[-6]


def test_take_equals_a_loop_over_rows():
    rng = np.random.default_rng(0)
    ragged = Ragged.from_lists([rng.integers(0, 100, n).tolist() for n in rng.integers(0, 6, 40)])
    indices = rng.integers(0, 40, 100)
    taken = ragged.take(indices)
    assert as_lists(taken) == [ragged[i].tolist() for i in indices]
    assert taken.values.dtype == ragged.values.dtype


@pytest.mark.parametrize("indices", [[], [1], [4, 1, 4]])
def test_take_of_nothing_and_of_empty_rows(indices):
    taken = Ragged.from_lists(ROWS).take(indices)
    assert as_lists(taken) == [[] for _ in indices]


@pytest.mark.parametrize("indices", [[0, 5], [-1]])
def test_take_refuses_rows_that_are_not_there(indices):
    with pytest.raises(IndexError, match="of 5 rows"):
        Ragged.from_lists(ROWS).take(np.array(indices))


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64())])
def test_from_arrow_shares_the_memory_of_one_chunk(kind):
    array = pa.array(ROWS, kind)
    for column in (array, pa.chunked_array([array])):
        ragged = Ragged.from_arrow(column)
        assert as_lists(ragged) == ROWS
        assert np.shares_memory(ragged.values, array.values.to_numpy())


def test_from_arrow_of_a_slice_starts_at_zero():
    array = pa.array(ROWS, pa.list_(pa.int32())).slice(1, 3)
    ragged = Ragged.from_arrow(array)
    assert as_lists(ragged) == ROWS[1:4]
    assert ragged.offsets.tolist() == [0, 0, 1, 4]


def test_from_arrow_joins_chunks():
    array = pa.array(ROWS, pa.list_(pa.int32()))
    ragged = Ragged.from_arrow(pa.chunked_array([array.slice(0, 2), array.slice(2, 0), array.slice(2)]))
    assert as_lists(ragged) == ROWS
    assert ragged.values.dtype == np.int32


def test_from_arrow_of_no_rows_keeps_the_dtype():
    ragged = Ragged.from_arrow(pa.chunked_array([], pa.list_(pa.int32())))
    assert (len(ragged), ragged.values.dtype) == (0, np.int32)


@pytest.mark.parametrize(
    ("rows", "kind", "error"),
    [
        ([[1], None], pa.list_(pa.int32()), ValueError),
        ([[1, None]], pa.list_(pa.int32()), ValueError),
        ([1, 2], pa.int32(), TypeError),
        ([["a"]], pa.list_(pa.string()), TypeError),
    ],
)
def test_from_arrow_refuses_nulls_and_what_is_no_list_of_numbers(rows, kind, error):
    with pytest.raises(error):
        Ragged.from_arrow(pa.array(rows, kind))


@pytest.mark.parametrize(
    "offsets", [np.array([0, 2]), np.array([1, 3]), np.array([0, 3], np.int32), np.array([], np.int64)]
)
def test_offsets_must_span_the_values(offsets):
    with pytest.raises(ValueError, match="offsets must"):
        Ragged(np.arange(3), offsets)
