import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from configuration.errors import InputError
from configuration.recipe import Data, SideTable
from training.data.interactions import TEST, TRAIN, VALIDATION, build_interactions
from training.data.readers import RawTables, read_tables

SAMPLE = Data(
    path="training/data/sample/interactions.parquet",
    user_column="project",
    item_column="library",
    items=SideTable(path="training/data/sample/libraries.parquet", id_column="library", text_columns=["description"]),
    users=SideTable(path="training/data/sample/projects.parquet", id_column="project", text_columns=["description"]),
    split="given",
)


def tables(rows, columns=("user", "item"), **others):
    return RawTables(pd.DataFrame(rows, columns=list(columns)), **others)


def pairs(interactions, split=None):
    """Raw ids of the pairs, in their order."""
    chosen = np.ones(len(interactions), bool) if split is None else interactions.splits == split
    return [
        (interactions.user_ids[user], interactions.item_ids[item])
        for user, item in zip(interactions.users[chosen], interactions.items[chosen], strict=True)
    ]


def long_histories(lengths):
    return tables([(user, item) for user, length in enumerate(lengths) for item in range(length)])


def test_rows_are_sorted_by_user_then_time_then_order_of_the_rows():
    raw = tables(
        [("b", "x", 5), ("a", "z", 9), ("a", "y", 7), ("a", "x", 7), ("b", "w", 5)], ("user", "item", "timestamp")
    )
    interactions = build_interactions(raw, Data(), 0)
    assert pairs(interactions) == [("a", "y"), ("a", "x"), ("a", "z"), ("b", "x"), ("b", "w")]
    assert interactions.timestamps.tolist() == [7, 7, 9, 5, 5]
    assert (interactions.users.dtype, interactions.items.dtype, interactions.splits.dtype) == (
        np.int32,
        np.int32,
        np.int8,
    )


@pytest.mark.parametrize(
    ("users", "side", "dropped"),
    [
        ([9, 10, 9, 8, 7], None, [7, 8, 10]),
        (["9", "10", "9", "é", "7"], None, ["10", "7", "é"]),
        ([9, 10, 9, 8, 7], [9, 11], [7, 8, 10, 11]),
        ([9, 10, 9, 8, 7], ["9", "ann"], ["10", "7", "8", "ann"]),
    ],
)
def test_raw_ids_of_users_that_nothing_is_left_of_are_kept(users, side, dropped):
    rows = [(user, item, 5 if user != users[3] else 1) for user, item in zip(users, "xxyyx", strict=True)]
    raw = tables(rows, ("user", "item", "rating"))
    if side is not None:
        raw.users = pd.DataFrame({"user": side, "title": "", "text": ""})
    interactions = build_interactions(raw, Data(min_rating=2, min_user_interactions=2), 0)
    assert (interactions.user_ids, interactions.dropped_users) == ([users[0]], dropped)
    assert [type(user) for user in interactions.dropped_users] == [type(user) for user in dropped]


def test_without_times_the_order_of_the_rows_counts():
    interactions = build_interactions(tables([(1, 3), (0, 1), (1, 2), (1, 9)]), Data(), 0)
    assert pairs(interactions) == [(0, 1), (1, 3), (1, 2), (1, 9)]
    assert interactions.timestamps is None


def test_integer_ids_are_sorted_by_value_and_text_by_text():
    integers = build_interactions(tables([(10, 7), (9, 7)]), Data(), 0)
    assert integers.user_ids == [9, 10]
    assert all(type(raw) is int for raw in integers.user_ids)
    text = build_interactions(tables([("10", "7"), ("9", "7"), ("é", "7")]), Data(), 0)
    assert text.user_ids == ["10", "9", "é"]


def test_repeated_pairs_keep_the_last_by_time_and_are_counted():
    raw = tables(
        [("a", "x", 9, "late"), ("a", "x", 3, "early"), ("a", "y", 1, "one"), ("a", "y", 1, "two")],
        ("user", "item", "timestamp", "review"),
    )
    interactions = build_interactions(raw, Data(), 0)
    assert pairs(interactions) == [("a", "y"), ("a", "x")]
    assert interactions.reviews == ["two", "late"]
    assert interactions.log["repeated"] == 2


def test_low_ratings_are_left_out_and_counted():
    raw = tables([("a", "x", 4.0), ("a", "y", 3.5), ("b", "y", 5.0)], ("user", "item", "rating"))
    interactions = build_interactions(raw, Data(min_rating=4), 0)
    assert pairs(interactions) == [("a", "x"), ("b", "y")]
    assert interactions.log == {
        "rows": 3,
        "below_min_rating": 1,
        "repeated": 0,
        "below_min_interactions": 0,
        "interactions": 2,
    }


