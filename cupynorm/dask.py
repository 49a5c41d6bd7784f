"""Instance normalisation of dask arrays (N, C, *spatial) of any chunks, with NumPy or CuPy arrays inside.

Chunks that hold whole planes are normalised in one pass. Others are parts of planes: their moments are merged by a tree
whose order follows from the chunks alone, then each chunk is normalised with the moments of its planes. So results have
the same bits in every run and with every scheduler.

    import cupynorm.dask as cnd
    import dask.array as da

    volume = da.from_zarr("volume.zarr")[None, None]
    cnd.instance_norm(volume)[0, 0].to_zarr("normalised.zarr")
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask._task_spec import Alias, GraphNode, Task, TaskRef, convert_legacy_graph  # as dask.array itself imports them
from dask.base import clone_key, tokenize
from dask.graph_manipulation import checkpoint
from dask.highlevelgraph import HighLevelGraph

from . import devices, functional
from ._checks import (
    check_activation,
    check_ddof,
    check_eps,
    check_eps_mode,
    check_input,
    check_input_dtype,
    check_number,
    mask_of_lengths,
    place_of,
)
from ._types import math_dtype
from .backend import backend_of
from .devices import result_dtype_of
from .statistics import DTYPES, Moments

__all__ = ["instance_norm", "moments"]

#: Up to so many neighbouring chunks are merged at a time.
SPLIT_EVERY = 8


def instance_norm(
    a: da.Array,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: da.Array | None = None,
    moments: Moments | None = None,
    reread: bool = True,
    mask: Any = None,
    lengths: Any = None,
    dtype: Any = None,
    ddof: float = 0.0,
    eps_mode: str = "variance",
) -> da.Array:
    """Normalise every plane of a dask array: activation((a - mean) / sqrt(var + eps) * weight + bias + residual).

    Nothing is computed before the result is. mean and the biased var are those of whole planes, also where the chunks
    cut them. For inference: there is no backward.

    Args:
        a: dask array (N, C, *spatial) of rank 3 or more, of NumPy or CuPy arrays; float16, bfloat16, float32 or
            float64, and with dtype= also uint8, int8, uint16 or int16; any chunks, of known sizes.
        weight, bias: (C,), or (N, C) for a scale and shift of each sample: dask arrays, or arrays of the kind that `a`
            has inside; in the result's dtype, or float32 for float16 and bfloat16 (float64 for float64 input).
        eps, activation, negative_slope, ddof, eps_mode: see `cupynorm.instance_norm`.
        residual: dask array of the result's shape and dtype; its chunks are changed to a's.
        mask: bool, of a shape that broadcasts to a's: a dask array of any chunks, or an array. See
            `cupynorm.instance_norm`.
        lengths: in place of a mask: N integers, a list or a NumPy array.
        dtype: of the result; None is a's.
        moments: used in place of those of `a` (`cupynorm.dask.moments`, `cupynorm.moments`); arrays (N, C).
        reread: where chunks cut planes, each chunk is needed twice: for the moments, and to be normalised. If True, it
            is loaded, and computed from what is loaded, again the second time, after all moments are known: memory need
            not hold all chunks. `a` must have the same values both times. Of k such calls on each other's results the
            first has its input loaded 2^k times: persist or store results between them, or pass False. If False, each
            chunk is computed once and stays in memory until the moments are known.

    Returns:
        A dask array with the shape, chunks and kind of arrays of `a`, and its dtype or the given one.

    Raises:
        TypeError, ValueError: an argument does not fit. Arrays inside that do not fit raise when they are computed.
    """
    if dtype is not None:
        dtype = result_dtype_of(dtype)
    _check(a, integers=dtype is not None)
    made = a.dtype if dtype is None else dtype
    eps, negative_slope = check_eps(eps), check_number(negative_slope, "negative_slope")
    check_activation(activation)
    check_eps_mode(eps_mode)
    positions, ddof = math.prod(a.shape[2:]), check_number(ddof, "ddof")
    whole = all(blocks == 1 for blocks in a.numblocks[2:])
    if moments is None and positions == 1:
        raise ValueError(f"Expected more than 1 spatial element, got input size {a.shape}")
    counts = _mask_of(mask, lengths, a)
    if moments is None and counts is None:
        check_ddof(ddof, positions)
    index = tuple(range(a.ndim))
    given: list[Any] = []
    for name, parameter in (("weight", weight), ("bias", bias)):
        given += _of_planes(parameter, name, a, per_channel=True, dtypes=(made, math_dtype(made, a.dtype)))
    sources = [a]
    if residual is not None:
        if not isinstance(residual, da.Array):
            raise TypeError(f"residual must be a dask array, got {type(residual).__qualname__}")
        if (residual.shape, residual.dtype) != (a.shape, made):
            raise ValueError(
                f"residual has shape {residual.shape} and dtype {residual.dtype}; needed are {a.shape} and {made}"
            )
        sources.append(residual.rechunk(a.chunks))
    if counts is not None:
        sources.append(counts)
    planes: da.Array | None = None
    if moments is not None:
        planes = _given_moments(moments, a)
    elif not whole:
        planes = _merged(a, counts, made)
    if planes is not None and reread:
        sources = [_again(each, planes) for each in sources]
    given += [None, None] if residual is None else [sources[1], index]
    given += [None, None] if counts is None else [sources[-1], index]
    result: da.Array = da.blockwise(
        _normalized, index, sources[0], index, *given, planes, None if planes is None else (0, 1), eps=eps, ddof=ddof,
        eps_mode=eps_mode, activation=activation, negative_slope=negative_slope, declared=a.dtype, asked=dtype,
        dtype=made, meta=a._meta.astype(made), align_arrays=False,
    )  # fmt: skip
    return result


def moments(a: da.Array, *, mask: Any = None, lengths: Any = None) -> Moments:
    """Compute the moments of each plane of a dask array: see `cupynorm.moments`.

    Args:
        a: dask array (N, C, *spatial) of rank 3 or more: see `instance_norm`; integers, too.
        mask, lengths: see `instance_norm`.

    Returns:
        Moments of dask arrays (N, C), with a's chunks of N and C and its kind of arrays. Compute them together, so that
        `a` is read once: `dask.compute(m)`.

    Raises:
        TypeError, ValueError: a does not fit.
    """
    _check(a, integers=True)
    planes = _merged(a, _mask_of(mask, lengths, a))
    found = [
        da.blockwise(
            _field, (0, 1), planes, (0, 1), field=field.name, dtype=DTYPES[field.name], token=f"moments-{field.name}",
            meta=a._meta.reshape((0, 0)).astype(DTYPES[field.name]), align_arrays=False,
        )
        for field in fields(Moments)
    ]  # fmt: skip
    return Moments(*found)


def _check(a: Any, integers: bool) -> None:
    if not isinstance(a, da.Array):
        raise TypeError(f"a must be a dask array, got {type(a).__module__}.{type(a).__qualname__}")
    check_input_dtype(a.dtype, "a", integers)
    if a.ndim < 3:
        raise ValueError(f"a must have at least 3 dimensions (N, C, *spatial), got shape {a.shape}")
    if any(math.isnan(size) for sizes in a.chunks for size in sizes):
        raise ValueError(f"a has chunks of unknown sizes, {a.chunks}: call its compute_chunk_sizes() first")


def _mask_of(mask: Any, lengths: Any, a: da.Array) -> da.Array | None:
    """Return a mask in a's shape and chunks; None without one."""
    if mask is not None and lengths is not None:
        raise ValueError("mask and lengths are both given; needed is one of them")
    if lengths is not None:
        if not isinstance(lengths, (list, tuple, np.ndarray)):
            raise TypeError(f"lengths must be a list or a NumPy array, got {type(lengths).__qualname__}")
        whole = mask_of_lengths(lengths, np.broadcast_to(np.int8(0), a.shape), "cpu")
        mask = whole[(slice(None), *[slice(1)] * (a.ndim - 2))].copy()  # without what is repeated
    if mask is None:
        return None
    if not hasattr(mask, "shape"):
        raise TypeError(f"mask must be an array, got {type(mask).__qualname__}")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; needed is bool")
    if not isinstance(mask, da.Array):
        mask = da.from_array(mask, chunks=-1, asarray=False)
    if mask.ndim > a.ndim or any(m not in (1, n) for m, n in zip(mask.shape[::-1], a.shape[::-1], strict=False)):
        raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to that of a, {a.shape}")
    mask = mask[(None,) * (a.ndim - mask.ndim)]
    chunks = [own if size == 1 else given for size, own, given in zip(mask.shape, mask.chunks, a.chunks, strict=True)]
    found: da.Array = da.broadcast_to(mask.rechunk(tuple(chunks)), a.shape, chunks=a.chunks)
    return found


