"""The steps of the compiled loops by themselves: every position is visited once, the precision of sums, how tiles are
merged, and which planes are summed again or in float64.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_allclose, assert_equal
from helpers.loops import Cut, emitted, loops_forward, loops_path, loops_places, run_step

from cupynorm.cpu.blocking import Arrays

pytestmark = pytest.mark.compiled

SAMPLES, CHANNELS, RUNS, LENGTH = SHAPE = 3, 5, 7, 30
APART, STEP = 33, 6  # positions from run to run, and elements from one to the next if channels lie side by side
#: Blocks of a plane, or of 3 channels side by side; in one tile, in tiles of 3 runs, and of 12 positions of a run.
CUTS = [(group, runs, length) for group in (1, 3) for runs, length in ((7, 30), (3, 30), (1, 12))]


def kind_of(cut: Cut, dtype: str = "float32", **further: Any) -> Any:
    """Return the Kind with as many lanes as all tiles of this cut allow."""
    shortest = min(l1 - l0 for _, _, l0, l1 in cut.bounds) if cut.group == 1 else 2
    return loops_places.Kind(dtype, 1 << (min(shortest, 16).bit_length() - 1), cut.group > 1, **further)


@pytest.fixture(params=CUTS, ids=str)
def cut(request: pytest.FixtureRequest) -> Cut:
    """SHAPE, with gaps between runs and channels."""
    group, tile_runs, tile_length = request.param
    step = STEP if group > 1 else 1
    of_c = 1 if group > 1 else RUNS * APART
    of_n = RUNS * APART * (STEP if group > 1 else CHANNELS)
    table = APART * step * np.arange(RUNS)
    return Cut(
        CHANNELS, RUNS, LENGTH, (of_n, of_c, step), table, tile_runs=tile_runs, tile_length=tile_length, group=group
    )


def memory_of(cut: Cut, rng: np.random.Generator, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return memory of random numbers, and its view of SHAPE."""
    of_n, of_c, step = cut.geometry[loops_places.GEOMETRY.index("x_n") :][:3].tolist()
    memory = (offset + rng.standard_normal(SAMPLES * RUNS * APART * STEP)).astype(np.float32)
    steps = of_n, of_c, APART * step, step
    return memory, np.lib.stride_tricks.as_strided(memory, SHAPE, [4 * each for each in steps])


def items_of(cut: Cut) -> list[tuple[int, int, tuple[int, int, int, int]]]:
    """Return sample, first channel, and the bounds of the tile, of each item: tile by tile, then block by block."""
    return [(n, c, bounds) for n in range(SAMPLES) for c in range(0, CHANNELS, cut.group) for bounds in cut.bounds]


def part_of(array: np.ndarray, cut: Cut, item: tuple[int, int, tuple[int, int, int, int]]) -> np.ndarray:
    n, c, (r0, r1, l0, l1) = item
    return array[n, c : c + cut.group, r0:r1, l0:l1]


def test_results_of_items_are_written_once(cut: Cut, rng: np.random.Generator) -> None:
    """In place, so that a position that is visited twice shows; and no others, within the array and beside it."""
    (apply,) = loops_path.module_of("results", kind_of(cut))
    items = items_of(cut)
    mean, rstd = np.zeros((SAMPLES, CHANNELS), np.float32), np.ones((SAMPLES, CHANNELS), np.float32)
    for first, last in ((0, len(items)), (0, 1), (2, 6), (len(items) - 2, len(items)), (3, 3)):
        memory, view = memory_of(cut, rng)
        before = memory.copy()
        for item in items[first:last]:
            part_of(view, cut, item)[...] *= 2
        expected, memory[:] = memory.copy(), before
        run_step(
            apply, cut, Arrays(memory, memory), first, last,
            mean=mean, mean_lo=mean, rstd=rstd, weight=np.full(1, 2, np.float32),
        )  # fmt: skip
        assert_equal(memory, expected)


