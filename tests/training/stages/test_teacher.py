import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from training.data.corpora import ITEM_TEXT, USER_TEXT, Texts
from training.data.ragged import Ragged
from training.evaluation.baselines import fit_ials
from training.stages import teacher as teacher_module
from training.stages.teacher import (
    SCALES,
    Blend,
    Teacher,
    Topics,
    best_scale,
    ease_settings,
    ease_with_texts,
    fit_teacher,
    fit_width,
    fitted_ials,
    leave_one_out_ridge,
    similarities,
)
from training.stages.terms import term_counts, tf_idf
from training.stages.topics import unit

USERS, ITEMS = 30, 20
GROUP_OF_USER, GROUP_OF_ITEM = np.arange(USERS) % 2, np.arange(ITEMS) % 2


def factors(rows, width, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.fixture(scope="module")
def splits():
    """Users who like the items of their group; a fifth of the pairs held out."""
    generator = np.random.default_rng(0)
    has = generator.random((USERS, ITEMS)) < np.where(GROUP_OF_USER[:, None] == GROUP_OF_ITEM, 0.6, 0.05)
    held_out = generator.random(has.shape) < 0.2
    return tuple(csr_matrix(has & part, dtype=np.float32) for part in (~held_out, held_out))


@pytest.fixture(scope="module")
def texts():
    """Each user and each item is described by words of its group; the prompt's word 49 is everybody's."""
    generator = np.random.default_rng(1)
    owners = [(USER_TEXT, user, -1, GROUP_OF_USER[user]) for user in range(USERS)]
    owners += [(ITEM_TEXT, -1, item, GROUP_OF_ITEM[item]) for item in range(ITEMS)]
    documents = [[49, *(20 * group + generator.integers(0, 20, 6))] for *_, group in owners]
    kind, user, item, _ = np.array(owners).T
    return Texts(Ragged.from_lists(documents, np.int32), kind, user, item, np.ones(len(owners), np.int32))


def corpora_of(texts):
    """What a teacher reads of corpora: each word is written as `w` and its number."""

    def batch_decode(documents, skip_special_tokens):
        return [" ".join(f"w{word}" for word in document) for document in documents]

    return SimpleNamespace(
        texts=lambda _: texts,
        tokenizer=SimpleNamespace(batch_decode=batch_decode),
        num_users=USERS,
        num_items=ITEMS,
    )


@pytest.fixture
def make(splits, texts, tmp_path):
    """Fit a teacher or open the one in `tmp_path/teacher`."""

    def make(kind="blend", train=splits[0], validation=splits[1], texts=texts, seed=0):
        return fit_teacher(train, validation, corpora_of(texts), kind, seed, tmp_path / "teacher")

    return make


@pytest.fixture
def fits(monkeypatch):
    """Factors at random instead of iALS; the seeds of the fits that were made."""
    seeds = []

    def fit_baselines(train, validation, names, seed):
        seeds.append(seed)
        found = factors(train.shape[0], 3, seed), factors(train.shape[1], 3, seed + 1)
        return {"ials": SimpleNamespace(factors=found, settings={"factors": 3}, validation_ndcg_at_100=0.25)}

    monkeypatch.setattr(teacher_module, "fit_baselines", fit_baselines)
    return seeds


@pytest.mark.parametrize("width", [1, 3, 5, 9])
@pytest.mark.parametrize(("users", "items"), [(20, 15), (3, 15), (20, 4)])
def test_fitted_factors_are_the_truncated_svd_of_the_product(users, items, width):
    user_factors, item_factors = factors(users, 5), factors(items, 5, seed=1)
    fitted_users, fitted_items = fit_width(user_factors, item_factors, width)
    left, values, right = np.linalg.svd(user_factors @ item_factors.T, full_matrices=False)
    np.testing.assert_allclose(
        fitted_users @ fitted_items.T, left[:, :width] * values[:width] @ right[:width], atol=1e-4
    )
    norms = (np.linalg.norm(fitted, axis=0) for fitted in (fitted_users, fitted_items))
    np.testing.assert_allclose(*norms, rtol=1e-3, atol=1e-3)
    assert fitted_users.dtype == fitted_items.dtype == np.float32
    assert fitted_users.shape[1] == fitted_items.shape[1] <= width


def blended(splits):
    """A teacher of all parts at random."""
    blend = Blend({}, 0.0, 0.0, user_text_weight=0.5, ease_weight=0.25, scale=6.0)
    parts = factors(USERS, USERS, seed=2), factors(ITEMS, ITEMS, seed=3)
    topics = factors(USERS, 2, seed=4), factors(ITEMS, 2, seed=5)
    return Teacher(factors(USERS, 4), factors(ITEMS, 4, seed=1), splits[0], blend, *parts, topics)


def test_logits_are_the_scaled_sum_of_the_parts(splits):
    teacher, train, users = blended(splits), splits[0].toarray(), np.array([3, 0, 3])
    everybody = teacher.user_factors @ teacher.item_factors.T + teacher.topics[0] @ teacher.topics[1].T
    everybody = everybody + 0.5 * teacher.from_user_text @ train + 0.25 * train @ teacher.from_items
    np.testing.assert_allclose(teacher.logits(users), 6 * everybody[users], rtol=1e-4, atol=1e-4)
    assert teacher.logits(users).dtype == np.float32
    some = np.array([7, 2])
    np.testing.assert_allclose(teacher.logits(users, some), teacher.logits(users)[:, some], rtol=1e-4, atol=1e-4)
    low_rank = replace(teacher, blend=replace(teacher.blend, user_text_weight=0.0, ease_weight=0.0))
    np.testing.assert_allclose(low_rank.logits(users, some), low_rank.logits(users)[:, some], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 7, 99])
