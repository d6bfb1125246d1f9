"""Packed documents give what the same documents give one by one, whatever the backbone and its attention."""

import json

import pytest
import torch

from modeling_cllm4rec import (
    CLLM4RecConfig,
    CLLM4RecForCollaborativeLM,
    CLLM4RecForContentLM,
    CLLM4RecForRecommendation,
    CLLM4RecModel,
)
from modeling_cllm4rec.packing_cllm4rec import MOST_PADDING, PACKED_SDPA, Packing

LENGTHS = (5, 1, 9, 4, 9, 2, 8)
WORDS, USERS, ITEMS = 20, 4, 11
GPT2 = {"model_type": "gpt2", "vocab_size": WORDS, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16}
GROUPED = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 16, "num_hidden_layers": 2,
}  # fmt: skip
WINDOWED = GROUPED | {"model_type": "mistral", "sliding_window": 3}
CONVOLVED = {
    "model_type": "lfm2", "vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"],
}  # fmt: skip


def make(head, backbone=GPT2, **fields):
    torch.manual_seed(0)
    model = head(CLLM4RecConfig(backbone_config=backbone, num_users=USERS, num_items=ITEMS, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def documents(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WORDS + USERS + ITEMS, (length,), generator=generator) for length in lengths]


def packed(rows):
    return {"input_ids": torch.cat(rows).unsqueeze(0), "document_lengths": tuple(map(len, rows))}


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor([[len(r)] for r in rows]))}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", [GPT2, GROUPED, WINDOWED], ids=lambda words: words["model_type"])
def test_hidden_states_are_those_of_the_documents_one_by_one(backbone, attention):
    model, rows = make(CLLM4RecModel, backbone), documents()
    wanted = torch.cat([model(row.unsqueeze(0)).last_hidden_state[0] for row in rows])
    model.set_attn_implementation(attention)
    found = model(**packed(rows)).last_hidden_state
    assert model.backbone.config._attn_implementation == {"sdpa": PACKED_SDPA}.get(attention, "eager")
    torch.testing.assert_close(found, wanted.unsqueeze(0))


def test_layers_that_are_no_attention_do_not_go_on_from_one_document_into_the_next():
    model, rows = make(CLLM4RecModel, CONVOLVED), documents()
    wanted = torch.cat([model(row.unsqueeze(0)).last_hidden_state[0] for row in rows])
    torch.testing.assert_close(model(**packed(rows)).last_hidden_state, wanted.unsqueeze(0))


def test_gradients_are_those_of_the_documents_one_by_one():
    rows, gradients = documents(), []
    for passes in ([packed(rows)], [{"input_ids": row.unsqueeze(0)} for row in rows]):
        model = make(CLLM4RecModel)
        sum(model(**inputs).last_hidden_state.square().sum() for inputs in passes).backward()
        gradients.append((model.user_embeddings.weight.grad, model.item_embeddings.weight.grad))
    torch.testing.assert_close(*gradients)


def half(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("backbone", [GPT2, GROUPED, WINDOWED], ids=lambda words: words["model_type"])
def test_half_precision_gives_nearly_the_same(backbone):
    model, rows = make(CLLM4RecModel, backbone), documents()
    wanted = model(**packed(rows)).last_hidden_state
    with half():
        found = model(**packed(rows)).last_hidden_state
    torch.testing.assert_close(found.float(), wanted, atol=0.15, rtol=0.05)
    assert not torch.equal(found.float(), wanted)


@pytest.mark.parametrize("backbone", [GPT2, GROUPED], ids=lambda words: words["model_type"])
def test_weights_in_half_precision_give_states_in_half_precision(backbone):
    model, rows = make(CLLM4RecModel, backbone), documents()
    wanted = model(**packed(rows)).last_hidden_state
    found = model.bfloat16()(**packed(rows)).last_hidden_state
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.3, rtol=0.1)


def test_gradients_in_half_precision_are_nearly_those_in_float32():
    gradients = []
    for enabled in (False, True):
        model = make(CLLM4RecModel)
        with half(enabled):
            loss = model(**packed(documents())).last_hidden_state.float().square().sum()
        loss.backward()
        gradients.append(model.item_embeddings.weight.grad)
    torch.testing.assert_close(*gradients, atol=0.05 * gradients[0].abs().max().item(), rtol=0)