@pytest.mark.parametrize("start", [0, 7])
def test_sums_of_tiles_are_stored_by_item(cut: Cut, rng: np.random.Generator, start: int) -> None:
    """From any item on, the sums of each tile and of each channel of a group; the first sum has the number `start`."""
    cut.geometry[loops_places.GEOMETRY.index("sums")] = start
    reduce, _ = loops_path.module_of("statistics", kind_of(cut))
    backward, _ = loops_path.module_of("gradient_sums", kind_of(cut))
    (x, of_x), (dy, of_dy) = (memory_of(cut, rng, 3) for _ in range(2))
    mean, mean_lo, rstd = rng.uniform(2, 3, (3, SAMPLES, CHANNELS)).astype(np.float32)
    statistics: Any = {"mean": mean, "mean_lo": mean_lo - 2, "rstd": rstd}
    items = items_of(cut)
    for first, last in ((0, len(items)), (2, 6), (len(items) - 4, len(items))):
        found, sums = np.full((2, 3, start + len(items) * cut.group), np.nan)
        run_step(reduce, cut, Arrays(x, x), first, last, partials=found)
        run_step(backward, cut, Arrays(x, x, dy), first, last, partials=sums, **statistics)
        used = np.zeros(found.shape[1], bool)
        for i, item in enumerate(items[first:last], first):
            n, c, _ = item
            width = min(cut.group, CHANNELS - c)
            part, g = (part_of(each, cut, item).reshape(width, -1).astype(float) for each in (of_x, of_dy))
            at = slice(start + i * cut.group, start + i * cut.group + width)
            assert_allclose(found[0, at] + found[1, at], part.mean(1), rtol=1e-6)
            assert_allclose(found[2, at], part.var(1) * part.shape[1], rtol=1e-5)
            centred = part - mean[n, c : c + width, None].astype(float)  # in a unit of 2, as rstd is 2 to 3
            assert_allclose(sums[:2, at], [g.sum(1), 2 * (g * centred).sum(1)], rtol=1e-5, atol=1e-4)
            used[at] = True
        assert np.isnan(found[:, ~used]).all() and np.isnan(sums[:2, ~used]).all()
        assert np.isnan(sums[2]).all()


