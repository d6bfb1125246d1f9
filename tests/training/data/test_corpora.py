import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models
from transformers import GPT2Config, PreTrainedTokenizerFast

from configuration.errors import InputError
from configuration.recipe import SideTable
from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe
from training.data import corpora as corpora_module
from training.data.corpora import ITEM_TEXT, REVIEW, USER_TEXT, corpus_fingerprint, open_corpora

REVIEW_PROMPT = "user_{user} writes the following review for item_{item}:"
ITEM_PROMPT = "The title and genres of item_{item}:"
USER_PROMPT = "user_{user} is described as:"


def pairs(corpora, name):
    users, histories = corpora.histories(name)
    return {(int(user), int(item)) for user, items in zip(users, histories, strict=True) for item in items}


def expected_pairs(frame, corpora, split):
    users, items = ({row["id"]: i for i, row in enumerate(rows)} for rows in (corpora.users(), corpora.items()))
    chosen = frame[frame["split"] == split]
    return {(users[user], items[item]) for user, item in zip(chosen["user"], chosen["item"], strict=True)}


def main_texts(corpora, name="content"):
    texts = corpora.texts(name)
    rows = zip(texts.documents, texts.prompt_length, strict=True)
    return [corpora.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() for ids, start in rows]


def with_review(frame, row, review, **changes):
    frame = frame.copy()
    frame.loc[row, ["review", *changes]] = [review, *changes.values()]
    return frame


def without_side_tables(recipe):
    return replace(recipe, data=replace(recipe.data, items=SideTable(), users=SideTable()))


@pytest.mark.parametrize(
    ("kind", "prompt", "text"),
    [
        (REVIEW, REVIEW_PROMPT, "ann took this one home, and it works: mark 1!"),
        (ITEM_TEXT, ITEM_PROMPT, "The apron. It is sold here."),
        (USER_TEXT, USER_PROMPT, "A person called bob"),
    ],
)
def test_a_document_is_what_the_tokenizer_gives_the_whole_sentence_and_its_end(shop, kind, prompt, text):
    texts = shop.texts()
    row = np.flatnonzero(texts.kind == kind)[0]
    sentence = prompt.format(user=texts.user[row], item=texts.item[row])
    encode = shop.tokenizer.encode
    assert texts.documents[row].tolist() == [*encode(f"{sentence} {text}"), shop.tokenizer.eos_token_id]
    assert texts.prompt_length[row] == len(encode(sentence))


def test_documents_tell_their_kind_user_and_item(shop, shop_frame):
    texts = shop.texts()
    about = list(zip(texts.kind.tolist(), texts.user.tolist(), texts.item.tolist(), strict=True))
    reviewed = shop_frame[(shop_frame["split"] == "train") & (shop_frame["review"] != "")]
    wanted = {(REVIEW, user, item) for user, item in expected_pairs(reviewed, shop, "train")}
    wanted |= {(ITEM_TEXT, -1, item) for item in range(12)} | {(USER_TEXT, user, -1) for user in range(1, 6)}
    assert set(about) == wanted
    assert len(about) == len(wanted)


def test_the_end_is_cut_off_with_what_is_over_the_limit(shop, build, shop_frame, shop_recipe, with_method, tmp_path):
    short = build(shop_frame, with_method(shop_recipe, max_text_tokens=5), tmp_path / "corpora").texts()
    cut = [
        row[: start + 5].tolist() for row, start in zip(shop.texts().documents, shop.texts().prompt_length, strict=True)
    ]
    assert [row.tolist() for row in short.documents] == cut
    assert (short.documents.lengths - short.prompt_length).max() == 5


def test_a_text_that_names_an_id_word_stays_words(build, shop_frame, shop_recipe, tmp_path):
    review = "better than item_3 and user_1, says item_11"
    corpora = build(with_review(shop_frame, 1, review), shop_recipe, tmp_path / "corpora")
    texts, first_id = corpora.texts(), corpora.tokenizer.num_words
    row = main_texts(corpora).index(review)
    assert (texts.documents[row][texts.prompt_length[row] :] < first_id).all()
    assert all(
        (ids >= first_id).sum() == (2 if kind == REVIEW else 1)
        for ids, kind in zip(texts.documents, texts.kind, strict=True)
    )


