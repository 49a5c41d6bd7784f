"""The compiled loops of the backward."""

from __future__ import annotations

import numpy as np

from .numba_activations import times_slope
from .numba_cache import inlined, kernel
from .numba_geometry import (
    AHEAD,
    NEAR,
    PARTIAL,
    PARTIAL_CHANNELS_LAST,
    TOGETHER,
    channel_coefficients,
    locate,
    next_unit,
    plane_coefficients,
    planes_together,
    prefetch_run,
    previous_unit,
    run_start,
    short_plane_offsets,
    tile_bounds,
)
from .numba_intrinsics import add, memory, narrow, own_address, scaled, stream, typed, unit_of, widen, zero_of, zeros_of
from .numba_tasks import next_tasks, task_done

BACKWARD_SHORT = 512  # elements; longer planes do not gain in the backward


@inlined
def _gradient_at(x, dy, res, o0, o2, o3, residual, act, unit, m, scale, intercept):
    """Return g, and x - mean in the plane's unit."""
    centred = scaled(widen(x[o0]), unit, m)
    z = centred * scale + intercept
    if residual is not None:
        z = z + widen(res[o3])
    return times_slope(widen(dy[o2]), z, act), centred


@inlined
def _sums_run(x, dy, res, offsets, lo, hi, residual, act, zero, unit, m, scale, intercept):
    """Return the sums of g and of g * centred for a part of a run of one plane."""
    o0, o2, o3 = offsets
    total = dot = zero
    for i in range(lo, hi):
        g, centred = _gradient_at(x, dy, res, o0 + i, o2 + i, o3 + i, residual, act, unit, m, scale, intercept)
        total = add(total, g)
        dot = add(dot, g * centred)
    return total, dot


@inlined
def _reduce_backward_rows(
    like, x, dy, res, places, runs, shape, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
):  # fmt: skip
    zero = zero_of(like)
    n, c, tile = locate(first, shape)
    for item in range(last - first):
        r0, r1, l0, l1, _ = tile_bounds(tile, shape)
        u, m, scale, intercept = plane_coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd)
        total = dot = 0.0
        for r in range(r0, r1):
            o0 = run_start(0, n, c, r, places, runs)
            o2 = run_start(2, n, c, r, places, runs)
            o3 = run_start(-2, n, c, r, places, runs)
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                prefetch_run(x, o0 + np.uint64(AHEAD), lo, hi)
                prefetch_run(dy, o2 + np.uint64(AHEAD), lo, hi)
                s, q = _sums_run(
                    x, dy, res, (o0, o2, o3), np.uint64(lo), np.uint64(hi), residual, act, zero,
                    u, m, scale, intercept,
                )  # fmt: skip
                total += s
                dot += q
        totals[item] = total
        dots[item] = dot
        n, c, tile = next_unit(n, c, tile, shape)


@inlined
def _reduce_backward_channels(
    like, x, dy, res, places, runs, shape, residual, act, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
):  # fmt: skip
    group, zeros = shape[1], zeros_of(like)
    k0, k2, k3 = np.uint64(places[0, 2]), np.uint64(places[2, 2]), np.uint64(places[-2, 2])
    table = np.empty((4, group), mean.dtype)
    u, m, scale, intercept = table
    a, b = np.empty((2, group), mean.dtype)
    n, c, tile = locate(first, shape)
    for item in range(last - first):
        width = min(group, shape[0] - c)
        channel_coefficients(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table)
        r0, r1, l0, l1, _ = tile_bounds(tile, shape)
        at = item * group
        totals[at : at + width] = 0
        dots[at : at + width] = 0
        for r in range(r0, r1):
            b0 = run_start(0, n, c, r, places, runs)
            b2 = run_start(2, n, c, r, places, runs)
            b3 = run_start(-2, n, c, r, places, runs)
            for lo in range(l0, l1, PARTIAL_CHANNELS_LAST):
                a[:] = zeros[0]
                b[:] = zeros[0]
                for i in range(np.uint64(lo), np.uint64(min(lo + PARTIAL_CHANNELS_LAST, l1))):
                    o0, o2, o3 = b0 + i * k0, b2 + i * k2, b3 + i * k3
                    for j in range(np.uint64(width)):
                        g, centred = _gradient_at(
                            x, dy, res, o0 + j, o2 + j, o3 + j, residual, act, u[j], m[j], scale[j], intercept[j]
                        )
                        a[j] += g
                        b[j] += g * centred
                for j in range(width):
                    totals[at + j] += a[j]
                    dots[at + j] += b[j]
        n, c, tile = next_unit(n, c, tile, shape)


