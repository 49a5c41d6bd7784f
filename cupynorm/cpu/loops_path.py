"""The steps as compiled loops: the layouts that they can read, and the calls."""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable
from functools import cache, lru_cache, reduce
from typing import Any, NamedTuple

import numpy as np

from .._types import Saved
from ..config import get_num_threads
from . import llvm_machine
from .blocking import Arrays, Work, least_mean_square, merged_axes
from .llvm import Module
from .loops_backward import gradient_sums, gradients
from .loops_forward import results, statistics
from .loops_places import CALL, ELEMENTS, FORMAT, GEOMETRY, LINE, Kind
from .loops_short import BACKWARD_SHORT, FORWARD_SHORT, short_backward, short_forward
from .loops_tasks import TaskQueue, driver
from .thread_pool import share
from .windows import Windows

TILE = 65536  # positions; no less than loops_short.FORWARD_SHORT
SMALL_TABLE = 1024  # runs; layouts with larger tables have a smaller cache
PAYS = 2**18  # elements from which on a second thread pays
STREAM = 3 * 2**23  # bytes; larger results bypass the caches, which could not hold them
LONG_RUN = 128  # elements; shorter runs do not bypass them (many partial lines), and their planes go to windows
PLANE_COSTS = 25  # the fixed cost of a plane, in elements
# With fewer channels side by side, or less than a cache line of them, planes are copied to windows first.
MIN_CHANNELS_COMPILED = 16
# So are planes of channels that do not fill half cache lines, unless fewer than 1 / SPARE of them are left over (of
# 16 bits: unless none is).
SPARE = 14
MOST_RUNS = 65536  # limit of the runs of a plane read in place: each array has a table of their offsets


def address_of(array: np.ndarray) -> int:
    """Return the address of the first element. It follows Python's object header (see NumPy's PyArrayObject).

    __array_interface__ also has it, but takes a microsecond more. Only CPython has the loops, so this is safe.
    """
    return ctypes.c_size_t.from_address(id(array) + object.__basicsize__).value


