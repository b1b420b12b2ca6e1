"""What exactness costs: the time until a run goes on at a late step, and the share of a step's time.

    python benchmarks/exactness.py [--steps 10000] [--runs 5]

A run over 5,000 packed records is trained for `--steps` steps on a tiny model and continued for one more; the same
command without a checkpoint is the fresh start. The share of a step is what is done for exactness alone (a seed for
every micro-batch, the number of supervised tokens and the records' numbers of the step, asking for signals and for
checkpoints that are due), timed within a LoRA run of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.inputs import RECORDS, many_records
from benchmarks.report import figures, header, run_quietly, timed
from lit_tune import cli
from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.continuation import Continuation
from lit_tune.callbacks.stop import GracefulStop
from lit_tune.data import loader
from lit_tune.logs import read_metrics
from tests.tiny_llama import tiny_base

EXACT_STEPS = 12


def seconds_of_continuing(folder: Path, *, steps: int, runs: int) -> None:
    """Print how long whole commands of one step take: fresh, and after `steps` steps."""
    fit = [sys.executable, "-m", "lit_tune", "fit", "--model.base", str(tiny_base(folder / "tiny"))]
    fit += ["--trainer.default_root_dir", str(folder), "--data.path", many_records(folder / "records.jsonl")]
    fit += ["--data.micro_batch_tokens", "2048", "--data.max_length", "512", "--samples.prompts", "[]"]
    fit += [
        "--trainer.max_epochs",
        "-1",
        "--trainer.log_every_n_steps",
        "100",
        "--trainer.enable_progress_bar",
        "false",
    ]
    run_quietly([*fit, "--name", "late", "--trainer.max_steps", str(steps)])
    fresh, late = [], []
    for number in range(runs):
        fresh.append(timed(run_quietly, [*fit, "--name", "fresh", "--trainer.max_steps", "1"]))
        more = ["--ckpt_path", "last", "--trainer.max_steps", str(steps + 1 + number)]
        late.append(timed(run_quietly, [*fit, "--name", "late", *more]))
    figures(f"one step of a run over {RECORDS:,} records, fresh", fresh)
    figures(f"one step more after {steps:,}, continued", late)


def share_of_a_step(folder: Path) -> None:
    """Print the share of the training time that is spent for exactness."""
    spent = [0.0]

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed_function(*arguments: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                spent[0] += time.perf_counter() - started

        return timed_function

    loader.rng_seed = clocked(loader.rng_seed)
    loader.StepSource.supervised_tokens = clocked(loader.StepSource.supervised_tokens)  # type: ignore[method-assign]
    loader.StepSource.sample_ids = clocked(loader.StepSource.sample_ids)  # type: ignore[method-assign]
    for kind in (Checkpoint, Continuation, GracefulStop):
        kind.on_train_batch_start = clocked(kind.on_train_batch_start)  # type: ignore[method-assign]
    torch.manual_seed = clocked(torch.manual_seed)
    fit = ["fit", "--trainer.max_steps", str(EXACT_STEPS), "--trainer.default_root_dir", str(folder), "--name", "share"]
    fit += [
        "--samples.prompts",
        "[]",
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.enable_progress_bar",
        "false",
    ]
    code = cli.exit_code(lambda: cli.run([*fit, "--data.max_length", "512"]))
    if code:
        sys.exit(code)
    rows = read_metrics(folder / "runs" / "share" / "metrics.csv")
    seen = [float(row["throughput/samples_seen"]) for row in rows]
    rate = [float(row["throughput/samples_per_s"]) for row in rows]
    seconds = seen[-1] / rate[-1]
    print(
        f"for exactness, of a LoRA step of SmolLM2-135M {1000 * spent[0] / EXACT_STEPS:8.3f} ms  "
        f"({100 * spent[0] / seconds:.3f} % of {1000 * seconds / EXACT_STEPS:.0f} ms; {EXACT_STEPS} steps)"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    header()
    with tempfile.TemporaryDirectory() as name:
        share_of_a_step(Path(name))
        seconds_of_continuing(Path(name), steps=arguments.steps, runs=arguments.runs)


if __name__ == "__main__":
    main()
