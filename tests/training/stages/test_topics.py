import numpy as np
import pytest
from scipy.sparse import csr_matrix

from training.stages.topics import leading, topics_of, unit


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [1, 4, 99])
def test_leading_vectors_are_those_of_the_sum_of_products(width):
    sparse = csr_matrix(numbers(12, 6, seed=2) * (numbers(12, 6, seed=3) > 0))
    products = [(numbers(20, 3), numbers(3, 6, seed=1)), (numbers(20, 12, seed=4), sparse)]
    left, values, right = leading(products, width)
    whole = products[0][0] @ products[0][1] + products[1][0] @ sparse.toarray()
    kept = min(width, 6)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    assert (left.shape, values.shape, right.shape) == ((20, kept), (kept,), (kept, 6))
    np.testing.assert_allclose(values, s[:kept], rtol=1e-4)
    np.testing.assert_allclose(left * values @ right, u[:, :kept] * s[:kept] @ v[:kept], atol=1e-3)


def test_topics_are_orthonormal_directions_of_the_terms_that_go_together():
    texts = csr_matrix(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0], [0, 0, 1, 1]], np.float32))
    topics = topics_of(texts, 2)
    np.testing.assert_allclose(topics @ topics.T, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(np.abs(topics), np.sqrt(0.5) * np.array([[1, 1, 0, 0], [0, 0, 1, 1]]), atol=1e-5)
    assert topics.dtype == np.float32


def test_rows_get_length_one_and_zeros_stay():
    found = unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert found.dtype == np.float32
