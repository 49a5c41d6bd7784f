"""Put the fake device under CuPy when it is imported, in every Python process that tests/fakegpu/run.py starts."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

RUNTIME = "cupy_backends.cuda.api.runtime"


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name == RUNTIME:
            return importlib.util.spec_from_file_location(name, Path(os.environ["FAKEGPU_BUILT"], "runtime.so"))
        if name != "cupy":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_hook(module: Any) -> None:
            load(module)
            from fakegpu import launches

            launches.install()

        spec.loader.exec_module = load_and_hook  # type: ignore[method-assign]
        return spec


if "FAKEGPU_BUILT" in os.environ:
    sys.meta_path.insert(0, _Finder())
