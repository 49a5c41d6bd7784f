"""Training loops as people write them without a framework's help: each against the same loop in float64.

The network is small and real: a 1 × 1 convolution, the layer under test, a rectifier and a second convolution, with a
squared error. The reference is the same network and the same loop in the textbook's formulas and float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.backends import Backend
from helpers.compare import assert_allclose, assert_same
from helpers.optional import imported

import cupynorm as cn

torch = imported("torch")

CHANNELS, HIDDEN = 3, 6
NAMES = "first", "gamma", "beta", "second"


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "first": rng.standard_normal((HIDDEN, CHANNELS)),
        "gamma": rng.uniform(0.5, 1.5, HIDDEN),
        "beta": rng.uniform(-0.5, 0.5, HIDDEN),
        "second": rng.standard_normal((1, HIDDEN)) / HIDDEN,
    }


def as_stored(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What float32 makes of the weights, in float64."""
    return {name: value.astype(np.float32).astype(np.float64) for name, value in w.items()}


def batches(rng: np.random.Generator, count: int, size: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images, and what a network of this kind makes of them."""
    teacher = weights(rng)
    images = [as_stored({"x": rng.standard_normal((size, CHANNELS, 5, 6))})["x"] for _ in range(count)]
    return [(x, as_stored({"y": textbook(teacher, x)[0]})["y"]) for x in images]


def convolve(w: Any, x: Any) -> Any:
    """(O, C), (N, C, H, W) -> (N, O, H, W)."""
    return (w @ x.reshape(*x.shape[:2], -1)).reshape(x.shape[0], w.shape[0], *x.shape[2:])


def convolve_back(w: Any, x: Any, dy: Any) -> tuple[Any, Any]:
    """dx, dw."""
    planes, gradient = x.reshape(*x.shape[:2], -1), dy.reshape(*dy.shape[:2], -1)
    return (w.T @ gradient).reshape(x.shape), (gradient @ planes.transpose(0, 2, 1)).sum(0)


def textbook(w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, Callable[..., dict[str, np.ndarray]]]:
    """The network's output, and a function from its gradient to those of the weights; all of it in float64."""
    h = convolve(w["first"], x)
    centred = h - h.mean((2, 3), keepdims=True)
    deviation = np.sqrt((centred**2).mean((2, 3), keepdims=True) + 1e-5)
    xhat = centred / deviation
    z = xhat * w["gamma"][:, None, None] + w["beta"][:, None, None]
    y = convolve(w["second"], z * (z > 0))

    def gradients(dy: np.ndarray) -> dict[str, np.ndarray]:
        dz, dsecond = convolve_back(w["second"], z * (z > 0), dy)
        dz = dz * (z > 0)
        dxhat = dz * w["gamma"][:, None, None]
        mean = dxhat.mean((2, 3), keepdims=True), (dxhat * xhat).mean((2, 3), keepdims=True)
        dfirst = convolve_back(w["first"], x, (dxhat - mean[0] - xhat * mean[1]) / deviation)[1]
        return {"first": dfirst, "gamma": (dz * xhat).sum((0, 2, 3)), "beta": dz.sum((0, 2, 3)), "second": dsecond}

    return y, gradients


class Network:
    """The same network with the layer: explicit forward and backward over arrays that stay where they are."""

    def __init__(self, w: dict[str, np.ndarray], backend: Backend | None = None, **kwargs: Any):
        self.array = backend.array if backend else np.asarray
        self.norm = cn.InstanceNorm2d(
            HIDDEN, affine=True, activation="relu", device=backend.device if backend else "cpu", **kwargs
        )
        self.norm.weight.data, self.norm.bias.data = (self.array(w[k].astype(np.float32)) for k in ("gamma", "beta"))
        self.first = cn.Parameter(self.array(w["first"].astype(np.float32)))
        self.second = cn.Parameter(self.array(w["second"].astype(np.float32)))

    def params(self) -> list[cn.Parameter]:
        return [self.first, *self.norm.params(), self.second]

    def forward(self, x: Any) -> Any:
        self.x = x
        self.h = self.norm.forward(convolve(self.first.data, x))
        return convolve(self.second.data, self.h)

    def backward(self, dy: Any) -> None:
        dh, dsecond = convolve_back(self.second.data, self.h, dy)
        _, dfirst = convolve_back(self.first.data, self.x, self.norm.backward(dh))
        for parameter, gradient in ((self.first, dfirst), (self.second, dsecond)):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient


def loss_and_gradients(
    w: dict[str, np.ndarray], examples: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, dict[str, np.ndarray]]:
    """The sum over batches of the mean squared error, and of its gradients, by the textbook."""
    loss, total = 0.0, {name: np.zeros_like(value) for name, value in w.items()}
    for x, target in examples:
        y, gradients = textbook(w, x)
        loss += ((y - target) ** 2).mean()
        total = {name: total[name] + g for name, g in gradients(2 * (y - target) / y.size).items()}
    return loss, total


def loss_and_backward(network: Network, x: np.ndarray, target: np.ndarray) -> float:
    difference = network.forward(network.array(x.astype(np.float32))) - network.array(target.astype(np.float32))
    network.backward(2 * difference / difference.size)
    return float((difference**2).mean())


def check(
    actual: dict[str, Any], expected: dict[str, np.ndarray], losses: list[float], expected_losses: list[float]
) -> None:
    """The same numbers as the reference, and a loss that falls."""
    assert_allclose(losses, expected_losses, rtol=1e-3)
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    for name, value in expected.items():
        assert_allclose(actual[name], value, rtol=1e-3, atol=1e-4, what=name)


def test_lists_of_parameters_and_gradients(backend: Backend, rng: np.random.Generator) -> None:
    """Lists made once; gradients of several batches are added up, then an optimiser with momentum walks the lists."""
    w, data = weights(rng), batches(rng, 4)
    network = Network(w, backend)
    for parameter in network.params():
        parameter.zerograd()
    params, grads = [p.data for p in network.params()], [p.grad for p in network.params()]
    velocities, losses = [0 * p for p in params], []
    for step in range(16):
        losses.append(sum(loss_and_backward(network, *data[i]) for i in (step % 2, 2 + step % 2)))
        for i in range(len(params)):
            velocities[i] *= 0.7
            velocities[i] -= 0.02 * grads[i]
            params[i] += velocities[i]
            grads[i][...] = 0
    assert all(p.data is a and p.grad is g for p, a, g in zip(network.params(), params, grads, strict=True))

    expected, still, expected_losses = as_stored(w), dict.fromkeys(w, np.zeros(())), []
    for step in range(16):
        loss, total = loss_and_gradients(expected, [data[step % 2], data[2 + step % 2]])
        expected_losses.append(loss)
        still = {k: 0.7 * still[k] - 0.02 * total[k] for k in w}
        expected = {k: expected[k] + still[k] for k in w}
    check(dict(zip(NAMES, map(backend.host, params), strict=True)), expected, losses, expected_losses)


def test_dicts_of_arrays(backend: Backend, rng: np.random.Generator) -> None:
    """Parameters, gradients and an optimiser's moments by name, made once and updated in place: Adam."""
    w, data = weights(rng), batches(rng, 3)
    network = Network(w, backend)
    params = dict(zip(NAMES, (p.data for p in network.params()), strict=True))
    first, second = ({name: 0 * p for name, p in params.items()} for _ in range(2))
    losses = []
    for step in range(24):
        for p in network.params():
            p.cleargrad()
        losses.append(loss_and_backward(network, *data[step % 3]))
        for name, p in zip(NAMES, network.params(), strict=True):
            first[name] += 0.1 * (p.grad - first[name])
            second[name] += 0.001 * (p.grad**2 - second[name])
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            params[name] -= 0.05 * mean / (square**0.5 + 1e-3)
    assert all(p.data is params[name] for name, p in zip(NAMES, network.params(), strict=True))

    expected, expected_losses = as_stored(w), []
    m, v = (dict.fromkeys(w, np.zeros(())) for _ in range(2))
    for step in range(24):
        loss, g = loss_and_gradients(expected, [data[step % 3]])
        expected_losses.append(loss)
        m = {k: 0.9 * m[k] + 0.1 * g[k] for k in w}
        v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in w}
        unbiased = {k: (m[k] / (1 - 0.9 ** (step + 1)), v[k] / (1 - 0.999 ** (step + 1))) for k in w}
        expected = {k: expected[k] - 0.05 * a / (np.sqrt(b) + 1e-3) for k, (a, b) in unbiased.items()}
    check({k: backend.host(p) for k, p in params.items()}, expected, losses, expected_losses)


