import copy
import doctest
import importlib
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments

from modeling_cllm4rec import (
    CLLM4RecConfig,
    CLLM4RecForCollaborativeLM,
    CLLM4RecForContentLM,
    CLLM4RecForRecommendation,
    CLLM4RecModel,
    CollaborativeGPTwithItemLMHeadBatch,
    CollaborativeGPTwithItemRecommendHead,
    ContentGPTForUserItemWithLMHeadBatch,
    GPT4RecommendationBaseModel,
    loss_cllm4rec,
)
from modeling_cllm4rec.loss_cllm4rec import next_token_loss
from modeling_cllm4rec.modeling_cllm4rec import CACHE

HEADS = [CLLM4RecForContentLM, CLLM4RecForCollaborativeLM, CLLM4RecForRecommendation]
CLASSES = [CLLM4RecModel, *HEADS]
WORDS, USERS, ITEMS = 50, 5, 7
USER, ITEM = WORDS, WORDS + USERS  # the first id of each
PROMPT = {"history": [10, 11], "separator": [12], "recommend": [13, 14]}


@pytest.fixture
def config(backbone_config):
    return CLLM4RecConfig(backbone_config=backbone_config, num_users=USERS, num_items=ITEMS, prompt_ids=PROMPT)


def make(cls, config, **changes):
    torch.manual_seed(1)
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    model = cls(config).eval()
    with torch.no_grad():  # values that matter: the small initial ones hide differences
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(*rows):
    return torch.tensor(rows)


def labels_for(cls, input_ids):
    if cls is CLLM4RecForRecommendation:
        return torch.tensor([[0, 6], [3, -100]])
    labels = torch.full_like(input_ids, -100)
    labels[:, -2:] = ids([3, 4], [5, 6]) if cls is CLLM4RecForContentLM else ids([ITEM, ITEM + 3], [ITEM + 6, ITEM])
    return labels


TWO_ROWS = ids([USER, 10, ITEM + 1, ITEM + 2, 12, 13], [USER + 4, 10, ITEM, ITEM + 6, 12, 13])


def test_docstring_examples():
    for module in ("configuration_cllm4rec", "modeling_cllm4rec"):
        results = doctest.testmod(importlib.import_module(f"modeling_cllm4rec.{module}"))
        assert results.attempted > 0
        assert results.failed == 0


def test_published_demo_of_masks_and_embeddings():
    backbone = GPT2Config(vocab_size=3, n_embd=2, n_head=1, n_layer=1, bos_token_id=0, eos_token_id=0)
    model = CLLM4RecModel(CLLM4RecConfig(backbone_config=backbone, num_users=3, num_items=3))
    input_ids = ids([0, 1, 2, 3, 4, 5, 6, 7, 8])
    masks = model.token_masks(input_ids)
    assert masks.words.int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert masks.users.int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0]]
    assert masks.items.int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]
    parts = model.embed_parts(input_ids)
    zeros = torch.zeros(3, 2)
    words = model.get_input_embeddings().weight
    assert torch.equal(parts.words[0], torch.cat([words, zeros, zeros]))
    assert torch.equal(parts.users[0], torch.cat([zeros, model.user_embeddings.weight, zeros]))
    assert torch.equal(parts.items[0], torch.cat([zeros, zeros, model.item_embeddings.weight]))
    assert torch.equal(model.embed(input_ids), parts.words + parts.users + parts.items)
    assert torch.equal(model.get_input_embeddings()(input_ids), model.embed(input_ids))


def test_towers_have_their_own_tables(config):
    model = make(CLLM4RecModel, config)
    input_ids = ids([3, USER + 2, ITEM + 5])
    content = model.embed(input_ids, tower="content")[0]
    assert torch.equal(content[1], model.content_user_embeddings.weight[2])
    assert torch.equal(content[2], model.content_item_embeddings.weight[5])
    assert torch.equal(model.embed(input_ids)[0, 1], model.user_embeddings.weight[2])
    with pytest.raises(ValueError, match="'contents'"):
        model.embed(input_ids, tower="contents")


