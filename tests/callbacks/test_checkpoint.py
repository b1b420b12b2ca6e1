import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint, check_space, checkpoint_bytes, link, prune, settle
from lit_tune.checkpoint import AtomicCheckpointIO, is_intact, read, step_checkpoints, step_path, write
from lit_tune.errors import InputError, SaveError
from lit_tune.logs import read_metrics

from .tiny import Batch, FakeClock, TinyLoader, TinyModule, fit, held_out, make_trainer

GIB = 1024**3


class ScriptedModule(TinyModule):
    """A tiny module whose validations give the losses of a script."""

    def __init__(self, val_losses: Sequence[float] = ()) -> None:
        super().__init__()
        self.script = list(val_losses)
        self.validations = 0

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.script[self.validations], batch_size=1)

    @override
    def on_validation_epoch_end(self) -> None:
        self.validations += 1


def fit_scripted(
    run: Path, checkpoint: Checkpoint, *callbacks: Callback, script: Sequence[float], **settings: Any
) -> None:
    """Train with validations that give the losses of `script`."""
    module = ScriptedModule(script)
    fit(run, checkpoint, *callbacks, module=module, val_loader=held_out(6), **settings)
    assert module.validations == len(script)


def saved_steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, which must all be intact."""
    found = step_checkpoints(run)[::-1]
    assert all(is_intact(path) for path in found)
    steps: list[int] = [read(path)["global_step"] for path in found]
    assert found == [step_path(run, step) for step in steps]
    return steps


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "accumulate", "steps"),
    [
        (0, 1, [5, 10]),  # at the epochs' ends
        (2, 1, [2, 4, 5, 6, 8, 10]),
        (1, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (2, 2, [2, 3, 4, 6]),  # the last step of an epoch has one micro-batch only
    ],
)
def test_checkpoints_are_saved_at_optimizer_steps_and_epoch_ends(
    run: Path, every: int, accumulate: int, steps: list[int]
) -> None:
    checkpoint = Checkpoint(every_n_steps=every, keep_last=99)
    fit(run, checkpoint, accumulate=accumulate, max_epochs=2)
    assert saved_steps(run) == steps
    assert checkpoint.newest == step_path(run, steps[-1])


class OnSave(Callback):
    """Note at every save what the run has done so far."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.seen: list[tuple[int, int, int, bool]] = []  # step, validations, rows on disk, an epoch that has ended
        self.validations = 0
        self.epochs = 0

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs += 1

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        rows = read_metrics(self.run / "metrics.csv")
        self.seen.append((checkpoint["global_step"], self.validations, len(rows), self.epochs > 0))


def test_a_checkpoint_is_saved_when_row_validation_and_epoch_of_its_step_are_over(run: Path) -> None:
    on_save = OnSave(run)
    fit(run, Checkpoint(every_n_steps=1), on_save, val_loader=held_out(6), max_epochs=2, lengths=[8] * 4)
    assert on_save.seen[:4] == [(1, 0, 1, False), (2, 0, 2, False), (3, 0, 3, False), (4, 1, 4, True)]
    assert on_save.seen[-1] == (8, 2, 8, True)
    assert [row["step"] for row in read_metrics(run / "metrics.csv") if row["val/loss"]] == ["3", "7"]


def test_a_run_that_ends_within_an_epoch_is_saved_at_its_end(run: Path) -> None:
    fit(run, Checkpoint(), max_epochs=2, max_steps=7)
    assert saved_steps(run) == [7]


