"""Optional packages of the tests: if one is missing or fails at import in any way, only its own tests are left out. A
package that only warns counts as installed, even if warnings are errors.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

#: Packages that this run does without, though they may be installed.
left_out: set[str] = set()


def imported(name: str) -> Any:
    """Return the module, or None if it cannot be imported for any reason."""
    if name in left_out:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception:
            return None


def required(name: str) -> Any:
    """Return the module; without it, skip the test or the test file being imported."""
    module = imported(name)
    if module is None:
        pytest.skip(f"needs {name}", allow_module_level=True)
    return module
