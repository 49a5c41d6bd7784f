"""Arrays that tests call the functions with."""

from __future__ import annotations

from typing import Any

import numpy as np


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return normally distributed numbers, of mean 1 and standard deviation 2."""
    return (rng.standard_normal(shape) * 2 + 1).astype(dtype)
