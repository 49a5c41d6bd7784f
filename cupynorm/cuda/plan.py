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

from .variants import FORCED, ITEMSIZE, Kind, Rung, exists, group_of, ladder, resident_threads, widest

Op = Literal["forward", "backward", "evaluate", "eval_gradient", "double_backward", "eval_double"]

PART_BYTES, PART_ELEMENTS = 512, 128  # the largest plane of a part of a warp
TILE_BYTES = 8192  # the smallest tile worth a block of a grid
STRIPE_BYTES = 64  # channels-last: neighbouring channels that one owner serves
FEW_THREADS = 128  # of a multiprocessor: below them narrow blocks give way to wider ones
MAX_GRID = 2**31 - 16  # the most there may be that is whole clusters, of any size


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU. Sizes in bytes."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_per_block: int  # the opt-in limit
    l2_bytes: int
    cluster: int = 1  # most blocks of a cluster

    def __hash__(self) -> int:  # of every call's key: must be quick
        return hash(self.name)


def _known(
    name: str, capability: tuple[int, int], sm_count: int, shared_kib: int, l2_mib: float, cluster: int = 1
) -> Device:
    return Device(name, capability, sm_count, shared_kib * 1024, int(l2_mib * 2**20), cluster)


#: Devices that can be planned for without being there, by name.
DEVICES = {
    d.name: d
    for d in (
        _known("T4", (7, 5), 40, 64, 4),
        _known("V100", (7, 0), 80, 96, 6),
        _known("A100", (8, 0), 108, 163, 40),
        _known("L4", (8, 9), 58, 99, 48),
        _known("H100", (9, 0), 132, 227, 50, 16),
        _known("H200", (9, 0), 132, 227, 60, 16),
        _known("B200", (10, 0), 148, 227, 126, 16),
        _known("RTX 5090", (12, 0), 170, 99, 96, 8),
    )
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


def _dense(x: Layout, n: int, c: int, s: int) -> bool:
    """Whether planes lie one behind the other."""
    return (c == 1 or x.c == s) and (n == 1 or x.n == c * s)


def _at_packs(x: Layout, n: int, s: int, v: int) -> bool:
    """Whether packs of v channels begin at multiples of their size. Strides never stepped along do not matter."""
    return not (x.phase % v or (n > 1 and x.n % v) or (s > 1 and x.s % v))


def _usual(x: Layout, shape: tuple[int, ...], itemsize: int, kind: Kind) -> bool:
    """Whether an array is dealt out to threads as a new one of its kind is: else bits would depend on its strides."""
    n, c, s = *shape[:2], prod(shape[2:])
    if kind == "channels_first":
        return s * itemsize > PART_BYTES or _dense(x, n, c, s)
    v = widest(itemsize, kind)
    return c % v > 0 or _at_packs(x, n, s, v)


@lru_cache(maxsize=4096)
def arrange(memories: tuple[Memory, ...], invariant: bool = False) -> tuple[Kind, tuple[Layout, ...], tuple[bool, ...]]:
    """The kind of kernels for the arrays of a call, their layouts, and which of them must be copied for that.

    The first array decides, if it can be read in place at all; of two kinds it could be, the one more others are.
    invariant: whether the order of additions may depend on the kind alone.
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
    layouts = [x if x and not (invariant and not _usual(x, shape, itemsize, kind)) else None for x in fitting[kind]]
    return kind, tuple(x or copy for x in layouts), tuple(x is None for x in layouts)


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
    lanes: int = 1  # 0: channels-first, packs that begin where planes do (kernels/plane.cuh)
    group: str = ""  # of the rung
    cluster: int = 1
    cooperative: bool = False  # all blocks resident at once
    plain: bool = False  # without the call's epilogue


@dataclass(frozen=True)
class Plan:
    """What a call will do. accesses: storage-sized reads and writes of global memory per element."""

    op: Op
    regime: str
    reason: str
    dtype: str
    kind: Kind
    epilogue: int
    vector: int  # elements of one access
    skewed: bool  # arrays are read that lie otherwise between 16-byte borders than what is written
    stripes: int
    accesses: int
    steps: tuple[Step, ...]
    at_a_time: int = 0  # stripes that a split goes through at a time: what L2 holds of them is not read again

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

    def __init__(
        self,
        op: Op,
        shape: tuple[int, int, int],
        dtype: str,
        kind: Kind,
        layouts: tuple[Layout, ...],
        device: Device,
        epilogue: int = 0,
        invariant: bool = False,
    ):
        self.op, self.device = op, device
        self.dtype, self.epilogue = dtype, epilogue
        self.n, self.c, self.s = shape
        self.itemsize = ITEMSIZE[dtype]
        self.math_bytes = 8 if dtype == "float64" else 4
        self.kind, self.layouts = kind, layouts
        # What an owner holds, and exchanges for each plane: how many sums at once, in how many areas that take turns.
        # Blocks of a group then exchange sums of Accum, and each publishes some numbers of its tile.
        self.arrays, self.quantities, self.areas = 2, 3, 1
        self.accums, self.published = 3, 3
        if op == "forward":
            self.arrays, self.quantities, self.areas = 1, 2, 2
            self.accums, self.published = 2, 4
        elif op == "double_backward":
            self.arrays, self.quantities = 3, 2 + 6
            self.accums, self.published = 6, 9
        v = widest(self.itemsize, kind)
        if kind == "channels_first":
            # Strides never stepped along do not matter; but one sample may have to be treated like more.
            n_steps = {x.n % v for x in layouts} if self.n > 1 or invariant else {0}
            c_steps = {x.c % v for x in layouts} if self.c > 1 else {0}
            phases = {x.phase % v for x in layouts}
            # Whether every array's planes start at the same distance from an aligned address, and whether that is 0.
            self.vector = v
            self.skewed = not len(n_steps) == len(c_steps) == len(phases) == 1
            self.shift = 0 if phases | n_steps | c_steps == {0} else v - 1
            self.at_planes = invariant and self.shift > 0
            if self.at_planes:
                self.skewed, self.shift = True, 0
            self.lanes = 1
            self.stripes = self.n * self.c
            self.packs = _ceil(self.s + self.shift, self.vector)
        else:
            self.skewed = self.at_planes = False
            whole = self.c % v == 0 and all(_at_packs(x, self.n, self.s, v) for x in layouts)
            self.vector = v if whole else 1
            self.shift = 0
            most = min(32, STRIPE_BYTES // (self.vector * self.itemsize))
            self.lanes = min(most, _pow2(_ceil(self.c, self.vector)))
            self.stripes = self.n * _ceil(self.c, self.lanes * self.vector)
            self.packs = self.s * self.lanes
        self.company = self.stripes // self.n if invariant else self.stripes  # that choose an owner together
        self.planes_per_thread = 1 if kind == "channels_first" else self.vector
        self.pack_bytes = self.vector * self.itemsize
        self.bytes = self.packs * self.pack_bytes * self.arrays
        share = "plane" if kind == "channels_first" else f"stripe of {self.lanes * self.vector} channels"
        self.held = f"{self.bytes} B of one {share}"

    def chunks(self, rung: Rung, tiles: int = 1) -> int:
        """Packs that each thread of the owner must hold to hold its tile."""
        return _ceil(self.packs, rung.size * tiles)

    def scratch(self, rung: Rung, quantities: int, areas: int) -> int:
        """Shared bytes of exchanges within a block (sums.cuh)."""
        if rung.size == 32:
            return 0
        return areas * rung.threads // 32 * self.lanes * quantities * self.planes_per_thread * self.math_bytes

    def exchange(self, rung: Rung) -> int:
        """Shared bytes of the exchanges of a pass."""
        return self.scratch(rung, self.quantities, self.areas)

    def shared(self, rung: Rung, tiles: int) -> int:
        """Shared bytes of a block whose tile rests there."""
        tile = self.chunks(rung, tiles) * rung.threads * self.pack_bytes * self.arrays * (rung.rest == "shared")
        if rung.owner == "block":
            return tile + self.exchange(rung)
        # Two areas for sums of Accum, and what a cluster's block publishes (group.cuh). (double_backward.cu has more
        # sums within a block, and not their room twice.)
        per_lane = self.lanes * self.planes_per_thread
        sums = rung.threads // 32 * per_lane * self.accums * 8
        sums += self.exchange(rung) if self.op == "double_backward" else sums
        return tile + sums + per_lane * self.published * self.math_bytes

    def parts(self, rung: Rung) -> int:
        """Threads of a part of a warp that serve one plane."""
        return _pow2(_ceil(self.s, rung.chunks))

    def dense(self) -> bool:
        """Whether the planes of every array lie one behind the other."""
        return self.kind == "channels_first" and all(_dense(x, self.n, self.c, self.s) for x in self.layouts)

    def step(
        self,
        module: str,
        prefix: str,
        rung: Rung,
        shared: int,
        tiles: int = 1,
        *,
        chunks: int = 0,
        stripes: int | None = None,
        plain: bool = False,
    ) -> Step:
        """A launch of owners, for all stripes or as many as are given."""
        owners = (stripes or self.stripes) * tiles
        blocks = _ceil(owners * rung.size, rung.threads)
        lanes = 0 if self.at_planes else self.lanes
        if rung.owner == "part":
            lanes = self.parts(rung)
            blocks = _ceil(owners * lanes, rung.threads)
        elif rung.owner == "grid":
            blocks = min(self.stripes, self.slots(rung) // tiles) * tiles
        grid, name = grid_of(blocks), f"{prefix}_{rung.name}"
        return Step(module, name, grid, rung.threads, shared, owners, tiles, chunks, lanes,
                    group_of(rung, module), rung.cluster, rung.owner == "grid", plain)  # fmt: skip

    def resident(self, rung: Rung) -> int:
        """Blocks of a rung for which a multiprocessor has registers."""
        threads = resident_threads(rung, self.op, self.dtype, self.kind, self.epilogue, self.skewed)
        return threads // rung.threads

    def slots(self, rung: Rung) -> int:
        """Blocks that the device holds at once: a block that fills shared memory has a multiprocessor to itself."""
        return self.device.sm_count * (self.resident(rung) if rung.rest == "registers" else 1)

    def fits(self, rung: Rung, tiles: int) -> bool:
        """Whether a block of a group has room for its tile."""
        if rung.rest == "registers":
            return self.chunks(rung, tiles) <= rung.chunks
        return self.shared(rung, tiles) <= self.device.shared_per_block

    def merge(self, name: str, planes: int, file: str = "split", shared: int = 256 * 24) -> Step:
        """shared: three Accums a thread (split.cu)."""
        return Step(file, name, grid_of(planes), 256, shared, plain=True)

    def channels(self, name: str) -> Step:
        return Step("channels", name, (_ceil(self.c, 32), 1), 256, 2 * 256 * 8)

    def pointwise(self, prefix: str, quantities: int, file: str = "evaluate") -> Step:
        for rung in ladder(file):
            if self.chunks(rung) <= rung.chunks:
                break
        return self.step(file, prefix, rung, self.scratch(rung, quantities, 1),
                         _ceil(self.chunks(rung), rung.chunks))  # fmt: skip

    def suits(self, rung: Rung, rooms: int) -> tuple[Step | None, str]:
        """The launch, if a rung suits, and why or why not. rooms: arrays that a staged chunk has room for."""
        busy = self.device.sm_count
        op = self.op
        choosing = op not in FORCED  # a forced rung is taken wherever it fits
        if rung.owner == "part":
            large = choosing and (self.s > PART_ELEMENTS or self.s * self.itemsize > PART_BYTES)
            if not self.dense() or large or self.s > 32 * rung.chunks:
                return None, "planes are too large, or not one behind the other"
            # With 16 elements a thread has fewer instructions for each; but planes of 16 floats lie in few banks.
            if choosing and op == "forward" and (rung.chunks == 8) != (self.s < 32 and self.itemsize > 2):
                return None, f"another number of elements a thread is quicker than {rung.chunks}"
            most, w = 32 // self.parts(rung), 16 // self.itemsize
            room = (most * self.s + 2 * w - 2) // w * 16
            shared = rung.threads // 32 * rooms * room
            if shared > self.device.shared_per_block:
                return None, f"staged planes exceed the {self.device.shared_per_block} B of shared memory"
            why = f"{most} planes a warp, staged so that 16 B move at a time; {self.parts(rung)} threads a plane"
            return self.step(op, op, rung, shared, chunks=rung.chunks), why
        if choosing and not exists(rung, op, self.dtype, self.kind, self.epilogue, self.skewed):
            return None, f"no such kernel has registers for {rung.chunks} packs of each array"
        if rung.rest == "registers" and not rung.grouped:
            # A warp that holds its plane in one pack a thread gains nothing from company.
            if choosing and rung.owner == "warp" and self.packs > 32 and self.company < 2 * busy:
                return None, f"{self.company} owners would leave multiprocessors idle"
            narrow = rung.owner == "block" and rung.threads < 256
            if choosing and narrow and self.company * rung.threads < FEW_THREADS * busy:
                return None, f"{self.company} owners of {rung.threads} threads would leave multiprocessors half empty"
            if self.chunks(rung) > rung.chunks:
                return None, f"{self.held} are too many for the registers"
            shared = self.exchange(rung)
            why = f"{self.held} rest in {rung.chunks * self.arrays} packs of {rung.size} threads"
            return self.step(op, op, rung, shared, chunks=rung.chunks), why
        # In shared memory, while a larger owner is to be had and registers allow it, two blocks share a multiprocessor:
        # one computes while the other moves its tile.
        whole, half = self.device.shared_per_block, (self.device.shared_per_block + 1024) // 2 - 1024
        tiles = rung.cluster
        if rung.owner == "grid":
            slots = self.slots(rung)
            if busy < 2 or not self.fits(rung, slots):
                where = "registers" if rung.rest == "registers" else "shared memory"
                return None, f"{self.held} exceed the {where} of all multiprocessors"
            tiles = next(t for t in range(2, slots + 1) if self.fits(rung, t))
            groups = min(self.company, slots // tiles)
            groups = _ceil(self.company, _ceil(self.company, groups))  # as many rounds, the last one no emptier
            tiles = max(tiles, min(slots // groups, _ceil(self.bytes, TILE_BYTES)))
            tiles = _ceil(self.packs, self.chunks(rung, tiles) * rung.threads)
            return self.step(
                op, op, rung, self.shared(rung, tiles), tiles, chunks=self.chunks(rung, tiles)
            ), self.rests(rung, tiles)
        if tiles > self.device.cluster:
            return None, f"{self.held}: the device has no clusters of {tiles} blocks"
        shared = self.shared(rung, tiles)
        last = tiles == self.device.cluster or not choosing or self.resident(rung) < 2
        if rung.rest == "registers" and not self.fits(rung, tiles):
            return None, f"{self.held} are too many for the registers of {tiles} blocks"
        if shared > (whole if last else half):
            return None, f"{self.held} exceed the {whole if last else half} B of shared memory of {tiles} block(s)"
        if choosing and 2 * self.company * tiles <= busy:
            return None, f"{self.company} x {tiles} blocks would leave most of {busy} multiprocessors idle"
        return self.step(op, op, rung, shared, tiles, chunks=self.chunks(rung, tiles)), self.rests(rung, tiles)

    def rests(self, rung: Rung, tiles: int) -> str:
        """Where a tile stays between passes."""
        packs, shared = self.chunks(rung, tiles) * self.arrays, self.shared(rung, tiles)
        room = f"{packs} packs of {rung.size} threads" if rung.rest == "registers" else f"{shared} B of shared memory"
        return f"{self.held} rest in {room}" + (f" of each of {tiles} blocks" if tiles > 1 else "")


@lru_cache(maxsize=4096)
def plan(
    op: Op,
    shape: tuple[int, int, int],
    dtype: str,
    kind: Kind,
    layouts: tuple[Layout, ...],
    device: Device,
    sums: bool = True,
    reduced: bool = True,
    epilogue: int = 0,
    residual: bool = False,
    invariant: bool = False,
) -> Plan:
    """Plan a call on arrays of (N, C, S), none of them 0, in the layouts given (one for each array, x first).

    forward, backward and double_backward use the statistics of the input; evaluate, eval_gradient and eval_double those
    given (tracked eval). Of a double backward, layouts are those of x, dy, ddx if it is there, dx and ddy.
    sums: whether a backward call needs the affine gradients' sums, a forward call the update of running statistics;
    reduced: whether one of them is to be added up over N. epilogue: a value of EPILOGUES, or 0 for none (a backward
    without activation has none). residual: whether there is one, with an epilogue. invariant: whether the order of
    additions in a plane must depend neither on N nor on where the plane is.
    """
    job = _Job(op, shape, dtype, kind, layouts, device, epilogue, invariant)
    # The residual is read; backward reads it again for z, and writes its gradient.
    more = residual * (1 if op in ("forward", "evaluate") else 2)

    def made(regime: str, reason: str, accesses: int, *steps: Step, at_a_time: int = 0) -> Plan:
        return Plan(
            op,
            regime,
            reason,
            dtype,
            kind,
            epilogue,
            job.vector,
            job.skewed,
            job.stripes,
            accesses + more,
            steps,
            at_a_time,
        )

    if op == "evaluate":
        return made("pointwise", "statistics are given", 2, job.pointwise("evaluate", 0))
    last = "running_statistics" if op == "forward" else "parameter_gradients"
    after = (job.channels(last),) if sums and reduced else ()
    planes = job.n * job.c
    if op == "eval_gradient":
        step = job.pointwise("eval_gradient", 2)
        merge = (job.merge("merge_gradient", planes),) if sums and step.tiles > 1 else ()
        return made("pointwise", "statistics are given", 3 if sums or epilogue else 2, step, *merge, *after)
    if op == "eval_double":
        step = job.pointwise("eval_double", 1, "double_evaluate")
        merge = (job.merge("merge_dots", planes, "double_evaluate", 8 * 8),) if sums and step.tiles > 1 else ()
        return made("pointwise", "statistics are given", len(layouts), step, *merge, *after)

    why = "the split is forced"
    for rung in ladder(op):
        step_, why = job.suits(rung, job.arrays + more)
        if step_ is not None:
            accesses = len(layouts) if op == "double_backward" else 1 + job.arrays
            return made(f"{rung.owner}-{rung.rest}", why, accesses, step_, *after)

    file = "double_split" if op == "double_backward" else "split"
    facts = file, dtype, kind, epilogue, job.skewed
    rung = next(rung for rung in ladder(file) if file in FORCED or exists(rung, *facts))
    tiles = _ceil(job.chunks(rung), rung.chunks)
    # (The split's backward has written the gradient of a residual when it comes back, and reads it in the place of dy.)
    # Half of L2: what is written goes through it too.
    at_a_time = min(job.stripes, max(1, device.l2_bytes // 2 // job.bytes))
    some = at_a_time * job.lanes * job.planes_per_thread
    why += f", so it is split into {tiles} tiles, {at_a_time} at a time for the sake of L2"
    if op == "double_backward":
        return made(
            "split",
            why,
            2 * len(layouts) - 2,
            job.step(file, "products", rung, job.exchange(rung), tiles, stripes=at_a_time),
            job.merge("merge_products", some, file, 8 * job.accums * 8),
            job.step(file, "apply_products", rung, 0, tiles, stripes=at_a_time),
            *after,
            at_a_time=at_a_time,
        )
    partial, merged, apply = (
        ("moments", "merge_moments", "apply") if op == "forward" else ("gradient", "merge_gradient", "apply_gradient")
    )
    return made(
        "split",
        why,
        1 + 2 * job.arrays,
        job.step("split", partial, rung, job.exchange(rung), tiles, stripes=at_a_time, plain=op == "forward"),
        job.merge(merged, some),
        job.step("split", apply, rung, 0, tiles, stripes=at_a_time, plain=op == "backward" and residual),
        *after,
        at_a_time=at_a_time,
    )
