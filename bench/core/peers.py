"""The contestants: cupynorm, a copy as the yardstick, and the installed peers.

A peer is a function (op, arrays) -> Contestant in PEERS. It raises UnavailableError if it is not installed or cannot
do the case. Every peer gets the arrays in the layout of the case, as its own users would hold them, and allocates its
results itself, as cupynorm does here. An epilogue is written as a peer's users would write it: the activation after the
normalisation, and a per-sample affine as a product and a sum.

"backward" is the backward alone: the forward it needs runs beforehand, once for each buffer set. "both" is a forward
and a backward, with nothing kept from earlier calls.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import cupynorm
from cupynorm._types import math_dtype

from .cases import PER_SAMPLE, Array, Arrays
from .timing import Contestant


class UnavailableError(Exception):
    """The reason why a peer does not take part."""


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"not installed ({error})") from None
    except Exception as error:  # a broken installation, or a warning that is an error
        raise UnavailableError(f"does not import ({type(error).__name__}: {error})") from None


def cupynorm_itself(op: str, arrays: Arrays, name: str = "cupynorm", outs: list[Array] | None = None) -> Contestant:
    """outs: arrays for the results of each set; without them results are new."""
    x, dy, weight, bias = arrays.x, arrays.dy, arrays.weight, arrays.bias
    options: dict[str, Any] = {"eps": arrays.eps}
    if arrays.activation is not None:
        options |= {"activation": arrays.activation, "negative_slope": arrays.negative_slope}

    def out(i: int) -> Array | None:
        return None if outs is None else outs[i]

    if op == "forward":
        return Contestant(
            name,
            lambda i: cupynorm.instance_norm(x[i], weight=weight, bias=bias, out=out(i), **options),
            lambda y: {"y": y},
        )
    names = ("dx", "dweight", "dbias")
    if op == "backward":
        saved = [cupynorm.instance_norm_forward(each, weight, bias, **options)[1] for each in x]
        return Contestant(
            name,
            lambda i: cupynorm.instance_norm_backward(dy[i], saved[i], out=out(i)),
            lambda gradients: dict(zip(names, gradients, strict=True)),
        )

    def both(i: int) -> Any:
        y, saved = cupynorm.instance_norm_forward(x[i], weight, bias, **options)
        return y, *cupynorm.instance_norm_backward(dy[i], saved)

    return Contestant(name, both, lambda results: dict(zip(("y", *names), results, strict=True)))


def numpy_alone(op: str, arrays: Arrays) -> Contestant:
    """cupynorm as it runs without llvmlite."""
    from cupynorm import cpu

    if arrays.xp is not np:
        raise UnavailableError("measured on the CPU only")
    if not cpu.compiled:
        raise UnavailableError(f"cupynorm itself is it: {cpu.without_llvmlite}")
    own = cupynorm_itself(op, arrays)

    def run(i: int) -> Any:
        cpu.compiled = False
        try:
            return own.run(i)
        finally:
            cpu.compiled = True

    return Contestant("numpy alone", run, own.answers)


def into_out(op: str, arrays: Arrays) -> Contestant:
    """cupynorm, with results into memory that is there; not of backwards after a forward, whose y is not needed."""
    if op == "both":
        raise UnavailableError("forward and backward alone only")
    outs = [arrays.xp.empty_like(each) for each in arrays.x]
    return cupynorm_itself(op, arrays, "out=", outs)


def new_copy(minimal_bytes: int, arrays: Arrays) -> Contestant:
    """Copy as many bytes into new memory, which the system must first provide, as for results on a CPU."""
    sources = [np.ones(minimal_bytes // 2, np.uint8) for _ in range(arrays.sets)]
    return Contestant("new copy", lambda i: sources[i].copy(), lambda _: {})


def copy(minimal_bytes: int, arrays: Arrays) -> Contestant:
    """The yardstick: a memcpy that reads and writes as many bytes as the operation must."""
    xp, size = arrays.xp, minimal_bytes // 2
    sources = [xp.zeros(size, xp.uint8) for _ in range(arrays.sets)]  # written below, so that the pages exist
    targets = [xp.zeros(size, xp.uint8) for _ in range(arrays.sets)]
    for array in (*sources, *targets):
        array.fill(1)

    def run(i: int) -> None:
        if xp is np:
            np.copyto(targets[i], sources[i])
        else:
            targets[i].data.copy_from_device_async(sources[i].data, size, xp.cuda.get_current_stream())

    return Contestant("copy", run, lambda _: {})


def textbook(op: str, arrays: Arrays) -> Contestant:
    """The formula as array expressions, in NumPy or CuPy."""
    xp, x, dy, slope = arrays.xp, arrays.x, arrays.dy, arrays.slope
    rank = len(arrays.shape) - 2
    spatial = tuple(range(2, rank + 2))
    weight, bias = (None if p is None else p.reshape(*p.shape, *(1,) * rank) for p in (arrays.weight, arrays.bias))
    summed = spatial if arrays.affine == PER_SAMPLE else (0, *spatial)

    def statistics(a: Array) -> tuple[Array, Array]:
        return a.mean(spatial, keepdims=True), 1 / xp.sqrt(a.var(spatial, keepdims=True) + arrays.eps)

    def forward(a: Array, mean: Array, rstd: Array) -> Array:
        y = (a - mean) * rstd
        if weight is not None:
            y = y * weight + bias
        if slope != 1:
            y = xp.where(y > 0, y, slope * y)
        return y.astype(a.dtype, copy=False)

    def backward(g: Array, a: Array, mean: Array, rstd: Array) -> dict[str, Array]:
        xhat = (a - mean) * rstd
        gradients = {}
        if slope != 1:
            g = xp.where((xhat if weight is None else xhat * weight + bias) > 0, g, slope * g)
        if weight is not None:
            gradients = {"dweight": (g * xhat).sum(summed), "dbias": g.sum(summed)}
            g = g * weight
        dx = rstd * (g - g.mean(spatial, keepdims=True) - xhat * (g * xhat).mean(spatial, keepdims=True))
        return {"dx": dx.astype(a.dtype, copy=False), **gradients}

    if op == "forward":
        return Contestant("textbook", lambda i: forward(x[i], *statistics(x[i])), lambda y: {"y": y})
    if op == "backward":
        saved = [statistics(a) for a in x]
        return Contestant("textbook", lambda i: backward(dy[i], x[i], *saved[i]), lambda gradients: gradients)

    def both(i: int) -> dict[str, Array]:
        mean, rstd = statistics(x[i])
        return {"y": forward(x[i], mean, rstd), **backward(dy[i], x[i], mean, rstd)}

    return Contestant("textbook", both, lambda results: results)


def _torch(op: str, arrays: Arrays, name: str, wrap: Callable[[Any, Any], Any]) -> Contestant:
    """PyTorch on the same memory (DLPack), and on CuPy's stream if that is CUDA's default stream, as here."""
    torch = _import("torch")
    xp = arrays.xp
    if xp is not np and not torch.cuda.is_available():
        raise UnavailableError("this PyTorch does not use the GPU")
    if xp is not np:
        torch.cuda.empty_cache()  # memory kept from the case before
    functional = torch.nn.functional
    activate = {
        None: lambda y: y,
        "relu": functional.relu,
        "leaky_relu": lambda y: functional.leaky_relu(y, arrays.negative_slope),
    }[arrays.activation]
    per_plane = (*arrays.shape[:2], *(1,) * (len(arrays.shape) - 2))

    def composition(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        if arrays.affine != PER_SAMPLE:
            return activate(functional.instance_norm(x, weight=weight, bias=bias, eps=eps))
        weight, bias = weight.to(x.dtype).view(per_plane), bias.to(x.dtype).view(per_plane)
        return activate(functional.instance_norm(x, eps=eps) * weight + bias)

    plain = arrays.activation is None and arrays.affine != PER_SAMPLE
    norm = wrap(torch, functional.instance_norm if plain else composition)

    def tensor(array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_dlpack(array.view(xp.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)

    def array(value: Any) -> Array:
        value = value.detach()
        return xp.from_dlpack(value.float() if value.dtype == torch.bfloat16 else value)

    def forward(x: Any) -> Any:
        return norm(x, weight=weight, bias=bias, eps=arrays.eps)

    xs = [tensor(x) for x in arrays.x]
    weight, bias = (None if p is None else tensor(p) for p in (arrays.weight, arrays.bias))
    if op == "forward":
        return Contestant(name, lambda i: forward(xs[i]), lambda y: {"y": array(y)})

    dys = [tensor(dy) for dy in arrays.dy]
    parameters = [p.requires_grad_() for p in (weight, bias) if p is not None]
    for x in xs:
        x.requires_grad_()
    names = ("dx", "dweight", "dbias")[: 1 + len(parameters)]

    def gradients(y: Any, i: int, keep: bool) -> Any:
        return torch.autograd.grad(y, [xs[i], *parameters], dys[i], retain_graph=keep)

    if op == "backward":
        ys = [forward(x) for x in xs]
        return Contestant(
            name,
            lambda i: gradients(ys[i], i, keep=True),
            lambda results: {n: array(r) for n, r in zip(names, results, strict=True)},
        )

    def both(i: int) -> Any:
        y = forward(xs[i])
        return y, *gradients(y, i, keep=False)

    return Contestant(
        name, both, lambda results: {n: array(r) for n, r in zip(("y", *names), results, strict=True)}
    )  # fmt: skip


def torch_eager(op: str, arrays: Arrays) -> Contestant:
    return _torch(op, arrays, "torch", lambda _, function: function)


def torch_compiled(op: str, arrays: Arrays) -> Contestant:
    def compiled(torch: Any, function: Any) -> Any:
        torch._dynamo.reset()  # compile each shape separately, with no fallback after eight
        torch._functorch.config.donated_buffer = False  # the graph is kept for repeated backwards
        return torch.compile(function, dynamic=False)

    return _torch(op, arrays, "torch.compile", compiled)


def jax_jit(op: str, arrays: Arrays) -> Contestant:
    """JAX from host copies, channels-last as (N, *spatial, C); on the GPU on its own stream."""
    gpu = arrays.xp is not np
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other contestants need memory, too
    if not gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax = _import("jax")
    jnp = jax.numpy
    jax.config.update("jax_enable_x64", True)
    try:
        device = jax.devices("gpu" if gpu else "cpu")[0]
    except RuntimeError as error:
        raise UnavailableError(f"this JAX does not use the device ({str(error).splitlines()[0]})") from None

    last = arrays.layout == "channels_last"
    rank = len(arrays.shape) - 2
    spatial = tuple(range(1, rank + 1)) if last else tuple(range(2, rank + 2))
    samples = arrays.shape[0] if arrays.affine == PER_SAMPLE else 1
    per_plane = (samples, *(1,) * rank, -1) if last else (samples, -1, *(1,) * rank)
    compute = math_dtype(arrays.host_x.dtype)

    def norm(x: Any, weight: Any, bias: Any) -> Any:
        a = x.astype(compute)
        mean, variance = a.mean(spatial, keepdims=True), a.var(spatial, keepdims=True)
        y = (a - mean) * jax.lax.rsqrt(variance + arrays.eps)
        if weight is not None:
            y = y * weight.reshape(per_plane) + bias.reshape(per_plane)
        if arrays.slope != 1:
            y = jnp.where(y > 0, y, arrays.slope * y)
        return y.astype(x.dtype)

    def sets(host: np.ndarray) -> list[Any]:
        first = jax.device_put(np.ascontiguousarray(np.moveaxis(host, 1, -1) if last else host), device)
        return [first] + [jnp.array(first, copy=True) for _ in range(arrays.sets - 1)]

    def array(value: Any) -> Array:
        host = np.asarray(value)
        if host.dtype.name == "bfloat16":
            host = host.astype(np.float32)
        return arrays.xp.asarray(np.moveaxis(host, -1, 1) if last and host.ndim > 2 else host)

    def named(names: tuple[str, ...]) -> Callable[[Any], dict[str, Array]]:
        return lambda values: {n: array(v) for n, v in zip(names, values, strict=True) if v is not None}

    wait = jax.block_until_ready
    parameters = [None if p is None else jax.device_put(p, device) for p in (arrays.host_weight, arrays.host_bias)]
    xs = sets(arrays.host_x)
    if op == "forward":
        forward = jax.jit(norm)
        return Contestant("jax", lambda i: forward(xs[i], *parameters), lambda y: {"y": array(y)}, wait)
    dys = sets(arrays.host_dy)
    if op == "backward":
        pull = jax.jit(lambda x, weight, bias: jax.vjp(norm, x, weight, bias)[1])  # the function is a pytree
        pulls = [pull(x, *parameters) for x in xs]
        apply = jax.jit(lambda pull, dy: pull(dy))
        return Contestant("jax", lambda i: apply(pulls[i], dys[i]), named(("dx", "dweight", "dbias")), wait)

    @jax.jit
    def both(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        y, pull = jax.vjp(norm, x, weight, bias)
        return y, *pull(dy)

    return Contestant(
        "jax", lambda i: both(xs[i], *parameters, dys[i]), named(("y", "dx", "dweight", "dbias")), wait
    )  # fmt: skip


def onnx_runtime(op: str, arrays: Arrays) -> Contestant:
    """The InstanceNormalization operator, which always has a scale and a bias, and operators for the epilogue."""
    if arrays.xp is not np:
        raise UnavailableError("measured on the CPU only")
    if op != "forward":
        raise UnavailableError("has no backward")
    if arrays.layout != "channels_first":
        raise UnavailableError("its operator is channels-first only")
    runtime, onnx = _import("onnxruntime"), _import("onnx")
    helper, dtype = onnx.helper, arrays.host_x.dtype
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    channels = arrays.shape[1]
    constants = {"one": np.ones(channels, dtype), "zero": np.zeros(channels, dtype)}
    if arrays.affine:
        constants |= {"weight": arrays.weight.astype(dtype), "bias": arrays.bias.astype(dtype)}
    affine = ["weight", "bias"] if arrays.affine is True else ["one", "zero"]
    chain: list[tuple[str, list[str], dict[str, float]]] = [("InstanceNormalization", affine, {"epsilon": arrays.eps})]
    if arrays.affine == PER_SAMPLE:
        ones = (1,) * (len(arrays.shape) - 2)
        constants |= {name: constants[name].reshape(*arrays.shape[:2], *ones) for name in ("weight", "bias")}
        chain += [("Mul", ["weight"], {}), ("Add", ["bias"], {})]
    if arrays.slope != 1:
        chain.append(("LeakyRelu", [], {"alpha": arrays.slope}) if arrays.slope else ("Relu", [], {}))
    names = ["x", *(f"z{i}" for i in range(1, len(chain))), "y"]
    nodes = [
        helper.make_node(operator, [names[i], *others], [names[i + 1]], **attributes)
        for i, (operator, others, attributes) in enumerate(chain)
    ]
    used = {name for _, others, _ in chain for name in others}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "instance_norm",
            [helper.make_tensor_value_info("x", kind, arrays.shape)],
            [helper.make_tensor_value_info("y", kind, arrays.shape)],
            [onnx.numpy_helper.from_array(constants[name], name) for name in sorted(used)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,  # of opset 17: older runtimes refuse newer ones
    )
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # failures are raised as well; report them once
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Contestant("onnxruntime", lambda i: session.run(None, {"x": arrays.x[i]})[0], lambda y: {"y": y})


PEERS: dict[str, Callable[[str, Arrays], Contestant]] = {
    "torch": torch_eager,
    "torch.compile": torch_compiled,
    "jax": jax_jit,
    "onnxruntime": onnx_runtime,
    "textbook": textbook,
    "numpy alone": numpy_alone,
    "out=": into_out,
}

#: Peers that run only on request: torch.compile takes many seconds for each shape, and out= is cupynorm once more.
ON_REQUEST = {"torch.compile", "out="}

#: Peers that compile for each case, which --compile-limit restricts.
COMPILING = {"torch.compile", "jax"}
