"""The functions: every argument is checked here, then the backend of the arrays is called.

A backend is an object with `forward`, `backward` and `double_backward` (cupynorm.cpu shows their contract). It is
chosen by where the input lies; nothing is moved between devices.
"""

from __future__ import annotations

import importlib
import math
import numbers
import operator
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

#: A NumPy or a CuPy array.
Array = Any

#: Names of the dtypes that can be normalised.
DTYPES = ("float16", "bfloat16", "float32", "float64")

#: Names of the activations, besides None.
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu")


@dataclass(eq=False, slots=True)  # not frozen: that costs a microsecond a call
class Saved:
    """The state that a forward keeps for its backward.

    x, weight, bias and residual are the arrays themselves, not copies: do not change them before the backward. mean and
    rstd have shape (N, C), in float32 (float64 for float64 input). training is True if they are the input's own
    statistics.

    mean_lo is the low-order part of mean, lost in its rounding, in mean's shape and dtype, if mean is the input's own;
    None stands for 0. On the GPU it is kept only with an activation. The backward then computes
    z = ((x - mean) - mean_lo) * rstd * weight + bias + residual with the forward's bits, so that it sees every kink of
    the activation where the forward saw it. residual is kept only for that: without an activation it is None, and
    with_residual records that there was one.
    """

    x: Array
    mean: Array
    rstd: Array
    weight: Array | None
    bias: Array | None
    training: bool
    mean_lo: Array | None = None
    activation: str | None = None
    negative_slope: float = 0.01
    residual: Array | None = None
    with_residual: bool = False
    overwritten: bool = False  # x or residual was given as out, of the forward or of a backward
    eps: float = 0.0  # as given: what of rstd is the deviation's


#: What is to be done once a forward has succeeded, told from what it saved: partials of functions in C.
Keep = Callable[[Saved], tuple[partial[Any], ...]]


def at_once(*writes: partial[Any]) -> None:
    """Do what has been prepared, in order. Where writes are partials of functions in C, an interrupt cannot part them.

    Python raises KeyboardInterrupt between steps of its own code only, and here there are none.
    """
    deque(map(partial.__call__, writes), maxlen=0)


def empty_like(x: Array, empty: Any) -> Array:
    """A new array from `empty(shape, dtype)`, in memory channels-last if x is, else C-contiguous."""
    if x.ndim < 3 or x.flags.c_contiguous or x.shape[1] == 1 or x.strides[1] != x.itemsize:
        return empty(x.shape, x.dtype)
    return empty((x.shape[0], *x.shape[2:], x.shape[1]), x.dtype).transpose(0, x.ndim - 1, *range(1, x.ndim - 1))


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def math_dtype(dtype: Any) -> np.dtype:
    """The dtype that an input's dtype computes in: float64 for float64, else float32."""
    return _FLOAT64 if dtype == _FLOAT64 else _FLOAT32


def kind_of(array: Array, name: str) -> str:
    """'numpy' or 'cupy'; a TypeError for anything else."""
    if type(array) is np.ndarray or type(array) is np.memmap:
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and type(array) is cupy.ndarray:
        return "cupy"
    given = f"{type(array).__module__}.{type(array).__qualname__}"
    if isinstance(array, np.ndarray):
        hint = "a subclass's meaning (a mask, say) would be lost: pass numpy.asarray(...) of it if that is wanted"
    elif cupy is not None and isinstance(array, cupy.ndarray):
        hint = "a subclass's meaning would be lost: pass a plain cupy.ndarray view of it if that is wanted"
    else:
        hint = "convert it with numpy.asarray or cupy.asarray"
    raise TypeError(f"{name} must be a numpy.ndarray or a cupy.ndarray, got {given}; {hint}")


def place_of(array: Array, name: str) -> str:
    """'cpu' or 'cuda:<number>'."""
    return "cpu" if kind_of(array, name) == "numpy" else f"cuda:{array.device.id}"


def backend_of(array: Array) -> Any:
    """The backend module for an array."""
    name = BACKENDS[kind_of(array, "input")]
    # Not sys.modules: there a module is found while another thread has only begun to import it.
    return _loaded.get(name) or _loaded.setdefault(name, importlib.import_module(name))


_loaded: dict[str, Any] = {}

#: Backend modules by kind of array, imported at first use.
BACKENDS = {"numpy": "cupynorm.cpu", "cupy": "cupynorm.cuda.backend"}


