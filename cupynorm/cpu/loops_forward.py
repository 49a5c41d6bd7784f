"""The compiled loops of the forward.

Modules, each compiled when a call first needs it: `statistics` (the steps reduce and join) and `results` (the step
apply). Short planes have loops of their own, in loops_short and loops_across.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from .llvm import DOUBLE, INT, MEMORY, Code, Memory, Module, Value, element_of, fused, least, most, sqrt, vector, where
from .loops_activations import activate
from .loops_places import (
    LINE,
    PARTIAL,
    WIDEST_GROUP,
    Coefficients,
    Kind,
    Numbers,
    Planes,
    Product,
    Sums,
    Table,
    Tile,
    counts_at,
    each_channel,
    each_item,
    each_vector,
    map_row,
    prefetch_next,
    prefetcher,
    set_coefficients,
    sum_row,
    tile_of,
)

#: The arguments of a step: the address of the call's numbers, the first and the last item, and whether to prefetch:
#: for reduce the lines of the result, for apply x (and dy) of the next plane.
STEP = MEMORY, INT, INT, INT
GUESS_PLACES = 8  # a tile's mean is guessed from a vector at each of so many places
PARTIAL_CHANNELS = 64  # positions of channels side by side summed in computing precision


def _guess_place(i: int, tile: Tile, length: int) -> tuple[Value, Value]:
    """Return the run and the first position of the i-th place from which a tile's mean is guessed."""
    r = tile.r0 + (tile.r1 - tile.r0) * i // GUESS_PLACES
    return r, tile.l0 + (tile.length - length) * i // (GUESS_PLACES - 1)


def guess_of(places: list[Value]) -> Value:
    """Return a guess of the mean in each lane, from the numbers at some places.

    The largest and the smallest are left out. If one were an outlier, the guess would still be within the deviation,
    but all other elements would be far from it, and their sum would lose digits.
    """
    parts = [each * (1 / len(places)) for each in places]  # no overflow
    total = largest = smallest = parts[0]
    for part in parts[1:]:
        total, largest, smallest = total + part, most(largest, part), least(smallest, part)
    return (total - largest - smallest) * (len(parts) / (len(parts) - 2))


def _moments_float64(module: Module, kind: Kind) -> Any:
    """Write a function that stores mean, mean_lo and m2 of a tile of a plane or channel, computed in float64.

    It is the fallback for variances outside float32's range. count: of the elements, or of those in the mask, which
    begins at mask_offset and has mask_step between positions.
    """
    element = kind.element
    with module.function("moments_float64", MEMORY, INT, INT, INT, INT, INT, DOUBLE, MEMORY) as (
        code, call, offset, step, number, mask_offset, mask_step, count, found,
    ):  # fmt: skip
        numbers = Numbers(code, call, kind)
        mask, mask_runs = numbers.array("mask").at(mask_offset), numbers.runs_of("mask")
        x, runs, tile = numbers.array("x").at(offset), numbers.runs_of("x"), tile_of(numbers, number)
        zero = code.number(DOUBLE, 0)
        mean, total, sum_sq = code.variable(zero), code.variable(zero), code.variable(zero)
        with code.loop(0, 2):
            mean.add(total.get() / count)
            total.set(0)
            sum_sq.set(0)
            with code.loop(tile.r0, tile.r1) as r:
                row = x.at(runs.load(r))
                with code.loop(tile.l0, tile.l1) as i:
                    d = kind.source.widen(row.load(i * step)).to(DOUBLE) - mean.get()
                    if kind.masked:
                        d = where(mask.at(mask_runs.load(r)).load(i * mask_step) != 0, d, 0)
                    total.add(d)
                    sum_sq.set(fused(d, d, sum_sq.get()))
        excess = total.get() / count
        rounded = mean.get().to(element.computing).to(DOUBLE)
        found.of(DOUBLE).store(0, rounded)
        found.of(DOUBLE).store(1, (mean.get() - rounded) + excess)
        found.of(DOUBLE).store(2, sum_sq.get() - total.get() * excess)
        return code.function


