"""Layers, and what they hold."""

from __future__ import annotations

from typing import Any

import numpy as np

import cupynorm as cn
from cupynorm import devices
from helpers.compare import Bits

LAYERS = {1: cn.InstanceNorm1d, 2: cn.InstanceNorm2d, 3: cn.InstanceNorm3d}
SHAPES = {1: (2, 3, 20), 2: (2, 3, 4, 5), 3: (2, 3, 2, 2, 5)}
KEYS = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"


def full(rank: int = 2, device: str = "cpu", **kwargs: Any) -> Any:
    """An affine, tracking layer."""
    return LAYERS[rank](3, affine=True, track_running_stats=True, device=device, **kwargs)


def arrays_of(layer: Any) -> dict[str, Any]:
    """The layer's own arrays by PyTorch's names."""
    found = {name: getattr(layer, name) for name in KEYS}
    return {
        name: value.data if isinstance(value, cn.Parameter) else value
        for name, value in found.items()
        if value is not None
    }


def held(layer: Any) -> dict[str, Any]:
    """Every array of a layer, by name, with those of its gradients."""
    grads = {f"{name}.grad": parameter.grad for name, parameter in layer.namedparams()}
    return arrays_of(layer) | {name: grad for name, grad in grads.items() if grad is not None}


def contents(*things: Any) -> dict[str, Any]:
    """The identity and the bits of arrays, and of everything that a layer holds, for comparison. A layer's are named
    by themselves, another thing by its number."""
    found = {}
    for number, thing in enumerate(things):
        arrays = held(thing) if isinstance(thing, tuple(LAYERS.values())) else {str(number): thing}
        assert found.keys().isdisjoint(arrays), "of several layers the names would be the same"
        found |= {name: (id(array), Bits(array)) for name, array in arrays.items()}
    return found


def fill(layer: Any, rng: np.random.Generator) -> None:
    """Give every parameter and statistic a value of its own."""
    for name, array in arrays_of(layer).items():
        if name != "num_batches_tracked":
            values = rng.uniform(0.5, 2, 3).astype(array.dtype)
            array[...] = devices.to_device(values, layer.device)
