"""What a run found, as `results.json`, as a table, and as recommendations that a person can judge."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from textwrap import shorten
from typing import Any

import torch

from training.device import computes_in_bf16

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "numpy", "implicit")
METRICS = {"ndcg_at_100": "NDCG@100", "recall_at_20": "Recall@20", "recall_at_40": "Recall@40"}
NAMES = {"popularity": "popularity", "item_knn": "item-kNN", "ease": "EASE", "ials": "iALS"}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the figures depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def hardware(device: torch.device | None = None) -> dict[str, Any]:
    """The kind of machine, as far as it bears on time and memory of what ran on `device`, its GPU's by default."""
    uses_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    accelerator = torch.cuda.get_device_name() if uses_gpu else None
    return {
        "machine": platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "bf16": computes_in_bf16("cuda" if accelerator else "cpu"),
    }


def metrics_table(results: dict[str, Any]) -> str:
    """The test figures of the model and of the baselines, best NDCG@100 last, with standard errors over users."""
    rows = [(NAMES[name], figures) for name, figures in results.get("baselines", {}).items()]
    rows.append(("CLLM4Rec", results["test"]))
    rows.sort(key=lambda row: row[1]["ndcg_at_100"]["value"] or 0.0)
    lines = [f"{'test split':<12}" + "".join(f"{title:>20}" for title in METRICS.values())]
    for name, figures in rows:
        lines.append(f"{name:<12}" + "".join(f"{in_table(figures[key]):>20}" for key in METRICS))
    return "\n".join(lines)


def in_table(mean: dict[str, float | None]) -> str:
    """A mean and its standard error, a dash for what too few users leave undefined."""
    value, error = ("-" if number is None else f"{number:.4f}" for number in (mean["value"], mean["standard_error"]))
    return f"{value} ± {error}"


def show_recommendations(history: Sequence[dict[str, Any]], recommended: Sequence[tuple[dict[str, Any], float]]) -> str:
    """A history and what is recommended for it, with probabilities and descriptions.

    Args:
        history: Rows of `items.jsonl`.
        recommended: Rows of `items.jsonl` with their probability, best first.
    """
    known = ", ".join(item["title"] for item in history[:8]) + (" …" if len(history) > 8 else "")
    lines = [f"history: {known}"]
    for rank, (item, score) in enumerate(recommended, start=1):
        lines.append(f"  {rank}. {item['title']:<28} {score:6.1%}  {shorten(item['text'], 88, placeholder=' …')}")
    return "\n".join(lines)
