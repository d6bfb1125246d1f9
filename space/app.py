"""The demo of a trained recommender: pick items you know, and see what it recommends, how surely, and where that lies.

It opens the Hub repo or folder that the environment variable `CLLM4REC_MODEL` names (`CLLM4REC_REVISION`: a branch, tag or
commit) as any visitor would, with transformers alone.
"""

import logging
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

# A visit is nobody else's business: Gradio counts and reports nothing.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from recommender import SIZES, Catalogue, Recommender, Unavailable, Visit
from views import (
    failing_view,
    header_view,
    history_view,
    map_picture,
    marks_view,
    recommendations_view,
    shortened,
    sizes_view,
)

logger = logging.getLogger("space")

HERE = Path(__file__).resolve().parent
ASK_AGAIN = "The model did not answer; the log says why. Try again, or clear the history."

Outputs = tuple[Visit, str, str, str]


# What a visitor does. Each takes a visit and gives the next one, and a sentence about what happened.


def add(recommender: Recommender, visit: Visit, index: int) -> tuple[Visit, str]:
    """Put an item at the end of the history."""
    label = recommender.items.label(index)
    if index in visit.history:
        return visit, f"{label} is in the history already."
    return replace(visit, history=(*visit.history, index)), f"Added {label}."


def remove(recommender: Recommender, visit: Visit, index: int) -> tuple[Visit, str]:
    """Take an item out of the history."""
    left = tuple(item for item in visit.history if item != index)
    return replace(visit, history=left), f"Removed {recommender.items.label(index)}."


def choose(recommender: Recommender, visit: Visit, user: int) -> Visit:
    """Start from a user of training, whose history takes the place of the visitor's."""
    return replace(visit, history=recommender.trained[user], user=user)


def open_link(recommender: Recommender, ids: Sequence[str], users: Sequence[str]) -> tuple[Visit, str]:
    """The visit that an address names, and what to do about what is unknown here."""
    items, people = recommender.items.of_id, recommender.users
    visit, said = Visit(), ""
    for raw in users[:1]:
        if people is None:
            said = f"This model publishes no users, so {shortened(raw, 60)} is left out: add items instead."
        elif raw not in people.of_id:
            said = f"There is no user {shortened(raw, 60)} in this model: search for another, or add items."
        else:
            visit = choose(recommender, visit, people.of_id[raw])
    strangers = [shortened(raw, 60) for raw in ids if raw not in items]
    if strangers:
        said += f" Not in the catalogue, so left out: {', '.join(strangers[:5])}."
    if ids:
        visit = replace(visit, history=tuple(dict.fromkeys(items[raw] for raw in ids if raw in items)))
    return visit, said.strip()


def show(recommender: Recommender, visit: Visit, said: str = "") -> Outputs:
    """The visit and its three views; where the model fails, a sentence in place of the ranking."""
    try:
        ranked, failed = recommender.rank(visit), ""
    except Exception:
        logger.exception("No answer for %s", visit)
        ranked, failed = [], ASK_AGAIN
    return (
        visit,
        history_view(recommender, visit),
        recommendations_view(recommender, visit, ranked, said, failed),
        marks_view(recommender, visit, ranked),
    )


def named(event: gr.EventData, known: Container[int]) -> int:
    """The number that the browser sends with an event.

    Raises:
        IndexError: if it is none of those that the page offers.
    """
    index = getattr(event, "index", None)
    if not isinstance(index, int) or index not in known:
        raise IndexError(f"an event came with {index!r}")
    return index


# The page.


def search_box(catalogue: Catalogue, name: str, label: str, placeholder: str, nothing: str) -> gr.HTML:
    """A text box with a list of matches that the server finds while one types; its event `pick` carries an index."""

    def search(query: str) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "title": catalogue.titles[index],
                "id": str(catalogue.ids[index]),
                "text": shortened(catalogue.texts[index], 140),
            }
            for index in catalogue.search(str(query)[:200])
        ]

    return gr.HTML(
        html_template=script("search.html"),
        js_on_load=script("search.js"),
        server_functions=[search],
        apply_default_css=False,
        elem_id=name,
        label=label,
        name=name,
        placeholder=escape(placeholder),
        nothing=nothing,
    )


def with_buttons(name: str, value: str = "") -> gr.HTML:
    """HTML of ours, whose buttons are events with the index of their item."""
    return gr.HTML(value, js_on_load=script("buttons.js"), apply_default_css=False, elem_id=name)


def plane(recommender: Recommender) -> gr.HTML:
    """What lies over the map's picture: the marks of a visit, and the name of the dot that one points at."""

    def nearest(place: list[float]) -> dict[str, Any]:
        index = recommender.map.nearest(*place)
        x, y = recommender.map.places[index].tolist()
        text = shortened(recommender.items.texts[index], 90)
        return {"index": index, "title": recommender.items.label(index), "text": text, "x": x, "y": y}

    return gr.HTML(
        html_template=script("map.html"),
        js_on_load=script("buttons.js") + script("map.js"),
        server_functions=[nearest],
        apply_default_css=False,
        elem_id="plane",
    )