def test_factors_of_a_blend_are_the_truncated_svd_of_all_its_scores(splits, width):
    teacher = blended(splits)
    users, items = teacher.factors(width)
    left, values, right = np.linalg.svd(teacher.scores(np.arange(USERS)))
    kept = min(width, ITEMS)
    assert users.shape == (USERS, kept)
    assert items.shape == (ITEMS, kept)
    np.testing.assert_allclose(users @ items.T, left[:, :kept] * values[:kept] @ right[:kept], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(users, axis=0), np.linalg.norm(items, axis=0), rtol=1e-3)


def test_ridge_of_everybody_else_is_what_leaving_each_one_out_gives():
    rows = factors(8, 3)
    kernel = rows @ rows.T
    hat = leave_one_out_ridge(kernel, ridge=2.0)
    for one in range(8):
        others = np.arange(8) != one
        expected = kernel[one, others] @ np.linalg.inv(kernel[np.ix_(others, others)] + 2 * np.eye(7))
        np.testing.assert_allclose(hat[one, others], expected, atol=1e-4)
        assert hat[one, one] == 0


def test_similarities_are_cosines_of_the_terms_by_their_rarity():
    counts = csr_matrix(np.float32([[1, 2, 0, 1], [0, 3, 1, 0], [0, 0, 0, 0]]))

    def cosine(a, b):
        rarity = np.log((3 + 1) / ((counts.toarray() > 0).sum(0) + 1))
        a, b = (np.log1p(counts.toarray()[row]) * rarity for row in (a, b))
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    assert 0.1 < cosine(0, 1) < 0.9
    np.testing.assert_allclose(similarities(counts), [[1, cosine(0, 1), 0], [cosine(0, 1), 1, 0], [0, 0, 0]], atol=1e-6)


