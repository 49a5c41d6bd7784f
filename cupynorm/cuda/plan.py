"""Plans: which kernels to launch for a call, as pure data.

A plan follows from shape, strides, dtype and the device's properties alone; this module imports neither CuPy nor
NumPy, so any machine can plan for any device. kernels/partition.cuh defines scopes, channel tiles and tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .device import Device
from .layout import SUBWARP_BYTES, SUBWARP_ELEMENTS, Layout, at_vecs, dense
from .ops import COLUMNS, OPS, SHARED, SINGLE_THREADS, Op
from .variants import (
    FORCED,
    INPUT_ITEMSIZE,
    ITEMSIZE,
    Kind,
    Variant,
    exists,
    group_of,
    resident_threads,
    variants_of,
    widest,
)

TILE_BYTES = 8192  # the smallest tile worth a block of a grid
CHANNEL_TILE_BYTES = 64  # channels-last: adjacent channels that one scope serves
FEW_THREADS = 128  # per multiprocessor: with fewer of them a wider block is chosen
MAX_GRID = 2**31 - 16  # the largest first dimension that clusters of every size divide


@dataclass(frozen=True)
class Step:
    """One launch: kernel `name` of source file `module`, and the numbers for its arguments."""

    module: str
    kernel: str  # without the variant
    name: str
    grid: tuple[int, int]
    threads: int
    shared: int  # bytes of dynamic shared memory
    scopes: int = 0
    tiles: int = 1
    vecs_per_thread: int = 0
    channel_vecs: int = 1  # channels-last: vecs side by side in a row (kernels/partition.cuh)
    subwarp_size: int = 0  # threads per plane, for the scope "subwarp"
    at_planes: bool = False  # vecs begin at the start of each plane
    group: str = ""  # of the variant
    cluster: int = 1
    cooperative: bool = False  # all blocks resident at once
    plain: bool = False  # without the call's epilogue

    @property
    def subdivision(self) -> int:
        """The kernels' argument for the division of a row or a warp (kernels/partition.cuh)."""
        return self.subwarp_size or (0 if self.at_planes else self.channel_vecs)


@dataclass(frozen=True)
class Plan:
    """The launches of a call. accesses: reads and writes of global memory per element, each of the size of dtype's
    elements, but those of x, which has `input`'s if that is another dtype."""

    op: Op
    regime: str
    reason: str
    dtype: str
    kind: Kind
    epilogue: int
    vec_size: int  # elements of one access
    misaligned: bool  # the planes of some array start at other addresses modulo 16 bytes than the result's
    channel_tiles: int
    accesses: int
    steps: tuple[Step, ...]
    at_a_time: int = 0  # channel tiles in each round of a split: few enough that L2 keeps them for the second read
    input: str = ""
    masked: bool = False  # and then a byte of the mask is read for an element at most, as often as x

    @property
    def bytes_per_element(self) -> int:
        if self.input:  # of accesses, one is the result's
            reads = 2 if self.regime == "split" else 1
            return reads * INPUT_ITEMSIZE[self.input] + (self.accesses - reads) * ITEMSIZE[self.dtype]
        return self.accesses * ITEMSIZE[self.dtype]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def grid_of(blocks: int) -> tuple[int, int]:
    """Return a grid of at least `blocks` blocks, with a second dimension if the first is too short."""
    x = min(blocks, MAX_GRID)
    return x, _ceil(blocks, x)


