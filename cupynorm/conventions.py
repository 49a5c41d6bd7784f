"""How eps and ddof turn a variance into rstd, and how rstd depends on x: the conventions of different projects.

With std = sqrt(var) and var = m2 / (count - ddof), where m2 is the sum of (x - mean)^2:

    eps_mode      rstd                   used by
    "variance"    1 / sqrt(var + eps)    PyTorch's layers, RevIN; AdaIN with ddof=1
    "std"         1 / (std + eps)        NeMo's features, with ddof=1
    "max"         1 / max(std, eps)      nnU-Net's images

docs/guide/conventions.md says more about them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._types import Saved
from .statistics import Moments


def divisor_of(var: Any, eps: Any, eps_mode: str) -> Any:
    """Return 1 / rstd of variances, arrays or numbers, in their precision."""
    if eps_mode == "variance":
        return np.sqrt(var + eps)
    std = np.sqrt(var)
    return std + eps if eps_mode == "std" else np.maximum(std, eps)


def rstd_of(var: Any, eps: Any, eps_mode: str) -> Any:
    """Return rstd of variances, arrays or numbers, in their precision."""
    return 1 / divisor_of(var, eps, eps_mode)


def var_of(moments: Moments, ddof: float) -> Any:
    """Return var of moments, (N, C) float64; 0 where count is not greater than ddof."""
    return np.where(moments.count > ddof, moments.var(ddof), 0)


def terms_of_eps(eps: float, eps_mode: str) -> tuple[float, float, float]:
    """Return a, b and c of rstd = 1 / max(sqrt(var + a) + b, c)."""
    return tuple(eps if eps_mode == mode else 0.0 for mode in ("variance", "std", "max"))  # type: ignore[return-value]


def count_ratio(count: int, ddof: float) -> float:
    """Return count / (count - ddof), by which var exceeds the biased variance; 1 if count is not greater than ddof."""
    return count / (count - ddof) if ddof and count > ddof else 1.0


def count_ratios(counts: Any, ddof: float) -> np.ndarray:
    """Return count / (count - ddof) of each plane; 0 where count is not greater than ddof."""
    rest = np.maximum(counts - ddof, 0.0)
    return np.divide(counts, rest, out=np.zeros(np.shape(rest)), where=rest > 0)


def rstd_slope(saved: Saved) -> np.ndarray | None:
    """Return count * s for each plane, (N, C) float64, where d rstd / dx = -s * rstd^2 * xhat; None if it is 1.

    It is count / (count - ddof) if eps is in the variance; with eps beside it, (1 + eps / std) times that; and 0 where
    rstd is a constant: at std = 0, at std < eps with "max", and where count is not greater than ddof.

    std follows from rstd. If that has lost it beside eps, the slope does not matter: dx contains it times xhat^2.
    """
    if saved.usual_rstd or not saved.training:
        return None
    count = math.prod(saved.x.shape[2:]) if saved.count is None else saved.count
    ratio = count_ratios(count, saved.ddof)
    if saved.eps_mode == "variance":
        return np.broadcast_to(ratio, saved.rstd.shape)
    with np.errstate(all="ignore"):  # rstd may be infinite
        beyond = 1 - saved.eps * saved.rstd.astype(np.float64)  # with "std" it is std / (std + eps)
        changes = beyond > 4 * np.finfo(saved.rstd.dtype).eps
        return np.where(changes, ratio / (np.where(changes, beyond, 1) if saved.eps_mode == "std" else 1), 0)
