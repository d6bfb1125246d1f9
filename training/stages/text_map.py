"""The text map, fitted in closed form when training has ended: ridge regression from TF-IDF to what the trained model knows.

Not in the paper. A person's words lead to the state whose item scores come nearest to the person's history; an item's words lead to
its embedding and bias. That is chosen by leave-one-out predictions, which cost nothing beside the fit. To a person's words comes what
needs nobody's history: how near they are, by their topics and by what a text encoder makes of them, to what is written about each item.
What it weighs, and what a text weighs beside a history, is chosen on the validation split.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix, diags, vstack

from modeling_cllm4rec import CLLM4RecForRecommendation
from modeling_cllm4rec.text_cllm4rec import TextMap
from training.data.batches import layout_of
from training.data.corpora import Corpora
from training.evaluation.ranking import evaluate_scores
from training.evaluation.scoring import ModelScores, split_matrix
from training.stages.terms import MOST_ROWS, term_counts, tf_idf
from training.stages.text_states import TextStates, rows_mean
from training.stages.topics import topics_of, unit

logger = logging.getLogger(__name__)

RIDGES = (0.3, 1.0, 3.0, 10.0)
STATE_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
SCALES = (2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
NUM_TOPICS, TOPIC_WEIGHTS = 128, (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
# Where people have no texts of their own there is nothing to choose the weight by.
USUAL_WEIGHT = 0.5
COMPARED_USERS = 2_000
SCORES_AT_A_TIME = 2**25


# What validation chooses, of [`FittedTextMap`].
CHOSEN = ("user_topic_weight", "weight_beside_history")


@dataclass(frozen=True)
class FittedTextMap:
    """How a text map was chosen; NDCG@100 of leave-one-out predictions of the training histories, and on validation.

    Attributes:
        user_topic_weight: What nearness of a person's words to those about the items weighs beside the ridge regression.
        said: What the text of each known user adds to a state, by what others with such texts like, so that one's own history does not
            speak twice; `(num_users, width)` float32, or None where users have no texts.
    """

    terms: int
    user_ridge: float
    user_state_weight: float
    user_ndcg_at_100: float
    item_ridge: float
    item_state_weight: float
    item_ndcg_at_100: float
    user_topic_weight: float
    scale: float
    weight_beside_history: float
    validation_ndcg_at_100: float
    said: np.ndarray | None


@dataclass(frozen=True)
class Ridge:
    """A ridge regression `y ≈ x · coefficients + mean`.

    Attributes:
        ridge: The penalty.
        state_weight: What states weigh beside terms.
        coefficients: `(terms and states, outputs)` float32.
        mean: `(outputs,)` float32.
        left_out: Of each row its prediction by the others, `(rows, outputs)` float32.
    """

    ridge: float
    state_weight: float
    coefficients: np.ndarray
    mean: np.ndarray
    left_out: np.ndarray

    @classmethod
    def fit(
        cls,
        inputs: csr_matrix,
        outputs: np.ndarray,
        ridge: float,
        states: np.ndarray | None = None,
        state_weight: float = 0.0,
    ) -> "Ridge":
        """Kernel ridge regression on rows whose outputs have their mean taken away.

        Args:
            inputs: `(rows, terms)`.
            outputs: `(rows, outputs)`.
            ridge: The penalty.
            states: Further inputs `(rows, width)`, or None.
            state_weight: What their inner products weigh beside those of the terms.
        """
        mean = outputs.mean(0)
        centred = (outputs - mean).astype(np.float64)
        kernel = (inputs @ inputs.T).toarray().astype(np.float64)
        if states is not None:
            kernel += state_weight * (states @ states.T)
        inverse = cho_solve(cho_factor(kernel + ridge * np.eye(len(kernel))), np.eye(len(kernel)))
        dual = inverse @ centred
        # y - ŷ of a row that is left out is its dual coefficient over the diagonal of the inverse.
        left_out = centred - dual / np.diag(inverse)[:, None] + mean
        coefficients = inputs.T @ dual
        if states is not None:
            coefficients = np.concatenate([coefficients, state_weight * (states.T @ dual)])
        return cls(
            ridge,
            state_weight,
            coefficients.astype(np.float32),
            mean.astype(np.float32),
            left_out.astype(np.float32),
        )


def fit_text_map(
    model: CLLM4RecForRecommendation,
    corpora: Corpora,
    seed: int,
    *,
    text_states: TextStates | None = None,
    chosen: Mapping[str, float] | None = None,
) -> FittedTextMap | None:
    """Give a trained model its text map; None, and no map, where there are no texts.

    Where only items (or only users) have texts, those of a user's items (an item's users) speak for the user (the item).

    Args:
        model: Changed in place.
        corpora: What it was trained on.
        seed: Of the rows and users that are looked at where there are too many.
        text_states: What a text encoder makes of the texts, to be read beside their terms; None: terms alone.
        chosen: Values of [`CHOSEN`], where these are not to be chosen on validation.
    """
    train = split_matrix(corpora, "recommendation")
    counts = term_counts(corpora)
    user_terms, item_terms, terms = counts.user, counts.item, counts.numbers
    if not len(terms):
        return None
    own_texts = user_terms.nnz > 0
    if not own_texts:
        user_terms = csr_matrix(train @ item_terms)
    elif not item_terms.nnz:
        item_terms = csr_matrix(train.T @ user_terms)
    rarity = tf_idf(csr_matrix(vstack([user_terms, item_terms])))[1]
    rng = np.random.default_rng(seed)

    head, bias = item_head(model)
    made = TextMap(len(terms), head.shape[1], 0 if text_states is None else text_states.width)
    user_states, item_states = (None, None) if text_states is None else owners_states(text_states, train, made)
    to_state = to_states(head)
    lengths = np.diff(train.indptr)
    users = some((lengths > 0) & (np.diff(user_terms.indptr) > 0), MOST_ROWS, rng)
    wanted = (diags(1 / np.sqrt(lengths[users])) @ train[users]) @ to_state.T
    spoken = tf_idf(user_terms[users], rarity)[0]
    of_users = best_ridge(
        spoken,
        wanted,
        lambda left_out: (left_out, head),
        train,
        users,
        None if user_states is None else user_states[users],
    )
    validation = split_matrix(corpora, "validation")
    near_items: list[tuple[csr_matrix | np.ndarray, np.ndarray]] = [
        (spoken, likeness(to_state, tf_idf(item_terms, rarity)[0]))
    ]
    if user_states is not None:
        near_items.append((user_states[users], to_state @ item_states))
    user_map, topic_weight = with_nearness(
        of_users[0], near_items, head, (train, validation), users,
        None if chosen is None else chosen["user_topic_weight"],
    )  # fmt: skip
    scale = best_scale(user_map.left_out @ head.T, bias - head @ (to_state @ bias), train[users])

    rows = some((np.diff(train.tocsc().indptr) > 0) & (np.diff(item_terms.indptr) > 0), MOST_ROWS, rng)
    scores = ModelScores(
        model, *corpora.histories("recommendation"), layout_of(corpora), model.config.max_history, user_tokens=False
    )
    compared = some(lengths > 0, COMPARED_USERS, rng)
    states = scores.states(compared).float().cpu().numpy()
    with_ones = np.concatenate([states, np.ones((len(states), 1), np.float32)], 1)
    of_items = best_ridge(
        tf_idf(item_terms[rows], rarity)[0],
        np.concatenate([head, bias[:, None]], 1)[rows],
        lambda left_out: (with_ones, left_out),
        train[:, rows],
        compared,
        None if item_states is None else item_states[rows],
    )

    made.terms.copy_(torch.from_numpy(terms))
    made.rarity.copy_(torch.from_numpy(rarity))
    item_map = of_items[0]
    made.to_state.weight.copy_(torch.from_numpy(scale * user_map.coefficients.T))
    made.to_state.bias.copy_(torch.from_numpy(scale * user_map.mean - (to_state @ bias).astype(np.float32)))
    made.to_item.weight.copy_(torch.from_numpy(item_map.coefficients.T))
    made.to_item.bias.copy_(torch.from_numpy(item_map.mean))
    beside_history, reached, said = USUAL_WEIGHT if chosen is None else chosen["weight_beside_history"], 0.0, None
    if own_texts:
        said = np.zeros((corpora.num_users, head.shape[1]), np.float32)
        said[users] = scale * (user_map.left_out - user_map.mean)
        judged = some(np.isin(np.arange(len(said)), users) & (np.diff(validation.indptr) > 0), COMPARED_USERS, rng)
        if chosen is None and len(judged):
            states = scores.states(judged).float().cpu().numpy()
            beside_history, reached = best_weight(
                lambda share: (states + share * said[judged], head, bias), WEIGHTS, train, validation, judged
            )
    made.weight_beside_history.fill_(beside_history)
    model.config.num_text_terms = len(terms)
    if text_states is not None:
        model.config.text_state_width, model.text_encoder = text_states.width, text_states.encoder
    finer = {name: value.clone() for name, value in made.state_dict().items() if name.startswith("state_")}
    model.model.text_map = made.to(model.device, model.dtype)
    for name, value in finer.items():  # half precision is coarser than what texts differ by
        getattr(made, name).data = value.to(model.device)
    fitted = FittedTextMap(
        len(terms),
        *(user_map.ridge, user_map.state_weight, of_users[1]),
        *(item_map.ridge, item_map.state_weight, of_items[1]),
        *(topic_weight, scale, beside_history, reached),
        said=said,
    )
    numbers = {name: value for name, value in vars(fitted).items() if name != "said"}
    logger.info("text map: %s", ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    return fitted


def with_nearness(
    ridge: Ridge,
    added: Sequence[tuple[csr_matrix | np.ndarray, np.ndarray]],
    head: np.ndarray,
    splits: tuple[csr_matrix, csr_matrix],
    users: np.ndarray,
    weight: float | None,
) -> tuple[Ridge, float]:
    """A ridge regression to states with nearness to the items' texts added, and the weight of that: the one that validation likes best.

    Args:
        ridge: The regression.
        added: Its inputs `(rows, k)`, part by part, and from each of them to what is added to a state, `(width, k)`.
        head: The item head's rows, `(items, width)`.
        splits: Training and validation pairs, `(num_users, items)` each.
        users: Of the rows.
        weight: Where it is not to be chosen. Of weight 1 the scores of each part spread as widely as those of the regression.
    """

    def spread(states: np.ndarray) -> float:
        return float((states[:1024] @ head.T).std())

    more, coefficients = np.zeros_like(ridge.left_out), []
    for inputs, to_state in added:
        of_part = np.asarray(inputs @ to_state.T, np.float32)
        times = spread(ridge.left_out) / max(spread(of_part), 1e-12)
        more += times * of_part
        coefficients.append(times * to_state.T)
    train, validation = (csr_matrix(split[users]) for split in splits)
    judged = np.flatnonzero(np.diff(validation.indptr))[:COMPARED_USERS]
    if weight is None:
        weight = 0.0
        if len(judged):
            bias = np.zeros(len(head), np.float32)
            weight = best_weight(
                lambda choice: ((ridge.left_out + choice * more)[judged], head, bias),
                TOPIC_WEIGHTS, train, validation, judged,
            )[0]  # fmt: skip
    both = ridge.coefficients + weight * np.concatenate(coefficients)
    return replace(ridge, coefficients=both, left_out=ridge.left_out + weight * more), weight


def likeness(outputs: np.ndarray, vectors: csr_matrix) -> np.ndarray:
    """The matrix `(width, terms)` float32 from a TF-IDF vector to its nearness to each of these texts, by their topics, to what that makes.

    Args:
        outputs: What nearness to a text makes, `(width, texts)`.
        vectors: TF-IDF of the texts, `(texts, terms)`.
    """
    topics = topics_of(vectors, NUM_TOPICS)
    return np.asarray((outputs @ unit(vectors @ topics.T)) @ topics, np.float32)


def owners_states(states: TextStates, train: csr_matrix, made: TextMap) -> tuple[np.ndarray, np.ndarray]:
    """Standardised states of what is written about each user and each item, `(num_users, width)` and `(num_items, width)` float32.

    Where only items (or users) have texts, the mean over a user's items (an item's users).

    Args:
        states: Of the texts.
        train: `(num_users, items)` of ones.
        made: The map; it takes the means and spreads of states.
    """
    users, items = states.users, states.items
    if np.isnan(users).all():
        users = mean_of_known(train, items)
    elif np.isnan(items).all():
        items = mean_of_known(csr_matrix(train.T), users)
    found = []
    for kind, rows in ((made.PEOPLE, users), (made.ITEMS, items)):
        made.state_mean[kind] = torch.from_numpy(np.nanmean(rows, 0))  # type: ignore[index]
        made.state_spread[kind] = torch.from_numpy(np.nanstd(rows, 0)).clamp(min=1e-6)  # type: ignore[index]
        found.append(made.standardised(torch.from_numpy(rows), kind).numpy())
    return found[0], found[1]


def mean_of_known(rows: csr_matrix, states: np.ndarray) -> np.ndarray:
    """The mean of those states `(n, width)` that each of the rows `(rows, n)` of ones names and that are there, NaN where none is."""
    known = np.flatnonzero(~np.isnan(states[:, 0]))
    return rows_mean(csr_matrix(rows[:, known]), states[known])


def item_head(model: CLLM4RecForRecommendation) -> tuple[np.ndarray, np.ndarray]:
    """The item head's rows and biases, `(items, width)` and `(items,)` float32."""
    weight = model.model.item_embeddings.weight.detach().float().cpu().numpy()
    bias = model.model.item_bias
    return weight, np.zeros(len(weight), np.float32) if bias is None else bias.detach().float().cpu().numpy()