class _Job:
    """The numbers by which variants are chosen for a call."""

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
        input: str = "",
        masked: bool = False,
    ):
        self.op, self.device = op, device
        self.input, self.masked, self.epilogue = input, masked, epilogue
        self.dtype = "float64" if input == "float64" else dtype  # by which resources are chosen
        self.n, self.c, self.s = shape
        held = INPUT_ITEMSIZE[input or dtype]  # the bytes of an element in a tile
        self.itemsize = max(held, ITEMSIZE[dtype])
        self.math_bytes = 8 if self.dtype == "float64" else 4
        self.kind, self.layouts = kind, layouts
        self.operation = OPS[op]
        self.arrays = len(self.operation.inputs)  # that a scope holds
        v = widest(self.itemsize, kind)
        if kind == "channels_first":
            # Strides of axes of size 1 do not matter; but batch invariance treats one sample like several.
            n_steps = {x.n % v for x in layouts} if self.n > 1 or invariant else {0}
            c_steps = {x.c % v for x in layouts} if self.c > 1 else {0}
            misalignments = {x.misalignment % v for x in layouts}
            # misaligned: planes of different arrays start at different distances from an aligned address.
            # misalignment: the most elements between an aligned address and the start of a plane.
            self.misaligned = not len(n_steps) == len(c_steps) == len(misalignments) == 1
            self.misalignment = 0 if misalignments | n_steps | c_steps == {0} else v - 1
            if input and (self.misaligned or invariant):  # vecs of two sizes are not combined from aligned ones
                v, self.misaligned, self.misalignment = 1, False, 0
            self.vec_size = v
            self.at_planes = invariant and self.misalignment > 0
            if self.at_planes:
                self.misaligned, self.misalignment = True, 0
            self.channel_vecs = 1
            self.channel_tiles = self.n * self.c
            self.vecs = _ceil(self.s + self.misalignment, self.vec_size)
        else:
            self.misaligned = self.at_planes = False
            whole = self.c % v == 0 and all(at_vecs(x, self.n, self.s, v) for x in layouts)
            self.vec_size = v if whole else 1
            self.misalignment = 0
            most = min(32, CHANNEL_TILE_BYTES // (self.vec_size * self.itemsize))
            self.channel_vecs = min(most, _pow2(_ceil(self.c, self.vec_size)))
            self.channel_tiles = self.n * _ceil(self.c, self.channel_vecs * self.vec_size)
            self.vecs = self.s * self.channel_vecs
        # Counted to see if a variant fills the device.
        self.concurrent_tiles = self.channel_tiles // self.n if invariant else self.channel_tiles
        self.planes_per_thread = 1 if kind == "channels_first" else self.vec_size
        self.vec_bytes = self.vec_size * held
        self.bytes = self.vecs * self.vec_bytes * self.arrays
        width = self.channel_vecs * self.vec_size
        self.unit = "plane" if kind == "channels_first" else f"channel tile of {width} channels"
        self.tile_text = f"{self.bytes} B of one {self.unit}"

    def vecs_per_thread(self, variant: Variant, tiles: int = 1) -> int:
        """Return the vecs that each thread must hold so that the scope holds its tile."""
        return _ceil(self.vecs, variant.size * tiles)

    def scratch(self, variant: Variant) -> int:
        """Return the bytes of shared memory in which the threads of a block add up sums (sums.cuh)."""
        if variant.size == 32:
            return 0
        sums = self.operation.areas * self.operation.sums
        return variant.threads // 32 * self.channel_vecs * sums * self.planes_per_thread * self.math_bytes

    def shared(self, variant: Variant, tiles: int) -> int:
        """Return the bytes of shared memory of a block, with its tile if that stays there."""
        tile = (
            self.vecs_per_thread(variant, tiles)
            * variant.threads
            * (self.vec_bytes * self.arrays + self.masked)
            * (variant.residency == "shared")
        )
        if variant.scope == "block":
            return tile + self.scratch(variant)
        # Two areas for sums of Accum, and the partials of a cluster's block (group.cuh). (double_backward.cu has more
        # sums within a block, and no second area for them.)
        per_row = self.channel_vecs * self.planes_per_thread
        sums = variant.threads // 32 * per_row * self.operation.merged * 8
        sums += self.scratch(variant) if self.op == "double_backward" else sums
        return tile + sums + per_row * self.operation.partials * self.math_bytes

    def subwarp_size(self, variant: Variant) -> int:
        """Return the number of threads of a warp that serve one plane."""
        return _pow2(_ceil(self.s, variant.vecs_per_thread))

    def dense(self) -> bool:
        """Return True if the planes of every array are adjacent in memory, in order, and of one dtype: a warp's staging
        has buffers of one size."""
        layouts = self.layouts if self.kind == "channels_first" and not self.input else ()
        return bool(layouts) and all(dense(x, self.n, self.c, self.s) for x in layouts)

    def step(
        self,
        module: str,
        prefix: str,
        variant: Variant,
        shared: int,
        tiles: int = 1,
        *,
        vecs_per_thread: int = 0,
        channel_tiles: int | None = None,
        plain: bool = False,
    ) -> Step:
        """Return a launch whose scopes serve all channel tiles, or as many as given."""
        scopes = (channel_tiles or self.channel_tiles) * tiles
        blocks = _ceil(scopes * variant.size, variant.threads)
        subwarp_size, at_planes = 0, self.at_planes
        if variant.scope == "subwarp":
            subwarp_size, at_planes = self.subwarp_size(variant), False
            blocks = _ceil(scopes * subwarp_size, variant.threads)
        elif variant.scope == "grid":
            blocks = min(self.channel_tiles, self.slots(variant) // tiles) * tiles
        grid, name = grid_of(blocks), f"{prefix}_{variant.name}"
        group, cooperative = group_of(variant, module), variant.scope == "grid"
        return Step(module, prefix, name, grid, variant.threads, shared, scopes, tiles, vecs_per_thread,
                    self.channel_vecs, subwarp_size, at_planes, group, variant.cluster, cooperative, plain)  # fmt: skip

    def exists(self, variant: Variant, file: str) -> bool:
        """Return True if a variant of a file has a kernel for this call."""
        facts = self.dtype, self.kind, self.epilogue, self.misaligned, self.input, self.masked
        return exists(variant, file, *facts)

    def resident(self, variant: Variant) -> int:
        """Return the number of blocks of a variant for which a multiprocessor has registers."""
        facts = self.op, self.dtype, self.kind, self.epilogue, self.misaligned, self.masked
        return resident_threads(variant, *facts) // variant.threads

    def slots(self, variant: Variant) -> int:
        """Return the blocks that the device holds at once: with tiles in shared memory, one per multiprocessor."""
        return self.device.sm_count * (self.resident(variant) if variant.residency == "registers" else 1)

    def fits(self, variant: Variant, tiles: int) -> bool:
        """Return True if a block of a group can hold its tile."""
        if variant.residency == "registers":
            return self.vecs_per_thread(variant, tiles) <= variant.vecs_per_thread
        return self.shared(variant, tiles) <= self.device.shared_per_block

    def merge(self, name: str, planes: int) -> Step:
        """Return a launch that merges the partials of each plane."""
        return Step("merges", name, name, grid_of(planes), SINGLE_THREADS, SINGLE_THREADS * SHARED[name])

    def tile_by_tile(self, *files: str) -> Step:
        """Return a launch of the op's kernel, with a scope for each tile: the first variant of the files that holds a
        plane or channel tile; if none does, the first of the last file's widest."""

        def tiles(variant: Variant) -> int:
            return _ceil(self.vecs_per_thread(variant), variant.vecs_per_thread)

        known = [
            (file, variant)
            for file in files
            for variant in variants_of(file)
            if file in FORCED or self.exists(variant, file)
        ]
        file, variant = min(known, key=lambda each: tiles(each[1]))  # the first of those with the fewest tiles
        return self.step(file, self.op, variant, self.scratch(variant), tiles(variant))

    def try_variant(self, variant: Variant, buffers: int) -> tuple[Step | None, str]:
        """Return the launch if a variant fits, else None, and the reason. buffers: one for each staged array."""
        busy = self.device.sm_count
        op = self.op
        choosing = op not in FORCED  # a forced variant is taken wherever it fits
        if variant.scope == "subwarp":
            large = choosing and (self.s > SUBWARP_ELEMENTS or self.s * self.itemsize > SUBWARP_BYTES)
            if not self.dense() or large or self.s > 32 * variant.vecs_per_thread:
                return None, "planes are too large for a subwarp, or not adjacent in memory"
            # With 16 elements a thread needs fewer instructions for each; but planes of 16 floats lie in few banks.
            if choosing and op == "forward" and (variant.vecs_per_thread == 8) != (self.s < 32 and self.itemsize > 2):
                return None, f"another number of elements per thread is faster than {variant.vecs_per_thread}"
            most, w = 32 // self.subwarp_size(variant), 16 // self.itemsize
            buffer = (most * self.s + 2 * w - 2) // w * 16
            shared = variant.threads // 32 * buffers * buffer
            if shared > self.device.shared_per_block:
                return None, f"the staged planes exceed the {self.device.shared_per_block} B of shared memory"
            why = f"{most} plane(s) per warp, staged to move 16 B at a time; {32 // most} thread(s) per plane"
            return self.step(op, op, variant, shared, vecs_per_thread=variant.vecs_per_thread), why
        if choosing and not self.exists(variant, op):
            return None, f"the kernels have no registers for {variant.vecs_per_thread} vecs of each array"
        if variant.residency == "registers" and not variant.grouped:
            # A plane that a warp holds in one vec per thread gains nothing from more threads.
            if choosing and variant.scope == "warp" and self.vecs > 32 and self.concurrent_tiles < 2 * busy:
                return None, f"{self.concurrent_tiles} warps would leave multiprocessors idle"
            narrow = variant.scope == "block" and variant.threads < 256
            if choosing and narrow and self.concurrent_tiles * variant.threads < FEW_THREADS * busy:
                blocks = f"{self.concurrent_tiles} blocks of {variant.threads} threads"
                return None, f"{blocks} would leave multiprocessors half empty"
            if self.vecs_per_thread(variant) > variant.vecs_per_thread:
                return None, f"{self.tile_text} are too many for the registers"
            shared = self.scratch(variant)
            why = (
                f"{self.tile_text} stay in {variant.vecs_per_thread * self.arrays} vecs"
                f" in each of {variant.size} threads"
            )
            return self.step(op, op, variant, shared, vecs_per_thread=variant.vecs_per_thread), why
        # If a larger scope is left and registers allow it, two blocks share a multiprocessor's shared memory: one
        # computes while the other moves its tile.
        whole, half = self.device.shared_per_block, (self.device.shared_per_block + 1024) // 2 - 1024
        tiles = variant.cluster
        if variant.scope == "grid":
            slots = self.slots(variant)
            if busy < 2 or not self.fits(variant, slots):
                where = "registers" if variant.residency == "registers" else "shared memory"
                return None, f"{self.tile_text} exceed the {where} of all multiprocessors"
            tiles = next(t for t in range(2, slots + 1) if self.fits(variant, t))
            groups = min(self.concurrent_tiles, slots // tiles)
            rounds = _ceil(self.concurrent_tiles, groups)
            groups = _ceil(self.concurrent_tiles, rounds)  # the fewest for this number of rounds
            tiles = max(tiles, min(slots // groups, _ceil(self.bytes, TILE_BYTES)))
            tiles = _ceil(self.vecs, self.vecs_per_thread(variant, tiles) * variant.threads)
            vecs, shared = self.vecs_per_thread(variant, tiles), self.shared(variant, tiles)
            step = self.step(op, op, variant, shared, tiles, vecs_per_thread=vecs)
            return step, self.residency_text(variant, tiles)
        if tiles > self.device.cluster:
            return None, f"{self.tile_text}: the device has no clusters of {tiles} blocks"
        shared = self.shared(variant, tiles)
        last = tiles == self.device.cluster or not choosing or self.resident(variant) < 2
        if variant.residency == "registers" and not self.fits(variant, tiles):
            return None, f"{self.tile_text} are too many for the registers of {tiles} blocks"
        if shared > (whole if last else half):
            return None, (
                f"{self.tile_text} exceed the {whole if last else half} B of shared memory in each of {tiles} block(s)"
            )
        if choosing and 2 * self.concurrent_tiles * tiles <= busy:
            return None, f"{self.concurrent_tiles} x {tiles} blocks would leave most of {busy} multiprocessors idle"
        step = self.step(op, op, variant, shared, tiles, vecs_per_thread=self.vecs_per_thread(variant, tiles))
        return step, self.residency_text(variant, tiles)

    def residency_text(self, variant: Variant, tiles: int) -> str:
        """Say where a tile stays between passes."""
        vecs, shared = self.vecs_per_thread(variant, tiles) * self.arrays, self.shared(variant, tiles)
        where = (
            f"{vecs} vecs in each of {variant.size} threads"
            if variant.residency == "registers"
            else f"{shared} B of shared memory"
        )
        return f"{self.tile_text} stay in {where}" + (f" of each of {tiles} blocks" if tiles > 1 else "")


def channel_step(name: str, channels: int) -> Step:
    """Return a launch over the batch, with a number for each channel."""
    grid = _ceil(channels, COLUMNS), 1
    return Step("channels", name, name, grid, SINGLE_THREADS, SINGLE_THREADS * SHARED[name])


def plane_step(name: str, planes: int) -> Step:
    """Return a launch with a thread for each plane."""
    return Step("given", name, name, grid_of(_ceil(planes, SINGLE_THREADS)), SINGLE_THREADS, 0)


@lru_cache(maxsize=4096)
def plan(
    op: Op,
    shape: tuple[int, int, int],
    dtype: str,
    kind: Kind,
    layouts: tuple[Layout, ...],
    device: Device,
    *,
    sums: bool = True,
    reduced: bool = True,
    epilogue: int = 0,
    residual: bool = False,
    invariant: bool = False,
    input: str = "",
    masked: bool = False,
) -> Plan:
    """Plan a call on arrays (N, C, S), none of these 0, with a layout for each array, x first.

    forward, backward and double_backward use the statistics of the input, and so do moments and gradient_sums;
    frozen_backward and frozen_double_backward use running statistics, normalize running ones or given moments, and
    input_gradient given sums. The layouts of a double backward are those of x, dy, ddx if given, dx and ddy.
    sums: a backward needs the sums for dweight or dbias, a forward updates running statistics; reduced: some of them
    are added up over N. epilogue: a value of EPILOGUES, or 0 for none (a backward without activation has none).
    residual: the epilogue has one. invariant: the order of additions in a plane must depend neither on N nor on the
    plane's address. input: the dtype of x, if it is another; then dtype is that of the other arrays, and op is forward,
    moments or normalize. masked: there is a mask; op is not a double backward.
    """
    job = _Job(op, shape, dtype, kind, layouts, device, epilogue, invariant, input, masked)
    # Forward reads the residual; backward reads it again, for z, and writes its gradient.
    more = residual * (1 + len(OPS[op].residual_targets))

    def made(regime: str, reason: str, accesses: int, *steps: Step, at_a_time: int = 0) -> Plan:
        return Plan(
            op,
            regime,
            reason,
            dtype,
            kind,
            epilogue,
            job.vec_size,
            job.misaligned,
            job.channel_tiles,
            accesses + more,
            steps,
            at_a_time,
            input,
            masked,
        )

    if op == "normalize":
        return made("pointwise", "statistics are given", 2, job.tile_by_tile("frozen"))
    if op == "input_gradient":
        return made("pointwise", "sums are given", 3, job.tile_by_tile("parts", "split"))
    planes = job.n * job.c
    if op in ("moments", "gradient_sums"):
        step = job.tile_by_tile("parts", "split")
        merge = (job.merge(f"merge_{op}", planes),) if step.tiles > 1 else ()
        why = f"{step.tiles} tile(s) for each {job.unit}, each read once"
        return made("one-pass", why, job.arrays, step, *merge)
    last = "running_statistics" if op == "forward" else "parameter_gradients"
    after = (channel_step(last, job.c),) if sums and reduced else ()
    if op == "frozen_backward":
        step = job.tile_by_tile("frozen")
        merge = (job.merge("merge_gradient_sums", planes),) if sums and step.tiles > 1 else ()
        return made("pointwise", "statistics are given", 3 if sums or epilogue else 2, step, *merge, *after)
    if op == "frozen_double_backward":
        step = job.tile_by_tile("frozen_double_backward")
        merge = (job.merge("merge_dots", planes),) if sums and step.tiles > 1 else ()
        return made("pointwise", "statistics are given", len(layouts), step, *merge, *after)

    why = "the split is forced"
    for variant in variants_of(op):
        step_, why = job.try_variant(variant, job.arrays + more)
        if step_ is not None:
            accesses = len(layouts) if op == "double_backward" else 1 + job.arrays
            return made(f"{variant.scope}-{variant.residency}", why, accesses, step_, *after)

    file = "double_split" if op == "double_backward" else "split"
    variant = next(variant for variant in variants_of(file) if file in FORCED or job.exists(variant, file))
    tiles = _ceil(job.vecs_per_thread(variant), variant.vecs_per_thread)
    # (On its second pass a split backward with a residual reads dresidual, written on the first, instead of dy.)
    # Half of L2, since results are written through it, too.
    at_a_time = min(job.channel_tiles, max(1, device.l2_bytes // 2 // job.bytes))
    planes_at_a_time = at_a_time * job.channel_vecs * job.planes_per_thread
    why += f", hence a split into {tiles} tiles, in rounds of {at_a_time} plane(s) or channel tile(s) to stay in L2"
    if op == "double_backward":
        return made(
            "split",
            why,
            2 * len(layouts) - 2,
            job.step(file, "products", variant, job.scratch(variant), tiles, channel_tiles=at_a_time),
            job.merge("merge_products", planes_at_a_time),
            job.step(file, "apply_products", variant, 0, tiles, channel_tiles=at_a_time),
            *after,
            at_a_time=at_a_time,
        )
    partial, merged, apply = (
        ("moments", "merge_moments", "normalize")
        if op == "forward"
        else ("gradient_sums", "merge_gradient_sums", "input_gradient")
    )
    return made(
        "split",
        why,
        1 + 2 * job.arrays,
        job.step(
            "split", partial, variant, job.scratch(variant), tiles, channel_tiles=at_a_time, plain=op == "forward"
        ),
        job.merge(merged, planes_at_a_time),
        job.step("split", apply, variant, 0, tiles, channel_tiles=at_a_time, plain=op == "backward" and residual),
        *after,
        at_a_time=at_a_time,
    )
