"""The softmax of the language models: a linear head over words or items, whose logits are made a chunk at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Logits that are held at a time: 16 MB in float32.
LOGITS_AT_A_TIME = 2**22


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    divisor: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of each label given the tokens before it, a scalar in float32; logits are computed only where a label is.

    No more than [`LOGITS_AT_A_TIME`] are held: in float32 by torch's chunked kernel, where it has one (2.13); elsewhere, and in half
    precision, in which that kernel is slow on a processor and sums coarsely, by [`CrossEntropyInChunks`]. `python benchmarks/parts.py`
    prints what either gives over 50,257 words.

    Args:
        hidden: `(batch, length, width)`.
        weight: `(classes, width)`, the head.
        bias: `(classes,)` or None.
        labels: `(batch, length)`, classes, -100 where nothing is predicted.
        divisor: What the sum is divided by; the number of labels by default.
    """
    labels = labels[:, 1:].to(hidden.device)
    paid = labels != -100
    # Of a model over several devices the head is where its table is, on the first.
    states, targets = hidden[:, :-1][paid].to(weight.device), labels[paid].to(weight.device)
    device, rows = states.device.type, max(LOGITS_AT_A_TIME // len(weight), 1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    if dtype == torch.float32 and hasattr(F, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        loss = F.linear_cross_entropy(states, weight, targets, linear_bias=bias, reduction="sum", options=options)
    else:
        tensors = [tensor if tensor is None else tensor.to(dtype) for tensor in (states, weight, bias)]
        if not torch.is_grad_enabled():  # of which a function of its own is not told
            tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
        loss = CrossEntropyInChunks.apply(*tensors, targets, rows)
    return loss / (paid.sum().clamp(min=1) if divisor is None else divisor)


class CrossEntropyInChunks(torch.autograd.Function):
    """Cross-entropy of a linear head, summed in float32; a chunk's gradients are made while its logits are there.

    So each logit is computed once and none is kept for the backward pass, which scales the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        """The sum, a scalar in float32.

        Args:
            ctx: Keeps the gradients.
            states: `(n, width)`.
            weight: `(classes, width)` of the same dtype.
            bias: `(classes,)`, alike, or None.
            targets: `(n,)`, classes.
            rows: States of a chunk.
        """
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_states: list[torch.Tensor] = []
        of_weight = of_bias = None
        total = torch.zeros((), device=states.device)
        half, most = states.dtype != torch.float32, min(rows, len(states))
        # Two buffers serve all chunks, so that no memory is given back and taken anew between them.
        logits_of = states.new_empty(most, len(weight))
        wide_of = states.new_empty(most, len(weight), dtype=torch.float32) if half else logits_of
        for start in range(0, max(len(states), 1), rows):
            part, wanted = states[start : start + rows], targets[start : start + rows].unsqueeze(1)
            logits = linear_into(logits_of[: len(part)], part, weight, bias)
            # In place, from logits to the softmax less one at the target.
            wide = wide_of[: len(part)].copy_(logits) if half else logits
            wide -= wide.amax(1, keepdim=True)
            total -= wide.gather(1, wanted).sum()
            sums = wide.exp_().sum(1, keepdim=True)
            total += sums.log().sum()
            if not any(ctx.needs_input_grad):
                continue
            wide /= sums
            wide.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=torch.float32))
            of_logits = logits.copy_(wide) if half else wide
            if wants_bias:
                of_bias = sum_of(of_bias, wide.sum(0))
            if wants_states:
                of_states.append(of_logits @ weight)
            if wants_weight:
                of_weight = sum_of(of_weight, of_logits.T @ part)
        ctx.gradients = torch.cat(of_states) if of_states else None, of_weight, of_bias
        ctx.dtype = states.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The kept gradients, scaled; targets and rows have none."""
        gradients = [None if kept is None else (scale * kept).to(ctx.dtype) for kept in ctx.gradients]
        return (*gradients, None, None)


def linear_into(
    found: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`F.linear(states, weight, bias)`, into a tensor that is there."""
    if bias is None:
        return torch.mm(states, weight.T, out=found)
    return torch.addmm(bias, states, weight.T, out=found)


def sum_of(so_far: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    """A sum over chunks, in float32 where there is more than one."""
    return more if so_far is None else so_far.float().add_(more)
