"""Checks of arguments: each raises a TypeError or ValueError that says what was given and what is needed.

An array's place, 'cpu' or 'cuda:<number>', is found once in a call and passed on.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from ._types import ACTIVATIONS, DTYPES, EPS_MODES, INTEGERS, Array, Saved, array_module, math_dtype


def kind_of(array: Array, name: str) -> str:
    """Return 'numpy' or 'cupy'."""
    if type(array) is np.ndarray or type(array) is np.memmap:
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and type(array) is cupy.ndarray:
        return "cupy"
    given = f"{type(array).__module__}.{type(array).__qualname__}"
    if isinstance(array, np.ndarray):
        hint = "a subclass's meaning (a mask, say) would be lost: pass numpy.asarray(...) of it if that is wanted"
    elif cupy is not None and isinstance(array, cupy.ndarray):
        hint = "a subclass's meaning would be lost: pass a plain cupy.ndarray view of it if that is wanted"
    else:
        hint = "convert it with numpy.asarray or cupy.asarray"
    raise TypeError(f"{name} must be a numpy.ndarray or a cupy.ndarray, got {given}; {hint}")


def place_of(array: Array, name: str) -> str:
    """Return 'cpu' or 'cuda:<number>'."""
    return "cpu" if kind_of(array, name) == "numpy" else _cuda(array.device.id)


@lru_cache(maxsize=64)
def _cuda(number: int) -> str:
    return f"cuda:{number}"


def device_of(array: Array) -> AbstractContextManager[Any] | None:
    """Return a CuPy array's device, which makes itself current as a context; None for other arrays."""
    cupy = sys.modules.get("cupy")
    return array.device if cupy is not None and isinstance(array, cupy.ndarray) else None


def known_place(array: Array) -> str:
    """Return an array's place as `place_of` does. For arrays of other packages, such as dask, it is their class."""
    device: Any = device_of(array)
    if device is not None:
        return f"cuda:{device.id}"
    return "cpu" if isinstance(array, np.ndarray) else f"{type(array).__module__}.{type(array).__qualname__}"


