"""A trained run to the Hub: the recommender, its data, a demo; each a repo, each one atomic commit.

Everything is planned and checked before anything is sent.
"""

import json
import logging
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from configuration.errors import InputError
from configuration.load import PROJECT, dump_recipe
from configuration.recipe import Recipe
from training.data.corpora import open_corpora
from training.files import is_disk_full, unwritable
from training.hub.card import card_text
from training.hub.dataset import recipe_for_dataset, write_dataset_folder
from training.hub.folder import CHAT_TEMPLATE, TEXT_ENCODER, USERS, folder_recipe, model_files, public_source
from training.hub.people import without_user_embeddings
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
    same_but_for,
    size_of,
)
from training.hub.report import about_model, about_search, show_changes, show_history, show_people

logger = logging.getLogger("training.push")

CARD = "README.md"
# What an earlier push may have left that this one does not hold: above all users.jsonl, and other shards.
OWNED: dict[RepoType, tuple[str, ...]] = {
    "model": (
        "*.safetensors",
        "*.safetensors.index.json",
        USERS,
        "pictures/*.png",
        "*_cllm4rec.py",
        "handler.py",
        CHAT_TEMPLATE,
        f"{TEXT_ENCODER}/*",
    ),
    "dataset": ("*.parquet",),
    "space": (),
}
MARKS: dict[RepoType, str] = {"model": "modeling_cllm4rec.py", "dataset": "items.parquet", "space": "app.py"}
SPACE_FILES = (
    CARD, "app.py", "buttons.js", "map.html", "map.js", "recommender.py", "requirements.txt", "search.html", "search.js",
    "style.css", "views.py",
)  # fmt: skip
PINNED = re.compile(r'revision="([0-9a-f]{40})"')
COMMIT = re.compile(r"[0-9a-f]{40}")
REFERENCE = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*")


@dataclass(frozen=True)
class Options:
    """How a push is done.

    Attributes:
        private: Whether repos that are made are private.
        branch: The branch of the model and the dataset.
        tag: A tag of the model's new head; None: none.
        dry_run: Say what would go and send nothing.
        user_embeddings: Whether the users' embeddings go.
        ids_are_words: Whether raw user ids that stand in the files are taken for the common words that they are too.
    """

    private: bool = False
    branch: str = MAIN
    tag: str | None = None
    dry_run: bool = False
    user_embeddings: bool = True
    ids_are_words: bool = False


@dataclass
class Plan:
    """What one repo gets.

    Attributes:
        repo: The repo as it is.
        files: Path in the repo to content.
        title: Of the commit.
        licence: As the recipe states it.
        where: Where the licence is to be stated.
        leaves_out: Whether it leaves something about people out that an earlier push may have held.
        card: Of a model, the card for a commit; the first commit's card names none.
        pinned: Of a model, the commit that its card names where only the card may differ.
        people: What it says about people, a sentence each.
        strangers: Raw user ids that stand in its files by file, where no user is published; None where nothing tells which ids to look for.
    """

    repo: Repo
    files: dict[str, Content]
    title: str
    licence: str | None = None
    where: str = ""
    leaves_out: bool = False
    card: Callable[[str | None], bytes] | None = None
    pinned: str | None = None
    people: list[str] = field(default_factory=list)
    strangers: dict[str, list[str]] | None = field(default_factory=dict)

    def changes(self) -> list[Change]:
        """What differs from the repo as it is."""
        return compare(self.repo, self.files, OWNED[self.repo.kind])


