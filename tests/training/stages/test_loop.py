import contextlib
import errno
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from configuration.errors import InputError
from configuration.recipe import Method, Stage
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.data.batches import plan_epoch
from training.stages import loop
from training.stages.collaborative import collaborative_objective
from training.stages.content import content_objective
from training.stages.loop import Objective, epochs_of, load_checkpoint, lr_share, parameter_groups, train
from training.stages.optimiser import RowwiseAdamW
from training.stages.recommendation import recommendation_objective
from training.stages.towers import Towers

METHOD = Method(lambda_v=0.1, max_history=8)
STAGE = Stage(epochs=3, batch_size=4, lr=1e-2, warmup_epochs=1.0)
SEED = 11
TIMES = ("seconds", "documents_per_second")


@pytest.fixture
def pretraining(shop, layout):
    content = content_objective(shop, METHOD)
    content = replace(content, lengths=content.lengths[:13])  # the first texts are enough
    return [content, collaborative_objective(shop, METHOD, layout, SEED, regularise=True)]


@pytest.fixture
def fine_tuning(shop, layout):
    return [recommendation_objective(shop, METHOD, layout, SEED, regularise=True, teacher=None)]


@pytest.fixture
def run(make_towers, make_accelerator, pretraining, tmp_path):
    """Train anew; what the run is to differ in is named."""

    def run(
        towers=None, objectives=None, stage=None, folder="run", fingerprint="f", validate=None, resume=False, **fields
    ):
        towers, stage = towers or make_towers(**fields), replace(STAGE, **(stage or {}))
        progress = train(
            towers,
            pretraining if objectives is None else objectives,
            stage,
            make_accelerator(stage.mixed_precision),
            seed=SEED,
            folder=tmp_path / folder,
            fingerprint=fingerprint,
            validate=validate or (lambda: {"ndcg_at_100": 0.5}),
            resume=resume,
        )
        return towers, progress

    return run


def scripted(values, towers=None, kept=None):
    """A validation that gives the values in turn; of an exception it raises, of the towers it keeps a copy."""
    turn = iter(values)

    def validate():
        value = next(turn)
        if isinstance(value, BaseException):
            raise value
        if towers is not None:
            kept.append({name: tensor.clone() for name, tensor in towers.state_dict().items()})
        return {"ndcg_at_100": value}

    return validate


