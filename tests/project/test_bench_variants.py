"""The bench's variants: forced ones are correct, and no longer forced afterwards; which are tried; the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator import runtime as emulator
from emulator.runtime import Emulator
from helpers.recorder import Recorder

import cupynorm as cn
from bench.commands import variants
from bench.commands.variants import SPLIT, Trial
from bench.core import peers
from bench.core.cases import TOLERANCE, Arrays, Case
from bench.core.timing import HostClock
from cupynorm.cuda.device import DEVICES, Device
from cupynorm.cuda.variants import FORCED, VARIANTS, Variant, widest

DTYPES = {"float32": 4, "bfloat16": 2}
SMALL = Device("small", (9, 0), 5, 227 * 1024, 2**20, 16)  # small enough to emulate a whole grid


def case(op: str, dtype: str, positions: int, channels: int = 3) -> Case:
    return Case(op, (1, channels, 1, positions), dtype, "channels_first", False)


def sweep(**changes: Any) -> list[Case]:
    given = {"dtype": list(DTYPES), "op": list(variants.OPS), "layout": ["channels_first"], "sizes": None}
    return variants.cases(argparse.Namespace(**given, elements=4**13, **changes))


def test_forcing_is_undone() -> None:
    one = case("forward", "float32", 1000)
    before = variants.planned(one, DEVICES["H100"], {})
    variant = Variant("block", "registers", 1024, 1, resident=2048)
    with variants.forced(Trial(variant).lists("forward")):
        made, (module,) = variants.planned(one, DEVICES["H100"], {})
        assert made.steps[0].name == f"forward_{variant.name}"
        assert module.kernels == (f"forward_{variant.name}",)
        assert "KERNEL(1024, 2) " in module.source  # two such blocks per multiprocessor
    assert FORCED == {}
    assert variants.planned(one, DEVICES["H100"], {}) == before


def test_public_calls_launch_the_forced_variant(run_on: Callable[..., Any]) -> None:
    """Also where the same call was known before."""
    runtime = run_on(Recorder(DEVICES["H100"]))
    x = np.zeros((64, 64, 4096), np.float32)

    def launched() -> list[str]:
        runtime.clear()
        _, saved = cn.instance_norm_forward(x)
        cn.instance_norm_backward(x, saved)
        return [step.name for step in runtime.steps]

    planned = launched()
    variant = Variant("block", "registers", 512, 8)
    for op, forward in (("forward", 0), ("backward", 1)):
        with variants.forced(Trial(variant).lists(op)):
            names = launched()
            assert names[forward] == f"{op}_{variant.name}" != planned[forward]
        assert launched() == planned


def test_forced_modules_are_other_modules() -> None:
    variant = VARIANTS["forward"][-1]
    large = case("forward", "float32", 2**20)
    (today,), (forced,), (bound,) = (
        variants.planned(large, DEVICES["H100"], lists)[1]
        for lists in (
            {},
            {"forward": (variant,)},
            {"forward": (Variant(variant.scope, variant.residency, variant.threads, 0, resident=1024),)},
        )
    )
    assert len({today, forced, bound}) == 3
    assert len({today.source, forced.source, bound.source}) >= 2
    assert bound.source != forced.source


@pytest.mark.parametrize("op", variants.OPS)
def test_catalogue_includes_current_variants(op: str) -> None:
    listed = [trial.variant for trial in variants.catalogue(op) if not trial.split]
    assert set(VARIANTS[op]) < set(listed)
    names = [trial.name for trial in variants.catalogue(op)]
    assert len(set(names)) == len(names)


@pytest.mark.long
def test_variants_tried_for_a_plane() -> None:
    found = {each: variants.entries(each, DEVICES["H200"]) for each in sweep()}
    assert 300 < sum(map(len, found.values())) < 700
    for each, mine in found.items():
        assert sum(entry.today for entry in mine) == 1, each
        vecs = each.plane_bytes // 16
        for entry in mine:
            variant, step = entry.trial.variant, entry.plan.steps[0]
            assert entry.trial.split == (entry.plan.regime == "split")
            assert all(step.name.endswith(variant.name) for step in entry.plan.steps if step.name[:5] != "merge")
            assert step.shared <= DEVICES["H200"].shared_per_block
            if variant.residency == "registers" and variant.scope != "subwarp" and not entry.trial.split:
                held = variant.size * variant.vecs_per_thread * step.tiles  # in all blocks of a group
                assert vecs <= held
                assert held <= 4 * vecs or entry.today
                assert variant.grouped or step.tiles == 1
    names = {entry.trial.name for entry in found[sweep()[0]]}
    assert {"subwarp 256x8", "subwarp 128x4"} <= names
    scopes = {
        each.shape[-1]: {e.trial.variant.scope for e in mine} for each, mine in found.items() if each.op == "forward"
    }
    assert scopes[32] == {"warp", "block"}
    assert scopes[256] == {"block", "cluster", "grid"}
    assert scopes[8192] == {"block"}


def some(op: str) -> list[Trial]:
    """Return variants of each scope, with numbers of threads that no plan uses."""
    bound = 2048 if op == "forward" else 1024
    return [
        Trial(Variant("subwarp", "registers", 128, 16)),
        Trial(Variant("block", "registers", 64, 2)),
        Trial(Variant("block", "registers", 512, 1, resident=bound)),
        Trial(Variant("block", "registers", 1024, 4)),
        Trial(Variant("block", "shared", 1024, 0)),
        Trial(Variant("cluster", "shared", 256, 0, 4)),
        Trial(Variant("grid", "shared", 256, 0)),
        Trial(Variant("block", "registers", 1024, 2), split=True),
    ]


def every() -> list[Any]:
    """Return the whole catalogue, for the nightly tier, with some variants in the full tier."""
    found = []
    for op in variants.OPS:
        for trial in variants.catalogue(op):
            for dtype, itemsize in DTYPES.items():
                if trial.variant.scope == "subwarp" and trial.variant.vecs_per_thread % (16 // itemsize):
                    continue
                full = trial in some(op) and (dtype == "float32") == (op == "forward")
                marks = pytest.mark.full if full else pytest.mark.nightly
                found.append(pytest.param(op, dtype, trial, marks=marks, id=f"{op}-{dtype}-{trial.name}"))
    return found


@pytest.mark.simt
@pytest.mark.parametrize(("op", "dtype", "trial"), every())
def test_each_variant_is_right(run_on: Callable[..., Any], op: str, dtype: str, trial: Trial) -> None:
    """For planes that fill its threads, that leave most of them idle, and that are not multiples of 16 bytes."""
    emulator.require()
    runtime = run_on(Emulator(SMALL))
    variant, v = trial.variant, widest(DTYPES[dtype], "channels_first")
    if variant.scope == "subwarp":
        sizes = [7 * 7, 8 * variant.vecs_per_thread]
    elif trial.split:
        sizes = [2 * variant.threads * variant.vecs_per_thread * v + 5]
    elif variant.residency == "registers":
        full = variant.size * variant.vecs_per_thread * v
        sizes = [full, full // 2 - 3]
    else:
        sizes = [2 * variant.threads * v * variant.cluster + 3]
    for positions in sizes:
        one = case(op, dtype, positions)
        arrays = Arrays(np, one.shape, dtype, one.layout, False, 1)
        own = peers.cupynorm_itself(op, arrays)
        runtime.counts.clear()
        with variants.forced(trial.lists(op)):
            error = arrays.error(own.answers(own.run(0)), op)
        assert runtime.counts[0].kernel.endswith(variant.name)
        assert error < TOLERANCE[dtype] / (100 if dtype == "float32" else 5), positions


class Loading(Emulator):
    """An emulator with `load`, which fails for warps of one vec."""

    def load(self, module: Any) -> None:
        if any("warp" in name and name.endswith("x1") for name in module.kernels):
            raise RuntimeError("no such compiler\nat all")
        emulator.build(module)


@pytest.mark.simt
def test_a_run(run_on: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the emulator, with a variant that does not compile: the rows in the file, and the summary."""
    emulator.require()
    tried = {
        op: [
            Trial(Variant("subwarp", "registers", 128, 16 if op == "forward" else 8)),  # as planned for 8 x 8
            Trial(Variant("warp", "registers", 128, 1)),
            Trial(Variant("block", "registers", 64, 1)),
        ]
        for op in variants.OPS
    }
    assert all(mine[0].variant in VARIANTS[op] for op, mine in tried.items())
    monkeypatch.setattr(variants, "catalogue", tried.get)
    runtime = run_on(Loading(SMALL))
    options = variants._parser().parse_args(
        ["--elements", "1024", "--sizes", "8", "--dtype", "float32", "--rounds", "2", "--batch-ms", "0.01",
         "--json", str(tmp_path / "v.json")]
    )  # fmt: skip
    clock = HostClock()
    clock.pause = 0
    said: list[str] = []
    run = variants.Bench(np, runtime, clock, options, said.append)
    run.run(variants.cases(options))
    rows = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["op"], row["variant"], row["today"]) for row in rows] == [
        (op, trial.name, trial == mine[0]) for op, mine in tried.items() for trial in mine
    ]
    assert [row.get("failure") for row in rows] == [None, "RuntimeError: no such compiler", None] * 2
    for row in (row for row in rows if "failure" not in row):
        assert row["median_ms"] > 0
        assert row["of_copy"] == pytest.approx(row["copy_ms"] / row["median_ms"])
    assert "2 of 3 variants timed" in said[-1]
    assert not run.lost


