"""Silence what the libraries say to every user about things that lit-tune has already decided."""

from __future__ import annotations

import logging
import os
import warnings

# Each of these was seen in a run where nothing was wrong.
HARMLESS = (
    ".*LightningCLI's args parameter.*",
    ".*gradient_checkpointing(_enable)?. is deprecated.*",  # its new name needs a newer transformers than our floor
    ".*Total length of .* across ranks is zero.*",
    ".*exists and is not empty.*",
    ".*It is recommended to use .*sync_dist=True.*",  # what is logged is the same on all ranks already
    ".*No device id is provided.*",
    ".*smaller than the logging interval.*",
    ".*torch.jit.script.* is deprecated.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*You are resuming from a checkpoint that ended.*",
    ".*Found .* module.s. in eval mode.*",
)
LOUD = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "bitsandbytes",
    "transformers",
)


def quieten() -> None:
    """Turn off known harmless messages; call it after lightning is imported, which sets levels of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric.utilities.rank_zero").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.ERROR)
    for pattern in HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)
