"""The CPU backend's threads: helpers, errors, forks and exits, Python threads; how many there are."""

from __future__ import annotations

import os
import platform
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import Backend, on_cpu
from helpers.compare import Bits, assert_same
from helpers.loops import loops_tasks
from helpers.processes import run

import cupynorm as cn
from cupynorm import config, cpu_count
from cupynorm.cpu import numpy_path, thread_pool

pytestmark = [pytest.mark.usefixtures("threads_as_they_were"), on_cpu, pytest.mark.long]
ROOT = Path(__file__).parents[2]
LARGE = (4, 64, 128, 129)


def ready(rng: np.random.Generator) -> tuple[np.ndarray, Bits]:
    x = rng.standard_normal(LARGE, dtype=np.float32)
    cn.set_num_threads(1)
    expected = Bits(cn.instance_norm(x))
    cn.set_num_threads(4)
    return x, expected


def test_helpers_take_part(way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    x, expected = ready(rng)
    seen = set()
    kind, name = (loops_tasks.driver(), "run") if way == "compiled" else (numpy_path.NumpyWork, "work")
    work = getattr(kind, name)

    def watched(*given: Any) -> None:
        seen.add(threading.get_ident())
        both.wait(10)
        work(*given)

    both = threading.Barrier(4)
    monkeypatch.setattr(kind, name, watched)
    assert Bits(cn.instance_norm(x)) == expected
    assert len(seen) == 4
    assert {t.name for t in threading.enumerate() if t.ident in seen} <= {"cupynorm", "MainThread"}


def test_many_python_threads_at_once(way: str, rng: np.random.Generator):
    x, expected = ready(rng)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: Bits(cn.instance_norm(x)) == expected, range(32)))
    assert all(results)


def taken(tasks: int, number: int) -> list[int]:
    done: list[int] = []
    queue = thread_pool.TaskQueue(tasks)
    thread_pool.share(lambda worker: done.extend(queue.tasks(worker)), queue, number)
    return sorted(done)


def test_an_error_in_a_helper_is_raised_once_all_have_ended():
    running, most = [0], [0]
    both = threading.Barrier(2)
    queue = thread_pool.TaskQueue(10**6)

    def work(worker: int) -> None:
        running[0] += 1
        both.wait(10)
        try:
            for _ in queue.tasks(worker):
                if threading.current_thread() is not threading.main_thread():
                    raise MemoryError("of a helper")
        finally:
            most[0] = max(most[0], running[0])
            running[0] -= 1

    with pytest.raises(MemoryError, match="of a helper"):
        thread_pool.share(work, queue, 2)
    assert (running, most) == ([0], [2])
    assert taken(100, 2) == list(range(100))  # the pool goes on


def test_the_caller_has_number_0_and_each_helper_its_own():
    """The number chooses a thread's scratch memory."""
    numbers: dict[int, int] = {}
    all_three = threading.Barrier(3)

    def work(worker: int) -> None:
        all_three.wait(10)
        numbers[threading.get_ident()] = worker

    thread_pool.share(work, thread_pool.TaskQueue(1), 3)
    assert numbers.pop(threading.get_ident()) == 0
    assert len(numbers) == len({0, *numbers.values()}) - 1 == 2


def test_each_task_goes_to_one_thread():
    for _ in range(50):
        assert taken(200, 5) == list(range(200))


USE = """
import numpy as np, cupynorm as cn, os, sys, threading
from cupynorm import cpu
cpu.compiled = cpu.compiled and WAY == "compiled"
cn.set_num_threads(4)
x = np.random.default_rng(1).standard_normal((4, 64, 128, 129), dtype=np.float32)
y = cn.instance_norm(x)
"""

