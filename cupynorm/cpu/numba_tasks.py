"""A queue of tasks that compiled loops share without Python.

numbers[STARTED] counts the tasks that threads have taken, numbers[FINISHED] those that are done, each in a cache line
of its own, since threads write them at the same time. Each thread begins with a range of its own, counted in a line of
its own, and goes on to those of others: so a core tends to get the items of the last call, which its caches still hold.
A thread's queue is these numbers and the thread's own number.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from .numba_cache import INTERNAL, disk_cached

STARTED, TASKS, COUNT, FIRST, FINISHED, RANGES = 0, 1, 2, 3, 8, 16
SPIN_LIMIT = 20_000  # reads of a counter, about 20 microseconds


def _atomic(operation):
    """Make a compiled atomic function (numbers, index, value) that returns the old number."""

    @intrinsic
    def atomic(typingctx, numbers, index, value):
        def generate(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            return builder.atomic_rmw(operation, builder.gep(array.data, [args[1]]), args[2], "seq_cst")

        return types.int64(numbers, types.int64, types.int64), generate

    return atomic


_add_to, _exchange = _atomic("add"), _atomic("xchg")


class TaskQueue:
    """A queue of `tasks` tasks, which are parts of `count` items numbered from 0, for `threads` threads."""

    def __init__(self, count, tasks, threads):
        self.numbers = np.zeros(RANGES + 8 * threads, np.int64)
        self.numbers[TASKS], self.numbers[COUNT] = tasks, count

    def drain(self):
        return bool(drain(self.numbers))


@numba.njit(**INTERNAL)
def next_tasks(queue):
    """Start a task: return the range (first, last) of its items, excluding last; an empty one if no task is left."""
    numbers, worker = queue
    tasks, count, first, ranges = numbers[TASKS], numbers[COUNT], numbers[FIRST], (len(numbers) - RANGES) // 8
    if _add_to(numbers, STARTED, 1) >= tasks:
        return first, first
    while True:  # the counter guarantees that a task remains
        worker %= ranges
        task = tasks * worker // ranges + _add_to(numbers, RANGES + 8 * worker, 1)
        worker += 1
        if task < tasks * worker // ranges:
            return first + count * task // tasks, first + count * (task + 1) // tasks


@numba.njit(**INTERNAL)
def task_done(queue):
    """Count a task as finished and start the next."""
    _add_to(queue[0], FINISHED, 1)
    return next_tasks(queue)


@disk_cached
def drain(numbers):
    """Close the queue and spin briefly; True if all started tasks finished."""
    started = min(_exchange(numbers, STARTED, numbers[TASKS]), numbers[TASKS])
    spins = 0
    while _add_to(numbers, FINISHED, 0) < started and spins < SPIN_LIMIT:
        spins += 1
    return spins < SPIN_LIMIT
