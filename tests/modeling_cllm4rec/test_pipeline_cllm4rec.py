"""The recommendation pipeline, opened as a visitor opens it: from a folder or a repo, with the code that lies there."""

import copy
import importlib.util
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, pipeline

import modeling_cllm4rec
from modeling_cllm4rec import (
    CLLM4RecConfig,
    CLLM4RecForRecommendation,
    RecommendationPipeline,
    TokenizerWithUserItemIDTokens,
)
from modeling_cllm4rec.text_cllm4rec import TextMap, terms_of, words_of
from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe

CODE = sorted(Path(modeling_cllm4rec.__file__).parent.glob("*_cllm4rec.py"))
ITEMS = ["numpy", "scipy", "pandas", "astropy", "requests", "flask", "jinja2"]
TEXTS = ["arrays", "numerical methods", "tables", "stars", "requests of the web", "web pages", "templates, templates"]
USERS = {"ann": [0, 1, 3], "bob": [4], "cas": [5, 6, 4, 0], "new": []}
PROMPT = {"history": [10, 11], "separator": [12], "recommend": [13, 14]}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def item_lines(ids=ITEMS):
    return [{"id": raw, "title": f"The {raw}", "text": "", "popularity": 1} for raw in ids]


def user_lines(users=USERS):
    return [{"id": raw, "text": "", "history": history} for raw, history in users.items()]


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A folder as it is published with its users."""
    folder = tmp_path_factory.mktemp("complete")
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(
        train_byte_level_bpe([], 257), num_users=len(USERS), num_items=len(ITEMS)
    )
    backbone = GPT2Config(
        vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(1)
    model = CLLM4RecForRecommendation(
        CLLM4RecConfig(
            backbone_config=backbone,
            num_users=len(USERS),
            num_items=len(ITEMS),
            prompt_ids=PROMPT,
            max_history=3,
            initializer_range=0.5,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    for path in CODE:
        shutil.copyfile(path, folder / path.name)
    write_lines(folder / "items.jsonl", item_lines())
    write_lines(folder / "users.jsonl", user_lines())
    return folder


@pytest.fixture(scope="module")
def well_read(complete, tmp_path_factory):
    """The same, with a text map and texts of the items."""
    folder = shutil.copytree(complete, tmp_path_factory.mktemp("well-read") / "model")
    terms = sorted({number for text in TEXTS for number, _ in terms_of(words_of(text))})
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.num_text_terms = len(terms)
    torch.manual_seed(2)
    model.model.text_map = TextMap(len(terms), 16)
    model.model.text_map.terms.copy_(torch.tensor(terms))
    model.save_pretrained(folder)
    records = [record | {"text": text} for record, text in zip(item_lines(), TEXTS, strict=True)]
    write_lines(folder / "items.jsonl", records)
    return folder


def test_texts_are_read_with_the_pipelines_own_tokenizer(well_read):
    recommend = pipeline("recommendation", model=str(well_read), trust_remote_code=True)
    assert recommend.model.tokenizer is recommend.tokenizer
    other = object()
    recommend.model.tokenizer = other
    again = pipeline(
        "recommendation", model=recommend.model, tokenizer=recommend.tokenizer, items=well_read / "items.jsonl"
    )
    assert again.model.tokenizer is other


@pytest.fixture
def changing(well_read):
    return pipeline("recommendation", model=str(well_read), trust_remote_code=True)


@pytest.fixture
def folder(complete, tmp_path):
    """A copy to change."""
    return shutil.copytree(complete, tmp_path / "model")


@pytest.fixture(scope="module")
def rec(complete):
    return pipeline("recommendation", model=str(complete), trust_remote_code=True)


def expected(rec, history, user=None, **options):
    """Items and scores of the model itself, asked for one person."""
    ranked = rec.model.recommend([history], [user], **options)
    return [ITEMS[item] for item in ranked.items[0] if item >= 0], [s for s in ranked.scores[0].tolist() if s > 0]


def assert_ranked(answer, items_and_scores):
    items, scores = items_and_scores
    assert [row["item"] for row in answer] == items
    assert [row["score"] for row in answer] == pytest.approx(scores, abs=1e-6)
    assert [row["rank"] for row in answer] == list(range(1, len(items) + 1))
    assert [row["title"] for row in answer] == [f"The {raw}" for raw in items]


def test_the_folder_names_its_task_and_its_own_pipeline(complete, rec):
    config = json.loads((complete / "config.json").read_text())
    assert config["custom_pipelines"] == {
        "recommendation": {
            "impl": "pipeline_cllm4rec.RecommendationPipeline",
            "pt": ["AutoModelForSequenceClassification"],
        }
    }
    inferred = pipeline(model=str(complete), trust_remote_code=True)
    assert inferred.task == "recommendation"
    for opened in (rec, inferred):
        assert type(opened).__module__.startswith("transformers_modules.")


def test_a_known_user_is_asked_with_the_training_history_which_is_left_out(rec):
    answer = rec({"user": "cas"})
    assert_ranked(answer, expected(rec, [5, 6, 4, 0], 2))
    # max_history is 3: what the prompt has no room for is left out as well.
    assert {row["item"] for row in answer} == {"scipy", "pandas", "astropy"}


def test_somebody_never_seen_is_asked_with_the_history(rec):
    answer = rec({"history": ["numpy", "pandas"]}, top_k=3)
    assert_ranked(answer, expected(rec, [0, 2], k=3))
    assert len(answer) == 3


def test_a_newer_history_is_the_prompt_of_a_known_user_and_both_are_left_out(rec):
    answer = rec({"user": "ann", "history": ["flask"]})
    assert_ranked(answer, expected(rec, [5], 0, seen=[[0, 1, 3, 5]]))
    assert {row["item"] for row in answer} == {"pandas", "requests", "jinja2"}


def test_a_known_user_without_any_history_is_asked_by_the_id_alone(rec, caplog):
    for person in ({"user": "new"}, {"user": "new", "history": []}):
        assert_ranked(rec(person), expected(rec, [], 3))
    assert not caplog.records


def test_scores_are_probabilities_over_the_catalogue_whatever_is_left_out(rec):
    everything = rec({"user": "ann"}, exclude_seen=False)
    assert sum(row["score"] for row in everything) == pytest.approx(1)
    assert_ranked(everything, expected(rec, [0, 1, 3], 0, exclude_seen=False))
    scores = {row["item"]: row["score"] for row in everything}
    for options in ({}, {"candidates": ["pandas", "flask"]}):
        for row in rec({"user": "ann"}, **options):
            assert row["score"] == pytest.approx(scores[row["item"]])


def test_only_candidates_are_ranked(rec):
    answer = rec({"history": ["numpy"]}, candidates=["flask", "numpy", "scipy"])
    assert_ranked(answer, expected(rec, [0], candidates=[5, 0, 1]))
    assert {row["item"] for row in answer} == {"flask", "scipy"}


def test_parameters_given_at_opening_hold_until_a_call_says_otherwise(complete):
    rec = pipeline(
        "recommendation", model=str(complete), trust_remote_code=True, top_k=2, candidates=ITEMS[:4], batch_size=2
    )
    person = {"history": ["requests"]}
    assert_ranked(rec(person), expected(rec, [4], k=2, candidates=range(4)))
    assert len(rec(person, top_k=3)) == 3
    assert_ranked(rec(person, candidates=None, top_k=6), expected(rec, [4], k=6))
    assert len(rec(person)) == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_answers_do_not_depend_on_the_batch(rec, monkeypatch, batch_size, side):
    monkeypatch.setattr(rec.tokenizer, "padding_side", side)
    people = [
        {"user": "ann"},
        {"history": ["jinja2"]},
        {"user": "cas", "history": ["numpy", "pandas"]},
        {"user": "new"},
        {"history": ["scipy", "numpy", "flask", "pandas"]},
    ]
    histories, users = [[0, 1, 3], [6], [0, 2], [], [1, 0, 5, 2]], [0, None, 2, 3, None]
    answers = rec(people, batch_size=batch_size, exclude_seen=False)
    assert len(answers) == 5
    for answer, history, user in zip(answers, histories, users, strict=True):
        assert_ranked(answer, expected(rec, history, user, exclude_seen=False))


def test_lists_tuples_generators_and_iterators_of_inputs(rec):
    people = [{"user": "ann"}, {"user": "bob"}, {"history": ["numpy"]}]
    answers = [rec(person) for person in people]
    asked = []

    def visitors():
        for person in people * 9:
            asked.append(person)
            yield person

    assert rec(people) == answers
    assert rec(tuple(people)) == answers
    assert list(rec(iter(people))) == answers
    streamed = iter(rec(visitors()))
    assert next(streamed) == answers[0]
    assert len(asked) < 3, "a generator was read to its end before the first answer"
    assert list(streamed) == (answers * 9)[1:]
    assert rec([]) == list(rec(iter([]))) == []


def test_unknown_items_of_a_history_are_left_out_and_named(rec, caplog):
    answer = rec({"history": ["numpy", "left-pad", "pandas", 7]})
    assert_ranked(answer, expected(rec, [0, 2]))
    assert [record.getMessage() for record in caplog.records] == [
        "Left out of the history, not in the catalogue: 'left-pad', 7."
    ]


def test_an_empty_history_is_answered_for_nobody_in_particular_and_says_so(rec, caplog):
    assert_ranked(rec({"history": []}), expected(rec, []))
    assert "nobody in particular" in caplog.text


@pytest.mark.parametrize(
    ("person", "options", "error", "message"),
    [
        ({"user": "dan"}, {}, ValueError, r"unknown user 'dan': .*give \{\"history\": \[raw item ids\]\}"),
        ({"user": ["ann"]}, {}, ValueError, r"unknown user \['ann'\]"),
        ({"history": ["left-pad", True]}, {}, ValueError, "no item of the history is in the .*: 'left-pad', True$"),
        ({"history": list(range(12))}, {}, ValueError, r" 8, 9 and 2 more$"),
        ({"history": "numpy"}, {}, ValueError, "history is 'numpy'; it is a list"),
        ({"history": 3}, {}, ValueError, "history is 3; it is a list"),
        ({}, {}, ValueError, 'needs "user", "history" or "text"'),
        ({"history": None}, {}, ValueError, 'needs "user", "history" or "text"'),
        ("ann", {}, ValueError, r"not 'ann'$"),
        (["ann"], {}, ValueError, r"not 'ann'$"),
        ({"user_id": "ann"}, {}, ValueError, "unknown key of an input 'user_id', did you mean 'user'?"),
        ({"histroy": ["numpy"]}, {}, ValueError, "did you mean 'history'?"),
        ({"xyz": 1}, {}, ValueError, r"'xyz'\. There are user, history, text$"),
        ({"user": "ann"}, {"topk": 3}, TypeError, r"unknown parameter 'topk', did you mean 'top_k'\?"),
        ({"user": "ann"}, {"candidate": []}, TypeError, "did you mean 'candidates'?"),
        ({"user": "ann"}, {"users": "users.jsonl"}, TypeError, "users is given once"),
        ({"user": "ann"}, {"candidates": ["numpy", "left-pad"]}, ValueError, "not in the catalogue: 'left-pad'$"),
        ({"user": "ann"}, {"candidates": []}, ValueError, "candidates is empty"),
        ({"user": "ann"}, {"candidates": "numpy"}, ValueError, "candidates is 'numpy'; it is a list"),
        ({"user": "ann"}, {"top_k": 0}, ValueError, "top_k is 0"),
        ({"user": "ann"}, {"top_k": True}, ValueError, "top_k is True"),
        ({"user": "ann"}, {"top_k": "3"}, ValueError, "top_k is '3'"),
        ({"user": "ann"}, {"exclude_seen": "no"}, ValueError, "exclude_seen is 'no'"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(rec, person, options, error, message):
    with pytest.raises(error, match=message):
        rec(person, **options)


def test_an_unknown_parameter_is_refused_at_opening(complete):
    with pytest.raises(TypeError, match=r"'exclude_sean', did you mean 'exclude_seen'\?"):
        pipeline("recommendation", model=str(complete), trust_remote_code=True, exclude_sean=False)


def test_numbers_are_found_in_either_spelling_unless_both_are_ids(rec, complete, tmp_path):
    ids = [1, "2", 3, "3", -4, "05", "six"]
    items = write_lines(tmp_path / "items.jsonl", item_lines(ids))
    rec = RecommendationPipeline(rec.model, rec.tokenizer, items=items)

    def found(*raw):
        return rec.preprocess({"history": list(raw)})["person"][1]

    assert found(1, 2, 3) == (0, 1, 2)
    assert found("1", "2", "3", "-4", "05") == (0, 1, 3, 4, 5)
    assert found(torch.tensor([1, -4]).numpy()[0], "six") == (0, 6)
    for stranger in (5, "5", " 1", "01", True, 1.5, None):
        with pytest.raises(ValueError, match="no item of the history"):
            found(stranger)
    assert [row["item"] for row in rec({"history": ["1"]}, candidates=["-4"])] == [-4]


def test_without_users_a_user_is_an_error_that_names_both_ways_out(folder):
    users = shutil.move(folder / "users.jsonl", folder.parent / "people.jsonl")
    without = pipeline("recommendation", model=str(folder), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"'ann' cannot be looked up.*users=path.*\"history\""):
        without({"user": "ann"})
    assert len(without({"history": ["numpy"]})) == 6
    given = pipeline("recommendation", model=str(folder), trust_remote_code=True, users=users)
    assert_ranked(given({"user": "ann"}), expected(given, [0, 1, 3], 0))
    with pytest.raises(ValueError, match=r"unknown user 'dan': it is not in people\.jsonl"):
        given({"user": "dan"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.jsonl", '{"id": "numpy"}\n{"id":', r"items\.jsonl, line 2: not a JSON object"),
        ("items.jsonl", '{"title": "numpy"}\n', r"items\.jsonl, line 1: not a JSON object with an \"id\""),
        ("items.jsonl", '{"id": "numpy"}\n', r"1 lines with 1 different ids, but the model has 7 items"),
        ("items.jsonl", '{"id": "numpy"}\n' * 7, r"7 lines with 1 different ids, but the model has 7 items"),
        ("users.jsonl", '{"id": "ann"}\n', r"1 lines with 1 different ids, but the model has 4 users"),
        ("users.jsonl", '{"id": 1}\n{"id": 2, "history": [7]}\n', r"users\.jsonl, line 2: .* outside \[0, 7\)"),
        ("users.jsonl", '{"id": 1, "history": [3, -1]}\n', r"users\.jsonl, line 1: .* outside \[0, 7\)"),
        ("items.jsonl", None, r"no items\.jsonl beside the model .*items=path"),
    ],
)
def test_files_that_are_not_the_models_are_refused(folder, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        pipeline("recommendation", model=str(folder), trust_remote_code=True)({"user": "ann"})


def test_a_model_object_serves_once_the_package_is_imported(complete, rec):
    model = CLLM4RecForRecommendation.from_pretrained(complete).train()
    tokenizer = AutoTokenizer.from_pretrained(complete)
    mine = pipeline("recommendation", model=model, tokenizer=tokenizer)
    assert type(mine) is RecommendationPipeline
    people = [{"user": "ann"}, {"history": ["flask", "jinja2", "numpy"]}]
    assert mine(people, batch_size=2) == rec(people, batch_size=2)
    assert model.training, "the model came back in another mode"


def test_a_head_that_cannot_recommend_is_refused(complete):
    base = AutoModel.from_pretrained(complete)
    with pytest.raises(TypeError, match=r"CLLM4RecModel cannot recommend.*AutoModelForSequenceClassification"):
        pipeline("recommendation", model=base)


def test_a_saved_pipeline_opens_with_all_that_it_needs(rec, tmp_path):
    rec.save_pretrained(tmp_path)
    again = pipeline("recommendation", model=str(tmp_path), trust_remote_code=True)
    people = [{"user": "ann"}, {"history": ["flask", "numpy"]}]
    assert again(people) == rec(people)
    again.save_pretrained(tmp_path)  # in place
    assert again.save_pretrained(tmp_path / "copy") is None
    assert sorted(path.name for path in (tmp_path / "copy").glob("*.jsonl")) == ["items.jsonl", "users.jsonl"]


def test_users_given_by_path_are_not_saved(folder, tmp_path):
    users = shutil.move(folder / "users.jsonl", tmp_path / "users.jsonl")
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True, users=users)
    rec({"user": "ann"})
    rec.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "users.jsonl").exists()
    for path in (tmp_path / "saved").iterdir():
        assert b"ann" not in path.read_bytes() or path.suffix in (".py", ".safetensors")


CHANGES = {
    "items removed": lambda rec: rec.remove_items(["scipy", "requests"]),
    "users added": lambda rec: rec.add_users([{"id": "eve", "history": ["flask"]}]),
    "users removed": lambda rec: rec.remove_users(["bob"]),
}


@pytest.fixture
def private(folder, tmp_path):
    """A folder without its users, and where these are."""
    return folder, Path(shutil.move(folder / "users.jsonl", tmp_path / "users.jsonl"))


@pytest.mark.parametrize("change", CHANGES)
def test_changed_users_who_came_by_path_are_written_to_a_path_or_nothing_is(private, hub, tmp_path, change):
    folder, users = private
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True, users=users)
    before = users.read_bytes()
    CHANGES[change](rec)
    with pytest.raises(ValueError, match=r"users\.jsonl have changed.* save_pretrained\(folder, users=PATH\)"):
        rec.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="have changed"):
        rec.push_to_hub("me/rec")
    assert not (tmp_path / "saved").exists()
    assert not HfApi().repo_exists("me/rec")
    rec.save_pretrained(tmp_path / "saved", users=tmp_path / "new" / "people.jsonl")
    assert users.read_bytes() == before
    assert not (tmp_path / "saved" / "users.jsonl").exists()
    rec.save_pretrained(tmp_path / "copy", users=users)  # in place
    rec.save_pretrained(tmp_path / "once more")  # nothing is lost now
    for saved, path in (("saved", tmp_path / "new" / "people.jsonl"), ("copy", users), ("once more", users)):
        again = pipeline("recommendation", model=str(tmp_path / saved), trust_remote_code=True, users=path)
        for user in ("ann", "cas", "new"):
            assert again.preprocess({"user": user}) == rec.preprocess({"user": user})
        assert_same_answer(again({"user": "cas"}), rec({"user": "cas"}))
    assert not list(tmp_path.rglob("*.tmp"))


def test_who_cannot_name_a_path_for_the_users_gets_no_half_of_a_folder(private, tmp_path):
    folder, users = private
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True, users=users)
    with pytest.raises(TypeError):
        rec.save_pretrained(tmp_path / "saved", users=3)
    assert not (tmp_path / "saved").exists()


def test_a_users_file_that_was_refused_leaves_nothing_behind(private, tmp_path):
    folder, users = private
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True, users=users)
    lines = users.read_text().splitlines(keepends=True)
    first = json.loads(lines[0]) | {"untrained": True}
    users.write_text("".join([json.dumps(first) + "\n", *lines[1:-1]]))
    with pytest.raises(ValueError, match="has 3 lines"):
        rec({"user": "ann"})
    users.write_text("".join(lines))
    assert rec.preprocess({"user": "ann"})["person"][0] == 0


def test_a_model_that_was_put_in_the_place_of_another_is_the_one_that_changes(changing, well_read, tmp_path):
    _ = changing.records  # of the first
    changing.model = AutoModelForSequenceClassification.from_pretrained(well_read, trust_remote_code=True)
    changing.remove_items(["scipy"])
    assert changing.model.config.num_items == len(ITEMS) - 1
    changing.save_pretrained(tmp_path / "changed")
    again = pipeline("recommendation", model=str(tmp_path / "changed"), trust_remote_code=True)
    assert_same_answer(again({"user": "cas"}), changing({"user": "cas"}))


@pytest.mark.parametrize("change", CHANGES)
def test_a_users_file_of_another_state_of_the_catalogue_is_refused(private, tmp_path, change):
    folder, old = private
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True, users=old)
    CHANGES[change](rec)
    rec.save_pretrained(tmp_path / "saved", users=tmp_path / "new.jsonl")
    for model, users in ((tmp_path / "saved", old), (folder, tmp_path / "new.jsonl")):
        stale = pipeline("recommendation", model=str(model), trust_remote_code=True, users=users)
        assert stale({"history": ["numpy"]})
        for ask in (
            lambda: stale({"user": "ann"}),  # noqa: B023 (called at once)
            lambda: stale.remove_items(["numpy"]),  # noqa: B023
            lambda: stale.save_pretrained(tmp_path / "again", users=tmp_path / "again.jsonl"),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"is of another state of the catalogue than the model"):
                ask()
    assert not (tmp_path / "again.jsonl").exists()


def test_the_same_change_with_and_without_the_users_gives_the_same_mark(private, tmp_path):
    folder, users = private
    without, rec = (
        pipeline("recommendation", model=str(folder), trust_remote_code=True, users=path) for path in (None, users)
    )
    for each in (without, rec):
        each.remove_items(["scipy"])
    without.save_pretrained(tmp_path / "public")
    rec.save_pretrained(tmp_path / "private", users=users)
    again = pipeline("recommendation", model=str(tmp_path / "public"), trust_remote_code=True, users=users)
    assert_same_answer(again({"user": "cas"}), rec({"user": "cas"}))


def test_what_does_not_touch_the_users_leaves_their_file_valid(well_read, tmp_path):
    folder = shutil.copytree(well_read, tmp_path / "model")
    users = Path(shutil.move(folder / "users.jsonl", tmp_path / "users.jsonl"))
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True, users=users)
    rec.add_items([{"id": "starcat", "text": "stars in tables"}])
    rec.remove_items([])
    rec.save_pretrained(tmp_path / "saved")
    again = pipeline("recommendation", model=str(tmp_path / "saved"), trust_remote_code=True, users=users)
    assert_same_answer(again({"user": "ann"}), rec({"user": "ann"}))


def test_a_path_for_users_whom_nobody_knows_is_refused_before_anything_is_written(private, tmp_path):
    rec = pipeline("recommendation", model=str(private[0]), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"comes without users\.jsonl"):
        rec.save_pretrained(tmp_path / "saved", users=tmp_path / "new.jsonl")
    assert not (tmp_path / "saved").exists()


@pytest.fixture
def repo(complete, hub, tmp_path):
    """A repo on the Hub, of two commits: the titles and the users are new in the second."""
    older = shutil.copytree(complete, tmp_path / "older")
    write_lines(older / "items.jsonl", [{"id": raw, "title": "old"} for raw in ITEMS])
    (older / "users.jsonl").unlink()
    api = HfApi()
    api.create_repo("me/rec")
    return [api.upload_folder(repo_id="me/rec", folder_path=folder).oid for folder in (older, complete)]


@pytest.mark.parametrize("which", [0, 1])
def test_items_and_users_come_from_the_models_own_revision(repo, rec, which):
    revision = [repo[0], None][which]
    opened = pipeline("recommendation", model="me/rec", revision=revision, trust_remote_code=True)
    assert opened.model.revision == repo[which]
    answer = opened({"history": ["numpy"]})
    assert [row["item"] for row in answer] == [row["item"] for row in rec({"history": ["numpy"]})]
    assert answer[0]["title"] == ["old", f"The {answer[0]['item']}"][which]
    assert (opened.records.users_file is None) == (which == 0)


def test_the_commit_is_kept_by_every_way_of_loading(repo):
    assert CLLM4RecForRecommendation.from_pretrained("me/rec").revision == repo[1]
    assert CLLM4RecForRecommendation.from_pretrained("me/rec", revision=repo[0]).revision == repo[0]
    loaded = AutoModelForSequenceClassification.from_pretrained("me/rec", trust_remote_code=True)
    assert loaded.revision == repo[1]
    model, info = CLLM4RecForRecommendation.from_pretrained("me/rec", output_loading_info=True)
    assert model.revision == repo[1]
    assert not info["missing_keys"]


def test_a_token_is_used_again_but_never_pickled_or_copied(repo):
    snapshot_download("me/rec")
    model = CLLM4RecForRecommendation.from_pretrained("me/rec", token="hf_secret", local_files_only=True)
    assert model.download_options == {"revision": repo[1], "token": "hf_secret", "local_files_only": True}
    assert copy.deepcopy(model).download_options == {"revision": repo[1], "local_files_only": True}
    assert b"hf_secret" not in pickle.dumps(model)


BARE = """
import json, sys
for name in ("modeling_cllm4rec", "configuration", "training", "accelerate", "datasets", "pandas", "peft", "pyarrow", "scipy"):
    sys.modules[name] = None
