"""Double backward: gradients of a loss that contains gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import pages, reference
from helpers.backends import Backend, on, peak_of, use_compiled
from helpers.cases import double_terms
from helpers.compare import LARGEST, ROUNDING, assert_allclose, assert_equal, assert_within
from helpers.optional import required
from helpers.pairwise import pairwise

import cupynorm as cn
from cupynorm import cpu, devices
from cupynorm.cpu import numpy_path
from cupynorm.cuda.device import Device

DTYPES = ["float16", "bfloat16", "float32", "float64"]

#: On the CPU the double backward runs on NumPy alone, so one test after compiled forwards is enough (test_arguments).
pytestmark = [
    on("numpy", "simt", "cupy"),
    pytest.mark.full(simt=lambda given: given.get("dtype") in ("float16", "bfloat16")),
]


class Call:
    """Random arrays of a double backward on the host, and their results on a backend."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float64", *, affine: str = "wb",
        per_sample: str = "", missing: str = "", training: bool = True, offset: float = 0, mean: float = 0,
        eps: float = 1e-5,
    ):  # fmt: skip
        self.dtype = devices.dtype_of(dtype)
        params = np.dtype(np.float64 if dtype == "float64" else np.float32)
        n, c = shape[:2]
        self.x = (rng.normal(size=shape) + offset).astype(self.dtype)
        self.dy, ddx = ((rng.normal(size=shape) + mean).astype(self.dtype) for _ in range(2))
        self.weight, self.bias = (
            rng.normal(size=(n, c) if which in per_sample else c).astype(params) if which in affine else None
            for which in "wb"
        )
        gradients = (None if p is None else rng.normal(size=p.shape).astype(params) for p in (self.weight, self.bias))
        self.given = [
            None if which in missing else gradient
            for which, gradient in zip("xwb", (ddx, *gradients), strict=True)
        ]  # fmt: skip
        self.running = None if training else (rng.normal(size=c).astype(params), (rng.random(c) + 0.5).astype(params))
        self.eps = eps

    def forward(self, array: Callable[[Any], Any] = lambda a: a) -> Any:
        options = {} if self.running is None else {
            "running_mean": array(self.running[0]), "running_var": array(self.running[1]), "use_input_stats": False
        }  # fmt: skip
        weight, bias = (None if p is None else array(p) for p in (self.weight, self.bias))
        return cn.instance_norm_forward(array(self.x), weight, bias, eps=self.eps, **options)[1]

    def results(self, backend: Backend) -> tuple[Any, ...]:
        """Return the results as the backend's arrays."""
        given = [None if a is None else backend.array(a) for a in self.given]
        return cn.instance_norm_double_backward(*given, backend.array(self.dy), self.forward(backend.array))

    def on(self, backend: Backend) -> list[Any]:
        return [None if a is None else backend.host(a) for a in self.results(backend)]

    @property
    def exact(self) -> tuple[np.ndarray, ...]:
        return reference.double_backward(*self.given, self.dy, self.x, self.weight, eps=self.eps, running=self.running)


#: affine, per_sample, missing: which of weight and bias are given, which are (N, C), which gradients are None.
ARGUMENTS = [
    ("", "", ""), ("wb", "", ""), ("wb", "wb", ""), ("w", "w", "x"), ("wb", "", "x"), ("wb", "b", "w"), ("b", "", ""),
    ("wb", "w", "wb"), ("w", "", "w"), ("b", "", "x"), ("wb", "", "xw"), ("wb", "", "b"),
]  # fmt: skip
SHAPES = [(4, 3, 7), (1, 2, 5, 7), (4, 3, 4, 5), (1, 3, 3, 4, 5), (4, 2, 2, 3, 4)]


