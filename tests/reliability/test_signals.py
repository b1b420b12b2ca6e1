"""SIGTERM and SIGINT to any rank in any phase: the right exit code in time, nobody left, and a run that goes on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import pytest

from tests.reliability.forks import Blow
from tests.reliability.interrupted import Workshop, has_checkpoint, newest_run, workshop
from tests.reliability.processes import imports_torch

IN_TIME_S = 30.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)
RANKS: dict[str, tuple[str, int | None]] = {  # the kind of run, and which of its ranks get the signal
    "one process": ("packed", 0),
    "rank 0": ("two ranks", 0),
    "rank 1": ("two ranks", 1),
    "all ranks": ("two ranks", None),
}
PHASES = {
    "loading": Blow(at="hook:setup"),
    "first step": Blow(at="hook:on_after_backward"),
    "within an accumulation": Blow(at="hook:on_train_batch_start", count=6),
    "saving": Blow(at="lightning.pytorch:Trainer.save_checkpoint", count=3),
    "within a save": Blow(at="os:fsync", count=5),  # of rank 0, which writes
    "validation": Blow(at="hook:on_validation_batch_start", count=2),
    "epoch end": Blow(at="hook:on_train_epoch_end"),
    "last step": Blow(at="hook:on_before_optimizer_step", count=15),
    "twice": Blow(at="hook:on_train_batch_start", count=6, twice=True),
}


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    number: signal.Signals
    ranks: str
    phase: str


EVERY_CELL = [
    Cell(number, ranks, phase)
    for number, ranks, phase in product(SIGNALS, RANKS, PHASES)
    if (phase, ranks) != ("within a save", "rank 1")
]
SOME_CELLS = [
    Cell(signal.SIGINT, "one process", "within an accumulation"),
    Cell(signal.SIGTERM, "one process", "epoch end"),
    Cell(signal.SIGTERM, "rank 0", "twice"),
    Cell(signal.SIGTERM, "rank 1", "loading"),
    Cell(signal.SIGINT, "all ranks", "within a save"),
    Cell(signal.SIGTERM, "all ranks", "validation"),
]


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return the session's workshop."""
    return workshop(tmp_path_factory.getbasetemp() / "reliability")


def fault_of(shop: Workshop, cell: Cell, place: str) -> str:
    """Send the signal, continue the run and compare; return what was wrong, empty if nothing."""
    kind, rank = RANKS[cell.ranks]
    blow = PHASES[cell.phase]
    blow = Blow(cell.number, rank, blow.at, blow.count, twice=blow.twice)
    directory = shop.directory(f"{place} {cell.number.name}, {cell.ranks}, {cell.phase}")
    # The agent lets a rank live that has got no signal: the run has to stop it.
    ended = shop.attempt(kind, directory, blow=blow, patience_s=IN_TIME_S - 10)
    if not ended.struck:
        return f"no signal was sent: {directory}"
    done = cell.phase == "last step" and ended.codes[0] == 0  # the signal came too late to stop anything
    # A rank that the others cannot wait for ends alone with the code; else rank 0 has it, and they stop together.
    speaks = rank or 0 if cell.phase in ("loading", "twice") else 0
    if ended.codes[speaks] != 128 + cell.number and not done:
        return f"exit codes {ended.codes}: {directory}"
    if ended.seconds > IN_TIME_S or ended.forced or ended.orphans:
        return f"{ended}: {directory}"
    begun = cell.phase not in ("loading", "twice")
    if begun and not has_checkpoint(directory):
        return f"nothing was saved: {directory}"
    try:
        shop.finish(kind, directory)
    except AssertionError as fault:
        return str(fault)
    if cell.phase != "loading" and newest_run(directory).name != "run":
        return f"begun anew: {directory}"
    shutil.rmtree(directory)
    return ""


@pytest.mark.parametrize(
    "cells",
    [pytest.param(SOME_CELLS, id="some"), pytest.param(EVERY_CELL, id="all", marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_run_in_time_and_it_goes_on_from_there(
    shop: Workshop, report: Callable[[str], None], cells: list[Cell]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        faults = dict(zip(cells, pool.map(lambda cell: fault_of(shop, cell, f"of {len(cells)},"), cells), strict=True))
    wrong = {cell: fault for cell, fault in faults.items() if fault}
    line = (
        f"{len(cells) - len(wrong)} of {len(cells)} signals (SIGTERM, SIGINT x {len(RANKS)} x {len(PHASES)} phases): "
        f"right exit code within {IN_TIME_S:.0f} s, nobody left, continued to the same bits"
    )
    assert not wrong, "\n".join([line, *(f"{cell}: {fault}" for cell, fault in wrong.items())])
    if len(cells) == len(EVERY_CELL):
        report(line)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_signal_during_the_imports_ends_a_whole_process(
    shop: Workshop, report: Callable[[str], None], number: signal.Signals, ranks: str
) -> None:
    kind, rank = RANKS[ranks]
    directory = shop.directory(f"importing, {ranks}, {number.name}")
    command = shop.command(kind, directory)

    def importing() -> bool:
        started = command.ranks()  # rank 0 does its imports, then starts rank 1 and waits for it
        return len(started) == (1 if kind == "packed" else 2) and imports_torch(started[-1])

    assert command.wait_until(importing)
    command.send(number, rank)
    sent = command.seconds
    code, outlived = command.wait(timeout_s=IN_TIME_S)
    assert code in (128 + number, -number), directory
    assert not outlived
    report(f"{number.name} to {ranks} during imports: exit code {code}, gone after {command.seconds - sent:.1f} s")