from transformers import pipeline
source, copy = sys.argv[1:]
rec = pipeline("recommendation", model=source, trust_remote_code=True)
rec.save_pretrained(copy)
people = [{"user": "ann"}, {"history": ["flask"]}]
for opened in (rec, pipeline(model=copy, trust_remote_code=True)):
    assert type(opened.model).__module__.startswith("transformers_modules."), type(opened.model)
    print(json.dumps(opened(people, batch_size=2)))
"""


@pytest.mark.slow
def test_a_bare_process_needs_torch_and_transformers_only(complete, rec, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BARE, complete, tmp_path / "copy"],
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        for answer, (history, user) in zip(json.loads(line), [([0, 1, 3], 0), ([5], None)], strict=True):
            assert_ranked(answer, expected(rec, history, user))


def test_without_user_embeddings_a_known_user_is_served_by_the_training_history(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"user_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    save_file({name: value[:0] if "user_embeddings" in name else value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True)
    assert rec({"user": "ann"}) == rec({"history": [ITEMS[item] for item in USERS["ann"]]})


@pytest.fixture
def handler(folder):
    """What Inference Endpoints make of `handler.py`: they import the file by its path and give the folder."""
    shutil.copyfile(Path(modeling_cllm4rec.__file__).parent / "handler.py", folder / "handler.py")
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def test_a_request_to_the_handler_is_answered_with_what_json_can_carry(handler):
    answer = handler({"inputs": {"history": ["numpy"]}, "parameters": {"top_k": 2}})
    assert json.loads(json.dumps(answer)) == answer
    assert [entry["rank"] for entry in answer] == [1, 2]
    assert "numpy" not in [entry["item"] for entry in answer]


def test_several_people_in_a_request_get_an_answer_each(handler):
    several = handler({"inputs": [{"history": ["numpy"]}, {"history": ["flask"]}]})
    assert several == [handler({"inputs": {"history": [item]}}) for item in ("numpy", "flask")]


def test_the_handler_finds_the_model_beside_its_file(handler):
    assert type(handler)()({"inputs": {"user": "ann"}}) == handler({"inputs": {"user": "ann"}})


@pytest.mark.parametrize("data", [{}, {"input": {}}, [1]])
def test_a_request_without_inputs_is_told_what_one_looks_like(handler, data):
    with pytest.raises(ValueError, match=r'a request is \{"inputs": \{"history"'):
        handler(data)


def assert_same_answer(one, other):
    assert [row["item"] for row in one] == [row["item"] for row in other]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in other], abs=1e-6)


def test_a_text_is_what_the_model_is_asked(changing):
    ranked = changing.model.recommend([[]], [None], ["stars of the web"], k=3)
    answer = changing({"text": "stars of the web"}, top_k=3)
    assert [row["item"] for row in answer] == [ITEMS[item] for item in ranked.items[0]]
    assert [row["score"] for row in answer] == pytest.approx(ranked.scores[0].tolist())
    assert answer != changing({"text": "templates"}, top_k=3)
    assert answer != changing({"text": "stars of the web", "history": ["flask"]}, top_k=3)


def test_texts_come_in_batches_with_people_who_say_nothing(changing):
    people = [{"text": "stars"}, {"history": ["numpy"]}, {"user": "ann", "text": "tables"}]
    alone = [changing(person) for person in people]
    for one, many in zip(alone, changing(people, batch_size=3), strict=True):
        assert [row["item"] for row in one] == [row["item"] for row in many]
        assert [row["score"] for row in one] == pytest.approx([row["score"] for row in many], abs=1e-6)


def test_a_text_that_cannot_be_read_is_refused(rec, changing):
    with pytest.raises(ValueError, match="trained without texts"):
        rec({"text": "stars"})
    with pytest.raises(ValueError, match="text is 5; it is a sentence"):
        changing({"text": 5})


def test_excluded_items_are_left_out_and_strangers_passed_over(rec):
    first, second = [row["item"] for row in rec({"history": ["numpy"]}, top_k=2)]
    assert rec({"history": ["numpy"]}, top_k=1, exclude=[first, "nobody's"])[0]["item"] == second


def test_an_explanation_names_what_carried_an_item(changing):
    person = {"history": ["numpy", "flask", "pandas"], "text": "web"}
    answer = changing(person, top_k=1)[0]
    found = changing.explain(person, answer["item"], top_k=2)
    assert found["item"] == answer["item"]
    assert found["score"] == pytest.approx(answer["score"], abs=1e-6)
    history, target = [ITEMS.index(item) for item in person["history"]], ITEMS.index(answer["item"])
    effects = changing.model.history_effects(history, [target], None, "web")[0]
    best = [(person["history"][place], effects[place].item()) for place in effects.argsort(descending=True)[:2]]
    assert [(row["item"], row["effect"]) for row in found["history"]] == [pair for pair in best if pair[1] > 0]
    with pytest.raises(ValueError, match="not in the catalogue"):
        changing.explain(person, "nobody's")


def test_words_of_an_explanation_are_those_that_speak_for_the_item(changing):
    state = torch.ones(16)
    effects = changing.model.model.text_map.word_effects("web pages of tables", state)
    named = changing._words_for("web pages of tables", state)
    assert {row["word"]: row["effect"] for row in named} == {
        word: value for word, value in effects.items() if value > 0
    }
    assert [row["effect"] for row in named] == sorted((row["effect"] for row in named), reverse=True)
    assert changing._words_for("", state) == []


def test_new_items_and_users_are_served_saved_and_opened_again(changing, well_read, tmp_path):
    before = changing({"history": ["numpy"]}, top_k=len(ITEMS))
    changing.add_items([{"id": "starcat", "title": "The starcat", "text": "stars in tables"}])
    after = changing({"history": ["numpy"]}, top_k=len(ITEMS) + 1)
    assert [row["item"] for row in after if row["item"] != "starcat"] == [row["item"] for row in before]
    odds = [row["score"] for row in after if row["item"] != "starcat"]
    assert [odd / odds[0] for odd in odds] == pytest.approx([row["score"] / before[0]["score"] for row in before])
    changing.add_users([{"id": "eve", "history": ["starcat", "numpy"]}])
    served = changing({"user": "eve"}, top_k=4)
    assert [row["item"] for row in served] == [
        row["item"] for row in changing({"history": ["starcat", "numpy"]}, top_k=4)
    ]
    changing.save_pretrained(tmp_path / "changed")
    again = pipeline("recommendation", model=str(tmp_path / "changed"), trust_remote_code=True)
    assert_same_answer(again({"user": "eve"}, top_k=4), served)
    assert again.records.titles[-1] == "The starcat"
    assert again.tokenizer.encode("user_4 item_7", add_special_tokens=False) == [257 + 4, 257 + 5 + 7]
    assert again.model.config.vocab_size == len(again.tokenizer)
    assert json.loads((tmp_path / "changed" / "items.jsonl").read_text().splitlines()[-1])["text"] == "stars in tables"
    assert len((well_read / "items.jsonl").read_text().splitlines()) == len(ITEMS)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"id": "numpy", "text": "arrays"}], "there already: 'numpy'"),
        ([{"id": "x", "text": "a"}, {"id": "x", "text": "b"}], "there already: 'x'"),
        ([{"id": ["x"], "text": "a"}], r"strings or numbers, not \['x'\]"),
        ([{"id": True, "text": "a"}, {"id": float("nan"), "text": "b"}], "strings or numbers, not True, nan"),
        ([{"id": math.inf, "text": "a"}, {"id": Fraction(1, 3), "text": "b"}], r"not inf, Fraction\(1, 3\)"),
        ([{"id": "x"}], "an item is"),
        ([{"text": "a"}], "an item is"),
    ],
)
def test_items_that_cannot_be_added_change_nothing(changing, items, message):
    with pytest.raises(ValueError, match=message):
        changing.add_items(items)
    assert changing.model.config.num_items == len(ITEMS) == len(changing.records.item_ids)
    assert not changing.records.is_changed


def test_what_is_left_out_from_the_beginning_stays_so_whatever_comes_and_goes(well_read):
    rec = pipeline("recommendation", model=str(well_read), exclude=["scipy", "later"], trust_remote_code=True)
    only = pipeline("recommendation", model=str(well_read), candidates=iter(["numpy", "flask"]), trust_remote_code=True)
    for one in (rec, only):
        one.remove_items(["numpy"])
        one.add_items([{"id": "later", "text": TEXTS[0]}])
    ranked = [row["item"] for row in rec({"history": ["flask"]}, top_k=9)]
    assert set(ranked) == {"pandas", "astropy", "requests", "jinja2"}
    assert [row["item"] for row in only({"history": ["pandas"]}, top_k=9)] == ["flask"]


@pytest.mark.parametrize("change", ["add_items", "add_users", "remove_items", "remove_users"])
def test_a_tokenizer_that_cannot_follow_is_found_before_anything_is_changed(changing, change):
    given = {
        "add_items": [{"id": "new", "text": TEXTS[0]}],
        "add_users": [{"id": "eve", "history": ["numpy"]}],
        "remove_items": ["numpy"],
        "remove_users": ["ann"],
    }
    before = changing({"user": "ann"})
    changing.tokenizer.add_tokens(["<x>"])
    with pytest.raises(ValueError, match="tokens were added behind the ID words"):
        getattr(changing, change)(given[change])
    assert not changing.records.is_changed
    assert changing.model.config.num_items == len(ITEMS)
    assert_same_answer(changing({"user": "ann"}), before)


def test_an_explanation_is_without_dropout_in_training_mode_too(changing):
    changing.model.train()
    one, two = (changing.explain({"history": ["numpy"]}, "flask") for _ in range(2))
    assert one == two
    score = {row["item"]: row["score"] for row in changing({"history": ["numpy"]})}["flask"]
    assert one["score"] == pytest.approx(score, rel=1e-5)
    assert changing.model.training


@pytest.mark.parametrize("at", ["the beginning", "the weights, when the configuration is written"])
def test_where_the_model_cannot_be_written_its_folder_stays_what_it_was(well_read, tmp_path, monkeypatch, at):
    folder = shutil.copytree(well_read, tmp_path / "model")
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True)
    before = rec({"history": [ITEMS[0]]})
    rec.add_items([{"id": "new", "text": TEXTS[0]}])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if at == "the beginning":
        monkeypatch.setattr(rec.model, "save_pretrained", full)
    else:
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        rec.save_pretrained(folder)
    assert pipeline("recommendation", model=str(folder), trust_remote_code=True)({"history": [ITEMS[0]]}) == before


def test_ids_and_titles_of_a_data_frame_are_saved_and_found_again(changing, tmp_path):
    frame = pd.DataFrame({"id": np.array([7, 8]), "title": ["The seven", math.nan], "text": ["stars", "tables"]})
    changing.add_items(frame.assign(id=frame["id"].astype(object)).to_dict("records"))
    changing.add_items(
        [{"id": np.int64(9), "title": None, "text": "web"}, {"id": np.float32(0.5), "title": 1984, "text": "web"}]
    )
    changing.add_users([{"id": np.int64(7), "history": np.array([7, 9])}, {"id": np.uint8(8), "history": None}])
    assert changing.records.titles[len(ITEMS) :] == ["The seven", "", "", "1984"]
    changing.save_pretrained(tmp_path / "changed")
    again = pipeline("recommendation", model=str(tmp_path / "changed"), trust_remote_code=True)
    assert again.records.item_ids[len(ITEMS) :] == [7, 8, 9, 0.5]
    assert [record["title"] for record in again.records.items[len(ITEMS) :]] == ["The seven", None, None, "1984"]
    assert_same_answer(again({"user": 7}), changing({"user": 7}))
    assert again.preprocess({"user": "7"})["person"][1] == (len(ITEMS), len(ITEMS) + 2)


def test_a_title_says_what_an_item_is_as_it_did_in_training(changing, tmp_path):
    titled, plain = {"id": "a", "title": "Web pages", "text": "stars"}, {"id": "b", "text": "Web pages. stars"}
    changing.add_items([titled, plain, {"id": "c", "text": "stars"}])
    rows = changing.model.model.item_embeddings.weight[len(ITEMS) :]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert changing.records.items[len(ITEMS)]["text"] == "stars"
    person, state = {"history": ["numpy"]}, changing.model.query_states([[0]])[0]
    named = [changing.explain(person, raw, top_k=9)["words"] for raw in ("a", "b")]
    assert named[0] == named[1] == changing._words_for("Web pages. stars", state)
    assert {"web", "pages"} & {row["word"] for row in named[0]}


def test_somebody_whose_last_item_went_is_served_where_prompts_name_nobody(changing):
    changing.model.config.prompt_names_user = False
    assert (
        changing.explain({"user": "bob"}, "numpy")["history"]
        == changing.explain({"history": ["requests"]}, "numpy")["history"]
    )
    changing.remove_items(["requests"])
    answers = changing([{"user": "ann"}, {"user": "bob"}, {"user": "bob", "text": "stars"}], batch_size=3)
    for answer, alone in zip(answers[1:], ({"history": []}, {"text": "stars"}), strict=True):
        assert_same_answer(answer, changing(alone))


def test_removed_items_are_gone_everywhere(changing, tmp_path):
    before = {row["item"] for row in changing({"user": "ann"}, top_k=9)}
    changing.remove_items(["scipy", "flask"])
    assert {row["item"] for row in changing({"user": "ann"}, top_k=9)} == before - {"flask"}
    with pytest.raises(ValueError, match="not in the catalogue: 'scipy'"):
        changing.remove_items(["scipy"])
    changing.save_pretrained(tmp_path / "changed")
    text = (tmp_path / "changed" / "items.jsonl").read_text()
    assert "scipy" not in text
    assert "flask" not in text
    again = pipeline("recommendation", model=str(tmp_path / "changed"), trust_remote_code=True)
    assert_same_answer(again({"user": "cas"}), changing({"user": "cas"}))
    ids = [json.loads(line)["history"] for line in (tmp_path / "changed" / "users.jsonl").read_text().splitlines()]
    assert ids == [[0, 2], [3], [4, 3, 0], []]


def test_people_who_are_forgotten_are_in_no_file(changing, tmp_path):
    others = changing({"user": "cas"})
    changing.remove_users(["ann", "bob"])
    assert_same_answer(changing({"user": "cas"}), others)
    with pytest.raises(ValueError, match="unknown user 'ann'"):
        changing({"user": "ann"})
    with pytest.raises(ValueError, match="unknown users: 'zoe'"):
        changing.remove_users(["zoe"])
    changing.save_pretrained(tmp_path / "changed")
    assert not any(
        "ann" in path.read_text(errors="ignore")
        for path in (tmp_path / "changed").glob("*.json*")
        if path.name != "tokenizer.json"
    )
    again = pipeline("recommendation", model=str(tmp_path / "changed"), trust_remote_code=True)
    assert_same_answer(again({"user": "cas"}), others)
    with pytest.raises(ValueError, match="unknown user 'ann'"):
        again({"user": "ann"})


def test_users_come_and_go_only_where_they_can_be_told_apart(folder):
    (folder / "users.jsonl").unlink()
    rec = pipeline("recommendation", model=str(folder), trust_remote_code=True)
    for change in (rec.add_users, rec.remove_users):
        with pytest.raises(ValueError, match=r"comes without users\.jsonl"):
            change([{"id": "eve", "history": []}])
