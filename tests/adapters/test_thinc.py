"""The layer for thinc: against the reference, with thinc's optimisers, layers, files, copies and threads."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.compare import Bits, assert_allclose, assert_equal, assert_same
from helpers.faults import Faults, ending, handled
from helpers.reference import assert_close

from cupynorm import devices

thinc = pytest.importorskip("thinc.api")
import cupynorm.thinc  # noqa: E402
from cupynorm.thinc import InstanceNorm  # noqa: E402

pytestmark = pytest.mark.extras

SHAPES = {1: (4, 3, 20), 2: (4, 3, 5, 6), 3: (4, 3, 2, 3, 7)}

OPS = pytest.mark.parametrize("ops", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Any:
    made = thinc.NumpyOps() if request.param == "numpy" else thinc.CupyOps()
    with thinc.use_ops(made.name):
        yield made


def made(ops: Any, rank: int = 2, **kwargs: Any) -> Any:
    """An initialized layer with parameters and statistics of its own."""
    model = InstanceNorm(rank, **kwargs)
    model.initialize(X=ops.asarray(np.ones(SHAPES[rank], np.float32)))
    rng = np.random.default_rng(5)
    for name in model.param_names:
        model.set_param(name, ops.asarray(rng.uniform(0.5, 2, 3).astype(np.float32)))
    return model


def params(model: Any) -> dict[str, np.ndarray]:
    return {name: devices.to_host(model.get_param(name)).copy() for name in model.param_names}


def kept(arrays: dict[str, np.ndarray]) -> dict[str, Bits]:
    return {name: Bits(array) for name, array in arrays.items()}


def normal(rng: np.random.Generator, shape: tuple[int, ...] = SHAPES[2]) -> np.ndarray:
    return (2 * rng.standard_normal(shape) + 1).astype(np.float32)


@OPS
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("is_train", [True, False])
def test_against_the_reference(
    ops: Any, rng: np.random.Generator, rank: int, affine: bool, track: bool, is_train: bool
) -> None:
    model = made(ops, rank, affine=affine, track_running_stats=track, eps=1e-3, momentum=0.3, activation="silu")
    x, dy = normal(rng, SHAPES[rank]), normal(rng, SHAPES[rank])
    before = params(model)
    y, backprop = model(ops.asarray(x), is_train=is_train)
    dx = backprop(ops.asarray(dy))
    running = (before["running_mean"], before["running_var"]) if track and not is_train else None
    given = {"weight": before.get("G"), "bias": before.get("b"), "eps": 1e-3, "running": running, "activation": "silu"}
    assert_close(ops.to_numpy(y), reference.forward(x, **given))
    expected = reference.backward(dy, x, **given)
    assert_close(ops.to_numpy(dx), expected[0])
    assert set(model.grad_names) == ({"G", "b"} if affine else set())
    for name, gradient in zip(model.grad_names, expected[1:], strict=False):
        assert_allclose(ops.to_numpy(model.get_grad(name)), gradient.astype(float), rtol=1e-4, atol=1e-4)
    after = params(model)
    if track and is_train:
        moved = reference.moved(before.pop("running_mean"), before.pop("running_var"), x, 0.3)
        assert_close(after.pop("running_mean"), moved[0])
        assert_close(after.pop("running_var"), moved[1])
    assert kept(after) == kept(before)
    assert_equal(ops.to_numpy(model.predict(ops.asarray(x))).shape, x.shape)


@OPS
def test_float16(ops: Any, rng: np.random.Generator) -> None:
    model, x = made(ops), normal(rng).astype(np.float16)
    y, backprop = model(ops.asarray(x), is_train=True)
    dx = backprop(y)
    before = params(model)
    assert_close(ops.to_numpy(y), reference.forward(x, before["G"], before["b"]))
    assert dx.dtype == y.dtype == np.float16
    assert model.get_grad("G").dtype == np.float32


@OPS
def test_gradients_add_up(ops: Any, rng: np.random.Generator) -> None:
    model, x = made(ops), ops.asarray(normal(rng))
    y, backprop = model.begin_update(x)
    backprop(y)
    once = ops.to_numpy(model.get_grad("G")).copy()
    backprop(y)
    assert_equal(ops.to_numpy(model.get_grad("G")), 2 * once)


# Training


def scaled(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of two textures, skewed bright or dark, of any brightness and contrast; and their one-hot labels."""
    kind = rng.integers(0, 2, count)
    noise = rng.exponential(1, (count, 3, 6, 6)) * (2 * kind - 1)[:, None, None, None]
    pictures = noise * rng.uniform(0.2, 5, (count, 1, 1, 1)) + rng.uniform(-5, 5, (count, 1, 1, 1))
    return pictures.astype(np.float32), np.eye(2, dtype=np.float32)[kind]


