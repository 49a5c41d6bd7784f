"""How arrays lie in memory, and in which layout the kernels read the arrays of a call.

Kernels of two kinds exist: channels-first, for contiguous planes, and channels-last, for adjacent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

from .variants import Kind, widest

SUBWARP_BYTES, SUBWARP_ELEMENTS = 512, 128  # the largest plane of a subwarp


class ArrayDesc(NamedTuple):
    """The memory layout of an array (N, C, *spatial). strides in bytes; misalignment is the address modulo 16."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    misalignment: int


class Layout(NamedTuple):
    """An ArrayDesc as the kernels see it: strides and misalignment (the address modulo 16 bytes) in elements."""

    n: int
    c: int
    s: int
    misalignment: int


def one_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the one stride that steps through all spatial positions in order, or None."""
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    if not dims:
        return 1
    for (_, outer), (size, inner) in pairwise(dims):
        if outer != inner * size:
            return None
    return dims[-1][1]


def layout_of(desc: ArrayDesc, kind: Kind) -> Layout | None:
    """Return the layout in which the kernels of a kind read an array in place, or None if they cannot.

    Channels-first needs contiguous planes, channels-last adjacent channels; the strides of N and C (of N and the
    spatial positions) are free.
    """
    shape, strides, itemsize, misalignment = desc
    if misalignment % itemsize or any(stride % itemsize for stride in strides):
        return None
    n, c, *spatial = (stride // itemsize for stride in strides)
    s = one_stride(shape[2:], spatial)
    if s is None:
        return None
    if kind == "channels_first":
        fits = s == 1
        s = 1
    else:
        fits = c == 1 or shape[1] == 1
        c = 1
    return Layout(n, c, s, misalignment // itemsize) if fits else None


def dense_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides in bytes of a C-contiguous array."""
    return tuple(prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))


def contiguous_desc(shape: tuple[int, ...], itemsize: int, kind: Kind) -> ArrayDesc:
    """Return the ArrayDesc of a newly allocated array."""
    n, c, *spatial = shape
    order = (n, c, *spatial) if kind == "channels_first" else (n, *spatial, c)
    strides = dense_strides(order, itemsize)
    if kind == "channels_last":
        strides = strides[0], strides[-1], *strides[1:-1]
    return ArrayDesc(shape, strides, itemsize, 0)


def dense(x: Layout, n: int, c: int, s: int) -> bool:
    """Return True if the planes are adjacent in memory, in order."""
    return (c == 1 or x.c == s) and (n == 1 or x.n == c * s)


def at_vecs(x: Layout, n: int, s: int, v: int) -> bool:
    """Return True if vecs of v channels begin at multiples of their size. Strides of axes of size 1 do not matter."""
    return not (x.misalignment % v or (n > 1 and x.n % v) or (s > 1 and x.s % v))


def _usual(x: Layout, shape: tuple[int, ...], itemsize: int, kind: Kind) -> bool:
    """Return True if an array is partitioned as a new one of its kind would be; else bits depend on its strides."""
    n, c, s = *shape[:2], prod(shape[2:])
    if kind == "channels_first":
        return s * itemsize > SUBWARP_BYTES or dense(x, n, c, s)
    v = widest(itemsize, kind)
    return c % v > 0 or at_vecs(x, n, s, v)


@lru_cache(maxsize=4096)
def choose_layout(
    descs: tuple[ArrayDesc, ...], invariant: bool = False
) -> tuple[Kind, tuple[Layout, ...], tuple[bool, ...]]:
    """Return the kind of kernels for the arrays of a call, their layouts, and which of them must be copied.

    The first array decides, if it can be read in place; if both kinds can read it, the kind that reads more of the
    other arrays in place. invariant: the order of additions may depend on the kind alone.
    """
    shape, itemsize = descs[0].shape, max(desc.itemsize for desc in descs)
    # In planes of one element the adjacent elements are channels.
    kinds: tuple[Kind, Kind] = ("channels_first", "channels_last")
    preferred = kinds[::-1] if prod(shape[2:]) == 1 else kinds
    fitting = {kind: [layout_of(desc, kind) for desc in descs] for kind in preferred}
    possible = [kind for kind in preferred if fitting[kind][0]]
    kind = max(possible, key=lambda k: sum(x is not None for x in fitting[k])) if possible else "channels_first"
    copy = layout_of(contiguous_desc(shape, itemsize, kind), kind)
    assert copy is not None
    layouts = [x if x and not (invariant and not _usual(x, shape, itemsize, kind)) else None for x in fitting[kind]]
    return kind, tuple(x or copy for x in layouts), tuple(x is None for x in layouts)
