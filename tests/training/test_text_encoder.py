"""A run with a text encoder: read once, fitted, kept beside the weights, pushed, and opened by somebody else."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaModel, pipeline

from configuration.errors import InputError
from configuration.recipe import TextEncoder
from modeling_cllm4rec.handler import EndpointHandler
from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe
from training.data.corpora import open_corpora
from training.finetune import finetune
from training.hub.folder import model_files
from training.hub.publish import publish
from training.predict import predict
from training.pretrain import pretrain
from training.run import Run
from training.stages import text_states
from training.stages.text_states import owners_mean, read_text_states

QUERY = "A thing like number 7 was wanted."


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a pretrained model, as far as the project is concerned."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder)
    train_byte_level_bpe([], 257).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def read_run(store_run, store_frame, vary, encoder, tmp_path_factory):
    """The store, its texts read by the encoder's lowest layer."""
    recipe = vary(
        store_run.recipe,
        output_dir=str(tmp_path_factory.mktemp("read")),
        license="mit",
        text_encoder={"name": str(encoder), "layers": 1, "hub_name": "org/small"},
        evaluation={"baselines": []},
    )
    run = pretrain(recipe, frame=store_frame)
    finetune(recipe)
    predict(recipe)
    return run


def test_the_folder_holds_the_encoder_and_opens_with_it(read_run):
    folder = read_run.model
    kept = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert (kept["num_hidden_layers"], kept["hidden_size"]) == (1, 12)
    assert {path.partition("/")[2] for path in model_files(folder) if path.startswith("text_encoder/")} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert model.config.text_state_width == 12
    assert not [name for name in load_file(folder / "model.safetensors") if "text_encoder" in name]
    states = model.query_states(texts=[QUERY, ""])
    said, nobody = model.model.text_map.states([QUERY])
    assert not torch.allclose(states[0], said[0] + nobody)  # the encoder says something, too
    torch.testing.assert_close(states[1], nobody)
    page = (folder / "README.md").read_text()
    assert "**Text encoder:** [org/small](https://huggingface.co/org/small), the lowest 1 layer" in page


def test_the_pipeline_keeps_the_encoder(read_run, tmp_path):
    rec = pipeline("recommendation", str(read_run.model), trust_remote_code=True)
    rec.add_items([{"id": "new", "title": "A new one", "text": QUERY}])
    rec.save_pretrained(tmp_path)
    again = pipeline("recommendation", str(tmp_path), trust_remote_code=True)
    assert_alike(again, rec)


def test_an_endpoint_reads_with_it(read_run):
    handler = EndpointHandler(str(read_run.model))
    here = pipeline("recommendation", str(read_run.model), trust_remote_code=True)
    answer = handler({"inputs": {"text": QUERY}, "parameters": {"top_k": 3}})
    assert [entry["item"] for entry in answer] == [entry["item"] for entry in here({"text": QUERY}, top_k=3)]


def test_a_push_sends_it_and_somebody_else_opens_it(read_run, hub):
    publish(read_run.folder, "me/reading")
    there = sorted(path for path in hub.repo("me/reading") if path.startswith("text_encoder/"))
    assert [path.rpartition("/")[2] for path in there] == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    rec = pipeline("recommendation", "me/reading", trust_remote_code=True)
    here = pipeline("recommendation", str(read_run.model), trust_remote_code=True)
    assert_alike(rec, here)
    rec.model.push_to_hub("me/copy")
    assert set(there) <= set(hub.repo("me/copy"))


def test_a_model_without_an_encoder_takes_anothers_away(read_run, store_copy, hub, tmp_path):
    publish(read_run.folder, "me/reading")
    plain = Run.of(store_copy).folder
    recipe = plain / "model" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("\nlicense: null", "\nlicense: mit"))
    publish(plain, "me/reading")
    assert not [path for path in hub.repo("me/reading") if path.startswith("text_encoder/")]


def test_words_of_an_encoder_of_the_hub_are_nobodys_ids(read_run, hub, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="training")
    folder = shutil.copytree(read_run.folder, tmp_path / "store")
    words = folder / "model" / "text_encoder" / "bpe.codes"
    words.write_text("person 03\n")
    publish(folder, "me/reading")
    assert b"person 03" in hub.repo("me/reading")["text_encoder/bpe.codes"]
    assert "stands in any file but those of text_encoder/" in caplog.text
    results = folder / "model" / "results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"model": unnamed(results)}))
    with pytest.raises(
        InputError, match=r"raw user ids stand in what goes to me/own \(text_encoder/bpe\.codes: person 03\)"
    ):
        publish(folder, "me/own")


def unnamed(results):
    return json.loads(results.read_text())["model"] | {"text_encoder": None}


