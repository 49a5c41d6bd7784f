"""What NumPy and the compiled loops share: a call's arrays, their axes, tiles of a plane, the order of the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._types import Array

Index = tuple[Any, ...]


class Arrays(NamedTuple):
    """The arrays of a forward or backward; those that the call lacks are None."""

    x: Array
    result: Array  # y or dx
    dy: Array | None = None
    residual: Array | None = None
    dresidual: Array | None = None
    mask: Array | None = None


def merged_axes(arrays: Sequence[Any]) -> list[Any]:
    """Return views (N, C, *spatial) with adjacent spatial axes merged where all arrays allow it, at least one left.

    The first array is not None; a None stays.
    """
    given = [array for array in arrays if array is not None]
    n, c, *spatial = given[0].shape
    if all(a.flags.c_contiguous for a in given):
        shape = [n, c, math.prod(spatial)]
    else:
        shape, last = [n, c], None
        for axis, size in enumerate(spatial, 2):
            if size == 1:
                continue
            steps = [a.strides[axis] for a in given]
            if last is not None and last == [step * size for step in steps]:
                shape[-1] *= size
            else:
                shape.append(size)
            last = steps
        shape += [1] * (len(shape) == 2)
    return [a if a is None or a.ndim == len(shape) else a.reshape(shape) for a in arrays]


class Work:
    """A call and the distribution of its blocks. Subclasses implement the steps.

    A subclass sets `blocks`, `tiles` (per block) and `threads`. The steps are `reduce`, `join`, `apply` and `whole`
    (these three on one block). `join` is a function of a range of blocks. The others are functions of an item in NumPy,
    and a `Task` in the compiled loops.

    again: makes the Work of another call with the same trace, from its Saved and its Arrays; or None, if that is to be
    chosen anew. small: does another forward with the same trace, given its ForwardCall, y, the statistics and the
    variances or None; or None, if that takes a Work.
    """

    blocks: int
    tiles: int
    threads: int
    again: Any = None
    small: Any = None

    def share(self, step: Any, count: int) -> None:
        """Run step over the items 0 … count - 1, divided among the threads."""
        raise NotImplementedError

    def sum_up(self, reduce: Any, join: Callable[..., None]) -> None:
        """Reduce all tiles of all blocks, and join them."""
        self.share(reduce, self.blocks * self.tiles)
        with np.errstate(all="ignore"):
            join(0, self.blocks)

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        if self.threads == 1 or self.tiles == 1 or self.blocks >= 4 * self.threads:
            self.share(whole, self.blocks)
        else:
            self.sum_up(reduce, join)
            self.share(apply, self.blocks * self.tiles)


def tile_slices(spatial: list[int], limit: int) -> Iterator[Index]:
    """Cut a plane along its outermost axes into tiles of at most `limit` elements."""
    size, *inner = spatial
    row = math.prod(inner)
    if row > limit:
        for i in range(size):
            for tail in tile_slices(inner, limit):
                yield (slice(i, i + 1), *tail)
    else:
        step = max(limit // row, 1)
        for i in range(0, size, step):
            yield (slice(i, i + step), *(slice(None) for _ in inner))


def least_mean_square(call: Any) -> float:
    """Return the least mean square that float32 holds in full precision; 0 if eps dominates anyway. call: has eps and
    eps_mode."""
    return 0.0 if call.eps >= (1e-30 if call.eps_mode == "variance" else 1e-15) else 2.0**-100
