"""Launches: forward, backward and double backward, on any runtime that compiles and runs the kernels.

This module does not use CuPy: a Runtime allocates arrays, returns their addresses and launches. CuPy's is in
runtime.py; the tests have one that runs the same kernels on an emulator, over NumPy arrays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from .._checks import overlap
from .._types import Array, DoubleGradients, ForwardCall, ForwardResult, Gradients, Saved, commit, math_dtype
from ..backend import Backend
from ..config import get_batch_invariant
from . import arguments
from .arguments import FLAGS
from .describe import describe
from .device import Device
from .layout import ArrayDesc, choose_layout, contiguous_desc
from .ops import COEFFICIENTS, OPS, Op
from .plan import Plan, Step, plan
from .source import Module
from .variants import EPILOGUES, Kind

NOTHING: Mapping[str, Any] = {}


def _rectifier_slope(activation: str | None, negative_slope: float) -> float:
    """Return a rectifier's slope below 0. Other activations do not use the result."""
    return {None: 1.0, "relu": 0.0}.get(activation, negative_slope)


class Runtime(Protocol):
    """Allocates arrays, and compiles and runs kernels, on the device of an array."""

    def on(self, array: Array) -> AbstractContextManager[Any]:
        """Make the array's device current."""

    def device(self) -> Device:
        """Return the current device."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new C-contiguous array on the current device."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new C-contiguous array of zeros on the current device."""

    def address(self, array: Array) -> int:
        """Return the address of the array's first element."""

    def prepare(self, module: Module, step: Step, arguments: bytearray) -> partial[Any]:
        """Compile a kernel, and return a partial, of a C function if possible, that enqueues it on the current stream.

        arguments: the memory of its structure (arguments.py).
        """


