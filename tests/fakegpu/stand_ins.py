"""CuPy's own simple kernels in NumPy. The kernel's source gives its name and types."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from . import control
from .control import DeviceError, Launch

#: NumPy's name of each type in CuPy's sources.
TYPES = {
    "bool": "?", "signed char": "i1", "short": "i2", "int": "i4", "long": "i8", "long long": "i8",
    "unsigned char": "u1", "unsigned short": "u2", "unsigned int": "u4", "unsigned long": "u8",
    "unsigned long long": "u8", "float16": "f2", "float": "f4", "double": "f8", "bfloat16": "bfloat16",
}  # fmt: skip


#: Elementwise kernels, as functions of the inputs in the types that the kernel computes in.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "cupy_copy": lambda a: a,
    "cupy_fill": lambda a: a,
    "cupy_where": lambda condition, a, b: np.where(condition != 0, a, b),
    "cupy_clip": lambda a, low, high: np.minimum(np.maximum(a, low), high),
    **{
        f"cupy_{name}": getattr(np, name)
        for name in (
            "absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "cos", "equal", "exp", "expm1", "left_shift",
            "float_power", "floor_divide", "greater", "greater_equal", "invert", "isfinite", "isinf", "isnan",
            "less", "less_equal", "log", "logical_and", "logical_not", "logical_or", "maximum", "minimum", "multiply",
            "negative", "not_equal", "power", "reciprocal", "remainder", "right_shift", "sign", "sin", "sqrt", "square",
            "subtract", "tanh", "true_divide",
        )
    },
}  # fmt: skip

#: Elementwise kernels that use an element's position, as functions of the output's shape and the inputs.
PLACED: dict[str, Callable[..., Any]] = {
    "cupy_arange": lambda shape, start, step: start + np.arange(shape[0]).astype(step.dtype) * step,
    "cupy_resize": lambda shape, a, size: np.resize(a, shape),
}

#: Reductions over the first axis, to which the reduced axes are moved.
REDUCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"cupy_{name}": getattr(np, name)
        for name in ("all", "amax", "amin", "any", "max", "mean", "min", "prod", "sum")
    },
    "cupy_var_core": lambda a, mean, factor, axis: factor * ((a - mean) ** 2).sum(axis),
}


def _inputs(function: Callable[..., Any]) -> int:
    return function.nin if isinstance(function, np.ufunc) else function.__code__.co_argcount


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: an array, a scalar, or (dtype None) an index range."""

    name: str
    dtype: np.dtype | None
    array: bool
    constant: bool


def run(launch: Launch, name: str, source: str) -> None:
    """Do the work of one of CuPy's kernels; raise DeviceError if it has no stand-in."""
    parameters, computed = _signature(name, source)
    values = {
        p.name: _array(raw, p.dtype, launch.device) if p.array else np.frombuffer(raw, p.dtype, 1)[0]
        for p, raw in zip(parameters, control.arguments_of(launch), strict=True)
        if p.dtype is not None
    }
    where = values.get("_raw__where")
    outs = [values[p.name] for p in parameters if p.array and not p.constant and p.name != "_raw__where"]
    ins = [
        np.asarray(values[p.name]).astype(computed.get(p.name.removeprefix("_raw_"), p.dtype), copy=False)
        for p in parameters
        if p.dtype is not None and (p.constant or not p.array)
    ]
    short = re.sub(r"__.*|_(float|u?int)\d+$", "", name)
    if where is not None:
        short = short.removesuffix("_where")
    if len(outs) != 1:
        raise _unknown(name)
    (out,) = outs
    with np.errstate(all="ignore"):
        if parameters[-1].name == "_block_stride" and short in REDUCTIONS:
            if out.size:
                wide = [a.astype(np.float64) if a.dtype.kind not in "biu" else a for a in ins[:-1]]
                arrays = [a.reshape(-1, out.size) if a.ndim else a for a in wide]
                _write(out, REDUCTIONS[short](*arrays, axis=0).reshape(out.shape))
        elif "CUPY_FOR(i, _ind.size())" not in source:
            raise _unknown(name)
        elif short in ELEMENTWISE and _inputs(ELEMENTWISE[short]) == len(ins):
            _write(out, ELEMENTWISE[short](*ins), where)
        elif short in PLACED and _inputs(PLACED[short]) == len(ins) + 1:
            _write(out, PLACED[short](out.shape, *ins))
        else:
            raise _unknown(name)


def _unknown(name: str) -> DeviceError:
    return DeviceError(801, f"CuPy's kernel {name} has no stand-in in tests/fakegpu/stand_ins.py")


def _write(out: np.ndarray, result: Any, where: np.ndarray | None = None) -> None:
    np.copyto(out, np.asarray(result).astype(out.dtype, copy=False), where=True if where is None else where)


@lru_cache(maxsize=None)
def _signature(name: str, source: str) -> tuple[list[Parameter], dict[str, np.dtype]]:
    """Return the kernel's parameters, and the type in which it computes with each input."""
    header = re.search(rf'extern "C" __global__ void {re.escape(name)}\((.*?)\) \{{', source, re.S)
    if header is None:
        raise _unknown(name)
    named = {alias: kind for kind, alias in re.findall(r"^ *typedef (.+?) (\w+);", source, re.M)}

    def dtype(text: str) -> np.dtype:
        while text in named:
            text = named[text]
        if text not in TYPES:
            raise _unknown(name)
        if text == "bfloat16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(TYPES[text])

    parameters = []
    for text in re.split(r", (?![^<]*>)", header[1]):
        kind, _, own = text.removeprefix("const ").rpartition(" ")
        array = re.fullmatch(r"CArray<(.+), \d+, [01], [01]>", kind)
        of = None if kind.startswith("CIndexer") else dtype(array[1] if array else kind)
        parameters.append(Parameter(own, of, array is not None, text.startswith("const ")))
    return parameters, {own.removesuffix("_type"): dtype(own) for own in named if re.fullmatch(r"in\d+_type", own)}


def _array(raw: bytes, dtype: Any, device: int) -> np.ndarray:
    """Return a CArray (address, size, shape, strides) as a NumPy array over the device's memory."""
    numbers = np.frombuffer(raw, np.int64)
    rank = (len(numbers) - 2) // 2
    shape, strides = tuple(numbers[2 : 2 + rank].tolist()), tuple(numbers[2 + rank :].tolist())
    if rank and not all(shape):
        return np.empty(shape, dtype)
    at, low, high = control.find(int(numbers[0]), device)
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    first, end = at + sum(r for r in reach if r < 0), at + sum(r for r in reach if r > 0) + dtype.itemsize
    if first < low or end > high:
        raise DeviceError(700, f"an array of shape {shape} and strides {strides} exceeds its allocation")
    memory = np.frombuffer((ctypes.c_char * (end - first)).from_address(first), np.uint8)
    return np.ndarray(shape, dtype, memory, at - first, strides)
