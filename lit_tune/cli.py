"""The `lit-tune` command: the first word chooses between Lightning's `fit|validate|test|predict` and our own tools.

Only this file turns faults into exit codes: 0 done, 1 a fault of ours, 2 the user's input, 3 out of memory, 4 saving
failed, 5 loss not finite, 130 SIGINT, 143 SIGTERM or the end of --time-limit. Imports are made where needed, so
that `--help` is quick.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from lit_tune import signals
from lit_tune.errors import InputError, Interrupted, NonFiniteError, OutOfMemoryError, SaveError, is_out_of_memory
from lit_tune.redact import printable

TRAINER_COMMANDS = {
    "fit": "train with LoRA or in full",
    "validate": "loss and perplexity on the held-out records",
    "test": "the same, named test",
    "predict": "let the model answer the records' prompts",
}
TOOL_COMMANDS = {
    "plan": "predict what memory a run takes, and what would make it fit",
    "data": "show what training will see of the records",
    "configs": "list the recipes",
    "env": "versions, devices and memory, for a bug report",
}
EXAMPLES = """\
  lit-tune fit --config demo.yaml
  lit-tune fit --config lora.yaml --data.path my_records.jsonl --name mine
  lit-tune fit --trainer.devices 4 --model.method fft
  lit-tune fit --config lora.yaml --ckpt_path last
  tensorboard --logdir runs"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signals.end_with_parent()
    signals.end_if_stuck(_end_stuck)
    for number in signals.SIGNALS:
        signal.signal(number, _interrupt)
    sys.exit(exit_code(lambda: run(arguments)))


def run(arguments: list[str]) -> None:
    """Run the command that the first word names."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        print(overview())
    elif command == "--version":
        print(f"lit-tune {version()}")
    elif command in TRAINER_COMMANDS:
        _train(command, rest)
    elif command in TOOL_COMMANDS:
        _tool(command, rest)
    else:
        commands = [*TRAINER_COMMANDS, *TOOL_COMMANDS]
        near = difflib.get_close_matches(command, commands, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise InputError(f"there is no command {command!r}. {hint}Commands: {', '.join(commands)}.")


def _train(command: str, rest: list[str]) -> None:
    from lit_tune import recipes  # noqa: PLC0415

    rest, found = recipes.expand(rest)
    from lit_tune.run import start  # noqa: PLC0415  # imports torch and lightning: seconds

    start(command, rest, recipe=found[-1] if found else None)


def _tool(command: str, rest: list[str]) -> None:
    module = importlib.import_module("lit_tune.plan" if command == "plan" else "lit_tune.preview")
    tool: Callable[[list[str]], None] = getattr(module, command)
    tool(rest)


def exit_code(action: Callable[[], Any]) -> int:
    """Run `action` and return the command's exit code; say what went wrong in one line on stderr."""
    try:
        action()
    except (InputError, SaveError, NonFiniteError) as error:
        return _say(str(error), error.exit_code)
    except Interrupted as stop:
        return _interrupted(stop)
    except OutOfMemoryError as error:
        return _short_of_memory(error)
    except MemoryError as error:
        return _say(f"out of host memory: {error}. {_LESS_MEMORY}", 3, on_any_rank=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return _say(f"out of memory: {str(error).splitlines()[0]} {_LESS_MEMORY}", 3, on_any_rank=True)
        raise
    return 0


def _short_of_memory(error: OutOfMemoryError) -> int:
    """Say it on the rank that it happened to; where it happens to all of them, on rank 0."""
    code = _say(str(error), error.exit_code, on_any_rank=not error.on_all_ranks)
    if error.details and (_speaks() or not error.on_all_ranks):
        print(error.details, flush=True)
    return code


def _interrupted(stop: Interrupted) -> int:
    saved = f"; saved {stop.checkpoint}; go on with --ckpt_path last" if stop.checkpoint else "; nothing was saved"
    if _speaks():
        return _say(f"{stop}{saved}", stop.exit_code)
    if stop.alone:
        signals.tell_parent(stop.exit_code - 128)
        return stop.exit_code
    return 0  # the parent, which stops too, speaks, and takes another code than 0 for a crash


_LESS_MEMORY = (
    "Lower data.micro_batch_size (and raise trainer.accumulate_grad_batches), lower data.max_length, set "
    "model.gradient_checkpointing full, or train with model.method lora."
)


def _say(text: str, code: int, *, on_any_rank: bool = False) -> int:
    """Print a fault, on rank 0 alone where every rank has the same, and return its exit code."""
    if on_any_rank or _speaks():
        print(f"lit-tune: {printable(text)}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK", "0") != "0":
        signals.let_parent_end()
    return code


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("RANK", "0") == "0"


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """End at once where no optimizer step is under way; during training `GracefulStop` takes over."""
    signals.heard.set()
    for each in signals.SIGNALS:  # a second one, such as another rank's, must not undo the first
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number, checkpoint=None, alone=True)


def _end_stuck(number: int) -> None:
    os._exit(_say(f"stopped by {signal.Signals(number).name} while waiting for another rank", 128 + number))


def version() -> str:
    """Return the installed version."""
    from importlib.metadata import version as installed  # noqa: PLC0415

    return installed("lit-tune")


def overview() -> str:
    """Return the text of `lit-tune --help`."""
    commands = {**TRAINER_COMMANDS, **TOOL_COMMANDS}
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    return (
        "Fine-tune LLaMA-family models on instructions, with LoRA or in full.\n\n"
        f"usage: lit-tune COMMAND [--config RECIPE] [--SETTING VALUE ...]\n\nCommands:\n{listed}\n\n"
        f"Examples:\n{EXAMPLES}\n\n"
        "`lit-tune COMMAND --help` lists a command's settings; `lit-tune fit --print_config` prints them as YAML."
    )


if __name__ == "__main__":
    main()
