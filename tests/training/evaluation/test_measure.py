"""What a run measures beyond the ranking, on the store's run: strangers, comparisons, the model's own facts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from training.data.batches import layout_of
from training.evaluation.baselines import fit_baselines
from training.evaluation.measure import hub_name, model_record
from training.evaluation.scoring import ModelScores, split_matrix


def test_scores_without_user_tokens_are_those_of_strangers_with_the_same_history(store, model):
    users, histories = store.histories("recommendation")
    scores = ModelScores(model, users, histories, layout_of(store), model.config.max_history, user_tokens=False)
    given = torch.from_numpy(scores(users[:5])).softmax(-1)
    with torch.no_grad():
        prompts = model.prepare_prompts([row.tolist() for row in histories.take(range(5))])
        expected = model(**prompts).logits.softmax(-1)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def ndcg_of(store, model):
    """NDCG@100 of each user when the model recommends to their training history, with the user named or not."""

    def ndcg_of(named):
        users, histories = store.histories("recommendation")
        seen = (split_matrix(store, "recommendation") + split_matrix(store, "validation")).tolil().rows
        best = model.recommend(
            [row.tolist() for row in histories], users.tolist() if named else None, seen=seen[users], k=24
        )
        assert users.tolist() == list(range(40))
        return ndcg_at_k(best.items.numpy(), split_matrix(store, "test").tolil().rows, 100)

    return ndcg_of


def test_the_figures_of_strangers_are_those_of_recommending_to_their_histories(ndcg_of, store_run):
    found = store_run.results["test_by_history"]
    assert found["ndcg_at_100"]["value"] == pytest.approx(ndcg_of(named=False).mean(), abs=1e-6)
    assert found["num_users"] == 40


def test_a_baseline_is_behind_the_model_by_the_differences_user_by_user(store, ndcg_of, store_run):
    train, validation, test = (split_matrix(store, name) for name in ("recommendation", "validation", "test"))
    score = fit_baselines(train, validation, ["popularity"])["popularity"].score(np.arange(40))
    unseen = np.where((train + validation).toarray() > 0, -np.inf, score)
    ranked = np.argsort(-unseen, axis=1, kind="stable")[:, : 24 - 9]
    theirs = ndcg_at_k(ranked, test.tolil().rows, 100)
    found = store_run.results["baselines"]["popularity"]
    for key, named in (("behind_model", True), ("behind_model_by_history", False)):
        difference = ndcg_of(named) - theirs
        assert found[key]["value"] == pytest.approx(difference.mean(), abs=1e-6)
        assert found[key]["standard_error"] == pytest.approx(difference.std(ddof=1) / 40**0.5, abs=1e-6)


def test_the_model_is_described_by_its_size_and_shape(model, store_run):
    record = model_record(model, store_run.recipe)
    assert record["parameters"] == sum(record["parts"].values()) == sum(each.numel() for each in model.parameters())
    assert record["parts"]["user_embeddings"] == 40 * 8
    assert record["parts"]["item_embeddings"] == 24 * 8
    assert record["backbone"] == {"model_type": "gpt2", "layers": 1, "width": 8, "words": 300}
    assert record["max_history"] == 16
    assert record["architecture"].startswith("CLLM4RecForRecommendation(")
    assert (record["base_model"], record["dataset"]) == (None, None)


def test_what_it_was_made_of_is_named_where_it_is_on_the_hub(model, store_run, tmp_path, monkeypatch):
    def named(backbone=None, hub=None, kind="table", path=None):
        recipe = store_run.recipe
        recipe = replace(recipe, backbone=replace(recipe.backbone, name=backbone, hub_name=hub))
        record = model_record(model, replace(recipe, data=replace(recipe.data, format=kind, path=path)))
        return record["base_model"], record["dataset"]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "folder").mkdir(parents=True)
    assert named(backbone="openai-community/gpt2") == ("openai-community/gpt2", None)
    assert named(backbone="me/folder") == (None, None)
    assert named(backbone="me/folder", hub="org/model") == ("org/model", None)
    assert named(kind="dataset", path="me/data") == (None, "me/data")
    assert named(kind="dataset", path="me/folder") == (None, None)
    assert named(kind="table", path="me/data") == (None, None)


@pytest.mark.parametrize("name", [None, "/models/it", "./it", "a/b/c", "has space"])
def test_other_names_are_no_repos(name):
    assert hub_name(name) is None
