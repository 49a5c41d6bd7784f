"""The kernel variants that exist, as pure data: for each source file a ladder of rungs, of which a plan takes the first
that suits; and how many threads of each must fit on a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["channels_first", "channels_last"]
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def widest(itemsize: int, kind: Kind) -> int:
    """Elements of a thread's widest access: 16 bytes; channels-last at most 4, since each is another plane's."""
    v = 16 // itemsize
    return v if kind == "channels_first" else min(v, 4)


#: What follows the affine step in a kernel (kernels/epilogue.cuh). relu and no activation are rectifiers too.
EPILOGUES: dict[str | None, int] = {None: 1, "relu": 1, "leaky_relu": 1, "silu": 2, "gelu": 3}


@dataclass(frozen=True)
class Rung:
    """One step of a ladder: an owner, where its tile rests, threads of a block, packs a thread holds (registers)."""

    owner: Literal["part", "warp", "block", "cluster", "grid"]
    rest: Literal["registers", "shared"]
    threads: int
    chunks: int  # 0: as many as the plane needs
    cluster: int = 1
    resident: int = 0  # threads that must fit on a multiprocessor; 0: resident_threads decides

    @cached_property
    def name(self) -> str:
        size = self.cluster if self.owner == "cluster" else ""
        bound = f"_r{self.resident}" if self.resident else ""
        return f"{self.owner}{size}_{self.rest}{bound}_{self.threads}x{self.chunks}"

    @cached_property
    def size(self) -> int:
        """Threads of one owner; a group of blocks has one owner for each tile."""
        return 32 if self.owner in ("part", "warp") else self.threads

    @property
    def grouped(self) -> bool:
        """Whether several blocks share a stripe."""
        return self.owner in ("cluster", "grid")


def group_of(rung: Rung, file: str) -> str:
    """Rungs of a group are compiled together: "" for blocks, and for warps where those compile quickly."""
    if rung.grouped:
        return rung.owner if rung.rest == "shared" else f"{rung.owner}_registers"
    alone = rung.owner == "part" or (rung.owner == "warp" and file in ("forward", "backward"))
    return rung.owner if alone else ""


def exists(rung: Rung, file: str, dtype: str, kind: Kind, epilogue: int, skewed: bool) -> bool:
    """Whether there is a kernel of a rung with these.

    8 packs of x and of dy are 64 registers a thread, which some kernels need for other things: those have no such
    rungs, but clusters that keep their tiles in shared memory.
    """
    needy = kind == "channels_last" or (ITEMSIZE[dtype] == 2 and (epilogue > 0 or skewed))
    if rung.owner == "part":  # of 16-bit planes a thread takes 16 elements at once, whatever their size
        return not (file == "forward" and rung.chunks == 8 and ITEMSIZE[dtype] == 2)
    if file == "split":  # of a skewed array two packs are read for each one
        return (rung.chunks == 4) == (ITEMSIZE[dtype] == 2 and skewed)
    if file != "backward":
        return True
    if rung.owner == "cluster" and rung.rest == "shared":
        return needy
    return not (needy and rung.chunks == 8)


def resident_threads(rung: Rung, file: str, dtype: str, kind: Kind, epilogue: int, skewed: bool) -> int:
    """Threads that must fit on a multiprocessor: a limit of 65536 / this registers for a kernel's threads."""
    if rung.resident:
        return rung.resident
    if (file, dtype, rung.owner) == ("double_backward", "float64", "part"):
        return 256  # 24 elements a thread, of two registers each
    light = dtype != "float64" and kind == "channels_first" and not skewed
    if file == "forward" and light and epilogue < 2:
        if rung.grouped and rung.rest == "registers":
            return 768 if epilogue else 1024
        return 512 if rung.owner == "grid" else 1024
    if file == "backward" and light and epilogue == 0:
        # Where the registers suffice, the more blocks the better: up to 1.3 times as fast on an H200.
        return 1024 if rung.owner not in ("part", "warp") and 0 < rung.chunks <= 4 else 512
    return 512


def _warp(*chunks: int) -> tuple[Rung, ...]:
    return tuple(Rung("warp", "registers", 128, k) for k in chunks)


def _block(*sizes: tuple[int, int]) -> tuple[Rung, ...]:
    return tuple(Rung("block", "registers", threads, k) for threads, k in sizes)


def _part(threads: int, *chunks: int) -> tuple[Rung, ...]:
    return tuple(Rung("part", "registers", threads, k) for k in chunks)


def _cluster(threads: int, chunks: int, *sizes: int) -> tuple[Rung, ...]:
    return tuple(Rung("cluster", "registers", threads, chunks, size) for size in sizes)


_GRID = (Rung("grid", "registers", 256, 8),)
_BLOCK_SHARED = (Rung("block", "shared", 512, 0),)
_CLUSTER_SHARED = tuple(Rung("cluster", "shared", 512, 0, size) for size in (2, 4, 8, 16))
_GRID_SHARED = (Rung("grid", "shared", 512, 0),)

#: The ladders: the first rung that suits (_Job.suits) is taken, and what suits none is split. With 16-byte packs a warp
#: holds 512 bytes a chunk, 256 threads 4 KB. Their order and borders are those measured on an H200 (bench/TUNING.md).
LADDERS: dict[str, tuple[Rung, ...]] = {
    "forward": (
        *(*_part(128, 8, 16), *_warp(1, 2, 4, 8), *_block((64, 8), (128, 8), (256, 4), (256, 8), (512, 8))),
        *(*_cluster(256, 8, 4, 8, 16), *_BLOCK_SHARED, *_GRID, *_GRID_SHARED),
    ),
    # x and dy are both held: half as much of each.
    "backward": (
        *(*_part(128, 8), *_warp(1, 2, 4), *_block((64, 4), (128, 4), (256, 4), (512, 4), (512, 8))),
        *(*_cluster(256, 8, 4, 8, 16), *_BLOCK_SHARED, *_CLUSTER_SHARED, *_GRID, *_GRID_SHARED),
    ),
    "split": _block((256, 8), (256, 4)),
    "evaluate": (*_warp(1, 4), *_block((256, 4))),
    # x, dy and ddx.
    "double_backward": (
        *(*_part(256, 8), *_warp(1, 3), *_block((256, 1), (256, 2), (512, 2)), *_BLOCK_SHARED),
        *(*_CLUSTER_SHARED, *_GRID_SHARED),
    ),
    "double_split": _block((256, 3)),
    "double_evaluate": (*_warp(1, 3), *_block((256, 3))),
    "channels": (),
}

#: Ladders in the place of those above, while a measurement asks for them (bench/variants.py): of one rung, which is
#: taken wherever it fits, or of none, which is the split. Plans are cached: who changes this clears the caches.
FORCED: dict[str, tuple[Rung, ...]] = {}

#: The files that know of no epilogue.
PLAIN = ("channels", "double_backward", "double_split", "double_evaluate")


def ladder(file: str) -> tuple[Rung, ...]:
    """The rungs that plans choose from."""
    return FORCED.get(file, LADDERS[file])
