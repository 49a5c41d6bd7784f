"""Instance normalisation for Chainer: functions and links, differentiable to any order, on NumPy and CuPy arrays.

Importing this module makes Chainer 7.8.1 work with today's NumPy and CuPy (see `cupynorm.chainer_import`), so import it
first::

    import cupynorm.chainer
    import chainer

The names, defaults and conventions are those of Chainer's own `BatchNormalization`. Forward, backward and double
backward are cupynorm's; the third and higher derivatives, and with a mask the second, are composed of Chainer's
functions.

A bug in Chainer 7.8.1: the gradient of `deconvolution_2d` with respect to W alone passes x and W where their shapes are
needed (`self._set_cover_all(x, W)` in Deconvolution2DFunction.backward) and fails with "not enough values to unpack".
The gradient of a `convolution_2d` is such a deconvolution. A gradient penalty (WGAN-GP) therefore fails if the critic
ends with a `convolution_2d`, because the gradient passed to it depends on no parameter; so does a `Deconvolution2D`
applied to data. End the critic with a linear layer, or use ConvolutionND and DeconvolutionND, which are correct.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy

from ._checks import (
    check_count,
    check_dtype,
    check_eps,
    check_input,
    check_number,
    check_own_statistics,
    check_per_channel,
)
from ._types import ForwardCall, Saved, math_dtype
from .chainer_import import chainer
from .devices import result_dtype_of
from .distributed import Exchange, check_communicator
from .functional import instance_norm_double_backward

__all__ = [
    "InstanceNormalization",
    "InstanceNormalization1D",
    "InstanceNormalization2D",
    "InstanceNormalization3D",
    "fixed_instance_normalization",
    "instance_normalization",
]

#: A chainer.Variable, or a NumPy or CuPy array.
Given = Any

F = chainer.functions


class InstanceNormalizationFunction(chainer.FunctionNode):
    """Map x, and gamma and beta if given, to y. Chainer's hooks and graphs show the names of these classes."""

    def __init__(self, affine: tuple[bool, bool], exchange: Exchange, **options: Any):
        self._affine = affine
        self._exchange = exchange  # of the forward
        self._options = options
        self._saved: Saved | None = None

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any]:
        x, *parameters = inputs
        dtype = self._options.get("dtype")
        place = check_input(x, "x", integers=dtype is not None)
        names = [name for name, given in zip(("gamma", "beta"), self._affine, strict=True) if given]
        given = dict(zip(names, parameters, strict=True))
        for name, array in given.items():
            check_per_channel(array, name, x, place, per_sample=True, dtype=dtype)
        call = ForwardCall(x=x, weight=given.get("gamma"), bias=given.get("beta"), **self._options)
        result = self._exchange.forward(call, place)
        result.commit()
        self._saved = result.saved
        self.retain_inputs((0, 1) if self._affine[0] else (0,))
        return (result.y,)

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any]) -> tuple[Any, ...]:
        assert self._saved is not None
        backward = InstanceNormalizationGrad(self._affine, self._saved, self._options["eps"], self._exchange.comm)
        gradients: tuple[Any, ...] = backward.apply((*self.get_retained_inputs(), *grad_outputs))
        return gradients


