"""A trained run to the Hub: the recommender, its data, a demo; each a repo, each one atomic commit."""

import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, RepoCard, get_token

from configuration.errors import InputError
from configuration.load import PROJECT, dump_recipe
from configuration.recipe import Recipe
from training.data.corpora import Corpora, open_corpora
from training.files import unwritable
from training.hub.card import card_text
from training.hub.dataset import recipe_for_dataset, write_dataset_folder
from training.hub.folder import USERS, folder_recipe, model_files
from training.hub.people import without_user_embeddings
from training.hub.privacy import found_user_ids
from training.hub.repo import (
    MAIN,
    Change,
    Content,
    Repo,
    RepoType,
    check_ours,
    commit,
    compare,
    create,
    hub_errors,
    look_at,
    size_of,
)

logger = logging.getLogger("training.push")

CARD = "README.md"
# What an earlier push may have left that this one does not hold: above all users.jsonl, and other shards.
OWNED = {
    "model": ("*.safetensors", "*.safetensors.index.json", USERS, "pictures/*.png", "*_cllm4rec.py", "handler.py"),
    "dataset": ("*.parquet",),
    "space": (),
}
MARKS = {"model": "modeling_cllm4rec.py", "dataset": "items.parquet", "space": "app.py"}
PINNED = re.compile(r'revision="([0-9a-f]{40})"')
SPACE_FILES = (".css", ".html", ".js", ".md", ".py", ".txt")


@dataclass(frozen=True)
class Options:
    """How a push is done.

    Attributes:
        private: Whether repos that are made are private.
        branch: The branch of the model and the dataset.
        tag: A tag of the model's new head; None: none.
        dry_run: Print what would go and send nothing.
        user_embeddings: Whether the users' embeddings go.
    """

    private: bool = False
    branch: str = MAIN
    tag: str | None = None
    dry_run: bool = False
    user_embeddings: bool = True


def publish(
    run: Path, repo: str | None, *, dataset: str | None = None, space: str | None = None, options: Options | None = None
) -> dict[RepoType, str]:
    """Send a run's `model/`, its data, a demo of it.

    Args:
        run: The run's folder, such as `runs/sample`; nothing in it is changed.
        repo: Name of the model's repo; None: only the data are sent.
        dataset: Name of a dataset repo for the data.
        space: Name of a Space for the demo.
        options: How.

    Returns:
        The commit that each repo is at, by kind; of a dry run nothing.

    Raises:
        InputError: if the run is not ready to be published, or the Hub refuses; what was there before is there still.
    """
    options = options or Options()
    if repo is None and dataset is None:
        raise InputError("nothing to send: name a repo for the model, as in me/my-recommender, or --dataset me/my-data")
    if space is not None and repo is None:
        raise InputError("--space shows a model of the Hub: name its repo too, as in me/my-recommender")
    api = HfApi()
    if not options.dry_run:
        check_login(api)
    repo, dataset, space = (None if name is None else full_name(api, name, options) for name in (repo, dataset, space))
    heads: dict[RepoType, str] = {}
    with ExitStack() as stack:
        if dataset is not None:
            corpora = open_corpora(run / "corpora")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cllm4rec-dataset-")))
            heads |= publish_dataset(api, corpora, folder_recipe(run / "model"), dataset, folder, options)
            if "dataset" in heads:
                dataset = f"{dataset}@{heads['dataset']}"
        if repo is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cllm4rec-model-")))
            heads |= publish_model(api, run, repo, dataset, folder, options)
        if space is not None and repo is not None:
            heads |= publish_space(api, repo, heads.get("model"), space, options)
    return heads


