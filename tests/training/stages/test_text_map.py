import copy
import logging

import numpy as np
import pytest
import torch
from grouped import GROUP_OF_ITEM, ITEMS, USERS, corpora_of, model_of_groups, sentence
from scipy.sparse import csr_matrix

from training.stages import terms, text_map
from training.stages.text_map import Ridge, fit_text_map, some
from training.stages.text_states import TextStates, owners_mean


@pytest.fixture
def model():
    return model_of_groups()


@pytest.mark.parametrize("kinds", [("user", "item"), ("user",), ("item",)])
def test_sentences_lead_to_the_items_of_their_group_and_new_items_to_their_users(model, kinds, caplog):
    caplog.set_level(logging.INFO)
    fitted = fit_text_map(model, corpora_of(kinds), seed=0)
    assert model.config.num_text_terms == fitted.terms == len(model.model.text_map.terms)
    assert fitted.user_ndcg_at_100 > 0.6
    assert f"text map: terms {fitted.terms}" in caplog.text
    best = model.recommend(texts=[sentence(1, 2, 3), sentence(21, 22, 23)], k=5).items
    assert (GROUP_OF_ITEM[best] == [[0], [1]]).mean() >= 0.9
    new = model.add_items([sentence(4, 5, 6), sentence(24, 25, 26)])
    sides = model.model.item_embeddings.weight[list(new), 0]
    assert sides[0] < 0 < sides[1]
    assert fitted.weight_beside_history in text_map.WEIGHTS or "user" not in kinds


def test_without_texts_there_is_no_map(model):
    assert fit_text_map(model, corpora_of(()), seed=0) is None
    assert model.model.text_map is None
    assert model.config.num_text_terms == 0


def test_words_of_a_single_document_do_not_count(model, monkeypatch):
    monkeypatch.setattr(terms, "LEAST_DOCUMENTS", 10_000)
    assert fit_text_map(model, corpora_of(), seed=0) is None


def test_biases_are_not_counted_twice(model):
    without = copy.deepcopy(model)
    with torch.no_grad():
        model.model.item_bias[:] = 0.5 * model.model.item_embeddings.weight[:, 0]
    for made in (model, without):
        fit_text_map(made, corpora_of(), seed=0)
    scores = [made.item_logits(made.query_states(texts=[sentence(1, 2, 3)])) for made in (model, without)]
    torch.testing.assert_close(*scores, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("ridge", [0.5, 3.0])
def test_left_out_predictions_are_those_of_the_others(ridge):
    generator = np.random.default_rng(0)
    inputs = csr_matrix(generator.random((12, 5)) * (generator.random((12, 5)) < 0.6))
    outputs = generator.normal(size=(12, 3))
    fitted = Ridge.fit(inputs, outputs, ridge)
    centred, dense = outputs - outputs.mean(0), inputs.toarray()
    for row in (0, 7):
        others = np.arange(12) != row
        x, y = dense[others], centred[others]
        coefficients = np.linalg.solve(x.T @ x + ridge * np.eye(5), x.T @ y)
        np.testing.assert_allclose(fitted.left_out[row], dense[row] @ coefficients + outputs.mean(0), atol=1e-5)
    whole = np.linalg.solve(dense.T @ dense + ridge * np.eye(5), dense.T @ centred)
    np.testing.assert_allclose(fitted.coefficients, whole, atol=1e-5)


@pytest.mark.parametrize("kinds", [("user", "item"), ("user",), ("item",)])
def test_states_tell_what_words_that_nobody_used_are_like(kinds, monkeypatch):
    monkeypatch.setattr(text_map, "STATE_WEIGHTS", (1.0,))  # words would do for those who are known
    best = {}
    for reads in (False, True):
        made, corpora = model_of_groups(), corpora_of(kinds)
        states = group_states(corpora) if reads else None
        fitted = fit_text_map(made, corpora, seed=0, text_states=states)
        assert bool(made.config.text_state_width) == reads == bool(fitted.user_state_weight or fitted.item_state_weight)
        items = made.recommend(texts=[sentence(15, 16, 17), sentence(35, 36, 37)], k=5).items
        new = made.add_items([sentence(15, 16, 17), sentence(35, 36, 37)])
        sides = made.model.item_embeddings.weight[list(new), 0]
        best[reads] = (GROUP_OF_ITEM[items] == [[0], [1]]).mean(), bool(sides[0] < 0 < sides[1])
    assert best[False][0] < 0.8
    assert not best[False][1]
    assert best[True][0] >= 0.9
    assert best[True][1]


class GroupEncoder:
    """It knows that words of a group are alike."""

    width = 2
    model = torch.nn.Linear(1, 1)

    def __call__(self, texts):
        shares = [sum(int(word[1:]) < 20 for word in text.split()) / len(text.split()) for text in texts]
        return torch.tensor([[share, 1 - share] for share in shares])


def group_states(corpora):
    texts, encoder = corpora.texts("content"), GroupEncoder()
    read = encoder(corpora.tokenizer.batch_decode([document[1:] for document in texts.documents])).numpy()
    return TextStates(encoder, owners_mean(read, texts.user, USERS), owners_mean(read, texts.item, ITEMS))


@pytest.mark.parametrize("kind", ["user", "item"])
def test_who_has_no_text_is_no_part_of_a_mean(kind):
    states, nothing = np.array([[1, 0], [0, 1], [np.nan, np.nan]], np.float32), np.full((3, 2), np.nan, np.float32)
    pairs = csr_matrix(np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1]], np.float32))
    spoken = {"user": (states, nothing, pairs.T), "item": (nothing, states, pairs)}[kind]
    read = text_map.owners_states(TextStates(None, *spoken[:2]), csr_matrix(spoken[2]), text_map.TextMap(1, 2, 2))
    others = read[kind == "user"]
    np.testing.assert_array_equal(others[1], others[0])
    assert not others[2].any()