class InstanceNormalizationGrad(chainer.FunctionNode):
    """Map x, gamma if given, and gy to gx, and to ggamma and gbeta if gamma and beta are given."""

    def __init__(self, affine: tuple[bool, bool], saved: Saved, eps: float, comm: Any = None):
        self._affine = affine
        self._saved = saved
        self._eps = eps
        self._comm = comm

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.retain_inputs(tuple(range(len(inputs))))
        with Exchange(self._comm) as exchange:
            gradients = exchange.backward(inputs[-1], self._saved, None)
        return tuple(gradient for gradient in gradients if gradient is not None)

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._saved.mask is not None:
            return self._composed_backward(grad_outputs)
        given = iter(grad_outputs)
        gradients = [next(given) if there else None for there in (True, *self._affine)]
        node = InstanceNormalizationDoubleGrad(
            self._affine, self._saved, self._eps, tuple(g is not None for g in gradients)
        )
        results: tuple[Any, ...] = node.apply((*self.get_retained_inputs(), *(g for g in gradients if g is not None)))
        return results

    def _composed_backward(self, grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compose the forward of Chainer's functions, and differentiate it twice."""
        if self._comm is not None:
            check_own_statistics(self._saved)
        again = chainer.config.enable_backprop
        with chainer.force_backprop_mode():
            inputs = _apart(self.get_retained_inputs())
            x, gamma, gy = inputs[0], inputs[1] if self._affine[0] else None, inputs[-1]
            beta = chainer.Variable(self._saved.bias) if self._affine[1] else None
            y = _composed(x, gamma, beta, self._saved, self._eps)
            first = _grad([y], [x, gamma, beta], [gy], again=True)
            there = [v for v, given in zip(first, (True, *self._affine), strict=True) if given]
            return tuple(_grad(there, inputs, grad_outputs, again=again))


class InstanceNormalizationDoubleGrad(chainer.FunctionNode):
    """Map x, gamma if given, gy, and the nonzero ones (`present`) among ggx, gggamma and ggbeta to the gradients of the
    loss with respect to x, gamma and gy."""

    def __init__(self, affine: tuple[bool, bool], saved: Saved, eps: float, present: tuple[bool, ...]):
        self._affine = affine
        self._saved = saved
        self._eps = eps
        self._present = present

    def _named(self, inputs: tuple[Any, ...]) -> tuple[Any, Any, Any, list[Any]]:
        """Return x, gamma, gy, and [ggx, gggamma, ggbeta], with None for absent ones."""
        left = iter(inputs)
        x = next(left)
        gamma = next(left) if self._affine[0] else None
        return x, gamma, next(left), [next(left) if there else None for there in self._present]

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.retain_inputs(tuple(range(len(inputs))))
        _, _, gy, (ggx, gggamma, ggbeta) = self._named(inputs)
        ggy, gx, ggamma = instance_norm_double_backward(ggx, gggamma, ggbeta, gy, self._saved)
        return (gx, ggy) if ggamma is None else (gx, ggamma, ggy)

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compose the forward of Chainer's functions, and differentiate it three times."""
        again = chainer.config.enable_backprop
        with chainer.force_backprop_mode():
            inputs = _apart(self.get_retained_inputs())
            x, gamma, gy, gradients = self._named(inputs)
            beta = chainer.Variable(self._saved.bias) if self._affine[1] else None
            y = _composed(x, gamma, beta, self._saved, self._eps)
            first = _grad([y], [x, gamma, beta], [gy], again=True)
            second = _grad(first, [x, gamma, gy], gradients, again=True)
            there = [v for v, given in zip(second, (True, gamma is not None, True), strict=True) if given]
            return tuple(_grad(there, inputs, grad_outputs, again=again))


def _apart(variables: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return new Variables: gy may have been computed from x, and that dependence is not part of a function of both."""
    return tuple(F.identity(v) if v.requires_grad else chainer.Variable(v.array) for v in variables)


def _grad(outputs: Any, inputs: Any, grad_outputs: Any, *, again: bool) -> list[Any]:
    """Call chainer.grad for Variables or None. The gradient is also None for an input without influence."""
    pairs = [(y, gy) for y, gy in zip(outputs, grad_outputs, strict=True) if y is not None and gy is not None]
    there = [x for x in inputs if x is not None]
    gradients = iter([None] * len(there))
    if pairs:
        ys, gys = zip(*pairs, strict=True)
        gradients = iter(chainer.grad(ys, there, gys, enable_double_backprop=again))
    return [None if x is None else next(gradients) for x in inputs]


def _composed(x: Any, gamma: Any, beta: Any, saved: Saved, eps: float) -> Any:
    """Compute y with Chainer's functions, from x's own statistics, or from those that were saved in tracked eval."""
    axes = tuple(range(2, x.ndim))
    dtype = x.dtype if saved.dtype is None else saved.dtype
    wide = math_dtype(dtype, x.dtype)
    xp, mask = chainer.backend.get_array_module(x.array), saved.mask

    def per_plane(values: Any) -> Any:
        values = F.cast(values, wide) if isinstance(values, chainer.Variable) else values
        return F.reshape(values, (-1, x.shape[1], *(1,) * len(axes)))

    def inside(values: Any) -> Any:
        return values if mask is None else F.where(mask, values, xp.zeros((), wide))

    z = inside(F.cast(x, wide))
    if saved.training:
        count = math.prod(x.shape[2:])
        if mask is not None:
            count = xp.maximum(mask.sum(axes, keepdims=True), 1).astype(wide)
        z = inside(z - F.sum(z, axes, keepdims=True) / count)
        z = z * (F.sum(z * z, axes, keepdims=True) / count + eps) ** -0.5
    else:
        z = (z - per_plane(saved.mean)) * per_plane(saved.rstd)
    if gamma is not None:
        z = z * per_plane(gamma)
    if beta is not None:
        z = z + per_plane(beta)
    return F.cast(inside(z), dtype)


def _apply(x: Given, gamma: Given | None, beta: Given | None, exchange: Exchange, **options: Any) -> Any:
    options["mask"] = chainer.as_array(options["mask"])
    inputs = [x, *(v for v in (gamma, beta) if v is not None)]
    return InstanceNormalizationFunction((gamma is not None, beta is not None), exchange, **options).apply(inputs)[0]


def instance_normalization(
    x: Given,
    gamma: Given | None,
    beta: Given | None,
    *,
    eps: float = 2e-5,
    running_mean: Any | None = None,
    running_var: Any | None = None,
    decay: float = 0.9,
    mask: Any = None,
    lengths: Any = None,
    dtype: Any = None,
    comm: Any = None,
) -> Any:
    """Normalise every plane of x with its own statistics: y = (x - mean) / sqrt(var + eps) * gamma + beta.

    mean and the biased var are taken over the spatial positions of each sample and channel (Ulyanov, Vedaldi, Lempitsky
    2016). Differentiable with respect to x, gamma and beta, to any order.

    Args:
        x: Variable or array (N, C, *spatial) of rank 3 or more: float16, float32 or float64, on a CPU or a GPU.
        gamma, beta: Variables or arrays (C,), or (N, C) for a scale and shift of each sample; None stands for 1 and 0.
            In the result's dtype, or float32 for float16, as are the running statistics.
        eps: added to the variance, not negative.
        running_mean, running_var: arrays (C,), both or neither, updated in place: running <- decay * running
            + (1 - decay) * (mean over N of the planes' means and unbiased variances). They are not updated when
            `chainer.functions.forget` recomputes a forward.
        decay: weight of the old running statistics, 1 - momentum. 1 leaves them as they are.
        mask, lengths: which positions count, as for `cupynorm.instance_norm`; y is 0 elsewhere, and so is x's gradient.
        dtype: of the result; None is x's. With one x may be an array of uint8, int8, uint16 or int16: then there are no
            gradients, those of gamma and beta included.
        comm: a communicator, of mpi4py or ChainerMN, if each process has only a part of every plane: all then normalise
            with the statistics of whole planes, and the gradients of gamma and beta are sums over the process's own
            part (`cupynorm.distributed`). Differentiable once.

    Returns:
        A Variable of x's shape, and its dtype or the given one.

    Raises:
        TypeError: an argument has the wrong type or dtype, or some inputs are on a CPU and others on a GPU.
        ValueError: shapes that do not fit, one running statistic without the other or on another device, one spatial
            element. Nothing has been written then.
    """
    with Exchange(check_communicator(comm)) as exchange:
        return _normalized(
            x, gamma, beta, exchange, eps=eps, running_mean=running_mean, running_var=running_var, decay=decay,
            mask=mask, lengths=lengths, dtype=dtype,
        )  # fmt: skip


def _normalized(
    x: Given,
    gamma: Given,
    beta: Given,
    exchange: Exchange,
    *,
    eps: Any,
    running_mean: Any,
    running_var: Any,
    decay: Any,
    mask: Any,
    lengths: Any,
    dtype: Any = None,
) -> Any:
    """`instance_normalization` within an exchange."""
    if dtype is not None:
        dtype = result_dtype_of(dtype)
    if chainer.config.in_recomputing:
        running_mean = running_var = None
    return _apply(
        x, gamma, beta, exchange, eps=check_eps(eps), running_mean=chainer.as_array(running_mean),
        running_var=chainer.as_array(running_var), momentum=1 - check_number(decay, "decay"), mask=mask,
        lengths=lengths, dtype=dtype,
    )  # fmt: skip


def fixed_instance_normalization(
    x: Given,
    gamma: Given | None,
    beta: Given | None,
    mean: Given,
    var: Given,
    eps: float = 2e-5,
    *,
    mask: Any = None,
    lengths: Any = None,
    dtype: Any = None,
) -> Any:
    """Normalise every plane of x with given statistics: y = (x - mean) / sqrt(var + eps) * gamma + beta.

    Differentiable with respect to every argument that is a Variable, mean and var included, to any order.

    Args:
        x, gamma, beta, eps, mask, lengths, dtype: see `instance_normalization`.
        mean, var: Variables or arrays (C,), in the dtypes of gamma and beta.

    Returns:
        A Variable of x's shape, and its dtype or the given one.

    Raises:
        TypeError, ValueError: see `instance_normalization`. One spatial element is allowed.
    """
    eps = check_eps(eps)
    if mean is None or var is None:
        raise ValueError("mean and var are both needed, but one of them is None")
    array, dtype = chainer.as_array(x), None if dtype is None else result_dtype_of(dtype)
    place = check_input(array, "x", integers=dtype is not None)
    for name, value in (("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta)):
        if value is not None:
            per_sample = name in ("gamma", "beta")
            check_per_channel(chainer.as_array(value), name, array, place, per_sample=per_sample, dtype=dtype)
    fixed_mean, fixed_var = chainer.as_array(mean), chainer.as_array(var)
    if any(isinstance(v, chainer.Variable) and v.requires_grad for v in (mean, var)) and chainer.config.enable_backprop:
        # The ratio is 1 and the difference 0: y is unchanged, and gets its derivatives by mean and var.
        wide = math_dtype(array.dtype if dtype is None else dtype, array.dtype)
        mean, var = (F.cast(chainer.as_variable(v), wide) for v in (mean, var))
        scale = ((var.array + eps) / (var + eps)) ** 0.5
        shift = (mean.array - mean) * (var + eps) ** -0.5
        if gamma is not None:
            gamma = F.cast(chainer.as_variable(gamma), wide)
            scale, shift = gamma * scale, gamma * shift
        gamma = scale
        beta = shift if beta is None else F.cast(chainer.as_variable(beta), wide) + shift
    return _apply(
        x, gamma, beta, Exchange(None), eps=eps, running_mean=fixed_mean, running_var=fixed_var, use_input_stats=False,
        mask=mask, lengths=lengths, dtype=dtype,
    )  # fmt: skip


def _initializer(given: Any, default: float, dtype: numpy.dtype) -> Any:
    """Return Chainer's initializer for a user's argument, with a dtype, as a copy: the user's object is not changed."""
    initializer = copy.copy(chainer.initializers._get_initializer(default if given is None else given))
    initializer.dtype = dtype
    return initializer


class InstanceNormalization(chainer.Link):
    """Instance normalisation of (N, C, *spatial) input of any rank from 3 on.

    Training (`chainer.config.train`) uses the input's own statistics. Test mode uses the averages if they are tracked,
    as `torch.nn.InstanceNorm2d` does with track_running_stats, else the input's own statistics.

    Args:
        size: C; None takes it from the first input, or from a loaded file.
        decay: weight of the old averages, 1 - momentum.
        eps: added to the biased variance.
        dtype: of parameters and averages: float16, float32 or float64; None: `chainer.config.dtype`, with float32 for
            mixed16. Input must have that dtype; a float32 link also takes float16.
        use_gamma, use_beta: train a scale (gamma), and a shift (beta), of each channel.
        initial_gamma, initial_beta: initializer, array or number; None: 1 and 0.
        track_avg_stats: keep averages of means and unbiased variances for test mode.
        initial_avg_mean, initial_avg_var: initializer, array or number; None: 0 and 1.
        comm: keyword only; a communicator, of mpi4py or ChainerMN, if each process has only a part of every plane: see
            `instance_normalization`. Copies and pickles of the link have none.

    Attributes:
        gamma: `chainer.Parameter` (C,), or None.
        beta: `chainer.Parameter` (C,), or None.
        avg_mean: array (C,), updated in place; persistent. None without track_avg_stats, and before the first input if
            the size is not known.
        avg_var: as avg_mean.
        N: number of batches that finetuning has seen; persistent. 0 without track_avg_stats.
        decay: as given; may be changed.
        eps: as given; may be changed.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    gamma: Any = None
    beta: Any = None
    _rank: int | None = None

    def __init__(
        self,
        size: int | None = None,
        decay: float = 0.9,
        eps: float = 2e-5,
        dtype: Any = None,
        use_gamma: bool = True,
        use_beta: bool = True,
        initial_gamma: Any = None,
        initial_beta: Any = None,
        track_avg_stats: bool = False,
        initial_avg_mean: Any = None,
        initial_avg_var: Any = None,
        *,
        comm: Any = None,
    ):
        super().__init__()
        self.comm = check_communicator(comm)
        self._size = None if size is None else check_count(size, "size", 0)
        self.decay = check_number(decay, "decay")
        self.eps = check_eps(eps)
        self._dtype = numpy.dtype(chainer.get_dtype(dtype, map_mixed16=numpy.float32))
        check_dtype(self._dtype, "dtype")
        self.track_avg_stats = bool(track_avg_stats)
        self._initial_averages = {
            "avg_mean": _initializer(initial_avg_mean, 0, self._dtype),
            "avg_var": _initializer(initial_avg_var, 1, self._dtype),
        }
        self.N = 0
        self.avg_mean: Any = None
        self.avg_var: Any = None
        with self.init_scope():
            if use_gamma:
                self.gamma = chainer.Parameter(_initializer(initial_gamma, 1, self._dtype))
            if use_beta:
                self.beta = chainer.Parameter(_initializer(initial_beta, 0, self._dtype))
        if self.track_avg_stats:
            for name in ("N", *self._initial_averages):
                self.register_persistent(name)
        if self._size is not None:
            self._initialize(self._size)

    def _initialize(self, size: int) -> None:
        """Create the parameters and averages that do not exist yet."""
        for parameter in (self.gamma, self.beta):
            if parameter is not None and not parameter.is_initialized:
                parameter.initialize((size,))
        for name, initializer in self._initial_averages.items():
            if self.track_avg_stats and getattr(self, name) is None:
                array = chainer.initializers.generate_array(
                    initializer, (size,), self.xp, dtype=self._dtype, device=self.device
                )
                setattr(self, name, array)

    def _check(self, x: Any, use_input_stats: bool) -> None:
        """Raise if x cannot be normalised, before anything is created or counted for it."""
        check_input(x, "x")
        if self._rank is not None and x.ndim != self._rank + 2:
            raise ValueError(f"expected {self._rank + 2}D input (got {x.ndim}D input)")
        if self._size is not None and x.shape[1] != self._size:
            raise ValueError(f"x has shape {x.shape}, with {x.shape[1]} channels; the link's size is {self._size}")
        if use_input_stats and math.prod(x.shape[2:]) == 1 and self.comm is None:
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.shape}")
        if self.gamma is None and self.beta is None and not self.track_avg_stats:
            return
        if self._dtype not in (x.dtype, math_dtype(x.dtype)):
            raise TypeError(
                f"x has dtype {x.dtype} and the link {self._dtype}; x must be {self._dtype}"
                f"{' or float16' if self._dtype == numpy.float32 else ''}"
            )
        device = chainer.backend.get_device_from_array(x)
        if device != self.device:
            raise ValueError(
                f"x is on {device} and the link on {self.device}; move one of them "
                f"(link.to_device({str(device)!r}), or chainer.get_device({str(self.device)!r}).send(x))"
            )

    def forward(self, x: Given, finetune: bool = False, *, mask: Any = None, lengths: Any = None) -> Any:
        """Normalise x.

        Args:
            x: Variable or array (N, C, *spatial) on the link's device.
            finetune: in training, average over all batches since `start_finetuning` (or since the link was created)
                with equal weights: decay is 1 - 1 / N. No effect without track_avg_stats.
            mask, lengths: see `instance_normalization`.

        Returns:
            A Variable of x's shape and dtype.

        Raises:
            TypeError, ValueError: see `instance_normalization`; x has another device, rank or number of channels.
                Nothing has been created, counted or written then. (With a comm, parameters whose size was not known
                exist if another process is the one that fails.)
        """
        training = bool(chainer.config.train)
        use_input_stats = training or not self.track_avg_stats
        with Exchange(self.comm if use_input_stats else None) as exchange:
            self._check(chainer.as_array(x), use_input_stats)
            self._initialize(x.shape[1])
            if not use_input_stats:
                return fixed_instance_normalization(
                    x, self.gamma, self.beta, self.avg_mean, self.avg_var, self.eps, mask=mask, lengths=lengths
                )
            finetune = finetune and self.track_avg_stats and not chainer.config.in_recomputing
            y = _normalized(
                x, self.gamma, self.beta, exchange, eps=self.eps, running_mean=self.avg_mean,
                running_var=self.avg_var, decay=self.N / (self.N + 1) if finetune else self.decay, mask=mask,
                lengths=lengths,
            )  # fmt: skip
        self.N += bool(finetune)
        return y

    def __getstate__(self) -> dict[str, Any]:
        # A communicator belongs to its process.
        return self.__dict__ | {"comm": None}

    def start_finetuning(self) -> None:
        """Reset the count of batches, N, before finetuning again."""
        self.N = 0

    def serialize(self, serializer: Any) -> None:
        """Save, or load in place. A link without averages gets those of the file, in its own dtype and on its device; a
        file saved before the size was known leaves the averages as they are."""
        before = {name: getattr(self, name) for name in self._initial_averages}
        super().serialize(serializer)
        for name, old in before.items():
            loaded = getattr(self, name)
            if loaded is None:
                setattr(self, name, old)
            elif old is None:
                setattr(self, name, self.device.send(numpy.asarray(loaded, self._dtype)))

    @property
    def printable_specs(self) -> Iterator[tuple[str, Any]]:
        yield "size", self._size
        yield "decay", self.decay
        yield "eps", self.eps
        yield "dtype", self._dtype.name
        yield "use_gamma", self.gamma is not None
        yield "use_beta", self.beta is not None
        yield "track_avg_stats", self.track_avg_stats


class InstanceNormalization1D(InstanceNormalization):
    """`InstanceNormalization` of (N, C, L) input alone."""

    _rank = 1


class InstanceNormalization2D(InstanceNormalization):
    """`InstanceNormalization` of (N, C, H, W) input alone."""

    _rank = 2


class InstanceNormalization3D(InstanceNormalization):
    """`InstanceNormalization` of (N, C, D, H, W) input alone."""

    _rank = 3
