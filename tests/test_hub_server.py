"""The Hub of the tests is true enough: the real clients push to it, load from it and fail on it as they do on the Hub."""

import contextlib
import hashlib
import math
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.cli.hf import main as hf
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFolder
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

SMALL, LARGE = b"hello\n", b"\0weights" * 100
LARGE_SHA256 = hashlib.sha256(LARGE).hexdigest()


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def repo(api):
    api.create_repo("me/repo")
    return "me/repo"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder" / "pictures").mkdir(parents=True)
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: mit\ntags: [shop]\n---\n# Mine\n")
    (tmp_path / "folder" / "pictures" / "note.txt").write_bytes(SMALL)
    (tmp_path / "folder" / "model.safetensors").write_bytes(LARGE)
    return tmp_path / "folder"


def push(folder, **options):
    api = HfApi()
    api.create_repo("me/repo", exist_ok=True)
    return api.upload_folder(repo_id="me/repo", folder_path=folder, **options)


def add(api, path, content, **options):
    return api.upload_file(repo_id="me/repo", path_in_repo=path, path_or_fileobj=content, **options)


def status_of(error):
    return error.value.response.status_code


# What is pushed comes back.


def test_a_pushed_folder_comes_back_the_same(hub, folder):
    commit = push(folder)
    there = hub.repo("me/repo")
    assert sorted(there) == [".gitattributes", "README.md", "model.safetensors", "pictures/note.txt"]
    assert (there["pictures/note.txt"], there["model.safetensors"]) == (SMALL, LARGE)
    snapshot = snapshot_download("me/repo", revision=commit.oid)
    got = (path for path in Path(snapshot).rglob("*") if path.is_file())
    assert {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in got} == there


def test_a_pushed_model_opens_by_name_by_commit_and_from_the_cache(hub):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8)).eval()
    first = model.push_to_hub("me/tiny").oid
    expected = model(torch.tensor([[1, 2, 3]])).logits
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.push_to_hub("me/tiny")
    assert AutoConfig.from_pretrained("me/tiny").vocab_size == 11
    assert AutoModel.from_pretrained("me/tiny").wte.weight.abs().sum() == 0
    by_commit = AutoModelForCausalLM.from_pretrained("me/tiny", revision=first)
    torch.testing.assert_close(by_commit(torch.tensor([[1, 2, 3]])).logits, expected)
    with hub.gone():
        cached = AutoModelForCausalLM.from_pretrained("me/tiny", revision=first)
        torch.testing.assert_close(cached.lm_head.weight, by_commit.lm_head.weight)


def test_pushed_parquet_is_a_dataset(api, tmp_path):
    api.create_repo("me/data", repo_type="dataset")
    for split in ("train", "test"):
        pd.DataFrame({"item": [split, "b"], "rating": [1.0, 2.0]}).to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: train.parquet}\n  - {split: held_out, path: test.parquet}\n---\n"
    )
    commit = api.upload_folder(repo_id="me/data", repo_type="dataset", folder_path=tmp_path)
    data = datasets.load_dataset("me/data")
    assert {split: data[split]["item"][0] for split in data} == {"train": "train", "held_out": "test"}
    streamed = datasets.load_dataset("me/data", split="train", revision=commit.oid, streaming=True)
    assert list(streamed)[1] == {"item": "b", "rating": 2.0}


def test_a_dataset_pushes_itself(hub):
    datasets.Dataset.from_dict({"user": [1, 2], "item": ["a", "b"]}).push_to_hub("me/data", private=True)
    assert hub.repos["dataset", "me/data"].private
    assert datasets.load_dataset("me/data", split="train")["item"][:] == ["a", "b"]


