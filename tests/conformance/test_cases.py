"""The case table on every backend."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import cases
from helpers.backends import Backend, on, on_kernels

from cupynorm.cuda import plan
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import Device
from cupynorm.cuda.layout import ArrayDesc
from cupynorm.cuda.ops import Op


@pytest.mark.whole
@cases.tiers()
@pytest.mark.parametrize("case", cases.TABLE, ids=str)
def test_table(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)


@cases.tiers()
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_small(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)


@pytest.mark.whole
@on_kernels  # the CPU backend has no variants
@cases.tiers("forward", "backward")
@pytest.mark.parametrize("case", cases.variants(), ids=str)
def test_variant(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)


# On the CPU the double backward runs on NumPy alone, even if forward is compiled.
@on("numpy", "simt", "cupy")
@cases.tiers("double_backward")
@pytest.mark.parametrize("case", [case for case in cases.TABLE if case.activation is None], ids=str)
def test_double_backward(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check_double(backend, case, rng)


@on("numpy", "simt", "cupy")
@cases.tiers("double_backward")
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_double_small(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check_double(backend, case, rng)


@pytest.mark.whole
@on_kernels
@cases.tiers("double_backward")
@pytest.mark.parametrize("case", cases.variants(("double_backward",)), ids=str)
def test_double_variant(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check_double(backend, case, rng)


@pytest.mark.full
@pytest.mark.nightly(simt=lambda given: given["case"].activation is None)
@on_kernels
@pytest.mark.parametrize("case", cases.epilogue_variants(), ids=str)
def test_epilogue_variant(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)


@on_kernels
@pytest.mark.full(simt=lambda given: True)  # in float16, channels side by side
def test_more_tiles_than_merge_threads_of_a_channel(backend: Backend, rng: np.random.Generator) -> None:
    """In a grid whose blocks have 32 16-bit channels side by side, 16 threads merge the tiles of a channel."""
    case = cases.Case((1, 31, 40, 75), "float16", "channels_last", device=Device("many", (8, 0), 24, 72 * 1024, 2**20))
    backend.pretend(case.device)
    desc = ArrayDesc(case.shape, (2 * 31 * 3000, 2, 2 * 31 * 75, 2 * 31), 2, 0)
    ops: list[Op] = ["forward", "backward", "double_backward"]
    for op in ops:
        step = plan_for(op, desc, case.dtype, case.device)[0].steps[0]
        assert (step.cooperative, step.tiles > step.threads // step.channel_vecs) == (True, True)
    cases.check(backend, case, rng)
    cases.check_double(backend, case, rng)


@on_kernels
@pytest.mark.full(simt=lambda given: math.prod(given["shape"]) > 50_000)
@pytest.mark.nightly(simt=lambda given: math.prod(given["shape"]) > 10**6)
@pytest.mark.parametrize(("shape", "layout"), [
    ((3, 99, 5, 7), "contiguous"), ((3, 9, 35, 45), "contiguous"), ((1, 17, 100, 100), "contiguous"),
    ((1, 17, 110, 200), "contiguous"), ((1, 17, 250, 260), "contiguous"), ((17, 8, 5, 6), "channels_last"),
    ((17, 8, 38, 38), "channels_last"), ((1, 40, 100, 101), "channels_last"),
], ids=str)  # fmt: skip
def test_grids_of_two_dimensions(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], layout: str
) -> None:
    """No GPU has memory for more planes than a grid's first dimension can hold; here that dimension is shorter."""
    monkeypatch.setattr(plan, "MAX_GRID", 16)
    case = cases.Case(shape, "float32", layout, device=replace(cases.SMALL_DEVICE, name="narrow"))
    cases.check(backend, case, rng)
    cases.check_double(backend, case, rng)