@pytest.mark.parametrize(("split", "read"), [("train", True), ("validation", False), ("test", False)])
def test_the_review_of_a_held_out_pair_is_kept_from_content_and_tokenizer(
    build, shop_frame, shop_recipe, tmp_path, split, read
):
    row = shop_frame.index[shop_frame["split"] == split][2]
    corpora = build(with_review(shop_frame, row, "qzxjvk " * 99), shop_recipe, tmp_path / "corpora")
    assert any("qzxjvk" in text for text in main_texts(corpora)) == read
    assert any("qzxjvk" in word for word in corpora.tokenizer.get_vocab()) == read
    assert any("qzxjvk" in text for text in main_texts(corpora, "held_out_reviews")) == (split == "test")


@pytest.mark.parametrize(("split", "read"), [("train", True), ("validation", False), ("test", False)])
def test_the_item_of_a_held_out_pair_is_kept_from_the_histories(build, shop_frame, shop_recipe, tmp_path, split, read):
    row = shop_frame.index[shop_frame["split"] == split][2]
    frame = with_review(shop_frame, row, "", item="planted")
    corpora = build(frame, without_side_tables(shop_recipe), tmp_path / "corpora")
    pair = expected_pairs(frame[frame["item"] == "planted"], corpora, split)
    for name in ("collaborative", "recommendation"):
        assert (pair <= pairs(corpora, name)) == read
    assert all((pair <= pairs(corpora, name)) == (name == split) for name in ("validation", "test"))
    popularity = {item["id"]: item["popularity"] for item in corpora.items()}["planted"]
    histories = [item for user in corpora.users() for item in user["history"]]
    assert popularity == histories.count(pair.copy().pop()[1]) == int(read)


def test_histories_hold_the_pairs_of_their_split_in_order(shop, shop_frame):
    for name, split in [("collaborative", "train"), ("recommendation", "train"), ("validation",) * 2, ("test",) * 2]:
        assert pairs(shop, name) == expected_pairs(shop_frame, shop, split)
    users, histories = shop.histories("recommendation")
    assert users.tolist() == list(range(6))
    assert histories[2].tolist() == [2, 3, 4, 5, 6]


def test_a_corpus_of_many_rows_comes_back_in_order(build, shop_recipe, tmp_path):
    frame = pd.DataFrame({"user": np.arange(2500), "item": np.arange(2500) % 700, "split": "train"})
    recipe = without_side_tables(replace(shop_recipe, data=replace(shop_recipe.data, review_column=None)))
    users, histories = build(frame, recipe, tmp_path / "corpora").histories("recommendation")
    assert users.tolist() == frame["user"].tolist()
    assert histories.values.tolist() == frame["item"].tolist()


def test_a_split_that_nobody_has_items_in_has_no_rows(build, shop_frame, shop_recipe, tmp_path):
    corpora = build(shop_frame[shop_frame["split"] == "train"], shop_recipe, tmp_path / "corpora")
    users, histories = corpora.histories("validation")
    assert (len(users), len(histories), len(corpora.texts("held_out_reviews"))) == (0, 0, 0)


def test_held_out_reviews_are_those_of_the_test_pairs(shop, shop_frame):
    held_out = shop_frame[shop_frame["split"] == "test"]
    texts = shop.texts("held_out_reviews")
    assert main_texts(shop, "held_out_reviews") == held_out["review"].tolist()
    assert set(zip(texts.user.tolist(), texts.item.tolist(), strict=True)) == expected_pairs(held_out, shop, "test")


@pytest.mark.parametrize("reason", ["no text", "no content tower"])
def test_without_text_there_is_no_content_corpus(build, shop_frame, shop_recipe, with_method, tmp_path, reason):
    frame, recipe = shop_frame, with_method(shop_recipe, content_tower=False)
    if reason == "no text":
        frame, recipe = shop_frame.assign(review=""), without_side_tables(shop_recipe)
    corpora = build(frame, recipe, tmp_path / "corpora")
    assert not (tmp_path / "corpora" / "content").exists()
    assert len(corpora.texts()) == len(corpora.texts("held_out_reviews")) == 0
    assert corpora.texts().documents.lengths.tolist() == []
    assert corpora.info["counts"]["content_tokens"] == 0
    assert not any("home" in word for word in corpora.tokenizer.get_vocab())
    assert pairs(corpora, "recommendation") == expected_pairs(shop_frame, corpora, "train")


