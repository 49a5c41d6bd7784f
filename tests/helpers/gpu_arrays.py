"""Stand-ins for CuPy: its arrays, and two GPUs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

#: The devices that have been made current, -1 at the end of such a context.
current: list[int] = []


class Device:
    """As cupy.cuda.Device; device 1 is the current one."""

    def __init__(self, number: int = 1):
        self.id = number

    def __enter__(self) -> None:
        current.append(self.id)

    def __exit__(self, *_: Any) -> None:
        current.append(-1)


class Array:
    """As cupy.ndarray, on device 1: no NumPy array, though `values` is one."""

    device = Device()

    def __init__(self, values: Any):
        self.values = np.array(values)
        self.dtype, self.shape, self.ndim = self.values.dtype, self.values.shape, self.values.ndim

    def astype(self, dtype: Any, copy: bool = True) -> Array:
        return Array(self.values.astype(dtype))

    def __setitem__(self, place: Any, value: Array) -> None:
        self.values[place] = value.values


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Let the stand-ins be CuPy."""
    cuda = SimpleNamespace(Device=Device, runtime=SimpleNamespace(getDeviceCount=lambda: 2))
    copies = {"asnumpy": lambda array: array.values.copy(), "asarray": Array}
    patch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Array, cuda=cuda, **copies))
