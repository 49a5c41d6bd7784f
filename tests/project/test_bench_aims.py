"""The commands aims and summary: what is compared with each aim, and the last lines of bench/gpu.sh."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench.commands import aims, summary
from bench.core import cases, report, timing

pytestmark = pytest.mark.long


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
    summary.main([str(tmp_path)])
    assert capsys.readouterr().out.startswith("benchmark: no result")
    (tmp_path / "tests.txt").write_text("== tests\nKilled\n", encoding="utf-8")
    (tmp_path / "sanitizer.txt").write_text("== memcheck\n== racecheck\nskipped: no\n", encoding="utf-8")
    summary.main([str(tmp_path)])
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
    found = aims.gpu_aims(made_up(times=1.001))
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
    found = aims.gpu_aims(made_up(times=0.3, of_copy=0.84))
    assert {aim.verdict for aim in found} == {"NOT REACHED"}
    # A single slow shape is found where the worst counts, and is named.
    for shape, count in (((2, 64, 64, 64, 64), 4), ((2, 128, 32, 32, 32), 0)):  # 67 MB in bfloat16; 34 in float32
        result = made_up(times=1.001)
        for row in result["rows"]:
            if tuple(row["shape"]) == shape and row["layout"] == "channels_first":
                row["of_copy"] = 0.5
        missed = [aim for aim in aims.gpu_aims(result) if aim.verdict != "reached"]
        assert len(missed) == count
        assert all(aim.measured == 0.5 and "worst: 2,64,64,64,64; " in aim.note for aim in missed)
    result = made_up(times=1.001)
    for row in result["rows"]:
        if row["shape"] == [1, 64, 256, 256] and row["op"] == "both" and row["activation"] == "relu":
            row["peers"]["torch"]["median_ms"] = 0.9 * row["median_ms"]
    slowest = [aim for aim in aims.gpu_aims(result) if "slowest" in aim.what]
    assert [(aim.measured, aim.verdict) for aim in slowest] == [(pytest.approx(0.9), "NOT REACHED")] * 2
    assert "1,64,256,256 channels_first fused" in slowest[0].note


def test_aims_of_an_incomplete_result():
    nothing = {**made_up(), "rows": []}
    del nothing["host"], nothing["import"]
    found = aims.gpu_aims(nothing)
    assert {aim.verdict for aim in found} == {"not measured"}
    text = aims.lines(nothing)
    assert len(text) == 1 + len(found)
    assert all("not measured" in line for line in text[1:])
    part = made_up(times=4.0)
    part["rows"] = [row for row in part["rows"] if row["shape"] in ([2, 64, 64, 64, 64], [1, 4**11, 4, 4])]
    verdicts = {aim.what: aim.verdict for aim in aims.gpu_aims(part) if not re.search("host|import", aim.what)}
    assert set(verdicts.values()) == {"reached in part"}
    mean = next(aim for aim in aims.gpu_aims(part) if aim.what == "time of torch over ours, channels_first, float32")
    assert (mean.measured, mean.note) == (pytest.approx(8.0), "worst: 2,64,64,64,64; 8.00 to 8.00, mean 8.00; 1 of 20")
    without = {aim.what: aim.verdict for aim in aims.gpu_aims(made_up(peers_=("torch",)))}
    assert without["time of torch.compile over ours, channels_first, float32"] == "not measured"


def test_aims_for_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
    result = {"device": {"name": "a CPU", "cores": 2}, "rows": rows}
    alone, alone_both, runtime, both, there, new = found = aims.cpu_aims(result)
    assert list(alone.values.values()) == [2.0, 0.5]
    assert (alone.measured, alone.verdict) == (0.5, "NOT REACHED")
    assert alone.note == (
        "worst: 1,1,4096,4096 plain; 0.50 to 2.00, mean 1.00; 2 of 2; below: 1,1,4096,4096 plain 0.50"
    )  # fmt: skip
    assert (alone_both.verdict, alone_both.note) == ("not measured", "")
    assert runtime.verdict == "NOT REACHED"
    assert runtime.note.endswith("below: 1,1,8,8 plain 0.50")
    assert (both.measured, both.verdict) == (pytest.approx(4.0), "reached")
    assert both.note == "worst: 1,1,8,8 plain; 2.00 to 8.00, mean 4.00; 2 of 2"
    assert list(there.values.values()) == [0.5]
    assert (there.verdict, there.note) == ("NOT REACHED", "1,1,4096,4096 plain")
    assert new.verdict == "reached"
    file = tmp_path / "cpu.json"
    report.write_json(result, file)
    assert aims.main([str(file)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("aims for a CPU; this is a CPU ")
    assert [line.startswith(aim.what) for line, aim in zip(lines, found, strict=True)] == [True] * 6
