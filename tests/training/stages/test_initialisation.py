import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from training.stages.initialisation import start_from_factors
from training.stages.teacher import Blend, Teacher, fit_width


def make_teacher(factors, users=6, items=12):
    generator = np.random.default_rng(0)
    tables = (generator.normal(size=(rows, factors)).astype(np.float32) for rows in (users, items))
    return Teacher(*tables, csr_matrix((users, items), dtype=np.float32), Blend({}, 0.0, 0.0))


@pytest.mark.parametrize("content_tower", [True, False])
def test_the_tables_of_every_tower_start_from_the_factors_at_the_given_spread(make_towers, content_tower):
    base = make_towers(content_tower=content_tower).base
    teacher = make_teacher(factors=20)
    start_from_factors(base, teacher, std=0.05)
    fitted = fit_width(teacher.user_factors, teacher.item_factors, 8)
    for tower in ("collaborative", "content"):
        for table, wanted in zip(base.tables(tower), fitted, strict=True):
            start = table.weight.detach().numpy()[:, : wanted.shape[1]]
            assert start.std() == pytest.approx(0.05, rel=1e-5)
            np.testing.assert_allclose(start * (wanted.std() / 0.05), wanted, rtol=1e-4, atol=1e-6)


def test_the_factor_of_a_single_user_is_no_larger_than_the_spread(make_towers):
    base = make_towers().base
    start_from_factors(base, make_teacher(factors=3, users=1), std=0.05)
    assert base.user_embeddings.weight[0, 0].abs().item() == pytest.approx(0.05)


def test_columns_beyond_the_rank_of_the_factors_stay_as_they_were(make_towers):
    base, before = make_towers().base, make_towers().base.item_embeddings.weight
    start_from_factors(base, make_teacher(factors=3), std=0.05)
    assert torch.equal(base.item_embeddings.weight[:, 3:], before[:, 3:])
    assert not torch.equal(base.item_embeddings.weight[:, :3], before[:, :3])
