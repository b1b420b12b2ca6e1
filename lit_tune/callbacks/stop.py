"""Ctrl-C, SIGTERM and the end of the time: finish the optimizer step, save, end. A second signal ends at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.errors import Interrupted
from lit_tune.signals import SIGNALS, heard

ENDING_S = 5.0  # what it takes to end beside saving
_TIME_IS_UP = 100  # among signals, and above their numbers


class GracefulStop(Callback):
    """Stop at the end of the optimizer step after a signal to any rank, or before the time is up, with a checkpoint.

    A validation or the wait for the next step is not waited for: it is done first when the run goes on.

    Args:
        checkpoint: Saves.
        time_limit_s: Seconds after which the run must have ended; none without a number.
        started: When they began, by `clock`.
    """

    def __init__(self, checkpoint: Checkpoint, time_limit_s: float | None = None, started: float = 0.0) -> None:
        self.checkpoint = checkpoint
        self.time_limit_s = time_limit_s
        self.clock: Callable[[], float] = time.monotonic
        self.received = 0
        self._started = started
        self._longest_pause_s = 0.0  # between two occasions to stop
        self._last_occasion: float | None = None
        self._reason: str | None = None
        self._previous: dict[int, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NOTE: after Lightning has registered its own handler, which hangs where all ranks get the signal (pl#20806).
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        heard.set()
        if self.received:
            raise self._interrupted(number, alone=True)
        self.received = number

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch["first_of_step"]:
            self._stop_if_asked(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer, validating=True)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop_if_asked(trainer, validating=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NOTE: not in teardown: by then Lightning has put back what was there before the run, and would be undone.
        self._restore()

    def _stop_if_asked(self, trainer: Trainer, *, validating: bool = False) -> None:
        # The run's last validation is not put off: nothing would be left to continue.
        over = trainer.global_step == trainer.max_steps
        if not self._previous or (validating and over):
            return
        if number := self._agreed(trainer):
            self.checkpoint.save(trainer, validation_due=validating)
            self.checkpoint.wait(trainer)
            self._restore()
            raise self._interrupted(number)

    def _interrupted(self, number: int, *, alone: bool = False) -> Interrupted:
        newest = self.checkpoint.newest
        path = str(newest) if newest else None
        return Interrupted(number, checkpoint=path, reason=self._reason, alone=alone)

    def _agreed(self, trainer: Trainer) -> int:
        """Return the signal that any rank received, 0 for none; the same on all ranks, so that all stop together."""
        if not self.received and self._time_is_up():
            self.received = _TIME_IS_UP
        agreed = self.received
        if trainer.world_size > 1:
            flag = torch.tensor(float(agreed), device=trainer.strategy.root_device)
            agreed = int(trainer.strategy.reduce(flag, reduce_op="max"))
        if agreed == _TIME_IS_UP:
            self._reason, agreed = "--time-limit", signal.SIGTERM
        return agreed

    def _time_is_up(self) -> bool:
        """Say whether another step as long as the longest, and saving, would take too long."""
        if self.time_limit_s is None:
            return False
        now = self.clock()
        if self._last_occasion is not None:
            self._longest_pause_s = max(self._longest_pause_s, now - self._last_occasion)
        self._last_occasion = now
        needed = self._longest_pause_s + self.checkpoint.longest_save_s + ENDING_S
        return now - self._started + needed >= self.time_limit_s

    def _restore(self) -> None:
        handlers: dict[int, Callable[..., Any]] = self._previous
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self._previous = {}
