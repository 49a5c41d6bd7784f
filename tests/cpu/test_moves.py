"""Planes copied to windows: boxes hold every element once, and copies touch these elements and no others."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_equal, assert_same, assert_within
from helpers.loops import (
    forget_layouts,
    loops_moves,
    loops_path,
    loops_places,
    loops_tasks,
    python_step,
    windows,
)

import cupynorm as cn
from cupynorm.cpu.blocking import Arrays

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("threads_as_they_were")]

LAYOUTS = ("contiguous", "channels_last", "fortran", "any order", "reversed", "steps", "crop", "broadcast")


def laid(rng: np.random.Generator, shape: tuple[int, ...], layout: str, dtype: Any) -> np.ndarray:
    """Return an array of distinct numbers: a view in the middle of memory that must not be written otherwise."""
    order = {"contiguous": [*range(len(shape))], "channels_last": [0, *range(2, len(shape)), 1]}.get(layout)
    order = [*range(len(shape))][::-1] if layout == "fortran" else order or list(map(int, rng.permutation(len(shape))))
    around = [int(rng.integers(1, 4)) if layout in ("steps", "crop") else 0 for _ in shape]
    step = [int(rng.integers(1, 4)) if layout == "steps" else 1 for _ in shape]
    whole = [size * s + margin for size, s, margin in zip(shape, step, around, strict=True)]
    memory = np.zeros(math.prod(whole) + 128, dtype)
    memory[:] = np.arange(memory.size) % 60000
    array = memory[64:-64].reshape([whole[axis] for axis in order]).transpose(np.argsort(order))
    parts = zip(shape, step, around, strict=True)
    array = array[tuple(slice(margin // 2, margin // 2 + size * s, s) for size, s, margin in parts)]
    if layout == "reversed":
        array = array[tuple(slice(None, None, int(rng.choice([-1, 1]))) for _ in shape)]
    if layout == "broadcast":
        array = np.broadcast_to(array[:, :, :1], shape)
    assert array.shape == shape
    return array


def shapes(rng: np.random.Generator) -> tuple[int, ...]:
    shape = tuple(map(int, rng.integers(1, 6, rng.integers(3, 6)) ** rng.integers(1, 3)))
    return shape if rng.random() < 0.5 else (shape[0], int(rng.integers(1, 40)), *shape[2:])


def whole(view: np.ndarray) -> np.ndarray:
    """Return the array that owns a view's memory."""
    while isinstance(view.base, np.ndarray):
        view = view.base
    return view


def move_of(address: int) -> tuple[str, Callable[[int, int, Any], None]]:
    """Return the name of a move, and the move as a function of the addresses and the axes."""
    (what,) = (what for (what, _), known in loops_moves._addresses.items() if known == address)
    kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    function = ctypes.CFUNCTYPE(None, *kinds)(address)

    def move(source: int, target: int, axes: Any) -> None:
        numbers = np.array(axes)
        function(source, target, numbers.ctypes.data, len(numbers) - 2)

    return what, move


