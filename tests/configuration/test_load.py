import argparse
import dataclasses
import textwrap
from typing import get_args

import pytest
import yaml

from configuration import plain_yaml
from configuration.errors import InputError
from configuration.fields import RULES, recipe_fields
from configuration.load import (
    add_arguments,
    describe_fields,
    dump_recipe,
    fingerprint,
    load_recipe,
    recipe_from_arguments,
    recipe_from_dict,
)
from configuration.recipe import Recipe

BACKBONE = {"backbone": {"config": {"model_type": "gpt2"}}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe file into the current folder, which is empty, and return its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text):
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write_file


def sentence(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


def refused(*overrides):
    return sentence(load_recipe, "sample", "default", overrides)


def test_overrides_lie_over_the_set_over_the_method(write):
    method = write("method.yaml", "seed: 1\ndevice: a\ntracker: a\nbackbone: {config: {model_type: gpt2}}")
    data = write("set.yaml", "device: b\ntracker: b\n")

    recipe = load_recipe(data, method, ["tracker=c"])

    assert (recipe.seed, recipe.device, recipe.tracker) == (1, "b", "c")


def test_fields_that_no_file_gives_keep_the_default_of_the_dataclass(write):
    recipe = load_recipe(None, write("method.yaml", "backbone: {config: {model_type: gpt2}}"))

    assert recipe.data == Recipe().data
    assert recipe.finetune == Recipe().finetune


@pytest.mark.parametrize(
    ("config", "method", "overrides", "name"),
    [
        ("sample", "default", [], "sample"),
        ("sample", "paper", [], "sample-paper"),
        ("sample", "paper", ["name=mine"], "mine"),
        (None, "default", [], "run"),
        (None, "paper", [], "run-paper"),
        ("films.yaml", "default", [], "films"),
        ("named.yaml", "paper", [], "cinema-paper"),
    ],
)
def test_a_run_is_named_after_set_and_method(write, config, method, overrides, name):
    write("films.yaml", "seed: 1")
    write("named.yaml", "name: cinema")

    assert load_recipe(config, method, overrides).name == name


def test_a_recipe_is_found_by_name_by_path_and_by_the_path_in_the_project(write):
    write("sample.yaml", "seed: 7")

    assert load_recipe("sample").seed == 42
    assert load_recipe("sample.yaml").seed == 7
    assert load_recipe("configuration/recipes/sample.yaml") == load_recipe("sample")


def test_an_unknown_recipe_names_the_nearest_and_all():
    message = sentence(load_recipe, "smaple")

    assert "'smaple'" in message
    assert "the nearest is 'sample'" in message
    assert "amazon-beauty, default, digital-music, ml-100k, paper, sample, sequential, smollm2" in message
    assert "the nearest is 'paper'" in sentence(load_recipe, "sample", "papers")
    assert "nowhere/films.yaml" in sentence(load_recipe, "nowhere/films.yaml")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("finetune.lr=1e-3", 0.001),
        ("finetune.lr=1", 1.0),
        ("finetune.lr=.5", 0.5),
        ("finetune.epochs=0", 0),
        ("finetune.mixed_precision=no", "no"),
        ("finetune.gradient_checkpointing=true", True),
        ("finetune.backbone_lr=none", None),
        ("finetune.backbone_lr=", None),
        ("data.min_rating=4", 4.0),
        ("data.source=a=b", "a=b"),
        ("data.user_column=0", "0"),
        ("data.license='1.0'", "1.0"),
        ("method.held_out_share=[0, 1]", [0.0, 1.0]),
        ("evaluation.baselines=[ease]", ["ease"]),
    ],
)
def test_a_value_of_the_command_line_gets_the_type_of_its_field(word, value):
    found = load_recipe("sample", overrides=[word])
    for part in word.partition("=")[0].split("."):
        found = getattr(found, part)

    assert found == value
    assert type(found) is type(value)


def test_a_key_of_a_mapping_is_overridden_alone_and_the_mapping_as_a_whole():
    one_key = load_recipe("sample", overrides=["backbone.config.n_layer=1", "backbone.config.rope.theta=1e4"])
    whole = load_recipe("sample", overrides=["backbone.config={model_type: llama}"])

    assert one_key.backbone.config == load_recipe("sample").backbone.config | {"n_layer": 1, "rope": {"theta": 1e4}}
    assert whole.backbone.config == {"model_type": "llama"}


