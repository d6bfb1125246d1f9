import errno
import re
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard, HfApi

from configuration.errors import InputError
from configuration.load import load_recipe
from configuration.recipe import Data, SideTable
from training.data.corpora import USER_TEXT, build_corpora
from training.data.interactions import build_interactions
from training.data.readers import read_tables
from training.hub.dataset import made, recipe_for_dataset, write_dataset_folder
from training.hub.privacy import found_user_ids


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def publish(tmp_path):
    """Corpora to the folder of a dataset repo, and the recipe that reads it."""

    def publish(corpora, recipe):
        folder = tmp_path / "goods"
        write_dataset_folder(corpora, recipe, folder, repo_id=str(folder))
        return folder, recipe_for_dataset(recipe, str(folder))

    return publish


@pytest.fixture
def rebuild(tmp_path):
    """From a recipe that names a dataset to corpora."""

    def rebuild(recipe):
        interactions = build_interactions(read_tables(recipe.data), recipe.data, recipe.seed)
        return build_corpora(interactions, recipe, tmp_path / "again", progress=False)

    return rebuild


@pytest.fixture
def gossip(shop_frame, shop_recipe):
    """The shop with a customer called zorblax, whom another one mentions in a review for training and one for the test."""
    frame = shop_frame.replace({"user": {"eve": "zorblax"}})
    frame.loc[shop_frame.index[shop_frame["user"] == "bob"][[3, 6]], "review"] = "As zorblax says, it works"
    users = shop_recipe.data.users.path.replace("users.csv", "gossip.csv")
    names = sorted(set(frame["user"]))
    pd.DataFrame({"id": names, "text": ["about " + name for name in names]}).to_csv(users, index=False)
    data = replace(shop_recipe.data, users=replace(shop_recipe.data.users, path=users))
    return frame, replace(shop_recipe, data=data)


def publishing(recipe, **fields):
    return replace(recipe, data=replace(recipe.data, publish_users=True, **fields))


def rows(table):
    return table.to_pandas().astype(object).to_numpy().tolist()


def check_same(corpora, other, *, users=True):
    assert other.items() == corpora.items()
    assert other.interactions().select(["user", "item", "split"]) == corpora.interactions().select(
        ["user", "item", "split"]
    )
    for name in ("collaborative", "recommendation", "validation", "test"):
        for mine, theirs in zip(corpora.histories(name), other.histories(name), strict=True):
            assert [np.asarray(row).tolist() for row in mine] == [np.asarray(row).tolist() for row in theirs]
    for name in ("content", "held_out_reviews"):
        mine, theirs = corpora.texts(name), other.texts(name)
        kept = np.flatnonzero(mine.kind != USER_TEXT) if not users else np.arange(len(mine))
        assert [mine.documents[row].tolist() for row in kept] == [row.tolist() for row in theirs.documents]
        for column in ("kind", "user", "item", "prompt_length"):
            assert getattr(mine, column)[kept].tolist() == getattr(theirs, column).tolist()
    if users:
        assert other.users() == corpora.users()
        assert other.tokenizer.get_vocab() == corpora.tokenizer.get_vocab()


def test_load_dataset_opens_the_interactions_with_their_splits(publish, shop, shop_recipe):
    folder, _ = publish(shop, shop_recipe)
    opened = datasets.load_dataset(str(folder))
    assert {name: len(split) for name, split in opened.items()} == {"train": 30, "validation": 6, "test": 6}
    assert opened["test"][1] == {
        "user": 1, "item": "honey", "split": "test", "position": 6,
        "review": "bob took this one home, and it works: mark 6!",
    }  # fmt: skip
    assert opened["train"][0]["review"] is None


