"""Make forks safe: a child inherits locks held by other threads of its parent, but not those threads.

The loops are compiled under locks. If another thread compiled during the fork, the child would wait for them
forever, with LLVM in an undefined state. The forking thread therefore acquires these locks first, and so waits until no
other thread compiles. The locks are reentrant, so a thread may fork while it compiles. The fork also waits for running
imports of the backend and of the modules that it imports later.
"""

from __future__ import annotations

import importlib
import logging  # noqa: F401  # also acquires its lock for a fork: must come after ours, since the threads we wait for may log
import os
import sys
import threading
from contextlib import ExitStack, suppress
from typing import Any

#: Modules imported by calls.
IMPORTED = ("cupynorm.cpu", "numpy.polynomial")
#: Where the locks are, if imported, in the order of acquisition.
LOCKS = (("cupynorm.cpu.llvm_machine", "lock"), ("llvmlite.binding.ffi", "lib._lock"))


class _Forking(threading.local):
    def __init__(self) -> None:
        self.held: list[ExitStack] = []


_forking = _Forking()


def _locks() -> list[Any]:
    """Return the existing LOCKS; other versions of llvmlite may have other ones."""
    found = []
    for module, path in LOCKS:
        lock: Any = sys.modules.get(module)
        for name in path.split("."):
            lock = getattr(lock, name, None)
        if hasattr(lock, "__enter__"):
            found.append(lock)
    return found


def _before() -> None:
    held = ExitStack()
    _forking.held.append(held)
    for name in IMPORTED:
        if name in sys.modules:
            with suppress(Exception):  # the importing thread raises them
                importlib.import_module(name)  # waits if another thread is importing it
    for lock in _locks():
        held.enter_context(lock)


def _after() -> None:
    if _forking.held:
        _forking.held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