def pooled() -> Any:
    """Means over the planes: (N, C, H, W) -> (N, C)."""

    def forward(model: Any, X: Any, is_train: bool) -> Any:  # noqa: N803
        shape = X.shape

        def backprop(dY: Any) -> Any:  # noqa: N803
            return model.ops.xp.broadcast_to(dY[:, :, None, None] / (shape[2] * shape[3]), shape).astype(dY.dtype)

        return X.mean((2, 3)), backprop

    return thinc.Model("pool", forward)


@OPS
@pytest.mark.parametrize("optimiser", ["Adam", "RAdam", "SGD"])
@pytest.mark.parametrize("track", [True, False])
def test_chain_learns(ops: Any, rng: np.random.Generator, optimiser: str, track: bool) -> None:
    """A classifier of thinc's layers and ours, with sizes inferred from the data, trained by thinc's optimisers."""
    thinc.fix_random_seed(int(rng.integers(2**31)))
    model = thinc.chain(
        InstanceNorm(2, track_running_stats=track, activation="relu"), pooled(), thinc.Linear(8), thinc.Softmax()
    )
    x, target = (ops.asarray(a) for a in scaled(rng, 64))
    model.initialize(X=x, Y=target)
    norm = model.layers[0]
    assert (norm.get_dim("nI"), norm.get_dim("nO"), model.get_dim("nO")) == (3, 3, 2)
    start = params(norm)
    optimizer = getattr(thinc, optimiser)(0.05 if optimiser != "SGD" else 0.3)
    losses = []
    for _ in range(50):
        y, backprop = model.begin_update(x)
        difference = (y - target) / len(target)
        losses.append(float((difference**2).sum()))
        backprop(difference)
        model.finish_update(optimizer)
    assert losses[-1] < (0.9 if optimiser == "Adam" else 1) * losses[0], losses
    after = params(norm)
    for name in ("G", "b"):
        assert (after[name] != start[name]).any()
        assert (norm.id, name) in optimizer.averages
    assert not any((norm.id, name) in optimizer.averages for name in ("running_mean", "running_var"))
    with model.use_params(optimizer.averages):
        assert_equal(norm.get_param("G"), optimizer.averages[norm.id, "G"])
        averaged = model.predict(x)
    assert kept(params(norm)) == kept(after)
    assert bool((averaged != model.predict(x)).any())


@OPS
def test_training_loop_matches_the_reference(ops: Any, rng: np.random.Generator) -> None:
    """Plain gradient descent by thinc, and by the reference in extended precision."""
    model = made(ops)
    x, target = normal(rng), normal(rng)
    weight, bias = (params(model)[name].astype(np.longdouble) for name in ("G", "b"))
    optimizer = thinc.SGD(0.5, L2=0, grad_clip=0, use_averages=False)
    losses = []
    for _ in range(8):
        y, backprop = model.begin_update(ops.asarray(x))
        difference = (y - ops.asarray(target)) / target.size
        losses.append(float((difference**2).sum()))
        backprop(difference)
        model.finish_update(optimizer)
        expected = (reference.forward(x, weight, bias) - target) / target.size
        _, dweight, dbias, _ = reference.backward(expected, x, weight)
        weight, bias = weight - 0.5 * dweight, bias - 0.5 * dbias
    assert losses == sorted(losses, reverse=True)
    assert_close(params(model)["G"], weight)
    assert_close(params(model)["b"], bias)


