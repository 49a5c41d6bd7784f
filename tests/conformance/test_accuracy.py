"""Accuracy: the bench's table holds for cupynorm, and so do the methods behind it, in every layout and partition."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cases, reference
from helpers.backends import LAUNCHED, Backend, on_kernels
from helpers.compare import assert_allclose, assert_same, assert_within, wide
from helpers.pairwise import pairwise

import cupynorm as cn
from bench import __main__ as bench
from bench.commands import accuracy
from cupynorm import cpu, devices
from cupynorm.cuda.device import Device


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "NumPy",
        pytest.param("compiled", marks=pytest.mark.compiled),
        pytest.param("emulated", marks=[pytest.mark.simt, pytest.mark.full]),
        pytest.param("CUDA", marks=pytest.mark.gpu),
    ],
)
def test_every_row_holds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "compiled" and cpu.llvmlite is None:
        pytest.skip(f"no compiled loops: {cpu.without_llvmlite}")
    status = bench.main(["accuracy", "--quick", "--only", name, "--json", str(tmp_path / "a.json")])
    assert status == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    rows = accuracy.rows(quick=True)
    assert [row["row"] for row in result["rows"]] == [row.name for row in rows]
    for row in result["rows"]:
        assert set(row["roundings"][name]) == {*accuracy.ELEMENTS, "dweight", "dbias"}
    assert accuracy.markdown(result).count("\n") == len(rows) + 1


def test_wrong_result_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The check itself: a result off by 16 roundings at one place, a result with NaN there, and no result at all."""
    right = accuracy._ours

    def off(by: float) -> Any:
        def ours(arrays: Any, compiled: bool) -> dict[str, Any]:
            answer = right(arrays, compiled)
            y = answer["y"].reshape(-1)
            place = int(np.abs(y.astype(np.float64)).argmax())
            y[place] = y[place].astype(np.float64) * by if np.isfinite(by) else by
            return answer

        return ours

    one = [row for row in accuracy.rows(quick=True) if row.name == "N(100, 1)" and row.dtype == "float32"]
    monkeypatch.setattr(accuracy, "rows", lambda quick: one)
    for by, expected in ((1.0, 0), (1 + 32 * 2.0**-24, 1), (float("nan"), 1)):
        monkeypatch.setattr(accuracy, "_ours", off(by))
        assert accuracy.main(["--quick", "--only", "NumPy"]) == expected
    assert "NumPy not finite" in capsys.readouterr().out

    def fails(arrays: Any, compiled: bool) -> dict[str, Any]:
        raise MemoryError("none left")

    monkeypatch.setattr(accuracy, "_ours", fails)
    assert accuracy.main(["--only", "NumPy"]) == 1
    assert "MemoryError: none left" in capsys.readouterr().out


def test_exact_results_match_the_reference(rng: np.random.Generator) -> None:
    given = accuracy.Given(np, accuracy.Hard("", accuracy._normal(3), shape=(2, 3, 5, 7)))
    exact = accuracy.answers(given)
    y = reference.forward(given.host_x)
    dx, dweight, dbias, _ = reference.backward(given.host_dy, given.host_x)
    for name, value in (("y", y), ("dx", dx), ("dweight", dweight), ("dbias", dbias)):
        assert_allclose(exact[name].exact.ravel(), value.ravel(), rtol=1e-14, atol=1e-16)


def check_some_planes_out_of_range(
    backend: Backend, rng: np.random.Generator, scale: float, shape: tuple[int, ...], laid: Callable[..., Any]
) -> None:
    """Scale some planes: all results are right, and the bits of the other planes do not change."""
    values = rng.standard_normal(shape).astype(np.float32)
    ordinary, x = laid(values), laid(values)
    odd = rng.random(shape[:2]) < 0.5
    odd.flat[0], odd.flat[1] = True, False
    x[odd] *= np.float32(scale)
    dy = rng.standard_normal(shape).astype(np.float32)
    ones, zeros = (backend.array(np.full(shape[1], v, np.float32)) for v in (1, 0))
    results = []
    for given in (x, ordinary):
        moved = ones.copy()
        y, saved = cn.instance_norm_forward(
            backend.array(given), ones, zeros, eps=0.0, running_mean=zeros.copy(), running_var=moved
        )
        variance = reference.wide(given).var(tuple(range(2, len(shape))), ddof=1).mean(0)
        with np.errstate(over="ignore"):
            assert_allclose(backend.host(moved), (0.9 + variance / 10).astype(np.float32), rtol=1e-5)
        dx, _, _ = cn.instance_norm_backward(backend.array(dy), saved)
        assert np.isfinite(backend.host(saved.rstd)).all()
        results.append([backend.host(v) for v in (y, dx)])
    exact = reference.forward(x, eps=0.0), reference.backward(dy, x, eps=0.0)[0]
    axes = tuple(range(2, len(shape)))

    def size(values: np.ndarray) -> np.ndarray:
        """Size of each element plus that of its plane."""
        return np.abs(values) + np.sqrt((values**2).mean(axes, keepdims=True))

    terms = 0, size(dy) / np.sqrt(reference.wide(x).var(axes, keepdims=True))  # dx may be a small part of its terms
    flushed = 2.0**-126 if backend.name in ("simt", "cupy") else 0  # smaller results are 0
    for got, same, value, term in zip(*results, exact, terms, strict=True):
        assert_within(got, value, 2e-6 * (size(value) + term) + flushed)
        assert_same(got[~odd], same[~odd])