@pytest.mark.parametrize("bad", [-1, WORDS + USERS + ITEMS])
@pytest.mark.parametrize("training", [False, True])
def test_id_out_of_range_is_named(config, bad, training):
    model = make(CLLM4RecForRecommendation, config).train(training)
    with pytest.raises(IndexError, match=rf"id {bad} is outside \[0, 62\)"):
        model(ids([USER, bad, 3]))


def test_only_id_tables_learn_also_after_loading(config, tmp_path):
    wanted = {
        "item_bias",
        "user_embeddings.weight",
        "item_embeddings.weight",
        "content_user_embeddings.weight",
        "content_item_embeddings.weight",
    }
    model = make(CLLM4RecForContentLM, config)
    model.save_pretrained(tmp_path)
    for each in (model, CLLM4RecForContentLM.from_pretrained(tmp_path)):
        assert {name.removeprefix("model.") for name, p in each.named_parameters() if p.requires_grad} == wanted
    whole = make(CLLM4RecForContentLM, config, freeze_backbone=False)
    assert all(p.requires_grad for p in whole.parameters())


def test_pretrained_weights_give_the_same_logits_inside(backbone_config):
    outside = AutoModelForCausalLM.from_config(backbone_config).eval()
    inside = CLLM4RecForContentLM.from_backbone(outside, num_users=USERS, num_items=ITEMS).eval()
    words = torch.randint(0, WORDS, (3, 9))
    mask = torch.ones_like(words)
    mask[0, 6:] = 0
    expected = outside(words, attention_mask=mask).logits
    torch.testing.assert_close(
        inside(words, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5
    )
    assert expected.std() > 0.01


@torch.no_grad()
def test_a_backbone_of_a_folder_may_learn_and_its_file_stays_as_it_is(backbone_config, tmp_path):
    AutoModelForCausalLM.from_config(backbone_config).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = CLLM4RecForContentLM.from_backbone(str(tmp_path), num_users=USERS, num_items=ITEMS, freeze_backbone=False)
    again = CLLM4RecForContentLM.from_backbone(str(tmp_path), num_users=USERS, num_items=ITEMS)
    assert not any(p.requires_grad for p in again.model.backbone.parameters())
    words = torch.randint(0, WORDS, (1, 9))
    torch.testing.assert_close(model.eval()(words).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(words).logits)
    for parameter in model.model.backbone.parameters():
        assert parameter.requires_grad
        parameter.add_(1.0)
    assert torch.equal(model.lm_head.weight, model.model.word_weight)
    assert not torch.equal(model.get_input_embeddings().weight, again.get_input_embeddings().weight)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@torch.no_grad()
def test_a_backbone_that_is_given_keeps_its_own_weights(backbone_config):
    outside = AutoModelForCausalLM.from_config(backbone_config)
    words = outside.get_input_embeddings().weight.clone()
    model = CLLM4RecModel.from_backbone(outside, num_users=1, num_items=1)
    for parameter in model.backbone.parameters():
        parameter.add_(1.0)
    assert torch.equal(outside.get_input_embeddings().weight, words)


def test_lowest_layers_of_a_backbone(backbone_config):
    outside = AutoModelForCausalLM.from_config(backbone_config).eval()
    inside = CLLM4RecModel.from_backbone(outside, num_users=1, num_items=1, backbone_layers=1).eval()
    words = torch.randint(0, WORDS, (1, 5))
    first_layer = outside(words, output_hidden_states=True).hidden_states[1]
    assert inside.config.num_hidden_layers == 1
    torch.testing.assert_close(
        inside(words, output_hidden_states=True).hidden_states[0],
        outside.get_input_embeddings()(words)
        + (outside.transformer.wpe.weight[:5] if hasattr(outside, "transformer") else 0),
    )
    final_norm = outside.base_model.ln_f if hasattr(outside, "transformer") else outside.base_model.norm
    torch.testing.assert_close(inside(words).last_hidden_state, final_norm(first_layer), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="3 layers are asked for, but the model has 2"):
        CLLM4RecModel.from_backbone(outside, num_users=1, num_items=1, backbone_layers=3)


@pytest.mark.parametrize("model_type", ["phi", "gpt2"])
def test_a_bias_of_the_backbones_head_is_left_out_and_that_is_said(monkeypatch, model_type):
    said = []
    monkeypatch.setattr("modeling_cllm4rec.modeling_cllm4rec.logger.warning", said.append)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    outside = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=50, **sizes))
    CLLM4RecModel.from_backbone(outside, num_users=1, num_items=1)
    assert [line.split(":")[0] for line in said] == ["The bias of the backbone's head is left out"] * (
        model_type == "phi"
    )


