"""The polynomial for the tail of the normal distribution, which gelu needs."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

ERFCX_CENTRE = 4.0  # the |z| at which the argument of the polynomial below is 0


@cache
def half_erfcx(degree: int) -> list[float]:
    """Return the coefficients of p, highest first: 1 - Phi(z) = p((z - c) / (z + c)) exp(-z**2 / 2) for z >= 0.

    c is ERFCX_CENTRE. p interpolates erfc(z / sqrt(2)) exp(z**2 / 2) / 2 at Chebyshev points up to z = 37, where erfc
    underflows in float64. The argument is from Shepherd, Laframboise 1981. The coefficients decay so fast that powers
    are as accurate as Chebyshev polynomials.
    """
    from numpy.polynomial import Chebyshev, Polynomial  # keeps the import of cupynorm light

    count = degree + 1
    end = (37 - ERFCX_CENTRE) / (37 + ERFCX_CENTRE)
    # Row k is T_k at the points. Angles are reduced as integers, as reduction in floating point would round.
    angles = np.outer(np.arange(count), 2 * np.arange(count) + 1) % (4 * count)
    cosines = np.cos(np.pi / (2 * count) * angles)
    t = (cosines[1] + 1) * (end + 1) / 2 - 1
    values = [math.erfc(z / math.sqrt(2)) * math.exp(z * z / 2) / 2 for z in ERFCX_CENTRE * (1 + t) / (1 - t)]
    series = cosines @ values * 2 / count
    series[0] /= 2
    return [float(c) for c in Chebyshev(series, domain=[-1, end]).convert(kind=Polynomial).coef[::-1]]
