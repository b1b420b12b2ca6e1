"""Where lit-tune keeps what it can make again: prepared models, tokenised data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return $LIT_TUNE_CACHE, else lit-tune under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("LIT_TUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-tune"
