"""What a person can get wrong, each through the command line: one sentence, exit code 2, nothing half-written."""

import errno
import gzip
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors import SafetensorError
from transformers import AutoTokenizer

from training import finetune, predict, pretrain, show_corpus

STAGES = {"pretrain": pretrain, "finetune": finetune, "predict": predict, "show_corpus": show_corpus}
STAGE = {"epochs": 1, "batch_size": 16, "warmup_epochs": 0}
FULL = OSError(errno.ENOSPC, "No space left on device")
RUST_FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
TORCH_FULL = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with a good table and the recipe that reads it; it is the current folder."""
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path)
    return tmp_path


def write_shop(folder):
    rows = [
        (f"u{user}", f"i{(user + 3 * place) % 8}", place % 5 + 1, 10 * place) for user in range(6) for place in range(5)
    ]
    frame = pd.DataFrame(rows, columns=["user", "item", "rating", "time"])
    frame["review"] = "It is what it is, says " + frame["user"]
    frame.to_csv(folder / "shop.csv", index=False)
    recipe = {
        "output_dir": "runs",
        "device": "cpu",
        "tracker": "none",
        "data": {
            "path": "shop.csv", "rating_column": "rating", "timestamp_column": "time", "review_column": "review",
        },
        "backbone": {
            "config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 64},
            "num_words": 270,
        },
        "method": {"initialisation": "random", "distillation": 0.0, "max_text_tokens": 16},
        "pretrain": STAGE,
        "finetune": STAGE,
        "evaluation": {"baselines": ["popularity"]},
    }  # fmt: skip
    (folder / "shop.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture
def call(monkeypatch):
    """Run a script with a command line."""

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        STAGES[script].main()

    return call


@pytest.fixture
def complaint(call, capsys):
    """The sentence with which a script ends, the only line that it writes to stderr."""

    def complaint(*words, script="pretrain", bars=False):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            call(script, *words)
        assert ended.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        if bars:  # of what was done before
            assert not any("Traceback" in line for line in lines)
            lines = [line for line in lines if "error" in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return complaint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a shop whose three stages were run; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    write_shop(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script in ("pretrain", "finetune", "predict"):
            patch.setattr(sys, "argv", [f"{script}.py", "--config", "shop.yaml"])
            STAGES[script].main()
    return folder


@pytest.fixture
def done(finished, tmp_path, monkeypatch):
    """A copy of the finished shop; it is the current folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_names(sentence, *parts):
    for part in parts:
        assert part in sentence


def edit(folder, old, new, name="shop.csv"):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


# The table


def test_a_good_table_is_no_error(shop, call):
    call("pretrain", "--config", "shop.yaml")
    assert (shop / "runs/shop/checkpoints/pretrain/final/model.safetensors").is_file()


def a_missing_file(folder):
    (folder / "shop.csv").unlink()
    return ["shop.csv", "there is no such file", "data.path"]


def a_wrong_column(folder):
    edit(folder, "user,", "usr,")
    return ["shop.csv", "no column 'user'", "data.user_column", "did you mean 'usr'"]


def an_empty_file(folder):
    (folder / "shop.csv").write_text("")
    return ["shop.csv", "is empty"]


def a_table_without_rows(folder):
    (folder / "shop.csv").write_text("user,item,rating,time,review\n")
    return ["shop.csv", "has no rows"]


def a_rating_that_is_no_number(folder):
    edit(folder, "u0,i3,2,10", "u0,i3,good,10")
    return ["shop.csv, row 3, column 'rating'", "'good' is not a number"]


def a_missing_id(folder):
    edit(folder, "u0,i6,", "u0,,")
    return ["shop.csv, row 4, column 'item'", "the id is missing"]


def a_time_that_is_none(folder):
    edit(folder, "u0,i6,3,20", "u0,i6,3,yesterday")
    return ["shop.csv, row 4, column 'time'", "'yesterday' is neither a unix time nor an ISO date"]