def test_ease_explains_histories_and_texts_by_other_items(splits):
    """The same as ridge regression of each item on the others, with texts as further rows."""
    train, texts = splits[0].toarray(), np.abs(factors(6, ITEMS))
    blend = Blend({}, 0.0, 0.0, ease_penalty=3.0, ease_text_weight=0.5)
    found = ease_with_texts(splits[0], texts.T @ texts, blend)
    rows = np.concatenate([train, np.sqrt(0.5) * texts])
    for item in (0, 7):
        others = np.arange(ITEMS) != item
        x, y = rows[:, others].astype(np.float64), rows[:, item].astype(np.float64)
        expected = np.linalg.solve(x.T @ x + 3 * np.eye(ITEMS - 1), x.T @ y)
        ratio = found[others, item] / expected
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-2)
        assert found[item, item] == 0
    assert (splits[0] @ found).std() == pytest.approx(1, rel=1e-5)


def test_long_histories_weigh_less_by_a_power_of_their_length(splits):
    train, power = splits[0].toarray(), 0.5
    lengths = np.maximum(train.sum(1, keepdims=True), 1)
    shrunk = csr_matrix((train / lengths**power).astype(np.float32))
    one = ease_with_texts(splits[0], None, Blend({}, 0.0, 0.0, ease_penalty=2.0, ease_power=power))
    other = ease_with_texts(shrunk, None, Blend({}, 0.0, 0.0, ease_penalty=2.0))
    ratio = one[one != 0] / other[one != 0]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)


def test_weights_of_texts_are_tried_where_there_are_texts():
    start = Blend({}, 0.0, 0.0, ease_weight=0.05)
    assert len({*map(str, ease_settings(start, 4_000, True))}) == 48
    assert [blend.ease_text_weight for blend in ease_settings(start, 4_000, False)] == [0.0] * 8
    (one,) = ease_settings(start, 4_001, True)
    assert (one.ease_penalty, one.ease_text_weight, one.ease_power, one.ease_weight) == (100.0, 100.0, 0.5, 0.05)


@pytest.mark.parametrize("has_texts", [True, False])
def test_of_many_items_ease_is_left_out_where_there_are_no_texts(make, fits, texts, monkeypatch, caplog, has_texts):
    monkeypatch.setattr(teacher_module, "MANY_ITEMS", ITEMS - 1)
    none = Texts(Ragged.from_lists([]), *(np.empty(0, np.int64) for _ in range(4)))
    with caplog.at_level(logging.INFO, "training"):
        teacher = make(texts=texts if has_texts else none)
    assert (teacher.from_items is not None) == has_texts
    assert (teacher.blend.ease_penalty, teacher.blend.ease_text_weight) == ((100.0, 100.0) if has_texts else (0.0, 0.0))
    assert (f"ease is left out, {ITEMS} items without texts are more than {ITEMS - 1}" in caplog.text) != has_texts


def test_the_scale_is_the_one_under_which_what_was_held_out_is_likeliest():
    # Four of five users kept the item that scores a quarter more: exp(scale / 4) = 4. What they have seen does not count.
    seen, held_out = csr_matrix(np.float32([[0, 0, 1]] * 5)), csr_matrix(np.float32([[1, 0, 0]] * 4 + [[0, 1, 0]]))
    scores = np.tile(np.float32([[0.25, 0.0, 9.0]]), (5, 1))
    teacher = Teacher(scores, np.eye(3, dtype=np.float32), seen, Blend({}, 0.0, 0.0))
    nearest = min(SCALES, key=lambda scale: abs(scale - 4 * np.log(4)))
    assert best_scale(teacher, np.arange(5), held_out) == nearest == 6.0


def test_a_teacher_of_ials_alone_prefers_what_alike_users_have(make):
    teacher = make("ials")
    logits, alike = teacher.logits(np.arange(USERS)), GROUP_OF_USER[:, None] == GROUP_OF_ITEM
    assert logits[alike].mean() > logits[~alike].mean() + 1
    assert (teacher.blend.user_text_weight, teacher.blend.ease_weight) == (0.0, 0.0)
    assert (teacher.blend.topic_weight, teacher.blend.own_topic_weight, teacher.topics) == (0.0, 0.0, None)
    assert teacher.blend.validation_ndcg_at_100 == pytest.approx(teacher.blend.ials_validation_ndcg_at_100)


