"""The contract of the backends, and which backend an array has.

A backend computes on arrays of one place; nothing is moved between devices. Its arguments have been checked.
`CpuBackend` (cupynorm.cpu) computes on NumPy arrays, `CudaBackend` (cupynorm.cuda.launch) on CuPy arrays.

One thing is outside the contract: on NumPy arrays `warmup` rehearses the compiled loops (`cupynorm.cpu.rehearsals`).
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any, Protocol

from ._types import Array, DoubleGradients, ForwardCall, ForwardResult, Gradients, Saved


class Backend(Protocol):
    """What the public functions call. A call that fails has changed no array of its caller, except `out`."""

    @abstractmethod
    def forward(self, call: ForwardCall) -> ForwardResult:
        """Normalise call.x, add the residual and apply the activation, in one pass if the planes fit on chip."""

    @abstractmethod
    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
        """Compute the gradients of a forward; dx is written to out, if given."""

    @abstractmethod
    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> DoubleGradients:
        """Compute the gradients of a backward without an activation. At least one of the first three is given."""

    @abstractmethod
    def describe(self, x: Array, *, activation: str | None, residual: bool, double_backward: bool) -> list[str]:
        """Return lines of text: the device, then how calls on x are computed if other arrays are laid out like x."""


#: The module of each kind of place, imported at first use. Its attribute `backend` is the Backend.
MODULES = {"cpu": "cupynorm.cpu", "cuda": "cupynorm.cuda.backend"}

_loaded: dict[str, Any] = {}


def backend_of(place: str) -> Backend:
    """Return the backend of a place: 'cpu' or 'cuda:<number>'."""
    name = MODULES["cpu" if place == "cpu" else "cuda"]
    # Not sys.modules: it has modules that another thread has only begun to import.
    module = _loaded.get(name) or _loaded.setdefault(name, importlib.import_module(name))
    backend: Backend = module.backend
    return backend
