"""What a visitor sees of a recommender, as HTML. Whatever comes from the model's files is escaped."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple
from urllib.parse import urlencode

import numpy as np
from recommender import SIZES, Catalogue, Ranked, Recommender, Visit

WIDTH, HEIGHT = 1000, 750
NARROW = np.array([344.0, 258.0])
NUMBERED = 10
LABELLED = 6
OBSTACLES = 60
LANDMARKS, LANDMARKS_AMONG = 9, 300
MAX_LINKED = 100
PICTURE = (
    "Every item as a dot, by the two directions in which the embeddings differ most. What is marked on it is in the "
    "lists of this page."
)


def header_view(recommender: Recommender) -> str:
    """Whose recommendations these are."""
    items, users = recommender.items, recommender.pipe.model.config.num_users
    at = f"/tree/{recommender.revision}" if recommender.revision else ""
    address = f"https://huggingface.co/{recommender.name}{at}"
    page = f'<a href="{escape(address)}" target="_blank" rel="noopener">Model page</a>'
    return (
        f'<header><p class="kind">CLLM4Rec recommender</p><h1>{escape(recommender.title)}</h1><p class="lead">Tell it what you know, '
        f"and a language model in which every item is one token ranks all {counted(len(items), 'item')} in one pass. "
        f"It learnt from {counted(users, 'user')}. {'' if recommender.is_folder else page}</p></header>"
    )


def failing_view(message: str) -> str:
    """What to do where there is no recommender to show."""
    return f'<header><h1>No recommender here yet</h1><p class="failed" role="alert">{escape(message)}</p></header>'


def history_view(recommender: Recommender, visit: Visit) -> str:
    """The chosen user and items, each with a button that takes it out, or where to start."""
    items = recommender.items
    parts = []
    if visit.user is not None and recommender.users is not None:
        text = recommender.users.texts[visit.user]
        user = recommender.users.label(visit.user)
        parts.append(
            f'<div class="user"><div><span class="name">{escape(user)}</span>'
            f"{f'<p>{escape(text)}</p>' if text else ''}"
            f'<p class="hint">Known from training with {counted(len(recommender.trained[visit.user]), "item")}, which '
            "the history starts from; add and remove as you like.</p></div>"
            f'<button type="button" class="remove" data-event="forget_user" aria-label="Remove the user {escape(user)}">&times;</button></div>'
        )
    if visit.history:
        rows = "".join(
            f'<li data-index="{item}">{name_view(items, item)}<button type="button" class="remove" data-event="remove_item" data-index="{item}" '
            f'aria-label="Remove {escape(items.label(item))} from the history">&times;</button></li>'
            for item in visit.history
        )
        parts.append(
            f'<div class="title-row"><h3>{counted(len(visit.history), "item")}</h3>'
            '<button type="button" class="quiet" data-event="clear_items">Clear history</button></div>'
            f'<ul class="chips">{rows}</ul>'
        )
        longest = recommender.pipe.model.config.max_history
        if len(visit.history) > longest:
            parts.append(f'<p class="hint">The model reads the newest {longest:,} of them.</p>')
    else:
        starts = "".join(
            f'<li><button type="button" class="chip" data-event="add_item" data-index="{item}" '
            f'aria-label="Add {escape(items.label(item))} to the history">+ {escape(shortened(items.titles[item], 40))}'
            "</button></li>"
            for item in recommender.examples
        )
        parts.append(
            '<p class="empty">Nothing here yet. Type above to find something you know, or start with one of these:</p>'
            f'<ul class="chips">{starts}</ul>'
        )
    return "".join(parts)


def sizes_view() -> str:
    """How many items to show."""
    choices = "".join(
        f'<label><input type="radio" name="how-many" value="{size}" data-event="resize" data-index="{size}"'
        f"{' checked' if size == Visit().size else ''}><span>{size}</span></label>"
        for size in SIZES
    )
    return f'<fieldset class="sizes"><legend>How many</legend>{choices}</fieldset>'


def recommendations_view(
    recommender: Recommender, visit: Visit, ranked: Sequence[Ranked], said: str, failed: str
) -> str:
    """For whom, what was just done, and the ranked items as bars."""
    items = recommender.items
    whose = "For nobody in particular. Add something you know, and this list follows."
    if visit.history:
        whose = f"For a history of {counted(len(visit.history), 'item')}."
    if visit.user is not None and recommender.users is not None:
        whose = f"For {recommender.users.label(visit.user)} with a history of {counted(len(visit.history), 'item')}."
    if visit.text:
        asked = f"“{shortened(visit.text, 60)}”"
        whose = (
            f"{whose.removesuffix('.')} and {asked}." if visit.history or visit.user is not None else f"For {asked}."
        )
    parts = [
        f'<p class="whose" role="status" data-link="{escape(link(recommender, visit))}">{escape(f"{whose} {said}")}</p>'
    ]
    if failed:
        parts.append(f'<p class="failed" role="alert">{escape(failed)}</p>')
    elif not ranked:
        parts.append(
            '<p class="failed" role="alert">Everything in the catalogue is in the history already. '
            "Remove an item to see what comes next.</p>"
        )
    else:
        highest = max(ranked[0].score, 1e-12)
        rows = "".join(
            f'<li data-index="{found.item}"><span class="rank">{found.rank}</span><div class="what">'
            f"{name_view(items, found.item)}{text_view(items.texts[found.item])}{why_view(items, found)}</div>"
            f'<div class="measure"><span class="bar" aria-hidden="true"><span style="width:{found.score / highest:.2%}"></span>'
            f'</span><span class="score">{escape(percent(found.score))}</span></div>'
            f'<button type="button" class="add" data-event="add_item" data-index="{found.item}" title="Add to the history" '
            f'aria-label="Add {escape(items.label(found.item))} to the history">+</button></li>'
            for found in ranked
        )
        parts.append(f'<ol class="ranking">{rows}</ol>')
        parts.append(
            f'<p class="hint">Probabilities over all {counted(len(items), "item")}, so they add up to 100% with what is in '
            "the history and what is not shown. Bars are relative to the first.</p>"
        )
    return "".join(parts)


def text_view(text: str) -> str:
    """A description, of which a few lines are shown."""
    return f'<p class="text">{escape(text)}</p>' if text else ""


def why_view(items: Catalogue, found: Ranked) -> str:
    """What carried a recommendation: items of the history, and words of its own text."""
    names = " and ".join(f"<b>{escape(shortened(items.titles[item], 40))}</b>" for item in found.items)
    said = ", ".join(f"<i>{escape(word)}</i>" for word in found.words)
    parts = [f"because of {names}"] if names else []
    parts += [f"its text says {said}"] if said else []
    return f'<p class="why">{" · ".join(parts)}</p>' if parts else ""


def marks_view(recommender: Recommender, visit: Visit, ranked: Sequence[Ranked]) -> str:
    """What lies on the map for this visit, and its legend."""
    places, items = recommender.map.places, recommender.items
    had = list(dict.fromkeys(visit.history))
    numbered = ranked[:NUMBERED]
    taken = [Box.around(places[item], 16) for item in had[-OBSTACLES:]]
    shown_at = {}
    for found in numbered:
        shown_at[found.item] = free_place(places[found.item], taken)
        taken.append(Box.around(shown_at[found.item], 21))
    labels = labels_view(items, places, had[-LABELLED:][::-1], LABELLED, "mine", taken)
    labels += labels_view(items, places, items.by_popularity[:LANDMARKS_AMONG], LANDMARKS, "landmark", taken)
    threads = "".join(
        f'<path d="M{places[item][0] * WIDTH:.0f} {places[item][1] * HEIGHT:.0f}L{x * WIDTH:.0f} {y * HEIGHT:.0f}"/>'
        for item, (x, y) in shown_at.items()
    )
    pins = [
        f'<span class="pin small" data-index="{found.item}" style="{at(places[found.item])}"></span>'
        for found in ranked
    ]
    pins += [f'<span class="pin had" data-index="{item}" style="{at(places[item])}"></span>' for item in had]
    pins += [
        f'<span class="pin numbered" data-index="{found.item}" style="{at(shown_at[found.item])}">{found.rank}</span>'
        for found in numbered
    ]
    legend = [f'<li><span class="key had"></span>history ({len(had):,})</li>'] if had else []
    legend += [f'<li><span class="key new">1</span>recommended ({len(ranked):,})</li>'] if ranked else []
    return (
        f'<div class="pins" aria-hidden="true">{drawing(threads)}{labels}{"".join(pins)}</div>'
        f'<div class="below"><ul class="legend">{"".join(legend)}<li><span class="key rest"></span>other items, larger '
        f'where more popular</li></ul><p class="hint">A dot for each of {counted(len(items), "item")}: close together where '
        f"the embeddings are alike. The two directions hold {recommender.map.explained:.0%} of their differences. "
        "Point at a dot, or tap it, for its name.</p></div>"
    )


def link(recommender: Recommender, visit: Visit) -> str:
    """The query of an address that opens the page at this visit; empty where it would be too long."""
    user = [] if visit.user is None or recommender.users is None else [("user", recommender.users.ids[visit.user])]
    if user and visit.user is not None and visit.history == recommender.trained[visit.user]:
        return urlencode(user)
    items = [("item", recommender.items.ids[item]) for item in visit.history]
    return "" if len(items) > MAX_LINKED else urlencode(user + items)


def map_picture(recommender: Recommender) -> str:
    """What stays on the map whoever looks: a dot an item, larger where it is popular.

    Its size is bounded: places snap to a grid, and what falls together becomes one dot of its summed popularity.
    """
    places, popularity = recommender.map.places, recommender.items.popularity
    step = 1 if len(places) <= 20_000 else 3
    cells = (places * (WIDTH, HEIGHT) / step).astype(np.int64) * step
    cells, owner = np.unique(cells, axis=0, return_inverse=True)
    weight = np.log1p(np.bincount(owner.ravel(), weights=popularity))
    size = np.digitize(weight / max(weight.max(), 1e-12), (0.4, 0.7))
    paths = "".join(
        f'<path class="dot-{kind}" d="{"".join(f"M{x} {y}h0" for x, y in cells[size == kind].tolist())}"/>'
        for kind in range(3)
    )
    kind = "dense" if len(cells) > 5000 else "sparse"
    return f'<div class="{kind}" role="img" aria-label="{PICTURE}">{drawing(paths)}</div>'


def drawing(paths: str) -> str:
    """Paths in the map's own units, stretched over it."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>'


