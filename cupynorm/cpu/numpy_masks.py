"""Masks of the NumPy path: blocks that are 0 outside of a mask."""

from __future__ import annotations

import numpy as np


def inside_of(part: np.ndarray, channels_last: bool, buffer: np.ndarray) -> np.ndarray:
    """Return a block's mask in a buffer, as integers of its size, all bits set where it is True: (planes of N, of C,
    positions), without samples and channels that are repetitions, as it is broadcast."""
    part = part[tuple(slice(None if stride else 1) for stride in part.strides[:2])]
    n, c = part.shape[:2]
    # 0 and -1, in bytes. A view of other bytes as bool may have more than 0 and 1.
    whole = (part.view(np.int8) != 0).view(np.int8)
    np.negative(whole, out=whole)
    bits = buffer.view(f"i{buffer.itemsize}")[: part.size]
    inside = bits.reshape(n, -1, c).transpose(0, 2, 1) if channels_last else bits.reshape(n, c, -1)
    inside[...] = whole.reshape(inside.shape)
    return inside


def counts_of(inside: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the number of positions inside of each plane of a block of this shape."""
    return np.broadcast_to(-np.add.reduce(inside, 2, dtype=inside.dtype), shape[:2])


def keep_inside(inside: np.ndarray | None, block: np.ndarray) -> None:
    """Set a block to 0 outside of a mask, whatever is there, NaN included."""
    if inside is not None:
        copy_inside(inside, block, block)


def copy_inside(inside: np.ndarray, block: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Copy a block, and set the copy to 0 outside of a mask. Return it."""
    np.bitwise_and(block.view(inside.dtype), inside, out=out.view(inside.dtype))
    return out
