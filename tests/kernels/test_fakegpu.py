"""The fake GPU under CuPy: its checks, counts and simulated faults; and README's pipeline on it.

python tests/fakegpu/run.py python -m pytest -m fakegpu tests/kernels/test_fakegpu.py
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakegpu import build, control, stand_ins
from helpers import pages, reference
from helpers.compare import assert_allclose, assert_equal

import cupynorm as cn
from cupynorm import devices

ROOT = Path(__file__).resolve().parents[2]
RUN = (sys.executable, str(ROOT / "tests/fakegpu/run.py"))


def _why_not() -> str:
    if control.active():
        return ""
    try:
        build.versions()
    except build.MissingError as error:
        return str(error)
    return "runs on the fake GPU: python tests/fakegpu/run.py python -m pytest -m fakegpu tests/kernels/test_fakegpu.py"


pytestmark = [pytest.mark.fakegpu, pytest.mark.skipif(not control.active(), reason=_why_not())]

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
# Kernels without results, to test which launches are accepted.
BARE = r"""
extern "C" __global__ void __launch_bounds__(256) bounded(int n) {}
extern "C" __global__ void fixed(int n) {
    __shared__ volatile char kept[4096];
    for (int i = threadIdx.x; i < n; i += 32) kept[i] = kept[i + 1];
}
extern "C" __global__ void hungry(int n) {
    long long a[48], sum = 0;
    for (int i = 0; i < 48; i++) a[i] = clock64();
    for (int round = 0; round < n; round++) for (int i = 0; i < 48; i++) a[i] = a[i] * a[(i + 7) % 48] + round;
    for (int i = 0; i < 48; i++) sum ^= a[i];
    if (sum == 12345) __nanosleep(1);
}
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __cluster_dims__(4, 1, 1) four(int n) {}
extern "C" __global__ void __cluster_dims__(16, 1, 1) sixteen(int n) {}
#endif
"""
MOST_SHARED = 227 << 10


@pytest.fixture(autouse=True)
def _as_usual() -> Iterator[None]:
    yield
    control.configure(oom=0, fail=0, code=719, cluster=16)


def _function(name: str, shared: int = 48 << 10, non_portable: bool = False) -> int:
    """Return a kernel of a new module, so that no other test has changed its attributes."""
    module = cp.RawModule(code=f"// {os.urandom(8).hex()}\n" + BARE)
    function = module.get_function(name).kernel.ptr
    driver.funcSetAttribute(function, 8, shared)
    driver.funcSetAttribute(function, 14, int(non_portable))
    return function


def _launch(
    function: int, grid: int, threads: int, shared: int = 0, cooperative: bool = False, stream: int = 0
) -> None:
    argument = np.zeros(1, np.int32)
    pointers = np.array([argument.ctypes.data], np.uintp)
    where = (function, grid, 1, 1, threads, 1, 1, shared, 0, pointers.ctypes.data)
    if cooperative:
        driver.launchCooperativeKernel(*where)
    else:
        driver.launchKernel(*where, 0)


def _code(call: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Return the error code of a call, 0 if it succeeds."""
    try:
        call(*args, **options)
    except (driver.CUDADriverError, cp.cuda.runtime.CUDARuntimeError) as error:
        return int(error.status)
    return 0


@pytest.mark.parametrize(
    ("name", "attributes", "good", "bad", "code"),
    [
        ("bounded", {}, (1, 256), (1, 257), 701),
        ("fixed", {}, (1, 1024), (1, 1025), 1),
        ("fixed", {}, (1, 1024), (0, 1024), 1),
        ("hungry", {}, (1, 512), (1, 1024), 701),
        ("bounded", {}, (1, 32, 48 << 10), (1, 32, (48 << 10) + 1), 1),
        ("bounded", {"shared": 1000}, (1, 32, 1000), (1, 32, 1001), 1),
        ("bounded", {"shared": MOST_SHARED}, (1, 32, MOST_SHARED), (1, 32, MOST_SHARED + 1), 1),
        ("fixed", {}, (1, 32, 44 << 10), (1, 32, (44 << 10) + 1), 1),
        ("four", {}, (8, 32), (6, 32), 1),
        ("bounded", {"shared": MOST_SHARED}, (132, 256, MOST_SHARED, True), (133, 256, MOST_SHARED, True), 720),
        ("bounded", {}, (8 * 132, 256, 0, True), (8 * 132 + 1, 256, 0, True), 720),
        ("four", {"shared": MOST_SHARED}, (128, 32, MOST_SHARED, True), (132, 32, MOST_SHARED, True), 720),
    ],
)
def test_checks_of_launches(name: str, attributes: Any, good: Any, bad: Any, code: int) -> None:
    function = _function(name, **attributes)
    assert _code(_launch, function, *good) == 0
    assert _code(_launch, function, *bad) == code


