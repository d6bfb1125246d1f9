"""Parts of the predictions: what is in them, when they take their names, and which of them a resumed run makes again."""

import errno
import json
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configuration.errors import InputError
from training.evaluation import predictions
from training.evaluation.predictions import Parts, RankedUsers, RawIds, ranking_fingerprint
from training.evaluation.ranking import PerUser

USERS = ["ann", "bob", "cy"]
ITEMS = ["apron", "broom", "chair", "drill"]
TOP = np.array([[1, 3, -1], [1, 0, 2], [2, 1, 3]])
SCORES = np.float32([[0.5, 0.25, 0.0], [0.75, 0.125, 0.0625], [0.375, 0.25, 0.125]])


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "predictions", tmp_path / "indices", 2, "mark")


def ranked(users):
    """Figures that name their user."""
    of_user = np.asarray(users, float)
    return RankedUsers(
        np.asarray(users),
        TOP[users],
        PerUser(of_user, of_user + 0.25, of_user + 0.5),
        PerUser(of_user + 10, of_user + 20, np.full(len(users), np.nan)),
    )


def write(parts, number=0, blocks=((0, 1, 2),), users=USERS, items=ITEMS, top_k=3):
    with parts.write(number, RawIds.of(users, items), top_k) as write_block:
        for block in map(list, blocks):
            write_block(ranked(block), SCORES[block])


def table(parts, number=0):
    return pq.read_table(parts.files(number)[0])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# What is in a part


def test_rows_are_raw_ids_and_probabilities_best_first(parts):
    write(parts)
    assert table(parts).to_pylist() == [
        {"user": "ann", "items": ["broom", "drill"], "scores": [0.5, 0.25]},
        {"user": "bob", "items": ["broom", "apron", "chair"], "scores": [0.75, 0.125, 0.0625]},
        {"user": "cy", "items": ["chair", "broom", "drill"], "scores": [0.375, 0.25, 0.125]},
    ]


def test_no_more_than_top_k_items_are_shown_and_all_are_kept(parts):
    write(parts, top_k=1)
    assert table(parts)["items"].to_pylist() == [["broom"], ["broom"], ["chair"]]
    np.testing.assert_array_equal(next(parts.read()).items, TOP)


def test_blocks_of_users_follow_each_other_in_any_order(parts):
    write(parts, blocks=[(2,), (0, 1)])
    assert table(parts)["user"].to_pylist() == ["cy", "ann", "bob"]


def test_whole_number_ids_stay_whole_numbers_and_the_catalogue_is_counted(parts):
    write(parts, users=[7, 8, 9], items=[10, 20, 30, 40])
    schema = pq.read_schema(parts.files(0)[0])
    assert schema.field("user").type == pa.int64()
    assert schema.field("items").type == pa.list_(pa.int64())
    assert schema.field("scores").type == pa.list_(pa.float32())
    assert schema.metadata[b"num_items"] == b"4"
    assert table(parts)["items"][0].as_py() == [20, 40]


def test_what_was_ranked_comes_back_a_few_users_at_a_time(parts, monkeypatch):
    monkeypatch.setattr(predictions, "USERS_READ_AT_A_TIME", 1)
    write(parts, 0, [(2,), (0,)])
    write(parts, 1, [(1,)])
    back = list(parts.read())
    assert [block.users.tolist() for block in back] == [[2], [0], [1]]
    for block in back:
        expected = ranked(block.users)
        np.testing.assert_array_equal(block.items, expected.items)
        for mine, theirs in ((block.validation, expected.validation), (block.by_history, expected.by_history)):
            for name, values in vars(theirs).items():
                np.testing.assert_array_equal(getattr(mine, name), values)


def test_no_raw_id_is_in_the_files_for_figures(parts):
    write(parts)
    kept = pq.read_table(parts.files(0)[1])
    assert not {str(field.type) for field in kept.schema} - {"int32", "list<element: int32>", "double"}
    assert not any(name in json.dumps(kept.to_pydict()) for name in USERS + ITEMS)


def test_pandas_and_datasets_open_the_folder(parts, tmp_path):
    write(parts, 0, [(2,), (0,)])
    write(parts, 1, [(1,)])
    (parts.predictions / ".part-00002-of-00003.parquet.part").write_text("of a process that is writing")
    frame = pd.read_parquet(parts.predictions)
    assert frame["user"].tolist() == ["cy", "ann", "bob"]
    assert frame["items"][2].tolist() == ["broom", "apron", "chair"]
    opened = datasets.load_dataset(str(parts.predictions), split="train", cache_dir=str(tmp_path / "cache"))
    assert opened["user"][:] == ["cy", "ann", "bob"]


