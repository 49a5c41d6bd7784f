"""Time calls on parts of planes: python -m bench parts [N,C,H,W ...]

For each shape, in one race: the whole forward and backward; `moments`, the forward with `moments=`, `gradient_sums` and
the backward with `sums=`, on the same arrays; the textbook's moments; and the whole forward of planes that lie in
--parts parts, each with arrays of its own: the moments of each part, their merge, and each part normalised with it.

A line has, for each of them, the microseconds of a call, and its time as a multiple of the time of a copy that moves as
many bytes as the call must.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import cupynorm
from cupynorm import devices

from ..core import peers, report
from ..core.cases import DTYPES, Array, Arrays, Layer, words
from ..core.race import add_race, add_shapes, array_module, layers_of, medians, sets_of
from ..core.timing import Contestant

SHAPES = ("20,100,35,45", "8,512,14,14", "20,64,184,248", "1,1,4096,4096", "2,32,64,128,128")
#: Accesses of each element that a call must make: see `contestants`.
ACCESSES = {
    "forward": 2, "moments": 1, "forward with moments=": 2, "forward in parts": 3, "backward": 3, "gradient_sums": 2,
    "backward with sums=": 3, "textbook moments": 1,
}  # fmt: skip


def contestants(arrays: Arrays, parts: int) -> dict[str, Callable[[int], Any]]:
    """Return the calls, by name; each takes the number of a buffer set."""
    xp, x, dy = arrays.xp, arrays.x, arrays.dy
    axes = tuple(range(2, x[0].ndim))
    axis = int(np.argmax(x[0].shape[2:])) + 2
    moments = [cupynorm.moments(each) for each in x]
    saved = [cupynorm.instance_norm_forward(each, moments=given)[1] for each, given in zip(x, moments, strict=True)]
    own = [cupynorm.instance_norm_forward(each)[1] for each in x]
    sums = [cupynorm.gradient_sums(*pair) for pair in zip(dy, saved, strict=True)]
    cut = [[xp.ascontiguousarray(part) for part in xp.array_split(each, parts, axis)] for each in x]

    def in_parts(i: int) -> list[Array]:
        first, *others = map(cupynorm.moments, cut[i])
        merged = first.merge(*others)
        return [cupynorm.instance_norm(part, moments=merged) for part in cut[i]]

    return {
        "forward": lambda i: cupynorm.instance_norm(x[i]),
        "moments": lambda i: cupynorm.moments(x[i]),
        "forward with moments=": lambda i: cupynorm.instance_norm(x[i], moments=moments[i]),
        "forward in parts": in_parts,
        "backward": lambda i: cupynorm.instance_norm_backward(dy[i], own[i]),
        "gradient_sums": lambda i: cupynorm.gradient_sums(dy[i], saved[i]),
        "backward with sums=": lambda i: cupynorm.instance_norm_backward(dy[i], saved[i], sums=sums[i]),
        "textbook moments": lambda i: (x[i].mean(axes), x[i].var(axes)),
    }


def measure(xp: Any, layer: Layer, dtype: str, options: argparse.Namespace) -> str:
    """Return a line with the measurements of a shape."""
    itemsize = devices.dtype_of(dtype).itemsize
    size = math.prod(layer.shape) * itemsize
    sets = sets_of(xp, 3 * size)
    arrays = Arrays(xp, layer.shape, dtype, "channels_first", False, sets)
    calls = contestants(arrays, options.parts)
    racing = [Contestant(name, call, lambda _: {}) for name, call in calls.items()]
    racing.append(peers.copy(2 * size, arrays))
    seconds = medians(xp, racing, sets, options)
    copy = seconds["copy"] / 2  # for one access of each element
    cells = [f"{name} {seconds[name] * 1e6:.0f} us ({seconds[name] / copy / ACCESSES[name]:.2f})" for name in calls]
    return f"{report.shape_text(layer.shape)} {dtype}: {', '.join(cells)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench parts", description="Time calls on parts of planes.")
    add_shapes(parser, SHAPES)
    parser.add_argument("--dtype", type=lambda t: words(t, DTYPES, "--dtype"), default=["float32"])
    parser.add_argument("--parts", type=int, default=4, help="of `forward in parts`; default 4")
    add_race(parser)
    options = parser.parse_args(arguments)
    xp = array_module(options.device)
    layers = layers_of(parser, options, xp)
    print("microseconds of a call, and (its time / that of a copy of as many bytes as it must move)")
    for dtype in options.dtype:
        for layer in layers:
            print(measure(xp, layer.plain(), dtype, options), flush=True)
    return 0
