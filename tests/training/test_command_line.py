"""The shell of every script."""

import gc

from training import command_line


def test_a_script_takes_the_libraries_out_of_the_collectors_rounds_before_its_work(monkeypatch):
    done = []
    monkeypatch.setattr(gc, "freeze", lambda: done.append("frozen"))
    command_line.run_plainly(lambda: done.append("worked"))
    assert done == ["frozen", "worked"]
