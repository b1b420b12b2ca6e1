"""Checkpoints that survive: written beside the target, synced, renamed; checked by a hash before they are read.

The file is torch's own zip format with one addition: its zip comment holds the sha256 of all that comes before.
`torch.load` reads it as ever; `read` refuses it if a bit has changed, and never runs code (`weights_only=True`).

A checkpoint goes to the disk straight from where its tensors lie, without a second copy in memory; saved
asynchronously, with the one copy that lets training go on meanwhile.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import pickle
import re
import secrets
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, UntypedStorage
from typing_extensions import override

from lit_tune.errors import InputError, SaveError

SUFFIX = ".ckpt"
BEST = f"best{SUFFIX}"
DIRECTORY = "checkpoints"

_LABEL = b"lit-tune sha256 "
_FOOTER_BYTES = len(_LABEL) + 64
_STEP = re.compile(r"step-([0-9]+)\.ckpt")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, whatever happens meanwhile.

    Raises:
        SaveError: The disk is full, read-only or gone; the old file is untouched and the partial one removed.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        # NOTE: this folder only, not its parents: where a run's own directory is missing, its disk was taken away.
        path.parent.mkdir(exist_ok=True)
        try:
            with partial.open("wb+") as stream:
                _write_zip(checkpoint, stream)
                _seal(stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
            _sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(
            f"{path}: the checkpoint could not be written ({reason}); {_remedy(error, path.parent, checkpoint)}."
        ) from error


def _write_zip(checkpoint: dict[str, Any], stream: IO[bytes]) -> None:
    """Write by torch.save; a full disk and Ctrl-C are raised as what they are."""
    outer = sys.exception()
    try:
        # NOTE: into an open stream: given a path, torch tells every fault of the disk as a RuntimeError.
        torch.save(checkpoint, stream)
    except RuntimeError as error:
        # What stops torch in mid-write it follows by an error of its own, about positions in the file.
        cause = error.__context__
        if cause is not outer and (isinstance(cause, OSError) or not isinstance(cause, Exception | None)):
            raise cause from None
        raise


def _remedy(error: OSError, directory: Path, checkpoint: dict[str, Any]) -> str:
    """Say what to do about a write that failed."""
    if error.errno not in _NO_ROOM:
        return f"see that {directory} can be written and continue"
    mib = 1024**2
    needed = sum(storage.nbytes() for storage in _storages(_tensors(checkpoint)).values()) / mib
    free = shutil.disk_usage(directory).free / mib
    return f"it takes {needed:,.1f} MiB, {free:,.1f} MiB are free there; make room and continue"


def read(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint after verifying its hash; tensors come to the CPU.

    Args:
        mapped: Leave the tensors in the file until they are used: processes share what they have read of it.

    Raises:
        InputError: Not there, damaged, or holding anything but plain values and tensors.
    """
    try:
        if not path.is_file():
            raise InputError(f"ckpt_path: there is no checkpoint {path}.")
        sealed = _is_sealed(path)
    except OSError as error:
        raise InputError(f"ckpt_path: {path} cannot be read ({error.strerror}).") from error
    if not sealed:
        raise InputError(f"ckpt_path: {path} is damaged or no checkpoint of lit-tune: its checksum does not match.")
    try:
        _check_stored(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text tells how to load it all the same.
        raise InputError(
            f"ckpt_path: {path} is no checkpoint of lit-tune: it holds more than plain values and tensors; "
            "nothing of it was loaded."
        ) from error
    except Exception as error:  # a file made to do harm can bring the unpickler to any of them
        raise InputError(f"ckpt_path: {path} cannot be read: {error!r:.200}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"ckpt_path: {path} is no checkpoint of lit-tune: it holds a {type(loaded).__name__}.")
    return loaded


def is_intact(path: Path) -> bool:
    """Tell whether there is a file that can be read and that ends in the hash of its own content."""
    try:
        return path.is_file() and _is_sealed(path)
    except OSError:
        return False


def _is_sealed(path: Path) -> bool:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        remaining = os.fstat(stream.fileno()).st_size - _FOOTER_BYTES
        if remaining <= 0:
            return False
        while remaining > 0 and (block := stream.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        return stream.read() == _LABEL + digest.hexdigest().encode()


def _check_stored(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is: torch stores its records as they are."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > path.stat().st_size:
        raise zipfile.BadZipFile(f"it unpacks to {unpacked:,} bytes")


def _seal(stream: IO[bytes]) -> None:
    """Append the hash of the content as the zip archive's comment."""
    # Reading the file again, from the file cache, takes a twentieth of a save: not worth a hashing stream in between.
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
    found = {
        path: int(match[1])
        for path in (run / DIRECTORY).glob(f"step-*{SUFFIX}")
        if (match := _STEP.fullmatch(path.name))
    }
    return sorted(found, key=lambda path: found[path], reverse=True)


def newest_intact(run: Path) -> Iterator[tuple[Path, bool]]:
    """Yield (checkpoint, intact) from the newest on, up to and including the first that is intact."""
    for path in step_checkpoints(run):
        intact = is_intact(path)
        yield path, intact
        if intact:
            return


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints, by `read` and `write`.

    Args:
        asynchronous: Write in the background. Training stops only for a copy of the checkpoint in host memory, which
            takes that memory until it is written, and for an earlier save that is still under way.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._pending: futures.Future[None] | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            storage_options: `{"after": ...}`, what to call as soon as the file is in place.

        Raises:
            SaveError: It could not be written; asynchronous, the one before could not.
        """
        self.wait()
        after: Callable[[], None] | None = (storage_options or {}).get("after")
        if not self.asynchronous:
            _save(checkpoint, Path(path), after)
            return
        # A thread for each save: none is idle between two, none is missing after a fork, and an exit waits for it.
        thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = thread.submit(_save, snapshot(checkpoint), Path(path), after)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the save under way is done.

        Raises:
            SaveError: It failed.
        """
        if self._pending is None:
            return
        futures.wait([self._pending])  # an interrupt here leaves it pending, for `teardown`
        done, self._pending = self._pending, None
        done.result()

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(Path(path))

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    @override
    def teardown(self) -> None:
        self.wait()


def _save(checkpoint: dict[str, Any], path: Path, after: Callable[[], None] | None) -> None:
    write(checkpoint, path)
    if after is None:
        return
    try:
        after()
    except OSError as error:
        raise SaveError(
            f"{path} is written, but the other checkpoints beside it could not be tidied ({error})."
        ) from error


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Copy a checkpoint as it is at this moment to host memory; tensors that share memory share it in the copy too."""
    tensors = _tensors(checkpoint)
    storages = _storages(tensors)
    copies = {address: _to_host(storage) for address, storage in storages.items()}
    if any(storage.is_cuda for storage in storages.values()):
        torch.cuda.synchronize()
    on_host: dict[int, Any] = {id(tensor): _view_alike(tensor, copies[_address(tensor)]) for tensor in tensors}
    return copy.deepcopy(checkpoint, memo=on_host)


def _to_host(storage: UntypedStorage) -> UntypedStorage:
    """Copy a storage to host memory; a GPU's without waiting for it, to pinned memory, which torch keeps for reuse."""
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda).untyped_storage()
    return host.copy_(storage, non_blocking=storage.is_cuda)


def _view_alike(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """Return a tensor that lies in `storage` as `tensor` does in its own."""
    fresh = torch.empty(0, dtype=tensor.dtype)
    return fresh.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _tensors(checkpoint: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(checkpoint, Tensor, found.append)
    return found


def _storages(tensors: list[Tensor]) -> dict[int, UntypedStorage]:
    """Return the memory that tensors lie in, once each, by address."""
    return {_address(tensor): tensor.untyped_storage() for tensor in tensors}


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
