"""The cases: shapes, least traffic, and the arrays of a measurement with their exact answers."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupynorm import devices
from cupynorm._types import math_dtype

Array = Any  # numpy.ndarray or cupy.ndarray

EPS = 1e-5
LAYOUTS = ("channels_first", "channels_last")
DTYPES = ("float16", "bfloat16", "float32", "float64")
EPILOGUES = ("none", "fused")
PER_SAMPLE = "per sample"  # affine of shape (N, C): AdaIN

#: Elements of a shape of the sweep, powers of 4.
SWEEP_ELEMENTS = {"cpu": 4**11, "gpu": 4**13}

#: Storage-sized reads and writes per element that no implementation can do without:
#: read x, write y; read x and dy, write dx; both.
ACCESSES = {"forward": 2, "backward": 3, "both": 5}

#: Absolute errors, for inputs N(1, 1), above which an answer is wrong and not only inexact. In float32 a sum of a
#: million elements in plain order loses three digits, and some peers sum that way.
TOLERANCE = {"float16": 3e-2, "bfloat16": 2e-1, "float32": 1e-3, "float64": 1e-9}

BLOCK = 1 << 23  # elements of one block of the reference: bounds its float64 temporaries


class Layer(NamedTuple):
    """An instance normalisation of a network: the shape (N, C, *spatial), the affine and the activation."""

    shape: tuple[int, ...]
    affine: bool | str = False  # PER_SAMPLE is the other str
    activation: str | None = None
    negative_slope: float = 0.01
    swept: bool = False

    def plain(self) -> Layer:
        """Drop the epilogue, and a per-sample affine with it, since that needs a separate multiplication."""
        return Layer(self.shape, self.affine is True, swept=self.swept)


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    op: str
    shape: tuple[int, ...]  # (N, C, *spatial), in either layout
    dtype: str
    layout: str
    affine: bool | str
    activation: str | None = None
    negative_slope: float = 0.01

    @property
    def itemsize(self) -> int:
        return devices.dtype_of(self.dtype).itemsize

    @property
    def plane_bytes(self) -> int:
        return math.prod(self.shape[2:]) * self.itemsize

    @property
    def minimal_bytes(self) -> int:
        """The least traffic of the operation, which the benchmark's GB/s counts, whatever was really moved."""
        return ACCESSES[self.op] * self.itemsize * math.prod(self.shape)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """All that determines its arrays: cases that differ in op alone share them."""
        return self.shape, self.dtype, self.layout, self.affine, self.activation, self.negative_slope

    @property
    def key(self) -> tuple[Any, ...]:
        """The same as report.key of its row."""
        return self.op, self.shape, self.dtype, self.layout, self.affine, self.activation

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.layout} {epilogue_text(self.affine, self.activation)}"


def epilogue_text(affine: bool | str, activation: str | None) -> str:
    words = [PER_SAMPLE if affine == PER_SAMPLE else "affine"] if affine else []
    return " ".join([*words, *([activation] if activation else [])]) or "plain"


def words(text: str, allowed: tuple[str, ...], what: str) -> list[str]:
    """Split an option into words, each of them one of `allowed`."""
    found = [word for word in text.split(",") if word]
    unknown = [word for word in found if word not in allowed]
    if unknown or not found:
        raise argparse.ArgumentTypeError(f"{what}: {', '.join(allowed)} (comma-separated), got {text!r}")
    return found


def real_layers() -> list[Layer]:
    """Return the layers of real networks, each shape once."""
    entries = json.loads((Path(__file__).parent / "real_shapes.json").read_text(encoding="utf-8"))["shapes"]
    return [Layer(tuple(e["shape"]), e["affine"], e["activation"], e.get("slope", 0.01)) for e in entries]