class Layout:
    """The loops' parameters for Arrays of one shape and given strides; cached, since calls repeat.

    strides: of each array, None for an absent one; in the tables of the loops x takes its place.

    Contiguous planes, planes of long runs, and channels side by side (`channels_last`) are read in place. Other planes
    are copied to `windows` first.
    """

    def __init__(
        self, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...],
        long_run: int | None = None,
    ):  # fmt: skip
        itemsize = self.itemsize = dtype.itemsize
        given = Arrays(*strides)
        x_strides: tuple[int, ...] = given.x
        present = [each is not None for each in given]
        found = [x_strides if each is None else each for each in given]
        self.usable = all(step % itemsize == 0 for each in found for step in each)
        self.usable &= dtype.name != "float16" or llvm_machine.converts_halves()
        if not self.usable:
            return
        # Positions are visited in the order of x's memory.
        order = sorted(range(2, len(shape)), key=lambda axis: -abs(x_strides[axis]))
        stand_ins = [np.lib.stride_tricks.as_strided(np.empty(1, f"V{itemsize}"), shape, each) for each in found]
        arrays = merged_axes([each.transpose(0, 1, *order) for each in stand_ins])
        n, c, *outer, length = arrays[0].shape
        runs, plane = math.prod(outer), math.prod(outer) * length
        steps = [[step // itemsize for step in a.strides] for a in arrays]
        long_run = LONG_RUN if long_run is None else long_run
        rows = all(each[-1] == 1 or length == 1 for each in steps) and (runs == 1 or length >= long_run)
        line = max(MIN_CHANNELS_COMPILED, 64 // itemsize)
        leftover = c % (line // 2)
        fit = c >= line and (leftover == 0 or (itemsize > 2 and leftover * SPARE <= c))
        channels_last = not rows and fit and all(each[1] == 1 for each in steps)
        group, positions, self.streams, sums = 1, TILE, False, 0
        table = np.zeros((len(arrays), 1), np.int64)
        self.windows: Windows | None = None
        if (rows or channels_last) and runs <= MOST_RUNS:
            for axis, size in enumerate(outer, 2):
                further = np.arange(size) * np.array([[each[axis]] for each in steps])
                table = (table[:, :, None] + further[:, None]).reshape(len(arrays), -1)
            if channels_last:
                group = min(c, max(line, 2 * TILE // plane // line * line), 256)
                group = max(group, -(-c // ((4 * c + 3 * group) // (4 * group))))  # avoids a small last group
                positions = plane if plane * group <= 2 * TILE else max(TILE // group, 1)
            else:
                self.streams = length >= LONG_RUN and n * c * plane * itemsize >= STREAM
            tile_length = -(-length // -(-length // positions))  # even, so that the last one is not too short
            tile_runs = min(max(positions // length, 1), runs)
            grid = [(runs, tile_runs), (length, tile_length)]
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
        widest = LINE // ELEMENTS[dtype.name].computing_size
        self.lanes = 1 << (min(shortest, widest).bit_length() - 1)
        one_piece = (self.windows is not None and self.tiles == 1) or (rows and runs == 1)
        self.short_forward, self.short_backward = (
            one_piece and plane <= most for most in (FORWARD_SHORT, BACKWARD_SHORT)
        )
        numbers = {
            "channels": c, "group": group, "tiles": self.tiles, "runs": runs, "length": length,
            "tile_runs": tile_runs, "tile_length": tile_length, "plane": plane, "sums": sums,
            "run_table": table.ctypes.data, "counts": self.counts.ctypes.data,
        }  # fmt: skip
        axes = [each[i] for each in steps for i in (0, 1, -1)]
        self.geometry = np.array([*(numbers[name] for name in GEOMETRY if name in numbers), *axes], np.int64)
        self.geometry_address = self.geometry.ctypes.data
        self.pays = n * c * (plane + PLANE_COSTS) >= PAYS


@lru_cache(maxsize=1024)
def _layout(*given: Any) -> Layout | None:
    """Return a layout, or None if its table is too large for this cache."""
    layout = Layout(*given)
    return layout if not layout.usable or layout.runs.shape[1] <= SMALL_TABLE else None


_large_layout = lru_cache(maxsize=4)(Layout)


def layout_of(*given: Any) -> Layout:
    return _layout(*given) or _large_layout(*given)


class Steps(NamedTuple):
    """Addresses of a pass's compiled steps; apply and short may be 0, where only sums are wanted."""

    reduce: int
    join: int
    apply: int = 0
    short: int = 0


def kind_of(x: np.ndarray, layout: Layout, activation: str | None, residual: bool, training: bool = False) -> Kind:
    return Kind(x.dtype.name, layout.lanes, layout.channels_last, activation, residual, training)


#: The modules of a pass: the steps reduce and join, the step apply, and the step short.
FORWARD = "statistics", "results", "short_forward"
BACKWARD = "gradient_sums", "gradients", "short_backward"
_WRITERS: dict[str, tuple[Callable[[Module, Kind], None], tuple[str, ...]]] = {
    "statistics": (statistics, ("reduce", "join")),
    "results": (results, ("apply",)),
    "short_forward": (short_forward, ("short",)),
    "gradient_sums": (gradient_sums, ("reduce", "join")),
    "gradients": (gradients, ("apply",)),
    "short_backward": (short_backward, ("short",)),
}


@cache
def module_of(name: str, kind: Kind) -> tuple[int, ...]:
    """Return the addresses of a module's steps, compiled for a kind of call."""
    if name == "statistics":  # what makes no difference there
        kind = kind._replace(activation=None, residual=False, training=False)
    elif name == "gradient_sums":
        kind = kind._replace(training=True)
    write, names = _WRITERS[name]
    return llvm_machine.compiled(f"{name} {' '.join(map(str, kind))}", lambda module: write(module, kind), names)


@cache
def steps_of(
    modules: tuple[str, ...], kind: Kind, *, sums: bool = True, apply: bool = True, short: bool = False
) -> Steps:
    """Return those steps of a pass (FORWARD or BACKWARD) that are wanted."""
    wanted = (sums, 2), (apply, 1), (short, 1)
    found = [module_of(name, kind) if want else (0,) * size for name, (want, size) in zip(modules, wanted, strict=True)]
    return Steps(*(address for addresses in found for address in addresses))


@cache
def _function_of(address: int) -> Callable[..., None]:
    return llvm_machine.Step(address)


class Task(NamedTuple):
    """A step of a call: its address, the call's numbers, how many of the arrays it reads, and whether it writes."""

    address: int
    numbers: bytes
    reads: int = len(Arrays._fields)
    writes: bool = True


@cache
def no_parameters(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight and the bias of calls without them."""
    return np.ones(1, dtype), np.zeros(1, dtype)


class CompiledWork(Work):
    """The steps as compiled loops over planes, or over groups of channels side by side."""

    def __init__(self, call: Saved, layout: Layout, addresses: list[int]):
        self.call, self.layout, self.addresses = call, layout, addresses
        self.blocks, self.tiles = layout.blocks, layout.tiles
        self.threads = get_num_threads() if layout.pays else 1
        self.dtype = call.rstd.dtype
        self.partials = np.empty((3, self.blocks * self.tiles * layout.group))

    def _by_tile(self) -> np.ndarray:
        """Return the partial sums as (3, tiles, N, C)."""
        n, c = self.call.x.shape[:2]
        by_group = self.partials.reshape(3, n, -1, self.tiles, self.layout.group)
        return by_group.transpose(0, 3, 1, 2, 4).reshape(3, self.tiles, n, -1)[..., :c]

    def _kind(self, training: bool = False) -> Kind:
        call = self.call
        return kind_of(call.x, self.layout, call.activation, call.residual is not None, training)

    def _parameter(self, given: np.ndarray | None, default: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Return weight or bias in computing precision, contiguous, and its strides over samples and channels."""
        if given is None:
            return default, (0, 0)
        array = np.ascontiguousarray(given, self.dtype)
        return array, ((0, 1) if array.ndim == 1 else (given.shape[1], 1))

    def _numbers(self, steps: Steps, whole: int = 0, **further: Any) -> bytes:
        """Return the numbers of the call for the loops; further: those that only some calls have."""
        call, defaults = self.call, no_parameters(self.dtype)
        weight, of_weight = self._parameter(call.weight, defaults[0])
        bias, of_bias = self._parameter(call.bias, defaults[1])
        mean_lo = np.zeros_like(call.mean) if call.mean_lo is None else call.mean_lo
        self.kept = weight, bias, mean_lo  # while the loops use their addresses
        numbers = {
            **dict.fromkeys(CALL, 0), "geometry": self.layout.geometry_address,
            **dict(zip(("x", "result", "dy", "residual", "dresidual"), self.addresses, strict=True)),
            "weight": address_of(weight), "weight_n": of_weight[0], "weight_c": of_weight[1],
            "bias": address_of(bias), "bias_n": of_bias[0], "bias_c": of_bias[1],
            "mean": address_of(call.mean), "mean_lo": address_of(mean_lo), "rstd": address_of(call.rstd),
            "partials": address_of(self.partials), "spread": self.partials.size // 3,
            "streams": self.layout.streams and self.addresses[1] not in (self.addresses[0], *self.addresses[2:4]),
            "slope": call.negative_slope, "whole": whole,
            **steps._asdict(), **further,
        }  # fmt: skip
        numbers.pop("short")
        return FORMAT.pack(*numbers.values())

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

    def __str__(self) -> str:
        if self.layout.channels_last:
            return f"compiled loops over {self.blocks} group(s) of {self.layout.group} channels side by side"
        return f"compiled loops over {self.blocks} plane(s)"

    def _pass(self, steps: Steps, reads: int, **further: Any) -> None:
        """Do the steps of a pass; reads: how many arrays the step reduce reads."""
        whole = driver().whole_address
        numbers = self._numbers(steps, whole, **further)
        self.run(
            Task(steps.reduce, numbers, reads, False), self._join(steps, numbers), Task(steps.apply, numbers),
            Task(steps.short or whole, numbers),
        )  # fmt: skip

    def _join(self, steps: Steps, numbers: bytes) -> Callable[[int, int], None]:
        join = _function_of(steps.join)
        return lambda first, last: join(numbers, first, last, 0)

    # Forward

    def forward(self, eps: float, variance: np.ndarray | None) -> None:
        steps = steps_of(FORWARD, self._kind(), short=self.layout.short_forward)
        address = 0 if variance is None else address_of(variance)
        self._pass(steps, 1, eps=eps, least=least_mean_square(eps), variance=address)

    def moments(self) -> tuple[np.ndarray, ...]:
        """Return count, mean, mean_lo and m2 of each tile, (tiles, N, C)."""
        steps = steps_of(FORWARD, self._kind(), apply=False)
        numbers = self._numbers(steps, least=least_mean_square(0))
        self.share(Task(steps.reduce, numbers, 1, False), self.blocks * self.tiles)
        means, means_lo, m2s = self._by_tile()
        counts = np.broadcast_to(self.layout.counts[:, None, None], means.shape)
        return counts, means, means_lo, np.maximum(m2s, 0)  # NaN stays

    def normalize(self) -> None:
        steps = steps_of(FORWARD, self._kind(), sums=False)
        self.share(Task(steps.apply, self._numbers(steps)), self.blocks * self.tiles)

    # Backward

    def backward(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        steps = steps_of(BACKWARD, self._kind(self.call.training), short=self.layout.short_backward)
        self._pass(steps, len(Arrays._fields), sum_g=address_of(sum_g), sum_g_xhat=address_of(sum_g_xhat))

    def gradient_sums(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        steps = steps_of(BACKWARD, self._kind(self.call.training), apply=False)
        numbers = self._numbers(steps, sum_g=address_of(sum_g), sum_g_xhat=address_of(sum_g_xhat), wide=1)
        self.sum_up(Task(steps.reduce, numbers, writes=False), self._join(steps, numbers))

    def input_gradient(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        steps = steps_of(BACKWARD, self._kind(self.call.training), sums=False)
        numbers = self._numbers(steps, sum_g=address_of(sum_g), sum_g_xhat=address_of(sum_g_xhat))
        self.share(Task(steps.apply, numbers), self.blocks * self.tiles)


class MovedWork(CompiledWork):
    """Planes are copied to windows for the loops, and results back, a window at a time.

    In a window planes keep their numbers: the loops get addresses as if all other planes lay around them. Planes too
    large for a window are summed tile by tile first.
    """

    def __str__(self) -> str:
        return f"{super().__str__()}, moved together first"

    def _by_tile(self) -> np.ndarray:
        return self.partials.reshape(3, self.tiles, *self.call.x.shape[:2])

    def sum_up(self, reduce: Any, join: Callable[..., None]) -> None:
        self.share(reduce, self.blocks * self.tiles)
        # From all planes' sums of each tile to all tiles' sums of each plane, which `join` expects.
        self.partials[...] = self.partials.reshape(3, self.tiles, -1).transpose(0, 2, 1).reshape(3, -1)
        join(0, self.blocks)

    def run(self, reduce: Any, join: Callable[..., None], apply: Any, whole: Any) -> None:
        if self.tiles == 1:
            self.share(whole, self.blocks)
            return
        self.sum_up(reduce, join)
        self.share(apply, self.blocks * self.tiles)

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
    x = arrays.x
    layout = layout_of(x.dtype, x.shape, tuple([None if a is None else a.strides for a in arrays]))
    if not layout.usable:
        return None
    address = address_of(x)
    addresses = [address if a is None or a is x else address_of(a) for a in arrays]
    if reduce(operator.or_, addresses) % x.itemsize:
        return None
    return (MovedWork if layout.windows else CompiledWork)(call, layout, addresses)
