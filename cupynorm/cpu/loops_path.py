"""The steps as compiled loops: the layouts that they can read, and the calls."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from .._types import ForwardCall, Saved
from ..config import get_num_threads
from ..conventions import count_ratio, terms_of_eps
from . import llvm_machine
from .blocking import Arrays, Work, least_mean_square, merged_axes
from .llvm import Module
from .loops_across import BLOCK, LONGEST, LONGEST_BACKWARD, LONGEST_FORWARD, across_backward, across_forward
from .loops_backward import gradient_sums, gradients
from .loops_forward import results, statistics
from .loops_places import FORMAT, GEOMETRY, LINE, OPTIONS_FORMAT, Kind
from .loops_short import BACKWARD_SHORT, FORWARD_SHORT, short_backward, short_forward
from .loops_tasks import TaskQueue, driver
from .thread_pool import share
from .windows import Windows

TILE = 65536  # positions; no less than loops_short.FORWARD_SHORT
TRACED_TABLE = 64  # runs; layouts with larger tables are found anew in each call
SMALL_TABLE = 1024  # runs; layouts with larger tables have a smaller cache
PAYS = 2**19  # elements from which on a second thread pays: waking it takes 50 to 100 microseconds
STREAM = 3 * 2**23  # bytes; larger results bypass the caches, which could not hold them
LONG_RUN = 128  # elements; shorter runs do not bypass them (many partial lines), and their planes go to windows
PLANE_COSTS = 25  # the fixed cost of a plane, in elements
# With fewer channels side by side, or less than a cache line of them, planes are copied to windows first.
MIN_CHANNELS_COMPILED = 16
# So are planes of channels that do not fill half cache lines, unless fewer than 1 / SPARE of them are left over (of
# 16 bits: unless none is).
SPARE = 14
WIDE = 16  # rows of at least so many vectors of 64 bytes have vectors of 128: longer sums side by side
MOST_KINDS = 256  # of calls on arrays of one layout, whose options are kept
MOST_RUNS = 65536  # limit of the runs of a plane read in place: each array has a table of their offsets


def place_of(array: np.ndarray) -> int:
    """Return the address of the address of the first element.

    It follows Python's object header (see NumPy's PyArrayObject). Only CPython has the loops, so this is safe.
    """
    return id(array) + _HEADER


def address_of(array: np.ndarray) -> int:
    """Return the address of the first element."""
    return _number_at(id(array) + _HEADER).value


_number_at, _HEADER = ctypes.c_size_t.from_address, object.__basicsize__
_nothing = np.zeros(1, np.int64)
NOWHERE = address_of(_nothing)  # the place of the address 0


class Pass(NamedTuple):
    """The modules of a pass, or None for those that a call does not use."""

    sums: str | None = None  # with the steps reduce and join
    apply: str | None = None
    short: str | None = None


FORWARD, BACKWARD = Pass("statistics", "results"), Pass("gradient_sums", "gradients")
MOMENTS, NORMALIZE = Pass("statistics"), Pass(apply="results")
GRADIENT_SUMS, INPUT_GRADIENT = Pass("gradient_sums"), Pass(apply="gradients")


class Layout:
    """The loops' parameters for Arrays of one shape and given strides; cached, since calls repeat.

    strides: of each array, None for an absent one; in the tables of the loops x takes its place.

    Contiguous planes, planes of long runs, and channels side by side (`channels_last`) are read in place. Other planes
    are copied to `windows` first.
    """

    def __init__(
        self, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...],
        long_run: int | None = None, input: np.dtype | None = None,
    ):  # fmt: skip
        itemsize = self.itemsize = dtype.itemsize
        self.dtype_name, self.input_name = dtype.name, "" if input is None else input.name
        given = Arrays(*strides)
        x_strides: tuple[int, ...] = given.x
        present = [each is not None for each in given]
        found = [x_strides if each is None else each for each in given]
        sizes = [itemsize] * len(found)
        if input is not None:  # also of absent arrays, for which x stands
            sizes = [itemsize if there else input.itemsize for there in (False, *present[1:])]
        if given.mask is not None:
            sizes[-1] = 1
        self.usable = all(step % size == 0 for each, size in zip(found, sizes, strict=True) for step in each)
        self.usable &= "float16" not in (self.dtype_name, self.input_name) or llvm_machine.converts_halves()
        if not self.usable:
            return
        # Positions are visited in the order of x's memory.
        order = sorted(range(2, len(shape)), key=lambda axis: -abs(x_strides[axis]))
        stand_ins = [
            np.lib.stride_tricks.as_strided(np.empty(1, f"V{size}"), shape, each)
            for each, size in zip(found, sizes, strict=True)
        ]
        arrays = merged_axes([each.transpose(0, 1, *order) for each in stand_ins])
        n, c, *outer, length = arrays[0].shape
        runs, plane = math.prod(outer), math.prod(outer) * length
        # NumPy rewrites the strides of axes of one: a batch of one sample is to be cut like others.
        steps = [
            [step // size for step in (*each[:2], *array.strides[2:])]
            for each, array, size in zip(found, arrays, sizes, strict=True)
        ]
        long_run = LONG_RUN if long_run is None else long_run
        rows = all(each[-1] == 1 or length == 1 for each in steps) and (runs == 1 or length >= long_run)
        line = max(MIN_CHANNELS_COMPILED, 64 // itemsize)
        leftover = c % (line // 2)
        fit = c >= line and (leftover == 0 or (itemsize > 2 and leftover * SPARE <= c))
        of_channels = [each[1] for each in steps]
        if given.mask is not None and of_channels[-1] == 0:
            of_channels.pop()  # the same for all channels
        channels_last = not rows and fit and all(step == 1 for step in of_channels)
        #: Kind.masked
        self.masked = "" if given.mask is None else "plane" if not channels_last or steps[-1][1] == 0 else "channel"
        group, positions, self.streams, sums = 1, TILE, False, 0
        table = np.zeros((len(arrays), 1), np.int64)
        self.windows: Windows | None = None
        if (rows or channels_last) and runs <= MOST_RUNS:
            for axis, size in enumerate(outer, 2):
                further = np.arange(size) * np.array([[each[axis]] for each in steps])
                table = (table[:, :, None] + further[:, None]).reshape(len(arrays), -1)
            if channels_last:
                group = _group(c, min(c, max(line, 2 * TILE // plane // line * line), 256), line)
                positions = plane if plane * group <= 2 * TILE else max(TILE // group, 1)
            else:
                self.streams = length >= LONG_RUN and n * c * plane * itemsize >= STREAM
            tile_length = -(-length // -(-length // positions))  # even, so that the last one is not too short
            tile_runs = min(max(positions // length, 1), runs)
            grid = [(runs, tile_runs), (length, tile_length)]
        elif input is not None or self.masked:  # windows have room for elements of one size
            self.usable = False
            return
        else:
            self.windows = Windows(itemsize, [n, c, *outer, length], steps, present)
            channels_last, sums = False, n * c
            runs, tile_runs, length, tile_length = 1, 1, plane, plane
            grid = [*zip(self.windows.shape, self.windows.extents, strict=True)][2:]
        self.counts = np.ones(1, np.int64)  # elements of each tile
        for size, extent in grid:
            of_axis = np.minimum(extent, size - np.arange(0, size, extent))
            self.counts = np.multiply.outer(self.counts, of_axis).ravel()
        self.tiles = len(self.counts)
        self.blocks = n * -(-c // group)
        self.group, self.channels_last, self.runs = group, channels_last, table
        # A vector has no more elements than any row of the loops: a run of a tile, a window's tile, or a last group.
        if channels_last:
            shortest = c - (self.blocks // n - 1) * group
        elif self.windows is not None:
            shortest = int(self.counts.min())
        else:
            shortest = length - (-(-length // tile_length) - 1) * tile_length
        widest = LINE // self.kind_of(1).element.computing_size
        #: The lanes of vectors for arrays of any sizes that have enough elements.
        self.usual_lanes = () if channels_last else (widest, 2 * widest)
        if not channels_last and shortest >= WIDE * widest:
            widest *= 2
        self.lanes = 1 << (min(shortest, widest).bit_length() - 1)
        one_piece = (self.windows is not None and self.tiles == 1) or (rows and runs == 1)
        self.planes, self.channels, self.plane = n * c, c, plane
        self.one_piece = plane if one_piece else 0  # elements of planes that lie in one piece each
        numbers = {
            "channels": c, "group": group, "tiles": self.tiles, "runs": runs, "length": length,
            "tile_runs": tile_runs, "tile_length": tile_length, "plane": plane, "sums": sums,
            "run_table": table.ctypes.data, "counts": self.counts.ctypes.data,
        }  # fmt: skip
        axes = [each[i] for each in steps for i in (0, 1, -1)]
        self.geometry = np.array([*(numbers[name] for name in GEOMETRY if name in numbers), *axes], np.int64)
        self.geometry_address = self.geometry.ctypes.data
        self.pays = n * c * (plane + PLANE_COSTS) >= PAYS
        #: Of the partial sums of a call.
        self.partials = 4 if self.masked else 3, self.blocks * self.tiles * group
        self.prepared: dict[Any, Prepared] = {}  # of the kinds of calls so far

    def passes(self, activation: str | None) -> tuple[Pass, Pass]:
        """Return the modules of the forward and of the backward."""
        if not self.one_piece or self.one_piece > FORWARD_SHORT:
            return FORWARD, BACKWARD
        slow = activation in ("silu", "gelu")
        across = [
            not self.masked and self.one_piece <= (LONGEST if slow else longest)
            for longest in (LONGEST_FORWARD, LONGEST_BACKWARD)
        ]
        forward = Pass(*FORWARD[:2], "across_forward" if across[0] else "short_forward")
        if self.one_piece > BACKWARD_SHORT:
            return forward, BACKWARD
        return forward, Pass(*BACKWARD[:2], "across_backward" if across[1] else "short_backward")

    def kind(self, activation: str | None, residual: bool, training: bool = False, sloped: bool = False) -> Kind:
        """Return what loops for such arrays are compiled for."""
        return self.kind_of(self.lanes)._replace(
            channels_last=self.channels_last, activation=activation, residual=residual, training=training,
            sloped=sloped, masked=self.masked,
        )  # fmt: skip

    def kind_of(self, lanes: int) -> Kind:
        """Return the Kind of vectors of so many elements of the arrays' dtypes."""
        return Kind(self.dtype_name, lanes, input=self.input_name)


