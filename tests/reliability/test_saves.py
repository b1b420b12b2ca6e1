"""Saves that are cut short: killed at every call, at any moment, on a full disk. The checkpoint before them stays.

Each case is a forked child that saves in a run which has checkpoints already. What it finds on the disk afterwards is
what the user would find.
"""

import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from lit_tune import checkpoint
from lit_tune.callbacks.checkpoint import link, settle
from lit_tune.checkpoint import BEST, DIRECTORY, AtomicCheckpointIO, read, step_checkpoints, step_path
from lit_tune.errors import SaveError

MIB = 1024**2
GIVE_UP_S = 60  # for a child that hangs

OLDER, PREVIOUS, NEW, NEXT = 1, 2, 3, 4  # steps


def content(step: int) -> dict[str, Any]:
    """Make a checkpoint of 0.3 MB: some tensors larger than a write's buffer, many smaller."""
    random = torch.Generator().manual_seed(step)
    weights = {f"weight.{i}": torch.randn(20_000 if i < 3 else 9, generator=random) for i in range(8)}
    return {"global_step": step, "state_dict": weights, "loops": {"done": [step, None, 0.1]}}


def step_of(path: Path) -> int:
    """Return the step whose content a checkpoint has, of which every bit must be right."""
    found = read(path)
    step: int = found["global_step"]
    weights, expected = found.pop("state_dict"), content(step)
    expected_weights = expected.pop("state_dict")
    assert found == expected
    assert list(weights) == list(expected_weights)
    assert all(torch.equal(weights[name], weight) for name, weight in expected_weights.items())
    return step


# Where ----------------------------------------------------------------------------------------------------------------


class OtherDisk(NamedTuple):
    """A directory on another file system than the tests' own."""

    path: Path
    small: bool  # of its own, so that it can be filled


@pytest.fixture(scope="module")
def other_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherDisk]:
    """Give a small tmpfs where mounting is permitted (root), else a directory in Linux' shared memory."""
    path = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield OtherDisk(path, small=True)
        subprocess.run(["umount", str(path)], check=True)
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield OtherDisk(Path(name), small=False)


# Faults ---------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A save and what happens to it."""

    fault: str  # kill: before a call; torn: in the middle of one; late: after some time; full: no room
    at: float  # the call's number; the share of a whole save's time, or of its bytes, that passes before
    asynchronous: bool
    over: bool  # it replaces the previous checkpoint
    elsewhere: bool  # on the other disk, with TMPDIR on the tests' own; or the other way round


CALLS: dict[str, Callable[..., object]] = {
    "fsync": os.fsync,
    "replace": os.replace,
    "mkdir": os.mkdir,
    "unlink": os.unlink,
    "link": os.link,
}


class Calls:
    """Counts the calls by which a save changes the disk, and does something at one of them.

    Args:
        number: Which; the first is 1.
        act: What to do there, given a function that does half of the call.
    """

    def __init__(self, number: float, act: Callable[[Callable[[], object]], None]) -> None:
        self.number = number
        self.act = act
        self.count = 0

    def come(self, half: Callable[[], object]) -> None:
        self.count += 1
        if self.count == self.number:
            self.act(half)

    def install(self) -> None:
        """Patch this process (a child: there is no way back)."""
        for name, function in CALLS.items():
            setattr(os, name, partial(self._call, function))

        def opened(path: Path, mode: str = "r", *args: Any, **settings: Any) -> Any:
            if "w" not in mode:
                return open_file(path, mode, *args, **settings)
            return io.BufferedRandom(CountedFile(path, self))

        open_file, Path.open = Path.open, opened  # type: ignore[method-assign, assignment]

    def _call(self, function: Callable[..., object], *args: Any, **settings: Any) -> object:
        self.come(lambda: function(*args, **settings))
        return function(*args, **settings)


