"""Epilogues on every backend: activation, residual, parameters for each sample; their gradients; layers with them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.backends import Backend, on
from helpers.compare import BFLOAT16, Bits, assert_allclose, assert_equal, assert_same, bits
from helpers.optional import required
from helpers.pairwise import pairwise
from helpers.reference import LAYOUTS, assert_close

import cupynorm as cn
from cupynorm.cpu import numpy_path

#: Each dtype has kernels of its own. (test_cases.py's table has every activation.)
pytestmark = pytest.mark.full(simt=lambda given: not _float32(given))


def _float32(given: dict[str, Any]) -> bool:
    return str(given.get("dtype", "float32")) == "float32"


SHAPE = 2, 3, 4, 5
DTYPES = [*map(np.dtype, ("float16", "float32", "float64")), BFLOAT16]
ACTIVATIONS = None, "relu", "leaky_relu", "silu", "gelu"
SLOPE = 0.2
#: Shapes of weight and bias.
AFFINE: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "channels": ((3,), (3,)),
    "samples": ((2, 3), (2, 3)),
    "samples, channels": ((2, 3), (3,)),
    "channels, samples": ((3,), (2, 3)),
    "no weight, samples": (None, (2, 3)),
    "samples, no bias": ((2, 3), None),
}


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (rng.standard_normal(shape) * 2 + 1).astype(dtype)


class Inputs:
    """Host arrays of one call. No z is so near to a kink that rounding could change its side."""

    def __init__(
        self,
        rng: np.random.Generator,
        shape: tuple[int, ...] = SHAPE,
        dtype: Any = np.float32,
        affine: str = "samples, channels",
        with_residual: bool = True,
        activation: str | None = None,
        training: bool = True,
    ):
        self.options = {"activation": activation, "negative_slope": SLOPE}
        while True:
            self.x, self.dy, residual = (normal(rng, shape, dtype) for _ in range(3))
            self.weight, self.bias = (
                None if s is None else rng.uniform(0.5, 1.5, s).astype(dtype) * rng.choice([-1, 1], s).astype(dtype)
                for s in AFFINE[affine]
            )
            self.residual = residual if with_residual else None
            self.running = normal(rng, shape[1:2], dtype), rng.uniform(0.5, 2, shape[1]).astype(dtype)
            self.exact = {"running": None if training else self.running, "residual": self.residual}
            z = reference.before_activation(self.x, self.weight, self.bias, **self.exact)
            if np.abs(z).min() > 1e-3:
                return

    def forward(self, backend: Backend, **other: Any) -> tuple[Any, cn.Saved]:
        x, weight, bias, residual = (
            None if a is None else backend.array(a) for a in (self.x, self.weight, self.bias, self.residual)
        )
        if self.exact["running"] is not None:
            mean, var = (backend.array(a.copy()) for a in self.running)
            other |= {"running_mean": mean, "running_var": var, "use_input_stats": False}
        return cn.instance_norm_forward(x, weight, bias, residual=residual, **self.options, **other)

    def expected(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return y, and [dx, dweight, dbias, dresidual]."""
        y = reference.forward(self.x, self.weight, self.bias, **self.exact, **self.options)
        gradients = reference.backward(self.dy, self.x, self.weight, bias=self.bias, **self.exact, **self.options)
        return y, list(gradients)


# Against the formulas


@pairwise(activation=ACTIVATIONS, with_residual=[True, False], affine=[*AFFINE], training=[True, False], dtype=DTYPES)
def test_every_epilogue(
    backend: Backend,
    rng: np.random.Generator,
    activation: Any,
    with_residual: bool,
    affine: str,
    training: bool,
    dtype: Any,
) -> None:
    inputs = Inputs(rng, SHAPE, dtype, affine, with_residual, activation, training)
    exact_y, exact = inputs.expected()
    y, saved = inputs.forward(backend)
    results = cn.instance_norm_backward(backend.array(inputs.dy), saved)
    assert y.dtype == dtype
    assert_close(backend.host(y), exact_y)
    assert len(results) == 3 + with_residual
    given = (inputs.x, inputs.weight, inputs.bias, inputs.residual)
    for ours, expected, of in zip(results, exact, given, strict=False):
        if of is None:
            assert ours is None
        else:
            assert (ours.shape, ours.dtype) == (of.shape, of.dtype)
            # Twice the bound, since sums of roundings are included.
            assert_close(backend.host(ours), expected, factor=2, terms=inputs.x.size // ours.size)


@pytest.mark.extras
@on("numpy", "cupy")  # test_every_epilogue compares the others with the same formulas
@pairwise(
    activation=ACTIVATIONS, with_residual=[True, False], affine=["none", "channels", "samples", "channels, samples"],
    training=[True, False], dtype=["float32", "float64"],
)  # fmt: skip
def test_unfused_composition_in_torch(
    backend: Backend,
    rng: np.random.Generator,
    activation: Any,
    with_residual: bool,
    affine: str,
    training: bool,
    dtype: str,
) -> None:
    torch = required("torch")
    inputs = Inputs(rng, SHAPE, dtype, affine, with_residual, activation, training)
    hosts = inputs.x, inputs.weight, inputs.bias, inputs.residual
    leaves = [None if a is None else torch.from_numpy(a.copy()).requires_grad_() for a in hosts]
    x, weight, bias, residual = leaves
    running = (None, None) if training else map(torch.from_numpy, inputs.running)
    z = torch.nn.functional.instance_norm(x, *running, use_input_stats=training)
    if weight is not None:
        z = z * weight[..., None, None]
    if bias is not None:
        z = z + bias[..., None, None]
    if residual is not None:
        z = z + residual
    functions = torch.nn.functional
    y = {
        None: lambda: z,
        "relu": lambda: functions.relu(z),
        "leaky_relu": lambda: functions.leaky_relu(z, SLOPE),
        "silu": lambda: functions.silu(z),
        "gelu": lambda: functions.gelu(z),
    }[activation]()
    y.backward(torch.from_numpy(inputs.dy))

    ours, saved = inputs.forward(backend)
    assert_close(backend.host(ours), y.detach().numpy(), factor=2)
    results = cn.instance_norm_backward(backend.array(inputs.dy), saved)
    for gradient, leaf in zip(results, leaves, strict=False):
        if leaf is not None:
            assert_close(backend.host(gradient), leaf.grad.numpy(), factor=4, terms=inputs.x.size // gradient.size)


@pytest.mark.full(simt=lambda given: True)  # in float64
@pairwise(activation=ACTIVATIONS, affine=["channels", "samples"], training=[True, False])
def test_finite_differences(
    backend: Backend, rng: np.random.Generator, activation: Any, affine: str, training: bool
) -> None:
    inputs = Inputs(rng, SHAPE, np.float64, affine, True, activation, training)
    _, saved = inputs.forward(backend)
    gradients = cn.instance_norm_backward(backend.array(inputs.dy), saved)
    h = 1e-6  # keeps z on its side of a kink
    for name, gradient in zip(("x", "weight", "bias", "residual"), gradients, strict=True):
        u = rng.standard_normal(gradient.shape)
        u /= np.abs(u).max()
        ends = []
        for step in (h, -h):
            moved = copy.copy(inputs)
            setattr(moved, name, getattr(inputs, name) + step * u)
            ends.append((reference.wide(backend.host(moved.forward(backend)[0])) * inputs.dy).sum())
        slope = float(ends[0] - ends[1]) / (2 * h)
        assert_allclose(float((backend.host(gradient) * u).sum()), slope, rtol=1e-6, atol=1e-6)


def grid(rng: np.random.Generator, dtype: Any) -> np.ndarray:
    ends = np.concatenate([np.linspace(-40, 40, 4001), rng.standard_normal(4000) * 3, [0.0, -0.0, 1e-30, -1e-30]])
    return ends.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_values_of_an_activation(backend: Backend, rng: np.random.Generator, activation: str, dtype: str) -> None:
    """z is x, since the running statistics are 0 and 1. Errors are a few roundings of z, and none of 1 for small z."""
    z = grid(rng, dtype)
    mean, var, dy = (backend.array(np.full(s, v, dtype)) for s, v in (((1,), 0), ((1,), 1), ((1, 1, z.size), 1)))
    y, saved = cn.instance_norm_forward(
        backend.array(z[None, None]), running_mean=mean, running_var=var, use_input_stats=False, eps=0,
        activation=activation, negative_slope=SLOPE,
    )  # fmt: skip
    dx, *_ = cn.instance_norm_backward(dy, saved)
    rounding = float(np.finfo(dtype).eps) / 2
    error = np.abs(backend.host(y)[0, 0] - reference.activate(z, activation, SLOPE))
    assert (error <= 4 * rounding * np.abs(z)).all(), (error / rounding).max()
    error = np.abs(backend.host(dx)[0, 0] - reference.slope(z, activation, SLOPE))
    assert error.max() <= 8 * rounding, (error / rounding).max()


def test_tail_of_gelu(rng: np.random.Generator) -> None:
    """The NumPy path's Phi against math.erfc: the error is relative to the result, even if that is tiny."""
    for dtype, bound in ((np.float32, 1e-5), (np.float64, 1e-12)):
        z = rng.uniform(-12, 0, 4000).astype(dtype)
        one = np.ones(1, dtype)
        y = cn.instance_norm(z[None, None], 0 * one, one, use_input_stats=False, eps=0, activation="gelu")[0, 0]
        exact = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in z.tolist()])
        assert_allclose(y, exact, rtol=bound, atol=1e-40)


