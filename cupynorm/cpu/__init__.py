"""The backend of NumPy arrays: NumPy alone, or loops compiled by LLVM if llvmlite is installed (extra `cpu`).

A **block** is as many whole planes, of every array of a call, as a core's caches hold; in the compiled loops it is one
plane, or a group of channels side by side. A plane larger than that is cut into **tiles**: each tile is summed by
itself, and the sums are merged in a fixed order, so results have the same bits for any number of threads. Threads take
the blocks of a call, or its tiles if there are few planes; small calls use one thread.

A pass has three steps: `reduce` a tile of a block to sums, `join` the sums of all tiles of a block, and `apply` the
result to a tile. The digits are those of the CUDA kernels, with one pass less: x - shift and its square are summed
together, with a shift near the mean, and the mean of x - shift is the correction. If the shift turns out to be more
than about one deviation from the mean, the plane is summed again about the mean. float16 and bfloat16 compute in
float32; numpy_small computes in float64.

In a block, planes lie as in the result: each in one piece (rows), or side by side (channels-last).

    blocking                                     what NumPy and the compiled loops share; the order of the steps
    numpy_path, numpy_double                     the steps as NumPy calls, cut into blocks for the caches
    numpy_small                                  the same for samples of few elements
    numpy_activations, gelu, halves              what they use: activations, float16 and bfloat16
    loops_path, loops_rehearsal                  the steps as compiled loops: layouts and calls; `warmup`
    loops_forward, loops_backward                the loops
    loops_short, loops_across                    the loops of short planes
    loops_moves, windows                         arrays that are copied together first
    loops_places, loops_activations, loops_tasks    what the loops are made of, and what calls them
    llvm, llvm_machine                           the language they are written in; its compiler and cache on disk
    thread_pool, result_pool, running, forks     threads, memory, running statistics, forks
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import config
from .._checks import overlap
from .._types import (
    Array,
    DoubleGradients,
    Explained,
    ForwardCall,
    ForwardResult,
    Gradients,
    Saved,
    commit,
    empty_like,
    maker_like,
    math_dtype,
)
from ..backend import Backend
from ..config import get_num_threads
from ..conventions import rstd_of, rstd_slope, var_of
from ..statistics import GradientSums, Moments, merge_tiles, new
from . import forks as forks  # imported for its effect
from . import running
from .blocking import Arrays
from .numpy_double import DoubleArrays, DoubleBackwardWork
from .numpy_path import NumpyWork
from .numpy_small import SmallWork
from .result_pool import LEAST, empty

#: llvmlite, or None without compiled loops; then the next line is the reason.
llvmlite: Any
llvmlite, without_llvmlite = None, "CUPYNORM_COMPILED=0"
if config.compiled.get():
    try:
        llvmlite = importlib.import_module("llvmlite")
        from . import loops_path, loops_rehearsal

        without_llvmlite = ""
    except Exception as _reason:  # llvmlite is missing, or does not work here, in any of several ways
        llvmlite, without_llvmlite = None, str(_reason)

#: Whether calls use the compiled loops. The benchmark and the tests turn them off to compare.
compiled = llvmlite is not None


def _choose(call: Saved, arrays: Arrays) -> Any:
    """Choose the implementation of a call: compiled if available and if the loops can address the arrays."""
    work = loops_path.work_of(call, arrays) if compiled else None
    if work is not None:
        return work
    return (SmallWork if SmallWork.suits(call, arrays) else NumpyWork)(call, arrays)


class Trace(NamedTuple):
    """What forwards on arrays with the same facts, with the same options, have in common."""

    result: Callable[[], np.ndarray]  # makes a new y
    statistics: Callable[[], np.ndarray]  # makes Saved.statistics
    work: Callable[[Saved, Arrays], Any] = _choose  # chooses the implementation
    small: Callable[[ForwardCall, np.ndarray, np.ndarray, np.ndarray | None], None] | None = None  # see blocking.Work


def _trace_of(call: ForwardCall) -> Trace:
    x, dtype = call.x, call.result_dtype
    rows, wide = 3 if call.use_input_stats else 2, math_dtype(dtype, x.dtype)
    make = np.empty if x.size * dtype.itemsize < LEAST else empty
    return Trace(maker_like(x, make, dtype), partial(np.empty, (rows, *x.shape[:2]), wide))


def rehearsals(
    x: Array, dtype: np.dtype, activation: str | None, residual: Array | None, parts: bool = False, **rare: Any
) -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, step) pairs that compile the loops for arrays like x, and results of this dtype; empty if such
    calls use NumPy alone. rare: mask and sloped, as in loops_rehearsal."""
    return loops_rehearsal.rehearsals(x, dtype, activation, residual, parts, **rare) if compiled else []


