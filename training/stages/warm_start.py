"""A start from another run: its users and items, known by their raw ids, lend their embeddings; so does its backbone."""

import logging
from pathlib import Path

import torch

from configuration.errors import InputError
from modeling_cllm4rec import CLLM4RecForRecommendation
from training.data.corpora import Corpora, open_corpora

logger = logging.getLogger(__name__)


def start_from_run(model: CLLM4RecForRecommendation, corpora: Corpora, folder: Path) -> None:
    """Copy the embeddings of every user and item that the other run knows, its items' bias, and its backbone's weights.

    Args:
        model: The fresh model, changed in place; users and items that the other run does not know keep their start.
        corpora: The fresh run's.
        folder: The other run's folder.

    Raises:
        InputError: if the folder holds no trained run, its backbone is another one, or it knows none of the items.
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
    model.model.backbone.load_state_dict(other.model.backbone.state_dict())
    rows = {}
    for kind, here, there in (("users", corpora.users(), theirs.users()), ("items", corpora.items(), theirs.items())):
        known = {row["id"]: index for index, row in enumerate(there)}
        if kind == "users" and not other.config.user_embeddings:
            known = {}
        shared = [(index, known[row["id"]]) for index, row in enumerate(here) if row["id"] in known]
        rows[kind] = torch.tensor(shared, dtype=torch.long).reshape(-1, 2)
        logger.info("start: %d of %d %s are known from %s", len(shared), len(here), kind, folder)
    if not len(rows["items"]):
        raise InputError(
            f"--init-from {folder}: it knows none of this data set's items; it was trained on another data set"
        )
    with torch.no_grad():
        # Without a content tower here, both names mean the collaborative tables.
        for tower in ("collaborative", "content") if model.config.content_tower else ("collaborative",):
            for kind, table, source in zip(
                ("users", "items"), model.model.tables(tower), other.model.tables(tower), strict=True
            ):
                table.weight[rows[kind][:, 0]] = source.weight[rows[kind][:, 1]]
        if model.model.item_bias is not None and other.model.item_bias is not None:
            model.model.item_bias[rows["items"][:, 0]] = other.model.item_bias[rows["items"][:, 1]]
