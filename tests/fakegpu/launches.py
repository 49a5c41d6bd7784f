"""Run kernels: those of cupynorm's sources on the emulator (tests/emulator), CuPy's own in NumPy (stand_ins.py).

The device calls `_run` for every launch that passed its checks. An unknown kernel is an error that names it.
"""

from __future__ import annotations

import ctypes
import os
import re
import traceback
from functools import cache
from typing import Any

import numpy as np

from . import control, stand_ins
from .control import DeviceError, Launch

#: The source text of each loaded module, by its handle.
_sources: dict[int, str] = {}


def install() -> None:
    """Set this module as the device's launch hook, and note the source of every module that CuPy loads."""
    from cupy.cuda import compiler

    load = compiler._compile_module_with_cache

    def load_and_note(source: str, *args: Any, **options: Any) -> Any:
        module = load(source, *args, **options)
        _sources[module.ptr] = source
        return module

    compiler._compile_module_with_cache = load_and_note
    control.library.fakegpu_hook(_run)
    if os.environ.get("FAKEGPU_PTX"):
        compile_ = compiler._NVRTCProgram.compile

        def compile_to_ptx(program: Any, options: Any = (), log_stream: Any = None) -> Any:
            program.method = "ptx"
            virtual = [option.replace("=sm_", "=compute_") for option in options]
            return compile_(program, (*virtual, "--Ofast-compile=max"), log_stream)

        compiler._NVRTCProgram.compile = compile_to_ptx


@control.HOOK
def _run(pointer: Any) -> int:
    launch = pointer.contents
    name = control.library.fakegpu_name(launch.kernel).decode()
    module = control.library.fakegpu_module(launch.kernel)
    source = _sources.get(module)
    try:
        if source is None:
            raise DeviceError(801, "its module was not compiled by CuPy from a source text")
        if re.search(r"\bKERNEL\(", source):
            _emulate(launch, name, source, control.kernels_of(module))
        elif re.search(rf"\b{name}\([^)]*[*<][^)]*\)", source):
            stand_ins.run(launch, name, source)
        # A kernel without pointers changes nothing: it waits, or shows that it can be launched.
        return 0
    except DeviceError as error:
        code, why = error.code, str(error)
    except Exception:
        code, why = 719, traceback.format_exc(limit=-3)
    return control.library.fakegpu_refuse(code, (why if name in why else f"{name}: {why}").encode())


@cache
def _modules() -> dict[str, Any]:
    """Return cupynorm's modules by their source texts, so that the emulator's builds of them are reused."""
    from cupynorm.cuda.source import all_modules

    return {module.source: module for module in all_modules()}


@cache
def _emulator() -> Any:
    from emulator import runtime as emulator

    return emulator.Emulator()


@cache
def _built(name: str, source: str, kernels: tuple[str, ...]) -> tuple[Any, Any, str]:
    """Return a kernel's module, and from the emulator's build the function that runs it and its parameters' kinds."""
    from emulator import runtime as emulator

    module = _modules().get(source)
    if module is None:  # a forced variant, or a test's kernel
        leading = re.match(r"(?:(?:#(?!line)|\[\[maybe_unused).*\n)*", source)
        module = emulator.Text("text", source, kernels, constants=leading[0] if leading else "")
    library = emulator.build(module)
    kinds = getattr(library, f"simt_kinds_{name}")
    kinds.restype = ctypes.c_char_p
    return module, getattr(library, f"simt_run_{name}"), kinds().decode()


def _emulate(launch: Launch, name: str, source: str, kernels: tuple[str, ...]) -> None:
    from emulator import runtime as emulator
    from helpers import offsets

    from cupynorm.cuda.arguments import STRUCTS
    from cupynorm.cuda.plan import Step

    if launch.grid[2] != 1 or launch.block[1] * launch.block[2] != 1:
        raise DeviceError(801, "the emulator supports grids of at most two dimensions and blocks of one")
    module, run, kinds = _built(name, source, kernels)
    given = control.arguments_of(launch)
    if len(given) != len(kinds):
        raise DeviceError(719, f"the cubin has {len(given)} parameters, the emulator's build {len(kinds)}")
    kernel = offsets.kernel_of(name)  # the kernels of tests have numbers as parameters
    types = [STRUCTS[kernel] if kind == "V" else kind + str(len(raw)) for kind, raw in zip(kinds, given, strict=True)]
    values = [np.frombuffer(raw, type_).reshape(()).copy() for type_, raw in zip(types, given, strict=True)]
    ends: dict[int, tuple[int, int]] = {}  # start and end of each address's allocation
    for words, indices in map(emulator.pointers, values):
        for i in indices:
            at, *around = control.find(int(words[i]), launch.device)
            words[i] = at
            ends[at] = tuple(around)
    step = Step(
        "", kernel, name, (launch.grid[0], launch.grid[1]), launch.block[0], launch.shared, cluster=launch.cluster[0],
        cooperative=bool(launch.cooperative),
    )  # fmt: skip
    ranges = (emulator._Range * len(ends))(*(emulator._Range(*around) for around in ends.values()))
    machine = _emulator()
    try:
        with emulator._running:
            machine._launch(run, module, step, values, list(ends), ranges)
            machine.counts.clear()
    except emulator.SimtError as error:
        code = 700 if "outside of every array" in str(error) else 716 if "not aligned" in str(error) else 719
        raise DeviceError(code, str(error)) from None
