"""mask= and lengths=: statistics of the positions that count, zeros elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import builds, cases, reference
from helpers.backends import Backend, on
from helpers.compare import ROUNDING, assert_equal, assert_same, assert_within, wide
from helpers.masked import Exact, broadcast, spoiled
from helpers.pairwise import pairwise
from helpers.ranks import Ranks

import cupynorm as cn
from cupynorm import devices
from cupynorm._types import EPS_MODES

#: Short planes, planes of a warp and of a block, tiles, channels side by side.
SHAPES = ((3, 4, 3, 3), (2, 3, 9, 8), (2, 5, 35, 45), (1, 2, 300, 170), (2, 32, 9, 10), (1, 64, 60, 50), (2, 17, 6, 7))
MASKS = ("plane", "sample", "own", "rows", "columns", "channels", "lengths")


def mask_of(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, Any]:
    """Return a mask, or lengths, that leave out a third of the positions; of some masks a whole plane."""
    n, c, *spatial = shape
    if kind == "lengths":
        return {"lengths": rng.integers(0, spatial[-1] + 1, n)}
    of = {
        "plane": spatial, "sample": (n, 1, *spatial), "own": shape, "rows": (spatial[0], *(1,) * (len(spatial) - 1)),
        "columns": spatial[-1:], "channels": (n, c, *(1,) * len(spatial)),
    }[kind]  # fmt: skip
    mask = rng.random(of) < 2 / 3
    if kind in ("own", "sample"):
        mask[0, 0] = False
    if kind == "own":  # one plane of a single position
        mask[-1, -1] = False
        mask[-1, -1, 0, 1] = True
    return {"mask": mask}


def more_builds(given: dict[str, Any]) -> bool:
    usual = given["layout"] in ("contiguous", "channels_last") and given["shape"] != (1, 2, 300, 170)
    return given["dtype"] != "float32" or given["activation"] is not None or not usual


@pairwise(
    dtype=("float32", "float64", "float16", "bfloat16"), shape=SHAPES, kind=MASKS,
    layout=("contiguous", "channels_last", "transposed", "unaligned", "crop"), activation=(None, "relu", "silu"),
    given=("own", "running", "moments"), residual=(False, True),
)  # fmt: skip
@pytest.mark.full(simt=more_builds)
@pytest.mark.nightly(simt=builds.rare_mask, compiled=builds.rare_mask, cupy=more_builds)  # on a GPU each takes seconds
def test_results_and_gradients(
    backend: Backend, dtype: str, shape: tuple[int, ...], kind: str, layout: str, activation: str | None, given: str,
    residual: bool, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Whatever x, dy and the residual hold elsewhere, y, dx and dresidual are 0 there."""
    storage = devices.dtype_of(dtype)
    params = np.dtype("float64" if dtype == "float64" else "float32")
    options = mask_of(kind, shape, rng)
    mask = broadcast(options, shape)
    x = (rng.normal(size=shape) * 2 + 20).astype(storage)
    dy, added = rng.normal(size=(2, *shape)).astype(storage)
    weight, bias, mean = rng.normal(size=(3, shape[1])).astype(params)
    mean, var = mean + 20, (rng.random(shape[1]) + 1).astype(params)
    exact = Exact(
        x, mask, weight, bias, residual=added if residual else None, activation=activation,
        running=(mean, var) if given == "running" else None,
    )  # fmt: skip
    if activation == "relu":
        dy[np.abs(exact.z) < 0.05] = 0
    arrays = [reference.LAYOUTS[layout](spoiled(a, mask, rng)) for a in (x, dy, added)]
    x_, dy_, added_ = map(backend.array, arrays)
    if "mask" in options:
        options["mask"] = backend.array(options["mask"])
    mean_, var_ = backend.array(mean.copy()), backend.array(var.copy())
    y, saved = cn.instance_norm_forward(
        x_, backend.array(weight), backend.array(bias), running_mean=mean_, running_var=var_, momentum=0.25,
        activation=activation, residual=added_ if residual else None, use_input_stats=given != "running",
        moments=cn.moments(x_, **options) if given == "moments" else None, **options,
    )  # fmt: skip
    bound = 3 * ROUNDING[dtype] + 40 * ROUNDING[params.name]
    size = 1 + np.abs(exact.xhat * weight[:, None, None]) + np.abs(bias[:, None, None]) + np.abs(wide(added))
    assert_within(backend.host(y), exact.y, np.where(mask, bound * size, 0), "y")
    sums = cn.gradient_sums(dy_, saved) if given == "moments" else None
    dx, dweight, dbias, *dresidual = cn.instance_norm_backward(dy_, saved, sums=sums)
    exact_dx, exact_dweight, exact_dbias, g = exact.backward(dy)
    largest = np.abs(wide(dy)).max() * np.abs(exact.weight).max() * exact.rstd * (1 + np.abs(exact.xhat).max())
    assert_within(backend.host(dx), exact_dx, np.where(mask, 2 * bound * largest, 0), "dx")
    terms = np.sqrt(x.size / shape[1]) * 4
    for name, actual, expected in (("dweight", dweight, exact_dweight), ("dbias", dbias, exact_dbias)):
        assert_within(backend.host(actual), expected, bound * (np.abs(expected) + terms), name)
    if residual:
        assert_within(backend.host(dresidual[0]), g, np.where(mask, 3 * bound * (1 + np.abs(dy)), 0), "dresidual")
    _check_running(backend, exact, (mean, var), (mean_, var_), bound)