def _group(channels: int, wanted: int, least: int) -> int:
    """Return a number of channels near `wanted` such that the last group has at least `least` of them, if there is one.

    Multiples of half a cache line come first: other groups share lines.
    """
    sizes = sorted(range(wanted, 2 * wanted), key=lambda size: (size * 2 % least > 0, size))
    found = next((size for size in sizes if (channels - 1) % size + 1 >= least or size >= channels), wanted)
    return min(found, channels)


@lru_cache(maxsize=1024)
def _layout(*given: Any) -> Layout | None:
    """Return a layout, or None if its table is too large for this cache."""
    layout = Layout(*given)
    return layout if not layout.usable or layout.runs.shape[1] <= SMALL_TABLE else None


_large_layout = lru_cache(maxsize=4)(Layout)


def layout_of(*given: Any) -> Layout:
    return _layout(*given) or _large_layout(*given)


class Steps(NamedTuple):
    """Addresses of compiled steps, or 0 for those that a call does not use."""

    reduce: int
    join: int
    apply: int
    short: int


_WRITERS: dict[str, tuple[Callable[[Module, Kind], None], tuple[str, ...]]] = {
    "statistics": (statistics, ("reduce", "join")),
    "results": (results, ("apply",)),
    "short_forward": (short_forward, ("short",)),
    "across_forward": (across_forward, ("short",)),
    "gradient_sums": (gradient_sums, ("reduce", "join")),
    "gradients": (gradients, ("apply",)),
    "short_backward": (short_backward, ("short",)),
    "across_backward": (across_backward, ("short",)),
}


