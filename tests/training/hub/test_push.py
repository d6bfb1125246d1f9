"""A trained run pushed by the real client to the Hub of the suite, and opened from there."""

import hashlib
import json
import math
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from configuration.errors import InputError
from configuration.load import dump_recipe
from configuration.recipe import SideTable
from training import push
from training.finetune import finetune
from training.hub.folder import folder_recipe
from training.hub.report import in_bytes
from training.predict import predict
from training.pretrain import pretrain
from training.run import Run

FILES = [
    ".gitattributes", "README.md", "catalogue_cllm4rec.py", "config.json", "configuration_cllm4rec.py", "generation_config.json", "handler.py",
    "items.jsonl", "loss_cllm4rec.py", "model.safetensors", "modeling_cllm4rec.py", "packing_cllm4rec.py",
    "pictures/curves.png", "pictures/items.png", "pipeline_cllm4rec.py", "ranking_cllm4rec.py", "recipe.yaml", "records_cllm4rec.py", "results.json", "text_cllm4rec.py", "text_encoder_cllm4rec.py", "tokenization_cllm4rec.py",
    "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip
HISTORY = ["thing 01", "thing 04"]


@pytest.fixture
def run(store_copy):
    """The folder of a trained run that a test may change, its licence stated."""
    folder = Run.of(store_copy).folder
    state(folder, license="mit")
    return folder


@pytest.fixture
def send(monkeypatch, capsys):
    """`training/push.py` with arguments: exit code, what it printed, what it complained of."""

    def send(*arguments):
        monkeypatch.setattr(sys, "argv", ["push.py", *map(str, arguments)])
        code = 0
        try:
            push.main()
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err

    return send


def state(run, **fields):
    """Write fields of the top level, or of `data`, into the recipe of a run's model."""
    path = run / "model" / "recipe.yaml"
    lines = path.read_text().splitlines()
    for name, value in fields.items():
        place = next(number for number, line in enumerate(lines) if re.match(rf"\s*{name}:", line))
        lines[place] = f"{lines[place].split(':')[0]}: {value}"
    path.write_text("\n".join(lines) + "\n")


def tree(folder):
    """Every file below a folder with its hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sent(run):
    """What a push sends of a run's model but for the card: its files, and the figures with the recipe as it is now."""
    model = run / "model"
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    figures = json.loads(files["results.json"]) | {"recipe": asdict(folder_recipe(model))}
    return files | {"results.json": json.dumps(figures, indent=2, ensure_ascii=False).encode()}


def best(rec, **options):
    return [(entry["item"], round(entry["score"], 6)) for entry in rec({"history": HISTORY}, **options)]


# What goes.


def test_a_push_is_one_commit_of_all_and_one_of_the_card_that_names_it(run, send, hub):
    assert send(run, "me/repo")[0] == 0
    last, first, initial = hub.commits("me/repo")
    assert [last.title, first.title] == [f"Pin the card's snippets to {first.oid[:7]}", "Upload the recommender"]
    assert set(initial.files) == {".gitattributes"}
    assert {path for path in last.files if last.files[path] != first.files[path]} == {"README.md"}
    assert f'revision="{first.oid}"' in hub.repo("me/repo")["README.md"].decode()
    assert "revision=" not in hub.repo("me/repo", revision=first.oid)["README.md"].decode()


def test_a_push_holds_these_files_and_no_other(run, send, hub):
    (run / "model" / "notes.txt").write_text("mine alone")
    send(run, "me/repo")
    assert sorted(hub.repo("me/repo")) == FILES


def test_what_goes_lies_in_the_model_folder_first(run, send, hub, store_run):
    send(run, "me/repo")
    there = hub.repo("me/repo")
    for path in set(FILES) - {"README.md", ".gitattributes"}:
        assert there[path] == sent(run)[path], path
    local, pushed = ((run / "model" / "README.md").read_text(), there["README.md"].decode())
    assert f'model="{store_run.run.model}"' in local
    assert re.findall("^#+ .*", local, re.M)[1:] == re.findall("^#+ .*", pushed, re.M)[1:]


def test_the_catalogue_goes_in_id_order_readable_line_by_line(run, send, hub, store_run):
    send(run, "me/repo")
    lines = [json.loads(line) for line in hub.repo("me/repo")["items.jsonl"].decode().splitlines()]
    assert [line["id"] for line in lines] == [f"thing {number:02}" for number in range(24)]
    assert all(line["title"] and line["popularity"] >= 1 for line in lines)


def test_shards_go_as_they_lie(run, send, hub):
    model = AutoModelForSequenceClassification.from_pretrained(run / "model", trust_remote_code=True)
    expected = model.recommend([[1, 4]])
    (run / "model" / "model.safetensors").unlink()
    model.save_pretrained(run / "weights", max_shard_size="4KB")
    for path in (run / "weights").glob("model*"):
        shutil.copyfile(path, run / "model" / path.name)
    assert send(run, "me/repo")[0] == 0
    shards = [path for path in hub.repo("me/repo") if path.endswith(".safetensors")]
    assert len(shards) > 1
    loaded = AutoModelForSequenceClassification.from_pretrained("me/repo", trust_remote_code=True)
    torch.testing.assert_close(loaded.recommend([[1, 4]]).scores, expected.scores)


# People.


def test_no_raw_user_id_and_no_path_of_this_machine_goes(run, send, hub, store_frame):
    send(run, "me/repo")
    for path, content in hub.repo("me/repo").items():
        for user in store_frame["user"].unique():
            assert user.encode() not in content, (path, user)
        assert str(run).encode() not in content, path
        assert str(Path.home()).encode() + b"/" not in content, path


def test_users_go_where_the_recipe_publishes_them_and_the_push_says_so(run, send, hub):
    state(run, publish_users="true")
    assert "users.jsonl; run training/predict.py first" in send(run, "me/repo")[2]
    shutil.copyfile(run / "corpora" / "users.jsonl", run / "model" / "users.jsonl")
    code, said, _ = send(run, "me/repo")
    assert (code, "users.jsonl" in hub.repo("me/repo")) == (0, True)
    assert "raw ids, texts and training histories of 40 users, in users.jsonl" in said


def test_users_that_were_published_go_again_with_the_next_push(run, send, hub):
    state(run, publish_users="true")
    shutil.copyfile(run / "corpora" / "users.jsonl", run / "model" / "users.jsonl")
    send(run, "me/repo")
    state(run, publish_users="false")
    said = send(run, "me/repo")[1]
    assert "users.jsonl" not in hub.repo("me/repo")
    assert "what me/repo held about people before stays in its history" in said
    assert "super_squash_history('me/repo', repo_type='model')" in said


def test_a_push_says_what_it_tells_of_people(run, send, hub):
    said = send(run, "me/repo", "--dry-run")[1]
    assert "- no users.jsonl\n" in said
    assert "none of the 40 raw user ids that are long enough to be looked for stands in any file" in said
    assert "embeddings of 40 users, by number" in said


def test_raw_user_ids_that_slipped_in_stop_the_push(run, send, hub):
    items = (run / "model" / "items.jsonl").read_text()
    (run / "model" / "items.jsonl").write_text(items.replace('"text": ""', '"text": "sold by person 07"', 1))
    assert "would be refused: raw user ids stand in what goes to me/repo (items.jsonl: person 07)" in send(run, "me/repo", "--dry-run")[1]  # fmt: skip
    code, _, complaint = send(run, "me/repo")
    assert (code, "raw user ids stand in what goes to me/repo (items.jsonl: person 07)" in complaint) == (2, True)
    assert not hub.repos
    assert send(run, "me/repo", "--user-ids-are-words")[0] == 0
    page = hub.repo("me/repo")["README.md"].decode()
    assert "Some words in them are raw user ids too" in page
    assert "No raw user id" not in page


def test_raw_ids_of_users_that_were_dropped_stop_the_push_too(store_recipe, store_frame, vary, send, hub, tmp_path):
    stranger = store_frame.iloc[:2].assign(user="bob.rare@mail.org", review=None)
    items = store_frame[["item"]].drop_duplicates().rename(columns={"item": "id"})
    items["text"] = ["Made by bob.rare@mail.org", *[""] * (len(items) - 1)]
    items.to_csv(tmp_path / "items.csv", index=False)
    data = {"min_user_interactions": 5, "items": SideTable(str(tmp_path / "items.csv"), text_columns=["text"])}
    recipe = vary(store_recipe, license="mit", data=data)
    frame = pd.concat([store_frame, stranger])
    run = pretrain(recipe, frame=frame).folder
    finetune(recipe)
    predict(recipe)
    complaint = "raw user ids stand in what goes to me/repo (items.jsonl: bob.rare@mail.org"
    assert f"would be refused: {complaint}" in send(run, "me/repo", "--dry-run")[1]
    code, _, said = send(run, "me/repo")
    assert (code, complaint in said) == (2, True)
    assert "(items.parquet: bob.rare@mail.org" in send(run, "--dataset", "me/data", "--private")[2]
    assert not hub.repos
    (run / "corpora" / "dropped_users.parquet").unlink()
    assert (
        "the filters dropped were not looked for: an earlier version built corpora/"
        in send(run, "me/repo", "--dry-run")[1]
    )
    before = tree(run / "model")
    pretrain(recipe, frame=frame, resume=True)
    assert complaint in send(run, "me/repo")[2]
    assert tree(run / "model") == before


def test_without_corpora_nothing_tells_the_ids_and_the_push_is_refused(run, send, hub):
    shutil.rmtree(run / "corpora")
    complaint = "the run has no corpora/, or an earlier version built them, so nothing tells whether raw user ids stand in what goes to me/repo"
    assert f"would be refused: {complaint}" in send(run, "me/repo", "--dry-run")[1]
    code, _, said = send(run, "me/repo")
    assert (code, complaint in said, bool(hub.repos)) == (2, True, False)
    assert send(run, "me/repo", "--user-ids-are-words")[0] == 0
    page = hub.repo("me/repo")["README.md"].decode()
    assert "Whether words in them are raw user ids too was not looked at." in page
    assert "No raw user id" not in page


def test_corpora_of_an_earlier_version_do_not_tell_the_ids_of_dropped_users(run, send, hub):
    (run / "corpora" / "dropped_users.parquet").unlink()
    code, _, said = send(run, "me/repo")
    assert (code, "an earlier version built them, so nothing tells" in said, bool(hub.repos)) == (2, True, False)
    assert send(run, "me/repo", "--user-ids-are-words")[0] == 0
    assert "was not looked at" in hub.repo("me/repo")["README.md"].decode()


def test_without_corpora_published_users_go(run, send, hub):
    state(run, publish_users="true")
    shutil.move(run / "corpora" / "users.jsonl", run / "model" / "users.jsonl")
    shutil.rmtree(run / "corpora")
    assert send(run, "me/repo")[0] == 0


@pytest.mark.parametrize("raw", ["alice.smith@mail.org", "jürgen_ö", "Q7ZZ-91", "491511234567", 491511234567])
def test_ids_of_every_kind_are_found_in_every_kind_of_file(run, send, hub, raw):
    users = [json.loads(line) for line in (run / "corpora" / "users.jsonl").read_text().splitlines()]
    users[0]["id"] = raw
    (run / "corpora" / "users.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users))
    for name, old in (("items.jsonl", '"text": ""'), ("results.json", '"versions": {')):
        before = (run / "model" / name).read_text()
        new = {"items.jsonl": f'"text": "by {raw}"', "results.json": f'"versions": {{"by": {json.dumps(raw)}, '}[name]
        assert old in before
        (run / "model" / name).write_text(before.replace(old, new, 1))
        code, _, complaint = send(run, "me/repo")
        assert (code, f"{name}: {raw}" in complaint) == (2, True), complaint
        (run / "model" / name).write_text(before)


def test_ids_in_texts_about_items_stop_the_data_too(run, send, hub):
    state(run, license="mit")
    lines = (run / "corpora" / "items.jsonl").read_text()
    (run / "corpora" / "items.jsonl").write_text(lines.replace('"text": ""', '"text": "sold by person 07"', 1))
    code, _, complaint = send(run, "--dataset", "me/data", "--private")
    assert (code, "raw user ids stand in what goes to me/data (items.parquet: person 07)" in complaint) == (2, True)
    assert not hub.repos


def test_a_push_of_data_says_what_they_tell_of_people(run, send, hub):
    said = send(run, "--dataset", "me/data", "--dry-run")[1]
    assert "about people, me/data:" in said
    assert "Users are numbers" in said


def test_without_user_embeddings_people_are_served_by_their_history(run, send, hub):
    rec = pipeline("recommendation", model=str(run / "model"), trust_remote_code=True)
    expected = best(rec)
    code, said, _ = send(run, "me/repo", "--without-user-embeddings")
    assert (code, "no embeddings of users: people are served by their history" in said) == (0, True)
    values = load_file(run / "model" / "model.safetensors")["model.user_embeddings.weight"].numpy()
    weights = hub.repo("me/repo")["model.safetensors"]
    assert not any(row.tobytes() in weights for row in values)
    served = pipeline("recommendation", model="me/repo", trust_remote_code=True)
    assert best(served) == expected
    assert served.model.config.num_users == 40


def test_folders_that_an_earlier_version_put_before_a_name_stay_here(run, send, hub):
    results = json.loads((run / "model" / "results.json").read_text())
    info = json.loads((run / "corpora" / "info.json").read_text())
    for path, whole, data in (("model/results.json", results, results["data"]), ("corpora/info.json", info, info)):
        data["source"] = {"t.csv": "00", "anna.secret/t.csv": "11"}
        (run / path).write_text(json.dumps(whole))
    assert send(run, "me/repo", "--dataset", "me/data", "--private")[0] == 0
    files = hub.repo("me/repo")
    assert json.loads(files["results.json"])["data"]["source"] == {"t.csv": "00", "t.csv (2)": "11"}
    for content in (*files.values(), *hub.repo("me/data", "dataset").values()):
        assert b"anna.secret" not in content


# Looking before, pushing again.


def test_a_dry_run_says_what_would_go_and_sends_nothing(run, send, hub):
    code, said, _ = send(run, "me/repo", "--dry-run", "--dataset", "me/data", "--space", "me/demo")
    assert code == 0
    for path in set(FILES) - {".gitattributes"}:
        assert re.search(rf"new +\d+(\.\d)? k?M?B  {re.escape(path)}\n", said), path
    assert "23 of 23 files" in said
    assert not hub.repos
    assert {request.method for request in hub.requests} == {"GET"}


def test_a_dry_run_needs_neither_login_nor_network(run, send, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with hub.gone():
        code, said, _ = send(run, "me/repo", "--dry-run")
    assert code == 0
    assert "me/repo was not looked at: no connection" in said
    assert "model me/repo (not looked at)" in said


def test_pushing_the_same_again_makes_no_commit(run, send, hub):
    send(run, "me/repo")
    before, uploaded = hub.commits("me/repo"), len(hub.uploaded)
    code, said, _ = send(run, "me/repo")
    assert (code, "nothing differs from what is there" in said) == (0, True)
    assert hub.commits("me/repo") == before
    assert len(hub.uploaded) == uploaded


def test_pushing_again_sends_what_changed_and_no_large_file_twice(run, send, hub):
    send(run, "me/repo")
    weights = load_file(run / "model" / "model.safetensors")
    weights["model.item_bias"] += 1
    save_file(weights, run / "model" / "model.safetensors", {"format": "pt"})
    uploaded = list(hub.uploaded)
    send(run, "me/repo")
    sha256 = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert hub.uploaded[len(uploaded) :] == [sha256]
    titles = [commit.title for commit in hub.commits("me/repo")]
    assert titles[1] == titles[3] == "Upload the recommender"
    assert f'revision="{hub.commits("me/repo")[1].oid}"' in hub.repo("me/repo")["README.md"].decode()


def test_a_card_alone_that_changed_is_one_commit_and_names_the_old_one(run, send, hub):
    send(run, "me/repo")
    first = hub.commits("me/repo")[1].oid
    HfApi().upload_file(path_or_fileobj=b"---\nlicense: mit\n---\nedited\n" + f'revision="{first}"'.encode(), path_in_repo="README.md", repo_id="me/repo")  # fmt: skip
    send(run, "me/repo")
    assert len(hub.commits("me/repo")) == 5
    assert hub.repo("me/repo") == hub.repo("me/repo", revision=hub.commits("me/repo")[2].oid)


@pytest.mark.parametrize("revision", ["a" * 40, None])
def test_a_pin_of_a_hand_edited_card_is_believed_only_where_it_holds(run, send, hub, revision):
    send(run, "me/repo")
    first = hub.commits("me/repo")[1].oid
    other = revision or hub.commits("me/repo")[2].oid  # a commit that is not there, and one that holds something else
    page = hub.repo("me/repo")["README.md"].decode().replace(first, other)
    HfApi().upload_file(path_or_fileobj=page.encode(), path_in_repo="README.md", repo_id="me/repo")
    edited = hub.commits("me/repo")[0].oid
    send(run, "me/repo")
    assert f'revision="{edited}"' in hub.repo("me/repo")["README.md"].decode()


def test_a_branch_leaves_main_as_it_was(run, send, hub):
    assert send(run, "me/repo", "--revision", "trial")[0] == 0
    assert list(hub.repo("me/repo")) == [".gitattributes"]
    assert sorted(hub.repo("me/repo", revision="trial")) == FILES
    rec = pipeline("recommendation", model="me/repo", revision="trial", trust_remote_code=True)
    assert len(rec({"history": HISTORY})) == 10


def test_what_is_on_main_already_goes_to_a_new_branch(run, send, hub):
    assert send(run, "me/repo")[0] == 0
    assert send(run, "me/repo", "--revision", "trial")[0] == 0
    assert sorted(hub.repo("me/repo", revision="trial")) == FILES


def test_data_on_a_branch_are_named_with_it(run, send, hub):
    code, _, _ = send(run, "me/repo", "--dataset", "me/data", "--private", "--revision", "feature/x")
    assert code == 0
    recipe = hub.repo("me/repo", revision="feature/x")["recipe.yaml"].decode()
    assert "path: me/data@feature/x\n" in recipe
    assert "path: hf://datasets/me/data@feature%2Fx/items.parquet\n" in recipe
    page = hub.repo("me/data", "dataset", revision="feature/x")["README.md"].decode()
    assert 'load_dataset("me/data", revision="feature/x")' in page
    assert 'load_dataset("me/data", "items", split="train", revision="feature/x")' in page


def test_raw_ids_that_were_published_with_the_data_stay_in_its_history_and_the_push_says_so(run, send, hub):
    state(run, publish_users="true")
    assert send(run, "--dataset", "me/data", "--private")[0] == 0
    state(run, publish_users="false")
    said = send(run, "--dataset", "me/data", "--private")[1]
    assert "super_squash_history('me/data', repo_type='dataset')" in said


def test_a_tag_names_the_commit_with_the_pinned_card(run, send, hub):
    assert send(run, "me/repo", "--tag", "v1")[0] == 0
    assert hub.repos["model", "me/repo"].tags == {"v1": hub.commits("me/repo")[0].oid}


def test_the_same_push_with_the_same_tag_is_no_mistake(run, send, hub):
    assert [send(run, "me/repo", "--tag", "v1")[0] for _ in range(2)] == [0, 0]


def test_a_tag_that_is_taken_stops_the_push_before_anything_is_sent(run, send, hub):
    send(run, "me/repo", "--tag", "v1")
    state(run, license="apache-2.0")
    before = hub.commits("me/repo")
    code, _, complaint = send(run, "me/repo", "--tag", "v1")
    assert (code, "me/repo has a tag 'v1' already" in complaint) == (2, True), complaint
    assert hub.commits("me/repo") == before


def test_a_bare_name_is_in_the_namespace_of_whoever_is_logged_in(run, send, hub):
    send(run, "repo")
    assert ("model", "me/repo") in hub.repos


# What stops a push.


def test_a_public_push_needs_a_licence_a_private_one_does_not(run, send, hub):
    state(run, license="null")
    code, _, complaint = send(run, "me/repo")
    assert code == 2
    assert "no licence is stated, and a public repo needs one" in complaint
    assert not hub.repos
    assert send(run, "me/repo", "--private")[0] == 0
    assert hub.repos["model", "me/repo"].private
    assert send(run, "me/repo")[0] == 0, "it is private already"


def test_private_does_not_pretend_to_hide_what_is_public(run, send, hub):
    send(run, "me/repo")
    code, _, complaint = send(run, "me/repo", "--private")
    assert (code, "is there already and public, which --private does not change" in complaint) == (2, True)


@pytest.mark.parametrize(
    ("token", "name", "sentence"),
    [
        (None, "me/repo", "not logged in"),
        ("hf_nobody", "me/repo", "does not know this token"),
        ("hf_read", "reader/repo", "this token may not write there"),
        ("hf_me", "other/repo", "this token may not write there"),
        ("hf_me", "me/a b", "is no name of a repo"),
    ],
)
def test_who_may_not_push_is_told_why_and_what_to_do(run, send, hub, monkeypatch, token, name, sentence):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    before = tree(run)
    code, _, complaint = send(run, name)
    assert (code, sentence in complaint, complaint.count("\n")) == (2, True, 1), complaint
    assert tree(run) == before
    assert not hub.repos


def test_what_somebody_else_made_is_not_written_over(run, send, hub):
    HfApi().create_repo("me/bert")
    HfApi().upload_file(path_or_fileobj=b"bert", path_in_repo="bert.bin", repo_id="me/bert")
    code, _, complaint = send(run, "me/bert")
    assert (code, "me/bert holds something else already (bert.bin …)" in complaint) == (2, True)
    assert sorted(hub.repo("me/bert")) == [".gitattributes", "bert.bin"]


@pytest.mark.parametrize("how", ["drop", "lose", 500, 507, 403])
def test_a_push_interrupted_at_any_request_leaves_the_old_or_the_new(run, send, hub, how):
    send(run, "me/repo")
    old = hub.repo("me/repo")
    state(run, license="apache-2.0")
    weights = load_file(run / "model" / "model.safetensors")
    weights["model.item_bias"] += 1
    save_file(weights, run / "model" / "model.safetensors", {"format": "pt"})
    local, changed, requests = tree(run), False, 0
    while not changed:
        requests += 1
        hub.fail_at(requests, how, times=math.inf)
        code, _, complaint = send(run, "me/repo")
        hub.faults.clear()
        there = {path: content for path, content in hub.repo("me/repo").items() if path != "README.md"}
        whole = [{path: files[path] for path in there} for files in (old, {**old, **sent(run)})]
        assert there in whole
        changed = there == whole[1]
        assert (code, complaint.count("\n")) == (2, 1), complaint
        assert tree(run) == local
    assert requests > 5
    assert send(run, "me/repo")[0] == 0
    assert f'revision="{hub.commits("me/repo")[1].oid}"' in hub.repo("me/repo")["README.md"].decode()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "requests"), [("drop", -2), ("lose", -1)])  # every third request
def test_a_first_push_of_all_three_interrupted_anywhere_leaves_empty_or_whole_repos(run, send, hub, how, requests):
    path = run / "model" / "recipe.yaml"
    path.write_text(path.read_text().replace("  license: null", "  license: cc0-1.0"))
    command = [run, "me/repo", "--dataset", "me/data", "--space", "me/demo", "--tag", "v1"]
    assert send(*command)[0] == 0
    names = [("model", "me/repo"), ("dataset", "me/data"), ("space", "me/demo")]
    whole = {kind: set(hub.repo(name, kind)) for kind, name in names}
    empty = ({".gitattributes"}, {".gitattributes", "README.md"})  # the site gives a Space a page at once
    code, local = 2, tree(run)
    while code:
        requests += 3
        hub.reset()
        hub.fail_at(requests, how, times=math.inf)
        code, _, complaint = send(*command)
        for kind, name in names:
            if (kind, name) in hub.repos:
                assert set(hub.repo(name, kind)) in (*empty, whole[kind]), (requests, kind)
        assert tree(run) == local
        if code:
            assert (code, complaint.count("\n")) == (2, 1), complaint
            hub.faults.clear()
            assert send(*command)[0] == 0, "the same command finishes it"
            assert {kind: set(hub.repo(name, kind)) for kind, name in names} == whole
            assert hub.repos["model", "me/repo"].tags == {"v1": hub.commits("me/repo")[0].oid}
    assert requests > 20


def test_no_network_is_one_sentence(run, send, hub):
    with hub.gone():
        code, _, complaint = send(run, "me/repo")
    assert (code, complaint.count("\n")) == (2, 1)
    assert "no connection to" in complaint


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_is_one_sentence(run, send, hub, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("training.hub.people.save_file", full)
    before = tree(run)
    code, _, complaint = send(run, "me/repo", "--without-user-embeddings")
    assert (code, "the disk is full" in complaint, complaint.count("\n")) == (2, True, 1)
    assert tree(run) == before


def test_a_model_that_is_older_than_the_pretraining_beside_it_is_not_sent(run, send, hub, store_copy, store_frame):
    pretrain(store_copy, frame=store_frame[store_frame["user"] != "person 07"], overwrite=True)
    code, _, complaint = send(run, "me/repo", "--dataset", "me/data", "--private")
    assert (code, "is older than the pretraining beside it; run training/finetune.py" in complaint) == (2, True)
    assert not hub.repos


def test_a_model_that_has_forgotten_somebody_is_sent_and_their_data_are_not(run, send, hub):
    users = run / "corpora" / "users.jsonl"
    rec = pipeline("recommendation", model=str(run / "model"), users=users, trust_remote_code=True)
    rec.remove_users(["person 07"])
    rec.save_pretrained(run / "model", users=users)
    assert send(run, "me/repo")[0] == 0
    code, _, complaint = send(run, "--dataset", "me/data", "--private")
    assert (code, "was forgotten since it was built, and their pairs and reviews are still there" in complaint) == (
        2,
        True,
    )


def test_a_run_that_was_not_measured_is_sent_to_predict(run, send, hub):
    (run / "model" / "results.json").unlink()
    code, _, complaint = send(run, "me/repo")
    assert (code, "lacks results.json; run training/predict.py first" in complaint) == (2, True)


def test_weights_that_are_damaged_or_incomplete_do_not_go(run, send, hub):
    whole = (run / "model" / "model.safetensors").read_bytes()
    (run / "model" / "model.safetensors").write_bytes(whole[:1000])
    assert "model.safetensors is damaged" in send(run, "me/repo")[2]
    (run / "model" / "model.safetensors").write_bytes(whole)
    (run / "model" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    )
    assert "lacks model-00001-of-00001.safetensors" in send(run, "me/repo")[2]
    (run / "model" / "model.safetensors.index.json").unlink()
    (run / "model" / "model.safetensors").rename(run / "model" / "model-00001-of-00002.safetensors")
    assert "lacks model.safetensors" in send(run, "me/repo")[2]
    assert not hub.repos


def test_damaged_figures_are_a_sentence(run, send, hub):
    (run / "model" / "results.json").write_text("{")
    code, _, complaint = send(run, "me/repo")
    assert (code, "results.json is damaged; run training/predict.py --overwrite" in complaint) == (2, True)


def test_metadata_that_the_hub_refuses_make_no_repo(run, send, hub):
    state(run, license="my own (weird)")
    code, _, complaint = send(run, "me/repo")
    assert (code, "the Hub refuses the card's metadata" in complaint, complaint.count("\n")) == (2, True, 1)
    assert not hub.repos


def test_data_do_not_go_where_the_model_may_not(run, send, hub):
    path = run / "model" / "recipe.yaml"
    path.write_text(path.read_text().replace("  license: null", "  license: cc0-1.0"))
    state(run, license="null")
    code, _, complaint = send(run, "me/repo", "--dataset", "me/data")
    assert (code, "no licence is stated" in complaint) == (2, True)
    assert not hub.repos


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere", "me/repo"], ["RUN"], ["RUN", "--space", "me/demo"], ["RUN/model", "me/repo"], ["RUN", "--tag", "v1"],
        ["RUN", "me/repo", "--revision", "a" * 40], ["RUN", "me/repo", "--revision", "a b"], ["RUN", "me/repo", "--tag", "main"],
        ["RUN", "me/repo", "--tag", "v 1~"],
    ],
)  # fmt: skip
def test_arguments_that_say_too_little_are_a_sentence(run, send, hub, arguments):
    code, _, complaint = send(*[word.replace("RUN", str(run)) for word in arguments])
    assert (code, complaint.startswith("error: "), complaint.count("\n")) == (2, True, 1)
    assert not hub.requests