def _check_running(backend: Backend, exact: Exact, before: Any, after: Any, bound: float) -> None:
    """Planes of fewer than two positions do not count; channels without others keep their statistics."""
    mean, var = before
    if not exact.training:
        assert_same(backend.host(after[0]), mean)
        return
    counts = exact.count >= 2
    number = counts.sum(0)
    means = np.where(counts, exact.mean[..., 0, 0], 0).sum(0) / np.maximum(number, 1)
    unbiased = exact.m2[..., 0, 0] / np.maximum(exact.count - 1, 1)
    variances = np.where(counts, unbiased, 0).sum(0) / np.maximum(number, 1)
    momentum = np.where(number > 0, 0.25, 0)
    for name, actual, old, new in (("mean", after[0], mean, means), ("var", after[1], var, variances)):
        expected = (1 - momentum) * wide(old) + momentum * new
        assert_within(backend.host(actual), expected, 2 * bound * (np.abs(expected) + 1), f"running_{name}")
        kept = number == 0
        assert_same(backend.host(actual)[kept], old[kept])


@pytest.mark.parametrize("device", [cases.BLOCKS, cases.GRID], ids=lambda device: device.name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_planes_of_several_blocks(backend: Backend, layout: str, device: Any, rng: np.random.Generator) -> None:
    """Tiles without a position, too."""
    backend.pretend(device)
    shape = (2, 3, 90, 100) if layout == "contiguous" else (2, 16, 40, 45)
    x = (rng.normal(size=shape) + 1e4).astype(np.float32)
    mask = rng.random(shape[2:]) < 0.5
    mask[: shape[2] // 2] = False
    exact = Exact(x, np.broadcast_to(mask, shape))
    dy = rng.normal(size=shape).astype(np.float32)
    x_, dy_ = (backend.array(reference.LAYOUTS[layout](a)) for a in (x, dy))
    y, saved = cn.instance_norm_forward(x_, mask=backend.array(mask))
    assert_within(backend.host(y), exact.y, 4e-6 * 4)
    dx, _, _ = cn.instance_norm_backward(dy_, saved)
    assert_within(backend.host(dx), exact.backward(dy)[0], 3e-5)


@pairwise(
    eps_mode=EPS_MODES, ddof=(0.0, 1.0, 4.0), size=(5, 60, 1000), scale=(1e-30, 1.0, 1e15),
    layout=("contiguous", "channels_last"),
)  # fmt: skip
def test_conventions(
    backend: Backend, eps_mode: str, ddof: float, size: int, scale: float, layout: str, rng: np.random.Generator
) -> None:
    """ddof counts the positions of the mask; the variance of a plane with no more than ddof of them is 0."""
    shape, eps = (2, 16, size, 2), 0.25 * scale**2 if eps_mode == "variance" else 0.5 * scale
    x = (rng.normal(size=shape) * scale).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask[0, 0] = False
    mask[0, 1] = False
    mask[0, 1, :3, 0] = True
    exact = Exact(x, mask, eps=eps, eps_mode=eps_mode, ddof=ddof)
    x_, mask_ = (backend.array(reference.LAYOUTS[layout](a)) for a in (spoiled(x, mask, rng), mask))
    y, saved = cn.instance_norm_forward(x_, mask=mask_, eps=eps, eps_mode=eps_mode, ddof=ddof)
    assert_within(backend.host(y), exact.y, 2e-5)
    dy = rng.normal(size=shape).astype(np.float32)
    dx, _, _ = cn.instance_norm_backward(backend.array(dy), saved)
    assert_within(backend.host(dx), exact.backward(dy)[0], 5e-5 * exact.rstd + 2.0**-126)


@pairwise(kind=MASKS, shape=((2, 3, 9, 8), (2, 3, 300, 170), (2, 32, 30, 20)), layout=("contiguous", "channels_last"))
def test_moments(backend: Backend, kind: str, shape: tuple[int, ...], layout: str, rng: np.random.Generator) -> None:
    x = (rng.normal(size=shape) + 1e4).astype(np.float32)
    options = mask_of(kind, shape, rng)
    mask = broadcast(options, shape)
    if "mask" in options:
        options["mask"] = backend.array(options["mask"])
    found = cn.moments(backend.array(reference.LAYOUTS[layout](spoiled(x, mask, rng))), **options)
    exact = Exact(x, mask)
    assert_equal(backend.host(found.count), exact.count)
    assert_within(backend.host(found.mean), exact.mean[..., 0, 0], 1e-5)
    assert_within(backend.host(found.m2), exact.m2[..., 0, 0], 1e-5 * exact.m2[..., 0, 0])


@pytest.mark.full(simt=lambda given: given["shape"] != (2, 3, 9, 8))
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (1, 2, 80, 91), (2, 32, 9, 10)], ids=str)
def test_a_mask_of_all_positions_changes_nothing(
    backend: Backend, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x, dy = rng.normal(size=(2, *shape))
    x_, dy_ = backend.array(x), backend.array(dy)
    y, saved = cn.instance_norm_forward(x_)
    gradients = cn.instance_norm_backward(dy_, saved)
    for options in ({"mask": backend.array(np.ones(shape[2:], bool))}, {"lengths": [shape[-1]] * shape[0]}):
        masked, saved = cn.instance_norm_forward(x_, **options)
        assert_within(backend.host(masked), backend.host(y), 1e-12)
        assert_within(backend.host(cn.instance_norm_backward(dy_, saved)[0]), backend.host(gradients[0]), 1e-12)


@pytest.mark.parametrize("data", ["offset", "far", "constant", "outlier", "checkerboard", "tiny"])
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 5, 35, 45), (1, 2, 90, 100), (1, 32, 9, 10)], ids=str)
def test_difficult_values(backend: Backend, shape: tuple[int, ...], data: str, rng: np.random.Generator) -> None:
    """Means far from 0 and nearly constant planes keep their digits."""
    backend.pretend(cases.GRID)
    x = cases.data_of(data, rng, shape).astype(np.float32)
    mask = rng.random(shape) < 2 / 3
    layout = "channels_last" if shape[1] == 32 else "contiguous"
    x_, mask_ = (backend.array(reference.LAYOUTS[layout](a)) for a in (spoiled(x, mask, rng), mask))
    exact = Exact(x, mask, eps=1e-12)
    y, saved = cn.instance_norm_forward(x_, mask=mask_, eps=1e-12)
    assert_within(backend.host(y), exact.y, 2e-6 * (1 + np.abs(exact.xhat)))
    dy = rng.normal(size=shape).astype(np.float32)
    dx, _, _ = cn.instance_norm_backward(backend.array(dy), saved)
    assert_within(backend.host(dx), exact.backward(dy)[0], 2e-5 * exact.rstd * (1 + np.abs(exact.xhat)))


