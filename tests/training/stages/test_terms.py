from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from modeling_cllm4rec.text_cllm4rec import number_of
from training.data.corpora import ITEM_TEXT, REVIEW, USER_TEXT, Texts
from training.data.ragged import Ragged
from training.stages import terms
from training.stages.terms import term_counts, tf_idf

WORDS = ["prompt", "music", "library", "musical", "rare"]


@pytest.fixture
def corpora():
    """Two texts of user 0, one of user 2 about item 1, one of item 0; the first word of each is the prompt."""
    documents = [[0, 1, 2], [0, 1], [0, 3, 2, 3], [0, 1, 4]]
    texts = Texts(
        Ragged.from_lists(documents, np.int32),
        np.array([USER_TEXT, USER_TEXT, REVIEW, ITEM_TEXT]),
        np.array([0, 0, 2, -1]),
        np.array([-1, -1, 1, 0]),
        np.ones(4, np.int32),
    )

    def batch_decode(rows, skip_special_tokens):
        return [" ".join(WORDS[word] for word in row) for row in rows]

    return SimpleNamespace(
        num_users=3, num_items=2, texts=lambda _: texts, tokenizer=SimpleNamespace(batch_decode=batch_decode)
    )


def test_terms_of_prompts_and_of_single_documents_do_not_count(corpora):
    numbers = term_counts(corpora).numbers
    # "music*" is what "music" and "musical" share; "music library" and "rare" stand in one document alone.
    assert set(numbers) == {number_of(term) for term in ("music", "music*", "library", "libra*")}
    assert (np.diff(numbers) > 0).all()


def test_terms_are_counted_for_whom_they_are_about(corpora):
    counts = term_counts(corpora)
    columns = [counts.numbers.tolist().index(number_of(term)) for term in ("music", "music*", "library")]
    assert counts.user[:, columns].toarray().tolist() == [[2, 2, 1], [0, 0, 0], [0, 2, 1]]
    assert counts.item[:, columns].toarray().tolist() == [[1, 1, 0], [0, 2, 1]]


def test_the_most_frequent_terms_are_kept(corpora, monkeypatch):
    monkeypatch.setattr(terms, "MOST_TERMS", 1)
    assert term_counts(corpora).numbers.tolist() == [number_of("music*")]


def test_without_texts_there_are_no_terms(corpora):
    corpora.texts = lambda _: Texts(Ragged.from_lists([]), *(np.empty(0, np.int64) for _ in range(4)))
    counts = term_counts(corpora)
    assert (len(counts.numbers), counts.user.nnz, counts.item.nnz) == (0, 0, 0)


def test_a_given_rarity_weights_other_texts():
    counts = csr_matrix(np.float32([[1, 1, 0]]))
    vectors, rarity = tf_idf(counts, np.float32([3, 4, 5]))
    np.testing.assert_allclose(vectors.toarray(), [[0.6, 0.8, 0]], rtol=1e-6)
    assert rarity.tolist() == [3, 4, 5]
