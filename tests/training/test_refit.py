"""A model that is trained again on all pairs, with what the run before it chose on validation."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

from configuration.errors import InputError
from configuration.load import load_recipe
from training import finetune as finetuning
from training.command_line import make_parser, run_script
from training.data.corpora import open_corpora
from training.finetune import finetune
from training.hub.publish import Options, publish
from training.predict import predict
from training.pretrain import pretrain
from training.run import Run
from training.stages import teacher as teachers
from training.stages import text_map, user_offsets

WEIGHTS = {"user_topic_weight": 0.3, "weight_beside_history": 0.7}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def taught(store_run, store_frame, vary, tmp_path_factory):
    """A run with a teacher, a text map and offsets, of which three epochs of fine-tuning were the best of four; and its refit.

    It pretrains for two epochs of five, since five would read too much; of all pairs together two would, too.
    """
    documents = len(open_corpora(store_run.run.corpora).texts("content"))
    recipe = vary(
        store_run.recipe,
        output_dir=str(tmp_path_factory.mktemp("taught")),
        method={"distillation": 0.5, "teacher": "blend", "initialisation": "ials"},
        pretrain={"epochs": 5, "max_documents": 2 * documents},
        finetune={"epochs": 4},
        evaluation={"baselines": []},
    )
    run = pretrain(recipe, frame=store_frame)
    finetune(recipe)
    progress = run.checkpoints("finetune") / "progress.json"
    progress.write_text(json.dumps(read(progress) | {"best_epoch": 3}))
    run.choices.write_text(
        json.dumps({"text_map": WEIGHTS, "user_offsets": {"teacher_share": 0.3, "text_weight": 0.4}})
    )
    blend = run.checkpoints("teacher") / "blend.json"
    # A refit cannot choose it: there are no validation pairs.
    blend.write_text(json.dumps(read(blend) | {"scale": 3.0}))
    results = predict(recipe)
    anew = replace(recipe, refit=True)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing may be searched for: each of these looks at validation.
        for module, name in (
            (teachers, "choose"),
            (text_map, "best_weight"),
            (user_offsets, "best_weight"),
            (finetuning, "Validation"),
        ):
            patch.setattr(module, name, None)
        pretrain(anew, frame=store_frame)
        finetune(anew)
        refit = predict(anew)
    return SimpleNamespace(recipe=recipe, run=run, results=results, anew=anew, again=Run.of(anew), refit=refit)


def test_a_refit_has_a_folder_of_its_own_and_trains_on_every_pair(taught, store_frame):
    assert taught.again.folder == taught.run.folder.with_name("store-refit")
    corpora = open_corpora(taught.again.corpora)
    counts = corpora.info["counts"]
    assert (counts["train"], counts["validation"], counts["test"]) == (len(store_frame), 0, 0)
    assert counts["reviews"] == store_frame["review"].notna().sum()
    assert sorted(map(sorted, (row["history"] for row in corpora.users()))) == sorted(
        sorted(int(item[-2:]) for item in items) for items in store_frame.groupby("user")["item"].agg(list)
    )


def test_it_is_trained_for_the_epochs_that_were_chosen_at_the_same_rates(taught):
    for stage, epochs in (("pretrain", 2), ("finetune", 3)):
        records = taught.again.epochs(stage)
        assert [record["epoch"] for record in records] == [*range(1, epochs + 1)]
        rates = [record["lr"] for record in taught.run.epochs(stage)[:epochs]]
        assert [record["lr"] for record in records] == pytest.approx(
            rates, rel=0.2
        )  # reviews of held-out pairs make some more steps
        assert "ndcg_at_100" not in records[0]


def test_it_takes_over_what_validation_chose(taught):
    ours, theirs = (read(run.checkpoints("teacher") / "blend.json") for run in (taught.again, taught.run))
    searched = {"ials_validation_ndcg_at_100", "validation_ndcg_at_100"}
    assert {name: ours[name] for name in ours if name not in searched} == {
        name: theirs[name] for name in theirs if name not in searched
    }
    assert read(taught.again.choices) == read(taught.run.choices)
    model = AutoModelForSequenceClassification.from_pretrained(taught.again.model, trust_remote_code=True)
    assert model.model.text_map.weight_beside_history.item() == pytest.approx(0.7)
    assert model.model.user_offsets.weight.abs().sum() > 0


def test_the_figures_are_those_before_and_the_model_is_the_new_one(taught):
    for name in ("test", "test_by_history", "validation", "bias", "stages", "seed", "data"):
        assert taught.refit[name] == taught.results[name]
    assert taught.refit["examples"] != taught.results["examples"]
    assert taught.refit["refit"].keys() == {"interactions", "epochs", "seconds"}
    assert taught.refit["refit"]["interactions"] == 400
    assert taught.refit["refit"]["epochs"] == {"pretrain": 2, "finetune": 3}
    assert "refit" not in taught.results
    assert load_recipe(taught.again.model / "recipe.yaml").refit


def test_everyone_is_ranked_without_any_of_their_items(taught):
    parts = sorted((taught.again.folder / "predictions").glob("*.parquet"))
    rows = pq.read_table(parts).to_pylist()
    known = {row["id"]: set(row["history"]) for row in open_corpora(taught.again.corpora).users()}
    numbers = {row["id"]: number for number, row in enumerate(open_corpora(taught.again.corpora).items())}
    assert {row["user"] for row in rows} == set(known)
    assert all(len(row["items"]) == 12 for row in rows)
    assert not any(known[row["user"]] & {numbers[item] for item in row["items"]} for row in rows)


def test_the_card_says_that_it_was_trained_again(taught):
    before, after = ((run.model / "README.md").read_text() for run in (taught.run, taught.again))
    for sentence in (
        "before it was trained again on all pairs",
        "The weights here were then trained again on all 400 pairs",
        "for 2 epochs of pretraining and 3 of fine-tuning",
        "before the weights were trained again",
        "For the weights here all pairs were.",
    ):
        assert sentence in after
        assert sentence not in before
    assert "No held-out pair is in anything" in before
    assert "No held-out pair is in anything" not in after


def test_a_refit_waits_for_a_finished_run(taught, tmp_path):
    lonely = replace(taught.anew, output_dir=str(tmp_path))
    for stage in (pretrain, finetune, predict):
        with pytest.raises(
            InputError, match=r"store chose on validation, but no finished run is there.*with refit=false"
        ):
            stage(lonely)
    shutil.copytree(taught.run.folder, tmp_path / "store")
    (tmp_path / "store" / "results.json").unlink()
    with pytest.raises(InputError, match="no finished run is there"):
        pretrain(lonely)
    assert not (tmp_path / "store-refit").exists()


def test_a_refit_of_other_data_is_refused(taught, store_frame):
    with pytest.raises(InputError, match=r"refit: .* changed since .*store chose on it; run training/pretrain.py"):
        pretrain(taught.anew, frame=store_frame.iloc[:-40], overwrite=True)


def test_a_refit_does_not_follow_figures_of_an_earlier_training(taught, store_frame, vary, tmp_path):
    shutil.copytree(taught.run.folder, tmp_path / "store")
    other = vary(taught.recipe, output_dir=str(tmp_path), finetune={"lr": 5e-4})
    finetune(other, overwrite=True)
    with pytest.raises(InputError, match="no finished run is there"):
        pretrain(replace(other, refit=True), frame=store_frame)


def test_a_refit_of_another_recipe_is_refused(taught, vary, store_frame):
    with pytest.raises(InputError, match="another data set, backbone or recipe"):
        pretrain(vary(taught.anew, finetune={"lr": 0.5}), frame=store_frame, overwrite=True)


def test_it_has_to_start_where_the_run_before_it_did(taught, store_run, store_frame, tmp_path):
    with pytest.raises(InputError, match=r"refit: it starts as .*store did.*leave --init-from out"):
        pretrain(taught.anew, frame=store_frame, overwrite=True, init_from=store_run.folder)
    begun = replace(taught.recipe, output_dir=str(tmp_path))
    shutil.copytree(taught.run.folder, tmp_path / "store")
    older = tmp_path / "older"
    Run.of(begun).start.write_text(json.dumps({"init_from": str(older)}))
    again = Run.of(replace(begun, refit=True))
    again.check_start(store_run.folder)  # where the older run stood there is nothing: it may have been moved
    older.mkdir()
    for other in (None, store_run.folder):
        with pytest.raises(InputError, match=f"give --init-from {older}"):
            pretrain(replace(begun, refit=True), frame=store_frame, init_from=other)
    again.check_start(older / ".." / "older")


def test_a_run_that_started_from_another_goes_on_from_there(taught, store_frame, tmp_path):
    begun = replace(taught.recipe, output_dir=str(tmp_path))
    shutil.copytree(taught.run.folder, tmp_path / "store")
    Run.of(begun).start.write_text(json.dumps({"init_from": "runs/older"}))
    with pytest.raises(InputError, match=r"started from runs/older; go on as it was begun.*--init-from runs/older"):
        pretrain(begun, frame=store_frame, resume=True)


def test_a_run_names_the_run_that_it_started_from(taught, store_run, store_frame, tmp_path):
    recipe = replace(store_run.recipe, output_dir=str(tmp_path))
    run = pretrain(recipe, frame=store_frame, init_from=store_run.folder, train_language_models=False)
    assert read(run.start) == {"init_from": str(store_run.folder)}
    assert not taught.run.start.exists()


def test_an_interrupted_refit_goes_on_to_the_same_weights(taught, store_frame, tmp_path, monkeypatch):
    shutil.copytree(taught.run.folder, tmp_path / "store")
    anew = replace(taught.anew, output_dir=str(tmp_path))
    pretrain(anew, frame=store_frame)
    kept, run = finetuning.train, Run.of(anew)

    def broken(*arguments, stop_after, **more):
        kept(*arguments, stop_after=stop_after - 1, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        finetune(anew)
    monkeypatch.undo()
    finetune(anew, resume=True)
    models = (
        AutoModelForSequenceClassification.from_pretrained(at.model, trust_remote_code=True)
        for at in (run, taught.again)
    )
    mine, other = (model.get_output_embeddings().weight.detach().numpy() for model in models)
    np.testing.assert_array_equal(mine, other)


def test_the_data_of_a_refit_are_sent_with_the_run_before_it(taught):
    with pytest.raises(InputError, match=r"--dataset: .*store-refit was trained again.*send the data with .*store$"):
        publish(taught.again.folder, None, dataset="me/data", options=Options(dry_run=True))


def test_the_flag_sets_the_field(monkeypatch):
    recipes = []
    monkeypatch.setattr("sys.argv", ["x", "--config", "sample", "--refit", "seed=5"])
    run_script(make_parser(""), lambda recipe, _: recipes.append(recipe))
    monkeypatch.setattr("sys.argv", ["x", "--config", "sample"])
    run_script(make_parser(""), lambda recipe, _: recipes.append(recipe))
    assert [recipe.refit for recipe in recipes] == [True, False]