@pytest.mark.parametrize("saved", CLASSES)
def test_each_head_loads_every_others_checkpoint_without_a_word(config, saved, tmp_path, caplog):
    model = make(saved, config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any("head.weight" in key for key in file.keys())  # noqa: SIM118 (safe_open is no mapping)
    expected = model.base.state_dict()
    for cls in CLASSES:
        loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert all(torch.equal(value, expected[key]) for key, value in loaded.base.state_dict().items())
        if cls in HEADS and cls is not CLLM4RecForContentLM:
            assert loaded.item_head.weight is loaded.model.item_embeddings.weight
    assert "newly initialized" not in caplog.text


def test_content_tables_may_be_dropped(config, tmp_path):
    make(CLLM4RecForRecommendation, config).save_pretrained(tmp_path)
    loaded, report = CLLM4RecForRecommendation.from_pretrained(tmp_path, content_tower=False, output_loading_info=True)
    assert not any(report.values())
    assert "content_item_embeddings.weight" not in loaded.model.state_dict()
    assert loaded.model.tables("content")[0] is loaded.model.user_embeddings


def test_untied_word_head_is_saved(config, tmp_path):
    model = make(CLLM4RecForContentLM, config)
    model.save_pretrained(tmp_path)
    loaded = CLLM4RecForContentLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(TWO_ROWS).logits, model(TWO_ROWS).logits)
    tied = config.backbone_config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_initialisation(backbone_config):
    config = CLLM4RecConfig(backbone_config=backbone_config, num_users=400, num_items=300, initializer_range=0.07)
    torch.manual_seed(0)
    model = CLLM4RecForRecommendation(config)
    for table in (*model.model.tables(), *model.model.tables("content")):
        assert table.weight.std().item() == pytest.approx(0.07, rel=0.05)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.model.item_bias.any()


def test_first_main_token_is_predicted_from_the_last_prompt_token(config):
    model = make(CLLM4RecForCollaborativeLM, config)
    input_ids = ids([USER + 1, 10, 11, ITEM + 4, ITEM + 2])
    labels = ids([-100, -100, -100, ITEM + 4, ITEM + 2])
    likelihood = model(input_ids).logits.log_softmax(-1)[0]
    expected = -(likelihood[2, 4] + likelihood[3, 2]) / 2
    torch.testing.assert_close(model(input_ids, labels=labels).loss, expected)
    torch.testing.assert_close(model(input_ids, labels=labels, num_items_in_batch=4).loss, expected / 2)


def test_content_loss_is_over_words_of_the_main_text(config):
    model = make(CLLM4RecForContentLM, config)
    input_ids = ids([USER + 1, 10, ITEM + 3, 20, 21])
    labels = ids([-100, -100, -100, 20, 21])
    logits = model(input_ids).logits
    assert logits.shape == (1, 5, WORDS)
    likelihood = logits.log_softmax(-1)[0]
    torch.testing.assert_close(model(input_ids, labels=labels).loss, -(likelihood[2, 20] + likelihood[3, 21]) / 2)
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, logits[:, -2:])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_chunks_is_summed_in_float32(monkeypatch, dtype, autocast):
    monkeypatch.setattr(loss_cllm4rec, "LOGITS_AT_A_TIME", 40)
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 601, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    labels = torch.randint(20, (1, 601))
    logits = hidden[0, :-1].float() @ weight.float().T
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = next_token_loss(hidden, weight, None, labels, 1)
    assert loss.dtype == torch.float32
    half = autocast or dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=1e-2 if half else 1e-5, atol=0.0)


