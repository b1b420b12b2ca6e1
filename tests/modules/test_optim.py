"""Schedules against transformers', groups by what decays, what optimizers keep and how it survives a checkpoint."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lit_tune import checkpoint
from lit_tune.errors import InputError
from lit_tune.memory import bytes_on, optimizer_tensors
from lit_tune.modules.optim import (
    OptimizerName,
    ScheduleName,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    warmup_steps,
)


@pytest.mark.parametrize(
    ("name", "reference"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_decay_equals_transformers(name: ScheduleName, reference: object) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = reference(optimizer, num_warmup_steps=10, num_training_steps=50)  # type: ignore[operator]
    for step in range(50):
        if step >= 10:
            ours = learning_rate_factor(step, schedule=name, warmup=10, total_steps=50)
            assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_warmup_rises_from_above_zero_to_one() -> None:
    factors = [learning_rate_factor(step, schedule="constant", warmup=3, total_steps=9) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("warmup", "steps"), [(0.03, 3), (0, 0), (7, 7), (0.0301, 4)])
def test_warmup_is_a_fraction_or_steps(warmup: float, steps: int) -> None:
    assert warmup_steps(warmup, 100) == steps


@pytest.mark.parametrize("warmup", [-1, 1.5])
def test_other_warmups_are_refused(warmup: float) -> None:
    with pytest.raises(InputError, match=r"model\.warmup"):
        warmup_steps(warmup, 100)


def test_only_trainable_matrices_decay() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    layer[2].requires_grad_(False)
    decays, rest = parameter_groups(layer.parameters(), 0.1)
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decays["params"] == [layer[0].weight]
    assert [p.shape for p in rest["params"]] == [(4,), (4,), (4,)]


# Optimizers -----------------------------------------------------------------------------------------------------------

NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)
SIDE = 128  # bitsandbytes keeps in 32 bits what has fewer than 4,096 numbers


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((SIDE, SIDE), (SIDE,))]


def optimizer_of(name: OptimizerName, parameters: list[torch.nn.Parameter], lr: float = 0.01) -> Any:
    return make_optimizer(name, parameters, lr=lr, weight_decay=0.1, fused=True)


def step(parameters: list[torch.nn.Parameter], optimizer: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_optimizer_goes_down(name: OptimizerName) -> None:
    weight = torch.nn.Parameter(torch.ones(SIDE, SIDE))
    optimizer = make_optimizer(name, [weight], lr=0.1, weight_decay=0.0, fused=True)
    weight.square().sum().backward()
    optimizer.step()
    assert (weight < 1).all()


def test_8_bit_adamw_follows_adamw() -> None:
    runs = []
    for name in ("adamw", "adamw_8bit"):
        parameters = weights()
        optimizer = optimizer_of(name, parameters)
        for number in range(20):
            step(parameters, optimizer, number)
        runs.append(parameters)
    for one, other, start in zip(*runs, weights(), strict=True):
        # Moments of 8 bits are right to some per cent of each other; random gradients give the least favourable steps.
        assert torch.dist(one, other) < 0.1 * torch.dist(one, start)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        # The matrix, the vector, and a step counter of fp32 for each.
        ("adamw", torch.float32, 2 * 4 * (SIDE * SIDE + SIDE) + 2 * 4),
        ("adamw", torch.bfloat16, 2 * 2 * (SIDE * SIDE + SIDE) + 2 * 4),
        # The matrix in bytes with an fp32 scale for 256 of them; the vector in fp32; two code books for all.
        ("adamw_8bit", torch.float32, 2 * (SIDE * SIDE + 4 * SIDE * SIDE // 256 + 4 * SIDE) + 2 * 256 * 4),
        ("adafactor", torch.float32, 4 * (SIDE + SIDE) + 4 * SIDE + 2 * 4),
        ("sgd", torch.float32, 0),
    ],
)
def test_what_an_optimizer_keeps(name: OptimizerName, dtype: torch.dtype, expected: int) -> None:
    parameters = weights(dtype)
    optimizer = optimizer_of(name, parameters)
    step(parameters, optimizer, 0)
    assert bytes_on("cpu", optimizer_tensors(optimizer)) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_state_that_was_saved_goes_on_to_the_bit(name: OptimizerName, tmp_path: Path) -> None:
    parameters = weights()
    optimizer = optimizer_of(name, parameters)
    for number in range(3):
        step(parameters, optimizer, number)
    checkpoint.write({"optimizer": optimizer.state_dict(), "weights": parameters}, tmp_path / "a.ckpt")
    read = checkpoint.read(tmp_path / "a.ckpt")
    again = [torch.nn.Parameter(saved.detach().clone()) for saved in read["weights"]]
    other = optimizer_of(name, again, lr=1.0)
    other.load_state_dict(read["optimizer"])
    for number in range(3, 6):
        step(parameters, optimizer, number)
        step(again, other, number)
    for one, another in zip(parameters, again, strict=True):
        assert torch.equal(one, another)
    assert bytes_on("cpu", optimizer_tensors(other)) == bytes_on("cpu", optimizer_tensors(optimizer))


@pytest.mark.gpu
def test_paged_states_are_paged_again_after_a_checkpoint(tmp_path: Path) -> None:
    runs: list[Any] = []
    parameters = [torch.nn.Parameter(torch.ones(512, 512, device="cuda")) for _ in range(2)]  # paged from 1e5 numbers
    optimizer = optimizer_of("paged_adamw_8bit", parameters)

    def steps(of: list[torch.nn.Parameter], by: Any) -> None:
        for number in range(3):
            for index, parameter in enumerate(of):
                parameter.grad = torch.full_like(parameter, number + index + 1)
            by.step()
        runs.append([parameter.detach().clone() for parameter in of])

    steps(parameters, optimizer)
    checkpoint.write({"optimizer": optimizer.state_dict()}, tmp_path / "a.ckpt")
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = optimizer_of("paged_adamw_8bit", again)
    other.load_state_dict(checkpoint.read(tmp_path / "a.ckpt")["optimizer"])
    for state in other.state.values():  # as Lightning does after it
        state |= {name: value.cuda() for name, value in state.items() if isinstance(value, torch.Tensor)}
    steps(parameters, optimizer)
    steps(again, other)
    assert all(torch.equal(one, another) for one, another in zip(runs[1], runs[2], strict=True))
    assert all(state["state1"].is_paged and state["state2"].is_paged for state in other.state.values())