ENDINGS = {
    "fork": """
assert threading.active_count() > 1
child = os.fork()
if child == 0:
    os._exit(0 if cn.instance_norm(x).tobytes() == y.tobytes() and threading.active_count() > 1 else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert cn.instance_norm(x).tobytes() == y.tobytes()
""",
    "fork while others call": """
stop = threading.Event()
def go():
    while not stop.is_set():
        assert cn.instance_norm(x).tobytes() == y.tobytes()
callers = [threading.Thread(target=go) for _ in range(2)]
[t.start() for t in callers]
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if cn.instance_norm(x).tobytes() == y.tobytes() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
[t.join() for t in callers]
""",
    "fork while statistics are written": """
running = np.zeros(64, np.float32), np.ones(64, np.float32)
from cupynorm.cpu.running import _present
_present.clear()  # as another thread does
child = os.fork()
if child == 0:
    cn.instance_norm(x, *running)
    os._exit(0 if running[0].any() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""",
    "workers": """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(r == y[:, :2].tobytes() for r in pool.map(lambda_, [x[:, :2]] * 4))
""",
    "plain end": "",
    "end in a thread": """
def late():
    threading.main_thread().join()
    assert cn.instance_norm(x).tobytes() == y.tobytes()
threading.Thread(target=late).start()
""",
    "call at exit": """
import atexit
atexit.register(lambda: print(cn.instance_norm(x).tobytes() == y.tobytes()))
""",
    "interrupt": """
import signal, _thread
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
for _ in range(20):
    timer = threading.Timer(0.003, _thread.interrupt_main)
    try:
        timer.start()
        for _ in range(200):
            cn.instance_norm(x)
    except KeyboardInterrupt:
        pass
    timer.join()
assert cn.instance_norm(x).tobytes() == y.tobytes()
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ending", [
    pytest.param(ending, marks=[pytest.mark.full] * (ending in ("fork while others call", "workers", "interrupt")))
    for ending in ENDINGS
])  # fmt: skip
def test_forks_and_exits(way: str, ending: str):
    """Each in a process of its own, which must end, and well."""
    code = f"WAY = {way!r}\n{USE}lambda_ = lambda a: None\n{ENDINGS[ending]}"
    if ending == "workers":
        code = f"WAY = {way!r}\n{USE}def lambda_(a):\n    return cn.instance_norm(a).tobytes()\n{ENDINGS[ending]}"
    ran = run(code, PYTHONWARNINGS="ignore::DeprecationWarning")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == ("True\n" if ending == "call at exit" else "")


def test_helpers_have_ended_when_the_interpreter_does(way: str):
    """An exit handler from before the import runs after the package's own."""
    there = "sum(thread.name == 'cupynorm' for thread in threading.enumerate())"
    code = f"import atexit, threading\natexit.register(lambda: print({there}))\nWAY = {way!r}\n{USE}print({there})"
    assert run(code).stdout == "3\n0\n"


def test_number_of_threads():
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= cpu_count.available_cpus() <= (usable or 1)
    ask = "import cupynorm; print(cupynorm.get_num_threads())"
    assert run(ask, CUPYNORM_NUM_THREADS="7", OMP_NUM_THREADS="").stdout == "7\n"
    assert run(ask, CUPYNORM_NUM_THREADS="", OMP_NUM_THREADS="").stdout == f"{cpu_count.available_cpus()}\n"
    if hasattr(os, "sched_setaffinity"):
        pinned = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        assert run(pinned + ask, CUPYNORM_NUM_THREADS="").stdout == "1\n"
    for wrong in ("0", "many"):
        failed = run(ask, CUPYNORM_NUM_THREADS=wrong)
        assert f"CUPYNORM_NUM_THREADS must be a positive integer, got {wrong!r}" in failed.stderr
    cn.set_num_threads(np.int64(3))
    assert cn.get_num_threads() == 3
    for number, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="number of threads must be"):
            cn.set_num_threads(number)  # type: ignore[arg-type]
    assert cn.get_num_threads() == 3


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "3"}, 3),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "30"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": " 4 , 2"}, 4),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_THREAD_LIMIT": "5", "OMP_NUM_THREADS": "6"}, 5),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "0"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "-2"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "many"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": ",2", "OMP_THREAD_LIMIT": "1.5"}, 7),
    ],
)
def test_limits_from_the_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], number: int):
    """As joblib and dask set them for their workers: asked once, at first use. What is set by a call counts alone."""
    for name in ("CUPYNORM_NUM_THREADS", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_count, "library_limits", lambda: [])
    monkeypatch.setattr(cpu_count, "available_cpus", lambda: 8)
    monkeypatch.setattr(config.num_threads, "found", None)
    monkeypatch.setattr(config.num_threads, "given", None)
    assert cn.get_num_threads() == number
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "1")
    assert cn.get_num_threads() == number
    cn.set_num_threads(9)
    assert cn.get_num_threads() == 9


