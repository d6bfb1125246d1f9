"""What a visitor needs who has nothing of ours: torch and transformers; and what `pip install` brings."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configuration.load import load_recipe
from modeling_cllm4rec import CLLM4RecForContentLM, CLLM4RecForRecommendation, CLLM4RecModel
from training.finetune import finetune
from training.pretrain import pretrain

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
COMPARE = """
import importlib.util, sys
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

for absent in ("modeling_cllm4rec", "training", "configuration", "accelerate", "datasets", "pandas", "scipy", "peft"):
    assert importlib.util.find_spec(absent) is None, absent
folder, gave = sys.argv[1], load_file(sys.argv[2])
AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert tokenizer("user_3 item_7", add_special_tokens=False)["input_ids"] == gave["words"].tolist()
for name, auto_class in {
    "base": AutoModel, "content": AutoModelForCausalLM, "recommendation": AutoModelForSequenceClassification
}.items():
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output = model(gave["input_ids"])
    given = output.last_hidden_state if name == "base" else output.logits
    torch.testing.assert_close(given, gave[name], atol=1e-6, rtol=0)
    print(name)
"""
IMPORT = """
import importlib.util, json, sys
import modeling_cllm4rec
from transformers import AutoModel

absent = [name for name in ("training", "configuration", "metrics", "tests") if importlib.util.find_spec(name) is None]
model = AutoModel.from_pretrained(sys.argv[1])  # known by import: no remote code
print(json.dumps({"absent": absent, "module": type(model).__module__, "version": modeling_cllm4rec.__version__}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_shop):
    """The folder of a trained model."""
    folder = tmp_path_factory.mktemp("shop")
    recipe = load_recipe(write_shop(folder))
    pretrain(recipe)
    return finetune(recipe).model


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, in_process, bare):
    """The wheel that pip builds of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    in_process(bare, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, PROJECT)
    (path,) = folder.iterdir()
    return path


def test_a_bare_environment_opens_the_model_to_the_same_numbers(model, bare, in_process, tmp_path):
    gave = {"input_ids": torch.tensor([[290 + 3, 7, 320 + 5, 9], [20, 320 + 19, 11, 290 + 29]])}
    gave["words"] = torch.tensor([290 + 3, 320 + 7])
    heads = {"base": CLLM4RecModel, "content": CLLM4RecForContentLM, "recommendation": CLLM4RecForRecommendation}
    for name, head in heads.items():
        with torch.no_grad():
            output = head.from_pretrained(model).eval()(gave["input_ids"])
        gave[name] = (output.last_hidden_state if name == "base" else output.logits).contiguous()
    save_file(gave, tmp_path / "gave.safetensors")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    shown = in_process(bare, "-I", "-c", COMPARE, model, tmp_path / "gave.safetensors", cwd=tmp_path, **home)
    assert shown.split() == ["base", "content", "recommendation"]


def test_the_wheel_holds_the_modeling_code_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    folders = {name.split("/")[0] for name in names}
    assert sorted(folders) == [next(name for name in folders if name.endswith(".dist-info")), "modeling_cllm4rec"]
    code = sorted(Path(name).name for name in names if name.startswith("modeling_cllm4rec/"))
    assert code == sorted(path.name for path in (PROJECT / "modeling_cllm4rec").glob("*.py"))
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [re.match(r"Requires-Dist: (\w+)", line)[1] for line in needed] == ["torch", "transformers"]
    assert "License-File: LICENSE" in metadata


@pytest.fixture
def installed(wheel, bare, in_process):
    """The bare environment with the wheel, which goes again."""
    in_process(bare, "-m", "pip", "install", "--quiet", wheel)
    yield bare
    in_process(bare, "-m", "pip", "uninstall", "--quiet", "--yes", "cllm4rec")


def test_installing_gives_the_modeling_code_and_nothing_that_clashes(installed, wheel, model, in_process, tmp_path):
    found = json.loads(in_process(installed, "-I", "-c", IMPORT, model, cwd=tmp_path).splitlines()[-1])
    assert found["absent"] == ["training", "configuration", "metrics", "tests"]
    assert found["module"] == "modeling_cllm4rec.modeling_cllm4rec"
    assert found["version"] in wheel.name
