"""The bytes that the CUDA kernels move, on the emulator."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from emulator import runtime as emulator
from emulator.runtime import Emulator
from helpers import builds, reference
from helpers.compare import ROUNDING, assert_equal, assert_within, wide
from helpers.masked import Exact, spoiled
from helpers.regimes import DEVICE, DOUBLE_REGIMES, REGIMES, label

import cupynorm as cn
from cupynorm import devices
from cupynorm._types import math_dtype
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import Device
from cupynorm.cuda.layout import ArrayDesc, contiguous_desc
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import Plan
from cupynorm.cuda.variants import VARIANTS, exists

pytestmark = pytest.mark.simt


@pytest.fixture(autouse=True)
def _compiler() -> None:
    emulator.require()


#: Activation, residual or not, and the additional accesses of forward and backward.
EPILOGUES = [(None, False, 0, 0), ("relu", False, 0, 0), (None, True, 1, 0), ("leaky_relu", True, 1, 2)]


def _accesses(runtime: Emulator, x: np.ndarray, layout: str, made: Plan) -> int:
    """Return the accesses of arrays of x's size since the last call, as multiples of its size.

    Check that smaller arrays are no larger than numbers of tiles.
    """
    total, tiles = 0, max(step.tiles for step in made.steps)
    access = 16 if made.kind == "channels_first" else made.vec_size * x.itemsize
    # At both ends of each tile of a plane single elements move, up to a vec's at each end; twice as many if misaligned.
    tails = 0 if made.kind == "channels_last" else x.shape[0] * x.shape[1] * tiles * (4 if layout == "unaligned" else 2)
    for count in runtime.counts:
        first = next((a for a in count.size if count.written[a] >= x.nbytes), None)
        for address, size in count.size.items():
            if size >= x.nbytes:
                # A misaligned vec is combined from two aligned ones, each read again by the next thread, from the
                # first-level cache.
                skew = 2 if layout == "unaligned" and count.read[address] > x.nbytes else 1
                assert count.read[address] <= 2 * x.nbytes or skew == 1
                total += min(count.read[address], x.nbytes) if skew == 2 else count.read[address]
                total += count.written[address]
                moved = count.read[address] + count.written[address]
                # A second result at another address modulo 16 than the first is written by elements.
                if first is None or not count.written[address] or (address - first) % 16 == 0:
                    assert count.accesses[address] <= moved / access + tails * (access / x.itemsize), count.kernel
            else:
                most = x.shape[0] * x.shape[1] * tiles * 80
                assert size <= most, f"{count.kernel} touches {size} B that are no sums of planes"
    runtime.counts.clear()
    assert total % x.nbytes == 0
    return total // x.nbytes


def cases_of_bytes() -> list[Any]:
    """Return regimes, dtypes and epilogues: in the default tier all regimes in float32, two of them with epilogues; in
    the full tier, other dtypes and epilogues take turns; in the nightly tier, all."""
    given = [(dtype, EPILOGUES[0]) for dtype in ("float32", "float16", "bfloat16", "float64")]
    given += [("float32", epilogue) for epilogue in EPILOGUES[1:]]
    found = []
    for turn, regime in enumerate(REGIMES):
        for number, (dtype, epilogue) in enumerate(given):
            default = dtype == "float32" and (epilogue == EPILOGUES[0] or regime in (REGIMES[0], REGIMES[4]))
            mark = pytest.mark.full if (turn + number) % 3 == 0 else pytest.mark.nightly
            name = f"{label(regime)}-{dtype}-{epilogue[0]}{'-residual' * epilogue[1]}"
            found.append(pytest.param(*regime, dtype, epilogue, marks=() if default else mark, id=name))
    return found


@pytest.mark.parametrize(("regime", "shape", "layout", "device", "dtype", "epilogue"), cases_of_bytes())
def test_bytes(
    run_on: Callable[..., Emulator], rng: np.random.Generator, regime: str, shape: tuple[int, ...], layout: str,
    device: Device, dtype: str, epilogue: tuple[str | None, bool, int, int],
) -> None:  # fmt: skip
    """Every element is read and written as often as the plan says, and no other array of x's size is accessed."""
    activation, with_residual, forward_more, backward_more = epilogue
    scale = {"float64": 2, "float32": 1}.get(dtype, 0.5)  # the same bytes per plane in every dtype
    shape = (*shape[:3], round(shape[3] / scale))

    def array() -> np.ndarray:
        return reference.LAYOUTS[layout](rng.normal(size=shape).astype(devices.dtype_of(dtype)))

    x, y, dy, residual = array(), array(), array(), array() if with_residual else None
    runtime = run_on(Emulator(device))
    options: dict[str, Any] = {"activation": activation, "residual": residual}

    def accesses() -> int:
        return _accesses(runtime, x, layout, made)

    def plan_of(op: str) -> Plan:
        desc = ArrayDesc(x.shape, x.strides, x.itemsize, x.ctypes.data % 16)
        return plan_for(op, desc, dtype, device)[0]

    made = plan_of("forward")
    assert made.regime == regime
    assert made.accesses == (3 if regime == "split" else 2)
    _, saved = cn.instance_norm_forward(x, out=y, **options)
    assert accesses() == made.accesses + forward_more

    made = plan_of("backward")
    assert made.accesses == (5 if made.regime == "split" else 3)
    cn.instance_norm_backward(dy, saved, out=y)
    # On its second pass a split reads dresidual, which it has written, instead of dy and residual.
    assert accesses() == made.accesses + backward_more

    # Tracked eval: two and three accesses for any size; without affine gradients x is read only for a mask.
    made = plan_of("frozen_backward")
    ones = np.ones(shape[1], math_dtype(x.dtype))
    running: dict[str, Any] = {"running_mean": ones, "running_var": ones, "use_input_stats": False, "out": y}
    _, saved = cn.instance_norm_forward(x, ones, **running, **options)
    assert accesses() == 2 + forward_more
    cn.instance_norm_backward(dy, saved, out=y)
    assert accesses() == 3 + backward_more
    _, saved = cn.instance_norm_forward(x, **running, **options)
    runtime.counts.clear()
    cn.instance_norm_backward(dy, saved, out=y)
    assert accesses() == (3 if activation else 2) + backward_more

    # Steps with given moments and sums: planes of any size, each array once.
    made = plan_of("input_gradient")
    moments = cn.moments(x)
    assert accesses() == 1
    _, saved = cn.instance_norm_forward(x, ones, moments=moments, out=y, **options)
    assert accesses() == 2 + forward_more
    sums = cn.gradient_sums(dy, saved)
    assert accesses() == 2 + bool(activation and with_residual)
    cn.instance_norm_backward(dy, saved, sums=sums, out=y)
    assert accesses() == 3 + backward_more


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_accesses_of_arrays_that_begin_apart(
    run_on: Callable[..., Emulator], rng: np.random.Generator, dtype: str
) -> None:
    """A vec that begins between multiples of 16 bytes is read as two aligned vecs. Only at the ends of the six planes
    do elements move one by one."""
    dy = rng.normal(size=(2, 3, 35, 45)).astype(dtype)
    x, dx = reference.LAYOUTS["unaligned"](dy + dy**2), np.empty_like(dy)
    assert dx.ctypes.data % 16 == 0 < x.ctypes.data % 16
    runtime = run_on(Emulator(DEVICE))
    _, saved = cn.instance_norm_forward(x, out=dx)
    cn.instance_norm_backward(dy, saved, out=dx)
    for count in runtime.counts:
        assert 1.9 * x.nbytes < count.read[x.ctypes.data] < 2 * x.nbytes
        for address, size in count.size.items():
            if size >= x.nbytes:
                vecs = (count.read[address] + count.written[address]) / 16
                assert vecs < count.accesses[address] < vecs + 6 * 2 * 16 / x.itemsize, count.kernel


