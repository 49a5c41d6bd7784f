"""Planes in parts: moments, normalising with given moments, gradient sums, and gradients from given sums."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import cases, parts, reference
from helpers.backends import Backend, on, on_kernels
from helpers.compare import ROUNDING, assert_equal, assert_same, assert_within, bits, wide

import cupynorm as cn
from cupynorm import devices, statistics
from cupynorm.cuda.variants import ITEMSIZE


def by_default(case: cases.Case) -> bool:
    return case.dtype == "float32" and case.activation is None


@pytest.mark.whole
@on_kernels
@pytest.mark.full(simt=lambda given: not by_default(given["case"]))
@pytest.mark.nightly(simt=lambda given: given["case"].activation is None and given["case"] not in parts.in_turn())
@pytest.mark.parametrize("case", [*parts.variants(), *parts.epilogue_variants()], ids=str)
def test_every_kernel_of_the_steps(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    """With one part that is the whole, the kernels read the arrays in place."""
    cases.check(backend, case, rng, parts.in_parts(parts.WHOLE), trainings=(True,))
    if case.layout == "unaligned":
        with parts.batch_invariant():
            cases.check(backend, case, rng, parts.in_parts(parts.WHOLE), trainings=(True,))


#: Layouts, dtypes, data and epilogues; each kind of call has loops to compile.
TABLE = [
    *(cases.Case((2, 3, 9, 7), dtype) for dtype in ITEMSIZE),
    *(cases.Case((2, 8, 9, 6), "float32", layout) for layout in reference.LAYOUTS),
    *(cases.Case((2, 3, 45, 47), "float32", data=data)
      for data in ("offset", "far", "constant", "outlier", "checkerboard", "tiny")),
    *(cases.Case((2, 32, 30, 31), "float32", "channels_last", data) for data in ("normal", "offset", "constant")),
    cases.Case((1, 2, 300, 410), data="offset"),
    cases.Case((1, 17, 90, 110), "float32", "channels_last", "offset"),
    cases.Case((2, 3, 16, 17), "float16", data="near_max"),
    *(cases.Case(shape) for shape in ((2, 5, 1200), (1, 2, 5, 6, 7), (3, 2, 2))),
    cases.Case((2, 3, 9, 7), affine=False),
    *(cases.Case((3, 4, 8, 7), dtype, layout, activation=activation, residual=residual, per_sample=per_sample)
      for activation, dtype, layout, residual, per_sample in (
          ("relu", "float32", "contiguous", "contiguous", "w"), ("silu", "float32", "channels_last", None, "wb"),
          ("gelu", "float16", "contiguous", "channels_last", ""), (None, "float64", "contiguous", "contiguous", ""),
          ("leaky_relu", "bfloat16", "channels_last", None, "b"))),
]  # fmt: skip


def few_builds(given: dict[str, Any]) -> bool:
    """Return True for cases beyond float32 without an epilogue: each dtype and epilogue has modules of its own."""
    return not by_default(given["case"])


@pytest.mark.full(simt=few_builds)
@pytest.mark.parametrize("case", TABLE, ids=str)
@pytest.mark.parametrize("along", ["outer", "inner"])
def test_parts_give_the_results_of_the_whole(
    backend: Backend, case: cases.Case, along: str, rng: np.random.Generator
) -> None:
    """Cut at random along the first or last spatial axis: a part may be empty, or have one position."""
    axis = 2 if along == "outer" else len(case.shape) - 1
    cut = parts.parts_of(case.shape[axis], rng)
    print(cut)
    cases.check(backend, case, rng, parts.in_parts(cut, axis), trainings=(True,))


# Moments


def expected_moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and m2 of each plane in extended precision."""
    mean, var = reference.statistics(x)
    return mean, var * np.prod(x.shape[2:])


