"""The fake GPU under CuPy: memory, counts, simulated faults, settings, graphs; and README's pipeline on it.

python tests/fakegpu/run.py python -m pytest -m fakegpu tests/kernels/test_fakegpu*.py
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakegpu import control
from helpers import pages, reference
from helpers.compare import assert_equal
from helpers.fake_gpu import code_of, on_fake_gpu

import cupynorm as cn
from cupynorm import devices

pytestmark = on_fake_gpu

ROOT = Path(__file__).resolve().parents[2]
RUN = (sys.executable, str(ROOT / "tests/fakegpu/run.py"))

if control.active():
    import cupy as cp
    from cupy_backends.cuda.api import driver

# Compiles for the emulator and with NVRTC.
SOURCE = r"""
#ifndef SIMT
#define KERNEL(THREADS, BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
template <class T> __device__ T load(const T* p) { return *p; }
template <class T> __device__ void store(T* p, T value) { *p = value; }
#endif
KERNEL(256, 1) scale(const float* x, float* y, long long n, double factor, int shift) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) store(y + i, float(factor * load(x + i) + shift));
}
"""


# Memory


@pytest.fixture
def scale() -> Any:
    return cp.RawKernel(SOURCE, "scale")


@contextmanager
def _memory(size: int) -> Iterator[int]:
    """Allocate memory of its own, outside CuPy's pool."""
    pointer = cp.cuda.runtime.malloc(size)
    try:
        yield pointer
    finally:
        cp.cuda.runtime.free(pointer)


