"""Run a command on the fake device: python tests/fakegpu/run.py COMMAND...

Every Python process it starts finds the fake device and the hook that runs kernels (hook/sitecustomize.py). The
variable FAKEGPU has the device's settings: FAKEGPU=devices=2,capability=80 (README.md lists them).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

from fakegpu import build  # noqa: E402


def environment(built: Path) -> dict[str, str]:
    """Return the environment variables with which a process finds the fake device in a folder."""
    without_driver = "driver=0" in os.environ.get("FAKEGPU", "").split(",")
    first = {
        "PATH": [str(Path(sys.executable).parent)],
        "LD_LIBRARY_PATH": [] if without_driver else [str(built / "driver")],
        "PYTHONPATH": [str(HERE / "hook"), str(HERE.parent), str(HERE.parents[1])],
    }
    joined = {name: os.pathsep.join([*paths, os.environ.get(name, "")]).strip(":") for name, paths in first.items()}
    return {
        "CUPY_CACHE_DIR": str(build.CACHE / ("ptx" if os.environ.get("FAKEGPU_PTX") else "cupy")),
        **os.environ,
        **joined,
        "FAKEGPU_BUILT": str(built),
        "CUPY_ACCELERATORS": "",  # CuPy then uses its plain kernels, which have stand-ins
    }


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        built = build.build()
    except build.MissingError as error:
        sys.exit(str(error))
    variables = environment(built)
    os.environ["PATH"] = variables["PATH"]  # execvpe looks the command up there
    sys.stdout.flush()
    os.execvpe(sys.argv[1], sys.argv[1:], variables)


if __name__ == "__main__":
    main()
