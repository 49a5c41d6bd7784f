"""Backends to run the same cases on, random numbers with a printed seed, and what is skipped where."""

from __future__ import annotations

import ctypes
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from cupynorm import cpu, devices, functional, threads
from cupynorm.cuda.plan import Device


@dataclass
class Backend:
    """Where a case runs: numpy (alone), compiled (by numba), simt (the CUDA kernels on the emulator) or cupy."""

    name: str
    device: str
    _patch: pytest.MonkeyPatch

    def array(self, host: np.ndarray) -> Any:
        """The array on this backend, with the host array's strides."""
        if self.name != "cupy":
            return host
        import cupy

        if not host.size:
            return cupy.asarray(host)
        # The memory that the strides reach over, then the same view of it.
        low = sum(min(0, (n - 1) * s) for n, s in zip(host.shape, host.strides, strict=True))
        high = sum(max(0, (n - 1) * s) for n, s in zip(host.shape, host.strides, strict=True)) + host.itemsize
        memory = (ctypes.c_char * (high - low)).from_address(host.ctypes.data + low)
        shift = (host.ctypes.data + low) % 16  # CuPy's own allocations are aligned
        raw = cupy.empty(high - low + 16, np.uint8)
        raw[shift : shift + high - low] = cupy.asarray(np.frombuffer(memory, np.uint8))
        return cupy.ndarray(host.shape, host.dtype, raw.data + (shift - low), host.strides)

    def pretend(self, device: Device) -> None:
        """Plan for this device from now on, to the end of the test. NumPy plans nothing."""
        if self.name == "simt":
            from simt.backend import runtime

            self._patch.setattr(runtime, "_device", device)
        elif self.name == "cupy":
            from cupynorm.cuda.backend import runtime

            real = runtime.device()
            limited = replace(
                device,
                sm_count=min(device.sm_count, real.sm_count),
                shared_per_block=min(device.shared_per_block, real.shared_per_block),
                cluster=min(device.cluster, real.cluster),
            )
            self._patch.setitem(runtime._devices, int(self.device[5:]), limited)

    def host(self, array: Any) -> np.ndarray:
        return devices.to_host(array)


def pytest_report_header() -> str:
    usable, why = devices.gpu_status()
    return f"GPU: {why}" if usable else f"GPU: none ({why}): the tests marked gpu skip"


