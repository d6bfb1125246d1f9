"""Stage three: the recommendation head learns to rank all items, the content tower regularising.

accelerate launch training/finetune.py --config sample
accelerate launch training/finetune.py --config newer.yaml --init-from runs/older finetune.epochs=4
"""

import json
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import Accelerator

from configuration.errors import InputError
from configuration.recipe import Recipe
from modeling_cllm4rec import CLLM4RecForRecommendation
from training.command_line import make_parser, run_script
from training.data.batches import layout_of
from training.data.corpora import Corpora, open_corpora
from training.evaluation.scoring import Validation
from training.files import write_text
from training.hub.folder import write_model_folder
from training.pretrain import pretrain
from training.run import Run, logged, make_accelerator, stage_fingerprint
from training.stages.loop import train
from training.stages.model import learn_backbone, prompt_fields, set_attention_dropout
from training.stages.recommendation import recommendation_objective
from training.stages.teacher import Teacher
from training.stages.text_map import CHOSEN, fit_text_map
from training.stages.towers import Towers
from training.stages.user_offsets import fit_user_offsets

logger = logging.getLogger("training.finetune")


def finetune(
    recipe: Recipe,
    *,
    frame: pd.DataFrame | None = None,
    resume: bool = False,
    overwrite: bool = False,
    init_from: str | Path | None = None,
) -> Run:
    """Train the recommendation head on top of the pretrained embeddings and write `model/`.

    Args:
        recipe: The recipe that `pretrain` was run with; `finetune.*` fields may differ.
        frame: With `init_from`: interactions of a notebook, instead of `recipe.data.path`.
        resume: Continue an interrupted run.
        overwrite: Replace an earlier fine-tuning of this recipe, or with `init_from` an earlier run.
        init_from: Folder of another run that this one starts from, instead of being pretrained: for interactions that came since.

    Returns:
        The run; `model/` holds the epoch with the best validation NDCG@100, and what the Auto classes need.

    Raises:
        InputError: if there is no pretrained model, it belongs to another recipe, or the stage was run already.
    """
    run = Run.of(recipe)
    chosen = run.chosen()
    run.check_free("finetune", resume=resume, overwrite=overwrite)
    start = run.checkpoints("pretrain") / "final"
    if init_from is not None and resume:
        run.check_start(init_from, resume=True)
    if init_from is not None and not (resume and (start / "config.json").is_file()):
        pretrain(
            recipe, frame=frame, resume=resume, overwrite=overwrite, init_from=init_from, train_language_models=False
        )
    if not (start / "config.json").is_file():
        raise InputError(f"{start}: no pretrained model is there; run training/pretrain.py with the same recipe first")
    corpora = open_corpora(run.corpora)
    mark = corpora.fingerprint_with(recipe)
    run.check_checkpoint("pretrain", mark)
    if resume:
        run.check_checkpoint("finetune", mark)
    accelerator = make_accelerator(recipe, recipe.finetune, run.folder)
    if overwrite and accelerator.is_main_process:
        run.clear("finetune")
    with logged(run, accelerator):
        started = time.perf_counter()
        attention = recipe.backbone.attn_implementation
        model = CLLM4RecForRecommendation.from_pretrained(start, attn_implementation=attention)
        # Pretraining may have been run with others.
        for name, value in prompt_fields(corpora, recipe.method).items():
            setattr(model.config, name, value)
        set_attention_dropout(model, recipe.backbone.attention_dropout)
        learn_backbone(recipe, model)
        # In this stage the content tower stands still and pulls.
        if model.config.content_tower:
            for table in model.model.tables("content"):
                table.requires_grad_(False)
        towers = Towers(model, recipe.method.lambda_v, recipe.method.distillation, softmax=recipe.method.softmax)
        if accelerator.is_main_process:
            # Here, so that an encoder that cannot be had is found before hours of training.
            run.text_states(corpora, accelerator.device)
        teacher = None
        if recipe.method.distillation > 0:
            with accelerator.main_process_first():  # the others open what it fitted
                teacher = run.teacher(corpora)
        objective = recommendation_objective(
            corpora,
            replace(recipe.method, max_history=model.config.max_history),
            layout_of(corpora),
            recipe.seed,
            regularise=model.config.content_tower,
            teacher=teacher,
        )
        progress = train(
            towers,
            [objective],
            recipe.finetune,
            accelerator,
            seed=recipe.seed,
            folder=run.checkpoints("finetune"),
            fingerprint=stage_fingerprint(recipe, mark, "finetune"),
            validate=None if recipe.refit else Validation(model, corpora, recipe, accelerator),
            resume=resume,
            stop_after=None if chosen is None else chosen.best_epoch("finetune"),
            planned=None if chosen is None else chosen.planned("finetune"),
        )
        if accelerator.is_main_process:
            best = run.checkpoints("finetune") / "best" if progress.epoch else start
            with tempfile.TemporaryDirectory(dir=run.folder, prefix=".completed-") as temporary:
                best, choices = completed(best, Path(temporary), corpora, run, accelerator, teacher, chosen)
                write_model_folder(best, run.model, corpora, recipe)
                write_text(run.choices, json.dumps(choices, indent=2))
            run.note_stage("finetune", progress, time.perf_counter() - started)
            logger.info(
                "fine-tuning: %d epochs in %.0f s, %s; model in %s",
                progress.epoch,
                time.perf_counter() - started,
                f"on all pairs, as many as {chosen.folder} chose"
                if chosen is not None
                else f"best validation NDCG@100 {progress.best_ndcg_at_100:.4f} in epoch {progress.best_epoch}",
                run.model,
            )
    return run