class Box(NamedTuple):
    """A part of the map that is taken, in pixels of a map as narrow as a telephone shows it; on a wider one there is room."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, place: np.ndarray, size: float) -> "Box":
        """A square with a place in its middle."""
        x, y = place * NARROW
        return cls(x - size / 2, y - size / 2, x + size / 2, y + size / 2)

    def is_free(self, taken: Sequence["Box"]) -> bool:
        """Whether it is on the map and touches nothing."""
        inside = self.left >= 0 and self.top >= 0 and self.right <= NARROW[0] and self.bottom <= NARROW[1]
        return inside and not any(
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
            for other in taken
        )


def free_place(place: np.ndarray, taken: Sequence[Box]) -> np.ndarray:
    """The place, or the nearest around it where a numbered mark covers nothing; the place where there is none."""
    for radius in (0, 16, 22, 30, 40, 52):
        for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False) if radius else (0.0,):
            moved = place + radius * np.array([np.cos(angle), np.sin(angle)]) / NARROW
            if Box.around(moved, 21).is_free(taken):
                return moved
    return place


def labels_view(
    items: Catalogue, places: np.ndarray, candidates: Sequence[int], most: int, kind: str, taken: list[Box]
) -> str:
    """The names of the first items beside whose places there is room; the room is added to `taken`."""
    labels: list[str] = []
    for index in candidates:
        name = shortened(items.titles[index], 24)
        x, y = places[index] * NARROW
        width = 11 + 6.3 * len(name)
        for side, left in (("", x), ("before", x - width)):
            box = Box(left + (0 if side else 9), y - 7, left + width - (9 if side else 0), y + 7)
            if box.is_free(taken):
                taken.append(box)
                labels.append(f'<span class="label {kind} {side}" style="{at(places[index])}">{escape(name)}</span>')
                break
        if len(labels) == most:
            break
    return "".join(labels)


def at(place: np.ndarray) -> str:
    """Where an element of the map stands."""
    return f"left:{place[0]:.2%};top:{place[1]:.2%}"


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def percent(probability: float) -> str:
    """A probability as a reader takes it in: 25.6%, 1.4%, 0.30%, <0.001%."""
    if 0 < probability < 1e-5:
        return "<0.001%"
    hundredths = 100 * probability
    return f"{hundredths:.1f}%" if hundredths >= 1 or hundredths == 0 else f"{hundredths:#.2g}%"


def counted(number: int, thing: str) -> str:
    """`1 item`, `1,091 items`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def name_view(catalogue: Catalogue, index: int) -> str:
    """The title, and the id where it is another."""
    raw, title = str(catalogue.ids[index]), catalogue.titles[index]
    tail = "" if raw == title else f' <span class="id">{escape(raw)}</span>'
    return f'<span class="name">{escape(title)}{tail}</span>'
