import errno
import os
import resource
import shutil
import signal
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_tune import checkpoint as checkpoint_module
from lit_tune.checkpoint import (
    AtomicCheckpointIO,
    is_intact,
    newest_intact,
    read,
    snapshot,
    step_checkpoints,
    step_path,
    write,
)
from lit_tune.errors import InputError, SaveError

OLD = {"step": 1}


def checkpoint() -> dict[str, Any]:
    """Make a checkpoint with all that a real one holds: weights, an optimizer's state, loop counters, settings."""
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    return {
        "state_dict": {"lora_A": weight.detach(), "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer_states": [optimizer.state_dict()],
        "loops": {"fit_loop": {"done": 3, "last": True, "loss": 0.1 + 0.2}},
        "hyper_parameters": {"lora": {"rank": 16, "targets": ["q_proj", "v_proj"]}, "base": None},
    }


def assert_equal(found: Any, expected: Any) -> None:
    """Compare bit by bit, types included."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a checkpoint that is there already."""
    path = step_path(tmp_path, 1)
    write(OLD, path)
    return path


def refusal(path: Path) -> str:
    """Return what the user is told: one line."""
    with pytest.raises(InputError) as refused:
        read(path)
    text = str(refused.value)
    assert "\n" not in text
    return text


# What is written is read ----------------------------------------------------------------------------------------------


def test_what_was_written_is_read(path: Path) -> None:
    write(checkpoint(), path)
    assert is_intact(path)
    assert_equal(read(path), checkpoint())
    assert [file.name for file in path.parent.iterdir()] == ["step-00000001.ckpt"]


def test_torch_and_zip_tools_read_it(path: Path) -> None:
    write(checkpoint(), path)
    assert_equal(torch.load(path, weights_only=True), checkpoint())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"lit-tune sha256 ")


def test_lightning_writes_and_reads_through_it(tmp_path: Path) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "new" / "a.ckpt"
    plugin.save_checkpoint(checkpoint(), str(path))
    assert is_intact(path)
    assert_equal(plugin.load_checkpoint(str(path)), checkpoint())
    plugin.remove_checkpoint(str(path))
    plugin.remove_checkpoint(str(path))  # rank 0 may have been faster
    assert not path.exists()


