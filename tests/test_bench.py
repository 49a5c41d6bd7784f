"""The benchmark: what it counts, that contestants take turns, that a wrong one is refused, and what it writes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import __main__ as bench
from bench import cases, peers, report, summary, timing
from cupynorm import devices
from cupynorm.cuda.plan import DEVICES

ROOT = Path(__file__).resolve().parents[1]
ROW = {
    "op": str,
    "shape": list,
    "dtype": str,
    "layout": str,
    "affine": bool,
    "activation": type(None),
    "regime": str,
    "bytes_per_element": type(None),  # on the CPU
    "median_ms": float,
    "gbps": float,
    "of_copy": float,
    "peers": dict,
}


def test_least_traffic():
    sizes = {op: cases.Case(op, (2, 3, 5, 7), "float16", "channels_first", True).minimal_bytes for op in cases.ACCESSES}
    assert sizes == {"forward": 2 * 2 * 210, "backward": 3 * 2 * 210, "both": 5 * 2 * 210}
    assert cases.Case("both", (2, 3, 5, 7), "bfloat16", "channels_last", False).plane_bytes == 70


def test_row_follows_from_the_times():
    case = cases.Case("forward", (1, 1, 1000, 1000), "float32", "channels_first", False)
    times = {"cupynorm": timing.Timing(2e-3, 0), "copy": timing.Timing(1e-3, 0), "torch": timing.Timing(3e-3, 0)}
    row = report.row(case, "split", 12, times, {"torch": 1e-6})
    assert row["gbps"] == pytest.approx(4.0)
    assert row["of_copy"] == pytest.approx(0.5)
    assert row["peers"] == {"torch": {"median_ms": pytest.approx(3.0), "max_error": 1e-6}}
    assert report.document({}, [row])["copy_gbps"] == pytest.approx(8.0)


def test_shapes():
    assert cases.parse_shapes(["2,3,4", "1,1,2,2,2"], 256) == [((2, 3, 4), False), ((1, 1, 2, 2, 2), False)]
    assert ((2, 320, 8, 8, 8), True) in cases.parse_shapes(["real"], 256)
    swept = [shape for shape, _ in cases.parse_shapes(["sweep"], 4**5)]
    assert swept[0] == (1, 64, 4, 4)
    assert swept[-1] == (1, 1, 32, 32)
    assert {math.prod(shape) for shape in swept} == {4**5}
    for word in ("2,3", "real,sweep", "2,3,0", "2,3,1,1", ""):
        with pytest.raises(ValueError, match="a shape is"):
            cases.parse_shapes([word], 256)


def test_buffer_sets_reach_beyond_the_cache():
    assert cases.buffer_sets(10, 100, 512) == 10
    assert cases.buffer_sets(1000, 100, 512) == 1
    assert cases.buffer_sets(1, 10_000, 512) == 512


def test_median_and_spread():
    assert timing.summarise([5.0, 1.0, 2.0, 100.0, 3.0]) == (3.0, 3.0)
    assert timing.summarise([7.0]) == (7.0, 0.0)


def test_contestants_take_turns_and_go_round_the_sets():
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
    np.testing.assert_allclose(arrays.reference["y"], exact.astype(np.float64), rtol=1e-12, atol=1e-12)
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
            np.testing.assert_allclose(blocks[name], exact, rtol=1e-12, atol=1e-12)


def test_error_sees_nan_and_missing_answers():
    arrays = cases.Arrays(np, (2, 2, 3, 3), "float32", "channels_first", affine=False, sets=1)
    y = arrays.reference["y"].copy()
    y[1, 1, 0, 0] = np.nan
    assert math.isnan(arrays.error({"y": y}, "forward"))
    with pytest.raises(ValueError, match="dx has shape None"):
        arrays.error({"y": arrays.reference["y"]}, "both")


def test_plan_facts():
    x = np.zeros((2, 3, 16, 16), np.float16)
    assert bench.planned("both", x, None) == ("numpy", None)
    assert bench.planned("both", x, DEVICES["H100"])[1] == 5 * 2
    regime, size = bench.planned("forward", np.zeros((1, 1, 2048, 2048), np.float32), DEVICES["T4"])
    assert (regime, size) == ("split", 12)
    copied = bench.planned("forward", x[:, :, ::2], DEVICES["H100"])[1]
    assert copied == 2 * 2 + 2 * 2


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **fakes: Any) -> int:
    for name, make in fakes.items():
        monkeypatch.setitem(peers.PEERS, name, make)
    return bench.main(["--device", "cpu", "--rounds", "2", "--batch-ms", "0.2", *arguments])


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
    assert timed == [0]  # for its answer, not for its time
    assert list(json.loads(result.read_text(encoding="utf-8"))["rows"][0]["peers"]) == ["textbook"]


def test_own_failure_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    broken = SimpleNamespace(instance_norm=lambda x, **_: x)
    monkeypatch.setattr(peers, "cupynorm", broken)
    assert run(monkeypatch, "--shapes", "2,3,8,8", "--op", "forward", "--peers", "none") == 1
    assert "cupynorm is wrong" in capsys.readouterr().out


def test_too_large_and_too_late(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
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


def test_summary_reads_what_the_tools_print():
    assert summary.tests_line("...\n===== 12 passed, 3 skipped in 4.50s =====\n") == "12 passed, 3 skipped in 4.50s"
    assert summary.tests_line("1 failed, 12 passed, 3 skipped in 65.10s (0:01:05)\n").startswith("1 failed, 12 passed")
    assert summary.tests_line("Killed\n") == "no result"
    text = "5 passed in 3.00s\n========= ERROR SUMMARY: 0 errors\n"
    assert summary.sanitizer_line(text) == "ERROR SUMMARY: 0 errors (5 passed in 3.00s)"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_gpu_script():
    script = str(ROOT / "bench" / "gpu.sh")
    subprocess.run(["bash", "-n", script], check=True)
    for arguments in ([], [""], ["a", "b"]):
        refused = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "usage: bash bench/gpu.sh OUTDIR" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.skipif(devices.gpu_status()[0], reason="with a GPU it is the whole examination, which takes minutes")
def test_gpu_script_is_rehearsed_without_a_gpu(tmp_path: Path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "PEERS": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("tests", "memcheck", "racecheck"):
        assert f"{part}: skipped: no usable GPU" in done.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    results = {"facts", "tests", "memcheck", "racecheck", "bench", "summary"}
    assert written == {f"{name}.txt" for name in results} | {"bench.json", "bench.png"}
    assert done.stdout.endswith((tmp_path / "out" / "summary.txt").read_text(encoding="utf-8"))
    assert "2,3,16,16" in done.stdout.splitlines()[-1]
