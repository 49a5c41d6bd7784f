"""A runtime that replaces the GPU's and launches nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cupynorm.cuda.device import Device
from cupynorm.cuda.plan import Step
from cupynorm.cuda.replay import Facts
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

    def elsewhere(self, array: Any) -> None:
        return None

    def device(self) -> Device:
        return self._device

    def facts(self, arrays: Any) -> tuple[Facts | None, ...]:
        return tuple(
            None if a is None else (type(a), a.shape, a.strides, a.dtype, a.ctypes.data % 16, 0) for a in arrays
        )

    def addresses(self, arrays: Any) -> list[int]:
        return [0 if array is None else array.ctypes.data for array in arrays]

    def new(self, shape: tuple[int, ...], dtype: Any, size: int, strides: Any) -> partial[np.ndarray]:
        return partial(self._made, lambda: np.ndarray(shape, dtype, self._aligned(size), strides=strides))

    def new_zeros(self, shape: tuple[int, ...], dtype: Any) -> partial[np.ndarray]:
        return partial(self._made, lambda: np.zeros(shape, dtype))

    def _made(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        array = make()
        self.made[array.shape, array.dtype.name] += 1
        return array

    def memory(self, size: int) -> tuple[np.ndarray, int]:
        self.made[(size,), "memory"] += 1
        memory = self._aligned(size)
        return memory, memory.ctypes.data

    def _aligned(self, size: int) -> np.ndarray:
        whole = np.zeros(size + 16, np.uint8)
        return whole[-whole.ctypes.data % 16 :][:size]  # as on a device

    def kernel(self, module: Module, step: Step) -> tuple[Module, Step]:
        return module, step

    def prepare(self, kernel: tuple[Module, Step], arguments: bytes, arrays: Any) -> partial[Any]:
        module, step = kernel
        self.steps.append(step)
        self.modules.append(module)
        return partial(int)
