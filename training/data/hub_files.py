"""Files of Hub repos as paths: `hf://datasets/me/data/items.parquet`, with `@revision` behind the repo's name if need be."""

import re
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of the client's HTTP library, which is another one in other versions of huggingface_hub
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from configuration.errors import InputError
from training.data.tables import first_line
from training.files import is_disk_full

HUB = "hf://"
KINDS = "datasets|spaces|models"
# Kind, repo, revision and file; without a kind the repo is a model's.
ADDRESS = re.compile(rf"{HUB}(?:({KINDS})/|(?!(?:{KINDS})/))([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")


def is_on_hub(path: str) -> bool:
    """Whether a path is of a Hub repo."""
    return path.startswith(HUB)


def fetch(path: str, name: str) -> Path:
    """Download a file of a repo, or find it in the cache.

    Args:
        path: `hf://datasets/namespace/name[@revision]/path/in/repo`; without `datasets/` of a model's repo.
        name: The field of the recipe that holds the path.

    Raises:
        InputError: if there is no such file, it may not be read, or it cannot be fetched.
    """
    found = ADDRESS.fullmatch(path)
    if found is None:
        raise InputError(
            f"{path}: this is no file of a Hub repo; write hf://datasets/namespace/name/file in {name}, with @revision behind "
            "the repo's name for another one than main"
        )
    kinds, repo, revision, file = found.groups()
    kind, revision = (kinds or "models").removesuffix("s"), unquote(revision or "main")
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision))
    except GatedRepoError as error:
        raise InputError(
            f"{path}: the {kind} {repo} is gated; ask for access on its page, and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{path}: the Hub shows no {kind} {repo} to this login; correct {name}, or run `hf auth login` where the repo is private"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{path}: {repo} has no branch, tag or commit {revision}; correct {name}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"{path}: the file is not in the cache, and {constants.ENDPOINT} does not give it "
            f"({first_line(error.__cause__ or error)}); run the command again with a network and without HF_HUB_OFFLINE"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"{path}: {repo} at {revision} has no file {file}; correct {name}") from error
    except HFValidationError as error:
        raise InputError(f"{path}: {repo!r} is no name of a repo; correct {name}") from error
    except (HTTPError, OSError) as error:
        if is_disk_full(error):
            raise InputError(f"{path}: the disk of {constants.HF_HUB_CACHE} is full; free some space there") from error
        raise InputError(
            f"{path}: cannot be fetched ({first_line(error)}); run the command again once the Hub answers"
        ) from error
