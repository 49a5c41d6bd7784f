"""The case table: what every backend must compute, and the references it is held to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import reference
from conftest import Backend

import cupynorm as cn
from cupynorm import devices
from cupynorm.cuda.plan import ITEMSIZE, LADDERS, Device, Kind, Rung, widest

#: Few multiprocessors: owners are chosen by the size of a plane alone, as they are for large batches.
SMALL_DEVICE = Device("small", (7, 5), 1, 99 * 1024, 4 * 2**20)


@dataclass(frozen=True)
class Case:
    """One input. layout and data name entries of reference.LAYOUTS and of `_data`."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    data: str = "normal"
    affine: bool = True
    device: Device = SMALL_DEVICE
    param_dtype: str | None = None  # None: the input's, float32 for 16-bit input
    dy_layout: str | None = None  # None: x's

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.dtype, self.layout, self.data]
        return "-".join(parts + ([] if self.affine else ["plain"]))


def _data(name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.normal(size=shape)
    positions = np.arange(np.prod(shape[2:])).reshape(shape[2:])
    return {
        "normal": lambda: 2 * x + 3,
        "offset": lambda: x + 1e4,
        "far": lambda: x + 1e6,
        "constant": lambda: np.broadcast_to(rng.normal(size=(*shape[:2], *(1,) * (len(shape) - 2))) * 100, shape),
        "outlier": lambda: np.where(positions == positions.size // 2, 1e5, x),
        "near_max": lambda: 60000 + 5000 * np.tanh(x),
        "checkerboard": lambda: np.where(positions % 2, 512.0, -512.0) + 0 * x,
        "tiny": lambda: 1e-12 * x,
        "small_values": lambda: 6e-8 * np.round(8 * x),
    }[name]()


def _stride_kept(array: np.ndarray, layout: str) -> np.ndarray:
    """An array of any rank in a layout of reference.LAYOUTS, which are for 4 axes."""
    if array.ndim == 4 or layout == "contiguous":
        return reference.LAYOUTS[layout](array)
    if layout == "unaligned":
        return np.concatenate([array.ravel()[:1], array.ravel()])[1:].reshape(array.shape)
    assert layout == "channels_last", layout
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def _error(actual: np.ndarray, expected: np.ndarray, scale: Any) -> float:
    """The worst error relative to scale, beyond the grain of denormals. NaN must be the same, Inf where it must be."""
    dtype = actual.dtype.name
    actual, expected = reference.wide(actual), np.asarray(expected, np.longdouble)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    if actual.size == 0:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        overflow = np.isinf(actual) & (np.sign(actual) * expected > LARGEST[dtype])
        same = (actual == expected) | overflow
        error = np.where(same, 0, np.maximum(np.abs(actual - expected) - SMALLEST[dtype], 0) / scale)
    return float(np.nanmax(error, initial=0))


#: Roundings of storage and computing precision, relative.
STORAGE_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-126, "float64": 2.0**-1074}
LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.79e308}


