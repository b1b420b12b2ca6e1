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
from lit_tune.callbacks.stop import GracefulStop
from lit_tune.checkpoint import AtomicCheckpointIO, is_intact, read, step_checkpoints, step_path
from lit_tune.errors import Interrupted
from lit_tune.logs import read_metrics
from lit_tune.signals import SIGNALS

from .tiny import FakeClock, TinyLoader, TinyModule, fit, held_out, make_trainer


class At(Callback):
    """Calls an action in one hook, after so many micro-batches have begun since the run's start."""

    def __init__(self, hook: str, begun: int, action: Callable[[], None]) -> None:
        self.hook = hook
        self.at = begun
        self.action = action
        self.begun = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.begun += 1
        self.act("train_batch_start")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.act("train_batch_end")

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.act("validation_batch_start")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.act("validation_end")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.act("train_epoch_end")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.act("save_checkpoint")

    def act(self, hook: str) -> None:
        if (hook, self.begun) == (self.hook, self.at):
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
        self.checkpoint = Checkpoint(keep_last=9)
        self.module = TinyModule()
        self.trainer: Trainer | None = None

    def fit(self, *others: Callback, validate: bool = True, **settings: Any) -> None:
        self.trainer = fit(
            self.directory,
            self.checkpoint,
            *others,
            module=self.module,
            lengths=[8] * 6,
            accumulate=2,
            val_loader=held_out(6, 6) if validate else None,
            **({"max_epochs": 3} | settings),
        )

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

    def logged_steps(self, column: str) -> list[int]:
        rows = read_metrics(self.directory / "metrics.csv")
        return [int(row["step"]) for row in rows if row.get(column)]


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
    stop = run.stopped(At("train_batch_start", 3, send(number)))
    assert stop.exit_code == exit_code
    assert str(stop) == f"stopped by {number.name}"


@pytest.mark.parametrize(
    ("hook", "begun", "last_step", "validation_due"),
    [
        ("train_batch_start", 1, 1, False),
        ("train_batch_start", 2, 1, False),
        ("train_batch_end", 2, 1, False),
        ("train_batch_start", 3, 2, False),
        ("train_batch_start", 5, 3, True),  # the last step of an epoch
        ("train_batch_end", 6, 3, True),
        ("validation_batch_start", 6, 3, True),  # the first of two
        ("validation_end", 6, 3, False),
        ("train_epoch_end", 6, 3, False),
        ("train_batch_start", 7, 4, False),
    ],
)
def test_the_step_is_finished_saved_and_logged(
    run: Run, hook: str, begun: int, last_step: int, validation_due: bool
) -> None:
    stop = run.stopped(At(hook, begun, send(signal.SIGTERM)))
    assert run.micro_batches == 2 * last_step
    path = step_path(run.directory, last_step)
    assert stop.checkpoint == str(path)
    assert run.saved[0] == path
    assert is_intact(path)
    saved = read(path)
    assert saved["global_step"] == last_step
    assert saved["validation_due"] is validation_due
    assert run.logged_steps("train/loss") == list(range(last_step))
    assert run.logged_steps("val/loss") == ([2] if last_step >= 3 and not validation_due else [])


def test_a_signal_that_comes_before_a_step_has_begun_stops_before_it(run: Run) -> None:
    stop = run.stopped(before=[At("train_batch_start", 3, send(signal.SIGTERM))])
    assert run.micro_batches == 2
    assert stop.checkpoint == str(step_path(run.directory, 1))


def test_before_the_first_step_there_is_nothing_to_save(run: Run) -> None:
    stop = run.stopped(before=[At("train_batch_start", 1, send(signal.SIGTERM))])
    assert run.micro_batches == 0
    assert stop.checkpoint is None
    assert run.saved == []


def test_a_continued_run_that_is_stopped_before_its_first_step_names_where_it_began(run: Run) -> None:
    run.stopped(At("train_batch_start", 3, send(signal.SIGTERM)))
    (path,) = run.saved
    again = Run(run.directory)
    stop = again.stopped(before=[At("train_batch_start", 1, send(signal.SIGTERM))], ckpt_path=path)
    assert again.micro_batches == 0
    assert stop.checkpoint == str(path)
    assert run.saved == [path]


def test_the_checkpoint_holds_the_weights_of_its_step(run: Run) -> None:
    run.stopped(At("train_batch_start", 4, send(signal.SIGTERM)))
    saved = read(run.saved[0])["state_dict"]
    weights = run.module.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


@pytest.mark.parametrize("interval", [2, 3], ids=["between two steps", "within a step"])
def test_a_validation_within_the_epoch_is_put_off_too(run: Run, interval: int) -> None:
    run.stopped(At("train_batch_start", interval, send(signal.SIGTERM)), val_check_interval=interval)
    assert run.micro_batches == interval
    saved = read(run.saved[0])
    assert (saved["global_step"], saved["validation_due"]) == (1, True)
    assert run.logged_steps("val/loss") == []


