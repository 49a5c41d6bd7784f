"""zscore along any axes, against SciPy; and denormalize, the way back to intensities."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.backends import Backend, on
from helpers.compare import ROUNDING, assert_equal, assert_within, wide
from helpers.optional import required
from helpers.pairwise import pairwise

import cupynorm as cn
from cupynorm import scores
from cupynorm._types import EPS_MODES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def exact(a: np.ndarray, axis: Any = 0, ddof: float = 0, mask: np.ndarray | None = None) -> np.ndarray:
    """z-scores in extended precision; NaN where std is 0, and 0 outside of the mask."""
    a, inside = wide(a), np.ones(a.shape, bool) if mask is None else np.broadcast_to(mask, a.shape)
    axis = tuple(axis) if isinstance(axis, list) else axis
    count = inside.sum(axis=axis, keepdims=True)
    mean = np.where(inside, a, 0).sum(axis=axis, keepdims=True) / np.maximum(count, 1)
    m2 = (np.where(inside, a - mean, 0) ** 2).sum(axis=axis, keepdims=True)
    with np.errstate(all="ignore"):
        z = (a - mean) / np.sqrt(m2 / (count - ddof))
    return np.where(inside, z, 0)


AXES = (0, 1, 2, -1, (0, 1), (1, 2), (0, 2), (2, 0), (0, 1, 2), None)


@pairwise(
    dtype=("float32", "float64", "float16", "uint16", "int8", "int32", "bool"), axis=AXES,
    shape=((3, 4, 5), (40, 3, 60), (2, 33, 32), (300, 2, 7)), order=("C", "F", "every second", "reversed"),
    ddof=(0, 1, 1.5), out=(False, True),
)  # fmt: skip
@pytest.mark.full(simt=lambda given: given["dtype"] != "float32")
def test_zscore(
    backend: Backend, dtype: str, axis: Any, shape: tuple[int, ...], order: str, ddof: float, out: bool,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Any axes and strides; integers give float64."""
    a = rng.normal(size=shape) * 20 + 50
    a = (a > 50) if dtype == "bool" else a.astype(dtype)
    if order == "F":
        a = np.asfortranarray(a)
    elif order == "every second":
        a = np.repeat(a, 2, 1)[:, ::2]
    elif order == "reversed":
        a = a[::-1, :, ::-1]
    result = dtype if dtype.startswith("float") else "float64"
    target = backend.array(np.zeros(shape, result)) if out else None
    z = cn.zscore(backend.array(a), axis, ddof, out=target)
    assert (z.shape, z.dtype) == (shape, result) and (z is target or not out)
    bound = 2 * ROUNDING[result] + 40 * ROUNDING["float32" if result == "float16" else result]
    expected = exact(a, axis, ddof)
    assert_within(backend.host(z), expected, bound * (1 + np.abs(np.nan_to_num(expected))))


@pytest.mark.extras
@pytest.mark.long  # imports SciPy
@pytest.mark.full(simt=lambda given: True)
@pairwise(nan=(False, True), ddof=(0, 1), axis=(0, 1, -1, None), policy=("propagate", "omit"))
def test_as_scipy_does(
    backend: Backend, nan: bool, ddof: int, axis: Any, policy: str, rng: np.random.Generator
) -> None:
    """Random arrays, with constant slices and NaN."""
    stats = required("scipy.stats")
    for dtype, shape in itertools.product(("float64", "float32"), ((7, 9), (6, 5, 40), (12,))):
        if axis == 1 and len(shape) < 2:
            continue
        a = rng.normal(size=shape).astype(dtype)
        if len(shape) > 1:
            a[:, 2] = 5.5
            a[3] = a[3, :1]
        if nan:
            a[rng.random(shape) < 0.1] = np.nan
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = stats.zscore(a, axis, ddof, policy)
        z = cn.zscore(backend.array(a), axis, ddof, policy)
        assert z.dtype == expected.dtype
        assert_within(backend.host(z), np.asarray(expected), 1e-11 if dtype == "float64" else 2e-5)


@pytest.mark.extras
@pytest.mark.long  # imports SciPy
@pytest.mark.full(simt=lambda given: given["dtype"] != "uint8")
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "bool"])
def test_integers_as_scipy(backend: Backend, dtype: str, rng: np.random.Generator) -> None:
    a = (rng.random((20, 30)) * 100).astype(dtype)
    a[0, 0], a[1, 0] = 0, 1
    z = cn.zscore(backend.array(a), axis=None)
    assert_within(backend.host(z), required("scipy.stats").zscore(a, axis=None), 1e-11)
    z = cn.zscore(backend.array(a), axis=None, dtype="float32")
    assert z.dtype == np.float32
    assert_within(backend.host(z), exact(a, None), 5e-6)


