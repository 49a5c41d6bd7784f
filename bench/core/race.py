"""What commands that race calls with each other ask for in the same words, and how they race."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupynorm import devices

from . import report
from .cases import SWEEP_ELEMENTS, Layer, buffer_sets, parse_shapes
from .timing import Contestant, DeviceClock, HostClock, Race, summarise

CACHE_BYTES = 64 << 20  # of the buffer sets on a CPU


def add_race(parser: argparse.ArgumentParser) -> None:
    """Add the options of a race: --device, --rounds and --batch-ms."""
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if there is a usable one")
    parser.add_argument("--rounds", type=int, default=9, help="in each, every call has a batch; default 9")
    parser.add_argument("--batch-ms", type=float, default=3, help="length of a batch; default 3")


def array_module(device: str | None) -> Any:
    """Return numpy or cupy, by --device. Exit if a GPU is wanted and none is usable."""
    usable, why = devices.gpu_status()
    if device == "gpu" and not usable:
        sys.exit(f"--device gpu: no usable GPU: {why}")
    return importlib.import_module("cupy") if usable and device != "cpu" else np


def add_shapes(parser: argparse.ArgumentParser, shapes: Sequence[str]) -> None:
    """Add the shapes as arguments, with these defaults."""
    parser.add_argument("shapes", nargs="*", default=shapes, metavar="N,C,H,W", help=f"default {' '.join(shapes)}")


def layers_of(parser: argparse.ArgumentParser, options: argparse.Namespace, xp: Any) -> list[Layer]:
    """Return the layers of the shapes that were asked for."""
    try:
        return parse_shapes(list(options.shapes), SWEEP_ELEMENTS["cpu" if xp is np else "gpu"])
    except ValueError as error:
        parser.error(str(error))


def sets_of(xp: Any, size: int) -> int:
    """Return the number of buffer sets, of so many bytes each, that do not stay in a cache."""
    cache = CACHE_BYTES if xp is np else 3 * report.device_facts(xp)["l2_bytes"]
    return max(buffer_sets(size, cache, 8), 2 if xp is not np else 1)


def medians(xp: Any, racing: list[Contestant], sets: int, options: argparse.Namespace) -> dict[str, float]:
    """Race calls, and return the median seconds of each."""
    clock: HostClock = HostClock() if xp is np else DeviceClock()
    samples = Race(clock, sets, options.batch_ms / 1e3).run(racing, options.rounds)
    return {name: summarise(each).median for name, each in samples.items()}
