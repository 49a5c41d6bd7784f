"""dtype=: results of another dtype than the input, which may be integers; and gradients of such a forward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import builds, cases, parts, reference
from helpers.backends import Backend, on
from helpers.compare import ROUNDING, assert_equal, assert_same, assert_within, wide
from helpers.pairwise import pairwise
from helpers.ranks import Ranks

import cupynorm as cn
from cupynorm import devices
from cupynorm._types import DTYPES, INTEGERS

INPUTS = (*INTEGERS, *DTYPES)
LIMITS = {name: np.iinfo(name) for name in INTEGERS}


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, layout: str = "contiguous") -> np.ndarray:
    """Return an array that uses the range of an integer dtype; channels have different means and deviations."""
    x = rng.normal(size=shape) * np.linspace(0.2, 1, shape[1]).reshape(-1, *(1,) * (len(shape) - 2))
    if dtype in LIMITS:
        low, high = LIMITS[dtype].min, LIMITS[dtype].max
        x = np.clip(np.rint((low + high) / 2 + x * (high - low) / 4), low, high)
    else:
        x = x + 3
    made = x.astype(devices.dtype_of(dtype))
    if len(shape) == 4:
        return reference.LAYOUTS[layout](made)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(made, 1, -1)), -1, 1) if layout == "channels_last" else made


def math_of(input: str, dtype: str) -> str:
    return "float64" if "float64" in (input, dtype) else "float32"


def bound_of(input: str, dtype: str, given: str) -> float:
    """Return the error that results of order one may have. Given moments are computed by x's dtype alone."""
    return ROUNDING[dtype] + 16 * ROUNDING[math_of(input, input if given in ("moments", "sums") else dtype)]


#: Short planes, planes of a warp and of a block, tiles, and channels side by side.
SHAPES = ((3, 4, 3, 3), (2, 3, 9, 8), (2, 5, 35, 45), (1, 2, 300, 170), (2, 32, 9, 10), (2, 17, 6, 7))


def more_builds(given: dict[str, Any]) -> bool:
    usual = given["layout"] in ("contiguous", "channels_last") and given["activation"] is None
    return (given["input"], given["dtype"]) != builds.PAIRS[0] or not usual


def rare_builds(given: dict[str, Any]) -> bool:
    return builds.rare_pair((given["input"], given["dtype"]), given["activation"])


