"""Packed documents: many of different lengths in one row of a batch, no padding, each attending to itself alone.

Half to three quarters of the positions of a padded batch of histories are padding that is computed and thrown away
(`python benchmarks/parts.py` prints what packing gives). Flash attention takes packed rows as they are; for every other device
there is `packed_sdpa`, which runs torch's causal kernel over groups of documents of about the same length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
# Kinds of layers, in transformers' words, in which a document of a packed row sees itself alone.
PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})

# Documents are attended to together as long as no more than this share of their rectangle is padding.
MOST_PADDING = 0.125


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the documents of a packed row lie; made once a forward pass, for all layers.

    Attributes:
        lengths: Tokens of each document, in the order of the row; each at least 1.
        device: Of the row.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, lengths: Sequence[int], shape: Sequence[int], device: torch.device) -> "Packing":
        """The packing of a row of shape `(1, total, …)`.

        Raises:
            ValueError: if the lengths do not make up the row.
        """
        lengths = tuple(int(length) for length in lengths)
        if shape[0] != 1 or sum(lengths) != shape[1] or min(lengths, default=0) < 1:
            raise ValueError(
                f"document_lengths hold {len(lengths)} documents of {sum(lengths)} tokens, but the batch has the shape "
                f"{tuple(shape[:2])}; packed documents are one row, (1, {sum(lengths)}), and none of them is empty"
            )
        return cls(lengths, device)

    @cached_property
    def counts(self) -> torch.Tensor:
        """Tokens of each document, int64 `(documents,)`."""
        return torch.tensor(self.lengths, device=self.device)

    @cached_property
    def ends(self) -> torch.Tensor:
        """Place of each document's last token, int64 `(documents,)`."""
        return self.counts.cumsum(0) - 1

    @cached_property
    def starts(self) -> torch.Tensor:
        """Place of each document's first token, int64 `(documents,)`."""
        return self.ends + 1 - self.counts

    @cached_property
    def document(self) -> torch.Tensor:
        """Which document a token belongs to, int64 `(total,)`."""
        documents = torch.arange(len(self.lengths), device=self.device)
        return documents.repeat_interleave(self.counts, output_size=sum(self.lengths))

    @cached_property
    def positions(self) -> torch.Tensor:
        """Place of each token in its document, int64 `(1, total)`."""
        return (torch.arange(sum(self.lengths), device=self.device) - self.starts[self.document]).unsqueeze(0)

    def rectangle(self, documents: torch.Tensor, longest: int) -> torch.Tensor:
        """Places of the tokens of some documents, padded with their last token, int64 `(documents, longest)`."""
        within = torch.arange(longest, device=self.device)
        return self.starts[documents].unsqueeze(1) + within.minimum((self.counts[documents] - 1).unsqueeze(1))

    @cached_property
    def groups(self) -> tuple[list[tuple[torch.Tensor, int]], torch.Tensor]:
        """Groups of documents of about the same length, and the way back.

        Returns:
            Places of the tokens of each group, int64 `(documents · longest,)`, with its longest; and for each token of the row
            its place among the tokens of all groups, int64 `(total,)`.
        """
        order = sorted(range(len(self.lengths)), key=lambda document: -self.lengths[document])
        groups, destinations, start, base = [], [0] * len(order), 0, 0
        while start < len(order):
            longest = real = self.lengths[order[start]]
            end = start + 1
            while end < len(order):
                wider = real + self.lengths[order[end]]
                if wider < (1 - MOST_PADDING) * (end + 1 - start) * longest:
                    break
                real, end = wider, end + 1
            chosen = torch.tensor(order[start:end], device=self.device)
            groups.append((self.rectangle(chosen, longest).flatten(), longest))
            for row, document in enumerate(order[start:end]):
                destinations[document] = base + row * longest
            base += (end - start) * longest
            start = end
        back = torch.tensor(destinations, device=self.device)[self.document] + self.positions[0]
        return groups, back

    def backbone_arguments(self, attention: str | None) -> dict[str, Any]:
        """What a backbone is given beside the embeddings, for an attention implementation that takes packed rows."""
        if attention == PACKED_SDPA:
            # A mask of four dimensions is handed through by transformers, so that none is built: this one is read by nobody.
            unread = torch.empty(1, 1, 1, 1, device=self.device)
            return {"attention_mask": unread, "position_ids": self.positions, "packing": self}
        bounds = F.pad(self.ends + 1, (1, 0)).int()
        longest = max(self.lengths)
        return {
            "attention_mask": None,
            "position_ids": self.positions,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed documents by torch's causal kernel, group by group; without a packing, transformers' `sdpa`.

    Args:
        module: The attention layer.
        query: `(1, heads, total, width of a head)`.
        key: Alike, of as many heads or fewer (grouped queries).
        value: Like `key`.
        attention_mask: Read only where there is no packing.
        dropout: Of the attention weights.
        scaling: Of the products; the inverse root of a head's width by default.
        packing: Where the documents lie.
        sliding_window: A token attends to so many, itself included; None: to all before it.
        kwargs: For `sdpa`.

    Returns:
        `(1, total, heads, width of a head)`, and no weights.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    groups, back = packing.groups
    dtype = value.dtype  # rotated positions come in float32
    wide = torch.promote_types(dtype, torch.float32) if query.device.type == "cpu" else dtype
    # torch's attention on a processor is three times as slow backward in bfloat16 as in float32.
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    rows = [
        states.squeeze(0).transpose(0, 1).flatten(1) for states in (query, key, value)
    ]  # each (total, heads · width)
    heads, outputs = query.shape[1], []
    for places, longest in groups:
        queries, keys, values = (
            states.index_select(0, places).view(-1, longest, heads, states.shape[1] // heads).transpose(1, 2)
            for states in rows
        )
        mask = None
        if sliding_window is not None and longest > sliding_window:
            mask = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        with torch.autocast(query.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs).index_select(0, back).to(dtype).view(1, len(back), heads, -1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
