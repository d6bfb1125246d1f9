"""A repo on the Hub: what lies there, what a push would change, one atomic commit of it, and the Hub's errors in a sentence."""

import fnmatch
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client's HTTP library, which is another one in other versions of huggingface_hub
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from configuration.errors import InputError
from training.files import is_disk_full

logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset", "space"]
Content = Path | bytes
State = Literal["new", "changed", "unchanged", "deleted"]

MAIN = "main"
# What a repo may hold without being somebody's: what the site itself puts there, or a person by hand.
BY_THE_SITE = (".gitattributes", "README.md", "LICENSE*")


@dataclass(frozen=True)
class Repo:
    """A branch of a repo as a push finds it.

    Attributes:
        name: `namespace/name`.
        kind: model, dataset or space.
        branch: The branch that is pushed to.
        exists: Whether the repo is there.
        head: Commit that a push starts from; None where there is no repo.
        has_branch: Whether the branch is there; one that is not starts from main.
        private: Whether the repo is private.
        files: Of each file, `sha256:` or `git:` and its hash.
        seen: Whether the Hub was asked.
    """

    name: str
    kind: RepoType
    branch: str
    exists: bool = False
    head: str | None = None
    has_branch: bool = False
    private: bool | None = None
    files: Mapping[str, str] | None = None
    seen: bool = True


@dataclass(frozen=True)
class Change:
    """What a push does to a file: its path, the size in bytes of what is sent, and how it stands to what is there."""

    path: str
    size: int
    state: State


def look_at(api: HfApi, name: str, kind: RepoType, branch: str = MAIN) -> Repo:
    """Read a branch's head and the hashes of its files.

    Raises:
        InputError: if the Hub cannot be asked.
    """
    with hub_errors(api, name):
        try:
            info = api.repo_info(name, repo_type=kind, revision=branch, files_metadata=True)
            has_branch = True
        except RevisionNotFoundError:
            if branch == MAIN:
                raise
            info, has_branch = api.repo_info(name, repo_type=kind, revision=MAIN, files_metadata=True), False
        except RepositoryNotFoundError:
            return Repo(name, kind, branch)
    return Repo(name, kind, branch, True, info.sha, has_branch, info.private, hashes(info.siblings))


def hashes(siblings: Sequence[RepoSibling] | None) -> dict[str, str]:
    """Of each file of a commit, `sha256:` or `git:` and its hash."""
    return {
        entry.rfilename: f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        for entry in siblings or ()
    }


def same_but_for(api: HfApi, repo: Repo, revision: str, path: str) -> bool:
    """Whether a commit is there and holds what the branch holds, but for one file."""
    with hub_errors(api, repo.name):
        try:
            info = api.repo_info(repo.name, repo_type=repo.kind, revision=revision, files_metadata=True)
        except RevisionNotFoundError:
            return False
    there, here = hashes(info.siblings), dict(repo.files or {})
    there.pop(path, None), here.pop(path, None)
    return there == here


def check_ours(repo: Repo, mark: str) -> None:
    """Refuse to write over what this project did not make.

    Args:
        repo: The repo.
        mark: A file that every push of this kind holds.

    Raises:
        InputError: if the repo holds something else.
    """
    others = [path for path in repo.files or () if not any(fnmatch.fnmatch(path, known) for known in BY_THE_SITE)]
    if others and mark not in others:
        raise InputError(
            f"{repo.name} holds something else already ({', '.join(sorted(others)[:3])} …); choose another name, or delete "
            "that repo on the site first"
        )


def compare(repo: Repo, files: Mapping[str, Content], owned: Sequence[str] = ()) -> list[Change]:
    """What a push of these files changes, by path.

    Args:
        repo: The repo.
        files: Path in the repo to file or content.
        owned: Patterns of files that an earlier push may have written; those that are not among `files` go.
    """
    there = repo.files or {}
    changes = []
    for path, content in files.items():
        state: State = "new" if path not in there else "unchanged" if is_same(content, there[path]) else "changed"
        changes.append(Change(path, size_of(content), state))
    gone = [path for path in there if path not in files and any(fnmatch.fnmatch(path, known) for known in owned)]
    return sorted([*changes, *(Change(path, 0, "deleted") for path in gone)], key=lambda change: change.path)


def create(api: HfApi, repo: Repo, *, private: bool, sdk: str | None = None) -> Repo:
    """Make the repo and its branch where they are not there, and look again.

    Raises:
        InputError: if the name is taken or may not be used.
    """
    with hub_errors(api, repo.name):
        if not repo.exists:
            api.create_repo(repo.name, repo_type=repo.kind, private=private, space_sdk=sdk)
        if repo.branch != MAIN and not repo.has_branch:
            api.create_branch(repo.name, branch=repo.branch, repo_type=repo.kind, exist_ok=True)
    return repo if repo.has_branch else look_at(api, repo.name, repo.kind, repo.branch)


