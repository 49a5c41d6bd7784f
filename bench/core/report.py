"""The output: the facts of the machine, JSON, the table, the plot."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .cases import PER_SAMPLE, Array, Case, epilogue_text
from .timing import Timing

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("cupynorm", "numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy", "torch", "triton", "jax", "jaxlib"),
    *("onnxruntime", "ml_dtypes"),
)


def _output(*command: str) -> str | None:
    """Return what a command prints, or None if it cannot be run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@lru_cache
def commit() -> str | None:
    """Return $COMMIT or the checkout's commit, with '-dirty' if tracked files differ; None outside git."""
    if "COMMIT" in os.environ:  # set in a copy without history
        return os.environ["COMMIT"]
    head = _output("git", "rev-parse", "--verify", "HEAD")
    return head and head + ("-dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    import cupynorm

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["cupynorm"] = cupynorm.__version__  # the checkout's, even if another version is installed
    return found


def device_facts(xp: Any) -> dict[str, Any]:
    """Return facts about CuPy's current GPU, or about the CPU. Sizes in bytes."""
    if xp is not np:
        device = xp.cuda.Device()
        facts = xp.cuda.runtime.getDeviceProperties(device.id)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {
            "name": facts["name"].decode(),
            "compute_capability": f"{facts['major']}.{facts['minor']}",
            "sm_count": facts["multiProcessorCount"],
            "l2_bytes": facts["l2CacheSize"],
            "driver": driver.splitlines()[0] if driver else None,
        }
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"name": name, "cores": os.cpu_count(), "system": platform.platform()}


