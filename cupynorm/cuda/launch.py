"""The operations of the backend of CuPy arrays, on any runtime that compiles and runs the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

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
    math_dtype,
)
from ..backend import Backend
from ..config import get_batch_invariant
from ..statistics import GradientSums, Moments
from . import calls
from .describe import describe
from .ops import Op
from .replay import Facts, Runtime, Trace

_NO_NUMBERS = 0.0, 0.0, 0.0, 0.0


def _rectifier_slope(activation: str | None, negative_slope: float) -> float:
    """Return a rectifier's slope below 0. Other activations do not use the result."""
    return 1.0 if activation is None else 0.0 if activation == "relu" else negative_slope


def _numbers(call: ForwardCall | Saved, momentum: float = 0.0) -> tuple[float, float, float, float]:
    """Return trace.NUMBERS of a call."""
    return call.eps, call.ddof, momentum, _rectifier_slope(call.activation, call.negative_slope)


class CudaBackend(Backend):
    """The backend of CuPy arrays, on a runtime.

    A call allocates and compiles all that it needs before its first launch, so a failure before that has written
    nothing. Kernels are launched when the call is committed; running statistics are updated last.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def facts(self, call: ForwardCall) -> tuple[Facts | None, ...] | None:
        try:
            return self.runtime.facts(call.arrays)
        except (AttributeError, ValueError, TypeError):  # not an array, or not one on a GPU: NumPy has other `data`
            return None

    def describe(self, x: Array, calls: Explained) -> list[str]:
        with self.runtime.elsewhere(x) or nullcontext():
            return describe(x, self.runtime.addresses([x])[0], self.runtime.device(), calls)

    def _traced(
        self,
        operation: Callable[..., calls.Results],
        given: Sequence[Array | None],
        options: tuple[Any, ...],
    ) -> Trace:
        """Return the trace of a call on its arrays. options: what it depends on besides their facts."""
        runtime = self.runtime
        return calls.traced(operation, runtime, runtime.device(), get_batch_invariant(), runtime.facts(given), options)

    def _run(
        self,
        operation: Callable[..., calls.Results],
        given: Sequence[Array | None],
        options: tuple[Any, ...],
        numbers: Sequence[float] = _NO_NUMBERS,
    ) -> list[Any]:
        """Run an operation on its arrays, x first, and return the arrays of its results."""
        elsewhere = self.runtime.elsewhere(given[0])
        if elsewhere is not None:
            with elsewhere:
                return self._run(operation, given, options, numbers)
        trace = self._traced(operation, given, options)
        arrays, prepared = trace.replay(given, numbers)
        commit(*prepared)
        return trace.results_of(arrays)

    def _commit(self, arrays: list[Any], prepared: list[partial[Any]], *writes: partial[Any]) -> None:
        elsewhere = self.runtime.elsewhere(arrays[0])
        if elsewhere is None:
            commit(*prepared, *writes)
        else:
            with elsewhere:
                commit(*prepared, *writes)

    # Forward

    def moments(self, x: Array, mask: Array | None = None, dtype: np.dtype | None = None) -> Moments:
        wide = math_dtype(x.dtype if dtype is None else dtype, x.dtype)
        own = x.dtype.kind not in "iu" and wide == math_dtype(x.dtype)
        return Moments(*self._run(calls.moments, (x, mask), (None if own else wide,)))

    def forward(self, call: ForwardCall) -> ForwardResult:
        return self._forward("forward", call)

    def normalize(self, call: ForwardCall) -> ForwardResult:
        return self._forward("normalize", call)

    def _forward(self, op: Op, call: ForwardCall) -> ForwardResult:
        """forward: with x's own statistics; normalize: with call.moments, or with the running statistics."""
        runtime, given, trace = self.runtime, call.arrays, call.trace
        elsewhere = runtime.elsewhere(call.x)
        if elsewhere is not None:
            with elsewhere:
                return self._forward(op, call)
        if trace is None or not trace.holds(runtime, get_batch_invariant()):
            options = op, call.dtype, call.activation, call.eps_mode, call.use_input_stats, call.updates, call.save
            trace = call.trace = self._traced(calls.forward, given, options)
        arrays, prepared = trace.replay(given, _numbers(call, call.momentum))
        y, statistics, count = trace.results_of(arrays)
        finish = partial(self._commit, arrays, prepared)
        if not call.save:
            return ForwardResult(y, None, finish)
        saved = call.saved(statistics)
        if count is not None:
            saved.count = count
        return ForwardResult(y, saved, finish)

    # Backward

    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
        return self._backward(dy, saved, saved.weight is not None, saved.bias is not None, out)

    def _backward(self, dy: Array, saved: Saved, dweight: bool, dbias: bool, out: Array | None) -> Gradients:
        """dweight, dbias: whether they are wanted."""
        given = (*_saved_arrays(saved, dy), out)
        options = (*_options(saved), _copies_dy(saved, dy, out), dweight, dbias)
        dx, dweight_, dbias_, dresidual = self._run(calls.backward, given, options, _numbers(saved))
        return Gradients(dx, dweight_, dbias_, dy if dresidual is None and _own_dresidual(saved) else dresidual)

    def gradient_sums(self, dy: Array, saved: Saved) -> GradientSums:
        sums = self._run(calls.gradient_sums, _saved_arrays(saved, dy), _options(saved), _numbers(saved))
        return GradientSums(*sums)

    def input_gradient(
        self, dy: Array, saved: Saved, sums: GradientSums, *, out: Array | None
    ) -> tuple[Array, Array | None]:
        if not saved.training:
            dx, _, _, dresidual = self._backward(dy, saved, False, False, out)
            return dx, dresidual
        given = (*_saved_arrays(saved, dy), out, sums.sum_dy, sums.sum_dy_xhat)
        options = (*_options(saved), _copies_dy(saved, dy, out))
        dx, dresidual = self._run(calls.input_gradient, given, options, _numbers(saved))
        return dx, dy if dresidual is None and _own_dresidual(saved) else dresidual

    def parameter_gradients(self, sums: GradientSums, saved: Saved) -> tuple[Array | None, Array | None]:
        given = saved.x, saved.weight, saved.bias, sums.sum_dy, sums.sum_dy_xhat
        dweight, dbias = self._run(calls.parameter_gradients, given, ())
        return dweight, dbias

    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> DoubleGradients:
        given = saved.x, dy, ddx, saved.weight, ddweight, ddbias, saved.statistics
        ddy, dx, dweight = self._run(calls.double_backward, given, (saved.training,))
        return DoubleGradients(ddy, dx, dweight)


def _saved_arrays(saved: Saved, dy: Array) -> tuple[Array | None, ...]:
    return saved.x, dy, saved.statistics, saved.weight, saved.bias, saved.residual, saved.mask, saved.count


def _options(saved: Saved) -> tuple[Any, ...]:
    return saved.training, saved.activation, saved.eps_mode


def _own_dresidual(saved: Saved) -> bool:
    """Return True if the residual's gradient is dy, or a copy of it, so that no kernel writes it."""
    return saved.with_residual and saved.activation is None


def _copies_dy(saved: Saved, dy: Array, out: Array | None) -> bool:
    """Return True if the residual's gradient is a copy of dy, which out is to overwrite."""
    return _own_dresidual(saved) and out is not None and overlap(out, dy)
