"""A tiny shop with reviews and texts, its corpora, and what the loops need."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from configuration.recipe import Backbone, Data, Evaluation, Method, Recipe, SideTable, Stage
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe
from training.data.batches import Layout
from training.data.corpora import build_corpora, open_corpora
from training.data.interactions import build_interactions
from training.data.readers import read_tables
from training.finetune import finetune
from training.predict import predict
from training.pretrain import pretrain
from training.stages.towers import Towers

datasets.disable_progress_bars()

STORE_RECIPE = Recipe(
    name="store",
    device="cpu",
    tracker="none",
    data=Data(timestamp_column="time", review_column="review"),
    backbone=Backbone(
        config={"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 128},
        train="full",
        num_words=300,
    ),
    method=Method(max_history=16, max_text_tokens=16, item_bias=True, user_offsets=True),
    pretrain=Stage(epochs=2, batch_size=16, lr=1e-2),
    finetune=Stage(epochs=2, batch_size=16, lr=1e-2),
    evaluation=Evaluation(baselines=[]),
)

USERS = ["ann", "bob", "cy", "dee", "eve", "fay"]
ITEMS = ["apron", "broom", "chair", "drill", "easel", "flute", "glass", "honey", "inkpot", "jigsaw", "kettle", "lamp"]


@pytest.fixture(scope="session")
def shop_frame():
    """Six users with five training pairs, one for validation and one for test; a review for all but each first pair."""
    splits = ["train"] * 5 + ["validation", "test"]
    return pd.DataFrame(
        {
            "user": user,
            "item": ITEMS[(start + place) % len(ITEMS)],
            "split": split,
            "review": f"{user} took this one home, and it works: mark {place}!" if place else "",
        }
        for start, user in enumerate(USERS)
        for place, split in enumerate(splits)
    )


@pytest.fixture(scope="session")
def shop_recipe(tmp_path_factory):
    """The recipe that reads the shop, with a table of items and one of users beside it."""
    folder = tmp_path_factory.mktemp("shop")
    items = pd.DataFrame({"id": ITEMS, "title": ["The " + item for item in ITEMS], "text": "It is sold here."})
    users = pd.DataFrame({"id": USERS, "text": ["", *("A person called " + user for user in USERS[1:])]})
    items.to_csv(folder / "items.csv", index=False)
    users.to_csv(folder / "users.csv", index=False)
    return Recipe(
        name="shop",
        seed=3,
        data=Data(
            review_column="review",
            split="given",
            items=SideTable(str(folder / "items.csv"), title_column="title", text_columns=["text"]),
            users=SideTable(str(folder / "users.csv"), text_columns=["text"]),
        ),
        backbone=Backbone(config={"model_type": "gpt2"}, num_words=320),
        method=Method(max_text_tokens=40, max_history=8),
    )


@pytest.fixture(scope="session")
def build():
    """From a DataFrame and a recipe to opened corpora."""

    def build(frame, recipe, folder):
        interactions = build_interactions(read_tables(recipe.data, frame), recipe.data, recipe.seed)
        return build_corpora(interactions, recipe, folder, progress=False)

    return build


@pytest.fixture(scope="session")
def shop(build, shop_frame, shop_recipe, tmp_path_factory):
    """The corpora of the shop; to be read only."""
    return build(shop_frame, shop_recipe, tmp_path_factory.mktemp("run") / "corpora")


@pytest.fixture(scope="session")
def layout(shop):
    return Layout(shop.tokenizer.num_words, shop.num_users, shop.num_items, shop.info["prompt_ids"])


@pytest.fixture
def make_towers(shop, layout):
    """Heads over a tiny GPT-2 that knows the shop; the same weights at every call."""

    def make_towers(lambda_v=0.1, distillation=0.0, dropout=0.0, train_backbone=True, **fields):
        torch.manual_seed(0)
        backbone = GPT2Config(
            vocab_size=layout.num_words, n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        config = CLLM4RecConfig(
            backbone_config=backbone,
            num_users=shop.num_users,
            num_items=shop.num_items,
            freeze_backbone=not train_backbone,
            initializer_range=0.3,
            **({"prompt_ids": layout.prompt_ids} | fields),
        )
        return Towers(CLLM4RecForRecommendation(config), lambda_v, distillation)

    return make_towers


@pytest.fixture
def make_accelerator():
    """A fresh Accelerator on the CPU at every call: its state is shared by the whole process."""

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    def make_accelerator(mixed_precision="no"):
        reset()
        return Accelerator(cpu=True, mixed_precision=mixed_precision)

    yield make_accelerator
    reset()


@pytest.fixture
def with_method():
    """A recipe with some fields of its method changed."""
    return lambda recipe, **changes: replace(recipe, method=replace(recipe.method, **changes))


@pytest.fixture(scope="session")
def store_frame():
    """Forty people with ten of twenty-four things each, in order of time; they wrote a review of every third."""
    order = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "user": f"person {user:02}",
            "item": f"thing {item:02}",
            "time": 1_000_000 + 100 * user + place,
            "review": f"A thing like number {item} was what person {user} wanted." if place % 3 == 0 else None,
        }
        for user in range(40)
        for place, item in enumerate(order.permutation(24)[:10])
    )


@pytest.fixture(scope="session")
def vary():
    """A recipe with some fields changed: `vary(recipe, seed=7, finetune={"epochs": 1})`."""

    def vary(recipe, **changes):
        sections = {
            name: replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return replace(recipe, **sections)

    return vary


@pytest.fixture
def store_recipe(tmp_path):
    """How the store is learnt in a second, in a folder of the test's own."""
    return replace(STORE_RECIPE, output_dir=str(tmp_path))


