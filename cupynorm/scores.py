"""z-scores along any axes, and the way back from normalised values to intensities."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np

from ._checks import (
    check_dtype,
    check_eps,
    check_eps_mode,
    check_mask,
    check_number,
    check_of_planes,
    device_of,
    place_of,
)
from ._types import DTYPES, INTEGERS, Array, ForwardCall, array_module, math_dtype
from .backend import backend_of
from .conventions import divisor_of, var_of
from .devices import result_dtype_of
from .functional import check_forward, instance_norm
from .mixed import converted
from .statistics import DTYPES as FIELD_DTYPES
from .statistics import Moments

POLICIES = ("propagate", "omit", "raise")


def denormalize(
    y: Array,
    moments: Moments,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    ddof: float = 0.0,
    eps_mode: str = "variance",
    dtype: Any = None,
    out: Array | None = None,
) -> Array:
    """Return the intensities from which normalised values come: x = (y - bias) / weight * std + mean.

    It undoes `cupynorm.instance_norm(x, weight=weight, bias=bias, ...)` with the same arguments, where std stands for
    sqrt(var + eps), or what eps_mode has in its place: for the output of a network that was given normalised images.
    In one pass, 2 accesses to each element.

    Args:
        y: numpy.ndarray or cupy.ndarray (N, C, *spatial), of the dtypes that instance_norm takes. Its spatial shape
            need not be that of x, since there is one mean and std for each plane.
        moments: of x (`cupynorm.moments(x)`), (N, C).
        weight, bias: as given to instance_norm: (C,) or (N, C), of any float dtype. Where weight is 0 the result is NaN
            or infinite.
        eps, ddof, eps_mode: as given to instance_norm.
        dtype: of the result; None is y's. Integers need one. To return to integers, round the result and clip it.
        out: array for the result: its shape and dtype; it may be y itself.

    Returns:
        An array of y's shape: out, or a new one.

    Raises:
        TypeError, ValueError: an argument does not fit. Nothing has been written then.

    Example:
        >>> x = np.array([[[10, 20, 30, 40]]], np.uint8)
        >>> y = cn.instance_norm(x, dtype="float32")
        >>> cn.denormalize(y, cn.moments(x)).round(3)
        array([[[10., 20., 30., 40.]]], dtype=float32)
    """
    place = place_of(y, "y")
    eps, ddof = check_eps(eps), check_number(ddof, "ddof")
    check_eps_mode(eps_mode)
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be what cupynorm.moments returns, got {type(moments).__qualname__}")
    call = ForwardCall(y, out=out, save=False, dtype=dtype, eps=0.0)
    check_forward(call, place, part=True)
    for field, array in vars(moments).items():
        check_of_planes(array, f"moments.{field}", FIELD_DTYPES[field], y, place)
    with device_of(y) or nullcontext(), np.errstate(all="ignore"):
        scale = divisor_of(var_of(moments, ddof), eps, eps_mode) / _per_plane(weight, "weight", y, place, 1.0)
        # A normalisation with the mean `bias` and the variance 1, and these as weight and bias.
        ones = np.ones_like(moments.mean)
        shift = ones * _per_plane(bias, "bias", y, place, 0.0)
        call.moments = Moments(np.ones_like(moments.count), shift, ones)
        wide = math_dtype(call.result_dtype, y.dtype)
        call.weight, call.bias = (each.astype(wide, order="C") for each in (scale, moments.mean))
    result = backend_of(place).normalize(call)
    result.commit()
    return result.y


def _per_plane(parameter: Array | None, name: str, y: Array, place: str, missing: float) -> Any:
    """Return a parameter in float64, broadcastable to (N, C)."""
    if parameter is None:
        return missing
    if place_of(parameter, name) != place:
        raise ValueError(f"{name} is on {place_of(parameter, name)} and y on {place}")
    check_dtype(parameter.dtype, name)
    if parameter.shape not in (y.shape[1:2], y.shape[:2]):
        raise ValueError(f"{name} has shape {parameter.shape}; needed is {y.shape[1:2]} or {y.shape[:2]}")
    if parameter.dtype.name != "bfloat16":
        return parameter.astype(np.float64)
    return converted(parameter, np.dtype(np.float64), backend_of(place))


def zscore(
    a: Array,
    axis: int | Sequence[int] | None = 0,
    ddof: float = 0.0,
    nan_policy: str = "propagate",
    *,
    mask: Array | None = None,
    dtype: Any = None,
    out: Array | None = None,
) -> Array:
    """Return (a - mean) / std along axes, with the meaning and defaults of scipy.stats.zscore.

    Each element is read once and written once where the values along the axes stay on chip: the array is viewed as
    planes, without a copy where its strides allow. std is not increased by an eps: where all values are equal, the
    result is NaN.

    Args:
        a: numpy.ndarray or cupy.ndarray of any rank and strides. float16, bfloat16, float32, float64, uint8, int8,
            uint16 and int16 are read as they are; other real dtypes are converted to float64 first.
        axis: one or several axes of the mean and std; None for all.
        ddof: delta degrees of freedom of std, as in numpy.std. Slices of no more than ddof values, or of one, are NaN.
        nan_policy: "propagate": NaN where a slice contains one; "omit": mean and std of the other values, NaN where `a`
            has one (0 outside of a mask); "raise": a ValueError if `a` contains one, for which the host waits for a
            GPU.
        mask: bool, broadcastable to a's shape: mean and std of the True positions; the result is 0 elsewhere.
        dtype: of the result, a float dtype; None is a's, or float64 for integers and bool, as in SciPy.
        out: array for the result: a's shape and the result's dtype; it may be `a` itself.

    Returns:
        An array of a's shape: out, or a new one.

    Raises:
        TypeError, ValueError: an argument does not fit, or nan_policy is "raise" and there is a NaN.

    Example:
        >>> table = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, np.nan]])
        >>> cn.zscore(table, nan_policy="omit").round(3)
        array([[-1.225, -1.   ],
               [ 0.   ,  1.   ],
               [ 1.225,    nan]])
    """
    place = place_of(a, "a")
    ddof = check_number(ddof, "ddof")
    if nan_policy not in POLICIES:
        raise ValueError(f"nan_policy must be one of {', '.join(POLICIES)}, got {nan_policy!r}")
    read, result = dtypes_of(a, dtype)
    axes = axes_of(axis, a.ndim)
    if mask is not None:
        mask = check_mask(mask, a, place)
    if out is not None and (place_of(out, "out") != place or out.shape != a.shape or out.dtype != result):
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype} on {place_of(out, 'out')}; "
            f"needed are shape {a.shape} and dtype {result} on {place}"
        )
    with device_of(a) or nullcontext():
        if a.dtype != read:
            a = a.astype(read)
        may_be_nan = read.name in DTYPES
        missing = _is_nan(a) if nan_policy != "propagate" and may_be_nan else None
        if nan_policy == "raise" and missing is not None and bool(missing.any()):
            raise ValueError("a contains NaN, and nan_policy is 'raise'")
        wanted = mask
        if nan_policy == "omit" and missing is not None:
            mask = ~missing if mask is None else mask & ~missing
        z = _scores(a, axes, ddof, mask, result, out)
        if nan_policy == "omit" and missing is not None:
            _set_nan(z, missing if wanted is None else missing & wanted)
        return z


def _scores(a: Array, axes: list[int], ddof: float, mask: Array | None, result: np.dtype, out: Array | None) -> Array:
    """Return the z-scores of an array whose dtype the kernels read."""
    xp = array_module(a)
    positions = math.prod(a.shape[i] for i in axes)
    if positions < 2 or ddof >= positions:  # as in SciPy: there is no deviation
        z = xp.zeros(a.shape, result) if out is None else out
        z.view(f"u{z.itemsize}")[...] = 0
        _set_nan(z, xp.ones(a.shape, bool) if mask is None else mask)
        return z
    order = _order(axes, a.ndim)
    planes, shape = planes_of(a, axes)
    masks = None if mask is None else mask.transpose(order).reshape(shape)
    target = None if out is None else _as_planes(out.transpose(order), len(axes), shape)
    given = None if a.dtype == result else result
    z = instance_norm(planes, eps=0.0, ddof=ddof, mask=masks, dtype=given, out=target)
    z = z.reshape([a.shape[i] for i in order]).transpose([order.index(i) for i in range(a.ndim)])
    if mask is not None and ddof > 0:
        _set_nan(z, mask & (mask.sum(axis=tuple(axes), keepdims=True) <= ddof))
    if out is None:
        return z
    if target is None:
        out.view(f"u{out.itemsize}")[...] = z.view(f"u{z.itemsize}")
    return out


def dtypes_of(a: Array, dtype: Any) -> tuple[np.dtype, np.dtype]:
    """Return the dtype in which zscore reads an array, and that of its result."""
    if a.dtype.kind not in "biuf" and a.dtype.name != "bfloat16":
        raise TypeError(f"a has dtype {a.dtype}; needed are real numbers")
    own, wide = a.dtype.newbyteorder("="), np.dtype(np.float64)
    result = result_dtype_of(dtype) if dtype is not None else own if own.name in DTYPES else wide
    return own if own.name in (*DTYPES, *INTEGERS) else wide, result


def axes_of(axis: Any, rank: int) -> list[int]:
    """Return axes as numbers from 0 on, in order."""
    if axis is None:
        return [*range(rank)]
    axes = [axis] if not isinstance(axis, (tuple, list)) else list(axis)
    found = []
    for each in axes:
        try:
            number = operator.index(each)
        except TypeError:
            raise TypeError(f"axis must be an integer, several, or None, got {axis!r}") from None
        if not -rank <= number < rank:
            raise ValueError(f"axis {number} is out of bounds for an array of {rank} dimensions")
        found.append(number % rank)
    if len(set(found)) < len(found) or not found:
        raise ValueError(f"axis must name each axis once, and at least one, got {axis!r}")
    return sorted(found)


def _set_nan(z: Array, where: Array) -> None:
    """Set elements to NaN, as bits: CuPy does not compute on bfloat16."""
    bits = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000, "float64": 0x7FF8 << 48}[z.dtype.name]
    target = z.view(f"u{z.itemsize}")
    array_module(z).copyto(target, target.dtype.type(bits), where=where)


def _is_nan(a: Array) -> Array:
    if a.dtype.name == "bfloat16":  # on whose bits CuPy does compute
        return (a.view(np.uint16) & 0x7FFF) > 0x7F80
    return np.isnan(a)


def _order(axes: list[int], rank: int) -> list[int]:
    """Return all axes, with these last."""
    return [*(i for i in range(rank) if i not in axes), *axes]


def planes_of(a: Array, axes: list[int]) -> tuple[Array, tuple[int, ...]]:
    """Return an array as planes (N, C, *positions) whose positions are its values along these axes, and that shape: a
    view where its strides allow, else a copy."""
    view, shape = view_of_planes(a, axes)
    if view is None:  # as bits: CuPy does not copy bfloat16
        view = a.transpose(_order(axes, a.ndim)).view(f"u{a.itemsize}").reshape(shape).view(a.dtype)
    return view, shape


def view_of_planes(a: Array, axes: list[int]) -> tuple[Array | None, tuple[int, ...]]:
    """Return `planes_of`, with None in place of a copy."""
    array, reduced = a.transpose(_order(axes, a.ndim)), len(axes)
    kept = array.shape[: array.ndim - reduced]
    inner = array.shape[array.ndim - reduced :]
    shapes = [(math.prod(kept[:cut]), math.prod(kept[cut:]), *inner) for cut in range(len(kept) + 1)]
    views = ((_as_planes(array, reduced, shape), shape) for shape in shapes)
    return next((found for found in views if found[0] is not None), (None, shapes[0]))


def _as_planes(array: Array, reduced: int, shape: tuple[int, ...]) -> Array | None:
    """Return `planes_of` in this shape if that needs no copy."""
    kept = array.ndim - reduced
    for cut in range(kept + 1):
        if (math.prod(array.shape[:cut]), math.prod(array.shape[cut:kept])) == shape[:2] and all(
            _merges(array.shape[part], array.strides[part]) for part in (slice(cut), slice(cut, kept))
        ):
            return array.reshape(shape)
    return None


def _merges(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether axes are one axis in memory."""
    steps = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    return all(outer == inner * size for (_, outer), (size, inner) in pairwise(steps))
