"""Fixtures of the tests of the CPU backend."""

from __future__ import annotations

import pytest
from helpers.backends import Backend


@pytest.fixture
def way(backend: Backend) -> str:
    """The name of the test's backend."""
    return backend.name
