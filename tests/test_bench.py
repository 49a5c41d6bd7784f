"""The benchmark: its counts, the turns of contestants, the refusal of wrong results, and its output."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_allclose, assert_equal

import cupynorm
from bench import __main__ as bench
from bench import aims, cases, claims, dram, host, passes, peers, prime, report, smoke, summary, timing, values
from cupynorm import cpu, devices
from cupynorm.cpu import numpy_path
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import DEVICES
from cupynorm.cuda.layout import contiguous_desc
from cupynorm.cuda.variants import ITEMSIZE

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.long
ROW = {
    "op": str,
    "shape": list,
    "dtype": str,
    "layout": str,
    "affine": bool,
    "activation": type(None),  # a plain row
    "regime": str,
    "bytes_per_element": type(None),  # on the CPU
    "median_ms": float,
    "gbps": float,
    "of_copy": float,
    "of_new_copy": float,
    "peers": dict,
}


def test_least_traffic():
    sizes = {op: cases.Case(op, (2, 3, 5, 7), "float16", "channels_first", True).minimal_bytes for op in cases.ACCESSES}
    assert sizes == {"forward": 2 * 2 * 210, "backward": 3 * 2 * 210, "both": 5 * 2 * 210}
    assert cases.Case("both", (2, 3, 5, 7), "bfloat16", "channels_last", False).plane_bytes == 70


def test_row_from_times():
    case = cases.Case("forward", (1, 1, 1000, 1000), "float32", "channels_first", False)
    times = {"cupynorm": timing.Timing(2e-3, 0), "copy": timing.Timing(1e-3, 0), "torch": timing.Timing(3e-3, 0)}
    row = report.row(case, "split", 12, times, {"torch": 1e-6})
    assert "negative_slope" not in row
    assert row["gbps"] == pytest.approx(4.0)
    assert row["of_copy"] == pytest.approx(0.5)
    assert row["peers"] == {"torch": {"median_ms": pytest.approx(3.0), "max_error": 1e-6}}
    assert report.document({}, [row])["copy_gbps"] == pytest.approx(8.0)


def test_shapes():
    assert cases.parse_shapes(["2,3,4", "1,1,2,2,2"], 256) == [cases.Layer((2, 3, 4)), cases.Layer((1, 1, 2, 2, 2))]
    real = cases.parse_shapes(["real"], 256)
    for layer in (
        cases.Layer((2, 320, 8, 8, 8), True, "leaky_relu", 0.01),
        cases.Layer((8, 512, 16, 16), True, "leaky_relu", 0.2),
        cases.Layer((1, 64, 256, 256), False, "relu"),
        cases.Layer((8, 512, 32, 32), cases.PER_SAMPLE),
    ):
        assert layer in real
        assert cases.parse_shapes([",".join(map(str, layer.shape))], 256) == [layer]  # the network's, given as numbers
    swept = [layer.shape for layer in cases.parse_shapes(["sweep"], 4**5)]
    assert swept[0] == (1, 64, 4, 4)
    assert swept[-1] == (1, 1, 32, 32)
    assert {math.prod(shape) for shape in swept} == {4**5}
    for word in ("2,3", "real,sweep", "2,3,0", "2,3,1,1", ""):
        with pytest.raises(ValueError, match="a shape is"):
            cases.parse_shapes([word], 256)


def test_epilogues_and_the_order_of_cases():
    layers = cases.parse_shapes(["sweep", "8,512,32,32", "2,3,4", "2,320,8,8,8"], 4**2)
    found = cases.cases_of(layers, ["float32"], ["channels_first", "channels_last"], ["none", "fused"], ["both"])
    assert len(set(found)) == len(found)
    first = [(case.shape, case.affine, case.activation) for case in found if case.layout == "channels_first"]
    assert first == [
        ((8, 512, 32, 32), False, None),
        ((2, 3, 4), False, None),  # once: it has no epilogue
        ((2, 320, 8, 8, 8), True, None),
        ((8, 512, 32, 32), "per sample", None),
        ((2, 320, 8, 8, 8), True, "leaky_relu"),
        ((1, 1, 4, 4), False, None),  # the sweep comes late
    ]
    assert [case.activation for case in found[-2:]] == [None, "leaky_relu"]
    assert {case.layout for case in found[-2:]} == {"channels_last"}  # both an epilogue and the other layout: last
    plain = cases.cases_of(layers, ["float32"], ["channels_first"], ["fused"], ["forward"], affine=False)
    assert {case.affine for case in plain} == {False}


def test_buffer_sets_exceed_the_cache():
    assert cases.buffer_sets(10, 100, 512) == 10
    assert cases.buffer_sets(1000, 100, 512) == 1
    assert cases.buffer_sets(1, 10_000, 512) == 512


def test_median_and_spread():
    assert timing.summarise([5.0, 1.0, 2.0, 100.0, 3.0]) == (3.0, 3.0)
    assert timing.summarise([7.0]) == (7.0, 0.0)


def test_contestants_take_turns_and_cycle_through_the_sets():
    calls: list[tuple[str, int]] = []

    class Clock(timing.HostClock):
        def seconds(self, contestant: timing.Contestant, calls: list[int]) -> float:
            for i in calls:
                contestant.run(i)
            return 0.4 * len(calls)

    def contestant(name: str) -> timing.Contestant:
        return timing.Contestant(name, lambda i: calls.append((name, i)), lambda _: {})

    race = timing.Race(Clock(), sets=3, batch_seconds=1.0)
    three = [contestant(name) for name in "abc"]
    assert [race.warm_up(each) for each in three] == [2, 2, 2]
    calls.clear()
    race.warm_up = lambda contestant: 2  # type: ignore[method-assign]
    samples = race.run(three, rounds=4)
    assert samples == {name: [pytest.approx(0.4)] * 4 for name in "abc"}
    assert "".join(name for name, _ in calls[::2]) == "abcbcacababc"
    assert [i for name, i in calls if name == "a"] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_arrays_and_reference(dtype: str, layout: str):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    arrays = cases.Arrays(np, (3, 4, 5, 6), dtype, layout, affine=True, sets=2)
    assert {a.dtype.name for a in (*arrays.x, *arrays.dy)} == {dtype}
    assert not np.shares_memory(arrays.x[0], arrays.x[1])
    fastest = 1 if layout == "channels_last" else 3
    assert arrays.x[1].strides[fastest] == arrays.x[0].itemsize
    x = arrays.x[1].astype(np.longdouble)
    mean, var = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True)
    exact = (x - mean) / np.sqrt(var + cases.EPS) * arrays.weight.reshape(4, 1, 1) + arrays.bias.reshape(4, 1, 1)
    assert_allclose(arrays.reference["y"], exact.astype(np.float64), rtol=1e-12, atol=1e-12)
    for op in cases.ACCESSES:
        own = peers.cupynorm_itself(op, arrays)
        assert arrays.error(own.answers(own.run(1)), op) <= cases.TOLERANCE[dtype]


def test_reference_in_blocks(monkeypatch: pytest.MonkeyPatch):
    shape = (3, 5, 4, 4)
    whole = cases.Arrays(np, shape, "float32", "channels_first", affine=True, sets=1).reference
    for block in (1, 40, 100):
        monkeypatch.setattr(cases, "BLOCK", block)
        blocks = cases.Arrays(np, shape, "float32", "channels_first", affine=True, sets=1).reference
        for name, exact in whole.items():
            assert_allclose(blocks[name], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("affine", [False, True, cases.PER_SAMPLE])
def test_reference_with_an_epilogue(
    activation: str | None, affine: bool | str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """The longdouble y, and dx, dweight and dbias as differences of sum(y * dy) along random directions."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no longer than double here")
    monkeypatch.setattr(cases, "BLOCK", 40)
    shape, slope = (3, 5, 4, 4), {None: 1, "relu": 0, "leaky_relu": 0.2}[activation]
    arrays = cases.Arrays(np, shape, "float64", "channels_first", affine, 1, activation=activation, negative_slope=0.2)

    def forward(x: np.ndarray, weight: Any, bias: Any) -> np.ndarray:
        z = x - x.mean((2, 3), keepdims=True)
        z /= np.sqrt((z * z).mean((2, 3), keepdims=True) + np.longdouble(cases.EPS))
        if affine:
            z = z * weight.reshape(-1, 5, 1, 1) + bias.reshape(-1, 5, 1, 1)
        return np.where(z > 0, z, slope * z)

    given = [a if a is None else a.astype(np.longdouble) for a in (arrays.x[0], arrays.weight, arrays.bias)]
    y = forward(*given)
    assert affine is not cases.PER_SAMPLE or arrays.weight.shape == (3, 5)
    assert_allclose(arrays.reference["y"], y.astype(np.float64), rtol=1e-12, atol=1e-12)
    for i, name in enumerate(("dx", "dweight", "dbias")[: 3 if affine else 1]):
        step = rng.standard_normal(given[i].shape) * np.longdouble(1e-9)
        ends = [forward(*(a + sign * step if i == j else a for j, a in enumerate(given))) for sign in (1, -1)]
        slope_found = ((ends[0] - ends[1]) * arrays.dy[0]).sum() / 2
        expected = (arrays.reference[name] * step).sum()
        assert abs(slope_found - expected) < 1e-6 * 1e-9 * step.size, name


