"""Launches: the backend's forward, backward and double backward, over whatever runtime compiles and runs the kernels.

Nothing here knows CuPy: a Runtime allocates arrays, tells their addresses and launches. The CuPy one is in runtime.py;
the tests have one that runs the same kernels on an emulator, over NumPy arrays.
"""

from __future__ import annotations

import math
import operator
import os
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..functional import Array, Keep, Saved, at_once, math_dtype, overlap
from .plan import ArrayDesc, Device, Op, Plan, Step, choose_layout, contiguous_desc, plan
from .source import Module
from .variants import EPILOGUES, Kind

# Bits of the kernels' `flags` argument (types.cuh).
WIDE_WEIGHT, WIDE_BIAS, WIDE_RUNNING_MEAN, WIDE_RUNNING_VAR = 1, 2, 4, 8  # which arrays are in computing precision
SAMPLE_WEIGHT, SAMPLE_BIAS = 16, 32  # which have a number for each sample
NARROW_SUM_DY, NARROW_SUM_DY_XHAT = 64, 128  # which sums are stored in the input's dtype

NULL = np.uintp(0)
NO_TENSOR = (NULL, np.int64(), np.int64(), np.int64())


class _State:
    batch_invariant: bool | None = None  # None: not asked yet


_state = _State()


def get_batch_invariant() -> bool:
    """Whether on a GPU the bits of a sample's results are the same in every batch."""
    if _state.batch_invariant is None:
        text = os.environ.get("CUPYNORM_BATCH_INVARIANT", "").strip()
        if text not in ("", "0", "1"):
            raise ValueError(f"CUPYNORM_BATCH_INVARIANT must be 0 or 1, got {text!r}")
        _state.batch_invariant = text == "1"
    return _state.batch_invariant


def set_batch_invariant(wanted: bool) -> None:
    """Set whether on a GPU the bits of a sample's results are to be the same in every batch.

    Without it kernels are chosen by the size of the whole call, and elements are dealt out to threads by their
    addresses: which values are added up first depends on N, and in planes that are not whole multiples of 16 bytes on
    their place in memory. With it y, dx, means and deviations of a sample, and what a double backward gives for it, do
    not depend on the number of samples, on the others or on its place among them, nor on whether arrays are views or
    new ones: only on whether they are channels-first or channels-last. Some calls are slower then: of few channels and
    many samples a plane may be shared among more threads than it must, unaligned planes are stored an element at a
    time, and views are copied first if there are gaps between planes of at most 512 bytes, or if groups of 4 channels
    side by side (2 in float64) are not aligned to their size. Gradients of parameters and running statistics are sums
    over the batch and depend on it. On a CPU all of this holds always.

    The default is CUPYNORM_BATCH_INVARIANT from the environment (0 or 1), or off.

    Args:
        wanted: on or off.

    Raises:
        TypeError: not a bool. The setting stays as it was then.
    """
    if type(wanted) is not bool:
        raise TypeError(f"batch_invariant must be True or False, got {wanted!r}")
    _state.batch_invariant = wanted


def _rectifier_slope(activation: str | None, negative_slope: float) -> float:
    """The slope below 0 of the rectifier that an activation is; of no use for those that are none."""
    return {None: 1.0, "relu": 0.0}.get(activation, negative_slope)


class Runtime(Protocol):
    """What compiles and runs kernels on the device of an array."""

    def on(self, array: Array) -> AbstractContextManager[Any]:
        """Make the array's device current."""

    def device(self) -> Device:
        """The current device."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new C-contiguous array on the current device."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The same, of zeros."""

    def address(self, array: Array) -> int:
        """Where the array's first element is."""

    def prepare(self, module: Module, step: Step, args: tuple[Any, ...]) -> partial[Any]:
        """A partial that enqueues a kernel on the current stream, compiled by now; of a function in C where it can be.

        args are NumPy scalars of the kernel's parameter types.
        """


