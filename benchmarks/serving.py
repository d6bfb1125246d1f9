"""What serving takes where the catalogue is large: the tokenizer of two million ID words, a recommender of a million items.

python benchmarks/serving.py                      # trains the sample, then enlarges its catalogue
python benchmarks/serving.py runs/sample --short  # a run that is there; 100,000 items, fewer requests

Measured are loading and batched encoding of the tokenizer; `from_pretrained`, the first recommendation and the opening of the
pipeline, each in a process of its own; then one request after the other (ten items of history, the top ten) on one thread,
each beside one product of the item table with a vector, which no exact ranking can do without.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.claims import Claim, Worker, alternate, environment, paired, resident_memory, threads_of, together
from benchmarks.push_and_load import enlarge, read_whole
from benchmarks.sets import make_backbone
from benchmarks.trained_sample import train_sample
from configuration.load import load_recipe
from training.data.readers import read_tables

ID_WORDS = 2_000_000  # half users, half items
SHORT, LONG = 100_000, 1_000_000
HISTORY, TOP = 10, 10
TEXTS = 4000
COMMAND = "python benchmarks/serving.py"


@dataclass(frozen=True)
class Opened:
    """Seconds of opening a model in a fresh process, and of what it is compared with.

    Attributes:
        load: `from_pretrained`.
        read: Reading the file of the weights.
        first: The first recommendation, which is the first to touch the weights.
        later: Median of the recommendations after it.
        pipeline: Opening the pipeline.
        parse: Parsing `items.jsonl` line by line.
        loaded_memory: Peak of the process when the first recommendation was made, in bytes.
        peak_memory: Peak of the process, the pipeline included, in bytes.
        weights: Bytes of the weights.
    """

    load: float
    read: float
    first: float
    later: float
    pipeline: float
    parse: float
    loaded_memory: int
    peak_memory: int
    weights: int


def claims(short: bool, run: Path | None = None) -> Iterator[Claim]:
    """The claims about serving.

    Args:
        short: With 100,000 items, not a million, and fewer requests.
        run: A trained run's folder; without it the sample is trained first.
    """
    yield from tokenizer_claims(repeats=3 if short else 5)
    with tempfile.TemporaryDirectory(prefix="serving-") as temporary:
        folder = Path(temporary)
        run = train_sample(folder) if run is None else run
        items = SHORT if short else LONG
        in_own_process(enlarge, run, folder / "large", items)
        model = folder / "large" / "model"
        yield from opening_claims(model, run / "model", f"{items:,} items", repeats=1 if short else 3)
        yield from request_claims(model, f"{items:,} items", repeats=2 if short else 5, count=50 if short else 200)


def tokenizer_claims(repeats: int) -> Iterator[Claim]:
    """Load and encode with two million ID words; the absolute bounds are the ratios to one second and to a million tokens."""
    of_set = f"{ID_WORDS:,} ID words"
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        folder = Path(temporary)
        words = in_own_process(make_tokenizer, folder, ID_WORDS)
        with Worker(loads, folder / "extended") as worker:
            seconds = [worker.repeat()[1] for _ in range(repeats)]
            memory = worker.peak_memory
        yield paired(
            "tokenizer: load", of_set, [[one, 1.0] for one in seconds], unit="s", at_most=8, memory=[memory, 0],
            command=COMMAND,
        )  # fmt: skip
        threads = os.cpu_count() or 1
        with Worker(encodes, folder / "extended", "tokens", threads=threads) as worker:
            speeds = [tokens / seconds / 1e6 for tokens, seconds in (worker.repeat() for _ in range(repeats))]
        yield paired(
            f"tokenizer: encode in batch, {threads} threads", of_set, [[one, 1.0] for one in speeds], unit="M tokens/s",
            at_least=0.5, command=COMMAND,
        )  # fmt: skip
        of_both = (Worker(encodes, where, "characters") for where in (folder / "extended", words))
        with together(*of_both) as (ours, theirs):
            yield alternate(
                "tokenizer: encode ÷ the backbone's own", of_set, ours, theirs, unit="characters/s", repeats=repeats,
                command=COMMAND,
            )  # fmt: skip


def opening_claims(model: Path, warm: Path, of_set: str, repeats: int) -> Iterator[Claim]:
    """What it takes until the first recommendation, each repeat in a process of its own."""
    opened = [in_own_process(open_model, model, warm) for _ in range(repeats)]
    yield paired(
        "from_pretrained ÷ reading the weights", of_set, [[one.load, one.read] for one in opened], unit="s",
        memory=[opened[0].loaded_memory, opened[0].weights], command=COMMAND,
    )  # fmt: skip
    yield paired(
        "first recommendation ÷ a later one", of_set, [[one.first, one.later] for one in opened], unit="s",
        command=COMMAND,
    )  # fmt: skip
    yield paired(
        "opening the pipeline ÷ parsing items.jsonl", of_set, [[one.pipeline, one.parse] for one in opened], unit="s",
        memory=[opened[0].peak_memory, opened[0].weights], command=COMMAND,
    )  # fmt: skip


def request_claims(model: Path, of_set: str, repeats: int, count: int) -> Iterator[Claim]:
    """Median and 99th percentile of one request, in products of the item table with a vector."""
    rounds, memory = in_own_process(answer_requests, model, repeats, count)
    for way in ("recommend()", "pipeline"):
        for percentile in (50, 99):
            runs = [
                [1000 * float(np.percentile(one[way], percentile)), 1000 * median(one["product"])] for one in rounds
            ]
            yield paired(
                f"one request by {way}, p{percentile} ÷ one product", of_set, runs, unit="ms", memory=[memory, memory],
                command=COMMAND,
            )  # fmt: skip


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process of one thread."""
    with environment(threads_of(1)), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def make_tokenizer(folder: Path, id_words: int) -> Path:
    """Write GPT-2's tokenizer (or one trained on the sample's texts), extended by so many ID words, and texts to encode.

    Args:
        folder: Where `extended/` and `texts.json` are written.
        id_words: Users and items, half each.

    Returns:
        The folder of the tokenizer without ID words.
    """
    from modeling_cllm4rec import TokenizerWithUserItemIDTokens

    backbone = make_backbone(folder, layers=1, width=8, heads=1)
    half = id_words // 2
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(backbone, num_users=half, num_items=half)
    tokenizer.save_pretrained(folder / "extended")
    (folder / "texts.json").write_text(json.dumps(texts_with_ids(half, TEXTS)), encoding="utf-8")
    return backbone


