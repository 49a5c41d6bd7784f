"""The arrays of runtimes that execute kernels without a GPU: those of the tests and of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .device import Device
from .plan import Step
from .replay import Facts
from .source import Module

ALIGNMENT = 16  # of new arrays, as on a device


class NumpyRuntime:
    """A replay.Runtime over NumPy arrays, but for `prepare`: kernels are their modules and steps.

    Args:
        device: the device that calls are planned for.
    """

    def __init__(self, device: Device):
        self._device = device

    def elsewhere(self, array: Any) -> None:
        return None

    def device(self) -> Device:
        return self._device

    def facts(self, arrays: Sequence[Any]) -> tuple[Facts | None, ...]:
        return tuple(
            None if a is None else (type(a), a.shape, a.strides, a.dtype, a.ctypes.data % 16, 0) for a in arrays
        )

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        return [0 if array is None else array.ctypes.data for array in arrays]

    def new(self, shape: tuple[int, ...], dtype: Any, size: int, strides: Any) -> partial[np.ndarray]:
        return partial(lambda: np.ndarray(shape, dtype, self.allocate(size), strides=strides))

    def new_zeros(self, shape: tuple[int, ...], dtype: Any) -> partial[np.ndarray]:
        return partial(np.zeros, shape, dtype)

    def memory(self, size: int) -> tuple[np.ndarray, int]:
        memory = self.allocate(size)
        return memory, memory.ctypes.data

    def allocate(self, size: int) -> np.ndarray:
        """Return new bytes, for an array or for `memory`. They take no memory until they are written."""
        whole = np.zeros(size + ALIGNMENT, np.uint8)
        return whole[-whole.ctypes.data % ALIGNMENT :][:size]

    def kernel(self, module: Module, step: Step) -> tuple[Module, Step]:
        return module, step