def test_no_gradient_near_the_kink():
    """With an activation; elsewhere there is a gradient."""
    for dtype in ("float32", "float16"):
        for layout in cases.LAYOUTS:
            arrays = cases.Arrays(np, (2, 3, 64, 64), dtype, layout, True, 2, activation="relu")
            assert arrays.slope == 0
            z = arrays._exact((slice(None), slice(None)))[2]
            near = np.abs(z) < cases.TOLERANCE[dtype]
            assert near.any()
            for dy in arrays.dy:
                assert not dy[near].any()
                assert np.count_nonzero(dy[~near]) > 0.99 * np.count_nonzero(~near)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", ["cupynorm", "torch", "jax", "onnxruntime", "textbook"])
def test_peers_compute_the_same_epilogue(name: str, layout: str):
    make = {"cupynorm": peers.cupynorm_itself, **peers.PEERS}[name]
    layers = [(False, "relu"), (True, "leaky_relu"), (cases.PER_SAMPLE, None), (cases.PER_SAMPLE, "leaky_relu")]
    for affine, activation in layers:
        arrays = cases.Arrays(
            np, (3, 4, 5, 6), "float32", layout, affine, 1, activation=activation, negative_slope=0.2
        )  # fmt: skip
        for op in cases.ACCESSES:
            try:
                contestant = make(op, arrays)
            except peers.UnavailableError as reason:
                if op == "forward":
                    pytest.skip(f"{reason}")
                continue
            answers = contestant.answers(contestant.run(0))
            assert arrays.error(answers, op) < 1e-5
            if activation is not None:  # so the comparison covers the activation
                arrays.__dict__.pop("reference")
                arrays.slope = 1.0
                assert arrays.error(answers, op) > 0.1
                arrays.__dict__.pop("reference")
                arrays.slope = {"relu": 0.0, "leaky_relu": 0.2}[activation]


