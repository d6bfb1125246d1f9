"""The model's page: `model_card.md` filled in from what a run measured, its recipe and its corpora, and from nothing else.

Here figures become words and tables of cells; every sentence of the page stands in the template.
"""

import json
import re
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration.errors import InputError
from configuration.load import PROJECT, dump_recipe, load_recipe
from configuration.recipe import Recipe
from training.evaluation.results import METRICS, NAMES
from training.hub.markdown import (
    code,
    compact,
    cut,
    decimals,
    duration,
    fenced,
    file_size,
    listed,
    one_line,
    percent,
    text,
    whole,
)

TEMPLATE = PROJECT / "model_card.md"
CITATION = PROJECT / "CITATION.cff"
TAGS = [
    "recommendation",
    "recommender-system",
    "collaborative-filtering",
    "implicit-feedback",
    "cllm4rec",
    "custom_code",
]
# Names of the metrics in the metadata, where `@` is what others write.
METRIC_TYPES = {"recall_at_20": "recall@20", "recall_at_40": "recall@40", "ndcg_at_100": "ndcg@100"}
MEASURED = ("model", "test", "test_by_history", "bias", "examples", "stages", "versions", "hardware", "data")
# A difference of so many standard errors is called one.
CLEAR = 2.0
# From this standard error on three decimals say all.
COARSE = 0.002


def card_text(
    results: dict[str, Any],
    recipe: Recipe,
    *,
    repo_id: str,
    revision: str | None = None,
    dataset: str | None = None,
    user_embeddings: bool = True,
    on_hub: bool = True,
    ids_are_words: bool | None = False,
) -> str:
    """The page of a trained recommender, metadata and Markdown.

    Args:
        results: What the published `results.json` holds; [`~training.predict.predict`] says what that is.
        recipe: The published recipe.
        repo_id: The model's repo, or the folder that holds it.
        revision: The commit that the snippets name; None: they name none.
        dataset: The repo of the data, where they are published; the recipe names it too.
        user_embeddings: Whether the model carries the users' embeddings. Without them its figures are those of prompts that
            hold a history alone.
        on_hub: Whether `repo_id` is a repo, not a folder.
        ids_are_words: Whether the publisher let raw user ids stand, as common words; None: nobody looked for any.

    Raises:
        InputError: if `results` lack what the page shows.
    """
    absent = [name for name in MEASURED if name not in results]
    if absent:
        raise InputError(
            f"results.json has no '{absent[0]}', which the model card shows; run training/predict.py --overwrite"
        )
    name = repo_id.rpartition("/")[2] if on_hub else recipe.name
    dataset = dataset or results["model"]["dataset"]
    places = sensible_places(results)
    metadata = card_data(results, recipe, name, dataset, user_embeddings)
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        on_hub=on_hub,
        ids_are_words=ids_are_words,
        revision=revision,
        dataset_id=dataset,
        user_embeddings=user_embeddings,
        recipe=recipe,
        results=results,
        counts=results["data"]["counts"],
        model=model_facts(results, user_embeddings),
        figures=result_rows(results, user_embeddings),
        against=comparison(results, user_embeddings),
        bias=bias_facts(results),
        examples=results["examples"],
        made_up=not recipe.data.examples,
        filters=filters(results, recipe),
        stages=stage_rows(results, recipe),
        departures=departures(recipe),
        epochs=epoch_tables(results),
        settings=baseline_settings(results),
        recipe_yaml=dump_recipe(recipe).rstrip(),
        citations=citations(CITATION),
        # What turns values into cells and snippets
        text=text, code=code, cut=cut, fenced=fenced, listed=listed, whole=whole, compact=compact, decimals=decimals, percent=percent,
        duration=duration, file_size=file_size, mean=partial(mean, places=places), quoted=quoted, one_line=one_line, shell=shlex.quote,
    )  # fmt: skip
    return str(card)


def card_data(
    results: dict[str, Any], recipe: Recipe, name: str, dataset: str | None, user_embeddings: bool
) -> ModelCardData:
    """The metadata; no `pipeline_tag`, since the Hub knows none for recommendation and another would promise what it is not."""
    evaluated = eval_results(results, recipe, dataset, user_embeddings)
    return ModelCardData(
        license=recipe.license,
        language=recipe.language or None,
        library_name="transformers",
        tags=TAGS,
        base_model=base_models(results, recipe),
        datasets=[dataset] if dataset else None,
        metrics=list(METRIC_TYPES.values()),
        widget=widget(results["examples"]) or None,
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
    )


