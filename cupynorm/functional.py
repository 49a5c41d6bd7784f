"""The public functions: each checks its arguments, calls the backend of the input's place, and commits its result."""

from __future__ import annotations

import math
from typing import Any

from ._checks import (
    check_activation,
    check_apart,
    check_ddof,
    check_eps,
    check_eps_mode,
    check_input,
    check_like,
    check_mask,
    check_no_activation,
    check_no_mask,
    check_number,
    check_of_planes,
    check_out,
    check_own_statistics,
    check_per_channel,
    check_saved,
    check_usual_rstd,
    mask_of_lengths,
    note_overwritten,
    only_in_mask,
    place_of,
)
from ._types import Array, ForwardCall, ForwardResult, Gradients, Saved
from .backend import Backend, backend_of
from .devices import result_dtype_of
from .mixed import OneDtype
from .statistics import DTYPES, GradientSums, Moments


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
    moments: Moments | None = None,
    mask: Array | None = None,
    lengths: Any = None,
    dtype: Any = None,
    ddof: float = 0.0,
    eps_mode: str = "variance",
) -> Array:
    """Normalise every plane of an array: y = (x - mean) / sqrt(var + eps) * weight + bias.

    The positional arguments and their order are those of torch.nn.functional.instance_norm. mean and the biased var are
    computed over the spatial positions of each sample and channel (Ulyanov, Vedaldi, Lempitsky 2016); without
    use_input_stats they are running_mean and running_var.

    With a residual and an activation, y = activation(z), z = (x - mean) / sqrt(var + eps) * weight + bias + residual,
    in the same pass over memory: 2 accesses per element if the plane stays on chip, 3 with a residual.

    Args:
        input: numpy.ndarray or cupy.ndarray (N, C, *spatial) of rank 3 or more; float16, bfloat16, float32 or float64,
            and with dtype= also uint8, int8, uint16 or int16; any strides. float16 and bfloat16 compute in float32.
        running_mean, running_var: (C,), both or neither. With use_input_stats they are updated in place,
            running <- (1 - momentum) * running + momentum * (mean over N of the planes' means and unbiased variances).
        weight, bias: (C,), or (N, C) for a scale and shift of each sample, as in adaptive instance normalisation
            (Huang, Belongie 2017); each optional, and each of either shape. They and the running statistics have the
            result's dtype, or float32 for float16 and bfloat16 results; for float64 input, the result's dtype or
            float64.
        use_input_stats: normalise with the input's own statistics; False: with running_mean and running_var.
        momentum: 0 leaves the running statistics as they are.
        eps: not negative; see eps_mode.
        activation: None; "relu", max(z, 0); "leaky_relu", z for z > 0, else negative_slope * z; "silu",
            z / (1 + exp(-z)) (Elfwing, Uchibe, Doya 2018); or "gelu", z * Phi(z), where Phi is the normal
            distribution function, computed with the error function, not approximated (Hendrycks, Gimpel 2016).
        negative_slope: finite; used by "leaky_relu" only.
        residual: added before the activation: shape, dtype and device of the result; any strides.
        out: array for the result: its shape and dtype, any strides; it may be input or residual itself.
        moments: of whole planes (`cupynorm.moments`), if input has only a part of each, even a single position or none:
            mean and var are theirs, and so are the running statistics' updates, to which planes of fewer than two
            positions do not count. Not together with use_input_stats=False.
        mask: bool, of a shape that broadcasts to input's: (H, W), (N, 1, H, W) for each sample, or input's own. mean
            and var are those of the positions where it is True; y is 0 elsewhere, whatever input and residual hold
            there, NaN included. Planes with fewer than two True positions do not count in running statistics.
        lengths: in place of a mask: N integers, a list or an array. The positions from lengths[n] on along the last
            axis are padding. On a GPU they are not checked, since that would wait for it, but clamped.
        dtype: of the result, and of the residual and the parameters: float16, bfloat16, float32 or float64; None is
            input's. The input is read as it is, computed in float32 (in float64 if it or the result is float64), and
            written in this dtype, in one pass: 6 bytes an element from uint16 to float32, if the plane stays on chip.
        ddof: delta degrees of freedom of var, as in numpy.var: the sum of squared distances from the mean is divided by
            the number of positions less ddof. Running statistics are always updated with the unbiased variance.
        eps_mode: where eps is added: "variance", (x - mean) / sqrt(var + eps); "std", (x - mean) / (sqrt(var) + eps);
            or "max", (x - mean) / max(sqrt(var), eps). It applies to running_var, too.

    Returns:
        An array of input's shape, and its dtype or the given one, on its device: out, or a new one, channels-last if
        input is, else C-contiguous.

    Raises:
        TypeError: an argument has the wrong type, dtype or array class.
        ValueError: shapes that do not fit, arrays on several devices, one running statistic without the other,
            one spatial element with use_input_stats and no moments, moments without use_input_stats, an unknown
            activation or eps_mode, a ddof that is not less than the number of positions, an out that overlaps another
            array without being that array, or running statistics to be updated that share memory with each other, with
            the parameters or with the input. Nothing has been written then.

    Example:
        >>> x = np.arange(8, dtype=np.float32).reshape(1, 2, 4)  # one sample, two channels, four positions
        >>> cn.instance_norm(x).round(3)
        array([[[-1.342, -0.447,  0.447,  1.342],
                [-1.342, -0.447,  0.447,  1.342]]], dtype=float32)
        >>> cn.instance_norm(x, mask=x % 4 < 2, activation="relu").round(3)
        array([[[0., 1., 0., 0.],
                [0., 1., 0., 0.]]], dtype=float32)
    """
    result = forward(
        ForwardCall(  # by position, which takes half a microsecond less
            input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, activation, negative_slope,
            residual, out, False, moments, eps_mode, ddof, dtype, mask, lengths,
        )
    )  # fmt: skip
    result.commit()
    return result.y


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
    moments: Moments | None = None,
    mask: Array | None = None,
    lengths: Any = None,
    dtype: Any = None,
    ddof: float = 0.0,
    eps_mode: str = "variance",
) -> tuple[Array, Saved]:
    """Normalise as `instance_norm` does, and return the state that `instance_norm_backward` needs.

    Arguments, defaults and errors are those of `instance_norm`. Saved holds x, weight, bias, the mask, the counts of
    given moments, and, with an activation, residual themselves, not copies: do not change them before the backward. If
    out is x, or with an activation the residual, the backward is refused. Saved holds no other array of x's size: the
    backward recomputes the activation's argument. `inference_mode` has no effect here; it is for layers.

    Returns:
        (y, saved)
    """
    result = forward(
        ForwardCall(
            x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, activation, negative_slope,
            residual, out, True, moments, eps_mode, ddof, dtype, mask, lengths,
        )
    )  # fmt: skip
    assert result.saved is not None
    result.commit()
    return result.y, result.saved


