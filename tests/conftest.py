"""What all tests share: quiet libraries, no network, tiny models."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Code of models is copied there to be imported: a folder for each process of the suite, and none in a person's home.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from transformers.utils import logging as transformers_logging

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
transformers_logging.disable_progress_bar()

PROJECT = Path(__file__).resolve().parents[1]


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
