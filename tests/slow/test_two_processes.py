"""Two processes on the CPU, started as `accelerate launch` starts them, against one: the same steps, losses and figures."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file
from what_was_seen import epochs, losses, seen

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configuration/accelerate/two_cpu_processes.yaml"]
ONE = ([], {"OMP_NUM_THREADS": "1"})
TWO = (LAUNCH, {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
STAGES = ["pretrain", "finetune"]


@pytest.fixture(scope="module")
def watch(in_process, python):
    """Run stages with one process or a stage with two; the folder of the recipe gets what each saw."""

    def watch(processes, folder, stages, *words):
        launcher, environment = processes
        script = ["tests/slow/watched.py", folder, stages]
        return in_process(python, *launcher, *script, "--config", folder / "shop.yaml", *words, **environment)

    return watch


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_shop, watch):
    """Folders in which one process and two processes have run all three stages; one document is left for fine-tuning's last step."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for folder in folders:
        write_shop(folder, finetune={"batch_size": 29})
    watch(ONE, folders[0], "pretrain,finetune,predict")
    for stage in (*STAGES, "predict"):
        watch(TWO, folders[1], stage)
    return folders


@pytest.fixture(scope="module")
def resumed(runs, tmp_path_factory, watch):
    """The runs, broken off after the first epoch of pretraining and gone on with by the other number of processes."""
    folders = []
    for processes, broken_off in ((TWO, runs[0]), (ONE, runs[1])):
        folders.append(tmp_path_factory.mktemp("resumed"))
        shutil.copy(broken_off / "shop.yaml", folders[-1])
        shutil.copytree(broken_off / "pretrain-broken-off", folders[-1] / "runs" / "shop")
        words = ["--resume", f"output_dir={folders[-1] / 'runs'}"]
        assert "resumed after epoch 1" in watch(processes, folders[-1], "pretrain", *words)
    return folders


def test_the_launch_file_starts_two_processes():
    settings = yaml.safe_load((PROJECT / "configuration/accelerate/two_cpu_processes.yaml").read_text())
    assert settings["num_processes"] == 2


@pytest.mark.parametrize(("stage", "steps"), [("pretrain", 62), ("finetune", 4)])
def test_the_loss_of_every_step_is_the_same(runs, stage, steps):
    one, two = (losses(folder, stage) for folder in runs)
    assert len(one) == steps
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_each_document_of_a_step_is_worked_on_by_one_process(runs, stage):
    alone, first, second = seen(runs[0], stage)["steps"], *(seen(runs[1], stage, rank)["steps"] for rank in (0, 1))
    for (name, _, documents), (of_first, _, share), (of_second, _, rest) in zip(alone, first, second, strict=True):
        assert of_first == of_second == name
        assert sorted(share + rest) == sorted(documents)
        assert len(documents) == len(set(documents))
        assert len(share) - len(rest) in (0, 1)


@pytest.mark.parametrize(
    ("stage", "documents"), [("pretrain", {"content": 180, "collaborative": 30}), ("finetune", {"recommendation": 30})]
)
def test_an_epoch_has_every_document_once(runs, stage, documents):
    for name, number in documents.items():
        worked_on = [
            d for rank in (0, 1) for step in seen(runs[1], stage, rank)["steps"] if step[0] == name for d in step[2]
        ]
        assert sorted(worked_on) == sorted(2 * list(range(number)))


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_figures_of_each_epoch_are_the_same(runs, stage):
    one, two = (epochs(folder, stage) for folder in runs)
    assert len(one) == 2
    assert two == [pytest.approx(record, abs=1e-5) for record in one]


def test_results_are_the_same_and_written_once(runs):
    one, two = (json.loads((folder / "runs/shop/results.json").read_text()) for folder in runs)
    for split in ("test", "validation"):
        for figure in ("ndcg_at_100", "recall_at_20", "recall_at_40"):
            assert two[split][figure] == pytest.approx(one[split][figure], abs=1e-5)
    assert (runs[1] / "runs/shop/log").read_text().count("epoch 1/2") == 2


def test_every_user_is_ranked_once_and_alike(runs):
    one, two = (pq.read_table(folder / "runs/shop/predictions").sort_by("user").to_pydict() for folder in runs)
    assert two["user"] == one["user"] == sorted(f"u{user}" for user in range(30))
    for person in range(30):
        scores, theirs = (dict(zip(of["items"][person], of["scores"][person], strict=True)) for of in (two, one))
        assert scores == pytest.approx(theirs, abs=1e-5)


def test_both_processes_took_part(runs):
    kept = runs[1] / "runs/shop/checkpoints/finetune/last"
    assert {path.name for path in kept.glob("random_states_*")} == {"random_states_0.pkl", "random_states_1.pkl"}


@pytest.mark.parametrize("broken_off", [0, 1], ids=["by two what one began", "by one what two began"])
def test_a_run_is_resumed_by_another_number_of_processes_to_the_same_losses(runs, resumed, broken_off):
    rest = losses(resumed[broken_off], "pretrain")
    assert len(rest) == 31
    assert rest == pytest.approx(losses(runs[0], "pretrain")[31:], abs=1e-5)
    assert epochs(resumed[broken_off], "pretrain") == [pytest.approx(r, abs=1e-5) for r in epochs(runs[0], "pretrain")]


@pytest.mark.parametrize("broken_off", [0, 1], ids=["by two what one began", "by one what two began"])
def test_a_run_is_resumed_by_another_number_of_processes_to_the_same_weights(runs, resumed, broken_off):
    weights = [
        load_file(folder / "runs/shop/checkpoints/pretrain/final/model.safetensors")
        for folder in (runs[0], resumed[broken_off])
    ]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5


def test_two_processes_train_on_top_of_another_run_as_one_does(runs, in_process, python):
    weights = []
    for (launcher, environment), name in ((ONE, "top-one"), (TWO, "top-two")):
        words = ["--config", runs[0] / "shop.yaml", "--init-from", runs[0] / "runs/shop", f"name={name}"]
        in_process(python, *launcher, "training/finetune.py", *words, **environment)
        weights.append(load_file(runs[0] / "runs" / name / "model" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5
