"""The layers: parameters, running statistics, and an explicit forward and backward."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from . import devices, distributed
from ._checks import (
    check_activation,
    check_apart,
    check_count,
    check_dtype,
    check_eps,
    check_eps_mode,
    check_number,
    kind_of,
    place_of,
)
from ._types import Array, ForwardCall, Saved, commit
from .inference import inferring
from .parameters import Parameter, numbers_of
from .statistics import GradientSums, Moments


def _write(own: Mapping[str, Array], values: Mapping[str, np.ndarray], layer: _InstanceNorm) -> None:
    """Copy values into a layer's own arrays of the same names, cast to their dtypes: all of them or none."""
    for name in values:
        if isinstance(own[name], np.ndarray) and not own[name].flags.writeable:
            raise ValueError(f"{name} of {layer!r} is read-only; it must be writable")
    moved = {name: devices.to_device(v.astype(own[name].dtype), layer.device) for name, v in values.items()}
    commit(*(partial(operator.setitem, own[name], ..., value) for name, value in moved.items()))


def _way_out(statistics: list[str]) -> str:
    """Advise on unexpected running statistics; "" without any."""
    if not statistics:
        return ""
    return (
        f". {' and '.join(statistics)} are running statistics, which this layer does not track; PyTorch before 0.4.0 "
        "saved them for every layer. Remove these keys from the state (strict=False ignores them) or, if you need the "
        "statistics, create the layer with track_running_stats=True"
    )


def _check_gradient(name: str, parameter: Parameter) -> None:
    """Raise if backward cannot add to the gradient, which users may have assigned."""
    grad, data = parameter.grad, parameter.data
    if grad is None:
        return
    place, own = place_of(data, name), place_of(grad, f"{name}.grad")
    if own != place or grad.shape != data.shape or grad.dtype != data.dtype:
        raise ValueError(
            f"{name}.grad is {grad.shape} {grad.dtype} on {own}; backward adds to it and needs "
            f"{data.shape} {data.dtype} on {place}, or None"
        )
    if isinstance(grad, np.ndarray) and not grad.flags.writeable:
        raise ValueError(f"{name}.grad is read-only; backward adds to it")


def _is_saved(kept: Any) -> bool:
    """Return True for a layer's `saved` after a forward."""
    return isinstance(kept, tuple) and len(kept) == 2 and isinstance(kept[0], Saved)