def base_models(results: dict[str, Any], recipe: Recipe) -> str | list[str] | None:
    """What the model was made of, by its names on the Hub: the pretrained backbone and the text encoder."""
    names = [recipe.backbone.hub_name or results["model"]["base_model"]]
    if recipe.text_encoder.name is not None and results["model"]["parts"].get("text_map"):
        names.append(recipe.text_encoder.hub_name or results["model"]["text_encoder"])
    found = list(dict.fromkeys(name for name in names if name is not None))
    return found if len(found) > 1 else next(iter(found), None)


def eval_results(
    results: dict[str, Any], recipe: Recipe, dataset: str | None, user_embeddings: bool
) -> list[EvalResult]:
    """The test figures with their protocol, for the model index; none where nobody has a test item.

    Data that are not on the Hub have the type `unknown`, as is the custom there.
    """
    counts, found = results["data"]["counts"], results["test" if user_embeddings else "test_by_history"]
    protocol = {
        "split": recipe.data.split,
        "candidates": "the whole catalogue without the user's training and validation items",
        "prompt": "the user's training items"
        + (" and user token" if user_embeddings and recipe.method.user_token_dropout < 1 else ""),
        "users": found["num_users"],
        "items": counts["items"],
        "held_out": counts["test"],
        "seed": results["seed"],
    }
    if "refit" in results:
        protocol["measured"] = "before the weights were trained again on all pairs"
    cut_at = {"ndcg_at_100": "ideal_cut_at", "recall_at_20": "denominator", "recall_at_40": "denominator"}
    return [
        EvalResult(
            task_type="recommendation",
            task_name="Top-k recommendation",
            dataset_type=dataset or "unknown",
            dataset_name=recipe.name,
            dataset_split="test",
            dataset_args=protocol,
            metric_type=kind,
            metric_name=METRICS[key],
            metric_value=round(found[key]["value"], 6),
            metric_args={
                "k": int(kind.partition("@")[2]),
                cut_at[key]: "min(k, held-out items)",
                "standard_error": rounded(found[key]["standard_error"]),
            },
        )
        for key, kind in METRIC_TYPES.items()
        if found[key]["value"] is not None
    ]


