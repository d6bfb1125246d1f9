"""What a push says before it sends anything: the files with their sizes, and what of them is about people."""

import logging
from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

from training.data.corpora import DROPPED_USERS, Corpora
from training.hub.folder import USERS
from training.hub.privacy import found_user_ids
from training.hub.repo import Change, Content, Repo

logger = logging.getLogger("training.push")


def show_changes(repo: Repo, changes: Sequence[Change], *, dry_run: bool) -> None:
    """What goes, with sizes."""
    where = (
        "not looked at"
        if not repo.seen
        else f"branch {repo.branch}, now at {str(repo.head)[:7]}"
        if repo.exists
        else "a new repo"
    )
    lines = [f"{repo.kind} {repo.name} ({where})"]
    lines += [f"  {change.state:<9} {in_bytes(change.size):>9}  {change.path}" for change in changes]
    sent = [change for change in changes if change.state in ("new", "changed")]
    if any(change.state != "unchanged" for change in changes):
        size = in_bytes(sum(change.size for change in sent))
        lines.append(f"  {len(sent)} of {len(changes)} files, {size} {'would go' if dry_run else 'go'}")
    else:
        lines.append("  nothing differs from what is there")
    logger.info("%s", "\n".join(lines))


def about_model(results: dict[str, Any], *, published: bool, user_embeddings: bool) -> list[str]:
    """What the recommender says about people, a sentence each."""
    users = results["data"]["counts"]["users"]
    return [
        f"raw ids, texts and training histories of {users:,} users, in {USERS}, as data.publish_users says"
        if published
        else f"no {USERS}",
        f"embeddings of {users:,} users, by number: they tell whoever knows somebody's number what that person is likely to take; "
        "--without-user-embeddings leaves them out"
        if user_embeddings
        else "no embeddings of users: people are served by their history",
        "how often each item was taken, in items.jsonl",
    ]


def about_search(
    files: Mapping[str, Content], run: Path, but: str | None = None
) -> tuple[list[str], dict[str, list[str]] | None]:
    """Whether raw user ids stand in files that shall hold none.

    Args:
        files: Path in the repo to content.
        run: The run's folder.
        but: What was left out of the files.

    Returns:
        Sentences, and the ids that were found by file; None where the run's corpora are gone, or an earlier
        version built them, so that not all were looked for.
    """
    ids = user_ids(run)
    if ids is None:
        return ["whether raw user ids stand anywhere was not looked at: the run has no corpora/"], None
    found, looked_for = found_user_ids(files, ids)
    if not found:
        few = "" if looked_for == len(ids) else " (shorter ones and short numbers stand anywhere by chance)"
        sentences = [
            f"none of the {looked_for:,} raw user ids that are long enough to be looked for stands in any file{f' but those of {but}' if but else ''}{few}"
        ]
        if not (run / "corpora" / DROPPED_USERS).is_file():
            sentences.append(
                "the raw ids of users that the filters dropped were not looked for: an earlier version built corpora/, and did not keep them"
            )
            return sentences, None
        return sentences, {}
    return [], found


def show_people(name: str, sentences: Sequence[str]) -> None:
    """What is said about people."""
    logger.info("%s", "\n".join([f"about people, {name}:", *(f"  - {sentence}" for sentence in sentences)]))


def show_history(repo: Repo, tags: Sequence[str]) -> None:
    """How to remove from a repo's history what this push leaves out."""
    branch = "" if repo.branch == "main" else f", branch={repo.branch!r}"
    logger.info(
        "what %s held about people before stays in its history. To remove it there: HfApi().super_squash_history(%r, "
        "repo_type=%r%s)%s",
        repo.name, repo.name, repo.kind, branch,
        f", and delete the tags {', '.join(tags)}, which hold it too" if tags else "",
    )  # fmt: skip


def user_ids(run: Path) -> list[str | int] | None:
    """The raw user ids of a run, also of those whom the filters dropped; None where its corpora are gone."""
    corpora = Corpora(run / "corpora", info={})
    if not (corpora.folder / USERS).is_file():
        return None
    known = [user["id"] for user in corpora.users()]
    return [*(raw for raw in known if raw is not None), *corpora.dropped_users()]  # None: forgotten since


def in_bytes(size: int) -> str:
    """A size for people."""
    power = 0 if size < 1000 else int(min(log10(size) // 3, 4))
    return f"{size} B" if power == 0 else f"{size / 1000**power:.1f} {'kMGT'[power - 1]}B"