def test_a_save_in_the_background_is_waited_for(run: Run) -> None:
    writer = AtomicCheckpointIO(asynchronous=True)
    stop = run.stopped(At("train_batch_start", 3, send(signal.SIGTERM)), plugins=[writer])
    assert writer._pending is None
    assert stop.checkpoint == str(run.saved[0])


def test_without_a_run_directory_nothing_was_saved(tmp_path: Path) -> None:
    checkpoint, module = Checkpoint(), TinyModule()
    callbacks = [checkpoint, GracefulStop(checkpoint), At("train_batch_start", 2, send(signal.SIGTERM))]
    with pytest.raises(Interrupted) as stop:
        make_trainer(tmp_path, callbacks).fit(module, TinyLoader([8] * 6))
    assert stop.value.checkpoint is None
    assert len(module.nll_sums) == 2
    assert list(tmp_path.iterdir()) == []


# The last step --------------------------------------------------------------------------------------------------------


def test_a_signal_in_the_last_step_lets_the_run_end(run: Run) -> None:
    run.fit(At("train_batch_start", 18, send(signal.SIGTERM)), validate=False)
    assert run.trainer is not None
    assert run.trainer.global_step == 9
    assert run.saved[0] == step_path(run.directory, 9)


@pytest.mark.parametrize("max_steps", [5, 9])
def test_the_last_step_by_max_steps_lets_the_run_end_with_its_validation(run: Run, max_steps: int) -> None:
    run.fit(At("train_batch_start", 2 * max_steps, send(signal.SIGTERM)), max_steps=max_steps)
    assert run.saved[0] == step_path(run.directory, max_steps)
    assert read(run.saved[0])["validation_due"] is False
    assert run.logged_steps("val/loss") == [2, 5, 8][: max_steps // 3]


def test_a_validation_after_the_last_step_is_put_off_as_any_other(run: Run) -> None:
    stop = run.stopped(At("train_batch_start", 18, send(signal.SIGTERM)))
    assert stop.checkpoint == str(step_path(run.directory, 9))
    assert read(run.saved[0])["validation_due"] is True


# A second signal ------------------------------------------------------------------------------------------------------


def test_a_second_signal_ends_at_once(run: Run) -> None:
    stop = run.stopped(At("train_batch_start", 3, send(signal.SIGTERM, times=2)))
    assert run.micro_batches == 2  # those of the first step
    assert stop.exit_code == 143
    assert stop.checkpoint is None
    assert run.saved == []


def test_a_second_signal_names_the_newest_checkpoint(run: Run) -> None:
    stop = run.stopped(At("train_batch_start", 9, send(signal.SIGINT, times=2)))
    assert run.micro_batches == 8
    assert stop.exit_code == 130
    assert stop.checkpoint == str(step_path(run.directory, 3))  # of the epoch's end
    assert run.saved == [step_path(run.directory, 3)]


def test_a_second_signal_in_the_middle_of_the_save_ends_at_once(run: Run) -> None:
    first = At("train_batch_start", 9, send(signal.SIGTERM))
    stop = run.stopped(first, At("save_checkpoint", 10, send(signal.SIGTERM)))
    assert run.micro_batches == 10
    assert stop.checkpoint == str(step_path(run.directory, 3))
    left = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert left == ["best.ckpt", "step-00000003.ckpt"]


# Handlers; the fixture checks that they are restored in every test ----------------------------------------------------


def test_a_run_without_a_signal_ends_with_the_handlers_it_began_with(run: Run) -> None:
    run.fit()
    assert run.micro_batches == 18


def test_a_run_that_fails_gives_the_handlers_back_too(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run.fit(At("train_batch_start", 3, fail))


# Before the time is up ------------------------------------------------------------------------------------------------


class Working(Callback):
    """Lets ten seconds pass in every micro-batch and a hundred in every batch of a validation."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clock.now += 10

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.clock.now += 100


def timed(run: Run, *, limit_s: float, preparing_s: float = 0.0) -> tuple[GracefulStop, Working]:
    clock = FakeClock()
    stop = GracefulStop(run.checkpoint, time_limit_s=limit_s, started=clock.now - preparing_s)
    stop.clock = clock
    return stop, Working(clock)


@pytest.mark.parametrize(
    ("limit_s", "last_step"),
    [
        (45, 1),
        (45.1, 2),
        (65, 2),  # 40 s for two steps, 20 for another, 5 to end
        (65.1, 3),  # the validation is not begun
    ],
)
def test_a_run_ends_before_its_time_is_up(run: Run, limit_s: float, last_step: int) -> None:
    stop, working = timed(run, limit_s=limit_s)
    ended = run.stopped(working, stop=stop)
    assert run.saved == [step_path(run.directory, last_step)]
    assert str(ended) == "stopped by --time-limit"
    assert ended.exit_code == 143
    assert working.clock.now - 100.0 <= limit_s


def test_the_next_step_may_take_as_long_as_the_longest_did(run: Run) -> None:
    stop, working = timed(run, limit_s=145)  # 60 and 20 s for two steps, 60 for another, 5 to end

    def take_longer() -> None:
        working.clock.now += 40

    run.stopped(working, At("train_batch_start", 1, take_longer), stop=stop)
    assert run.saved == [step_path(run.directory, 2)]


def test_the_time_runs_from_the_beginning_of_the_process(run: Run) -> None:
    stop, working = timed(run, limit_s=1065, preparing_s=1000)
    run.stopped(working, stop=stop)
    assert run.saved == [step_path(run.directory, 2)]


def test_time_is_left_for_a_save_as_long_as_the_longest(run: Run) -> None:
    stop, working = timed(run, limit_s=95)
    run.checkpoint.longest_save_s = 30
    run.stopped(working, stop=stop)
    assert run.saved == [step_path(run.directory, 2)]


def test_the_time_may_be_up_between_two_batches_of_a_validation(run: Run) -> None:
    stop, working = timed(run, limit_s=260)  # 60 s for the steps; after one batch 160, the next would take 100 more
    run.stopped(working, stop=stop)
    assert read(run.saved[0])["validation_due"] is True
    assert working.clock.now == 100 + 160


def test_a_run_that_is_done_in_time_is_not_stopped(run: Run) -> None:
    stop, working = timed(run, limit_s=900)  # 180 s for steps, 600 for validation
    run.fit(working, stop=stop)
    assert run.saved[0] == step_path(run.directory, 9)


# Several ranks --------------------------------------------------------------------------------------------------------


class FakeRank:
    """What the callback sees of one of two ranks; `other` is the signal that the other rank received."""

    world_size = 2
    global_step = 0
    max_steps = -1

    def __init__(self, other: int) -> None:
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=self.reduce)
        self.other = other
        self.asked = 0

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        self.asked += 1
        return torch.maximum(tensor, torch.tensor(float(self.other)))


def micro_batches_until_stopped(rank: FakeRank, first_of_step: Sequence[bool]) -> tuple[int, list[str]]:
    """Return the micro-batches processed, and what was asked of the checkpoint's callback."""
    asked: list[str] = []
    checkpoint: Any = SimpleNamespace(
        newest=None,
        save=lambda trainer, validation_due: asked.append("save, validation due" if validation_due else "save"),
        wait=lambda trainer: asked.append("wait"),
    )
    stop = GracefulStop(checkpoint)
    trainer: Any = rank
    module: Any = None
    processed = 0
    stop.on_train_start(trainer, module)
    try:
        for first in first_of_step:
            stop.on_train_batch_start(trainer, module, {"first_of_step": first}, 0)
            processed += 1
    except Interrupted:
        pass
    stop.on_train_end(trainer, module)
    return processed, asked


def test_a_signal_to_another_rank_stops_this_one_at_the_same_step() -> None:
    rank = FakeRank(other=0)
    assert micro_batches_until_stopped(rank, [True, False]) == (2, [])
    rank.other = signal.SIGTERM
    assert micro_batches_until_stopped(rank, [False, True, False]) == (1, ["save", "wait"])


def test_without_a_signal_ranks_ask_each_other_once_a_step() -> None:
    rank = FakeRank(other=0)
    assert micro_batches_until_stopped(rank, [True, False, True, False]) == (4, [])
    assert rank.asked == 2


def test_the_time_of_another_rank_is_the_reason_of_all() -> None:
    checkpoint: Any = SimpleNamespace(newest=None, longest_save_s=0.0, save=lambda *_, **__: None, wait=lambda _: None)
    module: Any = None
    sent: list[int] = []

    def stopped_by(other: int, **settings: Any) -> str:
        trainer: Any = FakeRank(other)
        reduce = trainer.strategy.reduce

        def noted(flag: torch.Tensor, reduce_op: str) -> torch.Tensor:
            sent.append(int(flag))
            reduced: torch.Tensor = reduce(flag, reduce_op)
            return reduced

        trainer.strategy.reduce = noted
        stop = GracefulStop(checkpoint, **settings)
        stop.on_train_start(trainer, module)
        with pytest.raises(Interrupted) as interruption:
            stop.on_train_batch_start(trainer, module, {"first_of_step": True}, 0)
        assert interruption.value.exit_code == 143
        return str(interruption.value)

    assert stopped_by(0, time_limit_s=1.0, started=-1000.0) == "stopped by --time-limit"
    assert stopped_by(sent[0]) == "stopped by --time-limit"
    assert stopped_by(signal.SIGTERM) == "stopped by SIGTERM"
