"""Training for the item that comes next (`method.targets` next)."""

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification

from modeling_cllm4rec import CLLM4RecForCollaborativeLM
from training.data.corpora import open_corpora
from training.finetune import finetune
from training.predict import predict
from training.pretrain import pretrain
from training.stages.towers import share

NEXT_ITEM = {
    "history_order": "chronological", "targets": "next", "readout": "last", "distillation": 0.0,
}  # fmt: skip


def test_the_next_item_is_learnt_in_order_of_time_and_read_at_the_last_one(store_recipe, store_frame, vary):
    recipe = vary(
        store_recipe, data={"split": "leave_last_out", "review_column": None}, method=NEXT_ITEM | {"user_offsets": False, "text_map": False},
        finetune={"epochs": 12, "lr": 1e-2, "patience": 0},
    )  # fmt: skip
    # Everybody goes on from one item to the next one of a circle.
    starts = np.arange(40) % 12
    rows = [(f"u{n}", f"i{(start + step) % 12:02}", step) for n, start in enumerate(starts) for step in range(7)]
    pretrain(recipe, frame=pd.DataFrame(rows, columns=["user", "item", "time"]))
    run = finetune(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(run.model, trust_remote_code=True)
    corpora = open_corpora(run.corpora)
    place = {item["id"]: j for j, item in enumerate(corpora.items())}
    circle = [place[f"i{j:02}"] for j in range(12)]
    histories = [[circle[(start + step) % 12] for step in range(5)] for start in range(12)]
    best = model.recommend(histories, k=1).items[:, 0].tolist()
    assert best == [circle[(start + 5) % 12] for start in range(12)]
    assert model.config.prompt_names_user
    # What the head reads is the language model's state behind the last item.
    prompts = model.prepare_prompts(histories[:2])
    language_model = share(CLLM4RecForCollaborativeLM, model.model).eval()
    wanted = language_model(prompts["input_ids"]).logits[:, -1]
    torch.testing.assert_close(model(**prompts).logits, wanted)
    assert predict(recipe)["test"]["ndcg_at_100"]["value"] > 0.9


def test_where_no_prompt_named_a_user_none_does_when_people_are_ranked_for(store_recipe, store_frame, vary):
    fields = {"user_token_dropout": 1.0, "user_offsets": False, "text_map": False}
    recipe = vary(store_recipe, method=NEXT_ITEM | fields)
    pretrain(recipe, frame=store_frame)
    finetune(recipe)
    results = predict(recipe)
    assert results["test"] == results["test_by_history"]