class CountedFile(io.FileIO):
    """A file each of whose write(2) calls is counted; what Python holds back in a buffer is not written yet."""

    def __init__(self, path: Path, calls: Calls) -> None:
        super().__init__(path, "w+")
        self.calls = calls

    def write(self, data: Any) -> int:
        self.calls.come(lambda: super(CountedFile, self).write(memoryview(data)[: len(data) // 2]))
        return super().write(data)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process does nothing more")


def kill(half: Callable[[], object]) -> None:
    die()


def tear(half: Callable[[], object]) -> None:
    with suppress(OSError):  # what was to be made is there, what was to go is gone
        half()
    die()


def fill(half: Callable[[], object]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save(content: dict[str, Any], path: Path, *, asynchronous: bool) -> None:
    """Save as training does: the checkpoint, then the best one's link, then old ones go."""
    after = partial(settle, path, improved=True, keep_last=2)
    plugin = AtomicCheckpointIO(asynchronous=asynchronous)
    plugin.save_checkpoint(content, path, {"after": after})
    plugin.wait()


class Child(NamedTuple):
    """How a child ended."""

    how: str  # saved, told, killed
    text: str  # what was told, or the number of calls
    seconds: float


def in_child(
    action: Callable[[], None], calls: Calls | None, temporary: Path, kill_after_s: float | None = None
) -> Child:
    """Save in a forked child that can be killed; return how that ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "?"
        try:
            signal.alarm(GIVE_UP_S)
            os.close(reading)
            os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
            if calls is not None:
                calls.install()
            os.write(writing, b"go\n")
            action()
            answer = f"saved {calls.count if calls else 0}"
        except SaveError as error:
            answer = f"told {error}"
        except BaseException as error:  # a child must not go on as pytest
            answer = f"failed {error!r}"
        finally:
            os.write(writing, f"{answer}\n".encode())
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.readline() == b"go\n"
        started = time.perf_counter()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        answer = pipe.readline().decode().strip()
        seconds = time.perf_counter() - started
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the child hung: {status}"
    how, _, text = answer.partition(" ")
    return Child(how or "killed", text, seconds)


# The cases ------------------------------------------------------------------------------------------------------------


def fresh_run(run: Path) -> Path:
    """Make a run with two checkpoints, of which the next save removes the older one."""
    run.mkdir()
    for step in (OLDER, PREVIOUS):
        checkpoint.write(content(step), step_path(run, step))
    link(step_path(run, PREVIOUS), run / DIRECTORY / BEST)
    return run


def whole_save(run: Path, *, over: bool) -> Child:
    """Let a save pass, to know how often it calls and how long it takes."""
    path = step_path(fresh_run(run), PREVIOUS if over else NEW)
    action = partial(save, content(NEW), path, asynchronous=False)
    counted = in_child(action, Calls(0, kill), run)
    timed = min((in_child(action, None, run) for _ in range(3)), key=lambda child: child.seconds)
    assert counted.how == timed.how == "saved"
    shutil.rmtree(run)
    return counted._replace(seconds=timed.seconds)


def cases(calls: dict[bool, int], seed: int = 0) -> Iterator[Case]:
    """Yield cases without end: every call of every kind of save in turn, moments at random, disks of all sizes."""
    chance = random.Random(seed)
    kinds = list(itertools.product((False, True), (False, True)))
    points = [
        Case(fault, number, asynchronous, over, chance.random() < 0.5)
        for fault in ("kill", "torn")
        for asynchronous, over in kinds
        for number in range(1, calls[over] + 1)
    ]
    chance.shuffle(points)
    for point, (asynchronous, over) in zip(itertools.cycle(points), itertools.cycle(kinds), strict=False):
        yield point
        yield Case("late", chance.uniform(0.0, 1.1), asynchronous, over, chance.random() < 0.5)
        yield Case("full", chance.uniform(0.0, 1.1), asynchronous, over, elsewhere=True)


def cut_short(case: Case, target: Path, temporary: Path, disk: OtherDisk, whole: Child) -> Child:
    """Save to `target` and let the case's fault happen; `whole` is a save without one."""
    calls, kill_after_s = None, None
    if case.fault in ("kill", "torn"):
        calls = Calls(case.at, {"kill": kill, "torn": tear}[case.fault])
    elif case.fault == "late":
        kill_after_s = case.at * whole.seconds
    elif disk.small:
        room = case.at * step_path(target.parent.parent, PREVIOUS).stat().st_size
        (disk.path / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk.path).free - int(room))))
    else:
        calls = Calls(1 + int(case.at * int(whole.text)), fill)
    action = partial(save, content(NEW), target, asynchronous=case.asynchronous)
    ended = in_child(action, calls, temporary, kill_after_s)
    (disk.path / "filler").unlink(missing_ok=True)
    return ended


@pytest.mark.parametrize("count", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_the_previous_checkpoint_survives_every_fault_within_a_save(
    tmp_path: Path, other_disk: OtherDisk, count: int, report: Callable[[str], None]
) -> None:
    wholes = {over: whole_save(tmp_path / "run", over=over) for over in (False, True)}
    loaded, seen = 0, Counter[str]()
    for case in cases({over: int(whole.text) for over, whole in wholes.items()}):
        here, there = (other_disk.path, tmp_path) if case.elsewhere else (tmp_path, other_disk.path)
        run, temporary = fresh_run(here / "run"), there / "tmp"
        temporary.mkdir()
        previous, best = step_path(run, PREVIOUS), run / DIRECTORY / BEST
        target = previous if case.over else step_path(run, NEW)

        ended = cut_short(case, target, temporary, other_disk, wholes[case.over])

        assert ended.how in ({"saved", "told"} if case.fault == "full" else {"saved", "killed"}), (case, ended)
        if ended.how == "told":
            assert ended.text.startswith((f"{target}: ", f"{target} is written")), (case, ended)
            assert "No space left on device" in ended.text, (case, ended)
        # Whatever bears a checkpoint's name is whole, and the previous one is there: itself, or what replaced it.
        steps = {path: step_of(path) for path in [*step_checkpoints(run), best]}
        assert steps[previous] in ({PREVIOUS, NEW} if case.over else {PREVIOUS}), case
        assert case.over or steps.get(target, NEW) == NEW, case
        assert steps.get(step_path(run, OLDER), OLDER) == OLDER, case
        assert steps[best] in {PREVIOUS, NEW}, case
        assert list(temporary.iterdir()) == [], case
        # The next save leaves nothing of this one.
        save(content(NEXT), step_path(run, NEXT), asynchronous=case.asynchronous)
        kept = target if target in steps else previous
        assert {*(run / DIRECTORY).iterdir()} == {step_path(run, NEXT), kept, best}, case
        shutil.rmtree(run)
        temporary.rmdir()

        if ended.how != "saved":  # the fault came in time
            seen[case.fault] += 1
            loaded += 1
            if loaded == count:
                break
    disk = "a tmpfs without room" if other_disk.small else "an injected error, as mounting is not permitted"
    report(
        f"{count:,} faults within a save: the previous checkpoint loads in {loaded:,} of {count:,} "
        f"({seen['kill']} killed before a call, {seen['torn']} within one, {seen['late']} at random, "
        f"{seen['full']} by {disk})"
    )


# What a save costs ----------------------------------------------------------------------------------------------------


def peak_growth(action: Callable[[], None]) -> int:
    """Return by how many bytes this process' memory grew at most while it ran `action`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = rss_bytes("VmRSS")
    action()
    return rss_bytes("VmHWM") - before


def rss_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


@pytest.mark.parametrize("size_mib", [48, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_save_takes_little_more_than_the_checkpoint_itself(
    tmp_path: Path, size_mib: int, report: Callable[[str], None]
) -> None:
    part = size_mib * MIB // 12 // 2 * 2  # elements of fp32
    path = step_path(tmp_path, 1)

    def measure(asynchronous: bool) -> None:
        # Three tensors, as a parameter and AdamW's two moments; one more name for the first costs nothing.
        tensors = [torch.full((part,), float(i)) for i in range(3)]
        plugin, seen = AtomicCheckpointIO(asynchronous=asynchronous), []

        def save() -> None:
            plugin.save_checkpoint(
                {"tensors": tensors, "tied": tensors[0].view(2, -1)},
                path,
                {"after": lambda: seen.append(sum(file.stat().st_size for file in tmp_path.rglob("*.*")))},
            )
            plugin.wait()

        measured = peak_growth(save), *seen
        (tmp_path / "measured").write_text(json.dumps(measured))

    figures = {}
    for asynchronous in (False, True):
        done = in_child(partial(measure, asynchronous), None, tmp_path)
        assert done.how == "saved", done
        memory, disk = json.loads((tmp_path / "measured").read_text())
        figures[asynchronous] = memory / MIB / size_mib
        assert disk <= 1.1 * size_mib * MIB
        (tmp_path / "measured").unlink()
        path.unlink()
    slack = 4 / size_mib  # buffers and Python's own objects
    assert figures[False] <= 0.1 + slack
    assert 0.5 <= figures[True] <= 1.1 + slack
    report(
        f"saving {size_mib:,} MiB of tensors: {disk / MIB / size_mib:.3f}x on disk; more memory at the peak: "
        f"{figures[False]:.3f}x, asynchronous {figures[True]:.3f}x"
    )
