"""Sentence vectors of items: what a text encoder says of their texts, averaged over words and texts."""

import numpy as np

from training.stages.topics import unit


def sentence_vectors(states: np.ndarray) -> np.ndarray:
    """`(num_items, width)` float32 of length 1, centred and scaled over the items; zeros where an item has no text.

    Args:
        states: Of the items' texts, `(num_items, width)`, NaN where there is none.
    """
    known = ~np.isnan(states[:, 0])
    found, means = np.zeros_like(states), states[known]
    found[known] = (means - means.mean(0)) / np.maximum(means.std(0), 1e-6)
    return unit(found)
