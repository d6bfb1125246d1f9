"""The published recipe reads what our corpora hold, costs what it says, and learns."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import log_softmax

from benchmarks import published_recipe, sets
from benchmarks.published_recipe import Batch, Documents, PublishedRecipe, padding_share, published, train_published
from configuration.recipe import Backbone, Data, Method, Recipe, SideTable
from training.data.corpora import ITEM_TEXT, REVIEW, USER_TEXT, build_corpora, open_corpora
from training.data.interactions import build_interactions
from training.data.readers import read_tables

USERS, ITEMS = 30, 25
TEXTS = ["(Good) value", "It is better than item_3, they say", "bad " * 40, "", "  two blanks, three dots ...", "ça va"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLLM4REC_DATA", str(tmp_path_factory.mktemp("no-data")))
        patch.setattr(sets, "NUM_WORDS", 1000)
        return sets.make_backbone(tmp_path_factory.mktemp("backbones"), layers=1, width=16, heads=2)


@pytest.fixture(scope="module")
def corpora(backbone, tmp_path_factory):
    """Thirty people with two to nine of twenty-five things for training; some wrote reviews."""
    folder, random = tmp_path_factory.mktemp("stall"), np.random.default_rng(0)
    frame = pd.DataFrame(
        {"user": f"u{user:02}", "item": f"i{item:02}", "split": split, "review": TEXTS[(user + place) % len(TEXTS)]}
        for user in range(USERS)
        for place, (item, split) in enumerate(
            zip(random.permutation(ITEMS), ["test", "validation", *["train"] * (2 + user % 8)], strict=False)
        )
    )
    items = pd.DataFrame({"id": sorted(set(frame["item"])), "title": "A thing", "text": "Sold by weight."})
    users = pd.DataFrame({"id": sorted(set(frame["user"])), "text": ["", *["someone who walks"] * (USERS - 1)]})
    items.to_csv(folder / "items.csv", index=False)
    users.to_csv(folder / "users.csv", index=False)
    recipe = Recipe(
        data=Data(
            review_column="review",
            split="given",
            items=SideTable(str(folder / "items.csv"), title_column="title", text_columns=["text"]),
            users=SideTable(str(folder / "users.csv"), text_columns=["text"]),
        ),
        backbone=Backbone(name=str(backbone)),
        method=Method(max_text_tokens=12),
    )
    interactions = build_interactions(read_tables(recipe.data, frame), recipe.data, recipe.seed)
    return build_corpora(interactions, recipe, folder / "corpora", progress=False)


@pytest.fixture
def documents(corpora, backbone):
    return Documents.of(corpora, backbone)


@pytest.fixture
def recipe(documents, backbone):
    return PublishedRecipe(documents, backbone)


def test_content_documents_hold_the_ids_of_the_corpora(corpora, documents):
    texts = corpora.texts()
    assert {REVIEW, ITEM_TEXT, USER_TEXT} == set(texts.kind)
    assert len(documents.texts) == len(texts)
    for place, document in enumerate(texts.documents):
        prompt, main = documents.prompt_and_main("content", place)
        assert [*prompt, *main] == document.tolist()
        assert len(prompt) == texts.prompt_length[place]


def test_strings_of_histories_get_the_ids_of_our_tokenizer(corpora, documents):
    users, histories = corpora.histories("collaborative")
    first_user, first_item = corpora.tokenizer.num_words, corpora.tokenizer.num_words + USERS
    parts = corpora.info["prompt_ids"]
    for user, items in zip(users.tolist(), histories, strict=True):
        prompt, main = documents.prompt_and_main("collaborative", user)
        assert prompt == [first_user + user, *parts["history"]]
        assert main == (first_item + items).tolist()
        ids = documents.encode(documents.recommendation_prompt(user, held_out=0.0))
        start, end = 1 + len(parts["history"]), 1 + len(parts["history"]) + len(items)
        assert ids[:start] == prompt
        assert sorted(ids[start:end]) == sorted(main)
        assert ids[end:] == [*parts["separator"], first_user + user, *parts["recommend"]]


def test_a_fifth_of_the_history_at_least_one_item_is_left_out_of_the_prompt_and_all_of_it_is_the_target(documents):
    user = max(documents.histories, key=lambda user: len(documents.histories[user]))
    history = documents.histories[user]
    assert len(history) == 9
    batch = documents.batch("recommendation", [user])
    first_item = documents.num_words + USERS
    prompted = (batch.ids[batch.ids >= first_item] - first_item).tolist()
    assert len(prompted) == 8
    assert set(prompted) < set(history)
    assert batch.rows[0].nonzero()[:, 0].tolist() == sorted(history)
    assert batch.target_ids[0].tolist() == [first_item + item for item in history]


def test_a_batch_is_as_long_as_its_longest_document(documents):
    short, long = (
        choose(documents.histories, key=lambda user: len(documents.histories[user])) for choose in (min, max)
    )
    batch = documents.batch("collaborative", [short, long])
    prompt, history = documents.prompt_and_main("collaborative", long)
    assert batch.main == len(prompt)
    assert batch.ids.shape == batch.mask.shape == (2, len(prompt) + len(history))
    assert batch.mask.sum(1).tolist() == [len(prompt) + len(documents.histories[short]), len(prompt) + len(history)]


def test_padding_share_counts_all_positions_of_an_epoch(documents):
    documents.histories = {**{user: [1] for user in range(19)}, 19: [1, 2, 3, 4, 5]}
    prompt = len(documents.encode("user_0 has interacted with"))
    assert padding_share(documents, "collaborative", batches=1) == pytest.approx(19 * 4 / (20 * (prompt + 5)))


def test_the_loss_is_that_of_each_documents_own_tokens(documents, recipe):
    users = [0, 7, 3]
    tower = recipe.towers["collaborative"].eval()
    first_item = documents.num_words + USERS
    lost = []
    for user in users:
        prompt, main = documents.prompt_and_main("collaborative", user)
        ids = torch.tensor([[*prompt, *main]])
        logits = tower(Batch(ids, torch.ones_like(ids)))[0] @ tower.items.weight.T
        for place in range(len(prompt), ids.shape[1] - 1):
            lost.append(-log_softmax(logits[place], -1)[ids[0, place + 1] - first_item])
    batch = documents.batch("collaborative", users)
    found = tower.language_loss(batch, tower.items.weight, first_item)
    assert found.item() == pytest.approx(torch.stack(lost).mean().item(), rel=1e-5)


def test_what_fills_the_padding_does_not_matter(documents, recipe):
    kinds = [source.kind for source in documents.texts]
    tower = recipe.towers["content"].eval()
    # A review's prompt is longer than that of a person's text, so the shorter one is padded before its text, too.
    batch = documents.batch("content", [kinds.index(REVIEW), kinds.index(USER_TEXT)])
    assert (batch.mask[:, : batch.main] == 0).any()
    loss = tower.language_loss(batch, tower.backbone.wte.weight, 0)
    batch.ids[batch.mask == 0] = 77
    assert tower.language_loss(batch, tower.backbone.wte.weight, 0).item() == pytest.approx(loss.item(), rel=1e-6)


def test_each_epoch_takes_every_document_once_in_an_order_of_its_own(documents):
    first, second = ([key for keys in documents.epoch("content") for key in keys] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(len(documents.texts)))
    assert first != second
    assert first != sorted(first)


def test_the_published_reading_is_at_each_prompts_last_token(documents, recipe):
    tower = recipe.towers["collaborative"].eval()
    batch = documents.batch("predict", [0, 7])
    together = tower.item_scores(batch)
    for row in range(2):
        length = batch.mask[row].sum()
        hidden = tower(Batch(batch.ids[row : row + 1, :length], batch.mask[row : row + 1, :length]))[0, -1]
        alone = log_softmax(tower.items.weight @ hidden, -1)
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_a_tower_is_pulled_to_the_other_which_stays(recipe):
    content, collaborative = recipe.towers["content"], recipe.towers["collaborative"]
    before = {name: weight.clone() for name, weight in content.state_dict().items()}
    with torch.no_grad():
        collaborative.load_state_dict(content.state_dict())
    torch.manual_seed(1)
    alike = recipe.step("collaborative", [0, 1])
    assert all(torch.equal(weight, before[name]) for name, weight in content.state_dict().items())
    assert not torch.equal(collaborative.items.weight, content.items.weight)
    with torch.no_grad():
        collaborative.load_state_dict(content.state_dict())
        content.users.weight[0] += 0.5
    torch.manual_seed(1)
    width = content.users.embedding_dim
    # The sum goes over the places of a batch: user 0 stands once in this one.
    assert recipe.step("collaborative", [0, 1]) - alike == pytest.approx(width * 0.25, rel=1e-3)


@pytest.mark.parametrize("stage", ["content", "collaborative", "recommendation"])
def test_the_loss_falls(stage, recipe):
    keys = list(range(12))
    losses = [recipe.step(stage, keys) for _ in range(15)]
    assert losses[-1] < losses[0] - 0.05


def test_predict_gives_the_unseen_items_best_first(documents, recipe):
    for _ in range(5):
        recipe.step("recommendation", list(range(20)))
    users = [4, 0, 11]
    documents.order.seed(5)
    ranked = recipe.predict(users)
    documents.order.seed(5)
    scores = recipe.scores(documents.batch("predict", users))
    for user, row, found in zip(users, scores, ranked, strict=True):
        unseen = [item for item in range(ITEMS) if item not in documents.histories[user]]
        assert found.tolist() == sorted(unseen, key=lambda item: -row[item])


def test_predict_gives_a_hundred_at_most(recipe, monkeypatch):
    monkeypatch.setattr(published_recipe, "TOP", 3)
    assert [len(items) for items in recipe.predict([0, 1])] == [3, 3]


def test_published_counts_the_documents_that_a_call_works_off(corpora, backbone, monkeypatch):
    monkeypatch.setattr(published_recipe, "PREDICTED_TOGETHER", 8)
    assert published("recommendation", corpora.folder, backbone, 1)() == 20
    assert published("predict", corpora.folder, backbone, 1)() == 24  # 20 users, in whole batches of 8
    work = published("collaborative", corpora.folder, backbone, 2)
    assert [work(), work()] == [30, 30]  # 20 and the 10 that are left of an epoch


def test_strings_and_tokens_goes_over_every_document_of_each_stage(corpora, backbone):
    work = published_recipe.strings_and_tokens(corpora.folder, backbone)
    assert work() == len(corpora.texts()) + 2 * USERS


def test_the_schedule_alternates_both_language_models_and_measures_each_epoch(corpora, backbone):
    epochs = list(train_published(corpora.folder, backbone, 2, 3))
    assert [epoch.stage for epoch in epochs] == ["content", "collaborative"] * 2 + ["recommendation"] * 3
    assert [epoch.number for epoch in epochs] == list(range(1, 8))
    assert np.all(np.diff([epoch.seconds for epoch in epochs]) > 0)
    assert all(0 < epoch.ndcg_at_100 < 1 for epoch in epochs)
    assert epochs[-1].loss < epochs[4].loss


def test_no_epoch_is_begun_after_the_time_is_up(corpora, backbone):
    assert len(list(train_published(corpora.folder, backbone, 2, 3, seconds=0.0))) == 1


def test_a_set_that_is_not_there_is_replaced_by_the_sample_in_so_many_words(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CLLM4REC_DATA", str(tmp_path))
    assert sets.set_at_hand("ml-100k") == "sample"
    assert "ml-100k: CLLM4REC_DATA names no folder with ml-100k" in capsys.readouterr().out
    (tmp_path / "ml-100k").mkdir()
    assert sets.set_at_hand("ml-100k") == "ml-100k"
    assert capsys.readouterr().out == ""


def test_the_corpora_of_the_sample_are_built_once_with_the_backbones_words(monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "NUM_WORDS", 400)
    monkeypatch.setenv("CLLM4REC_DATA", str(tmp_path))
    folder = sets.make_corpora("sample", tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert sets.make_corpora("sample", tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == made
    counts = open_corpora(folder).info["counts"]
    assert (counts["users"], counts["items"], counts["words"], counts["item_texts"]) == (1091, 485, 400, 485)
