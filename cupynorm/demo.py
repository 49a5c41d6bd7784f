"""`python -m cupynorm train`: train a small convolutional network on handwritten digits in an explicit loop.

The network is trained twice from the same initial weights, with InstanceNorm2d and without any normalisation, and
tested on images with changed brightness and contrast. Every layer has `forward`, `backward` and `params`, like
cupynorm's own layers; the same code runs on NumPy and CuPy arrays.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import devices
from ._types import Array, array_module
from .layers import InstanceNorm2d
from .parameters import Parameter

CLASSES = 10
BATCH = 64
BRIGHTNESS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # added to pixels of 0 to 1
CONTRAST = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # factor of the distance from mid-grey
NETWORKS = {"no normalisation": False, "InstanceNorm2d": True}

Change = tuple[float, float]  # brightness, contrast
CLEAN: Change = (0.0, 1.0)


# The layers


def initial(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int, dtype: Any, device: str) -> Parameter:
    """Normal weights of variance 2 / fan_in (He et al. 2015), drawn on the host: the same on every device."""
    return Parameter(devices.to_device((rng.standard_normal(shape) * math.sqrt(2 / fan_in)).astype(dtype), device))


def add_grad(parameter: Parameter, gradient: Array) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class Conv2d:
    """A 3 x 3 convolution of (N, inputs, H, W) to (N, outputs, H - 2, W - 2).

    There is no padding: zeros around a brightened image would be an edge that the image does not have.
    """

    size = 3

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, dtype: Any, device: str):
        fan_in = inputs * self.size**2
        self.weight = initial(rng, (outputs, fan_in), fan_in, dtype, device)
        self.bias = Parameter(devices.to_device(np.zeros((outputs, 1), dtype), device))

    def params(self) -> Iterable[Parameter]:
        return self.weight, self.bias

    def _windows(self, h: int, w: int) -> Iterator[tuple[int, int, slice, slice]]:
        """Yield each position in the kernel with the part of the input that it multiplies."""
        for i in range(self.size):
            for j in range(self.size):
                yield i, j, slice(i, i + h), slice(j, j + w)

    def forward(self, x: Array) -> Array:
        n, c, h, w = self.shape = x.shape
        k, h, w = self.size, h - self.size + 1, w - self.size + 1
        columns = array_module(x).empty((n, c, k, k, h, w), x.dtype)
        for i, j, rows, cols in self._windows(h, w):
            columns[:, :, i, j] = x[:, :, rows, cols]
        self.columns = columns.reshape(n, c * k * k, h * w)
        return (self.weight.data @ self.columns + self.bias.data).reshape(n, -1, h, w)

    def backward(self, dy: Array) -> Array:
        (n, c, _, _), k, (h, w) = self.shape, self.size, dy.shape[2:]
        dy = dy.reshape(n, -1, h * w)
        add_grad(self.weight, array_module(dy).tensordot(dy, self.columns, axes=((0, 2), (0, 2))))
        add_grad(self.bias, dy.sum(axis=(0, 2))[:, None])
        dcolumns = (self.weight.data.T @ dy).reshape(n, c, k, k, h, w)
        dx = array_module(dy).zeros(self.shape, dy.dtype)
        for i, j, rows, cols in self._windows(h, w):
            dx[:, :, rows, cols] += dcolumns[:, :, i, j]
        return dx


class ReLU:
    def params(self) -> Iterable[Parameter]:
        return ()

    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy: Array) -> Array:
        return dy * self.positive


class Linear:
    """A fully connected layer from (N, ...), with `inputs` numbers per sample, to (N, outputs)."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, dtype: Any, device: str):
        self.weight = initial(rng, (inputs, outputs), inputs, dtype, device)
        self.bias = Parameter(devices.to_device(np.zeros(outputs, dtype), device))

    def params(self) -> Iterable[Parameter]:
        return self.weight, self.bias

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        self.x = x.reshape(len(x), -1)
        return self.x @ self.weight.data + self.bias.data

    def backward(self, dy: Array) -> Array:
        add_grad(self.weight, self.x.T @ dy)
        add_grad(self.bias, dy.sum(axis=0))
        return (dy @ self.weight.data.T).reshape(self.shape)


class Network:
    """Two convolutions, each followed by InstanceNorm2d (if normalise is True) and ReLU, and a classifier.

    A change of brightness adds a constant to every plane of the first convolution's output, and a change of contrast
    multiplies the plane: the InstanceNorm2d that follows removes both. Maps images (N, 1, 8, 8) to scores (N, CLASSES).
    """

    def __init__(self, normalise: bool, seed: int, device: str = "cpu", dtype: Any = np.float32, width: int = 16):
        rng = np.random.default_rng(seed)

        def block(inputs: int, outputs: int) -> list[Any]:
            norm = [InstanceNorm2d(outputs, affine=True, device=device, dtype=dtype)] if normalise else []
            return [Conv2d(rng, inputs, outputs, dtype, device), *norm, ReLU()]

        classifier = Linear(rng, 2 * width * 4 * 4, CLASSES, dtype, device)
        self.layers = [*block(1, width), *block(width, 2 * width), classifier]

    def params(self) -> Iterator[Parameter]:
        for layer in self.layers:
            yield from layer.params()

    def cleargrads(self) -> None:
        for parameter in self.params():
            parameter.cleargrad()

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy


