"""The command speed: JSON, picture and table, refusals of wrong results, limits, --resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.commands import speed, summary
from bench.core import cases, peers, report, timing

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


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **fakes: Any) -> int:
    for name, make in fakes.items():
        monkeypatch.setitem(peers.PEERS, name, make)
    return speed.main(["--device", "cpu", "--rounds", "2", "--batch-ms", "0.2", *arguments])


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
    assert list(written) == ["schema", "date", "commit", "device", "versions", "copy_gbps", "rows", "hot"]
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
        speed.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


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
    # Rows that were measured in the caches are others.
    with pytest.raises(SystemExit, match="without --hot"):
        run(monkeypatch, *shapes, *common, "--hot")
    assert rows() == third
    # Without --resume, the file is rewritten.
    assert run(monkeypatch, *shapes, *common[:-1], "--peers", "none") == 0
    assert len(rows()) == 2
