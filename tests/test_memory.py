"""Storages counted against sizes known beforehand, and the rules of optimizers against real ones."""

from typing import Any

import bitsandbytes
import pytest
import torch

from lit_tune.memory import (
    Footprint,
    SavedTensors,
    bytes_on,
    gradient_tensors,
    optimizer_state,
    optimizer_tables,
    optimizer_tensors,
    optimizer_workspace,
    storages,
    weight_tensors,
)
from lit_tune.modules.optim import make_optimizer


def test_a_footprint_adds_up() -> None:
    one = Footprint(1, 2, 3, 4, 5)
    assert one.total == 15
    assert one + Footprint(weights=10, other=1) == Footprint(11, 2, 3, 4, 6)


def test_a_storage_counts_once_however_many_tensors_share_it() -> None:
    tensor = torch.zeros(10, 10)
    assert bytes_on("cpu", [tensor, tensor.t(), tensor[2:4], tensor.view(100)]) == 400
    assert len(storages([tensor, tensor[1]])) == 1


def test_a_view_counts_with_the_whole_storage_that_it_keeps() -> None:
    assert bytes_on("cpu", [torch.zeros(1000)[:1]]) == 4000


def test_tensors_elsewhere_do_not_count() -> None:
    assert bytes_on("cpu", [torch.empty(10, device="meta")]) == 0


def test_tied_weights_count_once_and_buffers_count() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False))
    module[1].weight = module[0].weight
    module.register_buffer("ones", torch.ones(5))
    assert bytes_on("cpu", weight_tensors(module)) == 20 * 8 * 4 + 5 * 4


def test_gradients_count_once_they_are_there() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    assert list(gradient_tensors(layer)) == []
    layer(torch.ones(1, 4)).sum().backward()
    assert bytes_on("cpu", gradient_tensors(layer)) == 64


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 65), (16, 4097)])
def test_four_bit_weights_count_with_their_constants(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    packed.quant_state = state
    blocks = -(-rows * columns // 64)
    second = -(-blocks // 256)
    expected = (rows * columns + 1) // 2 + blocks + 4 * second + 4 * 16 + 4 * 256 + 4
    assert bytes_on("cpu", [packed]) == expected


def test_what_autograd_saves_counts_without_the_weights() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    saved = SavedTensors(weight_tensors(layer))
    inputs = torch.ones(3, 8)
    with saved.counting():
        loss = layer(inputs).exp().sum()
    assert saved.bytes_on("cpu") == 2 * 3 * 8 * 4  # the layer's input, and what exp gave
    loss.backward()
    assert layer.weight.grad is not None


SHAPES = [(64, 128), (300,), (4096,), (128, 33), (5000, 3), (1,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "sgd"])
def test_the_rule_of_an_optimizers_state_is_what_a_real_one_holds(name: Any, dtype: torch.dtype) -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = make_optimizer(name, parameters, lr=1e-3, weight_decay=0.0, fused=False)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter in parameters:
        told = [torch.empty(shape, dtype=kind) for shape, kind in optimizer_state(name, parameter)]
        real = [
            tensor
            for key, tensor in optimizer.state[parameter].items()
            if isinstance(tensor, torch.Tensor) and not key.startswith("qmap")
        ]
        assert sorted(map(_bytes, told)) == sorted(map(_bytes, real)), tuple(parameter.shape)
    own = sum(_bytes(torch.empty(shape, dtype=kind)) for p in parameters for shape, kind in optimizer_state(name, p))
    assert own + optimizer_tables(name, parameters) == bytes_on("cpu", optimizer_tensors(optimizer))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_what_a_step_takes_besides() -> None:
    parameters = [torch.zeros(100), torch.zeros(30)]
    assert optimizer_workspace("adamw", parameters, fused=True, on_gpu=True) == 0
    assert optimizer_workspace("adamw", parameters, fused=False, on_gpu=True) == 520
    assert optimizer_workspace("adamw", parameters, fused=False, on_gpu=False) == 400
    assert optimizer_workspace("adafactor", parameters, fused=True, on_gpu=True) == 400
    assert optimizer_workspace("sgd", parameters, fused=True, on_gpu=True) == 0
