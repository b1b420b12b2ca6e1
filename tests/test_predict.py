"""Predicted against what a real step of a tiny Llama holds: every category to the byte."""

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_tune.data.collate import collate
from lit_tune.memory import SavedTensors, bytes_on, gradient_tensors, optimizer_tensors, weight_tensors
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.load import load_config
from lit_tune.modules.lora import Lora
from lit_tune.modules.optim import make_optimizer
from lit_tune.predict import (
    FORWARD,
    OPTIMIZER,
    Case,
    Ledger,
    Prediction,
    cheapest_checkpointing,
    heaviest,
    predict,
    trace,
    trace_depth,
    with_layers,
)
from lit_tune.workload import MicroBatch

LAYERS = 7  # more than are traced
LENGTHS = (23, 40, 9)
SUPERVISED = 50
BASES = [("lora", "none"), ("lora", "int8"), ("lora", "nf4"), ("fft", "none")]
CHECKPOINTING = ["none", "mlp", "full", 3]
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
CELLS = [*product(BASES, CHECKPOINTING, PRECISIONS), (("lora", "fp4"), "none", "bf16-mixed")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a Llama whose layers are wide enough for 4-bit blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


def batch(*, packing: bool) -> dict[str, Any]:
    """Return a micro-batch of `LENGTHS`, `SUPERVISED` of whose tokens have labels."""
    samples, left = [], SUPERVISED
    for length in LENGTHS:
        ids = torch.randint(0, 96, (length,)).numpy()
        labels = ids.copy()
        labels[: length - min(length - 1, left)] = -100
        left -= min(length - 1, left)
        samples.append((ids, labels))
    made = collate(samples, packing=packing, pad_token_id=0)
    assert made["num_supervised"] == SUPERVISED
    return made


class Measured:
    """A real step, its storages counted by category; with a ledger, all storages at every moment besides."""

    def __init__(self, tuner: LlamaTuner, precision: str, *, packing: bool, ledger: Ledger | None = None) -> None:
        trainer = SimpleNamespace(precision=precision, strategy=None, is_global_zero=True)
        tuner.trainer = trainer  # type: ignore[assignment]
        tuner.configure_model()
        self.weights = bytes_on("cpu", weight_tensors(tuner))
        micro = batch(packing=packing)
        tuner.saved_tensors = saved = SavedTensors(weight_tensors(tuner))
        with ledger or nullcontext():
            if ledger is not None:
                for tensor in weight_tensors(tuner):
                    ledger.enter(tensor, "weights")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.endswith("mixed")):
                nll = tuner.nll(micro)
            self.activations = saved.bytes_on("cpu")
            (nll * 1.0).backward()
        self.gradients = bytes_on("cpu", gradient_tensors(tuner))
        optimizer = make_optimizer(tuner.optimizer, tuner.parameters(), lr=1e-3, weight_decay=0.0, fused=False)
        optimizer.step()
        self.optimizer = bytes_on("cpu", optimizer_tensors(optimizer))


def predicted(tuner: LlamaTuner, base: str, precision: str, *, packing: bool = True) -> Prediction:
    micro = MicroBatch(LENGTHS, SUPERVISED, packed=packing)
    return predict(Case(tuner, load_config(base), micro, precision, device="cpu"))


@pytest.mark.parametrize(("of", "checkpointing", "precision"), CELLS)
def test_what_is_predicted_is_what_a_step_holds(of: Any, checkpointing: Any, precision: str, base: str) -> None:
    method, quantize = of
    packing = checkpointing != "mlp"

    def tuner() -> LlamaTuner:
        return LlamaTuner(
            base=base, method=method, quantize=quantize, lora=Lora(rank=4), gradient_checkpointing=checkpointing
        )

    found = predicted(tuner(), base, precision, packing=packing)
    real = Measured(tuner(), precision, packing=packing)
    assert found.weights == real.weights
    assert found.gradients == real.gradients
    assert found.optimizer == real.optimizer
    assert found.activations == real.activations


def test_the_grid_has_forty_cells_and_more() -> None:
    assert len(CELLS) >= 40