def test_what_is_usual_of_states_stays_fine_in_a_model_of_half_precision():
    corpora = corpora_of()
    fine, half = model_of_groups(), model_of_groups().to(torch.bfloat16)
    for made in (fine, half):
        fit_text_map(made, corpora, seed=0, text_states=group_states(corpora))
    assert half.model.text_map.to_state.weight.dtype == torch.bfloat16
    assert half.model.text_map.state_mean.dtype == torch.float32
    assert torch.equal(half.model.text_map.state_mean, fine.model.text_map.state_mean)
    assert torch.equal(half.model.text_map.state_spread, fine.model.text_map.state_spread)


def test_states_are_further_inputs_of_the_ridge():
    generator = np.random.default_rng(0)
    inputs, states = csr_matrix(generator.random((12, 5))), generator.random((12, 3)).astype(np.float32)
    outputs = generator.normal(size=(12, 2))
    fitted = Ridge.fit(inputs, outputs, 0.5, states, 0.25)
    together = Ridge.fit(csr_matrix(np.concatenate([inputs.toarray(), 0.5 * states], 1)), outputs, 0.5)
    np.testing.assert_allclose(fitted.left_out, together.left_out, atol=1e-5)
    np.testing.assert_allclose(fitted.coefficients[:5], together.coefficients[:5], atol=1e-5)
    np.testing.assert_allclose(fitted.coefficients[5:], 0.5 * together.coefficients[5:], atol=1e-5)


def nearness_alone(monkeypatch):
    """Regressions that say nothing, so that what is left is how near texts are to texts."""
    monkeypatch.setattr(text_map, "RIDGES", (1e6,))


@pytest.mark.parametrize("kinds", [("user", "item"), ("item",)])
def test_words_that_are_near_those_about_items_need_nobodys_history(kinds, monkeypatch):
    nearness_alone(monkeypatch)
    best = {}
    for weights in ((0.0,), text_map.TOPIC_WEIGHTS):
        monkeypatch.setattr(text_map, "TOPIC_WEIGHTS", weights)
        made = model_of_groups()
        fitted = fit_text_map(made, corpora_of(kinds), seed=0)
        assert fitted.user_topic_weight in weights
        # What spreads by a millionth is brought to the spread of the regression: the scale is lost, the order is not.
        scores = made.item_logits(made.query_states(texts=[sentence(1, 2, 3), sentence(21, 22, 23)]))
        best[weights] = (GROUP_OF_ITEM[scores.topk(5).indices] == [[0], [1]]).mean()
    assert fitted.user_topic_weight > 0
    assert best[text_map.TOPIC_WEIGHTS] >= 0.8 > best[(0.0,)]


