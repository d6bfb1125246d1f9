"""Corpora of the public sets, where they are at hand; each claim has a twin on made-up data that always runs."""

from dataclasses import replace

import numpy as np
import pytest

from configuration.load import load_recipe
from training.data.corpora import REVIEW, build_corpora
from training.data.interactions import TRAIN, build_interactions
from training.data.readers import read_tables

pytestmark = pytest.mark.slow

FILES = {
    "ml-100k": "ml-100k",
    "digital-music": "digital-music/reviews.jsonl.gz",
    "amazon-beauty": "amazon-beauty/Beauty.txt",
}


@pytest.fixture
def build(real_data, tmp_path):
    """Interactions and corpora of a set with its published split."""

    def build(name):
        words = [f"data.path={real_data / FILES[name]}", f"data.split_path={real_data / name / 'split.tsv.gz'}"]
        recipe = load_recipe(name, overrides=[*words, "data.split=given"])
        interactions = build_interactions(read_tables(recipe.data), recipe.data, recipe.seed)
        return recipe, interactions, build_corpora(interactions, recipe, tmp_path / "corpora", progress=False)

    return build


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "test", "reviews"),
    [
        ("ml-100k", 938, 1447, 55_361, 5_585, 0),
        ("digital-music", 650, 335, 3_834, 707, 2_420),
        ("amazon-beauty", 22_363, 12_101, 198_502, 26_314, 0),
    ],
)
def test_corpora_have_the_published_counts(build, name, users, items, interactions, test, reviews):
    _, _, corpora = build(name)
    counts = corpora.info["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (users, items, interactions)
    assert (counts["test"], counts["reviews"]) == (test, reviews)
    sizes = {split: len(corpora.histories(split)[1].values) for split in ("recommendation", "validation", "test")}
    assert sizes == {"recommendation": counts["train"], "validation": counts["validation"], "test": test}
    assert sum(sizes.values()) == interactions


def test_no_review_of_a_held_out_pair_is_in_the_content_corpus_of_digital_music(build):
    _, interactions, corpora = build("digital-music")
    texts, held_out = corpora.texts("content"), corpora.texts("held_out_reviews")
    of_training = {
        (user, item)
        for user, item, split in zip(interactions.users, interactions.items, interactions.splits, strict=True)
        if split == TRAIN
    }
    reviews = np.flatnonzero(texts.kind == REVIEW)
    assert {(texts.user[row], texts.item[row]) for row in reviews} <= of_training
    assert not {(user, item) for user, item in zip(held_out.user, held_out.item, strict=True)} & of_training

    def main_texts(of):
        return {tuple(row[start:]) for row, start in zip(of.documents, of.prompt_length, strict=True)}

    # A few people wrote one text about two albums: what both splits hold is no leak.
    written = {interactions.reviews[row] for row in np.flatnonzero(interactions.splits == TRAIN)}
    twice = {
        row
        for row in np.flatnonzero(interactions.splits != TRAIN)
        if interactions.reviews[row] and interactions.reviews[row] in written
    }
    assert len(main_texts(held_out)) > 600
    assert len(main_texts(held_out) & main_texts(texts)) <= len(twice)


def test_the_vocabulary_of_digital_music_does_not_depend_on_held_out_reviews(build, tmp_path):
    recipe, interactions, corpora = build("digital-music")
    silent = [
        review if split == TRAIN else None
        for review, split in zip(interactions.reviews, interactions.splits, strict=True)
    ]
    without = build_corpora(replace(interactions, reviews=silent), recipe, tmp_path / "without", progress=False)
    assert corpora.tokenizer.get_vocab() == without.tokenizer.get_vocab()
    assert corpora.texts().documents.values.tolist() == without.texts().documents.values.tolist()