def reached(axes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of a box's elements in the array and in the window."""
    there, here = np.zeros((2, 1), int)
    for size, step, apart in axes.tolist():
        there = (there[:, None] + np.arange(size) * step).ravel()
        here = (here[:, None] + np.arange(size) * apart).ravel()
    return there, here


@pytest.mark.parametrize("threads", [1, 3])
def test_boxes_hold_every_element_once(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, threads: int):
    """The windows, and the arrays read in place, have the same elements in the same order."""
    monkeypatch.setattr(windows, "FAIR", 64)
    monkeypatch.setattr(windows, "address_of_move", lambda *_: 1)  # need not be compiled
    seen = {"tiles": 0, "in place": 0, "parts": 0, "windows": 0}
    for _ in range(300):
        monkeypatch.setattr(windows, "WINDOW", int(np.exp2(rng.uniform(5, 12))))
        shape = shapes(rng)
        if math.prod(shape) > 2000:  # too slow
            continue
        dtype = np.dtype(rng.choice(["float16", "float32", "float64"]))
        layouts = [str(rng.choice(LAYOUTS[:-1])), *map(str, rng.choice(LAYOUTS, 2))]
        strides = Arrays(*(laid(rng, shape, layout, dtype).strides for layout in layouts))
        layout = loops_path.Layout(dtype, shape, strides)
        cut = layout.windows
        if cut is None:
            continue
        _, c, *spatial = cut.shape
        print(shape, layouts, windows.WINDOW, cut.extents)
        boxes = cut.boxes(threads)
        assert layout.lanes <= boxes.sizes.min()
        given = len(layouts)
        assert not any(cut.moved[given:]) and not boxes.moves[:, given:].any()  # absent arrays
        assert cut.boxes(threads).table.tobytes() == boxes.table.tobytes()
        every = np.indices(cut.shape).reshape(len(cut.shape), -1)
        offsets = np.dot(cut.steps, every)  # of each element, in each array
        element = dict(zip(offsets[0].tolist(), range(math.prod(shape)), strict=True))
        held: list[int] = []
        of_tile: dict[int, list[int]] = {}
        for first, tile, kind, begins, *there in boxes.table.tolist():
            parts, count = boxes.planes[kind].tolist()
            size = int(boxes.sizes[kind])
            assert parts * count * size <= boxes.buffer_size - 64
            planes = np.concatenate([np.arange(count) + first + i * c for i in range(parts)])
            elements: Any = None
            for array, moved in enumerate(cut.moved[:given]):
                steps = boxes.strides[kind, array]
                if moved:
                    at, in_window = reached(boxes.axes[kind, array, 0])
                    box = np.full(parts * count * size, -1)
                    box[in_window] = there[array] + at
                    assert_equal(boxes.axes[kind, array, 1], boxes.axes[kind, array, 0][:, [0, 2, 1]])
                    assert_equal(steps, [c * size, size, 1])
                    assert boxes.moves[kind, array].all()
                else:
                    box = (planes // c * steps[0] + planes % c * steps[1])[:, None] + begins + np.arange(size)
                    assert steps[2] == 1 and not boxes.moves[kind, array].any()
                    seen["in place"] += 1
                if elements is None:
                    elements = np.array([element[offset] for offset in box.ravel().tolist()]).reshape(len(planes), size)
                    assert_equal(elements // math.prod(spatial), np.broadcast_to(planes[:, None], elements.shape))
                assert_equal(box.ravel(), offsets[array][elements.ravel()])
            assert_equal(elements % math.prod(spatial), np.broadcast_to(
                of_tile.setdefault(tile, (elements[0] % math.prod(spatial)).tolist()), elements.shape
            ))  # fmt: skip
            held += elements.ravel().tolist()
            seen["parts"] += parts > 1
        assert_equal(np.sort(held), np.arange(math.prod(shape)))
        seen["tiles"] += len(of_tile) > 1
        seen["windows"] += 1
    assert min(seen.values()) > 5, seen


def test_windows_hold_all_boxes(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Also for several threads, whose boxes have fewer elements, but may span more samples."""
    monkeypatch.setattr(windows, "address_of_move", lambda *_: 1)
    for threads in (1, 2, 3, 5, 16):
        for n in range(8, 40):
            c, spatial = int(rng.integers(1, 130)), int(rng.integers(2, 40)) ** 2
            steps = [[1, spatial * n, n], [c * spatial, spatial, 1]]
            boxes = windows.Windows(4, [n, c, spatial], steps, [True, True]).boxes(threads)
            assert (boxes.planes.prod(1) * boxes.sizes).max() + 64 <= boxes.buffer_size, (n, c, spatial)


def long_rows(rng: np.random.Generator) -> tuple[int, ...]:
    """Return a shape with so many elements in a row that interleaved ones are copied in parts."""
    return (1, int(rng.integers(2, 20)), int(rng.integers(2000, 4200)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_boxes_are_copied_to_windows_and_back(rng: np.random.Generator, dtype: str):
    """As NumPy copies them; nothing else is written, in the window or in the array."""
    used: set[str] = set()
    few = {f"{what} {number}" for what in ("apart", "together") for number in (2, 3)}
    every = {"move", "transpose 4", *few, *(["transpose 8"] if dtype != "float64" else [])}
    for i in range(3000):
        if i >= 320 and used == every:
            break
        shape = shapes(rng) if i % 16 else long_rows(rng)
        if math.prod(shape) > 10**5:  # too slow
            continue
        array = laid(rng, shape, str(rng.choice(LAYOUTS)), dtype)
        steps = [step // array.itemsize for step in array.strides]
        if steps[2:] == [math.prod(shape[axis + 1 :]) for axis in range(2, len(shape))]:
            continue  # contiguous planes
        cut = windows.Windows(array.itemsize, list(shape), [steps], [True])
        there, back = windows._axes(list(shape), steps)
        (what, gather), (what_back, scatter) = map(move_of, cut._moves(0, *there[-2:]))
        print(shape, steps, what, what_back)
        assert {what, what_back} <= {kind for kind, _ in cut.moves_of_any_size()}
        window = np.full(array.size + 128, -1, dtype)
        expected = array.copy()
        gather(array.ctypes.data, window[64:].ctypes.data, there)
        assert_same(window[64:-64].reshape(shape), expected)
        assert (window[:64] == -1).all() and (window[-64:] == -1).all()
        used |= {what, what_back}
        if array.flags.writeable:
            memory = whole(array)
            before = memory.copy()
            window[64:-64] += 1
            scatter(window[64:].ctypes.data, array.ctypes.data, back)
            assert_same(array, window[64:-64].reshape(shape))
            array[...] = expected
            assert_same(memory, before)
    assert used == every


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("reads", [1, 3, 5])
def test_a_step_gets_the_windows_of_each_plane_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, threads: int, reads: int, writes: bool
):
    """Windows hold the arrays that it reads. Only if it writes, the results are copied back."""
    monkeypatch.setattr(windows, "FAIR", 64)
    shape, order = (4, 5, 6, 7), (3, 1, 0, 2)
    memory = rng.standard_normal((5, 7, 5, 4, 6)).astype(np.float32)
    x, result, dy, residual, dresidual = (each.transpose(np.argsort(order)) for each in memory)
    arrays = Arrays(x, result, dy, residual, dresidual)
    before = [each.copy() for each in arrays[:-1]]  # there is no mask
    layout = loops_path.Layout(x.dtype, shape, Arrays(*(each.strides for each in arrays[:-1])))
    cut, boxes = layout.windows, layout.windows.boxes(threads)
    assert cut.moved == [True] * 5 + [False] and layout.tiles == 1 and (threads == 1 or len(boxes.table) > 1)
    names, call = list(loops_places.CALL), loops_places.FORMAT
    seen: list[int] = []
    failures: list[Exception] = []

    def check(numbers: int, first: int, last: int) -> None:
        given = dict(zip(names, call.unpack(ctypes.string_at(numbers, call.size)), strict=True))
        geometry = np.frombuffer(ctypes.string_at(given["geometry"], 8 * len(loops_places.GEOMETRY)), np.int64)
        inner = dict(zip(loops_places.GEOMETRY, geometry.tolist(), strict=True))
        assert [inner[name] for name in ("channels", "group", "tiles", "runs", "tile_runs")] == [5, 1, 1, 1, 1]
        assert inner["length"] == inner["tile_length"] == inner["plane"] == 42
        for plane in range(first, last):
            n, c = divmod(plane, 5)
            for i, (name, array) in enumerate(zip(Arrays._fields, before, strict=False)):
                address = ctypes.c_int64.from_address(given[name]).value
                at = address + 4 * (n * inner[f"{name}_n"] + c * inner[f"{name}_c"])
                window = np.frombuffer((ctypes.c_char * (4 * 42)).from_address(at), np.float32)
                if name in ("result", "dresidual"):
                    window[:] = plane + i
                else:  # in the order of memory
                    assert_equal(window, array[n, c].T.ravel() if i < reads else 0)

    def step(numbers: int, first: int, last: int, _: int) -> None:
        seen.extend(range(first, last))
        try:
            check(numbers, first, last)
        except Exception as failure:  # nothing in compiled code would raise it
            failures.append(failure)

    address, _keep = python_step(step)
    queue = loops_tasks.TaskQueue(len(boxes.table), len(boxes.table), threads)
    size = boxes.buffer_size * 4
    words = boxes.words()
    for worker in range(threads):
        buffer = np.zeros(5 * size + 64, np.uint8)
        start = -(-buffer.ctypes.data // 64) * 64
        numbers = call.pack(*(
            layout.geometry_address if name == "geometry" else
            loops_path.place_of(getattr(arrays, name)) if name in Arrays._fields else 0 for name in names
        ))  # fmt: skip
        loops_tasks.driver().go_through(
            address, numbers, queue.address, worker, threads, words.ctypes.data, start, size, 4, reads, writes
        )
    assert not failures, failures[0]
    assert sorted(seen) == [*range(20)]
    planes = np.arange(20).reshape(4, 5, 1, 1)
    for i, (array, was) in enumerate(zip(arrays, before, strict=False)):
        assert_equal(array, np.broadcast_to(planes + i, shape) if writes and i in (1, 4) else was)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_have_the_bits_of_contiguous_planes(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, threads: int
):
    """If planes are moved whole, and positions have the same order. (Planes of long runs are summed run by run, tiled
    ones tile by tile.) Nothing but the result is written."""
    monkeypatch.setattr(loops_path, "PAYS", 1)
    monkeypatch.setattr(windows, "FAIR", 64)
    forget_layouts(monkeypatch)
    cn.set_num_threads(threads)
    moved = 0
    for _ in range(150):
        shape = shapes(rng)
        x = laid(rng, shape, str(rng.choice(["steps", "crop", "reversed", "contiguous"])), "float32")
        y = laid(rng, shape, str(rng.choice(LAYOUTS[:-1])), "float32")
        order = sorted(range(2, x.ndim), key=lambda axis: -abs(x.strides[axis]))
        if math.prod(shape[2:]) == 1 or order != sorted(order):
            continue
        memory = whole(y)
        before = memory.copy()
        cn.instance_norm(x, out=y)
        expected = cn.instance_norm(np.ascontiguousarray(x))
        cut = loops_path.Layout(x.dtype, shape, Arrays(x.strides, y.strides)).windows
        if cut is not None and not cut.boxes(threads).table[:, 1].any():  # no tile but the first
            moved += 1
            assert_equal(y, expected)
        assert_within(y, expected, 1e-5 * (1 + np.abs(expected)))
        y[...] = 0
        others = memory.copy()
        memory[:] = before
        y[...] = 0
        assert_same(others, memory)
    assert moved > 20
