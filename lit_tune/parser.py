"""The command line's parser: no abbreviations, one-line errors with the nearest right setting, no code from YAML."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

# Classes that a configuration may name. Without an allowlist jsonargparse imports, and so runs, whatever a file names.
# Callables are left out: LambdaCallback calls a function by its dotted name.
ALLOWED_PATHS = ["lit_tune", "lightning", "torch.optim", "torch.nn", "bitsandbytes.optim"]
DENIED_PATHS = ["*", "lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function"]

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
_GOT = re.compile(r"(?:Got value|Given value type:.*\n\s*Given value):\s*(?P<value>.*)\s*$")
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<reason>.*)")
_LITERAL = re.compile(r"Literal\[([^\]]*)\]")
_TYPE = re.compile(r"<class '([^']+)'>")


def restrict_imports(*, trusted: bool = False) -> None:
    """Let configurations name classes of known packages only; `trusted` lifts that for the user's own code."""
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    if not trusted:
        set_parsing_settings(import_path_denylist=DENIED_PATHS, import_path_allowlist=ALLOWED_PATHS)


class TuneParser(LightningArgumentParser):
    """LightningCLI's parser with errors made for people."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False  # --trainer.max_epoch would be taken for --trainer.max_epochs
        super().__init__(*args, **kwargs)
        # The usage of 110 settings fills two screens before the first explanation.
        self.usage = "lit-tune COMMAND [--config RECIPE] [--SETTING VALUE ...]"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line, with the nearest right setting where one is unknown, and exit with 2."""
        parser: TuneParser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"lit-tune: {explain(message, list(parser.keys()))}\n")
        raise SystemExit(2)

    def keys(self) -> Iterator[str]:
        """Yield the full names of all settings, such as `trainer.max_epochs`."""
        for action in self._actions:
            if action.option_strings and action.dest is not argparse.SUPPRESS:
                yield action.dest


def explain(message: str, keys: list[str]) -> str:
    """Turn a message of jsonargparse into one line; `keys` are the settings to suggest from."""
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            key = ".".join(filter(None, [found.groupdict().get("group"), found["key"].lstrip("-")]))
            return f"there is no setting {key!r}.{suggestion(key, keys)} `--help` lists all."
    if found := _BAD_VALUE.search(message):
        return f"{found['key']}: {bad_value(found['rest'])}"
    return one_line(message)


def bad_value(text: str) -> str:
    """Turn what jsonargparse says of a value into the value and what would be right."""
    if refused := _CLASS.search(text):
        denied = "is not allowed" in refused["reason"]
        allowed = f"a configuration may name classes of {', '.join(ALLOWED_PATHS)}, except LambdaCallback"
        return f"{refused['path']!r} cannot be used: {allowed if denied else refused['reason']}."
    got = _GOT.search(text)
    if got is None:
        return one_line(text)
    value, wanted = got["value"].strip(), text[: got.start()]
    choices = [choice.strip(" '\"") for listed in _LITERAL.findall(wanted) for choice in listed.split(",")]
    types = [name.rsplit(".", 1)[-1] for name in dict.fromkeys(_TYPE.findall(wanted)) if name != "NoneType"]
    if choices:
        distinct = list(dict.fromkeys(choices))
        near = difflib.get_close_matches(value, distinct, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{value!r} is not valid; use one of {', '.join([*distinct, *types])}.{hint}"
    return f"{value!r} is not valid; it takes {' or '.join(types)}." if types else one_line(text)


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
