"""Run a training script as `python` or `accelerate launch` would, and write down what each process saw.

accelerate launch … tests/slow/watched.py FOLDER pretrain --config shop.yaml

FOLDER gets `<stage>-<rank>.json`: of each step the objective, the global loss and the documents of this process; the parameters
and the heads' weights as they were trained; the modules that FSDP2 wraps. After the first epoch the run's folder is copied to
`FOLDER/<stage>-broken-off`, as a kill would leave it.
"""

import inspect
import json
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import training.run
from benchmarks.memory import fully_sharded
from configuration.load import PROJECT
from training.stages import loop

RANK = int(os.environ.get("RANK", "0"))


class Watch:
    """What a stage did in this process."""

    def __init__(self, folder, stage):
        self.folder, self.stage = folder, stage
        self.steps, self.parameters, self.heads, self.wrapped = [], {}, {}, []

    def of_train_step(self, train_step):
        """`train_step`, its documents and its loss noted."""

        def watched(*args, **kwargs):
            call = inspect.signature(train_step).bind(*args, **kwargs).arguments
            objective, model, mine = call["objective"], call["model"], []

            def collate(documents, *rest):
                mine.extend(documents.tolist())
                return objective.collate(documents, *rest)

            self.parameters = {name: describe(parameter) for name, parameter in model.named_parameters()}
            self.heads = {
                name: describe(head.get_output_embeddings().weight) for name, head in call["towers"].heads.items()
            }
            self.wrapped = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
            loss = train_step(**call | {"objective": replace(objective, collate=collate)})
            # A process without a document works on a stand-in that weighs nothing.
            self.steps.append([objective.name, loss.item(), mine if len(call["documents"]) > RANK else []])
            return loss

        return watched

    def of_save_checkpoint(self, save_checkpoint):
        """`save_checkpoint`, and a copy of the run's folder after the first epoch."""

        def watched(accelerator, towers, folder, progress, *rest):
            save_checkpoint(accelerator, towers, folder, progress, *rest)
            if progress.epoch == 1 and accelerator.is_main_process:
                shutil.copytree(folder.parents[1], self.folder / f"{self.stage}-broken-off")

        return watched

    def write(self):
        """Leave it for the test."""
        seen = {"steps": self.steps, "parameters": self.parameters, "heads": self.heads, "wrapped": self.wrapped}
        (self.folder / f"{self.stage}-{RANK}.json").write_text(json.dumps(seen))


def describe(parameter):
    """Its class, its whole shape, and the shape of what this process holds."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return [type(parameter.data).__name__, list(parameter.shape), list(local.shape)]


def main():
    """`watched.py FOLDER STAGE [--fully-shard | --dense]`, and behind it what the stage's script takes.

    `--dense`: ID tables have dense gradients, as they have under FSDP2.

    One process may go through several stages, `pretrain,finetune`; several processes cannot meet a second time.
    """
    folder, stages, *words = sys.argv[1:]
    if words[0] == "--fully-shard":
        training.run.make_accelerator = fully_sharded(training.run.make_accelerator)
        words = words[1:]
    elif words[0] == "--dense":
        loop.choose_sparse_tables = lambda *args, **kwargs: []
        words = words[1:]
    train_step, save_checkpoint = loop.train_step, loop.save_checkpoint
    for stage in stages.split(","):
        watch = Watch(Path(folder), stage)
        loop.train_step = watch.of_train_step(train_step)
        loop.save_checkpoint = watch.of_save_checkpoint(save_checkpoint)
        sys.argv = [str(PROJECT / "training" / f"{stage}.py"), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
        watch.write()


if __name__ == "__main__":
    main()
