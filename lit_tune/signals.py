"""Signals where no handler gets to run, and ranks whose parent or child is gone.

Python runs a handler when the main thread comes back from C. A rank that waits there for another one (for the first
collective, up to half an hour) would never end; so a thread listens too. And the ranks that rank 0 has launched know of
its signals and its death only what they are told here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 10.0  # for a handler to run
PATIENCE_S = 15.0  # for rank 0 to end first
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHER = "LIT_TUNE_LAUNCHER"  # tells a launched rank the process id of rank 0

heard = threading.Event()  # set by every handler of ours


def is_launched() -> bool:
    """Tell whether rank 0 has started this process, not torchrun or Slurm."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def end_with_parent() -> None:
    """Have the kernel kill this process when the rank 0 that launched it is gone, however it went."""
    if not is_launched():
        os.environ[_LAUNCHER] = str(os.getpid())
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone has it
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_LAUNCHER) not in (None, str(os.getppid())):  # gone before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def end_if_stuck(end: Callable[[int], None]) -> None:
    """Call `end` with a signal's number, from a thread, if no handler has run within `GRACE_S`."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while (number := os.read(reader, 1)[0]) not in SIGNALS:
            pass
        if not heard.wait(GRACE_S):
            end(number)

    threading.Thread(target=listen, daemon=True, name="signals").start()


def tell_parent(number: int) -> None:
    """Pass a signal on to the rank 0 that launched this process, and let it end first: it has the exit code."""
    if is_launched():
        os.kill(os.getppid(), number)
        let_parent_end()


def let_parent_end() -> None:
    """Wait a moment for rank 0 to end.

    NOTE: when a launched process ends with a fault, Lightning kills its parent outright, before it has said anything.
    """
    parent, deadline = os.getppid(), time.monotonic() + PATIENCE_S
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.1)
