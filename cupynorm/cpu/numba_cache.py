"""Compile the CPU backend's loops with numba and cache them on disk.

Numba invalidates cached code only if the file of the function changes. The loops are built from several files, by
particular versions of numba and LLVM, with settings from the environment: the cache key covers all of these.
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
except ImportError:  # this numba version has them elsewhere: no disk cache
    FunctionCache = IndexDataCacheFile = object  # type: ignore[assignment,misc]

_config: Any = numba.config
if _config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT turns numba's compiler off")
if _config.BOUNDSCHECK:
    raise ImportError("NUMBA_BOUNDSCHECK makes numba reject the addresses that the loops compute")

#: Files of the package that the compiled code is built from.
SOURCES = (
    "gelu.py", "numba_activations.py", "numba_backward.py", "numba_cache.py", "numba_forward.py", "numba_geometry.py",
    "numba_intrinsics.py", "numba_moves.py", "numba_tasks.py",
)  # fmt: skip

#: Numba settings that change the code. Numba itself checks the processor's name and features.
SETTINGS = (
    "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "DISABLE_INTEL_SVML", "EXTEND_VARIABLE_LIFETIMES", "LLVM_REFPRUNE_FLAGS",
    "LLVM_REFPRUNE_PASS", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE",
)  # fmt: skip

#: Options of functions that only compiled code calls: a wrapper for Python takes a sixth more time to compile.
INTERNAL: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
INLINE: Any = {"forceinline": True, **INTERNAL}  # a call inside a loop prevents vectorisation


@cache
def _stamp() -> str:
    """Return a hash of all sources and versions. Cached code with another stamp is overwritten."""
    made = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {np.__version__}".encode())
    for name in SOURCES:
        text = pkgutil.get_data(__package__, name)
        if text is None:
            raise OSError(f"{name} cannot be read")
        made.update(hashlib.sha256(text).digest())
    return made.hexdigest()


class _Files(IndexDataCacheFile):
    """An index and one file per signature. Each file states its own key, as several processes may write at once."""

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (self._source_stamp, key, data))

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except OSError:
            raise
        except Exception:  # a broken index may raise anything; it is rewritten
            return {}

    def load(self, key: Any) -> Any:
        stamp, kind, data = super().load(key) or (None, None, None)
        return data if (stamp, kind) == (self._source_stamp, key) else None


class Cache(FunctionCache):
    """Numba's disk cache of a function. Calls go on without it if its files cannot be read or written.

    Raises:
        RuntimeError, OSError: no folder is writable, or the package's files cannot be read.
        Exception: the internals of this numba version differ.
    """

    def __init__(self, function: Any):
        super().__init__(function)
        known = hasattr(FunctionCache, "_index_key") and hasattr(IndexDataCacheFile, "load")
        if not known or type(self._cache_file) is not IndexDataCacheFile:
            raise NotImplementedError(f"numba {numba.__version__} caches code in another way")
        # Omit the function's line number: edits and upgrades change it, and old files would accumulate.
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
    """Compile the function inline into its callers."""
    return numba.njit(function, error_model="numpy", **INLINE)


def rare(function: Any) -> Any:
    """Compile the function once, outside its callers: they rarely call it."""
    return numba.njit(function, error_model="numpy", inline="never", **INTERNAL)


def disk_cached(function: Any, **options: Any) -> Any:
    """Compile the function for each signature at its first call, and cache it on disk if possible."""
    made = numba.njit(function, error_model="numpy", **options)
    with suppress(Exception):  # without a cache, each process compiles again; `info` gives the reason
        made._cache = Cache(function)
    return made


def kernel(function: Any) -> Any:
    """Compile a loop that threads run side by side: disk_cached, without Python's lock."""
    return disk_cached(function, nogil=True)