@pairwise(arguments=ARGUMENTS, shape=SHAPES, training=[True, False])
def test_finite_differences(
    backend: Backend, rng: np.random.Generator, shape: Any, arguments: tuple[str, str, str], training: bool
) -> None:
    """Along random directions: the loss is <ddx, dx> + <ddweight, dweight> + <ddbias, dbias> of the backward."""
    affine, per_sample, missing = arguments
    call = Call(rng, shape, affine=affine, per_sample=per_sample, missing=missing, training=training)
    ddy, dx, dweight = call.on(backend)

    def loss(dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None) -> Any:
        gradients = reference.backward(dy, x, weight, bias=call.bias, running=call.running)[:3]
        return sum((reference.wide(a) * b).sum() for a, b in zip(call.given, gradients, strict=True) if a is not None)

    at = [call.dy, call.x, call.weight]
    for i, gradient in enumerate((ddy, dx, dweight)):
        if at[i] is None:
            assert gradient is None
            continue
        assert gradient.shape == at[i].shape
        step = 1e-5 * reference.wide(rng.normal(size=gradient.shape))
        sides = [
            loss(*(reference.wide(a) + sign * step if i == j else a for j, a in enumerate(at))) for sign in (1, -1)
        ]
        expected = (gradient * step).sum()
        assert abs((sides[0] - sides[1]) / 2 - expected) <= 1e-7 * np.abs(gradient * step).sum() + 1e-15


@pytest.mark.extras
@on("numpy", "cupy")  # test_arguments compares the emulated kernels with the same formulas
@pairwise(arguments=ARGUMENTS, shape=SHAPES, training=[True, False], dtype=["float32", "float64"])
def test_pytorch(
    backend: Backend, rng: np.random.Generator, dtype: str, shape: Any, arguments: tuple[str, str, str], training: bool
) -> None:
    """torch.autograd.grad of the gradients of torch.nn.functional.instance_norm."""
    torch = required("torch")
    affine, per_sample, missing = arguments
    call = Call(rng, shape, dtype, affine=affine, per_sample=per_sample, missing=missing, training=training)
    results = call.on(backend)

    def leaf(a: np.ndarray | None) -> Any:
        return None if a is None else torch.tensor(a, requires_grad=True)

    x, dy, weight, bias = (leaf(a) for a in (call.x, call.dy, call.weight, call.bias))
    running = (None, None) if call.running is None else tuple(map(torch.tensor, call.running))
    y = torch.nn.functional.instance_norm(x, *running, use_input_stats=training, eps=call.eps)
    for parameter, operation in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:  # by itself: PyTorch's are (C,)
            y = operation(y, parameter.reshape(*parameter.shape, *(1,) * (x.ndim - 2)))
    inputs = [p for p in (x, weight, bias) if p is not None]
    given = [g for g, p in zip(call.given, (x, weight, bias), strict=True) if p is not None]
    gradients = torch.autograd.grad(y, inputs, dy, create_graph=True)
    loss = sum((g * torch.tensor(v)).sum() for g, v in zip(gradients, given, strict=True) if v is not None)
    wanted = [dy, x] if weight is None else [dy, x, weight]
    expected = torch.autograd.grad(loss, wanted, allow_unused=True)
    for actual, theirs in zip(results, expected, strict=False):
        theirs_ = np.zeros_like(actual) if theirs is None else theirs.numpy()
        bound = 10 * reference.TOLERANCE[dtype]  # for their roundings and ours
        assert_within(actual, theirs_, bound * max(1, np.abs(theirs_).max()))


@on("numpy", "compiled", "simt", "cupy")
@pairwise(arguments=ARGUMENTS, training=[True, False], dtype=DTYPES)
def test_arguments(
    backend: Backend, rng: np.random.Generator, dtype: str, arguments: tuple[str, str, str], training: bool
) -> None:
    affine, per_sample, missing = arguments
    call = Call(rng, (3, 5, 6, 7), dtype, affine=affine, per_sample=per_sample, missing=missing, training=training)
    results = call.on(backend)
    for name, actual, exact, like in zip(
        ("ddy", "dx", "dweight"), results, call.exact, (call.x, call.x, call.weight), strict=True
    ):
        if like is None:
            assert actual is None
            continue
        assert (actual.dtype, actual.shape) == (like.dtype, like.shape), name
        bound = reference.TOLERANCE[dtype if name != "dweight" else actual.dtype.name]
        assert_within(actual, exact, bound * max(1, np.abs(exact).max()), name)


