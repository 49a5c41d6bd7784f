"""The modules of the compiled loops; without numba, stand-ins that tests can patch all the same."""

from __future__ import annotations

import importlib
from typing import Any
from unittest.mock import MagicMock

from cupynorm import cpu


class _Absent:
    def __getattr__(self, name: str) -> MagicMock:
        return MagicMock()


def _module(name: str) -> Any:
    return _Absent() if cpu.numba is None else importlib.import_module(f"cupynorm.cpu.{name}")


numba_backward = _module("numba_backward")
numba_cache = _module("numba_cache")
numba_forward = _module("numba_forward")
numba_geometry = _module("numba_geometry")
numba_intrinsics = _module("numba_intrinsics")
numba_moves = _module("numba_moves")
numba_path = _module("numba_path")
numba_rehearsal = _module("numba_rehearsal")
numba_tasks = _module("numba_tasks")
