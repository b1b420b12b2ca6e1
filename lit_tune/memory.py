"""Bytes by category: what a model, its optimizer and a forward pass hold, counted exactly, by storage.

Two tensors may share a storage (tied embeddings, views), a sharded one holds only its local part, and a quantised
weight has constants beside it: so storages are counted, each once, and never numbers of elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

GIB = 1024**3
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "other")


@dataclass(frozen=True)
class Footprint:
    """Bytes by category, on one device at one moment.

    Args:
        weights: Parameters and buffers, quantised ones with their constants.
        gradients: Of the weights that train.
        optimizer: Its state, such as Adam's two moments.
        activations: What autograd keeps of the forward pass for the backward pass.
        other: All else: workspaces, intermediate results, and what the allocator holds beyond what was asked for.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """The sum of all categories."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, more: Footprint) -> Footprint:
        return Footprint(*(getattr(self, field.name) + getattr(more, field.name) for field in fields(self)))


def storages(tensors: Iterable[Tensor]) -> dict[int, tuple[torch.device, int]]:
    """Return where each storage behind the tensors lies, and its bytes, by the storage's identity.

    A sharded tensor (DTensor) counts by its local part; a quantised weight of bitsandbytes with its constants.
    """
    found = {}
    for tensor in tensors:
        for part in storage_parts(tensor):
            storage = part.untyped_storage()
            found[storage._cdata] = part.device, storage.nbytes()
    return found


def storage_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a sharded or quantised one is made of; a plain one is its own only part."""
    yield getattr(tensor, "_local_tensor", tensor)
    for constants in (getattr(tensor, "CB", None), getattr(tensor, "SCB", None)):  # int8: codes, and a scale a row
        if constants is not None:
            yield constants
    yield from _constants(getattr(tensor, "quant_state", None))  # 4 bits


def _constants(state: Any) -> Iterator[Tensor]:
    """Yield the scales of blocks, the code book, and those of the scales where these are quantised once more."""
    if state is not None:
        yield from (part for part in (state.absmax, state.code, state.offset) if isinstance(part, Tensor))
        yield from _constants(state.state2)


def bytes_on(device: torch.device | str, tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all storages behind the tensors that lie on a kind of device such as `cuda`, each once."""
    kind = torch.device(device).type
    return sum(size for where, size in storages(tensors).values() if where.type == kind)


def bytes_by_kind(tensors: Iterable[Tensor]) -> Counter[str]:
    """Return the bytes of the storages behind the tensors by the kind of device they lie on, each storage once."""
    found: Counter[str] = Counter()
    for device, size in storages(tensors).values():
        found[device.type] += size
    return found


def weight_tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, and what quantised layers hold beside their weight."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in module.modules():
        state = getattr(layer, "state", None)  # of bitsandbytes' Linear8bitLt: it takes the codes from the weight
        yield from (part for part in (getattr(state, "CB", None), getattr(state, "SCB", None)) if part is not None)


def gradient_tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    """Yield the gradients that are there now."""
    yield from (parameter.grad for parameter in module.parameters() if parameter.grad is not None)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the tensors of an optimizer's state, one-element counters included."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class SavedTensors:
    """What autograd has saved for the backward pass, counted while it is saved, weights left out.

    Args:
        weights: Tensors whose storages are no activations although autograd keeps them.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        self._weights = set(storages(weights))
        self._saved: dict[int, tuple[torch.device, int]] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved within; the tensors themselves stay as they are."""

        def pack(tensor: Tensor) -> Tensor:
            # NOTE: an output that its own node kept as it is would hold that node: without a backward pass never freed.
            return self.note(tensor) if tensor.is_leaf else self.note(tensor).detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor and return it: a pack hook."""
        for identity, place in storages([tensor]).items():
            if identity not in self._weights:
                self._saved[identity] = place
        return tensor

    def bytes_on(self, device: torch.device | str) -> int:
        """Return the bytes saved so far on a kind of device.

        NOTE: by identity: a storage that is freed before the next is saved could lend it its own. What autograd has
        saved lives until the backward pass, so count in the forward pass alone.
        """
        kind = torch.device(device).type
        return sum(size for where, size in self._saved.values() if where.type == kind)


# -- rules of optimizers -----------------------------------------------------------------------------------------------

BNB_BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit states
BNB_MIN = 4096  # smaller parameters keep 32-bit states there


def optimizer_state(name: str, parameter: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of what an optimizer keeps of a parameter.

    - adamw: two moments as large as the parameter and in its dtype, and the number of steps (fp32).
    - adamw_8bit, paged_adamw_8bit: the moments in a byte a value, each with an fp32 scale a block of 256 values; of
      parameters with fewer than 4,096 values in fp32. (The code books are shared by all, see `optimizer_tables`.)
    - adafactor: the second moment's mean of each row and of each column; of a vector all of it; the number of steps.
    - sgd: nothing.
    """
    shape, dtype = tuple(parameter.shape), parameter.dtype
    steps = ((), torch.float32)
    if name == "adamw":
        return [(shape, dtype), (shape, dtype), steps]
    if name.endswith("adamw_8bit"):
        count = parameter.numel()
        if count < BNB_MIN:
            return [(shape, torch.float32)] * 2
        return [(shape, torch.uint8), ((-(-count // BNB_BLOCK),), torch.float32)] * 2
    if name == "adafactor":
        if len(shape) < 2:
            return [(shape, dtype), steps]
        return [((*shape[:-1], 1), dtype), ((*shape[:-2], 1, shape[-1]), dtype), steps]
    return []


def optimizer_tables(name: str, parameters: Iterable[Tensor]) -> int:
    """Return the bytes that an optimizer keeps for all parameters together: two code books of 256 fp32 values."""
    eight_bit = name.endswith("adamw_8bit") and any(p.numel() >= BNB_MIN for p in parameters)
    return 2 * 256 * 4 if eight_bit else 0


def optimizer_workspace(name: str, parameters: Sequence[Tensor], *, fused: bool, on_gpu: bool) -> int:
    """Return the bytes that a step of the optimizer takes besides its state, for a moment.

    - adamw, one kernel (fused): nothing. In lists (on a GPU, not fused): the square roots of all second moments. One
      parameter after the other (on a CPU, not fused): those of the largest.
    - adafactor: the update of one parameter after the other, so the largest parameter's size.
    - adamw_8bit: its kernels work in place. sgd: adds in place.
    """
    sizes = [p.numel() * p.element_size() for p in parameters]
    if name == "adamw" and not fused:
        return sum(sizes) if on_gpu else max(sizes)
    return max(sizes) if name == "adafactor" else 0
