"""Array comparisons: a failure shows the place, both values, the error in roundings, and the kernels that ran."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cupynorm import devices

from .backends import LAUNCHED

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: Unit roundoff of each dtype, and the spacing of its denormal numbers.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
GRAIN = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
#: Exact values beyond this may be stored as infinity.
LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.79e308}


def wide(array: Any) -> np.ndarray:
    """Convert to extended precision."""
    array = np.asarray(array)
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        return array if array.dtype == np.longdouble else array.astype(np.float64).astype(np.longdouble)


def assert_within(actual: np.ndarray, expected: Any, bound: Any, what: str = "result", overflow: bool = False) -> None:
    """Assert |actual - expected| <= bound for each element; expected and bound are broadcast to actual.

    NaN must be exactly where NaN is expected, whatever the bound; a bound of NaN checks nothing else. overflow: values
    beyond the dtype's range may be infinity.
    """
    actual = np.asarray(actual)
    exact = np.broadcast_to(wide(expected), actual.shape)
    bound = np.broadcast_to(np.asarray(bound, np.longdouble), actual.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(wide(actual) - exact)
        if ((error <= bound) & (error < np.inf)).all():  # most comparisons: neither NaN nor infinity, and no fault
            return
    error = errors(actual, exact, overflow)
    with np.errstate(invalid="ignore"):
        wrong = (np.isnan(wide(actual)) != np.isnan(exact)) | ((~(error <= bound) | np.isinf(error)) & ~np.isnan(bound))
    if wrong.any():
        raise AssertionError(explain(actual, expected, error, bound, wrong, what))


def assert_allclose(actual: Any, expected: Any, rtol: float = 1e-7, atol: float = 0.0, what: str = "result") -> None:
    """Like NumPy's assert_allclose: within atol + rtol * |expected|."""
    actual, expected = np.broadcast_arrays(np.asarray(actual), np.asarray(expected))
    assert_within(actual, expected, atol + rtol * np.abs(wide(expected)), what)


def assert_equal(actual: Any, expected: Any, what: str = "result", strict: bool = False) -> None:
    """Assert equal values; NaN equals NaN, -0 equals 0. strict: equal shape and dtype, too."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert not strict or (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    actual, expected = np.broadcast_arrays(actual, expected)
    if actual.dtype.kind in "fV":
        assert_within(actual, expected, 0.0, what)
    elif (wrong := actual != expected).any():
        raise AssertionError(explain(actual, expected, wrong.astype(float), np.zeros(wrong.shape), wrong, what))


def errors(actual: np.ndarray, exact: np.ndarray, overflow: bool = False) -> np.ndarray:
    """Return |actual - exact|: 0 where both are NaN or infinity is allowed, infinite where only one is NaN."""
    ours, largest = wide(actual), LARGEST[actual.dtype.name] if overflow else np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        same = (ours == exact) | (np.isnan(ours) & np.isnan(exact))
        same |= np.isinf(ours) & (np.sign(ours) * exact > largest)
        error = np.where(same, 0, np.abs(ours - exact))
    return np.where(np.isnan(error), np.inf, error)


def assert_same(actual: Any, expected: Any, what: str = "result") -> None:
    """Assert the same shape, dtype and bits: the signs of zeros and the payloads of NaN count."""
    actual, expected = devices.to_host(actual), devices.to_host(expected)
    kinds = [f"{array.dtype.name} of shape {array.shape}" for array in (actual, expected)]
    assert kinds[0] == kinds[1], f"{what}: got {kinds[0]}, expected {kinds[1]}"
    if actual.tobytes() == expected.tobytes():
        return
    size = actual.dtype.itemsize
    bits = [np.frombuffer(a.tobytes(), np.uint8).reshape(-1, size) for a in (actual, expected)]
    wrong = (bits[0] != bits[1]).any(1).reshape(actual.shape)
    error = errors(actual, wide(expected)) if actual.dtype.kind in "fV" else wrong.astype(np.longdouble)
    error = np.where(wrong & (error == 0), np.longdouble(np.finfo(np.longdouble).tiny), error)  # -0, or another NaN
    raise AssertionError(explain(actual, expected, error, np.zeros(actual.shape), wrong, f"{what}, bits"))


class Bits:
    """A copy of an array for later comparison, also inside lists and dicts: equal if shape, dtype and bits are equal.
    If an assertion finds two unequal, pytest shows the message of assert_same (`difference`).
    """

    def __init__(self, array: Any):
        self.array = devices.to_host(array).copy("C")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bits):
            return NotImplemented
        ours, theirs = self.array, other.array
        return (ours.shape, ours.dtype, ours.tobytes()) == (theirs.shape, theirs.dtype, theirs.tobytes())

    def __hash__(self) -> int:
        return hash(self.array.tobytes())

    def __repr__(self) -> str:
        return f"Bits of {self.array.dtype.name} of shape {self.array.shape}"


def bits(*arrays: Any) -> list[Bits | None]:
    return [None if array is None else Bits(array) for array in arrays]


def difference(actual: Any, expected: Any, what: str = "result") -> list[str] | None:
    """Return lines that explain the first unequal pair of Bits, or None."""
    if isinstance(actual, Bits) and isinstance(expected, Bits):
        try:
            assert_same(actual.array, expected.array, what)
        except AssertionError as error:
            return str(error).splitlines()
        return None
    if isinstance(actual, dict) and isinstance(expected, dict):
        pairs = [(actual[key], expected[key], key) for key in actual if key in expected]
    elif isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple)):
        pairs = [(*pair, number) for number, pair in enumerate(zip(actual, expected, strict=False))]
    else:
        return None
    found = (difference(ours, theirs, f"{what}[{key!r}]") for ours, theirs, key in pairs)
    return next((lines for lines in found if lines), None)


def explain(
    actual: np.ndarray, expected: Any, error: np.ndarray, bound: np.ndarray, wrong: np.ndarray, what: str
) -> str:
    """Format the message of a failed comparison: about the element with the largest error relative to its bound."""
    actual = np.asarray(actual)
    exact = np.broadcast_to(np.asarray(expected), actual.shape)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        times = np.where(wrong, error / np.where(bound > 0, bound, np.finfo(np.longdouble).tiny), -1)
    at = np.unravel_index(int(np.argmax(times)), times.shape)
    name = actual.dtype.name
    lines = [
        f"{what}: {int(wrong.sum())} of {actual.size} elements of shape {actual.shape}, {name}, are off; the worst, "
        f"at {tuple(map(int, at))}:",
        f"  got       {_number(actual[at], name)}",
        f"  expected  {_number(exact[at], name)}",
        f"  error     {_of(error[at], exact[at], name)}",
        f"  bound     {_of(bound[at], exact[at], name)}",
    ]
    if LAUNCHED:
        lines += ["  kernels   " + "\n            ".join(LAUNCHED)]
    return "\n".join(lines)


def _number(value: Any, name: str) -> str:
    digits = {"float16": 6, "bfloat16": 5, "float32": 10}.get(name, 18)
    return f"{float(value):.{digits}g}" if np.asarray(value).dtype.kind in "fV" else str(value)


def _of(error: Any, value: Any, name: str) -> str:
    """Format an error, in absolute terms and in roundings of the dtype at this value."""
    said = f"{float(error):.3g}"
    if name not in ROUNDING or not np.isfinite(float(value)) or not np.isfinite(float(error)):
        return said
    power = 2.0 ** np.floor(np.log2(abs(float(value)))) if value else 0.0
    one = max(power * ROUNDING[name], GRAIN[name] / 2)
    return f"{said}: {float(error) / one:.3g} roundings of {one:.3g}"