def check_number(value: Any, name: str) -> float:
    """A finite real number, as a float; TypeError or ValueError otherwise."""
    if type(value) is float and math.isfinite(value):  # by far the most frequent, and of every call
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def check_count(value: Any, name: str, least: int) -> int:
    """A whole number of at least `least`, as an int; TypeError or ValueError otherwise."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return count


def check_eps(eps: Any) -> float:
    eps = check_number(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps!r}")
    return eps


def check_activation(activation: Any) -> None:
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return
    error = ValueError if isinstance(activation, str) else TypeError
    raise error(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")


@lru_cache(maxsize=64)
def _accepted(dtype: np.dtype) -> bool:
    return dtype.name in DTYPES and dtype.isnative


def check_dtype(dtype: Any, name: str) -> None:
    if not _accepted(dtype if isinstance(dtype, np.dtype) else np.dtype(dtype)):
        raise TypeError(f"{name} has dtype {np.dtype(dtype)!s}; accepted are {', '.join(DTYPES)} in native byte order")


def check_input(x: Array, name: str = "input") -> None:
    """An array that can be normalised; TypeError or ValueError otherwise."""
    kind_of(x, name)
    check_dtype(x.dtype, name)
    if x.ndim < 3:
        raise ValueError(f"{name} must have at least 3 dimensions (N, C, *spatial), got shape {x.shape}")


def check_per_channel(array: Array, name: str, x: Array, *, per_sample: bool = False, written: bool = False) -> None:
    """weight, bias and running statistics: on x's device, in x's dtype or in float32 for 16-bit x.

    Their shape is (C,); per_sample: or (N, C).
    """
    if place_of(array, name) != place_of(x, "input"):
        raise ValueError(
            f"{name} is on {place_of(array, name)} and the input on {place_of(x, 'input')}; move one of them "
            "(cupy.asarray, cupy.asnumpy, or a layer's to_gpu() / to_cpu())"
        )
    if array.dtype != x.dtype and array.dtype != math_dtype(x.dtype):
        accepted = sorted({x.dtype.name, math_dtype(x.dtype).name})
        raise TypeError(
            f"{name} has dtype {array.dtype} and the input {x.dtype}; {name} must be {' or '.join(accepted)}"
        )
    if array.shape != x.shape[1:2] and not (per_sample and array.shape == x.shape[:2]):
        shapes = (x.shape[1:2], x.shape[:2]) if per_sample else (x.shape[1:2],)
        raise ValueError(
            f"{name} has shape {array.shape}, but the input of shape {x.shape} has {x.shape[1]} channels: "
            f"needed is {' or '.join(map(str, shapes))}"
        )
    if written and kind_of(array, name) == "numpy" and not array.flags.writeable:
        raise ValueError(f"{name} is read-only, and is to be updated")


def check_like(array: Array, name: str, x: Array) -> None:
    """dy and the residual: shape, dtype and device of x, any strides."""
    if place_of(array, name) != place_of(x, "input"):
        raise ValueError(f"{name} is on {place_of(array, name)} and the input on {place_of(x, 'input')}")
    if array.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; needed is the input's, {x.dtype}")
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}; needed is the input's, {x.shape}")


def _as_host(array: Array) -> np.ndarray:
    """A view with the same address, shape and strides, for questions about memory only: never read."""
    if isinstance(array, np.ndarray):
        return array

    class Memory:
        __array_interface__ = {  # noqa: RUF012
            "data": (array.data.ptr, False),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
            "version": 3,
        }

    return np.asarray(Memory())


def _bounds_meet(a: Array, b: Array) -> bool:
    """numpy.may_share_memory of CuPy arrays. CuPy's own takes memory that came in by two ways for two memories."""
    ends = []
    for array in (a, b):
        if array.size == 0:
            return False
        reach = [stride * (size - 1) for stride, size in zip(array.strides, array.shape, strict=True)]
        start = array.data.ptr
        ends.append((start + sum(step for step in reach if step < 0), start + sum(step for step in reach if step > 0)))
    (low, high), (other_low, other_high) = ends
    return low < other_high + b.itemsize and other_low < high + a.itemsize


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays have memory in common; True also where that is too hard to tell."""
    host = isinstance(a, np.ndarray)
    if host != isinstance(b, np.ndarray) or not (np.may_share_memory(a, b) if host else _bounds_meet(a, b)):
        return False
    try:
        return bool(np.shares_memory(_as_host(a), _as_host(b), max_work=100_000))  # type: ignore[arg-type]  # any integer
    except np.exceptions.TooHardError:
        return True


def check_apart(written: Sequence[tuple[str, Array]], others: Sequence[tuple[str, Array | None]]) -> None:
    """Arrays (C,) that are updated in place: each has memory of its own, and none of the others'."""
    for number, (name, array) in enumerate(written):
        if array.size > 1 and abs(array.strides[0]) < array.itemsize:
            raise ValueError(
                f"{name} is to be updated and has strides {array.strides}: several of its elements are the same memory"
            )
        for other_name, other in (*written[:number], *others):
            if other is not None and overlap(other, array):
                raise ValueError(
                    f"{other_name} and {name} share memory, and {name} is to be updated: give each an array of its own"
                )


