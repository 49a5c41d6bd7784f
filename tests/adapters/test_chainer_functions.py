"""The Chainer adapter's functions: values, derivatives of all orders, refusals; on a GPU the same tests with CuPy."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.compare import assert_equal

if importlib.util.find_spec("chainer") is None:
    pytest.skip("needs Chainer (docs/guide/chainer.md)", allow_module_level=True)

from helpers.chainers import AFFINE, DTYPES, Send, host, normal

import cupynorm.chainer as cnc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # setuptools' on pkg_resources
    import chainer
    import chainer.functions as F  # noqa: N812
    from chainer import gradient_check

pytestmark = [pytest.mark.chainer, pytest.mark.usefixtures("seeded")]

#: For results of order one: analytic gradients in this dtype, numeric ones in float64.
TOLERANCE = {"float16": 4e-2, "float32": 2e-4, "float64": 2e-6}


@pytest.mark.parametrize("affine", AFFINE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3, 7), (1, 2, 5, 6), (4, 3, 5, 6), (2, 3, 3, 4, 5)], ids=str)
def test_values(
    send: Send, rng: np.random.Generator, shape: tuple[int, ...], dtype: str, affine: tuple[bool, bool]
) -> None:
    """Variables or arrays in, a Variable out; values, gradients and averages against extended precision."""
    x, gy = (2 + normal(rng, *shape)).astype(dtype), normal(rng, *shape, dtype=dtype)
    gamma, beta = (normal(rng, shape[1], dtype=dtype) if given else None for given in affine)
    mean, var = normal(rng, shape[1], dtype=dtype), (1 + rng.random(shape[1])).astype(dtype)
    given = [None if a is None else chainer.Variable(send(a)) for a in (x, gamma, beta)]
    running = [send(mean.copy()), send(var.copy())]
    y = cnc.instance_normalization(*given, running_mean=running[0], running_var=running[1], decay=0.8)
    assert isinstance(y, chainer.Variable)
    assert (y.shape, y.dtype) == (shape, np.dtype(dtype))
    reference.assert_close(host(y), reference.forward(x, gamma, beta, eps=2e-5))
    for actual, expected in zip(running, reference.moved(mean, var, x, 0.2), strict=True):
        reference.assert_close(host(actual), expected)
    plain = cnc.instance_normalization(*(None if v is None else v.array for v in given))
    assert_equal(host(plain), host(y))
    y.grad = send(gy)
    y.backward()
    for variable, expected in zip(given, reference.backward(gy, x, gamma, eps=2e-5), strict=False):
        if variable is not None:
            assert variable.grad.dtype == variable.dtype
            reference.assert_close(host(variable.grad), expected, terms=x.size // variable.size)

    fixed = [None if v is None else chainer.Variable(v.array) for v in given]
    y = cnc.fixed_instance_normalization(*fixed, send(mean), send(var))
    reference.assert_close(host(y), reference.forward(x, gamma, beta, eps=2e-5, running=(mean, var)))
    y.grad = send(gy)
    y.backward()
    expected = reference.backward(gy, x, gamma, eps=2e-5, running=(mean, var))
    for variable, gradient in zip(fixed, expected, strict=False):
        if variable is not None:
            reference.assert_close(host(variable.grad), gradient, terms=x.size // variable.size)


def _arguments(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, affine: tuple[bool, bool]
) -> tuple[list[np.ndarray], Callable[..., tuple[Any, Any, Any]]]:
    """Return x and the parameters in use, and a function that maps them to (x, gamma, beta)."""
    arrays = [normal(rng, *shape, dtype=dtype)]
    arrays += [normal(rng, shape[1], dtype=dtype) for given in affine if given]

    def named(x: Any, *parameters: Any) -> tuple[Any, Any, Any]:
        left = iter(parameters)
        gamma, beta = (next(left) if given else None for given in affine)
        return x, gamma, beta

    return arrays, named


@pytest.mark.parametrize("mode", ["train", "fixed"])
@pytest.mark.parametrize("affine", AFFINE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("spatial", [(9,), (3, 4), (2, 3, 3)], ids=len)
def test_gradients(
    send: Send, rng: np.random.Generator, spatial: tuple[int, ...], batch: int, dtype: str,
    affine: tuple[bool, bool], mode: str,
) -> None:  # fmt: skip
    """First and second derivatives against finite differences in float64."""
    shape = (batch, 3, *spatial)
    arrays, named = _arguments(rng, shape, dtype, affine)
    mean, var = normal(rng, 3, dtype=dtype), (1 + rng.random(3)).astype(dtype)

    def function(*given: Any) -> Any:
        x, gamma, beta = named(*given)
        if mode == "train":
            return cnc.instance_normalization(x, gamma, beta)
        statistics = (send(v).astype(x.dtype) for v in (mean, var))
        return cnc.fixed_instance_normalization(x, gamma, beta, *statistics)

    gy = send(normal(rng, *shape, dtype=dtype))
    given = tuple(send(a) for a in arrays)
    options = {"dtype": np.float64, "eps": 1e-4, "atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    gradient_check.check_backward(function, given, gy, **options)
    ggs = tuple(send(normal(rng, *a.shape, dtype=dtype)) for a in arrays)
    gradient_check.check_double_backward(function, given, gy, ggs, **options)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("mode", ["train", "fixed"])
@pytest.mark.parametrize("affine", AFFINE, ids=str)
def test_third_derivatives(
    send: Send, rng: np.random.Generator, affine: tuple[bool, bool], mode: str, dtype: str
) -> None:
    """The function under test is the gradient itself: its double backward is the third derivative."""
    arrays, named = _arguments(rng, (3, 2, 3, 4), dtype, (affine[0], False))
    gy = normal(rng, 3, 2, 3, 4, dtype=dtype)
    mean, var = normal(rng, 2, dtype=dtype), (1 + rng.random(2)).astype(dtype)

    def gradient(*given: Any) -> Any:
        x, gamma, _ = named(*given[:-1])
        beta = chainer.Variable(x.xp.zeros(2, x.dtype)) if affine[1] else None
        if mode == "train":
            y = cnc.instance_normalization(x, gamma, beta)
        else:
            y = cnc.fixed_instance_normalization(x, gamma, beta, *(send(v).astype(x.dtype) for v in (mean, var)))
        inputs = [v for v in (x, gamma, beta) if v is not None]
        return chainer.grad([y], inputs, [given[-1]], enable_double_backprop=True)

    given = tuple(send(a) for a in (*arrays, gy))
    outputs = [(3, 2, 3, 4), *([(2,)] * sum(affine))]
    gradients = tuple(send(normal(rng, *shape, dtype=dtype)) for shape in outputs)
    ggs = tuple(send(normal(rng, *a.shape, dtype=dtype)) for a in given)
    tolerance = {"float16": 0.1, "float64": 1e-5}[dtype]
    gradient_check.check_double_backward(
        gradient, given, gradients, ggs, dtype=np.float64, eps=1e-4, atol=tolerance, rtol=tolerance
    )


def test_loss_of_second_gradients(send: Send, rng: np.random.Generator) -> None:
    """gy depends on x itself, at every order: up to the fourth derivative."""
    weights = send(normal(rng, 2, 2, 6, dtype=np.float64))
    gamma = send(normal(rng, 2, dtype=np.float64))

    def function(x: Any) -> Any:
        y = cnc.instance_normalization(x, gamma, None)
        (first,) = chainer.grad([F.sum(weights * y**3)], [x], enable_double_backprop=True)
        (second,) = chainer.grad([F.sum(first**2)], [x], enable_double_backprop=True)
        return second

    x = send(normal(rng, 2, 2, 6, dtype=np.float64))
    gy, ggx = (send(normal(rng, 2, 2, 6, dtype=np.float64)) for _ in range(2))
    gradient_check.check_backward(function, x, gy, eps=1e-5, atol=1e-4, rtol=1e-5)
    gradient_check.check_double_backward(function, x, gy, ggx, eps=1e-5, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("affine", AFFINE, ids=str)
def test_gradients_of_fixed_statistics(
    send: Send, rng: np.random.Generator, affine: tuple[bool, bool], dtype: str
) -> None:
    arrays, named = _arguments(rng, (3, 2, 3, 4), dtype, affine)
    arrays += [normal(rng, 2, dtype=dtype), (1 + rng.random(2)).astype(dtype)]

    def function(*given: Any) -> Any:
        return cnc.fixed_instance_normalization(*named(*given[:-2]), *given[-2:])

    given = tuple(send(a) for a in arrays)
    constant = function(*given)
    assert_equal(host(function(*map(chainer.Variable, given))), host(constant))
    gy, *ggs = (send(normal(rng, *a.shape, dtype=dtype)) for a in (arrays[0], *arrays))
    options = {"dtype": np.float64, "eps": 1e-4, "atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    gradient_check.check_backward(function, given, gy, **options)
    gradient_check.check_double_backward(function, given, gy, tuple(ggs), **options)


def test_parameters_per_sample(send: Send, rng: np.random.Generator) -> None:
    """Adaptive instance normalisation: gamma and beta of (N, C)."""
    given = tuple(send(normal(rng, *shape, dtype=np.float64)) for shape in [(3, 2, 5, 4), (3, 2), (3, 2)])
    ggs = tuple(send(normal(rng, *a.shape, dtype=np.float64)) for a in given)
    gy = send(normal(rng, 3, 2, 5, 4, dtype=np.float64))
    gradient_check.check_backward(cnc.instance_normalization, given, gy, eps=1e-4, atol=1e-6, rtol=1e-6)
    gradient_check.check_double_backward(cnc.instance_normalization, given, gy, ggs, eps=1e-4, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", ["(N, H, W, C) seen as (N, C, H, W)", "every other channel"])
def test_noncontiguous_arrays(send: Send, rng: np.random.Generator, order: str) -> None:
    if order.startswith("("):
        x = send(normal(rng, 2, 5, 6, 3, dtype=np.float64)).transpose(0, 3, 1, 2)
    else:
        x = send(normal(rng, 2, 6, 5, 6, dtype=np.float64))[:, ::2]
    given = (x, *(send(normal(rng, 3, dtype=np.float64)) for _ in range(2)))
    gy = send(normal(rng, 2, 3, 5, 6, dtype=np.float64))
    gradient_check.check_backward(cnc.instance_normalization, given, gy, eps=1e-4, atol=1e-6, rtol=1e-6)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[np.ndarray, np.ndarray], Any]]] = {
    "two dimensions": (ValueError, "at least 3 dimensions", lambda x, c: cnc.instance_normalization(x[0, 0], c, c)),
    "one element": (ValueError, "more than 1 spatial", lambda x, c: cnc.instance_normalization(x[..., :1, :1], c, c)),
    "integers": (TypeError, "x has dtype int64", lambda x, c: cnc.instance_normalization(x.astype(int), c, c)),
    "gamma's shape": (ValueError, "gamma has shape", lambda x, c: cnc.instance_normalization(x, c[1:], c)),
    "beta's dtype": (TypeError, "beta has dtype", lambda x, c: cnc.instance_normalization(x, c, c.astype(np.float64))),
    "one average": (ValueError, "go together", lambda x, c: cnc.instance_normalization(x, c, c, running_mean=c)),
    "decay": (TypeError, "decay must be", lambda x, c: cnc.instance_normalization(x, c, c, decay="0.9")),
    "eps": (ValueError, "eps must not", lambda x, c: cnc.instance_normalization(x, c, c, eps=-1)),
    "no var": (ValueError, "mean and var", lambda x, c: cnc.fixed_instance_normalization(x, c, c, c, None)),
    "mean's shape": (ValueError, "mean has shape", lambda x, c: cnc.fixed_instance_normalization(x, c, c, c[1:], c)),
    "var's dtype": (
        TypeError,
        "var has dtype",
        lambda x, c: cnc.fixed_instance_normalization(x, c, c, c, c.astype(np.float64)),
    ),
    "trained mean's shape": (
        ValueError,
        "mean has shape",
        lambda x, c: cnc.fixed_instance_normalization(x, c, c, chainer.Variable(c[1:]), c),
    ),
    "a list": (TypeError, "list", lambda x, c: cnc.instance_normalization(x.tolist(), c, c)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_functions_refuse_invalid_arguments(rng: np.random.Generator, case: str) -> None:
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call(normal(rng, 2, 3, 4, 4), np.ones(3, np.float32))
