"""What the recipes that need no GPU come to: time of the whole command, loss per epoch, throughput, peak memory.

    python benchmarks/recipes.py [demo lora fft] [--runs 1]

The base model is prepared before; how long that takes is printed apart. What is read is what a user reads: the run's
metrics.csv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import figures, header, run_quietly, timed
from lit_tune.logs import read_metrics
from lit_tune.modules import smollm2


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """Return the values of a metric that were logged."""
    return [float(row[name]) for row in rows if row.get(name)]


def measure(recipe: str, runs: int) -> None:
    """Run a recipe and print its figures."""
    seconds = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "lit_tune", "fit", "--config", f"{recipe}.yaml"]
            command += ["--trainer.default_root_dir", folder]
            seconds.append(timed(run_quietly, command))
            rows = read_metrics(Path(folder) / "runs" / recipe / "metrics.csv")
    figures(f"lit-tune fit --config {recipe}.yaml", seconds)
    print(f"  train loss per epoch   {', '.join(f'{loss:.4f}' for loss in column(rows, 'train/epoch_loss'))}")
    if val := column(rows, "val/loss"):
        print(f"  val loss per epoch     {', '.join(f'{loss:.4f}' for loss in val)}")
    speed = column(rows, "throughput/tokens_per_s")
    print(f"  tokens/s               {sorted(speed)[len(speed) // 2]:.0f} (median over steps)")
    print(f"  host peak              {max(column(rows, 'memory/host_peak_gib')):.2f} GiB", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["demo", "lora", "fft"])
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    header()
    figures("prepare smollm2-135m (0 if it was there)", [timed(smollm2.prepared_directory)])
    for recipe in arguments.recipes:
        measure(recipe, arguments.runs)


if __name__ == "__main__":
    main()
