"""Allocations, copies and launches of calls on the CUDA kernels, recorded without launching."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.cases import BLOCKS, GRID
from helpers.recorder import Recorder
from helpers.regimes import REGIMES

import cupynorm as cn
from cupynorm.cuda import arguments, calls, replay, trace
from cupynorm.cuda.device import DEVICES
from cupynorm.cuda.ops import SHARED
from cupynorm.cuda.source import masked_modules
from cupynorm.cuda.variants import KERNELS, SINGLE

#: A device, and the positions of planes that a single scope serves, that a grid's blocks share, or that are split:
#: channels-first, and channels-last with eight channels.
ROOMS = {"alone": (BLOCKS, 300, 300), "grid": (GRID, 18_000, 2400), "split": (BLOCKS, 30_000, 30_000)}


def laid(shape: tuple[int, ...], layout: str) -> np.ndarray:
    return reference.LAYOUTS[layout](np.zeros(shape, np.float32))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scope", ROOMS)
def test_allocations_of_each_regime(run_on: Callable[..., Any], scope: str, layout: str) -> None:
    """Results, numbers of planes, partials that blocks exchange, and nothing else."""
    device, *sizes = ROOMS[scope]
    n, c = 3, 8
    runtime = run_on(Recorder(device))
    x, dy, ddx = (laid((n, c, sizes[layout == "channels_last"], 1), layout) for _ in range(3))
    weight, bias = np.ones((2, c), np.float32)
    as_x, of_channels, of_planes = (x.shape, "float32"), ((c,), "float32"), 4 * n * c

    def memory(*sizes: int) -> Counter[Any]:
        """Return one allocation for arrays of these bytes, which only kernels see."""
        rounded = [-(-size // 16) * 16 for size in sizes]
        return Counter({((sum(rounded),), "memory"): 1} if rounded else {})

    def shared(numbers: int, *sizes: int) -> Counter[Any]:
        """Return what kernels share: in a grid, blocks have so many numbers per plane."""
        step = runtime.steps[0]
        assert (scope == "grid") == step.cooperative and (scope == "split") == (step.tiles > 1 and not step.cooperative)
        if scope != "grid":
            return memory(*sizes)
        groups = step.grid[0] // step.tiles
        width = 1 if layout == "contiguous" else step.channel_vecs * runtime.modules[0].vec_size
        exchanged = groups * 2 * step.tiles * width * numbers * 4
        return Counter({((groups,), "uint32"): 1}) + memory(*sizes, exchanged)

    def split(*bytes_of_planes: int) -> list[int]:
        """Return the bytes of arrays with so many for each plane and tile, which only the split needs."""
        return [n * c * runtime.steps[0].tiles * size for size in bytes_of_planes if scope == "split"]

    _, saved = cn.instance_norm_forward(x, weight, bias)
    assert runtime.made == Counter({as_x: 1, ((3, n, c), "float32"): 1}) + shared(4, *split(8, 8, 8))

    runtime.clear()
    cn.instance_norm_backward(dy, saved)
    more = [of_planes] * (4 if scope == "split" else 2)  # sums, and their means
    assert runtime.made == Counter({as_x: 1, of_channels: 2}) + shared(2, *more, *split(8))

    runtime.clear()
    cn.instance_norm_double_backward(ddx, weight, bias, dy, saved)
    more = [of_planes, 8 * of_planes] if scope == "split" else [of_planes]
    assert runtime.made == Counter({as_x: 2, of_channels: 1}) + shared(9, *more, *split(36))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_allocations_of_tracked_eval(run_on: Callable[..., Any], layout: str) -> None:
    runtime = run_on(Recorder(DEVICES["H100"]))
    x = laid((2, 8, 100, 100), layout)
    weight, running = np.ones(8, np.float32), np.ones(8, np.float32)
    as_x, of_channels, of_planes = (x.shape, "float32"), ((8,), "float32"), 4 * 2 * 8
    _, saved = cn.instance_norm_forward(
        x, weight, weight, running_mean=running, running_var=running, use_input_stats=False
    )
    assert runtime.made == Counter({as_x: 1, ((2, 2, 8), "float32"): 1})
    runtime.clear()
    cn.instance_norm_backward(x, saved)
    tiles = runtime.steps[0].tiles
    assert tiles > 1
    hidden = 2 * of_planes + 2 * of_planes * tiles
    assert runtime.made == Counter({as_x: 1, of_channels: 2, ((hidden,), "memory"): 1})
    runtime.clear()
    cn.instance_norm_double_backward(x, weight, weight, x, saved)
    tiles = runtime.steps[0].tiles
    hidden = of_planes + of_planes * tiles
    assert runtime.made == Counter({as_x: 2, of_channels: 1, ((hidden,), "memory"): 1})


def test_modules_without_an_epilogue(run_on: Callable[..., Any]) -> None:
    """Plain calls and double backward use modules without an epilogue; a residual alone is an epilogue."""
    runtime = run_on(Recorder(BLOCKS))
    for shape in ((2, 3, 20), (2, 3, 300), (2, 3, 30_000)):
        x, weight = np.zeros(shape, np.float32), np.ones(3, np.float32)
        for training in (True, False):
            running = {"running_mean": weight.copy(), "running_var": weight.copy()}
            _, saved = cn.instance_norm_forward(x, weight, weight, **running, use_input_stats=training)
            cn.instance_norm_backward(x, saved)
            cn.instance_norm_double_backward(x, weight, weight, x, saved)
    assert {module.epilogue for module in runtime.modules} == {0}
    runtime.clear()
    _, saved = cn.instance_norm_forward(x, residual=x)
    assert {module.epilogue for module in runtime.modules} == {0, 1}
    runtime.clear()
    cn.instance_norm_backward(x, saved)
    assert {module.epilogue for module in runtime.modules} == {0}


def test_copies(run_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only parameters with gaps and arrays that kernels cannot address are copied, and copied back if written."""
    run_on(Recorder(DEVICES["H100"]))
    copies: list[tuple[Any, Any]] = []
    made = replay.assignment
    monkeypatch.setattr(
        replay, "assignment", lambda target, source: copies.append((target, source)) or made(target, source)
    )
    x, out, dy = np.zeros((3, 2, 4, 5, 6), np.float32)
    c = np.ones(4, np.float32)
    gaps = np.ones((4, 3), np.float32)[:, 1]
    odd = np.zeros((2, 4, 6, 5), np.float32).swapaxes(2, 3)
    unaligned = np.zeros(17, np.uint8)[1:].view(np.float32)

    def copied(*arguments: Any, **options: Any) -> list[tuple[Any, Any]]:
        copies.clear()
        _, saved = cn.instance_norm_forward(*arguments, **options)
        cn.instance_norm_backward(dy, saved)
        return copies

    assert not copied(x, c, c, running_mean=c.copy(), running_var=c.copy(), out=out, residual=dy)
    for given in (gaps, unaligned):
        first, *rest = copied(x, given, c)
        assert first[1] is given and all(source is given for _, source in rest)
        first, again, back = copied(x, running_mean=given, running_var=c.copy())
        assert first[1] is given and [*map(id, again)] == [*map(id, first)] and back[0] is given and back[1] is first[0]
    assert [source is odd for _, source in copied(odd)] == [True] * 2
    [(target, _)] = copied(x, out=odd)
    assert target is odd


