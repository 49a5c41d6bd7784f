"""The layers: arrays, state, copies, devices, refusals. test_semantics and test_functional check their results."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.backends import Backend
from helpers.compare import BFLOAT16, Bits, assert_equal, assert_same
from helpers.optional import imported
from helpers.reference import assert_close

import cupynorm as cn
from cupynorm import devices

torch = imported("torch")

LAYERS = {1: cn.InstanceNorm1d, 2: cn.InstanceNorm2d, 3: cn.InstanceNorm3d}
SHAPES = {1: (2, 3, 20), 2: (2, 3, 4, 5), 3: (2, 3, 2, 2, 5)}
KEYS = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"

needs_no_gpu = pytest.mark.skipif(devices.gpu_status()[0], reason="tests the errors without a usable GPU")


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (rng.standard_normal(shape) * 2 + 1).astype(dtype)


def full(rank: int = 2, device: str = "cpu", **kwargs: Any) -> Any:
    """An affine, tracking layer."""
    return LAYERS[rank](3, affine=True, track_running_stats=True, device=device, **kwargs)


def arrays_of(layer: Any) -> dict[str, Any]:
    """The layer's own arrays by PyTorch's names."""
    found = {name: getattr(layer, name) for name in KEYS}
    return {
        name: value.data if isinstance(value, cn.Parameter) else value
        for name, value in found.items()
        if value is not None
    }


def contents(layer: Any) -> dict[str, Any]:
    """Copies of everything that a call may change, for comparison."""
    grads = {f"{name} grad": p.grad for name, p in layer.namedparams()}
    return {
        name: None if array is None else (id(array), Bits(array)) for name, array in (arrays_of(layer) | grads).items()
    }


def fill(layer: Any, rng: np.random.Generator) -> None:
    """Give every parameter and statistic a value of its own."""
    for name, array in arrays_of(layer).items():
        if name != "num_batches_tracked":
            values = rng.uniform(0.5, 2, 3).astype(array.dtype)
            array[...] = devices.to_device(values, layer.device)


# Construction


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_signature(rank: int) -> None:
    signature = str(inspect.signature(LAYERS[rank]).replace(return_annotation=inspect.Signature.empty))
    parameters = [str(p.replace(annotation=p.empty)) for p in inspect.signature(LAYERS[rank]).parameters.values()]
    assert parameters == [
        "num_features",
        "eps=1e-05",
        "momentum=0.1",
        "affine=False",
        "track_running_stats=False",
        "device=None",
        "dtype=None",
        "bias=True",
        "activation=None",
        "negative_slope=0.01",
        "ddof=0.0",
        "eps_mode='variance'",
        "comm=None",
    ]
    assert "*, bias" in signature


def test_attributes_of_a_new_layer() -> None:
    plain = cn.InstanceNorm2d(3, device="cpu")
    assert all(getattr(plain, name) is None for name in KEYS)
    assert (plain.num_features, plain.eps, plain.momentum) == (3, 1e-5, 0.1)
    assert (plain.affine, plain.track_running_stats, plain.training) == (False, False, True)
    layer = full()
    assert {name: array.tolist() for name, array in arrays_of(layer).items()} == {
        "weight": [1, 1, 1],
        "bias": [0, 0, 0],
        "running_mean": [0, 0, 0],
        "running_var": [1, 1, 1],
        "num_batches_tracked": 0,
    }
    without_bias = cn.InstanceNorm2d(3, affine=True, bias=False, device="cpu")
    assert isinstance(without_bias.weight, cn.Parameter)
    assert without_bias.bias is None
    assert cn.InstanceNorm2d(3, bias=True, device="cpu").bias is None  # no affine, no bias


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", np.float16, BFLOAT16, None], ids=str)
def test_dtype_of_the_arrays(dtype: Any) -> None:
    expected = {None: np.dtype(np.float32), "bfloat16": BFLOAT16}.get(dtype) or np.dtype(dtype)
    for name, array in arrays_of(full(dtype=dtype)).items():
        assert array.dtype == (np.int64 if name == "num_batches_tracked" else expected)


@pytest.mark.parametrize("dtype", ["int32", bool, complex, "nonsense", ">f4", 3, "O"])
def test_invalid_dtypes(dtype: Any) -> None:
    with pytest.raises(TypeError, match="float16, bfloat16, float32"):
        cn.InstanceNorm2d(3, dtype=dtype, device="cpu")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_documentation_names_the_rank(rank: int) -> None:
    doc = LAYERS[rank].__doc__
    assert f"InstanceNorm{rank}d" in doc
    assert "{" not in doc


# Devices


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:one", "cuda:-1", "CPU", "", "cpu:0"])
def test_invalid_device_names(device: str) -> None:
    with pytest.raises(ValueError, match=r"device must be 'cpu', 'cuda', 'cuda:<number>' or None.*"):
        cn.InstanceNorm2d(3, device=device)


@pytest.mark.parametrize("device", [0, True, ("cuda", 0), b"cpu"])
def test_invalid_device_types(device: Any) -> None:
    with pytest.raises(TypeError, match="device must be"):
        cn.InstanceNorm2d(3, device=device)


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_unusable_gpu(device: str) -> None:
    with pytest.raises(RuntimeError, match=f"device '{device}' is not usable: "):
        cn.InstanceNorm2d(3, device=device)


@needs_no_gpu
@pytest.mark.parametrize("device", [None, 0, "cuda", "cuda:0", np.int64(0)])
def test_to_gpu_without_a_gpu(rng: np.random.Generator, device: Any) -> None:
    layer = full()
    fill(layer, rng)
    before = contents(layer)
    with pytest.raises(RuntimeError, match=r"is not usable: .*(driver|CuPy)"):
        layer.to_gpu(device)
    assert contents(layer) == before
    assert layer.device == "cpu"
    x = normal(rng, SHAPES[2])
    layer.backward(layer.forward(x))


@pytest.mark.parametrize("device", ["cpu", -1, "gpu", True, 1.0, "0"])
def test_to_gpu_of_invalid_devices(device: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="device"):
        full().to_gpu(device)


def test_to_cpu_of_a_cpu_layer(rng: np.random.Generator) -> None:
    layer = full()
    before = contents(layer)
    assert layer.to_cpu() is layer
    assert contents(layer) == before
    assert layer.device == "cpu"


@pytest.mark.gpu
def test_moving_between_devices(rng: np.random.Generator) -> None:
    import cupy

    layer = full()
    fill(layer, rng)
    x = normal(rng, SHAPES[2])
    layer.eval()
    expected = layer.forward(x)
    layer.backward(x)
    values = {name: array.copy() for name, array in arrays_of(layer).items()}
    grad = layer.weight.grad.copy()
    parameter = layer.weight
    assert layer.to_gpu() is layer
    assert layer.weight is parameter
    for name, array in arrays_of(layer).items():
        assert isinstance(array, cupy.ndarray)
        assert_equal(cupy.asnumpy(array), values[name])
    assert_equal(cupy.asnumpy(layer.weight.grad), grad)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(cupy.asarray(x))
    y = layer.forward(cupy.asarray(x))
    assert_close(cupy.asnumpy(y), expected)
    with pytest.raises(TypeError, match=r"to_cpu\(\).*cupy.asarray"):
        layer.forward(x)
    layer.to_cpu()
    with pytest.raises(TypeError, match=r"to_gpu\(\).*cupy.asnumpy"):
        layer.forward(cupy.asarray(x))
    for name, array in arrays_of(layer).items():
        assert type(array) is np.ndarray
        assert_equal(array, values[name])


@pytest.mark.gpu
def test_default_device_is_the_gpu() -> None:
    import cupy

    assert isinstance(cn.InstanceNorm2d(3, affine=True).weight.data, cupy.ndarray)
    state = full(device="cuda").state_dict()
    assert all(isinstance(array, cupy.ndarray) for array in state.values())
    full().load_state_dict(state)  # from either device
    copied = pickle.loads(pickle.dumps(full(device="cuda")))
    assert copied.device.startswith("cuda:")


@needs_no_gpu
def test_default_device_without_a_gpu_is_the_cpu() -> None:
    assert type(cn.InstanceNorm2d(3, affine=True).weight.data) is np.ndarray


# Parameters


def test_data_is_never_rebound() -> None:
    layer = full()
    array = layer.weight.data
    layer.weight.data = np.array([1, 2, 3], np.float64)
    assert layer.weight.data is array
    assert array.dtype == np.float32
    assert array.tolist() == [1, 2, 3]
    layer.weight.data = [4, 5, 6]
    assert array.tolist() == [4, 5, 6]
    layer.weight.data -= 1
    assert layer.weight.data is array
    assert array.tolist() == [3, 4, 5]
    layer.weight.data = layer.weight.data[::-1]
    assert array.tolist() == [5, 4, 3]


@pytest.mark.parametrize("value", [1.0, [1.0], [1, 2], [[1, 2, 3]], np.ones((3, 1)), np.ones(0)])
def test_data_of_wrong_shape_is_refused(value: Any) -> None:
    parameter = full().weight
    with pytest.raises(ValueError, match=r"\(3,\)"):
        parameter.data = value
    assert parameter.data.tolist() == [1, 1, 1]


def test_complex_data_is_refused(backend: Backend) -> None:
    """Also from an array of the parameter's own kind."""
    parameter = full(device=backend.device).weight
    with pytest.raises(TypeError, match="data has dtype complex64; needed are real numbers"):
        parameter.data = backend.array(np.full(3, 2 + 1j, np.complex64))
    assert backend.host(parameter.data).tolist() == [1, 1, 1]


