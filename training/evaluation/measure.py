"""Everything that `predict` ranks, measures and draws of a trained run."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from configuration.load import PROJECT
from configuration.recipe import Recipe
from training.data.batches import layout_of
from training.data.corpora import Corpora
from training.evaluation.baselines import fit_baselines
from training.evaluation.bias import Bias
from training.evaluation.examples import example_recommendations, made_up_histories
from training.evaluation.perplexity import review_perplexity
from training.evaluation.pictures import draw_curves, draw_item_map
from training.evaluation.predictions import Parts, RankedUsers, RawIds, ranking_fingerprint
from training.evaluation.ranking import PerUser, as_json, best_items, evaluate_scores, mean_over_users, measure_users
from training.evaluation.results import hardware, versions
from training.evaluation.scoring import ModelScores, split_matrix
from training.files import written_whole
from training.run import Run, peak_memory_bytes
from training.stages.teacher import fitted_ials

logger = logging.getLogger(__name__)


def rank_everyone(
    model: Any, corpora: Corpora, recipe: Recipe, run: Run, accelerator: Accelerator, *, resume: bool
) -> Parts:
    """Rank the catalogue for every user; each process writes its share of the parts, and returns when all are there.

    Users are ranked in the same batches whatever the number of processes and parts, unless they are too few for that.

    Args:
        model: The recommendation head.
        corpora: The run's.
        recipe: The run's.
        run: The run; its `predictions/` and `checkpoints/predict/` get the parts.
        accelerator: The processes.
        resume: Keep the parts that are there of this very model, data, `evaluation.top_k` and `evaluation.batch_size`.

    Returns:
        The parts.

    Raises:
        InputError: if the disk is full or may not be written.
    """
    plan: list[Any] = [None, None]
    if accelerator.is_main_process:
        kept, together = recipe.evaluation.top_k, recipe.evaluation.batch_size
        fingerprint = ranking_fingerprint(run.model, corpora.fingerprint_with(recipe), kept, together)
        parts = Parts.plan(
            run.folder / "predictions",
            run.checkpoints("predict"),
            fingerprint,
            corpora.num_users,
            accelerator.num_processes,
            resume=resume,
        )
        parts.remove_others()
        missing = parts.missing() if resume else list(range(parts.count))
        if len(missing) < parts.count:
            logger.info("predictions: %d of %d parts are there already", parts.count - len(missing), parts.count)
        plan = [parts, missing]
    parts, missing = broadcast_object_list(plan)
    if not missing:
        return parts
    ranker = Ranker(model, corpora, recipe)
    ids = RawIds.of(*([row["id"] for row in rows] for rows in (corpora.users(), corpora.items())))
    batches = -(-corpora.num_users // recipe.evaluation.batch_size)
    blocks = np.array_split(ranker.by_length(), max(batches, parts.count))
    rank, processes = accelerator.process_index, accelerator.num_processes
    for first in range(0, len(missing), processes):
        if first + rank < len(missing):
            number = missing[first + rank]
            shown = f"ranking, part {number + 1} of {parts.count}"
            mine = blocks[number :: parts.count]
            bar = tqdm(mine, desc=shown, unit="block", disable=not accelerator.is_local_main_process, leave=False)
            with parts.write(number, ids, recipe.evaluation.top_k) as write:
                for users in bar:
                    write(*ranker(users))
        # Here rather than at the end: whoever is waited for longer than a part takes counts as failed.
        accelerator.wait_for_everyone()
    return parts


class Ranker:
    """The three rankings of the model: on validation, on test, and on test where the prompt names nobody."""

    def __init__(self, model: Any, corpora: Corpora, recipe: Recipe) -> None:
        self.train, self.validation, self.test = (
            split_matrix(corpora, name) for name in ("recommendation", "validation", "test")
        )
        self.seen = (self.train + self.validation).tocsr()
        prompts = (*corpora.histories("recommendation"), layout_of(corpora), model.config.max_history)
        self.scores, self.strangers = ModelScores(model, *prompts), ModelScores(model, *prompts, user_tokens=False)
        self.depth = max(recipe.evaluation.top_k, 100)

    def by_length(self) -> np.ndarray:
        """All users, in order of their history's length."""
        return self.scores.by_length(np.arange(self.train.shape[0]))

    def __call__(self, users: np.ndarray) -> tuple[RankedUsers, np.ndarray]:
        """Rank for some users; the rankings, and the probabilities of the items.

        Validation and test have the same prompts, so one ranking serves both: what is left of the first without a user's
        validation items is the other.
        """
        validation = self.validation[users]
        depth = self.depth + int(np.diff(validation.indptr).max(initial=0))
        best = best_items(self.scores.blocks(users), self.train[users], users, depth)
        on_test = best.without(validation, self.depth)
        by_history = PerUser.unknown(len(users))
        places = np.flatnonzero(np.diff(self.test[users].indptr))
        if len(places):
            tested = users[places]
            ranked = best_items(self.strangers.blocks(tested), self.seen[tested], tested, 100).items
            by_history.put(places, measure_users(ranked, self.test[tested]))
        on_validation = measure_users(best.items, validation)
        return RankedUsers(users, on_test.items, on_validation, by_history), on_test.probabilities