@pairwise(
    input=INPUTS, dtype=DTYPES, shape=SHAPES, layout=("contiguous", "channels_last", "transposed", "unaligned", "crop"),
    activation=(None, "relu", "silu"), given=("own", "running", "moments"),
)  # fmt: skip
@pytest.mark.full(simt=more_builds)
@pytest.mark.nightly(simt=rare_builds, compiled=rare_builds, cupy=more_builds)  # each is compiled, on a GPU for seconds
def test_results(
    backend: Backend, input: str, dtype: str, shape: tuple[int, ...], layout: str, activation: str | None, given: str,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Read as they are, computed in float32 or float64, rounded once: with a residual, parameters and statistics."""
    x = values(rng, shape, input, layout)
    result, params = devices.dtype_of(dtype), np.dtype(math_of(input, dtype))
    residual = rng.normal(size=shape).astype(result)
    weight, bias, mean = rng.normal(size=(3, shape[1])).astype(params)
    var = (rng.random(shape[1]) + 0.5).astype(params)
    if input in LIMITS:
        mean, var = (mean * 9).astype(params), (var * 100).astype(params)
    mean_, var_ = backend.array(mean.copy()), backend.array(var.copy())
    array = backend.array(x)
    options = {"use_input_stats": given != "running", "moments": cn.moments(array) if given == "moments" else None}
    y = cn.instance_norm(
        array, mean_, var_, backend.array(weight), backend.array(bias), momentum=0.25, activation=activation,
        residual=backend.array(residual), dtype=dtype, **options,
    )  # fmt: skip
    running = (mean, var) if given == "running" else None
    exact = reference.Exact(x, weight, bias, residual=residual, activation=activation, running=running)
    assert y.dtype == result and type(y) is type(array)
    scale = np.abs(exact.xhat * weight[:, None, None]) + np.abs(bias[:, None, None]) + np.abs(wide(residual)) + 1
    assert_within(backend.host(y), exact.y, bound_of(input, dtype, given) * 1.5 * scale, "y", overflow=True)
    if given == "running":
        assert_same(backend.host(mean_), mean)
        return
    new_mean, new_var = exact.moved(mean, var, 0.25)
    of_x = [np.abs(a).max(0) for a in exact.statistics]
    bound = 2 * bound_of(input, params.name, given)
    assert_within(backend.host(mean_), new_mean, bound * (np.abs(mean) + of_x[0]), "running_mean")
    assert_within(backend.host(var_), new_var, bound * (np.abs(var) + of_x[1]), "running_var")


@pytest.mark.parametrize("input", INTEGERS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 80, 91), (2, 32, 40, 5)], ids=str)
@pytest.mark.full(simt=lambda given: given["input"] != "uint16")
@pytest.mark.nightly(simt=lambda given: (given["input"], "float32") not in builds.PAIRS)
def test_a_deviation_of_one_far_from_zero_keeps_all_digits(
    backend: Backend, input: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Values at both ends of the dtype's range."""
    limits = LIMITS[input]
    for far in (limits.max - 3, limits.min):
        x = (far + rng.integers(0, 4, shape)).astype(input)
        for x_ in (x, reference.LAYOUTS["channels_last"](x)):
            y = cn.instance_norm(backend.array(x_), dtype="float32")
            exact = reference.forward(x)
            assert_within(backend.host(y), exact, 32 * ROUNDING["float32"], "y")  # 64 squares are added in float32


@pytest.mark.parametrize("input", INTEGERS)
@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 4, 5), (1, 2, 300, 301), (2, 33, 20, 20)], ids=str)
@pytest.mark.full(simt=lambda given: given["input"] != "uint16")
@pytest.mark.nightly(simt=lambda given: (given["input"], "float32") not in builds.PAIRS)
def test_moments_of_integers(backend: Backend, input: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = values(rng, shape, input)
    for x_ in (x, values(rng, shape, input, "channels_last")):
        found = cn.moments(backend.array(x_))
        mean, var = reference.statistics(x_)
        count = math.prod(shape[2:])
        assert (backend.host(found.count) == count).all()
        deviation = np.sqrt(var) + 1e-30
        assert_within(backend.host(found.mean), mean, 20 * ROUNDING["float32"] * deviation + 1e-30, "mean")
        assert_within(backend.host(found.m2), var * count, 20 * ROUNDING["float32"] * var * count, "m2")


@on("numpy", "compiled", "simt")
@pytest.mark.parametrize("given", ["tiles", "empty"])
def test_tiles_of_integers(backend: Backend, given: str, rng: np.random.Generator) -> None:
    """Moments of parts, merged, normalise each part as the whole is."""
    x = values(rng, (2, 3, 40, 30), "uint16")
    cut = parts.parts_of(40, rng) if given == "tiles" else [slice(0, 0), slice(0, 40)]
    tiles = [backend.array(x[:, :, part]) for part in cut]
    first, *others = map(cn.moments, tiles)
    whole = first.merge(*others)
    y = np.concatenate([backend.host(cn.instance_norm(tile, moments=whole, dtype="float32")) for tile in tiles], 2)
    assert_within(y, reference.forward(x), 2e-6)


MIXED = [pair for pair in builds.PAIRS if pair[0] not in INTEGERS]


def rare_gradients(given: dict[str, Any]) -> bool:
    return builds.rare_pair(given["pair"], given["activation"])


@pairwise(
    pair=MIXED, shape=((3, 4, 3, 3), (2, 5, 35, 45), (2, 32, 9, 10)), layout=("contiguous", "channels_last"),
    activation=(None, "relu", "gelu"), given=("own", "running", "sums"), out=(False, True),
)  # fmt: skip
@pytest.mark.full(simt=lambda given: given["pair"] != MIXED[0] or given["activation"] is not None)
@pytest.mark.nightly(simt=rare_gradients, compiled=rare_gradients)
def test_gradients(
    backend: Backend, pair: tuple[str, str], shape: tuple[int, ...], layout: str, activation: str | None, given: str,
    out: bool, rng: np.random.Generator,
) -> None:  # fmt: skip
    """dx has x's dtype, dresidual that of the result, and the parameters' gradients theirs."""
    input, dtype = pair
    result, params = devices.dtype_of(dtype), np.dtype(math_of(*pair))
    x = values(rng, shape, input, layout)
    dy, residual = (reference.LAYOUTS[layout](rng.normal(size=shape).astype(result)) for _ in range(2))
    weight, bias, mean = rng.normal(size=(3, shape[1])).astype(params)
    if dtype != "float64" and math_of(*pair) == "float32":
        weight, bias = weight.astype(result), bias.astype(result)
    var = (rng.random(shape[1]) + 0.5).astype(params)
    running = (mean, var) if given == "running" else None
    exact = reference.Exact(x, weight, bias, residual=residual, activation=activation, running=running)
    if activation == "relu":
        dy[np.abs(exact.z) < 1e-3] = 0
    array = backend.array(x)
    y, saved = cn.instance_norm_forward(
        array, backend.array(weight), backend.array(bias), residual=backend.array(residual), activation=activation,
        running_mean=backend.array(mean), running_var=backend.array(var), momentum=0, dtype=dtype,
        use_input_stats=given != "running", moments=cn.moments(array) if given == "sums" else None,
    )  # fmt: skip
    dy_ = backend.array(dy)
    sums = cn.gradient_sums(dy_, saved) if given == "sums" else None
    target = backend.array(np.full(shape, 7).astype(x.dtype)) if out else None
    dx, dweight, dbias, dresidual = cn.instance_norm_backward(dy_, saved, sums=sums, out=target)
    assert dx is target or not out
    assert (y.dtype, dx.dtype, dresidual.dtype) == (result, x.dtype, result)
    assert dweight.dtype == dbias.dtype == weight.dtype
    if activation is None:
        assert dresidual is dy_
    found = [backend.host(a) for a in (dx, dweight, dbias, dresidual)]
    bounds = (input, weight.dtype.name, weight.dtype.name, dtype)
    for name, actual, expected, of in zip(
        ("dx", "dweight", "dbias", "dresidual"), found, exact.backward(dy), bounds, strict=True
    ):
        terms = 1.0 if expected.ndim > 2 else np.sqrt(x.size / shape[1])
        largest = np.abs(expected).max() + terms * np.abs(wide(dy)).max()
        assert_within(actual, expected, (ROUNDING[of] + 3 * bound_of(input, params.name, given)) * largest, name)


@on("numpy", "simt", "cupy")
@pytest.mark.full(simt=lambda given: True)
@pytest.mark.parametrize("pair", MIXED[:2], ids=str)
def test_double_backward(backend: Backend, pair: tuple[str, str], rng: np.random.Generator) -> None:
    input, dtype = pair
    x, dy = values(rng, (2, 3, 6, 7), input), rng.normal(size=(2, 3, 6, 7)).astype(dtype)
    ddx, (weight, ddweight) = rng.normal(size=x.shape).astype(input), rng.normal(size=(2, 3)).astype(np.float32)
    given = [backend.array(a) for a in (ddx, ddweight, dy, x, weight)]
    _, saved = cn.instance_norm_forward(given[3], given[4], dtype=dtype)
    found = cn.instance_norm_double_backward(given[0], given[1], None, given[2], saved)
    exact = reference.double_backward(ddx, ddweight, None, dy, x, weight)
    assert [a.dtype.name for a in found] == [dtype, input, "float32"]
    for actual, expected in zip(found, exact, strict=True):
        assert_within(backend.host(actual), expected, 2e-3 * np.abs(expected).max())


def test_results_into_given_memory(backend: Backend, rng: np.random.Generator) -> None:
    x = values(rng, (2, 3, 6, 8), "uint8")
    out = backend.array(np.full((2, 3, 6, 9), 7, np.float32))[..., :8]
    y = cn.instance_norm(backend.array(x), dtype=np.float32, out=out)
    assert y is out
    assert_within(backend.host(out), reference.forward(x), 2e-6)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 5, 6)], ids=str)
