"""Time calls on the CPU by the size of their values: python -m bench values [N,C,H,W ...]

Processors and NumPy's casts take longer for numbers that are not normal. Forward, the weight gives results these sizes;
backward, dy has them. Times are of one thread, beside those of values of size 1 in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

import cupynorm
from cupynorm import cpu, devices

from ..core import report
from ..core.cases import SWEEP_ELEMENTS, parse_shapes
from ..core.timing import Contestant, HostClock, Race

SHAPE = "4,64,64,64"
SIZES = {"float16": (1, 1e-5, 1e-7, 1e5), "float32": (1, 1e-30, 1e-38, 1e-42), "bfloat16": (1, 1e-30, 1e-38)}
BATCH = 0.005  # seconds


def contestants(shape: tuple[int, ...], dtype: str, op: str) -> list[Contestant]:
    rng = np.random.default_rng(0)
    kind, draws = devices.dtype_of(dtype), rng.standard_normal((2, *shape))
    x = draws[0].astype(kind)
    _, saved = cupynorm.instance_norm_forward(x)

    def contestant(size: float) -> Contestant:
        weight = np.full(shape[1], size, np.float32)
        with np.errstate(all="ignore"):
            dy = (size * draws[1]).astype(kind)
        run = {
            "forward": lambda _: cupynorm.instance_norm(x, weight=weight),
            "backward": lambda _: cupynorm.instance_norm_backward(dy, saved),
        }
        return Contestant(f"{size:g}", run[op], lambda _: {})

    return [contestant(size) for size in SIZES[dtype]]


def measure(shape: tuple[int, ...], dtype: str, op: str, rounds: int) -> dict[str, float]:
    """Measure milliseconds, by size."""
    threads = cupynorm.get_num_threads()
    cupynorm.set_num_threads(1)
    try:
        samples = Race(HostClock(), 1, BATCH).run(contestants(shape, dtype, op), rounds)
    finally:
        cupynorm.set_num_threads(threads)
    return {size: statistics.median(values) * 1e3 for size, values in samples.items()}


def line(shape: tuple[int, ...], dtype: str, op: str, times: dict[str, float]) -> str:
    first, *_ = times.values()
    cells = ", ".join(f"{size}: {time:.2f} ms ({time / first:.2f}x)" for size, time in times.items())
    return f"{report.shape_text(shape)} {dtype}, {op}: {cells}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench values", description="Time calls by the size of values.")
    parser.add_argument("shapes", nargs="*", default=[SHAPE], metavar="N,C,H,W", help=f"default {SHAPE}")
    parser.add_argument("--rounds", type=int, default=9, help="in each, every size has a turn; default 9")
    parser.add_argument("--compiled", action="store_true", help="time the compiled loops; default: NumPy alone")
    options = parser.parse_args(arguments)
    try:
        layers = parse_shapes(list(options.shapes), SWEEP_ELEMENTS["cpu"])
    except ValueError as error:
        parser.error(str(error))
    if options.compiled and cpu.llvmlite is None:
        parser.error(f"--compiled: {cpu.without_llvmlite}")
    compiled, cpu.compiled = cpu.compiled, options.compiled
    try:
        for layer in layers:
            for dtype in SIZES:
                for op in ("forward", "backward"):
                    times = measure(layer.shape, dtype, op, options.rounds)
                    print(line(layer.shape, dtype, op, times), flush=True)
    finally:
        cpu.compiled = compiled
    return 0
