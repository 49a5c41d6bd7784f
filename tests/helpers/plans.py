"""Plans by shape, dtype and layout; the variants of their steps."""

from __future__ import annotations

from functools import cache

import numpy as np

from cupynorm.cuda.device import Device
from cupynorm.cuda.layout import ArrayDesc, Layout
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import Plan, Step, plan
from cupynorm.cuda.variants import VARIANTS, Kind, Variant

OPS: tuple[Op, ...] = ("forward", "backward", "normalize", "frozen_backward")
DOUBLE: tuple[Op, ...] = ("double_backward", "frozen_double_backward")
KINDS: tuple[Kind, ...] = ("channels_first", "channels_last")


def plan_of(
    op: Op,
    shape: tuple[int, int, int],
    dtype: str,
    kind: Kind,
    device: Device,
    aligned: bool = True,
    epilogue: int = 0,
    residual: bool = False,
    sums: bool = True,
) -> Plan:
    """Return the plan of a call whose arrays are all of one layout; only the first may begin off 16 bytes."""
    _, c, s = shape
    stride = (c * s, s, 1) if kind == "channels_first" else (c * s, 1, c)
    first = Layout(*stride, 0 if aligned else 1)
    arrays = 5 if op in DOUBLE else 3 + 2 * residual if op in ("backward", "frozen_backward") else 2 + residual
    layouts = (first, *[Layout(*stride, 0)] * (arrays - 1))
    return plan(op, shape, dtype, kind, layouts, device, sums=sums, reduced=sums, epilogue=epilogue, residual=residual)


@cache
def variant_named(name: str) -> Variant | None:
    """Return the variant of a step; None for merges and sums over N, which have none."""
    found = [variant for variants in VARIANTS.values() for variant in variants if name.endswith("_" + variant.name)]
    return found[0] if found else None


def variant_of(step: Step) -> Variant | None:
    """Return the variant of a step, or None."""
    return variant_named(step.name)


def desc_of(array: np.ndarray) -> ArrayDesc:
    """Return the description of a NumPy array that plans are made from."""
    return ArrayDesc(array.shape, array.strides, array.itemsize, array.ctypes.data % 16)