def test_load_dataset_opens_items_and_tokenised_corpora(publish, shop, shop_recipe):
    folder, _ = publish(shop, shop_recipe)
    items = datasets.load_dataset(str(folder), "items", split="train")
    assert items[1] == {"id": "broom", "title": "The broom", "text": "It is sold here.", "popularity": 2}
    content = datasets.load_dataset(str(folder), "content")
    texts = shop.texts()
    assert content["train"]["input_ids"][:2] == [row.tolist() for row in texts.documents.take(np.array([0, 1]))]
    assert (len(content["train"]), len(content["test"])) == (24 + 12, 6)
    assert content["train"][30] == {
        "kind": "item text", "user_index": None, "item_index": 6, "prompt_length": int(texts.prompt_length[30]),
        "input_ids": texts.documents[30].tolist(),
    }  # fmt: skip
    assert datasets.load_dataset(str(folder), "collaborative", split="train")[2] == {
        "user_index": 2, "item_indices": [2, 3, 4, 5, 6],
    }  # fmt: skip
    assert datasets.load_dataset(str(folder), "recommendation", split="test")[2]["item_indices"] == [8]


def test_a_repo_is_parquet_and_a_card(publish, shop, shop_recipe):
    folder, _ = publish(shop, publishing(shop_recipe))
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "README.md", "content/test.parquet", "content/train.parquet", "histories/test.parquet",
        "histories/train.parquet", "histories/validation.parquet", "interactions/test.parquet",
        "interactions/train.parquet", "interactions/validation.parquet", "items.parquet", "users.parquet",
    ]  # fmt: skip


def test_corpora_from_a_published_dataset_are_the_corpora_it_was_made_of(publish, rebuild, shop, shop_recipe):
    _, recipe = publish(shop, publishing(shop_recipe))
    check_same(shop, rebuild(recipe))


def test_splits_by_chance_and_times_come_back_with_texts_as_ids(
    publish, rebuild, build, store_frame, store_recipe, tmp_path
):
    recipe = publishing(store_recipe)
    corpora = build(store_frame.sample(frac=1, random_state=1), recipe, tmp_path / "corpora")
    folder, published = publish(corpora, recipe)
    again = rebuild(published)
    check_same(corpora, again)
    times = store_frame.set_index(["user", "item"])["time"]
    opened = datasets.load_dataset(str(folder), split="all")
    assert opened["timestamp"][:] == [times[row["user"], row["item"]] for row in opened]


def test_without_publish_users_people_are_numbers_in_the_order_of_their_ids(
    publish, rebuild, build, store_frame, store_recipe, tmp_path
):
    frame = store_frame.assign(review=store_frame["review"].str.replace("person", "customer"))
    corpora = build(frame, store_recipe, tmp_path / "corpora")
    folder, recipe = publish(corpora, store_recipe)
    opened = datasets.load_dataset(str(folder))["train"]
    assert opened.column_names == ["user", "item", "split", "position", "review"]
    again = rebuild(recipe)
    check_same(corpora, again, users=False)
    assert [user["id"] for user in again.users()] == list(range(40))
    assert [user["history"] for user in again.users()] == [user["history"] for user in corpora.users()]
    assert corpora.users()[3]["id"] == "person 03"


def test_without_publish_users_texts_about_users_stay_here(publish, rebuild, shop, shop_recipe):
    folder, recipe = publish(shop, shop_recipe)
    assert not (folder / "users.parquet").exists()
    assert recipe.data.users == SideTable()
    assert set(datasets.load_dataset(str(folder), "content", split="train")["kind"]) == {"review", "item text"}
    assert rebuild(recipe).info["counts"]["user_texts"] == 0


def test_without_publish_users_no_file_holds_a_raw_id(publish, build, gossip, tmp_path):
    frame, recipe = gossip
    corpora = build(frame, recipe, tmp_path / "corpora")
    folder, _ = publish(corpora, recipe)
    files = {path.name: path for path in folder.rglob("*") if path.is_file()}
    assert found_user_ids(files, ["zorblax"]) == ({}, 1)
    opened = datasets.load_dataset(str(folder))
    changed = [row for split in opened.values() for row in split if "[user]" in (row["review"] or "")]
    assert [(row["user"], row["split"], row["review"]) for row in changed] == [
        (1, "train", "As [user] says, it works"),
        (1, "test", "As [user] says, it works"),
    ]
    texts = [
        corpora.tokenizer.decode(ids)
        for split in datasets.load_dataset(str(folder), "content").values()
        for ids in split["input_ids"]
    ]
    assert len(texts) == 24 - 1 + 12 + 6 - 1
    assert not any("zorblax" in text for text in texts)
    assert (
        "In 2 of the reviews a raw user id of the source was replaced by [user]" in (folder / "README.md").read_text()
    )