def test_limits_of_threadpoolctl(monkeypatch: pytest.MonkeyPatch):
    """As they are at the moment, for whoever has imported it."""
    control = pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(config.num_threads, "found", 64)
    monkeypatch.setattr(config.num_threads, "given", None)
    monkeypatch.setattr(cpu_count, "_controllers", [])
    usual = min(library["num_threads"] for library in control.threadpool_info())
    assert cn.get_num_threads() == min(64, usual)
    with control.threadpool_limits(1):
        assert cn.get_num_threads() == 1
        cn.set_num_threads(5)
        assert cn.get_num_threads() == 5
        monkeypatch.setattr(config.num_threads, "given", None)
    assert cn.get_num_threads() == min(64, usual)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)  # not imported
    assert cn.get_num_threads() == 64
    monkeypatch.setitem(sys.modules, "threadpoolctl", object())  # something else of the name
    monkeypatch.setattr(cpu_count, "_controllers", [])
    assert cn.get_num_threads() == 64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_ask_their_own_environment():
    code = """
import os, cupynorm as cn
before = cn.get_num_threads()
def child():
    os.environ["OMP_NUM_THREADS"] = "1"
    pid = os.fork()
    if not pid:
        os._exit(cn.get_num_threads())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(before, child(), cn.get_num_threads())
cn.set_num_threads(3)
print(child())
"""
    ran = run(code, CUPYNORM_NUM_THREADS="4", OMP_NUM_THREADS="")
    assert (ran.stdout, ran.stderr) == ("4 1 4\n3\n", "")


@pytest.mark.extras
def test_workers_of_a_data_loader():
    """PyTorch has each compute with one thread. What it may use in the main process does not matter."""
    pytest.importorskip("torch")
    code = """
import sys, warnings
import cupynorm as cn
assert "torch" not in sys.modules
first = cn.get_num_threads()
import torch.utils.data
class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, index): return cn.get_num_threads()
if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = [int(n) for n in torch.utils.data.DataLoader(Numbers(), batch_size=None, num_workers=1)]
    print(first, cn.get_num_threads(), found)
"""
    ran = run(code, CUPYNORM_NUM_THREADS="4", OMP_NUM_THREADS="4")
    assert (ran.stdout, ran.stderr) == ("4 4 [1, 1]\n", "")


def test_processors_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch):
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cpu_count, "_quotas", lambda: iter(()))
    for told, number in ((7, 7), (1, 1), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda told=told: told)
        assert cpu_count.available_cpus() == number


@pytest.mark.parametrize("version", [1, 2])
def test_quota_of_a_container(tmp_path: Path, version: int):
    own = tmp_path / "cgroup"
    if version == 2:
        own.write_text("0::/a/b\n")
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
        (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
        (tmp_path / "cpu.max").write_text("0 100000\n")  # no limit either
    else:
        own.write_text("3:memory:/x\n2:cpu,cpuacct:/a\n")
        folder = tmp_path / "cpu,cpuacct" / "a"
        folder.mkdir(parents=True)
        (folder / "cpu.cfs_quota_us").write_text("150000\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
        (folder.parent / "cpu.cfs_quota_us").write_text("-1\n")
        (folder.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert list(cpu_count._quotas(tmp_path, own)) == [1.5]
    assert list(cpu_count._quotas(tmp_path, tmp_path / "nothing")) == []


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="sets the mode of x86 processors")
@on_cpu
def test_helpers_compute_in_the_mode_of_the_caller(backend: Backend, rng: np.random.Generator) -> None:
    """Denormals are flushed by all threads of a call, or by none."""
    own = thread_pool._mode()
    if own is None:
        pytest.skip("this C library has no floating-point environment")
    flushing = thread_pool._mode()
    mxcsr = np.frombuffer(flushing, np.uint32)[7:8]
    mxcsr |= 0x8040  # results and operands
    x = (1e-39 * rng.standard_normal((8, 8, 160, 160))).astype(np.float32)

    def results() -> list[Any]:
        found = []
        for number in (1, 2, 5):
            cn.set_num_threads(number)
            y, saved = cn.instance_norm_forward(x, eps=1e-5)
            found.append((y, *cn.instance_norm_backward(x, saved)[:1]))
        return found

    before = cn.get_num_threads()
    try:
        plain = results()
        thread_pool._set_mode(flushing)
        try:
            flushed = results()
        finally:
            thread_pool._set_mode(own)
        again = results()
    finally:
        cn.set_num_threads(before)
    assert np.any(plain[0][0] != flushed[0][0])
    for each in (plain, flushed, again):
        for one, more in zip(each[0] * 2, each[1] + each[2], strict=True):
            assert_same(more, one)
    for one, more in zip(plain[0], again[0], strict=True):
        assert_same(more, one)
