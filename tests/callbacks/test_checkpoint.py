import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint, check_space, checkpoint_bytes, link, prune
from lit_tune.checkpoint import AtomicCheckpointIO, is_intact, read, step_checkpoints, step_path, write
from lit_tune.errors import InputError

from .tiny import Batch, FakeClock, TinyLoader, TinyModule, make_trainer

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


def fit(
    run: Path,
    checkpoint: Checkpoint,
    *others: Callback,
    module: TinyModule | None = None,
    lengths: Sequence[int] = (8, 8, 8, 8, 8),
    accumulate: int = 1,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    """Train a tiny module, with checkpoints in `run`."""
    run.mkdir(exist_ok=True)
    checkpoint.bind(run)
    trainer = make_trainer(
        run, [*others, checkpoint], accumulate_grad_batches=accumulate, plugins=[AtomicCheckpointIO()], **settings
    )
    module = module or TinyModule()
    val_loader = TinyLoader([6]) if isinstance(module, ScriptedModule) else None
    trainer.fit(module, TinyLoader(lengths, accumulate=accumulate), val_loader, ckpt_path=ckpt_path)
    return trainer


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


def test_a_run_that_ends_within_an_epoch_is_saved_at_its_end(run: Path) -> None:
    fit(run, Checkpoint(), max_epochs=2, max_steps=7)
    assert saved_steps(run) == [7]


def test_checkpoints_are_saved_after_minutes(run: Path) -> None:
    class MinutePerStep(Callback):
        @override
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            clock.now += 60

    clock = FakeClock()
    checkpoint = Checkpoint(every_minutes=2, keep_last=99)
    checkpoint.clock = clock
    fit(run, checkpoint, MinutePerStep(), lengths=[8] * 7, max_epochs=2)
    # The clock starts anew at every save, that of the epoch's end included.
    assert saved_steps(run) == [2, 4, 6, 7, 9, 11, 13, 14]


def test_without_a_run_directory_nothing_is_saved(tmp_path: Path) -> None:
    checkpoint = Checkpoint(every_n_steps=1)
    trainer = make_trainer(tmp_path, [checkpoint])
    trainer.fit(TinyModule(), TinyLoader([8, 8]))
    assert trainer.global_step == 2
    assert checkpoint.newest is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("setting", "value", "least"), [("every_n_steps", -1, 0), ("keep_last", 0, 1)])
def test_settings_without_a_meaning_are_refused(setting: str, value: int, least: int) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(InputError, match=f"^checkpoint.{setting} is {value}; it must be {least} or more.$"):
        Checkpoint(**settings)


def test_an_epochs_last_step_is_not_saved_before_its_validation(run: Path) -> None:
    class Broken(Callback):
        @override
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(run, Checkpoint(every_n_steps=1), Broken(), module=ScriptedModule([1.0]))
    assert saved_steps(run) == [4]


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
    for step in (1, 2, 30):
        write({"step": step}, step_path(run, step))
    folder = run / "checkpoints"
    for name in ("best.ckpt", "mine.ckpt", "step-mine.ckpt", ".step-00000031.ckpt.0123.partial", ".best.ckpt.partial"):
        (folder / name).write_bytes(b"")
    prune(run, keep_last=2)
    left = {path.name for path in folder.iterdir()}
    assert left == {"step-00000002.ckpt", "step-00000030.ckpt", "best.ckpt", "mine.ckpt", "step-mine.ckpt"}


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
    fit(run, checkpoint, module=ScriptedModule(val_losses), max_epochs=3)
    assert saved_steps(run) == [15]
    if best:
        assert best_step(run) == best
        assert checkpoint.best_loss == min(val_losses)
    else:
        assert not (run / "checkpoints" / "best.ckpt").exists()


def test_a_validation_within_an_epoch_can_be_the_best(run: Path) -> None:
    module = ScriptedModule([3.0, 1.0, 2.0])
    fit(run, Checkpoint(), module=module, lengths=[8] * 6, val_check_interval=2)
    assert module.validations == 3
    assert best_step(run) == 4
    assert saved_steps(run) == [6]


def test_a_validation_before_training_is_never_the_best(run: Path) -> None:
    class Files(Callback):
        @override
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.extend(run.rglob("*.ckpt"))

    found: list[Path] = []
    fit(run, Checkpoint(), Files(), module=ScriptedModule([0.5, 2.0]), num_sanity_val_steps=1)
    assert found == []
    assert best_step(run) == 5


def test_a_continued_run_knows_the_best_loss_so_far(run: Path) -> None:
    fit(run, Checkpoint(), module=ScriptedModule([2.0, 3.0]), max_epochs=2)
    newest = step_path(run, 10)
    checkpoint = Checkpoint()
    fit(run, checkpoint, module=ScriptedModule([2.5]), max_epochs=3, ckpt_path=newest)
    assert checkpoint.best_loss == 2.0
    assert best_step(run) == 5
    fit(run, Checkpoint(), module=ScriptedModule([1.5]), max_epochs=4, ckpt_path=step_path(run, 15))
    assert best_step(run) == 20


def test_the_best_takes_no_room_while_it_is_the_newest(run: Path) -> None:
    fit(run, Checkpoint(), module=ScriptedModule([1.0]))
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


# Going on -------------------------------------------------------------------------------------------------------------


class Recorder(Callback):
    """Notes what happens in a run, in order: every loss and every validation."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float]] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.events.append(("train", trainer.global_step, outputs["nll_sum"].item()))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(("validate", trainer.global_step, trainer.callback_metrics["val/loss"].item()))


class PlacedLoader(TinyLoader):
    """A loader that is told its position when it is made, as `lit_tune.data.loader.TrainLoader` is."""

    def __init__(self, lengths: Sequence[int], *, consumed: int) -> None:
        super().__init__(lengths)
        self.consumed = consumed

    @override
    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class HeldOut(TinyLoader):
    """The same samples in every epoch."""

    @override
    def __iter__(self) -> Iterator[Batch]:
        yield from (self.batch(0, index) for index in range(len(self)))


def recorded(run: Path, *, ckpt_path: Path | None = None, steps_done: int = 0) -> list[tuple[str, int, float]]:
    """Train three epochs of four steps, or the rest of them."""
    recorder = Recorder()
    run.mkdir(exist_ok=True)
    checkpoint = Checkpoint(every_n_steps=1, keep_last=99)
    checkpoint.bind(run)
    trainer = make_trainer(run, [recorder, checkpoint], max_epochs=3, plugins=[AtomicCheckpointIO()])
    loader = PlacedLoader([8, 9, 7, 8], consumed=steps_done)
    trainer.fit(TinyModule(), loader, HeldOut([6]), ckpt_path=ckpt_path)
    return recorder.events


def test_from_every_checkpoint_a_run_goes_on_as_if_it_had_not_ended(run: Path, tmp_path: Path) -> None:
    whole = recorded(run)
    assert [kind for kind, _, _ in whole] == ["train", "train", "train", "train", "validate"] * 3
    for step in range(1, 12):
        # A checkpoint holds its step, and the validation that belongs to it.
        rest = [event for event in whole if event[1] > step]
        assert recorded(tmp_path / str(step), ckpt_path=step_path(run, step), steps_done=step) == rest, step


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