@pytest.mark.parametrize(
    ("title", "text", "joined"),
    [
        ("Alien", "A ship answers a call.", "Alien. A ship answers a call."),
        ("Alien", "Alien is a film", "Alien is a film"),
        ("Alien", "", "Alien"),
        ("", "A ship", "A ship"),
        ("", "", None),
        ("L.A.", "", "L.A."),
    ],
)
def test_title_and_text_of_an_item_are_one_document(build, shop_recipe, tmp_path, title, text, joined):
    pd.DataFrame({"id": ["x", "y"], "title": [title, "Y"], "text": [text, ""]}).to_csv(tmp_path / "items.csv")
    table = replace(shop_recipe.data.items, path=str(tmp_path / "items.csv"))
    recipe = replace(shop_recipe, data=replace(shop_recipe.data, items=table, users=SideTable(), review_column=None))
    frame = pd.DataFrame({"user": ["u", "u"], "item": ["x", "y"], "split": "train"})
    corpora = build(frame, recipe, tmp_path / "corpora")
    assert main_texts(corpora) == ([joined, "Y"] if joined else ["Y"])
    assert corpora.texts().item.tolist() == ([0, 1] if joined else [1])


def test_info_says_what_is_in_the_folder(shop, shop_recipe):
    texts = shop.texts()
    assert shop.info["counts"] == {
        "users": 6, "items": 12, "words": shop.tokenizer.num_words, "interactions": 42,
        "train": 30, "validation": 6, "test": 6, "reviews": 24, "item_texts": 12, "user_texts": 5,
        "content_tokens": len(texts.documents.values),
    }  # fmt: skip
    assert shop.info["seed"] == 3
    assert shop.info["fingerprint"] == corpus_fingerprint(shop_recipe, shop.info["source"])
    assert set(shop.info["source"]) >= {"DataFrame", "items.csv", "users.csv"}
    assert shop.info["recipe"]["max_text_tokens"] == 40
    assert (shop.num_users, shop.num_items) == (6, 12)


def test_prompt_ids_are_the_parts_of_the_whole_prompt(shop):
    parts, tokenizer = shop.info["prompt_ids"], shop.tokenizer
    user, item = [tokenizer.user_id(5)], tokenizer.item_id([10, 2])
    prompt = user + parts["history"] + item + parts["separator"] + user + parts["recommend"]
    assert prompt == tokenizer.encode("user_5 has interacted with item_10 item_2, user_5 will interact with")


def test_items_and_users_are_listed_in_the_order_of_their_ids(shop):
    items, users = shop.items(), shop.users()
    assert [item["id"] for item in items][:2] == ["apron", "broom"]
    assert items[1] == {"id": "broom", "title": "The broom", "text": "It is sold here.", "popularity": 2}
    assert users[1] == {"id": "bob", "text": "A person called bob", "history": [1, 2, 3, 4, 5]}
    assert (len(items), len(users)) == (12, 6)


def test_a_second_build_of_the_same_writes_nothing(build, shop_frame, shop_recipe, with_method, tmp_path):
    build(shop_frame, shop_recipe, tmp_path / "corpora")
    before = (tmp_path / "corpora").stat().st_ino
    build(shop_frame, with_method(shop_recipe, lambda_v=7.0, readout="last"), tmp_path / "corpora")
    assert (tmp_path / "corpora").stat().st_ino == before