@pytest.mark.nightly(simt=lambda given: given["shape"][-1] > 200)  # split planes are among the variants
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 45, 47), (1, 2, 330, 267)], ids=str)
@pytest.mark.parametrize(("offset", "mean"), [(1e4, 0), (0, 1e4), (1e4, 1e4), (0, -1e5)])
def test_offsets_and_means_cost_no_digits(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, offset: float, mean: float
) -> None:
    """The largest plane is cut into tiles, since blocks have an eighth of the usual size."""
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", numpy_path.BLOCK_BYTES // 8)
    call = Call(rng, shape, "float32", offset=offset, mean=mean)
    terms = call.x.size // shape[1]  # summands of each dweight, of deviation 1; their sum may be near 0 by chance
    for actual, exact, least in zip(call.on(backend), call.exact, (0, 0, math.sqrt(terms)), strict=True):
        assert_within(actual, exact, 4e-6 * max(least, np.abs(exact).max()))


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("what", ["dy", "ddx"])
def test_an_outlier_costs_other_elements_no_digits(
    backend: Backend, rng: np.random.Generator, what: str, at: int
) -> None:
    """The plane is cut into tiles, and the mean of the one with the outlier is far from that of the others."""
    backend.pretend(Device("small", (8, 0), 4, 48 * 1024, 2**20))
    x, dy, ddx = rng.normal(size=(3, 1, 1, 60_001)).astype(np.float32)
    if what == "dy":  # in dx, terms of ddx would be larger
        ddx[...] = 0
    (dy if what == "dy" else ddx)[..., at] = 1e5
    one = np.ones(1, np.float32)
    x_, dy_, ddx_, one_ = (backend.array(a) for a in (x, dy, ddx, one))
    _, saved = cn.instance_norm_forward(x_, one_, one_)
    found = cn.instance_norm_double_backward(ddx_, one_, None, dy_, saved)[:2]
    call = reference.Exact(x, one)
    exact, terms = call.double_backward(ddx, one, None, dy), double_terms(call, ddx, dy, 1, 1)
    for name, actual, expected, size in zip(("ddy", "dx"), found, exact[:2], terms[:2], strict=True):
        assert_within(backend.host(actual), expected, 3 * ROUNDING["float32"] * size, name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_large_numbers_in_16_bits(backend: Backend, rng: np.random.Generator, dtype: str, training: bool) -> None:
    """No NaN, and no infinity if the exact number can be stored."""
    call = Call(rng, (2, 3, 40, 40), dtype, training=training)
    call.x, call.dy, call.given[0] = (
        (scale * np.tanh(rng.normal(size=call.x.shape))).astype(call.dtype) for scale in (60000, 40000, 50000)
    )
    call.running = None if training else tuple(np.abs(p) * 1e9 + 1 for p in call.running)
    for actual, exact in zip(call.on(backend), call.exact, strict=True):
        assert np.isfinite(exact).all() and not np.isnan(actual).any()
        fits = np.abs(exact) < LARGEST[actual.dtype.name]
        assert np.isfinite(actual[fits]).all()
        assert np.abs(actual - exact)[fits].max() <= 2 * reference.TOLERANCE[dtype] * np.abs(exact[fits]).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("powers", [(15, 18, 18), (-12, 5, 4), (12, -12, 20), (-15, 0, -10)])
def test_products_do_not_overflow(
    backend: Backend, rng: np.random.Generator, dtype: str, powers: tuple[int, int, int]
) -> None:
    """x, dy and ddx have very different sizes, so their products are out of float32's range."""
    call = Call(rng, (2, 3, 6, 7), dtype, missing="wb", eps=0)
    arrays = [call.x, call.dy, call.given[0]]
    call.x, call.dy, call.given[0] = (
        (a.astype(float) * 10.0**p).astype(call.dtype) for a, p in zip(arrays, powers, strict=True)
    )
    for actual, exact in zip(call.on(backend), call.exact, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            fits = (np.abs(exact) < 1e37) & (np.abs(exact) > 1e-30)
            error = np.abs(actual - exact)[fits]
            assert fits.any() and np.isfinite(error).all()
            assert error.max() <= 2 * reference.TOLERANCE[dtype] * np.abs(exact[fits]).max()


@pytest.mark.parametrize("what", ["x", "dy", "ddx"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_plane(backend: Backend, rng: np.random.Generator, what: str, value: float) -> None:
    call = Call(rng, (3, 4, 9, 11), "float32", per_sample="w")
    array = {"x": call.x, "dy": call.dy, "ddx": call.given[0]}[what]
    clean = call.on(backend)
    array[1, 2, 3, 4] = value
    for name, actual, before in zip(("ddy", "dx", "dweight"), call.on(backend), clean, strict=True):
        struck = np.zeros(actual.shape, bool)
        struck[1, 2] = not (name == "ddy" and what == "dy")  # ddy does not depend on dy
        assert np.isnan(actual[struck]).all() and (actual[~struck] == before[~struck]).all(), name


def test_tracked_eval_ignores_arrays_without_influence(backend: Backend, rng: np.random.Generator) -> None:
    """x and dy would be multiplied by 0; an infinity in ddx reaches its own element only."""
    call = Call(rng, (2, 3, 5, 6), "float32", affine="", missing="wb", training=False)
    call.x[...] = np.nan
    call.dy[...] = np.inf
    call.given[0][1, 1, 1, 1] = np.inf
    ddy, dx, _ = call.on(backend)
    assert (dx == 0).all()
    assert np.isinf(ddy[1, 1, 1, 1]) and np.isinf(ddy).sum() == 1 and not np.isnan(ddy).any()


def test_constant_planes(backend: Backend, rng: np.random.Generator) -> None:
    """With eps their xhat is 0; with eps=0 all results that depend on it are NaN, as in the other passes."""
    for eps in (1e-5, 0):
        call = Call(rng, (2, 3, 5, 6), "float32", eps=eps)
        call.x[0, 1] = 3.7
        ddy, dx, dweight = call.on(backend)
        if eps:
            # dweight's summands are rounded, and cancel in this plane.
            products = np.abs(call.given[0][0, 1] * call.dy[0, 1]).sum() / np.sqrt(eps)
            scales = (np.abs(call.exact[0]).max(), np.abs(call.exact[1]).max(), products)
            for actual, exact, scale in zip((ddy, dx, dweight), call.exact, scales, strict=True):
                assert_within(actual, exact, 5e-6 * scale)
        else:
            assert np.isnan(ddy[0, 1]).all() and np.isnan(dx[0, 1]).all() and np.isnan(dweight[1])
            assert np.isfinite(np.delete(ddy.reshape(6, -1), 1, 0)).all() and np.isfinite(dweight[[0, 2]]).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_empty(backend: Backend, rng: np.random.Generator, shape: Any, dtype: str) -> None:
    ddy, dx, dweight = Call(rng, shape, dtype).on(backend)
    assert ddy.shape == dx.shape == shape and dweight.shape == shape[1:2] and not dweight.any()


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("which", ["x", "dy", "ddx", "all"])
def test_layouts(backend: Backend, rng: np.random.Generator, layout: str, which: str) -> None:
    """Any strides; results are channels-last if x is."""
    call = Call(rng, (2, 8, 5, 6), "float32")
    lay = reference.LAYOUTS[layout]
    call.x = lay(call.x) if which in ("x", "all") else call.x
    call.dy = lay(call.dy) if which in ("dy", "all") else call.dy
    call.given[0] = lay(call.given[0]) if which in ("ddx", "all") else call.given[0]
    results = call.results(backend)
    for actual, exact in zip(results, call.exact, strict=True):
        reference.assert_close(backend.host(actual), exact)
    last = layout == "channels_last" and which in ("x", "all")
    for array in results[:2]:
        assert (array.transpose(0, 2, 3, 1) if last else array).flags.c_contiguous


def test_stride_0(backend: Backend, rng: np.random.Generator) -> None:
    """As in gradients of sums; the results are new arrays with strides of their own."""
    call = Call(rng, (2, 3, 5, 6), "float32")
    call.dy = np.broadcast_to(np.float32(1.5), call.x.shape)
    call.given[0] = np.broadcast_to(call.given[0][:, :, :1], call.x.shape)
    call.given[1] = np.broadcast_to(np.float32(0.5), (3,))
    for actual, exact in zip(call.on(backend), call.exact, strict=True):
        reference.assert_close(actual, exact)


def test_unaffected_by_a_residual(backend: Backend, rng: np.random.Generator) -> None:
    call = Call(rng, (2, 3, 5, 6), "float32")
    x, weight, bias, dy, *given = (backend.array(a) for a in (call.x, call.weight, call.bias, call.dy, *call.given))
    _, saved = cn.instance_norm_forward(x, weight, bias, residual=dy)
    for actual, expected in zip(cn.instance_norm_double_backward(*given, dy, saved), call.on(backend), strict=True):
        assert_equal(backend.host(actual), expected)


def test_arguments_and_saved_are_unchanged(backend: Backend, rng: np.random.Generator) -> None:
    call = Call(rng, (2, 3, 5, 6), "float32")
    x, weight, bias, dy, *given = (backend.array(a) for a in (call.x, call.weight, call.bias, call.dy, *call.given))
    before = [backend.host(a).copy() for a in (x, weight, bias, dy, *given)]
    _, saved = cn.instance_norm_forward(x, weight, bias)
    first, second = (cn.instance_norm_double_backward(*given, dy, saved) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_equal(backend.host(a), backend.host(b))
    for a, b in zip((x, weight, bias, dy, *given), before, strict=True):
        assert_equal(backend.host(a), b)


def test_refusals(backend: Backend, rng: np.random.Generator) -> None:
    def array(*shape: int, dtype: str = "float32") -> Any:
        return backend.array(rng.normal(size=shape).astype(dtype))

    x, dy, w = array(2, 3, 4, 5), array(2, 3, 4, 5), array(3)
    _, saved = cn.instance_norm_forward(x, w, w)
    double = cn.instance_norm_double_backward
    for given, error, message in [
        ((None, None, None, dy, saved), ValueError, "ddx, ddweight and ddbias are all None"),
        ((dy, w, w, dy, (saved,)), TypeError, "saved must be what instance_norm_forward returned, got tuple"),
        ((dy, w, w, None, saved), TypeError, "dy must be a numpy.ndarray or a cupy.ndarray, got builtins.NoneType"),
        ((dy, w, w, array(2, 3, 4, 6), saved), ValueError, "dy has shape (2, 3, 4, 6); needed is the input's"),
        (
            (dy, w, w, array(2, 3, 4, 5, dtype="float64"), saved),
            TypeError,
            "dy has dtype float64; needed is the input's",
        ),
        ((array(2, 3, 20), w, w, dy, saved), ValueError, "ddx has shape (2, 3, 20); needed is the input's"),
        (
            (array(2, 3, 4, 5, dtype="float64"), w, w, dy, saved),
            TypeError,
            "ddx has dtype float64; needed is the input's",
        ),
        (([1.0], w, w, dy, saved), TypeError, "ddx must be a numpy.ndarray or a cupy.ndarray, got builtins.list"),
        ((dy, array(4), w, dy, saved), ValueError, "ddweight has shape (4,)"),
        ((dy, array(2, 3), w, dy, saved), ValueError, "ddweight has shape (2, 3); needed is that of weight, (3,)"),
        ((dy, w, array(2, 3), dy, saved), ValueError, "ddbias has shape (2, 3); needed is that of bias, (3,)"),
        ((dy, array(3, dtype="float64"), w, dy, saved), TypeError, "ddweight has dtype float64"),
        ((dy, w, 1.0, dy, saved), TypeError, "ddbias must be a numpy.ndarray or a cupy.ndarray, got builtins.float"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            double(*given)
    _, plain = cn.instance_norm_forward(x)
    with pytest.raises(ValueError, match="ddweight is given, but the forward had no weight"):
        double(dy, w, None, dy, plain)
    with pytest.raises(ValueError, match="ddbias is given, but the forward had no bias"):
        double(dy, None, w, dy, plain)
    _, fused = cn.instance_norm_forward(x, w, w, activation="relu")
    with pytest.raises(ValueError, match=r"'relu'.* as an operation of its own"):
        double(dy, w, w, dy, fused)
    cn.instance_norm_backward(dy, saved, out=x)
    with pytest.raises(ValueError, match="has been written over"):
        double(dy, w, w, dy, saved)


def _gradient_penalty() -> Callable[..., tuple[Any, ...]]:
    """Return the function that docs/guide/second_derivatives.md shows."""
    names: dict[str, Any] = {"cn": cn}
    exec(pages.block(pages.DOCS / "guide" / "second_derivatives.md", "def gradient_penalty"), names)
    return names["gradient_penalty"]


def _critic(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return x, w, gamma, beta, v with no element near the kink of leaky_relu."""
    while True:
        x, w, gamma, beta, v = (rng.normal(size=shape) for shape in ((3, 4, 7), (5, 4), (5,), (5,), (5,)))
        if np.abs(cn.instance_norm(w @ x, weight=gamma, bias=beta)).min() > 1e-3:
            return x, w, gamma, beta, 0.2 * v


def test_gradient_penalty(backend: Backend, rng: np.random.Generator) -> None:
    """The documentation's function, against central differences for every parameter."""
    function = _gradient_penalty()
    x, *parameters = _critic(rng)
    w, gamma, beta, v = parameters
    penalty, dw, dgamma, dv = (backend.host(a) for a in function(*map(backend.array, (x, *parameters))))

    # The penalty is that of the critic's gradient.
    def critic(x: np.ndarray) -> np.ndarray:
        z = reference.forward(w @ x, gamma, beta, activation="leaky_relu", negative_slope=0.2)
        return (z * v[:, None]).sum((1, 2))

    units = np.eye(x[0].size).reshape(-1, *x.shape[1:]) * 1e-6
    slopes = np.array([critic(x + unit) - critic(x - unit) for unit in units]) / 2e-6
    lengths = np.sqrt((slopes**2).sum(0) + 1e-12)  # 0 if all of each channel is on one side of the kink
    assert_allclose(penalty, ((lengths - 1) ** 2).mean(), rtol=1e-6)
    for place, gradient in ((0, dw), (1, dgamma), (3, dv)):
        for index in np.ndindex(gradient.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [p.copy() for p in parameters]
                moved[place][index] += step
                sides.append(float(function(*map(backend.array, (x, *moved)))[0]))
            assert abs((sides[0] - sides[1]) / 2e-6 - gradient[index]) <= 1e-6 * max(1, np.abs(gradient).max())


@pytest.mark.full(simt=lambda given: True)
def test_gradient_descent_lowers_the_penalty(backend: Backend, rng: np.random.Generator) -> None:
    """In float32, by plain gradient descent."""
    function = _gradient_penalty()
    x, w, gamma, beta, v = _critic(rng)
    gamma += np.copysign(0.5, gamma)  # if all were near 0, a sample could have no gradient to lengthen
    x, w, gamma, beta, v = (backend.array(a.astype(np.float32)) for a in (x, w, gamma, beta, v))
    while float(function(x, w, gamma, beta, v)[0]) < 1:  # far from its minimum
        v *= 2
    penalties = []
    for _ in range(200):
        penalty, dw, dgamma, dv = function(x, w, gamma, beta, v)
        penalties.append(float(penalty))
        step = 0.02 / (1 + float((dw**2).sum() + (dgamma**2).sum() + (dv**2).sum()) ** 0.5)
        w -= step * dw
        gamma -= step * dgamma
        v -= step * dv
    assert penalties[-1] < 0.5 * penalties[0]


# The CPU backend


@pytest.mark.long
@pairwise(
    layout=["contiguous", "channels_last", "crop"], training=[True, False],
    shape=[(3, 5, 100, 101), (1, 2, 300, 267), (40, 8, 15, 17), (5, 3, 117, 133)],
)  # fmt: skip
def test_same_bits_for_any_number_of_threads(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, layout: str, training: bool
) -> None:
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", numpy_path.BLOCK_BYTES // 8)
    monkeypatch.setattr(numpy_path.NumpyWork, "pays", 1)
    call = Call(rng, shape, "float32", training=training)
    call.x, call.dy, call.given[0] = (reference.LAYOUTS[layout](a) for a in (call.x, call.dy, call.given[0]))
    use_compiled(monkeypatch, False)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(numpy_path, "get_num_threads", lambda threads=threads: threads)
        results.append(cn.instance_norm_double_backward(*call.given, call.dy, call.forward()))
    for one, *others, exact in zip(*results, call.exact, strict=True):
        for other in others:
            assert_equal(one, other)
        assert_within(one, exact, 5e-6 * np.abs(exact).max())


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_peak_memory_is_results_and_a_few_blocks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(numpy_path, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpu, "empty", np.empty)
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", numpy_path.BLOCK_BYTES // 8)
    call = Call(rng, (2, 8, 350, 400), dtype)
    saved = call.forward()
    peak = peak_of(lambda: cn.instance_norm_double_backward(*call.given, call.dy, saved))
    assert peak <= 2 * call.x.nbytes + 8 * numpy_path.BLOCK_BYTES
