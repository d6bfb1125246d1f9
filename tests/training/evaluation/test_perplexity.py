import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForContentLM
from training.data.batches import Layout
from training.data.corpora import Texts
from training.data.ragged import Ragged
from training.evaluation import perplexity
from training.evaluation.perplexity import review_perplexity

WORDS, USERS, ITEMS = 30, 4, 5
LAYOUT = Layout(WORDS, USERS, ITEMS, {})
# user and item of each review, and the words of its main text; the prompt is `user 7 8 item 9`
REVIEWS = [(0, 4, [11, 12, 13]), (3, 0, [14]), (1, 2, [15, 16]), (2, 1, [11, 17, 18, 19]), (0, 3, [20, 21])]


def make_model(**fields):
    torch.manual_seed(0)
    backbone = GPT2Config(
        vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    config = CLLM4RecConfig(backbone_config=backbone, num_users=USERS, num_items=ITEMS, initializer_range=0.5, **fields)
    return CLLM4RecForContentLM(config)


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompt(user, item):
    return [WORDS + user, 7, 8, WORDS + USERS + item, 9]


def texts(reviews=REVIEWS):
    columns = {name: np.array([row[place] for row in reviews]) for place, name in enumerate(("user", "item"))}
    documents = Ragged.from_lists([prompt(user, item) + words for user, item, words in reviews], np.int32)
    return Texts(documents, kind=np.zeros(len(reviews), int), prompt_length=np.full(len(reviews), 5), **columns)


def by_hand(model, prompts, reviews=REVIEWS):
    """exp of the mean over all words of -log p(word | everything before it), one document at a time."""
    model.eval()
    losses = []
    for start, (_, _, words) in zip(prompts, reviews, strict=True):
        ids = torch.tensor([start + words])
        with torch.no_grad():
            likelihood = model(ids).logits.log_softmax(-1)[0]
        losses += [-likelihood[len(start) + place - 1, word].item() for place, word in enumerate(words)]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_with_the_true_user_and_item(model):
    measured = review_perplexity(model, texts(), LAYOUT, seed=3)
    expected = by_hand(model, [prompt(user, item) for user, item, _ in REVIEWS])
    assert measured["with_ids"] == pytest.approx(expected, rel=1e-5)
    assert (measured["reviews"], measured["tokens"]) == (5, 12)


def test_perplexity_with_the_user_and_item_of_another_review(model):
    others = np.random.default_rng(3).permutation(len(REVIEWS))
    assert (others != np.arange(len(REVIEWS))).any()
    expected = by_hand(model, [prompt(*REVIEWS[other][:2]) for other in others])
    assert review_perplexity(model, texts(), LAYOUT, seed=3)["with_others"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_without_user_and_item(model):
    expected = by_hand(model, [[7, 8, 9]] * len(REVIEWS))
    assert review_perplexity(model, texts(), LAYOUT, seed=3)["without_ids"] == pytest.approx(expected, rel=1e-5)


def test_the_size_of_the_batches_changes_no_number(model, monkeypatch):
    whole = review_perplexity(model, texts(), LAYOUT, seed=3)
    monkeypatch.setattr(perplexity, "DOCUMENTS_PER_BATCH", 2)
    assert review_perplexity(model, texts(), LAYOUT, seed=3) == pytest.approx(whole, rel=1e-6)


def test_dropout_is_off_while_it_is_measured(model):
    model.train()
    measured = review_perplexity(model, texts(), LAYOUT, seed=3)
    assert measured == review_perplexity(model.eval(), texts(), LAYOUT, seed=3)


def test_a_model_that_knows_who_writes_what_is_worse_off_with_others():
    """A user whose token says which word comes: the true one makes it likely, another one and none do not."""
    knowing = make_model(freeze_backbone=False)
    reviews = [(user, item, [10 + user] * 3) for user in range(USERS) for item in range(ITEMS)]
    optimizer = torch.optim.Adam(knowing.model.parameters(), lr=0.02)
    batch = torch.tensor([prompt(user, item) + words for user, item, words in reviews])
    labels = batch.clone()
    labels[:, :5] = -100
    for _ in range(60):
        knowing.train()(batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = review_perplexity(knowing, texts(reviews), LAYOUT, seed=0)
    assert measured["with_ids"] < 1.5
    assert measured["with_ids"] * 1.5 < min(measured["with_others"], measured["without_ids"])


def test_nothing_is_measured_where_there_are_no_reviews(model):
    assert review_perplexity(model, texts([]), LAYOUT, seed=3) is None