class CpuBackend(Backend):
    """The backend of NumPy arrays."""

    def facts(self, call: ForwardCall) -> tuple[Any, ...] | None:
        facts: list[Any] = [compiled]
        for array in call.arrays:
            if array is None:
                facts.append(None)
                continue
            if type(array) is not np.ndarray or not (flags := array.flags).aligned:
                return None
            facts.append((array.shape, array.strides, array.dtype, flags.writeable))
        return tuple(facts)

    def moments(self, x: Array, mask: Array | None = None, dtype: np.dtype | None = None) -> Moments:
        if not x.size:
            return new(Moments, partial(np.zeros, x.shape[:2]))
        wide = math_dtype(x.dtype if dtype is None else dtype, x.dtype)
        dtype = x.dtype if x.dtype.kind not in "iu" and wide == math_dtype(x.dtype) else wide
        return merge_tiles(*_choose(_without_statistics(x, dtype), Arrays(x, x, mask=mask)).moments())

    def forward(self, call: ForwardCall) -> ForwardResult:
        x, trace = call.x, call.trace
        y, statistics = _results(call)
        variance = np.empty(x.shape[:2], statistics.dtype) if call.updates and x.size else None
        if trace is not None and trace.small is not None:
            trace.small(call, y, statistics, variance)
            saved = call.saved(statistics) if call.save else None
        else:
            saved = call.saved(statistics)
            if call.mask is not None:
                saved.count = np.zeros(x.shape[:2], np.int64)
            if x.size:
                _run(call, saved, y, lambda work: work.forward(variance))
        update: Callable[..., None] = commit
        if variance is not None:
            update = _update(call, statistics, variance, None if saved is None else saved.count)
        return ForwardResult(y, saved if call.save else None, update)

    def normalize(self, call: ForwardCall) -> ForwardResult:
        y, statistics = _results(call)
        saved = call.saved(statistics)
        update: Callable[..., None] = commit
        with np.errstate(all="ignore"):
            if call.moments is None:
                assert call.running_mean is not None and call.running_var is not None
                saved.mean[...] = call.running_mean
                dtype = saved.rstd.dtype
                saved.rstd[...] = rstd_of(call.running_var.astype(dtype), dtype.type(call.eps), call.eps_mode)
            else:
                assert saved.mean_lo is not None
                saved.mean[...] = call.moments.mean
                saved.mean_lo[...] = call.moments.mean - saved.mean
                rstd = rstd_of(var_of(call.moments, call.ddof), call.eps, call.eps_mode)
                saved.rstd[...] = np.where(call.moments.count > 0, rstd, 0)
        if call.x.size:
            _run(call, saved, y, lambda work: work.normalize())
        if call.updates:  # and moments are given
            mean, var, momentum = _means_of_channels(call.moments, call.momentum)
            update = partial(running.move, ((call.running_mean, mean), (call.running_var, var)), momentum)
        return ForwardResult(y, saved if call.save else None, update)

    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
        sums = np.zeros((2, *saved.x.shape[:2]), math_dtype(saved.x.dtype))  # of g times xhat, and of g
        arrays, dresidual = _arrays_of_backward(dy, saved, out)
        if saved.x.size:
            _choose(saved, arrays).backward(sums[1], sums[0], *_slopes_and_counts(saved))
        dweight, dbias = _gradients(sums, saved.weight, saved.bias)
        return Gradients(arrays.result, dweight, dbias, dresidual)

    def gradient_sums(self, dy: Array, saved: Saved) -> GradientSums:
        dy = _aligned(dy)
        sums = new(GradientSums, partial(np.zeros, saved.x.shape[:2]))
        if saved.x.size:
            residual = None if saved.activation is None else saved.residual
            arrays = Arrays(saved.x, saved.x, dy, residual, mask=saved.mask)
            _choose(saved, arrays).gradient_sums(sums.sum_dy, sums.sum_dy_xhat)
        return sums

    def input_gradient(
        self, dy: Array, saved: Saved, sums: GradientSums, *, out: Array | None
    ) -> tuple[Array, Array | None]:
        arrays, dresidual = _arrays_of_backward(dy, saved, out)
        if saved.x.size:
            # The implementations divide by x's number of positions.
            with np.errstate(all="ignore"):
                share = 1 if saved.count is None else math.prod(saved.x.shape[2:]) / saved.count
                shares, slopes = (share, share), rstd_slope(saved)
                if slopes is not None:
                    shares = share, share * slopes
                plane_sums = [
                    (s * share).astype(saved.rstd.dtype, order="C")
                    for s, share in zip((sums.sum_dy, sums.sum_dy_xhat), shares, strict=True)
                ]
            _choose(saved, arrays).input_gradient(*plane_sums)
        return arrays.result, dresidual

    def parameter_gradients(self, sums: GradientSums, saved: Saved) -> tuple[Array | None, Array | None]:
        dweight, dbias = _gradients(np.stack([sums.sum_dy_xhat, sums.sum_dy]), saved.weight, saved.bias)
        return dweight, dbias

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

    def describe(self, x: Array, calls: Explained) -> list[str]:
        if not x.size:
            return ["the CPU", "  empty, nothing is computed"]
        call, new = _without_statistics(x, calls.dtype), empty_like(x, np.empty, calls.dtype)
        mask = empty_like(x, np.empty, bool) if calls.mask else None

        def lines(work: Any) -> list[str]:
            tiles = f", each in {work.tiles} tiles, put together in a fixed order" if work.tiles > 1 else ""
            threads = f"up to {work.threads} threads" if work.threads > 1 else "one thread"
            return [f"  {work}{tiles}", f"  {threads} of {get_num_threads()}"]

        described = ["the CPU", *lines(_choose(call, Arrays(x, new, mask=mask)))]
        if call.mixed and not calls.alone:
            refused = x.dtype.kind in "iu"
            why = "refused, since integers have no gradient" if refused else "all arrays are converted first"
            described.append(f"  backward: {why}")
        elif calls.double_backward:
            first, *more = lines(DoubleBackwardWork(call, DoubleArrays(x, *[new] * 4), None, None))
            described += [f"  double backward: {first.strip()}", *more]
        if calls.parts:
            names = "moments, forward with moments=, gradient sums, backward with sums="
            described += [f"  {names}: the same blocks, each array read once"]
        return described


