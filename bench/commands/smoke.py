"""Check that each kind of kernel runs and is right: python -m bench smoke --help.

For every scope (subwarp, warp, block, shared memory, clusters, grid, split, given statistics), dtype, layout and
operation, this runs the smallest shape for which plans on this GPU choose the scope, and compares some channels with
the NumPy backend in float64. Every scope and dtype runs in its own process with a time limit, so that a crash or a hang
costs only its own lines.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import cupynorm as cn
from cupynorm import devices
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import Device
from cupynorm.cuda.layout import contiguous_desc
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import Plan
from cupynorm.cuda.variants import ITEMSIZE, Kind

from ..core import report

SCOPES = (
    *("subwarp", "warp", "block", "shared"),
    *("cluster2", "cluster4", "cluster8", "cluster16"),
    *("grid", "split", "given"),
)
DTYPES = ("float32", "bfloat16")
KINDS: tuple[Kind, ...] = ("channels_first", "channels_last")
OPS: tuple[Op, ...] = ("forward", "backward", "double_backward")
#: Steps by themselves, for parts of planes, and the operations with given statistics.
STEPS: tuple[Op, ...] = ("moments", "gradient_sums", "input_gradient")
GIVEN: tuple[Op, ...] = ("normalize", "frozen_backward", "frozen_double_backward", *STEPS)
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}  # relative to 1 + |exact|
SIDES = (3, 5, 9, 15, 20, 25, 30, 40, 61, 80, 100, 150, 200, 300, 400, 500, 700, 1000, 1500, 2000, 3000, 4001, 5000)
SAMPLES, CHANNELS = (1, 2, 16, 64), (1, 3, 8, 40, 320)
MOST_ELEMENTS = 60_000_000


def scope_of(plan: Plan) -> str:
    """Return the name in SCOPES of a plan's scope."""
    if plan.regime in ("pointwise", "one-pass"):
        return "given"
    scope, _, residency = plan.regime.partition("-")
    if scope == "block" and residency == "shared":
        return "shared"
    return f"cluster{plan.steps[0].cluster}" if scope == "cluster" else scope


def smallest(scope: str, op: Op, dtype: str, kind: Kind, device: Device) -> tuple[int, ...] | None:
    """Return the smallest shape whose plan on the device has this scope; None if there is none."""
    shapes = ((n, c, side, side) for n, c, side in itertools.product(SAMPLES, CHANNELS, SIDES))
    for shape in sorted(shapes, key=math.prod):
        if math.prod(shape) > MOST_ELEMENTS:
            return None
        plan, _ = plan_for(op, contiguous_desc(shape, ITEMSIZE[dtype], kind), dtype, device)
        if (scope_of(plan), plan.kind) == (scope, kind):
            return shape
    return None


def _made(xp: Any, x: Any, dy: Any, ddx: Any, weight: Any, bias: Any, running: Any, op: Op) -> dict[str, Any]:
    """Return the results of an operation, by name, on arrays of xp."""
    if op in STEPS:
        moments = cn.moments(x)
        _, saved = cn.instance_norm_forward(x, weight, bias, moments=moments)
        sums = cn.gradient_sums(dy, saved)
        if op == "moments":
            return {"mean": moments.mean, "variance": moments.var()}
        if op == "gradient_sums":
            return dict(vars(sums))
        gradients = cn.instance_norm_backward(dy, saved, sums=sums)
        return dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))
    mean, var = (p.copy() for p in running)
    y, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, momentum=0.1, use_input_stats=op in OPS
    )
    if op in ("forward", "normalize"):
        return {"y": y, "running_mean": mean, "running_var": var}
    if op in ("backward", "frozen_backward"):
        return dict(zip(("dx", "dweight", "dbias"), cn.instance_norm_backward(dy, saved), strict=True))
    return dict(
        zip(("ddy", "dx", "dweight"), cn.instance_norm_double_backward(ddx, weight, bias, dy, saved), strict=True)
    )


