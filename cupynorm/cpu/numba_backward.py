"""The compiled loops of the backward."""

from __future__ import annotations

import numpy as np

from .numba_activations import times_slope
from .numba_cache import inlined, kernel
from .numba_geometry import (
    AHEAD,
    DY,
    NEAR,
    PARTIAL,
    PARTIAL_CHANNELS_LAST,
    TOGETHER,
    Coefficients,
    Geometry,
    Kind,
    Offsets,
    Planes,
    X,
    channel_coefficients,
    coefficients_of,
    flat_planes,
    locate,
    next_item,
    offsets_of,
    operands_of,
    plane_coefficients,
    planes_together,
    position_offsets,
    position_steps,
    prefetch_run,
    previous_item,
    run_offsets,
    scale_short_planes,
    short_plane_offsets,
    tile_bounds,
)
from .numba_intrinsics import add, narrow, own_address, scaled, stream, typed, unit_of, widen, zero_of, zeros_of
from .numba_tasks import next_tasks, task_done

BACKWARD_SHORT = 512  # elements; longer planes do not gain in the backward


@inlined
def _gradient_at(operands, offsets, i, kind, values):
    """Return g, and x - mean in the plane's unit, of an element; values are the plane's Coefficients."""
    centred = scaled(widen(operands.x[offsets.x + i]), values.unit, values.mean)
    z = centred * values.scale + values.intercept
    if kind.residual is not None:
        z = z + widen(operands.residual[offsets.residual + i])
    return times_slope(widen(operands.dy[offsets.dy + i]), z, kind.activation), centred


@inlined
def _sums_run(operands, offsets, lo, hi, kind, values):
    """Return the sums of g and of g * centred for a part of a run of one plane."""
    total = dot = zero_of(operands.like)
    for i in range(lo, hi):
        g, centred = _gradient_at(operands, offsets, i, kind, values)
        total = add(total, g)
        dot = add(dot, g * centred)
    return total, dot


@inlined
def _reduce_backward_rows(operands, geometry, first, last, kind, planes, sums):
    """Set the sums of g and of g * centred of the items: sums are two arrays."""
    totals, dots = sums
    n, c, tile = locate(first, geometry)
    for item in range(last - first):
        r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
        values = plane_coefficients(n, c, planes)
        total = dot = 0.0
        for r in range(r0, r1):
            at = run_offsets(operands, None, n, c, r)
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                prefetch_run(operands.x, at.x + np.uint64(AHEAD), lo, hi)
                prefetch_run(operands.dy, at.dy + np.uint64(AHEAD), lo, hi)
                s, q = _sums_run(operands, at, np.uint64(lo), np.uint64(hi), kind, values)
                total += s
                dot += q
        totals[item] = total
        dots[item] = dot
        n, c, tile = next_item(n, c, tile, geometry)


@inlined
def _reduce_backward_channels(operands, geometry, first, last, kind, planes, sums):
    group, zeros = geometry.group, zeros_of(operands.like)
    totals, dots = sums
    unit, m, scale, intercept = np.empty((4, group), planes.mean.dtype)
    table, steps = Coefficients(unit, m, scale, intercept), position_steps(operands.strides)
    a, b = np.empty((2, group), planes.mean.dtype)
    n, c, tile = locate(first, geometry)
    for item in range(last - first):
        width = min(group, geometry.channels - c)
        channel_coefficients(n, c, width, planes, table)
        r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
        start = item * group
        totals[start : start + width] = 0
        dots[start : start + width] = 0
        for r in range(r0, r1):
            base = run_offsets(operands, None, n, c, r)
            for lo in range(l0, l1, PARTIAL_CHANNELS_LAST):
                a[:] = zeros[0]
                b[:] = zeros[0]
                for i in range(np.uint64(lo), np.uint64(min(lo + PARTIAL_CHANNELS_LAST, l1))):
                    at = position_offsets(base, steps, None, i)
                    for j in range(np.uint64(width)):
                        g, centred = _gradient_at(operands, at, j, kind, coefficients_of(table, j))
                        a[j] += g
                        b[j] += g * centred
                for j in range(width):
                    totals[start + j] += a[j]
                    dots[start + j] += b[j]
        n, c, tile = next_item(n, c, tile, geometry)


@inlined
def _join_backward(geometry, first, last, sums, planes, plane_sums):
    """Add up tiles, and turn sums of g * centred into sums of g * xhat."""
    group, tiles = geometry.group, geometry.tiles
    totals, dots = sums
    sum_g, sum_g_xhat = plane_sums
    n, c, _ = locate(first * tiles, geometry)
    for block in range(last - first):
        for j in range(min(group, geometry.channels - c)):
            at = block * tiles * group + j
            total = dot = 0.0
            for tile in range(tiles):
                total += totals[at + tile * group]
                dot += dots[at + tile * group]
            sum_g[n, c + j] = total
            unit, r = unit_of(planes.mean[n, c + j], planes.rstd[n, c + j])
            sum_g_xhat[n, c + j] = (dot - total * (planes.mean_lo[n, c + j] * unit)) * r
        c += group
        if c >= geometry.channels:
            n, c = n + 1, 0