@OPS
def test_backprop_has_its_own_state(ops: Any, rng: np.random.Generator) -> None:
    """Changes of the model between a forward and its backprop do not change the backprop."""
    x, dy = ops.asarray(normal(rng)), ops.asarray(normal(rng))
    calm, stirred = (made(ops, track_running_stats=True, activation="relu") for _ in range(2))
    expected = ops.to_numpy(calm.begin_update(x)[1](dy))
    _, backprop = stirred.begin_update(x)
    y, other = stirred.begin_update(3 * x[:1])
    other(y)
    stirred.finish_update(thinc.Adam(0.5))
    for name in stirred.param_names:
        param = stirred.get_param(name)
        param *= -7
    assert_same(ops.to_numpy(backprop(dy)), expected)


# Saving and copying


@OPS
@pytest.mark.parametrize("how", ["bytes", "disk", "dict"])
def test_saved_and_loaded(ops: Any, rng: np.random.Generator, tmp_path: Path, how: str) -> None:
    model = made(ops, track_running_stats=True, eps=1e-2, activation="gelu")
    x = ops.asarray(normal(rng))
    model.begin_update(x)
    other = thinc.chain(InstanceNorm(2, track_running_stats=True), InstanceNorm(2, affine=False))  # never initialized
    whole = thinc.chain(model, InstanceNorm(2, affine=False))
    if how == "bytes":
        other.from_bytes(whole.to_bytes())
    elif how == "disk":
        whole.to_disk(tmp_path / "model")
        other.from_disk(tmp_path / "model")
    else:
        other.from_dict(whole.to_dict())
    assert other.to_bytes() == whole.to_bytes()
    loaded = other.layers[0]
    assert loaded.get_dim("nI") == 3
    assert loaded.attrs == model.attrs
    assert kept(params(loaded)) == kept(params(model))
    assert_same(ops.to_numpy(other.predict(x)), ops.to_numpy(whole.predict(x)))
    model.begin_update(x)  # nothing is shared
    assert (params(loaded)["running_mean"] != params(model)["running_mean"]).all()


def test_files_of_another_size_change_nothing() -> None:
    ops = thinc.NumpyOps()
    model, other = made(ops, track_running_stats=True), InstanceNorm(2, 4, track_running_stats=True).initialize()
    before = params(model)
    assert not model.can_from_bytes(other.to_bytes())
    with pytest.raises(ValueError, match="nI"):
        model.from_bytes(other.to_bytes())
    assert kept(params(model)) == kept(before)


@OPS
def test_copies(ops: Any, rng: np.random.Generator) -> None:
    model = made(ops, track_running_stats=True)
    x = ops.asarray(normal(rng))
    y, backprop = model.begin_update(x)
    backprop(y)
    copied = model.copy()
    assert copied.id != model.id
    assert kept(params(copied)) == kept(params(model))
    before = params(model)
    copied.begin_update(x)[1](y)
    copied.finish_update(thinc.Adam(0.1))
    assert kept(params(model)) == kept(before)
    assert all((value != before[name]).all() for name, value in params(copied).items())


@pytest.mark.gpu
def test_moving_between_devices(rng: np.random.Generator) -> None:
    model = made(thinc.NumpyOps(), track_running_stats=True)
    x, before = normal(rng), params(model)
    expected = model.predict(x)
    model.to_gpu(0)
    assert {type(model.get_param(name)).__module__.partition(".")[0] for name in model.param_names} == {"cupy"}
    assert_close(devices.to_host(model.predict(model.ops.asarray(x))), expected)
    model.to_cpu()
    assert kept(params(model)) == kept(before)


