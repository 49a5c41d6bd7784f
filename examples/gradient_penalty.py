"""
A gradient penalty
==================

A Wasserstein critic learns to tell handwritten digits from fakes, with and without the gradient penalty of WGAN-GP. The
penalty pulls the length of the critic's input gradient to 1, so its own gradient is a second derivative: here it is
written by hand, with ``instance_norm_double_backward``. The example is for those who train with losses that contain
gradients. It writes ``gradient_penalty.png``.

Run it with ``python examples/gradient_penalty.py``; ``pip install '.[demo]'`` installs the packages it needs.
"""

# %%
# Digits and fakes
# ----------------
# The digits of scikit-learn have 8 x 8 pixels. Each is cut into 16 patches of 2 x 2 pixels: the critic sees arrays
# (N, 4, 16) of 4 channels and 16 positions. A fake takes each of its pixels from another digit: each pixel by itself
# is as in a digit, but together they form no stroke.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import cupynorm as cn
from cupynorm.demo import Adam

STRENGTH, BATCH, STEPS = 10.0, 64, 400
rng = np.random.default_rng(0)
digits = rng.permutation(load_digits().images) / 16  # (1797, 8, 8), from 0 to 1, in float64
fakes = rng.permuted(digits, axis=0)  # each pixel in an order of its own


def patches(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3).reshape(-1, 4, 16)


# %%
# The critic
# ----------
# D(x) is the sum of v * leaky_relu(instance_norm(w @ x, gamma, beta)) over 32 channels and 16 positions. ``slope`` is
# the derivative of the leaky ReLU.


def slope(y: np.ndarray) -> np.ndarray:
    return np.where(y > 0, 1.0, 0.2)


def critic(x: np.ndarray, w, gamma, beta, v) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return D(x), (N,), and the gradients of its mean for w, gamma, beta and v."""
    y, saved = cn.instance_norm_forward(w @ x, gamma, beta)
    activated = slope(y) * y
    dh, dgamma, dbeta = cn.instance_norm_backward(v * slope(y) / len(x), saved)
    return (v * activated).sum((1, 2)), [(dh @ x.swapaxes(1, 2)).sum(0), dgamma, dbeta, activated.mean(0)]


# %%
# The penalty
# -----------
# It is the mean of (length of dD/dx - 1)². The first half computes dx = dD/dx, as a backward does. The second half goes
# back through that backward: ``instance_norm_double_backward`` takes the gradient for the backward's result dh, and
# returns those for dy, for the input of the normalisation and for gamma. The one for beta is 0, since ``slope`` is
# constant on either side of 0.


def gradient_penalty(x: np.ndarray, w, gamma, beta, v) -> tuple[float, np.ndarray, list[np.ndarray]]:
    """Return the penalty, the lengths of dD/dx, (N,), and the penalty's gradients for w, gamma, beta and v."""
    y, saved = cn.instance_norm_forward(w @ x, gamma, beta)
    dy = v * slope(y)
    dh, _, _ = cn.instance_norm_backward(dy, saved)
    dx = w.T @ dh
    length = ((dx**2).sum((1, 2), keepdims=True) + 1e-12) ** 0.5

    ddx = 2 / len(x) * (length - 1) / length * dx
    ddy, dh2, dgamma = cn.instance_norm_double_backward(w @ ddx, None, None, dy, saved)
    dw = (dh @ ddx.swapaxes(1, 2) + dh2 @ x.swapaxes(1, 2)).sum(0)  # w is there twice: in w.T @ dh and in w @ x
    return ((length - 1) ** 2).mean(), length.ravel(), [dw, dgamma, 0 * beta, (ddy * slope(y)).sum(0)]


# %%
# These gradients are compared with finite differences in float64, along random directions.