# Unusual values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_backward_has_the_mask_of_forward(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Some elements are above their plane's mean by less than its rounding."""
    step = 2.0**-10 if dtype == "float32" else 2.0**-39
    half = rng.integers(-3, 4, (2, 3, 300)).astype(dtype)
    x = np.concatenate([half, -half, np.zeros((2, 3, 9), dtype)], 2)
    x[:, :, 0] -= step
    x = (1e4 + rng.permuted(x, axis=2)).reshape(2, 3, 21, 29)
    assert x.dtype == dtype
    zero, ones = backend.array(np.zeros(x.shape, dtype)), backend.array(np.ones(x.shape, dtype))
    y, saved = cn.instance_norm_forward(backend.array(x), activation="relu", residual=zero)
    *_, g = cn.instance_norm_backward(ones, saved)
    y = backend.host(y)
    assert ((y > 0) & (y < 1e-5)).sum((2, 3)).min() >= 9  # the elements in question
    assert_equal(backend.host(g), y > 0)
    assert_close(y, reference.forward(x, activation="relu"))


@pytest.mark.parametrize("shape", [(2, 3, 24, 25), (3, 2, 5)])
@pytest.mark.parametrize("affine", ["none", "samples, channels"])
def test_the_mask_at_offsets(backend: Backend, rng: np.random.Generator, shape: Any, affine: str) -> None:
    host, residual = (rng.standard_normal(shape) + 1e4).astype(np.float32), normal(rng, shape)
    weight, bias = (None if s is None else normal(rng, shape[: len(s)] if len(s) == 2 else shape[1:2])
                    for s in AFFINE[affine])  # fmt: skip
    parameters = [None if a is None else backend.array(a) for a in (weight, bias)]
    y, saved = cn.instance_norm_forward(
        backend.array(host), *parameters, activation="relu", residual=backend.array(residual)
    )
    *_, g = cn.instance_norm_backward(backend.array(np.ones(shape, np.float32)), saved)
    assert_equal(backend.host(g), backend.host(y) > 0)
    assert_close(backend.host(y), reference.forward(host, weight, bias, activation="relu", residual=residual))


