"""A softmax over a catalogue of millions from a few thousand items: own targets exactly, all others by shared negatives.

`method.softmax: sampled`. The most popular items are always among the negatives, the others are drawn uniformly and count by the
inverse of the probability that they are drawn (Horvitz-Thompson), so that the sum of the softmax is right on average whatever the
number of negatives. A step's time then follows that number and not the catalogue: `python benchmarks/catalogue.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.data.batches import NEGATIVES, Batch, tensors, uniform
from training.data.ragged import Ragged

# A logit that no softmax notices, yet finite in every dtype, so that masked rows give no NaN.
MASKED_LOGIT = -1e4

# Share of the negatives that are the most popular items: they hold most of the softmax's mass, and are known without drawing.
POPULAR_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Negatives:
    """What negatives are drawn from.

    Attributes:
        popular: The most popular items, int64 `(popular,)`, ascending.
        others: Number of the other items.
        draws: How many of the others are drawn, with replacement.
        seed: Of the run.
    """

    popular: np.ndarray
    others: int
    draws: int
    seed: int

    @classmethod
    def of(cls, histories: Ragged, num_items: int, num_negatives: int, seed: int) -> "Negatives":
        """Negatives for training histories: half of them the most popular items."""
        count = min(int(num_negatives * POPULAR_SHARE), num_items)
        counts = np.bincount(histories.values, minlength=num_items)
        popular = np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int64)
        return cls(popular, num_items - count, num_negatives - count, seed)

    def draw(self, epoch: int, step: int) -> Batch:
        """Negatives of a step, the same for all its documents, however they are divided.

        Returns:
            `candidates`: distinct item indices, int64 `(candidates,)`, ascending; `candidate_log_weights`: minus the logarithm
            of the probability that each is among them, float32 alike.
        """
        drawn = np.empty(0, np.int64)
        if self.others:
            keys = step * np.int64(2**32) + np.arange(self.draws)
            numbers = uniform(self.seed, epoch, NEGATIVES, keys)
            drawn = np.unique((numbers * self.others).astype(np.int64))
            # The n-th item that is not popular: before it stand n others and the popular ones with no more than n others before.
            drawn = drawn + np.searchsorted(self.popular - np.arange(len(self.popular)), drawn, side="right")
        items = np.concatenate([self.popular, drawn])
        chance = -np.expm1(self.draws * np.log1p(-1 / self.others)) if self.others > 1 else 1.0
        weights = np.concatenate([np.zeros(len(self.popular)), np.full(len(drawn), -np.log(chance))])
        order = np.argsort(items)
        return tensors(candidates=items[order], candidate_log_weights=weights[order].astype(np.float32))


class SampledSoftmax:
    """The item head at a step's candidates.

    Args:
        table: The item embeddings, `(num_items, width)`.
        bias: Of the items, `(num_items,)`, or None.
        batch: With `candidates` and `candidate_log_weights`.
    """

    def __init__(self, table: nn.Embedding, bias: torch.Tensor | None, batch: Batch) -> None:
        self.table, self.bias = table, bias
        self.candidates: torch.Tensor = batch["candidates"]
        self.log_weights: torch.Tensor = batch["candidate_log_weights"]

    def biases(self, items: torch.Tensor) -> torch.Tensor | float:
        """Biases of items, of their shape; 0 where there is no bias."""
        if self.bias is None:
            return 0.0
        # DDP takes sparse gradients of embeddings alone.
        in_rows = self.table.sparse and not torch.distributed.is_initialized()
        return torch.gather(self.bias, 0, items.flatten(), sparse_grad=in_rows).view(items.shape)

    def target_logits(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logit of an item for each state, `(n,)` float32, from states `(n, width)` and item indices `(n,)`."""
        return ((states * self.table(targets)).sum(-1) + self.biases(targets)).float()

    def candidate_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of the candidates, weights included, `(n, candidates)` float32."""
        logits = F.linear(states, self.table(self.candidates)) + self.biases(self.candidates)
        return logits.float() + self.log_weights

    def mask(self, logits: torch.Tensor, rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The candidates' logits `(n, candidates)` without the items `(m,)` of the rows `(m,)`."""
        places = torch.searchsorted(self.candidates, items).clamp(max=len(self.candidates) - 1)
        hit = self.candidates[places] == items
        return logits.index_put((rows[hit], places[hit]), logits.new_tensor(MASKED_LOGIT))

    def next_item_loss(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of one item `(n,)` for each state `(n, width)`, a scalar in float32."""
        rows = torch.arange(len(targets), device=targets.device)
        own = self.target_logits(states, targets)
        others = self.mask(self.candidate_logits(states), rows, targets).logsumexp(-1)
        return (torch.logaddexp(own, others) - own).sum()

    def multinomial_loss(
        self,
        logits: torch.Tensor,
        states: torch.Tensor,
        labels: torch.Tensor,
        target_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Summed negative log-likelihood of several targets under one softmax per prompt, a scalar in float32.

        Args:
            logits: `(prompts, candidates)`, of [`~SampledSoftmax.candidate_logits`].
            states: `(prompts, width)`.
            labels: `(prompts, targets)` item indices, padded with -100.
            target_weights: Alike.
        """
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        targets = labels[rows, columns]
        own = self.target_logits(states[rows], targets)
        logits = self.mask(logits, rows, targets)
        of_targets = logits.new_full(labels.shape, MASKED_LOGIT).index_put((rows, columns), own)
        total = torch.cat([of_targets, logits], dim=1).logsumexp(-1)
        return (target_weights[rows, columns] * (total[rows] - own)).sum()