@pytest.mark.full(simt=lambda given: given["axis"] != 1)
@pytest.mark.parametrize("axis", [0, 1, None, (1, 2)], ids=str)
def test_zscore_with_a_mask(backend: Backend, axis: Any, rng: np.random.Generator) -> None:
    """And with NaN that is left out, inside the mask and outside of it."""
    a, mask = rng.normal(size=(6, 8, 9)), rng.random((8, 9)) < 0.7
    z = cn.zscore(backend.array(a), axis, mask=backend.array(mask))
    assert_within(backend.host(z), exact(a, axis, mask=mask), 1e-11)
    holes = rng.random(a.shape) < 0.1
    spoiled = np.where(holes, np.nan, a)
    z = cn.zscore(backend.array(spoiled), axis, nan_policy="omit", mask=backend.array(mask))
    expected = np.where(holes & mask, np.nan, exact(a, axis, mask=mask & ~holes))
    assert_within(backend.host(z), expected, 1e-11)


@pairwise(
    dtype=("float32", "float64", "float16", "uint8"), value=(0.1, 7.0, 250.0), size=(2, 15, 63, 1000, 70000)
)  # fmt: skip
@pytest.mark.full(simt=lambda given: given["dtype"] != "float32" or given["size"] > 1000)
def test_constant_slices_are_nan(backend: Backend, size: int, value: float, dtype: str) -> None:
    """As in SciPy; beside slices that are not constant."""
    a = np.full((3, size), value).astype(dtype)
    a[1, 0] = 1
    z = backend.host(cn.zscore(backend.array(a), axis=1))
    assert np.isnan(z[[0, 2]]).all() and np.isfinite(z[1]).all()


def test_slices_of_one_value_and_of_none(backend: Backend) -> None:
    assert np.isnan(backend.host(cn.zscore(backend.array(np.ones((3, 1))), axis=1))).all()
    assert cn.zscore(backend.array(np.ones((0, 3)))).shape == (0, 3)
    assert cn.zscore(backend.array(np.ones((3, 0))), axis=0).shape == (3, 0)
    for dtype, ddof in itertools.product((np.float64, np.float16, BFLOAT16), (2, 3)):
        a = backend.array(np.array([[1, 2], [3, 3]]).astype(dtype))
        assert np.isnan(wide(backend.host(cn.zscore(a, axis=1, ddof=ddof)))).all()
    # By a mask, or by NaN that is left out.
    mask = np.array([[True, False, True, False], [False] * 4])
    z = backend.host(cn.zscore(backend.array(np.arange(8.0).reshape(2, 4)), axis=1, ddof=2, mask=backend.array(mask)))
    assert_equal(z, np.where(mask, np.nan, 0))
    a = backend.array(np.where(mask, np.arange(8.0).reshape(2, 4), np.nan))
    assert np.isnan(backend.host(cn.zscore(a, axis=1, ddof=2, nan_policy="omit"))).all()
    one = backend.array(np.ones((2, 1)))
    z = backend.host(cn.zscore(one, axis=1, mask=backend.array(np.array([[True], [False]]))))
    assert_equal(z, [[np.nan], [0]])


def test_nan_policies(backend: Backend) -> None:
    a = backend.array(np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]]))
    z = backend.host(cn.zscore(a, axis=1))
    assert np.isnan(z[0]).all() and np.isfinite(z[1]).all()
    z = backend.host(cn.zscore(a, axis=1, nan_policy="omit"))
    assert_within(z[0], [-1, np.nan, 1], 1e-12)
    with pytest.raises(ValueError, match="a contains NaN, and nan_policy is 'raise'"):
        cn.zscore(a, nan_policy="raise")
    assert np.isfinite(backend.host(cn.zscore(a[1:], axis=1, nan_policy="raise"))).all()
    if backend.device == "cpu":  # a dtype that is converted first
        z = cn.zscore(np.array([[1, np.nan, 3]], np.longdouble), axis=1, nan_policy="omit")
        assert_within(z, [[-1, np.nan, 1]], 1e-12)
    half = backend.array(np.array([[1, np.nan, 3, 2]]).astype(BFLOAT16))
    z = wide(backend.host(cn.zscore(half, axis=1, nan_policy="omit")))
    assert np.isnan(z[0, 1]) and np.isfinite(z[0, [0, 2, 3]]).all()


def test_usual_views_are_not_copied() -> None:
    """Rows, columns, a middle axis, all but one axis."""
    a = np.zeros((4, 5, 6), np.float32)
    for axis in (0, 1, 2, (1, 2), (0, 1), (0, 2), None):
        planes, shape = scores.planes_of(a, scores.axes_of(axis, 3))
        assert planes.shape == shape and np.shares_memory(planes, a)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
