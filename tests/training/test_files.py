import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from configuration.errors import InputError
from training.files import write_text, written_whole


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def save(error, path):
    with written_whole(path) as target:
        (target / "new").write_text("new")
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[True, False], ids=["replacing", "new"])
def replacing(request, tmp_path):
    """Whether `kept/` with an old file is there already."""
    if request.param:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "old").write_text("old")
    return request.param


def assert_unchanged(tmp_path, replacing):
    assert names(tmp_path) == (["kept"] if replacing else [])
    if replacing:
        assert names(tmp_path / "kept") == ["old"]


def test_a_folder_takes_its_place_when_the_block_ends(tmp_path, replacing):
    with written_whole(tmp_path / "kept") as target:
        (target / "new").write_text("new")
        assert (tmp_path / "kept").exists() == replacing
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["new"]
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o755


def test_folders_on_the_way_are_made(tmp_path):
    with written_whole(tmp_path / "a" / "b"):
        pass
    write_text(tmp_path / "c" / "d.txt", "text")
    assert names(tmp_path) == ["a", "c"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), InputError("wrong")])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path, replacing, error):
    with pytest.raises(type(error)):
        save(error, tmp_path / "kept")
    assert_unchanged(tmp_path, replacing)


def test_an_error_while_the_folders_are_exchanged_leaves_what_was_there(tmp_path, replacing, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if self.name.startswith(".kept-") and target == tmp_path / "kept":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError), written_whole(tmp_path / "kept") as target:
        (target / "new").write_text("new")
    assert_unchanged(tmp_path, replacing)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
    ],
)
def test_a_full_disk_is_told_in_a_sentence_and_leaves_what_was_there(tmp_path, replacing, error):
    with pytest.raises(InputError, match="kept: the disk is full; nothing was changed there"):
        save(error, tmp_path / "kept")
    assert_unchanged(tmp_path, replacing)


def test_a_folder_that_may_not_be_written_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(InputError, match=r"kept: cannot be written \(.+\); choose another folder with output_dir"),
        written_whole(tmp_path / "file" / "kept"),
    ):
        pass


def test_a_text_replaces_the_one_before(tmp_path):
    for text in ("one", "zwölf ✓"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a.txt: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), r"a.txt: cannot be written \(Permission denied\)"),
    ],
)
@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_text_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, error, sentence, method):
    write_text(tmp_path / "a.txt", "before")
    monkeypatch.setattr(Path, method, raising(error))
    with pytest.raises(InputError, match=sentence):
        write_text(tmp_path / "a.txt", "after")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_a_text_below_a_file_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"a\.txt: cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "text")
