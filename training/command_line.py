"""The shell that every script shares: arguments to a recipe, a person's mistake to one sentence and exit code 2."""

import argparse
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import torch
import transformers

from configuration.errors import InputError
from configuration.load import add_arguments, recipe_from_arguments
from configuration.recipe import Recipe


def make_parser(description: str, *, stage: bool = True) -> argparse.ArgumentParser:
    """A parser with the recipe's arguments, `--refit` and, for a stage, `--resume` and `--overwrite`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--refit",
        action="store_true",
        help="train again on all pairs, held-out ones too, with what the finished run of this recipe chose; in a folder of its own",
    )
    if stage:
        parser.add_argument(
            "--resume", action="store_true", help="continue after the last whole epoch, to the same numbers"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run of this stage left")
    return parser


def run_script(parser: argparse.ArgumentParser, function: Callable[[Recipe, argparse.Namespace], object]) -> None:
    """Parse, make the recipe, call the function; an `InputError` is printed as one line and ends with exit code 2."""
    # The scripts show a bar where a person waits; a dozen more for files of a few megabytes say nothing.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    arguments = parser.parse_intermixed_args()
    if arguments.refit:
        arguments.overrides = [*arguments.overrides, "refit=true"]
    run_plainly(lambda: function(recipe_from_arguments(arguments), arguments))


@contextmanager
def said_aloud() -> Iterator[None]:
    """Log lines go to the console, for a script that keeps no log."""
    root, handler = logging.getLogger("training"), logging.StreamHandler(sys.stdout)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)


def leave_libraries_to_themselves() -> None:
    """Take what was made so far, the libraries above all, out of the garbage collector's rounds.

    It goes over everything whenever many objects come, as from a tokenizer's file, which takes longer than to read the file.
    `python benchmarks/speed.py --stages corpora` does so, too, on both sides.
    """
    gc.freeze()


def run_plainly(function: Callable[[], object]) -> None:
    """Call the function; an `InputError` is printed as one line and ends with exit code 2, an interruption with 130."""
    leave_libraries_to_themselves()
    try:
        function()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on or starts anew", file=sys.stderr)
        raise SystemExit(130) from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
