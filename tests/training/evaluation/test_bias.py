import json

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from training.evaluation.bias import Bias, terciles
from training.evaluation.ranking import evaluate_scores


def matrix(drawn):
    return csr_matrix(drawn.astype(np.float32))


def drawn_ranking(seed=0, users=40, items=130):
    """Training items, held-out items and scores; popular items more likely, some users without held-out items."""
    rng = np.random.default_rng(seed)
    likely = rng.random(items) ** 3
    train = rng.random((users, items)) < likely * 0.3
    train[:, 0] = True
    held_out = (rng.random((users, items)) < likely * 0.15) & ~train
    held_out[::9] = False
    return train, held_out, rng.random((users, items)) + likely


def measured(train, held_out, scores, batch_size=16):
    bias = Bias(matrix(train), matrix(held_out))
    order = np.random.default_rng(1).permutation(len(train))
    score = lambda users: scores[users]  # noqa: E731
    evaluate_scores(score, order, matrix(train), matrix(held_out), batch_size=batch_size, read_block=bias)
    return bias


def ndcg_of(user, relevant, train, scores):
    """NDCG@100 of one user, by the book."""
    ranked = [item for item in np.argsort(-scores[user], kind="stable") if not train[user, item]][:100]
    gains = [1 / np.log2(rank + 2) for rank, item in enumerate(ranked) if item in relevant]
    ideal = [1 / np.log2(rank + 2) for rank in range(min(100, len(relevant)))]
    return sum(gains) / sum(ideal)


def group_of(counts, value):
    """The third of a value, by the book."""
    ends = [sorted(counts)[int(np.ceil(len(counts) * third / 3)) - 1] for third in (1, 2)]
    return sum(value > end for end in ends)


def test_terciles_are_thirds_of_what_differs():
    np.testing.assert_array_equal(terciles(np.array([5, 1, 3, 2, 6, 4])), [2, 0, 1, 0, 2, 1])


def test_equal_counts_stay_in_one_tercile():
    np.testing.assert_array_equal(terciles(np.array([1, 1, 1, 2, 3, 9])), [0, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(terciles(np.array([7, 7, 7, 7])), [0, 0, 0, 0])
    assert terciles(np.array([], int)).tolist() == []


def test_ndcg_by_popularity_counts_held_out_items_of_the_group_alone():
    train, held_out, scores = drawn_ranking()
    groups = measured(train, held_out, scores).to_dict()["by_item_popularity"]
    popularity = train.sum(0)
    of_item = [group_of(popularity, count) for count in popularity]
    for number, group in enumerate(groups):
        wanted = [[j for j in np.flatnonzero(row) if of_item[j] == number] for row in held_out]
        per_user = [ndcg_of(user, items, train, scores) for user, items in enumerate(wanted) if items]
        assert group["num_users"] == len(per_user) > 5
        assert group["ndcg_at_100"]["value"] == pytest.approx(np.mean(per_user))
        assert group["ndcg_at_100"]["standard_error"] == pytest.approx(np.std(per_user, ddof=1) / len(per_user) ** 0.5)
        assert group["held_out"] == sum(map(len, wanted))
        assert group["held_out_share"] == pytest.approx(group["held_out"] / held_out.sum())
        assert (group["items"], group["least"]) == (of_item.count(number), popularity[np.equal(of_item, number)].min())
    assert [group["group"] for group in groups] == ["tail", "middle", "head"]
    assert groups[0]["most"] < groups[1]["least"]


def test_ndcg_by_activity_is_over_the_users_with_held_out_items():
    train, held_out, scores = drawn_ranking()
    groups = measured(train, held_out, scores).to_dict()["by_user_activity"]
    users = np.flatnonzero(held_out.any(1))
    activity = train.sum(1)
    for number, group in enumerate(groups):
        mine = [user for user in users if group_of(activity[users], activity[user]) == number]
        per_user = [ndcg_of(user, set(np.flatnonzero(held_out[user])), train, scores) for user in mine]
        assert group["num_users"] == len(mine) > 5
        assert group["ndcg_at_100"]["value"] == pytest.approx(np.mean(per_user))
        assert (group["least"], group["most"]) == (activity[mine].min(), activity[mine].max())


def test_coverage_is_the_share_of_the_catalogue_in_anyones_list():
    train, held_out, scores = drawn_ranking()
    found = measured(train, held_out, scores).to_dict()
    masked = np.where(train, -np.inf, scores)
    ranked = np.argsort(-masked, axis=1, kind="stable")
    head = [j for j, count in enumerate(train.sum(0)) if group_of(train.sum(0), count) == 2]
    for k in (10, 100):
        shown = [row[:k][masked[user, row[:k]] > -np.inf] for user, row in enumerate(ranked)]
        places = np.concatenate(shown)
        assert found[f"coverage_at_{k}"] == pytest.approx(len(set(places)) / train.shape[1])
        of_head = found["by_item_popularity"][2]
        assert of_head[f"share_at_{k}"] == pytest.approx(np.isin(places, head).mean())
        assert of_head[f"coverage_at_{k}"] == pytest.approx(len(set(places) & set(head)) / len(head))
        bits = [-np.log2(max(train[:, item].sum(), 1) / len(train)) for item in places]
        assert found[f"novelty_at_{k}"] == pytest.approx(np.mean(bits))
    assert found["users_ranked"] == len(train)


def test_novelty_counts_those_who_took_something_and_an_item_that_nobody_took_as_if_one_had():
    train = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], bool)
    found = measured(train, np.zeros_like(train), np.ones((5, 3))).to_dict()
    # Places: both others of each of three people, one of the second's, all three of the last's; log2 of 4 over 4, 1 and 1.
    assert found["novelty_at_10"] == pytest.approx((3 * (2 + 2) + 2 + (0 + 2 + 2)) / (6 + 1 + 3))