def _without_statistics(x: Array, dtype: np.dtype) -> Saved:
    """Return the Saved of a forward, with results of this dtype, that has not computed anything yet."""
    return Saved(x, np.empty((3, *x.shape[:2]), math_dtype(dtype, x.dtype)), None, None, True, dtype=dtype)


def _results(call: ForwardCall) -> tuple[np.ndarray, np.ndarray]:
    """Return y and Saved.statistics, to be computed. The call has a trace then."""
    trace = call.trace = call.trace or _trace_of(call)
    return trace.result() if call.out is None else call.out, trace.statistics()


def _update(
    call: ForwardCall, statistics: np.ndarray, variance: np.ndarray, counts: np.ndarray | None
) -> Callable[..., None]:
    """Return what updates the running statistics. counts: the positions of each plane, with a mask."""
    mean, mean_lo = statistics[0], statistics[2]
    momentum: Any = call.momentum
    with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are answers
        means = np.add(mean, mean_lo, dtype=np.float64)
        if counts is not None:
            m2 = variance.astype(np.float64) * counts
            exact, unbiased, momentum = _means_of_channels(Moments(counts, means, m2), momentum)
        else:
            (samples, _, *spatial), dtype = call.x.shape, variance.dtype
            count = math.prod(spatial)
            variance *= dtype.type(count / (count - 1))
            exact = np.add.reduce(means, 0) / samples
            unbiased = np.add.reduce(variance, 0, np.float64) / samples
    return partial(running.move, ((call.running_mean, exact), (call.running_var, unbiased)), momentum)


