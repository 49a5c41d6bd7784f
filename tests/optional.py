"""Optional packages of the tests: one that is missing or fails at import, in whatever way, leaves its tests out, and no
others. One that only warns is there, also where warnings are errors.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest


def imported(name: str) -> Any:
    """The module, or None where it cannot be imported for whatever reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception:
            return None


def required(name: str) -> Any:
    """The module; skips the test, or the file that is being imported, without it."""
    module = imported(name)
    if module is None:
        pytest.skip(f"needs {name}", allow_module_level=True)
    return module
