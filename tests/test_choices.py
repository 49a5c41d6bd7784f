"""What the CPU backend chooses for speed alone. Results have the same bits whatever it is: other tests do not notice.

The numbers were measured (README, and the messages of the changes); here they are held, so that none moves unseen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import use_compiled

import cupynorm as cn
from cupynorm import cpu

pytestmark = pytest.mark.usefixtures("threads_as_they_were")


def saved_of(shape: tuple[int, ...], steps: Sequence[int], activation: str | None = None) -> cn.Saved:
    """Of a forward on an array with these strides, in elements, that takes no memory: it must not be read."""
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, [4 * step for step in steps])
    stats = np.zeros((3, *shape[:2]), np.float32)
    return cn.Saved(x, *stats[:2], None, None, True, stats[2], activation)


def steps_of(shape: tuple[int, ...], lanes: bool = False) -> list[int]:
    """Strides in elements where there are no gaps; lanes: channels-last."""
    order = [0, *range(2, len(shape)), 1] if lanes else range(len(shape))
    steps = dict(
        zip(order, (math.prod(shape[axis] for axis in order[i + 1 :]) for i in range(len(shape))), strict=True)
    )
    return [steps[axis] for axis in range(len(shape))]


def on_numpy(shape: tuple[int, ...], lanes: bool = False, activation: str | None = None) -> Any:
    call = saved_of(shape, steps_of(shape, lanes), activation)
    return cpu._Interpreted(call, cpu._merged([call.x] * 2))


def layout_with(shape: tuple[int, ...], steps: Sequence[int], dtype: Any = np.float32) -> Any:
    """Of a forward on x and y with these strides, in elements."""
    dtype = np.dtype(dtype)
    return cpu._Layout(dtype, shape, (tuple(dtype.itemsize * step for step in steps),) * 2, False)


def layout_of(shape: tuple[int, ...], lanes: bool = False, dtype: Any = np.float32) -> Any:
    return layout_with(shape, steps_of(shape, lanes), dtype)


def test_from_where_on_threads_pay_on_numpy_alone():
    cn.set_num_threads(3)
    assert on_numpy((1, 1, 2**19 - 1)).threads == 1
    assert on_numpy((1, 1, 2**19)).threads == 3


@pytest.mark.compiled
def test_from_where_on_threads_pay_for_compiled_loops(monkeypatch: pytest.MonkeyPatch):
    """A plane counts 25 elements more than it has."""
    use_compiled(monkeypatch, True)

    assert [layout_of((1, 1, 2**18 - 25 - less)).pays for less in (0, 1)] == [True, False]
    assert [layout_of((64, 32, 128 - 25 - less)).pays for less in (0, 1)] == [True, False]


class Recorded:
    def __init__(self, threads: int, blocks: int, tiles: int):
        self.threads, self.blocks, self.tiles = threads, blocks, tiles
        self.did: list[Any] = []

    def share(self, step: Any, count: int) -> None:
        self.did.append((step, count))


@pytest.mark.parametrize(("threads", "blocks", "tiles", "whole"), [
    (1, 2, 5, True), (3, 2, 1, True), (3, 11, 5, False), (3, 12, 5, True), (2, 7, 2, False), (2, 8, 2, True),
    (2, 1, 2, False), (5, 19, 2, False), (5, 20, 2, True),
])  # fmt: skip
def test_tiles_are_shared_where_blocks_are_few(threads: int, blocks: int, tiles: int, whole: bool):
    """A thread with four blocks or more has as much to do as the others."""
    work = Recorded(threads, blocks, tiles)
    cpu._Work.run(work, "reduce", lambda *given: work.did.append(("join", *given)), "apply", "whole")  # type: ignore
    units = blocks * tiles
    assert work.did == ([("whole", blocks)] if whole else [("reduce", units), ("join", 0, blocks), ("apply", units)])


@pytest.mark.parametrize(("size", "number", "count", "parts"), [
    (2**19, 1, 9, 1), (2**19, 2, 9, 2), (2**22 - 1, 2, 9, 2), (2**22, 2, 9, 8), (2**22, 2, 7, 7), (2**22, 3, 100, 12),
    (2**19, 3, 2, 2), (2**22, 1, 9, 1),
])  # fmt: skip
def test_parts_of_a_call_on_numpy_alone(
    monkeypatch: pytest.MonkeyPatch, size: int, number: int, count: int, parts: int
):
    """One for each thread, or four from 2**22 elements on: a thread that is late takes fewer."""
    given: list[Any] = []
    monkeypatch.setattr(cpu, "share", lambda work, tasks, threads: given.append((work, tasks, threads)))
    cn.set_num_threads(number)
    work = on_numpy((1, 1, size))
    work.share("step", count)
    [(each, tasks, threads)] = given
    assert (tasks, threads) == (parts, number)
    ranges: list[Any] = []
    monkeypatch.setattr(work, "work", lambda step, parts: ranges.extend(parts))
    for task in range(tasks):
        each([task], None)
    assert [i for first, last in ranges for i in range(first, last)] == [*range(count)]
    assert max(last - first for first, last in ranges) - min(last - first for first, last in ranges) <= 1


@pytest.mark.compiled
@pytest.mark.parametrize(("number", "count", "parts"), [(1, 100, 1), (2, 100, 16), (2, 9, 9), (3, 100, 24)])
def test_parts_of_a_compiled_call(monkeypatch: pytest.MonkeyPatch, number: int, count: int, parts: int):
    """Eight for each thread."""
    use_compiled(monkeypatch, True)
    given: list[Any] = []
    made = cpu.turns_of
    monkeypatch.setattr(cpu, "turns_of", lambda *numbers: given.append(numbers) or made(*numbers))
    monkeypatch.setattr(cpu, "share", lambda work, tasks, threads, settled: given.append((tasks, threads)))
    cn.set_num_threads(number)
    call = saved_of((1, 1, 2**20), (2**20, 2**20, 1))
    cpu._choose(call, [call.x] * 2).share("step", count)
    assert given == [(count, parts, number), (parts, number)]


@pytest.mark.parametrize(("shape", "lanes", "elements"), [
    ((1, 2, 511), False, 8192), ((1, 2, 512), False, 16), ((2, 511, 700), True, 8192), ((2, 512, 7), True, 16),
    ((1, 1, 2**22), False, 16),
])  # fmt: skip
def test_buffer_and_scratch(shape: tuple[int, ...], lanes: bool, elements: int):
    """From 512 numbers in a row on a ufunc reads a number for all of them where it is; it would copy it else."""
    before = np.getbufsize()
    cn.set_num_threads(1)
    for activation, rooms in ((None, 3), ("relu", 4), ("leaky_relu", 4), ("silu", 6), ("gelu", 6)):
        work = on_numpy(shape, lanes=lanes, activation=activation)
        seen: list[Any] = []
        work.work(lambda i, scratch: seen.append((i, scratch.shape, np.getbufsize())), iter([(3, 5), (7, 8)]))  # noqa: B023
        room = min(math.prod(shape), 2**19)
        assert seen == [(i, (rooms, room), elements) for i in (3, 4, 7)]
        assert np.getbufsize() == before


@pytest.mark.parametrize(("shape", "lanes", "number", "blocks", "tiles", "room"), [
    ((1, 1, 2**19), False, 1, 1, 1, 2**19),  # 2 MiB of float32
    ((1, 1, 2**19 + 1), False, 1, 1, 2, 2**19),
    ((1, 1, 2**19 + 1), False, 2, 1, 2, 2**19),
    ((4, 4, 2**17), False, 1, 4, 1, 2**19),
    ((4, 4, 2**17), False, 2, 2, 1, 2**20),  # twice as much for each of several threads
    ((4, 4, 2**18), False, 2, 4, 1, 2**20),
    ((1, 4, 2**18), False, 2, 2, 1, 2**20),  # a sample each would leave one without
    ((3, 4, 2**18), False, 2, 3, 1, 2**20),
    ((3, 5, 2**18), False, 2, 6, 1, 2**20),
    ((3, 10, 2**18), False, 2, 12, 1, 2**20),
    ((2, 9, 2**18), False, 4, 8, 1, 2**20),  # 3 of each sample would leave a thread with fewer
    ((2, 5, 2**18), False, 4, 4, 1, 2**20),
    ((4, 8, 2**16), True, 1, 4, 1, 2**19),
    ((4, 9, 2**16), True, 1, 4, 2, 2**19),
    ((1, 2**19 + 1, 3), True, 1, 1, 3, 2**19 + 1),  # not fewer than all channels of a position
])  # fmt: skip
def test_blocks_of_a_call(shape: tuple[int, ...], lanes: bool, number: int, blocks: int, tiles: int, room: int):
    cn.set_num_threads(number)
    work = on_numpy(shape, lanes=lanes)
    assert (work.lanes, work.blocks, work.tiles, work.room) == (lanes, blocks, tiles, room)


@pytest.mark.parametrize(("shape", "steps", "lanes"), [
    ((2, 3, 4, 5), (60, 20, 5, 1), False),
    ((2, 3, 4, 5), (60, 1, 15, 3), True),
    ((2, 2, 4, 5), (40, 1, 10, 2), True),
    ((2, 3, 4, 5), (99, 1, 20, 4), True),  # with gaps
    ((2, 1, 4, 5), (40, 1, 10, 2), False),
    ((2, 3, 4, 5), (120, 40, 10, 2), False),  # every second column
    ((2, 3, 4, 5), (60, 20, 1, 4), False),  # transposed
    ((2, 3, 1, 1), (3, 1, 1, 1), False),
])  # fmt: skip
def test_where_channels_lie_side_by_side(shape: tuple[int, ...], steps: tuple[int, ...], lanes: bool):
    call = saved_of(shape, steps)
    work = cpu._Interpreted(call, [call.x] * 2)
    assert work.lanes == lanes


@pytest.mark.parametrize(("size", "rows"), [
    (513, (171, 3)), (1024, (512, 2)), (1575, (315, 5)), (35 * 45 * 512, (512, 1575)), (1009, (512, 1)),
    (129 * 521, (129, 521)), (128 * 521, (512, 130)), (2**22 + 1, (397, 10565)),
])  # fmt: skip
def test_rows_divide_a_plane_where_they_can(size: int, rows: tuple[int, int]):
    """In the longest of more than 128 elements, or else in ones of 512 and a rest."""
    divisors = [length for length in range(129, 513) if size % length == 0]
    length = max(divisors, default=512)
    assert cpu._rows(size) == rows == (length, size // length)


@pytest.mark.parametrize(("size", "far"), [(128, 1.0), (129, 2.0)])
@pytest.mark.parametrize("lanes", [False, True])
def test_from_how_large_a_mean_on_planes_are_centred(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: int, far: float, lanes: bool
):
    """Those that need it, by themselves where they are a quarter of all or fewer."""
    counted: list[tuple[int, int]] = []
    made = cpu._Interpreted._sums

    def sums(self: Any, block: np.ndarray) -> np.ndarray:
        counted.append(block.shape[:2])
        return made(self, block)

    monkeypatch.setattr(cpu._Interpreted, "_sums", sums)
    use_compiled(monkeypatch, False)
    cn.set_num_threads(1)
    z = rng.standard_normal((2, 8, size))
    z = (z - z.mean(2, keepdims=True)) / z.std(2, keepdims=True)
    for distance, moved, again in (
        (0.97, 16, None), (1.03, 16, (2, 8)), (1.03, 4, (1, 4)), (1.03, 5, (2, 8)), (1.03, 1, (1, 1)),
    ):  # fmt: skip
        offset = np.zeros(16)
        offset[rng.permutation(16)[:moved]] = rng.choice([-1, 1]) * distance * far
        x = (z + offset.reshape(2, 8, 1)).astype(np.float32)
        if lanes:
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        counted.clear()
        cn.instance_norm(x)
        print(size, distance, moved)
        passes = [(2, 8)] if again is None else [(2, 8), (2, 8) if lanes else again]
        assert counted == [planes for planes in passes for _ in range(1 + lanes)]  # of lanes squares too


@pytest.mark.parametrize(
    ("size", "planes"), [(1, 64), (16, 64), (64, 64), (65, 63), (128, 32), (241, 16), (512, 8), (1024, 4), (2048, 4)]
)
def test_how_many_short_planes_are_done_together(size: int, planes: int):
    """At most 64, and 4096 elements of each array; 32 KB, which the first cache holds, also of the longest ones."""
    at_a_time = getattr(cpu._at_a_time, "py_func", cpu._at_a_time)
    assert at_a_time(size) == planes
    assert size <= cpu.FORWARD_SHORT
    assert 4 * cpu.FORWARD_SHORT * at_a_time(cpu.FORWARD_SHORT) <= 2**15


def test_no_more_elements_of_short_planes_are_summed_at_a_time_backward():
    """Their sums are made in computing precision at one go."""
    assert cpu.BACKWARD_SHORT <= cpu.PARTIAL


@pytest.mark.compiled
@pytest.mark.parametrize(("c", "plane", "group", "tiles"), [
    (8, 64, 8, 1), (300, 64, 256, 1), (300, 1024, 128, 1), (300, 1000, 128, 1), (300, 993, 128, 1), (300, 910, 144, 1),
    (300, 2**13, 16, 1), (300, 2**13 + 1, 16, 3), (300, 2**16, 16, 16), (8, 2**16, 8, 8), (2, 2**16, 2, 1),
])  # fmt: skip
def test_groups_of_channels(monkeypatch: pytest.MonkeyPatch, c: int, plane: int, group: int, tiles: int):
    """As many of 16 as have 131072 elements together, 256 at most; tiles of half of that where 16 have more."""
    use_compiled(monkeypatch, True)
    layout = layout_of((1, c, plane), lanes=True)
    assert (layout.group, layout.tiles, layout.blocks) == (group, tiles, -(-c // group))


def crop_of(runs: int, length: int) -> Any:
    """The layout of a plane of so many runs, each followed by an element of another array."""
    return layout_with((1, 1, runs, length), (runs * (length + 1), runs * (length + 1), length + 1, 1))


@pytest.mark.compiled
def test_which_results_go_past_the_caches(monkeypatch: pytest.MonkeyPatch):
    """Those of 24 MiB and more, in runs of 128 elements and more; none where channels lie side by side."""
    use_compiled(monkeypatch, True)
    assert [layout_of((1, 3, 2**21 - less)).streams for less in (0, 1)] == [True, False]
    assert not layout_of((1, 3, 2**21), dtype=np.float16).streams
    assert [crop_of(2**16, length).streams for length in (128, 127)] == [True, False]
    assert not layout_of((1, 64, 2**17), lanes=True).streams
    assert [layout_of(shape).shape[7] for shape in ((1, 3, 2**21), (1, 3, 2**20))] == [1, 0]


@pytest.mark.compiled
def test_how_many_pieces_a_plane_may_have(monkeypatch: pytest.MonkeyPatch):
    """65536; more are for NumPy, as are steps that are no whole elements."""
    use_compiled(monkeypatch, True)
    assert [crop_of(2**16 + more, 2).usable for more in (0, 1)] == [True, False]
    odd = ((96, 32, 8, 4), (96, 32, 8, 4)), ((96, 32, 8, 4), (98, 32, 8, 4))
    assert [cpu._Layout(np.dtype(np.float32), (2, 3, 4, 2), each, False).usable for each in odd] == [True, False]


@pytest.mark.compiled
def test_tiles_of_a_plane(monkeypatch: pytest.MonkeyPatch):
    """As many whole runs as have 65536 positions together, or so many positions of a run; a plane is a block."""
    use_compiled(monkeypatch, True)
    for layout, tiles, runs, length in (
        (layout_of((1, 2, 2**16)), 1, 1, 2**16),
        (layout_of((1, 2, 2**16 + 1)), 2, 1, 2**16),
        (crop_of(655, 100), 1, 655, 100),
        (crop_of(656, 100), 2, 655, 100),
        (crop_of(3, 70000), 6, 1, 2**16),
    ):
        assert (layout.tiles, *layout.shape[5:7]) == (tiles, runs, length)
        assert (layout.group, layout.blocks) == (1, layout.shape[0])


#: What loops know of planes of 5 runs of 40: in one tile; in tiles of 2 runs; of 16 and 8 positions, or 35 and 5.
TILED = [(1, 5, 40), (3, 2, 40), (15, 1, 16), (10, 1, 35)]


def guessed(tiled: tuple[int, int, int], tile: int, most: int) -> np.ndarray:
    """How often an element counts in the guess of a tile's mean, from 8 places of `most` elements at most: places are
    spread evenly over the runs, and over positions from the first to the last ones."""
    _, runs, length = tiled
    along = -(-40 // length)
    rows, positions = (tile // along) * runs, (tile % along) * length
    height, width = min(runs, 5 - rows), min(length, 40 - positions)
    size = min(width, most)
    counts = np.zeros((5, 40))
    for row, start in zip(np.arange(8) * height // 8, np.linspace(0, max(width - 8, 0), 8).astype(int), strict=True):
        counts[rows + row, positions + start : positions + start + size] += 1 / (8 * size)
    return counts


@pytest.mark.compiled
@pytest.mark.parametrize("tiled", TILED)
@pytest.mark.parametrize("stride", [1, 2])
def test_from_which_elements_a_mean_is_guessed(
    monkeypatch: pytest.MonkeyPatch, tiled: tuple[int, int, int], stride: int
):
    """A guess that is good saves a second pass; one that is bad changes no result."""
    use_compiled(monkeypatch, True)
    assert cpu.numba is not None
    guess = cpu.numba.njit(cpu._guess.py_func)
    shape = (1, 1, tiled[0], 5, 40, *tiled[1:], 0)
    runs = 45 * stride * np.arange(5)
    for tile in range(tiled[0]):
        counts = np.zeros((5, 40))
        for r, position in np.ndindex(5, 40):
            x = np.zeros(300 * stride, np.float32)
            x[7 + runs[r] + stride * position] = 1
            counts[r, position] = guess(x, 7, np.uint64(stride), runs, shape, tile, True if stride > 1 else None)
        np.testing.assert_allclose(counts, guessed(tiled, tile, 8), atol=1e-7)


@pytest.mark.compiled
@pytest.mark.parametrize("tiled", TILED)
def test_from_which_elements_means_of_channels_are_guessed(
    monkeypatch: pytest.MonkeyPatch, tiled: tuple[int, int, int]
):
    use_compiled(monkeypatch, True)
    assert cpu.numba is not None
    guess = cpu.numba.njit(cpu._guess_lanes.py_func)
    shape = (6, 4, tiled[0], 5, 40, *tiled[1:], 0)  # two of six channels, groups of four
    runs = 6 * 45 * np.arange(5)
    for tile in range(tiled[0]):
        counts = np.zeros((5, 40, 2))
        for r, position, j in np.ndindex(5, 40, 2):
            x, mean = np.zeros(6 * 300, np.float32), np.full(4, np.nan)
            x[4 + runs[r] + 6 * position + j] = 1
            guess(x, 4, np.uint64(6), runs, shape, tile, np.uint64(2), mean)
            counts[r, position, j] = mean[j]
        np.testing.assert_allclose(counts, guessed(tiled, tile, 1)[:, :, None].repeat(2, 2), atol=1e-7)
