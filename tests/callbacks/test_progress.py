import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lit_tune.callbacks.progress import (
    LiveDisplay,
    PlainDisplay,
    TuneProgressBar,
    clock_time,
    open_display,
    seconds_left,
    training_status,
)

from .tiny import FakeClock, TinyLoader, TinyModule, make_trainer


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class EndlessLoader(TinyLoader):
    """A loader that does not know its length, as with micro-batches of a token budget."""

    __len__ = None  # type: ignore[assignment]


def plain_bar(**settings: Any) -> tuple[TuneProgressBar, FakeClock, io.StringIO]:
    bar, clock, out = TuneProgressBar(**settings), FakeClock(), io.StringIO()
    bar.clock, bar.console = clock, Console(file=out)
    return bar, clock, out


def test_clock_time() -> None:
    assert [clock_time(seconds) for seconds in (0, 12.4, 65, 3723)] == ["0:00", "0:12", "1:05", "1:02:03"]


def test_status_shows_what_is_known() -> None:
    metrics = {
        "train/loss": torch.tensor(1.2345),
        "throughput/tokens_per_s": torch.tensor(1276.4),
        "memory/host_peak_gib": torch.tensor(1.94),
    }
    assert training_status(metrics, seconds_left=12) == "loss 1.23 · 1,276 tok/s · peak 1.9 GiB · 0:12 left"
    assert training_status(metrics | {"memory/gpu_peak_gib": 7.0}, seconds_left=None).endswith("peak 7.0 GiB")
    assert training_status({}, seconds_left=None) == ""


def test_time_left() -> None:
    assert seconds_left(seconds=20.0, steps=10, steps_left=5) == 10.0
    assert seconds_left(seconds=3.0, steps=0, steps_left=5) is None
    assert seconds_left(seconds=3.0, steps=2, steps_left=None) is None


def test_lines_come_at_most_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    bar, clock, out = plain_bar(refresh_seconds=10.0)
    module = TinyModule()
    original = module.training_step

    def slow_step(batch: dict[str, Any], batch_idx: int) -> Any:
        clock.now += 4.0
        return original(batch, batch_idx)

    module.training_step = slow_step  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, [bar], max_epochs=2)
    trainer.fit(module, TinyLoader([8, 8, 8, 8]))
    counts = [line.split(" · ")[0] for line in out.getvalue().splitlines()]
    assert counts == ["Training 0/8", "Training 3/8", "Training 6/8", "Training 8/8"]
    lines = out.getvalue().splitlines()
    assert "loss" in lines[1]
    assert lines[1].endswith("0:20 left")  # 12 s for 3 steps, 5 to go
    assert "v_num" not in out.getvalue()


def test_the_total_handed_by_the_run_counts(tmp_path: Path) -> None:
    bar, _, out = plain_bar()
    bar.total_steps = 6
    trainer = make_trainer(tmp_path, [bar], max_epochs=2)
    trainer.fit(TinyModule(), EndlessLoader([8, 8, 8]))
    lines = out.getvalue().splitlines()
    assert lines[0] == "Training 0/6"
    assert lines[-1].startswith("Training 6/6 · loss")


def test_an_unknown_total_is_left_out(tmp_path: Path) -> None:
    bar, _, out = plain_bar()
    trainer = make_trainer(tmp_path, [bar], val_check_interval=1.0)
    trainer.fit(TinyModule(), EndlessLoader([8, 8, 8]), TinyLoader([8]))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("Training")]
    assert lines[0] == "Training 0"
    assert lines[-1].startswith("Training 3 · loss")
    assert "left" not in lines[-1]


def test_validation_alone_counts_its_batches(tmp_path: Path) -> None:
    bar, _, out = plain_bar(refresh_seconds=0.0)
    make_trainer(tmp_path, [bar]).validate(TinyModule(), TinyLoader([8, 8]), verbose=False)
    assert out.getvalue().splitlines() == ["Validation 1/2", "Validation 2/2"]


def test_no_step_is_shown_twice(tmp_path: Path) -> None:
    bar, _, out = plain_bar(refresh_seconds=0.0)
    make_trainer(tmp_path, [bar]).fit(TinyModule(), TinyLoader([8, 8]))
    counts = [line.split(" · ")[0] for line in out.getvalue().splitlines()]
    assert counts == ["Training 0/2", "Training 1/2", "Training 2/2"]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    bar, _, out = plain_bar(refresh_seconds=0.0)
    bar.disable()
    make_trainer(tmp_path, [bar]).fit(TinyModule(), TinyLoader([8, 8]))
    assert out.getvalue() == ""


@pytest.mark.parametrize("width", [80, 120])
def test_live_bar_fits_the_terminal(tmp_path: Path, width: int) -> None:
    terminal = Terminal()
    bar = TuneProgressBar()
    bar.console = Console(file=terminal, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    trainer = make_trainer(tmp_path, [bar])
    trainer.fit(TinyModule(), TinyLoader([8, 8, 8]), TinyLoader([8]))
    drawn = terminal.getvalue()
    assert "3/3" in drawn
    assert "loss" in drawn.splitlines()[-1] or "loss" in drawn.splitlines()[-2]


@pytest.mark.parametrize("width", [80, 120])
def test_live_lines_are_whole(width: int) -> None:
    terminal = Terminal()
    console = Console(file=terminal, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    status = "loss 1.23 · 12,276 tok/s · peak 11.9 GiB · 1:10:12 left"
    display = LiveDisplay(console)
    display.show("Training", completed=40, total=1200, status=status)
    display.show("Validation", completed=3, total=10, status="")
    display.end("Validation")
    display.close()
    bar, below = terminal.getvalue().split("Training")[-1].splitlines()[:2]
    assert "40/1200" in bar
    assert below == status


def test_live_bar_without_a_known_total() -> None:
    terminal = Terminal()
    display = LiveDisplay(Console(file=terminal, width=80, force_terminal=True, color_system=None))
    display.show("Training", completed=4, total=None, status="")
    display.close()
    assert "4/?" in terminal.getvalue()


def test_a_log_file_gets_plain_lines_even_if_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(open_display(Console(file=io.StringIO()), plain_seconds=1.0), PlainDisplay)
    live = open_display(Console(file=Terminal()), plain_seconds=1.0)
    assert isinstance(live, LiveDisplay)
    live.close()


def test_a_failure_gives_the_terminal_back(tmp_path: Path) -> None:
    bar = TuneProgressBar()
    console = Console(file=Terminal(), force_terminal=True)
    bar.console = console

    class Failing(TinyModule):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(tmp_path, [bar]).fit(Failing(), TinyLoader([8]))
    assert bar._display is None
    console.set_live(None)  # type: ignore[arg-type]  # would raise if a live display were left
