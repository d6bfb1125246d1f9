import json
import os
import shlex
import subprocess
import sys
import textwrap

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from configuration.load import PROJECT, RECIPES
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.stages.towers import Towers

FOLDER = PROJECT / "configuration" / "accelerate"
NAMES = ["cpu", "two_cpu_processes", "one_gpu", "multi_gpu", "multi_node", "fsdp2"]


def launch(tmp_path, name, **environment):
    """Run a script that writes how each process sees its world; return what they wrote, in order of rank."""
    script = tmp_path / "report.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys
            from pathlib import Path
            import torch
            from accelerate import Accelerator

            accelerator = Accelerator()
            ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
            report = [accelerator.distributed_type.value, accelerator.device.type, accelerator.mixed_precision, ranks]
            Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(report))
            accelerator.end_training()
            """
        )
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]


def test_these_are_all_the_files():
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_every_field_and_takes_the_precision_from_the_recipe(name):
    path = FOLDER / f"{name}.yaml"

    config = load_config_from_file(str(path)).to_dict()

    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(config)
    assert config["compute_environment"] == "LOCAL_MACHINE"
    assert config["mixed_precision"] == "no"


@pytest.mark.parametrize(
    ("name", "distributed_type", "machines", "processes", "cpu"),
    [
        ("cpu", "NO", 1, 1, True),
        ("two_cpu_processes", "MULTI_GPU", 1, 2, True),
        ("one_gpu", "NO", 1, 1, False),
        ("multi_gpu", "MULTI_GPU", 1, 2, False),
        ("multi_node", "MULTI_GPU", 2, 16, False),
        ("fsdp2", "FSDP", 1, 2, False),
    ],
)
def test_the_files_start_what_they_are_named_after(name, distributed_type, machines, processes, cpu):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))

    assert config.distributed_type.value == distributed_type
    assert (config.num_machines, config.num_processes, config.use_cpu) == (machines, processes, cpu)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_when_to_use_it_and_the_command(name):
    about, command = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    words = shlex.split(command.removeprefix("# ").removeprefix("ACCELERATE_USE_CPU=true "))

    arguments = launch_command_parser().parse_args(words[2:])

    assert about.startswith("# ")
    assert words[:2] == ["accelerate", "launch"]
    assert arguments.config_file == f"configuration/accelerate/{name}.yaml"
    assert arguments.training_script == "training/pretrain.py"
    assert arguments.training_script_args[0] == "--config"
    assert (RECIPES / f"{arguments.training_script_args[1]}.yaml").is_file()


@pytest.fixture
def fsdp_plugin(monkeypatch):
    """What Accelerate makes of the environment that its launcher sets from the file."""
    words = ["--config_file", str(FOLDER / "fsdp2.yaml"), "script.py"]
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert set(config.fsdp_config) <= set(vars(launch_command_parser().parse_args(["script.py"])))
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    return FullyShardedDataParallelPlugin()


def test_the_fsdp_fields_reach_a_plugin_of_version_2(fsdp_plugin):
    assert fsdp_plugin.fsdp_version == 2
    assert fsdp_plugin.reshard_after_forward is True
    assert fsdp_plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert fsdp_plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert fsdp_plugin.cpu_ram_efficient_loading is False
    assert fsdp_plugin.activation_checkpointing is False
    assert fsdp_plugin.cpu_offload.__class__.__name__ == "OffloadPolicy"  # of FSDP2: none


@pytest.mark.parametrize(
    ("fields", "layer"),
    [
        ({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1}, "GPT2Block"),
        (
            {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1},
            "LlamaDecoderLayer",
        ),
    ],
)
def test_the_fsdp_policy_wraps_the_layers_of_the_backbone(fsdp_plugin, fields, layer):
    backbone = {**fields, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    towers = Towers(CLLM4RecForRecommendation(CLLM4RecConfig(backbone_config=backbone, num_users=2, num_items=2)), 0.1)

    fsdp_plugin.set_auto_wrap_policy(towers)

    wrapped = fsdp_plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {kind.__name__ for kind in wrapped} == {layer}


@pytest.mark.slow
def test_cpu_runs_one_process_on_the_cpu(tmp_path):
    assert launch(tmp_path, "cpu", OMP_NUM_THREADS="1") == [["NO", "cpu", "no", [0]]]


@pytest.mark.slow
def test_two_cpu_processes_talk_to_each_other(tmp_path):
    reports = launch(tmp_path, "two_cpu_processes", OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")

    assert reports == [["MULTI_CPU", "cpu", "no", [0, 1]]] * 2