def test_k_core_is_repeated_until_stable():
    # Item z falls first, which leaves user c one interaction, which leaves item y one, which leaves b one.
    raw = tables(
        [("a", "w"), ("a", "x"), ("b", "x"), ("b", "y"), ("c", "y"), ("c", "z"), ("d", "w"), ("d", "x")],
    )
    interactions = build_interactions(raw, Data(min_user_interactions=2, min_item_interactions=2), 0)
    assert interactions.user_ids == ["a", "d"]
    assert interactions.item_ids == ["w", "x"]
    assert interactions.log["below_min_interactions"] == 4


def test_k_core_counts_repeated_pairs_once():
    raw = tables([("a", "x"), ("a", "x"), ("b", "x"), ("b", "y")])
    assert build_interactions(raw, Data(min_user_interactions=2), 0).user_ids == ["b"]


def test_random_split_holds_a_tenth_of_each_user_but_at_least_one():
    lengths = [1, 2, 3, 4, 14, 15, 25, 100]
    interactions = build_interactions(long_histories(lengths), Data(), 0)
    counts = [np.bincount(interactions.splits[interactions.users == user], minlength=3).tolist() for user in range(8)]
    held_out = [0, 0, 1, 1, 1, 2, 3, 10]
    assert counts == [[n - 2 * h, h, h] for n, h in zip(lengths, held_out, strict=True)]


def test_random_split_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    raw = long_histories([20, 30, 40])
    shuffled = RawTables(raw.interactions.sample(frac=1, random_state=1, ignore_index=True))
    test = [set(pairs(build_interactions(t, Data(), seed), TEST)) for t, seed in ((raw, 5), (shuffled, 5), (raw, 6))]
    assert test[0] == test[1]
    assert test[0] != test[2]


def test_random_split_is_uniform_over_positions():
    interactions = build_interactions(long_histories([20] * 2000), Data(), 0)
    share = np.bincount(interactions.items[interactions.splits == TEST], minlength=20) / 2000
    assert np.abs(share - 0.1).max() < 0.03


def test_leave_last_out_takes_the_last_two_by_time():
    raw = tables(
        [("a", "x", 3), ("a", "y", 1), ("a", "z", 2), ("a", "w", 0), ("b", "x", 1), ("b", "y", 2)],
        ("user", "item", "timestamp"),
    )
    interactions = build_interactions(raw, Data(split="leave_last_out"), 0)
    assert pairs(interactions, TEST) == [("a", "x")]
    assert pairs(interactions, VALIDATION) == [("a", "z")]
    assert pairs(interactions, TRAIN) == [("a", "w"), ("a", "y"), ("b", "x"), ("b", "y")]


def test_given_split_is_taken_over():
    raw = tables(
        [("a", "x", "test"), ("a", "y", "train"), ("b", "x", "validation"), ("b", "y", "train")],
        ("user", "item", "split"),
    )
    interactions = build_interactions(raw, Data(split="given"), 0)
    assert pairs(interactions, TEST) == [("a", "x")]
    assert pairs(interactions, VALIDATION) == [("b", "x")]


def test_pairs_that_the_split_does_not_list_are_left_out_before_the_k_core():
    raw = tables(
        [("a", "x", "train"), ("a", "y", "test"), ("a", "z", None), ("b", "x", "train"), ("b", "z", None)],
        ("user", "item", "split"),
    )
    data = Data(split="given", split_path="split.tsv", min_user_interactions=2)
    interactions = build_interactions(raw, data, 0)
    assert pairs(interactions) == [("a", "x"), ("a", "y")]
    assert interactions.log["not_in_split"] == 2


def test_histories_and_matrix_of_splits():
    raw = tables(
        [("a", "z", "train"), ("a", "x", "train"), ("b", "y", "train"), ("a", "y", "validation"), ("b", "x", "test")],
        ("user", "item", "split"),
    )
    interactions = build_interactions(raw, Data(split="given"), 0)
    assert [row.tolist() for row in interactions.histories(TRAIN)] == [[2, 0], [1]]
    assert [row.tolist() for row in interactions.histories(TEST)] == [[], [0]]
    matrix = interactions.matrix((TRAIN, VALIDATION))
    assert matrix.toarray().tolist() == [[1, 1, 1], [0, 1, 0]]
    assert matrix.dtype == np.float32
    assert matrix.has_sorted_indices
    # Sorting the matrix must not have touched the interactions.
    assert [row.tolist() for row in interactions.histories((TRAIN, VALIDATION))] == [[2, 0, 1], [1]]


