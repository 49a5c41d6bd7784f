"""`warmup`: compile the code for calls on a kind of array before the first call."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from ._checks import (
    check_activation,
    check_eps_mode,
    check_input,
    check_like,
    check_mask,
    check_no_activation,
    check_number,
)
from ._types import Array, math_dtype
from .devices import dtype_of, result_dtype_of
from .functional import (
    gradient_sums,
    instance_norm_backward,
    instance_norm_double_backward,
    instance_norm_forward,
    moments,
)

#: Called before each step, and once at the end: with the number of steps done, their total, and the next step's name.
Progress = Callable[[int, int, str], Any]

#: Shapes in memory, and the axes that are N, C, H and W: channels-first, and 3 or 32 channels last.
USUAL = ((1, 3, 32, 32), (0, 1, 2, 3)), ((1, 8, 8, 3), (0, 3, 1, 2)), ((1, 8, 8, 32), (0, 3, 1, 2))

QUIET = 2.0  # seconds before the first message


def warmup(
    x: Array,
    *,
    dtype: Any = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Array | None = None,
    double_backward: bool = False,
    parts: bool = False,
    progress: bool | Progress | None = None,
    mask: Array | None = None,
    ddof: float = 0.0,
    eps_mode: str = "variance",
) -> None:
    """Compile the code for calls on arrays like x; on a GPU, also prepare CUDA-graph capture.

    For NumPy arrays, compile the loops for x's dtype and layout, for all numbers of threads, all parameters, and all
    sizes of planes of 16 elements or more (and of x's own): forward, also with out=x, and backward, in training and
    with running statistics. No such call compiles anything afterwards. This takes two to four seconds; the code is kept
    on disk, in the folder that `python -m cupynorm info` names, and later processes load it in a fraction of a second.
    x is neither read nor written. There is nothing to compile where NumPy alone computes: without llvmlite, for double
    backwards, for misaligned arrays, and for empty ones. `python -m cupynorm compile` does this for the usual kinds of
    calls.

    For CuPy arrays, run forward and backward, in training and with running statistics, with and without affine
    parameters, on scratch arrays and on the current stream. Afterwards every kernel they need is compiled and CuPy's
    memory pool has the blocks they allocate. The contents of x do not matter and are not written.

    A call returns its temporary memory to the pool, but a captured graph goes on using it: warm up and capture with a
    memory pool of the graph's own, and keep that pool as long as the graph::

        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc), stream:
            cupynorm.warmup(x)
            stream.begin_capture()
            y, saved = cupynorm.instance_norm_forward(x)
            dx, _, _ = cupynorm.instance_norm_backward(dy, saved)
            graph = stream.end_capture()

    After an interrupt, the code compiled so far is kept.

    Args:
        x: an array with the shape, dtype, layout and device of the later calls. For NumPy arrays the sizes do not
            matter, except the number of channels of a channels-last array, whether there is one spatial position or
            several, and planes of fewer than 16 elements.
        dtype: of the results, if it is not x's. Of integers only forwards are compiled.
        activation: as in the later calls.
        negative_slope: as in the later calls.
        residual: as in the later calls; of it, too, only the layout matters.
        double_backward: also run `instance_norm_double_backward`, with all of its gradients given.
        parts: also for `moments`, `gradient_sums`, and calls with `moments=` and `sums=`.
        mask: as in the later calls; only its layout matters. For calls with lengths, pass a mask (N, 1, ..., 1, L) that
            broadcasts along all axes but N and the last one. (On a GPU, pass lengths to calls in a graph as an array
            on the GPU.)
        ddof: as in the later calls.
        eps_mode: as in the later calls.
        progress: if True, report progress on stderr; None reports it if stderr is a terminal and the work takes more
            than two seconds. Or a function (done, total, what), called before each step, and with done = total at the
            end.

    Raises:
        TypeError, ValueError: x cannot be normalised, another argument does not fit x, or double_backward is combined
            with an activation, a mask, or another ddof or eps_mode than the defaults.
    """
    if dtype is not None:
        dtype = result_dtype_of(dtype)
    place = check_input(x, integers=dtype is not None)
    check_activation(activation)
    negative_slope = check_number(negative_slope, "negative_slope")
    check_eps_mode(eps_mode)
    ddof = check_number(ddof, "ddof")
    if double_backward:
        check_no_activation(activation)
        if mask is not None or ddof or eps_mode != "variance":
            raise ValueError("no double backward with a mask, or with another ddof or eps_mode than the defaults")
    if mask is not None:
        mask = check_mask(mask, x, place)
    if residual is not None:
        check_like(residual, "residual", x, place, dtype)
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be None, a bool or a function (done, total, what), got {progress!r}")
    device: Any = nullcontext()
    if place == "cpu":
        from . import cpu

        rare = {"mask": mask, "sloped": bool(ddof) or eps_mode != "variance"}
        steps = cpu.rehearsals(x, x.dtype if dtype is None else dtype, activation, residual, parts, **rare)
    else:
        device = x.device
        epilogue = {"activation": activation, "negative_slope": negative_slope, "residual": residual}
        epilogue |= {"mask": mask, "ddof": ddof, "eps_mode": eps_mode}
        steps = _calls(x, x.dtype if dtype is None else dtype, epilogue, double_backward, parts)
    if progress is None or isinstance(progress, bool):
        progress = _speaker(progress)
    with device:
        for done, (what, step) in enumerate(steps):
            progress(done, len(steps), what)
            step()
    progress(len(steps), len(steps), "done")


def usual_steps(dtypes: Sequence[str], activations: Sequence[str | None]) -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, step) pairs that compile the CPU's loops for the usual kinds of calls, each module once.

    These are: forward and backward, without a residual, in training and with running statistics, on channels-first
    arrays and on channels-last ones of 3 channels or of 32, in all of the dtypes and with each of the activations.

    Raises:
        ImportError: bfloat16 without ml_dtypes.
    """
    from . import cpu

    steps: dict[Any, tuple[str, Callable[[], Any]]] = {}
    for dtype in dtypes:
        for activation in activations:
            for shape, order in USUAL:
                x = np.zeros(shape, dtype_of(dtype)).transpose(order)
                for _, step in cpu.rehearsals(x, x.dtype, activation, None):
                    key = (step.func, step.args) if isinstance(step, partial) else step
                    steps.setdefault(key, (f"{dtype}, {activation or 'no activation'}", step))
    return list(steps.values())


