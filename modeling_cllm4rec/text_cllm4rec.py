"""What a text says about taste: from its words to a state that the item head reads, and to a row of the item table.

Two ridge maps over TF-IDF of the words, fitted in closed form when training ends (`training/stages/text_map.py`), travel with the
weights. With them somebody who has only a sentence is served, and an item that has only a text gets its embedding.
"""

from collections.abc import Sequence

import torch
from torch import nn

# Texts whose words are counted at a time: the counts are dense.
TEXTS_PER_PASS = 256


class TextMap(nn.Module):
    """Two linear maps of a text's words; their weights do not learn with the model's.

    Args:
        num_text_words: How many words count; all others are passed over.
        width: Of the hidden states.
    """

    def __init__(self, num_text_words: int, width: int) -> None:
        super().__init__()
        # Word ids in ascending order.
        self.register_buffer("words", torch.arange(num_text_words))
        self.words: torch.Tensor
        self.rarity = nn.Parameter(torch.ones(num_text_words))
        self.to_state = nn.Linear(num_text_words, width)
        # The last output is the item's bias.
        self.to_item = nn.Linear(num_text_words, width + 1)
        self.weight_beside_history = nn.Parameter(torch.ones(1))
        self.requires_grad_(False)

    def bag(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """TF-IDF vectors of length 1, or 0 where no word counts: `(texts, num_text_words)`, float32.

        Args:
            texts: Word ids of each text, in `[0, N)`.
        """
        device = self.words.device
        counts = torch.zeros(len(texts), len(self.words), device=device)
        rows = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(text) for text in texts])).to(device)
        ids = torch.tensor([word for text in texts for word in text], dtype=torch.long, device=device)
        places = torch.searchsorted(self.words, ids).clamp(max=len(self.words) - 1)
        counted = self.words[places] == ids
        counts.index_put_(
            (rows[counted], places[counted]), torch.ones((), device=device).expand(int(counted.sum())), accumulate=True
        )
        return nn.functional.normalize(counts.log1p() * self.rarity.float(), dim=1)

    def states(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What texts add to a state, and the state of somebody unknown: `(texts, width)` and `(width,)`, float32."""
        parts = [
            self.bag(texts[start : start + TEXTS_PER_PASS]) @ self.to_state.weight.float().T
            for start in range(0, len(texts), TEXTS_PER_PASS)
        ]
        return torch.cat(parts), self.to_state.bias.float()

    def word_effects(self, text: Sequence[int], state: torch.Tensor) -> list[float]:
        """What each word of an item's text adds to its logit in a state `(width,)`; 0 where a word does not count.

        The effect of a word that stands there several times is shared among its places.
        """
        bag = self.bag([text])[0]
        weight = self.to_item.weight.float()
        effects = bag * (state.float() @ weight[:-1] + weight[-1])
        effect = {word: value for word, value in zip(self.words.tolist(), effects.tolist(), strict=True) if value}
        counts = {word: text.count(word) for word in set(text)}
        return [effect.get(word, 0.0) / counts[word] for word in text]

    def item_rows(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(texts, width)` and biases `(texts,)` of items that have these texts, float32."""
        rows = torch.cat(
            [
                self.bag(texts[start : start + TEXTS_PER_PASS]) @ self.to_item.weight.float().T
                for start in range(0, len(texts), TEXTS_PER_PASS)
            ]
        )
        rows = rows + self.to_item.bias.float()
        return rows[:, :-1], rows[:, -1]
