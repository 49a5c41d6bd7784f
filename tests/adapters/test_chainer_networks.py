"""Networks with the Chainer adapter's links: training loops, gradient penalties; on a GPU the same tests with CuPy."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_allclose, assert_equal

if importlib.util.find_spec("chainer") is None:
    pytest.skip("needs Chainer (docs/guide/chainer.md)", allow_module_level=True)

from helpers.chainers import Send, host, normal

import cupynorm.chainer as cnc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # setuptools' on pkg_resources
    import chainer
    import chainer.functions as F  # noqa: N812
    import chainer.links as L  # noqa: N812
    from chainer import training
    from chainer.training import extensions

pytestmark = [pytest.mark.chainer, pytest.mark.usefixtures("seeded")]


# Training


class Net(chainer.Chain):
    """Two convolutions with normalisation between, and a linear layer on the channels' means."""

    def __init__(self, *, lazy: bool = False):
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 8, 3, nobias=True)
            self.norm1 = cnc.InstanceNormalization2D(None if lazy else 8, track_avg_stats=True)
            self.conv2 = L.Convolution2D(8, 8, 3, stride=2, nobias=True)
            self.norm2 = cnc.InstanceNormalization2D(None if lazy else 8)
            self.head = L.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.mean(F.relu(self.norm2(self.conv2(h))), (2, 3)))


def stripes(rng: np.random.Generator, count: int) -> chainer.datasets.TupleDataset:
    """Noisy images of waves along one axis or the other, at one brightness, so that averages can represent them."""
    labels = rng.integers(2, size=count).astype(np.int32)
    waves = np.sin(np.arange(12) * 1.2 + rng.random((count, 1)) * 6)
    images = np.where(labels[:, None, None] == 0, waves[:, None, :], waves[:, :, None])
    images = 2 + images + rng.normal(0, 0.1, images.shape)
    return chainer.datasets.TupleDataset(images[:, None].astype(np.float32), labels)


def make_trainer(
    send: Send, folder: Path, train: Any, test: Any, iterations: int, *, seed: int = 0, lazy: bool = False
) -> tuple[training.Trainer, Net]:
    np.random.seed(seed)
    classifier = L.Classifier(Net(lazy=lazy))
    send(classifier)
    optimizer = chainer.optimizers.Adam(alpha=0.03).setup(classifier)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-3))
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1.0))
    # The order of each epoch follows from the one before, so that a snapshot determines it.
    shift = np.random.RandomState(0).permutation(len(train))
    batches = chainer.iterators.SerialIterator(train, 16, order_sampler=lambda order, _: order[shift])
    updater = training.updaters.StandardUpdater(batches, optimizer, device=classifier.device)
    trainer = training.Trainer(updater, (iterations, "iteration"), out=str(folder))
    evaluation = chainer.iterators.SerialIterator(test, 16, repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(evaluation, classifier, device=classifier.device), trigger=(5, "iteration"))
    trainer.extend(extensions.ExponentialShift("alpha", 0.5), trigger=(50, "iteration"))
    trainer.extend(extensions.ParameterStatistics(classifier.predictor.norm1, trigger=(5, "iteration")))
    trainer.extend(extensions.LogReport(trigger=(5, "iteration")))
    trainer.extend(extensions.snapshot(filename="at-{.updater.iteration}"), trigger=(15, "iteration"))
    return trainer, classifier.predictor


def test_training_with_hooks_and_extensions(send: Send, rng: np.random.Generator, tmp_path: Path) -> None:
    trainer, net = make_trainer(send, tmp_path, stripes(rng, 160), stripes(rng, 64), 200, lazy=True)
    trainer.run()
    log = trainer.get_extension("LogReport").log
    assert log[-1]["main/loss"] < 0.7 * log[0]["main/loss"]
    assert log[-1]["validation/main/accuracy"] > 0.8
    for norm in (net.norm1, net.norm2):
        assert np.abs(host(norm.gamma) - 1).max() > 1e-2
        assert np.abs(host(norm.beta)).max() > 1e-2
    assert np.abs(host(net.norm1.avg_mean)).max() > 1e-2
    alpha = trainer.updater.get_optimizer("main").alpha
    assert alpha == pytest.approx(0.03 * 0.5**4)
    means = [entry["norm1/gamma/data/mean"] for entry in log]
    assert means[-1] != means[0]
    assert means[-1] == pytest.approx(host(net.norm1.gamma).mean(), abs=0.05)
    assert all(np.isfinite(entry["norm1/beta/grad/std"]) for entry in log)


