import argparse
import shlex

import pytest

from configuration import plain_yaml
from configuration.fields import recipe_fields
from configuration.load import RECIPES, add_arguments, load_recipe, recipe_from_arguments

SETS = ["sample", "ml-100k", "digital-music", "amazon-beauty"]
METHODS = ["default", "paper", "sequential", "smollm2"]


def read(name):
    return plain_yaml.parse((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def test_these_are_all_the_recipes():
    assert {path.stem for path in RECIPES.iterdir()} == {*SETS, *METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", SETS)
def test_every_set_loads_with_every_method(config, method):
    recipe = load_recipe(config, method)

    assert recipe.name == (config if method == "default" else f"{config}-{method}")
    assert recipe.data == load_recipe(config).data
    assert recipe.method == load_recipe(None, method).method


@pytest.mark.parametrize("config", SETS)
def test_the_files_of_sets_hold_data_fields_only(config):
    assert set(read(config)) <= {"name", "license", "language", "data"}


@pytest.mark.parametrize("method", METHODS)
def test_the_files_of_methods_hold_no_data_fields(method):
    assert not set(read(method)) & {"name", "license", "language", "data"}


@pytest.mark.parametrize("name", [*SETS, *METHODS])
def test_every_file_says_what_it_is_and_the_command_that_runs_it(name):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    about, command = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]

    launcher, verb, script, *arguments = shlex.split(command.removeprefix("# "))
    recipe = recipe_from_arguments(parser.parse_args(arguments))

    assert about.startswith("# ")
    assert (launcher, verb, script) == ("accelerate", "launch", "training/pretrain.py")
    assert name in recipe.name or name == "default"


def test_only_the_sample_publishes_its_users_which_are_no_people():
    assert [config for config in SETS if load_recipe(config).data.publish_users] == ["sample"]


def test_the_sets_are_filtered_as_their_baselines_were():
    filters = {}
    for config in SETS:
        data = load_recipe(config).data
        filters[config] = (data.min_rating, data.min_user_interactions, data.min_item_interactions, data.split)

    assert filters == {
        "sample": (None, 1, 1, "given"),
        "ml-100k": (4.0, 5, 1, "random"),
        "digital-music": (4.0, 3, 3, "random"),
        "amazon-beauty": (None, 5, 1, "random"),
    }


@pytest.mark.parametrize("config", ["ml-100k", "digital-music", "amazon-beauty"])
def test_the_split_that_the_head_of_a_set_shows_is_accepted(config):
    head = (RECIPES / f"{config}.yaml").read_text(encoding="utf-8").splitlines()[2]
    words = [word for word in head.split() if word.startswith("data.")]

    data = load_recipe(config, overrides=words).data

    assert (data.split, data.split_path) == ("given", f"data/{config}/split.tsv.gz")


def test_the_paper_recipe_makes_the_published_choices():
    method = load_recipe("sample", "paper").method

    assert load_recipe("sample", "paper").backbone.train == "none"
    assert (method.readout, method.targets, method.initialisation) == ("last", "held_out", "random")
    assert not method.item_bias
    assert (method.distillation, method.user_token_dropout) == (0.0, 0.0)
    assert method.history_order == "shuffled"


def test_the_recipes_that_need_no_network_make_their_backbone():
    assert [method for method in METHODS if load_recipe("sample", method).backbone.name is None] == [
        "default",
        "paper",
        "sequential",
    ]


def test_every_field_is_documented():
    assert [name for name, known in recipe_fields().items() if len(known.help) < 5] == []
