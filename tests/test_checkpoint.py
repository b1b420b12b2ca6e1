import errno
import os
import resource
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from lit_tune.checkpoint import (
    AtomicCheckpointIO,
    is_intact,
    newest_intact,
    read,
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
        assert str(told.value) == (
            f"{path}: the checkpoint could not be written ([Errno 28] No space left on device); "
            "free space there and continue."
        )
        assert list(path.parent.iterdir()) == [path], room
        assert read(path) == OLD
    with monkeypatch.context() as patch:
        fill_disk(patch, size)
        write(checkpoint(), path)
    assert_equal(read(path), checkpoint())


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
    with largest_file(1 << 20), pytest.raises(SaveError):
        write(large, path)
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == OLD


def test_where_no_directory_can_be_made_saving_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="could not be written"):
        write(OLD, tmp_path / "file" / "a.ckpt")


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


def test_ctrl_c_while_writing_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(os, "fsync", KeyboardInterrupt())(patch)
        with pytest.raises(KeyboardInterrupt):
            write(checkpoint(), path)
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == OLD


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


def test_a_missing_file_is_told(path: Path) -> None:
    missing = path.with_name("other.ckpt")
    assert refusal(missing) == f"ckpt_path: there is no checkpoint {missing}."
    assert refusal(path.parent) == f"ckpt_path: there is no checkpoint {path.parent}."


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
    assert refusal(path).startswith(f"ckpt_path: {path} cannot be read: Weights only load failed.")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # as proof that it would have run
    assert trace.exists()


# A run's checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Give a run with checkpoints of steps 5, 90 and 100, and files that are none of them."""
    run = tmp_path / "run"
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
