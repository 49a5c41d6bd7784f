"""Compiled loops that call others: blocks as a whole, a queue of tasks, and boxes of planes that are copied together.

The loops share tasks without Python. In a queue, numbers[STARTED] counts the tasks that threads have taken,
numbers[FINISHED] those that are done, each in a cache line of its own, since threads write them at the same time. Each
thread begins with a range of its own, counted in a line of its own, and goes on to those of others: so a core tends to
get the items of the last call, which its caches still hold.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numpy as np

from . import llvm_machine
from .llvm import INT, MEMORY, Code, Memory, Module, Value, least, where
from .loops_moves import go_through
from .loops_places import Numbers

STARTED, TASKS, COUNT, FINISHED, RANGES = 0, 1, 2, 8, 16
SPIN_LIMIT = 20_000  # looks at a counter, some 100 microseconds
NEAR = 32768  # elements; planes up to this are prefetched while the previous one is written: both fit the L2 cache
NEXT = 2048  # the next one of planes up to this comes into the L1 cache, unless all of them leave the caches
NEAREST = 8192  # the lines of results up to this are prefetched while x is summed


class TaskQueue:
    """A queue of `tasks` tasks, which are parts of `count` items numbered from 0, for `threads` threads."""

    def __init__(self, count: int, tasks: int, threads: int):
        self.numbers = np.zeros(RANGES + 8 * threads, np.int64)
        self.numbers[TASKS], self.numbers[COUNT] = tasks, count
        self.threads = threads
        self.address = self.numbers.ctypes.data

    def drain(self) -> bool:
        return bool(driver().drain(self.address))


def _next_task(module: Module) -> Any:
    """Write a function that starts a task: it returns the task's number, or -1 if none is left."""
    with module.function("next_task", MEMORY, INT, INT, returns=INT) as (code, queue, worker, threads):
        numbers = queue.of(INT)
        tasks = numbers.load(TASKS)
        task, own = code.variable(code.integer(-1)), code.variable(worker)
        with code.when(numbers.atomic("add", STARTED, 1) < tasks), code.forever():
            # The counter guarantees that a task remains.
            mine = own.get() % threads
            found = tasks * mine // threads + numbers.atomic("add", mine * 8 + RANGES, 1)
            own.set(mine + 1)
            inside = found < tasks * (mine + 1) // threads
            task.set(where(inside, found, task.get()))
            code.leave_if(inside)
        code.builder.ret(task.get().value)
        return code.function


def _each_task(next_task: Any, code: Code, queue: Memory, worker: Value, threads: Value, work: Any) -> None:
    """Take tasks until none is left; work(first, last) gets the items of each."""
    numbers = queue.of(INT)
    tasks, count = numbers.load(TASKS), numbers.load(COUNT)
    with code.forever():
        task = code.call(next_task, queue, worker, threads)
        code.leave_if(task < 0)
        work(count * task // tasks, count * (task + 1) // tasks)
        numbers.atomic("add", FINISHED, 1)


def _whole(module: Module) -> None:
    """Write the step that does the steps reduce, join and apply on one block after the other."""
    with module.function("whole", MEMORY, INT, INT, INT, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, None)
        tiles = numbers.tiles
        with code.loop(first, last) as block:
            begin = block * tiles
            size, stays = numbers.runs * numbers.length, numbers.streams == 0
            fetches = (size <= NEAREST) & stays
            follows = where((size <= NEAR) & (block + 1 < last), where((size <= NEXT) & stays, 2, code.integer(1)), 0)
            code.call(numbers.reduce, call, begin, begin + tiles, fetches.to(INT))
            code.call(numbers.join, call, block, block + 1, 0)
            code.call(numbers.apply, call, begin, begin + tiles, follows)


def _run(module: Module, next_task: Any) -> None:
    """Write a function that a thread calls: it does tasks of a step until none is left."""
    kinds = INT, MEMORY, MEMORY, INT, INT
    with module.function("run", *kinds, exported=True) as (code, step, call, queue, worker, threads):
        _each_task(next_task, code, queue, worker, threads, lambda a, b: code.call(step, call, a, b, 0))


def _drain(module: Module) -> None:
    """Write a function that closes a queue and spins briefly: 1 if all started tasks finished."""
    with module.function("drain", MEMORY, returns=INT, exported=True) as (code, queue):
        numbers = queue.of(INT)
        tasks = numbers.load(TASKS)
        started = least(numbers.atomic("xchg", STARTED, tasks), tasks)
        finished = code.variable(code.integer(0))
        with code.loop(0, SPIN_LIMIT):
            finished.set(numbers.atomic("add", FINISHED, 0))
            code.leave_if(finished.get() >= started)
        code.builder.ret((finished.get() >= started).to(INT).value)


def _write(module: Module) -> None:
    next_task = _next_task(module)
    _whole(module)
    _run(module, next_task)
    _drain(module)
    go_through(module, partial(_each_task, next_task))


class Driver:
    """The compiled functions that every call may use, compiled at the first one."""

    def __init__(self) -> None:
        names = "whole", "run", "drain", "go_through"
        self.whole_address, run, drain, through = llvm_machine.compiled("driver", _write, names)
        number, address = ctypes.c_int64, ctypes.c_void_p
        self.run = ctypes.CFUNCTYPE(None, number, ctypes.c_char_p, address, number, number)(run)
        self.drain = ctypes.CFUNCTYPE(number, address)(drain)
        self.go_through = ctypes.CFUNCTYPE(
            None, number, ctypes.c_char_p, address, number, number, address, *[number] * 5
        )(through)  # fmt: skip


_drivers: list[Driver] = []


def driver() -> Driver:
    if not _drivers:
        _drivers.append(Driver())
    return _drivers[0]
