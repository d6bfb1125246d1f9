"""The Accelerate loop, written once: epochs of one or several objectives, validation, checkpoints, resume.

A step is a fixed set of documents, whoever works on it: losses divide by global counts, so the number of processes and of
accumulation steps changes nothing but the time.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from torch import nn
from tqdm.auto import tqdm

from configuration.errors import InputError
from configuration.recipe import Stage
from training.data.batches import Batch, on_device, plan_epoch
from training.files import write_text, written_whole
from training.stages.optimiser import (
    RowwiseAdamW,
    choose_sparse_tables,
    clip_gradients,
    looked_up_rows,
    reduce_rows,
    sparse_tables,
)
from training.stages.towers import ObjectiveName, Towers

logger = logging.getLogger(__name__)

FINAL_LR_SHARE = 0.05
ADAM_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Objective:
    """One corpus and the head that learns from it.

    Attributes:
        name: Which head.
        lengths: `(documents,)` tokens of each document.
        collate: Documents, epoch and step of the epoch to a batch.
        regularised: Documents to their distinct user and item indices; None: no mutual regularisation.
    """

    name: ObjectiveName
    lengths: np.ndarray
    collate: Callable[[np.ndarray, int, int], Batch]
    regularised: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None


@dataclass
class Progress:
    """How far a stage has come; kept as JSON beside each checkpoint.

    Attributes:
        planned: Epochs of the learning rate's schedule.
    """

    fingerprint: str
    planned: int = 0
    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_ndcg_at_100: float = -1.0
    seconds: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epochs_without_gain(self) -> int:
        """Epochs since the best one."""
        return self.epoch - self.best_epoch


def train(
    towers: Towers,
    objectives: Sequence[Objective],
    stage: Stage,
    accelerator: Accelerator,
    *,
    seed: int,
    folder: Path,
    fingerprint: str,
    validate: Callable[[], dict[str, float]] | None,
    resume: bool = False,
    stop_after: int | None = None,
    planned: int | None = None,
) -> Progress:
    """Train the objectives in alternating epochs.

    Args:
        towers: The heads over one base model; trained in place.
        objectives: Each epoch goes over all of them in this order.
        stage: Epochs, batch size, learning rates, precision.
        accelerator: Device, processes and precision.
        seed: Every random choice flows from it.
        folder: Gets `last/` (everything a resumed run needs), `best/` (the weights) and `progress.json`.
        fingerprint: Of data and recipe: a checkpoint of others is refused.
        validate: Gives `ndcg_at_100` of the validation split and whatever else is to be logged; None: there is no such split, and
            the last epoch counts as the best.
        resume: Continue after the last whole epoch in `folder`, to the same numbers as without the break.
        stop_after: Epochs that are trained of the stage's schedule; None: all, or until there is no gain any more.
        planned: Epochs of that schedule; None: as the stage says.

    Returns:
        The progress, with a record per epoch.

    Raises:
        InputError: if the checkpoint belongs to another data set or recipe, or the disk is full.
    """
    if stage.gradient_checkpointing:
        # Newer versions of transformers call it so, and warn of the older name.
        enable = (
            getattr(towers.base, "activation_checkpointing_enable", None) or towers.base.gradient_checkpointing_enable
        )
        enable()
    stage = replace(stage, epochs=planned or epochs_of(stage, objectives))
    choose_sparse_tables(towers, accelerator, sampled=towers.softmax == "sampled")
    optimizer = RowwiseAdamW(parameter_groups(towers, stage), betas=ADAM_BETAS)
    model, optimizer = accelerator.prepare(towers, optimizer)
    for table in sparse_tables(towers):
        broadcast(table.weight.data)  # DDP does so with what it reduces
    towers.tie_heads()
    peaks = [group["lr"] for group in optimizer.param_groups]
    plan_length = sum(math.ceil(len(objective.lengths) / stage.batch_size) for objective in objectives)
    progress = Progress(fingerprint)
    if resume and (folder / "last" / "progress.json").is_file():
        progress = load_checkpoint(accelerator, folder, fingerprint)
    progress.planned = stage.epochs
    last = stage.epochs if stop_after is None else min(stop_after, stage.epochs)
    while progress.epoch < last and not (0 < stage.patience <= progress.epochs_without_gain):
        started = time.perf_counter()
        record: dict[str, Any] = {"epoch": progress.epoch + 1}
        model.train()
        for number, objective in enumerate(objectives):
            set_seed((seed * 1_000_003 + progress.epoch * 101 + number * 11 + accelerator.process_index) % 2**32)
            steps = plan_epoch(objective.lengths, stage.batch_size, seed + number, progress.epoch)
            bar = tqdm(
                steps,
                desc=f"epoch {progress.epoch + 1}/{stage.epochs} {objective.name}",
                unit="step",
                leave=False,
                disable=not accelerator.is_local_main_process,
            )
            losses = []
            for done, documents in enumerate(bar, 1):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * lr_share(progress.step, plan_length, stage)
                losses.append(
                    train_step(
                        model, objective, documents, progress.epoch, optimizer, stage, accelerator, towers, step=done
                    )
                )
                progress.step += 1
                if done % 10 == 0:
                    rate = done * stage.batch_size / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix(loss=f"{losses[-1].item():.3f}", docs=f"{rate:.0f}/s", refresh=False)
            record[f"{objective.name}_loss"] = float(torch.stack(losses).mean()) if losses else math.nan
        trained = time.perf_counter() - started
        if validate is not None:
            model.eval()
            with whole_weights(towers, accelerator):
                record |= validate()
        progress.epoch += 1
        record["lr"] = optimizer.param_groups[0]["lr"]
        record["documents_per_second"] = sum(len(objective.lengths) for objective in objectives) / max(trained, 1e-9)
        record["seconds"] = time.perf_counter() - started
        progress.seconds += record["seconds"]
        better = validate is None or record["ndcg_at_100"] > progress.best_ndcg_at_100
        if better:
            progress.best_epoch = progress.epoch
            progress.best_ndcg_at_100 = record.get("ndcg_at_100", progress.best_ndcg_at_100)
        progress.epochs.append(record)
        save_checkpoint(accelerator, towers, folder, progress, better)
        accelerator.log({key: value for key, value in record.items() if key != "epoch"}, step=progress.epoch)
        if accelerator.is_main_process:
            logger.info(epoch_line(record, stage.epochs, better))
    return progress


def train_step(
    model: nn.Module,
    objective: Objective,
    documents: np.ndarray,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    accelerator: Accelerator,
    towers: Towers,
    *,
    step: int = 0,
) -> torch.Tensor:
    """One optimiser step over `documents`, split among processes and accumulation steps; the global loss, detached."""
    processes, parts = accelerator.num_processes, stage.gradient_accumulation_steps
    shards = [documents[accelerator.process_index :: processes][part::parts] for part in range(parts)]
    # Every process takes part in every forward and backward pass, even where the step is too small for all of them.
    batches = [objective.collate(shard if len(shard) else documents[:1], epoch, step) for shard in shards]
    weights = [float(len(shard) > 0) for shard in shards]
    labels = sum(weight * label_weight(batch) for weight, batch in zip(weights, batches, strict=True))
    total = accelerator.reduce(torch.tensor(float(labels), device=accelerator.device), "sum").clamp(min=1)
    ids = None
    if objective.regularised is not None:
        ids = tuple(
            torch.from_numpy(index[accelerator.process_index :: processes].astype(np.int64))
            for index in objective.regularised(documents)
        )
    report = torch.zeros((), device=accelerator.device)
    with looked_up_rows(towers, accelerator) as add_rows:
        for part, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            final = part == parts - 1
            pulled = tuple(index.to(accelerator.device) for index in ids) if final and ids is not None else None
            with contextlib.nullcontext() if final else accelerator.no_sync(model):
                losses = model(objective.name, on_device(batch, accelerator.device), pulled)
                share = towers.distillation if "distilled" in losses else 0.0
                loss = weight * (1 - share) * losses["likelihood"] / total
                if "distilled" in losses:
                    loss = loss + weight * share * losses["distilled"] / len(documents)
                if "regularisation" in losses:
                    loss = loss + losses["regularisation"] / len(documents)
            # Gradients are averaged over processes; the sum is wanted.
            accelerator.backward(loss * processes)
            add_rows()
            report += loss.detach()
    reduce_rows(towers, accelerator)
    if stage.max_grad_norm > 0:
        clip_gradients(accelerator, [p for p in model.parameters() if p.requires_grad], stage.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return accelerator.reduce(report, "sum")


def label_weight(batch: Batch) -> float:
    """Total weight of a batch's labels, as the causal shift leaves them."""
    if "target_weights" in batch:
        return float(batch["target_weights"].sum())
    return float((batch["labels"][:, 1:] != -100).sum())


