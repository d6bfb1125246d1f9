"""What the slow tests share: a shop in files that is learnt in seconds, and scripts in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]


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
    """Write a table of thirty people and twenty things, and a recipe without dropout that reads it."""

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
            "pretrain": {"epochs": 2, "batch_size": 7},
            "finetune": {"epochs": 2, "batch_size": 7},
            "evaluation": {"baselines": ["popularity", "ials"]},
        }
        for name, fields in sections.items():
            recipe[name] |= fields
        (folder / "shop.yaml").write_text(yaml.safe_dump(recipe))
        return folder / "shop.yaml"

    return write_shop
