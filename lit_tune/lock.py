"""One run at a time in a directory: a lock that the operating system takes back whatever ends the process."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from lit_tune.errors import InputError

FILE = ".lock"


def hold(directory: Path) -> IO[str]:
    """Take the lock of a run's directory for as long as the returned file is open.

    Raises:
        InputError: Another process has it.
    """
    try:
        stream = (directory / FILE).open("a+")
    except OSError as error:
        raise InputError(f"{directory}: a run must be able to write there ({error.strerror}).") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.seek(0)
        owner = stream.read().strip()
        stream.close()
        raise InputError(
            f"{directory}: another run is at work there ({owner or 'just starting'}); wait for its end or stop it, or "
            "start a new run with another --name."
        ) from error
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream
