"""What layers hold: state_dict and back, resetting, copies, pickles, moves between devices."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import BFLOAT16, assert_equal, assert_same
from helpers.layers import KEYS, LAYERS, SHAPES, arrays_of, contents, fill, full
from helpers.optional import imported
from helpers.reference import assert_close

import cupynorm as cn
from cupynorm import devices

torch = imported("torch")

needs_no_gpu = pytest.mark.skipif(devices.gpu_status()[0], reason="tests the errors without a usable GPU")


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
