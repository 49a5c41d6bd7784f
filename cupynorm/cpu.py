"""The CPU backend: NumPy alone, or compiled by numba where that is installed (extra `cpu`).

A **block** is as many whole planes as a core's caches hold, of every array of a call; compiled, a plane by itself, or a
group of them side by side. A plane larger than that is cut into **tiles**: the sums of each are taken by themselves and
put together in a fixed order, so results have the same bits for any number of threads. Threads share the blocks of a
call, or the tiles where there are few planes; small calls have one thread.

What there is to do comes in three steps: `reduce` a tile of a block to sums, `join` the sums of all tiles, `apply` what
follows from them to a tile. The digits are the CUDA kernels', in a pass less: x - shift and its squares are added up at
once, about a shift near the mean, and the mean of x - shift is the correction. Where the shift turns out to be a
deviation or two from the mean, the plane is added up again about the mean. float16 and bfloat16 compute in float32.

In a block planes lie as in the result: each in one piece ("rows"), or side by side ("channels last").
"""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial, reduce
from typing import Any, NamedTuple

import numpy as np

from . import forks, halves, running
from .functional import Array, Keep, Saved, at_once, empty_like, math_dtype, overlap
from .memory import empty
from .threads import get_num_threads, share

forks.prepare()


def _load_numba() -> None:
    """Import numba, with what it leaves to the first compilation, so that an interrupt cannot break it.

    Some of its modules cannot be executed twice: an interrupt among them, and no call in this process could compile any
    more. Interrupts come to the main thread, so another imports them, and goes on even if this one does not wait.
    """
    failures: list[Exception] = []

    def load() -> None:
        try:
            import numba
            import numba.core.boxing  # noqa: F401
            from numba.core.registry import cpu_target

            cpu_target.typing_context.refresh()
            cpu_target.target_context.refresh()
        except Exception as failure:
            failures.append(failure)

    loading = threading.Thread(target=load, name="cupynorm imports numba", daemon=True)
    try:
        loading.start()
    except RuntimeError:  # no more threads
        load()
    else:
        loading.join()
    if failures:
        raise failures[0]


try:
    if os.environ.get("CUPYNORM_COMPILED", "1") == "0":
        raise ImportError("CUPYNORM_COMPILED=0")
    _load_numba()
    import numba

    from .compiling import INTERNAL, disk_cached, inlined
    from .moves import Windows, go_through
    from .scalars import (
        SAMPLES,
        activate,
        add,
        drain,
        line_of,
        memory,
        narrow,
        new_queue,
        next_tasks,
        own_address,
        prefetch,
        scaled,
        stream,
        task_done,
        times_slope,
        typed,
        unit_of,
        widen,
        zero_of,
        zeros_of,
    )
except Exception as _reason:  # numba is not installed, or does not work with this NumPy, in whatever way it says so
    numba, without_numba = None, str(_reason)  # type: ignore[assignment]

#: Whether calls use the compiled loops. The benchmark and the tests turn it off to compare.
compiled = numba is not None

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
    keep: Keep | None,
    activation: str | None,
    negative_slope: float,
    residual: Array | None,
) -> tuple[Array, Saved | None]:
    """The backends' contract, with all arguments checked: see cupynorm.functional.

    What lasts (running statistics, and what keep tells) is written at the very end, and at once.
    """
    y = empty_like(x, empty) if out is None else out
    planes, dtype = x.shape[:2], math_dtype(x.dtype)
    mean, rstd = np.empty(planes, dtype), np.empty(planes, dtype)
    mean_lo = np.empty(planes, dtype) if use_input_stats else None
    call = Saved(
        x, mean, rstd, weight, bias, use_input_stats, mean_lo, activation, negative_slope, residual,
        residual is not None, eps=eps,
    )  # fmt: skip
    variance = None
    if use_input_stats:
        if x.size:
            variance = np.empty(planes, dtype) if running_mean is not None and momentum else None
            _choose(call, [x, y] if residual is None else [x, y, residual]).forward(eps, variance)
    else:
        assert running_mean is not None and running_var is not None
        mean[...] = running_mean
        with np.errstate(all="ignore"):
            rstd[...] = 1 / np.sqrt(running_var.astype(dtype) + dtype.type(eps))
        if x.size:
            _choose(call, [x, y] if residual is None else [x, y, residual]).normalize()
    if activation is None:
        call.residual = None
    writes = () if keep is None else keep(call)
    if variance is not None:
        count = math.prod(x.shape[2:])
        with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are answers
            exact = np.add(mean, mean_lo, dtype=np.float64).mean(0)  # type: ignore[arg-type]
            unbiased = (variance * dtype.type(count / (count - 1))).mean(0, dtype=np.float64)
        running.move(((running_mean, exact), (running_var, unbiased)), momentum, writes)
    elif writes:
        at_once(*writes)
    return y, None if keep is None else call


def backward(dy: Array, saved: Saved, *, out: Array | None) -> tuple[Array, Array | None, Array | None, Array | None]:
    """The backends' contract, with all arguments checked: see cupynorm.functional."""
    x = saved.x
    dresidual = g_out = None
    if saved.with_residual and saved.activation is None:
        dresidual = dy.copy() if out is not None and overlap(out, dy) else dy
    elif saved.with_residual:
        dresidual = g_out = empty_like(x, empty)
    dx = empty_like(x, empty) if out is None else out
    dtype = math_dtype(x.dtype)
    sums = np.zeros((2, *x.shape[:2]), dtype)  # of g times xhat, and of g
    if x.size:
        arrays = [x, dx, dy] if g_out is None else [x, dx, dy, saved.residual, g_out]
        _choose(saved, arrays, backward=True).backward(sums[1], sums[0])
    return dx, *_gradients(sums, saved.weight, saved.bias), dresidual


def double_backward(
    ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
) -> tuple[Array, Array, Array | None]:
    """The backends' contract, with all arguments checked: see cupynorm.functional."""
    x, weight = saved.x, saved.weight
    ddy, dx = empty_like(x, empty), empty_like(x, empty)
    sums = np.zeros(x.shape[:2], math_dtype(x.dtype))
    if x.size:
        # In NumPy alone: a penalty is taken now and then, and the compiled loops would take seconds to compile for it.
        arrays = [x, dx, dy, ddy] if ddx is None else [x, dx, dy, ddy, ddx]
        _DoubleBackward(saved, _merged(arrays), ddweight, ddbias).double_backward(sums)
    return ddy, dx, *_gradients(sums[None], weight)


def _gradients(sums: np.ndarray, *parameters: Array | None) -> list[Array | None]:
    """Parameters' gradients, in their shapes and dtypes, from all planes' sums for each, shape (parameters, N, C)."""
    ranks = {parameter.ndim for parameter in parameters if parameter is not None}
    if not ranks:
        return [*parameters]
    with np.errstate(all="ignore"):
        by_rank = {2: sums}
        if 1 in ranks:
            by_rank[1] = sums[:, 0] if sums.shape[1] == 1 else sums.astype(np.float64).sum(1)
        return [None if p is None else by_rank[p.ndim][i].astype(p.dtype) for i, p in enumerate(parameters)]


# Blocks, and how threads share them


def describe(x: Array, double_backward: bool = False) -> list[str]:
    """How calls on an array, with other arrays in its layout, go through its planes: a line or two for each."""
    if not x.size:
        return ["empty, nothing is computed"]
    unused = np.empty(x.shape[:2], math_dtype(x.dtype))
    call, new = Saved(x, unused, unused, None, None, True, unused), empty_like(x, np.empty)

    def lines(work: Any) -> list[str]:
        tiles = f", each in {work.tiles} tiles, put together in a fixed order" if work.tiles > 1 else ""
        threads = f"up to {work.threads} threads" if work.threads > 1 else "one thread"
        return [f"{work}{tiles}", f"{threads} of {get_num_threads()}"]

    described = lines(_choose(call, [x, new]))
    if double_backward:
        first, *more = lines(_DoubleBackward(call, _merged([x, *[new] * 4]), None, None))
        described += [f"double backward: {first}", *more]
    return described


def _merged(arrays: list[Array]) -> list[Array]:
    """Views of the arrays with spatial axes put together where all of them allow it: (N, C, *fewer), at least one."""
    n, c, *spatial = arrays[0].shape
    if all(a.flags.c_contiguous for a in arrays):
        shape = [n, c, math.prod(spatial)]
    else:
        shape, last = [n, c], None
        for axis, size in enumerate(spatial, 2):
            if size == 1:
                continue
            steps = [a.strides[axis] for a in arrays]
            if last is not None and last == [step * size for step in steps]:
                shape[-1] *= size
            else:
                shape.append(size)
            last = steps
        shape += [1] * (len(shape) == 2)
    return [a if a.ndim == len(shape) else a.reshape(shape) for a in arrays]


class _Work:
    """A call, and how its blocks are shared out. A subclass does the steps.

    It sets `blocks`, `tiles` (of each) and `threads`, and has `reduce`, `join`, `apply` and `whole` (all three of a
    block) for every pass: of NumPy alone a function, compiled a loop and its arguments.
    """

    blocks: int
    tiles: int
    threads: int

    def share(self, step: Any, count: int) -> None:
        """step over 0 … count, in parts that the threads share out among themselves."""

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        if self.threads == 1 or self.tiles == 1 or self.blocks >= 4 * self.threads:
            self.share(whole, self.blocks)
        else:
            self.share(reduce, self.blocks * self.tiles)
            join(0, self.blocks)
            self.share(apply, self.blocks * self.tiles)


def _address(array: np.ndarray) -> int:
    """That of the first element: in an array's object it comes after Python's header (NumPy's PyArrayObject).

    __array_interface__ has it too, but takes a microsecond for all the rest. Only numba's calls ask, so it is CPython.
    """
    return ctypes.c_size_t.from_address(id(array) + object.__basicsize__).value


def _choose(call: Saved, arrays: list[Array], backward: bool = False) -> Any:
    """The work of a call: compiled where that is to be had and the loops can address the arrays.

    arrays are x and y, then a residual; or, backward, x, dx and dy, then a residual and its gradient.
    """
    if compiled:
        x = arrays[0]
        layout = _layout_of(x.dtype, x.shape, tuple([a.strides for a in arrays]), backward)
        if layout.usable:
            at = [_address(a) for a in arrays]
            if not reduce(operator.or_, at) % x.itemsize:
                return (_Moved if layout.windows else _Compiled)(call, layout, np.array(at))
    return _Interpreted(call, _merged(arrays))


# NumPy alone

BLOCK_BYTES = 2**21  # of an array in computing precision: smaller ones cost more in calls than they gain in cache
# Elements at most that are added up in computing precision; sums of these are added in float64. A gufunc lets other
# threads go on only where it has more than 500 rows.
ROW = 512
ROW_CHANNELS_LAST = 32  # the same for lanes, whose sums are plain
MIN_CHANNELS = 24  # channels side by side: fewer are moved apart, for NumPy's loops would be as short
MIN_CHANNEL_TILE = 64  # and of more so many at least are done together
SHORT_ROW = 128  # elements of a plane up to which it pays to spread its numbers over a block of their own
CENTRE_RATIO = 2.0  # mean over deviation from which on x is centred: below, two bits at most are lost without
UNITS = 30  # up to 2**30, and from 2**-30 on, deviations are worked with as they are
# Blocks of scratch, by what is in them; forward, x less a mean takes that of g. Further ones are the activation's.
PRODUCT, G, X, V, RESULT = range(5)


class _Stats(NamedTuple):
    """Of a block's planes, as (N, C): xhat = ((x - shift) * unit - remainder) * rstd.

    The unit is a power of two near 1 / deviation (kernels/unit.cuh says what for), and None where it is 1 for all
    planes, as it nearly always is; so is a shift that is 0 for all.
    """

    shift: np.ndarray | None
    unit: np.ndarray | None
    remainder: np.ndarray
    rstd: np.ndarray