def test_the_command_line_pushes_and_fetches(hub, folder, tmp_path, monkeypatch, capsys):
    for words in (
        ["upload", "me/line", str(folder), "--revision", "dev"],
        ["download", "me/line", "pictures/note.txt", "--revision", "dev", "--local-dir", str(tmp_path / "got")],
        ["auth", "whoami"],
    ):
        monkeypatch.setattr(sys, "argv", ["hf", *words])
        with contextlib.suppress(SystemExit):
            hf()
    assert "model.safetensors" in hub.repo("me/line", revision="dev")
    assert "model.safetensors" not in hub.repo("me/line")
    assert (tmp_path / "got" / "pictures" / "note.txt").read_bytes() == SMALL
    assert "me" in capsys.readouterr().out.split()


# Files.


def test_files_are_named_as_git_names_them(api, folder):
    push(folder)
    info = api.model_info("me/repo", files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert files["pictures/note.txt"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # of `git hash-object`
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{LARGE_SHA256}\nsize 800\n".encode()
    assert files["model.safetensors"].blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    lfs = files["model.safetensors"].lfs
    assert (lfs.sha256, lfs.size, lfs.pointer_size) == (LARGE_SHA256, 800, len(pointer))
    assert info.card_data.license == "mit"
    assert info.tags == ["shop"]


@pytest.mark.parametrize(
    ("path", "content", "large"),
    [
        ("model.safetensors", b"by its name", True),
        ("picture.png", b"\x89PNG\0", True),
        ("items.jsonl", b"text", False),
        ("tokenizer.json", b" " * (10 * 2**20 + 1), True),
        ("tokenizer.json", b" " * (10 * 2**20), False),
        ("empty.safetensors", b"", False),
    ],
)
def test_large_files_go_where_large_files_go(hub, api, repo, path, content, large):
    add(api, path, content)
    assert hub.uploaded == [hashlib.sha256(content).hexdigest()] * large
    [info] = api.get_paths_info(repo, path)
    assert (info.lfs is not None) == large
    assert hub.repo(repo)[path] == content


def test_large_files_of_other_names_are_noted_in_gitattributes(hub, api, repo):
    add(api, "picture.png", LARGE)
    assert hub.repo(repo)[".gitattributes"].endswith(b"\npicture.png filter=lfs diff=lfs merge=lfs -text\n")


def test_what_has_not_changed_is_not_sent_again(hub, api, folder):
    first = push(folder)
    assert push(folder).oid == first.oid
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Yours\n")
    assert push(folder).oid != first.oid
    assert hub.uploaded == [LARGE_SHA256]
    assert [commit.title for commit in hub.commits("me/repo")] == ["Upload folder using huggingface_hub"] * 2 + ["initial commit"]  # fmt: skip


def test_trees_list_files_and_folders(api, folder):
    push(folder)
    tree = {entry.path: entry for entry in api.list_repo_tree("me/repo", expand=True)}
    assert sorted(tree) == [".gitattributes", "README.md", "model.safetensors", "pictures"]
    assert isinstance(tree["pictures"], RepoFolder)
    assert tree["README.md"].last_commit.title == "Upload folder using huggingface_hub"
    assert [entry.path for entry in api.list_repo_tree("me/repo", "pictures")] == ["pictures/note.txt"]
    deep = [entry.path for entry in api.list_repo_tree("me/repo", recursive=True)]
    assert sorted(deep) == [".gitattributes", "README.md", "model.safetensors", "pictures", "pictures/note.txt"]
    with pytest.raises(RemoteEntryNotFoundError, match='nowhere does not exist on "main"'):
        list(api.list_repo_tree("me/repo", "nowhere"))


@pytest.mark.parametrize("path", ["model.safetensors", "pictures/note.txt"])
def test_a_part_of_a_file_can_be_asked_for(hub, folder, path):
    push(folder)
    whole = hub.repo("me/repo")[path]
    part = get_session().get(f"{hub.url}/me/repo/resolve/main/{path}", headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, whole[2:5], f"bytes 2-4/{len(whole)}")  # fmt: skip
    rest = get_session().get(f"{hub.url}/me/repo/resolve/main/{path}", headers={"Range": "bytes=3-"})
    assert rest.content == whole[3:]
    assert get_session().get(f"{hub.url}/me/repo/resolve/main/{path}", headers={"Range": "bytes=9999-"}).status_code == 416  # fmt: skip


def test_tokens_do_not_go_where_large_files_lie(hub, folder):
    push(folder)
    snapshot_download("me/repo")
    assert {request.token for request in hub.requests if request.path.startswith("/lfs/")} == {None}
    assert {request.token for request in hub.requests if request.path.startswith("/api/")} == {"hf_me"}


def test_files_and_folders_can_be_deleted(hub, api, folder):
    push(folder)
    operations = [CommitOperationDelete("pictures/"), CommitOperationAdd("new.txt", SMALL)]
    api.create_commit("me/repo", operations, commit_message="Tidy up", commit_description="Why not")
    assert sorted(hub.repo("me/repo")) == [".gitattributes", "README.md", "model.safetensors", "new.txt"]
    assert hub.commits("me/repo")[0].description == "Why not"
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("never.txt", "me/repo")


# Branches, tags, history.


def test_branches_and_tags_name_commits(hub, api, repo):
    first = hub.commits(repo)[0].oid
    api.create_branch(repo, branch="dev/new", revision=first)
    pushed = add(api, "a.txt", SMALL, revision="dev/new").oid
    api.create_tag(repo, tag="v1", revision="dev/new")
    add(api, "a.txt", b"later", revision="dev/new")
    refs = api.list_repo_refs(repo)
    assert {branch.name for branch in refs.branches} == {"main", "dev/new"}
    assert [(tag.ref, tag.target_commit) for tag in refs.tags] == [("refs/tags/v1", pushed)]
    assert "a.txt" not in hub.repo(repo)
    assert Path(hf_hub_download(repo, "a.txt", revision="v1")).read_bytes() == SMALL
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="dev/new")
    assert [len(names) for names in (api.list_repo_refs(repo).branches, api.list_repo_refs(repo).tags)] == [1, 0]


def test_a_name_that_is_there_is_a_conflict(api, repo):
    api.create_tag(repo, tag="v1")
    for again in (
        lambda **options: api.create_tag(repo, tag="v1", **options),
        lambda **options: api.create_branch(repo, branch="main", **options),
        lambda **options: api.create_repo(repo, **options),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            again()
        assert status_of(error) == 409
        again(exist_ok=True)


def test_a_commit_on_a_moved_branch_is_refused(hub, api, repo):
    parent = hub.commits(repo)[0].oid
    moved = add(api, "a.txt", SMALL, parent_commit=parent).oid
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        add(api, "b.txt", SMALL, parent_commit=parent)
    assert status_of(error) == 412
    assert hub.commits(repo)[0].oid == moved


def test_history_is_told_and_squashed(hub, api, repo):
    add(api, "a.txt", SMALL, commit_message="Add a")
    assert [(commit.title, commit.authors) for commit in api.list_repo_commits(repo)] == [("Add a", ["me"]), ("initial commit", ["me"])]  # fmt: skip
    api.super_squash_history(repo, commit_message="All")
    assert [commit.title for commit in hub.commits(repo)] == ["All"]
    assert hub.repo(repo)["a.txt"] == SMALL


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda api: api.model_info("me/none"), RepositoryNotFoundError),
        (lambda api: api.model_info("gpt2"), RepositoryNotFoundError),
        (lambda api: api.dataset_info("me/repo"), RepositoryNotFoundError),
        (lambda api: api.model_info("me/repo", revision="none"), RevisionNotFoundError),
        (lambda api: hf_hub_download("me/repo", "none.txt"), RemoteEntryNotFoundError),
        (lambda api: hf_hub_download("me/repo", "a", revision="none"), RevisionNotFoundError),
        (lambda api: add(api, "a.txt", SMALL, revision="none"), RevisionNotFoundError),
        (lambda api: api.delete_tag("me/repo", tag="none"), RevisionNotFoundError),
        (lambda api: api.create_branch("me/repo", branch="refs/pr/1"), BadRequestError),
        (lambda api: api.delete_repo("me/none"), RepositoryNotFoundError),
    ],
)
def test_what_is_not_there_is_told_apart(api, repo, ask, error):
    with pytest.raises(error):
        ask(api)


