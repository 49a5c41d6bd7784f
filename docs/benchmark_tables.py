"""Write the tables and pictures of docs/benchmarks from the files in bench/results.

    python docs/benchmark_tables.py

conf.py calls write() at the start of each build. The newest file of each kind is used, by the date in its name.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import matplotlib as mpl  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from bench.commands import accuracy, aims  # noqa: E402  # found by the path above
from bench.core.cases import EPS, epilogue_text  # noqa: E402
from bench.core.report import fused, op_text, shape_text  # noqa: E402
from tools.mutation.interval import interval  # noqa: E402

Row = dict[str, Any]
Colours = dict[str, str]

#: Name, colour and marker of a contestant.
CONTESTANTS = {
    "compiled": ("cupynorm, compiled", "blue", "o"),
    "NumPy": ("cupynorm, NumPy alone", "sky", "P"),
    "emulated": ("cupynorm, emulated GPU", "teal", "D"),
    "CUDA": ("cupynorm, CUDA", "purple", "*"),
    "torch": ("PyTorch", "orange", "s"),
    "jax": ("JAX", "green", "^"),
    "onnxruntime": ("ONNX Runtime", "pink", "v"),
    "textbook": ("textbook", "grey", "X"),
}
PEERS = {name: CONTESTANTS[name][0] for name in ("torch", "jax", "onnxruntime", "textbook")}
#: Colour and marker of a dtype, and the columns of the GPU tables.
DTYPES = {"float32": ("blue", "o"), "bfloat16": ("orange", "s")}
KINDS = [(dtype, op) for dtype in DTYPES for op in ("forward", "backward")]

#: Shade of a colour on a light page and on a dark page.
COLOURS = {
    "text": ("#343a40", "#ced6dd"),
    "grid": ("#c8ced4", "#4a525b"),
    "blue": ("#0a5fa8", "#6cb6ff"),
    "sky": ("#3d94d1", "#a5d0fa"),
    "teal": ("#00796b", "#5fd3c4"),
    "orange": ("#c04a00", "#f0883e"),
    "green": ("#3a7d1e", "#8ccf6a"),
    "pink": ("#ab3b8e", "#ec9ad7"),
    "purple": ("#6a3fb5", "#b79bf5"),
    "grey": ("#6a737d", "#9aa4ae"),
}


class Result(NamedTuple):
    """A result file and its content."""

    path: Path
    data: dict[str, Any]

    @property
    def date(self) -> str:
        """The day of the run, from the name; some files have no other date."""
        return self.path.name[:10]

    @property
    def rows(self) -> list[Row]:
        return self.data["rows"]

    @property
    def source(self) -> str:
        """The line below a table: machine, date, copy, versions, commit and file, as the file has them."""
        device, copy = self.data.get("device", {}), self.data.get("copy_gbps")
        facts = [device["name"]] if device else []
        facts += [f"{device['cores']} cores"] if "cores" in device else []
        facts += [f"driver {device['driver']}"] if device.get("driver") else []
        facts += [self.date, *([f"a large copy ran at {copy:,.0f} GB/s"] if copy else [])]
        versions = self.data.get("versions") or {name: self.data[name] for name in ("python", "g++")}
        listed = ", ".join(f"{name} {version.removeprefix(name).strip()}" for name, version in versions.items())
        commit = re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", self.data["commit"])  # a mark like -dirty stays
        return f"{', '.join(facts)}. Versions: {listed}. Commit {commit}. File: `bench/results/{self.path.name}`."


def files(results: Path, pattern: str, device: str = "") -> list[Result]:
    """Read the files DATE-PATTERN.json, the newest last; FileNotFoundError if there are none.

    device: a fact that only some devices have, "cores" of a CPU, "sm_count" of a GPU.
    """
    paths = results.glob(f"[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-{pattern}.json")
    found = [Result(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    found = [result for result in found if not device or device in result.data["device"]]
    if not found:
        raise FileNotFoundError(f"{results} has no file DATE-{pattern}.json{device and f' of a device with {device}'}")
    return sorted(found, key=lambda r: (r.date, r.data.get("seed") or 0, r.data.get("date", ""), r.path.name))


def of_op(result: Result, op: str) -> list[Row]:
    return [row for row in result.rows if row["op"] == op]


def over(row: Row, peer: str) -> float | None:
    """Return a peer's time over cupynorm's; None if it was not timed."""
    return row["peers"][peer]["median_ms"] / row["median_ms"] if peer in row["peers"] else None


def ratios(result: Result, op: str, peer: str) -> dict[str, float]:
    """Return a peer's time over cupynorm's by shape, for the shapes on which it was timed."""
    found = {shape_text(row["shape"]): over(row, peer) for row in of_op(result, op)}
    return {shape: ratio for shape, ratio in found.items() if ratio is not None}


# Tables


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *sources: str, left: int = 1) -> str:
    """Format a Markdown table and the lines below it. Columns after the first `left` have numbers, kept in one line."""
    rule = [":---"] * left + ["---:"] * (len(head) - left)
    rows = ["| " + " | ".join(line) + " |" for line in (head, rule)]
    for line in lines:
        numbers = (cell.replace(" ", "\xa0") if len(cell) < 16 else cell for cell in line[left:])
        rows.append("| " + " | ".join([*line[:left], *numbers]) + " |")
    return "\n".join([*rows, "", "\n\n".join(filter(None, sources)), ""])


def times(value: float | None) -> str:
    """Format a ratio of times."""
    return "–" if value is None else f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def cpu_table(result: Result, op: str) -> str:
    """Tabulate an op: times, and the time of a copy and of the other contestants over ours."""
    rows = of_op(result, op)
    peers = [peer for peer in ("torch", "onnxruntime") if ratios(result, op, peer)]
    copied, epilogues = op == "forward", any(fused(row) for row in rows)
    head = ["shape", *["epilogue"] * epilogues, "compiled, ms", "NumPy alone, ms", *["new copy"] * copied]
    lines = []
    for row in rows:
        line = [shape_text(row["shape"]), *[epilogue_text(row["affine"], row["activation"])] * epilogues]
        line += [f"{timed['median_ms']:.3g}" for timed in (row, row["peers"]["numpy alone"])]
        lines.append([*line, *[times(row.get("of_new_copy"))] * copied, *(times(over(row, peer)) for peer in peers)])
    means = [f"{geometric_mean(ratios(result, op, peer).values()):.2f}×" for peer in peers]
    lines.append(["geometric mean", *[""] * (len(head) - 1), *means])
    return table([*head, *(PEERS[peer] for peer in peers)], lines, result.source, left=1 + epilogues)


def aims_table(result: Result, found: list[aims.Aim]) -> str:
    """Tabulate the aims that have measurements, as `python -m bench aims` reads them."""
    lines = []
    for aim in (aim for aim in found if aim.values):
        missed = sum(value < aim.aimed for value in aim.values.values())
        worst, least = min(aim.values.items(), key=lambda item: item[1])
        worst = "" if aim.wanted == 1 else f" ({worst})"
        below = f", {missed} of {len(aim.values)} below" if missed and not aim.of_mean else ""
        figures = f"{aim.aimed:.2f}", f"{geometric_mean(aim.values.values()):.2f}", f"{least:.2f}{worst}"
        lines.append([aim.what, *figures, aim.verdict.lower() + below])
    absent = len(found) - len(lines)
    note = f"{absent} further aims have no measurement in this file." if absent else ""
    return table(["aim", "aimed", "mean", "least", "verdict"], lines, note, result.source)


def hot_table(results: Sequence[tuple[str, Result]]) -> str:
    """Summarise the repeated calls of each result: cupynorm against each contestant."""
    lines = []
    peers = "torch", "onnxruntime", "textbook"
    for (what, result), op, peer in product(results, ("forward", "backward", "both"), peers):
        if timed := ratios(result, op, peer):
            worst, least = min(timed.items(), key=lambda item: item[1])
            slower = f"{sum(ratio < 1 for ratio in timed.values())} of {len(timed)}"
            mean = f"{geometric_mean(timed.values()):.2f}×"
            lines.append([what, op_text(op), PEERS[peer], mean, f"{least:.2f}× ({worst})", slower])
    head = ["shapes", "call", "contestant", "mean", "least", "faster on"]
    return table(head, lines, *(result.source for _, result in results), left=3)


def gpu_table(result: Result) -> str:
    """Tabulate the fraction of a copy's bandwidth and PyTorch's time over ours."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    for row in result.rows:
        if row["layout"] == "channels_first" and row["activation"] is None:
            name = shape_text(row["shape"]) + (" affine" if row["affine"] else "")
            found.setdefault(name, {})[row["dtype"], row["op"]] = f"{row['of_copy']:.2f}, {times(over(row, 'torch'))}"
    lines = [[name, *(cells.get(kind, "–") for kind in KINDS)] for name, cells in found.items()]
    return table(["shape", *(" ".join(kind) for kind in KINDS)], lines, result.source)


