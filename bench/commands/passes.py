"""The limits of NumPy alone: python -m bench passes [N,C,H,W ...]

Without a compiler, each step of a call is a NumPy loop over a block of elements: a pass. This times the passes that no
order of steps can avoid, one by one, on one thread and the blocks of a call, beside whole calls and PyTorch's with all
threads. Forward: the sums of x and of its squares, and a product and a sum with one number for each plane. Backward:
the sums of dy and of dy * x, and the steps of dx = (x * slope + dy + constant) * scale.

All calls use the same float32 arrays, which are in the caches as far as they fit.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

import cupynorm
from cupynorm import cpu
from cupynorm.cpu import blocking
from cupynorm.cpu.numpy_path import NumpyWork

from ..core import peers, report
from ..core.cases import SWEEP_ELEMENTS, Array, Arrays, Layer, epilogue_text, parse_shapes
from ..core.timing import Contestant, HostClock, Race

#: Shapes of real networks whose planes and arrays are small.
SHAPES = ("12,512,4,4", "2,320,4,4,4", "2,320,8,8,8", "8,512,16,16", "2,256,16,16,16", "1,256,64,64", "8,512,32,32")
BATCH = 0.005  # seconds


def passes(arrays: Arrays, y: Array) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the passes of each op: functions that run over all blocks on one thread and write to y."""
    x, weight, bias = arrays.x[0], arrays.weight, arrays.bias
    saved = cupynorm.instance_norm_forward(x, weight, bias)[1]
    work = NumpyWork(saved, blocking.Arrays(x, y, arrays.dy[0]))
    scratch = np.empty(min(x.size, work.buffer_size), work.dtype)
    values = np.ones(x.shape[:2], work.dtype)  # one for each plane; 1, so that products leave y as it is
    parts = [planes + tile for planes in work.planes for tile in work.tile]
    inputs = work.x, work.result, work.arrays.dy
    blocks = [(*(array[part] for array in inputs), values[part[:2]]) for part in parts]

    def over(step: Callable[..., Any]) -> Callable[[], None]:
        def every() -> None:
            with np.errstate(all="ignore"):  # also restores the ufunc buffer size
                np.setbufsize(work.ufunc_buffer)
                for block in blocks:
                    step(*block)

        return every

    product = over(lambda x, y, dy, each: work._each(np.multiply, x, each, y))
    product_there = over(lambda x, y, dy, each: work._each(np.multiply, y, each, y))
    sum_there = over(lambda x, y, dy, each: work._each(np.add, y, each, y))
    return {
        "forward": {
            "sums": over(lambda x, y, dy, each: work._sums(x)),
            "squares": over(lambda x, y, dy, each: work._dots(x, x, scratch)),
            "* scale": product,
            "+ intercept": sum_there,
        },
        "backward": {
            "sums": over(lambda x, y, dy, each: work._sums(dy)),
            "products": over(lambda x, y, dy, each: work._dots(dy, x, scratch)),
            "* slope": product,
            "+ dy": over(lambda x, y, dy, each: np.add(y, dy, out=y)),
            "+ constant": sum_there,
            "* scale": product_there,
        },
    }


def on_threads(contestant: Contestant, threads: int) -> Contestant:
    def run(i: int) -> Any:
        cupynorm.set_num_threads(threads)
        return contestant.run(i)

    return Contestant(f"{threads} threads" if threads > 1 else "1 thread", run, contestant.answers)


def measure(layer: Layer, op: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Measure microseconds of the passes and of calls: ours by threads, and PyTorch's if it is installed."""
    arrays = Arrays(np, layer.shape, "float32", "channels_first", layer.affine, sets=1)
    threads = cupynorm.get_num_threads()
    own = peers.cupynorm_itself(op, arrays)
    steps = passes(arrays, np.empty_like(arrays.x[0]))[op]
    contestants = [Contestant(name, lambda _, step=step: step(), lambda _: {}) for name, step in steps.items()]
    contestants += [on_threads(own, number) for number in sorted({1, threads})]
    with contextlib.suppress(peers.UnavailableError):
        contestants.append(peers.PEERS["torch"](op, arrays))
    try:
        samples = Race(HostClock(), 1, BATCH).run(contestants, rounds)
    finally:
        cupynorm.set_num_threads(threads)
    medians = {name: statistics.median(values) * 1e6 for name, values in samples.items()}
    return {name: medians.pop(name) for name in steps}, medians


def line(layer: Layer, op: str, each: dict[str, float], calls: dict[str, float]) -> str:
    total = sum(each.values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in each.items())
    whole = ", ".join(f"{name} {value:.0f}" for name, value in calls.items())
    what = f"{report.shape_text(layer.shape)} {epilogue_text(layer.affine, None)}, {op}"
    return f"{what}: passes {total:.0f} us ({parts}); calls: {whole}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench passes", description="Time the passes of NumPy alone.")
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="N,C,H,W", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=15, help="in each, every pass and call has a turn; default 15")
    options = parser.parse_args(arguments)
    try:
        layers = parse_shapes(list(options.shapes), SWEEP_ELEMENTS["cpu"])
    except ValueError as error:
        parser.error(str(error))
    compiled, cpu.compiled = cpu.compiled, False
    try:
        for layer in layers:
            for op in ("forward", "backward"):
                print(line(layer.plain(), op, *measure(layer.plain(), op, options.rounds)), flush=True)
    finally:
        cpu.compiled = compiled
    return 0
