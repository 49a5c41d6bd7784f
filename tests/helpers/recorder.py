"""A runtime that replaces the GPU's and launches nothing."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from cupynorm.cuda.device import Device
from cupynorm.cuda.plan import Step
from cupynorm.cuda.source import Module


class Recorder:
    """Record, since `clear`, the arrays made (shape and dtype), and the modules and steps that would be launched."""

    def __init__(self, device: Device):
        self._device = device
        self.clear()

    def clear(self) -> None:
        self.made: Counter[tuple[tuple[int, ...], str]] = Counter()
        self.steps: list[Step] = []
        self.modules: list[Module] = []

    def launched(self) -> set[tuple[Module, str]]:
        """Return the modules and kernels that would be launched."""
        return {(module, step.name) for module, step in zip(self.modules, self.steps, strict=True)}

    def on(self, array: Any) -> Any:
        return nullcontext()

    def device(self) -> Device:
        return self._device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.made[tuple(shape), np.dtype(dtype).name] += 1
        return np.zeros(shape, dtype)

    zeros = empty

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def prepare(self, module: Module, step: Step, arguments: bytearray) -> partial[Any]:
        self.steps.append(step)
        self.modules.append(module)
        return partial(int)
