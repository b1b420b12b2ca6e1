import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.stop import SIGNALS, GracefulStop
from lit_tune.checkpoint import AtomicCheckpointIO, is_intact, read, step_checkpoints, step_path
from lit_tune.errors import Interrupted
from lit_tune.logs import MetricsCsv, read_metrics

from .tiny import TinyLoader, TinyModule, make_trainer


class At(Callback):
    """Calls an action in one hook of one micro-batch, counted from the run's start; of a validation, of any."""

    def __init__(self, hook: str, micro_batch: int, action: Callable[[], None]) -> None:
        self.hook = hook
        self.micro_batch = micro_batch
        self.action = action
        self.started = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.act("train_batch_start")
        self.started += 1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.started == self.micro_batch + 1:
            self.act("train_batch_end", self.micro_batch)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.act("validation_batch_start", self.micro_batch)

    def act(self, hook: str, micro_batch: int | None = None) -> None:
        if hook == self.hook and self.micro_batch == (self.started if micro_batch is None else micro_batch):
            self.action()


def send(number: signal.Signals, times: int = 1) -> Callable[[], None]:
    def action() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return action


def fail() -> None:
    raise ZeroDivisionError


class Run:
    """A run of 3 epochs of 3 optimizer steps, two micro-batches each, with its checkpoints in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.module = TinyModule()
        self.trainer: Trainer | None = None

    def fit(self, *others: Callback, bound: bool = True, **settings: Any) -> None:
        checkpoint = Checkpoint(keep_last=9)
        if bound:
            checkpoint.bind(self.directory)
        self.trainer = make_trainer(
            self.directory,
            [*others, checkpoint, GracefulStop(checkpoint)],
            accumulate_grad_batches=2,
            plugins=[AtomicCheckpointIO()],
            logger=MetricsCsv(self.directory),
            **({"max_epochs": 3} | settings),
        )
        self.trainer.fit(self.module, TinyLoader([8] * 6, accumulate=2), TinyLoader([6]))

    def stopped(self, *others: Callback, **settings: Any) -> Interrupted:
        """Train, and return the interruption that ended it."""
        with pytest.raises(Interrupted) as stop:
            self.fit(*others, **settings)
        return stop.value

    @property
    def micro_batches(self) -> int:
        return len(self.module.nll_sums)

    @property
    def saved(self) -> list[Path]:
        return step_checkpoints(self.directory)

    @property
    def logged_steps(self) -> list[int]:
        return [int(row["step"]) for row in read_metrics(self.directory / "metrics.csv") if row["train/loss"]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[Any]]:
    """Give handlers of the test's own, as the command has them, and check that they are there again afterwards."""

    def own(number: int, frame: object) -> None:
        unexpected.append(number)

    unexpected: list[int] = []
    before = [signal.signal(number, own) for number in SIGNALS]
    yield before
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == [own, own]
    assert unexpected == []


# One signal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_its_own_exit_code(run: Run, number: signal.Signals, exit_code: int) -> None:
    stop = run.stopped(At("train_batch_start", 2, send(number)))
    assert stop.exit_code == exit_code
    assert str(stop) == f"stopped by signal {int(number)}"


@pytest.mark.parametrize(
    ("hook", "micro_batch", "last_step"),
    [
        ("train_batch_start", 0, 1),
        ("train_batch_start", 1, 1),
        ("train_batch_end", 1, 1),  # in a callback before the checkpoint's
        ("train_batch_start", 2, 2),
        ("train_batch_start", 4, 3),  # the last step of an epoch
        ("train_batch_start", 5, 3),
        ("validation_batch_start", 0, 3),
        ("train_batch_start", 6, 4),
    ],
)
def test_the_step_is_finished_saved_and_logged(run: Run, hook: str, micro_batch: int, last_step: int) -> None:
    stop = run.stopped(At(hook, micro_batch, send(signal.SIGTERM)))
    assert run.micro_batches == 2 * last_step
    path = step_path(run.directory, last_step)
    assert stop.checkpoint == str(path)
    assert run.saved[0] == path
    assert is_intact(path)
    assert read(path)["global_step"] == last_step
    assert run.logged_steps == list(range(last_step))


