"""The vocabulary that is trained on the spot: no raw user id becomes one of its words, unless users are published."""

import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe

logger = logging.getLogger(__name__)

MIN_CHARACTERS, MIN_DIGITS = 4, 9
PLAIN_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*")


def telling_ids(user_ids: Iterable[str | int]) -> set[str]:
    """Raw ids that name somebody wherever they stand; short ones, and numbers shorter than one of a telephone, do so by chance."""
    stripped = (str(raw).strip() for raw in user_ids)
    return {
        raw
        for raw in stripped
        if len(raw) >= MIN_CHARACTERS and (not PLAIN_NUMBER.fullmatch(raw) or sum(map(str.isdigit, raw)) >= MIN_DIGITS)
    }


def train_vocabulary(
    texts: Callable[[], Iterable[str]], num_words: int, user_ids: Iterable[str | int], *, publish_users: bool
) -> tuple[PreTrainedTokenizerFast, int]:
    """Train a byte-level BPE whose words hold no raw user id that tells anything, see [`telling_ids`].

    Where a word holds one, the texts are read again without it, until no word does.

    Args:
        texts: Gives the training texts, from the start at every call.
        num_words: Size of the vocabulary.
        user_ids: Raw id of each user.
        publish_users: Whether ids may be words.

    Returns:
        The tokenizer, and the number of ids that are words of it or would have been; with 0, `publish_users` changes nothing.
    """
    ids = telling_ids(user_ids)
    tokenizer = train_byte_level_bpe(texts(), num_words)
    found = ids_in_words(tokenizer, ids)
    if publish_users or not found:
        return tokenizer, len(found)
    left_out: set[str] = set()
    while found - left_out:
        left_out |= found
        pattern = any_of(left_out)
        tokenizer = train_byte_level_bpe((pattern.sub(" ", text) for text in texts()), num_words)
        found = ids_in_words(tokenizer, ids)
    logger.info("vocabulary: %d raw user ids that the texts hold were kept out of its words", len(left_out))
    return tokenizer, len(left_out)


def ids_in_words(tokenizer: PreTrainedTokenizerFast, ids: Collection[str]) -> set[str]:
    """Those of the ids that a word of a byte-level vocabulary holds, alone or with more around them."""
    byte_level, special = decoders.ByteLevel(), set(tokenizer.get_added_vocab())
    lengths = sorted({len(raw) for raw in ids})
    found: set[str] = set()
    for word in tokenizer.get_vocab():
        if word in special:
            continue
        text = byte_level.decode([word])
        for length in lengths:
            if length > len(text):
                break
            found.update(part for i in range(len(text) - length + 1) if (part := text[i : i + length]) in ids)
    return found


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest of the words that stands at a place; it shares beginnings, so that thousands are no burden."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def written(node: dict[str, Any]) -> str:
        head = ""
        while len(node) == 1 and "" not in node:
            ((character, node),) = node.items()
            head += re.escape(character)
        after = [re.escape(character) + written(child) for character, child in sorted(node.items()) if character]
        if not after:
            return head
        return f"{head}(?:{'|'.join(after)}){'?' if '' in node else ''}"

    return re.compile(written(tree))
