"""What a visitor of the demo sees: HTML with every text escaped, a map that stays small, sentences in every state."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from recommender import Catalogue, CatalogueMap, Ranked, Visit
from views import (
    NARROW,
    header_view,
    history_view,
    link,
    map_picture,
    marks_view,
    percent,
    recommendations_view,
    sizes_view,
)

RANKED = [Ranked(3, 0.4, 1), Ranked(1, 0.1, 2)]


def places_of(html, kind):
    found = re.findall(rf'class="pin {kind}" data-index="(\d+)" style="left:([\d.]+)%;top:([\d.]+)%"', html)
    return {int(index): (float(left) / 100, float(top) / 100) for index, left, top in found}


def test_nothing_of_the_models_files_is_read_as_html(recommender):
    visit = Visit((3, 4), 1)
    seen = history_view(recommender, visit) + recommendations_view(recommender, visit, RANKED, "<i>said</i>", "")
    seen += marks_view(recommender, visit, RANKED)
    assert not re.findall(r"<(?:b|i|up|bob|script)>", seen)
    assert "&lt;b&gt;&amp;&quot;bold&quot; ${1} {{two}}&lt;/b&gt;" in seen
    assert "&lt;script&gt;" in seen
    assert "&lt;bob&gt;" in seen


@pytest.mark.parametrize(
    ("probability", "seen"),
    [
        (1, "100.0%"),
        (0.2564, "25.6%"),
        (0.0144, "1.4%"),
        (0.00337, "0.34%"),
        (0.003, "0.30%"),
        (2e-5, "0.0020%"),
        (3e-7, "<0.001%"),
        (0, "0.0%"),
    ],
)
def test_probabilities_have_the_digits_that_a_reader_takes_in(probability, seen):
    assert percent(probability) == seen


def test_bars_are_relative_to_the_first_and_numbers_are_not(recommender):
    html = recommendations_view(recommender, Visit((0,)), RANKED, "", "")
    assert re.findall(r'<span style="width:([\d.]+)%">', html) == ["100.00", "25.00"]
    assert re.findall(r'<span class="score">([^<]+)<', html) == ["40.0%", "10.0%"]


def test_what_carried_a_recommendation_is_named_and_escaped(recommender):
    ranked = [Ranked(1, 0.4, 1, (3, 0), ("<u>", "science")), Ranked(2, 0.3, 2, (0,)), Ranked(4, 0.2, 3)]
    html = recommendations_view(recommender, Visit((0, 3)), ranked, "", "")
    bold = "<b>&lt;b&gt;&amp;&quot;bold&quot; ${1} {{two}}&lt;/b&gt;</b>"
    assert (
        f'<p class="why">because of {bold} and <b>NumPy</b> · its text says <i>&lt;u&gt;</i>, <i>science</i></p>'
        in html
    )
    assert '<p class="why">because of <b>NumPy</b></p>' in html
    assert html.count('class="why"') == 2


def test_sizes_are_radio_buttons_of_a_named_group_and_ten_is_chosen():
    html = sizes_view()
    assert html.startswith('<fieldset class="sizes"><legend>How many</legend>')
    assert re.findall(r'value="(\d+)"[^>]*?( checked)?>', html) == [
        ("5", ""),
        ("10", " checked"),
        ("20", ""),
        ("50", ""),
    ]


def test_each_recommendation_has_a_button_that_says_what_it_adds(recommender):
    html = recommendations_view(recommender, Visit(), RANKED, "", "")
    assert 'data-index="1" title="Add to the history" aria-label="Add SciPy (scipy) to the history"' in html


@pytest.mark.parametrize(
    ("visit", "whose"),
    [
        (Visit(), "For nobody in particular. Add something you know, and this list follows."),
        (Visit((0,)), "For a history of 1 item."),
        (Visit((0, 1), 0), "For ann with a history of 2 items."),
        (Visit(text="maps"), "For “maps”."),
        (Visit((0,), text="maps"), "For a history of 1 item and “maps”."),
    ],
)
def test_the_ranking_says_for_whom_it_is(recommender, visit, whose):
    html = recommendations_view(recommender, visit, RANKED, "Added NumPy.", "")
    assert f">{whose} Added NumPy.</p>" in html


def test_where_everything_is_seen_or_the_model_fails_a_sentence_takes_the_rankings_place(recommender):
    everything = recommendations_view(recommender, Visit(tuple(range(6))), [], "", "")
    assert "Everything in the catalogue is in the history already. Remove an item" in everything
    failed = recommendations_view(recommender, Visit(), [], "", "The model did not answer.")
    assert '<p class="failed" role="alert">The model did not answer.</p>' in failed
    assert "<ol" not in everything + failed


def test_an_empty_history_says_what_to_do_and_offers_examples(recommender):
    html = history_view(recommender, Visit())
    assert "Type above to find something you know" in html
    assert html.count('data-event="add_item"') == len(recommender.examples) == 6


def test_a_history_can_be_shortened_and_cleared_and_says_what_the_model_leaves_out(recommender):
    html = history_view(recommender, Visit((0, 1, 2, 3, 5)))
    assert re.findall(r'data-event="remove_item" data-index="(\d)"', html) == ["0", "1", "2", "3", "5"]
    assert 'data-event="clear_items"' in html
    assert "The model reads the newest 4 of them." in html


def test_a_user_is_shown_with_a_way_out(recommender):
    html = history_view(recommender, Visit((4,), 0))
    assert "Likes numbers" in html
    assert "Known from training with 3 items" in html
    assert 'data-event="forget_user" aria-label="Remove the user ann"' in html


def test_the_header_links_to_the_page_of_a_repo_and_not_of_a_folder(recommender):
    assert "<a " not in header_view(recommender)
    repo = SimpleNamespace(
        **vars(recommender) | {"is_folder": False, "name": "me/rec", "title": "me/rec", "revision": "v1"}
    )
    assert "<h1>me/rec</h1>" in header_view(repo)
    assert 'href="https://huggingface.co/me/rec/tree/v1"' in header_view(repo)
    assert "ranks all 6 items" in header_view(repo)
    assert "3 users" in header_view(repo)


def test_the_map_marks_the_history_and_the_recommendations_at_their_places(recommender):
    html = marks_view(recommender, Visit((0, 2)), RANKED)
    expected = {index: tuple(place) for index, place in enumerate(recommender.map.places.round(4))}
    assert places_of(html, "had") == {index: pytest.approx(expected[index], abs=1e-4) for index in (0, 2)}
    assert places_of(html, "small") == {index: pytest.approx(expected[index], abs=1e-4) for index in (3, 1)}
    assert "history (2)" in html
    assert "recommended (2)" in html


def crowd(count):
    items = Catalogue({"id": f"item {index}", "popularity": count - index} for index in range(count))
    places = np.random.default_rng(0).random((count, 2))
    return SimpleNamespace(items=items, users=None, map=CatalogueMap(places, 0.5))


def test_numbered_marks_and_names_lie_beside_each_other_where_places_are_close():
    many = crowd(40)
    many.map.places[:12] = 0.5 + np.random.default_rng(1).random((12, 2)) / 50
    html = marks_view(many, Visit((10, 11)), [Ranked(index, 0.1, index + 1) for index in range(10)])
    marks = np.array(list(places_of(html, "numbered").values())) * NARROW
    assert len(marks) == 10
    assert min(np.abs(one - other).max() for one, other in itertools.combinations(marks, 2)) >= 20.9


def test_the_picture_of_a_large_catalogue_stays_small_and_loses_no_corner():
    html = map_picture(crowd(100_000))
    assert len(html) < 1_200_000
    dots = np.array(re.findall(r"M(\d+) (\d+)h0", html), dtype=int)
    assert len(np.unique(dots, axis=0)) == len(dots)
    assert dots.min() == 0
    assert dots.max(0).tolist() == [999, 747]


def test_popular_items_have_larger_dots():
    html = map_picture(crowd(3))
    assert [re.search(rf'class="dot-{kind}" d="([^"]*)"', html)[1].count("M") for kind in range(3)] == [0, 1, 2]


def test_a_visit_is_held_by_its_link(recommender):
    assert link(recommender, Visit()) == ""
    assert link(recommender, Visit((0, 2))) == "item=numpy&item=7"
    assert link(recommender, Visit((0, 1, 2), 0)) == "user=ann"
    assert link(recommender, Visit((3,), 1)) == "user=%3Cbob%3E&item=mark%3Cup%3E"
    assert link(recommender, Visit((0,) * 101)) == ""