# Threads


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads switch as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
def test_threads_share_a_model(rng: np.random.Generator) -> None:
    """Each thread gets the results of its own calls; no gradient and no update of a statistic is lost."""
    threads, rounds, momentum = 4, 25, 0.02
    ops = thinc.NumpyOps()
    model, alone = (made(ops, track_running_stats=True, momentum=momentum) for _ in range(2))
    x = normal(rng)
    inputs = [x * np.float32(2.0**i) for i in range(threads)]
    expected = [alone.predict(v) for v in inputs], [alone.begin_update(v)[0] for v in inputs]
    wrong: list[str] = []
    start = threading.Barrier(threads)

    def work(i: int) -> None:
        start.wait()
        for _ in range(rounds):
            y, backprop = model(inputs[i], is_train=True)
            dx = backprop(y)
            if Bits(y) != Bits(expected[1][i]) or not np.isfinite(dx).all():
                wrong.append(f"thread {i}")

    own = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    assert wrong == []
    single = made(ops)
    for v in inputs:
        y, backprop = single.begin_update(v)
        backprop(y)
    assert_allclose(model.get_grad("G"), rounds * single.get_grad("G"), rtol=1e-4)
    # For any order of updates, the share of the initial value is known, and the rest comes from the inputs.
    kept = (1 - momentum) ** (threads * rounds)
    first = params(made(ops, track_running_stats=True))
    means, variances = zip(*(reference.moved(np.zeros(3), np.zeros(3), v, 1) for v in inputs), strict=True)
    for name, values in (("running_mean", means), ("running_var", variances)):
        left = model.get_param(name) - kept * first[name]
        low, high = (1 - kept) * np.min(values, 0), (1 - kept) * np.max(values, 0)
        assert ((left >= low - 1e-3 * abs(low)) & (left <= high + 1e-3 * abs(high))).all()


@pytest.mark.usefixtures("restless")
def test_threads_lose_no_update_of_statistics(rng: np.random.Generator) -> None:
    ops = thinc.NumpyOps()
    model, x = made(ops, track_running_stats=True, momentum=0.01), normal(rng)
    before = params(model)

    def work() -> None:
        for _ in range(20):
            model.begin_update(x)

    own = [threading.Thread(target=work) for _ in range(5)]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    kept, moved = 0.99**100, reference.moved(np.zeros(3), np.zeros(3), x, 1)
    for name, value in zip(("running_mean", "running_var"), moved, strict=True):
        expected = kept * before[name] + (1 - kept) * value.astype(float)
        assert_allclose(model.get_param(name), expected, rtol=1e-4)


