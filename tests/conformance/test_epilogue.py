"""Epilogues on every backend: activation, residual, parameters for each sample; their gradients; unusual values."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend, on
from helpers.compare import BFLOAT16, assert_allclose, assert_equal, assert_same, bits
from helpers.epilogues import ACTIVATIONS, AFFINE, OTHER_DTYPES, SHAPE, SLOPE, Inputs
from helpers.optional import required
from helpers.pairwise import pairwise
from helpers.reference import assert_close

import cupynorm as cn
from cupynorm.cpu import numpy_path

pytestmark = OTHER_DTYPES

DTYPES = [*map(np.dtype, ("float16", "float32", "float64")), BFLOAT16]


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