def test_clusters_of_a_non_portable_size() -> None:
    assert _code(_launch, _function("sixteen"), 16, 32) == 912
    allowed = _function("sixteen", non_portable=True)
    assert _code(_launch, allowed, 16, 32) == 0
    control.configure(cluster=8)
    assert _code(_launch, allowed, 16, 32) == 912
    four = _function("four")
    assert _code(_launch, four, 16, 32) == 0
    control.configure(cluster=1)
    assert _code(_launch, four, 16, 32) == 912


def _elsewhere(call: Callable[[], Any]) -> Any:
    """Return the result of a call on a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_thread_needs_a_context() -> None:
    function = _function("bounded")
    assert _elsewhere(lambda: _code(_launch, function, 1, 32)) == 201
    assert _elsewhere(lambda: (cp.cuda.runtime.memGetInfo(), _code(_launch, function, 1, 32))[1]) == 0


@pytest.mark.parametrize("side", [40, 700])
def test_a_call_on_a_new_thread(side: int, rng: np.random.Generator) -> None:
    """Kernels are loaded and memory is allocated before, so no call of the runtime creates a context by chance."""
    host = rng.normal(size=(1, 2, side, side)).astype(np.float32)
    x = cp.asarray(host)

    def call() -> Any:
        y, saved = cn.instance_norm_forward(x)
        return y, cn.instance_norm_backward(x, saved)[0]

    call()
    y, dx = _elsewhere(call)
    reference.assert_close(y.get(), reference.forward(host))
    reference.assert_close(dx.get(), reference.backward(host, host)[0])


def test_limit_of_shared_memory() -> None:
    assert _code(_function, "bounded", MOST_SHARED) == 0
    assert _code(_function, "bounded", MOST_SHARED + 1) == 1
    assert _code(_function, "fixed", MOST_SHARED - 4096) == 0
    assert _code(_function, "fixed", MOST_SHARED - 4095) == 1


def test_attributes_of_functions() -> None:
    module = cp.RawModule(code=BARE)
    assert module.get_function("bounded").max_threads_per_block == 256
    assert module.get_function("fixed").shared_size_bytes == 4096
    assert module.get_function("hungry").num_regs > 64
    bounded = _function("bounded", shared=MOST_SHARED)
    assert [driver.occupancyMaxActiveBlocksPerMultiprocessor(bounded, 256, s) for s in (0, 100 << 10, MOST_SHARED)] == [
        8, 2, 1,
    ]  # fmt: skip


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


def test_launches_with_attributes() -> None:
    """cuLaunchKernelEx and cuOccupancyMaxActiveClusters, which CuPy does not call."""
    lib = ctypes.CDLL("libcuda.so.1")
    argument = ctypes.c_uint64(0)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))

    def config(grid: int, cluster: int = 0, cooperative: bool = False) -> _Config:
        made = (_Attribute * 2)()
        made[0].id, made[0].value[:3] = (4, (cluster, 1, 1)) if cluster else (0, (0, 0, 0))
        made[1].id, made[1].value[0] = 2, int(cooperative)
        return _Config((grid, 1, 1), (256, 1, 1), MOST_SHARED, None, made, 2)

    def launch(function: int, *args: Any) -> int:
        return int(lib.cuLaunchKernelEx(ctypes.byref(config(*args)), ctypes.c_void_p(function), pointers, None))

    def clusters(function: int, *args: Any) -> int:
        number = ctypes.c_int(-1)
        which = ctypes.c_void_p(function), ctypes.byref(config(*args))
        assert lib.cuOccupancyMaxActiveClusters(ctypes.byref(number), *which) == 0
        return number.value

    plain, four = (_function(name, shared=MOST_SHARED) for name in ("bounded", "four"))
    assert [launch(plain, *args) for args in ((3, 1), (4, 2), (3, 2), (16, 16))] == [0, 0, 1, 912]
    assert [launch(plain, *args) for args in ((132, 1, True), (133, 1, True), (133, 1, False))] == [0, 720, 0]
    assert [launch(four, *args) for args in ((4,), (4, 4), (4, 2))] == [0, 0, 912]
    assert [clusters(plain, 16, size) for size in (4, 8, 16)] == [32, 16, 0]
    assert clusters(four, 16) == 32


def test_cubins_for_other_devices() -> None:
    from cupy_backends.cuda.libs import nvrtc

    def cubin(arch: str) -> bytes:
        program = nvrtc.createProgram('extern "C" __global__ void k() {}', "k.cu", (), ())
        nvrtc.compileProgram(program, (f"-arch={arch}",))
        return nvrtc.getCUBIN(program)

    assert _code(driver.moduleLoadData, cubin("sm_90")) == 0
    assert _code(driver.moduleLoadData, cubin("sm_80")) == 209
    assert _code(driver.moduleLoadData, b"\x7fELE" + cubin("sm_90")[4:]) == 200
    assert _code(driver.moduleLoadData, cubin("sm_90")[:18] + b"\x3e" + cubin("sm_90")[19:]) == 200  # of x86-64
    assert _code(driver.moduleGetFunction, driver.moduleLoadData(cubin("sm_90")), "other") == 500


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
        assert _code(_scale, scale, x.data.ptr, whole, 100) == 0
        assert _code(_scale, scale, x.data.ptr, short, 99) == 0
        assert _code(_scale, scale, x.data.ptr, short, 100) == 700  # beyond its end
        assert _code(_scale, scale, x.data.ptr, whole + 2, 99) == 716
    assert _code(_scale, scale, x.data.ptr, whole, 100) == 700  # freed
    assert _code(_scale, scale, host.ctypes.data, y.data.ptr, 100) == 700


def test_kernels_of_cupy_access_their_own_memory_only() -> None:
    with _memory(400) as pointer:
        memory = cp.cuda.UnownedMemory(pointer, 400, None)
        array = cp.ndarray((100,), cp.float32, cp.cuda.MemoryPointer(memory, 0))
        longer = cp.ndarray((101,), cp.float32, cp.cuda.MemoryPointer(memory, 0))
        assert np.isnan(array.get()).all()  # new memory is NaN
        assert _code(array.fill, 1) == 0
        assert _code(longer.fill, 1) == 700
        assert float(array.sum()) == 100
    assert _code(array.fill, 1) == 700


def test_copies_are_checked() -> None:
    host = np.zeros(100, np.uint8)
    to_device, to_host, between, either = 1, 2, 3, 4
    at, copy = host.ctypes.data, cp.cuda.runtime.memcpy
    with _memory(100) as device:
        assert [_code(copy, device, at, 100, kind) for kind in (to_device, either, to_host, between)] == [0, 0, 1, 1]
        assert [_code(copy, at, device, 100, kind) for kind in (to_host, either, to_device, between)] == [0, 0, 1, 1]
        assert [_code(copy, device, device, 100, kind) for kind in (between, to_device, to_host)] == [0, 1, 1]
        assert _code(copy, device, at, 101, to_device) == 1
        assert _code(copy, device + 1, at, 99, to_device) == 0
        assert _code(cp.cuda.runtime.memset, device, 0, 101) == 1
        assert _code(cp.cuda.runtime.free, device + 1) == 1
    assert _code(copy, device, at, 100, to_device) == 1
    assert _code(cp.cuda.runtime.free, device) == 1


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
    assert _code(bad) == 1
    assert not y.any()
    assert _code(good) == 0
    assert (y == 3).all()


# CuPy's own kernels


@pytest.mark.parametrize(
    "name",  # CuPy compiles each for a second
    [pytest.param(n, marks=[pytest.mark.full] * (i % 6 > 0)) for i, n in enumerate(sorted(stand_ins.ELEMENTWISE))],
)
def test_an_elementwise_stand_in(name: str, rng: np.random.Generator) -> None:
    """It agrees with NumPy on strided arrays, in each kind of dtype that the function has."""
    short, inputs, tried = name.removeprefix("cupy_"), stand_ins._inputs(stand_ins.ELEMENTWISE[name]), 0
    for dtype in (np.float32, np.int32, np.bool_):
        hosts = [rng.uniform(1, 4, (3, 8)).astype(dtype)[:, ::2] for _ in range(inputs)]
        arrays = [cp.asarray(np.repeat(host, 2, 1))[:, ::2] for host in hosts]
        if name == "cupy_fill":
            expected = np.full_like(hosts[0], 3)
            arrays[0].fill(3)
            actual = arrays[0]
        else:
            try:
                expected = getattr(np, short)(*hosts)
            except TypeError:
                continue
            actual = getattr(cp, short)(*arrays)
        tried += 1
        assert_allclose(actual.get(), expected, rtol=2e-3 if expected.dtype == np.float16 else 1e-6)
    assert tried


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2)])
@pytest.mark.parametrize("name", ["all", "any", "max", "mean", "min", "prod", "sum", "var"])
def test_a_reduction_stand_in(name: str, axis: Any, rng: np.random.Generator) -> None:
    host = rng.uniform(0, 2, (3, 4, 5)).astype(np.float32)
    host[host < 0.3] = 0
    for order in (host, host.transpose(2, 0, 1)):
        actual = getattr(cp.asarray(host).transpose(2, 0, 1) if order is not host else cp.asarray(host), name)(
            axis=axis
        )
        assert_allclose(actual.get(), getattr(order, name)(axis=axis), rtol=1e-5)


def test_other_stand_ins() -> None:
    assert_equal(cp.arange(3, 9, 2).get(), np.arange(3, 9, 2))
    assert_equal(cp.resize(cp.arange(5), (3, 4)).get(), np.resize(np.arange(5), (3, 4)))


def test_kernels_without_a_stand_in_are_named() -> None:
    x = cp.ones(5, cp.float32)
    with pytest.raises(driver.CUDADriverError, match="cupy_argmax has no stand-in"):
        x.argmax()
    own = cp.RawKernel('extern "C" __global__ void own(float* x) { x[0] = 2; }', "own")
    with pytest.raises(driver.CUDADriverError, match="own has no stand-in"):
        own((1,), (1,), (x,))
    squares = cp.ElementwiseKernel("float32 a", "float32 b", "b = a * a", "cupy_add")
    with pytest.raises(driver.CUDADriverError, match="cupy_add has no stand-in"):  # this one has one input
        squares(x)


def test_unsupported_functions_are_named() -> None:
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="the fake GPU has no cudaMallocManaged") as caught:
        cp.cuda.runtime.mallocManaged(100)
    assert caught.value.status == 801
    with pytest.raises(driver.CUDADriverError, match="the fake GPU has no cuModuleGetGlobal_v2"):
        driver.moduleGetGlobal(1, "name")


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
    assert [_code(lambda: cp.cuda.runtime.free(cp.cuda.runtime.malloc(10))) for _ in range(3)] == [0, 2, 2]
    control.configure(oom=0)
    assert _code(lambda: cp.cuda.runtime.free(cp.cuda.runtime.malloc(10))) == 0
    assert _code(cp.cuda.runtime.malloc, 9 << 30) == 2  # more than the device has


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
    assert [_code(_scale, scale, x.data.ptr, x.data.ptr, 10) for _ in range(4)] == [0, code, 0, 0]
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
        assert _code(graph.launch, stream) == 0
    assert _code(graph.launch, stream) == 700


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
    told = _code(call, stream)
    lost = _code(stream.end_capture)
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