def test_frameworks_that_overwrite_gradients(rng: np.random.Generator) -> None:
    """Two workers with half of the batch each; the averaged, clipped gradient is put in the place of their own.

    Together they take the steps of one worker with the whole batch; planes know nothing of the rest of the batch.
    """
    w, data = weights(rng), batches(rng, 2, size=4)
    workers, losses = [Network(w), Network(w)], []
    for step in range(16):
        x, target = (a.astype(np.float32) for a in data[step % 2])
        losses.append(sum(loss_and_backward(n, x[i::2], target[i::2]) / 2 for i, n in enumerate(workers)))
        average = [sum(p.grad for p in pair) / 2 for pair in zip(*(n.params() for n in workers), strict=True)]
        norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in average))
        for network in workers:
            for p, gradient in zip(network.params(), average, strict=True):
                p.grad = gradient * min(1, 2 / norm)  # float64
                p.data -= 0.05 * p.grad
            for p in network.params():
                p.cleargrad()

    expected, expected_losses = as_stored(w), []
    for step in range(16):
        loss, g = loss_and_gradients(expected, [data[step % 2]])
        expected_losses.append(loss)
        norm = np.sqrt(sum((v**2).sum() for v in g.values()))
        expected = {k: expected[k] - 0.05 * g[k] * min(1, 2 / norm) for k in w}
    for network in workers:
        check(dict(zip(NAMES, (p.data for p in network.params()), strict=True)), expected, losses, expected_losses)


