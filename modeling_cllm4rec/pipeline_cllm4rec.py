"""`pipeline("recommendation", model=…, trust_remote_code=True)`: raw ids in, ranked items with their titles out.

It reads `items.jsonl` beside the model and, where a folder publishes its users, `users.jsonl`; both hold a line per id, in id order.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Pipeline, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file, logging

from .records_cllm4rec import CatalogueRecords, listed
from .tokenization_cllm4rec import counts_of, resize_id_words

logger = logging.get_logger(__name__)

INPUT_KEYS = ("user", "history", "text")
RESTRICTIONS = ("candidates", "exclude")
PARAMETERS = ("top_k", *RESTRICTIONS, "exclude_seen", "batch_size", "num_workers")


class RecommendationPipeline(Pipeline):
    """Recommends items to a known user, to a history, to a sentence, or to what of them is given.

    An input is `{"user": raw id}`, `{"history": [raw item ids]}`, `{"text": "who I am or what I want"}`, or several of them; a call
    takes one, a list or a generator of them. A user's training history is the prompt where no history is given; both are left
    out of the ranking. An id that is a number may be given as text, and the other way round.

    Args:
        model: A recommendation head, as `AutoModelForSequenceClassification` opens it.
        items: Path of an `items.jsonl` (`id` and `title` a line); by default it, and `users.jsonl`, are looked for beside
            the model.
        users: Path of a `users.jsonl` (`id` and `history`, item indices, a line).
        top_k (`int`, defaults to 10): How many items; fewer are given where fewer may be shown.
        candidates (list of raw item ids, *optional*): The only items that may be recommended.
        exclude (list of raw item ids, *optional*): Items that may not; those that are not in the catalogue are passed over.
        exclude_seen (`bool`, defaults to `True`): Whether the person's items are left out of the ranking.
        batch_size (`int`, defaults to 1): Inputs in one forward pass; the answers do not depend on it.

    `top_k`, `candidates`, `exclude`, `exclude_seen` and `batch_size` may be given here and at each call.

    `explain` says what carried an item; `add_items`, `add_users`, `remove_items` and `remove_users` change the catalogue without
    training, and `save_pretrained` or `push_to_hub` keeps the change; the records of users who came by a path are written to
    a path, by `save_pretrained(folder, users=path)`.

    Returns:
        Per input a list of `{"item": raw id, "title": str, "score": float, "rank": int}`, best first, rank 1; scores are
        probabilities over the whole catalogue, whatever is left out of the ranking.

    Raises:
        ValueError: naming an unknown user, candidate, or key of an input, or a history of which no item is known; or that the
            model knows no texts.
        TypeError: naming an unknown parameter, or a model that cannot recommend.

    Example:
        >>> rec = pipeline("recommendation", model="me/my-recommender", trust_remote_code=True)
        >>> rec({"history": ["python3-numpy", "python3-matplotlib"]}, top_k=1)
        [{'item': 'python3-scipy', 'title': 'scientific library', 'score': 0.13, 'rank': 1}]
    """

    tokenizer: Any
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        items: str | Path | None = None,
        users: str | Path | None = None,
        local_files_only: bool = False,  # the factory leaves it here; the model has kept its own
        **kwargs: Any,
    ) -> None:
        if not hasattr(model, "recommend"):
            raise TypeError(f"{type(model).__name__} cannot recommend; open it with AutoModelForSequenceClassification")
        items_file = Path(items) if items else file_beside(model, "items.jsonl")
        if items_file is None:
            raise ValueError(f"no items.jsonl beside the model {model.name_or_path!r}; give items=path")
        users_file = Path(users) if users else None if items else file_beside(model, "users.jsonl")
        self._records = CatalogueRecords(model, items_file, users_file, publishes_users=users is None)
        # By their raw ids, since what is given here outlives changes of the catalogue.
        self._restricted_to = {
            name: list(kwargs[name]) if isinstance(kwargs[name], Iterator) else kwargs[name]
            for name in RESTRICTIONS
            if kwargs.get(name) is not None
        }
        super().__init__(model, *args, **kwargs | self._restricted_to)
        if getattr(model, "tokenizer", None) is None:
            model.tokenizer = self.tokenizer  # opened already

    @property
    def records(self) -> CatalogueRecords:
        """The items and users by their raw ids, of the model that the pipeline has now."""
        self._records.model = self.model
        return self._records

    @property
    def items_file(self) -> Path:
        """Where the items were read."""
        return self._records.items_file

    @property
    def users_file(self) -> Path | None:
        """Where the users are read, if they are."""
        return self._records.users_file

    @property
    def users(self) -> tuple[dict[Any, int], list[Any]]:
        """Raw id to index, and the training history, item indices, of each user; read when first asked for.

        Raises:
            ValueError: if the file is not the model's, or of another state of its catalogue.
        """
        return self.records.histories

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Recommend to one input (a list of items), to a list of them (a list of lists), or to a generator (lazily)."""
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []  # transformers would look at the first
        if isinstance(inputs, Iterator):
            inputs = Stream(inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in parameters:
            if name in ("items", "users"):
                raise TypeError(f'{name} is given once, in pipeline("recommendation", model=…, {name}=path)')
            if name not in PARAMETERS:
                raise TypeError(unknown("parameter", name, PARAMETERS))
        top_k, exclude_seen = parameters.get("top_k", 1), parameters.get("exclude_seen", True)
        if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it is a number of items, at least 1")
        if not isinstance(exclude_seen, bool):
            raise ValueError(f"exclude_seen is {exclude_seen!r}; it is True or False")
        if parameters.get("candidates") is not None:
            indices, strangers = self.records.find_items(parameters["candidates"], "candidates")
            if strangers:
                raise ValueError(f"candidates that are not in the catalogue: {listed(strangers)}")
            if not indices:
                raise ValueError("candidates is empty, so nothing could be recommended; leave it out for all items")
            parameters["candidates"] = indices
        if parameters.get("exclude") is not None:
            parameters["exclude"], _ = self.records.find_items(parameters["exclude"], "exclude")
        return {}, parameters, {}

    def preprocess(self, person: Any) -> dict[str, tuple[int | None, tuple[int, ...], tuple[int, ...], Any]]:
        """User index or None, history, everything seen, and the text or None, of one input.

        They stay one tuple, which transformers' batching puts in a list as it is: the model makes the prompts of a batch,
        so that padding is the same whatever tokenizer is loaded.
        """
        if not isinstance(person, Mapping):
            raise ValueError(
                f'an input is {{"user": raw id}}, {{"history": [raw item ids]}} or {{"text": "…"}}, or several of them, not {person!r}'
            )
        for key in person:
            if key not in INPUT_KEYS:
                raise ValueError(unknown("key of an input", key, INPUT_KEYS))
        raw_user, raw_history, text = (person.get(key) for key in INPUT_KEYS)
        if raw_user is None and raw_history is None and text is None:
            raise ValueError(
                'an input needs "user", "history" or "text"; {"history": []} asks for nobody in particular'
            )
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text is {text!r}; it is a sentence")
        user, trained = (None, ()) if raw_user is None else self.records.find_user(raw_user)
        history = trained if raw_history is None else self.records.known_history(raw_history)
        if not self.model.config.tells_users_apart or (user is not None and user in self.records.untrained):
            user = None  # known by the history alone
        if user is None and not history and text is None:
            logger.warning("The history is empty: this is what the model recommends to nobody in particular.")
        return {"person": (user, history, history + trained, text)}

    def _forward(self, inputs: dict[str, Any], top_k: int = 10, **options: Any) -> dict[str, Any]:
        people = inputs["person"] if isinstance(inputs["person"], list) else [inputs["person"]]
        users, histories, seen, texts = zip(*people, strict=True)
        ranked = self.model.recommend(histories, users, texts, seen=seen, k=top_k, **options)
        return {"items": ranked.items, "scores": ranked.scores}

    def postprocess(self, ranked: dict[str, Any]) -> list[dict[str, Any]]:
        """Raw ids, titles, scores and ranks of `items` and `scores`, `(1, k)`."""
        ids, titles = self.records.item_ids, self.records.titles
        best = zip(ranked["items"][0].tolist(), ranked["scores"][0].tolist(), strict=True)
        return [
            {"item": ids[item], "title": titles[item], "score": score, "rank": rank}
            for rank, (item, score) in enumerate(best, 1)
            if item >= 0
        ]

    def save_pretrained(self, save_directory: str | Path, *, users: str | Path | None = None, **kwargs: Any) -> None:
        """Save all that [`pipeline`] opens: model, tokenizer, code and items, and the users where the folder had them.

        Args:
            save_directory: The folder.
            users: Path that the records of users are written to, for `pipeline(…, users=path)`; it may be the one they came
                from. It is needed where they came by a path and items were removed, or users have come or gone.
            kwargs: Passed to transformers.

        Raises:
            ValueError: if `users` is needed and not given, or given to a pipeline that knows no users; before anything is written.
        """
        users_file = None if users is None else Path(users)
        marked = None
        if users_file is None:
            self.records.check_users_are_kept()
        else:
            marked = self.records.marked_users()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        custom_object_save(self, folder)
        # First, since it is the largest: where it cannot be written, what stands beside it still fits what was there; so does the
        # configuration, which transformers writes before the weights.
        file = folder / "config.json"
        before = file.read_bytes() if file.is_file() else None
        try:
            super().save_pretrained(save_directory, **kwargs)
        except BaseException:
            if before is not None:
                beside = folder / "config.json.before"
                beside.write_bytes(before)
                beside.replace(file)
            raise
        self.records.write(folder)
        if users_file is not None and marked is not None:
            self.records.write_users(users_file, marked)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; records of users who came by a path are not pushed.

        Raises:
            ValueError: if they have changed and were not saved, before a repo is made.
        """
        self.records.check_users_are_kept()
        return super().push_to_hub(*args, **kwargs)

    def explain(self, person: Any, item: Any, *, top_k: int = 3) -> dict[str, Any] | list[dict[str, Any]]:
        """Say what carried an item for a person: by leaving each item of the history out, and by the words of the item's text.

        Args:
            person: An input as for a recommendation.
            item: The raw id of the item, or a list of such: many cost hardly more than one.
            top_k: How many items and words are named, those with the largest effect first.

        Returns:
            `item`, `title`, `score` (its probability), `history`: items `{"item", "title", "effect"}`, the effect being what the
            log-probability loses when that one is left out of the history, in nats; `words`: words of the item's text
            `{"word", "effect"}` that speak for it to this person, by the text map, with what they add to its logit. Only what speaks
            for the item is named. A list of such for a list.

        Raises:
            ValueError: as for a recommendation, and where an item is not in the catalogue.
        """
        if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it is a number of items, at least 1")
        user, history, _, text = self.preprocess(person)["person"]
        indices, strangers = self.records.find_items(item if isinstance(item, list) else [item], "item")
        if strangers:
            raise ValueError(f"item {strangers[0]!r} is not in the catalogue")
        ids, titles = self.records.item_ids, self.records.titles
        effects = self.model.history_effects(history, indices, user, text).tolist()
        state = self.model.query_states([history], [user], [text])
        scores = self.model.item_logits(state).float().softmax(-1)[0, indices].tolist()
        found = []
        for index, score, of_history in zip(indices, scores, effects, strict=True):
            carried = sorted(zip(history, of_history, strict=True), key=lambda pair: -pair[1])[:top_k]
            found.append(
                {
                    "item": ids[index],
                    "title": titles[index],
                    "score": score,
                    "history": [
                        {"item": ids[one], "title": titles[one], "effect": effect}
                        for one, effect in carried
                        if effect > 0
                    ],
                    "words": self._words_for(self.records.text_of(index), state[0])[:top_k],
                }
            )
        return found if isinstance(item, list) else found[0]

    def add_items(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Take items into the catalogue that have nothing but a text: they are recommended from now on, without training.

        Args:
            items: `{"id", "title" (optional), "text"}` each; of a data frame, `frame.to_dict("records")`. Title and text are
                read together, as in training.

        Raises:
            ValueError: naming what is missing or there already, before anything is changed.
        """
        with self._following():
            self.records.add_items(items)

    def add_users(self, users: Iterable[Mapping[str, Any]]) -> None:
        """Take users in by their histories: they are known by their id from now on, without training.

        They are served by their history alone, without their token, whose embedding says nothing yet. The token ids of all items
        move up by the number of new users; indices and raw ids stay.

        Args:
            users: `{"id", "history": [raw item ids]}` each.

        Raises:
            ValueError: naming what is missing or there already, before anything is changed; or that the model has no users.jsonl.
        """
        with self._following():
            self.records.add_users(users)

    def remove_items(self, items: Iterable[Any]) -> None:
        """Take items out of the catalogue and out of all histories; nothing of them stays.

        Args:
            items: Raw ids.

        Raises:
            ValueError: naming what is not in the catalogue, before anything is changed.
        """
        with self._following():
            self.records.remove_items(items)

    def remove_users(self, users: Iterable[Any]) -> None:
        """Forget people: their rows in every table, their ids, texts and histories; the others stay where they are.

        What the other tables have learnt from them stays: only training without them takes that away.

        Args:
            users: Raw ids.

        Raises:
            ValueError: naming who is unknown, before anything is changed; or that the model has no users.jsonl.
        """
        with self._following():
            self.records.remove_users(users)

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Let the tokenizer, and the restrictions that the pipeline was opened with, follow the change of the catalogue in the block.

        Raises:
            ValueError: if it cannot, before anything is changed.
        """
        if self.tokenizer is not None:
            counts_of(self.tokenizer)
        yield
        for name, raw_ids in self._restricted_to.items():
            self._forward_params[name], _ = self.records.find_items(raw_ids, name)
        config = self.model.config
        if self.tokenizer is not None:
            self.tokenizer = resize_id_words(self.tokenizer, num_users=config.num_users, num_items=config.num_items)

    def _words_for(self, text: str, state: Any) -> list[dict[str, Any]]:
        """The words of an item's text that add to its logit in this state, the strongest first."""
        text_map = self.model.base.text_map
        effects = {} if text_map is None else text_map.word_effects(text, state)
        ranked = sorted(effects.items(), key=lambda pair: -pair[1])
        return [{"word": word, "effect": effect} for word, effect in ranked if effect > 0]


class Stream(IterableDataset):
    """An iterator as what every version of transformers streams; before 5.14 it reads a generator to its end first."""

    def __init__(self, inputs: Iterator[Any]) -> None:
        self.inputs = inputs

    def __iter__(self) -> Iterator[Any]:
        """The inputs, once."""
        return self.inputs


def file_beside(model: PreTrainedModel, name: str) -> Path | None:
    """The file of that name in the folder or repo, at the commit, that the model was loaded from."""
    if not model.name_or_path:
        return None
    file = cached_file(model.name_or_path, name, _raise_exceptions_for_missing_entries=False, **model.download_options)
    return None if file is None else Path(file)


def unknown(kind: str, name: Any, known: Sequence[str]) -> str:
    """A sentence that names the nearest right one, and all."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return (
        f"unknown {kind} {name!r}{f', did you mean {nearest[0]!r}?' if nearest else '.'} There are {', '.join(known)}"
    )
