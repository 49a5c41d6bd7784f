"""The CUDA backend on the emulator, in place of the NumPy backend: the whole public path runs through it."""

from cupynorm.cuda.launch import CudaBackend

from .runtime import Emulator

runtime = Emulator()
backend = CudaBackend(runtime)