def test_16_bit_arrays_are_copied_as_bits() -> None:
    """So array libraries need not know bfloat16. Elements that no GPU can access are refused first."""
    for dtype, bits in (("float16", True), ("bfloat16", True), ("float32", False), ("float64", False)):
        target, source = np.zeros((2, 4), cn.devices.dtype_of(dtype))
        given = replay.assignment(target, source).args
        assert [each.dtype for each in (given[0], given[2])] == [np.uint16 if bits else target.dtype] * 2
    whole = {"itemsize": 4, "dtype": np.dtype(np.float32), "strides": (20, 4), "data": SimpleNamespace(ptr=640)}
    replay.assignment(SimpleNamespace(**whole), np.zeros(3, np.float32))  # type: ignore[arg-type]
    for fault in ({"strides": (20, 6)}, {"strides": (21, 4)}, {"data": SimpleNamespace(ptr=642)}):
        odd = SimpleNamespace(**(whole | fault))
        for pair in ((odd, np.zeros(3, np.float32)), (np.zeros(3, np.float32), odd)):
            with pytest.raises(ValueError, match="not aligned"):
                replay.assignment(*pair)  # type: ignore[arg-type]
    unaligned = np.zeros(17, np.uint8)[1:].view(np.float32)
    replay.assignment(unaligned, unaligned)  # NumPy can


