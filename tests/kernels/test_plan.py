"""Plans can be launched on every device for every shape, and say how many accesses their kernels make.

`python tests/kernels/test_plan.py` rewrites the plans in plans.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.bounds import bounds_of

import cupynorm as cn
from cupynorm import cpu
from cupynorm.cuda import ops
from cupynorm.cuda.arguments import STRUCTS
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import DEVICES, Device
from cupynorm.cuda.launches import _plan_call
from cupynorm.cuda.layout import ArrayDesc, Layout, choose_layout, contiguous_desc, layout_of
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import MAX_GRID, Plan, Step, plan
from cupynorm.cuda.source import Module
from cupynorm.cuda.variants import INPUT_ITEMSIZE, ITEMSIZE, VARIANTS, Kind, Variant, exists, group_of, resident_threads

SHAPES = [
    (1, 1, 2), (1, 1, 2**24), (1, 1, 2**31 + 1), (1, 3, 2**33 + 7), (1, 32, 1080 * 1920), (2, 320, 64), (2, 3, 49),
    (3, 5, 1575), (12, 512, 16), (12, 512, 1024), (20, 64, 184 * 248), (20, 100, 1575), (2, 32, 128**3), (32, 80, 5325),
    (10_000_000, 3, 4), (70_000, 70_000, 2), (2**33, 2, 2), (1, 1, 57_000), (1, 1, 58_112), (200, 300, 29_000),
    # Subwarps: every subwarp_size, and the largest plane of each dtype.
    (64, 96, 7), (64, 96, 33), (64, 96, 63), (1000, 3, 65), (1000, 3, 127), (64, 96, 128), (3, 1, 255), (64, 96, 256),
    # Between the shared memory of one block and that of the whole device.
    (1, 3, 20_000), (1, 1, 30_000), (4, 67, 60_000), (55, 1, 50_000), (4, 1, 500_000), (7, 9, 900_000), (1, 1, 17_409),
    (2, 2, 2_500_001), (3, 1, 6_000_000), (8, 1, 1), (2**28, 16, 500_000),
]  # fmt: skip
OPS: tuple[Op, ...] = ("forward", "backward", "normalize", "frozen_backward")
DOUBLE: tuple[Op, ...] = ("double_backward", "frozen_double_backward")
KINDS: tuple[Kind, ...] = ("channels_first", "channels_last")
#: Epilogue and residual. A residual alone has an epilogue without activation, and no epilogue in backward.
EPILOGUES = [(0, False), (1, False), (1, True), (3, True)]


def _plan(
    op: Op,
    shape: tuple[int, int, int],
    dtype: str,
    kind: Kind,
    device: Device,
    aligned: bool = True,
    epilogue: int = 0,
    residual: bool = False,
    sums: bool = True,
) -> Plan:
    _, c, s = shape
    stride = (c * s, s, 1) if kind == "channels_first" else (c * s, 1, c)
    first = Layout(*stride, 0 if aligned else 1)
    arrays = 5 if op in DOUBLE else 3 + 2 * residual if op in ("backward", "frozen_backward") else 2 + residual
    layouts = (first, *[Layout(*stride, 0)] * (arrays - 1))
    return plan(op, shape, dtype, kind, layouts, device, sums=sums, reduced=sums, epilogue=epilogue, residual=residual)


@cache
def _named(name: str) -> Variant | None:
    """Return the variant of a step; None for merges and sums over N, which have none."""
    found = [variant for variants in VARIANTS.values() for variant in variants if name.endswith("_" + variant.name)]
    return found[0] if found else None


def _variant_of(step: Step) -> Variant | None:
    return _named(step.name)


def _shared(made: Plan, step: Step, variant: Variant | None, s: int, residual: bool) -> int:
    """Return the dynamic shared memory of a block, worked out from the kernels' source."""
    size = ITEMSIZE[made.dtype]
    math_size = 8 if made.dtype == "float64" else 4
    warps = step.threads // 32
    if variant is None:  # what each thread merges (merges.cu); two or three Accum a thread (channels.cu)
        numbers = {"merge_moments": 3, "merge_gradient_sums": 2, "merge_products": 6, "merge_dots": 1}
        numbers |= {"running_statistics": 3, "parameter_gradients": 2}
        return step.threads * numbers[step.name] * 8
    if variant.scope == "subwarp":
        # staging.cuh: a buffer for each array, for the run of a warp's planes at any address modulo 16 bytes.
        wide = 16 // size
        words = max(math.ceil((at + 32 // step.subwarp_size * s) / wide) for at in range(wide))
        buffers = 1 + residual if made.op == "forward" else 3 if made.op in DOUBLE else 2 + 2 * residual
        return warps * buffers * words * 16
    if variant.scope == "warp" or step.name.startswith(("normalize", "input_gradient", "apply_products")):
        return 0
    # Sums over a block: forward two areas used in turn, backward one; a number for each warp, channel vec and plane of
    # a thread. Forward adds up two quantities at once, the values about the mean and their squares (moments.cuh).
    channel_vecs, planes = (1, 1) if made.kind == "channels_first" else (step.channel_vecs, made.vec_size)
    forward = made.op in ("forward", "moments")
    quantities = {
        "forward": 2,
        "frozen_backward": 2,
        "backward": 2,
        "gradient_sums": 2,
        "moments": 2,
        "double_backward": 2 + 6,
        "frozen_double_backward": 1,
    }[made.op]
    sums = (2 if forward else 1) * quantities * warps * channel_vecs * planes * math_size
    if variant.residency == "registers" and not variant.grouped:
        return sums
    arrays = 1 if forward else 3 if made.op in DOUBLE else 2
    tile = step.vecs_per_thread * step.threads * made.vec_size * size * arrays if variant.residency == "shared" else 0
    if variant.scope == "block":
        return tile + sums
    if made.op in DOUBLE:  # and six of Accum; the partials of a block are nine numbers a plane
        return tile + sums + warps * channel_vecs * planes * 6 * 8 + channel_vecs * planes * 9 * math_size
    # Groups: both areas are of Accum, and each block puts its numbers (group.cuh).
    area = warps * channel_vecs * planes * 2 * 8
    return tile + 2 * area + channel_vecs * planes * (4 if forward else 2) * math_size


def _check_step(made: Plan, step: Step, shape: tuple[int, int, int], device: Device, residual: bool) -> None:
    n, c, s = shape
    variant = _variant_of(step)
    # The hardware's limits.
    blocks = step.grid[0] * step.grid[1]
    assert 1 <= step.grid[0] <= MAX_GRID
    assert 1 <= step.grid[1] <= 65535
    assert 32 <= step.threads <= 1024
    assert step.threads % 32 == 0
    assert step.shared == _shared(made, step, variant, s, residual)
    assert step.shared <= device.shared_per_block
    assert 1 <= step.cluster <= device.cluster
    assert step.grid[0] % step.cluster == 0
    if step.cooperative:
        # All blocks are resident: at most as many on each multiprocessor as the kernel is compiled for, and as fit in
        # the shared memory that a single block may use (1 KB of each block is the driver's).
        assert step.grid == (blocks, 1)
        assert variant is not None
        each = 1
        if variant.residency == "registers":
            facts = step.module, made.dtype, made.kind, made.epilogue, made.misaligned
            each = resident_threads(variant, *facts) // step.threads
        assert blocks <= device.sm_count * each
        assert each * (step.shared + 1024) <= device.shared_per_block + 1024
    if variant is None:
        # One block for each plane of a round, or for each 32 channels.
        width = 1 if made.kind == "channels_first" else made.vec_size * made.steps[0].channel_vecs
        planes = min(n * c, (made.at_a_time or made.channel_tiles) * width)
        assert blocks >= (math.ceil(c / 32) if step.module == "channels" else planes)
        return
    assert (variant.threads, variant.cluster, group_of(variant, step.module)) == (
        step.threads,
        step.cluster,
        step.group,
    )
    assert exists(variant, step.module, made.dtype, made.kind, 0 if step.plain else made.epilogue, made.misaligned)
    assert step.cooperative == (variant.scope == "grid")
    # Nothing is left out: channel tiles cover all planes, scopes all channel tiles, threads all scopes.
    per_channel_tile = 1 if made.kind == "channels_first" else made.vec_size * step.channel_vecs
    assert made.channel_tiles == n * math.ceil(c / per_channel_tile)
    at_once = made.at_a_time or made.channel_tiles
    assert 1 <= at_once <= made.channel_tiles
    assert step.scopes == at_once * step.tiles
    if variant.scope == "subwarp":
        assert made.kind == "channels_first"
        assert step.subwarp_size in (1, 2, 4, 8, 16, 32)
        assert step.subwarp_size * variant.vecs_per_thread >= s  # a thread's elements
        assert 32 // step.subwarp_size * s <= 32 * variant.vecs_per_thread  # of the run that a warp stages
        assert blocks * step.threads // step.subwarp_size >= step.scopes
        assert (blocks - 1) * step.threads // step.subwarp_size < step.scopes
        return
    threads = 32 if variant.scope == "warp" else step.threads
    if variant.scope == "grid":  # a group serves one channel tile after the other
        groups = blocks // step.tiles
        assert blocks == groups * step.tiles
        assert 1 <= groups <= made.channel_tiles
    else:
        assert blocks * step.threads >= step.scopes * threads
    if variant.scope == "cluster":
        assert step.tiles == step.cluster
    # The tiles hold all elements of a plane.
    assert threads % step.channel_vecs == 0
    held = step.tiles * (step.vecs_per_thread or variant.vecs_per_thread) * threads // step.channel_vecs
    assert held * (made.vec_size if made.kind == "channels_first" else 1) >= s
    if variant.residency == "registers" and step.vecs_per_thread:
        # Each block of a group takes as many vecs as its tile needs, at most as many as it has registers for.
        assert (
            step.vecs_per_thread <= variant.vecs_per_thread
            if variant.grouped
            else step.vecs_per_thread == variant.vecs_per_thread
        )


#: Accesses of global memory per element: plain; with a residual; split; split with a residual. Backward writes
#: dresidual, and a split reads it instead of dy on its second pass.
ACCESSES = {
    "forward": (2, 3, 3, 4),
    "backward": (3, 5, 5, 7),
    "normalize": (2, 3, 2, 3),
    "frozen_backward": (3, 5, 3, 5),
    "double_backward": (5, 5, 8, 8),
    "frozen_double_backward": (5, 5, 5, 5),
}


def test_known_devices() -> None:
    """The same numbers in bytes, as a driver reports them; no device was asked. The largest cluster has 8 blocks, or 16
    where non-portable sizes are allowed."""
    assert set(DEVICES.values()) == {
        Device("T4", (7, 5), 40, 65536, 4194304),
        Device("V100", (7, 0), 80, 98304, 6291456),
        Device("A100", (8, 0), 108, 166912, 41943040),
        Device("L4", (8, 9), 58, 101376, 50331648),
        Device("H100", (9, 0), 132, 232448, 52428800, 16),
        Device("H200", (9, 0), 132, 232448, 62914560, 16),
        Device("B200", (10, 0), 148, 232448, 132120576, 16),
        Device("RTX 5090", (12, 0), 170, 101376, 100663296, 8),
    }
    assert all(name == device.name for name, device in DEVICES.items())


@pytest.mark.long
@pytest.mark.parametrize(
    "device", [pytest.param(d, marks=() if d.name == "H100" else pytest.mark.full, id=d.name) for d in DEVICES.values()]
)
@pytest.mark.parametrize("op", [*OPS, *DOUBLE])
def test_every_shape_gets_a_launchable_plan(op: Op, device: Device) -> None:
    for shape, dtype, kind, aligned, (epilogue, residual) in itertools.product(
        SHAPES, ITEMSIZE, KINDS, (True, False), EPILOGUES[:1] if op in DOUBLE else EPILOGUES
    ):
        made = _plan(op, shape, dtype, kind, device, aligned, epilogue, residual)
        case = f"{op} {shape} {dtype} {kind} {aligned=} {epilogue=} {residual=} on {device.name}: {made}"
        try:
            for step in made.steps:
                _check_step(made, step, shape, device, residual)
            split = made.regime == "split"
            assert bool(made.at_a_time) == split
            assert made.accesses == ACCESSES[op][residual + 2 * split]
            assert made.bytes_per_element == made.accesses * ITEMSIZE[dtype]
            assert made.reason
        except AssertionError as error:
            raise AssertionError(case) from error


def test_gradients_without_sums() -> None:
    """With frozen statistics, backward reads x only for sums or for an activation's mask."""
    d = DEVICES["H100"]
    for sums, epilogue, residual, accesses in [
        (True, 0, False, 3), (False, 0, False, 2), (False, 1, False, 3), (False, 1, True, 5), (True, 1, True, 5),
    ]:  # fmt: skip
        made = _plan("frozen_backward", (4, 8, 40_000), "float32", "channels_first", d, True, epilogue, residual, sums)
        assert made.accesses == accesses
        assert len(made.steps) == (3 if sums else 1)


def _regimes(
    op: Op, device: str, dtype: str, sizes: list[int], planes: int = 4096, epilogue: int = 0, aligned: bool = True
) -> list[str]:
    """Return the regimes of channels-first planes, with the size of a cluster in place of its name."""
    made = [_plan(op, (1, planes, s), dtype, "channels_first", DEVICES[device], aligned, epilogue) for s in sizes]
    return [
        p.regime.replace("cluster", str(p.steps[0].cluster)) if _grouped(p) else p.regime.replace("-registers", "")
        for p in made
    ]


def _grouped(made: Plan) -> bool:
    return made.steps[0].cluster > 1 or made.steps[0].cooperative


def _blocks(op: Op, planes: int, size: int) -> str:
    """Return scope, threads and vecs per thread of channels-first float32 planes on an H100."""
    made = _plan(op, (1, planes, size), "float32", "channels_first", DEVICES["H100"])
    return made.steps[0].name.removeprefix(f"{op}_").replace("_registers", "")


#: The largest plane, in elements, of each regime of a large channels-first batch, for a device, dtype, op and epilogue.
#: A subwarp takes at most 128 elements and 512 B. Registers: 8 vecs of 16 B per thread (warps in backward: 4), for the
#: 32 threads of a warp, 512 of a block, 256 of each block of a cluster, and for the grid 256 of each of its resident
#: blocks; a multiprocessor holds 4 of these (resident_threads: 1024), 3 with the light epilogue (768), 2 with others
#: and in backward (512).
#: Shared memory: as many vecs for each of 512 threads as fit, in all blocks of the group; a block has all of its
#: multiprocessor's if registers leave no room for a second one (resident_threads: 512). Larger planes are split.
VARIANT_BORDERS = {
    ("H100", "float32", "forward", 0): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "16-registers": 131_072, "grid-registers": 132 * 4 * 8192, "grid-shared": 7_569_408,
    },
    ("H100", "float32", "forward", 1): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "16-registers": 131_072, "grid-registers": 132 * 3 * 8192, "grid-shared": 7_569_408,
    },
    ("H100", "float32", "forward", 2): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "16-registers": 131_072, "grid-registers": 132 * 2 * 8192, "grid-shared": 7_569_408,
    },
    ("H100", "bfloat16", "forward", 0): {
        "subwarp": 128, "warp": 2048, "block": 32_768, "4-registers": 65_536, "8-registers": 131_072,
        "16-registers": 262_144, "grid-registers": 132 * 4 * 16_384, "grid-shared": 15_138_816,
    },
    ("H100", "float64", "forward", 0): {
        "subwarp": 64, "warp": 512, "block": 8192, "4-registers": 16_384, "8-registers": 32_768,
        "16-registers": 65_536, "grid-registers": 132 * 2 * 4096, "grid-shared": 3_784_704,
    },
    ("H100", "float32", "backward", 0): {
        "subwarp": 128, "warp": 512, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "16-registers": 131_072, "grid-registers": 132 * 2 * 8192, "grid-shared": 3_784_704,
    },
    ("H100", "float32", "backward", 2): {
        "subwarp": 128, "warp": 512, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "16-registers": 131_072, "grid-registers": 132 * 2 * 8192, "grid-shared": 3_784_704,
    },
    ("H100", "bfloat16", "backward", 0): {
        "subwarp": 128, "warp": 1024, "block": 32_768, "4-registers": 65_536, "8-registers": 131_072,
        "16-registers": 262_144, "grid-registers": 132 * 2 * 16_384, "grid-shared": 7_569_408,
    },
    # 16-bit with an activation: at most 4 vecs of x and of dy in registers (variants.exists).
    ("H100", "bfloat16", "backward", 1): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "block-shared": 57_344, "2-shared": 114_688, "4-shared": 229_376,
        "8-shared": 458_752, "16-shared": 917_504, "grid-shared": 7_569_408,
    },
    # Three arrays on chip; registers hold three vecs of each in a warp, two in a block.
    ("H100", "float32", "double_backward", 0): {
        "subwarp": 128, "warp": 384, "block": 4096, "block-shared": 18_432, "2-shared": 36_864, "4-shared": 73_728,
        "8-shared": 147_456, "16-shared": 294_912, "grid-shared": 2_433_024,
    },
    # Without clusters a block may use all 163 KB.
    ("A100", "float32", "forward", 0): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "block-shared": 40_960, "grid-registers": 108 * 4 * 8192,
        "grid-shared": 4_423_680,
    },
    ("A100", "float32", "backward", 0): {
        "subwarp": 128, "warp": 512, "block": 16_384, "block-shared": 20_480, "grid-registers": 108 * 2 * 8192,
        "grid-shared": 2_211_840,
    },
    # Less shared memory (1_802_240) than registers.
    ("V100", "float32", "forward", 0): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "block-shared": 22_528, "grid-registers": 80 * 4 * 8192,
    },
    # 64 KB are also less than a block's registers hold.
    ("T4", "float32", "forward", 0): {"subwarp": 128, "warp": 1024, "block": 16_384, "grid-registers": 40 * 4 * 8192},
    ("T4", "float32", "backward", 0): {"subwarp": 128, "warp": 512, "block": 16_384, "grid-registers": 40 * 2 * 8192},
    ("L4", "float32", "forward", 0): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "block-shared": 24_576, "grid-registers": 58 * 4 * 8192,
    },
    ("H200", "float32", "forward", 0): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "16-registers": 131_072, "grid-registers": 132 * 4 * 8192, "grid-shared": 7_569_408,
    },
    ("B200", "float32", "forward", 0): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "16-registers": 131_072, "grid-registers": 148 * 4 * 8192, "grid-shared": 8_486_912,
    },
    # Clusters of at most 8; half of 99 KB is less than registers hold, and so are 99 KB in each multiprocessor.
    ("RTX 5090", "float32", "forward", 0): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "4-registers": 32_768, "8-registers": 65_536,
        "grid-registers": 170 * 4 * 8192,
    },
    # With an activation the shared memory of 8 clustered blocks, 99 KB each, and of all multiprocessors holds them.
    ("RTX 5090", "bfloat16", "backward", 2): {
        "subwarp": 128, "warp": 1024, "block": 16_384, "block-shared": 24_576, "2-shared": 49_152, "4-shared": 98_304,
        "8-shared": 196_608, "grid-shared": 4_177_920,
    },
}  # fmt: skip


