"""Activations in host memory: the same values come back, once for each storage, and the originals are given up."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lit_tune.memory import SavedTensors
from lit_tune.modules import offload
from lit_tune.modules.checkpointing import GradientCheckpointing
from lit_tune.modules.offload import ActivationOffload
from tests.modules.test_checkpointing import loss_of, model_of

MIB = 1024**2


class Copies:
    """Note the storages that are copied, and how large they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.originals: list[StorageWeakRef] = []
        self.sizes: list[int] = []
        self.made: list[offload.HostCopy] = []
        original = offload.HostCopy.__init__

        def noting(copy: offload.HostCopy, storage: Any, stream: Any, previous: Any) -> None:
            original(copy, storage, stream, previous)
            self.originals.append(StorageWeakRef(storage))
            self.sizes.append(storage.nbytes())
            self.made.append(copy)

        monkeypatch.setattr(offload.HostCopy, "__init__", noting)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


@pytest.mark.parametrize("method", ["lora", "fft"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "mlp", 2])
def test_losses_and_gradients_are_the_same_to_the_bit(
    method: str, checkpointing: GradientCheckpointing, copies: Copies
) -> None:
    plain, other = model_of(method), model_of(method, checkpointing)
    expected = loss_of(plain)
    with ActivationOffload(smallest_bytes=0).saving():
        loss = loss_of(other)
    assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    assert len(copies.sizes) >= 4  # each layer's input at the least
    for (name, one), (_, another) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert one.grad is None if another.grad is None else torch.equal(one.grad, another.grad), name


def test_what_was_offloaded_is_given_up_and_brought_back_piece_by_piece(copies: Copies) -> None:
    layers = [nn.Linear(8, 8) for _ in range(4)]
    x: Tensor = torch.randn(5, 8)
    with ActivationOffload(smallest_bytes=0).saving():
        for layer in layers:
            x = torch.tanh(layer(x))
    assert len(copies.originals) == 1 + 4  # the input, and what tanh and the next layer share
    assert [storage.expired() for storage in copies.originals] == [True] * 4 + [False]  # x itself is held here
    x.sum().backward()
    assert all(copy._fetched is None for copy in copies.made)  # none is held longer than it is needed


def test_a_storage_is_copied_once_and_comes_back_once(copies: Copies) -> None:
    back = []
    weight = torch.randn(6, 8, requires_grad=True)
    with ActivationOffload(smallest_bytes=0).saving():
        inner = weight * 2
        parts = inner[:3], inner[3:], inner.t()
        y = sum((part * part).sum() for part in parts)
    own = [size for size in copies.sizes if size == 6 * 8 * 4]
    assert len(own) == len(copies.sizes) == 1
    copy = copies.made[0]
    assert copy.views == 6  # both factors of three products
    fetched = copy.back
    copy.back = lambda: back.append(fetched()) or back[-1]  # type: ignore[method-assign,func-returns-value]
    y.backward()  # type: ignore[union-attr]
    assert len({storage.data_ptr() for storage in back}) == 1
    assert weight.grad is not None
    assert torch.equal(weight.grad, 16 * weight)  # d/dw of 2 * (2w)^2


def test_what_is_written_in_place_between_two_saves_has_two_copies(copies: Copies) -> None:
    a = torch.randn(4, 4, requires_grad=True)
    b = torch.randn(4, 4)
    start = b.clone()
    with ActivationOffload(smallest_bytes=0).saving():
        first = (a * b).sum()
        b.mul_(3)
        second = (a * b).sum()
    (first + second).backward()  # without copies autograd refuses this: b has changed
    assert torch.allclose(a.grad, 4 * start)  # type: ignore[arg-type]
    assert len(copies.sizes) == 2


def test_weights_and_small_tensors_stay(copies: Copies) -> None:
    large, small = nn.Linear(1024, 512, bias=False), nn.Linear(512, 64, bias=False)
    frozen = nn.Linear(1024, 1024, bias=False).requires_grad_(False)
    x = torch.randn(300, 1024, requires_grad=True)  # 1.2 MB
    with ActivationOffload().saving():
        y = small(large(frozen(x)))
    assert copies.sizes == [300 * 1024 * 4]  # the input of `large`; 300 * 512 * 4 is less than a MiB
    assert copies.sizes[0] > MIB > 300 * 512 * 4
    y.sum().backward()
    assert x.grad is not None


