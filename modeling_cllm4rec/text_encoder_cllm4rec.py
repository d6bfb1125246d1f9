"""A pretrained language model that reads texts for the text map: it knows of words what no training text said.

It is no part of the model's weights, since it does not learn: it stands beside them in a folder of its own, `text_encoder`, as any
model of transformers, and is opened when the first text comes.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from .configuration_cllm4rec import lowest_layers

if TYPE_CHECKING:
    from .modeling_cllm4rec import CLLM4RecPreTrainedModel

FOLDER = "text_encoder"

# Of a text so many tokens are read, and about so many of all texts at a time.
TOKENS_OF_A_TEXT, TOKENS_PER_PASS = 256, 4096

# While transformers makes a model it sets the dtype of the whole process: two threads at once would leave theirs behind.
OPENING = threading.Lock()


class TextEncoder:
    """Texts to vectors: the mean of the last hidden states (Reimers and Gurevych, Sentence-BERT, EMNLP 2019).

    Args:
        model: A model of transformers whose output has a `last_hidden_state`, an encoder or a decoder; it is frozen, in evaluation mode, and goes
            where the texts of its owner go.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        layers: int | None = None,
        gguf_file: str | None = None,
        **options: Any,
    ) -> "TextEncoder":
        """Open a pretrained model with its tokenizer, the weights rounded to bfloat16, which they are kept in.

        Args:
            name: Hub name or folder.
            layers: Keep only so many of the lowest layers: in a decoder they know words best, the upper ones what comes next.
            gguf_file: The GGUF file to read there; its weights are dequantised.
            options: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            OSError: if there is no such model, or its weights are not safetensors.
            ValueError: if it has a decoder beside its encoder, fewer layers than asked for, or weights that do not fit its configuration.
        """
        if gguf_file is not None:
            options["gguf_file"] = gguf_file
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, loaded = AutoModel.from_pretrained(
            name, dtype=torch.bfloat16, use_safetensors=True, output_loading_info=True, **options
        )
        # What pools the states of a classifier is not asked for here, and many checkpoints have none.
        missing = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise ValueError(f"{name} lacks weights such as {missing[0]}, which its configuration asks for")
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} has an encoder and a decoder; choose a model that is one of them")
        config = lowest_layers(model.config, layers)
        config.use_cache = False
        kept = AutoModel.from_config(config, dtype=torch.bfloat16)
        kept.load_state_dict(model.state_dict(), strict=False, assign=True)
        return cls(kept.float(), tokenizer)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer as [`~TextEncoder.from_pretrained`] reads them."""
        config = lowest_layers(self.model.config)
        copy = AutoModel.from_config(config, dtype=torch.bfloat16)
        copy.load_state_dict(self.model.state_dict())
        copy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return int(self.model.config.hidden_size)

    @property
    def longest(self) -> int:
        """Tokens of a text that are read; some encoders keep two of their positions for padding."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or 2 * TOKENS_OF_A_TEXT
        return int(min(TOKENS_OF_A_TEXT, self.tokenizer.model_max_length, positions - 2))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts, `(texts, width)` float32, NaN where a text has no token; each distinct one is read once."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        device = self.model.device
        pooled = torch.full((len(places), self.width), torch.nan, dtype=torch.float32, device=device)
        words = [
            self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"] if text.strip() else []
            for text in places
        ]
        # By length, so that what is read together holds little padding.
        order = sorted((place for place, ids in enumerate(words) if ids), key=lambda place: len(words[place]))
        while order:
            rows = max(TOKENS_PER_PASS // len(words[order[-1]]), 1)
            part, order = order[-rows:], order[:-rows]
            lengths = torch.tensor([[len(words[place])] for place in part], device=device)
            longest = int(lengths.max())
            ids = torch.tensor([words[place] + [0] * (longest - len(words[place])) for place in part], device=device)
            mask = torch.arange(longest, device=device) < lengths
            hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            pooled[part] = (hidden * mask.unsqueeze(-1)).sum(1) / lengths
        return pooled[[places[text] for text in texts]]


def text_encoder_of(model: "CLLM4RecPreTrainedModel") -> TextEncoder:
    """The model's `text_encoder`, or the one that stands beside its weights, opened once; on the model's device.

    Raises:
        ValueError: if the model is of no folder or repo that has one.
    """
    options = dict(model.download_options)
    options["subfolder"] = f"{options.get('subfolder', '')}/{FOLDER}".lstrip("/")
    with OPENING:
        if model.text_encoder is None:
            try:
                model.text_encoder = TextEncoder.from_pretrained(model.name_or_path, **options)
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(
                    f"this model reads texts with a text encoder, but none can be opened in the folder {options['subfolder']} of "
                    f"{model.name_or_path!r} ({str(error).splitlines()[0]}); set model.text_encoder"
                ) from error
    model.text_encoder.model.to(model.device)
    return model.text_encoder


def text_states(model: "CLLM4RecPreTrainedModel", texts: Sequence[str]) -> torch.Tensor | None:
    """What the text encoder makes of texts, `(texts, width)`; None where the model's text map reads words alone."""
    return text_encoder_of(model)(texts) if model.config.text_state_width else None


def save_text_encoder(model: "CLLM4RecPreTrainedModel", folder: str | os.PathLike[str]) -> None:
    """Put the text encoder beside weights that are written to a folder, where the model's text map reads with one."""
    if model.config.text_state_width:
        text_encoder_of(model).save_pretrained(Path(folder) / FOLDER)
