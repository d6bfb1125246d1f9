"""What each field of a recipe may hold: its type, its range, and the errors that name it and the nearest right one.

The types are the annotations of `recipe.py`; the ranges and forbidden combinations are here.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from string import Formatter
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from configuration import plain_yaml
from configuration.errors import InputError
from configuration.recipe import Recipe


class Field(NamedTuple):
    """A field or section of the recipe."""

    annotation: Any
    help: str
    is_section: bool

    @property
    def is_mapping(self) -> bool:
        """Whether the field holds free keys, such as `backbone.config`."""
        return get_origin(self.annotation) is dict


@cache
def recipe_fields() -> Mapping[str, Field]:
    """List every section and field by its dotted name, in order, the plain fields of a section before its sections."""

    def walk(section: Any, prefix: str) -> Iterator[tuple[str, Field]]:
        annotations = get_type_hints(section)
        for entry in sorted(fields(section), key=lambda entry: is_dataclass(annotations[entry.name])):
            annotation, name = annotations[entry.name], f"{prefix}{entry.name}"
            yield name, Field(annotation, entry.metadata["help"], is_dataclass(annotation))
            if is_dataclass(annotation):
                yield from walk(annotation, f"{name}.")

    return dict(walk(Recipe, ""))


def convert(value: Any, place: str, name: str) -> Any:
    """Give the value of field `name` its annotated type.

    Whole numbers serve as numbers and as text; nothing else changes its type.

    Raises:
        InputError: the value is of another type, or none of the words that the field allows.
    """
    annotation = recipe_fields()[name].annotation
    try:
        return _as_type(value, annotation)
    except (TypeError, OverflowError):
        raise ill_valued(place, name, value, _in_words(annotation), _choices(annotation)) from None


def check_range(value: Any, place: str, name: str) -> None:
    """Refuse a well-typed value out of its field's range.

    Raises:
        InputError: names the field and what it allows.
    """
    if name in RULES and value is not None and not RULES[name].holds(value):
        raise ill_valued(place, name, value, allowed(name))


def allowed(name: str) -> str:
    """Say what a field may hold: its type and range."""
    return _in_words(recipe_fields()[name].annotation) + (f", {RULES[name].text}" if name in RULES else "")


def ill_valued(place: str, name: str, value: Any, must_be: str, words: Sequence[str] = ()) -> InputError:
    """Make the error for a value that a field does not allow, with the nearest of its `words`."""
    nearest = get_close_matches(value, words, n=1) if isinstance(value, str) else []
    hint = f"; the nearest is '{nearest[0]}'" if nearest else ""
    found = f"'{value}'" if isinstance(value, str) else plain_yaml.in_line(value)
    return InputError(f"{place}: field '{name}' is {found}, it must be {must_be}{hint}")


def unknown_field(place: str, name: str) -> InputError:
    """Make the error for a misspelt field, which names the right one: a near sibling, a namesake, else a sibling."""
    section, _, last = name.rpartition(".")
    known = list(recipe_fields())
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    namesakes = [other for other in known if other.rpartition(".")[2] == last]
    nearest = (
        [siblings[match] for match in get_close_matches(last, siblings, n=1, cutoff=0.85)]
        or get_close_matches(name, namesakes, n=1, cutoff=0.85)
        or namesakes
        or [siblings[match] for match in get_close_matches(last, siblings, n=1)]
    )
    if not nearest and section and section not in known:
        return unknown_field(place, section)
    if nearest:
        hint = f"the nearest is {' or '.join(repr(other) for other in nearest)}"
    else:
        hint = f"the fields{f' of {section!r}' if section in known else ''} are {', '.join(siblings or known)}"
    return InputError(f"{place}: there is no field '{name}'; {hint}")


class Rule(NamedTuple):
    """What a well-typed value must fulfil, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


def _prompt(*places: str) -> Rule:
    def holds(prompt: str) -> bool:
        try:
            return {place for _, place, _, _ in Formatter().parse(prompt) if place is not None} == set(places)
        except ValueError:
            return False

    return Rule(f"with {' and '.join(f'{{{place}}}' for place in places)} and no other braces", holds)


ABOVE_ZERO = Rule("more than 0", lambda value: value > 0)
AT_LEAST_ZERO = Rule("at least 0", lambda value: value >= 0)
AT_LEAST_ONE = Rule("at least 1", lambda value: value >= 1)
SHARE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)

REPO_NAME = Rule(
    "the name of a repo, as in org/model", lambda name: re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
)

