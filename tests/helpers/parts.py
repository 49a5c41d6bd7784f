"""Calls on parts of planes, whose moments and gradient sums are merged, and the cases that reach their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

import cupynorm as cn
from cupynorm import config, devices
from cupynorm.cuda.variants import ITEMSIZE, Kind, widest
from helpers.cases import KINDS, Case

#: Cuts of a spatial axis: parts of unequal size, one of a single row, one empty.
CUTS = 3


def parts_of(size: int, rng: np.random.Generator) -> list[slice]:
    """Cut an axis at random into parts, the first of which is empty."""
    borders = [0, 0, *np.sort(rng.integers(0, size + 1, CUTS)).tolist(), size]
    return [slice(*pair) for pair in pairwise(borders)]


def in_parts(parts: list[slice], axis: int = 2) -> Callable[..., tuple[Any, ...]]:
    """Return a function like helpers.cases.fused that computes on parts of the planes. y, dx and dresidual are the
    host's. Only the first part updates the running statistics."""

    def of(array: Any, part: slice) -> Any:
        return None if array is None else array[(slice(None),) * axis + (part,)]

    def compute(x: Any, dy: Any, residual: Any, **options: Any) -> tuple[Any, ...]:
        first, *others = (cn.moments(of(x, part)) for part in parts)
        moments = first.merge(*others)
        ys, saved = [], []
        for part in parts:
            y, kept = cn.instance_norm_forward(of(x, part), residual=of(residual, part), moments=moments, **options)
            ys.append(devices.to_host(y))
            saved.append(kept)
            options["running_mean"] = options["running_var"] = None
        own, *more = (cn.gradient_sums(of(dy, part), kept) for part, kept in zip(parts, saved, strict=True))
        sums = own.merge(*more)
        found = [
            cn.instance_norm_backward(of(dy, part), kept, sums=sums) for part, kept in zip(parts, saved, strict=True)
        ]
        whole = [np.concatenate([*map(devices.to_host, each)], axis) for each in [*zip(*found, strict=True)][::3]]
        return np.concatenate(ys, axis), whole[0], *found[-1][1:3], *whole[1:]

    return compute


WHOLE = [slice(None)]


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Set batch invariance: the moments of unaligned planes are then summed by kernels of their own."""
    before = config.batch_invariant.given
    cn.set_batch_invariant(True)
    try:
        yield
    finally:
        config.batch_invariant.given = before


def _of_each_size(dtype: str, kind: Kind, easy: bool, **fused: Any) -> list[Case]:
    """Return planes of fewer than 32 vecs, of fewer than 128, of one tile of a block, and of several tiles."""
    first = kind == "channels_first"
    tile = 256 * (4 if first and not easy and ITEMSIZE[dtype] == 2 else 8)
    # Channels-last, rows are four vecs wide. 3 channels form no whole vec.
    unit, width = (widest(ITEMSIZE[dtype], kind), 1) if first else (1, 4)
    c = 2 if first else 16 if easy else 3
    layout = kind if not first else "contiguous" if easy else "unaligned"
    if layout == "unaligned":
        fused["dy_layout"] = "contiguous"
    sizes = [vecs // width * unit + 1 for vecs in (20, 100, 500, 2 * tile + 20)]
    return [Case((2 if size < tile else 1, c, size), dtype, layout, **fused) for size in sizes]


def variants() -> list[Case]:
    """Return cases that reach every kernel of a step of its own, without an epilogue."""
    return [case for dtype in ITEMSIZE for kind in KINDS for case in _of_each_size(dtype, *kind)]


def in_turn() -> list[Case]:
    """Return the variants that the full tier runs on the emulator: in float32, and each layout in one other dtype."""
    turns = [("bfloat16", KINDS[0]), ("float16", KINDS[1]), ("float64", KINDS[2]), ("bfloat16", KINDS[3])]
    turns += [("float32", kind) for kind in KINDS]
    return [case for dtype, kind in turns for case in _of_each_size(dtype, *kind)]


def epilogue_variants() -> list[Case]:
    """Return cases that reach each of these kernels in one dtype and with one epilogue, with and without a residual."""
    turns = zip(ITEMSIZE, KINDS, ("silu", "gelu", "leaky_relu", "relu"), strict=True)
    found = []
    for dtype, kind, activation in turns:
        for i, case in enumerate(_of_each_size(dtype, *kind, activation=activation)):
            found.append(replace(case, residual="contiguous" if i % 2 else None))
    return found
