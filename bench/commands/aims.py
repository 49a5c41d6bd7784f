"""Compare a result with the aims for its device, an H100 or H200 or a CPU: python -m bench aims RESULT.json."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ..core import report
from ..core.cases import SWEEP_ELEMENTS, epilogue_text, real_layers, sweep_layers

DTYPES = {"float32": 4, "bfloat16": 2}
LARGE = 64_000_000  # bytes of x from which on memory alone limits a call
LARGER_THAN_CACHES = 64 << 20  # bytes of x and y, on a CPU

#: Least fraction of the bandwidth of a copy, by layout and op.
OF_COPY = {
    ("channels_first", "forward"): 0.95,
    ("channels_first", "backward"): 0.90,
    ("channels_last", "forward"): 0.90,
    ("channels_last", "backward"): 0.85,
}

#: A peer's time over ours, forward + backward, geometric mean over the real shapes: layout, activation fused, peer.
SPEEDUP = {
    ("channels_first", False, "torch"): 2.0,
    ("channels_first", False, "torch.compile"): 1.2,
    ("channels_first", True, "torch"): 2.5,
    ("channels_last", False, "torch"): 3.0,
}

#: Seconds that the import may take at most beyond CuPy's own start: when it compiles the core kernels, and when it
#: finds them in CuPy's cache.
IMPORT = {"cold": 5.0, "warm": 0.2}


class Aim(NamedTuple):
    """A figure that the least of the values, or their geometric mean, is to reach.

    values: as measured, by case; wanted: how many of them a complete measurement has.
    """

    what: str
    aimed: float
    values: dict[str, float]
    wanted: int
    of_mean: bool = False

    @property
    def measured(self) -> float | None:
        """The value that is compared; None if nothing was measured."""
        if not self.values:
            return None
        return statistics.geometric_mean(self.values.values()) if self.of_mean else min(self.values.values())

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.measured < self.aimed:
            return "NOT REACHED"
        return "reached" if len(self.values) >= self.wanted else "reached in part"

    @property
    def note(self) -> str:
        """The cases in short; if the least value does not reach the aim, all that do not."""
        if not self.values or self.wanted == 1:
            return "".join(self.values)
        worst, least = min(self.values.items(), key=lambda item: item[1])
        mean = statistics.geometric_mean(self.values.values())
        spread = f"{least:.2f} to {max(self.values.values()):.2f}, mean {mean:.2f}"
        missed = sorted(f"{name} {value:.2f}" for name, value in self.values.items() if value < self.aimed)
        below = f"; below: {'; '.join(missed)}" if missed and not self.of_mean else ""
        return f"worst: {worst}; {spread}; {len(self.values)} of {self.wanted}{below}"


def gpu_aims(result: dict[str, Any]) -> list[Aim]:
    """Return the aims for an H100 or H200, for a result with or without the figures of `host`."""
    real = {layer.shape: layer for layer in real_layers()}
    swept = [layer.shape for layer in sweep_layers(SWEEP_ELEMENTS["gpu"])]
    rows = {}
    for row in result["rows"]:
        activated = row["activation"] is not None
        if activated or not report.fused(row):
            rows[tuple(row["shape"]), row["dtype"], row["layout"], row["op"], activated] = row

    def speedups(names: dict[Any, str], peer: str) -> dict[str, float]:
        """Return a peer's time over ours, by the name of a row, for the rows that are there."""
        there = {name: rows[key] for key, name in names.items() if key in rows and peer in rows[key]["peers"]}
        return {name: row["peers"][peer]["median_ms"] / row["median_ms"] for name, row in there.items()}

    found = []
    for (layout, op), aimed in OF_COPY.items():
        for dtype, itemsize in DTYPES.items():
            large = [shape for shape in real if math.prod(shape) * itemsize >= LARGE]
            for group, shapes in (("real shapes of 64 MB and more", large), ("every plane size", swept)):
                keys = ((shape, dtype, layout, op, False) for shape in shapes)
                values = {report.shape_text(key[0]): rows[key]["of_copy"] for key in keys if key in rows}
                what = f"of a copy, {op}, {layout}, {dtype}, {group}"
                found.append(Aim(what, aimed, values, len(shapes)))
    for (layout, fused, peer), aimed in SPEEDUP.items():
        for dtype in DTYPES:
            shapes = [shape for shape, layer in real.items() if layer.activation is not None or not fused]
            names = {(shape, dtype, layout, "both", fused): report.shape_text(shape) for shape in shapes}
            what = f"time of {peer} over ours, {layout}, {dtype}" + (", activation fused" if fused else "")
            found.append(Aim(what, aimed, speedups(names, peer), len(names), of_mean=True))
    for dtype in DTYPES:
        names = {
            (shape, dtype, layout, "both", fused): f"{report.shape_text(shape)} {layout}" + (" fused" if fused else "")
            for layout, fused in {(layout, fused): None for layout, fused, _ in SPEEDUP}
            for shape, layer in real.items()
            if layer.activation is not None or not fused
        }
        what = f"time of torch over ours, the slowest real shape, {dtype}"
        found.append(Aim(what, 1.0, speedups(names, "torch"), len(names)))
    for op in ("forward", "both"):
        calls = [row for row in result.get("host", ()) if row["op"] == op]
        values = {
            report.shape_text(row["shape"]) + (" affine" if row["affine"] else ""): row["peers"]["torch"]
            / row["microseconds"]
            for row in calls
            if "torch" in row["peers"]
        }
        what = f"host's time of torch over ours, small tensors, {report.op_text(op)}"
        found.append(Aim(what, 1.0, values, len(calls)))
    for name, most in IMPORT.items():
        taken = result.get("import", {}).get(name)
        what = f"{most:g} s over the time of a {name} import"
        found.append(Aim(what, 1.0, {f"{taken:.2f} s": most / taken} if taken else {}, 1))
    return found


