"""What the tests of epilogues share: inputs, activations, shapes of parameters, the tier of dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupynorm as cn
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend

#: Marks the tests of a file: on the emulator, other dtypes than float32 belong to the full tier, since each dtype has
#: kernels of its own. (test_cases.py's table has every activation.)
OTHER_DTYPES = pytest.mark.full(simt=lambda given: not _float32(given))
SHAPE = 2, 3, 4, 5
ACTIVATIONS = None, "relu", "leaky_relu", "silu", "gelu"
SLOPE = 0.2
#: Shapes of weight and bias.
AFFINE: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "channels": ((3,), (3,)),
    "samples": ((2, 3), (2, 3)),
    "samples, channels": ((2, 3), (3,)),
    "channels, samples": ((3,), (2, 3)),
    "no weight, samples": (None, (2, 3)),
    "samples, no bias": ((2, 3), None),
}


def _float32(given: dict[str, Any]) -> bool:
    return str(given.get("dtype", "float32")) == "float32"


class Inputs:
    """Host arrays of one call. No z is so near to a kink that rounding could change its side."""

    def __init__(
        self,
        rng: np.random.Generator,
        shape: tuple[int, ...] = SHAPE,
        dtype: Any = np.float32,
        affine: str = "samples, channels",
        with_residual: bool = True,
        activation: str | None = None,
        training: bool = True,
    ):
        self.options = {"activation": activation, "negative_slope": SLOPE}
        while True:
            self.x, self.dy, residual = (normal(rng, shape, dtype) for _ in range(3))
            self.weight, self.bias = (
                None if s is None else rng.uniform(0.5, 1.5, s).astype(dtype) * rng.choice([-1, 1], s).astype(dtype)
                for s in AFFINE[affine]
            )
            self.residual = residual if with_residual else None
            self.running = normal(rng, shape[1:2], dtype), rng.uniform(0.5, 2, shape[1]).astype(dtype)
            self.exact = {"running": None if training else self.running, "residual": self.residual}
            z = reference.before_activation(self.x, self.weight, self.bias, **self.exact)
            if np.abs(z).min() > 1e-3:
                return

    def forward(self, backend: Backend, **other: Any) -> tuple[Any, cn.Saved]:
        x, weight, bias, residual = (
            None if a is None else backend.array(a) for a in (self.x, self.weight, self.bias, self.residual)
        )
        if self.exact["running"] is not None:
            mean, var = (backend.array(a.copy()) for a in self.running)
            other |= {"running_mean": mean, "running_var": var, "use_input_stats": False}
        return cn.instance_norm_forward(x, weight, bias, residual=residual, **self.options, **other)

    def expected(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return y, and [dx, dweight, dbias, dresidual]."""
        y = reference.forward(self.x, self.weight, self.bias, **self.exact, **self.options)
        gradients = reference.backward(self.dy, self.x, self.weight, bias=self.bias, **self.exact, **self.options)
        return y, list(gradients)
