"""What a call will do, in words."""

from __future__ import annotations

import math
from typing import Any

from . import cpu
from .cuda.plan import DEVICES, ITEMSIZE, Device, Memory, Plan, arrange, fresh, plan
from .functional import Array, check_input, kind_of, math_dtype


def explain(x: Array, *, device: str | None = None) -> str:
    """How the forward and backward of an array will be computed, and why so.

    Args:
        x: NumPy or CuPy array (N, C, *spatial), as for `cupynorm.instance_norm`; only shape, strides, dtype and address
            matter.
        device: a GPU to plan for that need not be there: "T4", "V100", "A100", "L4", "H100", "H200", "B200" or
            "RTX 5090". None plans for where x is.

    Returns:
        Text of a few lines: for CUDA the regime, the reason, whether arrays are read in place, the traffic in bytes
        per element, and the launches.

    Raises:
        TypeError, ValueError: x cannot be normalised, or the device is not known.
    """
    check_input(x)
    title = f"{x.shape} {x.dtype.name}"
    if device is not None:
        if device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
        on = DEVICES[device]
    elif kind_of(x, "input") == "cupy":
        from .cuda.backend import runtime

        with x.device:
            on = runtime.device()
    else:
        return f"{title} on the CPU: {cpu.describe(x.shape, math_dtype(x.dtype))}"
    if x.size == 0:
        return f"{title} on {on.name}: empty, nothing is launched"
    address = x.ctypes.data if kind_of(x, "input") == "numpy" else x.data.ptr
    memory = Memory(x.shape, x.strides, x.itemsize, address % 16)
    lines = [f"{title} on {on.name}"]
    for op in ("forward", "backward"):
        lines += _described(op, memory, x.dtype.name, on)
    return "\n".join(lines)


def plan_for(op: Any, memory: Memory, dtype: str, device: Device) -> tuple[Plan, int]:
    """The plan of a call whose other arrays are new ones in the layout of the first; and how many must be copied."""
    kind, _, copied = arrange((memory,))
    new = fresh(memory.shape, memory.itemsize, kind)
    first = new if copied[0] else memory
    kind, layouts, _ = arrange((first, new) if op == "forward" else (first, new, new))
    shape = (memory.shape[0], memory.shape[1], math.prod(memory.shape[2:]))
    return plan(op, shape, dtype, kind, layouts, device), int(copied[0])


def _described(op: str, memory: Memory, dtype: str, device: Device) -> list[str]:
    if math.prod(memory.shape[2:]) == 1:
        return [f"  {op}: refused, one spatial element has no statistics (with running statistics it is allowed)"]
    made, copies = plan_for(op, memory, dtype, device)
    access = made.vector * ITEMSIZE[dtype]
    layout = (
        "x is copied first: its strides are neither channels-first nor channels-last" if copies else "read in place"
    )
    accesses = made.accesses + 2 * copies
    lines = [
        f"  {op}: {made.regime}, {made.kind.replace('_', '-')}, {layout}",
        f"    {made.reason}",
        f"    {accesses} accesses of {ITEMSIZE[dtype]} B per element, {access} B at a time",
    ]
    for step in made.steps:
        blocks = step.grid[0] * step.grid[1]
        lines.append(f"    {step.name}: {blocks} x {step.threads} threads, {step.shared} B of shared memory")
    return lines
