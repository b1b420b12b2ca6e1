"""Which directory is the cache, by what the environment says."""

from pathlib import Path

import pytest

from lit_tune.cache import cache_directory


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_TUNE_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("LIT_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "lit-tune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "lit-tune"
