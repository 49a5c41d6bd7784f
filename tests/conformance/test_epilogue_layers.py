"""Layers with epilogues on every backend: arguments of a call, their gradients, refusals, copies."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import Bits, bits
from helpers.epilogues import ACTIVATIONS, OTHER_DTYPES, SHAPE, SLOPE, Inputs
from helpers.reference import assert_close

import cupynorm as cn

pytestmark = OTHER_DTYPES


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
