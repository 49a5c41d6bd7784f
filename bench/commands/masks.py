"""Time calls with a mask: python -m bench masks [N,C,H,W ...]

For each shape and kind of mask, in one race: the forward and the backward with and without a mask of which --share are
True, and the textbook's array expression with one.

A line has the microseconds of each, and the time with a mask as a multiple of the time without.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import cupynorm
from cupynorm import devices

from ..core import report
from ..core.cases import DTYPES, EPS, Arrays, Layer, words
from ..core.race import add_race, add_shapes, array_module, layers_of, medians, sets_of
from ..core.timing import Contestant

SHAPES = ("16,1,512,512", "8,64,96,96", "4,64,128,128", "64,128,12,12")
KINDS = ("plane", "sample", "own")


def mask_of(kind: str, shape: tuple[int, ...], share: float) -> np.ndarray:
    """Return a mask for all planes ("plane"), for all channels of a sample, or of the array's own shape."""
    own = {"plane": shape[2:], "sample": (shape[0], 1, *shape[2:]), "own": shape}[kind]
    return np.random.default_rng(30).random(own) < share


def contestants(arrays: Arrays, mask: Any) -> dict[str, Callable[[int], Any]]:
    """Return the calls, by name; each takes the number of a buffer set."""
    xp, x, dy = arrays.xp, arrays.x, arrays.dy
    axes = tuple(range(2, x[0].ndim))
    plain = [cupynorm.instance_norm_forward(each)[1] for each in x]
    masked = [cupynorm.instance_norm_forward(each, mask=mask)[1] for each in x]

    def textbook(i: int) -> Any:
        count = xp.maximum(xp.broadcast_to(mask, x[i].shape).sum(axes, keepdims=True), 1).astype(x[i].dtype)
        centred = xp.where(mask, x[i] - xp.where(mask, x[i], 0).sum(axes, keepdims=True) / count, 0)
        return centred / xp.sqrt((centred * centred).sum(axes, keepdims=True) / count + EPS)

    return {
        "forward": lambda i: cupynorm.instance_norm(x[i]),
        "forward with mask=": lambda i: cupynorm.instance_norm(x[i], mask=mask),
        "backward": lambda i: cupynorm.instance_norm_backward(dy[i], plain[i]),
        "backward with mask=": lambda i: cupynorm.instance_norm_backward(dy[i], masked[i]),
        "textbook": textbook,
    }


def measure(xp: Any, layer: Layer, dtype: str, kind: str, options: argparse.Namespace) -> str:
    """Return a line with the measurements of a shape and kind of mask."""
    size = math.prod(layer.shape) * devices.dtype_of(dtype).itemsize
    sets = sets_of(xp, 3 * size)
    arrays = Arrays(xp, layer.shape, dtype, "channels_first", False, sets)
    calls = contestants(arrays, xp.asarray(mask_of(kind, layer.shape, options.share)))
    racing = [Contestant(name, call, lambda _: {}) for name, call in calls.items()]
    seconds = medians(xp, racing, sets, options)
    cells = [f"{name} {seconds[name] * 1e6:.0f} us" for name in calls]
    for number, call in ((1, "forward"), (3, "backward")):
        cells[number] += f" ({seconds[f'{call} with mask='] / seconds[call]:.2f})"
    return f"{report.shape_text(layer.shape)} {dtype}, a mask for each {kind}: {', '.join(cells)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench masks", description="Time calls with a mask.")
    add_shapes(parser, SHAPES)
    parser.add_argument("--dtype", type=lambda t: words(t, DTYPES, "--dtype"), default=["float32"])
    parser.add_argument(
        "--kinds", nargs="*", choices=KINDS, default=KINDS, help="one for all planes, each sample, or x's"
    )
    parser.add_argument("--share", type=float, default=0.8, help="of the positions that are True; default 0.8")
    add_race(parser)
    options = parser.parse_args(arguments)
    xp = array_module(options.device)
    layers = layers_of(parser, options, xp)
    print("microseconds of a call, and (its time / that of the same call without a mask)")
    for dtype in options.dtype:
        for layer in layers:
            for kind in options.kinds:
                print(measure(xp, layer.plain(), dtype, kind, options), flush=True)
    return 0