def script(name: str) -> str:
    """A file that lies beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def page(recommender: Recommender) -> gr.Blocks:
    """The page of a recommender."""
    items, users = recommender.items, recommender.users

    def recommend(
        history: list[str], user: str | None = None, top_k: int = 10, text: str | None = None
    ) -> list[dict[str, Any]]:
        """Recommend items to a history of raw item ids, a user known from training, what somebody says, or several of these."""
        given = {"user": user, "history": history or None, "text": text or None}
        person = {name: value for name, value in given.items() if value is not None} or {"history": []}
        try:
            answer: list[dict[str, Any]] = recommender.pipe(person, top_k=top_k)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        return answer

    with gr.Blocks(title=f"{recommender.title} · recommender", analytics_enabled=False) as blocks:
        visit = gr.State(Visit())
        gr.HTML(header_view(recommender), apply_default_css=False, js_on_load=None, elem_id="top")
        with gr.Column(elem_id="page"):
            with gr.Column(elem_id="you"):
                heading("What you know")
                search = search_box(
                    items,
                    "item-search",
                    "Add an item by title, id or topic",
                    f"For example {items.titles[recommender.examples[0]]}",
                    "Try fewer letters, or another word of its title, id or description.",
                )
                people = users and search_box(
                    users,
                    "user-search",
                    "Or start from a user of training, by id",
                    f"For example {users.ids[users.by_popularity[0]]}",
                    "Only users known from training are listed; for anybody else, add items above.",
                )
                said = recommender.reads_texts and gr.Textbox(
                    label="Or say who you are or what you want",
                    placeholder="In your own words, then Enter",
                    max_length=1000,
                    elem_id="said",
                )
                history = with_buttons("history")
            with gr.Column(elem_id="recommended"):
                heading("Recommendations")
                sizes = with_buttons("sizes", sizes_view())
                ranking = with_buttons("ranking")
            with gr.Column(elem_id="map"):
                heading("Map of the catalogue")
                gr.HTML(map_picture(recommender), apply_default_css=False, js_on_load=None, elem_id="picture")
                marks = plane(recommender)
        outputs = [visit, history, ranking, marks]
        same = {"concurrency_id": "model", "show_progress": "minimal", "api_visibility": "private"}

        def arrive(request: gr.Request) -> Outputs:
            return show(recommender, *open_link(recommender, asked(request, "item"), asked(request, "user")))

        def add_item(visit: Visit, event: gr.EventData) -> Outputs:
            return show(recommender, *add(recommender, visit, named(event, range(len(items)))))

        def remove_item(visit: Visit, event: gr.EventData) -> Outputs:
            return show(recommender, *remove(recommender, visit, named(event, range(len(items)))))

        def clear_items(visit: Visit) -> Outputs:
            return show(recommender, replace(visit, history=()), "The history is empty.")

        def choose_user(visit: Visit, event: gr.EventData) -> Outputs:
            return show(recommender, choose(recommender, visit, named(event, range(len(recommender.trained)))))

        def forget_user(visit: Visit) -> Outputs:
            return show(recommender, replace(visit, user=None), "The user is left out; the items stay.")

        def say(visit: Visit, text: str) -> Outputs:
            heard = "" if text.strip() else "Nothing is said."
            return show(recommender, replace(visit, text=text.strip()), heard)

        def resize(visit: Visit, event: gr.EventData) -> Outputs:
            return show(recommender, replace(visit, size=named(event, SIZES)))

        blocks.load(arrive, None, outputs, **same)
        steps: list[tuple[Any, Callable[..., Outputs]]] = [
            (search.pick, add_item),
            (sizes.resize, resize),
            (history.remove_item, remove_item),
        ]
        steps += [(history.clear_items, clear_items), (history.forget_user, forget_user)]
        steps += [(shown.add_item, add_item) for shown in (history, ranking, marks)]
        steps += [(people.pick, choose_user)] if people else []
        for event, step in steps:
            event(step, [visit], outputs, trigger_mode="multiple", concurrency_limit=1, **same)
        if said:
            submit: Any = said.submit
            submit(say, [visit, said], outputs, concurrency_limit=1, **same)
        gr.api(recommend, concurrency_id="model")
    return blocks


def heading(text: str) -> gr.HTML:
    """The heading of a panel."""
    return gr.HTML(f"<h2>{text}</h2>", apply_default_css=False, js_on_load=None)


def asked(request: gr.Request, name: str) -> list[str]:
    """All values that the address has for a name."""
    return request.query_params.getlist(name)


def failing_page(message: str) -> gr.Blocks:
    """The page of no recommender: what to do."""
    with gr.Blocks(title="Recommender", analytics_enabled=False) as blocks:
        gr.HTML(failing_view(message), apply_default_css=False, js_on_load=None, elem_id="top")
    return blocks


def main() -> None:
    """Open the model that the environment names, and serve its page."""
    logging.basicConfig(format="%(message)s")
    try:
        blocks = page(Recommender(os.environ.get("CLLM4REC_MODEL"), os.environ.get("CLLM4REC_REVISION") or None))
    except Unavailable as reason:
        logger.error("%s", reason)
        blocks = failing_page(str(reason))
    _, address, _ = blocks.launch(
        quiet=True,
        prevent_thread_lock=True,
        theme=theme(),
        head=f"<style>{script('style.css')}</style>",
        footer_links=["api", "gradio", "settings"],
        run_history=False,
        ssr_mode=False,
        show_error=False,
    )
    print(f"Open {address} in a browser; Ctrl+C ends it.", flush=True)
    blocks.block_thread()


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own system, so that no other host is asked for any; few colours."""
    system = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=system,
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    )


if __name__ == "__main__":
    main()
