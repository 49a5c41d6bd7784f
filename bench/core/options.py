"""What commands that race calls with each other ask for in the same words."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import numpy as np

from cupynorm import devices


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