@pytest.mark.parametrize(
    ("input", "dtype"),
    [builds.PAIRS[0], *(pytest.param(*pair, marks=pytest.mark.full) for pair in builds.PAIRS
                        if pair in (("int8", "bfloat16"), ("float64", "float32")))],
)  # fmt: skip
@pytest.mark.parametrize("regime", [
    pytest.param(regime, marks=() if regime[2] == "contiguous" else pytest.mark.full, id=label(regime))
    for regime in REGIMES if not regime[0].startswith("subwarp")
])  # fmt: skip
def test_bytes_of_x_of_another_dtype(
    run_on: Callable[..., Emulator], rng: np.random.Generator, regime: tuple[Any, ...], input: str, dtype: str
) -> None:
    """x is read in its own width, twice by a split, and results are written once, in theirs; also with given moments
    and running statistics."""
    _, shape, layout, device = regime
    x = reference.LAYOUTS[layout](rng.integers(0, 200, shape).astype(input))
    y = reference.LAYOUTS[layout](np.zeros(shape, dtype))
    runtime = run_on(Emulator(device))

    def moved() -> tuple[int, int]:
        """Return the bytes that were read and written of arrays as large as x or y."""
        least = min(x.nbytes, y.nbytes)
        large = [(count, a) for count in runtime.counts for a, size in count.size.items() if size >= least]
        total = sum(count.read[a] for count, a in large), sum(count.written[a] for count, a in large)
        runtime.counts.clear()
        return total

    desc = ArrayDesc(x.shape, x.strides, x.itemsize, x.ctypes.data % 16)
    made, _ = plan_for("forward", desc, dtype, device, input=input)
    reads = 2 if made.regime == "split" else 1
    cn.instance_norm(x, dtype=dtype, out=y)
    assert moved() == (reads * x.nbytes, y.nbytes)
    assert made.bytes_per_element == reads * x.itemsize + y.itemsize
    assert_within(y, reference.forward(x), 5e-6 + 2 * ROUNDING[dtype])
    moments = cn.moments(x)
    assert moved() == (x.nbytes, 0)
    cn.instance_norm(x, dtype=dtype, out=y, moments=moments)
    assert moved() == (x.nbytes, y.nbytes)
    ones = np.ones(shape[1], np.float64 if input == "float64" else np.float32)
    cn.instance_norm(x, ones, ones, use_input_stats=False, dtype=dtype, out=y)
    assert moved() == (x.nbytes, y.nbytes)


