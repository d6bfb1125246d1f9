"""A run's folder and everything the stages share: corpora, model, accelerator, log, validation.

`runs/<recipe>/` holds `corpora/`, `checkpoints/<stage>/`, `model/`, `pictures/`, `results.json`, `recipe.yaml`, `log` and
`tensorboard/`.
"""

import json
import logging
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from configuration.errors import InputError
from configuration.load import fingerprint
from configuration.recipe import Recipe, Stage
from training.data.corpora import Corpora, build_corpora, open_corpora
from training.data.interactions import VALIDATION, Interactions
from training.device import check_device, computes_in_bf16, keep_few_kernels
from training.evaluation.scoring import split_matrix
from training.files import unwritable, write_text
from training.stages.loop import Progress
from training.stages.teacher import Teacher, fit_teacher
from training.stages.text_states import TextStates, read_text_states

logger = logging.getLogger(__name__)

DEFAULT_SEED = Recipe().seed
PRETRAINING_FIELDS = tuple(
    f"method.{name}"
    for name in (
        "content_tower",
        "lambda_v",
        "max_history",
        "max_text_tokens",
        "history_order",
        "item_bias",
        "softmax",
        "num_negatives",
        "initialisation",
        "initialisation_std",
        "teacher",
    )
)


@dataclass(frozen=True)
class Run:
    """One run of a recipe: its folder and the paths in it."""

    recipe: Recipe
    folder: Path

    @classmethod
    def of(cls, recipe: Recipe) -> "Run":
        """`output_dir/name`, with the seed behind it where it is not the default one, and `-refit` behind that of a refit."""
        seed = "" if recipe.seed == DEFAULT_SEED else f"-seed{recipe.seed}"
        return cls(recipe, Path(recipe.output_dir) / f"{recipe.name}{seed}{'-refit' if recipe.refit else ''}")

    def chosen(self) -> "Run | None":
        """Of a refit the finished run whose choices it follows, the same recipe with a validation split; of another run None.

        Raises:
            InputError: if that run is not there, not finished, or of other data or another recipe.
        """
        if not self.recipe.refit:
            return None
        run = Run.of(replace(self.recipe, refit=False))
        if not ((run.folder / "results.json").is_file() and run.choices.is_file()):
            raise InputError(
                f"refit: it follows what {run.folder} chose on validation, but no finished run is there; run training/pretrain.py, "
                "finetune.py and predict.py of the same recipe first, with refit=false (--overwrite if an earlier version ran them)"
            )
        for stage in ("pretrain", "finetune"):
            run.check_checkpoint(stage, open_corpora(run.corpora).fingerprint_with(run.recipe))
        return run

    def check_source(self, source: dict[str, str]) -> None:
        """Refuse to refit on other data than this run chose on.

        Args:
            source: SHA-256 of each file that was read.

        Raises:
            InputError: naming the files that differ.
        """
        theirs = open_corpora(self.corpora).info["source"]
        differ = sorted(name for name in source if source[name] != theirs.get(name))
        if differ:
            raise InputError(
                f"refit: {', '.join(differ)} changed since {self.folder} chose on it; run training/pretrain.py, finetune.py and predict.py "
                "with refit=false and --overwrite first"
            )

    def check_start(self, init_from: str | Path | None, *, resume: bool = False) -> None:
        """Refuse a refit that does not start where the run that it follows did, and to go on from elsewhere than it started.

        Raises:
            InputError: saying with which `--init-from` it has to be run.
        """
        begun = self.started_from
        if resume and init_from is None and begun is not None:
            raise InputError(
                f"{self.folder} started from {begun}; go on as it was begun, with training/pretrain.py or training/finetune.py and "
                f"--init-from {begun}, or start anew with --overwrite"
            )
        elsewhere = begun is None or (Path(begun).exists() and Path(begun).resolve() != Path(init_from or "").resolve())
        if resume and init_from is not None and self.is_begun("pretrain") and elsewhere:
            raise InputError(
                f"{self.folder} did not start from {init_from}; go on without it{f', with --init-from {begun}' if begun else ''}, or "
                "start anew with --overwrite"
            )
        chosen = self.chosen()
        theirs = None if chosen is None else chosen.started_from
        given, wanted = (path if path is None else Path(path) for path in (init_from, theirs))
        same = (given is None) == (wanted is None)
        if given is not None and wanted is not None and wanted.exists():  # it may have been moved since
            same = given.resolve() == wanted.resolve()
        if chosen is not None and not same:
            remedy = "leave --init-from out" if theirs is None else f"give --init-from {theirs}"
            raise InputError(f"refit: it starts as {chosen.folder} did, which it follows; {remedy}")

    @property
    def corpora(self) -> Path:
        """Folder of the corpora."""
        return self.folder / "corpora"

    @property
    def model(self) -> Path:
        """The folder that the Auto classes open."""
        return self.folder / "model"

    @property
    def start(self) -> Path:
        """The file that names the run that this one started from, where there is one (`--init-from`)."""
        return self.checkpoints("pretrain") / "start.json"

    @property
    def started_from(self) -> str | None:
        """The folder of the run that this one started from, as it was given; None where it was pretrained afresh."""
        return json.loads(self.start.read_text("utf-8"))["init_from"] if self.start.is_file() else None

    @property
    def choices(self) -> Path:
        """The file that says what validation chose when fine-tuning had ended."""
        return self.checkpoints("finetune") / "choices.json"

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / stage

    def check_free(self, stage: str, *, resume: bool, overwrite: bool) -> None:
        """Refuse to run a stage again unless told how.

        Raises:
            InputError: if it was run before and neither `resume` nor `overwrite` is given, or both are.
        """
        taken = self.checkpoints(stage)
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other: one continues a run, the other replaces it")
        if taken.is_dir() and any(taken.iterdir()) and not resume and not overwrite:
            raise InputError(
                f"{taken} exists already; continue it with --resume, replace it with --overwrite, or choose another name=…"
            )

    def clear(self, *stages: str) -> None:
        """Remove what earlier runs of these stages left, and the figures of the model that goes with them."""
        for stage in stages:
            shutil.rmtree(self.checkpoints(stage), ignore_errors=True)
        if "finetune" in stages:
            (self.folder / "results.json").unlink(missing_ok=True)

    def teacher(self, corpora: Corpora, like: Path | None = None) -> Teacher:
        """The teacher of the recipe, fitted on the training split and chosen on validation; kept in `checkpoints/teacher`.

        Args:
            corpora: Of the run.
            like: Folder of another run whose teacher's settings are taken, so that none are searched for; of a refit it is the run
                that it follows.
        """
        chosen = self.chosen()
        if chosen is not None and not (chosen.checkpoints("teacher") / "blend.json").is_file():
            raise InputError(
                f"refit: {chosen.checkpoints('teacher')} is gone, whose settings it takes; run {chosen.folder} again"
            )
        like = chosen.folder if chosen is not None else like
        train, validation = split_matrix(corpora, "recommendation"), split_matrix(corpora, "validation")
        recipe, cache = self.recipe, self.checkpoints("teacher")
        like = None if like is None else like / "checkpoints" / "teacher"
        return fit_teacher(train, validation, corpora, recipe.method.teacher, recipe.seed, cache, like)

    def text_states(self, corpora: Corpora, device: torch.device) -> TextStates | None:
        """What the recipe's text encoder makes of the training texts, kept in `checkpoints`; None where there is no encoder or no text."""
        cache = self.checkpoints("text_states") / "states.safetensors"
        return read_text_states(corpora, self.recipe.text_encoder, cache, device)

    def check_checkpoint(self, stage: str, corpora_fingerprint: str) -> None:
        """Refuse a stage's checkpoint of another data set, backbone or method.

        Raises:
            InputError: if data or recipe differ from those that the stage was run with, other than in later stages.
        """
        path = self.checkpoints(stage) / "progress.json"
        mark = stage_fingerprint(self.recipe, corpora_fingerprint, stage)
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != mark:
            raise InputError(
                f"{path.parent}: this checkpoint belongs to another data set, backbone or recipe; give the data, recipe and overrides "
                f"that training/{stage}.py was run with, or run it again with --overwrite"
            )

    def is_begun(self, stage: str) -> bool:
        """Whether an epoch of the stage was finished, or all of its none."""
        return (self.checkpoints(stage) / "progress.json").is_file()

    def note_stage(self, stage: str, progress: Progress, seconds: float) -> None:
        """Keep how far a finished stage has come and what it cost beside its checkpoints."""
        path = self.checkpoints(stage) / "stage.json"
        earlier = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else 0.0
        cost = {"seconds": earlier + seconds, "peak_memory_bytes": peak_memory_bytes()}
        # Without an epoch the loop has written none, and the next stage looks at its fingerprint.
        write_text(self.checkpoints(stage) / "progress.json", json.dumps(asdict(progress), indent=2))
        write_text(path, json.dumps(cost, indent=2))

    def best_epoch(self, stage: str) -> int:
        """The epoch of a stage with the best validation NDCG@100; 0 where it has none."""
        path = self.checkpoints(stage) / "progress.json"
        return int(json.loads(path.read_text(encoding="utf-8"))["best_epoch"]) if path.is_file() else 0

    def planned(self, stage: str) -> int | None:
        """Epochs of a stage's schedule, fewer than the recipe's where that many would read too much; None where an earlier version ran it."""
        path = self.checkpoints(stage) / "progress.json"
        return json.loads(path.read_text(encoding="utf-8")).get("planned") or None

    def epochs(self, stage: str) -> list[dict[str, Any]]:
        """The record of each epoch of a stage."""
        path = self.checkpoints(stage) / "progress.json"
        return json.loads(path.read_text(encoding="utf-8"))["epochs"] if path.is_file() else []

    def stage_costs(self) -> dict[str, dict[str, float]]:
        """What each stage that was run cost."""
        paths = (self.checkpoints(stage) / "stage.json" for stage in ("pretrain", "finetune"))
        return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()}


