"""Layouts of the compiled loops: which arrays are read in place, where their elements are, which layouts are cached."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.backends import traced_memory, use_compiled
from helpers.compare import assert_equal, assert_same
from helpers.loops import forget_layouts, llvm_machine, loops_path, loops_places

import cupynorm as cn
from cupynorm import cpu
from cupynorm.cpu import numpy_small
from cupynorm.cpu.blocking import Arrays

pytestmark = [pytest.mark.usefixtures("threads_as_they_were"), pytest.mark.compiled]


@pytest.fixture(autouse=True)
def with_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiled(monkeypatch, True)


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_results_written_past_the_caches(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str):
    """The same bits as in the ordinary way, wherever lines of the cache begin and end, and nothing beside them."""
    monkeypatch.setattr(loops_path, "PAYS", 1)
    forget_layouts(monkeypatch)
    for _ in range(8):
        shape = (2, 3, *map(int, rng.integers(47, 60, 2)))  # planes too long for those that are done side by side
        x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        y, saved = cn.instance_norm_forward(x)
        dx = cn.instance_norm_backward(dy, saved)[0]

        memory = np.full(x.size + 400, 7, dtype)
        start = int(rng.integers(64, 128))
        out = memory[start : start + x.size].reshape(shape)
        with pytest.MonkeyPatch.context() as patch:
            layouts: list[Any] = []
            patch.setattr(loops_path, "STREAM", 0)
            patch.setattr(
                loops_path, "_layout", lambda *given, met=layouts: met.append(loops_path.Layout(*given)) or met[-1]
            )
            assert_same(cn.instance_norm(x, out=out), y)
            assert_same(cn.instance_norm_backward(dy, saved, out=out)[0], dx)
        assert [layout.streams for layout in layouts] == [True, True]
        assert (memory[:start] == 7).all() and (memory[start + x.size :] == 7).all()


def test_strided_input_is_read_in_place(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """All layouts that the loops can address go to them, whatever the array's strides."""
    x = rng.standard_normal((2, 6, 10, 12), dtype=np.float32)
    last = channels_last(x)
    views = [x, x[:, ::2], x[::-1], x[..., ::-1], x[..., 1:-1], x[:, :, ::2, ::3], x.swapaxes(2, 3), x.T]
    for view in (*views, last, last[:, 1:4], np.broadcast_to(x[:1, :1], x.shape)):
        y = np.empty(view.shape, np.float32)
        assert isinstance(work_of(view, y), loops_path.CompiledWork)
        cn.instance_norm(view, out=y)
        reference.assert_close(y, reference.forward(view), "float32")
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)  # not aligned
    records = np.zeros(x.shape, [("a", np.float32), ("b", np.int8)])["a"]  # strides are no multiples of 4 bytes
    for view in (odd, records):
        view[...] = x
        assert type(work_of(view, x)) is numpy_small.SmallWork
        reference.assert_close(cn.instance_norm(view), reference.forward(x), "float32")


def test_strides_of_fractional_elements_are_unusable():
    even, odd = (96, 32, 8, 4), (98, 32, 8, 4)
    table = [(Arrays(even, even), True), (Arrays(even, odd), False), (Arrays(even, even, odd), False)]
    table.append((Arrays(even, even, mask=(24, 8, 2, 1)), True))  # its elements are bytes
    for strides, usable in table:
        assert loops_path.Layout(np.dtype(np.float32), (2, 3, 4, 2), strides).usable == usable


def test_processors_that_cannot_convert_float16(monkeypatch: pytest.MonkeyPatch):
    """There NumPy computes float16 alone: without the instructions, the compiled loops would need a library."""
    monkeypatch.setattr(llvm_machine, "converts_halves", lambda: False)
    forget_layouts(monkeypatch)
    for dtype, alone in (("float16", True), ("float32", False), ("bfloat16", False), ("float64", False)):
        x = np.ones((2, 3, 4), cn.devices.dtype_of(dtype))
        stats = np.empty((3, 2, 3), np.float64 if dtype == "float64" else np.float32)
        work = cpu._choose(cn.Saved(x, stats, None, None, True), Arrays(x, x))
        assert (type(work) is numpy_small.SmallWork) == alone, dtype


def work_of(x: np.ndarray, y: np.ndarray) -> Any:
    stats = np.empty((3, *x.shape[:2]), np.float32)
    return cpu._choose(cn.Saved(x, stats, None, None, True), Arrays(x, y))


def test_addresses(rng: np.random.Generator, tmp_path: Path):
    x = rng.standard_normal((4, 5, 6))
    mapped = np.memmap(tmp_path / "x", np.float16, "w+", shape=(3, 40))
    bytes_of = np.frombuffer(bytes(range(200)), np.float32)
    views = [x[1:, 2:], x[::-1], x.T, x[..., 3], np.broadcast_to(x[0, 0, 5], (2, 3)), np.asfortranarray(x), x[3, 4, 5:]]
    for array in (x, *views, mapped, mapped[1:], bytes_of[3:], np.empty(3, cn.devices.dtype_of("bfloat16"))[1:]):
        assert loops_path.address_of(array) == array.__array_interface__["data"][0] == array.ctypes.data


