"""Where the compiled loops find planes, tiles and runs, and the loops' named tuples.

In the loops an array is all memory from its first element on, and an offset is in elements, unsigned: with signed
offsets the compiler would have to allow for negative indices, and would not use vector instructions.

Python passes plain tuples, and the loops name their fields themselves: unpacking a named tuple takes 2 microseconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .numba_cache import inlined
from .numba_intrinsics import line_of, memory, prefetch, unit_of

#: The rows of a call's tables: its arrays, in the order of blocking.Arrays, Operands and Offsets.
X, RESULT, DY, RESIDUAL, DRESIDUAL = range(5)

PARTIAL = 512  # elements summed in computing precision; these sums are added in float64
PARTIAL_CHANNELS_LAST = 64
TOGETHER = 64  # at most so many short planes
AHEAD = 4096  # elements by which prefetching is ahead of the sums, even beyond the end of a plane
NEAR = 32768  # elements; planes up to this are prefetched while the previous one is written: both fit the L2 cache


class Geometry(NamedTuple):
    """How planes are cut. A block is a plane, or a group of channels side by side; a run is contiguous."""

    channels: int
    group: int  # channels per block
    tiles: int  # per block
    runs: int  # per plane
    length: int  # elements of a run
    tile_runs: int  # the same two for a tile; the last tiles may be smaller
    tile_length: int
    streams: int  # 1 if results bypass the caches
    plane: int  # elements of a plane
    sums: int  # where the partial sums of a tile begin, if planes are copied to windows; else 0


class Operands(NamedTuple):
    """A call's arrays, each as all memory from its first element on. An absent one is x, and not accessed."""

    like: Any  # a sample of the stored type: float16 is stored as int16, bfloat16 as uint16
    x: Any
    result: Any  # y or dx
    dy: Any
    residual: Any
    dresidual: Any
    strides: Any  # of each array over samples, channels and positions, shape (5, 3)
    runs: Any  # offsets of the runs within a plane of each array, shape (5, runs)


class Offsets(NamedTuple):
    """Offsets into the arrays of Operands."""

    x: Any
    result: Any
    dy: Any
    residual: Any
    dresidual: Any


class Kind(NamedTuple):
    """What a loop is compiled for: only the types of the values matter, and whether they are None."""

    inplace: Any  # None, or True if the result is x itself
    residual: Any  # None, or True
    activation: Any  # None, or a value whose type selects the activation: see numba_activations.activate
    training: Any = None  # None, or True if a backward's statistics are the input's own


class Planes(NamedTuple):
    """The numbers of each channel or plane."""

    weight: Any  # flat, as is bias
    bias: Any
    param_strides: Any  # of weight over N and C, then of bias
    mean: Any  # (N, C), as are the next two; flat where planes are short
    mean_lo: Any
    rstd: Any


class Coefficients(NamedTuple):
    """z = (x * unit - mean) * scale + intercept, without the residual; mean is in the unit."""

    unit: Any
    mean: Any
    scale: Any
    intercept: Any


@inlined
def operands_of(where, inplace):
    """Name what Python passes: (like, addresses, strides, runs, geometry)."""
    like, addresses, strides, runs, _ = where
    x = memory(addresses[X], like)
    result = x if inplace is not None else memory(addresses[RESULT], like)
    dy, residual = memory(addresses[DY], like), memory(addresses[RESIDUAL], like)
    return Operands(like, x, result, dy, residual, memory(addresses[DRESIDUAL], like), strides, runs)


@inlined
def flat_planes(planes):
    """Return Planes whose statistics are one-dimensional."""
    weight, bias, strides, mean, mean_lo, rstd = planes
    return Planes(weight, bias, strides, mean.ravel(), mean_lo.ravel(), rstd.ravel())


@inlined
def run_offsets(operands, inplace, n, c, r):
    """Return the offsets of a run."""
    strides, runs = operands.strides, operands.runs
    x = np.uint64(n * strides[X, 0] + c * strides[X, 1] + runs[X, r])
    result = np.uint64(n * strides[RESULT, 0] + c * strides[RESULT, 1] + runs[RESULT, r])
    if inplace is not None:
        result = x
    return Offsets(
        x,
        result,
        np.uint64(n * strides[DY, 0] + c * strides[DY, 1] + runs[DY, r]),
        np.uint64(n * strides[RESIDUAL, 0] + c * strides[RESIDUAL, 1] + runs[RESIDUAL, r]),
        np.uint64(n * strides[DRESIDUAL, 0] + c * strides[DRESIDUAL, 1] + runs[DRESIDUAL, r]),
    )


@inlined
def position_steps(strides):
    """Return the steps from position to position: read once, as the compiler would load them for each position."""
    return Offsets(
        np.uint64(strides[X, 2]),
        np.uint64(strides[RESULT, 2]),
        np.uint64(strides[DY, 2]),
        np.uint64(strides[RESIDUAL, 2]),
        np.uint64(strides[DRESIDUAL, 2]),
    )