@pytest.mark.parametrize("lazy", [True, False])
def test_resumed_equals_uninterrupted(send: Send, rng: np.random.Generator, tmp_path: Path, lazy: bool) -> None:
    """Bit for bit, across the end of an epoch; the links of the resumed trainer have a size or are lazy."""
    data = stripes(rng, 72), stripes(rng, 30)
    whole, expected = make_trainer(send, tmp_path / "whole", *data, 30)
    whole.run()
    first, _ = make_trainer(send, tmp_path / "parts", *data, 15)
    first.run()
    second, actual = make_trainer(send, tmp_path / "parts", *data, 30, seed=1, lazy=lazy)
    chainer.serializers.load_npz(str(tmp_path / "parts" / "at-15"), second)
    second.run()
    assert second.updater.iteration == 30
    states = [chainer.serializers.npz.serialize(trainer.updater) for trainer in (whole, second)]
    assert states[0].keys() == states[1].keys()
    assert "model:main/predictor/norm1/avg_mean" in states[0]
    for name, value in states[0].items():
        assert_equal(value, states[1][name], what=name)
    assert_equal(host(expected.norm1.avg_var), host(actual.norm1.avg_var))
    logs = [trainer.get_extension("LogReport").log for trainer in (whole, second)]
    for entries in zip(*logs, strict=True):
        # (Chainer's ParameterStatistics is not in its snapshots.)
        one, other = ({k: v for k, v in e.items() if not k.startswith(("elapsed", "norm1/"))} for e in entries)
        assert len(one) == 6 and "validation/main/loss" in one
        assert one == other


# Networks


class Critic(chainer.Chain):
    """Ends with a linear layer: Chainer's deconvolution_2d cannot compute the gradient for W alone."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 4, 4, 2, 1)
            self.norm1 = cnc.InstanceNormalization(4)
            self.conv2 = L.Convolution2D(4, 8, 4, 2, 1)
            self.norm2 = cnc.InstanceNormalization(8)
            self.head = L.Linear(8 * 4, 1)

    def forward(self, x: Any) -> Any:
        h = F.leaky_relu(self.norm1(self.conv1(x)))
        return self.head(F.leaky_relu(self.norm2(self.conv2(h))))


class SmallGenerator(chainer.Chain):
    """Upsamples and convolves."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.head = L.Linear(4, 8 * 4)
            self.conv1 = L.Convolution2D(8, 4, 3, 1, 1)
            self.norm1 = cnc.InstanceNormalization(4)
            self.conv2 = L.Convolution2D(4, 1, 3, 1, 1)

    def forward(self, z: Any) -> Any:
        h = F.reshape(F.relu(self.head(z)), (-1, 8, 2, 2))
        h = F.relu(self.norm1(self.conv1(F.unpooling_2d(h, 2, cover_all=False))))
        return self.conv2(F.unpooling_2d(h, 2, cover_all=False))


def penalty(critic: Any, x: Any) -> Any:
    """The gradient penalty of WGAN-GP (Gulrajani et al. 2017): pulls the critic's slope to 1."""
    (gradient,) = chainer.grad([critic(x)], [x], enable_double_backprop=True)
    return F.mean((F.sqrt(F.sum(gradient**2, (1, 2, 3))) - 1) ** 2)


