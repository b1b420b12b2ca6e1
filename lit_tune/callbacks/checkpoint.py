"""When checkpoints are written and which are kept; how they are written is `lit_tune.checkpoint`'s business."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.checkpoint import BEST, DIRECTORY, AtomicCheckpointIO, step_checkpoints, step_path
from lit_tune.errors import InputError


class Checkpoint(Callback):
    """Save checkpoints at optimizer steps, at every epoch's end and on request; keep the last ones and the best.

    A checkpoint is saved when all that belongs to its step is over: at the start of the next one, when the loggers have
    its row and a validation that was due is done. This callback goes before all others, so that it sees them between
    two steps.

    Args:
        every_n_steps: Save after every n optimizer steps; 0 for at the epochs' ends only.
        every_minutes: Save also when this much time has passed since the last one.
        keep_last: How many of the newest to keep, beside the best by validation loss.
        asynchronous: Write in the background: training stops for a copy to host memory only, which takes that memory.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        every_minutes: float | None = None,
        keep_last: int = 1,
        asynchronous: bool = False,
    ) -> None:
        if every_n_steps < 0:
            raise InputError(f"checkpoint.every_n_steps is {every_n_steps}; it must be 0 or more.")
        if every_minutes is not None and every_minutes <= 0:
            raise InputError(f"checkpoint.every_minutes is {every_minutes}; it must be more than 0.")
        if keep_last < 1:
            raise InputError(f"checkpoint.keep_last is {keep_last}; it must be 1 or more.")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.run: Path | None = None
        self.best_loss = float("inf")
        self.newest: Path | None = None
        self.clock: Callable[[], float] = time.monotonic
        self.longest_save_s = 0.0
        self._flush_logs: Callable[[], None] = lambda: None
        self._saved_at = 0.0
        self._saved_step: int | None = None
        self._epoch: int | None = None  # of the step that began last
        self._improved = False
        self._validation_due = False

    def bind(self, run: Path | None, *, flush_logs: Callable[[], None] = lambda: None) -> None:
        """Take the run's directory; without one nothing is saved.

        Args:
            flush_logs: Writes out what the loggers hold, so that a checkpoint never knows more than they do.
        """
        self.run = run
        self._flush_logs = flush_logs

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Under torchrun every rank has chosen a name for itself; rank 0's holds.
        self.run = trainer.strategy.broadcast(self.run)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run is not None:
            check_space(self.run, checkpoint_bytes(pl_module), copies=self.keep_last + 2)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = self.clock()
        # What a run begins or goes on with need not be saved, save after a validation that it did not have yet.
        self._saved_step = None if self._validation_due else trainer.global_step
        self._validation_due = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not batch["first_of_step"]:
            return
        epoch_began = self._epoch not in (None, batch["epoch"])
        self._epoch = batch["epoch"]
        if epoch_began or self._improved or self._saved_step is None or self._due(trainer):
            self.save(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        counts = trainer.state.fn == "fit" and not trainer.sanity_checking
        if counts and loss is not None and float(loss) < self.best_loss:
            self.best_loss = float(loss)
            self._improved = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self.wait(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["validation_due"] = self._validation_due

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._validation_due = checkpoint["validation_due"]
        if self.run is not None:
            self.newest = step_path(self.run, checkpoint["global_step"])

    def save(self, trainer: Trainer, *, validation_due: bool = False) -> None:
        """Save now, if this step is not saved yet (called on all ranks, between two steps).

        Args:
            validation_due: Lightning was about to validate, or was at it; whoever continues does it first.
        """
        step = trainer.global_step
        if self.run is None or self._saved_step == step:
            return
        started = self.clock()
        path = step_path(self.run, step)
        self._flush_logs()
        self._validation_due = validation_due
        keep = partial(settle, path, improved=self._improved, keep_last=self.keep_last)
        trainer.save_checkpoint(path, storage_options={"after": keep})
        self._improved = self._validation_due = False
        self.newest, self._saved_step, self._saved_at = path, step, self.clock()
        self.longest_save_s = max(self.longest_save_s, self._saved_at - started)

    def wait(self, trainer: Trainer) -> None:
        """Wait until what is saved is on the disk."""
        if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            trainer.strategy.checkpoint_io.wait()

    def _due(self, trainer: Trainer) -> bool:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        if self.every_minutes is None:
            return False
        # Clocks differ between ranks, and saving is a collective act: rank 0's clock decides.
        return bool(trainer.strategy.broadcast(self.clock() - self._saved_at >= 60 * self.every_minutes))


def settle(path: Path, *, improved: bool, keep_last: int) -> None:
    """Do what follows when a checkpoint is on the disk: it may be the best one, and the others go.

    Also those of later steps: the run went on from an earlier one, or past a damaged one, and makes them anew.
    """
    run = path.parent.parent
    if improved:
        link(path, path.with_name(BEST))
    saved = step_checkpoints(run)
    for later in saved[: saved.index(path)]:
        later.unlink(missing_ok=True)
    prune(run, keep_last)


def link(path: Path, target: Path) -> None:
    """Make `target` another name of the file `path` (no second copy on disk), replacing what was there at once."""
    fresh = target.with_name(f".{target.name}.partial")
    fresh.unlink(missing_ok=True)
    try:
        os.link(path, fresh)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, fresh)
    fresh.replace(target)


def prune(run: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` step checkpoints, and what interrupted saves left behind."""
    for path in step_checkpoints(run)[keep_last:]:
        path.unlink(missing_ok=True)
    for stray in (run / DIRECTORY).glob(".*.partial"):
        stray.unlink(missing_ok=True)


def checkpoint_bytes(module: torch.nn.Module) -> int:
    """Return about how large a checkpoint gets: what trains, and two fp32 numbers of Adam for each."""
    sizes = [(p.numel(), p.element_size()) for p in module.parameters() if p.requires_grad]
    return sum(count * (width + 8) for count, width in sizes)


def check_space(run: Path, needed_each: int, *, copies: int) -> None:
    """Refuse to start a run whose checkpoints will not fit.

    Args:
        needed_each: Bytes of one checkpoint.
        copies: How many lie on the disk at the worst moment: the kept ones, the best and the one being written.

    Raises:
        InputError: Less space is free.
    """
    free = shutil.disk_usage(run).free
    if free < needed_each * copies:
        gib = 1024**3
        raise InputError(
            f"{run}: {needed_each * copies / gib:.1f} GiB are needed there for {copies} checkpoints, "
            f"{free / gib:.1f} GiB are free; free some, set trainer.default_root_dir to another disk, "
            "or lower checkpoint.keep_last."
        )
