"""Planes that are spread over several processes, each of which holds a part of every plane.

A communicator `comm` has `allgather(object) -> list`: the objects of all processes, in the order of their ranks. Those
of mpi4py have it, one of ChainerMN stands for its `mpi_comm`, and `NCCL` wraps one of cupyx.distributed. A forward and
a backward exchange a few numbers of each plane, once each. Each process merges those of all ranks in the order of the
ranks, so all have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from . import devices
from ._checks import known_place
from ._types import Array, ForwardCall, ForwardResult, Gradients, Saved
from .backend import backend_of
from .functional import check_backward, run_backward, run_forward
from .statistics import GradientSums, Moments

Numbers = TypeVar("Numbers", Moments, GradientSums)


class Communicator(Protocol):
    """What this module needs of a communicator."""

    def allgather(self, sendobj: Any, /) -> list[Any]:
        """Return the objects that all ranks have passed, in the order of the ranks."""


class _Failure(NamedTuple):
    """What a rank sends that cannot take part."""

    message: str


def check_communicator(comm: Any) -> Communicator | None:
    """Return a communicator: for one of ChainerMN, its mpi_comm."""
    if comm is None:
        return None
    comm = getattr(comm, "mpi_comm", comm)
    if not callable(getattr(comm, "allgather", None)):
        raise TypeError(
            f"comm must have allgather(object) -> list, as the communicators of mpi4py have it, got {comm!r}; "
            "cupynorm.distributed.NCCL wraps a backend of cupyx.distributed"
        )
    communicator: Communicator = comm
    return communicator


@contextmanager
def failures_told(comm: Communicator | None) -> Iterator[None]:
    """If the block raises, take part in the exchange that the other ranks wait for, so that they raise, too. Without a
    communicator there are none."""
    try:
        yield
    except Exception as error:
        if comm is None:
            raise
        try:
            comm.allgather(_Failure(f"{type(error).__name__}: {error}"))
        except Exception:
            raise error from None  # the first one says what is wrong
        raise


def merged(comm: Communicator, own: Numbers) -> Numbers:
    """Return the numbers of whole planes, from this rank's own ones: the same bits on every rank.

    Raises:
        RuntimeError: a rank has failed, and sent the reason.
        ValueError: the ranks' planes differ in number. Every rank raises these.
    """
    arrays = vars(own)
    place = known_place(next(iter(arrays.values())))
    on_device = place != "cpu" and getattr(comm, "on_device", False)
    sent = own if on_device else type(own)(*(devices.to_host(array) for array in arrays.values()))
    found = comm.allgather(sent)
    failed = [f"rank {rank}: {each.message}" for rank, each in enumerate(found) if isinstance(each, _Failure)]
    if failed:
        raise RuntimeError(f"normalising over {len(found)} processes failed on {'; on '.join(failed)}")
    shapes = {rank: next(iter(vars(each).values())).shape for rank, each in enumerate(found)}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{shape} on rank {rank}" for rank, shape in shapes.items())
        raise ValueError(f"every rank needs a part of each plane, so all need the same (N, C); they are {told}")
    first, *others = found
    total: Numbers = first.merge(*others)
    if on_device or place == "cpu":
        return total
    return type(own)(*(devices.to_device(array, place) for array in vars(total).values()))


def forward(comm: Communicator, prepare: Callable[[], tuple[ForwardCall, str]]) -> ForwardResult:
    """Run a forward on this rank's part of each plane. prepare: check the call, and return it with its place."""
    with failures_told(comm):
        call, place = prepare()
        own = backend_of(place).moments(call.x)
    call.moments = merged(comm, own)
    return run_forward(call, place)


def backward(comm: Communicator, prepare: Callable[[], tuple[Array, Saved, Array | None]]) -> Gradients:
    """Run the backward of such a forward; dweight and dbias are of this rank's part. prepare: return dy, saved and out,
    checked as far as the caller checks them."""
    with failures_told(comm):
        dy, saved, out = prepare()
        place = check_backward(dy, saved, out)
        own = backend_of(place).gradient_sums(dy, saved)
    return run_backward(place, dy, saved, out, merged(comm, own), own)


class NCCL:
    """A communicator over NCCL, for layers on GPUs: the numbers of planes do not pass through the host.

    Args:
        backend: a backend of cupyx.distributed (`cupyx.distributed.init_process_group`).
        check: compare the ranks' shapes before each exchange, for which the host waits for the GPU. If False, nothing
            waits, and ranks whose shapes differ, or of which one fails, hang or get wrong numbers.
    """

    on_device = True

    def __init__(self, backend: Any, *, check: bool = True):
        if not callable(getattr(backend, "all_gather", None)):
            raise TypeError(f"backend must be one of cupyx.distributed, with all_gather, got {backend!r}")
        self._backend, self._size, self.check = backend, int(backend._n_devices), bool(check)

    def _gather(self, own: Array) -> Array:
        """Return the arrays of all ranks, (ranks, *own.shape)."""
        found = _like(own).empty((self._size, *own.shape), own.dtype)
        self._backend.all_gather(own, found, own.size)
        return found

    def allgather(self, own: Any) -> list[Any]:
        """Return the Moments or GradientSums of all ranks.

        Raises:
            RuntimeError: a rank has failed. ValueError: their kinds or shapes differ. Every rank raises these.
        """
        arrays = [] if isinstance(own, _Failure) else [*vars(own).values()]
        if self.check or not arrays:
            self._compare(arrays)
        numbers = np.stack([array.view(np.float64) for array in arrays])
        return [
            type(own)(*(row.view(array.dtype) for row, array in zip(each, arrays, strict=True)))
            for each in self._gather(numbers)
        ]

    def _compare(self, arrays: list[Array]) -> None:
        """Check that all ranks have arrays of the same number and shapes."""
        header = [len(arrays), *(arrays[0].shape if arrays else (0, 0))]
        like = arrays[0] if arrays else None
        headers = devices.to_host(self._gather(_like(like).asarray(np.array(header, np.int64)))).tolist()
        failed = [str(rank) for rank, (number, *_) in enumerate(headers) if not number]
        if failed:
            raise RuntimeError(f"normalising over {self._size} processes failed on rank {', '.join(failed)}, see there")
        if any(header != headers[0] for header in headers):
            told = ", ".join(f"({n}, {c}) on rank {rank}" for rank, (_, n, c) in enumerate(headers))
            raise ValueError(f"every rank needs a part of each plane, so all need the same (N, C); they are {told}")


def _like(array: Array | None) -> Any:
    """Return the module of an array: NumPy or CuPy; CuPy without one."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy
