"""`model/`: what a Hub repo of a trained recommender holds, complete on disk before anything is sent."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

import modeling_cllm4rec
from configuration.errors import InputError
from configuration.load import RECIPES, dump_recipe, read_recipe, recipe_from_dict
from configuration.recipe import Recipe
from modeling_cllm4rec import CLLM4RecConfig
from modeling_cllm4rec.text_encoder_cllm4rec import FOLDER as TEXT_ENCODER
from training.data.corpora import Corpora, write_json_lines
from training.data.readers import free_name
from training.files import copy_whole, write_text, written_whole
from training.hub.card import card_text

REMOTE_CODE = (
    "catalogue_cllm4rec.py",
    "configuration_cllm4rec.py",
    "handler.py",
    "loss_cllm4rec.py",
    "modeling_cllm4rec.py",
    "packing_cllm4rec.py",
    "pipeline_cllm4rec.py",
    "ranking_cllm4rec.py",
    "records_cllm4rec.py",
    "text_cllm4rec.py",
    "text_encoder_cllm4rec.py",
    "tokenization_cllm4rec.py",
)
WRITTEN_BY_TRAINING = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "items.jsonl",
    "recipe.yaml",
    *REMOTE_CODE,
)
WRITTEN_BY_PREDICT = ("README.md", "results.json", "pictures/curves.png", "pictures/items.png")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
INDEX = "model.safetensors.index.json"
USERS = "users.jsonl"
CHAT_TEMPLATE = "chat_template.jinja"  # of a backbone that is made for conversation
REPO = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")  # of a dataset with @revision


def write_model_folder(weights: Path, folder: Path, corpora: Corpora, recipe: Recipe) -> None:
    """Put weights, configuration, tokenizer, remote code, items and recipe together in `folder`, whole or not at all.

    Args:
        weights: A folder that `save_pretrained` of a head wrote.
        folder: The folder to write.
        corpora: The run's, for tokenizer and items.
        recipe: The run's.
    """
    with written_whole(folder) as target:
        for path in weights.iterdir():
            if path.suffix in (".safetensors", ".json"):
                shutil.copyfile(path, target / path.name)
        if (weights / TEXT_ENCODER).is_dir():
            shutil.copytree(weights / TEXT_ENCODER, target / TEXT_ENCODER)
        config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        # Of a backbone that came from a folder it is that folder's path.
        config["backbone_config"].pop("_name_or_path", None)
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        GenerationConfig.from_model_config(CLLM4RecConfig.from_pretrained(weights)).save_pretrained(target)
        corpora.tokenizer.save_pretrained(target)
        words = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
        for how_it_was_loaded in ("is_local", "local_files_only", "name_or_path"):
            words.pop(how_it_was_loaded, None)
        (target / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
        code = Path(modeling_cllm4rec.__file__).parent
        for name in REMOTE_CODE:
            shutil.copyfile(code / name, target / name)
        keys = ("id", "title", "text", "popularity")
        write_json_lines(target / "items.jsonl", ({key: item[key] for key in keys} for item in corpora.items()))
        (target / "recipe.yaml").write_text(dump_recipe(published_recipe(recipe)), encoding="utf-8")
        if recipe.data.publish_users:
            write_json_lines(target / USERS, iter(corpora.users()))


def complete_model_folder(
    folder: Path, pictures: Path, corpora: Corpora, recipe: Recipe, results: dict[str, Any]
) -> None:
    """Add what is known once the model was measured: figures, pictures and the card; and what the recipe says of people.

    Args:
        folder: The folder that [`write_model_folder`] wrote.
        pictures: The run's pictures.
        corpora: The run's, for the users where the recipe publishes them.
        recipe: The run's.
        results: What the run's `results.json` holds.
    """
    public, figures = published_recipe(recipe), published_results(results)
    write_text(folder / "recipe.yaml", dump_recipe(public))
    if not recipe.data.publish_users:
        (folder / USERS).unlink(missing_ok=True)
    elif not (folder / USERS).exists():
        copy_whole(corpora.folder / USERS, folder / USERS)
    with written_whole(folder / "pictures") as target:
        for path in pictures.glob("*.png"):
            shutil.copyfile(path, target / path.name)
    write_text(folder / "README.md", card_text(figures, public, repo_id=str(folder), on_hub=False))
    write_text(folder / "results.json", json.dumps(figures, indent=2, ensure_ascii=False))


def model_files(folder: Path) -> dict[str, Path]:
    """What a push sends of a model's folder, and nothing else that may lie there: path in the repo to file.

    Raises:
        InputError: naming what is missing, and which script writes it.
    """
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no trained model is there; run training/pretrain.py and training/finetune.py first"
        )
    weights = sorted(path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))
    names = [*WRITTEN_BY_TRAINING, *weights, *WRITTEN_BY_PREDICT]
    if (folder / CHAT_TEMPLATE).is_file():
        names.append(CHAT_TEMPLATE)
    if folder_recipe(folder).data.publish_users:
        names.append(USERS)
    for name in names:
        if not (folder / name).is_file():
            script = "predict" if name in (*WRITTEN_BY_PREDICT, USERS) else "finetune"
            raise InputError(
                f"{folder} lacks {name}; run training/{script}.py first (--overwrite if it was run before)"
            )
    check_weights(folder, weights)
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("text_state_width"):
        if not all((folder / TEXT_ENCODER / name).is_file() for name in ("config.json", "model.safetensors")):
            raise InputError(
                f"{folder} lacks {TEXT_ENCODER}; run training/finetune.py first (--overwrite if it was run before)"
            )
        check_weights(folder / TEXT_ENCODER, ["model.safetensors"])
        names += [f"{TEXT_ENCODER}/{path.name}" for path in (folder / TEXT_ENCODER).iterdir() if path.is_file()]
    return {name: folder / name for name in sorted(names)}


def check_weights(folder: Path, names: Sequence[str]) -> None:
    """Refuse weights of which a part is missing or cut short.

    Raises:
        InputError: naming the file.
    """
    files = {name for name in names if name.endswith(".safetensors")}
    needed = {"model.safetensors"}
    if INDEX in names:
        try:
            needed = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder / INDEX} is damaged; run training/finetune.py --overwrite") from error
    if files != needed:
        odd = sorted(needed - files) or sorted(files - needed)
        what = "lacks" if needed - files else f"has no {INDEX} that names"
        raise InputError(f"{folder} {what} {odd[0]}; run training/finetune.py --overwrite")
    for name in sorted(files):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / name} is damaged ({error}); run training/finetune.py --overwrite") from error


def folder_recipe(folder: Path) -> Recipe:
    """The recipe of a model's folder, as it is published; who wants to state a licence later writes it there.

    Raises:
        InputError: if the file is missing or wrong.
    """
    return read_recipe(folder / "recipe.yaml")


def published_recipe(recipe: Recipe) -> Recipe:
    """The recipe without what its owner's machine is like: no paths but those of this project, no device, no tracker."""
    data = replace(
        recipe.data,
        path=public_path(recipe.data.path, may_be_repo=recipe.data.format == "dataset"),
        split_path=public_path(recipe.data.split_path),
        items=replace(recipe.data.items, path=public_path(recipe.data.items.path)),
        users=replace(recipe.data.users, path=public_path(recipe.data.users.path)),
    )
    backbone = replace(recipe.backbone, name=public_path(recipe.backbone.name, may_be_repo=True))
    encoder = recipe.text_encoder
    encoder = replace(encoder, name=public_path(encoder.name, may_be_repo=True))
    usual = {field.name: field.default for field in dataclasses.fields(Recipe)}
    return replace(
        recipe,
        data=data,
        backbone=backbone,
        text_encoder=encoder,
        output_dir=str(usual["output_dir"]),
        device=str(usual["device"]),
        tracker=str(usual["tracker"]),
    )