class Launcher:
    """The backend's contract (see cupynorm.cpu) on a runtime.

    A call allocates and compiles all that it needs before its first launch, so that a failure until then has written
    nothing; running statistics, and what keep tells, come after everything else, and at once.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def forward(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        running_mean: Array | None,
        running_var: Array | None,
        *,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        out: Array | None,
        keep: Keep | None,
        activation: str | None,
        negative_slope: float,
        residual: Array | None,
    ) -> tuple[Array, Saved | None]:
        with self.runtime.on(x):
            update = use_input_stats and running_mean is not None and momentum != 0
            epilogue = EPILOGUES[activation] if activation is not None or residual is not None else 0
            op: Op = "forward" if use_input_stats else "normalize"
            call = _Call(self.runtime, op, x, residual, (x,), out, 1, update, update, epilogue)
            kept = keep is not None
            mean, rstd, variance = call.planes(kept or update), call.planes(kept), call.planes(update)
            mean_lo = call.planes(kept and use_input_stats and activation is not None)
            saved: Saved | None = None
            writes: tuple[partial[Any], ...] = ()
            if keep is not None:
                saved = Saved(
                    x, mean, rstd, weight, bias, use_input_stats, mean_lo, activation, negative_slope,
                    residual if activation is not None else None, residual is not None, eps=eps,
                )  # fmt: skip
                writes = keep(saved)
            if x.size == 0:
                if mean_lo is not None:
                    mean_lo.fill(0)
                return call.result(*writes), saved
            weight, bias, mean_, var_ = (call.dense(array) for array in (weight, bias, running_mean, running_var))
            flags = call.flags(weight, bias)
            if running_mean is not None and running_var is not None:
                flags |= WIDE_RUNNING_MEAN * (running_mean.dtype == call.math)
                flags |= WIDE_RUNNING_VAR * (running_var.dtype == call.math)
            epilogue_ = (*call.residual, np.float64(_rectifier_slope(activation, negative_slope))) if epilogue else ()
            affine = (*call.pointers(weight, bias), np.int32(flags), *epilogue_)
            running = call.pointers(mean_, var_)
            step, *rest = call.plan.steps
            if op == "normalize":
                call.tiles(step, *call.tensors, *running, *affine, *call.pointers(mean, rstd), np.float64(eps))
            elif call.plan.regime == "split":
                merge, apply, *rest = rest
                mean, rstd, mean_lo = (call.planes() if array is None else array for array in (mean, rstd, mean_lo))
                partials = [call.empty((*call.nc, step.tiles), t) for t in (np.int64, np.float64, np.float64)]
                results = call.pointers(mean, rstd, mean_lo, variance)
                for plane_range in call.rounds():
                    call.tiles(step, *call.tensors[:4], *call.pointers(*partials), plane_range=plane_range)
                    sizes = (np.int64(step.tiles), *call.planes_of(plane_range), np.float64(eps))
                    call.run(merge, *call.pointers(*partials), *sizes, *results)
                    call.tiles(apply, *call.tensors, *results[:3], *affine, plane_range=plane_range)
            else:
                results = call.pointers(mean, rstd, mean_lo, variance)
                call.channel_tiles(step, *call.tensors, *affine, *results, after=(np.float64(eps),), numbers=4)
            if update:
                batch = (np.int64(x.shape[0]), call.channels, np.float64(momentum))
                move = call.prepare(rest[0], *call.pointers(mean, variance), *batch, *running, np.int32(flags))
                copies = [(a, b) for a, b in ((running_mean, mean_), (running_var, var_)) if a is not b]
                again = [_assignment(b, a) for a, b in copies]  # others may have moved them since
                writes = (*again, move, *(_assignment(a, b) for a, b in copies), *writes)
            return call.result(*writes), saved

    def backward(
        self, dy: Array, saved: Saved, *, out: Array | None
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        x, weight, bias, activation = saved.x, saved.weight, saved.bias, saved.activation
        with self.runtime.on(x):
            epilogue = 0 if activation is None else EPILOGUES[activation]
            # Parameters of each sample, and of the only one, have a plane's sums for gradients.
            direct = [p is not None and (p.ndim == 2 or x.shape[0] == 1) for p in (bias, weight)]
            wanted = [p is not None for p in (bias, weight)]
            op: Op = "backward" if saved.training else "frozen_backward"
            reduced = any(w and not d for w, d in zip(wanted, direct, strict=True))
            targets = 1 if saved.residual is None else 2
            call = _Call(
                self.runtime, op, x, saved.residual, (x, dy), out, targets, any(wanted), reduced, epilogue
            )  # fmt: skip
            dresidual = call.targets[1] if targets == 2 else None
            if saved.with_residual and activation is None:
                dresidual = dy
                if out is not None and overlap(out, dy):
                    dresidual = call.copy(dy)
            dbias, dweight = (None if p is None else call.empty(p.shape, p.dtype) for p in (bias, weight))
            if x.size == 0:
                for gradient in (dweight, dbias):
                    if gradient is not None:
                        gradient.fill(0)
                return call.result(), dweight, dbias, dresidual
            flags = call.flags(weight, bias)
            flags |= NARROW_SUM_DY * (dbias is not None and direct[0] and dbias.dtype != call.math)
            flags |= NARROW_SUM_DY_XHAT * (dweight is not None and direct[1] and dweight.dtype != call.math)
            flags_ = np.int32(flags)
            weight, bias = call.dense(weight), call.dense(bias)
            statistics = call.pointers(saved.mean, saved.rstd)
            epilogue_: tuple[Any, ...] = ()
            if epilogue:
                slope = np.float64(_rectifier_slope(activation, saved.negative_slope))
                epilogue_ = (*call.residual, slope, *call.extra, *call.pointers(saved.mean_lo, bias))
            affine = (*statistics, call.pointer(weight), flags_, *epilogue_)
            arrays = call.tensors
            step, *rest = call.plan.steps
            # What the kernels write the sums to: the gradients themselves where they are that, else one a plane.
            sum_dy, sum_dy_xhat = (
                gradient if is_direct else call.planes(gradient is not None)
                for gradient, is_direct in ((dbias, direct[0]), (dweight, direct[1]))
            )
            merged = call.pointers(sum_dy, sum_dy_xhat)

            def merge_gradient(merge: Step, partials: Array, plane_range: tuple[int, int], *sums: np.uintp) -> None:
                sizes = (call.all_planes, np.int64(step.tiles), *call.planes_of(plane_range), call.spatial)
                call.run(merge, call.pointer(partials), *sizes, *sums, *merged, flags_)

            if op == "frozen_backward":
                if step.tiles == 1:
                    call.tiles(step, *arrays, *affine, *merged)
                else:
                    partials = call.empty((2, *call.nc, step.tiles), call.math) if any(wanted) else (None, None)
                    unflagged = (*affine[:3], np.int32(flags & ~(NARROW_SUM_DY | NARROW_SUM_DY_XHAT)), *affine[4:])
                    call.tiles(step, *arrays, *unflagged, call.pointer(partials[0]), call.pointer(partials[1]))
                    if any(wanted):
                        merge, *rest = rest
                        merge_gradient(merge, partials, (0, call.plan.channel_tiles), NULL, NULL, NULL)
            elif call.plan.regime == "split":
                merge, apply, *rest = rest
                partials = call.empty((3, *call.nc, step.tiles), call.math)
                kept_sums = call.planes(), call.planes(), call.planes()
                *sums, more = call.pointers(*kept_sums)
                for plane_range in call.rounds():
                    call.tiles(
                        step, *arrays[:8], *affine, call.pointer(partials), call.all_planes, plane_range=plane_range
                    )  # fmt: skip
                    merge_gradient(merge, partials, plane_range, *sums, more)
                    if apply.plain:  # dresidual is what the epilogue made of dy
                        inputs, affine_ = (*arrays[:4], *call.extra, *arrays[8:]), affine[:4]
                    else:
                        inputs, affine_ = arrays, affine
                    call.tiles(apply, *inputs, *affine_, more, *sums, plane_range=plane_range)
            else:
                call.channel_tiles(step, *arrays, *affine, *merged, numbers=3)
            if reduced:
                # Of those that are not there yet.
                results = (None if done else g for g, done in ((dweight, direct[1]), (dbias, direct[0])))
                batch = (np.int64(x.shape[0]), call.channels)
                call.run(rest[0], *merged, *batch, *call.pointers(*results), flags_)
            return call.result(), dweight, dbias, dresidual

    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> tuple[Array, Array, Array | None]:
        x, weight = saved.x, saved.weight
        with self.runtime.on(x):
            # As in backward; without ddx the weight has no influence.
            direct = weight is not None and (weight.ndim == 2 or x.shape[0] == 1)
            summed = weight is not None and ddx is not None
            op: Op = "double_backward" if saved.training else "frozen_double_backward"
            inputs = (x, dy) if ddx is None else (x, dy, ddx)
            call = _Call(self.runtime, op, x, None, inputs, None, 2, summed, summed and not direct, 0)
            dx, ddy = call.targets
            dweight = None if weight is None else call.empty(weight.shape, weight.dtype)
            if dweight is not None and (ddx is None or x.size == 0):
                dweight.fill(0)
            if x.size == 0:
                return ddy, dx, dweight
            weight, ddweight, ddbias = call.dense(weight), call.dense(ddweight), call.dense(ddbias)
            flags = call.flags(weight, ddbias)
            flags |= NARROW_SUM_DY_XHAT * (dweight is not None and direct and dweight.dtype != call.math)
            gradient_flags = call.flags(None, ddweight)
            given, to_dx, to_ddy = (*call.tensors[:-4], *NO_TENSOR)[:12], call.tensors[-4:], call.extra
            rstd = call.pointer(saved.rstd)
            affine = call.pointers(weight, ddbias)

            def known(flags: int) -> tuple[Any, ...]:
                numbers = np.int32(flags), call.pointer(ddweight), np.int32(gradient_flags)
                return call.pointer(saved.mean), rstd, *affine, *numbers

            sums = (dweight if direct else call.planes()) if summed else None
            step, *rest = call.plan.steps
            if op == "frozen_double_backward":
                if step.tiles == 1 or not summed:
                    call.tiles(step, *given, *to_dx, *to_ddy, *known(flags), call.pointer(sums))
                else:
                    partials = call.empty((*call.nc, step.tiles), call.math)
                    partial_flags = known(flags & ~NARROW_SUM_DY_XHAT)
                    call.tiles(step, *given, *to_dx, *to_ddy, *partial_flags, call.pointer(partials))
                    merge, *rest = rest
                    counts = np.int64(step.tiles), call.all_planes
                    call.run(merge, call.pointer(partials), *counts, call.pointer(sums), np.int32(flags))
            elif call.plan.regime == "split":
                merge, apply, *rest = rest
                partials, means = call.empty((9, *call.nc, step.tiles), call.math), call.empty((8, *call.nc), call.math)
                statistics = call.pointers(saved.mean, saved.rstd)
                results = (rstd, *call.pointers(means, sums), np.int32(flags))
                for plane_range in call.rounds():
                    call.tiles(
                        step,
                        *given,
                        *to_dx,
                        *statistics,
                        call.pointer(partials),
                        call.all_planes,
                        plane_range=plane_range,
                    )
                    sizes = (call.all_planes, np.int64(step.tiles), *call.planes_of(plane_range), call.spatial)
                    call.run(merge, call.pointer(partials), *sizes, *results)
                    more = call.pointer(means), call.all_planes
                    call.tiles(apply, *given, *to_dx, *to_ddy, *known(flags), *more, plane_range=plane_range)
            else:
                call.channel_tiles(step, *given, *to_dx, *to_ddy, *known(flags), call.pointer(sums), numbers=9)
            if summed and not direct:
                batch = (np.int64(x.shape[0]), call.channels)
                call.run(rest[0], NULL, call.pointer(sums), *batch, call.pointer(dweight), NULL, np.int32(flags))
            return ddy, call.result(), dweight


def _assignment(target: Array, source: Array) -> partial[None]:
    """A copy between arrays of the same dtype; 16-bit ones as bits, whatever the library knows of bfloat16."""
    for array in (target, source):
        if not isinstance(array, np.ndarray) and any(n % array.itemsize for n in (array.data.ptr, *array.strides)):
            raise ValueError(
                f"an array of dtype {array.dtype} and strides {array.strides} has elements that are not aligned to "
                "their size, which a GPU cannot access: pass a copy of its bytes in an array of their own"
            )
    if target.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)
    return partial(operator.setitem, target, ..., source)


class _Prepared(NamedTuple):
    """What follows from the shapes, strides and alignment of a call's arrays."""

    kind: Kind
    copied: tuple[bool, ...]  # which of the given arrays the kernels cannot read or write where they are
    strides: tuple[tuple[np.int64, np.int64, np.int64], ...]  # of inputs and targets
    plan: Plan
    modules: tuple[Module, ...]  # of its steps
    sizes: tuple[np.int64, np.int64, np.int64]  # channels, spatial positions, channel tiles