def test_gradients_into_given_memory(backend: Backend, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x, dy = values(rng, shape, "float16"), rng.normal(size=shape).astype(np.float32)
    out = backend.array(np.full(shape, 7, np.float16))
    _, saved = cn.instance_norm_forward(backend.array(x), dtype="float32")
    dx, *_ = cn.instance_norm_backward(backend.array(dy), saved, out=out)
    assert dx is out
    assert_within(backend.host(out), reference.backward(dy, x)[0], 2e-3 * np.abs(reference.wide(dy)).max())


def test_the_input_s_own_dtype_changes_nothing(backend: Backend, rng: np.random.Generator) -> None:
    """The same bits, also of the gradients, and results in place are allowed."""
    x = backend.array(values(rng, (2, 3, 6, 8), "float32"))
    y, saved = cn.instance_norm_forward(x)
    same, kept = cn.instance_norm_forward(x, dtype="float32")
    assert_same(same, y)
    for a, b in zip(cn.instance_norm_backward(y, saved), cn.instance_norm_backward(y, kept), strict=True):
        assert a is b is None or backend.host(a).tobytes() == backend.host(b).tobytes()
    assert cn.instance_norm(x, dtype="float32", out=x) is x
    assert_same(x, y)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 5)], ids=str)
def test_empty_inputs(backend: Backend, shape: tuple[int, ...]) -> None:
    x = backend.array(np.zeros(shape, np.uint16))
    y = cn.instance_norm(x, dtype="float16")
    assert (y.shape, y.dtype) == (shape, np.float16)
    assert (backend.host(cn.moments(x).count) == 0).all()


