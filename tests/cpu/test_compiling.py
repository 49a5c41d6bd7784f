"""Compiling loops: interrupts and signal handlers in the middle of it; calls where loops cannot be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import use_compiled
from helpers.compare import Bits
from helpers.faults import Faults, ending, handled, interrupts
from helpers.loops import forget_modules, llvm_machine
from helpers.processes import said

import cupynorm

compiled = pytest.mark.compiled


# In the middle of compiling


X = np.arange(600, dtype=np.float32).reshape(2, 3, 100) % 7


def first_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A call that compiles its loops: in this process, nothing is known of them."""
    shutil.rmtree(folder, ignore_errors=True)
    forget_modules(monkeypatch)
    return call()


def call() -> Any:
    mean, var = np.arange(3, dtype=np.float32), np.ones(3, np.float32)
    return cupynorm.instance_norm(X, mean, var, use_input_stats=False)


@compiled
def test_interrupts_while_loops_are_compiled(
    folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At points that chance has chosen: the next call compiles, and computes right."""
    use_compiled(monkeypatch, True)
    expected = Bits(first_call(folder, monkeypatch))
    points = Faults(0)
    with interrupts(points):
        first_call(folder, monkeypatch)
    assert points.count > 1000
    for number in sorted(rng.integers(1, points.count, 6).tolist()):
        with ending(), pytest.raises(KeyboardInterrupt), interrupts(Faults(number)):
            first_call(folder, monkeypatch)
        with ending():
            assert Bits(call()) == expected, number
        assert all(path.suffix == ".bin" and llvm_machine._kept(path) for path in folder.iterdir()), number


@compiled
@pytest.mark.long
def test_an_interrupt_while_code_is_loaded(folder: Path) -> None:
    """An engine that nobody keeps takes its target machine with it, and no other engine's."""
    code = """
import numpy as np, cupynorm as cn
from cupynorm.cpu import llvm_machine
x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
load, tries = llvm_machine._load, []
def interrupted(code):
    load(code)
    tries.append(1)
    raise KeyboardInterrupt
llvm_machine._load = interrupted
for _ in range(3):
    try:
        cn.instance_norm(x)
    except KeyboardInterrupt:
        pass
llvm_machine._load = load
print(len(tries), cn.instance_norm(x).std().round(3), cn.instance_norm(x[:, :, ::-1]).std().round(3))
"""
    assert said(code, CUPYNORM_CACHE_DIR=str(folder)) == "3 1.0 1.0"


@compiled
def test_a_handler_calls_while_loops_are_compiled(
    folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that needs the same loops compiles them itself."""
    use_compiled(monkeypatch, True)
    expected = Bits(first_call(folder, monkeypatch))
    points = Faults(0)
    with handled(points, lambda: None):
        first_call(folder, monkeypatch)
    for number in sorted(rng.integers(1, points.count, 4).tolist()):
        nested: list[Bits] = []

        def handler(nested: list[Bits] = nested) -> None:
            nested.append(Bits(call()))

        with ending(), handled(Faults(number), handler):
            result = first_call(folder, monkeypatch)
        assert [Bits(result), *nested] == [expected] * 2, number


# Without compiled loops


STATE = "import numpy; from cupynorm import cpu; print(cpu.compiled, cpu.without_llvmlite if not cpu.compiled else '')"


@pytest.mark.long
def test_turned_off() -> None:
    assert said(STATE, CUPYNORM_COMPILED="0") == "False CUPYNORM_COMPILED=0"


@pytest.mark.long
def test_without_llvmlite() -> None:
    hidden = "import sys; sys.modules['llvmlite'] = None; "
    assert said(hidden + STATE).startswith("False import of llvmlite halted")
    said("import sys, cupynorm; assert 'llvmlite' not in sys.modules")  # the import stays light


#: Uses the package, and says what it computes with.
CALL = """
import numpy as np, cupynorm as cn
from cupynorm import cpu, info
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
print(cpu.compiled, cn.instance_norm(x).std().round(3), cn.instance_norm(x[:, :, ::-1]).std().round(3))
print(cpu.without_llvmlite)
print(info.report())
"""


def check_numpy_alone(said_: str, why: str) -> None:
    first, reason, *report = said_.splitlines()
    assert first == "False 1.0 1.0"
    assert reason == why
    assert f"compiled loops: no ({why})" in "\n".join(report)
    assert any(line.split() == ["loop", "cache", "no", "compiled", "loops"] for line in report)


@pytest.mark.long
@pytest.mark.parametrize("how", ["SystemError('initialization failed')", "AttributeError('no _ARRAY_API')"])
def test_broken_llvmlite(tmp_path: Path, how: str) -> None:
    """In whatever way: calls are computed by NumPy then, and `info` says why."""
    (tmp_path / "llvmlite").mkdir()
    (tmp_path / "llvmlite" / "__init__.py").write_text(f"raise {how}\n", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {CALL}"
    check_numpy_alone(said(code), how.split("'")[1])


@compiled
@pytest.mark.parametrize("version", ["0.44.1", "0.9.0", "0.40.0rc1+3.gabc"])
def test_llvmlite_that_is_too_old(version: str) -> None:
    code = f"import llvmlite; llvmlite.__version__ = {version!r}\n{CALL}"
    check_numpy_alone(said(code), f"llvmlite {version} is too old; needed is 0.45")


@compiled
@pytest.mark.parametrize("version", ["0.45.0", "0.51.0rc1", "1.0.0", "0.100.2+3.gabc"])
def test_llvmlite_that_is_new_enough(version: str) -> None:
    code = f"import llvmlite; llvmlite.__version__ = {version!r}\n{CALL}"
    assert said(code).splitlines()[0] == "True 1.0 1.0"


@compiled
def test_a_processor_that_llvm_does_not_know() -> None:
    code = f"""
from llvmlite import binding
def unknown():
    raise RuntimeError("no such target")
binding.initialize_native_target = unknown
{CALL}"""
    check_numpy_alone(said(code), "no such target")


@compiled
@pytest.mark.parametrize(
    "module", ["llvmlite", "llvmlite.ir.builder", "llvmlite.binding.ffi", "llvmlite.binding.targets"]
)
def test_an_interrupt_while_llvmlite_is_imported(module: str) -> None:
    """Later calls compile as if it had not been."""
    code = f"""
import signal, sys, numpy as np, cupynorm as cn
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
pressed = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
x = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
try:
    cn.instance_norm(x)
except KeyboardInterrupt:
    print("interrupted")
from cupynorm import cpu
print(cpu.compiled, cn.instance_norm(x).std().round(3))
"""
    assert said(code) == "interrupted\nTrue 1.0"
