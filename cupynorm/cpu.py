"""The NumPy backend.

The numerics are the kernels': mean, then centred values, then the mean of the centred values as a correction, then
their squares; float16 and bfloat16 compute in float32. Work goes through blocks of planes that stay in the cache, or
tiles of one plane where it is larger than a block, residual and activation included; nothing of the input's size is
allocated but results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from .functional import Array, Saved, empty_like, math_dtype, overlap, rectifier_slope

BLOCK_BYTES = 256 * 1024  # of one array in computing precision: a block of x, dy and scratch stays in a core's L2

Index = tuple[Any, ...]


def forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    *,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    out: Array | None,
    keep: bool,
    activation: str | None,
    negative_slope: float,
    residual: Array | None,
) -> tuple[Array, Saved | None]:
    """The backends' contract, with all arguments checked: see cupynorm.functional."""
    y = empty_like(x, np.empty) if out is None else out
    n, c = x.shape[:2]
    spatial = math.prod(x.shape[2:])
    dtype = math_dtype(x.dtype)
    mean, rstd = np.empty((n, c), dtype), np.empty((n, c), dtype)
    delta = np.zeros((n, c), dtype) if use_input_stats and activation is not None else None
    call = Saved(
        x, mean, rstd, weight, bias, use_input_stats, delta, activation, negative_slope, residual, residual is not None
    )
    if x.size and use_input_stats:
        variance = np.empty((n, c), dtype) if running_mean is not None and momentum else None
        buffers = _buffers(1 + max(_scratch(activation), 1), x, dtype)
        for planes, tiles in _blocks(x.shape, dtype):
            _forward_block(call, y, planes, tiles, variance, eps, buffers)
        if variance is not None:
            assert running_mean is not None and running_var is not None
            _move(running_mean, mean if delta is None else mean + delta, momentum)
            _move(running_var, variance * dtype.type(spatial / (spatial - 1)), momentum)
    elif not use_input_stats:
        assert running_mean is not None and running_var is not None
        mean[...] = running_mean
        with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are answers
            rstd[...] = 1 / np.sqrt(running_var.astype(dtype) + dtype.type(eps))
            buffers = _buffers(1 + _scratch(activation), x, dtype)
            for planes, tiles in _blocks(x.shape, dtype) if x.size else ():
                affine = _affine(call, planes)
                for tile in tiles:
                    centred = _read_centred(call, planes, tile, buffers[0])
                    _finish(call, y, planes, tile, centred, affine, buffers[1:])
    if not keep:
        return y, None
    return y, call if activation is not None else replace(call, residual=None)


def backward(dy: Array, saved: Saved, *, out: Array | None) -> tuple[Array, Array | None, Array | None, Array | None]:
    """The backends' contract, with all arguments checked: see cupynorm.functional."""
    x = saved.x
    dresidual = g_out = None
    if saved.with_residual and saved.activation is None:
        dresidual = dy.copy() if out is not None and overlap(out, dy) else dy
    elif saved.with_residual:
        dresidual = g_out = empty_like(x, np.empty)
    dx = empty_like(x, np.empty) if out is None else out
    dtype = math_dtype(x.dtype)
    sum_g, sum_g_xhat = np.zeros(x.shape[:2], dtype), np.zeros(x.shape[:2], dtype)
    if x.size:
        buffers = _buffers(3 + _scratch(saved.activation), x, dtype)
        for planes, tiles in _blocks(x.shape, dtype):
            _backward_block(dy, saved, dx, g_out, planes, tiles, sum_g, sum_g_xhat, buffers)
    return dx, _gradient(sum_g_xhat, saved.weight), _gradient(sum_g, saved.bias), dresidual


def _gradient(sums: np.ndarray, parameter: Array | None) -> Array | None:
    """A parameter's gradient, in its shape and dtype, from the sums of all planes."""
    if parameter is None:
        return None
    with np.errstate(all="ignore"):
        return (sums if parameter.ndim == 2 else sums.sum(0, dtype=np.float64)).astype(parameter.dtype)


