from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.epoch_summary import EpochSummary, epoch_line, readable_duration
from lit_tune.checkpoint import step_path

from .tiny import FakeClock, TinyLoader, TinyModule, fit, held_out, make_trainer

LENGTHS = [5, 40, 12, 30, 7]  # unequal, and an odd number, so that the last window is short


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5s"), (65, "1m 05s"), (3665, "1h 01m 05s"), (59.7, "1m 00s"), (0, "0s")]
)
def test_readable_duration(seconds: float, text: str) -> None:
    assert readable_duration(seconds) == text


def test_epoch_line() -> None:
    line = epoch_line(0, loss=1.23449, val_loss=1.1111, tokens=12345, seconds=65)
    assert line == "Epoch 0: average loss 1.2345 (val 1.1111, 12,345 tokens, 1m 05s)"
    line = epoch_line(3, loss=0.5, val_loss=None, tokens=7, seconds=5)
    assert line == "Epoch 3: average loss 0.5000 (7 tokens, 5s)"


def test_average_is_per_token_over_unequal_micro_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, summary = TinyModule(), EpochSummary()
    summary.clock = FakeClock()
    trainer = make_trainer(tmp_path, [summary], accumulate_grad_batches=2, max_epochs=2)
    trainer.fit(module, TinyLoader(LENGTHS, accumulate=2))
    supervised = sum(LENGTHS) - 2 * len(LENGTHS)
    by_hand = [sum(module.nll_sums[:5]) / supervised, sum(module.nll_sums[5:]) / supervised]
    assert summary.epoch_losses == pytest.approx(by_hand, rel=1e-12)  # float64 sums of the same float32 figures
    mean_of_means = sum(nll / (length - 2) for nll, length in zip(module.nll_sums[:5], LENGTHS, strict=True)) / 5
    assert abs(summary.epoch_losses[0] - mean_of_means) > 1e-3  # the two differ here, so the test can tell
    assert float(trainer.callback_metrics["train/epoch_loss"]) == pytest.approx(by_hand[1], rel=1e-6)
    assert summary.val_losses == [None, None]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert lines == [f"Epoch {epoch}: average loss {by_hand[epoch]:.4f} (94 tokens, 0s)" for epoch in (0, 1)]


def test_validation_loss_belongs_to_its_own_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = EpochSummary()
    trainer = make_trainer(tmp_path, [summary], max_epochs=3, check_val_every_n_epoch=2, num_sanity_val_steps=1)
    trainer.fit(TinyModule(), TinyLoader(LENGTHS), TinyLoader([9]))
    first, second, third = summary.val_losses
    assert first is None
    assert third is None
    assert second == float(trainer.callback_metrics["val/loss"])
    assert f"(val {second:.4f}, " in capsys.readouterr().out


def test_all_ranks_are_added_up() -> None:
    summary = EpochSummary()
    summary.clock = FakeClock()
    printed: list[str] = []
    other_rank = torch.tensor([6.0, 3.0, 4.0], dtype=torch.float64)
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor + other_rank if reduce_op == "sum" else None)
    trainer: Any = SimpleNamespace(strategy=strategy)
    module: Any = SimpleNamespace(print=printed.append, log=lambda *args, **kwargs: None)
    batch = {"num_tokens": 2, "num_supervised": 1, "last_of_step": True, "epoch": 0}
    summary.on_train_batch_start(trainer, module, batch, 0)
    summary.on_train_batch_end(trainer, module, {"nll_sum": torch.tensor(2.0)}, batch, 0)
    summary.on_train_epoch_end(trainer, module)
    assert summary.epoch_losses == [2.0]  # (2 + 6) nats over 1 + 3 tokens
    assert printed == ["Epoch 0: average loss 2.0000 (6 tokens, 0s)"]


def trained(run: Path, *callbacks: Callback, step: int | None = None, **settings: Any) -> EpochSummary:
    """Train two epochs of three optimizer steps with a checkpoint of every step, or go on from one of them."""
    summary = EpochSummary()
    summary.clock = FakeClock()
    fit(
        run,
        Checkpoint(every_n_steps=1, keep_last=9),
        summary,
        *callbacks,
        lengths=LENGTHS,
        accumulate=2,
        val_loader=held_out(9),
        ckpt_path=None if step is None else step_path(run, step),
        **({"max_epochs": 2} | settings),
    )
    return summary


def epoch_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]


@pytest.mark.parametrize("step", [2, 3, 4])  # within an epoch, at its end, within the next
def test_continued_epochs_equal_uninterrupted_ones(
    tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(tmp_path)
    lines = epoch_lines(capsys)
    continued = trained(tmp_path, step=step)
    assert continued.epoch_losses == whole.epoch_losses
    assert continued.val_losses == whole.val_losses
    assert epoch_lines(capsys) == lines[step // 3 :]


def test_a_line_is_printed_when_the_epoch_is_over_and_never_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Callback):
        @override
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, Broken())
    assert epoch_lines(capsys) == []


def test_an_epoch_cut_short_gets_its_line_again_for_the_whole_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(tmp_path / "whole")
    lines = epoch_lines(capsys)
    cut_short = trained(tmp_path / "parts", max_steps=2)
    assert len(cut_short.epoch_losses) == 1
    assert cut_short.epoch_losses != whole.epoch_losses[:1]
    (short_line,) = epoch_lines(capsys)
    assert short_line.startswith("Epoch 0: average loss ")
    assert short_line.endswith("(87 tokens, 0s)")  # of the first two steps
    continued = trained(tmp_path / "parts", step=2)
    assert continued.epoch_losses == whole.epoch_losses
    assert continued.val_losses == whole.val_losses
    assert epoch_lines(capsys) == lines


def test_a_step_that_is_not_finite_does_not_count() -> None:
    summary = EpochSummary()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor))
    module: Any = SimpleNamespace(print=lambda line: None, log=lambda *args, **kwargs: None)
    for nll in (2.0, float("nan"), float("inf"), 4.0):
        batch = {"num_tokens": 3, "num_supervised": 2, "last_of_step": True, "epoch": 0}
        summary.on_train_batch_start(trainer, module, batch, 0)
        summary.on_train_batch_end(trainer, module, {"nll_sum": torch.tensor(nll)}, batch, 0)
    summary.on_train_epoch_end(trainer, module)
    assert summary.epoch_losses == [(2.0 + 4.0) / 4]


def test_time_of_an_epoch_includes_that_before_the_resume() -> None:
    trainer: Any = None
    module: Any = None
    summary, clock = EpochSummary(), FakeClock()
    summary.clock = clock
    summary.on_train_batch_start(trainer, module, {"epoch": 0}, 0)
    clock.now += 40
    resumed = EpochSummary()
    resumed.clock = clock
    resumed.load_state_dict(summary.state_dict())
    clock.now += 1000  # nothing ran
    resumed.on_train_batch_start(trainer, module, {"epoch": 0}, 0)
    clock.now += 25
    assert resumed.state_dict()["seconds"] == 65
