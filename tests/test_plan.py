"""Plans: launchable on every device for every shape, and true to what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference

import cupynorm as cn
from cupynorm.cuda.plan import (
    DEVICES,
    ITEMSIZE,
    LADDERS,
    MAX_GRID,
    Device,
    Kind,
    Layout,
    Memory,
    Plan,
    arrange,
    fresh,
    layout,
    plan,
    resident_threads,
)
from cupynorm.explain import plan_for

SHAPES = [
    (1, 1, 2), (1, 1, 2**24), (1, 1, 2**31 + 1), (1, 3, 2**33 + 7), (1, 32, 1080 * 1920), (2, 320, 64), (2, 3, 49),
    (3, 5, 1575), (12, 512, 16), (12, 512, 1024), (20, 64, 184 * 248), (20, 100, 1575), (2, 32, 128**3), (32, 80, 5325),
    (10_000_000, 3, 4), (70_000, 70_000, 2), (2**33, 2, 2), (1, 1, 57_000), (1, 1, 58_112), (200, 300, 29_000),
]  # fmt: skip
OPS = ("forward", "backward", "evaluate", "eval_gradient")


def _plan(op: str, shape: tuple[int, int, int], dtype: str, kind: Kind, device: Device, aligned: bool = True) -> Plan:
    _, c, s = shape
    stride = (c * s, s, 1) if kind == "channels_first" else (c * s, 1, c)
    first = Layout(*stride, 0 if aligned else 1)
    arrays = 3 if op in ("backward", "eval_gradient") else 2
    return plan(op, shape, dtype, kind, (first, *[Layout(*stride, 0)] * (arrays - 1)), device)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("op", OPS)
def test_every_shape_gets_a_launchable_plan(op: str, device: Device) -> None:
    for shape, dtype, kind, aligned in itertools.product(
        SHAPES, ITEMSIZE, ("channels_first", "channels_last"), (True, False)
    ):
        made = _plan(op, shape, dtype, kind, device, aligned)
        for step in made.steps:
            assert 1 <= step.grid[0] <= MAX_GRID
            assert 1 <= step.grid[1] <= 65535
            assert step.threads <= 1024
            assert step.threads % 32 == 0
            assert 0 <= step.shared <= device.shared_per_block
            # Nobody is left out: enough owners for all planes and all their elements.
            if step.owners:
                owner = 32 if "warp" in step.name else step.threads
                assert step.grid[0] * step.grid[1] * step.threads >= step.owners * owner
                assert step.owners == made.stripes * step.tiles
                per_stripe = 1 if kind == "channels_first" else made.vector * made.lanes
                assert made.stripes * per_stripe >= shape[0] * shape[1]
                rung = next(r for r in LADDERS[step.module] if step.name.endswith(r.name))
                held = step.tiles * (step.chunks or rung.chunks) * owner // made.lanes
                held *= made.vector if kind == "channels_first" else 1
                assert held >= shape[2]
        assert (
            made.accesses
            == {
                "forward": 3 if made.regime == "split" else 2,
                "backward": 5 if made.regime == "split" else 3,
                "evaluate": 2,
                "eval_gradient": 3,
            }[op]
        )
        assert made.bytes_per_element == made.accesses * ITEMSIZE[dtype]
        assert made.reason


def _regimes(op: str, device: str, dtype: str, sizes: list[int], planes: int = 4096) -> list[str]:
    return [_plan(op, (1, planes, s), dtype, "channels_first", DEVICES[device]).regime for s in sizes]


def test_the_ladder_on_an_h100() -> None:
    """Owners grow with the plane: the borders of a large batch."""
    sizes = [32, 1024, 1025, 16384, 16385, 57_000, 58_500, 2**24]
    assert _regimes("forward", "H100", "float32", sizes) == [
        "warp-registers", "warp-registers", "block-registers", "block-registers",
        "block-shared", "block-shared", "split", "split",
    ]  # fmt: skip
    assert _regimes("backward", "H100", "float32", [512, 513, 8192, 8193, 28_000, 30_000]) == [
        "warp-registers", "block-registers", "block-registers", "block-shared", "block-shared", "split",
    ]  # fmt: skip


def test_shared_memory_decides_where_planes_are_split() -> None:
    # 20,000 float32 are 80 KB: too much for a T4 (64 KB), not for an L4 (99 KB).
    assert _regimes("forward", "T4", "float32", [20_000]) == ["split"]
    assert _regimes("forward", "L4", "float32", [20_000]) == ["block-shared"]
    assert _regimes("forward", "A100", "float32", [40_000]) == ["block-shared"]
    assert _regimes("forward", "RTX 5090", "float32", [40_000]) == ["split"]


def test_few_planes_go_up_one_owner() -> None:
    """A handful of planes would leave the device idle with a warp, or one block, for each."""
    assert _regimes("forward", "H100", "float32", [1000], planes=8) == ["block-registers"]
    assert _regimes("forward", "H100", "float32", [50_000], planes=8) == ["split"]
    assert _regimes("forward", "H100", "float32", [50_000], planes=500) == ["block-shared"]


def test_access_width() -> None:
    d = DEVICES["H100"]
    for dtype, itemsize in ITEMSIZE.items():
        assert _plan("forward", (2, 3, 49), dtype, "channels_first", d).vector == 16 // itemsize
        assert _plan("forward", (2, 3, 49), dtype, "channels_first", d, aligned=False).vector == 1
        assert _plan("forward", (2, 3, 49), dtype, "channels_last", d).vector == 1
        assert _plan("forward", (2, 32, 49), dtype, "channels_last", d).vector == min(4, 16 // itemsize)
    # A slice of channels into a contiguous result: other strides between samples, but the same alignment.
    x, y = Layout(8 * 49, 49, 1, 1), Layout(4 * 49, 49, 1, 1)
    assert plan("forward", (2, 4, 49), "float32", "channels_first", (x, y), d).vector == 4
    x = Layout(8 * 49 + 1, 49, 1, 1)
    assert plan("forward", (2, 4, 49), "float32", "channels_first", (x, y), d).vector == 1


def _memory(array: np.ndarray) -> Memory:
    return Memory(array.shape, array.strides, array.itemsize, array.ctypes.data % 16)


def test_what_is_read_in_place() -> None:
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
        kind, _, copied = arrange((_memory(array),))
        assert (kind, copied[0]) == expected[name], name
    # Backwards along N and C, and broadcast over them, is in place too; a byte off an element is not.
    assert arrange((_memory(x[::-1, ::-1]),))[2] == (False,)
    assert arrange((_memory(np.broadcast_to(x[:1, :1], (3, 4, 5, 6))),))[2] == (False,)
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert arrange((_memory(raw),))[2] == (True,)


@pytest.mark.parametrize("kind", ["channels_first", "channels_last"])
def test_fresh_arrays_fit_their_kind(kind: Kind) -> None:
    made = fresh((2, 3, 4, 5), 4, kind)
    real = np.empty((2, 3, 4, 5), np.float32)
    if kind == "channels_last":
        real = np.moveaxis(np.empty((2, 4, 5, 3), np.float32), -1, 1)
    assert made.strides == real.strides
    assert layout(made, kind) is not None


def test_registers_fit_the_threads() -> None:
    """A rung's launch bounds leave at least 64 registers a thread, and one block at the least."""
    for file, rungs in LADDERS.items():
        for dtype in ITEMSIZE:
            for kind in ("channels_first", "channels_last"):
                resident = resident_threads(file, dtype, kind)
                assert all(resident % rung.threads == 0 for rung in rungs)
                assert 65536 // resident >= 64


