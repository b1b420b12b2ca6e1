"""The faults a user can meet, each with the exit code that scripts rely on.

A fault's text is one line: the value, the place, the remedy. `cli.main` prints it without a traceback.
"""

import signal


class InputError(ValueError):
    """The user's input is wrong: a setting, a file, a record, a missing base model."""

    exit_code = 2


class OutOfMemoryError(MemoryError):
    """The GPU or the host has no memory left, or the run took more than it may.

    Args:
        text: The fault in one line.
        details: What is printed below it.
        on_all_ranks: All ranks end with it together.
    """

    exit_code = 3

    def __init__(self, text: str, details: str = "", *, on_all_ranks: bool = False) -> None:
        super().__init__(text)
        self.details = details
        self.on_all_ranks = on_all_ranks


class SaveError(OSError):
    """A checkpoint or result could not be written; what was saved before is intact."""

    exit_code = 4


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite; the weights were not updated with it."""

    exit_code = 5


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived, or the time was up; the optimizer step was finished and a checkpoint saved.

    Not an `Exception`, so that no `except Exception` on the way swallows the request to stop.

    Args:
        signal_number: The signal; SIGTERM where the time was up.
        checkpoint: Where the run goes on from; None if nothing was saved.
        reason: What stopped the run, if not the signal.
        alone: This rank stops without the others.
    """

    def __init__(
        self, signal_number: int, checkpoint: str | None, reason: str | None = None, *, alone: bool = False
    ) -> None:
        self.reason = reason or signal.Signals(signal_number).name
        super().__init__(f"stopped by {self.reason}")
        self.exit_code = 128 + signal_number
        self.checkpoint = checkpoint
        self.alone = alone


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a fault says that there was no memory left, on a GPU or on the host."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said.lower() or "can't allocate memory" in said)
    )
