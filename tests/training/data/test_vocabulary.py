import logging

import pytest

from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe
from training.data.vocabulary import any_of, ids_in_words, telling_ids, train_vocabulary

TEXTS = [" zorblax sent a parcel", " zorblax sent a letter", " quibbler sent a parcel"] * 9


def words(tokenizer):
    return {tokenizer.decode([id]).strip() for id in tokenizer.get_vocab().values()}


def train(user_ids, *, texts=TEXTS, num_words=320, publish_users=False):
    return train_vocabulary(lambda: iter(texts), num_words, user_ids, publish_users=publish_users)


def test_ids_that_are_plain_numbers_or_short_tell_nothing():
    ids = ["ann", "anna", 12345, "12345", "-1.5", "1,000", "+4412345", "B00X", " jo anne ", "20-20", "...."]
    assert telling_ids(ids) == {"anna", "B00X", "jo anne", "20-20", "...."}


def test_no_word_holds_a_raw_user_id_and_the_log_tells_how_many(caplog):
    with caplog.at_level(logging.INFO):
        tokenizer, number = train(["zorblax", "quibbler", "nobody"])
    assert not any("zorblax" in word or "quibbler" in word for word in words(tokenizer))
    assert {"sent", "parcel", "letter"} <= words(tokenizer)
    assert number == 2
    assert "2 raw user ids that the texts hold were kept out" in caplog.text


def test_published_ids_may_be_words():
    tokenizer, number = train(["zorblax", "quibbler"], publish_users=True)
    assert {"zorblax", "quibbler"} <= words(tokenizer)
    assert number == 2


@pytest.mark.parametrize("user_ids", [["nobody", "letters"], ["sen", 42, "42"], []])
def test_where_no_word_holds_an_id_the_vocabulary_is_as_without_the_search(user_ids):
    tokenizer, number = train(user_ids)
    assert tokenizer.get_vocab() == train_byte_level_bpe(TEXTS, 320).get_vocab()
    assert number == 0


def test_an_id_that_becomes_a_word_once_another_is_left_out_is_left_out_too():
    texts = [" zorblax"] * 9 + [" quibbler"] * 5
    assert ids_in_words(train_byte_level_bpe(texts, 267), {"quibbler"}) == set()
    tokenizer, number = train(["zorblax", "quibbler"], texts=texts, num_words=267)
    assert ids_in_words(tokenizer, {"zorblax", "quibbler"}) == set()
    assert number == 2


def test_an_id_within_a_longer_word_counts():
    tokenizer, number = train(["zorblax"], texts=[" prezorblaxian things"] * 3)
    assert number == 1
    assert not any("zorblax" in word for word in words(tokenizer))


def test_an_id_of_other_letters_than_ascii_is_found():
    tokenizer, number = train(["müßiggänger"], texts=[" der müßiggänger kam"] * 3)
    assert number == 1
    assert not any("müßiggänger" in word for word in words(tokenizer))


def test_a_special_token_that_looks_like_an_id_ends_the_search():
    assert train(["endoftext", "text"])[1] == 0


def test_the_longest_of_many_words_is_taken_out_at_a_place():
    pattern = any_of(["abc", "abcde", "ab.d", "xyz", "x"])
    assert pattern.sub("-", "abcdef abcd ab.d abXd xyz xy") == "-f -d - abXd - -y"
    many = any_of(f"name{number}" for number in range(5000))
    assert many.sub("-", "name4999 name5000 name12x") == "- -0 -x"
