"""Files and folders that are there whole or not at all: written under a temporary name, then renamed."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configuration.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_IN_WORDS = ("No space left on device", "inline_container.cc", "PytorchStreamWriter failed")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error.

    Raises:
        InputError: if the disk is full or may not be written; what was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield temporary
        temporary.chmod(0o755)
        take_place(temporary, path)
    except Exception as error:
        if is_disk_full(error):
            raise unwritable(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Rename a folder to `path`; what was there comes back if that fails."""
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    try:
        path.rename(old / path.name)
        new.rename(path)
    except BaseException:
        if not path.exists():
            (old / path.name).rename(path)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def file_written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    Raises:
        InputError: if the disk is full or may not be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except Exception as error:
        if isinstance(error, OSError) or is_disk_full(error):
            raise unwritable(path, error) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises as [`file_written_whole`]."""
    with file_written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file whole or not at all; raises as [`file_written_whole`]."""
    with file_written_whole(path) as temporary:
        shutil.copyfile(source, temporary)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space: safetensors says so in words only, torch.save names its C++ file at best."""
    return getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_IN_WORDS)


def unwritable(path: Path, error: BaseException) -> InputError:
    """The sentence for a folder or file that cannot be written."""
    if is_disk_full(error):
        return InputError(
            f"{path}: the disk is full; nothing was changed there, free some space and run the command again"
        )
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path}: cannot be written ({reason}); choose another folder with output_dir=…")
