"""Processes that import the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cupynorm

PACKAGE = Path(cupynorm.__file__).parent


def run(code: str, folder: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, in this folder."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def said(code: str, folder: Path = PACKAGE.parent, **environment: str) -> str:
    """What a process prints that imports the package from this folder."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = run(code, folder, **{"PYTHONPATH": paths, "CUPYNORM_COMPILED": "1", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
