"""The operations of the backend of CuPy arrays, on any runtime that compiles and runs the kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .._checks import overlap
from .._types import (
    EPS_MODES,
    Array,
    DoubleGradients,
    Explained,
    ForwardCall,
    ForwardResult,
    Gradients,
    Saved,
    math_dtype,
)
from ..backend import Backend
from ..statistics import GradientSums, Moments, new
from .arguments import FLAGS
from .describe import describe
from .launches import Launches, PlannedLaunches, PlannedStep, Runtime, assignment
from .ops import COEFFICIENTS, Op
from .variants import EPILOGUES


def _rectifier_slope(activation: str | None, negative_slope: float) -> float:
    """Return a rectifier's slope below 0. Other activations do not use the result."""
    return {None: 1.0, "relu": 0.0}.get(activation, negative_slope)


def _scale(call: ForwardCall | Saved) -> dict[str, Any]:
    """Return the kernels' arguments that say how rstd follows from a variance."""
    return {"scale.eps": call.eps, "scale.ddof": call.ddof, "scale.mode": EPS_MODES.index(call.eps_mode)}


class CudaBackend(Backend):
    """The backend of CuPy arrays, on a runtime.

    A call allocates and compiles all that it needs before its first launch, so a failure before that has written
    nothing. Kernels are launched when the call is committed; running statistics are updated last.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def describe(self, x: Array, calls: Explained) -> list[str]:
        with self.runtime.on(x):
            device = self.runtime.device()
        return describe(x, self.runtime.address(x), device, calls)

    # Forward

    def moments(self, x: Array, mask: Array | None = None, dtype: np.dtype | None = None) -> Moments:
        with self.runtime.on(x):
            wide = math_dtype(x.dtype if dtype is None else dtype, x.dtype)
            own = x.dtype.kind not in "iu" and wide == math_dtype(x.dtype)
            work = PlannedLaunches(self.runtime, "moments", (x,), dtype=None if own else wide, mask=mask)
            moments = new(Moments, partial(work.empty, work.nc))
            if x.size == 0:
                for array in vars(moments).values():
                    array.fill(0)
                return moments
            if work.tiles > 1:
                work.point_to("partials", **vars(new(Moments, partial(work.empty, (*work.nc, work.tiles)))))
                work.point_to("merged", **vars(moments))
            else:
                work.point_to("partials", **vars(moments))
            for step in work.steps:
                work.run(step)
            work.commit()
            return moments

    def forward(self, call: ForwardCall) -> ForwardResult:
        return self._forward("forward", call)

    def normalize(self, call: ForwardCall) -> ForwardResult:
        return self._forward("normalize", call)

    def _forward(self, op: Op, call: ForwardCall) -> ForwardResult:
        """forward: with x's own statistics; normalize: with call.moments, or with the running statistics."""
        x, activation, residual, moments = call.x, call.activation, call.residual, call.moments
        with self.runtime.on(x):
            update = call.updates
            planned = update and op == "forward"  # from given moments the update needs no plan
            epilogue = EPILOGUES[activation] if activation is not None or residual is not None else 0
            work = PlannedLaunches(
                self.runtime, op, (x,), residual=residual, out=call.out, sums=planned, reduced=planned,
                epilogue=epilogue, dtype=call.dtype, mask=call.mask,
            )  # fmt: skip
            needed = call.save or moments is not None
            mean, variance = work.planes(needed or update), work.planes(update)
            rstd, mean_lo = work.planes(needed), work.planes(needed and call.use_input_stats)
            # With moments, these have it.
            counts = op == "forward" and call.mask is not None and (call.save or update)
            count = work.empty(work.nc, np.int64) if counts else None
            saved = call.saved(mean, rstd, mean_lo) if call.save else None
            if saved is not None and count is not None:
                saved.count = count
            if x.size == 0 and (moments is None or 0 in work.nc):
                for array in (mean_lo, count):
                    if array is not None:
                        array.fill(0)
                return ForwardResult(work.result, saved, work.commit)
            running_mean, running_var = call.running_mean, call.running_var
            weight, bias, mean_, var_ = (
                work.dense(array) for array in (call.weight, call.bias, running_mean, running_var)
            )
            flags = work.flags(WEIGHT=weight, BIAS=bias, RUNNING_MEAN=running_mean, RUNNING_VAR=running_var)
            work.point("affine.weight", weight)
            work.point("affine.bias", bias)
            if not call.use_input_stats:
                work.point("given_mean", mean_)
                work.point("given_var", var_)
            work.values |= {
                "affine.flags": flags, "flags": flags, "momentum": call.momentum, **_scale(call),
                "epilogue.slope": _rectifier_slope(activation, call.negative_slope),
            }  # fmt: skip
            if x.size and work.plan.regime == "split":
                mean, rstd, mean_lo = (work.planes() if array is None else array for array in (mean, rstd, mean_lo))
                work.point_to("partials", **vars(new(Moments, partial(work.empty, (*work.nc, work.tiles)))))
            for name, array in (
                ("mean", mean), ("rstd", rstd), ("mean_lo", mean_lo), ("variance", variance), ("count", count),
            ):  # fmt: skip
                work.point(name, array)
            after: tuple[PlannedStep, ...] = ()
            if moments is not None:
                given = Moments(*map(work.dense, vars(moments).values()))
                work.point_to("moments", **vars(given))
                work.point("count", given.count)
                work.run(work.of_planes("statistics_of_moments"))
                after = (work.of_planes("running_statistics"),)
            if x.size:
                after = work.run_planes() or after
            if update:
                work.point("running_mean", mean_)
                work.point("running_var", var_)
                copies = [(a, b) for a, b in ((running_mean, mean_), (running_var, var_)) if a is not b]
                again = [assignment(b, a) for a, b in copies]  # other calls may have updated them since
                work.updates = [*again, work.prepare(after[0]), *(assignment(a, b) for a, b in copies)]
            return ForwardResult(work.result, saved, work.commit)

    # Backward

    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
        return self._backward(dy, saved, (saved.weight, saved.bias), out)

    def _backward(
        self, dy: Array, saved: Saved, parameters: tuple[Array | None, Array | None], out: Array | None
    ) -> Gradients:
        """parameters: weight and bias, each None if its gradient is not wanted."""
        x = saved.x
        with self.runtime.on(x):
            op: Op = "backward" if saved.training else "frozen_backward"
            wanted = any(p is not None for p in parameters)
            work = PlannedLaunches(
                self.runtime, op, (x, dy), residual=saved.residual, out=out, sums=wanted,
                reduced=any(p is not None and not _direct(p, x.shape) for p in parameters), epilogue=_epilogue(saved),
                mask=saved.mask,
            )  # fmt: skip
            dresidual = _dresidual(work, dy, saved)
            gradients = _ParameterGradients(work, *parameters)
            if x.size:
                _point_saved(work, saved)
                if saved.mask is not None and saved.training:
                    work.point("count", work.dense(saved.count))
                gradients.point()
                if op == "frozen_backward" and work.tiles > 1 and wanted:
                    step, merge, *_ = work.steps
                    rest = work.steps[2:]
                    partials = work.partials()
                    sums = {"sums.dy": work.address(partials[0]), "sums.dy_xhat": work.address(partials[1])}
                    work.run(step, sums | {"sums.flags": 0})
                    work.run(merge)
                else:
                    if work.plan.regime == "split":
                        work.partials()
                        work.point("mean_dy", work.planes())
                        work.point("mean_dy_xhat", work.planes())
                        work.values["g.data"] = work.values["dy.data" if saved.residual is None else "dresidual.data"]
                    rest = work.run_planes()
                if gradients.reduced:
                    work.run(rest[0])
            work.commit()
            return Gradients(work.result, gradients.dweight, gradients.dbias, dresidual)

    def gradient_sums(self, dy: Array, saved: Saved) -> GradientSums:
        x = saved.x
        with self.runtime.on(x):
            work = PlannedLaunches(
                self.runtime, "gradient_sums", (x, dy), residual=saved.residual, epilogue=_epilogue(saved),
                mask=saved.mask,
            )  # fmt: skip
            sums = new(GradientSums, partial(work.empty, work.nc))
            if x.size == 0:
                for array in vars(sums).values():
                    array.fill(0)
                return sums
            _point_saved(work, saved)
            work.point_to("totals", dy=sums.sum_dy, dy_xhat=sums.sum_dy_xhat)
            if work.tiles > 1:
                work.partials()
                work.run(work.steps[0], {"totals.dy": 0})
                work.run(work.steps[1])
            else:
                work.run(work.steps[0])
            work.commit()
            return sums

    def input_gradient(
        self, dy: Array, saved: Saved, sums: GradientSums, *, out: Array | None
    ) -> tuple[Array, Array | None]:
        if not saved.training:
            dx, _, _, dresidual = self._backward(dy, saved, (None, None), out)
            return dx, dresidual
        x = saved.x
        with self.runtime.on(x):
            work = PlannedLaunches(
                self.runtime, "input_gradient", (x, dy), residual=saved.residual, out=out, epilogue=_epilogue(saved),
                mask=saved.mask,
            )  # fmt: skip
            dresidual = _dresidual(work, dy, saved)
            if x.size:
                _point_saved(work, saved)
                work.point_to("totals", dy=work.dense(sums.sum_dy), dy_xhat=work.dense(sums.sum_dy_xhat))
                work.point("count", work.dense(saved.count))
                work.point("mean_dy", work.planes())
                work.point("mean_dy_xhat", work.planes())
                work.run(work.of_planes("means_of_sums"))
                work.run(work.steps[0])
            work.commit()
            return work.result, dresidual

    def parameter_gradients(self, sums: GradientSums, saved: Saved) -> tuple[Array | None, Array | None]:
        with self.runtime.on(saved.x):
            work = Launches(self.runtime, saved.x)
            gradients = _ParameterGradients(work, saved.weight, saved.bias)
            if 0 not in work.nc and (saved.weight is not None or saved.bias is not None):
                gradients.point()
                work.point_to("totals", dy=work.dense(sums.sum_dy), dy_xhat=work.dense(sums.sum_dy_xhat))
                work.run(work.of_planes("means_of_sums"))
                if gradients.reduced:
                    work.run(work.of_planes("parameter_gradients"))
            work.commit()
            return gradients.dweight, gradients.dbias

    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> DoubleGradients:
        x, weight = saved.x, saved.weight
        with self.runtime.on(x):
            # As in backward; without ddx the weight has no influence.
            direct = weight is not None and _direct(weight, x.shape)
            summed = weight is not None and ddx is not None
            op: Op = "double_backward" if saved.training else "frozen_double_backward"
            inputs = (x, dy) if ddx is None else (x, dy, ddx)
            work = PlannedLaunches(self.runtime, op, inputs, sums=summed, reduced=summed and not direct)
            dx, ddy = work.targets["dx"], work.targets["ddy"]
            dweight = None if weight is None else work.empty(weight.shape, weight.dtype)
            if dweight is not None and (ddx is None or x.size == 0):
                dweight.fill(0)
            if x.size == 0:
                return DoubleGradients(ddy, dx, dweight)
            weight, ddweight, ddbias = work.dense(weight), work.dense(ddweight), work.dense(ddbias)
            narrow = 0
            if dweight is not None and direct and dweight.dtype != work.math:
                narrow = FLAGS["NARROW_SUM_DY_XHAT"]
            flags = work.flags(WEIGHT=weight, BIAS=ddbias, DDWEIGHT=ddweight) | narrow
            sums = (dweight if direct else work.planes()) if summed else None
            for name, array in (
                ("mean", saved.mean), ("rstd", saved.rstd), ("parameters.weight", weight),
                ("parameters.ddbias", ddbias), ("parameters.ddweight", ddweight), ("sums.dy_xhat", sums),
            ):  # fmt: skip
                work.point(name, array)
            work.values |= {"parameters.flags": flags, "sums.flags": flags, "flags": flags}
            if op == "frozen_double_backward" and work.tiles > 1 and summed:
                step, merge, *_ = work.steps
                rest = work.steps[2:]
                work.point("partials", work.empty((*work.nc, work.tiles), work.math))
                work.run(step, {"sums.dy_xhat": work.values["partials"], "sums.flags": flags & ~narrow})
                work.run(merge)
            else:
                if work.plan.regime == "split":
                    work.partials()
                    work.point("coefficients", work.empty((COEFFICIENTS, *work.nc), work.math))
                rest = work.run_planes()
            if summed and not direct:
                work.point("dweight", dweight)
                work.run(rest[0])
            work.commit()
            return DoubleGradients(ddy, work.result, dweight)