@pytest.mark.parametrize(("device", "dtype", "op", "epilogue"), VARIANT_BORDERS, ids=str)
def test_scopes_grow_with_the_plane(device: str, dtype: str, op: Op, epilogue: int) -> None:
    """The regime of a large batch on both sides of each border."""
    borders = VARIANT_BORDERS[device, dtype, op, epilogue]
    regimes = [*borders, "split"]
    sizes = [size for border in borders.values() for size in (border, border + 1)]
    expected = [regime for pair in itertools.pairwise(regimes) for regime in pair]
    assert _regimes(op, device, dtype, sizes, epilogue=epilogue) == expected


#: The largest plane that each variant holds in registers, for a large channels-first float32 batch: threads x vecs x 4.
BLOCK_BORDERS = {
    "forward": {
        "warp_128x1": 128, "warp_128x2": 256, "warp_128x4": 512, "warp_128x8": 1024, "block_64x8": 2048,
        "block_128x8": 4096, "block_256x8": 8192, "block_512x8": 16_384, "cluster4_256x8": 32_768,
    },
    "backward": {
        "warp_128x1": 128, "warp_128x2": 256, "warp_128x4": 512, "block_64x4": 1024, "block_128x4": 2048,
        "block_256x4": 4096, "block_512x4": 8192, "block_512x8": 16_384, "cluster4_256x8": 32_768,
    },
}  # fmt: skip


