"""Optimizer and learning-rate schedule, as pure functions of the parameters and of the step's number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from lit_tune.errors import InputError

OptimizerName = Literal["adamw", "adafactor", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant"]


def parameter_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay (matrices) and those that do not (norms, biases, magnitudes)."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: OptimizerName, parameters: Iterable[torch.nn.Parameter], *, lr: float, weight_decay: float, fused: bool
) -> Optimizer:
    """Build the optimizer by name over two weight-decay groups.

    Args:
        fused: Use the one-kernel AdamW. Not with fp16's loss scaler: it hides the gradients from clipping.
    """
    groups = parameter_groups(parameters, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Return the number of warm-up steps: a value below 1 is a fraction of `total_steps`, rounded up; else steps.

    Raises:
        InputError: Negative, or at least 1 and not whole.
    """
    if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        raise InputError(f"model.warmup is {warmup}; give a fraction such as 0.03, or a whole number of steps.")
    return math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)


def learning_rate_factor(step: int, *, schedule: ScheduleName, warmup: int, total_steps: int) -> float:
    """Return what the peak learning rate is multiplied with in optimizer step `step` (0 is the first).

    Linear from 1/(warmup + 1) up to 1 over the first `warmup` steps, so that no step has rate 0; then down to 0 at
    `total_steps`, on a straight line or on half a cosine, or constant.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
