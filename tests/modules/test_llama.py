"""The module under a real Trainer: its loss against plain transformers, its steps against plain torch, its dtypes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lit_tune import checkpoint
from lit_tune.data.instruct import InstructData
from lit_tune.errors import InputError, NonFiniteError
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.lora import Lora
from lit_tune.result import save_result
from tests.tiny_llama import tiny_base
from tests.tiny_run import Watch, train, trained_weights, vector, write_records

GLOBAL_BATCH = 8
STEPS = 3  # of 8, 8 and 3 samples
CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]  # samples in a micro-batch, micro-batches in a step
LORA = Lora(rank=4, alpha=8, dropout=0.0, targets=["q_proj", "v_proj", "down_proj"])
LEARNING_RATE = 1e-2  # so large that the weights move and later steps tell of earlier ones


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl")


@pytest.fixture
def make(base: str) -> Callable[..., LlamaTuner]:
    """Make the module that most tests train; settings replace its own."""

    def made(**settings: Any) -> LlamaTuner:
        defaults: dict[str, Any] = {"base": base, "lora": LORA, "learning_rate": LEARNING_RATE}
        return LlamaTuner(**(defaults | settings))

    return made


@pytest.fixture
def data(records: str) -> Callable[..., InstructData]:
    """Make the data module that most tests train on: the whole global batch as one micro-batch."""

    def made(**settings: Any) -> InstructData:
        defaults: dict[str, Any] = {"path": records, "template": "chatml", "micro_batch_size": GLOBAL_BATCH}
        return InstructData(**(defaults | settings))

    return made


Make = Callable[..., LlamaTuner]
MakeData = Callable[..., InstructData]


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_any_cut_of_the_global_batch_gives_the_same_losses_and_gradients(
    make: Make, data: MakeData, method: str
) -> None:
    runs: list[Watch] = []
    for samples, accumulate in CUTS:
        for packing in (True, False):
            watch = Watch()
            module = make(method=method, learning_rate=1e-3)
            cut = data(micro_batch_size=samples, packing=packing)
            train(module, cut, watch, accumulate_grad_batches=accumulate)
            runs.append(watch)
    first, *others = runs
    assert len(first.losses) == STEPS
    assert first.losses[-1] < first.losses[0]
    for other in others:
        # fp32 sums in another order differ by some 1e-7; bounded against the norm, for Adam turns tiny differences of
        # gradients near zero into weights that differ, and with them single gradients of the next step.
        assert other.losses == pytest.approx(first.losses, rel=1e-5)
        for one, another in zip(first.gradients, other.gradients, strict=True):
            assert torch.dist(one, another) <= 1e-5 * one.norm()


def reference_step(model: Any, data: InstructData, step: int) -> Tensor:
    """Return the loss of an optimizer step as transformers computes it, sample by sample, unpacked."""
    assert data.prepared is not None
    encoded = data.prepared.train
    plan = data._source().plan(0)[step]
    total, supervised = torch.tensor(0.0), 0
    for index in (i for micro in plan for samples in micro for i in samples):
        tokens, labels = (torch.from_numpy(array) for array in encoded.sample(index))
        logits_TV = model(input_ids=tokens[None]).logits[0]
        total = total + cross_entropy(logits_TV[:-1], labels[1:], reduction="sum")  # -100 is ignored
        supervised += int((labels[1:] != -100).sum())
    return total / supervised


def test_the_losses_are_those_of_plain_transformers_and_the_weights_those_of_plain_adamw(
    base: str, make: Make, data: MakeData
) -> None:
    watch, module, ours = Watch(), make(schedule="constant", warmup=0), data()
    train(module, ours, watch)

    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LORA.targets)
    model: Any = peft.get_peft_model(plain, config).train()
    start = watch.weights[0]
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert weights.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        loss = reference_step(model, ours, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        assert watch.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        # Adam divides by the gradient's own size, so where it is near zero its rounding becomes a part of the update;
        # the difference is bounded against the norm of all that has been learnt.
        expected = vector({name: parameter.detach() for name, parameter in weights.items()})
        difference = torch.dist(vector(watch.weights[step + 1]), expected)
        assert difference <= 1e-4 * torch.dist(expected, vector(start))


def test_a_short_run_keeps_its_losses(make: Make, data: MakeData) -> None:
    watch = Watch()
    train(make(), data(micro_batch_size=4), watch)
    # Other versions of torch sum in another order, which five steps make grow to 1e-5 at most.
    assert watch.losses == pytest.approx([6.427099, 6.345958, 6.353106, 6.13565, 5.777274], rel=1e-4)


# Train mode and gradient checkpointing --------------------------------------------------------------------------------


class Spy(Callback):
    """Count the forward passes of the first decoder layer's attention, and note modules left in eval mode."""

    def __init__(self) -> None:
        self.forward_calls = 0
        self.in_eval_mode: list[str] = []

    def _count(self, *_: Any) -> None:
        self.forward_calls += 1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.causal_lm.model.layers[0].self_attn.register_forward_pre_hook(self._count)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.in_eval_mode += [name for name, module in pl_module.model.named_modules() if not module.training]


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_the_model_trains_in_train_mode_after_validation_too(make: Make, data: MakeData, method: str) -> None:
    spy = Spy()
    train(make(method=method), data(val_fraction=0.2), spy, max_epochs=2)
    assert spy.in_eval_mode == []


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(make: Make, data: MakeData, method: str) -> None:
    lora = Lora(rank=4, alpha=8, dropout=0.1)
    runs: dict[str, tuple[Watch, Spy]] = {}
    for setting in ("none", "full"):
        runs[setting] = Watch(), Spy()
        train(make(method=method, lora=lora, gradient_checkpointing=setting), data(), *runs[setting])
    (plain, plain_calls), (watch, calls) = runs["none"], runs["full"]
    assert (plain_calls.forward_calls, calls.forward_calls) == (STEPS, 2 * STEPS)
    # The second forward pass repeats the first, dropout included, on the same kernels: equal to the bit.
    assert watch.losses == plain.losses
    for name, weight in plain.weights[-1].items():
        assert torch.equal(watch.weights[-1][name], weight), name