class CudaBackend(Backend):
    """The backend of CuPy arrays, on a runtime.

    A call allocates and compiles all that it needs before its first launch, so a failure before that has written
    nothing. Kernels are launched when the call is committed; running statistics are updated last.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def describe(self, x: Array, *, activation: str | None, residual: bool, double_backward: bool) -> list[str]:
        with self.runtime.on(x):
            device = self.runtime.device()
        return describe(x, self.runtime.address(x), device, activation, residual, double_backward)

    def forward(self, call: ForwardCall) -> ForwardResult:
        x, activation, residual, training = call.x, call.activation, call.residual, call.use_input_stats
        with self.runtime.on(x):
            update = call.updates
            epilogue = EPILOGUES[activation] if activation is not None or residual is not None else 0
            op: Op = "forward" if training else "normalize"
            work = _Launches(
                self.runtime, op, (x,), residual=residual, out=call.out, sums=update, reduced=update, epilogue=epilogue
            )  # fmt: skip
            mean, variance = work.planes(call.save or update), work.planes(update)
            rstd = work.planes(call.save)
            mean_lo = work.planes(call.save and training and activation is not None)
            saved = call.saved(mean, rstd, mean_lo) if call.save else None
            if x.size == 0:
                if mean_lo is not None:
                    mean_lo.fill(0)
                return ForwardResult(work.result, saved, work.commit)
            running_mean, running_var = call.running_mean, call.running_var
            weight, bias, mean_, var_ = (
                work.dense(array) for array in (call.weight, call.bias, running_mean, running_var)
            )
            flags = work.flags(WEIGHT=weight, BIAS=bias, RUNNING_MEAN=running_mean, RUNNING_VAR=running_var)
            work.point("affine.weight", weight)
            work.point("affine.bias", bias)
            if not training:
                work.point("given_mean", mean_)
                work.point("given_var", var_)
            work.values |= {
                "affine.flags": flags, "flags": flags, "eps": call.eps, "momentum": call.momentum,
                "epilogue.slope": _rectifier_slope(activation, call.negative_slope),
            }  # fmt: skip
            if work.plan.regime == "split":
                mean, rstd, mean_lo = (work.planes() if array is None else array for array in (mean, rstd, mean_lo))
                for name, dtype in (("counts", np.int64), ("means", np.float64), ("m2", np.float64)):
                    work.point(name, work.empty((*work.nc, work.tiles), dtype))
            for name, array in (("mean", mean), ("rstd", rstd), ("mean_lo", mean_lo), ("variance", variance)):
                work.point(name, array)
            rest = work.run_planes()
            if update:
                work.point("running_mean", mean_)
                work.point("running_var", var_)
                copies = [(a, b) for a, b in ((running_mean, mean_), (running_var, var_)) if a is not b]
                again = [_assignment(b, a) for a, b in copies]  # other calls may have updated them since
                work.updates = [*again, work.prepare(rest[0]), *(_assignment(a, b) for a, b in copies)]
            return ForwardResult(work.result, saved, work.commit)

    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
        x, weight, bias, activation = saved.x, saved.weight, saved.bias, saved.activation
        with self.runtime.on(x):
            epilogue = 0 if activation is None else EPILOGUES[activation]
            # For parameters (N, C), or for one sample, the sums of a plane are the gradients themselves.
            direct = [p is not None and (p.ndim == 2 or x.shape[0] == 1) for p in (bias, weight)]
            wanted = [p is not None for p in (bias, weight)]
            op: Op = "backward" if saved.training else "frozen_backward"
            reduced = any(w and not d for w, d in zip(wanted, direct, strict=True))
            work = _Launches(
                self.runtime, op, (x, dy), residual=saved.residual, out=out, sums=any(wanted), reduced=reduced,
                epilogue=epilogue,
            )  # fmt: skip
            dresidual = work.targets.get("dresidual")
            if saved.with_residual and activation is None:
                dresidual = dy
                if out is not None and overlap(out, dy):
                    dresidual = work.copy(dy)
            dbias, dweight = (None if p is None else work.empty(p.shape, p.dtype) for p in (bias, weight))
            if x.size == 0:
                for gradient in (dweight, dbias):
                    if gradient is not None:
                        gradient.fill(0)
                work.commit()
                return Gradients(work.result, dweight, dbias, dresidual)
            narrow = 0
            if dbias is not None and direct[0] and dbias.dtype != work.math:
                narrow |= FLAGS["NARROW_SUM_DY"]
            if dweight is not None and direct[1] and dweight.dtype != work.math:
                narrow |= FLAGS["NARROW_SUM_DY_XHAT"]
            flags = work.flags(WEIGHT=weight, BIAS=bias) | narrow
            work.point("mean", saved.mean)
            work.point("rstd", saved.rstd)
            work.point("affine.weight", work.dense(weight))
            if epilogue:
                work.point("affine.bias", work.dense(bias))
                work.point("mean_lo", saved.mean_lo)
            # Kernels write the sums to the gradients themselves if these are sums of one plane, else one per plane.
            sum_dy, sum_dy_xhat = (
                gradient if is_direct else work.planes(gradient is not None)
                for gradient, is_direct in ((dbias, direct[0]), (dweight, direct[1]))
            )
            work.point("sums.dy", sum_dy)
            work.point("sums.dy_xhat", sum_dy_xhat)
            work.values |= {
                "affine.flags": flags, "sums.flags": flags, "flags": flags,
                "epilogue.slope": _rectifier_slope(activation, saved.negative_slope),
            }  # fmt: skip
            if op == "frozen_backward" and work.tiles > 1 and any(wanted):
                step, merge, *_ = work.steps
                rest = work.steps[2:]
                partials = work.partials()
                sums = {"sums.dy": work.address(partials[0]), "sums.dy_xhat": work.address(partials[1])}
                work.run(step, sums | {"sums.flags": flags & ~narrow})
                work.run(merge)
            else:
                if work.plan.regime == "split":
                    work.partials()
                    for name in ("sum_dy", "sum_dy_xhat", "merged_mean_lo"):
                        work.point(name, work.planes())
                    work.values["g.data"] = work.values["dy.data" if saved.residual is None else "dresidual.data"]
                rest = work.run_planes()
            if reduced:
                # The gradients that the kernels did not write directly.
                work.point("dweight", None if direct[1] else dweight)
                work.point("dbias", None if direct[0] else dbias)
                work.run(rest[0])
            work.commit()
            return Gradients(work.result, dweight, dbias, dresidual)

    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> DoubleGradients:
        x, weight = saved.x, saved.weight
        with self.runtime.on(x):
            # As in backward; without ddx the weight has no influence.
            direct = weight is not None and (weight.ndim == 2 or x.shape[0] == 1)
            summed = weight is not None and ddx is not None
            op: Op = "double_backward" if saved.training else "frozen_double_backward"
            inputs = (x, dy) if ddx is None else (x, dy, ddx)
            work = _Launches(self.runtime, op, inputs, sums=summed, reduced=summed and not direct)
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


def _assignment(target: Array, source: Array) -> partial[None]:
    """Return a copy between arrays of the same dtype, to be run later; of 16-bit ones as bits, for bfloat16's sake."""
    for array in (target, source):
        if not isinstance(array, np.ndarray) and any(n % array.itemsize for n in (array.data.ptr, *array.strides)):
            raise ValueError(
                f"an array of dtype {array.dtype} and strides {array.strides} has elements that are not aligned to "
                "their size, which a GPU cannot access: pass a copy of its bytes in an array of their own"
            )
    if target.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)
    return partial(operator.setitem, target, ..., source)