@pytest.mark.full(simt=lambda given: given["rank"] != 2)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers(backend: Backend, rank: int, rng: np.random.Generator) -> None:
    """A float32 layer on integers: training with running statistics, eval, one sample."""
    layer = getattr(cn, f"InstanceNorm{rank}d")(3, affine=True, track_running_stats=True, device=backend.device)
    x = values(rng, (2, 3, *(5, 4, 3)[:rank]), "uint16")
    y = layer.forward(backend.array(x), dtype="float32")
    assert_within(backend.host(y), reference.forward(x), 2e-6)
    with pytest.raises(TypeError, match="integers have no gradient"):
        layer.backward(y)
    one = layer.forward(backend.array(x[0]), dtype="float16")
    assert (one.shape, one.dtype) == (x.shape[1:], np.float16)
    layer.eval()
    y = layer(backend.array(x), dtype="float32")
    running = backend.host(layer.running_mean), backend.host(layer.running_var)
    assert_within(backend.host(y), reference.forward(x, running=running), 1e-5)


@pytest.mark.parametrize(
    ("array", "options", "error", "message"),
    [
        (np.uint16, {}, TypeError, r"input has dtype uint16; integers need dtype=, the dtype of the result: float16"),
        (np.int32, {"dtype": "float32"}, TypeError, r"input has dtype int32.*and with dtype= uint8.*astype"),
        (np.int64, {}, TypeError, r"input has dtype int64.*astype"),
        (bool, {"dtype": "float32"}, TypeError, "input has dtype bool; accepted are float16"),
        (complex, {"dtype": "float32"}, TypeError, "input has dtype complex128; accepted are float16"),
        (">u2", {"dtype": "float32"}, TypeError, "native byte order"),
        (np.uint16, {"dtype": "uint8"}, TypeError, "dtype, of the result, must be float16.*got uint8"),
        (np.float32, {"dtype": "complex64"}, TypeError, "dtype, of the result, must be.*got complex64"),
        (np.float32, {"dtype": "nothing"}, TypeError, "dtype must be float16, bfloat16, float32 or float64"),
        (np.uint16, {"dtype": "float32", "residual": np.float16}, TypeError, "needed is the result's, float32"),
        (np.uint16, {"dtype": "float32", "out": np.uint16}, ValueError, "needed are shape .* and dtype float32"),
        (np.float32, {"dtype": "float16", "weight": np.float64}, TypeError, "the result float16; weight must be"),
        (np.float16, {"dtype": "float64"}, TypeError, "result float64; running_mean must be float64"),
    ],
)  # fmt: skip
def test_refusals(backend: Backend, array: Any, options: dict[str, Any], error: type, message: str) -> None:
    """Nothing has been written then."""
    if backend.name == "cupy" and array == ">u2":
        pytest.skip("CuPy has native arrays only")
    shape = (2, 3, 6)
    given = dict(options)
    for name in ("residual", "out"):
        if name in given:
            given[name] = backend.array(np.full(shape, 7, given[name]))
    if "weight" in given:
        given["weight"] = backend.array(np.ones(3, given["weight"]))
    mean, var = backend.array(np.ones(3, np.float32)), backend.array(np.ones(3, np.float32))
    x = backend.array(np.ones(shape, array))
    for call in (cn.instance_norm, cn.instance_norm_forward):
        with pytest.raises(error, match=message):
            call(x, running_mean=mean, running_var=var, **given)
    assert (backend.host(mean) == 1).all() and (backend.host(var) == 1).all()
    if "out" in given:
        assert (backend.host(given["out"]) == 7).all()


