import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from training.evaluation.pictures import draw_curves, draw_item_map

RECORDS = [
    {"epoch": epoch, "content_loss": 3.0 / epoch, "collaborative_loss": 2.0, "ndcg_at_100": 0.1} for epoch in (1, 2)
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved while a test runs."""
    kept, save = [], Figure.savefig

    def keep(figure, *arguments, **keywords):
        kept.append(figure)
        save(figure, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_curves_show_each_loss_and_the_validation_of_each_stage(tmp_path, figures):
    fine_tuning = [{"epoch": 1, "recommendation_loss": 2.5, "ndcg_at_100": 0.2}]
    draw_curves({"pretrain": RECORDS, "finetune": fine_tuning}, tmp_path / "curves.png")
    losses = {axis.get_title(): axis for axis in figures[0].axes if axis.get_title()}
    lines = {line.get_label(): line.get_ydata() for line in losses["pretrain"].get_lines()}
    assert {name: list(values) for name, values in lines.items()} == {
        "content loss": [3.0, 1.5], "collaborative loss": [2.0, 2.0],
    }  # fmt: skip
    assert [line.get_label() for line in losses["finetune"].get_lines()] == ["recommendation loss"]
    assert imread(tmp_path / "curves.png").std() > 0


@pytest.mark.parametrize("stages", [{}, {"pretrain": []}])
def test_a_run_without_an_epoch_has_an_empty_picture(tmp_path, stages):
    draw_curves(stages, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").ndim == 3


def test_items_that_point_the_same_way_lie_together(tmp_path, figures):
    ways = np.random.default_rng(0).normal(size=(2, 8))
    embeddings = np.concatenate([ways[0] * np.arange(1, 6)[:, None], ways[1] * np.arange(1, 6)[:, None]])
    draw_item_map(embeddings, [f"item {j}" for j in range(10)], np.arange(10), tmp_path / "items.png")
    points = np.asarray(figures[0].axes[0].collections[0].get_offsets())
    assert np.ptp(points[:5], axis=0).max() < 1e-6
    assert np.abs(points[0] - points[5]).max() > 0.5
    assert imread(tmp_path / "items.png").std() > 0


@pytest.mark.parametrize(("items", "width"), [(3, 16), (40, 2)])
def test_the_most_popular_items_are_named_first(tmp_path, figures, items, width):
    embeddings = np.random.default_rng(0).normal(size=(items, width))
    draw_item_map(embeddings, [f"item {j}" for j in range(items)], np.arange(items), tmp_path / "items.png")
    labels = [text.get_text() for text in figures[0].axes[0].texts]
    assert labels[0] == f"item {items - 1}"
    assert len(labels) <= 24


def test_no_label_covers_another(tmp_path, figures):
    embeddings = np.random.default_rng(0).normal(size=(300, 3))
    draw_item_map(
        embeddings, [f"a title of some length {j}" for j in range(300)], np.arange(300), tmp_path / "items.png"
    )
    boxes = [text.get_window_extent().get_points() for text in figures[0].axes[0].texts]
    assert len(boxes) > 5
    for place, (low, high) in enumerate(boxes):
        for other_low, other_high in boxes[:place]:
            assert (high <= other_low).any() or (other_high <= low).any()


def test_titles_with_dollars_and_line_breaks_are_drawn_as_they_are(tmp_path, figures):
    draw_item_map(np.eye(3), ["$5 \\frac and $6", "two\nlines", "^_{"], np.array([3, 2, 1]), tmp_path / "items.png")
    assert {text.get_text() for text in figures[0].axes[0].texts} == {"$5 \\frac and $6", "two lines", "^_{"}
