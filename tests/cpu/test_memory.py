"""Memory of results that are gone: used again, never while anything refers to it, and only so much of it is kept."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_same

import cupynorm as cn
from cupynorm.cpu import result_pool

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty_and_as_it_was():
    gc.freeze()  # a collection of garbage need not look at what other tests have made
    before = cn.get_memory_limit()
    cn.set_memory_limit(0)
    cn.set_memory_limit(2**30)
    yield
    cn.set_memory_limit(0)
    cn.set_memory_limit(before)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def kept() -> list[int]:
    return [block.nbytes // MIB for block in result_pool._memory.free.values()]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)])
def test_a_gone_result_makes_room_for_the_next(dtype: Any):
    first = result_pool.empty((2, MIB), dtype)
    assert (first.shape, first.dtype, first.flags.writeable, first.flags.c_contiguous) == ((2, MIB), dtype, True, True)
    assert address(first) % 64 == 0
    where = address(first)
    del first
    again = result_pool.empty((MIB, 2), dtype)
    assert address(again) == where
    other = result_pool.empty((MIB, 2), dtype)
    assert not np.shares_memory(again, other)


@pytest.mark.parametrize("view", [
    lambda a: a[3:, ::2],
    lambda a: a.T,
    lambda a: a.reshape(-1)[5:6],
    lambda a: a.view(np.uint8),
    memoryview,
    lambda a: np.broadcast_to(a[0], (7, a.shape[1])),
    lambda a: np.lib.stride_tricks.as_strided(a, (5,), (4,)),
    lambda a: a.view(np.recarray),
    np.from_dlpack,
    lambda a: (lambda: a),
])  # fmt: skip
def test_whatever_refers_to_a_result_keeps_its_memory(view: Any):
    result = result_pool.empty((64, 8192), np.dtype(np.float32))
    where = address(result)
    holds = view(result)
    del result
    gc.collect()
    assert kept() == []
    assert address(result_pool.empty((64, 8192), np.dtype(np.float32))) != where
    del holds
    gc.collect()
    assert len(kept()) == 2  # the second one is gone as well


def test_earlier_results_do_not_change(rng: np.random.Generator):
    """A loop that keeps some of its results, or only parts of them."""
    inputs = [rng.standard_normal((2, 16, 96, 97), dtype=np.float32) for _ in range(12)]
    expected = [cn.instance_norm(x, out=np.empty_like(x)) for x in inputs]
    whole, parts = [], []
    for x in inputs:
        y, saved = cn.instance_norm_forward(x)
        cn.instance_norm_backward(y, saved)
        whole.append(cn.instance_norm(x))
        parts.append(y[:, 3:5, ::7])
    for y, part, right in zip(whole, parts, expected, strict=True):
        assert_same(y, right)
        assert_same(part, right[:, 3:5, ::7])


def test_limit():
    cn.set_memory_limit(10 * MIB)
    assert cn.get_memory_limit() == 10 * MIB
    results = [result_pool.empty((size * MIB // 4,), np.dtype(np.float32)) for size in (1, 2, 4, 5)]
    for i in range(4):
        results[i] = None
    assert kept() == [4, 5]  # the oldest were let go
    cn.set_memory_limit(6 * MIB)
    assert kept() == [5]
    cn.set_memory_limit(0)
    assert kept() == []
    assert result_pool.empty((MIB,), np.dtype(np.float32)).base is None
    del results


def test_a_piece_too_large_is_left_for_others():
    large, small = result_pool.empty((4 * MIB,), np.dtype(np.uint8)), result_pool.empty((2 * MIB,), np.dtype(np.uint8))
    places = address(large), address(small)
    del large, small
    assert address(result_pool.empty((2 * MIB - 1000,), np.dtype(np.uint8))) == places[1]
    assert address(result_pool.empty((3 * MIB,), np.dtype(np.uint8))) not in places
    assert result_pool.empty((result_pool.LEAST - 1,), np.dtype(np.uint8)).base is None


@pytest.mark.parametrize(("wrong", "error"), [(-1, ValueError), (1.5, TypeError), ("8", TypeError), (True, TypeError)])
def test_wrong_limits(wrong: Any, error: type[Exception]):
    with pytest.raises(error, match=r"memory limit must be (an integer|at least 0), got"):
        cn.set_memory_limit(wrong)
    assert cn.get_memory_limit() == 2**30


@pytest.mark.long
def test_limit_from_the_environment():
    def run(limit: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "import cupynorm; print(cupynorm.get_memory_limit())"],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
            env={**os.environ, "CUPYNORM_MEMORY_LIMIT": limit},
        )  # fmt: skip

    assert run("5000000").stdout == "5000000\n"
    assert run("").stdout == f"{2**30}\n"
    assert "CUPYNORM_MEMORY_LIMIT must be a number of bytes, got '-1'" in run("-1").stderr


def test_many_threads_at_once(rng: np.random.Generator):
    """Each marks what it has got, and finds its mark again."""

    def work(number: int) -> bool:
        own = np.random.default_rng(number)
        right = True
        for turn in range(100):
            a = result_pool.empty((int(own.integers(40_000, 90_000)),), np.dtype(np.float32))
            a[:] = number * 1000 + turn
            b = result_pool.empty((50_000,), np.dtype(np.float32))
            b[:] = -1
            right = right and bool((a == number * 1000 + turn).all())
        return right

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert not result_pool._memory.leased


@pytest.mark.parametrize("ends_in", ["take", "trim"])
def test_arrays_that_end_while_the_pieces_are_in_use(ends_in: str):
    """As in a collection of garbage within an allocation, or when pieces are let go."""
    results = [result_pool.empty((MIB,), np.dtype(np.float32)) for _ in range(4)]
    del results[0]
    looked = []

    class Watched(dict[int, Any]):
        def values(self) -> Any:
            found = list(super().values())
            if not looked:
                looked.append(True)
                del results[0]
            return found

    result_pool._memory.free = Watched(result_pool._memory.free)
    if ends_in == "take":
        results.append(result_pool.empty((MIB,), np.dtype(np.float32)))
    else:
        cn.set_memory_limit(5 * MIB)
        cn.set_memory_limit(2**30)
    assert looked
    assert kept() == [4]
    results.append(result_pool.empty((MIB,), np.dtype(np.float32)))
    results.append(result_pool.empty((MIB,), np.dtype(np.float32)))
    assert len({address(r) for r in results}) == len(results)
    for number, result in enumerate(results):
        result[:] = number
    assert [float(r.max()) for r in results] == list(range(len(results)))


CODE = """
import os, numpy as np, cupynorm as cn
cn.set_num_threads({threads})
x = np.ones((1, 4, 400, 401), np.float32)
y = cn.instance_norm(x)
cn.instance_norm(x)
{end}
"""


@pytest.mark.long
@pytest.mark.parametrize(("threads", "end"), [
    (2, ""),
    (2, "import atexit; atexit.register(lambda: cn.instance_norm(x)); keep = [y]; keep.append(keep)"),
    (2, "child = os.fork()\nif child == 0:\n    z = cn.instance_norm(x)\n    os._exit(0 if (z == y).all() else 3)\n"
    "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0"),
    # What the parent keeps is not used in the child. (Another thread may hold a result for a moment longer.)
    (1, "from cupynorm.cpu import result_pool\nassert result_pool._memory.free\n"
    "child = os.fork()\n"
    "if child == 0:\n    assert not result_pool._memory.free\n    del y\n"
    "    os._exit(0 if len(result_pool._memory.free) == 1 else 3)\n"
    "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0"),
], ids=["plain end", "call at exit", "fork", "memory after a fork"])  # fmt: skip
def test_ends_and_forks(threads: int, end: str):
    if "fork" in end and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", CODE.format(threads=threads, end=end)],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
