"""What the tests of the fake GPU share: where they run, and the error codes of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakegpu import build, control


def _why_not() -> str:
    if control.active():
        return ""
    try:
        build.versions()
    except build.MissingError as error:
        return str(error)
    return (
        "runs on the fake GPU: python tests/fakegpu/run.py python -m pytest -m fakegpu tests/kernels/test_fakegpu*.py"
    )


#: Marks the tests of a file.
on_fake_gpu = [
    pytest.mark.fakegpu,
    pytest.mark.skipif(not control.active(), reason=_why_not()),
    pytest.mark.usefixtures("fake_gpu_as_usual"),
]

if control.active():
    import cupy as cp
    from cupy_backends.cuda.api import driver


def code_of(call: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Return the error code of a call, 0 if it succeeds."""
    try:
        call(*args, **options)
    except (driver.CUDADriverError, cp.cuda.runtime.CUDARuntimeError) as error:
        return int(error.status)
    return 0