# Opened from there.


def test_every_auto_class_opens_the_repo_by_name_and_commit(run, send, hub, store_run):
    send(run, "me/repo")
    ids, commit = store_run.gave["input_ids"], hub.commits("me/repo")[1].oid
    for revision in ("main", commit):
        place = {"revision": revision, "trust_remote_code": True}
        assert AutoConfig.from_pretrained("me/repo", **place).num_items == 24
        hidden = AutoModel.from_pretrained("me/repo", **place)(ids).last_hidden_state
        torch.testing.assert_close(hidden, store_run.gave["base"], atol=1e-6, rtol=0)
        words = AutoModelForCausalLM.from_pretrained("me/repo", **place)
        torch.testing.assert_close(words(ids).logits, store_run.gave["content"], atol=1e-6, rtol=0)
        assert words.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 7)
        items = AutoModelForSequenceClassification.from_pretrained("me/repo", **place)
        torch.testing.assert_close(items(ids).logits, store_run.gave["recommendation"], atol=1e-6, rtol=0)
        assert items.revision == commit if revision == commit else items.revision == hub.commits("me/repo")[0].oid


def test_the_tokenizer_opens_without_remote_code(run, send, hub):
    send(run, "me/repo")
    tokenizer = AutoTokenizer.from_pretrained("me/repo", trust_remote_code=False)
    assert tokenizer("user_3 item_5", add_special_tokens=False)["input_ids"] == [300 + 3, 340 + 5]