def error(cupy: Any, shape: tuple[int, ...], dtype: str, kind: Kind, op: Op) -> float:
    """Return the largest error of the results as a multiple of the allowed error; NaN if a result has one."""
    n, c = shape[:2]
    rng = np.random.default_rng(3)
    storage = devices.dtype_of(dtype)

    def laid() -> np.ndarray:
        order = shape if kind == "channels_first" else (n, *shape[2:], c)
        host = (rng.standard_normal(order, np.float32) + 1).astype(storage)
        return host if kind == "channels_first" else np.moveaxis(host, -1, 1)

    def on_device(host: np.ndarray) -> Any:
        bits = host.view(np.uint16) if dtype == "bfloat16" else host
        if kind == "channels_first":
            return cupy.asarray(bits).view(storage)
        return cupy.moveaxis(cupy.asarray(np.moveaxis(bits, 1, -1)).view(storage), -1, 1)

    hosts = [laid() for _ in range(3)]
    parameters = [rng.standard_normal(c).astype(np.float32) for _ in range(3)]
    parameters.append(rng.uniform(0.5, 2, c).astype(np.float32))
    weight, bias, *running = (cupy.asarray(p) for p in parameters)
    results = _made(cupy, *map(on_device, hosts), weight, bias, running, op)

    some = sorted({0, c // 2, c - 1})
    wide = [host[:, some].astype(np.float64) for host in hosts]
    weight, bias, *running = (p[some].astype(np.float64) for p in parameters)
    exact = _made(np, *wide, weight, bias, running, op)
    worst = 0.0
    for name, expected in exact.items():
        got = devices.to_host(results[name])
        got = (got[some] if got.ndim == 1 else got[:, some]).astype(np.float64)
        summed = {"dweight": n, "dbias": n, "sum_dy": 1, "sum_dy_xhat": 1}.get(name)  # planes
        terms = 1.0 if summed is None else math.sqrt(summed * math.prod(shape[2:]))
        distance = np.abs(got - expected) / (TOLERANCE[dtype] * terms)
        worst = float(np.max([worst, (distance / (1 + np.abs(expected))).max()]))
    return worst


def lines_of(scope: str, dtype: str) -> Iterator[tuple[str, bool]]:
    """Yield a line for each layout and operation, and True if it is right. Runs in its own process."""
    cupy = importlib.import_module("cupy")
    from cupynorm.cuda.backend import runtime

    device = runtime.device()
    for kind, op in itertools.product(KINDS, GIVEN if scope == "given" else OPS):
        title = f"{scope:9} {dtype:8} {kind:14} {op:22}"
        shape = smallest(scope, op, dtype, kind, device)
        if shape is None:
            yield f"{title} no shape has this scope on this device", True
            continue
        title = f"{title} {report.shape_text(shape):16}"
        try:
            found = error(cupy, shape, dtype, kind, op)
        except Exception as failure:  # the next ones are tried anyway
            said = " ".join(str(failure).split())[:300]
            yield f"{title} FAILED: {type(failure).__name__}: {said}", False
            continue
        verdict = f"{found:.2f} of the allowed error"
        yield f"{title} {verdict}" if found <= 1 else f"{title} FAILED: {verdict}", found <= 1


def child(scope: str, dtype: str) -> int:
    failed = False
    for line, well in lines_of(scope, dtype):
        print(line, flush=True)
        failed |= not well
    return int(failed)


def run(scope: str, dtype: str, limit: float) -> tuple[str, bool]:
    """Run a scope and dtype in its own process; return its lines, and True if all is right."""
    command = [sys.executable, "-m", "bench", "smoke", "--child", scope, dtype]
    title = f"{scope:9} {dtype:8}"
    environment = os.environ | {"CUPYNORM_EAGER": "0"}
    process = subprocess.Popen(
        command, cwd=report.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return f"{out}{title} FAILED: not done after {limit:g} s", False
    if process.returncode in (0, 1) and out:
        return out.rstrip("\n"), process.returncode == 0
    return f"{out}{title} FAILED: exit status {process.returncode}\n{err[-2000:]}".rstrip("\n"), False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench smoke", description=__doc__.partition("\n")[0])
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES, metavar="SCOPE", help=", ".join(SCOPES))
    parser.add_argument("--limit", type=float, default=60, metavar="S", help="time limit of a process; default 60")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time; default: one per core")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return child(*options.child)
    usable, why = devices.gpu_status()
    if not usable:
        parser.error(f"no usable GPU: {why}")
    work = list(itertools.product(options.scopes, DTYPES))
    with ThreadPoolExecutor(options.jobs) as pool:
        well = True
        for text, fine in pool.map(lambda each: run(*each, options.limit), work):
            print(text, flush=True)
            well &= fine
    print("every scope is right" if well else "SOME FAILED")
    return 0 if well else 1
