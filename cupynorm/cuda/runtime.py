"""The CuPy runtime: compiles each kernel once for each device, and launches it on the current stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import cupy
from cupy_backends.cuda.api import driver

from .._types import Array
from . import clusters
from .arguments import STRUCTS
from .device import Device
from .plan import Step
from .replay import Facts
from .source import OPTIONS, Module, compile_error

alloc, get_current_stream, current_device = (
    cupy.cuda.alloc, cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice,
)  # fmt: skip

# The shared memory that a launch may use without opting in, and cudaDevAttrMaxSharedMemoryPerBlockOptin.
DEFAULT_SHARED = 48 * 1024
MAX_SHARED_OPTIN = 97


class _Kernel(NamedTuple):
    """A loaded kernel, and the driver's handle of it."""

    raw: cupy.RawKernel
    function: int


class _Launch(NamedTuple):
    """The driver's function for a step, and its arguments before the stream and after the kernel's arguments."""

    module: Module
    step: Step
    launch: Callable[..., Any]
    before: tuple[int, ...]
    after: tuple[int, ...]
    memory: Any  # a type: the address of the kernel's arguments, followed by themselves
    pack: Callable[..., None]


def _strided(shape: tuple[int, ...], dtype: Any, size: int, strides: tuple[int, ...]) -> Array:
    return cupy.ndarray(shape, dtype, alloc(size), strides)


class CupyRuntime:
    """See cupynorm.cuda.replay.Runtime."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, Module, str], _Kernel] = {}
        self._devices: dict[int, Device] = {}
        # Held while Python code runs: other threads wait, so each module is compiled once. A signal handler may take
        # them again in the middle of a load, and loads everything itself: loading twice gives the same result.
        self._locks: defaultdict[tuple[int, Module], Any] = defaultdict(threading.RLock)
        self._lock = threading.RLock()
        self._has_nvrtc = False
        self._thread = threading.local()  # contexts: the devices that a thread has used

    def elsewhere(self, array: Array) -> AbstractContextManager[Any] | None:
        return None if array.data.device_id == current_device() else array.device

    def device(self) -> Device:
        number = current_device()
        try:
            if number in self._thread.contexts:
                return self._devices[number]
        except (AttributeError, KeyError):
            pass
        self._make_context(number)
        return self._devices.get(number) or self._probe(number)

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

    def facts(self, arrays: Sequence[Array | None]) -> tuple[Facts | None, ...]:
        return tuple(
            [
                None if a is None else (type(a), a.shape, a.strides, a.dtype, (data := a.data).ptr % 16, data.device_id)
                for a in arrays
            ]
        )

    def addresses(self, arrays: Sequence[Array | None]) -> list[Any]:
        return [0 if array is None else array.data.ptr for array in arrays]

    def new(self, shape: tuple[int, ...], dtype: Any, size: int, strides: tuple[int, ...] | None) -> partial[Array]:
        if strides is None:  # CuPy finds a class a quarter of a microsecond faster than a dtype
            return partial(cupy.ndarray, shape, dtype.type if dtype.isbuiltin == 1 else dtype)
        return partial(_strided, shape, dtype, size, strides)

    def new_zeros(self, shape: tuple[int, ...], dtype: Any) -> partial[Array]:
        return partial(cupy.zeros, shape, dtype)

    def memory(self, size: int) -> tuple[Any, int]:
        memory = alloc(size)
        return memory, memory.ptr

    def kernel(self, module: Module, step: Step) -> _Launch:
        number = current_device()
        key = (number, module, step.name)
        if key not in self._kernels:
            self.load(module)
        numbers = (self._kernels[key].function, *step.grid, 1, step.threads, 1, 1, step.shared)
        size = STRUCTS[step.kernel].itemsize
        # Call the driver itself: CuPy's cooperative launch would link the device runtime and shrink a grid that does
        # not fit, and its RawKernel takes 10 µs to inspect each argument.
        launch, after = (driver.launchCooperativeKernel, ()) if step.cooperative else (driver.launchKernel, (0,))
        memory = ctypes.c_char * (8 + size)
        return _Launch(module, step, launch, numbers, after, memory, struct.Struct(f"Q{size}s").pack_into)

    def prepare(self, kernel: _Launch, arguments: bytes, arrays: list[Any]) -> partial[Any]:
        memory = kernel.memory()
        address = ctypes.addressof(memory)
        kernel.pack(memory, 0, address + 8, arguments)
        arrays.append(memory)
        return partial(kernel.launch, *kernel.before, get_current_stream().ptr, address, *kernel.after)

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
        number = current_device()
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
        number = current_device()
        modules = sorted(modules, key=lambda module: len(module.source))
        for smallest in modules[:1]:
            self.load(smallest)

        def load(module: Module) -> None:
            with cupy.cuda.Device(number):
                self.load(module)

        with ThreadPoolExecutor() as pool:
            list(pool.map(load, modules[1:]))
