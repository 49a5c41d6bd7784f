"""Gradients of a forward whose result has another dtype than its input.

All arrays are converted to the dtype in which the forward was computed, and gradients back: an access more for each
array, but no kernels for pairs of dtypes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from ._checks import device_of
from ._types import Array, DoubleGradients, ForwardCall, Gradients, Saved, array_module, math_dtype
from .backend import Backend


def converted(array: Array, dtype: np.dtype, backend: Backend, out: Array | None = None) -> Array:
    """Return an array in another dtype, in out if it is given.

    It is normalised with mean 0 and variance 1, which changes no value: CuPy itself does not convert bfloat16.
    """
    if out is None and array.dtype == dtype:
        return array
    planes = array if array.ndim > 2 else array.reshape(1, -1, 1)
    with device_of(array) or nullcontext():
        xp = array_module(array)
        zero, one = (xp.full(planes.shape[1], value, math_dtype(dtype, array.dtype)) for value in (0, 1))
    call = ForwardCall(planes, None, None, zero, one, use_input_stats=False, eps=0.0, out=out, save=False, dtype=dtype)
    result = backend.normalize(call)
    result.commit()
    return result.y.reshape(array.shape) if array.ndim < 3 else result.y


class OneDtype:
    """The state of a forward, with all arrays in the dtype in which it was computed."""

    def __init__(self, given: Saved, backend: Backend):
        self.given, self.backend, self.dtype = given, backend, given.rstd.dtype
        x, weight, bias, residual = map(self.wide, (given.x, given.weight, given.bias, given.residual))
        self.saved = replace(given, dtype=None, x=x, weight=weight, bias=bias, residual=residual)

    def wide(self, array: Array | None) -> Array | None:
        """Convert an array to this dtype."""
        return None if array is None else converted(array, self.dtype, self.backend)

    def narrow(self, gradient: Array | None, like: Array | None, out: Array | None = None) -> Array | None:
        """Convert a gradient to the dtype of what it is the gradient of."""
        return None if gradient is None or like is None else converted(gradient, like.dtype, self.backend, out)

    def gradients(self, found: Gradients, dy: Array, out: Array | None) -> Gradients:
        """Return gradients as the forward's arguments have them."""
        given = self.given
        dresidual = dy if given.activation is None else self.narrow(found.dresidual, dy)
        return Gradients(
            self.narrow(found.dx, given.x, out), self.narrow(found.dweight, given.weight),
            self.narrow(found.dbias, given.bias), dresidual if given.with_residual else None,
        )  # fmt: skip

    def double_gradients(self, found: DoubleGradients, dy: Array) -> DoubleGradients:
        narrow, given = self.narrow, self.given
        return DoubleGradients(narrow(found.ddy, dy), narrow(found.dx, given.x), narrow(found.dweight, given.weight))