def publish_model(
    api: HfApi, run: Path, name: str, dataset: str | None, folder: Path, options: Options
) -> dict[RepoType, str]:
    """The recommender: a commit of everything, then one of the card, whose snippets name the first.

    The recipe that goes names `dataset`, a repo with `@commit` where it was pushed just now.
    """
    model = run / "model"
    files: dict[str, Content] = dict(model_files(model))
    recipe = folder_recipe(model)
    if not options.user_embeddings:
        try:
            files |= without_user_embeddings(model, folder)
        except OSError as error:
            raise unwritable(folder, error) from error
    if dataset is not None:
        recipe = recipe_for_dataset(recipe, dataset)
        files["recipe.yaml"] = dump_recipe(recipe).encode()
    results = json.loads((model / "results.json").read_text(encoding="utf-8"))

    def card(revision: str | None) -> bytes:
        return card_text(
            results,
            recipe,
            repo_id=name,
            revision=revision,
            dataset=dataset and dataset.split("@")[0],
            user_embeddings=options.user_embeddings,
        ).encode()

    files[CARD] = card(None)
    repo = look(api, name, "model", options)
    check_ours(repo, MARKS["model"])
    if options.tag is not None:
        check_tag(api, repo, options.tag)
    changes = compare(repo, files, OWNED["model"])
    pinned = None
    if all(change.state == "unchanged" or change.path == CARD for change in changes):
        # Only the card may differ, and the one that is there names the commit of the rest.
        pinned = pinned_revision(api, repo) or repo.head
        files[CARD] = card(pinned)
        changes = compare(repo, files, OWNED["model"])
    show_changes(repo, changes, options)
    show_people(run, files, results, options)
    check_licence(
        repo,
        recipe.license,
        options,
        f"{model / 'recipe.yaml'}: no licence is stated, and a public repo needs one: write `license: apache-2.0` (or what "
        "it is) there, or push with --private",
    )
    if options.dry_run:
        return {}
    repo = create(api, repo, private=options.private)
    if pinned is None:
        changes = compare(repo, files, OWNED["model"])
        pinned = commit(api, repo, files, changes, "Upload the recommender")
        repo, files[CARD] = replace(repo, head=pinned), card(pinned)
        changes = [Change(CARD, size_of(files[CARD]), "changed")]
    head = repo.head
    if any(change.state != "unchanged" for change in changes):
        try:
            head = commit(api, repo, files, changes, f"Pin the card's snippets to {pinned[:7]}")
        except InputError as error:
            raise InputError(
                f"{error}. The model is there, at {pinned}; only its card does not name that yet"
            ) from error
    assert head is not None
    if options.tag is not None:
        with hub_errors(api, name):
            api.create_tag(name, tag=options.tag, revision=head)
    logger.info(
        "%s/%s is at %s; open it with pipeline(\"recommendation\", model=\"%s\", revision=\"%s\", trust_remote_code=True)",
        api.endpoint, name, head[:7], name, pinned,
    )  # fmt: skip
    return {"model": pinned}


def publish_dataset(
    api: HfApi, corpora: Corpora, recipe: Recipe, name: str, folder: Path, options: Options
) -> dict[RepoType, str]:
    """The data, as Parquet with a card."""
    write_dataset_folder(corpora, recipe, folder, repo_id=name)
    files: dict[str, Content] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    repo = look(api, name, "dataset", options)
    check_licence(
        repo,
        recipe.data.license,
        options,
        f"{name}: no licence of the data is stated, and a public repo needs one: write `license: …` in the section `data` of "
        "the run's model/recipe.yaml, or push with --private",
    )
    return send_plainly(api, repo, files, "Upload the data", options)


def publish_space(api: HfApi, model: str, revision: str | None, name: str, options: Options) -> dict[RepoType, str]:
    """The demo of a model, at the commit that was pushed."""
    files: dict[str, Content] = {
        path.name: path for path in sorted((PROJECT / "space").iterdir()) if path.suffix in SPACE_FILES
    }
    card = RepoCard.load(PROJECT / "space" / CARD, repo_type="space")
    card.data.models = [model]
    files[CARD] = str(card).encode()
    repo = look(api, name, "space", replace(options, branch=MAIN))
    heads = send_plainly(api, repo, files, f"Show {model}", options, sdk="gradio")
    if not options.dry_run:
        with hub_errors(api, name):
            api.add_space_variable(name, "CLLM4REC_MODEL", model)
            if revision is not None:
                api.add_space_variable(name, "CLLM4REC_REVISION", revision)
            private = api.repo_info(model).private
        if private:
            logger.info(
                "%s is private: give the Space a token that may read it, as the secret HF_TOKEN in its settings", model
            )
    return heads


def send_plainly(
    api: HfApi, repo: Repo, files: Mapping[str, Content], title: str, options: Options, sdk: str | None = None
) -> dict[RepoType, str]:
    """Show and send what differs in one commit."""
    check_ours(repo, MARKS[repo.kind])
    changes = compare(repo, files, OWNED[repo.kind])
    show_changes(repo, changes, options)
    if options.dry_run:
        return {}
    repo = create(api, repo, private=options.private, sdk=sdk)
    changes = compare(repo, files, OWNED[repo.kind])
    head = repo.head
    if any(change.state != "unchanged" for change in changes):
        head = commit(api, repo, files, changes, title)
    assert head is not None
    logger.info("%s/%ss/%s is at %s", api.endpoint, repo.kind, repo.name, head[:7])
    return {repo.kind: head}


def check_ready(repo: str, recipe: Recipe, *, private: bool) -> None:
    """Find what would stop a push before the work that comes before it.

    Raises:
        InputError: if nobody is logged in, the name is none, or a public push has no licence.
    """
    api = HfApi()
    check_login(api)
    name = full_name(api, repo, Options(private=private))
    there = look_at(api, name, "model")
    check_ours(there, MARKS["model"])
    if recipe.license is None and not (there.private if there.exists else private):
        raise InputError(
            "license: none is stated in the recipe, and a public repo needs one; say license=apache-2.0 or --private"
        )


def check_licence(repo: Repo, licence: str | None, options: Options, sentence: str) -> None:
    """Refuse to make something public whose licence nobody stated; a dry run says so.

    Raises:
        InputError: the sentence.
    """
    if licence is None and not (repo.private if repo.exists else options.private):
        if not options.dry_run:
            raise InputError(sentence)
        logger.info("would be refused: %s", sentence)


