"""Where torch computes, and in what."""

import os

import torch

from configuration.errors import InputError

# Shapes of matrices that oneDNN, which multiplies in bfloat16 on a processor, keeps kernels for. Packed batches have ever new shapes, and
# each takes a quarter to half a megabyte: of the 1024 that oneDNN keeps of its own, and of the 1024 that torch keeps of its own beside
# them, training would grow by hundreds (`python benchmarks/parts.py`). A step takes up to 16 shapes, over and over for its layers.
KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 16, "LRU_CACHE_CAPACITY": 1}


def keep_few_kernels() -> None:
    """Have oneDNN and torch keep [`KERNELS_KEPT`], unless the environment says how many; to be called before the first one is made."""
    for cache, kept in KERNELS_KEPT.items():
        os.environ.setdefault(cache, str(kept))


def computes_in_bf16(kind: str) -> bool:
    """Whether devices of a kind, `cpu` or `cuda`, multiply in bfloat16 by instructions of their own, and so faster than in float32."""
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return kind == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def check_device(name: str) -> torch.device | None:
    """The named device; None for `auto`.

    Raises:
        InputError: naming the devices that are there.
    """
    if name == "auto":
        return None
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is no device; here there are auto, {', '.join(there)}") from error
    if device.type not in {other.split(":")[0] for other in there} or (device.index is not None and name not in there):
        raise InputError(f"device: {name!r} is not on this machine; here there are auto, {', '.join(there)}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
