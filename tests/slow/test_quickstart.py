"""`make quickstart`, in a folder of its own: what a person sees and holds at the end."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
REFERENCES = {"popularity": 0.224, "item_knn": 0.344, "ease": 0.364, "ials": 0.385}
HISTORY = ["python3-numpy", "python3-matplotlib"]
OPEN = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folder, history = sys.argv[1], json.loads(sys.argv[2])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
for auto_class in (AutoModel, AutoModelForCausalLM):
    auto_class.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not {"modeling_cllm4rec", "training", "configuration"} & set(sys.modules)
with open(f"{folder}/items.jsonl", encoding="utf-8") as lines:
    items = [json.loads(line)["id"] for line in lines]
assert len(tokenizer) == config.vocab_size
best = model.recommend([[items.index(raw) for raw in history]], k=5)
print(json.dumps([items[j] for j in best.items[0].tolist()]))
"""


def test_the_makefile_runs_the_three_scripts(quickstart_commands):
    assert [words[0] for words in quickstart_commands] == [
        f"training/{name}.py" for name in ("pretrain", "finetune", "predict")
    ]


def test_the_model_reaches_its_figure_and_the_baselines_theirs(quickstart):
    results = json.loads((quickstart[0] / "results.json").read_text())
    found = {name: figures["ndcg_at_100"]["value"] for name, figures in results["baselines"].items()}
    assert found == {name: pytest.approx(value, abs=0.01) for name, value in REFERENCES.items()}
    assert results["test"]["num_users"] == 1091
    assert results["test"]["ndcg_at_100"]["value"] >= 0.37 > found["popularity"]


def test_the_folder_holds_model_results_and_pictures(quickstart):
    assert {path.name for path in quickstart[0].iterdir()} >= {
        "checkpoints", "corpora", "log", "model", "pictures", "results.json",
    }  # fmt: skip
    assert {path.name for path in (quickstart[0] / "pictures").iterdir()} == {"curves.png", "items.png"}
    # The users are software projects: their ids may be published.
    assert (quickstart[0] / "model" / "users.jsonl").is_file()


def test_a_table_and_three_recommendations_are_printed(quickstart):
    shown = quickstart[1]
    for name in ("popularity", "item-kNN", "EASE", "iALS", "CLLM4Rec"):
        assert any(line.startswith(name) and line.count("±") == 3 for line in shown.splitlines())
    blocks = [block for block in shown.split("\n\n") if "history: " in block]
    assert len(blocks) == 3
    (plots,) = (block for block in blocks if f"history: {', '.join(HISTORY)}\n" in block)
    (scipy,) = (line for line in plots.splitlines() if "python3-scipy" in line)
    # rank, title, probability, and a sentence
    assert len(scipy.split()) > 6


def test_another_process_opens_the_folder_and_recommends(quickstart, in_process, python, tmp_path):
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    shown = in_process(python, "-c", OPEN, quickstart[0] / "model", json.dumps(HISTORY), cwd=tmp_path, **modules)
    assert "python3-scipy" in json.loads(shown)
