"""The demo's page: what a visitor's steps do, what it is made of, and that it asks no other host for anything."""

import ast
import logging
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import app
import pytest
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from recommender import Visit
from views import link

PROJECT = Path(__file__).resolve().parents[2]
SPACE = PROJECT / "space"


@pytest.fixture(scope="module")
def config(recommender):
    return app.page(recommender).get_config_file()


def elements(config):
    return {component["props"].get("elem_id"): component["props"] for component in config["components"]}


def test_an_item_is_added_once_at_the_end_and_removed_again(recommender):
    visit, said = app.add(recommender, Visit((1,)), 0)
    assert (visit, said) == (Visit((1, 0)), "Added NumPy (numpy).")
    assert app.add(recommender, visit, 0) == (visit, "NumPy (numpy) is in the history already.")
    assert app.remove(recommender, visit, 1) == (Visit((0,)), "Removed SciPy (scipy).")
    assert app.remove(recommender, Visit((0,)), 1)[0] == Visit((0,))


@pytest.mark.parametrize("visit", [Visit(), Visit((0, 2)), Visit((0, 1, 2), 0), Visit((5,), 0)])
def test_a_link_opens_the_visit_that_made_it(recommender, visit):
    asked = [pair.split("=") for pair in link(recommender, visit).split("&") if pair]
    given = {name: [value for key, value in asked if key == name] for name in ("item", "user")}
    assert app.open_link(recommender, given["item"], given["user"]) == (visit, "")


def test_what_a_link_names_and_nobody_knows_is_said_with_what_to_do(recommender, without_users):
    assert app.open_link(recommender, ["numpy", "cobol"], ["zoe"]) == (
        Visit((0,)),
        "There is no user zoe in this model: search for another, or add items. Not in the catalogue, so left out: cobol.",
    )
    assert app.open_link(without_users, [], ["ann"]) == (
        Visit(),
        "This model publishes no users, so ann is left out: add items instead.",
    )


def test_a_step_changes_all_that_is_seen(recommender):
    visit, history, ranking, marks = app.show(recommender, Visit((0,), size=3), "Added NumPy.")
    assert visit == Visit((0,), size=3)
    assert "NumPy" in history
    assert ranking.count('data-event="add_item"') == 3
    assert marks.count("pin numbered") == 3


