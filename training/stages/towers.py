"""The three heads over one base model, and their losses with the mutual regularisation (paper sec. 3.3.4 and 3.4).

One module, so that Accelerate wraps one thing and the backbone is there once.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from modeling_cllm4rec import (
    CLLM4RecForCollaborativeLM,
    CLLM4RecForContentLM,
    CLLM4RecForRecommendation,
    CLLM4RecModel,
)
from training.data.batches import Batch
from training.stages.sampled_softmax import SampledSoftmax

ObjectiveName = Literal["content", "collaborative", "recommendation"]


class Towers(nn.Module):
    """Content LM, collaborative LM and recommendation head over one base model, the only part that holds parameters."""

    def __init__(
        self,
        recommender: CLLM4RecForRecommendation,
        lambda_v: float,
        distillation: float = 0.0,
        *,
        softmax: Literal["exact", "sampled"] = "exact",
    ) -> None:
        super().__init__()
        self.base = recommender.model
        # A plain dict: the heads are views of the base, and a checkpoint holds each parameter once.
        self.heads: dict[str, Any] = {
            "content": share(CLLM4RecForContentLM, recommender.model),
            "collaborative": share(CLLM4RecForCollaborativeLM, recommender.model),
            "recommendation": recommender,
        }
        self.lambda_v = lambda_v
        self.distillation = distillation
        self.softmax = softmax

    @property
    def _no_split_modules(self) -> set[str]:
        """The backbone's layers, which Accelerate shards one by one."""
        return self.base._no_split_modules

    @property
    def recommender(self) -> CLLM4RecForRecommendation:
        """The recommendation head."""
        return self.heads["recommendation"]

    def train(self, mode: bool = True) -> "Towers":
        """Set the mode of the base and of the heads."""
        super().train(mode)
        for head in self.heads.values():
            head.train(mode)
        return self

    def tie_heads(self) -> None:
        """Point the heads to the base's parameters again, where a wrapper has replaced these."""
        for head in self.heads.values():
            head.tie_weights()

    def save_model(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write the weights as every Auto class reads them, LoRA merged into the backbone.

        Args:
            folder: Where to.
            state: The whole weights by name, where this process holds but its shard of them.
        """
        model, adapted = self.recommender, hasattr(self.base.backbone, "merge_and_unload")
        if state is not None:
            model = self.rebuild(state)
        elif adapted:
            model = copy.deepcopy(model)
        if adapted:
            model.model.backbone = model.model.backbone.merge_and_unload()
        model.save_pretrained(folder)

    def rebuild(self, state: dict[str, torch.Tensor]) -> CLLM4RecForRecommendation:
        """The recommender around the weights of a whole state, which it takes over."""
        with torch.device("meta"):
            base = CLLM4RecModel(self.base.config)
            if hasattr(self.base.backbone, "peft_config"):
                from peft import get_peft_model

                base.backbone = get_peft_model(base.backbone, self.base.backbone.peft_config["default"])
        base.load_state_dict({name.removeprefix("base."): value for name, value in state.items()}, assign=True)
        return share(CLLM4RecForRecommendation, base)

    def forward(
        self, objective: ObjectiveName, batch: Batch, ids: tuple[torch.Tensor, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Summed losses of a part of a step, to be divided by global counts.

        Args:
            objective: Which head learns.
            batch: Its batch; for the recommendation head with a teacher also `teacher_logits` `(documents, num_items)`, and with
                a sampled softmax `candidates` and what else [`SampledSoftmax`] reads, the teacher's logits being of these.
            ids: Distinct user and item indices that this part regularises; None: none.

        Returns:
            `likelihood`: negative log-likelihood summed over labels (to be divided by the labels' weight); `distilled`:
            cross-entropy to the teacher summed over documents; `regularisation`: λ Σ‖z − z'‖², to be divided by documents.
        """
        if "candidates" in batch:
            losses = self.sampled_losses(objective, batch)
        elif objective == "recommendation":
            losses = self.recommendation_losses(batch)
        else:
            losses = {"likelihood": self.heads[objective](**batch, num_items_in_batch=1, use_cache=False).loss}
        if ids is not None:
            pulled: Literal["content", "collaborative"] = "content" if objective == "content" else "collaborative"
            losses["regularisation"] = self.lambda_v * self.distance(*ids, pulled=pulled)
        return losses

    def recommendation_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Multinomial likelihood, and cross-entropy to the teacher's softmax."""
        names = ("input_ids", "attention_mask", "document_lengths")
        inputs = {name: batch[name] for name in names if name in batch}
        logits = self.recommender(**inputs).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        likelihood = self.recommender.multinomial_loss(
            logits, batch["labels"], batch.get("target_weights"), num_items_in_batch=1
        )
        losses = {"likelihood": likelihood}
        if "teacher_logits" in batch:
            losses["distilled"] = distilled(batch["teacher_logits"], logits)
        return losses

    def sampled_losses(self, objective: ObjectiveName, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of a head over the items, of a softmax over the targets and a step's candidates."""
        input_ids, lengths = batch["input_ids"], batch["document_lengths"]
        softmax = SampledSoftmax(self.base.item_embeddings, self.base.item_bias, batch)
        hidden = self.base(input_ids, document_lengths=lengths).last_hidden_state
        first_item = self.base.config.num_words + self.base.config.num_users
        if objective == "collaborative":
            targets = batch["labels"][:, 1:]
            paid = targets != -100
            return {"likelihood": softmax.next_item_loss(hidden[:, :-1][paid], targets[paid] - first_item)}
        states = self.recommender.read_out(hidden, input_ids, document_lengths=lengths)
        logits = softmax.candidate_logits(states)
        losses = {"likelihood": softmax.multinomial_loss(logits, states, batch["labels"], batch["target_weights"])}
        if "teacher_logits" in batch:
            losses["distilled"] = distilled(batch["teacher_logits"] + softmax.log_weights, logits)
        return losses

    def distance(
        self, users: torch.Tensor, items: torch.Tensor, pulled: Literal["content", "collaborative"]
    ) -> torch.Tensor:
        """Σ‖z_pulled − z_other‖² over distinct users and items, the other tower's embeddings detached (paper eq. 6 and 8)."""
        other: Literal["content", "collaborative"] = "collaborative" if pulled == "content" else "content"
        total = torch.zeros((), device=users.device)
        for index, mine, theirs in zip((users, items), self.base.tables(pulled), self.base.tables(other), strict=True):
            total = total + (mine(index) - theirs(index).detach()).square().sum()
        return total


def distilled(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the softmax of logits to that of a teacher's, `(documents, items)` each, a scalar."""
    return given.logsumexp(-1).sum() - (wanted.softmax(-1) * given).sum()


def share(head: type, base: CLLM4RecModel) -> Any:
    """A head over a base model that another head holds already, with no parameter of its own."""
    with torch.device("meta"):
        made = head(base.config)
    made.model = base
    made.tie_weights()
    return made
