"""Recipes read, merged, overridden, described and written.

`load_recipe("sample", "paper", ["finetune.lr=1e-3"])` lays the set's file over the method's and the words over both.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import yaml

from configuration import plain_yaml
from configuration.errors import InputError
from configuration.fields import (
    allowed,
    check_combinations,
    check_range,
    convert,
    ill_valued,
    recipe_fields,
    unknown_field,
)
from configuration.recipe import Recipe

logger = logging.getLogger(__name__)

# Fields of earlier versions that recipes of finished runs may hold.
REMOVED_FIELDS = frozenset({"method.mask_prompt_items", "method.prompt_target_weight"})
PROJECT = Path(__file__).resolve().parents[1]
RECIPES = PROJECT / "configuration" / "recipes"


def load_recipe(config: str | Path | None, method: str | Path = "default", overrides: Sequence[str] = ()) -> Recipe:
    """Make the recipe of a run: the method's file, the set's file over it, the overrides over both.

    Args:
        config: the set's file: a path, or the bare name of a file in `configuration/recipes`; None: no set's file.
        method: the method's file, in the same way.
        overrides: words `field=value` with dotted field names and YAML values, as on the command line.

    Returns:
        A checked recipe. Its name is the set's, with `-method` behind it where the method is not the default one,
        unless an override names it.

    Raises:
        InputError: a file, field, type, value or combination is wrong.
    """
    method_file = _find_file(method)
    settings = _read_file(method_file)
    name = settings.get("name", Setting("run", _shown(method_file)))
    if config is not None:
        config_file = _find_file(config)
        of_set = _read_file(config_file)
        settings |= of_set
        name = of_set.get("name", Setting(config_file.stem, _shown(config_file)))
    if method_file.stem != "default":
        name = name._replace(value=f"{name.value}-{method_file.stem}")
    settings["name"] = name
    for word in overrides:
        _override(settings, word)
    return _build(settings)


def recipe_from_dict(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Make a recipe from nested sections and fields; what they leave out has the dataclass's default.

    Args:
        values: as in a recipe file.
        source: what errors call the place of the values.

    Raises:
        InputError: a field, type, value or combination is wrong.
    """
    return _build(_settings(values, Source(source)))


def read_recipe(path: Path) -> Recipe:
    """The whole recipe that `dump_recipe` wrote to a file; what an earlier version left out has the dataclass's default, as it was then.

    Raises:
        InputError: the file, a field, type, value or combination is wrong.
    """
    return _build(_read_file(path))


def dump_recipe(recipe: Recipe) -> str:
    """Write every field as YAML, which `load_recipe` and `recipe_from_dict` read back to the same recipe."""
    return plain_yaml.dump(asdict(recipe))


def fingerprint(recipe: Recipe, sections: Sequence[str]) -> str:
    """Hash some parts of a recipe: SHA-256 in hex of their canonical JSON, without what a section says to people alone.

    Args:
        recipe: a recipe.
        sections: dotted names of sections or fields, such as `data` or `backbone.config`.

    Raises:
        AttributeError: a name is no section or field.
    """
    parts: dict[str, Any] = {}
    for name in sections:
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part)
        if is_dataclass(value) and not isinstance(value, type):
            said_only = {entry.name for entry in fields(value) if entry.metadata.get("said_only")}
            value = {key: entry for key, entry in asdict(value).items() if key not in said_only}
        parts[name] = value
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part of the command line that every script shares.

    Words `field=value` may stand between options where the script calls `parser.parse_intermixed_args()`.
    """
    parser.add_argument("--config", metavar="SET", help="file of the data: a path, or a name in configuration/recipes")
    parser.add_argument(
        "--method", metavar="METHOD", default="default", help="file of the method, likewise (default: %(default)s)"
    )
    parser.add_argument(
        "overrides", metavar="field=value", nargs="*", default=[], help="fields to override, such as finetune.lr=1e-3"
    )
    parser.add_argument("--list-fields", action=_ListFields, help="print every field of a recipe and exit")


def recipe_from_arguments(arguments: argparse.Namespace) -> Recipe:
    """Make the recipe that the arguments of `add_arguments` ask for.

    Raises:
        InputError: a file, field, type, value or combination is wrong.
    """
    return load_recipe(arguments.config, arguments.method, arguments.overrides)


def describe_fields() -> str:
    """List every field with its default in `default.yaml`, its meaning and what it may hold, 100 columns wide."""
    defaults = asdict(load_recipe(None))
    lines = [
        "Every field of a recipe, with its default in configuration/recipes/default.yaml. On the command",
        "line a field is overridden by field=value, the value in YAML: 1e-3, true, none, [a, b].",
        "",
    ]
    for name, known in recipe_fields().items():
        if known.is_section:
            lines += ["", f"{name}: {known.help}", ""]
            continue
        value: Any = defaults
        for part in name.split("."):
            value = value[part]
        head = f"{name} = {plain_yaml.in_line(value)}   ({allowed(name)})"
        lines += [_wrapped(head, indent=2), _wrapped(known.help, indent=6)]
    return "\n".join(lines)


class Setting(NamedTuple):
    """A field's value and the place it was read from."""

    value: Any
    place: str


