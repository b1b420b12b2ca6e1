"""A tiny run that is interrupted and continued until it ends, held against the same run that nobody disturbed.

What must be the same, to the bit: the weights of the result, weights and optimizer in the last checkpoint, the rows of
metrics.csv as text, and what TensorBoard shows. Only measurements of the machine may differ.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]

from benchmarks.kill_and_continue import curve, first_difference, is_of_the_run, weights_sha256
from lit_tune import checkpoint
from lit_tune.logs import Row
from tests.reliability.forks import Blow, Ended, ForkServer, Job
from tests.reliability.processes import Command
from tests.tiny_llama import tiny_base
from tests.tiny_run import write_records

RECORDS = 24  # 19 to train on: 5 optimizer steps an epoch, the last one short
EPOCHS = 3
STEPS = 15
NAME = "run"

COMMON = (
    *("--model.base", "../base", "--data.path", "../records.jsonl", "--data.template", "chatml"),
    *("--model.learning_rate", "0.01", "--model.lora.dropout", "0.1", "--trainer.max_epochs", str(EPOCHS)),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"),
    *("--samples.max_new_tokens", "4", "--data.val_fraction", "0.2", "--checkpoint.every_n_steps", "1"),
    *("--trainer.accumulate_grad_batches", "2", "--name", NAME, "--memory.predict", "false"),
)
ONE = ("--data.micro_batch_size", "2")
TWO = ("--data.micro_batch_size", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp")
MID_EPOCH = ("--trainer.val_check_interval", "0.5")
SELDOM = ("--checkpoint.every_n_steps", "3")  # so that steps are done again, and their rows made anew
PADDED = ("--data.packing", "false")


@dataclass(frozen=True)
class Kind:
    """Settings of a run, and its number of processes."""

    settings: tuple[str, ...]
    ranks: int = 1


KINDS = {
    "packed": Kind(ONE),
    "two ranks": Kind(TWO, 2),
    "validation within epochs": Kind((*ONE, *MID_EPOCH)),
    "padded, saved every third step": Kind((*ONE, *PADDED, *SELDOM)),
    "token budget": Kind(("--data.micro_batch_tokens", "160")),
    "full fine-tuning": Kind((*ONE, "--model.method", "fft")),
    "saved in the background": Kind((*ONE, "--checkpoint.asynchronous", "true")),
    "gradient checkpointing": Kind((*ONE, *SELDOM, "--model.gradient_checkpointing", "full")),
    "two ranks, saved every third step": Kind((*TWO, *SELDOM, *MID_EPOCH), 2),
    "two ranks, padded": Kind((*TWO, *PADDED), 2),
    "two ranks, full fine-tuning": Kind((*TWO, "--model.method", "fft"), 2),
    "two ranks, sharded": Kind((*TWO, "--model.method", "fft", "--trainer.strategy", "fsdp2"), 2),
}


# What a run left ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    weights: str
    state: str
    curve: list[Row]
    board: dict[str, list[tuple[int, Any]]]


def outcome(run: Path) -> Outcome:
    """Read what a run left."""
    newest = checkpoint.read(checkpoint.step_checkpoints(run)[0])
    state = {part: newest[part] for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    return Outcome(weights_sha256(run), nested_sha256(state), curve(run), board(run))


def nested_sha256(value: Any) -> str:
    """Return a hash of all tensors' bits and all other values in nested containers."""
    if isinstance(value, torch.Tensor):
        content = f"{value.dtype} {tuple(value.shape)} ".encode() + value.contiguous().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()
    if isinstance(value, Mapping):
        parts = [f"{key}={nested_sha256(value[key])}" for key in sorted(value, key=str)]
    elif isinstance(value, list | tuple):
        parts = [nested_sha256(part) for part in value]
    else:
        parts = [repr(value)]
    return hashlib.sha256("\n".join([type(value).__name__, *parts]).encode()).hexdigest()


def board(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """Return (step, value) of all points and texts that TensorBoard shows of a run, by the reader of its server."""
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto).tolist()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if is_of_the_run(tag)
    }


def differences(expected: Outcome, found: Outcome) -> list[str]:
    """Return what differs between two outcomes, a line each."""
    lines = []
    if found.weights != expected.weights:
        lines.append(f"weights of the result: {found.weights[:16]} instead of {expected.weights[:16]}")
    if found.state != expected.state:
        lines.append("state of the last checkpoint")
    if line := first_difference(expected.curve, found.curve):
        lines.append(f"metrics.csv: {line}")
    for tag in sorted(expected.board.keys() | found.board.keys()):
        wanted, shown = expected.board.get(tag, []), found.board.get(tag, [])
        if shown != wanted:
            lines.append(f"TensorBoard: {tag} is {brief(shown, wanted)} instead of {brief(wanted, shown)}")
    return lines


def brief(points: Sequence[tuple[int, Any]], others: Sequence[tuple[int, Any]]) -> list[Any]:
    """Return the steps of some points, or the points that the others do not have if the steps are the same."""
    steps = [step for step, _ in points]
    return steps if steps != [step for step, _ in others] else [point for point in points if point not in others]


# Interrupting and continuing ------------------------------------------------------------------------------------------


class DivergenceError(AssertionError):
    """A run did not go on as it should; the text names the directory that holds its logs."""


