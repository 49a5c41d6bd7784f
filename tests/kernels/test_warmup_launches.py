"""What `warmup` launches for CuPy arrays: every kernel of the calls that it is to prepare, recorded on NumPy arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.cases import BLOCKS
from helpers.recorder import Recorder

import cupynorm as cn
from cupynorm import warm

Launched = set[tuple[Any, str]]


@pytest.fixture
def runtime(run_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ones=np.ones, zeros_like=np.zeros_like))
    found: Recorder = run_on(Recorder(BLOCKS))
    return found


def warmed(
    runtime: Recorder, x: np.ndarray, double_backward: bool = False, parts: bool = False, **given: Any
) -> Launched:
    epilogue = {"activation": None, "negative_slope": 0.01, "residual": None, "mask": None, "ddof": 0.0}
    epilogue |= {"eps_mode": "variance", **given}
    for _, step in warm._calls(x, np.dtype(np.float32), epilogue, double_backward, parts):
        step()
    found = runtime.launched()
    runtime.clear()
    return found


def used(x: np.ndarray, double_backward: bool, parts: bool, **given: Any) -> None:
    """Make the calls of a user who has warmed up."""
    ones = np.ones(x.shape[1], np.float32)
    running = {"running_mean": ones.copy(), "running_var": ones.copy()}
    several = x[0, 0].size > 1
    for weight in (None, ones):
        for training in (True, False) if several else (False,):
            y, saved = cn.instance_norm_forward(
                x, weight, weight, use_input_stats=training, dtype="float32", **running, **given
            )
            if x.dtype.kind == "f":
                cn.instance_norm_backward(y, saved)
                if double_backward:
                    cn.instance_norm_double_backward(x, weight, weight, y, saved)
        if parts:
            moments = cn.moments(x, mask=given.get("mask"))
            y, saved = cn.instance_norm_forward(x, weight, weight, moments=moments, dtype="float32", **running, **given)
            if x.dtype.kind == "f":
                cn.instance_norm_backward(y, saved, sums=cn.gradient_sums(y, saved))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 200, 200), (2, 3, 1, 1)], ids=str)
def test_warmup_launches_every_kernel_of_later_calls_and_no_other(
    runtime: Recorder, shape: tuple[int, ...], dtype: str, double_backward: bool, parts: bool
) -> None:
    x = np.zeros(shape, dtype)
    parts = parts and x[0, 0].size > 1
    prepared = warmed(runtime, x, double_backward, parts)
    used(x, double_backward, parts)
    assert prepared == runtime.launched()
    assert any("double" in name for _, name in prepared) == (double_backward and dtype == "float32")


def test_warmup_launches_the_epilogues_and_masks_of_later_calls(runtime: Recorder) -> None:
    x, mask = np.zeros((2, 3, 20, 30), np.float32), np.ones((20, 30), bool)
    for given in ({"activation": "silu"}, {"residual": x}, {"mask": mask}, {"mask": mask, "activation": "relu"}):
        prepared = warmed(runtime, x, parts=True, **given)
        used(x, False, True, **given)
        assert prepared == runtime.launched(), given
        runtime.clear()
