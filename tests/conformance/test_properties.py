"""Odd inputs drawn by hypothesis: each gives the reference's result, or is refused with a clear error and no change.

Past failures are kept in PAST. A failure prints code that reproduces it.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from helpers import cases, reference, tiers
from helpers.backends import Backend
from helpers.compare import ROUNDING, Bits, bits
from helpers.masked import Exact, spoiled
from helpers.seeds import seed_of
from helpers.tiers import amount
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

import cupynorm as cn
from cupynorm import devices

#: The device to plan for: small, so that small planes reach most regimes.
DEVICE = cases.SMALL_DEVICE
DTYPES = ("float16", "bfloat16", "float32", "float64")
FUNCTION = HealthCheck.function_scoped_fixture  # all examples share the backend, as intended

#: Few kinds of call, for backends that compile each kind separately.
PLAIN = {"dtype": "float32", "activation": None, "residual": None}


def checks(most: int) -> Any:
    """Draw `most` examples in the full tier, a quarter by default, 20 times as many in the nightly one; the same ones
    for a seed. Slow examples are no failures."""
    asked = settings(
        max_examples=amount(most // 4 + 1, most, 20 * most),
        deadline=None, print_blob=True, database=None,
        suppress_health_check=[FUNCTION, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    return lambda function: asked(with_seed(seed_of(function.__name__))(function))


# Arrays


@st.composite
def shapes(draw: Any, least: int = 0) -> tuple[int, ...]:
    """(N, C, *spatial): few elements, any rank that NumPy has."""
    rank = draw(st.sampled_from([3, 3, 4, 4, 5, 7, 17, 33, 63, 64]))
    most = 600
    sizes = []
    for _ in range(rank):
        size = draw(st.integers(least, min(most, 9 if rank > 5 else 40)))
        if rank > 5 and draw(st.integers(0, 3)):
            size = 1
        most //= max(size, 1)
        sizes.append(size)
        most = max(most, least, 1)
    order = draw(st.permutations(range(rank))) if rank < 8 else range(rank)
    return tuple(sizes[i] for i in order)


#: The memory layouts of `laid`.
LAYOUTS = ("dense", "fortran", "permuted", "channels_last", "steps", "negative", "zero", "overlapping", "unaligned",
           "records", "bytes", "memmap", "readonly", "buffer")  # fmt: skip


#: Layouts whose elements lie at multiples of their size: a GPU accesses no others.
ALIGNED = tuple(layout for layout in LAYOUTS if layout not in ("unaligned", "records"))
CUPY_RANK = 25  # most axes that CuPy's own copy kernels support


def laid(draw: Any, values: np.ndarray, layout: str, folder: Any) -> np.ndarray:
    """Return an array of these values in a layout; 'zero' and 'overlapping' repeat some of them."""
    rank = values.ndim
    axes = draw(st.integers(0, rank - 1))
    if layout == "fortran":
        return np.asfortranarray(values)
    if layout == "permuted":
        order = draw(st.permutations(range(rank)))
        return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    if layout == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)
    if layout == "steps":
        step = draw(st.integers(2, 4))
        return np.repeat(values, step, axes)[(slice(None),) * axes + (slice(None, None, step),)]
    if layout == "negative":
        turn = (slice(None),) * axes + (slice(None, None, -1),)
        return np.ascontiguousarray(values[turn])[turn]
    if layout == "zero":
        once = values[(slice(None),) * axes + (slice(0, 1),)]
        return np.broadcast_to(once, values.shape) if values.size else values
    if layout == "overlapping":
        if not values.size:
            return values
        strides = [values.itemsize * draw(st.integers(0, 2)) for _ in range(rank)]
        reach = sum(stride * (size - 1) for stride, size in zip(strides, values.shape, strict=True))
        memory = np.resize(values.ravel(), reach // values.itemsize + 1)
        return np.lib.stride_tricks.as_strided(memory, values.shape, strides)
    if layout == "unaligned":
        memory = np.zeros(values.nbytes + 64, np.uint8)[draw(st.integers(1, 17)) :][: values.nbytes]
        array = memory.view(values.dtype).reshape(values.shape)
        array[...] = values
        return array
    if layout == "records":
        array = np.zeros(values.shape, [("a", np.int8), ("b", values.dtype)])["b"]
        array[...] = values
        return array
    if layout == "bytes":
        return np.frombuffer(values.tobytes() or b"\0" * 8, values.dtype)[: values.size].reshape(values.shape)
    if layout == "buffer":
        return np.frombuffer(io.BytesIO(values.tobytes() + b"\0" * 8).getbuffer(), values.dtype)[: values.size].reshape(
            values.shape
        )
    if layout == "memmap" and values.size and values.dtype.name != "bfloat16" and rank < 33:
        array = np.memmap(folder / "values", values.dtype, "w+", shape=values.shape)
        array[...] = values
        return array
    if layout == "readonly":
        values.flags.writeable = False
    return values


#: Easy and hard data.
DATA = ("normal", "offset", "constant", "nan", "inf", "both", "zeros")


def filled(draw: Any, shape: tuple[int, ...], dtype: str, data: str) -> np.ndarray:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = random.normal(size=shape)
    if data == "offset":
        values += 100 if dtype in ("float16", "bfloat16") else 1000
    elif data == "constant":
        values = np.full(shape, random.normal())
    elif data == "zeros":
        values = np.zeros(shape)
    elif values.size and data in ("nan", "inf", "both"):
        flat = values.reshape(-1)
        for bad in {"nan": [np.nan], "inf": [np.inf], "both": [np.inf, -np.inf, np.nan]}[data]:
            flat[random.integers(flat.size)] = bad
    return values.astype(devices.dtype_of(dtype))


def within(actual: np.ndarray, expected: np.ndarray, scale: Any, dtype: str, stored: str | None = None) -> None:
    """Assert agreement with the reference to a few roundings, of storage and of computation, relative to scale."""
    allowed = 2 * ROUNDING[stored or dtype] + 32 * ROUNDING["float64" if dtype == "float64" else "float32"]
    cases.within(actual, expected, np.maximum(np.abs(scale), 1e-3), allowed, "result")


def good_planes(*arrays: np.ndarray | None) -> np.ndarray:
    """Mask of the planes that are finite in all of these arrays."""
    present = [a for a in arrays if a is not None]
    good = np.ones(present[0].shape[:2], bool)
    for a in present:
        good &= np.isfinite(reference.wide(a)).all(tuple(range(2, a.ndim)))
    return good


def of_planes(values: np.ndarray | None, like: np.ndarray) -> Any:
    if values is None:
        return 1
    return np.abs(reference.wide(values)).reshape(*values.shape, *(1,) * (like.ndim - 2))


def check_call(backend: Backend, data: st.DataObject, folder: Any, fixed: dict[str, Any]) -> None:
    """Check forward and backward of a drawn call."""
    draw = data.draw

    def drawn(name: str, strategy: Any) -> Any:
        return fixed[name] if name in fixed else draw(strategy, label=name)

    backend.pretend(DEVICE)
    shape = drawn("shape", shapes())
    dtype = drawn("dtype", st.sampled_from(DTYPES))
    layouts = st.sampled_from(fixed.get("layouts", LAYOUTS))
    x_ = laid(draw, filled(draw, shape, dtype, drawn("data", st.sampled_from(DATA))), drawn("layout", layouts), folder)
    training = drawn("training", st.booleans())
    activation = drawn("activation", st.sampled_from([None, "relu", "leaky_relu", "silu", "gelu"]))
    residual_ = None
    if drawn("residual", st.sampled_from([None, "normal", "nan"])):
        kind = "nan" if draw(st.booleans()) else "normal"
        residual_ = laid(draw, filled(draw, shape, dtype, kind), draw(layouts), folder / "r" if folder else folder)
    params = dtype if dtype in ("float32", "float64") or draw(st.booleans()) else "float32"
    n, c, *spatial = shape

    def parameter() -> np.ndarray | None:
        form = draw(st.sampled_from([None, "c", "nc"]))
        if form is None:
            return None
        size = (c,) if form == "c" else (n, c)
        twice = filled(draw, (*size[:-1], 2 * c), params, "normal")
        return twice[..., :: draw(st.sampled_from([2, -2]))] if draw(st.booleans()) else twice[..., :c].copy()

    weight_, bias_ = parameter(), parameter()
    mean_ = filled(draw, (c,), params, "normal")
    var_ = np.abs(filled(draw, (c,), params, "normal")) + mean_.dtype.type(0.5)
    eps = draw(st.sampled_from([0.0, 1e-5, 1.0]), label="eps")
    momentum = draw(st.sampled_from([0.0, 0.1, 1.0]), label="momentum")
    x, weight, bias, mean, var = (
        None if a is None else backend.array(a) for a in (x_, weight_, bias_, mean_.copy(), var_.copy())
    )
    residual = None if residual_ is None else backend.array(residual_)
    options: dict[str, Any] = {"activation": activation, "negative_slope": 0.2}
    given = {"running_mean": mean, "running_var": var, "momentum": momentum, "eps": eps}
    before = bits(x_, weight_, bias_, residual_)

    def call(**more: Any) -> Any:
        return cn.instance_norm_forward(
            x, weight, bias, use_input_stats=training, residual=residual, **given, **options, **more
        )

    if training and math.prod(spatial) == 1:
        with pytest.raises(ValueError, match="more than 1 spatial"):
            call()
        assert bits(mean, var) == bits(mean_, var_)
        return
    y, saved = call()
    y_ = backend.host(y)
    assert (y_.shape, y_.dtype) == (shape, x_.dtype)
    if not x_.size:
        dy = backend.array(filled(draw, shape, dtype, "normal"))
        dx, *gradients = cn.instance_norm_backward(dy, saved)
        assert dx.shape == shape
        for gradient, p in zip(gradients, (weight_, bias_), strict=False):
            assert (gradient is None) == (p is None)
            assert p is None or (gradient.shape == p.shape and not backend.host(gradient).any())
        assert bits(mean, var) == bits(mean_, var_)
        return
    running = None if training else (mean_, var_)
    with np.errstate(all="ignore"):
        z = reference.before_activation(x_, weight_, bias_, eps=eps, running=running, residual=residual_)
        expected = reference.activate(z, activation, 0.2)
        xhat = reference.forward(x_, eps=eps, running=running)
    good = good_planes(x_, residual_) & np.isfinite(expected).all(tuple(range(2, x_.ndim)))
    scale = (1 + np.abs(xhat)) * of_planes(weight_, x_) + (0 if bias_ is None else of_planes(bias_, x_))
    scale = scale + (0 if residual_ is None else np.abs(reference.wide(residual_)))
    within(y_[good], expected[good], np.broadcast_to(scale, shape)[good], dtype)
    bad = ~np.isfinite(reference.wide(x_)).all(tuple(range(2, x_.ndim)))
    if training and activation is None:
        assert np.isnan(reference.wide(y_)[bad]).all()  # a plane with NaN or infinity is NaN, and no other
    if training and momentum:
        # Channels whose planes are all finite have finite statistics; the other channels do not.
        moved_mean, moved_var = (reference.wide(backend.host(a)) for a in (mean, var))
        fine = good_planes(x_).all(0)
        m, v = reference.moved(mean_, var_, np.nan_to_num(reference.wide(x_), posinf=0, neginf=0), momentum)
        sizes = [np.abs(s).mean(0) for s in reference.statistics(np.nan_to_num(reference.wide(x_), posinf=0, neginf=0))]
        within(backend.host(mean)[fine], m[fine], (np.abs(mean_) + sizes[0] + 1)[fine], dtype, params)
        within(backend.host(var)[fine], v[fine], (np.abs(var_) + 2 * sizes[1] + 1)[fine], dtype, params)
        assert np.isnan(moved_var[~fine]).all()
        assert not np.isfinite(moved_mean[~fine]).any()
    else:
        assert bits(mean, var) == bits(mean_, var_)

    dy_ = laid(draw, filled(draw, shape, dtype, draw(st.sampled_from(DATA))), draw(layouts), folder / "d")
    if activation in ("relu", "leaky_relu"):  # no gradient where rounding decides the side of the kink
        near = np.abs(np.nan_to_num(reference.wide(z))) <= 1e-3 + 0.02 * (dtype in ("float16", "bfloat16"))
        dy_ = np.where(near, dy_.dtype.type(0), dy_)
    dy = backend.array(dy_)
    dx, dweight, dbias, *_ = cn.instance_norm_backward(dy, saved)
    dx_ = backend.host(dx)
    assert (dx_.shape, dx_.dtype) == (shape, x_.dtype)
    for gradient, p in ((dweight, weight_), (dbias, bias_)):
        assert (gradient is None) == (p is None)
        assert p is None or (gradient.shape, backend.host(gradient).dtype) == (p.shape, p.dtype)
    with np.errstate(all="ignore"):
        exact, exact_w, exact_b, g = reference.backward(
            dy_, x_, weight_, bias=bias_, eps=eps, running=running, residual=residual_, **options
        )
        rstd = 1 / np.sqrt((reference.statistics(x_)[1] if training else reference.wide(var_)[None]) + eps)
    steep = activation in ("silu", "gelu")
    with np.errstate(all="ignore"):
        terms = np.abs(g) + (np.abs(reference.wide(dy_)) * (1 + np.abs(z)) if steep else 0)
    axes = tuple(range(2, x_.ndim))
    over = (slice(None), slice(None), *(None,) * (x_.ndim - 2))
    with np.errstate(all="ignore"):
        spread = terms + terms.mean(axes, keepdims=True)
        spread = spread + np.abs(xhat) * (terms * np.abs(xhat)).mean(axes, keepdims=True)
        spread = spread * of_planes(weight_, x_) * rstd[over]
    good &= good_planes(dy_) & np.isfinite(exact).all(axes)
    within(dx_[good], exact[good], spread[good], dtype)
    if good.all():
        for gradient, e, p, t in (
            (dweight, exact_w, weight_, terms * np.maximum(np.abs(xhat), 1)),
            (dbias, exact_b, bias_, terms),
        ):
            if p is not None:
                total = t.sum(axes if p.ndim == 2 else (0, *axes))
                within(backend.host(gradient), e, total, dtype, params)
    assert bits(x_, weight_, bias_, residual_) == before
    assert bits(x) == bits(x_)


@checks(150)
@given(data=st.data())
def test_any_call(backend: Backend, tmp_path_factory: Any, data: st.DataObject) -> None:
    """Shapes, strides, dtypes and options together."""
    fixed: dict[str, Any] = {}
    if backend.name == "compiled":
        fixed = {**PLAIN, "layouts": ("dense", "channels_last")}
    if backend.name == "simt" and tiers.asked == "default":
        fixed = PLAIN
    if backend.name == "cupy":
        fixed = {"layouts": ALIGNED, "shape": data.draw(shapes().filter(lambda shape: len(shape) <= CUPY_RANK))}
    folder = tmp_path_factory.mktemp("maps")
    for sub in "rd":
        (folder / sub).mkdir()
    check_call(backend, data, folder, fixed)


@checks(100)
@given(data=st.data())
def test_any_mask(backend: Backend, tmp_path_factory: Any, data: st.DataObject) -> None:
    """Masks of any shape that broadcasts, and any strides; NaN and infinities elsewhere."""
    draw, folder = data.draw, tmp_path_factory.mktemp("maps")
    (folder / "mask").mkdir()
    backend.pretend(DEVICE)
    most = CUPY_RANK if backend.name == "cupy" else 32  # as_strided and numpy.ma have limits
    shape = draw(shapes(1).filter(lambda shape: len(shape) <= most and math.prod(shape[2:]) > 1))
    dtype = "float32" if backend.name in ("compiled", "simt") else draw(st.sampled_from(DTYPES))
    layouts = {"compiled": ("dense", "channels_last"), "cupy": ALIGNED}.get(backend.name, LAYOUTS)
    values = filled(draw, shape, dtype, draw(st.sampled_from(("normal", "offset", "constant"))))
    own = [size if draw(st.booleans()) else 1 for size in shape[draw(st.integers(0, len(shape) - 1)) :]]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask_ = laid(
        draw, random.random(own) < draw(st.sampled_from((0.2, 0.7, 0.95))), draw(mask_layouts(own)), folder / "mask"
    )
    whole = np.broadcast_to(mask_, shape)
    x_ = laid(draw, spoiled(values, whole, random), draw(st.sampled_from([x for x in layouts if x in PLACED])), folder)
    ddof, eps = draw(st.sampled_from((0, 1))), draw(st.sampled_from((1e-5, 1.0)))
    x, mask = backend.array(x_), backend.array(mask_)
    exact = Exact(values, whole, ddof=ddof, eps=eps)
    y, saved = cn.instance_norm_forward(x, mask=mask, ddof=ddof, eps=eps)
    within(backend.host(y), exact.y, np.where(whole, 1 + np.abs(exact.xhat), 1), dtype)
    assert (backend.host(saved.count) == exact.count).all()
    assert not backend.host(y)[~whole].any()
    dy_ = filled(draw, shape, dtype, "normal")
    dx, _, _ = cn.instance_norm_backward(backend.array(spoiled(dy_, whole, random)), saved)
    axes = tuple(range(2, len(shape)))
    terms, expected = np.abs(np.where(whole, reference.wide(dy_), 0)), exact.backward(dy_)[0]
    spread = terms + terms.max(axes, keepdims=True) * (
        1 + exact.slope * np.abs(exact.xhat).max(axes, keepdims=True) ** 2
    )
    within(backend.host(dx), expected, spread * exact.rstd, dtype)
    assert not backend.host(dx)[~whole].any()


#: Layouts whose elements are all different places in memory.
PLACED = tuple(layout for layout in LAYOUTS if layout not in ("zero", "overlapping"))


def mask_layouts(shape: list[int]) -> Any:
    """Return the layouts that a mask of this shape may have."""
    few = {"channels_last", "zero", "overlapping"} if len(shape) < 2 else {"zero", "overlapping"}
    return st.sampled_from([layout for layout in LAYOUTS if layout not in few])


#: Past failures and special paths: one element with infinities and an activation, 0-size, rank 64, bfloat16 NaN, a
#: broadcast residual, NaN in some planes only.
PAST: list[dict[str, Any]] = [
    {"shape": (1, 1, 1), "dtype": "float16", "data": "inf", "training": False, "activation": "silu"},
    {"shape": (1, 1, 1, 1), "dtype": "bfloat16", "data": "nan", "training": False, "activation": None},
    {"shape": (0, 0, 0), "dtype": "float32", "data": "normal", "training": True},
    {"shape": (2, 0, 3), "dtype": "float64", "data": "normal", "training": False},
    {"shape": (2, 3, *(1,) * 58, 2, 3, 1), "dtype": "float32", "data": "offset", "training": True},
    {"shape": (1, 1, 1, 1, 4, 4, 1), "dtype": "float16", "data": "constant", "training": True, "activation": None},
    {"shape": (3, 2, 4, 5), "dtype": "float32", "data": "both", "layout": "zero", "training": True},
    {"shape": (3, 2, 4, 5), "dtype": "float16", "data": "nan", "layout": "overlapping", "training": True},
    {"shape": (2, 3, 3, 3), "dtype": "float32", "data": "normal", "layout": "records", "residual": "nan"},
]


@pytest.mark.full(simt=lambda given: given["fixed"]["dtype"] != "float32")
@pytest.mark.parametrize("fixed", PAST, ids=lambda f: f"{len(f['shape'])}-{f['data']}-{f['dtype']}")
@checks(5)
@given(data=st.data())
def test_past_failures(backend: Backend, tmp_path_factory: Any, fixed: dict[str, Any], data: st.DataObject) -> None:
    """The corpus of past failures; everything else is drawn."""
    if backend.name == "compiled":
        fixed = {**fixed, **PLAIN, "layouts": ("dense", "channels_last")}
        fixed.pop("layout", None)
    if backend.name == "simt" and tiers.asked == "default":
        fixed = {**fixed, **PLAIN}
    if backend.name == "cupy":
        if len(fixed["shape"]) > CUPY_RANK or fixed.get("layout", "dense") not in ALIGNED:
            pytest.skip("a GPU has no such array")
        fixed = {**fixed, "layouts": ALIGNED}
    folder = tmp_path_factory.mktemp("maps")
    for sub in "rd":
        (folder / sub).mkdir()
    check_call(backend, data, folder, fixed)


# out


@checks(60)
@given(data=st.data())
def test_any_out(backend: Backend, data: st.DataObject) -> None:
    """A result is written to out and nowhere else, or the call is refused and nothing is written."""
    draw = data.draw
    compiled = backend.name == "compiled"
    one_dtype = compiled or (backend.name == "simt" and tiers.asked == "default")
    backend.pretend(DEVICE)
    n, c, h, w = (draw(st.integers(0 if i == 0 else 1, 5)) for i in range(4))
    dtype = "float32" if one_dtype else draw(st.sampled_from(DTYPES))
    kind = devices.dtype_of(dtype)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = random.normal(size=4 * (n * c * (h + 1) * w + 40)).astype(kind)
    memory = backend.array(whole)
    itemsize, shape = kind.itemsize, (n, c, h + 1, w)

    def view(name: str) -> Any:
        """An array of the shape anywhere in the memory: any order of axes, step, direction and start."""
        order = draw(st.permutations(range(4)), label=f"order of {name}") if not compiled else range(4)
        strides, step = [0] * 4, draw(st.sampled_from([1, 1, 1, 2])) if not compiled else 1
        for axis in reversed(order):
            strides[axis], step = step, step * max(shape[axis], 1)
        if draw(st.integers(0, 5)) == 0:
            strides[draw(st.integers(0, 3))] = draw(st.integers(0, 2))
        span = sum(s * max(size - 1, 0) for s, size in zip(strides, shape, strict=True))
        room = len(whole) - span - 1
        if room < 0:
            strides, room = [0] * 4, len(whole) - 1
        start = min(draw(st.integers(0, 40), label=f"start of {name}"), room)
        flat = memory[start:]
        strided = (
            np.lib.stride_tricks.as_strided(flat, shape, [s * itemsize for s in strides])
            if isinstance(memory, np.ndarray)
            else type(memory)(shape, kind, flat.data, [s * itemsize for s in strides])
        )
        return strided[::-1] if draw(st.booleans()) else strided

    x, out = view("x"), view("out")
    residual = view("residual") if draw(st.booleans()) and not compiled else None
    if draw(st.integers(0, 3)) == 0:
        out = x if residual is None or draw(st.booleans()) else residual
    x_ = backend.host(x).copy()
    residual_ = None if residual is None else backend.host(residual).copy()
    before = backend.host(memory).tobytes()
    indices = np.arange(len(whole), dtype=np.int32 if itemsize == 4 else np.int64)
    address = int(out.__array_interface__["data"][0] if isinstance(out, np.ndarray) else out.data.ptr)
    origin = int(memory.__array_interface__["data"][0] if isinstance(memory, np.ndarray) else memory.data.ptr)
    training = math.prod(shape[2:]) > 1
    one = backend.array(np.ones(c, "float64" if dtype == "float64" else "float32"))
    try:
        y = cn.instance_norm(x, one.copy(), one.copy(), None, one, training, residual=residual, out=out)
    except ValueError as error:
        assert any(word in str(error) for word in ("overlaps", "same memory")), error  # noqa: PT017
        assert backend.host(memory).tobytes() == before
        return
    assert y is out
    ones = np.ones(c, one.dtype)
    if x_.size:
        running = None if training else (ones, ones)
        expected = reference.forward(x_, None, ones, running=running, residual=residual_)
        xhat = reference.forward(x_, running=running)
        scale = 2 + np.abs(xhat) + (0 if residual_ is None else np.abs(reference.wide(residual_)))
        near = reference.statistics(x_)[1].min() < 1e-4 if training else False  # other tests check the digits
        if not near:
            within(backend.host(out), expected, scale, dtype)
    # Nothing but out has been written.
    offset = (address - origin) // itemsize
    steps = [stride // itemsize for stride in out.strides]
    written = offset + sum(
        (np.arange(size).reshape([-1 if i == j else 1 for j in range(4)]) * step
         for i, (size, step) in enumerate(zip(shape, steps, strict=True))), np.zeros(shape, np.int64),
    )  # fmt: skip
    others = np.setdiff1d(indices, written)
    after = backend.host(memory)
    assert after[others].tobytes() == np.frombuffer(before, kind)[others].tobytes()


# Refusals


def _swapped(a: np.ndarray) -> np.ndarray:
    return a.astype(a.dtype.newbyteorder())


class _Mine(np.ndarray):
    pass


REFUSED: dict[str, Any] = {
    "big-endian": _swapped,
    "object": lambda a: a.astype(object),
    "masked": lambda a: np.ma.masked_array(a, a > 0),
    "subclass": lambda a: a.view(_Mine),
    "record array": lambda a: a.view(np.recarray),
    "structured": lambda a: a.view([("v", a.dtype)]),
    "integers": lambda a: a.astype(np.int16),
    "booleans": lambda a: a > 0,
    "complex": lambda a: a.astype(np.complex64),
    "long double": lambda a: a.astype(np.longdouble),
    "dates": lambda a: a.astype(np.int64).view("M8[s]"),
    "text": lambda a: a.astype("U8"),
    "bytes": lambda a: a.tobytes(),
    "memoryview": memoryview,
    "list": lambda a: a.tolist(),
    "number": lambda a: 1.0,
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("role", ["x", "residual", "weight", "bias", "running_mean", "running_var", "out", "dy", "dx"])
def test_unsupported_arrays_are_refused(backend: Backend, rng: np.random.Generator, kind: str, role: str) -> None:
    """For every argument of a call; the error names the argument."""
    plane, channel = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    whole = role in ("x", "residual", "out", "dy", "dx")
    bad = REFUSED[kind](plane if whole else channel)
    given: dict[str, Any] = {name: backend.array(plane.copy()) for name in ("x", "residual", "out", "dy", "dx")}
    given |= {name: backend.array(np.abs(channel)) for name in ("weight", "bias", "running_mean", "running_var")}
    _, saved = cn.instance_norm_forward(given["x"])
    if backend.name == "cupy" and isinstance(bad, np.ndarray) and type(bad) is not np.ndarray:
        pytest.skip("these are NumPy's classes")
    good = dict(given)
    given[role] = bad
    before = {name: Bits(a) for name, a in good.items()}
    names = {"x": "input", "dx": "out"}
    dy, dx = given.pop("dy"), given.pop("dx")
    with pytest.raises((TypeError, ValueError), match=names.get(role, role)):
        _ = cn.instance_norm_backward(dy, saved, out=dx) if role in ("dy", "dx") else cn.instance_norm_forward(**given)
    assert {name: Bits(a) for name, a in good.items()} == before


@pytest.mark.parametrize("shape", [(2, 2**17, 2**17, 2**17), (2, 3, 2**20, 2**30)])
def test_results_too_large_for_memory(shape: Any) -> None:
    """A broadcast input may represent more than memory holds: an error, and unchanged statistics."""
    x = np.broadcast_to(np.float32(1), shape)
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    with pytest.raises((MemoryError, ValueError)):
        cn.instance_norm(x, mean, var)
    assert not mean.any() and (var == 1).all()
