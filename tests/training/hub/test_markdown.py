import re

import pytest

from training.hub.markdown import (
    code,
    compact,
    cut,
    decimals,
    duration,
    fenced,
    file_size,
    listed,
    one_line,
    percent,
    text,
    whole,
)


@pytest.mark.parametrize(
    "nasty",
    ["a|b", "`code`", "<script>", "[x](http://y)", "**bold**", "_it_", "~~no~~", "$x$", "a\\|b", "&lt;", "![i](j)"],
)
def test_text_that_is_markup_is_written_as_character_references(nasty):
    written = text(nasty)
    assert not set(written) & set("|`<>[]*~$\\")
    assert not re.search(r"(?<!\w)_|_(?!\w)", written)
    assert re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), written) == nasty


def test_plain_text_stays_as_it_is():
    assert text("Ünïcode snake_case, 50% off, {{ braces }} #1") == "Ünïcode snake_case, 50% off, {{ braces }} #1"


def test_text_of_several_lines_becomes_one():
    assert text("one\n\ntwo\r\n\tthree\x00 \x1b[0m\u2028four") == "one two three &#91;0m four"
    assert one_line(12) == "12"


def test_code_is_code_whatever_is_in_it():
    assert code("a`|`b") == "<code>a&#96;&#124;&#96;b</code>"


def test_a_block_is_ended_by_nothing_in_it():
    assert fenced("plain", "text") == "```text\nplain\n```"
    assert fenced("```\nnested ````", "yaml") == "`````yaml\n```\nnested ````\n`````"


def test_long_text_is_cut():
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcd fgh", 6) == "abcd…"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (listed(["a"]), "a"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (whole(1234567), "1,234,567"),
        (compact(0.001), "0.001"),
        (compact(5.0), "5"),
        (decimals(0.40252), "0.4025"),
        (decimals(0.5, 2), "0.50"),
        (decimals(None), "-"),
        (percent(0), "0%"),
        (percent(0.00004), "under 0.01%"),
        (percent(0.0004), "0.04%"),
        (percent(0.013), "1.3%"),
        (percent(0.126), "13%"),
        (percent(0.998), "99.8%"),
        (percent(0.9996), "over 99.9%"),
        (percent(1), "100%"),
        (percent(None), "-"),
        (duration(2.34), "2.3 s"),
        (duration(61.2), "61 s"),
        (duration(600), "10 min"),
        (duration(9000), "2.5 h"),
        (file_size(802_164_736), "802.2 MB"),
        (file_size(3_200_000_000), "3.2 GB"),
        (file_size(12_300), "12.3 kB"),
        (file_size(12), "12 bytes"),
    ],
)
def test_numbers_read_like_numbers(written, expected):
    assert written == expected
