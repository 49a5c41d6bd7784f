"""The CuPy runtime on stand-ins for CuPy's modules: the order in which it loads, and the layout of its arguments."""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.faults import ending

from cupynorm.cuda.arguments import STRUCTS
from cupynorm.cuda.plan import Step
from cupynorm.cuda.source import Module, all_modules, core_modules


class Cupy:
    """A stand-in for the parts of CuPy that the runtime uses. `done` records the calls."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.compiling = self.most_compiling = 0
        self.lock = threading.Lock()

    def version(self) -> tuple[int, int]:
        self.done.append(("version",))
        time.sleep(0.05)  # other threads call meanwhile
        self.done.append(("version known",))
        return 13, 0

    def raw(self, source: str, name: str, options: tuple[str, ...]) -> Any:
        return Kernel(self, source, name)

    def modules(self) -> dict[str, ModuleType]:
        cupy, backends = ModuleType("cupy"), [ModuleType("cupy_backends" + tail) for tail in ("", ".cuda", ".cuda.api")]
        runtime = SimpleNamespace(getDevice=lambda: 0, deviceGetAttribute=lambda *_: 200_000, memGetInfo=lambda: (1, 2))
        cupy.RawKernel = self.raw  # type: ignore[attr-defined]
        cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
            runtime=runtime,
            nvrtc=SimpleNamespace(getVersion=self.version),
            compiler=SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
            Device=lambda number: nullcontext(),
            alloc=None,
            get_current_stream=lambda: SimpleNamespace(ptr=77),
        )
        driver = SimpleNamespace(
            CUDADriverError=type("CUDADriverError", (Exception,), {}),
            funcSetAttribute=lambda pointer, *given: self.done.append(("attribute", pointer, *given)),
            launchKernel=lambda *given: self.launched.append(("plain", *given)),
            launchCooperativeKernel=lambda *given: self.launched.append(("cooperative", *given)),
        )
        backends[-1].driver = driver  # type: ignore[attr-defined]
        return {"cupy": cupy} | {module.__name__: module for module in backends}


class Kernel:
    """A RawKernel, which is compiled when its `kernel` is first used."""

    def __init__(self, cupy: Cupy, source: str, name: str):
        self.cupy, self.source, self.name = cupy, source, name
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, *launch: Any, shared_mem: int = 0) -> None:
        self.cupy.launched.append((self.name, *launch, shared_mem))

    @property
    def kernel(self) -> Any:
        with self.cupy.lock:
            self.cupy.done.append(("compile", self.source, self.name))
            self.cupy.compiling += 1
            self.cupy.most_compiling = max(self.cupy.most_compiling, self.cupy.compiling)
        time.sleep(0.002)
        with self.cupy.lock:
            self.cupy.compiling -= 1
            self.cupy.done.append(("compiled", self.source, self.name))
        return SimpleNamespace(ptr=len(self.name))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Cupy]]:
    """Import cupynorm.cuda.runtime and clusters anew on the stand-ins; yield the runtime and the stand-ins."""
    cupy = Cupy()
    for name, module in cupy.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    package = importlib.import_module("cupynorm.cuda")
    before = {name: vars(package).pop(name, None) for name in ("clusters", "runtime")}
    for name in before:
        monkeypatch.delitem(sys.modules, f"cupynorm.cuda.{name}", raising=False)
    yield importlib.import_module("cupynorm.cuda.runtime"), cupy
    for name, module in before.items():
        sys.modules.pop(f"cupynorm.cuda.{name}", None)
        vars(package).pop(name, None)
        if module is not None:
            setattr(package, name, module)


def test_nvrtc_is_loaded_once_before_compiling(fake: tuple[Any, Cupy]) -> None:
    runtime, cupy = fake
    loaded, modules = runtime.CupyRuntime(), core_modules()
    start = threading.Barrier(len(modules))

    def load(module: Module) -> None:
        start.wait()
        loaded.load(module)

    with ThreadPoolExecutor(len(modules)) as pool:
        list(pool.map(load, modules))
    assert cupy.done[:2] == [("version",), ("version known",)]
    assert cupy.done.count(("version",)) == 1
    assert cupy.most_compiling > 1  # in parallel, after that
    expected = sorted((module.source, name) for module in modules for name in module.kernels)
    assert sorted(done[1:] for done in cupy.done if done[0] == "compile") == expected


def test_threads_load_a_module_once(fake: tuple[Any, Cupy]) -> None:
    runtime, cupy = fake
    loaded, module = runtime.CupyRuntime(), core_modules()[0]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(loaded.load, [module] * 8))
    assert [done[2] for done in cupy.done if done[0] == "compile"] == list(module.kernels)


def test_signal_handler_loads_a_module_being_loaded(fake: tuple[Any, Cupy], monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler's call does not wait for the call that it interrupts."""
    runtime, cupy = fake
    loaded, module = runtime.CupyRuntime(), core_modules()[0]
    nested: list[int] = []

    def handler() -> None:
        if not nested:
            nested.append(1)
            loaded.load(module)
            nested.append(len(loaded._kernels))

    def version() -> tuple[int, int]:
        handler()
        return Cupy.version(cupy)

    raw = cupy.raw

    def compiling(*given: Any) -> Any:
        handler()
        return raw(*given)

    for name, stand_in in (("nvrtc", version), ("RawKernel", compiling)):
        nested.clear()
        loaded = runtime.CupyRuntime()
        with monkeypatch.context() as patch, ending():
            if name == "nvrtc":
                patch.setattr(sys.modules["cupy"].cuda.nvrtc, "getVersion", stand_in)
            else:
                patch.setattr(sys.modules["cupy"], name, stand_in)
            loaded.load(module)
        assert nested == [1, len(module.kernels)]
        assert sorted(name for *_, name in loaded._kernels) == sorted(module.kernels)


