"""One bar for the whole run, in optimizer steps; plain lines where there is no terminal.

Lightning's own bars count the micro-batches of one epoch, of which a loader with batches of a token budget does not
know the number, and show neither the memory nor the time left of the run. Metrics are read, and the device waited for,
only when something is about to be drawn.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor
from typing_extensions import override

LIVE_SECONDS = 0.2


def clock_time(seconds: float) -> str:
    """Return a duration as a clock shows it: `0:12`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def training_status(metrics: Mapping[str, Tensor | float], *, seconds_left: float | None) -> str:
    """Return what is known of `loss 1.23 · 276 tok/s · peak 1.9 GiB · 0:12 left`.

    The peak is the GPU's where there is one, else the host's.
    """
    parts = []
    if "train/loss" in metrics:
        parts.append(f"loss {float(metrics['train/loss']):.2f}")
    if "throughput/tokens_per_s" in metrics:
        parts.append(f"{float(metrics['throughput/tokens_per_s']):,.0f} tok/s")
    peaks = [name for name in ("memory/gpu_peak_gib", "memory/host_peak_gib") if name in metrics]
    if peaks:
        parts.append(f"peak {float(metrics[peaks[0]]):.1f} GiB")
    if seconds_left is not None:
        parts.append(f"{clock_time(seconds_left)} left")
    return " · ".join(parts)


def seconds_left(*, seconds: float, steps: int, steps_left: int | None) -> float | None:
    """Estimate the time left from the steps done since training started; None before the first, or without an end."""
    return seconds / steps * steps_left if steps and steps_left is not None else None


class Display(Protocol):
    """What shows the progress of named stages, such as training and the validation inside it."""

    seconds_between: float

    def show(self, stage: str, *, completed: int, total: int | None, status: str) -> None:
        """Show how far a stage is."""

    def end(self, stage: str) -> None:
        """Take a stage that is over from the display."""

    def close(self) -> None:
        """Leave the terminal to others."""


class LiveDisplay:
    """A Rich bar for every stage under way, and a line with the latest status below, so that both fit 80 columns."""

    seconds_between = LIVE_SECONDS

    def __init__(self, console: Console) -> None:
        self._bars: dict[str, TaskID] = {}
        self._status = Text(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._live = Live(Group(self._progress, self._status), console=console)
        self._live.start()

    def show(self, stage: str, *, completed: int, total: int | None, status: str) -> None:
        """Draw the stage's bar, a new one where it has none."""
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._bars[stage], completed=completed, total=total)
        if status:
            self._status.plain = status

    def end(self, stage: str) -> None:
        """Remove the stage's bar."""
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))

    def close(self) -> None:
        """Leave the bars as they are and stop drawing."""
        self._live.stop()


class PlainDisplay:
    """A line now and then, for logs and pipes."""

    def __init__(self, console: Console, seconds_between: float) -> None:
        self.seconds_between = seconds_between
        self._console = console

    def show(self, stage: str, *, completed: int, total: int | None, status: str) -> None:
        """Print one line."""
        count = f"{completed}/{total}" if total is not None else f"{completed}"
        line = " · ".join(part for part in (f"{stage} {count}", status) if part)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def end(self, stage: str) -> None:
        """Keep what is printed."""

    def close(self) -> None:
        """Keep what is printed."""


def open_display(console: Console, *, plain_seconds: float) -> Display:
    """Return a live display on a terminal, else a plain one.

    NOTE: asks the file, not Rich: FORCE_COLOR makes Rich take a log file for a terminal.
    """
    if console.file.isatty() and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(console, plain_seconds)


class TuneProgressBar(ProgressBar):
    """Show the whole run as one bar: `loss 1.23 · 276 tok/s · peak 1.9 GiB · 0:12 left`.

    Without a terminal, in a log file or a pipe, a plain line is printed now and then instead.

    Args:
        refresh_seconds: The least time between two plain lines.
    """

    def __init__(self, refresh_seconds: float = 10.0) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.total_steps: int | None = None  # optimizer steps of the run; left at None, Lightning's estimate counts
        self.console: Console | None = None
        self.clock: Callable[[], float] = time.monotonic
        self._enabled = True
        self._display: Display | None = None
        self._shown_at = float("-inf")
        self._shown_step = 0
        self._first_step = 0  # the step that training started or resumed at
        self._started = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether this rank shows anything."""
        return self._enabled

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step, self._started = trainer.global_step, self.clock()
        self.total_steps = self.total_steps or _finite(trainer.estimated_stepping_batches)
        self._show_training(trainer, at_once=True)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        if batch["last_of_step"]:
            self._show_training(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._shown_step:
            self._show_training(trainer, at_once=True)
        self._close()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._show("Validation", completed=batch_idx + 1, total=self.total_val_batches_current_dataloader)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("Validation")

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._show("Test", completed=batch_idx + 1, total=self.total_test_batches_current_dataloader)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("Test")

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._show("Prediction", completed=batch_idx + 1, total=self.total_predict_batches_current_dataloader)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("Prediction")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _show_training(self, trainer: Trainer, *, at_once: bool = False) -> None:
        if not self._is_due(at_once=at_once):
            return
        step = self._shown_step = trainer.global_step
        left = seconds_left(
            seconds=self.clock() - self._started,
            steps=step - self._first_step,
            steps_left=None if self.total_steps is None else self.total_steps - step,
        )
        status = training_status(trainer.callback_metrics, seconds_left=left)
        self._show("Training", completed=step, total=self.total_steps, status=status, at_once=True)

    def _show(
        self, stage: str, *, completed: int, total: float | None, status: str = "", at_once: bool = False
    ) -> None:
        if self._is_due(at_once=at_once):
            self._shown_at = self.clock()
            self._open().show(stage, completed=completed, total=_finite(total), status=status)

    def _is_due(self, *, at_once: bool) -> bool:
        return self._enabled and (at_once or self.clock() - self._shown_at >= self._open().seconds_between)

    def _open(self) -> Display:
        if self._display is None:
            self._display = open_display(self.console or Console(), plain_seconds=self.refresh_seconds)
        return self._display

    def _end(self, stage: str) -> None:
        self.reset_dataloader_idx_tracker()
        if self._display is not None:
            self._display.end(stage)

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None


def _finite(total: float | None) -> int | None:
    """Return a total as it can be shown: Lightning says inf or -1 where it knows none."""
    return int(total) if total is not None and math.isfinite(total) and total >= 0 else None
