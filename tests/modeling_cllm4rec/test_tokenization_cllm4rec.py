"""The extended tokenizer: the published demo, ordinary text untouched, plain loading, refusals."""

import copy
import gzip
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from modeling_cllm4rec.tokenization_cllm4rec import (
    TokenizerWithUserItemIDTokens,
    resize_id_words,
    train_byte_level_bpe,
)

LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHAPES = ["gpt2", "llama3", "smollm2"]
DEMO = "Hello, user_1! Have you seen item_2?"
ORDINARY = [
    "",
    " ",
    "Hello, users! Have you seen the items?",
    "It's hard to believe we'll hear what they've done; I'd say it isn't. DON'T!",
    "  two leading spaces, three   inside and trailing  ",
    "tabs\tand\n\nlines \n \r\n end\n",
    "1 12 123 1234 12345678 3.14 ² ½ ① 2nd x9y",
    "Ünïcödé naïve café cafe\u0301 中文字符 ひらがな 한국어 עברית 🙂👩‍👩‍👧 \u00a0 \u3000 \ufdd0",
    "snake_case_1, items_2, user-1, user 1, user_, _user_, (user_x) User_1 USER_1 user__1",
    "<|endoftext|>Two documents<|endoftext|> in one",
]
LOOKALIKES = [
    "user_10",
    "user_12",
    "a user_12 of 10 users",
    "user_01",
    "superuser_1",
    "item_2x",
    "item_2_",
    "_item_2",
    "user_1é",
    "éuser_1",
    "user_-1",
    "user_\u0661",
    "user_1item_2",
    "中user_1",
]


