"""The model of a run: the recommender around the recipe's backbone, and which of its weights learn."""

import logging
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from configuration.errors import InputError
from configuration.recipe import Backbone, Method, Recipe
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.data.corpora import Corpora, load_from_backbone
from training.stages.text_states import check_text_encoder

logger = logging.getLogger(__name__)

# Hidden size of a backbone whose configuration names none, by the number of items: a state holds a teacher's scores up to its size.
WIDTHS = ((2_000, 128), (8_000, 256))
LARGEST_WIDTH = 512

SPECIAL_WORDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_model(recipe: Recipe, corpora: Corpora) -> CLLM4RecForRecommendation:
    """The recommender around the recipe's backbone, its ID tables at random.

    Raises:
        InputError: if the backbone cannot be loaded or made.
    """
    backbone, method = recipe.backbone, recipe.method
    set_seed(recipe.seed)
    has_text = len(corpora.texts("content")) > 0
    fields: dict[str, Any] = {
        "num_users": corpora.num_users,
        "num_items": corpora.num_items,
        "content_tower": method.content_tower and has_text,
        "freeze_backbone": backbone.train != "full",
        "item_bias": method.item_bias,
        "max_history": method.max_history,
        **prompt_fields(corpora, method),
        "initializer_range": method.initialisation_std,
    }
    loading: dict[str, Any] = {
        "attn_implementation": backbone.attn_implementation,
        "dtype": getattr(torch, backbone.dtype),
    }
    try:
        if backbone.name is not None:
            model = CLLM4RecForRecommendation.from_backbone(
                backbone.name, backbone_layers=backbone.layers, gguf_file=backbone.gguf_file, **loading, **fields
            )
        else:
            end = corpora.tokenizer.eos_token_id
            words = {"vocab_size": corpora.num_words} | dict.fromkeys(SPECIAL_WORDS, end)
            config = CLLM4RecConfig(backbone_config=backbone_config(backbone, corpora.num_items, **words), **fields)
            model = CLLM4RecForRecommendation._from_config(config, **loading)
        set_attention_dropout(model, backbone.attention_dropout)
        fit_positions(model.config, corpora)
        check_causal(model)
        return model
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        where = "backbone.config" if backbone.name is None else f"backbone.name {backbone.name!r}"
        raise InputError(f"{where}: no such backbone can be had here: {str(error).splitlines()[0]}") from error


def prompt_fields(corpora: Corpora, method: Method) -> dict[str, Any]:
    """The configuration's fields that say what a recommendation prompt is and how it is read; fine-tuning alone depends on them."""
    prompt_ids = dict(corpora.info["prompt_ids"])
    if method.targets == "next":
        prompt_ids |= {"separator": [], "recommend": []}
    return {
        "readout": method.readout,
        "prompt_ids": prompt_ids,
        "prompt_names_user": method.user_token_dropout < 1,
    }


def set_attention_dropout(model: CLLM4RecForRecommendation, share: float) -> None:
    """Drop so much of the attention's weights in training (`backbone.attention_dropout`).

    Without it attention is one fused kernel; with it torch multiplies matrices and draws a number for each pair of tokens, which
    `python benchmarks/parts.py` compares.
    """
    for module in model.model.backbone.modules():
        for name in ("attn_dropout", "attention_dropout"):
            found = getattr(module, name, None)
            if isinstance(found, nn.Dropout):
                found.p = share
            elif isinstance(found, float):
                setattr(module, name, share)


@torch.no_grad()
def check_causal(model: CLLM4RecForRecommendation) -> None:
    """Refuse a backbone whose tokens see later ones: its language models would read what they are to predict.

    Raises:
        InputError: naming the kind of backbone.
    """
    model.eval()
    first = model.model(torch.tensor([[0, 1], [0, 2]], device=model.device)).last_hidden_state[:, 0]
    model.train()
    if not torch.allclose(first[0], first[1], atol=1e-3):
        kind = model.config.get_text_config().model_type
        raise InputError(
            f"backbone: {kind!r} is no decoder, its tokens see later ones; choose one such as gpt2 or llama"
        )


def fit_positions(config: CLLM4RecConfig, corpora: Corpora) -> None:
    """Lower `config.max_history` to what the backbone has positions for; its prompts leave out the oldest items.

    Raises:
        InputError: if a text of the content corpus does not fit.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    around = 2 + sum(len(ids) for ids in corpora.info["prompt_ids"].values())
    if config.max_history + around > positions:
        config.max_history = max(positions - around, 1)
        logger.info("prompts hold %d items: the backbone has %d positions", config.max_history, positions)
    longest = int(corpora.texts("content").documents.lengths.max(initial=0))
    if longest > positions:
        raise InputError(
            f"method.max_text_tokens: a document of the content corpus has {longest} tokens, but the backbone has {positions} "
            f"positions; lower it by {longest - positions} or more"
        )


def check_backbone(recipe: Recipe) -> None:
    """Refuse a backbone that is not there or cannot be made, or a text encoder that is not there, before anything is read or written.

    Raises:
        InputError: naming the field.
    """
    if recipe.backbone.name is None:
        config = backbone_config(recipe.backbone, 1)
    else:
        config = load_from_backbone(AutoConfig, recipe)
    own = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = own if recipe.backbone.layers is None else recipe.backbone.layers
    if layers == 0 and recipe.method.readout == "last" and recipe.method.targets != "next":
        raise InputError(
            "method.readout: at the last token a backbone of 0 layers has not read the history; choose mean, or keep a layer"
        )
    check_text_encoder(recipe.text_encoder)


def backbone_config(backbone: Backbone, num_items: int, **of_words: Any) -> PreTrainedConfig:
    """The configuration of a backbone that is made on the spot.

    Args:
        backbone: Its section of the recipe.
        num_items: The hidden size follows from it where the recipe names none.
        of_words: The fields that follow from the tokenizer; they win over the recipe's.

    Raises:
        InputError: if transformers knows no such decoder, or cannot make it.
    """
    fields = backbone.config | of_words
    kind = str(fields.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        nearest = get_close_matches(kind, CONFIG_MAPPING, n=1) or ["gpt2"]
        raise InputError(f"backbone.config: there is no model_type {kind!r}; the nearest is {nearest[0]!r}")
    name = CONFIG_MAPPING[kind].attribute_map.get("hidden_size", "hidden_size")
    if not {name, "hidden_size"} & set(fields):
        fields[name] = next((width for most, width in WIDTHS if num_items <= most), LARGEST_WIDTH)
    try:
        config = AutoConfig.for_model(kind, **fields)
        if backbone.layers is not None:
            config.num_hidden_layers = backbone.layers
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a wrong number makes transformers fail in whatever way
        reason = shorten(str(error), 200)
        raise InputError(f"backbone.config: no decoder {kind!r} can be made from it ({reason}); correct it") from error
    return config


def learn_backbone(recipe: Recipe, model: CLLM4RecForRecommendation) -> None:
    """Set which of the backbone's weights learn: none, all, or low-rank updates (`backbone.train`)."""
    if recipe.backbone.train != "lora":
        return
    from peft import LoraConfig, get_peft_model

    set_seed(recipe.seed)  # the updates start alike in every process, and again on the next day
    rank, backbone = recipe.backbone.lora_rank, model.model.backbone
    transposed = any(isinstance(module, Conv1D) for module in backbone.modules())  # GPT-2's linear layers
    linear = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    model.model.backbone = get_peft_model(backbone, linear)