def test_without_publish_users_reviews_hold_no_id_of_somebody_who_was_dropped(publish, build, gossip, tmp_path):
    frame, recipe = gossip
    frame = frame[(frame["user"] != "zorblax") | (frame["item"] == "honey")]
    recipe = replace(recipe, data=replace(recipe.data, min_user_interactions=2))
    folder, _ = publish(build(frame, recipe, tmp_path / "corpora"), recipe)
    reviews = [row["review"] for split in datasets.load_dataset(str(folder)).values() for row in split]
    assert reviews.count("As [user] says, it works") == 2
    assert not any("zorblax" in (review or "") for review in reviews)


def test_published_people_keep_their_ids_reviews_and_texts(publish, build, gossip, tmp_path):
    frame, recipe = gossip
    recipe = publishing(recipe)
    folder, _ = publish(build(frame, recipe, tmp_path / "corpora"), recipe)
    assert set(datasets.load_dataset(str(folder), split="train")["user"]) == set(frame["user"])
    assert datasets.load_dataset(str(folder), "users", split="train")[5] == {"id": "zorblax", "text": "about zorblax"}
    assert "As zorblax says, it works" in datasets.load_dataset(str(folder), split="test")["review"]
    assert len(datasets.load_dataset(str(folder), "content", split="train")) == 24 + 12 + 6


def test_the_place_in_the_history_counts_over_all_splits(publish, build, shop_recipe, tmp_path):
    frame = pd.DataFrame(
        {"user": ["b"] * 4 + ["a"] * 3, "item": [3, 1, 4, 5, 1, 3, 5], "when": [9, 2, 5, 7, 3, 2, 1],
         "split": ["train", "test", "train", "validation", "train", "validation", "test"]}
    )  # fmt: skip
    data = Data(timestamp_column="when", split="given")
    recipe = replace(shop_recipe, data=data)
    folder, _ = publish(build(frame, recipe, tmp_path / "corpora"), recipe)
    opened = datasets.load_dataset(str(folder))
    assert {name: rows(split.data.table) for name, split in opened.items()} == {
        "train": [[0, 1, "train", 2], [1, 4, "train", 1], [1, 3, "train", 3]],
        "validation": [[0, 3, "validation", 1], [1, 5, "validation", 2]],
        "test": [[0, 5, "test", 0], [1, 1, "test", 0]],
    }
    assert "every split, in order of time." in (folder / "README.md").read_text()


def test_ids_that_are_text_of_digits_stay_text(publish, rebuild, build, shop_recipe, tmp_path):
    frame = pd.DataFrame(
        {"user": ["007", "007", "8"], "item": ["01", "1", "1"], "split": ["train", "validation", "train"]}
    )
    recipe = publishing(replace(shop_recipe, data=Data(split="given")))
    corpora = build(frame, recipe, tmp_path / "corpora")
    again = rebuild(publish(corpora, recipe)[1])
    assert [user["id"] for user in again.users()] == ["007", "8"]
    check_same(corpora, again)


def test_a_split_that_nobody_has_items_in_is_left_out(publish, rebuild, build, shop_frame, shop_recipe, tmp_path):
    frame = shop_frame[shop_frame["split"] != "test"]
    recipe = publishing(shop_recipe)
    corpora = build(frame, recipe, tmp_path / "corpora")
    folder, published = publish(corpora, recipe)
    assert set(datasets.load_dataset(str(folder))) == {"train", "validation"}
    check_same(corpora, rebuild(published))


