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


class _Piece(np.ndarray):
    """Bytes. A class of its own since NumPy has an array refer to the owner of its memory, past views of one class."""

    start: int  # the first byte that is aligned


class _Loan(weakref.ref[_Piece]):
    """A reference to the view of a piece that the arrays in it refer to."""

    __slots__ = ("piece",)
    piece: _Piece
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
        self.free: dict[int, _Piece] = {}  # by id
        self.lent: set[_Loan] = set()

    def take(self, size: int) -> _Piece:
        """A piece of `size` bytes or some more: the one that came back last, since the caches may have it, or new."""
        for piece in reversed(list(self.free.values())):
            if size <= piece.nbytes <= size + size // 8 and self.free.pop(id(piece), None) is not None:
                return piece
        piece = _Piece(size, np.uint8)
        piece.start = -piece.__array_interface__["data"][0] % ALIGNMENT
        return piece

    def lend(self, size: int) -> _Piece:
        """A view of at least `size` bytes, aligned, to which its piece belongs as long as anything refers to it."""
        piece = self.take(size + ALIGNMENT)
        view: Any = piece[piece.start :]
        loan = _Loan(view, self._back)
        loan.piece = piece
        self.lent.add(loan)
        return view

    def _back(self, loan: _Loan) -> None:
        self.lent.discard(loan)
        self.free[id(loan.piece)] = loan.piece
        self.let_go(get_memory_limit())

    def let_go(self, limit: int) -> None:
        """Free pieces over the limit, the oldest first."""
        pieces = list(self.free.values())
        over = sum(piece.nbytes for piece in pieces) - limit
        for piece in pieces:
            if over <= 0:
                break
            over -= piece.nbytes
            self.free.pop(id(piece), None)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """numpy.empty for a result."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST or not get_memory_limit():
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _memory.lend(size))


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
    _memory.let_go(_memory.limit)


_memory = _Memory(None)


def _after_fork() -> None:
    """In a child the pieces are the parent's, page by page until written."""
    _memory.free = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
