"""The module under a real Trainer: its loss against plain transformers, its steps against plain torch, its dtypes."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lit_tune import checkpoint
from lit_tune.callbacks.continuation import Continuation
from lit_tune.data.instruct import InstructData
from lit_tune.errors import InputError, NonFiniteError
from lit_tune.memory import SavedTensors, weight_tensors
from lit_tune.modules import llama
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.lora import Lora
from lit_tune.result import save_result
from tests.tiny_llama import tiny_base
from tests.tiny_run import Watch, make_trainer, saving, train, trained_weights, vector, write_records

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
    plan = data.source().plan(0)[step]
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


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_what_the_forward_pass_saves_is_counted_with_offloading_as_without(
    make: Make, data: MakeData, method: str
) -> None:
    counts = []
    for setting, offloads in itertools.product(("none", "mlp", "full"), (False, True)):
        module = make(method=method, gradient_checkpointing=setting, offload_activations=offloads)
        if module._offload is not None:
            module._offload.smallest_bytes = 0
        count = Count()
        train(module, data(), count, max_steps=1)
        counts.append(count.saved)
    assert counts[0] == counts[1] > counts[2] == counts[3] > counts[4] == counts[5] > 0


class Count(Callback):
    """Have the module count what it saves, and read that where it is complete."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.saved_tensors = SavedTensors(weight_tensors(pl_module))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.saved = pl_module.saved_tensors.bytes_on("cpu")


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
    # In bf16 positions far apart would be one: transformers makes the rotary embedding's frequencies in fp32 too.
    assert {buffer.dtype for buffer in module.model.buffers()} == {torch.float32}


class GradientsAtStart(Callback):
    """Notes of each micro-batch whether it is its step's first, and whether there are gradients when it starts."""

    def __init__(self) -> None:
        self.found: list[tuple[bool, bool]] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        there = any(parameter.grad is not None for parameter in pl_module.parameters())
        self.found.append((batch["first_of_step"], there))


def test_no_gradient_of_an_earlier_step_lives_in_a_forward_pass(make: Make, data: MakeData) -> None:
    watch = GradientsAtStart()
    train(make(method="fft"), data(), watch, accumulate_grad_batches=2, max_steps=3)
    assert set(watch.found) == {(True, False), (False, True)}


# Losses that are no numbers -------------------------------------------------------------------------------------------


class Poison(Callback):
    """Make the loss or a gradient of some optimizer steps infinite, in all of their micro-batches or in one.

    Keeps copies of weights and optimizer states, as they are before each of these steps and after it.
    """

    def __init__(self, what: str, *steps: int, micro_batch: int | None = None) -> None:
        self.what = what
        self.steps = steps
        self.micro_batch = micro_batch
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.ids: list[int] = []  # of the poisoned micro-batches
        self.all_ids: list[int] = []  # of the poisoned steps
        self._active = False
        self._in_step = 0

    def _poisoned(self, value: Tensor) -> Tensor:
        return value * float("inf") if self._active else value

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.what == "loss":
            layer = pl_module.causal_lm.model.layers[0].input_layernorm
            layer.register_forward_hook(lambda _module, _inputs, output: self._poisoned(output))
        else:
            next(p for p in pl_module.parameters() if p.requires_grad).register_hook(self._poisoned)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._in_step = 0 if batch["first_of_step"] else self._in_step + 1
        in_step = batch["step"] in self.steps
        self._active = in_step and self.micro_batch in (None, self._in_step)
        if in_step and batch["first_of_step"]:
            self.before.append(states(trainer, pl_module))
        self.ids += batch["sample_ids"] if self._active else []
        self.all_ids += batch["sample_ids"] if in_step else []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch["step"] in self.steps and batch["last_of_step"]:
            self.after.append(states(trainer, pl_module))


def states(trainer: Trainer, module: LlamaTuner) -> dict[str, Tensor]:
    """Return copies of what trains and of all that the optimizer keeps of it."""
    found = trained_weights(module)
    for number, state in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"{number}.{name}": value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


EITHER = pytest.mark.parametrize("what", ["loss", "gradient"])