def published_results(results: dict[str, Any]) -> dict[str, Any]:
    """What `results.json` holds, with the recipe and the names of files as they are published."""
    public = asdict(published_recipe(recipe_from_dict(results["recipe"], "results.json")))
    data = results["data"]
    corpora = {"recipe": data["recipe"] | {"data": public["data"]}, "source": public_source(data["source"])}
    return results | {"recipe": public, "data": data | corpora}


def public_source(source: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of each file that was read, by its own name: earlier versions put folders before one of two equal names."""
    public: dict[str, str] = {}
    for name, digest in source.items():
        public[free_name(name.rpartition("/")[2], public)] = digest
    return public


def public_path(path: str | None, *, may_be_repo: bool = False) -> str | None:
    """A path that a ready-made recipe names, an address or a repo's name as it is; of any other file or folder its own name only."""
    if path is None or path.startswith("hf://"):
        return path
    if "://" in path:  # an address may hold a name, a password, a token
        return path.partition("?")[0].rpartition("/")[2]
    given = Path(path).expanduser()
    inside = any(f"path: {path}\n" in recipe.read_text(encoding="utf-8") for recipe in RECIPES.glob("*.yaml"))
    is_repo = may_be_repo and REPO.fullmatch(path) and not given.exists()
    return path if inside or is_repo else re.split(r"[/\\]", given.name)[-1]
