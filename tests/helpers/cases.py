"""The case table, and checks of each case's results against extended precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import cupynorm as cn
from cupynorm import devices
from cupynorm.cuda.device import Device
from cupynorm.cuda.layout import SUBWARP_BYTES, SUBWARP_ELEMENTS, Layout
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import _Job
from cupynorm.cuda.variants import EPILOGUES, ITEMSIZE, VARIANTS, Kind, exists, group_of, resident_threads, widest
from helpers import reference
from helpers.backends import Backend
from helpers.compare import ROUNDING, assert_same, assert_within

#: Devices on which small planes are split, and on which a grid's blocks share them.
BLOCKS = Device("blocks", (8, 0), 1, 20 * 1024, 2**18)
GRID = Device("grid", (8, 0), 5, 64 * 1024, 2**20)
#: Few multiprocessors: the size of a plane alone decides its scope, as in large batches.
SMALL_DEVICE = Device("small", (7, 5), 1, 99 * 1024, 4 * 2**20)
#: Many multiprocessors for few planes: larger scopes are chosen.
WIDE_DEVICE = Device("wide", (7, 5), 64, 99 * 1024, 4 * 2**20)


@dataclass(frozen=True)
class Case:
    """One input. layout and data name entries of reference.LAYOUTS and of `data_of`."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    data: str = "normal"
    affine: bool = True
    device: Device = SMALL_DEVICE
    param_dtype: str | None = None  # None: float64 for float64 input, else float32
    dy_layout: str | None = None  # None: x's
    activation: str | None = None
    residual: str | None = None  # its layout
    per_sample: str = ""  # which of weight and bias are (N, C): "w", "b", "wb"
    eps: float = 1e-5
    eps_mode: str = "variance"
    ddof: float = 0.0
    of_variant: bool = False  # chosen to reach a variant of the kernels

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.dtype, self.layout, self.data]
        parts += [] if self.affine else ["plain"]
        parts += [self.activation] if self.activation else []
        parts += [f"residual_{self.residual}"] if self.residual else []
        parts += [f"per_sample_{self.per_sample}"] if self.per_sample else []
        if (self.eps_mode, self.ddof) != ("variance", 0):
            parts.append(f"{self.eps_mode}{self.eps:g}_ddof{self.ddof:g}")
        return "-".join(parts + ([] if self.device is SMALL_DEVICE else [self.device.name]))


def data_of(name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
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
    """Return an array of any rank in a layout of reference.LAYOUTS, whose functions take 4 axes."""
    if array.ndim == 4 or layout == "contiguous":
        return reference.LAYOUTS[layout](array)
    if layout == "unaligned":
        return np.concatenate([array.ravel()[:1], array.ravel()])[1:].reshape(array.shape)
    if layout == "gaps":  # between the planes
        return np.repeat(array, 2, 1)[:, ::2]
    assert layout == "channels_last", layout
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def within(actual: np.ndarray, expected: Any, scale: Any, allowed: float, what: str) -> None:
    """Assert that the error relative to scale is allowed, apart from what a GPU may flush to zero."""
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-126, "float64": 2.0**-1074}
    with np.errstate(invalid="ignore", over="ignore"):
        assert_within(actual, expected, scale * np.longdouble(allowed) + smallest[actual.dtype.name], what, True)


def arrays(case: Case, rng: np.random.Generator) -> tuple[Any, ...]:
    """Return x, dy, weight, bias, running_mean, running_var and residual of a case."""
    dtype = devices.dtype_of(case.dtype)
    params = devices.dtype_of(case.param_dtype or ("float64" if case.dtype == "float64" else "float32"))
    n, c = case.shape[:2]
    if case.data == "zeros":  # for tests of plans, which need no values
        x = _stride_kept(np.zeros(case.shape, dtype), case.layout)
        dy = _stride_kept(x, case.dy_layout) if case.dy_layout else x
    else:
        x = _stride_kept(data_of(case.data, rng, case.shape).astype(dtype), case.layout)
        dy = _stride_kept((rng.normal(size=case.shape) + 0.5).astype(dtype), case.dy_layout or case.layout)
    weight, bias = (
        rng.normal(size=(n, c) if letter in case.per_sample else c).astype(params) if case.affine else None
        for letter in "wb"
    )
    residual = None
    if case.residual:
        values = np.zeros(case.shape) if case.data == "zeros" else rng.normal(size=case.shape)
        residual = _stride_kept(values.astype(dtype), case.residual)
    return x, dy, weight, bias, rng.normal(size=c).astype(params), (rng.random(c) + 0.5).astype(params), residual