def test_output_and_cache(backend: Backend, rng: np.random.Generator) -> None:
    """Functions from arrays to (output, cache) and from (gradient, cache) to gradients; new arrays in the dict."""
    w, data = weights(rng), batches(rng, 2)
    params = {k: backend.array(v.astype(np.float32)) for k, v in w.items()}
    losses = []
    for step in range(16):
        x, target = (backend.array(a.astype(np.float32)) for a in data[step % 2])
        h, cache = cn.instance_norm_forward(
            convolve(params["first"], x), params["gamma"], params["beta"], activation="relu"
        )
        difference = convolve(params["second"], h) - target
        losses.append(float((difference**2).mean()))
        grads = {}
        dh, grads["second"] = convolve_back(params["second"], h, 2 * difference / difference.size)
        dh, grads["gamma"], grads["beta"] = cn.instance_norm_backward(dh, cache)
        _, grads["first"] = convolve_back(params["first"], x, dh)
        params = {k: p - 0.05 * grads[k] for k, p in params.items()}

    expected, expected_losses = as_stored(w), []
    for step in range(16):
        loss, g = loss_and_gradients(expected, [data[step % 2]])
        expected_losses.append(loss)
        expected = {k: expected[k] - 0.05 * g[k] for k in w}
    check({k: backend.host(p) for k, p in params.items()}, expected, losses, expected_losses)