@pytest.mark.parametrize("change", ["seed", "text length", "vocabulary", "prompt", "source"])
def test_a_build_from_something_else_replaces_the_folder(build, shop_frame, shop_recipe, with_method, tmp_path, change):
    build(shop_frame, shop_recipe, tmp_path / "corpora")
    (tmp_path / "corpora" / "stale").touch()
    frame, recipe = shop_frame, shop_recipe
    if change == "seed":
        recipe = replace(recipe, seed=4)
    elif change == "text length":
        recipe = with_method(recipe, max_text_tokens=3)
    elif change == "vocabulary":
        recipe = replace(recipe, backbone=replace(recipe.backbone, num_words=300))
    elif change == "prompt":
        recipe = replace(recipe, data=replace(recipe.data, item_prompt="About {item}:"))
    else:
        frame = with_review(frame, 1, "changed")
    build(frame, recipe, tmp_path / "corpora")
    assert not (tmp_path / "corpora" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["corpora"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_build_leaves_what_was_there_and_nothing_else(
    build, shop_frame, shop_recipe, tmp_path, monkeypatch, there
):
    if there:
        build(shop_frame, shop_recipe, tmp_path / "corpora")

    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(corpora_module, "write_json_lines", fail)
    with pytest.raises(RuntimeError, match="stop"):
        build(shop_frame, replace(shop_recipe, seed=9), tmp_path / "corpora")
    assert [path.name for path in tmp_path.iterdir()] == (["corpora"] if there else [])
    assert not there or open_corpora(tmp_path / "corpora").info["seed"] == 3


def test_corpora_of_a_newer_version_are_refused(build, shop_frame, shop_recipe, tmp_path):
    info = build(shop_frame, shop_recipe, tmp_path / "corpora").info
    (tmp_path / "corpora" / "info.json").write_text(json.dumps(info | {"version": info["version"] + 1}))
    with pytest.raises(InputError, match=r"info\.json: corpora of version 2, this code reads up to 1"):
        open_corpora(tmp_path / "corpora")


def test_a_folder_without_corpora_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"holds no corpora .* training/pretrain\.py"):
        open_corpora(tmp_path)


def test_a_pretrained_backbone_gives_the_words_and_their_padded_number(build, shop_frame, shop_recipe, tmp_path):
    theirs = train_byte_level_bpe(["some other text, some other text"], 280)
    theirs.save_pretrained(tmp_path / "backbone")
    GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "backbone")
    recipe = replace(shop_recipe, backbone=replace(shop_recipe.backbone, name=str(tmp_path / "backbone"), config={}))
    corpora = build(shop_frame, recipe, tmp_path / "corpora")
    assert corpora.tokenizer.num_words == corpora.info["counts"]["words"] == 300 > len(theirs)
    texts = corpora.texts()
    assert texts.documents[-1][texts.prompt_length[-1] : -1].tolist() == theirs.encode(" A person called fay")


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ("nothing", r"backbone\.name: no tokenizer can be loaded from"),
        ("tokenizer", r"backbone\.name: no config can be loaded from"),
        ("unigram", r"backbone\.name .*cannot be added to this tokenizer: its model is Unigram"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused_in_a_sentence(
    build, shop_frame, shop_recipe, tmp_path, there, sentence
):
    tokenizer = train_byte_level_bpe(["text"], 257)
    if there == "unigram":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)))
        GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "backbone")
    if there != "nothing":
        tokenizer.save_pretrained(tmp_path / "backbone")
    recipe = replace(shop_recipe, backbone=replace(shop_recipe.backbone, name=str(tmp_path / "backbone"), config={}))
    with pytest.raises(InputError, match=sentence):
        build(shop_frame, recipe, tmp_path / "corpora")
    assert not (tmp_path / "corpora").exists()


def test_a_vocabulary_size_that_would_part_model_and_tokenizer_is_refused(build, shop_frame, shop_recipe, tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 1000}
    recipe = replace(shop_recipe, backbone=replace(shop_recipe.backbone, config=config))
    with pytest.raises(InputError, match=r"backbone\.config: vocab_size is given.*set backbone\.num_words"):
        build(shop_frame, recipe, tmp_path / "corpora")


def test_user_texts_alone_make_a_content_corpus(build, shop_frame, shop_recipe, tmp_path):
    recipe = replace(shop_recipe, data=replace(shop_recipe.data, items=SideTable(), review_column=None))
    assert set(build(shop_frame, recipe, tmp_path / "corpora").texts().kind.tolist()) == {USER_TEXT}


def test_opened_columns_are_views_of_the_mapped_file(shop):
    _, histories = shop.histories("recommendation")
    assert not histories.values.flags.owndata
    assert not histories.values.flags.writeable
    assert len(shop.dataset("content").data.table["input_ids"].chunks) == 1


def test_what_is_said_about_the_data_changes_no_fingerprint(shop, shop_recipe):
    said = replace(shop_recipe, data=replace(shop_recipe.data, license="mit", source="a shop", publish_users=True))
    other = replace(shop_recipe, data=replace(shop_recipe.data, min_user_interactions=2))
    marks = [corpus_fingerprint(recipe, {"a": "b"}) for recipe in (shop_recipe, said, other)]
    assert marks[0] == marks[1] != marks[2]


def test_interactions_are_kept_as_they_were_sorted(shop, shop_frame):
    kept = shop.interactions()
    users, items = ([row["id"] for row in rows] for rows in (shop.users(), shop.items()))
    assert [
        (users[row["user"]], items[row["item"]], row["split"], row["review"] or "") for row in kept.to_pylist()
    ] == list(shop_frame[["user", "item", "split", "review"]].itertuples(index=False, name=None))
    assert kept.column_names == ["user", "item", "split", "review"]


def test_times_are_kept_where_the_data_have_them(build, store_frame, store_recipe, tmp_path):
    kept = build(store_frame, store_recipe, tmp_path / "corpora").interactions()
    assert kept["timestamp"].to_pylist() == store_frame.sort_values(["user", "time"])["time"].tolist()


def planted(frame, recipe, *, publish_users):
    """The shop with a customer called zorblax, who signs every review."""
    frame = frame.replace({"user": {"eve": "zorblax"}})
    frame["review"] = frame["review"].where(frame["user"] != "zorblax", "zorblax says it works")
    return frame, without_side_tables(replace(recipe, data=replace(recipe.data, publish_users=publish_users)))