#: Of calls that have passed their checks, by what the checks depend on: the backend's traces. At most MOST_KNOWN.
_known: dict[Any, Any] = {}
MOST_KNOWN = 4096


def forward(call: ForwardCall, place: str | None = None) -> ForwardResult:
    """Check and run a forward; the caller commits the result. place: of call.x, if it is known already.

    A backend's trace of a call that has passed its checks stands for these in later calls on arrays with the same
    facts: only what depends on addresses is checked again.
    """
    place = place or place_of(call.x, "input")
    if call.dtype is not None:
        call.dtype = result_dtype_of(call.dtype)
    backend = backend_of(place)
    key = _key(call, backend)
    try:
        trace = call.trace = None if key is None else _known.get(key)
    except TypeError:  # not hashable, so some option is wrong
        trace = key = None
    if trace is None:
        check_forward(call, place)
    elif call.out is not None or call.updates:
        _check_memory(call, place)
    result = run_forward(call, backend)
    if call.trace is not trace and key is not None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = call.trace
    return result


def _key(call: ForwardCall, backend: Backend) -> Any:
    """Return what the checks of a call depend on, or None if they are always necessary."""
    if call.mask is not None or call.lengths is not None:
        return None
    if call.moments is not None and not isinstance(call.moments, Moments):
        return None
    facts = backend.facts(call)
    options = None if facts is None else call.options
    return None if options is None else (facts, options)


