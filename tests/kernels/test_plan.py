"""Plans can be launched on every device for every shape, and say how many accesses their kernels make.

`PYTHONPATH=.:tests python tests/kernels/test_plan.py` rewrites the plans in plans.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.bounds import bounds_of
from helpers.cases import BLOCKS
from helpers.plans import DOUBLE, KINDS, OPS, desc_of, plan_of, variant_named, variant_of
from helpers.recorder import Recorder

import cupynorm as cn
from cupynorm.cuda import ops
from cupynorm.cuda.device import DEVICES, Device
from cupynorm.cuda.layout import choose_layout, contiguous_desc, layout_of
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import MAX_GRID, Plan, Step
from cupynorm.cuda.source import Module
from cupynorm.cuda.trace import Slot, Tracer
from cupynorm.cuda.variants import ITEMSIZE, Kind, Variant, exists, group_of, resident_threads

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
#: Epilogue and residual. A residual alone has an epilogue without activation, and no epilogue in backward.
EPILOGUES = [(0, False), (1, False), (1, True), (3, True)]


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
    variant = variant_of(step)
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
        made = plan_of(op, shape, dtype, kind, device, aligned, epilogue, residual)
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
        made = plan_of(
            "frozen_backward", (4, 8, 40_000), "float32", "channels_first", d, True, epilogue, residual, sums
        )
        assert made.accesses == accesses
        assert len(made.steps) == (3 if sums else 1)


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
        kind, _, copied = choose_layout((desc_of(array),))
        assert (kind, copied[0]) == expected[name], name
    # Arrays reversed along N and C, or broadcast over them, are read in place; arrays a byte off are not.
    assert choose_layout((desc_of(x[::-1, ::-1]),))[2] == (False,)
    assert choose_layout((desc_of(np.broadcast_to(x[:1, :1], (3, 4, 5, 6))),))[2] == (False,)
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert choose_layout((desc_of(raw),))[2] == (True,)


@pytest.mark.parametrize("kind", ["channels_first", "channels_last"])
def test_contiguous_desc(kind: Kind) -> None:
    made = contiguous_desc((2, 3, 4, 5), 4, kind)
    real = np.empty((2, 3, 4, 5), np.float32)
    if kind == "channels_last":
        real = np.moveaxis(np.empty((2, 4, 5, 3), np.float32), -1, 1)
    assert made.strides == real.strides
    assert layout_of(made, kind) is not None


def test_large_counts_stay_exact() -> None:
    made = plan_of("forward", (1, 1, 2**33 + 7), "float16", "channels_first", DEVICES["H100"])
    tile = 8 * 256 * 8
    assert made.steps[0].tiles == math.ceil((2**33 + 7) / tile)
    made = plan_of("forward", (2**40, 2, 2), "float16", "channels_first", DEVICES["H100"])
    assert made.steps[0].scopes == 2**41
    assert made.steps[0].grid[1] > 1
    made = plan_of("forward", (2**33, 2, 200), "float32", "channels_first", DEVICES["H100"])
    assert made.regime == "warp-registers"
    assert made.steps[0].grid[1] > 1
    # Clusters lie along the first dimension of a grid, which holds whole ones.
    made = plan_of("forward", (2**27, 1, 100_000), "float32", "channels_first", DEVICES["H100"])
    assert made.steps[0].cluster == 16
    assert made.steps[0].grid[1] > 1
    assert made.steps[0].grid[0] % 16 == 0


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
    """Return a planned call as JSON, with the strides of each array in the kernels' arguments.

    The call's descs are strides in bytes and addresses modulo 16.
    """
    given = dict(call)
    op, inputs, residual = given.pop("op"), given.pop("inputs"), given["residual"]
    dtype, shape, device = (given.pop(name) for name in ("dtype", "shape", "device"))
    dtype, own = cn.devices.dtype_of(dtype), cn.devices.dtype_of(given.pop("input", "") or dtype)
    slots = [
        Slot(tuple(shape), tuple(strides), dtype if number else own, misalignment)
        for number, (strides, misalignment) in enumerate(given.pop("descs"))
    ]
    arrays, rest = tuple(slots[: inputs - residual]), slots[inputs - residual :]
    work = Tracer(Recorder(BLOCKS), FICTITIOUS.get(device) or DEVICES[device], given.pop("invariant"), ())
    made = {"residual": rest[0] if residual else None, "out": rest[residual] if len(rest) > residual else None}
    mask = Slot(tuple(shape), (0,) * len(shape), np.dtype(bool))
    given["mask"] = mask if given.pop("masked", False) else None
    work.plan(op, arrays, dtype=dtype, **given | made)
    names = sum(ops.OPS[op].tensors(len(arrays), residual), ())
    sizes = work.steps[0].sizes
    copied = [any(copy.source is slot for copy in work._first) for slot in slots]
    if made["out"] is not None:
        copied[-1] = work.out not in work.targets.values()
    planned = {
        "kind": work.kind, "copied": copied, "strides": [[sizes[f"{name}.{axis}"] for axis in "ncs"] for name in names],
        "plan": work.planned, "modules": [planned.module for planned in work.steps],
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
            variant = variant_named(step["name"])
            blocks = module.blocks(variant) if variant else 1
            assert bounds_of(module)[step["name"]] == (step["threads"], blocks, step["cluster"]), step["name"]


if __name__ == "__main__":
    calls = [entry["call"] for entry in json.loads(PLANS.read_text(encoding="utf-8"))]
    rows = [json.dumps({"call": call, "planned": _planned(call)}) for call in calls]
    PLANS.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
