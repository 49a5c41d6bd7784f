"""The launches of a call: its arrays as the kernels can access them, its plan, and the kernels' arguments.

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

from .._types import Array, commit, math_dtype
from ..config import get_batch_invariant
from . import arguments
from .arguments import FLAGS
from .device import Device
from .layout import ArrayDesc, choose_layout, contiguous_desc, one_stride
from .ops import OPS, Op
from .plan import Plan, Step, channel_step, plan, plane_step
from .source import Module, single
from .variants import SINGLE, Kind

NOTHING: Mapping[str, Any] = {}


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


def assignment(target: Array, source: Array) -> partial[None]:
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


class PlannedStep(NamedTuple):
    """A step of a plan, its module, and the arguments of its kernel that follow from the plan; a call adds the rest."""

    step: Step
    module: Module
    template: bytes


class _PlannedCall(NamedTuple):
    """The part of a call that follows from the shapes, strides and alignment of its arrays."""

    kind: Kind
    copied: tuple[bool, ...]  # which of the given arrays the kernels cannot read or write in place
    plan: Plan
    steps: tuple[PlannedStep, ...]


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
    input: str = "",
    masked: bool = False,
) -> _PlannedCall:
    """Plan a call. descs: of the inputs, then of out if it is given; names: of the inputs' and the results' tensors.
    dtype: of all arrays, or of all but x; input: that of x then, else ""."""
    shape = descs[0].shape
    kind, _, copied = choose_layout(descs, invariant)
    new = contiguous_desc(shape, dtype.itemsize, kind)
    # New arrays are aligned, and have the layout of this kind.
    final = [new if copy else desc for desc, copy in zip(descs, copied, strict=True)]
    if copied[0]:
        final[0] = contiguous_desc(shape, descs[0].itemsize, kind)
    final += [new] * (len(names) - len(final))
    kind, layouts, _ = choose_layout(tuple(final))
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    made = plan(
        op, (n, c, s), dtype.name, kind, layouts, device, sums=sums, reduced=reduced, epilogue=epilogue,
        residual=residual, invariant=invariant, input=input,
        masked=masked,
    )  # fmt: skip
    tiles = made.steps[0].tiles
    sizes = {
        "samples": n, "channels": c, "first": 0, "spatial": s, "all_planes": n * c, "planes": n * c, "tiles": tiles,
        "channel_tiles": made.channel_tiles, "round.channels": c, "round.spatial": s, "round.tiles": tiles,
        "round.first": 0, "round.channel_tiles": made.channel_tiles,
    }  # fmt: skip
    for name, layout in zip(names, layouts, strict=True):
        sizes |= {f"{name}.{axis}": getattr(layout, axis) for axis in "ncs"}
    if "dy" in names:  # a split's input_gradient reads dy, or dresidual
        g = layouts[names.index("dresidual" if "dresidual" in names else "dy")]
        sizes |= {f"g.{axis}": getattr(g, axis) for axis in "ncs"}
    steps = []
    for step in made.steps:
        memory = arguments.new(step.kernel)
        arguments.fill(step.kernel, memory, sizes | {
            "subdivision": step.subdivision, "round.subdivision": step.subdivision,
            "vecs_per_thread": step.vecs_per_thread, "group.tiles": step.tiles,
        })  # fmt: skip
        steps.append(PlannedStep(step, Module.of(step, made), bytes(memory)))
    return _PlannedCall(kind, copied, made, tuple(steps))


@lru_cache(maxsize=4096)
def _plan_planes(kernel: str, shape: tuple[int, int, int], dtype: np.dtype, input: str) -> PlannedStep:
    """Plan a launch of a kernel that has only numbers of planes: shape is (N, C, S)."""
    n, c, s = shape
    step = channel_step(kernel, c) if kernel in SINGLE["channels"] else plane_step(kernel, n * c)
    memory = arguments.new(kernel)
    arguments.fill(kernel, memory, {"samples": n, "channels": c, "planes": n * c, "spatial": s})
    return PlannedStep(step, single(step.module, dtype.name, input), bytes(memory))


class Launches:
    """The launches of a call, and the numbers of planes that they need.

    values: those that the call has set, by the names of the kernels' arguments; each kernel takes the ones it has.
    """

    def __init__(self, runtime: Runtime, x: Array, dtype: np.dtype | None = None):
        """dtype: of results, if it is not x's."""
        self.runtime = runtime
        self.empty, self.address = runtime.empty, runtime.address
        self.launches: list[partial[Any]] = []
        self.updates: list[partial[Any]] = []  # of the running statistics
        self.keepalive: list[Array] = []  # the kernels get addresses only
        self.values: dict[str, Any] = {}
        self.x, self.shape, self.nc = x, x.shape, x.shape[:2]
        self.dtype = x.dtype if dtype is None else dtype
        self.math = math_dtype(self.dtype, x.dtype)
        self.input = "" if self.dtype == x.dtype else x.dtype.name

    def planes(self, wanted: bool = True) -> Array | None:
        """Return a new array of one number for each plane, or None if it is not wanted."""
        return self.empty(self.nc, self.math) if wanted else None

    def point(self, name: str, array: Array | None) -> None:
        """Set a pointer, null without an array."""
        self.values[name] = 0 if array is None else self.address(array)
        if array is not None:
            self.keepalive.append(array)

    def point_to(self, structure: str, **arrays: Array | None) -> None:
        """Set the pointers of a structure."""
        for name, array in arrays.items():
            self.point(f"{structure}.{name}", array)

    def flags(self, **arrays: Array | None) -> int:
        """Return the flags that say how arrays are stored, by their names in FLAGS."""
        flags = 0
        for name, array in arrays.items():
            if array is not None and array.dtype == self.math:
                flags |= FLAGS[f"WIDE_{name}"]
            if array is not None and array.ndim == 2:
                flags |= FLAGS[f"SAMPLE_{name}"]
        return flags

    def dense(self, array: Array | None) -> Array | None:
        """Return an array of numbers of channels or planes without gaps: itself, or a copy."""
        if array is None or (array.flags.c_contiguous and not self.runtime.address(array) % array.itemsize):
            return array
        copy = self.empty(array.shape, array.dtype)
        assignment(copy, array)()
        return copy

    def of_planes(self, kernel: str) -> PlannedStep:
        """Return the step of a kernel that has only numbers of planes."""
        n, c, *spatial = self.shape
        return _plan_planes(kernel, (n, c, math.prod(spatial)), self.dtype, self.input)

    def prepare(self, planned: PlannedStep, values: Mapping[str, Any] = NOTHING) -> partial[Any]:
        """Return a step's launch. values: arguments of this launch alone."""
        kernel, memory = planned.step.kernel, bytearray(planned.template)
        arguments.fill(kernel, memory, self.values)
        arguments.fill(kernel, memory, values)
        return self.runtime.prepare(planned.module, planned.step, memory)

    def run(self, planned: PlannedStep, values: Mapping[str, Any] = NOTHING) -> None:
        """Add a step to the launches of `commit`: see `prepare`."""
        self.launches.append(self.prepare(planned, values))

    def commit(self, *writes: partial[Any]) -> None:
        """Launch the kernels, update the running statistics, then perform the writes: see ForwardResult."""
        with self.runtime.on(self.x):
            commit(*self.launches, *self.updates, *writes)


