"""The CUDA kernels on the emulator: bytes moved, the same bits in every order, and faults that the emulator detects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator import runtime as emulator
from emulator.runtime import Emulator, SimtError, Text, build
from helpers import cases, parts, reference
from helpers.backends import TESTS
from helpers.cases import BLOCKS, GRID
from helpers.compare import assert_equal, assert_same, assert_within
from helpers.recorder import Recorder
from helpers.regimes import DEVICE, DOUBLE_REGIMES, REGIMES, label
from helpers.seeds import seed_of

import cupynorm as cn
from cupynorm import devices
from cupynorm.backend import MODULES
from cupynorm.cuda import arguments
from cupynorm.cuda.device import Device
from cupynorm.cuda.plan import Step
from cupynorm.cuda.source import Module, all_modules, inlined, kernel_folder
from cupynorm.cuda.variants import SINGLE

pytestmark = pytest.mark.simt


@pytest.fixture(autouse=True)
def _compiler() -> None:
    emulator.require()


def _launched(
    run_on: Callable[..., Any], rng: np.random.Generator, table: list[cases.Case], steps: list[cases.Case]
) -> set[tuple[Module, str]]:
    """Return the kernels that these cases launch; steps: of calls with given moments and sums."""
    runtime = run_on(Recorder(cases.SMALL_DEVICE))
    for case in table:
        runtime._device = case.device
        x, dy, weight, bias, mean, var, residual = cases.arrays(replace(case, data="zeros"), rng)
        for training in cases.modes(case):
            _, saved = cn.instance_norm_forward(
                x, weight, bias, running_mean=mean, running_var=var, activation=case.activation, residual=residual,
                use_input_stats=training,
            )  # fmt: skip
            cn.instance_norm_backward(dy, saved)
            if case.activation is None:
                cn.instance_norm_double_backward(dy, weight, bias, dy, saved)
    for case in steps:
        runtime._device = case.device
        x, dy, weight, bias, mean, var, residual = cases.arrays(replace(case, data="zeros"), rng)
        options = {"weight": weight, "bias": bias, "activation": case.activation}
        parts.in_parts(parts.WHOLE)(x, dy, residual, running_mean=mean, running_var=var, **options)
        with parts.batch_invariant():
            parts.in_parts(parts.WHOLE)(x, dy, residual, **options)
    return runtime.launched()


@pytest.mark.full
def test_the_case_table_reaches_every_kernel(run_on: Callable[..., Any], rng: np.random.Generator) -> None:
    table = [*cases.TABLE, *cases.variants(), *cases.variants(("double_backward",))]
    launched = _launched(run_on, rng, table, parts.variants())
    missing = {(m, name) for m in all_modules([0]) for name in m.kernels} - launched
    assert not missing, sorted(f"{m.file} {m.dtype} {m.kind} {m.vec_size} {name}" for m, name in missing)


def test_the_default_tier_reaches_every_variant(run_on: Callable[..., Any], rng: np.random.Generator) -> None:
    """Every variant of every file, in some dtype and layout."""
    table = [*cases.TABLE, *cases.variants(), *cases.variants(("double_backward",))]
    steps = [case for case in parts.variants() if case.dtype == "float32"]
    launched = _launched(run_on, rng, [case for case in table if cases.by_default(case)], steps)
    missing = {(m.file, name) for m in all_modules([0]) for name in m.kernels} - {(m.file, n) for m, n in launched}
    assert not missing, sorted(missing)


def test_the_epilogue_cases_reach_every_kernel(run_on: Callable[..., Any], rng: np.random.Generator) -> None:
    """Each kernel in one dtype and with one epilogue; and every epilogue in every file."""

    def code(m: Module, name: str) -> tuple[Any, ...]:
        return m.file, m.kind, m.misaligned or m.vec_size > 1, m.misaligned, name

    launched = _launched(run_on, rng, cases.epilogue_variants(), parts.epilogue_variants())
    launched = {pair for pair in launched if pair[0].epilogue}
    missing = {code(m, name) for m in all_modules([1]) if m.epilogue for name in m.kernels} - {
        code(*pair) for pair in launched
    }
    assert not missing, sorted(missing)
    files = {(m.file, m.group, m.epilogue) for m in all_modules(range(1, 4)) if m.file not in SINGLE}
    assert files <= {(m.file, m.group, m.epilogue) for m, _ in launched}


def since(runtime: Recorder) -> tuple[int, int]:
    """Return (launches, allocated arrays) since the last call."""
    counted = len(runtime.steps), sum(runtime.made.values())
    runtime.clear()
    return counted


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 3, 35, 45), (4, 3, 120, 120), (4, 3, 300, 300)], ids=str)
@pytest.mark.parametrize("fused", [{}, {"activation": "gelu"}], ids=["plain", "gelu"])
def test_launches_and_allocations(run_on: Callable[..., Any], shape: tuple[int, ...], fused: dict[str, Any]) -> None:
    """One launch forward, one backward, and one more to reduce over N; arrays are allocated for results only."""
    runtime = run_on(Recorder(Device("many", (9, 0), 1, 227 * 1024, 2**20, 16)))
    x = np.zeros(shape, np.float32)
    channel, sample = np.ones(3, np.float32), np.ones((4, 3), np.float32)
    cn.instance_norm(x, **fused)
    assert since(runtime) == (1, 1)
    cn.instance_norm(x, channel.copy(), channel.copy(), channel, channel, **fused)
    assert since(runtime) == (2, 2)  # y; means and variances in one, for the running statistics
    _, saved = cn.instance_norm_forward(x, **fused)
    assert since(runtime) == (1, 2)  # y; mean, rstd and mean_lo in one
    cn.instance_norm_backward(x, saved)
    assert since(runtime) == (1, 1)
    _, saved = cn.instance_norm_forward(x, sample, sample, **fused)
    since(runtime)
    cn.instance_norm_backward(x, saved)
    assert since(runtime) == (1, 3)  # dx, dweight, dbias
    _, saved = cn.instance_norm_forward(x, channel, channel, **fused)
    since(runtime)
    cn.instance_norm_backward(x, saved)
    assert since(runtime) == (2, 4)  # and the sums of planes for dweight and dbias, in one
    _, saved = cn.instance_norm_forward(x[:1], channel, channel, **fused)
    since(runtime)
    cn.instance_norm_backward(x[:1], saved)
    assert since(runtime) == (1, 3)  # one sample: the sums of planes are the gradients


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 3, 35, 45), (4, 3, 120, 120), (4, 3, 300, 300)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_launches_and_allocations_of_a_double_backward(
    run_on: Callable[..., Any], shape: tuple[int, ...], training: bool
) -> None:
    runtime = run_on(Recorder(Device("many", (9, 0), 1, 227 * 1024, 2**20, 16)))
    x, channel, sample = np.zeros(shape, np.float32), np.ones(3, np.float32), np.ones((4, 3), np.float32)
    tiled = 0 if training else int(np.prod(shape[2:]) > 3 * 256 * 4)  # several tiles per plane: a merge of partials

    def counted(x: np.ndarray, weight: Any, *given: Any) -> tuple[int, int]:
        _, saved = cn.instance_norm_forward(x, weight, weight, running_mean=channel.copy(), running_var=channel.copy(),
                                            use_input_stats=training)  # fmt: skip
        since(runtime)
        cn.instance_norm_double_backward(*given, x, saved)
        return since(runtime)

    assert counted(x, None, x, None, None) == (1, 2)  # dx, ddy
    assert counted(x, sample, x, sample, sample) == (1 + tiled, 3 + tiled)  # dweight
    assert counted(x, channel, x, channel, channel) == (2 + tiled, 4)  # and its sums of planes, with the partials
    assert counted(x[:1], channel, x[:1], channel, channel) == (1 + tiled, 3 + tiled)  # one sample: dweight itself
    assert counted(x, channel, None, channel, channel) == (1, 3)  # without ddx dweight is 0


@pytest.mark.full
@pytest.mark.parametrize("training", [True, False])
def test_double_backward_of_more_tiles_than_merge_threads(
    run_on: Callable[..., Emulator], rng: np.random.Generator, training: bool
) -> None:
    runtime = run_on(Emulator(DEVICE))
    x, dy, ddx = (rng.normal(size=(1, 1, 800_000)).astype(np.float32) for _ in range(3))
    w, mean, var = (rng.random(1).astype(np.float32) + 0.5 for _ in range(3))
    running = None if training else (mean, var)
    _, saved = cn.instance_norm_forward(x, w, running_mean=mean, running_var=var, momentum=0, use_input_stats=training)
    runtime.counts.clear()
    results = cn.instance_norm_double_backward(ddx, w, None, dy, saved)
    merge = next(count for count in runtime.counts if count.kernel.startswith("merge"))
    assert max(merge.read.values()) > 256 * 4
    reference.assert_all_close(results, reference.double_backward(ddx, w, None, dy, x, w, running=running), x)


@pytest.mark.full
@pytest.mark.parametrize("training", [True, False])
def test_more_tiles_than_merge_threads(
    run_on: Callable[..., Emulator], rng: np.random.Generator, training: bool
) -> None:
    """With a mean whose rounding matters. A tile has 8192 elements, with frozen statistics 4096."""
    runtime = run_on(Emulator(DEVICE))
    size = 2_200_000 if training else 1_600_000
    x, dy = ((rng.normal(size=(1, 1, size)) + add).astype(np.float32) for add in (10000.3, 2))
    w = np.full(1, 1.5, np.float32)
    mean, var = np.full(1, 10000, np.float32), np.full(1, 1.25, np.float32)
    running = None if training else (mean, var)
    y, saved = cn.instance_norm_forward(
        x, w, w, running_mean=mean, running_var=var, momentum=0, use_input_stats=training
    )
    runtime.counts.clear()
    results = (y, *cn.instance_norm_backward(dy, saved))
    merge = next(count for count in runtime.counts if count.kernel.startswith("merge"))
    assert max(merge.read.values()) > 2 * 256 * 4
    expected = (reference.forward(x, w, w, running=running), *reference.backward(dy, x, w, bias=w, running=running))
    reference.assert_all_close(results, expected[:4], x)


Results = list[np.ndarray]


def _inputs(regime: tuple[Any, ...], runtime: Any, seed: int) -> tuple[Results, Results]:
    """Return three arrays and four parameters of a regime, and set the runtime's device to the regime's."""
    _, shape, layout, device = regime
    rng = np.random.default_rng(seed)
    if runtime is not None:
        runtime._device = device
    arrays = [reference.LAYOUTS[layout](rng.normal(size=shape).astype(np.float32)) for _ in range(3)]
    return arrays, [rng.random(shape[1]).astype(np.float32) + 0.5 for _ in range(4)]


def _double(runtime: Any, seed: int, regime: tuple[Any, ...], training: bool, fused: bool = False) -> Results:
    """Return the results of a double backward."""
    (x, dy, ddx), (weight, bias, mean, var) = _inputs(regime, runtime, seed)
    _, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=mean.copy(), running_var=var, use_input_stats=training
    )
    return [*cn.instance_norm_double_backward(ddx, weight, bias, dy, saved)]


def _single(runtime: Any, seed: int, regime: tuple[Any, ...], training: bool, fused: bool = False) -> Results:
    """Return the results of forward and backward."""
    (x, dy, residual), (weight, bias, mean, var) = _inputs(regime, runtime, seed)
    options: dict[str, Any] = {"activation": "silu", "residual": residual} if fused else {}
    # For subwarps, results at another address modulo 16 bytes than the inputs.
    y, dx = (reference.LAYOUTS["unaligned"](x) if regime[0].startswith("subwarp") else None for _ in range(2))
    y, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, use_input_stats=training, out=y, **options
    )
    return [y, *cn.instance_norm_backward(dy, saved, out=dx), mean.copy(), var.copy()]


def _masked(runtime: Any, seed: int, regime: tuple[Any, ...], training: bool, fused: bool = False) -> Results:
    """Return the results of forward and backward with a mask that leaves out whole tiles."""
    (x, dy, residual), (weight, bias, mean, var) = _inputs(regime, runtime, seed)
    options: dict[str, Any] = {"activation": "silu", "residual": residual} if fused else {}
    mask = np.random.default_rng(seed).random(x.shape) < 2 / 3
    mask[:, ::2, : x.shape[2] // 2] = False
    y, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, use_input_stats=training, mask=mask, **options
    )
    return [y, *cn.instance_norm_backward(dy, saved), mean.copy(), var.copy()]


def cases_of_orders() -> list[Any]:
    """Return (function, regime, training, fused). The full tier has the fused and the channels-last cases, most cases
    of tracked eval, and masks where several blocks share a plane."""
    found = []
    for run, table in ((_single, REGIMES), (_double, DOUBLE_REGIMES)):
        for number, regime in enumerate(table):
            for training, fused in ((True, False), (False, False), (True, True), (False, True)):
                if fused and (run is _double or number % 2 == 0):
                    continue
                side_by_side = regime[2] == "channels_last"
                marks = pytest.mark.full if fused or side_by_side or (not training and number % 8) else ()
                name = f"{run.__name__[1:]}-{label(regime)}-{'training' if training else 'eval'}{'-fused' * fused}"
                found.append(pytest.param(run, regime, training, fused, marks=marks, id=name))
    shared = [regime for regime in REGIMES if regime[0][:4] in ("clus", "grid", "spli")]
    return found + [
        pytest.param(_masked, regime, True, bool(number % 2), marks=pytest.mark.full, id=f"masked-{label(regime)}")
        for number, regime in enumerate(shared)
    ]


@pytest.mark.parametrize(("run", "regime", "training", "fused"), cases_of_orders())
def test_same_bits_in_every_order(
    run_on: Callable[..., Emulator], request: pytest.FixtureRequest, run: Callable[..., Results],
    regime: tuple[Any, ...], training: bool, fused: bool,
) -> None:  # fmt: skip
    """Every order of threads and blocks gives the same bits, near the results of the NumPy backend."""
    seed = seed_of(request.node.nodeid)
    expected = run(None, seed, regime, training, fused)
    results = [run(run_on(Emulator(DEVICE, order)), seed, regime, training, fused) for order in emulator.ORDERS]
    for first, *others, exact in zip(*results, expected, strict=True):
        for other in others:
            assert_same(other, first)
        assert_within(first, exact, 1e-4 * (1 + np.abs(exact)))


@pytest.mark.parametrize("scale", [1, 2.0**-46], ids=["ordinary", "out of range"])
@pytest.mark.parametrize("regime", [
    pytest.param(regime, marks=() if regime[0] == "block-registers" else pytest.mark.full, id=label(regime))
    for regime in REGIMES if regime[0][:4] in ("bloc", "clus", "grid")
])  # fmt: skip
def test_same_bits_in_every_order_where_m2_is_summed_again(
    run_on: Callable[..., Emulator], rng: np.random.Generator, regime: tuple[Any, ...], scale: float
) -> None:
    """Planes in which one element differs, by less than the rounding of the plane's sum; and planes so small that m2 is
    summed a third time."""
    x = np.full(regime[1], 12345.678, np.float32)
    x += rng.uniform(-1, 1, (*x.shape[:2], 1, 1)).astype(np.float32)
    x[..., 1, 2] = np.nextafter(x[..., 1, 2], np.float32(np.inf))
    x = reference.LAYOUTS[regime[2]](x * np.float32(scale))
    results = []
    for order in emulator.ORDERS:
        runtime = run_on(Emulator(DEVICE, order))
        runtime._device = regime[3]
        y, saved = cn.instance_norm_forward(x, eps=0.0)
        results.append([y, saved.mean, saved.rstd])
    exact = reference.forward(x, eps=0.0)
    assert_within(results[0][0], exact, 1e-4 * (1 + np.abs(exact)))
    for first, *others in zip(*results, strict=True):
        for other in others:
            assert_same(other, first)


@pytest.mark.parametrize(
    "size", [6143, 8192, *(pytest.param(size, marks=pytest.mark.full) for size in (6142, 6144, 8190, 16_384))]
)
@pytest.mark.parametrize("device", ["split", "grid"])
def test_empty_last_tile_of_unaligned_planes(
    run_on: Callable[..., Emulator], rng: np.random.Generator, device: str, size: int
) -> None:
    """Planes that end where a tile begins, if they start at an aligned address, have an empty tile if they do not: 3072
    elements are a tile of a double backward, 8192 one of the others."""
    x, dy, ddx = (rng.normal(3, 2, (2, 3, size + 1)).astype(np.float32)[:, :, :size] for _ in range(3))
    weight = rng.normal(size=3).astype(np.float32)

    def results() -> Results:
        y, saved = cn.instance_norm_forward(x, weight, weight)
        double = cn.instance_norm_double_backward(ddx, weight, weight, dy, saved)
        return [y, *cn.instance_norm_backward(dy, saved)[:3], *double]

    expected = results()
    run_on(Emulator(BLOCKS if device == "split" else GRID))
    for actual, exact in zip(results(), expected, strict=True):
        assert_within(actual, exact, 1e-3 * (1 + np.abs(exact)))


def test_dy_and_residual_of_other_strides(run_on: Callable[..., Emulator], rng: np.random.Generator) -> None:
    """The last step of a split backward reads dresidual, a new array, in place of dy, which has gaps here."""
    shape = (2, 3, 20_000)
    x, residual, dy = (rng.normal(size=(2, 3, 20_004)).astype(np.float32)[..., :20_000] for _ in range(3))

    def results() -> Results:
        _, saved = cn.instance_norm_forward(np.ascontiguousarray(x), activation="relu", residual=residual)
        gradients = cn.instance_norm_backward(dy, saved)
        return [gradients[0], gradients[3]]

    expected = results()
    runtime = run_on(Emulator(BLOCKS))
    actual = results()
    assert any("input_gradient" in count.kernel for count in runtime.counts)
    for one, exact in zip(actual, expected, strict=True):
        assert one.shape == shape
        assert_within(one, exact, 1e-4 * (1 + np.abs(exact)))


def _caught(
    run_on: Callable[..., Emulator], monkeypatch: pytest.MonkeyPatch, transform: emulator.Transform,
    regimes: Sequence[tuple[Any, ...]], run: Callable[..., Results] = _single,
) -> str:  # fmt: skip
    """Return the emulator's first complaint about changed kernels, or '' if no order shows a fault."""
    for regime in regimes:
        monkeypatch.setitem(MODULES, "cpu", "cupynorm.cpu")
        expected = run(None, 1, regime, True)
        for order in emulator.ORDERS:
            try:
                results = run(run_on(Emulator(DEVICE, order, transform)), 1, regime, True)
            except SimtError as error:
                return str(error)
            for actual, exact in zip(results, expected, strict=True):
                if not np.allclose(actual, exact, rtol=1e-3, atol=1e-3):
                    return f"wrong numbers in {order} order"
    return ""