@pytest.mark.parametrize("wanted", [False, True])
def test_tiles_are_merged(rng: np.random.Generator, cut: Cut, wanted: bool) -> None:
    """Means as mean and mean_lo in float32; a variance, if wanted; and the sums of a backward, in float64 if wanted."""
    _, forward = loops_path.module_of("statistics", kind_of(cut))
    _, backward = loops_path.module_of("gradient_sums", kind_of(cut))
    group, tiles = cut.group, cut.tiles
    x = rng.standard_normal(SHAPE) + rng.choice([0, 1000], (SAMPLES, CHANNELS, 1, 1))
    blocks = [(n, c) for n in range(SAMPLES) for c in range(0, CHANNELS, group)]
    partials = np.full((3, len(blocks) * tiles * group), np.nan)
    for i, item in enumerate(items_of(cut)):
        for j, plane in enumerate(part_of(x, cut, item)):
            mean = np.float64(np.float32(plane.mean() + rng.standard_normal()))
            partials[:, i * group + j] = mean, plane.mean() - mean, ((plane - plane.mean()) ** 2).sum()
    exact = x.reshape(SAMPLES, CHANNELS, -1)
    of_planes = partials.reshape(3, SAMPLES, -1, tiles, group).sum(3).reshape(3, SAMPLES, -1)[:, :, :CHANNELS]
    nothing = np.zeros(1, np.float32)
    for first, last in ((0, len(blocks)), (2, 3), (len(blocks) - 2, len(blocks))):
        merged = np.zeros((SAMPLES, CHANNELS), bool)
        for n, c in blocks[first:last]:
            merged[n, c : c + group] = True
        mean, mean_lo, rstd, variance = np.full((4, SAMPLES, CHANNELS), 7, np.float32)
        statistics: Any = {"mean": mean, "mean_lo": mean_lo, "rstd": rstd}
        run_step(
            forward, cut, Arrays(nothing, nothing), first, last, partials=partials, eps=0.5,
            **({"variance": variance} if wanted else {}), **statistics,
        )  # fmt: skip
        nearest = exact.mean(-1).astype(np.float32)
        assert_equal(mean, np.where(merged, nearest, 7))
        assert_allclose(mean_lo, np.where(merged, exact.mean(-1) - nearest, 7), atol=1e-12)
        assert_allclose(rstd, np.where(merged, (exact.var(-1) + 0.5) ** -0.5, 7), rtol=2e-7)
        assert_allclose(variance, np.where(merged & wanted, exact.var(-1), 7), rtol=2e-7)

        sum_g, sum_g_xhat = np.full((2, SAMPLES, CHANNELS), 7, float if wanted else np.float32)
        run_step(
            backward, cut, Arrays(nothing, nothing), first, last, partials=partials[[2, 1, 0]], wide=int(wanted),
            sum_g=sum_g, sum_g_xhat=sum_g_xhat, **statistics,
        )  # fmt: skip
        assert_allclose(sum_g, np.where(merged, of_planes[2], 7), rtol=1e-14 if wanted else 2e-7)
        unit = 2.0 ** np.floor(np.log2(rstd))  # of_planes[1] are products with x - mean in this unit
        dots = (of_planes[1] - of_planes[2] * mean_lo.astype(float) * unit) * (rstd / unit).astype(np.float32)
        assert_allclose(
            sum_g_xhat, np.where(merged, dots, 7), rtol=1e-12 if wanted else 1e-6, atol=1e-11 if wanted else 1e-9
        )


# Precision


