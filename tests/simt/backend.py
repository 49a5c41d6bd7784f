"""The CUDA backend on the emulator, in the place of the NumPy backend: the whole public path runs over it."""

from cupynorm.cuda.launch import CudaBackend

from .emulator import Emulator

runtime = Emulator()
backend = CudaBackend(runtime)
