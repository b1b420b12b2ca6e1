"""`memory.json`: a run's memory as it was predicted and measured, with the settings and the machine it holds for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_tune.callbacks.memory_report import StepMemory, together
from lit_tune.environment import environment
from lit_tune.errors import SaveError
from lit_tune.memory import Footprint

FILE = "memory.json"


def record(
    ranks: Sequence[StepMemory], *, predicted: Footprint | None, run: Mapping[str, float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of `memory.json`; sizes in bytes.

    Args:
        ranks: Of each rank the optimizer step with the highest peak.
        predicted: What was expected of a rank's peak.
        run: Peaks of the whole run, with what came between its steps.
        settings: Those that memory depends on.
    """
    return {
        "measured": {
            "ranks": [rank.record() for rank in ranks],
            "total": {
                "peak": sum(rank.peak for rank in ranks),
                "categories": vars(together(ranks)),
                "host_rss": sum(rank.rss for rank in ranks),
            },
            "run": dict(run),
        },
        "predicted": predicted and {"peak": predicted.total, "categories": vars(predicted)},
        "settings": dict(settings),
        "environment": environment(),
    }


def write(content: Mapping[str, Any], directory: Path) -> None:
    """Write `memory.json` to a run's directory, whole or not at all.

    Raises:
        SaveError: The disk is full, read-only or gone.
    """
    path = directory / FILE
    partial = path.with_suffix(".json.partial")
    try:
        with partial.open("w") as stream:
            stream.write(json.dumps(content, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise SaveError(f"{path}: the memory figures could not be written ({error.strerror}).") from error
