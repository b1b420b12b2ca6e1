"""SIGKILL at any moment, again and again: the run that is continued ends as if nothing had happened, to the bit."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from tests.reliability.forks import Blow
from tests.reliability.interrupted import (
    KINDS,
    DivergenceError,
    Workshop,
    check_log,
    has_checkpoint,
    workshop,
)

SEED = 20260
MOST_KILLS_A_RUN = 6
TOGETHER = 2  # runs at a time

# Where a kill may fall: the call, and the highest number of it that is worth waiting for.
ANYWHERE = {
    "hook:on_train_batch_start": 12,
    "hook:on_after_backward": 12,
    "hook:on_before_optimizer_step": 6,
    "hook:on_before_zero_grad": 6,
    "hook:on_train_batch_end": 12,
    "hook:on_validation_batch_start": 3,
}
EPOCH_BOUNDARY = {
    "hook:on_train_batch_start": 3,
    "hook:on_train_batch_end": 3,
    "hook:on_validation_start": 2,
    "hook:on_validation_batch_start": 4,
    "hook:on_validation_end": 2,
    "hook:on_train_epoch_end": 2,
    "hook:on_train_epoch_start": 2,
}
SAVING = {
    "lightning.pytorch:Trainer.save_checkpoint": 6,
    "hook:on_save_checkpoint": 6,
    "os:fsync": 12,
    "os:replace": 12,
    "lit_tune.run:save_result": 1,
    "os:rename": 1,
}
STARTING = {
    "lit_tune.checkpoint:read": 2,
    "hook:on_fit_start": 1,
    "hook:on_train_start": 1,
    "hook:on_train_end": 1,
}


def any_blow(moments: random.Random, *, ranks: int, seconds: float) -> Blow:
    """Choose a moment; two in seven are at an epoch boundary, and as many at a time by the clock."""
    rank = moments.choice([0, ranks - 1, None]) if ranks > 1 else 0
    calls = moments.choice([EPOCH_BOUNDARY, EPOCH_BOUNDARY, ANYWHERE, SAVING, STARTING, None, None])
    if calls is None:
        return Blow(rank=rank, after_s=moments.uniform(0.05, seconds))
    at = moments.choice(list(calls))
    if rank and calls in (SAVING, STARTING) and not at.startswith("hook"):
        rank = 0  # the others write nothing
    return Blow(
        rank=rank,
        at=at,
        count=moments.randint(1, calls[at]),
        when_done=moments.random() < 0.5,
        last_batch=calls is EPOCH_BOUNDARY,
    )


@dataclass
class Tally:
    """What was done, counted."""

    wanted: int  # kills
    kills: int = 0
    runs: int = 0
    chained: int = 0  # kills of runs that were killed three times or more
    at_boundary: int = 0
    two_ranks: int = 0
    fresh_starts: int = 0  # killed before there was a checkpoint
    divergent: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def chain(self, moments: random.Random) -> range:
        """Choose how often a run is to be killed: no more often than there are kills left to make."""
        return range(min(moments.randint(1, MOST_KILLS_A_RUN), max(1, self.wanted - self.kills)))

    def add(self, kills: int, *, boundary: int, ranks: int, fresh: int) -> None:
        """Count a run that has ended."""
        with self.lock:
            self.runs += 1
            self.kills += kills
            self.chained += kills if kills >= 3 else 0
            self.at_boundary += boundary
            self.two_ranks += kills if ranks == 2 else 0
            self.fresh_starts += fresh


def kill_one_run(shop: Workshop, number: int, tally: Tally, kinds: list[str]) -> None:
    """Run, kill, continue, and so on; then let it end and compare."""
    moments = random.Random(f"{SEED} {number}")
    kind = kinds[number % len(kinds)]
    ranks = KINDS[kind].ranks
    _, seconds = shop.reference(kind)
    directory = shop.directory(f"killed {number}")
    kills = boundary = fresh = 0
    try:
        for _ in tally.chain(moments):
            fresh += not has_checkpoint(directory)
            ended = shop.attempt(kind, directory, blow=any_blow(moments, ranks=ranks, seconds=seconds))
            if not any(ended.codes):  # it came to its end before the blow
                break
            if not ended.struck or -signal.SIGKILL not in ended.codes:
                raise DivergenceError(f"ended with {ended}: {directory}")
            kills += 1
            boundary += ended.struck.get("boundary", False)
        shop.finish(kind, directory)
    except DivergenceError as fault:
        tally.divergent.append(f"run {number} (seed {SEED}, {kind}): {fault}")
    else:
        shutil.rmtree(directory)
    tally.add(kills, boundary=boundary, ranks=ranks, fresh=max(fresh - 1, 0))


def repeat(kills: int, one_run: Callable[[int, Tally], None]) -> Tally:
    """Make runs until there were as many kills."""
    tally, numbers, together = Tally(kills), itertools.count(), min(kills, TOGETHER)

    def work() -> None:
        while tally.kills < kills:
            one_run(next(numbers), tally)

    with ThreadPoolExecutor(together) as pool:
        for worker in [pool.submit(work) for _ in range(together)]:
            worker.result()
    return tally


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return the session's workshop."""
    return workshop(tmp_path_factory.getbasetemp() / "reliability")


