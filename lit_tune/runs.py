"""Names and directories of runs: `runs/<name>/`, with -2, -3 ... where a name exists; the newest checkpoint in them."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from lit_tune import checkpoint
from lit_tune.errors import InputError

RUNS = "runs"
LONGEST_NAME = 200  # bytes; file systems take 255, and -2, -3 ... may follow


def check_name(name: str) -> str:
    """Return a run's name if it is one plain folder name.

    Raises:
        InputError: It is empty, hidden or a path.
    """
    if not name or name.startswith(".") or not name.isprintable() or Path(name).name != name:
        raise InputError(f"--name: {name!r} is no plain folder name; use letters, digits, '-', '_' and '.'.")
    if len(name.encode()) > LONGEST_NAME:
        raise InputError(f"--name: {name[:20]!r}... has {len(name)} characters; use at most {LONGEST_NAME}.")
    return name


def runs_named(root: Path, name: str) -> list[Path]:
    """Return the run directories of `name`, name-2, name-3, ... under `root`, the newest last."""
    first = [root / name] if (root / name).is_dir() else []
    later = [
        path
        for path in root.glob(f"{glob.escape(name)}-*")
        if path.name.removeprefix(f"{name}-").isdecimal() and path.is_dir()
    ]
    return first + sorted(later, key=lambda path: int(path.name.removeprefix(f"{name}-")))


def fresh_name(root: Path, name: str) -> str:
    """Return `name` if no run has it, else the first free of name-2, name-3, ..."""
    number = 1
    while (root / (candidate := name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return candidate


def make_directory(root: Path, name: str) -> Path:
    """Make the directory of a new run and return it; of two that start at once, each gets its own.

    Raises:
        InputError: It cannot be made there.
    """
    while True:
        directory = root / fresh_name(root, name)
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            if not directory.is_dir():
                raise InputError(f"{directory}: a file stands where the run's directory should be.") from None
            continue
        except OSError as error:
            raise InputError(
                f"{directory}: the run's directory cannot be made ({error.strerror}); "
                "set trainer.default_root_dir to a place you may write to."
            ) from error
        return directory


def last_checkpoint(root: Path, name: str) -> tuple[Path, list[Path]]:
    """Return the newest intact checkpoint of the newest run of `name` that has any, and the damaged ones passed over.

    Raises:
        InputError: There is none.
    """
    damaged: list[Path] = []
    for run in reversed(runs_named(root, name)):
        for path, intact in checkpoint.newest_intact(run):
            if intact:
                return path, damaged
            damaged.append(path)
    bad = f" ({len(damaged)} damaged: {damaged[0]})" if damaged else ""
    raise InputError(f"--ckpt_path last: no run named {name} under {root} has an intact checkpoint{bad}.")


def run_of(ckpt_path: Path) -> Path:
    """Return the run directory that a checkpoint lies in; relative where it is below the working directory.

    A link is not followed where it lies in a run itself: a run writes into its own directory, wherever its checkpoints
    are kept.

    Raises:
        InputError: It lies in none, so that a run going on from it would write beside somebody else's files.
    """
    for path in (Path(os.path.abspath(ckpt_path)), ckpt_path.resolve()):
        if path.parent.name == checkpoint.DIRECTORY:
            return shown(path.parent.parent)
    raise InputError(
        f"ckpt_path: {ckpt_path} lies in no run; put it into the folder {checkpoint.DIRECTORY!r} of a run's directory, "
        f"such as {RUNS}/NAME/{checkpoint.DIRECTORY}/{ckpt_path.name}."
    )


def shown(path: Path) -> Path:
    """Return a path as people like to read it: relative where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
