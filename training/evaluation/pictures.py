"""Pictures of a run: loss curves and the map of the item embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

LABELLED_ITEMS, LABEL_CHARACTERS = 24, 28
# Size of a label's character and line in shares of the map; labels of points right of the turn stand on their left.
LABEL_CHARACTER_WIDTH, LABEL_HEIGHT, LABEL_TURNS = 0.0165, 0.035, 0.65


def draw_curves(stages: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training losses (left axis) and validation NDCG@100 (right axis) of each stage by epoch.

    Args:
        stages: The record per epoch of each stage, as `progress.json` has them.
        path: The PNG file.
    """
    figure = Figure(figsize=(4.2 * max(len(stages), 1), 3.6), layout="constrained")
    axes = figure.subplots(1, max(len(stages), 1), squeeze=False)[0]
    for axis, (stage, records) in zip(axes, stages.items(), strict=False):
        epochs = [record["epoch"] for record in records]
        for key in [key for key in (records[0] if records else {}) if key.endswith("_loss")]:
            axis.plot(epochs, [record[key] for record in records], label=f"{key.removesuffix('_loss')} loss")
        quality = axis.twinx()
        quality.plot(
            epochs,
            [record["ndcg_at_100"] for record in records],
            color="black",
            linestyle="--",
            label="validation NDCG@100",
        )
        lines = axis.get_lines() + quality.get_lines()
        axis.legend(
            lines,
            [str(line.get_label()) for line in lines],
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),
            ncols=2,
        )
        axis.set(title=stage, xlabel="epoch", ylabel="loss")
        quality.set_ylabel("validation NDCG@100")
    figure.savefig(path, dpi=120)


def draw_item_map(embeddings: np.ndarray, titles: list[str], popularity: np.ndarray, path: Path) -> None:
    """The items on the first two principal components of their embeddings' directions, the most popular ones named.

    Args:
        embeddings: `(items, width)`.
        titles: Of each item.
        popularity: `(items,)` training interactions.
        path: The PNG file.
    """
    directions = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    centred = directions - directions.mean(0)
    # The components of the covariance: its size is the model's width, whatever the catalogue's.
    _, components = np.linalg.eigh(centred.T @ centred)
    points = centred @ components[:, ::-1][:, :2]
    figure = Figure(figsize=(6.6, 5.6), layout="constrained")
    axis = figure.subplots()
    shown = axis.scatter(
        points[:, 0], points[:, 1], c=1 + popularity, norm=LogNorm(1, max(2, 1 + popularity.max(initial=0))),
        s=12, cmap="viridis", alpha=0.75, linewidths=0,
    )  # fmt: skip
    low, span = points.min(0), np.maximum(np.ptp(points, axis=0), 1e-12)
    placed: list[np.ndarray] = []
    for index in np.argsort(-popularity, kind="stable"):
        label = " ".join(titles[index].split())
        if len(label) > LABEL_CHARACTERS:
            label = f"{label[: LABEL_CHARACTERS - 1]}…"
        x, y = (points[index] - low) / span
        width, on_the_right = LABEL_CHARACTER_WIDTH * len(label), x < LABEL_TURNS
        box = np.array([[x if on_the_right else x - width, y], [x + width if on_the_right else x, y + LABEL_HEIGHT]])
        # A label that would cover another one is left out.
        if len(placed) < LABELLED_ITEMS and all(
            (box[1] < other[0]).any() or (other[1] < box[0]).any() for other in placed
        ):
            placed.append(box)
            axis.annotate(
                label,
                points[index],
                (4 if on_the_right else -4, 2),
                textcoords="offset points",
                fontsize=8,
                ha="left" if on_the_right else "right",
                parse_math=False,  # a price has its dollar sign
            )
    figure.colorbar(shown, ax=axis, label="1 + training interactions")
    axis.set(title="Item embeddings (principal components)", xticks=[], yticks=[])
    figure.savefig(path, dpi=140)
