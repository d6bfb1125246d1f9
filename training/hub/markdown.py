"""Values as they stand on a page: text that cannot break it, numbers that people read.

Text from data goes through [`text`] or [`code`] in sentences and tables, and through [`fenced`] in blocks.
"""

import re

# As character references these are never markup, neither in a table nor in HTML, and every reader of Markdown knows them.
MARKUP = re.compile(r"[&<>|`$~*\[\]\\]|(?<!\w)_|_(?!\w)")


def one_line(value: object) -> str:
    """Any text as one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def text(value: object) -> str:
    """Any text as one line of a page or cell of a table, shown as it is."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(value))


def code(value: object) -> str:
    """The same in the type of code."""
    return f"<code>{text(value)}</code>"


def cut(value: str, characters: int) -> str:
    """At most so many characters; what was cut shows as an ellipsis."""
    return value if len(value) <= characters else f"{value[: characters - 1].rstrip()}…"


def fenced(content: str, language: str = "") -> str:
    """A block of code that nothing in its content can end."""
    longest = max(map(len, re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def listed(names: list[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def whole(number: int) -> str:
    """A count with its thousands set apart."""
    return f"{number:,}"


def compact(number: float) -> str:
    """A setting in as few digits as it has."""
    return f"{number:g}"


def decimals(number: float | None, places: int = 4) -> str:
    """A figure with a fixed number of decimals, a dash for none."""
    return "-" if number is None else f"{number:.{places}f}"


def percent(share: float | None) -> str:
    """A share: whole percents, decimals where those say more, a dash for none."""
    if share is None:
        return "-"
    if 0 < share < 0.0001:
        return "under 0.01%"
    if 0.9995 <= share < 1:
        return "over 99.9%"
    if share < 0.001:
        return f"{share:.2%}" if share else "0%"
    return f"{share:.1%}" if share < 0.1 or 0.99 < share < 1 else f"{share:.0%}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def file_size(count: int) -> str:
    """Bytes in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
