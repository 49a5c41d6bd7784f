"""PyTorch's behaviour, rows 1 to 13 of docs/reference/semantics.md: shapes, dtypes, arguments."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import BFLOAT16, assert_equal
from helpers.layers import LAYERS, contents, held
from helpers.optional import imported
from helpers.reference import assert_close
from helpers.semantics import SHAPES, full_layer, refused, torch_layer

import cupynorm as cn

torch = imported("torch")

pytestmark = pytest.mark.extras


# Shape


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ranks(backend: Backend, rng: np.random.Generator, rank: int) -> None:
    layer = LAYERS[rank](3, device=backend.device)
    host = normal(rng, SHAPES[rank])
    batched = backend.host(layer.forward(backend.array(host)))
    assert_close(batched, reference.forward(host))
    unbatched = backend.host(layer.forward(backend.array(host[1])))
    assert unbatched.shape == host.shape[1:]
    assert_close(unbatched, reference.forward(host[1:])[0])
    for ndim in (rank, rank + 3):
        message = f"expected {rank + 1}D or {rank + 2}D input (got {ndim}D input)"
        x = np.ones((3,) * ndim, np.float32)
        with pytest.raises(ValueError, match="expected") as info:
            layer.forward(backend.array(x))
        assert str(info.value) == message
        if torch:
            with pytest.raises(ValueError, match="expected") as info:
                torch_layer(rank, 3)(torch.from_numpy(x))
            assert str(info.value) == message


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 3), (2, 2, 2, 3, 2), (1, 2, 2, 1, 3, 2)])
def test_function_takes_any_rank_from_3(backend: Backend, rng: np.random.Generator, shape: Any) -> None:
    host = normal(rng, shape)
    assert_close(backend.host(cn.instance_norm(backend.array(host))), reference.forward(host))
    flat = backend.array(host.reshape(shape[0], -1))
    with refused(ValueError, "at least 3 dimensions", flat):
        cn.instance_norm(flat)


def test_wrong_channel_count_with_affine(backend: Backend) -> None:
    layer = full_layer(backend)
    for shape, axis in (((2, 4, 5, 5), 1), ((4, 5, 5), 0)):
        message = rf"expected input's size at dim={axis} to match num_features \(3\), but got: 4\."
        x = np.ones(shape, np.float32)
        with refused(ValueError, f"^{message}$", layer):
            layer.forward(backend.array(x))
        if torch:
            with pytest.raises(ValueError, match=message):
                torch_layer(2, 3, affine=True)(torch.from_numpy(x))


def test_wrong_channel_count_without_affine(backend: Backend, rng: np.random.Generator) -> None:
    layer = cn.InstanceNorm2d(3, device=backend.device)
    for host, batch in ((normal(rng, (2, 4, 3, 3)), slice(None)), (normal(rng, (4, 3, 3)), 0)):
        with pytest.warns(UserWarning, match="num_features") as caught:
            y = layer.forward(backend.array(host))
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert_close(backend.host(y), reference.forward(host.reshape(-1, *host.shape[-3:]))[batch])
    with warnings.catch_warnings():  # the right count is silent
        warnings.simplefilter("error")
        layer.forward(backend.array(normal(rng, (2, 3, 3, 3))))


@pytest.mark.parametrize("training", [True, False])
def test_wrong_channel_count_with_running_statistics(backend: Backend, training: bool) -> None:
    layer = cn.InstanceNorm2d(3, track_running_stats=True, device=backend.device).train(training)
    x = backend.array(np.ones((2, 4, 5, 5), np.float32))
    with refused(ValueError, "running_mean", layer, x):
        layer.forward(x)


def test_one_spatial_element(backend: Backend, rng: np.random.Generator) -> None:
    message = r"Expected more than 1 spatial element when training, got input size .*{}, 3, 1, 1"
    for n in (2, 0):
        host = normal(rng, (n, 3, 1, 1))
        x = backend.array(host)
        untracked = cn.InstanceNorm2d(3, device=backend.device)
        tracked = full_layer(backend)
        for layer in (untracked, tracked):
            with refused(ValueError, message.format(n), layer, x):
                layer.forward(x)
        with refused(ValueError, message.format(n), x):
            untracked.eval().forward(x)
        with refused(ValueError, message.format(n), x):
            cn.instance_norm(x)
        if torch:
            with pytest.raises(ValueError, match=message.format(n)):
                torch_layer(2, 3)(torch.from_numpy(host))
    with refused(ValueError, message.format(1)):
        untracked.forward(backend.array(normal(rng, (3, 1, 1))))


def test_one_spatial_element_in_tracked_eval(backend: Backend, rng: np.random.Generator) -> None:
    layer = full_layer(backend).eval()
    host = normal(rng, (2, 3, 1, 1))
    y = backend.host(layer.forward(backend.array(host)))
    parameters = [np.array([1.5, -0.5, 2]), np.array([0.25, 1, -3])]
    running = np.array([1, 2, 0.5]), np.array([3, 0.5, 1])
    assert_close(y, reference.forward(host, *parameters, running=running))


def check_empty(backend: Backend, shape: tuple[int, ...], training: bool) -> None:
    """Empty results, zero gradients, nothing else changed."""
    c = shape[1]
    layer = cn.InstanceNorm2d(c, affine=True, track_running_stats=True, device=backend.device).train(training)
    before = contents(layer)
    y = layer.forward(backend.array(np.zeros(shape, np.float32)))
    assert (y.shape, y.dtype) == (shape, np.float32)
    assert contents(layer) == before
    dx = layer.backward(y)
    assert (dx.shape, dx.dtype) == (shape, np.float32)
    for parameter in layer.params():
        assert_equal(backend.host(parameter.grad), np.zeros(c, np.float32), strict=True)
    half = backend.array(np.zeros(shape, np.float16))
    assert cn.instance_norm(half).shape == shape
    assert cn.instance_norm(half, out=half) is half


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(backend: Backend, training: bool) -> None:
    check_empty(backend, (0, 3, 4, 5), training)
    if torch:
        assert torch_layer(2, 3).train(training)(torch.zeros(0, 3, 4, 5)).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 4, 5), (0, 0, 0, 0)])
def test_empty_planes_and_no_channels(backend: Backend, shape: Any, training: bool) -> None:
    check_empty(backend, shape, training)
    if torch and shape[1]:
        theirs = torch_layer(2, 3, affine=True, track_running_stats=True).train(training)
        x = torch.zeros(shape, requires_grad=True)
        theirs(x).sum().backward()
        assert x.grad.shape == shape
        assert theirs.weight.grad.tolist() == theirs.bias.grad.tolist() == theirs.running_mean.tolist() == [0, 0, 0]


# Dtype


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint16", "bool", "complex64", "complex128", ">f4"])
def test_unsupported_dtypes(backend: Backend, dtype: str) -> None:
    if backend.name == "cupy" and dtype == ">f4":
        pytest.skip("CuPy has no arrays of foreign byte order")
    layer = full_layer(backend)
    x = backend.array(np.ones((2, 3, 4, 5), dtype))
    match = f"{dtype}.*float16, bfloat16, float32, float64"
    for call in (layer.forward, cn.instance_norm, cn.instance_norm_forward):
        with refused(TypeError, match, layer, x):
            call(x)
    x = backend.array(np.ones((2, 3, 4, 5), np.float32))
    layer.forward(x)
    dy = backend.array(np.ones((2, 3, 4, 5), dtype))
    with refused(TypeError, f"dy.*{dtype}.*float32", layer, dy):
        layer.backward(dy)


@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_16_bit_input_with_float32_parameters(backend: Backend, rng: np.random.Generator, dtype: Any) -> None:
    layer = full_layer(backend)
    x, dy = normal(rng, (2, 3, 4, 5), dtype), normal(rng, (2, 3, 4, 5), dtype)
    weight, bias = backend.host(layer.weight.data), backend.host(layer.bias.data)
    layer.cleargrads()
    y = layer.forward(backend.array(x))
    dx = layer.backward(backend.array(dy))
    assert y.dtype == dx.dtype == dtype
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == np.float32
    assert layer.running_mean.dtype == layer.running_var.dtype == np.float32
    assert_close(backend.host(y), reference.forward(x, weight, bias))
    expected = reference.backward(dy, x, weight)[:3]
    for ours, exact in zip((dx, layer.weight.grad, layer.bias.grad), expected, strict=True):
        assert_close(backend.host(ours), exact)
    if torch:
        kind = torch.bfloat16 if dtype == BFLOAT16 else torch.float16
        tx = torch.from_numpy(x.astype(np.float32)).to(kind).requires_grad_()
        theirs = torch.nn.functional.instance_norm(tx, weight=torch.from_numpy(weight), bias=torch.from_numpy(bias))
        assert theirs.dtype == kind
        assert_close(backend.host(y), theirs.detach().float().numpy())


@pytest.mark.parametrize("dtype", [*map(np.dtype, ("float16", "float32", "float64")), BFLOAT16], ids=str)
def test_layer_of_one_dtype(backend: Backend, rng: np.random.Generator, dtype: Any) -> None:
    layer = full_layer(backend, dtype=dtype)
    x, dy = normal(rng, (2, 3, 4, 5), dtype), normal(rng, (2, 3, 4, 5), dtype)
    weight, bias, *running = (
        backend.host(a).copy() for a in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var)
    )
    layer.cleargrads()
    y = layer.forward(backend.array(x))
    dx = layer.backward(backend.array(dy))
    for array in (y, dx, *held(layer).values()):
        assert array.dtype == (np.int64 if array.ndim == 0 else dtype)
    assert_close(backend.host(y), reference.forward(x, weight, bias))
    gradients = dx, layer.weight.grad, layer.bias.grad
    for ours, exact in zip(gradients, reference.backward(dy, x, weight)[:3], strict=True):
        assert_close(backend.host(ours), exact, terms=x.size // ours.size)
    statistics = layer.running_mean, layer.running_var
    for ours, exact in zip(statistics, reference.moved(*running, x, 0.1), strict=True):
        assert_close(backend.host(ours), exact)


@pytest.mark.parametrize(
    ("input_dtype", "parameter_dtype"),
    [
        ("float64", "float32"),
        ("float32", "float64"),
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("bfloat16", "float16"),
        ("float16", "float64"),
        ("float32", "int32"),
    ],
)
def test_mixed_dtypes_are_refused(backend: Backend, input_dtype: str, parameter_dtype: str) -> None:
    x = backend.array(np.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(input_dtype))
    other = backend.array(np.ones(3, parameter_dtype))
    fitting = backend.array(np.ones(3, input_dtype))
    match = f"dtype {parameter_dtype}.*{input_dtype}"
    for name in ("weight", "bias"):
        with refused(TypeError, f"{name}.*{match}", x, other):
            cn.instance_norm(x, **{name: other})
    for pair in ((other, fitting), (fitting, other)):
        with refused(TypeError, f"running_.*{match}", x, other, fitting):
            cn.instance_norm(x, *pair)
    if parameter_dtype != "int32":
        layer = full_layer(backend, rank=1, dtype=parameter_dtype)
        with refused(TypeError, match, layer, x):
            layer.forward(x)
    assert "float32 for float16 and bfloat16" in inspect.getdoc(cn.instance_norm)  # the choice is documented


# Arguments


def test_signatures() -> None:
    empty = inspect.Parameter.empty
    constructor = {
        "num_features": empty,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": False,
        "track_running_stats": False,
        "device": None,
        "dtype": None,
    }
    function = {
        "input": empty,
        "running_mean": None,
        "running_var": None,
        "weight": None,
        "bias": None,
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    epilogue = {"activation": None, "negative_slope": 0.01}
    convention = {"ddof": 0, "eps_mode": "variance"}
    keywords = (
        {"bias": True, **epilogue, **convention, "comm": None},
        {
            **epilogue,
            "residual": None,
            "out": None,
            "moments": None,
            "mask": None,
            "lengths": None,
            "dtype": None,
            **convention,
        },
    )
    for target, expected, keyword in [*((layer, constructor, keywords[0]) for layer in LAYERS.values()),
                                      (cn.instance_norm, function, keywords[1])]:  # fmt: skip
        parameters = inspect.signature(target).parameters
        assert [(p.name, p.default) for p in parameters.values()] == list((expected | keyword).items())
        kinds = {p.name: p.kind for p in parameters.values()}
        assert {kinds.pop(name) for name in keyword} == {inspect.Parameter.KEYWORD_ONLY}
        assert set(kinds.values()) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if torch:
        theirs = inspect.signature(torch.nn.functional.instance_norm).parameters
        assert list(theirs) == list(function)
        theirs = inspect.signature(torch.nn.InstanceNorm2d).parameters
        assert [name for name in theirs if name != "bias"] == list(constructor)


def test_function_refuses_momentum_none(backend: Backend) -> None:
    arrays = [backend.array(np.arange(n, dtype=np.float32)) for n in (24, 3, 3)]
    arrays[0] = arrays[0].reshape(2, 3, 4)
    with refused(TypeError, "momentum", *arrays):
        cn.instance_norm(*arrays, momentum=None)


def test_running_mean_and_var_go_together(backend: Backend) -> None:
    x = backend.array(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    running = backend.array(np.full(3, 2, np.float32))
    with refused(ValueError, "running_mean and running_var.*running_var is None", x, running):
        cn.instance_norm(x, running)
    with refused(ValueError, "running_mean and running_var.*running_mean is None", x, running):
        cn.instance_norm(x, None, running)
    with refused(ValueError, "use_input_stats", x):
        cn.instance_norm(x, use_input_stats=False)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(2,), (4,), (1,), (), (1, 3), (3, 1)])
def test_wrong_sizes(backend: Backend, name: str, shape: Any) -> None:
    x = backend.array(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    arrays = {key: backend.array(np.ones(3, np.float32)) for key in ("weight", "bias", "running_mean", "running_var")}
    arrays[name] = backend.array(np.ones(shape, np.float32))
    with refused(ValueError, rf"{name}.*\({', '.join(map(str, shape))},?\).*3", x, *arrays.values()):
        cn.instance_norm(x, **arrays)


def test_bias_without_weight(backend: Backend, rng: np.random.Generator) -> None:
    host, dy, bias = normal(rng, (2, 3, 50)), normal(rng, (2, 3, 50)), normal(rng, (3,))
    y, saved = cn.instance_norm_forward(backend.array(host), None, backend.array(bias))
    assert_close(backend.host(y), reference.forward(host, None, bias))
    dx, dweight, dbias = cn.instance_norm_backward(backend.array(dy), saved)
    exact = reference.backward(dy, host)
    assert dweight is None
    assert_close(backend.host(dx), exact[0])
    assert_close(backend.host(dbias), exact[2], terms=100)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bad_constructor_arguments(rank: int) -> None:
    layer = LAYERS[rank]
    for eps in (-1e-5, float("nan"), float("inf"), np.float32("nan")):
        with pytest.raises(ValueError, match="eps"):
            layer(3, eps=eps)
        with pytest.raises(ValueError, match="eps"):
            cn.instance_norm(np.ones((2, 3, 4), np.float32), eps=eps)
    for eps in ("1e-5", None, 1j, [1e-5], True):
        with pytest.raises(TypeError, match="eps"):
            layer(3, eps=eps)
    with pytest.raises(ValueError, match="num_features"):
        layer(-1)
    for count in (3.0, "3", None, True, 2.5, [3]):
        with pytest.raises(TypeError, match="num_features"):
            layer(count)
    for good in (np.int64(3), 3):
        assert layer(good, eps=0, device="cpu").num_features == 3
    for momentum in ("0.1", [0.1], 1j):
        with pytest.raises(TypeError, match="momentum"):
            layer(3, momentum=momentum)
    with pytest.raises(ValueError, match="momentum"):
        layer(3, momentum=float("nan"))