def commit(api: HfApi, repo: Repo, files: Mapping[str, Content], changes: Sequence[Change], title: str) -> str:
    """Send what differs in one commit on top of the head that was looked at; give the new head.

    Large files go up first; nobody sees any of it before the commit, which is there whole or not at all.

    Raises:
        InputError: if the branch moved meanwhile, or for any other trouble with the Hub.
    """
    operations = [
        CommitOperationDelete(path_in_repo=change.path)
        if change.state == "deleted"
        else CommitOperationAdd(path_in_repo=change.path, path_or_fileobj=files[change.path])
        for change in changes
        if change.state != "unchanged"
    ]
    with hub_errors(api, repo.name):
        try:
            return api.create_commit(
                repo.name,
                operations,
                commit_message=title,
                repo_type=repo.kind,
                revision=repo.branch,
                parent_commit=repo.head,
            ).oid
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code != 412:
                raise
            # The answer may have been lost, or the client sent the commit twice: then what moved the branch was this push.
            head = arrived(api, repo, files, changes)
            if head is None:
                raise
            return head


def arrived(api: HfApi, repo: Repo, files: Mapping[str, Content], changes: Sequence[Change]) -> str | None:
    """The branch's head if it holds what was sent, else None."""
    with suppress(InputError):
        now = look_at(api, repo.name, repo.kind, repo.branch)
        sent = {change.path: files[change.path] for change in changes if change.state != "deleted"}
        gone = {change.path for change in changes if change.state == "deleted"}
        if not gone & set(now.files or ()) and all(change.state == "unchanged" for change in compare(now, sent)):
            return now.head
    return None


def is_same(content: Content, known: str) -> bool:
    """Whether a file is what the repo has, by SHA-256 of a large one and by git's hash of a small one."""
    kind, _, digest = known.partition(":")
    if isinstance(content, Path):
        return digest_of_file(content, kind, content.stat().st_mtime_ns) == digest
    found = new_hash(kind, len(content))
    found.update(content)
    return found.hexdigest() == digest


@cache
def digest_of_file(path: Path, kind: str, mtime_ns: int) -> str:
    """The hash of a file, which is asked for several times in a push: of gigabytes it is computed once."""
    found = new_hash(kind, path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def new_hash(kind: str, size: int) -> "hashlib._Hash":
    """SHA-256, or git's hash of a file of so many bytes."""
    return hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {size}\0".encode())


def size_of(content: Content) -> int:
    """Bytes of a file or content."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def hub_errors(api: HfApi, name: str | None) -> Iterator[None]:
    """Turn every trouble with the Hub into a sentence that says what to do; what lies here is as it was, in any case.

    Raises:
        InputError: instead of what the client raised.
    """
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # The client wraps what stopped the upload of a large file into an error that names the file.
        wrapped = isinstance(error, RuntimeError) and "uploading" in str(error) and error.__cause__ is not None
        sentence = in_words(error.__cause__ if wrapped else error, name, str(api.endpoint))
        if sentence is None:
            raise
        raise InputError(sentence) from error


def in_words(error: BaseException | None, name: str | None, endpoint: str) -> str | None:
    """The sentence for what the client raised; None for what is no trouble with the Hub."""
    if isinstance(error, LocalTokenNotFoundError):
        return f"not logged in to {endpoint}; run `hf auth login`, or set HF_TOKEN to a token that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so {endpoint} cannot be asked; unset it and run the command again"
    if isinstance(error, HFValidationError):
        return f"{name!r} is no name of a repo; give namespace/name, as in me/my-recommender"
    if isinstance(error, HfHubHTTPError):
        return status_in_words(error, name or endpoint, endpoint)
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        whole = f"{name} holds all of the last push or of this one, nothing between: " if name else ""
        return (
            f"no connection to {endpoint} ({first_line(error)}); {whole}run the command again once the network is there"
            + (", what was sent already is not sent twice" if name else "")
        )
    if isinstance(error, OSError):
        return (
            f"the disk is full; {name or endpoint} and the folder here are as they were: free some space and run the command again"
            if is_disk_full(error)
            else f"{name or endpoint}: {first_line(error)}"
        )
    if isinstance(error, ValueError) and "metadata" in str(error).lower():
        reasons = " ".join(str(error).split()).removeprefix("- Error: ")
        return (
            f"{name}: the Hub refuses the card's metadata ({reasons}); correct the fields of the recipe that it names"
        )
    return None


def status_in_words(error: HfHubHTTPError, name: str, endpoint: str) -> str:
    """The sentence for an answer of the Hub."""
    status, said = error.response.status_code, first_line(error.server_message or error)
    if status == 401:
        return (
            f"{endpoint} does not know this token ({said}); run `hf auth login` again, or set HF_TOKEN to a valid token"
        )
    if status == 403:
        return (
            f"{name}: this token may not write there ({said}); make one that may at {endpoint}/settings/tokens, or push to a "
            "namespace of your own"
        )
    if status == 404:
        return (
            f"{name}: there is no such repo, branch or tag that this token sees ({said}); correct the name or the token"
        )
    if status == 409:
        return f"{name}: the name is taken ({said}); choose another one"
    if status == 412:
        return (
            f"{name}: the branch moved while this was being sent: somebody else pushed; nothing of theirs was touched, look at "
            "it and run the command again"
        )
    if status == 429:
        return f"{endpoint} asks for patience ({said}); run the command again in some minutes"
    if status >= 500:
        return f"{endpoint} has trouble of its own ({status}: {said}); {name} is as it was: run the command again later"
    return f"{name}: the Hub refuses it ({status}: {said})"


def first_line(error: object) -> str:
    """The first line of a message, or the name of the error where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
