"""The terms of what training may read about users and items, counted and weighted: for the teacher and for the text map."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, diags

from modeling_cllm4rec.text_cllm4rec import terms_of, words_of
from training.data.corpora import Corpora

LEAST_DOCUMENTS, MOST_TERMS = 2, 20_000
# What texts say goes through square matrices over users or items: more rows (0.4 GB) are too many.
MOST_ROWS = 10_000


@dataclass(frozen=True, eq=False)
class TermCounts:
    """How often each term stands in what training may read: documents of the content corpus, which holds no held-out review.

    Attributes:
        user: `(num_users, terms)` float32, in texts about or by a user.
        item: `(num_items, terms)` float32, in texts about an item.
        numbers: `(terms,)` int64, ascending, the numbers of [`terms_of`].
    """

    user: csr_matrix
    item: csr_matrix
    numbers: np.ndarray


def term_counts(corpora: Corpora) -> TermCounts:
    """Count the most frequent of the terms that more than one document has."""
    texts = corpora.texts("content")
    main = [document[start:] for document, start in zip(texts.documents, texts.prompt_length, strict=True)]
    numbers = [
        [number for number, _ in terms_of(words_of(text))]
        for text in (corpora.tokenizer.batch_decode(main, skip_special_tokens=True) if main else [])
    ]
    in_document = np.repeat(np.arange(len(numbers)), [len(row) for row in numbers])
    terms, places = np.unique(np.array([number for row in numbers for number in row], np.int64), return_inverse=True)
    documents = np.bincount(np.unique(np.stack([places, in_document]), axis=1)[0], minlength=len(terms))
    kept = np.argsort(-documents, kind="stable")[:MOST_TERMS]
    kept = np.sort(kept[documents[kept] >= LEAST_DOCUMENTS])

    def of(owners: np.ndarray, rows: int) -> csr_matrix:
        owner = owners[in_document]
        owned = owner >= 0
        counts = csr_matrix(
            (np.ones(int(owned.sum()), np.float32), (owner[owned], places[owned])), shape=(rows, max(len(terms), 1))
        )
        counts.sum_duplicates()
        return csr_matrix(counts[:, kept])

    return TermCounts(of(texts.user, corpora.num_users), of(texts.item, corpora.num_items), terms[kept])


def tf_idf(counts: csr_matrix, rarity: np.ndarray | None = None) -> tuple[csr_matrix, np.ndarray]:
    """TF-IDF vectors of length 1, and the rarity of each word.

    Args:
        counts: `(rows, words)` float32.
        rarity: `(words,)` float32; that of these rows by default.
    """
    rows, num_words = counts.shape
    counts = counts.copy()
    counts.data = np.log1p(counts.data)
    if rarity is None:
        rarity = np.log((rows + 1) / (np.bincount(counts.indices, minlength=num_words) + 1)).astype(np.float32)
    weighted = counts @ diags(rarity)
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    return csr_matrix(diags((1 / np.maximum(norms, 1e-12)).astype(np.float32)) @ weighted), rarity
