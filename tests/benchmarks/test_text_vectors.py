"""Sentence vectors: of each item the mean over its texts, in a space where what all share says nothing."""

from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import text_vectors
from benchmarks.text_vectors import averaged, sentence_vectors
from training.data.ragged import Ragged


def test_an_item_has_the_mean_of_its_texts_and_one_without_is_zero():
    states = np.array([[1.0, 5.0], [3.0, 5.0], [6.0, 1.0], [np.nan, np.nan]])
    found = averaged(states, np.array([0, 0, 2, 1]), 4)
    np.testing.assert_allclose(found, np.array([[-1, 1], [0, 0], [1, -1], [0, 0]]) / np.sqrt(2), atol=1e-6)


def test_texts_about_items_are_read_without_their_prompt(monkeypatch, tmp_path):
    documents = Ragged.from_lists([[1, 2, 30, 31], [1, 40], [9, 9, 9, 50, 51]], np.int32)
    texts = SimpleNamespace(documents=documents, prompt_length=np.array([2, 1, 3]), item=np.array([0, -1, 2]))
    tokenizer = SimpleNamespace(batch_decode=lambda rows, skip_special_tokens: [row.tolist() for row in rows])
    corpora = SimpleNamespace(texts=lambda kind: texts, tokenizer=tokenizer, num_items=3)
    read = []

    class Model:
        @classmethod
        def from_backbone(cls, name, **fields):
            assert (name, fields["backbone_layers"]) == (str(tmp_path), 8)
            return SimpleNamespace(model="the base model")

    def pooled(model, rows):
        assert model == "the base model"
        read.extend(rows)
        return torch.tensor([[1.0, 2.0], [3.0, 0.0]])

    def load(kind, recipe):
        return lambda given, add_special_tokens: {"input_ids": given}

    monkeypatch.setattr(text_vectors, "CLLM4RecForRecommendation", Model)
    monkeypatch.setattr(text_vectors, "pooled_states", pooled)
    monkeypatch.setattr(text_vectors, "load_from_backbone", load)
    vectors = sentence_vectors(corpora, str(tmp_path))
    assert read == [[30, 31], [50, 51]]
    np.testing.assert_allclose(vectors, np.array([[-1, 1], [0, 0], [1, -1]]) / np.sqrt(2), atol=1e-6)