def fractions(results: Sequence[Result]) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """Return the planned and the fastest variant's fraction of a copy, by dtype and op, then by elements of a plane.

    The plan is that of the first result; the fastest variant is taken from all of them.
    """
    found: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for result in results:
        for row in result.rows:
            if "of_copy" in row and row["layout"] == "channels_first":
                sizes = found.setdefault((row["dtype"], row["op"]), {})
                plane, fraction = math.prod(row["shape"][2:]), row["of_copy"]
                planned, fastest = sizes.get(plane, (math.nan, 0.0))
                sizes[plane] = fraction if row["today"] and result is results[0] else planned, max(fastest, fraction)
    return found


def variants_table(results: Sequence[Result]) -> str:
    """Tabulate the planned variant's fraction of a copy, then the fastest variant's, by the size of a plane."""
    found = fractions(results)
    lines = []
    for plane in sorted({plane for sizes in found.values() for plane in sizes}):
        cells = [found.get(kind, {}).get(plane, (math.nan, math.nan)) for kind in KINDS]
        lines.append([plane_text(plane), *(f"{first:.2f} → {best:.2f}".replace("nan", "–") for first, best in cells)])
    return table(["plane", *(" ".join(kind) for kind in KINDS)], lines, *(result.source for result in results))


def plane_text(elements: int) -> str:
    side = math.isqrt(elements)
    return f"{side}²" if side * side == elements else str(elements)


