"""`warmup`: what calls on arrays of a kind need is compiled before the first of them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from .functional import (
    Array,
    check_activation,
    check_input,
    check_like,
    check_no_activation,
    check_number,
    instance_norm_backward,
    instance_norm_double_backward,
    instance_norm_forward,
    kind_of,
    math_dtype,
)

#: Told before each step, and once at the end: how many steps are done, how many there are, what comes now.
Progress = Callable[[int, int, str], Any]

QUIET = 2.0  # seconds without a word


def warmup(
    x: Array,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Array | None = None,
    double_backward: bool = False,
    progress: bool | Progress | None = None,
) -> None:
    """Compile what calls on arrays like x need; on a GPU, make them ready for CUDA-graph capture.

    On NumPy arrays: the compiled loops for x's dtype and layout, whatever the sizes, the number of threads and the
    parameters: forward, also with out=x, and backward, in training and with running statistics. No such call compiles
    anything afterwards. That takes one to three minutes; the code is kept on disk, in the folder that
    `python -m cupynorm info` names, and later processes load it in a second or two. x is neither read nor written.
    There is nothing to do where NumPy alone computes: without numba, for double backwards, for arrays whose elements
    are not aligned, and for empty ones.

    On CuPy arrays: runs forward and backward, in training and with running statistics, with affine parameters and
    without, on scratch arrays and on the current stream: afterwards every kernel they need is compiled and CuPy's
    memory pool has the blocks they allocate. The contents of x do not matter and are not written.

    What a call allocates beside its results is given back to the pool when it returns, and a graph goes on using it:
    warm up and capture with an allocator of the graph's own, and keep that pool as long as the graph,

        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc), stream:
            cupynorm.warmup(x)
            stream.begin_capture()
            y, saved = cupynorm.instance_norm_forward(x)
            dx, _, _ = cupynorm.instance_norm_backward(dy, saved)
            graph = stream.end_capture()

    An interrupt leaves what has been compiled until then.

    Args:
        x: an array of the shape, dtype, layout and device to come. Of NumPy arrays the sizes do not matter, but the
            number of channels does where they lie side by side, and one position is not what several are.
        activation, negative_slope, residual: of the calls to come; of the residual, too, only the layout matters.
        double_backward: run `instance_norm_double_backward` as well, with all of its gradients given.
        progress: whether to say on stderr how far it is; None: if stderr is a terminal and it takes more than two
            seconds. Or a function (done, total, what), called before each step, and with done = total at the end.

    Raises:
        TypeError, ValueError: x cannot be normalised, the rest does not fit, or a double backward with an activation.
    """
    check_input(x)
    check_activation(activation)
    negative_slope = check_number(negative_slope, "negative_slope")
    if double_backward:
        check_no_activation(activation)
    if residual is not None:
        check_like(residual, "residual", x)
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be None, a bool or a function (done, total, what), got {progress!r}")
    device: Any = nullcontext()
    if kind_of(x, "input") == "numpy":
        from . import cpu

        steps = cpu.rehearsals(x, activation, negative_slope, residual)
    else:
        device = x.device
        steps = _calls(x, activation, negative_slope, residual, double_backward)
    if progress is None or isinstance(progress, bool):
        progress = _speaker(progress)
    with device:
        for done, (what, step) in enumerate(steps):
            progress(done, len(steps), what)
            step()
    progress(len(steps), len(steps), "done")


def _calls(
    x: Array, activation: str | None, negative_slope: float, residual: Array | None, double_backward: bool
) -> list[tuple[str, Callable[[], Any]]]:
    """The calls to run on a GPU, each with its name."""
    import cupy

    def call(use_input_stats: bool, affine: bool) -> None:
        ones = cupy.ones(x.shape[1], math_dtype(x.dtype))
        parameter = ones if affine else None
        dy = cupy.zeros_like(x)
        y_saved = instance_norm_forward(
            x, parameter, parameter, running_mean=ones.copy(), running_var=ones.copy(),
            use_input_stats=use_input_stats, activation=activation, negative_slope=negative_slope, residual=residual,
        )  # fmt: skip
        gradients = [instance_norm_backward(dy, y_saved[1])]  # held: the pool is to have the blocks of all of them
        if double_backward:
            gradients += [instance_norm_double_backward(dy, parameter, parameter, dy, y_saved[1])]

    calls: list[tuple[str, Callable[[], Any]]] = []
    for use_input_stats in (True, False) if math.prod(x.shape[2:]) > 1 else (False,):
        for affine in (False, True):
            what = f"{'training' if use_input_stats else 'running statistics'}{', affine' if affine else ''}"
            calls.append((what, partial(call, use_input_stats, affine)))
    return calls


def _speaker(wanted: bool | None) -> Progress:
    """Says on stderr what is being done and how far it is, whenever that is something else; a line each serves logs,
    notebooks and terminals alike."""
    quiet = QUIET if wanted is None else 0.0
    speaks = sys.stderr is not None and (wanted or (wanted is None and sys.stderr.isatty()))
    begun, said = time.monotonic(), ""

    def speak(done: int, total: int, what: str) -> None:
        nonlocal said
        seconds = time.monotonic() - begun
        if speaks and seconds >= quiet and what != said:
            said = what
            print(f"cupynorm.warmup: {what}, {done} of {total}, {seconds:.0f} s", file=sys.stderr, flush=True)

    return speak
