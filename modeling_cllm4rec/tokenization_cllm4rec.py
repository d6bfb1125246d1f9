"""The tokenizer of CLLM4Rec: one token for each user and each item beside the words of a language model.

The ID words live in the BPE vocabulary itself: a saved folder opens with plain `AutoTokenizer`, without remote code.
"""

import json
import operator
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Ids = TypeVar("Ids", int, list[int], np.ndarray, torch.Tensor)

# The pattern inside tokenizers' ByteLevel(use_regex=True): GPT-2's.
BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# No space is put back after these: blanks, opening brackets and quotes, signs that cling to the next word, and the `>`
# that closes `<|endoftext|>`. A space that does stand there is a token of its own.
NO_SPACE_AFTER = "\\s(\\[{<>/@#\"'`«¿¡\u2018\u201a\u201c\u201e\u2039"
# Stands before each ID word while a text is decoded; a Unicode noncharacter, which no text holds.
MARK = "\ufdd0"


class TokenizerWithUserItemIDTokens(PreTrainedTokenizerFast):
    """A byte-level BPE tokenizer whose vocabulary goes on, after its N words, with `user_0 …` and then `item_0 …`.

    Word ids are `[0, N)`, `user_i` is `N + i`, `item_j` is `N + num_users + j`. Ordinary text keeps the ids that the
    backbone's own tokenizer gives it; so do `user_12` of 10 users, `user_01`, `superuser_1` and `item_2x`.
    The space before an ID word belongs to it: encoding drops it, decoding puts it back. Only an ID word glued to
    punctuation (`,user_1`; opening brackets and quotes excepted) comes back with a space that was not there.

    Made by [`~TokenizerWithUserItemIDTokens.from_backbone`]. A saved folder opens with `AutoTokenizer` as a plain
    `PreTrainedTokenizerFast` that encodes and decodes alike, and with this class, which also knows the arithmetic.

    Example:
        >>> tokenizer = TokenizerWithUserItemIDTokens.from_backbone("openai-community/gpt2", num_users=10, num_items=10)
        >>> tokenizer.tokenize("Hello, user_1! Have you seen item_2?")
        ['Hello', ',', 'user_1', '!', 'ĠHave', 'Ġyou', 'Ġseen', 'item_2', '?']
        >>> tokenizer.encode("Hello, user_1! Have you seen item_2?")
        [15496, 11, 50258, 0, 8192, 345, 1775, 50269, 30]
        >>> tokenizer.item_id(2)
        50269
    """

    @classmethod
    def from_backbone(
        cls,
        tokenizer_or_name: PreTrainedTokenizerFast | str | Path,
        *,
        num_users: int,
        num_items: int,
        num_words: int | None = None,
        **kwargs: Any,
    ) -> "TokenizerWithUserItemIDTokens":
        """Extend the tokenizer of a language model by `num_users` and `num_items` ID words.

        Args:
            tokenizer_or_name: the tokenizer, or the Hub name or folder that `AutoTokenizer` opens.
            num_users: number of users, at least 1.
            num_items: number of items, at least 1.
            num_words: N, the id of `user_0`. Default: the size of the backbone's vocabulary. Give the model's
                `vocab_size` where it is padded to more rows than there are words.
            **kwargs: with a name, passed on to `AutoTokenizer.from_pretrained` (`revision`, `gguf_file`, `token` …).

        Returns:
            A tokenizer of `num_words + num_users + num_items` tokens. It pads with the backbone's end-of-text token
            where the backbone has no token for padding.

        Raises:
            ValueError: a number is out of range, or the backbone is not a byte-level BPE that ID words can be added to.
        """
        if isinstance(tokenizer_or_name, (str, Path)):
            tokenizer_or_name = AutoTokenizer.from_pretrained(tokenizer_or_name, **kwargs)
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} can be given with a name only, not with a tokenizer")
        backbone = tokenizer_or_name
        num_users, num_items = operator.index(num_users), operator.index(num_items)
        for name, number in (("num_users", num_users), ("num_items", num_items)):
            if number < 1:
                raise ValueError(f"{name} is {number}, but it must be at least 1")
        if not isinstance(backbone, PreTrainedTokenizerFast):
            raise _refusal(f"{type(backbone).__name__} is not a fast tokenizer (a PreTrainedTokenizerFast)")

        state = json.loads(backbone.backend_tokenizer.to_str())
        _check_kind(state)
        vocabulary = _word_vocabulary(state, len(backbone), num_words)
        _check_merges(backbone.backend_tokenizer, state)
        num_words = len(vocabulary)
        _check_names(vocabulary, num_users, num_items)
        vocabulary |= _id_vocabulary(num_words, num_users, num_items)

        id_words = _id_pattern(num_users, num_items)
        state["model"] |= {"vocab": vocabulary, "ignore_merges": True}
        state["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": list(_pre_tokenizer_steps(state["pre_tokenizer"], id_words)),
        }
        state["decoder"] = {"type": "Sequence", "decoders": list(_decoder_steps(state["decoder"], id_words))}
        state |= {"truncation": None, "padding": None}

        counts = {"num_words": num_words, "num_users": num_users, "num_items": num_items}
        tokenizer = cls._from_state(state, **counts, **_settings(backbone))
        tokenizer._check_id_words()
        return tokenizer

    @property
    def num_words(self) -> int:
        """N, the number of word ids."""
        return self._count("num_words")

    @property
    def num_users(self) -> int:
        """The number of users."""
        return self._count("num_users")

    @property
    def num_items(self) -> int:
        """The number of items."""
        return self._count("num_items")

    def user_id(self, index: Ids) -> Ids:
        """Return the token ids of users: `N + index`.

        Args:
            index: an int, a list of ints, or an integer array or tensor of any shape, in `[0, num_users)`.

        Returns:
            The same kind and shape; arrays and tensors are int64.

        Raises:
            ValueError: an index is out of range.
        """
        return _shift(index, 0, self.num_users, self.num_words, "a user index")

    def item_id(self, index: Ids) -> Ids:
        """Return the token ids of items: `N + num_users + index`. See [`user_id`] for kinds, shapes and errors."""
        return _shift(index, 0, self.num_items, self.num_words + self.num_users, "an item index")

    def user_index(self, id: Ids) -> Ids:
        """Return the indices of the users with these token ids. See [`user_id`] for kinds, shapes and errors."""
        return _shift(id, self.num_words, self.num_users, -self.num_words, "the token id of a user")

    def item_index(self, id: Ids) -> Ids:
        """Return the indices of the items with these token ids. See [`user_id`] for kinds, shapes and errors."""
        first = self.num_words + self.num_users
        return _shift(id, first, self.num_items, -first, "the token id of an item")

    def is_user(self, id: Any) -> Any:
        """Tell which token ids are users: a bool for an int, a list for a list, else a bool array of the same shape."""
        return _within(id, self.num_words, self.num_users)

    def is_item(self, id: Any) -> Any:
        """Tell which token ids are items: a bool for an int, a list for a list, else a bool array of the same shape."""
        return _within(id, self.num_words + self.num_users, self.num_items)

    @classmethod
    def _from_state(cls, state: dict[str, Any], **settings: Any) -> "TokenizerWithUserItemIDTokens":
        # By way of a file, because a `tokenizer_object` is deep-copied, which takes as long as loading it.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_text(json.dumps(state, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
            return cls(tokenizer_file=str(file), **settings)

    def _check_id_words(self) -> None:
        user, item = self.num_users - 1, self.num_items - 1
        expected = [self.user_id(user), self.item_id(item), self.user_id(0)]
        if self.encode(f"user_{user} item_{item} user_0", add_special_tokens=False) != expected:
            raise _refusal("something in it (an added token, its normalizer) cuts ID words")

    def _count(self, name: str) -> int:
        if name not in self.init_kwargs:
            raise ValueError(f"this tokenizer has no {name}: it was not made by {type(self).__name__}.from_backbone")
        return int(self.init_kwargs[name])

    def _save_pretrained(
        self,
        save_directory: str,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        # Where this departs from the parent: the class named is one that transformers has; the added tokens are listed,
        # or else the loader parses tokenizer.json a second time to find them; and tokenizer.json is not indented.
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["added_tokens_decoder"] = {id: token.__getstate__() for id, token in self.added_tokens_decoder.items()}
        config_file.write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        tokenizer_file = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.json"
        self.backend_tokenizer.save(str(tokenizer_file), pretty=False)
        return (*file_names, str(tokenizer_file))


def counts_of(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int, int]:
    """Words, users and items of a tokenizer whose numbers of users and items can be changed.

    Raises:
        ValueError: it has no ID words, or tokens were added behind them.
    """
    counts = [tokenizer.init_kwargs.get(name) for name in ("num_words", "num_users", "num_items")]
    if None in counts:
        raise ValueError(f"this tokenizer has no ID words: it was not made by {TokenizerWithUserItemIDTokens.__name__}")
    num_words, num_users, num_items = (int(count) for count in counts)
    if len(tokenizer) > num_words + num_users + num_items:
        raise ValueError("tokens were added behind the ID words, whose ids would move; add them again afterwards")
    return num_words, num_users, num_items


def resize_id_words(
    tokenizer: PreTrainedTokenizerFast, *, num_users: int, num_items: int
) -> TokenizerWithUserItemIDTokens:
    """The same words with other numbers of users and items; the ids of items follow the last user.

    Args:
        tokenizer: A tokenizer with ID words, as this class or `AutoTokenizer` opens it.
        num_users: number of users, at least 1.
        num_items: number of items, at least 1.

    Raises:
        ValueError: it has no ID words, a number is out of range, or tokens were added behind the ID words.
    """
    num_words, old_users, old_items = counts_of(tokenizer)
    if min(num_users, num_items) < 1:
        raise ValueError(f"{num_users} users and {num_items} items; there is at least one of each")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = {word: id for word, id in state["model"]["vocab"].items() if id < num_words}
    _check_names(words, num_users, num_items)
    state["model"]["vocab"] = words | _id_vocabulary(num_words, num_users, num_items)
    before, after = (
        json.dumps(pattern)[1:-1] for pattern in (_id_pattern(old_users, old_items), _id_pattern(num_users, num_items))
    )
    for part in ("pre_tokenizer", "decoder"):
        state[part] = json.loads(json.dumps(state[part]).replace(before, after))
    resized = TokenizerWithUserItemIDTokens._from_state(
        state, num_words=num_words, num_users=num_users, num_items=num_items, **_settings(tokenizer)
    )
    resized._check_id_words()
    return resized


def train_byte_level_bpe(texts: Iterable[str], num_words: int) -> PreTrainedTokenizerFast:
    """Train a small tokenizer of GPT-2's kind, for a backbone that has none.

    Args:
        texts: the training text, piece by piece.
        num_words: size of the vocabulary with the 256 bytes and `<|endoftext|>`; where the texts hold fewer words that
            occur twice, the vocabulary is smaller.

    Returns:
        A byte-level BPE tokenizer, the same for the same texts in the same order, which begins, ends and pads texts
        with `<|endoftext|>` (id 0) when asked to.

    Raises:
        ValueError: `num_words` is below 257.
    """
    end_of_text = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if num_words <= len(alphabet):
        raise ValueError(
            f"num_words is {num_words}, but the bytes and {end_of_text} alone are {len(alphabet) + 1} words"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_words,
        min_frequency=2,
        special_tokens=[end_of_text],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end_of_text, eos_token=end_of_text, pad_token=end_of_text
    )


def _refusal(reason: str) -> ValueError:
    return ValueError(f"user and item ids cannot be added to this tokenizer: {reason}")


def _check_kind(state: dict[str, Any]) -> None:
    """Refuse what is not a byte-level BPE whose steps ID words can pass unharmed."""
    model = state["model"]
    cutting, joining = list(_steps(state["pre_tokenizer"])), list(_steps(state["decoder"]))
    byte_level = "byte-level BPE as of GPT-2, Llama 3, Qwen or SmolLM2 is needed"
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, but a {byte_level}")
    if {"user_0", "item_0"} & _words(state).keys():
        raise _refusal("it has user_0 or item_0 already; give the tokenizer of the language model itself")
    if model["byte_fallback"] or any(step["type"] == "Metaspace" for step in cutting + joining):
        raise _refusal(f"it is a SentencePiece model (Metaspace, byte fallback), but a {byte_level}")
    if not all(any(step["type"] == "ByteLevel" for step in steps) for steps in (cutting, joining)):
        raise _refusal(f"it has no ByteLevel pre-tokenizer and decoder, but a {byte_level}")
    if any(step.get("add_prefix_space") for step in cutting):
        raise _refusal("it puts a space before each text (add_prefix_space=True); load it with add_prefix_space=False")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise _refusal(f"it marks where words begin or end by a prefix or suffix, but a {byte_level}")
    if model["dropout"]:
        raise _refusal(f"its merges are random (dropout={model['dropout']})")


def _check_merges(backend: Tokenizer, state: dict[str, Any]) -> None:
    """Refuse a backbone in which `ignore_merges`, which ID words need, would change how an ordinary word is encoded."""
    if state["model"]["ignore_merges"]:
        return
    byte_level = decoders.ByteLevel()
    model, pre_tokenizer = backend.model, backend.pre_tokenizer
    added = {token["content"] for token in state["added_tokens"]}
    for word, id in state["model"]["vocab"].items():
        if word not in added and [token.id for token in model.tokenize(word)] != [id]:
            pieces = pre_tokenizer.pre_tokenize_str(byte_level.decode([word]))
            if [piece for piece, _ in pieces] == [word]:
                raise _refusal(f"its merges do not lead to its word {word!r} (id {id}), so text would get other ids")


def _words(state: dict[str, Any]) -> dict[str, int]:
    # Added tokens are pinned under their own ids: the loader renumbers those that it does not find in the model.
    return state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}


