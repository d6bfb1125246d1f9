"""Stages one and two: content and collaborative language model in alternating epochs, each pulled to the other.

accelerate launch training/pretrain.py --config sample
"""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from configuration.load import dump_recipe
from configuration.recipe import Recipe
from training.command_line import make_parser, run_script
from training.data.batches import layout_of
from training.data.corpora import expected_fingerprint, open_corpora
from training.data.interactions import build_interactions
from training.data.readers import read_tables
from training.evaluation.scoring import Validation
from training.files import write_text
from training.run import Run, logged, make_accelerator, prepare_corpora, stage_fingerprint
from training.stages.collaborative import collaborative_objective
from training.stages.content import content_objective
from training.stages.initialisation import start_from_factors
from training.stages.loop import save_weights, train
from training.stages.model import check_backbone, learn_backbone, make_model
from training.stages.towers import Towers
from training.stages.warm_start import start_from_run, train_on_what_is_known

logger = logging.getLogger("training.pretrain")


def pretrain(
    recipe: Recipe,
    *,
    frame: pd.DataFrame | None = None,
    resume: bool = False,
    overwrite: bool = False,
    init_from: str | Path | None = None,
    train_language_models: bool = True,
) -> Run:
    """Build the corpora and pretrain both language models.

    Args:
        recipe: The recipe.
        frame: Interactions of a notebook, with the columns that `recipe.data` names, instead of `recipe.data.path`.
        resume: Continue an interrupted run.
        overwrite: Replace an earlier run of this recipe.
        init_from: Folder of another run whose users and items, known by their raw ids, lend their embeddings, and its
            teacher the settings.
        train_language_models: Whether they are trained, or left as they start.

    Returns:
        The run; `checkpoints/pretrain/final` holds the weights.

    Raises:
        InputError: for wrong data, a wrong recipe, or a run that is there already.
    """
    run = Run.of(recipe)
    run.check_free("pretrain", resume=resume, overwrite=overwrite)
    check_backbone(recipe)
    chosen = run.chosen()
    run.check_start(init_from, resume=resume)
    accelerator = make_accelerator(recipe, recipe.pretrain, run.folder)
    started = time.perf_counter()
    interactions = None
    if accelerator.is_main_process:
        interactions = build_interactions(read_tables(recipe.data, frame), recipe.data, recipe.seed, refit=recipe.refit)
        if init_from is not None:
            interactions = train_on_what_is_known(interactions, Path(init_from))
        if chosen is not None:
            chosen.check_source(interactions.source)
        if resume:
            run.check_checkpoint("pretrain", expected_fingerprint(run.corpora, recipe, interactions.source))
    with logged(run, accelerator):
        if interactions is not None:
            prepare_corpora(run, interactions)
        accelerator.wait_for_everyone()
        corpora = open_corpora(run.corpora)
        model = make_model(recipe, corpora)
        if init_from is not None:
            start_from_run(model, corpora, Path(init_from))
        # By now all that can be wrong was looked at.
        if accelerator.is_main_process:
            if not (resume and run.is_begun("pretrain")):
                # A teacher may be left of a run on other data that broke off early.
                run.clear("pretrain", "finetune", "teacher", "text_states")
            write_text(run.folder / "recipe.yaml", dump_recipe(recipe))
            if init_from is not None:
                write_text(run.start, json.dumps({"init_from": str(init_from)}))
        accelerator.wait_for_everyone()
        if init_from is not None and recipe.method.distillation > 0:
            with accelerator.main_process_first():  # fine-tuning opens it
                run.teacher(corpora, Path(init_from))
        if init_from is None and recipe.method.initialisation == "ials":
            with accelerator.main_process_first():  # the others open what it fitted
                teacher = run.teacher(corpora)
            start_from_factors(model.model, teacher, recipe.method.initialisation_std)
        learn_backbone(recipe, model)
        towers = Towers(model, recipe.method.lambda_v, softmax=recipe.method.softmax)
        method = replace(recipe.method, max_history=model.config.max_history)
        layout, has_text = layout_of(corpora), model.config.content_tower
        objectives = [collaborative_objective(corpora, method, layout, recipe.seed, regularise=has_text)]
        if has_text:
            objectives.insert(0, content_objective(corpora, method))
        else:
            logger.info(
                "content stage: skipped, %s",
                "the data have no text" if recipe.method.content_tower else "as the recipe says",
            )
        progress = train(
            towers,
            objectives,
            recipe.pretrain if train_language_models else replace(recipe.pretrain, epochs=0),
            accelerator,
            seed=recipe.seed,
            folder=run.checkpoints("pretrain"),
            fingerprint=stage_fingerprint(recipe, corpora.info["fingerprint"], "pretrain"),
            validate=None if recipe.refit else Validation(model, corpora, recipe, accelerator),
            resume=resume,
            stop_after=None if chosen is None else len(chosen.epochs("pretrain")),
            planned=None if chosen is None else chosen.planned("pretrain"),
        )
        save_weights(accelerator, towers, run.checkpoints("pretrain") / "final")
        if accelerator.is_main_process:
            run.note_stage("pretrain", progress, time.perf_counter() - started)
            logger.info("pretraining: %d epochs in %.0f s", progress.epoch, time.perf_counter() - started)
        accelerator.wait_for_everyone()  # fine-tuning looks for what the main process has written
    return run


def main() -> None:
    """The command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--init-from", metavar="RUN", help="start from the embeddings of another run's users and items, by raw id"
    )
    run_script(
        parser,
        lambda recipe, arguments: pretrain(
            recipe, resume=arguments.resume, overwrite=arguments.overwrite, init_from=arguments.init_from
        ),
    )


if __name__ == "__main__":
    main()