def test_error_detects_nan_and_missing_results():
    arrays = cases.Arrays(np, (2, 2, 3, 3), "float32", "channels_first", affine=False, sets=1)
    y = arrays.reference["y"].copy()
    y[1, 1, 0, 0] = np.nan
    assert math.isnan(arrays.error({"y": y}, "forward"))
    with pytest.raises(ValueError, match="dx has shape None"):
        arrays.error({"y": arrays.reference["y"]}, "both")


def test_plan_facts():
    x = np.zeros((2, 3, 16, 16), np.float16)
    assert report.planned("both", x, None) == ("compiled" if cpu.compiled else "numpy", None)
    assert report.planned("both", x, DEVICES["H100"])[1] == 5 * 2
    regime, size = report.planned("forward", np.zeros((1, 1, 2048, 2048), np.float32), DEVICES["T4"])
    assert (regime, size) == ("split", 12)
    copied = report.planned("forward", x[:, :, ::2], DEVICES["H100"])[1]
    assert copied == 2 * 2 + 2 * 2


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **fakes: Any) -> int:
    for name, make in fakes.items():
        monkeypatch.setitem(peers.PEERS, name, make)
    return bench.main(["--device", "cpu", "--rounds", "2", "--batch-ms", "0.2", *arguments])


@pytest.mark.full
def test_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    result, picture = tmp_path / "new" / "r.json", tmp_path / "new" / "r.png"
    status = run(
        monkeypatch,
        *("--shapes", "2,3,8,8", "1,2,4,4,4", "--peers", "textbook", "--layout", "channels_first,channels_last"),
        *("--affine", "--json", str(result), "--plot", str(picture)),
    )
    assert status == 0, capsys.readouterr().out
    written = json.loads(result.read_text(encoding="utf-8"))
    assert list(written) == ["schema", "date", "commit", "device", "versions", "copy_gbps", "rows"]
    assert written["schema"] == 1
    assert written["copy_gbps"] > 0
    assert {"name", "cores"} <= set(written["device"])
    assert {"python", "numpy", "cupynorm"} <= set(written["versions"])
    assert len(written["rows"]) == 2 * 2 * 3
    for row in written["rows"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert row["gbps"] == pytest.approx(
            cases.ACCESSES[row["op"]] * 4 * math.prod(row["shape"]) / row["median_ms"] / 1e6
        )
        assert set(row["peers"]) == {"textbook"}
        assert 0 <= row["peers"]["textbook"]["max_error"] < 1e-4
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert len(summary.bench_lines(written)) == 2 + 4


@pytest.mark.full
def test_fused_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    result, picture = tmp_path / "r.json", tmp_path / "r.png"
    arguments = (
        "--shapes",
        "2,320,4,4,4",
        "2,3,8,8",
        "--op",
        "both",
        "--epilogue",
        "none,fused",
        "--peers",
        "textbook",
    )
    status = run(monkeypatch, *arguments, "--json", str(result), "--plot", str(picture))
    assert status == 0, capsys.readouterr().out
    written = json.loads(result.read_text(encoding="utf-8"))
    rows = [(row["shape"], row["affine"], row["activation"], row.get("negative_slope")) for row in written["rows"]]
    large = [2, 320, 4, 4, 4]
    assert rows == [
        (large, True, None, None), ([2, 3, 8, 8], False, None, None), (large, True, "leaky_relu", 0.01)
    ]  # fmt: skip
    assert "2,320,4,4,4 affine leaky_relu" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert len(summary.bench_lines(written)) == 2 + 3


@pytest.mark.full
def test_compile_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    result = tmp_path / "r.json"
    monkeypatch.setattr(peers, "COMPILING", {"slow"})
    arguments = ("--shapes", "2,3,8,8", "2,3,9,9", "--peers", "slow,textbook", "--json", str(result))
    for limit, expected in (((), [True] * 6), (("--compile-limit", "0"), [False, False, True] + [False] * 3)):
        assert run(monkeypatch, *arguments, *limit, slow=named("slow")) == 0, capsys.readouterr().out
        rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
        assert ["slow" in row["peers"] for row in rows] == expected
        assert all("textbook" in row["peers"] for row in rows)


def named(name: str) -> Any:
    """The textbook peer under another name."""

    def make(op: str, arrays: cases.Arrays) -> timing.Contestant:
        return replace(peers.textbook(op, arrays), name=name)

    return make


def test_wrong_and_failing_peers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("rich")
    timed: list[int] = []

    def wrong(op: str, arrays: cases.Arrays) -> timing.Contestant:
        def forward(i: int) -> np.ndarray:
            timed.append(i)
            return arrays.x[i]  # not normalised

        return timing.Contestant("wrong", forward, lambda y: {"y": y})

    def failing(op: str, arrays: cases.Arrays) -> timing.Contestant:
        raise RuntimeError("no such kernel")

    result = tmp_path / "r.json"
    arguments = ("--shapes", "2,3,8,8", "--op", "forward", "--peers", "wrong,failing,textbook", "--json", str(result))
    assert run(monkeypatch, *arguments, wrong=wrong, failing=failing) == 0
    out = capsys.readouterr().out
    assert "wrong is wrong at forward (2, 3, 8, 8) float32 channels_first plain" in out
    assert "RuntimeError: no such kernel" in out
    assert timed == [0]  # run for its result, not timed
    assert list(json.loads(result.read_text(encoding="utf-8"))["rows"][0]["peers"]) == ["textbook"]


def test_own_failure_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    broken = SimpleNamespace(instance_norm=lambda x, **_: x)
    monkeypatch.setattr(peers, "cupynorm", broken)
    assert run(monkeypatch, "--shapes", "2,3,8,8", "--op", "forward", "--peers", "none") == 1
    assert "cupynorm is wrong" in capsys.readouterr().out


def test_size_limit_and_time_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    shapes = ("--shapes", "2,3,8,8", "2,3,64,64", "--peers", "none")
    assert run(monkeypatch, *shapes, "--max-bytes", "4096") == 0
    assert "(2, 3, 64, 64) float32 left out" in capsys.readouterr().out
    assert run(monkeypatch, *shapes, "--time-limit", "1e-9") == 1
    assert "6 cases not measured" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--op", "sideways"), ("--shapes", "3"), ("--peers", "nobody"), ("--dtype", "")])
def test_bad_arguments(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_summary_of_tool_output():
    assert summary.tests_line("...\n===== 12 passed, 3 skipped in 4.50s =====\n") == "12 passed, 3 skipped in 4.50s"
    assert summary.tests_line("1 failed, 12 passed, 3 skipped in 65.10s (0:01:05)\n").startswith("1 failed, 12 passed")
    assert summary.tests_line("Killed\n") == "no result"
    text = "5 passed in 3.00s\n========= ERROR SUMMARY: 0 errors\n"
    assert summary.sanitizer_line(text) == "ERROR SUMMARY: 0 errors (5 passed in 3.00s)"


def test_sections_of_a_file():
    text = "== memcheck\n===== x =====\n==PROF== y\n== racecheck\nskipped: no\n"
    assert summary.section(text, "memcheck") == "===== x =====\n==PROF== y\n"
    assert summary.section(text, "racecheck") == "skipped: no\n"
    assert summary.section(text, "dram") is None
    assert summary.dram_line("not measured: ncu: ERR_NVGPUCTRPERM\n") == "not measured: ncu: ERR_NVGPUCTRPERM"
    assert summary.dram_line("bytes to and from DRAM\n") == ""


def test_summary_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary.main(tmp_path)
    assert capsys.readouterr().out.startswith("benchmark: no result")
    (tmp_path / "tests.txt").write_text("== tests\nKilled\n", encoding="utf-8")
    (tmp_path / "sanitizer.txt").write_text("== memcheck\n== racecheck\nskipped: no\n", encoding="utf-8")
    summary.main(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["tests: no result", "memcheck: no verdict (no result)"]


def made_up(times: float = 1.0, of_copy: float = 1.0, peers_: tuple[str, ...] = ("torch", "torch.compile")) -> Any:
    """A result with a row for each aim: `times` the aimed speedup over each peer, `of_copy`, host calls of 10 us, and
    imports `times` as fast as aimed at."""
    real = cases.real_layers()
    swept = cases.sweep_layers(cases.SWEEP_ELEMENTS["gpu"])
    rows = []
    for case in cases.cases_of(
        [*real, *swept],
        ["float32", "bfloat16"],
        list(cases.LAYOUTS),
        list(cases.EPILOGUES),
        list(cases.ACCESSES),
    ):
        aimed = {peer: aims.SPEEDUP.get((case.layout, case.activation is not None, peer), 1.0) for peer in peers_}
        seconds = {"cupynorm": timing.Timing(1.0, 0), "copy": timing.Timing(of_copy, 0)}
        seconds |= {peer: timing.Timing(times * speedup, 0) for peer, speedup in aimed.items()}
        rows.append(report.row(case, "block-shared", 8, seconds, dict.fromkeys(peers_, 0.0)))
    calls = [
        {"op": op, "shape": [2, 3, 4, 4], "dtype": "float32", "affine": affine, "microseconds": 10.0,
         "peers": {"torch": 10.0 * times}}
        for op in ("forward", "both") for affine in (False, True)
    ]  # fmt: skip
    imports = {name: most / times for name, most in aims.IMPORT.items()}
    return {"device": {"name": "an H100"}, "copy_gbps": 3000.0, "host": calls, "import": imports, "rows": rows}


def test_aims_reached():
    found = aims.aims(made_up(times=1.001))
    assert len(found) == 4 * 2 * 2 + 4 * 2 + 2 + 2 + 2
    assert {aim.verdict for aim in found} == {"reached"}
    assert len({aim.what for aim in found}) == len(found)
    aimed = {aim.what: aim.aimed for aim in found}
    assert aimed["of a copy, forward, channels_first, bfloat16, real shapes of 64 MB and more"] == 0.95
    assert aimed["of a copy, backward, channels_last, float32, every plane size"] == 0.85
    assert aimed["time of torch.compile over ours, channels_first, float32"] == 1.2
    assert aimed["time of torch over ours, channels_first, float32, activation fused"] == 2.5
    assert aimed["time of torch over ours, channels_last, bfloat16"] == 3


def test_aims_missed():
    found = aims.aims(made_up(times=0.3, of_copy=0.84))
    assert {aim.verdict for aim in found} == {"NOT REACHED"}
    # A single slow shape is found where the worst counts, and is named.
    for shape, count in (((2, 64, 64, 64, 64), 4), ((2, 128, 32, 32, 32), 0)):  # 67 MB in bfloat16; 34 in float32
        result = made_up(times=1.001)
        for row in result["rows"]:
            if tuple(row["shape"]) == shape and row["layout"] == "channels_first":
                row["of_copy"] = 0.5
        missed = [aim for aim in aims.aims(result) if aim.verdict != "reached"]
        assert len(missed) == count
        assert all(aim.measured == 0.5 and "worst: 2,64,64,64,64; " in aim.note for aim in missed)
    result = made_up(times=1.001)
    for row in result["rows"]:
        if row["shape"] == [1, 64, 256, 256] and row["op"] == "both" and row["activation"] == "relu":
            row["peers"]["torch"]["median_ms"] = 0.9 * row["median_ms"]
    slowest = [aim for aim in aims.aims(result) if "slowest" in aim.what]
    assert [(aim.measured, aim.verdict) for aim in slowest] == [(pytest.approx(0.9), "NOT REACHED")] * 2
    assert "1,64,256,256 channels_first fused" in slowest[0].note


def test_aims_of_an_incomplete_result():
    nothing = {**made_up(), "rows": []}
    del nothing["host"], nothing["import"]
    found = aims.aims(nothing)
    assert {aim.verdict for aim in found} == {"not measured"}
    text = aims.lines(nothing)
    assert len(text) == 1 + len(found)
    assert all("not measured" in line for line in text[1:])
    part = made_up(times=4.0)
    part["rows"] = [row for row in part["rows"] if row["shape"] in ([2, 64, 64, 64, 64], [1, 4**11, 4, 4])]
    verdicts = {aim.what: aim.verdict for aim in aims.aims(part) if not re.search("host|import", aim.what)}
    assert set(verdicts.values()) == {"reached in part"}
    mean = next(aim for aim in aims.aims(part) if aim.what == "time of torch over ours, channels_first, float32")
    assert (mean.measured, mean.note) == (pytest.approx(8.0), "8.00 to 8.00; 1 of 20")
    without = {aim.what: aim.verdict for aim in aims.aims(made_up(peers_=("torch",)))}
    assert without["time of torch.compile over ours, channels_first, float32"] == "not measured"


def test_host_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(host, "SHAPES", ((2, 3, 4, 4),))
    monkeypatch.setattr(host, "NAMES", ("textbook",))
    result = tmp_path / "r.json"
    report.write_json({"before": {"a": [1]}, "rows": [{"kept": 1}]}, result)
    assert host.main(["--device", "cpu", "--rounds", "2", "--calls", "3", "--json", str(result)]) == 0
    written = json.loads(result.read_text(encoding="utf-8"))
    assert list(written) == ["before", "rows", "host"]
    assert written["rows"] == [{"kept": 1}]
    assert [(row["op"], row["affine"]) for row in written["host"]] == [
        ("forward", False), ("both", False), ("forward", True), ("both", True)
    ]  # fmt: skip
    for row in written["host"]:
        assert row["microseconds"] > 0
        assert row["peers"]["textbook"] > 0
    assert "2,3,4,4 affine, forward + backward" in capsys.readouterr().out


def test_host_cost_excludes_preparation(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def passes(duration: float) -> None:
        nonlocal now
        now += duration

    monkeypatch.setattr(host.time, "perf_counter", lambda: now)
    contestant = timing.Contestant("a", lambda i: passes(2.0), lambda _: {})
    assert host.seconds(contestant, 5, lambda: passes(100.0)) == 2.0


def test_host_cost_refuses_a_wrong_result(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "cupynorm", SimpleNamespace(instance_norm=lambda x, **_: x))
    arrays = cases.Arrays(np, (2, 3, 4, 4), "float32", "channels_first", False, sets=1)
    with pytest.raises(RuntimeError, match="cupynorm is wrong at forward"):
        host.contestants("forward", arrays)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 2, 17, 33)])
def test_passes_of_numpy_alone(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "compiled", False)
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", 1024)  # several blocks, or tiles
    arrays = cases.Arrays(np, shape, "float32", "channels_first", True, sets=1)
    x, dy, y = arrays.x[0], arrays.dy[0], np.zeros(shape, np.float32)
    buffers = np.getbufsize()
    for op, result in (("forward", x + 1), ("backward", x + dy + 1)):
        for step in passes.passes(arrays, y)[op].values():
            step()
        assert_equal(y, result, what=op)
    assert np.getbufsize() == buffers


def test_passes_output(capsys: pytest.CaptureFixture[str]):
    compiled, threads = cpu.compiled, cupynorm.get_num_threads()
    assert passes.main(["--rounds", "1", "2,3,5,5"]) == 0
    assert (cpu.compiled, cupynorm.get_num_threads()) == (compiled, threads)
    forward, backward = capsys.readouterr().out.splitlines()
    for line, op, each in (
        (forward, "forward", ("sums", "squares", "* scale", "+ intercept")),
        (backward, "backward", ("sums", "products", "* slope", "+ dy", "+ constant", "* scale")),
    ):
        found = re.fullmatch(rf"2,3,5,5 plain, {op}: passes (\d+) us \((.*)\); calls: 1 thread \d+.*", line)
        assert found, line
        parts = dict(part.rsplit(" ", 1) for part in found[2].split(", "))
        assert tuple(parts) == each
        assert abs(sum(map(int, parts.values())) - int(found[1])) <= len(each)
    with pytest.raises(SystemExit):
        passes.main(["2,3"])


def test_values_output(capsys: pytest.CaptureFixture[str]):
    compiled, threads = cpu.compiled, cupynorm.get_num_threads()
    assert values.main(["--rounds", "1", "2,3,5,5"]) == 0
    assert (cpu.compiled, cupynorm.get_num_threads()) == (compiled, threads)
    lines = iter(capsys.readouterr().out.splitlines())
    for dtype, sizes in values.SIZES.items():
        for op in ("forward", "backward"):
            cells = ", ".join(rf"{re.escape(f'{size:g}')}: [\d.]+ ms \([\d.]+x\)" for size in sizes)
            assert re.fullmatch(f"2,3,5,5 {dtype}, {op}: {cells}", next(lines))
    assert not list(lines)
    with pytest.raises(SystemExit):
        values.main(["2,3"])


#: A log of ncu --csv --print-units base: a kernel before the first mark, a case of one kernel, a case of two.
NCU = (
    """==PROF== Connected to process 7 (/usr/bin/python3)
==PROF== Profiling "fill" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
""".replace("\\\n", "")
    + "".join(
        f'"{i}","7","python3","127.0.0.1","{name}({arguments})","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0",'
        f'"Command line profiler metrics","dram__bytes_{direction}.sum","byte","{count:,}"\n'
        for i, (name, arguments, read, write) in enumerate(
            [
                ("fill", "float *", 1, 1),
                ("next_case", "", 0, 0),
                ("forward_warp", "const T *, T *", 4_000_000, 3_900_000),
                ("next_case", "", 0, 0),
                ("gradient_sums", "", 8_000_000, 1_000),
                ("input_gradient", "", 8_000_000, 3_999_000),
            ]
        )
        for direction, count in (("read", read), ("write", write))
    )
)


def test_dram_bytes():
    facts: dict[str, Any] = {"shape": [1, 1, 1000, 1000], "dtype": "float32", "regime": "warp"}
    cases_ = [
        {"op": "forward", **facts, "promised_bytes": 8_000_000},
        {"op": "backward", **facts, "promised_bytes": 20_000_000},
        {"op": "forward", **facts, "promised_bytes": 8_000_000},  # ncu was stopped before it
    ]
    rows = dram.rows_of(cases_, NCU)
    assert [(row["op"], row["read_bytes"], row["written_bytes"]) for row in rows] == [
        ("forward", 4_000_000, 3_900_000),
        ("backward", 16_000_000, 4_000_000),
    ]
    assert [kernel["name"] for kernel in rows[1]["kernels"]] == ["gradient_sums", "input_gradient"]
    assert [dram.ratio(row) for row in rows] == [pytest.approx(7.9 / 8), pytest.approx(1.0)]
    text = "\n".join(dram.lines(rows))
    assert "0.988" in text and "1.000" in text and "input_gradient" in text
    assert dram.rows_of(cases_, "==ERROR== ERR_NVGPUCTRPERM\n") == []


@pytest.mark.skipif(os.name != "posix", reason="a shell script replaces ncu")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1", "ERR_NVGPUCTRPERM"),
        ("exit 3", "exit status 3, no kernel counted"),
    ],
)
def test_dram_bytes_if_ncu_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, script: str, said: str):
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    ncu.chmod(0o755)
    monkeypatch.setattr(dram, "find_ncu", lambda: str(ncu))
    monkeypatch.setattr(dram.devices, "gpu_status", lambda: (True, "made up"))
    assert dram.main([]) == 0
    assert f"not measured: ncu: {said}" in capsys.readouterr().out.replace("==ERROR== ", "")