def a_row_with_too_many_cells(folder):
    edit(folder, "u0,i6,3,20", "u0,i6,3,20,more")
    return ["shop.csv, row 4", "6 cells where the first row has 5"]


def text_that_is_not_utf_8(folder):
    content = (folder / "shop.csv").read_bytes()
    (folder / "shop.csv").write_bytes(content.replace(b"says u1", "sägt u1".encode("latin-1"), 1))
    return ["shop.csv, row 7", "0xe4, is not UTF-8"]


@pytest.mark.parametrize(
    "spoil",
    [
        a_missing_file,
        a_wrong_column,
        an_empty_file,
        a_table_without_rows,
        a_rating_that_is_no_number,
        a_missing_id,
        a_time_that_is_none,
        a_row_with_too_many_cells,
        text_that_is_not_utf_8,
    ],
)
@pytest.mark.parametrize("script", ["pretrain", "show_corpus"])
def test_a_table_with_a_fault_is_refused(shop, complaint, spoil, script):
    parts = spoil(shop)
    assert_names(complaint("--config", "shop.yaml", script=script), *parts)
    assert not (shop / "runs").exists()


def test_an_item_described_twice_is_refused(shop, complaint):
    (shop / "items.csv").write_text("id,text\ni0,one\ni1,two\ni0,three\n")
    sentence = complaint("--config", "shop.yaml", "data.items.path=items.csv", "data.items.text_columns=[text]")
    assert_names(sentence, "items.csv, row 4, column 'id'", "'i0' is already in row 2")
    assert not (shop / "runs").exists()


def test_a_table_of_users_that_lacks_some_is_refused(shop, complaint):
    (shop / "users.csv").write_text("id,text\nu0,one\nu1,two\nu2,three\nu3,four\n")
    sentence = complaint("--config", "shop.yaml", "data.users.path=users.csv", "data.users.text_columns=[text]")
    assert_names(sentence, "users.csv", "lacks 2 of 6 users ('u4', 'u5')")
    assert not (shop / "runs").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["data.min_user_interactions=6"], ["no interaction is left of 30", "data.min_user_interactions 6"]),
        (["data.min_item_interactions=9"], ["no interaction is left of 30", "data.min_item_interactions 9"]),
        (["data.min_rating=6"], ["no interaction is left", "data.min_rating is 6, the highest rating 5"]),
        (["data.min_rating=5"], ["data.split: no user has an item for validation"]),
        (["data.min_rating=3", "data.rating_column=none"], ["data.min_rating is 3", "data.rating_column"]),
    ],
    ids=lambda value: "" if len(value) == 2 and "data." not in value[1] else str(value[0]),
)
def test_filters_that_leave_nothing_are_refused(shop, complaint, words, parts):
    assert_names(complaint("--config", "shop.yaml", *words), *parts)
    assert not (shop / "runs").exists()


def test_unknown_names_of_splits_are_refused(shop, complaint):
    frame = pd.read_csv(shop / "shop.csv")
    frame["part"] = ["train", "train", "train", "validation", "test"] * 6
    frame.loc[7, "part"] = "dev"
    frame.to_csv(shop / "shop.csv", index=False)
    sentence = complaint("--config", "shop.yaml", "data.split=given", "data.split_column=part")
    assert_names(sentence, "shop.csv, row 9, column 'part'", "'dev' is no split", "train, validation, test")
    assert not (shop / "runs").exists()


@pytest.mark.parametrize("keep", [0.5, 0.99], ids=["half", "almost all"])
def test_a_truncated_parquet_file_is_refused(shop, complaint, keep):
    pd.read_csv(shop / "shop.csv").to_parquet(shop / "shop.parquet")
    content = (shop / "shop.parquet").read_bytes()
    (shop / "shop.parquet").write_bytes(content[: int(keep * len(content))])
    sentence = complaint("--config", "shop.yaml", "data.path=shop.parquet")
    assert_names(sentence, "shop.parquet", "truncated or not Parquet")
    assert not (shop / "runs").exists()


