"""Sentence vectors of items: what a pretrained language model's lower layers say of their texts, averaged over words and texts."""

import numpy as np
from transformers import AutoTokenizer

from configuration.load import load_recipe
from modeling_cllm4rec import CLLM4RecForRecommendation
from modeling_cllm4rec.text_cllm4rec import pooled_states
from training.data.corpora import Corpora, load_from_backbone
from training.stages.topics import unit


def sentence_vectors(corpora: Corpora, backbone: str) -> np.ndarray:
    """`(num_items, width)` float32 of length 1, centred and scaled over the items; zeros where an item has no text.

    Args:
        corpora: Whose texts are read: those that training may read.
        backbone: Hub name or folder of the model that the recipe `smollm2` names, or of one alike.
    """
    recipe = load_recipe(None, "smollm2", [f"backbone.name={backbone}"])
    tokenizer = load_from_backbone(AutoTokenizer, recipe)
    model = CLLM4RecForRecommendation.from_backbone(
        backbone, num_users=1, num_items=1, backbone_layers=recipe.backbone.layers, gguf_file=recipe.backbone.gguf_file
    )
    texts = corpora.texts("content")
    about = np.flatnonzero(texts.item >= 0)
    main = [texts.documents[place][texts.prompt_length[place] :] for place in about.tolist()]
    words = tokenizer(corpora.tokenizer.batch_decode(main, skip_special_tokens=True), add_special_tokens=False)
    return averaged(pooled_states(model.model, words["input_ids"]).numpy(), texts.item[about], corpora.num_items)


def averaged(states: np.ndarray, owners: np.ndarray, rows: int) -> np.ndarray:
    """States `(n, width)`, NaN where there is none, averaged for each owner, centred and scaled over these, of length 1."""
    there = ~np.isnan(states).any(1)
    states, owners = states[there], owners[there]
    sums = np.zeros((rows, states.shape[1]))
    np.add.at(sums, owners, states)
    counts = np.bincount(owners, minlength=rows)
    known = counts > 0
    means = sums[known] / counts[known, None]
    found = np.zeros_like(sums)
    found[known] = (means - means.mean(0)) / np.maximum(means.std(0), 1e-6)
    return unit(found)
