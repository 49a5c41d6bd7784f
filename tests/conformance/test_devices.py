"""Which device a name or an array means, where CuPy and its GPUs are stand-ins."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupynorm import _checks, devices


class Array:
    """As cupy.ndarray, on cuda:1."""

    device = SimpleNamespace(id=1)


class Subclass(Array):
    pass


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy with two GPUs, of which the second is the current one."""
    runtime = SimpleNamespace(getDeviceCount=lambda: 2)
    cuda = SimpleNamespace(Device=lambda: SimpleNamespace(id=1), runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Array, cuda=cuda))
    monkeypatch.setattr(devices, "gpu_status", lambda: (True, "2 visible, current is cuda:1"))


@pytest.mark.usefixtures("two_gpus")
def test_names_of_devices() -> None:
    names = {"cpu": "cpu", "cuda:0": "cuda:0", "cuda:1": "cuda:1", "cuda": "cuda:1", None: "cuda:1"}
    assert {name: devices.resolve(name) for name in names} == names
    for name in ("cuda:2", "cuda:10"):
        with pytest.raises(ValueError, match=f"device '{name}': there are 2 GPUs"):
            devices.resolve(name)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("array", "message"), [
    (Subclass(), r"got \S+\.Subclass; a subclass's meaning would be lost: pass a plain cupy\.ndarray view"),
    (np.ma.array([1.0]), r"got numpy\.ma\S*\.MaskedArray; a subclass's meaning \(a mask, say\) would be lost"),
    ([1.0], r"got builtins\.list; convert it with numpy\.asarray or cupy\.asarray"),
])  # fmt: skip
def test_arrays_of_other_classes_beside_cupy(array: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^x must be a numpy.ndarray or a cupy.ndarray, {message}"):
        _checks.kind_of(array, "x")


@pytest.mark.usefixtures("two_gpus")
def test_places_of_arrays() -> None:
    arrays: tuple[Any, ...] = (np.ones(1), Array())
    assert [_checks.place_of(array, "x") for array in arrays] == ["cpu", "cuda:1"]
