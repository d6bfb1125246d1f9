"""A classical teacher for the recommendation head: iALS, blended with EASE and with what the texts say, fitted on the training split.

Not in the paper: `method.distillation` says how much of the loss comes from it, `method.teacher` what it is made of. On a small
set the risk is overfitting, and a teacher cures most of it.

EASE sees the items' texts beside the interactions, as further rows of what it explains (Jeunen, Van Balen and Goethals, Closed-form
models for collaborative filtering with side-information, RecSys 2020): items with like texts then stand for each other. What the
texts are about, their topics, are the leading singular vectors of the items' TF-IDF (Deerwester et al., Indexing by latent semantic
analysis, 1990): items are near to a history, or to somebody's own words, that is about the same.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix, diags
from threadpoolctl import threadpool_limits

from training.data.corpora import Corpora, Texts
from training.evaluation.baselines import FittedBaseline, ease_weights, fit_baselines, fit_ials
from training.evaluation.ranking import evaluate_scores
from training.files import written_whole
from training.stages.terms import MOST_ROWS, TermCounts, term_counts, tf_idf
from training.stages.topics import leading, topics_of, unit

logger = logging.getLogger(__name__)

# Settings are tried one after the other, each on validation NDCG@100 with the best of those before it.
RIDGES = (1.0, 3.0, 10.0)
USER_TEXT_WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
EASE_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
USUAL_EASE_WEIGHT = 0.05
# Of EASE: the penalty, what the items' texts weigh beside the interactions, and the power of its length that a history is divided by.
PENALTIES, TEXT_WEIGHTS, POWERS = (10.0, 30.0, 100.0, 300.0), (0.0, 3.0, 10.0, 30.0, 100.0, 300.0), (0.0, 0.5)
# Of more items EASE is fitted with one setting, and where there are no texts not at all: what it adds is more than a state holds.
MANY_ITEMS, SETTING_OF_MANY = 4_000, (100.0, 100.0, 0.5)
# Of topics: how many a history is compared in, how many somebody's own text is, and what either weighs beside iALS.
TOPICS, OWN_TOPICS, TOPIC_WEIGHTS = (8, 16, 32), 64, (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
COMPARED_USERS = 2_000


@dataclass(frozen=True)
class Blend:
    """How a teacher was chosen on validation."""

    ials: dict[str, Any]
    ials_validation_ndcg_at_100: float
    validation_ndcg_at_100: float
    ridge: float = 0.0
    user_text_weight: float = 0.0
    ease_penalty: float = 0.0
    ease_text_weight: float = 0.0
    ease_power: float = 0.0
    ease_weight: float = 0.0
    topics: int = 0
    topic_weight: float = 0.0
    own_topic_weight: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Teacher:
    """Scores of all items for users of the training split, and the inverse temperature that suits validation best.

    Attributes:
        user_factors: `(users, factors)` float32, of iALS.
        item_factors: `(items, factors)` float32, of iALS.
        train: `(users, items)` of ones.
        blend: The weights.
        from_user_text: `(users, users)` float32: what similar texts' users chose, one's own row left out; None: no texts.
        from_items: `(items, items)` float32: what items of a history say for others, by EASE; None: there are too many.
        topics: Weighed factors `(users, k)` and `(items, k)` float32 of what histories and own texts are about; None: no texts.
    """

    user_factors: np.ndarray
    item_factors: np.ndarray
    train: csr_matrix
    blend: Blend
    from_user_text: np.ndarray | None = None
    from_items: np.ndarray | None = None
    topics: tuple[np.ndarray, np.ndarray] | None = None

    def low_rank(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The parts of the scores that are products of factors `(users, k)` and `(items, k)`."""
        return [(self.user_factors, self.item_factors), *([self.topics] if self.topics is not None else [])]

    def scores(self, users: np.ndarray) -> np.ndarray:
        """Blended scores `(users, items)`, float32."""
        scores = sum(of_users[users] @ of_items.T for of_users, of_items in self.low_rank())
        if self.from_user_text is not None and self.blend.user_text_weight:
            scores += self.blend.user_text_weight * (self.from_user_text[users] @ self.train)
        if self.from_items is not None and self.blend.ease_weight:
            scores += self.blend.ease_weight * (self.train[users] @ self.from_items)
        return scores

    def projected(self, users: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Logits of users times a matrix `(items, width)`, `(users, width)` float32, without a row of all items for each user."""
        found = sum(of_users[users] @ (of_items.T @ matrix) for of_users, of_items in self.low_rank())
        if self.from_user_text is not None and self.blend.user_text_weight:
            found += self.blend.user_text_weight * (self.from_user_text[users] @ (self.train @ matrix))
        if self.from_items is not None and self.blend.ease_weight:
            found += self.blend.ease_weight * (self.train[users] @ (self.from_items @ matrix))
        return np.asarray(self.blend.scale * found, np.float32)

    def factors(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The rank-`width` user and item factors whose products come nearest to all scores, `(users, ≤ width)` and `(items, ≤ width)`."""
        parts: list[tuple[Any, Any]] = [(of_users, of_items.T) for of_users, of_items in self.low_rank()]
        if self.from_user_text is not None and self.blend.user_text_weight:
            parts.append((self.blend.user_text_weight * self.from_user_text, self.train))
        if self.from_items is not None and self.blend.ease_weight:
            parts.append((self.train, self.blend.ease_weight * self.from_items))
        if len(parts) == 1:
            return fit_width(self.user_factors, self.item_factors, width)
        left, values, right = leading(parts, width)
        root = np.sqrt(values)
        return (left * root).astype(np.float32), (right.T * root).astype(np.float32)

    def logits(self, users: np.ndarray, items: np.ndarray | None = None) -> np.ndarray:
        """Unnormalised log-probabilities `(users, items)`, float32, of all items or of those with these indices."""
        if items is None:
            return self.blend.scale * self.scores(users)
        if self.blend.user_text_weight or self.blend.ease_weight:
            return self.blend.scale * self.scores(users)[:, items]
        found = sum(of_users[users] @ of_items[items].T for of_users, of_items in self.low_rank())
        return np.asarray(self.blend.scale * found, np.float32)


def fit_teacher(
    train: csr_matrix,
    validation: csr_matrix,
    corpora: Corpora,
    kind: Literal["ials", "blend"],
    seed: int,
    cache: Path,
    like: Path | None = None,
) -> Teacher:
    """Fit the teacher with settings chosen on validation, or open what an earlier call for the same wrote to `cache`.

    Args:
        train: `(users, items)` of ones.
        validation: Alike.
        corpora: Whose texts are read.
        kind: What it is made of.
        seed: For iALS.
        cache: A folder of the run.
        like: The `cache` of another run's teacher, whose settings are taken instead of being searched for; nothing where it has none.
    """
    mark = fingerprint(train, validation, corpora.texts("content"), kind, seed)
    if was_fitted_for(mark, cache):
        tables = load_file(cache / "factors.safetensors")
        return with_parts(Teacher(tables["users"], tables["items"], train, read_blend(cache)), corpora)
    if like is not None and (like / "blend.json").is_file():
        teacher = fit_again(train, validation, corpora, kind, seed, read_blend(like))
    else:
        teacher = choose(train, validation, corpora, kind, seed)
    with written_whole(cache) as target:
        tables = {"users": teacher.user_factors, "items": teacher.item_factors}
        save_file(tables, target / "factors.safetensors", metadata={"fingerprint": mark})
        (target / "blend.json").write_text(json.dumps(asdict(teacher.blend), indent=2), encoding="utf-8")
    return teacher


def with_parts(teacher: Teacher, corpora: Corpora) -> Teacher:
    """The teacher with those parts beside iALS that its blend weighs."""
    blend = teacher.blend
    if blend.user_text_weight:
        kernel = similarities(term_counts(corpora).user)
        teacher = replace(teacher, from_user_text=leave_one_out_ridge(kernel, blend.ridge))
    if blend.ease_weight:
        alike = similarities(term_counts(corpora).item) if blend.ease_text_weight else None
        teacher = replace(teacher, from_items=ease_with_texts(teacher.train, alike, blend))
    if blend.topic_weight or blend.own_topic_weight:
        teacher = Topics.of(teacher, term_counts(corpora)).blended(teacher, blend)
    return teacher


def fit_again(
    train: csr_matrix,
    validation: csr_matrix,
    corpora: Corpora,
    kind: Literal["ials", "blend"],
    seed: int,
    blend: Blend,
) -> Teacher:
    """A teacher with settings that were chosen before, on data that have grown."""
    if kind == "ials":
        blend = replace(blend, user_text_weight=0.0, ease_weight=0.0, topic_weight=0.0, own_topic_weight=0.0)
    counts = term_counts(corpora)
    if not has_texts(counts.user, "user"):
        blend = replace(blend, user_text_weight=0.0)
    if not counts.item.nnz:
        blend = replace(blend, topic_weight=0.0, own_topic_weight=0.0)
    items_have_texts = has_texts(counts.item, "item")
    if not items_have_texts:
        blend = replace(blend, ease_text_weight=0.0)
    if blend.ease_weight and not ease_fits(train.shape[1], items_have_texts):
        blend = replace(blend, ease_weight=0.0)
    compared = np.flatnonzero(np.diff(validation.indptr))
    compared = np.sort(np.random.default_rng(seed).permutation(compared)[:COMPARED_USERS])
    with threadpool_limits(limits=1, user_api="blas"):
        users, items = (np.ascontiguousarray(table) for table in fit_ials(train, seed=seed, **blend.ials))
    teacher = with_parts(Teacher(users, items, train, blend), corpora)
    alone = evaluate_scores(lambda rows: users[rows] @ items.T, compared, train, validation).ndcg_at_100
    whole = evaluate_scores(teacher.scores, compared, train, validation).ndcg_at_100
    reached = [float(values.mean()) if len(values) else 0.0 for values in (alone, whole)]
    blend = replace(blend, ials_validation_ndcg_at_100=reached[0], validation_ndcg_at_100=reached[1])
    teacher = replace(teacher, blend=replace(blend, scale=best_scale(teacher, compared, validation)))
    logger.info(
        "teacher: with another run's settings%s", f", validation NDCG@100 {reached[1]:.4f}" if len(compared) else ""
    )
    return teacher


def fingerprint(train: csr_matrix, validation: csr_matrix, texts: Texts, kind: str, seed: int) -> str:
    """What a teacher depends on: the pairs of both splits, the texts, its kind and the seed."""
    digest = hashlib.sha256(f"topics {kind} {seed} {train.shape}".encode())
    for matrix in (train, validation):
        digest.update(matrix.indptr.tobytes() + matrix.indices.tobytes())
    digest.update(texts.documents.values.tobytes())
    return digest.hexdigest()


def was_fitted_for(mark: str, cache: Path) -> bool:
    """Whether `cache` holds the teacher with this fingerprint."""
    path = cache / "factors.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("fingerprint") == mark


def read_blend(cache: Path) -> Blend:
    """How the teacher in `cache` was chosen."""
    return Blend(**json.loads((cache / "blend.json").read_text(encoding="utf-8")))


def fitted_ials(cache: Path) -> FittedBaseline | None:
    """The teacher's iALS as a baseline, so that it is not searched for twice; None where there is no teacher."""
    if not (cache / "blend.json").is_file():
        return None
    tables, blend = load_file(cache / "factors.safetensors"), read_blend(cache)
    users, items = tables["users"], tables["items"]
    return FittedBaseline(
        "ials", blend.ials, blend.ials_validation_ndcg_at_100, lambda rows: users[rows] @ items.T, (users, items)
    )


def choose(
    train: csr_matrix,
    validation: csr_matrix,
    corpora: Corpora,
    kind: Literal["ials", "blend"],
    seed: int,
) -> Teacher:
    """Search iALS, then each part of the blend in turn, on validation NDCG@100, then the softmax's scale on its likelihood."""
    ials = fit_baselines(train, validation, ["ials"], seed=seed)["ials"]
    assert ials.factors is not None
    users, items = (np.ascontiguousarray(table, np.float32) for table in ials.factors)
    compared = np.flatnonzero(np.diff(validation.indptr))
    compared = np.sort(np.random.default_rng(seed).permutation(compared)[:COMPARED_USERS])

    def measured(teacher: Teacher) -> Teacher:
        value = evaluate_scores(teacher.scores, compared, train, validation).figures().ndcg_at_100.value
        return replace(teacher, blend=replace(teacher.blend, validation_ndcg_at_100=value))

    def best(teachers: Iterable[Teacher]) -> Teacher:
        return max(
            (measured(teacher) for teacher in teachers), key=lambda teacher: teacher.blend.validation_ndcg_at_100
        )

    start = Blend(ials.settings, ials.validation_ndcg_at_100, 0.0)
    teacher = measured(Teacher(users, items, train, start))
    if kind == "blend":
        counts = term_counts(corpora)
        if has_texts(counts.user, "user"):
            kernel = similarities(counts.user)
            candidates = [
                replace(
                    teacher,
                    from_user_text=leave_one_out_ridge(kernel, ridge),
                    blend=replace(teacher.blend, ridge=ridge),
                )
                for ridge in RIDGES
            ]
            teacher = best(
                replace(candidate, blend=replace(candidate.blend, user_text_weight=weight))
                for candidate in candidates
                for weight in USER_TEXT_WEIGHTS
            )
        alike = similarities(counts.item) if has_texts(counts.item, "item") else None
        if ease_fits(train.shape[1], alike is not None):
            settings = replace(teacher.blend, ease_weight=USUAL_EASE_WEIGHT)
            with_ease = best(
                replace(teacher, from_items=ease_with_texts(train, alike, blend), blend=blend)
                for blend in ease_settings(settings, train.shape[1], alike is not None)
            )
            teacher = best(
                replace(with_ease, blend=replace(with_ease.blend, ease_weight=weight)) for weight in EASE_WEIGHTS
            )
        if counts.item.nnz:
            topics = Topics.of(teacher, counts)
            nothing = replace(teacher.blend, topics=TOPICS[0])
            tried = [
                replace(nothing, topics=number, topic_weight=weight)
                for number in TOPICS
                for weight in TOPIC_WEIGHTS[1:]
            ]
            teacher = best(topics.blended(teacher, blend) for blend in [nothing, *tried])
            if counts.user.nnz:
                blends = [replace(teacher.blend, own_topic_weight=weight) for weight in TOPIC_WEIGHTS]
                teacher = best(topics.blended(teacher, blend) for blend in blends)
    teacher = replace(teacher, blend=replace(teacher.blend, scale=best_scale(teacher, compared, validation)))
    logger.info("teacher: %s", ", ".join(f"{name} {value}" for name, value in asdict(teacher.blend).items()))
    return teacher


@dataclass(frozen=True, eq=False)
class Topics:
    """What histories, people's own texts and items are about.

    Attributes:
        items: `(items, topics)` float32, the leading singular vectors of the items' TF-IDF by their singular values.
        own: `(users, topics)` float32, people's own texts in the same space, each of length 1; zeros where there is none.
        train: `(users, items)` of ones.
        spread: Standard deviation of iALS's scores, which that of a part is brought to.
    """

    items: np.ndarray
    own: np.ndarray
    train: csr_matrix
    spread: float

    @classmethod
    def of(cls, teacher: Teacher, counts: TermCounts) -> "Topics":
        """The topics of what training may read, beside the iALS of a teacher."""
        of_items, rarity = tf_idf(counts.item)
        terms = topics_of(of_items, OWN_TOPICS)
        own = unit(tf_idf(counts.user, rarity)[0] @ terms.T)
        first = teacher.user_factors[:1024] @ teacher.item_factors.T
        return cls(np.asarray(of_items @ terms.T, np.float32), own, teacher.train, float(first.std()))

    def blended(self, teacher: Teacher, blend: Blend) -> Teacher:
        """The teacher with topics as the blend weighs them."""
        lengths = np.maximum(np.diff(self.train.indptr), 1)
        near = unit(self.items[:, : blend.topics])
        histories = diags(lengths**-0.5) @ (self.train @ near)
        pairs = [(histories, near, blend.topic_weight), (self.own, unit(self.items), blend.own_topic_weight)]
        weighed = [
            (weight * self.spread / max(float((left[:1024] @ right.T).std()), 1e-12) * left, right)
            for left, right, weight in pairs
            if weight
        ]
        topics = None
        if weighed:
            of_users, of_items = (np.concatenate(side, axis=1, dtype=np.float32) for side in zip(*weighed, strict=True))
            topics = of_users, of_items
        return replace(teacher, topics=topics, blend=blend)


def has_texts(counts: csr_matrix, kind: str) -> bool:
    """Whether there are texts of users (or items), and few enough rows for their square matrix."""
    rows = counts.shape[0]
    if counts.nnz and rows > MOST_ROWS:
        logger.info("teacher: the %s texts are left out, %d rows are more than %d", kind, rows, MOST_ROWS)
    return rows <= MOST_ROWS and counts.nnz > 0


def best_scale(teacher: Teacher, users: np.ndarray, validation: csr_matrix) -> float:
    """The inverse temperature under which the validation items are likeliest, training items left out of the softmax.

    The teacher's own where there are none, as in a refit.
    """
    if not len(users):
        return teacher.blend.scale
    scores = torch.from_numpy(teacher.scores(users))
    seen = torch.from_numpy(teacher.train[users].toarray() > 0)
    held_out = torch.from_numpy(validation[users].toarray())
    likelihood = [
        (held_out * (scale * scores).masked_fill(seen, -torch.inf).log_softmax(-1).masked_fill(seen, 0)).sum().item()
        for scale in SCALES
    ]
    return SCALES[int(np.argmax(likelihood))]


def fit_width(users: np.ndarray, items: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank-`width` factors nearest to users · itemsᵀ (Eckart-Young), sharing the singular values evenly."""
    (q_users, r_users), (q_items, r_items) = np.linalg.qr(users), np.linalg.qr(items)
    left, values, right = np.linalg.svd(r_users @ r_items.T)
    rank = min(width, len(values))
    root = np.sqrt(values[:rank])
    return (q_users @ left[:, :rank] * root).astype(np.float32), (q_items @ right[:rank].T * root).astype(np.float32)


def leave_one_out_ridge(kernel: np.ndarray, ridge: float) -> np.ndarray:
    """Kernel ridge regression's hat matrix without one's own row: `(H - diag h) / (1 - h)`, `H = K (K + ridge I)⁻¹`."""
    factor = cho_factor(kernel + ridge * np.eye(len(kernel), dtype=kernel.dtype))
    hat = cho_solve(factor, kernel).T
    own = np.diag(hat).copy()
    np.fill_diagonal(hat, 0)
    return (hat / np.maximum(1 - own, 1e-3)[:, None]).astype(np.float32)


def ease_fits(num_items: int, has_texts: bool) -> bool:
    """Whether EASE is a part of the blend."""
    fits = has_texts or num_items <= MANY_ITEMS
    if not fits:
        logger.info("teacher: ease is left out, %d items without texts are more than %d", num_items, MANY_ITEMS)
    return fits


def ease_settings(blend: Blend, num_items: int, has_texts: bool) -> Iterator[Blend]:
    """The settings of EASE to choose from."""
    settings = itertools.product(PENALTIES, TEXT_WEIGHTS if has_texts else (0.0,), POWERS)
    for penalty, weight, power in [SETTING_OF_MANY] if num_items > MANY_ITEMS else settings:
        yield replace(blend, ease_penalty=penalty, ease_text_weight=weight, ease_power=power)


def ease_with_texts(train: csr_matrix, alike: np.ndarray | None, blend: Blend) -> np.ndarray:
    """EASE's weights `(items, items)` float32, scaled so that a history's sum has standard deviation 1.

    Args:
        train: `(users, items)` of ones.
        alike: Cosines of the items' texts `(items, items)`, or None.
        blend: The settings.
    """
    lengths = np.maximum(np.diff(train.indptr), 1)
    rows = csr_matrix(diags(lengths**-blend.ease_power) @ train)
    gram = np.asarray((rows.T @ rows).toarray(order="F"), np.float32)
    # Divided by their lengths, histories weigh less: texts and the penalty follow.
    share = float(gram.trace()) / max(train.nnz, 1)
    if alike is not None:
        gram += share * blend.ease_text_weight * alike
    weights = ease_weights(gram, share * blend.ease_penalty)
    spread = float((train[: min(1024, train.shape[0])] @ weights).std())
    return weights / max(spread, 1e-12)


def similarities(counts: csr_matrix) -> np.ndarray:
    """Cosines of TF-IDF vectors of terms counted `(rows, terms)`, `(rows, rows)` float32."""
    unit = tf_idf(counts)[0]
    return np.asarray((unit @ unit.T).toarray(), np.float32)
