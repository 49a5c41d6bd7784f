"""The compiled loops for short planes, which are processed several at a time: where they are, and which are odd.

The shortest ones lie across vectors: one position of several planes in each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.compare import assert_allclose, assert_equal
from helpers.loops import Cut, loops_across, loops_path, loops_places, loops_short, python_step, run_step

from cupynorm.cpu.blocking import Arrays

pytestmark = pytest.mark.compiled


def step_of(name: str, size: int, **further: Any) -> int:
    """Return a step for planes of this size, in float32."""
    lanes = 1 << (min(size, 8 if name.startswith("across") else 16).bit_length() - 1)
    return int(loops_path.module_of(name, loops_places.Kind("float32", lanes, **further))[0])


def middle_of(way: str, size: int) -> np.ndarray:
    """Return the positions from which a plane's mean is guessed."""
    count = min(8 if way == "across" else 16, size)
    return (size - count) // 2 + np.arange(count)


def test_sizes() -> None:
    """A plane's sum in computing precision has at most as many elements as that of a longer plane, in each lane; and
    a short plane is one tile.
    """
    assert loops_short.BACKWARD_SHORT <= loops_places.PARTIAL
    assert loops_short.FORWARD_SHORT // 16 <= loops_places.PARTIAL
    assert loops_short.FORWARD_SHORT <= loops_path.TILE
    assert loops_across.LONGEST_BACKWARD <= loops_across.LONGEST_FORWARD <= loops_across.LONGEST
    assert loops_across.LONGEST <= loops_short.BACKWARD_SHORT