def _word_vocabulary(state: dict[str, Any], count: int, num_words: int | None) -> dict[str, int]:
    """Words and added tokens of the backbone, and a word that no text can hold for each id below N that is not in use.

    Without a gap, `len(tokenizer)` is N plus the ID words, and tokens added later come after them.
    """
    vocabulary = _words(state)
    used = set(vocabulary.values())
    if len(used) < count:  # of words that share an id, the state holds only one
        raise _refusal("some of its words share an id")
    size = max(used) + 1
    if num_words is None:
        num_words = size
    if num_words < size:
        raise ValueError(f"num_words is {num_words}, but the tokenizer has ids up to {size - 1}")
    # The space makes it unreachable: byte-level words write it as Ġ.
    return vocabulary | {f"<unused {id}>": id for id in range(num_words) if id not in used}


def _check_names(vocabulary: dict[str, int], num_users: int, num_items: int) -> None:
    counts = {"user": num_users, "item": num_items}
    for word in vocabulary:
        if not word.startswith(("user_", "item_")):
            continue
        match = re.fullmatch(r"(user|item)_(0|[1-9][0-9]*)", word)
        if match and int(match[2]) < counts[match[1]]:
            raise _refusal(f"{word!r} is one of its words already")


def _id_vocabulary(num_words: int, num_users: int, num_items: int) -> dict[str, int]:
    return {f"user_{index}": num_words + index for index in range(num_users)} | {
        f"item_{index}": num_words + num_users + index for index in range(num_items)
    }


