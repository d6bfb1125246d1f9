"""The sampled softmax is the exact one where all items are candidates, and right on average where few are."""

import numpy as np
import pytest
import torch

from configuration.recipe import Method
from training.data.batches import layout_of
from training.data.ragged import Ragged
from training.stages.collaborative import collaborative_objective
from training.stages.recommendation import recommendation_objective
from training.stages.sampled_softmax import Negatives, SampledSoftmax

# Item 3 is the most popular, then 0, then 9.
HISTORIES = Ragged.from_lists([[3, 0], [3, 9], [3, 0, 9], [3, 0], [7]])


@pytest.mark.parametrize("number", [2, 5, 8, 40])
def test_negatives_are_distinct_and_the_most_popular_are_always_there(number):
    negatives = Negatives.of(HISTORIES, 12, number, seed=1)
    popular = [3, 0, 9, 7][: number // 2]
    for step in range(50):
        batch = negatives.draw(0, step)
        items, weights = batch["candidates"].numpy(), batch["candidate_log_weights"].numpy()
        assert (np.diff(items) > 0).all()
        assert items[0] >= 0
        assert items[-1] < 12
        assert set(popular) <= set(items)
        assert (weights[np.isin(items, negatives.popular)] == 0).all()
        assert (weights[~np.isin(items, negatives.popular)] > 0).all() or negatives.others == 0


def test_every_item_is_drawn_as_often_as_its_weight_says():
    negatives = Negatives.of(HISTORIES, 12, 8, seed=1)
    seen, weights = np.zeros(12), np.zeros(12)
    for step in range(4000):
        batch = negatives.draw(0, step)
        seen[batch["candidates"]] += 1
        weights[batch["candidates"]] += np.exp(batch["candidate_log_weights"].numpy())
    np.testing.assert_allclose(weights / 4000, 1, atol=0.06)
    assert (seen[negatives.popular] == 4000).all()
    assert seen.min() > 1000


def test_negatives_depend_on_seed_epoch_and_step_and_on_nothing_else():
    drawn = [
        tuple(Negatives.of(HISTORIES, 10_000, 100, seed).draw(epoch, step)["candidates"].tolist())
        for seed, epoch, step in ((1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


def objective_of(kind, shop, teacher=None, **method):
    layout, method = layout_of(shop), Method(**method)
    if kind == "collaborative":
        return collaborative_objective(shop, method, layout, 0, regularise=False)
    return recommendation_objective(shop, method, layout, 0, regularise=False, teacher=teacher)


class Teacher:
    """Scores that are as good as any."""

    def logits(self, users, items=None):
        scores = np.sin(np.arange(12) * (1 + users[:, None])).astype(np.float32)
        return scores if items is None else scores[:, items]


@pytest.mark.parametrize("kind", ["collaborative", "recommendation"])
@pytest.mark.parametrize("targets", ["held_out", "all"])
def test_with_all_items_for_candidates_losses_and_gradients_are_the_exact_ones(make_towers, shop, kind, targets):
    results = []
    for softmax in ("exact", "sampled"):
        towers = make_towers(item_bias=True)
        with torch.no_grad():
            towers.base.item_bias.copy_(torch.linspace(-1, 1, 12))
        objective = objective_of(kind, shop, Teacher(), softmax=softmax, num_negatives=24, targets=targets)
        losses = towers.eval()(objective.name, objective.collate(np.arange(4), 0, 0), None)
        sum(losses.values()).backward()
        results.append(
            (losses, towers.base.item_embeddings.weight.grad.to_dense(), towers.base.item_bias.grad.to_dense())
        )
    torch.testing.assert_close(*results)
    assert ("distilled" in results[0][0]) == (kind == "recommendation")


def test_the_next_item_is_learnt_by_a_sampled_softmax_too(make_towers, shop):
    found = []
    for softmax in ("exact", "sampled"):
        fields = {"history_order": "chronological", "targets": "next", "softmax": softmax, "num_negatives": 24}
        objective, towers = objective_of("recommendation", shop, **fields), make_towers().eval()
        found.append(towers(objective.name, objective.collate(np.arange(4), 0, 0), None))
    torch.testing.assert_close(*found)
    assert found[0]["likelihood"] > 0


def test_few_negatives_give_the_sum_of_the_softmax_on_average():
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Embedding(300, 4)
    with torch.no_grad():
        table.weight.normal_(generator=generator)
    states, targets = torch.randn(6, 4, generator=generator), torch.tensor([0, 3, 9, 50, 200, 299])
    exact = torch.nn.functional.linear(states, table.weight).exp().sum(-1)
    negatives, sums = Negatives.of(HISTORIES, 300, 40, seed=3), []
    for step in range(2000):
        softmax = SampledSoftmax(table, None, negatives.draw(0, step))
        rows = torch.arange(6)
        others = softmax.mask(softmax.candidate_logits(states), rows, targets).exp().sum(-1)
        sums.append(softmax.target_logits(states, targets).exp() + others)
    torch.testing.assert_close(torch.stack(sums).mean(0), exact, rtol=0.05, atol=0)


def test_a_step_touches_no_item_that_is_neither_candidate_nor_in_the_batch(make_towers, shop):
    towers = make_towers(item_bias=True)
    towers.base.item_embeddings.sparse = True
    objective = objective_of("recommendation", shop, softmax="sampled", num_negatives=4)
    batch = objective.collate(np.arange(1), 0, 0)
    towers("recommendation", batch, None)["likelihood"].backward()
    layout = layout_of(shop)
    named = set((batch["input_ids"][batch["input_ids"] >= layout.first_item] - layout.first_item).tolist())
    allowed = named | set(batch["candidates"].tolist()) | set(batch["labels"].flatten().tolist())
    gradient = towers.base.item_embeddings.weight.grad
    assert gradient.is_sparse
    touched = set(gradient.to_dense().any(1).nonzero().flatten().tolist())
    assert touched <= allowed
    assert len(allowed - {-100}) < 12, "all items are touched, so that nothing is looked at"
    assert set(towers.base.item_bias.grad.to_dense().nonzero().flatten().tolist()) <= allowed