def texts_with_ids(num_ids: int, count: int, seed: int = 0) -> list[str]:
    """The sample's sentences as reviews that random users wrote for random items, over and over."""
    tables = read_tables(load_recipe("sample").data)
    sentences = [text for table in (tables.items, tables.users) if table is not None for text in table["text"]]
    ids = np.random.default_rng(seed).integers(num_ids, size=(count, 2))
    return [
        f"user_{user} writes the following review for item_{item}: {sentences[row % len(sentences)]}"
        for row, (user, item) in enumerate(ids)
    ]


def loads(folder: Path) -> Callable[[], float]:
    """What a worker repeats: loading a tokenizer."""
    from transformers import AutoTokenizer

    def repeat() -> float:
        AutoTokenizer.from_pretrained(folder)
        return 1.0

    return repeat


def encodes(folder: Path, unit: str) -> Callable[[], float]:
    """What a worker repeats: encoding the texts beside a tokenizer's folder in one batch, to ids only (no masks, no offsets).

    Args:
        folder: The tokenizer's.
        unit: Of the work done, `tokens` or `characters`.
    """
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    texts = json.loads((folder.parent / "texts.json").read_text(encoding="utf-8"))
    characters = sum(map(len, texts))

    def repeat() -> float:
        tokens = sum(len(encoding.ids) for encoding in backend.encode_batch_fast(texts))
        return tokens if unit == "tokens" else characters

    return repeat


def open_model(folder: Path, warm: Path) -> Opened:
    """Open a model in this process, recommend, and open its pipeline.

    Args:
        folder: The model's.
        warm: A small model's, so that everything is imported before the clock runs.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    opening = transformers.AutoModelForSequenceClassification.from_pretrained
    for name in (warm, folder):  # imports the code that each folder carries
        opening(name, trust_remote_code=True).config.num_items  # noqa: B018
    weights, items = folder / "model.safetensors", folder / "items.jsonl"
    read = min(read_whole(weights) for _ in range(2))  # its pages are in memory after the first
    load, model = timed(lambda: opening(folder, trust_remote_code=True))
    histories = random_histories(model.config.num_items, 20)
    first, *later = (timed(lambda history=one: model.recommend([history], k=TOP))[0] for one in histories)
    loaded_memory = resident_memory()
    parse, _ = timed(lambda: parse_lines(items))
    pipeline, _ = timed(lambda: transformers.pipeline("recommendation", model=str(folder), trust_remote_code=True))
    size = weights.stat().st_size
    return Opened(load, read, first, median(later), pipeline, parse, loaded_memory, resident_memory(), size)


def answer_requests(folder: Path, repeats: int, count: int) -> tuple[list[dict[str, list[float]]], int]:
    """Seconds of each request by each way, and of a product of the item table with a vector beside it.

    Args:
        folder: The model's.
        repeats: Rounds.
        count: Requests of a round.

    Returns:
        A dict per round with `recommend()`, `pipeline` and `product`, and the peak memory of the process in bytes.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    recommend = transformers.pipeline("recommendation", model=str(folder), trust_remote_code=True)
    model = recommend.model
    table, bias = model.get_output_embeddings().weight.detach(), model.model.item_bias  # None where items have no bias
    bias = None if bias is None else bias.detach()
    state = torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(0))
    rounds = []
    for number in range(repeats + 1):
        found: dict[str, list[float]] = {"recommend()": [], "pipeline": [], "product": []}
        for history in random_histories(model.config.num_items, count, seed=number):
            raw = [recommend.records.item_ids[item] for item in history]
            calls = (
                lambda history=history: model.recommend([history], k=TOP),
                lambda raw=raw: recommend({"history": raw}, top_k=TOP),
                lambda: torch.nn.functional.linear(state, table, bias),
            )
            for name, call in zip(found, calls, strict=True):
                found[name].append(timed(call)[0])
        rounds.append(found)
    return rounds[1:], resident_memory()  # caches fill in the first


def random_histories(num_items: int, count: int, seed: int = 0) -> list[list[int]]:
    """So many people with ten different items each."""
    random = np.random.default_rng(seed)
    return [random.choice(num_items, HISTORY, replace=False).tolist() for _ in range(count)]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def parse_lines(path: Path) -> None:
    """Parse a file of JSON lines, one by one, and keep nothing."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            json.loads(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a trained run's folder (default: the sample is trained)")
    parser.add_argument(
        "--short", action="store_true", help=f"with {SHORT:,} items, not {LONG:,}, and fewer requests and repeats"
    )
    given = parser.parse_args(arguments)
    for _ in claims(given.short, given.run):
        pass


if __name__ == "__main__":
    main()
