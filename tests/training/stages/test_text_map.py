import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.data.batches import layout_of
from training.data.corpora import ITEM_TEXT, USER_TEXT, Texts
from training.data.ragged import Ragged
from training.evaluation.scoring import ModelScores
from training.stages import terms, text_map
from training.stages.text_map import Ridge, fit_text_map, some

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


@pytest.fixture
def model():
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


@pytest.mark.parametrize("kinds", [("user", "item"), ("user",), ("item",)])
def test_sentences_lead_to_the_items_of_their_group_and_new_items_to_their_users(model, kinds, caplog):
    caplog.set_level(logging.INFO)
    fitted = fit_text_map(model, corpora_of(kinds), seed=0)
    assert model.config.num_text_terms == fitted.terms == len(model.model.text_map.terms)
    assert fitted.user_ndcg_at_100 > 0.6
    assert f"text map: terms {fitted.terms}" in caplog.text
    best = model.recommend(texts=[sentence(1, 2, 3), sentence(21, 22, 23)], k=5).items
    assert (GROUP_OF_ITEM[best] == [[0], [1]]).mean() >= 0.9
    new = model.add_items([sentence(4, 5, 6), sentence(24, 25, 26)])
    sides = model.model.item_embeddings.weight[list(new), 0]
    assert sides[0] < 0 < sides[1]
    assert fitted.weight_beside_history in text_map.WEIGHTS or "user" not in kinds


def test_without_texts_there_is_no_map(model):
    assert fit_text_map(model, corpora_of(()), seed=0) is None
    assert model.model.text_map is None
    assert model.config.num_text_terms == 0


def test_words_of_a_single_document_do_not_count(model, monkeypatch):
    monkeypatch.setattr(terms, "LEAST_DOCUMENTS", 10_000)
    assert fit_text_map(model, corpora_of(), seed=0) is None


def test_biases_are_not_counted_twice(model):
    without = copy.deepcopy(model)
    with torch.no_grad():
        model.model.item_bias[:] = 0.5 * model.model.item_embeddings.weight[:, 0]
    for made in (model, without):
        fit_text_map(made, corpora_of(), seed=0)
    scores = [made.item_logits(made.query_states(texts=[sentence(1, 2, 3)])) for made in (model, without)]
    torch.testing.assert_close(*scores, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("ridge", [0.5, 3.0])
def test_left_out_predictions_are_those_of_the_others(ridge):
    generator = np.random.default_rng(0)
    inputs = csr_matrix(generator.random((12, 5)) * (generator.random((12, 5)) < 0.6))
    outputs = generator.normal(size=(12, 3))
    fitted = Ridge.fit(inputs, outputs, ridge)
    centred, dense = outputs - outputs.mean(0), inputs.toarray()
    for row in (0, 7):
        others = np.arange(12) != row
        x, y = dense[others], centred[others]
        coefficients = np.linalg.solve(x.T @ x + ridge * np.eye(5), x.T @ y)
        np.testing.assert_allclose(fitted.left_out[row], dense[row] @ coefficients + outputs.mean(0), atol=1e-5)
    whole = np.linalg.solve(dense.T @ dense + ridge * np.eye(5), dense.T @ centred)
    np.testing.assert_allclose(fitted.coefficients, whole, atol=1e-5)


def test_of_too_many_rows_some_are_taken_in_order():
    taken = some(np.arange(100) % 2 == 0, 10, np.random.default_rng(0))
    assert len(taken) == 10
    assert (taken % 2 == 0).all()
    assert (np.diff(taken) > 0).all()
    assert some(np.arange(4) > 1, 10, np.random.default_rng(0)).tolist() == [2, 3]


def test_texts_of_known_users_are_added_by_what_validation_says(model):
    corpora = corpora_of()
    fitted = fit_text_map(model, corpora, seed=0)
    assert fitted.weight_beside_user > 0
    table = model.model.text_user_embeddings.weight
    assert model.config.text_user_embeddings
    assert table.shape == (USERS, WIDTH)
    assert not table.requires_grad
    users, histories = corpora.histories("recommendation")
    scores = ModelScores(model, users, histories, layout_of(corpora), model.config.max_history)
    asked = users[[4, 0]]
    states = model.query_states([histories[row].tolist() for row in (4, 0)], asked.tolist())
    torch.testing.assert_close(scores.states(asked), states)
    nameless = ModelScores(model, users, histories, layout_of(corpora), model.config.max_history, user_tokens=False)
    torch.testing.assert_close(nameless.states(asked), model.query_states([histories[row].tolist() for row in (4, 0)]))


def test_without_texts_of_users_nothing_is_added_to_them(model):
    assert fit_text_map(model, corpora_of(("item",)), seed=0).weight_beside_user == 0
    assert model.model.text_user_embeddings is None