def test_a_deleted_repo_is_gone_with_its_large_files(hub, api, folder):
    push(folder)
    api.delete_repo("me/repo")
    assert not api.repo_exists("me/repo")
    push(folder)
    assert hub.uploaded == [LARGE_SHA256] * 2


# People.


def test_tokens_belong_to_people(api, monkeypatch):
    me = api.whoami()
    assert (me["name"], me["auth"]["accessToken"]["role"], [org["name"] for org in me["orgs"]]) == ("me", "write", ["shop"])  # fmt: skip
    assert api.whoami(token="hf_read")["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_forged")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LocalTokenNotFoundError):
        api.whoami()


@pytest.mark.parametrize(
    ("token", "repo_id", "error", "message"),
    [
        ("hf_me", "shop/repo", None, None),
        ("hf_read", "reader/repo", HfHubHTTPError, 'the rights to create a model under the namespace "reader"'),
        ("hf_other", "me/other", HfHubHTTPError, 'the rights to create a model under the namespace "me"'),
        ("hf_forged", "me/other", HfHubHTTPError, "Invalid credentials in Authorization header"),
        (False, "me/other", HfHubHTTPError, "Invalid username or password"),
    ],
)
def test_only_the_owner_makes_a_repo(hub, api, token, repo_id, error, message):
    if error is None:
        api.create_repo(repo_id, token=token)
        assert ("model", repo_id) in hub.repos
    else:
        with pytest.raises(error, match=message):
            api.create_repo(repo_id, token=token)


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        ("hf_read", HfHubHTTPError, "403 Forbidden: Forbidden: you must use a write token"),
        ("hf_other", HfHubHTTPError, "403 Forbidden: Authorization error"),
        ("hf_forged", HfHubHTTPError, "Invalid credentials in Authorization header"),
        (False, RepositoryNotFoundError, "401 Client Error"),
    ],
)
def test_only_the_owner_writes_to_a_repo(hub, api, repo, token, error, message):
    with pytest.raises(error, match=message):
        add(api, "a.txt", SMALL, token=token)
    assert "a.txt" not in hub.repo(repo)


