"""What user and item tokens tell the content language model: perplexity of reviews that training never saw."""

import math
from typing import Any

import numpy as np
import torch

from modeling_cllm4rec import CLLM4RecForContentLM
from training.data.batches import Layout, content_batch, on_device
from training.data.corpora import Texts
from training.data.ragged import Ragged

DOCUMENTS_PER_BATCH = 64


def review_perplexity(model: CLLM4RecForContentLM, reviews: Texts, layout: Layout, seed: int) -> dict[str, Any] | None:
    """Perplexity per word of held-out reviews under three prompts.

    Args:
        model: The content language model.
        reviews: Documents of pairs that training never saw.
        layout: Where users and items stand among the ids.
        seed: For the permutation.

    Returns:
        `with_ids`: the true user and item; `with_others`: those of another review, drawn at random; `without_ids`: the prompt's
        words alone; and the number of `reviews` and `tokens`. None where there are no reviews.
    """
    if not len(reviews):
        return None
    true = reviews.documents
    names = true.values >= layout.num_words
    others = np.random.default_rng(seed).permutation(len(reviews))
    swapped = true.values.copy()
    users = names & (true.values < layout.first_item)
    items = true.values >= layout.first_item
    row = np.repeat(np.arange(len(reviews)), true.lengths)
    swapped[users] = layout.num_words + reviews.user[others][row[users]]
    swapped[items] = layout.first_item + reviews.item[others][row[items]]
    kept = np.concatenate([[0], np.cumsum(~names)])
    removed = np.bincount(row[names], minlength=len(reviews))
    variants = {
        "with_ids": (true, reviews.prompt_length),
        "with_others": (Ragged(swapped, true.offsets), reviews.prompt_length),
        "without_ids": (Ragged(true.values[~names], kept[true.offsets]), reviews.prompt_length - removed),
    }
    result: dict[str, Any] = {"reviews": len(reviews)}
    for name, (documents, prompt_length) in variants.items():
        texts = Texts(documents, reviews.kind, reviews.user, reviews.item, prompt_length)
        total, tokens = negative_log_likelihood(model, texts)
        result[name] = math.exp(total / tokens)
        result["tokens"] = tokens
    return result


@torch.no_grad()
def negative_log_likelihood(model: CLLM4RecForContentLM, texts: Texts) -> tuple[float, int]:
    """Sum over the main texts' tokens, and their number."""
    model.eval()
    total, tokens = 0.0, 0
    order = np.argsort(texts.documents.lengths, kind="stable")
    for start in range(0, len(order), DOCUMENTS_PER_BATCH):
        batch = on_device(content_batch(texts, order[start : start + DOCUMENTS_PER_BATCH]), model.device)
        total += model(**batch, num_items_in_batch=1, logits_to_keep=1).loss.item()
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return total, tokens
