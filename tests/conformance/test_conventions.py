"""Conventions of other projects: where eps is added (eps_mode), and the variance's degrees of freedom (ddof)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from helpers import cases, parts, reference
from helpers.backends import Backend
from helpers.compare import ROUNDING, assert_equal, assert_same, assert_within, wide
from helpers.optional import required
from helpers.pairwise import pairwise

import cupynorm as cn
from cupynorm._types import EPS_MODES

#: eps_mode, ddof and eps, in turn: eps may be nothing, or more than the deviation.
CONVENTIONS = [
    ("std", 1.0, 1e-5), ("max", 0.0, 1e-8), ("variance", 1.0, 1e-5), ("std", 0.0, 3.0), ("max", 1.5, 5.0),
    ("variance", -1.0, 0.0), ("std", 0.5, 0.0),
]  # fmt: skip


def each_convention(given: list[cases.Case]) -> list[cases.Case]:
    """Give each case one of the conventions."""
    turns = itertools.cycle(CONVENTIONS)
    made = []
    for case in given:
        mode, ddof, eps = next(turns)
        made.append(cases.replace(case, eps_mode=mode, ddof=ddof, eps=eps))
    return made


#: Every scope of the kernels, and every step of the CPU's loops: short planes, long ones, tiles, channels side by side.
TABLE = each_convention([
    *(cases.Case(shape, dtype) for dtype in ("float32", "float64", "float16")
      for shape in ((2, 3, 5, 7), (3, 4, 3, 3), (2, 3, 35, 45), (1, 2, 300, 110))),
    *(cases.Case((2, 32, 9, 10), dtype, "channels_last") for dtype in ("float32", "float64", "bfloat16")),
    cases.Case((2, 8, 30, 31), "float32", "channels_last"), cases.Case((1, 32, 90, 110), "float32", "channels_last"),
    cases.Case((2, 3, 20, 31), "float32", "crop"), cases.Case((1, 3, 300, 31), "float32", "transposed"),
    *(cases.Case(shape, layout=layout, device=device)
      for layout, shape in (("contiguous", (2, 3, 90, 100)), ("channels_last", (2, 16, 30, 45)))
      for device in (cases.BLOCKS, cases.GRID)),
    *(cases.Case((2, 3, 45, 47), data=data)
      for data in ("offset", "outlier", "checkerboard", "tiny")),
    *(cases.Case((2, 3, 4, 5), data=data) for data in ("offset", "tiny", "outlier", "far")),
    cases.Case((2, 3, 9, 7), activation="silu", residual="contiguous", per_sample="wb"),
    cases.Case((2, 3, 9, 7), activation="leaky_relu"),
])  # fmt: skip


def few_builds(given: dict[str, Any]) -> bool:
    return given["case"].dtype != "float32" or given["case"].activation is not None


@pytest.mark.full(simt=few_builds)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    """In training, and in tracked eval, where ddof has no effect."""
    cases.check(backend, case, rng)


@pytest.mark.full(simt=few_builds)
@pytest.mark.parametrize(
    "case", each_convention([case for case in TABLE if case.device is cases.SMALL_DEVICE]), ids=str
)
def test_parts_give_the_results_of_the_whole(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng, parts.in_parts(parts.parts_of(case.shape[2], rng), 2), trainings=(True,))


@pairwise(
    eps_mode=EPS_MODES, ddof=(0.0, 1.0), eps=(0.0, 1e-60, 1e-30, 1e-12, 1.0), size=(3, 40, 2500),
    scale=(1e-30, 1e-18, 1e-9, 1.0, 1e20, 3e37), layout=("contiguous", "channels_last"),
)  # fmt: skip
def test_deviations_of_any_size(
    backend: Backend, eps_mode: str, ddof: float, eps: float, scale: float, size: int, layout: str,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """y and dx where float32 has neither the squares of the deviations nor those of eps."""
    x = reference.LAYOUTS[layout]((rng.normal(size=(2, 16, size, 1)) * scale).astype(np.float32))
    dy = reference.LAYOUTS[layout](rng.normal(size=x.shape).astype(np.float32))
    y, saved = cn.instance_norm_forward(backend.array(x), eps=eps, eps_mode=eps_mode, ddof=ddof)
    dx, _, _ = cn.instance_norm_backward(backend.array(dy), saved)
    exact = reference.Exact(x, eps=eps, eps_mode=eps_mode, ddof=ddof)
    bound = 40 * ROUNDING["float32"]
    assert_within(backend.host(y), exact.y, bound * np.abs(exact.xhat).max() + 2.0**-126, "y")
    largest = np.abs(dy).max() * exact.rstd * (1 + np.abs(exact.xhat).max() ** 2 * exact.rstd_slope)
    assert_within(backend.host(dx), exact.backward(dy)[0], bound * largest + 2.0**-126, "dx", overflow=True)


@pytest.mark.full(simt=lambda given: given["value"] not in (0.0, 0.1))
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4, 1e30])
@pytest.mark.parametrize("size", [4, 63, 1000])
@pytest.mark.parametrize("eps_mode", EPS_MODES)
def test_constant_planes(backend: Backend, eps_mode: str, size: int, value: float, rng: np.random.Generator) -> None:
    """y is the bias; rstd is taken as a constant of the derivative."""
    x = np.full((2, 3, size), value, np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    bias = rng.normal(size=3).astype(np.float32)
    y, saved = cn.instance_norm_forward(
        backend.array(x), None, backend.array(bias), eps=1e-3, eps_mode=eps_mode, ddof=1
    )
    dx, _, _ = cn.instance_norm_backward(backend.array(dy), saved)
    assert_equal(backend.host(y), np.broadcast_to(bias[:, None], x.shape))
    rstd = 1e-3**-0.5 if eps_mode == "variance" else 1e3
    expected = (wide(dy) - wide(dy).mean(2, keepdims=True)) * rstd
    assert_within(backend.host(dx), expected, 8 * ROUNDING["float32"] * rstd * np.abs(dy).max(), "dx")


@pytest.mark.parametrize("size", [8, 50, 5000])
def test_scale_below_eps_is_a_constant(backend: Backend, size: int, rng: np.random.Generator) -> None:
    """With "max", planes with a deviation below eps; those above it have the derivative of the deviation."""
    deviations = np.array([0.5, 0.999, 1.001, 2.0])
    x = rng.normal(size=(2, 4, size))
    x = (x - x.mean(2, keepdims=True)) / x.std(2, keepdims=True) * deviations[:, None]
    x, dy = x.astype(np.float32), rng.normal(size=x.shape).astype(np.float32)
    y, saved = cn.instance_norm_forward(backend.array(x), eps=1.0, eps_mode="max")
    dx, _, _ = cn.instance_norm_backward(backend.array(dy), saved)
    mean, mean_dy = (wide(a).mean(2, keepdims=True) for a in (x, dy))
    bound = 10 * ROUNDING["float32"] * np.abs(x).max()
    assert_within(backend.host(y)[:, :2], (x - mean)[:, :2], bound, "y")
    assert_within(backend.host(dx)[:, :2], (dy - mean_dy)[:, :2], bound, "dx")
    exact = reference.Exact(x[:, 2:]).backward(dy[:, 2:])[0]
    assert_within(backend.host(dx)[:, 2:], exact, 1e-4, "dx above eps")


@pytest.mark.parametrize("eps_mode", EPS_MODES)
def test_gradient_agrees_with_finite_differences(backend: Backend, eps_mode: str, rng: np.random.Generator) -> None:
    """Of the sum of dy * y, in float64, for deviations near eps."""
    x, dy, direction = rng.normal(size=(3, 2, 3, 9))
    options = {"eps": 0.7, "eps_mode": eps_mode, "ddof": 1}

    def loss(x: np.ndarray) -> float:
        return float((backend.host(cn.instance_norm(backend.array(x), **options)) * dy).sum())

    _, saved = cn.instance_norm_forward(backend.array(x), **options)
    dx, _, _ = cn.instance_norm_backward(backend.array(dy), saved)
    h = 1e-6
    slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    assert_within(np.array((backend.host(dx) * direction).sum()), slope, 1e-7)


def nemo(x: Any, xp: Any) -> Any:
    """Features of speech (NeMo): eps is added to the unbiased deviation."""
    return (x - x.mean(2, keepdims=True)) / (x.std(2, ddof=1, keepdims=True) + 1e-5)


def adain(x: Any, xp: Any) -> Any:
    """Adaptive instance normalisation: eps is added to the unbiased variance."""
    return (x - x.mean(2, keepdims=True)) / xp.sqrt(x.var(2, ddof=1, keepdims=True) + 1e-5)


def revin(x: Any, xp: Any) -> Any:
    """Reversible instance normalisation of time series: as PyTorch's layer."""
    return (x - x.mean(2, keepdims=True)) / xp.sqrt(x.var(2, keepdims=True) + 1e-5)


