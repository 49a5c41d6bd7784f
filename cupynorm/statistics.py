"""Statistics of planes that are in parts: moments and gradient sums, and how those of parts are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, TypeVar

import numpy as np

from ._checks import check_number, device_of, known_place
from ._types import Array

Numbers = TypeVar("Numbers", "Moments", "GradientSums")

#: The dtype of each field of the classes below.
DTYPES = dict.fromkeys(("mean", "m2", "sum_dy", "sum_dy_xhat"), np.dtype(np.float64)) | {"count": np.dtype(np.int64)}


def _check_parts(first: Any, others: tuple[Any, ...]) -> None:
    """Raise unless the others are of the same class as the first, and all arrays have one shape and place."""
    kind = type(first).__name__
    shape = place = None
    for each in (first, *others):
        if type(each) is not type(first):
            raise TypeError(f"merge needs {kind}, got {type(each).__qualname__}")
        for name, array in vars(each).items():
            if getattr(array, "dtype", None) != DTYPES[name]:
                given = getattr(array, "dtype", type(array).__qualname__)
                raise TypeError(f"{kind}.{name} must be an array of dtype {DTYPES[name]}, got {given}")
            shape, place = shape or (array.shape,), place or known_place(array)
            if (array.shape,) != shape:
                shapes = f"{shape[0]} and {array.shape}"
                raise ValueError(f"{kind}.{name} has shapes {shapes}; parts of the same planes have the same (N, C)")
            if known_place(array) != place:
                raise ValueError(f"{kind}.{name} is on {place} and on {known_place(array)}; move one of them")


def new(kind: type[Numbers], make: Callable[[np.dtype], Array]) -> Numbers:
    """Return Moments or GradientSums of new arrays: make(dtype) for each field."""
    return kind(*(make(DTYPES[field.name]) for field in fields(kind)))


def _folded(pair: Callable[[Numbers, Numbers], Numbers], first: Numbers, others: tuple[Numbers, ...]) -> Numbers:
    """Check parts, and merge them pair by pair, in their order."""
    _check_parts(first, others)
    with _on_device_of(next(iter(vars(first).values()))):
        return reduce(pair, others, first)


@contextmanager
def _on_device_of(array: Array) -> Iterator[None]:
    """Compute on an array's device, where overflow and NaN are answers."""
    with device_of(array) or nullcontext(), np.errstate(all="ignore"):
        yield


@dataclass(eq=False, frozen=True)
class Moments:
    """Count, mean and centred sum of squares of each plane, or of parts of planes.

    `cupynorm.moments` computes them, `merge` merges those of parts, and `cupynorm.instance_norm(..., moments=)`
    normalises with them. The arrays are NumPy's, CuPy's or dask's. Two Moments are equal only if they are the same
    object.

    Attributes:
        count: (N, C) int64, the number of positions; 0 for an empty part.
        mean: (N, C) float64; 0 for an empty part.
        m2: (N, C) float64, the sum of (x - mean)^2; 0 for an empty part.

    Example:
        >>> image = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
        >>> left, right = cn.moments(image[..., :2]), cn.moments(image[..., 2:])
        >>> whole = left.merge(right)
        >>> whole.count, whole.mean, whole.var(ddof=1)
        (array([[6]]), array([[2.5]]), array([[3.5]]))
    """

    count: Array
    mean: Array
    m2: Array

    def var(self, ddof: float = 0) -> Array:
        """Return the variance m2 / (count - ddof), (N, C) float64: biased for ddof=0, unbiased for ddof=1.

        It is NaN, or infinite, where count is not greater than ddof, as in numpy.var.
        """
        ddof = check_number(ddof, "ddof")
        with _on_device_of(self.m2):
            return self.m2 / np.maximum(self.count - ddof, 0)

    def std(self, ddof: float = 0) -> Array:
        """Return the standard deviation, the root of `var`, (N, C) float64."""
        with _on_device_of(self.m2):
            return np.sqrt(self.var(ddof))

    def merge(self, *others: Moments) -> Moments:
        """Return the moments of these and other parts of the same planes together.

        Parts are merged in the order given, by Chan, Golub, LeVeque 1983, eq. 2.1, in float64: any order gives the same
        values up to rounding, the same order the same bits. Empty parts change nothing.

        Args:
            others: Moments of the same (N, C), on the same device.

        Raises:
            TypeError, ValueError: another class, shape or device.
        """
        return _folded(_chan, self, others)


def _chan(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    fraction = b.count / np.maximum(count, 1)
    distance = b.mean - a.mean
    mean, m2 = a.mean + distance * fraction, a.m2 + b.m2 + distance * distance * (a.count * fraction)
    first, second = a.count == 0, b.count == 0  # such a part changes nothing, not even infinity to NaN

    def merged(both: Array, of_a: Array, of_b: Array) -> Array:
        return np.where(second, of_a, np.where(first, of_b, both))

    return Moments(count, merged(mean, a.mean, b.mean), merged(m2, a.m2, b.m2))


#: The even places, the odd ones, and the last one, without a partner if there is an odd number.
_HALVES = slice(0, -1, 2), slice(1, None, 2), slice(-1, None)


def merge_tiles(counts: np.ndarray, means: np.ndarray, means_lo: np.ndarray, m2: np.ndarray) -> Moments:
    """Merge the moments of tiles, arrays (tiles, N, C): neighbours first, then neighbouring pairs, and so on.

    The means are means + means_lo. They are merged as distances from the first tile's: so float64 has digits to spare.
    """
    with np.errstate(all="ignore"):
        tiles = Moments(counts, (means - means[0]) + means_lo, m2)
        while len(tiles.mean) > 1:
            first, second, last = (Moments(*(a[part] for a in vars(tiles).values())) for part in _HALVES)
            pairs = [*vars(_chan(first, second)).values()]
            if len(tiles.mean) % 2:
                pairs = [np.concatenate(both) for both in zip(pairs, vars(last).values(), strict=True)]
            tiles = Moments(*pairs)
        return Moments(tiles.count[0].copy(), means[0] + tiles.mean[0], tiles.m2[0])


@dataclass(eq=False, frozen=True)
class GradientSums:
    """The two sums of each plane, or of parts of planes, from which a backward computes its gradients.

    `cupynorm.gradient_sums` computes them, `merge` adds up those of parts, and `instance_norm_backward(..., sums=)`
    uses them. Two GradientSums are equal only if they are the same object.

    Attributes:
        sum_dy: (N, C) float64, the sum of g, which is dy, or with an activation dy * activation'(z).
        sum_dy_xhat: (N, C) float64, the sum of g * xhat, where xhat = (x - mean) * rstd.
    """

    sum_dy: Array
    sum_dy_xhat: Array

    def merge(self, *others: GradientSums) -> GradientSums:
        """Return the sums of these and other parts of the same planes together, added in the order given.

        Args:
            others: GradientSums of the same (N, C), on the same device.

        Raises:
            TypeError, ValueError: another class, shape or device.
        """
        return _folded(_added, self, others)


def _added(a: GradientSums, b: GradientSums) -> GradientSums:
    return GradientSums(a.sum_dy + b.sum_dy, a.sum_dy_xhat + b.sum_dy_xhat)
