"""What the tests of PyTorch's behaviour share: its layers and ours, and refusals that change nothing.

If PyTorch is installed, the tests check it as well, and so the expectations themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from helpers.backends import Backend
from helpers.layers import LAYERS, contents
from helpers.optional import imported

torch = imported("torch")
SHAPES = {1: (2, 3, 6), 2: (2, 3, 4, 5), 3: (2, 3, 2, 3, 2)}


def torch_layer(rank: int, *args: Any, **kwargs: Any) -> Any:
    return getattr(torch.nn, f"InstanceNorm{rank}d")(*args, **kwargs)


@contextmanager
def refused(error: type[Exception], match: str, *things: Any) -> Iterator[None]:
    """Assert that the block raises, and leaves these arrays and layers unchanged."""
    before = contents(*things)
    with pytest.raises(error, match=match):
        yield
    assert contents(*things) == before


def full_layer(backend: Backend, rank: int = 2, **kwargs: Any) -> Any:
    """An affine, tracking layer whose state and gradients all differ from their initial values."""
    layer = LAYERS[rank](3, affine=True, track_running_stats=True, device=backend.device, **kwargs)
    layer.weight.data = backend.array(np.array([1.5, -0.5, 2], layer.weight.dtype))
    if layer.bias is not None:
        layer.bias.data = backend.array(np.array([0.25, 1, -3], layer.bias.dtype))
    layer.running_mean[...] = backend.array(np.array([1, 2, 0.5], layer.running_mean.dtype))
    layer.running_var[...] = backend.array(np.array([3, 0.5, 1], layer.running_var.dtype))
    for number, parameter in enumerate(layer.params()):
        parameter.grad = backend.array(np.full(3, 0.5 + number, parameter.dtype))
    return layer
