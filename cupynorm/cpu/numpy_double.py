"""The steps of the double backward as NumPy calls."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .._types import Array, Saved
from .blocking import Index
from .numpy_path import PRODUCT, RESULT, G, NumpyWork, V, X


class DoubleArrays(NamedTuple):
    """The arrays of a double backward; result is dx."""

    x: Array
    result: Array
    dy: Array
    ddy: Array
    ddx: Array | None = None


class DoubleBackwardWork(NumpyWork):
    """The double backward; arrays are x, dx, dy, ddy and, if given, ddx.

    With v = rstd * (ddx - mean(ddx)) and g = dy - mean(dy), all factors have the magnitude of some result:

        ddy = weight * v + q * xhat + ddbias,   q = ddweight - weight * a
        dx = rstd * (q * g - weight * c * v + r * xhat),   r = weight * (a * c - s) - q * c

    with a = mean(v * xhat), c = mean(g * xhat), s = mean(v * g) - a * c. With running statistics no mean is subtracted,
    and a, c and s are 0. The rounded mean, the shift, is subtracted first, so that a large mean costs no digits; then
    the remainder.
    """

    buffers = 5  # xhat, g, v, a product, and a result that cannot be computed in place

    def __init__(self, call: Saved, arrays: DoubleArrays, ddweight: Array | None, ddbias: Array | None):
        super().__init__(call, arrays)
        self.g, self.ddy, self.u = self.arrays.dy, self.arrays.ddy, self.arrays.ddx
        self.ddweight, self.ddbias = ddweight, ddbias

    def double_backward(self, sums: np.ndarray) -> None:
        self.sums = sums
        if not self.call.training and (self.u is None or self.call.weight is None):
            self.share(self.apply_double, self.blocks * self.tiles)
            return
        if self.tiles > 1:
            self.partials = np.empty((9, self.tiles, *sums.shape))
            self.joined = np.empty((8, *sums.shape))
        self.run(self.reduce_double, self.join_double, self.apply_double, self.whole_double)

    def _scaled(self, array: Array, index: Index, buffer: np.ndarray, centres: Any, scale: Any = None) -> Any:
        """Return (array - centres) * scale of a block, in scratch; None without an array."""
        if array is None:
            return None
        block = self._read(array, index, buffer, copy=True)
        for centre in centres:
            self._each(np.subtract, block, centre, block)
        if scale is not None:
            self._each(np.multiply, block, scale, block)
        return block

    def _xhat(self, index: Index, planes: Index, buffer: np.ndarray) -> np.ndarray:
        call = self.call
        centres = (call.mean[planes],) if call.mean_lo is None else (call.mean[planes], call.mean_lo[planes])
        block: np.ndarray = self._scaled(self.x, index, buffer, centres, call.rstd[planes])
        return block

    def _blocks(self, index: Index, planes: Index, scratch: np.ndarray, shifts: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return xhat, g and v of a block, the last two minus their shifts; v is None without ddx."""
        return (
            self._xhat(index, planes, scratch[X]),
            self._scaled(self.g, index, scratch[G], shifts[:1]),
            self._scaled(self.u, index, scratch[V], shifts[1:], self.call.rstd[planes]),
        )

    def _about_mean(self, array: Array, index: Index, buffer: np.ndarray) -> tuple[Any, Any, Any]:
        """Return a block minus its shifts (the rounded means of its planes), the shifts, and the sums of the result."""
        if array is None:
            return None, 0.0, 0.0
        block = self._read(array, index, buffer, copy=True)
        shift = (self._sums(block) / block.shape[2]).astype(self.dtype, copy=False)
        self._each(np.subtract, block, shift, block)
        return block, shift, self._sums(block)

    def _reduced(self, index: Index, planes: Index, scratch: np.ndarray) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return xhat, g and v of a tile, relative to its own shifts, and its partials for `_joined`."""
        size = math.prod(self.x[index].shape[2:])
        if not self.call.training:
            blocks = self._blocks(index, planes, scratch, ())
            return blocks, (size, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, self._dots(blocks[2], blocks[1], scratch[PRODUCT]))
        g, shift_g, sum_g = self._about_mean(self.g, index, scratch[G])
        v, shift_u, sum_u = self._about_mean(self.u, index, scratch[V])
        xhat = self._xhat(index, planes, scratch[X])
        dots: tuple[Any, ...] = (self._dots(g, xhat, scratch[PRODUCT]), 0.0, 0.0)
        if v is not None:
            self._each(np.multiply, v, self.call.rstd[planes], v)
            dots = (dots[0], self._dots(v, xhat, scratch[PRODUCT]), self._dots(v, g, scratch[PRODUCT]))
        return (xhat, g, v), (size, self._sums(xhat), shift_g, sum_g, shift_u, sum_u, *dots)

    def _joined(self, planes: Index, partials: np.ndarray) -> tuple[Any, ...]:
        """Merge the tiles' partials in float64: shifts and remainders of g and u, remainder of xhat, and a, c and s.

        partials: count, sum of xhat, shift and remaining sum of g, the same of u, and the dots g xhat, v xhat and v g.
        The gaps between the tiles' shifts and the means add to the dots (Chan, Golub, LeVeque 1983, for products).
        """
        count, sum_x, shift_g, sum_g, shift_u, sum_u, dot_gx, dot_vx, dot_vg = partials
        rstd = self.call.rstd[planes].astype(np.float64)
        size = self.spatial
        gap_g, gap_u = shift_g - shift_g[0], shift_u - shift_u[0]
        remainder_g, remainder_u = (count * gap_g + sum_g).sum(0) / size, (count * gap_u + sum_u).sum(0) / size
        if self.call.training:
            gap_g, gap_u = gap_g - remainder_g, rstd * (gap_u - remainder_u)
            sum_v = rstd * sum_u
            a, c = (dot_vx + gap_u * sum_x).sum(0) / size, (dot_gx + gap_g * sum_x).sum(0) / size
            s = (dot_vg + gap_u * sum_g + gap_g * sum_v + count * gap_u * gap_g).sum(0) / size - a * c
            self.sums[planes] = s * size
        else:
            a = c = s = 0 * remainder_g
            self.sums[planes] = dot_vg.sum(0)
        bases, remainders = (shift_g[0], shift_u[0]), (remainder_g, remainder_u)
        shifts = bases
        if self.tiles > 1:
            shifts = tuple(
                (base + remainder).astype(self.dtype) for base, remainder in zip(bases, remainders, strict=True)
            )
            remainders = tuple(
                (base - shift) + remainder for base, shift, remainder in zip(bases, shifts, remainders, strict=True)
            )
        return *shifts, *remainders, sum_x.sum(0) / size, a, c, s

    def reduce_double(self, item: int, scratch: np.ndarray) -> None:
        planes, index, tile = self._index(item)
        for each, value in zip(self.partials, self._reduced(index, planes, scratch)[1], strict=True):
            each[(tile, *planes)] = value

    def join_double(self, first: int, last: int) -> None:
        for planes in self.planes[first:last]:
            parts = self.partials[(slice(None), slice(None), *planes)]
            for each, value in zip(self.joined, self._joined(planes, parts), strict=True):
                each[planes] = value

    def apply_double(self, item: int, scratch: np.ndarray) -> None:
        planes, index, _ = self._index(item)
        shifts, numbers = (), (0.0,) * 6
        if self.call.training:
            joined = [each[planes] for each in self.joined]
            shifts, numbers = tuple(each.astype(self.dtype) for each in joined[:2]), tuple(joined[2:])
        self._finish_double(index, planes, self._blocks(index, planes, scratch, shifts), numbers, scratch)

    def whole_double(self, block: int, scratch: np.ndarray) -> None:
        if self.tiles > 1:
            self._in_tiles(block, scratch, self.reduce_double, self.join_double, self.apply_double)
            return
        planes, index, _ = self._index(block)
        blocks, sums = self._reduced(index, planes, scratch)
        parts = np.empty((9, 1, *self.sums[planes].shape))
        for each, value in zip(parts, sums, strict=True):
            each[...] = value
        self._finish_double(index, planes, blocks, self._joined(planes, parts)[2:], scratch)

    def _finish_double(
        self, index: Index, planes: Index, blocks: tuple[Any, ...], numbers: tuple[Any, ...], scratch: np.ndarray
    ) -> None:
        xhat, g, v = blocks
        remainder_g, remainder_u, remainder_x, a, c, s = numbers
        shape = self.sums[planes].shape
        rstd = self.call.rstd[planes]
        weight, ddweight, ddbias = (
            np.broadcast_to(default if given is None else self._per_plane(given, planes), shape).astype(np.float64)
            for given, default in ((self.call.weight, 1.0), (self.ddweight, 0.0), (self.ddbias, 0.0))
        )
        q, constant_y, constant, more = ddweight, ddbias, np.zeros(shape), []
        if self.call.training:
            q, remainder_v = ddweight - weight * a, rstd * remainder_u
            r = weight * (a * c - s) - q * c
            constant_y = ddbias - weight * remainder_v - q * remainder_x
            constant = weight * c * remainder_v - q * remainder_g - r * remainder_x
            more = [(v, -weight * c), (xhat, r)]
        if self.ddweight is None and (v is None or not self.call.training):
            g = xhat = None  # q is 0, but g and xhat may be infinite
            more = []
        self._combine(self.ddy, index, scratch, [(v, weight), (xhat, q)], constant_y)
        self._combine(self.result, index, scratch, [(g, q), *more], constant, rstd)

    def _combine(
        self, array: Array, index: Index, scratch: np.ndarray, terms: Any, constant: np.ndarray, scale: Any = None
    ) -> None:
        """Compute array <- (sum of block * number over the terms + constant) * scale, with numbers per plane."""
        terms = [term for term in terms if term[0] is not None]
        out = self._target(array, index, scratch[RESULT])
        if not terms:
            out[...] = 0
        for i, (block, number) in enumerate(terms):
            product = self._in_buffer(block, scratch[PRODUCT]) if i else out
            self._each(np.multiply, block, number.astype(self.dtype), product)
            if i:
                out += product
        self._each(np.add, out, constant.astype(self.dtype), out)
        if scale is not None and terms:
            self._each(np.multiply, out, scale, out)
        self._write(array, index, out, scratch[PRODUCT])
