"""Threads for the CPU backend: how many there may be, and a pool that shares a call's tasks among them.

The caller always works too, and never waits for a helper that has not begun: any number of Python threads may share
the pool. Helpers start when they are first needed, a forked child starts its own, and at exit all are ended.
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
    """The processors this process may use: its affinity, and a container's quota rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas())]))


def _quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Limits in processors from this process's control group and those it lies in, of version 2 or 1."""
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
                pass  # the root has no limit; a container may not see what it lies in
            if folder == top:
                break


def get_num_threads() -> int:
    """How many threads a call on NumPy arrays may use at this moment, its own among them: see `set_num_threads`."""
    if _state.number is not None:
        return _state.number
    if _state.default is None:
        _state.default = _default()
    return min(_state.default, *limits) if (limits := _limits()) else _state.default


def set_num_threads(number: int) -> None:
    """Set how many threads a call on NumPy arrays may use, its own among them; it uses fewer where they do not pay.

    Where it is not set, it is the least of these, as far as there are such:

    - CUPYNORM_NUM_THREADS from the environment, or else the processors this process may use (affinity and container
      limits);
    - OMP_NUM_THREADS (the first number of a list) and OMP_THREAD_LIMIT from the environment, which joblib and dask set
      for their workers; anything but positive integers is ignored there;
    - once threadpoolctl has been imported, what it says BLAS and OpenMP libraries may use now: `threadpool_limits`;
    - in workers of a PyTorch DataLoader, `torch.get_num_threads()`, which is 1 there by default.

    The environment is asked at first use. Results do not depend on the number, bit by bit.

    Args:
        number: at least 1.

    Raises:
        TypeError: not an integer. ValueError: less than 1. The number stays as it was then.
    """
    _state.number = check_count(number, "number of threads", 1)


def _default() -> int:
    """What the environment and the system say."""
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
    """What libraries say that this process has imported, and which limit threads."""
    found: list[int] = []
    threadpoolctl, data = sys.modules.get("threadpoolctl"), sys.modules.get("torch.utils.data")
    try:  # whatever goes by these names
        if threadpoolctl is not None:
            if _state.controller is None:  # to make one takes longer than to ask it
                _state.controller = threadpoolctl.ThreadpoolController()
            found += [number for library in _state.controller.lib_controllers if (number := library.num_threads)]
        if data is not None and data.get_worker_info() is not None:
            found.append(sys.modules["torch"].get_num_threads())
    except Exception:
        pass
    return found


_library: Any = None
with suppress(Exception):  # a C library without these
    _found = ctypes.PyDLL(None)
    if _found.fegetenv and _found.fesetenv:
        _library = _found


def _mode() -> Any:
    """This thread's floating-point mode: whether it flushes denormals to zero, and how it rounds."""
    if _library is None:
        return None
    mode = ctypes.create_string_buffer(256)  # more than any fenv_t
    _library.fegetenv(mode)
    return mode


def _set_mode(mode: Any) -> None:
    if mode is not None:
        _library.fesetenv(mode)


class _Job:
    """One call's tasks. Whoever takes part calls work with an iterator that hands each task to one, and who it is."""

    def __init__(self, work: Callable[[Iterator[int], int], None], tasks: int, drain: Callable[[], bool] | None):
        self.work = work
        self.drain = drain
        self.mode = _mode()  # the caller's, which helpers compute in: results do not depend on who does what
        self.tasks = deque(range(tasks))
        self.lock = threading.Lock()  # this call's own: a handler's calls, in the middle of it, have others
        self.active = 0  # helpers at work
        self.closed = False  # nobody begins any more
        self.drained = False  # and nobody is at work
        self.finished = threading.Lock()  # held until the last helper has ended after closing
        self.finished.acquire()
        self.failure: BaseException | None = None

    def _next(self, worker: int) -> Iterator[int]:
        # The caller's from one end, helpers' from the other: a core's caches have what it worked on in the last call.
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
        """offer the job to helpers, and take part."""
        try:
            try:
                offer()
                self.work(self._next(0), 0)
            finally:
                self._close()
        finally:
            self._close()  # again: an interrupt may come at the door of the first
        if self.failure is not None:
            raise self.failure

    def _close(self) -> None:
        """Wait for the helpers, whatever interrupts: nobody may be writing into the call's arrays when it ends."""
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
        self.starting: dict[str, object] = {}  # who starts helpers, under "who"
        self.ended = False

    def _serve(self, worker: int) -> None:
        while (job := self.jobs.get()) is not None:
            job.help(worker)
            del job  # it refers to the arrays of a call

    def run(self, job: _Job, helpers: int) -> None:
        if len(self.helpers) < helpers:
            self._start(helpers)

        def offer() -> None:
            for _ in range(min(helpers, len(self.helpers))):
                self.jobs.put(job)

        job.lead(offer)

    def _start(self, number: int) -> None:
        """Start helpers, unless somebody is at it: another thread, or what a signal handler has come in the middle of.

        Nobody waits, for then the handler would for ever; the call does without those that are not there yet.
        """
        me = object()
        try:
            while self.starting.setdefault("who", me) is me and len(self.helpers) < number and not self.ended:
                worker = len(self.helpers) + 1
                thread = threading.Thread(target=self._serve, args=(worker,), name="cupynorm", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is ending: the caller does it all
                    break
                self.helpers.append(thread)
                if self.ended:  # while it was started
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
    number: int | None = None  # of threads, as set
    default: int | None = None  # from the environment; None: not asked yet
    controller: Any = None  # threadpoolctl's
    pool = _Pool()


_state = _State()


def share(
    work: Callable[[Iterator[int], int], None], tasks: int, threads: int, drain: Callable[[], bool] | None = None
) -> None:
    """Have work(iterator, who) called by up to `threads` threads until its iterator has handed out all tasks 0, 1, ….

    Each call of work has an iterator of its own and gets what the others leave; who is 0 for the caller, and the number
    of a helper, which it keeps from call to call. An exception in any of them ends the handing out and is raised here,
    once none of them is at work any more. Where work shares out its tasks by itself, settled() sees to it that no
    further one is begun and says whether all that were begun are done: True saves waiting for helpers that are on their
    way back.
    """
    if threads > 1 and tasks > 1:
        _state.pool.run(_Job(work, tasks, drain), min(threads, tasks) - 1)
    else:
        work(iter(range(tasks)), 0)


def _after_fork() -> None:
    _state.pool = _Pool()  # the parent's helpers are not here, and its locks may be held
    _state.default = None  # workers may have an environment of their own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    _state.pool.end()