def to_states(weight: np.ndarray) -> np.ndarray:
    """The matrix `(width, items)` that turns scores of items into the state whose scores come nearest, of the head's rows `(items, width)`."""
    return np.linalg.inv(weight.T @ weight + 1e-3 * np.eye(weight.shape[1])) @ weight.T


def some(chosen: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Places where `chosen` is true, a sample of them where there are more than `most`, ascending."""
    places = np.flatnonzero(chosen)
    return places if len(places) <= most else np.sort(rng.choice(places, most, replace=False))


def best_ridge(
    inputs: csr_matrix,
    outputs: np.ndarray,
    factors: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    train: csr_matrix,
    users: np.ndarray,
    states: np.ndarray | None = None,
) -> tuple[Ridge, float]:
    """The ridge whose leave-one-out predictions rank the training histories best, and its NDCG@100; then the states' weight alike.

    Args:
        inputs: `(rows, terms)`.
        outputs: `(rows, outputs)`.
        factors: Leave-one-out predictions to the factors of users `(len(users), k)` and of items `(items, k)`.
        train: `(num_users, items)` of ones.
        users: Of the rows of user factors.
        states: Further inputs `(rows, width)`, or None.
    """
    histories = csr_matrix(train[users])
    none = np.empty(0, np.float32)
    nothing = csr_matrix((none, (none.astype(int), none.astype(int))), shape=histories.shape)
    places = np.flatnonzero(np.diff(histories.indptr))[:COMPARED_USERS]
    batch_size = max(SCORES_AT_A_TIME // histories.shape[1], 1)

    def measured(ridge: float, state_weight: float) -> tuple[Ridge, float]:
        fitted = Ridge.fit(inputs, outputs, ridge, states, state_weight)
        of_users, of_items = factors(fitted.left_out)
        value = evaluate_scores(
            lambda chosen: of_users[chosen] @ of_items.T, places, nothing, histories, batch_size=batch_size
        ).ndcg_at_100.mean()
        return fitted, float(value)

    usual = 0.0 if states is None else STATE_WEIGHTS[len(STATE_WEIGHTS) // 2]
    best = max((measured(ridge, usual) for ridge in RIDGES), key=lambda found: found[1])
    if states is None:
        return best
    others = (measured(best[0].ridge, weight) for weight in STATE_WEIGHTS if weight != usual)
    return max([best, *others], key=lambda found: found[1])


def best_scale(scores: np.ndarray, bias: np.ndarray, histories: csr_matrix) -> float:
    """The factor of scores `(users, items)` under which the histories are likeliest, biases `(items,)` being added."""
    scores, pairs = scores[:COMPARED_USERS], histories[:COMPARED_USERS].tocoo()
    found = torch.from_numpy(np.asarray(scores, np.float32))
    likelihood = [
        (scale * found + torch.from_numpy(np.asarray(bias, np.float32))).log_softmax(-1)[pairs.row, pairs.col].sum()
        for scale in SCALES
    ]
    return SCALES[int(torch.stack(likelihood).argmax())]


def best_weight(
    factors: Callable[[float], tuple[np.ndarray, np.ndarray, np.ndarray]],
    weights: Sequence[float],
    train: csr_matrix,
    validation: csr_matrix,
    judged: np.ndarray,
) -> tuple[float, float]:
    """The weight that validation likes best, and its NDCG@100 there.

    Args:
        factors: A weight to the states `(len(judged), width)`, the item head's rows and its biases.
        weights: To choose from.
        train: `(num_users, items)` of ones; these items are not ranked.
        validation: Alike.
        judged: Users, ascending.
    """

    def reached(choice: float) -> float:
        states, weight, bias = factors(choice)
        measured = evaluate_scores(
            lambda chosen: states[np.searchsorted(judged, chosen)] @ weight.T + bias,
            judged, train, validation, batch_size=max(SCORES_AT_A_TIME // len(weight), 1),
        )  # fmt: skip
        return float(measured.ndcg_at_100.mean())

    values = [reached(choice) for choice in weights]
    best = int(np.argmax(values))
    return weights[best], values[best]
