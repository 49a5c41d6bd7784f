"""Tiers of tests (tests/README.md): quick, default, full, nightly.

`@pytest.mark.full` and `@pytest.mark.nightly` put a test into a higher tier; with rules, as in
`@pytest.mark.full(simt=lambda given: given["dtype"] != "float32")`, only where the rule of its backend says so of its
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

#: Each has all of those before it.
TIERS = ("default", "full", "nightly")
#: The highest tier that is asked for; set by conftest.
asked = "default"
#: Marks of what the quick tier leaves out: all but NumPy, the recording runtime, and what is computed with them.
NOT_QUICK = ("simt", "compiled", "gpu", "nvrtc", "fakegpu", "chainer", "long")


def rank(marks: Iterable[pytest.Mark], given: dict[str, Any]) -> int:
    """The place in TIERS of the one that a test with these marks and parameters is of."""
    return max((TIERS.index(mark.name) for mark in marks if mark.name in TIERS and _holds(mark, given)), default=0)


def _holds(mark: pytest.Mark, given: dict[str, Any]) -> bool:
    if not mark.kwargs:
        return True
    rule = mark.kwargs.get(given.get("backend"))
    return rule is not None and bool(rule(given))


def amount(default: int, full: int, nightly: int | None = None) -> int:
    """How often a test does something, by the tier that is asked for."""
    return {"default": default, "full": full, "nightly": nightly or full}[asked]
