"""
Digits in changed light
=======================

Two small networks learn handwritten digits, one with ``InstanceNorm2d`` and one without, and are tested on digits
in changed light. The example is for those whose networks will meet the images of other cameras, lamps or exposures than
they were trained on. It writes ``digits.png``.

Run it with ``python examples/digits.py``; ``pip install '.[demo]'`` installs the packages it needs. The command
``python -m cupynorm train`` does the same for more levels of light, on a CPU or a GPU.
"""

# %%
# The data
# --------
# ``cupynorm.demo`` has the data, the layers and the training loop. Every layer has ``forward``, ``backward`` and
# ``params``, as the layers of cupynorm have. The digits are those of scikit-learn: 1797 images of 8 x 8 pixels, from 0
# (black) to 1 (white). A quarter of them is kept for the test.

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

from cupynorm import demo

SEED, EPOCHS = 0, 16
digits = demo.load_digits(SEED, "cpu")
print(f"{len(digits.train_x)} digits to train on, {len(digits.test_x)} to test")

# %%
# The training
# ------------
# Both networks start from the same weights: two convolutions, each followed by ReLU, and a linear layer. In the second
# network an ``InstanceNorm2d`` follows each convolution. Neither sees an image in changed light during the training.
# One thread of BLAS is enough for matrices of this size.

networks = {name: demo.Network(normalise, SEED) for name, normalise in demo.NETWORKS.items()}


def report(epoch: int, loss: float) -> None:
    if epoch % 4 == 0:
        print(f"epoch {epoch:2}: loss {loss:.3f}")


with threadpool_limits(1):
    for name, network in networks.items():
        print(name)
        demo.fit(network, digits, EPOCHS, SEED, report)

# %%
# The test
# --------
# A change of light adds a brightness to all pixels, or multiplies their distance from mid-grey by a contrast. Pixels
# are clipped to 0 ... 1, as in a camera.

lights = {
    "brightness −0.5": (-0.5, 1.0),
    "brightness +0.25": (0.25, 1.0),
    "brightness +0.5": (0.5, 1.0),
    "unchanged": demo.CLEAN,
    "contrast × 0.5": (0.0, 0.5),
    "contrast × 0.25": (0.0, 0.25),
    "contrast × 0.125": (0.0, 0.125),
}
with threadpool_limits(1):
    accuracies = {
        name: [100 * demo.accuracy(network, digits, light) for light in lights.values()]
        for name, network in networks.items()
    }
for light, *both in zip(lights, *accuracies.values(), strict=True):
    print(f"{light:18} {both[0]:4.1f} % without normalisation, {both[1]:4.1f} % with InstanceNorm2d")
worst, least = (min(accuracies[name]) for name in demo.NETWORKS)
print(f"lowest accuracy: {worst:.1f} % without normalisation, {least:.1f} % with InstanceNorm2d")
assert least > worst + 50

# %%
# Inside the network
# ------------------
# A convolution turns an added brightness into a constant that is added to each of its planes, and a contrast into a
# factor. ``InstanceNorm2d`` subtracts the mean of the plane and divides by its deviation, so both disappear, except
# where pixels are clipped. The figure shows one digit in each light, one of its planes after the first convolution, and
# the same plane after the normalisation.

convolution, norm = networks["InstanceNorm2d"].layers[:2]
images = np.concatenate([demo.changed(digits.test_x[:1], light) for light in lights.values()])
planes = convolution.forward(images)
normalised = norm.forward(planes)
unchanged = list(lights.values()).index(demo.CLEAN)
channel = planes[unchanged].std(axis=(1, 2)).argmax()
rows = {"image": images[:, 0], "convolution": planes[:, channel], "normalised": normalised[:, channel]}

# %%
# The bars are the accuracies of both networks in each light.

figure, axes = plt.subplot_mosaic(
    [[f"{row} {light}" for light in lights] for row in rows] + [["bars"] * len(lights)],
    figsize=(9, 7.2),
    height_ratios=[1, 1, 1, 2.2],
    layout="constrained",
)
for row, arrays in rows.items():
    low, high = (0, 1) if row == "image" else (arrays.min(), arrays.max())
    for array, light in zip(arrays, lights, strict=True):
        axis = axes[f"{row} {light}"]
        axis.imshow(array, cmap="gray" if row == "image" else "viridis", vmin=low, vmax=high)
        axis.set(xticks=[], yticks=[])
        if row == "image":
            axis.set_title(light.replace(" ", "\n", 1), fontsize=10)
    axes[f"{row} {next(iter(lights))}"].set_ylabel(row, fontsize=10)

bars = axes["bars"]
for shift, (name, values) in zip((-0.2, 0.2), accuracies.items(), strict=True):
    colour = "#c1440e" if shift < 0 else "#1f5fa8"
    drawn = bars.bar(np.arange(len(lights)) + shift, values, 0.38, color=colour, label=name)
    bars.bar_label(drawn, fmt="%.0f", fontsize=9, padding=2)
bars.axhline(100 / demo.CLASSES, color="0.4", ls=":", lw=1.5, label="guessing")
bars.set(xlim=(-0.5, len(lights) - 0.5), xticks=[])
bars.set(ylim=(0, 108), ylabel=f"accuracy on {len(digits.test_x)} digits (%)")
bars.spines[["top", "right"]].set_visible(False)
bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False)
figure.suptitle("One digit in changed light, and how many digits two networks read", fontsize=13)
figure.savefig("digits.png", dpi=100)