def test_a_model_that_fails_is_a_sentence_for_the_visitor_and_a_trace_for_the_log(recommender, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    broken = SimpleNamespace(**vars(recommender) | {"rank": fail})
    *_, ranking, _ = app.show(broken, Visit((0,)))
    assert app.ASK_AGAIN in ranking
    assert "out of memory" not in ranking
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("data", [{}, {"index": -1}, {"index": 6}, {"index": "0"}])
def test_an_index_that_no_item_has_is_refused(data):
    with pytest.raises(IndexError, match="an event came with"):
        app.named(app.gr.EventData(None, data), range(6))


def test_a_user_replaces_the_history_and_leaves_how_many_are_shown(recommender):
    assert app.choose(recommender, Visit((4,), size=20), 0) == Visit((0, 1, 2), 0, 20)


def test_the_user_box_is_there_only_where_the_model_publishes_users(config, without_users):
    assert "user-search" in elements(config)
    assert "user-search" not in elements(app.page(without_users).get_config_file())


def test_the_box_for_words_is_there_only_where_the_model_reads_them(config, well_read):
    assert "said" not in elements(config)
    assert elements(app.page(well_read).get_config_file())["said"]["label"] == "Or say who you are or what you want"


@pytest.mark.parametrize(
    ("given", "person"),
    [
        ((["numpy"],), {"history": ["numpy"]}),
        (([], "ann"), {"user": "ann"}),
        ((["numpy"], "ann", 10, "science"), {"history": ["numpy"], "user": "ann", "text": "science"}),
        (([], None, 10, "science"), {"text": "science"}),
        (([],), {"history": []}),
    ],
)
def test_programs_get_what_the_pipeline_gives(well_read, given, person):
    recommend = next(step.fn for step in app.page(well_read).fns.values() if step.api_name == "recommend")
    assert recommend(*given) == well_read.pipe(person, top_k=10)


def test_what_a_visitor_says_is_kept_until_it_is_taken_back(well_read):
    say = next(step.fn for step in app.page(well_read).fns.values() if step.name == "say")
    visit, _, ranking, _ = say(Visit((0,)), " pages ")
    assert visit == Visit((0,), text="pages")
    assert "For a history of 1 item and “pages”." in ranking
    assert say(visit, " ")[0] == Visit((0,))
    assert "Nothing is said." in say(visit, "")[2]


def test_a_title_cannot_leave_the_attribute_it_is_written_in(recommender):
    catalogue = SimpleNamespace(**vars(recommender.items))
    box = app.search_box(catalogue, "x", "Add", 'such as "><script>', "Nothing.")
    assert box.props["placeholder"] == "such as &quot;&gt;&lt;script&gt;"


def test_the_search_gives_what_the_list_shows(recommender):
    box = app.search_box(recommender.items, "x", "Add", "", "")
    assert box.search("templates") == [{"index": 5, "title": "Jinja", "id": "jinja", "text": "Templates of pages"}]
    assert box.search("zebra") == []


def test_programs_have_one_function_and_visitors_steps_are_not_offered_to_them(config):
    public = [each["api_name"] for each in config["dependencies"] if each["api_visibility"] == "public"]
    assert public == ["recommend"]


def test_nothing_on_the_page_comes_from_another_host(config):
    theme = app.theme()
    assert theme._stylesheets == []
    assert set(re.findall(r"https?://[\w.]+", theme._get_theme_css())) <= {"http://www.w3.org"}  # the name of SVG
    files = "".join(path.read_text() for path in SPACE.iterdir() if path.suffix in (".css", ".html", ".js"))
    assert not re.findall(r"https?:|@import|url\(", files)
    assert set(re.findall(r"https?://[\w.]+", str(config["components"]))) == set()


def test_gradio_counts_nothing(config):
    assert app.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not config["analytics_enabled"]


def test_the_demo_imports_nothing_of_this_project():
    allowed = {"gradio", "numpy", "torch", "transformers", "recommender", "views", *sys.stdlib_module_names}
    for path in SPACE.glob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= allowed


def test_the_spaces_card_is_what_the_hub_takes_and_fits_the_requirements():
    card = RepoCard.load(SPACE / "README.md", repo_type="space").data
    assert (card.sdk, card.app_file, card.license) == ("gradio", "app.py", "apache-2.0")
    assert len(card.short_description) <= 60
    assert {card.colorFrom, card.colorTo} <= {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    required = {
        Requirement(line).name: Requirement(line)
        for line in (SPACE / "requirements.txt").read_text().split("\n")
        if line
    }
    assert required["gradio"].specifier.contains(card.sdk_version)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["space"]]
    assert {str(each) for each in required.values()} == {str(Requirement(each)) for each in stated}


def test_without_a_model_a_page_says_what_to_do(monkeypatch, capsys):
    launched = []
    monkeypatch.delenv("CLLM4REC_MODEL", raising=False)
    monkeypatch.setattr(
        app.gr.Blocks, "launch", lambda blocks, **options: launched.append(blocks) or (None, "ADDRESS", None)
    )
    monkeypatch.setattr(app.gr.Blocks, "block_thread", lambda blocks: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    app.main()
    assert (
        "No model is chosen: set the variable CLLM4REC_MODEL" in elements(launched[0].get_config_file())["top"]["value"]
    )
    assert capsys.readouterr().out == "Open ADDRESS in a browser; Ctrl+C ends it.\n"


def test_the_makefile_shows_the_quickstarts_folder_or_says_what_to_do():
    makefile = (PROJECT / "Makefile").read_text()
    assert "MODEL ?= runs/sample/model\n" in makefile
    target = makefile.split("\nspace: ")[1].split("\n\n")[0]
    assert "There is no model in $(MODEL): run make quickstart first" in target
    assert "CLLM4REC_MODEL=$(MODEL) $(BIN)/python space/app.py" in target
