"""The CPU backend by itself: the same bits for any number of threads, memory, forks, Python threads, exits, layouts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.backends import Backend, on_cpu, peak_of, use_compiled
from helpers.compare import Bits, assert_same, assert_within, bits
from helpers.loops import forget_layouts, loops_path, loops_short, loops_tasks, windows
from helpers.pairwise import pairwise
from helpers.tiers import amount

import cupynorm as cn
from cupynorm import config, cpu, cpu_count
from cupynorm._types import Explained
from cupynorm.cpu import halves, numpy_path, thread_pool
from cupynorm.cpu.blocking import Arrays

pytestmark = [pytest.mark.usefixtures("threads_as_they_were"), on_cpu, pytest.mark.long]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def way(backend: Backend) -> str:
    return backend.name


def let_threads_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on threads take part in every call, to the end of the test."""
    monkeypatch.setattr(numpy_path.NumpyWork, "pays", 1)
    monkeypatch.setattr(loops_path, "PAYS", 1)
    forget_layouts(monkeypatch)


def laid(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    if layout == "crop":
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
        wide[..., 1:-2] = array
        return wide[..., 1:-2]
    if layout == "every second column":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "transposed":
        return np.ascontiguousarray(array.swapaxes(2, 3)).swapaxes(2, 3)
    if layout == "expanded":
        return np.broadcast_to(array[:1, :1], array.shape)
    return array


#: Many planes; few that are cut into tiles; one; short ones.
SHAPES = [(5, 40, 32, 33), (2, 3, 600, 301), (1, 1, 700, 801), (32, 100, 5, 5), (3, 70, 45, 7)]


def everything(x: np.ndarray, dy: np.ndarray, residual: np.ndarray | None, **options: Any) -> list[Bits]:
    c = x.shape[1]
    weight, bias = np.linspace(0.5, 2, c, dtype=np.float32), np.linspace(-1, 1, c, dtype=np.float32)
    running = [np.zeros(c, np.float32), np.ones(c, np.float32)]
    y, saved = cn.instance_norm_forward(
        x, weight, bias, running_mean=running[0], running_var=running[1], residual=residual, **options
    )
    return bits(y, saved.mean, saved.rstd, *running, *cn.instance_norm_backward(dy, saved))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_for_any_number_of_threads(
    way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, layout: str
):
    """Also where so many threads pay for so small a call that they share tiles; and fused."""
    let_threads_pay(monkeypatch)
    x, dy, residual = (laid(rng.standard_normal(shape, dtype=np.float32) + k, layout) for k in (3, 0, 0))
    options: Any = {} if layout == "crop" else {"activation": "relu", "residual": residual}
    options.setdefault("residual", None)
    found = []
    for number in (1, 2, 3, 7):
        cn.set_num_threads(number)
        found.append(everything(x, dy, **options))
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 37, 9, 11), (3, 40, 3, 4), (4, 30, 17, 19), (2, 3, 500, 300)], ids=str)
@pytest.mark.parametrize("offset", ["large", "of one plane", "of most planes", "infinite"])
def test_planes_are_independent_of_their_neighbours(
    way: str, rng: np.random.Generator, shape: Any, layout: str, offset: str
):
    """A sample by itself has the bits it has in the batch: y, dx and the statistics."""
    add = np.ones(shape[:2], np.float32)
    if offset == "large":
        add[:] = 100
    elif offset == "of one plane":
        add[0, 1] = 1000
    elif offset == "of most planes":
        add[rng.random(shape[:2]) < 0.7] = -300
    else:
        add[0, 1] = np.inf
    x = laid(rng.standard_normal(shape, dtype=np.float32) + add[:, :, None, None], layout)
    dy = laid(rng.standard_normal(shape, dtype=np.float32), layout)
    y, saved = cn.instance_norm_forward(x)
    dx = cn.instance_norm_backward(dy, saved)[0]
    for n in range(shape[0]):
        one, own = cn.instance_norm_forward(x[n : n + 1])
        gradient = cn.instance_norm_backward(dy[n : n + 1], own)[0]
        assert_same(one, y[n : n + 1])
        assert_same(gradient, dx[n : n + 1])
        assert bits(own.mean, own.rstd) == bits(saved.mean[n : n + 1], saved.rstd[n : n + 1])


def amid(values: np.ndarray, layout: str, beside: float) -> tuple[np.ndarray, np.ndarray]:
    """An array with these values, and the memory that it lies in the middle of, else full of `beside`."""
    memory = np.full(values.size + 20000, beside, values.dtype)
    like = laid(values, layout)
    array = np.lib.stride_tricks.as_strided(memory[10000:], like.shape, like.strides)
    array[...] = values
    return array, memory


