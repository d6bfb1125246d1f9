"""What all tests share: a Hub on this computer instead of the network, quiet libraries, tiny models."""
# ruff: noqa: E402 (the libraries read their environment when they are imported)

import atexit
import os
import shutil
import tempfile
import time
import types
from pathlib import Path

from hub_server import HubServer

# A person's token, cache and endpoint are left alone: each process of the suite has a home of its own, and a Hub of its
# own, which knows no repo until a test makes one.
HUB = HubServer().start()
no_proxy = ",".join([os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")), "127.0.0.1", "localhost"])
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ |= {
    "HF_HOME": tempfile.mkdtemp(prefix="hf-home-"),
    "HF_ENDPOINT": HUB.url,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",  # the Hub's other way to store large files, which is not spoken here
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    **dict.fromkeys(["NO_PROXY", "no_proxy"], no_proxy),
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from transformers.utils import logging as transformers_logging

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
atexit.register(HUB.stop)
transformers_logging.disable_progress_bar()

PROJECT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    # huggingface_hub uploads large files in a way that its own HTTP library is about to drop.
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub where the person at this computer is logged in as "me" (see `hub_server.HubServer`).

    Nothing of it is cached yet, and clients that try again after an error do so without waiting.
    """
    HUB.reset()
    home = Path(os.environ["HF_HOME"])
    for cached in (home / "hub", *home.glob("datasets/*___*")):
        shutil.rmtree(cached, ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    no_waiting = types.SimpleNamespace(**(vars(time) | {"sleep": lambda seconds: None}))
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", no_waiting)
    return HUB


@pytest.fixture
def real_data() -> Path:
    """The folder with ml-100k/, digital-music/ …, where it is there."""
    folder = os.environ.get("CLLM4REC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CLLM4REC_DATA names no folder with ml-100k/, digital-music/ and amazon-beauty/")
    return Path(folder)


@pytest.fixture(params=["gpt2", "llama"])
def backbone_config(request):
    """A tiny decoder: words tied to the head and learned positions, or an untied head and rotary ones."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        return GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
