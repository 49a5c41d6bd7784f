"""The backend of NumPy arrays: NumPy alone, or loops compiled by numba if it is installed (extra `cpu`).

A **block** is as many whole planes, of every array of a call, as a core's caches hold; in the compiled loops it is one
plane, or a group of channels side by side. A plane larger than that is cut into **tiles**: each tile is summed by
itself, and the sums are merged in a fixed order, so results have the same bits for any number of threads. Threads take
the blocks of a call, or its tiles if there are few planes; small calls use one thread.

A pass has three steps: `reduce` a tile of a block to sums, `join` the sums of all tiles of a block, and `apply` the
result to a tile. The digits are those of the CUDA kernels, with one pass less: x - shift and its square are summed
together, with a shift near the mean, and the mean of x - shift is the correction. If the shift turns out to be more
than about one deviation from the mean, the plane is summed again about the mean. float16 and bfloat16 compute in
float32.

In a block, planes lie as in the result: each in one piece (rows), or side by side (channels-last).

    blocking                                     what NumPy and the compiled loops share; the order of the steps
    numpy_path, numpy_double                     the steps as NumPy calls, cut into blocks for the caches
    numpy_activations, gelu, halves              what they use: activations, float16 and bfloat16
    numba_path, numba_rehearsal                  the steps as compiled loops: layouts and calls; `warmup`
    numba_forward, numba_backward, numba_moves   the loops
    numba_geometry, numba_intrinsics, numba_activations, numba_tasks    what the loops are made of
    numba_import, numba_cache                    numba's import, its cache on disk
    thread_pool, result_pool, running, forks     threads, memory, running statistics, forks
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import config
from .._checks import overlap
from .._types import (
    Array,
    DoubleGradients,
    ForwardCall,
    ForwardResult,
    Gradients,
    Saved,
    commit,
    empty_like,
    math_dtype,
)
from ..backend import Backend
from ..config import get_num_threads
from . import forks as forks  # imported for its effect
from . import running
from .blocking import Arrays
from .numba_import import load_numba
from .numpy_double import DoubleArrays, DoubleBackwardWork
from .numpy_path import NumpyWork
from .result_pool import empty

#: numba, or None without compiled loops; then the next line is the reason.
numba: Any = None
without_numba = "CUPYNORM_COMPILED=0"
if config.compiled.get():
    try:
        load_numba()
        import numba

        from . import numba_path, numba_rehearsal

        without_numba = ""
    except Exception as _reason:  # numba is missing, or does not work with this NumPy, in any of several ways
        numba, without_numba = None, str(_reason)

#: Whether calls use the compiled loops. The benchmark and the tests turn them off to compare.
compiled = numba is not None


def _choose(call: Saved, arrays: Arrays) -> Any:
    """Choose the implementation of a call: compiled if available and if the loops can address the arrays."""
    work = numba_path.work_of(call, arrays) if compiled else None
    return NumpyWork(call, arrays) if work is None else work


def rehearsals(
    x: Array, activation: str | None, negative_slope: float, residual: Array | None
) -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, step) pairs that compile the loops for arrays like x; empty if such calls use NumPy alone."""
    return numba_rehearsal.rehearsals(x, activation, negative_slope, residual) if compiled else []