@inlined
def _join_backward(shape, first, last, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat):
    channels, group, tiles = shape[:3]
    n, c, _ = locate(first * tiles, shape)
    for block in range(last - first):
        for j in range(min(group, channels - c)):
            at = block * tiles * group + j
            total = dot = 0.0
            for tile in range(tiles):
                total += totals[at + tile * group]
                dot += dots[at + tile * group]
            sum_g[n, c + j] = total
            unit, r = unit_of(mean[n, c + j], rstd[n, c + j])
            sum_g_xhat[n, c + j] = (dot - total * (mean_lo[n, c + j] * unit)) * r
        c += group
        if c >= channels:
            n, c = n + 1, 0


@inlined
def _slope_and_constant(shape, unit, r, mean_lo, sum_g, sum_g_xhat):
    """Return slope and constant of dx = (g + (centred * slope + constant)) * scale * unit; r is rstd in the unit."""
    count = typed(shape[8], r)
    slope = -(sum_g_xhat / count * r)
    return slope, -(sum_g / count) - mean_lo * unit * slope


@inlined
def _slopes(n, c, shape, mean, mean_lo, rstd, sum_g, sum_g_xhat):
    unit, r = unit_of(mean[n, c], rstd[n, c])
    return _slope_and_constant(shape, unit, r, mean_lo[n, c], sum_g[n, c], sum_g_xhat[n, c])


@inlined
def _gradient_run(
    like, x, dx, dy, res, dres, offsets, lo, hi, residual, act, training,
    unit, m, scale, intercept, slope, constant,
):  # fmt: skip
    """Compute dx, and a residual's gradient, for a part of a run of one plane."""
    o0, o1, o2, o3, o4 = offsets
    for i in range(lo, hi):
        g, centred = _gradient_at(x, dy, res, o0 + i, o2 + i, o3 + i, residual, act, unit, m, scale, intercept)
        if residual is not None:
            dres[o4 + i] = narrow(g, like)
        if training is not None:
            g = g + (centred * slope + constant)
        dx[o1 + i] = narrow(g * scale * unit, like)


@inlined
def _apply_backward_rows(
    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat, follows, buffer,
):  # fmt: skip
    away, away2 = np.uint64(places[0, 1]), np.uint64(places[2, 1])
    streams = shape[7]
    zero = np.uint64(0)
    n, c, tile = locate(last - 1, shape)
    for _ in range(last - first):
        r0, r1, l0, l1, _ = tile_bounds(tile, shape)
        unit, m, scale, intercept = plane_coefficients(n, c, weight, bias, param_strides, mean, mean_lo, rstd)
        slope, constant = _slopes(n, c, shape, mean, mean_lo, rstd, sum_g, sum_g_xhat)
        for r in range(r0, r1):
            o0 = run_start(0, n, c, r, places, runs)
            o1 = run_start(1, n, c, r, places, runs)
            o2 = run_start(2, n, c, r, places, runs)
            o3 = run_start(-2, n, c, r, places, runs)
            o4 = run_start(-1, n, c, r, places, runs)
            for lo in range(l0, l1, PARTIAL):
                hi = min(lo + PARTIAL, l1)
                if follows:
                    prefetch_run(x, o0 + away, lo, hi)
                    prefetch_run(dy, o2 + away2, lo, hi)
                if streams:
                    at, size = np.uint64(lo), np.uint64(hi - lo)
                    _gradient_run(
                        like, x, buffer, dy, res, dres, (o0 + at, zero, o2 + at, o3 + at, o4 + at), zero, size,
                        residual, act, training,
                        unit, m, scale, intercept, slope, constant,
                    )  # fmt: skip
                    stream(buffer, size, dx, o1 + at)
                else:
                    _gradient_run(
                        like, x, dx, dy, res, dres, (o0, o1, o2, o3, o4), np.uint64(lo), np.uint64(hi),
                        residual, act, training,
                        unit, m, scale, intercept, slope, constant,
                    )  # fmt: skip
        n, c, tile = previous_unit(n, c, tile, shape)


