from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.throughput import Lap, LapTimes, Stopwatch, Throughput, rates

from .tiny import FakeClock, fit, held_out


class Passing(Callback):
    """Lets the clock go on: one second in every backward pass, and much more for whatever is not training."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.rates: list[float] = []

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.now += 1.0

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.now += 1000.0

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rates.append(float(trainer.callback_metrics["throughput/tokens_per_s"]))
        self.clock.now += 1000.0

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.clock.now += 1000.0


def with_clock(throughput: Throughput) -> FakeClock:
    clock = FakeClock()
    throughput.stopwatch = Stopwatch(clock)
    return clock


def test_stopwatch_counts_only_while_running() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    clock.now += 5  # before the start
    watch.start()
    clock.now += 1
    watch.pause()
    watch.pause()
    clock.now += 10
    watch.start()
    clock.now += 2
    watch.start()
    assert watch.lap() == 3
    clock.now += 4
    assert watch.lap() == 4


def test_first_step_is_warm_up_where_more_than_one_exists() -> None:
    laps = LapTimes(window=3)
    laps.add(Lap(tokens=10, supervised_tokens=5, samples=1, seconds=100.0))
    assert rates(laps.total)["throughput/tokens_per_s"] == 0.1
    for tokens in (20, 30, 40, 50):
        laps.add(Lap(tokens=tokens, supervised_tokens=10, samples=2, seconds=2.0))
    assert [lap.tokens for lap in laps.recent] == [30, 40, 50]
    assert laps.total == Lap(tokens=140, supervised_tokens=40, samples=8, seconds=8.0)


def test_training_alone_is_timed(tmp_path: Path) -> None:
    throughput = Throughput()
    clock = with_clock(throughput)
    passing = Passing(clock)
    # Two micro-batches, so two seconds, a step; a checkpoint after every step, and validation after every epoch.
    trainer = fit(
        tmp_path,
        Checkpoint(every_n_steps=1),
        throughput,
        passing,
        lengths=[10, 20, 30, 40],
        accumulate=2,
        val_loader=held_out(8),
        max_epochs=2,
    )
    metrics = trainer.callback_metrics
    # Without the first step (30 tokens, 26 supervised): 70 + 30 + 70 tokens in three steps of two samples and seconds.
    assert float(metrics["throughput/tokens_per_s"]) == pytest.approx(170 / 6)
    assert float(metrics["throughput/supervised_tokens_per_s"]) == pytest.approx(158 / 6)
    assert float(metrics["throughput/samples_per_s"]) == pytest.approx(1.0)
    assert float(metrics["throughput/samples_seen"]) == 8
    assert throughput.average["throughput/tokens_per_s"] == pytest.approx(170 / 6)
    assert passing.rates[0] == pytest.approx(70 / 2)


def test_all_ranks_are_added_up() -> None:
    throughput = Throughput()
    clock = with_clock(throughput)
    logged: dict[str, float] = {}
    other_rank = torch.tensor([7, 3, 0])
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        reduce=lambda tensor, reduce_op: tensor + other_rank if reduce_op == "sum" else None,
    )
    trainer: Any = SimpleNamespace(strategy=strategy)
    module: Any = SimpleNamespace(log_dict=logged.update)
    batch = {"num_tokens": 5, "num_supervised": 4, "num_samples": 2, "last_of_step": True}
    throughput.on_train_batch_start(trainer, module, batch, 0)
    clock.now += 2.0
    throughput.on_train_batch_end(trainer, module, None, batch, 0)
    assert logged == {
        "throughput/tokens_per_s": 6.0,
        "throughput/supervised_tokens_per_s": 3.5,
        "throughput/samples_per_s": 1.0,
        "throughput/samples_seen": 2.0,
    }


def test_samples_seen_go_on_after_a_resume() -> None:
    before = Throughput()
    before.samples_seen = 12
    after = Throughput()
    after.load_state_dict(before.state_dict())
    assert after.samples_seen == 12


def test_no_rate_before_the_first_step() -> None:
    assert Throughput().average == {}
