"""Planes that are spread over several processes, each of which holds a part of every plane.

A communicator `comm` has `allgather(object) -> list`: the objects of all processes, in the order of their ranks. Those
of mpi4py have it, one of ChainerMN stands for its `mpi_comm`, and `NCCL` wraps one of cupyx.distributed. A forward and
a backward exchange a few numbers of each plane, once each. Each process merges those of all ranks in the order of the
ranks, so all have the same bits.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import devices
from ._checks import check_count, device_of, known_place
from ._types import Array, ForwardCall, ForwardResult, Gradients, Saved
from .backend import backend_of
from .functional import check_backward, check_forward, forward, gradient_sums, run_backward, run_forward
from .statistics import GradientSums, Numbers


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


class Exchange:
    """The exchange of one forward or backward, as a context around the whole call.

    If the call raises before this rank has sent its numbers, it sends the reason instead, so that the ranks that wait
    for them raise, too. Without a communicator there is no exchange.
    """

    def __init__(self, comm: Communicator | None):
        self.comm, self._sent = comm, comm is None

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not self._sent:
            with suppress(Exception):  # the error at hand says what is wrong
                self._gather(_Failure(f"{type(error).__name__}: {error}"))

    def _gather(self, own: Any) -> list[Any]:
        assert self.comm is not None
        self._sent = True
        return self.comm.allgather(own)

    def forward(self, call: ForwardCall, place: str | None = None) -> ForwardResult:
        """Check and run a forward, with an exchange on this rank's part of each plane."""
        if self.comm is None:
            return forward(call, place)
        place = check_forward(call, place, part=True)
        if call.moments is not None:
            raise ValueError("over a comm moments are merged; needed are moments=None")
        backend = backend_of(place)
        call.moments = self.merged(backend.moments(call.x, call.mask, call.result_dtype))
        return run_forward(call, backend)

    def backward(self, dy: Array, saved: Saved, out: Array | None, sums: GradientSums | None = None) -> Gradients:
        """Check and run a backward. With an exchange dweight and dbias are of this rank's part."""
        place = check_backward(dy, saved, out, sums)
        if self.comm is None:
            return run_backward(place, dy, saved, out, sums)
        if sums is not None:
            raise ValueError("over a comm sums are merged; needed are sums=None")
        own = gradient_sums(dy, saved)
        return run_backward(place, dy, saved, out, self.merged(own), own)

    def merged(self, own: Numbers) -> Numbers:
        """Return the numbers of whole planes, from this rank's own ones: the same bits on every rank.

        Raises:
            RuntimeError: a rank has failed, and sent the reason.
            ValueError: the ranks' planes differ in number. Every rank raises these.
        """
        arrays = vars(own)
        place = known_place(next(iter(arrays.values())))
        on_device = place != "cpu" and getattr(self.comm, "on_device", False)
        found = self._gather(own if on_device else type(own)(*map(devices.to_host, arrays.values())))
        failed = [f"rank {rank}: {each.message}" for rank, each in enumerate(found) if isinstance(each, _Failure)]
        if failed:
            raise RuntimeError(f"normalising over {len(found)} processes failed on {'; on '.join(failed)}")
        _check_shapes([next(iter(vars(each).values())).shape for each in found])
        first, *others = found
        total: Numbers = first.merge(*others)
        if on_device or place == "cpu":
            return total
        return type(own)(*(devices.to_device(array, place) for array in vars(total).values()))


def _check_shapes(shapes: list[tuple[int, ...]]) -> None:
    """Check that the ranks have the same (N, C)."""
    if len(set(shapes)) > 1:
        told = ", ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(f"every rank needs a part of each plane, so all need the same (N, C); they are {told}")


class NCCL:
    """A communicator over NCCL, for layers on GPUs: the numbers of planes do not pass through the host.

    Args:
        backend: a backend of cupyx.distributed (`cupyx.distributed.init_process_group`).
        size: the number of ranks; None takes it from the backend.
        check: compare the ranks' shapes before each exchange, for which the host waits for the GPU. If False, nothing
            waits, and ranks whose shapes differ, or of which one fails, hang or get wrong numbers.
    """

    on_device = True

    def __init__(self, backend: Any, size: int | None = None, *, check: bool = True):
        if not callable(getattr(backend, "all_gather", None)):
            raise TypeError(f"backend must be one of cupyx.distributed, with all_gather, got {backend!r}")
        # cupyx has no public name for it.
        self._size = int(backend._n_devices) if size is None else check_count(size, "size", 1)
        self._backend, self.check = backend, bool(check)

    def _gather(self, xp: Any, own: Array) -> Array:
        """Return the arrays of all ranks, (ranks, *own.shape). xp: CuPy, or NumPy in tests."""
        found = xp.empty((self._size, *own.shape), own.dtype)
        self._backend.all_gather(own, found, own.size)
        return found

    def allgather(self, own: Any) -> list[Any]:
        """Return the Moments or GradientSums of all ranks.

        Raises:
            RuntimeError: a rank has failed. Every rank raises this.
            ValueError: the ranks' kinds or shapes differ. Every rank raises this.
        """
        arrays = [] if isinstance(own, _Failure) else [*vars(own).values()]
        xp: Any = np if arrays and isinstance(arrays[0], np.ndarray) else importlib.import_module("cupy")
        with (device_of(arrays[0]) if arrays else None) or nullcontext():
            if self.check or not arrays:
                self._compare(xp, arrays)
            numbers = xp.stack([array.view(np.float64) for array in arrays])
            return [
                type(own)(*(row.view(array.dtype) for row, array in zip(each, arrays, strict=True)))
                for each in self._gather(xp, numbers)
            ]

    def _compare(self, xp: Any, arrays: list[Array]) -> None:
        """Check that all ranks have arrays of the same number and shapes."""
        header = [len(arrays), *(arrays[0].shape if arrays else (0, 0))]
        headers = devices.to_host(self._gather(xp, xp.asarray(np.array(header, np.int64)))).tolist()
        failed = [str(rank) for rank, (number, *_) in enumerate(headers) if not number]
        if failed:
            raise RuntimeError(f"normalising over {self._size} processes failed on rank {', '.join(failed)}, see there")
        if len({number for number, *_ in headers}) > 1:
            raise ValueError("some ranks run a forward and others a backward")
        _check_shapes([(n, c) for _, n, c in headers])