@pytest.mark.parametrize("method", ["lora", "fft"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_peak_is_that_of_a_real_step_whose_every_storage_is_written_down(
    method: Any, checkpointing: Any, base: str
) -> None:
    def tuner() -> LlamaTuner:
        return LlamaTuner(base=base, method=method, gradient_checkpointing=checkpointing)

    found = predicted(tuner(), base, "bf16-mixed")
    ledger = Ledger()
    Measured(tuner(), "bf16-mixed", packing=True, ledger=ledger)
    before_the_optimizer = [moment for name, moment in found.moments.items() if name != OPTIMIZER]
    peak = max(moment.total - moment.optimizer for moment in before_the_optimizer)
    # Checkpointing keeps a state of the random generator, 5 KB, for each layer: much beside so tiny ones.
    assert ledger.moments[""].total == pytest.approx(peak, rel=0.03)


# Depth ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("checkpointing", ["none", 2, 3])
def test_few_layers_tell_what_all_layers_hold(checkpointing: Any, device: Any, base: str) -> None:
    tuner = LlamaTuner(base=base, gradient_checkpointing=checkpointing)
    config = with_layers(load_config(base), 11)
    case = Case(tuner, config, MicroBatch(LENGTHS, SUPERVISED), "bf16-mixed", device=device)
    whole, told = trace(case), trace_depth(case)
    assert told.activations == whole.activations
    assert told.trained == whole.trained
    assert told.moments == {name: whole.moments[name] for name in told.moments}
    most = max(whole.moments.values(), key=lambda moment: moment.total)
    assert max(told.moments.values(), key=lambda moment: moment.total) == most


# What the other settings change ---------------------------------------------------------------------------------------


def on_gpu(base: str, *, precision: str = "bf16-mixed", accumulate: int = 1, **settings: Any) -> Prediction:
    case: dict[str, Any] = {name: settings.pop(name) for name in ("devices", "strategy") if name in settings}
    tuner = LlamaTuner(base=base, **settings)
    micro = MicroBatch((400, 300), 500)
    return predict(Case(tuner, load_config(base), micro, precision, accumulate=accumulate, **case))


def test_steps_in_the_backward_pass_leave_no_gradients(base: str) -> None:
    usual = on_gpu(base, method="fft")
    in_backward = on_gpu(base, method="fft", optimizer_in_backward=True)
    assert usual.gradients > 0
    assert in_backward.gradients == 0
    assert all(moment.gradients == 0 for moment in in_backward.moments.values())
    assert in_backward.optimizer == usual.optimizer


def test_with_accumulation_gradients_live_in_the_forward_pass(base: str) -> None:
    one, several = on_gpu(base, method="fft"), on_gpu(base, method="fft", accumulate=2)
    assert one.moments[FORWARD].gradients == 0
    assert several.moments[FORWARD].gradients == one.moments[OPTIMIZER].gradients > 0


def test_offloaded_activations_are_on_the_host(base: str) -> None:
    kept, offloaded = on_gpu(base), on_gpu(base, offload_activations=True)
    assert kept.host == 0
    # Storages under a MiB stay.
    assert offloaded.host + offloaded.activations == pytest.approx(kept.activations, rel=0.01)


def test_paged_moments_are_on_the_host(base: str) -> None:
    usual = on_gpu(base, method="fft", optimizer="adamw_8bit")
    paged = on_gpu(base, method="fft", optimizer="paged_adamw_8bit")
    assert paged.host == usual.optimizer > 0
    assert paged.peak.optimizer == 0


def test_shards_are_the_devices_share(base: str) -> None:
    one = on_gpu(base, method="fft", precision="32-true")
    four = on_gpu(base, method="fft", precision="32-true", strategy="fsdp2", devices=4)
    for category in ("weights", "gradients", "optimizer"):
        assert getattr(four, category) == pytest.approx(getattr(one, category) / 4, rel=0.01)
    offloaded = on_gpu(base, method="fft", precision="32-true", strategy="fsdp2_cpu_offload")
    assert offloaded.weights == offloaded.gradients == offloaded.optimizer == 0
    assert offloaded.host == pytest.approx(one.weights + one.gradients + one.optimizer, rel=0.01)


def test_ddp_has_buckets_as_large_as_the_gradients(base: str) -> None:
    one, two = on_gpu(base), on_gpu(base, devices=2)
    assert two.peak.other - one.peak.other == one.gradients


def test_nothing_of_a_plan_is_left_in_the_settings(base: str) -> None:
    tuner = LlamaTuner(base=base)
    predicted(tuner, base, "32-true")
    assert not hasattr(tuner, "model")
    assert tuner.saved_tensors is None


def test_auto_is_the_cheapest_checkpointing_that_fits(base: str) -> None:
    tuner = LlamaTuner(base=base, gradient_checkpointing="auto")
    of = Case(tuner, load_config(base), MicroBatch((400, 300), 500), "bf16-mixed")
    peaks = {setting: on_gpu(base, gradient_checkpointing=setting).peak.total for setting in ("none", 4, 2, "full")}
    assert cheapest_checkpointing(of, peaks["none"]) == "none"
    assert cheapest_checkpointing(of, peaks["none"] - 1) != "none"
    assert cheapest_checkpointing(of, max(peaks["full"], min(peaks[2], peaks[4]) - 1)) == "full"
    assert cheapest_checkpointing(of, 0) == "full"


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_every_variant_is_predicted(variant: Any, base: str) -> None:
    lora = Lora(rank=4, variant=variant)
    found = predicted(LlamaTuner(base=base, lora=lora), base, "bf16-mixed")
    real = Measured(LlamaTuner(base=base, lora=lora), "bf16-mixed", packing=True)
    assert (found.weights, found.gradients, found.optimizer) == (real.weights, real.gradients, real.optimizer)
    if variant == "dora":  # it saves some that it lets go again in the forward pass: measured, they count
        assert 0.9 * real.activations < found.activations <= real.activations
    else:
        assert found.activations == real.activations


def test_an_adapter_to_start_from_is_as_large_as_it_is(base: str, tmp_path: Path) -> None:
    first = LlamaTuner(base=base, lora=Lora(rank=6, targets=["o_proj", "up_proj"]))
    Measured(first, "32-true", packing=True)
    first.model.save_pretrained(str(tmp_path / "adapter"))

    def tuner() -> LlamaTuner:
        return LlamaTuner(base=base, adapter=str(tmp_path / "adapter"))

    assert predicted(tuner(), base, "32-true").weights == Measured(tuner(), "32-true", packing=True).weights


def test_the_heaviest_micro_batch_need_not_be_the_longest(base: str) -> None:
    config = load_config(base)
    config.vocab_size = 20_000
    of = Case(LlamaTuner(base=base), config, MicroBatch((50,), 1), "32-true", device="cpu")
    longest, supervised = MicroBatch((50,), 1), MicroBatch((45,), 44)
    found, prediction = heaviest(of, [longest, supervised])
    assert found.micro == supervised
    assert prediction == predict(found)
    assert heaviest(of, [longest])[0].micro == longest
