"""The fake device's library by ctypes: its settings, its counts, and functions for the launch hook."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

#: The names of the counts, in the order of device.h's Counted.
COUNTED = ("mallocs", "copies", "synchronisations", "launches", "modules")


class Launch(ctypes.Structure):
    """device.h's Launch."""

    _fields_ = (
        ("kernel", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("cluster", ctypes.c_uint * 3), ("cooperative", ctypes.c_int),
        ("device", ctypes.c_int), ("parameters", ctypes.c_void_p),
    )  # fmt: skip


HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))


def active() -> bool:
    """Return True if tests/fakegpu/run.py started this process."""
    return "FAKEGPU_BUILT" in os.environ


if active():
    library = ctypes.CDLL(str(Path(os.environ["FAKEGPU_BUILT"], "libfakegpu.so")))
    library.fakegpu_count.restype = ctypes.c_long
    library.fakegpu_name.restype = library.fakegpu_kernel.restype = ctypes.c_char_p
    library.fakegpu_name.argtypes = library.fakegpu_module.argtypes = [ctypes.c_void_p]
    library.fakegpu_kernel.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.fakegpu_module.restype = ctypes.c_void_p
    library.fakegpu_parameter.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER(ctypes.c_int)]
    library.fakegpu_find.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.POINTER(ctypes.c_size_t)] * 3]
    library.fakegpu_hook.argtypes = [HOOK]
    library.fakegpu_set.argtypes = [ctypes.c_char_p, ctypes.c_long]


class DeviceError(Exception):
    """A kernel could not run. The message gives the reason, `code` the driver's error code."""

    def __init__(self, code: int, why: str):
        super().__init__(why)
        self.code = code


def configure(**settings: int) -> None:
    """Change settings; README.md lists them."""
    for name, value in settings.items():
        if not library.fakegpu_set(name.encode(), value):
            raise ValueError(f"the fake GPU has no setting {name}")


def count(what: str, during_capture: bool = False) -> int:
    """Return how often something happened in this process: in total, or while a stream was capturing."""
    return int(library.fakegpu_count(COUNTED.index(what), int(during_capture)))


def find(pointer: int, device: int) -> tuple[int, int, int]:
    """Return the host addresses of a device pointer and of its allocation's start and end."""
    at, low, high = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
    if not library.fakegpu_find(pointer, device, ctypes.byref(at), ctypes.byref(low), ctypes.byref(high)):
        raise DeviceError(700, f"{pointer:#x} is not in device {device}'s memory, or has been freed")
    return at.value, low.value, high.value


def kernels_of(module: int) -> tuple[str, ...]:
    """Return the names of a module's kernels."""
    names = []
    while name := library.fakegpu_kernel(module, len(names)):
        names.append(name.decode())
    return tuple(names)


def parameters_of(kernel: int) -> list[tuple[int, int]]:
    """Return the size and the offset of each of a kernel's parameters."""
    offset, found = ctypes.c_int(), []
    while size := library.fakegpu_parameter(kernel, len(found), ctypes.byref(offset)):
        found.append((size, offset.value))
    return found


def arguments_of(launch: Launch) -> list[bytes]:
    """Return the bytes of each argument of a launch."""
    return [ctypes.string_at(launch.parameters + offset, size) for size, offset in parameters_of(launch.kernel)]
