"""Fixtures of the tests of the CUDA backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakegpu import control


@pytest.fixture
def fake_gpu_as_usual() -> Iterator[None]:
    """Undo a test's settings of the fake GPU."""
    yield
    control.configure(oom=0, fail=0, code=719, cluster=16)