def test_shares_of_the_places_add_up_to_one():
    groups = measured(*drawn_ranking()).to_dict()["by_item_popularity"]
    for key in ("share_at_10", "share_at_100", "held_out_share"):
        assert sum(group[key] for group in groups) == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_size_of_the_blocks_changes_nothing(batch_size):
    ranking = drawn_ranking()
    one, other = (measured(*ranking, batch_size=size) for size in (batch_size, 16))
    np.testing.assert_allclose(one.ndcg, other.ndcg, rtol=1e-12)
    np.testing.assert_array_equal(one.places, other.places)


def test_a_baseline_is_compared_with_the_model_user_by_user():
    train, held_out, scores = drawn_ranking()
    model, baseline = (measured(train, held_out, of) for of in (scores, np.zeros_like(scores)))
    found = baseline.to_dict(model)
    difference = (model.ndcg_at_100 - baseline.ndcg_at_100)[held_out.any(1)]
    parts = [group["behind_model"]["value"] * group["num_users"] for group in found["by_user_activity"]]
    assert sum(parts) / len(difference) == pytest.approx(difference.mean())
    head = (model.ndcg[2] - baseline.ndcg[2])[~np.isnan(model.ndcg[2])]
    assert found["by_item_popularity"][2]["behind_model"] == pytest.approx(
        {"value": head.mean(), "standard_error": head.std(ddof=1) / len(head) ** 0.5}
    )


def test_where_nothing_is_held_out_the_figures_are_none_and_coverage_is_measured():
    train, held_out, scores = drawn_ranking()
    found = measured(train, np.zeros_like(held_out), scores).to_dict()
    json.dumps(found, allow_nan=False)
    groups = found["by_item_popularity"] + found["by_user_activity"]
    assert {group["ndcg_at_100"]["value"] for group in groups} == {None}
    assert found["by_item_popularity"][0]["held_out_share"] is None
    assert found["by_user_activity"][0]["least"] is None
    assert 0 < found["coverage_at_10"] <= 1


def test_an_empty_group_has_no_figures():
    train = np.ones((4, 3), bool)
    held_out = np.zeros((4, 3), bool)
    found = measured(train, held_out, np.ones((4, 3))).to_dict()["by_item_popularity"]
    assert [group["items"] for group in found] == [3, 0, 0]
    assert (found[2]["share_at_10"], found[2]["coverage_at_10"], found[2]["least"]) == (None, None, None)