def check_number(value: Any, name: str) -> float:
    """Return a finite real number as a float."""
    if type(value) is float and math.isfinite(value):  # the usual case: fast, since every call comes here
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def check_count(value: Any, name: str, least: int) -> int:
    """Return an integer of at least `least` as an int."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return count


def check_eps(eps: Any) -> float:
    eps = check_number(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps!r}")
    return eps


def check_eps_mode(eps_mode: Any) -> None:
    if isinstance(eps_mode, str) and eps_mode in EPS_MODES:
        return
    error = ValueError if isinstance(eps_mode, str) else TypeError
    raise error(f"eps_mode must be one of {', '.join(EPS_MODES)}, got {eps_mode!r}")


def check_ddof(ddof: float, positions: int) -> None:
    """Check ddof against the number of positions of a plane, unless planes are empty."""
    if ddof >= positions > 0:
        raise ValueError(f"ddof must be less than the number of positions of a plane, {positions}, got {ddof:g}")


def check_activation(activation: Any) -> None:
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return
    error = ValueError if isinstance(activation, str) else TypeError
    raise error(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")


@lru_cache(maxsize=64)
def _accepted(dtype: np.dtype) -> bool:
    return dtype.name in DTYPES and dtype.isnative


def check_dtype(dtype: Any, name: str) -> None:
    if not _accepted(dtype if isinstance(dtype, np.dtype) else np.dtype(dtype)):
        raise TypeError(f"{name} has dtype {np.dtype(dtype)!s}; accepted are {', '.join(DTYPES)} in native byte order")


def check_result_dtype(dtype: np.dtype) -> None:
    if not _accepted(dtype):
        raise TypeError(f"dtype, of the result, must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!s}")


def check_input_dtype(dtype: np.dtype, name: str, integers: bool) -> None:
    """Check the dtype of an array that is to be normalised. integers: whether small ones are allowed, as with a given
    dtype of the result."""
    if _accepted(dtype):
        return
    small = dtype.name in INTEGERS and dtype.isnative
    if small and not integers:
        raise TypeError(f"{name} has dtype {dtype}; integers need dtype=, the dtype of the result: {', '.join(DTYPES)}")
    if not small and dtype.kind in "iu":
        raise TypeError(
            f"{name} has dtype {dtype}; accepted are {', '.join(DTYPES)}, and with dtype= {', '.join(INTEGERS)}, in "
            "native byte order: convert it with astype"
        )
    if not small:
        check_dtype(dtype, name)


def check_input(x: Array, name: str = "input", place: str | None = None, integers: bool = False) -> str:
    """Check that an array can be normalised, and return its place. place: if it is known already. integers: see
    `check_input_dtype`."""
    place = place or place_of(x, name)
    check_input_dtype(x.dtype, name, integers)
    if x.ndim < 3:
        raise ValueError(f"{name} must have at least 3 dimensions (N, C, *spatial), got shape {x.shape}")
    return place


def check_per_channel(
    array: Array, name: str, x: Array, place: str, *, per_sample: bool = False, written: bool = False, dtype: Any = None
) -> None:
    """Check weight, bias or a running statistic: at x's place, in x's dtype (or float32 for 16-bit x), of shape (C,).

    per_sample: (N, C) is allowed as well. written: the array must be writable. dtype: of the result, if it is given;
    then the array has this one, or the one to compute in.
    """
    own = place_of(array, name)
    if own != place:
        raise ValueError(
            f"{name} is on {own} and the input on {place}; move one of them "
            "(cupy.asarray, cupy.asnumpy, or a layer's to_gpu() / to_cpu())"
        )
    of, result = ("input", x.dtype) if dtype is None else ("result", dtype)
    if array.dtype != result and array.dtype != math_dtype(result, x.dtype):
        accepted = sorted({result.name, math_dtype(result, x.dtype).name})
        raise TypeError(f"{name} has dtype {array.dtype} and the {of} {result}; {name} must be {' or '.join(accepted)}")
    if array.shape != x.shape[1:2] and not (per_sample and array.shape == x.shape[:2]):
        shapes = (x.shape[1:2], x.shape[:2]) if per_sample else (x.shape[1:2],)
        raise ValueError(
            f"{name} has shape {array.shape}, but the input of shape {x.shape} has {x.shape[1]} channels: "
            f"needed is {' or '.join(map(str, shapes))}"
        )
    if written and place == "cpu" and not array.flags.writeable:
        raise ValueError(f"{name} is read-only, and is to be updated")


def _check_place(array: Array, name: str, place: str) -> None:
    own = place_of(array, name)
    if own != place:
        raise ValueError(f"{name} is on {own} and the input on {place}")


def check_of_planes(array: Array, name: str, dtype: np.dtype, x: Array, place: str) -> None:
    """Check an array of one number for each plane: at x's place, of shape (N, C) and this dtype."""
    _check_place(array, name, place)
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; needed is {dtype.name}")
    if array.shape != x.shape[:2]:
        raise ValueError(f"{name} has shape {array.shape}; needed is the input's (N, C), {x.shape[:2]}")


def check_mask(mask: Array, x: Array, place: str) -> Array:
    """Check a mask, and return it broadcast to x's shape, without a copy."""
    _check_place(mask, "mask", place)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; needed is bool")
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(shape) > x.ndim or any(m not in (1, n) for m, n in zip(shape, x.shape, strict=False)):
        raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to the input's, {x.shape}")
    return array_module(mask).broadcast_to(mask, x.shape)


