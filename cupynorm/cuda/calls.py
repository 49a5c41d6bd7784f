"""The operations, as they are traced: what each allocates, copies and launches.

Each function follows a call on the slots of its arrays, and returns the slots of its results. `traced` keeps the trace.
CudaBackend (launch.py) passes arrays and options in the order of the classes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .._types import EPS_MODES
from ..statistics import DTYPES
from .arguments import FLAGS
from .device import Device
from .ops import COEFFICIENTS, Op
from .replay import Facts, Runtime, Trace
from .trace import PlannedStep, Slot, Tracer
from .variants import EPILOGUES

Results = Sequence[Slot | None]

_INT64 = np.dtype(np.int64)


@dataclass(frozen=True, eq=False)
class MomentsArrays:
    x: Slot
    mask: Slot | None


def _new_moments(make: Callable[..., Slot], shape: tuple[int, ...]) -> dict[str, Slot]:
    return {name: make(shape, DTYPES[name]) for name in ("count", "mean", "m2")}


def moments(work: Tracer, given: MomentsArrays, dtype: np.dtype | None) -> Results:
    """dtype: to compute in, if it is not x's. Returns count, mean, m2."""
    work.plan("moments", (given.x,), dtype=dtype, mask=given.mask)
    if not given.x.size:
        return [*_new_moments(work.zeros, work.nc).values()]
    found = _new_moments(work.empty, work.nc)
    if work.tiles > 1:
        work.point_to("partials", **_new_moments(work.hidden, (*work.nc, work.tiles)))
        work.point_to("merged", **found)
    else:
        work.point_to("partials", **found)
    for step in work.steps:
        work.run(step)
    return [*found.values()]


def _point_statistics(work: Tracer, statistics: Slot) -> None:
    """Set the kernels' pointers to Saved.statistics."""
    for row, name in zip(range(statistics.shape[0]), ("mean", "rstd", "mean_lo"), strict=False):
        work.point(name, statistics, row)


@dataclass(frozen=True, eq=False)
class ForwardArrays:
    x: Slot
    residual: Slot | None
    out: Slot | None
    mask: Slot | None
    weight: Slot | None
    bias: Slot | None
    running_mean: Slot | None
    running_var: Slot | None
    count: Slot | None = None  # of the given moments, as are mean and m2
    mean: Slot | None = None
    m2: Slot | None = None


class ForwardOptions(NamedTuple):
    op: Op  # forward, with x's own statistics, or normalize, with given moments or running statistics
    dtype: np.dtype | None  # of the result, if it is not x's
    activation: str | None
    eps_mode: str
    use_input_stats: bool
    update: bool  # the running statistics
    save: bool