@pytest.mark.parametrize("backward", [False, True])
def test_layouts_find_every_element(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, backward: bool):
    """The loops' tables agree with any strides, and tiles hold each position of a plane once.

    Positions are in the same order in all arrays. Windows have tables of their own, which test_moves tests.
    """
    seen = {"rows": 0, "channels last": 0, "moved": 0}
    monkeypatch.setattr(loops_path, "MIN_CHANNELS_COMPILED", 1)
    for _ in range(400):
        monkeypatch.setattr(loops_path, "TILE", int(np.exp2(rng.uniform(0, 8))))
        dtype = cn.devices.dtype_of(str(rng.choice(["float16", "bfloat16", "float32", "float64"])))
        n, c, *spatial = map(int, rng.integers(1, 6, rng.integers(3, 6)) ** rng.integers(1, 3))
        c *= 16 if rng.random() < 0.3 else 1
        shape = (n, c, *spatial)
        if math.prod(shape) > 10**5:  # too slow
            continue
        bytes_of_one = math.prod(shape) * dtype.itemsize
        monkeypatch.setattr(loops_path, "STREAM", bytes_of_one + int(rng.integers(-1, 2)))
        monkeypatch.setattr(loops_path, "LONG_RUN", int(rng.choice([1, 5, 25])))
        count, fused = (3, 5) if backward else (2, 3), rng.random() < 0.5
        found = []
        usual = rng.random() < 0.8
        for _ in range(count[fused]):
            steps, order = [dtype.itemsize] * len(shape), rng.permutation(len(shape))
            if usual:  # the same order for all, sometimes with gaps
                order = np.array([*range(len(shape))] if c % 16 else [0, *range(2, len(shape)), 1])
            for i in reversed(range(len(shape) - 1)):
                after = order[i + 1]
                steps[order[i]] = steps[after] * (shape[after] + int(rng.random() < 0.1))
            found.append(tuple(-s if rng.random() < 0.02 else s for s in steps))
        strides = Arrays(*found) if backward else Arrays(*found[:2], residual=found[2] if fused else None)
        made = loops_path.Layout(dtype, shape, strides)
        print(shape, strides, loops_path.TILE)
        assert made.usable
        channels_last = made.channels_last
        numbers = dict(zip(loops_places.GEOMETRY, made.geometry.tolist(), strict=True))
        assert made.geometry_address == made.geometry.ctypes.data
        assert (numbers["run_table"], numbers["counts"]) == (made.runs.ctypes.data, made.counts.ctypes.data)
        channels, group, tiles, runs, length, tile_runs, tile_length, plane, sums = (
            numbers[name]
            for name in (
                "channels", "group", "tiles", "runs", "length", "tile_runs", "tile_length", "plane", "sums"
            )
        )  # fmt: skip
        assert channels == c and runs * length == np.prod(spatial) == plane == made.counts.sum()
        assert len(made.counts) == tiles == made.tiles and (made.counts > 0).all()
        seen["moved" if made.windows else "channels last" if channels_last else "rows"] += 1
        shortest = min(made.counts) if made.windows else min(tile_length, length % tile_length or length)
        shortest = (c % group or group) if channels_last else shortest
        widest = 8 if dtype == np.float64 else 16  # lanes, or more in long rows
        assert made.lanes in (1, 2, 4, 8, 16, 32)
        assert min(shortest, widest) // 2 < made.lanes <= shortest
        if made.windows:
            assert not (channels_last or made.streams)
            assert group == 1 and made.blocks == n * c == sums
            continue
        assert sums == 0
        strides_of = [[numbers[f"{array}_{axis}"] for axis in "ncp"] for array in loops_places.ARRAYS]
        first: Any = None
        for (of_n, of_c, of_s), begins, given in zip(strides_of, made.runs, strides, strict=True):
            each = strides.x if given is None else given  # x stands for absent arrays
            offsets = sum(i * s for i, s in zip(np.indices(shape), each, strict=True)) // dtype.itemsize
            along = (begins[:, None] + np.arange(length) * of_s).ravel()
            reached = np.arange(n)[:, None, None] * of_n + np.arange(c)[:, None] * of_c + along
            expected = offsets.reshape(n, c, -1)
            if first is None:  # the order of x's positions: its offsets are all different
                first = np.argsort(expected[0, 0])[np.argsort(np.argsort(along))]
            assert_equal(reached, expected[:, :, first])
        contiguous = length == 1 or all(each[2] == 1 for each in strides_of)
        if channels_last:
            assert all(each[1] == 1 for each in strides_of)
        else:
            assert contiguous and (runs == 1 or length >= loops_path.LONG_RUN)
        large = length >= loops_path.LONG_RUN and bytes_of_one >= loops_path.STREAM
        assert made.streams == (not channels_last and large)
        assert (group > 1) <= channels_last and made.blocks == n * -(-c // group) and made.group == group
        line = 64 // dtype.itemsize
        assert group == 1 or line <= group < 2 * max(256, line)
        assert group == 1 or (c - 1) % group + 1 >= line  # also the last group holds a vector
        assert tiles == -(-runs // tile_runs) * -(-length // tile_length)
        assert tile_runs == 1 or tile_length == length
        assert tile_runs * tile_length * group <= max(2 * loops_path.TILE, group)
        assert tiles == 1 or group * runs * length > loops_path.TILE
    assert min(seen.values()) > 10, seen


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_groups_of_channels_have_the_widest_vectors(dtype: str) -> None:
    """Whatever the planes' size: `warmup` need not know it, and no call on many channels goes one by one."""
    itemsize = np.dtype(dtype).itemsize
    lanes = set()
    for c in (16, 24, 32, 33, 40, 48, 56, 64, 68, 84, 100, 128, 241, 258, 273, 290, 307, 545, 1000, 2049):
        for side in (3, 8, 40, 80, 300):
            strides = tuple(itemsize * step for step in (c * side * side, 1, c * side, c))
            made = loops_path.Layout(np.dtype(dtype), (2, c, side, side), Arrays(strides, strides))
            if made.channels_last:
                lanes.add(made.lanes)
                assert made.group <= c
    assert lanes == {64 // max(itemsize, 4)}


@pytest.mark.parametrize(("shape", "streams"), [
    ((12, 512, 32, 32), True), ((12, 512, 32, 31), False), ((1, 49_152, 128), True), ((1, 50_000, 127), False),
])  # fmt: skip
def test_results_written_past_the_caches_are_large(
    shape: tuple[int, ...], streams: bool, monkeypatch: pytest.MonkeyPatch
):
    """At least 24 MiB, as docs/internals/kernels.md says, in runs of at least 128 elements."""
    strides = np.empty(shape, np.float32).strides
    assert loops_path.Layout(np.dtype(np.float32), shape, Arrays(strides, strides)).streams == streams


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_read_and_written_right(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """In tracked eval with mean 0 and variance 1 a call only converts."""
    kind = cn.devices.dtype_of(dtype)
    x = np.arange(2**16, dtype=np.uint16).view(kind).reshape(1, 1, -1)
    weight, one, zero = (np.array([v], np.float32) for v in (1, 1, 0))
    y = cn.instance_norm(x, zero, one, weight, None, False, eps=0)
    wide = x.astype(np.float32)
    finite = ~np.isnan(wide)
    assert_same(y.view(np.uint16)[finite & (wide != 0)], x.view(np.uint16)[finite & (wide != 0)])
    assert np.isnan(y.astype(np.float32)[~finite]).all()
    # Values between the numbers: a bias too small for 16 bits moves them to and over the middle between two.
    for scale in (2.0**-4, 1 + 2.0**-8 + 2.0**-12, 1 + 2.0**-9, 1 + 2.0**-11, 1 - 2.0**-9):
        with np.errstate(all="ignore"):
            expected = (wide * np.float32(scale)).astype(kind)
        y = cn.instance_norm(x, zero, one, np.array([scale], np.float32), None, False, eps=0)
        same = finite & (wide != 0)
        assert_same(y.view(np.uint16)[same], expected.view(np.uint16)[same])


def test_layout_cache_is_bounded(monkeypatch: pytest.MonkeyPatch):
    for n, c in itertools.product(range(1, 40), range(1, 40)):
        cn.instance_norm(np.ones((n, c, 2), np.float32))
    caches = loops_path._layout.cache_info(), loops_path._large_layout.cache_info()
    assert [cache.maxsize for cache in caches] == [1024, 4]
    assert all(cache.currsize <= cache.maxsize for cache in caches)


def test_memory_of_cached_layouts_is_limited(monkeypatch: pytest.MonkeyPatch):
    """Tables of planes of many runs are large, up to 2.5 MiB: four of them are kept."""
    steps = 4 * 129 * 230 * 360, 4 * 129 * 230 * 360, 4 * 129 * 230, 4 * 129, 4
    with traced_memory():
        before = tracemalloc.get_traced_memory()[0]
        for i in range(160, 280):
            layout = loops_path.layout_of(np.dtype(np.float32), (1, 1, i, 230, 128), Arrays(steps, steps, steps))
            assert layout.usable and layout.runs.nbytes == len(Arrays._fields) * 8 * 230 * i
        assert tracemalloc.get_traced_memory()[0] - before < 12 * 2**20


@pytest.mark.parametrize("runs", [2, 500, 1000])
def test_layout_cache_keeps_short_tables(runs: int):
    """Even a thousand runs in each of five arrays, and while layouts of more runs come and go."""
    strides = Arrays(*[(8 * 128 * runs, 8 * 128 * runs, 8 * 128, 4)] * len(Arrays._fields))
    given = np.dtype(np.float32), (1, 2, runs, 128), strides
    layout = loops_path.layout_of(*given)
    for i in range(10):
        loops_path.layout_of(np.dtype(np.float32), (1, 2, 2000 + i, 128), strides)
    assert loops_path.layout_of(*given) is layout
