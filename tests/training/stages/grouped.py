"""A small world of two groups: their users like their items, and speak their words."""

from types import SimpleNamespace

import numpy as np
import torch

from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.data.corpora import ITEM_TEXT, USER_TEXT, Texts
from training.data.ragged import Ragged

USERS, ITEMS, WORDS, WIDTH = 40, 20, 50, 8
GROUP_OF_USER, GROUP_OF_ITEM = np.arange(USERS) % 2, np.arange(ITEMS) % 2
PROMPT = {"history": [41, 42], "separator": [43], "recommend": [44, 45]}


def word(id):
    return f"w{id:03}"


def texts_of(kinds):
    """Each user and each item is described by words of its group, 0 to 9 or 20 to 29."""
    generator = np.random.default_rng(1)
    owners = [(USER_TEXT, user, -1, GROUP_OF_USER[user]) for user in range(USERS) if "user" in kinds]
    owners += [(ITEM_TEXT, -1, item, GROUP_OF_ITEM[item]) for item in range(ITEMS) if "item" in kinds]
    documents = [[49, *(20 * group + generator.integers(0, 10, 6))] for *_, group in owners]
    kind, user, item, _ = np.array(owners, dtype=int).reshape(-1, 4).T
    return Texts(Ragged.from_lists(documents, np.int32), kind, user, item, np.ones(len(owners), np.int32))


def sentence(*ids):
    return " ".join(word(id) for id in ids)


def corpora_of(kinds=("user", "item")):
    generator = np.random.default_rng(0)
    has = generator.random((USERS, ITEMS)) < np.where(GROUP_OF_USER[:, None] == GROUP_OF_ITEM, 0.6, 0.02)
    held_out = generator.random(has.shape) < 0.2
    parts = {"recommendation": has & ~held_out, "validation": has & held_out}

    def histories(name):
        users = np.flatnonzero(parts[name].any(1))
        return users, Ragged.from_lists([np.flatnonzero(row) for row in parts[name][users]])

    return SimpleNamespace(
        num_users=USERS, num_items=ITEMS, num_words=WORDS, histories=histories, texts=lambda name: texts_of(kinds),
        info={"prompt_ids": PROMPT},
        tokenizer=SimpleNamespace(batch_decode=lambda rows, **how: [sentence(*row) for row in rows]),
    )  # fmt: skip


def model_of_groups():
    """Items of a group lie on one side."""
    torch.manual_seed(0)
    backbone = {
        "model_type": "gpt2",
        "vocab_size": WORDS,
        "n_embd": WIDTH,
        "n_head": 2,
        "n_layer": 1,
        "n_positions": 64,
    }
    config = CLLM4RecConfig(backbone_config=backbone, num_users=USERS, num_items=ITEMS, prompt_ids=PROMPT)
    made = CLLM4RecForRecommendation(config).eval()
    with torch.no_grad():
        made.model.item_embeddings.weight[:, 0] = torch.from_numpy(2.0 * GROUP_OF_ITEM - 1)
    return made