def _calls(
    x: Array, dtype: np.dtype, epilogue: dict[str, Any], double_backward: bool, parts: bool
) -> list[tuple[str, Callable[[], Any]]]:
    """Return the calls to run on a GPU, each with its name."""
    import cupy

    def call(use_input_stats: bool, affine: bool, in_part: bool = False) -> None:
        ones = cupy.ones(x.shape[1], math_dtype(dtype, x.dtype))
        parameter = ones if affine else None
        y_saved = instance_norm_forward(
            x, parameter, parameter, running_mean=ones.copy(), running_var=ones.copy(),
            use_input_stats=use_input_stats, moments=moments(x, mask=epilogue["mask"]) if in_part else None,
            dtype=dtype, **epilogue,
        )  # fmt: skip
        if x.dtype.kind in "iu":
            return
        dy, ddx = cupy.zeros_like(y_saved[0]), cupy.zeros_like(x)
        sums = gradient_sums(dy, y_saved[1]) if in_part else None
        # Kept alive, so that the pool gets blocks for all of them.
        gradients = [instance_norm_backward(dy, y_saved[1], sums=sums)]
        if in_part:
            return
        if double_backward:
            gradients += [instance_norm_double_backward(ddx, parameter, parameter, dy, y_saved[1])]

    calls: list[tuple[str, Callable[[], Any]]] = []
    for use_input_stats in (True, False) if math.prod(x.shape[2:]) > 1 else (False,):
        for affine in (False, True):
            what = f"{'training' if use_input_stats else 'running statistics'}{', affine' if affine else ''}"
            calls.append((what, partial(call, use_input_stats, affine)))
    if parts:
        calls += [("parts of planes", partial(call, True, affine, True)) for affine in (False, True)]
    return calls


def _speaker(wanted: bool | None) -> Progress:
    """Return a function that prints each new step to stderr, one per line, which suits logs, notebooks and terminals
    alike."""
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
