"""The published CLLM4Rec code's recipe, written anew from its description: the ruler that this project is compared with.

python benchmarks/published_recipe.py --set ml-100k               documents/s, padding and peak memory of each stage
python benchmarks/published_recipe.py --set ml-100k --train 50    its whole schedule, with NDCG@100 after each epoch

It reads the documents of our corpora; model, batches and loops are its own. What they cost is what the published code does:
per-user loops build strings, which are tokenised again for each batch; every sequence is padded to the longest of its batch,
and batches come in random order; logits over all words (content) or all items (collaborative) at every position of the main
text, of which a mask picks those that count; dense rows of all items per user for the multinomial likelihood at the prompt's
last token; dense Adam over whole ID tables; float32 throughout, 20 documents a step. Prediction takes 256 prompts at a time,
masks what was seen by dense rows, and sorts the whole catalogue in NumPy, one user after the other. Cheaper than in the
original are the words, which go through a fast tokenizer and once, and the schedule, which is shorter.
"""

import argparse
import math
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, log_softmax, mse_loss
from transformers import AutoTokenizer, GPT2Model, PreTrainedTokenizerBase

from benchmarks.claims import Worker
from benchmarks.sets import PATHS, SAMPLE, make_backbone, make_corpora, set_at_hand
from configuration.recipe import Recipe
from training.data.corpora import Corpora, Source, open_corpora, training_texts
from training.data.interactions import TRAIN, Interactions
from training.evaluation.ranking import evaluate_scores
from training.evaluation.scoring import split_matrix

STAGES = ("content", "collaborative", "recommendation", "predict")
BATCH, PREDICTED_TOGETHER, TOP = 20, 256, 100
LEARNING_RATE, LAMBDA_V, HELD_OUT_SHARE, INITIAL_STD = 1e-3, 1.0, 0.2, 0.02
ID_WORD = re.compile(r" ?((?:user|item)_\d+)")

# What the published code itself gave on another machine of 2 cores, with one thread and a backbone of the same size: documents
# (users) a second, share of padding, peak memory in GB.
ORIGINAL: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("ml-100k", "content"): (27, 0.34, None),
    ("ml-100k", "collaborative"): (16, 0.67, 2.4),
    ("ml-100k", "recommendation"): (22, 0.64, None),
    ("ml-100k", "predict"): (21, 0.77, 3.2),
    ("amazon-beauty", "collaborative"): (63, None, None),
    ("amazon-beauty", "recommendation"): (97, None, None),
    ("amazon-beauty", "predict"): (99, None, None),
}