def test_the_new_file_is_whole_and_on_the_disk_before_it_replaces_the_old(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        whole = Path(name).is_file() and is_intact(Path(name))
        events.append(("directory" if name == str(path.parent) else "whole" if whole else "partial", read(path)))

    monkeypatch.setattr(os, "fsync", fsync)
    new = {"step": 2}
    write(new, path)
    assert events == [("whole", OLD), ("directory", new)]


def test_nothing_is_staged_elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where no temporary file can be made, whoever wants one fails.
    monkeypatch.setenv("TMPDIR", str(path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(path / "nowhere"))
    write(checkpoint(), path)
    assert_equal(read(path), checkpoint())


# Faults while writing -------------------------------------------------------------------------------------------------


class FullDisk:
    """A file on a disk that has no room behind `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file = file
        self.room = room

    def write(self, data: Any) -> int:
        fits = bytes(data)[: max(0, self.room - self.file.tell())]
        self.file.write(fits)
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(fits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    opened = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", *args: Any, **settings: Any) -> Any:
        stream: Any = opened(path, mode, *args, **settings)
        return FullDisk(stream, room) if "w" in mode else stream

    monkeypatch.setattr(Path, "open", open_on_full_disk)


def failing(owner: Any, name: str, error: BaseException) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return lambda monkeypatch: monkeypatch.setattr(owner, name, fail)


FAULTS = {
    "fsync fails": failing(os, "fsync", OSError(errno.EIO, "Input/output error")),
    "the rename fails": failing(Path, "replace", PermissionError(errno.EACCES, "Permission denied")),
    "the directory is read-only": failing(Path, "open", OSError(errno.EROFS, "Read-only file system")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(SaveError) as told:
            write(checkpoint(), path)
    assert str(told.value).startswith(f"{path}: the checkpoint could not be written (")
    assert "\n" not in str(told.value)
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == OLD


def test_wherever_the_disk_fills_up_the_old_file_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkpoint(), path.with_name("whole.ckpt"))
    size = path.with_name("whole.ckpt").stat().st_size
    path.with_name("whole.ckpt").unlink()
    # In the weights, in the zip's directory at the end, in the seal (80 bytes) and right before the last byte.
    for room in [*range(0, size, 60), size - 1]:
        with monkeypatch.context() as patch:
            fill_disk(patch, room)
            with pytest.raises(SaveError) as told:
                write(checkpoint(), path)
        assert str(told.value).startswith(f"{path}: the checkpoint could not be written (No space left on device); ")
        assert list(path.parent.iterdir()) == [path], room
        assert read(path) == OLD
    with monkeypatch.context() as patch:
        fill_disk(patch, size)
        write(checkpoint(), path)
    assert_equal(read(path), checkpoint())


def test_a_full_disk_tells_what_is_needed_and_what_is_free(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    fill_disk(monkeypatch, 1 << 20)
    weight = torch.zeros(1 << 20)
    with pytest.raises(SaveError) as told:
        write({"weight": weight, "tied": weight.view(2, -1), "half": torch.zeros(1 << 18, dtype=torch.half)}, path)
    assert str(told.value) == (
        f"{path}: the checkpoint could not be written (No space left on device); "
        "it takes 4.5 MiB, 3.0 MiB are free there; make room and continue."
    )


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Let the kernel refuse to write more than `limit` bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_the_kernels_own_refusal_is_a_fault_of_saving(path: Path) -> None:
    large = {"weight": torch.zeros(1 << 20)}  # 4 MiB
    with largest_file(1 << 20), pytest.raises(SaveError, match=r"\(File too large\); it takes 4.0 MiB, "):
        write(large, path)
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == OLD


def test_where_no_directory_can_be_made_saving_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="could not be written"):
        write(OLD, tmp_path / "file" / "a.ckpt")


def test_a_run_that_is_gone_is_not_made_again_elsewhere(tmp_path: Path) -> None:
    # A disk that was taken away leaves its empty mount point: what is written there is on another disk.
    with pytest.raises(SaveError, match=r"could not be written \(No such file or directory\)"):
        write(OLD, step_path(tmp_path / "run", 1))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_fault_of_the_disk_is_told_as_what_it_is(path: Path) -> None:
    weight = torch.zeros(4)
    try:
        raise KeyboardInterrupt  # a checkpoint may be saved because of another fault
    except KeyboardInterrupt:
        with pytest.raises(RuntimeError, match="view the same data as different types"):
            write({"weight": weight, "bits": weight.view(torch.int32)}, path)
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == OLD


def test_a_fault_of_the_disk_is_told_while_another_is_handled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, 100)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(SaveError, match="No space left on device"):
            write(checkpoint(), path)


def test_a_fault_after_the_rename_leaves_the_whole_new_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def fail_for_directories(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    with pytest.raises(SaveError):
        write({"step": 2}, path)
    assert read(path) == {"step": 2}
    assert list(path.parent.iterdir()) == [path]


def test_ctrl_c_while_syncing_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(os, "fsync", KeyboardInterrupt())(patch)
        with pytest.raises(KeyboardInterrupt):
            write(checkpoint(), path)
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == OLD


class CtrlC:
    """A file whose writing is interrupted at the `calls`-th call."""

    def __init__(self, file: Any, calls: int) -> None:
        self.file = file
        self.calls = calls

    def write(self, data: Any) -> int:
        self.calls -= 1
        if self.calls == 0:
            signal.raise_signal(signal.SIGINT)
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_at_any_write_is_ctrl_c(path: Path) -> None:
    for call in range(1, 1000):
        file = CtrlC((path.parent / "file").open("wb+"), call)
        try:
            checkpoint_module._write_zip(checkpoint(), file)  # type: ignore[arg-type]
            break
        except KeyboardInterrupt:
            continue
    assert call > 50
    assert file.calls > 0  # the last one was not interrupted


# Damage ---------------------------------------------------------------------------------------------------------------


def test_every_changed_byte_is_noticed(path: Path) -> None:
    write(checkpoint(), path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    # Anywhere, and all over the seal, where a reader might be lenient.
    positions = [*random.choice(len(whole) - 90, 200, replace=False), *range(len(whole) - 90, len(whole))]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        assert not is_intact(path), position


def test_every_truncation_is_noticed(path: Path) -> None:
    write(checkpoint(), path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    lengths = [*random.choice(len(whole), 50, replace=False), 0, 1, 79, 80, 81, len(whole) - 80, len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert not is_intact(path), length


def test_added_bytes_are_noticed(path: Path) -> None:
    for addition in (b"\n", path.read_bytes()[-80:]):
        write(OLD, path)
        path.write_bytes(path.read_bytes() + addition)
        assert not is_intact(path)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:99] + b"?" + whole[100:]])
def test_a_damaged_file_is_never_loaded(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(path) == (f"ckpt_path: {path} is damaged or no checkpoint of lit-tune: its checksum does not match.")


def test_a_file_of_torchs_own_is_refused(path: Path) -> None:
    torch.save(OLD, path)
    assert "no checkpoint of lit-tune" in refusal(path)


def make_dangling_link(path: Path) -> None:
    path.symlink_to("gone.ckpt")


def make_circle(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "directory": Path.mkdir,
    "dangling link": make_dangling_link,
    "link to itself": make_circle,
    "fifo": os.mkfifo,  # whoever opens it waits for ever
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_no_checkpoint(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)
    assert refusal(path) == f"ckpt_path: there is no checkpoint {path}."
    assert not is_intact(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"<!DOCTYPE html>\n<html><body>404</body></html>\n"])
def test_what_is_something_else_is_no_checkpoint(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "is damaged or no checkpoint of lit-tune" in refusal(path)
    assert not is_intact(path)


def test_a_file_that_cannot_be_read_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # NOTE: patched, for root may read everything.
    failing(Path, "open", PermissionError(errno.EACCES, "Permission denied"))(monkeypatch)
    assert refusal(path) == f"ckpt_path: {path} cannot be read (Permission denied)."
    assert not is_intact(path)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = os.stat_result((0o100644, 0, 0, 1, 0, 0, 1 << 30, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda _: large)
    assert not is_intact(path)


def test_a_sealed_file_that_is_no_dictionary_is_refused(path: Path) -> None:
    write([1, 2], path)  # type: ignore[arg-type]
    assert refusal(path) == f"ckpt_path: {path} is no checkpoint of lit-tune: it holds a list."


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(path: Path) -> None:
    plain = path.with_name("plain.ckpt")
    write({"weight": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with path.open("rb+") as stream:
        checkpoint_module._seal(stream)
    assert path.stat().st_size < 1 << 14
    assert is_intact(path)
    assert "it unpacks to 4,19" in refusal(path)


class Payload:
    """An object that, unpickled, makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_code_in_a_checkpoint_is_refused_and_not_run(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write({"state_dict": {}, "payload": Payload(trace)}, path)
    assert is_intact(path)  # the checksum says nothing of who wrote it
    assert refusal(path) == (
        f"ckpt_path: {path} is no checkpoint of lit-tune: it holds more than plain values and tensors; "
        "nothing of it was loaded."
    )
    assert not trace.exists()
    torch.load(path, weights_only=False)  # as proof that it would have run
    assert trace.exists()


# A run's checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Give a run with checkpoints of steps 5, 90 and 100, and files that are none of them."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (90, 5, 100):
        write({"step": step}, step_path(run, step))
    write({"step": 90}, run / "checkpoints" / "best.ckpt")
    (run / "checkpoints" / ".step-00000200.ckpt.0123abcd.partial").write_bytes(b"")
    (run / "checkpoints" / "step-00000300.ckpt.bak").write_bytes(b"")
    (run / "checkpoints" / "step-mine.ckpt").write_bytes(b"")
    return run


def test_a_runs_checkpoints_are_listed_newest_first(run: Path) -> None:
    assert step_checkpoints(run) == [step_path(run, step) for step in (100, 90, 5)]
    assert step_path(run, 100) == run / "checkpoints" / "step-00000100.ckpt"


def test_steps_are_numbers(run: Path) -> None:
    for step in (10**8, 10**8 - 1, 10**9):
        write(OLD, step_path(run, step))
    assert step_checkpoints(run)[:4] == [step_path(run, step) for step in (10**9, 10**8, 10**8 - 1, 100)]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert step_checkpoints(tmp_path) == []
    assert list(newest_intact(tmp_path)) == []


def test_the_newest_intact_checkpoint_is_found_past_damaged_ones(run: Path) -> None:
    assert list(newest_intact(run)) == [(step_path(run, 100), True)]
    step_path(run, 100).write_bytes(b"")
    assert list(newest_intact(run)) == [(step_path(run, 100), False), (step_path(run, 90), True)]
    for step in (90, 5):
        step_path(run, step).write_bytes(step_path(run, step).read_bytes()[:-1])
    assert [intact for _, intact in newest_intact(run)] == [False, False, False]


@pytest.mark.parametrize("make", [make for name, make in NO_FILES.items() if name != "missing"])
def test_what_cannot_be_read_is_passed_over(run: Path, make: Callable[[Path], None]) -> None:
    make(step_path(run, 200))
    assert list(newest_intact(run)) == [(step_path(run, 200), False), (step_path(run, 100), True)]


# Asynchronous saving --------------------------------------------------------------------------------------------------


class Gate:
    """Lets a background save pass only when it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.saving = threading.Event()
        plain = checkpoint_module.write

        def wait_and_write(checkpoint: dict[str, Any], path: Path) -> None:
            self.saving.set()
            assert self.opened.wait(timeout=30)
            plain(checkpoint, path)

        monkeypatch.setattr(checkpoint_module, "write", wait_and_write)

    def open_and_wait(self, pending: list[futures.Future[None]], wait: Callable[..., object] = futures.wait) -> None:
        """Take the place of `futures.wait`: the save under way passes only when it is waited for."""
        self.opened.set()
        wait(pending)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_training_goes_on_while_a_checkpoint_is_written(path: Path, gate: Gate) -> None:
    plugin, saved, done = AtomicCheckpointIO(asynchronous=True), checkpoint(), list[Any]()
    plugin.save_checkpoint(saved, path, {"after": lambda: done.append(read(path))})
    assert gate.saving.wait(timeout=30)
    assert read(path) == OLD
    # Training changes all in place.
    saved["state_dict"]["lora_A"].zero_()
    saved["optimizer_states"][0]["state"][0]["exp_avg"].zero_()
    saved["loops"]["fit_loop"]["done"] = 4
    saved["hyper_parameters"]["lora"]["targets"].append("k_proj")
    assert done == []
    gate.opened.set()
    plugin.wait()
    assert_equal(read(path), checkpoint())
    assert_equal(done, [checkpoint()])


def test_one_save_is_under_way_at_most(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, events = AtomicCheckpointIO(asynchronous=True), []

    def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
        events.append(f"copy {checkpoint['step']}")
        return snapshot(checkpoint)

    def after(step: int) -> dict[str, Callable[[], None]]:
        return {"after": lambda: events.append(f"after {step}")}

    monkeypatch.setattr(checkpoint_module, "snapshot", copied)
    plugin.save_checkpoint({"step": 2}, path, after(2))
    monkeypatch.setattr(futures, "wait", gate.open_and_wait)
    plugin.save_checkpoint({"step": 3}, path, after(3))
    plugin.wait()
    assert events == ["copy 2", "after 2", "copy 3", "after 3"]  # never two copies in memory
    assert read(path) == {"step": 3}


@pytest.mark.parametrize("finish", ["save", "wait", "teardown"])
def test_an_error_in_the_background_is_told_once(path: Path, finish: str) -> None:
    plugin, gone = AtomicCheckpointIO(asynchronous=True), path.parent / "gone" / "run" / "a.ckpt"
    finishes: dict[str, Callable[[], None]] = {
        "save": lambda: plugin.save_checkpoint({"step": 2}, path),
        "wait": plugin.wait,
        "teardown": plugin.teardown,
    }
    plugin.save_checkpoint(OLD, gone, {"after": lambda: pytest.fail("nothing was written")})
    with pytest.raises(SaveError, match="could not be written"):
        finishes[finish]()
    assert read(path) == OLD  # the next one was not begun
    finishes[finish]()
    plugin.wait()
    assert read(path) == ({"step": 2} if finish == "save" else OLD)


def test_ctrl_c_while_waiting_leaves_the_save_under_way(
    path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = AtomicCheckpointIO(asynchronous=True)
    plugin.save_checkpoint({"step": 2}, path)
    with monkeypatch.context() as patch:
        failing(futures, "wait", KeyboardInterrupt())(patch)
        with pytest.raises(KeyboardInterrupt):
            plugin.wait()
    gate.opened.set()
    plugin.teardown()
    assert read(path) == {"step": 2}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_follows_a_save_fails_as_a_save(path: Path, asynchronous: bool) -> None:
    def fail() -> None:
        raise OSError(errno.EROFS, "Read-only file system", "best.ckpt")

    def save() -> None:
        plugin = AtomicCheckpointIO(asynchronous=asynchronous)
        plugin.save_checkpoint({"step": 2}, path, {"after": fail})
        plugin.wait()

    with pytest.raises(SaveError, match=f"{path} is written, but .*Read-only file system: 'best.ckpt'"):
        save()
    assert read(path) == {"step": 2}


def test_lightning_waits_for_the_last_save(tmp_path: Path, gate: Gate) -> None:
    class Idle(LightningModule):
        def train_dataloader(self) -> list[int]:
            return [1]

        def training_step(self, batch: int) -> None:
            self.trainer.save_checkpoint(tmp_path / "a.ckpt")
            assert not (tmp_path / "a.ckpt").exists()
            gate.opened.set()

        def configure_optimizers(self) -> None:
            return None

    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(asynchronous=True)],
    )
    trainer.fit(Idle())
    assert read(tmp_path / "a.ckpt")["epoch"] == 0


def test_a_forked_process_saves_too(path: Path) -> None:
    plugin = AtomicCheckpointIO(asynchronous=True)
    plugin.save_checkpoint({"step": 2}, path)
    plugin.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a save that is never done
        try:
            plugin.save_checkpoint({"step": 3}, path)
            plugin.wait()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert read(path) == {"step": 3}


# Snapshots ------------------------------------------------------------------------------------------------------------


def tied() -> dict[str, Any]:
    """Make tensors of all kinds of layout, with memory in common."""
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "embedding": weight,
        "head": weight,
        "transposed": weight.T,
        "rows": [weight[1:], weight[:2, 1:3]],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.ones(2, 2, dtype=torch.bfloat16),
        "none": None,
        "pair": (1, "a"),
    }


def test_a_snapshot_is_equal_and_shares_memory_as_the_original_does() -> None:
    original = tied()
    copied = snapshot(original)
    assert copied["head"] is copied["embedding"]
    for name in ("embedding", "transposed", "empty", "half"):
        assert_equal(copied[name], original[name])
        assert copied[name].stride() == original[name].stride()
    for one, other in zip(copied["rows"], original["rows"], strict=True):
        assert_equal(one, other)
    assert (copied["none"], copied["pair"]) == (None, (1, "a"))
    original["embedding"].zero_()
    assert copied["embedding"].sum() == 66
    copied["embedding"][1, 1] = 100
    assert copied["transposed"][1, 1] == copied["rows"][0][0, 1] == 100


def test_a_snapshot_is_written_as_the_original(path: Path) -> None:
    write(tied(), path)
    plain = path.read_bytes()
    write(snapshot(tied()), path)
    assert len(path.read_bytes()) == len(plain)
    assert_equal(read(path)["rows"], tied()["rows"])


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_lies_in_host_memory() -> None:
    weight = torch.arange(12.0, device="cuda").reshape(3, 4)
    copied = snapshot({"weight": weight, "transposed": weight.T, "step": torch.tensor(1.0)})
    weight.zero_()
    assert_equal(copied["weight"], torch.arange(12.0).reshape(3, 4))
    assert copied["transposed"].data_ptr() == copied["weight"].data_ptr()
    assert copied["weight"].is_pinned()
