"""Planes copied to windows: boxes hold every element once, and copies touch these elements and no others."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from helpers.compare import assert_equal, assert_within
from helpers.loops import numba_intrinsics, numba_moves, numba_path

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


STAND_INS: dict[str, Any] = {
    "_move": lambda *_: 1, "_side_by_side": lambda *_: lambda *_: 1, "_transposed": lambda _: lambda *_: 1,
}  # fmt: skip


def whole(view: np.ndarray) -> np.ndarray:
    """Return the array that owns a view's memory."""
    while isinstance(view.base, np.ndarray):
        view = view.base
    return view


def loops_of(windows: Any, axes: Any) -> list[Any]:
    """Return the loops that copy boxes of such axes to the window and back."""
    with pytest.MonkeyPatch.context() as patch:
        real = numba_moves._side_by_side, numba_moves._transposed, numba_moves._move
        used: list[Any] = []

        def noting(loop: Any) -> Any:
            return lambda *_: used.append(loop) or 0

        patch.setattr(numba_moves, "_side_by_side", lambda *rows: noting(real[0](*rows)))
        patch.setattr(numba_moves, "_transposed", lambda size: noting(real[1](size)))
        patch.setattr(numba_moves, "_move", noting(real[2]))
        windows._moves(0, *axes[-2:])
    return used


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
    monkeypatch.setattr(numba_moves, "FAIR", 64)
    for name in ("_move", "_side_by_side", "_transposed"):  # need not be compiled
        monkeypatch.setattr(numba_moves, name, STAND_INS[name])
    seen = {"tiles": 0, "in place": 0, "parts": 0, "windows": 0}
    for _ in range(300):
        monkeypatch.setattr(numba_moves, "WINDOW", int(np.exp2(rng.uniform(5, 12))))
        shape = shapes(rng)
        if math.prod(shape) > 2000:  # too slow
            continue
        dtype = np.dtype(rng.choice(["float16", "float32", "float64"]))
        layouts = [str(rng.choice(LAYOUTS[:-1])), *map(str, rng.choice(LAYOUTS, 2))]
        strides = Arrays(*(laid(rng, shape, layout, dtype).strides for layout in layouts))
        windows = numba_path.Layout(dtype, shape, strides).windows
        if windows is None:
            continue
        _, c, *spatial = windows.shape
        print(shape, layouts, numba_moves.WINDOW, windows.extents)
        boxes = windows.boxes(threads)
        given = len(layouts)
        assert not any(windows.moved[given:]) and not boxes.moves[:, given:].any()  # absent arrays
        assert windows.boxes(threads).table.tobytes() == boxes.table.tobytes()
        every = np.indices(windows.shape).reshape(len(windows.shape), -1)
        offsets = np.dot(windows.steps, every)  # of each element, in each array
        element = dict(zip(offsets[0].tolist(), range(math.prod(shape)), strict=True))
        held: list[int] = []
        of_tile: dict[int, list[int]] = {}
        for first, tile, kind, begins, *there in boxes.table.tolist():
            parts, count = boxes.planes[kind].tolist()
            size = int(boxes.sizes[kind])
            assert parts * count * size <= boxes.buffer_size - 64
            planes = np.concatenate([np.arange(count) + first + i * c for i in range(parts)])
            elements: Any = None
            for array, moved in enumerate(windows.moved[:given]):
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
    for name, loop in STAND_INS.items():
        monkeypatch.setattr(numba_moves, name, loop)
    for threads in (1, 2, 3, 5, 16):
        for n in range(8, 40):
            c, spatial = int(rng.integers(1, 130)), int(rng.integers(2, 40)) ** 2
            steps = [[1, spatial * n, n], [c * spatial, spatial, 1]]
            boxes = numba_moves.Windows(np.float32(0), [n, c, spatial], steps, [True, True]).boxes(threads)
            assert (boxes.planes.prod(1) * boxes.sizes).max() + 64 <= boxes.buffer_size, (n, c, spatial)


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.full), "float32",
                                   pytest.param("float64", marks=pytest.mark.full)])  # fmt: skip
def test_boxes_are_copied_to_windows_and_back(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str):
    """As NumPy copies them; nothing else is written, in the window or in the array."""
    monkeypatch.setattr(numba_moves, "CLOSE", 4)  # each step has a loop of its own to compile
    used: set[Any] = set()
    for _ in range(300):
        shape = shapes(rng)
        array = laid(rng, shape, str(rng.choice(LAYOUTS)), dtype)
        steps = [step // array.itemsize for step in array.strides]
        if steps[2:] == [math.prod(shape[axis + 1 :]) for axis in range(2, len(shape))]:
            continue  # contiguous planes
        windows = numba_moves.Windows(numba_intrinsics.SAMPLES[dtype], list(shape), [steps], [True])
        there, back = numba_moves._axes(list(shape), steps)
        gather, scatter = loops_of(windows, there)
        window = np.full(array.size + 128, -1, dtype)
        expected = array.copy()
        gather(numba_intrinsics.SAMPLES[dtype], array.ctypes.data, window[64:].ctypes.data, np.array(there))
        assert_equal(window[64:-64].reshape(shape), expected)
        assert (window[:64] == -1).all() and (window[-64:] == -1).all()
        used.add(gather)
        if array.flags.writeable:
            memory = whole(array)
            before = memory.copy()
            window[64:-64] += 1
            scatter(numba_intrinsics.SAMPLES[dtype], window[64:].ctypes.data, array.ctypes.data, np.array(back))
            assert_equal(array, window[64:-64].reshape(shape))
            array[...] = expected
            assert_equal(memory, before)
    assert {
        numba_moves._move,
        numba_moves._transposed(4),
        *([] if dtype == "float64" else [numba_moves._transposed(8)]),
    } < used


@pytest.mark.parametrize("threads", [1, 2])
def test_results_have_the_bits_of_contiguous_planes(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, threads: int
):
    """If planes are moved whole, and positions have the same order. (Planes of long runs are summed run by run, tiled
    ones tile by tile.) Nothing but the result is written."""
    monkeypatch.setattr(numba_path, "PAYS", 1)
    monkeypatch.setattr(numba_moves, "FAIR", 64)
    monkeypatch.setattr(numba_moves, "CLOSE", 4)
    monkeypatch.setattr(numba_path, "_layout", lru_cache(numba_path.Layout))
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
        windows = numba_path.Layout(x.dtype, shape, Arrays(x.strides, y.strides)).windows
        if windows is not None and not windows.boxes(threads).table[:, 1].any():  # no tile but the first
            moved += 1
            assert_equal(y, expected)
        assert_within(y, expected, 1e-5 * (1 + np.abs(expected)))
        y[...] = 0
        others = memory.copy()
        memory[:] = before
        y[...] = 0
        assert_equal(others, memory)
    assert moved > 20