def test_signal_handler_may_call_the_model(rng: np.random.Generator) -> None:
    """Also during changes, and in thinc's own code for them: no update of a statistic and no gradient is lost."""
    ops, x = thinc.NumpyOps(), normal(rng)
    folder = str(Path(thinc.__file__).parent)

    def called(model: Any) -> None:
        y, backprop = model(x, is_train=True)
        backprop(y)

    twice = made(ops, track_running_stats=True)
    called(twice)
    called(twice)
    number, finished = 0, False
    while not finished:
        number += 1
        model = made(ops, track_running_stats=True)
        fault = Faults(number)
        with ending(), handled(fault, lambda model=model: called(model), folder):
            called(model)
        finished = fault.count < number
        if finished:
            called(model)
        assert kept(params(model)) == kept(params(twice)), f"handler at point {number}"
        for name in ("G", "b"):
            assert_same(model.get_grad(name), twice.get_grad(name))
    assert number > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_during_a_change(rng: np.random.Generator) -> None:
    """In the child, the lock is held for ever by a thread that exists only in the parent."""
    model, x = made(thinc.NumpyOps(), track_running_stats=True), normal(rng)
    held, over = threading.Event(), threading.Event()

    def change() -> None:
        held.set()
        over.wait(60)

    other = threading.Thread(target=cupynorm.thinc._changes.make, args=(change,))
    other.start()
    held.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(30)
        before = kept(params(model))
        model.begin_update(x)
        os._exit(kept(params(model)) == before)
    over.set()
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"nd": 0}, ValueError), ({"nd": 2.0}, TypeError), ({"nd": 2, "nI": -1}, ValueError),
        ({"nd": 2, "eps": -1.0}, ValueError), ({"nd": 2, "momentum": "much"}, TypeError),
        ({"nd": 2, "activation": "tanh"}, ValueError), ({"nd": 2, "negative_slope": np.nan}, ValueError),
    ],
)  # fmt: skip
def test_invalid_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        InstanceNorm(**arguments)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: x[0], ValueError, r"X must be \(N, 3, d0, d1\), got shape \(3, 5, 6\)"),
        (lambda x: x[:, :2], ValueError, r"X must be \(N, 3, d0, d1\)"),
        (lambda x: x[..., None], ValueError, r"X must be \(N, 3, d0, d1\)"),
        (lambda x: x.astype(np.float64), TypeError, "float64"),
        (lambda x: x.tolist(), TypeError, r"numpy\.asarray"),
        (lambda x: x[:, :, :1, :1], ValueError, "spatial"),
    ],
)
def test_invalid_inputs(rng: np.random.Generator, make: Any, error: type[Exception], words: str) -> None:
    model = made(thinc.NumpyOps(), track_running_stats=True)
    before = params(model)
    with pytest.raises(error, match=words):
        model.begin_update(make(normal(rng)))
    y, backprop = model.begin_update(normal(rng)[:0])  # no samples: no statistics
    assert y.shape == backprop(y).shape == (0, 3, 5, 6)
    assert kept(params(model)) == kept(before)
    _, backprop = model.begin_update(normal(rng))
    grad = model.get_grad("G").copy()
    with pytest.raises((TypeError, ValueError), match="dy"):
        backprop(make(normal(rng)))
    assert_same(model.get_grad("G"), grad)


def test_layer_of_unknown_size() -> None:
    model = InstanceNorm(2)
    with pytest.raises(ValueError, match="call initialize"):
        model.predict(np.ones(SHAPES[2], np.float32))
    with pytest.raises(ValueError, match="nI"):
        model.initialize()
    with pytest.raises(ValueError, match="X must be"):
        model.initialize(X=np.ones((2, 3, 4), np.float32))
    assert model.has_dim("nI") is None and not any(map(model.has_param, model.param_names))
    model.initialize(X=np.ones(SHAPES[2], np.float32))
    with pytest.raises(ValueError, match=r"X must be \(N, 3, d0, d1\)"):
        model.initialize(X=np.ones((2, 4, 5, 6), np.float32))
    assert InstanceNorm(2, 4).initialize().get_param("G").tolist() == [1] * 4
    plain = InstanceNorm(2, affine=False)
    assert (
        plain.predict(np.ones(SHAPES[2])).tolist() == np.zeros(SHAPES[2]).tolist()
    )  # float64, any size, no initialize


# thinc's conventions


def test_thinc_validates_its_data(rng: np.random.Generator) -> None:
    x = normal(rng)
    with thinc.data_validation(True):
        thinc.chain(InstanceNorm(2), pooled(), thinc.Linear(2)).initialize(X=x, Y=x[:, :2, 0, 0])


def test_config_file() -> None:
    try:
        points = importlib.metadata.distribution("cupynorm").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cupynorm is not installed")
    assert [p.load() for p in points.select(group="thinc_layers")] == [InstanceNorm]
    config = thinc.Config().from_str('[model]\n@layers = "cupynorm.InstanceNorm.v1"\nnd = 3\neps = 0.001\n')
    model = thinc.registry.resolve(config)["model"]
    assert (model.name, model.attrs["nd"], model.attrs["eps"]) == ("instancenorm", 3, 0.001)
