"""Forks while other threads compile, import or hold locks: the child can call, and a fork imports nothing."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from helpers.processes import run

from cupynorm.cpu import forks

#: What the child of a fork does, while another thread of the parent is within `busy`.
FORK = """
import os, signal, sys, threading, time
import numpy as np, cupynorm as cn
assert "logging" not in sys.modules  # which takes its lock for a fork, too
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
{setup}
import logging
begun = threading.Event()
def busy():
{busy}
other = threading.Thread(target=busy)
other.start()
begun.wait()
child = os.fork()
if not child:
    signal.alarm(20)
{child}
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
other.join()
busy()  # the parent goes on
print(status)
"""

#: Locks that are held while loops are compiled, and what takes them.
COMPILING = {
    "ours": ("from cupynorm.cpu.llvm_machine import lock", "lock"),
    "llvmlite's": ("from llvmlite.binding import ffi; lock = ffi.lib._lock", "lock"),
    "both": ("from cupynorm.cpu.llvm_machine import lock; from llvmlite.binding import ffi", "lock, ffi.lib._lock"),
}


@pytest.mark.long
@pytest.mark.compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("locks", COMPILING)
def test_a_fork_while_another_thread_compiles(locks: str, tmp_path: Path) -> None:
    setup, held = COMPILING[locks]
    # It asks a logger, for which a fork holds a lock, too.
    busy = f"    with {held}:\n        begun.set(); time.sleep(0.5); logging.getLogger('mine').debug('')"
    child = "    assert abs(cn.instance_norm(x).std() - 1) < 1e-3 and cpu.compiled"
    ran = run(
        FORK.format(setup=f"from cupynorm import cpu\n{setup}", busy=busy, child=child),
        CUPYNORM_CACHE_DIR=str(tmp_path), CUPYNORM_COMPILED="1",
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("0\n", "")
    assert [*tmp_path.iterdir()]


@pytest.mark.long
@pytest.mark.compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_in_the_middle_of_compiling() -> None:
    """By the thread that compiles: it waits for nobody."""
    code = """
import os, signal
from llvmlite.binding import ffi
from cupynorm.cpu.llvm_machine import lock
import cupynorm, threading
with lock, ffi.lib._lock:
    child = os.fork()
    if not child:
        signal.alarm(20)
        with lock, ffi.lib._lock:
            os._exit(0)
def take():
    with lock, ffi.lib._lock:
        pass
thread = threading.Thread(target=take)
thread.start()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ran = run(code)
    assert (ran.stdout, ran.stderr) == ("0\n", "")


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_imports_the_backend() -> None:
    setup = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "llvmlite":
            begun.set()
            time.sleep(0.5)
            logging.getLogger("mine").debug("")
            raise ImportError("is not installed")
sys.meta_path.insert(0, Finder())
"""
    call = "    assert abs(cn.instance_norm(x).std() - 1) < 1e-3"
    ran = run(FORK.format(setup=setup, busy=call, child=call), CUPYNORM_COMPILED="1")
    assert (ran.stdout, ran.stderr) == ("0\n", "")


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_imports_nothing() -> None:
    code = """
import os, sys
import cupynorm
before = {*sys.modules}
child = os.fork()
if child == 0:
    os._exit({*sys.modules} > before)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sorted({*sys.modules} - before))
"""
    ran = run(code)
    assert (ran.stdout, ran.stderr) == ("0 []\n", "")


def test_forks_hold_only_existing_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what has been imported, and of llvmlite what this version has."""
    from types import SimpleNamespace

    for module, _ in forks.LOCKS:
        monkeypatch.setitem(sys.modules, module, None)
    assert forks._locks() == []
    lock = threading.RLock()
    monkeypatch.setitem(sys.modules, "cupynorm.cpu.llvm_machine", SimpleNamespace(lock=lock))
    assert forks._locks() == [lock]
    monkeypatch.setitem(sys.modules, "llvmlite.binding.ffi", SimpleNamespace(lib=SimpleNamespace(_lock=object())))
    assert forks._locks() == [lock]
    other = threading.RLock()
    monkeypatch.setitem(sys.modules, "llvmlite.binding.ffi", SimpleNamespace(lib=SimpleNamespace(_lock=other)))
    assert forks._locks() == [lock, other]