def test_dram_bytes_without_ncu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(dram.devices, "gpu_status", lambda: (True, "made up"))
    monkeypatch.setattr(dram, "find_ncu", lambda: None)
    assert dram.main([]) == 0
    assert capsys.readouterr().out == "not measured: ncu is not installed\n"


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def gpu_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@needs_bash
def test_gpu_script(tmp_path: Path):
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True)
    for arguments in ([], [""], ["a", "b"], ["a", "quick", "c"], ["a", "firs"], ["a", "first\nfull"]):
        refused = gpu_script(tmp_path, *arguments)
        assert refused.returncode == 2
        assert "usage: bash bench/gpu.sh OUTDIR [first | full | variants | quick]" in refused.stderr
    assert not list(tmp_path.iterdir())


without_gpu = pytest.mark.skipif(
    devices.gpu_status()[0], reason="with a GPU this is the whole examination, which takes minutes"
)
#: The files that each stage writes, and its parts that are skipped without a GPU.
STAGES = {
    "first": ("facts.txt smoke.txt bench.txt bench.json bench.png summary.txt", "smoke"),
    "full": (
        "facts.txt tests.txt sanitizer.txt bench.txt bench.json bench.png summary.txt",
        "prime tests memcheck racecheck",
    ),
    "variants": ("variants.txt summary.txt", "variants"),
    "quick": ("bench.txt bench.json bench.png summary.txt", ""),
}


