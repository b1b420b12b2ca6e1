"""The command line's parser: no abbreviations, one-line errors with the nearest right setting, no code from YAML."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lit_tune import plain_yaml
from lit_tune.errors import InputError
from lit_tune.redact import printable

# Classes that a configuration may name. Without an allowlist jsonargparse imports, and so runs, whatever a file names.
# Only the parts of lightning that a setting can take: others import or start what their arguments name.
ALLOWED_PATHS = [
    "lit_tune.callbacks",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",  # where the classes of lightning.pytorch.plugins are defined
    "torch.nn",
    "torch.optim",
    "bitsandbytes.optim",
]
# LambdaCallback calls a function by its dotted name.
DENIED_PATHS = ["*", "lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function"]

# What numbers may be where nobody else looks before they do harm; both ends are allowed.
RANGES: dict[str, tuple[float, float]] = {
    "seed_everything": (0, 2**32 - 1),  # numpy's
    "model.learning_rate": (0, math.inf),
    "model.weight_decay": (0, math.inf),
    "samples.every_n_steps": (0, math.inf),
    "samples.max_new_tokens": (1, math.inf),
    "trainer.accumulate_grad_batches": (1, math.inf),
    "trainer.check_val_every_n_epoch": (1, math.inf),
    "trainer.gradient_clip_val": (0, math.inf),
    "trainer.log_every_n_steps": (0, math.inf),
    "trainer.num_sanity_val_steps": (-1, math.inf),
}

# The ways in which jsonargparse and argparse word a setting that does not exist.
_UNKNOWN = (
    re.compile(r"unrecognized arguments: (?:--)?(?P<key>[^\s=]+)"),
    re.compile(r"[Kk]ey [\"'](?P<key>[^\"']+)[\"'] is not expected"),
    re.compile(r"No action for (?:destination )?key [\"'](?P<key>[^\"']+)[\"']"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Subcommand '[^']+' does not accept option '(?P<key>[^']+)'"),
)

# How jsonargparse words a value of the wrong type.
_BAD_VALUE = re.compile(r"[Pp]arser key [\"'](?P<key>[^\"']+)[\"']:\s*(?P<rest>.*)", re.DOTALL)
_NO_FILE = re.compile(r"Unable to load config '(?P<value>[^']*)'")
_NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']*)'")

# What else it says that is not understood at once.
_REWORDED = (
    (
        re.compile(r"argument (?:-\w/)?--(?P<key>\S+): expected (?:one|at least one) argument"),
        r"\g<key>: no value is given; write --\g<key> VALUE.",
    ),
    (re.compile(r"arguments are required: (?P<names>.+)"), r"it needs \g<names>"),
    (
        re.compile(r"Unexpected config"),
        "the configuration holds no settings; write them by name, such as `model: {method: lora}`.",
    ),
)
_DENIED = re.compile(r"Importing '(?P<path>[^']+)' is not allowed")
_GOT = re.compile(r"(?:Got value|Given value type:.*\n\s*Given value):\s*(?P<value>.*)\s*$")
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<reason>.*)")
_LITERAL = re.compile(r"Literal\[([^\]]*)\]")
_TYPE = re.compile(r"<class '([^']+)'>")

_build_yaml = get_loader("yaml")  # jsonargparse's own, which makes no dates of texts


def restrict_imports(*, trusted: bool = False) -> None:
    """Let configurations name classes of known packages only; `trusted` lifts that for the user's own code."""
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    # For every text that is read as YAML: the files that a configuration names, too.
    set_loader("yaml", lambda text: plain_yaml.load(text, _build_yaml), exceptions=(yaml.YAMLError,))
    if not trusted:
        # jsonargparse takes the base class itself where a callback's class_path is left out.
        allowed = [*ALLOWED_PATHS, "lightning.Callback", "lightning.pytorch.Callback"]
        set_parsing_settings(import_path_denylist=DENIED_PATHS, import_path_allowlist=allowed)


class TuneParser(LightningArgumentParser):
    """LightningCLI's parser with errors made for people."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False  # --trainer.max_epoch would be taken for --trainer.max_epochs
        super().__init__(*args, **kwargs)
        # The usage of 110 settings fills two screens before the first explanation.
        self.usage = "lit-tune COMMAND [--config RECIPE] [--SETTING VALUE ...]"

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]  # argparse has overloads
        try:
            settings = super().parse_args(*args, **kwargs)
        except ImportError as error:  # a class where only settings can stand
            self.error(str(error))
        command = settings.get("subcommand")
        if fault := impossible(settings[command] if command else settings):
            self.error(fault)
        return settings

    @override
    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Namespace:
        with refusals():  # such as a logger whose package is not installed
            made: Namespace = super().instantiate_classes(*args, **kwargs)
        return made

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line, with the nearest right setting where one is unknown, and exit with 2."""
        parser: TuneParser = getattr(ex, "subcommand_parser", None) or self
        line = explain(message, list(parser.keys()))
        if not self.exit_on_error:  # of a class's own settings: the parser of the run tells where
            super().error(line, ex)
        sys.stderr.write(f"lit-tune: {printable(line)}\n")
        raise SystemExit(2)

    def keys(self) -> Iterator[str]:
        """Yield the full names of all settings, such as `trainer.max_epochs`."""
        for action in self._actions:
            if action.option_strings and action.dest is not argparse.SUPPRESS:
                yield action.dest
        if not self.exit_on_error:  # the settings of a class, which stand below these
            yield from ("class_path", "init_args")