def publish(
    run: Path, repo: str | None, *, dataset: str | None = None, space: str | None = None, options: Options | None = None
) -> dict[RepoType, str]:
    """Send a run's `model/`, its data, a demo of it.

    Args:
        run: The run's folder, such as `runs/sample`; nothing in it is changed.
        repo: Name of the model's repo; None: only the data are sent.
        dataset: Name of a dataset repo for the data; not of a refit, which has no split.
        space: Name of a Space for the demo.
        options: How.

    Returns:
        By kind of repo the commit that holds its files; of a model that is the one its card names, not the card's own. Of a
        dry run nothing.

    Raises:
        InputError: if the run is not ready to be published, or the Hub refuses; what was there before is there still.
    """
    options = options or Options()
    check_arguments(run, repo, dataset, space, options)
    check_is_of_the_pretraining(run)
    api = HfApi()
    if not options.dry_run:
        check_login(api)
    repo, dataset, space = (None if name is None else full_name(api, name, options) for name in (repo, dataset, space))
    with ExitStack() as stack:
        plans = []
        if dataset is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cllm4rec-dataset-")))
            plans.append(plan_dataset(api, run, dataset, folder, options))
        if repo is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cllm4rec-model-")))
            plans.append(plan_model(api, run, repo, dataset, folder, options))
        if space is not None and repo is not None:
            plans.append(plan_space(api, repo, space, options))
        for plan in plans:
            show_changes(plan.repo, plan.changes(), dry_run=options.dry_run)
            if plan.people:
                show_people(plan.repo.name, plan.people)
        for plan in plans:
            check(api, plan, options)
        heads: dict[RepoType, str] = {}
        tip = None
        for plan in plans if not options.dry_run else ():
            if plan.card is not None:
                heads["model"], tip = send_model(api, plan, options)
            else:
                heads[plan.repo.kind] = send(api, plan, options)
            if plan.repo.kind == "space":
                show_model(api, plan.repo.name, str(repo), heads["model"])
    if options.tag is not None and tip is not None:
        tag(api, str(repo), options.tag, tip)
    return heads


def check_is_of_the_pretraining(run: Path) -> None:
    """Refuse a model that is older than the corpora and the pretraining beside it.

    Raises:
        InputError: if pretraining was run again since.
    """
    pretrained, finetuned = (run / "checkpoints" / stage / "stage.json" for stage in ("pretrain", "finetune"))
    if pretrained.is_file() and not finetuned.is_file():
        raise InputError(
            f"{run / 'model'} is older than the pretraining beside it; run training/finetune.py and training/predict.py first"
        )


def plan_model(api: HfApi, run: Path, name: str, dataset: str | None, folder: Path, options: Options) -> Plan:
    """The recommender: all of `model/`, its card made for the repo."""
    model = run / "model"
    files: dict[str, Content] = dict(model_files(model))
    recipe, results = folder_recipe(model), read_results(model)
    published = USERS in files
    # A recipe that was changed since, as in what it publishes, is what goes everywhere.
    results["recipe"] = asdict(recipe)
    results["data"]["source"] = public_source(results["data"]["source"])
    files["results.json"] = json.dumps(results, indent=2, ensure_ascii=False).encode()
    if not options.user_embeddings:
        try:
            files |= without_user_embeddings(model, folder)
        except Exception as error:
            if isinstance(error, OSError) or is_disk_full(error):
                raise unwritable(folder, error) from error
            raise
    if dataset is not None:
        recipe = recipe_for_dataset(recipe, on_branch(dataset, options))
        files["recipe.yaml"] = dump_recipe(recipe).encode()
    people = about_model(results, published=published, user_embeddings=options.user_embeddings)
    strangers: dict[str, list[str]] | None = {}

    def card(revision: str | None) -> bytes:
        return card_text(
            results,
            recipe,
            repo_id=name,
            revision=revision,
            dataset=dataset,
            user_embeddings=options.user_embeddings,
            on_hub=True,
            ids_are_words=None if strangers is None else bool(strangers),
        ).encode()

    files[CARD] = card(None)
    if not published:
        # A text encoder of the Hub knows nothing of these people, and its vocabulary may hold any word.
        foreign = f"{TEXT_ENCODER}/" if results["model"].get("text_encoder") else None
        looked_at = {path: content for path, content in files.items() if not (foreign and path.startswith(foreign))}
        searched, strangers = about_search(looked_at, run, but=foreign if len(looked_at) < len(files) else None)
        people += searched
    repo = look(api, name, "model", options)
    plan = Plan(
        repo, files, "Upload the recommender", recipe.license, f"{model / 'recipe.yaml'}: write `license: apache-2.0` there",
        card=card, people=people, strangers=strangers,
        leaves_out=not options.user_embeddings or (not published and USERS in (repo.files or ())),
    )  # fmt: skip
    files[CARD] = card(None)
    if repo.has_branch and all(change.state == "unchanged" or change.path == CARD for change in plan.changes()):
        # Only the card may differ, and the one that is there names the commit of the rest.
        plan.pinned = pinned_revision(api, repo) or repo.head
        files[CARD] = card(plan.pinned)
    return plan


