import json
import shutil
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks import quality
from benchmarks.quality import ABLATION, compare, draw, lines, recipe_of, run_once, summary
from configuration.load import load_recipe
from training.data.corpora import open_corpora
from training.finetune import finetune
from training.hub.card import departures
from training.run import Run

SHORT = ["pretrain.epochs=0", "finetune.epochs=0", "evaluation.selection_users=20"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The sample without training, with one cheap baseline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "SEEDS", (42, 43))
        folder = tmp_path_factory.mktemp("quality")
        yield folder, compare("sample", ["default"], 2, folder, [*SHORT, "evaluation.baselines=[popularity]"])


def test_ours_stands_beside_baselines_and_beside_what_the_texts_say(rows):
    _, found = rows
    assert set(found) == {
        "CLLM4Rec, default", "CLLM4Rec, default, by history alone", "popularity", "iALS, EASE and texts", "EASE with texts",
        "texts of users", "texts of items", "topics of texts",
    }  # fmt: skip
    ours = found["CLLM4Rec, default"]
    assert ours["ndcg_at_100"]["std"] > 0
    assert ours["by_item_popularity"].keys() == {"tail", "middle", "head"}
    assert found["popularity"]["ndcg_at_100"]["mean"] == pytest.approx(0.2242, abs=1e-4)
    assert found["iALS, EASE and texts"]["ndcg_at_100"]["mean"] > found["texts of users"]["ndcg_at_100"]["mean"] > 0.3
    for label, row in found.items():
        if not label.startswith("CLLM4Rec"):
            assert row["behind_model"]["value"] == pytest.approx(first_seed(rows) - row["ndcg_at_100"]["mean"]), label
            assert row["behind_model"]["standard_error"] > 0, label
            assert row.keys() >= ours.keys() - {"seconds"}, label
    assert found["popularity"]["novelty_at_10"] < ours["novelty_at_10"]
    table = "\n".join(lines("sample", found))
    assert "| popularity | 0.224 | ± 0.007 over users; behind ours by " in table


def test_alone_there_are_no_baselines_to_be_measured_against_another_method(rows, monkeypatch):
    folder, found = rows
    monkeypatch.setattr(quality, "SEEDS", (42, 43))
    monkeypatch.setattr(quality, "blends", lambda recipe: pytest.fail("baselines were measured"))
    words = [*SHORT, "evaluation.baselines=[popularity]"]
    ours = compare("sample", ["default"], 2, folder, words, alone=True)
    assert set(ours) == {"CLLM4Rec, default", "CLLM4Rec, default, by history alone"}
    assert ours["CLLM4Rec, default"]["ndcg_at_100"] == found["CLLM4Rec, default"]["ndcg_at_100"]


def first_seed(rows):
    """Test NDCG@100 of the run that baselines are compared with."""
    folder, _ = rows
    run = Run.of(recipe_of("sample", "default", 42, folder, *SHORT))
    return json.loads((run.folder / "results.json").read_text())["test"]["ndcg_at_100"]["value"]


def test_a_run_of_the_same_recipe_is_not_done_again(rows, monkeypatch):
    folder, found = rows
    for stage in ("pretrain", "finetune", "predict"):
        monkeypatch.setattr(quality, stage, lambda *given, **options: pytest.fail("trained again"))
    again = run_once("sample", "default", 43, folder, *SHORT, "evaluation.baselines=[popularity]")
    both = found["CLLM4Rec, default"]["ndcg_at_100"]
    assert again["test"]["ndcg_at_100"]["value"] == pytest.approx(both["mean"], abs=2 * both["std"])
    with pytest.raises(pytest.fail.Exception):
        run_once("sample", "default", 43, folder, *SHORT, "finetune.lr=1e-2")


def test_pretraining_is_taken_over_where_fine_tuning_alone_differs(rows, monkeypatch):
    folder, _ = rows
    like, trained_again = Run.of(recipe_of("sample", "default", 42, folder, *SHORT)), []
    kept = quality.pretrain
    monkeypatch.setattr(
        quality, "pretrain", lambda *given, **options: trained_again.append(1) or kept(*given, **options)
    )
    for word, expected in (("method.user_offsets=false", []), ("method.lambda_v=0", [1])):
        run_once("sample", "default", 42, folder, *SHORT, word, like=like)
        assert trained_again == expected, word


