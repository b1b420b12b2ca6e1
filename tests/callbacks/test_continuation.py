"""Runs that end anywhere and go on, against the same run that does not end: events, table and weights must be equal."""

import os
import shutil
import signal
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.continuation import Continuation, progress, restarted
from lit_tune.callbacks.epoch_summary import EpochSummary
from lit_tune.checkpoint import read, step_checkpoints, step_path
from lit_tune.errors import Interrupted
from lit_tune.logs import read_metrics

from .tiny import TinyModule, fit, held_out

EPOCHS = 2
MICRO_BATCHES = [8, 9, 7, 8, 6]  # of an epoch: three optimizer steps, the last of one micro-batch
STEPS = 3
SCHEDULES: dict[str, dict[str, Any]] = {
    "at epoch ends": {},
    "every other epoch": {"check_val_every_n_epoch": 2},
    "between steps": {"val_check_interval": 2},
    "within steps": {"val_check_interval": 3},
    "through the epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "never": {"limit_val_batches": 0},
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())

Event = tuple[str, int, float]


class Recorder(Callback):
    """Note what happens, in order: micro-batches with step and loss, validations and epochs' ends with steps done."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.events.append(("train", batch["step"], outputs["nll_sum"].item()))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(("validate", trainer.global_step, trainer.callback_metrics["val/loss"].item()))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(("epoch", trainer.global_step, trainer.current_epoch))


class SignalAt(Callback):
    """Send SIGTERM at a moment, counted in calls of hooks; without one, only count."""

    HOOKS = (
        *("on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_train_batch_end"),
        *("on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end"),
    )

    def __init__(self, moment: int | None = None) -> None:
        self.moment = moment
        self.moments = 0
        for hook in self.HOOKS:
            setattr(self, hook, self.pass_moment)

    def pass_moment(self, *_: Any) -> None:
        if self.moments == self.moment:
            os.kill(os.getpid(), signal.SIGTERM)
        self.moments += 1


class Run:
    """A run of two epochs with a validation of two batches, in a directory."""

    def __init__(self, directory: Path, schedule: dict[str, Any]) -> None:
        self.directory = directory
        self.schedule = schedule
        self.events: list[Event] = []
        self.weights: dict[str, Tensor] = {}

    def fit(self, *callbacks: Callback, step: int | None = None, every_n_steps: int = 1) -> None:
        """Train from the beginning, or from the checkpoint of a step."""
        recorder, module = Recorder(), TinyModule()
        try:
            fit(
                self.directory,
                Checkpoint(every_n_steps=every_n_steps, keep_last=99),
                EpochSummary(),
                recorder,
                *callbacks,
                module=module,
                lengths=MICRO_BATCHES,
                accumulate=2,
                val_loader=held_out(6, 9),
                ckpt_path=None if step is None else step_path(self.directory, step),
                max_epochs=EPOCHS,
                **self.schedule,
            )
        finally:
            self.events += recorder.events
            self.weights = module.state_dict()

    def fit_with_signal(self, moment: int) -> int | None:
        """Train, and go on if a signal at a moment stops the run; return the step that it stopped at."""
        try:
            self.fit(SignalAt(moment), every_n_steps=0)
        except Interrupted:
            newest = next(iter(step_checkpoints(self.directory)), None)
            step = None if newest is None else int(read(newest)["global_step"])
            self.fit(step=step, every_n_steps=0)
            return step
        return None

    @property
    def table(self) -> str:
        return (self.directory / "metrics.csv").read_text()

    def copy(self, name: str) -> "Run":
        """Return a run that has got as far."""
        target = self.directory.with_name(name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.directory, target)
        return Run(target, self.schedule)


def assert_equal(one: Run, whole: Run) -> None:
    """Check that a run did the same as one that was not interrupted."""
    assert one.table == whole.table
    for name, weight in whole.weights.items():
        assert torch.equal(one.weights[name], weight), name
    # Nothing was done twice, but for micro-batches of a step that was begun: a validation stood within it.
    once, twice = ([event for event in run.events if event[0] != "train"] for run in (whole, one))
    assert twice == once
    once, twice = ([event for event in run.events if event[0] == "train"] for run in (whole, one))
    assert list(dict.fromkeys(twice)) == once


@pytest.fixture
def whole(tmp_path: Path, schedule: dict[str, Any]) -> Run:
    """A run that was never interrupted, with a checkpoint of every step."""
    run = Run(tmp_path / "whole", schedule)
    run.fit()
    return run


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Check that every run gives the handler back that it found."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


# From the number of steps alone ---------------------------------------------------------------------------------------


@EVERY_SCHEDULE
def test_from_every_checkpoint_a_run_goes_on_as_if_it_had_not_ended(whole: Run) -> None:
    for step in range(1, EPOCHS * STEPS):
        # As after a kill at the very end: the table knows more than the checkpoint.
        again = whole.copy("again")
        again.fit(step=step)
        first = next(index for index, event in enumerate(whole.events) if event[:2] == ("train", step))
        again.events = whole.events[:first] + again.events
        assert_equal(again, whole)


@pytest.mark.parametrize("share", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("first", "schedule"), list(enumerate(SCHEDULES.values())), ids=SCHEDULES.keys())
def test_stopped_at_any_moment_a_run_goes_on_as_if_it_had_not_been(
    whole: Run, tmp_path: Path, first: int, share: int
) -> None:
    counted = SignalAt()
    Run(tmp_path / "counted", whole.schedule).fit(counted, every_n_steps=0)
    assert counted.moments > 30
    steps = set()
    for moment in range(first % share, counted.moments, share):  # of every schedule others
        run = Run(tmp_path / f"at-{moment}", whole.schedule)
        steps.add(run.fit_with_signal(moment))
        assert_equal(run, whole)
    assert len(steps) > 3


class Crash(Callback):
    """Fail when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch["step"] == self.step:
            raise ZeroDivisionError


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(schedule, id=name, marks=[] if name == "at epoch ends" else pytest.mark.slow)
        for name, schedule in SCHEDULES.items()
    ],
)
def test_any_two_checkpoints_one_after_the_other(whole: Run) -> None:
    for first, second in combinations(range(1, EPOCHS * STEPS), 2):
        again = whole.copy("again")
        with pytest.raises(ZeroDivisionError):
            again.fit(Crash(second), step=first)
        again.fit(step=second)
        place = next(index for index, event in enumerate(whole.events) if event[:2] == ("train", first))
        again.events = whole.events[:place] + again.events
        assert_equal(again, whole)