def test_the_checkpoint_holds_the_weights_of_its_step(run: Run) -> None:
    run.stopped(At("train_batch_start", 3, send(signal.SIGTERM)))
    saved = read(run.saved[0])["state_dict"]
    weights = run.module.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_an_epochs_end_is_validated_before_the_run_stops(run: Run) -> None:
    run.stopped(At("train_batch_start", 5, send(signal.SIGTERM)))
    assert [row["step"] for row in read_metrics(run.directory / "metrics.csv") if row["val/loss"]] == ["2"]


def test_a_validation_within_the_epoch_is_not_waited_for(run: Run) -> None:
    run.stopped(At("train_batch_start", 1, send(signal.SIGTERM)), val_check_interval=2)
    assert "val/loss" not in read_metrics(run.directory / "metrics.csv")[0]


def test_a_signal_in_the_last_step_lets_the_run_end(run: Run) -> None:
    run.fit(At("train_batch_start", 17, send(signal.SIGTERM)))
    assert run.trainer is not None
    assert run.trainer.global_step == 9
    assert run.saved[0] == step_path(run.directory, 9)


def test_the_last_step_by_max_steps_lets_the_run_end_too(run: Run) -> None:
    run.fit(At("train_batch_start", 8, send(signal.SIGTERM)), max_steps=5)
    assert run.saved[0] == step_path(run.directory, 5)


def test_without_a_run_directory_nothing_was_saved(run: Run) -> None:
    stop = run.stopped(At("train_batch_start", 2, send(signal.SIGTERM)), bound=False)
    assert stop.checkpoint is None
    assert run.micro_batches == 4
    assert run.saved == []


# A second signal ------------------------------------------------------------------------------------------------------


def test_a_second_signal_ends_at_once(run: Run) -> None:
    stop = run.stopped(At("train_batch_start", 2, send(signal.SIGTERM, times=2)))
    assert run.micro_batches == 2  # those of the first step
    assert stop.exit_code == 143
    assert stop.checkpoint is None
    assert run.saved == []


def test_a_second_signal_names_the_newest_checkpoint(run: Run) -> None:
    stop = run.stopped(At("train_batch_start", 8, send(signal.SIGINT, times=2)))
    assert run.micro_batches == 8
    assert stop.exit_code == 130
    assert stop.checkpoint == str(step_path(run.directory, 3))  # of the epoch's end
    assert run.saved == [step_path(run.directory, 3)]


# Handlers; the fixture checks that they are restored in every test ----------------------------------------------------


def test_a_run_without_a_signal_ends_with_the_handlers_it_began_with(run: Run) -> None:
    run.fit()
    assert run.micro_batches == 18


def test_a_run_that_fails_gives_the_handlers_back_too(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run.fit(At("train_batch_start", 2, fail))


# Several ranks --------------------------------------------------------------------------------------------------------


class FakeRank:
    """What the callback sees of one of two ranks; `other` is the signal that the other rank received."""

    is_last_batch = False
    world_size = 2

    def __init__(self, other: int) -> None:
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=self.reduce)
        self.other = other
        self.asked = 0

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        self.asked += 1
        return torch.maximum(tensor, torch.tensor(float(self.other)))


def steps_until_stopped(rank: FakeRank, last_of_step: Sequence[bool]) -> tuple[int, list[int]]:
    """Return the micro-batches processed, and the number of them after which a checkpoint was saved."""
    saves: list[int] = []
    processed = 0
    checkpoint: Any = SimpleNamespace(newest=None, save=lambda trainer: saves.append(processed))
    stop = GracefulStop(checkpoint)
    trainer: Any = rank
    module: Any = None
    for last in last_of_step:
        try:
            stop.on_train_batch_start(trainer, module, {}, 0)
        except Interrupted:
            break
        processed += 1
        stop.on_train_batch_end(trainer, module, None, {"last_of_step": last}, 0)
    return processed, saves


def test_a_signal_to_another_rank_stops_this_one_at_the_same_step() -> None:
    assert steps_until_stopped(FakeRank(other=signal.SIGTERM), [False, True, False, True]) == (2, [2])


def test_without_a_signal_ranks_ask_each_other_once_a_step() -> None:
    rank = FakeRank(other=0)
    assert steps_until_stopped(rank, [False, True, False, True]) == (4, [])
    assert rank.asked == 2
