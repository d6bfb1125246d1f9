"""The weights of a model without its users' values, of one file and of several."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_cllm4rec import CLLM4RecForRecommendation
from training.hub.people import without_user_embeddings


@pytest.fixture(params=["one file", "shards"])
def saved(request, make_towers, tmp_path):
    """A model on disk, in one file or in many."""
    model = make_towers().recommender
    sharded = {"max_shard_size": "2KB"} if request.param == "shards" else {}
    model.save_pretrained(tmp_path / "model", **sharded)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (request.param == "shards")
    return model, tmp_path / "model"


@pytest.fixture
def stripped(saved, tmp_path):
    """The same folder with the files that differ put over it."""
    target = tmp_path / "target"
    target.mkdir()
    files = without_user_embeddings(saved[1], target)
    for name, path in files.items():
        path.replace(saved[1] / name)
    return CLLM4RecForRecommendation.from_pretrained(saved[1]), saved[0], saved[1]


def test_no_value_of_a_user_is_left(stripped, shop):
    model, original, folder = stripped
    values = original.model.user_embeddings.weight.detach().numpy()
    left = b"".join(path.read_bytes() for path in folder.glob("*.safetensors"))
    assert not any(row.tobytes() in left for row in values)
    assert original.model.item_embeddings.weight[0].detach().numpy().tobytes() in left
    assert model.config.num_users == shop.num_users


def test_histories_are_served_as_before(stripped):
    model, original, _ = stripped
    for before, after in zip(
        original.recommend([[0, 3], [5]]).values(), model.recommend([[0, 3], [5]]).values(), strict=True
    ):
        torch.testing.assert_close(after, before)


def test_the_index_of_shards_says_what_is_left(stripped):
    folder = stripped[2]
    if (folder / "model.safetensors.index.json").exists():
        total = sum(
            value.numel() * value.element_size()
            for path in folder.glob("*.safetensors")
            for value in load_file(path).values()
        )
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
