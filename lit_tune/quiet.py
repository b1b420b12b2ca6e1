"""Silence what the libraries say to every user about things that lit-tune has already decided."""

from __future__ import annotations

import logging
import os
import warnings

# Each of these was seen in a run where nothing was wrong.
HARMLESS = (
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*exists and is not empty.*",
    ".*GPU available but not used.*",
    ".*No device id is provided.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
    ".*smaller than the logging interval.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*litlogger.*",
)


def quieten() -> None:
    """Turn off known harmless messages; call it before lightning is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)
