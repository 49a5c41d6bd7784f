"""Fixtures of the tests of the CPU backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.backends import Backend

from cupynorm import config


@pytest.fixture
def way(backend: Backend) -> str:
    """The name of the test's backend."""
    return backend.name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache of compiled code, which is empty."""
    monkeypatch.setattr(config.cache_folder, "given", str(tmp_path / "kept"))
    return tmp_path / "kept"