def check_forward(call: ForwardCall, place: str | None = None, part: bool = False) -> str:
    """Check a call's arguments, and return its place. Numbers in call are converted in place.

    place: of call.x, if it is known already. part: moments are still to come, since x has only a part of each plane.
    """
    if call.dtype is not None:
        call.dtype = result_dtype_of(call.dtype)
    place = place or place_of(call.x, "input")
    call.momentum, call.eps = check_number(call.momentum, "momentum"), check_eps(call.eps)
    call.negative_slope = check_number(call.negative_slope, "negative_slope")
    check_activation(call.activation)
    call.ddof = check_number(call.ddof, "ddof")
    check_eps_mode(call.eps_mode)
    call.use_input_stats = bool(call.use_input_stats)
    _check_arrays(call, place, part)
    if call.updates or call.out is not None:
        _check_memory(call, place)
    return place


def _check_arrays(call: ForwardCall, place: str, part: bool) -> None:
    """Check a call's arrays, but for their addresses."""
    x, running_mean, running_var, dtype = call.x, call.running_mean, call.running_var, call.dtype
    check_input(x, place=place, integers=dtype is not None)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"running_mean and running_var go together, but {missing} is None")
    if not call.use_input_stats and running_mean is None:
        raise ValueError("use_input_stats=False needs running_mean and running_var")
    if running_mean is not None:
        for name, array in (("running_mean", running_mean), ("running_var", running_var)):
            check_per_channel(array, name, x, place, written=call.updates, dtype=dtype)
    if call.weight is not None:
        check_per_channel(call.weight, "weight", x, place, per_sample=True, dtype=dtype)
    if call.bias is not None:
        check_per_channel(call.bias, "bias", x, place, per_sample=True, dtype=dtype)
    if call.residual is not None:
        check_like(call.residual, "residual", x, place, dtype)
    if call.mask is not None or call.lengths is not None:
        _check_mask(call, place)
    if call.moments is not None:
        if not call.use_input_stats:
            raise ValueError("moments need use_input_stats=True: otherwise the running statistics are used")
        _check_numbers(call.moments, "moments", Moments, x, place)
    elif call.use_input_stats and not part:
        positions = math.prod(x.shape[2:])
        if positions == 1:
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.shape}")
        if call.mask is None:
            check_ddof(call.ddof, positions)


def _check_memory(call: ForwardCall, place: str) -> None:
    """Check that no array is to be written that shares memory with another one."""
    statistics = ("running_mean", call.running_mean), ("running_var", call.running_var)
    inputs = [("input", call.x), ("residual", call.residual), ("weight", call.weight), ("bias", call.bias)]
    inputs += [("mask", call.mask)]
    if call.moments is not None:
        inputs += _arrays_of(call.moments, "moments")
    if call.updates:
        check_apart(statistics, inputs)
    if call.out is not None:
        check_out(call.out, call.x, place, (*inputs, *statistics), call.dtype)


def _check_mask(call: ForwardCall, place: str) -> None:
    """Check a call's mask or lengths; afterwards it has a mask of x's shape."""
    if call.mask is not None and call.lengths is not None:
        raise ValueError("mask and lengths are both given; needed is one of them")
    if call.mask is not None:
        call.mask = check_mask(call.mask, call.x, place)
    else:
        call.mask = mask_of_lengths(call.lengths, call.x, place)