def _same_memory(a: Array, b: Array) -> bool:
    ha, hb = _as_host(a), _as_host(b)
    # Strides of axes of size 1 say nothing.
    steps = [[s for s, size in zip(array.strides, array.shape, strict=True) if size > 1] for array in (a, b)]
    return bool(
        a.shape == b.shape
        and steps[0] == steps[1]
        and ha.__array_interface__["data"][0] == hb.__array_interface__["data"][0]
    )


def _overlaps_itself(a: Array) -> bool:
    """Whether two indices may mean the same element: needed for out only, so a sufficient test."""
    reach = a.itemsize
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(a.strides, a.shape, strict=True) if size > 1
    ):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def _check_out(out: Array, x: Array, inputs: Sequence[tuple[str, Array | None]]) -> None:
    """Whether out may be written: it must not overlap an input unless it is that input."""
    if place_of(out, "out") != place_of(x, "input"):
        raise ValueError(f"out is on {place_of(out, 'out')} and the input on {place_of(x, 'input')}")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; needed are shape {x.shape} and dtype {x.dtype}"
        )
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if out.size and _overlaps_itself(out):
        raise ValueError(f"out has strides {out.strides}: several of its elements are the same memory")
    for name, array in inputs:
        if array is None or not overlap(out, array):
            continue
        if array.ndim < 3 or not _same_memory(out, array):
            raise ValueError(f"out overlaps {name} without being the same array: it would be read after being written")


def _spoil(saved: Saved, out: Array | None) -> None:
    """Note in saved that out was its x, or its residual."""
    if out is not None and any(overlap(out, array) for array in (saved.x, saved.residual) if array is not None):
        saved.overwritten = True