def host_table(result: Result) -> str:
    """Tabulate the host time of calls on small tensors, and the time of the import."""
    lines = []
    for row in result.data["host"]:
        ours, peer = row["microseconds"], row["peers"].get("torch")
        shape = shape_text(row["shape"]) + (" affine" if row["affine"] else "")
        theirs = [f"{peer:.0f}", times(peer / ours)] if peer else ["–", "–"]
        lines.append([shape, op_text(row["op"]), f"{ours:.0f}", *theirs])
    taken = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.data.get("import", {}).items())
    note = taken and f"Import, beyond CuPy's own start: {taken} (cold: it compiles)."
    head = ["shape", "call", "cupynorm, µs", "PyTorch, µs", "ratio"]
    return table(head, lines, note, result.source, left=2)


def digits_table(result: Result) -> str:
    """Tabulate the errors as `python -m bench accuracy` formats them."""
    head, *lines = accuracy.table(result.data)
    return table([PEERS.get(name, name) for name in head], lines, result.source)


def mutation_table(results: Path) -> str:
    """Tabulate the share of killed mutants: all samples of a part together, and its newest sample."""
    lines, sources = [], []
    for part in ("kernels", "backends", "rest"):
        samples = [each for each in files(results, f"mutation-{part}*") if not each.data["quick"]]
        newest = samples[-1].data
        reached = newest["parts"][part]["tested"] + newest["parts"][part]["invalid"]
        which = f"newest: seed {newest['seed']}, {reached} of {newest['sample'][part]} drawn"
        for what, some in ((f"all {len(samples)} samples", samples), (which, samples[-1:])):
            killed, tested = (sum(each.data["parts"][part][name] for each in some) for name in ("killed", "tested"))
            low, high = interval(killed, tested)
            share = f"{100 * killed / tested:.1f} %", f"{100 * low:.0f} to {100 * high:.0f} %"
            lines.append([part, what, str(newest["mutants"][part]), str(tested), str(killed), *share])
        sources.append(f"Newest sample of {part}: {samples[-1].source}")
    head = ["part", "samples", "mutants", "tested", "killed", "share", "95 % interval"]
    return table(head, lines, *sources, left=2)


