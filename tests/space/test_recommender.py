"""The demo's recommender: the search, the ranking for a visit, the map's numbers, and what cannot be opened."""

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from recommender import (
    Catalogue,
    Recommender,
    Unavailable,
    Visit,
    lay_out,
    principal_components,
    unlike_each_other,
    words,
)


@pytest.fixture
def films():
    rows = [
        ("tt1", "Star Wars", "A farm boy leaves home", 90),
        ("tt2", "The Wars of the Star", "Two kings", 10),
        ("tt3", "Startling", "Ghosts", 80),
        ("tt4", "Amélie", "A waitress in Paris", 70),
        ("tt5", "Upstart", "A start-up in a garage", 60),
        (6, "Solaris", "Scientists at a star", 95),
        ("star", "Nothing", "", 1),
    ]
    return Catalogue(dict(zip(("id", "title", "text", "popularity"), row, strict=True)) for row in rows)


def found(catalogue, query, **options):
    return [catalogue.ids[index] for index in catalogue.search(query, **options)]


def test_the_exact_id_comes_first_then_beginnings_then_words_then_parts_then_descriptions(films):
    assert found(films, "star") == ["star", "tt1", "tt3", "tt2", "tt5", 6]


def test_words_match_in_any_order_after_the_phrase(films):
    assert found(films, "wars star") == ["tt1", "tt2"]
    assert found(films, "star wars") == ["tt1", "tt2"]


def test_a_word_of_the_description_is_found_from_its_beginning(films):
    assert found(films, "wait") == ["tt4"]
    assert found(films, "aitress") == []


def test_case_accents_and_punctuation_make_no_difference(films):
    assert found(films, "AMELIE!") == found(films, "amélie") == ["tt4"]
    assert words("C++ & Ünïcode_names-2") == "c unicode names 2"


def test_an_id_that_is_a_number_is_found(films):
    assert found(films, "6") == [6]


def test_nothing_typed_gives_the_most_popular_and_what_nobody_has_gives_nothing(films):
    assert found(films, "  ", limit=3) == [6, "tt1", "tt3"]
    assert found(films, "zebra") == found(films, "?!") == []


def test_no_more_than_the_limit_are_found(films):
    assert found(films, "star", limit=2) == ["star", "tt1"]


def test_an_entry_without_a_title_goes_by_its_id(recommender):
    assert recommender.items.titles[4] == recommender.items.label(4) == "flask"
    assert recommender.items.label(0) == "NumPy (numpy)"


def test_a_history_is_ranked_as_the_pipeline_ranks_it(recommender):
    expected = recommender.pipe({"history": ["numpy", 7]}, top_k=3)
    ranked = recommender.rank(Visit((0, 2), size=3))
    assert [recommender.items.ids[found.item] for found in ranked] == [row["item"] for row in expected]
    assert [found.score for found in ranked] == pytest.approx([row["score"] for row in expected], abs=1e-6)
    assert [found.rank for found in ranked] == [1, 2, 3]


def test_a_user_starts_from_the_history_of_training_and_is_ranked_as_the_pipeline_ranks_them(recommender):
    visit = Visit(recommender.trained[0], 0)
    expected = recommender.pipe({"user": "ann"}, top_k=3)
    assert visit.history == (0, 1, 2)
    assert [recommender.items.ids[found.item] for found in recommender.rank(visit)] == [row["item"] for row in expected]


def test_an_item_that_a_visitor_takes_out_of_a_users_history_may_come_back(recommender):
    ranked = recommender.rank(Visit((0, 1), 0))
    assert {found.item for found in ranked} == {2, 3, 4, 5}


def test_an_empty_history_is_ranked_for_nobody_in_particular_and_a_full_one_not_at_all(recommender):
    assert len(recommender.rank(Visit(size=4))) == 4
    assert recommender.rank(Visit(tuple(range(6)))) == []


def test_what_a_visitor_says_is_ranked_as_the_pipeline_ranks_it(well_read):
    for visit, person in (
        (Visit(text="arrays of numbers"), {"text": "arrays of numbers"}),
        (Visit((4,), text="science"), {"history": ["flask"], "text": "science"}),
    ):
        found = [well_read.items.ids[one.item] for one in well_read.rank(visit)]
        assert found == [row["item"] for row in well_read.pipe(person, top_k=10)]
    assert [one.score for one in well_read.rank(visit)] != [one.score for one in well_read.rank(Visit((4,)))]


def test_a_model_that_reads_no_texts_passes_over_what_is_said(recommender):
    assert not recommender.reads_texts
    assert recommender.rank(Visit((4,), text="science")) == recommender.rank(Visit((4,)))


