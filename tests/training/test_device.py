import os

import pytest
import torch

from training import device, run
from training.device import computes_in_bf16
from training.run import make_accelerator


@pytest.mark.parametrize(
    ("flags", "able"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)],
)
def test_a_processor_computes_in_bf16_if_it_has_instructions_for_it(monkeypatch, flags, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert computes_in_bf16("cpu") == able
    assert not computes_in_bf16("mps")


def test_an_older_torch_does_not_say_so(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not computes_in_bf16("cpu")


@pytest.mark.parametrize("able", [True, False])
def test_a_gpu_is_asked_for_what_it_does_itself(monkeypatch, able):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able and not including_emulation)
    assert device.computes_in_bf16("cuda") == able


@pytest.mark.parametrize(
    ("wanted", "able", "given"),
    [("auto", True, "bf16"), ("auto", False, "no"), ("no", True, "no"), ("bf16", False, "bf16")],
)
def test_auto_is_what_the_machine_can_do(store_recipe, vary, tmp_path, monkeypatch, wanted, able, given):
    kinds = []
    monkeypatch.setattr(run, "computes_in_bf16", lambda kind: kinds.append(kind) or able)
    recipe = vary(store_recipe, pretrain={"mixed_precision": wanted})
    assert make_accelerator(recipe, recipe.pretrain, tmp_path).mixed_precision == given
    assert kinds == (["cpu"] if wanted == "auto" else [])
    assert make_accelerator(recipe, None, tmp_path).mixed_precision == "no"


def test_the_launcher_s_word_for_the_cpu_decides_on_the_precision_too(store_recipe, vary, tmp_path, monkeypatch):
    kinds = []
    monkeypatch.setattr(run, "computes_in_bf16", lambda kind: bool(kinds.append(kind)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = vary(store_recipe, device="auto", pretrain={"mixed_precision": "auto"})
    assert make_accelerator(recipe, recipe.pretrain, tmp_path).device.type == "cpu"
    assert kinds == ["cpu"]


@pytest.mark.parametrize(("cache", "kept"), [("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16"), ("LRU_CACHE_CAPACITY", "1")])
def test_few_kernels_are_kept_unless_the_environment_says_otherwise(store_recipe, tmp_path, monkeypatch, cache, kept):
    monkeypatch.delenv(cache, raising=False)
    make_accelerator(store_recipe, None, tmp_path)
    assert os.environ[cache] == kept
    monkeypatch.setenv(cache, "500")
    make_accelerator(store_recipe, None, tmp_path)
    assert os.environ[cache] == "500"
