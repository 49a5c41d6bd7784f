"""The NumPy backend.

The numerics are the kernels': mean, then centred values, then the mean of the centred values as a correction, then
their squares; float16 and bfloat16 compute in float32. Work goes through blocks of planes that stay in the cache, or
tiles of one plane where it is larger than a block; nothing of the input's size is allocated but the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .functional import Array, Saved, empty_like, math_dtype

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
) -> tuple[Array, Saved | None]:
    """The backends' contract, with all arguments checked: see cupynorm.functional."""
    y = empty_like(x, np.empty) if out is None else out
    n, c = x.shape[:2]
    spatial = math.prod(x.shape[2:])
    dtype = math_dtype(x.dtype)
    mean, rstd = np.empty((n, c), dtype), np.empty((n, c), dtype)
    if x.size and use_input_stats:
        variance = np.empty((n, c), dtype) if running_mean is not None and momentum else None
        buffers = _buffers(2, x, dtype)
        for planes, tiles in _blocks(x.shape, dtype):
            _forward_block(x, y, planes, tiles, weight, bias, mean, rstd, variance, eps, buffers)
        if variance is not None:
            assert running_mean is not None and running_var is not None
            _move(running_mean, mean, momentum)
            _move(running_var, variance * dtype.type(spatial / (spatial - 1)), momentum)
    elif not use_input_stats:
        assert running_mean is not None and running_var is not None
        mean[...] = running_mean
        with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are answers
            rstd[...] = 1 / np.sqrt(running_var.astype(dtype) + dtype.type(eps))
            buffers = _buffers(1, x, dtype)
            for planes, tiles in _blocks(x.shape, dtype) if x.size else ():
                scale, shift = _affine(rstd, weight, bias, planes)
                for tile in tiles:
                    block = _read(x, planes, tile, buffers[0])
                    block -= mean[planes].reshape(-1, 1)
                    _write(y, planes, tile, block, scale, shift)
    return y, Saved(x, mean, rstd, weight, bias, training=use_input_stats) if keep else None


def backward(dy: Array, saved: Saved, *, out: Array | None) -> tuple[Array, Array | None, Array | None]:
    """The backends' contract, with all arguments checked: see cupynorm.functional."""
    x, weight, bias = saved.x, saved.weight, saved.bias
    dx = empty_like(x, np.empty) if out is None else out
    dtype = math_dtype(x.dtype)
    n, c = x.shape[:2]
    sum_dy, sum_dy_xhat = np.zeros((n, c), dtype), np.zeros((n, c), dtype)
    if x.size:
        buffers = _buffers(3, x, dtype)
        for planes, tiles in _blocks(x.shape, dtype):
            _backward_block(x, dy, dx, planes, tiles, saved, sum_dy, sum_dy_xhat, buffers)
    dweight = dbias = None
    with np.errstate(all="ignore"):
        if weight is not None:
            dweight = sum_dy_xhat.sum(0, dtype=np.float64).astype(weight.dtype)
        if bias is not None:
            dbias = sum_dy.sum(0, dtype=np.float64).astype(bias.dtype)
    return dx, dweight, dbias


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


def _affine(
    rstd: np.ndarray, weight: Array | None, bias: Array | None, planes: Index
) -> tuple[np.ndarray, np.ndarray | None]:
    """What centred values are multiplied with, and what is then added, for each plane of a block."""
    scale = rstd[planes]
    shift = None
    if weight is not None:
        scale = scale * weight[planes[1]].astype(rstd.dtype)
    if bias is not None:
        shift = np.broadcast_to(bias[planes[1]].astype(rstd.dtype), scale.shape).reshape(-1, 1)
    return scale.reshape(-1, 1), shift


def _write(
    y: Array, planes: Index, tile: Index, centred: np.ndarray, scale: np.ndarray, shift: np.ndarray | None
) -> None:
    centred *= scale
    if shift is not None:
        centred += shift
    part = y[planes + tile]
    part[...] = centred.reshape(part.shape)


def _row_sums(block: np.ndarray) -> np.ndarray:
    return np.add.reduce(block, axis=1)  # pairwise along a contiguous axis


def _centre(block: np.ndarray) -> np.ndarray:
    """Centre the rows of a block in place; their means, in float64."""
    count = block.dtype.type(block.shape[1])
    mean = _row_sums(block) / count
    block -= mean[:, None]
    delta = _row_sums(block) / count
    block -= delta[:, None]
    return mean.astype(np.float64) + delta


