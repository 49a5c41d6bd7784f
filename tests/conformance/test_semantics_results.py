"""PyTorch's behaviour, rows 14 to 21 of docs/reference/semantics.md: statistics, numerics, layouts, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import assert_allclose, assert_equal, assert_same
from helpers.layers import contents
from helpers.optional import imported
from helpers.reference import assert_close
from helpers.semantics import full_layer, refused, torch_layer

import cupynorm as cn

torch = imported("torch")

pytestmark = pytest.mark.extras


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
    after = contents(*buffers[:2])
    assert all(before[name] != after[name] for name in before)

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
    with refused(RuntimeError, "forward", layer, dy):
        layer.backward(dy)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 4, 5), (1, 3, 4, 5), (2, 3, 20), (2, 3, 5, 4), ()])
def test_dy_of_another_shape(backend: Backend, rng: np.random.Generator, shape: Any) -> None:
    layer = full_layer(backend)
    layer.forward(backend.array(normal(rng, (2, 3, 4, 5))))
    dy = backend.array(np.ones(shape, np.float32))
    with refused(ValueError, r"dy.*\(2, 3, 4, 5\)", layer, dy):
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
