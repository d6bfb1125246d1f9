"""Ridge regression from texts, on a world of two groups whose words differ."""

import sys

import numpy as np
import pandas as pd
import pytest

from benchmarks import text_layers
from benchmarks.text_layers import new_items, new_people


@pytest.fixture
def world():
    """People of a group take the things of their group, and speak its words."""
    rows = [
        (f"p{person:02}", f"t{thing:02}") for person in range(40) for thing in range(20) if (person + thing) % 2 == 0
    ]
    people, things = (
        {f"{kind}{number:02}": ("red warm" if number % 2 else "blue cold") for number in range(count)}
        for kind, count in (("p", 40), ("t", 20))
    )
    return pd.DataFrame(rows, columns=["user", "item"]), people, things


def test_words_that_say_the_group_rank_it_first(world):
    frame, people, things = world
    assert new_people(frame, people, None, 0) == pytest.approx(1)
    assert new_items(frame, things, None, 0) == pytest.approx(1)
    same = dict.fromkeys([*people, *things], "word")
    assert new_people(frame, same, None, 0) < 0.95
    assert new_items(frame, same, None, 0) < 0.95


def test_states_say_what_words_do_not(world):
    frame, people, things = world
    of_group = {name: f"word {name}" for name in [*people, *things]}

    def read(texts):
        return np.array([[int(text[-1]) % 2, 1 - int(text[-1]) % 2] for text in texts], np.float32) + 0.1

    assert new_people(frame, of_group, read, 0) == pytest.approx(1)
    assert new_items(frame, of_group, read, 0) == pytest.approx(1)


def test_without_an_encoder_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["text_layers.py", "seed=1"])
    with pytest.raises(SystemExit):
        text_layers.main()
    assert "no text encoder is named: give text_encoder.name" in capsys.readouterr().err
