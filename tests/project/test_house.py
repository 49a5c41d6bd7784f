"""The form of the package: the contract of the backends, the direction of imports, one place for each setting."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import missing

import cupynorm as cn
from cupynorm import _checks, config
from cupynorm.backend import Backend, backend_of
from cupynorm.cpu.blocking import Arrays
from cupynorm.cuda.source import kernel_folder

PACKAGE = Path(cn.__file__).parent
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}
FLOOR = {f"cupynorm.{name}" for name in ("_types", "_checks", "config", "conventions", "cpu_count", "statistics")}
CONTRACT = [name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")]


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in its text.

    Without those that it imports by name at the first call: cupynorm.backend's MODULES.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package
            for _ in range(node.level - 1):
                base = base.rpartition(".")[0]
            base = f"{base}.{node.module}" if node.module else base
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cupynorm"):
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("cupynorm"))
    return found - {module}


@pytest.mark.long
def test_no_circle_of_imports() -> None:
    graph = {module: imports(module) & set(MODULES) for module in MODULES}
    while leaves := [module for module, needed in graph.items() if not needed & set(graph)]:
        for module in leaves:
            del graph[module]
    assert not graph, f"modules that import each other: {sorted(graph)}"


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_the_floor_imports_only_the_floor(module: str) -> None:
    assert imports(module) <= FLOOR


@pytest.mark.parametrize("module", sorted(name for name in MODULES if re.match(r"cupynorm\.(cpu|cuda)\b", name)))
def test_backends_import_their_own_package_the_contract_and_the_floor(module: str) -> None:
    package = ".".join(module.split(".")[:2])
    others = {name for name in imports(module) if name != package and not name.startswith(f"{package}.")}
    assert others <= {*FLOOR, "cupynorm.backend"}


def test_settings_do_not_import_the_kernels_launches() -> None:
    assert imports("cupynorm.config") == {"cupynorm._checks", "cupynorm.cpu_count"}


@pytest.mark.parametrize("folder", ["cupynorm", "kernels", "tests", "bench", "tools", "docs", "examples"])
def test_length_of_files(folder: str) -> None:
    files = [f for f in (PACKAGE.parent / folder).rglob("*") if f.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")]
    long = {str(f): n for f in files if (n := len(f.read_text(encoding="utf-8").splitlines())) > 600}
    assert files and not long, f"no file has over 600 lines: {long}"


@pytest.mark.long
def test_settings_have_one_place() -> None:
    """Each CUPYNORM_* variable is read by a Setting of config, and by nothing else."""
    settings = [value for value in vars(config).values() if isinstance(value, config.Setting)]
    assert len({setting.variable for setting in settings}) == len(settings) >= 5
    for module, file in MODULES.items():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        named = [text for text in texts if re.fullmatch("CUPYNORM_[A-Z_]+", text)]
        assert not named or module == "cupynorm.config", f"{module} names {named}"


def test_kernels_choose_by_constants() -> None:
    """`#if` asks for the architecture or the emulator, or guards a header; nothing else."""
    allowed = r"defined\(SIMT\)|__CUDA_ARCH__|ifndef CUPYNORM_\w+"
    for path in sorted(kernel_folder().iterdir()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"\s*#\s*(if|elif)", line):
                assert re.search(allowed, line), f"{path.name}:{number}: {line}"
            macro = re.match(r"\s*#\s*define (\w+)", line)
            assert not macro or re.fullmatch(r"CUPYNORM_\w+|KERNEL|CLUSTER_OF", macro[1]), f"{path.name}:{number}"


@pytest.mark.parametrize("setting", ["eager", "compiled", "batch_invariant", "memory_limit", "num_threads"])
def test_settings_refuse_other_texts(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tested: config.Setting[Any] = getattr(config, setting)
    monkeypatch.setattr(tested, "given", None)
    monkeypatch.setattr(tested, "found", None)
    for text in ("many", "-1", "1.5"):
        monkeypatch.setenv(tested.variable, text)
        with pytest.raises(ValueError, match=f"{tested.variable} must be {tested.needed}, got '{text}'"):
            tested.get()
    monkeypatch.setenv(tested.variable, " ")
    assert tested.get() == tested.default()
    monkeypatch.setattr(tested, "found", None)
    monkeypatch.setenv(tested.variable, "1")
    assert tested.get() == 1
    monkeypatch.setenv(tested.variable, "0")
    assert tested.get() == 1  # read once


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures_of_the_backends(name: str) -> None:
    from cupynorm.cpu import CpuBackend
    from cupynorm.cuda.launch import CudaBackend

    expected = inspect.signature(getattr(Backend, name)).parameters
    for backend in (CpuBackend, CudaBackend):
        assert inspect.signature(getattr(backend, name)).parameters == expected, backend
        assert name in vars(backend), f"{backend.__name__} does not implement {name}"


def test_backend_of_a_place() -> None:
    assert type(backend_of("cpu")).__name__ == "CpuBackend"
    if not missing("cupy"):
        assert type(backend_of("cuda:0")).__name__ == "CudaBackend"


@pytest.mark.compiled
def test_the_arrays_of_a_call_have_one_order() -> None:
    from cupynorm.cpu import loops_places as places

    assert Arrays._fields == places.ARRAYS
    assert [places.ARRAYS[i] for i in places.RESULTS] == ["result", "dresidual"]
    assert tuple(name for name in places.CALL if name in places.ARRAYS) == places.ARRAYS
    strides = [f"{name}_{axis}" for name in places.ARRAYS for axis in "ncp"]
    assert list(places.GEOMETRY[-len(strides) :]) == strides


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_kind_of_an_array_is_found_once(monkeypatch: pytest.MonkeyPatch, activation: str | None) -> None:
    seen: list[str] = []
    kind_of = _checks.kind_of

    def noted(array: Any, name: str) -> str:
        seen.append(name)
        return kind_of(array, name)

    monkeypatch.setattr(_checks, "kind_of", noted)
    x = np.ones((2, 3, 4, 5), np.float32)
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cpu", activation=activation)
    layer(x, residual=x.copy(), out=np.empty_like(x))
    assert sorted(seen) == ["bias", "input", "out", "residual", "running_mean", "running_var", "weight"]
    seen.clear()
    layer.backward(x.copy(), out=np.empty_like(x))
    assert sorted(seen) == ["dy", "input", "out"]
