"""`model/`: what a Hub repo of a trained recommender holds, complete on disk before anything is sent."""

import shutil
from pathlib import Path

import modeling_cllm4rec
from configuration.load import dump_recipe
from configuration.recipe import Recipe
from training.data.corpora import Corpora, write_json_lines
from training.files import written_whole

REMOTE_CODE = (
    "configuration_cllm4rec.py",
    "modeling_cllm4rec.py",
    "pipeline_cllm4rec.py",
    "tokenization_cllm4rec.py",
)


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
        corpora.tokenizer.save_pretrained(target)
        code = Path(modeling_cllm4rec.__file__).parent
        for name in REMOTE_CODE:
            shutil.copyfile(code / name, target / name)
        keys = ("id", "title", "text", "popularity")
        write_json_lines(target / "items.jsonl", ({key: item[key] for key in keys} for item in corpora.items()))
        (target / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        if recipe.data.publish_users:
            write_json_lines(target / "users.jsonl", iter(corpora.users()))