@pytest.mark.parametrize("op", BLOCK_BORDERS)
def test_capacities_of_blocks_in_registers(op: Op) -> None:
    variants = list(BLOCK_BORDERS[op])
    for (variant, border), larger in zip(BLOCK_BORDERS[op].items(), variants[1:], strict=False):
        if border > 128:  # smaller planes go to subwarps
            assert _blocks(op, 4096, border) == variant
        assert _blocks(op, 4096, border + 1) == larger


def test_elements_per_thread_of_subwarps() -> None:
    """Forward 16, but 8 for planes of less than 32 floats or doubles; backward and double backward always 8."""
    d = DEVICES["H100"]
    for dtype, size, expected_forward in [
        ("float32", 31, 8), ("float32", 32, 16), ("float64", 31, 8), ("float64", 32, 16), ("bfloat16", 31, 16),
        ("float16", 2, 16), ("bfloat16", 128, 16), ("float32", 2, 8), ("float32", 128, 16), ("float64", 64, 16),
    ]:  # fmt: skip
        for op, expected in (("forward", expected_forward), ("backward", 8), ("double_backward", 8)):
            made = _plan(op, (64, 96, size), dtype, "channels_first", d)
            assert (made.regime, made.steps[0].vecs_per_thread) == ("subwarp-registers", expected), (op, dtype, size)
            assert made.steps[0].subwarp_size == max(1, 2 ** math.ceil(math.log2(size / expected)))
    # At most 128 elements and 512 B.
    for dtype, most in (("float16", 128), ("float32", 128), ("float64", 64)):
        assert _plan("forward", (64, 96, most), dtype, "channels_first", d).regime == "subwarp-registers"
        assert _plan("forward", (64, 96, most + 1), dtype, "channels_first", d).regime == "warp-registers"