@pytest.mark.parametrize("several", [False, True], ids=["one thread", "threads"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(3, 25, 4, 4), (2, 37, 5, 7), (3, 3, 30, 31), (1, 3, 50, 51), (2, 270, 3, 3), (1, 5, 250, 263)], ids=str
)
def test_nothing_beside_the_arrays_is_read_or_written(
    way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, layout: str, several: bool
):
    if several:
        let_threads_pay(monkeypatch)
        cn.set_num_threads(3)
    values, gradient, added = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    options = {"activation": "relu"}
    y, saved = cn.instance_norm_forward(laid(values, layout), residual=laid(added, layout), **options)
    dx, *_, dresidual = cn.instance_norm_backward(laid(gradient, layout), saved)

    x, dy, residual = (amid(each, layout, np.nan)[0] for each in (values, gradient, added))
    out, around = amid(np.zeros(shape, np.float32), layout, 7)
    again, saved = cn.instance_norm_forward(x, residual=residual, out=out, **options)
    assert again is out
    assert_same(out, y)
    got, *_, handed = cn.instance_norm_backward(dy, saved, out=out)
    assert got is out
    assert bits(out, handed) == bits(dx, dresidual)
    assert (around[:10000] == 7).all() and (around[-10000:] == 7).all()


GUARDED = """
import ctypes, math, mmap, os, sys
import numpy as np
import cupynorm as cn
from cupynorm import cpu

cpu.compiled = sys.argv[1] == "compiled"
tile = cpu.loops_path.TILE if cpu.compiled else 65536
mprotect, regions = ctypes.CDLL(None).mprotect, []

def guarded(size, at_end):
    # Bytes after a page that must not be touched, or before one.
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    regions.append(mmap.mmap(-1, room + 2 * mmap.PAGESIZE))
    base = ctypes.addressof(ctypes.c_char.from_buffer(regions[-1]))
    for page in (base, base + mmap.PAGESIZE + room):
        assert mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return np.frombuffer(regions[-1], np.uint8, size, mmap.PAGESIZE + (room - size) * at_end)

def placed(values, layout, at_end):
    n, c, *spatial = values.shape
    step = 2 if layout == "every second" else 1
    shape = (n, *spatial, c) if layout == "channels_last" else values.shape
    memory = guarded((step * (values.size - 1) + 1) * values.itemsize, at_end).view(values.dtype)
    array = np.lib.stride_tricks.as_strided(
        memory, shape, [step * values.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    )
    array = np.moveaxis(array, -1, 1) if layout == "channels_last" else array
    array[...] = values
    return array

rng = np.random.default_rng(int(sys.argv[2]))
for shape in [(3, 5, 4, 4), (2, 3, 5, 7), (1, 2, 30, 31), (2, 37, 3, 3), (1, 2, tile + 3)]:
    values, gradient = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    for layout in ("contiguous", "every second", "channels_last"):
        for at_end in (False, True):
            print(shape, layout, at_end, flush=True)
            x, dy, y, dx = (placed(each, layout, at_end) for each in (values, gradient, values, values))
            weight, bias = (placed(np.ones((1, shape[1], 1), "f"), "contiguous", at_end)[0, :, 0] for _ in "wb")
            saved = cn.instance_norm_forward(x, weight, bias, out=y)[1]
            cn.instance_norm_backward(dy, saved, out=dx)
            axes = tuple(range(2, len(shape)))
            xhat = (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True)
            assert np.abs(y - (xhat + 1)).max() < 1e-3
print("untouched", flush=True)
os._exit(0)  # the regions have views
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs pages that may not be touched")
def test_no_page_before_or_after_the_arrays_is_touched(way: str, rng: np.random.Generator):
    """What is read beside an array and then not used changes no result, but may be nobody's memory."""
    ran = subprocess.run(
        [sys.executable, "-c", GUARDED, way, str(rng.integers(2**31))],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, ["untouched"]), ran.stdout + ran.stderr


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("data", ["offset", "steps", "half", "outlier"])
@pytest.mark.parametrize("size", [5, 16, 100, 512, 513, 5000, 70001])
def test_nearly_constant_planes_keep_their_digits(
    way: str, rng: np.random.Generator, data: str, size: int, dtype: type[np.floating]
):
    """Values that differ by the last digits of a large mean: sum c**2 - size * mean_lo**2 would cancel."""
    base = dtype(16384.0 if dtype is np.float32 else 1e10 / 3)
    grain = np.spacing(base)
    x = {
        "offset": lambda: base + rng.standard_normal((3, 4, size)),
        "steps": lambda: base + grain * rng.integers(0, 3, (3, 4, size)),
        "half": lambda: base + grain * (np.arange(size) < max(size // 2, 1)) + np.zeros((3, 4, 1)),
        "outlier": lambda: base + grain * (np.arange(size) == size - 1) + np.zeros((3, 4, 1)),
    }[data]().astype(dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    eps = float(grain) ** 2 * 1e-3
    rounding = float(np.finfo(dtype).epsneg)
    exact = reference.Exact(x - base, eps=eps)  # not rounded; long double has too few digits for x itself
    y, saved = cn.instance_norm_forward(x, eps=eps)
    largest = np.abs(exact.y).max(-1, keepdims=True)
    assert np.abs(y - exact.y).max(where=largest > 0, initial=0) <= 32 * rounding * max(float(largest.max()), 1)
    dx, _, _ = cn.instance_norm_backward(dy, saved)
    through = exact.backward(dy)[0]
    assert_within(dx, through, 64 * rounding * np.abs(through).max() * max(float(largest.max()), 1))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("size", [16, 100, 512, 2048, 5000, 70001])
def test_saved_mean_is_the_number_next_to_the_mean(
    way: str, rng: np.random.Generator, size: int, offset: float, layout: str
):
    """And mean_lo is what it lacks: y needs their sum alone, who reads what was saved needs each."""
    x = laid((offset + rng.standard_normal((3, 4, size))).astype(np.float32), layout)
    saved = cn.instance_norm_forward(x)[1]
    assert saved.mean_lo is not None
    exact = x.astype(np.longdouble).mean(-1)
    assert_within(saved.mean, exact, 0.51 * np.spacing(np.abs(saved.mean)) + 1e-6)
    assert np.abs((saved.mean - exact) + saved.mean_lo).max() <= 2e-6


@pytest.mark.parametrize("shape", [(2, 3, 16, 17), (1, 2, 400, 401)], ids=str)
def test_saved_mean_of_planes_whose_squares_overflow(way: str, rng: np.random.Generator, shape: Any):
    x = 1e200 * (1e6 + rng.standard_normal(shape))
    saved = cn.instance_norm_forward(x)[1]
    exact = x.astype(np.longdouble).mean((2, 3))
    assert saved.mean_lo is not None
    assert_within((saved.mean.astype(np.longdouble) + saved.mean_lo) / exact, 1, 2.0**-60)


def let_blocks_be_small(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and tiles of as few elements, and as many threads, as chance has it, to the end of the test. The compiled
    loops take planes up to FORWARD_SHORT for ones of one tile.
    """
    let_threads_pay(monkeypatch)
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", int(np.exp2(rng.uniform(5, 13))))
    tile = np.exp2(rng.uniform(0, 2))
    monkeypatch.setattr(loops_path, "TILE", int(tile * int(loops_short.FORWARD_SHORT)))
    monkeypatch.setattr(loops_path, "STREAM", int(rng.choice([0, 2**60])))
    monkeypatch.setattr(loops_path, "LONG_RUN", 1)
    cn.set_num_threads(int(rng.integers(1, 5)))


LAID = ["contiguous", "channels_last", "crop", "transposed"]


@pytest.mark.parametrize("layout", LAID)
def test_blocks_and_tiles_of_any_size(way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, layout: str):
    """Small arrays cut as large ones are: forward, backward and double backward are what the reference says."""
    for _ in range(amount(4, 12, 40)):
        let_blocks_be_small(rng, monkeypatch)
        most = (7, 40, 16, 16) if rng.random() < (0.3 if way == "compiled" else 0.7) else (4, 5, 90, 90)
        shape = tuple(map(int, rng.integers(1, most)))
        if np.prod(shape[2:]) < 6:  # the terms of dx cancel in planes of two
            continue
        dtype, activation, fused = rng.choice([np.float32, np.float16]), None, rng.random() < 0.7
        if fused:
            activation = rng.choice([None, "relu", "leaky_relu", "silu", "gelu"])
        print(
            shape, dtype, activation, numpy_path.BLOCK_BYTES, loops_path.TILE, cn.get_num_threads()
        )  # shown with a failure
        x, dy, ddx, added = (laid(rng.standard_normal(shape).astype(dtype), layout) for _ in range(4))
        weight, bias = rng.uniform(0.5, 2, shape[1]).astype(np.float32), rng.random(shape[1], np.float32)
        options: Any = {"residual": added if fused else None, "activation": activation, "negative_slope": 0.01}
        z = reference.before_activation(x, weight, bias, residual=options["residual"])
        dy[np.abs(z) < 0.01] = 0  # rounding may decide on which side of a kink an element is

        y, saved = cn.instance_norm_forward(x, weight, bias, **options)
        reference.assert_all_close([y], [reference.forward(x, weight, bias, **options)], x)
        given = rng.standard_normal(shape[1], dtype=np.float32), rng.uniform(0.5, 2, shape[1]).astype(np.float32)
        tracked = cn.instance_norm(x, *given, weight, bias, use_input_stats=False, **options)
        reference.assert_all_close([tracked], [reference.forward(x, weight, bias, running=given, **options)], x)
        gradients = cn.instance_norm_backward(dy, saved)
        exact = reference.backward(dy, x, weight, bias=bias, **options)[: len(gradients)]
        reference.assert_all_close(gradients, exact, x)
        if activation is None:
            again = cn.instance_norm_double_backward(ddx, weight, bias, dy, saved)
            reference.assert_all_close(again, reference.double_backward(ddx, weight, bias, dy, x, weight), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every few"])
def test_gaps_that_differ(way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, layout: str):
    """Each array of a call is a part of a larger one of another size, or has columns in between of its own number."""

    def within(a: np.ndarray) -> np.ndarray:
        before, after = rng.integers(0, 4, (2, a.ndim))
        every = int(rng.integers(2, 5)) if layout == "every few" else 1
        shape = a.shape + before + after
        shape[-1] *= every
        larger = laid(np.full(shape, 7, a.dtype), "channels_last" if layout == "channels_last" else "contiguous")
        part = larger[tuple(slice(first, first + size) for first, size in zip(before[:-1], a.shape, strict=False))]
        part = part[..., every * before[-1] :: every][..., : a.shape[-1]]
        part[...] = a
        return part

    for _ in range(10):
        let_blocks_be_small(rng, monkeypatch)
        shape = (2, 5, *map(int, rng.integers(3, 12, 2))) if rng.random() < 0.5 else (2, 5, int(rng.integers(6, 60)))
        x, dy, added, y, dx = (within(rng.standard_normal(shape, dtype=np.float32)) for _ in range(5))
        options: Any = {"residual": added, "activation": "relu"}
        z = reference.before_activation(x, residual=options.get("residual"))
        dy[np.abs(z) < 0.01] = 0  # rounding may decide on which side of the kink an element is
        y, saved = cn.instance_norm_forward(x, out=y, **options)
        reference.assert_all_close([y], [reference.forward(x, **options)], x)
        dx, _, _, *dresidual = cn.instance_norm_backward(dy, saved, out=dx)
        exact, _, _, g = reference.backward(dy, x, **options)
        reference.assert_all_close([dx, *dresidual], [exact, g][: 1 + len(dresidual)], x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_in_the_place_of_inputs(
    way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, layout: str
):
    """Nothing is done twice, and nothing is read that was written: the bits are those of results elsewhere."""
    for shape in ((3, 5, 4, 4), (3, 5, 6, 7), (3, 5, 25, 30), (2, 3, 50, 60), (2, 37, 9, 30)):
        let_blocks_be_small(rng, monkeypatch)
        x, dy = (laid(rng.standard_normal(shape, dtype=np.float32), layout) for _ in range(2))
        y, saved = cn.instance_norm_forward(x)
        dx = cn.instance_norm_backward(dy, saved)[0].copy()
        z, into = (laid(a.copy(), layout) for a in (x, dy))
        assert cn.instance_norm(z, out=z) is z
        assert cn.instance_norm_backward(into, saved, out=into)[0] is into
        assert bits(z, into) == bits(y, dx)


def test_a_thread_goes_on_to_the_tiles_of_the_next_plane(
    way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """Few planes of many tiles, a thread's share of which reaches over planes and samples."""
    let_threads_pay(monkeypatch)
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(loops_path, "TILE", loops_short.FORWARD_SHORT)
    cn.set_num_threads(2)
    x, dy = (rng.standard_normal((3, 2, 150, 151), dtype=np.float32) for _ in range(2))
    weight, bias = rng.random((2, 2), np.float32)
    y, saved = cn.instance_norm_forward(x, weight, bias)
    reference.assert_all_close([y], [reference.forward(x, weight, bias)], x)
    gradients = cn.instance_norm_backward(dy, saved)
    reference.assert_all_close(gradients, reference.backward(dy, x, weight, bias=bias)[:3], x)


@pytest.mark.parametrize("layout", LAID)
def test_blocks_of_numpy_alone(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, layout: str):
    """Blocks hold each element once, are as large as allowed, and are equally many for each thread."""
    for _ in range(amount(50, 200)):
        let_blocks_be_small(rng, monkeypatch)
        n, c, h, w = shape = tuple(map(int, rng.integers(1, (9, 40, 16, 16))))
        least = int(rng.choice([2, numpy_path.MIN_CHANNELS]))
        monkeypatch.setattr(numpy_path, "MIN_CHANNELS", least)
        monkeypatch.setattr(numpy_path, "MIN_CHANNEL_TILE", int(rng.choice([8, 64])))
        x = laid(np.zeros(shape, np.float32), layout)
        if rng.random() < 0.3:  # exactly a block
            monkeypatch.setattr(numpy_path, "BLOCK_BYTES", 4 * h * w * int(rng.choice([1, c])))
        number, limit = cn.get_num_threads(), numpy_path.BLOCK_BYTES // 4
        print(shape, numpy_path.BLOCK_BYTES, number)
        call = cn.Saved(x, *np.zeros((2, n, c), np.float32), None, None, False)
        work = numpy_path.NumpyWork(call, Arrays(x, x))
        seen, sizes = np.zeros(work.x.shape, int), []
        for item in range(work.blocks * work.tiles):
            _, index, _ = work._index(item)
            seen[index] += 1
            sizes.append(seen[index].size)
        assert (seen == 1).all()
        channels_last = work.channels_last
        if 1 not in (w, h):  # then the strides are unambiguous
            assert channels_last == (layout == "channels_last" and c >= least and w * h > 1)
        width = min(c, max(limit // (h * w), numpy_path.MIN_CHANNEL_TILE)) if channels_last else 1
        assert (work.tiles > 1) == (h * w * width > limit)
        if work.tiles > 1:
            assert max(sizes) <= max(limit, width)
            continue
        if channels_last and h * w * c > limit:
            assert max(sizes) <= limit and work.blocks == n * -(-c // width)
            continue
        most = limit if number == 1 else 2 * limit
        assert max(sizes) <= most
        if channels_last or (h * w * c <= most and n >= number):
            count, times, size = n, 1, h * w * c
        else:
            count, times, size = c, n, h * w
        fewest = -(-count // (most // size))
        parts = work.blocks // times
        assert parts * times == work.blocks
        assert fewest <= parts < fewest + number
        assert parts == count or work.blocks % number == 0
        assert max(sizes) - min(sizes) <= size


@pytest.mark.parametrize("shape", [(5, 1, 22950), (1, 5, 22950), (7, 1, 34405), (1, 75001, 2)], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_uneven_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, number: int):
    """A third or half of a block, here an eighth as large as usual, a sample: once scratch was a third too small."""
    let_threads_pay(monkeypatch)
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", numpy_path.BLOCK_BYTES // 8)
    cn.set_num_threads(number)
    for layout in ("contiguous", "channels_last"):
        x = laid(rng.standard_normal(shape, dtype=np.float32).astype(np.float16), layout)
        y = cn.instance_norm(x)
        reference.assert_close(y, reference.forward(x))


def test_describe_threads_and_tiles(way: str):
    def told(number: int, *shape: int, layout: str = "contiguous", double_backward: bool = False) -> list[str]:
        cn.set_num_threads(number)
        x = laid(np.empty(shape, np.float16), layout)
        lines = cpu.backend.describe(x, Explained(x.dtype, double_backward=double_backward))
        return [line.strip() for line in lines[1:]]

    if way == "compiled":
        assert told(3, 2, 3, 4, 5) == ["compiled loops over 6 plane(s)", "one thread of 3"]
        assert told(3, 1, 4, 300, 500) == [
            "compiled loops over 4 plane(s), each in 3 tiles, put together in a fixed order", "up to 3 threads of 3",
        ]  # fmt: skip
        assert told(1, 2, 64, 4, 5, layout="channels_last") == [
            "compiled loops over 2 group(s) of 64 channels side by side", "one thread of 1",
        ]  # fmt: skip
        for few in ("channels_last", "crop", "transposed"):
            assert told(1, 2, 7, 4, 5, layout=few)[0] == "compiled loops over 14 plane(s), moved together first"
    else:
        assert told(1, 5, 1, 367, 500) == [
            "NumPy, 3 block(s) of planes, in float32 of at most 1468000 B at a time", "one thread of 1",
        ]  # fmt: skip
        assert told(2, 5, 1, 367, 500) == [
            "NumPy, 2 block(s) of planes, in float32 of at most 2202000 B at a time", "up to 2 threads of 2",
        ]  # fmt: skip
        assert told(2, 1, 2, 1024, 1024) == [
            "NumPy, 2 block(s) of planes, in float32 of at most 2097152 B at a time, each in 2 tiles, "
            "put together in a fixed order", "up to 2 threads of 2",
        ]  # fmt: skip
    assert told(2, 0, 3, 4, 5) == ["empty, nothing is computed"]
    cn.set_num_threads(1)
    *more, double, threads = told(cn.get_num_threads(), 5, 1, 367, 500, double_backward=True)
    assert more == told(1, 5, 1, 367, 500)
    assert double == "double backward: NumPy, 3 block(s) of planes, in float32 of at most 1468000 B at a time"
    assert threads == "one thread of 1"


#: Of 1 or 2 MiB.
MEMORY = {
    "planes": ((2, 16, 128, 128), np.float32, "contiguous"),
    "channels last": ((4, 8, 128, 128), np.float32, "channels_last"),
    "float16": ((2, 32, 128, 128), np.float16, "contiguous"),
    "float16, channels last": ((8, 8, 128, 128), np.float16, "channels_last"),
    "one plane": ((1, 1, 1024, 512), np.float32, "contiguous"),
    "small planes": ((256, 64, 8, 4), np.float32, "contiguous"),
    "one row": ((1, 1, 1, 2**19), np.float32, "contiguous"),
    "one line": ((1, 1, 2**19), np.float16, "contiguous"),
    "one column": ((1, 1, 2**19, 1), np.float32, "contiguous"),
    "crop": ((2, 16, 128, 128), np.float32, "crop"),
    "every second column": ((2, 4, 256, 256), np.float32, "every second column"),
    "transposed": ((1, 4, 512, 256), np.float32, "transposed"),
    "expanded": ((1, 4, 512, 256), np.float32, "expanded"),
}


@pairwise(kind=[*MEMORY], training=[True, False], activation=[None, "gelu"])
def test_memory_of_a_call_is_a_few_blocks(
    way: str, monkeypatch: pytest.MonkeyPatch, kind: str, training: bool, activation: str | None
):
    """Blocks, windows, and what halves are converted in, are an eighth as large as usual. Beside results: for each of
    two threads up to 6 blocks, which are twice as large where they hold several planes, and one more where these are
    small; or a window for each array; and some numbers for each plane."""
    let_threads_pay(monkeypatch)
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", numpy_path.BLOCK_BYTES // 8)
    if way == "compiled":
        monkeypatch.setattr(windows, "WINDOW", windows.WINDOW // 8)
    monkeypatch.setattr(halves, "CHUNK", halves.CHUNK // 8)
    shape, dtype, layout = MEMORY[kind]
    cn.set_num_threads(2)
    x = laid(np.ones(shape, dtype), layout)
    size = x.size * x.itemsize
    blocks = {"numpy": 3.25 if activation is None else 6.25, "compiled": 0}[way] + (kind == "small planes")
    several = 2 if np.prod(shape[2:]) * 4 <= numpy_path.BLOCK_BYTES else 1
    most = 2 * several * blocks * numpy_path.BLOCK_BYTES + 2**17 + 64 * shape[0] * shape[1]
    if way == "compiled" and layout != "contiguous":
        most += 2 * 3 * windows.LARGER * windows.WINDOW
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    options: Any = {"activation": activation, "use_input_stats": training, "running_mean": mean, "running_var": var}
    y, saved = cn.instance_norm_forward(x, **options)  # compiles, starts threads
    cn.instance_norm_backward(x, saved)
    cn.instance_norm(x, **options, out=y)
    assert peak_of(lambda: cn.instance_norm(x, **options)) < size + most
    assert peak_of(lambda: cn.instance_norm(x, **options, out=y)) < most
    assert peak_of(lambda: cn.instance_norm_backward(x, saved)) < size + most
    assert peak_of(lambda: cn.instance_norm_backward(x, saved, out=y)) < most


# Threads

LARGE = (4, 64, 128, 129)


def ready(rng: np.random.Generator) -> tuple[np.ndarray, Bits]:
    x = rng.standard_normal(LARGE, dtype=np.float32)
    cn.set_num_threads(1)
    expected = Bits(cn.instance_norm(x))
    cn.set_num_threads(4)
    return x, expected


def test_helpers_take_part(way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    x, expected = ready(rng)
    seen = set()
    kind, name = (loops_tasks.driver(), "run") if way == "compiled" else (numpy_path.NumpyWork, "work")
    work = getattr(kind, name)

    def watched(*given: Any) -> None:
        seen.add(threading.get_ident())
        both.wait(10)
        work(*given)

    both = threading.Barrier(4)
    monkeypatch.setattr(kind, name, watched)
    assert Bits(cn.instance_norm(x)) == expected
    assert len(seen) == 4
    assert {t.name for t in threading.enumerate() if t.ident in seen} <= {"cupynorm", "MainThread"}


def test_many_python_threads_at_once(way: str, rng: np.random.Generator):
    x, expected = ready(rng)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: Bits(cn.instance_norm(x)) == expected, range(32)))
    assert all(results)


def taken(tasks: int, number: int) -> list[int]:
    done: list[int] = []
    queue = thread_pool.TaskQueue(tasks)
    thread_pool.share(lambda worker: done.extend(queue.tasks(worker)), queue, number)
    return sorted(done)


def test_an_error_in_a_helper_is_raised_once_all_have_ended():
    running, most = [0], [0]
    both = threading.Barrier(2)
    queue = thread_pool.TaskQueue(10**6)

    def work(worker: int) -> None:
        running[0] += 1
        both.wait(10)
        try:
            for _ in queue.tasks(worker):
                if threading.current_thread() is not threading.main_thread():
                    raise MemoryError("of a helper")
        finally:
            most[0] = max(most[0], running[0])
            running[0] -= 1

    with pytest.raises(MemoryError, match="of a helper"):
        thread_pool.share(work, queue, 2)
    assert (running, most) == ([0], [2])
    assert taken(100, 2) == list(range(100))  # the pool goes on


def test_each_task_goes_to_one_thread():
    for _ in range(50):
        assert taken(200, 5) == list(range(200))


USE = """
import numpy as np, cupynorm as cn, os, sys, threading
from cupynorm import cpu
cpu.compiled = cpu.compiled and WAY == "compiled"
cn.set_num_threads(4)
x = np.random.default_rng(1).standard_normal((4, 64, 128, 129), dtype=np.float32)
y = cn.instance_norm(x)
"""

ENDINGS = {
    "fork": """
assert threading.active_count() > 1
child = os.fork()
if child == 0:
    os._exit(0 if cn.instance_norm(x).tobytes() == y.tobytes() and threading.active_count() > 1 else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert cn.instance_norm(x).tobytes() == y.tobytes()
""",
    "fork while others call": """
stop = threading.Event()
def go():
    while not stop.is_set():
        assert cn.instance_norm(x).tobytes() == y.tobytes()
callers = [threading.Thread(target=go) for _ in range(2)]
[t.start() for t in callers]
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if cn.instance_norm(x).tobytes() == y.tobytes() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
[t.join() for t in callers]
""",
    "fork while statistics are written": """
running = np.zeros(64, np.float32), np.ones(64, np.float32)
from cupynorm.cpu.running import _present
_present.clear()  # as another thread does
child = os.fork()
if child == 0:
    cn.instance_norm(x, *running)
    os._exit(0 if running[0].any() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""",
    "workers": """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(r == y[:, :2].tobytes() for r in pool.map(lambda_, [x[:, :2]] * 4))
""",
    "plain end": "",
    "end in a thread": """
def late():
    threading.main_thread().join()
    assert cn.instance_norm(x).tobytes() == y.tobytes()
threading.Thread(target=late).start()
""",
    "call at exit": """
import atexit
atexit.register(lambda: print(cn.instance_norm(x).tobytes() == y.tobytes()))
""",
    "interrupt": """
import signal, _thread
for _ in range(20):
    timer = threading.Timer(0.003, _thread.interrupt_main)
    try:
        timer.start()
        for _ in range(200):
            cn.instance_norm(x)
    except KeyboardInterrupt:
        pass
    timer.join()
assert cn.instance_norm(x).tobytes() == y.tobytes()
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ending", [
    pytest.param(ending, marks=[pytest.mark.full] * (ending in ("fork while others call", "workers", "interrupt")))
    for ending in ENDINGS
])  # fmt: skip
def test_forks_and_exits(way: str, ending: str):
    """Each in a process of its own, which must end, and well."""
    code = f"WAY = {way!r}\n{USE}lambda_ = lambda a: None\n{ENDINGS[ending]}"
    if ending == "workers":
        code = f"WAY = {way!r}\n{USE}def lambda_(a):\n    return cn.instance_norm(a).tobytes()\n{ENDINGS[ending]}"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == ("True\n" if ending == "call at exit" else "")


def said(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_number_of_threads():
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= cpu_count.available_cpus() <= (usable or 1)
    ask = "import cupynorm; print(cupynorm.get_num_threads())"
    assert said(ask, CUPYNORM_NUM_THREADS="7", OMP_NUM_THREADS="").stdout == "7\n"
    assert said(ask, CUPYNORM_NUM_THREADS="", OMP_NUM_THREADS="").stdout == f"{cpu_count.available_cpus()}\n"
    if hasattr(os, "sched_setaffinity"):
        pinned = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        assert said(pinned + ask, CUPYNORM_NUM_THREADS="").stdout == "1\n"
    for wrong in ("0", "many"):
        failed = said(ask, CUPYNORM_NUM_THREADS=wrong)
        assert f"CUPYNORM_NUM_THREADS must be a positive integer, got {wrong!r}" in failed.stderr
    cn.set_num_threads(np.int64(3))
    assert cn.get_num_threads() == 3
    for number, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="number of threads must be"):
            cn.set_num_threads(number)  # type: ignore[arg-type]
    assert cn.get_num_threads() == 3


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "3"}, 3),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "30"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": " 4 , 2"}, 4),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_THREAD_LIMIT": "5", "OMP_NUM_THREADS": "6"}, 5),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "0"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "-2"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "many"}, 7),
        ({"CUPYNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": ",2", "OMP_THREAD_LIMIT": "1.5"}, 7),
    ],
)
def test_limits_from_the_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], number: int):
    """As joblib and dask set them for their workers: asked once, at first use. What is set by a call counts alone."""
    for name in ("CUPYNORM_NUM_THREADS", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_count, "library_limits", lambda: [])
    monkeypatch.setattr(cpu_count, "available_cpus", lambda: 8)
    monkeypatch.setattr(config.num_threads, "found", None)
    monkeypatch.setattr(config.num_threads, "given", None)
    assert cn.get_num_threads() == number
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "1")
    assert cn.get_num_threads() == number
    cn.set_num_threads(9)
    assert cn.get_num_threads() == 9


def test_limits_of_threadpoolctl(monkeypatch: pytest.MonkeyPatch):
    """As they are at the moment, for whoever has imported it."""
    control = pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(config.num_threads, "found", 64)
    monkeypatch.setattr(config.num_threads, "given", None)
    monkeypatch.setattr(cpu_count, "_controllers", [])
    usual = min(library["num_threads"] for library in control.threadpool_info())
    assert cn.get_num_threads() == min(64, usual)
    with control.threadpool_limits(1):
        assert cn.get_num_threads() == 1
        cn.set_num_threads(5)
        assert cn.get_num_threads() == 5
        monkeypatch.setattr(config.num_threads, "given", None)
    assert cn.get_num_threads() == min(64, usual)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)  # not imported
    assert cn.get_num_threads() == 64
    monkeypatch.setitem(sys.modules, "threadpoolctl", object())  # something else of the name
    monkeypatch.setattr(cpu_count, "_controllers", [])
    assert cn.get_num_threads() == 64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_ask_their_own_environment():
    code = """
import os, cupynorm as cn
before = cn.get_num_threads()
def child():
    os.environ["OMP_NUM_THREADS"] = "1"
    pid = os.fork()
    if not pid:
        os._exit(cn.get_num_threads())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(before, child(), cn.get_num_threads())
cn.set_num_threads(3)
print(child())
"""
    ran = said(code, CUPYNORM_NUM_THREADS="4", OMP_NUM_THREADS="")
    assert (ran.stdout, ran.stderr) == ("4 1 4\n3\n", "")


@pytest.mark.extras
def test_workers_of_a_data_loader():
    """PyTorch has each compute with one thread. What it may use in the main process does not matter."""
    pytest.importorskip("torch")
    code = """
import sys, warnings
import cupynorm as cn
assert "torch" not in sys.modules
first = cn.get_num_threads()
import torch.utils.data
class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, index): return cn.get_num_threads()
if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = [int(n) for n in torch.utils.data.DataLoader(Numbers(), batch_size=None, num_workers=1)]
    print(first, cn.get_num_threads(), found)
"""
    ran = said(code, CUPYNORM_NUM_THREADS="4", OMP_NUM_THREADS="4")
    assert (ran.stdout, ran.stderr) == ("4 4 [1, 1]\n", "")


@pytest.mark.parametrize("version", [1, 2])
def test_quota_of_a_container(tmp_path: Path, version: int):
    own = tmp_path / "cgroup"
    if version == 2:
        own.write_text("0::/a/b\n")
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
        (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    else:
        own.write_text("3:memory:/x\n2:cpu,cpuacct:/a\n")
        folder = tmp_path / "cpu,cpuacct" / "a"
        folder.mkdir(parents=True)
        (folder / "cpu.cfs_quota_us").write_text("150000\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
        (folder.parent / "cpu.cfs_quota_us").write_text("-1\n")
        (folder.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert list(cpu_count._quotas(tmp_path, own)) == [1.5]
    assert list(cpu_count._quotas(tmp_path, tmp_path / "nothing")) == []


@pytest.mark.parametrize("threads", [2, 64])
@pytest.mark.parametrize("shape", [(1, 64, 256, 256), (64, 1, 256, 256), (1, 1, 2048, 2048)], ids=str)
def test_scratch_of_many_threads(monkeypatch: pytest.MonkeyPatch, threads: int, shape: tuple[int, ...]):
    """At most as large as all blocks: three times the input for any number of threads."""
    use_compiled(monkeypatch, False)
    let_threads_pay(monkeypatch)
    cn.set_num_threads(threads)
    x = np.zeros(shape, np.float32)
    call = cn.Saved(x, *np.zeros((2, *shape[:2]), np.float32), None, None, False)
    work = numpy_path.NumpyWork(call, Arrays(x, x))
    assert min(threads, work.blocks * work.tiles) * work.buffer_size <= x.size


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="sets the mode of x86 processors")
@on_cpu
def test_helpers_compute_in_the_mode_of_the_caller(backend: Backend, rng: np.random.Generator) -> None:
    """Denormals are flushed by all threads of a call, or by none."""
    own = thread_pool._mode()
    if own is None:
        pytest.skip("this C library has no floating-point environment")
    flushing = thread_pool._mode()
    mxcsr = np.frombuffer(flushing, np.uint32)[7:8]
    mxcsr |= 0x8040  # results and operands
    x = (1e-39 * rng.standard_normal((8, 8, 160, 160))).astype(np.float32)

    def results() -> list[Any]:
        found = []
        for number in (1, 2, 5):
            cn.set_num_threads(number)
            y, saved = cn.instance_norm_forward(x, eps=1e-5)
            found.append((y, *cn.instance_norm_backward(x, saved)[:1]))
        return found

    before = cn.get_num_threads()
    try:
        plain = results()
        thread_pool._set_mode(flushing)
        try:
            flushed = results()
        finally:
            thread_pool._set_mode(own)
        again = results()
    finally:
        cn.set_num_threads(before)
    assert np.any(plain[0][0] != flushed[0][0])
    for each in (plain, flushed, again):
        for one, more in zip(each[0] * 2, each[1] + each[2], strict=True):
            assert_same(more, one)
    for one, more in zip(plain[0], again[0], strict=True):
        assert_same(more, one)


@on_cpu
@pairwise(
    shape=[(2, 30, 5, 6), (2, 3, 5, 6), (1, 70, 20, 30), (3, 9, 40, 30), (1, 3000, 4, 6)], blocks=[2**21, 2**12],
    activation=[None, "gelu"], dtype=["float32", "float16"],
)  # fmt: skip
def test_few_and_many_channels_side_by_side(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], blocks: int,
    activation: str | None, dtype: str,
) -> None:  # fmt: skip
    """Few are moved apart, block by block; of many some are done together."""
    monkeypatch.setattr(numpy_path, "BLOCK_BYTES", blocks)
    x, dy = (laid((3 + rng.standard_normal(shape)).astype(dtype), "channels_last") for _ in range(2))
    y, saved = cn.instance_norm_forward(x, activation=activation)
    dx, *_ = cn.instance_norm_backward(dy, saved)
    assert y.strides == dx.strides == x.strides
    given = {"activation": activation}
    exact = reference.forward(x, **given), reference.backward(dy, x, **given)[0]
    digits = 2e-6 if dtype == "float32" else 2e-3
    for got, value in zip((y, dx), exact, strict=True):
        assert_within(got, value, digits * (np.abs(value) + 3))
