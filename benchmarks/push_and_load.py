"""What it takes to push a recommender and to open it, for a trained run and for the same with a catalogue of a million.

python benchmarks/push_and_load.py runs/sample --items 1000000

Both go to a Hub on this computer (the one of the test suite), so that no network is measured. Each step runs in a process of
its own. Printed are seconds, peak memory, and what can be compared between machines: the push over a copy of the same
bytes with their SHA-256, the memory of loading over the size of the weights, the load over reading the weights' file.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from configuration.load import PROJECT
from modeling_cllm4rec import TokenizerWithUserItemIDTokens
from modeling_cllm4rec.tokenization_cllm4rec import train_byte_level_bpe

GB = 1e9
ITEM_ROWS = ("item_embeddings.weight", "content_item_embeddings.weight", "item_bias")

# Each is a whole process: it prints a line of JSON with what it measured.
LOAD = """
import json, resource, sys, time
import torch, transformers
from transformers import AutoModelForSequenceClassification
transformers.utils.logging.disable_progress_bar()
name, warm = sys.argv[1:3]
# Everything that an import brings is there before the memory is looked at.
AutoModelForSequenceClassification.from_pretrained(warm, trust_remote_code=True)
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True)
loaded = time.perf_counter() - started
for weight in model.parameters():  # a mapped file takes memory where it is read
    weight.detach().flatten()[::256].sum()
memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"seconds": loaded, "memory": memory, "weights": weights}))
"""
RECOMMEND = """
import json, resource, sys, time
started = time.perf_counter()
import transformers
from transformers import pipeline
transformers.utils.logging.disable_progress_bar()
imported = time.perf_counter() - started
rec = pipeline("recommendation", model=sys.argv[1], trust_remote_code=True)
opened = time.perf_counter() - started
rec({"history": [rec.records.item_ids[0], rec.records.item_ids[1]]})
first = time.perf_counter() - started
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"import": imported, "pipeline": opened - imported, "first": first - opened, "memory": memory}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="a run's folder that training/predict.py has completed, such as runs/sample"
    )
    parser.add_argument(
        "--items", type=int, default=1_000_000, help="items of the synthetic catalogue (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="push-and-load-") as folder:
        large = Path(folder) / "large"
        # In a process of its own, since a child counts what its parent once held.
        child = multiprocessing.get_context("spawn").Process(
            target=enlarge, args=(arguments.run, large, arguments.items)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(child.exitcode)
        with hub() as environment:
            for name, run in (("sample", arguments.run), ("large", large)):
                environment["HF_HOME"] = str(Path(folder) / f"home-{name}")
                measure(run, f"me/{name}", environment, arguments.run / "model")


def measure(run: Path, repo: str, environment: dict[str, str], warm: Path) -> None:
    """Push a run, push it again, open it from the repo and from the cache, and print what each took."""
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in (run / "model").rglob("*") if path.is_file())
    print(f"\n{repo}: {config['num_users']:,} users, {config['num_items']:,} items, {size / GB:.3f} GB")
    copied = copy_and_hash(run / "model")
    push = [str(PROJECT / "training" / "push.py"), str(run), repo]
    for what in ("push", "push again, nothing changed"):
        seconds, memory = process(push, environment)
        print(
            f"  {what:<28} {seconds:7.1f} s  {memory / GB:6.2f} GB  {seconds / copied:6.1f} x a copy with SHA-256 ({copied:.2f} s)"
        )
    read = read_whole(run / "model" / "model.safetensors")
    for what in ("load from the repo", "load from the cache"):
        found = script(LOAD, [repo, str(warm)], environment)
        print(
            f"  {what:<28} {found['seconds']:7.1f} s  {found['memory'] / GB:6.2f} GB  {found['memory'] / found['weights']:6.2f} x "
            f"the weights ({found['weights'] / GB:.2f} GB); {found['seconds'] / read:.0f} x reading their file ({read:.2f} s)"
        )
    found = script(RECOMMEND, [repo], environment)
    print(
        f"  {'pipeline from the cache':<28} {found['pipeline']:7.1f} s  {found['memory'] / GB:6.2f} GB in all; the first "
        f"recommendation {found['first']:.2f} s after that; importing torch and transformers before it {found['import']:.1f} s"
    )


def enlarge(run: Path, target: Path, num_items: int) -> None:
    """A copy of a run whose catalogue is filled up to `num_items` with items that nobody knows."""
    shutil.copytree(run / "model", target / "model")
    model = target / "model"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    added = num_items - config["num_items"]
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    for name, table in weights.items():
        if name.rpartition("model.")[2] in ITEM_ROWS:
            rows = 0.02 * torch.randn(added, *table.shape[1:], generator=generator)
            weights[name] = torch.cat([table, rows.to(table.dtype)])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    words = config["backbone_config"]["vocab_size"]
    (model / "config.json").write_text(json.dumps(config | {"num_items": num_items}), encoding="utf-8")
    tokenizer = TokenizerWithUserItemIDTokens.from_backbone(
        train_byte_level_bpe([], 257), num_users=config["num_users"], num_items=num_items, num_words=words
    )
    tokenizer.save_pretrained(model)
    with (model / "items.jsonl").open("a", encoding="utf-8") as file:
        for number in range(added):
            entry = {"id": f"made-up-{number}", "title": f"Made-up item {number}", "text": "", "popularity": 0}
            file.write(json.dumps(entry) + "\n")


@contextmanager
def hub() -> Iterator[dict[str, str]]:
    """The Hub of the test suite in a process of its own; gives the environment that leads there."""
    server = subprocess.Popen(
        [sys.executable, str(PROJECT / "tests" / "hub_server.py")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        said = dict(word.split("=", 1) for word in server.stdout.readline().split())
        quiet = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        yield {**os.environ, **said, **quiet}
    finally:
        server.terminate()
        server.wait()


def process(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and peak memory of a Python process."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = child.stdout.read() if child.stdout else b""
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(output.decode())
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def script(code: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a script in a process of its own prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def copy_and_hash(folder: Path) -> float:
    """Seconds that a copy of a folder and a SHA-256 of its files take: what no push can do without."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as target:
        shutil.copytree(folder, Path(target) / "copy")
        for path in (Path(target) / "copy").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    hashlib.file_digest(file, "sha256")
    return time.perf_counter() - started


def read_whole(path: Path) -> float:
    """Seconds that reading a file takes."""
    started = time.perf_counter()
    with path.open("rb") as file:
        while file.read(1 << 22):  # in blocks: a child counts what this process has held
            pass
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