def _most_needed(session: pytest.Session, marker: str) -> list[Any]:
    """The kernel modules that most of the tests with a marker need, where there are many that will run."""
    from cupynorm.cuda.source import all_modules

    files = [
        item.path.name
        for item in session.items
        if item.get_closest_marker(marker) and not item.get_closest_marker("skip")
    ]
    core = all_modules([0])
    if marker == "simt":  # _not_its_turn
        from cases import turn

        def needed(m: Any) -> bool:
            easy = not m.skewed if m.kind == "channels_first" else m.vector > 1
            group = "split" if "split" in m.file else m.group
            by_table = not m.file.startswith("double") and group in ("", "warp", "part")
            return by_table or m.dtype == turn(group, m.kind, easy)

        core = [m for m in core if needed(m)]
    fused = [m for m in all_modules(range(1, 4)) if not m.skewed and m.kind == "channels_first"]
    return (core if files.count("test_cases.py") > 300 else []) + (
        [m for m in fused if m.group == "part" or m.file == "evaluate"] if files.count("test_epilogue.py") > 300 else []
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile them side by side: one after the other would take minutes."""
    if modules := _most_needed(session, "simt"):
        from simt import emulator

        emulator.build_all(modules)
    # Workers of pytest-xdist would each compile all of them: `python -m bench.prime` does it for them.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if alone and devices.gpu_status()[0] and (modules := _most_needed(session, "gpu")):
        from cupynorm.cuda.backend import runtime

        clusters = runtime.device().cluster > 1
        runtime.load_all(m for m in modules if clusters or not m.group.startswith("cluster"))


KERNELS = [pytest.param("simt", marks=pytest.mark.simt), pytest.param("cupy", marks=pytest.mark.gpu)]
#: For tests of the CUDA kernels alone.
on_kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)


@pytest.fixture(params=["numpy", pytest.param("compiled", marks=pytest.mark.compiled), *KERNELS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param == "cupy":
        return Backend("cupy", "cuda:0", monkeypatch)
    if request.param == "simt":
        from simt import emulator

        emulator.require()
        monkeypatch.setitem(functional.BACKENDS, "numpy", "simt.backend")
    if request.param in ("numpy", "compiled"):
        use_compiled(monkeypatch, request.param == "compiled")
    return Backend(request.param, "cpu", monkeypatch)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the public functions on a runtime in the place of a GPU's, on NumPy arrays."""

    from cupynorm.cuda.launch import Launcher

    def made(runtime: Any) -> Any:
        for name in ("forward", "backward", "double_backward"):
            monkeypatch.setattr(f"simt.backend.{name}", getattr(Launcher(runtime), name))
        monkeypatch.setitem(functional.BACKENDS, "numpy", "simt.backend")
        return runtime

    return made


@pytest.fixture
def threads_as_they_were():
    before = threads.get_num_threads()
    yield
    threads.set_num_threads(before)


def use_compiled(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Let the CPU backend use its compiled loops or not, to the end of the test; skip where there are none."""
    if wanted and cpu.numba is None:
        pytest.skip(f"no compiled loops: {cpu.without_numba}")
    monkeypatch.setattr(cpu, "compiled", wanted)


def _compiles_too_much(item: Any) -> bool:
    """Numba compiles each kind of call for itself, in seconds; test_cases.py's table has every activation."""
    given = getattr(item, "callspec", None)
    if given is None or item.get_closest_marker("compiled") is None:
        return False
    if item.originalname == "test_table" and given.params["case"].activation is not None:
        return _activation_elsewhere(given.params["case"])
    if item.path.name != "test_epilogue.py":
        return False
    activation, dtype = given.params.get("activation"), given.params.get("dtype", "float32")
    elsewhere = activation in ("leaky_relu", "silu", "gelu") or str(dtype) != "float32"
    return elsewhere or (item.originalname == "test_finite_differences" and activation is not None)


def _activation_elsewhere(case: Any) -> bool:
    """Whether another case of the table compiles its activation, and another its dtype; CUPYNORM_COMPILED=all asks for
    all of them."""
    if os.environ.get("CUPYNORM_COMPILED") == "all":
        return False
    turns = {"relu": "float32", "leaky_relu": "float16", "silu": "bfloat16", "gelu": "float64"}
    return case.dtype != turns[case.activation]


def _shows_nothing_more(item: Any) -> bool:
    """Of the double backward, which is never compiled: one test does with compiled forwards. And PyTorch's numbers are
    compared with those of the NumPy backend, which the emulated kernels are held to by the same reference.
    """
    way = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    if way == "compiled":
        double = item.path.name == "test_double_backward.py" or item.originalname.startswith("test_double_")
        return double and item.originalname != "test_arguments"
    emulated = item.get_closest_marker("simt") is not None and hasattr(item, "callspec")
    return emulated and (item.originalname == "test_pytorch" or _not_its_turn(item))


def _not_its_turn(item: Any) -> bool:
    """Of what reaches every kernel, and of the double backward's cases, on the emulator; CUPYNORM_SIMT=all runs all."""
    if os.environ.get("CUPYNORM_SIMT") == "all":
        return False
    given = item.callspec.params
    if item.originalname == "test_double_variant":
        return given["case"] not in _in_turn("double_backward")
    if item.originalname == "test_variant" or item.originalname.endswith("_for_every_owner"):
        return given["case"] not in _in_turn("forward", "backward")
    if item.originalname == "test_bytes_of_a_double_backward":
        return bool(given["dtype"] != "float32")
    return (
        item.path.name == "test_cases.py"
        and item.originalname == "test_double_backward"
        and given["case"].dtype not in ("float32", "float16")
    )


@cache
def _in_turn(*ops: Any) -> set[Any]:
    from cases import variants

    return set(variants(ops, turns=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {item: None for item in items if _compiles_too_much(item) or _shows_nothing_more(item)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    usable, why = devices.gpu_status()
    asked = config.option.markexpr
    for item in items:
        if item.get_closest_marker("gpu") and not usable:
            item.add_marker(pytest.mark.skip(reason=f"no usable GPU: {why}"))
        if item.get_closest_marker("slow") and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that NumPy allocates in a call at its peak."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers; the seed is printed with a failure. CUPYNORM_TEST_SEED=<seed> repeats it."""
    seed = int(os.environ.get("CUPYNORM_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"CUPYNORM_TEST_SEED={seed}")
    return np.random.default_rng(seed)
