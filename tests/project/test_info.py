"""`python -m cupynorm info` lists installed and missing parts, and never raises."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from pathlib import Path

import pytest

import cupynorm
from cupynorm import info
from cupynorm.__main__ import main

pytestmark = [pytest.mark.extras, pytest.mark.usefixtures("fresh_gpu_status")]  # CuPy without a GPU


class Broken(types.ModuleType):
    """An installed module that raises at every use."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"{name} is broken")


def facts() -> dict[str, str]:
    """Parse the report."""
    read: dict[str, str] = {}
    label = ""
    width = max(map(len, info.FACTS)) + 2
    for line in info.report().splitlines():
        label = line[:width].strip() or label
        read[label] = f"{read[label]}\n{line[width:]}" if label in read else line[width:]
    return read


def test_report_has_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    read = facts()
    assert list(read) == list(info.FACTS)
    assert read["cupynorm"].startswith(cupynorm.__version__)
    assert "numpy: usable" in read["backends"]
    assert "not known" not in read["kernel sources"]
    assert main(["info"]) == 0
    assert capsys.readouterr().out.startswith("cupynorm")


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(info, "CUPY_PACKAGES", ())
    read = facts()
    assert read["CuPy"] == "not installed"
    assert "cupy: not usable: CuPy is not installed" in read["backends"]
    assert "pip install 'cupynorm[cuda" in read["missing"]


def test_with_a_broken_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken("cupy")
    broken.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    monkeypatch.setitem(sys.modules, "cupy", broken)
    monkeypatch.delitem(sys.modules, "cupy.cuda", raising=False)
    read = facts()
    assert read["CuPy"].startswith("not known: RuntimeError: __version__ is broken")
    assert "numpy: usable" in read["backends"]
    assert "NVRTC" in read["missing"] or "more than one CuPy" in read["missing"]


def test_with_and_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(info, "CUPY_PACKAGES", ())
    for version, extra in ((12040, "cuda12"), (13010, "cuda13")):
        monkeypatch.setattr(info, "driver_cuda", lambda version=version: version)
        read = facts()
        assert f"CuPy: pip install 'cupynorm[{extra}]'" in read["missing"]
        assert f"supports CUDA {version // 1000}." in read["NVIDIA driver"]

    def absent() -> int:
        raise OSError("libcuda.so.1: no such file")

    monkeypatch.setattr(info, "driver_cuda", absent)
    read = facts()
    assert read["NVIDIA driver"].startswith("none found")
    assert "only the numpy backend works" in read["missing"]


def test_two_cupy_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "cupy_packages", lambda: ["cupy-cuda12x==14.2.0", "cupy-cuda13x==14.2.0"])
    assert "pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install" in facts()["missing"]


def test_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    read = facts()
    assert read["ml_dtypes"] == "not installed"
    assert "ml_dtypes: pip install 'cupynorm[bf16]'" in read["missing"]
    assert "rich" in read["missing"]


def test_line_of_a_gpu() -> None:
    properties = {"name": b"NVIDIA T4", "major": 7, "minor": 5, "totalGlobalMem": 15 * 2**30, "multiProcessorCount": 40}
    assert info.gpu(1, properties) == "cuda:1 NVIDIA T4, compute capability 7.5, 15.0 GiB, 40 SMs"


def test_kernel_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.cubin").write_bytes(bytes(2**20))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert "(1 files, 1.0 MiB)" in facts()["kernel cache"]
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "nowhere"))
    assert "does not exist" in facts()["kernel cache"]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYNORM_EAGER", "0")
    monkeypatch.setenv("SECRET_CUPYNORM_THING", "hidden")
    read = facts()
    assert "CUPYNORM_EAGER=0" in read["environment"]
    assert "hidden" not in read["environment"]


def test_home_folder_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    home = os.path.join(os.sep, "home", "someone")
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USERPROFILE", home)
    text = info.attempt(lambda: f"{os.path.join(home, 'x')} {home}else")
    assert text == f"{os.path.join('~', 'x')} {home}else"


def test_failing_facts_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> str:
        raise ValueError("no")

    monkeypatch.setattr(info, "FACTS", dict.fromkeys(info.FACTS, failing))
    assert set(facts().values()) == {"not known: ValueError: no"}
