"""Measure the host time of a call: python -m bench host --help.

On a GPU a call on a small tensor takes as long as Python and the launches. The clock runs from the first of many calls
until the last has returned. It does not count waiting for the GPU, whose queue has room for this number of calls. On
the CPU it counts the computation too, so it measures the time of a call.

--no-driver measures cupynorm's own part: once results have been compared, the driver's launches are replaced by a
function that does nothing. This also works on the fake GPU (tests/fakegpu), whose launches would take milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupynorm import devices

from ..core import peers, report, traces
from ..core.cases import TOLERANCE, Arrays, epilogue_text
from ..core.timing import Contestant, rotated

SHAPES = ((2, 32, 8, 8), (12, 512, 4, 4), (8, 64, 16, 16))
DTYPE = "float32"
NAMES = ("torch",)  # PyTorch's forward alone runs on tensors that need no gradient
CALLS = {"cpu": 8, "gpu": 64}  # a queue holds 1024 launches, and a call may need ten


def seconds(contestant: Contestant, calls: int, synchronise: Callable[[], Any]) -> float:
    """Return the seconds of one call, until it has returned."""
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        contestant.run(0)
    taken = time.perf_counter() - start
    synchronise()
    return taken / calls


def contestants(op: str, arrays: Arrays) -> list[Contestant]:
    """Return cupynorm and the peers whose answers are right; RuntimeError if cupynorm's is wrong."""
    found = []
    for name, make in (("cupynorm", peers.cupynorm_itself), *((name, peers.PEERS[name]) for name in NAMES)):
        try:
            contestant = make(op, arrays)
        except peers.UnavailableError:
            continue
        error = arrays.error(contestant.answers(contestant.run(0)), op)
        if error <= TOLERANCE[DTYPE]:
            found.append(contestant)
        elif name == "cupynorm":
            raise RuntimeError(f"cupynorm is wrong at {op} {arrays.shape}: error {error:.2g}")
    return found


@contextlib.contextmanager
def without_driver() -> Iterator[None]:
    """Within it cupynorm's launches do nothing. Results are wrong, so compare them before."""
    from cupynorm.cuda import runtime

    def use(driver: Any) -> None:
        runtime.driver = driver
        traces.forget()  # they have the driver's functions

    real = runtime.driver
    use(SimpleNamespace(launchKernel=max, launchCooperativeKernel=max, funcSetAttribute=real.funcSetAttribute))
    try:
        yield
    finally:
        use(real)


def measure(
    xp: Any, rounds: int, calls: int, ops: tuple[str, ...] = ("forward", "both"), driver: bool = True
) -> list[dict[str, Any]]:
    """Measure a row for each shape and op, with and without affine."""
    synchronise = (lambda: None) if xp is np else (lambda: xp.cuda.Device().synchronize())
    rows = []
    for shape in SHAPES:
        for affine in (False, True):
            arrays = Arrays(xp, shape, DTYPE, "channels_first", affine, sets=1)
            for op in ops:
                rivals = contestants(op, arrays)
                samples: dict[str, list[float]] = {rival.name: [] for rival in rivals}
                with contextlib.nullcontext() if driver else without_driver():
                    for rival in rivals:
                        seconds(rival, calls, synchronise)  # untimed, to warm up
                    for round_ in range(rounds):
                        for rival in rotated(rivals, round_):
                            samples[rival.name].append(seconds(rival, calls, synchronise))
                medians = {name: statistics.median(values) * 1e6 for name, values in samples.items()}
                rows.append(
                    {"op": op, "shape": list(shape), "dtype": DTYPE, "affine": affine}
                    | {"microseconds": medians.pop("cupynorm"), "peers": medians}
                )
    return rows


_IMPORT = """
import time, cupy
cupy.cuda.runtime.free(0)  # CuPy's own start and the context
cupy.zeros(1)
start = time.perf_counter()
import cupynorm
print(time.perf_counter() - start)
"""


def import_seconds() -> dict[str, float]:
    """Return the seconds of importing cupynorm beyond CuPy's own start: cold (compiling) and warm (median of 3)."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"CUPY_CACHE_DIR": cache, "CUPYNORM_EAGER": "1"}
        cold, *warm = (
            float(subprocess.check_output([sys.executable, "-c", _IMPORT], cwd=report.ROOT, env=environment))
            for _ in range(4)
        )
    return {"cold": cold, "warm": statistics.median(warm)}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Format the table; a peer's ratio is its time over cupynorm's."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    text = [f"{'microseconds of host time for a call':36} {'cupynorm':>9}" + "".join(f"{name:>18}" for name in names)]
    for row in rows:
        what = f"{report.shape_text(row['shape'])} {epilogue_text(row['affine'], None)}, {report.op_text(row['op'])}"
        cells = ""
        for name in names:
            each = row["peers"].get(name)
            cells += f"{each:10.1f} ({each / row['microseconds']:.2f}x)".rjust(18) if each else f"{'–':>18}"
        text.append(f"{what:36} {row['microseconds']:9.1f}{cells}")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench host", description="Microseconds of host time for a call.")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if there is a usable one")
    parser.add_argument("--rounds", type=int, default=31, help="in each, every contestant has a turn; default 31")
    parser.add_argument(
        "--calls", type=int, help=f"calls in a turn; default {CALLS['cpu']} on a CPU, {CALLS['gpu']} on a GPU"
    )
    parser.add_argument(
        "--no-driver", action="store_true", help="replace the driver's launches by nothing; also backward"
    )
    parser.add_argument("--no-import", action="store_true", help="do not measure the import, which compiles the core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to this result, under 'host'")
    options = parser.parse_args(arguments)
    usable, why = devices.gpu_status()
    if options.device == "gpu" and not usable:
        parser.error(f"--device gpu: no usable GPU: {why}")
    gpu = usable and options.device != "cpu"
    xp: Any = importlib.import_module("cupy") if gpu else np
    if options.no_driver and not gpu:
        parser.error(f"--no-driver needs a GPU, or the fake one of tests/fakegpu: {why}")
    ops = ("forward", "backward", "both") if options.no_driver else ("forward", "both")
    rows = measure(xp, options.rounds, options.calls or CALLS["gpu" if gpu else "cpu"], ops, not options.no_driver)
    print("\n".join(lines(rows)))
    if options.json:
        report.add_to_json(options.json, xp, "host", rows)
    if gpu and not options.no_import:
        seconds_ = import_seconds()
        print(f"import, beyond CuPy's own start: cold {seconds_['cold']:.2f} s, warm {seconds_['warm']:.3f} s")
        if options.json:
            report.add_to_json(options.json, xp, "import", seconds_)
    return 0