@contextmanager
def logged(run: Run, accelerator: Accelerator, *, tracker: bool = True) -> Iterator[None]:
    """Log lines of the main process go to the run's `log` and to the console, figures to the tracker, for the block's time.

    Where the block finds the input wrong before anything was trained, the folders that it made are removed again.
    """
    root, level = logging.getLogger("training"), logging.getLogger("training").level
    made = [folder for folder in (run.folder, *run.folder.parents) if not folder.exists()]
    handlers: list[logging.Handler] = []
    if accelerator.is_main_process:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            handlers = [logging.FileHandler(run.folder / "log", encoding="utf-8"), logging.StreamHandler(sys.stdout)]
        except OSError as error:
            raise unwritable(run.folder, error) from error
        handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        root.setLevel(logging.INFO)
        for handler in handlers:
            root.addHandler(handler)
    try:
        if tracker and run.recipe.tracker != "none":
            accelerator.init_trackers("tensorboard")
        yield
    except InputError:
        if made and not (run.folder / "checkpoints").exists():
            shutil.rmtree(run.folder, ignore_errors=True)
            with suppress(OSError):
                for folder in made[1:]:
                    folder.rmdir()
        raise
    finally:
        # Not end_training: it takes the processes' connection down, and a second one is not reliably made (--init-from needs it).
        for kept in accelerator.trackers:
            kept.finish()
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
        if handlers:
            handlers[0].close()