def _outside(sum_sq: Value, lowest: Value) -> Value:
    """Return whether a sum of squares is outside float32's range, or NaN."""
    return ~((sum_sq >= lowest) & (sum_sq < math.inf))


def _store_moments(
    numbers: Numbers, call: Memory, fallback: Any, found: Memory, sums: tuple[Value, ...], count: Value,
    located: tuple[Any, ...], at: Value, counted: Value | None = None,
) -> None:  # fmt: skip
    """Store mean, mean_lo and m2 of a tile among the partial sums, at `at`, and with a mask how many elements counted.

    sums: the mean and mean_lo about which was summed, and the sums of what is left and of its squares. fallback: the
    function of `_moments_float64`, for tiles that float32 cannot hold. located: its arguments that say where the tile
    is. found: room for three numbers.
    """
    code, (mean, mean_lo, total, sum_sq) = numbers.code, sums
    excess = total / count
    found.store(0, mean.to(DOUBLE))
    found.store(1, mean_lo.to(DOUBLE) + excess)
    found.store(2, sum_sq - total * excess)
    with code.when(_outside(sum_sq, numbers.least * count), likely=False):
        code.call(fallback, call, *located, count, found)
    for i in range(3):
        numbers.sums_of(i).store(numbers.sums + at, found.load(i))
    if counted is not None:
        numbers.sums_of(3).store(numbers.sums + at, counted)


def _reduce_rows(module: Module, kind: Kind) -> None:
    """Write the step that sets mean, mean_lo and m2 of tiles.

    sum d**2 - count * mean(d)**2 loses at most one bit if mean(d) is within the deviation. If it is not, the guess of
    the mean was bad: sum again about the mean. If the rounding of the mean still dominates, as in a nearly constant
    tile, sum a third time about mean + mean_lo.
    """
    element, lanes = kind.element, kind.lanes
    fallback = _moments_float64(module, kind)
    with module.function("reduce", *STEP, exported=True) as (code, call, first, last, near):
        numbers = Numbers(code, call, kind)
        store = partial(_store_moments, numbers, call, fallback, code.room(DOUBLE, 3))
        with each_item(numbers, first, last) as item:
            offset = numbers.start("x", item.n, item.c)
            x, runs = numbers.array("x").at(offset), numbers.runs_of("x")
            tile = tile_of(numbers, item.tile)
            count = code.variable(tile.size.to(DOUBLE))
            mask_offset = numbers.start("mask", item.n, item.c)
            mask, mask_runs = numbers.array("mask").at(mask_offset), numbers.runs_of("mask")
            places = []
            for r, at in (_guess_place(i, tile, lanes) for i in range(GUESS_PLACES)):
                value = kind.source.widen(x.at(runs.load(r)).load(at, lanes)).to(DOUBLE)
                if kind.masked:
                    value = where(counts_at(kind, mask.at(mask_runs.load(r)), at), value, 0)
                places.append(value)
            guess = guess_of(places)
            mean = code.variable((guess.sum() * (1 / lanes)).to(element.computing))
            mean_lo = code.variable(code.number(element.computing, 0))
            total, sum_sq, counted = (code.variable(code.number(DOUBLE, 0)) for _ in range(3))
            found = [total, sum_sq, counted] if kind.masked else [total, sum_sq]
            with code.loop(0, 3) as attempt:
                m, lo = mean.get().splat(lanes), mean_lo.get().splat(lanes)
                sums = Sums(code, kind, len(found))
                with code.loop(tile.r0, tile.r1) as r:
                    row = x.at(runs.load(r)).at(tile.l0)
                    mask_row = mask.at(mask_runs.load(r)).at(tile.l0)
                    fetch = prefetcher(numbers, near, [row], numbers.run("result", item.n, item.c, r).at(tile.l0))

                    def terms(
                        i: Value, row: Memory = row, m: Value = m, lo: Value = lo, mask_row: Memory = mask_row
                    ) -> list[Any]:
                        d = (kind.source.widen(row.load(i, lanes)) - m) - lo
                        if not kind.masked:
                            return [d, Product(d, d)]
                        counts = counts_at(kind, mask_row, i)
                        d = where(counts, d, 0)
                        return [d, Product(d, d), where(counts, d.constant(1), 0)]

                    sum_row(code, tile.length, sums, terms, fetch)
                for variable, value in zip(found, sums.values(), strict=True):
                    variable.set(value)
                if kind.masked:
                    count.set(most(counted.get(), 1))
                excess = total.get() / count.get()
                code.leave_if(~(total.get() * excess > sum_sq.get() * 0.5))
                with code.when(attempt == 0):
                    mean.add(excess.to(element.computing))
                with code.when(attempt == 1):
                    mean_lo.set(excess.to(element.computing))
            store(
                (mean.get(), mean_lo.get(), total.get(), sum_sq.get()), count.get(),
                (offset, 1, item.tile, mask_offset, 1), item.number, counted.get() if kind.masked else None,
            )  # fmt: skip


