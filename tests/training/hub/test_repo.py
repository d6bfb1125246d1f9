"""A repo looked at, compared and committed to, with the real client on the Hub of the suite."""

import hashlib

import pytest
from huggingface_hub import HfApi, whoami
from huggingface_hub.errors import HfHubHTTPError

from configuration.errors import InputError
from training.hub.repo import Change, Repo, check_ours, commit, compare, create, hub_errors, look_at

SMALL, LARGE = b"a recipe\n", b"weights" * 100


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def pushed(api):
    """A repo with a small and a large file."""
    files = {"recipe.yaml": SMALL, "model.safetensors": LARGE}
    repo = create(api, look_at(api, "me/repo", "model"), private=False)
    head = commit(api, repo, files, compare(repo, files), "first")
    return files, head


def states(changes):
    return {change.path: change.state for change in changes}


def test_a_repo_that_is_not_there_has_no_head(api):
    assert look_at(api, "me/none", "model") == Repo("me/none", "model", "main")


def test_files_of_a_repo_are_known_by_their_hashes(api, pushed):
    repo = look_at(api, "me/repo", "model")
    assert (repo.exists, repo.head, repo.has_branch, repo.private) == (True, pushed[1], True, False)
    assert repo.files["model.safetensors"] == "sha256:" + hashlib.sha256(LARGE).hexdigest()
    assert repo.files["recipe.yaml"] == "git:" + hashlib.sha1(b"blob 9\0" + SMALL).hexdigest()


def test_what_differs_is_told_from_what_does_not(api, pushed, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(LARGE)
    files = {"model.safetensors": tmp_path / "model.safetensors", "recipe.yaml": b"another", "items.jsonl": b"{}"}
    repo = look_at(api, "me/repo", "model")
    assert compare(repo, files, ["*.yaml"]) == [
        Change("items.jsonl", 2, "new"),
        Change("model.safetensors", 700, "unchanged"),
        Change("recipe.yaml", 7, "changed"),
    ]


def test_only_owned_files_that_are_left_over_go(api, pushed):
    repo = look_at(api, "me/repo", "model")
    assert states(compare(repo, {}, ["*.safetensors"])) == {"model.safetensors": "deleted"}


def test_a_commit_holds_additions_changes_and_deletions(api, hub, pushed):
    repo = look_at(api, "me/repo", "model")
    files = {"recipe.yaml": b"another\n", "items.jsonl": b"{}\n"}
    head = commit(api, repo, files, compare(repo, files, ["*.safetensors"]), "second")
    there = hub.repo("me/repo")
    assert {name: there[name] for name in there if name != ".gitattributes"} == files
    assert hub.commits("me/repo")[0].oid == head
    assert hub.commits("me/repo")[0].parent == pushed[1]


def test_a_branch_that_is_not_there_starts_from_main(api, hub, pushed):
    repo = look_at(api, "me/repo", "model", "trial")
    assert (repo.has_branch, repo.head) == (False, pushed[1])
    repo = create(api, repo, private=False)
    commit(api, repo, {"new": b"1"}, compare(repo, {"new": b"1"}), "on a branch")
    assert "new" in hub.repo("me/repo", revision="trial")
    assert "new" not in hub.repo("me/repo")


def test_a_branch_that_moved_is_left_alone(api, hub, pushed):
    repo = look_at(api, "me/repo", "model")
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs", repo_id="me/repo")
    with pytest.raises(InputError, match="me/repo: the branch moved while this was being sent"):
        commit(api, repo, {"recipe.yaml": b"ours"}, compare(repo, {"recipe.yaml": b"ours"}), "late")
    assert hub.repo("me/repo")["recipe.yaml"] == SMALL
    assert hub.repo("me/repo")["theirs"] == b"theirs"


def test_a_commit_whose_answer_was_lost_counts(api, hub, pushed):
    repo = look_at(api, "me/repo", "model")
    hub.fail_at(1, "lose", path="/commit/")
    head = commit(api, repo, {"recipe.yaml": b"ours"}, compare(repo, {"recipe.yaml": b"ours"}), "once")
    assert hub.repo("me/repo")["recipe.yaml"] == b"ours"
    assert [each.title for each in hub.commits("me/repo")][:2] == ["once", "first"]
    assert head == hub.commits("me/repo")[0].oid


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_every_kind_of_repo_is_made_private_where_asked(api, hub, kind):
    repo = create(api, look_at(api, "me/secret", kind), private=True, sdk="gradio" if kind == "space" else None)
    assert repo.private is True
    assert look_at(api, "me/secret", kind).private is True


def test_a_name_that_only_others_see_is_taken(api, hub, monkeypatch):
    api.create_repo("me/secret", private=True)
    there = look_at(api, "me/other", "model")
    with pytest.raises(InputError, match="me/secret: the name is taken"):
        create(api, Repo("me/secret", there.kind, there.branch), private=False)


def test_what_somebody_else_made_is_not_written_over():
    theirs = Repo("me/bert", "model", "main", True, "0" * 40, True, False, {"README.md": "", "bert.bin": ""})
    with pytest.raises(InputError, match=r"me/bert holds something else already \(bert.bin …\); choose another name"):
        check_ours(theirs, "modeling_cllm4rec.py")


@pytest.mark.parametrize(
    "files", [{}, {"README.md": "", ".gitattributes": "", "LICENSE.txt": ""}, {"mine": "", "x": ""}]
)
def test_an_empty_repo_and_one_of_ours_are_written_to(files):
    check_ours(Repo("me/repo", "model", "main", True, "0" * 40, True, False, files), "mine")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, "this token may not write there"),
        (404, "there is no such repo, branch or tag"),
        (413, r"the Hub refuses it \(413"),
        (429, "asks for patience"),
        (507, r"has trouble of its own \(507.*me/repo is as it was"),
    ],
)
def test_every_answer_of_the_hub_is_a_sentence(api, hub, pushed, status, sentence):
    repo = look_at(api, "me/repo", "model")
    hub.fail_at(1, status, path="/commit/", times=9)
    with pytest.raises(InputError, match=sentence):
        commit(api, repo, {"recipe.yaml": b"ours"}, compare(repo, {"recipe.yaml": b"ours"}), "broken")
    assert hub.repo("me/repo")["recipe.yaml"] == SMALL


def test_a_token_that_nobody_knows_is_a_sentence(api, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(InputError, match="does not know this token"), hub_errors(api, "me/repo"):
        whoami()


def test_no_token_is_a_sentence(api, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"not logged in .* run `hf auth login`"), hub_errors(api, "me/repo"):
        whoami()


def test_no_network_is_a_sentence(api, hub):
    with (
        hub.gone(),
        pytest.raises(InputError, match=r"no connection to .* run the command again once the network is there"),
    ):
        look_at(api, "me/repo", "model")


def test_a_name_that_is_none_is_a_sentence(api):
    with pytest.raises(InputError, match="'me/a b' is no name of a repo; give namespace/name"):
        look_at(api, "me/a b", "model")


def test_a_full_disk_is_a_sentence(api):
    with pytest.raises(InputError, match="the disk is full; me/repo and the folder here are as they were"):  # noqa: SIM117
        with hub_errors(api, "me/repo"):
            raise OSError(28, "No space left on device")


def test_what_is_no_trouble_of_the_hub_stays_an_error_of_its_own(api):
    with pytest.raises(ValueError, match="a bug"), hub_errors(api, "me/repo"):
        raise ValueError("a bug")


def test_an_interruption_is_none_of_the_hubs_errors():
    assert not issubclass(KeyboardInterrupt, HfHubHTTPError.__mro__[1])
