import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configuration.errors import InputError
from training.evaluation.predictions import predictions_file

USERS = ["ann", "bob", "cy"]
ITEMS = ["apron", "broom", "chair", "drill"]
LOGITS = np.float32([[2.0, 1.0, 0.0, -1.0], [0.0, 80.0, 0.0, 0.0], [-1000.0, 3.0, 3.0, 2.0]])
TOP = np.array([[1, 3, -1], [1, 0, 2], [2, 1, 3]])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "predictions.parquet"


def write(path, users=USERS, items=ITEMS, top_k=3, blocks=((0, 1, 2),)):
    with predictions_file(path, users, items, top_k) as write_block:
        for block in map(list, blocks):
            write_block(np.array(block), LOGITS[block], TOP[block])


def test_rows_are_raw_ids_best_first_with_probabilities_over_the_whole_catalogue(path):
    write(path)
    softmax = np.exp(LOGITS - LOGITS.max(1, keepdims=True), dtype=np.float64)
    softmax /= softmax.sum(1, keepdims=True)
    rows = pq.read_table(path).to_pylist()
    assert [row["user"] for row in rows] == USERS
    assert [row["items"] for row in rows] == [
        ["broom", "drill"],
        ["broom", "apron", "chair"],
        ["chair", "broom", "drill"],
    ]
    for row, probabilities, top in zip(rows, softmax, TOP, strict=True):
        assert row["scores"] == pytest.approx(probabilities[top[top >= 0]].tolist(), rel=1e-5)


def test_no_more_than_top_k_items_are_written(path):
    write(path, top_k=1)
    assert pq.read_table(path)["items"].to_pylist() == [["broom"], ["broom"], ["chair"]]


def test_blocks_of_users_follow_each_other_in_any_order(path):
    write(path, blocks=[(2,), (0, 1)])
    table = pq.read_table(path)
    assert table["user"].to_pylist() == ["cy", "ann", "bob"]
    write(path, blocks=[(0, 1, 2)])
    assert pq.read_table(path).take([2, 0, 1]).equals(table)


def test_whole_number_ids_stay_whole_numbers_and_the_catalogue_is_counted(path):
    write(path, users=[7, 8, 9], items=[10, 20, 30, 40])
    schema = pq.read_schema(path)
    assert schema.field("user").type == pa.int64()
    assert schema.field("items").type == pa.list_(pa.int64())
    assert schema.field("scores").type == pa.list_(pa.float32())
    assert schema.metadata[b"num_items"] == b"4"
    assert pq.read_table(path)["items"][0].as_py() == [20, 40]


def test_the_file_takes_its_name_only_when_all_is_written(path, tmp_path):
    path.write_text("old")
    with predictions_file(path, USERS, ITEMS, 3) as write_block:
        write_block(np.arange(3), LOGITS, TOP)
        assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert len(pq.read_table(path)) == 3


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_error_on_the_way_leaves_what_was_there(path, tmp_path, error):
    path.write_text("old")
    with pytest.raises(type(error)), predictions_file(path, USERS, ITEMS, 3):
        raise error
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "old")]


def test_a_full_disk_is_named_and_leaves_what_was_there(path, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    path.write_text("old")
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(InputError, match=r"predictions\.parquet: the disk is full"):
        write(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "old")]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"predictions\.parquet: cannot be written"):
        write(tmp_path / "no" / "predictions.parquet")
