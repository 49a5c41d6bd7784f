"""The steps as loops compiled by numba: the layouts that they can read, and the calls."""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable
from functools import cache, lru_cache, reduce
from typing import Any

import numpy as np

from .._types import Saved
from ..config import get_num_threads
from .blocking import Arrays, Work, least_mean_square, merged_axes
from .numba_backward import backward_join, backward_planes, backward_results, backward_tiles
from .numba_forward import forward_join, forward_planes, forward_results, forward_tiles
from .numba_geometry import RESULT, Geometry, X
from .numba_intrinsics import SAMPLES
from .numba_moves import Windows, go_through
from .numba_tasks import TaskQueue
from .thread_pool import share

TILE = 65536  # positions; no less than numba_forward.FORWARD_SHORT
SMALL_TABLE = 1024  # runs; layouts with larger tables have a smaller cache
PAYS = 2**18  # elements from which on a second thread pays
STREAM = 3 * 2**23  # bytes; larger results bypass the caches, which could not hold them
LONG_RUN = 128  # elements; shorter runs do not bypass them (many partial lines), and their planes go to windows
PLANE_COSTS = 25  # the fixed cost of a plane, in elements
# With fewer channels side by side, or less than a cache line of them, planes are copied to windows first.
MIN_CHANNELS_COMPILED = 16
# So are planes of channels that do not fill half cache lines, unless fewer than 1 / SPARE of them are left over (of
# 16 bits: unless none is).
SPARE = 14
MOST_RUNS = 65536  # limit of the runs of a plane read in place: each array has a table of their offsets


def address_of(array: np.ndarray) -> int:
    """Return the address of the first element. It follows Python's object header (see NumPy's PyArrayObject).

    __array_interface__ also has it, but takes a microsecond more. numba requires CPython, so this is safe.
    """
    return ctypes.c_size_t.from_address(id(array) + object.__basicsize__).value


class Layout:
    """The loops' parameters for Arrays of one shape and given strides; cached, since calls repeat.

    strides: of each array, None for an absent one; in the tables of the loops x takes its place.

    Contiguous planes, planes of long runs, and channels side by side (`channels_last`) are read in place. Other planes
    are copied to `windows` first.
    """

    def __init__(
        self, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...],
        long_run: int | None = None,
    ):  # fmt: skip
        itemsize = dtype.itemsize
        self.like: Any = SAMPLES[dtype.name]
        given = Arrays(*strides)
        x_strides: tuple[int, ...] = given.x
        present = [each is not None for each in given]
        found = [x_strides if each is None else each for each in given]
        self.usable = all(step % itemsize == 0 for each in found for step in each)
        if not self.usable:
            return
        # Positions are visited in the order of x's memory.
        order = sorted(range(2, len(shape)), key=lambda axis: -abs(x_strides[axis]))
        stand_ins = [np.lib.stride_tricks.as_strided(np.empty(1, f"V{itemsize}"), shape, each) for each in found]
        arrays = merged_axes([each.transpose(0, 1, *order) for each in stand_ins])
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
            self.windows = Windows(self.like, [n, c, *outer, length], steps, present)
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
        self.alike = self.windows is None and given.x == given.result
        self.geometry = Geometry(c, group, self.tiles, runs, length, tile_runs, tile_length, int(streams), plane, sums)
        self.pays = n * c * (plane + PLANE_COSTS) >= PAYS
        self.strides = np.array([[each[i] for i in (0, 1, -1)] for each in steps], np.int64)
        self.runs = table


@lru_cache(maxsize=1024)
def _layout(*given: Any) -> Layout | None:
    """Return a layout, or None if its table is too large for this cache."""
    layout = Layout(*given)
    return layout if not layout.usable or layout.runs.shape[1] <= SMALL_TABLE else None


_large_layout = lru_cache(maxsize=4)(Layout)


def layout_of(*given: Any) -> Layout:
    return _layout(*given) or _large_layout(*given)