@pytest.mark.full(simt=lambda given: given["dtype"] != "float32")
@pytest.mark.parametrize("offset", [0, 1e4, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 30, 41), (3, 2, 1), (1, 2, 260, 300)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_digits_of_moments(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str, offset: float, layout: str
) -> None:
    """As many as the computing dtype has, about the mean: however large that is."""
    x = (rng.normal(size=shape) + offset).astype(dtype)
    x = x if len(shape) < 4 else reference.LAYOUTS[layout](x)
    given = backend.array(x)
    found = cn.moments(given)
    assert [a.dtype for a in vars(found).values()] == [np.int64, np.float64, np.float64]
    assert all(a.shape == shape[:2] and type(a) is type(given) for a in vars(found).values())
    count, mean, m2 = (backend.host(a) for a in vars(found).values())
    assert (count == np.prod(shape[2:])).all()
    exact_mean, exact_m2 = expected_moments(x)
    deviation = np.sqrt(exact_m2 / count) + np.abs(exact_mean) * 2.0**-28
    assert_within(mean, exact_mean, deviation * 4 * ROUNDING[dtype] + np.abs(exact_mean) * 2.0**-51, "mean")
    of_tiles = np.abs(exact_mean) * np.sqrt(exact_m2 * count) * 2.0**-51  # the GPU merges rounded means of tiles
    assert_within(m2, exact_m2, exact_m2 * 8 * ROUNDING[dtype] + of_tiles * (np.prod(shape[2:]) > 500), "m2")


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_moments_out_of_range_of_float32(backend: Backend, rng: np.random.Generator, scale: float) -> None:
    """m2 is float64, which has room for the squares of all float32 numbers."""
    x = (scale * (rng.normal(size=(2, 3, 300)) + 1)).astype(np.float32)
    found = cn.moments(backend.array(x))
    exact_mean, exact_m2 = expected_moments(x)
    assert_within(backend.host(found.mean), exact_mean, scale * 2.0**-22, "mean")
    assert_within(backend.host(found.m2), exact_m2, exact_m2 * 2.0**-20, "m2")


@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 3, 4, 0), (0, 3, 5), (2, 0, 5), (0, 0, 0)], ids=str)
def test_moments_of_empty_planes(backend: Backend, shape: tuple[int, ...]) -> None:
    found = cn.moments(backend.array(np.zeros(shape, np.float32)))
    for array, dtype in zip(vars(found).values(), (np.int64, np.float64, np.float64), strict=True):
        assert_same(array, np.full(shape[:2], 0 if 0 in shape[2:] else 5, dtype))


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 6, 7, 11])
def test_moments_of_any_number_of_tiles(rng: np.random.Generator, tiles: int) -> None:
    """The CPU's planes of several tiles, whose means are far apart; of an odd number, the last has no partner."""
    pieces = [1e6 * rng.normal(size=(2, 3, 1)) + rng.normal(size=(2, 3, size)) for size in rng.integers(1, 6, tiles)]
    counts = np.stack([np.full((2, 3), piece.shape[2]) for piece in pieces])
    means, m2s = (np.stack(numbers).astype(float) for numbers in zip(*map(expected_moments, pieces), strict=True))
    merged = statistics.merge_tiles(counts, means, np.zeros(means.shape), m2s)
    whole = np.concatenate(pieces, 2)
    mean, m2 = expected_moments(whole)
    assert_equal(merged.count, np.full((2, 3), whole.shape[2]))
    assert_within(merged.mean, mean, 1e-9)
    assert_within(merged.m2, m2, 1e-13 * m2 + 1e-9)


def test_moments_of_constant_planes(backend: Backend) -> None:
    """m2 is 0, not -0; the arrays are new and writable."""
    found = cn.moments(backend.array(np.full((1, 2, 9), 7, np.float32)))
    assert_same(found.m2, np.zeros((1, 2)))
    assert_same(found.std(), np.zeros((1, 2)))
    assert all(a.flags.c_contiguous for a in vars(found).values())
    assert backend.name == "cupy" or all(a.flags.writeable for a in vars(found).values())


def test_moments_of_nan_and_infinity(backend: Backend) -> None:
    """Other planes are not concerned."""
    x = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    x[0, 1, 2], x[0, 2, 3] = np.nan, np.inf
    found = cn.moments(backend.array(x))
    assert np.isnan(backend.host(found.m2)[0]).tolist() == [False, True, True, False]
    assert np.isnan(backend.host(found.mean)[0, 1])
    assert_within(backend.host(found.m2)[0, ::3], expected_moments(x[:, ::3])[1][0], 1e-5)


