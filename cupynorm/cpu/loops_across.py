"""The compiled loops for the shortest planes: a vector holds one position of several planes.

So all of the work per plane is done for several planes at once. Planes lie in one piece each; they are transposed into
buffers, and results back. The step `short` does the whole forward, or the whole backward, of planes. In the forward it
leaves planes whose squares are outside float32's range to the step `whole`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from .llvm import INT, Memory, Module, Value, fused, least, vector, where
from .loops_activations import activate, times_slope
from .loops_backward import slope_and_constant
from .loops_forward import STEP, eps_of, guess_of, rstd_of
from .loops_moves import transposed_block
from .loops_places import AHEAD, ARRAYS, RESULTS, Coefficients, Kind, Numbers, Planes, coefficients

LONGEST = 64  # elements; longer planes are as fast with vectors of their own
LONGEST_PLAIN = 32  # the same with an activation that takes little time, or none
PLANES = 16  # of a vector
BLOCK = 8  # positions that are transposed together
ROOM = (LONGEST + 1) * PLANES  # elements of a buffer: not 4 KB, since loads would wait for stores 4 KB away


class Group(NamedTuple):
    """Planes that are processed together; at the end, where there are fewer, the last one stands for missing ones."""

    start: Value
    number: Value
    places: dict[str, Memory]  # of each array, the address of each plane
    weight: Value
    bias: Value


@contextmanager
def _each_group(numbers: Numbers, first: Value, last: Value, names: Sequence[str]) -> Iterator[Group]:
    """Go through groups of planes. names: arrays whose addresses are wanted."""
    code, planes, computing = numbers.code, Planes(numbers), numbers.kind.element.computing
    places = {name: code.room(INT, PLANES) for name in names}
    given = {name: code.room(computing, PLANES) for name in ("weight", "bias")}
    n = code.variable(first // numbers.channels)
    c = code.variable(first - n.get() * numbers.channels)
    at = {
        name: code.variable(numbers.array(name).at(numbers.start(name, n.get(), c.get())).address()) for name in names
    }
    steps = {
        name: tuple(getattr(numbers, f"{name}_{axis}") * numbers.kind.element_of(name).size for axis in "nc")
        for name in names
    }

    def prefetch(plane: Memory, name: str) -> None:
        """Prefetch what is written now, and what is read later: the hardware follows fewer rows at a time."""
        writes = ARRAYS.index(name) in RESULTS
        plane.prefetch(numbers.length - 1 if writes else numbers.length + AHEAD, writes=writes)

    with code.loop(first, last, PLANES) as start:
        number = least(last - start, PLANES)
        with code.loop(0, number) as j:
            for name, room in places.items():
                plane = code.memory(at[name].get(), numbers.kind.element_of(name).stored)
                prefetch(plane, name)
                room.store(j, plane.address())
                at[name].add(steps[name][1])
            for room, value in zip(given.values(), planes.parameters(n.get(), c.get()), strict=True):
                room.store(j, value)
            c.add(1)
            with code.when(c.get() >= numbers.channels):
                c.set(0)
                n.add(1)
                for name, (of_n, of_c) in steps.items():
                    at[name].add(of_n - numbers.channels * of_c)
        with code.loop(number, PLANES) as j:
            for room in (*places.values(), *given.values()):
                room.store(j, room.load(number - 1))
        yield Group(start, number, places, *(room.load(0, PLANES) for room in given.values()))


def _go_through(
    numbers: Numbers, name: str, group: Group, block: Callable[[list[Memory], Value, int], None],
    single: Callable[[Memory, Value, int], None],
) -> None:  # fmt: skip
    """Go through the group's planes of an array: by block(BLOCK planes, the first of BLOCK positions, the number of the
    first plane), the last block overlapping the one before it; planes too short for that by single(plane, position, the
    plane's number)."""
    code, size, stored = numbers.code, numbers.length, numbers.kind.element_of(name).stored
    for some in range(0, PLANES, BLOCK):
        rows = [code.memory(group.places[name].load(some + j), stored) for j in range(BLOCK)]
        if numbers.kind.lanes >= BLOCK:
            with code.loop(0, size, BLOCK) as first:
                block(rows, least(first, size - BLOCK), some)
        else:
            with code.loop(0, size) as position:
                for j, row in enumerate(rows, some):
                    single(row, position, j)


def _take(numbers: Numbers, name: str, group: Group, buffer: Memory) -> None:
    """Copy planes of an array to a buffer, in computing precision: position by position."""
    widen = numbers.kind.element_of(name).widen

    def block(rows: list[Memory], at: Value, some: int) -> None:
        for i, column in enumerate(transposed_block([row.load(at, BLOCK) for row in rows])):
            buffer.store((at + i) * PLANES + some, widen(column))

    def single(row: Memory, at: Value, j: int) -> None:
        buffer.store(at * PLANES + j, widen(row.load(at)))

    _go_through(numbers, name, group, block, single)


def _put(numbers: Numbers, name: str, group: Group, buffer: Memory) -> None:
    """Copy results from a buffer to the planes of an array."""
    narrow = numbers.kind.element.narrow

    def block(rows: list[Memory], at: Value, some: int) -> None:
        columns = [narrow(buffer.load((at + i) * PLANES + some, BLOCK)) for i in range(BLOCK)]
        for row, values in zip(rows, transposed_block(columns), strict=True):
            row.store(at, values)

    def single(row: Memory, at: Value, j: int) -> None:
        row.store(at, narrow(buffer.load(at * PLANES + j)))

    _go_through(numbers, name, group, block, single)


def _sums(numbers: Numbers, terms: Callable[[Value], Sequence[tuple[Value, Value | None]]]) -> list[Value]:
    """Add up positions, in computing precision. terms(i) are pairs: products, or with None single values."""
    code = numbers.code
    zero = code.number(vector(numbers.kind.element.computing, PLANES), 0)
    sums = [code.variable(zero) for _ in range(2)]
    with code.loop(0, numbers.length * PLANES, PLANES) as i:
        for each, (a, b) in zip(sums, terms(i), strict=False):
            each.set(each.get() + a if b is None else fused(a, b, each.get()))
    return [each.get() for each in sums]


def _store(numbers: Numbers, group: Group, skipped: Value | None = None, **values: Value) -> None:
    """Store numbers of the planes, except skipped ones, in the call's arrays of these names."""
    code, computing = numbers.code, numbers.kind.element.computing
    complete = group.number == PLANES
    if skipped is not None:
        complete = complete & ~skipped.any()
    with code.choice(complete) as (all_of_them, some):
        with all_of_them:
            for name, value in values.items():
                numbers.of_planes(name).store(group.start, value)
        with some:
            rooms = {name: code.room(computing, PLANES) for name in values}
            for name, value in values.items():
                rooms[name].store(0, value)
            flags = code.room(INT, PLANES)
            flags.store(0, code.number(vector(INT, PLANES), 0) if skipped is None else skipped.to(INT))
            with code.loop(0, group.number) as j, code.when(flags.load(j) == 0):
                for name in values:
                    numbers.of_planes(name).store(group.start + j, rooms[name].load(j))


def _mean(places: list[Value]) -> Value:
    """Return the mean of a power of two of values, added up pair by pair."""
    parts = [each * (1 / len(places)) for each in places]  # no overflow
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def across_forward(module: Module, kind: Kind) -> None:
    """Write the step `short` of the forward."""
    element, computing = kind.element, kind.element.computing
    with module.function("short", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        size = numbers.length
        slope = numbers.slope.to(computing).splat(PLANES)
        share, eps = 1 / size.to(computing), eps_of(numbers)
        lowest = (numbers.least * size.to(numbers.least.kind)).to(computing)
        buffer, added = (code.room(computing, ROOM) for _ in range(2))
        unwanted = code.room(element.stored, LONGEST)
        names = ("x", "result", "residual") if kind.residual else ("x", "result")
        with _each_group(numbers, first, last, names) as group:
            _take(numbers, "x", group, buffer)
            if kind.residual:
                _take(numbers, "residual", group, added)
            # Borders of images are often 0: guess the mean from the middle.
            near = min(kind.lanes, BLOCK)
            middle = (size - near) // 2
            places = [buffer.load((middle + i) * PLANES, PLANES) for i in range(near)]
            # In shorter planes an outlier costs no digits, and half of the places would often be a bad guess.
            guess = guess_of(places) if near == BLOCK else _mean(places)

            def centred(i: Value, guess: Value = guess) -> list[tuple[Value, Value | None]]:
                d = buffer.load(i, PLANES) - guess
                return [(d, None), (d, d)]

            total, sum_sq = _sums(numbers, centred)
            excess = total * share
            m2 = sum_sq - total * excess
            odd = ~((sum_sq * 0.5 >= total * excess) & (m2 >= lowest) & (sum_sq < math.inf) & (eps < math.inf))
            mean = guess + excess
            part = mean - guess  # the sum's rounding error is exact, by Knuth
            mean_lo = (guess - (mean - part)) + (excess - part)
            variance = where(m2 <= 0, 0, m2) * share
            rstd = rstd_of(numbers, variance)
            values, _ = coefficients(mean, mean_lo, rstd, group.weight, group.bias)
            with code.loop(0, size * PLANES, PLANES) as i:
                z = values.z(values.centred(buffer.load(i, PLANES)))
                if kind.residual:
                    z = z + added.load(i, PLANES)
                buffer.store(i, activate(z, kind.activation, slope))
            with code.when(odd.any(), likely=False):
                # Compute these planes otherwise, and put what is in the buffer elsewhere.
                flags = code.room(INT, PLANES)
                flags.store(0, odd.to(INT))
                with code.loop(0, group.number) as j, code.when(flags.load(j) != 0):
                    code.call(numbers.whole, call, group.start + j, group.start + j + 1, 0)
                with code.loop(0, PLANES) as j, code.when(flags.load(j) != 0):
                    group.places["result"].store(j, unwanted.address())
            _put(numbers, "result", group, buffer)
            _store(numbers, group, odd, mean=mean, mean_lo=mean_lo, rstd=rstd)
            with code.when(numbers.variance != 0):
                _store(numbers, group, odd, variance=variance)


def across_backward(module: Module, kind: Kind) -> None:
    """Write the step `short` of the backward."""
    computing = kind.element.computing
    with module.function("short", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        slope = numbers.slope.to(computing).splat(PLANES)
        count = numbers.plane.to(computing)
        names = ("x", "dy", "result", *(("residual", "dresidual") if kind.residual else ()))
        x, dy, added, other = (code.room(computing, ROOM) for _ in range(4))
        g = dy if kind.activation is None else other  # not in place: LLVM would store only some lanes, which is slow
        with _each_group(numbers, first, last, names) as group:
            _take(numbers, "x", group, x)
            _take(numbers, "dy", group, dy)
            if kind.residual:
                _take(numbers, "residual", group, added)
            mean, mean_lo, rstd = _load(numbers, group, "mean", "mean_lo", "rstd")
            values, r = coefficients(mean, mean_lo, rstd, group.weight, group.bias)

            def terms(i: Value, values: Coefficients = values) -> list[tuple[Value, Value | None]]:
                centred, gradient = values.centred(x.load(i, PLANES)), dy.load(i, PLANES)
                if kind.activation is not None:
                    z = values.z(centred)
                    if kind.residual:
                        z = z + added.load(i, PLANES)
                    gradient = times_slope(gradient, z, kind.activation, slope)
                    g.store(i, gradient)
                x.store(i, centred)
                return [(gradient, None), (gradient, centred)]

            total, dot = _sums(numbers, terms)
            dot = (dot - total * (mean_lo * values.unit)) * r
            if kind.residual:
                _put(numbers, "dresidual", group, g)
            slopes = _load(numbers, group, "slopes")[0] if kind.sloped else None
            further = slope_and_constant(count, values.unit, r, mean_lo, total, dot, slopes)
            with code.loop(0, numbers.length * PLANES, PLANES) as i:
                gradient = g.load(i, PLANES)
                if kind.training:
                    gradient = gradient + fused(x.load(i, PLANES), *further)
                g.store(i, gradient * values.scale * values.unit)
            _put(numbers, "result", group, g)
            _store(numbers, group, sum_g=total, sum_g_xhat=dot)


def _load(numbers: Numbers, group: Group, *names: str) -> list[Value]:
    """Return numbers of the planes, from the call's arrays of these names."""
    code, found = numbers.code, []
    for name in names:
        room = code.room(numbers.kind.element.computing, PLANES)
        with code.loop(0, PLANES) as j:
            room.store(j, numbers.of_planes(name).load(group.start + least(j, group.number - 1)))
        found.append(room.load(0, PLANES))
    return found