@pytest.mark.parametrize(
    ("kills", "kinds"),
    [
        pytest.param(12, ["packed", "two ranks, saved every third step"], id="12"),
        pytest.param(1000, list(KINDS), id="1000", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    shop: Workshop, report: Callable[[str], None], kills: int, kinds: list[str]
) -> None:
    tally = repeat(kills, lambda number, tally: kill_one_run(shop, number, tally, kinds))
    line = (
        f"{tally.kills:,} SIGKILLs in {tally.runs:,} runs ({tally.chained / tally.kills:.0%} chained, "
        f"{tally.at_boundary / tally.kills:.0%} at an epoch boundary, {tally.two_ranks:,} with two ranks, "
        f"{tally.fresh_starts:,} before the first checkpoint): {len(tally.divergent)} divergent runs"
    )
    assert not tally.divergent, "\n".join([line, *tally.divergent])
    if kills >= 100:
        assert tally.chained >= 0.5 * tally.kills, line
        assert tally.at_boundary >= 0.2 * tally.kills, line
        report(line)


# Whole processes ------------------------------------------------------------------------------------------------------

ALL_GONE_S = 30.0  # for the ranks that outlive a killed one


def kill_one_command(shop: Workshop, number: int, tally: Tally) -> None:
    """Do as `kill_one_run` with real processes, killed at random times: most of them after the imports."""
    moments = random.Random(f"{SEED} whole {number}")
    kind = list(KINDS)[number % len(KINDS)]
    ranks = KINDS[kind].ranks
    directory = shop.directory(f"killed whole {number}")
    kills = fresh = 0
    try:
        for _ in tally.chain(moments):
            going_on = has_checkpoint(directory)
            fresh += not going_on
            command = shop.command(kind, directory)
            if moments.random() < 0.75:
                command.wait_until(lambda command=command: "Run runs/" in command.log.read_text())  # type: ignore[misc]
            command.pause(moments.uniform(0, 2))
            command.send(signal.SIGKILL, moments.choice([0, -1, None]))  # rank 0, the last one, or all
            code, outlived = command.wait(timeout_s=ALL_GONE_S)
            if outlived:
                raise DivergenceError(f"outlived a killed rank: {outlived}, in {directory}")
            check_log(command.log, going_on=going_on, code=code)
            if code == 0:
                break
            if code != -signal.SIGKILL and ranks == 1:
                raise DivergenceError(f"ended with {code}: {directory}")
            kills += 1
        command = shop.command(kind, directory)
        if any(ended := command.wait(timeout_s=120)):
            raise DivergenceError(f"the last continuation ended with {ended}: {directory}")
        shop.compare(kind, directory)
    except DivergenceError as fault:
        tally.divergent.append(f"whole run {number} (seed {SEED}, {kind}): {fault}")
    else:
        shutil.rmtree(directory)
    tally.add(kills, boundary=0, ranks=ranks, fresh=max(fresh - 1, 0))


@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_whole_processes_killed_at_any_moment_end_with_the_same_bits(
    shop: Workshop, report: Callable[[str], None], kills: int
) -> None:
    tally = repeat(kills, lambda number, tally: kill_one_command(shop, number, tally))
    line = (
        f"{tally.kills:,} SIGKILLs of whole processes in {tally.runs:,} runs ({tally.chained / tally.kills:.0%} "
        f"chained, {tally.two_ranks:,} with two ranks): {len(tally.divergent)} divergent runs"
    )
    assert not tally.divergent, "\n".join([line, *tally.divergent])
    if kills >= 100:
        report(line)