@cache
def with_given_guess(kind: Any) -> int:
    """Return the step reduce of a forward that guesses means from what lies 40 positions before a tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops_forward, "_guess_place", lambda i, tile, length: (tile.r0, tile.l0 - 40))
        return emitted(lambda module: loops_forward.statistics(module, kind), ["reduce"])[0]


def reduced(
    planes: np.ndarray, guess: float, channels_last: bool, least: float = 0.0
) -> list[tuple[float, float, float]]:
    """Return mean, mean_lo and m2 that the loops compute for planes, each of two runs, from a guess of their means."""
    count, size = planes.shape
    half, apart = size // 2, size // 2 + 64
    step, group = (count, count) if channels_last else (1, 1)
    memory = np.full(count * 2 * apart, guess, planes.dtype)
    cut = Cut(
        count, 2, half, (0, 1 if channels_last else 2 * apart, step), step * (64 + apart * np.arange(2)), group=group
    )
    for j, plane in enumerate(planes):
        for r in range(2):
            begin = j * cut.geometry[loops_places.GEOMETRY.index("x_c")] + cut.table[0, r]
            memory[begin::step][:half] = plane[r * half :][:half]
    lanes = 1 << (count.bit_length() - 1) if channels_last else 64 // max(planes.itemsize, 4)
    kind = loops_places.Kind(planes.dtype.name, lanes, channels_last)
    partials = np.full((3, count), np.nan)
    items = 1 if channels_last else count
    run_step(with_given_guess(kind), cut, Arrays(memory, memory), 0, items, partials=partials, least=least)
    return [(float(mean), float(mean_lo), float(m2)) for mean, mean_lo, m2 in partials.T]


BIG = np.float32(2**24)  # BIG + 1 is BIG in float32


def summed_with(one: int, size: int, channels_last: bool, backward: bool) -> set[int]:
    """Return the elements of a plane of two runs that are summed in float32 together with a given one."""
    step, count = 2 if channels_last else 1, 2 * size - 1
    apart = size + 64
    lanes = 2 if channels_last else 16
    others = [i for i in range(2 * size) if i != one]  # for each of them a sample of its own, or a plane
    of_sample = 2 * apart * step
    cut = Cut(
        2 if channels_last else count, 2, size, (of_sample, 1 if channels_last else of_sample, step),
        step * (64 + apart * np.arange(2)), group=step,
    )  # fmt: skip
    memory = np.zeros((count, 2 * apart, step), np.float32)
    for sample, other in enumerate(others):
        for position, value in ((one, BIG), (other, 1)):
            memory[sample, 64 + position // size * apart + position % size, -1] = value
    kind = loops_places.Kind("float32", lanes, channels_last)
    partials = np.full((3, count * step), np.nan)
    if backward:
        mean, rstd = np.zeros(2 * count, np.float32), np.ones(2 * count, np.float32)
        reduce, _ = loops_path.module_of("gradient_sums", kind)
        arrays = Arrays(np.ones_like(memory), memory, memory)
        run_step(reduce, cut, arrays, 0, count, partials=partials, mean=mean, mean_lo=mean, rstd=rstd)
        assert_equal(partials[0], partials[1])  # products with x - mean = 1
        totals = partials[0, step - 1 :: step]
    else:
        run_step(with_given_guess(kind), cut, Arrays(memory, memory), 0, count, partials=partials)
        assert (partials[0] == 0).all()
        totals = np.rint((partials[0] + partials[1])[step - 1 :: step] * (2 * size))
    assert set(totals) <= {float(BIG), float(BIG) + 1}
    return {other for other, total in zip(others, totals, strict=True) if total == BIG}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("one", [0, 100, 511, 512, 543, 549, 650, 1061])
def test_elements_summed_in_computing_precision(one: int, backward: bool) -> None:
    """512 elements in a row of one run, 32 in each of the 16 lanes. The elements of the last vector that the vectors
    before it do not have are summed with the first ones.
    """
    size = 550

    def place(element: int) -> tuple[int, ...]:
        run, i = divmod(element, size)
        return (run, 0, i - (size - 16)) if i >= size // 16 * 16 else (run, i // 512, i % 16)

    expected = {i for i in range(2 * size) if i != one and place(i) == place(one)}
    assert len(expected) <= 512 // 16  # besides the given one
    assert summed_with(one, size, False, backward) == expected


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("one", [0, 63, 64, 129, 130, 195, 259])
def test_elements_summed_in_computing_precision_channels_last(one: int, backward: bool) -> None:
    """64 elements of one run of a channel."""
    size = 130
    expected = {
        i for i in range(2 * size) if i != one and (i // size, i % size // 64) == (one // size, one % size // 64)
    }
    assert len(expected) < 64
    assert summed_with(one, size, True, backward) == expected


# Guesses of the mean


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("runs", "length"), [(1, 16), (1, 1000), (3, 50), (20, 33)])
def test_means_are_guessed_from_eight_places(
    rng: np.random.Generator, channels_last: bool, runs: int, length: int
) -> None:
    """Evenly spaced over the runs and over the positions in a run; from a vector, or a position of each channel. In
    each lane the largest and the smallest are left out."""
    group = 3 if channels_last else 1
    lanes, here = (2, 1) if channels_last else (16, 16)
    places = [(runs * i // 8, (length - here) * i // 7) for i in range(8)]
    far = np.ones(3)
    while not (far < 0.9).all():  # or the mean would not stay the guess
        x = (3 + rng.standard_normal((3, runs, length))).astype(np.float32)
        guess = np.sort([x[:, r, at : at + here].astype(float) for r, at in places], 0)[1:-1].mean((0, 2))
        far = np.abs(guess - x.mean((1, 2))) / x.std((1, 2))
    memory = np.ascontiguousarray(np.moveaxis(x, 0, -1)) if channels_last else x
    steps = (0, 1, 3) if channels_last else (0, runs * length, 1)
    cut = Cut(3, runs, length, steps, steps[2] * length * np.arange(runs), group=group)
    reduce, _ = loops_path.module_of("statistics", loops_places.Kind("float32", lanes, channels_last))
    partials = np.full((3, 3), np.nan)
    run_step(reduce, cut, Arrays(memory, memory), 0, 1 if channels_last else 3, partials=partials)
    assert_equal(partials[0], guess.astype(np.float32))
    assert_allclose(partials[0] + partials[1], x.astype(float).mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_planes_with_bad_guesses_are_summed_again(rng: np.random.Generator, channels_last: bool) -> None:
    """With a guess off by more than a deviation, the mean is exact; otherwise it is the guess, and mean_lo the rest."""
    z = rng.standard_normal((3, 300))
    z = 5 * (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    z[2] = 5 * np.sign(np.arange(300) - 149.5)  # a deviation of 5 exactly
    for far, again in (([4.8, -4.8, 5], False), ([5.2, -5.2, np.nextafter(np.float32(5), 6)], True)):
        x = (z + np.array(far)[:, None]).astype(np.float32)
        exact = x.astype(np.longdouble)
        for (mean, mean_lo, m2), plane, distance in zip(reduced(x, 0, channels_last), exact, far, strict=True):
            assert mean == (np.float32(mean) if again else 0)
            assert abs(mean - distance * again) < 1e-5
            assert abs(mean + mean_lo - plane.mean()) < 2e-6
            assert abs(m2 / ((plane - plane.mean()) ** 2).sum() - 1) < 2e-6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset", [0, 3, 1e6])
def test_guess_without_correct_digits(rng: np.random.Generator, channels_last: bool, offset: float) -> None:
    """The mean computed from it has none either; the next attempt corrects it by mean_lo."""
    x = (offset + rng.standard_normal((4, 200))).astype(np.float32)
    exact = x.astype(np.longdouble)
    for (mean, mean_lo, m2), plane in zip(reduced(x, -3e9, channels_last), exact, strict=True):
        print(mean, mean_lo)
        assert abs(mean + mean_lo - plane.mean()) < 1e-5
        assert abs(m2 / ((plane - plane.mean()) ** 2).sum() - 1) < (5e-5 if channels_last else 1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_squares_computed_in_float64(channels_last: bool) -> None:
    """If the mean square is below the least one, or a sum overflows; then the mean is not the guess."""
    x = np.tile(np.array([[1, -1]], np.float32), (4, 50))
    x *= np.float32([[2.0**-50], [2.0**-50 * (1 - 2**-20)], [2.0**65], [2.0**50]])
    found = reduced(x, 2.0**-60, channels_last, 2.0**-100)
    for (mean, mean_lo, m2), plane, wide in zip(found, x.astype(float), (False, True, True, False), strict=True):
        assert mean == (0 if wide else 2.0**-60)
        assert abs(mean + mean_lo) < 1e-17 * plane.max()
        assert abs(m2 / (plane**2).sum() - 1) < 1e-6
    means = [mean for mean, _, _ in reduced(x, 2.0**-60, channels_last)]
    assert means == [2.0**-60, 2.0**-60, 0, 2.0**-60]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [1.0, 2.0**-26])
def test_moments_in_float64(rng: np.random.Generator, dtype: str, spread: float, channels_last: bool) -> None:
    """Mean and mean_lo, and squares about their sum, with more digits than one float64 holds."""
    base = 2.0**26
    x = (base + spread * rng.standard_normal((2, 2000))).astype(dtype)
    for (mean, mean_lo, m2), plane in zip(reduced(x, base, channels_last, least=1e300), x, strict=True):
        exact = plane.astype(float) - base  # no digit is lost
        assert mean == np.dtype(dtype).type(mean)
        assert abs(((mean - base) - math.fsum(exact) / 2000) + mean_lo) < 1e-15 * max(spread, np.abs(exact).max())
        assert abs(m2 / max(math.fsum((exact - exact.mean()) ** 2), 1e-300) - 1) < 1e-13 or not exact.any()
