"""A start from another run: its users and items, known by their raw ids, lend their embeddings; so does its backbone."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from configuration.errors import InputError
from modeling_cllm4rec import CLLM4RecForRecommendation
from modeling_cllm4rec.records_cllm4rec import read_records
from training.data.corpora import Corpora, open_corpora
from training.data.interactions import TRAIN, VALIDATION, Interactions
from training.evaluation.scoring import split_matrix

logger = logging.getLogger(__name__)


def start_from_run(model: CLLM4RecForRecommendation, corpora: Corpora, folder: Path) -> None:
    """Copy the embeddings of every user and item that the other run knows, its items' bias, and its backbone's weights.

    Args:
        model: The fresh model, changed in place; users and items that the other run does not know keep their start.
        corpora: The fresh run's.
        folder: The other run's folder.

    Raises:
        InputError: if the folder holds no trained run, its backbone is another one, its items have a bias and these have none,
            or it knows none of the items.
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
    if other.model.item_bias is not None and model.model.item_bias is None:
        raise InputError(
            f"--init-from {folder}: its items have a bias, which this recipe leaves out; set method.item_bias=true"
        )
    there = [row["id"] for row in theirs.users()], items_of_model(folder / "model", other.config.num_items)
    places = [
        positions([row["id"] for row in here], ids)
        for here, ids in zip((corpora.users(), corpora.items()), there, strict=True)
    ]
    if not (places[1] >= 0).any():
        raise InputError(
            f"--init-from {folder}: it knows none of this data set's items; it was trained on another data set"
        )
    for kind, found in zip(("users", "items"), places, strict=True):
        logger.info("start: %d of %d %s are known from %s", (found >= 0).sum(), len(found), kind, folder)
    if not other.config.user_embeddings:
        places[0][:] = -1
    model.model.backbone.load_state_dict(other.model.backbone.state_dict())
    with torch.no_grad():
        if model.model.word_head is not None and other.model.word_head is not None:
            model.model.word_head.copy_(other.model.word_head)
        # Without a content tower here, both names mean the collaborative tables.
        for tower in ("collaborative", "content") if model.config.content_tower else ("collaborative",):
            for found, table, source in zip(places, model.model.tables(tower), other.model.tables(tower), strict=True):
                known = np.flatnonzero(found >= 0)
                table.weight[known] = source.weight[found[known]]
        if model.model.item_bias is not None and other.model.item_bias is not None:
            known = np.flatnonzero(places[1] >= 0)
            model.model.item_bias[known] = other.model.item_bias[places[1][known]]


def items_of_model(model: Path, num_items: int) -> list[str | int]:
    """Raw ids in the order of a model's rows: `add_items` and `remove_items` move them, and the corpora stay as they were.

    (Users keep their places whoever comes or goes: new ones stand behind those of the corpora, and are untrained.)

    Raises:
        InputError: if there is no `items.jsonl`, or it is not the model's.
    """
    path = model / "items.jsonl"
    try:
        ids = [record["id"] for record in read_records(path)]
    except (OSError, ValueError) as error:
        raise InputError(f"--init-from {model.parent}: {error}; its items cannot be told apart") from error
    if len(ids) != num_items:
        raise InputError(
            f"--init-from {model.parent}: {path} has {len(ids)} lines, but the model has {num_items} items; take the file of this model"
        )
    return ids


def train_on_what_is_known(interactions: Interactions, folder: Path) -> Interactions:
    """Move held-out pairs that another run has learnt from into train: what is judged on them would be flattered.

    Where that run started from another in turn, that one's, too.

    Args:
        interactions: The fresh run's, with their split.
        folder: The other run's folder.

    Returns:
        The same where nothing is moved; else `log` says how many were, and `source` what the other runs had learnt from.

    Raises:
        InputError: if nothing is left for validation.
    """
    splits, source = interactions.splits.copy(), dict(interactions.source)
    for run in started_from(folder):
        theirs = open_corpora(run / "corpora")
        learnt = split_matrix(theirs, "recommendation")
        users = positions(interactions.user_ids, (row["id"] for row in theirs.users()))[interactions.users]
        items = positions(interactions.item_ids, (row["id"] for row in theirs.items()))[interactions.items]
        held_out = np.flatnonzero((splits != TRAIN) & (users >= 0) & (items >= 0))
        known = np.asarray(learnt[users[held_out], items[held_out]]).ravel() > 0 if len(held_out) else held_out > 0
        if known.any():
            splits[held_out[known]] = TRAIN
            source[f"what {run.name} was trained on"] = hashlib.sha256(
                learnt.indptr.tobytes() + learnt.indices.tobytes()
            ).hexdigest()
    moved = int((splits != interactions.splits).sum())
    if not moved:
        return interactions
    if not (splits == VALIDATION).any():
        raise InputError(
            f"--init-from {folder}: it was trained on all that is held out here for validation, which chooses the best epoch; more newer "
            "pairs are needed, or another split (data.split)"
        )
    log = interactions.log | {"held_out_pairs_trained_on_before": moved}
    return replace(interactions, splits=splits, source=source, log=log)


def started_from(folder: Path) -> Iterator[Path]:
    """A run's folder, that of the run that it started from, and so on, as far as their corpora are there."""
    passed: set[Path] = set()
    while (folder / "corpora" / "info.json").is_file() and folder.resolve() not in passed:
        yield folder
        passed.add(folder.resolve())
        start = folder / "checkpoints" / "pretrain" / "start.json"
        if not start.is_file():
            return
        folder = Path(json.loads(start.read_text(encoding="utf-8"))["init_from"])
    if passed and folder.resolve() not in passed:
        logger.warning("start: %s is gone, so pairs that it was trained on may be held out", folder)


def positions(ids: Sequence[str | int], there: Iterable[str | int]) -> np.ndarray:
    """Where each of these raw ids stands in another run, `(len(ids),)` int64; -1 where that does not know it.

    Ids are the same where their text is: whole numbers are read as text where another id of the table is none.
    """
    known = {str(raw): place for place, raw in enumerate(there)}
    return np.array([known.get(str(raw), -1) for raw in ids], np.int64)
