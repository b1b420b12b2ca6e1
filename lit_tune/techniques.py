"""Which techniques go together: one table of what cannot be, each row with its reason and what to set instead.

Techniques meet methods (LoRA, full), strategies and devices, and each other. All that no row excludes works, in any
combination; gradient checkpointing and the offload of activations go with everything. The table is asked once, before
a run is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

FOUR_BITS = ("nf4", "fp4")
EIGHT_BIT_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")
# Strategies by their names, or by the class where a configuration builds one.
ONE_PROCESS = ("auto", "single_device", "SingleDeviceStrategy")
SHARDING = ("fsdp", "FSDP", "ModelParallel", "Sharded", "deepspeed", "DeepSpeed")
HOST_OFFLOAD = ("fsdp2_cpu_offload", "deepspeed_stage_3_offload")
# Lightning's short forms.
PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Choice:
    """What a run has been set to, as far as one of it may exclude another; the names are those of the settings.

    Args:
        variant: `model.lora.variant`.
        device: Kind of device that trains: cpu, cuda.
        devices: Processes in all.
        accumulate: Micro-batches of an optimizer step.
        clip: `trainer.gradient_clip_val`.
    """

    method: str = "lora"
    quantize: str = "none"
    variant: str = "lora"
    optimizer: str = "adamw"
    optimizer_in_backward: bool = False
    gradient_checkpointing: str | int = "none"
    skip_nonfinite: int = 0
    precision: str = "32-true"
    strategy: str = "auto"
    device: str = "cpu"
    devices: int = 1
    accumulate: int = 1
    clip: float | None = None

    @property
    def sharded(self) -> bool:
        """Whether parameters are cut into parts, one for each device, or lie in host memory."""
        return self.strategy.startswith(SHARDING)


class Rule(NamedTuple):
    """What cannot be, and the line that says so, in which the choice's settings are filled in."""

    excludes: Callable[[Choice], bool]
    says: str