@inlined
def position_offsets(base, steps, inplace, i):
    """Return the offsets of a position of channels side by side; base: those of its run."""
    x, result = base.x + i * steps.x, base.result + i * steps.result
    if inplace is not None:
        result = x
    dy, residual = base.dy + i * steps.dy, base.residual + i * steps.residual
    return Offsets(x, result, dy, residual, base.dresidual + i * steps.dresidual)


@inlined
def tile_bounds(tile, geometry):
    """Return the ranges of runs and of positions in a tile, and the number of elements."""
    runs, length = geometry.runs, geometry.length
    if geometry.tiles == 1:
        return 0, runs, 0, length, runs * length
    along = (length + geometry.tile_length - 1) // geometry.tile_length
    r0 = tile // along * geometry.tile_runs
    l0 = tile % along * geometry.tile_length
    r1, l1 = min(r0 + geometry.tile_runs, runs), min(l0 + geometry.tile_length, length)
    return r0, r1, l0, l1, (r1 - r0) * (l1 - l0)


@inlined
def locate(item, geometry):
    """Return sample, first channel and tile of an item, a tile of a block."""
    groups = (geometry.channels + geometry.group - 1) // geometry.group
    block = item // geometry.tiles
    n = block // groups
    return n, (block - n * groups) * geometry.group, item - block * geometry.tiles


@inlined
def next_item(n, c, tile, geometry):
    """Return locate of the next item without slow divisions."""
    if tile + 1 < geometry.tiles:
        return n, c, tile + 1
    return (n, c + geometry.group, 0) if c + geometry.group < geometry.channels else (n + 1, 0, 0)


@inlined
def previous_item(n, c, tile, geometry):
    if tile:
        return n, c, tile - 1
    if c:
        return n, c - geometry.group, geometry.tiles - 1
    return n - 1, (geometry.channels - 1) // geometry.group * geometry.group, geometry.tiles - 1


@inlined
def plane_coefficients(n, c, planes):
    """Return the Coefficients of a plane."""
    mean, strides = planes.mean[n, c], planes.param_strides
    unit, r = unit_of(mean, planes.rstd[n, c])
    scale = r * planes.weight[n * strides[0] + c * strides[1]]
    bias = planes.bias[n * strides[2] + c * strides[3]]
    return Coefficients(unit, mean * unit, scale, bias - planes.mean_lo[n, c] * unit * scale)


@inlined
def channel_coefficients(n, c, width, planes, table):
    """Set the Coefficients of a group of channels: each field of the table is an array."""
    for j in range(width):
        values = plane_coefficients(n, c + j, planes)
        table.unit[j], table.mean[j] = values.unit, values.mean
        table.scale[j], table.intercept[j] = values.scale, values.intercept


@inlined
def coefficients_of(table, j):
    """Return the Coefficients of a channel or plane from a table of them."""
    return Coefficients(table.unit[j], table.mean[j], table.scale[j], table.intercept[j])


@inlined
def prefetch_run(x, o, lo, hi):
    """Prefetch a part of a run: the hardware prefetcher stops at page boundaries."""
    for i in range(lo, hi, line_of(x[0])):
        prefetch(x, o + np.uint64(i))


@inlined
def planes_together(size):
    """Return the number of short planes processed together: 16 to 32 KB, which the L1 cache holds."""
    return max(4, min(TOGETHER, 4096 // np.int64(size)))


@inlined
def short_plane_offsets(first, count, geometry, strides, offsets, planes, table):
    """Set the offsets of `count` short planes from the first on, and their weights and biases in the table.

    offsets: of each array and plane, shape (5, TOGETHER).
    """
    n, c, _ = locate(first, geometry)
    of_n, of_c, bias_of_n, bias_of_c = planes.param_strides
    j = 0
    while j < count:
        alike = min(count - j, geometry.channels - c)  # channels of one sample
        for i in range(len(strides)):
            start = n * strides[i, 0] + c * strides[i, 1]
            for k in range(alike):
                offsets[i, j + k] = np.uint64(start + k * strides[i, 1])
        for k in range(alike):
            table.scale[j + k] = planes.weight[n * of_n + (c + k) * of_c]
            table.intercept[j + k] = planes.bias[n * bias_of_n + (c + k) * bias_of_c]
        j += alike
        n, c = n + 1, 0


@inlined
def offsets_of(offsets, j, inplace):
    """Return the offsets of a short plane."""
    x, result = offsets[X, j], offsets[RESULT, j]
    if inplace is not None:
        result = x
    return Offsets(x, result, offsets[DY, j], offsets[RESIDUAL, j], offsets[DRESIDUAL, j])


@inlined
def scale_short_planes(table, mean_lo, rstd):
    """Turn weights, biases and means of short planes into Coefficients, and rstd into rstd in the unit."""
    for j in range(TOGETHER):
        table.unit[j], rstd[j] = unit_of(table.mean[j], rstd[j])
        table.mean[j] *= table.unit[j]
        table.scale[j] *= rstd[j]
        table.intercept[j] -= mean_lo[j] * table.unit[j] * table.scale[j]
