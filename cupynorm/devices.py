"""Devices and dtypes by name: which GPU is usable, and explicit moves of arrays."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from ._checks import check_result_dtype


@lru_cache(maxsize=None)
def gpu_status() -> tuple[bool, str]:
    """Return whether a GPU is usable, and the reason if not, else the number of GPUs and the current one.

    The driver is queried first, so that CuPy is imported only on machines with a GPU.
    """
    try:
        missing = importlib.util.find_spec("cupy") is None
    except (ImportError, ValueError):  # an import hook, or a stub in place of CuPy
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
    except Exception as error:  # CuPy can fail to start in many ways: report the reason, never raise
        return False, f"CuPy does not start: {type(error).__name__}: {error}"
    return True, f"{count.value} visible, current is cuda:{current}"


def resolve(device: str | None) -> str:
    """Return 'cpu' or 'cuda:<number>' for a user's device; None is the GPU if one is usable, else the CPU."""
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


def to_host(array: Any, name: str = "array") -> np.ndarray:
    """Return a NumPy array with the same values. bfloat16 and float8 of a PyTorch tensor become float32, exactly."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy.asnumpy(array)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_torch(array, name, torch)
    return np.asarray(array)


def _of_torch(tensor: Any, name: str, torch: Any) -> np.ndarray:
    """Return a PyTorch tensor's numbers. Raise TypeError if it has none, or none that NumPy can represent."""
    refused = ""
    if torch.nn.parameter.is_lazy(tensor):
        refused = "is not initialized: save the state after a first forward of its model"
    elif tensor.is_meta:
        refused = "is on the device meta and has no values: load the file with map_location='cpu'"
    elif tensor.is_nested:
        refused = "is nested: take one of its parts, tensor.unbind()[i]"
    elif tensor.layout != torch.strided:
        refused = f"has the layout {tensor.layout}: convert it with tensor.to_dense()"
    elif tensor.is_quantized:
        refused = f"is quantized ({tensor.dtype}): convert it with tensor.dequantize()"
    elif tensor.is_complex():
        refused = f"is complex ({tensor.dtype}); needed are real numbers: take tensor.real or tensor.imag"
    elif tensor.numel() and not tensor.untyped_storage().nbytes():
        refused = "has no values, as its memory has been freed: gather it (FSDP's full state_dict) before saving it"
    if refused:
        raise TypeError(f"{name} is a PyTorch tensor that {refused}")
    tensor = tensor.detach().cpu()
    narrow = tensor.dtype == torch.bfloat16 or (tensor.dtype.is_floating_point and tensor.element_size() == 1)
    try:
        return (tensor.float() if narrow else tensor).numpy(force=True)
    except (TypeError, RuntimeError) as error:  # a dtype that NumPy lacks, or a subclass with its own behaviour
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__} of {tensor.dtype}"
        raise TypeError(
            f"{name} is a {kind}, which NumPy cannot represent ({error}): convert it to a plain tensor of torch.float32"
        ) from error


def to_device(array: np.ndarray, device: str) -> Any:
    """Copy a NumPy array to a device ('cpu': return the array itself)."""
    if device == "cpu":
        return array
    import cupy

    with cupy.cuda.Device(int(device.partition(":")[2])):
        return cupy.asarray(array)


def dtype_of(dtype: Any) -> np.dtype:
    """Return a NumPy dtype, also for the name 'bfloat16' (which needs ml_dtypes)."""
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


def result_dtype_of(dtype: Any) -> np.dtype:
    """Return the dtype of a result, which must be one that kernels write."""
    dtype = dtype_of(dtype)
    check_result_dtype(dtype)
    return dtype
