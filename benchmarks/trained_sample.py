"""A run of the embedded sample for benchmarks of what a trained recommender does, not of how good it is."""

import subprocess
import sys
from pathlib import Path

from configuration.load import PROJECT


def train_sample(folder: Path) -> Path:
    """Train the sample for a few epochs, about half a minute.

    Args:
        folder: Where the run is made.

    Returns:
        The run's folder, with `corpora/` and `model/`.
    """
    words = ["--config", "sample", f"output_dir={folder}", "tracker=none", "pretrain.epochs=0", "finetune.epochs=3"]
    for script in ("pretrain.py", "finetune.py"):
        command = [sys.executable, str(PROJECT / "training" / script), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{script} failed:\n{done.stdout}{done.stderr}")
    return folder / "sample"
