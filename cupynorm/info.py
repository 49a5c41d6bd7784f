"""`python -m cupynorm info`: facts for a bug report. An unknown fact gives the reason and is no error."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, devices
from .config import get_num_threads
from .cuda.source import kernel_folder

CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
#: Extras and their modules.
OPTIONAL = {"cpu": ("llvmlite",), "bf16": ("ml_dtypes",), "demo": ("matplotlib", "rich", "sklearn")}
ENVIRONMENT = re.compile("CUPYNORM_|CUPY_|CUDA_|NVIDIA_VISIBLE_DEVICES$|OMP_")


def attempt(fact: Callable[[], str]) -> str:
    """Return the fact, or why it is not known. The home folder becomes ~, since reports are published."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = fact()
    except Exception as error:
        text = f"not known: {type(error).__name__}: {error}"
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?=[/\\]|$)", "~", text, flags=re.M) if len(home) > 1 else text


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def cupy_packages() -> list[str]:
    """The CuPy distributions installed, as name==version. More than one is a broken installation."""
    found = []
    for name in CUPY_PACKAGES:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_cuda() -> int:
    """The newest CUDA that the driver supports, as 1000 * major + 10 * minor. OSError without a driver."""
    version = ctypes.c_int()
    ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


# The facts


def python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()})"


def machine() -> str:
    return f"{platform.platform()}, {os.cpu_count()} CPUs"


def driver() -> str:
    try:
        supports = f"supports CUDA {cuda_version(driver_cuda())}"
    except OSError as error:
        return f"none found ({error})"
    proc = Path("/proc/driver/nvidia/version")
    release = re.search(r"\s(\d+\.\d+[.\d]*)\s", proc.read_text()) if proc.is_file() else None
    return f"{release[1]}, {supports}" if release else supports


def cupy() -> str:
    packages = ", ".join(cupy_packages())
    if not has("cupy"):
        return "not installed" + (f", though pip lists {packages}" if packages else "")
    import cupy

    return f"{cupy.__version__} ({packages or 'not installed by pip'})"


def cuda_runtime() -> str:
    if not has("cupy"):
        return "comes with CuPy"
    from cupy.cuda import runtime

    return cuda_version(runtime.runtimeGetVersion())


def nvrtc() -> str:
    if not has("cupy"):
        return "comes with CuPy"
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def gpus() -> str:
    usable, why = devices.gpu_status()
    if not usable:
        return f"none usable: {why}"
    from cupy.cuda import runtime

    return "\n".join(gpu(index, runtime.getDeviceProperties(index)) for index in range(runtime.getDeviceCount()))


def gpu(index: int, facts: dict[str, Any]) -> str:
    capability = f"compute capability {facts['major']}.{facts['minor']}"
    memory = f"{facts['totalGlobalMem'] / 2**30:.1f} GiB"
    return f"cuda:{index} {facts['name'].decode()}, {capability}, {memory}, {facts['multiProcessorCount']} SMs"


def backends() -> str:
    from . import cpu

    usable, why = devices.gpu_status()
    loops = f"llvmlite {cpu.llvmlite.__version__}" if cpu.llvmlite is not None else f"no ({cpu.without_llvmlite})"
    numpy = f"usable, {get_num_threads()} thread(s), compiled loops: {loops}"
    return f"numpy: {numpy}\ncupy: {'usable' if usable else 'not usable'}: {why}"


def ml_dtypes() -> str:
    return importlib.metadata.version("ml_dtypes") if has("ml_dtypes") else "not installed"


def kernel_sources() -> str:
    folder = kernel_folder()
    return f"{folder} ({len([*folder.glob('*.cu'), *folder.glob('*.cuh')])} files)"


def kernel_cache() -> str:
    """CuPy's folder of compiled kernels, which other users of CuPy share."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))
    if not folder.is_dir():
        return f"{folder} (does not exist)"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"


def loop_cache() -> str:
    """The folder of the CPU backend's compiled loops."""
    from . import cpu

    if cpu.llvmlite is None:
        return "no compiled loops"
    from .cpu import llvm_machine

    folder = llvm_machine.folder()
    why = llvm_machine.not_kept()
    if why:
        return f"none, the loops are compiled anew in each process: {why}"
    sizes = [path.stat().st_size for path in folder.glob("*.bin")]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**10:.0f} KiB, for {llvm_machine.processor()})"


def environment() -> str:
    return "\n".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if ENVIRONMENT.match(k)) or "nothing set"


def missing() -> str:
    """List missing packages, each with the command that installs it."""
    lines = []
    packages = cupy_packages()
    try:
        extra = "cuda13" if driver_cuda() >= 13000 else "cuda12"
    except OSError:
        extra = ""
        lines.append("no NVIDIA driver: only the numpy backend works")
    install = f"pip install 'cupynorm[{extra or 'cuda12'}]'"
    if len(packages) > 1:
        names = " ".join(package.partition("==")[0] for package in packages)
        lines.append(f"more than one CuPy, and they conflict: pip uninstall -y {names} && {install}")
    elif not has("cupy"):
        lines.append(f"CuPy{'' if extra else ' (of no use without a GPU)'}: {install}")
    elif nvrtc_missing():
        lines.append(f"NVRTC, which compiles the kernels: {install}")
    for optional, modules in OPTIONAL.items():
        absent = [module for module in modules if not has(module)]
        if absent:
            lines.append(f"{', '.join(absent)}: pip install 'cupynorm[{optional}]'")
    return "\n".join(lines) or "nothing"


def nvrtc_missing() -> bool:
    try:
        return not nvrtc()
    except Exception:  # whatever the reason is, the advice is to install it
        return True


FACTS: dict[str, Callable[[], str]] = {
    "cupynorm": lambda: f"{__version__} in {Path(__file__).parent}",
    "Python": python,
    "platform": machine,
    "NumPy": lambda: np.__version__,
    "ml_dtypes": ml_dtypes,
    "CuPy": cupy,
    "CUDA runtime": cuda_runtime,
    "NVRTC": nvrtc,
    "NVIDIA driver": driver,
    "GPUs": gpus,
    "backends": backends,
    "kernel sources": kernel_sources,
    "kernel cache": kernel_cache,
    "loop cache": loop_cache,
    "environment": environment,
    "missing": missing,
}


def report() -> str:
    """The facts as aligned lines of plain text. Never raises."""
    width = max(map(len, FACTS)) + 2
    return "\n".join(
        f"{label:<{width}}" + attempt(fact).replace("\n", "\n" + " " * width) for label, fact in FACTS.items()
    )
