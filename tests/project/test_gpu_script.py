"""bench/gpu.sh: its arguments, a rehearsal without a GPU, GPUs that cannot be used, the time limits of its parts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cupynorm import devices

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"
PACE = 2  # percent of its time limits

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

#: A python that finds a GPU and hangs at every measurement; a compute-sanitizer that prints its arguments and hangs.
PYTHON = """#!/bin/sh
case "$*" in
    *gpu_status*) echo "gpu: usable" ;;
    *"bench summary"*) ;;
    *) exec sleep 100 ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "asked: $*"
exec sleep 100
"""


def _examined(folder: Path, stage: str) -> tuple[str, dict[str, float]]:
    """Run a stage; return what the script prints, and the time limit of each part, in seconds at full pace."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]), "PYTHON": str(folder / "python"), "PACE": str(PACE)
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folder / "out"), stage], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    limits = re.findall(r"^([^\n:]+): FAILED: not done after ([\d.]+) s", done.stdout, re.M)
    return done.stdout, {name: float(seconds) * 100 / PACE for name, seconds in limits}


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "most", "parts"),
    [
        ("first", 200, ["facts", "smoke", "benchmark", "host cost"]),
        ("full", 540, ["facts", "prime", "tests", "benchmark", "memcheck", "racecheck", "parts", "dtypes", "masks",
                       "channels-last and fused",
                       "host cost", "dram"]),
        ("variants", 150, ["variants"]),
    ],
)  # fmt: skip
def test_endless_parts(tmp_path: Path, stage: str, most: int, parts: list[str]) -> None:
    """Each part is stopped, reported, and followed by the next; together they take no longer than promised."""
    said, limits = _examined(tmp_path, stage)
    assert list(limits) == parts, said
    assert sum(limits.values()) <= most
    if stage == "full":
        _check_sanitizers((tmp_path / "out" / "sanitizer.txt").read_text())


def _check_sanitizers(text: str) -> None:
    """The sanitizers run small cases only: all cases would take an hour."""
    asked = re.findall(r"^asked: (.*)$", text, re.M)
    assert [line.split()[1] for line in asked] == ["memcheck", "racecheck"]
    for line in asked:
        assert "--error-exitcode 99" in line
        assert line.endswith("tests/conformance/test_cases.py")
        assert "-k test_small or test_double_small" in line


def gpu_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
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


@pytest.mark.long
def test_gpu_script(tmp_path: Path):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
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
@pytest.mark.long
@without_gpu
@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=[pytest.mark.nightly] * (s in ("first", "full"))) for s in STAGES]
)
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
    assert "aims for a CPU" in done.stdout
    assert "2,320,4,4,4              affine leaky_relu" in done.stdout
    if stage == "full":
        assert "dram: not measured: no usable GPU" in done.stdout


@pytest.mark.long
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
