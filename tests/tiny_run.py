"""Whole runs on the tiny base: by Lightning's Trainer, or by the `lit-tune` command within the test's process."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lit_tune import cli, strategies  # noqa: F401  # makes its strategies known by name
from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.continuation import Continuation
from lit_tune.checkpoint import AtomicCheckpointIO
from lit_tune.data.instruct import InstructData
from lit_tune.modules.llama import LlamaTuner

RECORDS = 19  # prime, so that no batch divides it: an epoch's last optimizer step is a short one


def write_records(path: Path, count: int = RECORDS) -> str:
    """Write Alpaca records of unequal length to `path`, every third with an input."""
    words = ["yes", "no", "the sea", "a hat in the wind", "seven", "Stop."]
    records = [
        {
            "instruction": f"Say {words[i % 6]} {i} times." if i % 3 else f"Count {words[-i % 6]}.",
            "input": "" if i % 3 else words[i % 5],
            "output": " ".join(words[(i + k) % 6] for k in range(1 + i * 7 % 5)),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


class Watch(Callback):
    """Record what happens in the optimizer steps: losses, gradients as they are before clipping, weights."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []  # of each step, all in one vector
        self.weights: list[dict[str, Tensor]] = []  # of what trains: before training, then after each step

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights.append(trained_weights(pl_module))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [whole(p.grad).flatten() for p in pl_module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if batch["last_of_step"]:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.weights.append(trained_weights(pl_module))


def trained_weights(module: LlamaTuner) -> dict[str, Tensor]:
    """Return a copy of all parameters that train."""
    return {name: whole(p).clone() for name, p in module.model.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without its gradient; of a sharded one, the shards of all ranks, which all call this."""
    found: Any = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def vector(weights: dict[str, Tensor]) -> Tensor:
    """Return weights as one vector."""
    return torch.cat([weight.flatten() for weight in weights.values()])


def make_trainer(callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """Make a quiet CPU trainer that logs and saves nothing by itself."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "gradient_clip_val": 1.0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def saving(run: Path, data: InstructData, *, every_n_steps: int = 1) -> list[Callback]:
    """Return the callbacks that save the checkpoints of a run in its directory and let it go on from any of them."""
    run.mkdir(exist_ok=True)
    checkpoint = Checkpoint(every_n_steps=every_n_steps, keep_last=99)
    checkpoint.bind(run)
    return [checkpoint, Continuation(data.place_after)]


def train(
    module: LlamaTuner,
    data: InstructData,
    *callbacks: Callback,
    seed: int = 0,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    """Fit `module` on `data`; `settings` are the trainer's."""
    seed_everything(seed, verbose=False)
    trainer = make_trainer(callbacks, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=str(ckpt_path) if ckpt_path else None)
    return trainer


def lit_tune(*arguments: str) -> int:
    """Run a command of `lit-tune` in this process and return its exit code."""
    command: Callable[[], None] = lambda: cli.run(list(arguments))  # noqa: E731
    try:
        return cli.exit_code(command)
    except SystemExit as stop:  # the parser's own errors
        return int(stop.code or 0)
