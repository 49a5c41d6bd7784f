"""The benchmark's entry, and what its commands share: cases, exact answers, contestants, turns, plan facts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_allclose

from bench import __main__ as bench
from bench.commands import speed
from bench.core import cases, peers, report, timing
from cupynorm import cpu
from cupynorm.cuda.device import DEVICES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.long


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]):
    modules = {path.stem for path in (ROOT / "bench" / "commands").glob("[a-z]*.py")}
    assert set(bench.COMMANDS) == modules
    assert bench.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{what}$", out, re.M) for name, what in bench.COMMANDS.items())
    with pytest.raises(SystemExit) as stopped:
        bench.main(["claims"])
    assert stopped.value.code == 2
    assert f"no command 'claims'; the commands are {', '.join(bench.COMMANDS)}" in capsys.readouterr().err


@pytest.mark.parametrize("command", bench.COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        bench.main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m bench {command} [-h]")


@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"], ["speed"], ["speed", "--device", "cpu"]], ids=" ".join)
def test_speed_is_the_default(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "main", lambda options: 7 if options == [a for a in arguments if a != "speed"] else 0)
    assert bench.main(arguments) == 7


def test_only_the_command_is_imported():
    """smoke and prime change the environment, or start processes that must start fast."""
    text = """
import sys
import bench.__main__
assert not any(name.startswith(("bench.", "cupynorm", "numpy")) for name in sys.modules.keys() - {"bench.__main__"})
try:
    bench.__main__.main(["prime", "--help"])
finally:
    assert {name for name in sys.modules if name.startswith("bench.commands.")} == {"bench.commands.prime"}
"""
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


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


def test_short_planes():
    layers = cases.parse_shapes(["short"], 256)
    sizes, megabytes = zip(*((layer.shape[2], math.prod(layer.shape) / 2**18) for layer in layers), strict=True)
    assert (min(sizes), max(sizes)) == (9, 2048)
    assert 0.08 < min(megabytes) < 0.11 and 15 < max(megabytes) < 17
    assert len(layers) == 65 and all(layer.swept for layer in layers)


def test_random_shapes():
    """The same for the same seed, of all ranks, and never of one position."""
    drawn = [layer.shape for seed in range(40) for layer in cases.parse_shapes(["random"], 256, seed)]
    assert drawn == [layer.shape for seed in range(40) for layer in cases.random_layers(seed)]
    assert len(set(drawn)) > 400 and {len(shape) for shape in drawn} == {3, 4, 5}
    assert all(math.prod(shape[2:]) > 1 and math.prod(shape) < 2**26 for shape in drawn)
    assert sum(math.prod(shape[2:]) < 64 for shape in drawn) > 40 < sum(math.prod(shape[2:]) > 2**16 for shape in drawn)


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
        work = cpu.NumpyWork
        patch.setattr(cpu.SmallWork, "suits", lambda *_: False)
        patch.setattr(cpu, "NumpyWork", lambda *given: seen.append(cpu.compiled) or work(*given))
        assert arrays.error(contestant.answers(contestant.run(0)), "forward") < 1e-6
    assert seen == [False]
    assert cpu.compiled