def _dots(a: np.ndarray, b: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """The dot product of each row of a with that of b."""
    return _row_sums(np.multiply(a, b, out=buffer[: a.size].reshape(a.shape)))


def _forward_block(
    x: Array,
    y: Array,
    planes: Index,
    tiles: list[Index],
    weight: Array | None,
    bias: Array | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    variance: np.ndarray | None,
    eps: float,
    buffers: np.ndarray,
) -> None:
    dtype = mean.dtype
    with np.errstate(all="ignore"):
        # Tiles are merged with Chan, Golub, LeVeque 1983, eq. 2.1, about the pooled mean, in float64.
        count = 0
        pooled = squares = np.zeros(1)
        for tile in tiles:
            block = _read(x, planes, tile, buffers[0])
            size = block.shape[1]
            tile_mean, tile_squares = _centre(block), _dots(block, block, buffers[1]).astype(np.float64)
            share = size / (count + size)
            distance = tile_mean - pooled if count else np.zeros_like(tile_mean)
            pooled = pooled + distance * share if count else tile_mean
            squares = squares + tile_squares + distance * distance * (count * share)
            count += size
        shape = mean[planes].shape
        mean[planes] = pooled.reshape(shape)
        inverse = 1 / np.sqrt((squares / count).astype(dtype) + dtype.type(eps))
        rstd[planes] = inverse.reshape(shape)
        if variance is not None:
            variance[planes] = (squares / count).reshape(shape)
        scale, shift = _affine(rstd, weight, bias, planes)
        if len(tiles) == 1:  # still at hand, and centred
            _write(y, planes, tiles[0], block, scale, shift)
            return
        rounded = pooled.astype(dtype)
        delta = (pooled - rounded).astype(dtype)
        for tile in reversed(tiles):
            block = _read(x, planes, tile, buffers[0])
            block -= rounded[:, None]
            block -= delta[:, None]
            _write(y, planes, tile, block, scale, shift)


def _backward_block(
    x: Array,
    dy: Array,
    dx: Array,
    planes: Index,
    tiles: list[Index],
    saved: Saved,
    sum_dy: np.ndarray,
    sum_dy_xhat: np.ndarray,
    buffers: np.ndarray,
) -> None:
    dtype = sum_dy.dtype
    rows = sum_dy[planes].size
    mean, rstd = (v[planes].reshape(rows, 1) for v in (saved.mean, saved.rstd))
    scale, _ = _affine(saved.rstd, saved.weight, None, planes)
    sums = np.zeros((3, rows))
    with np.errstate(all="ignore"):
        count = 0
        for tile in tiles:
            g = _read(dy, planes, tile, buffers[0])
            centred = _read(x, planes, tile, buffers[1])
            centred -= mean
            sums[0] += _row_sums(g)
            sums[1] += _dots(g, centred, buffers[2])
            sums[2] += _row_sums(centred)
            count += g.shape[1]
        # The saved mean is rounded; the mean of the centred values is what it lost.
        delta = sums[2] / count if saved.training else np.zeros(rows)
        dot = (sums[1] - delta * sums[0]) * rstd[:, 0]
        sum_dy[planes] = sums[0].reshape(sum_dy[planes].shape)
        sum_dy_xhat[planes] = dot.reshape(sum_dy[planes].shape)
        mean_dy, mean_dot, delta_ = (
            (v / k).astype(dtype)[:, None] for v, k in ((sums[0], count), (dot, count), (delta, 1))
        )
        for tile in reversed(tiles):
            if len(tiles) > 1:
                g = _read(dy, planes, tile, buffers[0])
            if saved.training:
                if len(tiles) > 1:
                    centred = _read(x, planes, tile, buffers[1])
                    centred -= mean
                centred -= delta_
                centred *= rstd * mean_dot
                g -= mean_dy
                g -= centred
            _write(dx, planes, tile, g, scale, None)


def _move(running: Array, values: np.ndarray, momentum: float) -> None:
    """running <- (1 - momentum) * running + momentum * mean over the batch, in float64, in place."""
    with np.errstate(all="ignore"):
        mean = values.mean(0, dtype=np.float64)
        running[...] = (1 - momentum) * running.astype(np.float64) + momentum * mean
