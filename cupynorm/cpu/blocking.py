"""How a call is cut into blocks and tiles, and how its threads share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from .._types import Array

Index = tuple[Any, ...]


def merged_axes(arrays: list[Array]) -> list[Array]:
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


class Work:
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


def least_mean_square(eps: float) -> float:
    """Return the least mean square that float32 holds in full precision; 0 if eps dominates anyway."""
    return 0.0 if eps >= 1e-30 else 2.0**-100
