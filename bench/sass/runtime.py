"""A runtime that executes machine code on NumPy arrays: a cupynorm.cuda.replay.Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cupynorm.cuda.device import Device
from cupynorm.cuda.plan import Step
from cupynorm.cuda.replay import Facts
from cupynorm.cuda.source import Module

from . import listing
from .machine import Block


class Launched(NamedTuple):
    """A launch: how many of its blocks ran, and the warp-instructions that they issued, by operation."""

    module: Module
    step: Step
    blocks: int
    issued: Counter[str]


class SassRuntime:
    """Executes all blocks of each launch, or the first ones only. launched: a list of the launches.

    Args:
        device: the device that calls are planned for.
        first: how many blocks to run, a multiple of a cluster's, or None for all.
    """

    def __init__(self, device: Device, first: int | None = None):
        self._device, self.first = device, first
        self.launched: list[Launched] = []

    def elsewhere(self, array: Any) -> None:
        return None

    def device(self) -> Device:
        return self._device

    def facts(self, arrays: Sequence[Any]) -> tuple[Facts | None, ...]:
        return tuple(
            None if a is None else (type(a), a.shape, a.strides, a.dtype, a.ctypes.data % 16, 0) for a in arrays
        )

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        return [0 if array is None else array.ctypes.data for array in arrays]

    def new(self, shape: tuple[int, ...], dtype: Any, size: int, strides: Any) -> partial[np.ndarray]:
        return partial(lambda: np.ndarray(shape, dtype, self.memory(size)[0], strides=strides))

    def new_zeros(self, shape: tuple[int, ...], dtype: Any) -> partial[np.ndarray]:
        return partial(np.zeros, shape, dtype)

    def memory(self, size: int) -> tuple[np.ndarray, int]:
        whole = np.zeros(size + 256, np.uint8)  # which takes no memory until it is written
        memory = whole[-whole.ctypes.data % 256 :][:size]
        return memory, memory.ctypes.data

    def kernel(self, module: Module, step: Step) -> tuple[Module, Step]:
        return module, step

    def prepare(self, kernel: tuple[Module, Step], arguments: bytes, arrays: list[Any]) -> partial[None]:
        return partial(self._launch, *kernel, arguments, [*arrays])

    def _launch(self, module: Module, step: Step, arguments: bytes, arrays: list[Any]) -> None:
        code = listing.compiled(module.source)[step.name]
        together = step.tiles if step.cooperative else step.cluster
        count = step.grid[0] * step.grid[1]
        if self.first is not None:
            count = min(count, -(-self.first // together) * together)
        issued: Counter[str] = Counter()
        for start in range(0, count, count if step.cooperative else together):
            blocks = range(start, start + (count if step.cooperative else together))
            block = Block(code, step, blocks, arguments, arrays)
            block.run()
            issued += block.issued
        self.launched.append(Launched(module, step, count, issued))