def assert_same_weights(towers, others, atol=0.0):
    for name, value in towers.state_dict().items():
        torch.testing.assert_close(
            value, others.state_dict()[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def without_times(progress):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in progress.epochs]


@pytest.mark.parametrize("kind", ["pretraining", "fine_tuning"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_change_nothing_even_where_a_step_is_smaller_than_their_number(run, make_towers, request, kind, parts):
    objectives = request.getfixturevalue(kind)
    # In double precision, since Adam makes a step of the rounding errors of a gradient that is zero (of a key's bias, say).
    # 13 texts and 6 users in steps of 4: the last ones are smaller than 3 parts.
    whole, progress = run(make_towers().double(), objectives, {"epochs": 2}, "whole")
    split, same = run(make_towers().double(), objectives, {"epochs": 2, "gradient_accumulation_steps": parts}, "parts")
    assert_same_weights(whole, split, atol=1e-6)
    for record, other in zip(without_times(progress), without_times(same), strict=True):
        assert record == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("kind", ["pretraining", "fine_tuning"])
def test_rows_that_are_added_in_place_give_the_weights_that_autograd_gives(
    run, make_towers, request, monkeypatch, kind
):
    objectives = request.getfixturevalue(kind)
    ours, progress = run(make_towers().double(), objectives, {"epochs": 2}, "ours")
    monkeypatch.setattr(loop, "looked_up_rows", lambda *given: contextlib.nullcontext(lambda: None))
    autograds, same = run(make_towers().double(), objectives, {"epochs": 2}, "autograds")
    assert_same_weights(ours, autograds, atol=1e-6)
    for record, other in zip(without_times(progress), without_times(same), strict=True):
        assert record == pytest.approx(other, rel=1e-5)


def test_the_loss_of_a_step_is_the_likelihood_per_label_and_the_pull_per_document(run, make_towers, pretraining):
    collaborative = pretraining[1]
    stage = {"epochs": 1, "batch_size": 6, "lr": 1e-9, "max_grad_norm": 0.0}
    _, progress = run(objectives=[collaborative], stage=stage)
    towers = make_towers().eval()
    users, items = torch.arange(6), torch.arange(10)  # whom and what the histories hold
    losses = towers("collaborative", collaborative.collate(np.arange(6), 0), (users, items))
    expected = losses["likelihood"] / 30 + losses["regularisation"] / 6
    assert progress.epochs[0]["collaborative_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_with_a_teacher_the_loss_mixes_likelihood_and_distillation(run, make_towers, fine_tuning):
    (objective,) = fine_tuning
    teacher = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    distilling = replace(
        objective,
        collate=lambda documents, *rest: objective.collate(documents, *rest) | {"teacher_logits": teacher[documents]},
        regularised=None,
    )
    stage = {"epochs": 1, "batch_size": 6, "lr": 1e-9}
    _, progress = run(objectives=[distilling], stage=stage, distillation=0.25)
    batch = distilling.collate(np.arange(6), 0, 0)
    losses = make_towers().eval()("recommendation", batch, None)
    expected = 0.75 * losses["likelihood"] / batch["target_weights"].sum() + 0.25 * losses["distilled"] / 6
    assert progress.epochs[0]["recommendation_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_training_lowers_every_loss(run, fine_tuning, pretraining):
    _, progress = run(objectives=[*pretraining, *fine_tuning], stage={"epochs": 8})
    for name in ("content_loss", "collaborative_loss", "recommendation_loss"):
        assert progress.epochs[-1][name] < 0.9 * progress.epochs[0][name]


def test_what_is_frozen_stays_as_it_was(run, make_towers, fine_tuning):
    before = make_towers(train_backbone=False)
    towers = make_towers(train_backbone=False)
    for table in towers.base.tables("content"):
        table.requires_grad_(False)
    run(towers, objectives=fine_tuning)
    changed = {name for name, value in towers.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {"base.user_embeddings.weight", "base.item_embeddings.weight", "base.item_bias"}


def test_dropout_is_on_in_training_and_off_in_validation_and_its_numbers_depend_on_the_epoch_alone(
    run, make_towers, fine_tuning
):
    seen = []

    def validate():
        seen.append([head.training for head in towers.heads.values()])
        torch.rand(5)
        return {"ndcg_at_100": 0.5}

    towers = make_towers(dropout=0.2)
    run(towers, fine_tuning, validate=validate)
    assert seen == [[False] * 3] * 3
    same, _ = run(objectives=fine_tuning, folder="same", dropout=0.2)
    assert_same_weights(towers, same)
    without, _ = run(objectives=fine_tuning, folder="without", dropout=0.0)
    assert not torch.allclose(towers.base.item_embeddings.weight, without.base.item_embeddings.weight, atol=1e-4)


@pytest.mark.parametrize("where", ["in validation", "within an epoch"])
def test_a_resumed_run_ends_with_the_numbers_of_the_uninterrupted_one(run, pretraining, where):
    values = [0.1, 0.3, 0.2, 0.4]
    whole, progress = run(stage={"epochs": 4}, folder="whole", dropout=0.2, validate=scripted(values))
    if where == "in validation":
        with pytest.raises(KeyboardInterrupt):
            run(stage={"epochs": 4}, dropout=0.2, validate=scripted([*values[:2], KeyboardInterrupt()]))
    else:

        def interrupted(documents, epoch, step):
            if epoch == 2:
                raise KeyboardInterrupt
            return pretraining[1].collate(documents, epoch, step)

        objectives = [pretraining[0], replace(pretraining[1], collate=interrupted)]
        with pytest.raises(KeyboardInterrupt):
            run(objectives=objectives, stage={"epochs": 4}, dropout=0.2, validate=scripted(values))
    torch.rand(7)  # a resumed process does not find the random state of the interrupted one
    resumed, same = run(stage={"epochs": 4}, dropout=0.2, validate=scripted(values[2:]), resume=True)
    assert_same_weights(whole, resumed)
    assert without_times(same) == without_times(progress)
    assert (same.step, same.best_epoch) == (progress.step, progress.best_epoch)


def test_resuming_a_finished_run_trains_no_more(run, make_towers):
    towers, progress = run()
    same, again = run(make_towers(), resume=True, validate=scripted([]))
    assert_same_weights(towers, same)
    assert again == progress


def test_resuming_where_nothing_was_saved_starts_at_the_beginning(run):
    whole, _ = run(folder="whole")
    resumed, progress = run(resume=True)
    assert_same_weights(whole, resumed)
    assert progress.epoch == 3


def test_a_checkpoint_of_another_recipe_is_refused(run, make_towers):
    run(stage={"epochs": 1})
    untouched = make_towers()
    with pytest.raises(InputError, match=r"last: this checkpoint belongs to another data set, backbone or recipe"):
        run(untouched, fingerprint="another", resume=True)
    assert_same_weights(untouched, make_towers())


@pytest.mark.parametrize(("written", "launched"), [("under FSDP2", False), ("without FSDP2", True)])
def test_a_checkpoint_of_processes_that_share_the_weights_otherwise_is_refused(run, tmp_path, written, launched):
    run(stage={"epochs": 1})
    if not launched:  # what FSDP2 writes has its shards in a folder
        (tmp_path / "run" / "last" / "model.safetensors").rename(tmp_path / "run" / "last" / "shard")
    with pytest.raises(InputError, match=rf"was written {written} and cannot be resumed .*; launch as before"):
        load_checkpoint(SimpleNamespace(is_fsdp2=launched), tmp_path / "run", "f")


def test_training_stops_after_epochs_without_gain_and_keeps_the_best(run, make_towers, tmp_path):
    towers, weights = make_towers(), []
    validate = scripted([0.1, 0.3, 0.3, 0.2, 0.9], towers, weights)
    _, progress = run(towers, stage={"epochs": 9, "patience": 2}, validate=validate)
    assert (progress.epoch, progress.best_epoch, progress.best_ndcg_at_100) == (4, 2, 0.3)
    best = CLLM4RecForRecommendation.from_pretrained(tmp_path / "run" / "best")
    for name, value in best.model.state_dict().items():
        assert torch.equal(value, weights[1]["base." + name])
    assert not torch.equal(best.model.item_embeddings.weight, towers.base.item_embeddings.weight)


def test_without_patience_every_epoch_is_trained(run):
    assert run(stage={"epochs": 4, "patience": 0}, validate=scripted([0.4, 0.3, 0.2, 0.1]))[1].epoch == 4


def test_progress_is_kept_as_json_with_a_record_per_epoch(run, tmp_path):
    _, progress = run(stage={"epochs": 2}, validate=scripted([0.0, 0.2]))
    kept = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert kept == json.loads((tmp_path / "run" / "last" / "progress.json").read_text())
    assert (kept["fingerprint"], kept["epoch"], kept["best_epoch"]) == ("f", 2, 2)
    assert kept["epochs"] == progress.epochs
    assert [record["epoch"] for record in kept["epochs"]] == [1, 2]
    assert {"content_loss", "collaborative_loss", "ndcg_at_100", "lr", *TIMES} <= kept["epochs"][0].keys()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best", "last", "progress.json"]


@pytest.mark.parametrize("what", ["best", "last"])
def test_a_disk_that_fills_while_saving_leaves_the_epoch_before_to_resume_from(run, tmp_path, monkeypatch, what):
    values = [0.1, 0.3, 0.2]
    whole, progress = run(folder="whole", validate=scripted(values))
    with monkeypatch.context() as patch:
        fill_disk(patch, what)
        with pytest.raises(InputError, match=f"{what}: the disk is full"):
            run(validate=scripted(values))
    assert json.loads((tmp_path / "run" / "last" / "progress.json").read_text())["epoch"] == 1
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    resumed, same = run(validate=scripted(values[1:]), resume=True)
    assert_same_weights(whole, resumed)
    assert without_times(same) == without_times(progress)
    best, wanted = (CLLM4RecForRecommendation.from_pretrained(tmp_path / name / "best") for name in ("run", "whole"))
    assert torch.equal(best.model.item_embeddings.weight, wanted.model.item_embeddings.weight)


def fill_disk(patch, what):
    """Let the second writing of `best` or of `last` fail."""
    owner, name = (Towers, "save_model") if what == "best" else (torch, "save")
    write, calls = getattr(owner, name), []

    def fail(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == 2 if what == "best" else (len(calls) > 1 and "optimizer" in str(args[1])):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    patch.setattr(owner, name, fail)


def test_recomputed_activations_give_the_same_weights(run):
    plain, _ = run(stage={"epochs": 1}, folder="plain", dropout=0.2)
    saving, _ = run(stage={"epochs": 1, "gradient_checkpointing": True}, dropout=0.2)
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.base.backbone.modules())
    assert_same_weights(plain, saving, atol=1e-6)


def test_half_precision_gives_nearly_the_same_losses(run, fine_tuning):
    exact, rough = (
        run(objectives=fine_tuning, stage={"mixed_precision": precision}, folder=precision)[1]
        for precision in ("no", "bf16")
    )
    for record, other in zip(exact.epochs, rough.epochs, strict=True):
        assert record["recommendation_loss"] == pytest.approx(other["recommendation_loss"], rel=0.02)
        assert record["recommendation_loss"] != other["recommendation_loss"]


def test_gradients_are_clipped_to_the_norm(run, pretraining, monkeypatch):
    norms = []
    step = RowwiseAdamW.step

    def watch(self, *args, **kwargs):
        norms.append(
            sum((p.grad**2).sum() for group in self.param_groups for p in group["params"] if p.grad is not None)
        )
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RowwiseAdamW, "step", watch)
    for norm in (0.1, 0.0):
        run(objectives=pretraining[1:], stage={"epochs": 1, "max_grad_norm": norm}, folder=str(norm))
    clipped, free = torch.stack(norms).sqrt().reshape(2, -1)
    torch.testing.assert_close(clipped, torch.full_like(clipped, 0.1), rtol=1e-3, atol=0)
    assert (free > 0.2).all()


def test_an_epoch_goes_over_every_document_of_every_objective_once(run, pretraining):
    seen = []

    def watched(objective):
        def collate(documents, epoch, step):
            seen.append((objective.name, epoch, documents.tolist()))
            return objective.collate(documents, epoch, step)

        return replace(objective, collate=collate)

    run(objectives=[watched(objective) for objective in pretraining], stage={"epochs": 2})
    for number, objective in enumerate(pretraining):
        for epoch in range(2):
            found = [documents for name, when, documents in seen if (name, when) == (objective.name, epoch)]
            assert sorted(document for step in found for document in step) == list(range(len(objective.lengths)))
            assert found == [step.tolist() for step in plan_epoch(objective.lengths, 4, SEED + number, epoch)]
    names = [name for name, _, _ in seen]
    assert names == sorted(names[: len(names) // 2], reverse=True) * 2, "content goes first, then collaborative"


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 1 / 11),
        (4, 5 / 11),
        (9, 10 / 11),
        (10, 1.0),
        (25, 0.525),
        (17.5, 0.05 + 0.95 * 0.8535534),
        (40, 0.05),
        (99, 0.05),
    ],
)
def test_the_learning_rate_warms_up_and_follows_a_cosine_to_a_twentieth(step, share):
    stage = Stage(epochs=4, warmup_epochs=1.0, schedule="cosine")
    assert lr_share(step, steps_per_epoch=10, stage=stage) == pytest.approx(share)


@pytest.mark.parametrize(
    ("warmup_epochs", "step", "share"), [(0.0, 0, 1.0), (0.5, 0, 1 / 6), (0.5, 5, 1.0), (1, 39, 1.0)]
)
def test_the_constant_learning_rate_stays_at_its_peak(warmup_epochs, step, share):
    stage = Stage(epochs=4, warmup_epochs=warmup_epochs, schedule="constant")
    assert lr_share(step, 10, stage) == pytest.approx(share)


def test_the_learning_rate_of_a_run_is_that_of_its_schedule(run):
    _, progress = run(stage={"epochs": 2})
    steps = progress.step // 2
    expected = [1e-2 * lr_share(count * steps - 1, steps, replace(STAGE, epochs=2)) for count in (1, 2)]
    assert [record["lr"] for record in progress.epochs] == pytest.approx(expected)
    assert steps == 4 + 2  # 13 texts and 6 users in steps of 4


def names_of(towers, group):
    names = {id(parameter): name.removeprefix("base.") for name, parameter in towers.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


OURS = {
    *("user_embeddings.weight", "item_embeddings.weight", "item_bias"),
    *("content_user_embeddings.weight", "content_item_embeddings.weight"),
}


def test_a_frozen_backbone_is_in_no_group(make_towers):
    towers = make_towers(train_backbone=False)
    (group,) = parameter_groups(towers, Stage(lr=0.1, weight_decay=0.5))
    assert names_of(towers, group) == OURS
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(("backbone_lr", "expected"), [(0.02, 0.02), (None, 0.1)])
def test_the_backbone_has_its_own_rate_and_its_matrices_decay(make_towers, backbone_lr, expected):
    towers = make_towers()
    stage = Stage(lr=0.1, backbone_lr=backbone_lr, weight_decay=0.5)
    ours, matrices, vectors = parameter_groups(towers, stage)
    assert names_of(towers, ours) == OURS
    assert [(group["lr"], group["weight_decay"]) for group in (ours, matrices, vectors)] == [
        (0.1, 0.0), (expected, 0.5), (expected, 0.0),
    ]  # fmt: skip
    assert {parameter.ndim for parameter in matrices["params"]} == {2}
    assert {parameter.ndim for parameter in vectors["params"]} == {1}
    assert sum(len(group["params"]) for group in (ours, matrices, vectors)) == len(list(towers.parameters()))


def test_a_word_head_of_its_own_belongs_to_the_backbone():
    backbone = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    config = CLLM4RecConfig(backbone_config=backbone, num_users=2, num_items=3, freeze_backbone=False)
    towers = Towers(CLLM4RecForRecommendation(config), 0.1)
    ours, matrices, _ = parameter_groups(towers, Stage())
    assert names_of(towers, ours) == OURS
    assert "word_head" in names_of(towers, matrices)


# peft asks the backbone for a property that transformers is about to rename
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_of_a_backbone_with_low_rank_updates_only_these_learn(run, make_towers):
    recommender = make_towers(train_backbone=False).recommender
    lora = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True)
    recommender.model.backbone = get_peft_model(recommender.model.backbone, lora)
    towers = Towers(recommender, 0.1)
    groups = parameter_groups(towers, Stage(weight_decay=0.1))
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]
    assert names_of(towers, groups[0]) == OURS
    assert all("lora_" in name for name in names_of(towers, groups[1]))
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    run(towers, stage={"epochs": 1})
    changed = {name for name, value in towers.state_dict().items() if not torch.equal(value, before[name])}
    assert all("lora_" in name or name.removeprefix("base.") in OURS for name in changed)
    assert any("lora_B" in name for name in changed)


@pytest.mark.parametrize(
    ("max_documents", "sizes", "epochs"),
    [
        (0, [100], 30),
        (1000, [100, 40], 10),
        (1000, [40], 25),
        (1000, [10], 30),
        (50, [100], 1),
        (50, [0], 30),
        (50, [], 30),
    ],
)
def test_large_corpora_are_read_fewer_times_but_once_at_least(max_documents, sizes, epochs):
    objectives = [Objective("content", np.ones(size, int), lambda *_: {}) for size in sizes]
    assert epochs_of(Stage(epochs=30, max_documents=max_documents), objectives) == epochs
