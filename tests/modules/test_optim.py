"""Schedules against transformers', groups by what decays."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lit_tune.errors import InputError
from lit_tune.modules.optim import ScheduleName, learning_rate_factor, make_optimizer, parameter_groups, warmup_steps


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


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_every_optimizer_steps(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = make_optimizer(name, [weight], lr=0.1, weight_decay=0.0, fused=True)  # type: ignore[arg-type]
    weight.square().sum().backward()
    optimizer.step()
    assert (weight < 1).all()
