"""The contract of the backends, and which backend an array has.

A backend computes on arrays of one place; nothing is moved between devices. Its arguments have been checked.
`CpuBackend` (cupynorm.cpu) computes on NumPy arrays, `CudaBackend` (cupynorm.cuda.launch) on CuPy arrays.

One thing is outside the contract: on NumPy arrays `warmup` rehearses the compiled loops (`cupynorm.cpu.rehearsals`).
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any, Protocol

import numpy as np

from ._types import Array, DoubleGradients, Explained, ForwardCall, ForwardResult, Gradients, Saved
from .statistics import GradientSums, Moments


class Backend(Protocol):
    """What the public functions call. A call that fails has changed no array of its caller, except `out`.

    A double backward is never called with a mask.

    Where x holds whole planes, `forward` is `moments` and `normalize` in one, and `backward` is `gradient_sums`,
    `input_gradient` and `parameter_gradients`. Where x is a part of each plane, these steps are called by themselves,
    and the moments and sums of the parts are merged in between.
    """

    @abstractmethod
    def facts(self, call: ForwardCall) -> tuple[Any, ...] | None:
        """Return what the checks of a call's arrays depend on, but for their addresses; None if they are to be checked
        in every call, or if one of them is not an array of this backend."""

    @abstractmethod
    def forward(self, call: ForwardCall) -> ForwardResult:
        """Normalise call.x with its own statistics, add the residual and apply the activation, in one pass if the
        planes fit on chip.

        call.trace is None, or what a call with the same options, on arrays with the same facts, had there afterwards.
        """

    @abstractmethod
    def backward(self, dy: Array, saved: Saved, *, out: Array | None) -> Gradients:
        """Compute the gradients of a forward; dx is written to out, if given."""

    @abstractmethod
    def double_backward(
        self, ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
    ) -> DoubleGradients:
        """Compute the gradients of a backward without an activation. At least one of the first three is given."""

    @abstractmethod
    def moments(self, x: Array, mask: Array | None = None, dtype: np.dtype | None = None) -> Moments:
        """Compute the moments of each plane, which may be empty. mask: bool, of x's shape; of its True positions.
        dtype: of the results that they are for, which decides on the precision with x's own; None: x's."""

    @abstractmethod
    def normalize(self, call: ForwardCall) -> ForwardResult:
        """Compute a forward with given statistics: call.moments, or without these the running ones."""

    @abstractmethod
    def gradient_sums(self, dy: Array, saved: Saved) -> GradientSums:
        """Compute the sums of each plane, which may be empty."""

    @abstractmethod
    def input_gradient(
        self, dy: Array, saved: Saved, sums: GradientSums, *, out: Array | None
    ) -> tuple[Array, Array | None]:
        """Compute dx and dresidual of a forward, given the sums of whole planes; dx is written to out, if given."""

    @abstractmethod
    def parameter_gradients(self, sums: GradientSums, saved: Saved) -> tuple[Array | None, Array | None]:
        """Compute dweight and dbias from sums."""

    @abstractmethod
    def describe(self, x: Array, calls: Explained) -> list[str]:
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