def forward(work: Tracer, given: ForwardArrays, *options: Any) -> Results:
    """Returns y; mean, rstd and, without running statistics, mean_lo, as one array; and the count of each plane's
    positions with a mask."""
    option = ForwardOptions(*options)
    x, update, with_moments = given.x, option.update, given.count is not None
    planned = update and option.op == "forward"  # from given moments the update needs no plan
    fused = option.activation is not None or given.residual is not None
    work.plan(
        option.op, (x,), residual=given.residual, out=given.out, sums=planned, reduced=planned,
        epilogue=EPILOGUES[option.activation] if fused else 0, dtype=option.dtype, mask=given.mask,
    )  # fmt: skip
    empty = not x.size and (not with_moments or 0 in work.nc)
    counts = option.op == "forward" and given.mask is not None and (option.save or update)
    make = work.zeros if empty else work.empty
    statistics = make((3 if option.use_input_stats else 2, *work.nc), work.math) if option.save else None
    count = make(work.nc, _INT64) if counts else None
    if empty:
        return work.result, statistics, count
    split = x.size > 0 and work.planned.regime == "split"
    needed = with_moments or split  # by steps in between, also if nothing is saved
    if statistics is not None:
        _point_statistics(work, statistics)
    else:
        # Running statistics need the means.
        work.point("mean", work.planes(needed or update))
        work.point("rstd", work.planes(needed))
        work.point("mean_lo", work.planes(needed))
    work.point("variance", work.planes(update))
    work.point("count", count)
    running = [given.running_mean, given.running_var]
    mean, var = dense = [work.dense(array) for array in running]
    flags = work.flags(WEIGHT=given.weight, BIAS=given.bias, RUNNING_MEAN=running[0], RUNNING_VAR=running[1])
    work.values |= {"affine.flags": flags, "flags": flags, "scale.mode": EPS_MODES.index(option.eps_mode)}
    work.point_to("affine", weight=work.dense(given.weight), bias=work.dense(given.bias))
    if not option.use_input_stats:
        work.point("given_mean", mean)
        work.point("given_var", var)
    if split:
        work.point_to("partials", **_new_moments(work.hidden, (*work.nc, work.tiles)))
    after: tuple[PlannedStep, ...] = ()
    if with_moments:
        work.point_to("moments", count=work.dense(given.count), mean=work.dense(given.mean), m2=work.dense(given.m2))
        work.values["count"] = work.values["moments.count"]
        work.run(work.of_planes("statistics_of_moments"))
        after = (work.of_planes("running_statistics"),)
    if x.size:
        after = work.run_planes() or after
    work.copy_result()
    if update:
        work.point("running_mean", mean)
        work.point("running_var", var)
        copies = [(a, b) for a, b in zip(running, dense, strict=True) if a is not None and b is not None and a is not b]
        for own, copy in copies:
            work.copy(copy, own)  # again: other calls may have updated them since
        work.run(after[0])
        for own, copy in copies:
            work.copy(own, copy)
    return work.result, statistics, count


@dataclass(frozen=True, eq=False)
class BackwardArrays:
    x: Slot
    dy: Slot
    statistics: Slot
    weight: Slot | None
    bias: Slot | None
    residual: Slot | None
    mask: Slot | None
    count: Slot | None
    out: Slot | None = None
    sum_dy: Slot | None = None  # given sums of whole planes, as is sum_dy_xhat
    sum_dy_xhat: Slot | None = None


class BackwardOptions(NamedTuple):
    training: bool
    activation: str | None
    eps_mode: str
    dresidual: bool = False  # it is dy itself, which out overlaps: return a copy
    dweight: bool = False
    dbias: bool = False


def _differentiated(given: BackwardArrays, option: BackwardOptions) -> tuple[Slot | None, Slot | None]:
    """Return weight and bias, None if the gradient is not wanted."""
    return given.weight if option.dweight else None, given.bias if option.dbias else None


def _plan_backward(work: Tracer, op: Op, given: BackwardArrays, option: BackwardOptions) -> Slot | None:
    """Plan an operation of the backward, and set what it needs of the forward. Return dresidual, if it is new."""
    parameters = [parameter for parameter in _differentiated(given, option) if parameter is not None]
    activation = option.activation
    work.plan(
        op, (given.x, given.dy), residual=given.residual, out=given.out, sums=bool(parameters),
        reduced=any(not _direct(p, given.x.shape) for p in parameters),
        epilogue=0 if activation is None else EPILOGUES[activation], mask=given.mask,
    )  # fmt: skip
    _point_statistics(work, given.statistics)
    work.point("affine.weight", work.dense(given.weight))
    work.values["affine.flags"] = work.flags(WEIGHT=given.weight, BIAS=given.bias)
    work.values["scale.mode"] = EPS_MODES.index(option.eps_mode)
    if activation is not None:
        work.point("affine.bias", work.dense(given.bias))
    if not option.dresidual:
        return work.targets.get("dresidual")
    return work.copied(given.dy)