class MinutePerStep(Callback):
    """Lets a minute pass in every step."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clock.now += 60


def test_checkpoints_are_saved_after_minutes(run: Path) -> None:
    clock = FakeClock()
    checkpoint = Checkpoint(every_minutes=2, keep_last=99)
    checkpoint.clock = clock
    fit(run, checkpoint, MinutePerStep(clock), lengths=[8] * 7, max_epochs=2)
    # The clock starts anew at every save, that of the epoch's end included.
    assert saved_steps(run) == [2, 4, 6, 7, 9, 11, 13, 14]


def test_the_longest_save_is_known(run: Path) -> None:
    class SlowSave(Callback):
        @override
        def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
            clock.now += next(seconds)

    clock, seconds = FakeClock(), iter([3.0, 7.0, 5.0])
    checkpoint = Checkpoint(every_n_steps=1)
    checkpoint.clock = clock
    fit(run, checkpoint, SlowSave(), lengths=[8] * 3)
    assert checkpoint.longest_save_s == 7.0


def test_without_a_run_directory_nothing_is_saved(tmp_path: Path) -> None:
    checkpoint = Checkpoint(every_n_steps=1)
    trainer = make_trainer(tmp_path, [checkpoint])
    trainer.fit(TinyModule(), TinyLoader([8, 8]))
    assert trainer.global_step == 2
    assert checkpoint.newest is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value", "least"),
    [
        ("every_n_steps", -1, "0 or more"),
        ("keep_last", 0, "1 or more"),
        ("every_minutes", 0, "more than 0"),
        ("every_minutes", -0.5, "more than 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting: str, value: float, least: str) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(InputError, match=f"^checkpoint.{setting} is {value}; it must be {least}.$"):
        Checkpoint(**settings)


def test_a_step_is_not_saved_before_its_validation(run: Path) -> None:
    class Broken(Callback):
        @override
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(run, Checkpoint(every_n_steps=1), Broken(), val_loader=held_out(6))
    assert saved_steps(run) == [4]


def test_a_step_is_saved_once(run: Path) -> None:
    on_save = OnSave(run)
    # Due at the epoch's end by its number, because the epoch is over, and because the run is.
    fit(run, Checkpoint(every_n_steps=5), on_save, val_loader=held_out(6))
    assert [step for step, *_ in on_save.seen] == [5]


def test_what_a_run_goes_on_from_is_not_saved_again(run: Path) -> None:
    fit(run, Checkpoint(), max_epochs=1)
    on_save = OnSave(run)
    fit(run, Checkpoint(every_n_steps=5), on_save, max_epochs=2, ckpt_path=step_path(run, 5))
    assert [step for step, *_ in on_save.seen] == [10]


def test_a_checkpoint_says_whether_a_validation_is_due(run: Path) -> None:
    fit(run, Checkpoint())
    assert read(step_path(run, 5))["validation_due"] is False
    # As it stops for a signal: Lightning is about to validate.
    checkpoint = Checkpoint()
    checkpoint.bind(run)
    trainer: Any = SimpleNamespace(global_step=6, save_checkpoint=lambda path, storage_options: saved.append(said()))
    module: Any = None

    def said() -> bool:
        content: dict[str, Any] = {}
        checkpoint.on_save_checkpoint(trainer, module, content)
        due: bool = content["validation_due"]
        return due

    saved: list[bool] = []
    checkpoint.save(trainer, validation_due=True)
    trainer.global_step = 7
    checkpoint.save(trainer)
    assert saved == [True, False]


def test_the_logs_are_written_out_before_a_checkpoint(run: Path) -> None:
    done: list[str] = []
    checkpoint = Checkpoint()
    checkpoint.bind(run, flush_logs=lambda: done.append("flush"))
    trainer: Any = SimpleNamespace(global_step=1, save_checkpoint=lambda *_, **__: done.append("save"))
    checkpoint.save(trainer)
    assert done == ["flush", "save"]


# In the background ----------------------------------------------------------------------------------------------------


def test_saved_in_the_background_checkpoints_are_the_same(run: Path, tmp_path: Path) -> None:
    plain, behind = tmp_path / "plain", tmp_path / "behind"
    for directory, asynchronous in ((plain, False), (behind, True)):
        writer = AtomicCheckpointIO(asynchronous=asynchronous)
        checkpoint = Checkpoint(every_n_steps=1, keep_last=3, asynchronous=asynchronous)
        fit(directory, checkpoint, val_loader=held_out(6), max_epochs=2, plugins=[writer])
    assert saved_steps(behind) == saved_steps(plain) == [8, 9, 10]
    assert best_step(behind) == best_step(plain)
    for step in (8, 9, 10):
        one, other = (read(step_path(directory, step))["state_dict"] for directory in (plain, behind))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_does_not_end_before_the_last_save_is_on_the_disk(run: Path) -> None:
    class Noting(AtomicCheckpointIO):
        @override
        def wait(self) -> None:
            super().wait()
            done.append("waited")

    class End(Callback):
        @override
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            done.append("ended")

    done: list[str] = []
    fit(run, Checkpoint(asynchronous=True), End(), plugins=[Noting(asynchronous=True)])
    assert done[:3] == ["waited", "waited", "ended"]  # for an earlier save, for this one


def test_the_fault_of_the_last_save_in_the_background_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SaveError("the disk is full")

    monkeypatch.setattr("lit_tune.checkpoint.write", full)
    writer = AtomicCheckpointIO(asynchronous=True)
    with pytest.raises(SaveError, match="the disk is full"):
        fit(run, Checkpoint(asynchronous=True), plugins=[writer])


# Which are kept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_are_kept(run: Path, keep_last: int) -> None:
    fit(run, Checkpoint(every_n_steps=1, keep_last=keep_last), max_epochs=2)
    assert saved_steps(run) == [8, 9, 10][-keep_last:]
    assert len(list((run / "checkpoints").iterdir())) == keep_last  # without validation none is the best


def test_a_continued_runs_own_older_checkpoints_are_removed_too(run: Path) -> None:
    fit(run, Checkpoint(), max_epochs=1)
    fit(run, Checkpoint(), max_epochs=2, ckpt_path=step_path(run, 5))
    assert saved_steps(run) == [10]


def test_pruning_leaves_all_that_is_not_its_own(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)
    for step in (1, 2, 30):
        write({"step": step}, step_path(run, step))
    folder = run / "checkpoints"
    for name in ("best.ckpt", "mine.ckpt", "step-mine.ckpt", ".step-00000031.ckpt.0123.partial", ".best.ckpt.partial"):
        (folder / name).write_bytes(b"")
    prune(run, keep_last=2)
    left = {path.name for path in folder.iterdir()}
    assert left == {"step-00000002.ckpt", "step-00000030.ckpt", "best.ckpt", "mine.ckpt", "step-mine.ckpt"}


def test_settled_a_checkpoint_is_the_best_if_it_improved_and_older_ones_are_gone(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)
    for step in (1, 2, 3):
        write({"global_step": step}, step_path(run, step))
        settle(step_path(run, step), improved=step == 2, keep_last=1)
        assert saved_steps(run) == [step]
    assert best_step(run) == 2


def test_settled_a_checkpoint_is_the_newest_of_its_run(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)
    for step in (1, 2, 4, 9):
        write({"global_step": step}, step_path(run, step))
    settle(step_path(run, 2), improved=False, keep_last=9)  # the run went on from step 1
    assert saved_steps(run) == [1, 2]
    settle(step_path(run, 2), improved=False, keep_last=1)
    assert saved_steps(run) == [2]


def test_a_damaged_newest_checkpoint_gives_way_to_what_is_made_after_the_one_before(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)
    for step in (3, 6, 9):
        write({"global_step": step}, step_path(run, step))
    step_path(run, 9).write_bytes(b"damaged")
    for step in (7, 8):  # the run goes on from 6
        write({"global_step": step}, step_path(run, step))
        settle(step_path(run, step), improved=False, keep_last=2)
        assert all(is_intact(path) for path in step_checkpoints(run))
    assert saved_steps(run) == [7, 8]


# The best -------------------------------------------------------------------------------------------------------------


def best_step(run: Path) -> int:
    path = run / "checkpoints" / "best.ckpt"
    assert is_intact(path)
    step: int = read(path)["global_step"]
    return step


@pytest.mark.parametrize(
    ("val_losses", "best"),
    [([3.0, 1.0, 2.0], 10), ([1.0, 2.0, 1.0], 5), ([3.0, 2.0, 1.0], 15), ([float("nan")] * 3, 0)],
)
def test_the_best_is_that_of_the_lowest_validation_loss(run: Path, val_losses: list[float], best: int) -> None:
    checkpoint = Checkpoint()
    fit_scripted(run, checkpoint, script=val_losses, max_epochs=3)
    assert saved_steps(run) == [15]
    if best:
        assert best_step(run) == best
        assert checkpoint.best_loss == min(val_losses)
    else:
        assert not (run / "checkpoints" / "best.ckpt").exists()


def test_a_validation_within_an_epoch_can_be_the_best(run: Path) -> None:
    fit_scripted(run, Checkpoint(), script=[3.0, 1.0, 2.0], lengths=[8] * 6, val_check_interval=2)
    assert best_step(run) == 4
    assert saved_steps(run) == [6]


def test_a_validation_before_training_is_never_the_best(run: Path) -> None:
    class Files(Callback):
        @override
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.extend(run.rglob("*.ckpt"))

    found: list[Path] = []
    fit_scripted(run, Checkpoint(), Files(), script=[0.5, 2.0], num_sanity_val_steps=1)
    assert found == []
    assert best_step(run) == 5


def test_a_continued_run_knows_the_best_loss_so_far(run: Path) -> None:
    fit_scripted(run, Checkpoint(), script=[2.0, 3.0], max_epochs=2)
    checkpoint = Checkpoint()
    fit_scripted(run, checkpoint, script=[2.5], max_epochs=3, ckpt_path=step_path(run, 10))
    assert checkpoint.best_loss == 2.0
    assert best_step(run) == 5
    fit_scripted(run, Checkpoint(), script=[1.5], max_epochs=4, ckpt_path=step_path(run, 15))
    assert best_step(run) == 20


def test_the_best_takes_no_room_while_it_is_the_newest(run: Path) -> None:
    fit_scripted(run, Checkpoint(), script=[1.0])
    assert os.path.samefile(run / "checkpoints" / "best.ckpt", step_path(run, 5))


def test_without_hard_links_the_best_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        write({"step": step}, step_path(tmp_path, step))
        link(step_path(tmp_path, step), tmp_path / "best.ckpt")
        assert read(tmp_path / "best.ckpt") == {"step": step}
    assert not os.path.samefile(tmp_path / "best.ckpt", step_path(tmp_path, 2))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_link_replaces_what_was_there_and_what_an_interrupted_one_left(tmp_path: Path) -> None:
    for name in ("new", "best", ".best.partial"):
        (tmp_path / name).write_text(name)
    link(tmp_path / "new", tmp_path / "best")
    assert (tmp_path / "best").read_text() == "new"
    assert os.path.samefile(tmp_path / "best", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "new"]


# Space ----------------------------------------------------------------------------------------------------------------


def with_free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_too_little_space_is_refused_before_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = TinyModule()
    needed = 3 * checkpoint_bytes(module)  # the newest, the best and the one being written
    with_free_bytes(monkeypatch, needed - 1)
    with pytest.raises(InputError, match="GiB are needed there for 3 checkpoints"):
        fit(run, Checkpoint(), module=module)
    assert module.nll_sums == []
    with_free_bytes(monkeypatch, needed)
    fit(run, Checkpoint(), module=module)
    assert saved_steps(run) == [5]


def test_what_is_said_of_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_bytes(monkeypatch, 5 * GIB)
    with pytest.raises(InputError) as told:
        check_space(tmp_path, 2 * GIB, copies=3)
    assert str(told.value) == (
        f"{tmp_path}: 6.0 GiB are needed there for 3 checkpoints, 5.0 GiB are free; free some, "
        "set trainer.default_root_dir to another disk, or lower checkpoint.keep_last."
    )


def test_the_size_is_foretold(run: Path) -> None:
    class AdamModule(TinyModule):
        @override
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=0.1)

    module = AdamModule()
    fit(run, Checkpoint(), module=module)
    # Besides numbers the file holds names and zip's entries, about 300 bytes a tensor.
    assert step_path(run, 5).stat().st_size == pytest.approx(checkpoint_bytes(module), rel=0.15)


def test_frozen_weights_need_no_space() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 5, bias=False))
    module[0].requires_grad_(False)
    assert checkpoint_bytes(module) == 50 * (4 + 8)
    assert checkpoint_bytes(module.bfloat16()) == 50 * (2 + 8)
