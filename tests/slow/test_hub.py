"""From a table to a page on the Hub, and from the page to a stranger's machine, by the commands that README and the page print."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import pipeline

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
TOP_10 = """
import importlib.util, json, sys
import torch
from transformers import pipeline

for absent in ("modeling_cllm4rec", "training", "configuration", "accelerate", "datasets", "pandas", "scipy", "peft"):
    assert importlib.util.find_spec(absent) is None, absent
repo, revision, people = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3], encoding="utf-8"))
rec = pipeline("recommendation", model=repo, revision=revision, trust_remote_code=True)
print(json.dumps(rec(people, top_k=10, batch_size=16)))
"""
# As Inference Endpoints do: the whole repo, and the file in it.
HANDLER = """
import json, sys
from huggingface_hub import snapshot_download

folder = snapshot_download(sys.argv[1], revision=sys.argv[2])
sys.path.insert(0, folder)
from handler import EndpointHandler

print(json.dumps(EndpointHandler(folder)({"inputs": {"history": json.loads(sys.argv[3])}, "parameters": {"top_k": 3}})))
"""


@pytest.fixture
def stranger(hub, in_process, tmp_path, monkeypatch):
    """Run something in a process of somebody who has a home of their own and no token."""
    monkeypatch.delenv("HF_TOKEN")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    return lambda *command, **environment: in_process(*command, cwd=tmp_path, **(home | environment))


def test_fifty_users_get_the_same_from_the_hub_after_all_that_was_local_is_gone(
    quickstart, hub, in_process, python, bare, tmp_path, request
):
    run = shutil.copytree(quickstart[0], tmp_path / "sample")
    users = [json.loads(line)["id"] for line in (run / "corpora" / "users.jsonl").read_text().splitlines()[::20]][:50]
    people = tmp_path / "people.json"
    people.write_text(json.dumps([{"user": user} for user in users]))
    here = pipeline("recommendation", model=str(run / "model"), trust_remote_code=True)(
        json.loads(people.read_text()), top_k=10, batch_size=16
    )
    assert len(here) == 50
    history = ["python3-numpy", "python3-matplotlib"]
    answer = here_for(run, history)
    said = in_process(python, "training/push.py", run, "me/sample", HF_HUB_OFFLINE="0")
    revision = re.search(r'revision="([0-9a-f]{40})"', said)[1]
    shutil.rmtree(run)
    stranger = request.getfixturevalue("stranger")
    for environment in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):  # then from the cache alone
        there = json.loads(
            stranger(bare, "-I", "-c", TOP_10, "me/sample", revision, people, **environment).splitlines()[-1]
        )
        assert [[entry["item"] for entry in best] for best in there] == [
            [entry["item"] for entry in best] for best in here
        ]
        np.testing.assert_allclose(
            [[entry["score"] for entry in best] for best in there],
            [[entry["score"] for entry in best] for best in here],
            atol=1e-6,
        )
    endpoint = stranger(bare, "-c", HANDLER, "me/sample", revision, json.dumps(history))
    assert json.loads(endpoint.splitlines()[-1]) == answer


def here_for(run, history):
    rec = pipeline("recommendation", model=str(run / "model"), trust_remote_code=True)
    return json.loads(json.dumps(rec({"history": history}, top_k=3)))


@pytest.fixture
def own_data(tmp_path):
    """A folder with the tables that README's recipe names, the recipe as README has it, and the project's scripts."""
    folder = tmp_path / "own"
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = [
        (f"customer {user:03}", f"product {item:02}", f"2024-0{1 + place}-11")
        for user in range(60)
        for place, item in enumerate(draw.choice(30, 8, replace=False, p=np.arange(30, 0, -1) / 465))
    ]
    pd.DataFrame(rows, columns=["customer", "product", "time"]).to_csv(folder / "purchases.csv", index=False)
    products = [(f"product {item:02}", f"Thing {item}", f"A thing of kind {item % 5}") for item in range(30)]
    pd.DataFrame(products, columns=["product", "name", "description"]).to_csv(folder / "products.csv", index=False)
    (folder / "shop.yaml").write_text(block("Train and publish your own", "yaml"), encoding="utf-8")
    (folder / "training").symlink_to(PROJECT / "training")
    return folder


def block(heading, language):
    """The first fenced block of a language below a heading of README."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


def commands(text):
    """The words of each command of a shell block, without comments."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page, language):
    """The fenced blocks of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.fixture
def path():
    """Where `python`, `accelerate` and `hf` of the suite's environment are found first."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_four_commands_of_readme_lead_from_a_table_to_a_page(own_data, hub, in_process, path):
    four = commands(block("Train and publish your own", "bash"))
    assert len(four) == 4
    for words in four:
        said = in_process(*words, cwd=own_data, HF_HUB_OFFLINE="0", **path)
    assert "me/shop is at" in said
    page = hub.repo("me/shop")["README.md"].decode()
    assert "| **CLLM4Rec** |" in page
    assert not [path for path, content in hub.repo("me/shop").items() if re.search(rb"customer \d{3}", content)]


def test_every_snippet_of_a_page_runs_as_it_stands(write_shop, hub, in_process, python, bare, path, tmp_path, request):
    recipe = write_shop(tmp_path)
    text = recipe.read_text()
    recipe.write_text("license: mit\n" + text.replace("data:\n", "data:\n  license: cc0-1.0\n"))
    for stage in ("pretrain", "finetune", "predict"):
        in_process(python, f"training/{stage}.py", "--config", recipe)
    in_process(
        python, "training/push.py", tmp_path / "runs/shop", "me/shop", "--dataset", "me/data", HF_HUB_OFFLINE="0"
    )
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "shop.csv").unlink()
    page, data_page = hub.repo("me/shop")["README.md"].decode(), hub.repo("me/data", "dataset")["README.md"].decode()
    stranger = request.getfixturevalue("stranger")
    # What a visitor runs, with torch and transformers alone.
    snippets = blocks(page, "python")
    assert len(snippets) >= 2
    printed = [stranger(bare, "-I", "-c", snippet) for snippet in snippets]
    assert blocks(page, "text")[0].split() == printed[0].split()
    # Training again, from the pushed data, in the project's own environment.
    (tmp_path / "training").symlink_to(PROJECT / "training")
    again = [words for text in blocks(page, "bash") for words in commands(text)]
    scripts = [Path(word).name for words in again for word in words if word.endswith(".py")]
    assert scripts == ["pretrain.py", "finetune.py", "predict.py"]
    for words in again:
        stranger(*words, **path)
    results = json.loads(next(tmp_path.glob("runs/*/results.json")).read_text())
    assert results["test"] == json.loads(hub.repo("me/shop")["results.json"])["test"]
    # The data's page needs `datasets`.
    for snippet in blocks(data_page, "python"):
        stranger(python, "-c", snippet)


def test_readmes_snippets_run_as_they_stand(quickstart, in_process, python, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sample").symlink_to(quickstart[0])
    snippets = [snippet for snippet in blocks(README, "python") if "runs/sample" in snippet]
    searches = [snippet for snippet in snippets if "import faiss" in snippet]
    assert (len(snippets), len(searches)) == (3, 1)
    for snippet in snippets:
        if snippet not in searches:
            in_process(python, "-c", snippet, cwd=tmp_path)
    if importlib.util.find_spec("faiss") is not None:  # of the extra `bench`
        in_process(python, "training/export.py", quickstart[0], "--out", tmp_path / "vectors")
        in_process(python, "-c", searches[0].replace("runs/sample/vectors", "vectors"), cwd=tmp_path)
