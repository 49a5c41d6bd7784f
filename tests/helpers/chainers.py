"""What tests of the Chainer adapter share. Import it where Chainer is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm.chainer_import import chainer

Send = Callable[[Any], Any]

DTYPES = ("float16", "float32", "float64")
#: (with gamma, with beta)
AFFINE = [(True, True), (True, False), (False, True), (False, False)]


def host(array: Any) -> np.ndarray:
    return chainer.get_device("@numpy").send(chainer.as_array(array))


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.normal(size=shape).astype(dtype)
