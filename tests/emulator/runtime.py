"""Build the CUDA sources with g++ (simt.h, machine.h) and run them on NumPy arrays: a Runtime for
cupynorm.cuda.launch."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import offsets

from cupynorm._checks import reach
from cupynorm.cuda.arguments import POINTER, STRUCTS, leaves
from cupynorm.cuda.device import DEVICES, Device
from cupynorm.cuda.numpy_runtime import NumpyRuntime
from cupynorm.cuda.plan import Step
from cupynorm.cuda.source import OPTIONS, Module

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("CUPYNORM_SIMT_CACHE", Path(tempfile.gettempdir()) / f"cupynorm-simt-{os.getuid()}"))
#: Most modules run once per build: they are compiled quickly, without optimisation; the machine is optimised.
FLAGS = ("-O0", "-shared", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w")
FLAGS += ("-fuse-ld=gold",) if shutil.which("ld.gold") else ()
# Fibers have stacks of their own, which AddressSanitizer cannot follow: it watches the heap. A thread's own arrays are
# watched by their indices.
SANITIZE = ("-fsanitize=address,bounds-strict", "-fno-sanitize-recover=bounds", "--param", "asan-stack=0", "-g1")
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}

Transform = Callable[[str], str]


@lru_cache(maxsize=None)
def _pointer_words(dtype: np.dtype) -> list[int]:
    return [offset // 8 for _, offset, field in leaves(dtype) if field == POINTER]


def pointers(argument: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return a kernel's argument as words of 64 bits, and the indices of the pointers that are not null."""
    found = _pointer_words(argument.dtype)
    words = argument.reshape(1).view(np.uint64 if found else np.uint8)
    return words, [i for i in found if words[i]]


class SimtError(RuntimeError):
    """An error that the emulator found in a launch."""


class _Range(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_size_t), ("high", ctypes.c_size_t),
        ("read", ctypes.c_uint64), ("written", ctypes.c_uint64), ("accesses", ctypes.c_uint64),
    )  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid_x", ctypes.c_uint), ("grid_y", ctypes.c_uint), ("threads", ctypes.c_uint), ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint), ("cooperative", ctypes.c_uint),
        ("order", ctypes.c_int), ("seed", ctypes.c_uint),
        ("ranges", ctypes.POINTER(_Range)), ("range_count", ctypes.c_int),
        ("args", ctypes.POINTER(ctypes.c_void_p)), ("sizes", ctypes.POINTER(ctypes.c_int)), ("kinds", ctypes.c_char_p),
        ("arg_count", ctypes.c_int), ("error", ctypes.c_char * 256),
        ("stacks", ctypes.c_void_p), ("stacks_size", ctypes.c_size_t),
    )  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A source text and the names of its kernels, to build and launch like a Module."""

    file: str
    source: str
    kernels: tuple[str, ...]
    dtype: str = "text"
    constants: str = ""

    def __str__(self) -> str:
        return self.file


def require() -> None:
    """Skip the test where there is no C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")


def source_of(module: Module | Text, transform: Transform | None = None) -> str:
    simt, text = (HERE / "simt.h").read_text(), module.source.removeprefix(module.constants)
    source = f'{module.constants}#line 1 "simt.h"\n{simt}\n{text}'
    if isinstance(module, Module):
        source += offsets.asserted(module, offsets.GCC)
    if transform is not None:
        source = transform(source)
    flush = "false" if re.search("define (STORAGE|INPUT) float64", module.constants) else "true"
    return source + "\n" + "\n".join(f"SIMT_EXPORT({name}, {flush})" for name in module.kernels) + "\n"