def test_sasrec_is_a_row_where_there_is_an_interpreter_for_it(rows, monkeypatch):
    folder, _ = rows
    recipe = recipe_of("sample", "default", 42, folder, *SHORT)
    corpora = open_corpora(Run.of(recipe).corpora)

    def ranked(python, train, validation, seen, users, depth, *, sees_validation):
        assert (python, depth, sees_validation) == ("python", 100, False)
        found = np.full((len(users), depth), -1)
        of, items = corpora.histories("test")
        for row, user in enumerate(users[:10]):  # these are all right, the others get nothing
            own = items[int(np.flatnonzero(of == user)[0])]
            found[row, : len(own)] = own
        return found

    monkeypatch.setattr(quality, "ranked_by_sasrec", ranked)
    words = [*SHORT, "evaluation.baselines=[popularity]"]
    row = compare("sample", ["default"], 1, folder, words, "python")["SASRec"]
    assert row["ndcg_at_100"]["mean"] == pytest.approx(10 / len(corpora.histories("test")[0]))


def test_every_departure_is_a_field_that_the_default_recipe_sets_otherwise():
    default = json.dumps(vars(load_recipe("sample", "default")), default=vars)
    for word in ABLATION.values():
        assert json.dumps(vars(load_recipe("sample", "default", [word])), default=vars) != default, word


def test_every_gain_is_what_the_default_recipe_says_in_place_of_the_published_method():
    default, paper = load_recipe("sample", "default"), load_recipe("sample", "paper")
    for label, words in quality.GAINS.items():
        changed = load_recipe("sample", "paper", words)
        for word in words:
            section, field = word.split("=")[0].split(".")
            values = [getattr(getattr(recipe, section), field) for recipe in (paper, changed, default)]
            if word != "method.teacher=ials":
                assert values[1] == values[2], word
        assert vars(changed) != vars(paper), label
    fields = {word.partition("=")[0] for words in quality.GAINS.values() for word in words}
    assert {name for name, *_ in departures(default)} <= fields


def test_changes_are_made_one_by_one_and_the_first_row_brings_the_baselines(monkeypatch, tmp_path):
    calls = []

    def run_once(name, method, seed, folder, *words, baselines, like):
        calls.append((method, words, baselines, like and like.folder.name))
        figure = {"ndcg_at_100": {"value": 0.1 * len(calls)}}
        return {"test": figure, "validation": figure, "test_by_history": figure}

    monkeypatch.setattr(quality, "run_once", run_once)
    changes = {"the mean": ["method.readout=mean"], "a start": ["method.initialisation=ials", "seed=1"]}
    rows = quality.one_by_one("sample", "paper", changes, tmp_path, ["finetune.epochs=1"])
    first = "sample-paper-42-finetune.epochs=1"
    assert calls == [
        ("paper", ("finetune.epochs=1",), True, None),
        ("paper", ("method.readout=mean", "finetune.epochs=1"), False, first),
        ("paper", ("method.initialisation=ials", "seed=1", "finetune.epochs=1"), False, first),
    ]
    assert list(rows) == ["the paper recipe", *changes]
    assert [row["departure"] for row in rows.values()] == [
        None,
        "method.readout=mean",
        "method.initialisation=ials seed=1",
    ]
    assert rows["a start"]["by_history"] == pytest.approx(0.3)


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, words)])
    quality.main()


@pytest.fixture
def shop(tmp_path):
    """A table of one's own."""
    rng, table = np.random.default_rng(0), tmp_path / "my #1 shop.csv"
    pairs = {(user, int(item)) for user in range(30) for item in rng.integers(0, 20, 12)}
    table.write_text("customer,item\n" + "".join(f"{user},{item}\n" for user, item in sorted(pairs)))
    return table


@pytest.mark.parametrize("kind", ["table", "yaml"])
def test_a_set_of_ones_own_is_a_table_or_the_file_that_training_takes(kind, shop, tmp_path, monkeypatch, capsys):
    words, data = ["data.user_column=customer"], shop
    if kind == "yaml":
        words, data = [], tmp_path / "shop.yaml"
        data.write_text(f"data:\n  path: '{shop}'\n  user_column: customer\n")
    folder = tmp_path / "runs"
    words += [*SHORT, "evaluation.baselines=[popularity]"]
    run_main(monkeypatch, "--seeds", 1, "--folder", folder, "--write", "--data", data, *words)
    found = json.loads((folder / "quality.json").read_text())[str(data)]
    assert found["CLLM4Rec, default"]["ndcg_at_100"]["mean"] > 0
    assert f"| {data} | NDCG@100 | |" in capsys.readouterr().out
    assert (folder / "quality.png").is_file()