@pytest.mark.parametrize("keep", [0.5, 0.99], ids=["half", "almost all"])
def test_a_truncated_gzip_file_is_refused(shop, complaint, keep):
    content = gzip.compress((shop / "shop.csv").read_bytes())
    (shop / "shop.csv.gz").write_bytes(content[: int(keep * len(content))])
    sentence = complaint("--config", "shop.yaml", "data.path=shop.csv.gz")
    assert_names(sentence, "shop.csv.gz", "truncated")
    assert not (shop / "runs").exists()


# The recipe


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--config", "smaple"], ["recipe 'smaple'", "no such file", "the nearest is 'sample'"]),
        (["--config", "shop.yaml", "--method", "papr"], ["recipe 'papr'", "the nearest is 'paper'"]),
        (["--config", "shop.yaml", "finetune.l=1"], ["no field 'finetune.l'", "'finetune.lr'"]),
        (["--config", "shop.yaml", "finetune.lr=fast"], ["'finetune.lr'", "'fast'", "a number"]),
        (["--config", "shop.yaml", "device=gpu"], ["device: 'gpu' is no device", "auto, cpu"]),
        (["--config", "shop.yaml", "device=cuda:77"], ["device: 'cuda:77' is not on this machine", "auto, cpu"]),
        (["--config", "shop.yaml", "tracker=wanda"], ["tracker 'wanda'"]),
        (["--config", "shop.yaml", "backbone.name=no/such"], ["backbone.name", "'no/such'"]),
        (["--config", "shop.yaml", "backbone.name=."], ["backbone.name", "'.'"]),
        (["--config", "shop.yaml", "backbone.config.model_type=gtp2"], ["backbone.config", "'gtp2'", "'gpt2'"]),
        (["--config", "shop.yaml", "backbone.config.model_type=t5"], ["backbone.config", "no decoder 't5'"]),
        (["--config", "shop.yaml", "backbone.config.n_head=3"], ["backbone.config", "divisible by num_heads"]),
        (["--config", "shop.yaml", "backbone.config.n_layer=deep"], ["backbone.config", "n_layer"]),
        (["--config", "shop.yaml", "backbone.config.n_embd=-8"], ["backbone.config", "negative dimension"]),
        (
            ["--config", "shop.yaml", "backbone.config.n_layer=0", "method.readout=last"],
            ["method.readout", "0 layers", "mean"],
        ),
        ([], ["data.path is not set"]),
    ],
    ids=lambda value: " ".join(value) if not value or "=" in value[-1] or value[0] == "--config" else "",
)
def test_an_unknown_recipe_field_device_or_backbone_is_refused(shop, complaint, words, parts):
    assert_names(complaint(*words), *parts)
    assert not (shop / "runs").exists()


def test_a_tokenizer_with_more_words_than_its_backbone_is_refused(shop, complaint, backbone_folder):
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder)
    tokenizer.add_tokens([f"<added {number}>" for number in range(1000)])
    tokenizer.save_pretrained(backbone_folder)
    sentence = complaint("--config", "shop.yaml", f"backbone.name={backbone_folder}", bars=True)
    assert_names(sentence, "backbone.name", str(backbone_folder), "take the added ones out")


