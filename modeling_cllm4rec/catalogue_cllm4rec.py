"""A catalogue that changes: items and users that come and go, on a trained model, without training.

All tables, biases and counts change together. Ids stay in order, words, then users, then items: new users move the token ids of
all items by their number, new items move none.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .text_encoder_cllm4rec import text_states

if TYPE_CHECKING:
    from .modeling_cllm4rec import CLLM4RecForRecommendation, CLLM4RecModel

NO_TEXTS = "this model was trained without texts of items or users (or published by a version before them), so a text tells it nothing"


@torch.no_grad()
def add_items(model: "CLLM4RecForRecommendation", texts: Sequence[str]) -> range:
    """Rows for items that have nothing but a text; scores of the others among themselves stay as they are.

    Args:
        model: Changed in place.
        texts: Of each new item.

    Returns:
        The new items' indices.

    Raises:
        ValueError: if the model knows no texts.
    """
    base, config = model.base, model.config
    if base.text_map is None:
        raise ValueError(f"no item can be added: {NO_TEXTS}")
    first = config.num_items
    if not len(texts):
        return range(first, first)
    rows, biases = base.text_map.item_rows(texts, text_states(model, texts))
    for _, table in towers(base):
        extend(table, rows)
    if base.item_bias is not None:
        base.item_bias = grown(base.item_bias, biases)
    set_num_items(model, first + len(texts))
    return range(first, config.num_items)


@torch.no_grad()
def add_users(model: "CLLM4RecForRecommendation", count: int) -> range:
    """Rows for users who have nothing yet: the mean of the others', so that their histories speak for them.

    Args:
        model: Changed in place.
        count: How many.

    Returns:
        The new users' indices.

    Raises:
        ValueError: if the count is negative.
    """
    base, config = model.base, model.config
    if count < 0:
        raise ValueError(f"{count} users cannot be added")
    first = config.num_users
    if config.user_embeddings:
        for table, _ in towers(base):
            extend(table, table.weight.float().mean(0, keepdim=True).expand(count, -1))
        if base.user_offsets is not None:
            extend(base.user_offsets, base.user_offsets.weight.new_zeros(count, config.hidden_size))
    config.num_users = first + count
    return range(first, config.num_users)


@torch.no_grad()
def remove_items(model: "CLLM4RecForRecommendation", items: Sequence[int]) -> torch.Tensor:
    """Take items out of the catalogue; the others close ranks and keep their order.

    Args:
        model: Changed in place.
        items: Their indices.

    Returns:
        For each earlier index the new one, -1 for those that are gone, int64 `(num_items before,)`.

    Raises:
        IndexError: naming an index outside the catalogue.
        ValueError: if no item would be left.
    """
    base, config = model.base, model.config
    kept = torch.ones(config.num_items, dtype=torch.bool)
    for item in items:
        if not 0 <= item < config.num_items:
            raise IndexError(f"item {item} is outside [0, {config.num_items})")
        kept[item] = False
    if not kept.any():
        raise ValueError("all items would be removed; a catalogue has at least one")
    for _, table in towers(base):
        replace(table, table.weight[kept.to(table.weight.device)])
    if base.item_bias is not None:
        base.item_bias = nn.Parameter(
            base.item_bias[kept.to(base.item_bias.device)], requires_grad=base.item_bias.requires_grad
        )
    set_num_items(model, int(kept.sum()))
    return torch.where(kept, kept.cumsum(0) - 1, -1)


@torch.no_grad()
def remove_users(model: "CLLM4RecForRecommendation", users: Sequence[int]) -> None:
    """Forget users: their rows become the mean of those that stay, which says nothing about anybody; all ids stay.

    Args:
        model: Changed in place.
        users: Their indices.

    Raises:
        IndexError: naming an index that is no user's.
    """
    base, config = model.base, model.config
    stay = torch.ones(config.num_users, dtype=torch.bool)
    for user in users:
        if not 0 <= user < config.num_users:
            raise IndexError(f"user {user} is outside [0, {config.num_users})")
        stay[user] = False
    if not config.user_embeddings:
        return
    for table, _ in towers(base):
        weight, others = table.weight, stay.to(table.weight.device)
        weight[~others] = weight[others].float().mean(0).nan_to_num().to(weight.dtype)
    if base.user_offsets is not None:
        base.user_offsets.weight[~stay.to(base.user_offsets.weight.device)] = 0.0


def towers(base: "CLLM4RecModel") -> list[tuple[nn.Embedding, nn.Embedding]]:
    """The tables of users and of items of each tower."""
    return [base.tables("collaborative"), *([base.tables("content")] if base.config.content_tower else [])]


def extend(table: nn.Embedding, rows: torch.Tensor) -> None:
    """Put rows `(new, width)` at a table's end."""
    replace(table, torch.cat([table.weight, rows.to(table.weight)]))


def replace(table: nn.Embedding, weight: torch.Tensor) -> None:
    """Give a table other rows, `(rows, width)`."""
    table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(weight)


def grown(bias: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """A bias with values `(new,)` at its end."""
    return nn.Parameter(torch.cat([bias, values.to(bias)]), requires_grad=bias.requires_grad)


def set_num_items(model: "CLLM4RecForRecommendation", count: int) -> None:
    """Note the number of items, and tie the item head to the new table."""
    model.config.num_items = count
    model.item_head.out_features = count
    model.tie_weights()
