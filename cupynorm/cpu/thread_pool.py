"""The CPU backend's thread pool: it shares a call's tasks among threads.

The caller always works too, and never waits for a helper that has not started, so any number of Python threads may
share the pool. Helper threads start at first need, a forked child starts its own, and all end at exit.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

_library: Any = None
with suppress(Exception):  # the C library lacks these functions
    _found = ctypes.PyDLL(None)
    if _found.fegetenv and _found.fesetenv:
        _library = _found


def _mode() -> Any:
    """Return this thread's floating-point mode: flush-to-zero and rounding."""
    if _library is None:
        return None
    mode = ctypes.create_string_buffer(256)  # more than any fenv_t
    _library.fegetenv(mode)
    return mode


def _set_mode(mode: Any) -> None:
    if mode is not None:
        _library.fesetenv(mode)


class _Job:
    """The tasks of one call. Each thread calls work(iterator over its tasks, its own number)."""

    def __init__(self, work: Callable[[Iterator[int], int], None], tasks: int, drain: Callable[[], bool] | None):
        self.work = work
        self.drain = drain
        self.mode = _mode()  # the caller's: helpers compute in it too, so results do not depend on the thread
        self.tasks = deque(range(tasks))
        self.lock = threading.Lock()  # one per call: calls in a signal handler, during this one, have their own
        self.active = 0  # helpers at work
        self.closed = False  # no further task starts
        self.drained = False  # and none is running
        self.finished = threading.Lock()  # released when closed and the last helper has finished
        self.finished.acquire()
        self.failure: BaseException | None = None

    def _next(self, worker: int) -> Iterator[int]:
        # The caller takes tasks from one end, helpers from the other: a core's caches hold recent data.
        take = self.tasks.pop if worker else self.tasks.popleft
        while True:
            with self.lock:
                task = None if self.closed or not self.tasks else take()
            if task is None:
                return
            yield task

    def help(self, worker: int) -> None:
        with self.lock:
            if self.closed:
                return
            self.active += 1
        own = _mode()
        try:
            _set_mode(self.mode)
            self.work(self._next(worker), worker)
        except BaseException as failure:
            self.failure = failure
            self.closed = True
        finally:
            _set_mode(own)
            with self.lock:
                self.active -= 1
                if self.closed and not self.active:
                    self.finished.release()

    def lead(self, offer: Callable[[], None]) -> None:
        """Offer the job to the helpers, and work on it too."""
        try:
            try:
                offer()
                self.work(self._next(0), 0)
            finally:
                self._close()
        finally:
            self._close()  # again: KeyboardInterrupt may arrive before the first call takes effect
        if self.failure is not None:
            raise self.failure

    def _close(self) -> None:
        """Wait for the helpers despite interrupts: none may write to the arrays after the call has returned."""
        interrupt: BaseException | None = None
        while not self.drained:
            try:
                self.closed = True
                if self.drain is None or not self.drain():
                    with self.lock:
                        idle = not self.active
                    if not idle:
                        self.finished.acquire()
                self.drained = True
            except KeyboardInterrupt as pressed:
                interrupt = pressed
        if interrupt is not None:
            raise interrupt


class _Pool:
    """Helper threads that wait for jobs."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.helpers: list[threading.Thread] = []
        self.starting: dict[str, object] = {}  # under "who": the call that is starting helpers
        self.ended = False

    def _serve(self, worker: int) -> None:
        while (job := self.jobs.get()) is not None:
            job.help(worker)
            del job  # it holds references to the call's arrays

    def run(self, job: _Job, helpers: int) -> None:
        if len(self.helpers) < helpers:
            self._start(helpers)

        def offer() -> None:
            for _ in range(min(helpers, len(self.helpers))):
                self.jobs.put(job)

        job.lead(offer)

    def _start(self, number: int) -> None:
        """Start helpers, unless another call is starting some: in another thread, or interrupted by a signal handler.

        This never waits, as a handler would wait forever; the call does without the missing helpers.
        """
        me = object()
        try:
            while self.starting.setdefault("who", me) is me and len(self.helpers) < number and not self.ended:
                worker = len(self.helpers) + 1
                thread = threading.Thread(target=self._serve, args=(worker,), name="cupynorm", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is exiting: the caller does all tasks
                    break
                self.helpers.append(thread)
                if self.ended:  # in the meantime
                    self.jobs.put(None)
        finally:
            if self.starting.get("who") is me:
                del self.starting["who"]

    def end(self) -> None:
        self.ended = True
        helpers = list(self.helpers)
        for _ in helpers:
            self.jobs.put(None)
        for thread in helpers:
            thread.join()
        self.helpers.clear()


class _State:
    pool = _Pool()


_state = _State()


def share(
    work: Callable[[Iterator[int], int], None], tasks: int, threads: int, drain: Callable[[], bool] | None = None
) -> None:
    """Call work(iterator, worker) in up to `threads` threads, with the tasks 0, 1, … divided among the iterators.

    worker is 0 for the caller; a helper has the same number in every call. An exception in any thread stops the
    distribution of tasks and is raised here once all threads have finished. If work distributes its tasks itself,
    drain() closes that queue and returns True if all started tasks have finished: then there is no need to wait for
    helpers that are about to return.
    """
    if threads > 1 and tasks > 1:
        _state.pool.run(_Job(work, tasks, drain), min(threads, tasks) - 1)
    else:
        work(iter(range(tasks)), 0)


def _after_fork() -> None:
    _state.pool = _Pool()  # the child has none of the parent's helpers, and its locks may be held


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    _state.pool.end()