def test_calls_are_prepared_once_per_alignment(run_on: Callable[..., Any]) -> None:
    run_on(Recorder(DEVICES["H100"]))
    memory = np.zeros(2000, np.float32)
    shift = -memory.ctypes.data % 16 // 4
    calls.traced.cache_clear()
    for first in (0, 4, 40, 400, 1, 41):
        cn.instance_norm(memory[shift + first :][:120].reshape(2, 3, 20), out=np.zeros((2, 3, 20), np.float32))
    assert calls.traced.cache_info().misses == 2


@pytest.mark.parametrize(("n", "c", "most", "channel_vecs", "vec_size"), [
    (3, 5, 4, 1, 8), (2, 7, 100, 1, 2), (1, 1, 1, 1, 4), (3, 40, 2, 4, 4), (2, 33, 3, 16, 1), (4, 16, 1, 2, 4),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["channels_first", "channels_last"])
def test_rounds_of_a_split_cover_each_plane_once(
    n: int, c: int, most: int, channel_vecs: int, vec_size: int, kind: str
) -> None:
    width = channel_vecs * vec_size if kind == "channels_last" else 1
    tiles = n * -(-c // width)
    step = SimpleNamespace(channel_vecs=channel_vecs)
    other = SimpleNamespace(channel_vecs=9)
    call = object.__new__(trace.Tracer)
    call.nc, call.kind = (n, c), kind  # type: ignore[assignment]
    call.planned = SimpleNamespace(channel_tiles=tiles, at_a_time=most, vec_size=vec_size, steps=[step, other])  # type: ignore[assignment]
    rounds = [[*range(r["round.first"], r["round.first"] + r["round.channel_tiles"])] for r in call.rounds()]
    assert [*itertools.chain(*rounds)] == [*range(tiles)]
    assert all(len(served) == most for served in rounds[:-1])
    last = 0
    for served, given in zip(rounds, call.rounds(), strict=True):
        assert given["first"] == last
        assert given["planes"] == sum(min(width, c - tile % (tiles // n) * width) for tile in served)
        last += given["planes"]
    assert last == n * c


#: Arguments that no call sets: they belong to a structure that other kernels use, too.
UNUSED = {
    (kernel, "sums.dy") for kernel in ("double_backward", "frozen_double_backward", "merge_products", "merge_dots")
}


def test_arguments_set_by_a_call_belong_to_a_kernel(
    run_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`packer` ignores names that a kernel does not have: a misspelt one, or a field that is never set, would go
    unnoticed."""
    run_on(Recorder(BLOCKS))
    fields = {kernel: {name for name, *_ in arguments.leaves(struct)} for kernel, struct in arguments.STRUCTS.items()}
    filled: dict[str, set[str]] = {kernel: set() for kernel in fields}
    packer = arguments.packer
    monkeypatch.setattr(
        arguments, "packer", lambda kernel, values: filled[kernel].update(values) or packer(kernel, values)
    )
    w = np.ones(3, np.float32)
    devices = BLOCKS, GRID
    for device, size, training in itertools.product(devices, (20, 300, 18_000, 30_000), (True, False)):
        run_on(Recorder(device))
        x = np.zeros((2, 3, size), np.float32)
        running = {"running_mean": w.copy(), "running_var": w.copy()}
        for fused in ({}, {"residual": x, "activation": "relu"}):
            _, saved = cn.instance_norm_forward(x, w, w, **running, use_input_stats=training, **fused)
            cn.instance_norm_backward(x, saved)
        for options in ({"eps_mode": "std"}, {"mask": np.ones(size, bool)}):
            _, saved = cn.instance_norm_forward(x, w, w, **running, use_input_stats=training, **options)
            cn.instance_norm_backward(x, saved)
        _, saved = cn.instance_norm_forward(x, w, w, **running, use_input_stats=training)
        cn.instance_norm_double_backward(x, w, w, x, saved)
        if training:
            for fused in ({}, {"residual": x, "activation": "relu"}):
                moments = cn.moments(x)
                _, saved = cn.instance_norm_forward(x, w, w, **running, moments=moments, **fused, eps_mode="std")
                cn.instance_norm_backward(x, saved)
                _, saved = cn.instance_norm_forward(x, w, w, mask=np.ones(size, bool), **fused)
                cn.instance_norm_backward(x, saved)
    assert set().union(*filled.values()) <= set().union(*fields.values())
    never = {(kernel, name) for kernel, names in fields.items() for name in names - filled[kernel]}
    assert never == UNUSED


def test_every_kernel_has_arguments() -> None:
    named = {kernel for kernels in (*KERNELS.values(), *SINGLE.values()) for kernel in kernels}
    assert named == set(arguments.STRUCTS)
    assert {kernel for kernels in SINGLE.values() for kernel in kernels} == set(SHARED)


@pytest.mark.parametrize("shape", [(2, 3, 20), (1, 3, 20), (2, 3, 300), (2, 3, 30_000)], ids=str)
def test_launches_match_the_plan(
    run_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """The planned steps, which `explain` shows, and nothing else are launched, with and without each parameter."""
    runtime = run_on(Recorder(BLOCKS))
    plan, plans = trace.Tracer.plan, []

    def noted(work: Any, *given: Any, **options: Any) -> None:
        plan(work, *given, **options)
        plans.append(work.planned)

    monkeypatch.setattr(trace.Tracer, "plan", noted)
    monkeypatch.setattr(calls, "traced", calls.traced.__wrapped__)
    x = np.zeros(shape, np.float32)
    parameters = [None, np.ones(shape[1], np.float32), np.ones(shape[:2], np.float32)]
    for weight, bias, training in itertools.product(parameters, parameters, (True, False)):
        running = {"running_mean": np.ones(shape[1], np.float32), "running_var": np.ones(shape[1], np.float32)}
        _, saved = cn.instance_norm_forward(x, weight, bias, **running, use_input_stats=training)
        cn.instance_norm_backward(x, saved)
        for ddx in (x, None)[: 1 if weight is None and bias is None else 2]:
            cn.instance_norm_double_backward(ddx, weight, bias, x, saved)
    assert len(plans) == 4 * 18 - 2
    for plan in plans:
        rounds = -(-plan.channel_tiles // plan.at_a_time) if plan.at_a_time else 1
        steps = [*plan.steps[:3] * rounds, *plan.steps[3:]]
        assert runtime.steps[: len(steps)] == steps, plan
        del runtime.steps[: len(steps)]
    assert not runtime.steps


def test_calls_with_a_mask_launch_the_listed_modules(run_on: Callable[..., Any]) -> None:
    """And some module of each file in the list."""
    runtime = run_on(Recorder(BLOCKS))
    for _, shape, layout, device in REGIMES:
        runtime._device = device
        x, mask, ones = laid(shape, layout), np.ones(shape[2:], bool), np.ones(shape[1], np.float32)
        running = {"running_mean": ones, "running_var": ones, "use_input_stats": False}
        for options in ({}, {"moments": cn.moments(x, mask=mask)}, running):
            _, saved = cn.instance_norm_forward(x, mask=mask, **options)
            cn.instance_norm_backward(x, saved, sums=cn.gradient_sums(x, saved) if "moments" in options else None)
    launched = {module for module, _ in runtime.launched() if module.masked}
    listed = set(masked_modules("float32"))
    assert launched <= listed
    assert {module.file for module in launched} == {module.file for module in listed}
