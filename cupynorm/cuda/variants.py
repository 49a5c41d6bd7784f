"""The kernel variants, as pure data: a list for each source file, from which a plan takes the first variant that fits;
and the number of threads of each that must fit on a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["channels_first", "channels_last"]
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
#: The same of all dtypes of x.
INPUT_ITEMSIZE = ITEMSIZE | {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2}


def widest(itemsize: int, kind: Kind) -> int:
    """Return the elements of a thread's widest access: 16 bytes; channels-last at most 4, each of another plane."""
    v = 16 // itemsize
    return v if kind == "channels_first" else min(v, 4)


#: The epilogue of a kernel for each activation (kernels/epilogue.cuh). relu and no activation are rectifiers, too.
EPILOGUES: dict[str | None, int] = {None: 1, "relu": 1, "leaky_relu": 1, "silu": 2, "gelu": 3}


@dataclass(frozen=True)
class Variant:
    """One kernel of an op: its scope, the residency of its tile, threads per block, vecs per thread (registers)."""

    scope: Literal["subwarp", "warp", "block", "cluster", "grid"]
    residency: Literal["registers", "shared"]
    threads: int
    vecs_per_thread: int  # 0: as many as the plane needs
    cluster: int = 1
    resident: int = 0  # threads that must fit on a multiprocessor; 0: resident_threads decides

    @cached_property
    def name(self) -> str:
        size = self.cluster if self.scope == "cluster" else ""
        bound = f"_r{self.resident}" if self.resident else ""
        return f"{self.scope}{size}_{self.residency}{bound}_{self.threads}x{self.vecs_per_thread}"

    @cached_property
    def size(self) -> int:
        """Threads of one scope; a group of blocks has one scope for each tile."""
        return 32 if self.scope in ("subwarp", "warp") else self.threads

    @property
    def grouped(self) -> bool:
        """True if several blocks share a channel tile."""
        return self.scope in ("cluster", "grid")


def group_of(variant: Variant, file: str) -> str:
    """Return a variant's group, which is compiled together: "" for blocks, and for warps that compile quickly."""
    if variant.grouped:
        return variant.scope if variant.residency == "shared" else f"{variant.scope}_registers"
    alone = variant.scope == "subwarp" or (variant.scope == "warp" and file in ("forward", "backward"))
    return variant.scope if alone else ""


def exists(
    variant: Variant, file: str, dtype: str, kind: Kind, epilogue: int, misaligned: bool, input: str = "",
    masked: bool = False,
) -> bool:  # fmt: skip
    """Return True if a variant has a kernel for this file, dtype, kind, epilogue and alignment, for this dtype of x, if
    it is another, and with or without a mask.

    8 vecs of x and of dy take 64 registers per thread, which some kernels need for other things: these kernels have no
    such variants, but clusters that keep their tiles in shared memory. Nor do the registers of a grid hold 8 vecs of
    bytes, each of which takes a register, nor those of 512 threads 8 vecs and a mask.
    """
    if input and INPUT_ITEMSIZE[input] == 1 and group_of(variant, file) == "grid_registers":
        return False
    if masked and file == "forward" and (variant.threads, variant.vecs_per_thread) == (512, 8):
        return False
    needy = kind == "channels_last" or (ITEMSIZE[dtype] == 2 and (epilogue > 0 or misaligned))
    needy |= masked and epilogue > 0
    if variant.scope == "subwarp":  # in forward a thread takes 16 elements of 16 bits, whatever the size of planes
        return not (file == "forward" and variant.vecs_per_thread == 8 and ITEMSIZE[dtype] == 2)
    if file == "split":  # each vec of a misaligned array is combined from two; a mask has bits for each element
        few = masked or (ITEMSIZE[dtype] == 2 and misaligned)
        return (variant.vecs_per_thread == 4) == few
    if file != "backward":
        return True
    if variant.scope == "cluster" and variant.residency == "shared":
        return needy
    return not (needy and variant.vecs_per_thread == 8)


def resident_threads(
    variant: Variant, file: str, dtype: str, kind: Kind, epilogue: int, misaligned: bool, masked: bool = False
) -> int:
    """Return the threads that must fit on a multiprocessor: they limit each to 65536 / this number of registers."""
    if variant.resident:
        return variant.resident
    if (file, dtype, variant.scope) == ("double_backward", "float64", "subwarp"):
        return 256  # 24 elements a thread, of two registers each
    light = dtype != "float64" and kind == "channels_first" and not misaligned
    if file == "forward" and light and epilogue < 2:
        if variant.grouped and variant.residency == "registers":
            return 768 if epilogue or masked else 1024
        if masked and variant.vecs_per_thread >= 8:
            return 768
        return 512 if variant.scope == "grid" else 1024
    if file == "backward" and light and epilogue == 0:
        # If registers suffice, more blocks are faster: up to 1.3 times on an H200.
        return 1024 if variant.scope not in ("subwarp", "warp") and 0 < variant.vecs_per_thread <= 4 else 512
    return 512


