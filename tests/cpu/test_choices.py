"""Decisions of the CPU backend that show in no result, or only in its last digits: every position is visited once, the
precision of sums, how tiles are merged, how much memory a call takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.backends import use_compiled
from helpers.compare import assert_allclose, assert_equal
from helpers.loops import numba_backward, numba_forward, numba_geometry, numba_path

import cupynorm as cn
from cupynorm import cpu
from cupynorm.cpu import blocking, gelu, numpy_activations, numpy_double, numpy_path
from cupynorm.cpu.blocking import Arrays
from cupynorm.cpu.numpy_double import DoubleArrays

pytestmark = pytest.mark.usefixtures("threads_as_they_were")


def as_channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def saved_of(shape: tuple[int, ...], steps: Sequence[int], activation: str | None = None) -> cn.Saved:
    """Return Saved of an array with these strides, in elements, that takes no memory: it must not be read."""
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, [4 * step for step in steps])
    stats = np.zeros((3, *shape[:2]), np.float32)
    return cn.Saved(x, *stats[:2], None, None, True, stats[2], activation)


def steps_of(shape: tuple[int, ...], channels_last: bool = False) -> list[int]:
    """Return the strides, in elements, of an array without gaps."""
    order = [0, *range(2, len(shape)), 1] if channels_last else range(len(shape))
    steps = dict(
        zip(order, (math.prod(shape[axis] for axis in order[i + 1 :]) for i in range(len(shape))), strict=True)
    )
    return [steps[axis] for axis in range(len(shape))]


@pytest.fixture(autouse=True)
def few_channels_are_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_path, "MIN_CHANNELS", 2)


def on_numpy(shape: tuple[int, ...], channels_last: bool = False, activation: str | None = None) -> Any:
    call = saved_of(shape, steps_of(shape, channels_last), activation)
    return numpy_path.NumpyWork(call, Arrays(call.x, call.x))


def layout_with(shape: tuple[int, ...], steps: Sequence[int], dtype: Any = np.float32) -> Any:
    """Return the Layout of a forward whose x and y have these strides, in elements."""
    dtype = np.dtype(dtype)
    strides = tuple(dtype.itemsize * step for step in steps)
    return numba_path.Layout(dtype, shape, Arrays(strides, strides))


def layout_of(shape: tuple[int, ...], channels_last: bool = False, dtype: Any = np.float32) -> Any:
    return layout_with(shape, steps_of(shape, channels_last), dtype)


class Recorded(blocking.Work):
    def __init__(self, threads: int, blocks: int, tiles: int):
        self.threads, self.blocks, self.tiles = threads, blocks, tiles
        self.did: list[Any] = []

    def share(self, step: Any, count: int) -> None:
        self.did.append((step, count))


@pytest.mark.parametrize(("threads", "blocks", "tiles", "whole"), [
    (1, 2, 5, True), (3, 2, 1, True), (3, 11, 5, False), (3, 12, 5, True), (2, 7, 2, False), (2, 8, 2, True),
    (2, 1, 2, False), (5, 19, 2, False), (5, 20, 2, True),
])  # fmt: skip
def test_threads_share_tiles_if_there_are_few_blocks(threads: int, blocks: int, tiles: int, whole: bool):
    """With at least four blocks for each thread, threads share whole blocks."""
    work = Recorded(threads, blocks, tiles)
    work.run("reduce", lambda *given: work.did.append(("join", *given)), "apply", "whole")
    items = blocks * tiles
    assert work.did == ([("whole", blocks)] if whole else [("reduce", items), ("join", 0, blocks), ("apply", items)])


@pytest.mark.parametrize("size", [2**19, 2**22])
@pytest.mark.parametrize(("number", "count"), [(1, 9), (2, 9), (2, 7), (3, 100), (3, 2)])
def test_parts_of_a_call_on_numpy_alone(monkeypatch: pytest.MonkeyPatch, size: int, number: int, count: int):
    """Parts hold each block once; their sizes differ by at most one block; each thread has at least one part."""
    used, ranges = [1], []
    monkeypatch.setattr(numpy_path, "share", lambda work, queue, threads: used.append(threads) or work(0))
    cn.set_num_threads(number)
    work = on_numpy((1, 1, size))
    monkeypatch.setattr(work, "work", lambda step, parts: ranges.extend(parts))
    work.share("step", count)
    assert min(number, count) <= len(ranges) <= count and used[-1] == min(number, len(ranges))
    assert [i for first, last in ranges for i in range(first, last)] == [*range(count)]
    assert max(last - first for first, last in ranges) - min(last - first for first, last in ranges) <= 1


@pytest.mark.parametrize(("shape", "channels_last", "elements"), [
    ((1, 2, 511), False, 8192), ((1, 2, 512), False, 16), ((2, 511, 700), True, 8192), ((2, 512, 7), True, 16),
    ((1, 1, 2**22), False, 16),
])  # fmt: skip
def test_buffer_and_scratch(shape: tuple[int, ...], channels_last: bool, elements: int):
    """With rows of at least 512 elements, the ufunc buffer is small, so that ufuncs do not copy per-plane values."""
    before = np.getbufsize()
    cn.set_num_threads(1)
    for activation, buffers in ((None, 3), ("relu", 4), ("leaky_relu", 4), ("silu", 6), ("gelu", 6)):
        work = on_numpy(shape, channels_last=channels_last, activation=activation)
        seen: list[Any] = []
        work.work(lambda i, scratch: seen.append((i, scratch.shape, np.getbufsize())), iter([(3, 5), (7, 8)]))  # noqa: B023
        buffer_size = next(size for size in (math.prod(shape), math.prod(shape[1:]), 2**19) if size <= 2**19)
        assert seen == [(i, (buffers, buffer_size), elements) for i in (3, 4, 7)]
        assert np.getbufsize() == before
    call = saved_of(shape, steps_of(shape, channels_last))
    double = numpy_double.DoubleBackwardWork(call, DoubleArrays(*[call.x] * 5), None, None)
    double.work(lambda i, scratch: seen.append(scratch.shape), iter([(0, 1)]))
    assert seen[-1] == (5, buffer_size)


@pytest.mark.parametrize(("shape", "steps", "channels_last"), [
    ((2, 3, 4, 5), (60, 20, 5, 1), False),
    ((2, 3, 4, 5), (60, 1, 15, 3), True),
    ((2, 2, 4, 5), (40, 1, 10, 2), True),
    ((2, 3, 4, 5), (99, 1, 20, 4), True),  # with gaps
    ((2, 1, 4, 5), (40, 1, 10, 2), False),
    ((2, 3, 4, 5), (120, 40, 10, 2), False),  # every second column
    ((2, 3, 4, 5), (60, 20, 1, 4), False),  # transposed
    ((2, 3, 1, 1), (3, 1, 1, 1), False),
])  # fmt: skip
def test_arrays_that_numpy_treats_as_channels_last(shape: tuple[int, ...], steps: tuple[int, ...], channels_last: bool):
    call = saved_of(shape, steps)
    work = numpy_path.NumpyWork(call, Arrays(call.x, call.x))
    assert work.channels_last == channels_last


@pytest.mark.parametrize("size", [129, 513, 1024, 1575, 1009, 129 * 521, 128 * 521, 35 * 45 * 512, 2**22 + 1])
def test_rows_divide_a_plane_if_possible(size: int):
    """A row has the largest length up to ROW that divides the plane; without one above SHORT_ROW, ROW elements."""
    length, count = numpy_path.row_lengths(size)
    assert numpy_path.SHORT_ROW < length <= numpy_path.ROW
    divisors = [divisor for divisor in range(numpy_path.SHORT_ROW + 1, numpy_path.ROW + 1) if size % divisor == 0]
    assert (length, count) == (max(divisors, default=numpy_path.ROW), size // length)


@pytest.mark.parametrize(("size", "far"), [(128, 1.0), (129, 2.0)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_planes_with_large_means_are_centred(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: int, far: float, channels_last: bool
):
    """Only the planes that need it, if they are at most a quarter of all; otherwise the whole block."""
    counted: list[tuple[int, int]] = []
    made = numpy_path.NumpyWork._sums

    def sums(self: Any, block: np.ndarray) -> np.ndarray:
        counted.append(block.shape[:2])
        return made(self, block)

    monkeypatch.setattr(numpy_path.NumpyWork, "_sums", sums)
    use_compiled(monkeypatch, False)
    cn.set_num_threads(1)
    z = rng.standard_normal((2, 8, size))
    z = (z - z.mean(2, keepdims=True)) / z.std(2, keepdims=True)
    for distance, moved, again in (
        (0.97, 16, None), (1.03, 16, (2, 8)), (1.03, 4, (1, 4)), (1.03, 5, (2, 8)), (1.03, 1, (1, 1)),
    ):  # fmt: skip
        offset = np.zeros(16)
        offset[rng.permutation(16)[:moved]] = rng.choice([-1, 1]) * distance * far
        x = (z + offset.reshape(2, 8, 1)).astype(np.float32)
        if channels_last:
            x = as_channels_last(x)
        counted.clear()
        cn.instance_norm(x)
        print(size, distance, moved)
        passes = [(2, 8)] if again is None else [(2, 8), (2, 8) if channels_last else again]
        assert counted == [planes for planes in passes for _ in range(1 + channels_last)]  # squares too


@pytest.mark.parametrize(("scale", "times"), [(1, 1), (1e-12, 1), (1e-25, 2), (1e-40, 2)])
def test_sums_of_planes_of_tiny_values(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, scale: float, times: int
):
    """Squares that underflow do not show that the shift is near the mean; a second sum, about the mean, suffices."""
    use_compiled(monkeypatch, False)
    counted = 0
    made = numpy_path.NumpyWork._sums

    def sums(self: Any, block: np.ndarray) -> np.ndarray:
        nonlocal counted
        counted += 1
        return made(self, block)

    x = (scale * rng.standard_normal((2, 8, 4096))).astype(np.float32)
    monkeypatch.setattr(numpy_path.NumpyWork, "_sums", sums)
    cn.instance_norm(x)
    assert counted == times


@pytest.mark.compiled
@pytest.mark.parametrize("size", [1, 16, 64, 65, 128, 241, 512, 1024, 2048])
def test_short_planes_processed_together_fit_the_l1_cache(size: int):
    """32 KB of each array."""
    planes = numba_geometry.planes_together.py_func(size)
    assert 1 <= planes <= numba_geometry.TOGETHER
    assert 4 * size * planes <= 2**15


@pytest.mark.compiled
def test_backward_of_short_planes_sums_at_most_partial_elements():
    """It sums each plane in computing precision, in one loop."""
    assert numba_backward.BACKWARD_SHORT <= numba_geometry.PARTIAL


@pytest.mark.compiled
def test_strides_of_fractional_elements_are_unusable(monkeypatch: pytest.MonkeyPatch):
    use_compiled(monkeypatch, True)
    even, odd = (96, 32, 8, 4), (98, 32, 8, 4)
    for strides, usable in ((Arrays(even, even), True), (Arrays(even, odd), False), (Arrays(even, even, odd), False)):
        assert numba_path.Layout(np.dtype(np.float32), (2, 3, 4, 2), strides).usable == usable


def compiled(function: Any) -> Any:
    """Compile a function of the loops so that Python can call it."""
    assert cpu.llvmlite is not None
    return cpu.numba.njit(function.py_func)


def operands_in(x: np.ndarray, dy: np.ndarray | None = None, result: np.ndarray | None = None, **tables: Any) -> Any:
    """Return Operands with these arrays as memory; x stands for absent ones. tables: strides and runs."""
    result, dy = x if result is None else result, x if dy is None else dy
    return numba_geometry.Operands(x.dtype.type(0), x, result, dy, x, x, **tables)


def identity_planes(*stats: np.ndarray) -> Any:
    """Return Planes with weight 1, bias 0 and these statistics."""
    return numba_geometry.Planes(np.ones(1, np.float32), np.zeros(1, np.float32), (0, 0, 0, 0), *stats)


BIG = np.float32(2**24)  # BIG + 1 is BIG in float32


def summed_together(sums: Any, size: int, one: int, other: int) -> bool:
    """True if two elements of a plane are summed in float32, before the float64 sums. sums: of (1, 2, size)."""
    x = np.zeros((1, 2, size), np.float32)
    x[0, 1, [one, other]] = BIG, 1
    got = sums(x)[0, 1]
    assert got in (BIG, np.float64(BIG) + 1)
    return bool(got == BIG)


@pytest.mark.parametrize(("size", "channels_last", "together"), [
    (127, False, [(0, 126)]), (128, False, [(0, 127)]), (512, False, [(0, 511)]), (513, False, [(0, 170), (342, 512)]),
    (1009, False, [(0, 511), (512, 1008)]), (1025, False, [(0, 204)]), (1600, False, [(0, 399), (1200, 1599)]),
    (31, True, [(0, 30)]), (32, True, [(0, 31)]), (75, True, [(0, 31), (32, 63), (64, 74)]),
])  # fmt: skip
@pytest.mark.parametrize("product", [False, True])
def test_elements_summed_in_computing_precision_on_numpy_alone(
    size: int, channels_last: bool, together: list[tuple[int, int]], product: bool
):
    """At most 512 elements, or 32 if channels-last."""
    work = on_numpy((1, 2, size), channels_last=channels_last)
    scratch = np.empty(2 * size, np.float32)
    ones = np.ones((1, 2, size), np.float32)

    def sums(x: np.ndarray) -> np.ndarray:
        if channels_last:
            x = as_channels_last(x)
        return work._dots(x, ones, scratch) if product else work._sums(x)

    for first, last in together:
        assert summed_together(sums, size, first, last)
        assert first == 0 or not summed_together(sums, size, first, first - 1)
        assert last == size - 1 or not summed_together(sums, size, first, last + 1)


def test_arrays_used_in_place(rng: np.random.Generator):
    """Aligned arrays in computing precision with adjacent positions, or adjacent channels if y is channels-last."""
    whole = rng.standard_normal((4, 6, 8)).astype(np.float32)
    last = np.ascontiguousarray(np.moveaxis(whole, 1, 2)).transpose(0, 2, 1)
    unaligned = np.frombuffer(bytearray(whole.nbytes + 1), np.float32, whole.size, 1).reshape(whole.shape)
    arrays = {
        "whole": whole, "part": whole[1:3, 2:5, 1:7], "every second channel": whole[:, ::2],
        "reversed": whole[:, :, ::-1], "every second position": whole[:, :, ::2], "last": last,
        "part of last": last[1:3, 2:5, 1:7], "every second position of last": last[:, :, ::2],
        "every second channel of last": last[:, ::2],
        "unaligned": unaligned, "float64": whole.astype(float), "float16": whole.astype(np.float16),
        "two axes": whole.reshape(4, 6, 2, 4), "two axes of last": last.reshape(4, 6, 2, 4),
    }  # fmt: skip
    for channels_last, in_place in (
        (False, ["whole", "part", "every second channel"]),
        (True, ["last", "part of last", "every second position of last"]),
    ):
        work = on_numpy((4, 6, 8), channels_last=channels_last)
        assert [name for name, array in arrays.items() if work._in_place(array)] == in_place
        for name, array in arrays.items():
            buffer = np.empty(array.size, np.float32)
            read, target = work._read(array, (...,), buffer), work._target(array, (...,), buffer)
            assert (np.shares_memory(read, array), np.shares_memory(target, array)) == (name in in_place,) * 2
            assert (np.shares_memory(read, buffer), np.shares_memory(target, buffer)) == (name not in in_place,) * 2
            assert_equal(read, array.reshape(read.shape))
            assert np.shares_memory(work._read(array, (...,), buffer, copy=True), buffer)


@pytest.mark.parametrize(("size", "far"), [(128, 1.0), (129, 2.0)])
def test_large_means_are_the_shift(size: int, far: float):
    """Means above one deviation, or above two if the plane's sums are added in float64; the deviation excludes eps."""
    work = on_numpy((1, 4, size))
    planes = slice(None), slice(None)
    for eps, rstd in ((0.0, 0.5), (1e-5, 0.5), (12.0, 0.25)):  # the deviation is 2
        work.call.rstd[...], work.call.eps = rstd, eps
        most, more = (np.float32(2 * far * (1 + by)) for by in (-1e-5, 1e-5))
        for values, shifted in (
            ([1, -1, most, -most], [0, 0, 0, 0]), ([more, -more, 1, 0], [1, 1, 0, 0]), ([1, 1, -9, 1], [0, 0, 1, 0]),
        ):  # fmt: skip
            work.call.mean[...] = values
            work.call.mean_lo[...] = 2**-30
            shift, unit, remainder, r = work._stats(planes)
            assert (shift is None) == (not any(shifted))
            subtracted = work.call.mean * np.array([shifted], np.float32)
            if shift is not None:
                assert_equal(shift, subtracted)
            assert_equal(remainder, (work.call.mean - subtracted) + work.call.mean_lo.astype(work.plane_dtype))
            assert remainder.dtype == (np.float64 if size > 128 else np.float32)
            assert unit is None
            assert_equal(r, work.call.rstd)