@pytest.mark.parametrize("frozen", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_in_chunks_are_those_of_all_logits_at_once_and_each_is_computed_once(monkeypatch, dtype, frozen):
    shapes, made = [], loss_cllm4rec.linear_into
    monkeypatch.delattr(nn.functional, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(loss_cllm4rec, "linear_into", lambda *given: shapes.append(len(given[0])) or made(*given))
    monkeypatch.setattr(loss_cllm4rec, "LOGITS_AT_A_TIME", 100)
    torch.manual_seed(0)
    labels = torch.randint(20, (1, 30)).masked_fill(torch.arange(30) % 7 == 3, -100)
    values = [torch.randn(shape) for shape in ((1, 30, 8), (20, 8), (20,))]
    plain = [value.to(dtype).float().clone().requires_grad_() for value in values]
    chunked = [value.to(dtype).requires_grad_(place not in frozen) for place, value in enumerate(values)]
    logits = plain[0][0, :-1] @ plain[1].T + plain[2]
    (3 * nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")).backward()
    loss = next_token_loss(*chunked, labels, 1)
    if len(frozen) < 3:
        (3 * loss).backward()
    assert shapes == [5, 5, 5, 5, 5]
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    for place, (exact, found) in enumerate(zip(plain, chunked, strict=True)):
        if place in frozen:
            assert found.grad is None
        else:
            assert found.grad.dtype == dtype
            torch.testing.assert_close(found.grad.float(), exact.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_gradients_none_are_made(monkeypatch, dtype):
    monkeypatch.delattr(nn.functional, "linear_cross_entropy", raising=False)
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((1, 6, 8), (20, 8), (20,))]
    made = []
    monkeypatch.setattr(loss_cllm4rec, "sum_of", lambda *given: made.append(given))
    labels = torch.randint(20, (1, 6))
    with torch.no_grad():
        alone = next_token_loss(*tensors, labels)
    assert made == []
    assert not alone.requires_grad
    monkeypatch.undo()
    monkeypatch.delattr(nn.functional, "linear_cross_entropy", raising=False)
    torch.testing.assert_close(alone, next_token_loss(*tensors, labels).detach())


def test_without_a_label_gradients_are_zeros(monkeypatch):
    monkeypatch.delattr(nn.functional, "linear_cross_entropy", raising=False)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((1, 6, 8), (20, 8), (20,))]
    loss = next_token_loss(*tensors, torch.full((1, 6), -100))
    loss.backward()
    assert loss == 0
    for tensor in tensors:
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor))


def test_logits_that_are_large_do_not_overflow(monkeypatch):
    monkeypatch.delattr(nn.functional, "linear_cross_entropy", raising=False)
    hidden, weight = torch.full((1, 3, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.99]])
    found = next_token_loss(hidden, weight, None, torch.tensor([[-100, 0, 1]]), 1)
    torch.testing.assert_close(found, torch.tensor(2e4), atol=1e-2, rtol=1e-6)


