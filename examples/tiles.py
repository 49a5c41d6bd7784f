"""
Tiles of a large image
======================

An image is normalised tile by tile. With its own mean and deviation each tile comes out differently, and the seams
show. With the merged moments of all tiles the result is that of the whole image, and so is the gradient. The example is
for those whose images do not fit into memory or onto one GPU. It writes ``tiles.png``.

Run it with ``python examples/tiles.py``; ``pip install '.[demo]'`` installs the packages it needs.
"""

# %%
# The image
# ---------
# A photograph that comes with scikit-learn stands for the large image: three channels in uint8. It is cut into tiles of
# at most 128 x 128 pixels. Tiles may be of different sizes, and they may be loaded one after the other.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import cupynorm as cn

TILE = 128
photograph = load_sample_image("china.jpg")  # (427, 640, 3)
image = photograph.transpose(2, 0, 1)[None]  # (N, C, H, W)
height, width = image.shape[2:]
places = [
    (..., slice(top, top + TILE), slice(left, left + TILE))
    for top in range(0, height, TILE)
    for left in range(0, width, TILE)
]
print(f"{len(places)} tiles of an image of {height} x {width} pixels")


def joined(tiles: list[np.ndarray]) -> np.ndarray:
    """Return the image (1, 3, H, W) that has these tiles."""
    result = np.empty(image.shape, np.float32)
    for place, tile in zip(places, tiles, strict=True):
        result[place] = tile
    return result


# %%
# Each tile alone
# ---------------
# Do not do this. In a tile that shows nothing but sky the deviation is small, so the sky gets the
# contrast of a building.

alone = joined([cn.instance_norm(image[place], dtype="float32") for place in places])

# %%
# With the moments of the whole
# -----------------------------
# The moments of a part are a count, a mean and a sum of squared distances from the mean. ``merge`` gives those of all
# parts together. So each tile is read twice, and a program need not hold more than one. The same calls take CuPy
# arrays.

first, *others = (cn.moments(image[place]) for place in places)
whole = first.merge(*others)
together = joined([cn.instance_norm(image[place], moments=whole, dtype="float32") for place in places])

expected = cn.instance_norm(image, dtype="float32")
print(f"difference from the whole image: tiles alone {abs(alone - expected).max():.2f}")
print(f"                                 together    {abs(together - expected).max():.1e}")
assert abs(together - expected).max() < 1e-5

# %%
# The gradient
# ------------
# A gradient needs two sums of each plane, over all tiles. ``gradient_sums`` computes those of a tile, ``merge`` adds
# them up, and ``instance_norm_backward`` takes them. Gradients need floats: the uint8 image is converted first.

x = image.astype(np.float32)
dy = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)  # the gradient of some loss for the result
saved = [cn.instance_norm_forward(x[place], moments=whole)[1] for place in places]
first, *others = (cn.gradient_sums(dy[place], each) for place, each in zip(places, saved, strict=True))
sums = first.merge(*others)
pairs = zip(places, saved, strict=True)
dx = joined([cn.instance_norm_backward(dy[place], each, sums=sums)[0] for place, each in pairs])

expected_dx = cn.instance_norm_backward(dy, cn.instance_norm_forward(x)[1])[0]
difference = abs(dx - expected_dx).max() / abs(expected_dx).max()
print(f"gradient: difference from that of the whole image {difference:.1e} of its largest value")
assert difference < 1e-5

# %%
# The last panel shows by how much the tiles alone differ from the whole image, averaged over the colours.


def shown(y: np.ndarray) -> np.ndarray:
    """Return an image for the screen, (H, W, 3): the mean is a light grey, 4 deviations are the whole range."""
    return (y[0].transpose(1, 2, 0) / 4 + 0.6).clip(0, 1)


figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
pictures = {
    "the image, uint8": photograph,
    "each tile normalised alone": shown(alone),
    "each tile with the merged moments": shown(together),
}
for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=False):
    axis.imshow(picture)
    axis.set_title(title)
drawn = axes[1, 1].imshow((alone - expected).mean(axis=(0, 1)), cmap="RdBu_r", vmin=-2, vmax=2)
axes[1, 1].set_title("tiles alone minus whole image")
figure.colorbar(drawn, ax=axes[1, 1], location="bottom", label="difference (standard deviations)")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
axes[1, 0].set_xlabel(f"largest difference from the whole image: {abs(together - expected).max():.1g}")
figure.savefig("tiles.png", dpi=100)
