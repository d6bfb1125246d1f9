import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from configuration.errors import InputError
from configuration.load import load_recipe, recipe_from_dict
from modeling_cllm4rec import CLLM4RecForRecommendation
from training.data.corpora import open_corpora
from training.finetune import finetune
from training.hub.folder import published_recipe
from training.predict import predict
from training.pretrain import pretrain
from training.run import Run
from training.show_corpus import show_corpus
from training.stages import loop
from training.stages.model import learn_backbone

TIMES = ("seconds", "documents_per_second")
FIGURES = ("ndcg_at_100", "recall_at_20", "recall_at_40")
MODEL_FILES = [
    "catalogue_cllm4rec.py",
    "config.json",
    "configuration_cllm4rec.py",
    "generation_config.json",
    "handler.py",
    "items.jsonl",
    "loss_cllm4rec.py",
    "model.safetensors",
    "modeling_cllm4rec.py",
    "packing_cllm4rec.py",
    "pipeline_cllm4rec.py",
    "ranking_cllm4rec.py",
    "records_cllm4rec.py",
    "recipe.yaml",
    "text_cllm4rec.py",
    "text_encoder_cllm4rec.py",
    "tokenization_cllm4rec.py",
    "tokenizer.json",
    "tokenizer_config.json",
]
MEASURED_FILES = ["README.md", "pictures", "results.json"]
BACKBONE = "model.backbone."
LARGER = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 128}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder):
    """Every file with its content and the time of its last change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(run, stage="model"):
    folder = run.model if stage == "model" else run.checkpoints(stage) / ("final" if stage == "pretrain" else "best")
    return load_file(folder / "model.safetensors")


def assert_same(mine, other, atol=0.0):
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def history(run, stage):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in run.epochs(stage)]


def progress(run, stage):
    return json.loads((run.checkpoints(stage) / "progress.json").read_text())


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# What a run leaves


def test_the_folder_of_a_run_holds_what_its_documentation_says(store_run):
    assert names(store_run.folder) == [
        "checkpoints", "corpora", "log", "model", "pictures", "predictions", "recipe.yaml", "results.json",
    ]  # fmt: skip
    assert names(store_run.folder / "pictures") == ["curves.png", "items.png"]
    for stage, kept in (("pretrain", ["best", "final", "last"]), ("finetune", ["best", "choices.json", "last"])):
        assert names(store_run.run.checkpoints(stage)) == [*kept, "progress.json", "stage.json"]


def test_no_temporary_file_is_left(store_run):
    assert [path for path in store_run.folder.rglob("*") if path.name.startswith(".")] == []


def test_the_run_keeps_its_recipe(store_run):
    assert load_recipe(store_run.folder / "recipe.yaml") == store_run.recipe
    assert load_recipe(store_run.folder / "model" / "recipe.yaml") == published_recipe(store_run.recipe)
    assert recipe_from_dict(store_run.results["recipe"]) == store_run.recipe


def test_the_log_has_a_line_per_epoch_and_the_table(store_run):
    log = (store_run.folder / "log").read_text()
    for line in ("epoch 1/2  loss: content", "epoch 2/2  loss: content", "epoch 1/2  loss: recommendation"):
        assert log.count(line) == 1
    assert "CLLM4Rec" in log
    assert "documents/s" in log


def test_results_are_the_figures_of_the_model_and_of_every_baseline(store_run):
    results = json.loads((store_run.folder / "results.json").read_text())
    assert results == json.loads(json.dumps(store_run.results))
    assert sorted(results["baselines"]) == ["ease", "ials", "item_knn", "popularity"]
    for figures in (results["test"], results["validation"], *results["baselines"].values()):
        assert figures["num_users"] == 40
        for name in FIGURES:
            assert sorted(figures[name]) == ["standard_error", "value"]
            assert 0 < figures[name]["value"] <= 1
            assert 0 <= figures[name]["standard_error"] < 0.2
    for baseline in results["baselines"].values():
        assert 0 < baseline["validation_ndcg_at_100"] <= 1
        assert isinstance(baseline["settings"], dict)


def test_results_name_seed_versions_data_cost_and_machine(store_run, store_frame):
    results = store_run.results
    assert results["seed"] == 42
    assert results["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "accelerate", "datasets", "implicit"} <= results["versions"].keys()
    assert list(results["data"]["source"]) == ["DataFrame"]
    assert len(results["data"]["source"]["DataFrame"]) == 64
    assert results["data"]["counts"]["interactions"] == len(store_frame)
    assert results["hardware"]["cpu_threads"] == torch.get_num_threads()
    stages = results["stages"]
    assert list(stages) == ["pretrain", "finetune", "predict"]
    assert results["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))
    assert results["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in stages.values()) > 2**26
    assert [len(stage["epochs"]) for stage in stages.values()] == [2, 2, 0]


def test_validation_in_the_results_is_that_of_the_best_epoch(store_copy, vary):
    recipe = vary(store_copy, method={"text_map": False})
    run = finetune(recipe, overwrite=True)
    best = progress(run, "finetune")["best_ndcg_at_100"]
    assert predict(recipe, overwrite=True)["validation"]["ndcg_at_100"]["value"] == pytest.approx(best, abs=1e-6)


def test_perplexities_of_held_out_reviews_are_reported(store_run):
    measured = store_run.results["review_perplexity"]
    texts = open_corpora(store_run.run.corpora).texts("held_out_reviews")
    assert measured["reviews"] == len(texts) > 0
    assert measured["tokens"] == int((texts.documents.lengths - texts.prompt_length).sum())
    assert all(1 < measured[name] < 1000 for name in ("with_ids", "with_others", "without_ids"))


# The model folder


def test_the_model_folder_holds_exactly_what_the_auto_classes_need(store_run):
    assert names(store_run.folder / "model") == sorted(MODEL_FILES + MEASURED_FILES)


def test_every_auto_class_opens_the_folder_and_gives_what_the_model_gave_in_memory(store_run, caplog):
    folder, gave = store_run.folder / "model", store_run.gave
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.num_words, config.num_users, config.num_items) == (300, 40, 24)
    heads = {
        "content": (AutoModelForCausalLM, "CLLM4RecForContentLM"),
        "recommendation": (AutoModelForSequenceClassification, "CLLM4RecForRecommendation"),
        "base": (AutoModel, "CLLM4RecModel"),
    }
    for name, (auto_class, expected) in heads.items():
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == expected
        with torch.no_grad():
            output = model(gave["input_ids"])
        given = output.last_hidden_state if name == "base" else output.logits
        torch.testing.assert_close(given, gave[name], atol=1e-6, rtol=0)
    assert "newly initialized" not in caplog.text


def test_the_tokenizer_opens_with_and_without_remote_code(store_run):
    for trust in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(store_run.folder / "model", trust_remote_code=trust)
        assert len(tokenizer) == 364
        ids = tokenizer("user_3 has item_23", add_special_tokens=False)["input_ids"]
        assert (ids[0], ids[-1]) == (303, 363)
        assert tokenizer.convert_tokens_to_ids(["user_0", "item_0", "item_23"]) == [300, 340, 363]


def test_items_are_listed_in_id_order_with_their_training_popularity(store_run):
    items = json_lines(store_run.folder / "model" / "items.jsonl")
    assert [item["id"] for item in items] == [f"thing {j:02}" for j in range(24)]
    assert all(sorted(item) == ["id", "popularity", "text", "title"] for item in items)
    _, histories = open_corpora(store_run.run.corpora).histories("recommendation")
    assert [item["popularity"] for item in items] == np.bincount(histories.values, minlength=24).tolist()


def test_users_go_into_the_folder_only_where_the_recipe_publishes_them(store_recipe, store_frame, vary):
    recipe = vary(store_recipe, data={"publish_users": True}, pretrain={"epochs": 0}, finetune={"epochs": 0})
    pretrain(recipe, frame=store_frame)
    run = finetune(recipe)
    assert names(run.model) == sorted([*MODEL_FILES, "users.jsonl"])
    users = json_lines(run.model / "users.jsonl")
    assert [user["id"] for user in users] == [f"person {i:02}" for i in range(40)]
    _, histories = open_corpora(run.corpora).histories("recommendation")
    assert [user["history"] for user in users] == [row.tolist() for row in histories]


def test_weights_in_the_folder_are_those_of_the_best_epoch(store_recipe, store_frame, vary, monkeypatch):
    recipe = vary(store_recipe, pretrain={"epochs": 1}, finetune={"epochs": 3})
    pretrain(recipe, frame=store_frame)
    turn, kept = iter([0.1, 0.3, 0.2]), []

    def scripted(validation):
        kept.append({name: value.clone() for name, value in validation.scores.model.state_dict().items()})
        return {"ndcg_at_100": next(turn)}

    monkeypatch.setattr("training.evaluation.scoring.Validation.__call__", scripted)
    run = finetune(recipe)
    assert progress(run, "finetune")["best_epoch"] == 2
    trained = {
        name: value for name, value in weights(run).items() if "text_" not in name and "user_offsets" not in name
    }
    assert_same(trained, {name: kept[1][name] for name in trained})


@pytest.mark.parametrize("text_map", [True, False])
def test_a_text_map_is_fitted_after_training_where_the_recipe_wants_it(store_recipe, store_frame, vary, text_map):
    recipe = vary(store_recipe, pretrain={"epochs": 0}, finetune={"epochs": 0}, method={"text_map": text_map})
    pretrain(recipe, frame=store_frame)
    run = finetune(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(run.model)
    assert (model.config.num_text_terms > 0) == text_map == ("text map:" in (run.folder / "log").read_text())
    assert any("text_map" in name for name in weights(run)) == text_map
    assert not list(run.folder.glob(".completed-*"))


@pytest.mark.parametrize("wanted", [True, False])
def test_offsets_of_users_are_fitted_after_training_where_the_recipe_wants_them(
    store_recipe, store_frame, vary, wanted
):
    method = {"user_offsets": wanted, "text_map": False, "distillation": 0.5}
    recipe = vary(store_recipe, pretrain={"epochs": 0}, finetune={"epochs": 0}, method=method)
    pretrain(recipe, frame=store_frame)
    run = finetune(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(run.model)
    assert model.config.user_offsets == wanted == ("user offsets:" in (run.folder / "log").read_text())
    assert any("user_offsets" in name for name in weights(run)) == wanted


# Predictions


def test_every_user_has_the_best_unseen_items_once_with_raw_ids(store_run, store_frame):
    rows = pq.read_table(store_run.folder / "predictions").to_pylist()
    assert sorted(row["user"] for row in rows) == sorted(set(store_frame["user"]))
    corpora = open_corpora(store_run.run.corpora)
    raw_users, raw_items = ([row["id"] for row in table] for table in (corpora.users(), corpora.items()))
    seen = {user: set() for user in raw_users}
    for split in ("recommendation", "validation"):
        for user, items in zip(*corpora.histories(split), strict=True):
            seen[raw_users[user]] |= {raw_items[j] for j in items}
    for row in rows:
        assert len(set(row["items"])) == len(row["items"]) == store_run.recipe.evaluation.top_k == 12
        assert not seen[row["user"]] & set(row["items"])
        assert row["scores"] == sorted(row["scores"], reverse=True)


def test_scores_are_the_probabilities_that_recommend_gives(store_run):
    model = AutoModelForSequenceClassification.from_pretrained(store_run.folder / "model", trust_remote_code=True)
    corpora = open_corpora(store_run.run.corpora)
    items = [item["id"] for item in corpora.items()]
    users, histories = corpora.histories("recommendation")
    everything = model.recommend([row.tolist() for row in histories], users.tolist(), k=24, exclude_seen=False)
    raw = [user["id"] for user in corpora.users()]
    for row in pq.read_table(store_run.folder / "predictions").to_pylist():
        place = users.tolist().index(raw.index(row["user"]))
        whole = dict(zip(everything.items[place].tolist(), everything.scores[place].tolist(), strict=True))
        assert sum(whole.values()) == pytest.approx(1, abs=1e-5)
        for item, score in zip(row["items"], row["scores"], strict=True):
            assert score == pytest.approx(whole[items.index(item)], abs=1e-6)


def test_whole_number_ids_stay_whole_numbers(store_recipe, store_frame, vary):
    frame = store_frame.assign(
        user=store_frame["user"].str[-2:].astype(int) * 7, item=store_frame["item"].str[-2:].astype(int)
    )
    recipe = vary(store_recipe, pretrain={"epochs": 0}, finetune={"epochs": 0}, data={"examples": [[3, 4]]})
    pretrain(recipe, frame=frame)
    run = finetune(recipe)
    predict(recipe)
    table = pq.read_table(run.folder / "predictions").to_pydict()
    assert sorted(table["user"]) == sorted(range(0, 280, 7))
    assert {item for items in table["items"] for item in items} <= set(range(24))
    assert [item["id"] for item in json_lines(run.model / "items.jsonl")] == list(range(24))
    assert "history: 3, 4" in (run.folder / "log").read_text()


def test_the_test_split_changes_nothing_in_training(store_copy, store_run, store_frame):
    run = Run.of(store_copy)
    for held_out in ("test", "held_out_reviews"):
        shutil.rmtree(run.corpora / held_out)
    pretrain(store_copy, frame=store_frame, overwrite=True)
    finetune(store_copy)
    assert names(run.corpora) == sorted(set(names(store_run.run.corpora)) - {"test", "held_out_reviews"})
    assert_same(weights(run), weights(store_run.run))


def test_results_without_a_test_split_say_so(store_recipe, store_frame, vary, capsys):
    place = store_frame.groupby("user").cumcount()
    frame = store_frame.assign(split=np.where(place == 9, "validation", "train"))
    recipe = vary(
        store_recipe, data={"split": "given"}, evaluation={"baselines": ["popularity"]},
        pretrain={"epochs": 0}, finetune={"epochs": 0},
    )  # fmt: skip
    pretrain(recipe, frame=frame)
    finetune(recipe)
    results = predict(recipe)
    assert results["test"]["ndcg_at_100"] == {"value": None, "standard_error": None}
    assert results["validation"]["num_users"] == 40
    assert "- ± -" in capsys.readouterr().out


# Refusals, each before anything is changed


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "predict"])
def test_a_stage_that_was_run_is_refused_without_resume_or_overwrite(store_copy, store_frame, stage):
    before = snapshot(Run.of(store_copy).folder)
    calls = {
        "pretrain": lambda: pretrain(store_copy, frame=store_frame),
        "finetune": lambda: finetune(store_copy),
        "predict": lambda: predict(store_copy),
    }
    with pytest.raises(InputError, match=r"exists already; .*--overwrite"):
        calls[stage]()
    assert snapshot(Run.of(store_copy).folder) == before


@pytest.mark.parametrize(
    ("stage", "changes", "way"),
    [
        ("pretrain", {"frame": "fewer"}, "resume"),
        ("pretrain", {"backbone": {"config": LARGER}}, "resume"),
        ("pretrain", {"backbone": {"train": "none"}}, "resume"),
        ("pretrain", {"pretrain": {"lr": 1e-3}}, "resume"),
        ("pretrain", {"data": {"split": "leave_last_out"}}, "resume"),
        ("pretrain", {"backbone": {"config": {"model_type": "gtp2"}}}, "overwrite"),
        ("pretrain", {"backbone": {"config": LARGER | {"n_head": 3}}}, "overwrite"),
        ("pretrain", {"backbone": {"config": LARGER | {"n_embd": "wide"}}}, "overwrite"),
        ("pretrain", {"backbone": {"name": "no/such"}}, "overwrite"),
        ("finetune", {"backbone": {"config": LARGER}}, "overwrite"),
        ("finetune", {"backbone": {"config": LARGER}}, "resume"),
        ("finetune", {"method": {"lambda_v": 0.2}}, "overwrite"),
        ("finetune", {"method": {"teacher": "blend"}}, "overwrite"),
        ("finetune", {"finetune": {"lr": 1e-3}}, "resume"),
        ("predict", {"backbone": {"config": LARGER}}, "overwrite"),
        ("predict", {"finetune": {"lr": 1e-3}}, "overwrite"),
        ("predict", {"data": {"examples": [["thing 01", "thing 99"]]}}, "overwrite"),
        ("pretrain", {}, "both"),
        ("finetune", {}, "both"),
        ("predict", {}, "both"),
    ],
    ids=str,
)
def test_another_data_set_backbone_or_recipe_is_refused(store_copy, store_frame, vary, stage, changes, way):
    changes = dict(changes)
    frame = store_frame[:-1] if changes.pop("frame", None) else store_frame
    recipe, before = vary(store_copy, tracker="tensorboard", **changes), snapshot(Run.of(store_copy).folder)
    how = {"resume": way in ("resume", "both"), "overwrite": way in ("overwrite", "both")}
    calls = {
        "pretrain": lambda: pretrain(recipe, frame=frame, **how),
        "finetune": lambda: finetune(recipe, **how),
        "predict": lambda: predict(recipe, **how),
    }
    with pytest.raises(InputError) as error:
        calls[stage]()
    assert "\n" not in str(error.value)
    after = snapshot(Run.of(store_copy).folder)
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == set()


def test_a_start_that_is_not_there_is_refused_before_anything_is_overwritten(store_copy, store_frame, vary):
    folder = Run.of(store_copy).folder
    before = snapshot(folder)
    with pytest.raises(InputError, match="--init-from nowhere: no trained run is there"):
        pretrain(vary(store_copy, pretrain={"epochs": 1}), frame=store_frame, overwrite=True, init_from="nowhere")
    after = snapshot(folder)
    assert [path.name for path in after if after[path] != before.get(path)] == ["log"]
    assert after.keys() == before.keys()


def test_fine_tuning_of_a_run_without_an_epoch_is_refused_for_another_backbone(store_recipe, store_frame, vary):
    recipe = vary(store_recipe, pretrain={"epochs": 0})
    pretrain(recipe, frame=store_frame)
    with pytest.raises(InputError, match="belongs to another data set, backbone or recipe"):
        finetune(vary(recipe, backbone={"config": LARGER}))


def test_stages_out_of_order_are_refused_and_leave_nothing(store_recipe):
    folder = Path(store_recipe.output_dir)
    with pytest.raises(InputError, match=r"no pretrained model is there; run training/pretrain\.py"):
        finetune(store_recipe)
    with pytest.raises(InputError, match=r"no trained model is there; run training/pretrain\.py and training/finetune"):
        predict(store_recipe)
    assert names(folder) == []


def test_a_model_older_than_the_pretraining_is_not_measured(store_copy, store_frame, vary):
    recipe = vary(store_copy, pretrain={"epochs": 1})
    pretrain(recipe, frame=store_frame, overwrite=True)
    with pytest.raises(InputError, match="older than the pretraining"):
        predict(recipe, overwrite=True)


def test_data_without_anything_to_validate_on_are_refused_and_leave_nothing(store_recipe, store_frame):
    with pytest.raises(InputError, match=r"data\.split: no user has an item for validation"):
        pretrain(store_recipe, frame=store_frame.groupby("user").head(2))
    assert names(Path(store_recipe.output_dir)) == []


# Resuming


def break_off(monkeypatch, after):
    """Make the loop fail in its step number `after`."""
    step, done = loop.train_step, []

    def failing(*arguments, **options):
        done.append(1)
        if len(done) == after:
            raise RuntimeError("the power is gone")
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", failing)


def resume_pretraining(recipe, frame, monkeypatch, after):
    with monkeypatch.context() as patch:
        break_off(patch, after)
        with pytest.raises(RuntimeError, match="power"):
            pretrain(recipe, frame=frame)
    return pretrain(recipe, frame=frame, resume=True)


@pytest.mark.parametrize("after", [2, 16], ids=["first epoch", "second epoch"])
def test_an_interrupted_pretraining_continues_to_the_same_numbers(
    store_recipe, store_run, store_frame, monkeypatch, after
):
    run = resume_pretraining(store_recipe, store_frame, monkeypatch, after)
    assert history(run, "pretrain") == history(store_run.run, "pretrain")
    assert_same(weights(run, "pretrain"), weights(store_run.run, "pretrain"))


def test_an_interrupted_fine_tuning_continues_to_the_same_numbers(store_copy, store_run, monkeypatch):
    with monkeypatch.context() as patch:
        break_off(patch, 5)
        with pytest.raises(RuntimeError, match="power"):
            finetune(store_copy, overwrite=True)
    run = Run.of(store_copy)
    assert progress(run, "finetune")["epoch"] == 1
    finetune(store_copy, resume=True)
    assert history(run, "finetune") == history(store_run.run, "finetune")
    assert_same(weights(run), weights(store_run.run))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_interrupted_run_with_lora_and_dropout_continues_to_the_same_numbers(
    store_recipe, store_frame, vary, monkeypatch, tmp_path
):
    decoder = store_recipe.backbone.config | {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    recipe = vary(store_recipe, backbone={"config": decoder, "train": "lora"})
    whole = pretrain(replace(recipe, output_dir=str(tmp_path / "whole")), frame=store_frame)
    broken = resume_pretraining(recipe, store_frame, monkeypatch, after=16)
    assert history(broken, "pretrain") == history(whole, "pretrain")
    assert_same(weights(broken, "pretrain"), weights(whole, "pretrain"))


def test_resuming_a_finished_run_changes_no_weight(store_copy, store_run, store_frame):
    pretrain(store_copy, frame=store_frame, resume=True)
    run = finetune(store_copy, resume=True)
    assert history(run, "pretrain") == history(store_run.run, "pretrain")
    assert_same(weights(run, "pretrain"), weights(store_run.run, "pretrain"))
    assert_same(weights(run), weights(store_run.run))


def test_overwriting_pretraining_drops_the_fine_tuning_that_stood_on_it(store_copy, store_frame):
    run = pretrain(store_copy, frame=store_frame, overwrite=True)
    assert not run.checkpoints("finetune").exists()


# Seeds


def test_the_seed_is_in_the_name_of_the_folder_unless_it_is_the_usual_one(store_recipe):
    assert Run.of(store_recipe).folder.name == "store"
    assert Run.of(replace(store_recipe, seed=7)).folder.name == "store-seed7"


def test_the_same_seed_gives_the_same_weights_and_figures_and_another_others(
    store_recipe, store_run, store_frame, vary
):
    runs = {}
    for seed in (42, 7):
        recipe = vary(store_recipe, seed=seed, evaluation={"top_k": 12})
        pretrain(recipe, frame=store_frame)
        runs[seed] = finetune(recipe)
        results = predict(recipe)
        assert (results["test"] == store_run.results["test"]) is (seed == 42)
        assert (results["review_perplexity"] == store_run.results["review_perplexity"]) is (seed == 42)
    assert_same(weights(runs[42]), weights(store_run.run))
    mine, other = weights(runs[42]), weights(runs[7])
    assert not any(torch.equal(mine[name], other[name]) for name in mine if "embeddings" in name)


# Starting from another run


def split_as(frame, folder):
    """The frame with the split of an earlier run; pairs that it does not know are trained on."""
    corpora = open_corpora(folder / "corpora")
    users, items = ([row["id"] for row in rows] for rows in (corpora.users(), corpora.items()))
    known = {(users[row["user"]], items[row["item"]]): row["split"] for row in corpora.interactions().to_pylist()}
    pairs = zip(frame["user"], frame["item"], strict=True)
    return frame.assign(split=[known.get(pair, "train") for pair in pairs])


def start_from(recipe, frame, other, vary, split="given"):
    recipe = vary(recipe, name="next", pretrain={"epochs": 0}, data={"split": split})
    return pretrain(recipe, frame=split_as(frame, other), init_from=other)


def test_rows_are_copied_by_raw_id_also_where_users_and_items_differ(store_recipe, store_run, store_frame, vary):
    frame = store_frame[store_frame["item"] != "thing 03"].copy()
    frame["user"] = frame["user"].replace({"person 07": "a stranger", "person 20": "person 99"})
    frame["item"] = frame["item"].replace({"thing 11": "novelty"})
    run = start_from(store_recipe, frame, store_run.folder, vary)
    mine, other = weights(run, "pretrain"), weights(store_run.run)
    corpora = {name: open_corpora(folder.corpora) for name, folder in (("mine", run), ("other", store_run.run))}
    for kind in ("user", "item"):
        here, there = ([row["id"] for row in getattr(of, f"{kind}s")()] for of in corpora.values())
        assert here != there
        for table in (f"model.{kind}_embeddings.weight", f"model.content_{kind}_embeddings.weight"):
            for place, raw in enumerate(here):
                known = raw in there
                source = other[table][there.index(raw)] if known else other[table]
                assert (
                    torch.equal(mine[table][place], source)
                    if known
                    else not (mine[table][place] == source).all(1).any()
                )
    here, there = ([row["id"] for row in of.items()] for of in corpora.values())
    bias = [other["model.item_bias"][there.index(raw)].item() if raw in there else 0.0 for raw in here]
    assert mine["model.item_bias"].tolist() == bias
    for name in (name for name in mine if name.startswith(BACKBONE)):
        assert torch.equal(mine[name], other[name])


def test_items_that_went_since_training_are_not_taken_for_others(store_copy, store_frame, vary):
    other = Run.of(store_copy)
    recommend = pipeline("recommendation", model=str(other.model), trust_remote_code=True)
    recommend.remove_items(["thing 03"])
    recommend.save_pretrained(other.model)
    run = start_from(store_copy, store_frame, other.folder, vary)
    mine, theirs = (
        weights(of, stage)["model.item_embeddings.weight"] for of, stage in ((run, "pretrain"), (other, "model"))
    )
    here = [row["id"] for row in open_corpora(run.corpora).items()]
    gone = here.index("thing 03")
    assert torch.equal(torch.cat([mine[:gone], mine[gone + 1 :]]), theirs)
    assert not (theirs == mine[gone]).all(1).any()


@pytest.mark.parametrize("change", ["add_users", "add_items", "remove_items"])
def test_a_model_whose_catalogue_has_changed_since_is_not_measured(store_copy, change):
    run = Run.of(store_copy)
    users = run.corpora / "users.jsonl"
    recommend = pipeline("recommendation", model=str(run.model), users=users, trust_remote_code=True)
    given = {
        "add_users": [{"id": "somebody", "history": ["thing 03"]}],
        "add_items": [{"id": "something", "text": "new"}],
        "remove_items": ["thing 03"],
    }
    if change == "add_items":  # the store's model reads no texts
        config = json.loads((run.model / "config.json").read_text())
        (run.model / "config.json").write_text(json.dumps(config | {"num_users": config["num_users"] + 1}))
    else:
        getattr(recommend, change)(given[change])
        recommend.save_pretrained(run.model, users=run.folder / "users.jsonl")
    with pytest.raises(InputError, match=r"was not trained on .*, or items or users have come or gone since"):
        predict(store_copy, overwrite=True)


def test_a_start_from_a_model_with_other_items_beside_it_is_refused(store_copy, store_frame, vary):
    items = Run.of(store_copy).model / "items.jsonl"
    lines = items.read_text().splitlines(keepends=True)
    items.write_text("".join(lines[1:]))
    with pytest.raises(InputError, match=r"items.jsonl has 23 lines, but the model has 24 items"):
        start_from(store_copy, store_frame, Run.of(store_copy).folder, vary)
    items.unlink()
    with pytest.raises(InputError, match=r"items.jsonl.*its items cannot be told apart"):
        start_from(store_copy, store_frame, Run.of(store_copy).folder, vary)


def test_a_model_with_one_tower_takes_the_collaborative_embeddings(store_recipe, store_frame, vary, backbone_folder):
    recipe = vary(store_recipe, backbone={"name": str(backbone_folder), "train": "none"})
    source = trained(vary(recipe, name="source"), store_frame)
    run = start_from(vary(recipe, method={"content_tower": False}), store_frame, source.folder, vary)
    mine, other = weights(run, "pretrain"), weights(source)
    for table in ("model.user_embeddings.weight", "model.item_embeddings.weight"):
        assert torch.equal(mine[table], other[table])
        assert not torch.equal(other[table], other[table.replace("model.", "model.content_")])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backbone": {"config": LARGER}}, "another backbone or vocabulary"),
        ({"backbone": {"num_words": 310}}, "another backbone or vocabulary"),
        ({}, "knows none of this data set's items"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_and_leaves_nothing(
    store_recipe, store_run, store_frame, vary, changes, complaint
):
    frame = store_frame if changes else store_frame.assign(item=store_frame["item"] + " b")
    with pytest.raises(InputError, match=complaint):
        start_from(vary(store_recipe, **changes), frame, store_run.folder, vary, "given" if changes else "random")
    assert names(Path(store_recipe.output_dir)) == []


@pytest.mark.parametrize("split", ["random", "leave_last_out", "given"])
def test_held_out_pairs_that_the_other_run_was_trained_on_are_trained_on(
    store_recipe, store_run, store_frame, vary, split
):
    before = split_as(store_frame, store_run.folder)
    learnt = set(zip(*(before.loc[before["split"] == "train", name] for name in ("user", "item")), strict=True))
    shifted = before.assign(split=before["split"].shift(1, fill_value="train"))
    newer = [
        pd.DataFrame({"user": before["user"].unique()[:12], "item": name, "time": 9_999, "split": name})
        for name in ("validation", "test")
    ]
    frame = pd.concat([shifted, *newer], ignore_index=True)
    run = pretrain(vary(store_recipe, name="next", data={"split": split}), frame=frame, init_from=store_run.folder)
    after = split_as(frame.drop(columns="split"), run.folder)
    pairs = list(zip(after["user"], after["item"], strict=True))
    assert {name for pair, name in zip(pairs, after["split"], strict=True) if pair in learnt} == {"train"}
    assert {"validation", "test"} <= set(after["split"])
    info = open_corpora(run.corpora).info
    moved = info["filtered"]["held_out_pairs_trained_on_before"]
    assert f"{moved} held out pairs trained on before" in (run.folder / "log").read_text()
    assert f"what {store_run.folder.name} was trained on" in info["source"]


def test_a_start_from_a_run_that_was_trained_on_all_that_is_held_out_is_refused(
    store_recipe, store_run, store_frame, vary
):
    frame = split_as(store_frame, store_run.folder)
    frame = frame[frame["split"] == "train"].drop(columns="split")
    with pytest.raises(InputError, match="it was trained on all that is held out here for validation"):
        pretrain(vary(store_recipe, name="next"), frame=frame, init_from=store_run.folder)
    assert names(Path(store_recipe.output_dir)) == []


def test_ids_are_known_by_their_text_whatever_else_is_in_the_table(store_recipe, store_frame, vary):
    frame = store_frame.assign(user=store_frame["user"].str[-2:].astype(int))
    first = trained(store_recipe, frame)
    guest = frame[frame["user"] == 7].assign(user="guest")
    newer = pd.concat([frame.astype({"user": str}), guest], ignore_index=True)
    recipe = vary(store_recipe, name="next", seed=7, pretrain={"epochs": 0})
    run = pretrain(recipe, frame=newer, init_from=first.folder)
    assert open_corpora(run.corpora).info["filtered"]["held_out_pairs_trained_on_before"] > 0
    theirs, here = (
        {str(row["id"]): place for place, row in enumerate(open_corpora(of.corpora).users())} for of in (first, run)
    )
    known, mine = (
        weights(of, stage)["model.user_embeddings.weight"] for of, stage in ((first, "model"), (run, "pretrain"))
    )
    assert len(here) == len(theirs) + 1
    assert all(torch.equal(mine[here[user]], known[theirs[user]]) for user in theirs)


def test_pairs_that_an_earlier_run_of_a_chain_was_trained_on_are_trained_on(store_recipe, store_run, store_frame, vary):
    before = split_as(store_frame, store_run.folder)
    learnt = before[before["split"] == "train"]
    second = pretrain(
        vary(store_recipe, name="second", data={"split": "given"}, pretrain={"epochs": 0}),
        frame=before[~before.index.isin(learnt.groupby("user").head(2).index)], init_from=store_run.folder,
    )  # fmt: skip
    (second.folder / "model").symlink_to(store_run.folder / "model")
    third = vary(store_recipe, name="third", seed=5, pretrain={"epochs": 0})
    run = pretrain(third, frame=store_frame, init_from=second.folder)
    after = split_as(store_frame, run.folder)
    held_out = set(after[after["split"] != "train"][["user", "item"]].itertuples(index=False, name=None))
    assert held_out
    assert not held_out & set(learnt[["user", "item"]].itertuples(index=False, name=None))


def test_corpora_of_a_start_from_another_run_are_built_again_as_they_were(
    store_recipe, store_run, store_frame, vary, tmp_path
):
    store_frame.to_csv(tmp_path / "shop.csv", index=False)
    recipe = vary(store_recipe, name="next", seed=5, pretrain={"epochs": 0}, data={"path": str(tmp_path / "shop.csv")})
    run = pretrain(recipe, init_from=store_run.folder)
    before = open_corpora(run.corpora).info
    assert before["filtered"]["held_out_pairs_trained_on_before"] > 0
    shutil.rmtree(run.corpora)
    show_corpus(recipe)
    assert open_corpora(run.corpora).info["fingerprint"] == before["fingerprint"]


def test_the_baseline_of_a_start_from_another_run_is_searched_for(store_recipe, store_frame, vary):
    method = {"initialisation": "ials", "distillation": 0.5, "teacher": "ials"}
    recipe = vary(store_recipe, method=method, evaluation={"baselines": ["ials"]})
    first = trained(recipe, store_frame)
    blend = first.checkpoints("teacher") / "blend.json"
    chosen = json.loads(blend.read_text())
    blend.write_text(json.dumps(chosen | {"ials": chosen["ials"] | {"alpha": 5}}))
    again = vary(recipe, name="next", data={"split": "given"})
    finetune(again, frame=split_as(store_frame, first.folder), init_from=first.folder)
    assert predict(again)["baselines"]["ials"]["settings"] == chosen["ials"]


def test_a_head_that_is_not_tied_to_the_words_is_copied_too(store_recipe, store_frame, vary):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = {"config": {"model_type": "llama", **sizes}, "train": "full"}
    recipe = vary(store_recipe, backbone=backbone)
    first = trained(recipe, store_frame)
    run = start_from(recipe, store_frame, first.folder, vary)
    head = weights(run, "pretrain")["model.word_head"]
    assert torch.equal(head, weights(first, "model")["model.word_head"])


def test_going_on_keeps_a_pretraining_that_is_finished(store_recipe, store_run, store_frame, vary):
    recipe = vary(store_recipe, name="next", data={"split": "given"}, pretrain={"epochs": 1})
    frame = split_as(store_frame, store_run.folder)
    run = pretrain(recipe, frame=frame, init_from=store_run.folder)
    with pytest.raises(InputError, match="exclude each other"):
        finetune(recipe, frame=frame, init_from=store_run.folder, resume=True, overwrite=True)
    with pytest.raises(InputError, match=r"did not start from .*other; go on without it, with --init-from"):
        finetune(recipe, frame=frame, init_from=store_run.folder / "other", resume=True)
    finetune(recipe, frame=frame, init_from=store_run.folder, resume=True)
    assert progress(run, "pretrain")["epoch"] == 1


def test_a_start_from_items_with_a_bias_is_refused_where_there_is_none(store_recipe, store_run, store_frame, vary):
    recipe = vary(store_recipe, name="next", data={"split": "given"}, method={"item_bias": False})
    frame = split_as(store_frame, store_run.folder)
    with pytest.raises(InputError, match="its items have a bias, which this recipe leaves out; set method"):
        finetune(recipe, frame=frame, init_from=store_run.folder)


def test_fine_tuning_on_top_of_another_run_needs_no_pretraining(store_recipe, store_frame, vary):
    method = {"initialisation": "ials", "distillation": 0.5, "teacher": "blend"}
    recipe = vary(store_recipe, method=method)
    first = trained(recipe, store_frame[store_frame["user"] != "person 07"])
    again = vary(recipe, name="next", data={"split": "given"})
    store_frame = split_as(store_frame, first.folder)
    run = finetune(again, frame=store_frame, init_from=first.folder)
    assert progress(run, "pretrain")["epoch"] == 0
    assert "teacher: with another run's settings" in (run.folder / "log").read_text()
    results = predict(again)
    assert results["test"]["ndcg_at_100"]["value"] > 0
    with pytest.raises(InputError, match="exists already"):
        finetune(again, frame=store_frame, init_from=first.folder)
    before = weights(run)
    assert_same(weights(finetune(again, frame=store_frame, init_from=first.folder, overwrite=True)), before)
    assert_same(weights(finetune(again, frame=store_frame, init_from=first.folder, resume=True)), before)


# Variants of the recipe


def test_a_pretrained_backbone_keeps_its_weights_where_it_is_frozen(store_recipe, store_frame, vary, backbone_folder):
    run = trained(vary(store_recipe, backbone={"name": str(backbone_folder), "train": "none"}), store_frame)
    pretrained = load_file(backbone_folder / "model.safetensors")
    kept = {name.removeprefix(BACKBONE): value for name, value in backbone_of(weights(run)).items()}
    assert_same(kept, {name.removeprefix("transformer."): value for name, value in pretrained.items()})
    words = AutoTokenizer.from_pretrained(backbone_folder)
    assert len(AutoTokenizer.from_pretrained(run.model)) == len(words) + 40 + 24


def trained(recipe, frame):
    pretrain(recipe, frame=frame)
    return finetune(recipe)


def backbone_of(tensors):
    return {name: value for name, value in tensors.items() if name.startswith(BACKBONE)}


@pytest.mark.parametrize("why", ["the data have no text", "as the recipe says"])
def test_without_text_the_content_stage_is_skipped_and_the_log_says_so(store_recipe, store_frame, vary, why):
    change = {"data": {"review_column": None}} if "text" in why else {"method": {"content_tower": False}}
    recipe = vary(store_recipe, **change)
    run = trained(recipe, store_frame)
    assert predict(recipe)["review_perplexity"] is None
    assert f"content stage: skipped, {why}" in (run.folder / "log").read_text()
    assert [sorted(record) for record in history(run, "pretrain")] == 2 * [
        ["collaborative_loss", "epoch", "lr", "ndcg_at_100", "recall_at_20", "recall_at_40"]
    ]
    assert not any("content" in name for name in weights(run))
    assert AutoConfig.from_pretrained(run.model, trust_remote_code=True).content_tower is False


@pytest.mark.parametrize("train", ["none", "full"])
def test_backbone_and_words_learn_only_where_the_recipe_says_full(store_recipe, store_frame, vary, train):
    recipe = vary(store_recipe, backbone={"train": train}, method={"text_map": False})
    start = pretrain(vary(recipe, name="start", pretrain={"epochs": 0}), frame=store_frame)
    run = trained(recipe, store_frame)
    before, after = weights(start, "pretrain"), weights(run)
    assert before.keys() == after.keys()
    for name, value in before.items():
        learns = train == "full" or not name.startswith(BACKBONE)
        assert torch.equal(value, after[name]) is not learns, name


# peft asks the backbone for a property that transformers is about to rename
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_starts_alike_whatever_was_drawn_before(store_recipe, store_run, vary):
    recipe, starts = vary(store_recipe, backbone={"train": "lora"}), []
    for drawn in (1, 2):
        model = CLLM4RecForRecommendation.from_pretrained(store_run.run.model)
        torch.manual_seed(drawn)
        learn_backbone(recipe, model)
        starts.append({name: value for name, value in model.state_dict().items() if "lora_A" in name})
    assert starts[0]
    assert_same(*starts)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_learns_and_the_folder_holds_merged_weights(store_recipe, store_frame, vary):
    recipe = vary(store_recipe, backbone={"train": "lora", "lora_rank": 2})
    start = pretrain(vary(recipe, name="start", pretrain={"epochs": 0}), frame=store_frame)
    run = trained(recipe, store_frame)
    before, after = backbone_of(weights(start, "pretrain")), backbone_of(weights(run))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))}
    predict(recipe)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_merged_weights_give_what_the_model_gave_in_memory(store_recipe, store_frame, vary, recorded):
    run = trained(vary(store_recipe, backbone={"train": "lora"}), store_frame)
    model = AutoModelForSequenceClassification.from_pretrained(run.model, trust_remote_code=True)
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    torch.testing.assert_close(logits, recorded["recommendation"], atol=1e-5, rtol=0)


def test_fine_tuning_alone_may_choose_another_readout(store_recipe, store_frame, vary):
    pretrain(store_recipe, frame=store_frame)
    recipe = vary(store_recipe, method={"readout": "mean"})
    config = AutoConfig.from_pretrained(finetune(recipe).model, trust_remote_code=True)
    assert config.readout == "mean"


def test_leave_last_out_in_order_of_time(store_recipe, store_frame, vary):
    recipe = vary(store_recipe, data={"split": "leave_last_out"}, method={"history_order": "chronological"})
    run = trained(recipe, store_frame.sample(frac=1, random_state=0))
    corpora = open_corpora(run.corpora)
    items = [item["id"] for item in corpora.items()]
    by_user = store_frame.sort_values("time").groupby("user")["item"].agg(list)
    for split, part in (("recommendation", slice(8)), ("validation", slice(8, 9)), ("test", slice(9, 10))):
        users, rows = corpora.histories(split)
        assert users.tolist() == list(range(40))
        assert [[items[j] for j in row] for row in rows] == [row[part] for row in by_user]
    assert predict(recipe)["test"]["num_users"] == 40


def test_stages_may_differ_in_precision_within_one_process(store_recipe, store_frame, vary):
    recipe = vary(store_recipe, pretrain={"mixed_precision": "bf16"})
    run = trained(recipe, store_frame)
    finetune(vary(recipe, finetune={"mixed_precision": "bf16"}), overwrite=True)
    predict(vary(recipe, finetune={"mixed_precision": "bf16"}))
    assert {value.dtype for value in weights(run).values() if value.is_floating_point()} == {torch.float32}
    plain = pretrain(replace(store_recipe, name="plain"), frame=store_frame)
    losses = [[record["content_loss"] for record in history(of, "pretrain")] for of in (run, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_gradient_accumulation_changes_no_number(store_recipe, store_frame, vary):
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    # Read at the last token alone, a step of this recipe is so small that Adam makes much of the rounding errors of a key's bias.
    recipe = vary(store_recipe, backbone={"config": store_recipe.backbone.config | still}, method={"readout": "mean"})
    parts = {"gradient_accumulation_steps": 3}
    whole = trained(recipe, store_frame)
    split = trained(vary(recipe, name="parts", pretrain=parts, finetune=parts), store_frame)
    for stage in ("pretrain", "finetune"):
        for mine, other in zip(history(whole, stage), history(split, stage), strict=True):
            assert mine == pytest.approx(other, abs=1e-5)
    assert_same(weights(whole), weights(split), atol=1e-4)


def test_training_stops_after_so_many_epochs_without_gain(store_recipe, store_frame, vary):
    recipe = vary(store_recipe, pretrain={"epochs": 6, "patience": 2, "lr": 1e-12})
    run = pretrain(recipe, frame=store_frame)
    assert progress(run, "pretrain")["best_epoch"] == 1
    assert progress(run, "pretrain")["epoch"] == 3


def test_a_start_and_a_teacher_from_ials_work_and_serve_as_the_baseline(store_recipe, store_run, store_frame, vary):
    recipe = vary(
        store_recipe,
        method={"initialisation": "ials", "distillation": 0.5, "teacher": "blend"},
        evaluation={"baselines": ["ials"]},
    )
    run = trained(recipe, store_frame)
    results = predict(recipe)
    assert names(run.folder / "checkpoints") == ["finetune", "predict", "pretrain", "teacher"]
    for name in FIGURES:
        mine, fitted = (of["baselines"]["ials"][name]["value"] for of in (results, store_run.results))
        assert mine == pytest.approx(fitted, abs=1e-6)
    assert all(math.isfinite(record["recommendation_loss"]) for record in history(run, "finetune"))


def test_a_teacher_left_by_a_run_on_other_data_is_fitted_anew(store_recipe, store_frame, vary, monkeypatch):
    recipe = vary(store_recipe, method={"initialisation": "ials"}, pretrain={"epochs": 1})
    with monkeypatch.context() as patch:
        break_off(patch, 1)
        with pytest.raises(RuntimeError, match="power"):
            pretrain(recipe, frame=store_frame[store_frame["user"] < "person 20"])
    run = pretrain(recipe, frame=store_frame)
    assert load_file(run.checkpoints("teacher") / "factors.safetensors")["users"].shape[0] == 40


def test_tensorboard_gets_the_figures_of_every_epoch(store_recipe, store_frame, vary):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pretrain(vary(store_recipe, tracker="tensorboard"), frame=store_frame)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("ndcg_at_100")]
    assert shown == pytest.approx([record["ndcg_at_100"] for record in run.epochs("pretrain")], abs=1e-6)
    assert [event.step for event in events.Scalars("content_loss")] == [1, 2]


def test_a_table_in_a_file_gives_the_same_run_as_a_frame(store_recipe, store_run, store_frame, vary, tmp_path):
    store_frame.to_parquet(tmp_path / "store.parquet")
    run = pretrain(vary(store_recipe, data={"path": str(tmp_path / "store.parquet")}))
    assert_same(weights(run, "pretrain"), weights(store_run.run, "pretrain"))
    assert open_corpora(run.corpora).info["source"].keys() == {"store.parquet"}


def test_histories_are_cut_to_what_the_backbone_has_positions_for(store_recipe, store_frame, vary):
    recipe = vary(store_recipe, name="short", backbone={"config": dict(LARGER, n_layer=1, n_positions=48)})
    recipe = vary(
        recipe, pretrain={"epochs": 1}, finetune={"epochs": 1}, method={"max_history": 500, "max_text_tokens": 8}
    )
    pretrain(recipe, frame=store_frame)
    run = finetune(recipe)
    predict(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(run.model, trust_remote_code=True)
    assert model.config.max_history < 48
    longest = model.prepare_prompts(histories=[[0] * 100], users=[0])["input_ids"]
    assert longest.shape[1] == 48


def test_a_backbone_whose_tokens_see_later_ones_is_refused(store_recipe, store_frame, vary):
    bert = {
        "model_type": "bert",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    recipe = vary(store_recipe, name="bert", backbone={"config": bert})
    with pytest.raises(InputError, match="'bert' is no decoder"):
        pretrain(recipe, frame=store_frame)
    assert not Run.of(recipe).folder.exists()