def test_few_planes_get_a_larger_scope() -> None:
    """With few planes, one warp, block or small cluster for each would leave the device idle."""
    sizes = [1000, 20_000, 50_000, 100_000, 200_000]
    grown = ["4-registers", "8-registers", "16-registers", "grid-registers"]
    for op, size in (("forward", 1000), ("backward", 500)):
        sizes = [size, 20_000, 50_000, 100_000, 200_000]
        # Planes get a warp each if there are two for each of 132 multiprocessors. Clusters of 4 are used from 17 planes
        # on, when more than half of the multiprocessors have a block; of 8 from 9, of 16 from 5.
        for planes, smallest in [(264, 0), (263, 0), (17, 0), (16, 1), (9, 1), (8, 2), (5, 2), (4, 3), (1, 3)]:
            expected = ["warp" if planes == 264 else "block", *(grown[max(i, smallest)] for i in range(4))]
            assert _regimes(op, "H100", "float32", sizes, planes) == expected, (op, planes)
    # The same for clusters and blocks (67 planes, of 132) that keep their tiles in shared memory.
    sizes = [20_000, 100_000, 200_000, 400_000]
    for planes, smallest in [(67, 1), (66, 2), (34, 2), (33, 4), (17, 4), (16, 8), (9, 8), (8, 16), (5, 16), (4, 0)]:
        expected = ["grid" if not smallest else "block" if tiles == smallest == 1 else str(max(tiles, smallest))
                    for tiles in (1, 2, 4, 8)]  # fmt: skip
        made = _regimes("backward", "H100", "bfloat16", sizes, planes, epilogue=1)
        assert made == [f"{scope}-shared" for scope in expected], planes
    # A plane that a warp holds in one vec per thread stays with it.
    assert _regimes("forward", "H100", "float32", [129, 128], planes=1) == ["block", "subwarp"]


def test_narrow_blocks_are_for_many_planes() -> None:
    """With less than 128 of their threads for each of 132 multiprocessors, wider blocks are chosen."""
    for op, wide, vecs in (("forward", "256x4", 8), ("backward", "256x4", 4)):
        small, large = 48 * vecs * 4, 96 * vecs * 4  # three quarters of what 64 and 128 threads hold
        assert _blocks(op, 264, small) == f"block_64x{vecs}"
        assert _blocks(op, 263, small) == f"block_128x{vecs}"
        assert _blocks(op, 132, small) == f"block_128x{vecs}"
        assert _blocks(op, 131, small) == f"block_{wide}"
        assert _blocks(op, 132, large) == f"block_128x{vecs}"
        assert _blocks(op, 131, large) == f"block_{wide}"


def test_large_planes_keep_the_device_busy() -> None:
    """If there are 64 KB for each multiprocessor, most of them have a block from the start."""
    for device, op, (n, s) in itertools.product(
        DEVICES.values(),
        OPS[:2],
        itertools.product(
            (1, 2, 3, 5, 9, 33, 67, 100, 135, 300), (5000, 17_000, 30_000, 100_000, 400_000, 10**6, 10**7)
        ),
    ):
        if n * s * 4 < 65536 * device.sm_count:
            continue
        made = _plan(op, (n, 1, s), "float32", "channels_first", device)
        for step in made.steps:
            if _variant_of(step):
                blocks = step.grid[0] * step.grid[1]
                assert 2 * blocks > device.sm_count, f"{op} {n} x {s} on {device.name}: {blocks} blocks, {made.regime}"