def test_one_vector_of_parameters(rng: np.random.Generator) -> None:
    """An optimiser of vectors (as SciPy's are) sees a function of one float64 vector: nonlinear conjugate gradients."""
    w, data = weights(rng), batches(rng, 1)
    network = Network(w)
    shapes = [p.shape for p in network.params()]
    borders = np.cumsum([np.prod(shape) for shape in shapes])[:-1]

    def ours(theta: np.ndarray) -> tuple[float, np.ndarray]:
        for p, part in zip(network.params(), np.split(theta, borders), strict=True):
            p.data = part.reshape(p.shape)
            p.cleargrad()
        loss = loss_and_backward(network, *(a.astype(np.float32) for a in data[0]))
        return loss, np.concatenate([p.grad.ravel() for p in network.params()]).astype(float)

    def theirs(theta: np.ndarray) -> tuple[float, np.ndarray]:
        parts = (part.reshape(shape) for part, shape in zip(np.split(theta, borders), shapes, strict=True))
        loss, g = loss_and_gradients(dict(zip(NAMES, parts, strict=True)), data)
        return loss, np.concatenate([g[name].ravel() for name in NAMES])

    def minimised(function: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> tuple[np.ndarray, list[float]]:
        theta = np.concatenate([as_stored(w)[name].ravel() for name in NAMES])
        direction, losses, before = np.zeros_like(theta), [], 1.0
        for _ in range(12):
            loss, gradient = function(theta)
            losses.append(loss)
            direction = min(1.0, gradient @ gradient / before) * 0.5 * direction - gradient
            before = gradient @ gradient
            theta = theta + 0.05 * direction
        return theta, losses

    (actual, losses), (expected, expected_losses) = minimised(ours), minimised(theirs)
    check({"theta": actual}, {"theta": expected}, losses, expected_losses)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
def test_several_forwards_before_their_backwards(backend: Backend, rng: np.random.Generator, order: list[int]) -> None:
    """Shared weights, pipelines, recurrence: each backward is told which forward it belongs to."""
    w, data = weights(rng), batches(rng, 3)
    network, inputs = Network(w, backend), [backend.array(x.astype(np.float32)) for x, _ in data]
    norm = network.norm
    outputs, kept = [], []
    for x in inputs:
        outputs.append(norm(convolve(network.first.data, x)))
        kept.append(norm.saved)
    dys = [rng.standard_normal(h.shape).astype(np.float32) for h in outputs]
    dx = {i: backend.host(norm.backward(backend.array(dys[i]), saved=kept[i])) for i in order}
    alone = Network(w, backend)
    for i in range(3):
        alone.norm(convolve(alone.first.data, inputs[i]))
        assert_same(dx[i], backend.host(alone.norm.backward(backend.array(dys[i]))))
    for p, q in zip(norm.params(), alone.norm.params(), strict=True):
        assert_allclose(backend.host(p.grad), backend.host(q.grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved", [0, (), (1, 2), "x", cn.instance_norm_forward(np.ones((2, HIDDEN, 5, 6)))])
def test_foreign_saved_is_refused(rng: np.random.Generator, saved: Any) -> None:
    norm = Network(weights(rng)).norm
    x = rng.standard_normal((2, HIDDEN, 5, 6)).astype(np.float32)
    norm(x)
    with pytest.raises(TypeError, match="saved must be the layer's"):
        norm.backward(x, saved=saved)
    assert norm.weight.grad is None and norm.bias.grad is None


def test_zerograds(backend: Backend) -> None:
    norm = cn.InstanceNorm2d(3, affine=True, device=backend.device)
    norm.weight.data = [np.nan, np.inf, 1]
    norm.zerograds()
    grads = [p.grad for p in norm.params()]
    assert [backend.host(g).tolist() for g in grads] == [[0, 0, 0]] * 2
    assert [g.dtype for g in grads] == [np.float32] * 2
    grads[0] += np.float32(3)
    norm.zerograds()
    assert [p.grad is g for p, g in zip(norm.params(), grads, strict=True)] == [True, True]
    assert [backend.host(g).tolist() for g in grads] == [[0, 0, 0]] * 2
    assert backend.host(norm.weight.data)[2] == 1
    cn.InstanceNorm2d(3, device=backend.device).zerograds()


@pytest.mark.extras
@pytest.mark.skipif(torch is None, reason="needs PyTorch")
@pytest.mark.parametrize("optimiser", ["SGD", "Adam"])
def test_the_same_loop_in_torch(rng: np.random.Generator, optimiser: str) -> None:
    """PyTorch's optimisers over the layer's own memory, and over a module's: the same path."""
    w, data = weights(rng), batches(rng, 2)
    network = Network(w, track_running_stats=True)
    ours = [torch.from_numpy(p.data) for p in network.params()]
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(CHANNELS, HIDDEN, 1, bias=False),
        torch.nn.InstanceNorm2d(HIDDEN, affine=True, track_running_stats=True),
        torch.nn.ReLU(),
        torch.nn.Conv2d(HIDDEN, 1, 1, bias=False),
    )
    with torch.no_grad():
        for p, value in zip(theirs.parameters(), ours, strict=True):
            p.copy_(value.reshape(p.shape))
    steps = [getattr(torch.optim, optimiser)(p, lr=0.02) for p in (ours, theirs.parameters())]
    losses: list[list[float]] = [[], []]
    for step in range(24):
        x, target = (a.astype(np.float32) for a in data[step % 2])
        for p in network.params():
            p.cleargrad()
        losses[0].append(loss_and_backward(network, x, target))
        for p, tensor in zip(network.params(), ours, strict=True):
            tensor.grad = torch.from_numpy(p.grad)
        steps[1].zero_grad()
        loss = torch.nn.functional.mse_loss(theirs(torch.from_numpy(x)), torch.from_numpy(target))
        loss.backward()
        losses[1].append(loss.item())
        for s in steps:
            s.step()
    expected = [p.detach().numpy().reshape(q.shape) for p, q in zip(theirs.parameters(), network.params(), strict=True)]
    check(
        dict(zip(NAMES, (p.data for p in network.params()), strict=True)),
        dict(zip(NAMES, expected, strict=True)), losses[0], losses[1],
    )  # fmt: skip
    for name in ("running_mean", "running_var"):
        assert_allclose(getattr(network.norm, name), getattr(theirs[1], name), rtol=1e-3, atol=1e-4)
