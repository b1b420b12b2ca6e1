"""Activations in host memory: what autograd saves goes there in the forward pass, and comes back in the backward pass.

It costs two copies of every activation over the bus (PCIe 4.0 x16: some 25 GB/s each way). They run beside the
computation, on a stream of their own: a storage is dropped from the device once its copy is made, and the storages that
were saved before the one in use are fetched ahead. Weights stay, for they are there in any case, and so do small
tensors, whose copies would cost more than they free. The values are copied as they are: nothing is rounded. What
autocast makes of a weight that trains, its copy in half precision, is saved like an activation and goes with them.

On a CPU the same happens with copies in the same memory. That frees nothing; it is how the mechanism is tested.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lit_tune.memory import SavedTensors

SMALLEST_BYTES = 1024**2
COPIES_UNDER_WAY = 4  # to the host: so many storages are held on the device until their copies are made
FETCHED_AHEAD = 2


class HostCopy:
    """A storage's copy in host memory.

    Args:
        storage: On the device.
        stream: Where copies run; None on a CPU.
        previous: The one made before it, which the backward pass needs after it.
    """

    def __init__(self, storage: torch.UntypedStorage, stream: Any, previous: HostCopy | None) -> None:
        self.device = storage.device
        self.views = 0  # saved and not yet fetched
        self._stream = stream
        self._previous = weakref.ref(previous) if previous is not None else None
        self._fetched: tuple[Tensor, Any] | None = None  # bytes on the device, and the event of their arrival
        self.bytes = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=stream is not None)
        self.done = self._copy(self.bytes, _as_bytes(storage))

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy beside the computation, after all that it has been given so far; return the event of the copy's end."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def fetch(self) -> None:
        """Begin to bring the storage back, if that has not begun."""
        if self._fetched is None:
            # NOTE: allocated on the computing stream, on which it is freed too; the copy waits for that stream, and so
            # for whatever used the memory before.
            target = torch.empty(len(self.bytes), dtype=torch.uint8, device=self.device)
            self._fetched = target, self._copy(target, self.bytes)

    def back(self) -> torch.UntypedStorage:
        """Return the storage on the device again, for one of its views, and fetch those needed next."""
        self.fetch()
        assert self._fetched is not None
        on_device, arrived = self._fetched
        self.views -= 1
        if self.views <= 0:
            self._fetched = None
        ahead: HostCopy | None = self
        for _ in range(FETCHED_AHEAD if self._stream is not None else 0):
            ahead = ahead._previous() if ahead is not None and ahead._previous is not None else None
            if ahead is not None and ahead.views > 0:
                ahead.fetch()
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        return on_device.untyped_storage()


class _Offloaded:
    """A saved tensor as a view of a copied storage."""

    def __init__(self, tensor: Tensor, copy: HostCopy) -> None:
        self.copy = copy
        self.layout = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()
        copy.views += 1

    def tensor(self) -> Tensor:
        dtype, *place = self.layout
        return torch.empty(0, dtype=dtype, device=self.copy.device).set_(self.copy.back(), *place)


class ActivationOffload:
    """Keeps in host memory what a forward pass saves for its backward pass.

    Args:
        smallest_bytes: Smaller storages stay.
    """

    def __init__(self, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.smallest_bytes = smallest_bytes
        self._copies: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[HostCopy]]] = {}
        self._under_way: deque[tuple[torch.UntypedStorage, HostCopy]] = deque()
        self._last: HostCopy | None = None
        self._stream: Any = None
        self._counted: SavedTensors | None = None

    @contextmanager
    def saving(self, counted: SavedTensors | None = None) -> Iterator[None]:
        """Offload what is saved within.

        Args:
            counted: Counts every saved tensor where it ends up. Hooks on saved tensors do not nest: only the innermost
                are called, so that counting is part of these.
        """
        self._copies.clear()  # nothing of an earlier forward pass is saved again
        self._counted = counted
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            while self._under_way:
                self._await_oldest()
            self._last = None

    def _pack(self, tensor: Tensor) -> Any:
        if self._stays(tensor):
            if self._counted is not None:
                self._counted.note(tensor)
            return tensor
        offloaded = _Offloaded(tensor, self._copy_of(tensor))
        if self._counted is not None:
            self._counted.note(offloaded.copy.bytes)
        return offloaded

    def _unpack(self, packed: Any) -> Tensor:
        return packed.tensor() if isinstance(packed, _Offloaded) else packed

    def _stays(self, tensor: Tensor) -> bool:
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        return not plain or is_weight(tensor) or tensor.untyped_storage().nbytes() < self.smallest_bytes

    def _copy_of(self, tensor: Tensor) -> HostCopy:
        """Return the copy of the tensor's storage as it is now, the one already made if there is one."""
        storage = tensor.untyped_storage()
        # By version, for what is written in place between two saves has two contents. The weak reference keeps the
        # identity from being given to another storage.
        key = storage._cdata, tensor._version
        if key in self._copies and (copy := self._copies[key][1]()) is not None:
            return copy
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        copy = HostCopy(storage, self._stream if tensor.is_cuda else None, self._last)
        self._copies[key] = StorageWeakRef(storage), weakref.ref(copy)
        self._last = copy
        if copy.done is not None:
            self._under_way.append((storage, copy))
            if len(self._under_way) > COPIES_UNDER_WAY:
                self._await_oldest()
        return copy

    def _await_oldest(self) -> None:
        """Let the computation wait for the oldest copy, so that the memory of its storage may be used again."""
        storage, copy = self._under_way.popleft()
        torch.cuda.current_stream(storage.device).wait_event(copy.done)


def is_weight(tensor: Tensor) -> bool:
    """Tell whether a saved tensor is a parameter, or a view of one such as the transpose that a product saves."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
