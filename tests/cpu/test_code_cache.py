"""Compiled code on disk: when it is used again, what makes it old, and files and folders that are no use."""

from __future__ import annotations

import ast
import ctypes
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.loops import llvm, llvm_machine, loops_moves, loops_path, loops_places, loops_tasks
from helpers.processes import PACKAGE, said

from cupynorm import config
from cupynorm.cpu import gelu

compiled = pytest.mark.compiled


# What makes code old


#: Compiles a module, or finds it, and says how many were compiled.
USE = """
import cupynorm
from cupynorm.cpu import llvm_machine, loops_tasks
emit, compiled = llvm_machine.emit, []
llvm_machine.emit = lambda write: compiled.append(emit(write)) or compiled[-1]
assert loops_tasks.TaskQueue(1, 1, 1).drain()
print(cupynorm.__path__[0], len(compiled))
"""


@compiled
@pytest.mark.long
def test_kept_code_is_used_until_its_source_changes(tmp_path: Path) -> None:
    """Whatever the files' times and sizes are. Other files of the package do not matter."""
    package = tmp_path / "cupynorm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))

    def found() -> bool:
        where, number = said(
            USE, tmp_path, PYTHONDONTWRITEBYTECODE="1", CUPYNORM_CACHE_DIR=str(tmp_path / "kept")
        ).rsplit(" ", 1)
        assert Path(where) == package
        return number == "0"

    def change(name: str) -> None:
        """One letter of a comment."""
        path = package / "cpu" / name
        times = path.stat()
        text = path.read_text()
        before, mark, rest = text.rpartition("  # ")
        path.write_text(before + mark + rest[0].swapcase() + rest[1:] if mark else text + "# a")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert [found(), found()] == [False, True]
    change("loops_tasks.py")
    assert [found(), found()] == [False, True]
    change("running.py")
    change("loops_path.py")
    assert found()


@compiled
@pytest.mark.long
def test_a_source_that_changes_after_the_import(tmp_path: Path) -> None:
    """What is compiled from the imported modules is not kept as the new files' code."""
    package, kept = tmp_path / "cupynorm", str(tmp_path / "kept")
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "cpu" / "loops_tasks.py"
    change = f"""
import cupynorm.cpu, pathlib
path = pathlib.Path({str(path)!r})
path.write_text(path.read_text() + "# newer")
"""
    assert said(change + USE, tmp_path, CUPYNORM_CACHE_DIR=kept).endswith(" 1")
    assert said(USE, tmp_path, CUPYNORM_CACHE_DIR=kept).endswith(" 1")
    assert said(USE, tmp_path, CUPYNORM_CACHE_DIR=kept).endswith(" 0")


@compiled
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")
def test_files_that_others_could_write_are_not_used(folder: Path, emitted: list[Any]) -> None:
    assert [plus(1), plus(1), len(emitted)] == [41, 41, 1]
    (file,) = folder.iterdir()
    file.chmod(0o666)
    assert [plus(1), len(emitted)] == [41, 2]
    assert not file.stat().st_mode & 0o022  # written anew


@compiled
@pytest.mark.usefixtures("fresh")
def test_without_a_home(emitted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.cache_folder, "given", "~nobody-has-this-name/kept")
    assert [plus(1), plus(1), len(emitted)] == [41, 41, 2]
    assert "home" in llvm_machine.not_kept()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let changes count that a process would see at its start."""
    llvm_machine._stamp.cache_clear()
    yield
    monkeypatch.undo()
    llvm_machine._stamp.cache_clear()


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been compiled, and not found."""
    made: list[Any] = []
    emit = llvm_machine.emit

    def noted(write: Any) -> bytes:
        made.append(write)
        return bytes(emit(write))

    monkeypatch.setattr(llvm_machine, "emit", noted)
    return made


def plus(number: int) -> int:
    """Compile a function that adds a number, or find it, and call it with 40."""

    def write(module: Any) -> None:
        with module.function("plus", llvm.INT, returns=llvm.INT, exported=True) as (code, a):
            code.builder.ret((a + number).value)

    (address,) = llvm_machine.compiled(f"plus {number}", write, ("plus",))
    return int(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(40))


@compiled
def test_code_is_kept_by_kind(folder: Path, emitted: list[Any]) -> None:
    """One file for each kind of module, whose name begins with what it is."""
    for times in (1, 2):
        assert [plus(1), plus(2), plus(1)] == [41, 42, 41], times
        assert len(emitted) == 2
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 and all(name.startswith("plus-") and name.endswith(".bin") for name in names)
    assert folder.stat().st_mode & 0o077 == 0 or os.name == "nt"


