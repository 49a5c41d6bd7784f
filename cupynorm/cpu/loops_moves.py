"""The compiled loops that copy boxes of planes to windows and back, and call a step on the windows.

A move copies a box: move(source, target, axes), with axes (size, source step, target step). The last two axes are the
rows and the elements of a row; all other axes come before.

NumPy's own copies loop over the axis with the smallest stride of the target, which for results of three channels side
by side makes inner loops of three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from . import llvm_machine
from .llvm import INT, INT16, INT32, MEMORY, Code, Memory, Module, Value, least, most, where
from .loops_places import ARRAYS, CALL, GEOMETRY, RESULTS

ELEMENTS = {2: INT16, 4: INT32, 8: INT}  # by size in bytes
AT_A_TIME = 4096  # interleaved rows are copied in parts that span so many elements
BOXES = "table", "planes", "sizes", "strides", "moves", "axes", "columns", "rank"


class Axis(NamedTuple):
    size: Value
    source: Value  # step
    target: Value


def _axis(axes: Memory, number: Any) -> Axis:
    return Axis(*(axes.load(number * 3 + i) for i in range(3)))


@contextmanager
def _each_box(
    code: Code, source: Memory, target: Memory, axes: Memory, outer: Value
) -> Iterator[tuple[Memory, Memory, Axis, Axis]]:
    """Go through the two-dimensional boxes of rows: source, target, rows and the elements of a row."""
    number = code.variable(code.integer(1))
    with code.loop(0, outer) as axis:
        number.set(number.get() * _axis(axes, axis).size)
    inner = axes.at(outer * 3)
    rows, along = _axis(inner, 0), _axis(inner, 1)
    with code.loop(0, number.get()) as box:
        rest, o, p = code.variable(box), code.variable(code.integer(0)), code.variable(code.integer(0))
        with code.loop(0, outer) as i:
            further = _axis(axes, outer - 1 - i)
            at = rest.get() % further.size
            rest.set(rest.get() // further.size)
            o.add(at * further.source)
            p.add(at * further.target)
        yield source.at(o.get()), target.at(p.get()), rows, along


def _in_vectors(code: Code, size: Value, lanes: int, one: Callable[[Value, int], None]) -> None:
    """Copy a row by one(i, lanes), the last vector overlapping the one before it; short rows by one(i, 0)."""
    with code.choice(size >= lanes) as (long, short):
        with long, code.loop(0, size, lanes) as i:
            one(least(i, size - lanes), lanes)
        with short, code.loop(0, size) as i:
            one(i, 0)


def _move(module: Module, itemsize: int) -> None:
    """Write a move for any steps."""
    kind, lanes = ELEMENTS[itemsize], 32 // itemsize
    reverse = list(range(lanes))[::-1]
    with module.function("move", MEMORY, MEMORY, MEMORY, INT, exported=True) as (code, source, target, axes, outer):
        boxes = _each_box(code, source.of(kind), target.of(kind), axes.of(INT), outer)
        with boxes as (a, b, rows, along):

            def contiguous(a: Memory, b: Memory, i: Value, lanes: int) -> None:
                b.store(i, a.load(i, lanes))

            def from_reversed(a: Memory, b: Memory, i: Value, lanes: int) -> None:
                value = a.load(-i - max(lanes - 1, 0), lanes)
                b.store(i, value.shuffled(value, reverse) if lanes else value)

            def to_reversed(a: Memory, b: Memory, i: Value, lanes: int) -> None:
                value = a.load(i, lanes)
                b.store(-i - max(lanes - 1, 0), value.shuffled(value, reverse) if lanes else value)

            def in_rows(one: Callable[[Memory, Memory, Value, int], None]) -> None:
                with code.loop(0, rows.size) as row:
                    _in_vectors(code, along.size, lanes, partial(one, a.at(row * rows.source), b.at(row * rows.target)))

            j, k = along.source, along.target
            with code.choice((j == 1) & (k == 1)) as (plain, strided):
                with plain:
                    in_rows(contiguous)
                with strided, code.choice((j == -1) & (k == 1)) as (reads_back, other):
                    with reads_back:
                        in_rows(from_reversed)
                    with other, code.choice((j == 1) & (k == -1)) as (writes_back, steps):
                        with writes_back:
                            in_rows(to_reversed)
                        with steps:
                            _strided(code, a, b, rows, along)


def _strided(code: Code, a: Memory, b: Memory, rows: Axis, along: Axis) -> None:
    """Copy rows element by element; interleaved rows in parts that the cache holds."""
    j, k = along.source, along.target
    size_j, size_k, of_rows_j, of_rows_k = (most(step, -step) for step in (j, k, rows.source, rows.target))
    interleaved = (of_rows_j < size_j) | (of_rows_k < size_k)
    chunk = where(interleaved, most(code.integer(AT_A_TIME) // most(most(size_j, size_k), 1), 16), along.size)
    begin = code.variable(code.integer(0))
    with code.forever():
        lo = begin.get()
        code.leave_if(lo >= along.size)
        hi = least(lo + chunk, along.size)
        with code.loop(0, rows.size) as row:
            at, to = a.at(row * rows.source), b.at(row * rows.target)
            with code.loop(lo, hi) as i:
                to.store(i * k, at.load(i * j))
        begin.set(hi)


def transposed_block(rows: list[Value], width: int = 1, size: int = 0) -> list[Value]:
    """Return the columns of a square block, or of several side by side, by interleaving pairs of rows.

    width: the numbers that are taken of either row in turn. size: of a square, if that is not the number of rows.
    """
    size, lanes = size or len(rows), rows[0].lanes
    if width == size:
        return rows
    pairs = []
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        halves: list[list[int]] = [[], []]  # of each square's rows
        for lane in range(0, lanes, width):
            halves[2 * (lane % size) // size] += [
                *range(lane, lane + width),
                *range(lanes + lane, lanes + lane + width),
            ]
        pairs.append([a.shuffled(b, half) for half in halves])
    return [column for half in zip(*pairs, strict=True) for column in transposed_block([*half], 2 * width, size)]


def _transpose(module: Module, itemsize: int, block: int) -> None:
    """Write a move for rows that are adjacent in the source or the target, by square blocks. The last may overlap."""
    kind = ELEMENTS[itemsize]
    with module.function("move", MEMORY, MEMORY, MEMORY, INT, exported=True) as (code, source, target, axes, outer):
        boxes = _each_box(code, source.of(kind), target.of(kind), axes.of(INT), outer)
        with boxes as (a, b, rows, along):
            apart, width = most(rows.source, along.source), most(rows.target, along.target)  # the other ones are 1
            chunk = most(code.integer(AT_A_TIME) // most(along.source, along.target), block)
            begin = code.variable(code.integer(0))
            with code.forever():
                lo = begin.get()
                code.leave_if(lo >= along.size)
                hi = least(lo + chunk, along.size)
                with code.loop(0, rows.size, block) as first, code.loop(lo, hi, block) as at:
                    row, i = least(first, rows.size - block), least(at, along.size - block)
                    from_, to = a.at(row * rows.source + i * along.source), b.at(row * rows.target + i * along.target)
                    columns = transposed_block([from_.load(apart * number, block) for number in range(block)])
                    for number, column in enumerate(columns):
                        to.store(width * number, column)
                begin.set(hi)


def _interleaved(module: Module, itemsize: int, number: int, apart: bool) -> None:
    """Write a move for `number` rows that are interleaved, with nothing between: in the source (apart), or target."""
    kind, lanes = ELEMENTS[itemsize], 32 // itemsize
    with module.function("move", MEMORY, MEMORY, MEMORY, INT, exported=True) as (code, source, target, axes, outer):
        boxes = _each_box(code, source.of(kind), target.of(kind), axes.of(INT), outer)
        with boxes as (a, b, rows, along):

            def take_apart(i: Value, lanes: int) -> None:
                value = a.load(i * number, lanes * number)
                for row in range(number):
                    part = value.shuffled(value, [lane * number + row for lane in range(lanes)]) if lanes else None
                    b.at(rows.target * row).store(i, a.load(i * number + row) if part is None else part)

            def put_together(i: Value, lanes: int) -> None:
                parts = [a.at(rows.source * row).load(i, lanes) for row in range(number)]
                if not lanes:
                    for row, part in enumerate(parts):
                        b.store(i * number + row, part)
                    return
                # A shuffle takes two vectors: join as many as hold all lanes.
                wide = [parts[0].shuffled(parts[1], range(2 * lanes))]
                wide += [parts[2].shuffled(parts[2], [*range(lanes), *range(lanes)])] if number > 2 else [wide[0]]
                order = [row * lanes + lane for lane in range(lanes) for row in range(number)]
                b.store(i * number, wide[0].shuffled(wide[1], order))

            _in_vectors(code, along.size, lanes, take_apart if apart else put_together)


def _write_move(module: Module, what: str, itemsize: int) -> None:
    name, *number = what.split()
    if name == "move":
        _move(module, itemsize)
    elif name == "transpose":
        _transpose(module, itemsize, int(number[0]))
    else:
        _interleaved(module, itemsize, int(number[0]), name == "apart")


_addresses: dict[tuple[str, int], int] = {}


def address_of_move(what: str, itemsize: int) -> int:
    """Return the address of a move: "move", "transpose BLOCK", "apart ROWS" or "together ROWS"."""
    found = _addresses.get((what, itemsize))
    if found is None:
        kind = f"moves {what}, {itemsize} bytes"
        (found,) = llvm_machine.compiled(kind, lambda module: _write_move(module, what, itemsize), ("move",))
        _addresses[what, itemsize] = found
    return found


def _copied(code: Code, words: Memory, count: int) -> Memory:
    """Return a copy of a call's numbers, or of a geometry's, on the stack."""
    copy = code.room(INT, count)
    for i in range(count):
        copy.store(i, words.load(i))
    return copy


def go_through(module: Module, each_task: Callable[..., None]) -> None:
    """Write a function that a thread calls: it takes boxes, copies them to windows, does a step there, copies back.

    step: address of a step on planes. call: the numbers of the call on the whole arrays; the step gets those of a box.
    boxes: numbers in the order of BOXES. buffer: address of the windows, one for each array that is copied, each of
    `window` bytes. reads: how many arrays the step reads, the first ones except the results. writes: whether it writes
    these.
    """
    names = list(CALL)
    with module.function(
        "go_through", INT, MEMORY, MEMORY, INT, INT, MEMORY, INT, INT, INT, INT, INT, exported=True
    ) as (code, step, call, queue, worker, threads, boxes, buffer, window, itemsize, reads, writes):
        given = call.of(INT)
        words = {name: boxes.of(INT).load(i) for i, name in enumerate(BOXES)}
        table, planes, sizes, strides, moves, axes = (code.memory(words[name], INT) for name in BOXES[:6])
        rank = words["rank"]
        geometry = code.memory(given.load(names.index("geometry")), INT)
        inner_geometry = _copied(code, geometry, len(GEOMETRY))
        inner = _copied(code, given, len(CALL))
        inner.store(names.index("geometry"), inner_geometry.address())
        inner.store(names.index("streams"), 0)
        inner_geometry.store(GEOMETRY.index("tiles"), 1)
        channels, sums = (geometry.load(GEOMETRY.index(name)) for name in ("channels", "sums"))
        next_window = code.variable(buffer)
        windows, addresses = code.room(INT, len(ARRAYS)), code.room(INT, len(ARRAYS))
        arrays = [code.memory(given.load(names.index(name)), INT).load(0) for name in ARRAYS]
        for i, name in enumerate(ARRAYS):
            moved = moves.load(i * 2) != 0
            windows.store(i, where(moved, next_window.get(), arrays[i]))
            next_window.add(where(moved, window, 0))
            inner.store(names.index(name), addresses.at(i).address())

        def copy(box: Value, kind: Value, i: int, back: bool) -> None:
            at = (kind * len(ARRAYS) + i) * 2 + int(back)
            move = moves.load(at)
            with code.when(move != 0):
                there = arrays[i] + table.load(box * words["columns"] + (4 + i)) * itemsize
                pair = code.memory(there, INT), code.memory(windows.load(i), INT)
                code.call(move, *(pair[::-1] if back else pair), axes.at(at * rank * 3), rank - 2)

        def work(first: Value, last: Value) -> None:
            with code.loop(first, last) as box:
                row = table.at(box * words["columns"])
                first_plane, tile, kind, begins = (row.load(i) for i in range(4))
                for i in range(len(ARRAYS)):
                    if i not in RESULTS:
                        with code.when(reads > i):
                            copy(box, kind, i, False)
                size = sizes.load(kind)
                # A block is one plane of contiguous elements, or one tile of it, which is one tile and run.
                for name, value in (("length", size), ("tile_length", size), ("sums", sums * tile)):
                    inner_geometry.store(GEOMETRY.index(name), value)
                for i, array in enumerate(ARRAYS):
                    for axis, letter in enumerate("ncp"):
                        value = strides.load((kind * len(ARRAYS) + i) * 3 + axis)
                        inner_geometry.store(GEOMETRY.index(f"{array}_{letter}"), value)
                count = planes.load(kind * 2 + 1)
                with code.loop(0, planes.load(kind * 2)) as part:
                    begin = first_plane + part * channels
                    for i in range(len(ARRAYS)):
                        moved = moves.load((kind * len(ARRAYS) + i) * 2) != 0
                        further = where(moved, (part * count - begin) * size, begins)
                        addresses.store(i, windows.load(i) + further * itemsize)
                    code.call(step, inner, begin, begin + count, 0)
                for i in RESULTS:
                    with code.when(writes != 0):
                        copy(box, kind, i, True)

        each_task(code, queue, worker, threads, work)
