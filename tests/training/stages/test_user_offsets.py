import logging

import numpy as np
import pytest
import torch
from grouped import GROUP_OF_ITEM, GROUP_OF_USER, ITEMS, USERS, WIDTH, corpora_of, model_of_groups
from scipy.sparse import csr_matrix

from training.data.batches import layout_of
from training.evaluation.scoring import ModelScores, split_matrix
from training.stages import user_offsets
from training.stages.teacher import Blend, Teacher
from training.stages.text_map import item_head
from training.stages.user_offsets import fit_user_offsets


@pytest.fixture
def model():
    return model_of_groups()


@pytest.fixture
def teacher():
    """Who knows the groups, and gives every item of everybody two points more, which rank nothing."""
    sides = [
        np.stack([2.0 * groups - 1, np.full(len(groups), more)], axis=1).astype(np.float32)
        for groups, more in ((GROUP_OF_USER, 1), (GROUP_OF_ITEM, 2))
    ]
    return Teacher(*sides, csr_matrix((USERS, ITEMS), dtype=np.float32), Blend({}, 0.0, 0.0, scale=3.0))


def known_users():
    return np.flatnonzero(np.diff(split_matrix(corpora_of(), "recommendation").indptr))


def test_a_teacher_that_knows_better_moves_the_states_of_known_users_to_its_scores(model, teacher, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(user_offsets, "TEACHER_SHARES", (0.0, 1.0))
    monkeypatch.setattr(user_offsets, "USERS_AT_A_TIME", 7)
    corpora = corpora_of()
    with torch.no_grad():
        model.model.item_bias[:] = 0.3 * torch.from_numpy(np.random.default_rng(0).normal(size=ITEMS))
    fitted = fit_user_offsets(model, corpora, teacher, None, seed=0)
    assert (fitted.teacher_share, fitted.text_weight) == (1.0, 0.0)
    assert "user offsets: teacher_share 1" in caplog.text
    table = model.model.user_offsets.weight
    assert model.config.user_offsets
    assert table.shape == (USERS, WIDTH)
    assert not table.requires_grad
    users, histories = corpora.histories("recommendation")
    scores = ModelScores(model, users, histories, layout_of(corpora), model.config.max_history)
    weight, bias = item_head(model)
    # The nearest scores that the head can give, whatever all items share being nothing to their order.
    wanted = teacher.logits(known_users()) - bias
    wanted -= wanted.mean(1, keepdims=True)
    nearest = weight @ np.linalg.solve(weight.T @ weight + 1e-3 * np.eye(WIDTH), weight.T @ wanted.T)
    np.testing.assert_allclose(scores(known_users()) - bias, nearest.T, atol=0.01)
    states = model.query_states([histories[row].tolist() for row in (4, 0)], users[[4, 0]].tolist())
    torch.testing.assert_close(scores.states(users[[4, 0]]), states)


def test_texts_are_added_as_validation_likes(model):
    said = np.zeros((USERS, WIDTH), np.float32)
    said[:, 0] = 2.0 * GROUP_OF_USER - 1
    fitted = fit_user_offsets(model, corpora_of(), None, said, seed=0)
    assert fitted.teacher_share == 0
    assert fitted.text_weight > 0
    known = known_users()
    np.testing.assert_allclose(
        model.model.user_offsets.weight[known].numpy(), fitted.text_weight * said[known], rtol=1e-6
    )


def test_whoever_has_no_training_item_has_no_offset(model, teacher):
    fit_user_offsets(model, corpora_of(), teacher, np.ones((USERS, WIDTH), np.float32), seed=0)
    strangers = np.setdiff1d(np.arange(USERS), known_users())
    assert not model.model.user_offsets.weight[strangers].any()


@pytest.mark.parametrize("lacking", ["anything to add", "user embeddings"])
def test_without_something_to_add_or_a_table_of_users_there_are_no_offsets(model, teacher, lacking):
    model.config.user_embeddings = lacking != "user embeddings"
    given = None if lacking == "anything to add" else teacher
    assert fit_user_offsets(model, corpora_of(), given, None, seed=0) is None
    assert model.model.user_offsets is None
    assert not model.config.user_offsets


def test_what_validation_does_not_like_is_left_out(model, teacher):
    wrong = Teacher(-teacher.user_factors, teacher.item_factors, teacher.train, teacher.blend)
    with torch.no_grad():
        # The model already knows: the user's embedding is on the side of the group's items.
        model.model.user_embeddings.weight[:, 0] = 50 * torch.from_numpy(2.0 * GROUP_OF_USER - 1)
    assert fit_user_offsets(model, corpora_of(), wrong, None, seed=0) is None