@pytest.mark.parametrize("shape", [(1, 1, 700, 900), (1, 32, 200, 200)], ids=str)
@on("numpy", "compiled")
def test_float64_planes_whose_first_tiles_have_no_position(
    backend: Backend, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Tiles are merged about the mean of one that has some."""
    x, mask = rng.normal(size=shape) + 1e6, np.ones(shape[2:], bool)
    mask[: shape[2] // 2] = False
    x_ = reference.LAYOUTS["contiguous" if shape[1] == 1 else "channels_last"](x)
    y = backend.host(cn.instance_norm(backend.array(x_), mask=backend.array(mask)))
    assert_within(y, Exact(x, np.broadcast_to(mask, shape)).y, 1e-12)


@pytest.mark.parametrize("eps_mode", EPS_MODES)
@pytest.mark.parametrize("given", ["own", "moments"])
@pytest.mark.parametrize("size", [20, 900], ids=str)
def test_planes_without_a_position_add_nothing_to_gradients(
    backend: Backend, size: int, given: str, eps_mode: str, rng: np.random.Generator
) -> None:
    """With eps = 0, too, where rstd of a constant plane is infinite."""
    shape = (2, 3, size)
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    weight, mask = np.ones(3, np.float32), rng.random(shape) < 0.7
    mask[0, 1] = False
    x_, mask_ = backend.array(x), backend.array(mask)
    moments = cn.moments(x_, mask=mask_) if given == "moments" else None
    _, saved = cn.instance_norm_forward(
        x_, backend.array(weight), eps=0, eps_mode=eps_mode, mask=mask_, moments=moments
    )
    dx, dweight, _ = cn.instance_norm_backward(backend.array(dy), saved)
    exact_dx, exact_dweight, *_ = Exact(x, mask, eps=1e-30, eps_mode=eps_mode).backward(dy)
    assert_within(backend.host(dx), exact_dx, 5e-5)
    assert_within(backend.host(dweight), exact_dweight, 1e-4 * np.sqrt(size))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(9, 8), (30, 31)], ids=str)
@on("numpy", "compiled")
def test_the_same_bits_in_every_batch(
    backend: Backend, size: tuple[int, int], layout: str, rng: np.random.Generator
) -> None:
    """Whatever the other planes need: centring, once more in a nearly constant plane, sums in float64."""
    x = rng.normal(size=(5, 32, *size)) * np.array([1, 1, 1e-2, 1e-25, 1]).reshape(-1, 1, 1, 1)
    x = (x + np.array([0, 1e3, 1e5, 0, 3]).reshape(-1, 1, 1, 1)).astype(np.float32)
    mask = rng.random((5, 1, *size)) < 0.7
    x_ = reference.LAYOUTS[layout](x)
    together = backend.host(cn.instance_norm(backend.array(x_), mask=backend.array(mask)))
    for i in range(5):
        alone = cn.instance_norm(backend.array(x_[i : i + 1]), mask=backend.array(mask[i : i + 1]))
        assert_same(together[i : i + 1], backend.host(alone))


def test_infinity_inside_a_mask_spoils_its_plane_only(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 3, 40)).astype(np.float32)
    x[0, 1, 5] = np.inf
    mask = np.ones(40, bool)
    mask[30:] = False
    y = backend.host(cn.instance_norm(backend.array(x), mask=backend.array(mask)))
    assert (y[..., 30:] == 0).all()
    inside = y[..., :30]
    assert np.isnan(inside[0, 1]).any() and np.isfinite(np.delete(inside.reshape(6, 30), 1, 0)).all()


def nemo(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Features of speech: mean and unbiased deviation over the frames of each utterance, padding set to 0."""
    y = np.zeros_like(x)
    for i, length in enumerate(lengths):
        part = x[i, :, :length]
        mean, std = part.mean(1, keepdims=True), part.std(1, ddof=1, keepdims=True) + 1e-5
        y[i, :, :length] = (part - mean) / std
    return y


def flax(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Flax's InstanceNorm with a mask: its statistics, mean(x^2) - mean^2 where the mask is True."""
    count = np.maximum(mask.sum((2, 3), keepdims=True), 1)
    mean = np.where(mask, x, 0).sum((2, 3), keepdims=True) / count
    var = np.maximum(np.where(mask, x * x, 0).sum((2, 3), keepdims=True) / count - mean * mean, 0)
    return (x - mean) / np.sqrt(var + 1e-6)


def test_as_other_projects_do(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 80, 50))
    lengths = np.array([50, 20, 2])
    y = cn.instance_norm(backend.array(x), lengths=lengths, eps_mode="std", ddof=1)
    assert_within(backend.host(y), nemo(x, lengths), 1e-11)
    x, mask = rng.normal(size=(2, 3, 8, 9)), rng.random((2, 1, 8, 9)) < 0.7
    y = cn.instance_norm(backend.array(x), mask=backend.array(mask), eps=1e-6)
    assert_within(backend.host(y), np.where(mask, flax(x, mask), 0), 1e-12)


@pytest.mark.parametrize("lengths", [[3, 0], (3, 0), np.array([3, 0]), np.array([3, 0], np.uint8), [7, 2]], ids=str)
def test_lengths_of_any_kind(backend: Backend, lengths: Any, rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 3, 4, 7))
    mask = broadcast({"lengths": lengths}, x.shape)
    expected = Exact(x, mask).y
    assert_within(backend.host(cn.instance_norm(backend.array(x), lengths=lengths)), expected, 1e-12)
    on_device = backend.array(np.asarray(lengths))
    assert_within(backend.host(cn.instance_norm(backend.array(x), lengths=on_device)), expected, 1e-12)


