"""The weights of a model without its users' embeddings."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from training.hub.folder import INDEX

USER_TABLES = ("user_embeddings.weight", "content_user_embeddings.weight", "user_offsets.weight")


def without_user_embeddings(folder: Path, target: Path) -> dict[str, Path]:
    """Write configuration and weights without the users' values; the number of users, and so every item id, stays.

    Args:
        folder: A model's folder.
        target: An empty folder for the files that differ.

    Returns:
        Name to file of those that differ.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(
        json.dumps(config | {"user_embeddings": False}, indent=2, sort_keys=True) + "\n"
    )
    dropped = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if not any(is_user_table(name) for name in names):
                continue
            tensors = {}
            for name in names:
                tensor = file.get_tensor(name)
                if is_user_table(name):
                    dropped += tensor.numel() * tensor.element_size()
                    tensor = tensor[:0].clone()
                tensors[name] = tensor
            save_file(tensors, target / path.name, metadata=file.metadata())
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"]["total_size"] -= dropped
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {path.name: path for path in target.iterdir()}


def is_user_table(name: str) -> bool:
    """Whether a tensor holds values of users."""
    return name.rpartition("model.")[2] in USER_TABLES
