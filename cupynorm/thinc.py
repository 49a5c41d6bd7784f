"""A layer for thinc, the library that spaCy is built on: `pip install 'cupynorm[thinc]'`."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from thinc.api import Model

from ._checks import check_activation, check_count, check_eps, check_number, kind_of
from ._types import Array
from .functional import instance_norm_backward, instance_norm_forward


class _Changes:
    """Change the arrays of models, one change at a time: thinc's threads share a model.

    The lock is held for a few additions of (nI,) arrays at a time, never while planes are computed. A signal handler
    may run in the middle of a change; the changes that it requests are made right after that one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.due: deque[Callable[[], None]] = deque()  # for the thread that holds the lock

    def make(self, change: Callable[[], None]) -> None:
        with self.lock:
            outermost = not self.due
            try:
                self.due.append(change)
                while outermost and self.due:
                    self.due[0]()
                    self.due.popleft()
            finally:
                if outermost:
                    self.due.clear()


_changes = _Changes()


def _after_fork() -> None:
    global _changes  # noqa: PLW0603
    _changes = _Changes()  # another thread of the parent may hold the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def InstanceNorm(  # noqa: N802  # layers of thinc are functions with the names of classes
    nd: int,
    nI: int | None = None,  # noqa: N803  # thinc's name
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    affine: bool = True,
    track_running_stats: bool = False,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Model[Array, Array]:
    """Instance normalisation as a layer of thinc.

    Input and output are arrays (N, nI, *spatial) of float32 or float16 on the model's device; a layer without
    parameters and statistics takes any array that `cupynorm.instance_norm` takes. `backprop` uses the statistics and
    weights of its own forward, so calls of several threads do not mix, and it may be called after the weights have been
    updated. The input must be unchanged until then.

    In config files write `@layers = "cupynorm.InstanceNorm.v1"`; no import is needed.

    Args:
        nd: number of spatial axes, at least 1.
        nI: number of channels; None takes it from the data passed to `initialize`.
        eps: added to the variance, not negative.
        momentum: weight of a new batch in the running statistics.
        affine: if True, the layer has parameters "G" (initially ones) and "b" (zeros), both (nI,), like thinc's
            LayerNorm.
        track_running_stats: if True, keep "running_mean" (initially zeros) and "running_var" (ones; unbiased), both
            (nI,), and use them instead of the input's own statistics if is_train is False. thinc keeps them as
            parameters without a gradient: they are saved, copied and moved with the model, and no optimiser changes
            them. A forward with is_train replaces them by new arrays, both at once, after everything else has
            succeeded.
        activation, negative_slope: fused activation, as in `cupynorm.instance_norm`.

    Raises:
        TypeError, ValueError: here, at `initialize` or at a call: an argument has the wrong type or value; X has
            another number of axes or channels, or the model has not been initialized; see also
            `cupynorm.instance_norm`. Nothing has been changed then.
    """
    check_activation(activation)
    nI = None if nI is None else check_count(nI, "nI", 0)  # noqa: N806
    attrs = {
        "nd": check_count(nd, "nd", 1),
        "eps": check_eps(eps),
        "momentum": check_number(momentum, "momentum"),
        "activation": activation,
        "negative_slope": check_number(negative_slope, "negative_slope"),
    }
    names = ("G", "b") * bool(affine) + ("running_mean", "running_var") * bool(track_running_stats)
    return Model(
        "instancenorm",
        forward,
        init=init,
        dims={"nI": nI, "nO": nI},
        params=dict.fromkeys(names),
        attrs=attrs,
    )


def init(model: Model[Array, Array], X: Any = None, Y: Any = None) -> None:  # noqa: N803
    """Find the number of channels and allocate the parameters, in place of existing ones."""
    sample = X if X is not None else Y
    if sample is not None:
        _check(model, sample)
        model.set_dim("nI", sample.shape[1])
        model.set_dim("nO", sample.shape[1])
    if not model.param_names:
        return
    size = model.get_dim("nI")
    for name in model.param_names:
        value = model.ops.alloc1f(size)
        value += name in ("G", "running_var")
        model.set_param(name, value)


def _check(model: Model[Array, Array], X: Any) -> None:  # noqa: N803
    kind_of(X, "X")
    rank, size = model.attrs["nd"], model.maybe_get_dim("nI")
    if X.ndim != rank + 2 or (size is not None and X.shape[1] != size):
        axes = ", ".join(f"d{i}" for i in range(rank))
        raise ValueError(f"X must be (N, {'nI' if size is None else size}, {axes}), got shape {X.shape}")


def forward(model: Model[Array, Array], X: Any, is_train: bool) -> tuple[Any, Callable[[Any], Any]]:  # noqa: N803
    _check(model, X)
    unset = [name for name in model.param_names if not model.has_param(name)]
    if unset:
        raise ValueError(f"the model has no {', '.join(unset)} yet: call initialize, with X or with nI given")
    attrs = model.attrs
    with _changes.lock:
        own = {name: model.get_param(name) for name in model.param_names}
    if is_train:  # optimisers write into the arrays themselves
        own |= {name: own[name].copy() for name in ("G", "b") if name in own}
    use_input_stats = is_train or "running_mean" not in own
    mean, var = own.get("running_mean"), own.get("running_var")
    updated = is_train and mean is not None and attrs["momentum"] != 0
    if updated:  # other threads may update them, too: compute this batch's statistics first, in new arrays
        mean, var = model.ops.xp.zeros_like(mean), model.ops.xp.zeros_like(var)
    Y, saved = instance_norm_forward(  # noqa: N806
        X,
        own.get("G"),
        own.get("b"),
        eps=attrs["eps"],
        running_mean=mean,
        running_var=var,
        use_input_stats=use_input_stats,
        momentum=1.0 if updated else 0.0,
        activation=attrs["activation"],
        negative_slope=attrs["negative_slope"],
    )

    def move() -> None:
        moved = {
            name: (1 - attrs["momentum"]) * model.get_param(name) + attrs["momentum"] * new
            for name, new in (("running_mean", mean), ("running_var", var))
        }
        for name, value in moved.items():
            model.set_param(name, value)

    if updated and X.shape[0]:
        _changes.make(move)

    def backprop(dY: Any) -> Any:  # noqa: N803
        dX, *gradients = instance_norm_backward(dY, saved)  # noqa: N806

        def add() -> None:
            for name, gradient in zip(("G", "b"), gradients, strict=True):
                if gradient is not None:
                    model.inc_grad(name, gradient)

        _changes.make(add)
        return dX

    return Y, backprop
