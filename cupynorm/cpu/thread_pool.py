"""The CPU backend's thread pool: it shares a call's tasks among threads.

The caller always works too, and never waits for a helper that has not started, so any number of Python threads may
share the pool. Helper threads start at first need, a forked child starts its own, and all end at exit.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol

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


class Queue(Protocol):
    """What threads take the tasks of a call from: `TaskQueue`, or loops_tasks.TaskQueue for compiled loops."""

    def drain(self) -> bool:
        """Let no further task start; True if all started tasks are known to have finished."""


class TaskQueue:
    """The tasks 0 … count - 1 of a call, for threads that run Python."""

    def __init__(self, count: int):
        self._tasks = deque(range(count))

    def tasks(self, worker: int) -> Iterator[int]:
        """Take tasks until none is left. The caller (0) takes them from one end, helpers from the other: a core's
        caches hold recent data."""
        take = self._tasks.pop if worker else self._tasks.popleft
        while True:
            try:
                task = take()
            except IndexError:
                return
            yield task

    def drain(self) -> bool:
        self._tasks.clear()
        return False


class _Job:
    """A call whose threads run work(the number of the thread) on the tasks of its queue."""

    def __init__(self, work: Callable[[int], None], queue: Queue):
        self.work = work
        self.queue = queue
        self.mode = _mode()  # the caller's: helpers compute in it too, so results do not depend on the thread
        self.lock = threading.Lock()  # one per call: calls in a signal handler, during this one, have their own
        self.active = 0  # helpers at work
        self.closed = False  # no further helper starts
        self.drained = False  # and none is at work
        self.finished = threading.Lock()  # released when closed and the last helper has finished
        self.finished.acquire()
        self.failure: BaseException | None = None

    def help(self, worker: int) -> None:
        with self.lock:
            if self.closed:
                return
            self.active += 1
        own = _mode()
        try:
            _set_mode(self.mode)
            self.work(worker)
        except BaseException as failure:
            self.failure = failure
            self.closed = True
            self.queue.drain()
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
                self.work(0)
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
                if not self.queue.drain():
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
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
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


def share(work: Callable[[int], None], queue: Queue, threads: int) -> None:
    """Call work(worker) in up to `threads` threads, each of which takes tasks from the queue until none is left.

    worker is 0 for the caller; a helper has the same number in every call. An exception in any thread drains the queue,
    and is raised here once all threads have finished. If the drained queue knows that all started tasks have finished,
    there is no need to wait for helpers that are about to return.
    """
    if threads > 1:
        _state.pool.run(_Job(work, queue), threads - 1)
    else:
        work(0)


def _after_fork() -> None:
    _state.pool = _Pool()  # the child has none of the parent's helpers, and its locks may be held


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    _state.pool.end()
