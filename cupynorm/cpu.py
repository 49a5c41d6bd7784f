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
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial, reduce
from typing import Any, NamedTuple

import numpy as np

from . import config, forks, halves, running
from ._checks import overlap
from ._types import (
    Array,
    DoubleGradients,
    ForwardCall,
    ForwardResult,
    Gradients,
    Saved,
    commit,
    empty_like,
    math_dtype,
)
from .backend import Backend
from .config import get_num_threads
from .memory import empty
from .threads import share

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


_wanted = config.compiled.get()
try:
    if not _wanted:
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


class CpuBackend(Backend):
    """The backend of NumPy arrays."""

    def forward(self, call: ForwardCall) -> ForwardResult:
        x, out = call.x, call.out
        y = empty_like(x, empty) if out is None else out
        planes, dtype = x.shape[:2], math_dtype(x.dtype)
        mean, rstd = np.empty(planes, dtype), np.empty(planes, dtype)
        saved = Saved(
            x, mean, rstd, call.weight, call.bias, call.use_input_stats,
            np.empty(planes, dtype) if call.use_input_stats else None, call.activation, call.negative_slope,
            call.residual, call.residual is not None, eps=call.eps,
        )  # fmt: skip
        arrays = [x, y] if call.residual is None else [x, y, call.residual]
        variance = None
        if call.use_input_stats:
            if x.size:
                variance = np.empty(planes, dtype) if call.updates else None
                _choose(saved, arrays).forward(call.eps, variance)
        else:
            assert call.running_mean is not None and call.running_var is not None
            mean[...] = call.running_mean
            with np.errstate(all="ignore"):
                rstd[...] = 1 / np.sqrt(call.running_var.astype(dtype) + dtype.type(call.eps))
            if x.size:
                _choose(saved, arrays).normalize()
        if call.activation is None:
            saved.residual = None
        update: Callable[..., None] = commit
        if variance is not None:
            count = math.prod(x.shape[2:])
            with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are answers
                exact = np.add(mean, saved.mean_lo, dtype=np.float64).mean(0)  # type: ignore[arg-type]
                unbiased = (variance * dtype.type(count / (count - 1))).mean(0, dtype=np.float64)
            update = partial(running.move, ((call.running_mean, exact), (call.running_var, unbiased)), call.momentum)
        return ForwardResult(y, saved if call.save else None, update)

    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
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
        dweight, dbias = _gradients(sums, saved.weight, saved.bias)
        return Gradients(dx, dweight, dbias, dresidual)

    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> DoubleGradients:
        x, weight = saved.x, saved.weight
        ddy, dx = empty_like(x, empty), empty_like(x, empty)
        sums = np.zeros(x.shape[:2], math_dtype(x.dtype))
        if x.size:
            # By NumPy: such calls are rare, and compiling loops for them would take seconds.
            arrays = [x, dx, dy, ddy] if ddx is None else [x, dx, dy, ddy, ddx]
            _DoubleBackward(saved, _merged(arrays), ddweight, ddbias).double_backward(sums)
        return DoubleGradients(ddy, dx, *_gradients(sums[None], weight))

    def describe(self, x: Array, *, activation: str | None, residual: bool, double_backward: bool) -> list[str]:
        if not x.size:
            return ["the CPU", "  empty, nothing is computed"]
        unused = np.empty(x.shape[:2], math_dtype(x.dtype))
        call, new = Saved(x, unused, unused, None, None, True, unused), empty_like(x, np.empty)

        def lines(work: Any) -> list[str]:
            tiles = f", each in {work.tiles} tiles, put together in a fixed order" if work.tiles > 1 else ""
            threads = f"up to {work.threads} threads" if work.threads > 1 else "one thread"
            return [f"  {work}{tiles}", f"  {threads} of {get_num_threads()}"]

        described = ["the CPU", *lines(_choose(call, [x, new]))]
        if double_backward:
            first, *more = lines(_DoubleBackward(call, _merged([x, *[new] * 4]), None, None))
            described += [f"  double backward: {first.strip()}", *more]
        return described


backend = CpuBackend()


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


# Blocks, and their distribution over threads


