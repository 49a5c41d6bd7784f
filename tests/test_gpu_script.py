"""The time limits of bench/gpu.sh, one by one and together, tested with parts that never end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.sh"
PACE = 2  # percent of its time limits

pytestmark = [pytest.mark.full, pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")]

#: A python that finds a GPU and hangs at every measurement; a compute-sanitizer that prints its arguments and hangs.
PYTHON = """#!/bin/sh
case "$*" in
    *gpu_status*) echo "gpu: usable" ;;
    *bench.summary*) ;;
    *) exec sleep 100 ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "asked: $*"
exec sleep 100
"""


def _examined(folder: Path, stage: str) -> tuple[str, dict[str, float]]:
    """Run a stage; return what the script prints, and the time limit of each part, in seconds at full pace."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]), "PYTHON": str(folder / "python"), "PACE": str(PACE)
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folder / "out"), stage], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    limits = re.findall(r"^([^\n:]+): FAILED: not done after ([\d.]+) s", done.stdout, re.M)
    return done.stdout, {name: float(seconds) * 100 / PACE for name, seconds in limits}


@pytest.mark.parametrize(
    ("stage", "most", "parts"),
    [
        ("first", 200, ["facts", "smoke", "benchmark", "host cost"]),
        ("full", 540, ["facts", "prime", "tests", "benchmark", "memcheck", "racecheck", "channels-last and fused",
                       "host cost", "dram"]),
        ("variants", 150, ["variants"]),
    ],
)  # fmt: skip
def test_parts_that_never_end(tmp_path: Path, stage: str, most: int, parts: list[str]) -> None:
    """Each part is stopped, reported, and followed by the next; together they take no longer than promised."""
    said, limits = _examined(tmp_path, stage)
    assert list(limits) == parts, said
    assert sum(limits.values()) <= most
    if stage == "full":
        _check_sanitizers((tmp_path / "out" / "sanitizer.txt").read_text())


def _check_sanitizers(text: str) -> None:
    """The sanitizers run small cases only: all cases would take an hour."""
    asked = re.findall(r"^asked: (.*)$", text, re.M)
    assert [line.split()[1] for line in asked] == ["memcheck", "racecheck"]
    for line in asked:
        assert "--error-exitcode 99" in line
        assert line.endswith("tests/test_cases.py")
        assert "-k test_small or test_double_small" in line