def test_split_rounds_fit_in_l2() -> None:
    """4096 x 4096 float32 exceed all shared memory. A round takes as many planes as half of L2 holds, at least one."""
    made = _plan("forward", (1, 16, 4096 * 4096), "float32", "channels_first", DEVICES["H100"])
    assert (made.regime, made.at_a_time) == ("split", 1)
    # 8 MB a plane, more than registers hold, on an L4 with 48 MB of L2: three of x in 24 MB, one of x and dy.
    for op, at_a_time in zip(OPS[:2], (3, 1), strict=True):
        made = _plan(op, (8, 64, 2_000_000), "float32", "channels_first", DEVICES["L4"])
        assert (made.regime, made.at_a_time) == ("split", at_a_time)
        moments, merge, apply, _ = made.steps
        assert moments.scopes == apply.scopes == at_a_time * moments.tiles
        assert moments.tiles == math.ceil(2_000_000 / 8192)  # 256 threads, 8 vecs of 4 each
        assert merge.grid == (at_a_time, 1)
    made = _plan("forward", (1, 2, 2_000_000), "float32", "channels_first", DEVICES["L4"])
    assert made.at_a_time == 2
    # Misaligned 16-bit planes: 4 vecs of 8 each per thread, and at most 7 elements before the first vec.
    made = _plan("backward", (1, 2, 8192 * 500), "bfloat16", "channels_first", DEVICES["L4"], aligned=False)
    assert (made.regime, made.steps[0].tiles) == ("split", 501)
    made = _plan("backward", (1, 2, 8192 * 500), "bfloat16", "channels_first", DEVICES["L4"])
    assert (made.regime, made.steps[0].tiles) == ("split", 250)


def test_subwarps_take_dense_planes_only() -> None:
    d = DEVICES["H100"]
    x, y = Layout(16 * 49, 49, 1, 0), Layout(8 * 49, 49, 1, 0)
    assert plan("forward", (20, 8, 49), "float32", "channels_first", (y, y), d).regime == "subwarp-registers"
    assert plan("forward", (20, 8, 49), "float32", "channels_first", (x, y), d).regime == "warp-registers"
    assert plan("forward", (20, 8, 49), "float32", "channels_first", (y, x), d).regime == "warp-registers"
    assert plan("forward", (1, 8, 49), "float32", "channels_first", (x, y), d).regime == "subwarp-registers"
    # One channel, sliced from many.
    x, y = Layout(16 * 49, 49, 1, 0), Layout(49, 49, 1, 0)
    assert plan("forward", (20, 1, 49), "float32", "channels_first", (x, y), d).regime == "warp-registers"
    assert plan("forward", (20, 1, 49), "float32", "channels_first", (y, y), d).regime == "subwarp-registers"