@dataclass(frozen=True)
class Source:
    """What settings are read from: its name and, of a file, the line of each dotted field name."""

    name: str
    lines: Mapping[str, int] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """Name the place of a field in an error."""
        return f"{self.name}, line {self.lines[name]}" if name in self.lines else self.name


def _build(settings: Mapping[str, Setting]) -> Recipe:
    for name, (value, place) in settings.items():
        check_range(value, place, name)
    recipe = _section(Recipe, "", settings)
    check_combinations(recipe, lambda name: settings[name].place if name in settings else "recipe")
    return recipe


def _section(section: Any, prefix: str, settings: Mapping[str, Setting]) -> Any:
    values = {}
    for entry in fields(section):
        name = f"{prefix}{entry.name}"
        known = recipe_fields()[name]
        if known.is_section:
            values[entry.name] = _section(known.annotation, f"{name}.", settings)
        elif name in settings:
            values[entry.name] = settings[name].value
    return section(**values)


def _settings(values: Mapping[Any, Any], source: Source, prefix: str = "") -> dict[str, Setting]:
    """Flatten nested sections to settings by dotted field name, each of its annotated type."""
    known = recipe_fields()
    settings: dict[str, Setting] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        place = source.place(name)
        if name in REMOVED_FIELDS:
            logger.warning("%s: field '%s' is of an earlier version and has no effect any more", place, name)
            continue
        if name not in known:
            raise unknown_field(place, name)
        if not known[name].is_section:
            settings[name] = Setting(convert(value, place, name), place)
        elif isinstance(value, Mapping):
            settings |= _settings(value, source, f"{name}.")
        elif value is not None:
            first = fields(known[name].annotation)[0].name
            raise ill_valued(place, name, value, f"a section, with fields such as '{name}.{first}'")
    return settings


def _override(settings: dict[str, Setting], word: str) -> None:
    """Lay one word `field=value` of the command line over the settings."""
    place = "command line"
    name, equals, text = word.partition("=")
    if not equals:
        raise InputError(f"{place}: '{word}' is not of the form field=value; write it like finetune.lr=1e-3")
    try:
        value = plain_yaml.parse(text)
    except yaml.YAMLError as error:
        cause = plain_yaml.problem(error)
        raise InputError(f"{place}: the value of '{word}' is not YAML ({cause}); put it in quotes") from error
    known, parts = recipe_fields(), name.split(".")
    for end in range(1, len(parts)):
        mapping = ".".join(parts[:end])
        if mapping in known and known[mapping].is_mapping:
            # backbone.config.n_layer=4 sets one key and leaves the others as they are
            old = settings[mapping].value if mapping in settings else {}
            settings[mapping] = Setting(_with_key(old, parts[end:], value), place)
            return
    if name not in known:
        raise unknown_field(place, name)
    for part in reversed(parts):
        value = {part: value}
    settings |= _settings(value, Source(place))


def _with_key(mapping: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    old = mapping if isinstance(mapping, dict) else {}
    return old | {keys[0]: _with_key(old.get(keys[0]), keys[1:], value) if keys[1:] else value}


def _read_file(path: Path) -> dict[str, Setting]:
    try:
        text = path.read_text(encoding="utf-8")
        lines = dict(_lines_of_keys(plain_yaml.compose(text), _shown(path)))
        values = plain_yaml.parse(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{_shown(path)}, byte {error.start}: not UTF-8 text; save the recipe as UTF-8") from error
    except OSError as error:
        raise InputError(f"{_shown(path)}: cannot be read ({error.strerror}); give another file") from error
    except yaml.YAMLError as error:
        raise InputError(f"{_shown(path)}: not YAML ({plain_yaml.problem(error)}); mend the file") from error
    if not isinstance(values, dict | None):
        raise InputError(f"{_shown(path)}: not a recipe; its lines must be `field: value`, in sections")
    return _settings(values or {}, Source(_shown(path), lines))


def _lines_of_keys(node: yaml.Node | None, path: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted name and line of every key; a key given twice, of which YAML would drop the first, is refused."""
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise InputError(f"{path}, line {line}: field '{name}' is in line {lines[name]} too; keep one of the two")
        lines[name] = line
        yield name, line
        yield from _lines_of_keys(value, path, f"{name}.")


def _find_file(config: str | Path) -> Path:
    path = Path(config)
    is_path = path.suffix in (".yaml", ".yml")
    places = [path, PROJECT / path] if is_path else []
    if len(path.parts) == 1:
        places.append(RECIPES / (path.name if is_path else f"{path.name}.yaml"))
    for place in places:
        if place.is_file():
            return place
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    nearest = get_close_matches(path.stem, names, n=1)
    hint = f"the nearest is '{nearest[0]}' of" if nearest else "give a path that ends in .yaml, or one of"
    raise InputError(f"recipe '{config}': there is no such file; {hint} {', '.join(names)}")


def _wrapped(text: str, indent: int) -> str:
    return fill(text, 100, initial_indent=" " * indent, subsequent_indent=" " * 6, break_on_hyphens=False)


def _shown(path: Path) -> str:
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


class _ListFields(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_fields())
        parser.exit()
