"""What texts are about: the leading singular vectors of their TF-IDF (Deerwester et al., Indexing by latent semantic analysis, 1990)."""

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, identity

SUBSPACE_ITERATIONS = 6


def topics_of(vectors: csr_matrix, number: int) -> np.ndarray:
    """The topics of texts, `(≤ number, terms)` float32, orthonormal, the strongest first.

    Args:
        vectors: TF-IDF of the texts, `(texts, terms)`.
        number: How many topics.
    """
    return np.asarray(leading([(vectors, identity(vectors.shape[1], np.float32, "csr"))], number)[2], np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-6), np.float32)


def leading(products: list[tuple[Any, Any]], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors of a sum of matrix products, by subspace iteration, so that the sum is never made.

    Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 2011.

    Args:
        products: Pairs of `(rows, k)` and `(k, columns)`, dense or sparse, k of each pair its own.
        width: How many.

    Returns:
        `(rows, ≤ width)`, `(≤ width,)` descending and `(≤ width, columns)`.
    """
    rows, columns = products[0][0].shape[0], products[0][1].shape[1]
    kept = min(width, rows, columns)
    start = np.random.default_rng(0).normal(size=(columns, min(kept + kept // 2 + 16, rows, columns)))
    basis = np.linalg.qr(sum(left @ (right @ start.astype(np.float32)) for left, right in products))[0]
    for _ in range(SUBSPACE_ITERATIONS):
        others = np.linalg.qr(sum(right.T @ (left.T @ basis) for left, right in products))[0]
        basis = np.linalg.qr(sum(left @ (right @ others) for left, right in products))[0]
    small = sum(right.T @ (left.T @ basis) for left, right in products).T
    left, values, right = np.linalg.svd(small, full_matrices=False)
    return basis @ left[:, :kept], values[:kept], right[:kept]