def made(count: Any, mean: Any, m2: Any) -> cn.Moments:
    return cn.Moments(np.array(count, np.int64), np.array(mean, np.float64), np.array(m2, np.float64))


def test_merge_in_any_order(rng: np.random.Generator) -> None:
    """The same values up to rounding; the same order the same bits."""
    x = rng.normal(size=(3, 4, 1000)) * 10.0 ** rng.integers(-3, 4, (3, 4, 1)) + 1e5
    borders = [0, 0, *np.sort(rng.integers(0, 1001, 12)).tolist(), 1000]
    found = [cn.moments(x[..., a:b]) for a, b in pairwise(borders)]
    exact_mean, exact_m2 = expected_moments(x)
    for order in ([*range(len(found))], rng.permutation(len(found))):
        first, *others = (found[i] for i in order)
        merged = first.merge(*others)
        assert (merged.count == 1000).all()
        assert_within(merged.mean, exact_mean, 1e-15 * exact_mean)
        assert_within(merged.m2, exact_m2, exact_m2 * 1e-13 + 1e5 * np.sqrt(exact_m2) * 1e-15)
        again = first.merge(*others)
        pairs = first
        for other in others:
            pairs = pairs.merge(other)
        assert bits(*vars(again).values()) == bits(*vars(merged).values()) == bits(*vars(pairs).values())


def test_empty_parts_change_nothing() -> None:
    empty, some = made([[0, 0]], [[0, 0]], [[0, 0]]), made([[3, 2]], [[np.inf, -0.0]], [[np.nan, 7]])
    for merged in (some.merge(empty), empty.merge(some), empty.merge(empty, some, empty)):
        assert bits(*vars(merged).values()) == bits(*vars(some).values())
    assert bits(*vars(empty.merge(empty)).values()) == bits(*vars(empty).values())
    assert some.merge().count is some.count


def test_variances_of_moments() -> None:
    found = made([[4, 1, 0]], [[1, 2, 0]], [[12, 0, 0]])
    assert_equal(found.var(), np.array([[3, 0, np.nan]]), strict=True)
    assert_equal(found.std(ddof=1), np.array([[2, np.nan, np.nan]]), strict=True)
    assert_equal(found.var(ddof=4), np.array([[np.inf, np.nan, np.nan]]), strict=True)
    x = np.random.default_rng(3).normal(size=(2, 3, 50))
    for ddof in (0, 1, 1.5):
        assert_within(cn.moments(x).var(ddof=ddof), x.var(-1, ddof=ddof), 1e-14)
        assert_within(cn.moments(x).std(ddof=ddof), x.std(-1, ddof=ddof), 1e-14)
    with pytest.raises(TypeError, match="ddof must be a number"):
        found.var(ddof="one")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [cn.Moments, cn.GradientSums])
def test_dataclasses_pickle_and_compare_by_identity(kind: Any) -> None:
    fields = [np.ones((2, 3))] * (3 if kind is cn.Moments else 2)
    one = kind(*fields)
    assert one == one and one != kind(*fields) and len({one, kind(*fields)}) == 2  # noqa: PLR0124
    again = pickle.loads(pickle.dumps(one))
    assert type(again) is kind and bits(*vars(again).values()) == bits(*fields)


def test_merge_refuses_others() -> None:
    one = made([[4, 1, 0]], [[1, 2, 0]], [[12, 0, 0]])
    with pytest.raises(ValueError, match=r"shapes \(1, 3\) and \(1, 2\)"):
        one.merge(made([[4, 1]], [[1, 2]], [[12, 0]]))
    with pytest.raises(TypeError, match="merge needs Moments, got GradientSums"):
        one.merge(cn.GradientSums(one.mean, one.mean))  # type: ignore[arg-type]
    elsewhere = [type("Array", (), {"shape": (1, 3), "dtype": each.dtype})() for each in vars(one).values()]
    other = cn.Moments(*elsewhere)
    with pytest.raises(ValueError, match="is on cpu and on "):
        one.merge(other)
    with pytest.raises(ValueError, match="shapes"):
        cn.GradientSums(one.mean, one.mean).merge(cn.GradientSums(one.mean[0], one.mean))