def test_access_width() -> None:
    d = DEVICES["H100"]

    def width(shape: tuple[int, int, int], dtype: str, kind: Kind, aligned: bool = True) -> tuple[int, bool]:
        made = _plan("forward", shape, dtype, kind, d, aligned)
        return made.vec_size, made.misaligned

    for dtype, itemsize in ITEMSIZE.items():
        assert width((2, 3, 49), dtype, "channels_first") == (16 // itemsize, False)
        assert width((2, 3, 49), dtype, "channels_first", aligned=False) == (16 // itemsize, True)
        assert width((2, 3, 49), dtype, "channels_last") == (1, False)
        assert width((2, 32, 49), dtype, "channels_last") == (min(4, 16 // itemsize), False)
        assert width((2, 32, 49), dtype, "channels_last", aligned=False) == (1, False)

    def misaligned(*layouts: Layout) -> bool:
        made = plan("forward", (2, 4, 49), "float32", "channels_first", layouts, d)
        assert made.vec_size == 4
        return made.misaligned

    # A slice of channels and a contiguous result: other strides between samples, but the same alignment.
    y = Layout(4 * 49, 49, 1, 1)
    assert not misaligned(Layout(8 * 49, 49, 1, 1), y)
    assert misaligned(Layout(8 * 49, 49, 1, 2), y)
    assert misaligned(Layout(8 * 49 + 1, 49, 1, 1), y)
    assert misaligned(Layout(4 * 49, 50, 1, 1), y)


def _desc(array: np.ndarray) -> ArrayDesc:
    return ArrayDesc(array.shape, array.strides, array.itemsize, array.ctypes.data % 16)


def test_layouts_read_in_place() -> None:
    x = np.zeros((2, 8, 5, 6), np.float32)
    expected = {
        "contiguous": ("channels_first", False), "channels_last": ("channels_last", False),
        "transposed": ("channels_first", True), "batch_inner": ("channels_first", True),
        "fortran": ("channels_first", True), "channel_slice": ("channels_first", False),
        "batch_slice": ("channels_first", False), "crop": ("channels_first", True),
        "every_second": ("channels_first", True), "reversed": ("channels_first", True),
        "reversed_columns": ("channels_first", True), "unaligned": ("channels_first", False),
    }  # fmt: skip
    for name, made in reference.LAYOUTS.items():
        array = made(x) if name not in ("channel_slice", "batch_slice") else np.zeros((6, 24, 5, 6), np.float32)
        array = array[:, ::3] if name == "channel_slice" else array[::3] if name == "batch_slice" else array
        kind, _, copied = choose_layout((_desc(array),))
        assert (kind, copied[0]) == expected[name], name
    # Arrays reversed along N and C, or broadcast over them, are read in place; arrays a byte off are not.
    assert choose_layout((_desc(x[::-1, ::-1]),))[2] == (False,)
    assert choose_layout((_desc(np.broadcast_to(x[:1, :1], (3, 4, 5, 6))),))[2] == (False,)
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert choose_layout((_desc(raw),))[2] == (True,)


@pytest.mark.parametrize("kind", ["channels_first", "channels_last"])
def test_contiguous_desc(kind: Kind) -> None:
    made = contiguous_desc((2, 3, 4, 5), 4, kind)
    real = np.empty((2, 3, 4, 5), np.float32)
    if kind == "channels_last":
        real = np.moveaxis(np.empty((2, 4, 5, 3), np.float32), -1, 1)
    assert made.strides == real.strides
    assert layout_of(made, kind) is not None


@pytest.mark.parametrize(("op", "times"), [("forward", 2), ("backward", 2), ("double_backward", 3)])
def test_variants_leave_few_registers_empty(op: Op, times: int) -> None:
    """With many planes, at most half of a scope's registers for its plane are empty (double backward: two thirds). For
    few planes, a block of 256 threads holds as much as a narrow one, or as two of them.
    """
    held = [
        r.size * r.vecs_per_thread * r.cluster
        for r in VARIANTS[op]
        if r.residency == "registers" and r.scope in ("warp", "block")
    ]
    clusters = [r.size * r.vecs_per_thread * r.cluster for r in VARIANTS[op] if group_of(r, op) == "cluster_registers"]
    assert len(held) >= 5
    assert len(clusters) == 3 * (op != "double_backward")
    for smaller, larger in itertools.pairwise(held + clusters):
        assert smaller <= larger <= times * smaller
    wide = [r for r in VARIANTS[op] if r.scope == "block" and r.residency == "registers" and r.threads >= 256]
    narrow = [r for r in VARIANTS[op] if r.scope == "block" and r.threads < 256]
    assert all(group_of(r, op) == "" for r in (*wide, *narrow))
    # All capacities differ, except the first wide block's: it is the largest narrow block's, or twice that.
    assert len(held) - len(set(held)) == (len(narrow) > 0 and op == "forward")
    if narrow:
        first, last = wide[0].size * wide[0].vecs_per_thread, narrow[-1].size * narrow[-1].vecs_per_thread
        assert first == last * (1 if op == "forward" else 2)


def _facts() -> list[tuple[Variant, str, str, Kind, int, bool, bool]]:
    """Return all combinations of variant, file, dtype, kind, epilogue, misaligned and masked that have kernels."""
    every = itertools.product(VARIANTS, ITEMSIZE, KINDS, range(4), (False, True), (False, True))
    pairs = ((variant, facts) for facts in every for variant in VARIANTS[facts[0]])
    return [(variant, *facts) for variant, facts in pairs if exists(variant, *facts[:5], masked=facts[5])]


def test_launch_bounds_leave_enough_registers() -> None:
    """A variant's launch bounds ask for whole blocks, at least one, and leave at least 64 registers per thread."""
    for facts in _facts():
        resident = resident_threads(*facts)
        assert resident % facts[0].threads == 0
        assert 65536 // resident >= 64


def test_resident_threads() -> None:
    """More for kernels that hold little. test_compile.py checks the registers that NVRTC then uses."""

    def expected(
        variant: Variant, file: str, dtype: str, kind: Kind, epilogue: int, misaligned: bool, masked: bool
    ) -> int:
        light = dtype in ("float16", "bfloat16", "float32") and kind == "channels_first" and not misaligned
        if light and file == "forward":
            # No epilogue, a rectifier, others. 8 vecs and an exchange between blocks, or a mask, need more registers.
            if masked and variant.vecs_per_thread >= 8:
                return (768, 768, 512)[min(epilogue, 2)]
            grouped = {"grid_registers_256x8": (1024, 768, 512), "grid_shared_512x0": (512, 512, 512)}
            grouped |= {f"cluster{size}_registers_256x8": (1024, 768, 512) for size in (4, 8, 16)}
            return grouped.get(variant.name, (1024, 1024, 512))[min(epilogue, 2)]
        if light and file == "backward" and epilogue == 0:
            few_vecs = [f"block_registers_{threads}x4" for threads in (64, 128, 256, 512)]
            return 1024 if variant.name in few_vecs else 512
        return 256 if (file, dtype, variant.scope) == ("double_backward", "float64", "subwarp") else 512

    for facts in _facts():
        assert resident_threads(*facts) == expected(*facts), facts
    # A measurement may ask for another number (bench/commands/variants.py).
    asked = dataclasses.replace(VARIANTS["forward"][-1], resident=1024)
    assert resident_threads(asked, "forward", "float64", "channels_last", 3, True) == 1024


def test_existing_kernels() -> None:
    """Kernels for channels-last, and for 16-bit arrays with an epilogue or misaligned, have no registers for 8 vecs of
    x and dy: they alone have clusters that keep these in shared memory. The split of misaligned 16-bit arrays has 4
    vecs per thread, as have those with a mask, which have no 8 vecs in 512 threads, nor, backward, beside an epilogue.
    """
    eight = {"block_registers_512x8", "grid_registers_256x8", *(f"cluster{k}_registers_256x8" for k in (4, 8, 16))}
    shared = {f"cluster{k}_shared_512x0" for k in (2, 4, 8, 16)}
    for file, *facts in itertools.product(VARIANTS, ITEMSIZE, KINDS, range(4), (False, True), (False, True)):
        dtype, kind, epilogue, misaligned, masked = facts
        names = {variant.name for variant in VARIANTS[file]}
        missing = {r.name for r in VARIANTS[file] if not exists(r, file, *facts[:4], masked=masked)}
        small = dtype in ("float16", "bfloat16")
        expected = set()
        if file == "backward":
            needy = kind == "channels_last" or (small and (epilogue or misaligned)) or (masked and epilogue)
            expected = eight if needy else shared
        elif file == "forward":
            expected |= {"subwarp_registers_128x8"} if small else set()
            expected |= {"block_registers_512x8"} if masked else set()
        elif file == "split":
            expected = {"block_registers_256x8" if masked or (small and misaligned) else "block_registers_256x4"}
        assert missing == expected <= names, (file, facts)


def test_large_counts_stay_exact() -> None:
    made = _plan("forward", (1, 1, 2**33 + 7), "float16", "channels_first", DEVICES["H100"])
    tile = 8 * 256 * 8
    assert made.steps[0].tiles == math.ceil((2**33 + 7) / tile)
    made = _plan("forward", (2**40, 2, 2), "float16", "channels_first", DEVICES["H100"])
    assert made.steps[0].scopes == 2**41
    assert made.steps[0].grid[1] > 1
    made = _plan("forward", (2**33, 2, 200), "float32", "channels_first", DEVICES["H100"])
    assert made.regime == "warp-registers"
    assert made.steps[0].grid[1] > 1
    # Clusters lie along the first dimension of a grid, which holds whole ones.
    made = _plan("forward", (2**27, 1, 100_000), "float32", "channels_first", DEVICES["H100"])
    assert made.steps[0].cluster == 16
    assert made.steps[0].grid[1] > 1
    assert made.steps[0].grid[0] % 16 == 0


def test_explain() -> None:
    x = np.zeros((20, 100, 35, 45), np.float32)
    text = cn.explain(x, device="H100")
    assert "block-registers" in text
    assert "2 accesses of 4 B per element, 16 B at a time" in text
    assert "3 accesses of 4 B" in text
    assert "read in place" in text
    assert "copied first" in cn.explain(x.transpose(0, 1, 3, 2), device="H100")
    assert "4 accesses" in cn.explain(x.transpose(0, 1, 3, 2), device="H100")
    apart = np.zeros(x.size + 1, np.float32)[1:].reshape(x.shape)
    assert "combined" not in text and "combined from two" in cn.explain(apart, device="H100")
    assert "combined" not in cn.explain(apart[..., :5, :7], device="H100")
    # A warp moves short planes together; three channels side by side form no vec.
    assert "subwarp-registers" in (short := cn.explain(x[..., :5, :7].copy(), device="H100"))
    assert short.count(", 16 B at a time") == 2
    rows = np.zeros((2, 100, 100, 3), np.float32).transpose(0, 3, 1, 2)
    assert cn.explain(rows, device="H100").count(", 4 B at a time") == 2
    # 2 M elements of float16 fit in the registers of 40 x 4 blocks of 256 threads with 8 vecs of 8 each; x and dy do
    # not fit in those of 40 x 2 blocks.
    text = cn.explain(np.zeros((1, 1, 2048, 1024), np.float16), device="T4")
    assert "forward: grid-registers" in text
    assert "backward: split" in text
    assert "refused" in cn.explain(x[:, :, :1, :1], device="H100")
    assert "empty" in cn.explain(x[:0], device="H100")
    assert "CPU" in cn.explain(x)
    assert "tiles" in cn.explain(np.zeros((1, 1, 1024, 1024), np.float16))
    with pytest.raises(ValueError, match="RTX 5090"):
        cn.explain(x, device="GTX 1")
    with pytest.raises(TypeError, match="int64"):
        cn.explain(x.astype(np.int64))
    with pytest.raises(ValueError, match="'tanh'"):
        cn.explain(x, activation="tanh", device="H100")


@pytest.mark.long
def test_explain_with_a_mask() -> None:
    """It is read as often as x; a split reads both twice."""
    text = cn.explain(np.zeros((2, 3, 35, 45), np.float32), mask=True, device="H100")
    assert text.count("a byte of the mask per element, read once") == 2
    assert "2 accesses of 4 B" in _lines(text, "forward") and "3 accesses of 4 B" in _lines(text, "backward")
    text = cn.explain(_large((1, 1, 8192, 8192)), mask=True, device="H100")
    assert text.count("a byte of the mask per element, read twice") == 2
    assert "mask" not in cn.explain(np.zeros((2, 3, 35, 45), np.float32), device="H100")
    with pytest.raises(ValueError, match="no double backward of a forward with a mask"):
        cn.explain(np.zeros((2, 3, 35, 45), np.float32), mask=True, double_backward=True)


def test_explain_parts() -> None:
    """The steps by themselves: every array is read once, and a part may have one position."""
    x = np.zeros((2, 8, 100, 400), np.float32)
    text = cn.explain(x, parts=True, activation="relu", residual=True, device="H100")
    for name, accesses, launches in (
        ("moments", 1, ("moments_block_registers_256x8", "merge_moments")),
        ("forward with moments=", 3, ("statistics_of_moments", "normalize_block_registers_256x4")),
        ("gradient sums", 3, ("gradient_sums_block_registers_256x8", "merge_gradient_sums")),
        ("backward with sums=", 5, ("means_of_sums", "input_gradient_block_registers_256x8")),
    ):
        lines = text.split(f"\n  {name}: ")[1].split("    bits")[0].splitlines()
        assert f"{accesses} accesses" in lines[2]
        assert [line.split(":")[0].strip() for line in lines[3:]] == list(launches)
    # One thread for each of 4,000 planes turns given moments, or given sums, into what the kernels read.
    many = cn.explain(np.zeros((40, 100, 9, 9), np.float32), parts=True, device="H100")
    for name in ("statistics_of_moments", "means_of_sums"):
        blocks, threads = map(int, re.search(rf"{name}: (\d+) blocks of (\d+) threads", many).groups())
        assert 4000 <= blocks * threads < 4000 + threads
    small = cn.explain(x[..., :1, :1], parts=True, device="H100")
    assert small.count("refused") == 2 and "moments_warp_registers_128x1: " in small
    assert "gradient sums" in cn.explain(x, parts=True)


@pytest.mark.long
@pytest.mark.parametrize("residual", [False, pytest.param(True, marks=pytest.mark.full)])
def test_explain_double_backward(residual: bool) -> None:
    x = np.zeros((2, 3, 1000, 1100), np.float16)
    for device in ("H100", "L4") if residual else ("H100",):
        without = cn.explain(x, residual=residual, device=device)
        text = cn.explain(x, residual=residual, double_backward=True, device=device)
        assert text.startswith(without + "\n  double backward: ")
        made, _ = plan_for("double_backward", _desc(x), "float16", DEVICES[device])
        more = text[len(without) :]
        assert f"double backward: {made.regime}" in more
        assert f" {made.accesses} accesses of 2 B" in more
        assert all(step.name in more for step in made.steps)
    transposed = cn.explain(x.swapaxes(2, 3), double_backward=True, device="H100").split("double backward: ")[1]
    assert "copied first" in transposed
    assert "7 accesses" in transposed
    assert "double backward: refused" in cn.explain(x[..., :1, :1], double_backward=True, device="H100")
    assert cn.explain(x[:0], double_backward=True) == cn.explain(x[:0])
    without = cn.explain(x, residual=residual)
    more = cn.explain(x, residual=residual, double_backward=True)[len(without) :]
    assert re.fullmatch(r"\n  double backward: NumPy, \d+ block\(s\).* tiles, .*\n  .* of \d+", more)


@pytest.mark.parametrize("ask", [cn.warmup, cn.explain])
def test_explain_and_warmup_refuse_double_backward_of_an_activation(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "compiled", False)  # else loops are compiled
    x = np.zeros((2, 3, 5, 7), np.float32)
    ask(x, activation="silu")
    ask(x, double_backward=True)
    with pytest.raises(ValueError, match="no double backward through the fused activation 'silu'"):
        ask(x, activation="silu", double_backward=True)


def _lines(text: str, op: str) -> str:
    """Return the part of an explanation about forward or backward."""
    forward, backward = text.split("\n  backward: ")
    return forward if op == "forward" else backward


def test_explain_accesses_of_an_epilogue() -> None:
    x = np.zeros((20, 100, 35, 45), np.float16)
    for activation, residual, forward, backward in [
        ("silu", False, 2, 3), (None, True, 3, 3), ("relu", True, 3, 5), (None, False, 2, 3),
    ]:  # fmt: skip
        text = cn.explain(x, activation=activation, residual=residual, device="H100")
        assert f" {forward} accesses of 2 B" in _lines(text, "forward")
        assert f" {backward} accesses of 2 B" in _lines(text, "backward")


def _large(shape: tuple[int, ...]) -> np.ndarray:
    """Return a float32 array with the shape and strides of a large one, without its memory."""
    strides = [4]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, strides)


@pytest.mark.long
def test_explain_launches() -> None:
    # 7 x 7: 4 threads with 16 of 49 elements each, backward 8 with 8 each. 128 threads take 32 of 6144 planes, or 16.
    text = cn.explain(_large((64, 96, 7, 7)), device="H100")
    assert "subwarp-registers" in text
    assert "192 blocks of 128 threads" in _lines(text, "forward")
    assert "8 plane(s) per warp" in _lines(text, "forward")
    assert "384 blocks of 128 threads" in _lines(text, "backward")
    assert "4 plane(s) per warp" in _lines(text, "backward")
    # The same if x is off by a single element.
    assert "16 B at a time" in cn.explain(np.zeros(2 * 3 * 9 + 1, np.float32)[1:].reshape(2, 3, 9), device="H100")
    # 22 500 vecs of x, and of dy, are 5.5 for each of 16 x 256 threads; 10 000 are 4.9 for each of 8 x 256.
    text = cn.explain(_large((4, 64, 300, 300)), device="H100")
    assert "360000 B of one plane stay in 6 vecs in each of 256 threads of each of 16 blocks" in _lines(text, "forward")
    assert "clusters of 16, one for each plane" in _lines(text, "forward")
    assert "720000 B of one plane stay in 12 vecs in each of 256 threads of each of" in _lines(text, "backward")
    text = cn.explain(_large((4, 64, 200, 200)), device="H100")
    assert "clusters of 8, one for each plane" in _lines(text, "forward")
    assert "clusters of 8, one for each plane" in _lines(text, "backward")
    # 518 400 vecs are 8 for each of 256 threads in 254 blocks; 132 x 4 blocks are resident, backward 132 x 2.
    text = cn.explain(_large((2, 3, 1080, 1920)), device="H100")
    assert "508 blocks of 256 threads" in _lines(text, "forward")
    assert "all resident, in groups of 254; 2 group(s), each serving one plane at a time" in _lines(text, "forward")
    assert "all resident, in groups of 254; 1 group(s), each serving one plane at a time" in _lines(text, "backward")
    # 1 200 000 vecs, more than 528 blocks hold in registers, are 18 for each of 131 x 512 threads, in shared memory:
    # 147 456 B. To these come 2 areas of 2 sums of 8 B for each of 16 warps, and the 4 numbers that a block puts.
    text = cn.explain(_large((1, 8, 2400, 2000)), device="H100")
    assert "19200000 B of one plane stay in 147984 B of shared memory of each of 131 blocks" in _lines(text, "forward")
    assert "all resident, in groups of 131; 1 group(s), each serving one plane at a time" in _lines(text, "forward")
    text = cn.explain(_large((8, 64, 1600, 1250)), device="L4")
    assert "171 rounds of the first three launches, each over 3 of 512 units; a unit is" in _lines(text, "forward")
    assert "512 rounds of the first three launches, each over 1 of 512 units" in _lines(text, "backward")
    assert "rounds of the" not in cn.explain(_large((1, 1, 4096, 4096)), device="H100")


def test_plan_for() -> None:
    x = np.zeros((2, 3, 5, 7), np.float32)
    made, copies = plan_for("backward", _desc(x), "float32", DEVICES["H100"])
    assert copies == 0
    assert made.op == "backward"
    assert made.steps[0].module == "backward"
    made, _ = plan_for("forward", _desc(x), "float32", DEVICES["H100"], "gelu", True)
    assert (made.epilogue, made.accesses) == (3, 3)
    # A residual without an activation has an epilogue in forward, none in backward.
    assert plan_for("forward", _desc(x), "float32", DEVICES["H100"], None, True)[0].epilogue == 1
    assert plan_for("backward", _desc(x), "float32", DEVICES["H100"], None, True)[0].epilogue == 0


#: Calls and their plans. The plans' numbers were chosen for speed (bench/TUNING.md), so no result shows most of them.
#: These few, of 6000 random calls and some at the borders of variants, show every change of a number or condition that
#: any of the others shows.
PLANS = Path(__file__).with_name("plans.json")
#: Devices for borders that real ones do not reach: three multiprocessors with little memory; a single one.
FICTITIOUS = {
    "little": Device("little", (9, 0), 3, 12 * 1024, 2**18, 4),
    "one": Device("one", (7, 5), 1, 48 * 1024, 2**20),
}


def _planned(call: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `_plan_call` as JSON, with the strides of each array in the kernels' arguments.

    The call's descs are strides in bytes and addresses modulo 16.
    """
    given = dict(call)
    op, inputs, residual = given.pop("op"), given.pop("inputs"), given["residual"]
    names = sum(ops.OPS[op].tensors(inputs - residual, residual), ())
    dtype, shape, device = (given.pop(name) for name in ("dtype", "shape", "device"))
    sizes = itertools.chain([INPUT_ITEMSIZE[given.get("input") or dtype]], itertools.repeat(ITEMSIZE[dtype]))
    descs = tuple(
        ArrayDesc(tuple(shape), tuple(s), size, misalignment)
        for (s, misalignment), size in zip(given.pop("descs"), sizes, strict=False)
    )
    device = FICTITIOUS.get(device) or DEVICES[device]
    made = _plan_call(op, descs, names, cn.devices.dtype_of(dtype), device, **given)
    templates = [np.frombuffer(planned.template, STRUCTS[planned.step.kernel])[0] for planned in made.steps]

    def strides(name: str) -> list[int]:
        first, *inner = name.split(".")
        tensor = next(template for template in templates if first in template.dtype.fields)[first]
        for part in inner:
            tensor = tensor[part]
        return [int(tensor[axis]) for axis in "ncs"]

    planned = {
        "kind": made.kind, "copied": made.copied, "strides": [strides(name) for name in names], "plan": made.plan,
        "modules": [planned.module for planned in made.steps],
    }  # fmt: skip
    return json.loads(json.dumps(planned, default=dataclasses.asdict))


def test_recorded_plans() -> None:
    """After an intended change, review the differences in plans.json."""
    for entry in json.loads(PLANS.read_text(encoding="utf-8")):
        assert _planned(entry["call"]) == entry["planned"], entry["call"]


def test_kernels_are_compiled_for_their_launches() -> None:
    """Each launch has the threads and the cluster that its kernel's source asks for. (A GPU refuses more threads than
    a kernel was compiled for, and the emulator does not; test_compile shows that the compiler heeds the source.)"""
    for entry in json.loads(PLANS.read_text(encoding="utf-8")):
        planned = entry["planned"]
        for step, named in zip(planned["plan"]["steps"], planned["modules"], strict=True):
            module = Module(**named)
            variant = _named(step["name"])
            blocks = module.blocks(variant) if variant else 1
            assert bounds_of(module)[step["name"]] == (step["threads"], blocks, step["cluster"]), step["name"]


if __name__ == "__main__":
    calls = [entry["call"] for entry in json.loads(PLANS.read_text(encoding="utf-8"))]
    rows = [json.dumps({"call": call, "planned": _planned(call)}) for call in calls]
    PLANS.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
