"""Describe in words how a call will be computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

from ._checks import check_activation, check_input, check_no_activation, check_no_mask, place_of
from ._types import Array, Explained, array_module
from .backend import backend_of
from .cuda.describe import describe
from .cuda.device import DEVICES
from .devices import result_dtype_of
from .scores import axes_of, dtypes_of, view_of_planes


def explain(
    x: Array,
    *,
    axis: int | Sequence[int] | EllipsisType | None = ...,
    dtype: Any = None,
    activation: str | None = None,
    residual: bool = False,
    mask: bool = False,
    double_backward: bool = False,
    parts: bool = False,
    device: str | None = None,
) -> str:
    """Describe how the forward and backward of an array will be computed, and why; or, with an axis, its z-scores.

    Args:
        x: NumPy or CuPy array (N, C, *spatial), as for `cupynorm.instance_norm`; only shape, strides, dtype and address
            matter. All other arrays of the call (residual, dy, results) are assumed to be new, in the layout of x.
        axis: by default instance normalisation is described. With an axis, as for `cupynorm.zscore`, that call is, for
            an x of any rank; of the other arguments dtype, mask and device may be given.
        dtype: of the result, as for `cupynorm.instance_norm`.
        activation: as for `cupynorm.instance_norm`.
        residual: True if the call has a residual.
        mask: True if the call has a mask, lengths, or nan_policy="omit".
        double_backward: also describe `cupynorm.instance_norm_double_backward`.
        parts: also describe calls on parts of planes: `cupynorm.moments`, the forward with `moments=`,
            `cupynorm.gradient_sums`, and the backward with `sums=`.
        device: a GPU to plan for, which this machine need not have: "T4", "V100", "A100", "L4", "H100", "H200", "B200"
            or "RTX 5090". None plans for the device of x.

    Returns:
        A few lines of text: for CUDA the regime, the reason for it, whether arrays are read in place, the memory
        traffic in element-sized accesses per element, the launches, and the facts besides the sample itself that the
        bits of its results depend on. For z-scores first the planes as which the array is seen, and whether a copy is
        needed for that.

    Raises:
        TypeError, ValueError: x cannot be normalised, the activation or the device is unknown, an axis does not fit, or
            double_backward is combined with an activation or a mask.
    """
    result = None if dtype is None else result_dtype_of(dtype)
    check_activation(activation)
    if double_backward:
        check_no_activation(activation)
        check_no_mask(mask)
    if device is not None and device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if not isinstance(axis, EllipsisType):
        if activation is not None or residual or double_backward or parts:
            raise ValueError("z-scores have no activation, residual, double_backward or parts")
        return _explain_zscore(x, axis, result, mask, device)
    place = check_input(x, integers=result is not None)
    dtype = x.dtype if result is None else result
    calls = Explained(dtype, activation, residual, mask, double_backward=double_backward, parts=parts)
    return f"{x.shape} {x.dtype.name} on " + "\n".join(_lines(x, place, calls, device))


def _lines(x: Array, place: str, calls: Explained, device: str | None) -> list[str]:
    if device is None:
        return backend_of(place).describe(x, calls)
    return describe(x, x.ctypes.data if place == "cpu" else x.data.ptr, DEVICES[device], calls)


def _explain_zscore(a: Array, axis: Any, dtype: Any, mask: bool, device: str | None) -> str:
    place = place_of(a, "x")
    axes, (read, result), xp = axes_of(axis, a.ndim), dtypes_of(a, dtype), array_module(a)
    what = "all axes" if axis is None else f"axis {axis}"
    told = [f"z-scores of {a.shape} {a.dtype.name} along {what}, {result.name}"]
    if a.dtype != read:
        told.append(f"  the array is converted to {read.name} first")
        a = xp.empty_like(a, read)
    if math.prod(a.shape[i] for i in axes) < 2:
        return "\n".join([*told, "  NaN: there is one value along the axes, or none"])
    planes, shape = view_of_planes(a, axes)
    if planes is None:
        told.append(f"  copied to planes (N, C, ...) of shape {shape}, which no view has")
        planes = xp.empty(shape, a.dtype)
    else:
        told.append(f"  seen as planes (N, C, ...) of shape {shape}")
    first, *rest = _lines(planes, place, Explained(result, mask=mask, alone=True), device)
    return "\n".join([*told, f"  on {first}", *(f"  {line}" for line in rest)])