def make_accelerator(recipe: Recipe, stage: Stage | None, folder: Path) -> Accelerator:
    """Device, processes, precision and tracker as the recipe and the launcher say.

    Raises:
        InputError: if the device is unknown or not there, or the tracker or the precision is not to be had.
    """
    keep_few_kernels()
    device = check_device(recipe.device)
    # Said to Accelerate whenever it comes to that: its launcher does not pass it on to several processes on a CPU.
    on_cpu = (
        device.type == "cpu"
        if device is not None
        else parse_flag_from_env("ACCELERATE_USE_CPU")  # cpu.yaml
        or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    )
    precision = "no" if stage is None else stage.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_in_bf16("cpu" if on_cpu else "cuda") else "no"
    # One process runs one stage after the other (a notebook, --init-from); Accelerate would keep the precision of the first one for good.
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            log_with=recipe.tracker if stage is not None and recipe.tracker != "none" else None,
            project_dir=str(folder),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                # The others wait while one process reads the data and fits the teacher; torch's patience is minutes.
                InitProcessGroupKwargs(timeout=timedelta(days=1)),
            ],
        )
    except (ValueError, ImportError) as error:
        raise InputError(
            f"device {recipe.device!r}, tracker {recipe.tracker!r}, mixed_precision {precision!r}: {str(error).splitlines()[0]}"
        ) from error


def prepare_corpora(run: Run, interactions: Interactions) -> Corpora:
    """Build the corpora, or open them where they are up to date.

    Raises:
        InputError: if nothing is held out for validation, the backbone's tokenizer will not do, or the disk is full.
    """
    if not run.recipe.refit and not (interactions.splits == VALIDATION).any():
        raise InputError(
            "data.split: no user has an item for validation, which chooses the best epoch; users need at least 3 interactions, "
            "a given split some rows with 'validation'"
        )
    corpora = build_corpora(interactions, run.recipe, run.corpora)
    for counts in (corpora.info["counts"], corpora.info["filtered"]):
        shown = [f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items() if value]
        if shown:
            logger.info("data: %s", ", ".join(shown))
    return corpora


def stage_fingerprint(recipe: Recipe, corpora_fingerprint: str, stage: str) -> str:
    """What a checkpoint of a stage depends on: a method field that only fine-tuning reads does not undo pretraining."""
    method = PRETRAINING_FIELDS if stage == "pretrain" else ("method",)
    texts = () if stage == "pretrain" else ("text_encoder",)
    return fingerprint(recipe, ("backbone", *method, *texts, stage, "seed")) + corpora_fingerprint


def peak_memory_bytes() -> int:
    """Most resident memory this process has held; on a GPU, most that torch has allocated there in addition."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