def test_a_private_repo_is_there_for_its_owner_alone(hub, api):
    api.create_repo("me/secret", private=True)
    assert api.model_info("me/secret").private
    for token in ("hf_other", False):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("me/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("me/secret", ".gitattributes", token=token)


def test_a_gated_repo_shows_its_page_and_not_its_files(hub, api, repo):
    hub.repos["model", repo].gated = True
    assert api.model_info(repo, token="hf_other").gated
    with pytest.raises(GatedRepoError, match="restricted"):
        hf_hub_download(repo, ".gitattributes", token="hf_other")


# Cards and Spaces.


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: my-own", '"license" must be one of'),
        ("language: no", '"language" must be a string'),  # YAML's no is False
        ("language: English", '"language" must be an ISO 639 code'),
        ("tags: [1]", '"tags" must be a string or an array of strings'),
        ("base_model: ./runs/model", '"base_model" must be the id of a model'),
        ("a: [", "Invalid YAML"),
        ("- a", "YAML metadata must be an object"),
    ],
)
def test_faulty_metadata_is_refused(hub, api, repo, metadata, message):
    with pytest.raises(ValueError, match=message):
        add(api, "README.md", f"---\n{metadata}\n---\n# Mine\n".encode())
    assert "README.md" not in hub.repo(repo)


def test_a_card_without_metadata_is_warned_about(hub, api, repo):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        add(api, "README.md", b"# Mine\n")
    assert hub.repo(repo)["README.md"] == b"# Mine\n"