def test_under_autocast_gradients_have_the_dtype_of_the_weights(monkeypatch):
    monkeypatch.setattr(loss_cllm4rec, "LOGITS_AT_A_TIME", 100)
    torch.manual_seed(0)
    labels, gradients = torch.randint(20, (1, 30)), []
    for autocast in (False, True):
        torch.manual_seed(1)
        tensors = [torch.randn(shape, requires_grad=True) for shape in ((1, 30, 8), (20, 8), (20,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            next_token_loss(*tensors, labels, 1).backward()
        gradients.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*gradients, atol=0.1, rtol=0.05)


def test_prompts_that_name_nobody_hold_the_history_alone(config):
    model = make(CLLM4RecForRecommendation, config, prompt_names_user=False)
    prompts = model.prepare_prompts([[3], [3, 4]], [2, None])
    wanted = model.prepare_prompts([[3], [3, 4]])
    assert prompts["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert not ((prompts["input_ids"] >= USER) & (prompts["input_ids"] < ITEM)).any()
    nobody = model.prepare_prompts([[]])["input_ids"]
    assert model.prepare_prompts(None, [2])["input_ids"].tolist() == nobody.tolist()
    torch.testing.assert_close(model.query_states([[3], []], [None, 2])[1:], model.query_states([[]]))


def test_multinomial_likelihood(config):
    model = make(CLLM4RecForRecommendation, config)
    labels, weights = ids([0, 6], [3, -100]), torch.tensor([[1.0, 0.5], [2.0, 9.0]])
    likelihood = model(TWO_ROWS).logits.log_softmax(-1)
    expected = -(likelihood[0, 0] + 0.5 * likelihood[0, 6] + 2 * likelihood[1, 3]) / 3.5
    torch.testing.assert_close(model(TWO_ROWS, labels=labels, target_weights=weights).loss, expected)


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_readout(config, readout):
    model = make(CLLM4RecForRecommendation, config, readout=readout)
    hidden = model.model(TWO_ROWS).last_hidden_state
    expected = hidden[:, -1] if readout == "last" else hidden[:, [0, 2, 3, 5]].mean(1)
    logits = expected @ model.model.item_embeddings.weight.T + model.model.item_bias
    torch.testing.assert_close(model(TWO_ROWS).logits, logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0, 1, ITEM + 1])
@pytest.mark.parametrize("cls", HEADS)
def test_padding_changes_nothing_whatever_fills_it(config, cls, side, fill):
    model = make(cls, config)
    alone, fillers = TWO_ROWS[:1], torch.full((1, 3), fill)
    order = [fillers, alone] if side == "left" else [alone, fillers]
    mask = torch.cat([torch.zeros_like(fillers) if part is fillers else torch.ones_like(alone) for part in order], 1)
    expected, padded = model(alone).logits, model(torch.cat(order, 1), attention_mask=mask).logits
    if cls is not CLLM4RecForRecommendation:
        padded = padded[:, mask[0].bool()]
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)


def test_padding_with_an_item_is_no_prompt_item(config):
    model = make(CLLM4RecForRecommendation, config)
    padded = torch.cat([TWO_ROWS[:1], torch.full((1, 2), ITEM + 5)], 1)
    mask = (torch.arange(8) < 6).long().unsqueeze(0)
    labels = ids([0])
    torch.testing.assert_close(
        model(padded, attention_mask=mask, labels=labels).loss, model(TWO_ROWS[:1], labels=labels).loss
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_hidden_states_attentions_tuples_and_determinism(config, cls):
    model = make(cls, config)
    model.set_attn_implementation("eager")
    first = model(TWO_ROWS, output_hidden_states=True, output_attentions=True)
    assert len(first.hidden_states) == 3
    assert first.hidden_states[0].shape == (2, 6, 16)
    assert len(first.attentions) == 2
    assert first.attentions[0].shape == (2, 2, 6, 6)
    plain = model(TWO_ROWS, return_dict=False)
    assert isinstance(plain, tuple)
    torch.testing.assert_close(plain[0], first[0], atol=0, rtol=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_sdpa_equals_eager(config, cls):
    model = make(cls, config)
    mask = ids([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0])
    results = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.base.backbone.config._attn_implementation == attention
        output = model(TWO_ROWS, attention_mask=mask)[0]
        results.append(output if cls is CLLM4RecForRecommendation else output[mask.bool()])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", HEADS)
def test_gradient_checkpointing_gives_the_same_gradients(config, cls):
    gradients = []
    for checkpointing in (False, True):
        model = make(cls, config).train()
        if checkpointing:
            # Older versions of transformers know the second name only, newer ones warn of it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model(TWO_ROWS, labels=labels_for(cls, TWO_ROWS)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("item_embeddings" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_keyword_arguments_reach_the_backbone(config):
    model = make(CLLM4RecForCollaborativeLM, config)
    shifted = model(TWO_ROWS, position_ids=torch.arange(6).unsqueeze(0).expand(2, -1) * 3).logits
    assert not torch.allclose(shifted, model(TWO_ROWS).logits, atol=1e-4)
    assert model(TWO_ROWS, use_cache=True)[CACHE] is not None
    assert model(TWO_ROWS).get(CACHE) is None


def test_a_cache_under_its_old_name_is_used(config):
    model = make(CLLM4RecForContentLM, config)
    whole = model(TWO_ROWS, use_cache=True)
    for name in ("cache", "past_key_values"):
        start = model(TWO_ROWS[:, :4], use_cache=True)
        rest = model(TWO_ROWS[:, 4:], position_ids=torch.tensor([[4, 5]] * 2), **{name: start[CACHE]})
        torch.testing.assert_close(rest.logits, whole.logits[:, 4:])


def test_without_user_embeddings_item_ids_stay_and_histories_are_served(config):
    model, without = (
        make(CLLM4RecForRecommendation, config),
        make(CLLM4RecForRecommendation, config, user_embeddings=False),
    )
    assert without.config.vocab_size == model.config.vocab_size
    assert [len(table.weight) for table in without.model.tables("content")] == [0, ITEMS]
    state = {name: value[:0] if "user_embeddings" in name else value for name, value in model.state_dict().items()}
    without.load_state_dict(state)
    ours, theirs = (each.recommend([[1, 2], [6]], k=3) for each in (without, model))
    assert torch.equal(ours.items, theirs.items)
    torch.testing.assert_close(ours.scores, theirs.scores)


def test_without_user_embeddings_a_user_is_refused_with_the_remedy(config):
    model = make(CLLM4RecForRecommendation, config, user_embeddings=False)
    with pytest.raises(ValueError, match="published without user embeddings; leave the user out and give a history"):
        model.recommend([[1]], users=[2])
    with pytest.raises(IndexError, match=f"id {USER + 4} is user 4: this model was published without user embeddings"):
        model(ids([10, USER + 4, ITEM]))


@pytest.mark.parametrize("cls", CLASSES)
def test_without_user_embeddings_a_model_is_saved_and_loaded_without_a_word(config, cls, tmp_path, caplog):
    model = make(cls, config, user_embeddings=False)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prompt = ids([10, 11, ITEM + 1, 12, 13])
    torch.testing.assert_close(loaded(prompt)[0], model(prompt)[0])


def test_inputs_embeds_equal_input_ids(config):
    model = make(CLLM4RecForContentLM, config)
    embeds = model.model.embed(TWO_ROWS, tower="content")
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(TWO_ROWS).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model.model(TWO_ROWS, inputs_embeds=embeds)


@pytest.mark.parametrize("cls", CLASSES)
def test_resizing_the_words_is_refused_with_the_reason(config, cls):
    model = make(cls, config)
    assert model.resize_token_embeddings(None) is model.get_input_embeddings()
    assert model.resize_token_embeddings(62) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="would move"):
        model.resize_token_embeddings(63)
    with pytest.raises(ValueError, match="cut the user and item tokens off"):
        model.set_input_embeddings(torch.nn.Embedding(3, 16))


def test_generation_is_conditioned_on_user_and_item_and_equals_its_uncached_form(config):
    model = make(CLLM4RecForContentLM, config)
    with torch.no_grad():
        for table in model.model.tables("content"):
            table.weight.mul_(20)
    prompts = ids([USER, 10, ITEM], [USER + 3, 10, ITEM + 5])
    texts = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert texts.shape == (2, 9)
    assert texts[:, 3:].max() < WORDS
    assert texts[0, 3:].tolist() != texts[1, 3:].tolist()
    for _ in range(6):
        prompts = torch.cat([prompts, model(prompts).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(texts, prompts)


def test_generation_with_left_padding(config):
    model = make(CLLM4RecForContentLM, config)
    alone = ids([USER, 10, ITEM])
    padded, mask = torch.cat([ids([0, 0]), alone], 1), ids([0, 0, 1, 1, 1])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 5:], expected[:, 3:])


def test_prompts_are_laid_out_and_cut_from_the_front(config):
    model = make(CLLM4RecForRecommendation, config, max_history=2)
    prompts = model.prepare_prompts(histories=[[4, 1, 2], [0]], users=[3, None])
    assert prompts["input_ids"].tolist() == [
        [USER + 3, 10, 11, ITEM + 1, ITEM + 2, 12, USER + 3, 13, 14],
        [10, 11, ITEM, 12, 13, 14, 0, 0, 0],
    ]
    assert prompts["attention_mask"].tolist() == [[1] * 9, [1] * 6 + [0] * 3]


def test_recommend_ranks_what_the_logits_say(config):
    model = make(CLLM4RecForRecommendation, config)
    histories, users = [[1, 2], [0]], [0, None]
    scores = model(**model.prepare_prompts(histories, users)).logits.softmax(-1)
    ranked = model.recommend(histories, users, k=7, exclude_seen=False)
    assert torch.equal(ranked.items, scores.argsort(-1, descending=True))
    torch.testing.assert_close(ranked.scores.sum(-1), torch.ones(2))
    unseen = model.recommend(histories, users, k=7)
    assert unseen.items[0].tolist() == [i for i in ranked.items[0].tolist() if i not in (1, 2)] + [-1, -1]
    assert unseen.scores[0, -2:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(unseen.scores[1, :6], scores[1][unseen.items[1, :6]])
    chosen = model.recommend(histories, users, k=2, candidates=[6, 1, 3])
    assert chosen.items[0].tolist() == [i for i in ranked.items[0].tolist() if i in (6, 3)]


def test_recommend_leaves_training_mode_as_it_was(config):
    model = make(CLLM4RecForRecommendation, config).train()
    model.recommend(users=[1])
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "histories, users or both"),
        ({"histories": [[1]], "users": [0, 1]}, ValueError, "2 users but 1 histories"),
        ({"histories": [[7]]}, IndexError, r"item 7 is outside \[0, 7\)"),
        ({"users": [5]}, IndexError, r"user 5 is outside \[0, 5\)"),
        ({"users": [0], "k": 0}, ValueError, "at least one"),
        ({"users": [0], "candidates": [7]}, IndexError, r"outside \[0, 7\)"),
        ({"histories": []}, ValueError, "histories is empty; give an entry for at least one person"),
        ({"users": np.array([], int)}, ValueError, "users is empty"),
        ({"texts": []}, ValueError, "texts is empty"),
        ({"texts": "astronomy"}, ValueError, "texts is 'astronomy'; it is a list with one entry for each person"),
        ({"users": 3}, ValueError, "users is 3; it is a list"),
        ({"users": torch.tensor(3)}, ValueError, r"users is tensor\(3\); it is a list"),
    ],
)
def test_recommend_names_what_is_wrong(config, arguments, error, message):
    with pytest.raises(error, match=message):
        make(CLLM4RecForRecommendation, config).recommend(**arguments)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, iter])
