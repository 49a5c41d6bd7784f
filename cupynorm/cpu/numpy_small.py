"""NumPy calls in float64, for samples of few elements: there a call takes longer than its arithmetic, so few count.

Which samples these are depends on their shape and on whether there is a mask, not on how many there are: a sample has
the same bits in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .._types import Array, Saved
from ..config import get_num_threads
from ..conventions import count_ratio, rstd_of
from .blocking import Arrays, Work
from .numpy_activations import activate, scratch_blocks, times_slope
from .numpy_path import NumpyWork
from .thread_pool import TaskQueue, share

MOST = 4096  # elements of a sample
BLOCK = 2**15  # elements of the samples that are processed together, whose float64 copies a core's caches hold
_ONES = np.ones(MOST)  # a dot product sums faster than a reduction


class SmallWork(Work):
    """All that NumpyWork does, without masks and tiles. A block is a range of samples."""

    tiles = 1

    def __init__(self, call: Saved, arrays: Arrays):
        self.call, self.arrays, self.dtype = call, arrays, call.statistics.dtype
        samples, channels, *spatial = call.x.shape
        self.plane = math.prod(spatial)
        self.together = max(BLOCK // (channels * self.plane), 1)
        self.blocks = -(-samples // self.together)
        self.threads = 1 if call.x.size < NumpyWork.pays else get_num_threads()

    @property
    def again(self) -> type[SmallWork]:
        return SmallWork

    def __str__(self) -> str:
        return f"NumPy, {self.blocks} block(s) of samples, in float64"

    @staticmethod
    def suits(call: Saved, arrays: Arrays) -> bool:
        """Return whether the samples of a call have few elements, and no mask."""
        return arrays.mask is None and 0 < math.prod(call.x.shape[1:]) <= MOST

    def _each_block(self, step: Callable[[slice], None]) -> None:
        if self.blocks == 1:  # at once: the calls on small arrays come here
            with np.errstate(all="ignore"):
                step(slice(None))
            return
        queue = TaskQueue(self.blocks)

        def work(worker: int) -> None:
            with np.errstate(all="ignore"):
                for i in queue.tasks(worker):
                    step(slice(i * self.together, (i + 1) * self.together))

        share(work, queue, min(self.threads, self.blocks))

    # Samples in float64: planes of N, of C, positions; and numbers of planes, which go with them

    def _read(self, array: Array, part: slice) -> np.ndarray:
        """Return a copy of samples."""
        given = array[part]
        return np.array(given, np.float64, order="C").reshape(*given.shape[:2], -1)

    def _write(self, array: Array, part: slice, values: np.ndarray) -> None:
        target = array[part]
        if target.itemsize == 2:  # as if computed in float32 and cast
            values = values.astype(np.float32)
        target[...] = values.reshape(target.shape)

    def _parameter(self, parameter: Array, part: slice) -> np.ndarray:
        values: np.ndarray = (parameter[part] if parameter.ndim == 2 else parameter).astype(np.float64)
        return values[..., None]

    def _centred(self, part: slice) -> np.ndarray:
        """Return x - mean, with the statistics as they are saved."""
        call = self.call
        x, mean = self._read(self.arrays.x, part), call.mean[part, :, None]
        if call.mean_lo is None:
            x -= mean
        elif self.dtype == np.float64:
            x -= mean
            x -= call.mean_lo[part, :, None]
        else:  # their sum has fewer digits than a float64
            x -= np.add(mean, call.mean_lo[part, :, None], dtype=np.float64)
        return x

    def _moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean and mean_lo, and the sum of squares about them. Afterwards x is x - mean - mean_lo."""
        ones = _ONES[: self.plane]
        if self.dtype == np.float64:
            base = x[..., :1]  # the mean of a constant plane is exact; in float32 it is in any case
            mean = np.vecdot(x - base, ones) / self.plane + base[..., 0]
            x -= mean[..., None]
            mean_lo = np.vecdot(x, ones) / self.plane
            x -= mean_lo[..., None]
        else:
            wide = np.vecdot(x, ones)
            wide /= self.plane
            mean = wide.astype(self.dtype)
            mean_lo = (wide - mean).astype(self.dtype)
            x -= np.add(mean, mean_lo, dtype=np.float64)[..., None]
        return mean, mean_lo, np.vecdot(x, x)

    def _scale(self, part: slice) -> np.ndarray:
        call = self.call
        scale = call.rstd[part, :, None].astype(np.float64)
        return scale if call.weight is None else scale * self._parameter(call.weight, part)

    def _z(self, centred: np.ndarray, scale: np.ndarray, part: slice) -> np.ndarray:
        """Return the activation's argument. Both passes compute the same bits."""
        call, z = self.call, centred * scale
        if call.bias is not None:
            z += self._parameter(call.bias, part)
        if self.arrays.residual is not None:
            z += self._read(self.arrays.residual, part)
        return z

    def _slope(self) -> Any:
        """Return the negative slope, rounded as in larger samples. It may overflow, so this is for steps."""
        return self.dtype.type(self.call.negative_slope)

    def _scratch(self, like: np.ndarray) -> list[np.ndarray]:
        return [np.empty_like(like) for _ in range(scratch_blocks(self.call.activation))]

    # Forward

    def _finish(self, centred: np.ndarray, part: slice) -> None:
        call, target, scale = self.call, self.arrays.result[part], self._scale(part)
        plain = call.activation is None and call.bias is None and self.arrays.residual is None
        if plain and target.dtype == self.dtype and target.flags.c_contiguous:
            np.multiply(centred, scale, out=target.reshape(centred.shape), casting="same_kind")
            return
        y = self._z(centred, scale, part)
        if call.activation is not None:
            activate(y, call.activation, self._slope(), self._scratch(y))
        self._write(self.arrays.result, part, y)

    def forward(self, variance: np.ndarray | None) -> None:
        call = self.call
        mean, rstd, mean_lo = call.statistics
        share, ratio = 1 / self.plane, count_ratio(self.plane, call.ddof)

        def step(part: slice) -> None:
            x = self._read(self.arrays.x, part)
            mean[part], mean_lo[part], var = self._moments(x)
            var *= share
            if variance is not None:
                variance[part] = var
            rstd[part] = rstd_of(var if ratio == 1 else var * ratio, call.eps, call.eps_mode)
            self._finish(x, part)

        self._each_block(step)

    def moments(self) -> tuple[np.ndarray, ...]:
        """Return count, mean, mean_lo and m2 of each plane, (1, N, C)."""
        shape = 1, *self.call.x.shape[:2]
        mean, mean_lo, m2 = np.empty((3, *shape))

        def step(part: slice) -> None:
            x = self._read(self.arrays.x, part)
            mean[0, part], mean_lo[0, part], m2[0, part] = self._moments(x)

        self._each_block(step)
        return np.full(shape, self.plane), mean, mean_lo, m2

    def normalize(self) -> None:
        self._each_block(lambda part: self._finish(self._centred(part), part))

    # Backward

    def _gradient(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return g, x - mean, and rstd * weight."""
        call, centred, scale = self.call, self._centred(part), self._scale(part)
        dy: Any = self.arrays.dy
        g = self._read(dy, part)
        if call.activation is not None:
            z = self._z(centred, scale, part)
            times_slope(g, z, call.activation, self._slope(), g, self._scratch(z))
        return g, centred, scale

    def _sums(self, g: np.ndarray, centred: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of g and of g * xhat."""
        return np.add.reduce(g, 2), np.vecdot(g, centred) * self.call.rstd[part]

    def _differentiate(
        self, gradient: tuple[np.ndarray, np.ndarray, np.ndarray], sums: tuple[Any, Any], slopes: np.ndarray | None,
        part: slice,
    ) -> None:  # fmt: skip
        """Compute dx = scale * (g - mean(g) - xhat * mean(g * xhat) * slope)."""
        g, centred, scale = gradient
        if self.arrays.dresidual is not None:
            self._write(self.arrays.dresidual, part, g)
        if self.call.training:
            sum_g, sum_g_xhat = (each / self.plane for each in sums)
            factor = sum_g_xhat * self.call.rstd[part]
            if slopes is not None:
                factor *= slopes[part]
            centred *= factor[..., None]
            g -= sum_g[..., None]
            g -= centred
        g *= scale
        self._write(self.arrays.result, part, g)

    def backward(
        self, sum_g: np.ndarray, sum_g_xhat: np.ndarray, slopes: np.ndarray | None = None, counts: None = None
    ) -> None:
        """slopes: rstd_slope of each plane (conventions.py), or None if it is 1."""

        def step(part: slice) -> None:
            gradient = self._gradient(part)
            sums = self._sums(*gradient[:2], part)
            sum_g[part], sum_g_xhat[part] = sums
            self._differentiate(gradient, sums, slopes, part)

        self._each_block(step)

    def gradient_sums(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        def step(part: slice) -> None:
            sum_g[part], sum_g_xhat[part] = self._sums(*self._gradient(part)[:2], part)

        self._each_block(step)

    def input_gradient(self, sum_g: np.ndarray, sum_g_xhat: np.ndarray) -> None:
        self._each_block(
            lambda part: self._differentiate(self._gradient(part), (sum_g[part], sum_g_xhat[part]), None, part)
        )
