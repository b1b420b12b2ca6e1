"""What the memory monitor costs: the share of its hooks in a step's time, and steps with counting against others.

    python benchmarks/memory_callback.py [--steps 31] [--tokens 512] [--threads 2]

A LoRA run of SmolLM2-135M. The hooks are clocked themselves, with all that they call; what they do not show is what
autograd's hooks take in a forward pass whose saved tensors are counted. For that the time of such steps stands beside
that of the others, and the time of the same forward pass, with counting and without, in turns.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from benchmarks.report import header
from lit_tune import cli
from lit_tune.callbacks.memory import COUNTED_EVERY, MemoryMonitor
from lit_tune.memory import SavedTensors, weight_tensors
from lit_tune.modules.llama import LlamaTuner

HOOKS = (
    *("on_train_batch_start", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)
ROUNDS = 7


class Clock:
    """Seconds in the monitor's hooks, and from each optimizer step's end to the next one's."""

    def __init__(self) -> None:
        self.hooks_s: list[float] = [0.0]  # of each step
        self.ends: list[float] = []
        self.counted: list[bool] = []

    def clocked(self, hook: Callable[..., Any], *, ends_step: bool) -> Callable[..., Any]:
        """Return the hook, which adds its time to its step's."""

        @functools.wraps(hook)
        def timed(monitor: MemoryMonitor, *arguments: Any) -> None:
            started = time.perf_counter()
            hook(monitor, *arguments)
            now = time.perf_counter()
            self.hooks_s[-1] += now - started
            if ends_step and arguments[3]["last_of_step"]:
                self.counted.append(monitor._counts_batch)
                self.ends.append(now)
                self.hooks_s.append(0.0)

        return timed


def forward_passes(module: LlamaTuner, batch: dict[str, Any]) -> tuple[float, float, int]:
    """Return the seconds of a forward pass without and with counting, medians taken in turns, and the bytes saved."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    saved = SavedTensors(weight_tensors(module))
    for turn in range(2 * ROUNDS):
        counts = bool(turn % 2)
        saved = SavedTensors(weight_tensors(module))
        started = time.perf_counter()
        with saved.counting() if counts else nullcontext():
            loss = module.nll(batch)
        _wait(module)
        seconds[counts].append(time.perf_counter() - started)
        del loss
    return statistics.median(seconds[False]), statistics.median(seconds[True]), saved.bytes_on(module.device)


def _wait(module: LlamaTuner) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def measure(folder: Path, *, steps: int, tokens: int) -> None:
    """Run, and print the shares."""
    clock = Clock()
    for name in HOOKS:
        timed = clock.clocked(getattr(MemoryMonitor, name), ends_step=name == "on_train_batch_end")
        setattr(MemoryMonitor, name, timed)
    forwards: list[tuple[float, float, int]] = []
    training_step = LlamaTuner.training_step

    def compared(module: LlamaTuner, batch: dict[str, Any], batch_idx: int) -> Any:
        if batch["step"] == steps - 1 and not forwards:
            forwards.append(forward_passes(module, batch))
        return training_step(module, batch, batch_idx)

    LlamaTuner.training_step = compared  # type: ignore[method-assign, assignment]
    fit = ["fit", "--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(folder), "--name", "cost"]
    fit += ["--samples.prompts", "[]", "--trainer.enable_progress_bar", "false"]
    fit += ["--data.micro_batch_tokens", str(tokens), "--data.max_length", str(tokens)]
    if code := cli.exit_code(lambda: cli.run(fit)):
        sys.exit(code)
    report(clock, forwards[0])


def report(clock: Clock, forward: tuple[float, float, int]) -> None:
    """Print what was clocked; the first step and the last, in which the forward passes were compared, are left out."""
    steps = [end - begin for begin, end in zip(clock.ends, clock.ends[1:-1], strict=False)]
    hooks, counted = clock.hooks_s[1 : 1 + len(steps)], clock.counted[1 : 1 + len(steps)]
    plain, counting, saved = forward
    print(f"\n{len(steps)} steps of {1000 * statistics.median(steps):.0f} ms (median)")
    for label, wanted in (("not counted", False), ("counted", True)):
        of = [i for i, was in enumerate(counted) if was is wanted]
        if of:
            spent, took = statistics.median(hooks[i] for i in of), statistics.median(steps[i] for i in of)
            print(f"  {label:<12} {len(of):3} steps of {1000 * took:7.1f} ms, hooks {1000 * spent:6.2f} ms")
    extra = counting - plain
    print(
        f"a forward pass {1000 * plain:.1f} ms, with counting {1000 * counting:.1f} ms ({1000 * extra:+.1f} ms, "
        f"{saved / 2**20:.0f} MiB saved)"
    )
    total = sum(hooks) + max(0.0, extra) * sum(counted)
    print(f"hooks alone                                {100 * sum(hooks) / sum(steps):.3f} % of the time")
    print(f"hooks and counting, as often as it was done {100 * total / sum(steps):.3f} %")
    often = statistics.median(h for h, was in zip(hooks, counted, strict=True) if not was)
    most = statistics.median(h for h, was in zip(hooks, counted, strict=True) if was) + max(0.0, extra)
    lasting = often + (most - often) / COUNTED_EVERY
    print(f"in a long run (every tenth step counted)    {100 * lasting / statistics.median(steps):.3f} %")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    header()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), steps=arguments.steps, tokens=arguments.tokens)


if __name__ == "__main__":
    main()
