"""Devices and dtypes by name: which GPU is usable, and explicit moves of arrays."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(maxsize=None)
def gpu_status() -> tuple[bool, str]:
    """Whether a GPU is usable, and why not or which.

    The driver is asked first, so that CuPy is imported only where there is a GPU for it.
    """
    try:
        missing = importlib.util.find_spec("cupy") is None
    except (ImportError, ValueError):  # an import hook or a stub in its place
        missing = True
    if missing:
        return False, "CuPy is not installed: pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False, "no NVIDIA driver is installed"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return False, f"the NVIDIA driver reports error {status}"
    if count.value == 0:
        return False, "the NVIDIA driver sees no device"
    try:
        import cupy

        current = cupy.cuda.Device().id
    except Exception as error:  # CuPy has many ways not to start; each is a reason, none is ours to raise
        return False, f"CuPy does not start: {type(error).__name__}: {error}"
    return True, f"{count.value} visible, current is cuda:{current}"


def resolve(device: str | None) -> str:
    """'cpu' or 'cuda:<number>' for what a user may write; None is the GPU where one is usable, else the CPU."""
    if device is None:
        return resolve("cuda") if gpu_status()[0] else "cpu"
    if not isinstance(device, str):
        raise TypeError(f"device must be 'cpu', 'cuda', 'cuda:<number>' or None, got {device!r}")
    kind, _, number = device.partition(":")
    if device == "cpu":
        return device
    if kind != "cuda" or (device != "cuda" and not number.isdecimal()):
        raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:<number>' or None, got {device!r}")
    usable, why = gpu_status()
    if not usable:
        raise RuntimeError(f"device {device!r} is not usable: {why}")
    import cupy

    index = int(number) if number else cupy.cuda.Device().id
    if index >= cupy.cuda.runtime.getDeviceCount():
        raise ValueError(f"device {device!r}: there are {cupy.cuda.runtime.getDeviceCount()} GPUs")
    return f"cuda:{index}"


def to_host(array: Any) -> np.ndarray:
    """A NumPy array of the same contents; a PyTorch tensor's bfloat16 as float32, which holds every value of it."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy.asnumpy(array)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    return np.asarray(array)


def to_device(array: np.ndarray, device: str) -> Any:
    """The contents of a NumPy array on a device ('cpu': the array itself)."""
    if device == "cpu":
        return array
    import cupy

    with cupy.cuda.Device(int(device.partition(":")[2])):
        return cupy.asarray(array)


def dtype_of(dtype: Any) -> np.dtype:
    """A NumPy dtype, also from the name 'bfloat16' (which needs ml_dtypes)."""
    if dtype == "bfloat16" if isinstance(dtype, str) else False:
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError("bfloat16 needs ml_dtypes: pip install 'cupynorm[bf16]'") from None
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}") from None
