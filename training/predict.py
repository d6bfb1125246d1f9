"""The trained model against the test split and the baselines: figures, pictures, recommendations, every user's top k.

accelerate launch training/predict.py --config sample
"""

import json
import logging
import time
from dataclasses import asdict
from typing import Any

from transformers import AutoModelForSequenceClassification

from configuration.errors import InputError
from configuration.recipe import Recipe
from training.command_line import make_parser, run_script
from training.data.corpora import open_corpora
from training.evaluation.examples import example_histories, show_examples
from training.evaluation.measure import draw_pictures, measure_run, rank_everyone, refit_record, training_record
from training.evaluation.results import metrics_table
from training.evaluation.scoring import check_is_trained_on
from training.files import write_text
from training.hub.folder import complete_model_folder
from training.hub.publish import Options, check_ready, publish
from training.run import Run, logged, make_accelerator

logger = logging.getLogger("training.predict")


def predict(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Measure the trained model on validation and test, compare, and write what a reader wants to see.

    The only function that reads the test split; of a refit, which has none, the figures are those of the run that it follows. It opens `model/` as any stranger would, through the Auto classes. Several
    processes share the ranking of all users; the first goes on alone with everything else.

    Args:
        recipe: The recipe of the run.
        resume: Rank only for the users whose part of `predictions/` is missing, or is of another model or other data.
        overwrite: Replace earlier predictions and results.
        push_to_hub: Name of a repo that `model/` is sent to at the end, its card with the figures.
        private: Whether that repo is made private.

    Returns:
        What `results.json` holds: `recipe`, `seed`, `data` (the corpora's `info.json`), and what
        [`~training.evaluation.measure.measure_run`] and [`~training.evaluation.measure.training_record`] give; no user's id or
        history is among them. Beside it, the Parquet files in `predictions/` have every user's best items, and `pictures/`
        the curves. Of several processes the first returns this, and the others nothing when all users are ranked.

    Raises:
        InputError: if there is no trained model, it belongs to another recipe, or predictions or results are there already.
    """
    run = Run.of(recipe)
    chosen = run.chosen()
    if not (run.model / "config.json").is_file():
        raise InputError(
            f"{run.model}: no trained model is there; run training/pretrain.py and training/finetune.py first"
        )
    check_free(run, resume=resume, overwrite=overwrite)
    corpora = open_corpora(run.corpora)
    for stage in ("pretrain", "finetune"):
        run.check_checkpoint(stage, corpora.fingerprint_with(recipe))
    if "finetune" not in run.stage_costs():
        raise InputError(f"{run.model} is older than the pretraining beside it; run training/finetune.py first")
    check_is_trained_on(run.model, corpora)
    histories = example_histories(corpora, recipe)
    accelerator = make_accelerator(recipe, None, run.folder)
    if push_to_hub is not None and accelerator.is_main_process:
        check_ready(push_to_hub, recipe, private=private)
    with logged(run, accelerator, tracker=False):
        started = time.perf_counter()
        model = AutoModelForSequenceClassification.from_pretrained(run.model, trust_remote_code=True).to(
            accelerator.device
        )
        parts = rank_everyone(model, corpora, recipe, run, accelerator, resume=resume)
        # The others are done: from here on nobody waits for them, nor they for the rest, which may take long.
        accelerator.end_training()
        if not accelerator.is_main_process:
            return {}
        results: dict[str, Any] = {"recipe": asdict(recipe), "seed": recipe.seed, "data": corpora.info}
        if chosen is None:
            results |= measure_run(model, corpora, recipe, run, accelerator, parts, histories)
            results |= training_record(run, time.perf_counter() - started, accelerator.device)
        else:
            results |= refit_record(model, corpora, recipe, run, chosen, histories, time.perf_counter() - started)
        draw_pictures(model, corpora, run, chosen or run)
        write_text(run.folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False))
        complete_model_folder(run.model, run.folder / "pictures", corpora, recipe, results)
        if chosen is not None:
            logger.info("figures of %s, which held pairs out; this model was trained on all of them:", chosen.folder)
        logger.info("\n%s", metrics_table(results))
        logger.info("\n%s", show_examples(results["examples"], corpora))
        logger.info(
            "\n%.0f s in all, %.1f GB at the most. Figures: %s; pictures: %s; open %s with "
            "AutoModelForSequenceClassification.from_pretrained(…, trust_remote_code=True)",
            (results.get("refit") or results)["seconds"], results["peak_memory_bytes"] / 1e9, run.folder / "results.json", run.folder / "pictures", run.model,
        )  # fmt: skip
        if push_to_hub is not None:
            try:
                publish(run.folder, push_to_hub, options=Options(private=private))
            except InputError as error:
                again = f"python training/push.py {run.folder} {push_to_hub}{' --private' if private else ''}"
                raise InputError(f"{error}. All else is done: `{again}` sends it") from error
    return results


def check_free(run: Run, *, resume: bool, overwrite: bool) -> None:
    """Refuse to predict again unless told how.

    Raises:
        InputError: if there are results or predictions and neither `resume` nor `overwrite` is given, or both are.
    """
    if resume and overwrite:
        raise InputError(
            "--resume and --overwrite exclude each other: one continues predictions, the other replaces them"
        )
    results, parts = run.folder / "results.json", run.folder / "predictions"
    taken = results if results.exists() else parts if parts.is_dir() and any(parts.iterdir()) else None
    if taken is not None and not resume and not overwrite:
        raise InputError(
            f"{taken} exists already; rank what is missing with --resume, or replace everything with --overwrite"
        )


def main() -> None:
    """The command line."""
    parser = make_parser(__doc__ or "", stage=False)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the predictions that are there of this model and rank the other users",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier predictions and results")
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="send model/ to this repo at the end; training/push.py does it later, and more",
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make the repo private")
    run_script(
        parser,
        lambda recipe, arguments: predict(
            recipe,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            push_to_hub=arguments.push_to_hub,
            private=arguments.private,
        ),
    )


if __name__ == "__main__":
    main()
