"""The CuPy runtime: compiles each kernel once for each device, and launches it on the current stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import cupy
from cupy_backends.cuda.api import driver

from .._types import Array
from . import clusters
from .device import Device
from .plan import Step
from .source import OPTIONS, Module, compile_error

# The shared memory that a launch may use without opting in, and cudaDevAttrMaxSharedMemoryPerBlockOptin.
DEFAULT_SHARED = 48 * 1024
MAX_SHARED_OPTIN = 97


class _Kernel(NamedTuple):
    """A loaded kernel, and the driver's handle of it."""

    raw: cupy.RawKernel
    function: int


def _in_c(arguments: bytearray) -> ctypes.Array[Any]:
    """Return the memory that the driver reads at a launch: the address of the arguments, followed by themselves."""
    memory = ctypes.create_string_buffer(8 + len(arguments))
    struct.pack_into(f"Q{len(arguments)}s", memory, 0, ctypes.addressof(memory) + 8, arguments)
    return memory


class CupyRuntime:
    """See cupynorm.cuda.launches.Runtime."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, Module, str], _Kernel] = {}
        self._devices: dict[int, Device] = {}
        # Held while Python code runs: other threads wait, so each module is compiled once. A signal handler may take
        # them again in the middle of a load, and loads everything itself: loading twice gives the same result.
        self._locks: defaultdict[tuple[int, Module], Any] = defaultdict(threading.RLock)
        self._lock = threading.RLock()
        self._has_nvrtc = False
        self._thread = threading.local()  # contexts: the devices that a thread has used

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
                    clusters.largest_cluster(p["major"], p["sharedMemPerBlockOptin"], p["multiProcessorCount"]),
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

    def prepare(self, module: Module, step: Step, arguments: bytearray) -> partial[Any]:
        number = cupy.cuda.runtime.getDevice()
        key = (number, module, step.name)
        kernel = self._kernels.get(key)
        if kernel is None:
            self.load(module)
            kernel = self._kernels[key]
        self._make_context(number)
        memory = _in_c(arguments)
        stream = cupy.cuda.get_current_stream().ptr
        numbers = (kernel.function, *step.grid, 1, step.threads, 1, 1, step.shared, stream, ctypes.addressof(memory))
        # Call the driver itself: CuPy's cooperative launch would link the device runtime and shrink a grid that does
        # not fit, and its RawKernel takes 10 µs to inspect each argument.
        launch = (
            partial(driver.launchCooperativeKernel, *numbers)
            if step.cooperative
            else partial(driver.launchKernel, *numbers, 0)
        )
        launch.arguments = memory  # type: ignore[attr-defined]  # lives as long as the launch
        return launch

    def _make_context(self, number: int) -> None:
        """Give the calling thread a context on its current device: the driver's calls need it."""
        try:
            known = self._thread.contexts
        except AttributeError:
            known = self._thread.contexts = set()
        if number not in known:
            cupy.cuda.runtime.memGetInfo()
            known.add(number)

    def load(self, module: Module) -> None:
        """Compile a module for the current device, or load it from CuPy's disk cache: once for all threads."""
        number = cupy.cuda.runtime.getDevice()
        self._load_nvrtc()
        with self._lock:
            lock = self._locks[number, module]
        with lock:
            if (number, module, module.kernels[-1]) in self._kernels:
                return
            # The device's own limit, since plans may be made for a device with less.
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
                if "cluster16" in name:
                    driver.funcSetAttribute(function.ptr, clusters.NON_PORTABLE, 1)
                self._kernels[number, module, name] = _Kernel(kernel, function.ptr)

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