@inlined
def _slope_and_constant(count, unit, r, mean_lo, sum_g, sum_g_xhat):
    """Return slope and constant of dx = (g + (centred * slope + constant)) * scale * unit; r is rstd in the unit."""
    slope = -(sum_g_xhat / count * r)
    return slope, -(sum_g / count) - mean_lo * unit * slope


@inlined
def _slopes(n, c, geometry, planes, plane_sums):
    unit, r = unit_of(planes.mean[n, c], planes.rstd[n, c])
    sum_g, sum_g_xhat = plane_sums
    count = typed(geometry.plane, r)
    return _slope_and_constant(count, unit, r, planes.mean_lo[n, c], sum_g[n, c], sum_g_xhat[n, c])


@inlined
def _gradient_run(operands, target, offsets, lo, hi, kind, values, slope, constant):
    """Compute dx, and a residual's gradient, for a part of a run of one plane; target is dx or a buffer."""
    for i in range(lo, hi):
        g, centred = _gradient_at(operands, offsets, i, kind, values)
        if kind.residual is not None:
            operands.dresidual[offsets.dresidual + i] = narrow(g, operands.like)
        if kind.training is not None:
            g = g + (centred * slope + constant)
        target[offsets.result + i] = narrow(g * values.scale * values.unit, operands.like)


@inlined
def _apply_backward_rows(operands, geometry, first, last, kind, planes, plane_sums, follows, buffer):
    away, away_dy = np.uint64(operands.strides[X, 1]), np.uint64(operands.strides[DY, 1])
    zero = np.uint64(0)
    n, c, tile = locate(last - 1, geometry)
    for _ in range(last - first):
        r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
        values = plane_coefficients(n, c, planes)
        slope, constant = _slopes(n, c, geometry, planes, plane_sums)
        for r in range(r0, r1):
            at = run_offsets(operands, None, n, c, r)
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                if follows:
                    prefetch_run(operands.x, at.x + away, lo, hi)
                    prefetch_run(operands.dy, at.dy + away_dy, lo, hi)
                if geometry.streams:
                    o, size = np.uint64(lo), np.uint64(hi - lo)
                    part = Offsets(at.x + o, zero, at.dy + o, at.residual + o, at.dresidual + o)
                    _gradient_run(operands, buffer, part, zero, size, kind, values, slope, constant)
                    stream(buffer, size, operands.result, at.result + o)
                else:
                    first_, last_ = np.uint64(lo), np.uint64(hi)
                    _gradient_run(operands, operands.result, at, first_, last_, kind, values, slope, constant)
        n, c, tile = previous_item(n, c, tile, geometry)


@inlined
def _apply_backward_channels(operands, geometry, first, last, kind, planes, plane_sums):
    dx, dresidual, like = operands.result, operands.dresidual, operands.like
    unit, m, scale, intercept = np.empty((4, geometry.group), planes.mean.dtype)
    table, steps = Coefficients(unit, m, scale, intercept), position_steps(operands.strides)
    slope, constant = np.empty((2, geometry.group), planes.mean.dtype)
    n, c, tile = locate(last - 1, geometry)
    for _ in range(last - first):
        width = min(geometry.group, geometry.channels - c)
        channel_coefficients(n, c, width, planes, table)
        for j in range(width):
            slope[j], constant[j] = _slopes(n, c + j, geometry, planes, plane_sums)
        r0, r1, l0, l1, _ = tile_bounds(tile, geometry)
        for r in range(r0, r1):
            base = run_offsets(operands, None, n, c, r)
            for i in range(np.uint64(l0), np.uint64(l1)):
                at = position_offsets(base, steps, None, i)
                for j in range(np.uint64(width)):
                    g, centred = _gradient_at(operands, at, j, kind, coefficients_of(table, j))
                    if kind.residual is not None:
                        dresidual[at.dresidual + j] = narrow(g, like)
                    if kind.training is not None:
                        g = g + (centred * slope[j] + constant[j])
                    dx[at.result + j] = narrow(g * scale[j] * unit[j], like)
        n, c, tile = previous_item(n, c, tile, geometry)