@pytest.mark.parametrize("spoilt", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_backbone_is_refused(shop, complaint, backbone_folder, spoilt):
    content = (backbone_folder / spoilt).read_bytes()
    (backbone_folder / spoilt).write_bytes(content[: len(content) // 2])
    sentence = complaint("--config", "shop.yaml", f"backbone.name={backbone_folder}", bars=True)
    assert_names(sentence, "backbone.name", str(backbone_folder))
    assert not (shop / "runs").exists()


# Runs that are there


@pytest.mark.parametrize(
    ("script", "words", "parts"),
    [
        ("pretrain", [], ["runs/shop/checkpoints/pretrain exists already", "--resume", "--overwrite"]),
        ("finetune", [], ["runs/shop/checkpoints/finetune exists already", "--resume", "--overwrite"]),
        ("predict", [], ["runs/shop/results.json exists already", "--overwrite"]),
        ("pretrain", ["--resume", "--overwrite"], ["--resume and --overwrite exclude each other"]),
        ("pretrain", ["--resume", "data.min_rating=2"], ["checkpoints/pretrain", "another data set"]),
        ("pretrain", ["--resume", "backbone.config.n_embd=4"], ["checkpoints/pretrain", "backbone"]),
        ("finetune", ["--overwrite", "backbone.config.n_embd=4"], ["checkpoints/pretrain", "backbone"]),
        ("finetune", ["--overwrite", "data.min_rating=2"], ["checkpoints/pretrain", "another data set"]),
        ("predict", ["--overwrite", "backbone.config.n_embd=4"], ["checkpoints/pretrain", "backbone"]),
        ("predict", ["--overwrite", "data.examples=[[i0, i9]]"], ["data.examples", "'i9'"]),
    ],
    ids=lambda value: " ".join(value) if not isinstance(value, str) and value and value[0].startswith("--") else "",
)
def test_what_does_not_fit_a_run_that_is_there_is_refused(done, complaint, script, words, parts):
    before = snapshot(done / "runs")
    assert_names(complaint("--config", "shop.yaml", *words, script=script), *parts)
    assert snapshot(done / "runs") == before


def test_a_table_that_changed_under_a_run_is_refused(done, complaint):
    edit(done, "u0,i6,3,20", "u0,i6,4,20")
    before = snapshot(done / "runs")
    sentence = complaint("--config", "shop.yaml", "--resume")
    assert_names(sentence, "checkpoints/pretrain", "another data set", "--overwrite")
    assert snapshot(done / "runs") == before


def test_a_start_from_no_run_is_refused(shop, complaint):
    sentence = complaint("--config", "shop.yaml", "--init-from", "runs/other", bars=True)
    assert_names(sentence, "--init-from runs/other", "no trained run is there")
    assert not (shop / "runs").exists()


@pytest.mark.parametrize("script", ["finetune", "predict"])
def test_a_stage_before_its_turn_is_refused(shop, complaint, script):
    assert_names(complaint("--config", "shop.yaml", script=script), "runs/shop", "run training/pretrain.py")
    assert not (shop / "runs").exists()


# A full disk


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


def fail_on(target, name, error, part):
    """`target.name` as it is, but failing where the path in its arguments has `part` in it."""
    real = getattr(target, name)

    def failing(*arguments, **keywords):
        if any(part in str(argument) for argument in (*arguments, *keywords.values())):
            raise error
        return real(*arguments, **keywords)

    return failing


@pytest.mark.parametrize(
    ("target", "error", "place"),
    [
        ("datasets.Dataset.save_to_disk", FULL, "runs/shop/corpora"),
        ("training.data.corpora.write_json_lines", FULL, "runs/shop/corpora"),
    ],
)
def test_a_disk_that_is_full_before_training_leaves_no_folder(shop, complaint, monkeypatch, target, error, place):
    monkeypatch.setattr(target, fail(error))
    sentence = complaint("--config", "shop.yaml", bars=True)
    assert_names(sentence, f"{place}: the disk is full", "free some space and run the command again")
    assert not (shop / "runs").exists()


CHECKPOINTS = [
    ("transformers.modeling_utils.safe_save_file", RUST_FULL, "best"),
    ("accelerate.checkpointing.save", TORCH_FULL, "last"),
    ("accelerate.Accelerator.save_state", FULL, "last"),
]


@pytest.mark.parametrize(("target", "error", "place"), CHECKPOINTS)
def test_a_disk_that_is_full_at_the_first_checkpoint_leaves_none_and_the_command_works_again(
    shop, complaint, call, monkeypatch, target, error, place
):
    with monkeypatch.context() as patch:
        patch.setattr(target, fail(error))
        sentence = complaint("--config", "shop.yaml", bars=True)
    assert_names(sentence, f"runs/shop/checkpoints/pretrain/{place}: the disk is full")
    left = [path.name for path in (shop / "runs/shop/checkpoints/pretrain").iterdir()]
    assert left == ["best"][: place == "last"]
    call("pretrain", "--config", "shop.yaml", *["--resume"][: place == "last"])
    assert (shop / "runs/shop/checkpoints/pretrain/final/model.safetensors").is_file()


@pytest.mark.parametrize(("target", "error", "place"), CHECKPOINTS)
def test_a_disk_that_is_full_at_a_later_checkpoint_keeps_the_earlier_one(
    shop, complaint, call, monkeypatch, target, error, place
):
    from training.stages import loop

    save, kept = loop.save_checkpoint, {}

    def second_fails(accelerator, towers, folder, progress, better):
        if progress.epoch == 2:
            kept.update(snapshot((shop / folder) / place))
            monkeypatch.setattr(target, fail(error))
        save(accelerator, towers, folder, progress, better or progress.epoch == 2)

    words = ["--config", "shop.yaml", "pretrain.epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", second_fails)
        complaint(*words, bars=True)
    assert kept == snapshot(shop / "runs/shop/checkpoints/pretrain" / place)
    assert {path.name for path in (shop / "runs/shop/checkpoints/pretrain").iterdir()} == {
        "best",
        "last",
        "progress.json",
    }


@pytest.mark.parametrize(
    ("script", "target", "name", "error", "part", "place"),
    [
        ("pretrain", Path, "write_text", FULL, ".recipe.yaml.part", "recipe.yaml"),
        ("finetune", shutil, "copyfile", FULL, "model.safetensors", "model"),
        ("finetune", shutil, "copyfile", FULL, "tokenization_cllm4rec.py", "model"),
        ("finetune", Path, "write_text", FULL, "recipe.yaml", "model"),
        (
            "predict",
            "pyarrow.parquet.ParquetWriter",
            "write_table",
            FULL,
            "",
            "predictions/part-00000-of-00001.parquet",
        ),
        ("predict", "pyarrow.parquet.ParquetWriter", "close", FULL, "", "predictions/part-00000-of-00001.parquet"),
        ("predict", "matplotlib.figure.Figure", "savefig", FULL, "items.png", "pictures"),
        ("predict", Path, "write_text", FULL, ".results.json.part", "results.json"),
    ],
)
def test_a_disk_that_is_full_leaves_what_was_there(
    done, complaint, monkeypatch, script, target, name, error, part, place
):
    before = snapshot(done / "runs")
    if isinstance(target, str):
        module, _, attribute = target.rpartition(".")
        target = getattr(sys.modules[module], attribute)
    monkeypatch.setattr(target, name, fail_on(target, name, error, part))
    sentence = complaint("--config", "shop.yaml", "--overwrite", script=script, bars=True)
    assert_names(sentence, f"runs/shop/{place}: the disk is full")
    after = snapshot(done / "runs")
    for path in (done / "runs/shop" / place).rglob("*") if "." not in place else [done / "runs/shop" / place]:
        assert before.get(path) == after.get(path)
    assert [path for path in (done / "runs").rglob("*") if path.name.startswith(".")] == []


def test_a_disk_that_is_full_at_the_teacher_leaves_none(shop, complaint, monkeypatch):
    monkeypatch.setattr("training.stages.teacher.save_file", fail(RUST_FULL))
    sentence = complaint("--config", "shop.yaml", "method.initialisation=ials", bars=True)
    assert_names(sentence, "runs/shop/checkpoints/teacher: the disk is full")
    assert list((shop / "runs/shop/checkpoints").iterdir()) == []


def test_a_folder_that_may_not_be_written_is_named(shop, complaint):
    (shop / "runs").write_text("a file")
    assert_names(complaint("--config", "shop.yaml"), "runs/shop", "cannot be written", "output_dir")