def test_a_run_is_kept_for_the_same_recipe_and_data(shop, tmp_path, monkeypatch):
    stages = []
    for stage in (quality.pretrain, quality.predict):
        monkeypatch.setattr(quality, stage.__name__, lambda *given, stage=stage, **options: (
            stages.append(stage.__name__) or stage(*given, **options)
        ))  # fmt: skip
    words = ["data.user_column=customer", *SHORT, "evaluation.baselines=[popularity]"]

    def run(baselines=False):
        stages.clear()
        found = run_once(str(shop), "default", 42, tmp_path / "runs", *words[: 4 + baselines], baselines=baselines)
        return found, list(stages)

    assert run()[1] == ["pretrain", "predict"]
    assert run()[1] == []
    assert run(baselines=True)[1] == ["predict"]  # which fits the baselines
    assert run(baselines=True)[1] == run()[1] == []
    shutil.rmtree(Run.of(recipe_of(str(shop), "default", 42, tmp_path / "runs", *words)).corpora)
    assert run()[1] == ["pretrain", "predict"]
    shop.write_text(shop.read_text() + "31,1\n31,2\n31,3\n")
    monkeypatch.setattr(quality, "finetune", lambda *given, **options: sys.exit("broken off"))
    with pytest.raises(SystemExit):
        run()
    monkeypatch.setattr(quality, "finetune", finetune)
    found, done = run()
    assert done == ["pretrain", "predict"]
    assert found["data"]["counts"]["users"] == 31


def test_sets_of_ones_own_that_are_called_alike_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        "a/shop.csv",
        "b/shop.csv",
        "shop.2023.csv",
        "shop.2024.csv",
        "sample.csv",
        "./sample",
        ".hidden.csv",
        "sample",
    ]
    labels = [quality.of_folder(name) for name in names]
    assert len(set(labels)) == len(names)
    assert labels[-1] == "sample"
    assert quality.of_folder("a/shop.csv") == quality.of_folder(str(tmp_path / "a/shop.csv"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "none.csv"], "there is no file none.csv"),
        (["--data", "ml-100k.yaml"], "there is no file ml-100k.yaml"),
        (["--alone", "--gains"], "with --gains there is nothing to leave out"),
        (["--alone", "--sasrec", "python"], "with --sasrec there is nothing to leave out"),
    ],
)
def test_what_cannot_be_asked_for_is_said(words, said, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *words)
    assert said in capsys.readouterr().err


def test_fields_stand_behind_the_names_of_sets_too(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(quality, "compare", lambda name, *given, **options: calls.append((name, given[3])) or {})
    monkeypatch.setenv("CLLM4REC_DATA", str(tmp_path / "none"))
    run_main(monkeypatch, "--set", "sample", "ml-100k", "method.targets=all", "seed=1")
    assert calls == [("sample", ["method.targets=all", "seed=1"])]
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--set", "sample", "nothing")


def test_the_picture_has_a_panel_a_set(tmp_path):
    rows = {"CLLM4Rec, default": summary([0.4, 0.42]), "iALS": summary([0.38])}
    heights = []
    for count in (1, 3):
        draw({f"set {number}": rows for number in range(count)}, tmp_path / "quality.png")
        heights.append(imread(tmp_path / "quality.png").shape[0])
    assert heights[1] > 2 * heights[0]
    assert rows["iALS"]["ndcg_at_100"] == {"mean": 0.38, "std": None}
    assert np.isclose(rows["CLLM4Rec, default"]["ndcg_at_100"]["mean"], 0.41)


def test_curves_hold_the_default_and_its_neighbours(monkeypatch, tmp_path):
    default = json.loads(json.dumps(vars(load_recipe("sample", "default")), default=vars))
    for field, values in quality.CURVES.items():
        section, name = field.split(".")
        assert default[section][name] in values, field
        assert len(values) > 3
    words = []

    def run_once(name, method, seed, folder, word, *overrides):
        words.append(word)
        figure = {"ndcg_at_100": {"value": 0.1 * len(words)}}
        return {"test": figure, "validation": figure, "test_by_history": figure}

    monkeypatch.setattr(quality, "run_once", run_once)
    rows = quality.curves("sample", tmp_path, [])
    assert words == list(rows) == [f"{field}={value}" for field, values in quality.CURVES.items() for value in values]
    assert rows[words[2]]["validation"] == pytest.approx(0.3)
    for word in words:
        load_recipe("sample", "default", [word])
    quality.draw_curves({"sample": rows}, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").size
    assert "| method.lambda_v=0.1 | 0.300 | validation 0.300; by history alone 0.300 |" in list(lines("sample", rows))


def test_models_that_are_not_run_again_keep_their_rows(monkeypatch, tmp_path):
    given = {"default": {"CLLM4Rec, default": summary([0.4])}, "paper": {"CLLM4Rec, paper": summary([0.3])}}
    monkeypatch.setattr(quality, "compare", lambda name, methods, *other, alone: given[methods[0]])
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    for method in ("default", "paper"):
        monkeypatch.setattr(sys, "argv", ["quality.py", "--write", "--set", "sample", "--methods", method])
        quality.main()
    kept = json.loads((tmp_path / "quality.json").read_text())["sample"]
    assert {label: row["ndcg_at_100"]["mean"] for label, row in kept.items()} == {
        "CLLM4Rec, default": 0.4,
        "CLLM4Rec, paper": 0.3,
    }
