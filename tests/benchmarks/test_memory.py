"""The formula of the memory benchmark: what README says is what is computed, and every launch file is in the table."""

import re

import pytest

from benchmarks.memory import LAUNCHES, Case, Measured, measure, table, training_bytes
from configuration.load import PROJECT

USERS, ITEMS, WIDTH, DEVICES = 300_000, 100_000, 256, 8
ONE_TOWER, LARGER, ITEM_TABLE = 4 * WIDTH * (USERS + ITEMS), 4 * WIDTH * USERS, 4 * WIDTH * ITEMS


DENSE = Measured(0)


def total(of=DENSE, **fields):
    return sum(training_bytes(Case(USERS, ITEMS, WIDTH, **fields), of).values())


@pytest.mark.parametrize(
    ("file", "words", "size"),
    [
        ("one_gpu.yaml", "2·t + 3·i + 2·s", 2 * ONE_TOWER + 3 * ITEM_TABLE + 2 * (2 * ONE_TOWER - ITEM_TABLE)),
        ("multi_gpu.yaml", "2·t + 5·i + 2·s", 2 * ONE_TOWER + 5 * ITEM_TABLE + 2 * (2 * ONE_TOWER - ITEM_TABLE)),
        ("multi_node.yaml", "2·t + 5·i + 2·s", 2 * ONE_TOWER + 5 * ITEM_TABLE + 2 * (2 * ONE_TOWER - ITEM_TABLE)),
        ("fsdp2.yaml", "(4 + 6/N)·t", (4 + 6 / DEVICES) * ONE_TOWER),
    ],
)
def test_each_row_of_the_table_says_what_is_computed(file, words, size):
    row = next(line for line in table(USERS, ITEMS, WIDTH, DEVICES).splitlines() if f"`{file}`" in line.split("|")[1])
    assert row.split("|")[3].strip() == words
    assert float(re.search(r"([\d.]+) GB", row)[1]) == pytest.approx(size / 1e9, abs=0.06)


def test_every_launch_file_is_in_the_table():
    named = set(re.findall(r"`(\w+\.yaml)`", " ".join(row.files + row.use for row in LAUNCHES)))
    assert named == {path.name for path in (PROJECT / "configuration" / "accelerate").iterdir()}


def test_ddp_holds_the_gradients_twice():
    assert total(processes=2) - total() == pytest.approx(2 * ONE_TOWER, rel=0.001)


def test_fsdp_divides_all_but_what_is_gathered():
    shares = [total(processes=count, sharded=True) for count in (2, 4)]
    assert shares[0] - shares[1] == pytest.approx((6 / 2 - 6 / 4) * ONE_TOWER, rel=0.01)


def test_a_backbone_that_learns_has_a_gradient_and_two_moments():
    of = Measured(0, backbone=1000)
    assert total(of) - total() == 1000
    assert total(of, backbone_learns=True) - total() == 4000
    assert total(of, backbone_learns=True, processes=2) - total(processes=2) == 5000
    sharded = {"processes": 4, "sharded": True}
    assert (
        total(of, backbone_learns=True, **sharded) - total(**sharded) == 1000 + 4 * 1000 / 2
    )  # two layers at a time, twice


def test_one_tower_takes_little_more_than_half():
    assert total(content_tower=False) == pytest.approx(4 * ONE_TOWER + ONE_TOWER + LARGER, rel=0.01)


def test_a_table_of_sparse_gradients_takes_its_rows_the_moments_of_touched_ones_and_a_place_for_each():
    names = Case(USERS, ITEMS, WIDTH).rows
    sparse = total(Measured(0, touched=dict.fromkeys(names, 1000)))
    moments_and_places = 4 * 1000 * 2 * 4 * WIDTH + 2 * 4 * (USERS + ITEMS)
    assert sparse == 2 * ONE_TOWER + moments_and_places


def test_a_fused_optimiser_has_no_temporaries():
    assert total() - total(Measured(0, fused=True)) == ONE_TOWER + LARGER
    assert total(processes=2) - total(Measured(0, fused=True), processes=2) == ONE_TOWER


def test_rows_that_are_only_looked_up_take_their_weights_and_what_finds_them():
    case = Case(1_000_000, 100, 64, content_tower=False)
    of = Measured(0, touched={"user_embeddings": 8}, fused=True)
    assert 1 < sum(training_bytes(case, of).values()) / (4 * 64 * 1_000_000) < 1.02


def test_the_training_that_is_measured_has_sparse_gradients_where_the_formula_has():
    case = Case(3000, 100, 8)
    found = measure(case)
    assert found.fused
    assert found.touched.keys() == LAUNCHES[0].example(3000, 100, 8, 1)[1].touched.keys()