def mask_of_lengths(lengths: Any, x: Array, place: str) -> Array:
    """Check lengths, and return the mask of the positions before them along the last axis, broadcast to x's shape.

    Lengths on a GPU are not read, and so not checked: the mask has all positions for those above the axis, none for
    those below 0.
    """
    xp, (n, *_, last) = array_module(x), x.shape
    on_host = isinstance(lengths, (list, tuple, np.ndarray))
    if on_host:
        try:
            lengths = np.asarray(lengths) if np.size(lengths) else np.zeros(np.shape(lengths), np.int64)
        except ValueError:
            raise ValueError(f"lengths must be {n} integers, got {lengths!r}") from None
    else:
        _check_place(lengths, "lengths", place)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got dtype {lengths.dtype}")
    if lengths.shape != (n,):
        raise ValueError(f"lengths has shape {lengths.shape}; needed is one for each sample, {(n,)}")
    if on_host and n and (lengths.min() < 0 or lengths.max() > last):
        raise ValueError(f"lengths must be 0 to {last}, the size of the last axis, got {lengths.tolist()}")
    with device_of(x) or nullcontext():
        mask = xp.arange(last) < xp.asarray(lengths)[:, None]
        return xp.broadcast_to(mask.reshape(n, *(1,) * (x.ndim - 2), last), x.shape)


def only_in_mask(array: Array, mask: Array) -> Array:
    """Return a copy of an array that is 0 where a mask is False."""
    bits = array.view(f"u{array.itemsize}")  # CuPy does not compute on bfloat16
    with device_of(array) or nullcontext():
        return array_module(array).where(mask, bits, bits.dtype.type(0)).view(array.dtype)


def check_like(array: Array, name: str, x: Array, place: str, dtype: Any = None) -> None:
    """Check dy, ddx or the residual: x's shape, place and dtype, or the dtype that is given for results."""
    _check_place(array, name, place)
    if array.dtype != (x.dtype if dtype is None else dtype):
        needed = f"the input's, {x.dtype}" if dtype is None else f"the result's, {dtype}"
        raise TypeError(f"{name} has dtype {array.dtype}; needed is {needed}")
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}; needed is the input's, {x.shape}")


def _as_host(array: Array) -> np.ndarray:
    """Return a host array with the same address, shape and strides, to compare addresses. It is never read."""
    if isinstance(array, np.ndarray):
        return array

    class Memory:
        __array_interface__ = {  # noqa: RUF012
            "data": (array.data.ptr, False),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
            "version": 3,
        }

    return np.asarray(Memory())