def plan_dataset(api: HfApi, run: Path, name: str, folder: Path, options: Options) -> Plan:
    """The data, as Parquet with a card."""
    corpora, recipe = open_corpora(run / "corpora"), folder_recipe(run / "model")
    if recipe.refit:
        raise InputError(
            f"--dataset: {run} was trained again on all pairs and has no split; send the data with the run that it follows, "
            f"{str(run).removesuffix('-refit')}"
        )
    if any(user["id"] is None for user in corpora.users()):
        raise InputError(
            f"--dataset: somebody in {corpora.folder} was forgotten since it was built, and their pairs and reviews are still there; take "
            "them out of the source and run training/pretrain.py --overwrite and the steps after it, or leave --dataset out"
        )
    write_dataset_folder(corpora, recipe, folder, repo_id=on_branch(name, options))
    files: dict[str, Content] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    page = (folder / CARD).read_text(encoding="utf-8")
    people = [line[2:] for line in page.partition("## About people")[2].splitlines() if line.startswith("- ")]
    people = [sentence for sentence in people if not sentence.startswith("Do not")]
    strangers: dict[str, list[str]] | None = {}
    if not recipe.data.publish_users:
        searched, strangers = about_search(files, run)
        people += searched
    repo = look(api, name, "dataset", options)
    return Plan(
        repo, files, "Upload the data", recipe.data.license,
        f"{run / 'model' / 'recipe.yaml'}: write `license: …` in the section `data` there", people=people,
        strangers=strangers,
        leaves_out=not recipe.data.publish_users and any(path.startswith("interactions/") for path in repo.files or ()),
    )  # fmt: skip


def on_branch(name: str, options: Options) -> str:
    """A dataset repo's name as recipes have it: with the branch behind it, where that is not the one that is opened by default."""
    return name if options.branch == MAIN else f"{name}@{options.branch}"


def plan_space(api: HfApi, model: str, name: str, options: Options) -> Plan:
    """The demo of a model."""
    files: dict[str, Content] = {path: PROJECT / "space" / path for path in SPACE_FILES}
    card = RepoCard.load(PROJECT / "space" / CARD, repo_type="space")
    card.data.models = [model]
    files[CARD] = str(card).encode()
    repo = look(api, name, "space", replace(options, branch=MAIN))
    return Plan(repo, files, f"Show {model}", licence="apache-2.0")


def check(api: HfApi, plan: Plan, options: Options) -> None:
    """Find what stops a plan before anything is sent; a dry run says what would.

    Raises:
        InputError: naming it, and the remedy.
    """
    repo = plan.repo
    check_ours(repo, MARKS[repo.kind])
    refusals = []
    if plan.licence is None and not (repo.private if repo.exists else options.private):
        refusals.append(f"no licence is stated, and a public repo needs one: {plan.where}, or push with --private")
    if plan.strangers is None and not options.ids_are_words:
        refusals.append(
            f"the run has no corpora/, or an earlier version built them, so nothing tells whether raw user ids stand in what goes to "
            f"{repo.name}; put that folder back, build it with training/show_corpus.py and the run's recipe where it is gone, train again "
            "where it is old, publish the users (data.publish_users), or, where any ids in it are common words too, say "
            "--user-ids-are-words"
        )
    if plan.strangers and not options.ids_are_words:
        shown = "; ".join(f"{path}: {', '.join(found)}" for path, found in sorted(plan.strangers.items()))
        refusals.append(
            f"raw user ids stand in what goes to {repo.name} ({shown}); take them out of the data and train again, publish the "
            "users (data.publish_users), or, where they are common words too, say --user-ids-are-words"
        )
    if refusals and not options.dry_run:
        raise InputError(refusals[0])
    for refusal in refusals:
        logger.info("would be refused: %s", refusal)
    if repo.kind == "model" and options.tag is not None and repo.exists:
        taken = tags(api, repo.name).get(options.tag)
        if taken not in (None, repo.head) or (taken and any(c.state != "unchanged" for c in plan.changes())):
            raise InputError(f"{repo.name} has a tag {options.tag!r} already, at {str(taken)[:7]}; choose another one")
    if not options.dry_run:
        content = plan.files[CARD]
        page = content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")
        with hub_errors(api, repo.name):
            # Not RepoCard.validate: before huggingface_hub 2.2 it asks huggingface.co, whatever HF_ENDPOINT says.
            response = get_session().post(
                f"{api.endpoint}/api/validate-yaml",
                json={"repoType": repo.kind, "content": page},
                headers={"Accept": "text/plain"},
            )
            if response.status_code == 400:
                reasons = " ".join(response.text.split())
                raise InputError(
                    f"{repo.name}: the Hub refuses the card's metadata ({reasons}); correct the field of the recipe that it names"
                )
            hf_raise_for_status(response)