def test_the_recipe_of_a_dataset_names_the_repo_and_its_columns(shop_recipe):
    recipe = publishing(
        shop_recipe, min_rating=3.0, item_prompt="{item}:", license="mit", source="here", examples=[["lamp"]]
    )
    assert recipe_for_dataset(recipe, "me/data@v1") == replace(
        recipe,
        data=Data(
            format="dataset", path="me/data@v1", dataset_split="all", timestamp_column="position", review_column="review",
            items=SideTable("hf://datasets/me/data@v1/items.parquet", title_column="title", text_columns=["text"]),
            users=SideTable("hf://datasets/me/data@v1/users.parquet", text_columns=["text"]),
            split="given", item_prompt="{item}:", license="mit", source="here", examples=[["lamp"]], publish_users=True,
        ),
    )  # fmt: skip
    unpublished = recipe_for_dataset(shop_recipe, "me/data").data
    assert (unpublished.users, unpublished.publish_users) == (SideTable(), False)


@pytest.mark.parametrize(
    ("data", "reviews", "users"),
    [
        (Data(format="ml-100k"), None, "users.parquet"),
        (Data(format="amazon-reviews"), "review", None),
        (Data(review_column="r"), "review", None),
        (Data(format="sequences"), None, None),
    ],
)
def test_the_recipe_of_a_dataset_knows_what_its_source_has(shop_recipe, data, reviews, users):
    found = recipe_for_dataset(publishing(replace(shop_recipe, data=data)), "me/data").data
    assert found.review_column == reviews
    assert found.users.path == (users and f"hf://datasets/me/data/{users}")


def test_a_dataset_of_a_dataset_is_the_same(publish, rebuild, shop, shop_recipe, tmp_path):
    folder, recipe = publish(shop, publishing(shop_recipe))
    write_dataset_folder(rebuild(recipe), recipe, tmp_path / "twice", repo_id="me/data")
    for path in sorted(folder.rglob("*.parquet")):
        assert pq.read_table(tmp_path / "twice" / path.relative_to(folder)) == pq.read_table(path)
    assert "in the order of the source, which has no times." in (tmp_path / "twice" / "README.md").read_text()


def test_the_cards_metadata_are_read_by_the_hubs_own_class(publish, shop, shop_recipe):
    recipe = replace(publishing(shop_recipe, license="cc-by-4.0"), language=["en"])
    folder, _ = publish(shop, recipe)
    metadata = DatasetCard.load(folder / "README.md").data
    assert (metadata.license, metadata.language, metadata.size_categories) == ("cc-by-4.0", ["en"], ["n<1K"])
    assert [entry["config_name"] for entry in metadata.configs] == [
        "interactions", "items", "users", "content", "collaborative", "recommendation",
    ]  # fmt: skip
    assert [entry.get("default", False) for entry in metadata.configs] == [True] + [False] * 5


def test_the_cards_python_runs_and_shows_somebodys_history(publish, shop, shop_recipe, capsys):
    folder, _ = publish(shop, shop_recipe)
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.strip().endswith("['The apron', 'The broom', 'The chair', 'The drill', 'The easel']")