def _reduce_channels(module: Module, kind: Kind) -> None:
    """Write `_reduce_rows` for channels side by side."""
    element, lanes = kind.element, kind.lanes
    computing, wide = vector(element.computing, lanes), vector(DOUBLE, lanes)
    fallback = _moments_float64(module, kind)
    with module.function("reduce", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        store = partial(_store_moments, numbers, call, fallback, code.room(DOUBLE, 3))
        near = Table(code, element.computing, ("mean", "mean_lo"), WIDEST_GROUP)
        names = ("total", "sum_sq", "counted") if kind.masked else ("total", "sum_sq")
        sums = Table(code, DOUBLE, names, WIDEST_GROUP)
        step, mask_step = numbers.x_p, numbers.mask_p
        with each_item(numbers, first, last) as item:
            offset = numbers.start("x", item.n, item.c)
            x, runs = numbers.array("x").at(offset), numbers.runs_of("x")
            tile = tile_of(numbers, item.tile)
            size = tile.size.to(DOUBLE)
            mask_offset = numbers.start("mask", item.n, item.c)
            mask, mask_runs = numbers.array("mask").at(mask_offset), numbers.runs_of("mask")
            with each_vector(code, item.width, lanes) as (j, _):
                places = []
                for r, at in (_guess_place(i, tile, 1) for i in range(GUESS_PLACES)):
                    value = kind.source.widen(x.at(runs.load(r)).load(at * step + j, lanes)).to(DOUBLE)
                    if kind.masked:
                        value = where(counts_at(kind, mask.at(mask_runs.load(r) + at * mask_step), j), value, 0)
                    places.append(value)
                guess = guess_of(places)
                near.store(j, mean=guess.to(element.computing), mean_lo=code.number(computing, 0))
            with code.loop(0, 3) as attempt:
                with each_vector(code, item.width, lanes) as (j, _):
                    sums.store(j, **dict.fromkeys(names, code.number(wide, 0)))
                with code.loop(tile.r0, tile.r1) as r, code.loop(tile.l0, tile.l1, PARTIAL_CHANNELS) as lo:
                    row, hi = x.at(runs.load(r)), least(lo + PARTIAL_CHANNELS, tile.l1)
                    mask_row = mask.at(mask_runs.load(r))
                    with each_vector(code, item.width, lanes) as (j, new):
                        mean, mean_lo = near.load(j, lanes, "mean", "mean_lo")
                        a, b, *number = (code.variable(code.number(computing, 0)) for _ in names)
                        with code.loop(lo, hi) as i:
                            at = i * step + j
                            row.prefetch(at + step * PARTIAL_CHANNELS)
                            d = (kind.source.widen(row.load(at, lanes)) - mean) - mean_lo
                            if kind.masked:
                                counts = counts_at(kind, mask_row.at(i * mask_step), j)
                                d = where(counts, d, 0)
                                number[0].add(where(counts, d.constant(1), 0))
                            a.add(d)
                            b.set(fused(d, d, b.get()))
                        more = [where(new, each.get(), 0).to(DOUBLE) for each in (a, b, *number)]
                        old = sums.load(j, lanes, *names)
                        sums.store(j, **{name: u + v for name, u, v in zip(names, old, more, strict=True)})
                again = code.variable(code.integer(0))
                with code.when(attempt < 2), each_vector(code, item.width, lanes) as (j, new):
                    total, sum_sq, *counted = sums.load(j, lanes, *names)
                    mean, mean_lo = near.load(j, lanes, "mean", "mean_lo")
                    excess = total / (most(counted[0], 1) if counted else size)
                    bad = (total * excess > sum_sq * 0.5) & new
                    with code.when(bad.any()):
                        again.set(1)
                        better = excess.to(element.computing)
                        first_time = attempt == 0
                        near.store(
                            j, mean=where(bad & first_time.splat(lanes), mean + better, mean),
                            mean_lo=where(bad & (~first_time).splat(lanes), better, mean_lo),
                        )  # fmt: skip
                code.leave_if(again.get() == 0)
            with code.loop(0, item.width) as j:
                total, sum_sq, *counted = (room.load(j) for room in sums.rooms.values())
                mean, mean_lo = (room.load(j) for room in near.rooms.values())
                at = item.number * numbers.group + j
                count = most(counted[0], 1) if counted else size
                located = offset + j, step, item.tile, mask_offset + j * numbers.mask_c, mask_step
                store((mean, mean_lo, total, sum_sq), count, located, at, *counted)


def rstd_of(numbers: Numbers, var: Value) -> Value:
    """Return rstd of biased variances, by the call's convention (conventions.py), in their precision."""
    kind = element_of(var.kind)
    ratio, eps, beside, floor = (
        getattr(numbers, name).to(kind) for name in ("count_ratio", "eps", "eps_beside", "floor")
    )
    std = sqrt(var * ratio + eps) + beside
    return 1 / where(std < floor, floor, std)  # NaN stays


def eps_of(numbers: Numbers) -> Value:
    """Return eps in computing precision, wherever it is added."""
    return (numbers.eps + numbers.eps_beside + numbers.floor).to(numbers.kind.element.computing)


def _join(module: Module, kind: Kind) -> None:
    """Write the step that merges the tiles of blocks: mean, mean_lo and rstd of planes, and variance if wanted.

    By Chan, Golub, LeVeque 1983, eq. 2.1, with means relative to that of the first tile that has positions. With a mask
    the number of positions of each plane is stored, too; rstd of a plane without any is 0.
    """
    computing = kind.element.computing
    with module.function("join", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        means, means_lo, m2s = (numbers.sums_of(i) for i in range(3))
        counts, counted = code.memory(numbers.counts, INT), numbers.sums_of(3)
        outputs = {name: numbers.of_planes(name) for name in ("mean", "mean_lo", "rstd", "variance")}
        # A whole plane has plane elements; in a window it is also the only tile.
        first_count = where(numbers.tiles == 1, numbers.plane, counts.load(0))
        with each_channel(numbers, first, last) as (at, n, c):
            start = means.load(at)
            if kind.masked:
                nearest, seen = code.variable(start), code.variable(counted.load(at))
                with code.loop(1, numbers.tiles) as tile, code.when(seen.get() == 0):
                    nearest.set(means.load(at + tile * numbers.group))
                    seen.set(counted.load(at + tile * numbers.group))
                start = nearest.get()
            pooled, m2 = code.variable(means_lo.load(at)), code.variable(m2s.load(at))
            count = code.variable(counted.load(at) if kind.masked else first_count.to(DOUBLE))
            with code.loop(1, numbers.tiles) as tile:
                there = at + tile * numbers.group
                more = counted.load(there) if kind.masked else counts.load(tile).to(DOUBLE)
                both = count.get() + more
                share = more / (most(both, 1) if kind.masked else both)
                distance = (means.load(there) - start) + means_lo.load(there) - pooled.get()
                pooled.add(distance * share)
                m2.add(m2s.load(there) + distance * distance * (count.get() * share))
                count.add(more)
            size = most(count.get(), 1) if kind.masked else numbers.plane.to(DOUBLE)
            var = where(m2.get() <= 0, 0.0, m2.get() / size)  # NaN stays
            plane = n * numbers.channels + c
            mean = (start + pooled.get()).to(computing)
            outputs["mean"].store(plane, mean)
            outputs["mean_lo"].store(plane, ((start - mean.to(DOUBLE)) + pooled.get()).to(computing))
            divided = var
            if kind.masked:
                code.memory(numbers.count, INT).store(plane, count.get().to(INT))
                rest = count.get() - numbers.ddof
                divided = var * where(rest > 0, count.get() / rest, 0)
            rstd = rstd_of(numbers, divided)
            outputs["rstd"].store(plane, (where(count.get() > 0, rstd, 0) if kind.masked else rstd).to(computing))
            with code.when(numbers.variance != 0):
                outputs["variance"].store(plane, var.to(computing))


def statistics(module: Module, kind: Kind) -> None:
    """Write the steps reduce and join."""
    (_reduce_channels if kind.channels_last else _reduce_rows)(module, kind)
    _join(module, kind)


def _write_row(module: Module, kind: Kind) -> Any:
    """Write a function that computes y for a row of a plane, or its channels side by side at one position."""
    element, lanes, computing = kind.element, kind.lanes, kind.element.computing
    given = [MEMORY] * 4 if kind.channels_last else [computing] * 4
    with module.function("row", MEMORY, MEMORY, MEMORY, MEMORY, INT, INT, INT, computing, *given) as (
        code, *places, count, away, soon, slope_, a, b, c, d,
    ):  # fmt: skip
        names = "x", "residual", "mask", "result"
        x, residual, mask, y = (p.of(kind.element_of(name).stored) for p, name in zip(places, names, strict=True))
        slope, values = slope_.splat(lanes), (a, b, c, d)
        tables = [each.of(computing) for each in values] if kind.channels_last else []
        fixed = None if kind.channels_last else Coefficients(*(each.splat(lanes) for each in values))

        def compute(i: Value) -> list[tuple[Memory, Value]]:
            at = fixed or Coefficients(*(table.load(i, lanes) for table in tables))
            z = at.z(at.centred(kind.source.widen(x.load(i, lanes))))
            if kind.residual:
                z = z + element.widen(residual.load(i, lanes))
            z = activate(z, kind.activation, slope)
            if kind.masked:
                z = where(counts_at(kind, mask, i), z, 0)
            return [(y, element.narrow(z))]

        def beside(i: Value) -> None:
            prefetch_next(code, kind, [x.at(i + away)], soon)

        map_row(code, count, lanes, compute, None if kind.channels_last else beside)
        return code.function


def stream_out_of(module: Module, kind: Kind) -> Any:
    """Write a function that copies a buffer to an array, whole cache lines past the caches.

    An ordinary store reads the line first. The threads' atomic operations make the stores visible to other threads.
    """
    stored, line = kind.element.stored, LINE // kind.element.size
    with module.function("stream_out", MEMORY, MEMORY, INT) as (code, *places, count):
        source, target = (each.of(stored) for each in places)
        first = least((0 - target.address() // kind.element.size) & (line - 1), count)
        last = first + (count - first) // line * line
        for begin, end, lanes in ((code.integer(0), first, 0), (first, last, line), (last, count, 0)):
            with code.loop(begin, end, lanes or 1) as i:
                target.store(i, source.load(i, lanes), streams=lanes > 0)
        return code.function


def write_row(numbers: Numbers, stream_out: Any, target: Memory, size: Value, buffer: Memory, compute: Any) -> None:
    """Compute a row of results, past the caches if the call says so. compute: as in `_stream_row`."""
    with numbers.code.choice(numbers.streams != 0) as (streams, stays):
        with streams:
            _stream_row(numbers.code, numbers.kind, stream_out, target, size, buffer, compute)
        with stays:
            compute(target, 0, size)


def _stream_row(
    code: Code, kind: Kind, stream_out: Any, target: Memory, size: Value, buffer: Memory, compute: Any
) -> None:
    """Compute a row of results in parts in a buffer, and stream them to the target.

    compute(memory, first, count): write results to memory. The first part ends, and all others begin and end, with
    cache lines, except that the last one has no fewer elements than a vector: it may repeat some.
    """
    line = LINE // kind.element.size
    short = (0 - target.address() // kind.element.size) & (line - 1)
    begin = code.variable(code.integer(0))
    with code.forever():
        lo = begin.get()
        code.leave_if(lo >= size)
        end = least(where(lo == 0, short + PARTIAL, lo + PARTIAL), size)
        lo = least(lo, end - kind.lanes)
        compute(buffer, lo, end - lo)
        code.call(stream_out, buffer, target.at(lo), end - lo)
        begin.set(end)


def _apply_rows(module: Module, kind: Kind) -> None:
    """Write the step that computes y of tiles.

    If another plane follows, its x is prefetched: reads would otherwise idle during the writes.
    """
    row, stream_out = _write_row(module, kind), stream_out_of(module, kind)
    with module.function("apply", *STEP, exported=True) as (code, call, first, last, follows):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        buffer = code.room(kind.element.stored, PARTIAL + LINE)
        slope = numbers.slope.to(kind.element.computing)
        away, soon = where(follows != 0, numbers.x_c, 0), (follows > 1).to(INT)
        with each_item(numbers, first, last, tiles_backwards=True) as item:
            tile = tile_of(numbers, item.tile)
            values, _ = planes.coefficients(item.n, item.c)
            with code.loop(tile.r0, tile.r1) as r:
                names = "x", "residual", "mask", "result"
                *inputs, y = (numbers.run(name, item.n, item.c, r).at(tile.l0) for name in names)

                def compute(target: Memory, lo: Any, count: Value, inputs: list[Memory] = inputs) -> None:
                    code.call(row, *(each.at(lo) for each in inputs), target, count, away, soon, slope, *values)

                write_row(numbers, stream_out, y, tile.length, buffer, compute)


def _apply_channels(module: Module, kind: Kind) -> None:
    """Write `_apply_rows` for channels side by side."""
    row = _write_row(module, kind)
    with module.function("apply", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        table = Table(code, kind.element.computing, Coefficients._fields, WIDEST_GROUP)
        slope = numbers.slope.to(kind.element.computing)
        with each_item(numbers, first, last, tiles_backwards=True) as item:
            set_coefficients(table, planes, item)
            tile = tile_of(numbers, item.tile)
            with code.loop(tile.r0, tile.r1) as r:
                run = {name: numbers.run(name, item.n, item.c, r) for name in ("x", "residual", "mask", "result")}
                with code.loop(tile.l0, tile.l1) as i:
                    places = [each.at(i * getattr(numbers, f"{name}_p")) for name, each in run.items()]
                    code.call(row, *places, item.width, 0, 0, slope, *table.rooms.values())


def results(module: Module, kind: Kind) -> None:
    """Write the step apply."""
    (_apply_channels if kind.channels_last else _apply_rows)(module, kind)
