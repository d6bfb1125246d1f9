"""Raw user ids in files that are about to be published."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import pre_tokenizers

from training.data.vocabulary import telling_ids

WORD = re.compile(r"\w+")
# In JSON a line break is two characters, of which the second would stick to the word behind it.
JSON_BREAK = re.compile(r'(\\["\\/])|\\[bfnrt]')
JSON_FILES = (".json", ".jsonl")
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPACE_IN_WORDS = "Ġ"
BLOCK_BYTES = 1 << 24
SHOWN = 5


def found_user_ids(
    files: Mapping[str, Path | bytes], user_ids: Iterable[str | int]
) -> tuple[dict[str, list[str]], int]:
    """Look for raw user ids as whole words in files, each read once.

    Text, JSON and Parquet are read as what they are, of safetensors the header, anything else as it stands. Ids that are plain
    numbers or shorter than four characters are not looked for: they stand anywhere by chance.

    Args:
        files: Name, whose ending tells the kind, to file or content.
        user_ids: The raw ids.

    Returns:
        Up to five of the ids that stand in it for each file that holds any, and the number of ids looked for.
    """
    sought = UserIds(user_ids)
    found: dict[str, list[str]] = {}
    for name, content in files.items():
        here: set[str] = set()
        for block in text_blocks(name, content) if sought else ():
            here |= sought.found_in(block)
            if len(here) >= SHOWN:
                break
        if here:
            found[name] = sorted(here)[:SHOWN]
    return found, len(sought)


class UserIds:
    """Raw user ids, ready to be looked for in texts of any length: the cost is that of the text's words, however many ids."""

    def __init__(self, user_ids: Iterable[str | int]) -> None:
        ids = telling_ids(user_ids)
        self.number = len(ids)
        self.words = {raw for raw in ids if WORD.fullmatch(raw)}
        # A word of ASCII is written the same everywhere, and most ids of a large table are.
        forms = {
            form: raw
            for raw in ids
            if not (raw.isascii() and raw in self.words)
            for form in written_forms(raw)
            if form not in self.words
        }
        words_of = {form: list(WORD.finditer(form)) for form in forms}
        counts = Counter(word[0] for words in words_of.values() for word in words)
        # An id of several words is looked for where its rarest word stands; of ids without any, everywhere.
        self.forms: dict[str, list[tuple[int, str, str]]] = {}
        self.wordless: dict[str, str] = {}
        for form, raw in forms.items():
            if not words_of[form]:
                self.wordless[form] = raw
                continue
            rarest = min(words_of[form], key=lambda word: counts[word[0]])
            self.forms.setdefault(rarest[0], []).append((rarest.start(), form, raw))

    def __len__(self) -> int:
        return self.number

    def found_in(self, text: str) -> set[str]:
        """The ids that stand in a text as whole words."""
        words = set(WORD.findall(text))
        found = words & self.words
        if not self.forms.keys().isdisjoint(words):
            found.update(raw for _, _, raw in self._places_of_forms(text))
        found.update(raw for form, raw in self.wordless.items() if form in text)
        return found

    def replaced(self, text: str, by: str) -> str:
        """A text with `by` in the place of each id that stands in it as a whole word."""
        if not self.found_in(text):
            return text
        places = [(word.start(), word.end()) for word in WORD.finditer(text) if word[0] in self.words]
        places += [(start, end) for start, end, _ in self._places_of_forms(text)]
        places += [place.span() for form in self.wordless for place in re.finditer(re.escape(form), text)]
        parts, last = [], 0
        for start, end in sorted(places):
            if end > last:
                parts += [text[last:start], by] if start >= last else []
                last = end
        return "".join([*parts, text[last:]])

    def _places_of_forms(self, text: str) -> Iterator[tuple[int, int, str]]:
        for word in WORD.finditer(text):
            for offset, form, raw in self.forms.get(word[0], ()):
                start = word.start() - offset
                end = start + len(form)
                if start >= 0 and text.startswith(form, start) and is_whole(text, start, end):
                    yield start, end, raw


def is_whole(text: str, start: int, end: int) -> bool:
    """Whether a part of a text neither begins nor ends within a word."""
    inner = text[start : start + 1] + text[end - 1 : end]
    outer = text[start - 1 : start] if start else "", text[end : end + 1]
    return not any(WORD.match(a) and WORD.match(b) for a, b in zip(inner, outer, strict=True))


def written_forms(raw: str) -> set[str]:
    """How an id may stand in a file: as it is, as JSON writes it, and as a byte-level vocabulary does."""
    forms = {raw, json.dumps(raw)[1:-1]}
    if not raw.isascii():
        ((bytes_in_words, _),) = BYTE_LEVEL.pre_tokenize_str(raw)
        forms |= {json.dumps(raw, ensure_ascii=False)[1:-1], bytes_in_words.replace(SPACE_IN_WORDS, " ")}
    return forms


def text_blocks(name: str, content: Path | bytes) -> Iterator[str]:
    """What a file holds in words, in blocks of whole lines."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if name.endswith(".parquet"):
            yield from parquet_texts(file)
        elif name.endswith(".safetensors"):
            yield file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", "replace")
        else:
            is_json = name.endswith(JSON_FILES)
            while lines := file.readlines(BLOCK_BYTES):
                text = b"".join(lines).decode("utf-8", "replace")
                if is_json:
                    text = text.replace(SPACE_IN_WORDS, " ")
                    if "\\" in text:
                        text = JSON_BREAK.sub(lambda found: found[1] or "  ", text)
                yield text


def parquet_texts(file: BinaryIO) -> Iterator[str]:
    """The texts of a Parquet file, its metadata first."""
    parquet = pq.ParquetFile(file)
    yield str(parquet.schema_arrow)
    columns = [field.name for field in parquet.schema_arrow if field.type in (pa.string(), pa.large_string())]
    for batch in parquet.iter_batches(columns=columns) if columns else ():
        for column in batch.columns:
            yield "\n".join(text for text in column.to_pylist() if text)
