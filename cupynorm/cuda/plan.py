"""Plans: which kernels to launch for a call, as pure data.

A plan follows from shape, strides, dtype and the device's properties alone; this module imports neither CuPy nor
NumPy, so it can be asked about any device on any machine. The kernels' own account of owners, stripes and tiles is
in kernels/plane.cuh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

Kind = Literal["channels_first", "channels_last"]
Op = Literal["forward", "backward", "evaluate", "eval_gradient"]

STRIPE_BYTES = 64  # channels-last: neighbouring channels that one owner serves
MAX_GRID = 2**31 - 1
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def widest(dtype: str, kind: Kind) -> int:
    """Elements of a thread's widest access: 16 bytes; channels-last at most 4, since each is another plane's."""
    v = 16 // ITEMSIZE[dtype]
    return v if kind == "channels_first" else min(v, 4)


def resident_threads(file: str, dtype: str, kind: Kind) -> int:
    """Threads that must fit on a multiprocessor: a limit of 65536 / this registers for a kernel's threads."""
    light = file == "forward" and dtype != "float64" and kind == "channels_first"
    return 1024 if light else 512


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU. Sizes in bytes."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_per_block: int  # the opt-in limit
    l2_bytes: int


def _known(name: str, capability: tuple[int, int], sm_count: int, shared_kib: int, l2_mib: float) -> Device:
    return Device(name, capability, sm_count, shared_kib * 1024, int(l2_mib * 2**20))


#: Devices that can be planned for without being there, by name.
DEVICES = {
    d.name: d
    for d in (
        _known("T4", (7, 5), 40, 64, 4),
        _known("V100", (7, 0), 80, 96, 6),
        _known("A100", (8, 0), 108, 163, 40),
        _known("L4", (8, 9), 58, 99, 48),
        _known("H100", (9, 0), 132, 227, 50),
        _known("H200", (9, 0), 132, 227, 60),
        _known("B200", (10, 0), 148, 227, 126),
        _known("RTX 5090", (12, 0), 170, 99, 96),
    )
}


@dataclass(frozen=True)
class Rung:
    """One step of a ladder: an owner, where its tile rests, threads of a block, packs a thread holds (registers)."""

    owner: Literal["warp", "block"]
    rest: Literal["registers", "shared"]
    threads: int
    chunks: int  # 0: as many as the plane needs

    @property
    def name(self) -> str:
        return f"{self.owner}_{self.rest}_{self.threads}x{self.chunks}"

    @property
    def size(self) -> int:
        """Threads of one owner."""
        return 32 if self.owner == "warp" else self.threads


def _warp(*chunks: int) -> tuple[Rung, ...]:
    return tuple(Rung("warp", "registers", 128, k) for k in chunks)


_SHARED = Rung("block", "shared", 512, 0)

#: The ladders, smallest plane first. With 16-byte packs a warp holds 512 bytes a chunk, 256 threads 4 KB.
LADDERS: dict[str, tuple[Rung, ...]] = {
    "forward": (
        *_warp(1, 2, 4, 8),
        Rung("block", "registers", 256, 2),
        Rung("block", "registers", 256, 4),
        Rung("block", "registers", 256, 8),
        Rung("block", "registers", 512, 8),
        _SHARED,
    ),
    "backward": (  # x and dy are both held: half as much of each
        *_warp(1, 2, 4),
        Rung("block", "registers", 256, 1),
        Rung("block", "registers", 256, 2),
        Rung("block", "registers", 256, 4),
        Rung("block", "registers", 512, 4),
        _SHARED,
    ),
    "split": (Rung("block", "registers", 256, 4),),
    "evaluate": (*_warp(1, 4), Rung("block", "registers", 256, 4)),
    "channels": (),
}


class Memory(NamedTuple):
    """How an array of (N, C, *spatial) lies in memory. strides in bytes; phase is the address modulo 16."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    phase: int


class Layout(NamedTuple):
    """A Memory as the kernels see it: strides in elements; phase is the address in elements modulo 16 bytes."""

    n: int
    c: int
    s: int
    phase: int


def _collapse(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that walks through all spatial positions in order, or None."""
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    if not dims:
        return 1
    for (_, outer), (size, inner) in pairwise(dims):
        if outer != inner * size:
            return None
    return dims[-1][1]