def _scale(kernel: Any, x: int, y: int, n: int, stream: Any = None) -> None:
    kernel((-(-n // 256),), (256,), (np.uintp(x), np.uintp(y), np.int64(n), np.float64(2), np.int32(1)), stream=stream)


def test_kernels_access_their_own_memory_only(scale: Any) -> None:
    host = np.arange(100, dtype=np.float32)
    x, y = cp.asarray(host), cp.zeros(100, cp.float32)
    _scale(scale, x.data.ptr, y.data.ptr, 100)
    assert_equal(y.get(), 2 * host + 1)
    with _memory(400) as whole, _memory(396) as short:
        assert code_of(_scale, scale, x.data.ptr, whole, 100) == 0
        assert code_of(_scale, scale, x.data.ptr, short, 99) == 0
        assert code_of(_scale, scale, x.data.ptr, short, 100) == 700  # beyond its end
        assert code_of(_scale, scale, x.data.ptr, whole + 2, 99) == 716
    assert code_of(_scale, scale, x.data.ptr, whole, 100) == 700  # freed
    assert code_of(_scale, scale, host.ctypes.data, y.data.ptr, 100) == 700


def test_kernels_of_cupy_access_their_own_memory_only() -> None:
    with _memory(400) as pointer:
        memory = cp.cuda.UnownedMemory(pointer, 400, None)
        array = cp.ndarray((100,), cp.float32, cp.cuda.MemoryPointer(memory, 0))
        longer = cp.ndarray((101,), cp.float32, cp.cuda.MemoryPointer(memory, 0))
        assert np.isnan(array.get()).all()  # new memory is NaN
        assert code_of(array.fill, 1) == 0
        assert code_of(longer.fill, 1) == 700
        assert float(array.sum()) == 100
    assert code_of(array.fill, 1) == 700


def test_copies_are_checked() -> None:
    host = np.zeros(100, np.uint8)
    to_device, to_host, between, either = 1, 2, 3, 4
    at, copy = host.ctypes.data, cp.cuda.runtime.memcpy
    with _memory(100) as device:
        assert [code_of(copy, device, at, 100, kind) for kind in (to_device, either, to_host, between)] == [0, 0, 1, 1]
        assert [code_of(copy, at, device, 100, kind) for kind in (to_host, either, to_device, between)] == [0, 0, 1, 1]
        assert [code_of(copy, device, device, 100, kind) for kind in (between, to_device, to_host)] == [0, 1, 1]
        assert code_of(copy, device, at, 101, to_device) == 1
        assert code_of(copy, device + 1, at, 99, to_device) == 0
        assert code_of(cp.cuda.runtime.memset, device, 0, 101) == 1
        assert code_of(cp.cuda.runtime.free, device + 1) == 1
    assert code_of(copy, device, at, 100, to_device) == 1
    assert code_of(cp.cuda.runtime.free, device) == 1


def _python(text: str, **settings: int) -> subprocess.CompletedProcess[str]:
    """Run a new Python process on a device with these settings."""
    given = ",".join(f"{name}={value}" for name, value in settings.items())
    inherited = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    return subprocess.run(
        [*RUN, sys.executable, "-c", text], env=inherited | {"FAKEGPU": given, "CUPYNORM_EAGER": "0"}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_host_cannot_touch_device_memory() -> None:
    text = "import cupy, ctypes; x = cupy.zeros(4); print(x, flush=True); ctypes.string_at(x.data.ptr, 1); print('no')"
    done = _python(text)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "[0. 0. 0. 0.]\n")


@pytest.mark.parametrize("wrong", ["size", "missing"])
def test_arguments(scale: Any, wrong: str) -> None:
    """In a buffer with the layout of the kernel's constant bank, and one by one."""
    x, y = cp.ones(10, cp.float32), cp.zeros(10, cp.float32)
    packed = np.zeros(36, np.uint8)
    values = (
        (0, np.uint64(x.data.ptr)),
        (8, np.uint64(y.data.ptr)),
        (16, np.int64(10)),
        (24, np.float64(2)),
        (32, np.int32(1)),
    )
    for place, value in values:
        packed[place : place + value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
    size = np.uint64(36)
    where = (scale.kernel.ptr, 1, 1, 1, 256, 1, 1, 0, 0)

    def in_a_buffer(size: int) -> None:
        bytes_ = np.array([size], np.uint64)
        extra = np.array([1, packed.ctypes.data, 2, bytes_.ctypes.data, 0], np.uint64)
        driver.launchKernel(*where, 0, extra.ctypes.data)

    def one_by_one(count: int) -> None:
        arrays = [np.array([value]) for _, value in values]
        pointers = np.array([*(a.ctypes.data for a in arrays[:count]), 0], np.uint64)
        driver.launchKernel(*where, pointers.ctypes.data, 0)

    good, bad = {"size": (lambda: in_a_buffer(int(size)), lambda: in_a_buffer(40)),
                 "missing": (lambda: one_by_one(5), lambda: one_by_one(4))}[wrong]  # fmt: skip
    assert code_of(bad) == 1
    assert not y.any()
    assert code_of(good) == 0
    assert (y == 3).all()


# Counts and faults


def _counted(call: Callable[..., Any], *args: Any, during_capture: bool = False) -> dict[str, int]:
    """Return the counts of a call that are not 0."""
    before = {what: control.count(what, during_capture) for what in control.COUNTED}
    call(*args)
    after = {what: control.count(what, during_capture) - number for what, number in before.items()}
    return {what: number for what, number in after.items() if number}


def test_counts(scale: Any) -> None:
    x = cp.ones(10, cp.float32)
    _scale(scale, x.data.ptr, x.data.ptr, 10)
    assert _counted(lambda: cp.cuda.runtime.free(cp.cuda.runtime.malloc(10))) == {"mallocs": 1}
    assert _counted(_scale, scale, x.data.ptr, x.data.ptr, 10) == {"launches": 1}
    assert _counted(x.get) == {"copies": 1, "synchronisations": 1}
    assert _counted(cp.cuda.Device().synchronize) == {"synchronisations": 1}
    assert _counted(cp.RawModule(code=f"// {os.urandom(8).hex()}\n" + SOURCE).get_function, "scale") == {"modules": 1}
    stream = cp.cuda.Stream(non_blocking=True)

    def capture() -> None:
        stream.begin_capture()
        cp.cuda.runtime.free(cp.cuda.runtime.malloc(10))
        _scale(scale, x.data.ptr, x.data.ptr, 10, stream)
        stream.end_capture()

    assert _counted(x.get, during_capture=True) == {}
    assert _counted(capture, during_capture=True) == {"mallocs": 1, "launches": 1}


def test_out_of_memory_from_the_nth_allocation_on() -> None:
    """CuPy frees the memory in its pool and tries again, so a single failure would have no effect."""
    control.configure(oom=2)
    assert [code_of(lambda: cp.cuda.runtime.free(cp.cuda.runtime.malloc(10))) for _ in range(3)] == [0, 2, 2]
    control.configure(oom=0)
    assert code_of(lambda: cp.cuda.runtime.free(cp.cuda.runtime.malloc(10))) == 0
    assert code_of(cp.cuda.runtime.malloc, 9 << 30) == 2  # more than the device has


def test_a_call_that_runs_out_of_memory_can_be_repeated(rng: np.random.Generator) -> None:
    host = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    x = cp.asarray(host)
    cn.instance_norm(x)
    with cp.cuda.using_allocator(cp.cuda.MemoryPool().malloc):
        control.configure(oom=1)
        with pytest.raises(cp.cuda.memory.OutOfMemoryError):
            cn.instance_norm(x)
        control.configure(oom=0)
        reference.assert_close(cn.instance_norm(x).get(), reference.forward(host))


@pytest.mark.parametrize("code", [719, 700])
def test_a_launch_that_fails(scale: Any, code: int) -> None:
    x = cp.ones(10, cp.float32)
    control.configure(fail=2, code=code)
    assert [code_of(_scale, scale, x.data.ptr, x.data.ptr, 10) for _ in range(4)] == [0, code, 0, 0]
    assert (x == 15).all()  # three of them did their work


@pytest.mark.parametrize(
    ("settings", "usable", "why"),
    [
        ({}, True, "1 visible, current is cuda:0"),
        ({"devices": 2}, True, "2 visible, current is cuda:0"),
        ({"devices": 0}, False, "error 100"),
        ({"driver": 0}, False, "no NVIDIA driver is installed"),
        ({"driver": 12040}, False, "insufficient"),
    ],
    ids=str,
)
def test_devices_and_drivers(settings: dict[str, int], usable: bool, why: str) -> None:
    done = _python("from cupynorm import devices; print(*devices.gpu_status(), sep=chr(10))", **settings)
    told, _, reason = done.stdout.partition("\n")
    assert (told, done.returncode) == (str(usable), 0), done.stderr
    assert re.search(why, reason), reason


def test_unknown_setting() -> None:
    done = _python("import cupy", colour=3)
    assert done.returncode
    assert "FAKEGPU=colour=3: unknown setting" in done.stderr
    with pytest.raises(ValueError, match="colour"):
        control.configure(colour=3)


def test_two_devices() -> None:
    text = """
import cupy, numpy
from cupy_backends.cuda.api import driver
x = cupy.ones(10, cupy.float32)
with cupy.cuda.Device(1):
    y = cupy.ones(10, cupy.float32)
    stream = cupy.cuda.Stream()
    bare = cupy.RawKernel('extern "C" __global__ void bare() {}', "bare")
    bare((1,), (1,), (), stream=stream)
    y += 1
print(x.device, y.device, y.get()[0])
z = cupy.RawKernel('extern "C" __global__ void bare() {}', "bare")
of_the_other = z.kernel.ptr
try:
    z((1,), (1,), (), stream=stream)
except driver.CUDADriverError as error:
    print(error.status)
memory = cupy.cuda.UnownedMemory(x.data.ptr, 40, x, 1)  # claims device 1, but x is on device 0
with cupy.cuda.Device(1):
    try:
        cupy.ndarray((10,), cupy.float32, cupy.cuda.MemoryPointer(memory, 0)).fill(2)
    except driver.CUDADriverError as error:
        print(error.status)
    try:
        driver.launchKernel(of_the_other, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    except driver.CUDADriverError as error:
        print(error.status)
"""
    done = _python(text, devices=2)
    assert done.stdout.split("\n")[:4] == ["<CUDA Device 0> <CUDA Device 1> 2.0", "400", "700", "400"], done.stderr


@pytest.mark.parametrize(
    ("settings", "name", "cluster"),
    [
        ({"capability": 80}, "A100", 1),
        ({"cluster": 8}, "H100", 8),
        ({}, "H100", 16),
        # Six parts: clusters of 16, one in each, take 96 of 132 multiprocessors; clusters of 8, too; of 4, 120.
        ({"part": 22}, "H100", 4),
        ({"part": 18}, "H100", 16),  # seven clusters: 112
    ],
    ids=str,
)
def test_cupynorm_finds_the_largest_cluster(settings: dict[str, int], name: str, cluster: int) -> None:
    text = """
import cupy, cupynorm
from cupynorm.cuda.backend import runtime
print(runtime.device())
print(float(abs(cupynorm.instance_norm(cupy.ones((1, 2, 64, 64)))).sum()))
"""
    done = _python(text, **settings)
    assert re.fullmatch(rf"Device\(.*{name}.*, cluster={cluster}\)\n0\.0\n", done.stdout), done


# Graphs


def test_graphs_compute_at_their_launch(scale: Any) -> None:
    stream = cp.cuda.Stream(non_blocking=True)
    x, y = cp.arange(10, dtype=cp.float32), cp.zeros(10, cp.float32)
    stream.begin_capture()
    _scale(scale, x.data.ptr, y.data.ptr, 10, stream)
    with stream:
        y += 1
    graph = stream.end_capture()
    assert not y.any()
    for start in (0, 5):
        x[...] = cp.arange(start, start + 10, dtype=cp.float32)
        graph.launch(stream)
        assert_equal(y.get(), 2 * np.arange(start, start + 10) + 2)


def test_a_graph_over_freed_memory(scale: Any) -> None:
    stream = cp.cuda.Stream(non_blocking=True)
    x = cp.ones(10, cp.float32)
    with _memory(40) as y:
        stream.begin_capture()
        _scale(scale, x.data.ptr, y, 10, stream)
        graph = stream.end_capture()
        assert code_of(graph.launch, stream) == 0
    assert code_of(graph.launch, stream) == 700


RELAXED, GLOBAL = 2, 0


@pytest.mark.parametrize(
    ("mode", "blocking", "call", "code"),
    [
        (RELAXED, False, lambda stream: stream.synchronize(), 900),
        (RELAXED, False, lambda stream: cp.cuda.Device().synchronize(), 900),
        (RELAXED, False, lambda stream: cp.cuda.runtime.free(cp.cuda.runtime.malloc(10)), 0),
        (GLOBAL, False, lambda stream: cp.cuda.runtime.malloc(10), 900),
        (RELAXED, False, lambda stream: cp.cuda.runtime.memset(cp.zeros(1).data.ptr, 0, 1), 0),
        (RELAXED, True, lambda stream: cp.cuda.runtime.memset(cp.zeros(1).data.ptr, 0, 1), 906),
        (RELAXED, False, lambda stream: cp.cuda.Stream(non_blocking=True).synchronize(), 0),
        (RELAXED, False, lambda stream: stream.wait_event(cp.cuda.Stream(non_blocking=True).record()), 905),
    ],
)
def test_calls_refused_during_capture(mode: int, blocking: bool, call: Callable[[Any], Any], code: int) -> None:
    """They end the capture, too."""
    stream = cp.cuda.Stream(non_blocking=not blocking)
    cp.zeros(1)
    stream.begin_capture(mode)
    told = code_of(call, stream)
    lost = code_of(stream.end_capture)
    assert (told, lost) == (code, 901 if code else 0)


def test_streams_join_a_capture_by_events(scale: Any) -> None:
    first, second = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    x, y = cp.ones(10, cp.float32), cp.zeros(10, cp.float32)
    first.begin_capture()
    second.wait_event(first.record())
    _scale(scale, x.data.ptr, y.data.ptr, 10, second)
    first.wait_event(second.record())
    graph = first.end_capture()
    assert not y.any()
    graph.launch(first)
    assert (y == 3).all()
    _scale(scale, y.data.ptr, x.data.ptr, 10, second)  # the second stream no longer captures
    assert (x == 7).all()


# README and the commands


def test_readmes_cupy_pipeline(rng: np.random.Generator) -> None:
    volume = rng.integers(100, 4000, (3, 16, 20), dtype=np.uint16)
    names: dict[str, Any] = {"volume": volume}
    exec(pages.block(pages.README, "import cupy as cp"), names)
    expected = reference.forward(volume[:, None].astype(np.float64))
    assert names["y"].dtype == np.float32
    reference.assert_close(names["y"].get(), reference.forward(expected))  # in place, so normalised twice
    assert (names["stack"].get() == volume[:, None]).all()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("cupynorm info", r"cuda:0 NVIDIA H100 80GB HBM3, compute capability 9\.0"),
        ("bench --shapes 2,3,16,16 --rounds 1 --op forward --peers torch", r"torch left out.*2,3,16,16 *│ *forward"),
    ],
)
def test_commands(command: str, answer: str) -> None:
    done = subprocess.run(
        [*RUN, sys.executable, "-m", *command.split()], env=os.environ | {"CUPYNORM_EAGER": "0"}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(answer, done.stdout, re.S), done.stdout


def test_child_processes() -> None:
    text = "import cupy; print(cupy.ones(3).sum())"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.stdout == "3.0\n", done.stderr


def test_nvidias_own_runtime_finds_no_device() -> None:
    """PyTorch has this runtime with it; without a device it uses the CPU."""
    from cuda import pathfinder

    runtime = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cudart").abs_path)
    number = ctypes.c_int(-1)
    assert runtime.cudaGetDeviceCount(ctypes.byref(number)) in (35, 100)  # no usable driver, or no device
    assert cp.cuda.runtime.getDeviceCount() == 1


def test_gpu_status_in_this_process() -> None:
    assert devices.gpu_status() == (True, "1 visible, current is cuda:0")