def parameter_groups(towers: Towers, stage: Stage) -> list[dict[str, Any]]:
    """ID tables and biases at `lr`; the backbone at `backbone_lr`, its matrices with weight decay."""
    in_backbone = {id(p) for p in towers.base.backbone.parameters()}
    if towers.base.word_head is not None:
        in_backbone.add(id(towers.base.word_head))
    learning = [p for p in towers.parameters() if p.requires_grad]
    backbone_lr = stage.lr if stage.backbone_lr is None else stage.backbone_lr
    ours = [p for p in learning if id(p) not in in_backbone]
    matrices = [p for p in learning if id(p) in in_backbone and p.ndim > 1]
    vectors = [p for p in learning if id(p) in in_backbone and p.ndim <= 1]
    groups = [
        {"params": ours, "lr": stage.lr, "weight_decay": 0.0},
        {"params": matrices, "lr": backbone_lr, "weight_decay": stage.weight_decay},
        {"params": vectors, "lr": backbone_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def epochs_of(stage: Stage, objectives: Sequence[Objective]) -> int:
    """Epochs of a stage: as many as it says, or fewer where they would read more than `max_documents` of its largest corpus."""
    documents = max((len(objective.lengths) for objective in objectives), default=0)
    if not stage.max_documents or not documents:
        return stage.epochs
    return min(stage.epochs, max(stage.max_documents // documents, 1))


def lr_share(step: int, steps_per_epoch: int, stage: Stage) -> float:
    """Learning rate of a step as a share of its peak: linear warm-up, then cosine to 5 % or constant."""
    warmup, total = stage.warmup_epochs * steps_per_epoch, stage.epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if stage.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def save_checkpoint(accelerator: Accelerator, towers: Towers, folder: Path, progress: Progress, better: bool) -> None:
    """Write `best/` after the best epoch so far, then `last/` and `progress.json`: each whole or not at all.

    In this order a run that breaks in between resumes before the epoch and finds it best again.
    """
    if better:
        save_weights(accelerator, towers, folder / "best")
    # Each process writes its own part of the state into the folder that the main one swaps in.
    with written_whole(folder / "last") if accelerator.is_main_process else contextlib.nullcontext() as target:
        shared = [str(target)]
        broadcast_object_list(shared)
        accelerator.save_state(shared[0])
        if accelerator.is_main_process:
            write_text(Path(shared[0]) / "progress.json", json.dumps(asdict(progress), indent=2))
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(folder / "progress.json", json.dumps(asdict(progress), indent=2))
    accelerator.wait_for_everyone()


def save_weights(accelerator: Accelerator, towers: Towers, folder: Path) -> None:
    """Write the weights that the Auto classes read, whole or not at all; called by every process, since FSDP2 gathers them."""
    state = accelerator.get_state_dict(towers) if accelerator.is_fsdp2 else None
    if accelerator.is_main_process:
        with written_whole(folder) as target:
            towers.save_model(target, state)


@contextlib.contextmanager
def whole_weights(towers: Towers, accelerator: Accelerator) -> Iterator[None]:
    """Under FSDP2, hold all weights on each device for the block's time; otherwise they are there anyway.

    Validation calls the recommendation head past the wrapped module, as often as this process has users for: gathered anew at
    each call, the weights would wait for a process that has none left.
    """
    if not accelerator.is_fsdp2:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    reshard = accelerator.state.fsdp_plugin.reshard_after_forward
    shards = [module for module in towers.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    towers.tie_heads()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(reshard and module is not towers, recurse=False)
        towers.tie_heads()


def load_checkpoint(accelerator: Accelerator, folder: Path, fingerprint: str) -> Progress:
    """Continue from `last/`.

    Raises:
        InputError: if it was written for another data set, backbone or method, or by processes that share the weights otherwise.
    """
    path = folder / "last" / "progress.json"
    progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
    if progress.fingerprint != fingerprint:
        raise InputError(
            f"{path.parent}: this checkpoint belongs to another data set, backbone or recipe; use the recipe it was made with, "
            "or start anew with --overwrite"
        )
    # FSDP2 keeps the shards of its processes in a format of their own.
    in_shards = not (path.parent / "model.safetensors").is_file()
    if in_shards != accelerator.is_fsdp2:
        ways = ("without FSDP2", "under FSDP2")
        raise InputError(
            f"{path.parent}: this checkpoint was written {ways[in_shards]} and cannot be resumed {ways[accelerator.is_fsdp2]}; launch as "
            "before (configuration/accelerate/), or start anew with --overwrite"
        )
    accelerator.load_state(str(path.parent))
    logger.info("resumed after epoch %d from %s", progress.epoch, path.parent)
    return progress


def epoch_line(record: dict[str, Any], epochs: int, better: bool) -> str:
    """The log line of an epoch."""
    losses = "  ".join(
        f"{key.removesuffix('_loss')} {value:.4f}" for key, value in record.items() if key.endswith("_loss")
    )
    found = record.get("ndcg_at_100")
    on_validation = "" if found is None else f"  validation NDCG@100 {found:.4f}{' *' if better else ''}"
    return (
        f"epoch {record['epoch']}/{epochs}  loss: {losses}{on_validation}  {record['documents_per_second']:.0f} documents/s  "
        f"{record['seconds']:.1f} s"
    )
