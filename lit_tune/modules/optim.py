"""Optimizer and learning-rate schedule, as pure functions of the parameters and of the step's number.

What an optimizer keeps, in bytes for each number that trains: adamw 8 (two fp32 moments; 4 where weights are bf16),
adamw_8bit and paged_adamw_8bit 2 and a scale for every 256 (arXiv:2110.02861), adafactor about 0 (a row and a column
of each matrix, arXiv:1804.04235), sgd 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_tune.errors import InputError

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]
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
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return _eight_bit(groups, lr=lr, paged=name == "paged_adamw_8bit")


def _eight_bit(groups: list[dict[str, Any]], *, lr: float, paged: bool) -> Optimizer:
    from bitsandbytes.optim import adamw  # noqa: PLC0415  # takes a second

    made: Any = adamw
    optimizer: Any = (made.PagedAdamW8bit if paged else made.AdamW8bit)(groups, lr=lr)
    if paged:
        optimizer.to_gpu = partial(_page, optimizer)  # what it does before its first step
    assert isinstance(optimizer, Optimizer)
    return optimizer


def _page(optimizer: Any) -> None:
    """Put the states that a checkpoint brought back into pages: bitsandbytes and Lightning load them onto the GPU."""
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if not getattr(state[name], "is_paged", False):
                state[name] = optimizer.get_state_buffer(parameter, dtype=state[name].dtype).copy_(state[name])


class StepInBackward(Optimizer):
    """Let an optimizer step each parameter in the backward pass, as soon as its gradient is complete, and drop that.

    No more than the gradients of a few parameters are ever alive, where they take as much memory as the weights. The
    result is the same to the bit, for no parameter's step looks at another. It follows that nothing can look at all
    gradients before a step: no accumulation, no clipping by their norm, no step that is left out as a whole.

    State and groups are those of `inner`: a checkpoint of the one can be continued with the other.

    Args:
        inner: Steps one parameter at a time.
        check: Is given the norm of a gradient before it is used, and raises if that is no number.
    """

    def __init__(self, inner: Optimizer, check: Callable[[Tensor], None]) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.check = check
        self._norms: dict[Tensor, Tensor] = {}
        self._share()

    def _share(self) -> None:
        self.state, self.param_groups = self.inner.state, self.inner.param_groups

    def _hook_of(self, group: int) -> Callable[[Tensor], None]:
        return lambda parameter: self._step_one(parameter, group)

    def _step_one(self, parameter: Tensor, group: int) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad)
        self.check(norm)
        self._norms[parameter] = norm
        # To the inner optimizer this parameter is all that there is, and its state, kept by parameter, is where it was.
        self.inner.param_groups = [self.param_groups[group] | {"params": [parameter]}]
        self.inner.step()
        self.inner.param_groups = self.param_groups
        parameter.grad = None

    @override
    def step(self, closure: Any = None) -> Any:
        """Run the closure, in whose backward pass the steps are made."""
        self._norms = {}
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook_of(index))
            for index, group in enumerate(self.param_groups)
            for parameter in group["params"]
        ]
        try:
            with torch.enable_grad():
                return closure()
        finally:
            for hook in hooks:
                hook.remove()

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients of the last backward pass."""
        norms = [self._norms[p] for group in self.param_groups for p in group["params"] if p in self._norms]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self._share()


def gradient_norm(gradients: Sequence[Tensor], *, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector; of sharded ones (DTensors), over the shards of all ranks."""
    shards = [gradient.to_local() for gradient in gradients if hasattr(gradient, "to_local")]
    if not shards:
        return torch.nn.utils.get_total_norm(gradients)
    assert len(shards) == len(gradients), "some gradients are sharded, others whole"
    # One exchange for all gradients, not one for each. In float64, so that it rounds nothing where there is one rank.
    own = torch.nn.utils.get_total_norm(shards)
    return sum_over_ranks(own.double().square()).sqrt().to(own.dtype)


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
