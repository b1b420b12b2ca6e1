"""Ctrl-C and SIGTERM: finish the optimizer step, save a checkpoint, end. A second signal ends at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop(Callback):
    """Stop at the next optimizer step after a signal to any rank, with a checkpoint of it.

    The checkpoint is saved at the step's end; the run ends a moment later, when Lightning has logged that step.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.received = 0
        self._stop: Interrupted | None = None
        self._previous: dict[int, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NOTE: after Lightning has registered its own handler, which hangs where all ranks get the signal (pl#20806).
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            raise self._interrupted(number)
        self.received = number

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # NOTE: an epoch's last step waits for on_train_epoch_end, before which its checkpoint is saved.
        if batch["last_of_step"] and not trainer.is_last_batch and (number := self._agreed(trainer)):
            self.checkpoint.save(trainer)
            self._stop = self._interrupted(number)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if number := self._agreed(trainer):
            self._stop = self._interrupted(number)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end_if_asked()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_if_asked()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_if_asked()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NOTE: not in teardown: by then Lightning has put back what was there before the run, and would be undone.
        self._restore()

    def _end_if_asked(self) -> None:
        if self._stop is not None:
            self._restore()
            raise self._stop

    def _interrupted(self, number: int) -> Interrupted:
        newest = self.checkpoint.newest
        return Interrupted(number, checkpoint=str(newest) if newest else None)

    def _agreed(self, trainer: Trainer) -> int:
        """Return the signal that any rank received, 0 for none; the same on all ranks, so that all stop together."""
        if trainer.world_size == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(flag, reduce_op="max"))

    def _restore(self) -> None:
        handlers: dict[int, Callable[..., Any]] = self._previous
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self._previous = {}