@pytest.fixture(scope="session")
def store_run(tmp_path_factory, store_frame, vary):
    """The store's three stages, run once, with all baselines; to be read only."""
    recipe = replace(STORE_RECIPE, output_dir=str(tmp_path_factory.mktemp("runs")))
    recipe = vary(recipe, evaluation={"baselines": ["popularity", "item_knn", "ease", "ials"], "top_k": 12})
    with pytest.MonkeyPatch.context() as patch:
        gave = record_outputs(patch)
        run = pretrain(recipe, frame=store_frame)
        finetune(recipe)
    return SimpleNamespace(recipe=recipe, run=run, folder=run.folder, gave=gave, results=predict(recipe))


@pytest.fixture
def store_copy(store_run, tmp_path):
    """A copy of the store's run that a test may change: its recipe."""
    shutil.copytree(store_run.folder, tmp_path / store_run.folder.name)
    return replace(store_run.recipe, output_dir=str(tmp_path))


def record_outputs(patch):
    """Keep what each head gives whenever a model is saved; the best model of fine-tuning comes last."""
    gave, save = {}, Towers.save_model

    def save_and_record(towers, folder, state=None):
        save(towers, folder, state)
        gave["input_ids"] = torch.tensor([[300 + 3, 7, 340 + 5, 340 + 23, 9], [20, 340 + 1, 11, 300 + 39, 12]])
        with torch.no_grad():
            gave["base"] = towers.base(gave["input_ids"]).last_hidden_state
            for name, head in towers.heads.items():
                gave[name] = head(gave["input_ids"]).logits

    patch.setattr(Towers, "save_model", save_and_record)
    return gave


@pytest.fixture
def recorded(monkeypatch):
    """What each head gave on fixed ids when a model was saved last."""
    return record_outputs(monkeypatch)


@pytest.fixture
def backbone_folder(tmp_path, store_frame):
    """A pretrained language model on disk: GPT-2 of width 8 with a vocabulary of its own."""
    torch.manual_seed(5)
    tokenizer = train_byte_level_bpe(store_frame["review"].dropna(), 290)
    tokenizer.save_pretrained(tmp_path / "backbone")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture(scope="module")
def store(store_run):
    """The corpora of the store's run; to be read only."""
    return open_corpora(store_run.run.corpora)


@pytest.fixture(scope="module")
def model(store_run):
    """The model of the store's run."""
    return AutoModelForSequenceClassification.from_pretrained(store_run.folder / "model", trust_remote_code=True)