@pytest.mark.parametrize("kinds", [("user", "item"), ("item",)])
def test_texts_that_are_read_alike_are_near_whatever_their_words(kinds, monkeypatch):
    nearness_alone(monkeypatch)
    monkeypatch.setattr(text_map, "STATE_WEIGHTS", (0.0,))
    monkeypatch.setattr(text_map, "TOPIC_WEIGHTS", (1.0,))
    right = {}
    for reads in (False, True):
        made, corpora = model_of_groups(), corpora_of(kinds)
        fit_text_map(made, corpora, seed=0, text_states=group_states(corpora) if reads else None)
        items = made.recommend(texts=[sentence(15, 16, 17), sentence(35, 36, 37)], k=5).items
        right[reads] = (GROUP_OF_ITEM[items] == [[0], [1]]).mean()
    assert right[False] < 0.8
    assert right[True] >= 0.9


def with_nearness(weight, validation=None, states=False):
    """A regression of three rows on four terms, and nearness that says the opposite; where it reads states, of them, too."""
    terms = csr_matrix(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.6, 0.8, 0]], np.float32))
    read = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32) if states else None
    outputs = np.array([[1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]])
    ridge = Ridge.fit(terms, outputs, 0.5, read, 0.25)
    added = [(terms, np.array([[-3.0, 3.0, 3.0, 0.0], [3.0, -3.0, -3.0, 0.0]], np.float32))]
    if read is not None:
        added.append((read, np.array([[-7.0, 5.0], [7.0, -5.0]], np.float32)))
    train = csr_matrix((3, 2), dtype=np.float32)
    validation = train if validation is None else csr_matrix(np.array(validation, np.float32))
    head = np.eye(2, dtype=np.float32)
    made, weight = text_map.with_nearness(ridge, added, head, (train, validation), np.arange(3), weight)
    return ridge, added, made, weight


@pytest.mark.parametrize("states", [False, True])
def test_nearness_spreads_as_widely_as_the_regression_times_its_weight(states):
    ridge, added, made, _ = with_nearness(0.5, states=states)
    parts = [inputs @ to_state.T for inputs, to_state in added]
    more = sum(ridge.left_out.std() / part.std() * part for part in parts)
    np.testing.assert_allclose(made.left_out - ridge.left_out, 0.5 * more, rtol=1e-4)
    # What the coefficients say of the rows themselves is the regression and the nearness.
    inputs = np.concatenate([csr_matrix(inputs).toarray() for inputs, _ in added], 1)
    difference = inputs @ (made.coefficients - ridge.coefficients)
    np.testing.assert_allclose(difference, made.left_out - ridge.left_out, rtol=1e-4, atol=1e-6)
    assert len(made.coefficients) == inputs.shape[1]


def test_the_weight_of_nearness_is_what_validation_likes():
    as_the_regression, as_the_nearness = [[1, 0], [0, 1], [0, 1]], [[0, 1], [1, 0], [1, 0]]
    assert with_nearness(None, as_the_regression)[-1] == 0.0
    assert with_nearness(None, as_the_nearness)[-1] > 1.0
    assert with_nearness(None)[-1] == 0.0


def test_what_was_chosen_before_is_not_chosen_again(model, monkeypatch):
    monkeypatch.setattr(text_map, "best_weight", None)
    chosen = {"user_topic_weight": 0.3, "weight_beside_history": 0.9}
    fitted = fit_text_map(model, corpora_of(), seed=0, chosen=chosen)
    assert {name: getattr(fitted, name) for name in text_map.CHOSEN} == chosen
    assert model.model.text_map.weight_beside_history.item() == pytest.approx(0.9)


def test_of_too_many_rows_some_are_taken_in_order():
    taken = some(np.arange(100) % 2 == 0, 10, np.random.default_rng(0))
    assert len(taken) == 10
    assert (taken % 2 == 0).all()
    assert (np.diff(taken) > 0).all()
    assert some(np.arange(4) > 1, 10, np.random.default_rng(0)).tolist() == [2, 3]