class _PlannedStep(NamedTuple):
    """A step of a plan, its module, and the arguments of its kernel that follow from the plan; a call adds the rest."""

    step: Step
    module: Module
    template: bytes


class _PlannedCall(NamedTuple):
    """The part of a call that follows from the shapes, strides and alignment of its arrays."""

    kind: Kind
    copied: tuple[bool, ...]  # which of the given arrays the kernels cannot read or write in place
    plan: Plan
    steps: tuple[_PlannedStep, ...]


@lru_cache(maxsize=4096)
def _plan_call(
    op: Op,
    descs: tuple[ArrayDesc, ...],
    names: tuple[str, ...],
    dtype: np.dtype,
    device: Device,
    *,
    sums: bool,
    reduced: bool,
    epilogue: int,
    residual: bool,
    invariant: bool,
) -> _PlannedCall:
    """Plan a call. descs: of the inputs, then of out if it is given; names: of the inputs' and the results' tensors."""
    shape, itemsize = descs[0].shape, descs[0].itemsize
    kind, _, copied = choose_layout(descs, invariant)
    new = contiguous_desc(shape, itemsize, kind)
    # New arrays are aligned, and have the layout of this kind.
    final = [new if copy else desc for desc, copy in zip(descs, copied, strict=True)]
    final += [new] * (len(names) - len(final))
    kind, layouts, _ = choose_layout(tuple(final))
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    made = plan(
        op, (n, c, s), dtype.name, kind, layouts, device, sums=sums, reduced=reduced, epilogue=epilogue,
        residual=residual, invariant=invariant,
    )  # fmt: skip
    tiles = made.steps[0].tiles
    sizes = {
        "samples": n, "channels": c, "first": 0, "spatial": s, "all_planes": n * c, "planes": n * c, "tiles": tiles,
        "channel_tiles": made.channel_tiles, "round.channels": c, "round.spatial": s, "round.tiles": tiles,
        "round.first": 0, "round.channel_tiles": made.channel_tiles,
    }  # fmt: skip
    for name, layout in zip(names, layouts, strict=True):
        sizes |= {f"{name}.{axis}": getattr(layout, axis) for axis in "ncs"}
    if "dy" in names:  # input_gradient's g is dy, or dresidual
        g = layouts[names.index("dresidual" if "dresidual" in names else "dy")]
        sizes |= {f"g.{axis}": getattr(g, axis) for axis in "ncs"}
    steps = []
    for step in made.steps:
        memory = arguments.new(step.kernel)
        arguments.fill(step.kernel, memory, sizes | {
            "subdivision": step.subdivision, "round.subdivision": step.subdivision,
            "vecs_per_thread": step.vecs_per_thread, "group.tiles": step.tiles,
        })  # fmt: skip
        steps.append(_PlannedStep(step, Module.of(step, made), bytes(memory)))
    return _PlannedCall(kind, copied, made, tuple(steps))