def sweep_layers(elements: int) -> list[Layer]:
    """Square planes from 4x4 up, as many of them as make `elements` (a power of 4): same bytes, other scopes."""
    steps = range(2, int(math.log2(elements)) // 2 + 1)
    return [Layer((1, elements // 4**k, 2**k, 2**k), swept=True) for k in steps]


def short_layers() -> list[Layer]:
    """Return short planes of many sizes, in arrays of 0.1 to 16 MB of float32."""
    found = []
    for megabytes in (0.1, 0.4, 1, 4, 16):
        for size in (9, 16, 25, 49, 64, 100, 196, 256, 400, 784, 1024, 1773, 2048):
            planes = max(1, round(megabytes * 2**18 / size))
            samples = max(1, round(planes / 64))
            found.append(Layer((samples, round(planes / samples), size), swept=True))
    return found


def random_layers(seed: int, count: int = 12) -> list[Layer]:
    """Draw shapes of 1 to 3 spatial axes: planes of about 4 elements to 4 MB, arrays of 64 KB to 64 MB, in float32."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        rank = int(rng.integers(1, 4))
        plane, total = np.exp(rng.uniform(np.log([4, 2**14]), np.log([2**20, 2**24])))
        spatial = [max(1, round(plane ** (1 / rank) * rng.uniform(0.7, 1.4))) for _ in range(rank)]
        planes = max(1, round(total / math.prod(spatial)))
        channels = max(1, min(planes, round(np.exp(rng.uniform(0, np.log(1024))))))
        if 2 <= math.prod(spatial) <= 2**24:
            found.append(Layer((max(1, planes // channels), channels, *spatial)))
    return found


def parse_shapes(words: list[str], sweep_elements: int, seed: int = 0) -> list[Layer]:
    """Return layers for 'real', 'sweep', 'short', 'random' and 'N,C,H,W' (any rank of 3 or more).

    ValueError for anything else. seed: of the random shapes. A shape of a real network is that network's layer, also if
    it is given in numbers; other shapes are plain.
    """
    real = {layer.shape: layer for layer in real_layers()}
    layers: dict[tuple[int, ...], Layer] = {}
    for word in words:
        if word == "real":
            layers.update(real)
        elif word == "sweep":
            layers = {layer.shape: layer for layer in sweep_layers(sweep_elements)} | layers
        elif word in ("short", "random"):
            more = short_layers() if word == "short" else random_layers(seed)
            layers = {layer.shape: layer for layer in more} | layers
        else:
            try:
                shape = tuple(int(part) for part in word.split(","))
            except ValueError:
                shape = ()
            if len(shape) < 3 or min(shape) < 1 or math.prod(shape[2:]) < 2:
                raise ValueError(
                    f"a shape is 'real', 'sweep', 'short', 'random' or N,C,H,W of more than one position, got {word!r}"
                )
            layers[shape] = real.get(shape, Layer(shape))
    return list(layers.values())


def cases_of(
    layers: list[Layer],
    dtypes: list[str],
    layouts: list[str],
    epilogues: list[str],
    ops: list[str],
    affine: bool | None = None,
) -> list[Case]:
    """Return the cases, each once, the most important first in case time runs out: the sweep late, and last the cases
    with both an epilogue and the second layout. Otherwise the order is that of the arguments, layouts outermost.

    affine: replaces the layers' own; None keeps it.
    """
    found: dict[Case, tuple[bool, bool]] = {}
    for layout in layouts:
        for epilogue in epilogues:
            for dtype in dtypes:
                for layer in layers:
                    shape, own, activation, slope, swept = layer if epilogue == "fused" else layer.plain()
                    late = layout != layouts[0] and epilogue != epilogues[0]
                    for op in ops:
                        case = Case(op, shape, dtype, layout, own if affine is None else affine, activation, slope)
                        found.setdefault(case, (late, swept))
    return sorted(found, key=lambda case: found[case])


def buffer_sets(set_bytes: int, cache_bytes: int, limit: int) -> int:
    """Return how many sets of arrays to rotate so that a call's data has left the cache before its next turn."""
    return max(1, min(limit, math.ceil(cache_bytes / max(set_bytes, 1))))


def float64_of(array: Array, xp: Any) -> Array:
    if array.dtype.name == "bfloat16":  # the upper half of a float32; in bits, since CuPy's bfloat16 is young
        array = (array.view(xp.uint16).astype(xp.uint32) << 16).view(xp.float32)
    return array.astype(xp.float64)


@lru_cache(maxsize=1)
def _random_pool() -> np.ndarray:
    return np.random.default_rng(20).standard_normal(4_000_037, dtype=np.float32)


class Arrays:
    """The arrays of a shape, on the device: sets of x and dy of equal contents, each in its own memory.

    xp is numpy or cupy. weight and bias are None, (C,) or (N, C), in the dtype that x computes in. With an activation
    dy is 0 where the activation's input is within the tolerance of 0, so that the right gradient is the same on
    whichever side of 0 the input was rounded to.
    """

    eps = EPS

    def __init__(
        self,
        xp: Any,
        shape: tuple[int, ...],
        dtype: str,
        layout: str,
        affine: bool | str,
        sets: int,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ):
        self.xp, self.shape, self.dtype, self.layout, self.affine, self.sets = xp, shape, dtype, layout, affine, sets
        self.activation, self.negative_slope = activation, negative_slope
        #: The activation's slope below 0; 1: no activation.
        self.slope = {None: 1.0, "relu": 0.0, "leaky_relu": negative_slope}[activation]
        storage = devices.dtype_of(dtype)
        self.host_weight: np.ndarray | None = None
        self.host_bias: np.ndarray | None = None
        self.weight: Array = None
        self.bias: Array = None
        if affine:
            rng, size = np.random.default_rng(21), shape[:2] if affine == PER_SAMPLE else shape[1]
            self.host_weight = rng.uniform(0.5, 1.5, size).astype(math_dtype(storage))
            self.host_bias = rng.uniform(-0.5, 0.5, size).astype(math_dtype(storage))
            self.weight, self.bias = xp.asarray(self.host_weight), xp.asarray(self.host_bias)
        # Repeat a pool whose length shares no factor with a plane's: fast, and no two planes are equal.
        pool = _random_pool()[: math.prod(shape)]
        self.x = self._sets(self._laid((pool + 1).astype(storage)))
        dy = self._laid(pool[::-1].astype(storage))
        if activation is not None:
            for block in self._blocks():
                part = self._bits(dy)[block]
                part *= xp.abs(self._exact(block)[2]) >= TOLERANCE[dtype]
        self.dy = self._sets(dy)

    @cached_property
    def host_x(self) -> np.ndarray:
        return self._host(self.x[0])

    @cached_property
    def host_dy(self) -> np.ndarray:
        return self._host(self.dy[0])

    def _bits(self, array: Array) -> Array:
        """View bfloat16 as bits, since array libraries differ in their support of it."""
        return array.view(np.uint16) if self.dtype == "bfloat16" else array

    def _host(self, array: Array) -> np.ndarray:
        return devices.to_host(self._bits(array)).view(devices.dtype_of(self.dtype))

    def _laid(self, pool: np.ndarray) -> Array:
        """Repeat the pool into an array on the device, in the layout."""
        n, c, *spatial = self.shape
        last = self.layout == "channels_last"
        array = self.xp.resize(self.xp.asarray(self._bits(pool)), (n, *spatial, c) if last else self.shape)
        array = array.view(pool.dtype)
        return self.xp.moveaxis(array, -1, 1) if last else array

    def _sets(self, first: Array) -> list[Array]:
        """Return the array and copies of it with the same strides."""
        if self.layout == "channels_first":
            return [first] + [self._bits(first).copy().view(first.dtype) for _ in range(self.sets - 1)]
        dense = self._bits(self.xp.moveaxis(first, 1, -1))
        return [first] + [self.xp.moveaxis(dense.copy().view(first.dtype), -1, 1) for _ in range(self.sets - 1)]

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        n, c, *spatial = self.shape
        plane = math.prod(spatial)
        channels = max(1, min(c, BLOCK // plane))
        samples = max(1, min(n, BLOCK // (plane * c)))
        for i in range(0, n, samples):
            for j in range(0, c, channels):
                yield slice(i, i + samples), slice(j, j + channels)

    def _affine(self, block: tuple[slice, slice]) -> list[Array]:
        """Return weight and bias of a block in float64, in a shape that broadcasts over its planes."""
        planes = [self.xp.broadcast_to(p, self.shape[:2])[block] for p in (self.weight, self.bias)]
        return [p.astype(self.xp.float64).reshape(*p.shape, *(1,) * (len(self.shape) - 2)) for p in planes]

    def _exact(self, block: tuple[slice, slice]) -> tuple[Array, Array, Array]:
        """Return xhat, rstd and the affine's result of a block, in float64."""
        xp, spatial = self.xp, tuple(range(2, len(self.shape)))
        x = float64_of(self.x[0][block], xp)
        x -= x.mean(spatial, keepdims=True)
        x -= x.mean(spatial, keepdims=True)  # the rounding error of the mean
        rstd = 1 / xp.sqrt((x * x).mean(spatial, keepdims=True) + self.eps)
        x *= rstd
        if not self.affine:
            return x, rstd, x
        weight, bias = self._affine(block)
        return x, rstd, x * weight + bias

    @cached_property
    def reference(self) -> dict[str, Array]:
        """y, dx, and dweight and dbias if affine, in float64 from the stored values of x and dy."""
        xp, spatial = self.xp, tuple(range(2, len(self.shape)))
        exact = {name: xp.empty(self.shape, xp.float64) for name in ("y", "dx")}
        sums = {name: xp.zeros(self.shape[:2]) for name in ("dweight", "dbias")}
        for block in self._blocks():
            xhat, rstd, z = self._exact(block)
            g = float64_of(self.dy[0][block], xp)
            if self.slope != 1:
                g *= xp.where(z > 0, 1, self.slope)
                z = xp.where(z > 0, z, self.slope * z)
            exact["y"][block] = z
            sums["dweight"][block] = (g * xhat).sum(spatial)
            sums["dbias"][block] = g.sum(spatial)
            if self.affine:
                rstd = rstd * self._affine(block)[0]
            g_mean, dot = g.mean(spatial, keepdims=True), (g * xhat).mean(spatial, keepdims=True)
            exact["dx"][block] = rstd * (g - g_mean - xhat * dot)
        if self.affine:
            exact |= {name: each if self.affine == PER_SAMPLE else each.sum(0) for name, each in sums.items()}
        return exact

    def error(self, answers: dict[str, Array], op: str) -> float:
        """Return the largest absolute error; of dweight and dbias over the root of the number of summands.

        ValueError if an answer is missing or has another shape. A NaN anywhere gives NaN.
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
                errors = [self._distance(got, exact) / math.sqrt(math.prod(self.shape) / exact.size)]
            worst = float(np.max([worst, *errors]))
        return worst

    def _distance(self, got: Array, exact: Array) -> float:
        return float(self.xp.abs(float64_of(got, self.xp) - exact).max())
