"""Compile the loops of a kind of call without computing anything: the CPU's part of `cupynorm.warmup`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .._types import Array, empty_like, math_dtype
from .blocking import Arrays
from .loops_moves import address_of_move
from .loops_path import BACKWARD, FORWARD, MOMENTS, NORMALIZE, Layout, Pass, address_of, kind_for, layout_of, module_of
from .loops_tasks import driver


def _modules(modules: Pass, layout: Layout, lanes: int) -> list[str]:
    """Return the modules that calls with such a layout may use, whatever the size of their planes."""
    names = [name for name in modules if name]
    if modules in (FORWARD, BACKWARD) and not layout.channels_last:
        which = "forward" if modules is FORWARD else "backward"
        names += [f"across_{which}"] if not layout.masked else []
        names += [f"short_{which}"] if lanes in layout.usual_lanes else []
    return names


def rehearsals(
    x: Array, dtype: np.dtype, activation: str | None, residual: Array | None, parts: bool,
    mask: Array | None = None, sloped: bool = False,
) -> list[tuple[str, Callable[[], Any]]]:  # fmt: skip
    """Return (name, step) pairs that compile the loops for arrays like x, and results of this dtype; empty if the loops
    cannot address the arrays. sloped: as in loops_places.Kind.

    Results and dy are laid out like a new result, or results are x itself. No array's contents are read or written.
    """
    if not x.size or address_of(x) % x.itemsize:
        return []
    found: dict[Any, tuple[str, Callable[[], Any]]] = {}
    y = empty_like(x, np.empty, dtype)

    def rehearse(
        what: str, modules: Pass, arrays: Arrays, activation: str | None = activation, training: bool = True
    ) -> None:
        strides = tuple(None if a is None else a.strides for a in arrays)
        x, result = arrays.x, arrays.result
        given = result.dtype, x.shape, strides
        input = None if result.dtype == x.dtype else x.dtype
        layout = layout_of(*given) if input is None else layout_of(*given, None, input)
        if not layout.usable:
            return
        layouts = [layout]
        moved = layout.windows is not None
        other = Layout(*given, 1 if moved else sys.maxsize, input)
        if other.usable and (other.windows is not None) != moved:  # other arrays may have longer or shorter runs
            layouts.append(other)
        found.setdefault(driver, (what, driver))
        for each in layouts:
            slopes = sloped and training and modules is BACKWARD
            kind = each.kind(activation, arrays.residual is not None, training, slopes)
            for lanes in {*each.usual_lanes, *([each.lanes] if each is layout else [])}:
                for name in _modules(modules, each, lanes):
                    module = name, kind_for(name, kind._replace(lanes=lanes))
                    found.setdefault(module, (what, partial(module_of, *module)))
            if each.windows is not None:
                for move in each.windows.moves_of_any_size():
                    found.setdefault(move, (what, partial(address_of_move, *move)))

    trained, mixed, integers = math.prod(x.shape[2:]) > 1, dtype != x.dtype, x.dtype.kind in "iu"
    for result in (y,) if mixed else (y, x):
        what = "forward" if result is y else "forward in place"
        # Updates of running statistics, and calls with them, use the same loops.
        rehearse(what, FORWARD if trained else NORMALIZE, Arrays(x, result, residual=residual, mask=mask))
    if parts:
        rehearse("moments", MOMENTS, Arrays(x, np.empty_like(x, math_dtype(x.dtype)) if integers else x, mask=mask))
    if integers:
        return list(found.values())
    if mixed:  # a backward converts all arrays first
        wide = math_dtype(dtype, x.dtype)
        for each in (x, y):
            if each.dtype != wide:
                converted = empty_like(each, np.empty, wide)
                rehearse("conversion", NORMALIZE, Arrays(each, converted), None)
                rehearse("conversion", NORMALIZE, Arrays(converted, empty_like(converted, np.empty, each.dtype)), None)
        x, y = empty_like(x, np.empty, wide), empty_like(y, np.empty, wide)
        residual = None if residual is None else empty_like(residual, np.empty, wide)
    gradients = Arrays(x, y, y, mask=mask)
    if residual is not None and activation is not None:
        gradients = Arrays(x, y, y, residual, y, mask)
    for training in (True, False) if trained or parts else (False,):
        rehearse("backward", BACKWARD, gradients, training=training)
    if sloped and parts:  # with given sums, slopes are in these
        sloped = False
        rehearse("backward", BACKWARD, gradients)
    return list(found.values())