def _run(call: ForwardCall, saved: Saved, y: Array, step: Callable[[Any], None]) -> None:
    """Run a step of the implementation, which the next calls with this trace have, too."""
    work = call.trace.work(saved, Arrays(call.x, y, None, call.residual, None, call.mask))
    step(work)
    if call.trace.work is _choose and work.again is not None:
        call.trace = call.trace._replace(work=work.again, small=work.small)


def _slopes_and_counts(saved: Saved) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return rstd_slope and, with a mask, the positions of each plane, in computing precision."""
    slopes, counts = rstd_slope(saved), None
    if saved.mask is not None and saved.training:
        counts = np.maximum(saved.count, 1).astype(saved.rstd.dtype)  # type: ignore[arg-type]  # not None
    return None if slopes is None else np.ascontiguousarray(slopes, saved.rstd.dtype), counts


def _means_of_channels(moments: Moments, momentum: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the averages over the batch of mean and unbiased variance, and the momentum of each channel: 0 if no plane
    counts. Planes of fewer than two positions do not count."""
    counts = moments.count >= 2
    number = counts.sum(0)
    with np.errstate(all="ignore"):
        sums = [np.where(counts, values, 0).sum(0) for values in (moments.mean, moments.var(ddof=1))]
        mean, var = (total / np.maximum(number, 1) for total in sums)
    return mean, var, np.where(number > 0, momentum, 0)


def _arrays_of_backward(dy: Array, saved: Saved, out: Array | None) -> tuple[Arrays, Array | None]:
    """Return the arrays of a backward, with dx as the result, and dresidual."""
    x, given, dy = saved.x, dy, _aligned(dy)
    dx = empty_like(x, empty) if out is None else out
    if not saved.with_residual or saved.activation is None:
        dresidual = given if saved.with_residual else None
        if dresidual is not None and out is not None and overlap(out, given):
            dresidual = given.copy()
        return Arrays(x, dx, dy, mask=saved.mask), dresidual
    dresidual = empty_like(x, empty)
    return Arrays(x, dx, dy, saved.residual, dresidual, saved.mask), dresidual


def _aligned(dy: Array) -> Array:
    """Return dy, or an aligned copy: NumPy alone would compute z with other bits than the forward's loops did."""
    return dy if dy.flags.aligned else dy.copy()


def _gradients(sums: np.ndarray, *parameters: Array | None) -> list[Array | None]:
    """Parameters' gradients, in their shapes and dtypes, from all planes' sums for each, shape (parameters, N, C)."""
    ranks = {parameter.ndim for parameter in parameters if parameter is not None}
    if not ranks:
        return [*parameters]
    with np.errstate(all="ignore"):
        by_rank = {2: sums}
        if 1 in ranks:
            by_rank[1] = sums[:, 0] if sums.shape[1] == 1 else np.add.reduce(sums, 1, np.float64)
        return [None if p is None else by_rank[p.ndim][i].astype(p.dtype) for i, p in enumerate(parameters)]


backend = CpuBackend()