def test_people_are_given_in_any_kind_of_list(config, kind):
    model = make(CLLM4RecForRecommendation, config)
    wanted = model.recommend([[1, 2], [0, 3]], [4, 2], k=7)
    given = model.recommend(kind([[1, 2], [0, 3]]), kind([4, 2]), k=7)
    assert torch.equal(given.items, wanted.items)
    assert torch.equal(model.recommend(users=kind([4, 2])).items, model.recommend(users=[4, 2]).items)


def test_parts_meet_on_the_device_of_the_words_and_states_go_to_that_of_the_items(config):
    # Every computer has two devices: things can go to "meta", and nothing of another device can be computed with there.
    model = make(CLLM4RecForRecommendation, config)
    input_ids, elsewhere = ids([USER, 10, ITEM + 1, 12]), torch.device("meta")
    for model.config.readout in ("mean", "last"):
        hidden = torch.zeros(1, 4, config.hidden_size, device=elsewhere)
        for given in ({"attention_mask": torch.ones_like(input_ids)}, {"document_lengths": (3, 1)}):
            assert model.read_out(hidden, input_ids, **given).device == elsewhere
    words, items = model.get_input_embeddings(), model.model.item_embeddings
    words.weight = nn.Parameter(words.weight.to(elsewhere))
    assert {part.device for part in model.model.embed_parts(input_ids)} == {elsewhere}
    items.weight = nn.Parameter(items.weight.to(elsewhere))
    assert model.item_logits(torch.zeros(1, config.hidden_size)).device == elsewhere


