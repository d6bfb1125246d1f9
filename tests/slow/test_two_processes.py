"""Two processes on the CPU, started as `accelerate launch` starts them, against one: the same losses and figures."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/two_cpu_processes.yaml"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def epochs(folder, stage):
    records = json.loads((folder / "runs/shop/checkpoints" / stage / "progress.json").read_text())["epochs"]
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_shop, in_process, python):
    """Folders in which one process and two processes have run all three stages."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        recipe = write_shop(folders[processes])
        for stage in ("pretrain", "finetune", "predict"):
            launcher = LAUNCH if processes == 2 else []
            environment = ONE_THREAD | ({"ACCELERATE_USE_CPU": "true"} if processes == 2 else {})
            in_process(python, *launcher, f"training/{stage}.py", "--config", recipe, **environment)
    return folders


def test_the_launch_file_starts_two_processes():
    settings = yaml.safe_load((PROJECT / "configuration/accelerate/two_cpu_processes.yaml").read_text())
    assert settings["num_processes"] == 2


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_losses_and_figures_of_each_epoch_are_the_same(runs, stage):
    one, two = (epochs(runs[processes], stage) for processes in (1, 2))
    assert len(one) == 2
    assert two == [pytest.approx(record, abs=1e-5) for record in one]


def test_both_processes_took_part(runs):
    kept = runs[2] / "runs/shop/checkpoints/finetune/last"
    assert {path.name for path in kept.glob("random_states_*")} == {"random_states_0.pkl", "random_states_1.pkl"}


def test_results_are_the_same_and_written_once(runs):
    one, two = (json.loads((runs[processes] / "runs/shop/results.json").read_text()) for processes in (1, 2))
    for split in ("test", "validation"):
        for figure in ("ndcg_at_100", "recall_at_20", "recall_at_40"):
            assert two[split][figure] == pytest.approx(one[split][figure], abs=1e-5)
    assert len(pq.read_table(runs[2] / "runs/shop/predictions.parquet")) == 30
    assert (runs[2] / "runs/shop/log").read_text().count("epoch 1/2") == 2


def test_a_finished_run_of_two_processes_is_resumed_by_two(runs, in_process, python):
    before = epochs(runs[2], "pretrain")
    environment = ONE_THREAD | {"ACCELERATE_USE_CPU": "true"}
    shown = in_process(
        python, *LAUNCH, "training/pretrain.py", "--config", runs[2] / "shop.yaml", "--resume", **environment
    )
    assert "resumed after epoch 2" in shown
    assert epochs(runs[2], "pretrain") == before
