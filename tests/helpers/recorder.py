"""A runtime that replaces the GPU's and launches nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cupynorm.cuda.device import Device
from cupynorm.cuda.numpy_runtime import NumpyRuntime
from cupynorm.cuda.plan import Step
from cupynorm.cuda.source import Module


class Recorder(NumpyRuntime):
    """Record, since `clear`, the arrays made (shape and dtype), and the modules and steps that would be launched."""

    def __init__(self, device: Device):
        super().__init__(device)
        self.clear()

    def clear(self) -> None:
        self.made: Counter[tuple[tuple[int, ...], str]] = Counter()
        self.steps: list[Step] = []
        self.modules: list[Module] = []

    def launched(self) -> set[tuple[Module, str]]:
        """Return the modules and kernels that would be launched."""
        return {(module, step.name) for module, step in zip(self.modules, self.steps, strict=True)}

    def new(self, *given: Any) -> partial[np.ndarray]:
        return partial(self._made, super().new(*given))

    def new_zeros(self, *given: Any) -> partial[np.ndarray]:
        return partial(self._made, super().new_zeros(*given))

    def _made(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        array = make()
        self.made[array.shape, array.dtype.name] += 1
        return array

    def memory(self, size: int) -> tuple[np.ndarray, int]:
        self.made[(size,), "memory"] += 1
        return super().memory(size)

    def prepare(self, kernel: tuple[Module, Step], arguments: bytes, arrays: Any) -> partial[Any]:
        module, step = kernel
        self.steps.append(step)
        self.modules.append(module)
        return partial(int)
