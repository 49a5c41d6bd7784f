"""Windows: where planes are copied to, from their places in an array, to be contiguous for the loops, and back.

The unit of copying is a box: whole planes, or one tile of several planes. The copying loops are in loops_moves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .loops_moves import address_of_move

FEW = 3  # so many rows side by side, and nothing between them, have loops of their own
WINDOW = 2**18  # bytes of an array's window: several windows fit the L2 cache
LARGER = 4  # factor by which a window may grow to hold whole planes, which then are copied once, not also for the sums
CACHED_BOXES = 128  # boxes, about 15 KB; larger tables are not cached for the next call
FAIR = 2**14  # elements; below this, smaller windows for a better balance of the threads do not pay


class Boxes(NamedTuple):
    """All boxes of a call, at least one, for the compiled loop `go_through`. Boxes of one kind have the same size.

    A row of the table holds the first plane (numbered through all samples), the tile, the kind, the tile's first
    position, and the offset of the box in each array, in elements.
    """

    table: np.ndarray
    buffer_size: int  # elements of a window: those of the largest box, and space to align it to a cache line
    planes: np.ndarray  # of each kind: the number of runs of consecutive planes, and the planes in a run
    sizes: np.ndarray  # elements of a plane, or of a tile
    strides: np.ndarray  # of each kind and array, over samples and planes, as the loops see them
    moves: np.ndarray  # addresses of the functions that copy to the window and back, 0 for an array read in place
    axes: np.ndarray  # the axes that those functions take, see loops_moves

    def words(self) -> np.ndarray:
        """Return what the compiled loop needs, in the order of loops_moves.BOXES."""
        arrays = self.table, self.planes, self.sizes, self.strides, self.moves, self.axes
        columns, rank = self.table.shape[1], self.axes.shape[3]
        return np.array([*(array.ctypes.data for array in arrays), columns, rank])


class Windows:
    """Cut arrays of a shape (N, C, *spatial), with axes merged where possible, into boxes.

    Planes too large for a window are cut into tiles. If whole cache lines of all arrays allow, a tile is a contiguous
    part of the plane; arrays with contiguous planes then are read in place.

    Args:
        itemsize: bytes of an element.
        shape: of the arrays.
        steps: strides of each array, in elements.
        present: whether each array is there; the others are not copied.
    """

    def __init__(self, itemsize: int, shape: list[int], steps: list[list[int]], present: list[bool]):
        most = self.most = WINDOW // itemsize
        self.itemsize, self.shape, self.steps = itemsize, shape, steps
        spatial = shape[2:]
        self.plane = math.prod(spatial)
        self.contiguous_steps = _contiguous_steps(spatial)
        self.moved = [here and each[2:] != self.contiguous_steps for each, here in zip(steps, present, strict=True)]
        near = [each for each, moved in zip(steps, self.moved, strict=True) if moved]
        line = 64 // itemsize
        # Tiles of a plane do not depend on the number of samples, as its sums must not: small batches count as a line.
        large = [max(shape[0], line), *shape[1:]]
        least = [max(parts) for parts in zip(*(_line_of(large, each, line) for each in near), strict=True)]
        extents = _grown(least, large, most)
        if extents[2:] != spatial:  # to copy planes once, not for the sums and again for the results
            larger = _grown(least, large, LARGER * most)
            extents = larger if larger[2:] == spatial else extents
        #: The least extents of a box, the elements of a cache line, and the usual ones.
        self.least, self.extents = ([min(each[0], shape[0]), *each[1:]] for each in (least, extents))
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
        there = back = "move"
        if self._few_channels(array) and rows[:2] == [self.shape[1], 1] and along[1] == rows[0]:
            there, back = f"apart {rows[0]}", f"together {rows[0]}"
        elif rows[1] == 1 and least >= 4 and along[1] > 1:
            there = back = f"transpose {self._block(least)}"
        return address_of_move(there, self.itemsize), address_of_move(back, self.itemsize)

    def _block(self, least: int) -> int:
        """Return the side of the square blocks that are transposed, if there are at least so many rows."""
        return 8 if least >= 8 and 8 * self.itemsize < 64 else 4

    def _few_channels(self, array: int) -> bool:
        """Return whether an array has nothing between its few channels, and so loops of their own."""
        steps = self.steps[array]
        return steps[1] == 1 and 1 < self.shape[1] <= FEW and steps[-1] == self.shape[1]

    def moves_of_any_size(self) -> list[tuple[str, int]]:
        """Return the arguments of `address_of_move` for all moves that such arrays may need, whatever their sizes."""
        kinds = {"move"}
        for array, steps in enumerate(self.steps):
            if self.moved[array] and self._few_channels(array):
                kinds |= {f"apart {self.shape[1]}", f"together {self.shape[1]}"}
            if self.moved[array] and 1 in steps[:-1]:  # few channels, too, if planes have a single column
                kinds |= {f"transpose {self._block(least)}" for least in (4, 8)}
        return [(kind, self.itemsize) for kind in sorted(kinds)]


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
