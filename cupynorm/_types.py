"""What every part of the library shares: arrays and dtypes, and what goes into a backend and comes out of it.

This module, _checks, config, conventions, cpu_count and statistics are the floor: they import nothing of the library
but each other.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

#: A NumPy or a CuPy array.
Array = Any

#: Names of the dtypes of results.
DTYPES = ("float16", "bfloat16", "float32", "float64")

#: Names of the other dtypes that inputs may have, if the result's dtype is given.
INTEGERS = ("uint8", "int8", "uint16", "int16")

#: Names of the activations, besides None.
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu")

#: Where eps is added: see conventions.py.
EPS_MODES = ("variance", "std", "max")

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def math_dtype(dtype: Any, input: Any = None) -> np.dtype:
    """The dtype to compute in for a result's dtype, and the input's if that is another: float64 if one of them is
    float64, else float32."""
    wide = dtype == _FLOAT64 or (input is not None and input == _FLOAT64)
    return _FLOAT64 if wide else _FLOAT32


@dataclass(eq=False, slots=True)  # not frozen: that costs a microsecond a call
class Saved:
    """The state that a forward keeps for its backward.

    The backward computes z = ((x - mean) - mean_lo) * rstd * weight + bias + residual with the bits of the forward, so
    both see every kink of the activation at the same elements.

    Attributes:
        x: the array itself, not a copy, as are weight, bias and mask: do not change them before the backward.
        weight: (C,) or (N, C), or None.
        bias: (C,) or (N, C), or None.
        mask: bool, of x's shape, or None.
        statistics: (3, N, C), C-contiguous, float32; float64 for float64 input or results: mean, rstd and mean_lo. With
            running statistics (2, N, C): mean and rstd.
        mean: (N, C), as are rstd and mean_lo: views of statistics.
        rstd: the reciprocal standard deviation, 1 / sqrt(var + eps), or its counterpart for eps_mode and ddof.
        mean_lo: the low-order part of the mean, lost in its rounding. None with running statistics.
        training: True if mean and rstd are x's own or come from given moments, False if they are running statistics.
        residual: with an activation the array itself, for z; else None.
        with_residual: True if there was a residual.
        count: (N, C) int64, the number of positions that each plane has as a whole, if mean and rstd come from given
            moments; else None.
        overwritten: True if a result has been written over x or the residual, so that no backward can follow.
        activation: as given to the forward.
        negative_slope: as given to the forward.
        eps: as given to the forward.
        eps_mode: as given to the forward.
        ddof: as given to the forward.
        dtype: of y; None stands for x's.
        mixed: True if y has another dtype than x.
    """

    x: Array
    statistics: Array
    weight: Array | None
    bias: Array | None
    training: bool
    activation: str | None = None
    negative_slope: float = 0.01
    residual: Array | None = None
    with_residual: bool = False
    overwritten: bool = False  # out of the forward or of a backward was x or residual
    eps: float = 0.0  # of the forward, as are eps_mode and ddof: see conventions.py
    count: Array | None = None
    eps_mode: str = "variance"
    ddof: float = 0.0
    dtype: np.dtype | None = None
    mask: Array | None = None  # of x's shape, by strides of 0 where it is broadcast

    @property
    def mean(self) -> Array:
        return self.statistics[0]

    @property
    def rstd(self) -> Array:
        return self.statistics[1]

    @property
    def mean_lo(self) -> Array | None:
        return self.statistics[2] if len(self.statistics) == 3 else None

    @property
    def mixed(self) -> bool:
        """Whether y has another dtype than x."""
        return self.dtype is not None and self.dtype != self.x.dtype

    @property
    def usual_rstd(self) -> bool:
        """Whether rstd is 1 / sqrt(var + eps), with the biased variance."""
        return self.eps_mode == "variance" and self.ddof == 0


@dataclass(frozen=True)
class Explained:
    """The calls on an array that `cupynorm.explain` describes."""

    dtype: np.dtype  # of the results
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    alone: bool = False  # only the forward, without running statistics
    double_backward: bool = False
    parts: bool = False


@dataclass(eq=False, slots=True)
class ForwardCall:
    """The arguments of a forward, as for `cupynorm.instance_norm`."""

    x: Array
    weight: Array | None = None
    bias: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None
    use_input_stats: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str | None = None
    negative_slope: float = 0.01
    residual: Array | None = None
    out: Array | None = None
    save: bool = True  # whether the result has Saved
    moments: Any = None  # a statistics.Moments, to use in place of x's own
    eps_mode: str = "variance"
    ddof: float = 0.0
    dtype: Any = None  # of the result; None: x's
    mask: Array | None = None
    lengths: Any = None
    trace: Any = None  # of the backend, which it may keep for later calls on arrays with the same facts

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """The arrays of the call; a backend's trace of it has them in this order."""
        moments = self.moments
        return (
            self.x, self.residual, self.out, self.mask, self.weight, self.bias, self.running_mean, self.running_var,
            *(() if moments is None else (moments.count, moments.mean, moments.m2)),
        )  # fmt: skip

    @property
    def options(self) -> tuple[Any, ...] | None:
        """All of the call but its arrays; None if some of it is still to be converted (True equals 1.0, say)."""
        momentum, eps, slope, ddof = self.momentum, self.eps, self.negative_slope, self.ddof
        floats = type(momentum) is type(eps) is type(slope) is type(ddof) is float
        if not floats or type(self.use_input_stats) is not bool:
            return None
        return (
            self.save, self.use_input_stats, self.activation, self.eps_mode, self.dtype, momentum, eps, slope, ddof,
        )  # fmt: skip

    @property
    def result_dtype(self) -> np.dtype:
        return self.x.dtype if self.dtype is None else self.dtype

    @property
    def updates(self) -> bool:
        """Whether the forward updates the running statistics."""
        return self.use_input_stats and self.running_mean is not None and self.momentum != 0

    def saved(self, statistics: Array) -> Saved:
        """Return the state for the backward, with these statistics."""
        return Saved(  # by position, which takes half a microsecond less
            self.x, statistics, self.weight, self.bias, self.use_input_stats, self.activation,
            self.negative_slope, self.residual, self.residual is not None, False, self.eps,
            None if self.moments is None else self.moments.count, self.eps_mode, self.ddof,
            self.dtype, self.mask,
        )  # fmt: skip


