"""The reference of the tests: the formulas in extended precision; and arrays of awkward layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np

from helpers.compare import assert_within, wide

#: Relative and absolute error allowed on results of order one, by dtype: a few roundings.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 5e-6, "float64": 1e-13}


def _planes(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Reshape (N, C) or (C,) values to broadcast over planes."""
    return wide(values).reshape(*values.shape, *(1,) * (like.ndim - 2))


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of every plane."""
    axes = tuple(range(2, x.ndim))
    return wide(x).mean(axes), wide(x).var(axes)


def activate(z: np.ndarray, activation: str | None = None, negative_slope: float = 0.01) -> np.ndarray:
    """activation(z) in extended precision; the normal distribution's Phi in float64."""
    z = wide(z)
    if activation is None:
        return z
    with np.errstate(over="ignore"):
        return {
            "relu": lambda: np.where(z <= 0, 0, z),
            "leaky_relu": lambda: np.where(z <= 0, negative_slope * z, z),
            "silu": lambda: z / (1 + np.exp(-z)),
            "gelu": lambda: z * _phi(z),
        }[activation]()


def slope(z: np.ndarray, activation: str | None = None, negative_slope: float = 0.01) -> np.ndarray:
    """activation'(z)."""
    z = wide(z)
    if activation is None:
        return np.ones_like(z)
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-z))
        return {
            "relu": lambda: np.where(z <= 0, 0, np.ones_like(z)),
            "leaky_relu": lambda: np.where(z <= 0, negative_slope, np.ones_like(z)),
            "silu": lambda: s + z * s / (1 + np.exp(z)),
            "gelu": lambda: _phi(z) + z * np.exp(-z * z / 2) / np.sqrt(8 * np.arctan(np.longdouble(1))),
        }[activation]()


def _phi(z: np.ndarray) -> np.ndarray:
    of = (-z / np.sqrt(np.longdouble(2))).astype(np.float64)
    return wide(np.fromiter(map(math.erfc, of.ravel().tolist()), np.float64, of.size).reshape(z.shape) / 2)