def row(
    case: Case,
    regime: str,
    bytes_per_element: int | None,
    timings: dict[str, Timing],
    errors: dict[str, float],
) -> dict[str, Any]:
    """Return one row of schema 1. timings: of 'cupynorm', 'copy' and the peers; errors: of the peers."""
    own, copy = timings["cupynorm"], timings["copy"]
    return {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "affine": case.affine,
        "activation": case.activation,
        **({"negative_slope": case.negative_slope} if case.activation == "leaky_relu" else {}),
        "regime": regime,
        "bytes_per_element": bytes_per_element,
        "median_ms": own.median * 1e3,
        "gbps": case.minimal_bytes / own.median / 1e9,
        "of_copy": copy.median / own.median,
        **({"of_new_copy": timings["new copy"].median / own.median} if "new copy" in timings else {}),
        "peers": {
            name: {"median_ms": timings[name].median * 1e3, "max_error": errors[name]}
            for name in timings
            if name not in {"cupynorm", "copy", "new copy"}
        },
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key that identifies a row, equal to Case.key."""
    return row["op"], tuple(row["shape"]), row["dtype"], row["layout"], row["affine"], row["activation"]


def document(device: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a run, schema 1. copy_gbps is the fastest copy of the rows: memory's bandwidth."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "versions": versions(),
        "copy_gbps": max((r["gbps"] / r["of_copy"] for r in rows), default=None),
        "rows": rows,
    }


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write the result in one step, so that a reader never sees half of it; one line for each row."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join("  " + json.dumps(each) for each in value) + "\n ]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    part.replace(path)


def add_to_json(path: Path, xp: Any, name: str, rows: list[dict[str, Any]] | dict[str, Any]) -> None:
    """Add figures of another measurement to the result of the same run, or to a new one if the file is missing."""
    there = path.is_file()
    result = json.loads(path.read_text(encoding="utf-8")) if there else document(device_facts(xp), [])
    write_json({**result, name: rows}, path)


def planned(op: str, x: Array, device: Any) -> tuple[str, int | None]:
    """Return the regimes, and the bytes of global memory per element, of the plans for x on a plan.Device.

    device None is the CPU, which has no plan: returns 'numpy' or 'compiled', and None.
    """
    if device is None:
        from cupynorm import cpu

        return "compiled" if cpu.compiled else "numpy", None
    from cupynorm.cuda.describe import plan_for
    from cupynorm.cuda.layout import ArrayDesc

    address = x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr
    desc = ArrayDesc(x.shape, x.strides, x.itemsize, address % 16)
    passes = ("forward", "backward") if op == "both" else (op,)
    plans = [plan_for(each, desc, x.dtype.name, device) for each in passes]
    regimes = dict.fromkeys(plan.regime for plan, _ in plans)
    return " + ".join(regimes), sum(plan.bytes_per_element + 2 * x.itemsize * copies for plan, copies in plans)


def shape_text(shape: Iterable[int]) -> str:
    return ",".join(str(n) for n in shape)


def op_text(op: str) -> str:
    return "forward + backward" if op == "both" else op


def fused(row: dict[str, Any]) -> bool:
    """True if a row has an epilogue: an activation, or a per-sample affine."""
    return row["activation"] is not None or row["affine"] == PER_SAMPLE


def rich_table(rows: list[dict[str, Any]], spreads: list[float], title: str) -> Any:
    """Format the medians; a peer's ratio is its time over cupynorm's, so above 1 cupynorm is faster."""
    from rich.table import Table

    names = list(dict.fromkeys(name for r in rows for name in r["peers"]))
    table = Table(title=title, caption="ms: median; ±: between the quartiles; ×: time over cupynorm's")
    for heading in ("shape", "op", "dtype", "regime"):
        table.add_column(heading, no_wrap=heading != "regime", min_width=6)
    for heading in ("cupynorm ms", "GB/s", "of copy", *(f"{name} ms" for name in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    layers = [shape_text(r["shape"]) + f" {epilogue_text(r['affine'], r['activation'])}" for r in rows]
    for i, (r, spread) in enumerate(zip(rows, spreads, strict=True)):
        peers = []
        for name in names:
            peer = r["peers"].get(name)
            peers.append(f"{peer['median_ms']:.3f} ({peer['median_ms'] / r['median_ms']:.1f}×)" if peer else "–")
        dtype = r["dtype"] + (" last" if r["layout"] == "channels_last" else "")
        table.add_row(
            layers[i].removesuffix(" plain") if i == 0 or layers[i - 1] != layers[i] else "",
            r["op"],
            dtype,
            r["regime"],
            f"{r['median_ms']:.3f} ±{spread:.3f}",
            f"{r['gbps']:.0f}" if r["gbps"] >= 10 else f"{r['gbps']:.1f}",
            f"{r['of_copy']:.0%}",
            *peers,
            end_section=i + 1 == len(rows) or layers[i + 1] != layers[i],
        )
    return table


#: Colours that colour-blind readers can distinguish, and a marker each.
STYLES = {
    "cupynorm": ("#0072B2", "o"),
    "torch": ("#D55E00", "s"),
    "torch.compile": ("#E69F00", "D"),
    "jax": ("#009E73", "^"),
    "onnxruntime": ("#CC79A7", "v"),
    "textbook": ("#777777", "x"),
    "numpy alone": ("#56B4E9", "P"),
}


def _bytes_text(value: float, _: Any = None) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:g} {unit}"
        value /= 1024
    return f"{value:g} GB"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot the fraction of the copy's bandwidth over plane size: a column per op, a row per dtype, layout, epilogue.

    Shapes with planes of one size share an x position; the lines go through the median of each position.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    rows = result["rows"]
    ops = [op for op in ("forward", "backward", "both") if any(r["op"] == op for r in rows)]
    kinds = list(dict.fromkeys((r["dtype"], r["layout"], fused(r)) for r in rows))
    figure, axes = plt.subplots(
        len(kinds),
        len(ops),
        figsize=(1.2 + 4.4 * len(ops), 1.5 + 3.5 * len(kinds)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    far = float(np.median([r["of_copy"] for r in rows])) < 0.3  # then only a log scale separates the ratios
    lowest = highest = 1.0
    seen: dict[str, Any] = {}
    for line, (dtype, layout, epilogue) in zip(axes, kinds, strict=True):
        for ax, op in zip(line, ops, strict=True):
            points: dict[str, list[tuple[float, float]]] = {}
            for r in rows:
                if (r["op"], r["dtype"], r["layout"], fused(r)) != (op, dtype, layout, epilogue):
                    continue
                plane = int(np.prod(r["shape"][2:])) * {"float64": 8, "float32": 4}.get(dtype, 2)
                points.setdefault("cupynorm", []).append((plane, r["of_copy"]))
                for name, peer in r["peers"].items():
                    points.setdefault(name, []).append((plane, r["of_copy"] * r["median_ms"] / peer["median_ms"]))
            ax.axhline(1, color="black", linewidth=1, linestyle="--")
            for name, values in reversed(points.items()):  # cupynorm on top
                colour, marker = STYLES.get(name, ("#F0E442", "*"))
                own = name == "cupynorm"
                x, y = np.array(sorted(values)).T
                middle = [float(np.median(y[x == each])) for each in np.unique(x)]
                ax.plot(np.unique(x), middle, color=colour, linewidth=2.2 if own else 1, alpha=1 if own else 0.55)
                seen[name] = ax.scatter(
                    x, y, s=34 if own else 22, color=colour, marker=marker, zorder=3 if own else 2, label=name
                )
                lowest, highest = min(lowest, float(y.min())), max(highest, float(y.max()))
            ax.set_xscale("log", base=2)
            if far:
                ax.set_yscale("log")
            ax.grid(alpha=0.25)
            ax.set_title(op_text(op), fontsize=11)
        kind = f"{dtype}, {layout.replace('_', '-')}" + (", epilogue" if epilogue else "")
        line[0].set_ylabel(f"{kind}\nof the copy's bandwidth")
    low, high = axes[0][0].get_xlim()
    for ax in axes.flat:
        ticks = [4.0**k for k in range(1, 20) if low <= 4.0**k <= high]
        ax.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) < 8 else ticks[::2]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(_bytes_text))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        if far:
            ax.set_ylim(lowest / 1.3, highest * 1.3)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(0, min(highest, 2.0) * 1.08)
    for ax in axes[-1]:
        ax.set_xlabel("bytes of one plane")
    axes[0][0].annotate(
        "copy of the same bytes", (0.02, 1), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8
    )
    order = ["cupynorm", *(name for name in STYLES if name in seen and name != "cupynorm")]
    order += [name for name in seen if name not in order]
    figure.legend([seen[n] for n in order], order, loc="outside lower center", ncols=len(order), frameon=False)
    dtypes = ", ".join(dict.fromkeys(dtype for dtype, *_ in kinds))
    figure.suptitle(f"Instance normalisation, {dtypes}, on {result['device']['name']}: higher is better", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
