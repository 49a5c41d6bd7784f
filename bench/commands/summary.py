"""Print the last lines of bench/gpu.sh: python -m bench summary OUTDIR. Missing results are lines, not errors."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core import report
from ..core.cases import epilogue_text
from . import aims, dram, host, variants

OPS = ("forward", "backward", "both")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def section(text: str, part: str) -> str | None:
    """Return the output of a part of bench/gpu.sh, the lines after '== PART'; None if it did not run."""
    found = re.search(rf"^== {re.escape(part)}\n(.*?)(?=^== |\Z)", text, re.M | re.S)
    return found[1] if found else None


def tests_line(text: str) -> str:
    """Return pytest's closing line, without its rule."""
    found = re.findall(r"^=*\s*((?:\d+ \w+, )*\d+ \w+ in [\d.]+s.*?)\s*=*$", text, re.M)
    return found[-1] if found else "no result"


def sanitizer_line(text: str) -> str:
    """Return compute-sanitizer's verdict, and pytest's closing line."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    return f"{found[-1] if found else 'no verdict'} ({tests_line(text)})"


def smoke_lines(text: str) -> str:
    """Return the failures and the verdict."""
    lines = text.strip().splitlines()
    return "\n".join([*(line for line in lines if "FAILED:" in line), *lines[-1:]])


def dram_line(text: str) -> str:
    """Return the reason why ncu counted nothing, or an empty text."""
    found = re.search(r"^not measured: (.*)$", text, re.M)
    return found[0] if found else ""


def bench_lines(result: dict[str, Any]) -> list[str]:
    """Return a line per layer and dtype: for each op, fraction of the copy, and PyTorch's time over cupynorm's."""
    copy = result["copy_gbps"]
    lines = [
        f"{result['device']['name']}: a large copy runs at {copy:.0f} GB/s. For each operation: "
        "fraction of a copy of the same bytes, time of PyTorch over ours",
        f"{'shape':24} {'epilogue':18} {'dtype':13} " + " ".join(f"{op:>16}" for op in OPS) + "  regime",
    ]
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        last = " last" if row["layout"] == "channels_last" else ""
        key = (
            report.shape_text(row["shape"]),
            epilogue_text(row["affine"], row["activation"]),
            row["dtype"] + last,
        )
        table.setdefault(key, {})[row["op"]] = row
    for (shape, epilogue, dtype), rows in table.items():
        cells = []
        for op in OPS:
            row = rows.get(op)
            torch = row and row["peers"].get("torch")
            ratio = f"{torch['median_ms'] / row['median_ms']:6.2f}x" if row and torch else "      –"
            cells.append(f"{row['of_copy']:8.0%} {ratio}" if row else " " * 15 + "–")
        regimes = dict.fromkeys(rows[op]["regime"] for op in ("forward", "backward") if op in rows)
        lines.append(f"{shape:24} {epilogue:18} {dtype:13} " + " ".join(cells) + "  " + " / ".join(regimes))
    return lines


def tables(folder: Path) -> Iterator[list[str]]:
    """Yield the lines of each table that a run has figures for."""
    if (folder / "variants.txt").is_file():
        yield variants.lines(json.loads(_text(folder / "variants.json"))["rows"])
    if (folder / "bench.txt").is_file():
        result = json.loads(_text(folder / "bench.json"))
        if result["rows"]:
            yield bench_lines(result)
        yield from (module.lines(result[name]) for name, module in (("host", host), ("dram", dram)) if name in result)
        yield aims.lines(result)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench summary", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    folder = parser.parse_args(arguments).folder
    try:
        found = list(tables(folder))
        print("\n\n".join("\n".join(table) for table in found) or "benchmark: no result", end="\n\n" if found else "\n")
    except (ValueError, KeyError, TypeError) as error:
        print(f"benchmark: no result ({type(error).__name__})")
    for name, file, line in (
        ("smoke", "smoke.txt", smoke_lines),
        ("tests", "tests.txt", tests_line),
        ("memcheck", "sanitizer.txt", sanitizer_line),
        ("racecheck", "sanitizer.txt", sanitizer_line),
        ("dram", "bench.txt", dram_line),
    ):
        text = section(_text(folder / file), name)
        if text is not None and not text.startswith("skipped") and (said := line(text)):
            print(f"{name}: {said}")
    return 0
