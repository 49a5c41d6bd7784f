"""Launches: forward, backward and double backward, on any runtime that compiles and runs the kernels.

This module does not use CuPy: a Runtime allocates arrays, returns their addresses and launches. CuPy's is in
runtime.py; the tests have one that runs the same kernels on an emulator, over NumPy arrays.
"""

from __future__ import annotations

import math
import operator
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from .._checks import overlap
from .._types import Array, DoubleGradients, ForwardCall, ForwardResult, Gradients, Saved, commit, math_dtype
from ..backend import Backend
from ..config import get_batch_invariant
from .describe import describe
from .plan import ArrayDesc, Device, Op, Plan, Step, choose_layout, contiguous_desc, plan
from .source import Module
from .variants import EPILOGUES, Kind

# Bits of the kernels' `flags` argument (types.cuh).
WIDE_WEIGHT, WIDE_BIAS, WIDE_RUNNING_MEAN, WIDE_RUNNING_VAR = 1, 2, 4, 8  # which arrays are in computing precision
SAMPLE_WEIGHT, SAMPLE_BIAS = 16, 32  # which are (N, C)
NARROW_SUM_DY, NARROW_SUM_DY_XHAT = 64, 128  # which sums are stored in the input's dtype

NULL = np.uintp(0)
NO_TENSOR = (NULL, np.int64(), np.int64(), np.int64())


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

    def prepare(self, module: Module, step: Step, args: tuple[Any, ...]) -> partial[Any]:
        """Compile a kernel, and return a partial, of a C function if possible, that enqueues it on the current stream.

        args are NumPy scalars of the kernel's parameter types.
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
                self.runtime, op, x, (x,), targets=1, sums=update, reduced=update, out=call.out, epilogue=epilogue,
                residual=residual,
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
            flags = work.flags(weight, bias)
            if running_mean is not None and running_var is not None:
                flags |= WIDE_RUNNING_MEAN * (running_mean.dtype == work.math)
                flags |= WIDE_RUNNING_VAR * (running_var.dtype == work.math)
            slope = np.float64(_rectifier_slope(activation, call.negative_slope))
            epilogue_ = (*work.residual, slope) if epilogue else ()
            affine = (*work.pointers(weight, bias), np.int32(flags), *epilogue_)
            running = work.pointers(mean_, var_)
            eps = np.float64(call.eps)
            step, *rest = work.plan.steps
            if op == "normalize":
                results = work.pointers(mean, rstd)
                work.tiles(step, *work.tensors, *running, *affine, *results, eps)
            elif work.plan.regime == "split":
                merge, apply, *rest = rest
                mean, rstd, mean_lo = (work.planes() if array is None else array for array in (mean, rstd, mean_lo))
                partials = [work.empty((*work.nc, step.tiles), t) for t in (np.int64, np.float64, np.float64)]
                results = work.pointers(mean, rstd, mean_lo, variance)
                for plane_range in work.rounds():
                    work.tiles(step, *work.tensors[:4], *work.pointers(*partials), plane_range=plane_range)
                    sizes = (np.int64(step.tiles), *work.planes_of(plane_range), eps)
                    work.run(merge, *work.pointers(*partials), *sizes, *results)
                    work.tiles(apply, *work.tensors, *results[:3], *affine, plane_range=plane_range)
            else:
                results = work.pointers(mean, rstd, mean_lo, variance)
                work.channel_tiles(step, *work.tensors, *affine, *results, after=(eps,), numbers=4)
            if update:
                batch = (np.int64(x.shape[0]), work.channels, np.float64(call.momentum))
                statistics = work.pointers(mean, variance)
                move = work.prepare(rest[0], *statistics, *batch, *running, np.int32(flags))
                copies = [(a, b) for a, b in ((running_mean, mean_), (running_var, var_)) if a is not b]
                again = [_assignment(b, a) for a, b in copies]  # other calls may have updated them since
                work.updates = [*again, move, *(_assignment(a, b) for a, b in copies)]
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
            targets = 1 if saved.residual is None else 2
            work = _Launches(
                self.runtime, op, x, (x, dy), targets=targets, sums=any(wanted), reduced=reduced, out=out,
                epilogue=epilogue, residual=saved.residual,
            )  # fmt: skip
            dresidual = work.targets[1] if targets == 2 else None
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
            flags = work.flags(weight, bias)
            flags |= NARROW_SUM_DY * (dbias is not None and direct[0] and dbias.dtype != work.math)
            flags |= NARROW_SUM_DY_XHAT * (dweight is not None and direct[1] and dweight.dtype != work.math)
            flags_ = np.int32(flags)
            weight, bias = work.dense(weight), work.dense(bias)
            statistics = work.pointers(saved.mean, saved.rstd)
            epilogue_: tuple[Any, ...] = ()
            if epilogue:
                slope = np.float64(_rectifier_slope(activation, saved.negative_slope))
                epilogue_ = (*work.residual, slope, *work.extra, *work.pointers(saved.mean_lo, bias))
            affine = (*statistics, work.pointer(weight), flags_, *epilogue_)
            arrays = work.tensors
            step, *rest = work.plan.steps
            # Kernels write the sums of planes directly to a gradient that equals them, else to a new array.
            sum_dy, sum_dy_xhat = (
                gradient if is_direct else work.planes(gradient is not None)
                for gradient, is_direct in ((dbias, direct[0]), (dweight, direct[1]))
            )
            merged = work.pointers(sum_dy, sum_dy_xhat)

            def merge_gradient(merge: Step, partials: Array, plane_range: tuple[int, int], *sums: np.uintp) -> None:
                sizes = (work.all_planes, np.int64(step.tiles), *work.planes_of(plane_range), work.spatial)
                work.run(merge, work.pointer(partials), *sizes, *sums, *merged, flags_)

            if op == "frozen_backward":
                if step.tiles == 1:
                    work.tiles(step, *arrays, *affine, *merged)
                else:
                    partials = work.empty((2, *work.nc, step.tiles), work.math) if any(wanted) else (None, None)
                    unflagged = (*affine[:3], np.int32(flags & ~(NARROW_SUM_DY | NARROW_SUM_DY_XHAT)), *affine[4:])
                    work.tiles(step, *arrays, *unflagged, work.pointer(partials[0]), work.pointer(partials[1]))
                    if any(wanted):
                        merge, *rest = rest
                        merge_gradient(merge, partials, (0, work.plan.channel_tiles), NULL, NULL, NULL)
            elif work.plan.regime == "split":
                merge, apply, *rest = rest
                partials = work.empty((3, *work.nc, step.tiles), work.math)
                kept_sums = work.planes(), work.planes(), work.planes()
                *sums, more = work.pointers(*kept_sums)
                for plane_range in work.rounds():
                    work.tiles(
                        step, *arrays[:8], *affine, work.pointer(partials), work.all_planes, plane_range=plane_range
                    )  # fmt: skip
                    merge_gradient(merge, partials, plane_range, *sums, more)
                    if apply.plain:  # dresidual is g: dy times the activation's derivative
                        inputs, affine_ = (*arrays[:4], *work.extra, *arrays[8:]), affine[:4]
                    else:
                        inputs, affine_ = arrays, affine
                    work.tiles(apply, *inputs, *affine_, more, *sums, plane_range=plane_range)
            else:
                work.channel_tiles(step, *arrays, *affine, *merged, numbers=3)
            if reduced:
                # Reduce over N only what the kernel did not write directly.
                results = (None if done else g for g, done in ((dweight, direct[1]), (dbias, direct[0])))
                batch = (np.int64(x.shape[0]), work.channels)
                work.run(rest[0], *merged, *batch, *work.pointers(*results), flags_)
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
            work = _Launches(self.runtime, op, x, inputs, targets=2, sums=summed, reduced=summed and not direct)
            dx, ddy = work.targets
            dweight = None if weight is None else work.empty(weight.shape, weight.dtype)
            if dweight is not None and (ddx is None or x.size == 0):
                dweight.fill(0)
            if x.size == 0:
                return DoubleGradients(ddy, dx, dweight)
            weight, ddweight, ddbias = work.dense(weight), work.dense(ddweight), work.dense(ddbias)
            flags = work.flags(weight, ddbias)
            flags |= NARROW_SUM_DY_XHAT * (dweight is not None and direct and dweight.dtype != work.math)
            gradient_flags = work.flags(None, ddweight)
            given, to_dx, to_ddy = (*work.tensors[:-4], *NO_TENSOR)[:12], work.tensors[-4:], work.extra
            rstd = work.pointer(saved.rstd)
            affine = work.pointers(weight, ddbias)

            def known(flags: int) -> tuple[Any, ...]:
                numbers = np.int32(flags), work.pointer(ddweight), np.int32(gradient_flags)
                return work.pointer(saved.mean), rstd, *affine, *numbers

            sums = (dweight if direct else work.planes()) if summed else None
            step, *rest = work.plan.steps
            if op == "frozen_double_backward":
                if step.tiles == 1 or not summed:
                    work.tiles(step, *given, *to_dx, *to_ddy, *known(flags), work.pointer(sums))
                else:
                    partials = work.empty((*work.nc, step.tiles), work.math)
                    partial_flags = known(flags & ~NARROW_SUM_DY_XHAT)
                    work.tiles(step, *given, *to_dx, *to_ddy, *partial_flags, work.pointer(partials))
                    merge, *rest = rest
                    counts = np.int64(step.tiles), work.all_planes
                    work.run(merge, work.pointer(partials), *counts, work.pointer(sums), np.int32(flags))
            elif work.plan.regime == "split":
                merge, apply, *rest = rest
                partials, means = (
                    work.empty((9, *work.nc, step.tiles), work.math),
                    work.empty((8, *work.nc), work.math),
                )
                statistics = work.pointers(saved.mean, saved.rstd)
                results = (rstd, *work.pointers(means, sums), np.int32(flags))
                for plane_range in work.rounds():
                    work.tiles(
                        step,
                        *given,
                        *to_dx,
                        *statistics,
                        work.pointer(partials),
                        work.all_planes,
                        plane_range=plane_range,
                    )
                    sizes = (
                        work.all_planes,
                        np.int64(step.tiles),
                        *work.planes_of(plane_range),
                        work.spatial,
                    )
                    work.run(merge, work.pointer(partials), *sizes, *results)
                    more = work.pointer(means), work.all_planes
                    work.tiles(apply, *given, *to_dx, *to_ddy, *known(flags), *more, plane_range=plane_range)
            else:
                work.channel_tiles(step, *given, *to_dx, *to_ddy, *known(flags), work.pointer(sums), numbers=9)
            if summed and not direct:
                batch = (np.int64(x.shape[0]), work.channels)
                work.run(rest[0], NULL, work.pointer(sums), *batch, work.pointer(dweight), NULL, np.int32(flags))
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


class _PlannedCall(NamedTuple):
    """The part of a call that follows from the shapes, strides and alignment of its arrays."""

    kind: Kind
    copied: tuple[bool, ...]  # which of the given arrays the kernels cannot read or write in place
    strides: tuple[tuple[np.int64, np.int64, np.int64], ...]  # of inputs and targets
    plan: Plan
    modules: tuple[Module, ...]  # of its steps
    sizes: tuple[np.int64, np.int64, np.int64]  # channels, spatial positions, channel tiles


@lru_cache(maxsize=4096)
def _plan_call(
    op: Op,
    descs: tuple[ArrayDesc, ...],
    dtype: np.dtype,
    device: Device,
    *,
    inputs: int,
    targets: int,
    sums: bool,
    reduced: bool,
    epilogue: int,
    residual: bool,
    invariant: bool,
) -> _PlannedCall:
    """Plan a call. descs: of the inputs, then of out if it is given; targets: the number of arrays that are written."""
    shape, itemsize = descs[0].shape, descs[0].itemsize
    kind, _, copied = choose_layout(descs, invariant)
    new = contiguous_desc(shape, itemsize, kind)
    # New arrays are aligned, and have the layout of this kind.
    final = [new if copy else desc for desc, copy in zip(descs, copied, strict=True)]
    final += [new] * (inputs + targets - len(final))
    kind, layouts, _ = choose_layout(tuple(final))
    sizes = (shape[0], shape[1], math.prod(shape[2:]))
    made = plan(
        op, sizes, dtype.name, kind, layouts, device, sums=sums, reduced=reduced, epilogue=epilogue, residual=residual,
        invariant=invariant,
    )  # fmt: skip
    return _PlannedCall(
        kind,
        copied,
        tuple((np.int64(x.n), np.int64(x.c), np.int64(x.s)) for x in layouts),
        made,
        tuple(Module.of(step, made) for step in made.steps),
        (np.int64(shape[1]), np.int64(sizes[2]), np.int64(made.channel_tiles)),
    )


class _Launches:
    """The launches of a call: its arrays as the kernels can read and write them, its plan, and the common arguments.

    tensors: the kernel arguments of inputs and result. residual, extra: those of the residual and of the second array
    that is written, null if there is none.
    """

    def __init__(
        self,
        runtime: Runtime,
        op: Op,
        x: Array,
        inputs: tuple[Array, ...],
        *,
        targets: int,
        sums: bool,
        reduced: bool,
        out: Array | None = None,
        epilogue: int = 0,
        residual: Array | None = None,
    ):
        self.runtime = runtime
        self.empty = runtime.empty
        self.launches: list[partial[Any]] = []
        self.updates: list[partial[Any]] = []  # of the running statistics
        self.keepalive: list[Array] = []  # the kernels get addresses only
        self.nc = x.shape[:2]
        self.dtype, self.math = x.dtype, math_dtype(x.dtype)
        self.out = out
        given = inputs if residual is None else (*inputs, residual)
        descs = tuple(
            ArrayDesc(array.shape, array.strides, array.itemsize, runtime.address(array) % 16)
            for array in (given if out is None else (*given, out))
        )
        self.shape = x.shape
        if x.size == 0:
            self.kind, _, copied = choose_layout(descs)
            self._make_targets(targets, copied)
            return
        self.kind, copied, strides, self.plan, self._modules, sizes = _plan_call(
            op, descs, x.dtype, runtime.device(), inputs=len(given), targets=targets, sums=sums, reduced=reduced,
            epilogue=epilogue, residual=residual is not None, invariant=get_batch_invariant(),
        )  # fmt: skip
        self.channels, self.spatial, self._channel_tiles = sizes
        arrays = self.keepalive = [self.copy(a) if copy else a for a, copy in zip(given, copied, strict=False)]
        self._make_targets(targets, copied)
        args = [
            (np.uintp(runtime.address(a)), *steps) for a, steps in zip((*arrays, *self.targets), strides, strict=True)
        ]
        self.residual = NO_TENSOR if residual is None else args[len(inputs)]
        self.extra = NO_TENSOR if targets == 1 else args[-1]
        self.tensors: tuple[Any, ...] = sum(args[: len(inputs)], ()) + args[len(given)]

    def _make_targets(self, count: int, copied: tuple[bool, ...]) -> None:
        """Set the arrays that kernels write: the first is out, if it is given and they can write it in place."""
        first = self._new() if self.out is None or copied[-1] else self.out
        self.targets = [first, *(self._new() for _ in range(1, count))]

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

    def pointer(self, array: Array | None) -> np.uintp:
        if array is None:
            return NULL
        self.keepalive.append(array)
        return np.uintp(self.runtime.address(array))

    def pointers(self, *arrays: Array | None) -> tuple[np.uintp, ...]:
        return tuple(map(self.pointer, arrays))

    def flags(self, weight: Array | None, bias: Array | None) -> int:
        flags = 0
        for array, wide, sample in ((weight, WIDE_WEIGHT, SAMPLE_WEIGHT), (bias, WIDE_BIAS, SAMPLE_BIAS)):
            if array is not None:
                flags |= wide * (array.dtype == self.math) | sample * (array.ndim == 2)
        return flags

    def dense(self, array: Array | None) -> Array | None:
        """Return a parameter array without gaps: itself, or a copy."""
        if array is None or (array.flags.c_contiguous and not self.runtime.address(array) % array.itemsize):
            return array
        copy = self.empty(array.shape, array.dtype)
        _assignment(copy, array)()
        return copy

    @property
    def all_planes(self) -> np.int64:
        return np.int64(self.nc[0] * self.nc[1])

    def rounds(self) -> list[tuple[int, int]]:
        """Return the first channel tile and the number of channel tiles of each round of a split."""
        channel_tiles, most = self.plan.channel_tiles, self.plan.at_a_time
        return [(first, min(most, channel_tiles - first)) for first in range(0, channel_tiles, most)]

    def planes_of(self, plane_range: tuple[int, int]) -> tuple[np.int64, np.int64]:
        """Return the first plane and the number of planes of a range of channel tiles."""
        n, c = self.nc
        groups = self.plan.channel_tiles // n
        width = 1 if self.kind == "channels_first" else self.plan.steps[0].channel_vecs * self.plan.vec_size

        def plane(channel_tile: int) -> int:
            return channel_tile // groups * c + min(channel_tile % groups * width, c)

        first, end = plane(plane_range[0]), plane(sum(plane_range))
        return np.int64(first), np.int64(end - first)

    def prepare(self, step: Step, *args: Any) -> partial[Any]:
        return self.runtime.prepare(self._modules[self.plan.steps.index(step)], step, args)

    def run(self, step: Step, *args: Any) -> None:
        """Add a step to the launches of `commit`."""
        self.launches.append(self.prepare(step, *args))

    def channel_tiles(self, step: Step, *args: Any, numbers: int, after: tuple[Any, ...] = ()) -> None:
        """Add a step whose scopes serve whole channel tiles. numbers: exchanged by a group of blocks, per plane."""
        sizes = (
            self.channels,
            self.spatial,
            self._channel_tiles,
            np.int32(step.subdivision),
            np.int32(step.vecs_per_thread),
        )
        group: tuple[Any, ...] = ()
        if step.cluster > 1 or step.cooperative:
            partials = arrived = None
            if step.cooperative:
                groups = step.grid[0] // step.tiles
                width = 1 if self.kind == "channels_first" else step.channel_vecs * self.plan.vec_size
                partials = self.empty((groups, 2, step.tiles, width * numbers), self.math)
                arrived = self.runtime.zeros((groups,), np.uint32)
            group = (np.int32(step.tiles), *self.pointers(partials, arrived))
        self.run(step, *args, *sizes, *after, *group)

    def tiles(self, step: Step, *args: Any, plane_range: tuple[int, int] | None = None) -> None:
        """Add a step whose scopes serve a tile each. plane_range: its channel tiles, as (first, number); None: all."""
        channel_tiles = (
            (np.int64(step.scopes),) if plane_range is None else (np.int64(plane_range[0]), np.int64(plane_range[1]))
        )
        sizes = (self.channels, self.spatial, *channel_tiles, np.int64(step.tiles))
        self.run(step, *args, *sizes, np.int32(step.subdivision))

    @property
    def result(self) -> Array:
        """The first array that is written: out, if it is given."""
        return self.targets[0] if self.out is None else self.out

    def commit(self, *writes: partial[Any]) -> None:
        """Launch the kernels, update the running statistics, then perform the writes: see ForwardResult."""
        target = self.targets[0]
        with self.runtime.on(target):
            copies = [] if self.out is None or target is self.out else [_assignment(self.out, target)]
            commit(*self.launches, *copies, *self.updates, *writes)
