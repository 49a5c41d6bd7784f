"""Launches on the fake GPU: its checks, and CuPy's own kernels.

python tests/fakegpu/run.py python -m pytest -m fakegpu tests/kernels/test_fakegpu*.py
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakegpu import control, stand_ins
from helpers import reference
from helpers.compare import assert_allclose, assert_equal
from helpers.fake_gpu import code_of, on_fake_gpu
from helpers.processes import said

import cupynorm as cn

pytestmark = on_fake_gpu

if control.active():
    import cupy as cp
    from cupy_backends.cuda.api import driver

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


def _function(name: str, shared: int = 48 << 10, non_portable: bool = False) -> int:
    """Return a kernel of a new module, so that no other test has changed its attributes."""
    module = cp.RawModule(code=f"// {os.urandom(8).hex()}\n" + BARE)
    function = module.get_function(name).kernel.ptr
    driver.funcSetAttribute(function, 8, shared)
    driver.funcSetAttribute(function, 14, int(non_portable))
    return function


FACTS = """
import json
import cupy
from cupy_backends.cuda.api import driver
from cupynorm.cuda.source import OPTIONS, Module
from fakegpu import control

CLUSTER = ("backward", "float32", 4, "channels_first", "cluster_registers")
modules = [Module("channels", "float32", 1, "channels_first"), Module(*CLUSTER)]
modules += [Module("forward", "float16", 1, "channels_first", "subwarp", 1)]
found = {}
for text in (BARE, *(module.source for module in modules)):
    module = cupy.RawModule(code=text, options=OPTIONS)
    for name in control.kernels_of(module.module.ptr):
        kernel = module.get_function(name).kernel.ptr
        found[name] = facts = {what: driver.funcGetAttribute(number, kernel) for what, number in ATTRIBUTES.items()}
        facts["parameters"] = control.parameters_of(kernel)
print(json.dumps(found))
"""
ATTRIBUTES = {"threads": 0, "static shared memory": 1, "registers": 4, "cluster": 11}


def test_ptx_has_the_facts_of_cubins(tmp_path: Path) -> None:
    """A kernel in PTX has as many registers as its launch bounds allow, and the static shared memory of its module."""
    code = f"BARE, ATTRIBUTES = {BARE!r}, {ATTRIBUTES}\n{FACTS}"
    cubin, ptx = (
        json.loads(said(code, FAKEGPU_PTX=given, CUPY_CACHE_DIR=str(tmp_path / f"cache{given}"))) for given in ("", "1")
    )
    assert len(cubin) > 10
    assert {facts["cluster"] for facts in cubin.values()} == {0, 4, 8, 16}
    assert 4096 in {facts["static shared memory"] for facts in cubin.values()}
    for kernels in (cubin, ptx):
        kernels.pop("hungry")  # its registers limit its threads, since it has no launch bounds
    for name, facts in cubin.items():
        for what in ("registers", "static shared memory"):
            assert 0 <= facts.pop(what) <= ptx[name].pop(what) <= 4096
    assert ptx == cubin


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
    assert code_of(_launch, function, *good) == 0
    assert code_of(_launch, function, *bad) == code


def test_clusters_of_a_non_portable_size() -> None:
    assert code_of(_launch, _function("sixteen"), 16, 32) == 912
    allowed = _function("sixteen", non_portable=True)
    assert code_of(_launch, allowed, 16, 32) == 0
    control.configure(cluster=8)
    assert code_of(_launch, allowed, 16, 32) == 912
    four = _function("four")
    assert code_of(_launch, four, 16, 32) == 0
    control.configure(cluster=1)
    assert code_of(_launch, four, 16, 32) == 912


def _elsewhere(call: Callable[[], Any]) -> Any:
    """Return the result of a call on a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_thread_needs_a_context() -> None:
    function = _function("bounded")
    assert _elsewhere(lambda: code_of(_launch, function, 1, 32)) == 201
    assert _elsewhere(lambda: (cp.cuda.runtime.memGetInfo(), code_of(_launch, function, 1, 32))[1]) == 0


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
    assert code_of(_function, "bounded", MOST_SHARED) == 0
    assert code_of(_function, "bounded", MOST_SHARED + 1) == 1
    assert code_of(_function, "fixed", MOST_SHARED - 4096) == 0
    assert code_of(_function, "fixed", MOST_SHARED - 4095) == 1


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

    assert code_of(driver.moduleLoadData, cubin("sm_90")) == 0
    assert code_of(driver.moduleLoadData, cubin("sm_80")) == 209
    assert code_of(driver.moduleLoadData, b"\x7fELE" + cubin("sm_90")[4:]) == 200
    assert code_of(driver.moduleLoadData, cubin("sm_90")[:18] + b"\x3e" + cubin("sm_90")[19:]) == 200  # of x86-64
    assert code_of(driver.moduleGetFunction, driver.moduleLoadData(cubin("sm_90")), "other") == 500


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
