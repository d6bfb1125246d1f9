"""What the serving benchmark encodes and asks."""

import json

import numpy as np
from transformers import AutoTokenizer

from benchmarks import sets
from benchmarks.serving import encodes, make_tokenizer, random_histories, texts_with_ids


def test_texts_name_a_user_and_an_item_each_and_then_the_samples_sentences():
    texts = texts_with_ids(50, 2000)
    assert texts == texts_with_ids(50, 2000)
    ids = {
        int(word.strip(":").split("_")[1]) for text in texts for word in text.split() if word[:5] in ("user_", "item_")
    }
    assert ids == set(range(50))
    assert texts[0].split(": ", 1)[1] == texts[1576].split(": ", 1)[1]  # 485 libraries, 1,091 projects
    assert len({text.split(": ", 1)[1] for text in texts}) > 1000


def test_histories_hold_ten_different_items_of_the_catalogue():
    histories = np.array(random_histories(11, 30))
    assert histories.shape == (30, 10)
    assert all(len(set(row)) == 10 for row in histories.tolist())
    assert set(histories.ravel().tolist()) == set(range(11))
    assert random_histories(11, 30, seed=1) != histories.tolist()


def test_the_tokenizer_with_id_words_encodes_the_texts_in_fewer_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM4REC_DATA", str(tmp_path / "none"))
    monkeypatch.setattr(sets, "NUM_WORDS", 1000)
    monkeypatch.setattr("benchmarks.serving.TEXTS", 20)
    words = make_tokenizer(tmp_path, 400)
    texts = json.loads((tmp_path / "texts.json").read_text())
    assert len(texts) == 20
    extended = AutoTokenizer.from_pretrained(tmp_path / "extended")
    assert len(extended) == len(AutoTokenizer.from_pretrained(words)) + 400
    assert extended.convert_ids_to_tokens(len(extended) - 1) == "item_199"
    tokens, of_words = encodes(tmp_path / "extended", "tokens")(), encodes(words, "tokens")()
    assert tokens < of_words
    assert encodes(words, "characters")() == sum(map(len, texts))
