"""Masks of the NumPy path: blocks that are 0 outside of a mask, and their moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .blocking import Index


def inside_of(mask: np.ndarray | None, index: Index, channels_last: bool, itemsize: int) -> np.ndarray | None:
    """Return a block's mask as integers of this size, all bits set where it is True, (planes of N, of C, positions);
    without samples and channels that are repetitions, as it is broadcast. None without a mask."""
    if mask is None:
        return None
    part = mask[index]
    part = part[tuple(slice(None if stride else 1) for stride in part.strides[:2])]
    n, c = part.shape[:2]
    # (Not in one step: a ufunc that casts would use its buffer, which may be short.)
    part = part.view(np.int8) != 0  # a view of other bytes as bool may have more than 0 and 1
    bits = (np.moveaxis(part, 1, -1) if channels_last else part).astype(f"i{itemsize}", order="C")
    np.negative(bits, out=bits)
    return bits.reshape(n, -1, c).transpose(0, 2, 1) if channels_last else bits.reshape(n, c, -1)


def keep_inside(inside: np.ndarray | None, block: np.ndarray) -> None:
    """Set a block to 0 outside of a mask, whatever is there, NaN included."""
    if inside is not None:
        bits = block.view(inside.dtype)
        np.bitwise_and(bits, inside, out=bits)


def masked_moments(
    x: np.ndarray,
    inside: np.ndarray,
    centred: np.ndarray,
    sums: Callable[[np.ndarray], np.ndarray],
    squares: Callable[[np.ndarray], np.ndarray],
    least: float,
) -> tuple[np.ndarray, ...]:
    """Return mean, mean_lo, m2 and the number of positions of a block's planes, as (N, C).

    x is 0 outside of the mask. centred: room for another block. sums, squares: functions of a block. least: the least
    mean square that is not summed again in float64.
    """
    count = np.broadcast_to(-np.add.reduce(inside, 2, dtype=inside.dtype), x.shape[:2])
    size = np.maximum(count, 1).astype(np.float64)
    shift, mean = np.zeros(count.shape, x.dtype), sums(x) / size
    for _ in range(3):  # the first mean, and two corrections of it, as in a nearly constant plane
        shift = (shift + mean).astype(x.dtype)
        np.subtract(x, shift[:, :, None], out=centred)
        keep_inside(inside, centred)
        total, sum_sq = sums(centred), squares(centred)
        mean = np.divide(total, size, dtype=np.float64)
        lost = mean * total
        if not (lost > 0.5 * sum_sq).any():
            break
    m2: Any = np.maximum(np.subtract(sum_sq, lost, dtype=np.float64), 0)
    nearest = (shift + mean).astype(x.dtype)
    mean_lo = (shift.astype(np.float64) - nearest) + mean
    odd = ~((sum_sq >= size * least) & (sum_sq < math.inf)) & (count > 0)
    whole = np.broadcast_to(inside, x.shape)
    for plane in zip(*np.nonzero(odd), strict=True):
        exact = x[plane][whole[plane] != 0].astype(np.float64)
        about = exact.mean()
        exact -= about
        more = exact.mean()
        nearest[plane] = about
        mean_lo[plane] = (about - nearest[plane]) + more
        m2[plane] = (exact * exact).sum() - more * more * len(exact)
    return nearest, mean_lo, m2, count