def _warp(*vecs_per_thread: int) -> tuple[Variant, ...]:
    return tuple(Variant("warp", "registers", 128, k) for k in vecs_per_thread)


def _block(*sizes: tuple[int, int]) -> tuple[Variant, ...]:
    return tuple(Variant("block", "registers", threads, k) for threads, k in sizes)


def _subwarp(threads: int, *vecs_per_thread: int) -> tuple[Variant, ...]:
    return tuple(Variant("subwarp", "registers", threads, k) for k in vecs_per_thread)


def _cluster(threads: int, vecs_per_thread: int, *sizes: int) -> tuple[Variant, ...]:
    return tuple(Variant("cluster", "registers", threads, vecs_per_thread, size) for size in sizes)


_GRID = (Variant("grid", "registers", 256, 8),)
_BLOCK_SHARED = (Variant("block", "shared", 512, 0),)
_CLUSTER_SHARED = tuple(Variant("cluster", "shared", 512, 0, size) for size in (2, 4, 8, 16))
_GRID_SHARED = (Variant("grid", "shared", 512, 0),)

#: The first variant that fits (_Job.try_variant) is taken; a plane that none fits is split. With one 16-byte vec per
#: thread a warp holds 512 bytes, 256 threads 4 KB. Their order and limits were measured on an H200 (bench/TUNING.md).
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "forward": (
        *(*_subwarp(128, 8, 16), *_warp(1, 2, 4, 8), *_block((64, 8), (128, 8), (256, 4), (256, 8), (512, 8))),
        *(*_cluster(256, 8, 4, 8, 16), *_BLOCK_SHARED, *_GRID, *_GRID_SHARED),
    ),
    # Backward holds x and dy: half as much of each.
    "backward": (
        *(*_subwarp(128, 8), *_warp(1, 2, 4), *_block((64, 4), (128, 4), (256, 4), (512, 4), (512, 8))),
        *(*_cluster(256, 8, 4, 8, 16), *_BLOCK_SHARED, *_CLUSTER_SHARED, *_GRID, *_GRID_SHARED),
    ),
    "split": _block((256, 8), (256, 4)),
    "parts": _warp(1, 4),
    "frozen": (*_warp(1, 4), *_block((256, 4))),
    # x, dy and ddx.
    "double_backward": (
        *(*_subwarp(256, 8), *_warp(1, 3), *_block((256, 1), (256, 2), (512, 2)), *_BLOCK_SHARED),
        *(*_CLUSTER_SHARED, *_GRID_SHARED),
    ),
    "double_split": _block((256, 3)),
    "frozen_double_backward": (*_warp(1, 3), *_block((256, 3))),
}

#: Lists that replace those above during a measurement (bench/commands/variants.py): one variant, taken wherever it
#: fits, or none, for the split. Plans are cached: clear the caches after a change.
FORCED: dict[str, tuple[Variant, ...]] = {}

#: The kernels of each file that exist in its variants,
KERNELS: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "split": ("moments", "normalize", "gradient_sums", "input_gradient"),
    "parts": ("moments", "gradient_sums", "input_gradient"),
    "frozen": ("normalize", "frozen_backward"),
    "double_backward": ("double_backward",),
    "double_split": ("products", "apply_products"),
    "frozen_double_backward": ("frozen_double_backward",),
}
#: and those that exist once: merges of the partials of each plane, sums over the batch, numbers that a caller gives.
SINGLE: dict[str, tuple[str, ...]] = {
    "merges": ("merge_moments", "merge_gradient_sums", "merge_products", "merge_dots"),
    "channels": ("running_statistics", "parameter_gradients"),
    "given": ("statistics_of_moments", "means_of_sums"),
}

#: The files whose kernels have no epilogue, and the kernels of other files that have none.
PLAIN = ("double_backward", "double_split", "frozen_double_backward")
PLAIN_KERNELS = ("moments",)
#: The files whose kernels exist with a mask.
MASKED = ("forward", "backward", "split", "parts", "frozen")
#: The kernels that exist for x of another dtype than the other arrays'.
MIXED_KERNELS = ("forward", "moments", "normalize")


def variants_of(file: str) -> tuple[Variant, ...]:
    """Return the variants that plans choose from."""
    return FORCED.get(file, VARIANTS[file])
