"""Trace a call on the kernels: follow it once, on Slots in place of arrays.

A trace depends on the facts of the arrays (replay.py), not on their addresses and values. So the first call with given
facts is checked for copies, planned, and its kernels are compiled; later ones only replay the trace.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._types import math_dtype
from . import arguments
from .arguments import FLAGS
from .device import Device
from .layout import ArrayDesc, choose_layout, contiguous_desc, dense_strides, one_stride
from .ops import OPS, Op
from .plan import Step, channel_step, plan, plane_step
from .replay import Copy, Facts, Launch, Runtime, Trace
from .source import Module, single
from .variants import SINGLE

NOTHING: Mapping[str, Any] = {}

#: The numbers of a call that are no part of its trace, by the arguments that they are.
NUMBERS = "scale.eps", "scale.ddof", "momentum", "epilogue.slope"

ALIGNMENT = 16  # of each array in the memory that only kernels see


@dataclass(eq=False, frozen=True)
class Slot:
    """An array of a call that is traced: it has facts, but no memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: np.dtype
    misalignment: int = 0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def desc(self) -> ArrayDesc:
        return ArrayDesc(self.shape, self.strides, self.dtype.itemsize, self.misalignment)

    @property
    def c_contiguous(self) -> bool:
        return not self.size or all(
            size == 1 or stride == step
            for size, stride, step in zip(
                self.shape, self.strides, dense_strides(self.shape, self.dtype.itemsize), strict=True
            )
        )


class Pointer(NamedTuple):
    """The address of a slot's first byte, and an offset in bytes."""

    slot: Slot
    offset: int = 0


class Number(NamedTuple):
    """One of NUMBERS."""

    name: str


class Copied(NamedTuple):
    """A copy of an array. part: an index into the source; None is all of it."""

    target: Slot
    source: Slot
    part: Any = None


class PlannedStep(NamedTuple):
    """A step of a plan, its module, and the arguments of its kernel that follow from the plan."""

    step: Step
    module: Module
    sizes: Mapping[str, int]