@pytest.mark.parametrize(("way", "size"), [
    *(("short", size) for size in (1, 16, 64, 65, 128, 241, 512, 1024, 2048)),
    *(("across", size) for size in (1, 7, 8, 31, 64)),
])  # fmt: skip
def test_planes_processed_together_fit_the_l1_cache(rng: np.random.Generator, way: str, size: int) -> None:
    """Beside their results, and others that are prefetched.

    Here all planes are the same memory, and results replace it: those that are processed together have the same mean.
    """
    x = (100 + rng.standard_normal(size)).astype(np.float32)
    mean, mean_lo, rstd = np.zeros((3, 200), np.float32)
    address, _keep = python_step(lambda *_: None)
    run_step(
        step_of(f"{way}_forward", size), Cut(200, 1, size, (0, 0, 1)), Arrays(x, x), 0, 200,
        mean=mean, mean_lo=mean_lo, rstd=rstd, eps=0.5, whole=address,
        weight=np.zeros(1, np.float32), bias=np.full(1, 5, np.float32),
    )  # fmt: skip
    together = 0
    while together < 200 and mean[together] > 50:
        together += 1
    assert 4 * size * together <= 2**14
    assert together == (32 if way == "across" else min(loops_short.TOGETHER, max(2, 2048 // size)))
    assert mean[together] == 5  # as the results before it


@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize("size", [5, 16, 37])
@pytest.mark.parametrize("way", ["short", "across"])
def test_places_and_parameters_of_planes(rng: np.random.Generator, way: str, size: int, of_samples: bool) -> None:
    """From any plane on and beyond the end of a sample: places, weights, biases and statistics; others stay."""
    n, c = np.divmod(np.arange(20), 5)
    steps = [(-5 * 41, 41, 1), (50, -200, 1), (41, -4 * 41, 1), *[(0, 0, 1)] * 3]
    cut = Cut(5, 1, size, steps)
    weight, bias = rng.uniform(0.5, 2, (2, 4, 5)).astype(np.float32)
    if not of_samples:
        weight[:], bias[:] = weight[0], bias[0]
    strides = {"weight_n": 5 * of_samples, "weight_c": 1, "bias_n": 5 * of_samples, "bias_c": 1}
    memories = rng.standard_normal((3, 2500)).astype(np.float32)
    starts = [1000 + n * of_n + c * of_c for of_n, of_c, _ in steps[:3]]
    memories[0, starts[0][:, None] + middle_of(way, size)] /= 10  # or a guess might be bad by chance
    x, _, dy = (memory[start[:, None] + np.arange(size)] for memory, start in zip(memories, starts, strict=True))
    x, dy = x.reshape(4, 5, size), dy.reshape(4, 5, size)
    exact_y = reference.forward(x, weight, bias, eps=0.5)
    exact = reference.backward(dy, x, weight, bias=bias, eps=0.5)
    wide = x.astype(float)
    of_planes = wide.mean(-1), (wide.var(-1) + 0.5) ** -0.5
    xhat = (wide - of_planes[0][..., None]) * of_planes[1][..., None]
    sums = dy.astype(float).sum(-1), (dy * xhat).sum(-1)
    forward = step_of(f"{way}_forward", size)
    backward = step_of(f"{way}_backward", size, training=True)
    for first, last in ((0, 1), (0, 20), (3, 4), (4, 12), (13, 19), (6, 6)):
        part = slice(first, last)
        mean, mean_lo, rstd = np.full((3, 4, 5), 7, np.float32)
        before = memories[1].copy()
        given: Any = {"weight": weight, "bias": bias, **strides, "mean": mean, "mean_lo": mean_lo, "rstd": rstd}
        arrays = Arrays(*(memory[1000:] for memory in memories))
        run_step(forward, cut, arrays, first, last, eps=0.5, **given)
        expected = before.astype(float)
        expected[starts[1][part, None] + np.arange(size)] = exact_y.reshape(20, size)[part]
        assert_allclose(memories[1], expected, rtol=1e-5, atol=1e-5)
        assert_equal(memories[1][expected == before], before[expected == before])
        for found, value in zip((mean, rstd), of_planes, strict=True):
            assert_allclose(found.ravel()[part], value.ravel()[part], rtol=1e-6, atol=1e-6)
            assert (np.delete(found.ravel(), np.r_[part]) == 7).all()

        mean[...], mean_lo[...], rstd[...] = of_planes[0], 0, of_planes[1]
        mean_lo[...] = of_planes[0] - mean
        memories[1][:] = before
        sum_g, sum_g_xhat = np.full((2, 4, 5), 7, np.float32)
        run_step(backward, cut, arrays, first, last, sum_g=sum_g, sum_g_xhat=sum_g_xhat, **given)
        expected[starts[1][part, None] + np.arange(size)] = exact[0].reshape(20, size)[part]
        assert_allclose(memories[1], expected, rtol=1e-5, atol=1e-5)
        for found, value in zip((sum_g, sum_g_xhat), sums, strict=True):
            assert_allclose(found.ravel()[part], value.ravel()[part], rtol=1e-5, atol=1e-5)
            assert (np.delete(found.ravel(), np.r_[part]) == 7).all()
        memories[1][:] = before


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("way", "size"), [
    ("short", 16), ("short", 40), ("short", 300), ("across", 5), ("across", 24), ("across", 40), ("across", 63),
])  # fmt: skip
def test_odd_planes_are_left_to_the_usual_steps(rng: np.random.Generator, way: str, size: int, in_place: bool) -> None:
    """One by one, and nothing of them is written: those whose mean was guessed badly, from elements in the middle, and
    those with sums of squares below the least, or that overflow. Across the vectors the mean is not guessed.
    """
    inner = middle_of(way, size)
    count = len(inner)
    outer = np.ones(size, bool)
    outer[inner] = False
    x, odd = rng.standard_normal((7, size)), np.zeros(7, bool)
    x[:, inner] /= 10  # or the guess might be bad by chance
    x += 1000
    if size > 16:  # the middle alone has the mean 0, which is 0.97 or 1.03 deviations from the plane's mean
        x[0], x[0, outer] = 0, 1
        x[1] = x[0]
        mean = outer.mean()
        for j, far in enumerate((0.97, 1.03)):
            square = ((mean / far) ** 2 - (mean - mean**2)) * size / count
            x[j, inner] = np.sqrt(square) * np.where(np.arange(count) % 2, 1, -1)
            assert abs(abs(x[j].mean()) / x[j].std() - far) < 1e-6
        odd[1] = way == "short"
    for j, (value, is_odd) in enumerate(((2.0**-50, False), (2.0**-50 * (1 - 2**-20), True), (2.0**65, True)), 3):
        x[j], odd[j] = value * np.where(np.arange(size) % 2, 1, -1), is_odd
        x[j, size - size % 2 :] = 0  # so that the mean is 0 in any case
    x[3] *= 1 + 2.0 / size  # of which a part is 0
    x = x.astype(np.float32)
    y = x.copy() if in_place else np.full_like(x, 7)
    stats, variance = np.full((3, 7), 7, np.float32), np.full(7, 7, np.float32)
    left: list[Any] = []
    address, _keep = python_step(lambda _, *given: left.append(given))
    mean, mean_lo, rstd = stats
    eps = 2.0**-120
    run_step(
        step_of(f"{way}_forward", size), Cut(7, 1, size, (7 * size, size, 1)), Arrays(y if in_place else x, y), 0, 7,
        mean=mean, mean_lo=mean_lo, rstd=rstd, variance=variance, eps=eps, least=2.0**-100, whole=address,
        weight=np.full(1, 3, np.float32), bias=np.full(1, 0.5, np.float32),
    )  # fmt: skip
    assert left == [(int(j), int(j) + 1, 0) for j in np.flatnonzero(odd)]
    assert_equal(y[odd], x[odd] if in_place else 7)
    assert (stats[:, odd] == 7).all() and (variance[odd] == 7).all()
    x, y, stats, variance = x[~odd], y[~odd], stats[:, ~odd], variance[~odd]
    mean, mean_lo, rstd = stats
    exact = x.astype(np.longdouble)
    nearest = exact.mean(1).astype(np.float32)
    assert_allclose(mean, nearest, rtol=1e-7, atol=1e-7)
    assert_allclose(mean.astype(np.longdouble) + mean_lo, exact.mean(1), rtol=1e-9, atol=1e-6 * exact.std(1).max())
    assert_allclose(variance, exact.var(1), rtol=1e-5)
    assert_allclose(rstd, (exact.var(1) + eps) ** -0.5, rtol=1e-5)
    expected = (x - (mean + mean_lo.astype(float))[:, None]) * 3 * rstd[:, None] + 0.5
    assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
