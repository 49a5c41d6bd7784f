"""What a fork waits for: a child has the locks that threads of its parent held, and not the threads.

Numba and llvmlite compile under locks that a child would wait for for ever, with LLVM in whatever state it was. So they
are held by the thread that forks, while it forks: it waits until nobody compiles. A thread that is itself in the middle
of compiling may fork, since they let it in again. Likewise the import of the backend, and what it imports later, ends
first.
"""

from __future__ import annotations

import importlib
import logging  # noqa: F401  # its lock is taken for a fork as well: after ours, since whom we wait for may need it
import os
import sys
import threading
from contextlib import ExitStack, suppress
from typing import Any

#: Modules that calls import.
IMPORTED = ("cupynorm.cpu", "numpy.polynomial")
#: Locks where they are to be found, if numba has been imported, by whomever: those that are taken first come first.
LOCKS = (("numba.core.compiler_lock", "global_compiler_lock"), ("llvmlite.binding.ffi", "lib._lock"))


class _Forking(threading.local):
    def __init__(self) -> None:
        self.held: list[ExitStack] = []


_forking = _Forking()


def _locks() -> list[Any]:
    """Those of LOCKS that there are: other versions of numba may have others."""
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
            with suppress(Exception):  # which are the importing thread's
                importlib.import_module(name)  # waits for another thread that is at it
    for lock in _locks():
        held.enter_context(lock)


def _after() -> None:
    if _forking.held:
        _forking.held.pop().close()


def prepare() -> None:
    """Have every fork of this process wait from now on. What registers last is called first."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