def check_login(api: HfApi) -> str:
    """The name of whoever is logged in.

    Raises:
        InputError: if nobody is.
    """
    with hub_errors(api, str(api.endpoint)):
        return str(api.whoami()["name"])


def full_name(api: HfApi, name: str, options: Options) -> str:
    """`namespace/name`; a bare name is in the namespace of whoever is logged in."""
    if "/" in name:
        return name
    if options.dry_run and get_token() is None:
        raise InputError(f"{name!r}: give namespace/name, as in me/{name}, or log in with `hf auth login`")
    return f"{check_login(api)}/{name}"


def look(api: HfApi, name: str, kind: RepoType, options: Options) -> Repo:
    """The repo as it is; of a dry run that cannot reach it, as if there were none."""
    try:
        repo = look_at(api, name, kind, options.branch)
    except InputError as error:
        if not options.dry_run or "is no name" in str(error):
            raise
        logger.info("%s was not looked at: %s", name, error)
        return Repo(name, kind, options.branch)
    if options.private and repo.exists and not repo.private:
        raise InputError(
            f"{name} is there already and public, which --private does not change; make it private in its settings first"
        )
    return repo


def check_tag(api: HfApi, repo: Repo, tag: str) -> None:
    """Refuse a tag that is taken.

    Raises:
        InputError: naming where it points.
    """
    if repo.exists:
        with hub_errors(api, repo.name):
            taken = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo.name).tags}
        if tag in taken:
            raise InputError(f"{repo.name} has a tag {tag!r} already, at {taken[tag][:7]}; choose another one")


def pinned_revision(api: HfApi, repo: Repo) -> str | None:
    """The commit that the snippets of the card on the Hub name."""
    if CARD not in (repo.files or {}):
        return None
    with hub_errors(api, repo.name):
        path = api.hf_hub_download(repo.name, CARD, repo_type=repo.kind, revision=repo.head)
    found = PINNED.search(Path(path).read_text(encoding="utf-8"))
    return found[1] if found else None


def show_changes(repo: Repo, changes: Sequence[Change], options: Options) -> None:
    """What goes, with sizes."""
    verb = "would go" if options.dry_run else "goes"
    where = "a new repo" if not repo.exists else f"branch {repo.branch}, now at {str(repo.head)[:7]}"
    lines = [f"{repo.kind} {repo.name} ({where})"]
    lines += [f"  {change.state:<9} {in_bytes(change.size):>9}  {change.path}" for change in changes]
    sent = [change for change in changes if change.state in ("new", "changed")]
    lines.append(
        f"  {len(sent)} of {len(changes)} files, {in_bytes(sum(change.size for change in sent))} {verb}"
        if any(change.state != "unchanged" for change in changes)
        else "  nothing differs from what is there"
    )
    logger.info("%s", "\n".join(lines))
    if any(change.state == "deleted" and change.path == USERS for change in changes):
        logger.info(
            "  %s goes from the branch but stays in its history: to remove it there too, HfApi().super_squash_history(%r)",
            USERS, repo.name,
        )  # fmt: skip


def show_people(run: Path, files: Mapping[str, Content], results: dict[str, Any], options: Options) -> None:
    """What the push says about people."""
    users = results["data"]["counts"]["users"]
    lines = ["about people:"]
    if USERS in files:
        lines.append(
            f"  raw ids, texts and training histories of {users:,} users, in {USERS}, as data.publish_users says"
        )
    else:
        ids = user_ids(run)
        if ids is None:
            lines.append(
                f"  no {USERS}; whether raw user ids stand elsewhere was not looked at: there is no corpora/ here"
            )
        else:
            found, looked_for = found_user_ids(files, ids)
            lines.append(
                f"  no {USERS}, and none of the {looked_for:,} raw user ids that are no mere number, in any file"
            )
            if found:
                shown = "; ".join(f"{path}: {', '.join(names)}" for path, names in sorted(found.items()))
                lines[-1] = (
                    f"  no {USERS}, but words that are raw user ids too: {shown}. Look whether they are common words"
                )
    if options.user_embeddings:
        lines.append(
            f"  embeddings of {users:,} users, by number: they tell whoever knows somebody's number what that person is likely "
            "to take; --without-user-embeddings leaves them out"
        )
    else:
        lines.append("  no embeddings of users: people are served by their history")
    lines.append("  how often each item was taken, in items.jsonl")
    logger.info("%s", "\n".join(lines))


def user_ids(run: Path) -> list[Any] | None:
    """The raw user ids of a run; None where its corpora are gone."""
    path = run / "corpora" / USERS
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["id"] for line in lines]


def in_bytes(size: int) -> str:
    """A size for people."""
    power = 0 if size < 1000 else int(min(np.log10(size) // 3, 4))
    return f"{size} B" if power == 0 else f"{size / 1000**power:.1f} {'kMGT'[power - 1]}B"
