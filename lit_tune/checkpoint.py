"""Checkpoints that survive: written beside the target, synced, renamed; checked by a hash before they are read.

The file is torch's own zip format with one addition: its zip comment holds the sha256 of all that comes before.
`torch.load` reads it as ever; `read` refuses it if a bit has changed, and never runs code (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from typing_extensions import override

from lit_tune.errors import InputError, SaveError

SUFFIX = ".ckpt"
BEST = f"best{SUFFIX}"
DIRECTORY = "checkpoints"

_LABEL = b"lit-tune sha256 "
_FOOTER_BYTES = len(_LABEL) + 64
_STEP = re.compile(r"step-(\d+)\.ckpt")


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, whatever happens meanwhile.

    Raises:
        SaveError: The disk is full, read-only or gone; the old file is untouched and the partial one removed.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # NOTE: torch.save into an open stream, so that a full disk raises here and nothing is staged in $TMPDIR.
            with partial.open("wb+") as stream:
                torch.save(checkpoint, stream)
                _seal(stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
            _sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a full disk into a RuntimeError about positions in the file.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise SaveError(
            f"{path}: the checkpoint could not be written ({reason}); free space there and continue."
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint after verifying its hash; tensors come to the CPU.

    Raises:
        InputError: Not there, damaged, or holding anything but plain values and tensors.
    """
    if not path.is_file():
        raise InputError(f"ckpt_path: there is no checkpoint {path}.")
    try:
        intact = is_intact(path)
    except OSError as error:
        raise InputError(f"ckpt_path: {path} cannot be read ({error.strerror}).") from error
    if not intact:
        raise InputError(f"ckpt_path: {path} is damaged or no checkpoint of lit-tune: its checksum does not match.")
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"ckpt_path: {path} cannot be read: {str(error).splitlines()[0]}") from error
    return loaded


def is_intact(path: Path) -> bool:
    """Tell whether the file ends in the hash of its own content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        remaining = os.fstat(stream.fileno()).st_size - _FOOTER_BYTES
        if remaining <= 0:
            return False
        while remaining:
            block = stream.read(min(remaining, 1 << 20))
            digest.update(block)
            remaining -= len(block)
        return stream.read() == _LABEL + digest.hexdigest().encode()


def _seal(stream: Any) -> None:
    """Append the hash of the content as the zip archive's comment."""
    # The last record of a zip file ends in the comment's length, two bytes, little-endian; torch writes no comment.
    stream.seek(-2, os.SEEK_END)
    stream.write(struct.pack("<H", _FOOTER_BYTES))
    stream.seek(0)
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    stream.write(_LABEL + digest.hexdigest().encode())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_path(run: Path, step: int) -> Path:
    """Return the file of the checkpoint after `step` optimizer steps."""
    return run / DIRECTORY / f"step-{step:08d}{SUFFIX}"


def step_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints by step, newest first."""
    found = [path for path in (run / DIRECTORY).glob(f"step-*{SUFFIX}") if _STEP.fullmatch(path.name)]
    return sorted(found, reverse=True)


def newest_intact(run: Path) -> Iterator[tuple[Path, bool]]:
    """Yield (checkpoint, intact) from the newest on, up to and including the first that is intact."""
    for path in step_checkpoints(run):
        intact = is_intact(path)
        yield path, intact
        if intact:
            return


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints, by `read` and `write`."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write(checkpoint, Path(path))

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(Path(path))

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
