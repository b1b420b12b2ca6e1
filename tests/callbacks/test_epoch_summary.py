from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_tune.callbacks.epoch_summary import EpochSummary, epoch_line, readable_duration

from .tiny import FakeClock, TinyLoader, TinyModule, make_trainer

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


@pytest.mark.parametrize("stop_after", [2, 3, 4, 6])  # steps: within an epoch, and after an epoch's last batch
def test_resumed_epochs_equal_uninterrupted_ones(
    tmp_path: Path, stop_after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = EpochSummary()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(tmp_path, [whole, saver], max_epochs=2, enable_checkpointing=True, accumulate_grad_batches=2)
    trainer.fit(TinyModule(), TinyLoader(LENGTHS, accumulate=2))

    resumed = EpochSummary()
    trainer = make_trainer(tmp_path, [resumed], max_epochs=2, accumulate_grad_batches=2)
    capsys.readouterr()
    trainer.fit(TinyModule(), TinyLoader(LENGTHS, accumulate=2), ckpt_path=tmp_path / f"step={stop_after}.ckpt")
    assert resumed.epoch_losses == whole.epoch_losses
    assert len(resumed.val_losses) == 2
    first_printed = 0 if stop_after <= 3 else 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert [int(line.split()[1][:-1]) for line in lines] == list(range(first_printed, 2))


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