@lru_cache(maxsize=4096)
def reach(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return the distances in bytes from an array's address to its first byte and to its end."""
    if 0 in shape:
        return 0, 0
    steps = [stride * (size - 1) for stride, size in zip(strides, shape, strict=True)]
    return sum(step for step in steps if step < 0), sum(step for step in steps if step > 0) + itemsize


def _bounds(array: Array) -> tuple[int, int]:
    """Return the addresses of a CuPy array's first byte and of its end."""
    start = array.data.ptr
    low, high = reach(array.shape, array.strides, array.itemsize)
    return start + low, start + high


def _bounds_meet(a: Array, b: Array) -> bool:
    """Return numpy.may_share_memory for CuPy arrays. CuPy's own misses arrays that import the same memory twice."""
    (low, high), (other_low, other_high) = _bounds(a), _bounds(b)
    return max(low, other_low) < min(high, other_high)


def _all_apart(arrays: Sequence[Array]) -> bool:
    """Return True if the bounds of no two of these CuPy arrays meet: faster than asking for each pair."""
    bounds = sorted(map(_bounds, arrays))
    return all(end <= start for (_, end), (start, _) in pairwise(bounds))


def overlap(a: Array, b: Array) -> bool:
    """Return whether two arrays share memory; True also if that is too hard to compute."""
    host = isinstance(a, np.ndarray)
    if host != isinstance(b, np.ndarray) or not (np.may_share_memory(a, b) if host else _bounds_meet(a, b)):
        return False
    try:
        return bool(np.shares_memory(_as_host(a), _as_host(b), max_work=100_000))  # type: ignore[arg-type]  # any integer
    except np.exceptions.TooHardError:
        return True


def check_apart(written: Sequence[tuple[str, Array]], others: Sequence[tuple[str, Array | None]]) -> None:
    """Check that arrays (C,) which are updated in place share no memory with each other or with the others."""
    arrays = [*written, *((name, other) for name, other in others if other is not None)]
    apart = not any(isinstance(array, np.ndarray) for _, array in arrays) and _all_apart([a for _, a in arrays])
    for number, (name, array) in enumerate(written):
        if array.size > 1 and abs(array.strides[0]) < array.itemsize:
            raise ValueError(
                f"{name} is to be updated and has strides {array.strides}: several of its elements are the same memory"
            )
        for place in () if apart else (*range(number), *range(len(written), len(arrays))):
            other_name, other = arrays[place]
            if overlap(other, array):
                raise ValueError(
                    f"{other_name} and {name} share memory, and {name} is to be updated: give each an array of its own"
                )


def _same_memory(a: Array, b: Array) -> bool:
    ha, hb = _as_host(a), _as_host(b)
    # Strides of axes of size 1 have no meaning.
    steps = [[s for s, size in zip(array.strides, array.shape, strict=True) if size > 1] for array in (a, b)]
    return bool(
        a.shape == b.shape
        and a.dtype == b.dtype
        and steps[0] == steps[1]
        and ha.__array_interface__["data"][0] == hb.__array_interface__["data"][0]
    )


def _overlaps_itself(a: Array) -> bool:
    """Return whether two indices may address the same element. A sufficient test, used for out only."""
    if a.flags.c_contiguous:
        return False
    reach = a.itemsize
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(a.strides, a.shape, strict=True) if size > 1
    ):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def check_out(out: Array, x: Array, place: str, inputs: Sequence[tuple[str, Array | None]], dtype: Any = None) -> None:
    """Check that out can be written: it may be an input, but must not overlap one otherwise. dtype: None for x's."""
    _check_place(out, "out", place)
    dtype = x.dtype if dtype is None else dtype
    if out.shape != x.shape or out.dtype != dtype:
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; needed are shape {x.shape} and dtype {dtype}"
        )
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if out.size and _overlaps_itself(out):
        raise ValueError(f"out has strides {out.strides}: several of its elements are the same memory")
    for name, array in inputs:
        if array is None or not overlap(out, array):
            continue
        if array.ndim < 3 or not _same_memory(out, array):
            raise ValueError(f"out overlaps {name} without being the same array: it would be read after being written")


def note_overwritten(saved: Saved, out: Array | None) -> None:
    """Mark saved as overwritten if out shares memory with its x or residual."""
    if out is not None and any(overlap(out, array) for array in (saved.x, saved.residual) if array is not None):
        saved.overwritten = True


def check_own_statistics(saved: Saved) -> None:
    """Check the statistics of a forward that is to have a double backward."""
    if saved.count is not None:
        raise ValueError(
            "no double backward through given moments: its gradients contain sums over whole planes, of which the "
            "input has only a part"
        )


def check_no_activation(activation: str | None) -> None:
    """Check the activation of a forward that is to have a double backward."""
    if activation is not None:
        raise ValueError(
            f"no double backward through the fused activation {activation!r}: call instance_norm_forward "
            "without it, and apply the activation (and what is added before it) as an operation of its own"
        )


def check_usual_rstd(saved: Saved) -> None:
    """Check the conventions of a forward that is to have a double backward."""
    if not saved.usual_rstd:
        raise ValueError(
            f"no double backward of a forward with eps_mode={saved.eps_mode!r} and ddof={saved.ddof:g}; "
            "needed are 'variance' and 0"
        )


def check_no_mask(masked: bool) -> None:
    """Check that a forward that is to have a double backward has no mask."""
    if masked:
        raise ValueError("no double backward of a forward with a mask or lengths")


def check_saved(saved: Any) -> None:
    """Check that saved comes from a forward of floats, and that its arrays have not been overwritten."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what instance_norm_forward returned, got {type(saved).__qualname__}")
    if saved.x.dtype.kind in "iu":
        raise TypeError(
            f"the forward's input has dtype {saved.x.dtype}: integers have no gradient. Convert the input to the "
            "result's dtype before the forward, or leave out the backward"
        )
    if saved.overwritten:
        raise ValueError("the forward's input or residual, which the backward needs, has been written over (as out)")