def test_texts_are_blended_in_where_validation_likes_them(make, fits):
    blend = make().blend
    assert max(blend.user_text_weight, blend.ease_weight) > 0
    assert blend.validation_ndcg_at_100 > make("ials").blend.validation_ndcg_at_100 + 0.1


def spread(scores):
    return float(scores.std())


def test_topics_add_nearness_to_the_history_and_to_ones_own_text_in_the_spread_of_ials(splits, texts):
    counts = term_counts(corpora_of(texts))
    plain = Teacher(factors(USERS, 3), factors(ITEMS, 3, seed=1), splits[0], Blend({}, 0.0, 0.0))
    topics = Topics.of(plain, counts)
    everyone, ials = np.arange(USERS), plain.scores(np.arange(USERS))
    items, rarity = tf_idf(counts.item)
    directions = np.linalg.svd(items.toarray(), full_matrices=False)[2]
    near = unit(items @ directions[:2].T)
    history = splits[0] @ near / np.sqrt(np.maximum(splits[0].sum(1), 1)) @ near.T
    own = unit(tf_idf(counts.user, rarity)[0] @ directions.T) @ unit(items @ directions.T).T
    for weights in ((0.5, 0.0), (0.0, 0.25), (0.5, 0.25)):
        blend = replace(plain.blend, topics=2, topic_weight=weights[0], own_topic_weight=weights[1])
        added = sum(w * spread(ials) / spread(part) * part for w, part in zip(weights, (history, own), strict=True))
        np.testing.assert_allclose(topics.blended(plain, blend).scores(everyone), ials + added, rtol=1e-3, atol=1e-3)
    nothing = topics.blended(plain, replace(plain.blend, topics=2))
    assert nothing.topics is None


@pytest.mark.parametrize("owners", [USER_TEXT, ITEM_TEXT])
def test_topics_need_texts_of_items_and_for_ones_own_those_of_users(make, fits, texts, monkeypatch, owners):
    monkeypatch.setattr(teacher_module, "USER_TEXT_WEIGHTS", (0.0,))
    monkeypatch.setattr(teacher_module, "EASE_WEIGHTS", (0.0,))
    everything = make().blend
    assert max(everything.topic_weight, everything.own_topic_weight) > 0
    assert everything.validation_ndcg_at_100 > make("ials").blend.validation_ndcg_at_100 + 0.05
    rows = np.flatnonzero(texts.kind == owners)
    columns = {name: getattr(texts, name)[rows] for name in ("kind", "user", "item", "prompt_length")}
    blend = make(texts=Texts(texts.documents.take(rows), **columns)).blend
    assert (blend.topic_weight > 0) == (owners == ITEM_TEXT)
    assert blend.own_topic_weight == 0.0


@pytest.mark.parametrize("kind", ["ials", "blend"])
def test_a_teacher_is_fitted_once_and_opens_to_the_same(make, fits, tmp_path, caplog, monkeypatch, kind):
    monkeypatch.setattr(teacher_module, "RIDGES", (3.0,))
    monkeypatch.setattr(teacher_module, "EASE_WEIGHTS", (0.0,))  # so that there is something left for topics
    with caplog.at_level(logging.INFO, "training"):
        fitted, opened = make(kind, seed=5), make(kind, seed=5)
    assert fits == [5]
    assert opened.blend == fitted.blend
    assert (fitted.topics is not None) == (kind == "blend")
    np.testing.assert_array_equal(opened.logits(np.arange(USERS)), fitted.logits(np.arange(USERS)))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    assert f"validation_ndcg_at_100 {fitted.blend.validation_ndcg_at_100}" in caplog.text


@pytest.mark.parametrize("change", ["train", "validation", "texts", "kind", "seed"])
def test_a_teacher_for_something_else_is_fitted_anew(make, fits, splits, texts, change):
    others = {
        "train": csr_matrix(splits[0].toarray() * (np.arange(ITEMS) > 2)),
        "validation": splits[0],
        "texts": replace(texts, documents=Ragged(texts.documents.values[::-1], texts.documents.offsets)),
        "kind": "ials",
        "seed": 1,
    }
    make()
    make(**{change: others[change]})
    assert len(fits) == 2