def test_the_pipeline_knows_its_task_and_its_items(run, send, hub):
    send(run, "me/repo")
    local = pipeline("recommendation", model=str(run / "model"), trust_remote_code=True)
    for rec in (pipeline("recommendation", model="me/repo", trust_remote_code=True), pipeline(model="me/repo", trust_remote_code=True)):  # fmt: skip
        assert best(rec) == best(local)


# Data and demo.


def test_data_go_with_the_model_whose_recipe_and_card_then_name_them(run, send, hub):
    state(run, publish_users="false")
    recipe = folder_recipe(run / "model")
    assert recipe.data.license is None
    assert "write `license: …` in the section `data` there" in send(run, "me/repo", "--dataset", "me/data")[2]
    path = run / "model" / "recipe.yaml"
    path.write_text(path.read_text().replace("  license: null", "  license: cc0-1.0"))
    assert send(run, "me/repo", "--dataset", "me/data")[0] == 0
    assert "items.parquet" in hub.repo("me/data", "dataset")
    assert "me/data" in hub.repo("me/repo")["recipe.yaml"].decode()
    assert "me/data" in hub.repo("me/repo")["README.md"].decode()
    before = hub.commits("me/data", "dataset")
    assert send(run, "me/repo", "--dataset", "me/data")[0] == 0
    assert hub.commits("me/data", "dataset") == before
    assert dump_recipe(folder_recipe(run / "model")) != hub.repo("me/repo")["recipe.yaml"].decode()