def test_running_means_are_always_the_shift():
    """The distance of x from them is unknown."""
    work = on_numpy((1, 4, 200))
    work.call.rstd[...], work.call.training, work.call.mean_lo = 1, False, None
    work.call.mean[...] = [0, 1e-6, -3, 0]
    shift, _, remainder, _ = work._stats((slice(None), slice(None)))
    assert_equal(shift, work.call.mean)
    assert not remainder.any()


@pytest.mark.parametrize("rstd", [2.0**-31, 3e-36, 1e-38, 2.0**31, 1e30, 3e38])
def test_units_of_numpy_planes(rstd: float):
    """A power of two near rstd if rstd is far from 1, in which the mean is finite; 1 for the other planes."""
    work = on_numpy((1, 4, 200))
    work.call.rstd[...], work.call.eps = [[1, rstd, 2.0**-29, rstd]], 0.0
    work.call.mean[...] = [[5, 1, 0, 3e30]]
    with np.errstate(over="ignore"):
        _, unit, _, r = work._stats((slice(None), slice(None)))
    assert unit is not None
    assert unit[0, 0] == unit[0, 2] == 1
    assert_equal(unit * r, work.call.rstd)
    assert_equal(np.frexp(unit)[0], 0.5)
    assert 0.5 <= r[0, 1] < 1 or rstd > 1e38 or rstd < 1e-37
    assert np.isfinite(unit * work.call.mean).all()


