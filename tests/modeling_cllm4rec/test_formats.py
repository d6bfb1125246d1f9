"""Folders that earlier versions saved, `format_N/`, opened by this one; each is kept as it was written."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from modeling_cllm4rec import CLLM4RecConfig, RecommendationPipeline
from modeling_cllm4rec.configuration_cllm4rec import FORMAT_VERSION

FOLDERS = sorted(Path(__file__).parent.glob("format_*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def saved(request):
    """A folder, and what its model gave when it was saved."""
    return request.param, json.loads((request.param / "gave.json").read_text())


def test_every_version_has_its_folder():
    assert [folder.name for folder in FOLDERS] == [f"format_{version + 1}" for version in range(FORMAT_VERSION)]


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [(AutoModel, "base"), (AutoModelForCausalLM, "content"), (AutoModelForSequenceClassification, "recommendation")],
)
def test_every_auto_class_gives_what_it_gave(saved, auto_class, name):
    folder, gave = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = auto_class.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(torch.tensor(gave["input_ids"]))
    given = {
        "base": lambda: output[0],
        "content": lambda: output.logits[:, -1],
        "recommendation": lambda: output.logits,
    }
    torch.testing.assert_close(given[name](), torch.tensor(gave[name]), atol=1e-6, rtol=0)


def test_the_tokenizer_gives_what_it_gave(saved):
    folder, gave = saved
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(gave["text"])["input_ids"] == gave["tokens"]


def test_the_pipeline_gives_what_it_gave(saved):
    folder, gave = saved
    rec = RecommendationPipeline(AutoModelForSequenceClassification.from_pretrained(folder))
    best = rec([{"user": "cas"}, {"history": ["scipy"]}], top_k=3)
    for now, then in zip(best, gave["best"], strict=True):
        assert [entry | {"score": None} for entry in now] == [entry | {"score": None} for entry in then]
        assert [entry["score"] for entry in now] == pytest.approx([entry["score"] for entry in then], abs=1e-6)


def test_a_folder_whose_backbone_reads_texts_says_so(tmp_path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "reading")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_states": False}))
    assert CLLM4RecConfig.from_pretrained(folder).text_state_width == 0
    (folder / "config.json").write_text(json.dumps(config | {"text_states": True}))
    with pytest.raises(Exception, match=r"reads texts with the backbone, .* train it again with text_encoder\.name"):
        CLLM4RecConfig.from_pretrained(folder)


def test_a_folder_of_a_newer_version_says_so(tmp_path):
    folder = shutil.copytree(FOLDERS[-1], tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(
        Exception, match=rf"has format version {FORMAT_VERSION + 1}, this code reads up to {FORMAT_VERSION}"
    ):
        CLLM4RecConfig.from_pretrained(folder)