@pytest.mark.parametrize("name", ["item_embeddings", "item_bias", "words"])
def test_a_model_whose_tables_are_offloaded_does_not_rank(config, name):
    model = make(CLLM4RecForRecommendation, config)
    if name == "item_bias":
        model.model.item_bias = nn.Parameter(model.model.item_bias.to("meta"))
    else:
        table = model.get_input_embeddings() if name == "words" else model.model.item_embeddings
        table.weight = nn.Parameter(table.weight.to("meta"))
    with pytest.raises(ValueError, match=r"offloaded by its device_map.* load the model whole on one device"):
        model.recommend([[1]])


def test_no_logits_in_training_with_labels(config):
    for cls in (CLLM4RecForContentLM, CLLM4RecForCollaborativeLM):
        model, labels = make(cls, config), labels_for(cls, TWO_ROWS)
        assert model(TWO_ROWS, labels=labels).logits is not None
        assert model.train()(TWO_ROWS, labels=labels).logits is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(config, dtype, tmp_path):
    make(CLLM4RecForRecommendation, config).save_pretrained(tmp_path)
    model = CLLM4RecForRecommendation.from_pretrained(tmp_path, dtype=dtype).eval()
    loss = model(TWO_ROWS, labels=labels_for(CLLM4RecForRecommendation, TWO_ROWS)).loss
    assert model(TWO_ROWS).logits.dtype == dtype
    assert torch.isfinite(loss)