@pytest.mark.parametrize(("eps", "some"), [(0.0, True), (9e-31, True), (1e-30, False)])
def test_planes_whose_squares_underflow(eps: float, some: bool):
    """Planes with mean squares below 2**-100 are computed in float64 if eps < 1e-30; planes that overflow always."""
    work = on_numpy((1, 2, 4))
    work.eps = eps
    for value, odd in ((2.0**-50, False), (2.0**-50 * (1 - 2**-20), some), (2.0**65, True)):
        x = np.array([[1, -1, -1, 1], [value, -value, -value, value]], np.float32)[None]
        mean, mean_lo, variance = work._moments(x, np.empty((3, x.size), np.float32))
        assert variance.dtype == (np.float64 if odd else np.float32)
        assert_allclose(variance, x[..., 0].astype(float) ** 2, rtol=1e-6)
        assert not mean.any() and not mean_lo.any()


#: Geometries of samples of 5 planes of 7 runs of 30 positions: blocks of a plane, or of 2 channels; in one tile, in
#: tiles of 3 runs, and in tiles of 12 positions of a run.
GEOMETRIES = [(5, group, -(-7 // runs) * -(-30 // length), 7, 30, runs, length, 0, 7 * 30, 0)
              for group in (1, 2) for runs, length in ((7, 30), (3, 30), (1, 12))]  # fmt: skip


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    use_compiled(monkeypatch, True)
    return numba_geometry.Geometry(*request.param)


def one_tile(channels: int, group: int, runs: int, length: int) -> Any:
    """Return the Geometry of planes in one tile."""
    return numba_geometry.Geometry(channels, group, 1, runs, length, runs, length, 0, runs * length, 0)


@pytest.mark.compiled
def test_tiles_hold_each_position_once(geometry: Any):
    bounds, counts = compiled(numba_geometry.tile_bounds), compiled(numba_forward._counts)(geometry)
    assert counts.shape == (geometry.tiles,)
    seen = np.zeros((7, 30), int)
    for tile in range(geometry.tiles):
        r0, r1, l0, l1, count = bounds(tile, geometry)
        assert 0 < r1 - r0 <= geometry.tile_runs and 0 < l1 - l0 <= geometry.tile_length
        assert count == (r1 - r0) * (l1 - l0) == counts[tile]
        seen[r0:r1, l0:l1] += 1
    assert (seen == 1).all()


@pytest.mark.compiled
def test_order_of_items(geometry: Any):
    """Items follow each other tile by tile, then block by block."""
    locate, after, before = (
        compiled(each) for each in (numba_geometry.locate, numba_geometry.next_item, numba_geometry.previous_item)
    )
    every = [(n, c, tile) for n in range(3) for c in range(0, 5, geometry.group) for tile in range(geometry.tiles)]
    assert [locate(item, geometry) for item in range(len(every))] == every
    assert [after(*item, geometry) for item in every[:-1]] == every[1:]
    assert [before(*item, geometry) for item in every[1:]] == every[:-1]


@pytest.mark.compiled
def test_offsets_and_parameters_of_short_planes(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Their offsets, weights and biases, from any plane on and beyond the end of a sample."""
    use_compiled(monkeypatch, True)
    function = compiled(numba_geometry.short_plane_offsets)
    geometry = numba_geometry.Geometry(*GEOMETRIES[0])
    strides = np.array([(-100, 7, 1), (64, -9, 3)])
    for of_samples in (False, True):
        weight, bias = rng.standard_normal((2, 4, 5))
        param_strides = (5, 1, 5, 1) if of_samples else (0, 1, 0, 1)
        n, c = np.divmod(np.arange(20), 5)
        expected = [a if of_samples else a[0].repeat(4).reshape(5, 4).T for a in (weight, bias)]
        nothing = np.empty(0)
        planes = numba_geometry.Planes(weight.ravel(), bias.ravel(), param_strides, nothing, nothing, nothing)
        for first, count in ((0, 1), (0, 20), (3, 1), (4, 8), (13, 6)):
            offsets, table = np.zeros((2, 64), np.uint64), numba_geometry.Coefficients(*np.full((4, 64), np.nan))
            function(first, count, geometry, strides, offsets, planes, table)
            part = slice(first, first + count)
            for i, (of_n, of_c, _) in enumerate(strides):
                assert_equal(offsets[i, :count].view(np.int64), (n * of_n + c * of_c)[part])
            assert_equal(table.scale[:count], expected[0].ravel()[part])
            assert_equal(table.intercept[:count], expected[1].ravel()[part])
            assert not offsets[:, count:].any() and np.isnan(table.scale[count:]).all()


@pytest.mark.compiled
@pytest.mark.parametrize("wanted", [False, True])
def test_tiles_are_merged(rng: np.random.Generator, geometry: Any, wanted: bool):
    """Means as mean and mean_lo in float32; a variance, if wanted; and the sums of a backward."""
    bounds, forward, backward = (
        compiled(each)
        for each in (numba_geometry.tile_bounds, numba_forward._join_forward, numba_backward._join_backward)
    )
    group, tiles = geometry.group, geometry.tiles
    x = rng.standard_normal((3, 5, 7, 30)) + rng.choice([0, 1000], (3, 5, 1, 1))
    blocks = [(n, c) for n in range(3) for c in range(0, 5, group)]
    counts = np.array([bounds(tile, geometry)[4] for tile in range(tiles)])
    sums = np.full((3, len(blocks) * tiles * group), np.nan)
    for item, ((n, c), tile) in enumerate((block, tile) for block in blocks for tile in range(tiles)):
        r0, r1, l0, l1, _ = bounds(tile, geometry)
        for j, plane in enumerate(x[n, c : c + group, r0:r1, l0:l1]):
            mean = np.float64(np.float32(plane.mean() + rng.standard_normal()))
            sums[:, item * group + j] = mean, plane.mean() - mean, ((plane - plane.mean()) ** 2).sum()
    exact = x.reshape(3, 5, -1)
    for first, last in ((0, len(blocks)), (2, 3), (len(blocks) - 2, len(blocks))):
        merged = np.zeros((3, 5), bool)
        for n, c in blocks[first:last]:
            merged[n, c : c + group] = True
        part = tuple(sums[:, first * tiles * group :])
        mean, mean_lo, rstd = stats = np.full((3, 3, 5), 7, np.float32)
        planes = identity_planes(*stats)
        variance = np.full((3, 5) if wanted else (0, 0), 7, np.float32)
        forward(geometry, counts, first, last, part, 0.5, planes, variance)
        nearest = exact.mean(-1).astype(np.float32)
        assert_equal(mean, np.where(merged, nearest, 7))
        assert_allclose(mean_lo, np.where(merged, exact.mean(-1) - nearest, 7), atol=1e-12)
        assert_allclose(rstd, np.where(merged, (exact.var(-1) + 0.5) ** -0.5, 7), rtol=2e-7)
        if wanted:
            assert_allclose(variance, np.where(merged, exact.var(-1), 7), rtol=2e-7)
        sum_g, sum_g_xhat = plane_sums = np.full((2, 3, 5), 7, np.float32)
        backward(geometry, first, last, (part[2], part[1]), planes, tuple(plane_sums))
        of_planes = sums.reshape(3, 3, -1, tiles, group).sum(3).reshape(3, 3, -1)[:, :, :5]
        assert_allclose(sum_g, np.where(merged, of_planes[2], 7), rtol=2e-7)
        unit = 2.0 ** np.floor(np.log2(rstd))  # of_planes[1] are products with x - mean in this unit
        dots = (of_planes[1] / unit - of_planes[2] * mean_lo) * rstd
        assert_allclose(sum_g_xhat, np.where(merged, dots, 7), rtol=1e-6, atol=1e-9)


@pytest.mark.compiled
@pytest.mark.parametrize(("shape", "channels_last", "one", "other", "together"), [
    ((1, 2, 2048), False, 0, 2047, True),  # a short plane
    ((1, 2, 2049), False, 100, 511, True), ((1, 2, 2049), False, 100, 512, False),
    ((1, 2, 2049), False, 520, 512, True),
    ((1, 16, 2048), True, 10, 63, True), ((1, 16, 2048), True, 10, 64, False), ((1, 16, 2048), True, 70, 64, True),
])  # fmt: skip
def test_elements_summed_in_computing_precision_by_compiled_loops(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], channels_last: bool, one: int, other: int, together: bool
):
    """In the forward, a whole short plane; 512 elements of other planes, or 64 if channels-last."""
    use_compiled(monkeypatch, True)
    assert layout_of(shape, channels_last).channels_last == channels_last
    x = np.zeros(shape, np.float32)
    x[0, 1, [one, other]] = BIG, 1
    if channels_last:
        x = as_channels_last(x)
    saved = cn.instance_norm_forward(x)[1]
    total = (saved.mean[0, 1].astype(float) + saved.mean_lo[0, 1]) * shape[2]
    print(total - BIG)
    assert abs(total - BIG - (not together)) < 0.2


@pytest.mark.compiled
@pytest.mark.parametrize("channels_last", [False, True])
def test_elements_summed_in_computing_precision_by_compiled_loops_backward(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, channels_last: bool
):
    """As in the forward: 512 elements or 64, of one run."""
    use_compiled(monkeypatch, True)
    c = 16 if channels_last else 2
    layout = layout_with((1, c, 2, 600), (1202 * c, 1, 601 * c, c) if channels_last else (2404, 1202, 601, 1))
    assert layout.channels_last == channels_last and layout.windows is None
    strides, runs = layout.strides, layout.runs
    function = compiled(
        numba_backward._reduce_backward_channels if channels_last else numba_backward._reduce_backward_rows
    )
    most = 64 if channels_last else 512
    for one, other, together in (
        (0, most - 1, True), (0, most, False), (most + 8, most, True), (most - 8, most, False), (599, 0, False),
        (0, 600, False), (600, 599 + most, True), (600, 600 + most, False),
    ):  # fmt: skip
        x, dy = rng.standard_normal(1300 * c).astype(np.float32), np.zeros(1300 * c, np.float32)
        for position, value in ((one, BIG), (other, 1)):
            dy[strides[0, 1] + runs[0, position // 600] + position % 600 * strides[0, 2]] = value
        totals, dots = sums = np.full((2, c), np.nan)
        function(
            operands_in(x, dy, strides=strides, runs=runs), layout.geometry, 0, layout.tiles * layout.blocks,
            numba_geometry.Kind(None, None, None), identity_planes(*np.ones((3, 1, c), np.float32)), tuple(sums),
        )  # fmt: skip
        print(one, other, totals, dots)
        assert (totals == [0, BIG + np.float64(not together), *[0] * (c - 2)]).all()


def reduced(
    monkeypatch: pytest.MonkeyPatch, planes: np.ndarray, guess: float, channels_last: bool, least: float = 0.0
) -> list[tuple[float, float, float]]:
    """Return mean, mean_lo and m2 that the loops compute for planes, each of two runs, from a guess of their means."""
    assert cpu.llvmlite is not None
    count, size = planes.shape
    half, dtype = size // 2, planes.dtype
    runs = (half + 3) * np.arange(2) * (count if channels_last else 1) + 5
    memory = np.full(2 * (half + 8) * count, 7, dtype)
    step = count if channels_last else 1
    geometry = one_tile(count, count if channels_last else 1, 2, half)
    for j, plane in enumerate(planes):
        begin = j if channels_last else j * 2 * (half + 8)
        for r in range(2):
            memory[begin + runs[r] :][: half * step : step] = plane[r * half : (r + 1) * half]
    if channels_last:
        guesses = cpu.numba.njit(lambda x, o, k, run, geometry, tile, width, mean: mean.fill(guess))
        monkeypatch.setattr(numba_forward, "_guess_channels", guesses)
        sums = np.zeros((3, count))
        operands = operands_in(memory, strides=np.array([[0, 1, count]] * 5), runs=np.array([runs] * 5))
        compiled(numba_forward._reduce_forward_channels)(operands, geometry, 0, 1, least, tuple(sums))
        return [(float(mean), float(mean_lo), float(m2)) for mean, mean_lo, m2 in sums.T]
    function = compiled(numba_forward._moments)
    return [
        function(memory, j * 2 * (half + 8), runs, geometry, 0, dtype.type(guess), dtype.type(0), size, least)
        for j in range(count)
    ]


@pytest.mark.compiled
@pytest.mark.parametrize("channels_last", [False, True])
def test_planes_with_bad_guesses_are_summed_again(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, channels_last: bool
):
    """With a guess off by more than a deviation, the mean is exact; otherwise it is the guess, and mean_lo the rest."""
    use_compiled(monkeypatch, True)
    z = rng.standard_normal((3, 300))
    z = 5 * (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    z[2] = 5 * np.sign(np.arange(300) - 149.5)  # a deviation of 5 exactly
    for far, again in (([4.8, -4.8, 5], False), ([5.2, -5.2, np.nextafter(np.float32(5), 6)], True)):
        x = (z + np.array(far)[:, None]).astype(np.float32)
        exact = x.astype(np.longdouble)
        for (mean, mean_lo, m2), plane, distance in zip(
            reduced(monkeypatch, x, 0, channels_last), exact, far, strict=True
        ):
            assert mean == (np.float32(mean) if again else 0)
            assert abs(mean - distance * again) < 1e-5
            assert abs(mean + mean_lo - plane.mean()) < 2e-6
            assert abs(m2 / ((plane - plane.mean()) ** 2).sum() - 1) < 2e-6


@pytest.mark.compiled
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset", [0, 3, 1e6])
def test_guess_without_correct_digits(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, channels_last: bool, offset: float
):
    """The mean computed from it has none either; the next attempt corrects it by mean_lo."""
    use_compiled(monkeypatch, True)
    x = (offset + rng.standard_normal((4, 200))).astype(np.float32)
    exact = x.astype(np.longdouble)
    for (mean, mean_lo, m2), plane in zip(reduced(monkeypatch, x, -3e8, channels_last), exact, strict=True):
        print(mean, mean_lo)
        assert abs(mean + mean_lo - plane.mean()) < 1e-5
        assert abs(m2 / ((plane - plane.mean()) ** 2).sum() - 1) < 1e-5


@pytest.mark.compiled
@pytest.mark.parametrize("channels_last", [False, True])
def test_squares_computed_in_float64(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, channels_last: bool):
    """If the mean square is below the least one, or a sum overflows; then the mean is not the guess."""
    use_compiled(monkeypatch, True)
    x = np.tile(np.array([[1, -1]], np.float32), (4, 50))
    x *= np.float32([[2.0**-50], [2.0**-50 * (1 - 2**-20)], [2.0**65], [2.0**50]])
    found = reduced(monkeypatch, x, 2.0**-60, channels_last, 2.0**-100)
    for (mean, mean_lo, m2), plane, wide in zip(found, x.astype(float), (False, True, True, False), strict=True):
        assert mean == (0 if wide else 2.0**-60)
        assert abs(mean + mean_lo) < 1e-17 * plane.max()
        assert abs(m2 / (plane**2).sum() - 1) < 1e-6
    means = [mean for mean, _, _ in reduced(monkeypatch, x, 2.0**-60, channels_last)]
    assert means == [2.0**-60, 2.0**-60, 0, 2.0**-60]


@pytest.mark.compiled
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_of_tiles_are_stored_by_item(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, channels_last: bool
):
    """From any item on, the sums of each tile and of each channel of a group."""
    use_compiled(monkeypatch, True)
    monkeypatch.setattr(numba_path, "TILE", 70 if channels_last else 20)
    monkeypatch.setattr(numba_path, "LONG_RUN", 8)
    channels = 41 if channels_last else 21
    x, dy = rng.standard_normal((2, 2, channels, 3, 8)).astype(np.float32) + np.float32(3)
    steps = (3 * 9 * 42, 1, 9 * 42, 42) if channels_last else (21 * 3 * 9, 3 * 9, 9, 1)
    layout = layout_with(x.shape, steps)
    assert layout.channels_last == channels_last and layout.windows is None
    geometry = layout.geometry
    group, tiles = geometry.group, geometry.tiles
    assert (group, tiles) == ((16, 6) if channels_last else (1, 2))
    memories = np.zeros((2, 2 * 3 * 9 * 42), np.float32)
    for memory, array in zip(memories, (x, dy), strict=True):
        np.lib.stride_tricks.as_strided(memory, x.shape, [4 * step for step in steps])[...] = array
    operands = operands_in(*memories, strides=layout.strides, runs=layout.runs)
    forward = compiled(numba_forward._reduce_forward_channels if channels_last else numba_forward._reduce_forward_rows)
    backward = compiled(
        numba_backward._reduce_backward_channels if channels_last else numba_backward._reduce_backward_rows
    )
    locate, bounds = compiled(numba_geometry.locate), compiled(numba_geometry.tile_bounds)
    assert [*layout.counts] == [bounds(tile, geometry)[4] for tile in range(tiles)]
    mean, mean_lo, rstd = rng.uniform(2, 3, (3, 2, channels)).astype(np.float32)
    kind, planes = numba_geometry.Kind(None, None, None), identity_planes(mean, mean_lo - 2, rstd)
    for first, last in ((0, layout.blocks * tiles), (3, 8), (layout.blocks * tiles - 7, layout.blocks * tiles)):
        found = np.full((3, (last - first) * group), np.nan)
        forward(operands, geometry, first, last, 0.0, tuple(found))
        sums = np.full((2, (last - first) * group), np.nan)
        backward(operands, geometry, first, last, kind, planes, tuple(sums))
        for item in range(last - first):
            n, c, tile = locate(first + item, geometry)
            r0, r1, l0, l1, _ = bounds(tile, geometry)
            width = min(group, channels - c)
            part, of_dy = (a[n, c : c + width, r0:r1, l0:l1].reshape(width, -1).astype(float) for a in (x, dy))
            at = slice(item * group, item * group + width)
            assert_allclose(found[0, at] + found[1, at], part.mean(1), rtol=1e-6)
            assert_allclose(found[2, at], part.var(1) * part.shape[1], rtol=1e-5)
            centred = part - mean[n, c : c + width, None].astype(float)  # in a unit of 2, as rstd is 2 to 3
            assert_allclose(sums[:, at], [of_dy.sum(1), 2 * (of_dy * centred).sum(1)], rtol=1e-5, atol=1e-4)
            assert np.isnan(found[:, at.stop : (item + 1) * group]).all()


@pytest.mark.compiled
@pytest.mark.parametrize("spread", [1.0, 2.0**-26])
def test_moments_in_float64(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, spread: float):
    """Mean and mean_lo, and squares about their sum, with more digits than one float64 holds."""
    use_compiled(monkeypatch, True)
    base = 2.0**26
    x = base + spread * rng.standard_normal(2000)
    runs, geometry = np.array([0, 1000]), one_tile(1, 1, 2, 1000)
    mean, mean_lo, m2 = compiled(numba_forward._moments_float64)(x, 0, np.uint64(1), runs, geometry, 0)
    exact = x - base  # no digit is lost
    assert abs(((mean - base) - math.fsum(exact) / 2000) + mean_lo) < 1e-15 * spread
    assert abs(m2 / math.fsum((exact - exact.mean()) ** 2) - 1) < 1e-13


@pytest.mark.compiled
@pytest.mark.parametrize("size", [16, 40, 300])
def test_short_planes_with_bad_guesses_are_summed_again(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: int
):
    """One by one, by `_moments`, whose results are used: here they are recognisable numbers."""
    use_compiled(monkeypatch, True)
    assert cpu.llvmlite is not None
    found_moments = cpu.numba.njit(
        lambda x, o, run, geometry, tile, mean, zero, count, least: (mean + 512, 2.0**-30, 900.0)
    )
    monkeypatch.setattr(numba_forward, "_moments", found_moments)
    function = compiled(numba_forward._forward_short_rows)
    inner = min(size, 64)
    middle = slice((size - inner) // 2, (size + inner) // 2)
    outer = np.ones(size, bool)
    outer[middle] = False
    x, again = rng.standard_normal((7, size)) + 1000, np.zeros(7, bool)
    guess = x[:, middle].mean(1)
    if size == 300:  # the middle alone has the mean 0, which is 0.97 or 1.03 deviations from the plane's mean
        x[0], x[0, outer] = 0, 1
        x[1] = x[0]
        mean = outer.mean()
        for j, far in enumerate((0.97, 1.03)):
            spread = np.sqrt(((mean / far) ** 2 - (mean - mean**2)) * size / inner)
            x[j, middle] = spread * np.where(np.arange(inner) % 2, 1, -1)
            assert abs(abs(x[j].mean()) / x[j].std() - far) < 1e-6
        again[1] = True
        guess[:2] = 0
    # Sums of squares below the least, or that overflow.
    for j, (value, odd) in enumerate(((2.0**-50, False), (2.0**-50 * (1 - 2**-20), True), (2.0**65, True)), 3):
        x[j], again[j], guess[j] = value * np.where(np.arange(size) % 2, 1, -1), odd, 0
    x = x.astype(np.float32)
    y, stats, variance = np.full_like(x, 7), np.full((3, 7), 7, np.float32), np.full(7, 7, np.float32)
    strides, runs = np.array([[7 * size, size, 1]] * 5), np.zeros((5, 1), np.int64)
    operands = operands_in(x.ravel(), result=y.ravel(), strides=strides, runs=runs)
    planes = numba_geometry.Planes(np.full(1, 3, np.float32), np.full(1, 0.5, np.float32), (0, 0, 0, 0), *stats)
    kind, eps = numba_geometry.Kind(None, None, None), 2.0**-120
    function(operands, one_tile(7, 1, 1, size), 0, 7, kind, planes, eps, 2.0**-100, variance)
    mean, mean_lo, rstd = stats
    exact = np.where(again, guess + 512, x.astype(float).mean(1))
    m2 = np.where(again, 900.0, x.astype(float).var(1) * size)
    print(mean, exact)
    assert_allclose(mean, exact, rtol=1e-7, atol=1e-7)
    assert (mean_lo[again] == 2.0**-30).all()
    assert_allclose(variance, m2 / size, rtol=1e-4)
    assert_allclose(rstd, (m2 / size + eps) ** -0.5, rtol=1e-4)
    expected = (x - (mean + mean_lo.astype(float))[:, None]) * 3 * rstd[:, None] + 0.5
    assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("shape", "strides", "merged"), [
    ((2, 3, 4, 5, 6), [(360, 120, 30, 6, 1)], (120,)),
    ((2, 3, 4, 5, 6), [(480, 160, 40, 6, 1)], (4, 30)),
    ((2, 3, 4, 5, 6), [(480, 160, 40, 8, 1)], (20, 6)),
    ((2, 3, 4, 5, 6), [(492, 164, 41, 8, 1)], (4, 5, 6)),
    ((2, 3, 4, 5, 6), [(420, 140, 35, 7, 1)], (20, 6)),
    ((2, 3, 4, 5, 6), [(720, 240, 60, 12, 2)], (120,)),
    ((2, 3, 4, 1, 6), [(72, 24, 6, 99, 1)], (24,)),
    ((2, 3, 2, 1, 6), [(99, 24, 7, 1, 1)], (2, 6)),
    ((2, 3, 1, 1), [(9, 3, 1, 1)], (1,)),
    ((2, 3, 1, 1), [(3, 1, 1, 1)], (1,)),
    ((2, 3, 4, 5), [(60, 20, 5, 1), (60, 1, 15, 3)], (20,)),
    ((2, 3, 4, 5), [(60, 20, 5, 1), (72, 24, 6, 1)], (4, 5)),
    ((2, 3, 4, 5), [(72, 24, 6, 1), (60, 20, 5, 1)], (4, 5)),
])  # fmt: skip
def test_adjacent_axes_are_merged(shape: tuple[int, ...], strides: list[tuple[int, ...]], merged: tuple[int, ...]):
    """If they are adjacent in all arrays of a call. On NumPy alone, an axis less saves a copy."""
    memory = np.arange(2000.0)
    arrays = [np.lib.stride_tricks.as_strided(memory, shape, [8 * step for step in steps]) for steps in strides]
    *views, absent = blocking.merged_axes([*arrays, None])
    assert absent is None
    for array, view in zip(arrays, views, strict=True):
        assert view.shape == (*shape[:2], *merged)
        assert np.shares_memory(view, memory)
        assert_equal(view.ravel(), array.ravel())


def found_on_numpy(x: np.ndarray, eps: float = 0.0) -> tuple[np.ndarray, ...]:
    """Return mean, mean_lo and variance of planes (N, C, S), by `_moments`."""
    call = cn.Saved(x, *np.zeros((2, *x.shape[:2]), x.dtype), None, None, True, np.zeros(x.shape[:2], x.dtype), None)
    work = numpy_path.NumpyWork(call, Arrays(x, x))
    work.eps = eps
    with np.errstate(all="ignore"):
        return work._moments(x, np.empty((3, x.size), x.dtype))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [60, 600])
def test_planes_with_different_needs_in_one_block(rng: np.random.Generator, size: int, channels_last: bool):
    """Squares that overflow about 0, or even about the mean; large means; nearly constant planes; tiny values. None of
    them takes digits from another, or changes its bits."""
    z = rng.standard_normal((1, 12, size))
    z[:, 1] *= 2.0**70
    z[:, 2] = 2.0**70 * (1 + z[:, 2] / 1024)
    z[:, 3] += 1000
    z[:, 4] = 16381.123 + np.arange(size) % 2 / 512
    z[:, 5] *= 2.0**-70
    z[:, 6] = 2.0**-70 * (1 + z[:, 6] / 1024)
    z[:, 7] = 1e6
    z[:, 8] = 0
    z[:, 9] += 4
    x = z.astype(np.float32)
    if channels_last:
        x = as_channels_last(x)
    mean, mean_lo, variance = (a[0].astype(np.longdouble) for a in found_on_numpy(x))
    exact = x[0].astype(np.longdouble)
    deviation = exact.std(1)
    assert (np.abs((mean - exact.mean(1)) + mean_lo) <= 1e-6 * deviation).all()
    assert (np.abs(variance - deviation**2) <= 3e-6 * deviation**2).all()
    nearest = np.spacing(np.abs(mean).astype(np.float32))
    assert (np.abs(mean_lo) <= 0.51 * nearest + 1e-6 * deviation * (np.arange(12) % 4 > 2)).all()
    for some in (slice(0, 1), slice(3, 5), slice(9, 12), slice(1, 4), [0, 5, 7, 8]):
        alone = x[:, some]
        if channels_last:
            alone = as_channels_last(alone)
        for a, b in zip(found_on_numpy(alone), (mean, mean_lo, variance), strict=True):
            if not channels_last or alone.shape[1] > 1:  # a single channel is not channels-last
                assert_equal(a[0], b[some])


@pytest.mark.parametrize("size", [60, 600])
def test_float64_planes_with_large_means(rng: np.random.Generator, size: int):
    """Nearly constant planes, whose squares lose all digits, or overflow, unless the mean is subtracted first."""
    z = rng.integers(0, 9, (1, 3, size)).astype(float)
    x = z * 2.0**-52 + 1
    x[:, 1] = 2.0**600 * (1 + z[:, 1] * 2.0**-100 * 2.0**60)
    x[:, 2] = 2.0**-20 * x[:, 2]
    mean, mean_lo, variance = (a[0] for a in found_on_numpy(x))
    for j, (base, grain) in enumerate(((1.0, 2.0**-52), (2.0**600, 2.0**560), (2.0**-20, 2.0**-72))):
        units = (x[0, j] - base) / grain  # whole numbers
        assert abs(((mean[j] - base) + mean_lo[j]) / grain - math.fsum(units) / size) < 1e-9
        if j != 1:
            assert abs(variance[j] / grain**2 / (math.fsum((units - units.mean()) ** 2) / size) - 1) < 1e-9


def test_tiles_are_merged_on_numpy_alone(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Means as mean and mean_lo, for the given blocks only."""
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", 4 * 50)
    x = rng.standard_normal((2, 3, 130)) + rng.choice([0, 1000], (2, 3, 1))
    work = on_numpy((2, 3, 130))
    work.eps, work.variance = 0.5, np.full((2, 3), 7, np.float32)
    bounds = [(index[0].start, min(index[0].stop, 130)) for index in work.tile]
    assert bounds == [(0, 50), (50, 100), (100, 130)]
    for tile, (first, last) in enumerate(bounds):
        part = x[:, :, first:last]
        mean = (part.mean(2) + rng.standard_normal((2, 3))).astype(np.float32).astype(float)
        work.partials[:, tile] = mean, part.mean(2) - mean, part.var(2) * (last - first), np.full((2, 3), last - first)
    call, merged = work.call, np.zeros((2, 3), bool)
    call.mean[...] = call.rstd[...] = call.mean_lo[...] = 7
    merged[0, 2] = merged[1, :2] = True
    work.join_forward(2, 5)
    nearest = x.mean(2).astype(np.float32)
    assert_equal(call.mean, np.where(merged, nearest, 7))
    assert_allclose(call.mean_lo, np.where(merged, x.mean(2) - nearest, 7), atol=1e-12)
    assert_allclose(call.rstd, np.where(merged, (x.var(2) + 0.5) ** -0.5, 7), rtol=2e-7)
    assert_allclose(work.variance, np.where(merged, x.var(2), 7), rtol=2e-7)


def test_results_hold_intermediate_values_unless_they_overlap_inputs(monkeypatch: pytest.MonkeyPatch):
    """If a result overlaps dy or the residual, blocks are computed in scratch."""
    monkeypatch.setattr(numpy_path.NumpyWork, "run", lambda *_: None)
    monkeypatch.setattr(numpy_path.NumpyWork, "share", lambda *_: None)
    x, y, other = np.zeros((3, 2, 3, 8), np.float32)
    for arrays, alone in (
        (Arrays(x, y), True), (Arrays(x, y, residual=other), True), (Arrays(x, y, residual=y), False),
        (Arrays(x, x), True),
    ):  # fmt: skip
        call = saved_of((2, 3, 8), (24, 8, 1))
        call.residual = arrays.residual
        work = numpy_path.NumpyWork(call, arrays)
        for forward in (lambda work=work: work.forward(1e-5, None), work.normalize):
            work.work_in_result = None
            forward()
            assert work.work_in_result is alone
    for dx, dy, alone in ((x, y, True), (y, y, False)):
        work = numpy_path.NumpyWork(saved_of((2, 3, 8), (24, 8, 1)), Arrays(other, dx, dy))
        work.backward(*np.zeros((2, 2, 3), np.float32))
        assert work.work_in_result is alone


@pytest.mark.parametrize("training", [False, True])
def test_passes_of_a_double_backward(monkeypatch: pytest.MonkeyPatch, training: bool):
    """With frozen statistics nothing is summed, unless a weight has a gradient."""
    did: list[str] = []
    monkeypatch.setattr(numpy_path.NumpyWork, "run", lambda *_: did.append("all"))
    monkeypatch.setattr(numpy_path.NumpyWork, "share", lambda *_: did.append("apply"))
    for weight, ddx, what in ((None, True, "apply"), (True, False, "apply"), (True, True, "all")):
        call = saved_of((2, 3, 8), (24, 8, 1))
        call.training, call.weight = training, None if weight is None else np.ones(3, np.float32)
        work = numpy_double.DoubleBackwardWork(call, DoubleArrays(*[call.x] * (5 if ddx else 4)), None, None)
        did.clear()
        work.double_backward(np.zeros((2, 3), np.float32))
        assert did == ["all" if training else what]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_number_of_coefficients_of_gelu(monkeypatch: pytest.MonkeyPatch, dtype: Any):
    """As many as the dtype's digits need."""
    made, asked = gelu.half_erfcx, []
    monkeypatch.setattr(numpy_activations, "half_erfcx", lambda degree: asked.append(degree) or made(degree))
    numpy_activations.activate(np.zeros((1, 1, 3), dtype), "gelu", 0.0, [*np.zeros((3, 1, 1, 3), dtype)])
    assert asked == [10 if dtype == np.float32 else 20]
    z = np.linspace(0, 12, 1000)
    t = (z - gelu.ERFCX_CENTRE) / (z + gelu.ERFCX_CENTRE)
    exact = np.array([math.erfc(v / math.sqrt(2)) * math.exp(v * v / 2) / 2 for v in z])
    for degree, error in ((9, 2e-8), (10, 4e-9), (20, 4e-15)):
        assert len(gelu.half_erfcx(degree)) == degree + 1
        off = np.abs(np.polyval(gelu.half_erfcx(degree), t) - exact).max()
        print(degree, off)
        assert error / 8 < off < error


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.3, 1.0, 1.5, 2.0, 3.0])
def test_slopes_and_infinite_values(slope: float):
    """Rectifiers on both sides of their kink, and the limits of silu and gelu."""
    z = np.array([-np.inf, -900, -2, -0.0, 0, 3, 900, np.inf, np.nan], np.float32).reshape(1, 1, 9)
    dy = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 9)
    for activation, below in (("relu", 0.0), ("leaky_relu", slope), ("silu", 0.0), ("gelu", 0.0)):
        some = np.abs(z) >= (5 if activation in ("silu", "gelu") else 0)
        y, g, buffers = z.copy(), np.zeros_like(z), [*np.zeros((3, 1, 1, 9), np.float32)]
        with np.errstate(all="ignore"):
            numpy_activations.activate(y, activation, slope, buffers)
            numpy_activations.times_slope(dy, z.copy(), activation, slope, g, buffers)
            expected = np.where(z < 0, z * below if below else 0, z)
        assert_allclose(y[some], expected[some], rtol=1e-6)
        assert_allclose(g[some], (dy * np.where(z > 0, 1, below))[some], rtol=1e-6)
        assert np.isnan(y[..., -1]).all()


