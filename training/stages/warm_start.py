"""A start from another run: its users and items, known by their raw ids, lend their embeddings; so does its backbone."""

import logging
from pathlib import Path

import numpy as np
import torch

from configuration.errors import InputError
from modeling_cllm4rec import CLLM4RecForRecommendation
from training.data.corpora import Corpora, open_corpora
from training.evaluation.scoring import split_matrix

logger = logging.getLogger(__name__)


def start_from_run(model: CLLM4RecForRecommendation, corpora: Corpora, folder: Path) -> None:
    """Copy the embeddings of every user and item that the other run knows, its items' bias, and its backbone's weights.

    Args:
        model: The fresh model, changed in place; users and items that the other run does not know keep their start.
        corpora: The fresh run's.
        folder: The other run's folder.

    Raises:
        InputError: if the folder holds no trained run, its backbone is another one, it knows none of the items, or it has learnt from
            pairs that are held out here.
    """
    if not (folder / "model" / "config.json").is_file():
        raise InputError(
            f"--init-from {folder}: no trained run is there (no model/config.json); give a run's folder, as runs/sample"
        )
    other, theirs = CLLM4RecForRecommendation.from_pretrained(folder / "model"), open_corpora(folder / "corpora")
    mine = {name: value.shape for name, value in model.model.backbone.state_dict().items()}
    if mine != {name: value.shape for name, value in other.model.backbone.state_dict().items()}:
        raise InputError(
            f"--init-from {folder}: it was trained with another backbone or vocabulary than this recipe's; use its recipe's "
            "backbone, and data with the same text"
        )
    places = [places_of(corpora.users(), theirs.users()), places_of(corpora.items(), theirs.items())]
    if not (places[1] >= 0).any():
        raise InputError(
            f"--init-from {folder}: it knows none of this data set's items; it was trained on another data set"
        )
    check_held_out(corpora, theirs, places[0], places[1], folder)
    for kind, found in zip(("users", "items"), places, strict=True):
        logger.info("start: %d of %d %s are known from %s", (found >= 0).sum(), len(found), kind, folder)
    if not other.config.user_embeddings:
        places[0][:] = -1
    model.model.backbone.load_state_dict(other.model.backbone.state_dict())
    with torch.no_grad():
        # Without a content tower here, both names mean the collaborative tables.
        for tower in ("collaborative", "content") if model.config.content_tower else ("collaborative",):
            for found, table, source in zip(places, model.model.tables(tower), other.model.tables(tower), strict=True):
                known = np.flatnonzero(found >= 0)
                table.weight[known] = source.weight[found[known]]
        if model.model.item_bias is not None and other.model.item_bias is not None:
            known = np.flatnonzero(places[1] >= 0)
            model.model.item_bias[known] = other.model.item_bias[places[1][known]]


def places_of(here: list[dict], there: list[dict]) -> np.ndarray:
    """Where each of these users or items stands in another run, by its raw id, `(len(here),)` int64; -1 where it does not know it."""
    known = {row["id"]: place for place, row in enumerate(there)}
    return np.array([known.get(row["id"], -1) for row in here], np.int64)


def check_held_out(corpora: Corpora, theirs: Corpora, users: np.ndarray, items: np.ndarray, folder: Path) -> None:
    """Refuse a start from a run that was trained on pairs which are held out here: no figure would mean anything.

    Args:
        corpora: The fresh run's.
        theirs: The other run's.
        users: Of [`places_of`], of the fresh run's users in the other.
        items: Alike.
        folder: Of the other run.

    Raises:
        InputError: if there are such pairs.
    """
    learnt, seen = split_matrix(theirs, "recommendation"), {}
    for name in ("validation", "test"):
        pairs = split_matrix(corpora, name).tocoo()
        rows, columns = users[pairs.row], items[pairs.col]
        known = (rows >= 0) & (columns >= 0)
        seen[name] = int(learnt[rows[known], columns[known]].sum()) if known.any() else 0
    if any(seen.values()):
        split = corpora.info["recipe"]["data"]["split"]
        raise InputError(
            f"--init-from {folder}: it was trained on {seen['validation']} of this run's validation pairs and {seen['test']} of its test "
            f"pairs (data.split={split}), so no figure would mean anything; hold out what is newer: data.split=leave_last_out, or "
            "data.split=given with a column that puts what that run was trained on into train"
        )