def cpu_aims(result: dict[str, Any]) -> list[Aim]:
    """Return the aims for a CPU, about float32, channels-first; a case is a shape with its epilogue."""

    def ratios(op: str, theirs: str, ours: str | None = None) -> dict[str, float]:
        found = {}
        for row in result["rows"]:
            if (row["op"], row["dtype"], row["layout"]) != (op, "float32", "channels_first"):
                continue
            name = f"{report.shape_text(row['shape'])} {epilogue_text(row['affine'], row['activation'])}"
            times = {peer: each["median_ms"] for peer, each in row["peers"].items()} | {None: row["median_ms"]}
            if theirs in ("of_copy", "of_new_copy"):
                if theirs in row and 8 * math.prod(row["shape"]) >= LARGER_THAN_CACHES:
                    found[name] = row[theirs]
            elif theirs in times and ours in times:
                found[name] = times[theirs] / times[ours]
        return found

    def aim(what: str, aimed: float, values: dict[str, float], of_mean: bool = False) -> Aim:
        return Aim(what, aimed, values, len(values), of_mean)  # the result decides which cases there are

    copied = "compiled, forward, arrays larger than the caches, a copy's time over ours"
    return [
        aim("NumPy alone, forward, PyTorch's time over ours", 1, ratios("forward", "torch", "numpy alone")),
        aim("NumPy alone, forward + backward, PyTorch's over ours", 1, ratios("both", "torch", "numpy alone")),
        aim("compiled, forward, ONNX Runtime's time over ours", 1, ratios("forward", "onnxruntime")),
        aim("compiled, forward + backward, PyTorch's time over ours, in the mean", 3, ratios("both", "torch"), True),
        aim(f"{copied}, into existing memory", 1 / 1.5, ratios("forward", "of_copy")),
        aim(f"{copied}, into new memory like ours", 1 / 1.5, ratios("forward", "of_new_copy")),
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """Format the table of the aims for the result's device."""
    device = result["device"]
    kind, aims = ("a CPU", cpu_aims(result)) if "cores" in device else ("an H100 or H200", gpu_aims(result))
    title = f"aims for {kind}; this is {device['name']}"
    width = max(len(text) for text in (title, *(aim.what for aim in aims)))
    text = [f"{title:{width}} {'aimed':>5} {'measured':>8}  verdict"]
    for aim in aims:
        measured = "–" if aim.measured is None else f"{aim.measured:.3f}"
        text.append(f"{aim.what:{width}} {aim.aimed:5.2f} {measured:>8}  {aim.verdict:15}  {aim.note}".rstrip())
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench aims", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    options = parser.parse_args(arguments)
    print("\n".join(lines(json.loads(options.result.read_text(encoding="utf-8")))))
    return 0