class CpuBackend(Backend):
    """The backend of NumPy arrays."""

    def forward(self, call: ForwardCall) -> ForwardResult:
        x, out = call.x, call.out
        y = empty_like(x, empty) if out is None else out
        planes, dtype = x.shape[:2], math_dtype(x.dtype)
        mean, rstd = np.empty(planes, dtype), np.empty(planes, dtype)
        saved = call.saved(mean, rstd, np.empty(planes, dtype) if call.use_input_stats else None)
        arrays = Arrays(x, y, residual=call.residual)
        variance = None
        if call.use_input_stats:
            if x.size:
                variance = np.empty(planes, dtype) if call.updates else None
                _choose(saved, arrays).forward(call.eps, variance)
        else:
            assert call.running_mean is not None and call.running_var is not None
            mean[...] = call.running_mean
            with np.errstate(all="ignore"):
                rstd[...] = 1 / np.sqrt(call.running_var.astype(dtype) + dtype.type(call.eps))
            if x.size:
                _choose(saved, arrays).normalize()
        update: Callable[..., None] = commit
        if variance is not None:
            count = math.prod(x.shape[2:])
            with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are answers
                exact = np.add(mean, saved.mean_lo, dtype=np.float64).mean(0)  # type: ignore[arg-type]
                unbiased = (variance * dtype.type(count / (count - 1))).mean(0, dtype=np.float64)
            update = partial(running.move, ((call.running_mean, exact), (call.running_var, unbiased)), call.momentum)
        return ForwardResult(y, saved if call.save else None, update)

    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
        x = saved.x
        dresidual = g_out = None
        if saved.with_residual and saved.activation is None:
            dresidual = dy.copy() if out is not None and overlap(out, dy) else dy
        elif saved.with_residual:
            dresidual = g_out = empty_like(x, empty)
        dx = empty_like(x, empty) if out is None else out
        dtype = math_dtype(x.dtype)
        sums = np.zeros((2, *x.shape[:2]), dtype)  # of g times xhat, and of g
        if x.size:
            arrays = Arrays(x, dx, dy) if g_out is None else Arrays(x, dx, dy, saved.residual, g_out)
            _choose(saved, arrays).backward(sums[1], sums[0])
        dweight, dbias = _gradients(sums, saved.weight, saved.bias)
        return Gradients(dx, dweight, dbias, dresidual)

    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> DoubleGradients:
        x, weight = saved.x, saved.weight
        ddy, dx = empty_like(x, empty), empty_like(x, empty)
        sums = np.zeros(x.shape[:2], math_dtype(x.dtype))
        if x.size:
            # By NumPy: such calls are rare, and compiling loops for them would take seconds.
            arrays = DoubleArrays(x, dx, dy, ddy, ddx)
            DoubleBackwardWork(saved, arrays, ddweight, ddbias).double_backward(sums)
        return DoubleGradients(ddy, dx, *_gradients(sums[None], weight))

    def describe(self, x: Array, *, activation: str | None, residual: bool, double_backward: bool) -> list[str]:
        if not x.size:
            return ["the CPU", "  empty, nothing is computed"]
        unused = np.empty(x.shape[:2], math_dtype(x.dtype))
        call, new = Saved(x, unused, unused, None, None, True, mean_lo=unused), empty_like(x, np.empty)

        def lines(work: Any) -> list[str]:
            tiles = f", each in {work.tiles} tiles, put together in a fixed order" if work.tiles > 1 else ""
            threads = f"up to {work.threads} threads" if work.threads > 1 else "one thread"
            return [f"  {work}{tiles}", f"  {threads} of {get_num_threads()}"]

        described = ["the CPU", *lines(_choose(call, Arrays(x, new)))]
        if double_backward:
            first, *more = lines(DoubleBackwardWork(call, DoubleArrays(x, *[new] * 4), None, None))
            described += [f"  double backward: {first.strip()}", *more]
        return described


def _gradients(sums: np.ndarray, *parameters: Array | None) -> list[Array | None]:
    """Parameters' gradients, in their shapes and dtypes, from all planes' sums for each, shape (parameters, N, C)."""
    ranks = {parameter.ndim for parameter in parameters if parameter is not None}
    if not ranks:
        return [*parameters]
    with np.errstate(all="ignore"):
        by_rank = {2: sums}
        if 1 in ranks:
            by_rank[1] = sums[:, 0] if sums.shape[1] == 1 else sums.astype(np.float64).sum(1)
        return [None if p is None else by_rank[p.ndim][i].astype(p.dtype) for i, p in enumerate(parameters)]


backend = CpuBackend()
