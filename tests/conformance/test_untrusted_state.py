"""A state that holds an object or a pickle is refused without opening it, and the package unpickles nothing."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_equal

import cupynorm as cn


class Evil:
    """An object that records every call of its methods."""

    traces: list[str] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return (Evil.traces.append, ("unpickled",))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array") or name in ("__buffer__", "__dlpack__", "shape", "dtype", "detach"):
            Evil.traces.append(name)
        raise AttributeError(name)

    def _trace(name: str) -> Any:  # noqa: N805
        def method(self: Any, *_: Any, **__: Any) -> Any:
            Evil.traces.append(name)
            return 1

        return method

    for _name in ("__float__", "__int__", "__index__", "__len__", "__getitem__", "__iter__", "__array__", "__complex__",
                  "__bool__", "__eq__", "astype", "copy"):  # fmt: skip
        locals()[_name] = _trace(_name)
    __hash__ = object.__hash__


def _objects() -> np.ndarray:
    array = np.ones(3, object)
    array[1] = Evil()
    return array


def _records() -> np.ndarray:
    return np.zeros(3, [("a", np.float32)])


@pytest.mark.parametrize("make", [
    Evil,
    lambda: [1.0, Evil(), 2.0],
    _objects,
    lambda: pickle.dumps(Evil()),
    lambda: bytearray(pickle.dumps(Evil())),
    lambda: np.frombuffer(pickle.dumps([Evil()] * 3)[:3], "S1"),
    lambda: np.array(["1", "2", "3"]),
    lambda: ["1", "2", "3"],
    lambda: np.array([1, 2, 3], complex),
    lambda: np.array([1, 2, 3], "m8[s]"),
    lambda: np.ma.masked_array([1.0, 2.0, 3.0], [0, 1, 0]),
    _records,
    lambda: {0: 1.0, 1: 1.0, 2: 1.0},
    lambda: memoryview(np.ones(3)),
    lambda: None,
])  # fmt: skip
@pytest.mark.parametrize("name", ["weight", "running_var"])
@pytest.mark.parametrize("strict", [True, False])
def test_non_numeric_state_is_refused_unopened(make: Callable[[], Any], name: str, strict: bool) -> None:
    """A state that contains an object or a pickle is refused without a call of any of the object's methods."""
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cpu")
    before = layer.state_dict()
    state = {key: array + 1 for key, array in before.items()}
    value = make()
    Evil.traces.clear()
    with pytest.raises(TypeError, match=name):
        layer.load_state_dict({**state, name: value}, strict=strict)
    with pytest.raises(TypeError, match="data"):
        layer.weight.data = value
    assert not Evil.traces
    for key, array in layer.state_dict().items():
        assert_equal(array, before[key])


def test_pickle_in_a_file_is_not_opened(tmp_path: Path) -> None:
    """Files loaded as docs/guide/security.md says: NumPy refuses to unpickle, so no code in the file runs."""
    path = tmp_path / "state.npz"
    np.savez(path, weight=_objects(), bias=np.zeros(3))
    Evil.traces.clear()
    layer = cn.InstanceNorm2d(3, affine=True, device="cpu")
    with np.load(path) as state, pytest.raises(ValueError, match="allow_pickle=False"):
        layer.load_state_dict(state)
    assert not Evil.traces
    np.savez(path, **{key: array + 1 for key, array in layer.state_dict().items()})
    with np.load(path) as state:
        layer.load_state_dict(state)
    assert layer.weight.data.tolist() == [2, 2, 2]


@pytest.mark.long
def test_package_never_unpickles_or_evaluates() -> None:
    """No source imports or calls anything that would."""
    modules = {"pickle", "marshal", "shelve", "dill", "joblib", "code", "runpy"}
    for path in Path(cn.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not modules & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in modules, path
            elif isinstance(node, ast.Call):
                named = isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile", "__import__")
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                # An object of this package may load a module of a runtime, or a number in compiled code.
                of_others = isinstance(node.func, ast.Attribute) and root_of(node.func) in imported
                loads = method in ("loads", "fromfile") or (method == "load" and of_others)
                assert not named and not loads, f"{path}, line {node.lineno}"


def root_of(node: ast.expr) -> str:
    """Return the first name of an expression such as a.b(c).d, or an empty string."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