def test_what_is_not_packed_is_computed_as_before():
    model, rows = make(CLLM4RecModel), documents()
    before = model(**padded(rows)).last_hidden_state
    model(**packed(rows))
    assert model.backbone.config._attn_implementation == PACKED_SDPA
    assert torch.equal(model(**padded(rows)).last_hidden_state, before)
    cached = model(rows[2].unsqueeze(0)[:, :5], use_cache=True)
    rest = model(rows[2].unsqueeze(0)[:, 5:], cache=getattr(cached, "cache", None) or cached.past_key_values)
    torch.testing.assert_close(rest.last_hidden_state[0], model(**packed(rows)).last_hidden_state[0, 11:15])


def test_flash_attention_is_given_the_bounds_of_the_documents():
    arguments = Packing((2, 1, 3), torch.device("cpu")).backbone_arguments("flash_attention_2")
    assert arguments.pop("attention_mask") is None
    assert {name: getattr(value, "tolist", lambda v=value: v)() for name, value in arguments.items()} == {
        "position_ids": [[0, 1, 0, 0, 1, 2]],
        "cu_seq_lens_q": [0, 2, 3, 6],
        "cu_seq_lens_k": [0, 2, 3, 6],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert arguments["cu_seq_lens_q"].dtype == torch.int32


@pytest.mark.parametrize("head", [CLLM4RecForContentLM, CLLM4RecForCollaborativeLM])
def test_a_language_model_has_the_loss_of_its_documents_and_no_label_across_them(head):
    model, rows = make(head), documents()
    first, last = (0, WORDS) if head is CLLM4RecForContentLM else (WORDS + USERS, WORDS + USERS + ITEMS)
    labels = [torch.where((row >= first) & (row < last), row, -100) for row in rows]
    assert any(label[0] != -100 for label in labels[1:]), "no first token has a label, so that nothing is looked at"
    one_by_one = sum(
        model(row.unsqueeze(0), labels=label.unsqueeze(0), num_items_in_batch=1).loss
        for row, label in zip(rows, labels, strict=True)
    )
    together = model(**packed(rows), labels=torch.cat(labels).unsqueeze(0), num_items_in_batch=1).loss
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_the_recommender_gives_the_same_packed_and_padded(readout):
    model = make(CLLM4RecForRecommendation, readout=readout)
    rows, labels = documents(), torch.tensor([[3, 4], [1, -100], [0, 1], [2, 3], [4, 5], [6, -100], [7, 8]])
    one, other = model(**packed(rows), labels=labels), model(**padded(rows), labels=labels)
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_many_tokens_is_exact_in_half_precision(dtype):
    model, lengths = make(CLLM4RecForRecommendation, readout="mean"), (2500, 3)
    torch.manual_seed(0)
    rows = [torch.randint(WORDS, WORDS + USERS + ITEMS, (length,)) for length in lengths]
    states = [(torch.randn(length, 8) + 1).to(dtype) for length in lengths]
    expected = torch.stack([each.float().mean(0) for each in states]).to(dtype)
    found = model.read_out(torch.cat(states).unsqueeze(0), **packed(rows))
    # What separates two neighbours in the dtype, which a sum in another order may come to.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(found, expected, **tolerance)
    found = model.read_out(torch.nn.utils.rnn.pad_sequence(states, batch_first=True), **padded(rows))
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize(
    ("lengths", "shape"), [((2, 3), (1, 6)), ((2, 3), (5, 1)), ((0, 5), (1, 5)), ((), (1, 3))], ids=str
)
def test_lengths_that_do_not_make_up_the_row_are_refused(lengths, shape):
    with pytest.raises(ValueError, match="document_lengths hold"):
        Packing.of(lengths, shape, torch.device("cpu"))


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (7, 7, 7), tuple(range(1, 40))], ids=str)
def test_groups_hold_every_token_once_and_little_padding(lengths):
    packing = Packing(lengths, torch.device("cpu"))
    groups, back = packing.groups
    places = torch.cat([places for places, _ in groups])
    assert torch.equal(places[back], torch.arange(sum(lengths)))
    assert len(places) <= sum(lengths) / (1 - MOST_PADDING)
    assert all(len(group) % longest == 0 for group, longest in groups)


def test_the_attention_of_training_does_not_travel_with_the_checkpoint(tmp_path):
    model = make(CLLM4RecModel)
    model(**packed(documents()))
    model.save_pretrained(tmp_path)
    assert PACKED_SDPA not in (tmp_path / "config.json").read_text()
    assert "attn_implementation" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_the_fused_gelu_is_the_function_that_gpt2_names():
    from transformers.activations import NewGELUActivation

    model, x = make(CLLM4RecModel), torch.linspace(-6, 6, 200)
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    torch.testing.assert_close(model.backbone.h[0].mlp.act(x), NewGELUActivation()(x), atol=1e-6, rtol=1e-6)