SLOPE = 0.2  # of leaky_relu


def modes(case: Case) -> tuple[bool, ...]:
    """Return the values of `training` to test: tracked eval, too, but not for groups of blocks, which it does not use,
    and of the cases for variants, which it does not have, only for the planes that reach its own kernels."""
    blocks = case.device.name in ("small", "wide", "narrow")
    return (True, False) if blocks and not (case.of_variant and case.shape[2] > 1100) else (True,)


def fused(x: Any, dy: Any, residual: Any, **options: Any) -> tuple[Any, ...]:
    """Return y, dx, dweight, dbias, and dresidual if there is a residual."""
    y, saved = cn.instance_norm_forward(x, residual=residual, **options)
    return y, *cn.instance_norm_backward(dy, saved)


def check(
    backend: Backend,
    case: Case,
    rng: np.random.Generator,
    run: Callable[..., tuple[Any, ...]] = fused,
    trainings: tuple[bool, ...] | None = None,
) -> None:
    """Check forward and backward, in training and in tracked eval, against extended precision.

    run: called as `fused` is. trainings: the values of `training` to check, if not those of `modes`.
    """
    backend.pretend(case.device)
    x_, dy_, weight_, bias_, mean_, var_, residual_ = arrays(case, rng)
    c, params = case.shape[1], mean_.dtype
    before = x_.copy()
    x, mean, var = (backend.array(a) for a in (x_, mean_.copy(), var_.copy()))
    weight, bias, residual = (None if a is None else backend.array(a) for a in (weight_, bias_, residual_))

    # A few roundings of the storage dtype, and a few of the computing dtype. With an activation, g is stored, too, in
    # place of dy.
    storage = 2 * ROUNDING[case.dtype]
    compute = 16 * ROUNDING["float64" if case.dtype == "float64" else "float32"]
    handed = storage / 2 if case.activation else 0
    param = 2 * ROUNDING[params.name]

    def of_planes(parameter: np.ndarray | None, default: float) -> np.ndarray:
        """Return |parameter|, broadcastable over planes."""
        values = np.full(c, default) if parameter is None else np.abs(reference.wide(parameter))
        return values.reshape(*values.shape, *(1,) * (len(case.shape) - 2))

    w, b = of_planes(weight_, 1), of_planes(bias_, 0)
    r = 0 if residual_ is None else np.abs(reference.wide(residual_))
    epilogue = {"activation": case.activation, "negative_slope": SLOPE}
    convention = {"eps": case.eps, "eps_mode": case.eps_mode, "ddof": case.ddof}

    for training in trainings or modes(case):
        running = None if training else (mean_, var_)
        options = {} if training else {"use_input_stats": False}
        exact = reference.Exact(x_, weight_, bias_, running=running, residual=residual_, **epilogue, **convention)
        xhat = np.abs(exact.xhat)
        scale = np.maximum(xhat, 1) * w + b + r
        # Leave out elements for which rounding decides on which side of a kink they are.
        if case.activation in ("relu", "leaky_relu"):
            dy_[np.abs(exact.z) <= 4 * (compute + storage * (case.dtype == "float64")) * scale] = 0
        dy = backend.array(dy_)
        y, dx, dweight, dbias, *dresidual = run(
            x, dy, residual, weight=weight, bias=bias, running_mean=mean, running_var=var, momentum=0.3, **convention,
            **epilogue, **options,
        )  # fmt: skip
        assert y.dtype == dx.dtype == x.dtype
        y, dx = backend.host(y), backend.host(dx)

        within(y, exact.y, 1.2 * scale, storage + compute, f"y, {training=}")

        dx_, dweight_, dbias_, g = exact.backward(dy_)
        axes = tuple(range(2, x_.ndim))
        # A derivative's error is z's error times the derivative's own slope, at most about 1.
        terms_g = np.abs(g) + (np.abs(reference.wide(dy_)) * (1 + scale) if case.activation in ("silu", "gelu") else 0)
        # Each term of dx is rounded, and the terms may cancel.
        terms = terms_g + terms_g.mean(axes, keepdims=True)
        terms = terms + xhat * (terms_g * xhat).mean(axes, keepdims=True) * exact.rstd_slope
        with np.errstate(invalid="ignore"):
            bound = storage + handed + compute
            within(dx, dx_, terms * exact.rstd * w, bound, f"dx, {training=}")
        if case.affine:
            sums = ((terms_g * xhat, weight), (terms_g, bias))
            for name, actual, expected, (terms, p) in zip(
                ("dweight", "dbias"), (dweight, dbias), (dweight_, dbias_), sums, strict=True
            ):
                assert actual.dtype == params
                total = terms.sum(axes if p.ndim == 2 else (0, *axes)) + 1e-30
                within(backend.host(actual), expected, total, param + handed + compute, f"{name}, {training=}")
        else:
            assert dweight is dbias is None
        if residual is None:
            assert not dresidual
        else:
            within(backend.host(dresidual[0]), g, terms_g, storage + compute, f"dresidual, {training=}")

        if training:
            m, v = exact.moved(mean_, var_, 0.3)
            xmean, xvar = (np.abs(a).mean(0) for a in exact.statistics)
            # A mean's terms may cancel, so about one rounding of each is allowed, too.
            terms = np.abs(mean_) + xmean + np.sqrt(xvar) / 16
            within(backend.host(mean), m, terms + 1e-30, param + compute, "running_mean")
            # The variance is that of the rounded values, so it is exact around a large mean, too.
            within(backend.host(var), v, np.abs(var_) + 2 * xvar + 1e-30, param + compute, "running_var")
            mean, var = backend.array(mean_.copy()), backend.array(var_.copy())
        else:
            assert_same(backend.host(mean), mean_, "running_mean")
            assert_same(backend.host(var), var_, "running_var")
    assert_same(backend.host(x), before, "x")