def _merged(arrays: list[Array]) -> list[Array]:
    """Return views (N, C, *spatial) with adjacent spatial axes merged where all arrays allow it, at least one left."""
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
    """A call and the distribution of its blocks. Subclasses implement the steps.

    A subclass sets `blocks`, `tiles` (per block) and `threads`. Each pass has the steps `reduce`, `join`, `apply` and
    `whole` (all three on one block): functions in NumPy, otherwise pairs of a compiled loop and its arguments.
    """

    blocks: int
    tiles: int
    threads: int

    def share(self, step: Any, count: int) -> None:
        """Run step over the items 0 … count - 1, divided among the threads."""

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        if self.threads == 1 or self.tiles == 1 or self.blocks >= 4 * self.threads:
            self.share(whole, self.blocks)
        else:
            self.share(reduce, self.blocks * self.tiles)
            join(0, self.blocks)
            self.share(apply, self.blocks * self.tiles)


def _address(array: np.ndarray) -> int:
    """Return the address of the first element. It follows Python's object header (see NumPy's PyArrayObject).

    __array_interface__ also has it, but takes a microsecond more. numba requires CPython, so this is safe.
    """
    return ctypes.c_size_t.from_address(id(array) + object.__basicsize__).value


def _choose(call: Saved, arrays: list[Array], backward: bool = False) -> Any:
    """Choose the implementation of a call: compiled if available and if the loops can address the arrays.

    arrays: x, y and a residual if given; backward x, dx, dy, and a residual and its gradient if given.
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


class _Stats(NamedTuple):
    """Statistics of a block's planes, as (N, C): xhat = ((x - shift) * unit - remainder) * rstd.

    unit is a power of two near 1 / deviation (see kernels/unit.cuh), or None if it is 1 for all planes, as in nearly
    all cases. shift is None if it is 0 for all planes. remainder is the remaining mean, (mean - shift) * unit.
    """

    shift: np.ndarray | None
    unit: np.ndarray | None
    remainder: np.ndarray
    rstd: np.ndarray


class _Interpreted(_Work):
    """The steps as NumPy calls. A block is an index of (N, C) and an array (planes of N, of C, positions).

    Arrays in computing precision are used in place, y and dx also for intermediate values; others are copied to
    scratch.
    """

    pays = 2**19  # elements from which on a second thread pays: waking it takes up to 50 microseconds
    buffers = 3  # scratch blocks, without the activation's

    def __init__(self, call: Saved, arrays: list[Array]):
        self.call, self.arrays, self.dtype = call, arrays, call.rstd.dtype
        self.x, self.result = arrays[:2]
        self.threads = 1 if self.x.size < self.pays else get_num_threads()
        self.limit = BLOCK_BYTES // self.dtype.itemsize
        n, c, *spatial = self.x.shape
        strides, itemsize = self.result.strides, self.result.itemsize
        self.channels_last = c >= MIN_CHANNELS and strides[1] == itemsize and strides[-1] != itemsize
        plane = self.spatial = math.prod(spatial)
        # The dtype of values computed once per plane.
        self.plane_dtype = np.dtype(np.float64) if plane > SHORT_ROW else self.dtype
        # Half if no sum is computed in higher precision.
        self.centre_ratio = CENTRE_RATIO if self.plane_dtype != self.dtype else CENTRE_RATIO / 2
        most = self.limit if self.threads == 1 else 2 * self.limit  # as threads wait for each other between NumPy calls
        self.tile: list[Index] = [()]  # the whole plane
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
        if self.tiles == 1:  # each thread has its own scratch, so it is no larger than needed
            self.buffer_size = size * max(part.stop - part.start for part in parts)
        else:
            self.buffer_size = max(self.limit, MIN_CHANNEL_TILE)
            self.partials = np.empty((4, self.tiles, n, c))
        # A ufunc copies broadcast operands into its buffer, unless the buffer is shorter than a row.
        inner = c if self.channels_last else plane
        self.ufunc_buffer = 16 if inner >= 512 else 8192

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
        parts = 1 if self.threads == 1 else min(count, self.threads * (1 if self.x.size < 8 * self.pays else 4))
        borders = [count * i // parts for i in range(parts + 1)]
        share(lambda tasks, _: self.work(step, ((borders[i], borders[i + 1]) for i in tasks)), parts, self.threads)

    def work(self, step: Callable[..., None], ranges: Iterator[tuple[int, int]]) -> None:
        """Run step on each block or tile in the ranges, in one thread."""
        scratch = np.empty(
            (self.buffers + _scratch(self.call.activation), min(self.x.size, self.buffer_size)), self.dtype
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
        return self._dots(block, _ones(self.dtype))

    def _dots(self, a: np.ndarray, b: np.ndarray, scratch: np.ndarray | None = None) -> np.ndarray:
        """Return the dot product of each plane of a with the plane of b, or with a row of ROW elements."""
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

    def _stats(self, planes: Index) -> _Stats:
        """Return the statistics of a block's planes, the same in both passes.

        The shift is the mean of a plane if that is large compared with the deviation (rstd includes eps), else 0. With
        running statistics the values of a plane are unknown, and the shift is always the mean.
        """
        call = self.call
        mean, rstd = call.mean[planes], call.rstd[planes]
        shift = mean
        if call.training:  # mean**2 > ratio**2 * variance, where 1 / rstd**2 is variance + eps
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
        return _Stats(shift if shift.any() else None, unit, remainder, rstd)

    def _moments(self, x: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean, mean_lo and variance of a block's planes, as (N, C).

        They follow from the sums of x - shift and of its squares, which cancel if the mean is far from the shift. The
        shift is 0 at first, then, for such planes, the mean found so far; once more for a plane so nearly constant that
        this is not the number nearest to its mean.
        """
        size = x.shape[2]
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
        """Return the planes of an item's block, the index of its tile, and the number of the tile."""
        block, tile = divmod(item, self.tiles)
        return self.planes[block], self.planes[block] + self.tile[tile], tile

    def reduce_forward(self, item: int, scratch: np.ndarray) -> None:
        planes, index, tile = self._index(item)
        x = self._read(self.x, index, scratch[X])
        mean, mean_lo, variance = self._moments(x, scratch)
        for each, value in zip(self.partials, (mean, mean_lo, variance * x.shape[2], x.shape[2]), strict=True):
            each[(tile, *planes)] = value

    def join_forward(self, first: int, last: int) -> None:
        """Merge tiles in float64 by Chan, Golub, LeVeque 1983, eq. 2.1, with means relative to the first tile's."""
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
        if variance.dtype != self.plane_dtype:  # values may be out of range of plane_dtype
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
        x = self._read(self.x, index, scratch[X])
        self._store_stats(planes, *self._moments(x, scratch))
        self._finish(index, planes, x, scratch)

    # Backward

    def backward(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        self.sum_g, self.sum_g_xhat = sum_g, sum_g_xhat
        self.work_in_result = not overlap(self.result, self.arrays[2])
        self.run(self.reduce_backward, self.join_backward, self.apply_backward, self.whole_backward)

    def _load(self, index: Index, planes: Index, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return g (in scratch if it is not dy itself) and x."""
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
        """Return (x - shift) * unit: x itself if nothing changes, else in out, which may be x."""
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
        """Compute dx = scale * (g - xhat * mean(g * xhat) - mean(g)), in place, beginning with x."""
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
    """The double backward; arrays are x, dx, dy, ddy and, if given, ddx.

    With v = rstd * (ddx - mean(ddx)) and g = dy - mean(dy), all factors have the magnitude of some result:

        ddy = weight * v + q * xhat + ddbias,   q = ddweight - weight * a
        dx = rstd * (q * g - weight * c * v + r * xhat),   r = weight * (a * c - s) - q * c

    with a = mean(v * xhat), c = mean(g * xhat), s = mean(v * g) - a * c. With running statistics no mean is subtracted,
    and a, c and s are 0. The rounded mean, the shift, is subtracted first, so that a large mean costs no digits; then
    the remainder.
    """

    buffers = 5  # xhat, g, v, a product, and a result that cannot be computed in place

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
        """Return (array - centres) * scale of a block, in scratch; None without an array."""
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
        """Return xhat, g and v of a block, the last two minus their shifts; v is None without ddx."""
        return (
            self._xhat(index, planes, scratch[X]),
            self._scaled(self.g, index, scratch[G], shifts[:1]),
            self._scaled(self.u, index, scratch[V], shifts[1:], self.call.rstd[planes]),
        )

    def _about_mean(self, array: Array, index: Index, buffer: np.ndarray) -> tuple[Any, Any, Any]:
        """Return a block minus its shifts (the rounded means of its planes), the shifts, and the sums of the result."""
        if array is None:
            return None, 0.0, 0.0
        block = self._read(array, index, buffer, copy=True)
        shift = (self._sums(block) / block.shape[2]).astype(self.dtype, copy=False)
        self._each(np.subtract, block, shift, block)
        return block, shift, self._sums(block)

    def _reduced(self, index: Index, planes: Index, scratch: np.ndarray) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return xhat, g and v of a tile, relative to its own shifts, and its partials for `_joined`."""
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
        """Merge the tiles' partials in float64: shifts and remainders of g and u, remainder of xhat, and a, c and s.

        partials: count, sum of xhat, shift and remaining sum of g, the same of u, and the dots g xhat, v xhat and v g.
        The gaps between the tiles' shifts and the means add to the dots (Chan, Golub, LeVeque 1983, for products).
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
            g = xhat = None  # q is 0, but g and xhat may be infinite
            more = []
        self._combine(self.ddy, index, scratch, [(v, weight), (xhat, q)], constant_y)
        self._combine(self.result, index, scratch, [(g, q), *more], constant, rstd)

    def _combine(
        self, array: Array, index: Index, scratch: np.ndarray, terms: Any, constant: np.ndarray, scale: Any = None
    ) -> None:
        """Compute array <- (sum of block * number over the terms + constant) * scale, with numbers per plane."""
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
    """Return the least mean square that float32 holds in full precision; 0 if eps dominates anyway."""
    return 0.0 if eps >= 1e-30 else 2.0**-100


@cache
def _ones(dtype: np.dtype) -> np.ndarray:
    return np.ones(ROW, dtype)


@lru_cache(maxsize=1024)
def _rows(size: int) -> tuple[int, int]:
    """Return length and number of a plane's rows; elements are left over if no suitable length divides size."""
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


# Activations, in place on a block z, with scratch blocks. Comparison results are converted by copies: a ufunc would
# convert them in small chunks. clip propagates NaN, and is several times as fast as maximum with a number.


def _scratch(activation: str | None) -> int:
    """Return the number of scratch blocks of an activation and its derivative."""
    return {None: 0, "relu": 1, "leaky_relu": 1}.get(activation, 3)


def _activate(z: np.ndarray, activation: str, negative_slope: float, scratch: list[np.ndarray]) -> None:
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


def _times_slope(
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


ERFCX_CENTRE = 4.0  # the |z| at which the argument of the polynomial below is 0


@cache
def half_erfcx(degree: int) -> list[float]:
    """Return the coefficients of p, highest first: 1 - Phi(z) = p((z - PIVOT) / (z + PIVOT)) exp(-z**2 / 2) for z >= 0.

    p interpolates erfc(z / sqrt(2)) exp(z**2 / 2) / 2 at Chebyshev points up to z = 37, where erfc underflows in
    float64. The argument is from Shepherd, Laframboise 1981. The coefficients decay so fast that powers are as accurate
    as Chebyshev polynomials.
    """
    from numpy.polynomial import Chebyshev, Polynomial  # keeps the import of cupynorm light

    count = degree + 1
    end = (37 - ERFCX_CENTRE) / (37 + ERFCX_CENTRE)
    # Row k is T_k at the points. Angles are reduced as integers, as reduction in floating point would round.
    angles = np.outer(np.arange(count), 2 * np.arange(count) + 1) % (4 * count)
    cosines = np.cos(np.pi / (2 * count) * angles)
    t = (cosines[1] + 1) * (end + 1) / 2 - 1
    values = [math.erfc(z / math.sqrt(2)) * math.exp(z * z / 2) / 2 for z in ERFCX_CENTRE * (1 + t) / (1 - t)]
    series = cosines @ values * 2 / count
    series[0] /= 2
    return [float(c) for c in Chebyshev(series, domain=[-1, end]).convert(kind=Polynomial).coef[::-1]]


# Compiled by numba. In the loops an array is all memory from its first element on, and offsets are unsigned, in
# elements: with signed offsets the compiler would have to handle negative indices, and would not vectorise.
#
# `like` is a sample of the stored type. `channels_last` (channels side by side), `inplace` (y is x), `residual` and
# `training` are flags: None or anything else. Each combination in use is compiled once, separately, and cached on disk.


def _loop(function: Any) -> Any:
    return function if numba is None else inlined(function)


def _rare(function: Any) -> Any:
    return function if numba is None else numba.njit(function, error_model="numpy", inline="never", **INTERNAL)


def _kernel(function: Any) -> Any:
    return function if numba is None else disk_cached(function, nogil=True)


TILE = 65536  # positions; no less than FORWARD_SHORT
MOST_RUNS = 65536  # limit of the runs of a plane read in place: each array has a table of their offsets
# With fewer channels side by side, or less than a cache line of them, planes are copied to windows first.
MIN_CHANNELS_COMPILED = 16
SPARE = 14  # likewise if more than 1 / SPARE of the channels (16 bits: any) exceeds whole half cache lines
SMALL_TABLE = 2**14  # bytes of run tables; layouts with larger tables have a smaller cache
PARTIAL = 512  # elements summed in computing precision; these sums are added in float64
PARTIAL_CHANNELS_LAST = 64
PAYS = 2**18  # elements from which on a second thread pays
STREAM = 3 * 2**23  # bytes; larger results bypass the caches, which could not hold them
LONG_RUN = 128  # elements; shorter runs do not bypass them (many partial lines), and their planes go to windows
PLANE_COSTS = 25  # the fixed cost of a plane, in elements
FORWARD_SHORT = 2048  # elements; up to so many, several planes are processed together
TOGETHER = 64  # at most so many short planes
BACKWARD_SHORT = 512  # elements; longer planes do not gain in the backward
AHEAD = 4096  # elements by which prefetching is ahead of the sums, even beyond the end of a plane
NEAR = 32768  # elements; planes up to this are prefetched while the previous one is written: both fit the L2 cache
GUESS_PLACES, GUESS_LENGTH = 8, 8  # a tile's mean is guessed from so many places, of so many elements


@_loop
def _borders(tile, shape):
    """Return the ranges of runs and of positions in a tile, and the number of elements."""
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
    """Return sample, first channel and tile of an item, a tile of a block (a plane or a group of channels)."""
    channels, group, tiles = shape[:3]
    groups = (channels + group - 1) // group
    block = item // tiles
    n = block // groups
    return n, (block - n * groups) * group, item - block * tiles


@_loop
def _next(n, c, tile, shape):
    """Return _locate of the next item without slow divisions."""
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
    """Return the offset of a run in the i-th array."""
    return np.uint64(n * places[i, 0] + c * places[i, 1] + runs[i, r])


@_loop
def _coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd):
    """Return unit, m, scale and intercept of a plane: z = (x * unit - m) * scale + intercept."""
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
    """Return the mean of a few elements; scaling each by share = 1 / count first avoids overflow."""
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
    """Prefetch a part of a run: the hardware prefetcher stops at page boundaries."""
    for i in range(lo, hi, line_of(x[0])):
        prefetch(x, o + np.uint64(i))


@_loop
def _centred(x, o, run, shape, tile, mean, mean_lo, zero):
    """Return the sums of a tile's centred values and of their squares."""
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
    """Return the run and the first position of the i-th place from which a tile's mean is guessed."""
    r0, r1, l0, l1, _ = _borders(tile, shape)
    return r0 + (r1 - r0) * i // GUESS_PLACES, l0 + max(l1 - l0 - GUESS_LENGTH, 0) * i // (GUESS_PLACES - 1)


@_loop
def _guess(x, o, run, shape, tile):
    """Guess a tile's mean from a few elements; the guess is rarely far off."""
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
    """`_guess` for channels side by side, from one position in each place."""
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
    """Return mean, mean_lo and m2 of a tile, in float64: the fallback for variances outside float32's range."""
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
    """Return mean (in computing precision), mean_lo and m2 of a tile, from a guess of the mean.

    sum c**2 - count * mean(c)**2 loses at most one bit if mean(c) is within the deviation. If it is not, the guess was
    bad: sum again about the mean. If the rounding of the mean still dominates, as in a nearly constant tile, sum a
    third time about mean + mean_lo.
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
    """`_guess` and `_moments` for channels side by side."""
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
    """Return the number of elements of each tile."""
    counts = np.empty(shape[2], np.int64)
    for tile in range(shape[2]):
        counts[tile] = _borders(tile, shape)[4]
    return counts


@_loop
def _join_forward(shape, counts, first, last, means, means_lo, m2s, eps, mean, mean_lo, rstd, variance):
    """Merge tiles by Chan, Golub, LeVeque 1983, eq. 2.1, with means relative to the first tile's."""
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
    """Compute y for a part of a run of one plane."""
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
    """Write y. If another plane follows, prefetch its x: reads would otherwise idle during the writes."""
    away = np.uint64(places[0, 1])
    streams = shape[7]
    zero = np.uint64(0)
    n, c, tile = _locate(last - 1, shape)
    for _ in range(last - first):  # backwards, as the last tile read is still in the cache
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
    """`_coefficients` of a group of channels, side by side."""
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
    """Return the number of short planes processed together: 16 to 32 KB, which the L1 cache holds."""
    return max(4, min(TOGETHER, 4096 // np.int64(size)))


@_loop
def _short_planes(first, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept):
    """Set the offsets in each array, and the weights and biases, of `planes` planes from the first on."""
    n, c, _ = _locate(first, shape)
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


@_loop
def _middle(size):
    """Return the middle range of a short plane, at most 64 elements, for guessing its mean: borders are often 0."""
    count = min(size, np.uint64(64))
    lo = (size - count) // np.uint64(2)
    return lo, lo + count


@_loop
def _forward_short_rows(
    like, x, y, res, places, run, shape, inplace, residual, act, first, last,
    eps, least, weight, bias, param_strides, mean, mean_lo, rstd, variance,
):  # fmt: skip
    """The whole forward for planes so short that per-plane work matters; it is done for many planes at a time."""
    size, count, zero = np.uint64(shape[4]), typed(shape[4], zero_of(like)), zero_of(like)
    # Planes of 4 x 4 are frequent, and a quarter faster with loops of constant length.
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
                    for i in range(TOGETHER):  # array slices take a second to compile
                        exact[i] = -1
                m[j], d[j], exact[j] = _moments(x, np.int64(offsets[0, j]), run, shape, 0, m[j], zero, shape[4], least)
                q[j] = exact[j]
        for j in range(TOGETHER):  # round m + d to the nearest number, by Knuth's exact sum
            total = m[j] + d[j]
            part = total - m[j]
            d[j] = (m[j] - (total - part)) + (d[j] - part)
            m[j] = total
            q[j] = (zero if q[j] <= zero else q[j]) / count
            r[j] = typed(1, zero) / typed(math.sqrt(q[j] + typed(eps, zero)), zero)
        if again:
            for j in range(planes):
                if exact[j] >= 0:  # exact may exceed the range of q
                    r[j] = 1 / math.sqrt(exact[j] / shape[4] + eps)
        for j in range(planes):
            mean[start + j], mean_lo[start + j], rstd[start + j] = m[j], d[j], r[j]
        if variance.size:
            for j in range(planes):
                variance[start + j] = q[j]
        for j in range(TOGETHER):  # _coefficients
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
    """Return g, and x - mean in the plane's unit."""
    centred = scaled(widen(x[o0]), unit, m)
    z = centred * scale + intercept
    if residual is not None:
        z = z + widen(res[o3])
    return times_slope(widen(dy[o2]), z, act), centred


@_loop
def _sums_run(x, dy, res, offsets, lo, hi, residual, act, zero, unit, m, scale, intercept):
    """Return the sums of g and of g * centred for a part of a run of one plane."""
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
    """Return slope and constant of dx = (g + (centred * slope + constant)) * scale * unit; r is rstd in the unit."""
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
    """Compute dx, and a residual's gradient, for a part of a run of one plane."""
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
    """The whole backward for short planes, as `_forward_short_rows`."""
    size, zero = np.uint64(shape[4]), zero_of(like)
    origin, sixteen = np.uint64(0), np.uint64(16)  # as in the forward
    unit, m, d, r, scale, intercept, total, dot = np.zeros((8, TOGETHER), mean.dtype)
    offsets = np.empty((len(places), TOGETHER), np.uint64)
    most = _at_a_time(size)
    for start in range(first, last, most):
        planes = min(most, last - start)
        _short_planes(start, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept)
        for j in range(planes):
            m[j], d[j], r[j] = mean[start + j], mean_lo[start + j], rstd[start + j]
        for j in range(TOGETHER):  # _coefficients
            unit[j], r[j] = unit_of(m[j], r[j])
            m[j] *= unit[j]
            scale[j] *= r[j]
            intercept[j] -= d[j] * unit[j] * scale[j]
        for j in range(planes):
            at = offsets[0, j], offsets[2, j], offsets[-2, j]
            values = unit[j], m[j], scale[j], intercept[j]
            if size == sixteen:  # for longer planes the hardware prefetcher suffices
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
    """The loops' parameters for arrays of one shape and given strides; cached, since calls repeat.

    The arrays are x, y and a residual if given; backward x, dx, dy, and a residual and its gradient if given. The loops
    index the residual and its gradient from the end; without a residual some other array is at that index, unused.

    Contiguous planes, planes of long runs, and channels side by side (`channels_last`) are read in place. Other planes
    are copied to `windows` first.
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
        # Positions are visited in the order of x's memory.
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
                group = max(group, -(-c // ((4 * c + 3 * group) // (4 * group))))  # avoids a small last group
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
        # Channels, channels per group, tiles; runs and their length in a plane, then in a tile; a flag for results that
        # bypass the caches; elements of a plane; and, with windows, the number of planes.
        self.shape = (c, group, self.tiles, runs, length, tile_runs, tile_length, int(streams), plane, sums)
        self.pays = n * c * (plane + PLANE_COSTS) >= PAYS
        places = np.array([[each[i] for i in (0, 1, -1)] for each in steps], np.int64)
        self.where = (places, table, self.shape, True if channels_last else None)


@lru_cache(maxsize=1024)
def _layout(*given: Any) -> _Layout | None:
    """Return a layout, or None if its table is too large for this cache."""
    layout = _Layout(*given)
    return layout if not layout.usable or layout.where[1].nbytes <= SMALL_TABLE else None


_large_layout = lru_cache(maxsize=4)(_Layout)


def _layout_of(*given: Any) -> _Layout:
    return _layout(*given) or _large_layout(*given)


#: Defaults of weight, bias, and their strides over N and C.
_no_parameters = cache(lambda dtype: (np.ones(1, dtype), np.zeros(1, dtype), (0, 0, 0, 0)))
_nothing = cache(lambda dtype: np.empty((0, 0), dtype))


class _Compiled(_Work):
    """The steps as compiled loops over planes, or over groups of channels side by side."""

    def __init__(self, call: Saved, layout: _Layout, addresses: np.ndarray):
        self.call, self.layout = call, layout
        self.blocks, self.tiles = layout.blocks, layout.tiles
        self.threads = get_num_threads() if layout.pays else 1
        self.partials = np.empty((3, self.blocks * self.tiles * layout.group if self.tiles > 1 else 0))
        self.where = (layout.like, addresses, *layout.where)
        self.dtype = dtype = call.rstd.dtype
        # A value whose type selects the activation in the loops.
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
            # A read-only array has another type, and would compile the loops again.
            same = given.dtype == self.dtype and given.flags.carray
            array = given if same else np.array(given, self.dtype)
            flat.append(array if array.ndim == 1 else array.reshape(-1))
            param_strides += (0, 1) if array.ndim == 1 else (given.shape[1], 1)
        return *flat, param_strides

    def share(self, step: tuple[Any, tuple[Any, ...]], count: int) -> None:
        """The loops take tasks from a queue: a late helper, or a slow thread, takes fewer."""
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
    """Planes are copied to windows for the loops, and results back, a window at a time.

    In a window planes keep their numbers: the loops get addresses as if all other planes lay around them. Planes too
    large for a window are summed tile by tile first.
    """

    def __str__(self) -> str:
        return f"{super().__str__()}, moved together first"

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        if self.tiles == 1:
            self.share(whole, self.blocks)
            return
        self.share(reduce, self.blocks * self.tiles)
        # From all planes' sums of each tile to all tiles' sums of each plane, which `join` expects.
        self.partials = self.partials.reshape(3, self.tiles, -1).transpose(0, 2, 1).reshape(3, -1)
        join(0, self.blocks)
        self.share(apply, self.blocks * self.tiles)

    def share(self, step: tuple[Any, tuple[Any, ...]], count: int) -> None:
        """Distribute the boxes over the threads, whatever the number of planes or tiles."""
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
    """A call without planes. Its `steps` run, and so compile, all loops that calls of its kind may use, for any number
    of planes and threads."""

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
    """Return (name, step) pairs that compile the loops for arrays like x; empty if such calls use NumPy alone.

    Results and dy are laid out like a new result, or results are x itself. No array's contents are read or written.
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
        if (other.windows is not None) != moved:  # other arrays may have longer or shorter runs
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
    rehearse("forward", trained, [x, y, residual])  # updates of running statistics use the same loops
    rehearse("forward in place", trained, [x, x, residual])
    gradients = [y, residual, y] if residual is not None and activation is not None else [y]
    if trained:
        rehearse("backward", True, [x, y, *gradients], backward=True)
    rehearse("backward with running statistics", False, [x, y, *gradients], backward=True)
    return found
