"""Time calls on inputs of another dtype than the result: python -m bench dtypes [N,C,H,W ...]

For each shape and pair of dtypes, in one race: `instance_norm(x, dtype=)`; a cast of x and then the call; a cast and
the textbook's array expression; and a copy of as many bytes as the first must move: each element of x read once, each
result written once.

A line has, for each of them, the microseconds of a call, and its time as a multiple of the copy's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import cupynorm
from cupynorm._types import DTYPES, INTEGERS

from ..core import report
from ..core.cases import EPS
from ..core.race import add_race, add_shapes, array_module, layers_of, medians, sets_of
from ..core.timing import Contestant

SHAPES = ("16,1,512,512", "8,64,96,96", "1,1,64,512,512", "32,32,32,32")
PAIRS = ("uint16:float32", "uint8:float32", "uint8:float16", "float16:float32", "float32:float16")


def pair_of(text: str) -> tuple[str, str]:
    """Parse INPUT:RESULT."""
    input, _, result = text.partition(":")
    if input not in (*INTEGERS, *DTYPES) or result not in DTYPES or "bfloat16" in (input, result):
        raise argparse.ArgumentTypeError(f"a pair is INPUT:RESULT, such as uint16:float32, got {text!r}")
    return input, result


def contestants(xp: Any, xs: list[Any], result: str) -> dict[str, Callable[[int], Any]]:
    """Return the calls, by name; each takes the number of a buffer set."""
    axes = tuple(range(2, xs[0].ndim))

    def textbook(i: int) -> Any:
        a = xs[i].astype(np.float32)
        y = (a - a.mean(axes, keepdims=True)) / xp.sqrt(a.var(axes, keepdims=True) + EPS)
        return y.astype(result, copy=False)

    return {
        "dtype=": lambda i: cupynorm.instance_norm(xs[i], dtype=result),
        "cast and call": lambda i: cupynorm.instance_norm(xs[i].astype(result)),
        "cast and textbook": textbook,
    }


def measure(xp: Any, shape: tuple[int, ...], pair: tuple[str, str], options: argparse.Namespace) -> str:
    """Return a line with the measurements of a shape and pair."""
    input, result = pair
    moved = math.prod(shape) * (np.dtype(input).itemsize + np.dtype(result).itemsize)
    sets = sets_of(xp, moved)
    values = np.random.default_rng(20).integers(0, 100, shape)
    xs = [xp.asarray(values.astype(input)) for _ in range(sets)]
    calls = contestants(xp, xs, result)
    sources, targets = ([xp.zeros(moved // 2, np.uint8) for _ in range(sets)] for _ in range(2))
    racing = [Contestant(name, call, lambda _: {}) for name, call in calls.items()]
    racing.append(Contestant("copy", lambda i: xp.copyto(targets[i], sources[i]), lambda _: {}))
    seconds = medians(xp, racing, sets, options)
    cells = [f"{name} {seconds[name] * 1e6:.0f} us ({seconds[name] / seconds['copy']:.2f})" for name in calls]
    return f"{report.shape_text(shape)} {input} to {result}: {', '.join(cells)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench dtypes", description="Time calls on inputs of another dtype than the result."
    )
    add_shapes(parser, SHAPES)
    parser.add_argument(
        "--pairs", nargs="*", type=pair_of, default=[*map(pair_of, PAIRS)], metavar="INPUT:RESULT",
        help=f"default {' '.join(PAIRS)}",
    )  # fmt: skip
    add_race(parser)
    options = parser.parse_args(arguments)
    xp = array_module(options.device)
    layers = layers_of(parser, options, xp)
    print("microseconds of a call, and (its time / that of a copy of as many bytes as it must move)")
    for layer in layers:
        for pair in options.pairs:
            print(measure(xp, layer.shape, pair, options), flush=True)
    return 0