@pytest.mark.full
@needs_bash
@without_gpu
@pytest.mark.parametrize("stage", STAGES)
def test_rehearsal_of_gpu_script_without_a_gpu(tmp_path: Path, stage: str):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.txt").write_text("of another run\n", encoding="utf-8")
    (tmp_path / "out" / "mine.txt").write_text("not the script's\n", encoding="utf-8")
    # On NumPy alone: the loops for each kind of call take longer to compile than a rehearsal may last.
    arguments, peers = ((), "torch") if stage == "full" else ((stage,), "none")
    done = gpu_script(tmp_path, "out", *arguments, PEERS=peers, CUPYNORM_COMPILED="0")
    assert done.returncode == 0, done.stdout + done.stderr
    files, skipped = STAGES[stage]
    for part in skipped.split():
        assert f"{part}: skipped: no usable GPU" in done.stdout
    assert "FAILED" not in done.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {*files.split(), "mine.txt"}
    found = (out / "summary.txt").read_text(encoding="utf-8")
    assert "of another run" not in found
    assert found.count("skipped: no usable GPU") == len(skipped.split())
    assert done.stdout.endswith(found)
    if stage == "variants":
        return
    written = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert {row["activation"] for row in written["rows"]} == {None, "leaky_relu"}
    assert ("host" in written) == (stage != "quick")
    assert len(written.get("host", [])) in (0, 12)
    assert "aims for an H100" in done.stdout
    assert "2,320,4,4,4              affine leaky_relu" in done.stdout
    if stage == "full":
        assert "dram: not measured: no usable GPU" in done.stdout


