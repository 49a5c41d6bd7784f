"""Compile the loops of a kind of call without computing anything: the CPU's part of `cupynorm.warmup`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .._types import Array, Saved, empty_like, math_dtype
from .blocking import Arrays
from .numba_moves import go_through
from .numba_path import CompiledWork, Layout, work_of
from .numba_tasks import TaskQueue


class Rehearsal(CompiledWork):
    """A call without planes.

    Its `steps`, when called, compile all loops that calls of its kind may use, for any number of planes and threads.
    """

    def __init__(self, *what: Any):
        super().__init__(*what)
        self.steps: list[Callable[[], Any]] = [TaskQueue(0, 0, 1).drain]
        if self.layout.windows is not None:
            self.steps += self.layout.windows.rehearsals()

    def _make_partials(self, wanted: bool = True) -> None:
        super()._make_partials(False)

    def share(self, step: tuple[Any, tuple[Any, ...]], count: int) -> None:
        loop, arguments = step
        queue = TaskQueue(0, 0, 1).numbers, 0
        self.steps.append(partial(loop, queue, self.where, self.channels_last, *arguments))
        windows = self.layout.windows
        if windows is not None:
            buffer = np.empty(0, self.layout.like.dtype)
            self.steps.append(lambda: go_through(queue, 0, self.where, buffer, windows.boxes(1), 0, True, arguments))

    def sum_up(self, reduce: Any, join: Callable[..., None]) -> None:
        self.steps.append(partial(join, 0, 0))
        self.share(reduce, 0)

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        self.sum_up(reduce, join)
        self.share(apply, 0)
        self.share(whole, 0)


def rehearsals(
    x: Array, activation: str | None, negative_slope: float, residual: Array | None, parts: bool
) -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, step) pairs that compile the loops for arrays like x; empty if the loops cannot address them.

    Results and dy are laid out like a new result, or results are x itself. No array's contents are read or written.
    """
    if not x.size:
        return []
    found: list[tuple[str, Callable[[], Any]]] = []
    y, none = empty_like(x, np.empty), np.empty((0, x.shape[1]), math_dtype(x.dtype))
    wide = none.astype(np.float64)

    def rehearse(what: str, training: bool, arrays: Arrays) -> None:
        call = Saved(
            x, none, none, None, None, training, mean_lo=none, activation=activation, negative_slope=negative_slope,
            residual=arrays.residual,
        )  # fmt: skip
        work = work_of(call, arrays)
        if work is None:
            return
        layouts = [work.layout]
        moved = work.layout.windows is not None
        strides = tuple(None if a is None else a.strides for a in arrays)
        other = Layout(x.dtype, x.shape, strides, 1 if moved else sys.maxsize)
        if (other.windows is not None) != moved:  # other arrays may have longer or shorter runs
            layouts.append(other)
        backward = arrays.dy is not None
        for layout in layouts:
            rehearsal = Rehearsal(call, layout, work.addresses)
            if backward:
                rehearsal.backward(none, none)
                if parts:
                    rehearsal.gradient_sums(wide, wide)
            elif what == "moments":
                rehearsal.share_moments()
            elif training:
                rehearsal.forward(0.0, None)
            else:
                rehearsal.normalize()
            found.extend((what, step) for step in rehearsal.steps)

    trained = math.prod(x.shape[2:]) > 1
    rehearse("forward", trained, Arrays(x, y, residual=residual))  # updates of running statistics use the same loops
    rehearse("forward in place", trained, Arrays(x, x, residual=residual))
    if parts:
        rehearse("moments", True, Arrays(x, x))
    gradients = Arrays(x, y, y, residual, y) if residual is not None and activation is not None else Arrays(x, y, y)
    if trained or parts:
        rehearse("backward", True, gradients)
    rehearse("backward with running statistics", False, gradients)
    return found
