"""A trained run as vectors for a search index: user · item is the model's logit.

python training/export.py runs/sample

RUN/vectors/ then holds items.safetensors and users.safetensors (float32, tensor `vectors`, a row per item or user in the order
of items.jsonl and users.jsonl), the same as items.parquet and users.parquet (`id`, `vector`), and vectors.json. An item's vector
is its embedding and its bias, a user's the state at the end of the prompt over the training history and a 1.
The users' files are personal data: raw ids, and what each person is likely to take.
"""

import argparse
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import transformers
from transformers import AutoModelForSequenceClassification

from configuration.errors import InputError
from configuration.load import read_recipe
from modeling_cllm4rec.records_cllm4rec import read_records
from training.command_line import run_plainly
from training.data.batches import layout_of
from training.data.corpora import open_corpora
from training.evaluation.scoring import ModelScores, check_is_trained_on
from training.evaluation.vectors import item_vectors, user_vectors, write_vectors
from training.files import written_whole
from training.run import make_accelerator

SUMMARY = "vectors.json"
USE = "the inner product of a user's and an item's vector is the logit that the model gives the item"


def export(folder: Path, out: Path | None = None, *, overwrite: bool = False, progress: bool = True) -> Path:
    """Write the vectors of a run's items and users, whole or not at all, block by block.

    Args:
        folder: The run's, with `model/` and `corpora/`; it is not changed.
        out: Folder for the vectors; `vectors/` in the run's by default.
        overwrite: Replace vectors that are there.
        progress: Whether to show a progress bar.

    Returns:
        The folder that was written; `vectors.json` in it has `width`, `items`, `users`, `metric`, `use` and the SHA-256 of
        the model's `weights` by file.

    Raises:
        InputError: if there is no trained model, the corpora are not its, or the folder is taken.
    """
    out = folder / "vectors" if out is None else out
    if not (folder / "model" / "config.json").is_file():
        raise InputError(
            f"{folder / 'model'}: no trained model is there; run training/pretrain.py and training/finetune.py first"
        )
    if out.exists() and not (out / SUMMARY).is_file():
        raise InputError(f"{out} exists already and holds no {SUMMARY}; choose another folder with --out")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; replace it with --overwrite, or choose another folder with --out")
    corpora, recipe = open_corpora(folder / "corpora"), read_recipe(folder / "recipe.yaml")
    check_is_trained_on(folder / "model", corpora)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", trust_remote_code=True)
    ids = {name: raw_ids(corpora.folder / f"{name}.jsonl") for name in ("items", "users")}
    width = model.get_output_embeddings().weight.shape[1] + 1
    with written_whole(out) as target:
        model = model.to(make_accelerator(recipe, None, folder).device)
        histories = corpora.histories("recommendation")
        scores = ModelScores(model, *histories, layout_of(corpora), model.config.max_history)
        users = user_vectors(scores, recipe.evaluation.batch_size, progress=progress)
        for name, blocks in (("items", item_vectors(model)), ("users", users)):
            write_vectors(target / name, ids[name], blocks, width)
        weights = {}
        for path in sorted((folder / "model").glob("*.safetensors")):
            with path.open("rb") as file:
                weights[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        counts = {name: len(column) for name, column in ids.items()}
        summary = {"width": width, **counts, "metric": "inner product", "use": USE, "weights": weights}
        (target / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return out


def raw_ids(path: Path) -> pa.Array:
    """The `id` of each line."""
    return pa.array([record["id"] for record in read_records(path)])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, such as runs/sample")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write (default: RUN/vectors)")
    parser.add_argument("--overwrite", action="store_true", help="replace vectors that are there")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    run_plainly(lambda: print(export(arguments.run, arguments.out, overwrite=arguments.overwrite)))


if __name__ == "__main__":
    main()
