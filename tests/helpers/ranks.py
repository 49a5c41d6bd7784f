"""Threads as the ranks of a communicator, and a small training run that any number of ranks can share."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import cupynorm as cn


class Ranks:
    """The communicators of several threads. Objects are pickled, as between processes."""

    def __init__(self, size: int):
        self.size = size
        self.exchanged: list[list[Any]] = []
        self._sent: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> Any:
        return _Rank(self, rank)

    def run(self, function: Callable[[Any, int], Any]) -> list[Any]:
        """Return function(comm, rank) of each rank, or the exception that it raised."""
        found: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            try:
                found[rank] = function(self.of(rank), rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class _Rank:
    def __init__(self, ranks: Ranks, rank: int):
        self._ranks, self.rank = ranks, rank

    def allgather(self, sendobj: Any) -> list[Any]:
        ranks = self._ranks
        ranks._sent[self.rank] = pickle.dumps(sendobj)
        ranks._barrier.wait()
        found = [pickle.loads(each) for each in ranks._sent]
        ranks._barrier.wait()
        if self.rank == 0:
            ranks.exchanged.append(found)
        return found


def train(comm: Any, part: slice, steps: int = 5) -> tuple[list[float], list[np.ndarray]]:
    """Train a network of two pointwise convolutions and a layer between them on a part of the positions of each image.

    Return the losses of all positions, and the parameters at the end.
    """
    rng = np.random.default_rng(7)
    x, target = rng.normal(size=(2, 2, 5, 60)) + 3
    x, target = np.ascontiguousarray(x[..., part]), np.ascontiguousarray(target[..., part])
    first, second = rng.normal(size=(2, 5, 5))
    layer = cn.InstanceNorm1d(
        5, affine=True, track_running_stats=True, dtype="float64", device="cpu", activation="silu", comm=comm
    )

    def of_all(*own: Any) -> list[Any]:
        return [*own] if comm is None else [sum(each) for each in zip(*comm.allgather(own), strict=True)]

    losses = []
    for _ in range(steps):
        h = np.einsum("dc,ncs->nds", first, x)
        a = layer.forward(h)
        difference = np.einsum("dc,ncs->nds", second, a) - target
        layer.cleargrads()
        dh = layer.backward(np.einsum("dc,nds->ncs", second, difference))
        own = (
            (difference**2).sum(), np.einsum("nds,ncs->dc", difference, a), np.einsum("nds,ncs->dc", dh, x),
            layer.weight.grad, layer.bias.grad,
        )  # fmt: skip
        loss, dsecond, dfirst, dweight, dbias = of_all(*own)
        losses.append(float(loss))
        first, second = first - 1e-4 * dfirst, second - 1e-4 * dsecond
        layer.weight.data[...] -= 1e-4 * dweight
        layer.bias.data[...] -= 1e-4 * dbias
    parameters = [first, second, layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var]
    return losses, [np.asarray(p) for p in parameters]
