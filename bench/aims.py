"""Compare a result with the aims for an H100 or H200: python -m bench.aims bench.json."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import report
from .cases import SWEEP_ELEMENTS, real_layers, sweep_layers

DTYPES = {"float32": 4, "bfloat16": 2}
LARGE = 64_000_000  # bytes of x from which on memory alone limits a call

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
    """measured: None if nothing was measured; complete: True if every case of the aim was measured."""

    what: str
    aimed: float
    measured: float | None
    complete: bool
    note: str

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.measured < self.aimed:
            return "NOT REACHED"
        return "reached" if self.complete else "reached in part"


def _least(what: str, aimed: float, values: dict[str, float], wanted: int) -> Aim:
    """Hold the least of the values to the aim; wanted: how many values a complete measurement has."""
    if not values:
        return Aim(what, aimed, None, False, "")
    worst = min(values, key=lambda name: values[name])
    return Aim(what, aimed, values[worst], len(values) >= wanted, f"worst: {worst}; {len(values)} of {wanted}")


def _mean(what: str, aimed: float, values: Sequence[float], wanted: int) -> Aim:
    if not values:
        return Aim(what, aimed, None, False, "")
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return Aim(
        what, aimed, mean, len(values) >= wanted, f"{min(values):.2f} to {max(values):.2f}; {len(values)} of {wanted}"
    )


def aims(result: dict[str, Any]) -> list[Aim]:
    """Return all aims, in report order, for a result of `python -m bench` (and of bench.host, if it is included)."""
    real = {layer.shape: layer for layer in real_layers()}
    swept = [layer.shape for layer in sweep_layers(SWEEP_ELEMENTS["gpu"])]
    rows = {}
    for row in result["rows"]:
        activated = row["activation"] is not None
        if activated or not report.fused(row):
            rows[tuple(row["shape"]), row["dtype"], row["layout"], row["op"], activated] = row

    def speedup(key: Any, peer: str) -> float | None:
        row = rows.get(key)
        if row is None or peer not in row["peers"]:
            return None
        return float(row["peers"][peer]["median_ms"] / row["median_ms"])

    found = []
    for (layout, op), aimed in OF_COPY.items():
        for dtype, itemsize in DTYPES.items():
            large = [shape for shape in real if math.prod(shape) * itemsize >= LARGE]
            for group, shapes in (("real shapes of 64 MB and more", large), ("every plane size", swept)):
                keys = ((shape, dtype, layout, op, False) for shape in shapes)
                values = {report.shape_text(key[0]): rows[key]["of_copy"] for key in keys if key in rows}
                what = f"of a copy, {op}, {layout}, {dtype}, {group}"
                found.append(_least(what, aimed, values, len(shapes)))
    for (layout, fused, peer), aimed in SPEEDUP.items():
        for dtype in DTYPES:
            shapes = [shape for shape, layer in real.items() if layer.activation is not None or not fused]
            ratios = [speedup((shape, dtype, layout, "both", fused), peer) for shape in shapes]
            what = f"time of {peer} over ours, {layout}, {dtype}" + (", activation fused" if fused else "")
            found.append(_mean(what, aimed, [ratio for ratio in ratios if ratio is not None], len(shapes)))
    for dtype in DTYPES:
        every = {}
        for layout, fused in {(layout, fused): None for layout, fused, _ in SPEEDUP}:
            for shape, layer in real.items():
                if fused and layer.activation is None:
                    continue
                name = f"{report.shape_text(shape)} {layout}" + (" fused" if fused else "")
                every[name] = speedup((shape, dtype, layout, "both", fused), "torch")
        values = {name: ratio for name, ratio in every.items() if ratio is not None}
        found.append(_least(f"time of torch over ours, the slowest real shape, {dtype}", 1.0, values, len(every)))
    for op in ("forward", "both"):
        calls = [row for row in result.get("host", ()) if row["op"] == op]
        values = {
            report.shape_text(row["shape"]) + (" affine" if row["affine"] else ""): row["peers"]["torch"]
            / row["microseconds"]
            for row in calls
            if "torch" in row["peers"]
        }
        what = f"host's time of torch over ours, small tensors, {report.op_text(op)}"
        found.append(_least(what, 1.0, values, len(calls)))
    for name, most in IMPORT.items():
        taken = result.get("import", {}).get(name)
        what = f"{most:g} s over the time of a {name} import"
        found.append(Aim(what, 1.0, most / taken if taken else None, True, f"{taken:.2f} s" if taken else ""))
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """Format the table."""
    title = f"aims for an H100 or H200; this is {result['device']['name']}"
    text = [f"{title:76} {'aimed':>5} {'measured':>8}  verdict"]
    for aim in aims(result):
        measured = "–" if aim.measured is None else f"{aim.measured:.3f}"
        text.append(f"{aim.what:76} {aim.aimed:5.2f} {measured:>8}  {aim.verdict:15}  {aim.note}".rstrip())
    return text


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