start = [rng.normal(size=(32, 4)) / 2, np.ones(32), np.zeros(32), rng.normal(size=(32, 16)) / 100]
gradients = gradient_penalty(patches(digits[:BATCH]), *start)[2]
for name, index in (("w", 0), ("gamma", 1), ("v", 3)):
    step = 1e-6 * rng.normal(size=start[index].shape)
    ends = ([*start[:index], start[index] + side, *start[index + 1 :]] for side in (step, -step))
    above, below = (gradient_penalty(patches(digits[:BATCH]), *end)[0] for end in ends)
    expected, given = (above - below) / 2, (gradients[index] * step).sum()
    print(f"{name:5}: finite difference {expected: .8e}, gradient {given: .8e}")
    assert abs(given - expected) < 1e-5 * abs(expected)

# %%
# The training
# ------------
# The critic lowers the mean of D(fake) - D(digit). The penalty is taken at random points between digits and fakes. The
# last 397 digits and fakes are for the test.


def train(strength: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return quantiles of the lengths of dD/dx, (STEPS, 3), and D of the digits and the fakes of the test."""
    parameters = [cn.Parameter(array.copy()) for array in start]
    optimiser, quantiles = Adam(parameters), []
    for _ in range(STEPS):
        values = [parameter.data for parameter in parameters]
        digit, fake = (patches(images[rng.integers(1400, size=BATCH)]) for images in (digits, fakes))
        between = fake + rng.random((BATCH, 1, 1)) * (digit - fake)
        _, lengths, of_penalty = gradient_penalty(between, *values)
        quantiles.append(np.quantile(lengths, (0.1, 0.5, 0.9)))
        losses = zip(parameters, critic(fake, *values)[1], critic(digit, *values)[1], of_penalty, strict=True)
        for parameter, of_fake, of_digit, of_length in losses:
            parameter.grad = of_fake - of_digit + strength * of_length
        optimiser.update()
    values = [parameter.data for parameter in parameters]
    return np.array(quantiles), [critic(patches(images[1400:]), *values)[0] for images in (digits, fakes)]


results = {"without penalty": train(0.0), "with penalty": train(STRENGTH)}
for name, (quantiles, (of_digits, of_fakes)) in results.items():
    told = (of_digits[:, None] > of_fakes).mean()
    print(f"{name}: median length {quantiles[-1, 1]:.3f}; D is larger for the digit in {told:.1%} of all pairs")
assert abs(results["with penalty"][0][-1, 1] - 1) < 0.1 < results["without penalty"][0][-1, 1] - 1

# %%
# Without the penalty nothing limits the critic: its gradient grows for as long as it is trained. With the penalty the
# length stays near 1, and the critic also tells more of the test images apart.

figure, axes = plt.subplot_mosaic(
    [["images", "lengths"], ["without penalty", "with penalty"]], figsize=(9, 6.6), layout="constrained"
)
framed = (np.pad(images[:24], ((0, 0), (1, 1), (1, 1))) for images in (digits, fakes))
rows = [np.hstack(images[i : i + 8]) for images in framed for i in (0, 8, 16)]
axes["images"].imshow(np.vstack(rows), cmap="gray_r")
axes["images"].axhline(29.5, color="black")
axes["images"].set(title="digits (above) and fakes (below)", xticks=[], yticks=[])
for colour, (name, (quantiles, scores)) in zip(("#c1440e", "#1f5fa8"), results.items(), strict=True):
    axes["lengths"].semilogy(quantiles[:, 1], color=colour, label=name)
    axes["lengths"].fill_between(range(STEPS), quantiles[:, 0], quantiles[:, 2], color=colour, alpha=0.25, lw=0)
    bins = np.histogram_bin_edges(np.concatenate(scores), 40)
    for score, label, shade in zip(scores, ("digits", "fakes"), (colour, "0.6"), strict=True):
        axes[name].hist(score, bins, color=shade, alpha=0.8, label=label)
    axes[name].set(title=f"D of the test images, {name}", xlabel="D(x)", ylabel="images")
    axes[name].legend(frameon=False)
axes["lengths"].axhline(1, color="black", ls=":", lw=1)
axes["lengths"].set(title="length of dD/dx: median, and 10 to 90 %", xlabel="step of the training", ylabel="length")
axes["lengths"].legend(frameon=False)
figure.savefig("gradient_penalty.png", dpi=100)
