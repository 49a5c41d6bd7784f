"""Inputs whose planes stay on chip in every way: a case for each regime and layout."""

from __future__ import annotations

from typing import Any

from cupynorm.cuda.device import Device
from helpers.cases import GRID

# Cases of each regime: its name, shape, layout, and a device on which the case has this regime.
DEVICE = Device("bytes", (8, 0), 1, 100 * 1024, 2**20)
CLUSTERS = Device("clusters", (9, 0), 1, 40 * 1024, 2**20, 8)
# More shared memory than registers: for a block, and for two multiprocessors (256 KB forward).
LARGE = Device("large block", (8, 0), 1, 180 * 1024, 2**20)
ROOMY = Device("roomy grid", (8, 0), 2, 290 * 1024, 2**20)
REGIMES = [
    ("subwarp-registers", (2, 3, 5, 7), "contiguous", DEVICE),
    ("subwarp-registers", (3, 17, 3, 3), "contiguous", DEVICE),
    ("subwarp-registers", (3, 17, 2, 3), "contiguous", DEVICE),
    ("warp-registers", (2, 3, 13, 11), "contiguous", DEVICE),
    ("block-registers", (2, 3, 35, 45), "contiguous", DEVICE),
    ("block-registers", (2, 3, 35, 45), "unaligned", DEVICE),
    ("block-shared", (2, 2, 140, 129), "contiguous", DEVICE),
    ("block-shared", (1, 2, 140, 118), "contiguous", LARGE),  # backward too
    ("cluster-registers", (1, 2, 140, 121), "contiguous", CLUSTERS),
    ("grid-registers", (3, 1, 140, 129), "contiguous", GRID),
    ("grid-shared", (1, 1, 140, 469), "contiguous", ROOMY),
    ("split", (2, 2, 260, 131), "contiguous", DEVICE),
    ("warp-registers", (2, 8, 4, 4), "channels_last", DEVICE),
    ("block-registers", (2, 8, 16, 15), "channels_last", DEVICE),
    ("block-shared", (2, 8, 70, 32), "channels_last", LARGE),
    ("cluster-registers", (1, 8, 70, 44), "channels_last", CLUSTERS),  # backward in shared memory, as is the next
    ("grid-registers", (3, 8, 70, 50), "channels_last", GRID),
    ("grid-shared", (1, 8, 70, 60), "channels_last", ROOMY),
    ("split", (2, 8, 70, 100), "channels_last", DEVICE),
    ("split", (2, 3, 70, 100), "channels_last", DEVICE),
]

#: The same for double backward, which holds three arrays on chip.
DOUBLE_REGIMES = [
    ("subwarp-registers", (2, 3, 5, 7), "contiguous", DEVICE),
    ("warp-registers", (2, 3, 13, 11), "contiguous", DEVICE),
    ("block-registers", (2, 3, 35, 45), "contiguous", DEVICE),
    ("block-registers", (2, 3, 35, 45), "unaligned", DEVICE),
    ("block-shared", (2, 2, 70, 96), "contiguous", DEVICE),
    ("cluster-shared", (1, 2, 100, 121), "contiguous", CLUSTERS),
    ("grid-shared", (3, 1, 140, 129), "contiguous", GRID),
    ("split", (2, 2, 140, 131), "contiguous", DEVICE),
    ("warp-registers", (2, 8, 4, 4), "channels_last", DEVICE),
    ("block-registers", (2, 8, 16, 15), "channels_last", DEVICE),
    ("block-shared", (2, 8, 40, 20), "channels_last", Device("roomy", (8, 0), 1, 112 * 1024, 2**20)),
    ("cluster-shared", (1, 8, 35, 44), "channels_last", CLUSTERS),
    ("grid-shared", (3, 8, 50, 50), "channels_last", GRID),
    ("split", (2, 8, 40, 70), "channels_last", DEVICE),
    ("split", (2, 3, 70, 100), "channels_last", DEVICE),
]


def label(regime: tuple[Any, ...]) -> str:
    name, shape, layout, device = regime
    return f"{name}-{'x'.join(map(str, shape))}-{layout}-{device.name}"