class Tracer:
    """Follow a call, and collect its trace.

    values: the arguments that the call has set, by name; each kernel takes the ones it has.
    """

    def __init__(self, runtime: Runtime, device: Device, invariant: bool, given: Sequence[Facts | None]):
        self._runtime, self._device, self._invariant = runtime, device, invariant
        self.given = [None if facts is None else Slot(*facts[1:5]) for facts in given]
        self._empty: list[Slot] = []
        self._zeros: list[Slot] = []
        self._memory = Slot((), (), np.dtype(np.uint8))  # one for all that only kernels see
        self._hidden: dict[Slot, int] = {}  # offsets into this memory
        self._size = 0  # of this memory
        self._first: list[Copied] = []
        self._steps: list[Any] = []
        self.values: dict[str, Any] = {name: Number(name) for name in NUMBERS}

    def begin(self, x: Slot, dtype: np.dtype | None = None) -> None:
        """dtype: of results, if it is not x's."""
        self.x, self.shape, self.nc = x, x.shape, x.shape[:2]
        self.dtype = x.dtype if dtype is None else dtype
        self.math = math_dtype(self.dtype, x.dtype)
        self.input = "" if self.dtype == x.dtype else x.dtype.name

    # New arrays

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None) -> Slot:
        """Return a new array of the call. strides: in bytes; None for C-contiguous."""
        self._empty.append(Slot(shape, dense_strides(shape, dtype.itemsize) if strides is None else strides, dtype))
        return self._empty[-1]

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Slot:
        """Return a new C-contiguous array of zeros."""
        self._zeros.append(Slot(shape, dense_strides(shape, dtype.itemsize), dtype))
        return self._zeros[-1]

    def hidden(self, shape: tuple[int, ...], dtype: np.dtype) -> Slot:
        """Return a new array that only kernels see."""
        slot = Slot(shape, dense_strides(shape, dtype.itemsize), dtype)
        self._hidden[slot] = self._size
        self._size += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT
        return slot

    def planes(self, wanted: bool = True) -> Slot | None:
        """Return a new array of one number for each plane, which only kernels see, or None if it is not wanted."""
        return self.hidden(self.nc, self.math) if wanted else None

    # Arguments

    def pointer(self, target: Slot, row: int = 0) -> Pointer:
        """Return the address of a row of an array: of its first axis."""
        offset = row * target.strides[0] if row else 0
        hidden = self._hidden.get(target)
        return Pointer(target, offset) if hidden is None else Pointer(self._memory, hidden + offset)

    def point(self, name: str, target: Slot | None, row: int = 0) -> None:
        """Set a pointer to a row of an array; null without an array."""
        self.values[name] = 0 if target is None else self.pointer(target, row)

    def point_to(self, structure: str, **targets: Slot | None) -> None:
        """Set the pointers of a structure."""
        for name, target in targets.items():
            self.point(f"{structure}.{name}", target)

    def flags(self, **arrays: Slot | None) -> int:
        """Return the flags that say how arrays are stored, by their names in FLAGS."""
        flags = 0
        for name, array in arrays.items():
            if array is not None and array.dtype == self.math:
                flags |= FLAGS[f"WIDE_{name}"]
            if array is not None and array.ndim == 2:
                flags |= FLAGS[f"SAMPLE_{name}"]
        return flags

    def dense(self, array: Slot | None) -> Slot | None:
        """Return an array of numbers of channels or planes without gaps: itself, or a copy."""
        if array is None or (array.c_contiguous and not array.misalignment % array.dtype.itemsize):
            return array
        copy = self.empty(array.shape, array.dtype)
        self.copy_first(copy, array)
        return copy

    # Copies and launches

    def copy_first(self, target: Slot, source: Slot, part: Any = None) -> None:
        """Copy a given array before the launches. part: an index into the source."""
        self._first.append(Copied(target, source, part))

    def copy(self, target: Slot, source: Slot) -> None:
        """Copy an array after the launches so far."""
        self._steps.append(Copied(target, source))

    def copy_result(self) -> None:
        """Copy the result to out, if the kernels cannot write it in place."""
        target = next(iter(self.targets.values()))
        if self.out is not None and target is not self.out:
            self.copy(self.out, target)

    def of_planes(self, kernel: str) -> PlannedStep:
        """Return the step of a kernel that has only numbers of planes."""
        n, c, s = *self.nc, math.prod(self.shape[2:])
        step = channel_step(kernel, c) if kernel in SINGLE["channels"] else plane_step(kernel, n * c)
        sizes = {"samples": n, "channels": c, "planes": n * c, "spatial": s}
        return PlannedStep(step, single(step.module, self.dtype.name, self.input), sizes)

    def run(self, planned: PlannedStep, values: Mapping[str, Any] = NOTHING) -> None:
        """Launch a step with the arguments set so far. values: arguments of this launch alone."""
        if planned.step.cooperative:
            self._point_exchange(planned.step)
        kernel = self._runtime.kernel(planned.module, planned.step)
        self._steps.append((kernel, planned.step.kernel, {**planned.sizes, **self.values, **values}))

    # Planned calls

    def plan(
        self,
        op: Op,
        inputs: tuple[Slot, ...],
        *,
        sums: bool = False,
        reduced: bool = False,
        residual: Slot | None = None,
        epilogue: int = 0,
        out: Slot | None = None,
        dtype: np.dtype | None = None,
        mask: Slot | None = None,
    ) -> None:
        """Plan an operation on arrays of planes, and set its arrays as the kernels can access them. dtype: see `begin`.

        targets: the arrays that kernels write, by name; result: the first of them, or out."""
        x = inputs[0]
        self.begin(x, dtype)
        self.operation, self.out = OPS[op], out
        given = inputs if residual is None else (*inputs, residual)
        read, written = self.operation.tensors(len(inputs), residual is not None)
        descs = tuple(array.desc for array in (given if out is None else (*given, out)))
        invariant = self._invariant and x.size > 0
        self.kind, _, copied = choose_layout(descs, invariant)
        arrays = [self.copied(a) if copy and x.size else a for a, copy in zip(given, copied, strict=False)]
        self.targets = {
            name: out if out is not None and not number and not copied[-1] else self._new()
            for number, name in enumerate(written)
        }
        self.result = out if out is not None else self.targets[written[0]] if written else None
        if not x.size:
            return
        used = [*zip(read, arrays, strict=True), *((name, self.targets[name]) for name in written)]
        # New arrays are aligned, and have the layout of this kind.
        self.kind, layouts, _ = choose_layout(tuple(array.desc for _, array in used))
        n, c, s = *self.nc, math.prod(self.shape[2:])
        made = plan(
            op, (n, c, s), self.dtype.name, self.kind, layouts, self._device, sums=sums, reduced=reduced,
            epilogue=epilogue, residual=residual is not None, invariant=self._invariant, input=self.input,
            masked=mask is not None,
        )  # fmt: skip
        self.planned, self.tiles = made, made.steps[0].tiles
        sizes = {
            "samples": n, "channels": c, "first": 0, "spatial": s, "all_planes": n * c, "planes": n * c,
            "tiles": self.tiles, "channel_tiles": made.channel_tiles, "round.channels": c, "round.spatial": s,
            "round.tiles": self.tiles, "round.first": 0, "round.channel_tiles": made.channel_tiles,
        }  # fmt: skip
        names = read + written
        for name, layout in zip(names, layouts, strict=True):
            sizes |= {f"{name}.{axis}": getattr(layout, axis) for axis in "ncs"}
        if "dy" in names:  # a split's input_gradient reads dy, or dresidual
            g = layouts[names.index("dresidual" if "dresidual" in names else "dy")]
            sizes |= {f"g.{axis}": getattr(g, axis) for axis in "ncs"}
        self.steps = tuple(
            PlannedStep(step, Module.of(step, made), sizes | {
                "subdivision": step.subdivision, "round.subdivision": step.subdivision,
                "vecs_per_thread": step.vecs_per_thread, "group.tiles": step.tiles,
            })
            for step in made.steps
        )  # fmt: skip
        for name, array in used:
            self.point(f"{name}.data", array)
        if mask is not None:
            self._point_mask(mask)

    def _new(self, dtype: np.dtype | None = None) -> Slot:
        """Return a new array of x's shape, which lies as the kernels of the call write it."""
        dtype = self.dtype if dtype is None else dtype
        if self.kind == "channels_first" or math.prod(self.shape[2:]) == 1:
            return self.empty(self.shape, dtype)
        return self.empty(self.shape, dtype, contiguous_desc(self.shape, dtype.itemsize, self.kind).strides)

    def copied(self, array: Slot) -> Slot:
        """Return a copy of a given array, which lies as the kernels of the call read it."""
        copy = self._new(array.dtype)
        self.copy_first(copy, array)
        return copy

    def _point_mask(self, mask: Slot) -> None:
        """Set the kernels' mask: as it is if its spatial positions have one stride, else a copy, but of no samples and
        channels that are repetitions."""
        strides = [*mask.strides]
        if one_stride(mask.shape[2:], mask.strides[2:]) is None:
            small = tuple(size if stride else 1 for size, stride in zip(mask.shape[:2], strides, strict=False))
            copy = self.empty((*small, *mask.shape[2:]), mask.dtype)
            self.copy_first(copy, mask, tuple(slice(None if stride else 1) for stride in strides[:2]))
            strides = [0 if size == 1 else stride for size, stride in zip(small, copy.strides, strict=False)]
            mask, strides[2:] = copy, copy.strides[2:]
        s = one_stride(self.shape[2:], strides[2:])
        self.values |= {"mask.n": strides[0], "mask.c": strides[1], "mask.s": s}
        self.point("mask.data", mask)

    def partials(self) -> Slot:
        """Return a new array for the partials of all tiles, to which the kernels' pointer is set."""
        partials = self.hidden((self.operation.partials, *self.nc, self.tiles), self.math)
        self.point("partials", partials)
        return partials

    def rounds(self) -> Iterator[dict[str, int]]:
        """Yield the arguments of each round of a split: its channel tiles and its planes."""
        n, c = self.nc
        channel_tiles, at_a_time = self.planned.channel_tiles, self.planned.at_a_time
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
        return 1 if self.kind == "channels_first" else self.planned.steps[0].channel_vecs * self.planned.vec_size

    def _point_exchange(self, step: Step) -> None:
        """Set the pointers for the blocks of a grid, to new memory through which they exchange partials."""
        groups = step.grid[0] // step.tiles
        numbers = self._width() * self.operation.partials
        self.point("group.partial", self.hidden((groups, 2, step.tiles, numbers), self.math))
        self.point("group.arrived", self.zeros((groups,), np.dtype(np.uint32)))

    def run_planes(self) -> tuple[PlannedStep, ...]:
        """Add the steps that compute the results, a split's three in rounds. Return the other steps: sums over N."""
        if self.planned.regime != "split":
            self.run(self.steps[0])
            return self.steps[1:]
        for round_ in self.rounds():
            for planned in self.steps[:3]:
                self.run(planned, round_)
        return self.steps[3:]

    def trace(self, results: Sequence[Slot | None]) -> Trace:
        """Return the trace of what was called so far. results: the arrays that the call returns."""
        arrays = [*self.given, *self._empty, *self._zeros]
        number_of = {slot: number for number, slot in enumerate(arrays) if slot is not None}
        packed = [None if isinstance(step, Copied) else arguments.packer(*step[1:]) for step in self._steps]
        items = dict.fromkeys(item for found in packed if found for item in found[1])
        parts = [item for item in items if isinstance(item, Pointer) and item.offset]
        constants = [item for item in items if isinstance(item, bytes)]
        # In the order of Trace.replay.
        bases = [None if slot is None else Pointer(slot) for slot in arrays]
        memory = [Pointer(self._memory)] if self._size else []
        values = [*bases, *memory, *map(Number, NUMBERS), *parts, *constants]
        place_of = {item: place for place, item in enumerate(values)}

        def copy(step: Copied) -> Copy:
            return Copy(number_of[step.target], number_of[step.source], step.part)

        def launch(kernel: Any, packed: Any) -> Launch:
            pack, items = packed
            return Launch(kernel, pack, operator.itemgetter(*(place_of[item] for item in items)))

        new, new_zeros = self._runtime.new, self._runtime.new_zeros
        made = [
            *(new(a.shape, a.dtype, a.nbytes, None if a.c_contiguous else a.strides) for a in self._empty),
            *(new_zeros(a.shape, a.dtype) for a in self._zeros),
        ]
        return Trace(
            tuple(made),
            self._size,
            tuple((place_of[Pointer(slot)], offset) for slot, offset in parts),
            tuple(constants),
            tuple(map(copy, self._first)),
            tuple(
                copy(step) if isinstance(step, Copied) else launch(step[0], found)
                for step, found in zip(self._steps, packed, strict=True)
            ),
            tuple(None if slot is None else number_of[slot] for slot in results),
            self._runtime,
            self._device,
            self._invariant,
        )