def cases_of_masks() -> list[Any]:
    """Return regimes, dtypes and activations: in the default tier contiguous planes of float32 without one, in the full
    tier all layouts, and a turn of the others."""
    turns = [("float16", "relu"), ("bfloat16", None), ("float64", "leaky_relu"), ("float32", "silu")]
    assert all(builds.code_of(activation, False) in builds.MASKED[dtype] for dtype, activation in turns)
    return [
        pytest.param(regime, dtype, activation, id=f"{label(regime)}-{dtype}-{activation}",
                     marks=pytest.mark.full if number or regime[2] != "contiguous" else ())
        for turn, regime in enumerate(REGIMES)
        for number, (dtype, activation) in enumerate((("float32", None), turns[turn % 4]))
    ]  # fmt: skip


@pytest.mark.parametrize(("regime", "dtype", "activation"), cases_of_masks())
def test_bytes_with_a_mask(
    run_on: Callable[..., Emulator], rng: np.random.Generator, regime: tuple[Any, ...], dtype: str,
    activation: str | None,
) -> None:  # fmt: skip
    """Planes stay on chip as they do without a mask, of which a byte is read for each element, as often as x. Tiles and
    planes without a True position, too."""
    _, shape, layout, device = regime
    scale = {"float64": 2, "float32": 1}.get(dtype, 0.5)
    shape = (*shape[:3], round(shape[3] / scale))
    mask = rng.random(shape) < 2 / 3
    mask[..., shape[2] // 2 :, :] = False
    mask[0, 0] = False
    x, dy = ((rng.normal(size=shape) + offset).astype(devices.dtype_of(dtype)) for offset in (100, 0))
    weight, bias = rng.normal(size=(2, shape[1])).astype(math_dtype(x.dtype))
    exact = Exact(x, mask, weight, bias, activation=activation)
    dy[np.abs(exact.z) < 0.05] = 0
    x_, dy_, mask_ = (reference.LAYOUTS[layout](a) for a in (spoiled(x, mask, rng), spoiled(dy, mask, rng), mask))
    y, dx = np.empty_like(x_), np.empty_like(x_)
    runtime = run_on(Emulator(device))
    desc = ArrayDesc(x_.shape, x_.strides, x_.itemsize, x_.ctypes.data % 16)

    def check_bytes(op: Op, out: np.ndarray, *inputs: np.ndarray) -> None:
        made, _ = plan_for(op, desc, dtype, device, masked=True)
        reads = 2 if made.regime == "split" else 1
        if layout != "unaligned":  # there vecs are combined from two
            for array in (*inputs, mask_):
                assert sum(count.read.get(array.ctypes.data, 0) for count in runtime.counts) == reads * array.nbytes
        assert sum(count.written.get(out.ctypes.data, 0) for count in runtime.counts) == out.nbytes
        assert made.accesses == (1 + 2 * len(inputs) if reads == 2 else 1 + len(inputs))
        runtime.counts.clear()

    _, saved = cn.instance_norm_forward(x_, weight, bias, mask=mask_, activation=activation, negative_slope=0.01, out=y)
    check_bytes("forward", y, x_)
    _, dweight, dbias = cn.instance_norm_backward(dy_, saved, out=dx)
    check_bytes("backward", dx, x_, dy_)
    bound = 3 * ROUNDING[dtype] + 100 * ROUNDING[weight.dtype.name]
    size = 1 + np.abs(exact.xhat * weight[:, None, None]) + np.abs(bias[:, None, None])
    assert_within(y, exact.y, np.where(mask, bound * size, 0), "y")
    exact_dx, exact_dweight, exact_dbias, _ = exact.backward(dy)
    largest = np.abs(wide(dy)).max() * np.abs(exact.weight).max() * exact.rstd * (1 + np.abs(exact.xhat).max())
    assert_within(dx, exact_dx, np.where(mask, 2 * bound * largest, 0), "dx")
    terms = np.sqrt(x.size / shape[1]) * 4
    assert_within(dweight, exact_dweight, bound * (np.abs(exact_dweight) + terms), "dweight")
    assert_within(dbias, exact_dbias, bound * (np.abs(exact_dbias) + terms), "dbias")
    assert_equal(saved.count, exact.count)

    # Tracked eval: planes of any size, each array once.
    ones = np.ones(shape[1], weight.dtype)
    running: dict[str, Any] = {"running_mean": ones, "running_var": ones, "use_input_stats": False, "mask": mask_}
    _, saved = cn.instance_norm_forward(x_, weight, bias, activation=activation, out=y, **running)
    check_bytes("normalize", y, x_)
    cn.instance_norm_backward(dy_, saved, out=dx)
    check_bytes("frozen_backward", dx, x_, dy_)


def test_the_shapes_reach_every_regime() -> None:
    """Each layout has cases of every regime of its variants: forward as named in the table, backward by its plan."""
    for layout, kind in (("contiguous", "channels_first"), ("channels_last", "channels_last")):
        for op, masked in product(("forward", "backward"), (False, True)):
            reached = set()
            for _, shape, lies, device in REGIMES:
                if lies == layout:
                    desc = contiguous_desc(shape, 4, kind)
                    reached.add(plan_for(op, desc, "float32", device, masked=masked)[0].regime)
            variants = [v for v in VARIANTS[op] if exists(v, op, "float32", kind, 0, False, masked=masked)]
            variants = [v for v in variants if v.scope != "subwarp" or kind == "channels_first"]
            assert reached == {f"{v.scope}-{v.residency}" for v in variants} | {"split"}, (op, layout, masked)


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=pytest.mark.nightly) for d in ("float16", "bfloat16", "float64"))]
)
@pytest.mark.parametrize(
    ("regime", "shape", "layout", "device"),
    [pytest.param(*regime, marks=[pytest.mark.full] * (regime[2] != "contiguous")) for regime in DOUBLE_REGIMES],
)
def test_bytes_of_a_double_backward(
    run_on: Callable[..., Emulator], rng: np.random.Generator, regime: str, shape: tuple[int, ...], layout: str,
    device: Device, dtype: str,
) -> None:  # fmt: skip
    """x, dy and ddx are read once if they stay on chip, else twice; arrays that no result depends on are not read."""
    shape = (*shape[:3], round(shape[3] / {"float64": 2, "float32": 1}.get(dtype, 0.5)))
    x, dy, ddx = (reference.LAYOUTS[layout](rng.normal(size=shape).astype(devices.dtype_of(dtype))) for _ in range(3))
    runtime = run_on(Emulator(device))
    w = np.ones(shape[1], math_dtype(x.dtype))
    desc = ArrayDesc(x.shape, x.strides, x.itemsize, x.ctypes.data % 16)

    def accesses(saved: cn.Saved, *given: Any) -> int:
        made = plan_for("double_backward" if saved.training else "frozen_double_backward", desc, dtype, device)[0]
        assert made.regime == (regime if saved.training else "pointwise")
        assert made.accesses == (8 if made.regime == "split" else 5)
        runtime.counts.clear()
        cn.instance_norm_double_backward(*given, dy, saved)
        return _accesses(runtime, x, layout, made)

    _, saved = cn.instance_norm_forward(x, w, w)
    twice = 2 if regime == "split" else 1
    assert accesses(saved, ddx, w, w) == accesses(saved, ddx, None, None) == 2 + 3 * twice
    assert accesses(saved, None, w, None) == 2 + 2 * twice
    for weight, given, expected in [
        (w, (ddx, w, w), 5), (w, (None, w, w), 4), (w, (ddx, None, w), 4), (None, (ddx, None, None), 3),
    ]:  # fmt: skip
        _, saved = cn.instance_norm_forward(x, weight, w, running_mean=w, running_var=w, use_input_stats=False)
        assert accesses(saved, *given) == expected