@inlined
def _backward_short_rows(operands, geometry, first, last, kind, planes, plane_sums):
    """The whole backward for short planes, as `_forward_short_rows`."""
    sum_g, sum_g_xhat = plane_sums
    size = np.uint64(geometry.length)
    origin, sixteen = np.uint64(0), np.uint64(16)  # as in the forward
    unit, m, d, r, scale, intercept, total, dot = np.zeros((8, TOGETHER), planes.mean.dtype)
    table = Coefficients(unit, m, scale, intercept)
    offsets = np.empty((len(operands.strides), TOGETHER), np.uint64)
    most = planes_together(size)
    for start in range(first, last, most):
        together = min(most, last - start)
        short_plane_offsets(start, together, geometry, operands.strides, offsets, planes, table)
        for j in range(together):
            m[j], d[j], r[j] = planes.mean[start + j], planes.mean_lo[start + j], planes.rstd[start + j]
        scale_short_planes(table, d, r)
        for j in range(together):
            at, values = offsets_of(offsets, j, None), coefficients_of(table, j)
            if size == sixteen:  # for longer planes the hardware prefetcher suffices
                prefetch_run(operands.x, at.x + np.uint64(AHEAD), origin, sixteen)
                prefetch_run(operands.dy, at.dy + np.uint64(AHEAD), origin, sixteen)
                total[j], dot[j] = _sums_run(operands, at, origin, sixteen, kind, values)
            else:
                total[j], dot[j] = _sums_run(operands, at, origin, size, kind, values)
        for j in range(TOGETHER):
            dot[j] = (dot[j] - total[j] * (d[j] * unit[j])) * r[j]
        for j in range(together):
            sum_g[start + j], sum_g_xhat[start + j] = total[j], dot[j]
        for j in range(TOGETHER):
            count = typed(geometry.plane, r[j])
            dot[j], total[j] = _slope_and_constant(count, unit[j], r[j], d[j], total[j], dot[j])
        for j in range(together):
            at, values = offsets_of(offsets, j, None), coefficients_of(table, j)
            if size == sixteen:
                _gradient_run(operands, operands.result, at, origin, sixteen, kind, values, dot[j], total[j])
            else:
                _gradient_run(operands, operands.result, at, origin, size, kind, values, dot[j], total[j])


@kernel
def backward_tiles(queue, where, channels_last, kind, planes, sums):
    """Set the partial sums (of g and of g * centred) of tiles. where: see numba_geometry.operands_of."""
    kind, planes, geometry = Kind(*kind), Planes(*planes), Geometry(*where[4])
    operands = operands_of(where, None)
    first, last = next_tasks(queue)
    while first < last:
        start = geometry.sums + first * geometry.group
        parts = sums[0][start:], sums[1][start:]
        if channels_last is None:
            _reduce_backward_rows(operands, geometry, first, last, kind, planes, parts)
        else:
            _reduce_backward_channels(operands, geometry, first, last, kind, planes, parts)
        first, last = task_done(queue)
    return own_address()


@kernel
def backward_join(geometry, first, last, sums, planes, plane_sums):
    """Add up the partial sums of the tiles of blocks: plane_sums are sum_g and sum_g_xhat, (N, C)."""
    _join_backward(Geometry(*geometry), first, last, sums, Planes(*planes), plane_sums)


@kernel
def backward_results(queue, where, channels_last, kind, planes, plane_sums):
    """Write dx, and the residual's gradient, of tiles, given the sums of their planes."""
    kind, planes, geometry = Kind(*kind), Planes(*planes), Geometry(*where[4])
    operands = operands_of(where, None)
    buffer = np.empty(PARTIAL, operands.result.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None:
            _apply_backward_rows(operands, geometry, first, last, kind, planes, plane_sums, False, buffer)
        else:
            _apply_backward_channels(operands, geometry, first, last, kind, planes, plane_sums)
        first, last = task_done(queue)
    return own_address()


@kernel
def backward_planes(queue, where, channels_last, kind, planes, plane_sums):
    """Do the whole backward of blocks."""
    kind, planes, geometry = Kind(*kind), Planes(*planes), Geometry(*where[4])
    operands = operands_of(where, None)
    tiles = geometry.tiles
    totals, dots = np.empty((2, tiles * geometry.group))
    sums = totals, dots
    buffer = np.empty(PARTIAL, operands.result.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None and geometry.runs == 1 and geometry.length <= BACKWARD_SHORT:
            flat = plane_sums[0].ravel(), plane_sums[1].ravel()
            _backward_short_rows(operands, geometry, first, last, kind, flat_planes(planes), flat)
            last = first
        for block in range(first, last):
            begin, end = block * tiles, (block + 1) * tiles
            follows = block + 1 < last and geometry.runs * geometry.length <= NEAR
            if channels_last is None:
                _reduce_backward_rows(operands, geometry, begin, end, kind, planes, sums)
            else:
                _reduce_backward_channels(operands, geometry, begin, end, kind, planes, sums)
            _join_backward(geometry, block, block + 1, sums, planes, plane_sums)
            if channels_last is None:
                _apply_backward_rows(operands, geometry, begin, end, kind, planes, plane_sums, follows, buffer)
            else:
                _apply_backward_channels(operands, geometry, begin, end, kind, planes, plane_sums)
        first, last = task_done(queue)
    return own_address()