@pytest.mark.simt
def test_a_wrong_answer_is_a_row(run_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.require()
    runtime = run_on(Loading(SMALL))
    options = variants._parser().parse_args(["--elements", "1024", "--sizes", "8", "--dtype", "float32"])
    run = variants.Bench(np, runtime, HostClock(), options, print)
    one = variants.cases(options)[0]
    arrays = Arrays(np, one.shape, "float32", one.layout, False, 1)
    own = peers.cupynorm_itself("forward", arrays)
    wrong = variants.replace(own, answers=lambda y: {"y": y + 1})
    entry = next(e for e in variants.entries(one, SMALL) if e.today)
    assert run.checked(one, arrays, wrong, entry)["failure"].startswith("wrong: error 1")
    assert "failure" not in run.checked(one, arrays, own, entry)


def row(
    variant: str, of_copy: float | None, today: bool = False, op: str = "forward", side: int = 16
) -> dict[str, Any]:
    facts = {"op": op, "shape": [1, 4, side, side], "dtype": "float32", "layout": "channels_first"}
    found = {"failure": "spills"} if of_copy is None else {"of_copy": of_copy, "registers": 40}
    return {**facts, "variant": variant, "today": today, **found}


def test_the_table() -> None:
    rows = [
        row("warp 128x2", 0.8, today=True),
        row("block 64x1", 0.96),
        row("block 128x1", None),
        row("subwarp 256x8", 0.5, today=True, side=4),
        row("grid 512", 0.7, op="backward"),
    ]
    table = variants.lines(rows)
    assert table[0] == "float32 channels_first forward"
    four, sixteen = (line.split() for line in table[2:4])
    assert four == ["4x4", "subwarp", "256x8", "50.0%", "subwarp", "256x8", "50.0%", "0.0%", "40"]
    assert sixteen == ["16x16", "warp", "128x2", "80.0%", "block", "64x1", "96.0%", "16.7%", "40"]
    assert table[5] == "float32 channels_first backward"
    assert any(line.split() == ["16x16", "–", "grid", "512", "70.0%", "–", "40"] for line in table)
    assert table[-1] == "forward float32 channels_first, planes of 16,16: block 128x1: spills"


def test_error_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if cn.devices.gpu_status()[0]:
        pytest.skip("a GPU is usable")
    with pytest.raises(SystemExit):
        variants.main([])
    assert "no usable GPU" in capsys.readouterr().err
    assert SPLIT.variant == VARIANTS["split"][0]