# Lightning's errors at settings that cannot be, while it makes a trainer of them.
_AT_MAKING = (MisconfigurationException, ValueError, TypeError, ImportError)


@contextmanager
def refusals(kinds: tuple[type[Exception], ...] = _AT_MAKING) -> Iterator[None]:
    """Tell what lightning says of impossible settings as the user's fault.

    Args:
        kinds: The errors that are no faults of ours: fewer while it trains.

    Raises:
        InputError: In place of lightning's own errors.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, kinds) and "Early stopping conditioned on metric" not in str(error):
            raise
        raise InputError(f"trainer: {bad_value(str(error))}") from error


def impossible(settings: Namespace) -> str | None:
    """Say what is wrong with settings that each have the right type, or None."""
    for key, value in settings.items(branches=True):
        if value is None and key in ("model", "data", "trainer", "samples", "checkpoint", "model.lora"):
            return f"{key} holds no settings; leave it out, or give some, such as {key}: {{...}}."
        if isinstance(value, float) and math.isnan(value):
            return f"{key} is not a number (nan); give one."
        least, most = RANGES.get(key, (-math.inf, math.inf))
        if isinstance(value, int | float) and not least <= value <= most:
            bounds = f"{least} or more" if most == math.inf else f"between {least} and {most}"
            return f"{key} is {value:.15g}; it must be {bounds}."
    return None


def explain(message: str, keys: list[str]) -> str:
    """Turn a message of jsonargparse into one line; `keys` are the settings to suggest from."""
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            return unknown(".".join(filter(None, [found.groupdict().get("group"), found["key"]])), keys)
    for pattern, words in _REWORDED:
        if found := pattern.search(message):
            return found.expand(words)
    if found := _BAD_VALUE.search(message):
        nested = _NESTED.search(found["rest"])
        if nested and not _CLASS.search(found["rest"]):
            return unknown(f"{found['key']}.{nested['key']}", keys)
        return f"{found['key']}: {bad_value(found['rest'])}"
    return bad_value(message)


def unknown(key: str, keys: list[str]) -> str:
    """Say that there is no such setting, and which is nearest."""
    return f"there is no setting {key!r}.{suggestion(key, keys) or ' `--help` lists all.'}"


def bad_value(text: str) -> str:
    """Turn what jsonargparse says of a value into the value and what would be right."""
    if denied := _DENIED.search(text):
        allowed = ", ".join(ALLOWED_PATHS)
        return f"{denied['path']!r} cannot be used: a configuration may name classes of {allowed}, not LambdaCallback."
    if refused := _CLASS.search(text):
        path, reason = refused["path"], refused["reason"]
        hint = near_class(path, _TYPE.findall(text)) if "has no attribute" in reason else ""
        return f"{path!r} cannot be used: {reason}{'' if reason.endswith(('.', '?')) else '.'}{hint}"
    if no_file := _NO_FILE.search(text):
        return f"{no_file['value']!r} is not valid; it takes settings by name, or a YAML file of them."
    if got := _GOT.search(text):
        return bad_type(got["value"].strip(), text[: got.start()])
    return one_line(text)


def bad_type(value: str, wanted: str) -> str:
    """Say what would be right in place of `value`, as jsonargparse's text of what is `wanted` has it."""
    choices = [choice.strip(" '\"") for listed in _LITERAL.findall(wanted) for choice in listed.split(",")]
    paths = [path for path in dict.fromkeys(_TYPE.findall(wanted)) if path != "NoneType"]
    types = [path.rsplit(".", 1)[-1] for path in paths]
    if choices:
        distinct = list(dict.fromkeys(choices))
        near = difflib.get_close_matches(value, distinct, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{value!r} is not valid; use one of {', '.join([*distinct, *types])}.{hint}"
    if types == ["str"] and not value.startswith(("[", "{")):
        return f"{value!r} is not valid; it takes text: put it in quotes."
    if types:
        return f"{value!r} is not valid; it takes {' or '.join(types)}.{near_class(value, paths)}"
    return one_line(f"{wanted} {value}")


def near_class(path: str, types: list[str]) -> str:
    """Return ` Did you mean ...?` with the class that looks most like the last part of `path`, or nothing.

    Args:
        types: Full names of the classes that are wanted; what is derived from one of them will do.
    """
    parts = [name.rpartition(".") for name in types]
    wanted = [getattr(sys.modules.get(module), name, None) for module, _, name in parts]
    names = {child.__name__ for cls in wanted if isinstance(cls, type) for child in descendants(cls)}
    near = difflib.get_close_matches(path.rsplit(".", 1)[-1], names, n=1, cutoff=0.75)
    return f" Did you mean {near[0]!r}?" if near else ""


def descendants(cls: type) -> Iterator[type]:
    """Yield the classes derived from `cls` that are known so far, at any depth."""
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        yield child
        yield from descendants(child)


def one_line(text: str) -> str:
    """Join the lines of a message."""
    return " ".join(line.strip(" -") for line in text.splitlines() if line.strip())


def suggestion(key: str, keys: list[str]) -> str:
    """Return ` Did you mean ...?` with the setting that looks most like `key`, or nothing."""
    # The last part carries the meaning: `max_epoch` is near `trainer.max_epochs`.
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(keys)}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    near = near or [by_last[part] for part in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last, n=1)]
    return f" Did you mean {near[0]!r}?" if near else ""