def test_recommendations_say_what_carried_them(well_read, monkeypatch):
    visit = Visit((0, 4), text="pages of the web")
    ranked = well_read.rank(visit)
    asked = [well_read.items.ids[one.item] for one in ranked]
    reasons = well_read.pipe.explain({"history": ["numpy", "flask"], "text": visit.text}, asked, top_k=2)
    assert [[well_read.items.ids[item] for item in one.items] for one in ranked] == [
        [each["item"] for each in reason["history"]] for reason in reasons
    ]
    assert [list(one.words) for one in ranked] == [[each["word"] for each in reason["words"]] for reason in reasons]
    assert any(one.items for one in ranked)
    assert any(one.words for one in ranked)
    monkeypatch.setattr("recommender.EXPLAINED", 1)
    assert [one.items + one.words for one in well_read.rank(visit)][1:] == [()] * (len(ranked) - 1)


def test_nobody_and_long_histories_are_not_explained(well_read, monkeypatch):
    assert not any(one.items or one.words for one in well_read.rank(Visit()))
    monkeypatch.setattr("recommender.EXPLAINED_HISTORY", 1)
    assert not any(one.items or one.words for one in well_read.rank(Visit((0, 4))))
    assert not any(one.items or one.words for one in well_read.rank(Visit((0, 4), text="numbers")))


def test_who_was_forgotten_is_neither_listed_nor_found():
    users = Catalogue([{"id": None, "history": []}, {"id": "none", "history": [1]}, {"id": "ann", "history": [2]}])
    assert users.search("") == users.by_popularity == [1, 2]
    assert found(users, "none") == ["none"]
    assert users.of_id == {"none": 1, "ann": 2}
    assert len(users) == 3


def test_a_model_without_users_has_none(without_users):
    assert without_users.users is None


def test_the_map_shows_the_two_directions_that_differ_most():
    embeddings = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1, 1, 1])
    points, explained = principal_components(embeddings, chunk=7)
    directions = (embeddings / embeddings.norm(dim=1, keepdim=True)).double().numpy()
    centred = directions - directions.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(centred @ axes[:2].T), atol=1e-5)
    assert explained == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum(), abs=1e-5)


def test_the_map_of_the_same_items_is_the_same_whatever_the_sign_of_an_axis():
    embeddings = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(lay_out(embeddings).places, lay_out(embeddings.clone()).places)
    assert lay_out(embeddings).places.min() == pytest.approx(0.03)
    assert lay_out(embeddings).places.max() == pytest.approx(0.97)


@pytest.mark.parametrize("embeddings", [torch.ones(3, 4), torch.zeros(3, 4), torch.ones(1, 4), torch.ones(3, 1)])
def test_items_that_do_not_differ_lie_in_the_middle(embeddings):
    np.testing.assert_allclose(lay_out(embeddings).places, 0.5)


def test_the_nearest_item_is_by_what_one_sees_of_a_picture_wider_than_high(recommender):
    places = recommender.map.places
    assert [recommender.map.nearest(*place) for place in places] == list(range(6))
    wide = type(recommender.map)(np.array([[0.4, 0.5], [0.5, 0.62]]), 1.0)
    assert wide.nearest(0.5, 0.5) == 1


def test_examples_are_popular_and_unlike_each_other():
    embeddings = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]])
    assert unlike_each_other(embeddings, [0, 1, 2, 3], 2) == [0, 3]
    assert unlike_each_other(embeddings, [1, 0], 5) == [1, 0]


def test_the_title_is_the_end_of_a_folders_path(recommender):
    assert recommender.title == "runs/tiny/model"


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_name_one_is_told_to_choose_a_model(name):
    with pytest.raises(Unavailable, match="No model is chosen: set the variable CLLM4REC_MODEL"):
        Recommender(name)


@pytest.mark.parametrize("name", ["runs/none/model", "./none", "/none"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(Unavailable, match=rf"There is no folder {name}: train a model first \(make quickstart\)"):
        Recommender(name)


def test_a_folder_of_something_else_is_named(tmp_path, caplog):
    with pytest.raises(Unavailable, match=f"The folder {tmp_path} holds no recommender"):
        Recommender(str(tmp_path))
    assert "Traceback" in caplog.text


def test_a_repo_of_the_hub_is_opened_at_a_revision(complete, recommender, hub):
    api = HfApi()
    api.create_repo("me/rec")
    api.upload_folder(repo_id="me/rec", folder_path=complete)
    api.create_tag("me/rec", tag="v1")
    api.delete_file("items.jsonl", repo_id="me/rec")
    opened = Recommender("me/rec", "v1")
    assert (opened.title, opened.is_folder) == ("me/rec", False)
    assert opened.rank(Visit((0,))) == recommender.rank(Visit((0,)))
    with pytest.raises(Unavailable, match="The Hub repo me/rec could not be opened"):
        Recommender("me/rec")


def test_a_repo_that_is_not_there_is_named_with_its_revision(caplog):
    with pytest.raises(Unavailable, match=r"The Hub repo me/none at v2 could not be opened .* HF_TOKEN"):
        Recommender("me/none", "v2")