def test_merge_checks_its_fields() -> None:
    with pytest.raises(TypeError, match=r"Moments.count must be an array of dtype int64, got list"):
        cn.Moments([[1]], [[1.0]], [[1.0]]).merge()
    one = made([[4, 1]], [[1, 2]], [[12, 0]])
    with pytest.raises(TypeError, match=r"Moments.mean must be an array of dtype float64, got float32"):
        one.merge(replace(one, mean=one.mean.astype(np.float32)))
    with pytest.raises(ValueError, match=r"Moments.m2 has shapes \(1, 2\) and \(2,\)"):
        one.merge(replace(one, m2=one.m2[0]))


def test_merges_run_on_the_device_of_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's operators would otherwise run on the current device."""
    entered: list[str] = []

    class Device:
        id = 1

        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: Any) -> None:
            entered.append("out")

    class Array(np.ndarray):
        device = Device()  # type: ignore[assignment]

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Array))
    one = cn.Moments(*(a.view(Array) for a in vars(made([[4, 1]], [[1, 2]], [[12, 0]])).values()))
    sums = cn.GradientSums(one.mean, one.m2)
    for call in (lambda: one.merge(one), one.var, lambda: sums.merge(sums)):
        entered.clear()
        call()
        assert entered == ["in", "out"]
    one.std(1)
    with pytest.raises(ValueError, match="is on cuda:1 and on cpu"):
        one.merge(made([[4, 1]], [[1, 2]], [[12, 0]]))


# Calls with given moments and sums


def test_moments_of_the_input_give_its_results(backend: Backend, rng: np.random.Generator) -> None:
    """To a few roundings; running statistics, too, which the counts of the moments make unbiased."""
    x, dy = rng.normal(size=(2, 2, 3, 40, 30)).astype(np.float32) + 5
    weight, bias, mean, var = rng.normal(size=(4, 3)).astype(np.float32)
    x, dy, weight, bias = map(backend.array, (x, dy, weight, bias))
    running = [[backend.array(a.copy()) for a in (mean, abs(var))] for _ in range(2)]
    moments = cn.moments(x)
    for given, (mean, var) in zip((None, moments), running, strict=True):
        y = cn.instance_norm(x, mean, var, weight, bias, moments=given)
        other, saved = cn.instance_norm_forward(x, weight, bias, moments=given)
        assert_same(y, other)
        assert saved.training and (saved.count is None) is (given is None)
    assert saved.count is moments.count
    for first, second in zip(*running, strict=True):
        assert_within(backend.host(first), wide(backend.host(second)), 2e-6)
    whole = cn.instance_norm_forward(x, weight, bias)
    assert_within(backend.host(y), wide(backend.host(whole[0])), 4e-6)
    sums = cn.gradient_sums(dy, saved)
    for given in ({}, {"sums": sums}):
        found = cn.instance_norm_backward(dy, saved, **given)
        for ours, theirs in zip(found, cn.instance_norm_backward(dy, whole[1]), strict=True):
            exact = wide(backend.host(theirs))
            assert_within(backend.host(ours), exact, 1e-5 * np.abs(exact).max())


def test_sums_beyond_float32(backend: Backend) -> None:
    """Their means are in range: sums are divided in float64."""
    dy = np.full((1, 1, 9), 8e37, np.float32)
    dy[..., ::3] = 4e37
    x = np.linspace(0, 1, 9, dtype=np.float32).reshape(1, 1, 9)
    parts_, found = np.split(np.arange(9), 3), []
    first, *others = (cn.moments(backend.array(x[..., part])) for part in parts_)
    moments = first.merge(*others)
    saved = [cn.instance_norm_forward(backend.array(x[..., part]), moments=moments)[1] for part in parts_]
    own, *more = (cn.gradient_sums(backend.array(dy[..., part]), s) for part, s in zip(parts_, saved, strict=True))
    for part, s in zip(parts_, saved, strict=True):
        dx, *_ = cn.instance_norm_backward(backend.array(dy[..., part]), s, sums=own.merge(*more))
        found.append(backend.host(dx))
    assert_within(np.concatenate(found, -1), reference.backward(dy, x)[0], 1e33)