@inlined
def _apply_backward_channels(
    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    k0, k1, k2 = np.uint64(places[0, 2]), np.uint64(places[1, 2]), np.uint64(places[2, 2])
    k3, k4 = np.uint64(places[-2, 2]), np.uint64(places[-1, 2])
    table = np.empty((4, shape[1]), mean.dtype)
    unit, m, scale, intercept = table
    slope, constant = np.empty((2, shape[1]), mean.dtype)
    n, c, tile = locate(last - 1, shape)
    for _ in range(last - first):
        width = min(shape[1], shape[0] - c)
        channel_coefficients(n, c, width, weight, bias, param_strides, mean, mean_lo, rstd, table)
        for j in range(width):
            slope[j], constant[j] = _slopes(n, c + j, shape, mean, mean_lo, rstd, sum_g, sum_g_xhat)
        r0, r1, l0, l1, _ = tile_bounds(tile, shape)
        for r in range(r0, r1):
            b0 = run_start(0, n, c, r, places, runs)
            b1 = run_start(1, n, c, r, places, runs)
            b2 = run_start(2, n, c, r, places, runs)
            b3 = run_start(-2, n, c, r, places, runs)
            b4 = run_start(-1, n, c, r, places, runs)
            for i in range(np.uint64(l0), np.uint64(l1)):
                o0, o1, o2, o3, o4 = b0 + i * k0, b1 + i * k1, b2 + i * k2, b3 + i * k3, b4 + i * k4
                for j in range(np.uint64(width)):
                    g, centred = _gradient_at(
                        x, dy, res, o0 + j, o2 + j, o3 + j, residual, act, unit[j], m[j], scale[j], intercept[j]
                    )
                    if residual is not None:
                        dres[o4 + j] = narrow(g, like)
                    if training is not None:
                        g = g + (centred * slope[j] + constant[j])
                    dx[o1 + j] = narrow(g * scale[j] * unit[j], like)
        n, c, tile = previous_unit(n, c, tile, shape)


@inlined
def _backward_short_rows(
    like, x, dx, dy, res, dres, places, shape, residual, act, training, first, last,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    """The whole backward for short planes, as `_forward_short_rows`."""
    size, zero = np.uint64(shape[4]), zero_of(like)
    origin, sixteen = np.uint64(0), np.uint64(16)  # as in the forward
    unit, m, d, r, scale, intercept, total, dot = np.zeros((8, TOGETHER), mean.dtype)
    offsets = np.empty((len(places), TOGETHER), np.uint64)
    most = planes_together(size)
    for start in range(first, last, most):
        planes = min(most, last - start)
        short_plane_offsets(start, planes, shape, places, offsets, param_strides, weight, bias, scale, intercept)
        for j in range(planes):
            m[j], d[j], r[j] = mean[start + j], mean_lo[start + j], rstd[start + j]
        for j in range(TOGETHER):  # plane_coefficients
            unit[j], r[j] = unit_of(m[j], r[j])
            m[j] *= unit[j]
            scale[j] *= r[j]
            intercept[j] -= d[j] * unit[j] * scale[j]
        for j in range(planes):
            at = offsets[0, j], offsets[2, j], offsets[-2, j]
            values = unit[j], m[j], scale[j], intercept[j]
            if size == sixteen:  # for longer planes the hardware prefetcher suffices
                prefetch_run(x, at[0] + np.uint64(AHEAD), origin, sixteen)
                prefetch_run(dy, at[1] + np.uint64(AHEAD), origin, sixteen)
                total[j], dot[j] = _sums_run(x, dy, res, at, origin, sixteen, residual, act, zero, *values)
            else:
                total[j], dot[j] = _sums_run(x, dy, res, at, origin, size, residual, act, zero, *values)
        for j in range(TOGETHER):
            dot[j] = (dot[j] - total[j] * (d[j] * unit[j])) * r[j]
        for j in range(planes):
            sum_g[start + j], sum_g_xhat[start + j] = total[j], dot[j]
        for j in range(TOGETHER):
            dot[j], total[j] = _slope_and_constant(shape, unit[j], r[j], d[j], total[j], dot[j])
        for j in range(planes):
            at = offsets[0, j], offsets[1, j], offsets[2, j], offsets[-2, j], offsets[-1, j]
            values = unit[j], m[j], scale[j], intercept[j], dot[j], total[j]
            arrays, kinds = (like, x, dx, dy, res, dres), (residual, act, training)
            if size == sixteen:
                _gradient_run(*arrays, at, origin, sixteen, *kinds, *values)
            else:
                _gradient_run(*arrays, at, origin, size, *kinds, *values)


@kernel
def backward_tiles(
    queue, like, at, places, runs, shape, channels_last, residual, act,
    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
):  # fmt: skip
    x, dy, res = memory(at[0], like), memory(at[2], like), memory(at[-2], like)
    group = shape[1]
    first, last = next_tasks(queue)
    while first < last:
        start = shape[9] + first * group
        sums = totals[start:], dots[start:]
        if channels_last is None:
            _reduce_backward_rows(
                like, x, dy, res, places, runs, shape, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, *sums,
            )  # fmt: skip
        else:
            _reduce_backward_channels(
                like, x, dy, res, places, runs, shape, residual, act, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, *sums,
            )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


@kernel
def backward_join(shape, first, last, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat):
    _join_backward(shape, first, last, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat)


@kernel
def backward_results(
    queue, like, at, places, runs, shape, channels_last, residual, act, training,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    x, dx, dy = memory(at[0], like), memory(at[1], like), memory(at[2], like)
    res, dres = memory(at[-2], like), memory(at[-1], like)
    buffer = np.empty(PARTIAL, dx.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None:
            _apply_backward_rows(
                like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat, False, buffer,
            )  # fmt: skip
        else:
            _apply_backward_channels(
                like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, first, last,
                weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
            )  # fmt: skip
        first, last = task_done(queue)
    return own_address()


@kernel
def backward_planes(
    queue, like, at, places, runs, shape, channels_last, residual, act, training,
    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
):  # fmt: skip
    x, dx, dy = memory(at[0], like), memory(at[1], like), memory(at[2], like)
    res, dres = memory(at[-2], like), memory(at[-1], like)
    tiles = shape[2]
    totals, dots = np.empty((2, tiles * shape[1]))
    buffer = np.empty(PARTIAL, dx.dtype)
    first, last = next_tasks(queue)
    while first < last:
        if channels_last is None and shape[3] == 1 and shape[4] <= BACKWARD_SHORT:
            _backward_short_rows(
                like, x, dx, dy, res, dres, places, shape, residual, act, training, first, last,
                weight, bias, param_strides, mean.ravel(), mean_lo.ravel(), rstd.ravel(),
                sum_g.ravel(), sum_g_xhat.ravel(),
            )  # fmt: skip
            last = first
        for block in range(first, last):
            u0, u1 = block * tiles, (block + 1) * tiles
            follows = block + 1 < last and shape[3] * shape[4] <= NEAR
            if channels_last is None:
                _reduce_backward_rows(
                    like, x, dy, res, places, runs, shape, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
                )  # fmt: skip
            else:
                _reduce_backward_channels(
                    like, x, dy, res, places, runs, shape, residual, act, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, totals, dots,
                )  # fmt: skip
            _join_backward(shape, block, block + 1, totals, dots, mean, mean_lo, rstd, sum_g, sum_g_xhat)
            if channels_last is None:
                _apply_backward_rows(
                    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat, follows, buffer,
                )  # fmt: skip
            else:
                _apply_backward_channels(
                    like, x, dx, dy, res, dres, places, runs, shape, residual, act, training, u0, u1,
                    weight, bias, param_strides, mean, mean_lo, rstd, sum_g, sum_g_xhat,
                )  # fmt: skip
        first, last = task_done(queue)
    return own_address()
