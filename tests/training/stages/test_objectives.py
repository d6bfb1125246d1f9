import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from configuration.recipe import Method
from training.stages.collaborative import collaborative_objective
from training.stages.content import content_objective
from training.stages.recommendation import recommendation_objective
from training.stages.teacher import Blend, Teacher

HEADS = ["content", "collaborative", "recommendation"]


def objective(name, shop, layout, regularise=True, teacher=None, **method):
    method = Method(**method)
    if name == "content":
        return content_objective(shop, method)
    if name == "collaborative":
        return collaborative_objective(shop, method, layout, 1, regularise=regularise)
    return recommendation_objective(shop, method, layout, 1, regularise=regularise, teacher=teacher)


@pytest.mark.parametrize("name", ["collaborative", "recommendation"])
def test_histories_regularise_their_users_and_the_distinct_items_of_whole_histories(shop, layout, name):
    users, items = objective(name, shop, layout, max_history=2).regularised(np.array([3, 1]))
    assert users.tolist() == [1, 3]
    assert items.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_texts_regularise_the_distinct_users_and_items_they_are_about(shop, layout):
    texts = shop.texts()
    documents = np.flatnonzero((texts.user == 2) | (texts.item == 7))
    users, items = objective("content", shop, layout).regularised(documents)
    assert users.tolist() == sorted({user for user in texts.user[documents].tolist() if user != -1})
    assert items.tolist() == sorted({item for item in texts.item[documents].tolist() if item != -1})
    assert -1 in texts.user[documents]
    assert -1 in texts.item[documents]


@pytest.mark.parametrize("name", HEADS)
def test_nothing_is_regularised_at_weight_zero(shop, layout, name):
    assert objective(name, shop, layout, lambda_v=0.0).regularised is None


@pytest.mark.parametrize("name", ["collaborative", "recommendation"])
def test_nothing_is_regularised_without_a_content_tower(shop, layout, name):
    assert objective(name, shop, layout, regularise=False).regularised is None


@pytest.mark.parametrize("name", HEADS)
def test_lengths_are_those_of_texts_and_of_cut_histories(shop, layout, name):
    wanted = shop.texts().documents.lengths if name == "content" else np.full(6, 3)
    assert objective(name, shop, layout, max_history=3).lengths.tolist() == wanted.tolist()


def test_a_teacher_comes_with_its_logits_for_the_users_of_the_batch(shop, layout):
    tables = np.eye(6, 2, dtype=np.float32), np.ones((12, 2), np.float32)
    teacher = Teacher(*tables, train=csr_matrix((6, 12)), blend=Blend({}, 0.0, 0.0, scale=3.0))
    batch = objective("recommendation", shop, layout, teacher=teacher).collate(np.array([1, 4]), 0)
    assert torch.equal(batch["teacher_logits"], torch.tensor([[3.0] * 12, [0.0] * 12]))
    assert "teacher_logits" not in objective("recommendation", shop, layout).collate(np.array([1, 4]), 0)
