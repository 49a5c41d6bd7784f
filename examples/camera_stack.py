"""
Unevenly exposed camera frames
==============================

Twelve uint16 frames of one scene, with exposures of 3 to 100 %, unequal offsets, noise and the spots of cosmic rays,
are combined into one image. The example is for those who normalise the images of microscopes and other scientific
cameras. It writes ``camera_stack.png``.

Run it with ``python examples/camera_stack.py``; ``pip install '.[demo]'`` installs the packages it needs.
"""

# %%
# The frames
# ----------
# They are made from a photograph that comes with scikit-learn. A sensor with an offset counts photons, so the noise
# grows with the root of the light. A cosmic ray leaves a spot of 3 x 3 bright pixels. ``clean`` has the frames without
# noise and spots, for the comparison at the end.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import cupynorm as cn

FRAMES, SPOTS = 12, 30
rng = np.random.default_rng(0)
light = load_sample_image("flower.jpg").mean(axis=2) / 255
exposures = rng.permutation(np.geomspace(0.03, 1, FRAMES))[:, None, None, None]
offsets = rng.uniform(500, 3000, (FRAMES, 1, 1, 1))
clean = offsets + 40_000 * exposures * light  # (N, 1, H, W)

counts = 4 * rng.poisson(clean / 4) + rng.normal(0, 30, clean.shape)
for frame in counts[:, 0]:
    for row, column in zip(*(rng.integers(0, size - 3, SPOTS) for size in light.shape), strict=True):
        frame[row : row + 3, column : column + 3] += 15_000
stack = counts.round().clip(0, 65_535).astype(np.uint16)

# %%
# Normalise by a region
# ---------------------
# Only an ellipse in the middle is to count, so the mask is True there. ``instance_norm`` with ``dtype=`` reads the
# integers as they are and writes float32. With ``mask=`` the result is 0 outside of the region. Here the outside is
# wanted too, so the moments of the region are computed first and given to the call. The same calls take CuPy arrays.

rows, columns = (np.linspace(-1, 1, size) for size in light.shape)
region = (rows[:, None] / 0.8) ** 2 + (columns / 0.7) ** 2 < 1  # (H, W)

moments = cn.moments(stack, mask=region)
normalised = cn.instance_norm(stack, moments=moments, dtype="float32")
inside = cn.instance_norm(stack, mask=region, dtype="float32")
print(f"means of the frames: {moments.mean.min():.0f} to {moments.mean.max():.0f}")
assert not inside[:, :, ~region].any()
np.testing.assert_allclose(inside[:, :, region], normalised[:, :, region], atol=1e-5)

# %%
# Leave out the cosmic rays
# -------------------------
# Apart from noise and spots, each frame now equals the median of the frames. ``zscore`` measures the differences of
# each frame in its own deviations: a pixel beyond 6 belongs to a spot. The spots have also changed the means and
# deviations of the dark frames. So the moments are computed again, with a mask for each frame: the region without its
# spots.

differences = normalised - np.median(normalised, axis=0)
spots = cn.zscore(differences, axis=(2, 3)) > 6  # (N, 1, H, W)
good = region & ~spots
print(f"{spots.sum()} pixels are left out; the spots have {9 * SPOTS * FRAMES}")

moments = cn.moments(stack, mask=good)
normalised = cn.instance_norm(stack, moments=moments, dtype="float32")

# %%
# Combine, and return to intensities
# ----------------------------------
# A frame with a larger deviation has less noise once it is normalised: its weight in the average is its variance.
# ``denormalize`` gives the average the intensities of the darkest frame, whose moments it gets.

weights = ~spots * moments.var().astype(np.float32)[..., None, None]
average = (weights * normalised).sum(axis=0, keepdims=True) / weights.sum(axis=0, keepdims=True)
darkest = int(moments.std().argmin())
of_darkest = cn.Moments(*(array[darkest : darkest + 1] for array in (moments.count, moments.mean, moments.m2)))
combined = cn.denormalize(average, of_darkest)[0, 0]


def error(image: np.ndarray) -> float:
    """Return the root mean square error in the region, relative to the deviation of the darkest frame."""
    truth = clean[darkest, 0][region]
    return float(np.sqrt(np.mean((image[region] - truth) ** 2)) / truth.std())


alone, together = error(stack[darkest, 0].astype(float)), error(combined)
print(f"error of the darkest frame: {alone:.1%} alone, {together:.1%} combined with the others")
assert together < alone / 5

# %%
# The first row shows three frames as they were taken, with the region. Below them are the darkest frame normalised, the
# combined image, and the normalised intensities of all frames: they agree, but for the noise of the dark ones.

figure, axes = plt.subplots(2, 3, figsize=(9.6, 4.8), layout="constrained")
order = exposures.ravel().argsort()
for axis, number in zip(axes[0], order[[0, FRAMES // 2, -1]], strict=True):
    axis.imshow(stack[number, 0], cmap="gray", vmin=0, vmax=45_000)
    axis.contour(region, [0.5], colors="tab:orange", linewidths=1)
    axis.set_title(f"uint16, exposure {exposures[number].item():.0%}", fontsize=11)
axes[1, 0].imshow(normalised[darkest, 0], cmap="gray", vmin=-2, vmax=3)
axes[1, 0].set_title(f"the darkest alone: error {alone:.0%}", fontsize=11)
axes[1, 1].imshow(combined, cmap="gray", vmin=combined.min(), vmax=np.quantile(combined, 0.999))
axes[1, 1].set_title(f"all frames, combined: error {together:.0%}", fontsize=11)
for axis in axes.flat[:5]:
    axis.set_axis_off()
for number in order:
    values = normalised[number, 0][good[number, 0]]
    colour = plt.get_cmap("plasma")(0.8 * (1 - exposures[number].item()))
    label = f"exposure {exposures[number].item():.0%}" if number in order[[0, -1]] else None
    axes[1, 2].hist(values, np.linspace(-3, 4, 80), histtype="step", density=True, color=colour, label=label)
axes[1, 2].set_title("every frame, within the region", fontsize=11)
axes[1, 2].set(xlabel="normalised intensity", ylabel="density", xlim=(-3, 4))
axes[1, 2].legend(frameon=False, fontsize=9)
axes[1, 2].set_box_aspect(0.6)
figure.savefig("camera_stack.png", dpi=100)