# Pictures


def cpu_picture(figure: Figure, colour: Colours, result: Result) -> None:
    """Draw the other contestants' time over ours for each shape."""
    names = [shape_text(row["shape"]) for row in of_op(result, "forward")]
    figure.set_size_inches(5.2, 1.5 + 0.25 * len(names))
    ax = figure.subplots()
    series = ("torch", "forward", "orange"), ("torch", "both", "blue"), ("onnxruntime", "forward", "pink")
    for (peer, op, hue), marker in zip(series, "sov", strict=True):
        found = ratios(result, op, peer)
        places, label = [names.index(shape) for shape in found], f"{PEERS[peer]}, {op_text(op)}"
        ax.plot(list(found.values()), places, marker, color=colour[hue], label=label)
    ax.axvline(1, color=colour["text"])
    ax.set_xscale("log")
    ticks = [n for n in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if ax.get_xlim()[0] <= n <= ax.get_xlim()[1]]
    ax.set_xticks(ticks, [f"{n:g}×" for n in ticks])
    ax.set_xticks([], minor=True)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("time over that of cupynorm, compiled\n(left of 1× the other is faster)")
    figure.legend(loc="outside upper center", ncols=2)


def gpu_picture(figure: Figure, colour: Colours, results: Sequence[Result]) -> None:
    """Draw the planned and the fastest variant's fraction of a copy's bandwidth over the size of a plane."""
    found = fractions(results)
    figure.set_size_inches(5.2, 6.2)
    for ax, op in zip(figure.subplots(2, 1, sharex=True), ("forward", "backward"), strict=True):
        for dtype, (hue, marker) in DTYPES.items():
            sizes = sorted(found.get((dtype, op), {}).items())
            planes = [plane for plane, _ in sizes]
            planned, fastest = zip(*(each for _, each in sizes), strict=True)
            style = {"color": colour[hue], "marker": marker}
            ax.plot(planes, planned, ":", markerfacecolor="none", label=f"{dtype}, planned at first", **style)
            ax.plot(planes, fastest, label=f"{dtype}, fastest variant", **style)
        ax.axhline(1, color=colour["text"])
        ax.set_xscale("log", base=2)
        ax.set_xticks(planes[::2], [plane_text(plane) for plane in planes[::2]])
        ax.set_xticks([], minor=True)
        ax.set_ylim(0, 1.12)
        ax.set_ylabel(f"{op}: of a copy's bandwidth")
    ax.set_xlabel("elements of a plane")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def digits_picture(figure: Figure, colour: Colours, result: Result) -> None:
    """Draw the error of each contestant on N(mean, 1) in float32 over the mean."""
    rows, shape = {}, list(accuracy.DEFAULT)
    for row in result.rows:
        normal = re.fullmatch(r"N\(([^-].*), 1\)", row["row"])
        if normal and (row["dtype"], row["shape"], row["eps"], row.get("dy", 1.0)) == ("float32", shape, EPS, 1.0):
            rows[float(normal[1])] = row["roundings"]
    means = sorted(rows)
    figure.set_size_inches(5.2, 7.2)
    answers = (("forward", ("y",)), ("backward", ("dx", "dweight", "dbias")))
    for ax, (op, parts) in zip(figure.subplots(2, 1, sharex=True), answers, strict=True):
        for name in dict.fromkeys(name for each in rows.values() for name in each):
            label, hue, marker = CONTESTANTS.get(name, (name, "grey", "x"))
            errors = [[rows[m].get(name, {}).get(part) for part in parts] for m in means]
            worst = [max((error for error in each if error is not None), default=math.nan) for each in errors]
            ax.plot(worst, color=colour[hue], marker=marker, label=label)
        limit = result.data["allowed"]
        ax.axhline(limit, color=colour["text"], linestyle="--")
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "fontsize": 9}
        ax.annotate(f"cupynorm's limit: {limit:g}", (len(means) - 1, limit), **place)
        ax.set_yscale("log")
        ax.set_xticks(range(len(means)), [f"{m:,.0f}" for m in means])
        ax.set_ylabel(f"{op}: worst error in roundings")
    ax.set_xlabel("mean of x; its deviation is 1")
    handles = {text: handle for a in figure.axes for handle, text in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)