def run_forward(call: ForwardCall, backend: Backend) -> ForwardResult:
    """Run a checked forward; the caller commits the result."""
    own = call.use_input_stats and call.moments is None
    result = backend.forward(call) if own else backend.normalize(call)
    if result.saved is not None:
        if call.activation is None:
            result.saved.residual = None
        note_overwritten(result.saved, call.out)
    return result


def moments(x: Array, *, mask: Array | None = None, lengths: Any = None) -> Moments:
    """Compute the number of positions, the mean and the centred sum of squares of each plane.

    For planes that are in parts (images in tiles, volumes over several devices): take the moments of each part, merge
    them (`Moments.merge`), and normalise each part with the result (`instance_norm(..., moments=)`). Each element is
    read once, and nothing waits for the GPU.

    A tile's sums are those of `instance_norm`: computed in float32 (float64 for float64 input) about the tile's mean,
    which is corrected for its rounding. Tiles are merged in float64 by Chan, Golub, LeVeque 1983, eq. 2.1. For float32
    input and narrower the mean is exact to about 1e-7 standard deviations, and m2 to about 1e-7 of itself, however
    large the mean is. float64 input keeps all digits that a mean in float64 has, about 1e-16 of it: with a mean of 1e6
    deviations, y with `moments=` is exact to 1e-10.

    Args:
        x: numpy.ndarray or cupy.ndarray (N, C, *spatial) of rank 3 or more; float16, bfloat16, float32, float64, uint8,
            int8, uint16 or int16; any strides. It may have a single position, or none.
        mask, lengths: as for `instance_norm`: moments of the positions where the mask is True.

    Returns:
        Moments: count int64, mean and m2 float64, each (N, C), on x's device. A plane without a position has count 0,
        mean 0 and m2 0.

    Raises:
        TypeError, ValueError: x cannot be normalised, or mask or lengths do not fit.
    """
    place = check_input(x, integers=True)
    call = ForwardCall(x, mask=mask, lengths=lengths)
    if mask is not None or lengths is not None:
        _check_mask(call, place)
    return backend_of(place).moments(x, call.mask)


def _arrays_of(numbers: Moments | GradientSums, name: str) -> list[tuple[str, Array | None]]:
    return [(f"{name}.{field}", array) for field, array in vars(numbers).items()]


def _check_numbers(given: Any, name: str, kind: type, x: Array, place: str) -> None:
    """Check given moments, or given sums, of whole planes."""
    if not isinstance(given, kind):
        source = {Moments: "moments", GradientSums: "gradient_sums"}[kind]
        raise TypeError(f"{name} must be what cupynorm.{source} returns, got {type(given).__qualname__}")
    for field, array in vars(given).items():
        check_of_planes(array, f"{name}.{field}", DTYPES[field], x, place)


def gradient_sums(dy: Array, saved: Saved) -> GradientSums:
    """Compute the sums of each plane that its gradients need: of g, and of g * xhat (see `instance_norm_backward`).

    For planes that are in parts: take the sums of each part, add them up (`GradientSums.merge`), and compute each
    part's gradient with the result (`instance_norm_backward(..., sums=)`). Accesses per element: 2 (x and dy), 3 if the
    forward had an activation and a residual.

    Args:
        dy: gradient of y: shape, dtype and device of x; any strides, including 0.
        saved: as the forward returned it.

    Returns:
        GradientSums: sum_dy and sum_dy_xhat, each (N, C) float64, on x's device.

    Raises:
        TypeError, ValueError: dy or saved do not fit.
    """
    check_saved(saved)
    place = place_of(saved.x, "input")
    check_like(dy, "dy", saved.x, place, saved.dtype)
    backend = backend_of(place)
    if saved.mixed:
        one = OneDtype(saved, backend)
        dy, saved = one.wide(dy), one.saved
    return backend.gradient_sums(dy, saved)