#: Defaults of weight, bias, and their strides over N and C.
no_parameters = cache(lambda dtype: (np.ones(1, dtype), np.zeros(1, dtype), (0, 0, 0, 0)))


nothing = cache(lambda dtype: np.empty((0, 0), dtype))


class CompiledWork(Work):
    """The steps as compiled loops over planes, or over groups of channels side by side."""

    def __init__(self, call: Saved, layout: Layout, addresses: np.ndarray):
        self.call, self.layout = call, layout
        self.blocks, self.tiles = layout.blocks, layout.tiles
        self.threads = get_num_threads() if layout.pays else 1
        self._make_partials(self.tiles > 1)
        self.addresses = addresses
        # Plain tuples: see numba_geometry.
        self.geometry = tuple(layout.geometry)
        self.where = (layout.like, addresses, layout.strides, layout.runs, self.geometry)
        self.channels_last = True if layout.channels_last else None
        self.dtype = dtype = call.rstd.dtype
        # A value whose type selects the activation in the loops.
        activation = call.activation
        self.act: Any = None
        if activation is not None:
            self.act = {"relu": True, "silu": 0, "gelu": (0,)}.get(activation, dtype.type(call.negative_slope))
        parameters = no_parameters(dtype)
        if call.weight is not None or call.bias is not None:
            parameters = self._parameters(*parameters)
        mean_lo = np.zeros_like(call.mean) if call.mean_lo is None else call.mean_lo
        self.planes = (*parameters, call.mean, mean_lo, call.rstd)

    def _make_partials(self, wanted: bool = True) -> None:
        self.partials = np.empty((3, self.blocks * self.tiles * self.layout.group if wanted else 0))

    def _by_tile(self) -> np.ndarray:
        """Return the partial sums as (3, tiles, N, C)."""
        n, c = self.call.x.shape[:2]
        by_group = self.partials.reshape(3, n, -1, self.tiles, self.layout.group)
        return by_group.transpose(0, 3, 1, 2, 4).reshape(3, self.tiles, n, -1)[..., :c]

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
        tasks = 1 if self.threads == 1 else min(count, 8 * self.threads)
        queue = TaskQueue(count, tasks, self.threads)
        share(
            lambda worker: loop((queue.numbers, worker), self.where, self.channels_last, *arguments), queue,
            min(self.threads, tasks),
        )  # fmt: skip

    def __str__(self) -> str:
        if self.layout.channels_last:
            return f"compiled loops over {self.blocks} group(s) of {self.layout.group} channels side by side"
        return f"compiled loops over {self.blocks} plane(s)"

    # Forward

    def _kind(self, backward: bool = False) -> tuple[Any, ...]:
        """Return the fields of numba_geometry.Kind."""
        inplace = not backward and self.layout.alike and self.addresses[X] == self.addresses[RESULT]
        residual = self.call.residual is not None
        training = backward and self.call.training
        return (True if inplace else None, True if residual else None, self.act, True if training else None)

    def forward(self, eps: float, variance: np.ndarray | None) -> None:
        kind, least, sums = self._kind(), least_mean_square(eps), tuple(self.partials)
        variance = nothing(self.dtype) if variance is None else variance

        def join(first: int, last: int) -> None:
            sums = tuple(self.partials)
            forward_join(self.geometry, self.layout.counts, first, last, sums, eps, self.planes, variance)

        self.run(
            (forward_tiles, (least, sums)), join, (forward_results, (kind, self.planes)),
            (forward_planes, (kind, self.planes, eps, least, variance)),
        )  # fmt: skip

    def moments(self) -> tuple[np.ndarray, ...]:
        """Return count, mean, mean_lo and m2 of each tile, (tiles, N, C)."""
        self._make_partials()
        self.share_moments()
        means, means_lo, m2s = self._by_tile()
        counts = np.broadcast_to(self.layout.counts[:, None, None], means.shape)
        return counts, means, means_lo, np.maximum(m2s, 0)  # NaN stays

    def share_moments(self) -> None:
        """Set the partial sums of all tiles."""
        self.share((forward_tiles, (least_mean_square(0), tuple(self.partials))), self.blocks * self.tiles)

    def normalize(self) -> None:
        self.share((forward_results, (self._kind(), self.planes)), self.blocks * self.tiles)

    # Backward

    def _sums_of_tiles(self, plane_sums: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Callable[[int, int], None]]:
        """Return the steps `reduce` and `join` of the backward."""

        def join(first: int, last: int) -> None:
            backward_join(self.geometry, first, last, tuple(self.partials[:2]), self.planes, plane_sums)

        return (backward_tiles, (self._kind(backward=True), self.planes, tuple(self.partials[:2]))), join

    def backward(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        results = (self._kind(backward=True), self.planes, (sum_g, sum_g_xhat))
        self.run(
            *self._sums_of_tiles((sum_g, sum_g_xhat)), (backward_results, results), (backward_planes, results)
        )  # fmt: skip

    def gradient_sums(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        self._make_partials()
        self.sum_up(*self._sums_of_tiles((sum_g, sum_g_xhat)))

    def input_gradient(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        results = (self._kind(backward=True), self.planes, (sum_g, sum_g_xhat))
        self.share((backward_results, results), self.blocks * self.tiles)


class MovedWork(CompiledWork):
    """Planes are copied to windows for the loops, and results back, a window at a time.

    In a window planes keep their numbers: the loops get addresses as if all other planes lay around them. Planes too
    large for a window are summed tile by tile first.
    """

    def __str__(self) -> str:
        return f"{super().__str__()}, moved together first"

    def _by_tile(self) -> np.ndarray:
        return self.partials.reshape(3, self.tiles, *self.call.x.shape[:2])

    def sum_up(self, reduce: Any, join: Callable[..., None]) -> None:
        self.share(reduce, self.blocks * self.tiles)
        # From all planes' sums of each tile to all tiles' sums of each plane, which `join` expects.
        self.partials = self.partials.reshape(3, self.tiles, -1).transpose(0, 2, 1).reshape(3, -1)
        join(0, self.blocks)

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        if self.tiles == 1:
            self.share(whole, self.blocks)
            return
        self.sum_up(reduce, join)
        self.share(apply, self.blocks * self.tiles)

    def share(self, step: tuple[Any, tuple[Any, ...]], count: int) -> None:
        """Distribute the boxes over the threads, whatever the number of planes or tiles."""
        loop, arguments = step
        windows = self.layout.windows
        assert windows is not None
        boxes = windows.boxes(self.threads)
        address = loop((TaskQueue(0, 0, 1).numbers, 0), self.where, None, *arguments)
        number, arrays = len(boxes.table), len(self.addresses)
        queue = TaskQueue(number, number, self.threads)
        reads = 1 if loop is forward_tiles else arrays
        writes = loop not in (forward_tiles, backward_tiles)

        def work(worker: int) -> None:
            buffer = np.empty(sum(windows.moved) * boxes.buffer_size, self.layout.like.dtype)
            go_through((queue.numbers, worker), address, self.where, buffer, boxes, reads, writes, arguments)

        share(work, queue, min(self.threads, number))


def work_of(call: Saved, arrays: Arrays) -> CompiledWork | None:
    """Return the work of a call, or None if the loops cannot address the arrays."""
    x = arrays.x
    layout = layout_of(x.dtype, x.shape, tuple([None if a is None else a.strides for a in arrays]))
    if not layout.usable:
        return None
    address = address_of(x)
    addresses = [address if a is None or a is x else address_of(a) for a in arrays]
    if reduce(operator.or_, addresses) % x.itemsize:
        return None
    return (MovedWork if layout.windows else CompiledWork)(call, layout, np.array(addresses))
