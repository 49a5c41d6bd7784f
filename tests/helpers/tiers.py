"""Tiers of tests (tests/README.md): quick, default, full, nightly.

`@pytest.mark.full` and `@pytest.mark.nightly` put a test into a higher tier; with rules, as in
`@pytest.mark.full(simt=lambda given: given["dtype"] != "float32")`, only if the rule of its backend is true for its
parameters.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest

#: Each tier includes the tiers before it.
TIERS = ("default", "full", "nightly")
#: The highest tier to run; set by conftest.
asked = "default"
#: Marks of tests outside the quick tier, which runs on NumPy and the recording runtime only.
NOT_QUICK = ("simt", "compiled", "gpu", "nvrtc", "fakegpu", "chainer", "long")


#: Of more than FEW cases of a test `beyond` leaves out all but about one in EVERY.
FEW, EVERY = 8, 4


def beyond(items: Iterable[Any], backend: str) -> set[Any]:
    """Return the cases that a lower tier leaves out on a backend, of tests that are not marked `whole`: on the emulator
    the default tier, on NumPy the quick one. A hash of its name chooses a case: an axis of a product then keeps all its
    values, and a case stays when others are added."""
    cases = defaultdict(list)
    for item in items:
        if parameters(item).get("backend") == backend and not item.get_closest_marker("whole"):
            cases[item.function].append(item)
    many = chain.from_iterable(each for each in cases.values() if len(each) > FEW)
    return {item for item in many if zlib.crc32(item.nodeid.encode()) % EVERY}


def parameters(item: Any) -> dict[str, Any]:
    """Return a test's parameters."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def ranks(items: Iterable[Any]) -> dict[Any, int]:
    """Return the index in TIERS of each collected test."""
    found = {item: rank(item.iter_markers(), parameters(item)) for item in items}
    return found | dict.fromkeys(beyond((item for item in found if not found[item]), "simt"), 1)


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