def test_parameter_by_itself() -> None:
    data = np.arange(3, dtype=np.float32)
    parameter = cn.Parameter(data)
    assert parameter.data is data
    assert parameter.grad is None
    assert parameter.shape == (3,)
    assert parameter.dtype == np.float32
    assert repr(parameter) == f"Parameter({data!r})"
    parameter.grad = data
    parameter.cleargrad()
    assert parameter.grad is None


def test_params_and_namedparams() -> None:
    layer = full()
    assert list(layer.namedparams()) == [("/weight", layer.weight), ("/bias", layer.bias)]
    assert list(layer.params()) == [layer.weight, layer.bias]
    only_weight = cn.InstanceNorm2d(3, affine=True, bias=False, device="cpu")
    assert list(only_weight.params()) == [only_weight.weight]
    assert list(cn.InstanceNorm2d(3, device="cpu").namedparams()) == []


def test_training_loop_keeps_the_arrays(backend: Backend, rng: np.random.Generator) -> None:
    """Gradient descent, in both usual ways of writing it, lowers the loss and rebinds nothing."""
    layer = full(device=backend.device)
    kept = {name: id(array) for name, array in arrays_of(layer).items()}
    x, target = backend.array(normal(rng, SHAPES[2])), backend.array(normal(rng, SHAPES[2]))
    losses = []
    for step in range(6):
        difference = layer.forward(x) - target
        losses.append(float((difference**2).sum()))
        layer.cleargrads()
        layer.backward(difference)
        for parameter in layer.params():
            if step % 2:
                parameter.data -= 0.01 * parameter.grad
            else:
                parameter.data = parameter.data - 0.01 * parameter.grad
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert {name: id(array) for name, array in arrays_of(layer).items()} == kept