def _level_of_caller() -> int:
    """Return the stacklevel of a warning that points at the caller of this module, also if a layer has a comm."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, distributed.__name__):
        level, frame = level + 1, frame.f_back
    return level


class _InstanceNorm:
    """Instance normalisation over {rank}-dimensional planes, with the behaviour of torch.nn.InstanceNorm{rank}d.

    Args:
        num_features: C, the number of channels.
        eps: not negative; see eps_mode.
        momentum: weight of a new observation in the running statistics; None or 0 leaves them as they are.
        affine: if True, the layer has a trained weight (initially ones) and bias (initially zeros), of shape (C,).
        track_running_stats: if True, keep running_mean and running_var, and normalise with them in eval mode.
        device: "cpu", "cuda" or "cuda:<number>"; None takes the GPU if one is usable, else the CPU.
        dtype: of parameters and running statistics: float16, bfloat16, float32 (default) or float64.
        bias: keyword only; False leaves the bias out of an affine layer.
        activation: keyword only; applied to the result: None, "relu", "leaky_relu", "silu" or "gelu", as in
            `cupynorm.instance_norm`.
        negative_slope: keyword only; slope of "leaky_relu" below 0.
        ddof: keyword only; delta degrees of freedom of the variance, as in `cupynorm.instance_norm`.
        eps_mode: keyword only; where eps is added: "variance", "std" or "max", as in `cupynorm.instance_norm`.
        comm: keyword only; a communicator, if each process has only a part of every plane: any cut of the spatial
            positions, also into parts of unequal size or none. It needs `allgather(object) -> list`, as mpi4py's
            communicators have it; see `cupynorm.distributed`. All processes then normalise with the statistics of whole
            planes, and have the same running statistics. weight.grad and bias.grad are sums over the process's own
            part: the gradients are those of all processes together, as in data-parallel training. All processes call
            forward and backward alike, in the same mode; if a call is refused on one of them, it raises on all. Copies
            and pickles of a layer have no comm.

    Attributes:
        weight: Parameter (C,), or None.
        bias: Parameter (C,), or None.
        running_mean: array (C,), updated in place, or None.
        running_var: array (C,), updated in place, or None.
        num_batches_tracked: int64 array (), always 0, as PyTorch's is; or None.
        training: True initially; set by `train` and `eval`.
        saved: the state that the last forward kept for its backward; None before the first forward, and after one
            within `cupynorm.inference_mode`. See `backward`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
        RuntimeError: a GPU is requested but not usable.

    Example:
        >>> layer = cn.InstanceNorm1d(2, affine=True, device="cpu")
        >>> y = layer.forward(np.arange(8, dtype=np.float32).reshape(1, 2, 4))
        >>> dx = layer.backward(np.ones_like(y))
        >>> layer.bias.grad
        array([4., 4.], dtype=float32)
    """

    _spatial_rank: int
    _parameters = ("weight", "bias")
    _buffers = ("running_mean", "running_var", "num_batches_tracked")
    _inferred = False  # True if saved is None because the last forward ran in inference_mode

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        ddof: float = 0.0,
        eps_mode: str = "variance",
        comm: Any = None,
    ):
        self.comm = distributed.check_communicator(comm)
        self.num_features = check_count(num_features, "num_features", 0)
        self.eps = check_eps(eps)
        self.momentum = None if momentum is None else check_number(momentum, "momentum")
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        check_activation(activation)
        self.activation = activation
        self.negative_slope = check_number(negative_slope, "negative_slope")
        check_eps_mode(eps_mode)
        self.eps_mode = eps_mode
        self.ddof = check_number(ddof, "ddof")
        self.training = True
        dtype = np.dtype(np.float32) if dtype is None else devices.dtype_of(dtype)
        check_dtype(dtype, "dtype")
        self.device = devices.resolve(device)
        self.weight: Parameter | None = None
        self.bias: Parameter | None = None
        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        self.num_batches_tracked: Array | None = None
        self.saved: tuple[Saved, bool] | None = None
        # A layer without arrays takes input on any device, unless the user named one.
        self._anywhere = device is None and not (self.affine or self.track_running_stats)
        shape = (self.num_features,)
        if self.affine:
            self.weight = Parameter(devices.to_device(np.ones(shape, dtype), self.device))
            if bias:
                self.bias = Parameter(devices.to_device(np.zeros(shape, dtype), self.device))
        if self.track_running_stats:
            self.running_mean = devices.to_device(np.zeros(shape, dtype), self.device)
            self.running_var = devices.to_device(np.ones(shape, dtype), self.device)
            self.num_batches_tracked = devices.to_device(np.zeros((), np.int64), self.device)

    # Computation

    def forward(
        self,
        x: Array,
        *,
        weight: Array | None = None,
        bias: Array | None = None,
        residual: Array | None = None,
        out: Array | None = None,
        moments: Moments | None = None,
        mask: Array | None = None,
        lengths: Any = None,
        dtype: Any = None,
    ) -> Array:
        """Normalise x of shape (N, C, *spatial), or (C, *spatial) for one sample.

        Use the running statistics in eval mode if the layer tracks them, else x's own statistics. Keep for backward:
        x itself (not a copy), two or three numbers per plane, and the weight, bias and (with an activation) residual of
        the call; within `cupynorm.inference_mode` keep nothing.

        Args:
            x: NumPy or CuPy array on the layer's device, in the layer's dtype; a float32 layer also takes float16 and
                bfloat16, and with dtype= other dtypes.
            weight, bias: scale and shift of this call, for layers with affine=False only: (C,), or (N, C) for each
                sample (adaptive instance normalisation).
            residual: added before the activation: x's shape, dtype and device.
            out: array for the result. With x itself, backward is refused; with the residual, it is refused if the
                layer has an activation.
            moments: of whole planes, if x has only a part of each: see `cupynorm.instance_norm`. (1, C) for one sample.
            mask, lengths: the positions that count, as for `cupynorm.instance_norm`; the backward remembers them.
            dtype: of the result and the residual, if it is not x's: see `cupynorm.instance_norm`. Integers have no
                backward.

        Returns:
            An array of x's shape, and its dtype or the given one: out, or a new one.

        Raises:
            TypeError, ValueError: see `cupynorm.instance_norm`; weight or bias is given to an affine layer. Nothing
                has been written then.
        """
        with distributed.Exchange(self.comm if self._uses_input_stats else None) as exchange:
            more = {"moments": moments, "mask": mask, "lengths": lengths, "dtype": dtype}
            result = exchange.forward(*self._call(x, weight, bias, residual, out, more))
        unbatched = x.ndim == self._spatial_rank + 1
        saved = None if result.saved is None else (result.saved, unbatched)
        inferred = result.saved is None
        result.commit(partial(setattr, self, "saved", saved), partial(setattr, self, "_inferred", inferred))
        if out is not None:
            return out
        return result.y[0] if unbatched else result.y

    def _call(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None,
        out: Array | None,
        more: dict[str, Any],
    ) -> tuple[ForwardCall, str]:
        """Check what the functions do not, and return the call and its place. more: other arguments of the call."""
        place = place_of(x, "input")
        rank = self._spatial_rank
        if x.ndim not in (rank + 1, rank + 2):
            raise ValueError(f"expected {rank + 1}D or {rank + 2}D input (got {x.ndim}D input)")
        if not self._anywhere and place != self.device:
            raise TypeError(
                f"the layer is on {self.device} and the input on {place}: move the layer with "
                f"{'to_cpu()' if place == 'cpu' else 'to_gpu()'}, or the input with "
                f"{'cupy.asnumpy' if self.device == 'cpu' else 'cupy.asarray'}"
            )
        if self.affine and (weight is not None or bias is not None):
            raise ValueError("weight and bias of a call need a layer with affine=False; this layer has its own")
        unbatched = x.ndim == rank + 1
        if unbatched:
            for name, array in (("residual", residual), ("out", out)):
                if array is not None:
                    kind_of(array, name)
            if residual is not None and residual.shape != x.shape:
                raise ValueError(f"residual has shape {residual.shape}; needed is the input's, {x.shape}")
        axis = 0 if unbatched else 1
        if x.shape[axis] != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={axis} to match num_features ({self.num_features}), "
                    f"but got: {x.shape[axis]}."
                )
            if not self.track_running_stats:
                warnings.warn(
                    f"input's size at dim={axis} does not match num_features ({self.num_features}). You can silence "
                    "this warning by not passing in num_features, which is not used because affine=False",
                    UserWarning,
                    stacklevel=_level_of_caller(),
                )
        call = ForwardCall(
            x=x[None] if unbatched else x,
            weight=weight if self.weight is None else self.weight.data,
            bias=bias if self.bias is None else self.bias.data,
            running_mean=self.running_mean,
            running_var=self.running_var,
            use_input_stats=self._uses_input_stats,
            momentum=self.momentum or 0.0,
            eps=self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual[None] if unbatched and residual is not None else residual,
            out=out[None] if unbatched and out is not None else out,
            save=not inferring(),
            ddof=self.ddof,
            eps_mode=self.eps_mode,
            **more,
        )
        return call, place

    @property
    def _uses_input_stats(self) -> bool:
        return self.training or not self.track_running_stats

    def __call__(self, x: Array, **given: Any) -> Array:
        """The same as forward."""
        return self.forward(x, **given)

    def backward(
        self,
        dy: Array,
        *,
        saved: tuple[Saved, bool] | None = None,
        out: Array | None = None,
        sums: GradientSums | None = None,
    ) -> Array | tuple[Array, ...]:
        """Return the gradient of a forward's input, and add to weight.grad and bias.grad.

        Args:
            dy: gradient of the forward's output: its shape and dtype.
            saved: for a layer that is called several times before a backward (shared weights, pipelines,
                recurrence), the layer's `saved` as it was after the forward in question. None: the last forward.
            out: array for dx; it may be dy itself.
            sums: of whole planes, if x had only a part of each: see `cupynorm.instance_norm_backward`.

        Returns:
            dx, if that forward was called with x alone (and out); else a tuple: dx, then the gradients of the weight,
            bias and residual given to that forward, in this order, each in the shape and dtype of its argument. The
            gradient of the residual is dy itself (for one sample, a view of it) without an activation, unless out is
            dy.

        Raises:
            RuntimeError: there was no forward, or the last one ran within `cupynorm.inference_mode`.
            TypeError, ValueError: saved is not a layer's `saved`; see also `cupynorm.instance_norm_backward`. Nothing
                has been written then.
        """
        kept: Any = self.saved if saved is None else saved
        # Without a usable `saved` the other processes are expected to be in this layer's mode.
        exchanges = kept[0].count is not None if _is_saved(kept) else self._uses_input_stats
        with distributed.Exchange(self.comm if exchanges else None) as exchange:
            found = exchange.backward(*self._check_backward(kept, dy, out), sums)
        call, unbatched = kept
        dx, dweight, dbias = found[:3]
        dresidual: list[Any] = [found.dresidual] if call.with_residual else []
        gradients: list[Any] = [out if out is not None else dx[0] if unbatched else dx]
        writes = []
        for parameter, gradient in ((self.weight, dweight), (self.bias, dbias)):
            if parameter is None:
                if gradient is not None:  # of the forward's own arguments
                    gradients.append(gradient)
            elif parameter.grad is None:
                writes.append(partial(setattr, parameter, "grad", gradient))
            else:
                writes.append(partial(operator.setitem, parameter.grad, ..., parameter.grad + gradient))
        gradients += [g[0] if unbatched else g for g in dresidual]
        result = gradients[0] if len(gradients) == 1 else tuple(gradients)
        commit(*writes)
        return result

    def _check_backward(self, kept: Any, dy: Array, out: Array | None) -> tuple[Array, Saved, Array | None]:
        """Check what the functions do not, and return dy, saved and out for them."""
        if kept is None and self._inferred:
            raise RuntimeError(
                "backward needs the state of a forward, but the last one ran within cupynorm.inference_mode(): "
                "do the forward again outside of it"
            )
        if kept is None:
            raise RuntimeError("backward needs a forward before it")
        if not _is_saved(kept):
            raise TypeError(f"saved must be the layer's .saved after a forward, got {type(kept).__qualname__}")
        call, unbatched = kept
        if unbatched:
            kind_of(dy, "dy")
            if dy.shape != call.x.shape[1:]:
                raise ValueError(f"dy has shape {dy.shape}; needed is the input's, {call.x.shape[1:]}")
            if out is not None:
                kind_of(out, "out")
        named = [(name.lstrip("/"), trained) for name, trained in self.namedparams()]
        for name, trained in named:
            _check_gradient(name, trained)
        check_apart(
            [(f"{name}.grad", trained.grad) for name, trained in named if trained.grad is not None],
            [(name, trained.data) for name, trained in named],
        )
        return (dy[None], call, None if out is None else out[None]) if unbatched else (dy, call, out)

    # Modes and parameters

    def train(self, mode: bool = True) -> _InstanceNorm:
        """Normalise with the input's statistics and update the running ones. Returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> _InstanceNorm:
        """Normalise with the running statistics, where they are tracked. Returns the layer."""
        return self.train(False)

    def namedparams(self) -> Iterator[tuple[str, Parameter]]:
        """Yield ("/weight", weight) and ("/bias", bias), if they exist. The names are Chainer's paths."""
        for name in self._parameters:
            parameter = getattr(self, name)
            if parameter is not None:
                yield f"/{name}", parameter

    def params(self) -> Iterator[Parameter]:
        """Yield weight and bias, if they exist."""
        for _, parameter in self.namedparams():
            yield parameter

    def cleargrads(self) -> None:
        """Set the gradients to None; the next backward stores new arrays."""
        for parameter in self.params():
            parameter.cleargrad()

    def zerograds(self) -> None:
        """Set the gradients to zeros: in place where they exist, so that references stay valid."""
        for parameter in self.params():
            parameter.zerograd()

    # State

    def _state(self) -> dict[str, Array]:
        """Return the arrays themselves, with PyTorch's keys and in its order."""
        state = {name.lstrip("/"): p.data for name, p in self.namedparams()}
        state |= {name: getattr(self, name) for name in self._buffers if getattr(self, name) is not None}
        return state

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """Return copies of weight, bias, running_mean, running_var and num_batches_tracked, if they exist.

        Keys and order are PyTorch's; the copies are on the layer's device.

        Args:
            prefix: put before every key: "down.1." gives the keys of a PyTorch model with this layer at model.down[1].
        """
        return {prefix + name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, *, prefix: str = "") -> None:
        """Copy a state into the layer's arrays, from any device, cast to the layer's dtype.

        Args:
            state: mapping with the keys of `state_dict` to NumPy or CuPy arrays, PyTorch tensors (on any device;
                bfloat16 and float8 too), or numbers in lists. Nothing is unpickled, and no method of any other object
                is called.
            strict: if True, missing and unexpected keys are errors. num_batches_tracked may be missing, and then stays
                as it is: nothing reads it, and files from before PyTorch 0.4.1 do not have it.
            prefix: the prefix of this layer's keys in the checkpoint of a whole model; keys without it are ignored.
                "" is for the state of this layer alone.

        Raises:
            KeyError: missing or unexpected keys. The message of each error names the entries, and nothing has been
                loaded then.
            TypeError: entries that are not arrays of real numbers, such as sparse, quantized, nested and complex
                tensors, and tensors without values (on the meta device, say).
            ValueError: entries of another shape, or read-only arrays of the layer.
        """
        own = {prefix + name: array for name, array in self._state().items()}
        if strict:
            missing = [name for name in own if name not in state and name != f"{prefix}num_batches_tracked"]
            unexpected = [name for name in state if name.startswith(prefix) and name not in own]
            statistics = [name for name in unexpected if name.removeprefix(prefix) in self._buffers]
            if missing or unexpected:
                raise KeyError(
                    f"state_dict does not fit {self!r}: missing {missing or 'nothing'}, "
                    f"unexpected {unexpected or 'nothing'}" + _way_out(statistics)
                )
        given = {name: numbers_of(state[name], name) for name in own if name in state}
        wrong = [
            f"{name} {value.shape}, not {own[name].shape}"
            for name, value in given.items()
            if value.shape != own[name].shape
        ]
        if wrong:
            raise ValueError(f"state_dict does not fit {self!r}: the shape of {'; of '.join(wrong)}")
        _write(own, given, self)

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1 and num_batches_tracked to 0, in place, where they are tracked.

        Raises:
            ValueError: one of them is read-only. Nothing has been written then.
        """
        self._reset(self._buffers)

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0, in place, and reset the running statistics. Gradients stay.

        Raises:
            ValueError: an array of the layer is read-only. Nothing has been written then.
        """
        self._reset(self._parameters + self._buffers)

    def _reset(self, names: tuple[str, ...]) -> None:
        own = self._state()
        ones = ("weight", "running_var")
        _write(own, {name: np.full(own[name].shape, name in ones) for name in names if name in own}, self)

    def to_gpu(self, device: Any = None) -> _InstanceNorm:
        """Move parameters, gradients and statistics to a GPU: a number, "cuda:<number>", or None for the current one.

        The state that the last forward kept is dropped. Returns the layer.
        """
        if device is None:
            device = "cuda"
        if isinstance(device, (int, np.integer)):
            device = f"cuda:{device}"
        if device == "cpu":
            raise ValueError("to_gpu needs the device of a GPU, got 'cpu': use to_cpu()")
        return self._move(devices.resolve(device))

    def to_cpu(self) -> _InstanceNorm:
        """Move parameters, gradients and statistics to the CPU. Returns the layer."""
        return self._move("cpu")

    def _move(self, device: str) -> _InstanceNorm:
        if device == self.device:
            self._anywhere = False
            return self
        arrays: list[tuple[Any, str, Array | None]]
        arrays = [(p, name, getattr(p, name)) for p in self.params() for name in ("_data", "grad")]
        arrays += [(self, name, getattr(self, name)) for name in self._buffers]
        moved = [(o, n, devices.to_device(devices.to_host(a), device)) for o, n, a in arrays if a is not None]
        facts = (("device", device), ("saved", None), ("_inferred", False), ("_anywhere", False))
        commit(*(partial(setattr, *each) for each in (*moved, *((self, *fact) for fact in facts))))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The saved state belongs to the last forward, not to a copy of the layer; a communicator to its process.
        return self.__dict__ | {"saved": None, "_inferred": False, "comm": None}

    def __repr__(self) -> str:
        epilogue = "" if self.activation is None else f", activation={self.activation!r}"
        if self.negative_slope != 0.01:
            epilogue += f", negative_slope={self.negative_slope}"
        conventions = "" if self.eps_mode == "variance" else f", eps_mode={self.eps_mode!r}"
        if self.ddof:
            conventions += f", ddof={self.ddof:g}"
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
            f"{epilogue}{conventions})"
        )


class InstanceNorm1d(_InstanceNorm):
    _spatial_rank = 1


class InstanceNorm2d(_InstanceNorm):
    _spatial_rank = 2


class InstanceNorm3d(_InstanceNorm):
    _spatial_rank = 3


for _layer in (InstanceNorm1d, InstanceNorm2d, InstanceNorm3d):
    _layer.__doc__ = (_InstanceNorm.__doc__ or "").replace("{rank}", str(_layer._spatial_rank))