def instance_norm(
    input: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise every plane of an array: y = (x - mean) / sqrt(var + eps) * weight + bias.

    The positional arguments and their order are those of torch.nn.functional.instance_norm. mean and the biased var are
    computed over the spatial positions of each sample and channel (Ulyanov, Vedaldi, Lempitsky 2016); without
    use_input_stats they are running_mean and running_var.

    With a residual and an activation, y = activation(z), z = (x - mean) / sqrt(var + eps) * weight + bias + residual,
    in the same pass over memory: 2 accesses per element if the plane stays on chip, 3 with a residual.

    Args:
        input: numpy.ndarray or cupy.ndarray (N, C, *spatial) of rank 3 or more; float16, bfloat16, float32 or float64;
            any strides. float16 and bfloat16 compute in float32.
        running_mean, running_var: (C,), both or neither. With use_input_stats they are updated in place,
            running <- (1 - momentum) * running + momentum * (mean over N of the planes' means and unbiased variances).
        weight, bias: (C,), or (N, C) for a scale and shift of each sample, as in adaptive instance normalisation
            (Huang, Belongie 2017); each optional, and each of either shape.
        momentum: 0 leaves the running statistics as they are.
        eps: added to the variance, not negative.
        activation: None; "relu", max(z, 0); "leaky_relu", z for z > 0, else negative_slope * z; "silu",
            z / (1 + exp(-z)) (Elfwing, Uchibe, Doya 2018); or "gelu", z * Phi(z), where Phi is the normal
            distribution function, computed with the error function, not approximated (Hendrycks, Gimpel 2016).
        negative_slope: finite; used by "leaky_relu" only.
        residual: added before the activation: shape, dtype and device of input; any strides.
        out: array for the result: shape and dtype of input, any strides; it may be input or residual itself.

        weight, bias and running statistics have the input's dtype, or float32 for float16 and bfloat16 input.

    Returns:
        An array of input's shape and dtype on its device: out, or a new one, channels-last if input is, else
        C-contiguous.

    Raises:
        TypeError: an argument has the wrong type, dtype or array class.
        ValueError: shapes that do not fit, arrays on several devices, one running statistic without the other,
            one spatial element with use_input_stats, an unknown activation, an out that overlaps another array
            without being that array, or running statistics to be updated that share memory with each other, with the
            parameters or with the input. Nothing has been written then.
    """
    y, _ = checked_forward(
        input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps,
        activation, negative_slope, residual, out, keep=None,
    )  # fmt: skip
    return y


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalise as `instance_norm` does, and return the state that `instance_norm_backward` needs.

    Arguments, defaults and errors are those of `instance_norm`. Saved holds x, weight, bias and, with an activation,
    residual themselves, not copies: do not change them before the backward. If out is x, or with an activation the
    residual, the backward is refused. Saved holds no other array of x's size: the backward recomputes the activation's
    argument. `inference_mode` has no effect here; it is for layers.

    Returns:
        (y, saved)
    """
    y, saved = checked_forward(
        x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps,
        activation, negative_slope, residual, out, keep=lambda _: (),
    )  # fmt: skip
    assert saved is not None
    return y, saved


def checked_forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Array | None,
    out: Array | None,
    *,
    keep: Keep | None,
) -> tuple[Array, Saved | None]:
    """`instance_norm`, and Saved with it if keep is given: what keep(saved) tells is done with the last writes."""
    check_input(x)
    momentum, eps = check_number(momentum, "momentum"), check_eps(eps)
    negative_slope = check_number(negative_slope, "negative_slope")
    check_activation(activation)
    use_input_stats = bool(use_input_stats)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"running_mean and running_var go together, but {missing} is None")
    if not use_input_stats and running_mean is None:
        raise ValueError("use_input_stats=False needs running_mean and running_var")
    updated = running_mean is not None and use_input_stats and momentum != 0
    if running_mean is not None:
        check_per_channel(running_mean, "running_mean", x, written=updated)
        check_per_channel(running_var, "running_var", x, written=updated)
    if weight is not None:
        check_per_channel(weight, "weight", x, per_sample=True)
    if bias is not None:
        check_per_channel(bias, "bias", x, per_sample=True)
    if residual is not None:
        check_like(residual, "residual", x)
    if use_input_stats and math.prod(x.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.shape}")
    inputs = ("input", x), ("residual", residual), ("weight", weight), ("bias", bias)
    statistics = ("running_mean", running_mean), ("running_var", running_var)
    if updated:
        check_apart(statistics, inputs)
    if out is not None:
        _check_out(out, x, (*inputs, *statistics))

    def told(saved: Saved) -> tuple[partial[Any], ...]:
        _spoil(saved, out)
        return keep(saved) if keep is not None else ()

    result: tuple[Array, Saved | None] = backend_of(x).forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        use_input_stats=use_input_stats,
        momentum=momentum,
        eps=eps,
        out=out,
        keep=None if keep is None else told,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
    )
    return result


def instance_norm_backward(dy: Array, saved: Saved, *, out: Array | None = None) -> tuple[Array, ...]:
    """Return the gradients of `instance_norm_forward`.

    Let z be as in `instance_norm`, g = dy * activation'(z) (dy without an activation) and xhat = (x - mean) * rstd. In
    training dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat)), with means over the plane. With running
    statistics (tracked eval) mean and rstd are constants, and dx = weight * rstd * g. dweight = sum of g * xhat,
    dbias = sum of g, over the plane and, for parameters of shape (C,), over N. dresidual = g. At a kink the derivative
    is the left one: 0 or negative_slope at z = 0.

    Accesses per element if the planes stay on chip: 3 (x, dy, dx), also with a residual but no activation; 5 with both,
    because the residual is read to compute z and its gradient is written.

    Args:
        dy: gradient of y: shape, dtype and device of x; any strides, including 0.
        saved: as the forward returned it. It may be used again, unless out is x or the residual.
        out: array for dx: shape and dtype of x, any strides; it may be dy, x or the residual itself.

    Returns:
        (dx, dweight, dbias), or (dx, dweight, dbias, dresidual) if the forward had a residual. dweight and dbias have
        the parameters' shapes and dtypes, and are None for a missing parameter. Without an activation dresidual is dy
        itself, or a copy of it if out is dy; with one it is a new array.

    Raises:
        TypeError, ValueError: dy, saved or out do not fit. Nothing has been written then.
    """
    _check_saved(saved)
    x = saved.x
    check_like(dy, "dy", x)
    if out is not None:
        inputs = ("dy", dy), ("input", x), ("residual", saved.residual), ("weight", saved.weight), ("bias", saved.bias)
        _check_out(out, x, (*inputs, ("mean", saved.mean), ("rstd", saved.rstd), ("mean_lo", saved.mean_lo)))
    _spoil(saved, out)  # before anything is written: a call that is broken off may have begun to
    gradients: tuple[Array, ...] = backend_of(x).backward(dy, saved, out=out)
    return gradients if saved.with_residual else gradients[:3]


