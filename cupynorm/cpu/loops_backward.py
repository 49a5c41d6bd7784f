"""The compiled loops of the backward.

Modules, each compiled when a call first needs it: `gradient_sums` (the steps reduce and join) and `gradients` (the step
apply). Short planes have loops of their own, in loops_short and loops_across.
"""

from __future__ import annotations

from typing import Any

from .llvm import DOUBLE, INT, MEMORY, Memory, Module, Value, fused, least, vector, where
from .loops_activations import times_slope
from .loops_forward import PARTIAL_CHANNELS, STEP, stream_out_of, write_row
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
    unit_of,
)

INPUTS = "x", "dy", "residual", "mask"
OUTPUTS = "result", "dresidual"


def gradient_at(
    kind: Kind, inputs: dict[str, Memory], i: Value, values: Coefficients, slope: Value
) -> tuple[Value, Value]:
    """Return g, and x - mean in the plane's unit, of the elements at i."""
    element, lanes = kind.element, kind.lanes
    centred = values.centred(element.widen(inputs["x"].load(i, lanes)))
    z = values.z(centred)
    if kind.residual:
        z = z + element.widen(inputs["residual"].load(i, lanes))
    g = times_slope(element.widen(inputs["dy"].load(i, lanes)), z, kind.activation, slope)
    if kind.masked:
        counts = counts_at(kind, inputs["mask"], i)
        g, centred = where(counts, g, 0), where(counts, centred, 0)
    return g, centred


def _run(numbers: Numbers, names: tuple[str, ...], item: Any, r: Value) -> dict[str, Memory]:
    """Return a run of each array."""
    return {name: numbers.run(name, item.n, item.c, r) for name in names}


def _reduce_rows(module: Module, kind: Kind) -> None:
    """Write the step that sets the sums of g and of g * (x - mean) of tiles."""
    with module.function("reduce", *STEP, exported=True) as (code, call, first, last, near):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        slope = numbers.slope.to(kind.element.computing).splat(kind.lanes)
        with each_item(numbers, first, last) as item:
            tile = tile_of(numbers, item.tile)
            values = Coefficients(*(each.splat(kind.lanes) for each in planes.coefficients(item.n, item.c)[0]))
            sums = Sums(code, kind, 2)
            with code.loop(tile.r0, tile.r1) as r:
                names = (*INPUTS, "result")
                run = {name: each.at(tile.l0) for name, each in _run(numbers, names, item, r).items()}
                fetch = prefetcher(numbers, near, [run["x"], run["dy"]], run["result"])

                def terms(i: Value) -> list[Any]:
                    g, centred = gradient_at(kind, run, i, values, slope)
                    return [g, Product(g, centred)]

                sum_row(code, tile.length, sums, terms, fetch)
            for i, total in enumerate(sums.values()):
                numbers.sums_of(i).store(numbers.sums + item.number, total)