def test_out_may_not_overlap_an_input_of_another_dtype(backend: Backend) -> None:
    """Not even element by element, in memory of the same shape and strides."""
    if backend.device != "cpu":
        memory = backend.array(np.zeros((2, 3, 8), np.float32))
    else:
        memory = np.zeros((2, 3, 8), np.float32)
    x = memory.view(np.uint16)[..., ::2]
    assert (x.shape, x.strides) == (memory.shape, memory.strides)
    with pytest.raises(ValueError, match="out overlaps input"):
        cn.instance_norm(x, dtype="float32", out=memory)


def double_backward(y: Any, saved: cn.Saved) -> Any:
    return cn.instance_norm_double_backward(y, None, None, y, saved)


@pytest.mark.parametrize("call", [cn.instance_norm_backward, cn.gradient_sums, double_backward])
def test_integers_have_no_gradient(backend: Backend, call: Any) -> None:
    x = backend.array(np.arange(12, dtype=np.int8).reshape(1, 2, 6))
    y, saved = cn.instance_norm_forward(x, dtype="float32")
    with pytest.raises(TypeError, match=r"input has dtype int8: integers have no gradient\. Convert the input"):
        call(y, saved)


def test_dy_has_the_result_s_dtype(backend: Backend) -> None:
    x = backend.array(np.arange(12, dtype=np.float32).reshape(1, 2, 6))
    y, saved = cn.instance_norm_forward(x, dtype="float16")
    with pytest.raises(TypeError, match="dy has dtype float32; needed is the result's"):
        cn.instance_norm_backward(x, saved)
    with pytest.raises(ValueError, match=r"out has shape .* dtype float16; needed are .* float32"):
        cn.instance_norm_backward(y, saved, out=backend.array(np.zeros((1, 2, 6), np.float16)))