def instance_norm_double_backward(
    ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
) -> tuple[Array, Array, Array | None]:
    """Return the gradients of `instance_norm_backward`, for losses that contain a gradient, such as WGAN-GP's penalty.

    A loss that depends on the backward's dx, dweight and dbias depends through them on dy, x and weight. For a plane of
    M elements, with means over the plane, let xhat = (x - mean) * rstd, g = dy, u = ddx, and

        a = mean(u * xhat),   c = mean(g * xhat),   s = mean((u - mean(u)) * (g - mean(g))) - a * c.

    The backward's dx adds sum(u * dx) = weight * rstd * M * s to the loss, its dweight ddweight * M * c, and its dbias
    ddbias * M * mean(g). Since d(M * c) / dx = rstd * (g - mean(g) - xhat * c), likewise for a with u, and
    d rstd / dx = -rstd^2 * xhat / M, the gradients are, in training, with q = ddweight - weight * rstd * a,

        ddy = weight * rstd * (u - mean(u)) + q * xhat + ddbias
        dweight = sum over the plane and, for a weight of shape (C,), over N, of rstd * M * s
        dx = rstd * (q * (g - mean(g) - xhat * c) - weight * rstd * (c * (u - mean(u) - xhat * a) + xhat * s)),

    and with running statistics (tracked eval), which are constants,

        ddy = weight * rstd * u + ddweight * xhat + ddbias,   dweight = sum of rstd * u * g,   dx = ddweight * rstd * g.

    A forward without a weight counts as one with weight = 1. The bias has no influence, nor has the residual of a
    forward without an activation: its gradient dresidual is dy itself, so the caller adds the gradient of the loss with
    respect to dresidual to ddy.

    float16 and bfloat16 compute in float32. Accesses per element if the planes stay on chip: 5 (x, dy, ddx, and both
    results). The CUDA kernels are compiled in the first such call, or by `warmup`.

    Args:
        ddx: gradient of the loss with respect to dx: shape, dtype and device of x; any strides. None stands for 0, as
            for ddweight and ddbias; at least one of the three must be given.
        ddweight, ddbias: gradients of the loss with respect to dweight and dbias: shape of weight and bias, dtype of
            the input, or float32 for float16 and bfloat16 input.
        dy, saved: as given to `instance_norm_backward`.

    Returns:
        (ddy, dx, dweight): the gradients of the loss with respect to dy and x, new arrays of x's shape and dtype,
        channels-last if x is; and with respect to weight, in its shape and dtype, or None without a weight.

    Raises:
        TypeError, ValueError: an array does not fit; all three gradients are None; ddweight (ddbias) for a forward
            without a weight (bias); or a forward with an activation: apply the activation separately instead.
    """
    _check_saved(saved)
    x = saved.x
    check_no_activation(saved.activation)
    check_like(dy, "dy", x)
    if ddx is None and ddweight is None and ddbias is None:
        raise ValueError("ddx, ddweight and ddbias are all None; needed is one of them at least")
    if ddx is not None:
        check_like(ddx, "ddx", x)
    for gradient, parameter, name in ((ddweight, saved.weight, "weight"), (ddbias, saved.bias, "bias")):
        if gradient is None:
            continue
        kind_of(gradient, f"dd{name}")
        if parameter is None:
            raise ValueError(f"dd{name} is given, but the forward had no {name}; needed is None")
        check_per_channel(gradient, f"dd{name}", x, per_sample=True)
        if gradient.shape != parameter.shape:
            raise ValueError(f"dd{name} has shape {gradient.shape}; needed is that of {name}, {parameter.shape}")
    results: tuple[Array, Array, Array | None] = backend_of(x).double_backward(ddx, ddweight, ddbias, dy, saved)
    return results


def check_no_activation(activation: str | None) -> None:
    """Of a double backward."""
    if activation is not None:
        raise ValueError(
            f"no double backward through the fused activation {activation!r}: call instance_norm_forward "
            "without it, and apply the activation (and what is added before it) as an operation of its own"
        )


def _check_saved(saved: Any) -> None:
    """What a forward returned, with its arrays as they were."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what instance_norm_forward returned, got {type(saved).__qualname__}")
    if saved.overwritten:
        raise ValueError("the forward's input or residual, which the backward needs, has been written over (as out)")
