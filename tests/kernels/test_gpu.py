"""Behaviour that only a GPU shows. Other files have more tests marked gpu, such as the case table."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.compare import assert_equal

import cupynorm as cn
from cupynorm import devices
from cupynorm.cuda.source import core_modules

pytestmark = pytest.mark.gpu


@pytest.fixture
def cp() -> Any:
    return pytest.importorskip("cupy")


SIZES = [(4, 8, 9, 9), (4, 8, 40, 40), (2, 4, 200, 200), (1, 2, 700, 700)]
#: On an H100 clusters, the cooperative grid and the split; on other GPUs whatever is planned.
LARGE = [(4, 40, 256, 256), (1, 3, 1500, 1500), (1, 1, 5000, 5000)]


def _graph(cp: Any, rng: np.random.Generator, shape: tuple[int, ...], fused: bool, parts: bool = False) -> None:
    """After warmup a training step can be captured, so it neither synchronises nor allocates; replays compute anew.

    parts: with moments and gradient sums of the input, as of its only part.
    """
    x, dy, residual = (cp.asarray(rng.normal(size=shape), cp.float32) for _ in range(3))
    options: dict[str, Any] = {"activation": "silu", "residual": residual} if fused else {}
    weight = cp.asarray(rng.normal(size=shape[1]), cp.float32)
    mean, var = cp.zeros(shape[1], cp.float32), cp.ones(shape[1], cp.float32)
    y, dx = cp.empty_like(x), cp.empty_like(x)
    stream = cp.cuda.Stream(non_blocking=True)
    pool = cp.cuda.MemoryPool()  # the graph's own: its calls' temporary memory must not be given to other arrays
    cp.cuda.get_current_stream().synchronize()
    with stream:
        with cp.cuda.using_allocator(pool.malloc):
            cn.warmup(x, **options, parts=parts)
            stream.begin_capture()
            moments = cn.moments(x) if parts else None
            _, saved = cn.instance_norm_forward(
                x, weight, weight, running_mean=mean, running_var=var, out=y, moments=moments, **options
            )  # fmt: skip
            sums = cn.gradient_sums(dy, saved) if parts else None
            kept = saved, cn.instance_norm_backward(dy, saved, out=dx, sums=sums)
            graph = stream.end_capture()
        for _ in range(2):
            new = rng.normal(3, 2, shape).astype(np.float32)
            x.set(new, stream=stream)
            graph.launch(stream)
            stream.synchronize()
            host = {**options, "residual": residual.get()} if fused else {}
            reference.assert_close(y.get(), reference.forward(new, weight.get(), weight.get(), **host))
            expected, *_ = reference.backward(dy.get(), new, weight.get(), bias=weight.get(), **host)
            reference.assert_close(dx.get(), expected)
    # Replays updated the running statistics: capturing alone runs nothing.
    assert float(cp.abs(mean).sum()) > 0
    assert len(kept) == 2


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_graph_capture_small(cp: Any, rng: np.random.Generator, shape: tuple[int, ...], fused: bool) -> None:
    _graph(cp, rng, shape, fused)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_graph_capture_of_steps_small(cp: Any, rng: np.random.Generator, shape: tuple[int, ...], fused: bool) -> None:
    _graph(cp, rng, shape, fused, parts=True)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("shape", LARGE[:2], ids=str)
def test_graph_capture_of_groups_of_blocks(
    cp: Any, rng: np.random.Generator, shape: tuple[int, ...], fused: bool
) -> None:
    _graph(cp, rng, shape, fused)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_planes(cp: Any, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> None:
    """With plans for the real device, not for a pretended one: against float64 on the device."""
    host = rng.normal(3, 2, shape).astype(np.float32).astype(devices.dtype_of(dtype))
    x = devices.to_device(host, "cuda:0")
    y, saved = cn.instance_norm_forward(x, activation="leaky_relu")
    dx, *_ = cn.instance_norm_backward(x, saved)
    wide = cp.asarray(host.astype(np.float32)).astype(cp.float64)
    centred = wide - wide.mean((2, 3), keepdims=True)
    rstd = 1 / cp.sqrt((centred * centred).mean((2, 3), keepdims=True) + 1e-5)
    xhat = centred * rstd
    g = cp.where(xhat > 0, wide, 0.01 * wide)
    expected = rstd * (g - g.mean((2, 3), keepdims=True) - xhat * (g * xhat).mean((2, 3), keepdims=True))
    tolerance = reference.TOLERANCE[dtype]
    answers = ((y, cp.where(xhat > 0, xhat, 0.01 * xhat), 1.0), (dx, expected, 5.0))
    for actual, exact, scale in answers:
        got = cp.asarray(devices.to_host(actual).astype(np.float32)).astype(cp.float64)
        wrong = cp.abs(got - exact) > 2 * tolerance * scale * (1 + cp.abs(exact))
        assert not bool((wrong & (cp.abs(xhat) > 1e-4)).any())  # nearer to the kink, rounding decides the side


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SIZES[2:], *LARGE], ids=str)
def test_double_backward_of_large_planes(cp: Any, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> None:
    """With plans for the real device, against float64 on the device."""
    hosts = [rng.normal(2, 1, shape).astype(np.float32).astype(devices.dtype_of(dtype)) for _ in range(3)]
    x, dy, ddx = (devices.to_device(host, "cuda:0") for host in hosts)
    weight, ddweight = (cp.asarray(rng.normal(size=shape[1]), cp.float32) for _ in range(2))
    _, saved = cn.instance_norm_forward(x, weight)
    ddy, dx, dweight = cn.instance_norm_double_backward(ddx, ddweight, None, dy, saved)

    def mean(a: Any) -> Any:
        return a.mean((2, 3), keepdims=True)

    xhat, g, u = (cp.asarray(host.astype(np.float32)).astype(cp.float64) for host in hosts)
    xhat, g, u = (a - mean(a) for a in (xhat, g, u))
    rstd = 1 / cp.sqrt(mean(xhat**2) + 1e-5)
    xhat = xhat * rstd
    w, q = (p.astype(cp.float64)[:, None, None] for p in (weight, ddweight))
    a, c = mean(u * xhat), mean(g * xhat)
    of_u, of_g = u - xhat * a, g - xhat * c
    exact_dx = q * rstd * of_g - w * rstd**2 * (c * of_u + a * of_g + xhat * mean(u * of_g))
    tolerance = 4 * reference.TOLERANCE[dtype]
    for actual, exact in ((ddy, w * rstd * of_u + q * xhat), (dx, exact_dx)):
        got = cp.asarray(devices.to_host(actual).astype(np.float32)).astype(cp.float64)
        assert bool((cp.abs(got - exact) <= tolerance * (1 + cp.abs(exact))).all())
    size = float(cp.abs(u * of_g).sum())
    assert bool((cp.abs(dweight - (rstd * u * of_g).sum((0, 2, 3))) <= reference.TOLERANCE["float32"] * size).all())


def test_graph_capture_of_a_layer(cp: Any, rng: np.random.Generator) -> None:
    """Each launch adds to the gradients and updates the running statistics, as a call does."""
    shape = (4, 8, 9, 9)
    layer, called = (cn.InstanceNorm2d(8, affine=True, track_running_stats=True, device="cuda") for _ in range(2))
    x, dy = (cp.empty(shape, cp.float32) for _ in range(2))
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    layer.zerograds()
    called.zerograds()
    cp.cuda.get_current_stream().synchronize()
    with stream, cp.cuda.using_allocator(pool.malloc):
        cn.warmup(x)
        stream.begin_capture()
        y = layer.forward(x)
        dx = layer.backward(dy)
        graph = stream.end_capture()
        for _ in range(2):
            x.set(rng.normal(3, 2, shape).astype(np.float32), stream=stream)
            dy.set(rng.normal(size=shape).astype(np.float32), stream=stream)
            graph.launch(stream)
            assert_equal(y.get(), called.forward(x).get())
            assert_equal(dx.get(), called.backward(dy).get())
    for name in ("running_mean", "running_var"):
        assert_equal(getattr(layer, name).get(), getattr(called, name).get())
    assert_equal(layer.weight.grad.get(), called.weight.grad.get())
    assert_equal(layer.bias.grad.get(), called.bias.grad.get())


@pytest.mark.parametrize("shape", [*SIZES, *LARGE[:2]], ids=str)
def test_graph_capture_of_a_double_backward(cp: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    """Capture it after warmup, which compiles the kernels and fills the graph's pool."""
    x, dy, ddx = (cp.asarray(rng.normal(size=shape), cp.float32) for _ in range(3))
    weight = cp.asarray(rng.normal(size=shape[1]), cp.float32)
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    cp.cuda.get_current_stream().synchronize()
    with stream, cp.cuda.using_allocator(pool.malloc):
        _, saved = cn.instance_norm_forward(x, weight)
        cn.warmup(x, double_backward=True)
        stream.begin_capture()
        results = cn.instance_norm_double_backward(ddx, weight, None, dy, saved)
        graph = stream.end_capture()
        new = rng.normal(size=shape).astype(np.float32)
        ddx.set(new, stream=stream)
        graph.launch(stream)
        stream.synchronize()
    expected = reference.double_backward(new, weight.get(), None, dy.get(), x.get(), weight.get())
    for actual, exact in zip(results, expected, strict=True):
        assert np.abs(actual.get() - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_current_stream_small(cp: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    """Work is enqueued after the current stream's work, not on the default stream."""
    host = rng.normal(size=shape).astype(np.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    large = cp.ones((4096, 4096), cp.float32)
    x = cp.zeros(shape, cp.float32)
    ready = cp.asarray(host)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            large = cp.sin(large)  # keeps the stream busy while the rest is enqueued
        x += ready
        y = cn.instance_norm(x)
        after = stream.record()
    after.synchronize()
    reference.assert_close(y.get(), reference.forward(host))


def test_same_bits_every_run(cp: Any, rng: np.random.Generator) -> None:
    for shape in (*SIZES, *LARGE):
        x, dy = (cp.asarray(rng.normal(size=shape), cp.float16) for _ in range(2))
        weight = cp.ones(shape[1], cp.float32)
        first: tuple[Any, ...] = ()
        for _ in range(5):
            y, saved = cn.instance_norm_forward(x, weight, weight)
            results = (y, *cn.instance_norm_backward(dy, saved))
            results += cn.instance_norm_double_backward(dy, weight, None, x, saved)
            first = first or results
            for a, b in zip(first, results, strict=True):
                assert bool((a == b).all())  # compared on the device: these are gigabytes


def test_first_calls_from_several_threads(cp: Any) -> None:
    """Each kernel is compiled once, whichever thread is first."""
    from cupynorm.cuda import runtime

    made = runtime.CupyRuntime()
    loaded: list[str] = []
    original = cp.RawKernel

    def counted(code: str, name: str, options: tuple[str, ...]) -> Any:
        loaded.append(name)
        return original(code, name, options)

    module = core_modules()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cp, "RawKernel", counted)
        threads = [threading.Thread(target=made.load, args=(module,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(loaded) == sorted(module.kernels)


@pytest.mark.parametrize("role", ["x", "out", "dy", "weight"])
def test_elements_that_are_not_aligned_are_refused(cp: Any, role: str) -> None:
    """A GPU cannot access them, and such an access would break the context: raise an error before any launch."""
    memory = cp.zeros(5 * 4 * 3 * 4 * 4 + 1, cp.uint8)
    odd = cp.ndarray((2, 3, 4, 4), cp.float32, memory.data + 1)
    given = {name: cp.ones((2, 3, 4, 4), cp.float32) for name in ("x", "out", "dy")}
    given["weight"] = cp.ones(3, cp.float32)
    _, saved = cn.instance_norm_forward(given["x"])
    given[role] = odd if role != "weight" else odd[0, :, 0, 0]
    dy = given.pop("dy")
    with pytest.raises(ValueError, match="not aligned"):
        _ = cn.instance_norm_backward(dy, saved) if role == "dy" else cn.instance_norm_forward(**given)
    assert not memory.any()
    cp.cuda.get_current_stream().synchronize()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "datetime64[s]"])
def test_arrays_on_the_host_are_refused(cp: Any, dtype: str) -> None:
    """Whatever NumPy says of their buffers."""
    x, host = cp.ones((2, 3, 4, 4), cp.float32), np.ones(3, cn.devices.dtype_of(dtype))
    for role in ("weight", "bias", "residual", "out"):
        with pytest.raises(ValueError, match=f"{role} is on cpu and the input on cuda:0"):
            cn.instance_norm(x, **{role: host})


def test_two_devices(cp: Any, rng: np.random.Generator) -> None:
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    host = rng.normal(size=(2, 3, 40, 40)).astype(np.float32)
    with cp.cuda.Device(1):
        x = cp.asarray(host)
    with cp.cuda.Device(0):
        y, saved = cn.instance_norm_forward(x)
        dx, *_ = cn.instance_norm_backward(x, saved)
        assert y.device.id == dx.device.id == 1
        reference.assert_close(y.get(), reference.forward(host))
        other = cp.ones(3, cp.float32)
        with pytest.raises(ValueError, match="cuda:0"):
            cn.instance_norm(x, weight=other)
        first, second = cn.moments(x[:, :, :13]), cn.moments(x[:, :, 13:])
        moments = first.merge(second)
        assert {a.device.id for a in (*vars(moments).values(), moments.std())} == {1}
        reference.assert_close(cn.instance_norm(x, moments=moments).get(), reference.forward(host))
        with pytest.raises(ValueError, match=r"is on cuda:1 and on cuda:0"):
            first.merge(cn.moments(cp.asarray(host)))
    layer = cn.InstanceNorm2d(3, affine=True, device="cuda:1")
    assert layer.weight is not None
    assert layer.weight.data.device.id == 1
    with pytest.raises(TypeError, match="cuda:1"):
        layer(cp.asarray(host))


@pytest.mark.parametrize("shape", [(2, 2**15, 2**15 + 3), (1, 1, 2**31 + 5)], ids=str)
def test_more_than_two_to_the_31_elements(cp: Any, shape: tuple[int, int, int]) -> None:
    free, _ = cp.cuda.runtime.memGetInfo()
    elements = int(np.prod(shape))
    needed = 6 * elements + 40 * shape[2] + 2**30  # x, y and dx, and a plane in float64 and int64 to compare with
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    pool = cp.get_default_memory_pool()
    try:
        x = cp.empty(shape, cp.float16)
        x[...] = (cp.arange(shape[2]) % 17).astype(cp.float16)
        n, c = shape[0] - 1, shape[1] - 1
        x[n, c] += (cp.arange(shape[2]) % 5).astype(cp.float16)
        y, saved = cn.instance_norm_forward(x)
        for plane in {(0, 0), (n, c)}:
            values = x[plane].astype(cp.float64)
            expected = (values[-1000:] - values.mean()) / cp.sqrt(values.var() + 1e-5)
            cp.testing.assert_allclose(y[plane][-1000:].astype(cp.float64), expected, rtol=2e-3, atol=2e-3)
        dx, *_ = cn.instance_norm_backward(y, saved, out=y)
        assert float(cp.abs(dx[n, c].astype(cp.float32)).max()) < 1e-2  # for dy = y, dx is 0 up to eps and rounding
    finally:
        del x
        y = saved = dx = None
        pool.free_all_blocks()


def test_layer_moves(cp: Any, rng: np.random.Generator) -> None:
    host = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cpu")
    layer(host)
    layer.backward(host)
    with pytest.raises(TypeError, match="to_gpu"):
        layer(cp.asarray(host))
    gradient = layer.weight.grad.copy()  # type: ignore[union-attr]
    assert layer.to_gpu() is layer
    cp.testing.assert_array_equal(layer.weight.grad, gradient)  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="to_cpu"):
        layer(host)
    y = layer(cp.asarray(host))
    reference.assert_close(y.get(), reference.forward(host))
    state = layer.state_dict()
    assert all(isinstance(a, cp.ndarray) for a in state.values())
    cpu = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cpu")
    cpu.load_state_dict(state)
    assert_equal(cpu.running_mean, layer.running_mean.get())  # type: ignore[union-attr]
    assert cn.InstanceNorm2d(3, affine=True).device.startswith("cuda")


def test_import(tmp_path: Path) -> None:
    """The first import compiles the core into CuPy's disk cache, the second adds nothing; EAGER=0 imports no CuPy."""
    environment = os.environ | {"CUPY_CACHE_DIR": str(tmp_path)}
    root = str(Path(cn.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])

    def imported(eager: str) -> bool:
        done = subprocess.run(
            [sys.executable, "-c", "import cupynorm, sys; print('cupy' in sys.modules)"],
            env=environment | {"CUPYNORM_EAGER": eager}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip() == "True"

    assert imported("1")
    files = set(tmp_path.iterdir())
    assert len(files) >= len(core_modules())
    assert imported("1")
    assert set(tmp_path.iterdir()) == files
    assert not imported("0")


def test_gpu_status() -> None:
    usable, why = devices.gpu_status()
    assert usable
    assert "cuda:" in why


def test_explain_on_the_device(cp: Any) -> None:
    text = cn.explain(cp.zeros((20, 100, 35, 45), cp.float32))
    assert "2 accesses of 4 B per element, 16 B at a time" in text
