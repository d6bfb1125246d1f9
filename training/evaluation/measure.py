"""Everything that `predict` measures, draws and shows of a trained run."""

import logging
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from configuration.errors import InputError
from configuration.recipe import Recipe
from training.data.batches import layout_of
from training.data.corpora import Corpora
from training.evaluation.baselines import fit_baselines
from training.evaluation.perplexity import review_perplexity
from training.evaluation.pictures import draw_curves, draw_item_map
from training.evaluation.predictions import predictions_file
from training.evaluation.ranking import evaluate_scores
from training.evaluation.results import hardware, show_recommendations, versions
from training.evaluation.scoring import ModelScores, split_matrix
from training.files import written_whole
from training.run import Run, peak_memory_bytes
from training.stages.teacher import fitted_ials

logger = logging.getLogger(__name__)

SHOWN_EXAMPLES, SHOWN_ITEMS = 3, 5


def measure(model: Any, corpora: Corpora, recipe: Recipe, run: Run) -> dict[str, Any]:
    """Figures on validation and test; on the way through the test, every user's best items go to `predictions.parquet`."""
    train, validation, test = (split_matrix(corpora, name) for name in ("recommendation", "validation", "test"))
    scores = ModelScores(model, *corpora.histories("recommendation"), layout_of(corpora), model.config.max_history)
    size = recipe.evaluation.batch_size
    everyone = scores.by_length(np.arange(corpora.num_users))
    with_validation = scores.by_length(np.flatnonzero(np.diff(validation.indptr)))
    on_validation = evaluate_scores(scores, with_validation, train, validation, batch_size=size, progress=True)
    user_ids, item_ids = ([row["id"] for row in rows] for rows in (corpora.users(), corpora.items()))
    top_k = recipe.evaluation.top_k
    with predictions_file(run.folder / "predictions.parquet", user_ids, item_ids, top_k) as write:
        on_test = evaluate_scores(
            scores,
            everyone,
            (train + validation).tocsr(),
            test,
            batch_size=size,
            progress=True,
            k=top_k,
            read_block=write,
        )
    return {"test": on_test.figures().to_dict(), "validation": on_validation.figures().to_dict()}


def measure_baselines(corpora: Corpora, recipe: Recipe, run: Run) -> dict[str, Any]:
    """The baselines, fitted on train, tuned on validation, on the test split; validation items are not ranked."""
    train, validation, test = (split_matrix(corpora, name) for name in ("recommendation", "validation", "test"))
    users, seen = np.flatnonzero(np.diff(test.indptr)), (train + validation).tocsr()
    names = recipe.evaluation.baselines
    ials = fitted_ials(run.checkpoints("teacher")) if "ials" in names else None
    fitted = fit_baselines(
        train, validation, [name for name in names if name != "ials" or ials is None], seed=recipe.seed
    )
    if ials is not None:
        fitted["ials"] = ials
    return {
        name: evaluate_scores(baseline.score, users, seen, test).figures().to_dict()
        | {"settings": baseline.settings, "validation_ndcg_at_100": baseline.validation_ndcg_at_100}
        for name, baseline in fitted.items()
    }


def measure_perplexity(corpora: Corpora, recipe: Recipe, run: Run, accelerator: Accelerator) -> dict[str, Any] | None:
    """Perplexity of the test pairs' reviews with and without their user and item tokens; None where there are none."""
    reviews = corpora.texts("held_out_reviews")
    if not len(reviews):
        return None
    content = AutoModelForCausalLM.from_pretrained(run.model, trust_remote_code=True).to(accelerator.device)
    measured = review_perplexity(content, reviews, layout_of(corpora), recipe.seed)
    if measured is not None:
        logger.info(
            "perplexity of %d held-out reviews: %.1f with their user and item, %.1f with others, %.1f without",
            measured["reviews"], measured["with_ids"], measured["with_others"], measured["without_ids"],
        )  # fmt: skip
    return measured


def training_record(run: Run, seconds: float) -> dict[str, Any]:
    """Time, memory, epochs, versions and machine: what the run cost and what its figures depend on."""
    costs = run.stage_costs() | {"predict": {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}}
    return {
        "seconds": sum(cost["seconds"] for cost in costs.values()),
        "peak_memory_bytes": max(int(cost["peak_memory_bytes"]) for cost in costs.values()),
        "stages": {stage: cost | {"epochs": run.epochs(stage)} for stage, cost in costs.items()},
        "versions": versions(),
        "hardware": hardware(),
    }


def draw_pictures(model: Any, corpora: Corpora, run: Run) -> None:
    """Loss curves and the map of the item embeddings, as PNG files."""
    items = corpora.items()
    with written_whole(run.folder / "pictures") as target:
        draw_curves(
            {stage: run.epochs(stage) for stage in ("pretrain", "finetune") if run.epochs(stage)}, target / "curves.png"
        )
        draw_item_map(
            model.get_output_embeddings().weight.detach().float().cpu().numpy(),
            [item["title"] for item in items],
            np.asarray([item["popularity"] for item in items]),
            target / "items.png",
        )


def example_histories(corpora: Corpora, recipe: Recipe) -> tuple[list[list[int]], list[int | None]]:
    """Item indices of the recipe's example histories, of nobody known, or else of three users.

    Raises:
        InputError: if an example names an item that is not in the catalogue.
    """
    if recipe.data.examples:
        index = {item["id"]: j for j, item in enumerate(corpora.items())}
        unknown = [raw for history in recipe.data.examples for raw in history if raw not in index]
        if unknown:
            raise InputError(
                f"data.examples: no item {unknown[0]!r} is in the catalogue; give raw item ids of the data"
            )
        histories = [[index[raw] for raw in history] for history in recipe.data.examples]
        return histories, [None] * len(histories)
    known, rows = corpora.histories("recommendation")
    places = np.unique(np.linspace(0, len(known) - 1, SHOWN_EXAMPLES).astype(int))
    return [rows[place].tolist() for place in places], [int(known[place]) for place in places]


def example_recommendations(
    model: Any, corpora: Corpora, histories: list[list[int]], users: list[int | None]
) -> list[str]:
    """Recommendations for histories, as a person reads them."""
    items = corpora.items()
    best = model.recommend(histories, users, k=SHOWN_ITEMS)
    return [
        show_recommendations(
            [items[j] for j in history], [(items[j], score) for j, score in zip(row, scores, strict=True) if j >= 0]
        )
        for history, row, scores in zip(histories, best.items.tolist(), best.scores.tolist(), strict=True)
    ]