@pytest.mark.parametrize("setting", ["none", "full"])
def test_every_lora_b_moves(make: Make, data: MakeData, setting: str) -> None:
    watch = Watch()
    train(make(gradient_checkpointing=setting), data(), watch)
    moved = [name for name, weight in watch.weights[1].items() if "lora_B" in name and weight.any()]
    assert len(moved) == 2 * len(LORA.targets)  # two layers


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "precision", "frozen", "trained"),
    [
        ("lora", "32-true", torch.float32, torch.float32),
        ("lora", "bf16-mixed", torch.bfloat16, torch.float32),
        ("lora", "bf16-true", torch.bfloat16, torch.float32),
        ("fft", "32-true", None, torch.float32),
        ("fft", "bf16-mixed", None, torch.float32),
        ("fft", "bf16-true", None, torch.bfloat16),
    ],
)
def test_weights_and_optimizer_states_have_the_dtypes_that_the_precision_asks_for(
    make: Make, data: MakeData, method: str, precision: str, frozen: torch.dtype | None, trained: torch.dtype
) -> None:
    watch, module = Watch(), make(method=method)
    trainer = train(module, data(), watch, precision=precision)
    parameters = list(module.model.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {trained}
    assert {p.dtype for p in parameters if not p.requires_grad} == ({frozen} if frozen else set())
    states = trainer.optimizers[0].state.values()
    assert {state["exp_avg"].dtype for state in states} == {trained}
    assert watch.losses[-1] < watch.losses[0]
    # bf16 keeps 8 bits: a loss of 6.4 is right to about 0.03, whatever is stored in which dtype.
    assert watch.losses[0] == pytest.approx(6.4, abs=0.1)


# Losses that are no numbers -------------------------------------------------------------------------------------------


class Poison(Callback):
    """Put a NaN into a frozen weight, or let a gradient overflow, before the second optimizer step."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.before: dict[str, Tensor] = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch["step"] != 1:
            return
        self.before = trained_weights(pl_module)
        if self.what == "loss":
            layer = pl_module.causal_lm.model.layers[0].input_layernorm
            layer.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
        else:
            weight = next(p for p in pl_module.parameters() if p.requires_grad)
            weight.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("method", ["lora", "fft"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(
    make: Make, data: MakeData, method: str, what: str
) -> None:
    poison, module = Poison(what), make(method=method)
    with pytest.raises(NonFiniteError, match=rf"the {what} of optimizer step 1 .*weights were not updated") as refused:
        train(module, data(), poison)
    assert "\n" not in str(refused.value)
    for name, weight in trained_weights(module).items():
        assert torch.equal(weight, poison.before[name]), name


# Randomness -----------------------------------------------------------------------------------------------------------


class Disturb(Callback):
    """Draw random numbers between the steps, as other callbacks might."""

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(batch_idx + 1)


def test_dropout_is_a_function_of_seed_and_step(make: Make, data: MakeData) -> None:
    def final(*callbacks: Callback, seed: int = 0, dropout: float = 0.5) -> Tensor:
        watch = Watch()
        # One step takes all samples, so that the seed decides neither order nor batches; the start is the same for all.
        module = make(lora=Lora(rank=4, dropout=dropout))
        train(module, data(micro_batch_size=32), watch, Start(), *callbacks, seed=seed, max_epochs=3)
        return vector(watch.weights[-1])

    first = final()
    assert torch.equal(final(Disturb()), first)
    assert not torch.allclose(final(seed=1), first)
    assert not torch.allclose(final(dropout=0.0), first)


class Start(Callback):
    """Give the adapters of every run the same initial weights."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


# Quantised bases ------------------------------------------------------------------------------------------------------


def frozen_weights(module: LlamaTuner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if not p.requires_grad}


class KeepFrozen(Callback):
    """Copy the frozen weights as they are before training."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights = frozen_weights(pl_module)


@pytest.mark.parametrize(("quantize", "stored"), [("nf4", torch.uint8), ("fp4", torch.uint8), ("int8", torch.int8)])
def test_adapters_train_over_a_quantised_base_that_stays_as_it_is(
    make: Make, data: MakeData, quantize: str, stored: torch.dtype
) -> None:
    watch, before, module = Watch(), KeepFrozen(), make(quantize=quantize)
    train(module, data(), watch, before)
    after = frozen_weights(module)
    assert stored in {weight.dtype for weight in after.values()}
    for name, weight in before.weights.items():
        assert torch.equal(after[name], weight), name
    assert all(weight.any() for name, weight in watch.weights[-1].items() if "lora_B" in name)
    assert watch.losses[-1] < watch.losses[0]


@pytest.mark.parametrize("quantize", ["int8", "nf4", "fp4"])
def test_quantised_weights_cannot_train_in_full(quantize: str) -> None:
    with pytest.raises(InputError, match=rf"model\.quantize is {quantize} with model\.method fft.*lora"):
        LlamaTuner(method="fft", quantize=quantize)  # type: ignore[arg-type]


# Adapters and checkpoints ---------------------------------------------------------------------------------------------


def test_a_run_from_an_adapter_starts_where_that_ended(make: Make, data: MakeData, tmp_path: Path) -> None:
    module, ours, earlier, later = make(), data(), Watch(), Watch()
    train(module, ours, earlier)
    save_result(module, ours, tmp_path / "result", precision="32-true")
    # The settings of the adapter hold, not those of the new run.
    train(make(adapter=str(tmp_path / "result"), lora=Lora(rank=2)), data(), later)
    assert later.weights[0].keys() == earlier.weights[-1].keys()
    for name, weight in earlier.weights[-1].items():
        assert torch.equal(later.weights[0][name], weight), name
    assert later.losses[-1] < earlier.losses[-1]


def test_full_training_from_an_adapter_starts_with_it_merged(make: Make, data: MakeData, tmp_path: Path) -> None:
    module, ours = make(), data()
    trainer = train(module, ours, max_epochs=3)
    save_result(module, ours, tmp_path / "result", precision="32-true")
    adapted = trainer.validate(module, datamodule=data(val_path=ours.path), verbose=False)[0]["val/loss"]
    merged = make(method="fft", adapter=str(tmp_path / "result"), learning_rate=0.0)
    other = train(merged, data(val_path=ours.path))
    # Adding B @ A to the weight first, or its output later, differs by fp32 rounding.
    assert float(other.callback_metrics["val/loss"]) == pytest.approx(adapted, rel=1e-5)
    assert all(p.requires_grad and "lora" not in name for name, p in merged.named_parameters())


@pytest.fixture
def saved(make: Make, data: MakeData, tmp_path: Path) -> Path:
    """Save a LoRA checkpoint after one epoch."""
    trainer = train(make(), data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_a_lora_checkpoint_holds_the_adapters_alone(saved: Path, base: str) -> None:
    content = checkpoint.read(saved)
    assert len(content["state_dict"]) == 2 * 2 * len(LORA.targets)  # A and B, two layers
    assert all("lora_" in name for name in content["state_dict"])
    assert content["lit_tune"]["base"] == base


def test_a_full_checkpoint_holds_the_model(make: Make, data: MakeData, tmp_path: Path) -> None:
    module = make(method="fft")
    train(module, data()).save_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint.read(tmp_path / "a.ckpt")["state_dict"].keys() == module.state_dict().keys()


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_a_run_in_two_parts_equals_one_bitwise(make: Make, data: MakeData, method: str, tmp_path: Path) -> None:
    # A constant rate: the schedule of a longer run would differ from the beginning.
    settings: dict[str, Any] = {"method": method, "schedule": "constant", "lora": Lora(rank=4, dropout=0.1)}
    whole, rest = Watch(), Watch()
    train(make(**settings), data(), whole, max_epochs=2)
    train(make(**settings), data()).save_checkpoint(tmp_path / "a.ckpt")
    train(make(**settings), data(), rest, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert rest.losses == whole.losses[STEPS:]
    for name, weight in whole.weights[-1].items():
        assert torch.equal(rest.weights[-1][name], weight), name


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"lora": Lora(rank=8, alpha=8, dropout=0.0, targets=LORA.targets)}, "lora"),
        ({"lora": Lora(rank=4, alpha=8, dropout=0.0, targets=["q_proj"])}, "lora"),
        ({"quantize": "nf4"}, "quantize"),
        ({"method": "fft"}, "method"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    saved: Path, make: Make, data: MakeData, settings: dict[str, Any], fault: str
) -> None:
    with pytest.raises(InputError, match=rf"made with {fault}"):
        train(make(**settings), data(), max_epochs=2, ckpt_path=saved)


def test_a_checkpoint_of_another_base_is_refused(saved: Path, make: Make, data: MakeData, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="made with fingerprint"):
        train(make(base=str(other)), data(), max_epochs=2, ckpt_path=saved)


def test_a_checkpoint_knows_its_base_wherever_that_lies(
    saved: Path, make: Make, data: MakeData, tmp_path: Path
) -> None:
    moved, watch = tiny_base(tmp_path / "moved"), Watch()
    train(make(base=str(moved)), data(), watch, max_epochs=2, ckpt_path=saved)
    assert len(watch.losses) == STEPS
