"""The Chainer adapter with masks, lengths and other dtypes of x; on a GPU the same tests with CuPy."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.compare import assert_equal, assert_within
from helpers.masked import Exact, spoiled
from helpers.ranks import Ranks

if importlib.util.find_spec("chainer") is None:
    pytest.skip("needs Chainer (docs/guide/chainer.md)", allow_module_level=True)

from helpers.chainers import Send, host, normal

import cupynorm.chainer as cnc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # setuptools' on pkg_resources
    import chainer
    import chainer.functions as F  # noqa: N812
    from chainer import gradient_check

pytestmark = [pytest.mark.chainer, pytest.mark.usefixtures("seeded")]

SHAPE = (3, 2, 4, 5)


def mask_of(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return a mask of each sample, that leaves out a third of the positions and all of the last sample."""
    mask = rng.random((shape[0], 1, *shape[2:])) < 2 / 3
    mask[-1] = False
    return mask


@pytest.mark.parametrize("mode", ["train", "fixed"])
def test_values(send: Send, rng: np.random.Generator, mode: str) -> None:
    """Values, gradients and averages, whatever x and gy hold outside of the mask."""
    mask = mask_of(rng)
    whole = np.broadcast_to(mask, SHAPE)
    x, gy = 2 + normal(rng, *SHAPE), normal(rng, *SHAPE)
    gamma, beta, mean, var = normal(rng, 2), normal(rng, 2), normal(rng, 2), (1 + rng.random(2)).astype(np.float32)
    given = [chainer.Variable(send(a)) for a in (spoiled(x, whole, rng), gamma, beta)]
    statistics = [send(mean.copy()), send(var.copy())]
    if mode == "train":
        y = cnc.instance_normalization(
            *given, running_mean=statistics[0], running_var=statistics[1], decay=0.75, mask=send(mask)
        )
    else:
        y = cnc.fixed_instance_normalization(*given, *statistics, mask=chainer.Variable(send(mask)))
    exact = Exact(x, whole, gamma, beta, eps=2e-5, running=(mean, var) if mode == "fixed" else None)
    assert_within(host(y), exact.y, np.where(whole, 1e-5, 0))
    y.grad = send(spoiled(gy, whole, rng))
    y.backward()
    dx, dgamma, dbeta, _ = exact.backward(gy)
    assert_within(host(given[0].grad), dx, np.where(whole, 1e-4, 0))
    assert_within(host(given[1].grad), dgamma, 1e-4)
    assert_within(host(given[2].grad), dbeta, 1e-4)
    if mode == "train":
        counts = exact.count >= 2
        expected = (np.where(counts, exact.mean[..., 0, 0], 0)).sum(0) / counts.sum(0)
        assert_within(host(statistics[0]), 0.75 * mean + 0.25 * expected, 1e-5)


@pytest.mark.parametrize("mode", ["train", "fixed"])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_gradients(
    send: Send, rng: np.random.Generator, affine: tuple[bool, bool], mode: str
) -> None:  # fmt: skip
    """First, second and third derivatives against finite differences."""
    mask, gy = send(mask_of(rng)), send(normal(rng, *SHAPE, dtype=np.float64))
    statistics = [send(normal(rng, 2, dtype=np.float64)), send(1 + rng.random(2))]
    given = tuple(
        send(normal(rng, *shape, dtype=np.float64))
        for shape, there in zip((SHAPE, (2,), (2,)), (True, *affine), strict=True)
        if there
    )

    def function(x: Any, *parameters: Any) -> Any:
        left = iter(parameters)
        gamma, beta = (next(left) if there else None for there in affine)
        if mode == "fixed":
            return cnc.fixed_instance_normalization(x, gamma, beta, *statistics, mask=mask)
        return cnc.instance_normalization(x, gamma, beta, mask=mask)

    options = {"eps": 1e-4, "atol": 2e-5, "rtol": 2e-5}
    gradient_check.check_backward(function, given, gy, **options)
    ggs = tuple(send(normal(rng, *a.shape, dtype=np.float64)) for a in given)
    gradient_check.check_double_backward(function, given, gy, ggs, **options)

    if mode == "fixed":  # then a second gradient is missing where it is 0, which gradient_check does not expect
        return
    inputs = given[: 1 + affine[0]]

    def gradient(*arrays: Any) -> Any:
        *there, gy = arrays
        beta = [chainer.Variable(x.xp.zeros(2, x.dtype)) for x in there[:1] if affine[1]]
        return chainer.grad([function(*there, *beta)], [*there, *beta], [gy], enable_double_backprop=True)

    more = tuple(send(normal(rng, *a.shape, dtype=np.float64)) for a in (*inputs, gy))
    gradient_check.check_double_backward(gradient, (*inputs, gy), ggs, more, **options)


