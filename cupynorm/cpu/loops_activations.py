"""exp, the normal distribution and the activations for the compiled loops, free of branches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .gelu import ERFCX_CENTRE, half_erfcx
from .llvm import DOUBLE, INT, INT32, Value, element_of, fused, magnitude, where


def _is_double(z: Value) -> bool:
    return element_of(z.kind) == DOUBLE


def _polynomial(coefficients: Sequence[float], t: Value) -> Value:
    """Compute p(t) by Horner's rule, coefficients highest first."""
    p = t.constant(coefficients[0])
    for coefficient in coefficients[1:]:
        p = fused(p, t, coefficient)
    return p


def _exp(x: Value) -> Value:
    """Return exp(x) for x <= 0; 0 or nearly 0 where the result would be a denormal."""
    double = _is_double(x)
    # x = k ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^k exp(r), and exp(r) by its series.
    lowest, per_ln2 = (-708.0 if double else -87.0), 1 / math.log(2)
    shifter = 1.5 * 2**52 if double else 1.5 * 2**23  # adding it rounds to an integer
    high = 0.693147180369123816490 if double else 0.693359375  # few digits: k * high is exact
    low = 1.90821492927058770002e-10 if double else -2.12194440e-4
    x = where(x <= lowest, x.constant(lowest), x)  # NaN stays
    shifted = x * per_ln2 + shifter
    k = shifted - shifter
    r = (x - k * high) - k * low
    series = _polynomial([1 / math.factorial(i) for i in range(13 if double else 7, -1, -1)], r)
    # The last bits of k + shifter are the integer k.
    integer, places, bias = (INT, 52, 1023) if double else (INT32, 23, 127)
    power = ((shifted.bits(integer) + bias) << places).bits(x.kind)
    return series * power


def _tail_and_density(size: Value, activation: str) -> tuple[Value, Value]:
    """Return 1 - F(|z|) and F'(|z|) of |z|, with the logistic or the normal distribution F."""
    if activation == "silu":
        e = _exp(-size)
        tail = e / (e + 1)
        return tail, tail / (e + 1)
    e = _exp((size * size) * -0.5)
    scaled_tail = _polynomial(half_erfcx(20 if _is_double(size) else 10), (size - ERFCX_CENTRE) / (size + ERFCX_CENTRE))
    return scaled_tail * e, e * (1 / math.sqrt(2 * math.pi))


def _size(z: Value) -> Value:
    """Return |z|, at most a bound beyond which the tail is 0."""
    size, bound = magnitude(z), 800 if _is_double(z) else 200
    return where(size > bound, size.constant(bound), size)


def activate(z: Value, activation: str | None, slope: Value) -> Value:
    """Return activation(z). slope: negative_slope."""
    if activation is None:
        return z
    if activation == "leaky_relu":
        return where(z <= 0, z * slope, z)
    positive = where(z <= 0, z.constant(0), z)
    if activation == "relu":
        return positive
    tail, _ = _tail_and_density(_size(z), activation)
    return positive - _size(z) * tail


def times_slope(g: Value, z: Value, activation: str | None, slope: Value) -> Value:
    """Return g * activation'(z)."""
    if activation is None:
        return g
    if activation in ("relu", "leaky_relu"):
        return where(z <= 0, g.constant(0) if activation == "relu" else g * slope, g)
    tail, density = _tail_and_density(_size(z), activation)
    h = density * _size(z) - tail
    return g * where(z >= 0, h + 1, -h)
