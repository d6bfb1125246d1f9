"""The demo in a real browser: whole visits by mouse, by keyboard, on a telephone, in the dark, and where something is missing.

Pictures of what was seen go to the folder that CLLM4REC_SCREENSHOTS names, or to a temporary one.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from transformers import pipeline

from configuration.load import load_recipe
from training.finetune import finetune
from training.pretrain import pretrain

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = '<img src=x onerror="document.title=1"> ${1+1} {{this}} & "quoted"'
LONG = "A title without end, " + "averyveryverylongwordthatnothingbreaks" * 3
PAGE, PHONE = {"width": 1280, "height": 900}, {"width": 400, "height": 850}
ITEM, USER = "Add an item by title, id or topic", "Or start from a user of training, by id"
SAID = "Or say who you are or what you want"
# The relative luminance of WCAG 2, of an element's text and of what lies behind it.
CONTRAST = """element => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  let behind = element;
  while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) < 1) behind = behind.parentElement;
  const [text, ground] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(c => luminance(parse(c)));
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_shop):
    """The folder of a small trained model with titles, texts and published users."""
    folder = tmp_path_factory.mktemp("shop")
    titles = [f"Thing {index}" for index in range(20)]
    titles[3], titles[4], titles[5] = HOSTILE, LONG, "Teapot"
    things = {"item": [f"i{index}" for index in range(20)], "title": titles}
    things["text"] = [f"What one does with thing {index}, told in some words" for index in range(20)]
    pd.DataFrame(things).to_csv(folder / "things.csv", index=False)
    people = {"user": [f"u{index}" for index in range(30)], "text": [f"Buys for house {index}" for index in range(30)]}
    pd.DataFrame(people).to_csv(folder / "people.csv", index=False)
    items = {"path": str(folder / "things.csv"), "id_column": "item", "title_column": "title", "text_columns": ["text"]}
    users = {"path": str(folder / "people.csv"), "id_column": "user", "text_columns": ["text"]}
    recipe = load_recipe(write_shop(folder, data={"items": items, "users": users, "publish_users": True}))
    pretrain(recipe)
    return finetune(recipe).model


@pytest.fixture(scope="module")
def recommend(model):
    """What the page has to show: titles, or ids and scores, of the model itself."""
    rec = pipeline("recommendation", model=str(model), trust_remote_code=True)

    def recommend(top_k=10, **person):
        return rec(person, top_k=top_k)

    return recommend


