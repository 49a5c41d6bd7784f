"""Import Chainer 7.8.1, the last release, with today's NumPy and CuPy.

Chainer uses three names that NumPy 2 no longer has: `numpy.sctypes` and `numpy.float`, each in one file, and
`numpy.distutils`, in a check of the environment at import. That check also uses `pkg_resources`, which setuptools
removed in version 82, to warn of any CuPy later than 7. This module works around them:

- `numpy.sctypes` exists while Chainer is imported, and is removed afterwards; the two files keep references of their
  own to the missing names.
- The check is skipped: `chainer._environment_check` is an empty module with a `check()`.
- Without `pkg_resources`, Chainer's `gradient_check` and `testing` are imported right away with an empty module in its
  place, which is removed afterwards; `chainer.testing.with_requires` and `without_requires` do not work.
- The import's warnings are suppressed: deprecations, missing cuDNN (CuPy 14 no longer has it), and missing NCCL.

NumPy, CuPy and setuptools are unchanged afterwards. If Chainer has already been imported, by whatever means, nothing is
changed at all.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from typing import Any

import numpy

_MISSING = (
    "cupynorm.chainer needs Chainer: pip install 'setuptools>=77,<81' && "
    "pip install --no-build-isolation 'cupynorm[chainer]'"
)


class _Numpy:
    """NumPy, with names that it no longer has."""

    def __init__(self, **names: Any):
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


#: numpy.sctypes, as far as Chainer reads it.
_SCTYPES = {
    "int": [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
    "float": [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble],
}


def _import() -> Any:
    if "chainer" in sys.modules:
        return sys.modules["chainer"]
    if importlib.util.find_spec("chainer") is None:
        raise ModuleNotFoundError(_MISSING, name="chainer")
    check = types.ModuleType("chainer._environment_check", "An empty stand-in by cupynorm.chainer_import.")
    check.check = lambda: None  # type: ignore[attr-defined]
    lent: dict[str, types.ModuleType] = {}
    if importlib.util.find_spec("pkg_resources") is None:
        lent["pkg_resources"] = types.ModuleType("pkg_resources", "An empty stand-in by cupynorm.chainer_import.")
    old = not hasattr(numpy, "sctypes")
    sys.modules[check.__name__] = check
    sys.modules |= lent
    if old:
        numpy.sctypes = _SCTYPES  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # Invalid escapes in docstrings, reported when Python compiles the files.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # CuPy 14 has no cuDNN, and Chainer does not need NCCL.
            warnings.filterwarnings("ignore", "cuDNN is not enabled", UserWarning)
            warnings.filterwarnings("ignore", r"\s*nccl library could not be loaded", UserWarning)
            chainer = importlib.import_module("chainer")
            if lent:
                importlib.import_module("chainer.gradient_check")
    except BaseException:
        del sys.modules[check.__name__]
        raise
    finally:
        if old:
            del numpy.sctypes  # type: ignore[attr-defined]
        for name in lent:
            del sys.modules[name]
    if old:
        importlib.import_module("chainer.functions.array.as_strided").np = _Numpy(sctypes=_SCTYPES)  # type: ignore[attr-defined]
    if not hasattr(numpy, "float"):
        # Patch this function only: other code in its file compares its arrays' module with numpy.
        module = importlib.import_module("chainer.functions.array.resize_images")
        function = module.compute_indices_and_weights
        module.compute_indices_and_weights = types.FunctionType(  # type: ignore[attr-defined]
            function.__code__, {**function.__globals__, "numpy": _Numpy(float=float)}, function.__name__
        )
    return chainer


chainer = _import()