@pytest.mark.long
@pytest.mark.nightly(simt=lambda given: given["shape"][-1] > 300)  # minutes on the emulator
@pairwise(
    scale=[1e25, 1e-25, 3e33, 2e37], layout=["contiguous", "channels_last", "crop"],
    shape=[(3, 5, 4, 4), (3, 5, 24, 33), (2, 3, 300, 310)],
)  # fmt: skip
def test_squares_out_of_range(
    backend: Backend, rng: np.random.Generator, scale: float, layout: str, shape: tuple[int, ...]
) -> None:
    """Short planes, planes and tiles."""
    check_some_planes_out_of_range(backend, rng, scale, shape, reference.LAYOUTS[layout])


OWNERS = [case for case in cases.variants() if case.dtype == "float32"]


SCALES = itertools.cycle([1e25, 1e-25, 2e37])


def most(given: dict[str, Any]) -> bool:
    return given["case"] not in OWNERS[::2] or bool(given["case"].layout != "contiguous")


@on_kernels
@pytest.mark.full(simt=most)
@pytest.mark.parametrize(("case", "scale"), list(zip(OWNERS, SCALES, strict=False)), ids=str)
def test_squares_out_of_range_for_every_scope(
    backend: Backend, rng: np.random.Generator, case: cases.Case, scale: float
) -> None:
    backend.pretend(case.device)
    check_some_planes_out_of_range(
        backend, rng, scale, case.shape, lambda values: cases._stride_kept(values, case.layout)
    )


@on_kernels
@pytest.mark.full(simt=most)
@pytest.mark.parametrize("case", OWNERS, ids=str)
def test_offsets_for_every_scope(backend: Backend, rng: np.random.Generator, case: cases.Case) -> None:
    """The saved mean is the exact one or a neighbouring number, however the tiles' means are merged."""
    backend.pretend(case.device)
    offsets = 10.0 ** rng.uniform(2, 5, (*case.shape[:2], *[1] * (len(case.shape) - 2)))
    values = rng.standard_normal(case.shape) + offsets * rng.choice([-1, 1], offsets.shape)
    x = cases._stride_kept(values.astype(np.float32), case.layout)
    y, saved = cn.instance_norm_forward(backend.array(x))
    dy = rng.standard_normal(case.shape).astype(np.float32)
    dx, *_ = cn.instance_norm_backward(backend.array(dy), saved)
    mean = reference.wide(x).mean(tuple(range(2, x.ndim)))
    assert_within(backend.host(saved.mean), mean, np.spacing(np.abs(mean).astype(np.float32)))
    for got, exact in ((y, reference.forward(x)), (dx, reference.backward(dy, x)[0])):
        assert_within(backend.host(got), exact, 2e-6 * (np.abs(exact) + 1))


@pairwise(
    data=[(1e36, 1e35), (0, 3e37), (1e38, 1e36), (0, 1e-30), (1e-25, 1e-31), (1e-3, 1e-6), (1, 1e-7)],
    dy=[1.0, 100.0, 1e-4, 1e-30],
    weight=[1.0, 1e-3], eps=[1e-5, 0.0], activation=[None, "leaky_relu"], shape=[(2, 3, 32, 32), (2, 3, 4, 4)],
    layout=["contiguous", "channels_last"],
)  # fmt: skip
def test_extremes_of_float32(
    backend: Backend, rng: np.random.Generator, data: tuple[float, float], dy: float, weight: float, eps: float,
    activation: str | None, shape: tuple[int, ...], layout: str,
) -> None:  # fmt: skip
    """Large and small deviations with large and small gradients: neither sums nor products leave the range."""
    x = (data[0] + data[1] * rng.standard_normal(shape)).astype(np.float32)
    g = (dy * rng.standard_normal(shape)).astype(np.float32)
    w = np.full(shape[1], weight, np.float32)
    laid = reference.LAYOUTS[layout]
    options = {"activation": activation, "negative_slope": 0.5}
    y, saved = cn.instance_norm_forward(backend.array(laid(x)), backend.array(w), eps=eps, **options)
    dx, dweight, _ = cn.instance_norm_backward(backend.array(laid(g)), saved)
    wide, axes = reference.wide(x), (2, 3)
    centred = wide - wide.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(axes, keepdims=True) + np.longdouble(eps))
    xhat = centred * rstd
    slope = np.where(xhat > 0, 1, 0.5) if activation else 1
    through = reference.wide(g) * slope
    c = (through * xhat).mean(axes, keepdims=True)
    exact = rstd * (through - through.mean(axes, keepdims=True) - xhat * c)
    # A result, or x less its mean, may lose at most the smallest number that does not flush.
    flushed = 2.0**-126 if backend.name in ("simt", "cupy") else 2.0**-149
    lost = flushed * (1 + rstd)
    small = np.sqrt((xhat**2).mean(axes, keepdims=True))
    assert_within(backend.host(y), weight * slope * xhat, 1e-6 * weight * (np.abs(xhat) + small) + lost)
    size = np.sqrt((through**2).mean(axes, keepdims=True)) + np.abs(through)
    assert_within(backend.host(dx), weight * exact, 2e-6 * weight * rstd * size + lost * (1 + dy))
    terms = np.abs(through * xhat)
    bound = 1e-6 * (terms.sum((0, 2, 3)) + small.max() * dy) + lost.max() * dy + flushed
    assert_within(backend.host(dweight), (through * xhat).sum((0, 2, 3)), bound)