def measure_run(
    model: Any,
    corpora: Corpora,
    recipe: Recipe,
    run: Run,
    accelerator: Accelerator,
    parts: Parts,
    histories: list[list[int]],
) -> dict[str, Any]:
    """All that is measured of a trained model; by one process.

    Args:
        model: The recommendation head.
        corpora: The run's.
        recipe: The run's.
        run: The run.
        accelerator: For the device of the content language model.
        parts: What [`rank_everyone`] wrote.
        histories: Item indices of the histories to recommend to; where there are none, some are made up.

    Returns:
        `model` of [`model_record`]; `test`, `test_by_history`, `validation` and `bias` of [`measure`]; `baselines` of
        [`measure_baselines`] where the recipe has any; `examples` of [`~training.evaluation.examples.example_recommendations`];
        `review_perplexity` of [`measure_perplexity`].
    """
    results: dict[str, Any] = {"model": model_record(model, recipe)}
    measured, ranking = measure(parts, corpora)
    results |= measured
    if recipe.evaluation.baselines:
        results["baselines"] = measure_baselines(corpora, recipe, run, ranking)
    histories = histories or made_up_histories(corpora, item_embeddings(model))
    results["examples"] = example_recommendations(model, corpora, histories)
    results["review_perplexity"] = measure_perplexity(corpora, recipe, run, accelerator)
    return results


class ModelRanking(NamedTuple):
    """What the baselines are compared with: the model's test ranking, and its NDCG@100 of each user by history alone."""

    bias: Bias
    ndcg_by_history: np.ndarray


def measure(parts: Parts, corpora: Corpora) -> tuple[dict[str, Any], ModelRanking]:
    """The model's figures on validation and test, from what was ranked; the same whoever ranked which part, and when.

    Returns:
        `test` and `validation`; `test_by_history`, where the prompts have no user token, as for somebody new; `bias`, which
        [`~training.evaluation.bias.Bias.to_dict`] describes. And what the baselines are compared with.
    """
    train, test = (split_matrix(corpora, name) for name in ("recommendation", "test"))
    bias = Bias(train, test)
    on_test, by_history, on_validation = (PerUser.unknown(corpora.num_users) for _ in range(3))
    for ranked in parts.read():
        bias(ranked.users, ranked.items)
        on_test.put(ranked.users, measure_users(ranked.items, test[ranked.users]))
        by_history.put(ranked.users, ranked.by_history)
        on_validation.put(ranked.users, ranked.validation)
    return {
        "test": on_test.figures().to_dict(),
        "test_by_history": by_history.figures().to_dict(),
        "validation": on_validation.figures().to_dict(),
        "bias": bias.to_dict(),
    }, ModelRanking(bias, by_history.ndcg_at_100)


def measure_baselines(corpora: Corpora, recipe: Recipe, run: Run, model: ModelRanking) -> dict[str, Any]:
    """The baselines, fitted on train, tuned on validation, on the test split; validation items are not ranked.

    Args:
        corpora: The run's.
        recipe: The run's.
        run: The run.
        model: The model's ranking.

    Returns:
        By name the figures, `settings`, `validation_ndcg_at_100`, `bias` as the model's, and `behind_model` and
        `behind_model_by_history`: mean and standard error of how much higher the model's NDCG@100 is, user by user.
    """
    train, validation, test = (split_matrix(corpora, name) for name in ("recommendation", "validation", "test"))
    everyone, seen = np.arange(corpora.num_users), (train + validation).tocsr()
    names = recipe.evaluation.baselines
    # The teacher of a run that started from another has that one's settings.
    searched = "ials" in names and not run.start.is_file()
    ials = fitted_ials(run.checkpoints("teacher")) if searched else None
    fitted = fit_baselines(
        train, validation, [name for name in names if name != "ials" or ials is None], seed=recipe.seed
    )
    if ials is not None:
        fitted["ials"] = ials
    measured = {}
    for name, baseline in fitted.items():
        bias = Bias(train, test)
        per_user = evaluate_scores(baseline.score, everyone, seen, test, read_block=bias)
        measured[name] = per_user.figures().to_dict() | {
            "settings": baseline.settings,
            "validation_ndcg_at_100": baseline.validation_ndcg_at_100,
            "behind_model": as_json(mean_over_users(model.bias.ndcg_at_100 - bias.ndcg_at_100)),
            "behind_model_by_history": as_json(mean_over_users(model.ndcg_by_history - bias.ndcg_at_100)),
            "bias": bias.to_dict(model.bias),
        }
    return measured


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