class _ParameterGradients:
    """dweight and dbias, new arrays, and how the kernels compute them: the sums of each plane are written to the
    gradients themselves where these have one number for each plane; others are summed over the batch (`reduced`)."""

    def __init__(self, work: Launches, weight: Array | None, bias: Array | None):
        self._work = work
        self.dweight, self.dbias = (None if p is None else work.empty(p.shape, p.dtype) for p in (weight, bias))
        self._direct = [p is not None and _direct(p, work.nc) for p in (weight, bias)]
        self.reduced = any(p is not None and not direct for p, direct in zip((weight, bias), self._direct, strict=True))
        if work.x.size == 0:
            for gradient in (self.dweight, self.dbias):
                if gradient is not None:
                    gradient.fill(0)

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


def _direct(parameter: Array, nc: tuple[int, ...]) -> bool:
    """Return True if the gradient of a parameter has one number for each plane: for (N, C), or a single sample."""
    return parameter.ndim == 2 or nc[0] == 1


def _epilogue(saved: Saved) -> int:
    return 0 if saved.activation is None else EPILOGUES[saved.activation]


def _point_saved(work: Launches, saved: Saved) -> None:
    """Set what the kernels of a backward need of a forward."""
    work.point("mean", saved.mean)
    work.point("rstd", saved.rstd)
    work.point("mean_lo", saved.mean_lo)
    work.point("affine.weight", work.dense(saved.weight))
    work.values["affine.flags"] = work.flags(WEIGHT=saved.weight, BIAS=saved.bias)
    if not saved.usual_rstd:
        work.values |= _scale(saved)
    if saved.activation is not None:
        work.point("affine.bias", work.dense(saved.bias))
        work.values["epilogue.slope"] = _rectifier_slope(saved.activation, saved.negative_slope)


def _dresidual(work: PlannedLaunches, dy: Array, saved: Saved) -> Array | None:
    """Return the residual's gradient: dy itself without an activation, or a copy if out overlaps it."""
    if not saved.with_residual or saved.activation is not None:
        return work.targets.get("dresidual")
    return work.copy(dy) if work.out is not None and overlap(work.out, dy) else dy
