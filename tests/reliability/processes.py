"""Runs of `lit-tune fit` as a user starts them: a real process, which launches the other ranks itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

POLL_S = 0.01


class Command:
    """A `lit-tune` command under way, in a process group of its own."""

    def __init__(self, arguments: list[str], *, directory: Path, environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lit_tune", *arguments],
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # As many threads as a fork of the server has, so that both come to the same bits.
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def ranks(self) -> list[int]:
        """Return the ids of the run's processes that live, the one that was started first."""
        # An import has `ldconfig` run for a moment: whose death would end nothing.
        return [pid for pid, command in self.members().items() if "lit_tune" in command]

    def members(self) -> dict[int, str]:
        """Return the ids and commands of all processes of the group that live, the one that was started first."""
        members = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    is_later = process.pid != self._process.pid
                    members.append((is_later, process.create_time(), process.pid, " ".join(process.cmdline())))
        return {pid: command for _, _, pid, command in sorted(members)}

    def send(self, number: int, rank: int | None) -> None:
        """Send a signal to a rank, or to all; -1 is the one that was started last, so far."""
        with suppress(ProcessLookupError, IndexError):
            if rank is None:
                os.killpg(self._process.pid, number)
            else:
                os.kill(self.ranks()[rank], number)

    def pause(self, seconds: float) -> None:
        """Let the command work for some seconds, or until it ends."""
        self.wait_until(lambda: False, timeout_s=seconds)

    def wait_until(self, holds: Callable[[], bool], *, timeout_s: float = 60.0) -> bool:
        """Wait until something holds, or until the command has ended or the time is over; return whether it holds."""
        deadline = time.monotonic() + timeout_s
        while not (held := holds()) and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return held

    def wait(self, *, timeout_s: float) -> tuple[int, list[str]]:
        """Wait for the end; return the exit code, and the processes that had to be killed after the time allowed."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if left:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait(), [f"{pid} {command}" for pid, command in left.items()]


def imports_torch(pid: int) -> bool:
    """Tell whether a process has begun to load torch: it is in the middle of its imports."""
    with suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return False