RULES: tuple[Rule, ...] = (
    # Quantised bases
    Rule(
        lambda c: c.quantize != "none" and c.method == "fft",
        "model.quantize is {quantize} with model.method fft: quantised weights cannot train; use model.method lora, or "
        "model.quantize none",
    ),
    Rule(
        lambda c: c.quantize != "none" and c.variant == "pissa",
        "model.quantize is {quantize} with model.lora.variant pissa, which takes the adapters out of the weights' own "
        "numbers; use lora or rslora, or model.quantize none",
    ),
    Rule(
        # peft 0.21 moves such a weight to the CPU that it is on, and bitsandbytes forgets its scales in that.
        lambda c: c.quantize == "int8" and c.variant == "dora" and c.device == "cpu",
        "model.quantize is int8 with model.lora.variant dora on a CPU, where it fails at the second forward pass; use "
        "model.quantize nf4, or variant lora",
    ),
    Rule(
        lambda c: c.quantize in FOUR_BITS and c.precision == "64-true",
        "model.quantize is {quantize} with trainer.precision 64-true: 4-bit weights are computed in 16 or 32 bits; use "
        "32-true",
    ),
    Rule(
        lambda c: c.quantize != "none" and c.sharded,
        "model.quantize is {quantize} with trainer.strategy {strategy}: packed weights and their constants cannot be "
        "cut into shards; use auto or ddp, or model.quantize none",
    ),
    # Host memory for parameters and optimizer state
    Rule(
        lambda c: c.strategy in HOST_OFFLOAD and c.device == "cpu",
        "trainer.strategy is {strategy} on a CPU, where all is in host memory already; use auto",
    ),
    Rule(
        lambda c: c.strategy in HOST_OFFLOAD and c.method == "lora",
        "trainer.strategy is {strategy} with model.method lora, whose gradients and optimizer state are small while "
        "the frozen weights would cross the bus in every micro-batch; use auto with model.quantize nf4 or int8",
    ),
    Rule(
        lambda c: c.strategy.startswith("deepspeed") and c.device == "cpu",
        "trainer.strategy is {strategy}, which needs a CUDA GPU; use auto, ddp or fsdp2",
    ),
    # Precision
    Rule(
        lambda c: c.precision == "16-mixed" and c.device == "cpu",
        "trainer.precision is 16-mixed on a CPU, for which Lightning has no fp16; use bf16-mixed or 32-true",
    ),
    Rule(
        lambda c: c.precision == "16-mixed" and c.strategy.startswith("fsdp2"),
        "trainer.precision is 16-mixed with trainer.strategy {strategy}, where the loss scaler would see the overflows "
        "of one shard only; use bf16-mixed, bf16-true or 32-true",
    ),
    Rule(
        lambda c: c.precision == "16-true" and c.method == "fft" and c.optimizer == "adamw",
        "trainer.precision is 16-true with model.method fft and model.optimizer adamw: the squares of gradients below "
        "0.0002 vanish in fp16, and training diverges; use bf16-true or bf16-mixed, or model.optimizer adamw_8bit",
    ),
    # Optimizers
    Rule(
        lambda c: c.optimizer == "paged_adamw_8bit" and c.device != "cuda",
        "model.optimizer is paged_adamw_8bit without a CUDA GPU, whose driver moves the pages; use adamw_8bit",
    ),
    Rule(
        lambda c: c.optimizer in EIGHT_BIT_OPTIMIZERS and c.sharded,
        "model.optimizer is {optimizer} with trainer.strategy {strategy}: bitsandbytes cannot step sharded weights; "
        "use adamw or sgd",
    ),
    Rule(
        lambda c: c.optimizer == "adafactor" and c.sharded,
        "model.optimizer is adafactor with trainer.strategy {strategy}: its means over rows and columns would be those "
        "of a shard; use adamw or sgd",
    ),
    # The optimizer's steps in the backward pass
    Rule(
        lambda c: c.optimizer_in_backward and c.method == "lora",
        "model.optimizer_in_backward is true with model.method lora, whose gradients are small; use it with fft",
    ),
    Rule(
        lambda c: c.optimizer_in_backward and (c.devices > 1 or c.strategy not in ONE_PROCESS),
        "model.optimizer_in_backward is true with trainer.strategy {strategy} on {devices} device(s): a weight would "
        "be stepped before its gradients are averaged; use trainer.devices 1 and trainer.strategy auto",
    ),
    Rule(
        lambda c: c.optimizer_in_backward and c.accumulate > 1,
        "model.optimizer_in_backward is true with {accumulate} micro-batches in an optimizer step, whose gradients "
        "would have to be kept; set trainer.accumulate_grad_batches 1 (and data.global_batch_size to fit)",
    ),
    Rule(
        lambda c: c.optimizer_in_backward and bool(c.clip),
        "model.optimizer_in_backward is true with trainer.gradient_clip_val {clip}: the norm of all gradients is known "
        "when they are gone; set trainer.gradient_clip_val null",
    ),
    Rule(
        lambda c: c.optimizer_in_backward and c.precision == "16-mixed",
        "model.optimizer_in_backward is true with trainer.precision 16-mixed, whose scaler skips whole steps; use "
        "bf16-mixed, bf16-true or 32-true",
    ),
    Rule(
        lambda c: c.optimizer_in_backward and c.skip_nonfinite > 0,
        "model.optimizer_in_backward is true with model.skip_nonfinite {skip_nonfinite}: a step that is half done "
        "cannot be skipped; set model.skip_nonfinite 0",
    ),
    # Gradient checkpointing
    Rule(
        lambda c: isinstance(c.gradient_checkpointing, int) and c.gradient_checkpointing < 1,
        "model.gradient_checkpointing is {gradient_checkpointing}; it is none, full, mlp, auto, or a number N of 1 or "
        "more for every N-th layer",
    ),
)


def refusal(choice: Choice) -> str | None:
    """Return why a choice cannot run and what to set instead, in a line; None if it can."""
    for rule in RULES:
        if rule.excludes(choice):
            return rule.says.format_map(vars(choice)) + "."
    return None
