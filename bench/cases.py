"""What is measured: shapes, least traffic, and the arrays of one measurement with their exact answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cupynorm import devices
from cupynorm.functional import math_dtype

Array = Any  # numpy.ndarray or cupy.ndarray

EPS = 1e-5
LAYOUTS = ("channels_first", "channels_last")
DTYPES = ("float16", "bfloat16", "float32", "float64")

#: Storage-sized reads and writes per element that no implementation can do without:
#: read x, write y; read x and dy, write dx; both.
ACCESSES = {"forward": 2, "backward": 3, "both": 5}

#: Errors, absolute for inputs N(1, 1), above which an answer is wrong and not only inexact. In float32, sums in plain
#: order over a million elements lose three digits, and some peers do that.
TOLERANCE = {"float16": 3e-2, "bfloat16": 2e-1, "float32": 1e-3, "float64": 1e-9}

BLOCK = 1 << 23  # elements of one block of the reference: bounds its float64 temporaries


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    op: str
    shape: tuple[int, ...]  # (N, C, *spatial), in either layout
    dtype: str
    layout: str
    affine: bool

    @property
    def itemsize(self) -> int:
        return devices.dtype_of(self.dtype).itemsize

    @property
    def plane_bytes(self) -> int:
        return math.prod(self.shape[2:]) * self.itemsize

    @property
    def minimal_bytes(self) -> int:
        """The least traffic of the operation: what the benchmark's GB/s counts, whatever was really moved."""
        return ACCESSES[self.op] * self.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        affine = "affine" if self.affine else "plain"
        return f"{self.op} {self.shape} {self.dtype} {self.layout} {affine}"


def real_shapes() -> list[tuple[tuple[int, ...], bool]]:
    """Shapes of real networks, each once, and whether their layers are affine.

    "per sample" affine (AdaIN) is a multiplication of its own after a plain normalisation, which is what is measured.
    """
    entries = json.loads((Path(__file__).parent / "real_shapes.json").read_text(encoding="utf-8"))["shapes"]
    return list({tuple(e["shape"]): e["affine"] is True for e in entries}.items())


