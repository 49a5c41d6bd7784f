"""Memory pool for NumPy results: reuse the memory of freed results, up to a limit.

The operating system clears every page that it hands out, one at a time: for results of some megabytes that takes longer
than the normalisation. CuPy pools memory for the same reason. A block returns to the pool when the last array that
refers to it, the result itself or a view, is freed.
"""

from __future__ import annotations

import math
import os
import weakref
from typing import Any

import numpy as np

from .. import config

LEAST = 2**18  # bytes of a result; the C library pools smaller blocks itself
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class _Block(np.ndarray):
    """Bytes. A subclass, as NumPy sets the base of an array past all views of one class, to the owner of the memory."""

    start: int  # index of the first aligned byte


class _Lease(weakref.ref[_Block]):
    """A weak reference to the view of a block to which all arrays in the block refer."""

    __slots__ = ("block",)
    block: _Block
    __hash__ = object.__hash__  # an array is not hashable

    def __eq__(self, other: object) -> bool:
        return self is other


class _Memory:
    """Free blocks, in the order of their return, and leased ones.

    There is no lock: an array may be freed anywhere, even in a thread that holds the lock, or between an interrupt and
    its release. Each reader iterates over its own copy of the list, and each change is a single step.
    """

    def __init__(self) -> None:
        self.free: dict[int, _Block] = {}  # by id
        self.leased: set[_Lease] = set()

    def take(self, size: int) -> _Block:
        """Return a block of at least `size` bytes: the one freed last, as it may be in the caches, or a new one."""
        for block in reversed(list(self.free.values())):
            if size <= block.nbytes <= size + size // 8 and self.free.pop(id(block), None) is not None:
                return block
        block = _Block(size, np.uint8)
        block.start = -block.__array_interface__["data"][0] % ALIGNMENT
        return block

    def lease(self, size: int) -> _Block:
        """Return an aligned view of at least `size` bytes. Its block stays leased while anything refers to the view."""
        block = self.take(size + ALIGNMENT)
        view: Any = block[block.start :]
        lease = _Lease(view, self._give_back)
        lease.block = block
        self.leased.add(lease)
        return view

    def _give_back(self, lease: _Lease) -> None:
        self.leased.discard(lease)
        self.free[id(lease.block)] = lease.block
        self.trim(config.get_memory_limit())

    def trim(self, limit: int) -> None:
        """Free blocks until the limit is met, the oldest first."""
        blocks = list(self.free.values())
        excess = sum(block.nbytes for block in blocks) - limit
        for block in blocks:
            if excess <= 0:
                break
            excess -= block.nbytes
            self.free.pop(id(block), None)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like numpy.empty, with memory from the pool."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST or not config.get_memory_limit():
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _memory.lease(size))


_memory = _Memory()


def _trim(limit: int) -> None:
    _memory.trim(limit)


config.on_memory_limit.append(_trim)


def _after_fork() -> None:
    """Drop the free blocks in a child: their pages are shared with the parent until written."""
    _memory.free = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