@on("simt", "cupy")
@pytest.mark.parametrize("pair", [("uint16", "float32"), ("float16", "float32")], ids=str)
@pytest.mark.full(simt=lambda given: given["pair"] != ("uint16", "float32"))
def test_same_bits_in_every_batch(backend: Backend, pair: tuple[str, str], rng: np.random.Generator) -> None:
    """With batch invariance: of a sample alone, of a view at another address, and in a larger batch."""
    backend.pretend(cases.WIDE_DEVICE)
    for shape in ((5, 3, 9, 8), (5, 3, 7, 7), (5, 3, 33, 35)):
        x = values(rng, shape, pair[0])
        shifted = np.empty(x.size + 1, x.dtype)[1:].reshape(shape)
        shifted[...] = x
        with parts.batch_invariant():
            whole = backend.host(cn.instance_norm(backend.array(x), dtype=pair[1]))
            for one in (x[2:3], shifted[2:3], x[2:4]):
                y = cn.instance_norm(backend.array(one) if one.base is None else one_of(backend, one), dtype=pair[1])
                assert_same(backend.host(y), whole[2 : 2 + len(one)])


def one_of(backend: Backend, view: np.ndarray) -> Any:
    """Return a view as it lies in memory, or on a GPU a copy of it."""
    return view if backend.device == "cpu" else backend.array(view)


@pytest.mark.long
def test_explain_names_both_dtypes() -> None:
    x = np.zeros((8, 2, 128, 128), np.uint16)
    text = cn.explain(x, dtype="float32", device="H100", parts=True)
    assert "6 B per element: 2 B of x, 4 B of others" in text
    assert "backward: refused, since integers have no gradient" in text
    assert "backward: refused, since integers have no gradient" in cn.explain(x, dtype="float32")
    text = cn.explain(x.astype(np.float16), dtype="float32", device="H100", double_backward=True)
    assert text.count("arrays that are not float32 are converted first") == 2
    assert "double backward" in text
    with pytest.raises(TypeError, match="integers need dtype="):
        cn.explain(x)
    with pytest.raises(TypeError, match="dtype, of the result"):
        cn.explain(x, dtype=int)


@pytest.mark.full(simt=lambda given: given["value"] != 77)
@pytest.mark.parametrize("value", [0, 1, 77, 255])
@pytest.mark.parametrize("size", [5, 64, 3000])
def test_constant_planes_of_integers(backend: Backend, value: int, size: int) -> None:
    y = cn.instance_norm(backend.array(np.full((2, 3, size), value, np.uint8)), dtype="float32")
    assert_equal(backend.host(y), np.zeros((2, 3, size)))


@on("numpy", "compiled", "simt")
@pytest.mark.parametrize("pair", [("float32", "float16"), ("float32", "float64"), ("float16", "float32")], ids=str)
@pytest.mark.full(simt=lambda given: given["pair"] != ("float32", "float16"))
def test_layers_over_several_ranks(backend: Backend, pair: tuple[str, str], rng: np.random.Generator) -> None:
    """The forward of parts, and its backward, with results of another dtype than the input."""
    x, dy = values(rng, (2, 3, 6, 8), pair[0]), rng.normal(size=(2, 3, 6, 8)).astype(pair[1])
    cut = [slice(0, 2), slice(2, 6)]

    def work(comm: Any, rank: int) -> tuple[Any, ...]:
        layer = cn.InstanceNorm2d(3, affine=True, dtype=math_of(*pair), device="cpu", comm=comm)
        part = cut[rank]
        y = layer.forward(backend.array(x[:, :, part]), dtype=pair[1])
        dx = layer.backward(backend.array(dy[:, :, part]))
        return y, dx, layer.weight.grad

    found = Ranks(len(cut)).run(work)
    exact = reference.Exact(x)
    dx, dweight, *_ = exact.backward(dy)
    bound = 4 * ROUNDING[pair[1]] + 40 * ROUNDING[math_of(*pair)]
    assert_within(np.concatenate([y for y, _, _ in found], 2), exact.y, bound * (1 + np.abs(exact.y)))
    bound += 4 * ROUNDING[pair[0]]
    assert_within(np.concatenate([a for _, a, _ in found], 2), dx, bound * 10 * exact.rstd)
    assert_within(sum(wide(a) for _, _, a in found), dweight, bound * 100)
