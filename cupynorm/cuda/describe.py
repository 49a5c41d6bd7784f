"""Describe in words how a call on a GPU is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from .._types import Array, Explained, math_dtype
from ..config import get_batch_invariant
from .device import Device
from .layout import ArrayDesc, choose_layout, contiguous_desc
from .ops import OPS
from .plan import Plan, Step, plan, plane_step
from .variants import EPILOGUES, INPUT_ITEMSIZE, ITEMSIZE, MIXED_KERNELS

#: The names of operations that differ from those of the public functions.
NAMES = {"normalize": "forward with moments=", "input_gradient": "backward with sums="}
#: The launches of given numbers, before those of the plan.
GIVEN = {"normalize": "statistics_of_moments", "input_gradient": "means_of_sums"}


def describe(x: Array, address: int, device: Device, calls: Explained) -> list[str]:
    """Return lines about the calls on an array at an address: the device's name, then its forward, backward, ….

    All other arrays are new, in the layout of x, and of the results' dtype.
    """
    dtype = calls.dtype
    if x.size == 0:
        return [f"{device.name}: empty, nothing is launched"]
    desc = ArrayDesc(x.shape, x.strides, x.itemsize, address % 16)
    input = "" if dtype == x.dtype else x.dtype.name
    lines = [device.name]
    ops = ["forward"] + ["backward"] * (not calls.alone) + ["double_backward"] * calls.double_backward
    for op in ops + ["moments", "normalize", "gradient_sums", "input_gradient"] * calls.parts:
        if not input or op in MIXED_KERNELS:
            lines += _described(op, desc, dtype.name, device, calls, input)
        elif x.dtype.kind in "iu":
            lines.append(f"  {NAMES.get(op, op.replace('_', ' '))}: refused, since integers have no gradient")
        else:
            wide = math_dtype(dtype, x.dtype)
            lines.append(f"  arrays that are not {wide} are converted first, and gradients back:")
            wide_desc = contiguous_desc(x.shape, wide.itemsize, choose_layout((desc,))[0])
            lines += _described(op, wide_desc, wide.name, device, calls)
    return lines


def plan_for(
    op: Any,
    desc: ArrayDesc,
    dtype: str,
    device: Device,
    activation: str | None = None,
    residual: bool = False,
    **options: Any,
) -> tuple[Plan, int]:
    """Return the plan of a call whose other arrays are new, in the layout of the first, and the number of copies.
    options: others of `plan`."""
    if op == "moments":
        activation, residual = None, False
    if activation is None and op not in ("forward", "normalize"):
        residual = False  # its gradient is dy itself
    epilogue = EPILOGUES[activation] if activation is not None or residual else 0
    kind, _, copied = choose_layout((desc,), options.get("invariant", False))
    new = contiguous_desc(desc.shape, ITEMSIZE[dtype], kind)
    first = contiguous_desc(desc.shape, desc.itemsize, kind) if copied[0] else desc
    read, written = OPS[op].tensors(len(OPS[op].inputs), residual)
    kind, layouts, _ = choose_layout((first, *[new] * (len(read) + len(written) - 1)))
    shape = (desc.shape[0], desc.shape[1], math.prod(desc.shape[2:]))
    made = plan(op, shape, dtype, kind, layouts, device, epilogue=epilogue, residual=residual, **options)
    return made, int(copied[0])


def _described(
    op: str, desc: ArrayDesc, dtype: str, device: Device, calls: Explained, input: str = ""
) -> Iterator[str]:
    name = NAMES.get(op, op.replace("_", " "))
    if math.prod(desc.shape[2:]) == 1 and op in ("forward", "backward", "double_backward"):
        yield f"  {name}: refused, since one spatial element has no statistics (allowed if statistics are given)"
        return

    def planned(n: int, invariant: bool) -> tuple[Plan, int]:
        shape = (n, *desc.shape[1:])
        return plan_for(
            op, desc._replace(shape=shape), dtype, device, calls.activation, calls.residual, invariant=invariant,
            input=input, masked=calls.mask, sums=not calls.alone,
        )  # fmt: skip

    made, copies = planned(desc.shape[0], get_batch_invariant())
    first, *rest = made.steps
    # A warp moves the planes of its subwarps together, 16 bytes per thread, whatever their size and alignment.
    access = 16 if first.group == "subwarp" else made.vec_size * ITEMSIZE[dtype]
    layout = "read in place"
    if copies:
        for_bits = copies > planned(desc.shape[0], False)[1]
        layout = "x is copied first: " + (
            "batch invariance needs the layout of a new array"
            if for_bits
            else "its strides are neither channels-first nor channels-last"
        )
    if made.misaligned and first.group != "subwarp":
        layout += ", each vec combined from two aligned ones, since " + (
            "x and the result start at different addresses modulo 16 bytes"
            if not first.at_planes
            else "vecs begin at the start of each plane"
        )
    yield f"  {name}: {made.regime}, {made.kind.replace('_', '-')}, {layout}"
    yield f"    {made.reason}"
    if input:
        x_bytes = INPUT_ITEMSIZE[input]
        total = made.bytes_per_element + 2 * copies * x_bytes
        yield f"    {total} B per element: {x_bytes} B of x, {ITEMSIZE[dtype]} B of others; {made.vec_size} at a time"
    else:
        yield f"    {made.accesses + 2 * copies} accesses of {ITEMSIZE[dtype]} B per element, {access} B at a time"
    if calls.mask:
        times = "twice" if made.regime == "split" else "once"
        yield f"    a byte of the mask per element, read {times}; from the caches, if it is broadcast"
    unit = (
        "plane" if made.kind == "channels_first" else f"channel tile of {first.channel_vecs * made.vec_size} channels"
    )
    rounds = -(-made.channel_tiles // made.at_a_time) if made.at_a_time else 1
    if rounds > 1:
        yield (
            f"    {rounds} rounds of the first three launches, each over {made.at_a_time} of {made.channel_tiles}"
            f" units; a unit is one {unit}"
        )
    given = [plane_step(GIVEN[op], desc.shape[0] * desc.shape[1])] if op in GIVEN else []
    for step in (*given, first, *rest):
        yield f"    {_launched(step, unit)}"
    yield f"    bits of a sample's results: {_bits(planned, desc.shape[0], device)}"


def _bits(planned: Callable[[int, bool], tuple[Plan, int]], n: int, device: Device) -> str:
    """Return the facts besides the sample that bits depend on. planned: the plan for n samples, invariant or not."""
    if get_batch_invariant():
        return "the same in every batch, since batch invariance is set"

    def order(n: int) -> tuple[Any, ...]:
        step = planned(n, False)[0].steps[0]
        return step.name, step.tiles, step.vecs_per_thread

    # Beyond this number of channel tiles nothing changes: multiprocessors are busy, a grid's groups have equal work.
    most = 2 * device.sm_count
    if "_grid_" in order(1)[0]:  # the scope does not grow with N
        most = max(most, (device.sm_count // 2) ** 2)
    most = -(-most // planned(1, False)[0].channel_tiles)
    mine, reasons, alike = order(n), [], []
    for same, run in groupby(range(1, most + 1), lambda i: order(i) == mine):
        first, *more = run
        last = more[-1] if more else first
        if same:
            alike.append(f"{first} or more" if last == most else f"{first} to {last}" if more else str(first))
        if len(alike) > 3:  # more are not shown
            break
    if alike != ["1 or more"]:
        several = [*alike[:3], "..."] if len(alike) > 3 else alike
        reasons.append(f"N (the same for N = {', '.join(several)})")
    if planned(n, True)[0].steps[0].at_planes:
        reasons.append("the addresses of its planes modulo 16 bytes")
    if not reasons:
        return "the same in every batch"
    return f"depend on {' and on '.join(reversed(reasons))} (cupynorm.set_batch_invariant)"


def _launched(step: Step, unit: str) -> str:
    blocks = step.grid[0] * step.grid[1]
    text = f"{step.name}: {blocks} blocks of {step.threads} threads, {step.shared} B of shared memory"
    if step.group == "subwarp":
        return f"{text}, {32 // step.subwarp_size} plane(s) per warp"
    if step.cluster > 1:
        return f"{text}, clusters of {step.cluster}, one for each {unit}"
    if step.cooperative:
        groups = step.grid[0] // step.tiles
        return f"{text}, all resident, in groups of {step.tiles}; {groups} group(s), each serving one {unit} at a time"
    return text
