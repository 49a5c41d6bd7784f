"""Time zscore beside SciPy's: python -m bench zscore [SHAPE:AXIS ...]

For each shape and axis, in one race: `cupynorm.zscore`; `scipy.stats.zscore`, on a GPU `cupyx.scipy.stats.zscore`; and
a copy of the array. A line has, for each of them, the microseconds of a call, and its time as a multiple of the copy's.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import numpy as np

import cupynorm

from ..core import report
from ..core.race import add_race, array_module, medians, sets_of
from ..core.timing import Contestant

#: Columns of a table, rows, a middle axis, images of a stack, all of it.
CASES = ("100000,32:0", "2000,2000:0", "2000,2000:1", "64,300,200:1", "16,512,512:1,2", "16,512,512:all")

Case = tuple[tuple[int, ...], Any]


def case_of(text: str) -> Case:
    """Parse SHAPE:AXIS, such as 16,512,512:1,2; the axis may be `all`."""
    shape, _, axis = text.partition(":")
    try:
        axes = None if axis == "all" else tuple(map(int, axis.split(",")))
        found = tuple(map(int, shape.split(","))), axes[0] if axes and len(axes) == 1 else axes
        if axes is not None:
            _ = [found[0][each] for each in axes]
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"a case is SHAPE:AXIS, such as 2000,30:0 or 9,30:all, got {text!r}") from None
    return found


def measure(xp: Any, case: Case, options: argparse.Namespace) -> str:
    """Return a line with the measurements of a case."""
    shape, axis = case
    theirs = importlib.import_module("scipy.stats" if xp is np else "cupyx.scipy.stats")
    host = np.random.default_rng(20).standard_normal(shape).astype(options.dtype)
    sets = sets_of(xp, 2 * host.nbytes)
    arrays, targets = ([xp.asarray(host.copy()) for _ in range(sets)] for _ in range(2))
    peer = "scipy" if xp is np else "cupyx"
    racing = [
        Contestant("zscore", lambda i: cupynorm.zscore(arrays[i], axis), lambda _: {}),
        Contestant(peer, lambda i: theirs.zscore(arrays[i], axis), lambda _: {}),
        Contestant("copy", lambda i: xp.copyto(targets[i], arrays[i]), lambda _: {}),
    ]
    seconds = medians(xp, racing, sets, options)
    cells = [
        f"{name} {seconds[name] * 1e6:.0f} us ({seconds[name] / seconds['copy']:.2f})" for name in ("zscore", peer)
    ]
    return f"{report.shape_text(shape)} axis {'all' if axis is None else axis}: {', '.join(cells)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench zscore", description="Time zscore beside SciPy's.")
    parser.add_argument(
        "cases", nargs="*", type=case_of, default=[*map(case_of, CASES)], metavar="SHAPE:AXIS",
        help=f"default {' '.join(CASES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    add_race(parser)
    options = parser.parse_args(arguments)
    xp = array_module(options.device)
    print("microseconds of a call, and (its time / that of a copy)")
    for case in options.cases:
        print(measure(xp, case, options), flush=True)
    return 0
