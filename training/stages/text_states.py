"""What a text encoder makes of the texts that training may read, averaged over each user's and each item's; read once for a run."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from tqdm.auto import tqdm
from transformers import AutoConfig

from configuration import recipe as recipes
from configuration.errors import InputError
from modeling_cllm4rec.configuration_cllm4rec import lowest_layers
from modeling_cllm4rec.text_encoder_cllm4rec import TextEncoder
from training.data.corpora import Corpora
from training.files import file_written_whole

logger = logging.getLogger(__name__)

TEXTS_AT_A_TIME = 512


@dataclass(frozen=True, eq=False)
class TextStates:
    """An encoder, and what it makes of the texts of those who are known.

    Attributes:
        encoder: The encoder.
        users: The mean over the texts about or by a user, `(num_users, width)` float32, NaN where there is none.
        items: The mean over the texts about an item, `(num_items, width)` float32, alike.
    """

    encoder: TextEncoder
    users: np.ndarray
    items: np.ndarray

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return self.encoder.width


def open_text_encoder(section: recipes.TextEncoder) -> TextEncoder | None:
    """The text encoder that a recipe names; None where it names none.

    Raises:
        InputError: if it cannot be opened.
    """
    if section.name is None:
        return None
    with refused(section):
        return TextEncoder.from_pretrained(section.name, layers=section.layers, gguf_file=section.gguf_file)


def check_text_encoder(section: recipes.TextEncoder) -> None:
    """Refuse a text encoder that is not there, before anything is read or written.

    Raises:
        InputError: as [`open_text_encoder`].
    """
    if section.name is not None:
        with refused(section):
            extra = {"gguf_file": section.gguf_file} if section.gguf_file else {}
            config = AutoConfig.from_pretrained(section.name, **extra)
            if config.is_encoder_decoder:
                raise ValueError("it has an encoder and a decoder")
            lowest_layers(config, section.layers)


@contextmanager
def refused(section: recipes.TextEncoder) -> Iterator[None]:
    """Say of a text encoder that cannot be opened in the block what is wrong with it."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"text_encoder.name: no text encoder can be loaded from {section.name!r} ({str(error).splitlines()[0]}); give the name of a "
            "Hub repo or a folder with an encoder or a decoder of transformers, its weights as safetensors or GGUF, and its tokenizer"
        ) from error


def read_text_states(
    corpora: Corpora, section: recipes.TextEncoder, cache: Path, device: torch.device, *, progress: bool = True
) -> TextStates | None:
    """Read the texts of the content corpus, which holds no held-out review, or open what an earlier call for the same wrote.

    Args:
        corpora: Of the run.
        section: Of the recipe.
        cache: A file of the run.
        device: Where the encoder runs.
        progress: Whether to show how far it has come.

    Returns:
        None where the recipe names no encoder or the data have no texts.

    Raises:
        InputError: as [`open_text_encoder`].
    """
    texts = corpora.texts("content")
    if section.name is None:
        return None
    if not len(texts):
        logger.info("text encoder: not used, the data have no texts")
        return None
    encoder = open_text_encoder(section)
    assert encoder is not None
    encoder.model.to(device)
    mark = fingerprint(encoder, corpora)
    if cache.is_file():
        with safe_open(cache, "numpy") as file:
            if (file.metadata() or {}).get("fingerprint") == mark:
                return TextStates(encoder, file.get_tensor("users"), file.get_tensor("items"))
    main = [document[start:] for document, start in zip(texts.documents, texts.prompt_length, strict=True)]
    written = corpora.tokenizer.batch_decode(main, skip_special_tokens=True)
    starts = tqdm(
        range(0, len(written), TEXTS_AT_A_TIME), "reading texts", unit="block", leave=False, disable=not progress
    )
    read = torch.cat([encoder(written[start : start + TEXTS_AT_A_TIME]) for start in starts]).cpu().numpy()
    states = TextStates(
        encoder, owners_mean(read, texts.user, corpora.num_users), owners_mean(read, texts.item, corpora.num_items)
    )
    with file_written_whole(cache) as target:
        save_file({"users": states.users, "items": states.items}, target, metadata={"fingerprint": mark})
    logger.info("text encoder: %d texts read, %d numbers each", len(written), states.width)
    return states


def fingerprint(encoder: TextEncoder, corpora: Corpora) -> str:
    """What the states depend on: the encoder's weights and the corpora."""
    mark = hashlib.sha256(corpora.info["fingerprint"].encode())
    for name, weight in encoder.model.state_dict().items():
        if not name.startswith("pooler."):  # drawn at random where a checkpoint has none, and not read
            mark.update(name.encode() + weight.cpu().to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()


def owners_mean(states: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """The mean of the states of each owner's texts, `(count, width)` float32, NaN where there is none.

    Args:
        states: Of texts, `(texts, width)`, NaN where a text says nothing.
        owners: Of each text, -1 where it has none.
        count: Of owners.
    """
    places = np.flatnonzero(~np.isnan(states[:, 0]) & (owners >= 0))
    ones = (np.ones(len(places), np.float32), (owners[places], np.arange(len(places))))
    return rows_mean(csr_matrix(ones, shape=(count, len(places))), states[places])


def rows_mean(rows: csr_matrix, values: np.ndarray) -> np.ndarray:
    """The mean of those values `(n, width)` that each of the rows `(rows, n)` of ones names, NaN where it names none."""
    numbers = np.asarray(rows.sum(axis=1))
    return np.where(numbers > 0, (rows @ values) / np.maximum(numbers, 1), np.nan).astype(np.float32)