def test_the_cards_recipe_is_that_of_the_dataset(publish, shop, shop_recipe, tmp_path):
    folder, recipe = publish(shop, publishing(shop_recipe, item_prompt="About {item}:"))
    (block,) = re.findall(r"```yaml\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (tmp_path / "goods.yaml").write_text(block)
    assert load_recipe(tmp_path / "goods.yaml").data == recipe.data


def test_the_card_tells_counts_filters_and_hashes(publish, build, shop_frame, shop_recipe, tmp_path):
    extra = pd.DataFrame({"user": ["zed"], "item": ["lamp"], "split": ["train"], "review": [None]})
    twice = pd.concat([shop_frame, shop_frame.iloc[:2], extra])
    data = replace(shop_recipe.data, users=SideTable(), min_user_interactions=2, license=None, source="a shop")
    recipe = replace(shop_recipe, data=data)
    corpora = build(twice, recipe, tmp_path / "corpora")
    folder, _ = publish(corpora, recipe)
    card = (folder / "README.md").read_text()
    for sentence in (
        "6 users, 12 items and the 42 interactions between them",
        "Source: a shop. Licence of the data: none was stated.",
        "| `interactions` | train | 30 | user, item, split, position, review |",
        "- 45 rows were read\n- 2 repeated pairs of a user and an item were left out, the last of each stayed\n"
        "- 1 were left out so that every user has at least 2 and every item at least 1\n"
        "- The split came with the source: 30 train, 6 validation, 6 test\n",
        f"- Read from `DataFrame`, SHA-256 `{corpora.info['source']['DataFrame']}`\n",
        "- Users are numbers. The raw ids of the source, times and texts about users are not in this repo.",
        "- 36 reviews are texts by people, in their own words",
    ):
        assert sentence in card
    assert "license" not in DatasetCard.load(folder / "README.md").data.to_dict()


def test_corpora_of_an_earlier_version_are_refused_with_what_to_do(publish, build, shop_frame, shop_recipe, tmp_path):
    corpora = build(shop_frame, shop_recipe, tmp_path / "corpora")
    (tmp_path / "corpora" / "interactions.parquet").unlink()
    with pytest.raises(InputError, match=r"has no interactions\.parquet: .* run training/show_corpus\.py"):
        publish(corpora, shop_recipe)
    assert not (tmp_path / "goods").exists()
    publish(build(shop_frame, shop_recipe, tmp_path / "corpora"), shop_recipe)


def test_a_full_disk_leaves_the_folder_as_it_was(publish, shop, shop_recipe, monkeypatch):
    folder, _ = publish(shop, shop_recipe)
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.parquet, "write_table", fail)
    with pytest.raises(InputError, match="the disk is full"):
        publish(shop, publishing(shop_recipe))
    assert {path: path.read_bytes() for path in folder.rglob("*.parquet")} == before


@pytest.fixture
def pushed(hub, shop, shop_recipe, tmp_path):
    """The shop's data with their people as the dataset repo me/goods and nowhere else: its head and its card."""
    write_dataset_folder(shop, publishing(shop_recipe), tmp_path / "goods", repo_id="me/goods")
    HfApi().create_repo("me/goods", repo_type="dataset")
    head = HfApi().upload_folder(repo_id="me/goods", repo_type="dataset", folder_path=tmp_path / "goods").oid
    card = (tmp_path / "goods" / "README.md").read_text()
    shutil.rmtree(tmp_path / "goods")
    return head, card


def test_a_recipe_reads_the_dataset_from_the_hub(pushed, rebuild, shop, shop_recipe):
    check_same(shop, rebuild(recipe_for_dataset(publishing(shop_recipe), "me/goods")))


def test_a_pinned_dataset_is_read_as_it_was(pushed, rebuild, shop, shop_recipe):
    head, _ = pushed
    HfApi().upload_file(
        path_or_fileobj=b"", path_in_repo="items.parquet", repo_id="me/goods", repo_type="dataset"
    )  # fmt: skip
    check_same(shop, rebuild(recipe_for_dataset(publishing(shop_recipe), f"me/goods@{head}")))
    with pytest.raises(InputError, match=r"hf://datasets/me/goods/items\.parquet is truncated or not Parquet"):
        rebuild(recipe_for_dataset(publishing(shop_recipe), "me/goods"))


def test_the_cards_python_and_recipe_work_with_the_hub_alone(pushed, rebuild, shop, shop_recipe, tmp_path, capsys):
    _, card = pushed
    python, recipe = (re.findall(rf"```{kind}\n(.*?)```", card, re.DOTALL)[0] for kind in ("python", "yaml"))
    exec(python, {})
    assert "['The apron', 'The broom', 'The chair', 'The drill', 'The easel']" in capsys.readouterr().out
    (tmp_path / "goods.yaml").write_text(recipe)
    check_same(shop, rebuild(replace(shop_recipe, data=load_recipe(tmp_path / "goods.yaml").data)))


def test_pairs_that_an_earlier_model_was_trained_on_are_said_to_stay_in_train(shop_recipe):
    info = {"seed": 42, "counts": {"train": 8, "validation": 1, "test": 1}, "filtered": {}}
    assert "stay in train" not in made(info, shop_recipe.data)[-1]
    info["filtered"]["held_out_pairs_trained_on_before"] = 1_234
    assert (
        ", but 1,234 pairs that an earlier model was trained on stay in train: 8 train"
        in made(info, shop_recipe.data)[-1]
    )
