"""Activations, in place on a block z, with blocks of scratch.

Comparisons are converted to numbers by copies: ufuncs would convert them piece by piece. clip propagates NaN and is
several times as fast as maximum with a number.
"""

from __future__ import annotations

import math

import numpy as np

from .gelu import ERFCX_CENTRE, half_erfcx


def scratch_blocks(activation: str | None) -> int:
    """Return the number of scratch blocks of an activation and its derivative."""
    return {None: 0, "relu": 1, "leaky_relu": 1}.get(activation, 3)


def activate(z: np.ndarray, activation: str, negative_slope: float, scratch: list[np.ndarray]) -> None:
    """Compute z <- activation(z)."""
    if activation == "relu" or (activation == "leaky_relu" and negative_slope == 0):
        np.clip(z, 0, math.inf, out=z)
        return
    if activation == "leaky_relu":
        other = np.multiply(z, negative_slope, out=scratch[0])
        (np.maximum if negative_slope <= 1 else np.minimum)(z, other, out=z)
        return
    # z F(z) with a symmetric distribution F is max(z, 0) - |z| (1 - F(|z|)): no overflow, no cancellation.
    size, tail, _ = _distribution(z, activation, scratch)
    tail *= size
    np.clip(z, 0, math.inf, out=z)
    z -= tail


def times_slope(
    dy: np.ndarray, z: np.ndarray, activation: str, negative_slope: float, g: np.ndarray, scratch: list[np.ndarray]
) -> None:
    """Compute g <- dy * activation'(z). Overwrites z; g may be dy."""
    if activation in ("relu", "leaky_relu"):
        # Mask bits: all ones where z > 0. Masking makes infinities 0 too. int8 is a quarter of the work.
        rises = np.less_equal(z, 0).view(np.int8)
        rises -= 1
        slope, bits = scratch[0], f"i{z.itemsize}"
        mask = slope.view(bits)
        np.copyto(mask, rises)
        if activation == "relu":
            np.bitwise_and(dy.view(bits), mask, out=g.view(bits))
            return
        one, other = np.array([1, negative_slope], z.dtype).view(bits)
        mask &= one ^ other
        mask ^= other
        np.multiply(dy, slope, out=g)
        return
    # For z > 0, F(z) + z F'(z) = 1 + h with h = |z| F'(|z|) - (1 - F(|z|)); for z < 0 it is -h.
    size, tail, density = _distribution(z, activation, scratch)
    density *= size
    density -= tail
    np.copyto(tail, z >= 0)
    sign = np.multiply(tail, 2, out=size)
    sign -= 1
    density *= sign
    density += tail
    np.multiply(dy, density, out=g)


def _distribution(z: np.ndarray, activation: str, scratch: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return |z|, 1 - F(|z|) and F'(|z|) in scratch blocks; F is the logistic (silu) or normal (gelu) distribution."""
    size, tail, density = scratch[:3]
    np.abs(z, out=size)
    np.clip(size, 0, 800, out=size)  # both are 0 there: an infinite z gets the limit
    if activation == "silu":
        np.negative(size, out=tail)
        np.exp(tail, out=tail)
        np.add(tail, 1, out=density)
        tail /= density  # exp(-|z|) / (1 + exp(-|z|))
        np.divide(tail, density, out=density)
        return size, tail, density
    first, *others = half_erfcx(20 if z.dtype == np.float64 else 10)
    np.add(size, ERFCX_CENTRE, out=tail)
    np.subtract(size, ERFCX_CENTRE, out=density)
    density /= tail
    tail[...] = first
    for coefficient in others:
        tail *= density
        tail += coefficient
    np.multiply(size, size, out=density)
    density *= -0.5
    np.exp(density, out=density)
    tail *= density
    density *= 1 / math.sqrt(2 * math.pi)
    return size, tail, density
