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
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError
from scipy.sparse import csr_matrix
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from configuration.errors import InputError
from configuration.load import fingerprint
from configuration.recipe import Backbone, Recipe, Stage
from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.data.batches import Layout, evaluation_batch
from training.data.corpora import Corpora, build_corpora, load_from_backbone
from training.data.interactions import VALIDATION, Interactions
from training.data.ragged import Ragged
from training.evaluation.ranking import evaluate_scores
from training.files import unwritable, write_text
from training.stages.loop import Progress
from training.stages.teacher import Teacher, fit_teacher

logger = logging.getLogger(__name__)

DEFAULT_SEED = Recipe().seed
SPECIAL_WORDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PRETRAINING_FIELDS = tuple(
    f"method.{name}"
    for name in (
        "content_tower",
        "lambda_v",
        "max_history",
        "max_text_tokens",
        "history_order",
        "item_bias",
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
        """`output_dir/name`, with the seed behind it where it is not the default one."""
        seed = "" if recipe.seed == DEFAULT_SEED else f"-seed{recipe.seed}"
        return cls(recipe, Path(recipe.output_dir) / f"{recipe.name}{seed}")

    @property
    def corpora(self) -> Path:
        """Folder of the corpora."""
        return self.folder / "corpora"

    @property
    def model(self) -> Path:
        """The folder that the Auto classes open."""
        return self.folder / "model"

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
        """Remove what earlier runs of these stages left."""
        for stage in stages:
            shutil.rmtree(self.checkpoints(stage), ignore_errors=True)

    def teacher(self, corpora: Corpora) -> Teacher:
        """The teacher of the recipe, fitted on the training split and chosen on validation; kept in `checkpoints/teacher`."""
        train, validation = split_matrix(corpora, "recommendation"), split_matrix(corpora, "validation")
        words, kind = corpora.tokenizer.num_words, self.recipe.method.teacher
        cache = self.checkpoints("teacher")
        return fit_teacher(train, validation, corpora.texts("content"), words, kind, self.recipe.seed, cache)

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
        accelerator.end_training()
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
    device = check_device(recipe.device)
    # Said to Accelerate whenever it comes to that: its launcher does not pass it on to several processes on a CPU.
    on_cpu = (
        device.type == "cpu"
        if device is not None
        else not (torch.cuda.is_available() or torch.backends.mps.is_available())
    )
    # A notebook runs one stage after the other; Accelerate would keep the precision of the first one for good.
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if stage is None else stage.mixed_precision,
            log_with=recipe.tracker if stage is not None and recipe.tracker != "none" else None,
            project_dir=str(folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, ImportError) as error:
        precision = "no" if stage is None else stage.mixed_precision
        raise InputError(
            f"device {recipe.device!r}, tracker {recipe.tracker!r}, mixed_precision {precision!r}: {str(error).splitlines()[0]}"
        ) from error


def check_device(name: str) -> torch.device | None:
    """The named device; None for `auto`.

    Raises:
        InputError: naming the devices that are there.
    """
    if name == "auto":
        return None
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is no device; here there are auto, {', '.join(there)}") from error
    if device.type not in {other.split(":")[0] for other in there} or (device.index is not None and name not in there):
        raise InputError(f"device: {name!r} is not on this machine; here there are auto, {', '.join(there)}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def prepare_corpora(run: Run, interactions: Interactions) -> Corpora:
    """Build the corpora, or open them where they are up to date.

    Raises:
        InputError: if nothing is held out for validation, the backbone's tokenizer will not do, or the disk is full.
    """
    if not (interactions.splits == VALIDATION).any():
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
    return fingerprint(recipe, ("backbone", *method, stage, "seed")) + corpora_fingerprint


def layout_of(corpora: Corpora) -> Layout:
    """Where words, users and items stand among the ids."""
    return Layout(
        corpora.tokenizer.num_words,
        corpora.num_users,
        corpora.num_items,
        {k: list(v) for k, v in corpora.info["prompt_ids"].items()},
    )


def make_model(recipe: Recipe, corpora: Corpora) -> CLLM4RecForRecommendation:
    """The recommender around the recipe's backbone, its ID tables at random.

    Raises:
        InputError: if the backbone cannot be loaded or made.
    """
    backbone, method = recipe.backbone, recipe.method
    set_seed(recipe.seed)
    has_text = len(corpora.texts("content")) > 0
    fields: dict[str, Any] = {
        "num_users": corpora.num_users,
        "num_items": corpora.num_items,
        "content_tower": method.content_tower and has_text,
        "freeze_backbone": backbone.train != "full",
        "readout": method.readout,
        "item_bias": method.item_bias,
        "mask_prompt_items": method.mask_prompt_items,
        "max_history": method.max_history,
        "prompt_ids": corpora.info["prompt_ids"],
        "initializer_range": method.initialisation_std,
    }
    loading: dict[str, Any] = {
        "attn_implementation": backbone.attn_implementation,
        "dtype": getattr(torch, backbone.dtype),
    }
    end = corpora.tokenizer.eos_token_id
    try:
        if backbone.name is not None:
            return CLLM4RecForRecommendation.from_backbone(
                backbone.name, backbone_layers=backbone.layers, gguf_file=backbone.gguf_file, **loading, **fields
            )
        words = {"vocab_size": corpora.tokenizer.num_words} | dict.fromkeys(SPECIAL_WORDS, end)
        config = CLLM4RecConfig(backbone_config=backbone_config(backbone, **words), **fields)
        return CLLM4RecForRecommendation._from_config(config, **loading)
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        where = "backbone.config" if backbone.name is None else f"backbone.name {backbone.name!r}"
        raise InputError(f"{where}: no such backbone can be had here: {str(error).splitlines()[0]}") from error


def check_backbone(recipe: Recipe) -> None:
    """Refuse a backbone that is not there or cannot be made, before anything is read or written.

    Raises:
        InputError: naming the field.
    """
    if recipe.backbone.name is None:
        backbone_config(recipe.backbone)
    else:
        load_from_backbone(AutoConfig, recipe)


def backbone_config(backbone: Backbone, **of_words: Any) -> PreTrainedConfig:
    """The configuration of a backbone that is made on the spot.

    Args:
        backbone: Its section of the recipe.
        of_words: The fields that follow from the tokenizer; they win over the recipe's.

    Raises:
        InputError: if transformers knows no such decoder, or cannot make it.
    """
    fields = backbone.config | of_words
    kind = str(fields.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        nearest = get_close_matches(kind, CONFIG_MAPPING, n=1) or ["gpt2"]
        raise InputError(f"backbone.config: there is no model_type {kind!r}; the nearest is {nearest[0]!r}")
    try:
        config = AutoConfig.for_model(kind, **fields)
        if backbone.layers is not None:
            config.num_hidden_layers = backbone.layers
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a wrong number makes transformers fail in whatever way
        reason = shorten(str(error), 200)
        raise InputError(f"backbone.config: no decoder {kind!r} can be made from it ({reason}); correct it") from error
    return config


def learn_backbone(recipe: Recipe, model: CLLM4RecForRecommendation) -> None:
    """Set which of the backbone's weights learn: none, all, or low-rank updates (`backbone.train`)."""
    if recipe.backbone.train != "lora":
        return
    from peft import LoraConfig, get_peft_model

    rank, backbone = recipe.backbone.lora_rank, model.model.backbone
    transposed = any(isinstance(module, Conv1D) for module in backbone.modules())  # GPT-2's linear layers
    linear = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    model.model.backbone = get_peft_model(backbone, linear)


class ModelScores:
    """Scores of the recommendation head for users given by their row in the training histories; called by the rankings.

    The prompt holds training items only, at validation and at test time.
    """

    def __init__(
        self, model: PreTrainedModel, users: np.ndarray, histories: Ragged, layout: Layout, max_history: int
    ) -> None:
        self.model, self.layout, self.max_history = model, layout, max_history
        self.lengths = np.zeros(layout.num_users, np.int64)
        self.lengths[users] = histories.lengths
        # A row for each user, empty for those without training items.
        self.histories = Ragged(histories.values, np.concatenate([[0], np.cumsum(self.lengths)]))

    def by_length(self, users: np.ndarray) -> np.ndarray:
        """The users in order of their history's length, so that a batch of prompts holds little padding."""
        return users[np.argsort(self.lengths[users], kind="stable")]

    @torch.no_grad()
    def __call__(self, users: np.ndarray) -> np.ndarray:
        """Logits `(users, num_items)`, float32."""
        self.model.eval()
        batch = evaluation_batch(users, self.histories.take(users), self.layout, self.max_history)
        device = self.model.get_output_embeddings().weight.device
        logits = self.model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        return logits.float().cpu().numpy()


def split_matrix(corpora: Corpora, name: str) -> csr_matrix:
    """A split's pairs as ones, `(num_users, num_items)` float32."""
    users, items = corpora.histories(name)
    pairs = (np.repeat(users, items.lengths), items.values)
    return csr_matrix((np.ones(len(items.values), np.float32), pairs), shape=(corpora.num_users, corpora.num_items))


class Validation:
    """NDCG@100 and recall on the validation split, over a seeded sample of users, shared among the processes."""

    def __init__(
        self, model: CLLM4RecForRecommendation, corpora: Corpora, recipe: Recipe, accelerator: Accelerator
    ) -> None:
        self.train, self.held_out = split_matrix(corpora, "recommendation"), split_matrix(corpora, "validation")
        users = np.flatnonzero(np.diff(self.held_out.indptr))
        if len(users) > recipe.evaluation.selection_users:
            chosen = np.random.default_rng(recipe.seed).choice(users, recipe.evaluation.selection_users, replace=False)
            users = np.sort(chosen)
        self.scores = ModelScores(
            model, *corpora.histories("recommendation"), layout_of(corpora), recipe.method.max_history
        )
        self.users = self.scores.by_length(users[accelerator.process_index :: accelerator.num_processes])
        self.batch_size, self.accelerator = recipe.evaluation.batch_size, accelerator

    def __call__(self) -> dict[str, float]:
        """`ndcg_at_100`, `recall_at_20` and `recall_at_40`, means over the users."""
        measured = evaluate_scores(self.scores, self.users, self.train, self.held_out, batch_size=self.batch_size)
        per_user = vars(measured)
        if self.accelerator.num_processes > 1:
            parts = gather_object([per_user])
            per_user = {name: np.concatenate([part[name] for part in parts]) for name in per_user}
        return {name: float(values.mean()) for name, values in per_user.items()}


def peak_memory_bytes() -> int:
    """Most resident memory this process has held; on a GPU, most that torch has allocated there in addition."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
