"""Lengths of time as people write them: `90m`, `1h30m`, `2d`, or as SLURM does, `01:30:00` and `1-12:00:00`."""

from __future__ import annotations

import re

from lit_tune.errors import InputError

_UNITS = re.compile(r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?")
_CLOCK = re.compile(r"(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>[0-5]\d):(?P<s>[0-5]\d)")
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def seconds_of(text: str, *, setting: str) -> int:
    """Return the seconds of a length of time.

    Args:
        setting: The setting that has it, for the error.

    Raises:
        InputError: It is none, or nought.
    """
    found = _CLOCK.fullmatch(text.strip()) or _UNITS.fullmatch(text.strip())
    total = sum(_SECONDS[unit] * int(number or 0) for unit, number in found.groupdict().items()) if found else 0
    if not total:
        raise InputError(f"{setting} is {text!r}; give a length of time such as 90m, 1h30m or 01:30:00.")
    return total
