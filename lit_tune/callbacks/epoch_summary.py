"""One line per epoch with its true loss: the mean over tokens, not the mean of micro-batch means.

Micro-batches hold unequal numbers of supervised tokens, so an average of their losses weighs tokens unequally. The sums
behind the mean are kept in float64 on the device, reduced over ranks once per optimizer step and never read back before
the epoch ends or a checkpoint is saved: a checkpoint, which only rank 0 writes, then holds the sums of all ranks.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override


def readable_duration(seconds: float) -> str:
    """Return a duration as `5s`, `1m 05s` or `2h 01m 05s`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minute:02d}m {second:02d}s"
    return f"{minute}m {second:02d}s" if minute else f"{second}s"


def epoch_line(epoch: int, *, loss: float, val_loss: float | None, tokens: int, seconds: float) -> str:
    """Return the line of an epoch's end, such as `Epoch 0: average loss 1.2345 (val 1.1111, 12,345 tokens, 1m 05s)`."""
    val = "" if val_loss is None else f"val {val_loss:.4f}, "
    return f"Epoch {epoch}: average loss {loss:.4f} ({val}{tokens:,} tokens, {readable_duration(seconds)})"


class EpochSummary(Callback):
    """Print the average loss of every epoch: `Epoch 0: average loss 1.2345 (val 1.1111, 12,345 tokens, 1m 05s)`.

    The average is over all supervised tokens of the epoch and all devices, logged as `train/epoch_loss`. An epoch that
    was interrupted and resumed gives the same figure as one that was not.
    """

    def __init__(self) -> None:
        self.epoch_losses: list[float] = []
        self.val_losses: list[float | None] = []  # one for each of `epoch_losses`; None where no validation was run
        self.clock: Callable[[], float] = time.monotonic
        self._step_nll: Tensor | None = None  # this rank's, of the optimizer step under way
        self._step_supervised = 0
        self._step_tokens = 0
        self._begin_epoch(epoch=0)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._sums = torch.zeros(3, dtype=torch.float64)  # nll, supervised tokens, tokens: all ranks, whole steps
        self._val_loss: float | None = None
        self._seconds = 0.0  # of this epoch before the run was resumed
        self._started: float | None = None

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        if batch["epoch"] != self._epoch:
            self._begin_epoch(batch["epoch"])
        elif len(self.epoch_losses) > self._epoch:
            # `max_steps` had cut the epoch short, and the run goes on: its line comes again, of the whole epoch.
            del self.epoch_losses[self._epoch :], self.val_losses[self._epoch :]
        if self._started is None:
            self._started = self.clock()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        assert isinstance(outputs, Mapping)
        nll = outputs["nll_sum"].double()
        self._step_nll = nll if self._step_nll is None else self._step_nll + nll
        self._step_supervised += batch["num_supervised"]
        self._step_tokens += batch["num_tokens"]
        if batch["last_of_step"]:
            self._end_step(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            self._val_loss = float(trainer.callback_metrics["val/loss"])

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nll, supervised, tokens = self._sums.tolist()
        if not supervised:
            return
        self.epoch_losses.append(nll / supervised)
        self.val_losses.append(self._val_loss)
        line = epoch_line(
            self._epoch,
            loss=self.epoch_losses[-1],
            val_loss=self._val_loss,
            tokens=int(tokens),
            seconds=self._epoch_seconds(),
        )
        pl_module.print(line)
        pl_module.log("train/epoch_loss", self.epoch_losses[-1], sync_dist=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch_losses": list(self.epoch_losses),
            "val_losses": list(self.val_losses),
            "epoch": self._epoch,
            "sums": self._sums.tolist(),
            "val_loss": self._val_loss,
            "seconds": self._epoch_seconds(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch_losses = list(state_dict["epoch_losses"])
        self.val_losses = list(state_dict["val_losses"])
        self._begin_epoch(state_dict["epoch"])
        self._sums = torch.tensor(state_dict["sums"], dtype=torch.float64)
        self._val_loss = state_dict["val_loss"]
        self._seconds = state_dict["seconds"]

    def _epoch_seconds(self) -> float:
        return self._seconds + (0.0 if self._started is None else self.clock() - self._started)

    def _end_step(self, trainer: Trainer) -> None:
        """Add the optimizer step that ended, over all ranks, to the epoch."""
        assert self._step_nll is not None
        # NOTE: `new_full` fills on the device; `torch.tensor(..., device=...)` would copy, and wait for the device.
        counts = [self._step_nll.new_full((), count) for count in (self._step_supervised, self._step_tokens)]
        step_sums = trainer.strategy.reduce(torch.stack([self._step_nll, *counts]), reduce_op="sum")
        # A step that was skipped because its loss is not finite is not part of the average.
        counted = torch.where(step_sums.isfinite().all(), step_sums, torch.zeros_like(step_sums))
        self._sums = self._sums.to(step_sums.device) + counted
        self._step_nll, self._step_supervised, self._step_tokens = None, 0, 0
