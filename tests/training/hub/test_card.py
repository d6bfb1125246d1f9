"""The model's page: metadata that huggingface_hub reads back, snippets that run, sentences that follow the figures."""

import copy
import json
import re
import shlex
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from configuration.errors import InputError
from configuration.load import PROJECT, dump_recipe, load_recipe, recipe_from_dict
from configuration.recipe import TextEncoder
from training.command_line import make_parser, run_script
from training.hub.card import CITATION, card_text, citations, comparison, departures
from training.hub.folder import published_recipe, published_results
from training.run import Run

SHA = "0123456789abcdef0123456789abcdef01234567"
NASTY = 'a|b `c` <script>alert(1)</script>\n---\n| new | row |\n```\n{{ 7 * 7 }} {% raw %} : "q" #x [l](u) *b* _i_ $m$'


@pytest.fixture
def results(store_run):
    """What a run measured, as it is published; a test may change it."""
    return copy.deepcopy(json.loads(json.dumps(published_results(store_run.results))))


@pytest.fixture
def recipe(store_run):
    return published_recipe(store_run.recipe)


def say(recipe, **changes):
    """The recipe with fields of its data changed."""
    return replace(recipe, data=replace(recipe.data, **changes))


def blocks(card, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def section(card, title):
    """What stands under a heading."""
    return re.split(r"^#+ ", card.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def gain_over(results, name, value, error=0.01):
    """Results in which the model is so much better than a baseline that is better than all others."""
    for baseline in results["baselines"].values():
        baseline["ndcg_at_100"]["value"] = 0.01
    results["baselines"][name]["ndcg_at_100"]["value"] = 0.9
    results["baselines"][name]["behind_model"] = {"value": value, "standard_error": error}
    return results


# Metadata


def test_metadata_are_read_back_by_huggingface_hub(results, recipe):
    recipe = replace(recipe, license="mit", language=["en", "de"])
    data = ModelCard(card_text(results, recipe, repo_id="me/store")).data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.license, data.language) == ("transformers", "mit", ["en", "de"])
    assert {"recommendation", "collaborative-filtering", "cllm4rec", "custom_code"} <= set(data.tags)
    assert data.metrics == ["recall@20", "recall@40", "ndcg@100"]
    assert data.model_name == "store"
    assert (data.pipeline_tag, data.base_model, data.datasets) == (None, None, None)


def test_the_model_index_holds_the_test_figures_and_their_protocol(results, recipe):
    metadata = yaml.safe_load(card_text(results, recipe, repo_id="me/store").split("---\n")[1])
    name, found = model_index_to_eval_results(metadata["model-index"])
    assert name == "store"
    for result, key in zip(found, ("recall_at_20", "recall_at_40", "ndcg_at_100"), strict=True):
        assert isinstance(result, EvalResult)
        assert result.metric_value == pytest.approx(results["test"][key]["value"], abs=1e-6)
        assert result.metric_args["standard_error"] == pytest.approx(results["test"][key]["standard_error"], abs=1e-6)
        assert result.metric_args["k"] == int(key.rpartition("_")[2])
        assert (result.task_type, result.dataset_type, result.dataset_name) == ("recommendation", "unknown", "store")
        assert (result.dataset_split, result.dataset_args["users"], result.dataset_args["items"]) == ("test", 40, 24)
        assert result.dataset_args["candidates"].startswith("the whole catalogue without")
    assert [result.metric_type for result in found] == ["recall@20", "recall@40", "ndcg@100"]


def test_widgets_are_the_examples_with_their_outputs(results, recipe):
    widgets = ModelCard(card_text(results, recipe, repo_id="me/store")).data.widget
    assert [widget["text"] for widget in widgets] == [", ".join(each["titles"]) for each in results["examples"]]
    best = results["examples"][0]["items"][0]
    assert widgets[0]["output"][0] == {"label": best["title"], "score": pytest.approx(best["score"], abs=1e-4)}


def test_without_a_licence_there_is_no_key_and_the_page_says_so(results, recipe):
    card = card_text(results, recipe, repo_id="me/store")
    assert "license" not in ModelCard(card).data.to_dict()
    assert "- **Licence:** none was stated, so nobody has leave to use it\n" in card


def test_the_backbone_is_named_as_on_the_hub(results, recipe):
    results["model"]["base_model"] = "openai-community/gpt2"
    recipe = replace(recipe, backbone=replace(recipe.backbone, name="openai-community/gpt2", train="none", layers=3))
    card = card_text(results, recipe, repo_id="me/store")
    assert ModelCard(card).data.base_model == "openai-community/gpt2"
    assert (
        "[openai-community/gpt2](https://huggingface.co/openai-community/gpt2), the lowest 1 layer, 8 wide; frozen\n"
        in card
    )
    recipe = replace(recipe, backbone=replace(recipe.backbone, name="gpt2-folder", hub_name="org/model"))
    results["model"]["base_model"] = "org/model"
    assert ModelCard(card_text(results, recipe, repo_id="me/store")).data.base_model == "org/model"


@pytest.mark.parametrize("how", ["pushed with it", "trained on it"])
def test_the_dataset_is_named_where_it_is_on_the_hub(results, recipe, how):
    recipe = say(recipe, format="dataset", path="me/data")
    if how == "trained on it":
        results["model"]["dataset"] = "me/data"
    card = card_text(results, recipe, repo_id="me/store", dataset="me/data" if "pushed" in how else None)
    data = ModelCard(card).data
    assert data.datasets == ["me/data"]
    assert {result.dataset_type for result in data.eval_results} == {"me/data"}
    assert "[me/data](https://huggingface.co/datasets/me/data)" in section(card, "Data")
    assert "The recipe reads the data from the Hub" in section(card, "Training again")


# Snippets


def test_the_python_snippets_run_and_print_what_the_page_says(store_run, results, recipe, capsys):
    card = card_text(results, recipe, repo_id=str(store_run.folder / "model"), on_hub=False)
    first, second = blocks(card, "python")
    exec(compile(first, "pipeline", "exec"), {})
    assert capsys.readouterr().out.strip() == blocks(card, "text")[0].strip()
    exec(compile(second, "auto", "exec"), {})
    shown = capsys.readouterr().out
    indices = [int(best["item"].rpartition(" ")[2]) for best in results["examples"][0]["items"]]
    assert f"items=tensor([[{', '.join(f'{index:>2}' for index in indices)}]])" in shown
    assert len([line for line in second.splitlines() if line]) == 3


def test_a_page_without_examples_has_snippets_that_run(store_run, results, recipe, capsys):
    results["examples"] = []
    card = card_text(results, recipe, repo_id=str(store_run.folder / "model"), on_hub=False)
    for snippet in blocks(card, "python"):
        exec(compile(snippet, "snippet", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) > 5
    assert "widget" not in ModelCard(card).data.to_dict()
    assert "No history is shown." in card


def test_snippets_name_the_revision_where_it_is_known(results, recipe):
    recipe = say(recipe, path="store.csv")
    card = card_text(results, recipe, repo_id="me/store", revision=SHA)
    for snippet in blocks(card, "python"):
        assert f'revision="{SHA}"' in snippet
    assert f"--revision {SHA} " in blocks(card, "bash")[0]
    assert "revision" not in card_text(results, recipe, repo_id="me/store").split("# store", 1)[1]


def test_training_again_fetches_the_recipe_and_runs_the_three_scripts(results, recipe):
    card = card_text(results, say(recipe, path="store.csv"), repo_id="me/store", revision=SHA)
    fetch, *scripts = [shlex.split(line) for line in blocks(card, "bash")[0].splitlines()]
    assert fetch == ["hf", "download", "me/store", "recipe.yaml", "--revision", SHA, "--local-dir", "again"]
    assert [script[-3:] for script in scripts] == [
        [f"training/{name}.py", "--config", "again/recipe.yaml"] for name in ("pretrain", "finetune", "predict")
    ]
    assert all((PROJECT / script[-3]).is_file() for script in scripts)


def test_training_a_refit_again_trains_the_run_that_it_follows_first(results, recipe, tmp_path, monkeypatch):
    recipe = replace(say(recipe, path="store.csv"), refit=True)
    card = card_text(results, recipe, repo_id="me/store")
    _, *lines = blocks(card, "bash")[0].splitlines()
    assert [line.split("training/")[1].split(".py")[0] for line in lines] == ["pretrain", "finetune", "predict"] * 2
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in lines:
        words = shlex.split(line.split(".py ")[1])
        monkeypatch.setattr("sys.argv", ["script", *words])
        run_script(make_parser(""), lambda given, _: ran.append(Run.of(given).folder.name))
    assert ran == ["store"] * 3 + ["store-refit"] * 3


def test_of_a_local_folder_the_recipe_is_taken_where_it_is(store_run, results, recipe):
    folder = store_run.folder / "model"
    lines = blocks(card_text(results, say(recipe, path="store.csv"), repo_id=str(folder), on_hub=False), "bash")[
        0
    ].splitlines()
    assert {shlex.split(line)[-1] for line in lines} == {str(folder / "recipe.yaml")}
    assert len(lines) == 3
    load_recipe(shlex.split(lines[0])[-1])


def test_a_table_in_memory_has_no_command_that_trains_again(results, recipe):
    card = card_text(results, recipe, repo_id="me/store")
    assert recipe.data.path is None
    assert blocks(card, "bash") == []
    assert "trained from a table in memory" in section(card, "Training again")


def test_the_recipe_on_the_page_is_the_whole_one(results, recipe):
    (shown,) = blocks(card_text(results, recipe, repo_id="me/store"), "yaml")
    assert recipe_from_dict(yaml.safe_load(shown)) == recipe


def test_files_that_a_recipe_reads_are_named(results, recipe):
    recipe = say(recipe, path="a.csv", items=replace(recipe.data.items, path="b.csv"), split_path="c.tsv")
    text = section(card_text(results, recipe, repo_id="me/store"), "Training again")
    assert "<code>a.csv</code>, <code>b.csv</code> and <code>c.tsv</code>, which must be there" in text


# Figures


def rows_of(card, title):
    """The cells of the tables under a heading, bold or not."""
    lines = [line for line in section(card, title).splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def shown(found):
    return f"{found['value']:.3f}\u00a0±\u00a0{found['standard_error']:.3f}"


def test_results_stand_beside_the_baselines_the_best_last(results, recipe):
    rows = rows_of(card_text(results, recipe, repo_id="me/store"), "Results")
    found = {"CLLM4Rec (this model)": results["test"], "CLLM4Rec by history alone": results["test_by_history"]}
    names = {"popularity": "popularity", "item_knn": "item-kNN", "ease": "EASE", "ials": "iALS"}
    found |= {names[key]: figures for key, figures in results["baselines"].items()}
    keys = ("ndcg_at_100", "recall_at_20", "recall_at_40")
    for name, *cells in rows[2:8]:
        assert cells == [shown(found[name][key]) for key in keys]
    values = [found[name]["ndcg_at_100"]["value"] for name, *_ in rows[2:8]]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("gain", "verdict", "sentence", "limit"),
    [
        (0.05, "above", "on average it ranks better than all of them", None),
        (0.015, "level", "the two are level and EASE is the simpler choice", "On these data EASE is as good"),
        (-0.015, "level", "the two are level and EASE is the simpler choice", "On these data EASE is as good"),
        (-0.05, "below", "EASE is the better choice on these data", "On these data EASE is better"),
    ],
)
def test_the_page_says_how_the_model_stands_to_the_best_baseline(results, recipe, gain, verdict, sentence, limit):
    results = gain_over(results, "ease", gain)
    assert comparison(results, user_embeddings=True)["verdict"] == verdict
    card = card_text(results, recipe, repo_id="me/store")
    assert sentence in section(card, "Results")
    assert f"{gain:.3f}\u00a0±\u00a00.010 over the same users" in section(card, "Results")
    assert ("On these data" in section(card, "Intended use and limits")) is (limit is not None)
    assert limit is None or limit in card


def test_bias_is_told_by_popularity_by_activity_and_by_coverage(results, recipe):
    card = card_text(results, recipe, repo_id="me/store")
    rows = rows_of(card, "Bias")
    key = comparison(results, user_embeddings=True)["key"]
    for group, theirs in zip(
        results["bias"]["by_item_popularity"], results["baselines"][key]["bias"]["by_item_popularity"], strict=True
    ):
        (row,) = [row for row in rows if row[0] == f"{group['group']}: {group['items']}"]
        assert row[2:] == [str(group["num_users"]), shown(group["ndcg_at_100"]), shown(theirs["ndcg_at_100"])]
    for group in results["bias"]["by_user_activity"]:
        assert any(row[0] == f"{group['group']}: {group['num_users']}" for row in rows) is (group["num_users"] > 0)
    (ours,) = [row for row in rows if row[0] == "CLLM4Rec"]
    assert ours[1] == f"{results['bias']['coverage_at_10']:.0%}"
    assert ours[3] == f"{results['bias']['by_item_popularity'][2]['share_at_10']:.0%}"
    assert ours[4] == f"{results['bias']['novelty_at_10']:.1f}"


def test_results_of_an_earlier_version_have_no_novelty(results, recipe):
    del results["bias"]["novelty_at_10"]
    (ours,) = [row for row in rows_of(card_text(results, recipe, repo_id="me/store"), "Bias") if row[0] == "CLLM4Rec"]
    assert ours[4] == "-"


def test_what_a_baseline_does_clearly_better_is_among_the_limits(results, recipe):
    results = gain_over(results, "ials", 0.05)
    theirs = results["baselines"]["ials"]["bias"]
    for number, value in enumerate((-0.05, -0.01, 0.05)):
        theirs["by_item_popularity"][number]["behind_model"] = {"value": value, "standard_error": 0.01}
    for group in theirs["by_user_activity"]:
        group["behind_model"] = {"value": 0.0, "standard_error": 0.01}
    for name, found in results["baselines"].items():
        found["bias"]["coverage_at_10"] = 0.9 if name in ("ials", "ease") else 0.1
    results["bias"]["coverage_at_10"] = 0.5
    limits = section(card_text(results, recipe, repo_id="me/store"), "Intended use and limits")
    assert "iALS ranks clearly better for held-out items of the tail: see" in limits
    assert "More of the catalogue comes into a top 10 with EASE and iALS: see" in limits


def test_without_baselines_the_page_says_that_there_is_nothing_to_compare_with(results, recipe):
    del results["baselines"]
    card = card_text(results, recipe, repo_id="me/store")
    assert "It was compared with no baseline" in section(card, "Results")
    assert "Settings of the baselines" not in card
    assert [row[0] for row in rows_of(card, "Bias")[-1:]] == ["CLLM4Rec"]


def test_pairs_that_an_earlier_model_was_trained_on_are_said_to_be_for_training(results, recipe):
    assert "was trained on them" not in card_text(results, recipe, repo_id="me/store")
    results["data"]["filtered"]["held_out_pairs_trained_on_before"] = 1_234
    assert "; 1,234 that would be held out are for training, since the model that" in card_text(
        results, recipe, repo_id="me/store"
    )


def test_without_a_test_split_nothing_is_claimed(results, recipe):
    nothing = {"value": None, "standard_error": None}
    none = dict.fromkeys(("ndcg_at_100", "recall_at_20", "recall_at_40"), nothing) | {"num_users": 0}
    results |= {"test": none, "test_by_history": none, "baselines": {}}
    for group in results["bias"]["by_user_activity"]:
        group |= {"num_users": 0, "least": None, "most": None, "ndcg_at_100": nothing}
    card = card_text(results, recipe, repo_id="me/store")
    assert "The data have no test split" in card
    assert "model-index" not in ModelCard(card).data.to_dict()
    assert "# Bias" not in card
    assert "Test NDCG@100" not in card


def test_large_sets_have_a_fourth_decimal(results, recipe):
    results["test"]["ndcg_at_100"] = {"value": 0.08931, "standard_error": 0.00102}
    assert "0.0893\u00a0±\u00a00.0010" in card_text(results, recipe, repo_id="me/store")


def test_perplexities_of_reviews_are_told(results, recipe):
    found = results["review_perplexity"]
    card = card_text(results, recipe, repo_id="me/store")
    assert f"{found['with_ids']:.1f} with their user and item" in card
    results["review_perplexity"] = None
    assert "Perplexity" not in card_text(results, recipe, repo_id="me/store")


def test_the_published_epoch_is_bold(results, recipe):
    epochs = results["stages"]["finetune"]["epochs"]
    best = epochs[int(np.argmax([epoch["ndcg_at_100"] for epoch in epochs]))]
    card = card_text(results, recipe, repo_id="me/store")
    assert f"\n| **{best['epoch']}** | **{best['recommendation_loss']:.3f}** |" in card


def test_the_page_of_a_model_for_what_comes_next_says_no_more_than_is_so(results, recipe):
    method = replace(
        recipe.method, targets="next", history_order="chronological", readout="last", user_token_dropout=1.0
    )
    results["model"]["parts"] = {
        name: size for name, size in results["model"]["parts"].items() if name != "user_offsets"
    }
    card = card_text(results, replace(recipe, method=method), repo_id="me/store")
    assert "it learns which item comes next, at each item of a history in order of time (fine-tuning)" in card
    assert "items that were held out of a history" not in card
    assert "and user token" not in card
    assert "can ask the model for what it would recommend to each" not in card
    assert "can ask the model for what it would recommend to each" in card_text(results, recipe, repo_id="me/store")


def test_the_page_of_a_start_from_another_run_says_so(results, recipe):
    results["started_from"], recipe = "shop", say(recipe, path="shop.csv")
    card = card_text(results, recipe, repo_id="me/store")
    assert "It starts from the embeddings of an earlier model, <code>shop</code>" in card
    assert "learn in turn" in card
    assert re.search(
        "pretrain.py --config .*recipe.yaml --init-from shop\n.*finetune.py --config .*recipe.yaml\n", card
    )
    results["stages"]["pretrain"]["epochs"] = []
    card = card_text(results, recipe, repo_id="me/store")
    assert "There was no pretraining. Then the recommendation head learns" in card
    assert "learn in turn" not in card
    assert "training/pretrain.py" not in card
    assert re.search("finetune.py --config .*recipe.yaml --init-from shop\n", card)


def test_departures_are_from_the_published_method():
    assert departures(load_recipe("sample", "paper")) == []
    found = {name: (here, there) for name, here, there in departures(load_recipe("sample"))}
    assert found["method.readout"] == ("mean", "last")
    assert found["method.held_out_share"] == ("[0.2, 0.6]", "[0.2, 0.2]")
    assert found["method.teacher"] == ("blend", "none")
    assert found["backbone.train"] == ("full", "none")
    assert "method.targets" not in found


@pytest.mark.parametrize("missing", ["bias", "examples", "model"])
def test_results_of_an_earlier_version_are_refused(results, recipe, missing):
    del results[missing]
    with pytest.raises(InputError, match=rf"results\.json has no '{missing}'.*training/predict\.py --overwrite"):
        card_text(results, recipe, repo_id="me/store")


# People


def test_no_raw_user_id_is_on_the_page(results, recipe, store_frame):
    card = card_text(results, recipe, repo_id="me/store")
    assert not any(user in card for user in store_frame["user"].unique())
    assert "No raw user id and no user's history is in any file here." in card


def test_the_page_says_what_is_published_about_people(results, recipe):
    of_users = section(
        card_text(results, say(recipe, publish_users=True), repo_id="me/store"), "What is published about people"
    )
    assert "`users.jsonl` holds the raw id, the text and the training history of all 40 users" in of_users
    assert "three embeddings of 8 numbers for each user (960 numbers in all)" in of_users
    assert "The histories on this page are made up." in of_users
    card = card_text(results, say(recipe, examples=[["thing 01"]]), repo_id="me/store")
    assert "those that the publisher's recipe gives as examples" in card
    assert "These histories were chosen by the publisher." in card


def test_without_user_embeddings_the_page_is_about_histories_alone(results, recipe):
    card = card_text(results, recipe, repo_id="me/store", user_embeddings=False)
    found = {result.metric_type: result for result in ModelCard(card).data.eval_results}
    assert found["ndcg@100"].metric_value == pytest.approx(results["test_by_history"]["ndcg_at_100"]["value"], abs=1e-6)
    assert found["ndcg@100"].dataset_args["prompt"] == "the user's training items"
    assert "the model knows nobody" in card
    assert "(user_embeddings): Embedding(0, 8)" in card
    assert "(item_embeddings): Embedding(24, 8)" in card
    assert f"**Parameters:** {results['model']['parameters'] - 3 * 40 * 8:,} in float32" in card
    assert '{"user"' not in card
    assert re.search(r"\| \*\*CLLM4Rec by history \(this model\)\*\* \|", card)
    key = comparison(results, user_embeddings=True)["key"]
    assert comparison(results, user_embeddings=False)["gain"] == results["baselines"][key]["behind_model_by_history"]


# A page that text cannot break


@pytest.fixture
def nasty(results, recipe):
    """Titles, ids, source and licence that hold what breaks tables, pages, metadata and templates."""
    for example in results["examples"]:
        example["titles"] = [NASTY for _ in example["titles"]]
        example["history"] = [NASTY for _ in example["history"]]
        for best in example["items"]:
            best["title"] = NASTY
    results["data"]["source"] = {"a|b`.csv": "0" * 64}
    recipe = replace(say(recipe, source=NASTY, license=NASTY, path=NASTY), license="yes: no", name="a|b <i>{{x}}</i>")
    return results, recipe


def test_tables_keep_their_cells(nasty):
    body = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card_text(*nasty, repo_id="me/store"), flags=re.DOTALL | re.MULTILINE)
    columns = None
    for line in body.split("\n# ", 1)[1].splitlines():
        if line.startswith("|"):
            columns = columns or line.count("|")
            assert line.count("|") == columns, line
        else:
            columns = None
            assert "|" not in line, line


def test_markup_of_text_is_shown_and_not_obeyed(nasty):
    card = card_text(*nasty, repo_id="me/store")
    prose = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.split("\n# ", 1)[1], flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in prose
    assert "- **Source:** a&#124;b &#96;c&#96; &#60;script&#62;" in prose
    assert "{{ 7 * 7 }}" in card
    assert "49" not in section(card, "What it recommends")
    assert [line for line in prose.splitlines() if line.startswith("---")] == []


def test_metadata_hold_any_text_on_one_line(nasty):
    data = ModelCard(card_text(*nasty, repo_id="me/store")).data
    assert data.license == "yes: no"
    assert data.widget[0]["output"][0]["label"] == " ".join(NASTY.split())
    assert {result.dataset_name for result in data.eval_results} == {"a|b <i>{{x}}</i>"}


def test_blocks_hold_any_text(nasty):
    card = card_text(*nasty, repo_id="me/store")
    first, *_ = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    compile(first, "snippet", "exec")
    history = re.search(r"recommend\((\{.*?\}), top_k", first, re.DOTALL)[1]
    assert json.loads(history) == {"history": [NASTY] * 3}
    (shown,) = re.findall(r"^(`{4,})yaml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE) or [(None, *blocks(card, "yaml"))]
    assert yaml.safe_load(shown[1])["data"]["source"] == NASTY


# The rest of the page


def test_pictures_are_linked_beside_the_page_with_words_for_who_cannot_see_them(store_run, results, recipe):
    card = card_text(results, recipe, repo_id="me/store")
    found = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", card)
    assert [path for _, path in found] == ["pictures/items.png", "pictures/curves.png"]
    assert all((store_run.folder / path).is_file() and len(words) > 30 for words, path in found)


def test_the_data_are_told_with_counts_filters_and_hashes(results, recipe):
    results["data"]["filtered"] |= {"rows": 5000, "below_min_rating": 1200, "below_min_interactions": 30}
    recipe = say(
        recipe, min_rating=4.0, min_user_interactions=3, min_item_interactions=2, source="a shop", license="cc0-1.0"
    )
    card = section(card_text(results, recipe, repo_id="me/store"), "Data")
    for words in (
        "**Source:** a shop\n",
        "**Licence of the data:** cc0-1.0\n",
        "320 for training, 40 for validation, 40 for the test; at random, 80/10/10",
        "**Left out of 5,000 rows:** 1,200 with a rating below 4; 30 of users with fewer than 3 interactions or items with "
        "fewer than 2, repeated until stable\n",
        "126 reviews of training pairs, 0 about items, 0 about users",
        results["data"]["source"]["DataFrame"],
    ):
        assert words in card


def test_both_citations_are_those_of_the_project():
    found = citations(CITATION)
    assert found["paper"].startswith(
        "@inproceedings{zhu2024cllm4rec,\n  title = {Collaborative Large Language Model for"
    )
    assert "  author = {Zhu, Yaochen and Wu, Liang and Guo, Qi and Hong, Liangjie and Li, Jundong},\n" in found["paper"]
    assert "  doi = {10.1145/3589334.3645347},\n}" in found["paper"]
    assert "  author = {{The CLLM4Rec contributors}},\n  version = {0.1.0},\n" in found["project"]


def test_a_set_without_text_has_no_words_about_texts(results, recipe):
    results["data"]["counts"] |= dict.fromkeys(("reviews", "item_texts", "user_texts", "content_tokens"), 0)
    for name in ("content_user_embeddings", "content_item_embeddings", "text_map", "user_offsets"):
        del results["model"]["parts"][name]
    results["review_perplexity"] = None
    card = card_text(results, recipe, repo_id="me/store")
    assert "was left out, as the data have no text." in card
    assert "The data have no text, so it has learnt from interactions alone." in card
    assert "AutoModelForCausalLM" not in card
    assert "an embedding of 8 numbers" in card
    assert "may repeat parts" not in card


@pytest.mark.parametrize(("able", "shown"), [(True, "bf16"), (False, "no"), (None, "no")])
def test_the_precision_is_the_one_that_auto_came_to(results, recipe, vary, able, shown):
    results["hardware"].pop("bf16", None)
    if able is not None:
        results["hardware"]["bf16"] = able
    recipe = vary(recipe, pretrain={"mixed_precision": "auto"}, finetune={"mixed_precision": "fp16"})
    assert f"| mixed precision | {shown} | fp16 |" in card_text(results, recipe, repo_id="me/store")


def test_a_gpu_is_named(results, recipe):
    results["hardware"] |= {"accelerator": "NVIDIA H100", "cpu_threads": 8, "machine": "x86_64"}
    assert " on NVIDIA H100 and 8 CPU threads (x86_64)." in card_text(results, recipe, repo_id="me/store")


def test_the_same_results_give_the_same_page(results, recipe):
    assert card_text(results, recipe, repo_id="me/store") == card_text(results, recipe, repo_id="me/store")


def test_nothing_on_the_page_is_left_open(results, recipe):
    for embeddings in (True, False):
        card = card_text(results, recipe, repo_id="me/store", user_embeddings=embeddings)
        assert not re.search(r"\{\{|\{%|None|Undefined|\bnan\b|  \|", card.split("```yaml")[0])
        assert "\n\n\n" not in card.split("```text")[0]


def test_a_card_for_the_hub_does_not_depend_on_the_folders_here(results, recipe, tmp_path, monkeypatch):
    elsewhere = card_text(results, recipe, repo_id="me/store")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "store").mkdir(parents=True)
    assert card_text(results, recipe, repo_id="me/store") == elsewhere


def test_the_sample_has_no_sentence_of_its_own():
    template = (PROJECT / "model_card.md").read_text(encoding="utf-8").lower()
    assert not any(word in template for word in ("debian", "python3", "package", "movie", "film", "music", "beauty"))


def test_results_and_recipe_are_left_as_they_are(results, recipe):
    before, fields = copy.deepcopy(results), asdict(recipe)
    card_text(results, recipe, repo_id="me/store", dataset="me/data", user_embeddings=False)
    assert (results, asdict(recipe)) == (before, fields)


def test_the_page_says_that_known_users_states_were_moved(results, recipe):
    moved = "When training had ended, the states of known users were moved to what their own texts say, as far as"
    assert moved in card_text(results, recipe, repo_id="me/store")
    taught = replace(recipe, method=replace(recipe.method, distillation=0.5))
    assert "moved to what the teacher's scores and their own texts say" in card_text(
        results, taught, repo_id="me/store"
    )
    assert moved not in card_text(results, recipe, repo_id="me/store", user_embeddings=False)
    del results["model"]["parts"]["user_offsets"]
    assert moved not in card_text(results, recipe, repo_id="me/store")


def test_the_page_says_who_else_reads_a_text(results, recipe):
    read = "in words, whose terms count and what the text encoder makes of them, alone or beside a history"
    plain = card_text(results, recipe, repo_id="me/store")
    assert read not in plain
    assert "Text encoder" not in plain
    kept = "as it was pretrained, in the folder `text_encoder`"
    reading = replace(recipe, text_encoder=TextEncoder(name="encoders/small", layers=1))
    results["model"]["text_encoder"] = None
    page = card_text(results, reading, repo_id="me/store")
    assert read in page
    assert f"- **Text encoder:** <code>encoders/small</code>, the lowest 1 layer, {kept}" in page
    assert ModelCard(page).data.base_model is None
    reading = replace(recipe, text_encoder=TextEncoder(name="org/small"))
    results["model"]["text_encoder"] = "org/small"
    page = card_text(results, reading, repo_id="me/store")
    assert f"- **Text encoder:** [org/small](https://huggingface.co/org/small), {kept}" in page
    assert ModelCard(page).data.base_model == "org/small"
    results["model"]["base_model"] = "org/model"
    assert ModelCard(card_text(results, reading, repo_id="me/store")).data.base_model == ["org/model", "org/small"]
    results["model"]["base_model"] = "org/small"
    assert ModelCard(card_text(results, reading, repo_id="me/store")).data.base_model == "org/small"


def test_the_page_names_what_the_teacher_is_made_of(results, recipe):
    taught = replace(recipe, method=replace(recipe.method, distillation=0.5, teacher="blend"))
    assert "a teacher, iALS blended with EASE and with what the texts say, fitted" in card_text(
        results, taught, repo_id="me/store"
    )
    results["data"]["counts"] |= dict.fromkeys(("reviews", "item_texts", "user_texts"), 0)
    assert "a teacher, iALS blended with EASE, fitted" in card_text(results, taught, repo_id="me/store")
