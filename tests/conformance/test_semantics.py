"""PyTorch's behaviour, which the library follows on every backend: the rows of docs/reference/semantics.md.

If PyTorch is installed, the tests check it as well, and so the expectations themselves.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.backends import Backend
from helpers.compare import BFLOAT16, Bits, assert_allclose, assert_equal, assert_same
from helpers.optional import imported
from helpers.reference import assert_close

import cupynorm as cn

torch = imported("torch")

pytestmark = pytest.mark.extras

LAYERS = {1: cn.InstanceNorm1d, 2: cn.InstanceNorm2d, 3: cn.InstanceNorm3d}
SHAPES = {1: (2, 3, 6), 2: (2, 3, 4, 5), 3: (2, 3, 2, 3, 2)}


def torch_layer(rank: int, *args: Any, **kwargs: Any) -> Any:
    return getattr(torch.nn, f"InstanceNorm{rank}d")(*args, **kwargs)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (rng.standard_normal(shape) * 2 + 1).astype(dtype)


def held(layer: Any) -> dict[str, Any]:
    """Every array of a layer, by name."""
    arrays = {name: getattr(layer, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    for name, parameter in layer.namedparams():
        arrays |= {name: parameter.data, f"{name}.grad": parameter.grad}
    return {name: array for name, array in arrays.items() if array is not None}


def contents(*things: Any) -> list[Any]:
    """The identity and the contents of arrays, and of everything that a layer holds."""
    found = []
    for thing in things:
        for name, array in (held(thing) if isinstance(thing, tuple(LAYERS.values())) else {"": thing}).items():
            found.append((name, id(array), Bits(array)))
    return found


@contextmanager
def refused(backend: Backend, error: type[Exception], match: str, *things: Any) -> Iterator[None]:
    """Assert that the block raises, and leaves these arrays and layers unchanged."""
    before = contents(*things)
    with pytest.raises(error, match=match):
        yield
    assert contents(*things) == before


def full_layer(backend: Backend, rank: int = 2, **kwargs: Any) -> Any:
    """An affine, tracking layer whose state and gradients all differ from their initial values."""
    layer = LAYERS[rank](3, affine=True, track_running_stats=True, device=backend.device, **kwargs)
    layer.weight.data = backend.array(np.array([1.5, -0.5, 2], layer.weight.dtype))
    if layer.bias is not None:
        layer.bias.data = backend.array(np.array([0.25, 1, -3], layer.bias.dtype))
    layer.running_mean[...] = backend.array(np.array([1, 2, 0.5], layer.running_mean.dtype))
    layer.running_var[...] = backend.array(np.array([3, 0.5, 1], layer.running_var.dtype))
    for number, parameter in enumerate(layer.params()):
        parameter.grad = backend.array(np.full(3, 0.5 + number, parameter.dtype))
    return layer


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
    with refused(backend, ValueError, "at least 3 dimensions", flat):
        cn.instance_norm(flat)


def test_wrong_channel_count_with_affine(backend: Backend) -> None:
    layer = full_layer(backend)
    for shape, axis in (((2, 4, 5, 5), 1), ((4, 5, 5), 0)):
        message = rf"expected input's size at dim={axis} to match num_features \(3\), but got: 4\."
        x = np.ones(shape, np.float32)
        with refused(backend, ValueError, f"^{message}$", layer):
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
    with refused(backend, ValueError, "running_mean", layer, x):
        layer.forward(x)


def test_one_spatial_element(backend: Backend, rng: np.random.Generator) -> None:
    message = r"Expected more than 1 spatial element when training, got input size .*{}, 3, 1, 1"
    for n in (2, 0):
        host = normal(rng, (n, 3, 1, 1))
        x = backend.array(host)
        untracked = cn.InstanceNorm2d(3, device=backend.device)
        tracked = full_layer(backend)
        for layer in (untracked, tracked):
            with refused(backend, ValueError, message.format(n), layer, x):
                layer.forward(x)
        with refused(backend, ValueError, message.format(n), x):
            untracked.eval().forward(x)
        with refused(backend, ValueError, message.format(n), x):
            cn.instance_norm(x)
        if torch:
            with pytest.raises(ValueError, match=message.format(n)):
                torch_layer(2, 3)(torch.from_numpy(host))
    with refused(backend, ValueError, message.format(1)):
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
        with refused(backend, TypeError, match, layer, x):
            call(x)
    x = backend.array(np.ones((2, 3, 4, 5), np.float32))
    layer.forward(x)
    dy = backend.array(np.ones((2, 3, 4, 5), dtype))
    with refused(backend, TypeError, f"dy.*{dtype}.*float32", layer, dy):
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
        with refused(backend, TypeError, f"{name}.*{match}", x, other):
            cn.instance_norm(x, **{name: other})
    for pair in ((other, fitting), (fitting, other)):
        with refused(backend, TypeError, f"running_.*{match}", x, other, fitting):
            cn.instance_norm(x, *pair)
    if parameter_dtype != "int32":
        layer = full_layer(backend, rank=1, dtype=parameter_dtype)
        with refused(backend, TypeError, match, layer, x):
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
    with refused(backend, TypeError, "momentum", *arrays):
        cn.instance_norm(*arrays, momentum=None)


def test_running_mean_and_var_go_together(backend: Backend) -> None:
    x = backend.array(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    running = backend.array(np.full(3, 2, np.float32))
    with refused(backend, ValueError, "running_mean and running_var.*running_var is None", x, running):
        cn.instance_norm(x, running)
    with refused(backend, ValueError, "running_mean and running_var.*running_mean is None", x, running):
        cn.instance_norm(x, None, running)
    with refused(backend, ValueError, "use_input_stats", x):
        cn.instance_norm(x, use_input_stats=False)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(2,), (4,), (1,), (), (1, 3), (3, 1)])
def test_wrong_sizes(backend: Backend, name: str, shape: Any) -> None:
    x = backend.array(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    arrays = {key: backend.array(np.ones(3, np.float32)) for key in ("weight", "bias", "running_mean", "running_var")}
    arrays[name] = backend.array(np.ones(shape, np.float32))
    with refused(backend, ValueError, rf"{name}.*\({', '.join(map(str, shape))},?\).*3", x, *arrays.values()):
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


# Statistics


@pytest.mark.parametrize("momentum", [0.1, 0.75, 1, np.float32(0.25)])
@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (1, 3, 4, 5), (2, 3, 1, 2)])
def test_running_statistics(backend: Backend, rng: np.random.Generator, shape: Any, momentum: Any) -> None:
    layer = cn.InstanceNorm2d(3, momentum=momentum, track_running_stats=True, device=backend.device)
    running = np.zeros(3), np.ones(3)
    theirs = torch_layer(2, 3, momentum=float(momentum), track_running_stats=True) if torch else None
    for _ in range(3):
        host = normal(rng, shape)
        y = layer.forward(backend.array(host))
        assert_close(backend.host(y), reference.forward(host))  # by the biased variance
        running = reference.moved(*running, host, float(momentum))  # by the unbiased variance
        assert_close(backend.host(layer.running_mean), running[0])
        assert_close(backend.host(layer.running_var), running[1])
        if theirs:
            theirs(torch.from_numpy(host))
            assert_close(backend.host(layer.running_mean), theirs.running_mean.numpy())
            assert_close(backend.host(layer.running_var), theirs.running_var.numpy())
    host = normal(rng, shape)
    y = layer.eval().forward(backend.array(host))
    assert_close(backend.host(y), reference.forward(host, running=running), np.float32)


@pytest.mark.parametrize("momentum", [None, 0, 0.0])
def test_no_momentum(backend: Backend, rng: np.random.Generator, momentum: Any) -> None:
    layer = full_layer(backend, momentum=momentum)
    before = contents(layer)
    host = normal(rng, (2, 3, 4, 5))
    layer.forward(backend.array(host))
    assert contents(layer) == before
    bad = host.copy()
    bad[0, 0, 0, 0] = np.inf  # 0 times this would be NaN
    layer.forward(backend.array(bad))
    assert contents(layer) == before
    if torch:
        theirs = torch_layer(2, 3, momentum=momentum, track_running_stats=True)
        theirs(torch.from_numpy(host))
        assert theirs.running_mean.tolist() == [0, 0, 0]
        assert theirs.num_batches_tracked.item() == 0


@pytest.mark.parametrize("momentum", [None, 0, 0.1])
def test_batches_are_not_counted(backend: Backend, rng: np.random.Generator, momentum: Any) -> None:
    layer = cn.InstanceNorm1d(3, momentum=momentum, track_running_stats=True, device=backend.device)
    counter = layer.num_batches_tracked
    for _ in range(2):
        layer.forward(backend.array(normal(rng, (2, 3, 4))))
    assert layer.num_batches_tracked is counter
    assert counter.dtype == np.int64
    assert counter.shape == ()
    assert int(counter) == 0


def test_update_is_in_place(backend: Backend, rng: np.random.Generator) -> None:
    layer = full_layer(backend)
    buffers = layer.running_mean, layer.running_var, layer.num_batches_tracked
    before = contents(*buffers[:2])
    layer.forward(backend.array(normal(rng, (2, 3, 4, 5))))
    assert [id(a) for a in buffers] == [
        id(a) for a in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    ]
    assert all(old != new for old, new in zip(before, contents(*buffers[:2]), strict=True))

    mean, var = (backend.array(np.ones(3, np.float32)) for _ in range(2))
    host = normal(rng, (2, 3, 4))
    cn.instance_norm(backend.array(host), mean, var)
    exact = reference.moved(np.ones(3), np.ones(3), host, 0.1)
    assert_close(backend.host(mean), exact[0])
    assert_close(backend.host(var), exact[1])


def test_tracked_eval_writes_nothing(backend: Backend, rng: np.random.Generator) -> None:
    layer = full_layer(backend).eval()
    running = backend.host(layer.running_mean).copy(), backend.host(layer.running_var).copy()
    before = contents(layer)
    host = normal(rng, (2, 3, 4, 5))
    y = backend.host(layer.forward(backend.array(host)))
    assert contents(layer) == before
    weight, bias = backend.host(layer.weight.data), backend.host(layer.bias.data)
    assert_close(y, reference.forward(host, weight, bias, running=running))


def test_untracked_eval_equals_training(backend: Backend, rng: np.random.Generator) -> None:
    x = backend.array(normal(rng, (2, 3, 4, 5)))
    layer = cn.InstanceNorm2d(3, affine=True, device=backend.device)
    trained = backend.host(layer.forward(x))
    evaluated = backend.host(layer.eval().forward(x))
    assert_same(trained, evaluated)


# Numerics and layout


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_plane(
    backend: Backend, rng: np.random.Generator, bad: float, dtype: Any, layout: str
) -> None:
    layer = full_layer(backend)
    host = normal(rng, (2, 3, 4, 5), dtype)
    made = reference.LAYOUTS[layout]
    clean = backend.host(full_layer(backend).forward(backend.array(made(host))))
    poisoned = host.copy()
    poisoned[1, 2, 3, 1] = bad
    y = backend.host(layer.forward(backend.array(made(poisoned)))).copy()
    assert np.isnan(y[1, 2]).all()
    y[1, 2] = clean[1, 2]
    assert_same(y, clean)
    for name in ("running_mean", "running_var"):
        running = backend.host(getattr(layer, name))
        assert np.isfinite(running[:2]).all()
        assert not np.isfinite(running[2])
    if torch:
        theirs = torch.nn.functional.instance_norm(torch.from_numpy(poisoned.astype(np.float32))).numpy()
        assert np.isnan(theirs[1, 2]).all()
        assert np.isnan(theirs).sum() == theirs[1, 2].size


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_backward(backend: Backend, rng: np.random.Generator, bad: float) -> None:
    host, dy = normal(rng, (2, 3, 4, 5)), normal(rng, (2, 3, 4, 5))
    dy[0, 1, 2, 2] = bad
    ones = backend.array(np.ones(3, np.float32))
    _, saved = cn.instance_norm_forward(backend.array(host), ones, ones)
    dx, dweight, dbias = (backend.host(a) for a in cn.instance_norm_backward(backend.array(dy), saved))
    assert not np.isfinite(dx[0, 1]).any()
    assert np.isfinite(dx).sum() == dx.size - dx[0, 1].size
    for gradient in (dweight, dbias):
        assert (np.isfinite(gradient) == [True, False, True]).all()


def test_tracked_eval_is_silent_about_infinity(backend: Backend) -> None:
    host = np.ones((1, 3, 2, 2), np.float16)
    host[0, 0, 0, 0], host[0, 1, 0, 0], host[0, 2] = np.inf, np.nan, 60000
    running = (backend.array(np.array([np.inf, 0, 0], np.float32)), backend.array(np.full(3, 1e-8, np.float32)))
    weight = backend.array(np.array([0, 1, 1], np.float32))
    y = backend.host(cn.instance_norm(backend.array(host), *running, weight, None, False, eps=0))
    assert np.isnan(y[0, 0]).all()
    assert np.isnan(y[0, 1]).tolist() == [[True, False], [False, False]]
    assert np.isinf(y[0, 2]).all()  # over float16's range


@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_layouts(backend: Backend, rng: np.random.Generator, layout: str) -> None:
    host, dy = normal(rng, (2, 3, 4, 5)), normal(rng, (2, 3, 4, 5))
    made = reference.LAYOUTS[layout](host)
    assert_equal(made, host)
    weight, bias = normal(rng, (3,)), normal(rng, (3,))
    y, saved = cn.instance_norm_forward(backend.array(made), backend.array(weight), backend.array(bias))
    assert_close(backend.host(y), reference.forward(host, weight, bias))
    dx, *_ = cn.instance_norm_backward(backend.array(reference.LAYOUTS[layout](dy)), saved)
    assert_close(backend.host(dx), reference.backward(dy, host, weight)[0])
    for result in (y, dx):
        if layout == "channels_last":
            assert result.strides == made.strides
        else:
            assert result.flags.c_contiguous


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("contiguous", "channels-first, read in place"),
        ("channel_slice", "channels-first, read in place"),
        ("batch_slice", "channels-first, read in place"),
        ("channels_last", "channels-last, read in place"),
        ("transposed", "is copied first"),
        ("reversed", "is copied first"),
    ],
)
def test_slices_are_read_in_place(layout: str, said: str) -> None:
    text = cn.explain(reference.LAYOUTS[layout](np.ones((2, 3, 4, 5), np.float32)), device="H100")
    assert text.count(said) == 2, text  # forward and backward


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_expanded_input(backend: Backend, rng: np.random.Generator, axis: int) -> None:
    host = normal(rng, (2, 3, 4, 5))
    host = np.broadcast_to(host.take([0], axis), host.shape)
    assert host.strides[axis] == 0
    assert_close(backend.host(cn.instance_norm(backend.array(host))), reference.forward(host))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop"])
@pytest.mark.parametrize("training", [True, False])
def test_input_is_never_written(backend: Backend, rng: np.random.Generator, layout: str, training: bool) -> None:
    layer = full_layer(backend).train(training)
    x, dy = (backend.array(reference.LAYOUTS[layout](normal(rng, (2, 3, 4, 5)))) for _ in range(2))
    read = [x, dy, layer.weight.data, layer.bias.data]
    before = contents(*read)
    layer.forward(x)
    layer.backward(dy)
    assert contents(*read) == before


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop", "reversed"])
def test_out_may_be_the_input(backend: Backend, rng: np.random.Generator, layout: str) -> None:
    host = normal(rng, (2, 3, 4, 5))
    x = backend.array(reference.LAYOUTS[layout](host))
    assert cn.instance_norm(x, out=x) is x
    assert_close(backend.host(x), reference.forward(host))


# Backward


def test_gradients_accumulate_until_cleared(backend: Backend, rng: np.random.Generator) -> None:
    layer = cn.InstanceNorm2d(3, affine=True, device=backend.device)
    assert layer.weight.grad is layer.bias.grad is None
    total = np.zeros((2, 3))
    for _ in range(3):
        host, dy = normal(rng, (2, 3, 4, 5)), normal(rng, (2, 3, 4, 5))
        layer.forward(backend.array(host))
        dx = layer.backward(backend.array(dy))
        exact = reference.backward(dy, host)
        total = total + exact[1:3]
        assert_close(backend.host(dx), exact[0])
        assert_close(backend.host(layer.weight.grad), total[0], terms=120)
        assert_close(backend.host(layer.bias.grad), total[1], terms=120)
    layer.cleargrads()
    assert layer.weight.grad is layer.bias.grad is None
    layer.backward(backend.array(dy))
    assert_close(backend.host(layer.weight.grad), exact[1], terms=40)


@pytest.mark.parametrize("kind", ["scalar", "batch", "rows", "channels_last", "crop", "reversed", "transposed"])
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_dy(backend: Backend, rng: np.random.Generator, kind: str, training: bool) -> None:
    shape = 2, 3, 4, 5
    expanded = {"scalar": (1, 1, 1, 1), "batch": (1, 3, 4, 5), "rows": (2, 3, 1, 5)}
    if kind in expanded:
        dy = np.broadcast_to(normal(rng, expanded[kind]), shape)
    else:
        dy = reference.LAYOUTS[kind](normal(rng, shape))
    host = normal(rng, shape)
    layer = full_layer(backend).train(training)
    layer.cleargrads()
    running = None
    if not training:
        running = backend.host(layer.running_mean).copy(), backend.host(layer.running_var).copy()
    layer.forward(backend.array(host))
    dx = layer.backward(backend.array(dy))
    exact = reference.backward(dy, host, backend.host(layer.weight.data), running=running)
    for ours, expected in zip((dx, layer.weight.grad, layer.bias.grad), exact[:3], strict=True):
        assert_allclose(backend.host(ours), expected.astype(float), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_backward_agrees_with_torch(backend: Backend, rng: np.random.Generator, training: bool) -> None:
    host, dy = normal(rng, (2, 3, 4, 5)), normal(rng, (2, 3, 4, 5))
    layer = full_layer(backend).train(training)
    layer.cleargrads()
    running = backend.host(layer.running_mean).copy(), backend.host(layer.running_var).copy()
    weight = backend.host(layer.weight.data)
    layer.forward(backend.array(host))
    dx = backend.host(layer.backward(backend.array(dy)))
    exact = reference.backward(dy, host, weight, running=None if training else running)
    ours = dx, backend.host(layer.weight.grad), backend.host(layer.bias.grad)
    for mine, expected in zip(ours, exact[:3], strict=True):
        assert_close(mine, expected)
    if not torch:
        return
    theirs = torch_layer(2, 3, affine=True, track_running_stats=True).train(training)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(weight))
        for buffer, values in zip((theirs.running_mean, theirs.running_var), running, strict=True):
            buffer.copy_(torch.from_numpy(values))
    tx = torch.from_numpy(host).requires_grad_()
    theirs(tx).backward(torch.from_numpy(dy))
    for mine, other in zip(ours, (tx.grad, theirs.weight.grad, theirs.bias.grad), strict=True):
        assert_close(mine, other.numpy())


def test_backward_before_forward(backend: Backend) -> None:
    layer = full_layer(backend)
    dy = backend.array(np.ones((2, 3, 4, 5), np.float32))
    with refused(backend, RuntimeError, "forward", layer, dy):
        layer.backward(dy)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 4, 5), (1, 3, 4, 5), (2, 3, 20), (2, 3, 5, 4), ()])
def test_dy_of_another_shape(backend: Backend, rng: np.random.Generator, shape: Any) -> None:
    layer = full_layer(backend)
    layer.forward(backend.array(normal(rng, (2, 3, 4, 5))))
    dy = backend.array(np.ones(shape, np.float32))
    with refused(backend, ValueError, r"dy.*\(2, 3, 4, 5\)", layer, dy):
        layer.backward(dy)
    layer.backward(backend.array(np.ones((2, 3, 4, 5), np.float32)))  # the forward is still valid


@pytest.mark.parametrize("training", [True, False])
def test_derivatives_agree_with_finite_differences(backend: Backend, rng: np.random.Generator, training: bool) -> None:
    shape = 2, 2, 3, 4
    x, dy = normal(rng, shape, np.float64), normal(rng, shape, np.float64)
    weight, bias = normal(rng, (2,), np.float64), normal(rng, (2,), np.float64)
    running = [backend.array(np.array(v)) for v in ([0.5, 1], [2, 0.75])]
    buffers = {"running_mean": running[0], "running_var": running[1], "use_input_stats": False}

    def forward(*arrays: np.ndarray) -> tuple[Any, Any]:
        return cn.instance_norm_forward(*map(backend.array, arrays), **({} if training else buffers))

    def loss(*arrays: np.ndarray) -> Any:
        return (reference.wide(backend.host(forward(*arrays)[0])) * dy).sum()

    def gradients(*arrays: np.ndarray) -> list[np.ndarray]:
        return [backend.host(g) for g in cn.instance_norm_backward(backend.array(dy), forward(*arrays)[1])]

    point = x, weight, bias
    dx, dweight, dbias = gradients(*point)
    h = 1e-5
    for index, gradient in enumerate((dx, dweight, dbias)):
        u = rng.standard_normal(gradient.shape)
        ahead, behind = (loss(*(a + step * u if i == index else a for i, a in enumerate(point))) for step in (h, -h))
        assert_allclose(float((gradient * u).sum()), float(ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)

    # Second derivatives: the change of dx along u, projected on v, is the mixed second difference of the loss.
    h = 1e-3
    u, v = rng.standard_normal(x.shape), rng.standard_normal(x.shape)
    change = (gradients(x + h * u, weight, bias)[0] - gradients(x - h * u, weight, bias)[0]) / (2 * h)
    mixed = sum(a * b * loss(x + h * (a * u + b * v), weight, bias) for a in (1, -1) for b in (1, -1))
    assert_allclose(float((change * v).sum()), float(mixed) / (4 * h * h), rtol=1e-3, atol=1e-3)


# State


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_keys(backend: Backend, rank: int) -> None:
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for affine in (True, False):
        for bias in (True, False):
            for tracked in (True, False):
                arguments = {"affine": affine, "bias": bias, "track_running_stats": tracked}
                layer = LAYERS[rank](3, **arguments, device=backend.device)
                expected = keys[: affine + (affine and bias)] + keys[2:] * tracked
                state = layer.state_dict()
                assert list(state) == expected
                if tracked:
                    assert state["num_batches_tracked"].dtype == np.int64
                    assert state["num_batches_tracked"].shape == ()
                if torch and bias:
                    arguments.pop("bias")
                    assert list(torch_layer(rank, 3, **arguments).state_dict()) == expected


def test_bad_states_are_refused(backend: Backend) -> None:
    layer = full_layer(backend)
    good = {name: backend.host(array) + 1 for name, array in layer.state_dict().items()}
    missing = {name: array for name, array in good.items() if name not in ("bias", "running_var")}
    with refused(backend, KeyError, "missing.*bias.*running_var", layer):
        layer.load_state_dict(missing)
    with refused(backend, KeyError, "unexpected.*gamma.*beta", layer):
        layer.load_state_dict(good | {"gamma": np.ones(3), "beta": np.ones(3)})
    with refused(backend, KeyError, "missing.*weight.*unexpected.*gamma", layer):
        layer.load_state_dict({"gamma": np.ones(3)} | {k: v for k, v in good.items() if k != "weight"})


@pytest.mark.parametrize("strict", [True, False])
def test_state_without_batch_counter(backend: Backend, strict: bool) -> None:
    layer = full_layer(backend)
    layer.num_batches_tracked[...] = 5
    state = {name: backend.host(array) + 1 for name, array in layer.state_dict().items()}
    del state["num_batches_tracked"]
    layer.load_state_dict(state, strict=strict)
    loaded = layer.state_dict()
    assert int(loaded.pop("num_batches_tracked")) == 5
    for name, array in loaded.items():
        assert_equal(backend.host(array), state[name])
    if torch:
        theirs = torch_layer(2, 3, affine=True, track_running_stats=True)
        theirs.num_batches_tracked.fill_(5)
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=strict)
        assert int(theirs.num_batches_tracked) == 5


@pytest.mark.parametrize("prefix", ["", "stem.1."])
@pytest.mark.parametrize("names", [["running_mean", "running_var"], ["running_var"],
                                   ["running_mean", "running_var", "num_batches_tracked"]], ids=len)  # fmt: skip
def test_statistics_for_an_untracked_layer(backend: Backend, prefix: str, names: list[str]) -> None:
    layer = LAYERS[2](3, affine=True, device=backend.device)
    state = {prefix + name: np.full(3, 2.0) for name in ("weight", "bias", *names)}
    said = f"{' and '.join(prefix + name for name in names)} are running statistics"
    with refused(backend, KeyError, f"{re.escape(said)}.*Remove these keys.*track_running_stats=True", layer):
        layer.load_state_dict(state, prefix=prefix)
    if torch:
        theirs = torch_layer(2, 3, affine=True)
        with pytest.raises(RuntimeError, match="track_running_stats=True"):
            theirs.load_state_dict({name.removeprefix(prefix): torch.from_numpy(a) for name, a in state.items()})
    layer.load_state_dict(state, strict=False, prefix=prefix)
    assert layer.running_mean is None
    assert_equal(backend.host(layer.weight.data), [2, 2, 2])
    for bad in ({"gamma": np.ones(3)}, {}):  # without statistics in the state, the error does not mention them
        with pytest.raises(KeyError) as caught:
            layer.load_state_dict(bad)
        assert "track_running_stats=True" not in str(caught.value)


@pytest.mark.parametrize("what", ["reset_running_stats", "reset_parameters"])
@pytest.mark.parametrize("tracked", [True, False])
def test_resetting(backend: Backend, what: str, tracked: bool) -> None:
    arguments = {"affine": True, "track_running_stats": tracked}
    layer = full_layer(backend) if tracked else LAYERS[2](3, **arguments, device=backend.device)
    state = {name: np.full(array.shape, start) for start, (name, array) in enumerate(layer.state_dict().items(), 2)}
    layer.load_state_dict(state)
    before = {name: (id(array), Bits(array)) for name, array in held(layer).items()}
    expected = {name: array.flat[0] for name, array in state.items()}
    if tracked:
        expected |= {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    if what == "reset_parameters":
        expected |= {"weight": 1, "bias": 0}
    assert getattr(layer, what)() is None
    assert list(layer.state_dict()) == list(expected)
    for name, array in layer.state_dict().items():
        assert_equal(backend.host(array), expected[name])
    for name, array in held(layer).items():
        assert id(array) == before[name][0]
        assert not name.endswith("grad") or Bits(array) == before[name][1]
    if torch:
        theirs = torch_layer(2, 3, **arguments)
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        getattr(theirs, what)()
        for name, values in theirs.state_dict().items():
            assert_equal(values.numpy(), expected[name])


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(backend: Backend, rng: np.random.Generator, training: bool) -> None:
    host = normal(rng, (2, 3, 4, 5))
    layer, twin = (full_layer(backend).train(training) for _ in range(2))
    expected = twin.forward(backend.array(host))
    with cn.inference_mode():
        assert_same(backend.host(layer.forward(backend.array(host))), backend.host(expected))
    for name, array in held(layer).items():
        assert_same(backend.host(array), backend.host(held(twin)[name]))
    assert layer.saved is None
    with refused(backend, RuntimeError, r"within cupynorm.inference_mode\(\).*outside", layer):
        layer.backward(backend.array(host))
    if torch:
        theirs = torch_layer(2, 3, affine=True, track_running_stats=True).train(training)
        before = theirs.running_mean.clone()
        with torch.inference_mode():
            y = theirs(torch.from_numpy(host))
        assert bool((theirs.running_mean != before).all()) == training
        with pytest.raises(RuntimeError, match="grad"):
            y.sum().backward()


def test_wrong_shapes_are_refused(backend: Backend) -> None:
    layer = full_layer(backend)
    wrong = {name: backend.host(array) + 1 for name, array in layer.state_dict().items()}
    for name, shape in (("weight", (2, 3)), ("bias", ()), ("num_batches_tracked", (1,)), ("running_mean", (4,))):
        with refused(backend, ValueError, f"{name}.*{re.escape(str(shape))}", layer):
            layer.load_state_dict(wrong | {name: np.ones(shape)}, strict=False)


def test_every_wrong_shape_is_named(backend: Backend) -> None:
    layer = full_layer(backend)
    wrong = layer.state_dict() | {"running_mean": np.ones(4), "running_var": np.ones((3, 1))}
    for strict in (True, False):
        with refused(backend, ValueError, r"running_mean.*\(4,\)", layer):
            layer.load_state_dict(wrong, strict=strict)
        with refused(backend, ValueError, r"running_var.*\(3, 1\)", layer):
            layer.load_state_dict(wrong, strict=strict)


def test_loading(backend: Backend) -> None:
    layer = full_layer(backend)
    arrays = {name: array for name, array in held(layer).items() if "grad" not in name}
    values = {
        "weight": np.array([1, 2, 3], np.float64),
        "bias": np.array([4, 5, 6], np.float16),
        "running_mean": np.array([7, 8, 9], np.int32),
        "running_var": [10, 11, 12],
        "num_batches_tracked": np.array(7, np.int32),
    }
    layer.load_state_dict(values)
    loaded = {name: array for name, array in held(layer).items() if "grad" not in name}
    assert all(loaded[name] is array for name, array in arrays.items())
    for name, array in layer.state_dict().items():
        assert array.dtype == (np.int64 if name == "num_batches_tracked" else np.float32)
        assert_equal(backend.host(array), values[name])
    layer.load_state_dict({"bias": np.zeros(3), "gamma": np.zeros(3)}, strict=False)
    assert_equal(backend.host(layer.bias.data), [0, 0, 0])
    assert_equal(backend.host(layer.weight.data), [1, 2, 3])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_repr(rank: int) -> None:
    layer = LAYERS[rank](3, device="cpu")
    expected = f"InstanceNorm{rank}d(3, eps=1e-05, momentum=0.1, affine=False, bias=False, track_running_stats=False)"
    assert repr(layer) == expected
    full = LAYERS[rank](8, 1e-3, None, True, True, "cpu")
    assert repr(full) == (
        f"InstanceNorm{rank}d(8, eps=0.001, momentum=None, affine=True, bias=True, track_running_stats=True)"
    )
    assert "affine=True, bias=False" in repr(LAYERS[rank](8, affine=True, bias=False, device="cpu"))


def test_documentation_names_every_test() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "semantics.md").read_text(encoding="utf-8")
    here = {name for name in globals() if name.startswith("test_") and "documentation" not in name}
    assert sorted(re.findall(r"`(test_\w+)`", text)) == sorted(here)
    assert [int(n) for n in re.findall(r"^(\d+)\. ", text, re.M)] == list(range(1, 27))
