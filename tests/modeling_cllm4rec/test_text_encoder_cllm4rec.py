"""The text encoder: what it makes of a text, how it is kept, and how a model finds it."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from modeling_cllm4rec import text_encoder_cllm4rec
from modeling_cllm4rec.text_encoder_cllm4rec import TextEncoder

WORDS = 40


def words_tokenizer(marked=False):
    words = Tokenizer(WordLevel({str(number): number for number in range(WORDS)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    if marked:
        words.post_processor = TemplateProcessing(single="1 $A 2", special_tokens=[("1", 1), ("2", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words)


def save(folder, model, marked=False):
    model.save_pretrained(folder)
    words_tokenizer(marked).save_pretrained(folder)
    return folder


@pytest.fixture
def decoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return save(tmp_path / "decoder", LlamaModel(LlamaConfig(vocab_size=WORDS, **sizes)))


def test_a_text_is_the_mean_over_its_tokens(decoder, monkeypatch):
    encoder = TextEncoder.from_pretrained(decoder)
    texts = ["3 4 5", "", "7", " ", "1 2 3 4 5 6", "3 4 5"]
    states = encoder(texts)
    hidden = encoder.model(torch.tensor([[3, 4, 5]])).last_hidden_state[0]
    torch.testing.assert_close(states[0], hidden.mean(0))
    assert states.dtype == torch.float32
    assert not states.requires_grad
    assert states.isnan().any(1).tolist() == [False, True, False, True, False, False]
    monkeypatch.setattr(text_encoder_cllm4rec, "TOKENS_PER_PASS", 4)
    torch.testing.assert_close(encoder(texts), states, equal_nan=True)
    monkeypatch.setattr(text_encoder_cllm4rec, "TOKENS_OF_A_TEXT", 3)
    torch.testing.assert_close(encoder(["1 2 3 4 5 6"]), encoder(["1 2 3"]))


def test_what_is_said_several_times_is_read_once(decoder, monkeypatch):
    encoder = TextEncoder.from_pretrained(decoder)
    once, asked, tokenize = encoder(["3 4", "8"]), [], type(encoder.tokenizer).__call__
    monkeypatch.setattr(
        type(encoder.tokenizer), "__call__", lambda self, text, **how: asked.append(text) or tokenize(self, text, **how)
    )
    torch.testing.assert_close(encoder(["3 4", "8", "3 4"]), once[[0, 1, 0]])
    assert asked == ["3 4", "8"]


def test_an_encoder_reads_with_its_marks(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = BertModel(BertConfig(vocab_size=WORDS, **sizes))
    encoder = TextEncoder.from_pretrained(save(tmp_path, made, marked=True))
    hidden = encoder.model(torch.tensor([[1, 7, 8, 2]])).last_hidden_state[0]
    torch.testing.assert_close(encoder(["7 8", "9 9 9 9 9"])[0], hidden.mean(0))


def test_no_more_is_read_than_there_are_positions(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = RobertaModel(RobertaConfig(vocab_size=WORDS, max_position_embeddings=12, pad_token_id=1, **sizes))
    encoder = TextEncoder.from_pretrained(save(tmp_path, made))
    assert encoder.longest == 10
    torch.testing.assert_close(encoder(["3 " * 30]), encoder(["3 " * 10]))
    encoder.tokenizer.model_max_length = 4
    torch.testing.assert_close(encoder(["3 " * 30]), encoder(["3 " * 4]))


def test_the_lowest_layers_are_kept(decoder, tmp_path):
    whole = TextEncoder.from_pretrained(decoder)
    encoder = TextEncoder.from_pretrained(decoder, layers=1)
    assert encoder.model.config.num_hidden_layers == 1
    hidden = whole.model(torch.tensor([[3, 4]]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(encoder(["3 4"])[0], whole.model.norm(hidden)[0].mean(0))
    with pytest.raises(ValueError, match="4 layers are asked for, but the model has 3"):
        TextEncoder.from_pretrained(decoder, layers=4)


def test_what_is_written_reads_alike_and_is_half_as_large(decoder, tmp_path):
    encoder = TextEncoder.from_pretrained(decoder, layers=2)
    encoder.save_pretrained(tmp_path / "written")
    again = TextEncoder.from_pretrained(tmp_path / "written")
    assert torch.equal(again(["3 4 5", "6"]), encoder(["3 4 5", "6"]))
    assert encoder.model.dtype == again.model.dtype == torch.float32
    kept = json.loads((tmp_path / "written" / "config.json").read_text())
    assert (kept["dtype"], kept["num_hidden_layers"], kept["use_cache"]) == ("bfloat16", 2, False)
    assert AutoModel.from_pretrained(tmp_path / "written").dtype == torch.bfloat16


def test_a_model_with_encoder_and_decoder_is_refused(tmp_path):
    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    save(tmp_path, T5Model(T5Config(vocab_size=WORDS, **sizes)))
    with pytest.raises(ValueError, match="has an encoder and a decoder; choose a model that is one of them"):
        TextEncoder.from_pretrained(tmp_path)


def test_weights_that_are_missing_are_named(decoder):
    wider = json.loads((decoder / "config.json").read_text()) | {"num_hidden_layers": 4}
    (decoder / "config.json").write_text(json.dumps(wider))
    with pytest.raises(ValueError, match=r"lacks weights such as layers\.3\."):
        TextEncoder.from_pretrained(decoder)