def kind_for(name: str, kind: Kind) -> Kind:
    """Return a kind without what makes no difference to a module."""
    if name == "statistics":
        kind = kind._replace(activation=None, residual=False)
    if name not in ("gradients", "short_backward", "across_backward"):
        kind = kind._replace(training=True, sloped=False)
    if name.startswith("across"):  # its vectors are several planes
        kind = kind._replace(lanes=min(kind.lanes, BLOCK))
    return kind


@cache
def module_of(name: str, kind: Kind) -> tuple[int, ...]:
    """Return the addresses of a module's steps, compiled for a kind of call."""
    write, names = _WRITERS[name]
    return llvm_machine.compiled(f"{name} {' '.join(map(str, kind))}", lambda module: write(module, kind), names)


@cache
def steps_of(modules: Pass, kind: Kind) -> Steps:
    """Return the steps of a pass."""

    def addresses(name: str | None, number: int) -> tuple[int, ...]:
        return module_of(name, kind_for(name, kind)) if name else (0,) * number

    return Steps(*addresses(modules.sums, 2), *addresses(modules.apply, 1), *addresses(modules.short, 1))


@cache
def _function_of(address: int) -> Callable[..., None]:
    return llvm_machine.Step(address)


class Prepared(NamedTuple):
    """What the calls of a kind have in common: their steps, the one for whole blocks, and their options."""

    steps: Steps
    whole: int  # the address of a step
    on_blocks: Callable[..., None]  # this step
    options: Any  # memory
    options_address: int


