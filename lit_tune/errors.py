"""The faults a user can meet, each with the exit code that scripts rely on.

A fault's text is one line: the value, the place, the remedy. `cli.main` prints it without a traceback.
"""


class InputError(ValueError):
    """The user's input is wrong: a setting, a file, a record, a missing base model."""

    exit_code = 2


class SaveError(OSError):
    """A checkpoint or result could not be written; what was saved before is intact."""

    exit_code = 4


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite; the weights were not updated with it."""

    exit_code = 5


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived, the optimizer step was finished and a checkpoint saved.

    Not an `Exception`, so that no `except Exception` on the way swallows the request to stop.
    """

    def __init__(self, signal_number: int, checkpoint: str | None) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number
        self.checkpoint = checkpoint