@pytest.mark.parametrize("size", [60, 600])
def test_an_eps_as_small_as_the_variance(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: int):
    """For values whose squares underflow in float32."""
    use_compiled(monkeypatch, False)
    x = (1e-21 * rng.standard_normal((2, 3, size))).astype(np.float32)
    _, saved = cn.instance_norm_forward(x, eps=1e-42)
    assert_allclose(saved.rstd, (x.astype(float).var(2) + 1e-42) ** -0.5, rtol=1e-6)


def test_tiles_of_a_double_backward_are_merged(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Sums about each tile's own shifts, of tiles of different sizes, become sums about the means."""
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", 4 * 50)
    call = saved_of((2, 3, 130), (390, 130, 1))
    call.rstd[...] = rng.uniform(0.5, 2, (2, 3))
    work = numpy_double.DoubleBackwardWork(call, DoubleArrays(*[call.x] * 5), None, None)
    work.sums = np.zeros((2, 3))
    rstd = call.rstd.astype(float)[:, :, None]
    xhat, g, u = rng.standard_normal((3, 2, 3, 130)) + np.array([0.1, 1000, -1000]).reshape(3, 1, 1, 1)
    g[:, :, :50] += 3
    parts = []
    for index in work.tile:
        part_x, part_g, part_u = (a[:, :, index[0]] for a in (xhat, g, u))
        shifts = [(a.mean(2) + rng.standard_normal((2, 3))).astype(np.float32).astype(float) for a in (part_g, part_u)]
        of_g, of_u = part_g - shifts[0][:, :, None], part_u - shifts[1][:, :, None]
        v = rstd * of_u
        dots = [(a * b).sum(2) for a, b in ((of_g, part_x), (v, part_x), (v, of_g))]
        count = np.full((2, 3), float(part_x.shape[2]))
        parts.append([count, part_x.sum(2), shifts[0], of_g.sum(2), shifts[1], of_u.sum(2), *dots])
    shift_g, shift_u, remainder_g, remainder_u, *numbers = work._joined(
        (slice(None), slice(None)), np.array(parts).swapaxes(0, 1)
    )
    for array, shift, remainder in ((g, shift_g, remainder_g), (u, shift_u, remainder_u)):
        assert shift.dtype == np.float32
        assert_equal(shift, array.mean(2).astype(np.float32))
        assert_allclose(shift + remainder, array.mean(2), rtol=1e-14)
    v, of_g = (rstd * (u - u.mean(2, keepdims=True))), g - g.mean(2, keepdims=True)
    a, c = (v * xhat).mean(2), (of_g * xhat).mean(2)
    s = (v * of_g).mean(2) - a * c
    assert_allclose(numbers, [xhat.mean(2), a, c, s], rtol=1e-9, atol=1e-12)
    assert_allclose(work.sums, 130 * s, rtol=1e-9)


def test_gradients_of_parameters_per_channel_are_summed_over_samples():
    sums = np.arange(12.0, dtype=np.float32).reshape(2, 3, 2)
    channel, sample = np.zeros(2, np.float16), np.zeros((3, 2), np.float32)
    for parameters in ((channel, sample), (sample, channel), (channel, None), (None, channel), (None, None)):
        for given in (sums, sums[:, :, :1], sums[:, :1]):
            found = cpu._gradients(given, *parameters)
            for gradient, parameter, exact in zip(found, parameters, given, strict=True):
                assert (gradient is None) == (parameter is None)
                if parameter is not None:
                    assert gradient.dtype == parameter.dtype
                    assert_equal(gradient, exact if parameter is sample else exact.sum(0))