def cross_entropy(scores: Array, labels: Array) -> tuple[Array, Array]:
    """Return the mean softmax cross-entropy of scores (N, CLASSES) for labels (N,), and its gradient."""
    xp = array_module(scores)
    samples = xp.arange(len(labels))
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probability = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    gradient = xp.exp(log_probability)
    gradient[samples, labels] -= 1
    return -log_probability[samples, labels].mean(), gradient / len(labels)


class Adam:
    """The Adam optimiser (Kingma and Ba 2015)."""

    def __init__(self, params: Iterable[Parameter], rate: float = 2e-3):
        self.rate, self.steps = rate, 0
        self.slots = [(p, p.data * 0, p.data * 0) for p in params]

    def update(self) -> None:
        self.steps += 1
        rate = self.rate * math.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for parameter, mean, square in self.slots:
            gradient: Array = parameter.grad
            mean[...] = 0.9 * mean + 0.1 * gradient
            square[...] = 0.999 * square + 0.001 * gradient**2
            parameter.data -= rate * mean / (square**0.5 + 1e-8)


# Data, training, testing


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) float32 from 0 (black) to 1 (white), and labels (N,), on one device."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def load_digits(seed: int, device: str) -> Digits:
    """Load the 1797 handwritten digits of scikit-learn; a quarter of each class is for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = (raw.images[:, None] / 16).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, raw.target, test_size=0.25, random_state=seed, stratify=raw.target
    )
    return Digits(*(devices.to_device(array, device) for array in (train_x, train_y, test_x, test_y)))


def fit(network: Network, digits: Digits, epochs: int, seed: int, report: Callable[[int, float], None]) -> None:
    """Train; report(epoch, mean loss) is called after every epoch."""
    xp = array_module(digits.train_x)
    rng = np.random.default_rng(seed)
    optimiser = Adam(network.params())
    for epoch in range(1, epochs + 1):
        order = xp.asarray(rng.permutation(len(digits.train_x)))
        losses = []
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            scores = network.forward(digits.train_x[batch])
            loss, gradient = cross_entropy(scores, digits.train_y[batch])
            network.cleargrads()
            network.backward(gradient)
            optimiser.update()
            losses.append(loss)  # stays on the device: nothing waits for the GPU within an epoch
        report(epoch, float(xp.stack(losses).mean()))


def changed(images: Array, change: Change) -> Array:
    """Change the brightness and contrast of images, and clip them to 0 … 1 as a camera would."""
    brightness, contrast = change
    return ((images - 0.5) * contrast + 0.5 + brightness).clip(0, 1)


def predict(network: Network, images: Array) -> Array:
    return network.forward(images).argmax(axis=1)


def accuracy(network: Network, digits: Digits, change: Change = CLEAN) -> float:
    """Return the fraction of test images that the network recognises."""
    return float((predict(network, changed(digits.test_x, change)) == digits.test_y).mean())


# The command


def check_extra() -> None:
    """Raise ImportError if packages of the extra `demo` are missing."""
    missing = [name for name in ("matplotlib", "rich", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'cupynorm[demo]'")


def current(device: str) -> Any:
    """Return a context that creates new CuPy arrays on a device."""
    if device == "cpu":
        return contextlib.nullcontext()
    import cupy

    return cupy.cuda.Device(int(device.partition(":")[2]))


def png_path(out: str | Path) -> Path:
    """Return the path of the picture: out if it ends in .png, else a file in the folder out. Create the folder."""
    path = Path(out)
    path = path if path.suffix.lower() == ".png" else path / "cupynorm-digits.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def train(
    device: str = "cpu", epochs: int = 20, seed: int = 0, out: str | Path = "."
) -> dict[str, dict[Change, float]]:
    """Train both networks, print the table and draw the picture. device is as returned by `devices.resolve`.

    Return the accuracies (0 to 1), keyed by the network's name (NETWORKS) and the change of the test images.
    """
    from rich.console import Console
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    path = png_path(out)
    console = Console(highlight=False)
    began = time.perf_counter()
    # Matrix products this small gain nothing from BLAS threads, and lose much when the cores are busy.
    with threadpool_limits(1), current(device):
        digits = load_digits(seed, device)
        console.print(
            f"{len(digits.train_x)} digits to train on, {len(digits.test_x)} to test; {epochs} epochs, seed {seed}, "
            f"on {device}"
        )
        networks = train_both(digits, epochs, seed, device, console)
        levels = dict.fromkeys([CLEAN, *((b, 1.0) for b in BRIGHTNESS), *((0.0, c) for c in CONTRAST)])
        results = {name: {level: accuracy(net, digits, level) for level in levels} for name, net in networks.items()}
        print_table(results, len(digits.test_x), console)
        draw(results, networks, digits, path)
    console.print(f"picture: {path.resolve()}", soft_wrap=True, markup=False)
    console.print(f"{time.perf_counter() - began:.1f} s in all")
    return results


def train_both(digits: Digits, epochs: int, seed: int, device: str, console: Any) -> dict[str, Network]:
    """Train a network of each kind from the same initial weights, with live progress."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    networks = {name: Network(normalise, seed, device) for name, normalise in NETWORKS.items()}
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        for name, network in networks.items():
            task = progress.add_task(name, total=epochs, state="")

            def report(epoch: int, loss: float, name: str = name, network: Network = network, task: Any = task) -> None:
                state = f"loss {loss:.4f}, test {accuracy(network, digits):.1%}"
                progress.update(task, completed=epoch, state=state)
                if not console.is_terminal and (epoch % 5 == 0 or epoch == epochs):
                    console.print(f"{name:16} epoch {epoch:3}: {state}")

            fit(network, digits, epochs, seed, report)
    return networks