def nnunet(x: Any, xp: Any) -> Any:
    """nnU-Net's normalisation of images: the deviation is at least 1e-8."""
    return (x - x.mean(2, keepdims=True)) / xp.maximum(x.std(2, keepdims=True), 1e-8)


#: The table of docs/guide/conventions.md.
PROJECTS = {
    nemo: {"eps_mode": "std", "eps": 1e-5, "ddof": 1},
    adain: {"eps_mode": "variance", "eps": 1e-5, "ddof": 1},
    revin: {"eps_mode": "variance", "eps": 1e-5, "ddof": 0},
    nnunet: {"eps_mode": "max", "eps": 1e-8, "ddof": 0},
}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.__name__)
def test_projects(backend: Backend, project: Any, scale: float, rng: np.random.Generator) -> None:
    """Short planes with small deviations, where conventions differ most: each gives other results than all others."""
    x = (rng.normal(size=(3, 4, 12)) + 2) * scale
    expected = project(wide(x), np)
    for other, options in PROJECTS.items():
        y = backend.host(cn.instance_norm(backend.array(x), **options))
        if other is project:
            assert_within(y, expected, 1e-11, "y")
        else:
            assert np.abs(y - expected).max() > 1e-7


@pytest.mark.extras
@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.__name__)
def test_layer_loads_a_project_s_parameters(backend: Backend, project: Any, rng: np.random.Generator) -> None:
    """A network that was trained with another convention, in PyTorch: results and gradients after loading its state."""
    torch = required("torch")
    theirs = torch.nn.InstanceNorm1d(4, affine=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=4)))
    x = torch.from_numpy(rng.normal(size=(3, 4, 12)).astype(np.float32) + 5).requires_grad_()

    mean, std_ = x.mean(2, keepdim=True), x.std(2, correction=PROJECTS[project]["ddof"], keepdim=True)
    eps, mode = PROJECTS[project]["eps"], PROJECTS[project]["eps_mode"]
    scale = {"variance": (std_**2 + eps).sqrt(), "std": std_ + eps, "max": std_.clamp(min=eps)}[mode]
    y = (x - mean) / scale * theirs.weight[:, None] + theirs.bias[:, None]
    dy = torch.from_numpy(rng.normal(size=x.shape).astype(np.float32))
    y.backward(dy)

    ours = cn.InstanceNorm1d(4, affine=True, device=backend.device, **PROJECTS[project])
    ours.load_state_dict(theirs.state_dict())
    assert_within(backend.host(ours.forward(backend.array(x.detach().numpy()))), y.detach().numpy(), 3e-5, "y")
    dx = ours.backward(backend.array(dy.numpy()))
    assert_within(backend.host(dx), x.grad.numpy(), 3e-5, "dx")
    assert_within(backend.host(ours.weight.grad), theirs.weight.grad.numpy(), 1e-4, "dweight")


