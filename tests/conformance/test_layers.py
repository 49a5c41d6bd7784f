"""The layers: construction, parameters, gradients, calls. test_semantics_* and test_functional check their results."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import BFLOAT16, Bits, assert_equal, assert_same
from helpers.layers import KEYS, LAYERS, SHAPES, arrays_of, contents, fill, full
from helpers.reference import assert_close

import cupynorm as cn

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