def backward(work: Tracer, given: BackwardArrays, *options: Any) -> Results:
    """Returns dx, dweight, dbias, dresidual."""
    option = BackwardOptions(*options)
    op: Op = "backward" if option.training else "frozen_backward"
    dresidual = _plan_backward(work, op, given, option)
    gradients = _ParameterGradients(work, *_differentiated(given, option))
    if given.x.size:
        if given.mask is not None and option.training:
            work.point("count", work.dense(given.count))
        gradients.point()
        if op == "frozen_backward" and work.tiles > 1 and gradients.wanted:
            step, merge, *rest = work.steps
            partials = work.partials()
            both = {"sums.dy": work.pointer(partials, 0), "sums.dy_xhat": work.pointer(partials, 1), "sums.flags": 0}
            work.run(step, both)
            work.run(merge)
        else:
            if work.planned.regime == "split":
                work.partials()
                work.point("mean_dy", work.planes())
                work.point("mean_dy_xhat", work.planes())
                work.values["g.data"] = work.values["dy.data" if given.residual is None else "dresidual.data"]
            rest = [*work.run_planes()]
        if gradients.reduced:
            work.run(rest[0])
        work.copy_result()
    return work.result, gradients.dweight, gradients.dbias, dresidual


def gradient_sums(work: Tracer, given: BackwardArrays, *options: Any) -> Results:
    """Returns sum_dy, sum_dy_xhat."""
    _plan_backward(work, "gradient_sums", given, BackwardOptions(*options))
    make = work.empty if given.x.size else work.zeros
    sum_dy, sum_dy_xhat = (make(work.nc, DTYPES[name]) for name in ("sum_dy", "sum_dy_xhat"))
    if given.x.size:
        work.point_to("totals", dy=sum_dy, dy_xhat=sum_dy_xhat)
        if work.tiles > 1:
            work.partials()
            work.run(work.steps[0], {"totals.dy": 0})
            work.run(work.steps[1])
        else:
            work.run(work.steps[0])
    return sum_dy, sum_dy_xhat


def input_gradient(work: Tracer, given: BackwardArrays, *options: Any) -> Results:
    """Returns dx, dresidual."""
    dresidual = _plan_backward(work, "input_gradient", given, BackwardOptions(*options))
    if given.x.size:
        work.point_to("totals", dy=work.dense(given.sum_dy), dy_xhat=work.dense(given.sum_dy_xhat))
        work.point("count", work.dense(given.count))
        work.point("mean_dy", work.planes())
        work.point("mean_dy_xhat", work.planes())
        work.run(work.of_planes("means_of_sums"))
        work.run(work.steps[0])
        work.copy_result()
    return work.result, dresidual


@dataclass(frozen=True, eq=False)
class ParameterGradientsArrays:
    x: Slot
    weight: Slot | None
    bias: Slot | None
    sum_dy: Slot
    sum_dy_xhat: Slot


def parameter_gradients(work: Tracer, given: ParameterGradientsArrays) -> Results:
    """Returns dweight, dbias."""
    work.begin(given.x)
    gradients = _ParameterGradients(work, given.weight, given.bias)
    if 0 not in work.nc and gradients.wanted:
        gradients.point()
        work.point_to("totals", dy=work.dense(given.sum_dy), dy_xhat=work.dense(given.sum_dy_xhat))
        work.run(work.of_planes("means_of_sums"))
        if gradients.reduced:
            work.run(work.of_planes("parameter_gradients"))
    return gradients.dweight, gradients.dbias


@dataclass(frozen=True, eq=False)
class DoubleBackwardArrays:
    x: Slot
    dy: Slot
    ddx: Slot | None
    weight: Slot | None
    ddweight: Slot | None
    ddbias: Slot | None
    statistics: Slot


