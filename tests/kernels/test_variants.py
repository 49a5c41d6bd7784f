"""Which variant of the kernels a plan chooses, and which variants there are."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from helpers.plans import KINDS, OPS, plan_of, variant_of

from cupynorm.cuda.device import DEVICES
from cupynorm.cuda.layout import Layout
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import Plan, plan
from cupynorm.cuda.variants import ITEMSIZE, VARIANTS, Kind, Variant, exists, group_of, resident_threads


def _regimes(
    op: Op, device: str, dtype: str, sizes: list[int], planes: int = 4096, epilogue: int = 0, aligned: bool = True
) -> list[str]:
    """Return the regimes of channels-first planes, with the size of a cluster in place of its name."""
    made = [plan_of(op, (1, planes, s), dtype, "channels_first", DEVICES[device], aligned, epilogue) for s in sizes]
    return [
        p.regime.replace("cluster", str(p.steps[0].cluster)) if _grouped(p) else p.regime.replace("-registers", "")
        for p in made
    ]


def _grouped(made: Plan) -> bool:
    return made.steps[0].cluster > 1 or made.steps[0].cooperative


def _blocks(op: Op, planes: int, size: int) -> str:
    """Return scope, threads and vecs per thread of channels-first float32 planes on an H100."""
    made = plan_of(op, (1, planes, size), "float32", "channels_first", DEVICES["H100"])
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
            made = plan_of(op, (64, 96, size), dtype, "channels_first", d)
            assert (made.regime, made.steps[0].vecs_per_thread) == ("subwarp-registers", expected), (op, dtype, size)
            assert made.steps[0].subwarp_size == max(1, 2 ** math.ceil(math.log2(size / expected)))
    # At most 128 elements and 512 B.
    for dtype, most in (("float16", 128), ("float32", 128), ("float64", 64)):
        assert plan_of("forward", (64, 96, most), dtype, "channels_first", d).regime == "subwarp-registers"
        assert plan_of("forward", (64, 96, most + 1), dtype, "channels_first", d).regime == "warp-registers"


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
        made = plan_of(op, (n, 1, s), "float32", "channels_first", device)
        for step in made.steps:
            if variant_of(step):
                blocks = step.grid[0] * step.grid[1]
                assert 2 * blocks > device.sm_count, f"{op} {n} x {s} on {device.name}: {blocks} blocks, {made.regime}"


def test_split_rounds_fit_in_l2() -> None:
    """4096 x 4096 float32 exceed all shared memory. A round takes as many planes as half of L2 holds, at least one."""
    made = plan_of("forward", (1, 16, 4096 * 4096), "float32", "channels_first", DEVICES["H100"])
    assert (made.regime, made.at_a_time) == ("split", 1)
    # 8 MB a plane, more than registers hold, on an L4 with 48 MB of L2: three of x in 24 MB, one of x and dy.
    for op, at_a_time in zip(OPS[:2], (3, 1), strict=True):
        made = plan_of(op, (8, 64, 2_000_000), "float32", "channels_first", DEVICES["L4"])
        assert (made.regime, made.at_a_time) == ("split", at_a_time)
        moments, merge, apply, _ = made.steps
        assert moments.scopes == apply.scopes == at_a_time * moments.tiles
        assert moments.tiles == math.ceil(2_000_000 / 8192)  # 256 threads, 8 vecs of 4 each
        assert merge.grid == (at_a_time, 1)
    made = plan_of("forward", (1, 2, 2_000_000), "float32", "channels_first", DEVICES["L4"])
    assert made.at_a_time == 2
    # Misaligned 16-bit planes: 4 vecs of 8 each per thread, and at most 7 elements before the first vec.
    made = plan_of("backward", (1, 2, 8192 * 500), "bfloat16", "channels_first", DEVICES["L4"], aligned=False)
    assert (made.regime, made.steps[0].tiles) == ("split", 501)
    made = plan_of("backward", (1, 2, 8192 * 500), "bfloat16", "channels_first", DEVICES["L4"])
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
        made = plan_of("forward", shape, dtype, kind, d, aligned)
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
