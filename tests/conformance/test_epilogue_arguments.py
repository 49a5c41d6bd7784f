"""Residuals and parameters of epilogues on every backend: layouts, `out`, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import bits
from helpers.epilogues import ACTIVATIONS, OTHER_DTYPES, SHAPE, Inputs
from helpers.pairwise import pairwise
from helpers.reference import LAYOUTS, assert_close

import cupynorm as cn

pytestmark = OTHER_DTYPES

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
