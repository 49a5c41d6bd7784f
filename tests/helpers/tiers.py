"""Tiers of tests (tests/README.md): quick, default, full, nightly.

`@pytest.mark.full` and `@pytest.mark.nightly` put a test into a higher tier; with rules, as in
`@pytest.mark.full(simt=lambda given: given["dtype"] != "float32")`, only if the rule of its backend is true for its
parameters.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

#: Each tier includes the tiers before it.
TIERS = ("default", "full", "nightly")
#: The highest tier to run; set by conftest.
asked = "default"
#: Marks of tests outside the quick tier, which runs on NumPy and the recording runtime only.
NOT_QUICK = ("simt", "compiled", "gpu", "nvrtc", "fakegpu", "chainer", "long")


#: Of more than FEW cases of a test on the emulator the default tier runs about one in EVERY, and the full tier all.
FEW, EVERY = 8, 4


def ranks(items: Iterable[Any]) -> dict[Any, int]:
    """Return the index in TIERS of each collected test."""
    found, emulated = {}, defaultdict(list)
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        found[item] = rank(item.iter_markers(), given)
        if found[item] == 0 and given.get("backend") == "simt" and not item.get_closest_marker("whole"):
            emulated[item.function].append(item)
    for cases in emulated.values():
        for item in cases:
            found[item] = int(len(cases) > FEW and not kept(item.nodeid))
    return found


def kept(case: str) -> bool:
    """Choose by a hash of the name: an axis of a product then keeps all its values, and a case stays when others are
    added."""
    return zlib.crc32(case.encode()) % EVERY == 0


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