def test_a_part_alone_has_the_gradients_of_its_own_loss(rng: np.random.Generator) -> None:
    """Without `sums`: dx is what this part's dy contributes to this part's gradient, by finite differences."""
    x, dy = rng.normal(size=(2, 1, 2, 9))
    other = cn.moments(rng.normal(size=(1, 2, 5)))

    def loss(x: np.ndarray) -> float:
        return float((cn.instance_norm(x, moments=cn.moments(x).merge(other), eps=1e-3) * dy).sum())

    _, saved = cn.instance_norm_forward(x, moments=cn.moments(x).merge(other), eps=1e-3)
    dx, *_ = cn.instance_norm_backward(dy, saved)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        assert abs((loss(x + step) - loss(x - step)) / 2e-6 - dx[index]) < 1e-8


@pytest.mark.parametrize("activation", [None, "relu"])
def test_sums_of_running_statistics(backend: Backend, rng: np.random.Generator, activation: str | None) -> None:
    """In tracked eval the statistics are constants: dx does not depend on the sums, dweight and dbias are theirs."""
    x, dy, residual = rng.normal(size=(3, 2, 3, 40)).astype(np.float32)
    weight, bias, mean, var = (rng.random((4, 3)) + 0.5).astype(np.float32)
    x, dy, residual, weight, bias, mean, var = map(backend.array, (x, dy, residual, weight, bias, mean, var))
    _, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, use_input_stats=False, activation=activation,
        residual=residual,
    )  # fmt: skip
    dx, dweight, dbias, dresidual = cn.instance_norm_backward(dy, saved)
    sums = cn.gradient_sums(dy, saved)
    found = cn.instance_norm_backward(dy, saved, sums=sums.merge(sums))
    assert_same(found[0], dx)
    assert_same(found[3], dresidual)
    for ours, theirs in zip(found[1:3], (dweight, dbias), strict=True):
        assert_within(backend.host(ours), 2 * wide(backend.host(theirs)), 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_parameter_gradients_have_the_dtypes_of_the_parameters(
    backend: Backend, rng: np.random.Generator, dtype: str, per_sample: bool
) -> None:
    x, dy = rng.normal(size=(2, 3, 2, 30)).astype(np.float16)
    weight = np.ones((3, 2) if per_sample else 2, dtype)
    bias = np.ones(2, "float32")
    _, saved = cn.instance_norm_forward(*map(backend.array, (x, weight, bias)), moments=cn.moments(backend.array(x)))
    sums = cn.gradient_sums(backend.array(dy), saved)
    _, dweight, dbias = cn.instance_norm_backward(backend.array(dy), saved, sums=sums)
    assert (dweight.shape, dweight.dtype, dbias.shape, dbias.dtype) == (weight.shape, dtype, (2,), np.float32)
    axes = 2 if per_sample else (0, 2)
    xhat = reference.forward(x)
    assert_within(backend.host(dweight), (wide(dy) * xhat).sum(axes), 0.02)
    assert_within(backend.host(dbias), wide(dy).sum((0, 2)), 0.02)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_gradient_of_a_weight_or_a_bias_alone(backend: Backend, rng: np.random.Generator, name: str) -> None:
    x, dy = rng.normal(size=(2, 2, 3, 30)).astype(np.float32)
    given = {name: backend.array(np.ones(3, np.float32))}
    _, saved = cn.instance_norm_forward(backend.array(x), **given)
    sums = cn.gradient_sums(backend.array(dy), saved)
    found = dict(
        zip(("weight", "bias"), cn.instance_norm_backward(backend.array(dy), saved, sums=sums)[1:3], strict=True)
    )
    _, dweight, dbias, _ = reference.backward(dy, x)
    assert_within(backend.host(found.pop(name)), dweight if name == "weight" else dbias, 1e-4)
    assert [*found.values()] == [None]


def test_running_statistics_leave_out_planes_without_variance(backend: Backend) -> None:
    """Planes of fewer than two positions do not count; a channel of such planes stays as it is."""
    moments = made([[4, 1, 0], [2, 6, 1]], [[1, 2, 0], [3, 5, 9]], [[12, 0, 0], [2, 30, 0]])
    given = cn.Moments(*map(backend.array, vars(moments).values()))
    mean, var = (backend.array(np.array(v, np.float32)) for v in ([1, 2, 3], [4, 5, 6]))
    for positions in (0, 1, 2):
        x = backend.array(np.zeros((2, 3, positions), np.float32))
        before = backend.host(mean).astype(float), backend.host(var).astype(float)
        cn.instance_norm(x, mean, var, momentum=0.5, moments=given)
        assert_within(backend.host(mean), (before[0] + [2, 5, before[0][2]]) / 2, 1e-6)
        assert_within(backend.host(var), (before[1] + [3, 6, before[1][2]]) / 2, 1e-6)


@pytest.mark.full(simt=lambda given: given["dtype"] == "float64")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-14)])
def test_empty_and_single_parts(backend: Backend, rng: np.random.Generator, dtype: str, bound: float) -> None:
    moments = cn.moments(backend.array(rng.normal(size=(2, 3, 50)).astype(dtype)))
    w = backend.array(np.ones(3, dtype))
    for positions in (0, 1):
        x = backend.array(rng.normal(size=(2, 3, positions)).astype(dtype))
        y, saved = cn.instance_norm_forward(x, w, w, moments=moments)
        sums = cn.gradient_sums(x, saved)
        total = sums.merge(sums)
        dx, dweight, dbias = cn.instance_norm_backward(x, saved, sums=total)
        assert y.shape == dx.shape == x.shape
        assert_within(backend.host(dbias), backend.host(total.sum_dy).sum(0), bound)
        assert_within(backend.host(dweight), backend.host(total.sum_dy_xhat).sum(0), bound)
        assert positions or not backend.host(dbias).any()
    x = backend.array(np.zeros((0, 3, 4), dtype))
    nothing = cn.moments(x)
    running = [backend.array(np.ones(3, dtype)) for _ in range(2)]
    y, saved = cn.instance_norm_forward(x, w, w, running_mean=running[0], running_var=running[1], moments=nothing)
    assert_same(running[0], np.ones(3, dtype))
    dx, dweight, dbias = cn.instance_norm_backward(y, saved, sums=cn.gradient_sums(y, saved))
    assert dx.shape == x.shape
    assert_same(dweight, np.zeros(3, dtype))
    assert_same(dbias, np.zeros(3, dtype))