def test_without_texts_the_blend_is_of_ials_and_ease(make, fits):
    none = Texts(Ragged.from_lists([]), *(np.empty(0, np.int64) for _ in range(4)))
    blend = make(texts=none).blend
    assert (blend.user_text_weight, blend.ease_text_weight, blend.ials) == (0.0, 0.0, {"factors": 3})
    assert blend.ease_weight > 0
    assert blend.validation_ndcg_at_100 > make("ials").blend.validation_ndcg_at_100 + 0.05


def test_another_runs_settings_are_taken_and_none_are_searched_for(make, splits, texts, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(teacher_module, "RIDGES", (3.0,))
    settings = {"factors": 4, "regularization": 1.0, "alpha": 8.0, "iterations": 3}

    def fit_baselines(train, validation, names, seed):
        found = fit_ials(train, seed=seed, **settings)
        return {"ials": SimpleNamespace(factors=found, settings=settings, validation_ndcg_at_100=0.25)}

    monkeypatch.setattr(teacher_module, "fit_baselines", fit_baselines)
    chosen = make()
    monkeypatch.setattr(teacher_module, "choose", lambda *given: pytest.fail("searched"))
    opened = fit_teacher(*splits, corpora_of(texts), "blend", 0, tmp_path / "other", tmp_path / "teacher")
    np.testing.assert_allclose(opened.scores(np.arange(USERS)), chosen.scores(np.arange(USERS)), rtol=1e-4, atol=1e-4)
    assert replace(opened.blend, ials_validation_ndcg_at_100=0.25) == chosen.blend
    fewer = csr_matrix(splits[0].toarray() * (np.arange(USERS) > 4)[:, None])
    other = fit_teacher(fewer, splits[1], corpora_of(texts), "blend", 0, tmp_path / "fewer", tmp_path / "teacher")
    assert other.blend.ease_text_weight == chosen.blend.ease_text_weight
    assert not other.train[0].nnz
    plain = fit_teacher(fewer, splits[1], corpora_of(texts), "ials", 0, tmp_path / "plain", tmp_path / "teacher")
    assert plain.from_items is None
    assert (plain.blend.ease_weight, plain.blend.user_text_weight) == (0.0, 0.0)
    assert (plain.blend.topic_weight, plain.blend.own_topic_weight) == (0.0, 0.0)
    none = Texts(Ragged.from_lists([]), *(np.empty(0, np.int64) for _ in range(4)))
    silent = fit_teacher(fewer, splits[1], corpora_of(none), "blend", 0, tmp_path / "silent", tmp_path / "teacher")
    assert (silent.blend.ease_text_weight, silent.blend.user_text_weight) == (0.0, 0.0)
    assert (silent.blend.topic_weight, silent.blend.own_topic_weight, silent.topics) == (0.0, 0.0, None)


def test_the_ials_of_a_teacher_is_a_baseline(make, fits, tmp_path):
    assert fitted_ials(tmp_path / "teacher") is None
    teacher = make()
    baseline = fitted_ials(tmp_path / "teacher")
    assert (baseline.name, baseline.settings, baseline.validation_ndcg_at_100) == ("ials", {"factors": 3}, 0.25)
    users = np.array([4, 2])
    np.testing.assert_array_equal(baseline.score(users), teacher.user_factors[users] @ teacher.item_factors.T)


def test_logits_times_a_matrix_come_without_the_logits(splits):
    teacher, users = blended(splits), np.array([3, 0, 3])
    matrix = factors(ITEMS, 5, seed=4)
    np.testing.assert_allclose(teacher.projected(users, matrix), teacher.logits(users) @ matrix, rtol=1e-3, atol=1e-3)
    assert teacher.projected(users, matrix).dtype == np.float32
