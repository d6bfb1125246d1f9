"""What a model's folder holds and what its files say of the machine they were made on."""

from dataclasses import asdict, replace

import pytest

from configuration.errors import InputError
from configuration.load import dump_recipe, load_recipe, recipe_from_dict
from configuration.recipe import Backbone, Data, Recipe, SideTable
from training.hub.folder import folder_recipe, model_files, public_path, published_recipe, published_results
from training.run import Run


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (None, None),
        ("training/data/sample/interactions.parquet", "training/data/sample/interactions.parquet"),
        ("hf://datasets/me/data/items.parquet", "hf://datasets/me/data/items.parquet"),
        ("/home/ann/shop/purchases.csv", "purchases.csv"),
        ("../shop/purchases.csv", "purchases.csv"),
        ("~/purchases.csv", "purchases.csv"),
        ("private/purchases.csv", "purchases.csv"),
        ("https://ann:secret@shop.example/data/purchases.csv?token=secret", "purchases.csv"),
        ("file:///home/ann/purchases.csv", "purchases.csv"),
        ("C:\\Users\\ann\\purchases.csv", "purchases.csv"),
    ],
)
def test_of_a_path_its_name_is_published(path, shown):
    assert public_path(path) == shown


def test_of_files_of_one_name_no_folder_is_published_but_a_number():
    source = {"t.csv": "00", "acme/t.csv": "11", "anna.secret/t.csv": "22", "DataFrame": "33"}
    public = {"t.csv": "00", "t.csv (2)": "11", "t.csv (3)": "22", "DataFrame": "33"}
    recipe = asdict(Recipe(backbone=Backbone(config={"model_type": "gpt2"})))
    results = {"recipe": recipe, "data": {"recipe": {"data": recipe["data"]}, "source": source}}
    assert published_results(results)["data"]["source"] == public
    assert published_results(published_results(results))["data"]["source"] == public


def test_a_path_in_the_checkout_is_published_only_where_a_ready_made_recipe_names_it():
    assert public_path("configuration/recipes/sample.yaml") == "sample.yaml"
    assert public_path("data/ml-100k") == "data/ml-100k"


def test_the_chat_template_of_a_backbone_goes_with_the_model(store_copy):
    folder = Run.of(store_copy).model
    assert "chat_template.jinja" not in model_files(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_files(folder)["chat_template.jinja"] == folder / "chat_template.jinja"


def test_a_dataset_keeps_its_revision():
    for name in ("me/data@v1", "me/data@feature/x"):
        assert public_path(name, may_be_repo=True) == name


def test_what_an_older_recipe_does_not_have_is_what_was_usual_then(tmp_path):
    recipe = published_recipe(load_recipe("ml-100k", "paper"))
    lines = [
        line for line in dump_recipe(recipe).splitlines() if "user_offsets" not in line and "max_documents" not in line
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
    assert folder_recipe(tmp_path) == replace(
        recipe, pretrain=replace(recipe.pretrain, max_documents=0), finetune=replace(recipe.finetune, max_documents=0)
    )


def test_a_name_on_the_hub_is_published_a_folder_of_that_form_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "model").mkdir(parents=True)
    assert public_path("HuggingFaceTB/SmolLM2-135M", may_be_repo=True) == "HuggingFaceTB/SmolLM2-135M"
    assert public_path("ann/model", may_be_repo=True) == "model"


def test_a_published_recipe_says_nothing_of_the_machine_and_all_of_the_method():
    recipe = Recipe(
        name="shop",
        output_dir="/home/ann/runs",
        device="cuda:1",
        tracker="wandb",
        seed=7,
        data=Data(
            path="/home/ann/a.csv",
            split="given",
            split_path="/home/ann/s.csv",
            items=SideTable("/home/ann/i.csv", text_columns=["text"]),
            users=SideTable("/home/ann/u.csv"),
        ),
        backbone=Backbone(name="/home/ann/backbone"),
    )
    public = published_recipe(recipe)
    assert "/home/ann" not in dump_recipe(public)
    assert (public.data.path, public.data.split_path, public.data.items.path, public.data.users.path) == (
        "a.csv", "s.csv", "i.csv", "u.csv",
    )  # fmt: skip
    assert (public.output_dir, public.device, public.tracker) == ("runs", "auto", "tensorboard")
    assert (public.seed, public.method, public.data.items.text_columns) == (7, recipe.method, ["text"])


def test_a_published_recipe_is_read_back_as_it_is(tmp_path):
    for name in ("sample", "ml-100k", "digital-music", "amazon-beauty"):
        for method in ("default", "paper", "sequential", "smollm2"):
            public = published_recipe(load_recipe(name, method))
            (tmp_path / "recipe.yaml").write_text(dump_recipe(public))
            assert load_recipe(tmp_path / "recipe.yaml") == public == recipe_from_dict(asdict(public))


def test_a_folder_without_a_model_is_a_sentence(tmp_path):
    with pytest.raises(
        InputError, match=r"no trained model is there; run training/pretrain.py and training/finetune.py"
    ):
        model_files(tmp_path)


@pytest.mark.parametrize(("missing", "script"), [("README.md", "predict"), ("tokenizer.json", "finetune")])
def test_a_missing_file_is_named_with_the_script_that_writes_it(store_copy, missing, script):
    folder = Run.of(store_copy).model
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"lacks {missing}; run training/{script}.py first"):
        model_files(folder)


def test_what_else_lies_in_the_folder_does_not_go(store_copy):
    folder = Run.of(store_copy).model
    before = model_files(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "optimizer.bin").write_text("large")
    assert model_files(folder) == before


def test_a_published_recipe_of_a_recipe_that_says_all_is_complete():
    recipe = Recipe(name="x", license="mit")
    assert replace(published_recipe(recipe), output_dir=recipe.output_dir) == recipe