# Whole or not at all


def test_a_part_takes_its_names_only_when_all_is_written(parts, tmp_path):
    for path in parts.files(0):
        path.parent.mkdir()
        path.write_text("old")
    with parts.write(0, RawIds.of(USERS, ITEMS), 3) as write_block:
        write_block(ranked([0, 1, 2]), SCORES)
        assert [path.read_text() for path in parts.files(0)] == ["old", "old"]
        assert parts.missing() == [0, 1]
    assert files(tmp_path) == ["indices/part-00000-of-00002.parquet", "predictions/part-00000-of-00002.parquet"]
    assert parts.missing() == [1]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_error_on_the_way_leaves_what_was_there(parts, tmp_path, error):
    def fails(blocks):
        yield blocks[0]
        raise error

    write(parts, 0)
    before = table(parts)
    with pytest.raises(type(error)):
        write(parts, 0, fails([(1,)]))
    assert table(parts).equals(before)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_is_named_and_leaves_what_was_there(parts, tmp_path, monkeypatch, number):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(parts, 0)
    before = table(parts)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(InputError, match=rf"predictions/part-0000{number}-of-00002\.parquet: the disk is full"):
        write(parts, number)
    assert table(parts).equals(before)
    assert len(files(tmp_path)) == 2


def test_a_folder_that_may_not_be_written_is_named(parts):
    parts.predictions.write_text("a file")
    with pytest.raises(InputError, match=r"predictions/part-00001-of-00002\.parquet: cannot be written"):
        write(parts, 1)


# Which parts there are


def plan(parts, fingerprint="mark", num_users=95, processes=1, resume=False):
    return Parts.plan(parts.predictions, parts.indices, fingerprint, num_users, processes, resume=resume).count


def test_each_process_gets_the_same_number_of_parts_of_a_bounded_size(parts, monkeypatch):
    monkeypatch.setattr(predictions, "USERS_PER_PART", 10)
    assert [plan(parts, processes=processes) for processes in (1, 2, 3, 4, 10, 200)] == [10, 10, 12, 12, 10, 95]
    assert plan(parts, num_users=1) == plan(parts, num_users=10) == 1
    assert plan(parts, num_users=11) == 2


def test_whoever_goes_on_keeps_the_number_of_parts(parts):
    assert plan(parts, processes=3, resume=True) == 3
    write(parts, 1)
    assert plan(parts, processes=3, resume=True) == 2
    assert plan(parts, processes=3) == 3
    assert plan(parts, "of another model", processes=3, resume=True) == 3


@pytest.mark.parametrize("side", [0, 1])
def test_a_part_that_lacks_a_file_is_made_again(parts, side):
    for number in range(2):
        write(parts, number)
    assert parts.missing() == []
    parts.files(1)[side].unlink()
    assert parts.missing() == [1]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing more", None])
def test_a_damaged_part_is_made_again(parts, side, content):
    for number in range(2):
        write(parts, number)
    path = parts.files(0)[side]
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert parts.missing() == [0]


def test_parts_of_another_ranking_are_made_again(parts):
    write(parts, 0)
    write(replace(parts, fingerprint="of another model"), 1)
    pq.write_table(pa.table({"user": USERS}), parts.files(0)[1])
    assert parts.missing() == [0, 1]


def test_parts_of_another_number_and_what_was_left_half_written_go(parts, tmp_path):
    write(parts, 1)
    write(replace(parts, count=3), 1)
    for folder in (parts.predictions, parts.indices):
        (folder / ".part-00000-of-00002.parquet.part").write_text("half")
        (folder / "notes.txt").write_text("somebody's")
    parts.remove_others()
    assert files(tmp_path) == [
        f"{folder}/{name}"
        for folder in ("indices", "predictions")
        for name in ("notes.txt", "part-00001-of-00002.parquet")
    ]


@pytest.mark.parametrize(
    "changed", ["config.json", "model-00002-of-00002.safetensors", "corpora", "top_k", "batch_size", None]
)
def test_the_fingerprint_is_of_all_that_a_ranking_depends_on(tmp_path, changed):
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    before = ranking_fingerprint(tmp_path, "corpora", 100, 256)
    (tmp_path / (changed if changed and "." in changed else "README.md")).write_text("changed")
    after = ranking_fingerprint(
        tmp_path,
        "other" if changed == "corpora" else "corpora",
        10 if changed == "top_k" else 100,
        64 if changed == "batch_size" else 256,
    )
    assert (after == before) == (changed is None)
