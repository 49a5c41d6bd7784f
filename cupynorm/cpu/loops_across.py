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

from .llvm import INT, Memory, Module, Value, fused, joined, least, vector, where
from .loops_activations import activate, times_slope
from .loops_backward import slope_and_constant
from .loops_forward import STEP, eps_of, rstd_of
from .loops_moves import transposed_block
from .loops_places import ARRAYS, RESULTS, Coefficients, Kind, Numbers, Planes, coefficients

LONGEST = 64  # elements, with an activation that takes long; longer planes are as fast with vectors of their own
LONGEST_FORWARD, LONGEST_BACKWARD = 48, 32  # the same with another activation, or none
PLANES = 32  # of a vector: two or more registers, so that no operation waits for the one before it
BLOCK = 4  # positions that are transposed together: of float32, 16 bytes, which vectors are put together of
ROOM = (LONGEST + 1) * PLANES  # elements of a buffer: not 4 KB, since loads would wait for stores 4 KB away


class Group(NamedTuple):
    """Planes that are processed together; at the end, where there are fewer, the last one stands for missing ones."""

    start: Value
    number: Value
    places: dict[str, Memory]  # of each array, the address of each plane
    weight: Value
    bias: Value


@contextmanager
def _each_plane(numbers: Numbers, start: Value, number: Value) -> Iterator[tuple[Value, Value, Value]]:
    """Go through the lanes of a vector: the lane, and the sample and the channel of its plane."""
    code = numbers.code
    n = code.variable(start // numbers.channels)
    c = code.variable(start - n.get() * numbers.channels)
    with code.loop(0, PLANES) as j:
        yield j, n.get(), c.get()
        with code.when(j + 1 < number):
            c.add(1)
            with code.when(c.get() >= numbers.channels):
                c.set(0)
                n.add(1)


def _place(numbers: Numbers, places: dict[str, Memory], start: Value, number: Value) -> None:
    """Set the addresses of planes of each array, usually at even distances."""
    code = numbers.code
    evenly = code.integer(0) == 0
    for name in places:
        evenly = evenly & (getattr(numbers, f"{name}_n") == numbers.channels * getattr(numbers, f"{name}_c"))
    with code.choice(evenly) as (even, odd):
        with even:
            planes = least(code.numbers(INT, range(PLANES)), number - 1) + start
            for name, room in places.items():
                step = getattr(numbers, f"{name}_c") * numbers.kind.element_of(name).size
                room.store(0, planes * step + numbers.array(name).address())
        with odd, _each_plane(numbers, start, number) as (j, n, c):
            for name, room in places.items():
                room.store(j, numbers.array(name).at(numbers.start(name, n, c)).address())


def _parameter(planes: Planes, name: str, start: Value, number: Value) -> Value:
    """Return the weight or the bias of planes."""
    numbers, code, array = planes.numbers, planes.numbers.code, planes.arrays[name]
    of_n, of_c = (getattr(numbers, f"{name}_{axis}") for axis in "nc")
    found = code.variable(array.load(0).splat(PLANES))
    with code.when(of_c != 0):  # it is given
        n = start // numbers.channels
        c = start - n * numbers.channels
        with code.choice((number == PLANES) & (c + PLANES <= numbers.channels)) as (adjacent, apart):
            with adjacent:
                found.set(array.load(n * of_n + c, PLANES))
            with apart:
                room = code.room(numbers.kind.element.computing, PLANES)
                with _each_plane(numbers, start, number) as (j, n, c):
                    room.store(j, array.load(n * of_n + c))
                found.set(room.load(0, PLANES))
    return found.get()


@contextmanager
def _each_group(numbers: Numbers, first: Value, last: Value, names: Sequence[str]) -> Iterator[Group]:
    """Go through groups of planes. names: arrays whose addresses are wanted."""
    code, planes = numbers.code, Planes(numbers)
    places = {name: code.room(INT, PLANES) for name in names}
    with code.loop(first, last, PLANES) as start:
        number = least(last - start, PLANES)
        _place(numbers, places, start, number)
        # Prefetch what is written now, and what is read later: the hardware follows fewer rows at a time.
        with code.loop(0, number) as j:
            for name, room in places.items():
                writes = ARRAYS.index(name) in RESULTS
                plane = code.memory(room.load(j), numbers.kind.element_of(name).stored)
                plane.prefetch(numbers.length - 1 if writes else numbers.length + numbers.kind.ahead, writes=writes)
        yield Group(start, number, places, *(_parameter(planes, name, start, number) for name in ("weight", "bias")))


def _rows(numbers: Numbers, name: str, group: Group) -> list[Memory]:
    stored = numbers.kind.element_of(name).stored
    return [numbers.code.memory(group.places[name].load(j), stored) for j in range(PLANES)]


def _take(numbers: Numbers, name: str, group: Group, buffer: Memory) -> None:
    """Copy planes of an array to a buffer, in computing precision: position by position.

    A buffer is written and read by whole vectors: a load would wait for two stores that it is made of. The last block
    of positions overlaps the one before it.
    """
    code, size, widen = numbers.code, numbers.length, numbers.kind.element_of(name).widen
    rows = _rows(numbers, name, group)
    if numbers.kind.lanes < BLOCK:
        with code.loop(0, size) as at:
            for j, row in enumerate(rows):
                buffer.store(at * PLANES + j, widen(row.load(at)))
        return
    with code.loop(0, size, BLOCK) as first:
        at = least(first, size - BLOCK)
        vectors = [widen(joined([row.load(at, BLOCK) for row in rows[j::BLOCK]])) for j in range(BLOCK)]
        for i, column in enumerate(transposed_block(vectors)):
            buffer.store((at + i) * PLANES, column)


def _put(numbers: Numbers, name: str, group: Group, buffer: Memory) -> None:
    """Copy results from a buffer to the planes of an array."""
    code, size, narrow = numbers.code, numbers.length, numbers.kind.element.narrow
    rows = _rows(numbers, name, group)
    if numbers.kind.lanes < BLOCK:
        with code.loop(0, size) as at:
            for j, row in enumerate(rows):
                row.store(at, narrow(buffer.load(at * PLANES + j)))
        return
    with code.loop(0, size, BLOCK) as first:
        at = least(first, size - BLOCK)
        vectors = transposed_block([buffer.load((at + i) * PLANES, PLANES) for i in range(BLOCK)])
        for j, values in enumerate(map(narrow, vectors)):
            for i, row in enumerate(rows[j::BLOCK]):
                row.store(at, values.part(i * BLOCK, BLOCK))


def _sums(numbers: Numbers, number: int, terms: Callable[[Value], Sequence[tuple[Value, Value | None]]]) -> list[Value]:
    """Return sums over positions, in computing precision. terms(i) are pairs: products, or with None single values."""
    code = numbers.code
    zero = code.number(vector(numbers.kind.element.computing, PLANES), 0)
    sums = [code.variable(zero) for _ in range(number)]
    with code.loop(0, numbers.length * PLANES, PLANES) as i:
        for each, (a, b) in zip(sums, terms(i), strict=True):
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


def across_forward(module: Module, kind: Kind) -> None:
    """Write the step `short` of the forward."""
    element, computing = kind.element, kind.element.computing
    with module.function("short", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        size = numbers.length
        slope = numbers.slope.to(computing).splat(PLANES)
        share, eps = 1 / size.to(computing), eps_of(numbers)
        lowest = (numbers.least * size.to(numbers.least.kind)).to(computing)
        share_ = share.splat(PLANES)
        buffer, added = (code.room(computing, ROOM) for _ in range(2))
        unwanted = code.room(element.stored, LONGEST)
        names = ("x", "result", "residual") if kind.residual else ("x", "result")
        with _each_group(numbers, first, last, names) as group:
            _take(numbers, "x", group, buffer)
            if kind.residual:
                _take(numbers, "residual", group, added)
            # The mean, but for its rounding; exact if a plane is constant.
            base = buffer.load(0, PLANES)

            def beyond(i: Value, base: Value = base) -> list[tuple[Value, Value | None]]:
                return [(buffer.load(i, PLANES) - base, share_)]

            guess = base + _sums(numbers, 1, beyond)[0]

            def centred(i: Value, guess: Value = guess) -> list[tuple[Value, Value | None]]:
                d = buffer.load(i, PLANES) - guess
                return [(d, None), (d, d)]

            total, sum_sq = _sums(numbers, 2, centred)
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

            total, dot = _sums(numbers, 2, terms)
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
    code, computing = numbers.code, numbers.kind.element.computing
    found = [code.variable(code.number(vector(computing, PLANES), 0)) for _ in names]
    with code.choice(group.number == PLANES) as (complete, some):
        with complete:
            for variable, name in zip(found, names, strict=True):
                variable.set(numbers.of_planes(name).load(group.start, PLANES))
        with some:
            for variable, name in zip(found, names, strict=True):
                room = code.room(computing, PLANES)
                with code.loop(0, PLANES) as j:
                    room.store(j, numbers.of_planes(name).load(group.start + least(j, group.number - 1)))
                variable.set(room.load(0, PLANES))
    return [variable.get() for variable in found]