def _id_pattern(num_users: int, num_items: int) -> str:
    return f"user_(?:{_range_pattern(num_users)})|item_(?:{_range_pattern(num_items)})"


def _range_pattern(count: int) -> str:
    """Write a regular expression for the numbers `0 … count - 1` as `str` writes them, and nothing else."""
    last = str(count - 1)
    alternatives = [last]
    if len(last) > 1:
        alternatives.append("[0-9]")
    if len(last) > 2:
        alternatives.append(f"[1-9][0-9]{{1,{len(last) - 2}}}")
    for position, digit in enumerate(last):
        least = 1 if position == 0 and len(last) > 1 else 0
        if int(digit) > least:
            rest = len(last) - position - 1
            alternatives.append(f"{last[:position]}[{least}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return "|".join(alternatives)


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Unfold the sequences of a pre-tokenizer or decoder into single steps."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step.get("pretokenizers") or step.get("decoders") or []:
            yield from _steps(inner)
    else:
        yield step


def _pre_tokenizer_steps(backbone: dict[str, Any], id_words: str) -> Iterator[dict[str, Any]]:
    """Cut ID words out first, without the space before them; then the backbone's own steps, which leave them whole."""
    whole = rf"(?<!\w)(?:{id_words})(?!\w)"
    yield _split(rf"(?<=[^{NO_SPACE_AFTER}]) (?=(?:{id_words})(?!\w))", "Removed")
    yield _split(whole)
    for step in _steps(backbone):
        kind = step["type"]
        if kind == "ByteLevel" and step["use_regex"]:
            yield _split(f"{whole}|{BYTE_LEVEL_PATTERN}")
            yield step | {"use_regex": False}
        elif kind == "ByteLevel":
            yield step
        elif kind == "Digits":
            yield _split(rf"{whole}|\p{{N}}{'' if step['individual_digits'] else '+'}")
        elif kind == "Split" and step["behavior"] == "Isolated":
            pattern = step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])
            yield _split(f"{whole}|(?:{pattern})")
        else:
            raise _refusal(f"the step {kind} of its pre-tokenizer would cut ID words")