def pictures(name: str, draw: Callable[..., None], *results: Any) -> dict[str, str]:
    """Return the SVG text of a picture, by file name, for light and dark pages; the same bits in every run."""
    found = {}
    for shade, page in enumerate(("light", "dark")):
        colour = {key: shades[shade] for key, shades in COLOURS.items()}
        names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
        settings = dict.fromkeys(names, colour["text"]) | {
            **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True},
            **{"grid.color": colour["grid"], "grid.linewidth": 0.6, "legend.frameon": False},
            **{"lines.linewidth": 1.2, "font.size": 10, "svg.hashsalt": "cupynorm"},
        }
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(settings)
            figure, text = Figure(layout="constrained"), io.StringIO()
            draw(figure, colour, *results)
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        found[f"{name}-{page}.svg"] = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
    return found


def write(results: Path, target: Path) -> list[Path]:
    """Write the tables and pictures into `target` and return their paths; leave unchanged files alone."""
    cpu = files(results, "*-float32", "cores")[-1]
    fused_calls = files(results, "*-fused", "cores")[-1]
    short, random = (files(results, f"*-{shapes}", "cores")[-1] for shapes in ("short", "random"))
    first = files(results, "*-first", "sm_count")[-1]
    planned = files(results, "*-variants", "sm_count")[-1]
    registers = files(results, "*-variants-registers", "sm_count")[-1]
    variants = [planned, registers] if registers.date >= planned.date else [planned]
    digits = files(results, "*-accuracy")[-1]
    texts = {
        "cpu-forward.md": cpu_table(cpu, "forward"),
        "cpu-both.md": cpu_table(cpu, "both"),
        "cpu-aims.md": aims_table(cpu, aims.cpu_aims(cpu.data)),
        "cpu-hot.md": hot_table([("short planes", short), ("random", random)]),
        "cpu-fused-forward.md": cpu_table(fused_calls, "forward"),
        "cpu-fused-both.md": cpu_table(fused_calls, "both"),
        "gpu-first.md": gpu_table(first),
        "gpu-aims.md": aims_table(first, aims.gpu_aims(first.data)),
        "gpu-variants.md": variants_table(variants),
        "gpu-host.md": host_table(files(results, "*-host", "sm_count")[-1]),
        "digits.md": digits_table(digits),
        "mutation.md": mutation_table(results),
    }
    texts |= pictures("cpu", cpu_picture, cpu)
    texts |= pictures("gpu", gpu_picture, variants)
    texts |= pictures("digits", digits_picture, digits)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = target / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return [target / name for name in texts]


if __name__ == "__main__":
    print(*write(ROOT / "bench" / "results", ROOT / "docs" / "benchmarks" / "generated"), sep="\n")
