"""FSDP2 over two processes on the CPU against one process: `fully_shard` as Accelerate calls it for `fsdp2.yaml` on GPUs.

`accelerate launch` refuses FSDP on the CPU, so the processes start as for DDP and take the type FSDP in `watched.py`.
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed import checkpoint
from what_was_seen import epochs, losses, seen

from modeling_cllm4rec import CLLM4RecForContentLM, CLLM4RecForRecommendation

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is")]

PROJECT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/two_cpu_processes.yaml"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
LAYERS = ["base.backbone.h.0", "base.backbone.h.1"]
# 29 people for validation are two batches for one process and one for the other; fine-tuning's last step has one document.
EVALUATION = {"selection_users": 29, "batch_size": 14}


@pytest.fixture(scope="module")
def watch(in_process, python):
    """Run stages in one process, or a stage in two that share the weights; the recipe's folder gets what each saw.

    Sharded gradients are dense, so the one process steps whole tables as well.
    """

    def watch(folder, stages, *words, sharded):
        script = ["tests/slow/watched.py", folder, stages]
        words = ["--config", folder / "shop.yaml", *words]
        if not sharded:
            return in_process(python, *script, "--dense", *words, **ONE_THREAD)
        return in_process(python, *LAUNCH, *script, "--fully-shard", *words, **ONE_THREAD, ACCELERATE_USE_CPU="true")

    return watch


@pytest.fixture(scope="module")
def write_recipe(tmp_path_factory, write_shop):
    """Write the shop's recipe with two layers of which something learns; its folder."""

    def write_recipe(train):
        folder = tmp_path_factory.mktemp(train)
        path = write_shop(folder, finetune={"batch_size": 29, "epochs": 3}, evaluation=EVALUATION)
        recipe = yaml.safe_load(path.read_text())
        recipe["backbone"]["train"] = train
        recipe["backbone"]["config"]["n_layer"] = 2
        path.write_text(yaml.safe_dump(recipe))
        return folder

    return write_recipe


@pytest.fixture(scope="module")
def runs(write_recipe, watch):
    """Folders in which one process and two that share the weights have trained all of the model."""
    whole, sharded = write_recipe("full"), write_recipe("full")
    watch(whole, "pretrain,finetune", sharded=False)
    for stage in ("pretrain", "finetune"):
        watch(sharded, stage, sharded=True)
    return whole, sharded


def weights(folder, *path):
    return load_file(folder.joinpath("runs/shop", *path, "model.safetensors"))


def assert_near(ours, theirs, bound=1e-5):
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < bound


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_each_process_holds_half_of_the_id_tables_and_of_the_backbone(runs, stage):
    halves = [seen(runs[1], stage, rank)["parameters"] for rank in (0, 1)]
    assert halves[0].keys() == seen(runs[0], stage)["parameters"].keys()
    assert {"base.item_embeddings.weight", "base.content_user_embeddings.weight", "base.backbone.wte.weight"} < set(
        halves[0]
    )
    for name, (kind, whole, here) in halves[0].items():
        there = halves[1][name][2]
        assert kind == "DTensor"
        assert (here[0] + there[0], *here[1:]) == tuple(whole)
        assert here[0] - there[0] <= 2


def test_no_head_keeps_a_whole_table(runs):
    heads, parameters = (seen(runs[1], "pretrain")[name] for name in ("heads", "parameters"))
    assert heads["content"] == parameters["base.backbone.wte.weight"]
    assert heads["collaborative"] == heads["recommendation"] == parameters["base.item_embeddings.weight"]


def test_the_layers_are_gathered_one_by_one(runs):
    assert seen(runs[1], "pretrain")["wrapped"] == ["", *LAYERS]


@pytest.mark.parametrize(("stage", "steps"), [("pretrain", 62), ("finetune", 6)])
def test_the_loss_of_every_step_is_that_of_one_process(runs, stage, steps):
    whole, sharded = (losses(folder, stage) for folder in runs)
    assert len(whole) == steps
    assert sharded == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_figures_of_each_epoch_are_those_of_one_process(runs, stage):
    whole, sharded = (epochs(folder, stage) for folder in runs)
    assert sharded == [pytest.approx(record, abs=1e-5) for record in whole]


def test_the_sharded_checkpoint_loads_whole_and_is_what_was_trained(runs):
    trained = weights(runs[1], "checkpoints", "pretrain", "final")
    loaded = {name.replace("model.", "base.", 1): torch.zeros_like(value) for name, value in trained.items()}
    reader = checkpoint.FileSystemReader(runs[1] / "runs/shop/checkpoints/pretrain/last/pytorch_model_fsdp_0")

    checkpoint.load({"model": loaded}, storage_reader=reader)

    assert len(reader.read_metadata().storage_data) > len(loaded)  # in parts
    assert all(loaded[name.replace("model.", "base.", 1)].equal(value) for name, value in trained.items())


def test_the_weights_are_those_of_one_process_and_open_in_every_head(runs):
    whole, sharded = (weights(folder, "model") for folder in runs)
    assert_near(sharded, whole)
    folder = runs[1] / "runs" / "shop" / "model"
    recommender = CLLM4RecForRecommendation.from_pretrained(folder)
    assert recommender.item_head.weight.equal(sharded["model.item_embeddings.weight"])
    assert CLLM4RecForContentLM.from_pretrained(folder).lm_head.weight.equal(sharded["model.backbone.wte.weight"])


def test_a_run_that_broke_off_is_resumed_to_the_same_losses(runs, tmp_path, watch):
    shutil.copy(runs[1] / "shop.yaml", tmp_path)
    shutil.copytree(runs[1] / "pretrain-broken-off", tmp_path / "runs" / "shop")

    shown = watch(tmp_path, "pretrain", "--resume", f"output_dir={tmp_path / 'runs'}", sharded=True)

    assert "resumed after epoch 1" in shown
    assert losses(tmp_path, "pretrain") == pytest.approx(losses(runs[0], "pretrain")[31:], abs=1e-5)


def test_low_rank_updates_are_merged_into_a_frozen_backbone(write_recipe, watch):
    whole, sharded = write_recipe("lora"), write_recipe("lora")
    for folder in (whole, sharded):
        watch(folder, "pretrain", "pretrain.epochs=1", sharded=folder is sharded)

    assert seen(sharded, "pretrain")["wrapped"][1:] == [
        "base.backbone.base_model.model.h.0",
        "base.backbone.base_model.model.h.1",
    ]
    assert losses(sharded, "pretrain") == pytest.approx(losses(whole, "pretrain"), abs=1e-5)
    assert_near(*(weights(folder, "checkpoints", "pretrain", "final") for folder in (sharded, whole)))