def _split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _decoder_steps(backbone: dict[str, Any], id_words: str) -> Iterator[dict[str, Any]]:
    """Mark tokens that are ID words, decode as the backbone does, and make each mark a space where one is due."""
    mark = rf"{MARK}(?=(?:user|item)_[0-9])"
    yield _replace(rf"\A(?=(?:{id_words})\z)", MARK)
    yield from _steps(backbone)
    yield _replace(rf"(?<=[^{NO_SPACE_AFTER}]){mark}", " ")
    yield _replace(mark, "")


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _settings(backbone: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Collect what a tokenizer knows beside its tokenizer.json."""
    names = [
        "chat_control_tokens",
        "chat_template",
        "clean_up_tokenization_spaces",
        "extra_special_tokens",
        "model_input_names",
        "model_max_length",
        "padding_side",
        "response_template",
        "split_special_tokens",
        "truncation_side",
    ]
    settings = {name: getattr(backbone, name, None) for name in names} | backbone.special_tokens_map
    settings.setdefault("pad_token", backbone.eos_token)
    return {name: value for name, value in settings.items() if value not in (None, [])}


def _shift(values: Any, first: int, count: int, by: int, name: str) -> Any:
    """Return `values + by`; the values must lie in `[first, first + count)`."""
    if isinstance(values, (list, tuple)):
        return [_shift(value, first, count, by, name) for value in values]
    values = _integers(values, name)
    wrong = (values < first) | (values >= first + count)
    if wrong if isinstance(wrong, bool) else wrong.any():
        found = values if isinstance(wrong, bool) else int(values[wrong][0])
        raise ValueError(f"{found} is not {name}: there are {count}, from {first} to {first + count - 1}")
    return values + by


def _within(values: Any, first: int, count: int) -> Any:
    if isinstance(values, (list, tuple)):
        return [_within(value, first, count) for value in values]
    values = _integers(values, "a token id")
    return (values >= first) & (values < first + count)


def _integers(values: Any, name: str) -> Any:
    """Return an int, or an int64 array or tensor, so that adding N cannot overflow."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} is an integer, not {values.dtype}")
        return values.long()
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iu":
            raise TypeError(f"{name} is an integer, not {values.dtype}")
        return values.astype(np.int64)
    return operator.index(values)