def train(shape, num_words=600):
    """A small backbone tokenizer of one of the three shapes that byte-level BPE comes in."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=shape != "llama3")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = {
        "gpt2": byte_level,
        "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated"), byte_level]),
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }[shape]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_words,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[] if shape == "llama3" else ["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ORDINARY, *LOOKALIKES, DEMO] * 3, trainer)
    if shape != "llama3":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|endoftext|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        model_max_length=512,
        padding_side="left",
        chat_template="{{ messages }}",
    )


@pytest.fixture(scope="module")
def backbones():
    return {shape: train(shape) for shape in SHAPES}


@pytest.fixture(scope="module")
def extended(backbones):
    return {
        shape: TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=10, num_items=20)
        for shape, backbone in backbones.items()
    }


@pytest.fixture(params=SHAPES)
def backbone(request, backbones):
    return backbones[request.param]


@pytest.fixture(params=SHAPES)
def tokenizer(request, extended):
    return extended[request.param]


@pytest.fixture(scope="module")
def gpt2():
    folder = Path(os.environ.get("CLLM4REC_DATA", "")) / "gpt2-tokenizer"
    if "CLLM4REC_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("CLLM4REC_DATA names no folder with gpt2-tokenizer/ in it")
    return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def extended_gpt2(gpt2):
    return TokenizerWithUserItemIDTokens.from_backbone(gpt2, num_users=10, num_items=10)


def test_published_demo_holds_to_the_letter(extended_gpt2):
    tokenizer = extended_gpt2
    assert tokenizer.tokenize(DEMO) == ["Hello", ",", "user_1", "!", "ĠHave", "Ġyou", "Ġseen", "item_2", "?"]
    assert tokenizer.encode(DEMO) == [15496, 11, 50258, 0, 8192, 345, 1775, 50269, 30]
    assert tokenizer.decode(tokenizer.encode(DEMO)) == DEMO


def test_reviews_keep_the_ids_of_gpt2(gpt2, extended_gpt2):
    reviews_file = Path(os.environ["CLLM4REC_DATA"]) / "digital-music" / "reviews.jsonl.gz"
    with gzip.open(reviews_file, "rt", encoding="utf-8") as lines:
        reviews = [json.loads(line)["reviewText"] for line, _ in zip(lines, range(200), strict=False)]
    assert extended_gpt2(reviews)["input_ids"] == gpt2(reviews)["input_ids"]


def test_demo_sentence_has_one_token_for_each_id_word(tokenizer, backbone):
    ids = tokenizer.encode(DEMO, add_special_tokens=False)
    user, item = tokenizer.user_id(1), tokenizer.item_id(2)
    at_user, at_item = ids.index(user), ids.index(item)
    assert tokenizer.decode(ids[:at_user]) == "Hello,"
    assert tokenizer.decode(ids[at_user + 1 : at_item]) == "! Have you seen"
    assert tokenizer.decode(ids[at_item + 1 :]) == "?"
    assert tokenizer.convert_ids_to_tokens([user, item]) == ["user_1", "item_2"]
    assert tokenizer.decode(ids) == DEMO


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ORDINARY + LOOKALIKES)
def test_ordinary_text_keeps_its_ids(shape, text, backbones, extended):
    ids = backbones[shape].encode(text)
    assert extended[shape].encode(text) == ids
    assert extended[shape].decode(ids) == backbones[shape].decode(ids)


@pytest.mark.parametrize("shape", SHAPES)
def test_characters_of_all_kinds_keep_their_ids(shape, backbones, extended):
    codes = [*range(1, 0x300), *range(0x300, 0xD800, 61), *range(0xE000, 0x20000, 61)]
    texts = [f"a{chr(code)}1 {chr(code)}" for code in codes]
    assert extended[shape](texts)["input_ids"] == backbones[shape](texts)["input_ids"]


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 99, 100, 101, 345, 1000, 1023])
def test_exactly_the_numbers_below_the_count_are_id_words(count, backbones):
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(backbones["gpt2"], num_users=count, num_items=1)
    encoded = tokenizer([f"user_{number}" for number in range(count + 1200)])["input_ids"]
    assert [ids[0] for ids in encoded[:count]] == list(range(tokenizer.num_words, tokenizer.num_words + count))
    assert all(len(ids) == 1 for ids in encoded[:count])
    assert all(max(ids) < tokenizer.num_words for ids in encoded[count:])


def test_neighbouring_id_words_are_two_tokens_and_decode_with_the_space(tokenizer):
    ids = tokenizer.encode("item_1 item_2", add_special_tokens=False)
    assert ids == tokenizer.item_id([1, 2])
    assert tokenizer.decode(ids) == "item_1 item_2"


@pytest.mark.parametrize(
    "text",
    [
        "user_1",
        " user_1",
        "  user_1 and   item_2 ",
        "user_1\n\nitem_2\titem_3",
        "(user_1) [item_2] {item_3} <item_4>",
        "\"user_1\" 'item_2' “user_3” \u2018item_4\u2019 «item_5»",
        'He said "fine" user_1',
        "user_1's review of item_2, item_3; item_4. item_5… item_6 — item_7 & item_8",
        "user_1/item_2 @user_3 #item_4",
        "<|endoftext|>user_1 item_2<|endoftext|>user_3",
        "user_1 user_12 item_2",
    ],
)
def test_text_with_id_words_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_an_id_word_after_a_bracket_is_one_token(tokenizer):
    assert tokenizer.user_id(1) in tokenizer.encode("(user_1)")
    assert tokenizer.item_id(2) in tokenizer.encode("“item_2”")


def test_word_ids_come_first_then_users_then_items(tokenizer, backbone, extended):
    assert tokenizer.num_words == max(tokenizer.get_vocab().values()) + 1 - 30
    assert (tokenizer.num_users, tokenizer.num_items) == (10, 20)
    assert len(tokenizer) == tokenizer.num_words + 30
    assert tokenizer.convert_tokens_to_ids(["user_0", "user_9", "item_0", "item_19"]) == [
        tokenizer.num_words,
        tokenizer.num_words + 9,
        tokenizer.num_words + 10,
        tokenizer.num_words + 29,
    ]


def test_number_of_words_is_the_size_of_the_backbone(backbones, extended):
    assert {shape: len(backbones[shape]) for shape in SHAPES} == {shape: extended[shape].num_words for shape in SHAPES}


def test_padded_vocabulary_is_filled_with_unreachable_words(backbone):
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=3, num_items=3, num_words=700)
    assert tokenizer.user_id(0) == tokenizer.convert_tokens_to_ids("user_0") == 700
    assert len(tokenizer) == 706
    filler = tokenizer.convert_ids_to_tokens(699)
    assert tokenizer.encode(filler) == backbone.encode(filler)


def test_gaps_between_the_ids_of_the_backbone_are_filled(backbones):
    state = json.loads(backbones["gpt2"].backend_tokenizer.to_str())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][last] += 40
    gappy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(gappy, num_users=1, num_items=1)
    assert tokenizer.num_words == state["model"]["vocab"][last] + 1 == len(tokenizer) - 2
    assert tokenizer.convert_tokens_to_ids(last) == state["model"]["vocab"][last]


def test_tokens_added_later_come_after_the_id_words(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    end = len(tokenizer)
    tokenizer.add_special_tokens({"sep_token": "<|sep|>"})
    tokenizer.add_tokens(["zebra"])
    assert (tokenizer.sep_token_id, tokenizer.convert_tokens_to_ids("zebra")) == (end, end + 1)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("<|sep|>user_0", add_special_tokens=False) == [end, tokenizer.user_id(0)]
    assert loaded.encode("zebra", add_special_tokens=False) == [end + 1]
    assert loaded.decode([end, tokenizer.user_id(0)]) == "<|sep|>user_0"


def test_saved_folder_opens_with_plain_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    remote = {"model_type": "cllm4rec", "auto_map": {"AutoConfig": "configuration_cllm4rec.CLLM4RecConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(remote))
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(loaded) is PreTrainedTokenizerFast
    texts = [DEMO, *ORDINARY, *LOOKALIKES]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded.decode(loaded.encode(DEMO), skip_special_tokens=True) == DEMO
    assert len(loaded) == len(tokenizer)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert not list(tmp_path.glob("*.py"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {int(id) for id in config["added_tokens_decoder"]} == tokenizer.added_tokens_decoder.keys()
    assert "\n" not in (tmp_path / "tokenizer.json").read_text()


def test_loaded_with_its_own_class_it_knows_its_numbers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = TokenizerWithUserItemIDTokens.from_pretrained(tmp_path)
    assert type(loaded) is TokenizerWithUserItemIDTokens
    assert (loaded.num_words, loaded.num_users, loaded.num_items) == (tokenizer.num_words, 10, 20)
    assert loaded.item_id(19) == loaded.convert_tokens_to_ids("item_19")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_file_name_prefix_is_kept(extended, tmp_path):
    names = [Path(name).name for name in extended["gpt2"].save_pretrained(tmp_path, filename_prefix="mine")]
    assert sorted(names) == ["mine-tokenizer.json", "mine-tokenizer_config.json"]
    assert all((tmp_path / name).is_file() for name in names)


def test_backbone_may_be_a_folder(backbones, extended, tmp_path):
    backbones["gpt2"].save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        tokenizer = TokenizerWithUserItemIDTokens.from_backbone(folder, num_users=10, num_items=20, padding_side="left")
        assert tokenizer.encode(DEMO) == extended["gpt2"].encode(DEMO)
        assert tokenizer.padding_side == "left"


def test_post_processor_and_settings_of_the_backbone_are_kept(backbones, extended, tmp_path):
    backbone, tokenizer = backbones["llama3"], extended["llama3"]
    tokenizer.save_pretrained(tmp_path)
    bos = backbone.bos_token_id
    for kept in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert kept.encode("user_3") == [bos, tokenizer.user_id(3)]
        assert kept("user_3", "item_4")["input_ids"] == [bos, tokenizer.user_id(3), bos, tokenizer.item_id(4)]
        assert kept.encode("user_3", add_special_tokens=False) == [tokenizer.user_id(3)]
        assert (kept.bos_token_id, kept.eos_token_id) == (bos, backbone.eos_token_id)
        assert (kept.model_max_length, kept.padding_side) == (512, "left")
        assert kept.chat_template == "{{ messages }}"


def test_extending_leaves_the_backbone_as_it_was(backbones):
    backbone = backbones["smollm2"]
    before = backbone.backend_tokenizer.to_str()
    TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=2, num_items=2)
    assert backbone.backend_tokenizer.to_str() == before


def test_an_earlier_call_of_the_backbone_leaves_no_truncation_behind(backbones):
    backbone = copy.deepcopy(backbones["gpt2"])
    backbone.pad_token = "<|endoftext|>"
    backbone(["a", "b c"], padding="max_length", truncation=True, max_length=2)
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=5, num_items=1)
    assert tokenizer.backend_tokenizer.encode("user_1 user_2 user_3").ids == tokenizer.user_id([1, 2, 3])
    assert not {"max_length", "truncation_strategy"} & tokenizer.init_kwargs.keys()


def test_batches_are_padded_with_the_end_of_text_and_truncated(extended):
    tokenizer = extended["gpt2"]
    assert tokenizer.pad_token == "<|endoftext|>"
    batch = tokenizer(["user_1", "user_1 item_2 item_3 item_4"], padding=True, truncation=True, max_length=3)
    pad, user, items = tokenizer.pad_token_id, tokenizer.user_id(1), tokenizer.item_id([2, 3])
    assert batch["input_ids"] == [[user, pad, pad], [user, *items]]
    assert batch["attention_mask"] == [[1, 0, 0], [1, 1, 1]]
    left = tokenizer(["user_1", "user_1 item_2"], padding=True, padding_side="left", return_tensors="pt")
    assert left["input_ids"].tolist() == [[pad, user], [user, items[0]]]


def test_offsets_point_at_the_id_words(tokenizer):
    encoding = tokenizer(DEMO, return_offsets_mapping=True)
    at_item = encoding["input_ids"].index(tokenizer.item_id(2))
    start, end = encoding["offset_mapping"][at_item]
    assert DEMO[start:end] == "item_2"


def test_indices_and_ids_convert_both_ways(extended):
    tokenizer = extended["gpt2"]
    n = tokenizer.num_words
    assert (tokenizer.user_id(3), tokenizer.item_id(3)) == (n + 3, n + 13)
    assert (tokenizer.user_index(n + 3), tokenizer.item_index(n + 13)) == (3, 3)
    assert tokenizer.item_id([0, 19]) == [n + 10, n + 29]
    assert tokenizer.item_id(np.int32(4)) == n + 14
    array = tokenizer.item_id(np.array([[0, 1], [2, 19]], dtype=np.uint8))
    assert array.dtype == np.int64
    np.testing.assert_array_equal(array, [[n + 10, n + 11], [n + 12, n + 29]])
    np.testing.assert_array_equal(tokenizer.item_index(array), [[0, 1], [2, 19]])
    tensor = tokenizer.user_id(torch.tensor([0, 9], dtype=torch.int8))
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [n, n + 9]
    assert tokenizer.user_index(tensor).tolist() == [0, 9]
    assert tokenizer.user_id([]) == []
    assert tokenizer.user_id(np.array([], dtype=np.int64)).shape == (0,)


def test_kinds_of_ids_are_told_apart(extended):
    tokenizer = extended["gpt2"]
    n = tokenizer.num_words
    ids = [n - 1, n, n + 9, n + 10, n + 29, n + 30]
    assert tokenizer.is_user(ids) == [False, True, True, False, False, False]
    assert tokenizer.is_item(np.array(ids)).tolist() == [False, False, False, True, True, False]
    assert tokenizer.is_item(torch.tensor(ids)).tolist() == [False, False, False, True, True, False]
    assert tokenizer.is_user(n) is True


@pytest.mark.parametrize("wrong", [10, -1, [0, 10], np.array([3, 10]), torch.tensor([[0], [10]]), np.array([-1])])
def test_an_index_out_of_range_names_itself_and_the_range(extended, wrong):
    with pytest.raises(ValueError, match=r"^(10|-1) is not a user index: there are 10, from 0 to 9$"):
        extended["gpt2"].user_id(wrong)


def test_a_token_id_of_another_kind_is_refused(extended):
    tokenizer = extended["gpt2"]
    with pytest.raises(ValueError, match="is not the token id of a user: there are 10"):
        tokenizer.user_index(tokenizer.item_id(0))
    with pytest.raises(ValueError, match="is not the token id of an item: there are 20"):
        tokenizer.item_index([tokenizer.user_id(9)])


@pytest.mark.parametrize("wrong", [1.0, "1", np.array([1.0]), torch.tensor([1.0]), np.array([True])])
def test_what_is_no_integer_is_refused(extended, wrong):
    with pytest.raises(TypeError, match="integer"):
        extended["gpt2"].user_id(wrong)


def test_a_tokenizer_without_id_words_says_how_to_make_one(backbones, tmp_path):
    backbones["gpt2"].save_pretrained(tmp_path)
    plain = TokenizerWithUserItemIDTokens.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this tokenizer has no num_users: it was not made by .*\.from_backbone"):
        plain.user_id(0)


def changed(backbone, change):
    state = json.loads(backbone.backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def with_pre_tokenizer(step):
    return lambda backbone: changed(
        backbone,
        lambda state: state.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [step, state["pre_tokenizer"]]},
        ),
    )


def with_model(**fields):
    return lambda backbone: changed(backbone, lambda state: state["model"].update(fields))


def word_piece(_):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


def unigram(_):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))


def sentence_piece(backbone):
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return changed(backbone, lambda state: state.update(pre_tokenizer=metaspace, decoder=metaspace))


def prefix_space(backbone):
    return changed(backbone, lambda state: state["pre_tokenizer"].update(add_prefix_space=True))


def characters(backbone):
    return changed(backbone, lambda state: state.update(pre_tokenizer={"type": "Whitespace"}))


def extended_once(backbone):
    return TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=1, num_items=1)


def extended_and_loaded_plainly(backbone):
    return PreTrainedTokenizerFast(tokenizer_object=extended_once(backbone).backend_tokenizer)


def with_a_word_named_like_an_item(backbone):
    return changed(backbone, lambda state: state["model"]["vocab"].update(item_3=len(state["model"]["vocab"])))


def with_an_unreachable_word(backbone):
    return changed(backbone, lambda state: state["model"]["vocab"].update(qzx=len(state["model"]["vocab"])))


def with_a_shared_id(backbone):
    state = json.loads(backbone.backend_tokenizer.to_str())
    state["model"]["vocab"]["qzx"] = 5
    with tempfile.TemporaryDirectory() as folder:  # a copy of a Tokenizer object would lose one of the two words
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state))
        return PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")


def with_an_added_token_inside_id_words(backbone):
    backbone = copy.deepcopy(backbone)
    backbone.add_tokens([AddedToken("item", normalized=False)])
    return backbone


class SlowTokenizer(PreTrainedTokenizer):
    @property
    def vocab_size(self):
        return 1

    def get_vocab(self):
        return {"a": 0}


def slow(_):
    return SlowTokenizer()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (slow, "SlowTokenizer is not a fast tokenizer"),
        (word_piece, "its model is WordPiece, but a byte-level BPE"),
        (unigram, "its model is Unigram, but a byte-level BPE"),
        (sentence_piece, "it is a SentencePiece model"),
        (with_model(byte_fallback=True), "it is a SentencePiece model"),
        (characters, "it has no ByteLevel pre-tokenizer"),
        (prefix_space, "load it with add_prefix_space=False"),
        (with_model(end_of_word_suffix="</w>"), "prefix or suffix"),
        (with_model(dropout=0.1), "its merges are random"),
        (with_pre_tokenizer({"type": "Punctuation", "behavior": "Isolated"}), "the step Punctuation of its pre-token"),
        (
            with_pre_tokenizer({"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}),
            "the step Split of its pre-tokenizer would cut ID words",
        ),
        (extended_once, "it has user_0 or item_0 already"),
        (extended_and_loaded_plainly, "it has user_0 or item_0 already"),
        (with_a_word_named_like_an_item, "'item_3' is one of its words already"),
        (with_an_unreachable_word, "its merges do not lead to its word 'qzx'"),
        (with_a_shared_id, "some of its words share an id"),
        (with_an_added_token_inside_id_words, "an added token, its normalizer"),
    ],
)
def test_a_backbone_that_cannot_be_extended_is_refused_with_the_reason(make, sentence, backbones):
    unfit = make(backbones["gpt2"])
    with pytest.raises(ValueError, match=r"^user and item ids cannot be added to this tokenizer: ") as refusal:
        TokenizerWithUserItemIDTokens.from_backbone(unfit, num_users=10, num_items=10)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"num_users": 0, "num_items": 1}, "num_users is 0"),
        ({"num_users": 1, "num_items": -2}, "num_items is -2"),
        ({"num_users": 1, "num_items": 1, "num_words": 20}, "num_words is 20, but the tokenizer has ids up to"),
    ],
)
def test_numbers_out_of_range_are_refused(backbones, numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        TokenizerWithUserItemIDTokens.from_backbone(backbones["gpt2"], **numbers)


def test_loading_options_beside_a_tokenizer_are_refused(backbones):
    with pytest.raises(TypeError, match="revision"):
        TokenizerWithUserItemIDTokens.from_backbone(backbones["gpt2"], num_users=1, num_items=1, revision="main")


def test_other_isolating_splits_are_kept(backbones):
    comma = {"type": "Split", "pattern": {"String": "o"}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": False}
    backbone = with_pre_tokenizer(digits)(with_pre_tokenizer(comma)(backbones["gpt2"]))
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=10, num_items=10)
    texts = [*ORDINARY, *LOOKALIKES]
    assert tokenizer(texts)["input_ids"] == backbone(texts)["input_ids"]
    assert tokenizer.encode("user_1 item_2") == [tokenizer.user_id(1), tokenizer.item_id(2)]


def test_trained_bpe_is_the_same_for_the_same_texts_and_serves_as_backbone():
    texts = [*ORDINARY, DEMO] * 5
    first, second = (train_byte_level_bpe(iter(texts), 300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 300
    assert (first.bos_token_id, first.eos_token_id, first.pad_token_id) == (0, 0, 0)
    for text in ORDINARY:
        assert first.decode(first.encode(text)) == text
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(first, num_users=10, num_items=10)
    assert tokenizer.decode(tokenizer.encode(DEMO)) == DEMO
    assert tokenizer.user_id(0) == 300


def test_trained_bpe_is_smaller_where_the_text_is_small():
    tokenizer = train_byte_level_bpe(["abab"], 1000)
    assert len(tokenizer) == 258
    assert tokenizer.tokenize("abab ab") == ["ab", "ab", "Ġ", "ab"]
    assert len(train_byte_level_bpe([], 1000)) == 257


def test_trained_bpe_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match=r"num_words is 256, but the bytes and <\|endoftext\|> alone are 257"):
        train_byte_level_bpe(["text"], 256)


@pytest.mark.slow
def test_two_million_id_words_load_within_eight_seconds(backbones, tmp_path):
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(backbones["gpt2"], num_users=1_200_000, num_items=800_000)
    tokenizer.save_pretrained(tmp_path)
    seconds = []
    for _ in range(2):  # the better of two: other tests may share the cores
        start = time.perf_counter()
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 8
    assert loaded.encode("user_1199999 item_799999") == [tokenizer.user_id(1_199_999), tokenizer.item_id(799_999)]
    assert (tmp_path / "tokenizer.json").stat().st_size < 50e6


@pytest.mark.parametrize("as_saved", [False, True])
@pytest.mark.parametrize(("num_users", "num_items"), [(12, 31), (10, 20), (3, 2), (1234, 1)])
def test_id_words_of_other_numbers_of_users_and_items(backbone, tmp_path, as_saved, num_users, num_items):
    before = TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=10, num_items=20)
    if as_saved:
        before.save_pretrained(tmp_path)
        before = AutoTokenizer.from_pretrained(tmp_path)
    resized = resize_id_words(before, num_users=num_users, num_items=num_items)
    fresh = TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=num_users, num_items=num_items)
    text = "Hello, user_1! Have you seen item_2, user_11 or item_30? user_0 has (item_0)."
    assert resized.encode(text) == fresh.encode(text)
    assert resized.decode(resized.encode(text)) == fresh.decode(fresh.encode(text))
    assert resized.get_vocab() == fresh.get_vocab()
    assert (resized.num_users, resized.num_items, len(resized)) == (num_users, num_items, len(fresh))
    assert resized.special_tokens_map == fresh.special_tokens_map


def test_id_words_that_cannot_be_counted_anew(backbone):
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=10, num_items=20)
    with pytest.raises(ValueError, match="at least one of each"):
        resize_id_words(tokenizer, num_users=0, num_items=1)
    tokenizer.add_tokens(["<late>"])
    with pytest.raises(ValueError, match="added behind the ID words"):
        resize_id_words(tokenizer, num_users=11, num_items=20)
    with pytest.raises(ValueError, match="has no ID words"):
        resize_id_words(train_byte_level_bpe([], 257), num_users=1, num_items=1)
