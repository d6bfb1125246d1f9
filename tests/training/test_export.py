"""Vectors whose inner products are the model's logits, written once for readers of safetensors and of Parquet."""

import errno
import hashlib
import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from configuration.errors import InputError
from training import export as script
from training.data.batches import layout_of
from training.data.ragged import Ragged
from training.evaluation import vectors
from training.evaluation.scoring import ModelScores
from training.export import export
from training.run import Run


@pytest.fixture(scope="module")
def exported(store_run, tmp_path_factory):
    """The vectors of the store's run; to be read only."""
    return export(store_run.folder, tmp_path_factory.mktemp("exported") / "vectors", progress=False)


@pytest.fixture
def scores(model, store):
    """The model's scores for the users of the store."""
    return ModelScores(model, *store.histories("recommendation"), layout_of(store), model.config.max_history)


@pytest.fixture
def run(store_copy):
    """The folder of a trained run that a test may change."""
    return Run.of(store_copy).folder


def opened(folder, name):
    return load_file(folder / f"{name}.safetensors")["vectors"]


def test_the_inner_product_of_user_and_item_is_the_models_logit(exported, model, store):
    items, users = opened(exported, "items"), opened(exported, "users")
    assert items.shape == (24, 9)
    assert users.shape == (40, 9)
    histories = [user["history"] for user in store.users()]
    with torch.no_grad():
        logits = model.item_logits(model.query_states(histories, list(range(40))))
    assert logits.std() > 0.1
    torch.testing.assert_close(users @ items.T, logits, rtol=0, atol=1e-5)


def test_the_best_inner_products_are_what_the_model_recommends(exported, model, store):
    items, users = opened(exported, "items"), opened(exported, "users")
    histories = [user["history"] for user in store.users()]
    best = model.recommend(histories, list(range(40)), k=5, exclude_seen=False).items
    assert (users @ items.T).topk(5).indices.equal(best)


@pytest.mark.parametrize("name", ["items", "users"])
def test_parquet_holds_the_same_rows_by_raw_id(exported, store, name):
    table = pq.read_table(exported / f"{name}.parquet")
    rows = getattr(store, name)()
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 9)
    vectors = np.stack(table["vector"].to_numpy())
    np.testing.assert_array_equal(vectors, opened(exported, name).numpy())


def test_the_summary_counts_and_names_the_weights(exported, store_run):
    weights = (store_run.folder / "model" / "model.safetensors").read_bytes()
    assert json.loads((exported / "vectors.json").read_text()) == {
        "width": 9,
        "items": 24,
        "users": 40,
        "metric": "inner product",
        "use": "the inner product of a user's and an item's vector is the logit that the model gives the item",
        "weights": {"model.safetensors": hashlib.sha256(weights).hexdigest()},
    }
    assert sorted(path.name for path in exported.iterdir()) == [
        "items.parquet", "items.safetensors", "users.parquet", "users.safetensors", "vectors.json",
    ]  # fmt: skip


def test_blocks_and_batches_change_nothing(model, scores, monkeypatch):
    whole_items = np.concatenate(list(vectors.item_vectors(model)))
    (whole_users,) = vectors.user_vectors(scores, 40, progress=False)
    monkeypatch.setattr(vectors, "USERS_AT_ONCE", 9)
    monkeypatch.setattr(vectors, "ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(np.concatenate(list(vectors.item_vectors(model))), whole_items)
    blocks = list(vectors.user_vectors(scores, 4, progress=False))
    assert [len(block) for block in blocks] == [9, 9, 9, 9, 4]
    np.testing.assert_allclose(np.concatenate(blocks), whole_users, rtol=0, atol=1e-5)


def test_a_batch_holds_prompts_of_like_length_and_rows_stay_in_the_users_order(model, store, monkeypatch):
    seen = []

    def states(_, users):
        seen.append(users.tolist())
        return torch.from_numpy(users).float().unsqueeze(-1).expand(-1, 8)

    monkeypatch.setattr(ModelScores, "states", states)
    users, histories = np.array([0, 2, 3], np.int32), Ragged.from_lists([[1, 2, 3], [4, 5, 6], [7]])
    layout = replace(layout_of(store), num_users=4)  # the second has no training items
    (block,) = vectors.user_vectors(ModelScores(model, users, histories, layout, 9), 2, progress=False)
    assert seen == [[1, 3], [0, 2]]
    assert block[:, 0].tolist() == [0, 1, 2, 3]
    assert block[:, -1].tolist() == [1, 1, 1, 1]


def test_a_user_without_training_items_has_the_vector_of_a_prompt_without_items(model, store):
    users, histories = np.array([1, 3], np.int32), Ragged.from_lists([[5, 6], [7]])
    scores = ModelScores(model, users, histories, layout_of(store), model.config.max_history)
    (block,) = vectors.user_vectors(scores, 16, progress=False)
    assert len(block) == 40
    with torch.no_grad():
        logits = model.item_logits(model.query_states([[], [5, 6], [], [7]], [0, 1, 2, 3])).numpy()
    items = np.concatenate(list(vectors.item_vectors(model)))
    np.testing.assert_allclose(block[:4] @ items.T, logits, rtol=0, atol=1e-5)


def test_a_model_without_item_bias_has_a_zero_there(make_towers):
    model = make_towers(item_bias=False).heads["recommendation"]
    (items,) = vectors.item_vectors(model)
    assert items.shape == (12, 9)
    assert not items[:, -1].any()


def test_the_runs_own_folder_is_the_place_and_is_not_replaced_unasked(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", str(run)])
    script.main()
    assert capsys.readouterr().out == f"{run / 'vectors'}\n"
    (run / "vectors" / "items.parquet").write_text("old")
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert capsys.readouterr().err == (
        f"error: {run / 'vectors'} exists already; replace it with --overwrite, or choose another folder with --out\n"
    )
    assert (run / "vectors" / "items.parquet").read_text() == "old"
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--overwrite"])
    script.main()
    assert len(pq.read_table(run / "vectors" / "items.parquet")) == 24


def test_a_folder_of_something_else_is_never_replaced(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"mine exists already and holds no vectors\.json; choose another folder"):
        export(run, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_run_without_a_model_is_told_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"model: no trained model is there; run training/pretrain\.py and"):
        export(tmp_path)


@pytest.mark.parametrize("file", ["model/items.jsonl", "corpora/users.jsonl"])
def test_corpora_that_are_not_the_models_are_refused(run, file):
    lines = (run / file).read_text().splitlines()
    (run / file).write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(
        InputError, match=r"model was not trained on .*corpora, or .*run training/finetune\.py --overwrite"
    ):
        export(run)
    assert not (run / "vectors").exists()


def test_a_full_disk_leaves_what_was_there(run, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    export(run, progress=False)
    before = {path.name: path.read_bytes() for path in (run / "vectors").iterdir()}
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(InputError, match="vectors: the disk is full"):
        export(run, overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in (run / "vectors").iterdir()} == before
    assert not list(run.glob(".vectors-*"))
