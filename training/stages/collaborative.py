"""Stage one's second half: the collaborative language model learns who interacts with what (paper sec. 3.3.2)."""

import numpy as np

from configuration.recipe import Method
from training.data.batches import Batch, Layout, collaborative_batch
from training.data.corpora import Corpora
from training.stages.loop import Objective
from training.stages.sampled_softmax import Negatives


def collaborative_objective(
    corpora: Corpora, method: Method, layout: Layout, seed: int, *, regularise: bool
) -> Objective:
    """Histories, their items reshuffled every epoch, pulled to the content embeddings of their users and items."""
    users, histories = corpora.histories("collaborative")

    negatives = None
    if method.softmax == "sampled":
        negatives = Negatives.of(histories, layout.num_items, method.num_negatives, seed)

    def collate(documents: np.ndarray, epoch: int, step: int = 0) -> Batch:
        batch = collaborative_batch(users, histories, documents, layout, method, seed, epoch)
        return batch if negatives is None else batch | negatives.draw(epoch, step)

    def regularised(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(users[documents]), np.unique(histories.take(documents).values)

    return Objective(
        name="collaborative",
        lengths=np.minimum(histories.lengths, method.max_history),
        collate=collate,
        regularised=regularised if regularise and method.lambda_v > 0 else None,
    )