def test_a_mapping_of_a_file_replaces_the_one_below(write):
    data = write("set.yaml", "backbone: {config: {model_type: llama}}")

    assert load_recipe(data).backbone.config == {"model_type": "llama"}


def test_a_section_of_the_command_line_leaves_its_other_fields():
    recipe = load_recipe("sample", overrides=["data.items={path: other.csv}"])

    assert recipe.data.items.path == "other.csv"
    assert recipe.data.items.id_column == "library"


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("finetune.lrr=1", "'finetune.lr'"),
        ("finetun.lr=1", "'finetune.lr'"),
        ("finetune.batchsize=1", "'finetune.batch_size'"),
        ("lr=1", "'pretrain.lr' or 'finetune.lr'"),
        ("data.text_columns=[a]", "'data.users.text_columns'"),
        ("data.items={pth: a}", "'data.items.path'"),
        ("backbone.confg.n_layer=1", "'backbone.config'"),
        ("methd={}", "'method'"),
    ],
)
def test_a_misspelt_field_names_itself_and_the_nearest(word, nearest):
    message = refused(word)

    assert message.startswith("command line: there is no field '")
    assert message.endswith(f"; the nearest is {nearest}")


def test_a_field_like_no_other_lists_those_of_its_section():
    message = refused("finetune.learning_rate=1")

    assert (
        "there is no field 'finetune.learning_rate'; the fields of 'finetune' are epochs, max_documents, batch_size"
        in message
    )


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("finetune.lr=fast", "'finetune.lr' is 'fast', it must be a number"),
        ("finetune.lr=.inf", "'finetune.lr' is .inf, it must be a number"),
        ("finetune.epochs=1.5", "'finetune.epochs' is 1.5, it must be a whole number"),
        ("finetune.epochs=true", "'finetune.epochs' is true, it must be a whole number"),
        ("seed=", "'seed' is none, it must be a whole number"),
        ("data.publish_users=yes", "'data.publish_users' is 'yes', it must be true or false"),
        ("data.path=[a]", "'data.path' is [a], it must be text or none"),
        ("finetune.mixed_precision=bf61", "it must be one of no, bf16, fp16, auto; the nearest is 'bf16'"),
        ("method.held_out_share=0.2", "it must be a list [a, b] of numbers"),
        ("backbone.config=gpt2", "it must be a mapping {key: value}"),
        ("method=paper", "'method' is 'paper', it must be a section, with fields such as 'method.content_tower'"),
    ],
)
def test_an_ill_typed_field_names_itself_its_value_and_what_it_may_be(word, complaint):
    message = refused(word)

    assert message.startswith("command line: field '")
    assert complaint in message


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("name=a/b", "the name of one folder"),
        ("name=..", "the name of one folder"),
        ("seed=-1", "from 0 to 4294967295"),
        ("data.min_item_interactions=0", "at least 1"),
        ("data.review_prompt='{user} writes:'", "with {user} and {item} and no other braces"),
        ("data.item_prompt='{item} {'", "with {item} and no other braces"),
        ("backbone.num_words=256", "at least 257"),
        ("method.distillation=1.1", "from 0 to 1"),
        ("method.held_out_share=[0.5, 0.2]", "two shares from 0 to 1, the lower first"),
        ("method.held_out_share=[0.5]", "two shares from 0 to 1, the lower first"),
        ("pretrain.epochs=-1", "at least 0"),
        ("pretrain.batch_size=0", "at least 1"),
        ("finetune.lr=0", "more than 0"),
        ("data.examples=[a, b]", "histories as in [[a, b], [c]]"),
        ("language=[english]", "each a code of two or three letters, multilingual or code"),
        ("backbone.hub_name=https://hub/it", "the name of a repo, as in org/model"),
        ("backbone.hub_name=me/it", "to load it from the Hub, name it there"),
    ],
)
def test_a_value_out_of_range_names_its_field_and_range(word, complaint):
    message = refused(word)

    assert message.startswith(f"command line: field '{word.partition('=')[0]}' is ")
    assert message.endswith(complaint)


def test_the_ends_of_the_ranges_are_allowed():
    words = [
        "seed=0",
        "method.held_out_share=[0, 0]",
        "method.distillation=1",
        "finetune.epochs=0",
        "pretrain.patience=0",
    ]

    assert load_recipe("sample", overrides=words).method.held_out_share == [0.0, 0.0]


def test_every_number_has_a_range_except_a_rating():
    types = {name: {known.annotation, *get_args(known.annotation)} for name, known in recipe_fields().items()}
    numbers = {name for name in types if types[name] & {int, float}}

    assert numbers - set(RULES) == {"data.min_rating"}
    assert set(RULES) <= set(recipe_fields())


