"""What results with a mask are to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from helpers import reference
from helpers.compare import wide


def broadcast(given: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    if "mask" in given:
        return np.broadcast_to(given["mask"], shape)
    short = np.arange(shape[-1]) < np.asarray(given["lengths"])[:, None]
    return np.broadcast_to(short.reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1]), shape)


class Exact:
    """The results with a mask in extended precision, from numpy.ma."""

    def __init__(self, x: np.ndarray, mask: np.ndarray, weight: Any = None, bias: Any = None, **options: Any):
        self.mask, self.axes = mask, tuple(range(2, x.ndim))
        self.epilogue = options.get("activation"), 0.01
        ma = np.ma.array(wide(np.where(mask, x, 0)), mask=~mask)
        self.count = mask.sum(self.axes)
        size = self.planes(np.maximum(self.count, 1))
        running, ddof = options.get("running"), options.get("ddof", 0)
        if running is None:
            mean = ma.mean(self.axes, keepdims=True).filled(0)
            self.m2 = ((ma - mean) ** 2).sum(self.axes, keepdims=True).filled(0)
            rest = self.planes(self.count) - ddof
            var = np.where(rest > 0, self.m2 / np.where(rest > 0, rest, 1), 0)
            self.mean = mean
        else:
            mean, var = (wide(a).reshape(1, -1, *(1,) * len(self.axes)) for a in running)
        eps, mode = options.get("eps", 1e-5), options.get("eps_mode", "variance")
        std = np.sqrt(var)
        self.rstd = 1 / {"variance": np.sqrt(var + eps), "std": std + eps, "max": np.maximum(std, eps)}[mode]
        changes = (std > (eps if mode == "max" else 0)) & (self.planes(self.count) > ddof)
        ratio = size / np.where(changes | (mode == "variance"), np.maximum(size - ddof, 1e-30), 1)
        slope = ratio * (1 + eps / np.where(changes, std, 1) if mode == "std" else 1)
        self.slope = np.where(changes | ((mode == "variance") & (self.planes(self.count) > ddof)), slope, 0)
        self.training, self.size = running is None, size
        self.xhat = np.where(mask, (wide(np.where(mask, x, 0)) - mean) * self.rstd, 0)
        self.weight = np.longdouble(1) if weight is None else self.planes(weight)
        residual = options.get("residual")
        z = self.xhat * self.weight + (0 if bias is None else self.planes(bias))
        self.z = z if residual is None else z + np.where(mask, wide(np.where(mask, residual, 0)), 0)
        self.y = np.where(mask, reference.activate(self.z, *self.epilogue), 0)

    def planes(self, values: Any) -> np.ndarray:
        return wide(values).reshape(*(values.shape if values.ndim == 2 else (1, -1)), *(1,) * len(self.axes))

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, ...]:
        g = np.where(self.mask, wide(np.where(self.mask, dy, 0)) * reference.slope(self.z, *self.epilogue), 0)
        sums = (g * self.xhat).sum((0, *self.axes)), g.sum((0, *self.axes))
        dx = g
        if self.training:
            mean_g, mean_xhat = (a.sum(self.axes, keepdims=True) / self.size for a in (g, g * self.xhat))
            dx = g - mean_g - self.xhat * mean_xhat * self.slope
        return np.where(self.mask, dx * self.rstd * self.weight, 0), *sums, g


def spoiled(array: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a copy with NaN, infinities and large numbers outside of the mask."""
    odd = rng.choice([np.nan, np.inf, -np.inf, 6e4], array.shape)
    return np.where(mask, array, odd).astype(array.dtype)