def sweep_shapes(elements: int) -> list[tuple[tuple[int, ...], bool]]:
    """Square planes from 4x4 up, as many of them as make `elements` (a power of 4): same bytes, other owners."""
    steps = range(2, int(math.log2(elements)) // 2 + 1)
    return [((1, elements // 4**k, 2**k, 2**k), False) for k in steps]


def parse_shapes(words: list[str], sweep_elements: int) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes for 'real', 'sweep' and 'N,C,H,W' (any rank of 3 or more; plain); ValueError for anything else."""
    shapes: dict[tuple[int, ...], bool] = {}
    for word in words:
        if word == "real":
            shapes.update(real_shapes())
        elif word == "sweep":
            shapes.update(sweep_shapes(sweep_elements))
        else:
            try:
                shape = tuple(int(part) for part in word.split(","))
            except ValueError:
                shape = ()
            if len(shape) < 3 or min(shape) < 1 or math.prod(shape[2:]) < 2:
                raise ValueError(f"a shape is 'real', 'sweep' or N,C,H,W of more than one position, got {word!r}")
            shapes[shape] = False
    return list(shapes.items())


def buffer_sets(set_bytes: int, cache_bytes: int, limit: int) -> int:
    """How many sets of arrays to go round so that what one call touched has left the cache before its next turn."""
    return max(1, min(limit, math.ceil(cache_bytes / max(set_bytes, 1))))


def float64_of(array: Array, xp: Any) -> Array:
    if array.dtype.name == "bfloat16":  # the upper half of a float32; in bits, since CuPy's bfloat16 is young
        array = (array.view(xp.uint16).astype(xp.uint32) << 16).view(xp.float32)
    return array.astype(xp.float64)


class Arrays:
    """The arrays of a shape, on the device: sets of x and dy of equal contents in memory of their own.

    xp is numpy or cupy. weight and bias are None or (C,), in the dtype that x computes in.
    """

    def __init__(self, xp: Any, shape: tuple[int, ...], dtype: str, layout: str, affine: bool, sets: int):
        self.xp, self.shape, self.dtype, self.layout, self.affine, self.sets = xp, shape, dtype, layout, affine, sets
        rng = np.random.default_rng(20)
        size = math.prod(shape)
        # A pool whose length shares no factor with a plane's is repeated: quick, and no two planes are alike.
        pool = rng.standard_normal(min(size, 4_000_037), dtype=np.float32)
        storage = devices.dtype_of(dtype)
        self.host_x = self._laid((pool + 1).astype(storage), shape)
        self.host_dy = self._laid(pool[::-1].astype(storage), shape)
        self.x, self.dy = self._device(self.host_x), self._device(self.host_dy)
        self.host_weight: np.ndarray | None = None
        self.host_bias: np.ndarray | None = None
        self.weight: Array = None
        self.bias: Array = None
        if affine:
            self.host_weight = rng.uniform(0.5, 1.5, shape[1]).astype(math_dtype(storage))
            self.host_bias = rng.uniform(-0.5, 0.5, shape[1]).astype(math_dtype(storage))
            self.weight, self.bias = xp.asarray(self.host_weight), xp.asarray(self.host_bias)

    def _laid(self, pool: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if self.layout == "channels_first":
            return np.resize(pool, shape)
        n, c, *spatial = shape
        return np.moveaxis(np.resize(pool, (n, *spatial, c)), -1, 1)

    def _device(self, host: np.ndarray) -> list[Array]:
        """The sets of a host array, with its strides."""
        xp, last = self.xp, self.layout == "channels_last"
        dense = np.moveaxis(host, 1, -1) if last else host
        first = xp.asarray(dense.view(np.uint16) if self.dtype == "bfloat16" else dense)  # moved as bits
        sets = [first.copy().view(host.dtype) for _ in range(self.sets)]
        return [xp.moveaxis(each, -1, 1) for each in sets] if last else sets

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        n, c, *spatial = self.shape
        plane = math.prod(spatial)
        channels = max(1, min(c, BLOCK // plane))
        samples = max(1, min(n, BLOCK // (plane * c)))
        for i in range(0, n, samples):
            for j in range(0, c, channels):
                yield slice(i, i + samples), slice(j, j + channels)

    @cached_property
    def reference(self) -> dict[str, Array]:
        """y, dx, and dweight and dbias if affine, in float64 from the stored values of x and dy."""
        xp = self.xp
        c, rank = self.shape[1], len(self.shape) - 2
        spatial = tuple(range(2, rank + 2))
        exact = {name: xp.empty(self.shape, xp.float64) for name in ("y", "dx")}
        dweight, dbias = xp.zeros(c), xp.zeros(c)
        for block in self._blocks():
            channels = block[1]
            x, dy = float64_of(self.x[0][block], xp), float64_of(self.dy[0][block], xp)
            x -= x.mean(spatial, keepdims=True)
            x -= x.mean(spatial, keepdims=True)  # what rounding left in the mean
            rstd = 1 / xp.sqrt((x * x).mean(spatial, keepdims=True) + EPS)
            xhat = x * rstd
            dweight[channels] += (dy * xhat).sum((0, *spatial))
            dbias[channels] += dy.sum((0, *spatial))
            y = xhat
            if self.affine:
                weight, bias = (
                    p[channels].astype(xp.float64).reshape(1, -1, *(1,) * rank) for p in (self.weight, self.bias)
                )
                y = xhat * weight + bias
                rstd = rstd * weight
            exact["y"][block] = y
            dy_mean, dot = dy.mean(spatial, keepdims=True), (dy * xhat).mean(spatial, keepdims=True)
            exact["dx"][block] = rstd * (dy - dy_mean - xhat * dot)
        if self.affine:
            exact |= {"dweight": dweight, "dbias": dbias}
        return exact

    def error(self, answers: dict[str, Array], op: str) -> float:
        """The largest error against the reference, absolute; of dweight and dbias per sqrt(N * S), their usual size.

        ValueError when an answer is missing or has another shape. NaN anywhere gives NaN.
        """
        gradients = ("dx", "dweight", "dbias") if self.affine else ("dx",)
        wanted = {"forward": ("y",), "backward": gradients, "both": ("y", *gradients)}[op]
        worst = 0.0
        for name in wanted:
            got, exact = answers.get(name), self.reference[name]
            if got is None or got.shape != exact.shape:
                raise ValueError(f"{name} has shape {getattr(got, 'shape', None)}, not {exact.shape}")
            if name in {"y", "dx"}:
                errors = [self._distance(got[block], exact[block]) for block in self._blocks()]
            else:
                errors = [self._distance(got, exact) / math.sqrt(math.prod(self.shape) / self.shape[1])]
            worst = float(np.max([worst, *errors]))
        return worst

    def _distance(self, got: Array, exact: Array) -> float:
        return float(self.xp.abs(float64_of(got, self.xp) - exact).max())
