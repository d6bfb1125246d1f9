"""What the slow tests share: a shop in files that is learnt in seconds, and scripts in processes of their own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
MAKEFILE = (PROJECT / "Makefile").read_text()


@pytest.fixture(scope="session")
def in_process():
    """Run a command from the project's folder as a person does; its output, or a failure that shows it."""

    def in_process(*command, cwd=PROJECT, **environment):
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr[-5000:]}"
        return done.stdout

    return in_process


@pytest.fixture(scope="session")
def python():
    """The interpreter that runs the suite."""
    return sys.executable


@pytest.fixture(scope="session")
def write_shop():
    """Write a table of thirty people and twenty things, and a recipe in float32 without dropout that reads it."""

    def write_shop(folder, **sections):
        draw = np.random.default_rng(0)
        rows = [
            (f"u{user}", f"i{item}", f"{item} is what {user} wanted")
            for user in range(30)
            for item in draw.permutation(20)[:8]
        ]
        pd.DataFrame(rows, columns=["user", "item", "review"]).to_csv(folder / "shop.csv", index=False)
        decoder = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 64}
        recipe = {
            "output_dir": str(folder / "runs"),
            "device": "cpu",
            "tracker": "none",
            "data": {"path": str(folder / "shop.csv"), "review_column": "review"},
            "backbone": {
                "config": {**decoder, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
                "num_words": 290,
            },
            "method": {"max_text_tokens": 16},
            "pretrain": {"epochs": 2, "batch_size": 7, "mixed_precision": "no"},
            "finetune": {"epochs": 2, "batch_size": 7, "mixed_precision": "no"},
            "evaluation": {"baselines": ["popularity", "ials"]},
        }
        for name, fields in sections.items():
            recipe[name] |= fields
        (folder / "shop.yaml").write_text(yaml.safe_dump(recipe))
        return folder / "shop.yaml"

    return write_shop


@pytest.fixture(scope="session")
def bare(tmp_path_factory, in_process, python):
    """The interpreter of an environment with torch and transformers alone."""
    folder = tmp_path_factory.mktemp("bare")
    in_process(python, "-m", "venv", folder)
    in_process(folder / "bin/python", "-m", "pip", "install", "--quiet", "torch==2.13.0", "transformers>=5.4,<6")
    return folder / "bin/python"


@pytest.fixture(scope="session")
def quickstart_commands():
    """The scripts of the quickstart as the Makefile runs them."""
    lines = MAKEFILE.split("\nquickstart:")[1].split("\n\n")[0].splitlines()[1:]
    return [shlex.split(line.strip().removeprefix("$(BIN)/python")) for line in lines]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory, quickstart_commands, in_process, python):
    """The folder of the run and all that was printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    exported = dict(re.findall(r"^export (\w+) \?= (.*)$", MAKEFILE, re.MULTILINE))
    environment = exported | {name: os.environ[name] for name in exported if name in os.environ}
    shown = [in_process(python, *words, f"output_dir={folder}", **environment) for words in quickstart_commands]
    return folder / "sample", "".join(shown)