@pytest.mark.full(simt=lambda given: True)
def test_integers_and_other_dtypes(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.integers(0, 60000, (2, 3, 9, 8)).astype(np.uint16)
    mask = rng.random((9, 8)) < 0.6
    y = cn.instance_norm(backend.array(x), mask=backend.array(mask), dtype="float32")
    assert_within(backend.host(y), Exact(x, np.broadcast_to(mask, x.shape)).y, 5e-6)
    half, dy = rng.normal(size=(2, 2, 3, 9, 8))
    half, dy = half.astype(np.float16), dy.astype(np.float32)
    residual = backend.array(dy * 2)
    y, saved = cn.instance_norm_forward(
        backend.array(half), mask=backend.array(mask), residual=residual, dtype="float32"
    )
    dx, _, _, dresidual = cn.instance_norm_backward(backend.array(dy), saved)
    exact = Exact(half, np.broadcast_to(mask, half.shape), residual=dy * 2)
    assert_within(backend.host(y), exact.y, 5e-6)
    assert dx.dtype == np.float16 and dresidual.dtype == np.float32
    assert_within(backend.host(dx), exact.backward(dy)[0], 5e-3)
    assert_equal(backend.host(dresidual), np.where(mask, dy, 0))


def test_results_in_place(backend: Backend, rng: np.random.Generator) -> None:
    """Into x itself; and dx into dy, whose copy is the residual's gradient."""
    x, dy = rng.normal(size=(2, 2, 3, 9, 8)).astype(np.float32)
    mask = rng.random((2, 1, 9, 8)) < 0.6
    x_, dy_, mask_ = backend.array(x.copy()), backend.array(dy.copy()), backend.array(mask)
    _, saved = cn.instance_norm_forward(x_, mask=mask_, residual=dy_)
    dx, _, _, dresidual = cn.instance_norm_backward(dy_, saved, out=dy_)
    assert dx is dy_
    exact = Exact(x, np.broadcast_to(mask, x.shape))
    assert_within(backend.host(dx), exact.backward(dy)[0], 1e-5)
    assert_equal(backend.host(dresidual), np.where(mask, dy, 0))
    assert cn.instance_norm(x_, mask=mask_, out=x_) is x_
    assert_within(backend.host(x_), exact.y, 5e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers(backend: Backend, rank: int, rng: np.random.Generator) -> None:
    """Training, the backward, one sample, and eval."""
    layer = getattr(cn, f"InstanceNorm{rank}d")(3, affine=True, track_running_stats=True, device=backend.device)
    shape = (2, 3, *(5, 4, 6)[:rank])
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    lengths = [shape[-1], 2]
    mask = broadcast({"lengths": lengths}, shape)
    exact = Exact(x, mask)
    y = layer.forward(backend.array(spoiled(x, mask, rng)), lengths=lengths)
    assert_within(backend.host(y), exact.y, 5e-6)
    dx = layer.backward(backend.array(spoiled(dy, mask, rng)))
    assert_within(backend.host(dx), exact.backward(dy)[0], 2e-5)
    assert_within(backend.host(layer.bias.grad), exact.backward(dy)[2], 2e-5)
    one = layer.forward(backend.array(x[1]), mask=backend.array(mask[1, 0]))
    assert_within(backend.host(one), exact.y[1], 5e-6)
    layer.eval()
    running = backend.host(layer.running_mean), backend.host(layer.running_var)
    y = layer.forward(backend.array(spoiled(x, mask, rng)), lengths=lengths)
    assert_within(backend.host(y), Exact(x, mask, running=running).y, 1e-5)


@on("numpy", "simt")
def test_layers_over_several_ranks(backend: Backend, rng: np.random.Generator) -> None:
    """Each rank has the mask of its own part."""
    x, mask = rng.normal(size=(2, 3, 6, 8)), rng.random((2, 1, 6, 8)) < 0.6
    cut = [slice(0, 2), slice(2, 2), slice(2, 6)]

    def work(comm: Any, rank: int) -> np.ndarray:
        layer = cn.InstanceNorm2d(3, dtype="float64", device="cpu", comm=comm)
        part = cut[rank]
        return backend.host(layer.forward(backend.array(x[:, :, part]), mask=backend.array(mask[:, :, part])))

    y = np.concatenate(Ranks(len(cut)).run(work), 2)
    assert_within(y, Exact(x, np.broadcast_to(mask, x.shape)).y, 1e-11)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": np.ones(6, np.uint8)}, TypeError, "mask has dtype uint8; needed is bool"),
        ({"mask": np.ones(5, bool)}, ValueError, r"mask has shape \(5,\), which does not broadcast to .*\(2, 3, 6\)"),
        ({"mask": np.ones((1, 2, 3, 6), bool)}, ValueError, "does not broadcast"),
        ({"mask": np.ones((3, 2, 6), bool)}, ValueError, "does not broadcast"),
        ({"mask": [True] * 6}, TypeError, "mask must be a numpy.ndarray or a cupy.ndarray"),
        ({"mask": np.ones(6, bool), "lengths": [1, 2]}, ValueError, "mask and lengths are both given"),
        ({"lengths": [1.0, 2.0]}, TypeError, "lengths must be integers, got dtype float64"),
        ({"lengths": [True, False]}, TypeError, "lengths must be integers, got dtype bool"),
        ({"lengths": [1]}, ValueError, r"lengths has shape \(1,\); needed is one for each sample, \(2,\)"),
        ({"lengths": [[1, 2]]}, ValueError, r"lengths has shape \(1, 2\)"),
        ({"lengths": [1, 7]}, ValueError, r"lengths must be 0 to 6, the size of the last axis, got \[1, 7\]"),
        ({"lengths": [-1, 6]}, ValueError, "lengths must be 0 to 6"),
        ({"lengths": 5}, TypeError, "lengths must be a numpy.ndarray or a cupy.ndarray"),
    ],
)  # fmt: skip
def test_refusals(backend: Backend, options: dict[str, Any], error: type, message: str) -> None:
    """Nothing has been written then."""
    given = {n: backend.array(a) if n == "mask" and isinstance(a, np.ndarray) else a for n, a in options.items()}
    x, mean, var = (backend.array(np.ones(shape, np.float32)) for shape in ((2, 3, 6), 3, 3))
    out = backend.array(np.full((2, 3, 6), 7, np.float32))
    for call in (cn.instance_norm, cn.instance_norm_forward):
        with pytest.raises(error, match=message):
            call(x, running_mean=mean, running_var=var, out=out, **given)
    with pytest.raises(error, match=message):
        cn.moments(x, **given)
    for array, value in ((out, 7), (mean, 1), (var, 1)):
        assert (backend.host(array) == value).all()


