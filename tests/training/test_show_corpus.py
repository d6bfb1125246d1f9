import sys
from dataclasses import replace

import pytest

from configuration.errors import InputError
from training import show_corpus as script
from training.data.corpora import open_corpora
from training.run import Run
from training.show_corpus import show_corpus


@pytest.fixture
def recipe(shop_recipe, shop_frame, tmp_path):
    """The shop in a file, its run in a folder of the test's own."""
    shop_frame.to_parquet(tmp_path / "shop.parquet")
    data = replace(shop_recipe.data, path=str(tmp_path / "shop.parquet"))
    return replace(shop_recipe, data=data, output_dir=str(tmp_path / "runs"))


def block(text, title):
    """The lines below a title."""
    lines = text.splitlines()
    start = lines.index(title) + 1
    return lines[start : next((i for i in range(start, len(lines)) if not lines[i]), len(lines))]


def test_documents_of_each_kind_of_text_are_shown_as_prompt_and_main_text(recipe):
    shown = show_corpus(recipe, count=2)
    assert block(shown, "content: review") == [
        "  user_0 writes the following review for item_1:  →  ann took this one home, and it works: mark 1!<|endoftext|>",
        "  user_0 writes the following review for item_2:  →  ann took this one home, and it works: mark 2!<|endoftext|>",
    ]
    assert block(shown, "content: item text") == [
        "  The title and genres of item_0:  →  The apron. It is sold here.<|endoftext|>",
        "  The title and genres of item_1:  →  The broom. It is sold here.<|endoftext|>",
    ]
    assert block(shown, "content: user text") == [
        "  user_1 is described as:  →  A person called bob<|endoftext|>",
        "  user_2 is described as:  →  A person called cy<|endoftext|>",
    ]


def test_histories_are_shown_with_their_ids_decoded(recipe):
    shown = show_corpus(recipe, count=2)
    for row, line in enumerate(block(shown, "collaborative, epoch 0")):
        prompt, items = line.strip().split("  →  ")
        assert prompt == f"user_{row} has interacted with"
        assert sorted(items.split()) == [f"item_{row + place}" for place in range(5)]
    for row, line in enumerate(block(shown, "recommendation, epoch 0")):
        prompt, held_out = line.strip().split("  →  ")
        assert prompt.endswith(" will interact with")
        prompted = [word.strip(",") for word in prompt.split() if word.startswith("item_")]
        assert sorted([*prompted, *held_out.split()]) == [f"item_{row + place}" for place in range(5)]
    assert block(shown, "raw ids of these users and of the first items") == [
        "  user_0 = ann", "  user_1 = bob", "  item_0 = apron", "  item_1 = broom", "  item_2 = chair", "  item_3 = drill",
    ]  # fmt: skip


def test_counts_stand_in_the_first_line(recipe):
    first = show_corpus(recipe).splitlines()[0]
    assert first.startswith(str(Run.of(recipe).corpora))
    assert "6 users, 12 items, 320 words, 42 interactions, 30 train, 6 validation, 6 test, 24 reviews" in first


def test_each_epoch_has_an_order_of_its_own_unless_it_is_that_of_time(recipe, with_method):
    titles = [f"collaborative, epoch {epoch}" for epoch in (0, 1)]
    shuffled = [block(show_corpus(recipe, epoch=epoch), title) for epoch, title in enumerate(titles)]
    assert shuffled[0] != shuffled[1]
    in_time = with_method(recipe, history_order="chronological")
    shown = [block(show_corpus(in_time, count=6, epoch=epoch), title) for epoch, title in enumerate(titles)]
    assert shown[0] == shown[1]
    assert shown[0][4] == "  user_4 has interacted with  →  item_4 item_5 item_6 item_7 item_8"


@pytest.mark.parametrize("missing", ["review", "items", "users"])
def test_kinds_that_there_are_none_of_are_left_out(recipe, missing):
    sides = {"review": {"review_column": None}, "items": {"items": replace(recipe.data.items, path=None)}}
    sides["users"] = {"users": replace(recipe.data.users, path=None)}
    shown = show_corpus(replace(recipe, data=replace(recipe.data, **sides[missing])))
    titles = {line for line in shown.splitlines() if line.startswith("content: ")}
    gone = {"review": "content: review", "items": "content: item text", "users": "content: user text"}[missing]
    assert titles == {"content: review", "content: item text", "content: user text"} - {gone}


def test_corpora_that_are_there_are_shown_and_not_built_again(recipe, tmp_path):
    shown = show_corpus(recipe)
    (tmp_path / "shop.parquet").unlink()
    assert show_corpus(recipe) == shown
    assert open_corpora(Run.of(recipe).corpora).info["seed"] == 3


def test_corpora_of_another_recipe_are_not_shown_for_this_one(recipe):
    show_corpus(recipe)
    with pytest.raises(InputError, match="made with another recipe"):
        show_corpus(replace(recipe, data=replace(recipe.data, item_prompt="What {item} is:")))


def test_only_corpora_are_left_in_the_folder(recipe):
    show_corpus(recipe)
    assert [path.name for path in Run.of(recipe).folder.iterdir()] == ["corpora"]


@pytest.mark.parametrize("numbers", [{"count": -1}, {"epoch": -1}])
def test_numbers_below_zero_are_refused(recipe, numbers):
    with pytest.raises(InputError, match="must be at least 0"):
        show_corpus(recipe, **numbers)


def test_the_command_line_shows_the_same(monkeypatch, capsys, tmp_path):
    words = [f"output_dir={tmp_path}", "backbone.num_words=400", "--count", "1", "--epoch", "2"]
    monkeypatch.setattr(sys, "argv", ["show_corpus.py", "--config", "sample", *words])
    script.main()
    shown = capsys.readouterr().out
    assert "1,091 users, 485 items" in shown
    assert len(block(shown, "content: user text")) == len(block(shown, "recommendation, epoch 2")) == 1
    assert "  item_0 = " in shown