def double_terms(
    call: reference.Exact, ddx: np.ndarray, dy: np.ndarray, w: Any, q: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each element, the sum of the sizes of all terms of ddy, dx and dweight of a double backward, each of
    which is rounded: g and u after their means are subtracted. w, q: |weight| and |ddweight|; without ddbias.
    """

    def average(a: np.ndarray) -> np.ndarray:
        return a.mean(tuple(range(2, a.ndim)), keepdims=True)

    xhat, u, g = np.abs(call.xhat), reference.wide(ddx), reference.wide(dy)
    if call.running is not None:
        v, g = call.rstd * np.abs(u), np.abs(g)
        return w * v + q * xhat + 1e-30, call.rstd * q * g + 1e-30, v * g
    u, g = (np.abs(a - average(a)) for a in (u, g))
    xhat, u, g = (a + average(a) for a in (xhat, u, g))
    v = call.rstd * u
    a, c, s = average(v * xhat), average(g * xhat), average(v * g)
    q = q + w * a
    terms = q * (g + xhat * c) + w * (c * (v + xhat * a) + xhat * (s + a * c))
    return w * v + q * xhat + 1e-30, call.rstd * terms + 1e-30, v * g


def check_double(backend: Backend, case: Case, rng: np.random.Generator) -> None:
    """Check double backward, in training and in tracked eval, against extended precision."""
    backend.pretend(case.device)
    x_, dy_, weight_, bias_, mean_, var_, residual_ = arrays(replace(case, activation=None), rng)
    ddx_ = _stride_kept((rng.normal(size=case.shape) - 2).astype(x_.dtype), case.dy_layout or case.layout)
    ddweight_, ddbias_ = (None if p is None else rng.normal(size=p.shape).astype(p.dtype) for p in (weight_, bias_))
    x, dy, ddx, mean, var = (backend.array(a) for a in (x_, dy_, ddx_, mean_.copy(), var_.copy()))
    weight, bias, ddweight, ddbias, residual = (
        None if a is None else backend.array(a) for a in (weight_, bias_, ddweight_, ddbias_, residual_)
    )
    storage = 2 * ROUNDING[case.dtype]
    compute = 16 * ROUNDING["float64" if case.dtype == "float64" else "float32"]
    param = 2 * ROUNDING[mean_.dtype.name]
    axes = tuple(range(2, x_.ndim))

    def size_of(parameter: np.ndarray | None, default: float) -> Any:
        if parameter is None:
            return default
        return np.abs(reference.wide(parameter)).reshape(*parameter.shape, *(1,) * len(axes))

    for training in modes(case):
        running = None if training else (mean_, var_)
        _, saved = cn.instance_norm_forward(
            x, weight, bias, running_mean=mean, running_var=var, momentum=0, residual=residual, use_input_stats=training
        )
        ddy, dx, dweight = cn.instance_norm_double_backward(ddx, ddweight, ddbias, dy, saved)
        assert ddy.dtype == dx.dtype == x.dtype
        call = reference.Exact(x_, weight_, running=running)
        exact = call.double_backward(ddx_, ddweight_, ddbias_, dy_)

        of_ddy, of_dx, of_dweight = double_terms(call, ddx_, dy_, size_of(weight_, 1), size_of(ddweight_, 0))
        with np.errstate(invalid="ignore"):
            within(backend.host(ddy), exact[0], of_ddy + size_of(ddbias_, 0), storage + compute, f"ddy, {training=}")
            within(backend.host(dx), exact[1], of_dx, storage + compute, f"dx, {training=}")
        if weight is None:
            assert dweight is None
        else:
            assert dweight.dtype == weight.dtype
            total = of_dweight.sum(axes if weight.ndim == 2 else (0, *axes)) + 1e-30
            within(backend.host(dweight), exact[2], 2 * total, param + compute, f"dweight, {training=}")
    assert_same(backend.host(dy), dy_, "dy")


#: Layouts, ranks, dtypes and data that every backend is tested with.
TABLE = [
    *(Case((2, 3, 5, 7), dtype) for dtype in ITEMSIZE),
    *(Case((2, 8, 5, 6), dtype, "channels_last") for dtype in ITEMSIZE),
    *(Case((3, 5, 9), dtype) for dtype in ITEMSIZE),
    *(Case((1, 2, 3, 4, 5), dtype) for dtype in ITEMSIZE),
    *(Case((2, 2, 2, 3, 2, 2), dtype, affine=False) for dtype in ITEMSIZE),
    *(Case((2, 4, 6, 8), "float32", layout) for layout in reference.LAYOUTS),
    *(Case((2, 3, 5, 7), "float16", layout) for layout in reference.LAYOUTS),
    *(Case((2, 8, 5, 7), "bfloat16", "channels_last", dy_layout=layout) for layout in reference.LAYOUTS),
    *(Case((2, 3, 45, 47), dtype, data="offset") for dtype in ("float32", "float64")),
    *(Case((2, 8, 30, 30), "float32", layout, data) for layout in ("contiguous", "channels_last")
      for data in ("offset", "far", "constant", "outlier", "checkerboard", "tiny")),
    # As many channels as the CPU's compiled loops take side by side; in one case planes are cut into tiles.
    *(Case((2, 32, 5, 6), dtype, "channels_last") for dtype in ITEMSIZE),
    *(Case((1, 32, 30, 30), "float32", "channels_last", data)
      for data in ("offset", "far", "constant", "outlier", "checkerboard", "tiny")),
    Case((1, 17, 90, 110), "float32", "channels_last", "offset"),
    *(Case((1, 2, 47, 49), "float32", data=data) for data in ("far", "constant", "outlier", "checkerboard", "tiny")),
    *(Case((1, 2, 47, 49), "float16", data=data) for data in ("near_max", "small_values")),
    *(Case((2, 3, 16, 17), "float16", layout, data) for layout in ("contiguous", "channels_last")
      for data in ("near_max", "constant", "checkerboard", "small_values")),
    *(Case((2, 3, 16, 17), "bfloat16", "contiguous", data) for data in ("offset", "checkerboard", "constant")),
    Case((2, 3, 5, 7), "float16", param_dtype="float16"),
    Case((2, 3, 5, 7), "bfloat16", param_dtype="bfloat16"),
    *(Case((3, 2, 2), dtype) for dtype in ITEMSIZE),  # two elements per plane
    Case((1, 1, 3, 3)),
    Case((40, 70, 4, 4)),
    Case((9, 33, 2, 3), "float16", "channels_last"),
    # As many elements as a warp's staging has room for, misaligned.
    *(Case((3, 7, 16, size), dtype, "unaligned") for size, dtype in ((16, "float16"), (8, "float32"), (4, "float64"))),
    *(Case((3, 4, 6, 7), dtype, layout, activation=activation, residual=residual, per_sample=per_sample)
      for activation in (None, "relu", "leaky_relu", "silu", "gelu")
      for dtype, layout, residual, per_sample in (
          ("float32", "contiguous", None, ""), ("float16", "channels_last", "channels_last", "wb"),
          ("bfloat16", "contiguous", "channels_last", "w"), ("float64", "unaligned", "contiguous", "b"))),
    *(Case((2, 3, 45, 47), "float32", data="offset", activation=activation, residual="contiguous")
      for activation in ("relu", "silu")),
    Case((2, 270, 3, 4), "float32", "channels_last", activation="silu", residual="channels_last", per_sample="w"),
    *(Case((3, 5, 7, 7), "float16", param_dtype="float16", per_sample=which) for which in ("w", "b", "wb")),
    *(Case((1, 5, 40, 41), dtype, param_dtype=dtype) for dtype in ("float16", "bfloat16")),  # one sample
]  # fmt: skip


#: The smallest cases that reach every regime: on a GPU the sanitizers run these.
SMALL = [
    Case(shape, dtype, layout)
    for dtype in ("float32", "float16")
    for layout, shapes in {
        "contiguous": ((2, 3, 5, 7), (2, 3, 35, 45), (1, 2, 100, 100), (1, 2, 110, 200), (1, 2, 250, 260)),
        "channels_last": ((2, 8, 5, 6), (1, 8, 38, 38), (1, 8, 55, 55), (1, 8, 100, 101)),
    }.items()
    for shape in shapes
]


#: A kind of kernels; and True if no array is misaligned and channels form whole vecs.
KINDS: tuple[tuple[Kind, bool], ...] = (
    ("channels_first", True), ("channels_first", False), ("channels_last", True), ("channels_last", False),
)  # fmt: skip
GROUPS = ("", "warp", "subwarp", "cluster", "cluster_registers", "grid", "grid_registers", "split")


def turn(group: str, kind: Kind, easy: bool) -> str:
    """Return the dtype in which the full tier runs a group's kernels of a kind on the emulator, besides float32.

    Each group covers every dtype and every kind, and the groups together cover every dtype with every kind: building
    all modules would take minutes.
    """
    dtypes = ("float32", "float16", "bfloat16", "float64")
    return dtypes[(KINDS.index((kind, easy)) + GROUPS.index(group)) % 4]


def variants(ops: tuple[Op, ...] = ("forward", "backward"), turns: bool = False) -> list[Case]:
    """Return cases that reach every kernel without an epilogue: each variant, dtype, layout and alignment; the split.

    turns: each group of kernels only in the dtype that `turn` returns.
    """
    return [case for dtype in ITEMSIZE for kind in KINDS for case in _variants(dtype, *kind, ops, turns=turns)]


@cache
def _in_turn(*ops: Op) -> frozenset[Case]:
    return frozenset(variants(ops, turns=True))


@cache
def _single_cases() -> frozenset[Case]:
    return frozenset(variants())


@cache
def _variant_cases() -> frozenset[Case]:
    return _single_cases() | frozenset(variants(("double_backward",)))


def by_default(case: Case) -> bool:
    """Return True if the default tier runs a case on the emulator.

    It runs every variant in one dtype: float32, or float16 for variants that only 16-bit dtypes have. In the other
    dtypes it runs small contiguous planes without an epilogue, since each dtype has modules of its own to build. It
    runs clusters of 8 and 16 blocks, which take longest, in one layout, and no groups of blocks on arrays that are
    misaligned or whose channels form no whole vecs.
    """
    if case.dtype == "float32":
        hard = case.layout == "unaligned" or (case.layout == "channels_last" and case.shape[1] % 4 > 0)
        group = case.device not in (SMALL_DEVICE, WIDE_DEVICE)
        if group and (hard or (case.device.cluster >= 8 and case.layout != "contiguous")):
            return False
        return case.activation is None or case.layout == "contiguous"
    if case in _variant_cases():  # for unaligned float16, backward's clusters and the split are variants of their own
        other = case.device.name.startswith("shared") or (case.device is SMALL_DEVICE and case.shape[2] > 40_000)
        return case.dtype == "float16" and case.layout == "unaligned" and other and case in _single_cases()
    plain = case.activation is None and case.residual is None
    return bool(plain and case.layout == "contiguous" and case.dy_layout is None and np.prod(case.shape[2:]) <= 64)


def tiers(*ops: Op) -> Callable[[Any], Any]:
    """Mark a test over cases with its tiers on the emulator: cases that `by_default` leaves out are of the full tier;
    variants of these ops in other dtypes than `turn` returns, and activations in other dtypes than float32, which
    `epilogue_variants` has, are of the nightly tier."""

    def left_out(given: dict[str, Any]) -> bool:
        case = given["case"]
        return not by_default(case) or ("double_backward" in ops and case.dtype != "float32")

    def nightly(given: dict[str, Any]) -> bool:
        case = given["case"]
        if case.activation is not None:
            return left_out(given) and case.dtype != "float32"
        return case in _variant_cases() and left_out(given) and case not in _in_turn(*ops)

    def marked(function: Any) -> Any:
        return pytest.mark.full(simt=left_out)(pytest.mark.nightly(simt=nightly)(function))

    return marked


def epilogue_variants() -> list[Case]:
    """Return cases that reach every kernel with an epilogue: layouts, dtypes, activations and residuals take turns."""
    turns = [
        ("channels_first", True, "float32", "leaky_relu"), ("channels_first", False, "float16", "silu"),
        ("channels_first", False, "float32", "leaky_relu"),
        ("channels_last", True, "bfloat16", "gelu"), ("channels_last", False, "float64", "relu"),
        ("channels_first", True, "bfloat16", "gelu"), ("channels_first", False, "float64", None),
    ]  # fmt: skip
    cases = []
    for kind, easy, dtype, activation in turns:
        for i, case in enumerate(plain := _variants(dtype, kind, easy, epilogue=EPILOGUES[activation])):
            fused = replace(case, activation=activation, residual=case.layout)
            if i % 2 or activation is None or case is plain[-1]:
                cases.append(fused)
            if (i % 2 == 0 or case is plain[-1]) and activation is not None:
                cases.append(replace(fused, residual=None))
    # In 16 bits, backward with an epilogue has no variants that keep planes in the registers of clusters or the grid.
    for activation in ("silu", "gelu"):
        for case in _variants("float32", "channels_first", True, epilogue=EPILOGUES[activation]):
            if case.device.name.startswith("registers"):
                cases.append(replace(case, activation=activation))
    return cases


def _variants(
    dtype: str,
    kind: Kind,
    easy: bool,
    ops: tuple[Op, ...] = ("forward", "backward"),
    epilogue: int = 0,
    turns: bool = False,
) -> list[Case]:
    # Rows of 16 channels have several vecs side by side; 3 channels form no whole vec.
    c = 2 if kind == "channels_first" else (16 if easy else 3)
    layout = kind if kind == "channels_last" else ("contiguous" if easy else "unaligned")
    vec_size = 1 if kind == "channels_last" and not easy else widest(ITEMSIZE[dtype], kind)
    base = Case((2, c, 1), dtype, layout, of_variant=True)
    misaligned = kind == "channels_first" and not easy

    def job(op: Op, s: int, n: int = 2) -> _Job:
        stride = (c * s, s, 1) if kind == "channels_first" else (c * s, 1, c)
        layouts = (Layout(*stride, int(layout == "unaligned")), Layout(*stride, 0))
        made = _Job(op, (n, c, s), dtype, kind, layouts, SMALL_DEVICE, epilogue)
        assert (made.vec_size, made.misaligned) == (vec_size, misaligned)
        return made

    channel_vecs = job("forward", 100).channel_vecs
    unit = vec_size if channel_vecs == 1 else 1  # positions that a vec holds
    cases: dict[tuple[int, Device, str], Case] = {}

    def add(s: int, device: Device = SMALL_DEVICE, layout: str = layout) -> None:
        if turns and dtype != turn(group, kind, easy):
            return
        n = 3 if device.sm_count > 1 else 2
        cases[s, device, layout] = replace(base, shape=(n, c, s), device=device, layout=layout)

    for op in ops:
        held = 0
        for variant in VARIANTS[op]:
            if not exists(variant, op, dtype, kind, epilogue, misaligned):
                continue
            group = group_of(variant, op)
            if variant.scope == "subwarp":
                if kind == "channels_first":
                    most = min(SUBWARP_ELEMENTS, SUBWARP_BYTES // ITEMSIZE[dtype])
                    for s in (3, 5, min(49, most), most):
                        add(s)
            elif variant.residency == "registers" and not variant.grouped:
                capacity = variant.vecs_per_thread * variant.size // channel_vecs * unit
                if capacity <= held:  # a variant for few planes
                    add(capacity - (unit - 1), WIDE_DEVICE)
                    continue
                # Slightly more than the previous variant holds, and as much as this one holds.
                add(held + 3)
                add(capacity - (unit - 1))
                if kind == "channels_first" and capacity * ITEMSIZE[dtype] <= SUBWARP_BYTES:
                    # With gaps between the planes, or subwarps would serve them.
                    add(capacity if easy else capacity - unit + 1, layout="gaps")
                held = capacity
            elif variant.scope == "block":
                shared = job(op, held + 5).shared(variant, 1)
                fits = shared <= SMALL_DEVICE.shared_per_block
                add(held + 5, SMALL_DEVICE if fits else Device("block", (9, 0), 1, shared, 2**20))
            elif variant.scope == "cluster":
                # So many multiprocessors that a cluster of half the size would leave most idle.
                made = job(op, held + 5, 3)
                shared = made.shared(variant, variant.cluster) if variant.residency == "shared" else 2**14
                name = f"{variant.residency}{variant.cluster}"
                add(
                    held + 5,
                    Device(name, (9, 0), made.concurrent_tiles * variant.cluster, shared, 2**20, variant.cluster),
                )
            elif variant.residency == "registers":
                add(held + 5, Device("registers", (8, 0), 5, 2**12, 2**20))
            else:
                # The smallest grid that fits this variant and no earlier one.
                of_registers = [
                    r
                    for r in VARIANTS[op]
                    if group_of(r, op) == "grid_registers" and exists(r, op, dtype, kind, epilogue, misaligned)
                ]
                s, busy = held + 5, 5
                while job(op, s).shared(replace(variant, scope="block"), 1) <= job(op, s).shared(variant, 2):
                    s += held  # a block would hold the plane
                for r in of_registers:  # more than the registers of all multiprocessors hold
                    busy = 2
                    blocks = resident_threads(r, op, dtype, kind, epilogue, misaligned) // r.threads * busy
                    s = blocks * r.vecs_per_thread * r.size // channel_vecs * unit + 5
                add(s, Device("grid", (9, 0), busy, job(op, s).shared(variant, 2), 2**20))
    # Too large for shared memory.
    group = "split"
    add(SMALL_DEVICE.shared_per_block // (ITEMSIZE[dtype] * (1 if channel_vecs == 1 else channel_vecs * vec_size)) + 1)
    return list(cases.values())