@pytest.mark.parametrize("method", ["lora", "fft"])
@EITHER
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(
    make: Make, data: MakeData, method: str, what: str
) -> None:
    poison, module = Poison(what, 1), make(method=method)
    with pytest.raises(NonFiniteError, match=rf"^the {what} of optimizer step 1 is .*weights were not upd") as refused:
        train(module, data(), poison)
    assert "\n" not in str(refused.value)
    assert "skipped" not in str(refused.value)
    assert_same({name: poison.before[0][name] for name in trained_weights(module)}, trained_weights(module))


def test_so_it_is_in_fp16_without_a_scaler(make: Make, data: MakeData) -> None:
    with pytest.raises(NonFiniteError, match=r"^the gradient of optimizer step 1 is "):
        train(make(), data(), Poison("gradient", 1), precision="16-true")


def named(ids: list[int]) -> str:
    return f"(records {', '.join(map(str, sorted(ids)))}, counted from 0)"


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_loss_is_told_with_the_records_of_its_micro_batch(make: Make, data: MakeData, micro_batch: int) -> None:
    poison = Poison("loss", 1, micro_batch=micro_batch)
    with pytest.raises(NonFiniteError) as refused:
        train(make(), data(micro_batch_size=2), poison, accumulate_grad_batches=4)
    assert len(poison.ids) == 2
    assert named(poison.ids) in str(refused.value)


def test_a_gradient_is_told_with_the_records_of_its_step(make: Make, data: MakeData) -> None:
    poison = Poison("gradient", 1, micro_batch=0)
    with pytest.raises(NonFiniteError) as refused:
        train(make(), data(micro_batch_size=2), poison, accumulate_grad_batches=4)
    assert len(poison.all_ids) == GLOBAL_BATCH
    assert named(poison.all_ids) in str(refused.value)


def test_one_record_is_told_as_one_and_of_many_the_first(make: Make, data: MakeData, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"\(record \d+, counted from 0\)"):
        train(make(), data(micro_batch_size=1), Poison("loss", 0))
    many = write_records(tmp_path / "many.jsonl", 24)
    with pytest.raises(NonFiniteError, match=r"\(records 0, 1, 2, [\d, ]+, 18, 19 and 4 more, counted from 0\)"):
        train(make(), data(path=many, micro_batch_size=24), Poison("loss", 0))


def test_the_records_of_all_ranks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(into: list[Any], own: list[int]) -> None:
        into[:] = [own, [7, 1]]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert llama._of_all_ranks([3, 2]) == [1, 2, 3, 7]