def test_texts_follow_the_ids_whatever_their_type():
    items = pd.DataFrame({"item": ["11", "2", "unused"], "title": ["Eleven", "", "U"], "text": ["eleven.", "", "u"]})
    users = pd.DataFrame({"user": [7, 5], "title": ["7", "5"], "text": ["seven", "five"]})
    raw = tables([(5, 2), (7, 11), (7, 3)], items=items, users=users, source={"a.csv": "00"})
    interactions = build_interactions(raw, Data(), 0)
    assert interactions.item_ids == [2, 3, 11]
    assert interactions.item_titles == ["2", "3", "Eleven"]
    assert interactions.item_texts == ["", "", "eleven."]
    assert interactions.user_texts == ["five", "seven"]
    assert interactions.log["items_without_row"] == 1
    assert interactions.source == {"a.csv": "00"}


def test_without_tables_titles_are_raw_ids_and_texts_empty():
    interactions = build_interactions(tables([("a", 3)]), Data(), 0)
    assert interactions.item_titles == ["3"]
    assert interactions.item_texts == [""]
    assert interactions.user_texts == [""]
    assert interactions.reviews is None


@pytest.mark.parametrize(
    ("raw", "data", "sentence"),
    [
        (tables([("a", "x")]), Data(min_rating=4), "have no rating; name its column in data.rating_column"),
        (
            tables([("a", "x", 3.0)], ("user", "item", "rating")),
            Data(min_rating=4.5),
            "data.min_rating is 4.5, the highest rating 3",
        ),
        (
            tables([("a", "x"), ("b", "x"), ("b", "y")]),
            Data(min_user_interactions=2, min_item_interactions=2),
            "no interaction is left of 3: .* data.min_user_interactions 2 and data.min_item_interactions 2",
        ),
        (
            tables([("a", "x", "train"), ("b", "x", "test"), ("c", "x", "validation")], ("user", "item", "split")),
            Data(split="given"),
            "2 of 3 users have no training interaction in the given split \\('b', 'c'\\)",
        ),
        (
            tables([("a", "x", None)], ("user", "item", "split")),
            Data(split="given", split_path="split.tsv"),
            "none that passes data.min_rating is listed in split.tsv",
        ),
        (
            tables([(u, 0) for u in range(6)], users=pd.DataFrame({"user": [4], "title": ["4"], "text": [""]})),
            Data(users=SideTable(path="users.csv")),
            "users.csv: the table of users lacks 5 of 6 users \\(0, 1, 2, …\\)",
        ),
    ],
)
def test_bad_interactions_are_refused_in_one_sentence(raw, data, sentence):
    with pytest.raises(InputError, match=sentence):
        build_interactions(raw, data, 0)


def test_embedded_sample_is_whole_and_small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the paths are found from the project's folder, too
    interactions = build_interactions(read_tables(SAMPLE), SAMPLE, 0)
    assert (interactions.num_users, interactions.num_items, len(interactions)) == (1091, 485, 9012)
    assert np.bincount(interactions.splits).tolist() == [6502, 1255, 1255]
    assert all(interactions.item_texts)
    assert all(interactions.user_texts)
    folder = Path(__file__).parents[3] / "training/data/sample"
    assert sum(path.stat().st_size for path in folder.glob("*.parquet")) <= 200_000


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        (
            Data(format="ml-100k", path="ml-100k", min_rating=4, min_user_interactions=5),
            (938, 1447, 55361),
        ),
        (
            Data(
                format="amazon-reviews",
                path="digital-music/reviews.jsonl.gz",
                min_rating=4,
                min_user_interactions=3,
                min_item_interactions=3,
            ),
            (650, 335, 3834),
        ),
        (
            Data(format="sequences", path="amazon-beauty/Beauty.txt", min_user_interactions=5),
            (22363, 12101, 198502),
        ),
    ],
    ids=lambda value: value.format if isinstance(value, Data) else "",
)
@pytest.mark.parametrize("given", [True, False])
def test_real_data_have_the_published_counts(data, counts, given, monkeypatch):
    folder = os.environ.get("CLLM4REC_DATA")
    if not folder:
        pytest.skip("CLLM4REC_DATA does not name the folder that holds ml-100k, digital-music and amazon-beauty")
    monkeypatch.chdir(folder)
    if given:
        data = replace(data, split="given", split_path=f"{data.path.split('/')[0]}/split.tsv.gz")
    interactions = build_interactions(read_tables(data), data, 0)
    assert (interactions.num_users, interactions.num_items, len(interactions)) == counts
    # The published splits hold as many pairs of each user as ours.
    assert np.bincount(interactions.splits)[TEST] == {55361: 5585, 3834: 707, 198502: 26314}[counts[2]]
