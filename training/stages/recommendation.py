"""Stage three: the recommendation head learns to rank the whole catalogue from a prompt (paper sec. 3.4)."""

import numpy as np
import torch

from configuration.recipe import Method
from training.data.batches import Batch, Layout, next_item_batch, recommendation_batch
from training.data.corpora import Corpora
from training.stages.loop import Objective
from training.stages.sampled_softmax import Negatives
from training.stages.teacher import Teacher


def recommendation_objective(
    corpora: Corpora, method: Method, layout: Layout, seed: int, *, regularise: bool, teacher: Teacher | None
) -> Objective:
    """Prompts over a random part of each history, pulled to the content embeddings, and to a teacher where there is one.

    With `method.targets` next it is the collaborative language model's objective, whose softmax is over the same items: its states,
    at the end of a history, are then what the recommendation head reads.
    """
    in_time = method.targets == "next"
    make = next_item_batch if in_time else recommendation_batch
    users, histories = corpora.histories("recommendation")
    negatives = None
    if method.softmax == "sampled":
        negatives = Negatives.of(histories, layout.num_items, method.num_negatives, seed)

    def collate(documents: np.ndarray, epoch: int, step: int = 0) -> Batch:
        batch = make(users, histories, documents, layout, method, seed, epoch)
        if negatives is not None:
            batch |= negatives.draw(epoch, step)
        if teacher is not None:
            scored = None if negatives is None else batch["candidates"].numpy()
            batch["teacher_logits"] = torch.from_numpy(teacher.logits(users[documents], scored))
        return batch

    def regularised(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(users[documents]), np.unique(histories.take(documents).values)

    return Objective(
        name="collaborative" if in_time else "recommendation",
        lengths=np.minimum(histories.lengths, method.max_history),
        collate=collate,
        regularised=regularised if regularise and method.lambda_v > 0 else None,
    )