def model_record(model: Any, recipe: Recipe) -> dict[str, Any]:
    """What the model is: size, shape, and what it was made of.

    Returns:
        `parameters` in all and `parts`, those of each part, tied ones counted once; `backbone` with `model_type`, `layers`,
        `width` and `words`; `max_history`, the items that a prompt has room for; `architecture` as torch prints it;
        `base_model`, `text_encoder` and `dataset`, the names on the Hub of the pretrained backbone, the text encoder and the data,
        None where there is none.
    """
    config, parts = model.config.get_text_config(), dict[str, int]()
    for name, parameter in model.named_parameters():
        part = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    backbone, encoder, data = recipe.backbone, recipe.text_encoder, recipe.data
    return {
        "parameters": sum(parts.values()),
        "parts": parts,
        "backbone": {
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "words": model.config.num_words,
        },
        "max_history": model.config.max_history,
        "architecture": str(model),
        "base_model": backbone.hub_name or hub_name(backbone.name),
        "text_encoder": encoder.hub_name or hub_name(encoder.name),
        "dataset": hub_name(data.path and data.path.partition("@")[0]) if data.format == "dataset" else None,
    }


def hub_name(name: str | None) -> str | None:
    """The name if it can be that of a Hub repo and is no file or folder here."""
    if name is None or any((place / name).exists() for place in (Path.cwd(), PROJECT)):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def training_record(run: Run, seconds: float, device: torch.device) -> dict[str, Any]:
    """Time, memory, epochs, versions and machine: what the run cost and what its figures depend on; and what it started from."""
    costs = run.stage_costs() | {"predict": {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}}
    return {
        "seconds": sum(cost["seconds"] for cost in costs.values()),
        "peak_memory_bytes": max(int(cost["peak_memory_bytes"]) for cost in costs.values()),
        "stages": {stage: cost | {"epochs": run.epochs(stage)} for stage, cost in costs.items()},
        "versions": versions(),
        "hardware": hardware(device),
        "started_from": run.started_from and Path(run.started_from).name,
    }


def refit_record(
    model: Any,
    corpora: Corpora,
    recipe: Recipe,
    run: Run,
    chosen: Run,
    histories: list[list[int]],
    seconds: float,
) -> dict[str, Any]:
    """What is known of a model that was trained on all pairs.

    Args:
        model: The recommendation head.
        corpora: Of the refit.
        recipe: Of the refit.
        run: The refit.
        chosen: The run that it follows.
        histories: Item indices of the histories to recommend to; where there are none, some are made up.
        seconds: That ranking everyone took.

    Returns:
        The results of the run that it follows, their `recipe` and `data` too; but `model` and `examples` of this model, and `refit`:
        its `interactions`, the `epochs` of each stage, and the `seconds` that all of it took.
    """
    results = json.loads((chosen.folder / "results.json").read_text(encoding="utf-8"))
    return results | {
        "model": model_record(model, recipe),
        "examples": example_recommendations(
            model, corpora, histories or made_up_histories(corpora, item_embeddings(model))
        ),
        "refit": {
            "interactions": corpora.info["counts"]["train"],
            "epochs": {stage: len(run.epochs(stage)) for stage in ("pretrain", "finetune")},
            "seconds": seconds + sum(cost["seconds"] for cost in run.stage_costs().values()),
        },
    }


def item_embeddings(model: Any) -> np.ndarray:
    """Embeddings of the items, float32 `(items, width)`."""
    return model.get_output_embeddings().weight.detach().float().cpu().numpy()


def draw_pictures(model: Any, corpora: Corpora, run: Run, measured: Run) -> None:
    """Loss curves and the map of the item embeddings, as PNG files.

    Args:
        model: The recommendation head.
        corpora: The run's.
        run: The run; its `pictures/` get them.
        measured: The run whose curves are drawn; of a refit, which has no validation, the one that it follows.
    """
    items, epochs = corpora.items(), {stage: measured.epochs(stage) for stage in ("pretrain", "finetune")}
    with written_whole(run.folder / "pictures") as target:
        draw_curves({stage: found for stage, found in epochs.items() if found}, target / "curves.png")
        draw_item_map(
            item_embeddings(model),
            [item["title"] for item in items],
            np.asarray([item["popularity"] for item in items]),
            target / "items.png",
        )
