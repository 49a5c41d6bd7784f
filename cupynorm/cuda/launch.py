"""Launches: the backend's forward and backward, over whatever runtime compiles and runs the kernels.

Nothing here knows CuPy: a Runtime allocates arrays, tells their addresses and launches. The CuPy one is in runtime.py;
the tests have one that runs the same kernels on an emulator, over NumPy arrays.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ..functional import Array, Saved, math_dtype
from .plan import Device, Memory, Op, Plan, Step, arrange, plan
from .source import Module

# Bits of the kernels' `wide` argument (types.cuh): which arrays are in computing precision.
WIDE_WEIGHT, WIDE_BIAS, WIDE_RUNNING_MEAN, WIDE_RUNNING_VAR = 1, 2, 4, 8


class Runtime(Protocol):
    """What compiles and runs kernels on the device of an array."""

    def on(self, array: Array) -> AbstractContextManager[Any]:
        """Make the array's device current."""

    def device(self) -> Device:
        """The current device."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new C-contiguous array on the current device."""

    def address(self, array: Array) -> int:
        """Where the array's first element is."""

    def launch(self, module: Module, step: Step, args: tuple[Any, ...]) -> None:
        """Enqueue a kernel on the current stream. args are NumPy scalars of the kernel's parameter types."""


class Launcher:
    """The backend's contract (see cupynorm.cpu) on a runtime."""

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
        keep: bool,
    ) -> tuple[Array, Saved | None]:
        with self.runtime.on(x):
            call = _Call(self.runtime, (x,), out)
            update = use_input_stats and running_mean is not None and momentum != 0
            mean, rstd, variance = call.planes(keep or update), call.planes(keep), call.planes(update)
            saved = Saved(x, mean, rstd, weight, bias, training=use_input_stats) if keep else None
            if x.size == 0:
                return call.result(), saved
            plan = call.plan("forward" if use_input_stats else "evaluate", sums=update)
            weight, bias, mean_, var_ = (call.dense(array) for array in (weight, bias, running_mean, running_var))
            wide = call.wide(
                (weight, WIDE_WEIGHT),
                (bias, WIDE_BIAS),
                (running_mean, WIDE_RUNNING_MEAN),
                (running_var, WIDE_RUNNING_VAR),
            )
            affine = (*call.pointers(weight, bias), wide)
            running = call.pointers(mean_, var_)
            step, *rest = plan.steps
            if plan.op == "evaluate":
                statistics = call.pointers(mean, rstd)
                call.tiles(step, *call.tensors, *running, *affine, *statistics, np.float64(eps))
            elif plan.regime == "split":
                merge, apply, *rest = rest
                mean, rstd = (call.planes() if array is None else array for array in (mean, rstd))
                delta = call.planes()
                partial = [call.empty((*call.nc, step.tiles), t) for t in (np.int64, np.float64, np.float64)]
                call.tiles(step, *call.tensors[:4], *call.pointers(*partial))
                results = call.pointers(mean, rstd, delta, variance)
                call.run(merge, *call.pointers(*partial), *call.counts(step.tiles), np.float64(eps), *results)
                call.tiles(apply, *call.tensors, *results[:3], *affine)
            else:
                call.owner(step, *call.tensors, *affine, *call.pointers(mean, rstd, variance), after=(np.float64(eps),))
            if update:
                samples, momentum_ = np.int64(x.shape[0]), np.float64(momentum)
                call.run(*rest, *call.pointers(mean, variance), samples, call.channels, momentum_, *running, wide)
                for array, dense in ((running_mean, mean_), (running_var, var_)):
                    if array is not None and array is not dense:
                        _assign(array, dense)
            return call.result(), saved

    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> tuple[Array, Array | None, Array | None]:
        x, weight, bias = saved.x, saved.weight, saved.bias
        with self.runtime.on(x):
            call = _Call(self.runtime, (x, dy), out)
            dweight = None if weight is None else call.empty(weight.shape, weight.dtype)
            dbias = None if bias is None else call.empty(bias.shape, bias.dtype)
            gradients = [gradient for gradient in (dweight, dbias) if gradient is not None]
            if x.size == 0:
                for gradient in gradients:
                    gradient.fill(0)
                return call.result(), dweight, dbias
            plan = call.plan("backward" if saved.training else "eval_gradient", sums=bool(gradients))
            wide = call.wide((weight, WIDE_WEIGHT), (bias, WIDE_BIAS))
            weight = call.dense(weight)
            affine = (*call.pointers(weight), wide)
            statistics = call.pointers(saved.mean, saved.rstd)
            planes = call.nc[0] * call.nc[1]
            step, *rest = plan.steps
            sums: Array = (None, None, None)  # of dy and of dy * xhat, and the split's delta: each of all planes
            if plan.op == "eval_gradient":
                if gradients:
                    partial = call.empty((2, planes, step.tiles), call.math)
                    sums = (partial[0], partial[1], None)  # already, if there is one tile
                else:
                    partial = None
                call.tiles(step, *call.tensors, *statistics, *affine, *call.pointers(partial), np.int64(planes))
                if gradients and step.tiles > 1:
                    merge, *rest = rest
                    sums = (call.planes(), call.planes(), None)
                    where = (*call.counts(step.tiles), call.spatial, statistics[1])
                    call.run(merge, *call.pointers(partial), *where, *call.pointers(*sums))
            elif plan.regime == "split":
                merge, apply, *rest = rest
                partial = call.empty((3, planes, step.tiles), call.math)
                sums = (call.planes(), call.planes(), call.planes())
                call.tiles(step, *call.tensors[:8], *statistics, *call.pointers(partial), np.int64(planes))
                where = (*call.counts(step.tiles), call.spatial, statistics[1])
                call.run(merge, *call.pointers(partial), *where, *call.pointers(*sums))
                call.tiles(
                    apply, *call.tensors, *statistics, *call.pointers(sums[2]), *affine, *call.pointers(*sums[:2])
                )
            else:
                if gradients:
                    sums = (call.planes(), call.planes(), None)
                call.owner(step, *call.tensors, *statistics, *affine, *call.pointers(*sums[:2]))
            if gradients:
                results = call.pointers(dweight, dbias)
                call.run(*rest, *call.pointers(*sums[:2]), np.int64(x.shape[0]), call.channels, *results, wide)
            return call.result(), dweight, dbias


