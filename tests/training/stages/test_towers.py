import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from modeling_cllm4rec import (
    CLLM4RecConfig,
    CLLM4RecForCollaborativeLM,
    CLLM4RecForContentLM,
    CLLM4RecForRecommendation,
    CLLM4RecModel,
)
from training.stages.towers import Towers

WORDS, USERS, ITEMS = 50, 5, 7
USER, ITEM = WORDS, WORDS + USERS
# Rows with padding whose id is an item's: masks and labels leave it out, nothing else does.
INPUT_IDS = torch.tensor([[USER, 10, ITEM + 1, ITEM + 2, 12], [USER + 4, 10, ITEM, ITEM + 6, ITEM + 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LABELS = {
    "content": torch.tensor([[-100, -100, 3, 4, 12], [-100, 10, 9, -100, -100]]),
    "collaborative": torch.tensor([[-100, -100, ITEM + 1, ITEM + 2, -100], [-100, -100, ITEM, -100, -100]]),
    "recommendation": torch.tensor([[0, 6], [3, -100]]),
}
HEADS = ["content", "collaborative", "recommendation"]
IDS = torch.tensor([0, 3]), torch.tensor([1, 2, 6])


@pytest.fixture
def towers(backbone_config):
    torch.manual_seed(1)
    config = CLLM4RecConfig(
        backbone_config=backbone_config, num_users=USERS, num_items=ITEMS, freeze_backbone=False, initializer_range=0.3
    )
    return Towers(CLLM4RecForRecommendation(config), lambda_v=0.7).eval()


def batch(objective, rows=slice(None)):
    return {"input_ids": INPUT_IDS[rows], "attention_mask": MASK[rows], "labels": LABELS[objective][rows]}


def with_lora(towers):
    """The same heads around a backbone that learns by low-rank updates, which are not zero any more."""
    recommender = copy.deepcopy(towers.recommender)
    lora = LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", fan_in_fan_out="GPT2" in str(type(recommender.model.backbone))
    )
    recommender.model.backbone = get_peft_model(recommender.model.backbone, lora)
    with torch.no_grad():
        for name, parameter in recommender.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return Towers(recommender, lambda_v=0.7).eval()


# peft asks the backbone for a property that transformers is about to rename
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_each_parameter_is_there_once_and_shared_by_all_heads(towers, lora):
    towers = with_lora(towers) if lora else towers
    held = {id(parameter) for parameter in towers.parameters()}
    assert len(held) == len(list(towers.parameters()))
    for head in towers.heads.values():
        assert {id(parameter) for parameter in head.parameters()} == held
        assert head.model is towers.base
    assert all(name.startswith("base.") for name in towers.state_dict())
    base = towers.base
    words = base.backbone.get_input_embeddings().weight if base.word_head is None else base.word_head
    assert towers.heads["content"].lm_head.weight is words
    assert towers.heads["collaborative"].item_head.weight is base.item_embeddings.weight


def test_moving_and_casting_the_towers_moves_every_head(towers):
    towers.double()
    assert {p.dtype for head in towers.heads.values() for p in head.parameters()} == {torch.float64}
    assert towers.heads["content"].lm_head.weight.dtype == torch.float64


def test_train_and_eval_reach_every_head(towers):
    assert all(head.training for head in towers.train().heads.values())
    assert not any(head.training or head.model.training for head in towers.eval().heads.values())


@pytest.mark.parametrize("objective", HEADS)
def test_likelihood_is_the_sum_over_the_labels(towers, objective):
    losses = towers(objective, batch(objective), None)
    assert set(losses) == {"likelihood"}
    head, labels = towers.heads[objective], LABELS[objective]
    logits = head(input_ids=INPUT_IDS, attention_mask=MASK).logits
    expected = torch.zeros(())
    for row in range(2):
        for place, label in enumerate(labels[row].tolist()):
            if label == -100:
                continue
            if objective == "recommendation":
                expected -= logits[row].log_softmax(-1)[label]
            else:
                target = label - (ITEM if objective == "collaborative" else 0)
                expected -= logits[row, place - 1].log_softmax(-1)[target]
    assert losses["likelihood"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("objective", HEADS)
def test_losses_of_the_rows_add_up_to_the_loss_of_the_batch(towers, objective):
    whole = towers(objective, batch(objective), None)["likelihood"]
    parts = [towers(objective, batch(objective, slice(row, row + 1)), None)["likelihood"] for row in range(2)]
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize("objective", HEADS)
def test_regularisation_is_lambda_times_the_squared_distance_of_the_ids(towers, objective):
    base = towers.base
    users = (base.user_embeddings.weight - base.content_user_embeddings.weight)[[0, 3]]
    items = (base.item_embeddings.weight - base.content_item_embeddings.weight)[[1, 2, 6]]
    expected = 0.7 * ((users**2).sum() + (items**2).sum())
    regularisation = towers(objective, batch(objective), IDS)["regularisation"]
    assert regularisation.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("objective", HEADS)
def test_regularisation_pulls_the_tower_that_learns_once_for_each_id_and_leaves_the_other(towers, objective):
    base = towers.base
    pulled, other = (base.tables(name) for name in ("content", "collaborative"))
    if objective != "content":
        pulled, other = other, pulled
    towers(objective, batch(objective), IDS)["regularisation"].backward()
    for mine, theirs, index in zip(pulled, other, IDS, strict=True):
        expected = torch.zeros_like(mine.weight)
        expected[index] = 2 * 0.7 * (mine.weight - theirs.weight)[index]
        torch.testing.assert_close(mine.weight.grad, expected)
        assert theirs.weight.grad is None


def test_no_ids_at_all_regularise_nothing(towers):
    nobody = torch.empty(0, dtype=torch.long)
    assert towers("content", batch("content"), (nobody, nobody))["regularisation"].item() == 0


def test_distillation_is_the_cross_entropy_to_the_teacher(towers):
    teacher = torch.randn(2, ITEMS, generator=torch.Generator().manual_seed(0))
    losses = towers("recommendation", batch("recommendation") | {"teacher_logits": teacher}, None)
    logits = towers.recommender(input_ids=INPUT_IDS, attention_mask=MASK).logits
    expected = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum().item()
    assert losses["distilled"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        losses["likelihood"], towers("recommendation", batch("recommendation"), None)["likelihood"]
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_opens_as_every_head_with_the_same_logits(towers, tmp_path, lora):
    plain, towers = towers, with_lora(towers) if lora else towers
    towers.save_model(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lora" in name]
    classes = {
        "content": CLLM4RecForContentLM,
        "collaborative": CLLM4RecForCollaborativeLM,
        "recommendation": CLLM4RecForRecommendation,
    }
    for name, head in towers.heads.items():
        loaded = classes[name].from_pretrained(tmp_path).eval()
        logits = head(input_ids=INPUT_IDS, attention_mask=MASK).logits
        torch.testing.assert_close(loaded(input_ids=INPUT_IDS, attention_mask=MASK).logits, logits, atol=1e-5, rtol=0)
        before = plain.heads[name](input_ids=INPUT_IDS, attention_mask=MASK).logits
        assert torch.allclose(before, logits, atol=1e-3) == (not lora), "the update of rank 2 is in the weights"
    hidden = CLLM4RecModel.from_pretrained(tmp_path).eval()(INPUT_IDS, MASK).last_hidden_state
    torch.testing.assert_close(hidden, towers.base(INPUT_IDS, MASK).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_saving_leaves_the_low_rank_updates_to_learn_on(towers, tmp_path):
    towers = with_lora(towers)
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    towers.save_model(tmp_path)
    assert before.keys() == towers.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in towers.state_dict().items())
    assert any("lora_A" in name for name, parameter in towers.named_parameters() if parameter.requires_grad)
