"""The store's run, opened."""

import pytest
from transformers import AutoModelForSequenceClassification

from training.data.corpora import open_corpora


@pytest.fixture(scope="module")
def store(store_run):
    """Its corpora; to be read only."""
    return open_corpora(store_run.run.corpora)


@pytest.fixture(scope="module")
def model(store_run):
    """Its model."""
    return AutoModelForSequenceClassification.from_pretrained(store_run.folder / "model", trust_remote_code=True)