def test_a_space_has_variables_and_runs_its_app(hub, api):
    api.create_repo("me/demo", repo_type="space", space_sdk="gradio", space_variables=[{"key": "MODEL", "value": "me/old"}])  # fmt: skip
    assert api.get_space_runtime("me/demo").stage == "NO_APP_FILE"
    api.add_space_variable("me/demo", "MODEL", "me/repo", description="What it shows")
    api.add_space_variable("me/demo", "REVISION", "main")
    api.delete_space_variable("me/demo", "REVISION")
    assert {key: variable.value for key, variable in api.get_space_variables("me/demo").items()} == {"MODEL": "me/repo"}
    add_app = {"path_in_repo": "app.py", "path_or_fileobj": b"print()", "repo_type": "space"}
    api.upload_file(repo_id="me/demo", **add_app)
    assert api.get_space_runtime("me/demo").stage == "RUNNING"
    assert api.space_info("me/demo").sdk == "gradio"
    assert b"sdk: gradio" in hub.repo("me/demo", "space")["README.md"]


@pytest.mark.parametrize(
    "metadata", ["title: Demo", "sdk: gradio\ncolorFrom: black", f"sdk: gradio\nshort_description: {'a' * 61}"]
)
def test_a_spaces_card_must_configure_it(api, metadata):
    api.create_repo("me/demo", repo_type="space", space_sdk="gradio")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(
            repo_id="me/demo",
            repo_type="space",
            path_in_repo="README.md",
            path_or_fileobj=f"---\n{metadata}\n---\n".encode(),
        )


# Breaking things.


def test_a_status_is_answered_at_the_nth_request_and_no_other(hub, api, repo):
    hub.fail_at(2, 507, path="/api/whoami")
    api.whoami()
    with pytest.raises(HfHubHTTPError, match="Insufficient Storage") as error:
        api.whoami()
    assert status_of(error) == 507
    assert api.whoami()["name"] == "me"
    assert [request.status for request in hub.requests[-3:]] == [200, 507, 200]


def test_a_passing_fault_of_an_upload_goes_unnoticed(hub, folder):
    for how in ("drop", "lose", 500, 503):
        hub.reset()
        hub.fail_at(1, how, method="PUT")
        push(folder)
        assert hub.repo("me/repo")["model.safetensors"] == LARGE


def test_a_commit_whose_answer_is_lost_is_there(hub, api, repo):
    for how, there in (("drop", False), ("lose", True)):
        hub.fail_at(1, how, path="/commit/")
        with pytest.raises(HTTPError, match="Server disconnected"):
            add(api, f"{how}.txt", SMALL)
        assert (f"{how}.txt" in hub.repo(repo)) == there


def test_cut_off_anywhere_a_push_leaves_the_old_repo_or_the_new_one(hub, folder):
    push(folder)
    old = hub.repo("me/repo")
    (folder / "pictures" / "note.txt").write_bytes(b"new")
    (folder / "model.safetensors").write_bytes(LARGE + LARGE)
    hub.requests.clear()
    push(folder, revision="main")
    new, length = hub.repo("me/repo"), len(hub.requests)
    assert old != new
    seen = []
    for how in ("drop", "lose"):
        for n in range(1, length + 1):
            (folder / "pictures" / "note.txt").write_bytes(SMALL)
            (folder / "model.safetensors").write_bytes(LARGE)
            hub.reset()
            push(folder)
            (folder / "pictures" / "note.txt").write_bytes(b"new")
            (folder / "model.safetensors").write_bytes(LARGE + LARGE)
            hub.fail_at(n, how, times=math.inf)
            with pytest.raises((HTTPError, RuntimeError)):
                push(folder)
            assert hub.repo("me/repo") in (old, new)
            seen.append(hub.repo("me/repo") == new)
    assert seen == [False] * (2 * length - 1) + [True]  # new only where the answer to the commit was lost


def test_a_network_that_is_gone_refuses_connections_until_it_is_back(hub, api, repo):
    with hub.gone(), pytest.raises(HTTPError, match="Connection refused"):
        api.whoami()
    assert api.whoami()["name"] == "me"
    add(api, "a.txt", SMALL)
    assert hub.repo(repo)["a.txt"] == SMALL