class _Interpreted(_Work):
    """The steps as NumPy calls. A block is an index of (N, C) and an array (planes of N, of C, positions).

    Arrays in computing precision are used where they lie, and y and dx are worked in; the rest goes through scratch.
    """

    pays = 2**19  # elements from which on a second thread does: to wake one takes as long as 50 microseconds
    buffers = 3  # blocks of scratch, besides the activation's

    def __init__(self, call: Saved, arrays: list[Array]):
        self.call, self.arrays, self.dtype = call, arrays, call.rstd.dtype
        self.x, self.result = arrays[:2]
        self.threads = 1 if self.x.size < self.pays else get_num_threads()
        self.limit = BLOCK_BYTES // self.dtype.itemsize
        n, c, *spatial = self.x.shape
        strides, itemsize = self.result.strides, self.result.itemsize
        self.channels_last = c >= MIN_CHANNELS and strides[1] == itemsize and strides[-1] != itemsize
        plane = self.spatial = math.prod(spatial)
        # The dtype of what is computed once for a plane.
        self.plane_dtype = np.dtype(np.float64) if plane > SHORT_ROW else self.dtype
        # Half where no sum is made in higher precision.
        self.centre_ratio = CENTRE_RATIO if self.plane_dtype != self.dtype else CENTRE_RATIO / 2
        most = self.limit if self.threads == 1 else 2 * self.limit  # threads wait for each other between calls
        self.tile: list[Index] = [()]  # all of it
        every = slice(None)
        self.planes: list[Index]
        if (self.channels_last and plane * c > self.limit) or plane > self.limit:
            width = min(c, max(self.limit // plane, MIN_CHANNEL_TILE)) if self.channels_last else 1
            if plane * width > self.limit:
                self.tile = list(_tiles(spatial, max(self.limit // width, 1)))
            parts = [slice(j, min(j + width, c)) for j in range(0, c, width)]
            self.planes, size = [(slice(i, i + 1), part) for i in range(n) for part in parts], plane
        elif self.channels_last or (plane * c <= most and n >= self.threads):
            parts = self._cut(n, plane * c, most)
            self.planes, size = [(part, every) for part in parts], plane * c
        else:
            parts = self._cut(c, plane, most, n)
            self.planes, size = [(slice(i, i + 1), part) for i in range(n) for part in parts], plane
        self.blocks, self.tiles = len(self.planes), len(self.tile)
        if self.tiles == 1:  # scratch is no more than is needed: each thread has its own
            self.buffer_size = size * max(part.stop - part.start for part in parts)
        else:
            self.buffer_size = max(self.limit, MIN_CHANNEL_TILE)
            self.partials = np.empty((4, self.tiles, n, c))
        # A ufunc copies what it broadcasts into a buffer, unless this would hold less than a row.
        inner = c if self.channels_last else plane
        self.ufunc_buffer = 16 if inner >= 512 else 8192

    def __str__(self) -> str:
        most = self.buffer_size * self.dtype.itemsize
        return f"NumPy, {self.blocks} block(s) of planes, in {self.dtype} of at most {most} B at a time"

    def _cut(self, count: int, size: int, most: int, times: int = 1) -> list[slice]:
        """count things of a size in even parts of at most `most` elements, so many that no thread has fewer of them."""
        parts = -(-count // (most // size))
        fair = self.threads // math.gcd(self.threads, times)
        parts = min(count, -(-parts // fair) * fair)
        borders = [count * i // parts for i in range(parts + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(borders)]

    def share(self, step: Callable[..., None], count: int) -> None:
        parts = 1 if self.threads == 1 else min(count, self.threads * (1 if self.x.size < 8 * self.pays else 4))
        borders = [count * i // parts for i in range(parts + 1)]
        share(lambda tasks, _: self.work(step, ((borders[i], borders[i + 1]) for i in tasks)), parts, self.threads)

    def work(self, step: Callable[..., None], ranges: Iterator[tuple[int, int]]) -> None:
        """One thread's share: step of each block or tile in the ranges."""
        scratch = np.empty(
            (self.buffers + _scratch(self.call.activation), min(self.x.size, self.buffer_size)), self.dtype
        )
        with np.errstate(all="ignore"):  # also what puts the buffers' size back
            np.setbufsize(self.ufunc_buffer)
            for first, last in ranges:
                for i in range(first, last):
                    step(i, scratch)

    # Blocks and what is computed of them

    def _in_buffer(self, part: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        """A block for a part of an array, in scratch."""
        n, c = part.shape[:2]
        if self.channels_last:
            return buffer[: part.size].reshape(n, -1, c).transpose(0, 2, 1)
        return buffer[: part.size].reshape(n, c, -1)

    def _in_place(self, part: np.ndarray) -> bool:
        """Whether a part of an array can be computed with where it lies."""
        step = part.strides[1] if self.channels_last else part.strides[-1]
        return part.ndim == 3 and part.dtype == self.dtype and step == part.itemsize and part.flags.aligned

    def _read(self, array: np.ndarray, index: Index, buffer: np.ndarray, copy: bool = False) -> np.ndarray:
        part = array[index]
        if self._in_place(part) and not copy:
            return part
        block = self._in_buffer(part, buffer)
        if halves.pays_to_widen(part):
            codes = halves.codes_in(buffer, part.size)
            self._in_buffer(part, codes).reshape(part.shape)[...] = part.view(np.uint16)
            halves.widen(buffer, part.size)
        else:
            block.reshape(part.shape)[...] = part
        return block

    def _write(self, array: np.ndarray, index: Index, block: np.ndarray, buffer: np.ndarray) -> None:
        part = array[index]
        if halves.pays_to_narrow(block, part):
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
        for channel in range(part.shape[1]):  # NumPy's loop would be over the channels, which are few
            part[:, channel] = block[:, channel]

    def _target(self, array: np.ndarray, index: Index, buffer: np.ndarray) -> np.ndarray:
        part = array[index]
        return part if self._in_place(part) else self._in_buffer(part, buffer)

    def _sums(self, block: np.ndarray) -> np.ndarray:
        """Of each plane of a block. What a plane is put together with, and where it lies, changes no bit of its sum."""
        n, c, size = block.shape
        if self.channels_last:
            whole = size // ROW_CHANNELS_LAST * ROW_CHANNELS_LAST
            rows = block[:, :, :whole].reshape(n, c, -1, ROW_CHANNELS_LAST)
            total = np.add.reduce(rows, axis=3).sum(2, dtype=np.float64)
            return total + np.add.reduce(block[:, :, whole:], axis=2)
        if size < 128:
            return np.einsum("ncs->nc", block)
        # A dot product has the best loop; rows are too short for BLAS to share them out among threads of its own.
        return self._dots(block, _ones(self.dtype))

    def _dots(self, a: np.ndarray, b: np.ndarray, scratch: np.ndarray | None = None) -> np.ndarray:
        """The dot product of each plane of a with that of b, or with a row of ROW elements."""
        n, c, size = a.shape
        if scratch is not None and self.channels_last:
            return self._sums(np.multiply(a, b, out=self._in_buffer(a, scratch)))
        if scratch is not None and size < 128:
            return np.einsum("ncs,ncs->nc", a, b)
        if size <= ROW:
            return np.vecdot(a, b[..., :size])
        length, rows = _rows(size)
        whole = length * rows
        across = b[:length] if b.ndim == 1 else b[:, :, :whole].reshape(n, c, rows, length)
        total = np.vecdot(a[:, :, :whole].reshape(n, c, rows, length), across).sum(2, dtype=np.float64)
        if whole == size:
            return total
        return total + np.vecdot(a[:, :, whole:], b[: size - whole] if b.ndim == 1 else b[..., whole:])

    def _each(self, operation: np.ufunc, block: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
        """out <- operation(block, the value of each plane)."""
        if self.channels_last or block.shape[2] > SHORT_ROW:
            values = values[:, :, None]
        else:  # a ufunc would take each row for itself
            values = values.repeat(block.shape[2]).reshape(block.shape)
        operation(block, values, out=out)

    def _per_plane(self, parameter: Array, planes: Index) -> np.ndarray:
        return parameter[planes if parameter.ndim == 2 else planes[1]].astype(self.dtype, copy=False)

    def _weighted(self, planes: Index, rstd: np.ndarray) -> np.ndarray:
        return rstd if self.call.weight is None else rstd * self._per_plane(self.call.weight, planes)

    def _stats(self, planes: Index) -> _Stats:
        """How xhat follows from x in a block's planes: the same in both passes.

        The shift is the mean of a plane where that is far from 0, as seen from its deviation (rstd has eps in it, too);
        else 0. What else is in running statistics' planes is not known: there it is the mean.
        """
        call = self.call
        mean, rstd = call.mean[planes], call.rstd[planes]
        shift = mean
        if call.training:  # mean**2 > far**2 * variance, where 1 / rstd**2 is variance + eps
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
            # Where it is less than rstd, the mean would be too large in it; x is close to the mean then.
            exponent = np.minimum(np.clip(exponent, -125, 126), 124 - np.frexp(shift)[1])
            unit = np.ldexp(np.float32(1), np.where(inside, 0, exponent))
            remainder, rstd = remainder * unit, np.ldexp(rstd, np.where(inside, 0, -exponent))
        return _Stats(shift if shift.any() else None, unit, remainder, rstd)

    def _moments(self, x: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """mean, what rounding took from it, and variance, of a block's planes, as (N, C).

        From the sums of x - shift and of its squares. They cancel where the mean is far from shift, which is 0 first,
        then, for these planes, the mean as known so far; once more where a plane is so nearly constant that this is not
        the number next to its mean.
        """
        size = x.shape[2]
        total, sum_sq = self._sums(x), self._dots(x, x, scratch[PRODUCT])
        shift: Any = None
        most: Any = self.centre_ratio**2 / (1 + self.centre_ratio**2)  # of the squares, lost to the mean's
        for last in (False, False, False, True):
            mean = np.divide(total, size, dtype=self.plane_dtype)
            lost = mean * total
            recentre = np.multiply(mean, total, dtype=np.float64) > most * sum_sq  # in float32 both may be 0
            if last or not recentre.any():
                break
            before = np.zeros(recentre.shape, self.dtype) if shift is None else shift
            # Squares too small to be told from 0 say nothing: about the first mean is near enough then.
            enough = np.where(sum_sq < size * 2.0**-100, math.inf, 0.5) if shift is None else 0.5
            shift, most = (
                np.where(recentre, (before + mean).astype(self.dtype), before),
                np.where(recentre, enough, most),
            )
            if self.channels_last or 4 * np.count_nonzero(recentre) > recentre.size:
                centred = np.subtract(x, shift[:, :, None], out=self._in_buffer(x, scratch[G]))
                total, sum_sq = self._sums(centred), self._dots(centred, centred, scratch[PRODUCT])
            else:
                centred = (x[recentre] - shift[recentre][:, None])[None]
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
        least = size * _least(self.eps)
        if not sum_sq.max() < math.inf or (least and sum_sq.min() < least):
            odd = ~((sum_sq >= least) & (sum_sq < math.inf))
            exact = x[odd].astype(np.float64)
            mean = exact.mean(1)
            exact -= mean[:, None]
            more = exact.mean(1)
            exact *= exact
            nearest[odd] = mean
            mean_lo[odd] = (mean - nearest[odd]) + more
            variance = variance.astype(np.float64)
            variance[odd] = exact.mean(1) - more * more
        return nearest, mean_lo, variance

    def _add_up(self, index: Index, planes: Index, x: np.ndarray, out: np.ndarray, buffer: np.ndarray) -> None:
        """z = (x - shift) * unit * scale + shift + residual, into out, which may be x: the same bits in both passes."""
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
            out += self._read(self.arrays[2 if len(self.arrays) == 3 else 3], index, buffer)

    # Forward

    def forward(self, eps: float, variance: np.ndarray | None) -> None:
        self.eps, self.variance = eps, variance
        self.work_in_result = self.call.residual is None or not overlap(self.result, self.arrays[2])
        self.run(self.reduce_forward, self.join_forward, self.apply_forward, self.whole_forward)

    def normalize(self) -> None:
        self.work_in_result = self.call.residual is None or not overlap(self.result, self.arrays[2])
        self.share(self.apply_forward, self.blocks * self.tiles)

    def _index(self, item: int) -> tuple[Index, Index, int]:
        """Planes of a block, the index of one of its tiles, and that tile's number."""
        block, tile = divmod(item, self.tiles)
        return self.planes[block], self.planes[block] + self.tile[tile], tile

    def reduce_forward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, tile = self._index(item)
        x = self._read(self.x, index, scratch[X])
        mean, mean_lo, variance = self._moments(x, scratch)
        for each, value in zip(self.partials, (mean, mean_lo, variance * x.shape[2], x.shape[2]), strict=True):
            each[(tile, *planes)] = value

    def join_forward(self, first: int, last: int) -> None:
        """Tiles are merged with Chan, Golub, LeVeque 1983, eq. 2.1, in float64, means as distances from the first's."""
        for planes in self.planes[first:last]:
            means, means_lo, m2s, counts = (each[(slice(None), *planes)] for each in self.partials)
            pooled, m2, count = means_lo[0], m2s[0], counts[0]
            for tile in range(1, self.tiles):
                share = counts[tile] / (count + counts[tile])
                distance = (means[tile] - means[0]) + means_lo[tile] - pooled
                pooled = pooled + distance * share
                m2 = m2 + m2s[tile] + distance * distance * (count * share)
                count = count + counts[tile]
            mean = (means[0] + pooled).astype(self.dtype)
            mean_lo = ((means[0] - mean) + pooled).astype(self.dtype)
            self._store_stats(planes, mean, mean_lo, m2 / count)

    def _store_stats(self, planes: Index, mean: np.ndarray, mean_lo: np.ndarray, variance: np.ndarray) -> None:
        call = self.call
        call.mean[planes], call.mean_lo[planes] = mean, mean_lo  # type: ignore[index]
        call.rstd[planes] = 1 / np.sqrt(variance.astype(self.plane_dtype, copy=False) + self.eps)
        if variance.dtype != self.plane_dtype:  # some of it may not be a number of self.plane_dtype
            odd = ~((variance >= _least(self.eps)) & (variance < np.finfo(self.plane_dtype).max))
            call.rstd[planes] = np.where(odd, 1 / np.sqrt(variance + self.eps), call.rstd[planes])
        if self.variance is not None:
            self.variance[planes] = variance

    def apply_forward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, _ = self._index(item)
        self._finish(index, planes, self._read(self.x, index, scratch[X]), scratch)

    def _finish(self, index: Index, planes: Index, x: np.ndarray, scratch: np.ndarray) -> None:
        call = self.call
        out = (
            self._target(self.result, index, scratch[X])
            if self.work_in_result
            else self._in_buffer(self.result[index], scratch[X])
        )
        self._add_up(index, planes, x, out, scratch[PRODUCT])
        if call.activation is not None:
            _activate(out, call.activation, call.negative_slope, self._in_buffers(out, scratch[self.buffers :]))
        self._write(self.result, index, out, scratch[PRODUCT])

    def _in_tiles(self, block: int, scratch: np.ndarray, reduce: Any, join: Any, apply: Any) -> None:
        """All of a block, the tile that was read last first again: it is still in the cache."""
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
        x = self._read(self.x, index, scratch[X])
        self._store_stats(planes, *self._moments(x, scratch))
        self._finish(index, planes, x, scratch)

    # Backward

    def backward(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        self.sum_g, self.sum_g_xhat = sum_g, sum_g_xhat
        self.work_in_result = not overlap(self.result, self.arrays[2])
        self.run(self.reduce_backward, self.join_backward, self.apply_backward, self.whole_backward)

    def _load(self, index: Index, planes: Index, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """g, in scratch where it is not dy itself; and x."""
        call = self.call
        g = dy = self._read(self.arrays[2], index, scratch[G])
        x = self._read(self.x, index, scratch[X])
        if call.activation is not None:
            z, g, buffers = (
                self._in_buffer(x, scratch[PRODUCT]),
                self._in_buffer(x, scratch[G]),
                scratch[self.buffers :],
            )
            self._add_up(index, planes, x, z, buffers[0])
            _times_slope(dy, z, call.activation, call.negative_slope, g, self._in_buffers(z, buffers))
        return g, x

    def _centre(self, stats: _Stats, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """(x - shift) * unit: x itself where that is it, else in out, which may be x."""
        for operation, values in ((np.subtract, stats.shift), (np.multiply, stats.unit)):
            if values is not None:
                self._each(operation, x, values, out)
                x = out
        return x

    def _centred(self, planes: Index, x: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, _Stats]:
        stats = self._stats(planes)
        return self._centre(stats, x, self._in_buffer(x, scratch[X])), stats

    def reduce_backward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, tile = self._index(item)
        g, x = self._load(index, planes, scratch)
        centred, _ = self._centred(planes, x, scratch)
        self.partials[0][(tile, *planes)] = self._sums(g)
        self.partials[1][(tile, *planes)] = self._dots(g, centred, scratch[PRODUCT])

    def join_backward(self, first: int, last: int) -> None:
        for planes in self.planes[first:last]:
            total, dot = (self.partials[i][(slice(None), *planes)].sum(0) for i in (0, 1))
            self._store_sums(planes, total, dot, self._stats(planes))

    def _store_sums(self, planes: Index, total: np.ndarray, dot: np.ndarray, stats: _Stats) -> None:
        self.sum_g[planes] = total
        self.sum_g_xhat[planes] = (dot - stats.remainder * total) * stats.rstd

    def apply_backward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, _ = self._index(item)
        g, x = self._load(index, planes, scratch)
        self._differentiate(index, planes, g, *self._centred(planes, x, scratch), scratch)

    def _differentiate(
        self, index: Index, planes: Index, g: np.ndarray, centred: np.ndarray, stats: _Stats, scratch: np.ndarray
    ) -> None:
        """dx = scale * (g - xhat * mean of g * xhat - mean of g), x first, in place."""
        call = self.call
        if len(self.arrays) == 5:
            self._write(self.arrays[4], index, g, scratch[PRODUCT])
        out = (
            self._target(self.result, index, scratch[X])
            if self.work_in_result
            else self._in_buffer(self.result[index], scratch[X])
        )
        if call.training:
            slope = self.sum_g_xhat[planes] / -self.spatial * stats.rstd
            constant = (-stats.remainder * slope - self.sum_g[planes] / self.spatial).astype(self.dtype, copy=False)
            self._each(np.multiply, centred, slope, out)
            out += g
            self._each(np.add, out, constant, out)
            g = out
        self._each(np.multiply, g, self._weighted(planes, stats.rstd), out)
        if stats.unit is not None:
            self._each(np.multiply, out, stats.unit, out)
        self._write(self.result, index, out, scratch[PRODUCT])

    def whole_backward(self, block: int, scratch: np.ndarray) -> None:
        if self.tiles > 1:
            self._in_tiles(block, scratch, self.reduce_backward, self.join_backward, self.apply_backward)
            return
        planes, index, _ = self._index(block)
        g, x = self._load(index, planes, scratch)
        centred, stats = self._centred(planes, x, scratch)
        self._store_sums(planes, self._sums(g), self._dots(g, centred, scratch[PRODUCT]), stats)
        self._differentiate(index, planes, g, centred, stats, scratch)


class _DoubleBackward(_Interpreted):
    """The double backward; arrays are x, dx, dy, ddy and, if there is one, ddx.

    With v = rstd * (ddx - its mean) and g = dy - its mean, what is multiplied is of the size of some result:

        ddy = weight * v + q * xhat + ddbias,   q = ddweight - weight * a
        dx = rstd * (q * g - weight * c * v + r * xhat),   r = weight * (a * c - s) - q * c

    with the means a of v * xhat, c of g * xhat, and s of v * g, less a * c. In tracked eval no mean is taken away, and
    a, c and s are 0. A mean is taken away as rounded first, the shift, so that a large one costs no digits; then its
    rest.
    """

    buffers = 5  # for xhat, g, v, a product, and a result that cannot be worked in

    def __init__(self, call: Saved, arrays: list[Array], ddweight: Array | None, ddbias: Array | None):
        super().__init__(call, arrays)
        self.g, self.ddy, self.u = arrays[2], arrays[3], arrays[4] if len(arrays) == 5 else None
        self.ddweight, self.ddbias = ddweight, ddbias

    def double_backward(self, sums: np.ndarray) -> None:
        self.sums = sums
        if not self.call.training and (self.u is None or self.call.weight is None):
            self.share(self.apply_double, self.blocks * self.tiles)
            return
        if self.tiles > 1:
            self.partials = np.empty((9, self.tiles, *sums.shape))
            self.joined = np.empty((8, *sums.shape))
        self.run(self.reduce_double, self.join_double, self.apply_double, self.whole_double)

    def _scaled(self, array: Array, index: Index, buffer: np.ndarray, centres: Any, scale: Any = None) -> Any:
        """(array - centres) * scale of a block, in scratch; None where there is no array."""
        if array is None:
            return None
        block = self._read(array, index, buffer, copy=True)
        for centre in centres:
            self._each(np.subtract, block, centre, block)
        if scale is not None:
            self._each(np.multiply, block, scale, block)
        return block

    def _xhat(self, index: Index, planes: Index, buffer: np.ndarray) -> np.ndarray:
        call = self.call
        centres = (call.mean[planes],) if call.mean_lo is None else (call.mean[planes], call.mean_lo[planes])
        block: np.ndarray = self._scaled(self.x, index, buffer, centres, call.rstd[planes])
        return block

    def _blocks(self, index: Index, planes: Index, scratch: np.ndarray, shifts: tuple[Any, ...]) -> tuple[Any, ...]:
        """xhat, g and v of a block, the last two about these shifts; v is None where there is no ddx."""
        return (
            self._xhat(index, planes, scratch[X]),
            self._scaled(self.g, index, scratch[G], shifts[:1]),
            self._scaled(self.u, index, scratch[V], shifts[1:], self.call.rstd[planes]),
        )

    def _about_mean(self, array: Array, index: Index, buffer: np.ndarray) -> tuple[Any, Any, Any]:
        """A block less the means of its planes as rounded, the shifts; these, and the sums of what is left."""
        if array is None:
            return None, 0.0, 0.0
        block = self._read(array, index, buffer, copy=True)
        shift = (self._sums(block) / block.shape[2]).astype(self.dtype, copy=False)
        self._each(np.subtract, block, shift, block)
        return block, shift, self._sums(block)

    def _reduced(self, index: Index, planes: Index, scratch: np.ndarray) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """xhat, g and v of a tile about its own shifts; and what `_joined` takes of it."""
        size = math.prod(self.x[index].shape[2:])
        if not self.call.training:
            blocks = self._blocks(index, planes, scratch, ())
            return blocks, (size, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, self._dots(blocks[2], blocks[1], scratch[PRODUCT]))
        g, shift_g, sum_g = self._about_mean(self.g, index, scratch[G])
        v, shift_u, sum_u = self._about_mean(self.u, index, scratch[V])
        xhat = self._xhat(index, planes, scratch[X])
        dots: tuple[Any, ...] = (self._dots(g, xhat, scratch[PRODUCT]), 0.0, 0.0)
        if v is not None:
            self._each(np.multiply, v, self.call.rstd[planes], v)
            dots = (dots[0], self._dots(v, xhat, scratch[PRODUCT]), self._dots(v, g, scratch[PRODUCT]))
        return (xhat, g, v), (size, self._sums(xhat), shift_g, sum_g, shift_u, sum_u, *dots)

    def _joined(self, planes: Index, partials: np.ndarray) -> tuple[Any, ...]:
        """Shifts of g and u, their rests, that of xhat, and a, c and s: from what there is of each tile, in float64.

        parts: count, sum of xhat, shift and what it left of g, the same of u, and the dots g xhat, v xhat and v g. The
        distances of the tiles' shifts from the means add to the dots (Chan, Golub, LeVeque 1983, for products).
        """
        count, sum_x, shift_g, sum_g, shift_u, sum_u, dot_gx, dot_vx, dot_vg = partials
        rstd = self.call.rstd[planes].astype(np.float64)
        size = self.spatial
        gap_g, gap_u = shift_g - shift_g[0], shift_u - shift_u[0]
        remainder_g, remainder_u = (count * gap_g + sum_g).sum(0) / size, (count * gap_u + sum_u).sum(0) / size
        if self.call.training:
            gap_g, gap_u = gap_g - remainder_g, rstd * (gap_u - remainder_u)
            sum_v = rstd * sum_u
            a, c = (dot_vx + gap_u * sum_x).sum(0) / size, (dot_gx + gap_g * sum_x).sum(0) / size
            s = (dot_vg + gap_u * sum_g + gap_g * sum_v + count * gap_u * gap_g).sum(0) / size - a * c
            self.sums[planes] = s * size
        else:
            a = c = s = 0 * remainder_g
            self.sums[planes] = dot_vg.sum(0)
        bases, remainders = (shift_g[0], shift_u[0]), (remainder_g, remainder_u)
        shifts = bases
        if self.tiles > 1:
            shifts = tuple(
                (base + remainder).astype(self.dtype) for base, remainder in zip(bases, remainders, strict=True)
            )
            remainders = tuple(
                (base - shift) + remainder for base, shift, remainder in zip(bases, shifts, remainders, strict=True)
            )
        return *shifts, *remainders, sum_x.sum(0) / size, a, c, s

    def reduce_double(self, item: int, scratch: np.ndarray) -> None:
        planes, index, tile = self._index(item)
        for each, value in zip(self.partials, self._reduced(index, planes, scratch)[1], strict=True):
            each[(tile, *planes)] = value

    def join_double(self, first: int, last: int) -> None:
        for planes in self.planes[first:last]:
            parts = self.partials[(slice(None), slice(None), *planes)]
            for each, value in zip(self.joined, self._joined(planes, parts), strict=True):
                each[planes] = value

    def apply_double(self, item: int, scratch: np.ndarray) -> None:
        planes, index, _ = self._index(item)
        shifts, numbers = (), (0.0,) * 6
        if self.call.training:
            joined = [each[planes] for each in self.joined]
            shifts, numbers = tuple(each.astype(self.dtype) for each in joined[:2]), tuple(joined[2:])
        self._finish_double(index, planes, self._blocks(index, planes, scratch, shifts), numbers, scratch)

    def whole_double(self, block: int, scratch: np.ndarray) -> None:
        if self.tiles > 1:
            self._in_tiles(block, scratch, self.reduce_double, self.join_double, self.apply_double)
            return
        planes, index, _ = self._index(block)
        blocks, sums = self._reduced(index, planes, scratch)
        parts = np.empty((9, 1, *self.sums[planes].shape))
        for each, value in zip(parts, sums, strict=True):
            each[...] = value
        self._finish_double(index, planes, blocks, self._joined(planes, parts)[2:], scratch)

    def _finish_double(
        self, index: Index, planes: Index, blocks: tuple[Any, ...], numbers: tuple[Any, ...], scratch: np.ndarray
    ) -> None:
        xhat, g, v = blocks
        remainder_g, remainder_u, remainder_x, a, c, s = numbers
        shape = self.sums[planes].shape
        rstd = self.call.rstd[planes]
        weight, ddweight, ddbias = (
            np.broadcast_to(default if given is None else self._per_plane(given, planes), shape).astype(np.float64)
            for given, default in ((self.call.weight, 1.0), (self.ddweight, 0.0), (self.ddbias, 0.0))
        )
        q, constant_y, constant, more = ddweight, ddbias, np.zeros(shape), []
        if self.call.training:
            q, remainder_v = ddweight - weight * a, rstd * remainder_u
            r = weight * (a * c - s) - q * c
            constant_y = ddbias - weight * remainder_v - q * remainder_x
            constant = weight * c * remainder_v - q * remainder_g - r * remainder_x
            more = [(v, -weight * c), (xhat, r)]
        if self.ddweight is None and (v is None or not self.call.training):
            g = xhat = None  # q is 0, and they may be infinite
            more = []
        self._combine(self.ddy, index, scratch, [(v, weight), (xhat, q)], constant_y)
        self._combine(self.result, index, scratch, [(g, q), *more], constant, rstd)

    def _combine(
        self, array: Array, index: Index, scratch: np.ndarray, terms: Any, constant: np.ndarray, scale: Any = None
    ) -> None:
        """array <- (the sum of block * number, for each (block, number), + rest) * scale, by planes."""
        terms = [term for term in terms if term[0] is not None]
        out = self._target(array, index, scratch[RESULT])
        if not terms:
            out[...] = 0
        for i, (block, number) in enumerate(terms):
            product = self._in_buffer(block, scratch[PRODUCT]) if i else out
            self._each(np.multiply, block, number.astype(self.dtype), product)
            if i:
                out += product
        self._each(np.add, out, constant.astype(self.dtype), out)
        if scale is not None and terms:
            self._each(np.multiply, out, scale, out)
        self._write(array, index, out, scratch[PRODUCT])


def _least(eps: float) -> float:
    """The mean square from which on squares in float32 have all their digits; 0 where eps is what counts anyway."""
    return 0.0 if eps >= 1e-30 else 2.0**-100


@cache
def _ones(dtype: np.dtype) -> np.ndarray:
    return np.ones(ROW, dtype)


@lru_cache(maxsize=1024)
def _rows(size: int) -> tuple[int, int]:
    """The length and number of the rows that a plane is cut into; a rest is left where no such length divides size."""
    length = next((length for length in range(ROW, ROW // 4, -1) if size % length == 0), ROW)
    return length, size // length


def _tiles(spatial: list[int], limit: int) -> Iterator[Index]:
    """Cut a plane along its outermost axes into tiles of at most `limit` elements."""
    size, *inner = spatial
    row = math.prod(inner)
    if row > limit:
        for i in range(size):
            for tail in _tiles(inner, limit):
                yield (slice(i, i + 1), *tail)
    else:
        step = max(limit // row, 1)
        for i in range(0, size, step):
            yield (slice(i, i + step), *(slice(None) for _ in inner))


# Activations, in place on a block z, with scratch blocks. Comparisons become numbers by copies: ufuncs would convert
# them piece by piece. clip hands NaN on, and is several times as fast as maximum with a number.


def _scratch(activation: str | None) -> int:
    """How many blocks of scratch an activation and its derivative take."""
    return {None: 0, "relu": 1, "leaky_relu": 1}.get(activation, 3)


def _activate(z: np.ndarray, activation: str, negative_slope: float, scratch: list[np.ndarray]) -> None:
    """z <- activation(z)"""
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


def _times_slope(
    dy: np.ndarray, z: np.ndarray, activation: str, negative_slope: float, g: np.ndarray, scratch: list[np.ndarray]
) -> None:
    """g <- dy * activation'(z); z is used up, and g may be dy."""
    if activation in ("relu", "leaky_relu"):
        # By bits, all of them where z rises: it makes 0 of infinities too. Bytes are a quarter of the work.
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
    """|z|, 1 - F(|z|) and F'(|z|), each in a block of scratch; F is logistic for silu and normal for gelu."""
    size, tail, density = scratch[:3]
    np.abs(z, out=size)
    np.clip(size, 0, 800, out=size)  # where both are 0: an infinite z has its limit
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


ERFCX_CENTRE = 4.0  # the |z| that the polynomial below is about


@cache
def half_erfcx(degree: int) -> list[float]:
    """Coefficients, highest first, of p with 1 - Phi(z) = p((z - PIVOT) / (z + PIVOT)) exp(-z**2 / 2) for z >= 0.

    p interpolates erfc(z / sqrt(2)) exp(z**2 / 2) / 2 at Chebyshev's points, up to z = 37, where erfc ends in float64;
    the argument is that of Shepherd, Laframboise 1981. The coefficients fall so fast that powers of it do as well as
    Chebyshev's polynomials.
    """
    from numpy.polynomial import Chebyshev, Polynomial  # a light import of cupynorm does without

    count = degree + 1
    end = (37 - ERFCX_CENTRE) / (37 + ERFCX_CENTRE)
    # Row k is T_k at the points; its angles are reduced as integers, for theirs would be rounded.
    angles = np.outer(np.arange(count), 2 * np.arange(count) + 1) % (4 * count)
    cosines = np.cos(np.pi / (2 * count) * angles)
    t = (cosines[1] + 1) * (end + 1) / 2 - 1
    values = [math.erfc(z / math.sqrt(2)) * math.exp(z * z / 2) / 2 for z in ERFCX_CENTRE * (1 + t) / (1 - t)]
    series = cosines @ values * 2 / count
    series[0] /= 2
    return [float(c) for c in Chebyshev(series, domain=[-1, end]).convert(kind=Polynomial).coef[::-1]]


# Compiled by numba. In the loops an array is all memory from its first element on, and an offset in elements, unsigned:
# with signed ones the compiler would have to mind negative indices, and would not use vector instructions.
#
# `like` is a sample of the stored type; of `lanes` (channels are side by side), `inplace` (y is x), `residual` and
# `training` only whether they are None matters: each combination that is met is compiled for itself, once, and kept on
# disk.


def _loop(function: Any) -> Any:
    return function if numba is None else inlined(function)


def _rare(function: Any) -> Any:
    return function if numba is None else numba.njit(function, error_model="numpy", inline="never", **INTERNAL)


def _kernel(function: Any) -> Any:
    return function if numba is None else disk_cached(function, nogil=True)


TILE = 65536  # positions; no less than FORWARD_SHORT
MOST_RUNS = 65536  # pieces that a plane may be read in: each array has a table of them
# Channels side by side: of fewer, or less than a cache line, planes are moved together first.
MIN_CHANNELS_COMPILED = 16
SPARE = 14  # and where more than one channel in so many is left over from half cache lines, or one of 16 bits
SMALL_TABLE = 2**14  # bytes of such tables up to which many layouts are kept
PARTIAL = 512  # elements whose sums are made in computing precision; those of them in float64
PARTIAL_CHANNELS_LAST = 64
PAYS = 2**18  # elements from which on a second thread does
STREAM = 3 * 2**23  # bytes of a result from which on it goes past the caches, which would not keep it
LONG_RUN = 128  # elements of a run from which on, for it has few lines in part; planes of shorter ones are moved first
PLANE_COSTS = 25  # what a plane costs in itself, in elements
FORWARD_SHORT = 2048  # elements of a plane up to which it is done together with others
TOGETHER = 64  # short planes at most
BACKWARD_SHORT = 512  # longer ones take as long by themselves
AHEAD = 4096  # elements by which reading is ahead of the sums, beyond the end of a plane too
NEAR = 32768  # elements of a plane that is fetched while the one before is written: both fit the second cache
GUESS_PLACES, GUESS_LENGTH = 8, 8  # places in a tile, and elements of each, from which its mean is guessed


@_loop
def _borders(tile, shape):
    """Runs and positions of a tile, and how many elements those are."""
    tiles, runs, length, tile_runs, tile_length = shape[2:7]
    if tiles == 1:
        return 0, runs, 0, length, runs * length
    along = (length + tile_length - 1) // tile_length
    r0 = tile // along * tile_runs
    l0 = tile % along * tile_length
    r1, l1 = min(r0 + tile_runs, runs), min(l0 + tile_length, length)
    return r0, r1, l0, l1, (r1 - r0) * (l1 - l0)


@_loop
def _locate(item, shape):
    """The sample, first channel and tile of a unit: a tile of an owner, which is a plane or a group of channels."""
    channels, group, tiles = shape[:3]
    groups = (channels + group - 1) // group
    block = item // tiles
    n = block // groups
    return n, (block - n * groups) * group, item - block * tiles


@_loop
def _next(n, c, tile, shape):
    """_locate of the next unit: divisions are slow."""
    if tile + 1 < shape[2]:
        return n, c, tile + 1
    return (n, c + shape[1], 0) if c + shape[1] < shape[0] else (n + 1, 0, 0)


@_loop
def _previous(n, c, tile, shape):
    if tile:
        return n, c, tile - 1
    if c:
        return n, c - shape[1], shape[2] - 1
    return n - 1, (shape[0] - 1) // shape[1] * shape[1], shape[2] - 1


@_loop
def _start(i, n, c, r, places, runs):
    """Where a run of the i-th array begins."""
    return np.uint64(n * places[i, 0] + c * places[i, 1] + runs[i, r])


@_loop
def _coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd):
    """How z follows from x in a plane: (x * unit - m) * scale + shift."""
    unit, r = unit_of(mean[n, c], rstd[n, c])
    scale = r * weight[n * param_strides[0] + c * param_strides[1]]
    return (
        unit,
        mean[n, c] * unit,
        scale,
        bias[n * param_strides[2] + c * param_strides[3]] - mean_lo[n, c] * unit * scale,
    )


@_loop
def _mean_run(x, o, lo, hi, share, zero):
    """The mean of a few elements, each of which is made smaller first: their sum may be too large."""
    total = zero
    for i in range(lo, hi):
        total = add(total, widen(x[o + i]) * share)
    return total


@_loop
def _centred_run(x, o, lo, hi, mean, mean_lo, zero):
    total = sum_sq = zero
    for i in range(lo, hi):
        c = (widen(x[o + i]) - mean) - mean_lo
        total = add(total, c)
        sum_sq = add(sum_sq, c * c)
    return total, sum_sq


@_loop
def _fetch(x, o, lo, hi):
    """Have a piece of a run brought near that will be read soon: the processor by itself stops at each page."""
    for i in range(lo, hi, line_of(x[0])):
        prefetch(x, o + np.uint64(i))


@_loop
def _centred(x, o, run, shape, tile, mean, mean_lo, zero):
    """The sums of a tile's centred values and of their squares."""
    r0, r1, l0, l1, _ = _borders(tile, shape)
    total = sum_sq = 0.0
    for r in range(r0, r1):
        at = np.uint64(o + run[r])
        for lo in range(l0, l1, PARTIAL):
            hi = min(lo + PARTIAL, l1)
            _fetch(x, at + np.uint64(AHEAD), lo, hi)
            s, q = _centred_run(x, at, np.uint64(lo), np.uint64(hi), mean, mean_lo, zero)
            total += s
            sum_sq += q
    return total, sum_sq


@_loop
def _guess_place(i, tile, shape):
    """Of PIECES places in a tile the i-th: its run and its first position, PIECE before the end or further."""
    r0, r1, l0, l1, _ = _borders(tile, shape)
    return r0 + (r1 - r0) * i // GUESS_PLACES, l0 + max(l1 - l0 - GUESS_LENGTH, 0) * i // (GUESS_PLACES - 1)


@_loop
def _guess(x, o, run, shape, tile):
    """The mean of some elements of a tile, which is rarely far from that of all."""
    _, _, l0, l1, _ = _borders(tile, shape)
    size = min(l1 - l0, GUESS_LENGTH)
    total = 0.0
    for i in range(GUESS_PLACES):
        r, lo = _guess_place(i, tile, shape)
        at = np.uint64(o + run[r])
        for j in range(np.uint64(lo), np.uint64(lo + size)):
            total = add(total, np.float64(widen(x[at + j])))
    return total / (size * GUESS_PLACES)


@_loop
def _guess_channels(x, o, k, run, shape, tile, width, mean):
    """_guess for channels side by side: of one position in each place."""
    mean[:] = 0
    for i in range(GUESS_PLACES):
        r, lo = _guess_place(i, tile, shape)
        at = np.uint64(o + run[r]) + np.uint64(lo) * k
        for j in range(width):
            mean[j] += widen(x[at + j])
    for j in range(width):
        mean[j] /= GUESS_PLACES


@_rare
def _moments_float64(x, o, k, run, shape, tile):
    """A tile's mean, what is lacking, and its squares about both, all in float64: for squares that float32 has not."""
    r0, r1, l0, l1, count = _borders(tile, shape)
    mean = total = sum_sq = 0.0
    for _ in range(2):
        mean += total / count
        total = sum_sq = 0.0
        for r in range(r0, r1):
            for i in range(np.uint64(l0), np.uint64(l1)):
                c = np.float64(widen(x[np.uint64(o + run[r]) + i * k])) - mean
                total += c
                sum_sq += c * c
    return mean, total / count, sum_sq - total * (total / count)


@_loop
def _moments(x, o, run, shape, tile, mean, zero, count, least):
    """A tile's mean as a number in computing precision and what is lacking, and its squares about both, from a guess.

    sum c**2 - count * mean_lo**2 loses a bit at most if mean_lo is within the deviation. Else the guess was bad, or the
    mean's rounding is most of what is left in a nearly constant tile: once more about the mean, then without its
    rounding.
    """
    mean_lo = zero
    total = sum_sq = excess = 0.0
    for attempt in range(3):
        total, sum_sq = _centred(x, o, run, shape, tile, mean, mean_lo, zero)
        excess = total / count
        if not total * excess > 0.5 * sum_sq:
            break
        if attempt == 0:
            mean = typed(mean + excess, zero)
        elif attempt == 1:
            mean_lo = typed(excess, zero)
    if not least * count <= sum_sq < math.inf:
        exact, exact_lo, sum_sq = _moments_float64(x, o, np.uint64(1), run, shape, tile)
        mean = typed(exact, zero)
        return mean, (exact - mean) + exact_lo, sum_sq
    return mean, mean_lo + excess, sum_sq - total * excess


@_loop
def _reduce_forward_rows(x, place, run, shape, first, last, zero, least, means, means_lo, m2s):
    n, c, tile = _locate(first, shape)
    for item in range(last - first):
        o = n * place[0] + c * place[1]
        guess = typed(_guess(x, o, run, shape, tile), zero)
        count = _borders(tile, shape)[4]
        means[item], means_lo[item], m2s[item] = _moments(x, o, run, shape, tile, guess, zero, count, least)
        n, c, tile = _next(n, c, tile, shape)


@_loop
def _reduce_forward_channels(x, place, run, shape, first, last, zero, least, means, means_lo, m2s):
    """_guess and _moments of channels side by side."""
    channels, group = shape[:2]
    k = np.uint64(place[2])
    mean, mean_lo, a, b = np.empty((4, group), zero.dtype)
    total, sum_sq = np.empty((2, group))
    n, c, tile = _locate(first, shape)
    for item in range(last - first):
        width = np.uint64(min(group, channels - c))
        o = n * place[0] + c
        r0, r1, l0, l1, count = _borders(tile, shape)
        _guess_channels(x, o, k, run, shape, tile, width, total)
        for j in range(width):
            mean[j], mean_lo[j] = total[j], zero[0]
        for attempt in range(3):
            total[:] = 0
            sum_sq[:] = 0
            for r in range(r0, r1):
                for lo in range(l0, l1, PARTIAL_CHANNELS_LAST):
                    a[:] = zero[0]
                    b[:] = zero[0]
                    for i in range(lo, min(lo + PARTIAL_CHANNELS_LAST, l1)):
                        at = np.uint64(o + run[r]) + np.uint64(i) * k
                        for j in range(width):
                            d = (widen(x[at + j]) - mean[j]) - mean_lo[j]
                            a[j] += d
                            b[j] += d * d
                    for j in range(width):
                        total[j] += a[j]
                        sum_sq[j] += b[j]
            again = False
            for j in range(width):
                excess = total[j] / count
                if total[j] * excess > 0.5 * sum_sq[j] and attempt < 2:
                    again = True
                    if attempt == 0:
                        mean[j] += excess
                    else:
                        mean_lo[j] = excess
            if not again:
                break
        for j in range(width):
            excess = total[j] / count
            means[item * group + j] = mean[j]
            means_lo[item * group + j] = mean_lo[j] + excess
            m2s[item * group + j] = sum_sq[j] - total[j] * excess
            if not least * count <= sum_sq[j] < math.inf:
                at = item * group + j
                means[at], means_lo[at], m2s[at] = _moments_float64(x, o + j, k, run, shape, tile)
        n, c, tile = _next(n, c, tile, shape)


@_loop
def _counts(shape):
    """The elements of each tile."""
    counts = np.empty(shape[2], np.int64)
    for tile in range(shape[2]):
        counts[tile] = _borders(tile, shape)[4]
    return counts


@_loop
def _join_forward(shape, counts, first, last, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance):
    """Tiles are merged with Chan, Golub, LeVeque 1983, eq. 2.1, means as distances from the first one's."""
    channels, group, tiles = shape[:3]
    inverse_count = 1 / shape[8]
    n, c, _ = _locate(first * tiles, shape)
    for block in range(last - first):
        for j in range(min(group, channels - c)):
            at = block * tiles * group + j
            pooled, m2, count = means_lo[at], m2s[at], counts[0]
            for tile in range(1, tiles):
                more = counts[tile]
                share = more / (count + more)
                distance = (means[at + tile * group] - means[at]) + means_lo[at + tile * group] - pooled
                pooled += distance * share
                m2 += m2s[at + tile * group] + distance * distance * (count * share)
                count += more
            var = 0.0 if m2 <= 0 else m2 * inverse_count  # NaN stays
            mean[n, c + j] = means[at] + pooled
            mean_lo[n, c + j] = (means[at] - mean[n, c + j]) + pooled
            rstd[n, c + j] = 1 / math.sqrt(var + eps)
            if variance.size:
                variance[n, c + j] = var
        c += group
        if c >= channels:
            n, c = n + 1, 0


@_loop
def _result_run(like, x, y, res, offsets, lo, hi, residual, act, unit, m, scale, intercept):
    """y of a piece of a run of one plane."""
    o0, o1, o2 = offsets
    for i in range(lo, hi):
        z = scaled(widen(x[o0 + i]), unit, m) * scale + intercept
        if residual is not None:
            z = z + widen(res[o2 + i])
        y[o1 + i] = narrow(activate(z, act), like)


@_loop
def _apply_forward_rows(
    like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, follows, buffer,
):  # fmt: skip
    """Where a plane follows, x is fetched there: reading would idle while this writes."""
    away = np.uint64(places[0, 1])
    streams = shape[7]
    zero = np.uint64(0)
    n, c, tile = _locate(last - 1, shape)
    for _ in range(last - first):  # what was read last is still in the cache
        r0, r1, l0, l1, _ = _borders(tile, shape)
        unit, m, scale, intercept = _coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd)
        for r in range(r0, r1):
            o0 = _start(0, n, c, r, places, runs)
            o1 = _start(1, n, c, r, places, runs)
            o2 = _start(-1, n, c, r, places, runs)
            if inplace is not None:
                o1 = o0
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                if follows:
                    _fetch(x, o0 + away, lo, hi)
                if streams:
                    at, size = np.uint64(lo), np.uint64(hi - lo)
                    _result_run(
                        like, x, buffer, res, (o0 + at, zero, o2 + at), zero, size, residual, act,
                        unit, m, scale, intercept,
                    )  # fmt: skip
                    stream(buffer, size, y, o1 + at)
                else:
                    _result_run(
                        like, x, y, res, (o0, o1, o2), np.uint64(lo), np.uint64(hi), residual, act,
                        unit, m, scale, intercept,
                    )  # fmt: skip
        n, c, tile = _previous(n, c, tile, shape)


@_loop
def _coefficients_of_channels(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table):
    """_plane of a group of channels, side by side."""
    for j in range(width):
        table[0, j], table[1, j], table[2, j], table[3, j] = _coefficients(
            n, c + j, weight, bias, param_strides, mean, mean_lo, rstd
        )


@_loop
def _apply_forward_channels(
    like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd,
):  # fmt: skip
    k0, k1, k2 = np.uint64(places[0, 2]), np.uint64(places[1, 2]), np.uint64(places[-1, 2])
    table = np.empty((4, shape[1]), mean.dtype)
    unit, m, scale, intercept = table
    n, c, tile = _locate(last - 1, shape)
    for _ in range(last - first):
        width = min(shape[1], shape[0] - c)
        _coefficients_of_channels(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table)
        r0, r1, l0, l1, _ = _borders(tile, shape)
        for r in range(r0, r1):
            b0 = _start(0, n, c, r, places, runs)
            b1 = _start(1, n, c, r, places, runs)
            b2 = _start(-1, n, c, r, places, runs)
            for i in range(np.uint64(l0), np.uint64(l1)):
                o0, o1, o2 = b0 + i * k0, b1 + i * k1, b2 + i * k2
                if inplace is not None:
                    o1 = o0
                for j in range(np.uint64(width)):
                    z = scaled(widen(x[o0 + j]), unit[j], m[j]) * scale[j] + intercept[j]
                    if residual is not None:
                        z = z + widen(res[o2 + j])
                    y[o1 + j] = narrow(activate(z, act), like)
        n, c, tile = _previous(n, c, tile, shape)


@_loop
def _at_a_time(size):
    """How many short planes are done together: 16 to 32 KB, which the first cache holds."""
    return max(4, min(TOGETHER, 4096 // np.int64(size)))


@_loop
def _short_planes(first, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept):
    """Where `planes` planes from the first on begin in each array, and their weights and biases, side by side."""
    n, c, _ = _locate(first, shape)
    j = 0
    while j < planes:
        alike = min(planes - j, shape[0] - c)  # channels of a sample
        for i in range(len(places)):
            start = n * places[i, 0] + c * places[i, 1]
            for k in range(alike):
                offsets[i, j + k] = np.uint64(start + k * places[i, 1])
        for k in range(alike):
            scale[j + k] = weight[n * param_strides[0] + (c + k) * param_strides[1]]
            intercept[j + k] = bias[n * param_strides[2] + (c + k) * param_strides[3]]
        j += alike
        n, c = n + 1, 0


@_loop
def _middle(size):
    """From where to where a short plane's mean is guessed from: 64 elements at most, since borders are often 0."""
    count = min(size, np.uint64(64))
    lo = (size - count) // np.uint64(2)
    return lo, lo + count


@_loop
def _forward_short_rows(
    like, x, y, res, places, run, shape, inplace, residual, act, first, last,
    eps, least, weight, bias, param_strides, mean, mean_lo, rstd, variance,
):  # fmt: skip
    """All of the forward for planes so short that what is done once for each counts: it is done for many at a time."""
    size, count, zero = np.uint64(shape[4]), typed(shape[4], zero_of(like)), zero_of(like)
    # Planes of 4 x 4 are frequent, and a quarter faster by loops whose length is known.
    origin, sixteen = np.uint64(0), np.uint64(16)
    m, d, q, r, unit, scale, intercept = np.zeros((7, TOGETHER), mean.dtype)
    offsets = np.empty((len(places), TOGETHER), np.uint64)
    exact = np.empty(TOGETHER)
    lowest, highest = typed(least * shape[4], zero), typed(math.inf, zero)
    lo, hi = _middle(size)
    inverse_middle = typed(1 / (hi - lo), zero)
    most = _at_a_time(size)
    for start in range(first, last, most):
        planes = min(most, last - start)
        _short_planes(start, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept)
        for j in range(planes):
            if size == sixteen:
                m[j] = _mean_run(x, offsets[0, j], origin, sixteen, inverse_middle, zero)
            else:
                m[j] = _mean_run(x, offsets[0, j], lo, hi, inverse_middle, zero)
        for j in range(planes):
            if size == sixteen:
                _fetch(x, offsets[0, j] + np.uint64(AHEAD), origin, sixteen)
                d[j], q[j] = _centred_run(x, offsets[0, j], origin, sixteen, m[j], zero, zero)
            else:
                _fetch(x, offsets[0, j] + np.uint64(AHEAD), origin, size)
                d[j], q[j] = _centred_run(x, offsets[0, j], origin, size, m[j], zero, zero)
        for j in range(TOGETHER):
            share = d[j] / count
            r[j] = typed(0.5, zero) * q[j] - d[j] * share
            q[j] -= d[j] * share
            r[j] = r[j] if lowest <= q[j] < highest else typed(-1, zero)
            d[j] = share
        again = False
        for j in range(planes):
            if r[j] < zero:
                if not again:
                    again = True
                    for i in range(TOGETHER):  # slices of arrays take a second to compile
                        exact[i] = -1
                m[j], d[j], exact[j] = _moments(x, np.int64(offsets[0, j]), run, shape, 0, m[j], zero, shape[4], least)
                q[j] = exact[j]
        for j in range(TOGETHER):  # the mean is moved to the number next to it, by Knuth's exact sum
            total = m[j] + d[j]
            part = total - m[j]
            d[j] = (m[j] - (total - part)) + (d[j] - part)
            m[j] = total
            q[j] = (zero if q[j] <= zero else q[j]) / count
            r[j] = typed(1, zero) / typed(math.sqrt(q[j] + typed(eps, zero)), zero)
        if again:
            for j in range(planes):
                if exact[j] >= 0:  # which may be more than q can hold
                    r[j] = 1 / math.sqrt(exact[j] / shape[4] + eps)
        for j in range(planes):
            mean[start + j], mean_lo[start + j], rstd[start + j] = m[j], d[j], r[j]
        if variance.size:
            for j in range(planes):
                variance[start + j] = q[j]
        for j in range(TOGETHER):  # _plane
            unit[j], r[j] = unit_of(m[j], r[j])
            m[j] *= unit[j]
            scale[j] *= r[j]
            intercept[j] -= d[j] * unit[j] * scale[j]
        for j in range(planes):
            o0, o1, o2 = offsets[0, j], offsets[1, j], offsets[-1, j]
            if inplace is not None:
                o1 = o0
            at, values = (o0, o1, o2), (unit[j], m[j], scale[j], intercept[j])
            if size == sixteen:
                _result_run(like, x, y, res, at, origin, sixteen, residual, act, *values)
            else:
                _result_run(like, x, y, res, at, origin, size, residual, act, *values)


@_kernel
def _forward_tiles(queue, like, at, places, runs, shape, channels_last, least, means, means_lo, m2s):
    x, group = memory(at[0], like), shape[1]
    first, last = next_tasks(queue)
    while first < last:
        start = shape[9] + first * group
        sums = means[start:], means_lo[start:], m2s[start:]
        if channels_last is None:
            _reduce_forward_rows(x, places[0], runs[0], shape, first, last, zero_of(like), least, *sums)
        else:
            _reduce_forward_channels(x, places[0], runs[0], shape, first, last, zeros_of(like), least, *sums)
        first, last = task_done(queue)
    return own_address()


@_kernel
def _forward_join(shape, counts, first, last, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance):
    _join_forward(shape, counts, first, last, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance)


@_kernel
def _forward_results(
    queue, like, at, places, runs, shape, channels_last, inplace, residual, act,
    weight, bias, param_strides, mean, mean_lo, rstd,
):  # fmt: skip
    x = memory(at[0], like)
    y = x if inplace is not None else memory(at[1], like)
    res = memory(at[-1], like)
    buffer = np.empty(PARTIAL, y.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None:
            _apply_forward_rows(
                like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, False, buffer,
            )  # fmt: skip
        else:
            _apply_forward_channels(
                like, x, y, res, places, runs, shape, inplace, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd,
            )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


@_kernel
def _forward_planes(
    queue, like, at, places, runs, shape, channels_last, inplace, residual, act,
    eps, least, weight, bias, param_strides, mean, mean_lo, rstd, variance,
):  # fmt: skip
    x = memory(at[0], like)
    y = x if inplace is not None else memory(at[1], like)
    res = memory(at[-1], like)
    tiles, counts = shape[2], _counts(shape)
    means, means_lo, m2s = np.empty((3, tiles * shape[1]))
    buffer = np.empty(PARTIAL, y.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None and shape[3] == 1 and shape[4] <= FORWARD_SHORT:
            _forward_short_rows(
                like, x, y, res, places, runs[0], shape, inplace, residual, act, first, last,
                eps, least, weight, bias, param_strides, mean.ravel(), mean_lo.ravel(), rstd.ravel(), variance.ravel(),
            )  # fmt: skip
            last = first
        for block in range(first, last):
            u0, u1 = block * tiles, (block + 1) * tiles
            follows = block + 1 < last and shape[3] * shape[4] <= NEAR
            if channels_last is None:
                _reduce_forward_rows(x, places[0], runs[0], shape, u0, u1, zero_of(like), least, means, means_lo, m2s)
            else:
                _reduce_forward_channels(
                    x, places[0], runs[0], shape, u0, u1, zeros_of(like), least, means, means_lo, m2s
                )
            _join_forward(shape, counts, block, block + 1, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance)
            if channels_last is None:
                _apply_forward_rows(
                    like, x, y, res, places, runs, shape, inplace, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, follows, buffer,
                )  # fmt: skip
            else:
                _apply_forward_channels(
                    like, x, y, res, places, runs, shape, inplace, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd,
                )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


@_loop
def _gradient_at(x, dy, res, o0, o2, o3, residual, act, unit, m, scale, intercept):
    """g, and x - mean in the plane's unit."""
    centred = scaled(widen(x[o0]), unit, m)
    z = centred * scale + intercept
    if residual is not None:
        z = z + widen(res[o3])
    return times_slope(widen(dy[o2]), z, act), centred


@_loop
def _sums_run(x, dy, res, offsets, lo, hi, residual, act, zero, unit, m, scale, intercept):
    """Sums of g and of g times what is centred, of a piece of a run of one plane."""
    o0, o2, o3 = offsets
    total = dot = zero
    for i in range(lo, hi):
        g, centred = _gradient_at(x, dy, res, o0 + i, o2 + i, o3 + i, residual, act, unit, m, scale, intercept)
        total = add(total, g)
        dot = add(dot, g * centred)
    return total, dot


@_loop
def _reduce_backward_rows(
    like, x, dy, res, places, runs, shape, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
):  # fmt: skip
    zero = zero_of(like)
    n, c, tile = _locate(first, shape)
    for item in range(last - first):
        r0, r1, l0, l1, _ = _borders(tile, shape)
        u, m, scale, intercept = _coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd)
        total = dot = 0.0
        for r in range(r0, r1):
            o0 = _start(0, n, c, r, places, runs)
            o2 = _start(2, n, c, r, places, runs)
            o3 = _start(-2, n, c, r, places, runs)
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                _fetch(x, o0 + np.uint64(AHEAD), lo, hi)
                _fetch(dy, o2 + np.uint64(AHEAD), lo, hi)
                s, q = _sums_run(
                    x, dy, res, (o0, o2, o3), np.uint64(lo), np.uint64(hi), residual, act, zero,
                    u, m, scale, intercept,
                )  # fmt: skip
                total += s
                dot += q
        totals[item] = total
        dots[item] = dot
        n, c, tile = _next(n, c, tile, shape)


@_loop
def _reduce_backward_channels(
    like, x, dy, res, places, runs, shape, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
):  # fmt: skip
    group, zeros = shape[1], zeros_of(like)
    k0, k2, k3 = np.uint64(places[0, 2]), np.uint64(places[2, 2]), np.uint64(places[-2, 2])
    table = np.empty((4, group), mean.dtype)
    u, m, scale, intercept = table
    a, b = np.empty((2, group), mean.dtype)
    n, c, tile = _locate(first, shape)
    for item in range(last - first):
        width = min(group, shape[0] - c)
        _coefficients_of_channels(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table)
        r0, r1, l0, l1, _ = _borders(tile, shape)
        at = item * group
        totals[at : at + width] = 0
        dots[at : at + width] = 0
        for r in range(r0, r1):
            b0 = _start(0, n, c, r, places, runs)
            b2 = _start(2, n, c, r, places, runs)
            b3 = _start(-2, n, c, r, places, runs)
            for lo in range(l0, l1, PARTIAL_CHANNELS_LAST):
                a[:] = zeros[0]
                b[:] = zeros[0]
                for i in range(np.uint64(lo), np.uint64(min(lo + PARTIAL_CHANNELS_LAST, l1))):
                    o0, o2, o3 = b0 + i * k0, b2 + i * k2, b3 + i * k3
                    for j in range(np.uint64(width)):
                        g, centred = _gradient_at(
                            x, dy, res, o0 + j, o2 + j, o3 + j, residual, act, u[j], m[j], scale[j], intercept[j]
                        )
                        a[j] += g
                        b[j] += g * centred
                for j in range(width):
                    totals[at + j] += a[j]
                    dots[at + j] += b[j]
        n, c, tile = _next(n, c, tile, shape)


@_loop
def _join_backward(shape, first, last, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat):
    channels, group, tiles = shape[:3]
    n, c, _ = _locate(first * tiles, shape)
    for block in range(last - first):
        for j in range(min(group, channels - c)):
            at = block * tiles * group + j
            total = dot = 0.0
            for tile in range(tiles):
                total += totals[at + tile * group]
                dot += dots[at + tile * group]
            sum_g[n, c + j] = total
            unit, r = unit_of(mean[n, c + j], rstd[n, c + j])
            sum_g_xhat[n, c + j] = (dot - total * (mean_lo[n, c + j] * unit)) * r
        c += group
        if c >= channels:
            n, c = n + 1, 0


@_loop
def _slope_and_constant(shape, unit, r, mean_lo, sum_g, sum_g_xhat):
    """dx = (g + (centred * slope + constant)) * scale * unit, with rstd as r in the unit."""
    count = typed(shape[8], r)
    slope = -(sum_g_xhat / count * r)
    return slope, -(sum_g / count) - mean_lo * unit * slope


@_loop
def _slopes(n, c, shape, mean, mean_lo, rstd, sum_g, sum_g_xhat):
    unit, r = unit_of(mean[n, c], rstd[n, c])
    return _slope_and_constant(shape, unit, r, mean_lo[n, c], sum_g[n, c], sum_g_xhat[n, c])


@_loop
def _gradient_run(
    like, x, dx, dy, res, dres, offsets, lo, hi, residual, act, training,
    unit, m, scale, intercept, slope, constant,
):  # fmt: skip
    """dx, and a residual's gradient, of a piece of a run of one plane."""
    o0, o1, o2, o3, o4 = offsets
    for i in range(lo, hi):
        g, centred = _gradient_at(x, dy, res, o0 + i, o2 + i, o3 + i, residual, act, unit, m, scale, intercept)
        if residual is not None:
            dres[o4 + i] = narrow(g, like)
        if training is not None:
            g = g + (centred * slope + constant)
        dx[o1 + i] = narrow(g * scale * unit, like)


@_loop
def _apply_backward_rows(
    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat, follows, buffer,
):  # fmt: skip
    away, away2 = np.uint64(places[0, 1]), np.uint64(places[2, 1])
    streams = shape[7]
    zero = np.uint64(0)
    n, c, tile = _locate(last - 1, shape)
    for _ in range(last - first):
        r0, r1, l0, l1, _ = _borders(tile, shape)
        unit, m, scale, intercept = _coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd)
        slope, constant = _slopes(n, c, shape, mean, mean_lo, rstd, sum_g, sum_g_xhat)
        for r in range(r0, r1):
            o0 = _start(0, n, c, r, places, runs)
            o1 = _start(1, n, c, r, places, runs)
            o2 = _start(2, n, c, r, places, runs)
            o3 = _start(-2, n, c, r, places, runs)
            o4 = _start(-1, n, c, r, places, runs)
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                if follows:
                    _fetch(x, o0 + away, lo, hi)
                    _fetch(dy, o2 + away2, lo, hi)
                if streams:
                    at, size = np.uint64(lo), np.uint64(hi - lo)
                    _gradient_run(
                        like, x, buffer, dy, res, dres, (o0 + at, zero, o2 + at, o3 + at, o4 + at), zero, size,
                        residual, act, training,
                        unit, m, scale, intercept, slope, constant,
                    )  # fmt: skip
                    stream(buffer, size, dx, o1 + at)
                else:
                    _gradient_run(
                        like, x, dx, dy, res, dres, (o0, o1, o2, o3, o4), np.uint64(lo), np.uint64(hi),
                        residual, act, training,
                        unit, m, scale, intercept, slope, constant,
                    )  # fmt: skip
        n, c, tile = _previous(n, c, tile, shape)


@_loop
def _apply_backward_channels(
    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    k0, k1, k2 = np.uint64(places[0, 2]), np.uint64(places[1, 2]), np.uint64(places[2, 2])
    k3, k4 = np.uint64(places[-2, 2]), np.uint64(places[-1, 2])
    table = np.empty((4, shape[1]), mean.dtype)
    unit, m, scale, intercept = table
    slope, constant = np.empty((2, shape[1]), mean.dtype)
    n, c, tile = _locate(last - 1, shape)
    for _ in range(last - first):
        width = min(shape[1], shape[0] - c)
        _coefficients_of_channels(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table)
        for j in range(width):
            slope[j], constant[j] = _slopes(n, c + j, shape, mean, mean_lo, rstd, sum_g, sum_g_xhat)
        r0, r1, l0, l1, _ = _borders(tile, shape)
        for r in range(r0, r1):
            b0 = _start(0, n, c, r, places, runs)
            b1 = _start(1, n, c, r, places, runs)
            b2 = _start(2, n, c, r, places, runs)
            b3 = _start(-2, n, c, r, places, runs)
            b4 = _start(-1, n, c, r, places, runs)
            for i in range(np.uint64(l0), np.uint64(l1)):
                o0, o1, o2, o3, o4 = b0 + i * k0, b1 + i * k1, b2 + i * k2, b3 + i * k3, b4 + i * k4
                for j in range(np.uint64(width)):
                    g, centred = _gradient_at(
                        x, dy, res, o0 + j, o2 + j, o3 + j, residual, act, unit[j], m[j], scale[j], intercept[j]
                    )
                    if residual is not None:
                        dres[o4 + j] = narrow(g, like)
                    if training is not None:
                        g = g + (centred * slope[j] + constant[j])
                    dx[o1 + j] = narrow(g * scale[j] * unit[j], like)
        n, c, tile = _previous(n, c, tile, shape)


@_loop
def _backward_short_rows(
    like, x, dx, dy, res, dres, places, shape, residual, act, training, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    """All of the backward for short planes, as _forward_short_rows."""
    size, zero = np.uint64(shape[4]), zero_of(like)
    origin, sixteen = np.uint64(0), np.uint64(16)  # as there
    unit, m, d, r, scale, intercept, total, dot = np.zeros((8, TOGETHER), mean.dtype)
    offsets = np.empty((len(places), TOGETHER), np.uint64)
    most = _at_a_time(size)
    for start in range(first, last, most):
        planes = min(most, last - start)
        _short_planes(start, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept)
        for j in range(planes):
            m[j], d[j], r[j] = mean[start + j], mean_lo[start + j], rstd[start + j]
        for j in range(TOGETHER):  # _plane
            unit[j], r[j] = unit_of(m[j], r[j])
            m[j] *= unit[j]
            scale[j] *= r[j]
            intercept[j] -= d[j] * unit[j] * scale[j]
        for j in range(planes):
            at = offsets[0, j], offsets[2, j], offsets[-2, j]
            values = unit[j], m[j], scale[j], intercept[j]
            if size == sixteen:  # for longer ones the processor reads ahead well enough by itself
                _fetch(x, at[0] + np.uint64(AHEAD), origin, sixteen)
                _fetch(dy, at[1] + np.uint64(AHEAD), origin, sixteen)
                total[j], dot[j] = _sums_run(x, dy, res, at, origin, sixteen, residual, act, zero, *values)
            else:
                total[j], dot[j] = _sums_run(x, dy, res, at, origin, size, residual, act, zero, *values)
        for j in range(TOGETHER):
            dot[j] = (dot[j] - total[j] * (d[j] * unit[j])) * r[j]
        for j in range(planes):
            sum_g[start + j], sum_g_xhat[start + j] = total[j], dot[j]
        for j in range(TOGETHER):
            dot[j], total[j] = _slope_and_constant(shape, unit[j], r[j], d[j], total[j], dot[j])
        for j in range(planes):
            at = offsets[0, j], offsets[1, j], offsets[2, j], offsets[-2, j], offsets[-1, j]
            values = unit[j], m[j], scale[j], intercept[j], dot[j], total[j]
            arrays, kinds = (like, x, dx, dy, res, dres), (residual, act, training)
            if size == sixteen:
                _gradient_run(*arrays, at, origin, sixteen, *kinds, *values)
            else:
                _gradient_run(*arrays, at, origin, size, *kinds, *values)


@_kernel
def _backward_tiles(
    queue, like, at, places, runs, shape, channels_last, residual, act,
    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
):  # fmt: skip
    x, dy, res = memory(at[0], like), memory(at[2], like), memory(at[-2], like)
    group = shape[1]
    first, last = next_tasks(queue)
    while first < last:
        start = shape[9] + first * group
        sums = totals[start:], dots[start:]
        if channels_last is None:
            _reduce_backward_rows(
                like, x, dy, res, places, runs, shape, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, *sums,
            )  # fmt: skip
        else:
            _reduce_backward_channels(
                like, x, dy, res, places, runs, shape, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, *sums,
            )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


@_kernel
def _backward_join(shape, first, last, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat):
    _join_backward(shape, first, last, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat)


@_kernel
def _backward_results(
    queue, like, at, places, runs, shape, channels_last, residual, act, training,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    x, dx, dy = memory(at[0], like), memory(at[1], like), memory(at[2], like)
    res, dres = memory(at[-2], like), memory(at[-1], like)
    buffer = np.empty(PARTIAL, dx.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None:
            _apply_backward_rows(
                like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat, False, buffer,
            )  # fmt: skip
        else:
            _apply_backward_channels(
                like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
            )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


@_kernel
def _backward_planes(
    queue, like, at, places, runs, shape, channels_last, residual, act, training,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    x, dx, dy = memory(at[0], like), memory(at[1], like), memory(at[2], like)
    res, dres = memory(at[-2], like), memory(at[-1], like)
    tiles = shape[2]
    totals, dots = np.empty((2, tiles * shape[1]))
    buffer = np.empty(PARTIAL, dx.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None and shape[3] == 1 and shape[4] <= BACKWARD_SHORT:
            _backward_short_rows(
                like, x, dx, dy, res, dres, places, shape, residual, act, training, first, last,
                weight, bias, param_strides, mean.ravel(), mean_lo.ravel(), rstd.ravel(),
                sum_g.ravel(), sum_g_xhat.ravel(),
            )  # fmt: skip
            last = first
        for block in range(first, last):
            u0, u1 = block * tiles, (block + 1) * tiles
            follows = block + 1 < last and shape[3] * shape[4] <= NEAR
            if channels_last is None:
                _reduce_backward_rows(
                    like, x, dy, res, places, runs, shape, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
                )  # fmt: skip
            else:
                _reduce_backward_channels(
                    like, x, dy, res, places, runs, shape, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
                )  # fmt: skip
            _join_backward(shape, block, block + 1, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat)
            if channels_last is None:
                _apply_backward_rows(
                    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat, follows, buffer,
                )  # fmt: skip
            else:
                _apply_backward_channels(
                    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
                )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


class _Layout:
    """What the loops have to know of arrays of a shape with given strides; cached, since calls repeat themselves.

    The arrays are x and y, then a residual; or, backward, x, dx and dy, then a residual and its gradient. The loops
    count a residual's from the end, where without one some array is too.

    Planes in one piece, or in long ones, are read where they lie, and channels side by side (`lanes`) too; others are
    moved together first, in `windows`.
    """

    def __init__(
        self, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], backward: bool,
        long_run: int | None = None,
    ):  # fmt: skip
        itemsize = dtype.itemsize
        self.like: Any = SAMPLES[dtype.name]
        self.usable = all(step % itemsize == 0 for each in strides for step in each)
        if not self.usable:
            return
        # Positions are taken in the order in which they lie in x.
        order = sorted(range(2, len(shape)), key=lambda axis: -abs(strides[0][axis]))
        stand_ins = [np.lib.stride_tricks.as_strided(np.empty(1, f"V{itemsize}"), shape, each) for each in strides]
        arrays = _merged([each.transpose(0, 1, *order) for each in stand_ins])
        n, c, *outer, length = arrays[0].shape
        runs, plane = math.prod(outer), math.prod(outer) * length
        steps = [[step // itemsize for step in a.strides] for a in arrays]
        long_run = LONG_RUN if long_run is None else long_run
        rows = all(each[-1] == 1 or length == 1 for each in steps) and (runs == 1 or length >= long_run)
        line = max(MIN_CHANNELS_COMPILED, 64 // itemsize)
        leftover = c % (line // 2)
        fit = c >= line and (leftover == 0 or (itemsize > 2 and leftover * SPARE <= c))
        channels_last = not rows and fit and all(each[1] == 1 for each in steps)
        group, positions, streams, sums = 1, TILE, False, 0
        table = np.zeros((len(arrays), 1), np.int64)
        self.windows: Windows | None = None
        if (rows or channels_last) and runs <= MOST_RUNS:
            for axis, size in enumerate(outer, 2):
                further = np.arange(size) * np.array([[each[axis]] for each in steps])
                table = (table[:, :, None] + further[:, None]).reshape(len(arrays), -1)
            if channels_last:
                group = min(c, max(line, 2 * TILE // plane // line * line), 256)
                group = max(group, -(-c // ((4 * c + 3 * group) // (4 * group))))  # rather than a quarter by itself
                positions = plane if plane * group <= 2 * TILE else max(TILE // group, 1)
            else:
                streams = length >= LONG_RUN and n * c * plane * itemsize >= STREAM
            tile_length = min(length, positions)
            tile_runs = min(max(positions // length, 1), runs)
            grid = [(runs, tile_runs), (length, tile_length)]
        else:
            self.windows = Windows(self.like, [n, c, *outer, length], steps)
            channels_last, sums = False, n * c
            runs, tile_runs, length, tile_length = 1, 1, plane, plane
            grid = [*zip(self.windows.shape, self.windows.extents, strict=True)][2:]
        self.counts = np.ones(1, np.int64)  # elements of each tile
        for size, extent in grid:
            of_axis = np.minimum(extent, size - np.arange(0, size, extent))
            self.counts = np.multiply.outer(self.counts, of_axis).ravel()
        self.tiles = len(self.counts)
        self.blocks = n * -(-c // group)
        self.group, self.channels_last, self.streams = group, channels_last, streams
        self.residual = True if len(arrays) == (5 if backward else 3) else None
        self.alike = self.windows is None and strides[0] == strides[1]  # x and y
        # Channels, those in a group, tiles; runs and elements of each, in a plane and in a tile; whether results go
        # past the caches; a plane's elements; and, where planes are moved, how many they are.
        self.shape = (c, group, self.tiles, runs, length, tile_runs, tile_length, int(streams), plane, sums)
        self.pays = n * c * (plane + PLANE_COSTS) >= PAYS
        places = np.array([[each[i] for i in (0, 1, -1)] for each in steps], np.int64)
        self.where = (places, table, self.shape, True if channels_last else None)


@lru_cache(maxsize=1024)
def _layout(*given: Any) -> _Layout | None:
    """A layout; None where its table is too large for as many to be kept."""
    layout = _Layout(*given)
    return layout if not layout.usable or layout.where[1].nbytes <= SMALL_TABLE else None


_large_layout = lru_cache(maxsize=4)(_Layout)


def _layout_of(*given: Any) -> _Layout:
    return _layout(*given) or _large_layout(*given)


#: What stands for weight, bias, and their strides over N and C where there are none.
_no_parameters = cache(lambda dtype: (np.ones(1, dtype), np.zeros(1, dtype), (0, 0, 0, 0)))
_nothing = cache(lambda dtype: np.empty((0, 0), dtype))


class _Compiled(_Work):
    """The steps as compiled loops over planes; of lanes, over groups of channels."""

    def __init__(self, call: Saved, layout: _Layout, addresses: np.ndarray):
        self.call, self.layout = call, layout
        self.blocks, self.tiles = layout.blocks, layout.tiles
        self.threads = get_num_threads() if layout.pays else 1
        self.partials = np.empty((3, self.blocks * self.tiles * layout.group if self.tiles > 1 else 0))
        self.where = (layout.like, addresses, *layout.where)
        self.dtype = dtype = call.rstd.dtype
        # A value whose type tells the loops which activation it is.
        activation = call.activation
        self.act: Any = None
        if activation is not None:
            self.act = {"relu": True, "silu": 0, "gelu": (0,)}.get(activation, dtype.type(call.negative_slope))
        parameters = _no_parameters(dtype)
        if call.weight is not None or call.bias is not None:
            parameters = self._parameters(*parameters)
        mean_lo = np.zeros_like(call.mean) if call.mean_lo is None else call.mean_lo
        self.planes = (*parameters, call.mean, mean_lo, call.rstd)

    def _parameters(self, *defaults: Any) -> tuple[Any, ...]:
        flat: list[Any] = []
        param_strides: tuple[int, ...] = ()
        for given, default in zip((self.call.weight, self.call.bias), defaults, strict=False):
            if given is None:
                flat.append(default)
                param_strides += (0, 0)
                continue
            # The loops' types tell read-only arrays from others.
            same = given.dtype == self.dtype and given.flags.carray
            array = given if same else np.array(given, self.dtype)
            flat.append(array if array.ndim == 1 else array.reshape(-1))
            param_strides += (0, 1) if array.ndim == 1 else (given.shape[1], 1)
        return *flat, param_strides

    def share(self, step: tuple[Any, tuple[Any, ...]], count: int) -> None:
        """The loops take the parts themselves: a helper that comes late, or a thread that is slow, takes fewer."""
        loop, arguments = step
        parts = 1 if self.threads == 1 else min(count, 8 * self.threads)
        queue = new_queue(count, parts, self.threads)
        share(
            lambda _, worker: loop((queue, worker), *self.where, *arguments), parts, self.threads,
            lambda: bool(drain(queue)),
        )  # fmt: skip

    def __str__(self) -> str:
        if self.layout.channels_last:
            return f"compiled loops over {self.blocks} group(s) of {self.layout.group} channels side by side"
        return f"compiled loops over {self.blocks} plane(s)"

    # Forward

    def _kind(self) -> tuple[Any, ...]:
        at = self.where[1]
        return (True if self.layout.alike and at[0] == at[1] else None, self.layout.residual, self.act)

    def forward(self, eps: float, variance: np.ndarray | None) -> None:
        kind, least = self._kind(), _least(eps)
        variance = _nothing(self.dtype) if variance is None else variance

        def join(first: int, last: int) -> None:
            shape, counts = self.layout.shape, self.layout.counts
            _forward_join(shape, counts, first, last, *self.partials, eps, *self.planes[3:], variance)

        self.run(
            (_forward_tiles, (least, *self.partials)), join, (_forward_results, (*kind, *self.planes)),
            (_forward_planes, (*kind, eps, least, *self.planes, variance)),
        )  # fmt: skip

    def normalize(self) -> None:
        self.share((_forward_results, (*self._kind(), *self.planes)), self.blocks * self.tiles)

    # Backward

    def backward(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        kind, sums = (self.layout.residual, self.act), (sum_g, sum_g_xhat)
        training = True if self.call.training else None

        def join(first: int, last: int) -> None:
            _backward_join(self.layout.shape, first, last, *self.partials[:2], *self.planes[3:], *sums)

        results = (*kind, training, *self.planes, *sums)
        self.run(
            (_backward_tiles, (*kind, *self.planes, *self.partials[:2])), join, (_backward_results, results),
            (_backward_planes, results),
        )  # fmt: skip


class _Moved(_Compiled):
    """Planes are moved together, a window of them at a time, and what comes of them is moved to its place.

    In a window they have the numbers that they have in the arrays: the loops get addresses as if all the others lay
    around them. Planes that are too large for a window are added up tile by tile first.
    """

    def __str__(self) -> str:
        return f"{super().__str__()}, moved together first"

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        if self.tiles == 1:
            self.share(whole, self.blocks)
            return
        self.share(reduce, self.blocks * self.tiles)
        # The sums of a tile of all planes lie together, but a plane's are joined.
        self.partials = self.partials.reshape(3, self.tiles, -1).transpose(0, 2, 1).reshape(3, -1)
        join(0, self.blocks)
        self.share(apply, self.blocks * self.tiles)

    def share(self, step: tuple[Any, tuple[Any, ...]], count: int) -> None:
        """Threads share the boxes; how many planes or tiles there are does not matter."""
        loop, arguments = step
        like, addresses, _, runs, shape, _ = self.where
        windows = self.layout.windows
        assert windows is not None
        boxes = windows.boxes(self.threads)
        address = loop((new_queue(0, 0, 1), 0), *self.where, *arguments)
        number = len(boxes.table)
        queue = new_queue(number, number, self.threads)
        reads = 1 if loop is _forward_tiles else len(addresses)
        writes = loop not in (_forward_tiles, _backward_tiles)

        def work(_: Iterator[int], worker: int) -> None:
            buffer = np.empty(len(addresses) * boxes.buffer_size, like.dtype)
            go_through((queue, worker), address, reads, writes, like, addresses, buffer, boxes, runs, shape, arguments)

        share(work, number, self.threads, lambda: bool(drain(queue)))


class _Rehearsal(_Compiled):
    """A call of no planes. `steps` are calls of all loops that one of its kind may go through, however many planes and
    threads there are: what is called is compiled."""

    def __init__(self, *what: Any):
        super().__init__(*what)
        self.partials = np.empty((3, 0))
        self.steps: list[Callable[[], Any]] = [partial(drain, new_queue(0, 0, 1))]
        if self.layout.windows is not None:
            self.steps += self.layout.windows.rehearsals()

    def share(self, step: tuple[Any, tuple[Any, ...]], count: int) -> None:
        loop, arguments = step
        queue = new_queue(0, 0, 1), 0
        self.steps.append(partial(loop, queue, *self.where, *arguments))
        windows = self.layout.windows
        if windows is not None:
            like, addresses, _, runs, shape, _ = self.where
            buffer = np.empty(0, like.dtype)
            self.steps.append(
                lambda: go_through(queue, 0, 0, True, like, addresses, buffer, windows.boxes(1), runs, shape, arguments)
            )

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        self.steps.append(partial(join, 0, 0))
        for step in (reduce, apply, whole):
            self.share(step, 0)


def rehearsals(
    x: Array, activation: str | None, negative_slope: float, residual: Array | None
) -> list[tuple[str, Callable[[], Any]]]:
    """What compiles the loops for calls on arrays like x, one after the other; nothing where NumPy alone does them.

    Results and dy lie as a new result does, or results in x itself. No array's contents are read or written.
    """
    if not x.size:
        return []
    found: list[tuple[str, Callable[[], Any]]] = []
    y, none = empty_like(x, np.empty), np.empty((0, x.shape[1]), math_dtype(x.dtype))

    def rehearse(what: str, training: bool, arrays: list[Array | None], backward: bool = False) -> None:
        call = Saved(x, none, none, None, None, training, none, activation, negative_slope)
        given = [array for array in arrays if array is not None]
        work = _choose(call, given, backward)
        if not isinstance(work, _Compiled):
            return
        layouts = [work.layout]
        moved = work.layout.windows is not None
        other = _Layout(x.dtype, x.shape, tuple(a.strides for a in given), backward, 1 if moved else sys.maxsize)
        if (other.windows is not None) != moved:  # runs may be longer, or shorter
            layouts.append(other)
        for layout in layouts:
            rehearsal = _Rehearsal(call, layout, work.where[1])
            if backward:
                rehearsal.backward(none, none)
            elif training:
                rehearsal.forward(0.0, None)
            else:
                rehearsal.normalize()
            found.extend((what, step) for step in rehearsal.steps)

    trained = math.prod(x.shape[2:]) > 1
    rehearse("forward", trained, [x, y, residual])  # running statistics need no other loops
    rehearse("forward in place", trained, [x, x, residual])
    gradients = [y, residual, y] if residual is not None and activation is not None else [y]
    if trained:
        rehearse("backward", True, [x, y, *gradients], backward=True)
    rehearse("backward with running statistics", False, [x, y, *gradients], backward=True)
    return found