def instance_norm_backward(
    dy: Array, saved: Saved, *, out: Array | None = None, sums: GradientSums | None = None
) -> tuple[Array, ...]:
    """Return the gradients of `instance_norm_forward`.

    Let z be as in `instance_norm`, g = dy * activation'(z) (dy without an activation) and xhat = (x - mean) * rstd. In
    training dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat)), with means over the plane. With running
    statistics (tracked eval) mean and rstd are constants, and dx = weight * rstd * g. dweight = sum of g * xhat,
    dbias = sum of g, over the plane and, for parameters of shape (C,), over N. dresidual = g. At a kink the derivative
    is the left one: 0 or negative_slope at z = 0.

    With another ddof or eps_mode than the defaults, xhat * mean(g * xhat) is multiplied by count / (count - ddof), with
    "std" also by 1 + eps / std, and with "max" it is 0 for planes with std < eps. It is 0 for constant planes.

    If the forward had a mask, sums are over its True positions, whatever dy holds elsewhere, and dx and dresidual are 0
    elsewhere.

    If the forward had moments, the means over the plane are sums divided by their counts. The sums are those that are
    given, or, without any, those of x's part of the plane.

    Accesses per element if the planes stay on chip, or if sums are given: 3 (x, dy, dx), also with a residual but no
    activation; 5 with both, because the residual is read to compute z and its gradient is written.

    Args:
        dy: gradient of y: shape, dtype and device of x; any strides, including 0.
        saved: as the forward returned it. It may be used again, unless out is x or the residual.
        out: array for dx: shape and dtype of x, any strides; it may be dy, x or the residual itself.
        sums: of whole planes (`cupynorm.gradient_sums`), if x has only a part of each; dweight and dbias are theirs.

    Returns:
        (dx, dweight, dbias), or (dx, dweight, dbias, dresidual) if the forward had a residual. dweight and dbias have
        the parameters' shapes and dtypes, and are None for a missing parameter. Without an activation dresidual is dy
        itself, or a copy of it if out is dy; with one it is a new array.

    Raises:
        TypeError, ValueError: dy, saved, out or sums do not fit. Nothing has been written then.
    """
    gradients = run_backward(check_backward(dy, saved, out, sums), dy, saved, out, sums)
    return gradients[: 4 if saved.with_residual else 3]


def check_backward(dy: Array, saved: Saved, out: Array | None, sums: GradientSums | None = None) -> str:
    """Check the arguments of a backward, and return its place."""
    check_saved(saved)
    x = saved.x
    place = place_of(x, "input")
    check_like(dy, "dy", x, place, saved.dtype)
    if sums is not None:
        _check_numbers(sums, "sums", GradientSums, x, place)
    if out is not None:
        inputs = ("dy", dy), ("input", x), ("residual", saved.residual), ("weight", saved.weight), ("bias", saved.bias)
        kept = [(name, getattr(saved, name)) for name in ("mask", "mean", "rstd", "mean_lo", "count")]
        check_out(out, x, place, (*inputs, *kept, *([] if sums is None else _arrays_of(sums, "sums"))))
    return place


def run_backward(
    place: str,
    dy: Array,
    saved: Saved,
    out: Array | None,
    sums: GradientSums | None,
    parameter_sums: GradientSums | None = None,
) -> Gradients:
    """Run a checked backward. parameter_sums: the sums for dweight and dbias, if they are not `sums`."""
    note_overwritten(saved, out)  # before anything is written: an interrupted call may have written a part
    backend = backend_of(place)
    direct = saved.mask is not None and saved.with_residual and saved.activation is None
    dresidual = only_in_mask(dy, saved.mask) if direct else None  # now: out may be dy
    if saved.mixed:
        one = OneDtype(saved, backend)
        found = one.gradients(_gradients(backend, one.wide(dy), one.saved, None, sums, parameter_sums), dy, out)
    else:
        found = _gradients(backend, dy, saved, out, sums, parameter_sums)
    return found._replace(dresidual=dresidual) if direct else found