def arrays(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """x, dy, weight, bias, running_mean and running_var of a case."""
    dtype = devices.dtype_of(case.dtype)
    params = devices.dtype_of(case.param_dtype or ("float64" if case.dtype == "float64" else "float32"))
    c = case.shape[1]
    x = _stride_kept(_data(case.data, rng, case.shape).astype(dtype), case.layout)
    dy = _stride_kept((rng.normal(size=case.shape) + 0.5).astype(dtype), case.dy_layout or case.layout)
    weight, bias = (rng.normal(size=c).astype(params) if case.affine else None for _ in range(2))
    return x, dy, weight, bias, rng.normal(size=c).astype(params), (rng.random(c) + 0.5).astype(params)


def check(backend: Backend, case: Case, rng: np.random.Generator) -> None:
    """Forward and backward, in training and in tracked eval, against extended precision."""
    backend.pretend(case.device)
    x_, dy_, weight_, bias_, mean_, var_ = arrays(case, rng)
    c, params = case.shape[1], mean_.dtype
    before = x_.copy()
    x, dy, mean, var = (backend.array(a) for a in (x_, dy_, mean_.copy(), var_.copy()))
    weight, bias = (None if a is None else backend.array(a) for a in (weight_, bias_))

    # A few roundings of what is stored, on top of a few of what it is computed in.
    storage = 2 * STORAGE_ROUNDING[case.dtype]
    compute = 16 * STORAGE_ROUNDING["float64" if case.dtype == "float64" else "float32"]
    param = 2 * STORAGE_ROUNDING[params.name]
    w = np.ones(c) if weight_ is None else np.abs(reference.wide(weight_))
    b = np.zeros(c) if bias_ is None else np.abs(reference.wide(bias_))
    over = (slice(None), *(None,) * (len(case.shape) - 2))

    for training in (True, False):
        running = None if training else (mean_, var_)
        options = {} if training else {"use_input_stats": False}
        y, saved = cn.instance_norm_forward(
            x, weight, bias, running_mean=mean, running_var=var, momentum=0.3, eps=1e-5, **options
        )  # fmt: skip
        dx, dweight, dbias = cn.instance_norm_backward(dy, saved)
        assert y.dtype == dx.dtype == x.dtype
        y, dx = backend.host(y), backend.host(dx)

        expected = reference.forward(x_, weight_, bias_, running=running)
        xhat = reference.forward(x_, running=running)
        scale = np.maximum(np.abs(xhat), 1) * w[over] + b[over]
        assert _error(y, expected, scale) <= storage + compute, f"y, {training=}"

        dx_, dweight_, dbias_ = reference.backward(dy_, x_, weight_, running=running)
        rstd = 1 / np.sqrt((reference.statistics(x_)[1] if training else reference.wide(var_)[None]) + 1e-5)
        axes = tuple(range(2, x_.ndim))
        wide_dy = reference.wide(dy_)
        # Rounding acts on the terms of dx, which may cancel.
        terms = np.abs(wide_dy) + np.abs(wide_dy).mean(axes, keepdims=True)
        terms = terms + np.abs(xhat) * np.abs(wide_dy * xhat).mean(axes, keepdims=True)
        with np.errstate(invalid="ignore"):
            assert _error(dx, dx_, terms * (rstd * w)[(slice(None), *over)]) <= storage + compute, f"dx, {training=}"
        if case.affine:
            sums = (np.abs(wide_dy * xhat), np.abs(wide_dy))
            for name, actual, exact, terms in zip("wb", (dweight, dbias), (dweight_, dbias_), sums, strict=True):
                assert actual.dtype == params
                total = terms.sum((0, *axes)) + 1e-30
                assert _error(backend.host(actual), exact, total) <= param + compute, f"d{name}, {training=}"
        else:
            assert dweight is dbias is None

        if training:
            m, v = reference.moved(mean_, var_, x_, 0.3)
            xmean, xvar = (np.abs(a).mean(0) for a in reference.statistics(x_))
            assert _error(backend.host(mean), m, np.abs(mean_) + xmean + 1e-30) <= param + compute
            # The variance of values around a large mean is that of their rounded selves: exact all the same.
            assert _error(backend.host(var), v, np.abs(var_) + 2 * xvar + 1e-30) <= param + compute
            mean, var = backend.array(mean_.copy()), backend.array(var_.copy())
        else:
            np.testing.assert_array_equal(backend.host(mean), mean_)
            np.testing.assert_array_equal(backend.host(var), var_)
    np.testing.assert_array_equal(backend.host(x), before)


#: Layouts, ranks, dtypes and data that every backend is held to.
TABLE = [
    *(Case((2, 3, 5, 7), dtype) for dtype in ITEMSIZE),
    *(Case((2, 8, 5, 6), dtype, "channels_last") for dtype in ITEMSIZE),
    *(Case((3, 5, 9), dtype) for dtype in ITEMSIZE),
    *(Case((1, 2, 3, 4, 5), dtype) for dtype in ITEMSIZE),
    *(Case((2, 2, 2, 3, 2, 2), dtype, affine=False) for dtype in ITEMSIZE),
    *(Case((2, 4, 6, 8), "float32", layout) for layout in reference.LAYOUTS),
    *(Case((2, 3, 5, 7), "float16", layout) for layout in reference.LAYOUTS),
    *(Case((2, 8, 5, 7), "bfloat16", "channels_last", dy_layout=layout) for layout in reference.LAYOUTS),
    *(Case((2, 3, 35, 45), dtype, data="offset") for dtype in ("float32", "float64")),
    *(Case((2, 8, 30, 30), "float32", layout, data) for layout in ("contiguous", "channels_last")
      for data in ("offset", "far", "constant", "outlier", "checkerboard", "tiny")),
    *(Case((2, 3, 16, 17), "float16", layout, data) for layout in ("contiguous", "channels_last")
      for data in ("near_max", "constant", "checkerboard", "small_values")),
    *(Case((2, 3, 16, 17), "bfloat16", "contiguous", data) for data in ("offset", "checkerboard", "constant")),
    Case((2, 3, 5, 7), "float16", param_dtype="float16"),
    Case((2, 3, 5, 7), "bfloat16", param_dtype="bfloat16"),
    *(Case((3, 2, 2), dtype) for dtype in ITEMSIZE),  # two elements a plane
    Case((1, 1, 3, 3)),
    Case((40, 70, 4, 4)),
    Case((9, 33, 2, 3), "float16", "channels_last"),
]  # fmt: skip


#: Every regime with as little work as it takes: what the sanitizers go over on a GPU.
SMALL = [
    Case(shape, dtype, layout)
    for dtype in ("float32", "float16")
    for layout, shapes in {
        "contiguous": ((2, 3, 5, 7), (2, 3, 35, 45), (1, 2, 100, 100), (1, 2, 110, 200), (1, 2, 250, 260)),
        "channels_last": ((2, 8, 5, 6), (1, 8, 38, 38), (1, 8, 55, 55), (1, 8, 100, 101)),
    }.items()
    for shape in shapes
]


def _spatial(rung: Rung, previous: int, vector: int, lanes: int) -> tuple[int, int]:
    """Plane sizes that need this rung: just over what the one before holds, and all that this one holds."""
    unit = vector if lanes == 1 else 1
    capacity = (rung.chunks or 20) * rung.size // lanes * unit
    return previous + 3, capacity - (vector - 1 if lanes == 1 else 0)


def variants() -> list[Case]:
    """Cases whose plans reach every kernel there is: each rung, dtype, layout and access width, and the split."""
    cases = []
    for dtype, itemsize in ITEMSIZE.items():
        for kind in ("channels_first", "channels_last"):
            for vector in (widest(dtype, kind), 1):
                cases += _variants(dtype, itemsize, kind, vector)
    return cases


def _variants(dtype: str, itemsize: int, kind: Kind, vector: int) -> list[Case]:
    # 16 bytes of channels-last rows at the least, so that there are several lanes; 3 channels cannot be packed.
    c = 2 if kind == "channels_first" else (16 if vector > 1 else 3)
    lanes = 1 if kind == "channels_first" else 4
    sizes: set[int] = set()
    for op in ("forward", "backward"):
        held = 0
        for rung in LADDERS[op]:
            if rung.rest == "registers":
                sizes.update(_spatial(rung, held, vector, lanes))
                held = rung.chunks * rung.size // lanes * (vector if lanes == 1 else 1)
            else:
                sizes.add(held + 5)
    row = itemsize * (1 if lanes == 1 else lanes * vector)
    sizes.add(SMALL_DEVICE.shared_per_block // row + 1)
    layout = kind if kind == "channels_last" else ("unaligned" if vector == 1 else "contiguous")
    base = Case((2, c, 1), dtype, layout)
    return [replace(base, shape=(2, c, s)) for s in sorted(sizes)]