class _Launches:
    """The launches of a call: its arrays as the kernels can read and write them, its plan, and their arguments.

    values: those that the call has set, by the names of the kernels' arguments; each kernel takes the ones it has.
    """

    def __init__(
        self,
        runtime: Runtime,
        op: Op,
        inputs: tuple[Array, ...],
        *,
        sums: bool,
        reduced: bool,
        residual: Array | None = None,
        epilogue: int = 0,
        out: Array | None = None,
    ):
        self.runtime = runtime
        self.operation = OPS[op]
        self.empty, self.address = runtime.empty, runtime.address
        self.launches: list[partial[Any]] = []
        self.updates: list[partial[Any]] = []  # of the running statistics
        self.keepalive: list[Array] = []  # the kernels get addresses only
        self.values: dict[str, Any] = {}
        x = inputs[0]
        self.shape, self.nc, self.out = x.shape, x.shape[:2], out
        self.dtype, self.math = x.dtype, math_dtype(x.dtype)
        given = inputs if residual is None else (*inputs, residual)
        read, self._written = self.operation.tensors(len(inputs), residual is not None)
        descs = tuple(
            ArrayDesc(array.shape, array.strides, array.itemsize, runtime.address(array) % 16)
            for array in (given if out is None else (*given, out))
        )
        if x.size == 0:
            self.kind, _, copied = choose_layout(descs)
            self.targets = self._make_targets(copied)
            return
        self.kind, copied, self.plan, self.steps = _plan_call(
            op, descs, read + self._written, x.dtype, runtime.device(), sums=sums, reduced=reduced, epilogue=epilogue,
            residual=residual is not None, invariant=get_batch_invariant(),
        )  # fmt: skip
        self.tiles = self.plan.steps[0].tiles
        arrays = [self.copy(a) if copy else a for a, copy in zip(given, copied, strict=False)]
        self.targets = self._make_targets(copied)
        for name, array in (*zip(read, arrays, strict=True), *self.targets.items()):
            self.point(f"{name}.data", array)

    def _make_targets(self, copied: tuple[bool, ...]) -> dict[str, Array]:
        """Return the arrays that kernels write: the first is out, if it is given and they can write it in place."""
        first, *others = self._written
        targets = {first: self._new() if self.out is None or copied[-1] else self.out}
        return targets | {name: self._new() for name in others}

    def _new(self) -> Array:
        n, c, *spatial = self.shape
        if self.kind == "channels_first" or math.prod(spatial) == 1:
            return self.empty(self.shape, self.dtype)
        rank = len(self.shape)
        return self.empty((n, *spatial, c), self.dtype).transpose(0, rank - 1, *range(1, rank - 1))

    def copy(self, array: Array) -> Array:
        copy = self._new()
        _assignment(copy, array)()
        return copy

    def planes(self, wanted: bool = True) -> Array | None:
        """Return a new array of one number for each plane, or None if it is not wanted."""
        return self.empty(self.nc, self.math) if wanted else None

    def point(self, name: str, array: Array | None) -> None:
        """Set a pointer, null without an array."""
        self.values[name] = 0 if array is None else self.address(array)
        if array is not None:
            self.keepalive.append(array)

    def flags(self, **arrays: Array | None) -> int:
        """Return the flags that say how arrays are stored, by their names in FLAGS."""
        flags = 0
        for name, array in arrays.items():
            if array is not None and array.dtype == self.math:
                flags |= FLAGS[f"WIDE_{name}"]
            if array is not None and array.ndim == 2:
                flags |= FLAGS[f"SAMPLE_{name}"]
        return flags

    def partials(self) -> Array:
        """Return a new array for the partials of all tiles, to which the kernels' pointer is set."""
        partials = self.empty((self.operation.partials, *self.nc, self.tiles), self.math)
        self.point("partials", partials)
        return partials

    def dense(self, array: Array | None) -> Array | None:
        """Return a parameter array without gaps: itself, or a copy."""
        if array is None or (array.flags.c_contiguous and not self.runtime.address(array) % array.itemsize):
            return array
        copy = self.empty(array.shape, array.dtype)
        _assignment(copy, array)()
        return copy

    def rounds(self) -> Iterator[dict[str, int]]:
        """Yield the arguments of each round of a split: its channel tiles and its planes."""
        n, c = self.nc
        channel_tiles, at_a_time = self.plan.channel_tiles, self.plan.at_a_time
        per_sample, width = channel_tiles // n, self._width()

        def plane(channel_tile: int) -> int:
            return channel_tile // per_sample * c + min(channel_tile % per_sample * width, c)

        for first in range(0, channel_tiles, at_a_time):
            end = min(first + at_a_time, channel_tiles)
            planes = plane(end) - plane(first)
            yield {
                "round.first": first, "round.channel_tiles": end - first, "first": plane(first), "planes": planes,
            }  # fmt: skip

    def _width(self) -> int:
        """Return the number of channels in a channel tile."""
        return 1 if self.kind == "channels_first" else self.plan.steps[0].channel_vecs * self.plan.vec_size

    def _point_exchange(self, step: Step) -> None:
        """Set the pointers for the blocks of a grid, to new memory through which they exchange partials."""
        groups = step.grid[0] // step.tiles
        numbers = self._width() * self.operation.partials
        self.point("group.partial", self.empty((groups, 2, step.tiles, numbers), self.math))
        self.point("group.arrived", self.runtime.zeros((groups,), np.uint32))

    def prepare(self, planned: _PlannedStep, values: Mapping[str, Any] = NOTHING) -> partial[Any]:
        """Return a step's launch. values: arguments of this launch alone."""
        step, kernel, memory = planned.step, planned.step.kernel, bytearray(planned.template)
        if step.cooperative:
            self._point_exchange(step)
        arguments.fill(kernel, memory, self.values)
        arguments.fill(kernel, memory, values)
        return self.runtime.prepare(planned.module, step, memory)

    def run(self, planned: _PlannedStep, values: Mapping[str, Any] = NOTHING) -> None:
        """Add a step to the launches of `commit`: see `prepare`."""
        self.launches.append(self.prepare(planned, values))

    def run_planes(self) -> tuple[_PlannedStep, ...]:
        """Add the steps that compute the results, a split's three in rounds. Return the other steps: sums over N."""
        if self.plan.regime != "split":
            self.run(self.steps[0])
            return self.steps[1:]
        for round_ in self.rounds():
            for planned in self.steps[:3]:
                self.run(planned, round_)
        return self.steps[3:]

    @property
    def result(self) -> Array:
        """The first array that is written: out, if it is given."""
        return self._target if self.out is None else self.out

    @property
    def _target(self) -> Array:
        return self.targets[self._written[0]]

    def commit(self, *writes: partial[Any]) -> None:
        """Launch the kernels, update the running statistics, then perform the writes: see ForwardResult."""
        target = self._target
        with self.runtime.on(target):
            copies = [] if self.out is None or target is self.out else [_assignment(self.out, target)]
            commit(*self.launches, *copies, *self.updates, *writes)