def test_large_counts_stay_exact() -> None:
    made = _plan("forward", (1, 1, 2**33 + 7), "float16", "channels_first", DEVICES["H100"])
    tile = 4 * 256 * 8
    assert made.steps[0].tiles == math.ceil((2**33 + 7) / tile)
    made = _plan("forward", (2**33, 2, 2), "float16", "channels_first", DEVICES["H100"])
    assert made.steps[0].owners == 2**34
    assert made.steps[0].grid[1] > 1


def test_explain() -> None:
    x = np.zeros((20, 100, 35, 45), np.float32)
    text = cn.explain(x, device="H100")
    assert "block-registers" in text
    assert "2 accesses of 4 B per element, 16 B at a time" in text
    assert "3 accesses of 4 B" in text
    assert "read in place" in text
    assert "copied first" in cn.explain(x.transpose(0, 1, 3, 2), device="H100")
    assert "4 accesses" in cn.explain(x.transpose(0, 1, 3, 2), device="H100")
    assert "split" in cn.explain(np.zeros((1, 1, 1024, 1024), np.float16), device="T4")
    assert "refused" in cn.explain(x[:, :, :1, :1], device="H100")
    assert "empty" in cn.explain(x[:0], device="H100")
    assert "CPU" in cn.explain(x)
    assert "tiles" in cn.explain(np.zeros((1, 1, 1024, 1024), np.float16))
    with pytest.raises(ValueError, match="RTX 5090"):
        cn.explain(x, device="GTX 1")
    with pytest.raises(TypeError, match="int64"):
        cn.explain(x.astype(np.int64))


def test_explained_plan_is_the_plan_of_the_call() -> None:
    x = np.zeros((2, 3, 5, 7), np.float32)
    made, copies = plan_for("backward", _memory(x), "float32", DEVICES["H100"])
    assert copies == 0
    assert made.op == "backward"
    assert made.steps[0].module == "backward"