class PlannedLaunches(Launches):
    """The launches of an operation on arrays of planes: its plan, and its arrays as the kernels can access them."""

    def __init__(
        self,
        runtime: Runtime,
        op: Op,
        inputs: tuple[Array, ...],
        *,
        sums: bool = False,
        reduced: bool = False,
        residual: Array | None = None,
        epilogue: int = 0,
        out: Array | None = None,
        dtype: np.dtype | None = None,
        mask: Array | None = None,
    ):
        x = inputs[0]
        super().__init__(runtime, x, dtype)
        self.operation, self.out = OPS[op], out
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
            op, descs, read + self._written, self.dtype, runtime.device(), sums=sums, reduced=reduced,
            epilogue=epilogue, residual=residual is not None, invariant=get_batch_invariant(), input=self.input,
            masked=mask is not None,
        )  # fmt: skip
        self.tiles = self.plan.steps[0].tiles
        arrays = [self.copy(a) if copy else a for a, copy in zip(given, copied, strict=False)]
        self.targets = self._make_targets(copied)
        for name, array in (*zip(read, arrays, strict=True), *self.targets.items()):
            self.point(f"{name}.data", array)
        if mask is not None:
            self._point_mask(mask)

    def _point_mask(self, mask: Array) -> None:
        """Set the kernels' mask: as it is if its spatial positions have one stride, else a copy, but of no samples and
        channels that are repetitions."""
        if one_stride(mask.shape[2:], mask.strides[2:]) is None:
            small = mask[tuple(slice(None if stride else 1) for stride in mask.strides[:2])]
            copy = self.empty(small.shape, mask.dtype)
            assignment(copy, small)()
            strides = [0 if size == 1 else stride for size, stride in zip(small.shape, copy.strides, strict=True)]
            mask, strides[2:] = copy, copy.strides[2:]
        else:
            strides = [*mask.strides]
        s = one_stride(self.shape[2:], strides[2:])
        self.values |= {"mask.n": strides[0], "mask.c": strides[1], "mask.s": s}
        self.point("mask.data", mask)

    def _make_targets(self, copied: tuple[bool, ...]) -> dict[str, Array]:
        """Return the arrays that kernels write: the first is out, if it is given and they can write it in place."""
        targets = {name: self._new() for name in self._written[1:]}
        for first in self._written[:1]:
            targets[first] = self._new() if self.out is None or copied[-1] else self.out
        return targets

    def _new(self, dtype: np.dtype | None = None) -> Array:
        dtype = self.dtype if dtype is None else dtype
        n, c, *spatial = self.shape
        if self.kind == "channels_first" or math.prod(spatial) == 1:
            return self.empty(self.shape, dtype)
        rank = len(self.shape)
        return self.empty((n, *spatial, c), dtype).transpose(0, rank - 1, *range(1, rank - 1))

    def copy(self, array: Array) -> Array:
        copy = self._new(array.dtype)
        assignment(copy, array)()
        return copy

    def partials(self) -> Array:
        """Return a new array for the partials of all tiles, to which the kernels' pointer is set."""
        partials = self.empty((self.operation.partials, *self.nc, self.tiles), self.math)
        self.point("partials", partials)
        return partials

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

    def prepare(self, planned: PlannedStep, values: Mapping[str, Any] = NOTHING) -> partial[Any]:
        if planned.step.cooperative:
            self._point_exchange(planned.step)
        return super().prepare(planned, values)

    def run_planes(self) -> tuple[PlannedStep, ...]:
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
        if self.out is not None and self._target is not self.out:
            self.launches.append(assignment(self.out, self._target))
        super().commit(*writes)