def along(links: chainer.Link, loss: Callable[[], Any], rng: np.random.Generator, names: str) -> tuple[float, float]:
    """Derivatives of a loss along a random direction of the named parameters: by backward, and by differences."""
    parameters = [p for name, p in links.namedparams() if name.endswith(names)]
    links.cleargrads()
    loss().backward()
    directions = [rng.normal(size=p.shape) for p in parameters]
    size = np.sqrt(sum((d**2).sum() for d in directions))
    directions = [d / size for d in directions]  # short steps cross few kinks of relu
    # A parameter without a gradient does not train.
    analytic = sum(
        float((host(p.grad) * d).sum()) for p, d in zip(parameters, directions, strict=True) if p.grad is not None
    )
    values, kept = [], [p.array.copy() for p in parameters]
    for step in (1e-6, -1e-6, 0):
        for parameter, array, direction in zip(parameters, kept, directions, strict=True):
            parameter.array[...] = array + parameter.xp.asarray(step * direction)
        values.append(float(loss().array))
    return analytic, (values[0] - values[1]) / 2e-6


def test_gradient_penalty_against_differences(send: Send, rng: np.random.Generator) -> None:
    with chainer.using_config("dtype", np.dtype(np.float64)):
        critic = send(Critic())
    x = chainer.Variable(send(normal(rng, 3, 1, 8, 8, dtype=np.float64)))
    for names in ("conv1/W", "norm1/gamma", "norm2/gamma", "norm2/beta", "conv2/W"):
        analytic, numeric = along(critic, lambda: penalty(critic, x), rng, names)
        assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-6), names
        assert (numeric == 0) == (names == "norm2/beta")  # added before leaky_relu, whose slopes are constant


@pytest.mark.parametrize("dtype", ["float32", "mixed16"])
def test_wgan_gp(send: Send, rng: np.random.Generator, dtype: str) -> None:
    """Train the critic with the generator fixed, then the other way round: both losses fall."""
    with chainer.using_config("dtype", chainer.mixed16 if dtype == "mixed16" else np.dtype(dtype)):
        critic, generator = send(Critic()), send(SmallGenerator())
        storage = np.float16 if dtype == "mixed16" else np.float32
        z, real = send(normal(rng, 8, 4, dtype=storage)), send(normal(rng, 8, 1, 8, 8).cumsum(3).astype(storage))
        part = send(rng.random((8, 1, 1, 1)).astype(storage))
        between = chainer.Variable(part * real + (1 - part) * generator(z).array)

        def of_critic() -> Any:
            return F.mean(critic(generator(z).array)) - F.mean(critic(real)) + 10 * penalty(critic, between)

        def of_generator() -> Any:
            return -F.mean(critic(generator(z)))

        for model, loss_of in ((critic, of_critic), (generator, of_generator)):
            optimizer = chainer.optimizers.Adam(2e-3, beta1=0.5).setup(model)
            optimizer.use_fp32_update(dtype == "mixed16")
            scale = 2.0**-6 if dtype == "mixed16" else 1  # a penalty's gradients are sometimes large
            optimizer.set_loss_scale(scale)
            before = {name: host(p).copy() for name, p in model.namedparams()}
            losses = []
            for _ in range(30):
                loss = loss_of()
                model.cleargrads()
                loss.backward(loss_scale=scale)
                optimizer.update()
                losses.append(float(loss.array))
            assert np.isfinite(losses).all()
            # The median: a nearly constant plane has a steep slope, and the penalty is 10 or more for that one step.
            assert np.median(losses[-10:]) < losses[0] - 0.1
            for name, parameter in model.namedparams():
                if name.endswith(("W", "gamma", "beta")):  # normalisation cancels a bias before it
                    assert np.any(host(parameter) != before[name]), name
                assert np.isfinite(host(parameter)).all(), name


