"""What to change when memory runs out: the settings that are still open, as flags, the cheapest first.

From settings alone, so it says what a change leaves, never whether that is enough.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """Flags that take memory off a run.

    Args:
        flags: For the same command.
        effect: What they save, and at what price.
        fresh: Only a new run can have them: one that goes on would be another training.
    """

    flags: str
    effect: str
    fresh: bool = False


def advice(
    *,
    method: str,
    quantize: str,
    gradient_checkpointing: str | int,
    offload_activations: bool,
    optimizer: str,
    precision: str,
    on_gpu: bool,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    global_batch_size: int | None,
    accumulate_grad_batches: int,
    longest_sample: int,
) -> list[Change]:
    """Return the changes that are open to a run of these settings, the cheapest first.

    Args:
        micro_batch_size: Samples, where no tokens are set.
        accumulate_grad_batches: As it was set: with a global batch size it follows from that.
        longest_sample: Tokens of the longest sample.
    """
    changes = _smaller_batches(
        micro_batch_size, micro_batch_tokens, global_batch_size, accumulate_grad_batches, longest_sample
    )
    if gradient_checkpointing != "full":
        effect = "keeps each layer's input alone, for a third to a half more time"
        changes.append(Change("--model.gradient_checkpointing full", effect))
    if on_gpu and not offload_activations:
        effect = "activations wait in host memory, and go over the bus twice"
        changes.append(Change("--model.offload_activations true", effect))
    if on_gpu and precision == "32-true":
        effect = "halves activations" + (", and frozen weights" if method == "lora" else "")
        changes.append(Change("--trainer.precision bf16-mixed", effect, fresh=True))
    if method == "lora" and quantize in ("none", "int8"):
        changes.append(Change("--model.quantize nf4", "4 bits a frozen weight, at some cost in speed", fresh=True))
    if method == "fft":
        if optimizer == "adamw":
            changes.append(Change("--model.optimizer adamw_8bit", "a quarter of the optimizer state", fresh=True))
        effect = "gradients and optimizer state of small adapters alone"
        changes.append(Change("--model.method lora", effect, fresh=True))
    changes.append(
        Change(f"--data.max_length {longest_sample // 2}", "drops longer samples, or truncates them", fresh=True)
    )
    return changes


def _smaller_batches(
    samples: int, tokens: int | None, global_batch_size: int | None, accumulate: int, longest_sample: int
) -> list[Change]:
    """Halve the micro-batches and double their number in an optimizer step."""
    if tokens is not None:
        fewer = max(tokens // 2, longest_sample)
        flags, times, fresh = f"--data.micro_batch_tokens {fewer}", 2, True
        if fewer == tokens:
            return []
    else:
        fewer = samples // 2 if samples % 2 == 0 else 1
        if samples == 1:
            return []
        flags, times, fresh = f"--data.micro_batch_size {fewer}", samples // fewer, False
    if global_batch_size is None or accumulate != 1:
        flags += f" --trainer.accumulate_grad_batches {accumulate * times}"
    return [Change(flags, "fewer activations, the same optimizer steps, a little slower", fresh=fresh)]


def advice_lines(changes: list[Change], *, continues: bool) -> list[str]:
    """Return the changes as lines of text: flags, and below them what they do.

    Args:
        continues: There is a checkpoint to go on from, so it is said which changes need a new run instead.
    """
    lines = ["What to change, the cheapest first:"] if changes else []
    for change in changes:
        lines += [f"  {change.flags}", f"      {change.effect}" + ("; a new run" if continues and change.fresh else "")]
    return lines
