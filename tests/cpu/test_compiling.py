"""How numba's code is kept on disk: what makes it old, and files and folders that are no use."""

from __future__ import annotations

import ast
import dis
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import pytest

import cupynorm

pytestmark = pytest.mark.compiled
PACKAGE = Path(cupynorm.__file__).parent


def said(code: str, folder: Path, **environment: str) -> str:
    """What a process prints that imports the package from this folder."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "CUPYNORM_COMPILED": "1", "NUMBA_CACHE_DIR": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


#: Compiles the smallest function that is kept, or finds it.
USE = """
import cupynorm
from cupynorm.cpu import numba_tasks
assert numba_tasks.TaskQueue(1, 1, 1).drain()
print(cupynorm.__path__[0], sum(numba_tasks.drain.stats.cache_hits.values()))
"""


@pytest.mark.long
def test_cached_code_is_used_until_its_source_changes(tmp_path: Path) -> None:
    """Whatever the files' times and sizes are, and the old is overwritten. Other files of the package do not matter."""
    package = tmp_path / "cupynorm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))

    def found() -> bool:
        where, hits = said(USE, tmp_path, PYTHONDONTWRITEBYTECODE="1").rsplit(" ", 1)
        assert Path(where) == package
        return hits == "1"

    def change(name: str) -> None:
        """One letter of a comment."""
        path = package / "cpu" / name
        times = path.stat()
        text = path.read_text()
        before, mark, rest = text.rpartition("  # ")
        path.write_text(before + mark + rest[0].swapcase() + rest[1:] if mark else text + "# a")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert [found(), found()] == [False, True]
    kept = sorted(path.name for path in package.rglob("*.nb[ic]"))
    for name in ("numba_intrinsics.py", "numba_forward.py", "numba_cache.py", "gelu.py"):
        change(name)
        assert [found(), found()] == [False, True], name
    change("result_pool.py")
    path = package / "cpu" / "numba_tasks.py"
    path.write_text(path.read_text().replace("import numba\n", "import numba\n\n", 1))  # every line moves
    assert not found()
    change("running.py")
    assert found()
    assert sorted(path.name for path in package.rglob("*.nb[ic]")) == kept


def globals_of(code: CodeType) -> set[str]:
    inner = (globals_of(each) for each in code.co_consts if isinstance(each, CodeType))
    return {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}.union(*inner)


def test_cache_key_covers_every_source_file() -> None:
    """Compiled functions are in these files, and use no function and no number of another of the package."""
    from numba.core.dispatcher import Dispatcher

    from cupynorm.cpu import (
        numba_activations,
        numba_backward,
        numba_cache,
        numba_forward,
        numba_geometry,
        numba_intrinsics,
        numba_moves,
        numba_tasks,
    )

    for module in [module for name, module in sys.modules.items() if name.startswith("cupynorm.")]:
        loops = [value.py_func for value in vars(module).values() if isinstance(value, Dispatcher)]
        assert {Path(loop.__code__.co_filename).name for loop in loops} <= {*numba_cache.SOURCES}, module.__name__
    for module in (
        numba_activations, numba_backward, numba_forward, numba_geometry, numba_intrinsics, numba_moves, numba_tasks
    ):  # fmt: skip
        foreign = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
            if isinstance(node, ast.ImportFrom) and node.level and f"{node.module}.py" not in numba_cache.SOURCES
            for alias in node.names
        }
        loops = [value.py_func for value in vars(module).values() if isinstance(value, Dispatcher)]
        if module in (numba_activations, numba_intrinsics):  # their overloads are compiled as well
            loops += [value for value in vars(module).values() if isinstance(value, FunctionType)]
        if module is numba_moves:  # these make loops
            loops += [numba_moves._side_by_side.__wrapped__, numba_moves._transposed.__wrapped__]
        assert len(loops) > 2
        for loop in loops:
            assert not foreign & globals_of(loop.__code__), loop.__name__