@lru_cache(maxsize=4096)
def _prepare(
    op: Op,
    descs: tuple[ArrayDesc, ...],
    inputs: int,
    targets: int,
    dtype: np.dtype,
    device: Device,
    sums: bool,
    reduced: bool,
    epilogue: int,
    residual: bool,
    invariant: bool,
) -> _Prepared:
    """descs: of the inputs, then of out if it is given; targets: how many arrays are written."""
    shape, itemsize = descs[0].shape, descs[0].itemsize
    kind, _, copied = choose_layout(descs, invariant)
    new = contiguous_desc(shape, itemsize, kind)
    # Arrays made here are aligned, and of the kind.
    final = [new if copy else desc for desc, copy in zip(descs, copied, strict=True)]
    final += [new] * (inputs + targets - len(final))
    kind, layouts, _ = choose_layout(tuple(final))
    sizes = (shape[0], shape[1], math.prod(shape[2:]))
    made = plan(op, sizes, dtype.name, kind, layouts, device, sums, reduced, epilogue, residual, invariant)
    return _Prepared(
        kind,
        copied,
        tuple((np.int64(x.n), np.int64(x.c), np.int64(x.s)) for x in layouts),
        made,
        tuple(Module.of(step, made) for step in made.steps),
        (np.int64(shape[1]), np.int64(sizes[2]), np.int64(made.channel_tiles)),
    )


