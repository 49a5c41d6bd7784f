"""
Adaptive instance normalisation
===============================

Adaptive instance normalisation (AdaIN) gives the features of one image the means and deviations of another image's
features. Here it gives a photograph the colours and the contrasts of another one. The example is for those who use
AdaIN in networks for style transfer or image generation. It writes ``adaptive_normalization.png``.

Run it with ``python examples/adaptive_normalization.py``; ``pip install '.[demo]'`` installs the packages it
needs.
"""

# %%
# Two photographs
# ---------------
# They come with scikit-learn. They are cropped to a multiple of the 8 x 8 pixels of a block.

import matplotlib.pyplot as plt
import numpy as np
from scipy.fft import dctn, idctn  # SciPy comes with scikit-learn
from sklearn.datasets import load_sample_image

import cupynorm as cn

BLOCK, EPS = 8, 1e-5


def photograph(name: str) -> np.ndarray:
    """Return an image (H, W, 3) in float32, from 0 to 255."""
    image = load_sample_image(name).astype(np.float32)
    height, width = (size // BLOCK * BLOCK for size in image.shape[:2])
    return image[:height, :width]


content, style = photograph("china.jpg"), photograph("flower.jpg")

# %%
# Features that can be inverted
# -----------------------------
# In the method of Huang and Belongie (2017) a trained encoder makes the features, and a trained decoder makes an image
# of them. Here a cosine transform of each block takes the place of both: of its rows, its columns and its three
# colours. Each of the 192 channels is one spatial frequency of one mixture of the colours: red + green + blue, red -
# blue, or red - 2 green + blue. The transform is orthogonal, so its inverse is exact up to rounding.


def features_of(image: np.ndarray) -> np.ndarray:
    """Return the features (1, 192, H / 8, W / 8) of an image (H, W, 3)."""
    rows, columns = (size // BLOCK for size in image.shape[:2])
    blocks = dctn(image.reshape(rows, BLOCK, columns, BLOCK, 3), axes=(1, 3, 4), norm="ortho")
    return blocks.transpose(4, 1, 3, 0, 2).reshape(1, -1, rows, columns)


def image_of(features: np.ndarray) -> np.ndarray:
    """Return the image of which these are the features."""
    rows, columns = features.shape[2:]
    blocks = features.reshape(3, BLOCK, BLOCK, rows, columns).transpose(3, 1, 4, 2, 0)
    return idctn(blocks, axes=(1, 3, 4), norm="ortho").reshape(rows * BLOCK, columns * BLOCK, 3)


content_features, style_features = features_of(content), features_of(style)
np.testing.assert_allclose(image_of(content_features), content, atol=1e-3)

# %%
# The normalisation
# -----------------
# One call does it: the content is normalised, multiplied by the deviations of the style, and its means are added. For
# that the weight and the bias have the shape (N, C): one number for each channel of each sample. AdaIN takes the
# unbiased variance and adds eps to it, for content and style alike: hence ``ddof=1``. The conventions of other projects
# are in the user guide, under "Conventions". The same calls take CuPy arrays.

moments = cn.moments(style_features)
style_std = np.sqrt(moments.var(ddof=1) + EPS).astype(np.float32)
style_mean = moments.mean.astype(np.float32)
result_features = cn.instance_norm(content_features, weight=style_std, bias=style_mean, eps=EPS, ddof=1)
result = image_of(result_features)

# %%
# The features of the result have the means and the deviations of the style, up to rounding and eps.

reached = cn.moments(result_features)
of_means = abs(reached.mean - moments.mean).max()
of_deviations = abs(reached.std(ddof=1) / moments.std(ddof=1) - 1).max()
print(f"largest difference: of means {of_means:.1e} grey levels, of deviations {of_deviations:.1e} of their size")
assert of_means < 1e-3
assert of_deviations < 1e-4

# %%
# The last panel shows the deviations of the red + green + blue channels, except the channel of the blocks' means. The
# deviations of the result lie on those of the style. Where a pixel of the result leaves 0 ... 255, it is clipped.


def deviations(features: np.ndarray) -> np.ndarray:
    """Return the deviations of the channels of red + green + blue but the first, (63,)."""
    return cn.moments(features).std()[0, 1 : BLOCK**2]


frequencies = np.hypot(*np.indices((BLOCK, BLOCK))).ravel()[1:] / (2 * BLOCK)  # a block has BLOCK / 2 periods at most
figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
pictures = {"content": content, "style": style, "content with the statistics of the style": result}
for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=False):
    axis.imshow(picture.clip(0, 255).astype(np.uint8))
    axis.set_title(title)
    axis.set_axis_off()
plot = axes[1, 1]
plot.loglog(frequencies, deviations(content_features), "o", ms=5, color="#1f5fa8", label="content")
plot.loglog(frequencies, deviations(style_features), "o", ms=8, mfc="none", color="#c1440e", label="style")
plot.loglog(frequencies, deviations(result_features), ".", ms=5, color="black", label="result")
plot.set(xlabel="spatial frequency (periods per pixel)", ylabel="deviation of a channel (grey levels)")
plot.set_title("contrast of details")
plot.set_xticks([0.0625, 0.125, 0.25, 0.5], ["1/16", "1/8", "1/4", "1/2"])
plot.minorticks_off()
plot.legend(frameon=False)
figure.savefig("adaptive_normalization.png", dpi=100)