def double_backward(work: Tracer, given: DoubleBackwardArrays, training: bool) -> Results:
    """Returns ddy, dx, dweight."""
    x, ddx = given.x, given.ddx
    # As in backward; without ddx the weight has no influence.
    direct = given.weight is not None and _direct(given.weight, x.shape)
    summed = given.weight is not None and ddx is not None
    op: Op = "double_backward" if training else "frozen_double_backward"
    inputs = (x, given.dy) if ddx is None else (x, given.dy, ddx)
    work.plan(op, inputs, sums=summed, reduced=summed and not direct)
    make = work.zeros if ddx is None or not x.size else work.empty
    dweight = None if given.weight is None else make(given.weight.shape, given.weight.dtype)
    results = work.targets["ddy"], work.targets["dx"], dweight
    if not x.size:
        return results
    narrow = FLAGS["NARROW_SUM_DY_XHAT"] if dweight is not None and direct and dweight.dtype != work.math else 0
    flags = work.flags(WEIGHT=given.weight, BIAS=given.ddbias, DDWEIGHT=given.ddweight) | narrow
    _point_statistics(work, given.statistics)
    work.point_to(
        "parameters", weight=work.dense(given.weight), ddbias=work.dense(given.ddbias),
        ddweight=work.dense(given.ddweight),
    )  # fmt: skip
    work.point("sums.dy_xhat", (dweight if direct else work.planes()) if summed else None)
    work.values |= {"parameters.flags": flags, "sums.flags": flags, "flags": flags}
    if op == "frozen_double_backward" and work.tiles > 1 and summed:
        step, merge, *rest = work.steps
        work.point("partials", work.hidden((*work.nc, work.tiles), work.math))
        work.run(step, {"sums.dy_xhat": work.values["partials"], "sums.flags": flags & ~narrow})
        work.run(merge)
    else:
        if work.planned.regime == "split":
            work.partials()
            work.point("coefficients", work.hidden((COEFFICIENTS, *work.nc), work.math))
        rest = [*work.run_planes()]
    if summed and not direct:
        work.point("dweight", dweight)
        work.run(rest[0])
    return results


class _ParameterGradients:
    """dweight and dbias, new arrays, and how the kernels compute them: the sums of each plane are written to the
    gradients themselves where these have one number for each plane; others are summed over the batch (`reduced`)."""

    def __init__(self, work: Tracer, weight: Slot | None, bias: Slot | None):
        make = work.empty if work.x.size else work.zeros
        self._work = work
        self.dweight, self.dbias = (None if p is None else make(p.shape, p.dtype) for p in (weight, bias))
        self._direct = [p is not None and _direct(p, work.nc) for p in (weight, bias)]
        self.wanted = weight is not None or bias is not None
        self.reduced = any(p is not None and not direct for p, direct in zip((weight, bias), self._direct, strict=True))

    def point(self) -> None:
        """Set the kernels' pointers to the sums and the gradients, and their flags."""
        work, (direct_weight, direct_bias), flags = self._work, self._direct, 0
        work.point("sums.dy", self.dbias if direct_bias else work.planes(self.dbias is not None))
        work.point("sums.dy_xhat", self.dweight if direct_weight else work.planes(self.dweight is not None))
        if direct_bias and self.dbias.dtype != work.math:  # type: ignore[union-attr]
            flags |= FLAGS["NARROW_SUM_DY"]
        if direct_weight and self.dweight.dtype != work.math:  # type: ignore[union-attr]
            flags |= FLAGS["NARROW_SUM_DY_XHAT"]
        work.values["sums.flags"] = flags
        if self.reduced:
            work.point("dbias", None if direct_bias else self.dbias)
            work.point("dweight", None if direct_weight else self.dweight)
            work.values["flags"] = work.flags(WEIGHT=self.dweight, BIAS=self.dbias)


def _direct(parameter: Slot, nc: tuple[int, ...]) -> bool:
    """Return True if the gradient of a parameter has one number for each plane: for (N, C), or a single sample."""
    return parameter.ndim == 2 or nc[0] == 1


#: The class of each call's arrays.
ARRAYS: dict[Callable[..., Results], Any] = {
    moments: MomentsArrays,
    forward: ForwardArrays,
    backward: BackwardArrays,
    gradient_sums: BackwardArrays,
    input_gradient: BackwardArrays,
    parameter_gradients: ParameterGradientsArrays,
    double_backward: DoubleBackwardArrays,
}


@lru_cache(maxsize=4096)
def traced(
    call: Callable[..., Results],
    runtime: Runtime,
    device: Device,
    invariant: bool,
    given: tuple[Facts | None, ...],
    options: tuple[Any, ...],
) -> Trace:
    """Return the trace of a call: a function above, with the facts of its arrays and its options. It is made once.

    invariant: see `set_batch_invariant`.
    """
    work = Tracer(runtime, device, invariant, given)
    return work.trace(call(work, ARRAYS[call](*work.given), *options))