def test_a_space_shows_the_commit_that_was_pushed(run, send, hub):
    assert send(run, "me/repo", "--space", "me/demo")[0] == 0
    space = hub.repos["space", "me/demo"]
    assert space.sdk == "gradio"
    assert {key: value["value"] for key, value in space.variables.items()} == {
        "CLLM4REC_MODEL": "me/repo",
        "CLLM4REC_REVISION": hub.commits("me/repo")[1].oid,
    }
    files = hub.repo("me/demo", "space")
    assert {"app.py", "requirements.txt", "README.md"} <= set(files)
    assert "- me/repo" in files["README.md"].decode()


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (10**13, "10.0 TB")])  # fmt: skip
def test_sizes_are_said_in_units_for_people(size, words):
    assert in_bytes(size) == words


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device_map": "auto"}])
def test_the_repo_opens_in_bf16_and_over_devices(run, send, hub, options):
    send(run, "me/repo")
    whole = AutoModelForSequenceClassification.from_pretrained("me/repo", trust_remote_code=True).recommend([[1, 4]])
    model = AutoModelForSequenceClassification.from_pretrained("me/repo", trust_remote_code=True, **options)
    tolerance = 1e-2 if "dtype" in options else 1e-6
    torch.testing.assert_close(model.recommend([[1, 4]]).scores, whole.scores, atol=tolerance, rtol=0)
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, options.get("dtype", "float32"))}


def test_predict_pushes_at_the_end_where_asked(store_copy, hub, monkeypatch, capsys):
    recipe = replace(store_copy, license="mit", evaluation=replace(store_copy.evaluation, baselines=["popularity"]))
    predict(recipe, overwrite=True, push_to_hub="me/repo", private=True)
    assert sorted(hub.repo("me/repo")) == FILES
    assert hub.repos["model", "me/repo"].private
    results = json.loads(hub.repo("me/repo")["results.json"])
    assert set(results["baselines"]) == {"popularity"}


def test_predict_finds_what_would_stop_the_push_before_it_measures(store_copy, hub, monkeypatch):
    folder = Run.of(store_copy).folder
    before = tree(folder)
    with pytest.raises(InputError, match="license: none is stated in the recipe"):
        predict(store_copy, overwrite=True, push_to_hub="me/repo")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="not logged in"):
        predict(store_copy, overwrite=True, push_to_hub="me/repo")
    assert tree(folder) == before
