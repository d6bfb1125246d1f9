"""CLLM4Rec: one decoder, two towers of user and item embeddings, three heads (Zhu et al., WWW 2024, arXiv 2311.01343).

Read in this order: the base model, which resolves words, users and items to embeddings; the content and the collaborative
language model; the recommendation head. How people are asked about and answered is in `ranking_cllm4rec.py`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput
from transformers.utils import cached_file, can_return_tuple, logging
from transformers.utils.hub import extract_commit_hash

from .configuration_cllm4rec import CLLM4RecConfig, lowest_layers
from .loss_cllm4rec import next_token_loss
from .packing_cllm4rec import PACKED_LAYERS, PACKED_SDPA, Packing
from .ranking_cllm4rec import NO_USERS, RankingMixin
from .text_cllm4rec import TextMap
from .text_encoder_cllm4rec import FOLDER, TextEncoder, save_text_encoder

logger = logging.get_logger(__name__)

Tower = Literal["collaborative", "content"]

# What transformers calls the cache of earlier tokens: renamed in 5.24, and the old name goes in 5.40.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class TokenParts(NamedTuple):
    """One tensor for the words, one for the users, one for the items."""

    words: torch.Tensor
    users: torch.Tensor
    items: torch.Tensor


@dataclass
class RecommendationOutput(ModelOutput):
    """Output of [`CLLM4RecForRecommendation`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Negative multinomial log-likelihood per target.
        logits (`torch.FloatTensor` of shape `(batch, num_items)`): Unnormalised log-probability of each item.
        hidden_states, attentions (`tuple`, *optional*): The backbone's, on request.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class TokenEmbeddings(nn.Embedding):
    """The backbone's input embeddings: `weight` holds the words, `forward` resolves users and items as well.

    The user and item tables are looked up in their owner at each call, outside the module registry, so that the word table
    keeps its name in the checkpoint and a table that was replaced (by peft, say) is never bypassed.
    """

    @classmethod
    def extend(cls, words: nn.Embedding, owner: "CLLM4RecModel") -> "TokenEmbeddings":
        """Turn the backbone's word embeddings into this class, keeping the parameter."""
        if type(words) is not nn.Embedding:
            raise ValueError(
                f"the backbone's input embeddings are a {type(words).__name__}, which computes more than a look-up; "
                "choose a decoder with plain nn.Embedding words (GPT-2, Llama, Qwen, SmolLM2 …)"
            )
        words.__class__ = cls
        words.__dict__["_owner"] = owner
        return words  # type: ignore[return-value]

    def look_up_words(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of word ids only, on the device of the words."""
        return super().forward(ids.to(self.weight.device))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of any ids, `(..., width)`."""
        owner: CLLM4RecModel = self.__dict__["_owner"]
        return owner.embed(input_ids)


class CLLM4RecPreTrainedModel(PreTrainedModel):
    """What the base model and the heads share: configuration, initialisation, what they support."""

    config_class = CLLM4RecConfig
    config: CLLM4RecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("cache", "past_key_values")
    _keys_to_ignore_on_load_unexpected = [r"content_(user|item)_embeddings\.weight$"]  # noqa: RUF012
    # In half precision the mean of a state is coarser than what texts differ by.
    _keep_in_fp32_modules_strict = ["state_mean", "state_spread"]  # noqa: RUF012
    revision: str | None = None
    text_encoder: TextEncoder | None = None  # opened where a text is read
    download_options: dict[str, Any] = {}  # noqa: RUF012 (replaced at loading, never changed)

    def _init_weights(self, module: nn.Module) -> None:
        # The backbone is a PreTrainedModel of its own and initialises itself; here come the ID tables and what is ours.
        if isinstance(module, (nn.Embedding, nn.Linear)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, TextMap):
            init.copy_(module.terms, torch.arange(len(module.terms)))
            init.ones_(module.rarity)
            init.ones_(module.weight_beside_history)
            if module.state_mean is not None and module.state_spread is not None:
                init.zeros_(module.state_mean)
                init.ones_(module.state_spread)
        elif isinstance(module, CLLM4RecModel) and module.item_bias is not None:
            init.zeros_(module.item_bias)

    @property
    def base(self) -> "CLLM4RecModel":
        """The base model, of a head or of itself."""
        return self if isinstance(self, CLLM4RecModel) else self.model

    def freeze(self) -> None:
        """Leave gradients to the ID tables and biases alone where the configuration freezes the backbone; none to what is fitted afterwards."""
        for fitted in (self.base.text_map, self.base.user_offsets):
            if fitted is not None:
                fitted.requires_grad_(False)
        if self.config.freeze_backbone:
            self.base.backbone.requires_grad_(False)
            if self.base.word_head is not None:
                self.base.word_head.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *args: Any,
        revision: str | None = "main",
        **kwargs: Any,
    ) -> "CLLM4RecPreTrainedModel":
        """As in transformers; what the configuration freezes comes out frozen, and the commit is kept as `revision`.

        `download_options` hold what else the download needed, so that `items.jsonl` is found in the same place.
        """
        names = ("cache_dir", "local_files_only", "subfolder", "token")
        options = {name: kwargs[name] for name in names if kwargs.get(name)}
        if pretrained_model_name_or_path is not None:
            file = cached_file(pretrained_model_name_or_path, "config.json", revision=revision, **options)
            revision = extract_commit_hash(file, None) or revision
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, revision=revision, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze()
        model.revision = revision
        model.download_options = {"revision": revision, **options}
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; the text encoder, where the text map reads with one, goes into its folder beside the weights.

        Raises:
            ValueError: if that encoder cannot be opened.
        """
        if is_main_process:
            save_text_encoder(self, save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        """What `save_pretrained(…, push_to_hub=True)` holds for unchanged: not the text encoder, which was written just before."""
        times = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if name != FOLDER}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: everything but the token, a secret of whoever loaded the model."""
        options = {name: value for name, value in self.download_options.items() if name != "token"}
        return self.__dict__ | {"download_options": options}

    def get_input_embeddings(self) -> nn.Module:
        """A module that embeds every id, words, users and items; its `weight` are the words."""
        return self.base.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: the word table belongs to the backbone, the ID tables stand behind it."""
        raise ValueError(
            "set_input_embeddings would cut the user and item tokens off; train or load the tables in place"
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """The input embeddings, unchanged.

        Raises:
            ValueError: if the size would change, since every user and item id would shift.
        """
        if new_num_tokens is not None and new_num_tokens not in (self.config.num_words, self.config.vocab_size):
            raise ValueError(
                f"cannot resize from {self.config.vocab_size} to {new_num_tokens} tokens: user and item ids follow the words, so "
                "every one of them would move and mean somebody else; build a new model from the backbone instead"
            )
        return self.get_input_embeddings()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        *,
        num_users: int,
        num_items: int,
        backbone_layers: int | None = None,
        gguf_file: str | None = None,
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        revision: str = "main",
        **config_fields: Any,
    ) -> "CLLM4RecPreTrainedModel":
        """A model around pretrained weights, with fresh user and item embeddings.

        Args:
            backbone: Hub name or folder of a causal language model, whose weights stay mapped to its files as far as they are
                not changed, or the model itself (its weights are copied).
            num_users: Number of user tokens.
            num_items: Number of item tokens.
            backbone_layers: Keep only so many of the lowest layers.
            gguf_file: The GGUF file to read in `backbone`; its weights are dequantised.
            dtype: dtype of all weights.
            attn_implementation: sdpa, eager, flash_attention_2 …
            revision: Branch, tag or commit of the Hub repo.
            config_fields: Further fields of [`CLLM4RecConfig`].

        Raises:
            ValueError: if the backbone has fewer layers than asked for, or its weights do not fit its configuration.
        """
        is_ours = isinstance(backbone, str)
        if isinstance(backbone, str):
            backbone = AutoModelForCausalLM.from_pretrained(
                backbone, gguf_file=gguf_file, dtype=dtype, revision=revision
            )
        config = CLLM4RecConfig(
            backbone_config=lowest_layers(backbone.config, backbone_layers),
            num_users=num_users,
            num_items=num_items,
            dtype=dtype,
            **config_fields,
        )
        model = cls._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        base = model.base
        weights = backbone.base_model.state_dict()
        missing = base.backbone.load_state_dict(weights, strict=False, assign=is_ours).missing_keys
        if missing:
            raise ValueError(f"the backbone lacks the weights {missing[:3]}, which its configuration asks for")
        head = backbone.get_output_embeddings()
        if base.word_head is not None:
            base.word_head.data.copy_(head.weight)
        if getattr(head, "bias", None) is not None:
            logger.warning("The bias of the backbone's head is left out: words are scored by their embeddings alone.")
        model.tie_weights()
        return model


class CLLM4RecModel(CLLM4RecPreTrainedModel):
    r"""The decoder with extended user and item tokens (the published `GPT4RecommendationBaseModel`).

    It holds everything that a checkpoint holds: the backbone once, the ID tables of both towers, the items' bias and, where
    the backbone does not tie it, the word head. Heads only look at them, so each loads every other's checkpoint.

    Example:
    ```python
    >>> import torch
    >>> from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecModel
    >>> words = {"model_type": "gpt2", "vocab_size": 3, "n_embd": 2, "n_head": 1, "n_layer": 1}
    >>> model = CLLM4RecModel(CLLM4RecConfig(backbone_config=words, num_users=3, num_items=3))
    >>> input_ids = torch.tensor([[0, 1, 3, 5, 8]])
    >>> for part in model.token_masks(input_ids):
    ...     print(part.int().tolist())
    [[1, 1, 0, 0, 0]]
    [[0, 0, 1, 1, 0]]
    [[0, 0, 0, 0, 1]]
    >>> parts = model.embed_parts(input_ids)
    >>> parts.users[0, 2].equal(model.user_embeddings.weight[0]), parts.items[0, 4].equal(model.item_embeddings.weight[2])
    (True, True)
    >>> sum(parts).equal(model.embed(input_ids))
    True
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad and "content" not in name)
    ['item_bias', 'item_embeddings.weight', 'user_embeddings.weight']

    ```
    """

    _auto_class = "AutoModel"

    def __init__(self, config: CLLM4RecConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        fuse_activations(self.backbone)
        words = self.backbone.get_input_embeddings()
        width = words.embedding_dim
        TokenEmbeddings.extend(words, owner=self)
        user_rows = config.num_users if config.user_embeddings else 0
        self.user_embeddings = nn.Embedding(user_rows, width)
        self.item_embeddings = nn.Embedding(config.num_items, width)
        if config.content_tower:
            self.content_user_embeddings = nn.Embedding(user_rows, width)
            self.content_item_embeddings = nn.Embedding(config.num_items, width)
        self.item_bias = nn.Parameter(torch.zeros(config.num_items)) if config.item_bias else None
        terms = config.num_text_terms
        self.text_map = TextMap(terms, width, config.text_state_width) if terms else None
        self.user_offsets = nn.Embedding(user_rows, width) if config.user_offsets else None
        tied = config.get_text_config().tie_word_embeddings
        self.word_head = None if tied else nn.Parameter(torch.empty(config.num_words, width).normal_(std=0.02))
        self.post_init()
        self.freeze()

    @property
    def word_weight(self) -> torch.Tensor:
        """What the word head multiplies with, `(N, width)`."""
        return self.backbone.get_input_embeddings().weight if self.word_head is None else self.word_head

    def tables(self, tower: Tower = "collaborative") -> tuple[nn.Embedding, nn.Embedding]:
        """User and item embeddings of a tower."""
        if tower not in ("collaborative", "content"):
            raise ValueError(f"tower is {tower!r}; it is 'collaborative' or 'content'")
        if tower == "content" and self.config.content_tower:
            return self.content_user_embeddings, self.content_item_embeddings
        return self.user_embeddings, self.item_embeddings

    def token_masks(self, input_ids: torch.Tensor) -> TokenParts:
        """Which ids are words, users and items: three boolean tensors of the shape of `input_ids`.

        Raises:
            IndexError: naming an id outside `[0, N + num_users + num_items)`, or a user of a model without user embeddings.
                On a GPU this is checked outside training only, since it would make each step wait.
        """
        first_user, first_item = self.config.num_words, self.config.num_words + self.config.num_users
        if (
            not torch.compiler.is_compiling()
            and (input_ids.device.type == "cpu" or not self.training)
            and input_ids.numel()
        ):
            outside = input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)]
            if len(outside):
                raise IndexError(
                    f"id {outside[0].item()} is outside [0, {self.config.vocab_size}): {first_user} words, "
                    f"{self.config.num_users} users, {self.config.num_items} items; was the text encoded by this model's tokenizer?"
                )
            if not self.config.user_embeddings:
                users = input_ids[(input_ids >= first_user) & (input_ids < first_item)]
                if len(users):
                    raise IndexError(f"id {users[0].item()} is user {users[0].item() - first_user}: {NO_USERS}")
        words, items = input_ids < first_user, input_ids >= first_item
        return TokenParts(words, ~(words | items), items)

    def embed_parts(self, input_ids: torch.Tensor, tower: Tower = "collaborative") -> TokenParts:
        """Embeddings of the words, of the users and of the items, each `(..., width)` and zero outside its mask.

        All are on the device of the words, wherever a `device_map` has put the other tables.
        """
        masks = self.token_masks(input_ids)
        users, items = self.tables(tower)
        words = self.backbone.get_input_embeddings()
        first_user, first_item = self.config.num_words, self.config.num_words + self.config.num_users
        rows = words.look_up_words(input_ids * masks.words)
        device = rows.device
        of_words = rows * masks.words.to(device).unsqueeze(-1)
        of_users = torch.zeros_like(of_words)
        if self.config.user_embeddings:
            rows = users((input_ids - first_user) * masks.users).to(device)
            of_users = rows * masks.users.to(device).unsqueeze(-1)
        rows = items((input_ids - first_item) * masks.items).to(device)
        return TokenParts(of_words, of_users, rows * masks.items.to(device).unsqueeze(-1))

    def embed(self, input_ids: torch.Tensor, tower: Tower = "collaborative") -> torch.Tensor:
        """Input embeddings `(..., width)`: the sum of [`~CLLM4RecModel.embed_parts`] (paper sec. 3.2, eq. 1)."""
        parts = self.embed_parts(input_ids, tower)
        return parts.words + parts.users + parts.items

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        tower: Tower = "collaborative",
        past_key_values: Cache | None = None,
        document_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a sequence of words, users and items.

        Args:
            input_ids: `(batch, length)`, ids in `[0, N + num_users + num_items)`.
            attention_mask: `(batch, length)`, 1 for tokens, 0 for padding on either side, whatever id fills it.
            position_ids: `(batch, length)`; by default counted from the first token that is not padding.
            cache: Keys and values of earlier tokens.
            inputs_embeds: `(batch, length, width)` instead of `input_ids`.
            use_cache: Whether to return the cache.
            tower: Whose user and item embeddings are read.
            past_key_values: `cache` as transformers before 5.24 calls it.
            document_lengths: Tokens of each document where the batch is one packed row, `(1, total)`, of documents that do not
                see each other; the attention mask is not read then, and nothing is cached.
            kwargs: Passed to the backbone (`output_hidden_states`, `output_attentions`, attention back-end arguments …).
        """
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, tower)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if document_lengths is not None:
            return self.forward_packed(inputs_embeds, document_lengths, **kwargs)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Counted over real tokens, so that padding on the left changes nothing.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )

    def forward_packed(
        self, inputs_embeds: torch.Tensor, document_lengths: Sequence[int], **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Hidden states of packed documents, `(1, total, width)`.

        Args:
            inputs_embeds: `(1, total, width)`.
            document_lengths: Tokens of each document.
            kwargs: Passed to the backbone.
        """
        packing = Packing.of(document_lengths, inputs_embeds.shape, inputs_embeds.device)
        config = self.backbone.config
        # A convolution or a recurrence would go on from one document into the next.
        packs = PACKED_LAYERS.issuperset(getattr(config, "layer_types", None) or ()) and not self.backbone._is_stateful
        if packs and config._attn_implementation == "sdpa" and self.backbone._supports_attention_backend:
            config._attn_implementation = PACKED_SDPA  # which is sdpa for whatever is not packed
        attention = config._attn_implementation
        kwargs["use_cache"] = False
        if packs and (attention == PACKED_SDPA or attention.startswith("flash")):
            return self.backbone(inputs_embeds=inputs_embeds, **packing.backbone_arguments(attention), **kwargs)
        # Every other implementation, and every other kind of layer, takes a padded rectangle, from which the tokens are picked again.
        longest = max(packing.lengths)
        places = packing.rectangle(torch.arange(len(packing.lengths), device=packing.device), longest)
        real = torch.arange(longest, device=packing.device) < packing.counts.unsqueeze(1)
        outputs = self.backbone(inputs_embeds=inputs_embeds[0][places], attention_mask=real.long(), **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[real].unsqueeze(0)
        return outputs


class CLLM4RecForContentLM(CLLM4RecPreTrainedModel, GenerationMixin):
    """The content language model: text about a user and an item (paper sec. 3.3.3).

    Logits and loss are over the word space only; `generate()` writes text conditioned on user and item tokens.
    """

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: CLLM4RecConfig) -> None:
        super().__init__(config)
        self.model = CLLM4RecModel(config)
        # Likewise: the words are its weight.
        self.lm_head = nn.Linear(self.model.item_embeddings.embedding_dim, config.num_words, bias=False, device="meta")
        words = "model.word_head"
        if self.model.word_head is None:
            table = self.model.backbone.get_input_embeddings().weight
            words = "model." + next(name for name, p in self.model.named_parameters() if p is table)
        self._tied_weights_keys = {"lm_head.weight": words}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The word head."""
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values: Cache | None = None,
        document_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits over the words `(batch, length, N)` and, given labels, the loss (paper eq. 5).

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`.
            position_ids: `(batch, length)`.
            cache: Keys and values of earlier tokens.
            inputs_embeds: `(batch, length, width)` instead of `input_ids`, of the content tower.
            labels: `(batch, length)`, word ids of the main text, -100 elsewhere; token t is predicted from those before it, so
                the first main token from the last one of the prompt.
            use_cache: Whether to return the cache.
            logits_to_keep: Compute the last so many logits only (0: all). In training, given labels, none are returned.
            num_items_in_batch: Divide the summed loss by this instead of the number of labels.
            past_key_values: `cache` as transformers before 5.24 calls it.
            document_lengths: Tokens of each document of a packed row, `(1, total)`.
            kwargs: Passed to the backbone.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values if cache is None else cache,
            inputs_embeds,
            use_cache,
            tower="content",
            document_lengths=document_lengths,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            labels = within_documents(labels, document_lengths)
            loss = next_token_loss(hidden, self.model.word_weight, None, labels, num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept] if not isinstance(kept, slice) or logits_to_keep else hidden)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


class CLLM4RecItemHeadModel(CLLM4RecPreTrainedModel):
    """The base model with a softmax head over the items, tied to the collaborative item embeddings."""

    _tied_weights_keys = {"item_head.weight": "model.item_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: CLLM4RecConfig) -> None:
        super().__init__(config)
        self.model = CLLM4RecModel(config)
        # It gets the item table for its weight when weights are tied; until then it takes no memory.
        self.item_head = nn.Linear(
            self.model.item_embeddings.embedding_dim, config.num_items, bias=False, device="meta"
        )
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The item head."""
        return self.item_head

    def item_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over the items `(..., num_items)` of states `(..., width)`, on the device of the item table."""
        weight, bias = self.model.item_embeddings.weight, self.model.item_bias
        return F.linear(states.to(weight.device), weight, None if bias is None else bias.to(weight.device))


class CLLM4RecForCollaborativeLM(CLLM4RecItemHeadModel):
    """The collaborative language model: which items a user interacts with (paper sec. 3.3.2).

    Logits and loss are over the item space only.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        document_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits over the items `(batch, length, num_items)` and, given labels, the loss (paper eq. 4).

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`.
            position_ids: `(batch, length)`.
            inputs_embeds: `(batch, length, width)` instead of `input_ids`.
            labels: `(batch, length)`, ids of the items of the main text (`N + num_users + j`, as in `input_ids`), -100 elsewhere;
                each is predicted from the tokens before it. In training, given labels, no logits are returned.
            num_items_in_batch: Divide the summed loss by this instead of the number of labels.
            document_lengths: Tokens of each document of a packed row, `(1, total)`.
            kwargs: Passed to the backbone.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            document_lengths=document_lengths,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            first_item = self.config.num_words + self.config.num_users
            labels = within_documents(labels, document_lengths)
            targets = torch.where(labels == -100, labels, labels - first_item)
            item_weight = self.model.item_embeddings.weight
            loss = next_token_loss(hidden, item_weight, self.model.item_bias, targets, num_items_in_batch)
        if labels is None or not self.training:
            logits = self.item_logits(hidden)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


class CLLM4RecForRecommendation(CLLM4RecItemHeadModel, RankingMixin):
    """The recommender: one forward pass of a soft+hard prompt ranks the whole catalogue (paper sec. 3.4).

    The prompt is `user_i has interacted with item_a item_c …, user_i will interact with`; the head is a softmax over all items
    with a multinomial likelihood, so it can name no item that does not exist.
    """

    _auto_class = "AutoModelForSequenceClassification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        document_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> RecommendationOutput:
        """Logits over the items `(batch, num_items)` and, given labels, the multinomial loss (paper eq. 9 and 10).

        Args:
            input_ids: `(batch, length)`, the prompts.
            attention_mask: `(batch, length)`.
            position_ids: `(batch, length)`.
            labels: `(batch, targets)` or `(batch,)`, item indices in `[0, num_items)`, padded with -100.
            target_weights: Like `labels`, the weight of each target; 1 by default.
            num_items_in_batch: Divide the summed loss by this instead of the targets' total weight.
            document_lengths: Tokens of each prompt where they are one packed row, `(1, total)`; `batch` is their number then.
            kwargs: Passed to the backbone.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(input_ids, attention_mask, position_ids, document_lengths=document_lengths, **kwargs)
        pooled = self.read_out(outputs.last_hidden_state, input_ids, attention_mask, document_lengths)
        logits = self.item_logits(pooled)
        loss = None
        if labels is not None:
            loss = self.multinomial_loss(logits, labels, target_weights, num_items_in_batch)
        return RecommendationOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def read_out(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """One vector per prompt, `(batch, width)`: the last token's state, or the mean over ID tokens and the last.

        The mean is taken in float32 at least: bfloat16 counts to 256, and no further.
        """
        input_ids = input_ids.to(hidden.device)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        if document_lengths is not None:
            packing = Packing.of(document_lengths, input_ids.shape, hidden.device)
            states, is_last = hidden[0], packing.positions[0] == packing.counts[packing.document] - 1
            if self.config.readout == "last":
                return states[packing.ends]
            weights = ((input_ids[0] >= self.config.num_words) | is_last).to(precise)
            totals = torch.zeros_like(packing.counts, dtype=precise).index_add_(0, packing.document, weights)
            weights = (weights / totals[packing.document]).unsqueeze(1)
            pooled = torch.zeros(len(packing.lengths), states.shape[1], dtype=precise, device=states.device)
            return pooled.index_add_(0, packing.document, states * weights).to(states.dtype)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.to(hidden.device).bool()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (positions * real).argmax(-1)  # (batch,)
        if self.config.readout == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        chosen = (real & (input_ids >= self.config.num_words)) | (positions == last.unsqueeze(-1))
        weights = chosen.to(precise)
        pooled = torch.einsum("bl,bld->bd", weights / weights.sum(-1, keepdim=True), hidden.to(precise))
        return pooled.to(hidden.dtype)

    def multinomial_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        target_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihood of the targets under one softmax per prompt, a scalar in float32 or, of logits in float64, in that.

        Args:
            logits: `(batch, num_items)`.
            labels: `(batch, targets)` or `(batch,)`, item indices, padded with -100.
            target_weights: Like `labels`; 1 by default.
            num_items_in_batch: What the sum is divided by; the targets' total weight by default.
        """
        labels = labels.unsqueeze(-1) if labels.ndim == 1 else labels
        targets, valid = labels.clamp(min=0), labels != -100
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        likelihood = logits.gather(1, targets) - logits.logsumexp(-1, keepdim=True)
        weights = valid.to(likelihood.dtype) if target_weights is None else target_weights * valid
        return -(likelihood * weights).sum() / (weights.sum() if num_items_in_batch is None else num_items_in_batch)


def fuse_activations(backbone: nn.Module) -> None:
    """Compute GPT-2's GELU (its tanh form, of eight operations) by torch's kernel for the same function, in one.

    `python benchmarks/parts.py` prints what that gives.
    """
    for module in backbone.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def within_documents(labels: torch.Tensor, document_lengths: Sequence[int] | None) -> torch.Tensor:
    """Labels `(1, total)` of packed documents without those of first tokens, which nothing of their document predicts."""
    if document_lengths is None:
        return labels
    return labels.index_fill(1, Packing.of(document_lengths, labels.shape, labels.device).starts, -100)


# The published names.
GPT4RecommendationBaseModel = CLLM4RecModel
CollaborativeGPTwithItemLMHeadBatch = CLLM4RecForCollaborativeLM
ContentGPTForUserItemWithLMHeadBatch = CLLM4RecForContentLM
CollaborativeGPTwithItemRecommendHead = CLLM4RecForRecommendation