class _Call:
    """One call: its arrays as the kernels can read and write them, its plan, and what its launches have in common.

    tensors: the kernel arguments of inputs and result. residual, extra: those of the residual and of the second array
    that is written, null where there is none.
    """

    def __init__(
        self,
        runtime: Runtime,
        op: Op,
        x: Array,
        residual: Array | None,
        inputs: tuple[Array, ...],
        out: Array | None,
        targets: int,
        sums: bool,
        reduced: bool,
        epilogue: int,
    ):
        self.runtime = runtime
        self.empty = runtime.empty
        self.launches: list[partial[Any]] = []
        self.keepalive: list[Array] = []  # the kernels get addresses alone
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
        self.kind, copied, strides, self.plan, self._modules, sizes = _prepare(
            op, descs, len(given), targets, x.dtype, runtime.device(), sums, reduced, epilogue,
            residual is not None, get_batch_invariant(),
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
        """The arrays that are written: the first is out, where it is given and need not be copied to afterwards."""
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
        """A new array of one number for each plane."""
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
        """A parameter array without gaps: itself, or a copy."""
        if array is None or (array.flags.c_contiguous and not self.runtime.address(array) % array.itemsize):
            return array
        copy = self.empty(array.shape, array.dtype)
        _assignment(copy, array)()
        return copy

    @property
    def all_planes(self) -> np.int64:
        return np.int64(self.nc[0] * self.nc[1])

    def rounds(self) -> list[tuple[int, int]]:
        """First channel tile and number of channel tiles of each round of a split."""
        channel_tiles, most = self.plan.channel_tiles, self.plan.at_a_time
        return [(first, min(most, channel_tiles - first)) for first in range(0, channel_tiles, most)]

    def planes_of(self, plane_range: tuple[int, int]) -> tuple[np.int64, np.int64]:
        """First plane and number of planes of a range of channel tiles."""
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
        """Launch a step in its turn, when `result` is asked for."""
        self.launches.append(self.prepare(step, *args))

    def channel_tiles(self, step: Step, *args: Any, numbers: int, after: tuple[Any, ...] = ()) -> None:
        """A launch whose scopes serve whole channel tiles. numbers: how many a plane a group of blocks exchanges."""
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
        """A launch whose scopes serve a tile each; of a range of channel tiles only: first and number."""
        channel_tiles = (
            (np.int64(step.scopes),) if plane_range is None else (np.int64(plane_range[0]), np.int64(plane_range[1]))
        )
        sizes = (self.channels, self.spatial, *channel_tiles, np.int64(step.tiles))
        self.run(step, *args, *sizes, np.int32(step.subdivision))

    def result(self, *writes: partial[Any]) -> Array:
        """The first array that is written, after all launches, and after the last writes that belong together."""
        target = self.targets[0]
        copies = [] if self.out is None or target is self.out else [_assignment(self.out, target)]
        at_once(*self.launches, *copies, *writes)
        return target if self.out is None else self.out
