"""Check the claims about the CPU against a result: python -m bench.claims RESULT.json."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from . import report
from .cases import epilogue_text

LARGER_THAN_CACHES = 64 << 20  # bytes of x and y


class Claim(NamedTuple):
    """A claim; goal: the least ratio of their time to ours, in the worst case or in the mean."""

    text: str
    goal: float
    of_mean: bool
    ratios: dict[str, float]  # theirs over ours, by case

    def line(self) -> str:
        if not self.ratios:
            return f"{self.text}: not measured"
        mean = statistics.geometric_mean(self.ratios.values())
        worst = min(self.ratios, key=self.ratios.__getitem__)
        missed = sorted(f"{case} {ratio:.2f}" for case, ratio in self.ratios.items() if ratio < self.goal)
        held = mean >= self.goal if self.of_mean else not missed
        text = (
            f"{self.text} (at least {self.goal:.2f}{' in the mean' if self.of_mean else ''}): "
            f"{'held' if held else 'MISSED'}. Geometric mean {mean:.2f} of {len(self.ratios)} cases, "
            f"worst {self.ratios[worst]:.2f} at {worst}"
        )
        return text if self.of_mean or held else f"{text}; below: {'; '.join(missed)}"


def claims(result: dict[str, Any]) -> list[Claim]:
    """Return the claims about float32, channels-first; a case is a shape with its epilogue."""

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

    copied = "compiled, forward, arrays larger than the caches, a copy's time over ours"
    return [
        Claim("NumPy alone, forward, PyTorch's time over ours", 1, False, ratios("forward", "torch", "numpy alone")),
        Claim("NumPy alone, forward + backward, PyTorch's over ours", 1, False, ratios("both", "torch", "numpy alone")),
        Claim("compiled, forward, ONNX Runtime's time over ours", 1, False, ratios("forward", "onnxruntime")),
        Claim("compiled, forward + backward, PyTorch's time over ours", 3, True, ratios("both", "torch")),
        Claim(f"{copied}, into existing memory", 1 / 1.5, False, ratios("forward", "of_copy")),
        Claim(f"{copied}, into new memory like ours", 1 / 1.5, False, ratios("forward", "of_new_copy")),
    ]


def main(path: Path) -> None:
    for claim in claims(json.loads(path.read_text(encoding="utf-8"))):
        print(claim.line())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
