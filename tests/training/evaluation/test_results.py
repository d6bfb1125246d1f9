import json
import platform

import torch
import transformers

from training.device import computes_in_bf16
from training.evaluation.results import LIBRARIES, hardware, metrics_table, show_recommendations, versions


def figures(ndcg, error=0.01):
    return {
        "ndcg_at_100": {"value": ndcg, "standard_error": error},
        "recall_at_20": {"value": 0.25, "standard_error": 0.0312},
        "recall_at_40": {"value": 0.5, "standard_error": None},
        "num_users": 9,
    }


def test_the_table_has_a_row_each_the_best_last():
    baselines = {"popularity": figures(0.2), "ease": figures(0.45), "item_knn": figures(0.3), "ials": figures(0.1)}
    table = metrics_table({"test": figures(0.41234, 0.00556), "baselines": baselines}).splitlines()
    assert table[0].split() == ["test", "split", "NDCG@100", "Recall@20", "Recall@40"]
    assert [line.split()[0] for line in table[1:]] == ["iALS", "popularity", "item-kNN", "CLLM4Rec", "EASE"]
    assert table[4].split() == ["CLLM4Rec", "0.4123", "±", "0.0056", "0.2500", "±", "0.0312", "0.5000", "±", "-"]
    assert len({len(line) for line in table}) == 1


def test_the_table_without_baselines_has_the_model_alone():
    assert len(metrics_table({"test": figures(0.4)}).splitlines()) == 2


def test_figures_of_nobody_are_dashes():
    nobody = {"value": None, "standard_error": None}
    results = {"test": dict.fromkeys(("ndcg_at_100", "recall_at_20", "recall_at_40"), nobody)}
    assert metrics_table(results | {"baselines": {"ease": results["test"]}}).count("- ± -") == 6


def test_recommendations_read_like_a_list():
    def item(name, text=""):
        return {"id": name, "title": f"the {name}", "text": text}

    shown = show_recommendations(
        [item("apron"), item("broom")], [(item("chair", "to sit on"), 0.1234), (item("drill"), 0.02)]
    )
    assert [line.split() for line in shown.splitlines()] == [
        ["history:", "the", "apron,", "the", "broom"],
        ["1.", "the", "chair", "12.3%", "to", "sit", "on"],
        ["2.", "the", "drill", "2.0%"],
    ]


def test_a_long_history_is_cut():
    history = [{"title": f"thing{i}"} for i in range(9)]
    assert show_recommendations(history, []) == "history: " + ", ".join(f"thing{i}" for i in range(8)) + " …"
    assert "…" not in show_recommendations(history[:8], [])


def test_versions_are_those_that_are_installed():
    found = versions()
    assert set(found) == {"python", *LIBRARIES}
    assert found["python"] == platform.python_version()
    assert (found["torch"], found["transformers"]) == (torch.__version__, transformers.__version__)


def test_the_machine_is_named_and_fits_into_json():
    found = json.loads(json.dumps(hardware()))
    assert found["machine"] == platform.machine()
    assert found["cpu_threads"] == torch.get_num_threads()
    assert (found["accelerator"] is None) is not torch.cuda.is_available()
    assert found["bf16"] is computes_in_bf16("cuda" if found["accelerator"] else "cpu")


def test_a_gpu_that_was_not_used_is_not_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert hardware(torch.device("cpu"))["accelerator"] is None
