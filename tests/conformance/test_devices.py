"""Whether a GPU is usable, and which device a name or an array means, where CuPy and the driver are stand-ins."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.gpu_arrays import Array, Device, current, stand_in

import cupynorm as cn
from cupynorm import _checks, devices


class Subclass(Array):
    pass


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
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
    (Subclass([1.0]), r"got \S+\.Subclass; a subclass's meaning would be lost: pass a plain cupy\.ndarray view"),
    (np.ma.array([1.0]), r"got numpy\.ma\S*\.MaskedArray; a subclass's meaning \(a mask, say\) would be lost"),
    ([1.0], r"got builtins\.list; convert it with numpy\.asarray or cupy\.asarray"),
])  # fmt: skip
def test_arrays_of_other_classes_beside_cupy(array: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^x must be a numpy.ndarray or a cupy.ndarray, {message}"):
        _checks.kind_of(array, "x")


@pytest.mark.usefixtures("two_gpus")
def test_places_of_arrays() -> None:
    arrays: tuple[Any, ...] = (np.ones(1), Array([1.0]), Subclass([1.0]))
    assert [_checks.place_of(array, "x") for array in arrays[:2]] == ["cpu", "cuda:1"]
    assert [_checks.device_of(array) for array in arrays] == [None, Array.device, Array.device]
    assert [_checks.known_place(array) for array in (*arrays, 1.0)] == ["cpu", "cuda:1", "cuda:1", "builtins.float"]


@pytest.mark.usefixtures("two_gpus")
def test_copies_to_and_from_devices() -> None:
    here, there = np.ones(1), Array([2.0])
    assert devices.to_host(here) is here
    assert type(devices.to_host(there)) is np.ndarray and devices.to_host(there) == 2
    assert devices.to_device(here, "cpu") is here
    for number in (0, 1):
        found = devices.to_device(here, f"cuda:{number}")
        assert type(found) is Array and found.values == 1
        assert current[-2:] == [number, -1]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("value", [[4, 5], np.array([4.0, 5.0]), Array([4, 5])], ids=["list", "NumPy", "GPU"])
def test_data_of_a_parameter_on_a_gpu(value: Any) -> None:
    """Values come from anywhere, and are copied to the device of the parameter's own array."""
    data = Array(np.ones(2, np.float32))
    parameter = cn.Parameter(data)
    current.clear()
    parameter.data = value
    assert parameter.data is data and data.values.tolist() == [4, 5]
    assert current == ([] if type(value) is Array else [1, -1])


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_of_denormalize_on_another_device(name: str) -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    with pytest.raises(ValueError, match=f"{name} is on cuda:1 and y on cpu"):
        cn.denormalize(x, cn.moments(x), **{name: Array(np.ones(3))})


@pytest.mark.usefixtures("two_gpus")
def test_out_of_zscore_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"dtype float64 on cuda:1; needed are .* on cpu"):
        cn.zscore(np.ones((3, 4)), out=Array(np.ones((3, 4))))


NO_CUPY = "CuPy is not installed: pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, fresh_gpu_status: None) -> Any:
    """Return a function that asks for the status with a driver and with CuPy as they are described."""

    def ask(
        library: str = "libcuda.so.1", init: int = 0, counted: int = 0, count: int = 2, broken: Any = None,
        spec: Any = True, platform: str = "linux",
    ) -> tuple[bool, str]:  # fmt: skip
        def find_spec(name: str) -> Any:
            assert name == "cupy"
            if isinstance(spec, Exception):
                raise spec
            return spec

        def load(name: str) -> Any:
            if name != library:
                raise OSError(name)
            return SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=get_count)

        def get_count(place: Any) -> int:
            place._obj.value = count
            return counted

        def device() -> Any:
            if broken:
                raise broken
            return Device()

        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", find_spec)
            patch.setattr(ctypes, "CDLL", load)
            patch.setattr(sys, "platform", platform)
            patch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=device)))
            return devices.gpu_status()

    return ask


@pytest.mark.parametrize(("given", "usable", "said"), [
    ({}, True, "2 visible, current is cuda:1"),
    ({"library": "nvcuda.dll", "platform": "win32"}, True, "2 visible, current is cuda:1"),
    ({"library": "nvcuda.dll"}, False, "no NVIDIA driver is installed"),
    ({"init": 100}, False, "the NVIDIA driver reports error 100"),
    ({"counted": 3}, False, "the NVIDIA driver reports error 3"),
    ({"count": 0}, False, "the NVIDIA driver sees no device"),
    ({"broken": RuntimeError("no context")}, False, "CuPy does not start: RuntimeError: no context"),
    ({"spec": None}, False, NO_CUPY),
    ({"spec": ValueError("a stub")}, False, NO_CUPY),
], ids=str)  # fmt: skip
def test_status_of_the_gpu(asked: Any, given: dict[str, Any], usable: bool, said: str) -> None:
    assert asked(**given) == (usable, said)
