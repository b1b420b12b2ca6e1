"""The optimizer's steps in the backward pass: the same weights to the bit, and never many gradients."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from typing_extensions import override

from lit_tune import checkpoint
from lit_tune.callbacks.continuation import Continuation
from lit_tune.data.instruct import InstructData
from lit_tune.errors import NonFiniteError
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.optim import OptimizerName
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import tiny_llama
from tests.tiny_run import saving, train, trained_weights, write_records

STEPS = 3
OPTIMIZERS = ["adamw", "adamw_8bit", "adafactor", "sgd"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base with matrices of 4,096 numbers, which bitsandbytes keeps in 8 bits; tied, one weight is used twice."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocabulary=len(tokenizer), width=64, tied=request.param).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl")


class Course(Callback):
    """Record losses, gradient norms and rates as they are logged, and the weights after each step."""

    def __init__(self) -> None:
        self.logged: list[tuple[float, float, float]] = []
        self.weights: list[dict[str, Tensor]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        found = trainer.callback_metrics
        names = ("train/loss", "train/grad_norm", "train/learning_rate")
        self.logged.append(tuple(float(found[name]) for name in names))  # type: ignore[arg-type]
        self.weights.append(trained_weights(pl_module))


def run(
    base: str,
    records: str,
    *callbacks: Callback,
    optimizer: OptimizerName = "adamw",
    in_backward: bool = True,
    start: Path | None = None,
    **settings: Any,
) -> Trainer:
    data = InstructData(path=records, template="chatml", micro_batch_size=8)
    module = LlamaTuner(
        base=base,
        method="fft",
        optimizer=optimizer,
        optimizer_in_backward=in_backward,
        learning_rate=1e-2,
        weight_decay=0.1,
        gradient_checkpointing=settings.pop("gradient_checkpointing", "none"),
        offload_activations=settings.pop("offload_activations", False),
    )
    following = [Continuation(data.place_after)] if start else []
    return train(module, data, *following, *callbacks, gradient_clip_val=None, ckpt_path=start, **settings)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_losses_norms_and_rates_are_those_of_the_usual_way(
    base: str, records: str, optimizer: OptimizerName
) -> None:
    usual, course = Course(), Course()
    run(base, records, usual, optimizer=optimizer, in_backward=False)
    run(base, records, course, optimizer=optimizer)
    assert len(course.logged) == STEPS
    assert course.logged == usual.logged
    for one, other in zip(course.weights, usual.weights, strict=True):
        assert_same(one, other)
    assert any(not torch.equal(weight, course.weights[0][name]) for name, weight in course.weights[-1].items())


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "mlp", "offload_activations": True},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_so_they_are_beside_other_techniques(base: str, records: str, settings: dict[str, Any]) -> None:
    usual, course = Course(), Course()
    run(base, records, usual, in_backward=False, **settings)
    run(base, records, course, **settings)
    assert course.logged == usual.logged
    assert_same(course.weights[-1], usual.weights[-1])


class Alive(Callback):
    """Count the gradients that are there whenever one is complete, and after the step."""

    def __init__(self) -> None:
        self.in_backward: list[int] = []
        self.after: list[int] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            # Called before this gradient is kept.
            parameter.register_hook(lambda _: self.in_backward.append(self.alive(pl_module)))

    @staticmethod
    def alive(module: Any) -> int:
        return sum(parameter.grad is not None for parameter in module.parameters())

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.after.append(self.alive(pl_module))


def test_gradients_are_never_all_alive(base: str, records: str) -> None:
    usual, alive = Alive(), Alive()
    run(base, records, usual, in_backward=False)
    trainer = run(base, records, alive)
    parameters = len(list(trainer.lightning_module.parameters()))
    assert max(usual.in_backward) == parameters - 1 > 15
    assert len(alive.in_backward) == STEPS * parameters
    assert max(alive.in_backward) <= 1
    assert alive.after == [0] * STEPS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_run_goes_on_to_the_bit_in_either_way(
    base: str, records: str, tmp_path: Path, optimizer: OptimizerName, before: bool, after: bool
) -> None:
    whole, rest = Course(), Course()
    data = InstructData(path=records, template="chatml", micro_batch_size=8)
    run(base, records, *saving(tmp_path, data), whole, optimizer=optimizer, in_backward=before, max_epochs=2)
    start = checkpoint.step_path(tmp_path, STEPS + 1)
    run(base, records, rest, optimizer=optimizer, in_backward=after, start=start, max_epochs=2)
    assert rest.logged == whole.logged[STEPS + 1 :]
    assert_same(rest.weights[-1], whole.weights[-1])


def test_a_module_that_is_fitted_again_is_stepped_once(base: str, records: str) -> None:
    """The hooks of the first optimizer must be gone when there is a second."""
    runs = []
    for in_backward in (True, False):
        data = InstructData(path=records, template="chatml", micro_batch_size=8)
        module = LlamaTuner(base=base, method="fft", learning_rate=1e-2, optimizer_in_backward=in_backward)
        for _ in range(2):
            train(module, data, gradient_clip_val=None)
        runs.append(trained_weights(module))
    assert_same(*runs)


class Poison(Callback):
    """Make the gradient of one parameter not finite in optimizer step 1, and keep the weights as they are before it."""

    def __init__(self, name: str, value: float) -> None:
        self.name = name
        self.value = value
        self.before: dict[str, Tensor] = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch["step"] == 1:
            self.before = trained_weights(pl_module)
            pl_module.get_parameter(self.name).register_hook(lambda gradient: gradient * self.value)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_used(base: str, records: str, value: float) -> None:
    poisoned = "model.model.layers.1.mlp.up_proj.weight"
    poison, seen = Poison(poisoned, value), {}

    class Keep(Callback):
        @override
        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            seen.update(trained_weights(pl_module))

    with pytest.raises(NonFiniteError, match=r"^the gradient of optimizer step 1 is (inf|nan) .*records [\d, ]+") as e:
        run(base, records, poison, Keep())
    assert "\n" not in str(e.value)
    assert all(torch.isfinite(weight).all() for weight in seen.values())
    name = poisoned.removeprefix("model.")
    assert torch.equal(seen[name], poison.before[name])