def widget(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples as the Hub shows them beside the page: a text, and labels with scores."""
    return [
        {
            "text": ", ".join(cut(one_line(title), 120) for title in example["titles"]),
            "example_title": cut(one_line(example["titles"][0]), 40),
            "output": [
                {"label": cut(one_line(best["title"]), 120), "score": round(best["score"], 4)}
                for best in example["items"]
            ],
        }
        for example in examples
        if example["titles"]
    ]


def model_facts(results: dict[str, Any], user_embeddings: bool) -> dict[str, Any]:
    """What the model is, as it is published: without the users' tables where they were left out."""
    facts = dict(results["model"])
    users = {name: size for name, size in facts["parts"].items() if name.endswith(("user_embeddings", "user_offsets"))}
    if not user_embeddings:
        facts["parameters"] -= sum(users.values())
        facts["architecture"] = re.sub(r"(user_(?:embeddings|offsets)\): \w+\()\d+", r"\g<1>0", facts["architecture"])
    return facts | {"user_parameters": sum(users.values())}


def result_rows(results: dict[str, Any], user_embeddings: bool) -> list[dict[str, Any]]:
    """A row per method: `name`, `cells` and whether it is `ours`, the best NDCG@100 last."""
    named = [("CLLM4Rec (this model)", results["test"], user_embeddings)]
    named.append(("CLLM4Rec by history alone", results["test_by_history"], not user_embeddings))
    named += [(NAMES[name], found, False) for name, found in results.get("baselines", {}).items()]
    if not user_embeddings:
        named[0], named[1] = (
            ("CLLM4Rec with user embeddings", *named[0][1:]),
            ("CLLM4Rec by history (this model)", *named[1][1:]),
        )
    named.sort(key=lambda row: row[1]["ndcg_at_100"]["value"] or 0.0)
    places = sensible_places(results)
    return [
        {"name": name, "cells": [mean(found[key], places) for key in METRICS], "ours": ours}
        for name, found, ours in named
    ]


def comparison(results: dict[str, Any], user_embeddings: bool) -> dict[str, Any] | None:
    """The best baseline by test NDCG@100 and how the model stands to it; None without baselines or test items.

    Returns:
        Its `key` and `name`, the model's `gain` over it, a mean over users with its standard error, and the `verdict` of
        [`clearly`].
    """
    found = {
        name: figures
        for name, figures in results.get("baselines", {}).items()
        if figures["ndcg_at_100"]["value"] is not None
    }
    if not found:
        return None
    key = max(found, key=lambda name: found[name]["ndcg_at_100"]["value"])
    gain = found[key]["behind_model" if user_embeddings else "behind_model_by_history"]
    return {"key": key, "name": NAMES[key], "gain": gain, "verdict": clearly(gain)}


def clearly(gain: dict[str, float | None]) -> str:
    """`above` or `below` for a mean that is more than two standard errors from zero, else `level`."""
    value, error = gain["value"], gain["standard_error"]
    if value is None or error is None or abs(value) <= CLEAR * error:
        return "level"
    return "above" if value > 0 else "below"


def bias_facts(results: dict[str, Any]) -> dict[str, Any] | None:
    """Whom the test ranking serves, of the model and beside it of the best baseline; None without test items.

    Returns:
        `items` and `users`, the groups that are not empty, each with `theirs`, the best baseline's NDCG@100 of the group;
        `weaker`, what the groups are called where that is clearly higher; `wider`, the baselines that show more of the catalogue;
        `coverage`, a row per method with `at_10`, `at_100` and `head`, the share of the top 10 that the head gets.
    """
    mine, against = results["bias"], comparison(results, user_embeddings=True)
    if not any(group["num_users"] for group in mine["by_user_activity"]):
        return None
    theirs = results["baselines"][against["key"]]["bias"] if against else None
    tables = {
        name: [
            group
            | {
                "theirs": theirs[key][place]["ndcg_at_100"] if theirs else None,
                "behind": theirs[key][place]["behind_model"] if theirs else None,
            }
            for place, group in enumerate(mine[key])
            if group["least"] is not None
        ]
        for name, key in (("items", "by_item_popularity"), ("users", "by_user_activity"))
    }
    methods = [(NAMES[name], found["bias"]) for name, found in results.get("baselines", {}).items()]
    coverage = [
        {
            "name": name,
            "ours": found is mine,
            "at_10": found["coverage_at_10"],
            "at_100": found["coverage_at_100"],
            "novelty": found.get("novelty_at_10"),  # none in results of an earlier version
            "head": found["by_item_popularity"][-1]["share_at_10"],
        }
        for name, found in [*methods, ("CLLM4Rec", mine)]
    ]
    named = [(f"held-out items of the {group['group']}", group) for group in tables["items"]]
    named += [(f"the {group['group']} users", group) for group in tables["users"]]
    weaker = [what for what, group in named if group["behind"] and clearly(group["behind"]) == "below"]
    return {
        **tables,
        "weaker": weaker,
        "wider": [row["name"] for row in coverage if row["at_10"] > mine["coverage_at_10"]],
        "coverage": coverage,
        "never": 1 - mine["coverage_at_100"],
        "users_ranked": mine["users_ranked"],
    }


def filters(results: dict[str, Any], recipe: Recipe) -> list[str]:
    """What was left out of the raw table, in words with counts."""
    data, log = recipe.data, results["data"]["filtered"]
    reasons = {
        "below_min_rating": f"with a rating below {data.min_rating:g}" if data.min_rating is not None else "",
        "repeated": "that repeat a pair of user and item",
        "not_in_split": "that the given split does not list",
        "below_min_interactions": (
            f"of users with fewer than {data.min_user_interactions} interactions or items with fewer than "
            f"{data.min_item_interactions}, repeated until stable"
        ),
    }
    return [f"{whole(log[key])} {reason}" for key, reason in reasons.items() if log.get(key)]


def stage_rows(results: dict[str, Any], recipe: Recipe) -> list[list[str]]:
    """What each training stage was set to and what it cost, a row each: name, pretraining, fine-tuning."""
    stages = [(recipe.pretrain, results["stages"]["pretrain"]), (recipe.finetune, results["stages"]["finetune"])]
    rows: dict[str, list[str]] = {
        "epochs run, of at most": [f"{len(found['epochs'])} of {stage.epochs}" for stage, found in stages],
        "documents per step": [whole(stage.batch_size) for stage, _ in stages],
        "peak learning rate, IDs": [compact(stage.lr) for stage, _ in stages],
        "peak learning rate, backbone": [
            "frozen" if recipe.backbone.train == "none" else compact(stage.backbone_lr or stage.lr)
            for stage, _ in stages
        ],
        "warm-up, then": [f"{number_of(stage.warmup_epochs, 'epoch')}, {stage.schedule}" for stage, _ in stages],
        "weight decay": [compact(stage.weight_decay) for stage, _ in stages],
        "gradient norm clipped at": [
            compact(stage.max_grad_norm) if stage.max_grad_norm else "not" for stage, _ in stages
        ],
        "stops early after": [
            f"{number_of(stage.patience, 'epoch')} without gain" if stage.patience else "never" for stage, _ in stages
        ],
        "mixed precision": [
            ("bf16" if results["hardware"].get("bf16") else "no")
            if stage.mixed_precision == "auto"
            else stage.mixed_precision
            for stage, _ in stages
        ],
        "time": [duration(found["seconds"]) for _, found in stages],
        "most memory": [file_size(found["peak_memory_bytes"]) for _, found in stages],
    }
    return [[name, *cells] for name, cells in rows.items()]


def departures(recipe: Recipe) -> list[list[str]]:
    """Fields of the method that differ from the published one, a row each: name, here, there."""
    here, there = (method_fields(of) for of in (recipe, load_recipe(None, "paper")))
    return [[name, plain(here[name]), plain(there[name])] for name in here if here[name] != there[name]]


def method_fields(recipe: Recipe) -> dict[str, Any]:
    """The choices of the method by their dotted name; `none` for one that nothing reads, but not how long a document may be."""
    method = recipe.method
    fields = {"backbone.train": recipe.backbone.train}
    fields |= {f"method.{name}": value for name, value in asdict(method).items() if not name.startswith("max_")}
    if not method.distillation:
        fields["method.teacher"] = "none"
    return fields


def epoch_tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of every epoch: `stage`, `columns`, and `rows` of cells with whether the epoch is the published one."""
    tables = []
    for stage in ("pretrain", "finetune"):
        records = results["stages"][stage]["epochs"]
        if not records:
            continue
        losses = [key for key in records[0] if key.endswith("_loss")]
        best = max(record["ndcg_at_100"] for record in records)
        first = next(record["epoch"] for record in records if record["ndcg_at_100"] == best)
        tables.append(
            {
                "stage": {"pretrain": "Pretraining", "finetune": "Fine-tuning"}[stage],
                "columns": ["epoch", *(key.replace("_", " ") for key in losses), *METRICS.values(), "documents/s"],
                "rows": [
                    {
                        "cells": [
                            str(record["epoch"]),
                            *(decimals(record[key], 3) for key in losses),
                            *(decimals(record[key]) for key in METRICS),
                            whole(round(record["documents_per_second"])),
                        ],
                        "published": stage == "finetune" and record["epoch"] == first,
                    }
                    for record in records
                ],
            }
        )
    return tables


def baseline_settings(results: dict[str, Any]) -> list[list[str]]:
    """What each baseline was set to by validation, a row each: name, settings, validation NDCG@100."""
    return [
        [
            NAMES[name],
            ", ".join(f"{key} {plain(value)}" for key, value in found["settings"].items()) or "none",
            decimals(found["validation_ndcg_at_100"]),
        ]
        for name, found in results.get("baselines", {}).items()
    ]


def citations(path: Path) -> dict[str, str]:
    """BibTeX of the paper and of this project, from its CITATION.cff."""
    cited = yaml.safe_load(path.read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    entries = {
        "paper": (
            "inproceedings",
            f"{paper['authors'][0]['family-names'].lower()}{paper['year']}cllm4rec",
            {
                "title": paper["title"],
                "author": authors,
                "booktitle": paper["collection-title"],
                "year": paper["year"],
                "pages": f"{paper['start']}--{paper['end']}",
                "doi": paper["doi"],
            },
        ),
        "project": (
            "software",
            "cllm4rec_software",
            {
                "title": cited["title"],
                "author": " and ".join(f"{{{author['name']}}}" for author in cited["authors"]),
                "version": cited["version"],
                "license": cited["license"],
                "url": cited.get("repository-code") or cited.get("url"),
            },
        ),
    }
    return {
        name: "\n".join(
            [f"@{kind}{{{key},", *(f"  {field} = {{{value}}}," for field, value in fields.items() if value), "}"]
        )
        for name, (kind, key, fields) in entries.items()
    }


def sensible_places(results: dict[str, Any]) -> int:
    """How many decimals of a figure the standard error of NDCG@100 leaves sense in."""
    error = results["test"]["ndcg_at_100"]["standard_error"]
    return 4 if error is not None and error < COARSE else 3


def mean(found: dict[str, float | None], places: int) -> str:
    """A mean and its standard error on one line; a dash for what too few users leave undefined."""
    value, error = (None if found[key] is None else decimals(found[key], places) for key in ("value", "standard_error"))
    return value or "-" if error is None else f"{value}\u00a0±\u00a0{error}"


def quoted(value: Any) -> str:
    """A value as Python and JSON both write it, on one line."""
    return json.dumps(value, ensure_ascii=False)


def number_of(count: float, noun: str) -> str:
    """A count with its noun in the singular or plural."""
    return f"{compact(count)} {noun}{'' if count == 1 else 's'}"


def plain(value: Any) -> str:
    """A recipe's value as YAML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return compact(value) if isinstance(value, float) else str(value)


def rounded(value: float | None) -> float | None:
    """Six digits are more than a standard error has."""
    return None if value is None else round(value, 6)
