"""One stage made ready for single steps, as the scripts make it: what the benchmarks of training and prediction time."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks.published_recipe import Documents, endless
from configuration.recipe import Recipe
from modeling_cllm4rec.packing_cllm4rec import PACKED_SDPA, Packing
from training.data.batches import Batch, layout_of, plan_epoch
from training.data.corpora import Corpora, open_corpora
from training.evaluation.ranking import best_items
from training.evaluation.scoring import ModelScores, split_matrix
from training.run import make_accelerator
from training.stages import loop
from training.stages.collaborative import collaborative_objective
from training.stages.content import content_objective
from training.stages.model import make_model
from training.stages.optimiser import RowwiseAdamW, choose_sparse_tables
from training.stages.recommendation import recommendation_objective
from training.stages.towers import Towers

# Steps that are prepared; a benchmark that takes more begins again.
MOST_STEPS = 100
BLOCKS_A_BATCH = 4


class Steps:
    """A stage of a recipe, and the documents of its first epoch in steps.

    Args:
        stage: `content`, `collaborative` or `recommendation`.
        recipe: The recipe; no teacher is fitted.
        corpora: Its corpora.
    """

    def __init__(self, stage: str, recipe: Recipe, corpora: Corpora) -> None:
        transformers.utils.logging.disable_progress_bar()
        model = make_model(recipe, corpora)
        self.stage = recipe.finetune if stage == "recommendation" else recipe.pretrain
        method = replace(recipe.method, max_history=model.config.max_history)
        regularise, layout = model.config.content_tower, layout_of(corpora)
        if stage == "recommendation" and regularise:
            for table in model.model.tables("content"):
                table.requires_grad_(False)
        if stage == "content":
            self.objective = content_objective(corpora, method)
        elif stage == "collaborative":
            self.objective = collaborative_objective(corpora, method, layout, recipe.seed, regularise=regularise)
        else:
            self.objective = recommendation_objective(
                corpora, method, layout, recipe.seed, regularise=regularise, teacher=None
            )
        self.towers = Towers(model, method.lambda_v, softmax=method.softmax)
        self.accelerator = make_accelerator(recipe, self.stage, Path(tempfile.gettempdir()))
        choose_sparse_tables(self.towers, self.accelerator, sampled=method.softmax == "sampled")
        optimizer = RowwiseAdamW(loop.parameter_groups(self.towers, self.stage), betas=loop.ADAM_BETAS)
        self.model, self.optimizer = self.accelerator.prepare(self.towers, optimizer)
        self.model.train()
        self.plan = plan_epoch(self.objective.lengths, self.stage.batch_size, recipe.seed, 0)

    def __call__(self, number: int) -> int:
        """Train on the documents of a step; how many they are."""
        number %= len(self.plan)
        documents = self.plan[number]
        loop.train_step(
            self.model, self.objective, documents, 0, self.optimizer, self.stage, self.accelerator, self.towers,
            step=number,
        )  # fmt: skip
        return len(documents)

    def batch(self, number: int) -> Batch:
        """The batch of a step."""
        return self.objective.collate(self.plan[number % len(self.plan)], 0, number % len(self.plan))


def published_order(stage: str, corpora: Path, backbone: Path) -> list[np.ndarray]:
    """The documents of each step in the order in which the published recipe takes them, as our objective numbers them."""
    opened = open_corpora(corpora)
    documents, (users, _) = Documents.of(opened, backbone), opened.histories("recommendation")
    steps = islice(endless(documents, stage), MOST_STEPS)
    return [np.array(keys) if stage == "content" else np.searchsorted(users, keys) for keys in steps]


def ours(
    stage: str, recipe: Recipe, corpora: Path, batches: int, plan: list[np.ndarray] | None = None
) -> Callable[[], float]:
    """A stage set up; each call of what is returned trains on further batches, or ranks all users.

    Args:
        stage: `content`, `collaborative`, `recommendation` or `predict`.
        recipe: Of the run.
        corpora: Folder of its corpora.
        batches: Steps at a call; where users are ranked, [`BLOCKS_A_BATCH`] times as many batches of them.
        plan: The documents of each step, such as those that the published recipe takes; without it our own order.

    Returns:
        A function that gives the number of documents (users).
    """
    opened, done = open_corpora(corpora), 0
    if stage == "predict":
        return predicts(recipe, opened, BLOCKS_A_BATCH * batches)
    steps = Steps(stage, recipe, opened)
    if plan is not None:
        steps.plan = plan

    def train() -> float:
        nonlocal done
        done += batches
        return sum(steps(number) for number in range(done - batches, done))

    return train


def predicts(recipe: Recipe, corpora: Corpora, most: int) -> Callable[[], float]:
    """The best unseen items of users, in batches of users with histories of like length, as predict.py ranks.

    Args:
        recipe: Of the run.
        corpora: Its corpora.
        most: Batches; where there are more, evenly spread ones are taken, so that histories of all lengths are among them.
    """
    transformers.utils.logging.disable_progress_bar()
    model, train = make_model(recipe, corpora), split_matrix(corpora, "recommendation")
    users, histories = corpora.histories("recommendation")
    scores = ModelScores(model, users, histories, layout_of(corpora), model.config.max_history)
    blocks = np.array_split(scores.by_length(users), -(-len(users) // recipe.evaluation.batch_size))
    blocks = [blocks[place] for place in np.linspace(0, len(blocks) - 1, min(most, len(blocks))).round().astype(int)]

    def rank() -> float:
        for chosen in blocks:
            best_items(scores.blocks(chosen), train[chosen], chosen, recipe.evaluation.top_k)
        return sum(map(len, blocks))

    return rank


def limit(
    stage: str, recipe: Recipe, corpora: Path, batches: int, plan: list[np.ndarray] | None = None
) -> Callable[[], float]:
    """Forward and backward of the bare backbone on the very tokens of our steps, packed, and one softmax head.

    The backbone is a copy of the one that our step runs (weights, dropout, activation, attention and precision), in training mode;
    gradients are computed for its inputs and, where it learns, for its weights. The head is one matrix product and a
    cross-entropy at the positions that carry a loss, one a prompt in the recommendation stage. Batches are made beforehand;
    there is no optimiser.

    Returns:
        A function that gives the number of documents.
    """
    opened = open_corpora(corpora)
    steps, done = Steps(stage, recipe, opened), 0
    if plan is not None:
        steps.plan = plan
    base, half = steps.towers.base, steps.accelerator.mixed_precision == "bf16"
    # A copy, so that weights, dropout and kernels are those of the step; the model switches its own to packed rows at the first of them.
    bare = copy.deepcopy(base.backbone).train()
    bare.set_attn_implementation(PACKED_SDPA)
    learns = recipe.backbone.train == "full"
    bare.requires_grad_(learns)
    # The rows of our head: from ones that are drawn much larger, the softmax over the words takes a quarter longer.
    head = steps.towers.heads[steps.objective.name].get_output_embeddings().weight.detach().clone()
    head.requires_grad_(stage != "content" or learns)
    prepared = [bare_inputs(stage, steps.batch(number), head) for number in range(len(steps.plan))]

    def train() -> float:
        nonlocal done
        counted = 0
        for number in range(done, done + batches):
            embeds, arguments, places, targets, documents = prepared[number % len(prepared)]
            embeds = embeds.clone().requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                hidden = bare(inputs_embeds=embeds, use_cache=False, **arguments()).last_hidden_state[0]
                loss = softmax(hidden[places], head, targets)
            loss.backward()
            bare.zero_grad()
            head.grad = None
            counted += documents
        done += batches
        return counted

    return train


def bare_inputs(stage: str, batch: Batch, head: torch.Tensor) -> tuple[Any, ...]:
    """Embeddings, the backbone's other arguments (made anew for each pass), positions with a loss, their targets, documents."""
    lengths, shape = batch["document_lengths"], batch["input_ids"].shape
    embeds = torch.randn(*shape, head.shape[1]) * 0.05

    def arguments() -> dict[str, Any]:
        return Packing.of(lengths, shape, embeds.device).backbone_arguments(PACKED_SDPA)

    if stage == "recommendation":
        places = torch.tensor(lengths).cumsum(0) - 1
    else:
        places = (batch["labels"][0, 1:] != -100).nonzero().squeeze(1)
    targets = torch.randint(len(head), (len(places),), generator=torch.Generator().manual_seed(0))
    return embeds, arguments, places, targets, len(lengths)


def softmax(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of targets `(n,)` from states `(n, width)`, the fastest way: in float32 torch's fused kernel where it has one."""
    if hasattr(F, "linear_cross_entropy") and not torch.is_autocast_enabled("cpu"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(2**22 // len(head), 1))
        return F.linear_cross_entropy(states, head, targets, reduction="sum", options=options)
    return F.cross_entropy(F.linear(states, head).float(), targets, reduction="sum")
