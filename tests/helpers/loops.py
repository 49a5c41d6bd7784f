"""The modules of the compiled loops; without llvmlite, stand-ins that tests can patch all the same."""

from __future__ import annotations

import importlib
from typing import Any
from unittest.mock import MagicMock

from cupynorm import cpu


class _Absent:
    def __getattr__(self, name: str) -> MagicMock:
        return MagicMock()


def _module(name: str) -> Any:
    return _Absent() if cpu.llvmlite is None else importlib.import_module(f"cupynorm.cpu.{name}")


llvm = _module("llvm")
llvm_machine = _module("llvm_machine")
loops_activations = _module("loops_activations")
loops_backward = _module("loops_backward")
loops_forward = _module("loops_forward")
loops_moves = _module("loops_moves")
loops_path = _module("loops_path")
loops_places = _module("loops_places")
loops_rehearsal = _module("loops_rehearsal")
loops_short = _module("loops_short")
loops_tasks = _module("loops_tasks")
windows = _module("windows")