# Gradients


def test_first_gradient_is_its_own_array(backend: Backend, rng: np.random.Generator) -> None:
    layer = full(device=backend.device)
    dy = backend.array(normal(rng, SHAPES[2]))
    layer.forward(backend.array(normal(rng, SHAPES[2])))
    layer.backward(dy)
    grad = layer.weight.grad
    before = backend.host(grad).copy()
    layer.cleargrads()
    layer.backward(dy)
    assert layer.weight.grad is not grad
    assert_same(grad, layer.weight.grad)
    assert_same(layer.weight.grad, before)


def test_backward_twice_adds_twice(backend: Backend, rng: np.random.Generator) -> None:
    layer = full(device=backend.device)
    host, dy = normal(rng, SHAPES[2]), normal(rng, SHAPES[2])
    layer.forward(backend.array(host))
    first, second = (backend.host(layer.backward(backend.array(dy))) for _ in range(2))
    assert_same(first, second)
    _, dweight, dbias, _ = reference.backward(dy, host)
    assert_close(backend.host(layer.weight.grad), 2 * dweight, terms=2 * host.size // 3)
    assert_close(backend.host(layer.bias.grad), 2 * dbias, terms=2 * host.size // 3)


def test_gradients_set_by_the_user(backend: Backend, rng: np.random.Generator) -> None:
    layer = full(device=backend.device)
    host, dy = normal(rng, SHAPES[2]), normal(rng, SHAPES[2])
    layer.forward(backend.array(host))
    layer.weight.grad = backend.array(np.full(3, 100, np.float32))
    layer.backward(backend.array(dy))
    _, dweight, dbias, _ = reference.backward(dy, host)
    assert_close(backend.host(layer.weight.grad), 100 + dweight)
    assert_close(backend.host(layer.bias.grad), dbias, terms=host.size // 3)


@pytest.mark.parametrize("grad", [np.ones(4, np.float32), np.ones((), np.float32), np.ones((2, 3)), [0, 0, 0], 1.0])
def test_invalid_gradients_are_refused(rng: np.random.Generator, grad: Any) -> None:
    layer = full()
    x = normal(rng, SHAPES[2])
    layer.forward(x)
    layer.backward(x)
    layer.bias.grad = grad
    before, out = layer.weight.grad.copy(), np.full_like(x, 5)
    with pytest.raises((TypeError, ValueError), match="bias"):
        layer.backward(x, out=out)
    assert_same(layer.weight.grad, before)
    assert layer.bias.grad is grad
    assert (out == 5).all()
    layer.cleargrads()
    layer.backward(x)


@pytest.mark.parametrize("other", ["bias.grad", "weight", "bias"])
def test_gradients_sharing_memory_are_refused(backend: Backend, rng: np.random.Generator, other: str) -> None:
    """Adding to one would add to the other as well."""
    layer = full(device=backend.device)
    x = backend.array(normal(rng, SHAPES[2]))
    layer.backward(layer.forward(x))
    layer.weight.grad = {"bias.grad": layer.bias.grad, "weight": layer.weight.data, "bias": layer.bias.data}[other]
    before = contents(layer)
    with pytest.raises(ValueError, match=r"share memory, and (weight|bias)\.grad is to be updated") as caught:
        layer.backward(x)
    assert "weight.grad" in str(caught.value)
    assert other in str(caught.value)
    assert contents(layer) == before
    layer.weight.grad = None
    layer.backward(x)


# Forward and backward


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["training", "tracked eval", "untracked eval"])
def test_backward_after_every_kind_of_forward(backend: Backend, rng: np.random.Generator, rank: int, mode: str) -> None:
    layer = LAYERS[rank](3, affine=True, track_running_stats=mode != "untracked eval", device=backend.device)
    fill(layer, rng)
    layer.train(mode == "training")
    weight, bias = backend.host(layer.weight.data), backend.host(layer.bias.data)
    running = None
    if mode == "tracked eval":
        running = backend.host(layer.running_mean).copy(), backend.host(layer.running_var).copy()
    host, dy = normal(rng, SHAPES[rank]), normal(rng, SHAPES[rank])
    assert_close(backend.host(layer(backend.array(host))), reference.forward(host, weight, bias, running=running))
    dx = layer.backward(backend.array(dy))
    exact = reference.backward(dy, host, weight, running=running)
    for ours, expected in zip((dx, layer.weight.grad, layer.bias.grad), exact[:3], strict=True):
        assert_close(backend.host(ours), expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unbatched_is_a_batch_of_one(backend: Backend, rng: np.random.Generator, rank: int) -> None:
    single, batch = full(rank, backend.device), full(rank, backend.device)
    host, dy = normal(rng, SHAPES[rank][1:]), normal(rng, SHAPES[rank][1:])
    y, batch_y = single.forward(backend.array(host)), batch.forward(backend.array(host[None]))
    dx, batch_dx = single.backward(backend.array(dy)), batch.backward(backend.array(dy[None]))
    assert y.shape == dx.shape == host.shape
    assert_same(backend.host(y), backend.host(batch_y)[0])
    assert_same(backend.host(dx), backend.host(batch_dx)[0])
    for ours, theirs in zip(single.params(), batch.params(), strict=True):
        assert_same(backend.host(ours.grad), backend.host(theirs.grad))
    mean, var = reference.moved(np.zeros(3), np.ones(3), host[None], 0.1)
    assert_close(backend.host(single.running_mean), mean)
    assert_close(backend.host(single.running_var), var)
    with pytest.raises(ValueError, match="dy has shape"):
        single.backward(backend.array(dy[None]))


@pytest.mark.parametrize("batched", [True, False])
def test_out(backend: Backend, rng: np.random.Generator, batched: bool) -> None:
    host, dy = normal(rng, SHAPES[2]), normal(rng, SHAPES[2])
    if not batched:
        host, dy = host[0], dy[0]
    layer, other = full(device=backend.device), full(device=backend.device)
    out, dx = (backend.array(np.zeros_like(host)) for _ in range(2))
    assert layer.forward(backend.array(host), out=out) is out
    assert layer.backward(backend.array(dy), out=dx) is dx
    assert_same(backend.host(out), backend.host(other.forward(backend.array(host))))
    assert_same(backend.host(dx), backend.host(other.backward(backend.array(dy))))

    x = backend.array(host.copy())
    assert layer.forward(x, out=x) is x
    assert_same(backend.host(x), backend.host(out))
    with pytest.raises(ValueError, match="out"):  # the input is overwritten
        layer.backward(backend.array(dy))

    x, dx = backend.array(host.copy()), backend.array(dy.copy())
    layer.forward(x)
    assert layer.backward(dx, out=dx) is dx
    assert_same(backend.host(dx), backend.host(other.backward(backend.array(dy))))


@pytest.mark.parametrize("batched", [True, False])
def test_bad_out_changes_nothing(backend: Backend, rng: np.random.Generator, batched: bool) -> None:
    host = normal(rng, (2, 3, 4, 6))
    base = backend.array(host if batched else host[0])
    x, overlapping = base[..., :5], base[..., 1:]
    layer = full(device=backend.device)
    layer.backward(layer.forward(x))
    before, memory = contents(layer), Bits(base)
    bad: list[tuple[Any, str]] = [
        (overlapping, "out overlaps"),
        (base, "out has shape"),
        (x.astype(np.float64), "out has shape .* dtype"),
        (backend.host(x).tolist(), "out must be"),
    ]
    for out, match in bad:
        for call in (layer.forward, layer.backward):
            with pytest.raises((TypeError, ValueError), match=match):
                call(x, out=out)
    if backend.name != "cupy":
        fixed = np.zeros(x.shape, np.float32)
        fixed.flags.writeable = False
        for call in (layer.forward, layer.backward):
            with pytest.raises(ValueError, match="out is read-only"):
                call(x, out=fixed)
            with pytest.raises(TypeError, match="out must be"):
                call(x, out=np.ma.zeros(x.shape, np.float32))
    assert contents(layer) == before
    assert Bits(base) == memory


def test_read_only_input(rng: np.random.Generator) -> None:
    x, dy = normal(rng, SHAPES[2]), normal(rng, SHAPES[2])
    expected = full().forward(x)
    x.flags.writeable = dy.flags.writeable = False
    layer = full()
    assert_same(layer.forward(x), expected)
    dx = layer.backward(dy)
    assert dx.flags.writeable
    with pytest.raises(ValueError, match="out is read-only"):
        layer.forward(x, out=x)
    with pytest.raises(ValueError, match="out is read-only"):
        layer.backward(dy, out=dy)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (3, 0, 5), (0, 4, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_zero_size(backend: Backend, shape: Any, training: bool) -> None:
    layer = cn.InstanceNorm2d(shape[-3], affine=True, track_running_stats=True, device=backend.device).train(training)
    before = contents(layer)
    y = layer.forward(backend.array(np.zeros(shape, np.float32)))
    assert contents(layer) == before
    assert y.shape == layer.backward(y).shape == shape
    for parameter in layer.params():
        assert_equal(backend.host(parameter.grad), np.zeros(shape[-3], np.float32), strict=True)


@pytest.mark.parametrize("make", [list, np.ma.array, memoryview, lambda a: a.view(np.matrix), lambda a: None],
                         ids=["list", "masked", "memoryview", "matrix", "None"])  # fmt: skip
def test_other_classes_are_refused(rng: np.random.Generator, make: Callable[[np.ndarray], Any]) -> None:
    layer = cn.InstanceNorm1d(3, affine=True, track_running_stats=True, device="cpu")
    x = normal(rng, (3, 4))
    layer.backward(layer.forward(x))
    before = contents(layer)
    for call, name in ((layer.forward, "input"), (layer.__call__, "input"), (layer.backward, "dy")):
        with pytest.raises(TypeError, match=f"^{name} must be a numpy.ndarray or a cupy.ndarray, got "):
            call(make(x))
    assert contents(layer) == before


def test_plain_layer_takes_every_dtype(backend: Backend, rng: np.random.Generator) -> None:
    """A layer without arrays of its own takes every dtype."""
    layer = cn.InstanceNorm2d(3, device=backend.device)
    for dtype in (np.float16, BFLOAT16, np.float32, np.float64):
        host = normal(rng, SHAPES[2], dtype)
        y = layer.forward(backend.array(host))
        assert y.dtype == dtype
        assert_close(backend.host(y), reference.forward(host))


def test_modes(backend: Backend, rng: np.random.Generator) -> None:
    layer = full(device=backend.device)
    assert layer.eval() is layer
    assert layer.training is False
    before = contents(layer)
    layer.forward(backend.array(normal(rng, SHAPES[2])))
    assert contents(layer) == before
    assert layer.train() is layer
    assert layer.training is True
    layer.forward(backend.array(normal(rng, SHAPES[2])))
    after = contents(layer)
    assert [name for name in before if before[name] != after[name]] == ["running_mean", "running_var"]
    assert layer.train(False).training is False


# Inference mode


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["a forward before", "none before"])
@pytest.mark.parametrize("unbatched", [True, False])
def test_inference_mode_frees_inputs(
    backend: Backend, rng: np.random.Generator, training: bool, before: bool, unbatched: bool
) -> None:
    """Inputs of this forward and of the one before are freed as soon as the caller drops them."""
    shape = SHAPES[2][unbatched:]
    layers = [
        full(device=backend.device, activation="relu").train(training),
        cn.InstanceNorm2d(3, device=backend.device).train(training),
    ]
    for layer in layers:
        gone = []
        if before:
            x, residual = (backend.array(normal(rng, shape)) for _ in range(2))
            layer.forward(x, residual=residual)
            gone += [weakref.ref(x)]
        x, residual = (backend.array(normal(rng, shape)) for _ in range(2))
        with cn.inference_mode():
            y = layer.forward(x, residual=residual)
        gone += [weakref.ref(x), weakref.ref(residual)]
        del x, residual
        assert [ref() for ref in gone] == [None] * len(gone)
        assert layer.saved is None
        with pytest.raises(RuntimeError, match=r"inference_mode\(\): do the forward again outside"):
            layer.backward(y)
        layer.forward(y)
        layer.backward(y)


def test_saved_outlives_inference_mode(backend: Backend, rng: np.random.Generator) -> None:
    """`saved` of an earlier forward stays valid; so does `saved` of the function within the mode."""
    layer, twin = full(device=backend.device), full(device=backend.device)
    x, dy = (backend.array(normal(rng, SHAPES[2])) for _ in range(2))
    expected = backend.host(twin.backward(dy)) if twin.forward(x) is not None else None
    layer.forward(x)
    saved = layer.saved
    with cn.inference_mode():
        layer.forward(dy)
        assert_same(backend.host(layer.backward(dy, saved=saved)), expected)
        _, given = cn.instance_norm_forward(x, layer.weight.data, layer.bias.data)
        assert_same(backend.host(cn.instance_norm_backward(dy, given)[0]), expected)


def test_backward_error_after_inference_mode(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names inference_mode only if that is the reason."""
    x = normal(rng, SHAPES[2])
    layer = full()
    with cn.inference_mode():
        layer.forward(x)
    for other in (full(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match="needs a forward before it"):
            other.backward(x)
    with pytest.raises(RuntimeError, match="inference_mode"):
        layer.backward(x)
    monkeypatch.setattr(devices, "resolve", str)
    monkeypatch.setattr(devices, "to_device", lambda array, device: array.copy())
    layer.to_gpu("cuda:1").to_cpu()
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        layer.backward(x)


def keeps() -> bool:
    """True if a layer saves a forward here."""
    layer = cn.InstanceNorm1d(1, device="cpu")
    layer.forward(np.arange(4, dtype=np.float32)[None])
    return layer.saved is not None


def test_inference_mode_nests_and_ends() -> None:
    mode = cn.inference_mode()
    with mode:
        assert not keeps()
        with cn.inference_mode(False):
            assert keeps()
            with mode:
                assert not keeps()
            assert keeps()
        assert not keeps()
    assert keeps()
    with pytest.raises(ZeroDivisionError), mode:
        raise ZeroDivisionError
    assert keeps()


def test_inference_mode_as_a_decorator() -> None:
    @cn.inference_mode()
    def keeping(depth: int, *, then: Any = None) -> list[bool]:
        """What keeps() says."""
        if then:
            raise then
        return [keeps(), *(keeping(depth - 1) if depth else [])]

    assert keeping(2) == [False] * 3
    assert keeping.__doc__ == "What keeps() says."
    with pytest.raises(ZeroDivisionError):
        keeping(0, then=ZeroDivisionError)
    assert cn.inference_mode(False)(keeps)()
    assert keeps()

    def generator() -> Any:
        yield 1

    async def coroutine() -> None:
        pass

    async def both() -> Any:
        yield 1

    for function in (generator, coroutine, both):
        with pytest.raises(TypeError, match=f"cannot decorate .*{function.__name__}.*use `with"):
            cn.inference_mode()(function)


@pytest.mark.parametrize("mode", [None, 1, "yes", keeps, np.True_], ids=["None", "1", "yes", "function", "np.True_"])
def test_invalid_inference_modes(mode: Any) -> None:
    with pytest.raises(TypeError, match=r"mode must be a bool.*@cupynorm.inference_mode\(\)"):
        cn.inference_mode(mode)


def test_inference_mode_is_local_to_the_thread() -> None:
    entered, done = threading.Event(), threading.Event()
    seen: dict[str, list[bool]] = {"within": [], "beside": []}

    @cn.inference_mode()
    def within() -> None:
        entered.set()
        done.wait(60)
        seen["within"].append(keeps())

    def beside() -> None:
        seen["beside"].append(keeps())

    other = threading.Thread(target=within)
    other.start()
    entered.wait(60)
    seen["beside"].append(keeps())
    with cn.inference_mode():
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    done.set()
    other.join()
    assert seen == {"within": [False], "beside": [True] * 2}


def test_inference_mode_is_local_to_the_task() -> None:
    """A task that awaits within the mode does not put other tasks into it."""

    async def task(within: bool, turns: list[bool]) -> None:
        with cn.inference_mode(within):
            for _ in range(3):
                await asyncio.sleep(0)
                turns.append(keeps())

    async def main() -> tuple[list[bool], list[bool]]:
        turns: tuple[list[bool], list[bool]] = [], []
        await asyncio.gather(task(True, turns[0]), task(False, turns[1]))
        return turns

    assert asyncio.run(main()) == ([False] * 3, [True] * 3)


# Other forwards


def test_overridden_forward_is_called(rng: np.random.Generator) -> None:
    class Doubled(cn.InstanceNorm2d):
        def forward(self, x: Any, *, out: Any = None) -> Any:
            return 2 * super().forward(x, out=out)

    x = normal(rng, SHAPES[2])
    layer = Doubled(3, device="cpu")
    assert_same(layer(x), layer.forward(x))
    assert repr(layer).startswith("Doubled(3, ")


def test_repr_names_all_options() -> None:
    first = "InstanceNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=False"
    leaky = cn.InstanceNorm2d(3, affine=True, activation="leaky_relu", negative_slope=0.2, device="cpu")
    assert repr(leaky) == first + ", activation='leaky_relu', negative_slope=0.2)"
    assert repr(cn.InstanceNorm2d(3, affine=True, device="cpu")) == first + ")"


def test_warning_points_at_the_caller(rng: np.random.Generator) -> None:
    layer = cn.InstanceNorm2d(3, device="cpu")
    for call in (layer, layer.forward):
        with pytest.warns(UserWarning, match="num_features") as caught:
            call(normal(rng, (2, 4, 3, 3)))
        assert [w.filename for w in caught] == [__file__]


# State


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_state_dict_and_back(backend: Backend, rng: np.random.Generator, rank: int) -> None:
    layer, other = full(rank, backend.device), full(rank, backend.device)
    fill(layer, rng)
    state = layer.state_dict()
    assert tuple(state) == KEYS
    kept = arrays_of(other)
    assert other.load_state_dict(state) is None
    x = backend.array(normal(rng, SHAPES[rank]))
    assert_same(backend.host(layer.forward(x)), backend.host(other.forward(x)))
    assert all(array is kept[name] for name, array in arrays_of(other).items())


def test_state_dict_is_a_copy(rng: np.random.Generator) -> None:
    layer = full()
    fill(layer, rng)
    before = contents(layer)
    state = layer.state_dict()
    for array in state.values():
        array[...] = 77
    assert contents(layer) == before
    layer.load_state_dict(state)
    assert layer.weight.data.tolist() == [77, 77, 77]
    for array in state.values():
        array[...] = 5
    assert layer.weight.data.tolist() == [77, 77, 77]


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float64], ids=str)
def test_loading_casts(rng: np.random.Generator, dtype: Any) -> None:
    source, layer = full(), full(dtype=dtype)
    fill(source, rng)
    layer.load_state_dict(source.state_dict())
    for name, array in arrays_of(layer).items():
        expected = arrays_of(source)[name]
        assert array.dtype == (np.int64 if name == "num_batches_tracked" else dtype)
        assert_equal(array, expected.astype(array.dtype))


def test_loading_keeps_gradients_and_last_forward(rng: np.random.Generator) -> None:
    layer = full()
    x = normal(rng, SHAPES[2])
    layer.backward(layer.forward(x))
    grad = layer.weight.grad
    before = grad.copy()
    layer.load_state_dict(full().state_dict())
    assert layer.weight.grad is grad
    assert_same(grad, before)
    layer.backward(x)


@pytest.mark.parametrize("name", KEYS)
def test_reset_of_read_only_arrays_changes_nothing(rng: np.random.Generator, name: str) -> None:
    layer = full()
    fill(layer, rng)
    before = contents(layer)
    arrays_of(layer)[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"^{name} of InstanceNorm2d.* is read-only; it must be writable"):
        layer.reset_parameters()
    if name in ("weight", "bias"):
        assert contents(layer) == before
        layer.reset_running_stats()  # writes neither of these
        assert layer.running_var.tolist() == [1, 1, 1]
    else:
        with pytest.raises(ValueError, match="read-only"):
            layer.reset_running_stats()
        assert contents(layer) == before


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float64], ids=str)
def test_reset_of_other_dtypes(rng: np.random.Generator, dtype: Any) -> None:
    layer = full(dtype=dtype)
    fill(layer, rng)
    layer.reset_parameters()
    assert [array.tolist() for array in arrays_of(layer).values()] == [
        array.tolist() for array in arrays_of(full(dtype=dtype)).values()
    ]


def test_reset_keeps_last_forward(rng: np.random.Generator) -> None:
    layer = full()
    layer.forward(normal(rng, SHAPES[2]))
    saved = layer.saved
    layer.reset_parameters()
    assert layer.saved is saved


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", KEYS)
def test_one_bad_entry_loads_nothing(rng: np.random.Generator, name: str, strict: bool) -> None:
    layer = full()
    before = contents(layer)
    state = {key: array + 3 for key, array in full().state_dict().items()}
    for bad, error in (
        (np.zeros((2, 2)), ValueError),
        ("words", (TypeError, ValueError)),
        (None, (TypeError, ValueError)),
    ):
        with pytest.raises(error):
            layer.load_state_dict({**state, name: bad}, strict=strict)
        assert contents(layer) == before


def test_strict_and_lenient_loading(rng: np.random.Generator) -> None:
    layer = full()
    before = contents(layer)
    for state in ({}, {"weight": np.zeros(3)}, {**layer.state_dict(), "other": np.zeros(3)}):
        with pytest.raises(KeyError):
            layer.load_state_dict(state)
        assert contents(layer) == before
    layer.load_state_dict({"weight": [2, 2, 2], "other": 1}, strict=False)
    assert layer.weight.data.tolist() == [2, 2, 2]
    assert layer.running_var.tolist() == [1, 1, 1]
    plain = cn.InstanceNorm2d(3, device="cpu")
    plain.load_state_dict({})
    with pytest.raises(KeyError, match=r"unexpected.*weight"):
        plain.load_state_dict({"weight": np.ones(3)})


@pytest.mark.extras
@pytest.mark.skipif(torch is None, reason="needs PyTorch")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("arguments", [{"affine": True, "track_running_stats": True}, {"affine": True}, {}], ids=str)
def test_state_of_torch_module(rng: np.random.Generator, rank: int, arguments: dict[str, Any]) -> None:
    theirs = getattr(torch.nn, f"InstanceNorm{rank}d")(3, **arguments)
    for values in theirs.state_dict().values():
        if values.ndim:
            values.copy_(torch.from_numpy(rng.uniform(0.5, 2, 3)))
    ours = LAYERS[rank](3, **arguments, device="cpu")
    ours.load_state_dict(theirs.state_dict())
    x = normal(rng, SHAPES[rank])
    theirs.train()(torch.from_numpy(x))
    ours.train().forward(x)
    assert_close(ours.eval().forward(x), theirs.eval()(torch.from_numpy(x)).detach().numpy())

    back = getattr(torch.nn, f"InstanceNorm{rank}d")(3, **arguments)
    back.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    for name, values in back.state_dict().items():
        assert_equal(values.numpy(), arrays_of(ours)[name], strict=True)


# Copies


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(backend: Backend, rng: np.random.Generator, how: str, protocol: int) -> None:
    layer = full(device=backend.device, eps=1e-3, momentum=0.5)
    fill(layer, rng)
    x = backend.array(normal(rng, SHAPES[2]))
    layer.backward(layer.forward(x))
    layer.eval()
    copied = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer, protocol))
    assert type(copied) is type(layer)
    assert repr(copied) == repr(layer)
    assert (copied.training, copied.device, copied.eps) == (False, layer.device, 1e-3)
    for name, array in arrays_of(layer).items():
        twin = arrays_of(copied)[name]
        assert twin is not array
        assert_same(backend.host(twin), backend.host(array))
    assert copied.weight.grad is not layer.weight.grad
    assert_same(backend.host(copied.weight.grad), backend.host(layer.weight.grad))
    before = contents(layer)
    with pytest.raises(RuntimeError, match="forward"):  # the last forward belongs to the original
        copied.backward(x)
    copied.train().backward(copied.forward(x))
    copied.weight.data = backend.array(np.zeros(3, np.float32))
    assert contents(layer) == before
    layer.backward(x)


def test_pickle_of_plain_layer_is_small(rng: np.random.Generator) -> None:
    layer = cn.InstanceNorm2d(3, device="cpu")
    layer.forward(normal(rng, (2, 3, 100, 100)))
    assert len(pickle.dumps(layer)) < 2000  # without the input of the last forward


def test_public_names() -> None:
    assert {"InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "Parameter", "instance_norm"} <= set(cn.__all__)
    assert {"instance_norm_forward", "instance_norm_backward"} <= set(cn.__all__)
    for name in cn.__all__:
        assert getattr(cn, name) is not None
        assert inspect.getdoc(getattr(cn, name))


def test_warning_as_error_changes_nothing(rng: np.random.Generator) -> None:
    """If warnings are errors, a warning leaves the layer as it was."""
    layer = cn.InstanceNorm2d(3, device="cpu")
    x = normal(rng, SHAPES[2])
    layer.forward(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="num_features"):
            layer.forward(normal(rng, (2, 4, 3, 3)))
    assert layer.backward(x).shape == x.shape
