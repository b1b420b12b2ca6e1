"""Every optimizer step is a point to continue from, and so is every step of a run that was continued already."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.kill_and_continue import curve
from lit_tune.checkpoint import step_checkpoints, step_path
from tests.reliability.forks import Blow
from tests.reliability.interrupted import KINDS, Workshop, newest_run, workshop

KEEP_ALL = ("--checkpoint.every_n_steps", "1", "--checkpoint.keep_last", "999")
WITHOUT_DROPOUT = ("--model.lora.dropout", "0")
STEPPING = "hook:on_before_optimizer_step"
SEED = 20260
TOGETHER = 2  # runs at a time


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return the session's workshop."""
    return workshop(tmp_path_factory.getbasetemp() / "reliability")


def whole(shop: Workshop, kind: str) -> Path:
    """Make a run with a checkpoint of every step, once."""
    directory = shop.folder / f"all steps, {kind}"
    if not directory.exists():
        directory.mkdir()
        assert not any(shop.attempt(kind, directory, *KEEP_ALL).codes), directory
        assert len(step_checkpoints(newest_run(directory))) == steps_of(directory)
    return directory


def steps_of(directory: Path) -> int:
    """Return the optimizer steps of the run that has ended in `directory`."""
    return len(curve(newest_run(directory)))


def cut(source: Path, target: Path, step: int) -> Path:
    """Copy a run as if `step` optimizer steps were the last that it has saved; its curves go on to the end."""
    shutil.copytree(source, target)
    run = newest_run(target)
    shutil.rmtree(run / "result")
    for path in step_checkpoints(run):
        if path > step_path(run, step):
            path.unlink()
    assert step_path(run, step).exists()
    return target


def go_on(shop: Workshop, kind: str, directory: Path) -> None:
    """Continue to the end, keep all checkpoints, and compare with the undisturbed run."""
    ended = shop.attempt(kind, directory, *KEEP_ALL)
    assert not any(ended.codes), (ended, directory)
    shop.compare(kind, directory)


@pytest.mark.parametrize(
    ("kinds", "points"),
    [
        pytest.param(["packed"], [1, 4, 5, 10, 14], id="short"),
        pytest.param(list(KINDS), None, id="all", marks=pytest.mark.slow),
    ],
)
def test_every_optimizer_step_is_a_resume_point(
    shop: Workshop, report: Callable[[str], None], kinds: list[str], points: list[int] | None
) -> None:
    sources = {kind: whole(shop, kind) for kind in kinds}
    cases = [(kind, step) for kind in kinds for step in points or range(1, steps_of(sources[kind]))]

    def single(case: tuple[str, int]) -> None:
        kind, step = case
        directory = cut(sources[kind], shop.folder / f"{kind} from step {step}, of {len(cases)}", step)
        go_on(shop, kind, directory)
        shutil.rmtree(directory)

    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(single, cases))
    if not points:
        report(f"{len(cases)} single resume points (every optimizer step of {len(kinds)} kinds of runs): all equal")


@pytest.mark.parametrize(
    ("kinds", "pairs"), [(["packed"], 5), pytest.param(list(KINDS), 200, marks=pytest.mark.slow)], ids=["5", "200"]
)
def test_pairs_of_optimizer_steps_are_double_resume_points(
    shop: Workshop, report: Callable[[str], None], kinds: list[str], pairs: int
) -> None:
    sources = {kind: whole(shop, kind) for kind in kinds}
    every = [(kind, *pair) for kind in kinds for pair in combinations(range(1, steps_of(sources[kind])), 2)]
    cases = random.Random(SEED).sample(every, pairs)

    def double(case: tuple[str, int, int]) -> None:
        kind, first, second = case
        place = shop.folder / f"{kind} from step {first} and {second}, of {len(cases)}"
        once = cut(sources[kind], place.with_name(f"{place.name}, once"), first)
        go_on(shop, kind, once)
        twice = cut(once, place, second)
        go_on(shop, kind, twice)
        shutil.rmtree(once)
        shutil.rmtree(twice)

    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(double, cases))
    if pairs >= 200:
        report(f"{len(cases)} double resume points (random pairs of steps, {len(kinds)} kinds of runs): all equal")


def test_a_finished_run_says_so_and_is_left_as_it_is(shop: Workshop) -> None:
    directory = shop.directory("finished")
    assert shop.attempt("packed", directory).codes == [0]
    before = contents(directory / "runs")
    assert shop.attempt("packed", directory).codes == [0]
    assert "is finished" in (directory / "log-1.0").read_text()
    assert contents(directory / "runs") == before


def contents(directory: Path) -> dict[Path, str]:
    """Return the hash of every file below a directory, save hidden ones: the lock names its last holder."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", ["packed", pytest.param("two ranks", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("at", "when_done"), [("lit_tune.run:save_result", False), ("os:rename", False), ("os:rename", True)]
)
def test_a_run_killed_before_it_has_its_result_gets_it(shop: Workshop, kind: str, at: str, when_done: bool) -> None:
    directory = shop.directory(f"without result, {kind}, {at}, {when_done}")
    ended = shop.attempt(kind, directory, blow=Blow(rank=None, at=at, when_done=when_done))
    assert ended.struck
    assert (newest_run(directory) / "result").exists() == when_done
    shop.finish(kind, directory)


@pytest.mark.parametrize("devices", [[1, 2, 1], [2, 1, 2]], ids=["1-2-1", "2-1-2"])
def test_the_same_global_batch_goes_on_with_another_number_of_processes(shop: Workshop, devices: list[int]) -> None:
    kind, expected = "packed", shop.folder / f"undisturbed without dropout, {devices}"
    expected.mkdir()
    assert shop.attempt(kind, expected, *WITHOUT_DROPOUT).codes == [0]
    directory = shop.directory(f"{devices} processes")
    for ranks, blow in zip(devices, [Blow(rank=None, at=STEPPING, count=n) for n in (4, 7, 99)], strict=True):
        cut_so = ("--trainer.devices", str(ranks), "--trainer.accumulate_grad_batches", str(2 // ranks))
        strategy = ("--trainer.strategy", "ddp") if ranks > 1 else ()
        ended = shop.attempt(kind, directory, *WITHOUT_DROPOUT, *cut_so, *strategy, blow=blow, ranks=ranks)
        assert bool(ended.struck) == (blow.count < 99), (ended, directory)
    assert ended.codes == [0] * devices[-1], (ended, directory)
    one, other = curve(newest_run(expected)), curve(newest_run(directory))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for row, same in zip(one, other, strict=True):
        assert row.keys() == same.keys()
        for name in row:
            assert float(same[name]) == pytest.approx(float(row[name]), rel=1e-5), (name, row["step"])