class Exact:
    """The results of one call, each computed once: the statistics of planes, xhat, z (before the activation), y, and
    the gradients.

    weight and bias are (C,) or (N, C); running is the mean and the variance to use in place of the planes' own.
    eps_mode and ddof are the conventions of `cupynorm.instance_norm`.
    """

    def __init__(
        self, x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None, *, eps: float = 1e-5,
        running: tuple[np.ndarray, np.ndarray] | None = None, residual: np.ndarray | None = None,
        activation: str | None = None, negative_slope: float = 0.01, eps_mode: str = "variance", ddof: float = 0,
    ):  # fmt: skip
        self.eps_mode, self.ddof = eps_mode, ddof
        self.x, self.weight, self.bias, self.eps = x, weight, bias, eps
        self.running, self.residual = running, residual
        self.epilogue = activation, negative_slope

    @cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return statistics(self.x)

    @cached_property
    def rstd(self) -> np.ndarray:
        """Broadcastable over planes."""
        var, eps = self.var, np.longdouble(self.eps)
        if self.eps_mode == "variance":
            return 1 / np.sqrt(var + eps)
        return 1 / (np.sqrt(var) + eps if self.eps_mode == "std" else np.maximum(np.sqrt(var), eps))

    @cached_property
    def var(self) -> np.ndarray:
        """The variance of planes by which they are divided, broadcastable over planes."""
        if self.running is not None:
            return _planes(self.running[1], self.x)
        count = np.longdouble(math.prod(self.x.shape[2:]))
        return _planes(self.statistics[1], self.x) * (count / (count - self.ddof))

    @cached_property
    def rstd_slope(self) -> np.ndarray:
        """count * s, where d rstd / dx = -s * rstd^2 * xhat: 0 where rstd is a constant."""
        count, std = np.longdouble(math.prod(self.x.shape[2:])), np.sqrt(self.var)
        ratio = count / (count - self.ddof)
        if self.eps_mode == "variance":
            return np.broadcast_to(ratio, std.shape)
        changes = std > (0 if self.eps_mode == "std" else self.eps)
        return np.where(changes, ratio * (1 + self.eps / np.where(changes, std, 1) * (self.eps_mode == "std")), 0)

    @cached_property
    def xhat(self) -> np.ndarray:
        mean, _ = self.statistics if self.running is None else self.running
        return (wide(self.x) - _planes(mean, self.x)) * self.rstd

    @cached_property
    def z(self) -> np.ndarray:
        z = self.xhat if self.weight is None else self.xhat * _planes(self.weight, self.x)
        z = z if self.bias is None else z + _planes(self.bias, self.x)
        return z if self.residual is None else z + wide(self.residual)

    @property
    def y(self) -> np.ndarray:
        return activate(self.z, *self.epilogue)

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """dx, dweight, dbias, dresidual; dweight and dbias are (C,) where there is no weight or bias."""
        g = wide(dy)
        if self.epilogue[0] is not None:
            g = g * slope(self.z, *self.epilogue)
        axes = tuple(range(2, self.x.ndim))

        def summed(terms: np.ndarray, parameter: np.ndarray | None) -> np.ndarray:
            return terms.sum(axes if parameter is not None and parameter.ndim == 2 else (0, *axes))

        dweight, dbias = summed(g * self.xhat, self.weight), summed(g, self.bias)
        dx = g if self.weight is None else g * _planes(self.weight, self.x)
        if self.running is None:
            of_rstd = self.xhat * (dx * self.xhat).mean(axes, keepdims=True) * self.rstd_slope
            dx = dx - dx.mean(axes, keepdims=True) - of_rstd
        return dx * self.rstd, dweight, dbias, g

    def double_backward(
        self, ddx: np.ndarray | None, ddweight: np.ndarray | None, ddbias: np.ndarray | None, dy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ddy, dx, dweight of <ddx, dx> + <ddweight, dweight> + <ddbias, dbias>; dweight is (C,) without a weight."""
        x, weight, xhat, rstd = self.x, self.weight, self.xhat, self.rstd
        axes = tuple(range(2, x.ndim))
        zero = np.zeros((), np.longdouble)
        w = zero + 1 if weight is None else _planes(weight, x)
        vg, vb = (zero if v is None else _planes(v, x) for v in (ddweight, ddbias))
        u, g = np.zeros_like(xhat) if ddx is None else wide(ddx), wide(dy)

        def mean(a: np.ndarray) -> np.ndarray:
            return a.mean(axes, keepdims=True)

        if self.running is None:
            u, g = u - mean(u), g - mean(g)
            a, c = mean(u * xhat), mean(g * xhat)
            of_u, of_g = u - xhat * a, g - xhat * c
            summands = rstd * u * of_g
            dx = vg * rstd * of_g - w * rstd**2 * (c * of_u + a * of_g + xhat * mean(u * of_g))
            ddy = w * rstd * of_u + vg * xhat + vb
        else:
            summands, dx, ddy = rstd * u * g, vg * rstd * g, w * rstd * u + vg * xhat + vb
        return ddy, dx + 0 * xhat, summands.sum(axes if weight is not None and weight.ndim == 2 else (0, *axes))

    def moved(self, running_mean: np.ndarray, running_var: np.ndarray, momentum: float) -> tuple[Any, Any]:
        """The running statistics after a training forward: unbiased plane variances, averaged over the batch."""
        mean, var = self.statistics
        size = np.prod(self.x.shape[2:])
        keep = 1 - momentum
        return (
            keep * wide(running_mean) + momentum * mean.mean(0),
            keep * wide(running_var) + momentum * (var * size / (size - 1)).mean(0),
        )


def before_activation(x: np.ndarray, *parameters: np.ndarray | None, **options: Any) -> np.ndarray:
    """z of Exact(x, *parameters, **options)."""
    return Exact(x, *parameters, **options).z


def forward(x: np.ndarray, *parameters: np.ndarray | None, **options: Any) -> np.ndarray:
    """y of Exact(x, *parameters, **options)."""
    return Exact(x, *parameters, **options).y


def backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of Exact(x, weight, **options)."""
    return Exact(x, weight, **options).backward(dy)


def double_backward(
    ddx: np.ndarray | None, ddweight: np.ndarray | None, ddbias: np.ndarray | None, dy: np.ndarray, x: np.ndarray,
    weight: np.ndarray | None = None, **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The second gradients of Exact(x, weight, **options)."""
    return Exact(x, weight, **options).double_backward(ddx, ddweight, ddbias, dy)


def moved(
    running_mean: np.ndarray, running_var: np.ndarray, x: np.ndarray, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """The running statistics after a training forward with x: Exact(x).moved."""
    return Exact(x).moved(running_mean, running_var, momentum)


def assert_close(
    actual: np.ndarray, expected: np.ndarray, dtype: object = None, *, factor: float = 1, terms: int = 1,
    what: str = "result",
) -> None:  # fmt: skip
    """Assert |actual - expected| <= factor * TOLERANCE[dtype] * (|expected| + sqrt(terms)). dtype: by default that of
    `actual`; terms: the number of terms of a sum, which may cancel."""
    tolerance = factor * TOLERANCE[np.dtype(dtype or actual.dtype).name]  # type: ignore[arg-type]
    assert actual.shape == expected.shape, what
    assert_within(actual, expected, tolerance * (np.abs(wide(expected)) + terms**0.5), what)


def assert_all_close(results: Iterable[np.ndarray], exact: Iterable[np.ndarray], x: np.ndarray) -> None:
    """Assert each result within the tolerance of x's dtype, relative to its largest element, or to 1. A result not of
    x's shape holds sums over channels, whose terms may cancel: relative to at least sqrt(terms)."""
    for number, (result, expected) in enumerate(zip(results, exact, strict=True)):
        assert result.shape == expected.shape
        least = 1 if result.shape == x.shape else (x.size / x.shape[1]) ** 0.5
        largest = max(least, np.abs(expected).max())
        assert_within(result, expected, TOLERANCE[x.dtype.name] * largest, f"result {number}")


def _memory_order(*order: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that copies a 4-D array with its axes in this order in memory."""
    return lambda a: np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


def _in_larger(*index: slice) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that copies an array into this slice of an array that is larger along the sliced axes."""

    def made(a: np.ndarray) -> np.ndarray:
        whole = (*index, *(_ALL,) * (a.ndim - len(index)))
        larger = np.full([n if i == _ALL else 3 * n + 2 for n, i in zip(a.shape, whole, strict=True)], 7, a.dtype)
        part = larger[whole][tuple(slice(n) for n in a.shape)]
        part[...] = a
        return part

    return made


_ALL = slice(None)

#: Functions that copy a 4-D array into a layout, values kept.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": np.ascontiguousarray,
    "channels_last": _memory_order(0, 2, 3, 1),
    "transposed": _memory_order(0, 1, 3, 2),
    "batch_inner": _memory_order(1, 2, 3, 0),
    "fortran": _memory_order(3, 2, 1, 0),
    "channel_slice": _in_larger(_ALL, slice(1, None, 2)),
    "batch_slice": _in_larger(slice(1, None, 3)),
    "crop": _in_larger(_ALL, _ALL, slice(2, None), slice(1, None)),
    "every_second": _in_larger(_ALL, _ALL, _ALL, slice(None, None, 2)),
    "reversed": lambda a: a[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "reversed_columns": lambda a: a[..., ::-1].copy()[..., ::-1],
    "unaligned": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}