@pytest.mark.parametrize("where", ["x", "dy", "residual"])
def test_results_in_place(backend: Backend, rng: np.random.Generator, where: str) -> None:
    """out= of both calls may be an input itself."""
    x_, dy_, residual_ = rng.normal(size=(3, 2, 3, 70)).astype(np.float32)
    moments, found = cn.moments(backend.array(x_)), []
    for inplace in (False, True):
        x, dy, residual = (backend.array(a.copy()) for a in (x_, dy_, residual_))
        out = {"x": x, "dy": dy, "residual": residual}[where] if inplace else None
        _, saved = cn.instance_norm_forward(x, moments=moments, activation="relu", residual=residual)
        sums = cn.gradient_sums(dy, saved)
        dx, _, _, dresidual = cn.instance_norm_backward(dy, saved, sums=sums, out=out)
        assert not inplace or dx is out
        assert saved.overwritten is (inplace and where != "dy")
        x, residual = (backend.array(a.copy()) for a in (x_, residual_))
        out = {"x": x, "residual": residual}.get(where) if inplace else None
        y = cn.instance_norm(x, moments=moments, activation="relu", residual=residual, out=out)
        found.append(bits(*map(backend.host, (dx, dresidual, y))))
    assert found[0] == found[1]


def test_layers_take_moments_and_sums(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = map(backend.array, rng.normal(size=(2, 2, 3, 5, 8)).astype(np.float32))
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device=backend.device)
    whole = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device=backend.device)
    moments = cn.moments(x)
    y, dx = layer.forward(x, moments=moments), layer.backward(dy)
    expected = whole.forward(x), whole.backward(dy)
    for ours, theirs in zip((y, dx, layer.running_var, layer.weight.grad),
                            (*expected, whole.running_var, whole.weight.grad), strict=True):  # fmt: skip
        assert_within(backend.host(ours), wide(backend.host(theirs)), 1e-5)
    sums = cn.gradient_sums(dy, layer.saved[0])
    layer.cleargrads()
    assert_within(backend.host(layer.backward(dy, sums=sums.merge(sums))), 0, np.inf)
    assert_within(backend.host(layer.bias.grad), 2 * wide(backend.host(whole.bias.grad)), 1e-4)
    one = layer.forward(x[0], moments=cn.moments(x[:1]))
    assert_within(backend.host(one), wide(backend.host(whole.forward(x[0]))), 1e-5)
    layer.eval()
    with pytest.raises(ValueError, match="moments need use_input_stats=True"):
        layer.forward(x, moments=moments)


