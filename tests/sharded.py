"""Train the tiny Llama on shards and tell what each rank held: `python -m tests.sharded JOB.json`, once for each rank.

The job names base and records; every rank writes beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from lit_tune.data.instruct import InstructData
from lit_tune.errors import NonFiniteError
from lit_tune.memory import bytes_on, gradient_tensors, optimizer_tensors
from lit_tune.modules.llama import LlamaTuner
from tests.tiny_run import Watch, train

WORLD = 2


class Held(Callback):
    """Record the bytes that a rank holds at the end of the first step, and where its model was made."""

    def __init__(self) -> None:
        self.made_empty = False
        self.gradients = 0
        self.bytes: dict[str, int] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        configure = pl_module.configure_model

        def configured() -> None:
            configure()
            self.made_empty = next(pl_module.model.parameters()).is_meta

        pl_module.configure_model = configured

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients = bytes_on("cpu", gradient_tensors(pl_module))  # gone after the step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if batch["step"] == 0 and batch["last_of_step"]:
            self.bytes = {
                "weights": bytes_on("cpu", pl_module.model.parameters()),
                "gradients": self.gradients,
                "optimizer": bytes_on("cpu", optimizer_tensors(trainer.optimizers[0])),
            }


def records_of(path: str) -> InstructData:
    """Make the data of the job: 8 samples a step, on two ranks or one."""
    return InstructData(path=path, template="chatml", micro_batch_size=2, val_fraction=0.3)


def run(base: str, records: str, **settings: Any) -> tuple[Watch, Held]:
    """Train with gradient checkpointing."""
    watch, held = Watch(), Held()
    module = LlamaTuner(base=base, method="fft", learning_rate=1e-3, gradient_checkpointing="full")
    train(module, records_of(records), watch, held, max_epochs=2, **settings)
    return watch, held


def break_off(base: str, records: str, **settings: Any) -> str:
    """Train at a rate that leads to NaN, and return what the run says."""
    module = LlamaTuner(base=base, method="fft", learning_rate=1e30, warmup=0, schedule="constant")
    try:
        train(module, records_of(records), **settings)
    except NonFiniteError as error:
        return str(error)
    return ""


def main(job: Path) -> None:
    """Do the job of one rank."""
    torch.set_num_threads(1)
    asked = json.loads(job.read_text())
    on = {"strategy": "fsdp2", "devices": WORLD, "accumulate_grad_batches": 2}  # 2 ranks x 2 x 2 samples
    watch, held = run(asked["base"], asked["records"], **on)
    said = break_off(asked["base"], asked["records"], **on)
    found = {
        "losses": watch.losses,
        "gradients": watch.gradients,
        "made_empty": held.made_empty,
        "bytes": held.bytes,
        "said": said,
    }
    torch.save(found, job.with_suffix(f".{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
