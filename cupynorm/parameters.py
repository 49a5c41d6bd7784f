"""Trained parameters, and the conversion of values that are assigned to them or loaded into them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import devices
from ._checks import kind_of, place_of
from ._types import Array


class Parameter:
    """A trained array and its gradient.

    Attributes:
        data: the array. Assigning to it copies the values into it; moving the layer to another device replaces it.
        grad: None, or an array of data's shape; backward adds into it.
    """

    __slots__ = ("_data", "grad")

    def __init__(self, data: Array):
        self._data = data
        self.grad: Array | None = None

    @property
    def data(self) -> Array:
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        if value is self._data:
            return
        if isinstance(self._data, np.ndarray) or type(value) is not type(self._data):
            value = devices.to_device(numbers_of(value, "data"), place_of(self._data, "data"))
        _check_real(value.dtype, "data")
        if value.shape != self._data.shape:
            raise ValueError(f"data has shape {self._data.shape}, got {value.shape}")
        self._data[...] = value.astype(self._data.dtype, copy=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    @property
    def dtype(self) -> np.dtype:
        return self._data.dtype

    def cleargrad(self) -> None:
        """Set the gradient to None; the next backward stores a new array."""
        self.grad = None

    def zerograd(self) -> None:
        """Set the gradient to zeros: in place if there is one, so that references stay valid, else in a new array."""
        grad = self._data.copy() if self.grad is None else self.grad
        grad[...] = 0
        self.grad = grad

    def __repr__(self) -> str:
        return f"Parameter({self._data!r})"


def numbers_of(value: Any, name: str) -> np.ndarray:
    """Convert a value to a NumPy array of real numbers. No method of an unknown object is called: it is refused."""
    torch = sys.modules.get("torch")
    if not (_plain(value) or (torch is not None and isinstance(value, torch.Tensor))):
        kind_of(value, name)
    host = devices.to_host(value, name)
    _check_real(host.dtype, name)
    return host


def _check_real(dtype: np.dtype, name: str) -> None:
    if dtype.kind not in "biuf" and not dtype.name.startswith(("bfloat16", "float8_")):
        raise TypeError(f"{name} has dtype {dtype}; needed are real numbers")


def _plain(value: Any) -> bool:
    """True for a number, or numbers in (nested) lists or tuples."""
    if type(value) in (list, tuple):
        return all(map(_plain, value))
    return type(value) in (bool, int, float) or isinstance(value, np.number)
