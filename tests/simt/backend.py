"""The CUDA backend on the emulator, in the place of the NumPy backend: the whole public path runs over it."""

from cupynorm.cuda.launch import Launcher

from .emulator import Emulator

runtime = Emulator()
launcher = Launcher(runtime)
forward = launcher.forward
backward = launcher.backward
double_backward = launcher.double_backward