def send(api: HfApi, plan: Plan, options: Options) -> str:
    """One commit of what differs, in a repo that is made where it is not there; give the head."""
    repo = plan.repo = create(
        api, plan.repo, private=options.private, sdk="gradio" if plan.repo.kind == "space" else None
    )
    changes, head = plan.changes(), repo.head
    if any(change.state != "unchanged" for change in changes):
        head = commit(api, repo, plan.files, changes, plan.title)
    assert head is not None
    if plan.leaves_out and head != repo.head:
        show_history(repo, sorted(tags(api, repo.name, repo.kind)))
    kind = "" if repo.kind == "model" else f"{repo.kind}s/"
    logger.info("%s/%s%s is at %s", api.endpoint, kind, repo.name, head[:7])
    return head


def send_model(api: HfApi, plan: Plan, options: Options) -> tuple[str, str]:
    """A commit of everything, then one of the card alone, whose snippets name the first; give both."""
    assert plan.card is not None
    if plan.pinned is None:
        pinned = head = send(api, plan, options)
        plan.files[CARD] = plan.card(pinned)
        repo, changes = replace(plan.repo, head=pinned), [Change(CARD, size_of(plan.files[CARD]), "changed")]
        told = f". The model is there, at {pinned}; only its card does not name that yet"
    else:
        pinned, repo, changes, told = plan.pinned, plan.repo, plan.changes(), ""
        head = str(repo.head)
    if any(change.state != "unchanged" for change in changes):
        try:
            head = commit(api, repo, plan.files, changes, f"Pin the card's snippets to {pinned[:7]}")
        except InputError as error:
            raise InputError(f"{error}{told}") from error
    logger.info(
        'open %s with pipeline("recommendation", model="%s", revision="%s", trust_remote_code=True)',
        repo.name, repo.name, pinned,
    )  # fmt: skip
    return pinned, head


def show_model(api: HfApi, space: str, model: str, revision: str) -> None:
    """Tell a Space which model it shows, at which commit."""
    with hub_errors(api, space):
        api.add_space_variable(space, "CLLM4REC_MODEL", model)
        api.add_space_variable(space, "CLLM4REC_REVISION", revision)
        private = api.repo_info(model).private
    if private:
        logger.info(
            "%s is private: give the Space a token that may read it, as the secret HF_TOKEN in its settings", model
        )


def check_ready(repo: str, recipe: Recipe, *, private: bool) -> None:
    """Find what would stop a push before the work that comes before it.

    Raises:
        InputError: if nobody is logged in, the name is none, or a public push has no licence.
    """
    api, options = HfApi(), Options(private=private)
    check_login(api)
    there = look(api, full_name(api, repo, options), "model", options)
    check_ours(there, MARKS["model"])
    if recipe.license is None and not (there.private if there.exists else private):
        raise InputError(
            "license: none is stated in the recipe, and a public repo needs one; say license=apache-2.0 or --private"
        )


