"""Scores of the trained model for the rankings, and its figures on the validation split after an epoch."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from scipy.sparse import csr_matrix
from torch.nn import functional as F
from transformers import PreTrainedModel

from configuration.errors import InputError
from configuration.recipe import Recipe
from modeling_cllm4rec import CLLM4RecForRecommendation
from modeling_cllm4rec.records_cllm4rec import read_records
from training.data.batches import Layout, evaluation_batch, layout_of, on_device
from training.data.corpora import Corpora
from training.data.ragged import Ragged
from training.evaluation.ranking import ITEMS_PER_BLOCK, evaluate_scores

# Items of all the prompts that go through the backbone together, about: its memory does not follow the batch of users. A processor is
# as fast in small passes.
ITEMS_PER_PASS, ITEMS_PER_PASS_ON_CPU = 8192, 2048


def check_is_trained_on(model: Path, corpora: Corpora) -> None:
    """Refuse a model whose catalogue is not that of the corpora: another run's, or one whose items or users have come and gone.

    Args:
        model: Its folder.
        corpora: Those that its prompts are made of.

    Raises:
        InputError: if the users' number, or the items or their order, differ.
    """
    num_users = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_users"]
    items = [record["id"] for record in read_records(model / "items.jsonl")]
    if num_users != len(corpora.users()) or items != [row["id"] for row in corpora.items()]:
        raise InputError(
            f"{model} was not trained on {corpora.folder}, or items or users have come or gone since; run training/finetune.py "
            "--overwrite, or keep a changed catalogue in a folder of its own"
        )


class ModelScores:
    """Scores of the recommendation head for users given by their row in the training histories; called by the rankings.

    The prompt holds training items only, at validation and at test time; without `user_tokens` it names nobody, so that the
    scores are those of somebody new with the same history.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        users: np.ndarray,
        histories: Ragged,
        layout: Layout,
        max_history: int,
        *,
        user_tokens: bool = True,
    ) -> None:
        self.model, self.max_history, self.user_tokens = model, max_history, user_tokens
        self.layout = layout if model.config.prompt_ids is None else replace(layout, prompt_ids=model.config.prompt_ids)
        self.lengths = np.zeros(layout.num_users, np.int64)
        self.lengths[users] = histories.lengths
        # A row for each user, empty for those without training items.
        self.histories = Ragged(histories.values, np.concatenate([[0], np.cumsum(self.lengths)]))

    def by_length(self, users: np.ndarray) -> np.ndarray:
        """The users in order of their history's length, so that prompts attended to together hold little padding."""
        return users[np.argsort(self.lengths[users], kind="stable")]

    @torch.no_grad()
    def states(self, users: np.ndarray) -> torch.Tensor:
        """What the item head reads of each user's prompt, `(users, width)`."""
        self.model.eval()
        device = self.model.get_output_embeddings().weight.device
        lengths = np.minimum(self.lengths[users], self.max_history)
        passes = np.cumsum(lengths) // (ITEMS_PER_PASS_ON_CPU if device.type == "cpu" else ITEMS_PER_PASS)
        parts = []
        for part in np.split(users, np.flatnonzero(np.diff(passes)) + 1):
            named = part if self.user_tokens and self.model.config.prompt_names_user else np.full_like(part, -1)
            batch = evaluation_batch(named, self.histories.take(part), self.layout, self.max_history)
            prompts = on_device(batch, device)
            hidden = self.model.model(**prompts, use_cache=False).last_hidden_state
            parts.append(self.model.read_out(hidden, **prompts))
        states, offsets = torch.cat(parts), self.model.model.user_offsets
        if self.user_tokens and offsets is not None:
            states = states + offsets(torch.from_numpy(np.asarray(users, np.int64)).to(device)).to(states)
        return states

    @torch.no_grad()
    def blocks(self, users: np.ndarray) -> Iterator[torch.Tensor]:
        """Logits in blocks of items, `(users, items of the block)` float32, so that memory does not follow the catalogue."""
        states = self.states(users)
        weight, bias = self.model.get_output_embeddings().weight, self.model.model.item_bias
        for start in range(0, len(weight), ITEMS_PER_BLOCK):
            items = slice(start, start + ITEMS_PER_BLOCK)
            yield F.linear(states, weight[items], None if bias is None else bias[items]).float()

    def __call__(self, users: np.ndarray) -> np.ndarray:
        """Logits `(users, num_items)`, float32."""
        return torch.cat(list(self.blocks(users)), dim=1).cpu().numpy()


def split_matrix(corpora: Corpora, name: str) -> csr_matrix:
    """A split's pairs as ones, `(num_users, num_items)` float32."""
    users, items = corpora.histories(name)
    pairs = (np.repeat(users, items.lengths), items.values)
    return csr_matrix((np.ones(len(items.values), np.float32), pairs), shape=(corpora.num_users, corpora.num_items))


class Validation:
    """NDCG@100 and recall on the validation split, over a seeded sample of users, shared among the processes."""

    def __init__(
        self, model: CLLM4RecForRecommendation, corpora: Corpora, recipe: Recipe, accelerator: Accelerator
    ) -> None:
        self.train, self.held_out = split_matrix(corpora, "recommendation"), split_matrix(corpora, "validation")
        users = np.flatnonzero(np.diff(self.held_out.indptr))
        if len(users) > recipe.evaluation.selection_users:
            chosen = np.random.default_rng(recipe.seed).choice(users, recipe.evaluation.selection_users, replace=False)
            users = np.sort(chosen)
        self.scores = ModelScores(
            model, *corpora.histories("recommendation"), layout_of(corpora), model.config.max_history
        )
        self.users = self.scores.by_length(users[accelerator.process_index :: accelerator.num_processes])
        self.batch_size, self.accelerator = recipe.evaluation.batch_size, accelerator

    def __call__(self) -> dict[str, float]:
        """`ndcg_at_100`, `recall_at_20` and `recall_at_40`, means over the users."""
        measured = evaluate_scores(
            self.scores.blocks, self.users, self.train, self.held_out, batch_size=self.batch_size
        )
        per_user = vars(measured)
        if self.accelerator.num_processes > 1:
            parts = gather_object([per_user])
            per_user = {name: np.concatenate([part[name] for part in parts]) for name in per_user}
        return {name: float(values.mean()) for name, values in per_user.items()}
