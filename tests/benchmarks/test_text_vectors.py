"""Sentence vectors: of each item, in a space where what all share says nothing."""

import numpy as np

from benchmarks.text_vectors import sentence_vectors


def test_vectors_are_centred_and_an_item_without_texts_is_zero():
    states = np.array([[2.0, 5.0], [np.nan, np.nan], [6.0, 1.0]], np.float32)
    found = sentence_vectors(states)
    np.testing.assert_allclose(found, np.array([[-1, 1], [0, 0], [1, -1]]) / np.sqrt(2), atol=1e-6)
