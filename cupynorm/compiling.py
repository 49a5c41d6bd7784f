"""How numba compiles the CPU backend's loops, and how they are kept on disk.

Numba keeps what it compiles until the file changes that the function stands in. But the loops are made from several
files, by numba and LLVM of some version, with settings from the environment: all of these tell what may be used again.
"""

from __future__ import annotations

import hashlib
import pkgutil
from contextlib import suppress
from functools import cache
from typing import Any

import llvmlite
import numba
import numpy as np

try:
    from numba.core.caching import FunctionCache, IndexDataCacheFile
except ImportError:  # a numba that has them elsewhere: nothing is kept
    FunctionCache = IndexDataCacheFile = object  # type: ignore[assignment,misc]

_config: Any = numba.config
if _config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT turns numba's compiler off")
if _config.BOUNDSCHECK:
    raise ImportError("NUMBA_BOUNDSCHECK has numba refuse the addresses that the loops compute")

#: Files of the package that compiled code is made from.
SOURCES = ("compiling.py", "cpu.py", "moves.py", "scalars.py")

#: Of numba's settings those that change the code, besides processors' names and features, which numba looks at itself.
SETTINGS = (
    "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "DISABLE_INTEL_SVML", "EXTEND_VARIABLE_LIFETIMES", "LLVM_REFPRUNE_FLAGS",
    "LLVM_REFPRUNE_PASS", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE",
)  # fmt: skip

#: Of what compiled code alone calls: to compile a way in for Python takes a sixth more time.
INTERNAL: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
INLINE: Any = {"forceinline": True, **INTERNAL}  # a call left in a loop keeps it from becoming vector instructions


@cache
def _stamp() -> str:
    """What code must have been made from to be used again; where it differs, the old is overwritten."""
    made = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {np.__version__}".encode())
    for name in SOURCES:
        text = pkgutil.get_data(__package__, name)
        if text is None:
            raise OSError(f"{name} cannot be read")
        made.update(hashlib.sha256(text).digest())
    return made.hexdigest()


class _Files(IndexDataCacheFile):
    """An index, and a file for each kind of call, which says itself what it is: several processes may write them."""

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (self._source_stamp, key, data))

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except OSError:
            raise
        except Exception:  # it is broken, and may raise anything: it is written anew
            return {}

    def load(self, key: Any) -> Any:
        stamp, kind, data = super().load(key) or (None, None, None)
        return data if (stamp, kind) == (self._source_stamp, key) else None


class Cache(FunctionCache):
    """Numba's cache of a function, which calls do without where files cannot be read or written.

    Raises:
        RuntimeError, OSError: no folder can be written, or the package's files cannot be read.
        Exception: this numba is made in another way.
    """

    def __init__(self, function: Any):
        super().__init__(function)
        known = hasattr(FunctionCache, "_index_key") and hasattr(IndexDataCacheFile, "load")
        if not known or type(self._cache_file) is not IndexDataCacheFile:
            raise NotImplementedError(f"numba {numba.__version__} keeps code in another way")
        # Without the number of the function's line, which an edit or an upgrade moves: old files would pile up.
        name = self._impl.filename_base.replace(f"-{self._impl.locator.get_disambiguator()}.", ".")
        self._cache_file = _Files(self._cache_path, name, _stamp())

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        settings = tuple(repr(getattr(_config, name, None)) for name in SETTINGS)
        return (*super()._index_key(sig, codegen), settings)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(Exception):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)


def inlined(function: Any) -> Any:
    """The function compiled into those that call it."""
    return numba.njit(function, error_model="numpy", **INLINE)


def disk_cached(function: Any, **options: Any) -> Any:
    """The function compiled, for each kind of call when it is met first, and kept on disk where that can be."""
    made = numba.njit(function, error_model="numpy", **options)
    with suppress(Exception):  # compiled anew in each process; `info` says why
        made._cache = Cache(function)
    return made
