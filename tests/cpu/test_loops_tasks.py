"""What calls the steps of the compiled loops: blocks as a whole, and the queue that threads take tasks from."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.loops import Cut, loops_tasks, python_step, run_step

from cupynorm.cpu.blocking import Arrays

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize(("runs", "length", "streams", "near", "nearest"), [
    (2, 50, 0, 2, True), (1, 2048, 0, 2, True), (1, 2049, 0, 1, True), (1, 2048, 1, 1, False),
    (1, 8192, 0, 1, True), (1, 8193, 0, 1, False), (1, 32768, 0, 1, False), (1, 32769, 0, 0, False),
])  # fmt: skip
@pytest.mark.parametrize("tiles", [1, 2])
def test_blocks_as_a_whole(runs: int, length: int, streams: int, near: int, nearest: bool, tiles: int) -> None:
    """One after the other: all tiles are summed, joined and computed.

    The sums hear whether results are so near that they may be fetched; the results, whether another plane follows, and
    how near it is.
    """
    did: list[Any] = []
    steps = {
        name: python_step(lambda _, *given, name=name: did.append((name, *given)))
        for name in ("reduce", "join", "apply")
    }
    cut = Cut(5, runs, length, (0, 0, 1), tile_length=-(-length // tiles))
    assert cut.tiles == tiles
    nothing = np.zeros(1, np.float32)
    addresses = {name: address for name, (address, _) in steps.items()}
    whole = loops_tasks.driver().whole_address
    run_step(whole, cut, Arrays(nothing, nothing), 2, 5, streams=streams, **addresses)
    expected: list[Any] = []
    for block in (2, 3, 4):
        items = block * tiles, (block + 1) * tiles
        expected += [("reduce", *items, int(nearest)), ("join", block, block + 1, 0)]
        expected += [("apply", *items, near * (block < 4))]
    assert did == expected


def run_tasks(queue: Any, worker: int, address: int) -> None:
    loops_tasks.driver().run(address, b"", queue.address, worker, queue.threads)


@pytest.mark.parametrize(
    ("count", "tasks", "threads"), [(1, 1, 1), (9, 9, 3), (100, 24, 3), (1000, 7, 5), (40, 40, 64)]
)
def test_each_item_goes_to_one_task(count: int, tasks: int, threads: int) -> None:
    """Whatever threads take part: parts of the items whose sizes differ by at most one."""
    for workers in (range(1), range(threads)):
        ranges: list[tuple[int, int]] = []
        address, _keep = python_step(lambda _, first, last, __, ranges=ranges: ranges.append((first, last)))
        queue = loops_tasks.TaskQueue(count, tasks, threads)
        with ThreadPoolExecutor(len(workers)) as pool:
            for done in [pool.submit(run_tasks, queue, worker, address) for worker in workers]:
                done.result()
        assert len(ranges) == tasks
        assert [i for first, last in sorted(ranges) for i in range(first, last)] == [*range(count)]
        sizes = [last - first for first, last in ranges]
        assert max(sizes) - min(sizes) <= 1
        assert queue.drain()


@pytest.mark.parametrize("worker", [0, 1, 2, 3])
def test_a_thread_begins_with_its_own_range(worker: int) -> None:
    """And goes on to those of the threads after it."""
    taken: list[int] = []
    address, _keep = python_step(lambda _, first, last, __: taken.extend(range(first, last)))
    run_tasks(loops_tasks.TaskQueue(20, 20, 4), worker, address)
    assert taken == [(worker * 5 + i) % 20 for i in range(20)]


def test_a_drained_queue_starts_no_further_task() -> None:
    """It tells whether all tasks that were started are known to have finished."""
    assert loops_tasks.TaskQueue(5, 5, 1).drain()  # none was
    queue, taken, drained = loops_tasks.TaskQueue(20, 20, 2), [], []

    def step(_: int, first: int, last: int, __: int) -> None:
        taken.append((first, last))
        if len(taken) == 3:
            drained.append(queue.drain())  # in the middle of a task

    address, _keep = python_step(step)
    run_tasks(queue, 1, address)
    assert drained == [False]
    assert taken == [(10, 11), (11, 12), (12, 13)]
    run_tasks(queue, 0, address)
    assert len(taken) == 3


def test_a_drain_does_not_wait_for_ever() -> None:
    """It spins for some microseconds, while a task runs that ends only later."""
    queue, begun, end = loops_tasks.TaskQueue(1, 1, 2), threading.Event(), threading.Event()

    def step(*_: int) -> None:
        begun.set()
        end.wait(20)

    address, _keep = python_step(step)
    other = threading.Thread(target=run_tasks, args=(queue, 0, address))
    other.start()
    try:
        assert begun.wait(20)
        assert not queue.drain()
    finally:
        end.set()
        other.join()
    assert queue.drain()
