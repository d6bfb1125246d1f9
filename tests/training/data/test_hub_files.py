import math

import pytest
from huggingface_hub import HfApi, constants

from configuration.errors import InputError
from configuration.recipe import Data, SideTable
from training.data.hub_files import fetch
from training.data.readers import read_tables


@pytest.fixture
def shelf(hub):
    """A dataset repo with a table in a folder, an earlier one on the branch v1, and a model repo with a file."""
    api = HfApi()
    for kind, name in (("dataset", "me/data"), ("model", "me/model")):
        api.create_repo(name, repo_type=kind)
    upload = {"repo_id": "me/data", "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=b"user,item\na,1\n", path_in_repo="tables/pairs.csv", **upload)
    api.create_branch("me/data", branch="v1", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"user,item\na,1\nb,2\n", path_in_repo="tables/pairs.csv", **upload)
    api.upload_file(path_or_fileobj=b"id,name\n1,one\n2,two\n", path_in_repo="items.csv", **upload)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="items.jsonl", repo_id="me/model")
    return hub


def items_of(path, **fields):
    return read_tables(Data(path=path, **fields)).interactions["item"].tolist()


def test_a_file_of_a_dataset_repo_is_read_at_main_a_branch_or_a_commit(shelf):
    first = shelf.commits("me/data", "dataset", "v1")[0].oid
    assert items_of("hf://datasets/me/data/tables/pairs.csv") == [1, 2]
    assert items_of("hf://datasets/me/data@v1/tables/pairs.csv") == [1]
    assert items_of(f"hf://datasets/me/data@{first}/tables/pairs.csv") == [1]


def test_without_a_kind_the_repo_is_a_models(shelf):
    assert fetch("hf://me/model/items.jsonl", "data.path").read_bytes() == b"{}"
    assert fetch("hf://models/me/model@main/items.jsonl", "data.path").read_bytes() == b"{}"


def test_side_tables_and_splits_may_lie_on_the_hub_and_are_hashed_by_name(shelf):
    HfApi().upload_file(
        path_or_fileobj=b"user,item,split\na,1,train\nb,2,test\n", path_in_repo="split.csv", repo_id="me/data",
        repo_type="dataset",
    )  # fmt: skip
    base = "hf://datasets/me/data"
    items = SideTable(f"{base}/items.csv", title_column="name")
    raw = read_tables(Data(path=f"{base}/tables/pairs.csv", items=items, split="given", split_path=f"{base}/split.csv"))
    assert raw.items["title"].tolist() == ["one", "two"]
    assert raw.interactions["split"].tolist() == ["train", "test"]
    assert set(raw.source) == {"pairs.csv", "items.csv", "split.csv"}


def test_a_dataset_repo_is_opened_at_main_or_a_revision(shelf):
    assert items_of("me/data@v1", format="dataset") == [1]
    with pytest.raises(InputError, match="me/data@v2: the dataset cannot be opened"):
        items_of("me/data@v2", format="dataset")
    with pytest.raises(InputError, match=r"me/nothing: the dataset cannot be opened .*run `hf auth login` where"):
        items_of("hf://datasets/me/nothing", format="dataset")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("hf://datasets/me/nothing/t.csv", "the Hub shows no dataset me/nothing to this login; correct data.path, or run "
         "`hf auth login` where the repo is private"),
        ("hf://datasets/me/data@v9/t.csv", "me/data has no branch, tag or commit v9; correct data.path"),
        ("hf://datasets/me/data/t.csv", "me/data at main has no file t.csv; correct data.path"),
        ("hf://datasets/me/data", "this is no file of a Hub repo; write hf://datasets/namespace/name/file in data.path"),
        ("hf://datasets/me/da ta/t.csv", "'me/da ta' is no name of a repo; correct data.path"),
        ("hf://me/data/t.csv", "the Hub shows no model me/data to this login"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_with_the_remedy(shelf, path, sentence):
    with pytest.raises(InputError) as caught:
        items_of(path)
    assert str(caught.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(caught.value)


def test_a_fault_of_the_hub_is_a_sentence(shelf):
    shelf.fail_at(1, 500, path="resolve", times=math.inf)
    with pytest.raises(
        InputError, match=r"not in the cache, and http://.* does not give it \(Server error '500 [^\n]*\); run"
    ):
        items_of("hf://datasets/me/data/tables/pairs.csv")


def test_a_broken_connection_is_a_sentence(shelf):
    shelf.fail_at(1, "drop", path="resolve", times=math.inf)
    with pytest.raises(
        InputError, match=r"pairs\.csv: cannot be fetched \(Server disconnected .*run the command again once"
    ):
        items_of("hf://datasets/me/data/tables/pairs.csv")


@pytest.mark.parametrize(
    ("closed", "sentence"),
    [
        ("gated", "the dataset other/data is gated; ask for access on its page, and run `hf auth login`"),
        ("private", "the Hub shows no dataset other/data to this login"),
    ],
)
def test_a_repo_that_is_closed_to_this_login_is_named(hub, closed, sentence):
    api = HfApi(token="hf_other")
    api.create_repo("other/data", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"user,item\n", path_in_repo="t.csv", repo_id="other/data", repo_type="dataset")
    setattr(hub.repos["dataset", "other/data"], closed, True)
    with pytest.raises(InputError, match=sentence):
        items_of("hf://datasets/other/data/t.csv")


def test_without_a_network_a_file_comes_from_the_cache_or_the_error_says_so(shelf):
    path = "hf://datasets/me/data/tables/pairs.csv"
    assert items_of(path) == [1, 2]
    with shelf.gone():
        assert items_of(path) == [1, 2]
        with pytest.raises(
            InputError, match=r"items\.csv: the file is not in the cache, and http://.* does not give it"
        ):
            items_of("hf://datasets/me/data/items.csv")


def test_offline_a_file_that_is_not_in_the_cache_is_a_sentence(shelf, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="run the command again with a network and without HF_HUB_OFFLINE"):
        items_of("hf://datasets/me/data/tables/pairs.csv")
