"""Choose what the public functions run on: numpy (alone), compiled (by LLVM), simt (the CUDA kernels on the emulator,
over NumPy arrays), cupy (a GPU).

`use` is for any script whose sys.path has the folder tests:

    with use("simt"):
        y = cupynorm.instance_norm(x)

A test with the fixture `backend` runs once on each available backend, or on each that `@on` names; `backend.array`
makes its arrays.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import sys
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupynorm import cpu, devices, functional
from cupynorm._checks import reach
from cupynorm.backend import MODULES
from cupynorm.cpu import thread_pool
from cupynorm.cuda.device import Device
from cupynorm.cuda.launch import CudaBackend

TESTS = str(Path(__file__).parents[1])
#: Every backend, with the mark of its tests.
BACKENDS: dict[str, Any] = {
    "numpy": (),
    "compiled": pytest.mark.compiled,
    "simt": pytest.mark.simt,
    "cupy": pytest.mark.gpu,
}
#: The last kernels launched in this test, as text, shown when a comparison fails.
LAUNCHED: deque[str] = deque(maxlen=8)


def on(*names: str) -> pytest.MarkDecorator:
    """Run a test with the fixture `backend` on these backends only."""
    assert set(names) <= set(BACKENDS), names
    return pytest.mark.on(*names)


#: For features of the CUDA kernels alone, and of the CPU backend alone.
on_kernels = on("simt", "cupy")
on_cpu = on("numpy", "compiled")


#: Backends that this run does without, though they may be there.
left_out: set[str] = set()


def missing(name: str) -> str:
    """Return why this backend is unavailable here, or "" if it is available."""
    return "not in the quick tier" if name in left_out else _missing(name)


@cache
def _missing(name: str) -> str:
    if name == "compiled":
        return "" if cpu.llvmlite is not None else str(cpu.without_llvmlite)
    if name == "simt":
        return "" if shutil.which("g++") else "no g++ to build the emulator with"
    if name == "cupy":
        usable, why = devices.gpu_status()
        return "" if usable else why
    return ""


def parameters(names: tuple[str, ...] = ()) -> list[Any]:
    """Return parameters of the fixture `backend`: the available backends of `names`, or of all. If there are none, the
    first of `names` stands for them, marked absent."""
    wanted = names or tuple(BACKENDS)
    there = [name for name in wanted if not missing(name)]
    if not there:
        return [pytest.param(wanted[0], marks=[pytest.mark.absent, *_marks(wanted[0])])]
    return [pytest.param(name, marks=_marks(name)) for name in there]


def _marks(name: str) -> list[Any]:
    return [BACKENDS[name]] if BACKENDS[name] else []


@dataclass
class Backend:
    """The backend that a test runs on."""

    name: str
    device: str
    _patch: pytest.MonkeyPatch

    def array(self, host: np.ndarray) -> Any:
        """Return the host array on this backend, with the same strides."""
        if self.name != "cupy":
            return host
        import cupy

        if not host.size:
            return cupy.asarray(host)
        # Copy the memory that the strides span, then take the same view of it.
        low, high = reach(host.shape, host.strides, host.itemsize)
        memory = (ctypes.c_char * (high - low)).from_address(host.ctypes.data + low)
        shift = (host.ctypes.data + low) % 16  # CuPy's own allocations are aligned
        raw = cupy.empty(high - low + 16, np.uint8)
        raw[shift : shift + high - low] = cupy.asarray(np.frombuffer(memory, np.uint8))
        return cupy.ndarray(host.shape, host.dtype, raw.data + (shift - low), host.strides)

    def pretend(self, device: Device) -> None:
        """Plan for this device until the end of the test; no effect on the CPU backend."""
        if self.name == "simt":
            from emulator.backend import runtime

            self._patch.setattr(runtime, "_device", device)
        elif self.name == "cupy":
            from cupynorm.cuda.backend import runtime

            real = runtime.device()
            limited = replace(
                device,
                sm_count=min(device.sm_count, real.sm_count),
                shared_per_block=min(device.shared_per_block, real.shared_per_block),
                cluster=min(device.cluster, real.cluster),
            )
            self._patch.setitem(runtime._devices, int(self.device[5:]), limited)

    def host(self, array: Any) -> np.ndarray:
        return devices.to_host(array)


@contextmanager
def use(name: str, runtime: Any = None) -> Iterator[Backend]:
    """Run the public functions on a backend within the block. Not for several threads at once: it patches the package.

    Args:
        name: "numpy", "compiled", "simt" or "cupy".
        runtime: under "simt", a runtime in place of the emulator's, such as a `recorder.Recorder`.

    Raises:
        ValueError: there is no such backend. RuntimeError: it is not available here; the message says why.
    """
    if name not in BACKENDS:
        raise ValueError(f"a backend is one of {', '.join(BACKENDS)}, got {name!r}")
    if why := missing(name):
        raise RuntimeError(f"the backend {name} is not available: {why}")
    with pytest.MonkeyPatch.context() as patch:
        yield started(name, patch, runtime)


def started(name: str, patch: pytest.MonkeyPatch, runtime: Any = None) -> Backend:
    """Run the public functions on this backend until the patch is undone. runtime: see `use`."""
    if name in ("numpy", "compiled"):
        patch.setitem(MODULES, "cpu", "cupynorm.cpu")
        use_compiled(patch, name == "compiled")
        patch.setattr(functional, "_known", {})  # of other settings
        return Backend(name, "cpu", patch)
    if name == "simt":
        if TESTS not in sys.path:
            patch.syspath_prepend(TESTS)
        emulated = importlib.import_module("emulator.backend")
        runtime = runtime or emulated.runtime
        patch.setattr(emulated, "backend", CudaBackend(runtime))
        patch.setitem(MODULES, "cpu", "emulator.backend")
    else:
        from cupynorm.cuda.backend import runtime
    note_launches(runtime, patch)
    return Backend(name, "cpu" if name == "simt" else "cuda:0", patch)


def note_launches(runtime: Any, patch: pytest.MonkeyPatch) -> None:
    """Record the runtime's launches in LAUNCHED until the end of the test."""
    prepare = runtime.prepare
    LAUNCHED.clear()

    def noted(kernel: Any, arguments: Any, arrays: Any) -> Any:
        module, step = kernel[:2]
        parts = [module.dtype, *(getattr(module, name, "") for name in ("kind", "group"))]
        parts += [f"vec_size {module.vec_size}"] if hasattr(module, "vec_size") else []
        parts += ["misaligned"] if getattr(module, "misaligned", False) else []
        parts += [f"epilogue {module.epilogue}"] if getattr(module, "epilogue", 0) else []
        told = f"{step.name} of {module.file}.cu ({', '.join(filter(None, parts))})"
        if told in LAUNCHED:
            LAUNCHED.remove(told)
        LAUNCHED.append(told)
        return prepare(kernel, arguments, arrays)

    patch.setattr(runtime, "prepare", noted)


def use_compiled(patch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Turn the compiled loops on or off until the patch is undone; skip the test if there are none."""
    if wanted and cpu.llvmlite is None:
        pytest.skip(f"no compiled loops: {cpu.without_llvmlite}")
    patch.setattr(cpu, "compiled", wanted)


@contextmanager
def traced_memory() -> Iterator[None]:
    """Run tracemalloc, and end the helper threads before it stops.

    Compiled loops allocate without Python's lock. If another thread does so just then, tracemalloc.stop crashes the
    process (CPython 3.11, in a loop of starts and stops beside any compiled function that allocates).
    """
    tracemalloc.start()
    try:
        yield
    finally:
        thread_pool._state.pool.end()
        thread_pool._state.pool = thread_pool._Pool()
        tracemalloc.stop()


def peak_of(call: Callable[[], Any]) -> int:
    """Return the peak of NumPy's allocations during a call, in bytes."""
    with traced_memory():
        call()
        return tracemalloc.get_traced_memory()[1]
