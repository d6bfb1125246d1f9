"""What `watched.py` wrote of a stage of the shop, and what the run itself kept."""

import json


def seen(folder, stage, rank=0):
    """What a process noted of a stage."""
    return json.loads((folder / f"{stage}-{rank}.json").read_text())


def losses(folder, stage):
    """The loss of each step."""
    return [loss for _, loss, _ in seen(folder, stage)["steps"]]


def epochs(folder, stage):
    """The record of each epoch, without its times."""
    records = json.loads((folder / "runs/shop/checkpoints" / stage / "progress.json").read_text())["epochs"]
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]