# Refusals


@on("numpy", "simt")
def test_refusals(backend: Backend) -> None:
    x = np.ones((2, 3, 4), np.float32)
    moments, running = cn.moments(x), np.ones(3, np.float32)
    _, saved = cn.instance_norm_forward(x, moments=moments)
    sums = cn.gradient_sums(x, saved)

    def refuse(error: type[Exception], message: str, call: Any, *given: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            call(*given, **options)

    refuse(TypeError, "input must be a numpy.ndarray", cn.moments, [[[1.0]]])
    refuse(ValueError, "at least 3 dimensions", cn.moments, np.ones((2, 3)))
    refuse(TypeError, "accepted are float16", cn.moments, np.ones((2, 3, 4), np.int32))
    norm = cn.instance_norm
    refuse(TypeError, "moments must be what cupynorm.moments returns, got tuple", norm, x, moments=(1, 2, 3))
    frozen = {"running_mean": running, "running_var": running, "use_input_stats": False}
    refuse(ValueError, "moments need use_input_stats=True", norm, x, **frozen, moments=moments)
    wrong = {"count": np.float64, "mean": np.float32, "m2": np.float32}
    for field, dtype in wrong.items():
        odd = replace(moments, **{field: getattr(moments, field).astype(dtype)})
        refuse(TypeError, f"moments.{field} has dtype {np.dtype(dtype).name}; needed is", norm, x, moments=odd)
        odd = replace(moments, **{field: getattr(moments, field)[:1]})
        refuse(ValueError, rf"moments.{field} has shape \(1, 3\); needed is the input's \(N, C\)", norm, x, moments=odd)
    memory = np.zeros((2, 3, 8))
    shared = replace(moments, mean=memory[..., 0])
    refuse(ValueError, "out overlaps moments.mean", norm, memory[..., :4], moments=shared, out=memory[..., :4])
    back = cn.instance_norm_backward
    refuse(TypeError, "sums must be what cupynorm.gradient_sums returns, got tuple", back, x, saved, sums=(1, 2))
    odd_sums = replace(sums, sum_dy=sums.sum_dy.astype(np.float32))
    refuse(TypeError, "sums.sum_dy has dtype float32; needed is float64", back, x, saved, sums=odd_sums)
    refuse(ValueError, r"sums.sum_dy_xhat has shape \(2,\)", back, x, saved, sums=replace(sums, sum_dy_xhat=np.ones(2)))
    refuse(TypeError, "saved must be what instance_norm_forward returned", cn.gradient_sums, x, None)
    refuse(ValueError, "dy has shape", cn.gradient_sums, x[:1], saved)
    double = cn.instance_norm_double_backward
    refuse(ValueError, "no double backward through given moments", double, x, None, None, x, saved)


@on("numpy", "compiled")
def test_threads_change_no_bit(backend: Backend, rng: np.random.Generator, threads_as_they_were: None) -> None:
    x, dy = (backend.array(a) for a in rng.normal(size=(2, 2, 3, 400, 500)).astype(np.float32))
    found = []
    for threads in (1, 2, 3):
        cn.set_num_threads(threads)
        moments = cn.moments(x)
        y, saved = cn.instance_norm_forward(x, moments=moments)
        sums = cn.gradient_sums(dy, saved)
        dx, *_ = cn.instance_norm_backward(dy, saved, sums=sums)
        found.append(bits(*map(devices.to_host, (*vars(moments).values(), *vars(sums).values(), y, dx))))
    assert found[0] == found[1] == found[2]
