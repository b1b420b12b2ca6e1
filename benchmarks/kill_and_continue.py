"""The same run after any interruption: SmolLM2 trained once in peace, and once killed with SIGKILL ten times.

    python benchmarks/kill_and_continue.py [--kills 10] [--seed 0] [--keep DIRECTORY]

Both are real `lit-tune fit` commands with the same settings. The second is killed at random moments and continued with
`--ckpt_path last`, again and again. At the end the bits of the trained weights and the logged curve of both are
compared; the exit code is 1 if anything differs. Takes about six minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from safetensors import safe_open

from benchmarks.report import figures, header, timed
from lit_tune.checkpoint import step_checkpoints
from lit_tune.logs import FILE, Row, read_metrics
from lit_tune.modules import smollm2

NAME = "run"
SETTINGS = [
    *("--model.base", "smollm2-135m", "--model.lora.dropout", "0.1", "--model.learning_rate", "5e-4"),
    *("--data.limit", "[0:40]", "--data.max_length", "128", "--data.micro_batch_size", "2"),
    *("--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "3", "--data.val_fraction", "0.1"),
    *("--trainer.enable_progress_bar", "false", "--samples.max_new_tokens", "4", "--checkpoint.every_n_steps", "1"),
]
MEASURED = (
    "memory/",
    "memory_stack/",
    "throughput/",
)  # of the machine, not of the run; differs from one time to the next
COUNTED = ("throughput/samples_seen",)


def weights_sha256(run: Path) -> str:
    """Return the hash of names, dtypes, shapes and bits of the weights that a run left as its result."""
    digest = hashlib.sha256()
    for file in sorted((run / "result").glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in sorted(weights.keys()):
                tensor = weights.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
                digest.update(tensor.tobytes())
    return digest.hexdigest()


def curve(run: Path) -> list[Row]:
    """Return the rows of a run's metrics.csv as far as they must be the same each time."""
    return [
        {name: value for name, value in row.items() if value and is_of_the_run(name)}
        for row in read_metrics(run / FILE)
    ]


def is_of_the_run(metric: str) -> bool:
    """Tell a metric that the run decides from one that is a measurement of the machine."""
    return metric in COUNTED or not metric.startswith(MEASURED)


def first_difference(expected: list[Row], found: list[Row]) -> str:
    """Return where two curves differ first, empty if they do not."""
    steps, expected_steps = ([row["step"] for row in rows] for rows in (found, expected))
    if steps != expected_steps:
        return f"steps {' '.join(steps)} instead of {' '.join(expected_steps)}"
    for row, other in zip(expected, found, strict=True):
        for name in sorted(row.keys() | other.keys()):
            if row.get(name) != other.get(name):
                return f"{name} of step {row['step']} is {other.get(name)} instead of {row.get(name)}"
    return ""


def command(folder: Path, *, resume: bool) -> list[str]:
    """Return the command that starts or continues the run in `folder`."""
    start = [sys.executable, "-m", "lit_tune", "fit", *SETTINGS, "--name", NAME]
    return [*start, "--trainer.default_root_dir", str(folder), *(["--ckpt_path", "last"] if resume else [])]


def newest_run(folder: Path) -> Path:
    """Return the directory of the run, which is run-2 and so on where it was killed before its first checkpoint."""
    return max((folder / "runs").glob(f"{NAME}*"), key=lambda run: run.stat().st_mtime_ns)


def steps_saved(folder: Path) -> int:
    """Return the optimizer steps in the newest checkpoint, 0 without one."""
    found = [path for run in (folder / "runs").glob(f"{NAME}*") for path in step_checkpoints(run)]
    return max((int(path.stem.removeprefix("step-")) for path in found), default=0)


def run_for(folder: Path, seconds: float | None) -> bool:
    """Start or continue the run, and kill it after `seconds`; return whether it was killed."""
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            command(folder, resume=steps_saved(folder) > 0),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())},
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
    if code:
        sys.exit(f"lit-tune ended with {code}:\n{(folder / 'log').read_text()}")
    return False


def kill_and_continue(folder: Path, *, kills: int, seed: int, seconds: float) -> None:
    """Kill the run at `kills` random moments of its work, then let it end; `seconds` is how long it takes in peace."""
    moments = random.Random(seed)
    startup = timed(lambda: subprocess.run([sys.executable, "-c", "import lit_tune.run"], check=True))
    done = 0
    while done < kills:
        # From the first import on; as long as it takes to get a tenth of the run done, more or less.
        before, delay = steps_saved(folder), moments.uniform(0, 2 * (startup + (seconds - startup) / kills))
        if not run_for(folder, delay):
            print(f"  ended by itself before kill {done + 1}: {kills} kills do not fit", flush=True)
            return
        done += 1
        print(
            f"  kill {done:2}  after {delay:5.1f} s: from step {before:2} to step {steps_saved(folder):2}", flush=True
        )
    run_for(folder, None)


def measure(folder: Path, *, kills: int, seed: int) -> bool:
    """Run in peace and with kills; print and compare; return whether all is the same."""
    peace, war = folder / "peace", folder / "kills"
    for place in (peace, war):
        place.mkdir()
    started = time.perf_counter()
    run_for(peace, None)
    seconds = time.perf_counter() - started
    figures(f"uninterrupted, {steps_saved(peace)} optimizer steps", [seconds])
    started = time.perf_counter()
    kill_and_continue(war, kills=kills, seed=seed, seconds=seconds)
    figures(f"killed {kills} times and continued", [time.perf_counter() - started])
    whole, parts = newest_run(peace), newest_run(war)
    print(f"\nsha256 of the weights, uninterrupted   {weights_sha256(whole)}")
    print(f"sha256 of the weights, killed          {weights_sha256(parts)}")
    difference = first_difference(curve(whole), curve(parts))
    print(f"metrics.csv, {len(curve(whole))} steps: {difference or 'the same'}")
    return weights_sha256(whole) == weights_sha256(parts) and not difference


def main() -> None:
    """Measure, print, and exit with 1 if the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a directory for the runs, to look at afterwards")
    arguments = parser.parse_args()
    header()
    print(f"lit-tune fit {' '.join(SETTINGS)}\n")
    figures("prepare smollm2-135m (0 if it was there)", [timed(smollm2.prepared_directory)])
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if measure(folder, kills=arguments.kills, seed=arguments.seed) else 1)


if __name__ == "__main__":
    main()