def test_what_is_saved_and_pushed_at_once_is_whole(read_run, hub, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(read_run.model, trust_remote_code=True)
    model.save_pretrained(tmp_path / "copy", push_to_hub=True, repo_id="me/copy")
    assert "text_encoder/model.safetensors" in hub.repo("me/copy")


def test_two_threads_open_one_encoder(read_run):
    model = AutoModelForSequenceClassification.from_pretrained(read_run.model, trust_remote_code=True).eval()
    with ThreadPoolExecutor(4) as threads:
        states = list(threads.map(lambda text: model.query_states(texts=[text]), [QUERY] * 8))
    assert torch.get_default_dtype() == torch.float32
    for found in states[1:]:
        torch.testing.assert_close(found, states[0])


def test_a_wrong_encoder_is_found_before_fine_tuning(store_recipe, store_frame, encoder, vary, tmp_path):
    pretrain(store_recipe, frame=store_frame)
    without = shutil.copytree(encoder, tmp_path / "without")
    (without / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"text_encoder\.name: no text encoder can be loaded"):
        finetune(vary(store_recipe, text_encoder={"name": str(without)}))
    run = finetune(vary(store_recipe, text_encoder={"name": str(encoder)}))
    assert (run.model / "text_encoder" / "model.safetensors").is_file()


def test_a_folder_that_lost_it_is_not_pushed(read_run, tmp_path):
    folder = shutil.copytree(read_run.model, tmp_path / "model")
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks text_encoder; run training/finetune\.py"):
        model_files(folder)


def assert_alike(one, other):
    """Two recommenders say the same of a text; scores but for roundings."""
    ours, theirs = (rec({"text": QUERY}, top_k=3) for rec in (one, other))
    assert [entry["item"] for entry in ours] == [entry["item"] for entry in theirs]
    assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in theirs], rel=1e-5)


# What it read.


def test_texts_are_read_once_for_a_run(read_run, encoder, tmp_path, monkeypatch):
    corpora, cpu = open_corpora(read_run.corpora), torch.device("cpu")
    section, kept = read_run.recipe.text_encoder, read_run.checkpoints("text_states") / "states.safetensors"
    cache = Path(shutil.copy(kept, tmp_path))
    asked, read = [], text_states.TextEncoder.__call__
    monkeypatch.setattr(text_states.TextEncoder, "__call__", lambda *given: asked.append(given) or read(*given))
    states = read_text_states(corpora, section, cache, cpu, progress=False)
    assert not asked
    assert (states.users.shape, states.items.shape, states.width) == ((40, 12), (24, 12), 12)
    texts = corpora.texts("content")
    wrote = np.flatnonzero(texts.user == 3)
    words = [texts.documents[place][texts.prompt_length[place] :] for place in wrote]
    mean = read(states.encoder, corpora.tokenizer.batch_decode(words, skip_special_tokens=True)).mean(0)
    np.testing.assert_allclose(states.users[3], mean, atol=1e-5)
    other = read_text_states(corpora, replace(section, layers=2), cache, cpu, progress=False)
    assert asked
    assert not np.allclose(other.users, states.users)
    asked.clear()
    mine = TextEncoder(name=str(shutil.copytree(encoder, tmp_path / "mine")), layers=2)
    read_text_states(corpora, mine, cache, cpu, progress=False)  # the same weights, in another place
    assert not asked
    trained = LlamaModel.from_pretrained(mine.name)
    trained.norm.weight.data *= 2
    trained.save_pretrained(mine.name)
    read_text_states(corpora, mine, cache, cpu, progress=False)
    assert asked
    assert read_text_states(corpora, TextEncoder(), cache, cpu) is None


def test_who_has_no_text_has_no_state():
    states = np.array([[1.0, 2.0], [3.0, 4.0], [np.nan, np.nan], [5.0, 5.0]], np.float32)
    found = owners_mean(states, np.array([1, 1, 2, -1]), 3)
    np.testing.assert_allclose(found, [[np.nan] * 2, [2.0, 3.0], [np.nan] * 2])


@pytest.mark.parametrize(("name", "layers"), [("nowhere", None), (None, 9)])
def test_an_encoder_that_cannot_be_had_is_refused_at_the_start(
    name, layers, store_recipe, store_frame, encoder, tmp_path
):
    section = TextEncoder(name=name or str(encoder), layers=layers)
    with pytest.raises(
        InputError, match=r"text_encoder\.name: no text encoder can be loaded from .* give the name of a Hub repo"
    ):
        pretrain(replace(store_recipe, text_encoder=section), frame=store_frame)
    assert not (tmp_path / "store").exists()


def test_without_texts_nothing_is_read(store_recipe, store_frame, encoder, vary):
    recipe = vary(store_recipe, text_encoder={"name": str(encoder)}, data={"review_column": None})
    pretrain(recipe, frame=store_frame.drop(columns="review"))
    run = finetune(recipe)
    assert not (run.model / "text_encoder").exists()
    assert model_config(run)["text_state_width"] == 0


def model_config(run):
    return json.loads((run.model / "config.json").read_text())