class Rows(Dataset):
    def __init__(self, cls):
        self.labels = labels_for(cls, TWO_ROWS)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": TWO_ROWS[index % 2], "labels": self.labels[index % 2]}


@pytest.mark.parametrize("cls", HEADS)
def test_transformers_trainer_trains_each_head_unchanged(config, cls, tmp_path):
    model = make(cls, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.05,
        report_to=[], use_cpu=True, eval_strategy="epoch", logging_steps=1, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(cls), eval_dataset=Rows(cls))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        untrained = trainer.evaluate()["eval_loss"]
        trainer.train()
    assert trainer.evaluate()["eval_loss"] < untrained - 0.1
    for name, parameter in model.named_parameters():
        if "backbone" in name or "word_head" in name:
            assert torch.equal(parameter, before[name]), name


def test_wrong_counts_and_newer_folders_are_refused(backbone_config, tmp_path):
    with pytest.raises(Exception, match="num_users must be a positive number, got -1"):
        CLLM4RecConfig(backbone_config=backbone_config, num_users=-1, num_items=2)
    with pytest.raises(Exception, match="format version 99"):
        CLLM4RecConfig(backbone_config=backbone_config, num_users=1, num_items=2, format_version=99)


def test_backbones_that_compute_more_than_a_lookup_are_refused(config):
    class Scaled(torch.nn.Embedding):
        pass

    from modeling_cllm4rec.modeling_cllm4rec import TokenEmbeddings

    with pytest.raises(ValueError, match="Scaled"):
        TokenEmbeddings.extend(Scaled(3, 2), owner=None)


def test_a_deep_copy_resolves_its_own_tables(config):
    model = make(CLLM4RecModel, config)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.item_embeddings.weight.zero_()
    assert not twin.get_input_embeddings()(ids([ITEM])).any()
    assert model.get_input_embeddings()(ids([ITEM])).any()


def test_published_names():
    assert GPT4RecommendationBaseModel is CLLM4RecModel
    assert CollaborativeGPTwithItemLMHeadBatch is CLLM4RecForCollaborativeLM
    assert ContentGPTForUserItemWithLMHeadBatch is CLLM4RecForContentLM
    assert CollaborativeGPTwithItemRecommendHead is CLLM4RecForRecommendation
