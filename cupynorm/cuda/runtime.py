"""The CuPy runtime: compiles each kernel once for each device, and launches it on the current stream."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.api import driver

from ..functional import Array
from .plan import Device, Step
from .source import OPTIONS, Module, compile_error

# What a launch may ask for without opting in, cudaDevAttrMaxSharedMemoryPerBlockOptin, and
# CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED.
DEFAULT_SHARED = 48 * 1024
MAX_SHARED_OPTIN = 97
NON_PORTABLE_CLUSTER = 14

PROBE = 'extern "C" __global__ void __cluster_dims__(%d, 1, 1) cupynorm_probe() {}'


class CupyRuntime:
    """See cupynorm.cuda.launch.Runtime."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, Module, str], cupy.RawKernel] = {}
        self._devices: dict[int, Device] = {}
        self._locks: defaultdict[tuple[int, Module], threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._has_nvrtc = False

    def on(self, array: Array) -> AbstractContextManager[Any]:
        return array.device

    def device(self) -> Device:
        number = cupy.cuda.runtime.getDevice()
        device = self._devices.get(number)
        return device or self._probe(number)

    def _probe(self, number: int) -> Device:
        """Read the properties of the current device, once."""
        self._load_nvrtc()
        with self._lock:
            if number not in self._devices:
                p = cupy.cuda.runtime.getDeviceProperties(number)
                self._devices[number] = Device(
                    p["name"].decode(),
                    (p["major"], p["minor"]),
                    p["multiProcessorCount"],
                    p["sharedMemPerBlockOptin"],
                    p["l2CacheSize"],
                    _largest_cluster(p["major"], p["sharedMemPerBlockOptin"]),
                )
            return self._devices[number]

    def _load_nvrtc(self) -> None:
        """Load the NVRTC library in one thread, before any compiles.

        CuPy loads it on first use without a lock: a second thread then finds libnvrtc without its builtins.
        """
        with self._lock:
            if not self._has_nvrtc:
                cupy.cuda.nvrtc.getVersion()
                self._has_nvrtc = True

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return cupy.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return cupy.zeros(shape, dtype)

    def address(self, array: Array) -> int:
        return array.data.ptr

    def ready(self, module: Module, step: Step, args: tuple[Any, ...]) -> partial[Any]:
        key = (cupy.cuda.runtime.getDevice(), module, step.name)
        kernel = self._kernels.get(key)
        if kernel is None:
            self.load(module)
            kernel = self._kernels[key]
        if step.cooperative:
            return partial(_launch_cooperative, kernel, step, args)
        return partial(kernel, step.grid, (step.threads,), args, shared_mem=step.shared)

    def load(self, module: Module) -> None:
        """Compile a module for the current device, or load it from CuPy's disk cache: once, whoever else asks."""
        number = cupy.cuda.runtime.getDevice()
        self._load_nvrtc()
        with self._lock:
            lock = self._locks[number, module]
        with lock:
            if (number, module, module.kernels[-1]) in self._kernels:
                return
            # Of the device itself: what is planned for may be less.
            shared = cupy.cuda.runtime.deviceGetAttribute(MAX_SHARED_OPTIN, number)
            for name in module.kernels:
                # CuPy keeps one compiled module for all kernels of the same text and options.
                kernel = cupy.RawKernel(module.source, name, OPTIONS)
                try:
                    function = kernel.kernel  # compiles
                except cupy.cuda.compiler.CompileException as error:
                    raise compile_error(module, error.get_message()) from error
                if shared > DEFAULT_SHARED:
                    kernel.max_dynamic_shared_size_bytes = shared
                if module.group == "cluster" and "cluster16" in name:
                    driver.funcSetAttribute(function.ptr, NON_PORTABLE_CLUSTER, 1)
                self._kernels[number, module, name] = kernel

    def load_all(self, modules: Iterable[Module]) -> None:
        """Load several modules for the current device in parallel.

        The smallest is loaded first, alone: with it CuPy fills its own caches, which it does not lock.
        """
        number = cupy.cuda.runtime.getDevice()
        modules = sorted(modules, key=lambda module: len(module.source))
        for smallest in modules[:1]:
            self.load(smallest)

        def load(module: Module) -> None:
            with cupy.cuda.Device(number):
                self.load(module)

        with ThreadPoolExecutor() as pool:
            list(pool.map(load, modules[1:]))


def _launch_cooperative(kernel: cupy.RawKernel, step: Step, args: tuple[Any, ...]) -> None:
    """The driver's own call: CuPy's would link the device runtime, and make a grid smaller that does not fit."""
    values = [np.asarray(arg) for arg in args]
    pointers = np.array([value.ctypes.data for value in values], np.uintp)
    stream = cupy.cuda.get_current_stream().ptr
    driver.launchCooperativeKernel(
        kernel.kernel.ptr, *step.grid, 1, step.threads, 1, 1, step.shared, stream, pointers.ctypes.data
    )  # fmt: skip


def _largest_cluster(major: int, shared: int) -> int:
    """Most blocks of a cluster on the current device, each with all the shared memory a block can have.

    More than 8 are not promised, and a part of a device (MIG) may have fewer: so it is tried, once.
    """
    for size in (16, 8, 4, 2) if major >= 9 else ():
        kernel = cupy.RawKernel(PROBE % size, "cupynorm_probe", OPTIONS)
        try:
            kernel.max_dynamic_shared_size_bytes = shared
            if size > 8:
                driver.funcSetAttribute(kernel.kernel.ptr, NON_PORTABLE_CLUSTER, 1)
            kernel((size,), (512,), (), shared_mem=shared)
            return size
        except driver.CUDADriverError:
            continue
    return 1