class Options(NamedTuple):
    """What the numbers in OPTIONS follow from, besides a layout. weight, bias: the ranks of the parameters, or 0."""

    modules: Pass | None  # None: those of the layout
    backward: bool
    activation: str | None
    residual: bool
    training: bool
    sloped: bool
    wide: bool
    weight: int
    bias: int
    eps: float
    eps_mode: str
    ddof: float


def _prepare(layout: Layout, options: Options) -> Prepared:
    kind = layout.kind(options.activation, options.residual, options.training, options.sloped)
    steps = steps_of(options.modules or layout.passes(options.activation)[options.backward], kind)
    whole = driver().whole_address
    row = layout.planes * kind.element.computing_size  # bytes of the means
    strides = [(layout.channels if rank == 2 else 0, 1 if rank else 0) for rank in (options.weight, options.bias)]
    packed = OPTIONS_FORMAT.pack(
        *strides[0], *strides[1], row, 2 * row, layout.partials[1], options.wide,
        *terms_of_eps(options.eps, options.eps_mode),
        1.0 if layout.masked else count_ratio(layout.plane, options.ddof), options.ddof,
        least_mean_square(options), *steps[:3], whole,
    )  # fmt: skip
    memory, own = ctypes.create_string_buffer(packed, len(packed)), steps.short or whole
    return Prepared(steps, own, _function_of(own), memory, ctypes.addressof(memory))


class Task(NamedTuple):
    """A step of a call: its address, the call's numbers, how many of the arrays it reads, and whether it writes."""

    address: int
    numbers: bytes
    reads: int = len(Arrays._fields)
    writes: bool = True


