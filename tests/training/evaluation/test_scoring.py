"""States of prompts do not depend on how many of them go through the backbone together."""

import numpy as np
import pytest
import torch

from training.evaluation import scoring
from training.evaluation.scoring import ModelScores


@pytest.mark.parametrize(
    ("items", "max_history", "expected"), [(1, 100, 4), (9, 100, 3), (9, 2, 1), (10_000, 100, 1), (10_000, 2, 1)]
)
def test_states_are_the_same_in_passes_of_any_size(
    make_towers, shop, layout, monkeypatch, items, max_history, expected
):
    monkeypatch.setattr(scoring, "ITEMS_PER_PASS_ON_CPU", items)
    model = make_towers(max_history=max_history).recommender
    users, histories = shop.histories("recommendation")
    scores, passes = ModelScores(model, users, histories, layout, max_history), []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    asked = np.array([3, 0, 5, 1])
    states = scores.states(asked)
    assert len(passes) == expected
    for user, state in zip(asked, states, strict=True):
        prompt = model.prepare_prompts([histories[int(np.searchsorted(users, user))].tolist()], [int(user)])
        wanted = model.read_out(model.model(**prompt).last_hidden_state, **prompt)[0]
        torch.testing.assert_close(state, wanted)