def test_backward_can_run_twice() -> None:
    a = torch.randn(4, 4, requires_grad=True)
    with ActivationOffload(smallest_bytes=0).saving():
        y = (a * a).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert torch.equal(a.grad, 4 * a)  # type: ignore[arg-type]


def test_a_graph_that_is_dropped_leaves_nothing(copies: Copies) -> None:
    engine = ActivationOffload(smallest_bytes=0)
    for _ in range(3):
        with engine.saving():
            loss_of(model_of("lora"))
    live = [copy for copy in copies.made if copy.views]
    assert live
    alive = [weakref.ref(copy) for copy in copies.made]
    copies.made.clear()
    live.clear()
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []


@pytest.mark.parametrize("checkpointing", ["none", "full", "mlp"])
def test_the_count_is_that_of_the_same_pass_without_offloading(checkpointing: GradientCheckpointing) -> None:
    counts = []
    for through in (lambda saved: saved.counting(), lambda saved: ActivationOffload(0).saving(saved)):
        model = model_of("lora", checkpointing)
        saved = SavedTensors(model.parameters())
        with through(saved):
            loss_of(model)
        counts.append(saved.bytes_on("cpu"))
    assert counts[0] == counts[1] > 0


# On a GPU -------------------------------------------------------------------------------------------------------------


def deep_sum(x: Tensor, weights: list[nn.Parameter]) -> Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x.square().sum()


@pytest.mark.gpu
def test_on_a_gpu_memory_falls_and_gradients_stay_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 1024, device="cuda")  # 16 MiB
    weights = [nn.Parameter(torch.randn(1024, 1024, device="cuda") / 32) for _ in range(24)]
    gradients, held = [], []
    passes: list[Callable[[SavedTensors], Any]] = [lambda s: s.counting(), lambda s: ActivationOffload().saving(s)]
    for through in passes * 3:
        start = torch.cuda.memory_allocated()
        saved = SavedTensors(weights)
        with through(saved):
            loss = deep_sum(x, weights)
        held.append((torch.cuda.memory_allocated() - start, saved.bytes_on("cuda"), saved.bytes_on("cpu")))
        loss.backward()
        gradients.append([weight.grad for weight in weights if weight.grad is not None])
        for weight in weights:
            weight.grad = None
    for other in gradients[1:]:
        assert all(torch.equal(one, another) for one, another in zip(gradients[0], other, strict=True))
    (on_gpu, counted, on_host), (left, still, offloaded) = held[:2]
    assert (on_host, still) == (0, 0)
    assert counted == offloaded == 25 * 16 * MIB
    assert on_gpu >= 24 * 16 * MIB
    assert left <= 2 * MIB


@pytest.mark.gpu
def test_on_a_gpu_few_storages_are_fetched_ahead() -> None:
    x = torch.randn(4096, 1024, device="cuda")
    weights = [nn.Parameter(torch.randn(1024, 1024, device="cuda") / 32) for _ in range(24)]
    for _ in range(2):
        with ActivationOffload().saving():
            loss = deep_sum(x, weights)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - start
        for weight in weights:
            weight.grad = None
    assert peak <= (offload.FETCHED_AHEAD + 5) * 16 * MIB + 24 * 4 * MIB  # and gradients, and what a step works with


def test_hooks_do_not_nest() -> None:
    """What the counting within the offloading's own hooks rests on."""
    outer: list[Tensor] = []
    x = torch.randn(3, requires_grad=True)
    note: Callable[[Tensor], Tensor] = lambda tensor: outer.append(tensor) or tensor  # type: ignore[func-returns-value] # noqa: E731
    with saved_tensors_hooks(note, note), ActivationOffload(0).saving():
        x.square().sum()
    assert outer == []
