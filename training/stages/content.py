"""Stage one's first half: the content language model learns text about users and items (paper sec. 3.3.3)."""

import numpy as np

from configuration.recipe import Method
from training.data.batches import Batch, content_batch
from training.data.corpora import Corpora
from training.stages.loop import Objective


def content_objective(corpora: Corpora, method: Method) -> Objective:
    """Documents of the content corpus, pulled to the collaborative embeddings of their users and items."""
    texts = corpora.texts("content")

    def collate(documents: np.ndarray, epoch: int, step: int = 0) -> Batch:
        return content_batch(texts, documents)

    def regularised(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        users, items = texts.user[documents], texts.item[documents]
        return np.unique(users[users >= 0]), np.unique(items[items >= 0])

    return Objective(
        name="content",
        lengths=texts.documents.lengths,
        collate=collate,
        regularised=regularised if method.lambda_v > 0 else None,
    )