def _parameters(call: ForwardCall | Saved, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias, in computing precision."""
    weight, bias = call.weight, call.bias
    return (
        no_parameter("weight", dtype) if weight is None else np.ascontiguousarray(weight, dtype),
        no_parameter("bias", dtype) if bias is None else np.ascontiguousarray(bias, dtype),
    )


@cache
def no_parameter(name: str, dtype: np.dtype) -> np.ndarray:
    """Return the weight or the bias of calls without one."""
    return np.full(1, name == "weight", dtype)


class CompiledWork(Work):
    """The steps as compiled loops over planes, or over groups of channels side by side."""

    def __init__(self, layout: Layout, of_forward: Prepared | None, call: Saved, arrays: Arrays):
        """of_forward: if it is known from a call of the same kind."""
        self.layout, self.of_forward, self.call, self.arrays = layout, of_forward, call, arrays
        self.blocks, self.tiles = layout.blocks, layout.tiles
        self.threads = get_num_threads() if layout.pays else 1
        self.partials = np.empty(layout.partials)

    @property
    def again(self) -> partial[CompiledWork] | None:
        """Traces keep no layouts with large tables: there are more of them than `_layout` has."""
        kept = self.layout.runs.shape[1] <= TRACED_TABLE
        return partial(type(self), self.layout, self.of_forward) if kept else None

    def _by_tile(self) -> np.ndarray:
        """Return the partial sums as (their number, tiles, N, C)."""
        n, c = self.call.x.shape[:2]
        by_group = self.partials.reshape(-1, n, -(-c // self.layout.group), self.tiles, self.layout.group)
        return by_group.transpose(0, 3, 1, 2, 4).reshape(len(self.partials), self.tiles, n, -1)[..., :c]

    def _prepared(
        self, backward: bool, modules: Pass | None = None, sloped: bool = False, wide: bool = False
    ) -> Prepared:
        """Return what such a forward or backward, or `modules` of it alone, needs. wide: its sums are float64."""
        call, weight, bias = self.call, self.call.weight, self.call.bias
        options = Options(
            modules, backward, call.activation, call.residual is not None, call.training, sloped, wide,
            0 if weight is None else weight.ndim, 0 if bias is None else bias.ndim,
            call.eps, call.eps_mode, call.ddof,
        )  # fmt: skip
        known = self.layout.prepared
        prepared = known.get(options)
        if prepared is None:
            if len(known) >= MOST_KINDS:
                known.clear()
            prepared = known[options] = _prepare(self.layout, options)
        return prepared

    def _numbers(
        self, prepared: Prepared, *, variance: np.ndarray | None = None,
        sums: tuple[np.ndarray, np.ndarray] | None = None, slopes: np.ndarray | None = None,
        count: np.ndarray | None = None,
    ) -> bytes:  # fmt: skip
        """Return the numbers of the call for the loops, in the order of CALL.

        sums: of g, and of g * xhat, of each plane, in computing precision or in float64.
        """
        call, layout, (x, result, dy, residual, dresidual, mask) = self.call, self.layout, self.arrays
        statistics = call.statistics
        if len(statistics) == 2:  # running statistics have no mean_lo
            statistics = np.concatenate([statistics, np.zeros_like(statistics[:1])])
        weight, bias = _parameters(call, statistics.dtype)
        self.kept = prepared, weight, bias, statistics, slopes, count  # while the loops use them
        place = id(x) + _HEADER  # as place_of; eight calls of it would take half a microsecond
        sum_g, sum_g_xhat = (NOWHERE, NOWHERE) if sums is None else map(place_of, sums)
        return FORMAT.pack(
            layout.geometry_address, prepared.options_address, place, id(result) + _HEADER,
            place if dy is None else id(dy) + _HEADER, place if residual is None else id(residual) + _HEADER,
            place if dresidual is None else id(dresidual) + _HEADER, place if mask is None else id(mask) + _HEADER,
            id(weight) + _HEADER, id(bias) + _HEADER, id(statistics) + _HEADER,
            NOWHERE if variance is None else id(variance) + _HEADER, id(self.partials) + _HEADER, sum_g, sum_g_xhat,
            NOWHERE if slopes is None else place_of(slopes), NOWHERE if count is None else place_of(count),
            layout.streams and self._streams(), call.negative_slope,
        )  # fmt: skip

    def _streams(self) -> bool:
        """Return whether results may bypass the caches: not if they replace an input, whose lines are there."""
        result = address_of(self.arrays.result)
        return all(each is None or address_of(each) != result for each in (self.arrays.x, *self.arrays[2:4]))

    def share(self, step: Task, count: int) -> None:
        """The loops take tasks from a queue: a late helper, or a slow thread, takes fewer."""
        if self.threads == 1:
            _function_of(step.address)(step.numbers, 0, count, 0)
            return
        tasks = min(count, 8 * self.threads)
        queue, run = TaskQueue(count, tasks, self.threads), driver().run
        share(
            lambda worker: run(step.address, step.numbers, queue.address, worker, self.threads), queue,
            min(self.threads, tasks),
        )  # fmt: skip

    @property
    def small(self) -> SmallForward | None:
        """What later forwards with this trace are, if they are small and have no mask."""
        if self.layout.pays or self.layout.masked or self.again is None or self.of_forward is None:
            return None
        return SmallForward(self.layout, self.of_forward)

    def __str__(self) -> str:
        if self.layout.channels_last:
            return f"compiled loops over {self.blocks} group(s) of {self.layout.group} channels side by side"
        return f"compiled loops over {self.blocks} plane(s)"

    def _pass(self, prepared: Prepared, numbers: bytes, reads: int) -> None:
        """Do the steps of a pass; reads: how many arrays the step reduce reads."""
        if self.threads == 1:  # at once: the calls on small arrays come here
            prepared.on_blocks(numbers, 0, self.blocks, 0)
            return
        steps = prepared.steps
        reduce, apply = Task(steps.reduce, numbers, reads, False), Task(steps.apply, numbers)
        self.run(reduce, self._join(prepared, numbers), apply, Task(prepared.whole, numbers))

    def _join(self, prepared: Prepared, numbers: bytes) -> Callable[[int, int], None]:
        join = _function_of(prepared.steps.join)
        return lambda first, last: join(numbers, first, last, 0)

    # Forward

    def forward(self, variance: np.ndarray | None) -> None:
        prepared = self.of_forward = self.of_forward or self._prepared(False)
        self._pass(prepared, self._numbers(prepared, variance=variance, count=self.call.count), 1)

    def moments(self) -> tuple[np.ndarray, ...]:
        """Return count, mean, mean_lo and m2 of each tile, (tiles, N, C)."""
        prepared = self._prepared(False, MOMENTS)
        self.share(Task(prepared.steps.reduce, self._numbers(prepared), 1, False), self.blocks * self.tiles)
        means, means_lo, m2s, *counted = self._by_tile()
        if counted:
            counts = counted[0].astype(np.int64)
        else:
            counts = np.broadcast_to(self.layout.counts[:, None, None], means.shape)
        return counts, means, means_lo, np.maximum(m2s, 0)  # NaN stays

    def normalize(self) -> None:
        prepared = self.of_forward = self.of_forward or self._prepared(False, NORMALIZE)
        self.share(Task(prepared.steps.apply, self._numbers(prepared)), self.blocks * self.tiles)

    # Backward

    def backward(
        self, sum_g: np.ndarray, sum_g_xhat: np.ndarray, slopes: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """slopes: rstd_slope of each plane (conventions.py), or None if it is 1. counts: the positions of each plane,
        with a mask."""
        prepared = self._prepared(True, sloped=slopes is not None)
        numbers = self._numbers(prepared, sums=(sum_g, sum_g_xhat), slopes=slopes, count=counts)
        self._pass(prepared, numbers, len(Arrays._fields))

    def gradient_sums(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        prepared = self._prepared(True, GRADIENT_SUMS, wide=sum_g.dtype != self.call.statistics.dtype)
        numbers = self._numbers(prepared, sums=(sum_g, sum_g_xhat))
        self.sum_up(Task(prepared.steps.reduce, numbers, writes=False), self._join(prepared, numbers))

    def input_gradient(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        prepared = self._prepared(True, INPUT_GRADIENT)
        counts = np.full(sum_g.shape, self.layout.plane, sum_g.dtype) if self.layout.masked else None
        numbers = self._numbers(prepared, sums=(sum_g, sum_g_xhat), count=counts)
        self.share(Task(prepared.steps.apply, numbers), self.blocks * self.tiles)


class SmallForward(NamedTuple):
    """A forward on one thread, with x's own statistics: what `CompiledWork.forward` does, in half the time of Python.

    Calls have the same options, and arrays with the same facts.
    """

    layout: Layout
    prepared: Prepared

    def __call__(self, call: ForwardCall, y: np.ndarray, statistics: np.ndarray, variance: np.ndarray | None) -> None:
        (layout, prepared), residual = self, call.residual
        weight, bias = _parameters(call, statistics.dtype)
        partials, place = np.empty(layout.partials), id(call.x) + _HEADER
        numbers = FORMAT.pack(
            layout.geometry_address, prepared.options_address, place, id(y) + _HEADER, place,
            place if residual is None else id(residual) + _HEADER, place, place, id(weight) + _HEADER,
            id(bias) + _HEADER, id(statistics) + _HEADER, NOWHERE if variance is None else id(variance) + _HEADER,
            id(partials) + _HEADER, NOWHERE, NOWHERE, NOWHERE, NOWHERE, 0, call.negative_slope,
        )  # fmt: skip
        prepared.on_blocks(numbers, 0, layout.blocks, 0)


class MovedWork(CompiledWork):
    """Planes are copied to windows for the loops, and results back, a window at a time.

    In a window planes keep their numbers: the loops get addresses as if all other planes lay around them. Planes too
    large for a window are summed tile by tile first.
    """

    small = None

    def __str__(self) -> str:
        return f"{super().__str__()}, moved together first"

    def _by_tile(self) -> np.ndarray:
        return self.partials.reshape(3, self.tiles, *self.call.x.shape[:2])

    def sum_up(self, reduce: Any, join: Callable[..., None]) -> None:
        self.share(reduce, self.blocks * self.tiles)
        # From all planes' sums of each tile to all tiles' sums of each plane, which `join` expects.
        self.partials[...] = self.partials.reshape(3, self.tiles, -1).transpose(0, 2, 1).reshape(3, -1)
        join(0, self.blocks)

    def _pass(self, prepared: Prepared, numbers: bytes, reads: int) -> None:
        if self.tiles == 1:
            self.share(Task(prepared.whole, numbers), self.blocks)
            return
        self.sum_up(Task(prepared.steps.reduce, numbers, reads, False), self._join(prepared, numbers))
        self.share(Task(prepared.steps.apply, numbers), self.blocks * self.tiles)

    def share(self, step: Task, count: int) -> None:
        """Distribute the boxes over the threads, whatever the number of planes or tiles."""
        windows, itemsize = self.layout.windows, self.layout.itemsize
        assert windows is not None
        boxes = windows.boxes(self.threads)
        words, number = boxes.words(), len(boxes.table)
        queue = TaskQueue(number, number, self.threads)
        size = boxes.buffer_size * itemsize

        def work(worker: int) -> None:
            buffer = np.empty(sum(windows.moved) * size + LINE, np.uint8)
            start = -(-address_of(buffer) // LINE) * LINE
            driver().go_through(
                step.address, step.numbers, queue.address, worker, self.threads, address_of(words), start, size,
                itemsize, step.reads, step.writes,
            )  # fmt: skip

        share(work, queue, min(self.threads, number))


def work_of(call: Saved, arrays: Arrays) -> CompiledWork | None:
    """Return the work of a call, or None if the loops cannot address the arrays."""
    x, result, dy, residual, dresidual, mask = arrays
    strides = (
        x.strides, result.strides, None if dy is None else dy.strides, None if residual is None else residual.strides,
        None if dresidual is None else dresidual.strides, None if mask is None else mask.strides,
    )  # fmt: skip
    if call.mixed:
        unwritten = strides[0], None if result is x else strides[1], *strides[2:]
        layout = layout_of(call.dtype, x.shape, unwritten, None, x.dtype)
    else:
        layout = layout_of(x.dtype, x.shape, strides)
    aligned = x.flags.aligned and result.flags.aligned
    for each in (dy, residual, dresidual):
        aligned = aligned and (each is None or each.flags.aligned)
    if not (layout.usable and aligned):
        return None
    return (MovedWork if layout.windows else CompiledWork)(layout, None, call, arrays)
