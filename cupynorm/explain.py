"""Describe in words how a call will be computed."""

from __future__ import annotations

from typing import Any

from ._checks import check_activation, check_input, check_no_activation, check_result_dtype
from ._types import Array
from .backend import backend_of
from .cuda.describe import describe
from .cuda.device import DEVICES
from .devices import dtype_of


def explain(
    x: Array,
    *,
    dtype: Any = None,
    activation: str | None = None,
    residual: bool = False,
    double_backward: bool = False,
    parts: bool = False,
    device: str | None = None,
) -> str:
    """Describe how the forward and backward of an array will be computed, and why.

    Args:
        x: NumPy or CuPy array (N, C, *spatial), as for `cupynorm.instance_norm`; only shape, strides, dtype and address
            matter. All other arrays of the call (residual, dy, results) are assumed to be new, in the layout of x.
        dtype: of the result, as for `cupynorm.instance_norm`.
        activation: as for `cupynorm.instance_norm`.
        residual: True if the call has a residual.
        double_backward: also describe `cupynorm.instance_norm_double_backward`.
        parts: also describe calls on parts of planes: `cupynorm.moments`, the forward with `moments=`,
            `cupynorm.gradient_sums`, and the backward with `sums=`.
        device: a GPU to plan for, which this machine need not have: "T4", "V100", "A100", "L4", "H100", "H200", "B200"
            or "RTX 5090". None plans for the device of x.

    Returns:
        A few lines of text: for CUDA the regime, the reason for it, whether arrays are read in place, the memory
        traffic in element-sized accesses per element, the launches, and the facts besides the sample itself that the
        bits of its results depend on.

    Raises:
        TypeError, ValueError: x cannot be normalised, the activation or the device is unknown, or double_backward is
            combined with an activation.
    """
    result = x.dtype if dtype is None else dtype_of(dtype)
    if dtype is not None:
        check_result_dtype(result)
    place = check_input(x, integers=dtype is not None)
    check_activation(activation)
    if double_backward:
        check_no_activation(activation)
    if device is None:
        lines = backend_of(place).describe(
            x, dtype=result, activation=activation, residual=residual, double_backward=double_backward, parts=parts
        )
    elif device in DEVICES:
        address = x.ctypes.data if place == "cpu" else x.data.ptr
        lines = describe(
            x, address, DEVICES[device], dtype=result, activation=activation, residual=residual,
            double_backward=double_backward, parts=parts,
        )  # fmt: skip
    else:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    return f"{x.shape} {x.dtype.name} on " + "\n".join(lines)
