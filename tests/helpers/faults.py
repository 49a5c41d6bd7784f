"""Faults at every point of a call: failing allocations, failing launches, interrupts and signals."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import cupynorm as cn
from bench.core import traces
from helpers.backends import Backend

PACKAGE = str(Path(cn.__file__).parent)
WITH = ("__enter__", "__exit__")  # of a lock: they cannot fail, and Python checks for no interrupt around them
NUMPY = str(Path(np.__file__).parent)


class LaunchError(RuntimeError):
    """Raised in place of a failed kernel launch."""


class Faults:
    """Count the points where a call may fail, and make number `fail` fail: from 1 on; 0 is none."""

    def __init__(self, fail: int) -> None:
        self.fail, self.count, self.launched = fail, 0, 0

    def due(self) -> bool:
        """Count one point; True if it must fail."""
        self.count += 1
        return self.count == self.fail


@contextmanager
def _watching(look: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def _of_package(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)


@contextmanager
def failures(backend: Backend, faults: Faults) -> Iterator[None]:
    """Raise MemoryError from C functions called by the package, or by NumPy's Python code for it; and fail launches.

    Nothing else allocates but operators between arrays, which run in C as well, between two of these points.
    """

    def look(frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or function.__name__ in WITH:
            return
        inside = frame.f_code.co_filename.startswith(NUMPY) and _of_package(frame.f_back)
        if (_of_package(frame) or inside) and faults.due():
            raise MemoryError("no memory left")

    def failing(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            if faults.due():
                raise error
            return function(*given, **named)

        return called

    with ExitStack() as stack:
        patch = stack.enter_context(backend._patch.context())
        runtime: Any = None
        if backend.name == "simt":
            from emulator.backend import runtime
        elif backend.name == "cupy":
            from cupynorm.cuda.backend import runtime
        if runtime is not None:
            prepare = runtime.prepare

            def launched(prepared: Callable[[], Any]) -> None:
                faults.launched += 1
                prepared()

            no_memory = MemoryError("no device memory left")
            patch.setattr(runtime, "memory", failing(runtime.memory, no_memory))
            for name in ("new", "new_zeros"):
                make = getattr(runtime, name)
                patch.setattr(runtime, name, lambda *given, make=make: partial(failing(make(*given), no_memory)))
            traces.forget()  # they have these functions
            stack.callback(traces.forget)
            error = LaunchError("the driver reports an error")
            patch.setattr(runtime, "prepare", lambda *given: partial(failing(launched, error), prepare(*given)))
        stack.enter_context(_watching(look))
        yield


@contextmanager
def handled(faults: Faults, handler: Callable[[], Any], *folders: str) -> Iterator[None]:
    """Call a handler where Python can run a signal handler in the package, or in files of other folders that it calls:
    when a function begins, and when a C function has returned."""

    def look(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_return" and function.__name__ in WITH:
            return
        if event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # it may be closing, which would lose an error
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith((PACKAGE, *folders)) and faults.due():
            handler()

    with _watching(look):
        yield


def interrupts(faults: Faults) -> Any:
    """Raise KeyboardInterrupt at a point where Python can raise it in the package."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    return handled(faults, interrupt)


@contextmanager
def ending(seconds: float = 60.0) -> Iterator[None]:
    """Raise TimeoutError if the block waits for a lock for ever, in the main thread."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