# A validation put off -------------------------------------------------------------------------------------------------


def rows_with(run: Run, column: str) -> list[int]:
    return [int(row["step"]) for row in read_metrics(run.directory / "metrics.csv") if row.get(column)]


@pytest.mark.parametrize(
    ("schedule", "step", "validated"),
    [
        (SCHEDULES["between steps"], 1, [0, 1, 3, 4]),
        (SCHEDULES["between steps"], 2, [0, 1, 3, 4]),
        (SCHEDULES["at epoch ends"], 3, [2, 5]),
        (SCHEDULES["at epoch ends"], 6, [2, 5]),
    ],
)
def test_it_is_done_first_logged_in_its_own_row_and_not_twice(
    tmp_path: Path, schedule: dict[str, Any], step: int, validated: list[int]
) -> None:
    run = Run(tmp_path / "run", schedule)
    with pytest.raises(Interrupted):
        run.fit(SignalInStep(step - 1), every_n_steps=0)
    assert read(step_path(run.directory, step))["validation_due"] is True
    assert run.events[-1][:2] == ("train", step - 1)
    assert rows_with(run, "val/loss") == [at for at in validated if at < step - 1]
    before = len(run.events)
    run.fit(step=step, every_n_steps=0)
    assert run.events[before][:2] == ("validate", step)
    assert rows_with(run, "val/loss") == validated
    assert rows_with(run, "train/loss") == list(range(EPOCHS * STEPS))
    # Done, it is due no more: whoever goes on from there has nothing to make up for.
    assert read(step_checkpoints(run.directory)[0])["validation_due"] is False


