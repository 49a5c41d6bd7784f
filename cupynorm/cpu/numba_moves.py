"""Copy planes from their places in an array to a window, where they are contiguous, and back.

The unit of copying is a box: whole planes, or one tile of several planes. The loops are compiled by numba. NumPy's own
copies loop over the axis with the smallest stride of the target, which for results of three channels side by side makes
inner loops of three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from .numba_cache import inlined, kernel
from .numba_geometry import DRESIDUAL, RESULT, Geometry
from .numba_intrinsics import call, copy_row, line_of, memory, own_address, transposition
from .numba_tasks import COUNT, FINISHED, FIRST, RANGES, STARTED, TASKS, next_tasks, task_done

RESULTS = RESULT, DRESIDUAL  # the arrays written
NOTHING = np.zeros((3, 3), np.int64)  # axes of an empty box
# Up to FEW rows side by side, with steps of at most CLOSE elements within a row, have specialised loops.
FEW = 3
CLOSE = 8
AT_A_TIME = 4096  # interleaved rows are copied in parts that span so many elements
WINDOW = 2**18  # bytes of an array's window: several windows fit the L2 cache
LARGER = 4  # factor by which a window may grow to hold whole planes, which then are copied once, not also for the sums
CACHED_BOXES = 128  # boxes, about 15 KB; larger tables are not cached for the next call
FAIR = 2**14  # elements; below this, smaller windows for a better balance of the threads do not pay


class Boxes(NamedTuple):
    """All boxes of a call, at least one, for `go_through`. Boxes of one kind have the same size.

    A row of the table holds the first plane (numbered through all samples), the tile, the kind, the tile's first
    position, and the offset of the box in each array, in elements.
    """

    table: np.ndarray
    buffer_size: int  # elements of a window: those of the largest box, and space to align it to a cache line
    planes: np.ndarray  # of each kind: the number of runs of consecutive planes, and the planes in a run
    sizes: np.ndarray  # elements of a plane, or of a tile
    strides: np.ndarray  # of each kind and array, over samples and planes, as the loops see them
    moves: np.ndarray  # addresses of the functions that copy to the window and back, 0 for an array read in place
    axes: np.ndarray  # the axes that those functions take, see `_move`


class Windows:
    """Cut arrays of a shape (N, C, *spatial), with axes merged where possible, into boxes.

    Planes too large for a window are cut into tiles. If whole cache lines of all arrays allow, a tile is a contiguous
    part of the plane; arrays with contiguous planes then are read in place.

    Args:
        like: a sample of the stored type.
        shape: of the arrays.
        steps: strides of each array, in elements.
        present: whether each array is there; the others are not copied.
    """

    def __init__(self, like: Any, shape: list[int], steps: list[list[int]], present: list[bool]):
        most = self.most = WINDOW // like.itemsize
        self.like, self.shape, self.steps = like, shape, steps
        spatial = shape[2:]
        self.plane = math.prod(spatial)
        self.contiguous_steps = _contiguous_steps(spatial)
        self.moved = [here and each[2:] != self.contiguous_steps for each, here in zip(steps, present, strict=True)]
        near = [each for each, moved in zip(steps, self.moved, strict=True) if moved]
        line = 64 // like.itemsize
        #: The least extents of a box: the elements of a cache line.
        self.least = [max(parts) for parts in zip(*(_line_of(shape, each, line) for each in near), strict=True)]
        self.extents = _grown(self.least, shape, most)
        if self.extents[2:] != spatial:  # to copy planes once, not for the sums and again for the results
            larger = _grown(self.least, shape, LARGER * most)
            self.extents = larger if larger[2:] == spatial else self.extents
        outer = next(axis for axis in range(2, len(shape)) if self.extents[axis] > 1 or axis == len(shape) - 1)
        if self.extents[outer + 1 :] != shape[outer + 1 :]:
            self.moved = list(present)
        self._last: tuple[int, Boxes] | None = None

    def boxes(self, threads: int) -> Boxes:
        """Return the boxes for a number of threads."""
        last = self._last
        if last is not None and last[0] == threads:
            return last[1]
        extents = self.extents
        if threads > 1 and extents[2:] == self.shape[2:]:
            fair = max(-(-math.prod(self.shape) // (4 * threads)), FAIR)
            extents = [*_grown(self.least[:2], self.shape[:2], min(self.most, fair) // self.plane), *extents[2:]]
        boxes = self._cut(extents)
        if len(boxes.table) <= CACHED_BOXES:
            self._last = threads, boxes
        return boxes

    def _cut(self, extents: list[int]) -> Boxes:
        """Return boxes of these extents; the last ones along an axis may be smaller."""
        shape, extent = np.array(self.shape)[:, None], np.array(extents)[:, None]
        grid = [-(-size // part) for size, part in zip(self.shape, extents, strict=True)]
        start = np.indices(grid).reshape(len(grid), -1) * extent
        kinds, kind = np.unique(np.minimum(extent, shape - start), axis=1, return_inverse=True)
        begins, there = np.dot(self.contiguous_steps, start[2:]), np.dot(self.steps, start)
        tile = np.arange(start.shape[1]) % math.prod(grid[2:])
        table = np.stack([start[0] * shape[1] + start[1], tile, kind.ravel(), begins, *there], 1)
        axes = [[_axes(sizes, each) for each in self.steps] for sizes in kinds.T.tolist()]
        moves = [
            [self._moves(i, *each[0][-2:]) if self.moved[i] else (0, 0) for i, each in enumerate(of_kind)]
            for of_kind in axes
        ]
        c, sizes = self.shape[1], kinds[2:].prod(0).tolist()
        planes = [(1, i * j) if j == c else (i, j) for i, j in kinds[:2].T.tolist()]
        strides = [
            [
                (c * size, size, 1) if moved else (each[0], each[1], 1)
                for each, moved in zip(self.steps, self.moved, strict=True)
            ]
            for size in sizes
        ]
        buffer_size = -(-kinds.prod(0).max() // 64) * 64 + 64
        return Boxes(table, int(buffer_size), *map(np.array, (planes, sizes, strides, moves, axes)))

    def _moves(self, array: int, rows: list[int], along: list[int]) -> tuple[int, int]:
        """Return the addresses of the functions that copy boxes of such rows to the window and back."""
        least = min(rows[0], along[0])
        loops = _move, _move
        if self._few_channels(array) and rows[:2] == [self.shape[1], 1] and along[1] == self.steps[array][-1]:
            loops = _side_by_side(rows[0], along[1], 1), _side_by_side(rows[0], 1, along[1])
        elif rows[1] == 1 and least >= 4 and along[1] > 1:
            loops = (_transposed(8 if least >= 8 and 8 * self.like.itemsize < 64 else 4),) * 2
        return loops[0](self.like, 0, 0, NOTHING), loops[1](self.like, 0, 0, NOTHING)

    def _few_channels(self, array: int) -> bool:
        """True if an array's channels lie side by side and have specialised loops."""
        steps = self.steps[array]
        return steps[1] == 1 and 1 < self.shape[1] <= min(FEW, steps[-1]) and steps[-1] <= CLOSE

    def rehearsals(self) -> list[Callable[[], Any]]:
        """Return calls that compile all copying functions such arrays may need, whatever their sizes."""
        loops = {_move}
        for array, steps in enumerate(self.steps):
            if self.moved[array] and self._few_channels(array):
                loops |= {_side_by_side(self.shape[1], steps[-1], 1), _side_by_side(self.shape[1], 1, steps[-1])}
            elif self.moved[array] and 1 in steps[:-1]:
                loops |= {_transposed(size) for size in (4, 8) if size * self.like.itemsize < 64}
        return [partial(loop, self.like, 0, 0, NOTHING) for loop in loops]