def describe(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """How a call of a shape goes through its planes."""
    blocks = [len(tiles) for _, tiles in _blocks(shape, dtype)] if math.prod(shape) else []
    if not blocks:
        return "empty, nothing is computed"
    tiles = f", each plane in {blocks[0]} tiles that are merged" if blocks[0] > 1 else ""
    return f"{len(blocks)} block(s) of planes of at most {BLOCK_BYTES} B in {dtype}{tiles}"


def _blocks(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[Index, list[Index]]]:
    """Blocks of planes, as an index of (N, C), each with the tiles of the spatial axes to go through it in."""
    n, c, *spatial = shape
    limit = BLOCK_BYTES // dtype.itemsize
    plane = math.prod(spatial)
    if plane > limit:
        tiles = list(_tiles(spatial, limit))
        for i in range(n):
            for j in range(c):
                yield (slice(i, i + 1), slice(j, j + 1)), tiles
        return
    whole: list[Index] = [(slice(None),) * len(spatial)]
    if plane * c > limit:
        step = max(limit // plane, 1)
        for i in range(n):
            for j in range(0, c, step):
                yield (slice(i, i + 1), slice(j, j + step)), whole
    else:
        step = max(limit // max(plane * c, 1), 1)
        for i in range(0, n, step):
            yield (slice(i, i + step), slice(None)), whole


def _tiles(spatial: list[int], limit: int) -> Iterator[Index]:
    """Cut a plane along its outermost axes into tiles of at most `limit` elements."""
    size, *inner = spatial
    row = math.prod(inner)
    if row > limit:
        for i in range(size):
            for rest in _tiles(inner, limit):
                yield (slice(i, i + 1), *rest)
    else:
        step = max(limit // row, 1)
        for i in range(0, size, step):
            yield (slice(i, i + step), *(slice(None) for _ in inner))


def _buffers(count: int, x: Array, dtype: np.dtype) -> np.ndarray:
    """Room for `count` blocks, reused throughout a call: fresh memory would cost more than the arithmetic."""
    return np.empty((count, min(x.size, BLOCK_BYTES // dtype.itemsize)), dtype)


def _read(x: Array, planes: Index, tile: Index, buffer: np.ndarray) -> np.ndarray:
    """A block in computing precision, one row a plane, in a buffer."""
    part = x[planes + tile]
    block = buffer[: part.size].reshape(part.shape)
    block[...] = part
    return block.reshape(part.shape[0] * part.shape[1], -1)


def _read_centred(saved: Saved, planes: Index, tile: Index, buffer: np.ndarray) -> np.ndarray:
    """(x - mean) - delta, by the statistics in saved."""
    block = _read(saved.x, planes, tile, buffer)
    block -= saved.mean[planes].reshape(-1, 1)
    if saved.delta is not None:
        block -= saved.delta[planes].reshape(-1, 1)
    return block


def _affine(saved: Saved, planes: Index) -> tuple[np.ndarray, np.ndarray | None]:
    """What centred values are multiplied with, and what is then added, for each plane of a block."""

    def of_planes(parameter: Array) -> np.ndarray:
        return parameter[planes if parameter.ndim == 2 else planes[1]].astype(saved.rstd.dtype)

    scale, shift = saved.rstd[planes], None
    if saved.weight is not None:
        scale = scale * of_planes(saved.weight)
    if saved.bias is not None:
        shift = np.broadcast_to(of_planes(saved.bias), scale.shape).reshape(-1, 1)
    return scale.reshape(-1, 1), shift


def _add_up(
    saved: Saved,
    planes: Index,
    tile: Index,
    centred: np.ndarray,
    affine: tuple[np.ndarray, np.ndarray | None],
    out: np.ndarray,
) -> np.ndarray:
    """z = centred * scale + shift + residual, into out, which may be centred: the same bits in forward and backward."""
    scale, shift = affine
    np.multiply(centred, scale, out=out)
    if shift is not None:
        out += shift
    if saved.residual is not None:
        part = saved.residual[planes + tile]
        shaped = out.reshape(part.shape)
        shaped += part
    return out


def _finish(
    saved: Saved,
    y: Array,
    planes: Index,
    tile: Index,
    centred: np.ndarray,
    affine: tuple[np.ndarray, np.ndarray | None],
    scratch: np.ndarray,
) -> None:
    """From the centred values, which are used up, to y."""
    z = _add_up(saved, planes, tile, centred, affine, centred)
    if saved.activation is not None:
        _activate(z, saved.activation, saved.negative_slope, scratch[:, : z.size])
    _write(y, planes, tile, z)


def _write(y: Array, planes: Index, tile: Index, block: np.ndarray) -> None:
    part = y[planes + tile]
    part[...] = block.reshape(part.shape)


def _row_sums(block: np.ndarray) -> np.ndarray:
    return np.add.reduce(block, axis=1)  # pairwise along a contiguous axis


def _centre(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre the rows of a block in place; their means, and what rounding had taken from these."""
    count = block.dtype.type(block.shape[1])
    mean = _row_sums(block) / count
    block -= mean[:, None]
    delta = _row_sums(block) / count
    block -= delta[:, None]
    return mean, delta


def _dots(a: np.ndarray, b: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """The dot product of each row of a with that of b."""
    return _row_sums(np.multiply(a, b, out=buffer[: a.size].reshape(a.shape)))


def _forward_block(
    call: Saved,
    y: Array,
    planes: Index,
    tiles: list[Index],
    variance: np.ndarray | None,
    eps: float,
    buffers: np.ndarray,
) -> None:
    """y of a block; its statistics go into call's."""
    dtype = call.mean.dtype
    with np.errstate(all="ignore"):
        # Tiles are merged with Chan, Golub, LeVeque 1983, eq. 2.1, about the pooled mean, in float64.
        count = 0
        pooled = squares = np.zeros(1)
        for tile in tiles:
            block = _read(call.x, planes, tile, buffers[0])
            size = block.shape[1]
            mean, delta = _centre(block)
            tile_mean, tile_squares = mean.astype(np.float64) + delta, _dots(block, block, buffers[1])
            share = size / (count + size)
            distance = tile_mean - pooled if count else np.zeros_like(tile_mean)
            pooled = pooled + distance * share if count else tile_mean
            squares = squares + tile_squares.astype(np.float64) + distance * distance * (count * share)
            count += size
        shape = call.mean[planes].shape
        inverse = 1 / np.sqrt((squares / count).astype(dtype) + dtype.type(eps))
        call.rstd[planes] = inverse.reshape(shape)
        if variance is not None:
            variance[planes] = (squares / count).reshape(shape)
        if len(tiles) > 1:
            mean = pooled.astype(dtype)
            delta = (pooled - mean).astype(dtype)
        # With an activation what centred x is kept, to find z again; else the mean as exact as can be.
        call.mean[planes] = (pooled if call.delta is None else mean).reshape(shape)
        if call.delta is not None:
            call.delta[planes] = delta.reshape(shape)
        affine = _affine(call, planes)
        if len(tiles) == 1:  # still at hand, and centred
            _finish(call, y, planes, tiles[0], block, affine, buffers[1:])
            return
        for tile in reversed(tiles):
            block = _read(call.x, planes, tile, buffers[0])
            block -= mean[:, None]
            block -= delta[:, None]
            _finish(call, y, planes, tile, block, affine, buffers[1:])


def _backward_block(
    dy: Array,
    saved: Saved,
    dx: Array,
    g_out: Array | None,
    planes: Index,
    tiles: list[Index],
    sum_g: np.ndarray,
    sum_g_xhat: np.ndarray,
    buffers: np.ndarray,
) -> None:
    dtype = sum_g.dtype
    shape = sum_g[planes].shape
    rows = sum_g[planes].size
    affine = _affine(saved, planes)
    rstd = saved.rstd[planes].reshape(rows, 1)
    sums = np.zeros((3, rows))

    def load(tile: Index, with_x: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """g, and the centred x where it is asked for or needed for g."""
        g = _read(dy, planes, tile, buffers[0])
        if not with_x and saved.activation is None:
            return g, g
        centred = _read_centred(saved, planes, tile, buffers[1])
        if saved.activation is not None:
            z = _add_up(saved, planes, tile, centred, affine, buffers[2][: g.size].reshape(g.shape))
            _times_slope(g, z, saved.activation, saved.negative_slope, buffers[3:, : g.size])
        return g, centred

    with np.errstate(all="ignore"):
        count = 0
        for tile in tiles:
            g, centred = load(tile)
            sums[0] += _row_sums(g)
            sums[1] += _dots(g, centred, buffers[2])
            sums[2] += _row_sums(centred)
            count += g.shape[1]
        # The saved mean is rounded; the mean of the centred values is what it lost.
        delta = sums[2] / count if saved.training else np.zeros(rows)
        dot = (sums[1] - delta * sums[0]) * rstd[:, 0]
        sum_g[planes] = sums[0].reshape(shape)
        sum_g_xhat[planes] = dot.reshape(shape)
        mean_g, mean_dot, delta_ = (
            (v / k).astype(dtype)[:, None] for v, k in ((sums[0], count), (dot, count), (delta, 1))
        )
        for tile in reversed(tiles):
            if len(tiles) > 1:
                g, centred = load(tile, with_x=saved.training)
            if g_out is not None:
                _write(g_out, planes, tile, g)
            if saved.training:
                centred -= delta_
                centred *= rstd * mean_dot
                g -= mean_g
                g -= centred
            g *= affine[0]
            _write(dx, planes, tile, g)


# Activations. Each works in place on a block: rows of z, and scratch rows of as many elements.


def _scratch(activation: str | None) -> int:
    """How many blocks of scratch an activation and its derivative take."""
    return {None: 0, "relu": 1, "leaky_relu": 1}.get(activation, 3)


def _activate(z: np.ndarray, activation: str, negative_slope: float, scratch: np.ndarray) -> None:
    """z <- activation(z)"""
    scratch = scratch.reshape(-1, *z.shape)
    if activation in ("relu", "leaky_relu"):
        _rectify(z, z, rectifier_slope(activation, negative_slope), scratch[0])
        return
    # z F(z) with a symmetric distribution F is max(z, 0) - |z| (1 - F(|z|)): no overflow, no cancellation.
    size, tail, _ = _distribution(z, activation, scratch)
    tail *= size
    np.maximum(z, 0, out=z)
    z -= tail


def _times_slope(g: np.ndarray, z: np.ndarray, activation: str, negative_slope: float, scratch: np.ndarray) -> None:
    """g <- g * activation'(z); z is used up."""
    scratch = scratch.reshape(-1, *z.shape)
    if activation in ("relu", "leaky_relu"):
        _rectify(g, z, rectifier_slope(activation, negative_slope), scratch[0])
        return
    # For z > 0, F(z) + z F'(z) = 1 + h with h = |z| F'(|z|) - (1 - F(|z|)); for z < 0 it is -h.
    size, tail, density = _distribution(z, activation, scratch)
    density *= size
    density -= tail
    rises = z >= 0
    sign = np.multiply(rises, 2, out=z, dtype=z.dtype)
    sign -= 1
    density *= sign
    density += rises
    g *= density


def _rectify(values: np.ndarray, z: np.ndarray, slope: float, scratch: np.ndarray) -> None:
    """values <- values * slope where z <= 0; 0 where slope is 0."""
    falls = z <= 0
    if slope:
        np.multiply(falls, slope, out=scratch, dtype=z.dtype)
        scratch += ~falls
        values *= scratch
    else:  # a product of bits: it makes 0 of infinities too, and is many times as fast as an assignment by mask
        bits = values.view(f"i{values.itemsize}")
        bits *= ~falls


def _distribution(z: np.ndarray, activation: str, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|z|, 1 - F(|z|) and F'(|z|), each in a block of scratch; F is logistic for silu and normal for gelu."""
    size, tail, density = scratch
    np.abs(z, out=size)
    np.minimum(size, 800, out=size)  # where both are 0: an infinite z has its limit
    if activation == "silu":
        np.negative(size, out=tail)
        np.exp(tail, out=tail)
        np.add(tail, 1, out=density)
        tail /= density  # exp(-|z|) / (1 + exp(-|z|))
        np.divide(tail, density, out=density)
        return size, tail, density
    first, *others = _half_erfcx(20 if z.dtype == np.float64 else 10)
    np.add(size, PIVOT, out=tail)
    np.subtract(size, PIVOT, out=density)
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


PIVOT = 4.0  # the |z| that the polynomial below is about


@cache
def _half_erfcx(degree: int) -> list[float]:
    """Coefficients, highest first, of p with 1 - Phi(z) = p((z - PIVOT) / (z + PIVOT)) exp(-z**2 / 2) for z >= 0.

    p interpolates erfc(z / sqrt(2)) exp(z**2 / 2) / 2 at Chebyshev's points, up to z = 37, where erfc ends in float64;
    the argument is that of Shepherd, Laframboise 1981. The coefficients fall so fast that powers of it do as well as
    Chebyshev's polynomials.
    """
    from numpy.polynomial import Chebyshev, Polynomial  # a light import of cupynorm does without

    count = degree + 1
    end = (37 - PIVOT) / (37 + PIVOT)
    # Row k is T_k at the points; its angles are reduced as integers, for theirs would be rounded.
    angles = np.outer(np.arange(count), 2 * np.arange(count) + 1) % (4 * count)
    cosines = np.cos(np.pi / (2 * count) * angles)
    t = (cosines[1] + 1) * (end + 1) / 2 - 1
    values = [math.erfc(z / math.sqrt(2)) * math.exp(z * z / 2) / 2 for z in PIVOT * (1 + t) / (1 - t)]
    series = cosines @ values * 2 / count
    series[0] /= 2
    return [float(c) for c in Chebyshev(series, domain=[-1, end]).convert(kind=Polynomial).coef[::-1]]


def _move(running: Array, values: np.ndarray, momentum: float) -> None:
    """running <- (1 - momentum) * running + momentum * mean over the batch, in float64, in place."""
    with np.errstate(all="ignore"):
        mean = values.mean(0, dtype=np.float64)
        running[...] = (1 - momentum) * running.astype(np.float64) + momentum * mean