def test_running_statistics_are_unbiased_with_any_ddof(backend: Backend, rng: np.random.Generator) -> None:
    x = backend.array(rng.normal(size=(3, 4, 20)).astype(np.float32))
    layers = [
        cn.InstanceNorm1d(4, track_running_stats=True, device=backend.device, **options)
        for options in ({}, {"ddof": 3, "eps_mode": "std"}, {"ddof": 1, "eps_mode": "max", "eps": 10.0})
    ]
    for layer in layers:
        layer.forward(x)
        assert_same(layer.running_mean, layers[0].running_mean)
        assert_same(layer.running_var, layers[0].running_var)


def test_planes_with_no_more_positions_than_ddof(backend: Backend, rng: np.random.Generator) -> None:
    """With given moments, whose counts are not known before: their variance is 0, and rstd is a constant."""
    x = backend.array(rng.normal(size=(2, 3, 4)).astype(np.float32))
    found = cn.moments(x)
    counts = np.array([[1, 2, 3], [4, 5, 100]])
    given = cn.Moments(backend.array(counts), found.mean, found.m2)
    mean, m2 = (backend.host(a)[..., None] for a in (found.mean, found.m2))
    for mode in EPS_MODES:
        y, saved = cn.instance_norm_forward(x, eps=1e-3, eps_mode=mode, ddof=3, moments=given)
        rest = counts[..., None] - 3
        var = np.where(rest > 0, m2 / np.maximum(rest, 1), 0)
        scale = {"variance": (var + 1e-3) ** 0.5, "std": var**0.5 + 1e-3, "max": np.maximum(var**0.5, 1e-3)}[mode]
        assert_within(backend.host(y), (backend.host(x) - mean) / scale, 1e-5 / scale, f"y, {mode}")
        dy = backend.array(rng.normal(size=(2, 3, 4)).astype(np.float32))
        zero = backend.array(np.zeros((2, 3)))
        one = backend.array(np.ones((2, 3)))
        flat, _, _ = cn.instance_norm_backward(dy, saved, sums=cn.GradientSums(zero, zero))
        sloped, _, _ = cn.instance_norm_backward(dy, saved, sums=cn.GradientSums(zero, one))
        same = (backend.host(flat) == backend.host(sloped)).all(2)
        assert_equal(same, counts <= 3, f"planes whose rstd is a constant, {mode}")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps_mode": "sum"}, ValueError, "eps_mode must be one of variance, std, max, got 'sum'"),
        ({"eps_mode": None}, TypeError, "eps_mode must be one of variance, std, max, got None"),
        ({"ddof": "1"}, TypeError, "ddof must be a number"),
        ({"ddof": float("nan")}, ValueError, "ddof must be finite"),
        ({"ddof": True}, TypeError, "ddof must be a number"),
        ({"ddof": 6}, ValueError, "ddof must be less than the number of positions of a plane, 6, got 6"),
        ({"ddof": 7.5}, ValueError, "ddof must be less than the number of positions of a plane, 6, got 7.5"),
    ],
)
def test_refusals(backend: Backend, options: dict[str, Any], error: type, message: str) -> None:
    x, mean, var = (backend.array(np.ones(shape, np.float32)) for shape in ((2, 3, 6), 3, 3))
    out = backend.array(np.full((2, 3, 6), 7, np.float32))
    for call in (cn.instance_norm, cn.instance_norm_forward):
        with pytest.raises(error, match=message):
            call(x, running_mean=mean, running_var=var, out=out, **options)
    for array, value in ((out, 7), (mean, 1), (var, 1)):
        assert (backend.host(array) == value).all()
    if "positions" not in message:
        with pytest.raises(error, match=message):
            cn.InstanceNorm1d(3, device=backend.device, **options)


def test_ddof_of_tracked_eval_has_no_limit(backend: Backend) -> None:
    """The variance is given; ddof is not used."""
    x, mean, var = (backend.array(np.ones(shape, np.float32)) for shape in ((2, 3, 6), 3, 3))
    y = cn.instance_norm(x, mean, var, use_input_stats=False, ddof=100)
    assert (backend.host(y) == 0).all()


@pytest.mark.parametrize("options", [{"eps_mode": "std"}, {"eps_mode": "max"}, {"ddof": 1}])
def test_double_backward_is_refused(backend: Backend, options: dict[str, Any], rng: np.random.Generator) -> None:
    x = backend.array(rng.normal(size=(2, 3, 6)))
    _, saved = cn.instance_norm_forward(x, **options)
    with pytest.raises(ValueError, match="no double backward of a forward with eps_mode="):
        cn.instance_norm_double_backward(x, None, None, x, saved)


def test_layer_shows_its_convention() -> None:
    assert repr(cn.InstanceNorm2d(3, device="cpu")).endswith("track_running_stats=False)")
    layer = cn.InstanceNorm2d(3, eps_mode="std", ddof=1, device="cpu")
    assert repr(layer).endswith("track_running_stats=False, eps_mode='std', ddof=1)")
