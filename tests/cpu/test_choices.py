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

import cupynorm as cn
from cupynorm import cpu
from cupynorm.cpu import blocking, gelu, numpy_activations, numpy_double, numpy_path, numpy_small
from cupynorm.cpu.blocking import Arrays
from cupynorm.cpu.numpy_double import DoubleArrays

pytestmark = pytest.mark.usefixtures("threads_as_they_were")


def as_channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def saved_of(shape: tuple[int, ...], steps: Sequence[int], activation: str | None = None) -> cn.Saved:
    """Return Saved of an array with these strides, in elements, that takes no memory: it must not be read."""
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, [4 * step for step in steps])
    stats = np.zeros((3, *shape[:2]), np.float32)
    return cn.Saved(x, stats, None, None, True, activation)


def steps_of(shape: tuple[int, ...], channels_last: bool = False) -> list[int]:
    """Return the strides, in elements, of an array without gaps."""
    order = [0, *range(2, len(shape)), 1] if channels_last else range(len(shape))
    steps = dict(
        zip(order, (math.prod(shape[axis] for axis in order[i + 1 :]) for i in range(len(shape))), strict=True)
    )
    return [steps[axis] for axis in range(len(shape))]


@pytest.fixture(autouse=True)
def small_calls_are_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_path, "MIN_CHANNELS", 2)  # few channels are channels-last
    monkeypatch.setattr(numpy_small, "MOST", 0)


def on_numpy(shape: tuple[int, ...], channels_last: bool = False, activation: str | None = None) -> Any:
    call = saved_of(shape, steps_of(shape, channels_last), activation)
    return numpy_path.NumpyWork(call, Arrays(call.x, call.x))


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
    work.call.rstd[...], work.call.training = 1, False
    work.call.statistics = work.call.statistics[:2]  # without mean_lo
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
    work.call.eps = eps
    for value, odd in ((2.0**-50, False), (2.0**-50 * (1 - 2**-20), some), (2.0**65, True)):
        x = np.array([[1, -1, -1, 1], [value, -value, -value, value]], np.float32)[None]
        mean, mean_lo, variance, _ = work._moments(x, None, np.empty((3, x.size), np.float32))
        assert variance.dtype == (np.float64 if odd else np.float32)
        assert_allclose(variance, x[..., 0].astype(float) ** 2, rtol=1e-6)
        assert not mean.any() and not mean_lo.any()


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
    call = cn.Saved(x, np.zeros((3, *x.shape[:2]), x.dtype), None, None, True, None)
    work = numpy_path.NumpyWork(call, Arrays(x, x))
    work.call.eps = eps
    with np.errstate(all="ignore"):
        return work._moments(x, None, np.empty((3, x.size), x.dtype))[:3]


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
    work.call.eps, work.variance = 0.5, np.full((2, 3), 7, np.float32)
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
        for forward in (lambda work=work: work.forward(None), work.normalize):
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
