"""exp, the normal distribution and the activations for the compiled loops, free of branches."""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from .gelu import ERFCX_CENTRE, half_erfcx
from .numba_cache import INLINE
from .numba_intrinsics import _bits


def _polynomial(coefficients, kind):
    """Compile p(t) by Horner's rule, coefficients highest first. Nested functions: a loop would not be unrolled."""
    highest, unit = kind(coefficients[0]), kind(1)
    p = register_jitable(**INLINE)(lambda t: highest * unit)
    for coefficient in coefficients[1:]:
        p = _next_power(p, kind(coefficient))
    return p


def _next_power(p, c):
    return register_jitable(**INLINE)(lambda t: p(t) * t + c)


def _exp(x):
    """Return exp(x) for x <= 0; 0 or nearly 0 where the result would be a denormal."""
    raise NotImplementedError("compiled only")


@overload(_exp, jit_options=INLINE)
def _exp_overload(x):
    double = x == types.float64
    kind = np.float64 if double else np.float32
    # x = k ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^k exp(r), and exp(r) by its series.
    lowest, per_ln2 = kind(-708.0 if double else -87.0), kind(1 / math.log(2))
    shifter = kind(1.5 * 2**52 if double else 1.5 * 2**23)  # adding it rounds to an integer
    high = kind(0.693147180369123816490 if double else 0.693359375)  # few digits: k * high is exact
    low = kind(1.90821492927058770002e-10 if double else -2.12194440e-4)
    series = _polynomial([1 / math.factorial(k) for k in range(13 if double else 7, -1, -1)], kind)
    if double:

        def power(k):
            return _bits(np.uint64(np.int64(k) + 1023) << np.uint64(52))
    else:

        def power(k):
            return _bits(np.uint32(np.uint32(np.int32(np.int32(k) + np.int32(127))) << np.uint32(23)))

    power = register_jitable(**INLINE)(power)

    def impl(x):
        x = x if x > lowest else (lowest if x <= lowest else x)
        k = (x * per_ln2 + shifter) - shifter
        r = (x - k * high) - k * low
        return series(r) * power(k)

    return impl


def _tail_and_density(size, act):
    """Return 1 - F(|z|) and F'(|z|) of |z|, with the logistic or the normal distribution F."""
    raise NotImplementedError("compiled only")


@overload(_tail_and_density, jit_options=INLINE)
def _tail_and_density_overload(size, act):
    double = size == types.float64
    kind = np.float64 if double else np.float32
    one, half, centre, scale = kind(1), kind(-0.5), kind(ERFCX_CENTRE), kind(1 / math.sqrt(2 * math.pi))
    if isinstance(act, types.Integer):

        def logistic(size, act):
            e = _exp(-size)
            tail = e / (one + e)
            return tail, tail / (one + e)

        return logistic
    scaled_tail = _polynomial(half_erfcx(20 if double else 10), kind)

    def normal(size, act):
        e = _exp(half * (size * size))
        return scaled_tail((size - centre) / (size + centre)) * e, e * scale

    return normal


def activate(z, act):
    """Return activation(z)."""
    raise NotImplementedError("compiled only")


@overload(activate, jit_options=INLINE)
def _activate(z, act):
    kind = np.float64 if z == types.float64 else np.float32
    nothing, bound = kind(0), kind(800 if kind is np.float64 else 200)
    if isinstance(act, types.NoneType):
        return lambda z, act: z
    if isinstance(act, types.Boolean):
        return lambda z, act: nothing if z <= nothing else z
    if isinstance(act, types.Float):
        return lambda z, act: z * act if z <= nothing else z

    def smooth(z, act):
        size = abs(z)
        size = bound if size > bound else size
        tail, _ = _tail_and_density(size, act)
        return (nothing if z <= nothing else z) - size * tail

    return smooth


def times_slope(g, z, act):
    """Return g * activation'(z)."""
    raise NotImplementedError("compiled only")


@overload(times_slope, jit_options=INLINE)
def _times_slope(g, z, act):
    kind = np.float64 if z == types.float64 else np.float32
    nothing, one, bound = kind(0), kind(1), kind(800 if kind is np.float64 else 200)
    if isinstance(act, types.NoneType):
        return lambda g, z, act: g
    if isinstance(act, types.Boolean):
        return lambda g, z, act: nothing if z <= nothing else g
    if isinstance(act, types.Float):
        return lambda g, z, act: g * act if z <= nothing else g

    def smooth(g, z, act):
        size = abs(z)
        size = bound if size > bound else size
        tail, density = _tail_and_density(size, act)
        h = density * size - tail
        return g * (one + h if z >= nothing else -h)

    return smooth