def _reduce_channels(module: Module, kind: Kind) -> None:
    """Write `_reduce_rows` for channels side by side."""
    lanes, computing = kind.lanes, vector(kind.element.computing, kind.lanes)
    with module.function("reduce", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        slope = numbers.slope.to(kind.element.computing).splat(lanes)
        table = Table(code, kind.element.computing, Coefficients._fields, WIDEST_GROUP)
        sums = Table(code, DOUBLE, ("g", "g_centred"), WIDEST_GROUP)
        with each_item(numbers, first, last) as item:
            tile = tile_of(numbers, item.tile)
            set_coefficients(table, planes, item)
            with each_vector(code, item.width, lanes) as (j, _new):
                zero = code.number(vector(DOUBLE, lanes), 0)
                sums.store(j, g=zero, g_centred=zero)
            with code.loop(tile.r0, tile.r1) as r, code.loop(tile.l0, tile.l1, PARTIAL_CHANNELS) as lo:
                run, hi = _run(numbers, INPUTS, item, r), least(lo + PARTIAL_CHANNELS, tile.l1)
                with each_vector(code, item.width, lanes) as (j, new):
                    values = table.coefficients(j, lanes)
                    a, b = (code.variable(code.number(computing, 0)) for _ in range(2))
                    with code.loop(lo, hi) as i:
                        at = {name: each.at(i * getattr(numbers, f"{name}_p")) for name, each in run.items()}
                        for name in ("x", "dy"):
                            at[name].prefetch(getattr(numbers, f"{name}_p") * PARTIAL_CHANNELS + j)
                        g, centred = gradient_at(kind, at, j, values, slope)
                        a.add(g)
                        b.set(fused(g, centred, b.get()))
                    old = sums.load(j, lanes, "g", "g_centred")
                    total, dot = (
                        was + where(new, each.get(), 0).to(DOUBLE) for was, each in zip(old, (a, b), strict=True)
                    )
                    sums.store(j, g=total, g_centred=dot)
            with code.loop(0, item.width) as j:
                for i, room in enumerate(sums.rooms.values()):
                    numbers.sums_of(i).store(numbers.sums + item.number * numbers.group + j, room.load(j))


def _join(module: Module, kind: Kind) -> None:
    """Write the step that adds up the tiles of blocks, and turns sums of g * (x - mean) into sums of g * xhat.

    sum_g and sum_g_xhat have the dtype of the planes' other numbers, or float64 if the call's numbers say so.
    """
    computing = kind.element.computing
    with module.function("join", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        parts = [numbers.sums_of(i) for i in range(2)]
        with each_channel(numbers, first, last) as (at, n, c):
            total, dot = (code.variable(code.number(DOUBLE, 0)) for _ in range(2))
            with code.loop(0, numbers.tiles) as tile:
                for variable, part in zip((total, dot), parts, strict=True):
                    variable.add(part.load(at + tile * numbers.group))
            mean, mean_lo, rstd = planes.statistics(n, c)
            unit, r = unit_of(mean, rstd)
            with_xhat = (dot.get() - total.get() * (mean_lo * unit).to(DOUBLE)) * r.to(DOUBLE)
            plane = n * numbers.channels + c
            with code.choice(numbers.wide != 0) as (wide, narrow):
                for case, stored in ((wide, DOUBLE), (narrow, computing)):
                    with case:
                        code.memory(numbers.sum_g, stored).store(plane, total.get().to(stored))
                        code.memory(numbers.sum_g_xhat, stored).store(plane, with_xhat.to(stored))


def gradient_sums(module: Module, kind: Kind) -> None:
    """Write the steps reduce and join."""
    (_reduce_channels if kind.channels_last else _reduce_rows)(module, kind)
    _join(module, kind)


def slope_and_constant(
    count: Value, unit: Value, r: Value, mean_lo: Value, sum_g: Value, sum_g_xhat: Value, of_rstd: Value | None
) -> tuple[Value, Value]:
    """Return slope and constant of dx = (g + (centred * slope + constant)) * scale * unit; r is rstd in the unit.

    of_rstd: rstd_slope (conventions.py), or None if it is 1.
    """
    slope = -(sum_g_xhat / count * r)
    if of_rstd is not None:
        slope = slope * of_rstd
    return slope, -(sum_g / count) - mean_lo * unit * slope


def _slopes(planes: Planes, n: Value, c: Value) -> tuple[Value, Value]:
    """Return slope and constant of a plane."""
    numbers = planes.numbers
    names = ("sum_g", "sum_g_xhat", *(("slopes",) if numbers.kind.sloped else ()))
    total, dot, *slopes = (numbers.of_planes(name).load(n * numbers.channels + c) for name in names)
    mean, mean_lo, rstd = planes.statistics(n, c)
    unit, r = unit_of(mean, rstd)
    masked = numbers.kind.masked
    count = numbers.of_planes("count").load(n * numbers.channels + c) if masked else numbers.plane.to(r.kind)
    return slope_and_constant(count, unit, r, mean_lo, total, dot, slopes[0] if slopes else None)


def gradient_results(
    kind: Kind, inputs: dict[str, Memory], outputs: dict[str, Memory], i: Value, values: Coefficients,
    further: tuple[Value, Value], slope: Value,
) -> list[tuple[Memory, Value]]:  # fmt: skip
    """Return dx, and a residual's gradient, of the elements at i, each with its memory."""
    g, centred = gradient_at(kind, inputs, i, values, slope)
    found = [(outputs["dresidual"], kind.element.narrow(g))] if kind.residual else []
    if kind.training:
        g = g + fused(centred, *further)
    dx = g * values.scale * values.unit
    if kind.masked:
        dx = where(counts_at(kind, inputs["mask"], i), dx, 0)
    return [*found, (outputs["result"], kind.element.narrow(dx))]


def _write_row(module: Module, kind: Kind) -> Any:
    """Write a function that computes dx for a row of a plane, or its channels side by side at one position."""
    lanes, computing = kind.lanes, kind.element.computing
    given = [MEMORY if kind.channels_last else computing] * (len(Coefficients._fields) + 2)
    with module.function("row", *[MEMORY] * 6, *[INT] * 4, computing, *given) as (
        code, x, dy, residual, mask, dx, dresidual, count, away, away_dy, soon, slope_, *values,
    ):  # fmt: skip
        stored = kind.element.stored
        given_arrays = zip(INPUTS, (x, dy, residual, mask), strict=True)
        inputs = {name: each.of(kind.element_of(name).stored) for name, each in given_arrays}
        outputs = {"result": dx.of(stored), "dresidual": dresidual.of(stored)}
        slope = slope_.splat(lanes)
        fixed = [] if kind.channels_last else [each.splat(lanes) for each in values]
        tables = [each.of(computing) for each in values] if kind.channels_last else []

        def compute(i: Value) -> list[tuple[Memory, Value]]:
            at = fixed or [table.load(i, lanes) for table in tables]
            return gradient_results(kind, inputs, outputs, i, Coefficients(*at[:4]), (at[4], at[5]), slope)

        def beside(i: Value) -> None:
            prefetch_next(code, kind, [inputs["x"].at(i + away), inputs["dy"].at(i + away_dy)], soon)

        map_row(code, count, lanes, compute, None if kind.channels_last else beside)
        return code.function


def _apply_rows(module: Module, kind: Kind) -> None:
    """Write the step that computes dx of tiles, and the residual's gradient, as in the forward."""
    row, stream_out = _write_row(module, kind), stream_out_of(module, kind)
    with module.function("apply", *STEP, exported=True) as (code, call, first, last, follows):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        buffer = code.room(kind.element.stored, PARTIAL + LINE)
        slope = numbers.slope.to(kind.element.computing)
        away = [where(follows != 0, getattr(numbers, f"{name}_c"), 0) for name in ("x", "dy")]
        soon = (follows > 1).to(INT)
        with each_item(numbers, first, last, tiles_backwards=True) as item:
            tile = tile_of(numbers, item.tile)
            values, _ = planes.coefficients(item.n, item.c)
            further = _slopes(planes, item.n, item.c) if kind.training else (slope, slope)
            with code.loop(tile.r0, tile.r1) as r:
                run = {name: each.at(tile.l0) for name, each in _run(numbers, (*INPUTS, *OUTPUTS), item, r).items()}

                def compute(target: Memory, lo: Any, count: Value) -> None:
                    *inputs, dresidual = (run[name].at(lo) for name in (*INPUTS, "dresidual"))
                    code.call(row, *inputs, target, dresidual, count, *away, soon, slope, *values, *further)

                write_row(numbers, stream_out, run["result"], tile.length, buffer, compute)


def _apply_channels(module: Module, kind: Kind) -> None:
    """Write `_apply_rows` for channels side by side."""
    row = _write_row(module, kind)
    with module.function("apply", *STEP, exported=True) as (code, call, first, last, _):
        numbers = Numbers(code, call, kind)
        planes = Planes(numbers)
        slope = numbers.slope.to(kind.element.computing)
        table = Table(code, kind.element.computing, Coefficients._fields, WIDEST_GROUP)
        further = Table(code, kind.element.computing, ("slope", "constant"), WIDEST_GROUP)
        with each_item(numbers, first, last, tiles_backwards=True) as item:
            set_coefficients(table, planes, item)
            if kind.training:
                with code.loop(0, item.width) as j:
                    values = _slopes(planes, item.n, item.c + j)
                    further.store(j, slope=values[0], constant=values[1])
            tile = tile_of(numbers, item.tile)
            with code.loop(tile.r0, tile.r1) as r:
                run = _run(numbers, (*INPUTS, *OUTPUTS), item, r)
                with code.loop(tile.l0, tile.l1) as i:
                    at = {name: each.at(i * getattr(numbers, f"{name}_p")) for name, each in run.items()}
                    places = [at[name] for name in (*INPUTS, *OUTPUTS)]
                    tables = *table.rooms.values(), *further.rooms.values()
                    code.call(row, *places, item.width, 0, 0, 0, slope, *tables)


def gradients(module: Module, kind: Kind) -> None:
    """Write the step apply."""
    (_apply_channels if kind.channels_last else _apply_rows)(module, kind)