def _assign(target: Array, source: Array) -> None:
    """Copy between arrays of the same dtype; 16-bit ones as bits, whatever the library knows of bfloat16."""
    if target.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)
    target[...] = source


class _Call:
    """One call: its arrays as the kernels can read and write them, its plan, and what its launches have in common."""

    def __init__(self, runtime: Runtime, inputs: tuple[Array, ...], out: Array | None):
        self.runtime = runtime
        self.empty = runtime.empty
        x = inputs[0]
        self.nc = (x.shape[0], x.shape[1])
        self.channels, self.spatial = np.int64(x.shape[1]), np.int64(math.prod(x.shape[2:]))
        self.dtype, self.math = x.dtype, math_dtype(x.dtype)
        self.out = out
        arrays = (*inputs, *(() if out is None else (out,)))
        self.kind, _, copied = arrange(tuple(self._memory(array) for array in arrays))
        inputs = tuple(self._copy(a) if copy else a for a, copy in zip(inputs, copied, strict=False))
        self.target = self._new(x.shape) if out is None or copied[-1] else out
        self.arrays = (*inputs, self.target)

    def _memory(self, array: Array) -> Memory:
        return Memory(array.shape, array.strides, array.itemsize, self.runtime.address(array) % 16)

    def _new(self, shape: tuple[int, ...]) -> Array:
        n, c, *spatial = shape
        if self.kind == "channels_first" or self.spatial == 1:
            return self.empty(shape, self.dtype)
        rank = len(shape)
        return self.empty((n, *spatial, c), self.dtype).transpose(0, rank - 1, *range(1, rank - 1))

    def _copy(self, array: Array) -> Array:
        copy = self._new(array.shape)
        _assign(copy, array)
        return copy

    def plan(self, op: Op, sums: bool) -> Plan:
        # The arrays made here are aligned: the kind stays.
        self.kind, layouts, _ = arrange(tuple(self._memory(array) for array in self.arrays))
        self.tensors: tuple[Any, ...] = ()
        for array, layout in zip(self.arrays, layouts, strict=True):
            self.tensors += (*self.pointers(array), np.int64(layout.n), np.int64(layout.c), np.int64(layout.s))
        shape = (*self.nc, int(self.spatial))
        self._plan = plan(op, shape, self.dtype.name, self.kind, layouts, self.runtime.device(), sums)
        return self._plan

    def planes(self, wanted: bool = True) -> Array | None:
        """A new array of one number for each plane."""
        return self.empty(self.nc, self.math) if wanted else None

    def pointers(self, *arrays: Array | None) -> tuple[np.uintp, ...]:
        return tuple(np.uintp(0 if array is None else self.runtime.address(array)) for array in arrays)

    def wide(self, *arrays: tuple[Array | None, int]) -> np.int32:
        return np.int32(sum(bit for array, bit in arrays if array is not None and array.dtype == self.math))

    def dense(self, array: Array | None) -> Array | None:
        """A per-channel array without gaps: itself, or a copy."""
        if array is None or (array.flags.c_contiguous and self.runtime.address(array) % array.itemsize == 0):
            return array
        copy = self.empty(array.shape, array.dtype)
        _assign(copy, array)
        return copy

    def counts(self, tiles: int) -> tuple[np.int64, np.int64]:
        return np.int64(tiles), np.int64(self.nc[0] * self.nc[1])

    def run(self, step: Step, *args: Any) -> None:
        module = Module.of(step.module, self._plan)
        self.runtime.launch(module, step, args)

    def owner(self, step: Step, *args: Any, after: tuple[Any, ...] = ()) -> None:
        """A launch whose owners serve a whole stripe each."""
        sizes = (self.channels, self.spatial, np.int64(step.owners))
        self.run(step, *args, *sizes, np.int32(self._plan.lanes), np.int32(step.chunks), *after)

    def tiles(self, step: Step, *args: Any) -> None:
        """A launch whose owners serve a tile each."""
        sizes = (self.channels, self.spatial, np.int64(step.owners), np.int64(step.tiles))
        self.run(step, *args, *sizes, np.int32(self._plan.lanes))

    def result(self) -> Array:
        if self.out is not None and self.target is not self.out:
            _assign(self.out, self.target)
        return self.target if self.out is None else self.out