def print_table(results: dict[str, dict[Change, float]], count: int, console: Any) -> None:
    from rich.table import Table

    table = Table(title=f"Test accuracy ({count} images), trained on unchanged images", title_justify="left")
    table.add_column("test images")
    for name in results:
        table.add_column(name, justify="right")
    for level in next(iter(results.values())):
        brightness, contrast = level
        label = f"brightness {brightness:+g}" if brightness else f"contrast x {contrast:g}"
        last = level in (CLEAN, (BRIGHTNESS[-1], 1.0))
        cells = [f"{accuracies[level]:.1%}" for accuracies in results.values()]
        table.add_row("as they are" if level == CLEAN else label, *cells, end_section=last)
    console.print(table)


def draw(results: dict[str, dict[Change, float]], networks: dict[str, Network], digits: Digits, path: Path) -> None:
    """Plot accuracy over brightness and contrast; below each level, the first two test images and their readings."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    brightness = [(b, 1.0) for b in BRIGHTNESS], [f"{b:+g}" if b else "0" for b in BRIGHTNESS]
    contrast = [(0.0, c) for c in CONTRAST], [f"× {c:g}" for c in CONTRAST]
    colours = dict(zip(results, ("#c1440e", "#1f5fa8"), strict=True))
    figure = Figure(figsize=(11, 7.6), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    figure.suptitle("Reading handwritten digits when the light changes", fontsize=16, fontweight="bold")
    figure.supxlabel(
        "One network, trained twice on unchanged images from the same initial weights. Pixels clip at 0 and 1.\n"
        "Below each level: the first two test images, and the digit that each network reads (✗: wrong).",
        fontsize=10,
        color="0.35",
    )
    ratios = {"height_ratios": (4, 1.7, 1.7), "width_ratios": (len(BRIGHTNESS), len(CONTRAST))}
    axes = figure.subplots(3, 2, sharey="row", gridspec_kw=ratios)
    for (levels, labels), (curves, *strips) in zip((brightness, contrast), axes.T, strict=True):
        for name, accuracies in results.items():
            curves.plot([100 * accuracies[level] for level in levels], "o-", color=colours[name], lw=2, label=name)
        curves.axhline(100 / CLASSES, color="0.6", ls=":", lw=1)
        curves.grid(axis="y", color="0.9")
        curves.spines[["top", "right"]].set_visible(False)
        curves.set(xlim=(-0.5, len(levels) - 0.5), ylim=(0, 102))
        curves.set_xticks(range(len(levels)), labels)
        for index, strip in enumerate(strips):
            strip.set(xlim=curves.get_xlim(), ylim=(-0.75, 1))
            strip.set_axis_off()
            for at, level in enumerate(levels):
                image = changed(digits.test_x[index : index + 1], level)
                box = (at - 0.4, at + 0.4, 0, 1)
                pixels = devices.to_host(image)[0, 0]
                strip.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=box, aspect="auto")
                for row, (name, network) in enumerate(networks.items()):
                    read = int(predict(network, image)[0])
                    wrong = read != int(digits.test_y[index])
                    text = f"{read} ✗" if wrong else f"{read}"
                    weight = "bold" if wrong else "normal"
                    strip.text(at, -0.2 - 0.3 * row, text, color=colours[name], weight=weight, ha="center", va="center")
    for left, title in zip(
        axes[0], ("Brightness: added to every pixel", "Contrast: factor around mid-grey"), strict=True
    ):
        left.set_title(title, loc="left", fontsize=12)
    for strip in axes[1:, 0]:
        for row, name in enumerate(results):
            strip.text(-0.5, -0.2 - 0.3 * row, name, color=colours[name], ha="right", va="center", fontsize=9)
    axes[0, 0].set_ylabel(f"accuracy on {len(digits.test_x)} test images (%)")
    axes[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 0.2), frameon=False, fontsize=12)
    axes[0, 0].text(-0.4, 100 / CLASSES + 1.5, "guessing", color="0.45", fontsize=9)
    figure.savefig(path)
