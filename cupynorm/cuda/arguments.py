"""The kernels' arguments: one structure for each kernel, passed by value and filled by name.

Each aligned NumPy dtype here has the fields of a structure in kernels/, in the same order: those of `forward` are
ForwardArguments. Tests have the compilers check that they have the same offsets. Pointers are addresses, 0 for null;
strides and sizes are in elements.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

POINTER, INT64, INT32, FLOAT64 = np.dtype(np.uintp), np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float64)

#: The bits of `flags`: which arrays are in computing precision, which have one number per sample and channel, and which
#: sums are in the input's dtype. They are put into the text of each module.
FLAGS = {
    "WIDE_WEIGHT": 1,
    "WIDE_BIAS": 2,
    "WIDE_RUNNING_MEAN": 4,
    "WIDE_RUNNING_VAR": 8,
    "SAMPLE_WEIGHT": 16,
    "SAMPLE_BIAS": 32,
    "NARROW_SUM_DY": 64,
    "NARROW_SUM_DY_XHAT": 128,
    "WIDE_DDWEIGHT": 256,
    "SAMPLE_DDWEIGHT": 512,
}


def _struct(*fields: tuple[str, np.dtype]) -> np.dtype:
    names = [(name, dtype) for listed, dtype in fields for name in listed.split()]
    return np.dtype(names, align=True)


TENSOR = _struct(("data", POINTER), ("n c s", INT64))
AFFINE = _struct(("weight bias", POINTER), ("flags", INT32))
EPILOGUE = _struct(("residual", TENSOR), ("slope", FLOAT64))
SUMS = _struct(("dy dy_xhat", POINTER), ("flags", INT32))
SCALE = _struct(("eps ddof", FLOAT64), ("mode", INT32))
GROUP = _struct(("tiles", INT32), ("partial arrived", POINTER))
ROUND = _struct(("channels spatial first channel_tiles tiles", INT64), ("subdivision", INT32))
INPUTS = _struct(("x dy ddx", TENSOR))
MOMENTS = _struct(("count mean m2", POINTER))
TOTALS = _struct(("dy dy_xhat", POINTER))
PARAMETERS = _struct(("weight ddbias ddweight", POINTER), ("flags", INT32))

_WHOLE = ("channels spatial channel_tiles", INT64), ("subdivision vecs_per_thread", INT32)
_MERGE = ("all_planes tiles first planes spatial", INT64)

#: By kernel, without the variant: those that have variants first.
STRUCTS: dict[str, np.dtype] = {
    "forward": _struct(
        ("x y", TENSOR), ("epilogue", EPILOGUE), ("affine", AFFINE), ("mask", TENSOR),
        ("mean rstd mean_lo variance count", POINTER), *_WHOLE, ("scale", SCALE), ("group", GROUP),
    ),
    "backward": _struct(
        ("x dy dx", TENSOR), ("mean rstd mean_lo", POINTER), ("affine", AFFINE), ("epilogue", EPILOGUE),
        ("dresidual mask", TENSOR), ("count", POINTER), ("sums", SUMS), *_WHOLE, ("scale", SCALE), ("group", GROUP),
    ),
    "double_backward": _struct(
        ("inputs", INPUTS), ("dx ddy", TENSOR), ("mean rstd", POINTER), ("parameters", PARAMETERS), ("sums", SUMS),
        *_WHOLE, ("group", GROUP),
    ),
    "normalize": _struct(
        ("x y", TENSOR), ("given_mean given_var mean rstd mean_lo", POINTER), ("scale", SCALE), ("affine", AFFINE),
        ("epilogue", EPILOGUE), ("mask", TENSOR), ("round", ROUND),
    ),
    "frozen_backward": _struct(
        ("x dy dx", TENSOR), ("mean rstd", POINTER), ("affine", AFFINE), ("epilogue", EPILOGUE),
        ("dresidual mask", TENSOR), ("sums", SUMS), ("round", ROUND),
    ),
    "frozen_double_backward": _struct(
        ("inputs", INPUTS), ("dx ddy", TENSOR), ("mean rstd", POINTER), ("parameters", PARAMETERS), ("sums", SUMS),
        ("round", ROUND),
    ),
    "moments": _struct(("x mask", TENSOR), ("partials", MOMENTS), ("round", ROUND)),
    "gradient_sums": _struct(
        ("x dy", TENSOR), ("mean rstd mean_lo", POINTER), ("affine", AFFINE), ("epilogue", EPILOGUE),
        ("dresidual mask", TENSOR), ("totals", TOTALS), ("partials", POINTER), ("all_planes", INT64), ("round", ROUND),
    ),
    "input_gradient": _struct(
        ("x g dx", TENSOR), ("mean rstd mean_lo", POINTER), ("affine", AFFINE), ("epilogue", EPILOGUE),
        ("dresidual mask", TENSOR), ("mean_dy mean_dy_xhat", POINTER), ("round", ROUND),
    ),
    "products": _struct(
        ("inputs", INPUTS), ("dx", TENSOR), ("mean rstd partials", POINTER), ("all_planes", INT64), ("round", ROUND),
    ),
    "apply_products": _struct(
        ("inputs", INPUTS), ("dx ddy", TENSOR), ("mean rstd", POINTER), ("parameters", PARAMETERS),
        ("coefficients", POINTER), ("all_planes", INT64), ("round", ROUND),
    ),
    "merge_moments": _struct(
        ("partials merged", MOMENTS), ("tiles first planes", INT64), ("scale", SCALE),
        ("mean rstd mean_lo variance count", POINTER),
    ),
    "merge_gradient_sums": _struct(
        ("partials", POINTER), _MERGE, ("mean_dy mean_dy_xhat rstd count", POINTER), ("scale", SCALE),
        ("totals", TOTALS), ("sums", SUMS),
    ),
    "merge_products": _struct(("partials", POINTER), _MERGE, ("rstd coefficients", POINTER), ("sums", SUMS)),
    "merge_dots": _struct(("partials", POINTER), ("tiles planes", INT64), ("sums", SUMS)),
    "running_statistics": _struct(
        ("mean variance count", POINTER), ("samples channels", INT64), ("momentum", FLOAT64),
        ("running_mean running_var", POINTER), ("flags", INT32),
    ),
    "parameter_gradients": _struct(
        ("sums", SUMS), ("samples channels", INT64), ("dweight dbias", POINTER), ("flags", INT32),
    ),
    "statistics_of_moments": _struct(
        ("moments", MOMENTS), ("planes", INT64), ("scale", SCALE), ("mean rstd mean_lo variance", POINTER),
    ),
    "means_of_sums": _struct(
        ("totals", TOTALS), ("count", POINTER), ("planes spatial", INT64), ("mean_dy mean_dy_xhat rstd", POINTER),
        ("scale", SCALE), ("sums", SUMS),
    ),
}  # fmt: skip


def struct_name(kernel: str) -> str:
    """Return the name of a kernel's structure in its source."""
    return "".join(word.capitalize() for word in kernel.split("_")) + "Arguments"