class Workshop:
    """A directory with a base and records, where runs are made, one server's children for each thread that asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny_base(folder / "base")
        write_records(folder / "records.jsonl", RECORDS)
        self._idle: list[ForkServer] = []
        self._lock = threading.Lock()
        self._references: dict[str, tuple[Outcome, float]] = {}

    @contextmanager
    def server(self) -> Iterator[ForkServer]:
        """Lend a server; there are as many as threads that have needed one at the same time."""
        try:
            server = self._idle.pop()
        except IndexError:
            server = ForkServer()
        yield server
        self._idle.append(server)

    def environment(self) -> dict[str, str]:
        """Return the variables that every run gets."""
        return {"LIT_TUNE_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def directory(self, name: str) -> Path:
        """Make a directory for one run and its continuations."""
        made = self.folder / name
        made.mkdir()
        return made

    def reference(self, kind: str) -> tuple[Outcome, float]:
        """Return what the undisturbed run left, and the seconds that it took; made once."""
        with self._lock:
            if kind not in self._references:
                directory = self.directory(f"undisturbed {kind}")
                ended = self.attempt(kind, directory)
                if ended.codes != [0] * KINDS[kind].ranks:
                    raise DivergenceError(f"the undisturbed run failed: {directory}")
                found = outcome(newest_run(directory))
                steps = [step for step, _ in found.board["train/loss"]]
                assert steps == sorted(set(steps)) == [int(row["step"]) for row in found.curve], directory
                self._references[kind] = found, ended.seconds
            return self._references[kind]

    def attempt(
        self,
        kind: str,
        directory: Path,
        *more: str,
        blow: Blow | None = None,
        ranks: int | None = None,
        patience_s: float = 0.0,
    ) -> Ended:
        """Start the run in `directory`, or continue it if it has a checkpoint, and wait until it ends."""
        going_on = has_checkpoint(directory)
        let_second_pass(directory)
        log = fresh_log(directory)
        job = Job(
            arguments(kind, directory, *more),
            str(directory),
            environment=self.environment(),
            log=log.stem,
            ranks=ranks or KINDS[kind].ranks,
            blow=blow,
            patience_s=patience_s,
        )
        with self.server() as server:
            ended = server.run(job)
        check_log(log, going_on=going_on, code=ended.codes[0])
        return ended

    def command(self, kind: str, directory: Path) -> Command:
        """Start the run in `directory` as a real process, or continue it."""
        return Command(
            arguments(kind, directory), directory=directory, environment=self.environment(), log=fresh_log(directory)
        )

    def finish(self, kind: str, directory: Path) -> None:
        """Let the run go on to its end, and hold it against the undisturbed one."""
        ended = self.attempt(kind, directory)
        if any(ended.codes) or ended.orphans:
            raise DivergenceError(f"the last continuation ended with {ended}: {directory}")
        self.compare(kind, directory)

    def compare(self, kind: str, directory: Path) -> None:
        """Hold a run that has ended against the undisturbed one."""
        expected, _ = self.reference(kind)
        if found := differences(expected, outcome(newest_run(directory))):
            listed = "\n  ".join(found)
            raise DivergenceError(f"{kind}, in {directory}:\n  {listed}")


@cache
def workshop(folder: Path) -> Workshop:
    """Return the one workshop of a test session."""
    return Workshop(folder)


def newest_run(directory: Path) -> Path:
    """Return the run in `directory` with the highest number: one killed before its first checkpoint is begun anew."""
    runs = list((directory / "runs").glob(f"{NAME}*"))
    return max(runs, key=lambda run: int((re.findall(r"-(\d+)$", run.name) or ["1"])[0]))


def has_checkpoint(directory: Path) -> bool:
    """Tell whether there is anything to continue from."""
    return any((directory / "runs").glob("*/checkpoints/step-*.ckpt"))


def arguments(kind: str, directory: Path, *more: str) -> list[str]:
    """Return the command's words that start the run in `directory`, or continue it if it has a checkpoint."""
    going_on = ("--ckpt_path", "last") if has_checkpoint(directory) else ()
    return ["fit", *COMMON, *KINDS[kind].settings, *going_on, *more]


def fresh_log(directory: Path) -> Path:
    """Return the file for rank 0's output of the next start."""
    return directory / f"log-{len(list(directory.glob('log-*.0')))}.0"


def let_second_pass(directory: Path) -> None:
    """Wait until no file of curves has been made in this second.

    NOTE: TensorBoard reads a run's files in the order of the second that they were made in, then of the process id,
    which begins anew one day. A real process takes longer than that to import.
    """
    files = (directory / "runs").glob("*/events.out.tfevents.*")
    newest = max((int(file.name.split(".")[3]) for file in files), default=0)
    while int(time.time()) <= newest:
        time.sleep(0.02)


def check_log(log: Path, *, going_on: bool, code: int) -> None:
    """Hold what a run says against what it was asked: it must not begin anew in silence, nor find damaged files."""
    text = log.read_text(errors="replace")
    if going_on and code == 0 and not re.search(r"Going on from|is finished", text):
        raise DivergenceError(f"nothing was said about going on: {log}")
    if "Passed over" in text:
        raise DivergenceError(f"a checkpoint was damaged: {log}")
