"""Where the compiled loops find planes, tiles and runs.

In the loops an array is all memory from its first element on, and an offset is in elements, unsigned: with signed
offsets the compiler would have to allow for negative indices, and would not use vector instructions.

`like` is a sample of the stored type. Of `channels_last` (channels are side by side), `inplace` (y is x), `residual`
and `training` only matters whether they are None: each combination that occurs is compiled once and kept on disk.
"""

from __future__ import annotations

import numpy as np

from .numba_cache import inlined
from .numba_intrinsics import line_of, prefetch, unit_of

PARTIAL = 512  # elements summed in computing precision; these sums are added in float64
PARTIAL_CHANNELS_LAST = 64
TOGETHER = 64  # at most so many short planes
AHEAD = 4096  # elements by which prefetching is ahead of the sums, even beyond the end of a plane
NEAR = 32768  # elements; planes up to this are prefetched while the previous one is written: both fit the L2 cache


@inlined
def tile_bounds(tile, shape):
    """Return the ranges of runs and of positions in a tile, and the number of elements."""
    tiles, runs, length, tile_runs, tile_length = shape[2:7]
    if tiles == 1:
        return 0, runs, 0, length, runs * length
    along = (length + tile_length - 1) // tile_length
    r0 = tile // along * tile_runs
    l0 = tile % along * tile_length
    r1, l1 = min(r0 + tile_runs, runs), min(l0 + tile_length, length)
    return r0, r1, l0, l1, (r1 - r0) * (l1 - l0)


@inlined
def locate(item, shape):
    """Return sample, first channel and tile of an item, a tile of a block (a plane or a group of channels)."""
    channels, group, tiles = shape[:3]
    groups = (channels + group - 1) // group
    block = item // tiles
    n = block // groups
    return n, (block - n * groups) * group, item - block * tiles


@inlined
def next_unit(n, c, tile, shape):
    """Return locate of the next item without slow divisions."""
    if tile + 1 < shape[2]:
        return n, c, tile + 1
    return (n, c + shape[1], 0) if c + shape[1] < shape[0] else (n + 1, 0, 0)


@inlined
def previous_unit(n, c, tile, shape):
    if tile:
        return n, c, tile - 1
    if c:
        return n, c - shape[1], shape[2] - 1
    return n - 1, (shape[0] - 1) // shape[1] * shape[1], shape[2] - 1


@inlined
def run_start(i, n, c, r, places, runs):
    """Return the offset of a run in the i-th array."""
    return np.uint64(n * places[i, 0] + c * places[i, 1] + runs[i, r])


@inlined
def plane_coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd):
    """Return unit, m, scale and intercept of a plane: z = (x * unit - m) * scale + intercept."""
    unit, r = unit_of(mean[n, c], rstd[n, c])
    scale = r * weight[n * param_strides[0] + c * param_strides[1]]
    return (
        unit,
        mean[n, c] * unit,
        scale,
        bias[n * param_strides[2] + c * param_strides[3]] - mean_lo[n, c] * unit * scale,
    )


@inlined
def channel_coefficients(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table):
    """`plane_coefficients` of a group of channels, side by side."""
    for j in range(width):
        table[0, j], table[1, j], table[2, j], table[3, j] = plane_coefficients(
            n, c + j, weight, bias, param_strides, mean, mean_lo, rstd
        )


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
def short_plane_offsets(first, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept):
    """Set the offsets in each array, and the weights and biases, of `planes` planes from the first on."""
    n, c, _ = locate(first, shape)
    j = 0
    while j < planes:
        alike = min(planes - j, shape[0] - c)  # channels of one sample
        for i in range(len(places)):
            start = n * places[i, 0] + c * places[i, 1]
            for k in range(alike):
                offsets[i, j + k] = np.uint64(start + k * places[i, 1])
        for k in range(alike):
            scale[j + k] = weight[n * param_strides[0] + (c + k) * param_strides[1]]
            intercept[j + k] = bias[n * param_strides[2] + (c + k) * param_strides[3]]
        j += alike
        n, c = n + 1, 0