IN_TIME = ["method.history_order=chronological", "method.readout=last"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["backbone.config={}"], "'backbone.config' has no model_type"),
        (["backbone.gguf_file=a.gguf"], "'backbone.gguf_file' is given without 'backbone.name'"),
        (["text_encoder.gguf_file=a.gguf"], "'text_encoder.gguf_file' is given without 'text_encoder.name'"),
        (["text_encoder.layers=8"], "'text_encoder.layers' is given without 'text_encoder.name'"),
        (
            ["text_encoder.name=a", "method.text_map=false"],
            "nothing reads what it makes of texts; add method.text_map=true",
        ),
        (["text_encoder.name=a", "method.content_tower=false"], "add method.content_tower=true"),
        (["data.split=random", "data.split_path=a.csv"], "'data.split_path' is given but 'data.split' is random"),
        (["method.targets=next"], "histories are shuffled; add method.history_order=chronological"),
        (["method.targets=next", *IN_TIME[:1]], "add method.readout=last"),
        (["method.targets=next", *IN_TIME], "add method.distillation=0"),
        (["finetune.gradient_accumulation_steps=9", "finetune.batch_size=8"], "more than the 8 documents"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(words, complaint):
    assert complaint in refused(*words)


def test_a_named_backbone_needs_no_configuration():
    recipe = load_recipe("sample", overrides=["backbone.name=gpt2", "backbone.gguf_file=a.gguf", "backbone.config={}"])

    assert recipe.backbone.config == {}


@pytest.mark.parametrize("word", ["finetune.lr", "--seed"])
def test_a_word_without_an_equals_sign_is_refused(word):
    assert f"'{word}' is not of the form field=value" in refused(word)


def test_a_value_that_is_not_yaml_is_refused():
    assert "the value of 'data.source=[a' is not YAML" in refused("data.source=[a")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("seed: 1\ndata:\n  pth: a\n", "set.yaml, line 3: there is no field 'data.pth'; the nearest is 'data.path'"),
        ("seed: 1\n\nfinetun:\n  lr: 1\n", "set.yaml, line 3: there is no field 'finetun'; the nearest is 'finetune'"),
        ("data:\n  min_rating: four\n", "set.yaml, line 2: field 'data.min_rating' is 'four'"),
        ("data:\n  items:\n    path: 1.5\n", "set.yaml, line 3: field 'data.items.path' is 1.5"),
        ("method:\n  distillation: 2\n", "set.yaml, line 2: field 'method.distillation' is 2.0"),
        ("seed: 1\nseed: 2\n", "set.yaml, line 2: field 'seed' is in line 1 too"),
        ("seed: 1\ndata: [\n", "set.yaml: not YAML (line 3"),
        ("seed: !!python/name:os.system\n", "set.yaml: not YAML (line 1"),
        ("- seed\n", "set.yaml: not a recipe"),
        ("1: a\n", "set.yaml, line 1: there is no field '1'"),
    ],
)
def test_an_error_in_a_file_names_the_file_and_the_line(write, text, place):
    assert sentence(load_recipe, write("set.yaml", text)).startswith(place)


def test_a_file_that_is_not_utf8_is_refused(write, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))

    assert sentence(load_recipe, "latin.yaml").startswith("latin.yaml, byte 9: not UTF-8")


def test_an_empty_file_and_an_empty_section_change_nothing(write):
    default = load_recipe(None)

    assert load_recipe(write("run.yaml", "# nothing")) == default
    assert load_recipe(write("run.yaml", "data:\n  items:\n")) == default


def test_an_error_after_merging_names_the_file_that_gave_the_value(write):
    data = write("set.yaml", "data:\n  split_path: a.csv\n")

    assert sentence(load_recipe, data).startswith("set.yaml, line 2: field 'data.split_path'")


@pytest.mark.parametrize("method", ["default", "paper", "sequential", "smollm2"])
def test_a_dumped_recipe_loads_back_to_the_same(write, method):
    words = ["data.source='1e-3'", "tracker='none'", "data.license='~'", "data.path='no'", "finetune.lr=1e-7"]
    recipe = load_recipe("sample", method, [*words, "backbone.config.layer_norm_epsilon=1e-5"])

    text = dump_recipe(recipe)

    assert recipe_from_dict(plain_yaml.parse(text)) == recipe
    assert load_recipe(write("dumped.yaml", text)) == recipe


