from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from transformers import pipeline

from configuration.errors import InputError
from configuration.recipe import SideTable
from training.evaluation.examples import (
    example_histories,
    example_recommendations,
    is_somebodys,
    made_up_histories,
    show_examples,
)
from training.evaluation.scoring import split_matrix


def with_examples(recipe, examples):
    return replace(recipe, data=replace(recipe.data, examples=examples))


def sets_of_everyone(corpora):
    """What each user has in training, and in all."""
    parts = [split_matrix(corpora, name).toarray() > 0 for name in ("recommendation", "validation", "test")]
    return [set(np.flatnonzero(row)) for rows in (parts[0], sum(parts) > 0) for row in rows]


def test_the_recipes_examples_are_found_by_raw_id(store, store_run):
    recipe = with_examples(store_run.recipe, [["thing 03", "thing 00"], ["thing 23"]])
    assert example_histories(store, recipe) == [[3, 0], [23]]


def test_an_example_of_an_unknown_item_is_named(store, store_run):
    with pytest.raises(InputError, match=r"data\.examples: no item 'thing 99' is in the catalogue"):
        example_histories(store, with_examples(store_run.recipe, [["thing 01", "thing 99"]]))


def test_without_examples_in_the_recipe_there_are_none_of_real_people(store, store_run):
    assert store_run.recipe.data.examples == []
    assert example_histories(store, store_run.recipe) == []


def test_made_up_histories_are_popular_items_with_their_neighbours(store):
    popularity = np.array([item["popularity"] for item in store.items()])
    angles = np.arange(24) / 10
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    histories = made_up_histories(store, embeddings)
    assert len(histories) == 3
    assert histories[0][0] == np.argmax(popularity)
    known = np.flatnonzero(popularity >= np.median(popularity))
    for start, *neighbours in histories:
        others = sorted(known[known != start], key=lambda item: abs(item - start))
        assert set(neighbours) <= set(others[:4])
    # the second start is the popular item that is least like the first
    assert abs(histories[1][0] - histories[0][0]) == max(abs(np.arange(24) - histories[0][0]))


def test_a_made_up_history_is_nobodys(store):
    embeddings = np.random.default_rng(0).normal(size=(24, 4))
    assert not any(set(history) in sets_of_everyone(store) for history in made_up_histories(store, embeddings))


@pytest.mark.parametrize("last", ["train", "test"])
def test_what_somebody_has_is_not_made_up(build, shop_recipe, tmp_path, last):
    trio = ["apron", "broom", "chair"]
    rows = [(user, item, "train") for user in ("bob", "cy", "dee") for item in (*trio, "drill", "easel", f"a {user}")]
    rows += [("ann", "apron", "train"), ("ann", "broom", "train"), ("ann", "chair", last)]
    frame = pd.DataFrame(rows, columns=["user", "item", "split"])
    data = replace(shop_recipe.data, review_column=None, users=SideTable(), items=SideTable())
    corpora = build(frame, replace(shop_recipe, data=data), tmp_path / "corpora")
    index = {item["id"]: j for j, item in enumerate(corpora.items())}
    embeddings = np.zeros((corpora.num_items, 2))
    for angle, name in enumerate([*trio, "drill", "easel"]):
        embeddings[index[name]] = [np.cos(angle / 10), np.sin(angle / 10)]
    first, *_ = made_up_histories(corpora, embeddings)
    # the nearest of the most popular item would be the trio that is all ann has
    assert first == [index["apron"], index["broom"], index["drill"]]


def test_a_history_is_somebodys_only_where_it_is_all_they_have(store):
    train = split_matrix(store, "recommendation").tocsc()
    row = np.flatnonzero(train[5].toarray()[0]).tolist()
    assert is_somebodys(row[::-1], train)
    assert not is_somebodys(row[:-1], train)


def test_a_catalogue_too_small_for_a_history_has_no_examples(build, shop_recipe, shop_frame, tmp_path):
    rows = shop_frame[shop_frame["item"].isin(["apron", "broom"])].assign(split="train", review="")
    rows = rows.drop_duplicates(["user", "item"])
    recipe = replace(shop_recipe, data=replace(shop_recipe.data, users=replace(shop_recipe.data.users, path=None)))
    corpora = build(rows, recipe, tmp_path / "corpora")
    assert corpora.num_items == 2
    assert made_up_histories(corpora, np.eye(2)) == []
    assert example_recommendations(None, corpora, []) == []


def test_examples_are_what_the_pipeline_gives(store, model, store_run):
    (example,) = example_recommendations(model, store, [[3, 11, 7]])
    recommend = pipeline("recommendation", model=str(store_run.folder / "model"), trust_remote_code=True)
    (expected,) = recommend([{"history": ["thing 03", "thing 11", "thing 07"]}], top_k=5)
    assert example["history"] == ["thing 03", "thing 11", "thing 07"] == example["titles"]
    assert example["indices"] == [3, 11, 7]
    assert [best["item"] for best in example["items"]] == [best["item"] for best in expected]
    assert [best["rank"] for best in example["items"]] == [1, 2, 3, 4, 5]
    assert [best["score"] for best in example["items"]] == pytest.approx([best["score"] for best in expected], abs=1e-6)


def test_the_log_shows_examples_as_a_list(store, model):
    examples = example_recommendations(model, store, [[3], [4]])
    first, second = show_examples(examples, store).split("\n\n")
    assert first.splitlines()[0] == "history: thing 03"
    assert second.splitlines()[0] == "history: thing 04"
    assert len(second.splitlines()) == 6


def test_a_runs_results_hold_made_up_examples_and_no_user(store, store_run):
    examples = store_run.results["examples"]
    assert 1 <= len(examples) <= 3
    assert not any(set(example["indices"]) in sets_of_everyone(store) for example in examples)
    assert "person " not in (store_run.folder / "results.json").read_text()
