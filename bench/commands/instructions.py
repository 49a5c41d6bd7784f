"""Count the instructions that kernels issue: python -m bench instructions --help.

Each case is planned for a device with many planes, compiled for sm_90, and its machine code is executed in NumPy
(bench/sass) for the first block, or the first cluster's. So loops and branches count as often as they run, and the
results are compared with those of NumPy. No GPU is needed, but NVRTC and nvdisasm are.

The budget is what all multiprocessors issue at ISSUE of their most, while the device copies as many bytes as the
operation must move. A kernel within its budget is limited by memory, one beyond it by instructions.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupynorm import devices
from cupynorm._types import ForwardCall
from cupynorm.cuda.device import DEVICES
from cupynorm.cuda.launch import CudaBackend

from ..sass import listing
from ..sass.runtime import Launched, SassRuntime

#: Bytes that a copy moves in a second, read and written; of the H100 it is what others report.
COPY = {"H200": 4.2e12, "H100": 3.0e12}
CLOCK = 1.755e9  # of both
LANES = 4 * 32  # of a multiprocessor, that can issue in each cycle
ISSUE = 0.7

ELEMENTS, CHANNELS = 2**26, 64
RANDOM = 2**20  # the elements with random values: more than the first blocks read
#: Plane sizes. Larger planes are served by grids, whose blocks wait for each other: their counts depend on timing.
FIRST = (16, 64, 256, 1024, 1225, 4096, 16_384, 65_536)
LAST = (16, 64, 256, 1024, 1225, 4096)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Case(NamedTuple):
    op: str
    dtype: str
    layout: str
    plane: int

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.layout} {self.plane}"


CASES = [
    Case(op, dtype, layout, plane)
    for layout, planes in (("channels_first", FIRST), ("channels_last", LAST))
    for dtype in ("float32", "bfloat16")
    for op in ("forward", "backward")
    for plane in planes
]


class Count(NamedTuple):
    """warp: warp-instructions of a scope's whole channel tile; lane: of each element, for one thread."""

    case: Case
    kernel: str
    warp: float
    lane: float
    budget: float

    @property
    def share(self) -> float:
        """The budget over the count: the most of a copy's bandwidth, if less than 1."""
        return self.budget / self.lane


def budget(case: Case, device: str) -> float:
    """Return the instructions of a lane per element that fit beside a copy."""
    size = devices.dtype_of(case.dtype).itemsize * (2 if case.op == "forward" else 3)
    return DEVICES[device].sm_count * LANES * CLOCK * ISSUE * size / COPY[device]


def _array(case: Case, seed: int) -> np.ndarray:
    """Return an array of the case's shape, of which only the first planes are random and take memory."""
    dtype, planes = devices.dtype_of(case.dtype), max(1, ELEMENTS // case.plane)
    channels = min(CHANNELS, planes)
    samples = planes // channels
    last = case.layout == "channels_last"
    shape = (samples, case.plane, channels) if last else (samples, channels, case.plane)
    size = math.prod(shape)
    memory = np.zeros(size + 256, dtype)
    array = memory[-memory.ctypes.data % 256 // dtype.itemsize :][:size]
    some = array[:RANDOM]
    some[...] = np.random.default_rng(seed).normal(size=some.size).astype(dtype)
    array = array.reshape(shape)
    return array.transpose(0, 2, 1) if last else array


def _elements(launched: Launched) -> tuple[float, float]:
    """Return how many channel tiles the blocks that ran have served, and the channels of each."""
    step = launched.step
    scope = step.subwarp_size or (32 if "_warp_" in step.name else step.threads)
    width = step.channel_vecs * launched.module.vec_size if launched.module.kind == "channels_last" else 1
    return launched.blocks * (step.threads // scope) / step.tiles, width


def _check(case: Case, got: np.ndarray, x: np.ndarray, dy: np.ndarray | None) -> None:
    """Compare the first plane with NumPy's result."""
    a = x[0, 0].astype(np.float64)
    rstd = (a.var() + 1e-5) ** -0.5
    expected = (a - a.mean()) * rstd
    if dy is not None:
        g = dy[0, 0].astype(np.float64)
        expected = rstd * (g - g.mean() - expected * (g * expected).mean())
    error = float(np.abs(got[0, 0].astype(np.float64) - expected).max())
    if not error <= TOLERANCE[case.dtype] * max(1.0, float(np.abs(expected).max())):
        raise RuntimeError(f"{case}: the machine code's result is wrong: error {error:.2g}")


def count(case: Case, device: str = "H200") -> Count:
    """Count a case's instructions. Raises RuntimeError if the result is wrong."""
    runtime = SassRuntime(DEVICES[device], first=1)
    backend = CudaBackend(runtime)
    x = _array(case, 1)
    result = backend.forward(ForwardCall(x))
    if case.op == "backward":
        # The forward's other blocks do not run; the backward needs the statistics of its own planes only.
        assert result.saved is not None
        _statistics(result.saved, x)
        dy = _array(case, 2)
        _check(case, backend.backward(dy, result.saved, out=None).dx, x, dy)
    else:
        result.commit()
        _check(case, result.y, x, None)
    (launched,) = runtime.launched
    tiles, width = _elements(launched)
    warp = sum(launched.issued.values()) / tiles
    return Count(case, launched.step.name, warp, 32 * warp / (case.plane * width), budget(case, device))


def _statistics(saved: Any, x: np.ndarray) -> None:
    """Fill in the statistics of the first planes, as a forward does."""
    some = x[:1] if x.shape[2] * x.shape[1] >= RANDOM else x[: RANDOM // (x.shape[1] * x.shape[2])]
    for c in range(x.shape[1]):
        a = some[:, c].astype(np.float64)
        mean = a.mean(1)
        saved.mean[: len(some), c] = mean
        saved.mean_lo[: len(some), c] = mean - saved.mean[: len(some), c]
        saved.rstd[: len(some), c] = (a.var(1) + 1e-5) ** -0.5


def line(found: Count) -> str:
    case = found.case
    return (
        f"{case.op:9} {case.dtype:9} {case.layout:15} {case.plane:7} {found.kernel:34} {found.warp:9.0f} "
        f"{found.lane:7.1f} {found.budget:7.1f} {found.share:6.2f}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench instructions", description="Instructions that kernels issue."
    )
    parser.add_argument("--device", choices=COPY, default="H200", help="whose budget; default H200")
    parser.add_argument(
        "--match", default="", help="only the cases whose text contains this, such as 'forward bfloat16'"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the counts, for tests/kernels/instructions.json"
    )
    options = parser.parse_args(arguments)
    try:
        version, _ = listing.nvrtc_version(), listing.nvdisasm()
    except listing.MissingError as error:
        parser.error(str(error))
    cases = [case for case in CASES if options.match in str(case)]
    print(f"NVRTC {version[0]}.{version[1]}, {listing.ARCHITECTURE}, planned for an {options.device}")
    print(
        f"{'op':9} {'dtype':9} {'layout':15} {'plane':>7} {'kernel':34} {'of a tile':>9} {'element':>7} {'budget':>7} "
        " share"
    )
    rows = {}
    for case in cases:
        found = count(case, options.device)
        print(line(found), flush=True)
        rows[str(case)] = [found.kernel, round(found.lane, 2)]
    if options.json:
        text = ",\n".join(f"  {json.dumps(case)}: {json.dumps(row)}" for case, row in rows.items())
        options.json.write_text(f'{{"nvrtc": {list(version)},\n"lane-instructions of an element": {{\n{text}\n}}}}\n')
    return 0
