"""A queue of tasks that compiled loops share without Python.

numbers[STARTED] counts the parts that threads have taken, numbers[FINISHED] those that are done, each in a cache line
of its own, since threads write them at the same time. Each thread begins with a range of its own, counted in a line of
its own, and goes on to those of others: what a core's caches hold from the last call, it need not fetch from another
core's. A thread's queue is these numbers and its own number.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from .numba_cache import INTERNAL, disk_cached

STARTED, PARTS, COUNT, FIRST, FINISHED, RANGES = 0, 1, 2, 3, 8, 16
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
        self.numbers[PARTS], self.numbers[COUNT] = tasks, count

    def drain(self):
        return bool(drain(self.numbers))


@numba.njit(**INTERNAL)
def next_tasks(queue):
    """Start a task: return the range (first, last) of its items, excluding last; an empty one if no task is left."""
    numbers, worker = queue
    parts, count, first, ranges = numbers[PARTS], numbers[COUNT], numbers[FIRST], (len(numbers) - RANGES) // 8
    if _add_to(numbers, STARTED, 1) >= parts:
        return first, first
    while True:  # the counter guarantees that a task remains
        worker %= ranges
        part = parts * worker // ranges + _add_to(numbers, RANGES + 8 * worker, 1)
        worker += 1
        if part < parts * worker // ranges:
            return first + count * part // parts, first + count * (part + 1) // parts


@numba.njit(**INTERNAL)
def task_done(queue):
    """Count a task as finished and start the next."""
    _add_to(queue[0], FINISHED, 1)
    return next_tasks(queue)


@disk_cached
def drain(numbers):
    """Close the queue and spin briefly; True if all started tasks finished."""
    started = min(_exchange(numbers, STARTED, numbers[PARTS]), numbers[PARTS])
    spins = 0
    while _add_to(numbers, FINISHED, 0) < started and spins < SPIN_LIMIT:
        spins += 1
    return spins < SPIN_LIMIT
