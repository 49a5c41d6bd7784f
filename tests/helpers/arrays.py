"""Arrays that tests call the functions with."""

from __future__ import annotations

from typing import Any

import numpy as np


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return normally distributed numbers, of mean 1 and standard deviation 2."""
    return (rng.standard_normal(shape) * 2 + 1).astype(dtype)


def laid(array: np.ndarray, layout: str) -> np.ndarray:
    """Return the array's values in this layout; "expanded" repeats those of one plane."""
    if layout == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    if layout == "crop":
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
        wide[..., 1:-2] = array
        return wide[..., 1:-2]
    if layout == "every second column":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "transposed":
        return np.ascontiguousarray(array.swapaxes(2, 3)).swapaxes(2, 3)
    if layout == "expanded":
        return np.broadcast_to(array[:1, :1], array.shape)
    return array