def test_the_smallest_module_is_loaded_first_and_alone(fake: tuple[Any, Cupy]) -> None:
    runtime, cupy = fake
    modules = core_modules()
    smallest = min(modules, key=lambda module: len(module.source))
    assert modules[0] != smallest
    runtime.CupyRuntime().load_all(iter(modules))
    compiled = [done for done in cupy.done if done[0] in ("compile", "compiled")]
    first = [(what, smallest.source, name) for name in smallest.kernels for what in ("compile", "compiled")]
    assert compiled[: len(first)] == first
    assert {done[1] for done in compiled} == {module.source for module in modules}
    assert cupy.most_compiling > 1
    runtime.CupyRuntime().load_all([])


@pytest.mark.parametrize(
    ("at_a_time", "largest"),
    [
        (lambda size: 132 // size, 16),
        (lambda size: {16: 6, 8: 16}[size], 8),  # 96 of 132 multiprocessors; 128
        (lambda size: {16: 7}[size], 16),  # 112
        (lambda size: 1, 1),
        (lambda size: None, 16),  # the driver has no such function: the largest that could be launched
    ],
)
def test_clusters_that_leave_a_quarter_idle_are_not_used(
    fake: tuple[Any, Cupy], monkeypatch: pytest.MonkeyPatch, at_a_time: Any, largest: int
) -> None:
    clusters = fake[0].clusters
    monkeypatch.setattr(clusters, "_clusters_at_a_time", lambda function, size, shared: at_a_time(size))
    assert clusters.largest_cluster(9, 200_000, 132) == largest
    assert clusters.largest_cluster(8, 200_000, 132) == 1


@pytest.mark.parametrize("missing", [OSError("no library"), None])
def test_driver_without_cluster_occupancy(
    fake: tuple[Any, Cupy], monkeypatch: pytest.MonkeyPatch, missing: OSError | None
) -> None:
    """The driver's library is missing, or has no such function."""

    def load(name: str) -> Any:
        if missing:
            raise missing
        return SimpleNamespace()

    clusters = fake[0].clusters
    monkeypatch.setattr(clusters, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": load}))
    assert clusters._clusters_at_a_time(1, 2, 1024) is None


def test_clusters_of_16_are_requested(fake: tuple[Any, Cupy]) -> None:
    runtime, cupy = fake
    for group in ("cluster", "cluster_registers"):
        module = next(m for m in all_modules([0]) if m.file == "backward" and m.group == group)
        cupy.done.clear()
        runtime.CupyRuntime().load(module)
        asked = [done[1:] for done in cupy.done if done[0] == "attribute"]
        wanted = [name for name in module.kernels if "cluster16" in name]
        assert asked == [(len(name), runtime.clusters.NON_PORTABLE, 1) for name in wanted]
        assert len(wanted) == 1


@pytest.mark.parametrize("cooperative", [False, True])
def test_arguments_of_the_driver(fake: tuple[Any, Cupy], cooperative: bool) -> None:
    runtime, cupy = fake
    module = core_modules()[0]
    name = module.kernels[0]
    step = Step(module.file, module.file, name, (7, 3), 128, 4096, cooperative=cooperative)
    given = bytes(n % 251 for n in range(STRUCTS[module.file].itemsize))
    own = runtime.CupyRuntime()
    launch = own.prepare(own.kernel(module, step), given, (alive := []))
    launch()
    launch()
    (what, *told), again = cupy.launched
    assert (what, *told) == again
    function, x, y, z, threads, one, also_one, shared, stream, arguments, *rest = told
    assert what == ("cooperative" if cooperative else "plain")
    assert (function, x, y, z) == (len(name), 7, 3, 1)
    assert (threads, one, also_one, shared, stream) == (128, 1, 1, 4096, 77)
    assert rest == ([] if cooperative else [0])
    # The driver reads the address of each parameter; the kernels have one.
    assert ctypes.string_at(ctypes.c_uint64.from_address(arguments).value, len(given)) == given
    assert [ctypes.addressof(memory) for memory in alive] == [arguments]
