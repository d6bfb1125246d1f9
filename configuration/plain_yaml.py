"""YAML as people expect it: `no` is text and `1e-3` a number, as in YAML 1.2.

PyYAML alone reads YAML 1.1, where `mixed_precision: no` would be false and `lr: 1e-3` text.
"""

import math
import re
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """Safe loader with the plain words of YAML 1.2's core schema."""


class RecipeDumper(yaml.SafeDumper):
    """Safe dumper that quotes text which either version of YAML would read as something else."""


def parse(text: str) -> Any:
    """Read one YAML value.

    Raises:
        yaml.YAMLError: `text` is not YAML; `problem` says why.
    """
    return yaml.load(text, Loader=RecipeLoader)


def compose(text: str) -> yaml.Node | None:
    """Read the tree of YAML nodes, which know their lines."""
    return yaml.compose(text, Loader=RecipeLoader)


def dump(value: Any) -> str:
    """Write a value as YAML that `parse` reads back, keys in their order."""
    return yaml.dump(value, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def in_line(value: Any) -> str:
    """Write a value in one line, as it stands behind `field=` on the command line."""
    if value is None:
        return "none"
    text = yaml.dump(
        value, Dumper=RecipeDumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("...\n").strip()


def problem(error: yaml.YAMLError) -> str:
    """Say in which line the text is not YAML, and why."""
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark else ""
    return line + (getattr(error, "problem", None) or "it holds characters that YAML does not allow")


FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
TAG = "tag:yaml.org,2002:"

RecipeLoader.yaml_implicit_resolvers = {}
RecipeLoader.add_implicit_resolver(f"{TAG}null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
RecipeLoader.add_implicit_resolver(f"{TAG}bool", re.compile(r"(?:[tT]rue|TRUE|[fF]alse|FALSE)$"), list("tTfF"))
RecipeLoader.add_implicit_resolver(f"{TAG}int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+.0123456789"))
RecipeDumper.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+.0123456789"))
