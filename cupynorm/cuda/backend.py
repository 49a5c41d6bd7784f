"""The CuPy backend: the launches of launch.py on the CuPy runtime."""

from .launch import CudaBackend
from .runtime import CupyRuntime
from .source import core_modules

runtime = CupyRuntime()
backend = CudaBackend(runtime)


def load_core() -> None:
    """Compile the core kernels for the current device, or load them from CuPy's disk cache."""
    runtime.load_all(core_modules())
