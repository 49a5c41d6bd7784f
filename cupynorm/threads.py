"""Threads of the CPU backend: their number, and a pool that runs the tasks of a call.

The caller always works too, and never waits for a helper that has not started, so any number of Python threads may
share the pool. Helper threads start at first need, a forked child starts its own, and all end at exit.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .functional import check_count


def available_cpus() -> int:
    """Count the processors this process may use: its affinity, limited by the container's quota, rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas())]))


def _quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Yield the limits, in processors, of this process's control group and its parents (version 2 or 1)."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        here = top / path.strip("/")
        for folder in (here, *here.parents):
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max" and int(quota) > 0:
                    yield int(quota) / int(period)
            except (OSError, ValueError):
                pass  # the root has no limit; a container may not see the groups around it
            if folder == top:
                break


def get_num_threads() -> int:
    """Return how many threads a call on NumPy arrays may use now, the caller's included: see `set_num_threads`."""
    if _state.number is not None:
        return _state.number
    if _state.default is None:
        _state.default = _default()
    return min(_state.default, *limits) if (limits := _limits()) else _state.default


def set_num_threads(number: int) -> None:
    """Set how many threads a call on NumPy arrays may use, the caller's included. Small calls use fewer.

    The default is the minimum of these, where they exist:

    - CUPYNORM_NUM_THREADS from the environment, or else the processors this process may use (affinity and container
      limits);
    - OMP_NUM_THREADS (the first number of a list) and OMP_THREAD_LIMIT from the environment, which joblib and dask set
      for their workers; values other than positive integers are ignored;
    - if threadpoolctl has been imported, the current limits of BLAS and OpenMP libraries (`threadpool_limits`);
    - in workers of a PyTorch DataLoader, `torch.get_num_threads()`, which is 1 there by default.

    The environment is read at first use. Results are bitwise independent of the number.

    Args:
        number: at least 1.

    Raises:
        TypeError: not an integer. ValueError: less than 1. The number is unchanged then.
    """
    _state.number = check_count(number, "number of threads", 1)


def _default() -> int:
    """Return the number of threads from the environment and the system."""
    text = os.environ.get("CUPYNORM_NUM_THREADS", "").strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"CUPYNORM_NUM_THREADS must be a positive integer, got {text!r}")
    numbers = [int(text) if text else available_cpus()]
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        first = os.environ.get(name, "").partition(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            numbers.append(int(first))
    return min(numbers)


def _limits() -> list[int]:
    """Return the thread limits set through other imported libraries."""
    found: list[int] = []
    threadpoolctl, data = sys.modules.get("threadpoolctl"), sys.modules.get("torch.utils.data")
    try:  # other modules may have these names
        if threadpoolctl is not None:
            if _state.controller is None:  # a controller takes longer to create than to query
                _state.controller = threadpoolctl.ThreadpoolController()
            found += [number for library in _state.controller.lib_controllers if (number := library.num_threads)]
        if data is not None and data.get_worker_info() is not None:
            found.append(sys.modules["torch"].get_num_threads())
    except Exception:
        pass
    return found


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
    number: int | None = None  # of threads, set by the user
    default: int | None = None  # from the environment; None: not read yet
    controller: Any = None  # threadpoolctl's
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
    _state.default = None  # worker processes may have another environment


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    _state.pool.end()
