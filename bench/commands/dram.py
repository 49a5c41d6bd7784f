"""Compare the bytes moved to and from DRAM with those a plan promises: python -m bench dram [--json FILE].

Nsight Compute (ncu) counts them in a child process, one case of each regime. The kernels' last writes may still be in
L2 when counting ends, so bytes up to its size are missing: the arrays are several times as large. If ncu is missing or
may not read the counters, the command says so and succeeds.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cupynorm import devices

from ..core import report

#: Each has about 2**27 elements, 512 MiB in float32.
SHAPES = (
    (32, 16384, 16, 16),  # small planes
    (640, 128, 35, 45),  # planes at unaligned addresses
    (16, 160, 224, 224),  # a block's shared memory
    (2, 256, 64, 64, 64),  # a cluster's, on sm_90
    (2, 32, 128, 128, 128),  # the grid's
)
METRICS = {"dram__bytes_read.sum": "read_bytes", "dram__bytes_write.sum": "written_bytes"}
MARK = "next_case"  # an empty kernel that separates the cases


def child(shapes: list[tuple[int, ...]]) -> None:
    """Run the cases under ncu: print a line of JSON for each, and launch a mark and its kernels."""
    import cupy
    from cupyx.profiler import profile

    from cupynorm.cuda.backend import runtime

    from ..core.cases import Arrays
    from ..core.peers import cupynorm_itself

    mark = cupy.RawKernel(f'extern "C" __global__ void {MARK}() {{}}', MARK)
    for shape in shapes:
        arrays = Arrays(cupy, shape, "float32", "channels_first", affine=False, sets=1)
        for op in ("forward", "backward"):
            regime, per_element = report.planned(op, arrays.x[0], runtime.device())
            assert per_element is not None
            facts = {"op": op, "shape": shape, "dtype": "float32", "regime": regime}
            contestant = cupynorm_itself(op, arrays)
            contestant.run(0)  # compiles
            with profile():
                mark((1,), (1,), ())
                contestant.run(0)
                cupy.cuda.Device().synchronize()
            print(json.dumps({**facts, "promised_bytes": per_element * arrays.x[0].size}), flush=True)
            del contestant
        del arrays
        cupy.get_default_memory_pool().free_all_blocks()


def kernels(log: str) -> Iterator[dict[str, Any]]:
    """Yield name, read_bytes and written_bytes of each kernel in a log of `ncu --csv --print-units base`, in order."""
    found: dict[str, dict[str, Any]] = {}
    start = re.search(r'^"ID",', log, re.M)
    for row in csv.DictReader(log[start.start() :].splitlines() if start else []):
        if row.get("Metric Name") in METRICS:
            kernel = found.setdefault(row["ID"], {"name": row["Kernel Name"].partition("(")[0]})
            kernel[METRICS[row["Metric Name"]]] = int(float(row["Metric Value"].replace(",", "")))
    yield from found.values()


def rows_of(cases: list[dict[str, Any]], log: str) -> list[dict[str, Any]]:
    """Return the cases with their kernels and the sums over these; cases without kernels are left out."""
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels(log):
        if kernel["name"] == MARK:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    sums = ({name: sum(k[name] for k in group) for name in METRICS.values()} for group in groups)
    return [
        {**case, **total, "kernels": group}
        for case, total, group in zip(cases, sums, groups, strict=False)  # ncu may have been stopped
        if group
    ]


def ratio(row: dict[str, Any]) -> float:
    """Return bytes measured over bytes promised."""
    return float((row["read_bytes"] + row["written_bytes"]) / row["promised_bytes"])


def lines(rows: list[dict[str, Any]]) -> list[str]:
    text = [f"{'bytes to and from DRAM':36} {'read MB':>9} {'written':>9} {'promised':>9} {'ratio':>6}  regime"]
    for row in rows:
        what = f"{report.shape_text(row['shape'])} {row['op']}"
        cells = " ".join(f"{row[name] / 1e6:9.1f}" for name in ("read_bytes", "written_bytes", "promised_bytes"))
        text.append(f"{what:36} {cells} {ratio(row):6.3f}  {row['regime']}")
        for kernel in row["kernels"] if len(row["kernels"]) > 1 else []:
            cells = " ".join(f"{kernel[name] / 1e6:9.1f}" for name in ("read_bytes", "written_bytes"))
            text.append(f"    {kernel['name']:32} {cells}")
    return text


def find_ncu() -> str | None:
    patterns = ("/usr/local/cuda*/bin/ncu", "/opt/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
    return shutil.which("ncu") or next((path for each in patterns for path in sorted(glob.glob(each))), None)


def measure(ncu: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[dict[str, Any]]:
    """Return the rows; RuntimeError with ncu's message if it counted nothing."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [ncu, "--csv", "--print-units", "base", "--log-file", str(log), "--metrics", ",".join(METRICS)]
        command += ["--clock-control", "none", "--profile-from-start", "off"]  # the device's settings stay
        command += [sys.executable, "-m", "bench", "dram", "--child", *(report.shape_text(shape) for shape in shapes)]
        done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    rows = rows_of([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], text)
    if not rows:
        said = [line for line in (text + done.stdout + done.stderr).splitlines() if "ERR" in line.upper()]
        raise RuntimeError((said or [f"exit status {done.returncode}, no kernel counted"])[0][:300])
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench dram", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to this result, under 'dram'")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child([tuple(int(n) for n in shape.split(",")) for shape in options.child])
        return 0
    usable, why = devices.gpu_status()
    ncu = find_ncu()
    if not usable or ncu is None:
        print(f"not measured: {f'no usable GPU: {why}' if not usable else 'ncu is not installed'}")
        return 0
    try:
        rows = measure(ncu)
    except RuntimeError as error:  # usually ERR_NVGPUCTRPERM: only root may read the counters
        print(f"not measured: ncu: {error}")
        return 0
    print("\n".join(lines(rows)))
    if options.json:
        import cupy

        report.add_to_json(options.json, cupy, "dram", rows)
    return 0
