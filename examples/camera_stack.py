"""Combine frames of a camera that were exposed unevenly.

    pip install 'cupynorm[demo,cpu]'
    python examples/camera_stack.py                # writes camera_stack.png

The frames are made from a photograph that comes with scikit-learn: uint16, with exposures of 3 to 100 %, an offset that
drifts, and the noise of counted photons. Their intensities cannot be compared, let alone averaged. `instance_norm`
reads the integers as they are and normalises each frame by the pixels of a region of interest; the normalised frames
are averaged, weighted by their exposure; and `denormalize` gives the average the intensities of any of the frames. The
error against the frame without noise is printed for that frame alone and for the average.

With CuPy and a GPU the same calls take CuPy arrays.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_sample_image

import cupynorm as cn

FRAMES = 12


def frames_of(photograph: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the stack (N, 1, H, W) in uint16, and the same without noise, in float64."""
    light = photograph[..., :3].mean(2) / 255  # grey
    exposures = np.geomspace(0.03, 1, FRAMES)[rng.permutation(FRAMES)]
    offsets = rng.uniform(500, 3000, FRAMES)
    clean = offsets[:, None, None] + 40_000 * exposures[:, None, None] * light
    photons = 4  # counts for each
    noisy = rng.poisson(clean / photons) * photons + rng.normal(0, 30, clean.shape)
    return np.clip(np.rint(noisy), 0, 65535).astype(np.uint16)[:, None], clean[:, None]


def region_of(shape: tuple[int, ...]) -> np.ndarray:
    """Return an ellipse in the middle, (H, W)."""
    rows, columns = (np.linspace(-1, 1, size) for size in shape)
    return np.hypot(*np.meshgrid(columns / 0.7, rows / 0.8)) < 1


def relative_error(image: np.ndarray, clean: np.ndarray, region: np.ndarray) -> float:
    """Return the root of the mean squared error within the region, as a part of the deviation there."""
    return float(np.sqrt(np.mean((image - clean)[region] ** 2)) / clean[region].std())


def main() -> None:
    parser = argparse.ArgumentParser(description="Combine frames of a camera that were exposed unevenly.")
    parser.add_argument("--output", default="camera_stack.png", help="default camera_stack.png")
    options = parser.parse_args()
    stack, clean = frames_of(load_sample_image("flower.jpg"), np.random.default_rng(0))
    region = region_of(stack.shape[2:])

    inside = cn.moments(stack, mask=region)
    normalized = cn.instance_norm(stack, moments=inside, dtype="float32")  # also outside of the region
    weights = (inside.var() / inside.var().sum())[..., None, None].astype(np.float32)  # brighter frames have less noise
    average = (weights * normalized).sum(0, keepdims=True)

    darkest = int(inside.std().argmin())
    moments = cn.Moments(*(each[darkest : darkest + 1] for each in vars(inside).values()))
    combined = cn.denormalize(average, moments)[0, 0]
    errors = [relative_error(image, clean[darkest, 0], region) for image in (stack[darkest, 0], combined)]
    means = inside.mean[:, 0]
    print(f"{FRAMES} frames of {stack.dtype}: their means in the region are {means.min():.0f} to {means.max():.0f}")
    print(
        f"the darkest frame alone: an error of {errors[0]:.1%} of its deviation; all frames combined: {errors[1]:.1%}"
    )

    _draw(stack, normalized, combined, darkest, region, options.output)
    print(f"wrote {options.output}")
    if not errors[1] < errors[0] / 3:
        sys.exit("the combined frames are not better")


def _draw(
    stack: np.ndarray, normalized: np.ndarray, combined: np.ndarray, darkest: int, region: np.ndarray, path: str
) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    order = stack.std((1, 2, 3)).argsort()
    for axis, number in zip(axes[0], (darkest, order[FRAMES // 2], order[-1]), strict=True):
        axis.imshow(stack[number, 0], cmap="gray", vmin=0, vmax=45_000)
        axis.contour(region, [0.5], colors="tab:orange", linewidths=1)
        axis.set_title(f"frame {number} as it was taken, uint16")
    axes[1, 0].imshow(normalized[darkest, 0], cmap="gray", vmin=-2, vmax=3)
    axes[1, 0].set_title(f"frame {darkest}, normalised in the region")
    axes[1, 1].imshow(combined, cmap="gray", vmin=np.quantile(combined, 0.01), vmax=np.quantile(combined, 0.99))
    axes[1, 1].set_title(f"all frames, with the intensities of frame {darkest}")
    for number in range(len(stack)):
        values = normalized[number, 0][region]
        axes[1, 2].hist(values, np.linspace(-3, 4, 80), histtype="step", density=True)
    axes[1, 2].set_title("normalised intensities of each frame")
    for axis in axes.flat[:5]:
        axis.set_axis_off()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
