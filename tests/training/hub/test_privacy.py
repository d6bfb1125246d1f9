import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe
from training.hub.privacy import UserIds, found_user_ids


def found(text, *user_ids, name="file.txt"):
    content = text if isinstance(text, bytes) else text.encode()
    return found_user_ids({name: content}, user_ids)[0].get(name, [])


@pytest.mark.parametrize("around", ["{}", "by {}, here", "“{}”", "({})", "a\n{}\n", "x-{}.y", "@{}!"])
def test_an_id_is_found_as_a_whole_word(around):
    assert found(around.format("zorblax"), "zorblax") == ["zorblax"]


@pytest.mark.parametrize("text", ["zorblaxian", "prezorblax", "zorblax_1", "zorblax9", "Zorblax", "zor blax", ""])
def test_a_part_of_a_word_is_none(text):
    assert found(text, "zorblax") == []


def test_plain_numbers_and_short_ids_are_not_looked_for_and_the_rest_is_counted():
    files = {"a.txt": b"ann 12345 -12345 1.500 zorblax"}
    assert found_user_ids(files, ["ann", 12345, "12345", "-12345", "1.500", "zorblax", "nobody"]) == (
        {"a.txt": ["zorblax"]},
        2,
    )
    assert found_user_ids(files, [1, 2, "abc"]) == ({}, 0)


@pytest.mark.parametrize(
    "raw",
    ["jo anne", "jo@anne.org", "jean-luc", "A.B.C.", "-dash-", "%%%%", "müßig", "李小龙在这", 'qu"ote', "back\\slash"],
)
@pytest.mark.parametrize("name", ["file.txt", "file.json"])
def test_ids_of_any_characters_are_found(raw, name):
    text = f"before {raw}, after"
    assert found(json.dumps({"x": text}) if name == "file.json" else text, raw, name=name) == [raw]
    assert found(json.dumps({"x": text}, ensure_ascii=False) if name == "file.json" else text, raw, name=name) == [raw]


def test_ids_of_several_words_are_found_whole_only():
    assert found("person 051, xjean-luc jean-lucas, jo anne", "person 05", "jean-luc", "jo annes") == []
    assert found("person 05; jean-luc: jo annes", "person 05", "jean-luc", "jo annes") == [
        "jean-luc", "jo annes", "person 05",
    ]  # fmt: skip


def test_the_break_before_an_id_in_json_is_no_letter_of_it():
    assert found(json.dumps({"text": "line\nzorblax\tsaid"}), "zorblax", name="items.jsonl") == ["zorblax"]
    assert found(json.dumps({"text": "\\nzorblax"}), "zorblax", name="items.jsonl") == []
    assert found(json.dumps({"text": "\\newton"}), "newton", name="items.jsonl") == ["newton"]


@pytest.mark.parametrize("raw", ["zorblax", "müßiggang"])
def test_words_of_a_vocabulary_are_found(raw, tmp_path):
    train_byte_level_bpe([f"und {raw} und {raw}"], 290).save_pretrained(tmp_path)
    assert found_user_ids({"tokenizer.json": tmp_path / "tokenizer.json"}, [raw]) == ({"tokenizer.json": [raw]}, 1)


def test_of_weights_the_header_alone_is_read(tmp_path):
    values = np.frombuffer(b" zorblax and quibbler  ".ljust(24), np.uint8)
    save_file({"quibbler": values}, tmp_path / "model.safetensors", metadata={"by": "nobody"})
    path = tmp_path / "model.safetensors"
    assert b"zorblax" in path.read_bytes()
    assert found_user_ids({"model.safetensors": path}, ["zorblax", "quibbler", "nobody"])[0] == {
        "model.safetensors": ["nobody", "quibbler"]
    }


def test_texts_of_parquet_are_read_and_its_columns_names(tmp_path):
    texts = [None, "good, says zorblax"]
    pq.write_table(pa.table({"review": texts, "quibbler": [1, 2]}), tmp_path / "t.parquet", compression="zstd")
    assert found_user_ids({"t.parquet": tmp_path / "t.parquet"}, ["zorblax", "quibbler", "good"])[0] == {
        "t.parquet": ["good", "quibbler", "zorblax"]
    }


def test_bytes_that_are_no_text_are_searched_as_they_stand():
    assert found(b"\x89PNG\r\n\xff\xfe\x00zorblax\x00\xff", "zorblax", name="picture.png") == ["zorblax"]


def test_files_are_told_apart_and_five_ids_of_each_are_shown(tmp_path):
    ids = [f"name{letter}" for letter in "abcdefg"]
    (tmp_path / "many").write_text(" ".join(ids))
    files = {"many": tmp_path / "many", "one": b"nameg", "none": b"name"}
    assert found_user_ids(files, ids) == ({"many": ids[:5], "one": ["nameg"]}, 7)


def test_a_file_of_many_blocks_is_searched_to_its_end(monkeypatch):
    monkeypatch.setattr("training.hub.privacy.BLOCK_BYTES", 8)
    assert found("zor\nblax\n" * 9 + "and zorblax\n", "zorblax") == ["zorblax"]
    assert found("zor\nblax\n" * 9, "zorblax") == []


def test_ids_are_replaced_where_they_are_whole_words():
    ids = UserIds(["zorblax", "jo anne", "jo anne smith", "%%%%"])
    text = "zorblax met jo anne smith, zorblaxian; jo anne %%%% zorblax"
    assert ids.replaced(text, "[user]") == "[user] met [user], zorblaxian; [user] [user] [user]"
    assert ids.replaced("nothing here", "[user]") == "nothing here"