def _gradients(
    backend: Backend,
    dy: Array,
    saved: Saved,
    out: Array | None,
    sums: GradientSums | None,
    parameter_sums: GradientSums | None,
) -> Gradients:
    if sums is None and (saved.count is None or saved.mask is not None):
        return backend.backward(dy, saved, out=out)
    total = backend.gradient_sums(dy, saved) if sums is None else sums
    dweight, dbias = backend.parameter_gradients(parameter_sums or total, saved)
    dx, dresidual = backend.input_gradient(dy, saved, total, out=out)
    return Gradients(dx, dweight, dbias, dresidual)


def instance_norm_double_backward(
    ddx: Array | None, ddweight: Array | None, ddbias: Array | None, dy: Array, saved: Saved
) -> tuple[Array, Array, Array | None]:
    """Return the gradients of `instance_norm_backward`, for losses that contain a gradient, such as WGAN-GP's penalty.

    A loss that depends on the backward's dx, dweight and dbias depends through them on dy, x and weight. For a plane of
    M elements, with means over the plane, let xhat = (x - mean) * rstd, g = dy, u = ddx, and::

        a = mean(u * xhat),   c = mean(g * xhat),   s = mean((u - mean(u)) * (g - mean(g))) - a * c.

    The backward's dx adds sum(u * dx) = weight * rstd * M * s to the loss, its dweight ddweight * M * c, and its dbias
    ddbias * M * mean(g). Since d(M * c) / dx = rstd * (g - mean(g) - xhat * c), likewise for a with u, and
    d rstd / dx = -rstd^2 * xhat / M, the gradients are, in training, with q = ddweight - weight * rstd * a::

        ddy = weight * rstd * (u - mean(u)) + q * xhat + ddbias
        dweight = sum over the plane and, for a weight of shape (C,), over N, of rstd * M * s
        dx = rstd * (q * (g - mean(g) - xhat * c) - weight * rstd * (c * (u - mean(u) - xhat * a) + xhat * s)),

    and with running statistics (tracked eval), which are constants::

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
            without a weight (bias); a forward with an activation: apply the activation separately instead; one with
            given moments, a mask or lengths; or one with another eps_mode or ddof than the defaults.
    """
    check_saved(saved)
    x = saved.x
    place = place_of(x, "input")
    check_no_activation(saved.activation)
    check_no_mask(saved.mask is not None)
    check_own_statistics(saved)
    check_usual_rstd(saved)
    check_like(dy, "dy", x, place, saved.dtype)
    if ddx is None and ddweight is None and ddbias is None:
        raise ValueError("ddx, ddweight and ddbias are all None; needed is one of them at least")
    if ddx is not None:
        check_like(ddx, "ddx", x, place)
    for gradient, parameter, name in ((ddweight, saved.weight, "weight"), (ddbias, saved.bias, "bias")):
        if gradient is None:
            continue
        place_of(gradient, f"dd{name}")
        if parameter is None:
            raise ValueError(f"dd{name} is given, but the forward had no {name}; needed is None")
        check_per_channel(gradient, f"dd{name}", x, place, per_sample=True, dtype=saved.dtype)
        if gradient.shape != parameter.shape:
            raise ValueError(f"dd{name} has shape {gradient.shape}; needed is that of {name}, {parameter.shape}")
    backend = backend_of(place)
    if saved.mixed:
        one = OneDtype(saved, backend)
        found = backend.double_backward(one.wide(ddx), one.wide(ddweight), one.wide(ddbias), one.wide(dy), one.saved)
        return one.double_gradients(found, dy)
    ddy, dx, dweight = backend.double_backward(ddx, ddweight, ddbias, dy, saved)
    return ddy, dx, dweight
