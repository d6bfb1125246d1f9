"""What a run ranks and measures, on the store's run: parts, strangers, comparisons, the model's own facts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from configuration.errors import InputError
from metrics.ndcg_at_k.ndcg_at_k import ndcg_at_k
from training.data.batches import layout_of
from training.evaluation import predictions, scoring
from training.evaluation.baselines import fit_baselines
from training.evaluation.measure import Ranker, hub_name, measure, model_record, rank_everyone
from training.evaluation.ranking import best_items, measure_users
from training.evaluation.scoring import ModelScores, split_matrix
from training.predict import predict
from training.run import Run


@pytest.mark.parametrize("items_per_block", [1, 10, 24])
def test_item_blocks_of_the_model_are_its_logits(store, model, monkeypatch, items_per_block):
    monkeypatch.setattr(scoring, "ITEMS_PER_BLOCK", items_per_block)
    users, histories = store.histories("recommendation")
    scores = ModelScores(model, users, histories, layout_of(store), model.config.max_history)
    blocks = list(scores.blocks(users[3:8]))
    with torch.no_grad():
        states = model.query_states([row.tolist() for row in histories.take(range(3, 8))], users[3:8].tolist())
        expected = model.item_logits(states)
    assert {block.shape[1] for block in blocks[:-1]} <= {items_per_block}
    torch.testing.assert_close(torch.cat(blocks, dim=1), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.from_numpy(scores(users[3:8])), expected, atol=1e-6, rtol=0)


def test_one_pass_gives_the_rankings_on_validation_on_test_and_on_test_by_history(store, model, store_run):
    ranker = Ranker(model, store, store_run.recipe)
    train, validation, test = (split_matrix(store, name) for name in ("recommendation", "validation", "test"))
    users = np.array([5, 0, 39, 17])
    ranked, probabilities = ranker(users)
    scores = ranker.scores(users)
    on_validation = best_items(scores, train[users], users, 100)
    on_test = best_items(scores, (train + validation)[users], users, 100)
    by_history = best_items(ranker.strangers(users), (train + validation)[users], users, 100)
    assert ranked.users is users
    np.testing.assert_array_equal(ranked.items, on_test.items)
    np.testing.assert_allclose(probabilities, on_test.probabilities, rtol=1e-6)
    for given, top, held_out in (
        (ranked.validation, on_validation, validation),
        (ranked.by_history, by_history, test),
    ):
        for name, values in vars(measure_users(top.items, held_out[users])).items():
            np.testing.assert_array_equal(getattr(given, name), values)


# Parts


@pytest.fixture
def rank(store_recipe, store_run, store, model, vary, make_accelerator, monkeypatch):
    """Rank for the store's users into a folder of the test's own, by default in four parts, and give them with their figures."""
    run = Run.of(store_recipe)
    shutil.copytree(store_run.run.model, run.model)
    recipe = vary(store_run.recipe, evaluation={"batch_size": 3})

    def rank(users_per_part=10, resume=False, recipe=recipe):
        monkeypatch.setattr(predictions, "USERS_PER_PART", users_per_part)
        parts = rank_everyone(model, store, recipe, run, make_accelerator(), resume=resume)
        return parts, measure(parts, store)[0]

    rank.run, rank.recipe = run, recipe
    return rank


@pytest.fixture
def ranked_users(monkeypatch):
    """The users that are ranked, in turn."""
    users, call = [], Ranker.__call__

    def noted(ranker, block):
        users.extend(block.tolist())
        return call(ranker, block)

    monkeypatch.setattr(Ranker, "__call__", noted)
    return users


def content(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_figures_do_not_depend_on_the_number_of_parts(rank, store_run):
    parts, figures = rank()
    four = pq.read_table(parts.predictions).sort_by("user")
    one_part, again = rank(users_per_part=1000)
    assert (parts.count, one_part.count) == (4, 1)
    assert len(list(one_part.predictions.iterdir())) == len(list(one_part.indices.iterdir())) == 1
    assert again == figures
    assert pq.read_table(one_part.predictions).sort_by("user").equals(four)
    for name, measured in figures.items():
        assert measured == approximately(store_run.results[name])  # in one batch


def approximately(found):
    if isinstance(found, dict):
        return {key: approximately(value) for key, value in found.items()}
    if isinstance(found, list):
        return [approximately(value) for value in found]
    return pytest.approx(found, abs=1e-12) if isinstance(found, float) else found


def test_each_user_is_in_one_part(rank):
    parts, _ = rank()
    tables = [pq.read_table(path) for path in sorted(parts.predictions.iterdir())]
    assert sorted(len(table) for table in tables) == [9, 9, 11, 11]
    assert len({user for table in tables for user in table["user"].to_pylist()}) == 40


def test_fewer_batches_than_parts_are_cut_smaller(rank, vary):
    parts, _ = rank(recipe=vary(rank.recipe, evaluation={"batch_size": 256}))
    assert [len(pq.read_table(path)) for path in sorted(parts.predictions.iterdir())] == [10, 10, 10, 10]


def test_going_on_with_other_batches_leaves_nobody_out_and_ranks_nobody_twice(rank, vary):
    parts, figures = rank()
    parts.files(2)[0].unlink()
    parts, again = rank(resume=True, recipe=vary(rank.recipe, evaluation={"batch_size": 5}))
    assert sorted(pq.read_table(parts.predictions)["user"].to_pylist()) == [f"person {user:02}" for user in range(40)]
    assert again == approximately(figures)


@pytest.mark.parametrize("folder", ["predictions", "indices"])
def test_only_the_parts_that_are_missing_are_ranked_again(rank, ranked_users, folder):
    parts, figures = rank()
    before = content(parts.predictions)
    names = pq.read_table(parts.files(2)[0])["user"].to_pylist()
    (getattr(parts, folder) / parts.files(2)[0].name).unlink()
    ranked_users.clear()
    parts, again = rank(users_per_part=20, resume=True)  # as many parts as were begun with
    assert sorted(ranked_users) == sorted(int(name.removeprefix("person ")) for name in names)
    after = content(parts.predictions)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["part-00002-of-00004.parquet"]
    assert [after[name][0] for name in after] == [before[name][0] for name in after]
    assert again == figures


def test_a_ranking_that_broke_off_goes_on_with_the_part_that_it_was_in(rank, ranked_users, monkeypatch):
    _, figures = rank(users_per_part=1000)
    call = Ranker.__call__

    def breaks(ranker, block):
        if len(ranked_users) >= 25:  # in the second part
            raise KeyboardInterrupt
        return call(ranker, block)

    shutil.rmtree(rank.run.folder / "predictions")
    ranked_users.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Ranker, "__call__", breaks)
        with pytest.raises(KeyboardInterrupt):
            rank(users_per_part=14)
    assert [path.name for path in (rank.run.folder / "predictions").iterdir()] == ["part-00000-of-00003.parquet"]
    done = len(pq.read_table(rank.run.folder / "predictions"))
    ranked_users.clear()
    parts, again = rank(resume=True)
    assert len(ranked_users) == len(set(ranked_users)) == 40 - done
    assert parts.count == 3
    assert again == figures


def test_nothing_is_ranked_again_where_all_is_there(rank, ranked_users):
    parts, figures = rank()
    before = content(parts.predictions)
    ranked_users.clear()
    assert rank(resume=True)[1] == figures
    assert ranked_users == []
    assert content(parts.predictions) == before


@pytest.mark.parametrize("changed", ["model", "top_k", "overwrite"])
def test_parts_of_another_ranking_are_replaced(rank, ranked_users, vary, changed):
    parts, _ = rank()
    ranked_users.clear()
    recipe = vary(rank.recipe, evaluation={"top_k": 5 if changed == "top_k" else 12})
    if changed == "model":
        with (rank.run.model / "config.json").open("a") as file:
            file.write("\n")
    rank(recipe=recipe, resume=changed != "overwrite")
    assert sorted(ranked_users) == list(range(40))
    assert {len(items) for items in pq.read_table(parts.predictions)["items"].to_pylist()} == {recipe.evaluation.top_k}


def test_a_lost_part_is_predicted_again_to_the_same_results(store_copy, store_run, vary):
    run = Run.of(store_copy)
    (lost,) = (run.folder / "predictions").iterdir()
    before = lost.read_bytes()
    lost.unlink()
    results = predict(vary(store_copy, evaluation={"baselines": ["popularity"]}), resume=True)
    assert lost.read_bytes() == before
    for name in ("test", "test_by_history", "validation", "bias", "examples"):
        assert results[name] == store_run.results[name]
    assert json.loads((run.folder / "results.json").read_text())["test"] == results["test"]


def test_predictions_without_results_are_not_replaced_unasked(store_copy):
    (Run.of(store_copy).folder / "results.json").unlink()
    with pytest.raises(InputError, match=r"predictions exists already; .*--resume, .*--overwrite"):
        predict(store_copy)


# Strangers and comparisons


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