def _of_planes(given: Any, name: str, a: da.Array, dtypes: tuple[Any, ...], per_channel: bool = False) -> list[Any]:
    """Return an array of numbers of planes or channels in a's chunks, and its index; [None, None] for None."""
    if given is None:
        return [None, None]
    shapes = (a.shape[1:2], a.shape[:2]) if per_channel else (a.shape[:2],)
    if not hasattr(given, "shape"):
        raise TypeError(f"{name} must be an array, got {type(given).__qualname__}")
    if given.shape not in shapes:
        raise ValueError(f"{name} has shape {given.shape}; needed is {' or '.join(map(str, shapes))}")
    if given.dtype not in dtypes:
        needed = " or ".join(dict.fromkeys(np.dtype(dtype).name for dtype in dtypes))
        raise TypeError(f"{name} has dtype {given.dtype}; needed is {needed}")
    chunks = a.chunks[2 - given.ndim : 2]
    if not isinstance(given, da.Array):
        given = da.from_array(given, chunks=chunks, asarray=False)
    return [given.rechunk(chunks), (1,) if given.ndim == 1 else (0, 1)]


def _again(a: da.Array, planes: da.Array) -> da.Array:
    """Return an array like `a` that is computed by tasks of its own, the first of which wait for all of `planes`.

    Data that is in memory, as in persisted arrays, is not copied.
    """
    graph, seed = dict(a.__dask_graph__()), tokenize(planes.name)
    gate = checkpoint(planes)
    nodes: dict[Any, GraphNode] = convert_legacy_graph(graph)  # without futures
    names = {key: clone_key(key, seed) for key, node in nodes.items() if isinstance(node, Task)}
    aliases = [(key, node.target) for key, node in nodes.items() if isinstance(node, Alias)]
    while more := [key for key, target in aliases if target in names and key not in names]:
        names |= {key: clone_key(key, seed) for key in more}
    made: dict[Any, Any] = {key: value for key, value in graph.items() if key not in names}
    for key, name in names.items():
        node = nodes[key].substitute(names, key=name)
        first = isinstance(node, Task) and not nodes[key].dependencies & names.keys()
        made[name] = Task(name, _after, node, TaskRef(gate.key)) if first else node
    name = clone_key(a.name, seed)
    for key in map(tuple, itertools.product([a.name], *map(range, a.numblocks))):
        if key not in names:
            made[(name, *key[1:])] = Alias((name, *key[1:]), key)
    layers = HighLevelGraph.from_collections(name, made, dependencies=[gate])
    return da.Array(layers, name, a.chunks, meta=a._meta)


