import gzip
import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from configuration.errors import InputError
from configuration.recipe import Data, SideTable
from training.data import readers, tables
from training.data.readers import read_tables

HEADER = ["user", "item", "rating", "time", "review"]
ROWS = [
    ("u1", "NA", 5, 1_000_000_000, "good, and\n“long”"),
    ("u2", "null", 3.5, 1_000_000_001, None),
    ("u1", "007", 1, 1_000_000_002, "bad"),
]
COLUMNS = {"rating_column": "rating", "timestamp_column": "time", "review_column": "review"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, content):
    """Write text, bytes or JSON objects; packed where the name ends in .gz."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


def interactions(content, name="table.csv", **fields):
    return read_tables(Data(path=write(name, content), **fields)).interactions


def write_rows(name, rows=ROWS, header=HEADER):
    frame = pd.DataFrame(rows, columns=header)
    if ".parquet" in name:
        frame.to_parquet(name)
    elif ".jsonl" in name:
        frame.to_json(name, orient="records", lines=True, force_ascii=False)
    else:
        frame.to_csv(name, index=False, sep="\t" if ".tsv" in name else ",")
    return name


# What is read


@pytest.mark.parametrize(
    "name", ["t.csv", "t.tsv", "t.csv.gz", "T.TSV.GZ", "t.jsonl", "t.jsonl.gz", "t.parquet", "DataFrame"]
)
def test_every_kind_of_table_gives_the_same_interactions(name):
    if name == "DataFrame":
        raw = read_tables(Data(**COLUMNS), frame=pd.DataFrame(ROWS, columns=HEADER, index=[9, 8, 7]))
    else:
        name_of_kind = name.lower().removesuffix(".gz")
        write_rows(name_of_kind)
        if name.lower().endswith(".gz"):
            Path(name).write_bytes(gzip.compress(Path(name_of_kind).read_bytes()))
        raw = read_tables(Data(path=name, **COLUMNS))
    frame = raw.interactions
    assert frame["user"].tolist() == ["u1", "u2", "u1"]
    assert frame["item"].tolist() == ["NA", "null", "007"]
    assert frame["rating"].tolist() == [5.0, 3.5, 1.0]
    assert frame["timestamp"].tolist() == [1_000_000_000, 1_000_000_001, 1_000_000_002]
    assert frame["timestamp"].dtype == np.int64
    assert [text if isinstance(text, str) else None for text in frame["review"]] == [row[4] for row in ROWS]
    assert list(raw.source) == [name]


def test_only_the_columns_named_are_there():
    frame = interactions("user,item,rating\n1,2,bad\n", split="random")
    assert list(frame.columns) == ["user", "item"]


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_no_matter():
    frame = interactions(b"\xef\xbb\xbfuser,item\r\n1,2\r\n\r\n3,4\r\n")
    assert frame.to_numpy().tolist() == [[1, 2], [3, 4]]
    frame = interactions(b'\xef\xbb\xbf{"user": 1, "item": 2}\r\n\r\n{"user": 3, "item": 4}', "t.jsonl")
    assert frame.to_numpy().tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("cells", "ids"),
    [
        (["1", "20", "-3"], [1, 20, -3]),
        (["1", "02"], ["1", "02"]),
        (["1", "a"], ["1", "a"]),
        (["1", "12345678901234567890"], ["1", "12345678901234567890"]),
    ],
)
def test_ids_of_text_files_are_integers_where_all_are_written_like_them(cells, ids):
    frame = interactions("user,item\n" + "".join(f"{cell},x\n" for cell in cells))
    assert frame["user"].tolist() == ids


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (pd.Series(["1", "2"]), ["1", "2"]),
        (pd.Series([1, 2], dtype="int32"), [1, 2]),
        (pd.Series([1, 2], dtype="category"), [1, 2]),
        (pd.Series([1.0, 2.0]), [1, 2]),
        (pd.Series([1.5, 2.0]), ["1.5", "2.0"]),
        (pd.Series([1, "b"], dtype=object), ["1", "b"]),
        (pd.Series([True, False]), ["True", "False"]),
        (pd.Series([2**63, 1], dtype="uint64"), [str(2**63), "1"]),
        (pd.Series([10**30, 1], dtype=object), [str(10**30), "1"]),
    ],
    ids=lambda value: str(value.tolist()) if isinstance(value, pd.Series) else "",
)
def test_typed_ids_stay_integers_or_text(values, ids):
    frame = read_tables(Data(), frame=pd.DataFrame({"user": values, "item": values})).interactions
    assert frame["user"].tolist() == ids
    assert [type(raw) for raw in frame["user"].tolist()] == [type(raw) for raw in ids]


@pytest.mark.parametrize(
    "cells",
    [
        pd.Series([1_400_000_000, 0]),
        pd.Series([1_400_000_000_999, 0]),
        pd.Series(["1400000000", "1970-01-01"]),
        pd.Series(["2014-05-13T16:53:20Z", "1970-01-01"]),
        pd.Series(["2014-05-13 18:53:20.5+02:00", "1970-01-01 00:00"]),
        pd.to_datetime(pd.Series(["2014-05-13 16:53:20", "1970-01-01 00:00:00"])),
        pd.to_datetime(pd.Series(["2014-05-13 18:53:20+02:00", "1970-01-01 02:00:00+02:00"])),
        *(
            pd.Series(
                pa.array([1_400_000_000 * ticks, 0], pa.timestamp(unit, zone)),
                dtype=pd.ArrowDtype(pa.timestamp(unit, zone)),
            )
            for unit, ticks, zone in (("s", 1, None), ("us", 10**6, "Europe/Berlin"), ("ns", 10**9, None))
        ),
    ],
    ids=lambda cells: f"{cells.iloc[0]} {cells.dtype}",
)
def test_times_are_unix_seconds_or_milliseconds_or_dates(cells):
    frame = pd.DataFrame({"user": [1, 2], "item": [1, 2], "time": cells})
    read = read_tables(Data(timestamp_column="time"), frame=frame).interactions
    assert read["timestamp"].tolist() == [1_400_000_000, 0]


def test_lone_surrogates_become_question_marks_in_ids_and_texts():
    rows = [
        {"user": "a\ud83d", "item": "x\ud83d", "review": "nice \ud83d"},
        {"user": "b", "item": "y", "review": ["ü", "\udc00!"]},
    ]
    items = write("items.jsonl", [{"id": "x\ud83d", "name": "X\ud83d", "text": {"by\ud83d": "me\ud83d"}}])
    side = SideTable(path=items, title_column="name", text_columns=["text"])
    of_file = read_tables(Data(path=write("t.jsonl", rows), review_column="review", items=side))
    of_frame = read_tables(Data(review_column="review"), frame=pd.DataFrame(rows, dtype=object))
    for raw in (of_file, of_frame):
        assert raw.interactions.to_numpy().tolist() == [["a?", "x?", "nice ?"], ["b", "y", "ü, ?!"]]
    assert of_file.items.to_numpy().tolist() == [["x?", "X?", "by?: me?"]]


@pytest.mark.parametrize("kind", ["file", "DataFrame", "DataFrame of Arrow"])
def test_binary_columns_are_read_as_utf8(kind):
    table = pa.table({
        "user": pa.array(["ä".encode(), b"a"], pa.binary()), "item": pa.array([b"x", b"y"], pa.large_binary()),
        "time": pa.array([b"5", b"1970-01-01"], pa.binary()), "split": pa.array([b"train", b"test"], pa.binary()),
        "review": pa.array([[b"good", b"old"], None], pa.list_(pa.binary())),
    })  # fmt: skip
    data = Data(timestamp_column="time", review_column="review", split="given")
    frame = None
    if kind == "file":
        pyarrow.parquet.write_table(table, "t.parquet")
        data = replace(data, path="t.parquet")
    else:
        frame = table.to_pandas(types_mapper=pd.ArrowDtype if kind == "DataFrame of Arrow" else None)
    found = read_tables(data, frame=frame).interactions[["user", "item", "timestamp", "review", "split"]]
    assert found.astype(object).to_numpy().tolist() == [
        ["ä", "x", 5, "good, old", "train"],
        ["a", "y", 0, None, "test"],
    ]


@pytest.mark.parametrize("column", ["user", "item", "review"])
def test_bytes_that_are_no_utf8_are_refused_with_their_place(column):
    cells = {name: [b"a", b"\xff" if name == column else b"b"] for name in ("user", "item", "review")}
    pyarrow.parquet.write_table(pa.table(cells), "t.parquet")
    place = rf"t\.parquet, row 2, column '{column}': b'\\xff' is not UTF-8; write the column as text"
    with pytest.raises(InputError, match=place):
        read_tables(Data(path="t.parquet", review_column="review"))


def test_tables_of_items_and_users_have_titles_and_joined_texts():
    write_rows("t.parquet")
    frame = pd.DataFrame({"id": ["007", "NA"], "name": ["Bond", None], "about": ["A film!", "An item"]})
    frame["tags"] = [["spy", " uk ", ""], []]
    frame.to_parquet("items.parquet")
    write("users.csv", "id,about\nu1,one\nu2,\n")
    raw = read_tables(
        Data(
            path="t.parquet",
            items=SideTable(path="items.parquet", title_column="name", text_columns=["name", "about", "tags"]),
            users=SideTable(path="users.csv", text_columns=["about"]),
        )
    )
    assert raw.items.to_dict("list") == {
        "item": ["007", "NA"],
        "title": ["Bond", "NA"],
        "text": ["Bond. A film! spy, uk", "An item"],
    }
    assert raw.users.to_dict("list") == {"user": ["u1", "u2"], "title": ["u1", "u2"], "text": ["one", ""]}
    assert list(raw.source) == ["t.parquet", "items.parquet", "users.csv"]


def test_given_split_comes_from_a_column_or_from_a_table_of_its_own():
    frame = interactions("user,item,part\n1,2,train\n1,3,test\n", split="given", split_column="part")
    assert frame["split"].tolist() == ["train", "test"]
    write("split.tsv.gz", "user\titem\tsplit\n1\t3\tvalidation\n2\tb\ttrain\n")
    data = Data(path=write("t.jsonl", [{"user": 2, "item": "b"}, {"user": 1, "item": "2"}, {"user": 1, "item": "3"}]))
    raw = read_tables(replace(data, split="given", split_path="split.tsv.gz"))
    assert raw.interactions["split"].fillna("not listed").tolist() == ["train", "not listed", "validation"]
    assert list(raw.source) == ["t.jsonl", "split.tsv.gz"]


def test_source_is_the_sha256_of_the_files_and_numbers_equal_names(tmp_path):
    for folder, cells in (("acme", "id\nx\n"), ("anna.secret", "id\n1\n")):
        (tmp_path / folder).mkdir()
        write(f"{folder}/t.csv", cells)
    content = "user,item\n1,x\n"
    sides = {"items": SideTable(path="acme/t.csv"), "users": SideTable(path=str(tmp_path / "anna.secret" / "t.csv"))}
    raw = read_tables(Data(path=write("t.csv", content), **sides))
    assert raw.source == {
        "t.csv": hashlib.sha256(content.encode()).hexdigest(),
        "t.csv (2)": hashlib.sha256(b"id\nx\n").hexdigest(),
        "t.csv (3)": hashlib.sha256(b"id\n1\n").hexdigest(),
    }


def test_source_of_a_dataframe_follows_its_content():
    frame = pd.DataFrame({"user": ["a", "b"], "item": [1, 2], "other": [0, 0]})
    (mark,) = read_tables(Data(), frame=frame).source.values()
    assert len(mark) == 64
    assert read_tables(Data(), frame=frame.assign(other=1)[["other", "item", "user"]]).source["DataFrame"] == mark
    assert read_tables(Data(), frame=frame.assign(item=[1, 3])).source["DataFrame"] != mark
    assert read_tables(Data(), frame=frame.iloc[::-1]).source["DataFrame"] != mark


def test_paths_are_found_from_the_current_folder_first_then_from_the_project(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.setattr(readers, "_PROJECT", project)
    write("project/t.csv", "user,item\n1,1\n")
    assert read_tables(Data(path="t.csv")).interactions["user"].tolist() == [1]
    write("t.csv", "user,item\n2,1\n")
    assert read_tables(Data(path="t.csv")).interactions["user"].tolist() == [2]


# Formats


def write_ml_100k(folder):
    folder.mkdir()
    genres = ["unknown", "Action", "Children's"]
    (folder / "u.data").write_text("5\t1\t4\t881250949\n6\t2\t2\t881250950\n", encoding="utf-8")
    (folder / "u.genre").write_text("".join(f"{genre}|{i}\n" for i, genre in enumerate(genres)) + "\n")
    (folder / "u.item").write_text(
        '1|"Café" (1995)|01-Jan-1995||http://x|0|1|1\n2|unknown||||1|0|0\n', encoding="latin-1"
    )
    (folder / "u.user").write_text("5|24|M|technician|85711\n6|53|F|other|94043\n")
    return folder


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"ml-100k/{file.name}")
    return path


def assert_is_ml_100k(raw):
    assert raw.interactions.to_dict("list") == {
        "user": [5, 6],
        "item": [1, 2],
        "rating": [4.0, 2.0],
        "timestamp": [881250949, 881250950],
    }
    assert raw.items.to_dict("list") == {
        "item": [1, 2],
        "title": ['"Café" (1995)', "unknown"],
        "text": ['"Café" (1995). Action, Children\'s', "unknown"],
    }
    assert raw.users["user"].tolist() == [5, 6]
    assert raw.users["text"].tolist() == [
        "24 years old, male, occupation technician",
        "53 years old, female, occupation other",
    ]


def test_ml_100k_is_read_from_its_folder(tmp_path):
    write_ml_100k(tmp_path / "ml")
    raw = read_tables(Data(format="ml-100k", path="ml"))
    assert_is_ml_100k(raw)
    assert list(raw.source) == ["u.data", "u.item", "u.user", "u.genre"]


def test_ml_100k_is_read_from_its_zip(tmp_path):
    path = zip_of(write_ml_100k(tmp_path / "ml"), tmp_path / "ml-100k.zip")
    raw = read_tables(Data(format="ml-100k", path="ml-100k.zip"))
    assert_is_ml_100k(raw)
    assert raw.source == {"ml-100k.zip": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_ml_100k_is_downloaded_where_it_is_missing(tmp_path, monkeypatch):
    served = zip_of(write_ml_100k(tmp_path / "ml"), tmp_path / "served.zip")
    monkeypatch.setattr(readers, "ML_100K_URL", served.as_uri())
    monkeypatch.setattr(readers, "ML_100K_SHA256", hashlib.sha256(served.read_bytes()).hexdigest())
    assert_is_ml_100k(read_tables(Data(format="ml-100k", path="data/ml-100k.zip")))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ml-100k.zip"]


def test_a_download_with_another_sha256_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "served.zip").write_bytes(b"something else")
    monkeypatch.setattr(readers, "ML_100K_URL", (tmp_path / "served.zip").as_uri())
    with pytest.raises(InputError, match=r"has SHA-256 .*, not 50d2a982"):
        read_tables(Data(format="ml-100k", path="data/ml-100k.zip"))
    assert list((tmp_path / "data").iterdir()) == []


def test_without_network_the_sentence_names_url_path_and_remedy(tmp_path, monkeypatch):
    url = (tmp_path / "nowhere.zip").as_uri()
    monkeypatch.setattr(readers, "ML_100K_URL", url)
    with pytest.raises(InputError) as caught:
        read_tables(Data(format="ml-100k", path="data/ml-100k.zip"))
    sentence = str(caught.value)
    assert url in sentence
    assert "fetch it elsewhere and put it at data/ml-100k.zip" in sentence
    assert list((tmp_path / "data").iterdir()) == []


AMAZON = {
    "2014": [
        {
            "reviewerID": "A1",
            "asin": "0001",
            "overall": 5.0,
            "reviewText": "Fine.",
            "summary": "ok",
            "unixReviewTime": 9,
        },
        {"reviewerID": "A2", "asin": "B2", "overall": 1.0, "reviewText": "", "summary": "no", "unixReviewTime": 8},
        {"reviewerID": "A1", "asin": "B2", "overall": 3.0, "reviewText": "", "summary": "", "unixReviewTime": 7},
    ],
    "2018": [
        {"reviewerID": "A1", "asin": "0001", "overall": 5.0, "reviewText": "Fine.", "unixReviewTime": 9},
        {"reviewerID": "A2", "asin": "B2", "overall": 1.0, "summary": "no", "unixReviewTime": 8},
        {"reviewerID": "A1", "asin": "B2", "overall": 3.0, "unixReviewTime": 7, "vote": "2"},
    ],
    "2023": [
        {
            "user_id": "A1",
            "asin": "X",
            "parent_asin": "0001",
            "rating": 5,
            "text": "Fine.",
            "title": "",
            "timestamp": 9000,
        },
        {"user_id": "A2", "asin": "B2", "parent_asin": "B2", "rating": 1, "text": "", "title": "no", "timestamp": 8000},
        {"user_id": "A1", "asin": "B2", "rating": 3, "text": "", "title": "", "timestamp": 7000},
    ],
}
AMAZON["2023"] = [{**row, "timestamp": row["timestamp"] + 1_600_000_000_000} for row in AMAZON["2023"]]


@pytest.mark.parametrize("release", AMAZON)
def test_amazon_reviews_of_every_release(release):
    frame = interactions(AMAZON[release], "reviews.json.gz", format="amazon-reviews")
    start = 1_600_000_000 if release == "2023" else 0
    assert frame["user"].tolist() == ["A1", "A2", "A1"]
    assert frame["item"].tolist() == ["0001", "B2", "B2"]
    assert frame["rating"].tolist() == [5.0, 1.0, 3.0]
    assert frame["timestamp"].tolist() == [start + 9, start + 8, start + 7]
    assert frame["review"].tolist() == ["Fine.", "no", None]


def test_amazon_metadata_may_be_python_literals_and_repeat_an_item():
    write(
        "meta.json",
        "{'asin': '0001', 'title': 'It\\'s', 'categories': [['Music', 'Pop']]}\n"
        '{"asin": "B2", "title": "Two", "description": ["a", "b"]}\n'
        '{"asin": "B2", "title": "Two again"}\n',
    )
    items = SideTable(
        path="meta.json", id_column="asin", title_column="title", text_columns=["title", "description", "categories"]
    )
    raw = read_tables(
        Data(format="amazon-reviews", path=write("r.json", AMAZON["2014"]), items=items),
    )
    assert raw.items.to_dict("list") == {
        "item": ["0001", "B2"],
        "title": ["It's", "Two"],
        "text": ["It's. Music, Pop", "Two. a, b"],
    }


def test_sequences_are_a_line_a_user_in_order():
    frame = interactions("7 3 1 2\n\n8 9\n", "Beauty.txt", format="sequences")
    assert frame.to_numpy().tolist() == [[7, 3], [7, 1], [7, 2], [8, 9]]
    assert list(frame.columns) == ["user", "item"]


def test_datasets_are_read_from_folders_of_save_to_disk(tmp_path):
    saved = datasets.Dataset.from_dict({"who": ["a", "b"], "what": [1, 2], "when": [5, 6]})
    saved.save_to_disk("one")
    datasets.DatasetDict({"train": saved, "rest": saved.select([1])}).save_to_disk("several")
    fields = {"format": "dataset", "user_column": "who", "item_column": "what", "timestamp_column": "when"}
    one = read_tables(Data(path="one", **fields))
    assert one.interactions.to_dict("list") == {"user": ["a", "b"], "item": [1, 2], "timestamp": [5, 6]}
    assert len(one.source["one"]) == 64
    rest = read_tables(Data(path="several", dataset_split="rest", **fields))
    assert rest.interactions["user"].tolist() == ["b"]
    for splits in ("train+rest", "all"):
        assert read_tables(Data(path="several", dataset_split=splits, **fields)).interactions["user"].tolist() == [
            *"abb"
        ]
    with pytest.raises(InputError, match=r"several: .*no split 'tests' but train, rest"):
        read_tables(Data(path="several", dataset_split="tests", **fields))


def test_datasets_are_read_from_folders_that_load_dataset_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo").mkdir()
    write("repo/train.csv", "user,item\na,1\n")
    assert read_tables(Data(format="dataset", path="repo")).interactions["item"].tolist() == [1]
    write("repo/test.csv", "user,item\na,2\n")
    for splits, items in (("train+test", [1, 2]), ("all", [1, 2]), ("test", [2])):
        assert (
            read_tables(Data(format="dataset", path="repo", dataset_split=splits)).interactions["item"].tolist()
            == items
        )
    with pytest.raises(InputError, match=r"repo: there is no column 'usr' .data.user_column.; did you mean 'user'"):
        read_tables(Data(format="dataset", path="repo", user_column="usr"))
    with pytest.raises(InputError, match=r"repo: the dataset cannot be opened .*data.dataset_split"):
        read_tables(Data(format="dataset", path="repo", dataset_split="tests"))


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "fields", "sentence"),
    [
        ("t.csv", "usr,item\n1,2\n", {}, "t.csv: there is no column 'user' (data.user_column); did you mean 'usr'? "
         "the columns are usr, item"),
        ("t.jsonl", [{"usr": 1, "item": 2}], {}, "there is no column 'user' (data.user_column); did you mean 'usr'?"),
        ("t.csv", "user,item,user\n1,2,3\n", {}, "the column 'user' (data.user_column) is there more than once"),
        ("t.csv", "", {}, "t.csv is empty"),
        ("t.csv", "user,item\n", {}, "t.csv has no rows"),
        ("t.jsonl", "\n", {}, "t.jsonl has no rows"),
        ("t.txt", "user,item\n1,2\n", {}, "t.txt: the ending '.txt' is of no known table"),
        ("t", "user,item\n1,2\n", {}, "t: the ending '' is of no known table"),
        ("t.csv", "user,item,rating\n1,2,5\n\n1,3,five\n", {"rating_column": "rating"},
         "t.csv, row 4, column 'rating': 'five' is not a number"),
        ("t.csv", "user,item,rating\n1,2,\n", {"rating_column": "rating"},
         "row 2, column 'rating': an empty cell is not a number"),
        ("t.csv", "user,item,rating\n1,2,inf\n", {"rating_column": "rating"}, "row 2, column 'rating': 'inf' is not"),
        ("t.csv", 'user,item,rating,note\n1,2,5,"a\nb"\n1,3,five,\n', {"rating_column": "rating"},
         "t.csv, row 4, column 'rating': 'five'"),
        ("t.jsonl", '{"user": 1, "item": 2, "rating": 1}\n\n{"user": 1, "item": 3, "rating": [5]}\n',
         {"rating_column": "rating"}, "t.jsonl, row 3, column 'rating': [5] is not a number"),
        ("t.tsv", "user\titem\n1\t2\n\t3\n", {}, "t.tsv, row 3, column 'user': the id is missing"),
        ("t.csv", "user,item\n1,2\n1,  \n", {}, "t.csv, row 3, column 'item': the id is missing"),
        ("t.jsonl", [{"user": 1, "item": 2}, {"user": 1}], {}, "t.jsonl, row 2, column 'item': the id is missing"),
        ("t.jsonl", [{"user": 1, "item": 2}, {"user": [1], "item": 2}], {}, "row 2, column 'user': [1] cannot be"),
        ("t.csv", "user,item,time\n1,2,2014-01-01\n1,3,12/05/2014\n", {"timestamp_column": "time"},
         "t.csv, row 3, column 'time': '12/05/2014' is neither a unix time nor an ISO date"),
        ("t.csv", "user,item,time\n1,2,now\n", {"timestamp_column": "time"}, "row 2, column 'time': 'now' is neither"),
        ("t.csv", "user,item,time\n1,2,\n", {"timestamp_column": "time"}, "column 'time': an empty cell is neither"),
        ("t.csv", "user,item,time\n1,2,1e17\n", {"timestamp_column": "time"}, "column 'time': '1e17' is neither"),
        ("t.csv", "user,item,split\n1,2,train\n1,3,valid\n", {"split": "given"},
         "t.csv, row 3, column 'split': 'valid' is no split; it must be train, validation, test"),
        ("t.csv", "user,item,split\n1,2,\n", {"split": "given"}, "row 2, column 'split': "),
        ("t.csv", b"user,item\n1,a\n1,caf\xe9\n", {}, "t.csv, row 3: byte 19 of the file, 0xe9, is not UTF-8"),
        ("t.csv.gz", b"user,item\n1,a\n1,caf\xe9\n", {}, "t.csv.gz, row 3: byte 19 of the file, 0xe9, is not UTF-8"),
        ("t.csv", b"us\xe9r,item\n1,a\n", {}, "t.csv, row 1: byte 2 of the file, 0xe9, is not UTF-8"),
        ("t.jsonl", b'{"user": 1, "item": "a"}\n{"user": 1, "item": "\xff"}\n', {}, "t.jsonl, row 2: byte 46 of the"),
        ("t.csv", "user,item\n1,2\n1,2,3\n", {}, "t.csv, row 3: 3 cells where the first row has 2"),
        ("t.csv", "user,item\n1,2\n1\n", {}, "t.csv, row 3: 1 cells where the first row has 2"),
        ("t.csv", 'user,item\n1,2\n1,"3\n1,4\n', {}, "t.csv, row 3: a double quote is opened and never closed"),
        ("t.jsonl", '{"user": 1, "item": 2}\n{"user": 1, "item"\n', {}, "t.jsonl, row 2: the line is not valid JSON"),
        ("t.jsonl", "[" * 100_000, {}, "t.jsonl, row 1: the line is not valid JSON"),
        ("t.json", '[{"user": 1, "item": 2}]\n', {}, "t.json, row 1: a JSON object is needed, not ["),
        ("t.csv", "user,item\n1,2\n", {"split": "given"}, "there is no column 'split' (data.split_column)"),
        ("t.txt", "1 2 3\n4\n", {"format": "sequences"}, "t.txt, row 2: the user '4' has no items"),
        ("t.txt", "\n", {"format": "sequences"}, "t.txt has no rows"),
        ("t.txt", b"1 2\n1 \xff\n", {"format": "sequences"}, "t.txt, row 2: byte 6 of the file, 0xff, is not UTF-8"),
        ("t.txt", "1 2\n", {"format": "sequences", "split": "given"}, "name a table that has one in data.split_path"),
        ("r.json", [{"asin": "x"}], {"format": "amazon-reviews"}, "r.json: there is no column 'reviewerID'"),
        ("r.json", [{"reviewerID": "a", "asin": "x", "overall": "?"}], {"format": "amazon-reviews"},
         "r.json, row 1, column 'rating': '?' is not a number"),
    ],
)  # fmt: skip
def test_bad_interactions_are_refused_with_their_place(name, content, fields, sentence):
    with pytest.raises(InputError) as caught:
        interactions(content, name, **fields)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["table", "amazon-reviews", "sequences"])
def test_missing_file_is_named(kind):
    with pytest.raises(InputError, match=r"nowhere\.csv: there is no such file, .*; correct data\.path"):
        read_tables(Data(format=kind, path="nowhere.csv"))


@pytest.mark.parametrize("kind", ["table", "ml-100k", "amazon-reviews", "sequences", "dataset"])
def test_path_must_be_set(kind):
    with pytest.raises(InputError, match=r"data\.path is not set"):
        read_tables(Data(format=kind))


@pytest.mark.parametrize("kind", ["table", "amazon-reviews", "sequences"])
def test_folder_in_place_of_a_file_is_refused(kind, tmp_path):
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(InputError, match=r"t\.csv (is a folder|cannot be read \(Is a directory\))"):
        read_tables(Data(format=kind, path="t.csv"))


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
def test_truncated_gzip_is_refused(name):
    rows = "".join(f'{{"user": {i}, "item": {i * i}}}\n' for i in range(1000))
    content = rows if "jsonl" in name else "user,item\n" + "".join(f"{i},{i * i}\n" for i in range(1000))
    whole = gzip.compress(content.encode())
    for damaged in (whole[: len(whole) // 2], b"plain text, in fact\n"):
        Path(name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name} is truncated or no archive"):
            read_tables(Data(path=name))


@pytest.mark.parametrize("size", [0, 3, 200])
def test_truncated_parquet_is_refused(size, tmp_path):
    write_rows("t.parquet")
    path = tmp_path / "t.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"t\.parquet is truncated or not Parquet"):
        read_tables(Data(path="t.parquet"))


def test_parquet_rows_count_from_one_and_text_must_be_utf8():
    write_rows("t.parquet", [("a", "x"), (None, "y")], ["user", "item"])
    with pytest.raises(InputError, match=r"t\.parquet, row 2, column 'user': the id is missing"):
        read_tables(Data(path="t.parquet"))
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    pa.parquet.write_table(pa.table({"user": text, "item": [1]}), "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet: .*UTF8"):
        read_tables(Data(path="t.parquet"))


def test_dataframe_errors_name_the_label_of_the_row():
    frame = pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": [1, "five"]}, index=[40, 41])
    with pytest.raises(InputError, match="the DataFrame, index 41, column 'rating': 'five' is not a number"):
        read_tables(Data(rating_column="rating"), frame=frame)
    with pytest.raises(InputError, match="the DataFrame has no rows"):
        read_tables(Data(), frame=frame.iloc[:0])


@pytest.mark.parametrize("role", ["items", "users"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id,name\nx,1\ny,2\nx,3\n", "side.csv, row 4, column 'id': 'x' is already in row 2"),
        ("id,name\nx,1\n,2\n", "side.csv, row 3, column 'id': the id is missing"),
        ("name,ids\nx,1\n", "there is no column 'id' (data.{role}.id_column); did you mean 'ids'?"),
        ("id,text\nx,1\n", "there is no column 'name' (data.{role}.title_column)"),
        ("id,name\n", "side.csv has no rows"),
    ],
)
def test_bad_side_tables_are_refused_with_their_place(role, content, sentence):
    write("t.csv", "user,item\nx,x\n")
    side = SideTable(path=write("side.csv", content), title_column="name")
    with pytest.raises(InputError) as caught:
        read_tables(Data(path="t.csv", **{role: side}))
    assert sentence.format(role=role) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("user,item,split\n1,2,train\n1,9,test\n5,5,test\n", "split.csv, row 3, column 'item': 2 of the 3 listed pairs "
         "are not among the interactions; the split must be of these data (the first: user 1, item 9)"),
        ("user,item,split\n1,2,train\n1,3,test\n1,2,train\n", "split.csv, row 4, column 'item': 1 of the 3 "
         "listed pairs are listed before"),
        ("user,item,split\n1,2,dev\n", "split.csv, row 2, column 'split': 'dev' is no split"),
        ("user,item\n1,2\n", "split.csv: there is no column 'split' (data.split_column)"),
    ],
)  # fmt: skip
def test_bad_split_tables_are_refused_with_their_place(content, sentence):
    write("split.csv", content)
    with pytest.raises(InputError) as caught:
        interactions("user,item\n1,2\n1,3\n", split="given", split_path="split.csv")
    assert sentence in str(caught.value)


def test_damaged_ml_100k_is_refused_with_its_place(tmp_path):
    folder = write_ml_100k(tmp_path / "ml")
    data = Data(format="ml-100k", path="ml")
    (folder / "u.data").write_text("5\t1\t4\t881250949\n6\t2\tgood\t881250950\n")
    with pytest.raises(InputError, match=r"ml/u\.data, row 2, column 'rating': 'good' is not a number"):
        read_tables(data)
    (folder / "u.data").write_text("5\t1\t4\t881250949\n6\t2\t881250950\n")
    with pytest.raises(InputError, match=r"ml/u\.data, row 2: 3 cells where the first row has 4"):
        read_tables(data)
    (folder / "u.user").unlink()
    with pytest.raises(InputError, match=r"ml: the folder has no file u\.user"):
        read_tables(data)
    zip_of(folder, tmp_path / "lacking.zip")
    with pytest.raises(InputError, match=r"lacking\.zip: the zip has no file u\.user"):
        read_tables(Data(format="ml-100k", path="lacking.zip"))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "lacking.zip").read_bytes()[:100])
    with pytest.raises(InputError, match=r"cut\.zip is truncated or not a zip"):
        read_tables(Data(format="ml-100k", path="cut.zip"))


def test_users_of_ml_100k_that_u_user_lacks_are_named(tmp_path):
    from training.data.interactions import build_interactions

    folder = write_ml_100k(tmp_path / "ml")
    (folder / "u.user").write_text("5|24|M|technician|85711\n")
    data = Data(format="ml-100k", path="ml")
    with pytest.raises(InputError, match=r"ml: the table of users lacks 1 of 2 users \(6\)"):
        build_interactions(read_tables(data), data, 0)


@pytest.mark.parametrize("dtype", ["str", "string", object])
@pytest.mark.parametrize(
    "cells",
    [["1", "2.5", None, "-3e5", "+5", ".5"], ["nan", "inf", "-Infinity", "1e400"], ["1", "five"], ["1", " 2"], ["", "1."],
     ["1,000", "0x10", "1_000", "True"], ["9007199254740993", repr(0.1 + 0.2), "123456789012345678901234567890"], []],
)  # fmt: skip
def test_numbers_are_those_that_pandas_reads(cells, dtype):
    series = pd.Series(cells, dtype=dtype)
    expected = pd.to_numeric(series, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    found = tables._to_float(series)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)
    found[:] = 0  # an array of its own