class SignalInStep(Callback):
    """Send SIGTERM while a step is computed."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch["step"] == self.step and batch["last_of_step"]:
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_may_be_put_off_again_and_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    with pytest.raises(Interrupted):
        run.fit(SignalInStep(2), every_n_steps=0)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run.fit(SignalAt(0), step=3, every_n_steps=0)  # as the validation begins
        assert read(step_path(run.directory, 3))["validation_due"] is True
    assert [event for event in run.events if event[0] != "train"] == []
    run.fit(step=3, every_n_steps=0)
    assert rows_with(run, "val/loss") == [2, 5]


# Lightning's counters -------------------------------------------------------------------------------------------------


def test_progress_is_told_as_lightning_counts_it() -> None:
    assert progress(ready=3, processed=2) == {
        "current": {"ready": 3, "started": 3, "processed": 2, "completed": 2},
        "total": {"ready": 3, "started": 3, "processed": 2, "completed": 2},
    }
    assert progress(ready=3, processed=3, total=8)["total"] == {
        "ready": 8,
        "started": 8,
        "processed": 8,
        "completed": 8,
    }


def saved_loop(*, in_epoch: int, in_all: int) -> dict[str, Any]:
    """Make the saved state of a loop that has done so many micro-batches."""
    return {
        "state_dict": {"kept": 1},
        "epoch_loop.state_dict": {"_batches_that_stepped": 99, "kept": 2},
        "epoch_loop.batch_progress": {"current": {"completed": in_epoch}, "total": {"completed": in_all}},
    }


def place(loop: dict[str, Any]) -> tuple[int, int, int, bool]:
    """Return epoch, micro-batches in it and in all, and whether it ends there."""
    batches = loop["epoch_loop.batch_progress"]
    assert loop["epoch_progress"]["current"]["ready"] == loop["epoch_progress"]["current"]["processed"] + 1
    assert len(set(batches["current"].values())) == len(set(batches["total"].values())) == 1
    return (
        loop["epoch_progress"]["current"]["processed"],
        batches["current"]["completed"],
        batches["total"]["completed"],
        batches["is_last_batch"],
    )


def test_within_an_epoch_the_place_is_that_of_the_step() -> None:
    loop = restarted(saved_loop(in_epoch=4, in_all=14), steps=7, epoch=2, batches=4, ends_epoch=False, validate=False)
    assert place(loop) == (2, 4, 14, False)
    assert loop["epoch_loop.state_dict"] == {"_batches_that_stepped": 7, "kept": 2}
    assert loop["epoch_loop.val_loop.batch_progress"]["current"]["ready"] == 0
    assert loop["state_dict"] == {"kept": 1}


def test_in_another_cut_the_micro_batches_of_the_epoch_are_counted_anew() -> None:
    loop = restarted(saved_loop(in_epoch=4, in_all=14), steps=7, epoch=2, batches=8, ends_epoch=False, validate=False)
    assert place(loop) == (2, 8, 18, False)


def test_after_an_epochs_last_step_the_next_epoch_begins() -> None:
    loop = restarted(saved_loop(in_epoch=5, in_all=15), steps=9, epoch=2, batches=5, ends_epoch=True, validate=False)
    assert place(loop) == (3, 0, 15, False)


def test_with_a_validation_due_the_step_is_not_over() -> None:
    loop = restarted(saved_loop(in_epoch=5, in_all=15), steps=9, epoch=2, batches=5, ends_epoch=True, validate=True)
    assert place(loop) == (2, 5, 15, True)
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 8
    validation = loop["epoch_loop.val_loop.batch_progress"]["current"]
    assert (validation["ready"], validation["processed"]) == (1, 0)


def test_only_training_is_placed() -> None:
    callback = Continuation(lambda step: (2, 4, False))
    module: Any = None
    for stage, placed in ((TrainerFn.VALIDATING, False), (TrainerFn.FITTING, True)):
        loop = saved_loop(in_epoch=0, in_all=0)
        content = {"global_step": 7, "validation_due": False, "loops": {"fit_loop": loop}}
        trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=stage))
        callback.on_load_checkpoint(trainer, module, content)
        assert ("epoch_progress" in content["loops"]["fit_loop"]) is placed  # type: ignore[index]


def test_without_a_step_the_run_begins(tmp_path: Path) -> None:
    def place_after(step: int) -> tuple[int, int, bool]:
        raise AssertionError(step)

    content: dict[str, Any] = {
        "global_step": 0,
        "validation_due": False,
        "loops": {"fit_loop": saved_loop(in_epoch=0, in_all=0)},
    }
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING))
    Continuation(place_after).on_load_checkpoint(trainer, TinyModule(), content)
    assert place(content["loops"]["fit_loop"]) == (0, 0, 0, False)