@contextmanager
def served(**environment):
    """The address of a demo in a process of its own, run as a Space runs it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CLLM4REC_MODEL", "CLLM4REC_REV", "GRADIO_"))
    }
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=PROJECT / "space",
        env=given | {"GRADIO_SERVER_PORT": str(port)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+/", line)))
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def address(model):
    with served(CLLM4REC_MODEL=str(model)) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, which Playwright drives."""
    playwright = pytest.importorskip("playwright.sync_api", reason='Playwright is missing: pip install -e ".[browser]"')
    path = next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(
            "there is no Chromium: apt-get install chromium (make test-slow does so for root on Debian or Ubuntu)"
        )
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Where screenshots go."""
    folder = Path(os.environ.get("CLLM4REC_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def visit(chromium, address, pictures, request):
    """Open the page in a fresh browser; afterwards nothing was asked of another host, and the console is silent."""
    foreign, said, contexts = [], [], []

    def visit(viewport=PAGE, scheme="light", query="", at=address, expect_answer=True, touch=False):
        context = chromium.new_context(viewport=viewport, color_scheme=scheme, has_touch=touch)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: message.type in ("error", "warning") and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))

        def look(route):
            if re.match(r"https?://(127\.0\.0\.1|localhost)[:/]", route.request.url):
                return route.continue_()
            foreign.append(route.request.url)
            return route.abort()

        page.route("**/*", look)
        page.goto(at + query)
        if expect_answer:
            page.wait_for_selector("#ranking .whose")
        return page

    visit.picture = lambda page, name: page.screenshot(
        path=pictures / f"{name}.png", full_page=True, animations="disabled"
    )
    yield visit
    for context in contexts:
        context.close()
    assert foreign == []
    assert said == []


def shown(page):
    """Names and scores of the ranking."""
    rows = page.locator("#ranking ol > li")
    return [(row.locator(".name").inner_text(), row.locator(".score").inner_text()) for row in rows.all()]


def names(ranked):
    """How the page names what the pipeline gives."""
    return [f"{row['title']} {row['item']}" for row in ranked]


def wait_for_history(page, *ids):
    page.wait_for_function(
        """ids => JSON.stringify([...document.querySelectorAll("#history .chips .id")].map(e => e.textContent)) === ids""",
        arg=json.dumps(list(ids), separators=(",", ":")),
    )


def test_words_change_the_ranking_and_reasons_are_seen(visit, recommend):
    page = visit(query="?item=i5")
    assert page.locator("#ranking .why", has_text="because of Teapot").count() > 0
    page.get_by_role("button", name="Clear history").click()
    box = page.get_by_label(SAID)
    box.fill("Buys for house 3")
    box.press("Enter")
    page.wait_for_function('() => document.querySelector("#ranking .whose").innerText.includes("house 3")')
    expected = names(recommend(text="Buys for house 3"))
    assert [name for name, _ in shown(page)] == expected
    visit.picture(page, "words")


def overflow(page):
    """How many pixels of the page, or of a text in its box, lie outside of it."""
    return page.evaluate(
        """() => {
          const right = [...document.querySelectorAll("#top *, #page *")].filter(e => e.checkVisibility()
            && !e.closest(".pins, .tips, svg, .spoken, .popup .text")).map(e => e.getBoundingClientRect().right);
          const cut = [...document.querySelectorAll("#page :is(h2, h3, p:not(.text), button, label, legend, .name, .score)")]
            .filter(e => e.checkVisibility() && !e.closest(".pins, .popup") && getComputedStyle(e).display !== "inline")
            .map(e => e.clientHeight > 1 ? e.scrollWidth - e.clientWidth : 0);
          return Math.max(document.documentElement.scrollWidth - window.innerWidth,
            Math.max(...right) - window.innerWidth, ...cut, 0);
        }"""
    )


def add(page, query, *ids):
    """Type into the search and press Enter."""
    page.get_by_role("combobox", name=ITEM).fill(query)
    page.keyboard.press("Enter")
    wait_for_history(page, *ids)


def test_nobody_in_particular_is_served_at_once_and_told_what_to_do(visit, recommend):
    page = visit()
    assert page.title() == "runs/shop/model · recommender"
    assert "Nothing here yet. Type above" in page.locator("#history").inner_text()
    assert "For nobody in particular" in page.locator("#ranking .whose").inner_text()
    assert [name for name, _ in shown(page)] == names(recommend(history=[]))
    assert page.locator("#history .chip").count() == 6
    visit.picture(page, "empty-1280-light")


def test_a_visit_by_mouse(visit, recommend):
    page = visit()
    page.get_by_role("combobox", name=ITEM).fill("teap")
    page.get_by_role("option", name="Teapot").click()
    wait_for_history(page, "i5")
    expected = recommend(history=["i5"])
    assert [name for name, _ in shown(page)] == names(expected)
    assert shown(page)[0][1] == f"{expected[0]['score']:.1%}"
    assert "For a history of 1 item. Added Teapot (i5)." in page.locator("#ranking .whose").inner_text()

    page.locator("#ranking .add").first.click()
    wait_for_history(page, "i5", expected[0]["item"])
    expected = recommend(history=["i5", expected[0]["item"]])
    assert [name for name, _ in shown(page)] == names(expected)
    page.wait_for_function("document.getAnimations().every(animation => animation.playState !== 'running')")
    widths = [bar.bounding_box()["width"] for bar in page.locator("#ranking .bar > span").all()]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(page.locator("#ranking .bar").first.bounding_box()["width"], abs=1)

    page.get_by_role("group", name="How many").get_by_role("radio", name="20").check()
    page.wait_for_function("document.querySelectorAll('#ranking ol > li').length === 18")
    visit.picture(page, "two-items-1280-light")
    page.get_by_role("button", name="Remove Teapot (i5) from the history").click()
    wait_for_history(page, expected_first := page.locator("#history .chips .id").last.inner_text())
    assert expected_first != "i5"
    page.get_by_role("button", name="Clear history").click()
    page.wait_for_selector("#history .empty")
    assert not page.locator("#item-search .popup").is_visible()
    page.locator("#history .chip").first.click()
    page.wait_for_selector("#history .chips .remove")


def test_clicks_in_a_hurry_are_all_heeded_and_a_double_click_adds_one_item(visit):
    page = visit()
    page.evaluate("[...document.querySelectorAll('#ranking .add')].slice(0, 4).forEach(button => button.click())")
    page.wait_for_function("document.querySelectorAll('#history .remove').length === 4")
    page.locator("#ranking .add").first.dblclick()
    page.wait_for_function("document.querySelectorAll('#history .remove').length === 5")
    page.evaluate("[...document.querySelectorAll('#history .remove')].forEach(button => button.click())")
    page.wait_for_selector("#history .empty")


def test_the_map_marks_the_visit_and_names_what_one_points_at(visit):
    page = visit(query="?item=i5&item=i6")
    wait_for_history(page, "i5", "i6")
    assert page.locator("#plane .pin.had").count() == 2
    assert sorted(page.locator("#plane .pin.numbered").all_inner_texts(), key=int) == [str(n) for n in range(1, 11)]
    assert re.sub(r"\s+", " ", page.locator("#plane .legend").inner_text()).startswith("history (2) 1 recommended (10)")
    page.locator("#ranking ol > li").first.hover()
    first = page.locator("#ranking ol > li").first.get_attribute("data-index")
    assert "lit" in page.locator(f"#plane .pin.numbered[data-index='{first}']").get_attribute("class")

    mark = page.locator("#plane .pin.small").last
    mark.scroll_into_view_if_needed()
    index, middle = mark.get_attribute("data-index"), mark.bounding_box()
    page.mouse.move(middle["x"] + middle["width"] / 2, middle["y"] + middle["height"] / 2)
    page.wait_for_selector("#plane .tip:visible")
    assert page.locator("#plane .tip button").count() == 0
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("#plane .tip button")
    assert page.locator("#plane .tip button").get_attribute("data-index") == index
    page.keyboard.press("Escape")
    page.wait_for_selector("#plane .tip", state="hidden")
    page.mouse.down()
    page.mouse.up()
    page.get_by_role("button", name="Add to the history", exact=True).click()
    page.wait_for_function("document.querySelectorAll('#history .remove').length === 3")
    page.wait_for_selector("#plane .tip", state="hidden")


def test_a_visit_by_keyboard_alone(visit, recommend):
    page = visit()

    def focused():
        return page.evaluate(
            "(e => e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText)(document.activeElement)"
        )

    page.keyboard.press("Tab")
    assert focused() == ITEM
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#item-search [role=option]")
    assert page.locator("#item-search-input").get_attribute("aria-activedescendant") is None
    page.keyboard.type("thing 1")
    page.keyboard.press("Enter")  # before the matches are there
    wait_for_history(page, "i1")
    assert focused() == ITEM
    page.keyboard.type("thing")
    page.wait_for_function("document.querySelector('#item-search-input').getAttribute('aria-activedescendant')")
    page.keyboard.press("ArrowDown")
    second = page.locator("#item-search [aria-selected=true] .id").inner_text()
    assert page.locator("#item-search [role=option] .id").nth(1).inner_text() == second
    page.keyboard.press("Enter")
    wait_for_history(page, "i1", second)
    page.keyboard.type("x")
    page.wait_for_selector("#item-search .popup:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#item-search .popup", state="hidden")
    page.keyboard.press("Escape")
    assert page.locator("#item-search-input").input_value() == ""

    page.keyboard.press("Tab")
    assert focused() == USER
    page.keyboard.press("Tab")
    assert focused() == SAID
    page.keyboard.press("Tab")
    assert focused() == "Clear history"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_history(page, second)
    assert focused().startswith("Remove ")
    page.keyboard.press("Enter")
    page.wait_for_selector("#history .empty")
    page.wait_for_function("document.activeElement.id === 'item-search-input'")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "radio":
            break
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelectorAll('#ranking ol > li').length === 5")
    page.keyboard.press("Tab")
    first = recommend(history=[], top_k=1)[0]
    assert focused() == f"Add {first['title']} ({first['item']}) to the history"
    page.keyboard.press("Enter")
    wait_for_history(page, first["item"])
    second = recommend(history=[first["item"]], top_k=1)[0]
    assert focused() == f"Add {second['title']} ({second['item']}) to the history"


def test_a_user_of_the_training_data_brings_a_history(visit, recommend):
    page = visit()
    box = page.get_by_role("combobox", name=USER)
    box.fill("nobody of that name")
    page.wait_for_selector("#user-search .note:has-text('Nothing matches')")
    assert "for anybody else, add items above" in page.locator("#user-search .note").inner_text()
    box.fill("u7")
    page.keyboard.press("Enter")
    page.wait_for_selector("#history .user")
    assert "Buys for house 7" in page.locator("#history .user").inner_text()
    assert [name for name, _ in shown(page)] == names(recommend(user="u7"))
    assert page.url.endswith("/?user=u7")
    visit.picture(page, "user-1280-light")
    page.get_by_role("button", name="Remove the user u7").click()
    page.wait_for_selector("#history .user", state="detached")
    assert page.locator("#history .remove").count() > 0


def test_the_address_opens_the_same_visit_again(visit):
    page = visit(query="?__theme=light")
    add(page, "teapot", "i5")
    page.wait_for_url("**/?__theme=light&item=i5")
    page.reload()
    wait_for_history(page, "i5")
    page = visit(query="?user=zoe")
    assert (
        "There is no user zoe in this model: search for another, or add items." in page.locator(".whose").inner_text()
    )


def test_everything_seen_and_nothing_found_say_what_to_do(visit):
    page = visit(query="?" + "&".join(f"item=i{index}" for index in range(20)))
    assert (
        "Everything in the catalogue is in the history already. Remove an item" in page.locator("#ranking").inner_text()
    )
    page.get_by_role("combobox", name=ITEM).fill("zebra")
    page.wait_for_selector("#item-search .note:has-text('Nothing matches “zebra”. Try fewer letters')")
    visit.picture(page, "everything-seen-1280-light")


def test_titles_are_text_and_never_markup(visit):
    page = visit(query="?item=i4")
    page.get_by_role("combobox", name=ITEM).fill("img src")
    page.wait_for_function("document.querySelectorAll('#item-search [role=option]').length === 1")
    assert page.locator("#item-search .option .name").inner_text() == HOSTILE
    page.keyboard.press("Enter")
    wait_for_history(page, "i4", "i3")
    assert page.locator("#history .name").last.inner_text() == f"{HOSTILE} i3"
    assert page.locator("#page img").count() == 0
    assert page.title() == "runs/shop/model · recommender"


@pytest.mark.parametrize("width", [320, 400])
def test_a_telephone_shows_everything_without_scrolling_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 850}, touch=True)
    assert overflow(page) <= 0
    page.get_by_role("combobox", name=ITEM).fill("averyvery")
    page.wait_for_selector("#item-search [role=option]")
    assert overflow(page) <= 0
    page.get_by_role("option").first.tap()
    wait_for_history(page, "i4")
    add(page, "img src", "i4", "i3")
    page.get_by_role("combobox", name=USER).fill("u7")
    page.keyboard.press("Enter")
    page.wait_for_selector("#history .user")
    assert overflow(page) <= 0
    tops = [page.locator(name).bounding_box()["y"] for name in ("#you", "#recommended", "#map")]
    assert tops == sorted(tops)
    sizes = [button.bounding_box() for button in page.locator("#page button:visible").all()]
    assert min(min(size["width"], size["height"]) for size in sizes) >= 24
    visit.picture(page, f"user-{width}-light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PAGE, PHONE], ids=["page", "phone"])
def test_texts_can_be_read_in_the_light_and_in_the_dark(visit, scheme, viewport):
    page = visit(viewport=viewport, scheme=scheme, query="?user=u7")
    page.wait_for_selector("#history .user")
    ground = page.locator("#recommended").evaluate("e => getComputedStyle(e).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 26, 36)")
    read = "h1, h2, h3, .kind, .lead, .hint, .name, .id, .text, .score, .rank, .whose, .quiet, .remove, .add, .label, .legend li, label"
    found = page.locator(f":is(#top, #page) :is({read}):visible").all()
    assert len(found) > 60
    poor = {element.inner_text()[:40]: element.evaluate(CONTRAST) for element in found}
    assert {text: round(ratio, 2) for text, ratio in poor.items() if ratio < 4.5} == {}
    visit.picture(page, f"user-{viewport['width']}-{scheme}")


def test_everything_that_can_be_used_has_a_name_for_screen_readers(visit):
    page = visit(query="?user=u7")
    page.wait_for_selector("#history .user")
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    used = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in ("button", "combobox", "radio", "link", "image", "heading", "option")
    ]
    assert {role for role, _ in used} >= {"button", "combobox", "radio", "image", "heading"}
    assert [pair for pair in used if not pair[1]] == []
    assert [name for role, name in used if role == "heading"][:2] == ["runs/shop/model", "What you know"]
    assert page.get_by_role("group", name="How many").count() == 1


def test_without_published_users_no_user_can_be_given(visit, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "users.jsonl").unlink()
    with served(CLLM4REC_MODEL=str(folder)) as at:
        page = visit(at=at, query="?user=u7")
        assert page.get_by_role("combobox").count() == 1
        assert "This model publishes no users, so u7 is left out" in page.locator("#ranking .whose").inner_text()
        page.close()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "No model is chosen: set the variable CLLM4REC_MODEL to a Hub repo"),
        ({"CLLM4REC_MODEL": "runs/nowhere/model"}, "There is no folder runs/nowhere/model: train a model first"),
        ({"CLLM4REC_MODEL": "me/none", "CLLM4REC_REVISION": "v2"}, "The Hub repo me/none at v2 could not be opened"),
    ],
    ids=["no model", "no folder", "no repo"],
)
def test_where_no_recommender_opens_the_page_says_what_to_do(visit, environment, sentence, request):
    with served(**environment) as at:
        page = visit(viewport=PHONE, at=at, expect_answer=False)
        page.wait_for_selector(".failed")
        assert sentence in page.locator(".failed").inner_text()
        assert "Traceback" not in page.content()
        assert overflow(page) <= 0
        visit.picture(page, f"failed-400-{request.node.callspec.id.replace(' ', '-')}")
        page.close()


def test_programs_get_the_pipelines_answer(address, recommend):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    answer = client.predict(history=["i5"], user=None, top_k=3, api_name="/recommend")
    assert answer == recommend(history=["i5"], top_k=3)
