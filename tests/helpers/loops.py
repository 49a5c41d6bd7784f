"""The modules of the compiled loops; without llvmlite, stand-ins that tests can patch all the same.

And calls of single steps: `run_step` packs a call's numbers, and `Cut` says how planes are cut.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from cupynorm import cpu, functional
from cupynorm.cpu import numpy_path
from cupynorm.cpu.blocking import Arrays


class _Absent:
    def __getattr__(self, name: str) -> MagicMock:
        return MagicMock()


def _module(name: str) -> Any:
    return _Absent() if cpu.llvmlite is None else importlib.import_module(f"cupynorm.cpu.{name}")


llvm = _module("llvm")
llvm_machine = _module("llvm_machine")
loops_across = _module("loops_across")
loops_activations = _module("loops_activations")
loops_backward = _module("loops_backward")
loops_forward = _module("loops_forward")
loops_moves = _module("loops_moves")
loops_path = _module("loops_path")
loops_places = _module("loops_places")
loops_rehearsal = _module("loops_rehearsal")
loops_short = _module("loops_short")
loops_tasks = _module("loops_tasks")
windows = _module("windows")


class Cut:
    """How the loops find the elements of planes, as a Layout has it, for steps that are called by themselves.

    Args:
        channels, runs, length: of a sample, of a plane, of a run.
        tile_runs, tile_length: of a tile; by default all of a plane.
        group: channels of a block.
        sums: where the partial sums begin.
        steps: strides over samples, channels and positions, of each of blocking.Arrays or of all alike.
        table: offsets of the runs of each array, or of all alike.
    """

    def __init__(
        self, channels: int, runs: int, length: int, steps: Any, table: Any = (0,), *, tile_runs: int = 0,
        tile_length: int = 0, group: int = 1, sums: int = 0,
    ):  # fmt: skip
        number = len(Arrays._fields)
        steps = np.broadcast_to(np.array(steps), (number, 3))
        self.table = np.ascontiguousarray(np.broadcast_to(np.array(table, np.int64), (number, runs)))
        self.group, self.runs, self.length = group, runs, length
        self.tile_runs, self.tile_length = tile_runs or runs, tile_length or length
        #: The ranges of a tile's runs and of its positions in a run.
        self.bounds = [
            (r, min(r + self.tile_runs, runs), at, min(at + self.tile_length, length))
            for r in range(0, runs, self.tile_runs) for at in range(0, length, self.tile_length)
        ]  # fmt: skip
        self.counts = np.array([(r1 - r0) * (l1 - l0) for r0, r1, l0, l1 in self.bounds])
        self.tiles = len(self.bounds)
        numbers = {
            "channels": channels, "group": group, "tiles": self.tiles, "runs": runs, "length": length,
            "tile_runs": self.tile_runs, "tile_length": self.tile_length, "plane": runs * length, "sums": sums,
            "run_table": self.table.ctypes.data, "counts": self.counts.ctypes.data,
        }  # fmt: skip
        numbers |= {
            f"{array}_{axis}": step for array, of in zip(Arrays._fields, steps.tolist(), strict=True)
            for axis, step in zip("ncp", of, strict=True)
        }  # fmt: skip
        self.geometry = np.array([numbers[name] for name in loops_places.GEOMETRY], np.int64)
        self.geometry_address = self.geometry.ctypes.data


def run_step(
    address: int, cut: Any, arrays: Arrays, first: int, last: int, *, follows: int = 0, **numbers: Any
) -> None:
    """Call a step on the items first … last - 1 of a call.

    cut: a Cut or a Layout. arrays: contiguous memory, or views; x stands for absent ones. numbers: of CALL and OPTIONS,
    and rstd and mean_lo; an array means its place. What is not given is 0, but count_ratio is 1; weight and bias are
    by default the same for all planes, in float32: 1 and 0.
    """
    partials = numbers.get("partials")
    given = {
        **{name: loops_path.NOWHERE if kind == "a" else 0 for name, kind in loops_places.CALL.items()},
        **dict.fromkeys(loops_places.OPTIONS, 0),
        "geometry": cut.geometry_address, "weight": np.ones(1, np.float32), "bias": np.zeros(1, np.float32),
        "count_ratio": 1.0, **{name: arrays.x if a is None else a for name, a in arrays._asdict().items()},
        **({} if partials is None else {"spread": partials.shape[1]}), **numbers,
    }  # fmt: skip
    for name in ("rstd", "mean_lo"):  # anywhere, not behind the means
        if name in given:
            given[f"{name}_at"] = loops_path.address_of(given.pop(name)) - loops_path.address_of(given["mean"])
    options = loops_places.OPTIONS_FORMAT.pack(*(given.pop(name) for name in loops_places.OPTIONS))
    given["options"] = ctypes.cast(options, ctypes.c_void_p).value
    assert set(given) == set(loops_places.CALL)
    values = [loops_path.place_of(a) if isinstance(a, np.ndarray) else a for a in given.values()]
    llvm_machine.Step(address)(loops_places.FORMAT.pack(*values), first, last, follows)


def python_step(function: Callable[..., Any]) -> tuple[int, Any]:
    """Return the address of a step that is a Python function of (call, first, last, follows), and what keeps it."""
    kinds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
    step = ctypes.CFUNCTYPE(None, *kinds)(lambda *given: function(*given) and None)
    return ctypes.cast(step, ctypes.c_void_p).value or 0, step


def emitted(write: Callable[[Any], None], names: Sequence[str]) -> list[int]:
    """Return the addresses of a module's functions, compiled anew, outside all caches."""
    engine = llvm_machine._load(llvm_machine.emit(write))
    llvm_machine._engines.append(engine)
    return [engine.get_function_address(name) for name in names]


def forget_modules(patch: pytest.MonkeyPatch) -> None:
    """Forget all compiled modules and all layouts until the patch is undone: each is asked for again."""
    for name in ("module_of", "steps_of"):
        patch.setattr(loops_path, name, cache(getattr(loops_path, name).__wrapped__))
    patch.setattr(loops_rehearsal, "module_of", loops_path.module_of)
    patch.setattr(loops_moves, "_addresses", {})
    patch.setattr(loops_tasks, "_drivers", [])
    forget_layouts(patch)


def forget_layouts(patch: pytest.MonkeyPatch) -> None:
    """Make all layouts anew until the patch is undone, since constants have changed."""
    patch.setattr(functional, "_known", {})
    patch.setattr(loops_path, "_layout", lru_cache(loops_path.Layout))
    patch.setattr(loops_path, "_large_layout", lru_cache(loops_path.Layout))


def let_threads_pay(patch: pytest.MonkeyPatch) -> None:
    """Let threads take part in every call until the patch is undone."""
    patch.setattr(numpy_path.NumpyWork, "pays", 1)
    patch.setattr(loops_path, "PAYS", 1)
    forget_layouts(patch)
