"""What a text says about taste: from its words to a state that the item head reads, and to a row of the item table.

Two ridge maps over TF-IDF of the words and, where there is a text encoder, over what that makes of the text, are fitted in closed form
when training ends (`training/stages/text_map.py`) and travel with the weights. With them somebody who has only a sentence
is served, and an item that has only a text gets its embedding.
"""

import itertools
import re
import zlib
from collections.abc import Sequence

import torch
from torch import nn

WORD = re.compile(r"\w\w+")
PREFIX = 5

# Texts whose terms are counted at a time: the counts are dense.
TEXTS_PER_PASS = 256


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, of two letters or more."""
    return WORD.findall(text.lower())


def item_text(raw: str | float, title: str | None, text: str | None) -> str:
    """What is read of an item: its title, unless that is its raw id or the text begins with it, and its text."""
    title, text = title or "", text or ""
    if title == str(raw) or text.startswith(title):
        return text
    return f"{title}. {text}" if text else title


def terms_of(words: Sequence[str]) -> list[tuple[int, tuple[int, ...]]]:
    """What is counted of a text: its words, their first five letters, and pairs of neighbours.

    Args:
        words: Of [`words_of`].

    Returns:
        Of each term its number (CRC-32, so that no vocabulary has to travel along) and the places of the words that it is made of.
    """
    terms = [(number_of(word), (place,)) for place, word in enumerate(words)]
    terms += [(number_of(f"{word[:PREFIX]}*"), (place,)) for place, word in enumerate(words)]
    pairs = itertools.pairwise(words)
    return terms + [(number_of(f"{one} {next}"), (place, place + 1)) for place, (one, next) in enumerate(pairs)]


def number_of(term: str) -> int:
    """The number of a term, in [0, 2**32)."""
    return zlib.crc32(term.encode())


class TextMap(nn.Module):
    """Two linear maps of a text's terms, and of the text encoder's states of it; their weights do not learn with the model's.

    Args:
        num_text_terms: How many terms count; all others are passed over.
        width: Of the hidden states.
        state_width: Numbers of a state; 0: there are none.
    """

    PEOPLE, ITEMS = 0, 1

    def __init__(self, num_text_terms: int, width: int, state_width: int = 0) -> None:
        super().__init__()
        # Numbers of the terms, ascending.
        self.register_buffer("terms", torch.arange(num_text_terms))
        self.terms: torch.Tensor
        self.rarity = nn.Parameter(torch.ones(num_text_terms))
        # Of states of texts about people, and about items.
        self.state_mean = nn.Parameter(torch.zeros(2, state_width)) if state_width else None
        self.state_spread = nn.Parameter(torch.ones(2, state_width)) if state_width else None
        inputs = num_text_terms + state_width
        self.to_state = nn.Linear(inputs, width)
        # The last output is the item's bias.
        self.to_item = nn.Linear(inputs, width + 1)
        self.weight_beside_history = nn.Parameter(torch.ones(1))
        self.requires_grad_(False)

    def bag(self, texts: Sequence[str]) -> torch.Tensor:
        """TF-IDF vectors of length 1, or 0 where no term counts: `(texts, num_text_terms)`, float32."""
        device = self.terms.device
        numbers = [[number for number, _ in terms_of(words_of(text))] for text in texts]
        rows = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(row) for row in numbers])).to(device)
        places, counted = self.places([number for row in numbers for number in row])
        counts = torch.zeros(len(texts), len(self.terms), device=device)
        ones = torch.ones(int(counted.sum()), device=device)
        counts.index_put_((rows[counted], places[counted]), ones, accumulate=True)
        return nn.functional.normalize(counts.log1p() * self.rarity.float(), dim=1)

    def places(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of terms among those that count, int64 `(n,)`, and whether each does, bool `(n,)`."""
        wanted = torch.tensor(numbers, dtype=torch.long, device=self.terms.device)
        places = torch.searchsorted(self.terms, wanted).clamp(max=len(self.terms) - 1)
        return places, self.terms[places] == wanted

    def standardised(self, pooled: torch.Tensor, kind: int) -> torch.Tensor:
        """States `(texts, width)` by what is usual for texts of a kind, of length 1; 0 where there is none."""
        assert self.state_mean is not None
        assert self.state_spread is not None
        unlike = (pooled.to(self.state_mean.device) - self.state_mean[kind].float()) / self.state_spread[kind].float()
        return nn.functional.normalize(unlike.nan_to_num(), dim=1)

    def mapped(self, texts: Sequence[str], weight: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Bags of texts, with their states beside them, times a map `(outputs, inputs)`: `(texts, outputs)` float32."""
        weight, terms = weight.float().T, len(self.terms)
        parts = [
            self.bag(texts[start : start + TEXTS_PER_PASS]) @ weight[:terms]
            for start in range(0, len(texts), TEXTS_PER_PASS)
        ]
        of_words = torch.cat(parts)
        return of_words if states is None else of_words + states @ weight[terms:]

    def states(self, texts: Sequence[str], pooled: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What texts add to a state, and the state of somebody unknown: `(texts, width)` and `(width,)`, float32.

        Args:
            texts: Of people.
            pooled: Of [`~modeling_cllm4rec.text_encoder_cllm4rec.text_states`].
        """
        states = None if pooled is None else self.standardised(pooled, self.PEOPLE)
        return self.mapped(texts, self.to_state.weight, states), self.to_state.bias.float()

    def word_effects(self, text: str, state: torch.Tensor) -> dict[str, float]:
        """What each word of an item's text adds to its logit in a state `(width,)`; a term's part is shared among its words.

        What the text encoder adds belongs to no single word, and is not told.
        """
        words = words_of(text)
        terms = terms_of(words)
        places, counted = self.places([number for number, _ in terms])
        weight = self.to_item.weight.float()[:, : len(self.terms)]
        effects = self.bag([text])[0] * (state.float() @ weight[:-1] + weight[-1])
        times = places[counted].bincount(minlength=len(self.terms)).clamp(min=1)
        shares = ((effects / times)[places] * counted).tolist()
        found = dict.fromkeys(words, 0.0)
        for (_, of_words), share in zip(terms, shares, strict=True):
            for place in of_words:
                found[words[place]] += share / len(of_words)
        return found

    def item_rows(self, texts: Sequence[str], pooled: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(texts, width)` and biases `(texts,)` of items that have these texts, float32.

        Args:
            texts: Of items.
            pooled: Of [`~modeling_cllm4rec.text_encoder_cllm4rec.text_states`].
        """
        states = None if pooled is None else self.standardised(pooled, self.ITEMS)
        rows = self.mapped(texts, self.to_item.weight, states) + self.to_item.bias.float()
        return rows[:, :-1], rows[:, -1]