def check_arguments(run: Path, repo: str | None, dataset: str | None, space: str | None, options: Options) -> None:
    """Refuse arguments that say too little or the wrong thing.

    Raises:
        InputError: naming the right ones.
    """
    if not run.is_dir():
        raise InputError(f"{run}: there is no such folder; give a run's, such as runs/sample")
    if (run / "config.json").is_file() and not (run / "model").is_dir():
        raise InputError(f"{run} is a model's folder; give the run's, {run.resolve().parent}")
    if repo is None and dataset is None:
        raise InputError("nothing to send: name a repo for the model, as in me/my-recommender, or --dataset me/my-data")
    if repo is None and (space or options.tag or not options.user_embeddings):
        raise InputError(
            "--space, --tag and --without-user-embeddings are about a model: name its repo too, as in me/my-recommender"
        )
    if COMMIT.fullmatch(options.branch):
        raise InputError(f"--revision {options.branch} is a commit; name a branch, which the push moves on")
    for flag, name in (("--revision", options.branch), ("--tag", options.tag)):
        if name is not None and not REFERENCE.fullmatch(name):
            raise InputError(f"{flag} {name!r}: letters, digits, '.', '_', '-' and '/' make a name")
    if options.tag == options.branch:
        raise InputError(f"--tag {options.tag}: there is a branch of that name; choose another one")


def read_results(model: Path) -> dict[str, Any]:
    """The figures in a model's folder.

    Raises:
        InputError: if the file is damaged.
    """
    try:
        results = json.loads((model / "results.json").read_text(encoding="utf-8"))
        results["data"]["counts"]["users"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{model / 'results.json'} is damaged; run training/predict.py --overwrite") from error
    return dict(results)


def check_login(api: HfApi) -> str:
    """The name of whoever is logged in.

    Raises:
        InputError: if nobody is.
    """
    with hub_errors(api, None):
        return str(api.whoami()["name"])


def full_name(api: HfApi, name: str, options: Options) -> str:
    """`namespace/name`; a bare name is in the namespace of whoever is logged in.

    Raises:
        InputError: if it is none, or there is no login to tell the namespace.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name!r} is no name of a repo; give namespace/name, as in me/my-recommender") from error
    if "/" in name:
        return name
    if options.dry_run and get_token() is None:
        raise InputError(f"{name!r}: give namespace/name, as in me/{name}, or log in with `hf auth login`")
    return f"{check_login(api)}/{name}"


def look(api: HfApi, name: str, kind: RepoType, options: Options) -> Repo:
    """The repo as it is; a dry run that cannot reach it says so.

    Raises:
        InputError: if it is public and shall be private, or the Hub cannot be asked.
    """
    try:
        repo = look_at(api, name, kind, options.branch)
    except InputError as error:
        if not options.dry_run:
            raise
        logger.info("%s was not looked at: %s", name, error)
        return Repo(name, kind, options.branch, seen=False)
    if options.private and repo.exists and not repo.private:
        raise InputError(
            f"{name} is there already and public, which --private does not change; make it private in its settings first"
        )
    return repo


def tags(api: HfApi, name: str, kind: RepoType = "model") -> dict[str, str]:
    """The tags of a repo and the commits that they name."""
    with hub_errors(api, name):
        return {ref.name: ref.target_commit for ref in api.list_repo_refs(name, repo_type=kind).tags}


def tag(api: HfApi, name: str, new: str, head: str) -> None:
    """Tag a commit, which may have that tag already."""
    if tags(api, name).get(new) != head:
        with hub_errors(api, name):
            api.create_tag(name, tag=new, revision=head)


def pinned_revision(api: HfApi, repo: Repo) -> str | None:
    """The commit that the snippets of the card on the Hub name, if it holds what the branch holds but for the card."""
    if CARD not in (repo.files or {}):
        return None
    with hub_errors(api, repo.name):
        path = api.hf_hub_download(repo.name, CARD, repo_type=repo.kind, revision=repo.head)
    found = PINNED.search(Path(path).read_text(encoding="utf-8"))
    return found[1] if found and same_but_for(api, repo, found[1], CARD) else None
