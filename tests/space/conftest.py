"""A tiny recommender in a folder, as it is published with its users."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from recommender import Recommender
from transformers import GPT2Config

import modeling_cllm4rec
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation, TokenizerWithUserItemIDTokens
from modeling_cllm4rec.text_cllm4rec import TextMap, terms_of, words_of
from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe

ITEMS = [
    {"id": "numpy", "title": "NumPy", "text": "Arrays of numbers", "popularity": 50},
    {"id": "scipy", "title": "SciPy", "text": "Algorithms for science", "popularity": 40},
    {"id": 7, "title": "Seven", "text": "", "popularity": 3},
    {"id": "mark<up>", "title": '<b>&"bold" ${1} {{two}}</b>', "text": "<script>alert(1)</script>", "popularity": 2},
    {"id": "flask", "title": "", "text": "Pages of the web", "popularity": None},
    {"id": "jinja", "title": "Jinja", "text": "Templates of pages", "popularity": 9},
]
USERS = [
    {"id": "ann", "text": "Likes numbers", "history": [0, 1, 2]},
    {"id": "<bob>", "text": "", "history": [4]},
    {"id": "new", "text": "", "history": []},
]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="session")
def complete(tmp_path_factory):
    """The folder."""
    folder = tmp_path_factory.mktemp("space") / "runs" / "tiny" / "model"
    counts = {"num_users": len(USERS), "num_items": len(ITEMS)}
    TokenizerWithUserItemIDTokens.from_backbone(train_byte_level_bpe([], 257), **counts).save_pretrained(folder)
    torch.manual_seed(0)
    CLLM4RecForRecommendation(
        CLLM4RecConfig(
            backbone_config=GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=0),
            prompt_ids={"history": [10, 11], "separator": [12], "recommend": [13, 14]},
            max_history=4,
            initializer_range=0.5,
            **counts,
        )
    ).save_pretrained(folder)
    for path in Path(modeling_cllm4rec.__file__).parent.glob("*_cllm4rec.py"):
        shutil.copyfile(path, folder / path.name)
    write_lines(folder / "items.jsonl", ITEMS)
    write_lines(folder / "users.jsonl", USERS)
    return folder


@pytest.fixture(scope="session")
def recommender(complete):
    return Recommender(str(complete))


@pytest.fixture(scope="session")
def without_users(complete, tmp_path_factory):
    folder = shutil.copytree(complete, tmp_path_factory.mktemp("private") / "model")
    (folder / "users.jsonl").unlink()
    return Recommender(str(folder))


@pytest.fixture(scope="session")
def well_read(complete, tmp_path_factory):
    """One that reads texts."""
    folder = shutil.copytree(complete, tmp_path_factory.mktemp("well-read") / "model")
    terms = sorted({number for item in ITEMS for number, _ in terms_of(words_of(item["text"]))})
    model = CLLM4RecForRecommendation.from_pretrained(folder)
    model.config.num_text_terms = len(terms)
    torch.manual_seed(2)
    model.model.text_map = TextMap(len(terms), 8)
    model.model.text_map.terms.copy_(torch.tensor(terms))
    model.save_pretrained(folder)
    return Recommender(str(folder))