def _key(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def _compile(what: str, command: tuple[str, ...]) -> None:
    done = subprocess.run(("g++", *command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SimtError(f"{what} does not compile:\n{done.stderr[:4000]}")


@contextmanager
def _alone(made: Path) -> Iterator[bool]:
    """Yield True if a file does not exist yet. Meanwhile no other process and no other thread makes it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(made.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not made.exists()


@lru_cache(maxsize=None)
def _machine(options: tuple[str, ...]) -> tuple[Path, Path]:
    """Return machine.h, precompiled with these options, and machine.cpp's object: half of the work for most modules."""
    header, source = ((HERE / name).read_text() for name in ("machine.h", "machine.cpp"))
    made = CACHE / f"machine-{_key(header, source, *options)}.h"
    with _alone(made) as missing:
        if missing:
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                text, object_ = Path(folder, "machine.h"), str(Path(folder, "machine.o"))
                text.write_text(header)
                source = str(HERE / "machine.cpp")
                _compile("machine.cpp", (*options, "-O2", "-include", str(text), "-c", source, "-o", object_))
                # After machine.cpp: g++ 12 fails on a header that was precompiled with another -O.
                _compile("machine.h", (*options, "-x", "c++-header", str(text)))
                os.replace(f"{text}.gch", f"{made}.gch")  # where g++ looks for it
                os.replace(object_, made.with_suffix(".o"))
                os.replace(text, made)
    return made, made.with_suffix(".o")


@lru_cache(maxsize=None)
def build(module: Module | Text, transform: Transform | None = None) -> ctypes.CDLL:
    """Return the module as a loaded shared library, built once for each text, for all processes."""
    sanitize = SANITIZE if os.environ.get("CUPYNORM_SIMT_ASAN") else ()
    options = (*OPTIONS, *FLAGS, *sanitize)
    source = source_of(module, transform)
    header, machine = _machine(options)
    library = CACHE / f"{module.file}-{module.dtype}-{_key(header.name, source)}.so"
    with _alone(library) as missing:
        if missing:
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                text, made = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
                text.write_text(source)
                _compile(str(module), (*options, "-include", str(header), str(text), str(machine), "-o", str(made)))
                os.replace(made, library)
    return ctypes.CDLL(str(library))


#: Held by a launch, since the machine can run only one at a time.
_running = threading.Lock()


STACK = 128 * 1024  # bytes per thread (machine.h); pages that it does not touch cost nothing
KEPT = 16 * 1024  # threads whose stacks are kept for the next launch


def _stacks(threads: int) -> mmap.mmap:
    """Return memory for the stacks of `threads` threads that run together."""
    return _kept_stacks() if threads <= KEPT else _new_stacks(threads)


@lru_cache(maxsize=None)
def _kept_stacks() -> mmap.mmap:
    return _new_stacks(KEPT)


def _new_stacks(threads: int) -> mmap.mmap:
    no_reserve = 0x4000 if sys.platform == "linux" else 0
    return mmap.mmap(-1, threads * STACK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)


@dataclass
class Count:
    """For each address given to a launch, the size of the array there, the bytes read and written, and the accesses."""

    kernel: str
    size: dict[int, int]
    read: dict[int, int]
    written: dict[int, int]
    accesses: dict[int, int]


def _bounds(addresses: Sequence[int], arrays: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """Return the first byte and the end of what each address points to. An address within an array is the end of what
    another address points to there."""
    starts: dict[int, tuple[int, int]] = {}
    for array in arrays:
        if array is not None and array.size:
            address = array.ctypes.data
            first, end = reach(array.shape, array.strides, array.itemsize)
            low, high = starts.get(address, (address, address))
            starts[address] = min(low, address + first), max(high, address + end)
    found = {}
    inner = sorted(address for address in addresses if address not in starts)
    for address in addresses:
        low, high = starts.get(address, (address, address))
        if address in inner:
            high = max((end for low, end in starts.values() if low <= address < end), default=address)
        found[address] = low, min([high, *(other for other in inner if address < other < high)])
    return found


class Emulator(NumpyRuntime):
    """A cupynorm.cuda.replay.Runtime over NumPy arrays. device and order may be set; counts lists the launches."""

    def __init__(self, device: Device = DEVICES["H100"], order: str = "forward", transform: Transform | None = None):
        super().__init__(device)
        self.order = order
        self.seed = 0
        self.transform = transform
        self.counts: list[Count] = []

    def allocate(self, size: int) -> np.ndarray:
        """Return poisoned bytes: NaN in every float dtype, -1 in integers."""
        memory = super().allocate(size)
        memory.fill(255)
        return memory

    def kernel(self, module: Module | Text, step: Step) -> tuple[Any, Step]:
        build(module, self.transform)
        return module, step

    def prepare(self, kernel: Any, arguments: Any, arrays: Sequence[Any]) -> partial[None]:
        """arguments: those of a kernel of the package, or a tuple of the parameters of a kernel in a Text."""
        module, step = kernel
        build(module, self.transform)  # not in a launch
        if isinstance(arguments, bytes):
            arguments = (np.frombuffer(bytearray(arguments), STRUCTS[step.kernel]).reshape(()),)
        values = [np.asarray(a) for a in arguments]
        # Not in the launch: it runs no code of the package, in which tests call signal handlers.
        found = list(dict.fromkeys(int(words[i]) for words, indices in map(pointers, values) for i in indices))
        return partial(self.launch, module, step, values, found, _bounds(found, arrays))

    def launch(
        self, module: Module | Text, step: Step, values: list[np.ndarray], addresses: list[int],
        bounds: dict[int, tuple[int, int]],
    ) -> None:  # fmt: skip
        assert step.threads <= 1024
        # Devices invented to be small still have the shared memory that merges need.
        assert step.shared <= max(self._device.shared_per_block, 12 * 1024)
        run = getattr(build(module, self.transform), f"simt_run_{step.name}")  # AttributeError: unknown kernel
        ranges = (_Range * len(addresses))(*(_Range(*bounds[a]) for a in addresses))
        with _running:
            self._launch(run, module, step, values, addresses, ranges)

    def _launch(self, run: Any, module: Any, step: Step, values: Any, addresses: list[int], ranges: Any) -> None:
        self.seed += 1
        together = step.grid[0] * step.grid[1] if step.cooperative else step.cluster
        memory = _stacks(together * step.threads)
        stacks = ctypes.c_char.from_buffer(memory)
        launch = _Launch(
            *step.grid, step.threads, step.shared, step.cluster, step.cooperative, ORDERS[self.order], self.seed,
            ranges, len(addresses),
            (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values)),
            (ctypes.c_int * len(values))(*(v.itemsize for v in values)),
            "".join(v.dtype.kind for v in values).encode(), len(values),
            stacks=ctypes.addressof(stacks), stacks_size=len(memory),
        )  # fmt: skip
        if run(ctypes.byref(launch)):
            raise SimtError(f"{step.name} of {module}: {launch.error.decode()}")
        read, written, accesses = (
            {a: getattr(r, name) for a, r in zip(addresses, ranges, strict=True)}
            for name in ("read", "written", "accesses")
        )
        size = {a: r.high - r.low for a, r in zip(addresses, ranges, strict=True)}
        self.counts.append(Count(step.name, size, read, written, accesses))
