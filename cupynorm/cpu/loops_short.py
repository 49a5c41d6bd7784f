"""The compiled loops for planes so short that the work per plane matters: it is done for many planes at a time.

Planes lie in one piece each, and have no fewer elements than a vector. The step `short` does the whole forward, or the
whole backward, of planes. In the forward it leaves odd planes to the step `whole`: those whose mean was guessed badly,
and those whose squares are outside float32's range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .llvm import INT, Memory, Module, Value, least, most, vector, where
from .loops_activations import activate
from .loops_backward import INPUTS, OUTPUTS, gradient_at, gradient_results, slope_and_constant
from .loops_forward import STEP, eps_of, guess_of, rstd_of
from .loops_places import (
    Coefficients,
    Kind,
    Numbers,
    Planes,
    Product,
    Table,
    added,
    coefficients,
    counted_lanes,
    counts_at,
    map_row,
    only,
    prefetch,
)

FORWARD_SHORT = 2048  # elements; up to so many, several planes are processed together
BACKWARD_SHORT = 512  # longer planes do not gain in the backward
TOGETHER = 64  # at most so many planes
CACHED = 8192  # bytes of planes together: the L1 cache holds them, their results, and what is prefetched


class Group(NamedTuple):
    """Planes that are processed together, numbered from `start` on: the table has their numbers."""

    start: Value
    number: Value
    table: Table


@contextmanager
def _each_group(numbers: Numbers, first: Value, last: Value, names: tuple[str, ...]) -> Iterator[Group]:
    """Go through groups of planes. The table has room for numbers of these names."""
    code, computing = numbers.code, numbers.kind.element.computing
    table = Table(code, computing, names, TOGETHER)
    for room in table.rooms.values():
        code.fill(room, TOGETHER, code.number(computing, 0))
    together = most(least(code.integer(CACHED // numbers.kind.element.size) // numbers.length, TOGETHER), 2)
    begin = code.variable(first)
    with code.forever():
        start = begin.get()
        code.leave_if(start >= last)
        count = least(last - start, together)
        yield Group(start, count, table)
        begin.set(start + count)


def _place_planes(planes: Planes, group: Group, names: tuple[str, ...]) -> dict[str, Memory]:
    """Return the offsets of the group's planes in each array, and set weights and biases in the table.

    The first ones are the table's scale, the second ones its intercept.
    """
    numbers, code = planes.numbers, planes.numbers.code
    offsets = {name: code.room(INT, TOGETHER) for name in names}
    n = code.variable(group.start // numbers.channels)
    c = code.variable(group.start - n.get() * numbers.channels)
    with code.loop(0, group.number) as j:
        for name in names:
            offsets[name].store(j, numbers.start(name, n.get(), c.get()))
        weight, bias = planes.parameters(n.get(), c.get())
        group.table.store(j, scale=weight, intercept=bias)
        c.add(1)
        with code.when(c.get() >= numbers.channels):
            c.set(0)
            n.add(1)
    return offsets


def _sums(numbers: Numbers, size: Value, number: int, terms: Callable[[Value], Sequence[Any]]) -> list[Value]:
    """Return sums over a plane, in computing precision. terms(i): the vectors at i."""
    code, kind = numbers.code, numbers.kind
    zero = code.number(vector(kind.element.computing, kind.lanes), 0)
    sums = [code.variable(zero) for _ in range(number)]
    rest = size % kind.lanes

    def add(i: Value, counted: Value | None = None) -> None:
        for each, term in zip(sums, terms(i), strict=True):
            each.set(added(each.get(), term if counted is None else only(counted, term)))

    with code.when(rest != 0):
        add(size - kind.lanes, counted_lanes(code, kind.lanes, rest))
    with code.loop(0, size - rest, kind.lanes) as i:
        add(i)
    return [each.get().sum() for each in sums]


def _guess(numbers: Numbers, row: Memory, mask: Memory | None, size: Value) -> Value:
    """Return a guess of a plane's mean. Borders of images are often 0: from the middle, unless there is a mask, which
    may leave it out."""
    code, kind, lanes = numbers.code, numbers.kind, numbers.kind.lanes
    if mask is None:
        part, middle = max(lanes // 4, 1), row.at((size - lanes) // 2)
        places = guess_of([kind.source.widen(middle.load(i, part)) for i in range(0, lanes, part)])
        return (places * (1 / part)).sum()  # no overflow
    total = number = code.number(vector(kind.element.computing, lanes), 0)
    for at in (code.integer(0), (size - lanes) // 2, size - lanes):
        counts = counts_at(kind, mask, at)
        total = total + where(counts, kind.source.widen(row.load(at, lanes)) * (1 / (3 * lanes)), 0)
        number = number + where(counts, number.constant(1), 0)
    return total.sum() * (3 * lanes / most(number.sum(), 1))


def short_forward(module: Module, kind: Kind) -> None:
    """Write the step `short` of the forward."""
    element, lanes, computing = kind.element, kind.lanes, kind.element.computing
    with module.function("short", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        size = numbers.length
        x, y, residual = (numbers.array(name) for name in ("x", "result", "residual"))
        slope = numbers.slope.to(computing).splat(lanes)
        count, eps = size.to(computing), eps_of(numbers)
        lowest = (numbers.least * size.to(numbers.least.kind)).to(computing)
        variances, counts_of_planes = numbers.of_planes("variance"), code.memory(numbers.count, INT)
        mask = numbers.array("mask") if kind.masked else None
        summed = ("total", "sum_sq", *(("counted",) if kind.masked else ()))
        names = (*Coefficients._fields, *summed, "mean_lo", "rstd", "nearest", "variance")
        arrays = ("x", "result", *(("residual",) if kind.residual else ()), *(("mask",) if kind.masked else ()))
        with _each_group(numbers, first, last, names) as group:
            table = group.table
            offsets = _place_planes(planes, group, arrays)
            with code.loop(0, group.number) as j:
                row, target = x.at(offsets["x"].load(j)), y.at(offsets["result"].load(j))
                mask_row = mask.at(offsets["mask"].load(j)) if mask is not None else None
                guess = _guess(numbers, row, mask_row, size)
                mean = guess.splat(lanes)

                def terms(
                    i: Value, row: Memory = row, mean: Value = mean, target: Memory = target,
                    mask_row: Memory | None = mask_row,
                ) -> list[Any]:  # fmt: skip
                    prefetch(kind, target, i, writes=True)
                    d = kind.source.widen(row.load(i, lanes)) - mean
                    if mask_row is None:
                        return [d, Product(d, d)]
                    counts = counts_at(kind, mask_row, i)
                    d = where(counts, d, 0)
                    return [d, Product(d, d), where(counts, d.constant(1), 0)]

                found = _sums(numbers, size, len(summed), terms)
                table.store(j, mean=guess, **dict(zip(summed, found, strict=True)))
            with code.loop(0, group.number, lanes) as j:
                guess, total, sum_sq, *counted = table.load(j, lanes, "mean", *summed)
                if counted:
                    count = most(counted[0], 1)
                excess = total / count
                m2 = sum_sq - total * excess
                large = m2 >= lowest  # with a mask, large enough for any number of positions
                if counted:
                    large = large | (counted[0] == 0)
                good = (sum_sq * 0.5 >= total * excess) & large & (sum_sq < math.inf) & (eps < math.inf)
                mean = guess + excess
                part = mean - guess  # the sum's rounding error is exact, by Knuth
                mean_lo = (guess - (mean - part)) + (excess - part)
                variance = divided = where(m2 <= 0, 0, m2) / count
                if counted:
                    rest = counted[0] - numbers.ddof.to(computing)
                    divided = variance * where(rest > 0, counted[0] / rest, 0)
                rstd = rstd_of(numbers, divided)
                if counted:
                    rstd = where(counted[0] > 0, rstd, 0)
                weight, bias = table.load(j, lanes, "scale", "intercept")
                values, _ = coefficients(mean, mean_lo, rstd, weight, bias)
                table.store(j, nearest=mean, mean_lo=mean_lo, rstd=where(good, rstd, -1), variance=variance)
                table.store(j, **values._asdict())
            with code.loop(0, group.number) as j:
                plane = group.start + j
                rstd = table.rooms["rstd"].load(j)
                with code.choice(rstd < 0) as (odd, usual):
                    with odd:
                        code.call(numbers.whole, call, plane, plane + 1, 0)
                    with usual:
                        planes.arrays["mean"].store(plane, table.rooms["nearest"].load(j))
                        planes.arrays["mean_lo"].store(plane, table.rooms["mean_lo"].load(j))
                        planes.arrays["rstd"].store(plane, rstd)
                        with code.when(numbers.variance != 0):
                            variances.store(plane, table.rooms["variance"].load(j))
                        if kind.masked:
                            counts_of_planes.store(plane, table.rooms["counted"].load(j).to(INT))
                        values = table.coefficients_of(j, lanes)
                        row, target = x.at(offsets["x"].load(j)), y.at(offsets["result"].load(j))
                        added_row = residual.at(offsets["residual"].load(j)) if kind.residual else None
                        mask_row = mask.at(offsets["mask"].load(j)) if mask is not None else None

                        def compute(
                            i: Value, row: Memory = row, target: Memory = target, values: Coefficients = values,
                            added_row: Memory | None = added_row, mask_row: Memory | None = mask_row,
                        ) -> list[tuple[Memory, Value]]:  # fmt: skip
                            prefetch(kind, row, i + kind.ahead)
                            z = values.z(values.centred(kind.source.widen(row.load(i, lanes))))
                            if added_row is not None:
                                z = z + element.widen(added_row.load(i, lanes))
                            z = activate(z, kind.activation, slope)
                            if mask_row is not None:
                                z = where(counts_at(kind, mask_row, i), z, 0)
                            return [(target, element.narrow(z))]

                        map_row(code, size, lanes, compute)


def short_backward(module: Module, kind: Kind) -> None:
    """Write the step `short` of the backward."""
    lanes, computing = kind.lanes, kind.element.computing
    with module.function("short", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        size = numbers.length
        arrays = ("x", "dy", "result", *(("residual", "dresidual") if kind.residual else ()))
        arrays += ("mask",) if kind.masked else ()
        memories = {name: numbers.array(name) for name in (*INPUTS, *OUTPUTS)}
        slope = numbers.slope.to(computing).splat(lanes)
        count = numbers.plane.to(computing)
        totals = [numbers.of_planes(name) for name in ("sum_g", "sum_g_xhat")]
        of_planes = {name: planes.arrays[name] for name in ("mean", "mean_lo", "rstd")}
        if kind.sloped:
            of_planes["slopes"] = numbers.of_planes("slopes")
        if kind.masked and kind.training:
            of_planes["count"] = numbers.of_planes("count")
        names = (*Coefficients._fields, *of_planes, "g", "g_xhat", "slope", "constant")
        with _each_group(numbers, first, last, names) as group:
            table = group.table
            offsets = _place_planes(planes, group, arrays)
            with code.loop(0, group.number) as j:
                for name, memory in of_planes.items():
                    table.rooms[name].store(j, memory.load(group.start + j))
            with code.loop(0, group.number, lanes) as j:
                given = table.load(j, lanes, "mean", "mean_lo", "rstd", "scale", "intercept")
                values, r = coefficients(*given)
                table.store(j, rstd=r, **values._asdict())

            def at(j: Value, offsets: dict[str, Memory] = offsets) -> dict[str, Memory]:
                return {name: memories[name].at(offset.load(j)) for name, offset in offsets.items()}

            with code.loop(0, group.number) as j:
                rows, values = at(j), table.coefficients_of(j, lanes)

                def terms(i: Value, rows: dict[str, Memory] = rows, values: Coefficients = values) -> list[Any]:
                    prefetch(kind, rows["x"], i + kind.ahead)
                    prefetch(kind, rows["dy"], i + kind.ahead)
                    g, centred = gradient_at(kind, rows, i, values, slope)
                    return [g, Product(g, centred)]

                total, dot = _sums(numbers, size, 2, terms)
                table.store(j, g=total, g_xhat=dot)
            with code.loop(0, group.number, lanes) as j:
                unit, mean_lo, r, total, dot = table.load(j, lanes, "unit", "mean_lo", "rstd", "g", "g_xhat")
                dot = (dot - total * (mean_lo * unit)) * r
                slopes = table.load(j, lanes, "slopes")[0] if kind.sloped else None
                if "count" in of_planes:
                    count = table.load(j, lanes, "count")[0]
                further = slope_and_constant(count, unit, r, mean_lo, total, dot, slopes)
                table.store(j, g_xhat=dot, slope=further[0], constant=further[1])
            with code.loop(0, group.number) as j:
                plane = group.start + j
                for memory, name in zip(totals, ("g", "g_xhat"), strict=True):
                    memory.store(plane, table.rooms[name].load(j))
                rows, values = at(j), table.coefficients_of(j, lanes)
                further = (table.rooms["slope"].load(j).splat(lanes), table.rooms["constant"].load(j).splat(lanes))

                def compute(
                    i: Value, rows: dict[str, Memory] = rows, values: Coefficients = values,
                    further: tuple[Value, Value] = further,
                ) -> list[tuple[Memory, Value]]:  # fmt: skip
                    return gradient_results(kind, rows, rows, i, values, further, slope)

                map_row(code, size, lanes, compute)
