"""Settings: each has an environment variable CUPYNORM_*, read at first use, and a default; some have a setter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from . import cpu_count
from ._checks import check_count

T = TypeVar("T")


class Setting(Generic[T]):
    """A value that is set by the program, else by an environment variable, else by default.

    Args:
        variable: name of the environment variable. Unset or blank, it means the default.
        needed: the texts it accepts, for the error message.
        read: function from the variable's text to the value; None if the text is not accepted.
        default: function that returns the default.
    """

    def __init__(self, variable: str, needed: str, read: Callable[[str], T | None], default: Callable[[], T]):
        self.variable, self.needed, self.read, self.default = variable, needed, read, default
        self.given: T | None = None  # by the program
        self.found: T | None = None  # in the environment, or by default; None: not read yet

    def get(self) -> T:
        """Return the value; ValueError if the environment variable has another text than it accepts."""
        if self.given is not None:
            return self.given
        if self.found is None:
            text = os.environ.get(self.variable, "").strip()
            value = self.read(text) if text else self.default()
            if value is None:
                raise ValueError(f"{self.variable} must be {self.needed}, got {text!r}")
            self.found = value
        return self.found

    def set(self, value: T) -> None:
        self.given = value


def _switch(variable: str, default: bool) -> Setting[bool]:
    return Setting(variable, "0 or 1", {"0": False, "1": True}.get, lambda: default)


def _threads(text: str) -> int | None:
    return cpu_count.openmp_limited(int(text)) if text.isdecimal() and int(text) else None


def _user_cache() -> Path:
    """Return the user's folder for caches, by the custom of the system."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


#: Whether importing the package compiles the core kernels where a GPU is usable.
eager = _switch("CUPYNORM_EAGER", True)
#: Whether the CPU backend compiles its loops where llvmlite is installed.
compiled = _switch("CUPYNORM_COMPILED", True)
cache_folder = Setting("CUPYNORM_CACHE_DIR", "a folder", str, lambda: str(_user_cache() / "cupynorm"))
batch_invariant = _switch("CUPYNORM_BATCH_INVARIANT", False)
memory_limit = Setting(
    "CUPYNORM_MEMORY_LIMIT", "a number of bytes", lambda text: int(text) if text.isdecimal() else None, lambda: 2**30
)
num_threads = Setting(
    "CUPYNORM_NUM_THREADS", "a positive integer", _threads, lambda: cpu_count.openmp_limited(cpu_count.available_cpus())
)

#: Functions to call with a new memory limit.
on_memory_limit: list[Callable[[int], None]] = []


def get_num_threads() -> int:
    """Return how many threads a call on NumPy arrays may use now, including its own: see `set_num_threads`."""
    if num_threads.given is not None:
        return num_threads.given
    return min(num_threads.get(), *limits) if (limits := cpu_count.library_limits()) else num_threads.get()


def set_num_threads(number: int) -> None:
    """Set how many threads a call on NumPy arrays may use, including its own. Small calls use fewer.

    The default is the smallest of these numbers, as far as they exist:

    - CUPYNORM_NUM_THREADS from the environment, or else the processors this process may use (affinity and container
      limits);
    - OMP_NUM_THREADS (the first number of a list) and OMP_THREAD_LIMIT from the environment, which joblib and dask set
      for their workers; values other than positive integers are ignored;
    - once threadpoolctl is imported, the current number of threads of BLAS and OpenMP libraries: `threadpool_limits`;
    - in workers of a PyTorch DataLoader, `torch.get_num_threads()`, by default 1 there.

    The environment is read at first use. The number changes no bit of a result.

    Args:
        number: at least 1.

    Raises:
        TypeError: not an integer. The setting is unchanged then.
        ValueError: less than 1. The setting is unchanged then.
    """
    num_threads.set(check_count(number, "number of threads", 1))


def get_memory_limit() -> int:
    """Return how many bytes of freed results are kept for new results, on the CPU: see `set_memory_limit`."""
    return memory_limit.get()


def set_memory_limit(limit: int) -> None:
    """Set how many bytes of freed results are kept for new results, on the CPU.

    Memory over the limit is given back to the system at once, the oldest first; 0 keeps nothing. The default is
    CUPYNORM_MEMORY_LIMIT from the environment, or 1 GiB. On a GPU, CuPy's own pool keeps memory.

    Args:
        limit: bytes, at least 0.

    Raises:
        TypeError: not an integer. The setting is unchanged then.
        ValueError: less than 0. The setting is unchanged then.
    """
    memory_limit.set(check_count(limit, "memory limit", 0))
    for trim in on_memory_limit:
        trim(memory_limit.get())


def get_batch_invariant() -> bool:
    """Return whether, on a GPU, the bits of a sample's results are the same in every batch."""
    return batch_invariant.get()


def set_batch_invariant(wanted: bool) -> None:
    """Set whether, on a GPU, the bits of a sample's results are the same in every batch.

    By default a kernel is chosen by the size of the whole call, and elements are assigned to threads by their
    addresses: the order of summation depends on N and, in planes that are not whole multiples of 16 bytes, on their
    place in memory. If this is on, y, dx, means and deviations of a sample, and its results of a double backward,
    depend neither on the number of samples, on the other samples, on its place among them, nor on whether arrays are
    views or new ones: only on whether they are channels-first or channels-last. Some calls are slower then: with few
    channels and many samples a plane may be split among more threads than necessary, unaligned planes are stored one
    element at a time, and views are copied first if there are gaps between planes of at most 512 bytes, or if groups
    of 4 channels side by side (2 in float64) are not aligned to their size. Gradients of parameters and running
    statistics are sums over the batch and depend on it. On a CPU the bits of a sample never depend on the batch, but
    views with gaps may be summed in another order than new arrays.

    The default is CUPYNORM_BATCH_INVARIANT from the environment (0 or 1), or off.

    Args:
        wanted: on or off.

    Raises:
        TypeError: not a bool. The setting is unchanged then.
    """
    if type(wanted) is not bool:
        raise TypeError(f"batch_invariant must be True or False, got {wanted!r}")
    batch_invariant.set(wanted)


def _after_fork() -> None:
    num_threads.found = None  # workers may have an environment of their own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
