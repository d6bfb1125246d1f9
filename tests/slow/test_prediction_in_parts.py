"""Ranking shared by two processes and broken off: every part once, and the figures of one process that did it all."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/two_cpu_processes.yaml"]
ONE = ([], {"OMP_NUM_THREADS": "1"})
TWO = (LAUNCH, {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
FIGURES = ("test", "test_by_history", "validation", "bias", "baselines")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_shop, in_process, python):
    """A shop's folder whose model is trained; thirty users make eight batches."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_shop(folder, evaluation={"batch_size": 4})
    for stage in ("pretrain", "finetune"):
        in_process(python, f"training/{stage}.py", "--config", recipe, **ONE[1])
    return folder


@pytest.fixture(scope="module")
def predict(trained, python):
    """Predict in a folder, copied from the trained shop if it is new; what was printed."""

    def predict(processes, folder, *words, killed=-1, batch=0):
        if not (folder / "runs").exists():
            shutil.copytree(trained / "runs", folder / "runs")
        launcher, environment = processes
        words = ["--config", trained / "shop.yaml", f"output_dir={folder / 'runs'}", *words]
        script = ["tests/slow/predict_in_small_parts.py", killed, batch]
        done = subprocess.run(
            list(map(str, [python, *launcher, *script, *words])),
            cwd=PROJECT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == (killed < 0), done.stdout + done.stderr[-5000:]
        return done.stdout

    return predict


@pytest.fixture(scope="module")
def alone(tmp_path_factory, predict):
    """The folder of one process that did it all."""
    folder = tmp_path_factory.mktemp("alone")
    predict(ONE, folder)
    return folder


def figures(folder):
    results = json.loads((folder / "runs/shop/results.json").read_text())
    return {name: results[name] for name in FIGURES}


def parts(folder):
    """Each file of the predictions with its users and the time it was written."""
    return {
        path.name: (pq.read_table(path)["user"].to_pylist(), path.stat().st_mtime_ns)
        for path in sorted((folder / "runs/shop/predictions").glob("part-*"))
    }


def assert_as_alone(folder, alone):
    """Every user once with the same items and scores, and the same figures."""
    mine, theirs = (pq.read_table(of / "runs/shop/predictions").sort_by("user") for of in (folder, alone))
    assert mine.equals(theirs)
    assert len(set(mine["user"].to_pylist())) == len(mine) == 30
    assert figures(folder) == figures(alone)


def test_two_processes_write_each_part_once_to_the_figures_of_one(tmp_path, predict, alone):
    predict(TWO, tmp_path)
    assert list(parts(tmp_path)) == [f"part-{number:05}-of-00006.parquet" for number in range(6)]
    assert_as_alone(tmp_path, alone)


@pytest.mark.parametrize("processes", [ONE, TWO], ids=["one", "two"])
def test_after_a_kill_only_what_is_missing_is_ranked(tmp_path, predict, alone, processes):
    # The second process has written its first part, of two batches, and is in the second.
    predict(TWO, tmp_path, killed=1, batch=3)
    before = parts(tmp_path)
    assert {"part-00000-of-00006.parquet", "part-00001-of-00006.parquet"} <= before.keys()
    assert len(before) < 4
    assert not (tmp_path / "runs/shop/results.json").exists()
    shown = predict(processes, tmp_path, "--resume")
    assert f"{len(before)} of 6 parts are there already" in shown
    after = parts(tmp_path)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "runs/shop/predictions").glob(".*"))
    assert_as_alone(tmp_path, alone)
