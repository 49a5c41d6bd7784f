"""Memory of results on the CPU: that of results which are gone is kept for those to come, up to a limit.

The system clears every page that it hands out, and a page at a time: for results of some megabytes that takes longer
than the normalisation. CuPy keeps memory for the same reason. Memory goes back here when the last array that refers to
it, a view or the result itself, is gone.
"""

from __future__ import annotations

import math
import os
import weakref
from typing import Any

import numpy as np

from .functional import check_count

LEAST = 2**18  # bytes of a result; the C library keeps smaller pieces by itself
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class _Block(np.ndarray):
    """Bytes. A class of its own since NumPy has an array refer to the owner of its memory, past views of one class."""

    start: int  # the first byte that is aligned


class _Lease(weakref.ref[_Block]):
    """A reference to the view of a piece that the arrays in it refer to."""

    __slots__ = ("block",)
    block: _Block
    __hash__ = object.__hash__  # an array has none

    def __eq__(self, other: object) -> bool:
        return self is other


class _Memory:
    """Pieces that nobody uses, in the order in which they came back, and those that are lent out.

    There is no lock: an array may end anywhere, in a thread that would hold it, or between an interrupt and its
    release. Each look is at a list of its own, and each change a single step.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit  # bytes of free pieces; None: not asked yet
        self.free: dict[int, _Block] = {}  # by id
        self.leased: set[_Lease] = set()

    def take(self, size: int) -> _Block:
        """A piece of `size` bytes or some more: the one that came back last, since the caches may have it, or new."""
        for block in reversed(list(self.free.values())):
            if size <= block.nbytes <= size + size // 8 and self.free.pop(id(block), None) is not None:
                return block
        block = _Block(size, np.uint8)
        block.start = -block.__array_interface__["data"][0] % ALIGNMENT
        return block

    def lease(self, size: int) -> _Block:
        """A view of at least `size` bytes, aligned, to which its piece belongs as long as anything refers to it."""
        block = self.take(size + ALIGNMENT)
        view: Any = block[block.start :]
        lease = _Lease(view, self._give_back)
        lease.block = block
        self.leased.add(lease)
        return view

    def _give_back(self, lease: _Lease) -> None:
        self.leased.discard(lease)
        self.free[id(lease.block)] = lease.block
        self.trim(get_memory_limit())

    def trim(self, limit: int) -> None:
        """Free pieces over the limit, the oldest first."""
        blocks = list(self.free.values())
        excess = sum(block.nbytes for block in blocks) - limit
        for block in blocks:
            if excess <= 0:
                break
            excess -= block.nbytes
            self.free.pop(id(block), None)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """numpy.empty for a result."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST or not get_memory_limit():
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _memory.lease(size))


def get_memory_limit() -> int:
    """How many bytes of results that are gone may be kept for results to come."""
    if _memory.limit is None:
        text = os.environ.get("CUPYNORM_MEMORY_LIMIT", "").strip()
        if text and not text.isdecimal():
            raise ValueError(f"CUPYNORM_MEMORY_LIMIT must be a number of bytes, got {text!r}")
        _memory.limit = int(text) if text else 2**30
    return _memory.limit


def set_memory_limit(limit: int) -> None:
    """Set how many bytes of results that are gone may be kept for results to come, on the CPU.

    What is kept over the limit is given back to the system now, the oldest first; 0 keeps nothing. The default is
    CUPYNORM_MEMORY_LIMIT from the environment, or 1 GiB. What CuPy keeps on a GPU is CuPy's own affair.

    Args:
        limit: bytes, at least 0.

    Raises:
        TypeError: not an integer. ValueError: less than 0. The limit stays as it was then.
    """
    _memory.limit = check_count(limit, "memory limit", 0)
    _memory.trim(_memory.limit)


_memory = _Memory(None)


def _after_fork() -> None:
    """In a child the pieces are the parent's, page by page until written."""
    _memory.free = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