#: Barriers whose removal no test shows, with the reason why they are redundant: none.
SURVIVORS: dict[str, str] = {}

#: Calls by which threads wait for each other, or announce their arrival.
BARRIER = re.compile(
    r"(?:__sync(?:threads|warp)\(\)|cluster_(?:arrive|wait)\(\)|add_release\(\w+\)|wait_until\(\w+, \w+\));"
)


def _first(*names: str, layout: str = "contiguous", table: Sequence[Any] = REGIMES) -> list[tuple[Any, ...]]:
    """Return the first regime of each name in the table."""
    return [next(r for r in table if r[0].startswith(name) and r[2] == layout) for name in names]


#: The regimes that show a missing barrier in a file: few, since each is compiled anew.
SHOWN_BY = {
    # Not channels-first, where a single thread puts.
    "group.cuh": _first("cluster", "grid", layout="channels_last"),
    "forward.cu": _first("subwarp"), "backward.cu": _first("subwarp"),
    "double_backward.cu": _first("subwarp", table=DOUBLE_REGIMES),
    "merge.cuh": _first("split"), "channels.cu": _first("subwarp"),
    "sums.cuh": [REGIMES[2], *_first("block-registers")],
}  # fmt: skip


def _barriers() -> list[tuple[str, int, int]]:
    """Return every barrier in the kernel sources: file, line, and number in the line."""
    sites = []
    for path in sorted(kernel_folder().glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            sites += [(path.name, number, i) for i, _ in enumerate(BARRIER.findall(line.split("//")[0]))]
    return sites


@pytest.mark.full
@pytest.mark.parametrize(("file", "line", "which"), _barriers())
def test_every_barrier_is_needed(
    run_on: Callable[..., Emulator], monkeypatch: pytest.MonkeyPatch, file: str, line: int, which: int
) -> None:
    text = (kernel_folder() / file).read_text().splitlines()[line - 1]
    site = list(BARRIER.finditer(text))[which]
    without = text[: site.start()] + ";" + text[site.end() :]

    def removed(source: str) -> str:
        # Find the line in its inlined file; leave modules alone that do not include the file.
        marker = f'#line 1 "kernels/{file}"\n'
        head, found, body = source.partition(marker)
        if not found:
            return source
        lines = body.splitlines()
        here = _line_in(body, file, line)
        assert lines[here] == text
        lines[here] = without
        return head + found + "\n".join(lines)

    run = _double if "double" in file else _single
    said = _caught(run_on, monkeypatch, removed, SHOWN_BY[file], run)
    print(f"{file}:{line}: {said}")
    assert bool(said) != (f"{file}:{line}" in SURVIVORS), said


def _line_in(body: str, file: str, line: int) -> int:
    """Return the index of line `line` of a file in a text that begins with the file and has others inlined."""
    current, number = file, 0
    for index, text in enumerate(body.splitlines()):
        directive = re.match(r'#line (\d+) "kernels/(.+)"', text)
        if directive:
            number, current = int(directive[1]) - 1, directive[2]
            continue
        number += 1
        if current == file and number == line:
            return index
    raise AssertionError(f"{file}:{line} is not there")


@pytest.mark.full
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("if (partition.holds(from + i)) vec[i] = partition.get(", "vec[i] = partition.get(",
         "outside of every array"),
        ("MISALIGNED && subdivision == 0 ? 0 : (int)(address / sizeof(T) % VEC_SIZE)", "0", "not aligned"),
        ("if (lane < channel_vecs) {", "if (false) {", "wrong numbers"),  # reads poisoned shared memory
        ("    __syncthreads();\n    #pragma unroll\n    for (int k = 0; k < K; k++) s[k] = 0;",
         "    if (threadIdx.x != 5) __syncthreads();\n    for (int k = 0; k < K; k++) s[k] = 0;", "divergence"),
        ("s[k] += __shfl_xor_sync(", "if (threadIdx.x % 32 != 3) s[k] += __shfl_xor_sync(", "divergence"),
        ("scratch[(warp * channel_vecs + lane) * K + k] = s[k];",
         "scratch[(warp * channel_vecs + lane) * K + k + 1] = s[k];",
         "behind the end of shared memory"),
        ("    Scale scale;", "    Scale scale, more;", "static assertion failed"),
    ],
    ids=["bounds", "alignment", "poison", "barrier", "shuffle", "shared", "arguments"],
)  # fmt: skip
def test_emulator_detects_faults(
    run_on: Callable[..., Emulator], monkeypatch: pytest.MonkeyPatch, old: str, new: str, complaint: str
) -> None:
    assert any(
        old in (kernel_folder() / file).read_text() for file in ("forward.cu", "partition.cuh", "tile.cuh", "sums.cuh")
    )
    said = _caught(run_on, monkeypatch, lambda source: source.replace(old, new), _first("block-registers"))
    assert complaint in said