def leaves(dtype: np.dtype, name: str = "", offset: int = 0) -> Iterator[tuple[str, int, np.dtype]]:
    """Yield the name ("affine.weight"), the offset in bytes and the dtype of each field, also of nested structures."""
    if dtype.fields is None:
        yield name, offset, dtype
        return
    for field, (inner, at, *_) in dtype.fields.items():
        yield from leaves(inner, f"{name}.{field}" if name else field, offset + at)


_CODES = {POINTER: "Q", INT64: "q", INT32: "i", FLOAT64: "d"}


def packer(kernel: str, values: Mapping[str, Any]) -> tuple[Callable[..., bytes], list[Any]]:
    """Return a function that makes the memory of a kernel's arguments, and the items to call it with.

    values: by the names of `leaves`; missing ones are 0, and names that the kernel does not have are ignored: one
    mapping serves all kernels of a call. Numbers are constants: stretches of them are items of bytes. Any other value
    is an item itself, and stands for a number that each call puts in its place.
    """
    form, items, stretch = "=", [], b""
    end = 0

    def close() -> None:
        nonlocal form, stretch
        if stretch:
            form += f"{len(stretch)}s"
            items.append(stretch)
            stretch = b""

    for name, offset, dtype in leaves(STRUCTS[kernel]):
        stretch += bytes(offset - end)
        end = offset + dtype.itemsize
        value, code = values.get(name, 0), _CODES[dtype]
        if isinstance(value, (int, float)):
            stretch += struct.pack(f"={code}", value)
        else:
            close()
            form += code
            items.append(value)
    stretch += bytes(STRUCTS[kernel].itemsize - end)
    close()
    return struct.Struct(form).pack, items
