"""Configuration of CLLM4Rec: a decoder of transformers whose vocabulary is extended by one token per user and per item."""

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

FORMAT_VERSION = 1

AUTO_MAP = {
    "AutoConfig": "configuration_cllm4rec.CLLM4RecConfig",
    "AutoModel": "modeling_cllm4rec.CLLM4RecModel",
    "AutoModelForCausalLM": "modeling_cllm4rec.CLLM4RecForContentLM",
    "AutoModelForSequenceClassification": "modeling_cllm4rec.CLLM4RecForRecommendation",
}
CUSTOM_PIPELINES = {
    "recommendation": {
        "impl": "pipeline_cllm4rec.RecommendationPipeline",
        "pt": ["AutoModelForSequenceClassification"],
    }
}


@strict
class CLLM4RecConfig(PreTrainedConfig):
    r"""Configuration of [`CLLM4RecModel`] and its heads.

    Ids are laid out as words `[0, N)`, users `N + i`, items `N + num_users + j`, with `N = backbone_config.vocab_size`.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the decoder; its `vocab_size` is the number of words N. Defaults to GPT-2's.
        num_users (`int`): Number of user tokens.
        num_items (`int`): Number of item tokens.
        user_embeddings (`bool`): Whether the user tokens have embeddings. A model published without them keeps its number of
            users, so that item ids stay where they are, and serves people by their history.
        content_tower (`bool`): Whether the content tower has user and item embeddings of its own. Without them it reads
            the collaborative ones.
        freeze_backbone (`bool`): Whether backbone and word embeddings are made without gradients, so that only the
            embeddings of users and items learn (the paper's setting).
        readout (`"last"` or `"mean"`): The recommendation prompt is read at its last token (paper) or as the mean over its
            ID tokens and the last one.
        item_bias (`bool`): Whether the item heads have a learned bias per item.
        max_history (`int`): Items of a history that a prompt holds; the oldest are left out.
        prompt_ids (`dict[str, list[int]]`): Word ids of the recommendation prompt's hard parts, with the keys `history`
            (" has interacted with"), `separator` (",") and `recommend` (" will interact with"). Where `recommend` is empty, as after
            training for the next item, the prompt ends with the history.
        prompt_names_user (`bool`): Whether recommendation prompts name a known user, who is otherwise served by history alone.
        num_text_terms (`int`): Terms that the text map counts, by which texts of people and of new items are read; 0: there is
            no such map.
        text_state_width (`int`): Width of what the text encoder, in the folder `text_encoder`, makes of a text, which the text map
            reads beside its terms; 0: it reads terms alone.
        user_offsets (`bool`): Whether there is a table of what is added to what the prompts of known users say.
        catalogue (`str`, *optional*): Mark of the catalogue's state, where items were removed or users have come or gone since
            training; the first line of its `users.jsonl` bears the same, so that a stale file is noticed.
        initializer_range (`float`): Standard deviation of the user and item embeddings at the start.
        format_version (`int`): Version of the saved folder's layout.

    Raises:
        StrictDataclassClassValidationError: where a count is not positive, or the folder was saved by a newer version.

    Example:
    ```python
    >>> from modeling_cllm4rec import CLLM4RecConfig
    >>> config = CLLM4RecConfig(backbone_config={"model_type": "gpt2", "vocab_size": 100, "n_embd": 8, "n_head": 2}, num_users=3, num_items=4)
    >>> config.vocab_size
    107

    ```
    """  # fmt: skip

    model_type = "cllm4rec"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (transformers reads it as a plain class attribute)
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_users: int = 1
    num_items: int = 1
    user_embeddings: bool = True
    content_tower: bool = True
    freeze_backbone: bool = True
    readout: Literal["last", "mean"] = "mean"
    item_bias: bool = True
    max_history: int = 512
    prompt_ids: dict[str, list[int]] | None = None
    prompt_names_user: bool = True
    num_text_terms: int = 0
    text_state_width: int = 0
    user_offsets: bool = False
    catalogue: str | None = None
    initializer_range: float = 0.02
    format_version: int = FORMAT_VERSION
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.backbone_config, PreTrainedConfig):
            self.backbone_config = AutoConfig.for_model(**({"model_type": "gpt2"} | (self.backbone_config or {})))
        if kwargs.pop("text_states", False):
            raise ValueError(
                "this folder's text map reads texts with the backbone, which only the code that it carries does; load it with "
                "trust_remote_code=True, or train it again with text_encoder.name=…"
            )
        super().__post_init__(**kwargs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.backbone_config, name, None))
        if getattr(self, "auto_map", None) is None:
            self.auto_map = dict(AUTO_MAP)
        if getattr(self, "custom_pipelines", None) is None:
            self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def validate_counts(self) -> None:
        """Checked by `strict` when the configuration is made and when it is saved."""
        for name in ("num_users", "num_items", "max_history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")

    def validate_format_version(self) -> None:
        """Checked by `strict`: a folder of a newer version says so."""
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this folder has format version {self.format_version}, this code reads up to {FORMAT_VERSION}; "
                "load it with trust_remote_code=True to use the code that it carries, or update cllm4rec"
            )

    @property
    def num_words(self) -> int:
        """N, the size of the backbone's own vocabulary."""
        return self.get_text_config().vocab_size

    @property
    def vocab_size(self) -> int:
        """N + num_users + num_items: every id below it has an embedding."""
        return self.num_words + self.num_users + self.num_items

    @property
    def tells_users_apart(self) -> bool:
        """Whether the model knows anything of a known user beside the history: a token in the prompt, or an offset."""
        return self.user_embeddings and (self.prompt_names_user or self.user_offsets)

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's hidden states."""
        return self.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Number of the backbone's layers."""
        return self.get_text_config().num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Number of the backbone's attention heads."""
        return self.get_text_config().num_attention_heads

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's configuration: what generation and caches ask for."""
        return self.backbone_config


def lowest_layers(config: PreTrainedConfig, layers: int | None = None) -> PreTrainedConfig:
    """A copy of a configuration with so many of the lowest layers, or all, and without how the weights were packed.

    Raises:
        ValueError: if there are fewer.
    """
    found = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    if layers is not None:
        if not 0 <= layers <= found.num_hidden_layers:
            raise ValueError(f"{layers} layers are asked for, but the model has {found.num_hidden_layers}")
        found.num_hidden_layers = layers
        if getattr(found, "layer_types", None):
            found.layer_types = found.layer_types[:layers]
    return found