# Steps that are skipped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"method": "lora"}, {"method": "fft", "optimizer": "adafactor"}], ids=str)
@EITHER
def test_a_skipped_step_leaves_weights_and_optimizer_to_the_bit(
    make: Make, data: MakeData, settings: dict[str, Any], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    poison, watch, module = Poison(what, 1), Watch(), make(skip_nonfinite=1, weight_decay=0.1, **settings)
    trainer = train(module, data(), poison, watch)
    assert len(poison.before[0]) > len(trained_weights(module))  # the optimizer has states
    assert_same(poison.before[0], poison.after[0])
    assert len(watch.weights) == STEPS + 1
    assert not torch.equal(vector(watch.weights[2]), vector(watch.weights[3]))  # the step after it trains
    assert all(torch.isfinite(weight).all() for weight in watch.weights[3].values())
    assert module.skipped_steps == 1
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Skipped")]
    assert line.startswith(f"Skipped: the {what} of optimizer step 1 is ")
    assert line.endswith(f"{named(poison.all_ids)}; 1 of at most 1 (model.skip_nonfinite)")


def test_the_steps_after_a_skipped_one_are_those_of_a_run_without_its_update(make: Make, data: MakeData) -> None:
    """The reference leaves the update out by torch's own means: an optimizer without gradients does nothing."""
    skipped, left_out = Watch(), Watch()
    train(make(skip_nonfinite=1), data(), Poison("gradient", 1), skipped, max_epochs=2)
    train(make(), data(), left_out, LeaveOut(1), max_epochs=2)
    assert skipped.losses == left_out.losses
    assert_same(skipped.weights[-1], left_out.weights[-1])


class LeaveOut(Callback):
    """Take the gradients of a step away before the optimizer sees them."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step == self.step:
            optimizer.zero_grad()


@EITHER
def test_more_than_may_be_skipped_end_the_run(make: Make, data: MakeData, what: str) -> None:
    watch, poison = Watch(), Poison(what, 0, 2, 3)
    with pytest.raises(NonFiniteError, match=rf"the {what} of optimizer step 3 .* after 2 skipped steps; the weights"):
        train(make(skip_nonfinite=2), data(), poison, watch, max_epochs=2)
    assert len(watch.losses) == 3


def test_the_count_of_skipped_steps_survives_a_continuation(make: Make, data: MakeData, tmp_path: Path) -> None:
    whole, rest = Watch(), Watch()
    data_one, data_two = data(), data()
    train(make(skip_nonfinite=2), data_one, *saving(tmp_path, data_one), Poison("loss", 1, 4), whole, max_epochs=2)
    module = make(skip_nonfinite=2)
    start = checkpoint.step_path(tmp_path, 3)
    train(module, data_two, *saving(tmp_path, data_two), Poison("loss", 4), rest, max_epochs=2, ckpt_path=start)
    assert module.skipped_steps == 2
    assert_same(rest.weights[-1], whole.weights[-1])
    with pytest.raises(NonFiniteError, match=r"optimizer step 4 .* after 1 skipped steps"):
        train(make(skip_nonfinite=1), data(), Poison("loss", 4), max_epochs=2, ckpt_path=start)


def test_fewer_than_none_cannot_be_skipped() -> None:
    with pytest.raises(InputError, match=r"^model\.skip_nonfinite is -1; it must be 0 or more\.$"):
        LlamaTuner(skip_nonfinite=-1)


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
    """Save a LoRA checkpoint after one epoch of two."""
    ours = data()
    train(make(), ours, *saving(tmp_path, ours), max_epochs=2)
    return checkpoint.step_path(tmp_path, STEPS)


def test_a_lora_checkpoint_holds_the_adapters_alone(saved: Path) -> None:
    content = checkpoint.read(saved)
    assert len(content["state_dict"]) == 2 * 2 * len(LORA.targets)  # A and B, two layers
    assert all("lora_" in name for name in content["state_dict"])


def test_a_full_checkpoint_holds_the_model(make: Make, data: MakeData, tmp_path: Path) -> None:
    module = make(method="fft")
    train(module, data()).save_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint.read(tmp_path / "a.ckpt")["state_dict"].keys() == module.state_dict().keys()


@pytest.mark.parametrize("method", ["lora", "fft"])
def test_a_run_in_two_parts_equals_one_bitwise(make: Make, data: MakeData, method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": method, "lora": Lora(rank=4, dropout=0.1)}
    whole, rest, ours, again = Watch(), Watch(), data(), data()
    train(make(**settings), ours, *saving(tmp_path, ours), whole, max_epochs=2)
    for step in (1, STEPS, STEPS + 2):
        rest = Watch()
        start = checkpoint.step_path(tmp_path, step)
        train(make(**settings), again, Continuation(again.place_after), rest, max_epochs=2, ckpt_path=start)
        assert rest.losses == whole.losses[step:]
        assert_same(rest.weights[-1], whole.weights[-1])


@pytest.mark.parametrize(("samples", "accumulate"), CUTS[1:])
def test_a_run_goes_on_in_another_cut_of_the_same_global_batch(
    make: Make, data: MakeData, saved: Path, samples: int, accumulate: int
) -> None:
    whole, ours, cut = Watch(), data(), data(micro_batch_size=samples)
    train(make(), ours, whole, max_epochs=2)
    for step in (1, 2, STEPS, STEPS + 1):
        rest, start = Watch(), saved.with_name(checkpoint.step_path(saved, step).name)
        train(
            make(),
            cut,
            Continuation(cut.place_after),
            rest,
            max_epochs=2,
            accumulate_grad_batches=accumulate,
            ckpt_path=start,
        )
        # fp32 sums in another order; Adam makes of them what it may at a rate as high as this one.
        assert rest.losses == pytest.approx(whole.losses[step:], rel=1e-4)
        assert rest.losses[0] == pytest.approx(whole.losses[step], rel=1e-6)


# What may not change --------------------------------------------------------------------------------------------------


TAKEABLE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("model.quantize", {"quantize": "nf4"}, {}, "made with none, this run has nf4"),
    ("model.lora.alpha", {"lora": replace(LORA, alpha=16)}, {}, "made with 8, this run has 16"),
    ("model.lora.dropout", {"lora": replace(LORA, dropout=0.1)}, {}, "made with 0.0, this run has 0.1"),
    ("model.learning_rate", {"learning_rate": 0.002}, {}, "made with 0.01, this run has 0.002"),
    ("model.weight_decay", {"weight_decay": 0.1}, {}, "made with 0.0, this run has 0.1"),
    ("model.warmup", {"warmup": 2}, {}, "made with 0.03, this run has 2"),
    ("model.schedule", {"schedule": "linear"}, {}, "made with cosine, this run has linear"),
    ("trainer.precision", {}, {"precision": "bf16-mixed"}, "made with 32-true, this run has bf16-mixed"),
    ("trainer.gradient_clip_val", {}, {"gradient_clip_val": 0.5}, "made with 1.0, this run has 0.5"),
    (
        "trainer.gradient_clip_algorithm",
        {},
        {"gradient_clip_algorithm": "value"},
        "made with None, this run has value",
    ),
]
FIXED: list[tuple[str, dict[str, Any], str]] = [
    ("model.method", {"method": "fft"}, "made with lora, this run has fft"),
    ("model.lora.rank", {"lora": replace(LORA, rank=8)}, "made with 4, this run has 8"),
    ("model.lora.targets", {"lora": replace(LORA, targets=["q_proj"])}, "this run has ['q_proj']"),
    ("model.lora.bias", {"lora": replace(LORA, bias="all")}, "made with none, this run has all"),
    ("model.lora.variant", {"lora": replace(LORA, variant="dora")}, "made with lora, this run has dora"),
    ("model.optimizer", {"optimizer": "sgd"}, "made with adamw, this run has sgd"),
]


def going_on(module: LlamaTuner, data: InstructData, path: Path, **settings: Any) -> None:
    train(module, data, Continuation(data.place_after), max_epochs=2, ckpt_path=path, **settings)


@pytest.mark.parametrize(("name", "change", "trainer", "said"), TAKEABLE, ids=[case[0] for case in TAKEABLE])
def test_a_changed_setting_is_refused_by_name_or_taken_if_allowed(
    saved: Path, make: Make, data: MakeData, name: str, change: dict[str, Any], trainer: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as refused:
        going_on(make(**change), data(), saved, **trainer)
    assert str(refused.value).startswith(f"{name}: the checkpoint was ")
    assert said in str(refused.value)
    assert f"--allow_changed {name}" in str(refused.value)
    module = make(**change)
    module.allow_changed = [name]
    going_on(module, data(), saved, **trainer)


@pytest.mark.parametrize(("name", "change", "said"), FIXED, ids=[case[0] for case in FIXED])
def test_a_setting_that_the_checkpoint_is_shaped_by_is_never_taken(
    saved: Path, make: Make, data: MakeData, name: str, change: dict[str, Any], said: str
) -> None:
    module = make(**change)
    module.allow_changed = [name, "model.learning_rate"]
    with pytest.raises(InputError) as refused:
        going_on(module, data(), saved)
    assert str(refused.value).startswith(f"{name}: the checkpoint was ")
    assert said in str(refused.value)
    assert "--allow_changed" not in str(refused.value)


def test_every_setting_is_one_or_the_other(saved: Path, make: Make, data: MakeData) -> None:
    settings = checkpoint.read(saved)["lit_tune"]["settings"]
    cases = {case[0] for case in TAKEABLE} | {case[0] for case in FIXED} | {"model.base"}
    assert settings.keys() == cases
    assert set(llama.FIXED_SETTINGS) == {case[0] for case in FIXED}


def test_another_base_is_refused_or_taken(saved: Path, make: Make, data: MakeData, tmp_path: Path) -> None:
    other = str(tiny_base(tmp_path / "other", seed=1))
    with pytest.raises(
        InputError, match=r"^model\.base: the checkpoint was made with weights .*, this run has weights"
    ):
        going_on(make(base=other), data(), saved)
    module = make(base=other)
    module.allow_changed = ["model.base"]
    going_on(module, data(), saved)


def test_a_checkpoint_knows_its_base_wherever_that_lies(
    saved: Path, make: Make, data: MakeData, tmp_path: Path
) -> None:
    moved = tiny_base(tmp_path / "moved")
    going_on(make(base=str(moved)), data(), saved)


def test_how_it_trains_does_not_matter_to_a_validation(saved: Path, make: Make, data: MakeData) -> None:
    module = make(learning_rate=1.0, weight_decay=0.5)
    trainer = make_trainer(gradient_clip_val=None)
    trainer.validate(module, datamodule=data(val_path=data().path), ckpt_path=str(saved), verbose=False)
    with pytest.raises(InputError, match=r"model\.lora\.rank"):
        trainer.validate(make(lora=replace(LORA, rank=8)), datamodule=data(), ckpt_path=str(saved), verbose=False)


# A rate that changes on the way ---------------------------------------------------------------------------------------


class Rates(Callback):
    """Record the learning rates and weight decays that the optimizer's steps are made with."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.decays: list[list[float]] = []

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.decays.append([group["weight_decay"] for group in optimizer.param_groups])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_unchanged_the_rates_are_the_same_bits(
    make: Make, data: MakeData, tmp_path: Path, schedule: str, warmup: int
) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "warmup": warmup, "learning_rate": 1.1e-3}
    whole, ours = Rates(), data()
    train(make(**settings), ours, *saving(tmp_path, ours), whole, max_epochs=2)
    for step in (2, STEPS):
        rest, again = Rates(), data()
        start = checkpoint.step_path(tmp_path, step)
        train(make(**settings), again, Continuation(again.place_after), rest, max_epochs=2, ckpt_path=start)
        assert rest.rates == whole.rates[step:]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.learning_rate", {"learning_rate": 0.002}),
        ("model.schedule", {"schedule": "linear"}),
        ("model.warmup", {"warmup": 5}),
    ],
)
def test_a_change_that_is_taken_holds_from_the_next_step_on(
    saved: Path, make: Make, data: MakeData, name: str, change: dict[str, Any]
) -> None:
    fresh, rest = Rates(), Rates()
    train(make(**change), data(), fresh, max_epochs=2)  # a run that had it from the beginning
    module, ours = make(**change), data()
    module.allow_changed = [name]
    train(module, ours, Continuation(ours.place_after), rest, max_epochs=2, ckpt_path=saved)
    assert rest.rates == fresh.rates[STEPS:]


def test_a_longer_run_follows_the_schedule_of_its_new_length(saved: Path, make: Make, data: MakeData) -> None:
    fresh, rest, ours = Rates(), Rates(), data()
    train(make(), data(), fresh, max_epochs=4)
    train(make(), ours, Continuation(ours.place_after), rest, max_epochs=4, ckpt_path=saved)
    assert rest.rates == fresh.rates[STEPS:]


def test_a_weight_decay_that_is_taken_holds_for_matrices_alone(make: Make, data: MakeData, tmp_path: Path) -> None:
    ours = data()
    train(make(method="fft"), ours, *saving(tmp_path, ours), max_epochs=2)
    rest, module, again = Rates(), make(method="fft", weight_decay=0.1), data()
    module.allow_changed = ["model.weight_decay"]
    start = checkpoint.step_path(tmp_path, STEPS)
    train(module, again, Continuation(again.place_after), rest, max_epochs=2, ckpt_path=start)
    assert rest.decays == [[0.1, 0.0]] * STEPS