def _contiguous_steps(sizes: list[int]) -> list[int]:
    """Return the strides of a contiguous array of these sizes, in elements."""
    return [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


def _line_of(shape: list[int], steps: list[int], line: int) -> list[int]:
    """Return the extents of an array that cover a cache line of `line` elements."""
    extents, together = [1] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: abs(steps[axis])):
        extents[axis] = min(shape[axis], -(-line // together))
        together *= extents[axis]
    return extents


def _grown(least: list[int], shape: list[int], most: int) -> list[int]:
    """Grow `least` to at most `most` elements, the last axes first, so that the parts of an axis are even."""
    extents = list(least)
    for axis in range(len(shape) - 1, -1, -1):
        size, others = shape[axis], math.prod(extents) // extents[axis]
        extents[axis] = -(-size // -(-size // max(most // others, extents[axis])))
    return extents


def _axes(sizes: list[int], steps: list[int]) -> list[list[list[int]]]:
    """Return the axes (size, source step, target step) of a box: from an array to a window, and back.

    The last two axes are the rows and the elements of a row; all other axes come before. If rows are interleaved in the
    array, the axis with the smallest step is the axis of the rows.
    """
    merged: list[list[int]] = []
    for size, there, here in zip(sizes, steps, _contiguous_steps(sizes), strict=True):
        if size == 1:
            continue
        joins = merged and merged[-1][1:] == [there * size, here * size]
        merged.append([merged.pop()[0] * size if joins else size, there, here])
    *outer, along = merged or [[1, 1, 1]]
    rows = min(outer, key=lambda axis: abs(axis[1]), default=along)
    if abs(rows[1]) < abs(along[1]):
        outer.remove(rows)
        outer.append(rows)
    axes = [*[[1, 0, 0]] * (len(sizes) - len(outer) - 1), *outer, along]
    return [axes, [[size, here, there] for size, there, here in axes]]


@inlined
def _boxes(axes):
    """Count the two-dimensional boxes of rows (the last two axes)."""
    number = 1
    for axis in range(len(axes) - 2):
        number *= axes[axis, 0]
    return number


@inlined
def _start(box, axes):
    """Return the offsets of a box of rows in the source and in the target."""
    o = p = 0
    for axis in range(len(axes) - 3, -1, -1):
        further = box // axes[axis, 0] if axis else 0
        i = box - further * axes[axis, 0]
        o, p = o + i * axes[axis, 1], p + i * axes[axis, 2]
        box = further
    return np.uint64(o), np.uint64(p)


@inlined
def _rows_of(axes):
    """Return the sizes and steps of the last two axes: rows, size, source steps, target steps."""
    (rows, from_row, to_row), (size, j, k) = axes[-2], axes[-1]
    return np.uint64(rows), np.uint64(size), np.uint64(from_row), np.uint64(j), np.uint64(to_row), np.uint64(k)


@inlined
def _copy_strided(a, o, j, b, p, k, size):
    """Copy the elements of a row. A step of -1 has its own loop, which vectorises."""
    one = np.uint64(1)
    if k == one and j == ~np.uint64(0):
        for i in range(size):
            b[p + i] = a[o - i]
    elif j == one and k == ~np.uint64(0):
        for i in range(size):
            b[p - i] = a[o + i]
    else:
        for i in range(size):
            b[p + i * k] = a[o + i * j]


@kernel
def _move(like, source, target, axes):
    a, b = memory(source, like), memory(target, like)
    rows, size, from_row, j, to_row, k = _rows_of(axes)
    (_, m, n), (_, q, r) = axes[-2], axes[-1]
    chunk = size
    if abs(m) < abs(q) or abs(n) < abs(r):  # interleaved rows
        chunk = np.uint64(max(AT_A_TIME // max(abs(q), abs(r)), 16))
    one = np.uint64(1)
    for box in range(_boxes(axes)):
        o, p = _start(box, axes)
        if j == one and k == one:
            for _ in range(rows):
                copy_row(a, o, b, p, size)
                o, p = o + from_row, p + to_row
        else:
            for lo in range(np.uint64(0), size, chunk):
                for row in range(rows):
                    at, to = o + row * from_row + lo * j, p + row * to_row + lo * k
                    _copy_strided(a, at, j, b, to, k, min(chunk, size - lo))
    return own_address()


@cache
def _transposed(block: int) -> Any:
    """Make a `_move` for adjacent rows in the array or the window, by square blocks. The last blocks may overlap."""
    transpose, block_ = transposition(block), np.uint64(block)

    def move(like, source, target, axes):
        a, b = memory(source, like), memory(target, like)
        rows, size, from_row, j, to_row, k = _rows_of(axes)
        apart, width = max(from_row, j), max(to_row, k)  # the other ones are 1
        chunk = max(np.uint64(AT_A_TIME) // max(j, k), block_)
        for box in range(_boxes(axes)):
            o, p = _start(box, axes)
            for lo in range(np.uint64(0), size, chunk):
                for first in range(np.uint64(0), rows, block_):
                    row = min(first, rows - block_)
                    for at in range(lo, min(lo + chunk, size), block_):
                        i = min(at, size - block_)
                        transpose(a, o + row * from_row + i * j, apart, b, p + row * to_row + i * k, width)
        return own_address()

    return kernel(move)


@cache
def _side_by_side(rows: int, j: int, k: int) -> Any:
    """Make a `_move` for a fixed number of rows with element steps j in the source and k in the target.

    One step is 1; on the side of the other, rows are adjacent. As compile-time constants they let the loops vectorise.
    """
    one, many, j_, k_ = map(np.uint64, (1, rows, j, k))

    def move(like, source, target, axes):
        a, b = memory(source, like), memory(target, like)
        _, size, from_row, _, to_row, _ = _rows_of(axes)
        from_row, to_row = (one if j_ > one else from_row), (one if k_ > one else to_row)
        for box in range(_boxes(axes)):
            o, p = _start(box, axes)
            for i in range(size):
                for row in range(many):
                    b[p + k_ * i + row * to_row] = a[o + j_ * i + row * from_row]
        return own_address()

    return kernel(move)


@kernel
def go_through(queue, loop, where, buffer, boxes, reads, writes, arguments):
    """Take boxes from the queue: copy them to windows, call a loop, copy results back.

    loop: the loop's address. It reads the first `reads` arrays except the results, and writes these if `writes`.
    where: see numba_geometry.operands_of; the loop gets it with the addresses and the geometry of a box instead.
    buffer: memory for the windows of the arrays that are copied, which begin at its first whole cache line.
    arguments: the loop's further ones.
    """
    like, addresses, _, runs, _ = where
    geometry = Geometry(*where[4])
    table, _, planes, sizes, strides, moves, axes = boxes
    zero, one = np.int64(0), np.int64(1)
    arrays, itemsize = len(addresses), np.int64(64 // line_of(like))
    at, windows = np.empty((2, arrays), np.int64)
    copied = zero
    for i in range(arrays):
        copied += moves[0, i, 0] != 0
    size_of_window = len(buffer) // max(copied, one) // 64 * 64 * itemsize
    window = (np.int64(buffer.ctypes.data) + 63) // 64 * 64
    for i in range(arrays):
        windows[i] = addresses[i]
        if moves[0, i, 0]:
            windows[i] = window
            window += size_of_window
    inner = np.zeros(RANGES + 8, np.int64)
    inner[TASKS] = 1
    start, stop = next_tasks(queue)
    while start < stop:
        for box in range(start, stop):
            tile, kind, begins = table[box, 1], table[box, 2], table[box, 3]
            for i in range(reads):
                if moves[kind, i, 0] and i not in RESULTS:
                    there = addresses[i] + table[box, 4 + i] * itemsize
                    call(moves[kind, i, 0], (like, there, windows[i], axes[kind, i, 0]))
            size = sizes[kind]
            sums = geometry.sums * tile
            # A Geometry of contiguous planes, or of one tile of each: a block is one plane, which is one tile and run.
            cut = geometry.channels, one, one, one, size, one, size, zero, geometry.plane, sums
            for part in range(planes[kind, 0]):
                first, count = table[box, 0] + part * geometry.channels, planes[kind, 1]
                for i in range(arrays):
                    further = (part * count - first) * size if moves[kind, i, 0] else begins
                    at[i] = windows[i] + further * itemsize
                inner[STARTED], inner[FINISHED], inner[RANGES], inner[COUNT], inner[FIRST] = 0, 0, 0, count, first
                call(loop, ((inner, zero), (like, at, strides[kind], runs, cut), None, *arguments))
            if writes:
                for i in range(arrays):
                    if moves[kind, i, 1] and i in RESULTS:
                        there = addresses[i] + table[box, 4 + i] * itemsize
                        call(moves[kind, i, 1], (like, windows[i], there, axes[kind, i, 1]))
        start, stop = task_done(queue)