class ForwardResult(NamedTuple):
    """The result of a backend's forward, before it is committed.

    Until commit(*writes) has returned, y may be incomplete and the running statistics are unchanged. commit updates the
    statistics and performs the writes together: all of them or none. The writes are partials of C functions.
    """

    y: Array
    saved: Saved | None
    commit: Callable[..., None]


class Gradients(NamedTuple):
    """The results of a backend's backward. dweight and dbias are None without a parameter."""

    dx: Array
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


class DoubleGradients(NamedTuple):
    """The results of a backend's double backward."""

    ddy: Array
    dx: Array
    dweight: Array | None


def commit(*writes: partial[Any]) -> None:
    """Perform prepared writes in order. If they are partials of C functions, an interrupt cannot separate them.

    Python raises KeyboardInterrupt only between steps of Python code, and there are none between the writes.
    """
    if len(writes) == 1:
        writes[0]()
    elif writes:
        deque(map(partial.__call__, writes), maxlen=0)


def array_module(array: Array) -> Any:
    """Return the module of an array: numpy or cupy."""
    return np if isinstance(array, np.ndarray) else sys.modules["cupy"]


def maker_like(x: Array, empty: Any, dtype: Any = None) -> partial[Array]:
    """Return what makes a new array by `empty(shape, dtype)`, by default of x's dtype: channels-last in memory if x is,
    else C-contiguous."""
    dtype = dtype or x.dtype
    if x.ndim < 3 or x.flags.c_contiguous or x.shape[1] == 1 or x.strides[1] != x.itemsize:
        return partial(empty, x.shape, dtype)
    return partial(_empty_channels_last, empty, (x.shape[0], *x.shape[2:], x.shape[1]), dtype)


def _empty_channels_last(empty: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    last = len(shape) - 1
    return empty(shape, dtype).transpose(0, last, *range(1, last))


def empty_like(x: Array, empty: Any, dtype: Any = None) -> Array:
    """Return what `maker_like` makes."""
    return maker_like(x, empty, dtype)()