def test_second_derivatives_of_every_position_are_the_kernels(
    send: Send, rng: np.random.Generator
) -> None:  # fmt: skip
    """With a mask of all positions the composed second derivatives are those of the double backward."""
    x, weights = (chainer.Variable(send(normal(rng, *SHAPE, dtype=np.float64))) for _ in range(2))
    gamma = chainer.Variable(send(normal(rng, 2, dtype=np.float64)))
    found = []
    for mask in (None, send(np.ones(SHAPE[2:], bool))):
        y = cnc.instance_normalization(x, gamma, None, mask=mask)
        (first,) = chainer.grad([F.sum(weights * y**3)], [x], enable_double_backprop=True)
        found.append([host(v) for v in chainer.grad([F.sum(first**2)], [x, gamma, weights])])
    for actual, expected in zip(*found, strict=True):
        assert_within(actual, expected, 1e-8 * (1 + np.abs(expected)))


def test_links(send: Send, rng: np.random.Generator) -> None:
    """Lengths, in training and with averages."""
    link = send(cnc.InstanceNormalization1D(2, track_avg_stats=True))
    x, lengths = normal(rng, 3, 2, 7), [7, 3, 1]
    whole = np.broadcast_to(np.arange(7) < np.array(lengths)[:, None, None], x.shape)
    y = link(send(spoiled(x, whole, rng)), lengths=lengths)
    assert_within(host(y), Exact(x, whole, eps=2e-5).y, 1e-5)
    running = host(link.avg_mean), host(link.avg_var)
    with chainer.using_config("train", False):
        y = link(send(spoiled(x, whole, rng)), lengths=lengths)
    expected = np.where(whole, reference.forward(x, eps=2e-5, running=running), 0)
    assert_within(host(y), expected, 1e-5)


def test_integers(send: Send, rng: np.random.Generator) -> None:
    """Camera images; and float16 in, float32 out."""
    images = rng.integers(0, 60000, SHAPE).astype(np.uint16)
    y = cnc.instance_normalization(send(images), None, None, dtype="float32")
    assert y.dtype == np.float32
    reference.assert_close(host(y), reference.forward(images.astype(np.float64), eps=2e-5))
    ones = send(np.ones(2, np.float32))
    y = cnc.fixed_instance_normalization(send(images), None, None, ones, ones, dtype=np.float32)
    assert_within(host(y), images - 1.0, 1)
    half = chainer.Variable(send(normal(rng, *SHAPE, dtype=np.float16)))
    y = cnc.instance_normalization(half, None, None, dtype="float32")
    reference.assert_close(host(y), reference.forward(half.array.astype(np.float64), eps=2e-5))
    (first,) = chainer.grad([F.sum(y**3)], [half], enable_double_backprop=True)
    assert first.dtype == np.float16
    (second,) = chainer.grad([F.sum(first**2)], [half], enable_double_backprop=True)
    assert second.dtype == np.float16 and np.isfinite(host(second)).all()


def test_refusals(send: Send, rng: np.random.Generator) -> None:
    x = send(normal(rng, *SHAPE))
    averages = [send(np.ones(2, np.float32)) for _ in range(2)]
    for options, error, said in (
        ({"mask": send(np.ones(4, np.float32))}, TypeError, "needed is bool"),
        ({"mask": send(np.ones(5, bool)), "lengths": [1, 2, 3]}, ValueError, "both given"),
        ({"lengths": [1, 2, 9]}, ValueError, "lengths must be 0 to 5"),
        ({"dtype": "int8"}, TypeError, "dtype, of the result"),
    ):
        with pytest.raises(error, match=said):
            cnc.instance_normalization(x, None, None, running_mean=averages[0], running_var=averages[1], **options)
    with pytest.raises(TypeError, match="integers need dtype="):
        cnc.instance_normalization(send(np.ones(SHAPE, np.uint8)), None, None)
    for average in averages:
        assert_equal(host(average), 1)


def test_over_several_ranks(rng: np.random.Generator) -> None:
    """Each rank has the mask of its own part; differentiable once."""
    x, mask = normal(rng, 2, 2, 4, 6, dtype=np.float64), rng.random((2, 1, 4, 6)) < 2 / 3
    cut = [slice(0, 1), slice(1, 4)]

    def work(comm: Any, rank: int) -> np.ndarray:
        part = chainer.Variable(x[:, :, cut[rank]].copy())
        y = cnc.instance_normalization(part, None, None, mask=mask[:, :, cut[rank]], comm=comm)
        (first,) = chainer.grad([y], [part], enable_double_backprop=True)
        with pytest.raises(ValueError, match="no double backward"):
            chainer.grad([first], [part])
        return host(y)

    y = np.concatenate(Ranks(len(cut)).run(work), 2)
    assert_within(y, Exact(x, np.broadcast_to(mask, x.shape), eps=2e-5).y, 1e-11)
