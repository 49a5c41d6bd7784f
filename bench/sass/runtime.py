"""A runtime that executes machine code on NumPy arrays: a cupynorm.cuda.replay.Runtime."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

from cupynorm.cuda.device import Device
from cupynorm.cuda.numpy_runtime import NumpyRuntime
from cupynorm.cuda.plan import Step
from cupynorm.cuda.source import Module

from . import listing
from .machine import Block


class Launched(NamedTuple):
    """A launch: how many of its blocks ran, and the warp-instructions that they issued, by operation."""

    module: Module
    step: Step
    blocks: int
    issued: Counter[str]


class SassRuntime(NumpyRuntime):
    """Executes all blocks of each launch, or the first ones only. launched: a list of the launches.

    Args:
        device: see NumpyRuntime.
        first: how many blocks to run, a multiple of a cluster's, or None for all.
    """

    def __init__(self, device: Device, first: int | None = None):
        super().__init__(device)
        self.first = first
        self.launched: list[Launched] = []

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
