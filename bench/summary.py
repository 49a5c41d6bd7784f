"""The last lines of bench/gpu.sh: python -m bench.summary OUTDIR. What is missing is said, never raised."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

OPS = ("forward", "backward", "both")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def tests_line(text: str) -> str:
    """pytest's closing line, without its rule."""
    found = re.findall(r"^=*\s*((?:\d+ \w+, )*\d+ \w+ in [\d.]+s.*?)\s*=*$", text, re.M)
    return found[-1] if found else "no result"


def sanitizer_line(text: str) -> str:
    """compute-sanitizer's own verdict, and how many tests it looked at."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    return f"{found[-1] if found else 'no verdict'} ({tests_line(text)})"


def bench_lines(result: dict[str, Any]) -> list[str]:
    """A line for each shape and dtype: for each op, fraction of the copy, and PyTorch's time over cupynorm's."""
    copy = result["copy_gbps"]
    lines = [
        f"{result['device']['name']}: a large copy runs at {copy:.0f} GB/s. For each operation: "
        "fraction of a copy of the same bytes, time of PyTorch over ours",
        f"{'shape':24} {'dtype':9} " + " ".join(f"{op:>16}" for op in OPS) + "  regime",
    ]
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        key = (",".join(map(str, row["shape"])), row["dtype"], row["layout"])
        table.setdefault(key, {})[row["op"]] = row
    for (shape, dtype, layout), rows in table.items():
        cells = []
        for op in OPS:
            row = rows.get(op)
            torch = row and row["peers"].get("torch")
            ratio = f"{torch['median_ms'] / row['median_ms']:6.2f}x" if row and torch else "      –"
            cells.append(f"{row['of_copy']:8.0%} {ratio}" if row else " " * 15 + "–")
        regimes = dict.fromkeys(rows[op]["regime"] for op in ("forward", "backward") if op in rows)
        last = " last" if layout == "channels_last" else ""
        lines.append(f"{shape:24} {dtype + last:9} " + " ".join(cells) + "  " + " / ".join(regimes))
    return lines


def main(folder: Path) -> None:
    for name, line in (("tests", tests_line), ("memcheck", sanitizer_line), ("racecheck", sanitizer_line)):
        text = _text(folder / f"{name}.txt")
        if not text.startswith("skipped"):
            print(f"{name}: {line(text)}")
    try:
        result = json.loads(_text(folder / "bench.json"))
        print("\n".join(bench_lines(result)))
    except (ValueError, KeyError, TypeError) as error:
        print(f"benchmark: no result ({type(error).__name__})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