def completed(
    weights: Path,
    folder: Path,
    corpora: Corpora,
    run: Run,
    accelerator: Accelerator,
    teacher: Teacher | None,
    chosen: Run | None,
) -> tuple[Path, dict[str, Any]]:
    """Write weights to `folder` with what is fitted in closed form when training has ended: the text map and the users' offsets.

    Returns:
        The folder that holds the model now, which is `weights` where there is nothing to add; and what validation chose: `text_map`
        with the values of [`~training.stages.text_map.CHOSEN`], `user_offsets` with `teacher_share` and `text_weight`, each None where there is none. Of a refit
        it is what the run that it follows chose.
    """
    recipe = run.recipe
    choices: dict[str, Any] = {"text_map": None, "user_offsets": None}
    if not (recipe.method.text_map or recipe.method.user_offsets):
        return weights, choices
    theirs = choices if chosen is None else json.loads(chosen.choices.read_text(encoding="utf-8"))
    model = CLLM4RecForRecommendation.from_pretrained(
        weights, attn_implementation=recipe.backbone.attn_implementation
    ).to(accelerator.device)
    text_map = None
    if recipe.method.text_map:
        states = run.text_states(corpora, accelerator.device)
        text_map = fit_text_map(model, corpora, recipe.seed, text_states=states, chosen=theirs["text_map"])
    if text_map is not None:
        choices["text_map"] = {name: getattr(text_map, name) for name in CHOSEN}
    offsets = None
    if recipe.method.user_offsets and (chosen is None or theirs["user_offsets"] is not None):
        said = None if text_map is None else text_map.said
        known = theirs["user_offsets"] and (
            theirs["user_offsets"]["teacher_share"],
            theirs["user_offsets"]["text_weight"],
        )
        offsets = fit_user_offsets(model, corpora, teacher, said, recipe.seed, weights=known)
    if offsets is not None:
        choices["user_offsets"] = {"teacher_share": offsets.teacher_share, "text_weight": offsets.text_weight}
    if text_map is None and offsets is None:
        return weights, choices
    model.save_pretrained(folder)
    return folder, choices


def main() -> None:
    """The command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="start from another run's embeddings, by raw id, instead of pretraining: for interactions that came since",
    )
    run_script(
        parser,
        lambda recipe, arguments: finetune(
            recipe, resume=arguments.resume, overwrite=arguments.overwrite, init_from=arguments.init_from
        ),
    )


if __name__ == "__main__":
    main()