def test_double_backward_is_refused(backend: Backend, rng: np.random.Generator) -> None:
    x = backend.array(rng.normal(size=(2, 3, 6)))
    statistics = backend.array(np.ones(3))
    for options in ({}, {"running_mean": statistics, "running_var": statistics, "use_input_stats": False}):
        _, saved = cn.instance_norm_forward(x, lengths=[3, 4], **options)
        with pytest.raises(ValueError, match="no double backward of a forward with a mask or lengths"):
            cn.instance_norm_double_backward(x, None, None, x, saved)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 5)], ids=str)
def test_empty_inputs(backend: Backend, shape: tuple[int, ...]) -> None:
    x = backend.array(np.zeros(shape, np.float32))
    y, saved = cn.instance_norm_forward(x, mask=backend.array(np.ones(shape[2:], bool)))
    assert y.shape == shape
    assert cn.instance_norm_backward(y, saved)[0].shape == shape
    assert (backend.host(cn.moments(x, lengths=[0] * shape[0]).count) == 0).all()


def test_broadcast_masks_are_not_copied(backend: Backend) -> None:
    """The state for the backward has the mask itself."""
    mask = backend.array(np.ones((1, 1, 6, 5), bool))
    _, saved = cn.instance_norm_forward(backend.array(np.zeros((4, 3, 6, 5), np.float32)), mask=mask)
    assert saved.mask.shape == (4, 3, 6, 5) and saved.mask.strides[:2] == (0, 0)
    if backend.device == "cpu":
        assert np.shares_memory(saved.mask, mask)
    assert math.prod(saved.mask.strides[2:]) == 5