def _after(value: Any, _: None) -> Any:
    return value


# Blocks of the arrays below are Moments: dask does not look at them.


def _merged(a: da.Array, mask: da.Array | None, dtype: Any = None) -> da.Array:
    """Return the moments of the planes of each chunk of N and C. dtype: of the results that they are for."""
    spatial, index = tuple(range(2, a.ndim)), tuple(range(a.ndim))
    if mask is not None:  # blocks of both
        meta = np.empty((0,) * a.ndim, object)
        a = da.blockwise(_Both, index, a, index, mask, index, dtype=object, meta=meta, align_arrays=False)
    return da.reduction(
        a, partial(_moments_of, made=dtype), _merge, axis=spatial, combine=_merge, concatenate=False, dtype=object,
        split_every=SPLIT_EVERY, meta=np.empty((0, 0), object), name="moments",
    )  # fmt: skip


def _given_moments(given: Moments, a: da.Array) -> da.Array:
    if not isinstance(given, Moments):
        raise TypeError(f"moments must be what moments returns, got {type(given).__qualname__}")
    arrays: list[Any] = []
    for name, array in vars(given).items():
        arrays += _of_planes(array, f"moments.{name}", a, (DTYPES[name],))
    made: da.Array = da.blockwise(
        Moments, (0, 1), *arrays, dtype=object, meta=np.empty((0, 0), object), align_arrays=False
    )
    return made


def _moments_of(x: Any, axis: Any, keepdims: bool, made: Any, computing_meta: bool = False) -> Any:
    """made: the dtype of results that the moments are for. (dask sets arguments of the name dtype.)"""
    if computing_meta:
        return np.empty((0,) * x.ndim, object)
    x, mask = x if isinstance(x, _Both) else (x, None)
    x = _plain(x)
    return backend_of(check_input(x, integers=True)).moments(x, _beside(mask, x), made)


class _Both(NamedTuple):
    """A chunk and its mask."""

    x: Any
    mask: Any


def _beside(mask: Any, x: Any) -> Any:
    """Return a mask where x is."""
    if mask is None or isinstance(x, np.ndarray) or not isinstance(mask, np.ndarray):
        return mask
    return devices.to_device(mask, place_of(x, "a chunk"))


def _merge(parts: Any, axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:
    """Merge the moments of neighbouring chunks, in lists nested as deep as there are axes."""
    if computing_meta:
        return np.empty((0, 0), object)
    first, *others = _flat(parts)
    return first.merge(*others)


def _flat(parts: Any) -> list[Moments]:
    return [parts] if isinstance(parts, Moments) else [each for part in parts for each in _flat(part)]


def _plain(x: Any) -> Any:
    """Return a chunk aligned and C-contiguous: a scheduler may have copied it to other memory and another layout, on
    which the order of additions depends."""
    if isinstance(x, np.ndarray):
        return np.require(x, requirements=["A", "C"])
    return x if x.flags.c_contiguous else x.copy("C")


def _field(planes: Moments, field: str) -> Any:
    return getattr(planes, field)


def _normalized(
    x: Any, weight: Any, bias: Any, residual: Any, mask: Any, planes: Moments | None, *, declared: Any, asked: Any,
    **options: Any,
) -> Any:  # fmt: skip
    if x.dtype != declared:
        raise TypeError(f"a chunk has dtype {x.dtype}, but the dask array's dtype is {declared}")
    x = _plain(x)
    return functional.instance_norm(
        x, weight=weight, bias=bias, residual=residual, moments=planes, mask=_beside(mask, x), dtype=asked, **options
    )
