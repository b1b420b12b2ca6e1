"""Tokens and samples a second, over the last optimizer steps and all devices, from time spent training alone.

Lightning's `ThroughputMonitor` assumes one batch size and counts the time of validation and checkpoints. Here the
batch says what it holds, and a stopwatch stands still whenever something other than training happens. Costs one
reduction of three integers per optimizer step, which is also the only wait for the device.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override


class Stopwatch:
    """Seconds that count: runs between `start` and `pause`, read and set back to zero by `lap`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._seconds = 0.0
        self._running_since: float | None = None

    def start(self) -> None:
        """Run on; nothing happens where it runs already."""
        if self._running_since is None:
            self._running_since = self.clock()

    def pause(self) -> None:
        """Stand still; nothing happens where it does already."""
        if self._running_since is not None:
            self._seconds += self.clock() - self._running_since
            self._running_since = None

    def lap(self) -> float:
        """Return the seconds that counted since the last lap, and run on."""
        self.pause()
        self.start()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(frozen=True)
class Lap:
    """What one or more optimizer steps did on all devices together, and in which time."""

    tokens: int
    supervised_tokens: int
    samples: int
    seconds: float


def add_up(laps: Iterable[Lap]) -> Lap:
    """Add up laps, one after the other."""
    laps = tuple(laps)
    return Lap(
        tokens=sum(lap.tokens for lap in laps),
        supervised_tokens=sum(lap.supervised_tokens for lap in laps),
        samples=sum(lap.samples for lap in laps),
        seconds=sum(lap.seconds for lap in laps),
    )


def rates(lap: Lap) -> dict[str, float]:
    """Return the rates of a lap by metric name."""
    return {
        "throughput/tokens_per_s": lap.tokens / lap.seconds,
        "throughput/supervised_tokens_per_s": lap.supervised_tokens / lap.seconds,
        "throughput/samples_per_s": lap.samples / lap.seconds,
    }


class LapTimes:
    """The laps of the last `window` steps and the sum of all.

    The first step (memory allocation, kernel selection, compilation) is left out as soon as there is a second.
    """

    def __init__(self, window: int) -> None:
        self.recent: deque[Lap] = deque(maxlen=window)
        self.total = add_up([])
        self._warming_up = True

    def add(self, lap: Lap) -> None:
        """Add the lap of the step that ended."""
        if self._warming_up and self.recent:
            self._warming_up = False
            self.recent.clear()
            self.total = add_up([])
        self.recent.append(lap)
        self.total = add_up([self.total, lap])


class Throughput(Callback):
    """Log tokens, supervised tokens and samples a second, and the samples seen since the run's start.

    Counted over all devices: real tokens, never padding. The rates are those of the last `window` optimizer steps, the
    first step left out; validation and checkpoints do not count as time, nor does what callbacks behind this
    one do at an epoch's end.

    Args:
        window: Number of optimizer steps that a rate is measured over.
    """

    def __init__(self, window: int = 10) -> None:
        self.samples_seen = 0
        self.stopwatch = Stopwatch()
        self.laps = LapTimes(window)
        self._counts = (0, 0, 0)  # tokens, supervised tokens, samples of this rank in the step under way

    @property
    def average(self) -> dict[str, float]:
        """The rates over the whole run by metric name; empty before the first step."""
        return rates(self.laps.total) if self.laps.recent else {}

    def pause(self) -> None:
        """Stop the clock until the next batch; for whatever else takes time between two batches."""
        self.stopwatch.pause()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.stopwatch.start()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        tokens, supervised_tokens, samples = self._counts
        self._counts = (
            tokens + batch["num_tokens"],
            supervised_tokens + batch["num_supervised"],
            samples + batch["num_samples"],
        )
        if batch["last_of_step"]:
            pl_module.log_dict(self._end_step(trainer))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.pause()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_seen = state_dict["samples_seen"]

    def _end_step(self, trainer: Trainer) -> dict[str, float]:
        counts = torch.tensor(self._counts, device=trainer.strategy.root_device)
        self._counts = (0, 0, 0)
        # NOTE: reading the counts back waits for the device: the lap then holds the step's work, not only its launch.
        tokens, supervised_tokens, samples = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.laps.add(Lap(tokens, supervised_tokens, samples, self.stopwatch.lap()))
        self.samples_seen += samples
        return {**rates(add_up(self.laps.recent)), "throughput/samples_seen": float(self.samples_seen)}