def test_the_mask_of_a_plane_in_tiles(rng: np.random.Generator) -> None:
    """On NumPy, whose blocks hold 65536 elements."""
    host = (rng.integers(-2, 3, (1, 2, 300, 301)) + 1e4).astype(np.float32)
    y, saved = cn.instance_norm_forward(host, activation="relu", residual=np.zeros_like(host))
    *_, g = cn.instance_norm_backward(np.ones_like(host), saved)
    assert_equal(g, y > 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_z_of_exactly_zero(backend: Backend, rng: np.random.Generator, activation: Any) -> None:
    """A constant plane, with residuals that are zero of either sign."""
    x = np.full(SHAPE, 1234.5, np.float32)
    residual = np.zeros(SHAPE, np.float32) * rng.choice(np.array([-1, 1], np.float32), SHAPE)
    y, saved = cn.instance_norm_forward(
        backend.array(x), activation=activation, negative_slope=SLOPE, residual=backend.array(residual)
    )
    assert_equal(backend.host(y), 0)
    dy = normal(rng, SHAPE)
    *_, g = cn.instance_norm_backward(backend.array(dy), saved)
    slope = {None: 1, "relu": 0, "leaky_relu": SLOPE, "silu": 0.5, "gelu": 0.5}[activation]
    assert_equal(backend.host(g), dy * np.float32(slope))


@pairwise(activation=ACTIVATIONS[1:], dtype=DTYPES)
def test_huge_z(backend: Backend, rng: np.random.Generator, activation: str, dtype: Any) -> None:
    """No overflow in between, no warning, no NaN; gradients are those of the asymptotes."""
    huge = {"float16": 6e4, "float64": 1e308}.get(dtype.name, 3e38)
    sign = rng.choice([-1, 1], SHAPE)
    residual = (sign * huge).astype(dtype)
    x, dy = normal(rng, SHAPE, dtype), normal(rng, SHAPE, dtype)
    y, saved = cn.instance_norm_forward(
        backend.array(x), activation=activation, negative_slope=0.5, residual=backend.array(residual)
    )
    falls = 0.5 if activation == "leaky_relu" else 0
    assert_close(backend.host(y) / residual, np.where(sign > 0, 1, falls))
    dx, *_, g = cn.instance_norm_backward(backend.array(dy), saved)
    assert_close(backend.host(g), dy * np.where(sign > 0, 1, falls))
    assert np.isfinite(backend.host(dx).astype(float)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_stay_in_their_plane(backend: Backend, rng: np.random.Generator, activation: Any) -> None:
    inputs = Inputs(rng, affine="samples", activation=activation)
    y, saved = inputs.forward(backend)
    clean = [y, *cn.instance_norm_backward(backend.array(inputs.dy), saved)]
    inputs.x[0, 1, 2, 3], inputs.x[1, 2, 0, 0] = np.nan, -np.inf
    y, saved = inputs.forward(backend)
    spoilt = [y, *cn.instance_norm_backward(backend.array(inputs.dy), saved)]
    good = np.ones((2, 3), bool)
    good[0, 1] = good[1, 2] = False
    for name, before, after in zip(("y", "dx", "dweight", "dbias", "g"), clean, spoilt, strict=True):
        assert_same(backend.host(before)[good], backend.host(after)[good], name)
        if name in ("y", "dx", "dweight"):
            assert np.isnan(backend.host(after)[~good]).all(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_of_a_residual_stay_where_they_are(
    backend: Backend, rng: np.random.Generator, activation: Any
) -> None:
    inputs = Inputs(rng, activation=activation)
    clean, _ = inputs.forward(backend)
    inputs.residual[0, 1, 2, 3], inputs.residual[1, 2, 0, 0], inputs.residual[1, 0, 3, 4] = np.nan, -np.inf, np.inf
    y = backend.host(inputs.forward(backend)[0])
    same = np.isfinite(inputs.residual)
    assert_same(y[same], backend.host(clean)[same])
    assert np.isnan(y[0, 1, 2, 3])
    assert y[1, 0, 3, 4] == np.inf
    if activation in (None, "relu", "leaky_relu"):
        assert y[1, 2, 0, 0] == (0 if activation == "relu" else -np.inf)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_relu_ignores_dy_where_it_is_flat(backend: Backend, rng: np.random.Generator, value: float) -> None:
    inputs = Inputs(rng, activation="relu")
    y, saved = inputs.forward(backend)
    flat = backend.host(y) == 0
    dy = np.where(flat, np.float32(value), inputs.dy)
    results = cn.instance_norm_backward(backend.array(dy), saved)
    expected = cn.instance_norm_backward(backend.array(np.where(flat, np.float32(0), inputs.dy)), saved)
    assert flat.any()
    for ours, theirs in zip(results, expected, strict=True):
        assert_equal(backend.host(ours), backend.host(theirs))


@pytest.mark.parametrize("slope", [0, 1, 1.5, -0.5, np.float32(0.25)])
def test_negative_slopes(backend: Backend, rng: np.random.Generator, slope: Any) -> None:
    inputs = Inputs(rng, activation="leaky_relu")
    inputs.options["negative_slope"] = slope
    exact_y, exact = inputs.expected()
    y, saved = inputs.forward(backend)
    assert_close(backend.host(y), exact_y)
    for ours, expected in zip(cn.instance_norm_backward(backend.array(inputs.dy), saved), exact, strict=True):
        assert_close(backend.host(ours), expected, factor=2, terms=inputs.x.size // ours.size)


@pairwise(activation=ACTIVATIONS, training=[True, False], shape=[(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
def test_empty_input(backend: Backend, shape: Any, training: bool, activation: Any) -> None:
    n, c = shape[:2]
    x, residual = (backend.array(np.zeros(shape, np.float32)) for _ in range(2))
    weight, bias, mean, var = (backend.array(np.ones(s, np.float32)) for s in ((n, c), (c,), (c,), (c,)))
    y, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, use_input_stats=training, activation=activation,
        residual=residual,
    )  # fmt: skip
    dx, dweight, dbias, dresidual = cn.instance_norm_backward(y, saved)
    assert y.shape == dx.shape == dresidual.shape == shape
    assert_equal(backend.host(dweight), np.zeros((n, c), np.float32), strict=True)
    assert_equal(backend.host(dbias), np.zeros(c, np.float32), strict=True)
    assert bits(mean, var) == bits(np.ones(c, np.float32)) * 2


# Saved arrays and statistics


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_saved_has_no_new_arrays_except_statistics(
    backend: Backend, rng: np.random.Generator, activation: Any, training: bool
) -> None:
    inputs = Inputs(rng, activation=activation, training=training)
    x, weight, bias, residual = map(backend.array, (inputs.x, inputs.weight, inputs.bias, inputs.residual))
    running = [backend.array(a.copy()) for a in inputs.running]
    _, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=running[0], running_var=running[1], use_input_stats=training,
        activation=activation, residual=residual,
    )  # fmt: skip
    assert saved.x is x
    assert saved.residual is (None if activation is None else residual)
    assert saved.with_residual
    assert saved.mean.shape == saved.rstd.shape == (2, 3)
    if not training:
        assert saved.mean_lo is None
    else:
        assert (saved.mean_lo.shape, saved.mean_lo.dtype) == ((2, 3), np.float32)
        mean = reference.wide(backend.host(saved.mean)) + reference.wide(backend.host(saved.mean_lo))
        assert_allclose(mean, reference.statistics(inputs.x)[0], rtol=0, atol=1e-6)
    y, saved = cn.instance_norm_forward(x)
    assert (saved.residual, saved.with_residual) == (None, False)
    assert saved.mean_lo is not None
    assert len(cn.instance_norm_backward(y, saved)) == 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_epilogues_do_not_change_running_statistics(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    x = backend.array((rng.standard_normal((3, 2, 24, 25)) + 1e4).astype(dtype))
    moved = []
    for options in ({}, {"activation": "relu", "residual": x}):
        running = [backend.array(np.array(v, dtype)) for v in ([0, 1], [2, 3])]
        cn.instance_norm(x, *running, momentum=0.25, **options)
        moved.append(bits(*running))
    assert moved[0] == moved[1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_instance_norm_give_the_same_bits(
    backend: Backend, rng: np.random.Generator, activation: Any
) -> None:
    inputs = Inputs(rng, activation=activation)
    y, _ = inputs.forward(backend)
    x, weight, bias, residual = map(backend.array, (inputs.x, inputs.weight, inputs.bias, inputs.residual))
    again = cn.instance_norm(x, None, None, weight, bias, residual=residual, **inputs.options)
    assert bits(y) == bits(again)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_saved_may_be_used_again(backend: Backend, rng: np.random.Generator, activation: Any) -> None:
    inputs = Inputs(rng, activation=activation)
    _, saved = inputs.forward(backend)
    dy, other = backend.array(inputs.dy), backend.array(normal(rng, SHAPE))
    first, _, again = (cn.instance_norm_backward(g, saved) for g in (dy, other, dy))
    assert bits(*first) == bits(*again)


# Layouts and out


@pytest.mark.full(simt=lambda given: "channels_last" in (given["input_layout"], given["layout"]))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "crop"])
def test_residuals_of_every_layout(backend: Backend, rng: np.random.Generator, input_layout: str, layout: str) -> None:
    inputs = Inputs(rng, activation="relu")
    exact_y, exact = inputs.expected()
    inputs.x, inputs.residual = LAYOUTS[input_layout](inputs.x), LAYOUTS[layout](inputs.residual)
    y, saved = inputs.forward(backend)
    assert_close(backend.host(y), exact_y)
    for ours, expected in zip(cn.instance_norm_backward(backend.array(inputs.dy), saved), exact, strict=True):
        assert_close(backend.host(ours), expected, factor=2, terms=inputs.x.size // ours.size)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_expanded_residual_and_dy(backend: Backend, rng: np.random.Generator, activation: Any) -> None:
    inputs = Inputs(rng, activation=activation)
    inputs.residual = inputs.exact["residual"] = np.broadcast_to(inputs.residual[:, :1, :1, :1], SHAPE)
    inputs.dy = np.broadcast_to(np.float32(1.5), SHAPE)
    exact_y, exact = inputs.expected()
    y, saved = inputs.forward(backend)
    assert_close(backend.host(y), exact_y)
    for ours, expected in zip(cn.instance_norm_backward(backend.array(inputs.dy), saved), exact, strict=True):
        assert_close(backend.host(ours), expected, factor=2, terms=inputs.x.size // ours.size)


def test_parameters_at_odd_addresses(backend: Backend, rng: np.random.Generator) -> None:
    if backend.name == "cupy":
        pytest.skip("CuPy itself cannot read such arrays")
    inputs = Inputs(rng, activation="relu")
    exact_y, exact = inputs.expected()
    for name in ("weight", "bias"):
        given = getattr(inputs, name)
        odd = np.frombuffer(b"-" + given.tobytes(), np.uint8)[1:].view(given.dtype).reshape(given.shape)
        assert odd.flags.c_contiguous and not odd.flags.aligned
        setattr(inputs, name, odd)
    y, saved = inputs.forward(backend)
    assert_close(backend.host(y), exact_y)
    for ours, expected in zip(cn.instance_norm_backward(backend.array(inputs.dy), saved), exact, strict=True):
        assert_close(backend.host(ours), expected, factor=2, terms=inputs.x.size // ours.size)


def test_strided_parameters_of_samples(backend: Backend, rng: np.random.Generator) -> None:
    inputs = Inputs(rng, affine="samples", activation="relu")
    exact_y, exact = inputs.expected()
    inputs.weight = np.asfortranarray(inputs.weight)
    inputs.bias = np.repeat(inputs.bias, 2, 1)[:, ::2]
    y, saved = inputs.forward(backend)
    assert_close(backend.host(y), exact_y)
    for ours, expected in zip(cn.instance_norm_backward(backend.array(inputs.dy), saved), exact, strict=True):
        assert_close(backend.host(ours), expected, factor=2, terms=inputs.x.size // ours.size)


@pytest.mark.full(simt=lambda given: given["layout"] == "channels_last")
@pairwise(activation=ACTIVATIONS, training=[True, False], layout=["contiguous", "channels_last", "crop"])
def test_out_may_be_any_of_the_inputs(
    backend: Backend, rng: np.random.Generator, activation: Any, training: bool, layout: str
) -> None:
    inputs = Inputs(rng, activation=activation, training=training)
    inputs.x, inputs.residual, inputs.dy = map(LAYOUTS[layout], (inputs.x, inputs.residual, inputs.dy))
    y, saved = inputs.forward(backend)
    expected = bits(y)
    gradients = bits(*cn.instance_norm_backward(backend.array(inputs.dy), saved))
    weight, bias = backend.array(inputs.weight), backend.array(inputs.bias)
    mean, var = (backend.array(a.copy()) for a in inputs.running)
    options = {**inputs.options, "running_mean": mean, "running_var": var, "use_input_stats": training, "momentum": 0}
    for of_forward, of_backward in itertools.product(("", "x", "residual"), ("", "dy", "x", "residual")):
        arrays = {n: backend.array(LAYOUTS[layout](getattr(inputs, n).copy())) for n in ("x", "residual", "dy")}
        out = arrays.get(of_forward)
        y, saved = cn.instance_norm_forward(
            arrays["x"], weight, bias, residual=arrays["residual"], out=out, **options
        )  # fmt: skip
        assert bits(y) == expected
        gone = of_forward == "x" or (of_forward == "residual" and activation is not None)
        assert saved.overwritten == gone
        if gone:
            before = bits(*arrays.values())
            with pytest.raises(ValueError, match="written over"):
                cn.instance_norm_backward(arrays["dy"], saved)
            assert bits(*arrays.values()) == before
            continue
        out = arrays.get(of_backward)
        results = cn.instance_norm_backward(arrays["dy"], saved, out=out)
        assert out is None or results[0] is out
        assert bits(*results) == gradients
        assert saved.overwritten == (of_backward == "x" or (of_backward == "residual" and activation is not None))
        if activation is None:
            assert (results[3] is arrays["dy"]) == (of_backward != "dy")


def test_the_input_may_be_its_own_residual(backend: Backend, rng: np.random.Generator) -> None:
    host = normal(rng, SHAPE)
    expected = reference.forward(host, activation="relu", residual=host)
    x = backend.array(host.copy())
    assert_close(backend.host(cn.instance_norm(x, activation="relu", residual=x)), expected)
    assert cn.instance_norm(x, activation="relu", residual=x, out=x) is x
    assert_close(backend.host(x), expected)


def test_out_that_overlaps_is_refused(backend: Backend, rng: np.random.Generator) -> None:
    base, x = backend.array(normal(rng, (4, 6, 7, 6))), backend.array(normal(rng, SHAPE))
    residual, out = base[:2, :3, :4, :5], base[:2, :3, :4, 1:]
    running = [backend.array(np.ones(3, np.float32)) for _ in range(2)]
    before = bits(base, x, *running)
    for activation in (None, "relu"):
        with pytest.raises(ValueError, match="out overlaps residual"):
            cn.instance_norm(x, *running, activation=activation, residual=residual, out=out)
    _, saved = cn.instance_norm_forward(x, activation="relu", residual=residual)
    with pytest.raises(ValueError, match="out overlaps residual"):
        cn.instance_norm_backward(x, saved, out=out)
    inside = base[1:2, 0, 0, :6].reshape(2, 3)
    target = base[:2, :3, :4, :5]
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=f"out overlaps {name}"):
            cn.instance_norm(x, *running, **{name: inside}, out=target)
        _, saved = cn.instance_norm_forward(x, **{name: inside}, activation="relu")
        with pytest.raises(ValueError, match=f"out overlaps {name}"):
            cn.instance_norm_backward(x, saved, out=target)
    assert bits(base, x, *running) == before


# Refusals


def test_refused_arguments_change_nothing(backend: Backend, rng: np.random.Generator) -> None:
    x, out, residual = (backend.array(normal(rng, SHAPE)) for _ in range(3))
    running = [backend.array(np.ones(3, np.float32)) for _ in range(2)]
    before = bits(x, out, residual, *running)
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        *((ValueError, "activation must be None or one of relu, leaky_relu, silu, gelu", {"activation": a})
          for a in ("ReLU", "", "tanh", "gelu_tanh")),
        *((TypeError, "activation must be None or one of", {"activation": a})
          for a in (True, 1, b"relu", ["relu"], np.ones(2), np.maximum)),
        *((ValueError, "negative_slope must be finite", {"negative_slope": s}) for s in (math.nan, math.inf)),
        *((TypeError, "negative_slope must be a number", {"negative_slope": s}) for s in ("0.1", None, True, 1j, [1])),
        *((ValueError, r"residual has shape .*needed is the input's, \(2, 3, 4, 5\)", {"residual": residual[index]})
          for index in (0, np.s_[:1], np.s_[:, :1], np.s_[..., :4], np.s_[..., None])),
        (TypeError, "residual has dtype float64; needed is the input's, float32",
         {"residual": residual.astype(np.float64)}),
        *((TypeError, r"^residual must be .*cupy\.asarray", {"residual": r}) for r in (1.0, [[1.0]], "x")),
    ]  # fmt: skip
    for error, match, arguments in bad:
        for call in (cn.instance_norm, cn.instance_norm_forward):
            with pytest.raises(error, match=match):
                call(x, running_mean=running[0], running_var=running[1], **arguments, out=out)
    assert bits(x, out, residual, *running) == before


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(2,), (1, 3), (3, 2), (2, 1), (2, 3, 1), (6,), ()])
def test_parameters_of_other_shapes(backend: Backend, rng: np.random.Generator, name: str, shape: Any) -> None:
    x = backend.array(normal(rng, SHAPE))
    arrays = {"running_mean": np.ones(3, np.float32), "running_var": np.ones(3, np.float32)}
    arrays = {key: backend.array(a) for key, a in {**arrays, name: np.ones(shape, np.float32)}.items()}
    before = bits(*arrays.values())
    needed = r"\(3,\)$" if name.startswith("running") else r"\(3,\) or \(2, 3\)$"
    with pytest.raises(ValueError, match=f"{name} has shape .*needed is {needed}"):
        cn.instance_norm(x, **arrays)
    assert bits(*arrays.values()) == before


def test_running_statistics_of_samples_are_refused(backend: Backend, rng: np.random.Generator) -> None:
    x, ones, both = (backend.array(normal(rng, s)) for s in (SHAPE, (3,), (2, 3)))
    for pair in ((ones, both), (both, ones)):
        with pytest.raises(ValueError, match=r"running_.* has shape \(2, 3\)"):
            cn.instance_norm(x, *pair)


@pytest.mark.gpu
def test_residual_on_another_device(rng: np.random.Generator) -> None:
    import cupy

    host = normal(rng, SHAPE)
    for x, residual in ((host, cupy.asarray(host)), (cupy.asarray(host), host)):
        with pytest.raises(ValueError, match="residual is on"):
            cn.instance_norm(x, residual=residual)


# The NumPy path's blocks, tiles and memory


@pairwise(
    shape=[(1, 2, 110, 111), (1, 2, 3, 1, 4000), (3, 20, 1, 501), (2501, 2, 2), (2, 2501, 2)], training=[True, False],
    activation=["leaky_relu", "gelu"],
)  # fmt: skip
def test_numpy_blocks_of_every_kind(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, training: bool, activation: str
) -> None:
    """With blocks of an eighth of the usual size."""
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", numpy_path.BLOCK_BYTES // 8)
    n, c = shape[:2]
    x, dy, residual, weight, bias = (normal(rng, s, np.float64) for s in (shape, shape, shape, (n, c), (c,)))
    running = normal(rng, (c,), np.float64), rng.uniform(0.5, 2, c)
    y, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=running[0].copy(), running_var=running[1].copy(), use_input_stats=training,
        activation=activation, residual=residual,
    )  # fmt: skip
    exact = {"running": None if training else running, "activation": activation, "residual": residual}

    def close(actual: np.ndarray, expected: np.ndarray) -> None:
        expected = expected.astype(np.float64)
        assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())

    close(y, reference.forward(x, weight, bias, **exact))
    expected = reference.backward(dy, x, weight, bias=bias, **exact)
    results = cn.instance_norm_backward(dy, saved)
    for ours, theirs in zip(results, expected, strict=True):
        close(ours, theirs)
    cn.instance_norm_backward(dy, saved, out=residual)
    assert_same(residual, results[0])


# Layers


@pytest.mark.parametrize("mode", ["training", "tracked eval"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [*itertools.chain(*(itertools.combinations(("weight", "bias", "residual"), k)
                                                     for k in range(4)))], ids=str)  # fmt: skip
def test_layer_with_arguments_of_a_call(
    backend: Backend, rng: np.random.Generator, given: tuple[str, ...], batched: bool, mode: str
) -> None:
    """backward returns dx, and the gradients of all given arguments in the order weight, bias, residual."""
    shape = (2, 3, 4, 5) if batched else (1, 3, 4, 5)
    shapes = {"weight": (2, 3) if batched else (3,), "bias": (3,), "residual": shape}
    while True:
        inputs = Inputs(rng, shape, affine="none", with_residual=False)
        running = None if mode == "training" else inputs.running
        values = {name: normal(rng, shapes[name]) for name in given}
        weight, bias, residual = map(values.get, ("weight", "bias", "residual"))
        if np.abs(reference.before_activation(inputs.x, weight, bias, running=running, residual=residual)).min() > 1e-3:
            break
    layer = cn.InstanceNorm2d(3, track_running_stats=True, device=backend.device, activation="relu").train(
        mode == "training"
    )
    if running is not None:
        layer.running_mean[...], layer.running_var[...] = map(backend.array, running)
    arrays = {name: backend.array(a if batched or name != "residual" else a[0]) for name, a in values.items()}
    x, dy = (backend.array(a if batched else a[0]) for a in (inputs.x, inputs.dy))
    y = layer(x, **arrays)
    assert y.shape == x.shape
    exact = {"running": running, "activation": "relu", "residual": residual}
    expected = reference.forward(inputs.x, weight, bias, **exact)
    assert_close(backend.host(y), expected if batched else expected[0], factor=2)
    dx, dweight, dbias, g = reference.backward(inputs.dy, inputs.x, weight, bias=bias, **exact)
    if not batched:
        dx, g = dx[0], g[0]
    wanted = [dx, *({"weight": dweight, "bias": dbias, "residual": g}[name] for name in given)]
    for out in (None, backend.array(np.zeros(x.shape, np.float32))):
        results = layer.backward(dy, out=out)
        if not given:
            results = (results,)
        assert type(results) is tuple and len(results) == len(wanted)
        assert out is None or results[0] is out
        for ours, theirs in zip(results, wanted, strict=True):
            assert_close(backend.host(ours), theirs, factor=4)
    assert list(layer.params()) == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_affine_layer(backend: Backend, rng: np.random.Generator, activation: Any) -> None:
    inputs = Inputs(rng, affine="channels", activation=activation)
    layer = cn.InstanceNorm2d(3, affine=True, device=backend.device, **inputs.options)
    assert (layer.activation, layer.negative_slope) == (activation, SLOPE)
    layer.weight.data, layer.bias.data = backend.array(inputs.weight), backend.array(inputs.bias)
    y, (dx, dweight, dbias, g) = inputs.expected()
    assert_close(backend.host(layer.forward(backend.array(inputs.x), residual=backend.array(inputs.residual))), y)
    ours, dresidual = layer.backward(backend.array(inputs.dy))
    for actual, expected in zip((ours, layer.weight.grad, layer.bias.grad, dresidual), (dx, dweight, dbias, g),
                                strict=True):  # fmt: skip
        assert_close(backend.host(actual), expected, factor=2)


def test_parameters_of_an_unbatched_input(backend: Backend, rng: np.random.Generator) -> None:
    layer = cn.InstanceNorm2d(3, device=backend.device)
    x, weight = backend.array(normal(rng, (3, 4, 5))), backend.array(normal(rng, (3,)))
    y = layer(x, weight=weight)
    dx, dweight = layer.backward(y)
    again = layer(x, weight=weight[None])
    other = layer.backward(y)
    assert bits(y, dx, dweight[None]) == bits(again, *other)
    assert (dweight.shape, other[1].shape) == ((3,), (1, 3))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3\).*needed is \(3,\) or \(1, 3\)"):
        layer(x, weight=backend.array(np.ones((2, 3), np.float32)))


def test_dresidual_is_dy_without_an_activation(backend: Backend, rng: np.random.Generator) -> None:
    layer = cn.InstanceNorm2d(3, device=backend.device)
    x, residual, dy = (backend.array(normal(rng, SHAPE)) for _ in range(3))
    layer(x, residual=residual)
    dx, dresidual = layer.backward(dy)
    assert dresidual is dy
    y, saved = cn.instance_norm_forward(x, residual=residual)
    assert saved.residual is None
    assert cn.instance_norm_backward(dy, saved, out=y)[3] is dy
    assert cn.instance_norm_forward(x, residual=residual, activation="relu")[1].residual is residual
    before, expected = bits(dy), bits(dx)
    same, dresidual = layer.backward(dy, out=dy)
    assert same is dy
    assert bits(dresidual, dy) == before + expected


def test_refusals_of_a_layer(backend: Backend, rng: np.random.Generator) -> None:
    for error, arguments in (
        (ValueError, {"activation": "tanh"}),
        (TypeError, {"activation": 1}),
        (ValueError, {"negative_slope": math.nan}),
        (TypeError, {"negative_slope": None}),
    ):
        with pytest.raises(error, match=next(iter(arguments))):
            cn.InstanceNorm2d(3, device=backend.device, **arguments)
    x, three = backend.array(normal(rng, SHAPE)), backend.array(np.ones(3, np.float32))
    full = cn.InstanceNorm2d(3, affine=True, bias=False, track_running_stats=True, device=backend.device)
    out = backend.array(np.full(SHAPE, 5, np.float32))
    full.forward(x)
    before = bits(full.running_mean, full.running_var, out)
    for arguments in ({"weight": three}, {"bias": three}, {"weight": three, "bias": three}):
        with pytest.raises(ValueError, match=r"weight and bias of a call.*affine=False"):
            full(x, **arguments, out=out)
    for residual in (x[0], x[:1], x[None], x[..., :2]):
        with pytest.raises(ValueError, match=r"residual has shape .*\(2, 3, 4, 5\)"):
            full(x, residual=residual, out=out)
    with pytest.raises(ValueError, match=r"residual has shape .*\(3, 4, 5\)"):
        full(x[0], residual=x[:1])
    with pytest.raises(TypeError, match=r"^residual must be"):
        full(x, residual=1.0, out=out)
    plain = cn.InstanceNorm2d(3, device=backend.device)
    with pytest.raises(TypeError, match=r"^weight must be"):
        plain(x, weight=1.0, out=out)
    assert bits(full.running_mean, full.running_var, out) == before
    assert full.backward(x).shape == SHAPE  # for the forward before, which is still saved


def test_copies_and_state_of_a_layer_with_an_activation(rng: np.random.Generator) -> None:
    layer = cn.InstanceNorm2d(3, affine=True, device="cpu", activation="leaky_relu", negative_slope=SLOPE)
    plain = cn.InstanceNorm2d(3, affine=True, device="cpu")
    assert repr(layer) == repr(plain)[:-1] + ", activation='leaky_relu', negative_slope=0.2)"
    assert repr(cn.InstanceNorm2d(3, affine=True, device="cpu", activation="relu")).endswith(", activation='relu')")
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer.load_state_dict(plain.state_dict())
    x = normal(rng, SHAPE)
    expected = Bits(layer(x))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(copied) == repr(layer)
        assert Bits(copied(x)) == expected