@needs_bash
@without_gpu
@pytest.mark.parametrize(
    ("fakes", "said"),
    [
        # The driver lists a GPU, but CuPy (or its absence) says that it cannot be used.
        ({"nvidia-smi": "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'"}, "gpu: unusable: "),
        # The interpreter crashes, or fails before it reports.
        ({"python": "kill -SEGV $$"}, ""),
        ({"python": "echo broken >&2; exit 1"}, "broken"),
    ],
    ids=["unusable", "crash", "failure"],
)
def test_gpu_script_fails_on_an_unusable_gpu(tmp_path: Path, fakes: dict[str, str], said: str):
    made = {name: script(tmp_path / "bin" / name, text) for name, text in fakes.items()}
    environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if "python" in made:
        environment["PYTHON"] = str(made["python"])
    done = gpu_script(tmp_path, "out", "first", **environment)
    assert done.returncode == 1
    assert done.stdout.endswith("FAILED: this GPU cannot be used\n")
    assert said in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.txt"]  # nothing is rehearsed
    assert (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8") == done.stdout


@pytest.mark.parametrize("dtype", smoke.DTYPES)
def test_smoke_finds_a_shape_for_each_scope(dtype: str):
    """On an H200, for every operation and layout that has kernels of the scope; on a T4, none for clusters."""
    device = DEVICES["H200"]
    clusters = [scope for scope in smoke.SCOPES if scope.startswith("cluster")]
    assert clusters == ["cluster2", "cluster4", "cluster8", "cluster16"]
    for scope in smoke.SCOPES:
        for kind in smoke.KINDS:
            for op in smoke.GIVEN if scope == "given" else smoke.OPS:
                shape = smoke.smallest(scope, op, dtype, kind, device)
                needy = op == "backward" and kind == "channels_last"  # shared memory instead of registers
                there = {
                    "subwarp": kind == "channels_first",
                    # Clusters that hold planes in registers come first, and leave none to one block's shared memory.
                    "shared": op == "double_backward" or needy,
                    "cluster2": op == "double_backward" or needy,
                }.get(scope, True)
                assert (shape is not None) == there, (scope, op, kind)
                if shape is not None:
                    desc = contiguous_desc(shape, ITEMSIZE[dtype], kind)
                    plan, _ = plan_for(op, desc, dtype, device)
                    assert (smoke.scope_of(plan), plan.kind) == (scope, kind)
                    assert math.prod(shape) <= smoke.MOST_ELEMENTS
    assert all(smoke.smallest(scope, "forward", dtype, "channels_first", DEVICES["T4"]) is None for scope in clusters)


def test_smoke_names_scopes():
    for size, device, expected in [
        (4, "H100", "subwarp"), (20, "H100", "warp"), (60, "H100", "block"), (130, "A100", "shared"),
        (150, "H100", "cluster4"), (200, "H100", "cluster8"), (300, "H100", "cluster16"), (700, "H100", "grid"),
        (5000, "H100", "split"),
    ]:  # fmt: skip
        desc = contiguous_desc((2, 320, size, size), 4, "channels_first")
        assert smoke.scope_of(plan_for("forward", desc, "float32", DEVICES[device])[0]) == expected
    assert smoke.scope_of(plan_for("normalize", desc, "float32", DEVICES["H100"])[0]) == "given"


@without_gpu
@pytest.mark.parametrize("main", [smoke.main, prime.main], ids=["smoke", "prime"])
def test_commands_that_need_a_gpu(main: Any, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "error: no usable GPU: " in capsys.readouterr().err


@pytest.mark.full
def test_smoke_distinguishes_a_crash_from_an_error(monkeypatch: pytest.MonkeyPatch):
    """The report on a scope's own process: its output and status, a crash, a timeout."""
    popen = subprocess.Popen
    for code, limit, text, well in [
        ("print('right')", 60, "right", True),
        ("print('wrong'); exit(1)", 60, "wrong", False),
        ("exit(0)", 60, "grid      float32  FAILED: exit status 0", False),
        ("import sys; print('half'); sys.stderr.write('gone'); exit(7)", 60,
         "half\ngrid      float32  FAILED: exit status 7\ngone", False),
        ("import time; print('half', flush=True); time.sleep(60)", 5,
         "half\ngrid      float32  FAILED: not done after 5 s", False),
    ]:  # fmt: skip

        def started(command: list[str], code: str = code, **given: Any) -> Any:
            assert command[1:] == ["-m", "bench.smoke", "--child", "grid", "float32"]
            return popen([sys.executable, "-c", code], **given)

        monkeypatch.setattr(smoke, "subprocess", SimpleNamespace(
            Popen=started, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired))  # fmt: skip
        assert smoke.run("grid", "float32", limit) == (text, well)


def test_resume_measures_missing_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("rich")
    result = tmp_path / "r.json"
    shapes, more = ("--shapes", "2,3,8,8"), ("--shapes", "2,3,8,8", "1,2,4,4,4")
    common = ("--op", "forward,backward", "--json", str(result), "--resume")

    def rows() -> dict[Any, Any]:
        return {report.key(row): row for row in json.loads(result.read_text(encoding="utf-8"))["rows"]}

    assert run(monkeypatch, *shapes, *common, "--peers", "none") == 0  # there is no file yet
    first = rows()
    assert len(first) == 2
    document = json.loads(result.read_text(encoding="utf-8"))
    report.write_json({**document, "host": ["of another measurement"]}, result)
    # Two more cases; the existing rows stay the same, to the last digit.
    capsys.readouterr()
    assert run(monkeypatch, *more, *common, "--peers", "none") == 0
    assert len(rows()) == 4
    assert {key: rows()[key] for key in first} == first
    assert json.loads(result.read_text(encoding="utf-8"))["host"] == ["of another measurement"]
    table = capsys.readouterr().out
    assert "1,2,4,4,4" in table and "2,3,8,8" not in table  # only new rows
    # A row that lacks a requested peer is measured again, others are not.
    second = rows()
    assert run(monkeypatch, *shapes, *common, "--peers", "textbook") == 0
    third = rows()
    assert {key for key in third if third[key] != second[key]} == set(first)
    assert all(set(third[key]["peers"]) == {"textbook"} for key in first)
    # Complete: nothing is measured, and that is no failure.
    assert run(monkeypatch, *shapes, *common, "--peers", "textbook") == 0
    assert rows() == third
    # Without --resume, the file is rewritten.
    assert run(monkeypatch, *shapes, *common[:-1], "--peers", "none") == 0
    assert len(rows()) == 2


def test_case_and_row_have_the_same_key():
    for case in cases.cases_of(cases.parse_shapes(["real"], 256), ["float32"], ["channels_last"], ["fused"], ["both"]):
        times = {"cupynorm": timing.Timing(2e-3, 0), "copy": timing.Timing(1e-3, 0)}
        assert report.key(json.loads(json.dumps(report.row(case, "split", 12, times, {})))) == case.key


def test_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch):
    report.commit.cache_clear()
    monkeypatch.setenv("COMMIT", "abc123-copied")
    try:
        assert report.commit() == "abc123-copied"
        assert report.document({}, [])["commit"] == "abc123-copied"
    finally:
        report.commit.cache_clear()


def test_claims():
    def row(op: str, shape: list[int], ours: float, **theirs: float) -> dict:
        peers = {name.replace("_", " "): {"median_ms": ms, "max_error": 0.0} for name, ms in theirs.items()}
        return {"op": op, "shape": shape, "dtype": "float32", "layout": "channels_first", "affine": False,
                "activation": None, "median_ms": ours, "of_copy": 0.5, "of_new_copy": 0.9, "peers": peers}  # fmt: skip

    rows = [
        row("forward", [1, 1, 8, 8], 2.0, torch=8.0, numpy_alone=4.0, onnxruntime=1.0),
        row("forward", [1, 1, 4096, 4096], 2.0, torch=2.0, numpy_alone=4.0, onnxruntime=4.0),
        row("both", [1, 1, 8, 8], 1.0, torch=2.0),
        row("both", [1, 2, 8, 8], 1.0, torch=8.0),
        row("both", [1, 2, 8, 8], 1.0, torch=1e9) | {"dtype": "float16"},
    ]
    alone, alone_both, runtime, both, there, new = claims.claims({"rows": rows})
    assert list(alone.ratios.values()) == [2.0, 0.5]
    assert "MISSED. Geometric mean 1.00 of 2 cases, worst 0.50 at 1,1,4096,4096 plain" in alone.line()
    assert "not measured" in alone_both.line()
    assert "MISSED" in runtime.line()
    assert "below: 1,1,8,8 plain 0.50" in runtime.line()
    assert "held. Geometric mean 4.00 of 2 cases, worst 2.00" in both.line()
    assert list(there.ratios.values()) == [0.5]
    assert "MISSED" in there.line()
    assert "held" in new.line()


def test_new_copy_and_numpy_alone():
    arrays = cases.Arrays(np, (2, 3, 4, 4), "float32", "channels_first", affine=False, sets=1)
    copied = peers.new_copy(1000, arrays).run(0)
    assert (copied.nbytes, copied.base) == (500, None)
    if not cpu.compiled:
        with pytest.raises(peers.UnavailableError, match="cupynorm itself is it"):
            peers.numpy_alone("forward", arrays)
        return
    seen = []
    contestant = peers.numpy_alone("forward", arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_choose", lambda *given, choose=cpu._choose: seen.append(cpu.compiled) or choose(*given))
        assert arrays.error(contestant.answers(contestant.run(0)), "forward") < 1e-6
    assert seen == [False]
    assert cpu.compiled
