"""The CPU backend's results: the same for any number of threads and beside any planes; digits; no other memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import laid
from helpers.backends import on_cpu
from helpers.compare import Bits, assert_same, assert_within, bits
from helpers.loops import let_threads_pay
from helpers.pairwise import pairwise

import cupynorm as cn

pytestmark = [pytest.mark.usefixtures("threads_as_they_were"), on_cpu, pytest.mark.long]
ROOT = Path(__file__).parents[2]


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
for shape in [(3, 5, 4, 4), (2, 3, 5, 7), (1, 2, 30, 31), (2, 37, 3, 3), (1, 70, 4, 9), (1, 2, tile + 3)]:
    values, gradient = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    for layout in ("contiguous", "every second", "channels_last"):
        for at_end in (False, True):
            print(shape, layout, at_end, flush=True)
            x, dy, y, dx = (placed(each, layout, at_end) for each in (values, gradient, values, values))
            weight, bias = (placed(np.ones((1, shape[1], 1), "f"), "contiguous", at_end)[0, :, 0] for _ in "wb")
            for _ in range(2):  # the second call need not be checked and planned
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


@pairwise(
    dtype=[np.float32, np.float64], data=["offset", "steps", "half", "outlier"],
    size=[5, 16, 100, 512, 513, 5000, 70001],
)  # fmt: skip
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
