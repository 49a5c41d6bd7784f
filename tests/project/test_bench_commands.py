"""The commands host, parts, dtypes, zscore, passes, values, dram, smoke and prime."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_equal, assert_within
from helpers.optional import required

import cupynorm
from bench.commands import dram, dtypes, host, instructions, parts, passes, prime, smoke, values, zscore
from bench.core import cases, peers, report, timing
from bench.sass import listing
from cupynorm import cpu, devices
from cupynorm.cpu import numpy_path
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import DEVICES
from cupynorm.cuda.layout import contiguous_desc
from cupynorm.cuda.variants import ITEMSIZE

pytestmark = pytest.mark.long


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


def test_host_cost_without_the_driver_needs_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(devices, "gpu_status", lambda: (False, "no device today"))
    with pytest.raises(SystemExit):
        host.main(["--no-driver"])
    assert "no device today" in capsys.readouterr().err


def test_counting_instructions_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def missing() -> None:
        raise listing.MissingError("no NVRTC library")

    monkeypatch.setattr(listing, "nvrtc_version", missing)
    with pytest.raises(SystemExit):
        instructions.main([])
    assert "no NVRTC library" in capsys.readouterr().err


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


@pytest.mark.skipif(devices.gpu_status()[0], reason="a GPU is usable")
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
            assert command[1:] == ["-m", "bench", "smoke", "--child", "grid", "float32"]
            return popen([sys.executable, "-c", code], **given)

        monkeypatch.setattr(smoke, "subprocess", SimpleNamespace(
            Popen=started, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired))  # fmt: skip
        assert smoke.run("grid", "float32", limit) == (text, well)


def test_parts_times_every_call(capsys: pytest.CaptureFixture[str]):
    """One line for each shape and dtype; calls in parts give the results of the whole."""
    shapes = ["2,3,6,7", "2,3,5,4,9"]
    options = ["--device", "cpu", "--dtype", "float32,float16", "--rounds", "1", "--batch-ms", "0.01"]
    assert parts.main([*shapes, *options]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"{shape} {dtype}" for dtype in ("float32", "float16") for shape in shapes
    ]
    for line in lines:
        found = re.findall(r"([a-z_ =]+) (\d+) us \((\d+\.\d\d)\)", line.partition(": ")[2])
        assert [name.strip() for name, _, _ in found] == list(parts.ACCESSES)
    arrays = cases.Arrays(np, (2, 3, 6, 7), "float32", "channels_first", False, sets=1)
    calls = parts.contestants(arrays, 4)
    joined = np.concatenate(calls["forward in parts"](0), -1)
    assert_within(joined, calls["forward"](0), 1e-6)
    with pytest.raises(SystemExit):
        parts.main(["2,3"])


def test_dtypes_times_every_call(capsys: pytest.CaptureFixture[str]):
    """One line for each shape and pair; all calls of a pair give the same results."""
    shapes, pairs = ["2,3,6,7", "2,3,5,4,9"], ["uint16:float32", "uint8:float16"]
    options = ["--device", "cpu", "--rounds", "1", "--batch-ms", "0.01", "--pairs", *pairs]
    assert dtypes.main([*shapes, *options]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    titles = [f"{shape} {pair.replace(':', ' to ')}" for shape in shapes for pair in pairs]
    assert [line.partition(": ")[0] for line in lines] == titles
    xs = [np.random.default_rng(1).integers(0, 9, (2, 3, 6, 7)).astype(np.uint8)]
    for result in ("float32", "float64"):
        calls = dtypes.contestants(np, xs, result)
        for line in lines:
            found = re.findall(r"([a-z =]+) \d+ us \(\d+\.\d\d\)", line.partition(": ")[2])
            assert [name.strip() for name in found] == list(calls)
        first, *others = (call(0) for call in calls.values())
        assert first.dtype == result
        for other in others:
            assert_within(other, first, 1e-5)
    for wrong in (["2,3"], [*shapes, "--pairs", "float32:uint8"], [*shapes, "--pairs", "int32:float32"]):
        with pytest.raises(SystemExit):
            dtypes.main(wrong)


@pytest.mark.extras
@pytest.mark.full
def test_zscore_is_timed_beside_scipy_s(capsys: pytest.CaptureFixture[str]):
    required("scipy.stats")
    cases_ = ["20,3:0", "4,5,6:1,2", "4,5:all"]
    assert zscore.main([*cases_, "--device", "cpu", "--rounds", "1", "--batch-ms", "0.01"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["20,3 axis 0", "4,5,6 axis (1, 2)", "4,5 axis all"]
    for line in lines:
        assert re.fullmatch(r"zscore \d+ us \(\d+\.\d\d\), scipy \d+ us \(\d+\.\d\d\)", line.partition(": ")[2])
    for wrong in ("20,3", "20,3:2", "x:0"):
        with pytest.raises(SystemExit):
            zscore.main([wrong])
