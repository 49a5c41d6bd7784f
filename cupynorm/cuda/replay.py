"""Replay a traced call: allocate, fill in the kernels' arguments, and prepare the launches.

This module does not use CuPy: a Runtime allocates arrays, returns their addresses and launches. CuPy's is in
runtime.py; the tests have one that runs the same kernels on an emulator, over NumPy arrays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from .._types import Array
from .device import Device
from .plan import Step
from .source import Module

#: What a trace depends on: an array's class, shape, strides in bytes, dtype, address modulo 16, and GPU's number.
Facts = tuple[type, tuple[int, ...], tuple[int, ...], np.dtype, int, int]


class Runtime(Protocol):
    """Allocates arrays, and compiles and runs kernels, on the current device."""

    def __hash__(self) -> int: ...

    def elsewhere(self, array: Array) -> AbstractContextManager[Any] | None:
        """Return a context that makes the array's device current, or None if it is."""

    def device(self) -> Device:
        """Return the current device."""

    def facts(self, arrays: Sequence[Array | None]) -> tuple[Facts | None, ...]:
        """Return the facts of each array. Raise AttributeError, TypeError or ValueError if something is not one."""

    def addresses(self, arrays: Sequence[Array | None]) -> list[Any]:
        """Return the address of each array's first element; 0 for None."""

    def new(self, shape: tuple[int, ...], dtype: Any, size: int, strides: tuple[int, ...] | None) -> partial[Array]:
        """Return a function that makes a new array. size: its bytes; strides: None for C-contiguous."""

    def new_zeros(self, shape: tuple[int, ...], dtype: Any) -> partial[Array]:
        """Return a function that makes a new C-contiguous array of zeros."""

    def memory(self, size: int) -> tuple[Any, int]:
        """Return new memory of so many bytes, for numbers that only kernels see, and its address."""

    def kernel(self, module: Module, step: Step) -> Any:
        """Compile the kernel of a step, and return what `prepare` needs of it."""

    def prepare(self, kernel: Any, arguments: bytes, arrays: list[Any]) -> partial[Any]:
        """Return a partial, of a C function if possible, that enqueues a kernel on the current stream.

        arguments: the memory of the kernel's structure (arguments.py). arrays: the arrays to which it points, and None.
        They live until the launch, as does what is appended to them.
        """


def assignment(target: Array, source: Array) -> partial[None]:
    """Return a copy between arrays of the same dtype, to be run later; of 16-bit ones as bits, for bfloat16's sake."""
    for array in (target, source):
        if not isinstance(array, np.ndarray) and any(n % array.itemsize for n in (array.data.ptr, *array.strides)):
            raise ValueError(
                f"an array of dtype {array.dtype} and strides {array.strides} has elements that are not aligned to "
                "their size, which a GPU cannot access: pass a copy of its bytes in an array of their own"
            )
    if target.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)
    return partial(operator.setitem, target, ..., source)


class Copy(NamedTuple):
    """A copy between two arrays of a call, by their numbers. part: an index into the source; None is all of it."""

    target: int
    source: int
    part: Any = None

    def prepare(self, arrays: Sequence[Array]) -> partial[None]:
        source = arrays[self.source]
        return assignment(arrays[self.target], source if self.part is None else source[self.part])


class Launch(NamedTuple):
    """A launch. pack makes the memory of its arguments from what pick picks from the values of a call."""

    kernel: Any
    pack: Callable[..., bytes]
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]


class Trace(NamedTuple):
    """What a call allocates, copies and launches, if its arrays have certain facts.

    The values of a call, from which the arguments of its kernels are picked, are: the addresses of its arrays and of
    its memory, its numbers, the addresses of parts, and the constants.
    """

    new: tuple[partial[Array], ...]  # make the new arrays
    memory: int  # bytes
    parts: tuple[tuple[int, int], ...]  # the number of an address, and the bytes from there
    constants: tuple[bytes, ...]
    first: tuple[Copy, ...]  # of given arrays that the kernels cannot read
    steps: tuple[Launch | Copy, ...]
    results: tuple[int | None, ...]  # the numbers of the arrays that the call returns
    runtime: Runtime
    device: Device
    invariant: bool

    def holds(self, runtime: Runtime, invariant: bool) -> bool:
        """Return True if a call now, on arrays with the same facts, has this trace."""
        return self.runtime is runtime and self.device is runtime.device() and self.invariant is invariant

    def results_of(self, arrays: Sequence[Any]) -> list[Any]:
        """Return the results among the arrays of a call."""
        return [None if number is None else arrays[number] for number in self.results]

    def replay(self, given: Sequence[Array | None], numbers: Sequence[float]) -> tuple[list[Any], list[partial[Any]]]:
        """Allocate and prepare everything for a call on these arrays. Nothing that exists has been written then.

        Returns:
            The call's arrays, and what is left to do, in order: launches and copies.
        """
        runtime, prepare = self.runtime, self.runtime.prepare
        arrays: list[Any] = [*given]
        for new in self.new:
            arrays.append(new())
        values = runtime.addresses(arrays)
        if self.memory:
            memory, address = runtime.memory(self.memory)
            arrays.append(memory)
            values.append(address)
        values += numbers
        for base, offset in self.parts:
            values.append(values[base] + offset)
        values += self.constants
        for copy in self.first:
            copy.prepare(arrays)()
        prepared = [
            step.prepare(arrays)
            if isinstance(step, Copy)
            else prepare(step.kernel, step.pack(*step.pick(values)), arrays)
            for step in self.steps
        ]
        return arrays, prepared