@on_kernels
@pytest.mark.parametrize("offset", [0, 1e6], ids=str)
def test_offsets_with_dresidual_in_place_of_dy(backend: Backend, rng: np.random.Generator, offset: float) -> None:
    """Planes split into tiles: the second pass of backward reads the gradient written by the first."""
    backend.pretend(Device("small", (8, 0), 4, 48 * 1024, 2**20))
    normal = rng.standard_normal((1, 2, 400, 400))
    x, residual = (offset + normal).astype(np.float32), rng.standard_normal(normal.shape).astype(np.float32)
    dy = (rng.standard_normal(normal.shape) + normal / 2).astype(np.float32)
    _, saved = cn.instance_norm_forward(backend.array(x), residual=backend.array(residual), activation="relu")
    dx, _, _, dresidual = cn.instance_norm_backward(backend.array(dy), saved)
    assert any("input_gradient" in kernel for kernel in LAUNCHED)
    exact = reference.backward(backend.host(dresidual), x)[0]
    assert_within(backend.host(dx), exact, 2e-6 * (np.abs(exact) + 1))


@on_kernels
@pytest.mark.parametrize("total", [0.9, 1.1, 1e4], ids=str)
def test_squares_that_flush_to_zero(backend: Backend, rng: np.random.Generator, total: float) -> None:
    """A plane's sum of many squares is far from flushing: around 2**-100, or each square is around that."""
    backend.pretend(Device("roomy", (8, 0), 1, 227 * 1024, 2**20))  # one block has the whole plane
    x = rng.standard_normal((1, 1, 50_000))
    x *= np.sqrt(total * 2.0**-100 / (x**2).sum())
    narrow = x.astype(np.float32)
    y = backend.host(cn.instance_norm(backend.array(narrow), eps=0.0))
    exact = reference.forward(narrow, eps=0.0)
    assert_within(y, exact, 1e-6 * (np.abs(exact) + 1))


@pytest.mark.full(simt=lambda given: given["size"] not in (16, 49, 300, 1500))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [9, 16, 25, 32, 49, 100, 300, 900, 1500, 4000])
def test_an_outlier_costs_other_elements_no_digits(
    backend: Backend, rng: np.random.Generator, size: int, layout: str
) -> None:
    """Wherever it is, also where a loop takes its first guess of the mean: the sums of x - mean and of dy * (x - mean)
    are as exact as their terms."""
    for at in (0, size // 7, size // 2, size - 1):
        host = rng.normal(size=(2, 32, size, 1))
        host[:, :, at] = 1e5
        host = reference.LAYOUTS[layout](host.astype(np.float32))
        x = backend.array(host)
        exact = reference.Exact(host)
        terms = np.abs(exact.xhat).sum((2, 3))
        _, saved = cn.instance_norm_forward(x)
        mean, mean_lo = (wide(backend.host(a)).reshape(2, 32) for a in (saved.mean, saved.mean_lo))
        off = (mean + mean_lo - exact.statistics[0]) * size * exact.rstd[..., 0, 0]
        assert_within(off, 0 * off, 16 * 2.0**-24 * terms, f"sum of xhat, outlier at {at}")
        sums = cn.gradient_sums(backend.array(np.ones_like(host)), saved)
        assert_within(
            wide(backend.host(sums.sum_dy_xhat)), 0 * off, 16 * 2.0**-24 * terms, f"sum_dy_xhat, outlier at {at}"
        )


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, 1e-30, -1e36])
def test_constant_planes_of_any_size(backend: Backend, value: float) -> None:
    x = backend.array(np.full((2, 3, 8, 9), value, np.float32))
    y, saved = cn.instance_norm_forward(x)
    assert (backend.host(y) == 0).all()
    assert_allclose(backend.host(saved.rstd), 1e-5**-0.5, rtol=1e-6)


def test_infinities_stay_in_their_planes(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 6, 7)).astype(np.float32)
    clean = cn.instance_norm(backend.array(x.copy()))
    x[0, 1, 2, 3], x[1, 0, 0, 0] = np.inf, np.nan
    y = backend.host(cn.instance_norm(backend.array(x)))
    assert np.isnan(y[0, 1]).any() and np.isnan(y[1, 0]).all()
    y[0, 1] = y[1, 0] = 0
    expected = devices.to_host(clean).copy()
    expected[0, 1] = expected[1, 0] = 0
    assert_same(y, expected)