def plus(a: Any) -> Any:
    return a + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from numba import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def used(*given: Any) -> int:
    """How often a function that is compiled anew finds its code on disk."""
    from cupynorm.cpu.numba_cache import disk_cached

    function = disk_cached(plus)
    for each in given:
        assert function(each) == each + 1
    return sum(function.stats.cache_hits.values())


@pytest.mark.parametrize("library", ["numba", "llvmlite", "numpy"])
def test_another_version_makes_code_old(folder: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    from cupynorm.cpu import numba_cache

    assert [used(1), used(1)] == [0, 1]
    monkeypatch.setattr(f"{library}.__version__", "99.0")
    numba_cache._stamp.cache_clear()
    try:
        assert used(1) == 0
        if library != "numba":  # which has another index for each version
            assert used(1) == 1
    finally:
        monkeypatch.undo()
        numba_cache._stamp.cache_clear()


@pytest.mark.parametrize(("setting", "value"), [("OPT", 1), ("SLP_VECTORIZE", 1), ("BOUNDSCHECK", 1)])
def test_code_of_other_settings_is_kept_beside(
    folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: int
) -> None:
    from numba import config

    assert [used(1), used(1)] == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(config, setting, value)
        assert [used(1), used(1)] == [0, 1]
    assert used(1) == 1


def test_unusable_cache_files(folder: Path) -> None:
    """Broken ones, and those of another kind of call, as two processes may leave that write at the same time."""
    assert [used(1, 1.0), used(1, 1.0)] == [0, 2]
    first, second = sorted(folder.rglob("*.nbc"))
    shutil.copy(first, second)
    assert used(1, 1.0) == 1
    for path in folder.rglob("*.nb[ic]"):
        path.write_bytes(b"broken")
        assert used(1, 1.0) < 2
        assert used(1, 1.0) == 2


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import IndexDataCacheFile

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", full)
    assert [used(1), used(1)] == [0, 0]


@pytest.mark.parametrize("lacks", ["a folder", "its files", "what we know of numba"])
def test_code_is_compiled_if_the_cache_is_not_writable(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    from numba.core import caching

    from cupynorm.cpu import numba_cache

    if lacks == "a folder":
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    elif lacks == "its files":
        monkeypatch.setattr(numba_cache, "SOURCES", ("nowhere.py",))
        numba_cache._stamp.cache_clear()
    else:
        monkeypatch.setattr(numba_cache, "IndexDataCacheFile", object)
    function = numba_cache.disk_cached(plus)
    assert function(np.float32(1)) == 2
    assert function.stats.cache_path is None


# Settings


@pytest.mark.long
@pytest.mark.parametrize("name", ["DISABLE_JIT", "BOUNDSCHECK"])
@pytest.mark.parametrize("way", ["environment", "configuration"])
def test_numba_settings_that_exclude_the_loops(tmp_path: Path, name: str, way: str) -> None:
    """Calls are computed by NumPy then, and `info` says why."""
    code = f"""
import numpy as np
if {way == "configuration"}:
    import numba
    numba.config.{name} = 1
import cupynorm as cn
from cupynorm import cpu, info
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
print(cpu.compiled, cn.instance_norm(x).std().round(3), cn.instance_norm(x[:, :, ::-1]).std().round(3))
print(info.report())
"""
    environment = {f"NUMBA_{name}": "1"} if way == "environment" else {}
    first, *report = said(code, PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path), **environment).splitlines()
    assert first == "False 1.0 1.0"
    assert f"compiled loops: no (NUMBA_{name} " in "\n".join(report)
    assert "loop cache      no compiled loops" in report
    assert ("NUMBA_BOUNDSCHECK=1" in "\n".join(report)) == (way == "environment" and name == "BOUNDSCHECK")
    assert not list(tmp_path.rglob("*.nb[ic]"))


def test_info_says_where_loops_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    from cupynorm import info

    assert info.loop_cache().startswith(str(folder))
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert info.loop_cache().startswith("none, the loops are compiled anew in each process: cannot cache function")
