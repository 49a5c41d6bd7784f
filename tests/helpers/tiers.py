"""Tiers of tests (tests/README.md): quick, default, full, nightly.

`@pytest.mark.full` and `@pytest.mark.nightly` put a test into a higher tier; with rules, as in
`@pytest.mark.full(simt=lambda given: given["dtype"] != "float32")`, only if the rule of its backend is true for its
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

#: Each tier includes the tiers before it.
TIERS = ("default", "full", "nightly")
#: The highest tier to run; set by conftest.
asked = "default"
#: Marks of tests outside the quick tier, which runs on NumPy and the recording runtime only.
NOT_QUICK = ("simt", "compiled", "gpu", "nvrtc", "fakegpu", "chainer", "long")


def rank(marks: Iterable[pytest.Mark], given: dict[str, Any]) -> int:
    """Return the index in TIERS of a test with these marks and parameters."""
    return max((TIERS.index(mark.name) for mark in marks if mark.name in TIERS and _holds(mark, given)), default=0)


def _holds(mark: pytest.Mark, given: dict[str, Any]) -> bool:
    if not mark.kwargs:
        return True
    rule = mark.kwargs.get(given.get("backend"))
    return rule is not None and bool(rule(given))


def amount(default: int, full: int, nightly: int | None = None) -> int:
    """Choose a number of repetitions by the tier being run."""
    return {"default": default, "full": full, "nightly": nightly or full}[asked]
