"""What tests of the Chainer adapter share. Import it where Chainer is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm.chainer_import import chainer

Send = Callable[[Any], Any]


def host(array: Any) -> np.ndarray:
    return chainer.get_device("@numpy").send(chainer.as_array(array))


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.normal(size=shape).astype(dtype)