def test_bytes_that_are_viewed_as_bool(backend: Backend, rng: np.random.Generator) -> None:
    """As masks of images often are: 255 counts like 1."""
    mask = rng.random((9, 80)) < 0.5
    odd = np.where(mask, 255, 0).astype(np.uint8).view(bool)
    x, dy = (backend.array(rng.normal(size=(2, 3, 9, 80)).astype(np.float32)) for _ in range(2))
    y, saved = cn.instance_norm_forward(x, mask=backend.array(mask))
    other, kept = cn.instance_norm_forward(x, mask=backend.array(odd))
    assert_same(backend.host(other), backend.host(y))
    for a, b in zip(cn.instance_norm_backward(dy, saved), cn.instance_norm_backward(dy, kept), strict=True):
        assert a is b is None or (backend.host(a) == backend.host(b)).all()
    assert_equal(backend.host(cn.moments(x, mask=backend.array(odd)).count), np.full((2, 3), mask.sum()))


def test_out_may_not_overlap_the_mask(backend: Backend) -> None:
    """Neither in the forward nor in the backward, which reads it again."""
    memory = backend.array(np.zeros(960, np.uint8))
    mask, out = memory[:240].view(bool).reshape(2, 3, 40), memory.view(np.float32).reshape(2, 3, 40)
    x = backend.array(np.ones((2, 3, 40), np.float32))
    with pytest.raises(ValueError, match="out overlaps mask"):
        cn.instance_norm(x, mask=mask, out=out)
    y, saved = cn.instance_norm_forward(x, mask=mask)
    with pytest.raises(ValueError, match="out overlaps mask"):
        cn.instance_norm_backward(y, saved, out=out)


@pytest.mark.full(simt=lambda given: given["input"] != "float32")
@pytest.mark.parametrize("input", ["float32", "float16", "uint16"])
def test_float64_results_have_float64_statistics(backend: Backend, input: str, rng: np.random.Generator) -> None:
    """Also where the moments are computed by themselves."""
    x, mask = (rng.normal(size=(2, 3, 90)) * 50 + 500).astype(input), rng.random(90) < 0.6
    y = cn.instance_norm(backend.array(x), mask=backend.array(mask), dtype="float64")
    assert_within(backend.host(y), Exact(x, np.broadcast_to(mask, x.shape)).y, 1e-12)


@pytest.mark.parametrize("lengths", [np.array(3), [[1, 2], [3]], [2**64, 1], np.zeros((2, 0), int)], ids=str)
def test_odd_lengths_are_refused(backend: Backend, lengths: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="lengths"):
        cn.instance_norm(backend.array(np.ones((2, 3, 6), np.float32)), lengths=lengths)