def layout(memory: Memory, kind: Kind) -> Layout | None:
    """How the kernels of a kind can read an array in place, or None if they cannot.

    Channels-first wants a plane in one piece, channels-last neighbouring channels side by side; the strides of N and C
    (of N and the spatial positions) are free.
    """
    shape, strides, itemsize, phase = memory
    if phase % itemsize or any(stride % itemsize for stride in strides):
        return None
    n, c, *spatial = (stride // itemsize for stride in strides)
    s = _collapse(shape[2:], spatial)
    if s is None:
        return None
    if kind == "channels_first":
        fits = s == 1
        s = 1
    else:
        fits = c == 1 or shape[1] == 1
        c = 1
    return Layout(n, c, s, phase // itemsize) if fits else None


def fresh(shape: tuple[int, ...], itemsize: int, kind: Kind) -> Memory:
    """A newly allocated array."""
    n, c, *spatial = shape
    order = (n, c, *spatial) if kind == "channels_first" else (n, *spatial, c)
    strides = [itemsize]
    for size in order[:0:-1]:
        strides.insert(0, strides[0] * size)
    if kind == "channels_last":
        strides = [strides[0], strides[-1], *strides[1:-1]]
    return Memory(shape, tuple(strides), itemsize, 0)


@lru_cache(maxsize=4096)
def arrange(memories: tuple[Memory, ...]) -> tuple[Kind, tuple[Layout, ...], tuple[bool, ...]]:
    """The kind of kernels for the arrays of a call, their layouts, and which of them must be copied for that.

    The first array decides, if it can be read in place at all; of two kinds it could be, the one more others are.
    """
    shape, itemsize = memories[0].shape, memories[0].itemsize
    # A plane of one element is no plane: its channels are what lies together.
    kinds: tuple[Kind, Kind] = ("channels_first", "channels_last")
    preferred = kinds[::-1] if prod(shape[2:]) == 1 else kinds
    fitting = {kind: [layout(memory, kind) for memory in memories] for kind in preferred}
    possible = [kind for kind in preferred if fitting[kind][0]]
    kind = max(possible, key=lambda k: sum(x is not None for x in fitting[k])) if possible else "channels_first"
    copy = layout(fresh(shape, itemsize, kind), kind)
    assert copy is not None
    return kind, tuple(x or copy for x in fitting[kind]), tuple(x is None for x in fitting[kind])


@dataclass(frozen=True)
class Step:
    """One launch: kernel `name` of source file `module`, and the numbers its arguments need."""

    module: str
    name: str
    grid: tuple[int, int]
    threads: int
    shared: int  # bytes of dynamic shared memory
    owners: int = 0
    tiles: int = 1
    chunks: int = 0


@dataclass(frozen=True)
class Plan:
    """What a call will do. accesses: storage-sized reads and writes of global memory per element."""

    op: Op
    regime: str
    reason: str
    dtype: str
    kind: Kind
    vector: int  # elements of one access
    lanes: int  # accesses side by side in a row (channels-last)
    stripes: int
    accesses: int
    steps: tuple[Step, ...]

    @property
    def bytes_per_element(self) -> int:
        return self.accesses * ITEMSIZE[self.dtype]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def grid_of(blocks: int) -> tuple[int, int]:
    """A grid of at least `blocks`; the second dimension carries what the first cannot."""
    x = min(blocks, MAX_GRID)
    return x, _ceil(blocks, x)


class _Job:
    """The quantities every rung is judged by."""

    def __init__(self, shape: tuple[int, int, int], dtype: str, kind: Kind, layouts: tuple[Layout, ...]):
        self.n, self.c, self.s = shape
        self.itemsize = ITEMSIZE[dtype]
        self.math_bytes = 8 if dtype == "float64" else 4
        self.kind = kind
        v = widest(dtype, kind)
        # Strides of axes that are never stepped along do not matter.
        n_steps = {x.n % v for x in layouts} if self.n > 1 else {0}
        if kind == "channels_first":
            c_steps = {x.c % v for x in layouts} if self.c > 1 else {0}
            phases = {x.phase % v for x in layouts}
            # Every array's planes must start at the same distance from an aligned address.
            self.vector = v if len(n_steps) == len(c_steps) == len(phases) == 1 else 1
            aligned = phases | n_steps | c_steps == {0}
            self.shift = 0 if aligned or self.vector == 1 else v - 1
            self.lanes = 1
            self.stripes = self.n * self.c
            self.packs = _ceil(self.s + self.shift, self.vector)
        else:
            s_steps = {x.s % v for x in layouts} if self.s > 1 else {0}
            whole = self.c % v == 0 and {x.phase % v for x in layouts} | n_steps | s_steps == {0}
            self.vector = v if whole else 1
            self.shift = 0
            most = min(32, STRIPE_BYTES // (self.vector * self.itemsize))
            self.lanes = min(most, _pow2(_ceil(self.c, self.vector)))
            self.stripes = self.n * _ceil(self.c, self.lanes * self.vector)
            self.packs = self.s * self.lanes
        self.planes_per_thread = 1 if kind == "channels_first" else self.vector

    def chunks(self, rung: Rung) -> int:
        """Packs that each thread of the owner must hold to hold its planes."""
        return _ceil(self.packs, rung.size)

    def scratch(self, rung: Rung, quantities: int, areas: int) -> int:
        """Shared bytes of exchanges within a block (sums.cuh)."""
        if rung.owner == "warp":
            return 0
        return areas * rung.threads // 32 * self.lanes * quantities * self.planes_per_thread * self.math_bytes

    def step(self, module: str, prefix: str, rung: Rung, shared: int, tiles: int = 1, chunks: int = 0) -> Step:
        owners = self.stripes * tiles
        blocks = _ceil(owners * rung.size, rung.threads)
        name = f"{prefix}_{rung.name}"
        return Step(module, name, grid_of(blocks), rung.threads, shared, owners, tiles, chunks)

    def merge(self, name: str, bytes_per_thread: int) -> Step:
        planes = self.n * self.c
        return Step("split", name, grid_of(planes), 256, 256 * bytes_per_thread)

    def channels(self, name: str) -> Step:
        return Step("channels", name, (_ceil(self.c, 32), 1), 256, 2 * 256 * 8)

    def pointwise(self, prefix: str, quantities: int) -> Step:
        for rung in LADDERS["evaluate"]:
            if self.chunks(rung) <= rung.chunks:
                break
        return self.step("evaluate", prefix, rung, self.scratch(rung, quantities, 1),
                         _ceil(self.chunks(rung), rung.chunks))  # fmt: skip


@lru_cache(maxsize=4096)
def plan(
    op: Op,
    shape: tuple[int, int, int],
    dtype: str,
    kind: Kind,
    layouts: tuple[Layout, ...],
    device: Device,
    sums: bool = True,
) -> Plan:
    """Plan a call on arrays of (N, C, S), none of them 0, in the layouts given (one for each array, x first).

    forward and backward use the statistics of the input; evaluate and eval_gradient those given (tracked eval).
    sums: whether a backward call also needs the affine gradients' sums.
    """
    job = _Job(shape, dtype, kind, layouts)

    def made(regime: str, reason: str, accesses: int, *steps: Step) -> Plan:
        return Plan(op, regime, reason, dtype, kind, job.vector, job.lanes, job.stripes, accesses, steps)

    if op == "evaluate":
        return made("pointwise", "statistics are given", 2, job.pointwise("evaluate", 0))
    if op == "eval_gradient":
        step = job.pointwise("eval_gradient", 2)
        merge = (job.merge("merge_gradient", 24),) if sums and step.tiles > 1 else ()
        return made("pointwise", "statistics are given", 3 if sums else 2, step, *merge,
                    *((job.channels("parameter_gradients"),) if sums else ()))  # fmt: skip

    arrays, quantities, areas = (1, 1, 2) if op == "forward" else (2, 3, 1)
    after = (job.channels("running_statistics" if op == "forward" else "parameter_gradients"),) if sums else ()
    few = job.stripes < 2 * device.sm_count
    share = "plane" if kind == "channels_first" else f"stripe of {job.lanes * job.vector} channels"
    held = f"{job.packs * job.vector * job.itemsize * arrays} B of one {share}"
    for rung in LADDERS[op]:
        # A warp that holds its plane in one pack a thread gains nothing from company.
        if few and rung.owner == "warp" and job.packs > 32:
            continue
        chunks = job.chunks(rung)
        if rung.rest == "registers":
            if chunks <= rung.chunks:
                why = f"{held} rest in {rung.chunks * arrays} packs of {rung.size} threads"
                step = job.step(op, op, rung, job.scratch(rung, quantities, areas), chunks=rung.chunks)
                return made(f"{rung.owner}-registers", why, 1 + arrays, step, *after)
            continue
        tile = chunks * rung.threads * job.vector * job.itemsize * arrays
        shared = tile + job.scratch(rung, quantities, areas)
        if shared > device.shared_per_block:
            why = f"{held} exceed the {device.shared_per_block} B of shared memory of a block"
        elif 2 * job.stripes <= device.sm_count:
            why = f"{held} would leave most of {device.sm_count} multiprocessors idle"
        else:
            why = f"{held} rest in {tile} B of shared memory"
            return made("block-shared", why, 1 + arrays, job.step(op, op, rung, shared, chunks=chunks), *after)

    rung = LADDERS["split"][0]
    tiles = _ceil(job.chunks(rung), rung.chunks)
    why += f", so it is split into {tiles} tiles"
    if op == "forward":
        return made("split", why, 3,
                    job.step("split", "moments", rung, job.scratch(rung, 1, 2), tiles),
                    job.merge("merge_moments", 24),
                    job.step("split", "apply", rung, 0, tiles), *after)  # fmt: skip
    return made("split", why, 5,
                job.step("split", "gradient", rung, job.scratch(rung, 3, 1), tiles),
                job.merge("merge_gradient", 24),
                job.step("split", "apply_gradient", rung, 0, tiles), *after)  # fmt: skip
