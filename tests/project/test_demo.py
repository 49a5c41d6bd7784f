"""The training example: gradients, its claims on brightness and contrast, equal numbers for a seed, the command."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.compare import assert_allclose, assert_equal

from cupynorm import demo, devices
from cupynorm.__main__ import main

needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "rich", "sklearn")),
    reason="needs cupynorm[demo]",
)


def loss_of(network: demo.Network, x: np.ndarray, labels: np.ndarray) -> float:
    return float(demo.cross_entropy(network.forward(x), labels)[0])


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_of_the_whole_network(normalise: bool) -> None:
    rng = np.random.default_rng(0)  # fixed: about one seed in a hundred steps over a kink of ReLU
    network = demo.Network(normalise, seed=1, dtype=np.float64, width=2)
    for parameter in network.params():  # with zero biases, values that ReLU zeroes lie exactly on its kink
        parameter.data += 0.1 * rng.standard_normal(parameter.shape)
    x, labels = rng.random((3, 1, 8, 8)), rng.integers(0, demo.CLASSES, 3)
    _, gradient = demo.cross_entropy(network.forward(x), labels)
    dx = network.backward(gradient)
    pairs = [(x, dx), *((p.data, p.grad) for p in network.params())]
    assert len(pairs) == (11 if normalise else 7)
    for array, analytic in pairs:
        assert analytic is not None
        assert analytic.shape == array.shape
        # Along one random direction: one number to which every element of the gradient contributes.
        direction = rng.standard_normal(array.shape)
        step, at = 1e-6, array.copy()
        ends = []
        for sign in (1, -1):
            array[...] = at + sign * step * direction
            ends.append(loss_of(network, x, labels))
        array[...] = at
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert np.sum(analytic * direction) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_gradients_accumulate(rng: np.random.Generator) -> None:
    network = demo.Network(True, seed=0, dtype=np.float64, width=2)
    x, dy = rng.random((2, 1, 8, 8)), rng.standard_normal((2, demo.CLASSES))
    network.forward(x)
    network.backward(dy)
    once = [p.grad.copy() for p in network.params()]
    network.backward(dy)
    for first, parameter in zip(once, network.params(), strict=True):
        assert_allclose(parameter.grad, 2 * first, atol=1e-12)


def test_both_networks_begin_with_the_same_weights() -> None:
    plain, normalised = (demo.Network(normalise, seed=3) for normalise in (False, True))
    own = [layer for layer in normalised.layers if not isinstance(layer, demo.InstanceNorm2d)]
    for a, b in zip(plain.layers, own, strict=True):
        for p, q in zip(a.params(), b.params(), strict=True):
            assert_equal(p.data, q.data)


def test_only_the_normalised_network_ignores_brightness_and_contrast(rng: np.random.Generator) -> None:
    x = rng.random((4, 1, 8, 8))
    for normalise in (False, True):
        network = demo.Network(normalise, seed=0, dtype=np.float64, width=4)
        scores = network.forward(x)
        difference = np.abs(network.forward(0.5 * x + 0.3) - scores).max()
        assert bool(difference < 1e-3) == normalise  # the layer's eps leaves a little


def test_changed_images_are_clipped() -> None:
    x = np.array([0.0, 0.25, 0.5, 1.0], np.float32)
    assert_equal(demo.changed(x, demo.CLEAN), x)
    assert_allclose(demo.changed(x, (0.25, 1.0)), [0.25, 0.5, 0.75, 1.0])
    assert_allclose(demo.changed(x, (0.0, 2.0)), [0.0, 0.0, 0.5, 1.0])
    assert demo.changed(x, (0.25, 0.5)).dtype == np.float32


@pytest.mark.full
@needs_extra
def test_training_learns_and_repeats_bit_for_bit() -> None:
    digits = demo.load_digits(0, "cpu")
    assert len(digits.train_x) + len(digits.test_x) == 1797
    losses: list[list[float]] = [[], []]
    scores = []
    for record in losses:
        network = demo.Network(True, seed=0, width=4)
        demo.fit(network, digits, 2, 0, lambda epoch, loss, record=record: record.append(loss))
        scores.append(network.forward(digits.test_x))
    assert losses[0] == losses[1]
    assert_equal(scores[0], scores[1])
    assert losses[0][1] < losses[0][0]
    assert demo.accuracy(network, digits) > 0.5


@pytest.mark.long
@needs_extra
def test_command_prints_a_table_and_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "digits.png"
    assert main(["train", "--device", "cpu", "--epochs", "1", "--out", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "InstanceNorm2d" in printed
    assert "contrast x 0.125" in printed
    assert target.name in printed
    assert target.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, printed.splitlines())) < 120


@pytest.mark.gpu
@needs_extra
def test_training_on_the_gpu() -> None:
    digits = demo.load_digits(0, "cuda:0")
    network = demo.Network(True, seed=0, device="cuda:0", width=4)
    demo.fit(network, digits, 2, 0, lambda epoch, loss: None)
    assert demo.accuracy(network, digits) > 0.5


def test_png_path(tmp_path: Path) -> None:
    assert demo.png_path(tmp_path / "a" / "b.png") == tmp_path / "a" / "b.png"
    assert demo.png_path(tmp_path / "c") == tmp_path / "c" / "cupynorm-digits.png"
    assert (tmp_path / "c").is_dir()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "pip install 'cupynorm[demo]'" in capsys.readouterr().err


@needs_extra
def test_unusable_device_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "gpu_status", lambda: (False, "no NVIDIA driver is installed"))
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "no NVIDIA driver is installed" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--seed", "-1"], ["--epochs", "many"]])
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", *wrong])
    assert "usage:" in capsys.readouterr().err


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "train" in printed
    assert "info" in printed
