"""The sets and the backbone that the benchmarks measure on, each made once in a folder and opened again after that.

The public sets are read from the folder that CLLM4REC_DATA names (ml-100k/, amazon-beauty/, digital-music/, each with
its split.tsv.gz); the embedded sample is always there.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from configuration.load import load_recipe
from configuration.recipe import Recipe
from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe
from training.data.corpora import build_corpora
from training.data.interactions import build_interactions
from training.data.readers import read_tables
from training.files import written_whole

SAMPLE = "sample"
PATHS = {
    "ml-100k": "ml-100k",
    "amazon-beauty": "amazon-beauty/Beauty.txt",
    "digital-music": "digital-music/reviews.jsonl.gz",
}
NUM_WORDS = 50_257  # rows of GPT-2's word table


def make_backbone(folder: Path, *, layers: int = 4, width: int = 256, heads: int = 4) -> Path:
    """A GPT-2 with random weights (standard deviation .02) and GPT-2's words; written where it is not there yet.

    Where CLLM4REC_DATA has no gpt2-tokenizer/, the tokenizer is trained on the sample's texts; the word table keeps its
    50,257 rows, so that a softmax over words costs the same.

    Args:
        folder: Where backbones are kept.
        layers: Transformer layers.
        width: Of the hidden states.
        heads: Attention heads.

    Returns:
        The backbone's folder, for `backbone.name`.
    """
    path = folder / f"gpt2-{layers}x{width}"
    if (path / "config.json").is_file():
        return path
    tokenizer = _tokenizer()
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=NUM_WORDS, n_layer=layers, n_embd=width, n_head=heads, bos_token_id=end, eos_token_id=end
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    with written_whole(path) as target:
        GPT2LMHeadModel(config).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return path


def set_recipe(name: str, folder: Path, *overrides: str, method: str = "paper") -> Recipe:
    """The recipe of a set on that backbone, frozen, with the split that comes with the set; its runs are in `folder`.

    Args:
        name: `ml-100k`, `amazon-beauty`, `digital-music` or `sample`.
        folder: Where backbones and runs are kept.
        overrides: Words `field=value` laid over the recipe.
        method: The method's file.
    """
    words = [f"backbone.name={make_backbone(folder)}", "backbone.train=none", f"output_dir={folder}", "tracker=none"]
    words += where_the_set_is(name)
    return load_recipe(name, method, [*words, f"name={name}", *overrides])


def where_the_set_is(name: str) -> list[str]:
    """Words `field=value` that name a set's files and its given split."""
    if name == SAMPLE:
        return []
    data = _data_folder()
    return [f"data.path={data / PATHS[name]}", "data.split=given", f"data.split_path={data / name}/split.tsv.gz"]


def make_corpora(name: str, folder: Path) -> Path:
    """The corpora of a set, with the backbone's words; built where they are not there or not up to date.

    Args:
        name: As in [`set_recipe`].
        folder: Where backbones and runs are kept.

    Returns:
        Their folder.
    """
    datasets.disable_progress_bars()
    recipe = set_recipe(name, folder)
    interactions = build_interactions(read_tables(recipe.data), recipe.data, recipe.seed)
    return build_corpora(interactions, recipe, folder / name / "corpora", progress=False).folder


def set_at_hand(name: str) -> str:
    """The set itself where its data are there; else the sample, and a line that says so."""
    if name == SAMPLE or (_data_folder() / PATHS[name]).exists():
        return name
    print(f"{name}: CLLM4REC_DATA names no folder with {PATHS[name]}; the embedded sample is measured instead")
    return SAMPLE


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with every word `field=value` among `overrides`, wherever it stands: behind `--set a b`, too."""
    words = [word for word in sys.argv[1:] if re.match(r"[a-z]\w*(\.\w+)*=", word)]
    chosen = parser.parse_args([word for word in sys.argv[1:] if word not in words])
    chosen.overrides += words
    return chosen


def _data_folder() -> Path:
    return Path(os.environ.get("CLLM4REC_DATA", "data")).resolve()


def _tokenizer() -> PreTrainedTokenizerFast:
    files = _data_folder() / "gpt2-tokenizer"
    if (files / "vocab.json").is_file():
        return AutoTokenizer.from_pretrained(files, tokenizer_type="gpt2")
    tables = read_tables(load_recipe(SAMPLE).data)
    texts = [text for table in (tables.items, tables.users) if table is not None for text in table["text"]]
    return train_byte_level_bpe(texts, NUM_WORDS)
