"""From people to their best items: prompts, states, rankings and explanations, as methods of the recommendation model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import ModelOutput

from .catalogue_cllm4rec import NO_TEXTS, add_items, add_users, remove_items, remove_users
from .configuration_cllm4rec import CLLM4RecConfig
from .text_encoder_cllm4rec import text_states

# Tokens of the prompts that an explanation looks at together, about.
TOKENS_AT_A_TIME = 2**14

NO_USERS = "this model was published without user embeddings; leave the user out and give a history"


@dataclass
class RankedItems(ModelOutput):
    """The best items of each person, best first.

    Args:
        items (`torch.LongTensor` of shape `(batch, k)`): Item indices in `[0, num_items)`; -1 where fewer than k may be shown.
        scores (`torch.FloatTensor` of shape `(batch, k)`): Probabilities over the whole catalogue; 0 where the item is -1.
    """

    items: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class RankingMixin:
    """What a model with an item head does for people, given by user index, history of item indices, text, or several of them."""

    config: CLLM4RecConfig
    model: Any
    item_logits: Callable[[torch.Tensor], torch.Tensor]
    read_out: Callable[..., torch.Tensor]
    training: bool

    if TYPE_CHECKING:  # of torch's modules

        def train(self, mode: bool = True) -> Any: ...  # noqa: D102
        def eval(self) -> Any: ...  # noqa: D102

    def prepare_prompts(
        self, histories: Sequence[Sequence[int]] | None = None, users: Sequence[int | None] | None = None
    ) -> dict[str, torch.Tensor]:
        """Prompts for people given by their user index, by item indices, or by both.

        Args:
            histories: Item indices in `[0, num_items)` of each person, the oldest first; those over `config.max_history` are
                left out from the front.
            users: User index in `[0, num_users)` of each person; None for somebody the model does not know.

        Returns:
            `input_ids` and `attention_mask` of shape `(batch, length)`, padded on the right, on the model's device.

        Raises:
            ValueError: if neither is given or one is empty, their lengths differ, a user is given to a model without user
                embeddings, or the configuration holds no prompt.
            IndexError: naming an index outside the catalogue or the users.
        """
        if self.config.prompt_ids is None:
            raise ValueError("config.prompt_ids is not set: it holds the word ids of the prompt; training writes it")
        if histories is None and users is None:
            raise ValueError("give histories, users or both")
        histories, users = one_each("histories", histories), one_each("users", users)
        if histories is None:
            histories = [()] * len(users or ())
        users = [None] * len(histories) if users is None else users
        if not self.config.user_embeddings and any(user is not None for user in users):
            raise ValueError(f"a user is given: {NO_USERS}")
        if len(users) != len(histories):
            raise ValueError(f"{len(users)} users but {len(histories)} histories; there is one history per user")
        parts, first_user = self.config.prompt_ids, self.config.num_words
        first_item = first_user + self.config.num_users
        prompts = []
        for user, history in zip(users, histories, strict=True):
            items = [int(item) for item in history][-self.config.max_history :]
            for name, index, size in (
                ("user", user, first_item - first_user),
                *(("item", i, self.config.num_items) for i in items),
            ):
                if index is not None and not 0 <= index < size:
                    raise IndexError(f"{name} {index} is outside [0, {size})")
            someone = [] if user is None or not self.config.prompt_names_user else [first_user + int(user)]
            prompt = someone + parts["history"] + [first_item + item for item in items]
            if parts["recommend"]:
                prompt += parts["separator"] + someone + parts["recommend"]
            prompts.append(prompt)
        length = max(map(len, prompts))
        device = self.model.item_embeddings.weight.device
        input_ids = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts], device=device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        return {"input_ids": input_ids, "attention_mask": (torch.arange(length, device=device) < lengths).long()}

    add_items, add_users = add_items, add_users
    remove_items, remove_users = remove_items, remove_users

    @torch.no_grad()
    def query_states(
        self,
        histories: Sequence[Sequence[int]] | None = None,
        users: Sequence[int | None] | None = None,
        texts: Sequence[str | None] | None = None,
    ) -> torch.Tensor:
        """What the item head reads about each person, `(batch, width)`; without dropout, in training mode, too.

        A history, a user or both are read from a prompt; a text adds what its words say; alone, it speaks for the person. To known
        users their offsets are added, where the model has any.

        Args:
            histories: As in [`~CLLM4RecForRecommendation.recommend`].
            users: Alike.
            texts: What each person says of itself or wants; None for somebody who says nothing.

        Raises:
            ValueError, IndexError: as [`~CLLM4RecForRecommendation.prepare_prompts`]; ValueError also where there are texts but
                the model has no text map, or where tables that are read here are offloaded.
        """
        self.check_tables_are_here()
        histories, users, texts = (
            one_each(name, given) for name, given in (("histories", histories), ("users", users), ("texts", texts))
        )
        if histories is None and users is None and texts is not None:
            histories = [()] * len(texts)
        prompts = self.prepare_prompts(histories, users)
        was_training = self.training
        self.eval()
        try:
            hidden = self.model(**prompts, use_cache=False).last_hidden_state
        finally:
            self.train(was_training)
        states = self.read_out(hidden, prompts["input_ids"], prompts["attention_mask"])
        named_rows = [row for row, user in enumerate(users or ()) if user is not None]
        if named_rows and self.model.user_offsets is not None:
            named = torch.tensor([int((users or ())[row] or 0) for row in named_rows], device=states.device)
            states[named_rows] = states[named_rows] + self.model.user_offsets(named).to(states)
        if texts is None or all(text is None for text in texts):
            return states
        text_map = self.model.text_map
        if text_map is None:
            raise ValueError(f"a text is given, but {NO_TEXTS}; give a history or a user instead")
        if len(texts) != len(states):
            raise ValueError(f"{len(texts)} texts but {len(states)} people; there is one text, or None, for each")
        spoken = ["" if text is None else text for text in texts]
        said, nobody = text_map.states(spoken, text_states(self, spoken))  # type: ignore[arg-type]
        blended = []
        tells_apart = self.config.tells_users_apart
        for row, text in enumerate(texts):
            known = (histories is not None and len(histories[row]) > 0) or (
                tells_apart and users is not None and users[row] is not None
            )
            if text is None:
                blended.append(states[row])
            elif known:
                blended.append(states[row] + (text_map.weight_beside_history * said[row]).to(states))
            else:
                blended.append((nobody + said[row]).to(states))
        return torch.stack(blended)

    def check_tables_are_here(self) -> None:
        """Refuse to rank where weights are offloaded that are read outside of a module's forward, past Accelerate's hooks.

        Raises:
            ValueError: saying how to load the model.
        """
        base = self.model
        read = [base.get_input_embeddings().weight, base.item_embeddings.weight, base.item_bias]
        if base.text_map is not None:
            read += base.text_map.parameters()
        if any(weight is not None and weight.is_meta for weight in read):
            raise ValueError(
                "the tables of this model are offloaded by its device_map, and ranking reads them as they are; load the model "
                "whole on one device, without device_map or with device_map={'': device}"
            )

    @torch.no_grad()
    def history_effects(
        self, history: Sequence[int], items: Sequence[int], user: int | None = None, text: str | None = None
    ) -> torch.Tensor:
        """How much each item of a history raises the log-probabilities of items: what they lose when that one is left out.

        Args:
            history: Item indices, the oldest first; those over `config.max_history` have no effect.
            items: Item indices.
            user: User index, or None.
            text: The person's text, or None.

        Returns:
            `(len(items), len(history))` float32, in nats.

        Raises:
            ValueError, IndexError: as [`~CLLM4RecForRecommendation.query_states`].
        """
        for item in items:
            if not 0 <= item < self.config.num_items:
                raise IndexError(f"item {item} is outside [0, {self.config.num_items})")
        asked = list(history)[-self.config.max_history :]
        without = [asked, *(asked[:place] + asked[place + 1 :] for place in range(len(asked)))]
        rows = max(TOKENS_AT_A_TIME // (len(asked) + 1), 1)
        parts = (without[start : start + rows] for start in range(0, len(without), rows))
        states = (
            self.query_states(part, [user] * len(part), None if text is None else [text] * len(part)) for part in parts
        )
        likely = torch.cat([self.item_logits(state).float().log_softmax(-1)[:, list(items)] for state in states])
        unread = likely.new_zeros(len(history) - len(asked), len(items))
        return torch.cat([unread, likely[0] - likely[1:]]).T

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[int]] | None = None,
        users: Sequence[int | None] | None = None,
        texts: Sequence[str | None] | None = None,
        *,
        k: int = 10,
        exclude_seen: bool = True,
        seen: Sequence[Sequence[int]] | None = None,
        candidates: Sequence[int] | None = None,
        exclude: Sequence[int] | None = None,
    ) -> RankedItems:
        """The k best items for each person.

        Args:
            histories: Item indices of each person, the oldest first.
            users: User index of each person; None for somebody the model does not know.
            texts: What each person says of itself or wants; None for somebody who says nothing.
            k: How many items; at most `num_items` are given.
            exclude_seen: Whether what a person has seen is left out of the ranking, also what the prompt has no room for.
            seen: Item indices that each person has seen; the histories by default.
            candidates: Item indices that may be recommended; all by default.
            exclude: Item indices that may not.

        Returns:
            [`RankedItems`]; scores are probabilities over the whole catalogue, whatever is left out of the ranking.

        Raises:
            ValueError, IndexError: as [`~CLLM4RecForRecommendation.query_states`].
        """
        if k < 1:
            raise ValueError(f"k is {k}; at least one item is recommended")
        histories = one_each("histories", histories)
        scores = self.item_logits(self.query_states(histories, users, texts)).float().softmax(-1)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        for name, items in (("candidates", candidates), ("exclude", exclude)):
            if items is not None:
                chosen = torch.as_tensor(list(items), dtype=torch.long)
                if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.config.num_items:
                    raise IndexError(f"{name} hold an item outside [0, {self.config.num_items})")
                if name == "candidates":
                    allowed[:] = False
                allowed[:, chosen.to(allowed.device)] = name == "candidates"
        seen = histories if seen is None else seen
        if exclude_seen and seen is not None:
            for row, history in enumerate(seen):
                allowed[row, torch.as_tensor(list(history), dtype=torch.long, device=allowed.device)] = False
        best = scores.masked_fill(~allowed, -1.0).topk(min(k, self.config.num_items), dim=-1)
        shown = best.values >= 0
        return RankedItems(items=best.indices.masked_fill(~shown, -1), scores=best.values.masked_fill(~shown, 0.0))


def one_each(name: str, given: Any) -> list[Any] | None:
    """What is given for each person as a list, of an array or tensor its numbers; None where nothing is.

    Raises:
        ValueError: naming what is no list, or is an empty one.
    """
    if given is None:
        return None
    entries = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(entries, (str, bytes)) or not isinstance(entries, Iterable):
        raise ValueError(f"{name} is {given!r}; it is a list with one entry for each person")
    entries = list(entries)
    if not entries:
        raise ValueError(f"{name} is empty; give an entry for at least one person")
    return entries
