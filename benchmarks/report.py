"""What every benchmark prints: the command, the code's state, versions and hardware, then figures with their spread."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lit_tune.environment import environment


def header() -> None:
    """Print where and with what the figures below were measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    found = environment()
    versions = ("lit-tune", "torch", "lightning", "transformers", "peft", "tokenizers", "python")
    program = "-m pytest" if Path(sys.argv[0]).parent.name == "pytest" else shlex.quote(sys.argv[0])
    print(f"command   python {program} {shlex.join(sys.argv[1:])}".rstrip())
    print(f"commit    {commit or 'unknown'}")
    print(f"versions  {', '.join(f'{name} {found[name]}' for name in versions)}")
    print(f"hardware  {found['cpu']}, {found['memory']}, {found.get('gpu 0', 'no GPU')}\n")


def figures(name: str, seconds: Sequence[float]) -> None:
    """Print minimum, median and maximum of repeated measurements."""
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    print(f"{name:<44} {middle:8.2f} s   (of {len(seconds)}: {low:.2f} to {high:.2f})", flush=True)


def run_quietly(command: Sequence[str]) -> None:
    """Run a command to its end; what it prints is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def timed(action: Callable[..., object], *arguments: object) -> float:
    """Return the seconds that `action(*arguments)` takes."""
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started
