"""The steps of the forward and the backward as NumPy calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from .._checks import overlap
from .._types import Array, Saved
from ..config import get_num_threads
from ..conventions import count_ratio, count_ratios, rstd_of
from . import halves
from .blocking import Index, Work, least_mean_square, merged_axes, tile_slices
from .numpy_activations import activate, scratch_blocks, times_slope
from .numpy_masks import copy_inside, counts_of, inside_of, keep_inside
from .thread_pool import TaskQueue, share

BLOCK_BYTES = 2**21  # of an array in computing precision; smaller blocks cost more in calls than they gain in cache
# At most ROW elements are summed in computing precision; sums of rows are added in float64. A gufunc releases the
# interpreter only if it has more than 500 rows.
ROW = 512
ROW_CHANNELS_LAST = 32  # the same for channels side by side, whose elements are summed one by one
MIN_CHANNELS = 24  # with fewer channels side by side NumPy's inner loops would be too short: they are copied apart
MIN_CHANNEL_TILE = 64  # at least so many channels side by side are processed together
SHORT_ROW = 128  # in planes of up to so many elements it pays to expand per-plane values to a whole block
CENTRE_RATIO = 2.0  # x is centred if |mean| / std exceeds this; below it at most 2 bits are lost
UNITS = 30  # deviations from 2**-30 to 2**30 need no unit
# Indices of the scratch blocks. In the forward, centred x uses block G. The activation has the blocks after these.
PRODUCT, G, X, V, RESULT = range(5)
INSIDE = 3  # of a mask; a double backward, which has V, has none


class Stats(NamedTuple):
    """Statistics of a block's planes, as (N, C): xhat = ((x - shift) * unit - remainder) * rstd.

    unit is a power of two near 1 / deviation (see kernels/unit.cuh), or None if it is 1 for all planes, as in nearly
    all cases. shift is None if it is 0 for all planes. remainder is the remaining mean, (mean - shift) * unit.
    """

    shift: np.ndarray | None
    unit: np.ndarray | None
    remainder: np.ndarray
    rstd: np.ndarray


class NumpyWork(Work):
    """The steps as NumPy calls. A block is an index of (N, C) and an array (planes of N, of C, positions).

    Arrays in computing precision are used in place, y and dx also for intermediate values; others are copied to
    scratch.
    """

    pays = 2**19  # elements from which on a second thread pays: waking it takes up to 50 microseconds
    buffers = 3  # scratch blocks, without the activation's

    def __init__(self, call: Saved, arrays: Any):
        """arrays: Arrays, or the DoubleArrays of a double backward."""
        self.call, self.dtype = call, call.rstd.dtype
        self.arrays = arrays._make(merged_axes(arrays))
        self.x, self.result = self.arrays.x, self.arrays.result
        self.mask = getattr(self.arrays, "mask", None)
        if self.mask is not None:
            self.buffers = INSIDE + 1
        self.threads = 1 if self.x.size < self.pays else get_num_threads()
        self.limit = BLOCK_BYTES // self.dtype.itemsize
        n, c, *spatial = self.x.shape
        strides, itemsize = self.result.strides, self.result.itemsize
        self.channels_last = c >= MIN_CHANNELS and strides[1] == itemsize and strides[-1] != itemsize
        plane = self.spatial = math.prod(spatial)
        # The dtype of values computed once per plane.
        self.plane_dtype = np.dtype(np.float64) if plane > SHORT_ROW else self.dtype
        # Half as much if plane_dtype has no more digits than dtype: then sums cancel sooner.
        self.centre_ratio = CENTRE_RATIO if self.plane_dtype != self.dtype else CENTRE_RATIO / 2
        most = self.limit if self.threads == 1 else 2 * self.limit  # as threads wait for each other between NumPy calls
        self.tile: list[Index] = [()]  # the whole plane
        every = slice(None)
        self.planes: list[Index]
        if (self.channels_last and plane * c > self.limit) or plane > self.limit:
            width = min(c, max(self.limit // plane, MIN_CHANNEL_TILE)) if self.channels_last else 1
            if plane * width > self.limit:
                self.tile = list(tile_slices(spatial, max(self.limit // width, 1)))
            parts = [slice(j, min(j + width, c)) for j in range(0, c, width)]
            self.planes, size = [(slice(i, i + 1), part) for i in range(n) for part in parts], plane
        elif self.channels_last or (plane * c <= most and n >= self.threads):
            parts = self._cut(n, plane * c, most)
            self.planes, size = [(part, every) for part in parts], plane * c
        else:
            parts = self._cut(c, plane, most, n)
            self.planes, size = [(slice(i, i + 1), part) for i in range(n) for part in parts], plane
        self.blocks, self.tiles = len(self.planes), len(self.tile)
        if self.tiles == 1:  # each thread has its own scratch, so it is no larger than needed
            self.buffer_size = size * max(part.stop - part.start for part in parts)
        else:
            self.buffer_size = max(self.limit, MIN_CHANNEL_TILE)
            self._make_partials()
        # A ufunc copies broadcast operands into its buffer, unless the buffer is shorter than a row.
        inner = c if self.channels_last else plane
        self.ufunc_buffer = 16 if inner >= 512 else 8192

    def _make_partials(self) -> None:
        self.partials = np.empty((4, self.tiles, *self.x.shape[:2]))

    def __str__(self) -> str:
        most = self.buffer_size * self.dtype.itemsize
        return f"NumPy, {self.blocks} block(s) of planes, in {self.dtype} of at most {most} B at a time"

    def _cut(self, count: int, size: int, most: int, times: int = 1) -> list[slice]:
        """Cut `count` units of `size` elements into even parts of at most `most` elements, equally many per thread."""
        parts = -(-count // (most // size))
        fair = self.threads // math.gcd(self.threads, times)
        parts = min(count, -(-parts // fair) * fair)
        borders = [count * i // parts for i in range(parts + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(borders)]

    def share(self, step: Callable[..., None], count: int) -> None:
        if self.threads == 1:
            self.work(step, iter([(0, count)]))
            return
        parts = min(count, self.threads * (1 if self.x.size < 8 * self.pays else 4))
        borders = [count * i // parts for i in range(parts + 1)]
        queue = TaskQueue(parts)

        def work(worker: int) -> None:
            self.work(step, ((borders[i], borders[i + 1]) for i in queue.tasks(worker)))

        share(work, queue, min(self.threads, parts))

    def work(self, step: Callable[..., None], ranges: Iterator[tuple[int, int]]) -> None:
        """Run step on each block or tile in the ranges, in one thread."""
        scratch = np.empty(
            (self.buffers + scratch_blocks(self.call.activation), min(self.x.size, self.buffer_size)), self.dtype
        )
        with np.errstate(all="ignore"):  # also restores the ufunc buffer size
            np.setbufsize(self.ufunc_buffer)
            for first, last in ranges:
                for i in range(first, last):
                    step(i, scratch)

    # Blocks and their sums

    def _in_buffer(self, part: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        """Return a block in scratch, shaped for a part of an array."""
        n, c = part.shape[:2]
        if self.channels_last:
            return buffer[: part.size].reshape(n, -1, c).transpose(0, 2, 1)
        return buffer[: part.size].reshape(n, c, -1)

    def _in_place(self, part: np.ndarray) -> bool:
        """True if computations can use a part of an array in place."""
        step = part.strides[1] if self.channels_last else part.strides[-1]
        return part.ndim == 3 and part.dtype == self.dtype and step == part.itemsize and part.flags.aligned

    def _read(
        self, array: np.ndarray, index: Index, buffer: np.ndarray, inside: np.ndarray | None = None, copy: bool = False
    ) -> np.ndarray:
        """Return a block, in the buffer unless it can be used in place. inside: of a mask, outside of which it is to be
        0."""
        part = array[index]
        if self._in_place(part) and inside is not None:
            return copy_inside(inside, part, self._in_buffer(part, buffer))
        if self._in_place(part) and not copy:
            return part
        block = self._in_buffer(part, buffer)
        if self.dtype == np.float32 and halves.pays_to_widen(part):
            codes = halves.codes_in(buffer, part.size)
            self._in_buffer(part, codes).reshape(part.shape)[...] = part.view(np.uint16)
            halves.widen(buffer, part.size)
        else:
            block.reshape(part.shape)[...] = part
        keep_inside(inside, block)
        return block

    def _inside(self, index: Index, scratch: np.ndarray) -> np.ndarray | None:
        return None if self.mask is None else inside_of(self.mask[index], self.channels_last, scratch[INSIDE])

    def _write(self, array: np.ndarray, index: Index, block: np.ndarray, buffer: np.ndarray) -> None:
        part = array[index]
        if self.dtype == np.float32 and halves.pays_to_narrow(block, part):
            values = block.transpose(0, 2, 1) if self.channels_last else block
            codes = halves.narrow(values.reshape(-1), buffer)
            self._move(self._in_buffer(part, codes), part.view(np.uint16))
        elif not np.may_share_memory(part, block):
            self._move(block, part)

    def _move(self, block: np.ndarray, part: np.ndarray) -> None:
        block = block.reshape(part.shape)
        if self.channels_last or abs(part.strides[1]) >= abs(part.strides[-1]):
            part[...] = block
            return
        for channel in range(part.shape[1]):  # NumPy would make the few channels its inner loop
            part[:, channel] = block[:, channel]

    def _target(self, array: np.ndarray, index: Index, buffer: np.ndarray) -> np.ndarray:
        part = array[index]
        return part if self._in_place(part) else self._in_buffer(part, buffer)

    def _sums(self, block: np.ndarray) -> np.ndarray:
        """Sum each plane. Bitwise independent of the other planes in the block and of its place."""
        n, c, size = block.shape
        if self.channels_last:
            whole = size // ROW_CHANNELS_LAST * ROW_CHANNELS_LAST
            rows = block[:, :, :whole].reshape(n, c, -1, ROW_CHANNELS_LAST)
            total = np.add.reduce(rows, axis=3).sum(2, dtype=np.float64)
            return total + np.add.reduce(block[:, :, whole:], axis=2)
        if size < 128:
            return np.einsum("ncs->nc", block)
        # A dot product has the fastest loop; rows are too short for BLAS to use its own threads.
        return self._dots(block, ones_row(self.dtype))

    def _dots(self, a: np.ndarray, b: np.ndarray, scratch: np.ndarray | None = None) -> np.ndarray:
        """Return the dot product of each plane of a with the plane of b, or with a row of ROW elements."""
        n, c, size = a.shape
        if scratch is not None and self.channels_last:
            return self._sums(np.multiply(a, b, out=self._in_buffer(a, scratch)))
        if scratch is not None and size < 128:
            return np.einsum("ncs,ncs->nc", a, b)
        if size <= ROW:
            return np.vecdot(a, b[..., :size])
        length, rows = row_lengths(size)
        whole = length * rows
        across = b[:length] if b.ndim == 1 else b[:, :, :whole].reshape(n, c, rows, length)
        total = np.vecdot(a[:, :, :whole].reshape(n, c, rows, length), across).sum(2, dtype=np.float64)
        if whole == size:
            return total
        return total + np.vecdot(a[:, :, whole:], b[: size - whole] if b.ndim == 1 else b[..., whole:])

    def _each(self, operation: np.ufunc, block: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
        """Compute out <- operation(block, values), with one value per plane."""
        if self.channels_last or block.shape[2] > SHORT_ROW:
            values = values[:, :, None]
        else:  # a ufunc would loop over each short row separately
            values = values.repeat(block.shape[2]).reshape(block.shape)
        operation(block, values, out=out)

    def _per_plane(self, parameter: Array, planes: Index) -> np.ndarray:
        return parameter[planes if parameter.ndim == 2 else planes[1]].astype(self.dtype, copy=False)

    def _weighted(self, planes: Index, rstd: np.ndarray) -> np.ndarray:
        return rstd if self.call.weight is None else rstd * self._per_plane(self.call.weight, planes)

    def _stats(self, planes: Index) -> Stats:
        """Return the statistics of a block's planes, the same in both passes.

        The shift is the mean of a plane if that is large compared with the deviation (rstd includes eps), else 0. With
        running statistics the values of a plane are unknown, and with other conventions rstd says less about its
        deviation: then the shift is always the mean.
        """
        call = self.call
        mean, rstd = call.mean[planes], call.rstd[planes]
        shift = mean
        if call.training and call.usual_rstd:  # mean**2 > ratio**2 * variance, where 1 / rstd**2 is variance + eps
            ratio = self.centre_ratio
            shift = mean * (np.hypot(mean, ratio * math.sqrt(call.eps)) * rstd > ratio * (1 - 2.0**-20))
        remainder = mean - shift
        if call.mean_lo is not None:
            remainder = np.add(remainder, call.mean_lo[planes], dtype=self.plane_dtype)
        unit = None
        least, most = np.minimum.reduce(rstd, None), np.maximum.reduce(rstd, None)
        if self.dtype == np.float32 and not (least >= 2.0**-UNITS and most <= 2.0**UNITS):
            exponent = np.frexp(rstd)[1]
            inside = (rstd >= 2.0**-UNITS) & (rstd <= 2.0**UNITS)
            # The limit by the shift keeps shift * unit finite; x is close to the mean then.
            exponent = np.minimum(np.clip(exponent, -125, 126), 124 - np.frexp(shift)[1])
            unit = np.ldexp(np.float32(1), np.where(inside, 0, exponent))
            remainder, rstd = remainder * unit, np.ldexp(rstd, np.where(inside, 0, -exponent))
        return Stats(shift if shift.any() else None, unit, remainder, rstd)

    def _moments(self, x: np.ndarray, inside: np.ndarray | None, scratch: np.ndarray) -> tuple[Any, ...]:
        """Return mean, mean_lo, variance and the number of positions of a block's planes, as (N, C).

        They follow from the sums of x - shift and of its squares, which cancel if the mean is far from the shift. The
        shift is 0 at first, then, for such planes, the mean found so far; once more for a plane so nearly constant that
        this is not the number nearest to its mean. With a mask x is 0 outside of it.
        """
        count: Any = x.shape[2]
        size: Any = count
        if inside is not None:
            count = counts_of(inside, x.shape)
            size = np.maximum(count, 1).astype(self.plane_dtype)
        total, sum_sq = self._sums(x), self._dots(x, x, scratch[PRODUCT])
        shift: Any = None
        most: Any = self.centre_ratio**2 / (1 + self.centre_ratio**2)  # the part of the squares that may cancel
        for last in (False, False, False, True):
            mean = np.divide(total, size, dtype=self.plane_dtype)
            lost = mean * total
            recentre = np.multiply(mean, total, dtype=np.float64) > most * sum_sq  # in float32 both may be 0
            if last or not recentre.any():
                break
            before = np.zeros(recentre.shape, self.dtype) if shift is None else shift
            # Squares that underflow prove nothing: then centring about the first mean is enough.
            enough = np.where(sum_sq < size * 2.0**-100, math.inf, 0.5) if shift is None else 0.5
            shift, most = (
                np.where(recentre, (before + mean).astype(self.dtype), before),
                np.where(recentre, enough, most),
            )
            if self.channels_last or 4 * np.count_nonzero(recentre) > recentre.size:
                centred = np.subtract(x, shift[:, :, None], out=self._in_buffer(x, scratch[G]))
                keep_inside(inside, centred)
                total, sum_sq = self._sums(centred), self._dots(centred, centred, scratch[PRODUCT])
            else:
                centred = (x[recentre] - shift[recentre][:, None])[None]
                if inside is not None:
                    keep_inside(np.broadcast_to(inside, x.shape)[recentre][None], centred)
                total[recentre], sum_sq[recentre] = (
                    self._sums(centred)[0],
                    self._dots(centred, centred, scratch[PRODUCT])[0],
                )
        variance = sum_sq - lost
        variance /= size
        np.maximum(variance, 0, out=variance)
        if shift is None:
            shift = np.zeros((), self.dtype)
        nearest = (shift + mean).astype(self.dtype, copy=False)
        mean_lo = (shift - nearest) + mean
        least = least_mean_square(self.call)
        if not sum_sq.max() < math.inf or (least and (sum_sq < size * least).any()):
            odd = ~((sum_sq >= size * least) & (sum_sq < math.inf)) & (count > 0)
            exact = x[odd].astype(np.float64)
            sizes = np.broadcast_to(size, odd.shape)[odd].astype(np.float64)
            mean = exact.sum(1) / sizes
            exact -= mean[:, None]
            if inside is not None:
                exact[np.broadcast_to(inside, x.shape)[odd] == 0] = 0
            more = exact.sum(1) / sizes
            exact *= exact
            nearest[odd] = mean
            mean_lo[odd] = (mean - nearest[odd]) + more
            variance = variance.astype(np.float64)
            variance[odd] = exact.sum(1) / sizes - more * more
        return nearest, mean_lo, variance, count

    def _add_up(self, index: Index, planes: Index, x: np.ndarray, out: np.ndarray, buffer: np.ndarray) -> None:
        """Compute z = (x - shift) * unit * scale + intercept + residual into out, which may be x.

        Both passes compute the same bits.
        """
        stats = self._stats(planes)
        scale = self._weighted(planes, stats.rstd)
        intercept = None
        if self.call.bias is not None:
            intercept = self._per_plane(self.call.bias, planes) - stats.remainder * scale
        elif stats.remainder.any():
            intercept = -stats.remainder * scale
        self._each(np.multiply, self._centre(stats, x, out), scale, out)
        if intercept is not None:
            self._each(np.add, out, intercept.astype(self.dtype, copy=False), out)
        if self.call.residual is not None:
            out += self._read(self.arrays.residual, index, buffer)

    # Forward

    def forward(self, variance: np.ndarray | None) -> None:
        self.variance = variance
        self.work_in_result = self.call.residual is None or not overlap(self.result, self.arrays.residual)
        self.run(self.reduce_forward, self.join_forward, self.apply_forward, self.whole_forward)

    def moments(self) -> tuple[np.ndarray, ...]:
        """Return count, mean, mean_lo and m2 of each tile, (tiles, N, C)."""
        self._make_partials()
        self.share(self.reduce_forward, self.blocks * self.tiles)
        means, means_lo, m2s, counts = self.partials
        return counts.astype(np.int64), means, means_lo, m2s

    def normalize(self) -> None:
        self.work_in_result = self.call.residual is None or not overlap(self.result, self.arrays.residual)
        self.share(self.apply_forward, self.blocks * self.tiles)

    def _index(self, item: int) -> tuple[Index, Index, int]:
        """Return the planes of an item's block, the index of its tile, and the number of the tile."""
        block, tile = divmod(item, self.tiles)
        return self.planes[block], self.planes[block] + self.tile[tile], tile

    def reduce_forward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, tile = self._index(item)
        inside = self._inside(index, scratch)
        mean, mean_lo, variance, count = self._moments(self._read(self.x, index, scratch[X], inside), inside, scratch)
        for each, value in zip(self.partials, (mean, mean_lo, variance * count, count), strict=True):
            each[(tile, *planes)] = value

    def join_forward(self, first: int, last: int) -> None:
        """Merge tiles in float64 by Chan, Golub, LeVeque 1983, eq. 2.1, with means relative to that of the first tile
        that has positions."""
        for planes in self.planes[first:last]:
            means, means_lo, m2s, counts = (each[(slice(None), *planes)] for each in self.partials)
            start = means[0]
            if self.mask is not None:
                start = np.take_along_axis(means, np.argmax(counts > 0, 0)[None], 0)[0]
            pooled, m2, count = means_lo[0], m2s[0], counts[0]
            for tile in range(1, self.tiles):
                share = counts[tile] / np.maximum(count + counts[tile], 1)
                distance = (means[tile] - start) + means_lo[tile] - pooled
                pooled = pooled + distance * share
                m2 = m2 + m2s[tile] + distance * distance * (count * share)
                count = count + counts[tile]
            mean = (start + pooled).astype(self.dtype)
            mean_lo = ((start - mean) + pooled).astype(self.dtype)
            self._store_stats(planes, mean, mean_lo, m2 / np.maximum(count, 1), count)

    def _store_stats(
        self, planes: Index, mean: np.ndarray, mean_lo: np.ndarray, variance: np.ndarray, count: Any = None
    ) -> None:
        """count: of the positions of each plane, with a mask."""
        call = self.call
        call.mean[planes], call.mean_lo[planes] = mean, mean_lo  # type: ignore[index]
        if self.variance is not None:
            self.variance[planes] = variance
        if self.mask is not None:
            call.count[planes] = count  # type: ignore[index]
            variance = variance * count_ratios(count, call.ddof)
        elif call.ddof:
            variance = variance * variance.dtype.type(count_ratio(self.spatial, call.ddof))
        call.rstd[planes] = rstd_of(variance.astype(self.plane_dtype, copy=False), call.eps, call.eps_mode)
        if variance.dtype != self.plane_dtype:  # values may be out of range of plane_dtype
            odd = ~((variance >= least_mean_square(self.call)) & (variance < np.finfo(self.plane_dtype).max))
            call.rstd[planes] = np.where(odd, rstd_of(variance, call.eps, call.eps_mode), call.rstd[planes])
        if self.mask is not None:
            call.rstd[planes] = np.where(count > 0, call.rstd[planes], 0)

    def apply_forward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, _ = self._index(item)
        inside = self._inside(index, scratch)
        self._finish(index, planes, self._read_x(index, scratch[X]), inside, scratch)

    def _read_x(self, index: Index, buffer: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
        """Return a block of x in computing precision: converted in the result's memory, if that has room for it."""
        if self.call.mixed and self.work_in_result and self._in_place(self.result[index]):
            x = self.result[index]
            if self.x.dtype.char != "e":
                x[...] = self.x[index]
                keep_inside(inside, x)
                return x
        return self._read(self.x, index, buffer, inside)

    def _finish(
        self, index: Index, planes: Index, x: np.ndarray, inside: np.ndarray | None, scratch: np.ndarray
    ) -> None:
        call = self.call
        out = (
            self._target(self.result, index, scratch[X])
            if self.work_in_result
            else self._in_buffer(self.result[index], scratch[X])
        )
        self._add_up(index, planes, x, out, scratch[PRODUCT])
        if call.activation is not None:
            activate(out, call.activation, call.negative_slope, self._in_buffers(out, scratch[self.buffers :]))
        keep_inside(inside, out)
        self._write(self.result, index, out, scratch[PRODUCT])

    def _in_tiles(self, block: int, scratch: np.ndarray, reduce: Any, join: Any, apply: Any) -> None:
        """Process a whole block; apply the steps in reverse order, as the last tile is still in the cache."""
        items = range(block * self.tiles, (block + 1) * self.tiles)
        for item in items:
            reduce(item, scratch)
        join(block, block + 1)
        for item in reversed(items):
            apply(item, scratch)

    def _in_buffers(self, block: np.ndarray, scratch: Any) -> list[np.ndarray]:
        return [self._in_buffer(block, each) for each in scratch]

    def whole_forward(self, block: int, scratch: np.ndarray) -> None:
        if self.tiles > 1:
            self._in_tiles(block, scratch, self.reduce_forward, self.join_forward, self.apply_forward)
            return
        planes, index, _ = self._index(block)
        inside = self._inside(index, scratch)
        x = self._read_x(index, scratch[X], inside)
        self._store_stats(planes, *self._moments(x, inside, scratch))
        self._finish(index, planes, x, inside, scratch)

    # Backward

    def backward(
        self, sum_g: np.ndarray, sum_g_xhat: np.ndarray, slopes: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """slopes: rstd_slope of each plane (conventions.py), or None if it is 1. counts: the positions of each plane,
        with a mask."""
        self.sum_g, self.sum_g_xhat, self.slopes, self.counts = sum_g, sum_g_xhat, slopes, counts
        self.work_in_result = not overlap(self.result, self.arrays.dy)
        self.run(self.reduce_backward, self.join_backward, self.apply_backward, self.whole_backward)

    def gradient_sums(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        self.sum_g, self.sum_g_xhat = sum_g, sum_g_xhat
        self._make_partials()
        self.sum_up(self.reduce_backward, self.join_backward)

    def input_gradient(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        self.sum_g, self.sum_g_xhat, self.slopes, self.counts = sum_g, sum_g_xhat, None, None
        self.work_in_result = not overlap(self.result, self.arrays.dy)
        self.share(self.apply_backward, self.blocks * self.tiles)

    def _load(
        self, index: Index, planes: Index, inside: np.ndarray | None, scratch: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return g (in scratch if it is not dy itself) and x, both 0 outside of a mask."""
        call = self.call
        g = dy = self._read(self.arrays.dy, index, scratch[G], inside)
        x = self._read(self.x, index, scratch[X], inside)
        if call.activation is not None:
            z, g, buffers = (
                self._in_buffer(x, scratch[PRODUCT]),
                self._in_buffer(x, scratch[G]),
                scratch[self.buffers :],
            )
            self._add_up(index, planes, x, z, buffers[0])
            times_slope(dy, z, call.activation, call.negative_slope, g, self._in_buffers(z, buffers))
            keep_inside(inside, g)  # the residual may be NaN there
        return g, x

    def _centre(self, stats: Stats, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Return (x - shift) * unit: x itself if nothing changes, else in out, which may be x."""
        for operation, values in ((np.subtract, stats.shift), (np.multiply, stats.unit)):
            if values is not None:
                self._each(operation, x, values, out)
                x = out
        return x

    def _centred(self, planes: Index, x: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, Stats]:
        stats = self._stats(planes)
        return self._centre(stats, x, self._in_buffer(x, scratch[X])), stats

    def reduce_backward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, tile = self._index(item)
        g, x = self._load(index, planes, self._inside(index, scratch), scratch)
        centred, _ = self._centred(planes, x, scratch)
        self.partials[0][(tile, *planes)] = self._sums(g)
        self.partials[1][(tile, *planes)] = self._dots(g, centred, scratch[PRODUCT])

    def join_backward(self, first: int, last: int) -> None:
        for planes in self.planes[first:last]:
            total, dot = (self.partials[i][(slice(None), *planes)].sum(0) for i in (0, 1))
            self._store_sums(planes, total, dot, self._stats(planes))

    def _store_sums(self, planes: Index, total: np.ndarray, dot: np.ndarray, stats: Stats) -> None:
        self.sum_g[planes] = total
        self.sum_g_xhat[planes] = (dot - stats.remainder * total) * stats.rstd

    def apply_backward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, _ = self._index(item)
        inside = self._inside(index, scratch)
        g, x = self._load(index, planes, inside, scratch)
        self._differentiate(index, planes, g, *self._centred(planes, x, scratch), inside, scratch)

    def _differentiate(
        self, index: Index, planes: Index, g: np.ndarray, centred: np.ndarray, stats: Stats,
        inside: np.ndarray | None, scratch: np.ndarray,
    ) -> None:  # fmt: skip
        """Compute dx = scale * (g - xhat * mean(g * xhat) * slope - mean(g)), in place, beginning with x."""
        call = self.call
        if self.arrays.dresidual is not None:
            self._write(self.arrays.dresidual, index, g, scratch[PRODUCT])
        out = (
            self._target(self.result, index, scratch[X])
            if self.work_in_result
            else self._in_buffer(self.result[index], scratch[X])
        )
        if call.training:
            count = self.spatial if self.counts is None else self.counts[planes]
            slope = self.sum_g_xhat[planes] / -count * stats.rstd
            if self.slopes is not None:
                slope *= self.slopes[planes]
            constant = (-stats.remainder * slope - self.sum_g[planes] / count).astype(self.dtype, copy=False)
            self._each(np.multiply, centred, slope, out)
            out += g
            self._each(np.add, out, constant, out)
            g = out
        self._each(np.multiply, g, self._weighted(planes, stats.rstd), out)
        if stats.unit is not None:
            self._each(np.multiply, out, stats.unit, out)
        keep_inside(inside, out)
        self._write(self.result, index, out, scratch[PRODUCT])

    def whole_backward(self, block: int, scratch: np.ndarray) -> None:
        if self.tiles > 1:
            self._in_tiles(block, scratch, self.reduce_backward, self.join_backward, self.apply_backward)
            return
        planes, index, _ = self._index(block)
        inside = self._inside(index, scratch)
        g, x = self._load(index, planes, inside, scratch)
        centred, stats = self._centred(planes, x, scratch)
        self._store_sums(planes, self._sums(g), self._dots(g, centred, scratch[PRODUCT]), stats)
        self._differentiate(index, planes, g, centred, stats, inside, scratch)


@cache
def ones_row(dtype: np.dtype) -> np.ndarray:
    return np.ones(ROW, dtype)


@lru_cache(maxsize=1024)
def row_lengths(size: int) -> tuple[int, int]:
    """Return length and number of a plane's rows; elements are left over if no suitable length divides size."""
    length = next((length for length in range(ROW, ROW // 4, -1) if size % length == 0), ROW)
    return length, size // length