def test_chainers_deconvolution_fails_as_documented(rng: np.random.Generator) -> None:
    """If this fails, Chainer has fixed the bug: update cupynorm/chainer.py and docs/guide/chainer.md."""
    weights = chainer.Parameter(normal(rng, 3, 1, 3, 3))
    x = chainer.Variable(normal(rng, 2, 1, 6, 6))
    for convolution in (F.convolution_2d, F.convolution_nd):
        slope = penalty(lambda v: F.mean(convolution(v, weights), (1, 2, 3)), x)  # noqa: B023
        if convolution is F.convolution_nd:
            slope.backward()
        else:
            with pytest.raises(ValueError, match="not enough values to unpack"):
                slope.backward()


def generator_with(norm: str) -> Any:
    """Return the Generator of chainer_generator.py with another import of the link: one line is replaced."""
    path = Path(__file__).with_name("chainer_generator.py")
    line = "from chainer_forks import InstanceNormalization\n"
    source = path.read_text(encoding="utf-8")
    assert source.count(line) == source.count("import InstanceNormalization") == 1
    names: dict[str, Any] = {"__name__": f"generator with {norm}"}
    exec(compile(source.replace(line, f"{norm}\n"), str(path), "exec"), names)
    return names["Generator"]


FORKS = {
    "own gradient": "from chainer_forks import OwnGradient as InstanceNormalization",
    "batch of one": "from chainer_forks import BatchOfOne as InstanceNormalization",
}
OURS = "from cupynorm.chainer import InstanceNormalization"


@pytest.mark.parametrize("batch", [1, 3])
def test_generator_written_for_a_fork(send: Send, rng: np.random.Generator, batch: int) -> None:
    """With our link instead: the same values, and gradients that match differences where the forks' do not."""
    x = send(normal(rng, batch, 3, 16, 16, dtype=np.float64))
    target = send(normal(rng, batch, 3, 16, 16, dtype=np.float64))
    start: dict[str, np.ndarray] = {}
    outputs: dict[str, np.ndarray] = {}
    agree: dict[str, dict[str, bool]] = {}
    for name, norm in {"ours": OURS, **FORKS}.items():
        with chainer.using_config("dtype", np.dtype(np.float64)):
            net = generator_with(norm)()
        for path, parameter in net.namedparams():
            moved = host(parameter) + 0.3 * rng.normal(size=parameter.shape) * path.endswith(("gamma", "beta"))
            parameter.array[...] = start.setdefault(path, moved)
        send(net)
        outputs[name] = host(net(x)).copy()
        agree[name] = {}
        for names in ("head/convolution/W", "down2/norm/gamma", "first/norm/beta", "up1/convolution/W"):
            analytic, numeric = along(net, lambda: F.mean_squared_error(net(x), target), rng, names)  # noqa: B023
            agree[name][names] = analytic == pytest.approx(numeric, rel=1e-3, abs=1e-7)
    for name, norm in FORKS.items():
        assert_allclose(outputs[name], outputs["ours"], rtol=1e-8, atol=1e-8, what=norm)
    assert agree["ours"] == dict.fromkeys(agree["ours"], True)
    # One is wrong in batches, for all layers before a normalisation; the other trains no gamma and no beta.
    assert agree["own gradient"]["head/convolution/W"] == (batch == 1)
    assert agree["own gradient"]["down2/norm/gamma"] == (batch == 1)
    assert agree["batch of one"]["head/convolution/W"]
    assert not agree["batch of one"]["down2/norm/gamma"]
    assert not agree["batch of one"]["first/norm/beta"]


def test_generator_trains(send: Send, rng: np.random.Generator) -> None:
    net = send(generator_with(OURS)(blocks=1))
    optimizer = chainer.optimizers.Adam(5e-3).setup(net)
    x = send(normal(rng, 2, 3, 16, 16))
    target = F.tanh(x).array
    losses = []
    for _ in range(25):
        loss = F.mean_absolute_error(net(x), target)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(float(loss.array))
    assert losses[-1] < 0.8 * losses[0]
    gammas = [p for name, p in net.namedparams() if name.endswith("gamma")]
    assert len(gammas) == 7
    assert all(np.abs(host(p) - 1).max() > 1e-3 for p in gammas)