@pytest.mark.parametrize("publish_users", [False, True])
def test_a_raw_user_id_is_a_word_only_where_users_are_published(
    build, shop_frame, shop_recipe, tmp_path, publish_users
):
    corpora = build(*planted(shop_frame, shop_recipe, publish_users=publish_users), tmp_path / "corpora")
    assert any("zorblax" in word for word in corpora.tokenizer.get_vocab()) == publish_users
    assert "zorblax" in (tmp_path / "corpora" / "users.jsonl").read_text()
    assert "zorblax says it works" in main_texts(corpora)


@pytest.mark.parametrize("found", [False, True])
def test_corpora_depend_on_publish_users_where_an_id_is_or_would_be_a_word(
    build, shop_frame, shop_recipe, tmp_path, found
):
    frame, recipe = planted(shop_frame, shop_recipe, publish_users=False)
    if not found:
        frame = shop_frame
    other = replace(recipe, data=replace(recipe.data, publish_users=True))
    corpora = build(frame, recipe, tmp_path / "corpora")
    before = (tmp_path / "corpora").stat().st_ino
    assert (corpora.fingerprint_with(other) != corpora.info["fingerprint"]) == found
    again = build(frame, other, tmp_path / "corpora")
    assert ((tmp_path / "corpora").stat().st_ino != before) == found
    assert again.fingerprint_with(recipe) == corpora.info["fingerprint"]
    assert again.fingerprint_with(other) == again.info["fingerprint"]


def test_corpora_of_a_version_that_kept_no_interactions_are_built_again(build, shop_frame, shop_recipe, tmp_path):
    build(shop_frame, shop_recipe, tmp_path / "corpora")
    (tmp_path / "corpora" / "interactions.parquet").unlink()
    with pytest.raises(InputError, match=r"has no interactions\.parquet: .*training/show_corpus\.py"):
        open_corpora(tmp_path / "corpora").interactions()
    assert build(shop_frame, shop_recipe, tmp_path / "corpora").interactions().num_rows == 42


def strict(frame, recipe, **fields):
    """The shop where zorblax signs every review of others, and has too few interactions to stay."""
    stranger = pd.DataFrame({"user": ["zorblax"], "item": ["lamp"], "split": ["train"], "review": [""]})
    frame = pd.concat([frame, stranger], ignore_index=True)
    frame["review"] = frame["review"].where(frame["review"] == "", "zorblax says it works")
    data = replace(recipe.data, min_user_interactions=2, **fields)
    return frame, without_side_tables(replace(recipe, data=data))


def test_raw_ids_of_users_that_were_dropped_are_kept_and_become_no_words(build, shop_frame, shop_recipe, tmp_path):
    frame, recipe = strict(shop_frame, shop_recipe)
    corpora = build(frame, recipe, tmp_path / "corpora")
    assert corpora.dropped_users() == ["zorblax"]
    assert "zorblax" not in [user["id"] for user in corpora.users()]
    assert not any("zorblax" in word for word in corpora.tokenizer.get_vocab())
    _, published = strict(shop_frame, shop_recipe, publish_users=True)
    assert any("zorblax" in word for word in build(frame, published, tmp_path / "other").tokenizer.get_vocab())
    again = build(frame.iloc[::-1], recipe, tmp_path / "again")
    kept = [(one.folder / "dropped_users.parquet").read_bytes() for one in (corpora, again)]
    assert kept[0] == kept[1]


def test_integer_ids_of_dropped_users_stay_integers(build, store_frame, store_recipe, tmp_path):
    frame = store_frame.assign(user=store_frame["user"].str[-2:].astype(int))
    stranger = frame.iloc[:1].assign(user=491511234567)
    data = replace(store_recipe.data, min_user_interactions=2)
    corpora = build(pd.concat([frame, stranger]), replace(store_recipe, data=data), tmp_path / "corpora")
    assert corpora.dropped_users() == [491511234567]


def test_corpora_of_a_version_that_kept_no_dropped_users_are_opened_and_get_them(
    build, shop_frame, shop_recipe, tmp_path
):
    frame, recipe = strict(shop_frame, shop_recipe)
    build(frame, recipe, tmp_path / "corpora")
    (tmp_path / "corpora" / "dropped_users.parquet").unlink()
    before = (tmp_path / "corpora").stat().st_ino
    assert open_corpora(tmp_path / "corpora").dropped_users() == []
    assert build(frame, recipe, tmp_path / "corpora").dropped_users() == ["zorblax"]
    assert (tmp_path / "corpora").stat().st_ino == before