def test_arrays_that_no_view_shows_as_planes_are_copied(backend: Backend, dtype: Any, rng: np.random.Generator) -> None:
    whole = backend.array(rng.normal(size=(40, 6, 5, 7)).astype(dtype))
    apart = whole[:, ::2, :, ::2]
    assert scores.view_of_planes(apart, [0])[0] is None
    z = cn.zscore(apart, axis=0)
    values = wide(backend.host(apart))
    exact = (values - values.mean(0)) / values.std(0)
    assert z.shape == apart.shape
    assert_within(backend.host(z), exact, (ROUNDING[np.dtype(dtype).name] + 2e-6) * (1 + np.abs(exact)))


@pytest.mark.parametrize(
    ("array", "options", "error", "message"),
    [
        (np.complex64, {}, TypeError, "a has dtype complex64; needed are real numbers"),
        (np.float32, {"axis": 2}, ValueError, "axis 2 is out of bounds for an array of 2 dimensions"),
        (np.float32, {"axis": "x"}, TypeError, "axis must be an integer, several, or None"),
        (np.float32, {"axis": (0, -2)}, ValueError, "axis must name each axis once"),
        (np.float32, {"nan_policy": "ignore"}, ValueError, "nan_policy must be one of propagate, omit, raise"),
        (np.float32, {"dtype": int}, TypeError, "dtype, of the result, must be"),
        (np.float32, {"ddof": "1"}, TypeError, "ddof must be a number"),
        (np.float32, {"out": np.zeros((3, 4))}, ValueError, r"out has shape .* dtype float64 on \S+; needed are"),
        (np.float32, {"out": np.zeros((4, 3), "f4")}, ValueError, r"out has shape \(4, 3\) .* needed .* \(3, 4\)"),
        (np.float32, {"mask": np.ones(4)}, TypeError, "mask has dtype float64; needed is bool"),
        (np.float32, {"mask": np.ones(3, bool)}, ValueError, r"mask has shape \(3,\), which does not broadcast"),
        (np.float32, {"out": [1]}, TypeError, "out must be a numpy.ndarray"),
    ],
)  # fmt: skip
def test_refusals_of_zscore(backend: Backend, array: Any, options: Any, error: type, message: str) -> None:
    given = {name: backend.array(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    with pytest.raises(error, match=message):
        cn.zscore(backend.array(np.ones((3, 4), array)), **given)


@pairwise(
    dtype=("float32", "float64", "float16"), eps_mode=EPS_MODES, ddof=(0, 1), params=("none", "channel", "sample"),
    shape=((2, 3, 9, 8), (2, 5, 40), (1, 32, 20, 30)), layout=("C", "channels_last"),
)  # fmt: skip
@pytest.mark.full(simt=lambda given: given["dtype"] != "float32" or len(given["shape"]) == 3)
def test_denormalize_undoes_instance_norm(
    backend: Backend, dtype: str, eps_mode: str, ddof: int, params: str, shape: tuple[int, ...], layout: str,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """And on other positions of the same planes, it gives the intensities that they stand for."""
    x = (rng.normal(size=shape) * 30 + 1000).astype(dtype)
    if layout == "channels_last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    wide_dtype = np.float64 if dtype == "float64" else np.float32
    of = {"none": None, "channel": shape[1], "sample": shape[:2]}[params]
    weight, bias = (None, None) if of is None else (rng.uniform(0.5, 2, of), rng.normal(size=of))
    parameters = [None if p is None else backend.array(p.astype(wide_dtype)) for p in (weight, bias)]
    options = {"eps": 0.5, "ddof": ddof, "eps_mode": eps_mode}
    x_ = backend.array(x)
    moments = cn.moments(x_)
    y = cn.instance_norm(x_, None, None, *parameters, **options)
    back = cn.denormalize(y, moments, *parameters, **options)
    assert back.dtype == x.dtype
    assert_within(backend.host(back), x, 30 * ROUNDING[dtype] * 1000 * (40 if dtype == "float16" else 1))
    part = y[..., ::2]
    assert_within(
        backend.host(cn.denormalize(part, moments, *parameters, **options)), backend.host(back)[..., ::2], 0.0
    )
    assert cn.denormalize(y, moments, *parameters, **options, out=y) is y
    assert_equal(backend.host(y), backend.host(back))


@pytest.mark.full(simt=lambda given: True)
def test_denormalize_images_of_a_camera(backend: Backend, rng: np.random.Generator) -> None:
    """uint16 to float16 and back, rounded; planes near the end of the range with a small deviation."""
    x = (65500 + rng.integers(0, 8, (2, 3, 20, 30))).astype(np.uint16)
    moments = cn.moments(backend.array(x))
    y = cn.instance_norm(backend.array(x), dtype="float16")
    back = cn.denormalize(y, moments, dtype="float32")
    assert back.dtype == np.float32
    assert_equal(np.rint(backend.host(back)).astype(np.uint16), x)


def test_denormalize_constant_planes(backend: Backend) -> None:
    x = np.full((2, 3, 8), 7.5, np.float32)
    moments = cn.moments(backend.array(x))
    for eps, mode in ((1e-5, "variance"), (0.0, "variance"), (1e-5, "std"), (0.5, "max")):
        y = backend.array(np.zeros_like(x))
        assert_equal(backend.host(cn.denormalize(y, moments, eps=eps, eps_mode=mode)), x)


def test_refusals_of_denormalize(backend: Backend) -> None:
    y, out = backend.array(np.ones((2, 3, 6), np.float32)), backend.array(np.full((2, 3, 6), 7, np.float32))
    moments = cn.moments(y)
    for arguments, options, error, message in (
        ((5,), {}, TypeError, r"moments must be what cupynorm\.moments returns, got int"),
        ((cn.moments(y[:1]),), {}, ValueError, r"moments\.count has shape \(1, 3\)"),
        (
            (moments, backend.array(np.ones(2))),
            {},
            ValueError,
            r"weight has shape \(2,\); needed is \(3,\) or \(2, 3\)",
        ),
        ((moments, None, backend.array(np.ones(3, int))), {}, TypeError, "bias has dtype int64; accepted are float16"),
        ((moments,), {"eps": -1}, ValueError, "eps must not be negative"),
        ((moments,), {"eps_mode": "sum"}, ValueError, "eps_mode must be one of"),
        ((moments,), {"dtype": "uint16"}, TypeError, "dtype, of the result, must be"),
        ((moments,), {"dtype": "float64"}, ValueError, "out has shape .* needed are .* float64"),
    ):
        with pytest.raises(error, match=message):
            cn.denormalize(y, *arguments, **options, out=out)
    with pytest.raises(TypeError, match="integers need dtype="):
        cn.denormalize(backend.array(np.ones((2, 3, 6), np.uint8)), moments)
    assert (backend.host(out) == 7).all()


@on("numpy", "compiled", "simt")
def test_other_byte_orders(backend: Backend, rng: np.random.Generator) -> None:
    """Of FITS files, say: zscore converts them; parameters of denormalize are refused."""
    a = rng.normal(size=(5, 30)) * 100
    for dtype in (">f4", ">f8", ">u2", ">i4"):
        z = cn.zscore(a.astype(dtype), axis=1)
        assert z.dtype == (np.float32 if dtype == ">f4" else np.float64)
        assert_within(z, exact(a.astype(dtype), 1), 1e-5)
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    with pytest.raises(TypeError, match="weight has dtype >f4"):
        cn.denormalize(x, cn.moments(x), np.ones(3, ">f4"))


def test_explain_says_how_an_array_is_read() -> None:
    """As a view of planes, or as a copy; and whether it is converted first. Nothing is copied to find that out."""
    x = np.zeros((4, 6, 5, 7), np.float32)
    for axis, shape in ((-1, (1, 120, 7)), ((2, 3), (1, 24, 5, 7)), (1, (4, 35, 6)), (None, (1, 1, 4, 6, 5, 7))):
        told = cn.explain(x, axis=axis)
        assert f"seen as planes (N, C, ...) of shape {shape}" in told
        assert "backward" not in told and "running" not in told
    apart = x[:, ::2, :, ::2]
    assert "copied to planes (N, C, ...) of shape (1, 60, 4), which no view has" in cn.explain(apart, axis=0)
    assert "NaN: there is one value along the axes, or none" in cn.explain(x[:, :1], axis=1, device="H100")
    told = cn.explain(np.zeros((4, 6), np.int64), axis=0, device="H100")
    assert "z-scores of (4, 6) int64 along axis 0, float64" in told
    assert "converted to float64 first" in told and "on H100\n    forward: " in told and "running" not in told
    told = cn.explain(np.zeros((4, 6), np.uint16), axis=None, dtype="float32", mask=True, device="H100")
    assert "along all axes, float32" in told and "converted" not in told and "a byte of the mask" in told


@pytest.mark.parametrize("options", [{"residual": True}, {"activation": "relu"}, {"parts": True}], ids=str)
def test_explain_of_z_scores_refuses_other_calls(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="z-scores have no activation, residual"):
        cn.explain(np.zeros((4, 6)), axis=0, **options)
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):
        cn.explain(np.zeros((4, 6)), axis=2)
    with pytest.raises(TypeError, match="needed are real numbers"):
        cn.explain(np.zeros((4, 6), complex), axis=0)