@compiled
@pytest.mark.parametrize("what", ["llvmlite", "numpy", "LLVM", "sources"])
def test_what_makes_code_old(
    folder: Path, emitted: list[Any], fresh: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Versions of the libraries (NumPy computes coefficients that are compiled in), and our sources. Old code is
    overwritten.
    """
    assert (plus(1), len(emitted)) == (41, 1)
    with monkeypatch.context() as patch:
        if what in ("llvmlite", "numpy"):
            patch.setattr(f"{what}.__version__", "99.0")
        elif what == "LLVM":
            patch.setattr(llvm_machine.binding, "llvm_version_info", (99, 0, 0))
        else:
            read = pkgutil.get_data
            patch.setattr(
                pkgutil, "get_data", lambda package, name: (read(package, name) or b"") + b"#" * (name == "llvm.py")
            )
        llvm_machine._stamp.cache_clear()
        assert [(plus(1), len(emitted)) for _ in range(2)] == [(41, 2), (41, 2)]
    llvm_machine._stamp.cache_clear()
    assert (plus(1), len(emitted)) == (41, 3)
    assert len([*folder.iterdir()]) == 1


@compiled
@pytest.mark.parametrize("what", ["processor", "features", "triple"])
def test_code_of_other_processors_is_kept_beside(
    folder: Path, emitted: list[Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Machines of several kinds may share a folder."""
    own_target = llvm_machine._target()

    class Target(llvm_machine.Target):
        def machine(self) -> Any:
            return own_target.machine()

    changed = Target(*own_target)._replace(**{
        "processor": {"cpu": "abacus"}, "features": {"features": own_target.features + ",+beads"},
        "triple": {"triple": "abacus-unknown-linux"},
    }[what])  # fmt: skip
    assert (plus(1), len(emitted)) == (41, 1)
    (own,) = folder.iterdir()
    code = own.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(llvm_machine, "_target", lambda: changed)
        patch.setattr(llvm_machine, "emit", lambda _: emitted.append(None) or code[32:])
        assert [(plus(1), len(emitted)) for _ in range(2)] == [(41, 2), (41, 2)]
    assert (plus(1), len(emitted)) == (41, 2)
    assert len([*folder.iterdir()]) == 2


@compiled
def test_every_source_file_counts(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = {llvm_machine._stamp()}
    read = pkgutil.get_data
    for changed in llvm_machine.SOURCES:
        monkeypatch.setattr(
            pkgutil, "get_data",
            lambda package, name, changed=changed: (read(package, name) or b"") + b"#" * (name == changed),
        )  # fmt: skip
        llvm_machine._stamp.cache_clear()
        stamps.add(llvm_machine._stamp())
    assert len(stamps) == len(llvm_machine.SOURCES) + 1


def of_package(file: str) -> str:
    """Return the name of a file of the package's folder cpu, else an empty one."""
    return Path(file).name if Path(file).parent == PACKAGE / "cpu" else ""


@compiled
def test_sources_are_all_that_write_code() -> None:
    """While modules of all kinds are written, no function runs that is in another file of the package."""
    met: set[str] = set()
    gelu.half_erfcx.cache_clear()  # so that it runs

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            met.add(of_package(frame.f_code.co_filename) or frame.f_code.co_filename)

    def write(made: Any, *given: Any) -> None:
        before = sys.getprofile()
        sys.setprofile(look)
        try:
            made(llvm.Module(), *given)
        finally:
            sys.setprofile(before)

    for name in loops_path._WRITERS:
        for channels_last in (False, True):
            if not (channels_last and name.startswith(("short", "across"))):
                kind = loops_places.Kind("bfloat16", 4, channels_last, "gelu", True, True)
                write(loops_path._WRITERS[name][0], kind)
    write(loops_tasks._write)
    for what in ("move", "transpose 4", "apart 3", "together 2"):
        write(loops_moves._write_move, what, 4)
    met.discard("llvm_machine.py")  # which asks for the processor
    assert met == {*llvm_machine.SOURCES} - {"llvm_machine.py"}


@compiled
def test_sources_import_only_sources() -> None:
    """Else a number of another file could change the code. The folder of the cache changes none."""
    for name in llvm_machine.SOURCES:
        for node in ast.walk(ast.parse((PACKAGE / "cpu" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                files = [f"{node.module}.py"] if node.module else [f"{alias.name}.py" for alias in node.names]
                allowed = {*llvm_machine.SOURCES, *(["config.py"] if name == "llvm_machine.py" else [])}
                assert node.level == 1 or files == ["config.py"], name
                assert set(files) <= allowed, name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("cupynorm") for alias in node.names), name


# Files and folders that are no use


@compiled
@pytest.mark.parametrize("how", ["empty", "other", "cut off", "longer", "one bit", "without its hash", "a folder"])
def test_unusable_files(folder: Path, emitted: list[Any], how: str) -> None:
    """They are compiled anew and overwritten, as long as they are files."""
    assert (plus(1), len(emitted)) == (41, 1)
    (file,) = folder.iterdir()
    code = file.read_bytes()
    broken = {
        "empty": b"", "other": b"broken", "cut off": code[:-1], "longer": code + b"\0", "without its hash": code[32:],
        "one bit": code[:100] + bytes([code[100] ^ 1]) + code[101:],
    }  # fmt: skip
    if how == "a folder":
        file.unlink()
        file.mkdir()
        assert [(plus(1), len(emitted)) for _ in range(2)] == [(41, 2), (41, 3)]
        return
    file.write_bytes(broken[how])
    assert [(plus(1), len(emitted)) for _ in range(2)] == [(41, 2), (41, 2)]
    assert file.read_bytes() == code


@compiled
def test_a_full_disk(folder: Path, emitted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go on, and nothing of a file is left behind."""
    opened = os.fdopen

    class Full:
        def __init__(self, *given: Any) -> None:
            self.file = opened(*given)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", Full)
    assert [plus(1), plus(1), len(emitted)] == [41, 41, 2]
    assert [*folder.iterdir()] == []
    assert "No space left" in llvm_machine.not_kept()


@compiled
@pytest.mark.parametrize("lacks", ["a folder", "a folder that may be written", "its sources"])
def test_code_is_compiled_if_it_cannot_be_kept(
    folder: Path, emitted: list[Any], fresh: None, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    """By each process; `info` says why."""
    from cupynorm import info

    if lacks == "a folder":
        folder.write_text("a file")
    elif lacks == "a folder that may be written":

        def refused(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(llvm_machine.tempfile, "mkstemp", refused)
    else:
        monkeypatch.setattr(llvm_machine, "SOURCES", ("nowhere.py",))
        llvm_machine._stamp.cache_clear()
    assert [plus(1), plus(1), len(emitted)] == [41, 41, 2]
    why = {"a folder": "exists", "its sources": "nowhere.py"}.get(lacks, "Permission denied")
    assert why in llvm_machine.not_kept()
    assert info.loop_cache().startswith("none, the loops are compiled anew in each process: ")
    assert why in info.loop_cache()


@compiled
def test_info_says_where_loops_are_kept(folder: Path) -> None:
    from cupynorm import info

    assert llvm_machine.not_kept() == ""
    assert info.loop_cache().startswith(f"{folder} (0 files, 0 KiB, for ")
    assert info.loop_cache().endswith(f"{llvm_machine.processor()})")
    plus(1)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert info.loop_cache().startswith(f"{folder} (1 files, {size / 2**10:.0f} KiB, for ")
    assert len([*folder.iterdir()]) == 1  # no probe is left


@compiled
@pytest.mark.parametrize("home", [False, True])
def test_folder_of_the_cache(tmp_path: Path, home: bool) -> None:
    """The user's folder for caches, or CUPYNORM_CACHE_DIR, which may begin with ~."""
    code = "from cupynorm.cpu import llvm_machine; print(llvm_machine.folder())"
    places = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "XDG_CACHE_HOME": ""}
    given = {"CUPYNORM_CACHE_DIR": os.path.join("~", "mine")} if home else {"CUPYNORM_CACHE_DIR": ""}
    usual = {"win32": ("AppData", "Local"), "darwin": ("Library", "Caches")}.get(sys.platform, (".cache",))
    expected = tmp_path / "mine" if home else tmp_path.joinpath(*usual, "cupynorm")
    assert said(code, LOCALAPPDATA="", **places, **given) == str(expected)
    if not home and sys.platform == "linux":
        places["XDG_CACHE_HOME"] = str(tmp_path / "caches")
        assert said(code, **places, **given) == str(tmp_path / "caches" / "cupynorm")


SEVERAL = """
import sys, numpy as np, cupynorm as cn
from cupynorm.cpu import llvm_machine
sys.stdin.readline()
print(cn.instance_norm(np.arange(600, dtype=np.float32).reshape(2, 3, 100)).tobytes().hex()[:2000])
"""


@compiled
@pytest.mark.long
def test_several_processes_at_once(tmp_path: Path) -> None:
    """They may compile the same, and none finds half a file of another."""
    environment = {**os.environ, "CUPYNORM_CACHE_DIR": str(tmp_path), "CUPYNORM_COMPILED": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=PACKAGE.parent, env=environment,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate(timeout=120) for process in running}
    assert len(found) == 1 and not any(errors for _, errors in found)
    files = [*tmp_path.iterdir()]
    assert len(files) > 2 and all(path.suffix == ".bin" for path in files)
    assert all(llvm_machine._kept(path) for path in files)