STAGE_RULES = {
    "epochs": AT_LEAST_ZERO,
    "max_documents": AT_LEAST_ZERO,
    "batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "lr": ABOVE_ZERO,
    "backbone_lr": ABOVE_ZERO,
    "weight_decay": AT_LEAST_ZERO,
    "warmup_epochs": AT_LEAST_ZERO,
    "max_grad_norm": AT_LEAST_ZERO,
    "patience": AT_LEAST_ZERO,
}
RULES = {
    "name": Rule(
        "the name of one folder",
        lambda name: name == name.strip() and name not in ("", ".", "..") and not set(name) & set("/\\"),
    ),
    # 32 bits are all that NumPy's generators take of it
    "seed": Rule("from 0 to 4294967295", lambda seed: 0 <= seed < 2**32),
    "language": Rule(
        "each a code of two or three letters, multilingual or code",
        lambda codes: all(re.fullmatch("[a-z]{2,3}|multilingual|code", code) for code in codes),
    ),
    "data.min_user_interactions": AT_LEAST_ONE,
    "data.min_item_interactions": AT_LEAST_ONE,
    "data.review_prompt": _prompt("user", "item"),
    "data.item_prompt": _prompt("item"),
    "data.user_prompt": _prompt("user"),
    "backbone.hub_name": REPO_NAME,
    "backbone.layers": AT_LEAST_ONE,
    "backbone.attention_dropout": Rule("from 0 to below 1", lambda share: 0 <= share < 1),
    "backbone.lora_rank": AT_LEAST_ONE,
    # a byte-level BPE holds the 256 bytes before its first merge
    "backbone.num_words": Rule("at least 257", lambda number: number >= 257),
    "text_encoder.hub_name": REPO_NAME,
    "text_encoder.layers": AT_LEAST_ONE,
    "method.lambda_v": AT_LEAST_ZERO,
    "method.max_history": AT_LEAST_ONE,
    "method.max_text_tokens": AT_LEAST_ONE,
    "method.num_negatives": Rule("at least 2", lambda number: number >= 2),
    "method.held_out_share": Rule(
        "two shares from 0 to 1, the lower first", lambda pair: len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1
    ),
    "method.user_token_dropout": SHARE,
    "method.initialisation_std": ABOVE_ZERO,
    "method.distillation": SHARE,
    **{f"{stage}.{name}": rule for stage in ("pretrain", "finetune") for name, rule in STAGE_RULES.items()},
    "evaluation.batch_size": AT_LEAST_ONE,
    "evaluation.top_k": AT_LEAST_ONE,
    "evaluation.selection_users": AT_LEAST_ONE,
    "data.examples": Rule(
        "histories as in [[a, b], [c]]", lambda examples: all(isinstance(history, list) for history in examples)
    ),
}


def check_combinations(recipe: Recipe, place_of: Callable[[str], str]) -> None:
    """Refuse fields that contradict each other.

    Args:
        recipe: a recipe whose fields are each in range.
        place_of: where a field's value was read from.

    Raises:
        InputError: names the fields and the way out.
    """

    def refuse(name: str, sentence: str) -> None:
        raise InputError(f"{place_of(name)}: field '{name}' {sentence}")

    backbone, data, method = recipe.backbone, recipe.data, recipe.method
    if method.targets == "next":
        if method.history_order != "chronological":
            refuse("method.targets", "is next, but histories are shuffled; add method.history_order=chronological")
        if method.readout != "last":
            refuse("method.targets", "is next, which is learnt at single items; add method.readout=last")
        if method.distillation:
            refuse("method.targets", "is next, and the teacher knows no order; add method.distillation=0")
    if backbone.name is None and "model_type" not in backbone.config:
        refuse("backbone.config", "has no model_type (gpt2, llama, …) and 'backbone.name' is none; give one of the two")
    for section, pretrained in (("backbone", backbone), ("text_encoder", recipe.text_encoder)):
        name = f"'{section}.name'"
        if pretrained.name is None and pretrained.hub_name is not None:
            refuse(f"{section}.hub_name", f"is given without {name}; to load it from the Hub, name it there")
        if pretrained.name is None and pretrained.gguf_file is not None:
            refuse(f"{section}.gguf_file", f"is given without {name}; name the folder or Hub repo that holds it")
    if recipe.text_encoder.name is None and recipe.text_encoder.layers is not None:
        refuse("text_encoder.layers", "is given without 'text_encoder.name'; name the model to cut")
    if recipe.text_encoder.name is not None and not method.content_tower:
        refuse("text_encoder.name", "is given, but no text is in the corpora; add method.content_tower=true")
    if recipe.text_encoder.name is not None and not method.text_map:
        refuse("text_encoder.name", "is given, but nothing reads what it makes of texts; add method.text_map=true")
    if data.split != "given" and data.split_path is not None:
        refuse("data.split_path", f"is given but 'data.split' is {data.split}; add data.split=given or leave it out")
    for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        parts = f"{name}.gradient_accumulation_steps"
        if stage.gradient_accumulation_steps > stage.batch_size:
            refuse(parts, f"is more than the {stage.batch_size} documents of '{name}.batch_size'; lower it")


def _as_type(value: Any, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if annotation is Any:
        return value
    if NoneType in arguments:
        return None if value in (None, "none") else _as_type(value, arguments[0])
    if origin is list and isinstance(value, list | tuple):
        return [_as_type(entry, arguments[0]) for entry in value]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is int and is_whole:
        return value
    if annotation is float and (is_whole or isinstance(value, float)) and math.isfinite(value):
        return float(value)
    if annotation is str and (is_whole or isinstance(value, str)):
        return str(value)
    raise TypeError(value)


def _in_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if NoneType in arguments:
        return f"{_in_words(arguments[0])} or none"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is list:
        kinds = {str: "text", int: "whole numbers", float: "numbers", Any: "anything"}
        return f"a list [a, b] of {', '.join(_choices(annotation)) or kinds[arguments[0]]}"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping {key: value}",
    }
    return words[origin or annotation]


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]