def test_a_dump_gives_every_field_to_any_yaml_reader():
    dumped = yaml.safe_load(dump_recipe(load_recipe("sample")))

    assert dumped == dataclasses.asdict(load_recipe("sample"))


@pytest.mark.parametrize(
    "text", ["no", "1e-3", "1", "0o7", "010", "1_0", "~", "", "a: b", "# a", "2020-01-01", "é", "{user} a:"]
)
def test_text_survives_writing_and_reading(text):
    assert plain_yaml.parse(plain_yaml.dump({"key": text})) == {"key": text}
    assert plain_yaml.parse(plain_yaml.in_line([text])) == [text]


@pytest.mark.parametrize("number", [0.1, 1e-7, 1e22, -2.5e-05, 0, -3, 10**12, float("inf")])
def test_numbers_survive_writing_and_reading(number):
    read = plain_yaml.parse(plain_yaml.dump({"key": number}))["key"]

    assert read == number
    assert type(read) is type(number)


def test_a_recipe_from_a_dict_checks_as_a_file_does():
    recipe = recipe_from_dict(BACKBONE | {"finetune": {"lr": 1}, "method": {"held_out_share": (0, 1)}})

    assert recipe.finetune.lr == 1.0
    assert recipe.method.held_out_share == [0.0, 1.0]
    assert sentence(recipe_from_dict, BACKBONE | {"sed": 1}, "results.json").startswith(
        "results.json: there is no field 'sed'"
    )


def test_a_field_of_an_earlier_version_is_named_and_left_out(caplog):
    recipe = recipe_from_dict(BACKBONE | {"method": {"mask_prompt_items": True, "lambda_v": 2}}, "recipe.yaml")

    assert recipe.method.lambda_v == 2
    assert caplog.messages == [
        "recipe.yaml: field 'method.mask_prompt_items' is of an earlier version and has no effect any more"
    ]


def test_a_fingerprint_follows_the_chosen_parts_alone():
    recipe = load_recipe("sample")
    other_lr = load_recipe("sample", overrides=["finetune.lr=0.5"])
    other_data = load_recipe("sample", overrides=["data.min_user_interactions=2"])

    assert fingerprint(recipe, ["data", "backbone.config"]) == fingerprint(other_lr, ["data", "backbone.config"])
    assert fingerprint(recipe, ["data"]) != fingerprint(other_data, ["data"])
    assert fingerprint(recipe, ["finetune.lr"]) != fingerprint(other_lr, ["finetune.lr"])
    assert len(fingerprint(recipe, ["data"])) == 64


def test_a_fingerprint_leaves_out_what_is_said_to_people_alone():
    recipe = load_recipe("sample", "smollm2")
    unnamed = load_recipe("sample", "smollm2", ["backbone.hub_name=none"])

    assert fingerprint(recipe, ["backbone"]) == fingerprint(unnamed, ["backbone"])


def test_a_fingerprint_is_the_sha256_of_canonical_json():
    recipe = recipe_from_dict(BACKBONE | {"seed": 7})

    # printf '{"seed":7}' | sha256sum
    assert fingerprint(recipe, ["seed"]) == "beced1fe696351bb996169a4f1987ca19b5f52f37c7ef3071f9c044cf3580bfc"


def test_the_arguments_of_a_script_give_its_recipe():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--resume", action="store_true")

    words = ["seed=1", "--config", "sample", "--resume", "--method", "paper", "finetune.lr=1e-2"]
    arguments = parser.parse_intermixed_args(words)

    assert recipe_from_arguments(arguments) == load_recipe("sample", "paper", ["seed=1", "finetune.lr=0.01"])
    assert arguments.resume


def test_a_script_without_arguments_has_the_default_recipe():
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    assert recipe_from_arguments(parser.parse_args([])) == load_recipe(None)


def test_list_fields_prints_every_field_and_leaves(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--list-fields"])

    assert left.value.code == 0
    assert capsys.readouterr().out == describe_fields() + "\n"


def test_the_description_holds_each_field_with_default_type_and_meaning_in_100_columns():
    text = describe_fields()
    words = " ".join(text.split())

    assert max(len(line) for line in text.splitlines()) <= 100
    for name, known in recipe_fields().items():
        assert f"{name}{':' if known.is_section else ' ='} " in words
        assert known.help in words
    assert f"finetune.lr = {load_recipe(None).finetune.lr} (a number, more than 0)" in words
    assert "finetune.mixed_precision = auto (one of no, bf16, fp16, auto)" in words