def test_the_emulator_checks_offsets_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So g++ agrees with NumPy on every module that is built."""
    fields = arguments.STRUCTS["running_statistics"].descr
    wrong = np.dtype([fields[1], fields[0], *fields[2:]], align=True)
    monkeypatch.setitem(arguments.STRUCTS, "running_statistics", wrong)  # type: ignore[arg-type]
    with pytest.raises(SimtError, match="static assertion failed"):
        build(Module("channels", "float32", 1, "channels_first"))


WHICH = """
KERNEL(64, 1) which(long long scope_index, long long tiles, long long channels, long long* found) {
    const Partition<WARP, 64> partition(scope_index, tiles, 1, 2, Tensor{}, channels, 8);
    if (threadIdx.x < 2) store(found + threadIdx.x, partition.c);
    if (threadIdx.x == 2) { store(found + 2, partition.n); store(found + 3, (long long)partition.tile); }
}
"""


@pytest.mark.parametrize("kind", ["channels_first", "channels_last"])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("channels", [1, 5, 2**32 - 1, 2**32, 2**35 + 6])
def test_planes_of_a_scope_beyond_32_bits(kind: Any, tiles: int, channels: int) -> None:
    """Channel tiles of arrays larger than any here. Kernels divide their numbers in 32 bits if these suffice."""
    module = Module("forward", "float32", 4, kind)
    text = Text("which", inlined("partition.cuh") + WHICH, ("which",), "text", module.constants)
    groups = channels if kind == "channels_first" else -(-channels // 8)  # of two threads with vecs of 4
    runtime, found = Emulator(), np.zeros(4, np.int64)
    for channel_tile in (0, 3, groups, 7 * groups - 1, 2**32 - 1, 2**32, 2**33 + 3, 2**40 + 3 * groups):
        for tile in {0, tiles - 1}:
            numbers = (np.int64(channel_tile * tiles + tile), np.int64(tiles), np.int64(channels))
            step = Step("which", "which", "which", (1, 1), 64, 0)
            runtime.prepare((text, step), (*numbers, np.uintp(found.ctypes.data)), [found])()
            group = channel_tile % groups
            planes = (group, group) if kind == "channels_first" else (8 * group, 8 * group + 4)
            assert found.tolist() == [*planes, channel_tile // groups, tile]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_conversions(run_on: Callable[..., Emulator], dtype: str) -> None:
    """The kernels read and round every 16-bit value as NumPy and ml_dtypes do, except denormal float32 numbers.

    These, which bfloat16 can store, may be flushed in between (the emulator does so on x86).
    """
    run_on(Emulator(DEVICE))
    x = np.arange(65536, dtype=np.uint16).view(devices.dtype_of(dtype)).reshape(1, 1, 65536)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)

    def flushed(values: np.ndarray) -> np.ndarray:
        return np.where(np.abs(values) < 2.0**-126, 0, values)

    y = cn.instance_norm(x, zero, one, use_input_stats=False, eps=0.0)
    wide = x.astype(np.float32)
    assert_equal(flushed(y.astype(np.float32)), flushed(wide))
    # Values between the 16-bit ones: a third of each, rounded.
    y = cn.instance_norm(x, zero, one, one / 3, use_input_stats=False, eps=0.0)
    with np.errstate(all="ignore"):
        third = flushed(wide) * (one / 3)
        assert_equal(flushed(y.astype(np.float32)), flushed(third.astype(x.dtype).astype(np.float32)))


def _asan_environment() -> dict[str, str]:
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = library.stdout.strip()
    if not os.path.isabs(path):
        pytest.skip("AddressSanitizer is not installed")
    return os.environ | {
        "LD_PRELOAD": path,
        "ASAN_OPTIONS": "detect_leaks=0,log_to_syslog=0",
        "CUPYNORM_SIMT_ASAN": "1",
    }


@pytest.mark.full
def test_address_sanitizer() -> None:
    """Run a part of the case table with arrays and shared memory watched on the heap, and threads' own arrays by index:
    every scope, and both layouts of forward and backward."""
    scopes = ("registers4", "shared4", "normal-grid")  # beside those of the small cases
    chosen = f"simt and float32 and (test_small or contiguous and ({' or '.join(scopes)}))"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, "tests/conformance/test_cases.py"],
        env=_asan_environment(), capture_output=True, text=True, check=False, cwd=Path(TESTS).parent,
    )  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert all(re.search(rf"{scope}\] PASSED", done.stdout) for scope in scopes)
    assert "ERROR: AddressSanitizer" not in done.stderr


_OVERFLOW = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, cupynorm
from emulator import backend
from helpers.backends import use
backend.runtime.transform = lambda source: source.replace(*sys.argv[2:])
with use("simt"):
    cupynorm.instance_norm(np.ones((1, 1, 35, 450), np.float32))
"""


@pytest.mark.full
@pytest.mark.parametrize(("text", "index", "beyond", "said"), [
    ("scratch[(warp * channel_vecs + lane) * K + k] = s[k];", "+ k]", "+ k + 16]", "heap-buffer-overflow"),
    ("for (int i = 0; i < width; i++) t[i] += t[i + width];", "i < width", "i <= width", "index 4 out of bounds"),
], ids=["shared memory", "an array of a thread"])  # fmt: skip
def test_sanitizers_detect_an_overflow(text: str, index: str, beyond: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OVERFLOW, TESTS, text, text.replace(index, beyond)],
        env=_asan_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert said in done.stderr
