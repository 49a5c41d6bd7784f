"""The CPU backend's blocks and tiles, of any size and layout: results, what `describe` says, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import laid
from helpers.backends import Backend, on_cpu, peak_of, use_compiled
from helpers.compare import assert_within, bits
from helpers.loops import let_threads_pay, loops_path, loops_short, windows
from helpers.pairwise import pairwise
from helpers.tiers import amount

import cupynorm as cn
from cupynorm import cpu
from cupynorm._types import Explained
from cupynorm.cpu import halves, numpy_path
from cupynorm.cpu.blocking import Arrays

pytestmark = [pytest.mark.usefixtures("threads_as_they_were"), on_cpu, pytest.mark.long]


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
    for _ in range(amount(2, 12, 40)):
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
        call = cn.Saved(x, np.zeros((2, n, c), np.float32), None, None, False)
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


@pytest.mark.parametrize("threads", [2, 64])
@pytest.mark.parametrize("shape", [(1, 64, 256, 256), (64, 1, 256, 256), (1, 1, 2048, 2048)], ids=str)
def test_scratch_of_many_threads(monkeypatch: pytest.MonkeyPatch, threads: int, shape: tuple[int, ...]):
    """At most as large as all blocks: three times the input for any number of threads."""
    use_compiled(monkeypatch, False)
    let_threads_pay(monkeypatch)
    cn.set_num_threads(threads)
    x = np.zeros(shape, np.float32)
    call = cn.Saved(x, np.zeros((2, *shape[:2]), np.float32), None, None, False)
    work = numpy_path.NumpyWork(call, Arrays(x, x))
    assert min(threads, work.blocks * work.tiles) * work.buffer_size <= x.size


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