@dataclass
class Batch:
    """A padded batch.

    Attributes:
        ids: Token ids, int64 `(documents, length)`.
        mask: 1 at tokens, 0 at padding, int64, alike.
        main: Where the main text starts; 0 for prompts alone.
        target_ids: Of prompts alone, tokens of the items to recommend, int64 `(documents, targets)`, padded with 0.
        rows: Of prompts alone, 1.0 at the items of the history, float32 `(documents, num_items)`.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    main: int = 0
    target_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def to(self, device: str) -> "Batch":
        """The same on a device."""
        ids, mask, target_ids, rows = (part.to(device) for part in (self.ids, self.mask, self.target_ids, self.rows))
        return Batch(ids, mask, self.main, target_ids, rows)


@dataclass
class Documents:
    """What the strings are made of, and how they become batches."""

    tokenizer: PreTrainedTokenizerBase
    num_words: int
    num_users: int
    num_items: int
    prompts: list[str]
    texts: list[Source]
    max_text_tokens: int
    histories: dict[int, list[int]]
    positions: int
    order: random.Random

    @classmethod
    def of(cls, corpora: Corpora, backbone: Path) -> "Documents":
        """The documents that the corpora were made of, before they were tokenised with the backbone's tokenizer."""
        table, items, users = corpora.interactions(), corpora.items(), corpora.users()
        interactions = Interactions(
            users=table["user"].to_numpy(),
            items=table["item"].to_numpy(),
            splits=np.where(table["split"].to_numpy() == "train", TRAIN, -1),
            timestamps=None,
            reviews=table["review"].to_pylist() if "review" in table.column_names else None,
            user_ids=[user["id"] for user in users],
            item_ids=[item["id"] for item in items],
            item_titles=[item["title"] for item in items],
            item_texts=[item["text"] for item in items],
            user_texts=[user["text"] for user in users],
            source={},
            log={},
        )
        of_recipe, tokenizer = corpora.info["recipe"], AutoTokenizer.from_pretrained(backbone)
        return cls(
            tokenizer,
            corpora.tokenizer.num_words,
            corpora.num_users,
            corpora.num_items,
            [of_recipe["data"][f"{kind}_prompt"] for kind in ("review", "item", "user")],
            list(training_texts(interactions)),
            of_recipe["max_text_tokens"],
            {number: user["history"] for number, user in enumerate(users) if user["history"]},
            GPT2Model.config_class.from_pretrained(backbone).n_positions,
            random.Random(0),
        )

    def epoch(self, stage: str) -> Iterator[list[int]]:
        """The keys of each batch of an epoch in random order: places among the texts, or users."""
        keys = list(range(len(self.texts)) if stage == "content" else self.histories)
        self.order.shuffle(keys)
        size = PREDICTED_TOGETHER if stage == "predict" else BATCH
        return (keys[start : start + size] for start in range(0, len(keys), size))

    def batch(self, stage: str, keys: list[int]) -> Batch:
        """Build the strings of some documents, tokenise and pad them."""
        if stage in ("content", "collaborative"):
            prompts, mains = zip(*[self.prompt_and_main(stage, key) for key in keys], strict=True)
            (prompt_ids, prompt_mask), (main_ids, main_mask) = pad(prompts), pad(mains)
            ids, mask = torch.cat([prompt_ids, main_ids], dim=1), torch.cat([prompt_mask, main_mask], dim=1)
            return Batch(ids[:, : self.positions], mask[:, : self.positions], prompt_ids.shape[1])
        held_out = HELD_OUT_SHARE if stage == "recommendation" else 0.0
        ids, mask = pad([self.encode(self.recommendation_prompt(user, held_out))[: self.positions] for user in keys])
        target_ids, _ = pad([self.encode(item_words(self.histories[user])) for user in keys])
        return Batch(ids, mask, 0, target_ids, torch.stack([self.row(user) for user in keys]))

    def prompt_and_main(self, stage: str, key: int) -> tuple[list[int], list[int]]:
        """Tokens of a document of the two language models, prompt and main text apart."""
        if stage == "collaborative":
            return self.encode(f"user_{key} has interacted with"), self.encode(item_words(self.histories[key]))
        kind, user, item, text = self.texts[key]
        prompt = self.prompts[kind].format(user=f"user_{user}", item=f"item_{item}")
        main = [*self.tokenizer.encode(" " + text, add_special_tokens=False), self.tokenizer.eos_token_id]
        return self.encode(prompt), main[: self.max_text_tokens]

    def recommendation_prompt(self, user: int, held_out: float) -> str:
        """The prompt for a user, without a random share of the items."""
        history = self.order.sample(self.histories[user], len(self.histories[user]))
        if held_out:
            history = history[max(1, int(held_out * len(history))) :]
        return f"user_{user} has interacted with {item_words(history)}, user_{user} will interact with"

    def row(self, user: int) -> torch.Tensor:
        """All items, 1.0 where the user has them, float32 `(num_items,)`."""
        row = torch.zeros(self.num_items)
        row[self.histories[user]] = 1.0
        return row

    def encode(self, text: str) -> list[int]:
        """Token ids of a string: of ID words by arithmetic, of each piece between them by the backbone's tokenizer."""
        ids: list[int] = []
        for place, piece in enumerate(ID_WORD.split(text)):
            if place % 2:
                kind, number = piece.split("_")
                ids.append(self.num_words + int(number) + (self.num_users if kind == "item" else 0))
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids


class Tower(nn.Module):
    """User and item embeddings of one tower before a frozen backbone, which both towers share."""

    def __init__(self, backbone: GPT2Model, documents: Documents) -> None:
        super().__init__()
        self.backbone, self.num_words, self.num_users = backbone, documents.num_words, documents.num_users
        self.users = nn.Embedding(documents.num_users, backbone.config.n_embd)
        self.items = nn.Embedding(documents.num_items, backbone.config.n_embd)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=INITIAL_STD)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of words, users and items, `(documents, length, width)`: three lookups, masked and summed."""
        first_item = self.num_words + self.num_users
        embedded = torch.zeros((), device=ids.device)
        for table, low, high in (
            (self.backbone.wte, 0, self.num_words),
            (self.users, self.num_words, first_item),
            (self.items, first_item, first_item + self.items.num_embeddings),
        ):
            mine = (ids >= low) & (ids < high)
            embedded = embedded + table((ids - low) * mine) * mine.unsqueeze(-1)
        return embedded

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states, float32 `(documents, length, width)`."""
        return self.backbone(inputs_embeds=self.embed(batch.ids), attention_mask=batch.mask, use_cache=False)[0]

    def language_loss(self, batch: Batch, head: torch.Tensor, first: int) -> torch.Tensor:
        """Mean negative log-likelihood of the main text's tokens but the first, each from those before it.

        Args:
            batch: A content or collaborative batch.
            head: Rows of the vocabulary that is predicted, `(vocabulary, width)`.
            first: Token id of its first row.
        """
        logits = linear(self(batch)[:, batch.main :], head)  # (documents, main length, vocabulary)
        logits, labels = logits[:, :-1], batch.ids[:, batch.main + 1 :] - first
        counts = batch.mask[:, batch.main + 1 :] == 1
        return cross_entropy(logits[counts], labels[counts])

    def item_scores(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities of all items at each prompt's last token, float32 `(documents, num_items)`."""
        last = batch.mask.sum(1) - 1
        hidden = self(batch)[torch.arange(len(last), device=last.device), last]
        return log_softmax(linear(hidden, self.items.weight), dim=-1)


class PublishedRecipe:
    """Both towers, their optimisers and the steps of each stage.

    Args:
        documents: What is learnt.
        backbone: Folder of the frozen backbone.
        device: Where.
    """

    def __init__(self, documents: Documents, backbone: Path, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.documents, self.device = documents, device
        model = GPT2Model.from_pretrained(backbone, dtype=torch.float32).requires_grad_(False)
        self.towers = {name: Tower(model, documents).to(device) for name in ("content", "collaborative")}
        self.optimisers = {
            name: torch.optim.Adam([tower.users.weight, tower.items.weight], lr=LEARNING_RATE)
            for name, tower in self.towers.items()
        }

    def step(self, stage: str, keys: list[int]) -> float:
        """Train on the documents with these keys; their loss."""
        mine, other = ("content", "collaborative") if stage == "content" else ("collaborative", "content")
        tower, optimiser = self.towers[mine].train(), self.optimisers[mine]
        batch = self.documents.batch(stage, keys).to(self.device)
        optimiser.zero_grad()
        if stage == "content":
            loss = tower.language_loss(batch, tower.backbone.wte.weight, 0)
            ids = batch.ids[:, : batch.main]
        elif stage == "collaborative":
            loss = tower.language_loss(batch, tower.items.weight, tower.num_words + tower.num_users)
            ids = batch.ids
        else:
            loss = -(tower.item_scores(batch) * batch.rows).sum(-1).mean()
            ids = torch.cat([batch.ids, batch.target_ids], dim=1)
        if self.documents.texts:  # else the other tower has learnt nothing
            with torch.no_grad():
                theirs = self.towers[other].embed(ids)
            loss = loss + LAMBDA_V * mse_loss(tower.embed(ids), theirs, reduction="sum")
        loss.backward()
        optimiser.step()
        return loss.item()

    @torch.no_grad()
    def scores(self, batch: Batch) -> np.ndarray:
        """Log-probabilities of all items for a batch of prompts, float32 `(users, num_items)`."""
        return self.towers["collaborative"].eval().item_scores(batch.to(self.device)).cpu().numpy()

    def predict(self, users: list[int]) -> list[np.ndarray]:
        """The best unseen items of each user, at most a hundred, best first."""
        batch, ranked = self.documents.batch("predict", users), []
        scores = self.scores(batch)
        scores[batch.rows.numpy() > 0] = -np.inf
        for row in scores:
            best = np.argsort(-row)[:TOP]
            ranked.append(best[np.isfinite(row[best])])
        return ranked


class Epoch(NamedTuple):
    """An epoch of the schedule: seconds of training up to its end, NDCG@100 on validation after it, its standard error, mean loss in it."""

    seconds: float
    number: int
    ndcg_at_100: float
    standard_error: float
    stage: str
    loss: float


def published(stage: str, corpora: Path, backbone: Path, batches: int, device: str = "cpu") -> Callable[[], float]:
    """A stage set up; each call of what is returned works off further batches.

    Args:
        stage: `content`, `collaborative`, `recommendation` or `predict`.
        corpora: Folder of corpora whose words are the backbone's.
        backbone: Folder of the backbone.
        batches: Batches of 20 documents to train on at a call; `predict` takes as many users, in whole batches of 256.
        device: Where.

    Returns:
        A function that gives the number of documents (users) it worked off.
    """
    documents = Documents.of(open_corpora(corpora), backbone)
    recipe = PublishedRecipe(documents, backbone, device)
    coming = endless(documents, stage)
    count = math.ceil(batches * BATCH / PREDICTED_TOGETHER) if stage == "predict" else batches

    def work() -> float:
        done = 0
        for _ in range(count):
            keys = next(coming)
            recipe.predict(keys) if stage == "predict" else recipe.step(stage, keys)
            done += len(keys)
        return done

    return work


def train_published(
    corpora: Path,
    backbone: Path,
    epochs: int = 10,
    recommendation_epochs: int = 50,
    *,
    seconds: float = math.inf,
    device: str = "cpu",
    validate: Sequence[str] = STAGES,
) -> Iterator[Epoch]:
    """The whole schedule: content and collaborative epochs in turn, then those of the recommendation head.

    Args:
        corpora: Folder of corpora whose words are the backbone's.
        backbone: Folder of the backbone.
        epochs: Over each of the two language models' corpora; without texts, over one.
        recommendation_epochs: Of the recommendation head.
        seconds: No epoch is begun after so many seconds of training.
        device: Where.
        validate: Stages whose epochs are followed by validation; after those of others NDCG@100 is 0.

    Yields:
        Each epoch, with what the recommendation prompt gives in our evaluation, whose time is not counted.
    """
    opened = open_corpora(corpora)
    documents = Documents.of(opened, backbone)
    recipe = PublishedRecipe(documents, backbone, device)
    train, held_out = split_matrix(opened, "recommendation"), split_matrix(opened, "validation")
    users, limit = np.flatnonzero(np.diff(held_out.indptr)), Recipe().evaluation.selection_users
    if len(users) > limit:  # those that our runs choose by, too
        users = np.sort(np.random.default_rng(Recipe().seed).choice(users, limit, replace=False))
    languages = ("content", "collaborative") if documents.texts else ("collaborative",)
    spent = 0.0

    def score(users: np.ndarray) -> np.ndarray:
        return recipe.scores(documents.batch("predict", users.tolist()))

    for number, stage in enumerate([*languages * epochs, *["recommendation"] * recommendation_epochs], 1):
        if spent > seconds:
            return
        started = time.perf_counter()
        losses = [recipe.step(stage, keys) for keys in documents.epoch(stage)]
        spent += time.perf_counter() - started
        reached = error = 0.0
        if stage in validate:
            found = evaluate_scores(score, users, train, held_out, batch_size=PREDICTED_TOGETHER).ndcg_at_100
            reached, error = float(found.mean()), float(found.std() / math.sqrt(len(found)))
        yield Epoch(spent, number, reached, error, stage, float(np.mean(losses)))


def strings_and_tokens(
    corpora: Path, backbone: Path, stages: Sequence[str] = ("content", "collaborative", "recommendation")
) -> Callable[[], float]:
    """All documents read; each call of what is returned builds their strings and tokenises them, as an epoch of each stage does.

    Args:
        corpora: Folder of corpora whose words are the backbone's.
        backbone: Folder of the backbone.
        stages: Whose documents.

    Returns:
        A function that gives the number of documents.
    """
    documents = Documents.of(open_corpora(corpora), backbone)

    def work() -> float:
        done = 0
        for stage in stages:
            for keys in documents.epoch(stage):
                documents.batch(stage, keys)
                done += len(keys)
        return done

    return work


def padding_share(documents: Documents, stage: str, batches: int = 200) -> float:
    """The share of positions that is padding, over so many batches."""
    coming = endless(documents, stage)
    masks = [documents.batch(stage, next(coming)).mask for _ in range(batches)]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def endless(documents: Documents, stage: str) -> Iterator[list[int]]:
    """The batches of one epoch after the other."""
    while True:
        yield from documents.epoch(stage)


def item_words(items: list[int]) -> str:
    """`item_5 item_9 …`."""
    return " ".join(f"item_{item}" for item in items)


def pad(rows: list[list[int]] | tuple[list[int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows filled up with 0 to the longest, and where they are real, both int64 `(rows, longest)`."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def measure(name: str, stages: list[str], batches: int, repeats: int, folder: Path) -> None:
    """Print what each stage reaches, and how near that comes to the published code."""
    backbone, corpora = make_backbone(folder), make_corpora(name, folder)
    documents = Documents.of(open_corpora(corpora), backbone)
    print(f"{name:<15} {'documents/s':>11} {'padding':>8} {'peak GB':>8}   of the published code, and how near it is")
    for stage in stages:
        if stage == "content" and not documents.texts:
            print(f"{stage:<15} the set has no text")
            continue
        with Worker(published, stage, corpora, backbone, batches) as worker:
            rate = statistics.median(work / seconds for work, seconds in (worker.repeat() for _ in range(repeats)))
            figures = (rate, padding_share(documents, stage), worker.peak_memory / 1e9)
        theirs = zip(figures, ORIGINAL.get((name, stage), ()), strict=False)
        near = ", ".join(f"{their:g} ({our / their:.2f} x)" for our, their in theirs if their is not None)
        print(f"{stage:<15} {figures[0]:11.1f} {figures[1]:8.0%} {figures[2]:8.2f}   {near or '-'}", flush=True)


def main() -> None:
    """Measure the stages, or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", default="ml-100k", choices=[*PATHS, SAMPLE], help="default: %(default)s")
    add("--stages", nargs="+", default=STAGES, choices=STAGES, help="default: all")
    add("--batches", type=int, default=20, help="of a repeat; predict: as many users (default: %(default)s)")
    add("--repeats", type=int, default=3, help="after one that does not count (default: %(default)s)")
    add(
        "--train",
        type=int,
        metavar="EPOCHS",
        help="train: so many of the recommendation head after the language models",
    )
    add("--language-epochs", type=int, default=10, help="with --train: of each language model (default: %(default)s)")
    add("--seconds", type=float, default=math.inf, help="with --train: begin no epoch after so many")
    add("--folder", type=Path, help="where backbone and corpora are kept (default: a temporary one)")
    chosen = parser.parse_args()
    name = set_at_hand(chosen.set)
    with tempfile.TemporaryDirectory(prefix="published-recipe-") as temporary:
        folder = chosen.folder or Path(temporary)
        if chosen.train is None:
            measure(name, chosen.stages, chosen.batches, chosen.repeats, folder)
            return
        backbone, corpora, epochs, best = make_backbone(folder), make_corpora(name, folder), chosen.language_epochs, 0.0
        for epoch in train_published(corpora, backbone, epochs, chosen.train, seconds=chosen.seconds):
            best = max(best, epoch.ndcg_at_100)
            print(
                f"{epoch.number:3d} {epoch.stage:<15} {epoch.seconds:8.1f} s  loss {epoch.loss:9.4f}  validation NDCG@100 "
                f"{epoch.ndcg_at_100:.4f}  best {best:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
