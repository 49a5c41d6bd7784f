"""Statistics of planes that are in parts: moments and gradient sums, and how those of parts are merged."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np

from ._checks import check_number, known_place
from ._types import Array


def _alike(first: Any, others: tuple[Any, ...]) -> None:
    """Raise unless the others are of the same class as the first, with arrays of the same shapes and places."""
    kind = type(first).__name__
    for other in others:
        if type(other) is not type(first):
            raise TypeError(f"merge needs {kind}, got {type(other).__qualname__}")
        for field in fields(first):
            mine, theirs = getattr(first, field.name), getattr(other, field.name)
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"{kind}.{field.name} has shapes {mine.shape} and {theirs.shape}; parts of the same planes have "
                    "the same (N, C)"
                )
            places = known_place(mine), known_place(theirs)
            if places[0] != places[1]:
                raise ValueError(f"{kind}.{field.name} is on {places[0]} and on {places[1]}; move one of them")


@dataclass(eq=False, frozen=True)
class Moments:
    """Count, mean and centred sum of squares of each plane, or of parts of planes.

    count: (N, C) int64, the number of positions; 0 for an empty part.
    mean: (N, C) float64; 0 for an empty part.
    m2: (N, C) float64, the sum of (x - mean)^2; 0 for an empty part.

    `cupynorm.moments` computes them, `merge` merges those of parts, and `cupynorm.instance_norm(..., moments=)`
    normalises with them. The arrays are NumPy's, CuPy's or dask's. Two Moments are equal only if they are the same
    object.
    """

    count: Array
    mean: Array
    m2: Array

    def var(self, ddof: float = 0) -> Array:
        """Return the variance m2 / (count - ddof), (N, C) float64: biased for ddof=0, unbiased for ddof=1.

        It is NaN, or infinite, where count is not greater than ddof, as in numpy.var.
        """
        ddof = check_number(ddof, "ddof")
        with np.errstate(all="ignore"):
            return self.m2 / np.maximum(self.count - ddof, 0)

    def std(self, ddof: float = 0) -> Array:
        """Return the standard deviation, the root of `var`, (N, C) float64."""
        with np.errstate(all="ignore"):
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
        _alike(self, others)
        with np.errstate(all="ignore"):  # overflow and NaN are answers
            return reduce(_chan, others, self)


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
        return Moments(tiles.count[0], means[0] + tiles.mean[0], tiles.m2[0])


@dataclass(eq=False, frozen=True)
class GradientSums:
    """The two sums of each plane, or of parts of planes, from which a backward computes its gradients.

    sum_dy: (N, C) float64, the sum of g, which is dy, or with an activation dy * activation'(z).
    sum_dy_xhat: (N, C) float64, the sum of g * xhat, where xhat = (x - mean) * rstd.

    `cupynorm.gradient_sums` computes them, `merge` adds up those of parts, and `instance_norm_backward(..., sums=)`
    uses them. Two GradientSums are equal only if they are the same object.
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
        _alike(self, others)
        with np.errstate(all="ignore"):
            return reduce(_added, others, self)


def _added(a: GradientSums, b: GradientSums) -> GradientSums:
    return GradientSums(a.sum_dy + b.sum_dy, a.sum_dy_xhat + b.sum_dy_xhat)
