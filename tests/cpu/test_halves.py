"""float16 in NumPy alone: the bits of NumPy's casts, whatever the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.backends import use_compiled
from helpers.compare import assert_same

import cupynorm as cn
from cupynorm.cpu import halves

pytestmark = pytest.mark.usefixtures("threads_as_they_were")

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)


def cast(values: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def widened(codes: np.ndarray) -> np.ndarray:
    buffer = np.empty(codes.size + 3, np.float32)
    halves.codes_in(buffer, codes.size)[...] = codes.view(np.uint16)
    halves.widen(buffer, codes.size)
    return buffer[: codes.size]


def check_narrow(values: np.ndarray) -> None:
    before = values.copy()
    with np.errstate(all="ignore"):
        codes = halves.narrow(values, np.empty(values.size + 3, np.float32))
    assert_same(codes.view(np.float16), cast(before, np.float16))
    assert_same(values, before)


@pytest.mark.parametrize("size", [1, 2**15 - 1, 2**15 + 1, 2**16])
def test_halves_are_read_as_numpy_does(size: int):
    assert_same(widened(HALVES[-size:]), cast(HALVES[-size:], np.float32))


def test_halves_are_written_as_numpy_does_about_every_border(rng: np.random.Generator):
    """Halves, the numbers in the middle between two, and the three numbers of float32 to each side; every exponent;
    NaN with any payload."""
    wide = cast(HALVES, np.float32)
    finite = np.sort(np.append(wide[np.isfinite(wide) & (wide >= 0)], np.float32(2**16)))
    middle = (finite[1:] + finite[:-1]) / 2
    points = np.concatenate([finite, middle, 2.0 ** np.arange(-149, 128), [np.inf]]).astype(np.float32)
    magnitudes = points.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    magnitudes = np.append(magnitudes[magnitudes >= 0], [0x7F802000, 0x7F802001, 0x7FC00000, 0x7FFFFFFF, 0x7F801FFF])
    bits = np.concatenate([magnitudes.view(np.uint32), magnitudes.view(np.uint32) | np.uint32(1 << 31)])
    check_narrow(rng.permutation(bits).view(np.float32))


@pytest.mark.parametrize("size", [1, 2**15 - 1, 2**15 + 1, 2**17])
def test_halves_are_written_as_numpy_does(rng: np.random.Generator, size: int):
    check_narrow(rng.integers(2**32, size=size, dtype=np.uint32).view(np.float32))


@pytest.mark.full
def test_halves_are_written_as_numpy_does_of_one_float_in_97():
    for first in range(0, 2**32, 97 * 2**20):
        check_narrow(np.arange(first, min(first + 97 * 2**20, 2**32), 97, dtype=np.uint64).astype(np.uint32).view("f4"))


LARGEST = np.nextafter(np.float32(65520), 0)


@pytest.mark.parametrize(("value", "pays"), [
    (0.0, False), (-0.0, False), (2.0**-14, False), (-(2.0**-14), False), (LARGEST, False), (-LARGEST, False),
    (np.nextafter(np.float32(2**-14), 0), True), (-1e-5, True), (1e-45, True), (-1e-45, True), (65520, True),
    (-1e30, True), (np.inf, True), (np.nan, True),
])  # fmt: skip
def test_few_samples_are_read(rng: np.random.Generator, value: float, pays: bool):
    """One that takes long pays, since there may be more of them."""
    values = rng.uniform(1, 2, (2, 4, halves.FEW // 8)).astype(np.float32)
    values[1, 2, 3] = value
    for each in (values, values.transpose(0, 2, 1)):
        assert halves.pays_to_narrow(each, np.empty(each.shape, np.float16)) == pays


def test_many_numbers_are_not_looked_at():
    few = halves.FEW
    for count, read, write in ((halves.LEAST - 1, False, False), (few, False, True), (few + 1, True, True)):
        values, part = np.full(count, 1e-6, np.float32), np.zeros(count, np.float16)
        assert (halves.pays_to_widen(part), halves.pays_to_narrow(values, part)) == (read, write)
        assert not halves.pays_to_widen(values)
        assert not halves.pays_to_narrow(values, values)
    assert halves.pays_to_narrow(np.ones(few + 1, np.float32), part)


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda a: a,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "crop": lambda a: np.pad(a, ((0, 0), (0, 1), (1, 1), (2, 1)))[:, :-1, 1:-1, 2:-1],
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(2, 3)).swapaxes(2, 3),
    "reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [
    (3, 5, 41, 43), (2, 9, 24, 20), pytest.param((1, 2, 750, 740), marks=pytest.mark.full),
])  # fmt: skip
def test_calls_have_the_bits_of_numpys_casts(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, layout: str, shape: tuple[int, ...]
):
    """Small results, large ones and infinite ones; in place; a residual and its gradient; the double backward."""
    use_compiled(monkeypatch, False)

    def drawn(scale: float) -> np.ndarray:
        return LAYOUTS[layout]((scale * rng.standard_normal(shape)).astype(np.float16))

    x, dy, residual = drawn(1), drawn(1e-5), drawn(1e-6)
    x[0, 1, :3, 5] = 1e-6
    dy[0, 0, 5, :3] = np.inf, np.nan, 0
    weight = np.resize(np.array([1e-6, 1, 3e4, 1e-3, 0], np.float32), shape[1])
    written = 0
    made = halves.narrow

    def narrow(values: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        nonlocal written
        written += values.size
        return made(values, buffer)

    def results() -> list[np.ndarray]:
        y, saved = cn.instance_norm_forward(x, weight, residual=residual, activation="leaky_relu")
        dx, *_, dresidual = cn.instance_norm_backward(dy, saved)
        z, plain = cn.instance_norm_forward(x, weight)
        twice = cn.instance_norm_double_backward(dy, None, None, dy, plain)
        there = x.copy()
        cn.instance_norm(there, out=there)
        return [y, dx, dresidual, z, *twice[:2], there]

    monkeypatch.setattr(halves, "narrow", narrow)
    ours = results()
    assert (len(ours) - 1) * x.size <= written <= len(ours) * x.size  # ordinary results of few elements are NumPy's
    monkeypatch.setattr(halves, "pays_to_widen", lambda part: False)
    monkeypatch.setattr(halves, "pays_to_narrow", lambda values, part: False)
    for one, other in zip(ours, results(), strict=True):
        assert_same(np.ascontiguousarray(one), np.ascontiguousarray(other))
