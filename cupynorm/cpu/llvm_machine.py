"""Compile modules of `llvm` for this processor, load them, and keep their code on disk.

A file of the cache holds the machine code of one module. Its name says what the module is for, and on which processor.
Code of other versions of llvmlite, LLVM, NumPy, or of the package's files that write the modules, is overwritten.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pkgutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numpy as np
from llvmlite import binding

from .. import config
from .llvm import Module

#: Files of the package that write the modules.
SOURCES = (
    "gelu.py", "llvm.py", "llvm_machine.py", "loops_across.py", "loops_activations.py", "loops_backward.py",
    "loops_forward.py", "loops_moves.py", "loops_places.py", "loops_short.py", "loops_tasks.py",
)  # fmt: skip
#: The least version whose LLVM has what `llvm` writes.
LEAST_VERSION = (0, 45)

#: Held while compiling; forks wait for it.
lock = threading.RLock()
_engines: list[Any] = []  # they own the code


class Target(NamedTuple):
    """What code is made for."""

    triple: str
    cpu: str
    features: str
    data_layout: str

    def machine(self) -> Any:
        """Return a new target machine. An engine takes possession of its own."""
        return binding.Target.from_triple(self.triple).create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
        )


@cache
def _target() -> Target:
    """Return the target for this processor. ImportError: there is none, or llvmlite is too old."""
    if sys.implementation.name != "cpython":
        raise ImportError(f"{sys.implementation.name} keeps arrays in another way than CPython")
    version = tuple(int(part) for part in llvmlite.__version__.split("+")[0].split(".")[:2])
    if version < LEAST_VERSION:
        raise ImportError(f"llvmlite {llvmlite.__version__} is too old; needed is {'.'.join(map(str, LEAST_VERSION))}")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    found = Target(
        binding.get_process_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), ""
    )
    return found._replace(data_layout=str(found.machine().target_data))


def processor() -> str:
    """Return the name of this processor as LLVM has it."""
    return _target().cpu


@cache
def converts_halves() -> bool:
    """Return whether the processor is known to have instructions that convert float16."""
    target = _target()
    return target.triple.startswith(("aarch64", "arm64")) or "+f16c" in target.features.split(",")


@cache
def _stamp() -> bytes:
    """Return a hash of all that the code of a module depends on, but for what its file's name says."""
    # NumPy computes the polynomial in gelu.py.
    made = hashlib.sha256(f"{llvmlite.__version__} {binding.llvm_version_info} {np.__version__}".encode())
    for name in SOURCES:
        text = pkgutil.get_data(__package__, name)
        if text is None:
            raise OSError(f"{name} cannot be read")
        made.update(hashlib.sha256(text).digest())
    return made.digest()


def folder() -> Path:
    """Return the folder of the cache. OSError: the user has none."""
    try:
        return Path(config.cache_folder.get()).expanduser()
    except RuntimeError as error:  # no home
        raise OSError(str(error)) from None


def not_kept() -> str:
    """Return why code cannot be kept on disk; "" if it can."""
    try:
        _stamp()
        _keep(folder() / f"probe-{os.getpid()}", b"").unlink()
    except OSError as error:
        return str(error)
    return ""


def _file_of(kind: str) -> Path:
    """Return the file of a module. Its name includes the processor's features: several machines may share a folder."""
    target = _target()
    digest = hashlib.sha256(f"{kind} {target.triple} {target.cpu} {target.features}".encode()).hexdigest()
    return folder() / f"{kind.split(maxsplit=1)[0]}-{digest[:32]}.bin"


def _seal(code: bytes) -> bytes:
    """Return what precedes code in its file: it shows that the file is whole, and not old."""
    return hashlib.sha256(_stamp() + code).digest()


def _kept(file: Path) -> bytes | None:
    """Return the code in a file of the cache; None without one, if it is of no use, or if others could write it."""
    with suppress(OSError), file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        if hasattr(os, "geteuid") and (status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022):
            return None
        content = opened.read()
        if content[:32] == _seal(content[32:]):
            return content[32:]
    return None


def _keep(file: Path, code: bytes) -> Path:
    """Write a file of the cache, so that other processes see all of it or nothing."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as made:
            made.write(_seal(code) + code)
        return Path(name).replace(file)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def emit(write: Callable[[Module], None]) -> bytes:
    """Return the machine code of the module that `write` fills."""
    target = _target()
    machine, made = target.machine(), Module()
    write(made)
    made.module.triple, made.module.data_layout = target.triple, target.data_layout
    module = binding.parse_assembly(str(made.module))
    # Loops are written with vectors: LLVM need not look for any.
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


def _load(code: bytes) -> Any:
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target().machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def compiled(kind: str, write: Callable[[Module], None], names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the addresses of a module's functions of these names.

    kind: what the module is for. The same kind must always mean the same code; its first word names the file.
    """
    with lock:
        code = file = None
        with suppress(OSError):  # the package's files cannot be read: no cache
            file = _file_of(kind)
            code = _kept(file)
        if code is None:
            code = emit(write)
            if file is not None:
                with suppress(OSError):
                    _keep(file, code)
        engine = _load(code)
        _engines.append(engine)
        return tuple(engine.get_function_address(name) for name in names)


#: A step of a call: (call, first item, last item, and what loops_tasks._whole tells it).
Step = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)

_target()  # so that the import fails where nothing can be compiled
with suppress(OSError):
    _stamp()  # of the files that are being imported: they may change before the first call
